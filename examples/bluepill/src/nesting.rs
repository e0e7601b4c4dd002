//! What the guest's own guests take of the hypervisor's memory, and what their tables have the processor forget.

use alloc::sync::Arc;
use core::convert::Infallible;
use core::sync::atomic::{AtomicBool, Ordering};

use testudo_ept::{Invalidate, Invalidation};

/// How many pages a composition has at most; the guest decides how many there are.
pub(crate) const PAGE_LIMIT: usize = 16 << 10;
/// What the records of the compositions take of the heap for each processor: 96 bytes for each page of
/// each of the four that the layer keeps.
pub(crate) const HEAP: usize = 4 * PAGE_LIMIT * 96;
/// What the tables of the compositions take, and the layer's control blocks and maps.
pub(crate) const FRAMES: u64 = 4 << 20;

/// Makes the processor forget translations of the guest's own guests: before the next entry of any
/// of them, all their address spaces are flushed.
#[derive(Clone, Debug, Default)]
pub(crate) struct Flusher(Arc<AtomicBool>);

impl Flusher {
    /// Whether something is to be forgotten since the last call.
    pub(crate) fn take(&self) -> bool {
        self.0.swap(false, Ordering::Relaxed)
    }
}

// SAFETY: compositions are one processor's, whose loop alone changes and enters them; it looks at the
// flag before each entry and flushes every address space that they were used under.
unsafe impl Invalidate for Flusher {
    type Error = Infallible;

    fn invalidate(&mut self, _: &Invalidation) -> Result<(), Infallible> {
        self.0.store(true, Ordering::Relaxed);
        Ok(())
    }
}
