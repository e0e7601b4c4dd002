//! Making all vCPUs forget translations, without waiting for them.
//!
//! Whoever takes pages out of the guest's table may hold a device's lock, for which another vCPU
//! may be spinning: nobody can wait for anybody here. So a change is given a number, all vCPUs are
//! asked to look up, and each says between two exits up to which number it has forgotten. A page is
//! free for others once all vCPUs have passed its number.
//!
//! A page that is shared no more must not be written as long as a vCPU runs the guest on the old translation:
//! it would see the past. For that the vCPUs are expelled from the guest, each by its [`Gate`], which
//! can be waited for whatever locks anybody holds.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

use testudo_arch::Gpa;
use testudo_ept::{Invalidate, Invalidation};

use crate::irq::{Irqchip, request};
use crate::paging::{Gate, expel};

/// The request by which a vCPU is told to forget.
pub(crate) const FORGET: u32 = 1 << 30;
const _: () = assert!(FORGET & request::MACHINE != 0 && FORGET != request::DEVICE_TIMERS);

/// Who wants to know that all vCPUs have forgotten something.
type Waiter = Box<dyn Fn() + Send + Sync>;

/// The numbers of changes, and how far each vCPU is.
pub struct Shootdown {
    last: AtomicU64,
    forgotten: Box<[AtomicU64]>,
    gates: Box<[Gate]>,
    /// The page that there was no memory for, and one bit more.
    exhausted: AtomicU64,
    chip: spin::Once<Arc<Irqchip>>,
    waiters: spin::RwLock<Vec<Waiter>>,
}

impl Shootdown {
    /// For a machine with so many vCPUs, which is yet to be built.
    pub fn new(vcpus: usize) -> Arc<Self> {
        Arc::new(Self {
            last: AtomicU64::new(0),
            forgotten: (0..vcpus).map(|_| AtomicU64::new(0)).collect(),
            gates: (0..vcpus).map(|_| Gate::default()).collect(),
            exhausted: AtomicU64::new(0),
            chip: spin::Once::new(),
            waiters: spin::RwLock::new(Vec::new()),
        })
    }

    /// How many vCPUs it waits for.
    pub fn vcpus(&self) -> usize {
        self.forgotten.len()
    }

    /// Has `waiter` called, by a vCPU's loop between two exits, whenever all vCPUs have forgotten
    /// one more change.
    pub fn add_waiter(&self, waiter: impl Fn() + Send + Sync + 'static) {
        self.waiters.write().push(Box::new(waiter));
    }

    /// The machine is built: its vCPUs can be reached from now on.
    pub(crate) fn connect(&self, chip: &Arc<Irqchip>) {
        self.chip.call_once(|| chip.clone());
    }

    /// Gives a change that has been made its number, and asks all vCPUs to forget what was before.
    pub fn begin(&self) -> u64 {
        let number = self.last.fetch_add(1, Ordering::SeqCst) + 1;
        self.request_all();
        number
    }

    fn request_all(&self) {
        if let Some(chip) = self.chip.get() {
            for vcpu in 0..self.forgotten.len() {
                chip.request(vcpu, FORGET);
            }
        }
    }

    /// The gate that a vCPU goes through into the guest and back, if memory of the machine is shared.
    pub fn gate(&self, vcpu: usize) -> Option<&Gate> {
        self.gates.get(vcpu)
    }

    /// Notes where the guest's table was changed, before its vCPUs are told of it by [`begin`](Self::begin) or
    /// [`expel`](Self::expel).
    pub(crate) fn note_change(&self, start: Gpa, len: u64) {
        for gate in &self.gates {
            gate.note_change(start, len);
        }
    }

    /// Has all vCPUs out of the guest, none of which enters again before it has dropped its translations.
    /// They must go through their gates.
    pub(crate) fn expel(&self) {
        // Before the machine is built nobody runs.
        if let Some(chip) = self.chip.get() {
            expel(&self.gates, &**chip.host(), None);
        }
    }

    /// There is no memory for a page that is the guest's and that a device or an emulated instruction
    /// accesses: the machine stops.
    pub(crate) fn exhaust(&self, page: Gpa) {
        self.exhausted.store(page.0 | 1, Ordering::SeqCst);
        self.request_all();
    }

    /// The page that there was no memory for.
    pub(crate) fn exhausted(&self) -> Option<Gpa> {
        let page = self.exhausted.load(Ordering::SeqCst);
        (page != 0).then_some(Gpa(page & !1))
    }

    /// The last number given. A vCPU that forgets everything after this was read has forgotten
    /// what was before that change.
    pub(crate) fn last(&self) -> u64 {
        self.last.load(Ordering::SeqCst)
    }

    /// A vCPU will not use anything that was before the change with this number, be it by a cached
    /// translation or in the handling of an exit.
    pub(crate) fn acknowledge(&self, vcpu: usize, number: u64) {
        if let Some(forgotten) = self.forgotten.get(vcpu) {
            forgotten.fetch_max(number, Ordering::SeqCst);
        }
        if self.passed() >= number {
            for waiter in self.waiters.read().iter() {
                waiter();
            }
        }
    }

    /// The number up to which all vCPUs have forgotten.
    pub fn passed(&self) -> u64 {
        let each = self.forgotten.iter().map(|f| f.load(Ordering::SeqCst));
        each.min().unwrap_or(u64::MAX)
    }

    /// What discharges the flush of a change with this number, if all vCPUs have forgotten it.
    pub(crate) fn evidence(&self, number: u64) -> Evidence {
        Evidence(self.passed() >= number)
    }
}

/// Not all vCPUs have forgotten yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NotYet;

/// Whether all vCPUs have forgotten a change.
pub(crate) struct Evidence(bool);

#[allow(
    unsafe_code,
    reason = "the promise that stale translations are not used"
)]
// SAFETY: only `Shootdown::evidence` makes one, for a change whose number was given after the edit of
// the table. A vCPU acknowledges a number between two exits, after reading it and before making the
// processor forget all guest-physical translations ahead of the next entry: so once all have, no
// processor uses a translation from before the edit, and each call that began before it is over.
unsafe impl Invalidate for Evidence {
    type Error = NotYet;

    fn invalidate(&mut self, _: &Invalidation) -> Result<(), NotYet> {
        if self.0 { Ok(()) } else { Err(NotYet) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::sync::atomic::AtomicUsize;

    #[test]
    fn a_change_has_passed_when_the_last_vcpu_says_so() {
        let shootdown = Shootdown::new(2);
        let told = Arc::new(AtomicUsize::new(0));
        let count = told.clone();
        shootdown.add_waiter(move || {
            count.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!((shootdown.begin(), shootdown.begin()), (1, 2));
        shootdown.acknowledge(0, 2);
        assert_eq!(shootdown.passed(), 0);
        assert_eq!(told.load(Ordering::Relaxed), 0);
        shootdown.acknowledge(1, 1);
        assert_eq!(shootdown.passed(), 1);
        assert!(shootdown.evidence(1).0 && !shootdown.evidence(2).0);
        assert_eq!(told.load(Ordering::Relaxed), 1);
        shootdown.acknowledge(7, 2); // There is no such vCPU.
        assert_eq!(shootdown.passed(), 1);
        shootdown.acknowledge(1, 2);
        assert_eq!(shootdown.passed(), 2);
    }
}
