//! Pages that are shared among all guests.

use alloc::sync::Arc;
use core::fmt;

use spin::Mutex;
use testudo_arch::{FrameAlloc, PAGE_SIZE};
use testudo_ept::sharing::SharedFrames;
use testudo_machine::paged::SharedPool;
use testudo_virtio::device::Entropy;

use crate::args::Args;
use crate::devices::RandomSource;
use crate::frames::Frames;

/// What the guests share.
#[derive(Clone)]
pub(crate) struct Sharing {
    pub(crate) pool: SharedPool,
    /// How many pages of each guest are looked at in a second.
    pub(crate) per_second: u64,
}

impl Sharing {
    /// What `args` ask for; the error is that there is no memory.
    pub(crate) fn new(args: &Args<'_>) -> Result<Option<Self>, &'static str> {
        let Some(per_second) = args.share_pages else {
            return Ok(None);
        };
        let zero = Frames.alloc().ok_or("no memory is left for a page")?;
        // Without --mem there is none that can be plugged.
        let each = args.memory_mib + args.devices.mem_mib.unwrap_or(0);
        let pages = (each << 20) / PAGE_SIZE * args.guests as u64;
        let mut seed = [[0; 8]; 2];
        let mut random = RandomSource::of_this_processor();
        for word in &mut seed {
            random.fill(word);
        }
        let frames = SharedFrames::new(zero, pages as usize, seed.map(u64::from_le_bytes));
        Ok(Some(Self {
            pool: Arc::new(Mutex::new(frames)),
            per_second,
        }))
    }
}

impl fmt::Display for Sharing {
    /// What it did.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stats = self.pool.lock().stats();
        write!(
            f,
            "sharing: {} pages scanned, {} had changed and {} were mistaken; {} merged and {} written since; \
             {} share {} frames now, {} of them that of zeros: {} frames saved",
            stats.scanned,
            stats.volatile,
            stats.mistaken,
            stats.merged,
            stats.broken,
            stats.sharing,
            stats.shared,
            stats.zero,
            stats.saved()
        )
    }
}
