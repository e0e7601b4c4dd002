//! General registers, and the whole visible state of a processor in one form for both vendors.

use core::fmt;
use core::ops::{Index, IndexMut};

use crate::{DescriptorTable, Segment};

/// A general register by its number in instruction encodings (SDM vol. 2A, table 2-2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
#[allow(missing_docs, reason = "the registers' own names")]
pub enum Gpr {
    Rax = 0,
    Rcx = 1,
    Rdx = 2,
    Rbx = 3,
    Rsp = 4,
    Rbp = 5,
    Rsi = 6,
    Rdi = 7,
    R8 = 8,
    R9 = 9,
    R10 = 10,
    R11 = 11,
    R12 = 12,
    R13 = 13,
    R14 = 14,
    R15 = 15,
}

impl Gpr {
    /// Every register by ascending number.
    pub const ALL: [Self; 16] = [
        Self::Rax,
        Self::Rcx,
        Self::Rdx,
        Self::Rbx,
        Self::Rsp,
        Self::Rbp,
        Self::Rsi,
        Self::Rdi,
        Self::R8,
        Self::R9,
        Self::R10,
        Self::R11,
        Self::R12,
        Self::R13,
        Self::R14,
        Self::R15,
    ];

    /// The register with this number; only the low four bits count.
    #[inline]
    pub const fn from_number(number: u8) -> Self {
        Self::ALL[(number & 0xF) as usize]
    }

    /// The name of the whole register, in lower case.
    pub const fn name(self) -> &'static str {
        const NAMES: [&str; 16] = [
            "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11",
            "r12", "r13", "r14", "r15",
        ];
        NAMES[self as usize]
    }
}

/// The sixteen general registers, in the order of their numbers.
///
/// The world switches load and store this structure, so its layout is fixed: register `n` at byte
/// `8 * n`.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
#[repr(C)]
#[allow(missing_docs, reason = "the registers' own names")]
pub struct Gprs {
    pub rax: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rbx: u64,
    pub rsp: u64,
    pub rbp: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
}

const _: () = assert!(size_of::<Gprs>() == 128);

impl Index<Gpr> for Gprs {
    type Output = u64;

    #[inline]
    fn index(&self, gpr: Gpr) -> &u64 {
        match gpr {
            Gpr::Rax => &self.rax,
            Gpr::Rcx => &self.rcx,
            Gpr::Rdx => &self.rdx,
            Gpr::Rbx => &self.rbx,
            Gpr::Rsp => &self.rsp,
            Gpr::Rbp => &self.rbp,
            Gpr::Rsi => &self.rsi,
            Gpr::Rdi => &self.rdi,
            Gpr::R8 => &self.r8,
            Gpr::R9 => &self.r9,
            Gpr::R10 => &self.r10,
            Gpr::R11 => &self.r11,
            Gpr::R12 => &self.r12,
            Gpr::R13 => &self.r13,
            Gpr::R14 => &self.r14,
            Gpr::R15 => &self.r15,
        }
    }
}

impl IndexMut<Gpr> for Gprs {
    #[inline]
    fn index_mut(&mut self, gpr: Gpr) -> &mut u64 {
        match gpr {
            Gpr::Rax => &mut self.rax,
            Gpr::Rcx => &mut self.rcx,
            Gpr::Rdx => &mut self.rdx,
            Gpr::Rbx => &mut self.rbx,
            Gpr::Rsp => &mut self.rsp,
            Gpr::Rbp => &mut self.rbp,
            Gpr::Rsi => &mut self.rsi,
            Gpr::Rdi => &mut self.rdi,
            Gpr::R8 => &mut self.r8,
            Gpr::R9 => &mut self.r9,
            Gpr::R10 => &mut self.r10,
            Gpr::R11 => &mut self.r11,
            Gpr::R12 => &mut self.r12,
            Gpr::R13 => &mut self.r13,
            Gpr::R14 => &mut self.r14,
            Gpr::R15 => &mut self.r15,
        }
    }
}

impl fmt::Debug for Gprs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (row, registers) in Gpr::ALL.chunks(4).enumerate() {
            if row > 0 {
                f.write_str("\n")?;
            }
            for (column, gpr) in registers.iter().enumerate() {
                let gap = if column > 0 { " " } else { "" };
                let name = gpr.name();
                write!(f, "{gap}{name:3} {:016x}", self[*gpr])?;
            }
        }
        Ok(())
    }
}

/// The segment registers, in their encoding order (SDM vol. 2A, 2.1.5), then the two system ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
#[allow(missing_docs, reason = "the registers' own names")]
pub enum SegmentRegister {
    Es = 0,
    Cs = 1,
    Ss = 2,
    Ds = 3,
    Fs = 4,
    Gs = 5,
    Ldtr = 6,
    Tr = 7,
}

/// The state of a processor apart from its general registers: what decides how it executes.
///
/// Both vendors' guest-state areas, and KVM's special registers, convert to and from this.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the registers' own names")]
pub struct SystemRegisters {
    pub es: Segment,
    pub cs: Segment,
    pub ss: Segment,
    pub ds: Segment,
    pub fs: Segment,
    pub gs: Segment,
    pub ldtr: Segment,
    pub tr: Segment,
    pub gdtr: DescriptorTable,
    pub idtr: DescriptorTable,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub cr8: u64,
    pub efer: u64,
    pub rip: u64,
    pub rflags: u64,
    pub dr6: u64,
    pub dr7: u64,
}

/// The processor modes that decide how addresses are formed (SDM vol. 1, 3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CpuMode {
    /// Real-address mode.
    Real,
    /// Virtual-8086 mode.
    Virtual8086,
    /// Protected mode with a 16-bit code segment.
    Protected16,
    /// Protected mode with a 32-bit code segment.
    Protected32,
    /// Compatibility mode with a 16-bit code segment.
    Compatibility16,
    /// Compatibility mode with a 32-bit code segment.
    Compatibility32,
    /// 64-bit mode.
    Long64,
}

impl SystemRegisters {
    /// The state after RESET or INIT (SDM vol. 3A, table 10-1), at the reset vector.
    pub fn reset() -> Self {
        use crate::segment::SegmentAttributes as A;
        let data = Segment::real_mode(0, A::DATA16);
        Self {
            es: data,
            cs: Segment {
                base: 0xFFFF_0000,
                ..Segment::real_mode(0xF000, A::CODE16)
            },
            ss: data,
            ds: data,
            fs: data,
            gs: data,
            ldtr: Segment::real_mode(0, A::LDT),
            tr: Segment::real_mode(0, A::TSS_BUSY),
            gdtr: DescriptorTable {
                base: 0,
                limit: 0xFFFF,
            },
            idtr: DescriptorTable {
                base: 0,
                limit: 0xFFFF,
            },
            cr0: 0x6000_0010,
            rip: 0xFFF0,
            rflags: 2,
            dr6: 0xFFFF_0FF0,
            dr7: 0x400,
            ..Self::default()
        }
    }

    /// The current privilege level: the DPL of SS, which is 0 in real mode and 3 in virtual-8086
    /// mode (SDM vol. 3C, 27.4.1; APM vol. 2, 15.5.1 keeps it apart, as CPL).
    #[inline]
    pub fn cpl(&self) -> u8 {
        match self.mode() {
            CpuMode::Real => 0,
            CpuMode::Virtual8086 => 3,
            _ => self.ss.attributes.dpl(),
        }
    }

    /// The mode these registers put the processor in.
    #[inline]
    pub fn mode(&self) -> CpuMode {
        use crate::segment::SegmentAttributes as A;
        let cs = self.cs.attributes;
        let big = cs.contains(A::DEFAULT_BIG);
        if self.cr0 & 1 == 0 {
            CpuMode::Real
        } else if self.efer & (1 << 10) != 0 {
            match (cs.contains(A::LONG), big) {
                (true, _) => CpuMode::Long64,
                (false, true) => CpuMode::Compatibility32,
                (false, false) => CpuMode::Compatibility16,
            }
        } else if self.rflags & (1 << 17) != 0 {
            CpuMode::Virtual8086
        } else if big {
            CpuMode::Protected32
        } else {
            CpuMode::Protected16
        }
    }

    /// The segment register with this name.
    #[inline]
    pub fn segment(&self, register: SegmentRegister) -> &Segment {
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

    /// The segment register with this name, to be changed.
    #[inline]
    pub fn segment_mut(&mut self, register: SegmentRegister) -> &mut Segment {
        match register {
            SegmentRegister::Es => &mut self.es,
            SegmentRegister::Cs => &mut self.cs,
            SegmentRegister::Ss => &mut self.ss,
            SegmentRegister::Ds => &mut self.ds,
            SegmentRegister::Fs => &mut self.fs,
            SegmentRegister::Gs => &mut self.gs,
            SegmentRegister::Ldtr => &mut self.ldtr,
            SegmentRegister::Tr => &mut self.tr,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::segment::SegmentAttributes;

    #[test]
    fn index_agrees_with_the_layout() {
        let mut gprs = Gprs::default();
        for gpr in Gpr::ALL {
            gprs[gpr] = gpr as u64 + 1;
        }
        assert_eq!((gprs.rax, gprs.rsp, gprs.r8, gprs.r15), (1, 5, 9, 16));
        assert!(std::format!("{gprs:?}").contains("r10 000000000000000b"));
        assert!(std::format!("{gprs:?}").contains("r15 0000000000000010"));
    }

    #[test]
    fn modes() {
        let mut s = SystemRegisters::reset();
        assert_eq!(s.mode(), CpuMode::Real);
        s.cr0 |= 1;
        assert_eq!(s.mode(), CpuMode::Protected16);
        s.cs.attributes = SegmentAttributes::CODE32;
        assert_eq!(s.mode(), CpuMode::Protected32);
        s.efer = 0x500;
        assert_eq!(s.mode(), CpuMode::Compatibility32);
        s.cs.attributes = SegmentAttributes::CODE64;
        assert_eq!(s.mode(), CpuMode::Long64);
        s.ss.attributes = SegmentAttributes::DATA.with_dpl(3);
        assert_eq!(s.cpl(), 3);
    }
}
