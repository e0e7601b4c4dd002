//! Who may edit a table: many that add or change one entry, or one that takes tables away.

#[cfg(loom)]
use loom::sync::atomic::{AtomicU32, Ordering};

#[cfg(not(loom))]
use core::sync::atomic::{AtomicU32, Ordering};

const EXCLUSIVE: u32 = 1 << 31;

/// A reader-writer spin lock among editors. Readers of the table never touch it.
///
/// An exclusive editor that waits keeps new shared ones out, so that it is not starved.
#[derive(Debug)]
pub(crate) struct EditLock(AtomicU32);

impl EditLock {
    pub(crate) fn new() -> Self {
        Self(AtomicU32::new(0))
    }

    /// Waits until no exclusive editor is at work.
    #[inline]
    pub(crate) fn shared(&self) -> Shared<'_> {
        loop {
            if self.0.fetch_add(1, Ordering::Acquire) & EXCLUSIVE == 0 {
                return Shared(&self.0);
            }
            self.0.fetch_sub(1, Ordering::Relaxed);
            while self.0.load(Ordering::Relaxed) & EXCLUSIVE != 0 {
                pause();
            }
        }
    }

    /// Waits until no other editor is at work.
    #[inline]
    pub(crate) fn exclusive(&self) -> Exclusive<'_> {
        while self.0.fetch_or(EXCLUSIVE, Ordering::Acquire) & EXCLUSIVE != 0 {
            while self.0.load(Ordering::Relaxed) & EXCLUSIVE != 0 {
                pause();
            }
        }
        while self.0.load(Ordering::Acquire) != EXCLUSIVE {
            pause();
        }
        Exclusive(&self.0)
    }
}

#[inline]
fn pause() {
    #[cfg(loom)]
    loom::thread::yield_now();
    #[cfg(not(loom))]
    core::hint::spin_loop();
}

/// The permission to change single entries.
pub(crate) struct Shared<'a>(&'a AtomicU32);

impl Drop for Shared<'_> {
    #[inline]
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Release);
    }
}

/// The permission to take tables out.
pub(crate) struct Exclusive<'a>(&'a AtomicU32);

impl Drop for Exclusive<'_> {
    #[inline]
    fn drop(&mut self) {
        self.0.fetch_and(!EXCLUSIVE, Ordering::Release);
    }
}
