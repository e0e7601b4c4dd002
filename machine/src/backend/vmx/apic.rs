//! The local APIC as far as the processor virtualizes it itself (SDM vol. 3C, chapter 32).
//!
//! With all of APIC virtualization a guest reads the registers of its local APIC, changes its task
//! priority, ends interrupts and interrupts itself without an exit, in xAPIC and in x2APIC mode; any
//! other write exits after it was done, so that no instruction is to be decoded; and interrupts that
//! the machine has requested are delivered as soon as the guest can take them. The registers are
//! those of the machine's local APIC, in its page: what the processor knows besides them, the
//! machine says whenever it has changed something.
//!
//! A processor that delivers interrupts although the guest masks them
//! ([`Defects::DELIVERS_MASKED_VIRTUAL_INTERRUPTS`]) does so when one of the machine's comes while one is
//! pending. None is recognized under "interrupt-window exiting" (SDM vol. 3C, 32.2.1), so there the machine
//! opens a window for what the guest masks; and what makes one pending in the course of the guest's turn
//! exits: an end, if there is more, and an interrupt to itself by the x2APIC's MSR. A guest that, with
//! interrupts off, lowers its task priority or interrupts itself in xAPIC mode is not guarded.

use testudo_arch::apic::{ApicPage, VectorRegister};
use testudo_arch::{Gpa, Hpa, Msr};
use testudo_vmx::bitmap::MsrBitmap;
use testudo_vmx::controls::SecondaryControls;
use testudo_vmx::{AccessError, Defects, VmcsWrite, fields};

use super::setup::VmxTables;
use crate::irq::{ApicMode, ApicState};
use crate::layout;

/// What APIC virtualization takes: a processor that lacks one of these has the task priority alone.
pub(super) const NEEDED: SecondaryControls = SecondaryControls::VIRTUALIZE_APIC_ACCESSES
    .union(SecondaryControls::VIRTUALIZE_X2APIC_MODE)
    .union(SecondaryControls::APIC_REGISTER_VIRTUALIZATION)
    .union(SecondaryControls::VIRTUAL_INTERRUPT_DELIVERY);

/// Those of them that do not depend on the mode of the APIC.
const ALWAYS: SecondaryControls = SecondaryControls::APIC_REGISTER_VIRTUALIZATION
    .union(SecondaryControls::VIRTUAL_INTERRUPT_DELIVERY);

/// Where a guest finds the registers of its local APIC in memory, as far as the processor knows.
pub const APIC_PAGE: Gpa = layout::LAPIC;

/// Tables for APIC virtualization, which the processor reads.
#[derive(Clone, Copy, Debug)]
pub struct ApicTables {
    /// The EPT pointer of tables as those of [`VmxTables`] that also map [`APIC_PAGE`], to
    /// `access_page`.
    pub ept_pointer: u64,
    /// A frame that nobody looks into: accesses to it are what the processor virtualizes.
    pub access_page: Hpa,
    /// The MSR bitmap in x2APIC mode, made by [`open_direct_msrs`](super::open_direct_msrs) and
    /// [`open_x2apic_msrs`].
    pub x2apic_msr_bitmap: Hpa,
}

/// Opens the registers that a guest in x2APIC mode accesses directly. The others need software: the
/// timer's count, and writes that do something. A register that does not exist must exit to be
/// refused, since APIC-register virtualization reads whatever is in the page. On a processor with
/// [`Defects::DELIVERS_MASKED_VIRTUAL_INTERRUPTS`] so must a guest's interrupts to itself.
pub fn open_x2apic_msrs(bitmap: &mut MsrBitmap, defects: Defects) {
    const READABLE: [core::ops::RangeInclusive<u32>; 7] = [
        // ID and version; TPR; PPR; LDR; SVR, ISR, TMR, IRR, ESR; LVT and initial count; divide.
        0x802..=0x803,
        0x808..=0x808,
        0x80A..=0x80A,
        0x80D..=0x80D,
        0x80F..=0x828,
        0x832..=0x838,
        0x83E..=0x83E,
    ];
    for register in READABLE.into_iter().flatten() {
        bitmap.set(Msr(register), false, true);
    }
    bitmap.set(Msr::X2APIC_TPR, false, false);
    bitmap.set(Msr::X2APIC_EOI, true, false);
    let self_ipi_exits = defects.contains(Defects::DELIVERS_MASKED_VIRTUAL_INTERRUPTS);
    bitmap.set(Msr::X2APIC_SELF_IPI, true, self_ipi_exits);
}

/// How a guest reaches its local APIC without the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    /// Not at all: the APIC is disabled, or its page is elsewhere.
    None,
    Page,
    Msrs,
}

impl Access {
    fn of(state: &ApicState) -> Self {
        match state.mode {
            ApicMode::X2Apic => Self::Msrs,
            ApicMode::XApic if state.page == Some(APIC_PAGE) => Self::Page,
            ApicMode::XApic | ApicMode::Disabled => Self::None,
        }
    }
}

/// What was told to the processor.
#[derive(Debug)]
pub(super) struct VirtualApic {
    tables: ApicTables,
    access: Access,
    eoi_exits: [u64; 4],
    /// The processor must not know of an interrupt while the guest masks it.
    holds_back: bool,
    /// What is to be told when the guest itself runs again: its own guest has another VMCS.
    waiting: Option<ApicState>,
}

const EOI_EXITS: [testudo_vmx::Field<u64>; 4] = [
    fields::EOI_EXIT_BITMAP_0,
    fields::EOI_EXIT_BITMAP_1,
    fields::EOI_EXIT_BITMAP_2,
    fields::EOI_EXIT_BITMAP_3,
];

impl VirtualApic {
    /// Virtualizes the APIC of the guest that has these secondary controls besides.
    pub(super) fn new(
        vmcs: &mut impl VmcsWrite,
        tables: ApicTables,
        secondary: SecondaryControls,
        defects: Defects,
    ) -> Result<Self, AccessError> {
        vmcs.set(fields::SECONDARY_CONTROLS, (secondary | ALWAYS).bits())?;
        vmcs.set(fields::APIC_ACCESS_ADDRESS, tables.access_page.0)?;
        vmcs.set(fields::GUEST_INTERRUPT_STATUS, 0)?;
        for field in EOI_EXITS {
            vmcs.set(field, 0)?;
        }
        Ok(Self {
            tables,
            access: Access::None,
            eoi_exits: [0; 4],
            holds_back: defects.contains(Defects::DELIVERS_MASKED_VIRTUAL_INTERRUPTS),
            waiting: None,
        })
    }

    /// Keeps what is to be told, while a guest of the guest's runs.
    pub(super) fn put_off(&mut self, state: &ApicState) {
        self.waiting = Some(*state);
    }

    /// Whether something is to be told before the guest runs.
    #[inline(always)]
    pub(super) fn is_behind(&self) -> bool {
        self.waiting.is_some()
    }

    /// That.
    pub(super) fn take_waiting(&mut self) -> Option<ApicState> {
        self.waiting.take()
    }

    /// Whether the processor must not know of an interrupt while the guest masks it.
    pub(super) fn holds_back(&self) -> bool {
        self.holds_back
    }

    /// Tells the processor. `secondary` are the controls that the guest has whatever its APIC's mode.
    pub(super) fn set(
        &mut self,
        vmcs: &mut impl VmcsWrite,
        (state, page): (&ApicState, &ApicPage),
        secondary: SecondaryControls,
        tables: &VmxTables,
    ) -> Result<(), AccessError> {
        self.waiting = None;
        let status = u16::from(state.serving) << 8 | u16::from(state.requesting);
        vmcs.set(fields::GUEST_INTERRUPT_STATUS, status)?;
        let eoi_exits = match self.holds_back && has_more(page) {
            true => [u64::MAX; 4],
            false => state.level,
        };
        if eoi_exits != self.eoi_exits {
            self.eoi_exits = eoi_exits;
            for (field, vectors) in EOI_EXITS.into_iter().zip(eoi_exits) {
                vmcs.set(field, vectors)?;
            }
        }
        let access = Access::of(state);
        if access != self.access {
            self.access = access;
            self.switch(vmcs, secondary, tables)?;
        }
        Ok(())
    }

    fn switch(
        &self,
        vmcs: &mut impl VmcsWrite,
        secondary: SecondaryControls,
        tables: &VmxTables,
    ) -> Result<(), AccessError> {
        let own = &self.tables;
        let (control, ept_pointer, msr_bitmap) = match self.access {
            Access::None => (
                SecondaryControls::empty(),
                tables.ept_pointer,
                tables.msr_bitmap,
            ),
            Access::Page => (
                SecondaryControls::VIRTUALIZE_APIC_ACCESSES,
                own.ept_pointer,
                tables.msr_bitmap,
            ),
            Access::Msrs => (
                SecondaryControls::VIRTUALIZE_X2APIC_MODE,
                tables.ept_pointer,
                own.x2apic_msr_bitmap,
            ),
        };
        vmcs.set(
            fields::SECONDARY_CONTROLS,
            (secondary | ALWAYS | control).bits(),
        )?;
        // Translations are cached by the tables' root as well, so none of the other's is used.
        vmcs.set(fields::EPT_POINTER, ept_pointer)?;
        vmcs.set(fields::MSR_BITMAPS, msr_bitmap.0)
    }
}

/// Whether the end of an interrupt can make another pending: it is requested, behind one that is in service or that
/// goes first.
fn has_more(page: &ApicPage) -> bool {
    let count = |register| -> u32 {
        let words = page.vectors(register).words();
        words.into_iter().map(u64::count_ones).sum()
    };
    let requested = count(VectorRegister::Irr);
    requested > 1 || requested > 0 && count(VectorRegister::Isr) > 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_something_in_x2apic_mode_exits() {
        let mut bitmap = MsrBitmap::all_exit();
        open_x2apic_msrs(&mut bitmap, Defects::empty());
        let direct_reads = (0x800..0x900).filter(|msr| !bitmap.read_exits(Msr(*msr)));
        let direct_writes = (0x800..0x900).filter(|msr| !bitmap.write_exits(Msr(*msr)));
        assert_eq!(direct_reads.count(), 2 + 1 + 1 + 1 + 26 + 7 + 1);
        assert!(direct_writes.eq([0x808, 0x80B, 0x83F]));
        for software in [Msr::X2APIC_EOI, Msr(0x830), Msr(0x839), Msr(0x804)] {
            assert!(bitmap.read_exits(software));
        }
        open_x2apic_msrs(&mut bitmap, Defects::DELIVERS_MASKED_VIRTUAL_INTERRUPTS);
        let direct_writes = (0x800..0x900).filter(|msr| !bitmap.write_exits(Msr(*msr)));
        assert!(direct_writes.eq([0x808, 0x80B]));
    }
}
