//! A state to try: a valid one, and changes to it.

use core::fmt;

use arrayvec::ArrayVec;
use testudo_arch::regs::SegmentRegister;
use testudo_arch::segment::{Segment, SegmentAttributes as A};
use testudo_svm::intercept::{
    CrIntercepts, DrIntercepts, ExceptionIntercepts, Intercepts, Misc1, Misc2, Misc3,
};
use testudo_svm::vmcb::{FieldInfo, NestedControl, VintrFlags, VirtualInterrupts, Vmcb};

use crate::arena::Arena;

pub(crate) const PE: u64 = 1;
pub(crate) const NW: u64 = 1 << 29;
pub(crate) const CD: u64 = 1 << 30;
pub(crate) const PG: u64 = 1 << 31;
pub(crate) const PAE: u64 = 1 << 5;
pub(crate) const LME: u64 = 1 << 8;
pub(crate) const LMA: u64 = 1 << 10;
pub(crate) const SVME: u64 = 1 << 12;

/// A valid state from which to start, by the mode it puts the guest in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Long64,
    Compatibility,
    Pae,
    Legacy,
    Unpaged,
    Real,
    PagedReal,
}

impl Mode {
    pub(crate) const ALL: [Self; 7] = [
        Self::Long64,
        Self::Compatibility,
        Self::Pae,
        Self::Legacy,
        Self::Unpaged,
        Self::Real,
        Self::PagedReal,
    ];
}

/// What a change changes.
#[derive(Clone, Copy)]
pub(crate) enum Target {
    /// A field of the VMCB.
    Field(&'static FieldInfo),
    /// The attributes of CS, in the VMCB's form.
    CsAttributes,
    /// A PAE page-directory pointer in the guest's memory.
    Pdpe(u64),
}

/// Bits to clear, then bits to set.
#[derive(Clone, Copy)]
pub(crate) struct Change {
    pub(crate) target: Target,
    pub(crate) clear: u64,
    pub(crate) set: u64,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.target {
            Target::Field(field) => f.write_str(field.name)?,
            Target::CsAttributes => f.write_str("cs.attributes")?,
            Target::Pdpe(index) => write!(f, "pdpe[{index}]")?,
        }
        match (self.clear, self.set) {
            (u64::MAX, set) => write!(f, " = {set:#x}"),
            (0, set) => write!(f, " |= {set:#x}"),
            (clear, 0) => write!(f, " &= !{clear:#x}"),
            (clear, set) => write!(f, " = {{}} & !{clear:#x} | {set:#x}"),
        }
    }
}

/// A state to try.
#[derive(Clone)]
pub(crate) struct State {
    pub(crate) mode: Mode,
    pub(crate) nested_paging: bool,
    pub(crate) changes: ArrayVec<Change, { State::MAX_CHANGES }>,
}

impl State {
    pub(crate) const MAX_CHANGES: usize = 24;

    /// Puts the state into a VMCB and into the guest's memory.
    pub(crate) fn build(&self, arena: &Arena, vmcb: &mut Vmcb) {
        *vmcb = Vmcb::new();
        arena.reset_pdpes();
        self.build_controls(arena, vmcb);
        self.build_registers(arena, vmcb);
        for change in &self.changes {
            let new = |old: u64| (old & !change.clear) | change.set;
            match change.target {
                Target::Field(field) => vmcb.set_field(field, new(vmcb.field(field))),
                Target::CsAttributes => {
                    let mut cs = *vmcb.raw_segment(SegmentRegister::Cs);
                    cs.attributes = new(u64::from(cs.attributes)) as u16;
                    vmcb.set_raw_segment(SegmentRegister::Cs, cs);
                }
                Target::Pdpe(index) => arena.change_pdpe(index, change.clear, change.set),
            }
        }
    }

    fn build_controls(&self, arena: &Arena, vmcb: &mut Vmcb) {
        vmcb.set_intercepts(Intercepts {
            cr: CrIntercepts::all(),
            dr: DrIntercepts::all(),
            exceptions: ExceptionIntercepts::all(),
            misc1: Misc1::all(),
            misc2: Misc2::all(),
            misc3: Misc3::all(),
        });
        vmcb.set_iopm_base_pa(arena.iopm);
        vmcb.set_msrpm_base_pa(arena.msrpm);
        vmcb.set_asid(1);
        let interrupts = VirtualInterrupts::default().insert(VintrFlags::V_INTR_MASKING);
        vmcb.set_virtual_interrupts(interrupts);
        vmcb.set_n_cr3(arena.nested_cr3());
        vmcb.set_g_pat(0x0007_0406_0007_0406);
        if self.nested_paging {
            vmcb.set_nested_control(NestedControl::NP_ENABLE);
        }
    }

    fn build_registers(&self, arena: &Arena, vmcb: &mut Vmcb) {
        let long = SVME | LME | LMA;
        let (cr0, cr3, cr4, efer, code) = match self.mode {
            Mode::Long64 => (PG | PE, arena.long_cr3(), PAE, long, A::CODE64),
            Mode::Compatibility => (PG | PE, arena.long_cr3(), PAE, long, A::CODE32),
            Mode::Pae => (PG | PE, arena.pae_cr3(), PAE, SVME, A::CODE32),
            Mode::Legacy => (PG | PE, arena.legacy_cr3(), 0, SVME, A::CODE32),
            Mode::Unpaged => (PE, arena.legacy_cr3(), 0, SVME, A::CODE32),
            Mode::Real => (0, arena.legacy_cr3(), 0, SVME, A::CODE16),
            Mode::PagedReal => (PG, arena.legacy_cr3(), 0, SVME, A::CODE16),
        };
        vmcb.set_cr0(cr0 | 0x10);
        vmcb.set_cr3(cr3);
        vmcb.set_cr4(cr4);
        vmcb.set_efer(efer);
        vmcb.set_dr6(0xFFFF_0FF0);
        vmcb.set_dr7(0x400);
        vmcb.set_rflags(2);
        // In 64-bit mode the base of CS does not count; elsewhere it holds the address.
        let mut cs = Segment::flat(8, code);
        if self.mode == Mode::Long64 {
            vmcb.set_rip(arena.code());
        } else {
            cs.base = arena.code();
        }
        vmcb.set_segment(SegmentRegister::Cs, &cs);
        for register in [
            SegmentRegister::Es,
            SegmentRegister::Ss,
            SegmentRegister::Ds,
            SegmentRegister::Fs,
            SegmentRegister::Gs,
        ] {
            vmcb.set_segment(register, &Segment::flat(0x10, A::DATA));
        }
        let tr = Segment {
            selector: 0x18,
            limit: 0x67,
            ..Segment::flat(0, A::TSS_BUSY)
        };
        vmcb.set_segment(SegmentRegister::Tr, &tr);
        // GDTR and IDTR stay empty: no event is ever delivered without a fault.
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.mode)?;
        if self.nested_paging {
            f.write_str(" with nested paging")?;
        }
        for change in &self.changes {
            write!(f, ", {change}")?;
        }
        Ok(())
    }
}
