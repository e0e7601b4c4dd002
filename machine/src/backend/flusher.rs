//! What tables that L2 runs on have the vCPU forget.

use alloc::sync::Arc;
use core::convert::Infallible;
use core::sync::atomic::{AtomicBool, Ordering};

use testudo_ept::{Invalidate, Invalidation};

/// Makes the processor forget translations of a vCPU's nested guests: all of them are flushed before
/// the next entry of any.
#[derive(Clone, Debug, Default)]
pub struct Flusher(Arc<AtomicBool>);

impl Flusher {
    /// Whether something is to be forgotten since the last call.
    pub(super) fn take(&self) -> bool {
        self.0.swap(false, Ordering::Relaxed)
    }
}

#[allow(
    unsafe_code,
    reason = "the promise that stale translations are not used"
)]
// SAFETY: composed tables are one vCPU's, whose loop alone changes and enters them; it looks at the
// flag before each entry and flushes everything that they were used for.
unsafe impl Invalidate for Flusher {
    type Error = Infallible;

    fn invalidate(&mut self, _: &Invalidation) -> Result<(), Infallible> {
        self.0.store(true, Ordering::Relaxed);
        Ok(())
    }
}
