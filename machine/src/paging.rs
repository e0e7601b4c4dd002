//! Shadow paging for a whole machine: the tables that its vCPUs share, and what each tells the
//! others.
//!
//! On a processor without nested paging, guests run on tables that [`ShadowMmu`] fills from
//! theirs. All vCPUs share one set under one lock. An edit that takes rights away must reach every
//! processor that may have cached them: before the call returns, each other vCPU either has been
//! outside the guest, and drops its translations before it enters again, or is made to leave by a
//! kick.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::convert::Infallible;
use core::fmt;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use arrayvec::ArrayVec;
use testudo_arch::cpuid::Cpuid;
use testudo_arch::memory::GuestRam;
use testudo_arch::{Cr4Flags, FrameAlloc, FrameMem, Gpa, GuestMemory, Gva};
use testudo_ept::shadow::{Backing, Outcome, ShadowError, ShadowMmu, ShadowRoot};
use testudo_ept::walk::{Access, AccessKind, PageFault, PageFaultCode, PagingState, Privilege};
use testudo_ept::{Invalidate, Invalidation};

#[cfg(any(feature = "svm", feature = "vmx"))]
pub use crate::backend::paging::ShadowPlace;
use crate::host::Host;

/// How a guest's memory is put behind its own paging.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Paging {
    /// The processor walks the guest's tables, and ours for every address in them.
    Nested,
    /// The processor walks our tables only, which are made of both.
    Shadow,
}

/// Takes from the processor's CPUID what guests on shadow paging cannot have: INVPCID, which would
/// act on translations that are not theirs. PCIDs themselves no guest of this crate has.
pub fn hide_from_guests(processor: &mut Cpuid) {
    if let Some(features) = processor.get_mut(7, 0) {
        features.ebx &= !(1 << 10);
    }
}

/// The bits of CR4 that a guest with these CPUID answers may set: those that every guest has, and
/// those whose feature it is shown.
pub fn allowed_cr4(guest: &Cpuid) -> u64 {
    const PLAIN: Cr4Flags = Cr4Flags::VIRTUAL_8086_MODE_EXTENSIONS
        .union(Cr4Flags::PROTECTED_MODE_VIRTUAL_INTERRUPTS)
        .union(Cr4Flags::TIMESTAMP_DISABLE)
        .union(Cr4Flags::DEBUGGING_EXTENSIONS)
        .union(Cr4Flags::PAGE_SIZE_EXTENSION)
        .union(Cr4Flags::PHYSICAL_ADDRESS_EXTENSION)
        .union(Cr4Flags::MACHINE_CHECK_EXCEPTION)
        .union(Cr4Flags::PAGE_GLOBAL)
        .union(Cr4Flags::PERFORMANCE_MONITOR_COUNTER)
        .union(Cr4Flags::OSFXSR)
        .union(Cr4Flags::OSXMMEXCPT_ENABLE);
    let [_, ebx, ecx, _] = guest.query(7, 0);
    let xsave = guest.query(1, 0)[2] & 1 << 26;
    let shown = [
        (ebx & 1, Cr4Flags::FSGSBASE),
        (ebx & 1 << 7, Cr4Flags::SUPERVISOR_MODE_EXECUTION_PROTECTION),
        (ebx & 1 << 20, Cr4Flags::SUPERVISOR_MODE_ACCESS_PREVENTION),
        (ecx & 1 << 2, Cr4Flags::USER_MODE_INSTRUCTION_PREVENTION),
        (ecx & 1 << 3, Cr4Flags::PROTECTION_KEY_USER),
        (ecx & 1 << 16, Cr4Flags::L5_PAGING),
        (xsave, Cr4Flags::OSXSAVE),
    ];
    let shown = shown.into_iter().filter(|(feature, _)| *feature != 0);
    shown.fold(PLAIN.bits(), |sum, (_, flag)| sum | flag.bits())
}

/// How many shadow tables a guest with this memory is given: as many as map it twice over in
/// 4 KiB pages, and those of some hundred small processes.
pub fn table_limit(memory: &GuestRam) -> usize {
    let bytes = memory
        .ranges()
        .fold(0u64, |sum, (_, len, _)| sum.saturating_add(len));
    let twice = usize::try_from(bytes >> 20).unwrap_or(usize::MAX);
    twice.saturating_add(2048)
}

/// Who runs on tables: the guest on one of its vCPUs, or a guest of its own there.
///
/// What a table in the guest's memory means does not depend on who uses it, so that all of them share
/// its shadows. Each has a root of its own, which stays while the other one runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Walker {
    /// The vCPU.
    pub vcpu: usize,
    /// A guest of the guest's runs there (L2), on tables that the guest made for it.
    pub is_nested: bool,
}

/// What a vCPU on shadow paging asks of the tables, whatever they are made of.
pub trait ShadowTables: Sync {
    /// Makes the tables that `state` selects the walker's; the value for the hardware's CR3. All
    /// translations of the vCPU's own are dropped before it runs again.
    ///
    /// # Errors
    ///
    /// There is no memory for them.
    fn load(&self, walker: Walker, state: &PagingState) -> Result<u64, ShadowError>;

    /// Handles a page fault of the walker on its tables.
    ///
    /// # Errors
    ///
    /// There is no memory for tables, or none is loaded.
    fn fault(
        &self,
        walker: Walker,
        state: &PagingState,
        address: Gva,
        access: Access,
    ) -> Result<Outcome, ShadowError>;

    /// INVLPG. The vCPU's own translations of the page are the caller's to drop.
    fn invalidate_page(&self, walker: Walker, address: Gva);

    /// The machine wrote `len` bytes at `gpa` for the vCPU.
    fn written(&self, vcpu: usize, gpa: Gpa, len: u64);

    /// Lets the guest itself write to the table at `gpa`; `false` if nothing keeps it from that.
    fn release(&self, vcpu: usize, gpa: Gpa) -> bool;

    /// The gate that the vCPU goes through into the guest and back.
    fn gate(&self, vcpu: usize) -> &Gate;
}

/// Where a vCPU is, for those who must make it drop its translations.
#[derive(Debug, Default)]
pub struct Gate {
    /// Odd while the vCPU is in the guest.
    passes: AtomicU32,
    /// Its cached translations are to be dropped before it enters.
    stale: AtomicBool,
    /// What was changed in the second stage since the vCPU last asked.
    changes: spin::Mutex<Changes>,
}

/// How many places of a second stage are told apart.
const PLACES: usize = 256;

/// Where a second stage was changed.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    places: ArrayVec<(Gpa, u64), PLACES>,
    /// There were too many.
    everywhere: bool,
}

impl Changes {
    /// The places with their lengths; `None` if it may be anywhere.
    #[cfg(any(test, feature = "svm", feature = "vmx"))]
    pub(crate) fn places(&self) -> Option<&[(Gpa, u64)]> {
        (!self.everywhere).then_some(&self.places)
    }

    fn add(&mut self, start: Gpa, len: u64) {
        if let Some((last, extent)) = self.places.last_mut()
            && last.0.checked_add(*extent) == Some(start.0)
        {
            *extent += len;
        } else if self.places.try_push((start, len)).is_err() {
            self.everywhere = true;
        }
    }
}

impl Gate {
    /// Says that the vCPU is about to enter the guest; `true` if it must drop its translations first.
    #[inline]
    pub fn enter(&self) -> bool {
        // Either this store is seen by whoever sets `stale` afterwards, who then waits for the
        // vCPU to leave, or `stale` is seen here.
        self.passes.fetch_add(1, Ordering::SeqCst);
        self.stale.load(Ordering::SeqCst) && self.stale.swap(false, Ordering::SeqCst)
    }

    /// Says that the vCPU has left the guest.
    #[inline]
    pub fn leave(&self) {
        self.passes.fetch_add(1, Ordering::Release);
    }

    /// Says where the second stage has been changed: after the change, and before the vCPU is told to drop its
    /// translations. What it has made of the second stage elsewhere, for a guest of the guest's, it may keep.
    pub(crate) fn note_change(&self, start: Gpa, len: u64) {
        self.changes.lock().add(start, len);
    }

    /// What was noted since the last call; for the vCPU, outside of the gate.
    #[cfg(any(test, feature = "svm", feature = "vmx"))]
    pub(crate) fn take_changes(&self) -> Changes {
        core::mem::take(&mut self.changes.lock())
    }

    /// Has the vCPU drop its translations before it enters again.
    #[inline]
    pub fn drop_translations(&self) {
        self.stale.store(true, Ordering::SeqCst);
    }
}

/// Has all vCPUs but `own`, which is outside, leave the guest; each drops its translations before it
/// enters again.
///
/// Nobody who is waited for can be waiting: a vCPU takes no lock between its gate and the guest.
pub(crate) fn expel(gates: &[Gate], host: &dyn Host, own: Option<usize>) {
    for gate in gates {
        gate.drop_translations();
    }
    for (vcpu, gate) in gates.iter().enumerate() {
        if Some(vcpu) == own {
            continue;
        }
        let pass = gate.passes.load(Ordering::SeqCst);
        if pass & 1 == 0 {
            continue;
        }
        // It is in the guest or about to be, with interrupts held back: the kick's makes it leave at
        // once.
        host.kick(vcpu);
        while gate.passes.load(Ordering::Acquire) == pass {
            core::hint::spin_loop();
        }
    }
}

/// The shadow tables of one machine.
pub struct ShadowPaging<F: FrameAlloc + FrameMem, M, B> {
    shared: spin::Mutex<Shared<F>>,
    gates: Vec<Gate>,
    memory: M,
    backing: B,
    host: Arc<dyn Host>,
    counters: Counters,
}

struct Shared<F: FrameAlloc + FrameMem> {
    mmu: ShadowMmu<F>,
    /// Of each vCPU: the guest's, and that of a guest of its own.
    roots: Vec<[ShadowRoot; 2]>,
}

impl<F: FrameAlloc + FrameMem> Shared<F> {
    /// The tables, and the walker's root.
    fn of(&mut self, walker: Walker) -> (&mut ShadowMmu<F>, &mut ShadowRoot) {
        let root = &mut self.roots[walker.vcpu][usize::from(walker.is_nested)];
        (&mut self.mmu, root)
    }
}

/// What shadow paging did, in numbers.
#[derive(Debug, Default)]
struct Counters {
    loads: AtomicU64,
    filled: AtomicU64,
    injected: AtomicU64,
    devices: AtomicU64,
    table_writes: AtomicU64,
    invalidations: AtomicU64,
    released: AtomicU64,
    flushes: AtomicU64,
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

impl<F: FrameAlloc + FrameMem, M: GuestMemory, B: Backing> ShadowPaging<F, M, B> {
    /// Tables for `vcpus` vCPUs whose guest has `memory`, which `backing` says where it lies. At
    /// most `limit` tables from `frames` are in use at a time.
    ///
    /// The guest reaches what `backing` finds and nothing else.
    pub fn new(
        frames: F,
        limit: usize,
        memory: M,
        backing: B,
        host: Arc<dyn Host>,
        vcpus: usize,
    ) -> Self {
        Self {
            shared: spin::Mutex::new(Shared {
                mmu: ShadowMmu::new(frames, limit),
                roots: (0..vcpus).map(|_| Default::default()).collect(),
            }),
            gates: (0..vcpus).map(|_| Gate::default()).collect(),
            memory,
            backing,
            host,
            counters: Counters::default(),
        }
    }

    fn gates(&self, vcpu: usize) -> Gates<'_> {
        Gates {
            gates: &self.gates,
            host: &*self.host,
            counters: &self.counters,
            own: vcpu,
        }
    }

    /// Runs `attempt` and, if there were no frames, once more when all tables have been given up.
    fn with_frames<T>(
        &self,
        shared: &mut Shared<F>,
        vcpu: usize,
        mut attempt: impl FnMut(&mut Shared<F>) -> Result<T, ShadowError>,
    ) -> Result<T, ShadowError> {
        match attempt(shared) {
            Err(ShadowError::OutOfFrames) => {
                shared.mmu.clear().discharge(&mut self.gates(vcpu));
                attempt(shared)
            }
            result => result,
        }
    }
}

impl<F, M, B> ShadowTables for ShadowPaging<F, M, B>
where
    F: FrameAlloc + FrameMem + Send,
    M: GuestMemory + Sync,
    B: Backing + Sync,
{
    fn load(&self, walker: Walker, state: &PagingState) -> Result<u64, ShadowError> {
        count(&self.counters.loads);
        let vcpu = walker.vcpu;
        let mut shared = self.shared.lock();
        self.gates[vcpu].drop_translations();
        self.with_frames(&mut shared, vcpu, |shared| {
            let (mmu, root) = shared.of(walker);
            let loaded = mmu.load(root, &self.memory, state)?;
            Ok(loaded.discharge(&mut self.gates(vcpu)))
        })
    }

    fn fault(
        &self,
        walker: Walker,
        state: &PagingState,
        address: Gva,
        access: Access,
    ) -> Result<Outcome, ShadowError> {
        let outcome = {
            let mut shared = self.shared.lock();
            self.with_frames(&mut shared, walker.vcpu, |shared| {
                let (mmu, root) = shared.of(walker);
                let fault = mmu.fault(root, &self.memory, &self.backing, state, address, access)?;
                Ok(fault.discharge(&mut self.gates(walker.vcpu)))
            })
        };
        let outcome = match outcome {
            // A bus that nobody drives reads as ones, and an entry of ones has reserved bits set.
            Err(ShadowError::NoTable(_)) => {
                let mut code = PageFaultCode::PRESENT | PageFaultCode::RESERVED;
                code.set(PageFaultCode::WRITE, access.kind == AccessKind::Write);
                code.set(PageFaultCode::USER, access.privilege == Privilege::User);
                Outcome::Inject(PageFault { address, code })
            }
            outcome => outcome?,
        };
        let counters = &self.counters;
        count(match outcome {
            Outcome::Resolved => &counters.filled,
            Outcome::TableWrite(_) => &counters.table_writes,
            Outcome::NotMemory(_) | Outcome::ReadOnly(_) => &counters.devices,
            _ => &counters.injected,
        });
        Ok(outcome)
    }

    fn invalidate_page(&self, walker: Walker, address: Gva) {
        count(&self.counters.invalidations);
        let mut shared = self.shared.lock();
        let (mmu, root) = shared.of(walker);
        mmu.invalidate_page(root, &self.memory, address)
            .discharge(&mut self.gates(walker.vcpu));
    }

    fn written(&self, vcpu: usize, gpa: Gpa, len: u64) {
        let mut shared = self.shared.lock();
        let written = shared.mmu.written(gpa, len);
        written.discharge(&mut self.gates(vcpu));
    }

    fn release(&self, vcpu: usize, gpa: Gpa) -> bool {
        count(&self.counters.released);
        let mut shared = self.shared.lock();
        let released = shared.mmu.release(gpa);
        released.discharge(&mut self.gates(vcpu))
    }

    fn gate(&self, vcpu: usize) -> &Gate {
        &self.gates[vcpu]
    }
}

/// Makes all vCPUs drop their translations.
struct Gates<'a> {
    gates: &'a [Gate],
    host: &'a dyn Host,
    counters: &'a Counters,
    own: usize,
}

#[allow(
    unsafe_code,
    reason = "the promise that stale translations are not used"
)]
// SAFETY: every vCPU passes its gate at each entry and exit. One that is in the guest is waited for
// until it has left; each drops its translations, all of its address space's, before it enters again.
// Calls on the tables are made under one lock, so that no other has begun.
unsafe impl Invalidate for Gates<'_> {
    type Error = Infallible;

    fn invalidate(&mut self, _: &Invalidation) -> Result<(), Infallible> {
        count(&self.counters.flushes);
        expel(self.gates, self.host, Some(self.own));
        Ok(())
    }
}

impl<F: FrameAlloc + FrameMem, M, B> fmt::Display for ShadowPaging<F, M, B> {
    /// What shadow paging did, as a table.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let c = &self.counters;
        writeln!(f, "{:<18}{:>12}", "shadow paging", "count")?;
        for (name, counter) in [
            ("CR3 loads", &c.loads),
            ("INVLPG", &c.invalidations),
            ("faults filled", &c.filled),
            ("faults injected", &c.injected),
            ("faults on devices", &c.devices),
            ("table writes", &c.table_writes),
            ("tables released", &c.released),
            ("flushes", &c.flushes),
        ] {
            writeln!(f, "{name:<18}{:>12}", of(counter))?;
        }
        let shared = self.shared.lock();
        let (tables, mapped) = (shared.mmu.tables(), shared.mmu.mapped());
        write!(
            f,
            "{:<18}{tables:>12}\n{:<18}{mapped:>12}",
            "tables now", "pages mapped now"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;
    use testudo_arch::Hpa;

    /// Kicks are flags, which a processor in the guest looks at as it would take an interrupt.
    struct Kicks([AtomicBool; 2]);

    impl Host for Kicks {
        fn now(&self) -> u64 {
            0
        }
        fn tsc(&self) -> u64 {
            0
        }
        fn tsc_hz(&self) -> u64 {
            1
        }
        fn kick(&self, vcpu: usize) {
            self.0[vcpu].store(true, Ordering::SeqCst);
        }
        fn set_timer(&self, _: Option<u64>) {}
        fn wait(&self) {}
    }

    /// When a flush is over, no processor uses what it had cached before, however it was on its way
    /// into the guest or out.
    #[test]
    fn no_vcpu_uses_a_translation_after_its_flush() {
        const CHANGES: u64 = 300;
        let gates = [Gate::default(), Gate::default()];
        let host = Kicks([AtomicBool::new(false), AtomicBool::new(false)]);
        // The one entry of the one table, and the oldest value that may still be used.
        let (entry, oldest) = (AtomicU64::new(0), AtomicU64::new(0));
        let wrong = AtomicU64::new(0);
        let run = &|vcpu: usize| {
            let gate = &gates[vcpu];
            gate.drop_translations();
            let mut cached = 0;
            while cached < CHANGES {
                if gate.enter() {
                    cached = entry.load(Ordering::SeqCst);
                }
                for _ in 0..64 {
                    if cached < oldest.load(Ordering::SeqCst) {
                        wrong.fetch_add(1, Ordering::Relaxed);
                    }
                    if host.0[vcpu].swap(false, Ordering::SeqCst) {
                        break;
                    }
                    thread::yield_now();
                }
                gate.leave();
            }
        };
        thread::scope(|scope| {
            for vcpu in 0..2 {
                scope.spawn(move || run(vcpu));
            }
            let counters = Counters::default();
            let mut hardware = Gates {
                gates: &gates,
                host: &host,
                counters: &counters,
                own: usize::MAX,
            };
            let everything = Invalidation {
                root: Hpa::ZERO,
                first: 0,
                last: u64::MAX,
                leaves_only: false,
            };
            for change in 1..=CHANGES {
                entry.store(change, Ordering::SeqCst);
                let Ok(()) = hardware.invalidate(&everything);
                oldest.store(change, Ordering::SeqCst);
            }
        });
        assert_eq!(wrong.into_inner(), 0);
    }
}
