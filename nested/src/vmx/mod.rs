//! VMX for a guest hypervisor: the thirteen VMX instructions, VM entries and VM exits, without the
//! hardware's help (SDM vol. 3C, chapters 24 to 31).
//!
//! [`NestedVmx`] is the state of one vCPU. Its backend runs L1 with a VMCS of its own (`vmcs01`) and
//! L2 with another (`vmcs02`), which it hands over as a [`VmcsPair`], and calls here when
//!
//! - a VMX instruction exited: [`NestedVmx::execute`];
//! - L2 exited: [`NestedVmx::exited`], or [`NestedVmx::exited_by_page_fault`] if L0 itself shadows
//!   page tables;
//! - the machine has an interrupt, NMI or INIT for the vCPU: [`NestedVmx::acceptance`], and
//!   [`NestedVmx::exit_to_l1`] if L1 intercepts it;
//! - L1 reads a VMX capability MSR: [`read_msr`].
//!
//! `vmcs02` begins as L0 would set one up for any guest: its host state is L0's, written by the
//! backend and never by this crate.
//!
//! # How it is fast
//!
//! L1's VMREAD and VMWRITE work on L0's copy of its VMCS; where the processor shadows VMCSs, or with an
//! enlightened VMCS, L1 needs few of them or none. Guest fields that seldom change are written
//! to `vmcs02` only if L1 wrote one since the last exit from it, and read from it only when L1 asks for one;
//! controls are written only if they differ from those of the last entry. A VMRESUME of an L2 whose VMCS is
//! as the last exit left it, but for what a hypervisor changes at each exit, does nothing else. It also loads
//! into `vmcs01` what the next exit is to load, as long as that is the same as at the exit before: so the
//! exit has but to save what L2 has changed.

mod apic;
mod caps;
mod composed;
mod control_registers;
mod enlightened;
mod entry;
mod events;
mod evmcs;
mod exit;
mod guest_fields;
mod held_back;
mod host;
mod instruction;
mod invalidate;
mod join;
mod kvm_layout;
mod made_exit;
mod msr_areas;
mod operand;
mod pdptes;
mod posted;
mod repeat;
mod resume;
mod route;
mod saved;
mod shadow;
#[cfg(test)]
mod tests;
mod timer;
mod vmcs12;

use alloc::boxed::Box;
use core::num::NonZeroU32;

use testudo_arch::{Gpa, Gprs, Hpa, Msr};
use testudo_vmx::bitmap::MsrBitmap;
use testudo_vmx::caps::FixedBits;
use testudo_vmx::{Defects, VmcsWrite, VmxCaps};

use crate::open_words::OpenWords;

pub use caps::{Offer, offer, read_msr};
pub use composed::{ComposedParts, ComposedStage};
pub use control_registers::ControlRegisters;
pub use events::{Acceptance, PhysicalEvent};
pub use evmcs::{ENLIGHTENED_VERSION, enlightened_vmcs};
pub use exit::{Handled, PageFaultOf, PredictorBarrier};
pub use instruction::{Instruction, Outcome};
pub use join::{Joined, L0Controls};
pub use operand::Fault;
pub use posted::Posted;
pub use route::{ExitDetails, L0Windows, Route, route};
pub use saved::{RestoreError, SavedVmcs, SavedVmx};
pub use shadow::shadow_bitmaps;
pub use vmcs12::{LaunchState, REVISION};

/// The two VMCSs that the processor runs one vCPU with. Only one is current at a time, so one is
/// asked for at a time.
pub trait VmcsPair {
    /// Access to a VMCS that is current.
    type Vmcs<'a>: VmcsWrite
    where
        Self: 'a;

    /// The VMCS that L1 runs with.
    fn l1(&mut self) -> Self::Vmcs<'_>;

    /// The VMCS that L2 runs with.
    fn l2(&mut self) -> Self::Vmcs<'_>;

    /// The shadow VMCS that L1's VMREAD and VMWRITE use by themselves, where there is one: with
    /// the bitmaps of [`shadow_bitmaps`], and on a processor that writes any field of it
    /// (IA32_VMX_MISC bit 29).
    fn shadow(&mut self) -> Option<Self::Vmcs<'_>> {
        None
    }
}

/// L1's MSRs beyond those that the VMCS holds: for the MSR-load and MSR-store areas.
pub trait Msrs {
    /// Reads an MSR as L1's RDMSR would; `None` for #GP.
    fn read(&mut self, msr: Msr) -> Option<u64>;

    /// Writes an MSR as L1's WRMSR would; `false` for #GP.
    fn write(&mut self, msr: Msr, value: u64) -> bool;
}

/// L1's EPT composed with L0's.
///
/// The answers never let L2 reach what L1 cannot reach itself.
pub trait SecondStage {
    /// Makes the composition of L1's table behind this EPT pointer the current one, and returns the
    /// EPT pointer for L2's VMCS. `None` if there is none.
    fn activate(&mut self, eptp: u64) -> Option<u64>;

    /// As [`activate`](Self::activate), for an L2 without an EPT of L1's, whose addresses are L1's: with this page of
    /// 4 KiB mapped as such, and as part of no larger one. `None`: such an L2 runs on L0's own table, whatever its
    /// pages' sizes.
    ///
    /// An APIC-access page is only promised to work so (SDM vol. 3C, 32.4.5).
    fn activate_plain(&mut self, page: Gpa) -> Option<u64> {
        let _ = page;
        None
    }

    /// L1 flushed what was derived from the table behind this EPT pointer, or from all of them.
    fn flush(&mut self, eptp: Option<u64>);

    /// L0 changed its own table at these addresses of L1's: what was derived from it there is to be derived
    /// anew.
    fn forget(&mut self, start: Gpa, len: u64) {
        let _ = (start, len);
        self.flush(None);
    }

    /// Handles an EPT violation or misconfiguration of L2 under the current composition.
    fn fault(&mut self, fault: EptFault) -> EptHandled;

    /// Where an address of L2's lies in L1, by L1's current table: for L0 to make accesses of L2's.
    /// `None` if L1 does not map it, or not for writing if that is to be done.
    fn translate(&mut self, gpa: Gpa, write: bool) -> Option<Gpa>;

    /// The frame behind this page of L1's memory, for the processor to read and write while L2 runs; `None` if
    /// L1 has no memory there. It is L1's alone, and stays so until L0 has
    /// [said otherwise](NestedVmx::forget_frames).
    ///
    /// An L1 that is offered [APIC virtualization](Offer::apic) needs it.
    fn frame(&mut self, page: Gpa) -> Option<Hpa> {
        let _ = page;
        None
    }
}

/// An EPT violation of L2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EptFault {
    /// The address of L2's that was accessed.
    pub gpa: Gpa,
    /// The exit qualification (SDM vol. 3C, table 30-7).
    pub qualification: u64,
}

/// What became of an EPT violation of L2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EptHandled {
    /// The translation has been made: L2 goes on.
    Resolved,
    /// L1's table stops the access: L1 gets an EPT violation with this qualification.
    Violation(u64),
    /// L1's table is misconfigured: L1 gets an EPT misconfiguration.
    Misconfiguration,
    /// What L1's table maps is not memory that L0 has mapped: L0 handles the access at this address
    /// of L1's.
    Host(Gpa),
}

/// For an L1 that is not offered EPT.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoSecondStage;

impl SecondStage for NoSecondStage {
    fn activate(&mut self, _: u64) -> Option<u64> {
        None
    }

    fn flush(&mut self, _: Option<u64>) {}

    fn fault(&mut self, fault: EptFault) -> EptHandled {
        EptHandled::Violation(fault.qualification)
    }

    fn translate(&mut self, gpa: Gpa, _: bool) -> Option<Gpa> {
        Some(gpa)
    }
}

/// What a call works on besides the nested state itself.
#[derive(Debug)]
pub struct Context<'a, P, M, S, R> {
    /// The general registers of whoever runs; RSP is in the VMCS.
    pub gprs: &'a mut Gprs,
    /// The processor's two VMCSs.
    pub vmcs: &'a mut P,
    /// L1's memory.
    pub memory: &'a M,
    /// L1's EPT composed with L0's.
    pub second_stage: &'a mut S,
    /// L1's MSRs.
    pub msrs: &'a mut R,
}

/// The nested state of one vCPU: VMX as L1 sees it.
pub struct NestedVmx {
    caps: VmxCaps,
    /// What the processor itself fixes in CR0 and CR4 in VMX operation.
    cr0: FixedBits,
    cr4: FixedBits,
    /// The VMXON region: L1 is in VMX operation.
    vmxon: Option<Gpa>,
    /// The current-VMCS pointer.
    current: Option<Gpa>,
    vmcs12: vmcs12::Vmcs12,
    /// Where enlightened VMCSs are offered.
    enlightened: Option<Box<enlightened::Enlightened>>,
    is_guest: bool,
    /// L2 waits in the HLT activity state, which is L0's to do.
    is_halted: bool,
    /// The region whose guest state `vmcs02` holds.
    in_vmcs02: Option<Gpa>,
    /// L1 wrote seldom-used guest fields: `vmcs02` needs them.
    rare_dirty: bool,
    /// Those in L1's VMCS are older than those in `vmcs02`.
    rare_missing: bool,
    /// Where the shadow differs from the copy, but for what L1 has written since.
    shadow_misses: shadow::ShadowedFields,
    /// What L1 had written into the shadow when it was last taken from there.
    shadow_written: shadow::ShadowedFields,
    /// The fields of the delivery of interrupts are shadowed too.
    shadows_delivery: bool,
    /// What the last complete entry found, as long as L1's VMCS is as it was then but for L2's own state.
    settled: Option<resume::Settled>,
    /// `vmcs01` holds what the next exit loads, but for how it blocks NMIs.
    host_loaded: bool,
    /// What L1 found in its control registers after the last exit to it.
    l1_sees: ControlRegisters,
    /// The controls that `vmcs02` has.
    joined: Option<join::Joined>,
    msr_bitmap: Box<MsrBitmap>,
    msr_bitmap_at: Hpa,
    open_msrs: OpenWords,
    /// L0's part of it about the x2APIC; and L2's may give L2 more.
    l0_x2apic: apic::X2apicBits,
    x2apic_open: bool,
    /// The APIC-access page that `vmcs02` had last; 0 for none.
    access_page: u64,
    /// What an L2 without an EPT of L1's runs on, if not on what L1 does.
    ept_pointer: Option<u64>,
    /// The processor's, of those that concern virtual interrupts.
    defects: Defects,
    /// The interrupt that L2's virtual local APIC had in service when L2 was entered, where the processor delivers its
    /// interrupts and has a defect in that.
    serving: Option<u8>,
    /// An interrupt of L2's virtual local APIC is held back.
    held_back: bool,
    /// L2 may interrupt itself by the MSR, until it exits, although the processor has the defect.
    self_ipi_open: bool,
    /// `vmcs02` names frames of L1's memory that may be others' by now.
    frames_stale: bool,
    /// The VPID that L1 gave L2 last.
    vpid12: u16,
    flush: Flush,
    /// L0 asked for the interrupt window of L2.
    window: bool,
    /// L0 asked for the NMI window of L2.
    nmi_window: bool,
    timer: timer::L2Timer,
}

bitflags::bitflags! {
    /// Translations that L1 flushed, for L0 to flush before the next entry of L2.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Flush: u8 {
        /// Everything that is tagged with L2's VPID.
        const VPID = 1;
        /// Everything that was derived from L2's EPT.
        const EPT = 2;
        /// L1's own linear translations.
        const L1 = 4;
    }
}

impl NestedVmx {
    /// Nested state outside VMX operation.
    ///
    /// `caps` are those that L1 is shown ([`offer`]), `processor` those of the processor.
    /// `l0_msrs` is the MSR bitmap that L1 runs with, and `msr_bitmap` a page that begins at the
    /// host-physical address `msr_bitmap_at`, for L2's.
    pub fn new(
        caps: VmxCaps,
        processor: &VmxCaps,
        l0_msrs: &MsrBitmap,
        mut msr_bitmap: Box<MsrBitmap>,
        msr_bitmap_at: Hpa,
    ) -> Self {
        *msr_bitmap = l0_msrs.clone();
        let shadows_delivery = shadow::has_delivery(&caps);
        Self {
            caps,
            cr0: processor.cr0,
            cr4: processor.cr4,
            vmxon: None,
            current: None,
            vmcs12: vmcs12::Vmcs12::new(),
            enlightened: None,
            is_guest: false,
            is_halted: false,
            in_vmcs02: None,
            rare_dirty: true,
            rare_missing: false,
            shadow_misses: shadow::ALL_SHADOWED,
            shadow_written: 0,
            shadows_delivery,
            settled: None,
            host_loaded: false,
            l1_sees: ControlRegisters::default(),
            joined: None,
            msr_bitmap,
            msr_bitmap_at,
            open_msrs: OpenWords::of(l0_msrs.as_bytes()),
            l0_x2apic: apic::x2apic_bits(l0_msrs.as_bytes()),
            x2apic_open: false,
            access_page: 0,
            ept_pointer: None,
            defects: Defects::of(processor) & held_back::DEFECTS,
            serving: None,
            held_back: false,
            self_ipi_open: false,
            frames_stale: false,
            vpid12: 0,
            flush: Flush::default(),
            window: false,
            nmi_window: false,
            timer: timer::L2Timer::default(),
        }
    }

    /// Has L2 leave, for L0, after so many units of the preemption timer at most, whatever L1 does with that
    /// timer. The processor must have it.
    #[must_use]
    pub fn with_turns(mut self, longest: NonZeroU32) -> Self {
        self.timer.turn = Some(longest);
        self
    }

    /// Has an L2 without an EPT of L1's run on the tables behind this EPT pointer, on which L1 runs too, but for its local
    /// APIC's page where that is virtual: L2's accesses there go to L1's APIC by software.
    #[must_use]
    pub fn with_ept_pointer(mut self, pointer: u64) -> Self {
        self.ept_pointer = Some(pointer);
        self
    }

    /// RESET or INIT of L1's processor: outside VMX operation, with no current VMCS. What L0 has not
    /// written back of the one that was current is lost, as in a processor's cache.
    pub fn reset(&mut self) {
        self.vmxon = None;
        self.current = None;
        self.set_enlightened(0, None);
        self.is_guest = false;
        self.is_halted = false;
        self.in_vmcs02 = None;
        self.rare_dirty = true;
        self.rare_missing = false;
        self.settled = None;
        self.host_loaded = false;
        self.window = false;
        self.nmi_window = false;
        self.flush = Flush::all();
    }

    /// Whether L2 runs rather than L1.
    #[inline]
    pub fn is_guest(&self) -> bool {
        self.is_guest
    }

    /// Says that L2 halts, by a HLT for which L1 wants no exit: until the next exit of L2's own, or one
    /// that L0 makes for it, it is in the HLT activity state. Its RIP is behind the HLT by then.
    #[inline]
    pub fn note_halt(&mut self) {
        self.is_halted = self.is_guest;
    }

    /// Whether L2 runs on a composition of the [`SecondStage`]'s.
    #[inline]
    pub fn is_nested_paging(&self) -> bool {
        let joined = self.joined.as_ref();
        self.is_guest && joined.is_some_and(|joined| joined.is_composed)
    }

    /// Where L1's VMXON region is, if L1 is in VMX operation. While it is, CR4.VMXE cannot be
    /// cleared, and INIT is blocked (SDM vol. 3C, 26.8).
    #[inline]
    pub fn vmxon_region(&self) -> Option<Gpa> {
        self.vmxon
    }

    /// L1's current-VMCS pointer.
    #[inline]
    pub fn current_vmcs(&self) -> Option<Gpa> {
        self.current
    }

    /// The capabilities that L1 is shown.
    #[inline]
    pub fn caps(&self) -> &VmxCaps {
        &self.caps
    }

    /// What L1 flushed since the last call; due before an entry of L2.
    #[inline]
    pub fn take_flush(&mut self) -> Flush {
        core::mem::take(&mut self.flush)
    }
}

impl core::fmt::Debug for NestedVmx {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("NestedVmx")
            .field("vmxon", &self.vmxon)
            .field("current", &self.current)
            .field("launch_state", &self.vmcs12.launch_state)
            .field("is_guest", &self.is_guest)
            .field("joined", &self.joined)
            .finish_non_exhaustive()
    }
}

/// What L1 reads in a control register of which L0 owns some bits.
#[inline]
const fn visible(register: u64, mask: u64, shadow: u64) -> u64 {
    (register & !mask) | (shadow & mask)
}
