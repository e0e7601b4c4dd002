//! Segments and the conversion between the save area and [`SystemRegisters`].

use core::fmt;

use testudo_arch::regs::{SegmentRegister, SystemRegisters};
use testudo_arch::segment::{DescriptorTable, Segment, SegmentAttributes};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{CleanBits, Vmcb};

/// A segment register as the VMCB holds it (APM vol. 2, table B-2): sixteen bytes.
#[derive(Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct VmcbSegment {
    /// The selector.
    pub selector: u16,
    /// Descriptor bits 55:52 and 47:40, concatenated.
    pub attributes: u16,
    /// The limit in bytes.
    pub limit: u32,
    /// The base. VMRUN and VMLOAD sign-extend it from the processor's address width.
    pub base: u64,
}

const _: () = assert!(size_of::<VmcbSegment>() == 16);

impl fmt::Debug for VmcbSegment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            selector,
            attributes,
            limit,
            base,
        } = *self;
        write!(
            f,
            "{selector:#06x} attributes {attributes:#05x} limit {limit:#010x} base {base:#x}"
        )
    }
}

impl From<Segment> for VmcbSegment {
    #[inline]
    fn from(segment: Segment) -> Self {
        Self {
            selector: segment.selector,
            attributes: segment.attributes.to_svm(),
            limit: segment.limit,
            base: segment.base,
        }
    }
}

impl From<VmcbSegment> for Segment {
    #[inline]
    fn from(segment: VmcbSegment) -> Self {
        Self {
            selector: segment.selector,
            attributes: SegmentAttributes::from_svm(segment.attributes),
            limit: segment.limit,
            base: segment.base,
        }
    }
}

impl From<DescriptorTable> for VmcbSegment {
    /// GDTR and IDTR have neither selector nor attributes; their limit has sixteen bits.
    #[inline]
    fn from(table: DescriptorTable) -> Self {
        Self {
            selector: 0,
            attributes: 0,
            limit: u32::from(table.limit),
            base: table.base,
        }
    }
}

impl From<VmcbSegment> for DescriptorTable {
    #[inline]
    fn from(segment: VmcbSegment) -> Self {
        Self {
            base: segment.base,
            limit: segment.limit as u16,
        }
    }
}

impl Vmcb {
    /// A segment register exactly as it stands.
    #[inline]
    pub fn raw_segment(&self, register: SegmentRegister) -> &VmcbSegment {
        match register {
            SegmentRegister::Es => &self.es,
            SegmentRegister::Cs => &self.cs,
            SegmentRegister::Ss => &self.ss,
            SegmentRegister::Ds => &self.ds,
            SegmentRegister::Fs => &self.fs,
            SegmentRegister::Gs => &self.gs,
            SegmentRegister::Ldtr => &self.ldtr,
            SegmentRegister::Tr => &self.tr,
        }
    }

    /// Sets a segment register to exactly this, and clears the clean bit of the four that VMRUN
    /// loads. FS, GS, LDTR and TR are loaded by VMLOAD, which always reads memory.
    #[inline]
    pub fn set_raw_segment(&mut self, register: SegmentRegister, segment: VmcbSegment) {
        let place = match register {
            SegmentRegister::Es => &mut self.es,
            SegmentRegister::Cs => &mut self.cs,
            SegmentRegister::Ss => &mut self.ss,
            SegmentRegister::Ds => &mut self.ds,
            SegmentRegister::Fs => &mut self.fs,
            SegmentRegister::Gs => &mut self.gs,
            SegmentRegister::Ldtr => &mut self.ldtr,
            SegmentRegister::Tr => &mut self.tr,
        };
        *place = segment;
        self.mark_dirty(CleanBits::SEGMENTS);
    }

    /// A segment register in the form that both vendors share.
    #[inline]
    pub fn segment(&self, register: SegmentRegister) -> Segment {
        (*self.raw_segment(register)).into()
    }

    /// Sets a segment register. The [`Self::cpl`] is a field of its own and does not follow SS.
    #[inline]
    pub fn set_segment(&mut self, register: SegmentRegister, segment: &Segment) {
        self.set_raw_segment(register, (*segment).into());
    }

    /// GDTR.
    #[inline]
    pub fn gdtr(&self) -> DescriptorTable {
        self.gdtr.into()
    }

    /// Sets GDTR.
    #[inline]
    pub fn set_gdtr(&mut self, table: DescriptorTable) {
        self.gdtr = table.into();
        self.mark_dirty(CleanBits::DESCRIPTOR_TABLES);
    }

    /// IDTR.
    #[inline]
    pub fn idtr(&self) -> DescriptorTable {
        self.idtr.into()
    }

    /// Sets IDTR.
    #[inline]
    pub fn set_idtr(&mut self, table: DescriptorTable) {
        self.idtr = table.into();
        self.mark_dirty(CleanBits::DESCRIPTOR_TABLES);
    }

    pub(super) fn raw_segments(&self) -> [(&'static str, &VmcbSegment); 10] {
        [
            ("es", &self.es),
            ("cs", &self.cs),
            ("ss", &self.ss),
            ("ds", &self.ds),
            ("fs", &self.fs),
            ("gs", &self.gs),
            ("gdtr", &self.gdtr),
            ("ldtr", &self.ldtr),
            ("idtr", &self.idtr),
            ("tr", &self.tr),
        ]
    }

    /// The state that decides how the guest executes, in the form that both vendors share.
    ///
    /// The privilege level that the guest runs at is the field [`Self::cpl`], and SS may say
    /// otherwise (SYSRET does not set SS.DPL on AMD processors); the result's SS carries the CPL,
    /// which is what [`SystemRegisters::cpl`] looks at. EFER is as it stands, with SVME.
    pub fn system_registers(&self) -> SystemRegisters {
        let mut ss = self.segment(SegmentRegister::Ss);
        ss.attributes = ss.attributes.with_dpl(self.cpl());
        SystemRegisters {
            es: self.es.into(),
            cs: self.cs.into(),
            ss,
            ds: self.ds.into(),
            fs: self.fs.into(),
            gs: self.gs.into(),
            ldtr: self.ldtr.into(),
            tr: self.tr.into(),
            gdtr: self.gdtr.into(),
            idtr: self.idtr.into(),
            cr0: self.cr0(),
            cr2: self.cr2(),
            cr3: self.cr3(),
            cr4: self.cr4(),
            cr8: u64::from(self.virtual_interrupts().tpr()),
            efer: self.efer(),
            rip: self.rip(),
            rflags: self.rflags(),
            dr6: self.dr6(),
            dr7: self.dr7(),
        }
    }

    /// Sets that state: segments, descriptor tables, control and debug registers, EFER, RIP, RFLAGS,
    /// V_TPR from CR8, and the CPL.
    ///
    /// EFER is stored as given: VMRUN demands SVME in it, so a caller whose guest must not see SVME
    /// adds it here and removes it from what [`Self::system_registers`] returns.
    pub fn set_system_registers(&mut self, registers: &SystemRegisters) {
        use SegmentRegister as S;
        for register in [S::Es, S::Cs, S::Ss, S::Ds, S::Fs, S::Gs, S::Ldtr, S::Tr] {
            self.set_segment(register, registers.segment(register));
        }
        self.set_cpl(registers.cpl());
        self.set_gdtr(registers.gdtr);
        self.set_idtr(registers.idtr);
        self.set_cr0(registers.cr0);
        self.set_cr2(registers.cr2);
        self.set_cr3(registers.cr3);
        self.set_cr4(registers.cr4);
        self.set_efer(registers.efer);
        self.set_rip(registers.rip);
        self.set_rflags(registers.rflags);
        self.set_dr6(registers.dr6);
        self.set_dr7(registers.dr7);
        let interrupts = self.virtual_interrupts().with_tpr(registers.cr8 as u8);
        self.set_virtual_interrupts(interrupts);
    }
}
