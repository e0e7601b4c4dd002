//! SVM for a guest hypervisor: VMRUN and its companions without the hardware's help (APM vol. 2,
//! chapter 15).
//!
//! [`NestedSvm`] is the state of one vCPU. Its backend runs L1 with a VMCB of its own (`vmcb01`)
//! and calls here in four places:
//!
//! - an SVM instruction exited: [`NestedSvm::execute`];
//! - L2 exited: [`NestedSvm::exited`], or [`NestedSvm::exited_by_page_fault`] if L0 itself shadows
//!   page tables;
//! - the machine has an interrupt, an NMI or INIT for the vCPU: [`NestedSvm::acceptance`], and
//!   [`NestedSvm::exit_to_l1`] if L1 intercepts it;
//! - L1 touches EFER, VM_CR or VM_HSAVE_PA: [`NestedSvm::read_msr`], [`NestedSvm::write_msr`].
//!
//! While [`NestedSvm::is_guest`], the processor runs [`NestedSvm::vmcb02`] instead of `vmcb01`.
//!
//! # How it is fast
//!
//! L1's own state never moves: it stays in `vmcb01` while L2 runs, which makes that VMCB the host
//! save area (its contents are the processor's affair, 15.30.4). An entry copies the 400 bytes that
//! VMRUN reads, and of those hands to `vmcb02` what the clean bits say has changed. An exit writes
//! the 250 bytes that #VMEXIT writes. What VMLOAD and VMSAVE move stays in place, as it does in the
//! registers of a processor.
//!
//! # Example
//!
//! A guest hypervisor runs its guest, which executes VMMCALL.
//!
//! ```
//! use testudo_arch::memory::{GuestMemory, GuestRam};
//! use testudo_arch::{Gpa, Gprs, Hpa, Msr};
//! use testudo_nested::svm::*;
//! use testudo_svm::intercept::Misc2;
//! use testudo_svm::permission::{IoPermissionMap, MsrPermissionMap};
//! use testudo_svm::{Defects, SvmCaps, Vmcb};
//!
//! let mut bytes = vec![0u64; 0x2000];
//! let mut memory = GuestRam::new();
//! // SAFETY: `bytes` outlives `memory`, and nothing else refers to it.
//! unsafe { memory.add(Gpa(0), bytes.as_mut_ptr().cast(), 0x1_0000, true) }?;
//!
//! let caps = SvmCaps::ZEN2;
//! let l1_caps = SvmCaps { features: offer(&caps), ..caps };
//! let host = Host {
//!     caps: &caps,
//!     l1_caps: &l1_caps,
//!     msr_permissions: &MsrPermissionMap::intercept_all(),
//!     io_permissions: &IoPermissionMap::intercept_all(),
//!     defects: Defects::empty(),
//! };
//! let pages = Pages::new().expect("memory");
//! let mut nested = NestedSvm::new(&host, pages, Hpa(0x10_0000)).expect("memory");
//!
//! // L1, in protected mode, has turned SVM on.
//! let mut vmcb01 = Vmcb::new();
//! vmcb01.set_cr0(0x11);
//! assert!(nested.write_svme(1 << 12));
//! assert_eq!(nested.write_msr(Msr::VM_HSAVE_PA, 0x3000), Some(true));
//! nested.adjust_vmcb01(&mut vmcb01);
//!
//! let mut vmcb12 = Vmcb::new();
//! vmcb12.set_intercept_misc2(Misc2::VMRUN | Misc2::VMMCALL);
//! vmcb12.set_asid(1);
//! vmcb12.set_efer(1 << 12);
//! memory.write_value(Gpa(0x5000), &vmcb12)?;
//! let mut gprs = Gprs { rax: 0x5000, ..Gprs::default() };
//! let mut cx = Context {
//!     gprs: &mut gprs,
//!     vmcb01: &mut vmcb01,
//!     memory: &memory,
//!     second_stage: &mut NoSecondStage,
//! };
//! assert_eq!(nested.execute(Instruction::Vmrun, 3, &mut cx), Outcome::Entered);
//!
//! // The processor runs `vmcb02`, and reports the exit there.
//! nested.vmcb02_mut().set_exit_code(0x81);
//! let Handled::L1(barrier) = nested.exited(&mut cx) else { panic!("L1 asked for VMMCALL") };
//! barrier.ignore();
//! assert_eq!(memory.read_value::<Vmcb>(Gpa(0x5000))?.exit_code(), 0x81);
//! assert_eq!(vmcb01.rip(), 3);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # What L1 is offered
//!
//! [`offer`] says which features: those that the processor has and this layer passes on, and
//! three that this layer provides by itself (clean bits, flush by ASID, address checks).

mod asid;
mod caps;
mod composed;
mod entry;
mod events;
mod exit;
mod image;
mod instruction;
mod maps;
mod msr;
mod route;
mod saved;
mod stage;
#[cfg(test)]
mod tests;

use alloc::boxed::Box;

use testudo_arch::{Gpa, Gprs, GuestMemory, Hpa};

use crate::open_words::OpenWords;
use testudo_svm::asid::AsidSlot;
use testudo_svm::caps::{Features, SvmCaps, VmCr};
use testudo_svm::permission::{IoPermissionMap, MsrPermissionMap};
use testudo_svm::{Defects, Vmcb, event::RawEvent, vmcb::VirtualInterrupts};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

pub use caps::{leaf_8000_000a, offer};
pub use composed::{ComposedParts, ComposedStage};
pub use events::{Acceptance, PhysicalEvent};
pub use exit::{Handled, PageFaultOf, PredictorBarrier};
pub use instruction::{Instruction, Outcome};
pub use route::{RawExit, Route, route};
pub use saved::{RestoreError, SavedGuest, SavedSvm};
pub use stage::{NestedFault, NestedTable, NoSecondStage, SecondStage};

/// What the processor reads while L2 runs: its VMCB and its permission maps, in one piece of
/// memory that is contiguous in the host's physical addresses too.
#[derive(Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(4096))]
pub struct Pages {
    vmcb: Vmcb,
    msr: MsrPermissionMap,
    io: IoPermissionMap,
}

impl Pages {
    /// Zeroed pages, or `None` if there is no memory for them.
    pub fn new() -> Option<Box<Self>> {
        Self::new_box_zeroed().ok()
    }
}

/// What L0's own VMCB and maps are like, for the parts that L2's depend on.
#[derive(Clone, Copy, Debug)]
pub struct Host<'a> {
    /// What the processor offers.
    pub caps: &'a SvmCaps,
    /// What L1 was told that its processor offers: [`SvmCaps::from_cpuid`] of its CPUID table.
    pub l1_caps: &'a SvmCaps,
    /// The MSR permission map that L1 runs with.
    pub msr_permissions: &'a MsrPermissionMap,
    /// The I/O permission map that L1 runs with.
    pub io_permissions: &'a IoPermissionMap,
    /// What the processor does otherwise than the manual says.
    pub defects: Defects,
}

/// What a call works on besides the nested state itself.
#[derive(Debug)]
pub struct Context<'a, M, S> {
    /// The general registers of whoever runs. RAX and RSP here are the ones that count.
    pub gprs: &'a mut Gprs,
    /// The VMCB that the processor runs L1 with.
    pub vmcb01: &'a mut Vmcb,
    /// L1's memory.
    pub memory: &'a M,
    /// L1's nested page table composed with L0's.
    pub second_stage: &'a mut S,
}

/// The nested state of one vCPU: SVM as L1 sees it.
#[derive(Debug)]
pub struct NestedSvm {
    pages: Box<Pages>,
    pages_at: Hpa,
    /// The copy of L1's control block that the current entry works with.
    vmcb12: Box<Vmcb>,
    /// Where L1 has its control block.
    vmcb12_at: Gpa,
    /// `vmcb02` still holds the guest state of the block at `vmcb12_at`, as the last exit wrote it.
    is_cached: bool,
    features: Features,
    l1_caps: SvmCaps,
    defects: Defects,
    open_msrs: OpenWords,
    open_ports: OpenWords,
    asids: asid::Asids,
    /// EFER.SVME as L1 wrote it.
    is_enabled: bool,
    vm_cr: VmCr,
    vm_hsave_pa: u64,
    /// The processor keeps L1's GIF (virtual GIF, 15.33.2). It is used when offered.
    has_virtual_gif: bool,
    /// L1's GIF while the processor does not keep it: without virtual GIF, and while L2 runs.
    gif: bool,
    is_guest: bool,
    /// L0 asked for the interrupt window of L2; these are the virtual interrupts that L1 asked for.
    window: Option<VirtualInterrupts>,
    /// The event that L1 injected at this entry, until it has been delivered.
    injected: RawEvent,
    /// L1 flushed its own translations.
    flush_l1: bool,
    /// L1 flushed translations of its guests.
    flush_l2: bool,
}

impl NestedSvm {
    /// Nested state in which L1 has not enabled SVM, over `pages` that begin at the
    /// host-physical address `pages_at`. `None` if there is no memory for L1's control block.
    pub fn new(host: &Host<'_>, mut pages: Box<Pages>, pages_at: Hpa) -> Option<Self> {
        pages.msr = host.msr_permissions.clone();
        pages.io = host.io_permissions.clone();
        let features = host.l1_caps.features;
        Some(Self {
            pages,
            pages_at,
            vmcb12: Vmcb::new_box_zeroed().ok()?,
            vmcb12_at: Gpa::ZERO,
            is_cached: false,
            features,
            l1_caps: *host.l1_caps,
            defects: host.defects,
            open_msrs: OpenWords::of(host.msr_permissions.as_bytes()),
            open_ports: OpenWords::of(host.io_permissions.as_bytes()),
            asids: asid::Asids::default(),
            is_enabled: false,
            vm_cr: VmCr::empty(),
            vm_hsave_pa: 0,
            has_virtual_gif: host.caps.has(Features::V_GIF),
            gif: true,
            is_guest: false,
            window: None,
            injected: RawEvent::NONE,
            flush_l1: false,
            flush_l2: false,
        })
    }

    /// What INIT and RESET do: no guest runs, SVM is off, GIF is set, and nothing is pending.
    /// [`Self::adjust_vmcb01`] is due afterwards.
    pub fn reset(&mut self) {
        self.is_guest = false;
        self.is_enabled = false;
        self.is_cached = false;
        self.gif = true;
        self.window = None;
        self.injected = RawEvent::NONE;
        self.asids.flush_all();
        self.flush_l2 = true;
    }

    /// Whether L2 runs rather than L1.
    #[inline]
    pub fn is_guest(&self) -> bool {
        self.is_guest
    }

    /// Whether L1 has set EFER.SVME.
    #[inline]
    pub fn is_enabled(&self) -> bool {
        self.is_enabled
    }

    /// The VMCB that the processor runs L2 with.
    #[inline]
    pub fn vmcb02(&self) -> &Vmcb {
        &self.pages.vmcb
    }

    /// The VMCB that the processor runs L2 with, to be changed as L0's handling of an exit demands.
    #[inline]
    pub fn vmcb02_mut(&mut self) -> &mut Vmcb {
        &mut self.pages.vmcb
    }

    /// The host-physical address of [`Self::vmcb02`].
    #[inline]
    pub fn vmcb02_address(&self) -> Hpa {
        self.pages_at
    }

    /// The copy of L1's control block that the current or last entry was made from.
    #[inline]
    pub fn vmcb12(&self) -> &Vmcb {
        &self.vmcb12
    }

    /// Where L1 has that control block.
    #[inline]
    pub fn vmcb12_address(&self) -> Gpa {
        self.vmcb12_at
    }

    /// Whether L2 runs under a nested page table of L1's, so that its physical addresses are not
    /// L1's.
    #[inline]
    pub fn is_nested_paging(&self) -> bool {
        self.is_guest && route::is_nested_paging(&self.vmcb12)
    }

    /// The processor's translations for the L2 that runs: for
    /// [`AsidPool::prepare`](testudo_svm::asid::AsidPool::prepare) before each of its entries.
    #[inline]
    pub fn asid_slot(&mut self) -> &mut AsidSlot {
        self.asids.current_mut()
    }

    /// Makes all translations of all L2 guests be flushed before their next use: due when L0 takes
    /// a page or a right out of a table that L2 runs under.
    pub fn flush_translations(&mut self) {
        self.asids.flush_all();
    }

    /// Whether L1 flushed its own translations since the last call: they are L0's to flush, before
    /// L1 runs again.
    #[inline]
    pub fn take_l1_flush(&mut self) -> bool {
        core::mem::take(&mut self.flush_l1)
    }

    /// Whether L1 flushed translations of its guests since the last call: what an L0 without nested
    /// paging has made of L1's tables is to be brought up to date before L2 runs again.
    #[inline]
    pub fn take_l2_flush(&mut self) -> bool {
        core::mem::take(&mut self.flush_l2)
    }

    /// L1 flushed translations of one of its guests, or of all of them: what was derived from its
    /// tables is stale.
    #[inline]
    fn forget_l1_tables(&mut self, asid: Option<u32>, second_stage: &mut impl SecondStage) {
        match asid {
            Some(asid) => self.asids.flush(asid),
            None => self.asids.flush_all(),
        }
        self.flush_l2 = true;
        second_stage.flush(asid);
    }

    fn msr_permissions_at(&self) -> u64 {
        self.pages_at
            .0
            .wrapping_add(core::mem::offset_of!(Pages, msr) as u64)
    }

    fn io_permissions_at(&self) -> u64 {
        self.pages_at
            .0
            .wrapping_add(core::mem::offset_of!(Pages, io) as u64)
    }

    /// Routes an exit of L2 that [`Self::vmcb02`] holds.
    #[inline]
    fn route<M: GuestMemory>(&self, exit: &RawExit, memory: &M) -> Route {
        route(exit, &self.vmcb12, self.window.is_some(), memory)
    }
}
