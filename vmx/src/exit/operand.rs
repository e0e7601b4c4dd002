//! Instruction information: the operands of instructions that exit (SDM vol. 3C, 30.2.5).

use testudo_arch::regs::{CpuMode, Gpr, Gprs, SegmentRegister};

/// The size of an address, as the instruction's prefixes and the mode make it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AddressSize {
    /// 16 bits.
    Bits16,
    /// 32 bits.
    Bits32,
    /// 64 bits.
    Bits64,
}

impl AddressSize {
    const fn from_information(information: u32) -> Self {
        match (information >> 7) & 7 {
            0 => Self::Bits16,
            1 => Self::Bits32,
            _ => Self::Bits64,
        }
    }

    /// The bits of an effective address of this size.
    #[inline]
    pub const fn mask(self) -> u64 {
        match self {
            Self::Bits16 => 0xFFFF,
            Self::Bits32 => 0xFFFF_FFFF,
            Self::Bits64 => u64::MAX,
        }
    }
}

const fn segment(information: u32) -> SegmentRegister {
    match (information >> 15) & 7 {
        0 => SegmentRegister::Es,
        1 => SegmentRegister::Cs,
        2 => SegmentRegister::Ss,
        3 => SegmentRegister::Ds,
        4 => SegmentRegister::Fs,
        _ => SegmentRegister::Gs,
    }
}

/// A memory operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MemoryOperand {
    /// The segment register.
    pub segment: SegmentRegister,
    /// The base register.
    pub base: Option<Gpr>,
    /// The index register and the power of two by which it is multiplied.
    pub index: Option<(Gpr, u8)>,
    /// The displacement; if the operand is relative to RIP, this already is the address.
    pub displacement: u64,
    /// The size of the effective address.
    pub size: AddressSize,
}

impl MemoryOperand {
    /// From the instruction information and the exit qualification (table 30-14).
    #[inline]
    pub const fn new(information: u32, qualification: u64) -> Self {
        let base = Gpr::from_number((information >> 23) as u8);
        let index = Gpr::from_number((information >> 18) as u8);
        Self {
            segment: segment(information),
            base: if information & (1 << 27) == 0 {
                Some(base)
            } else {
                None
            },
            index: if information & (1 << 22) == 0 {
                Some((index, (information & 3) as u8))
            } else {
                None
            },
            displacement: qualification,
            size: AddressSize::from_information(information),
        }
    }

    /// The offset in the segment. `gprs` must hold the guest's RSP.
    ///
    /// ```
    /// use testudo_arch::regs::Gprs;
    /// use testudo_vmx::exit::MemoryOperand;
    ///
    /// // [rbx + rcx * 4 + 0x10] with 32-bit addresses in DS.
    /// let operand = MemoryOperand::new(2 | 1 << 7 | 3 << 15 | 1 << 18 | 3 << 23, 0x10);
    /// let gprs = Gprs { rbx: 0xFFFF_FFF0, rcx: 2, ..Gprs::default() };
    /// assert_eq!(operand.effective_address(&gprs), 8);
    /// ```
    #[inline]
    pub fn effective_address(&self, gprs: &Gprs) -> u64 {
        let base = self.base.map_or(0, |gpr| gprs[gpr]);
        let index = self.index.map_or(0, |(gpr, shift)| gprs[gpr] << shift);
        let sum = base.wrapping_add(index).wrapping_add(self.displacement);
        sum & self.size.mask()
    }

    /// The linear address, with the base of [`segment`](Self::segment). In 64-bit mode only FS and
    /// GS have a base (SDM vol. 1, 3.4.4); elsewhere linear addresses have 32 bits.
    #[inline]
    pub fn linear_address(&self, gprs: &Gprs, segment_base: u64, mode: CpuMode) -> u64 {
        let offset = self.effective_address(gprs);
        if mode == CpuMode::Long64 {
            let has_base = matches!(self.segment, SegmentRegister::Fs | SegmentRegister::Gs);
            offset.wrapping_add(if has_base { segment_base } else { 0 })
        } else {
            offset.wrapping_add(segment_base) & 0xFFFF_FFFF
        }
    }
}

/// An operand in a register or in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operand {
    /// A general register.
    Register(Gpr),
    /// Memory.
    Memory(MemoryOperand),
}

impl Operand {
    const fn new(information: u32, qualification: u64) -> Self {
        if information & (1 << 10) != 0 {
            Self::Register(Gpr::from_number((information >> 3) as u8))
        } else {
            Self::Memory(MemoryOperand::new(information, qualification))
        }
    }
}

/// The operands of VMREAD and VMWRITE (table 30-15).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct VmcsOperands {
    /// The register that holds the field's encoding.
    pub encoding: Gpr,
    /// Where the value goes to (VMREAD) or comes from (VMWRITE).
    pub value: Operand,
}

impl VmcsOperands {
    /// From the instruction information and the exit qualification.
    #[inline]
    pub const fn new(information: u32, qualification: u64) -> Self {
        Self {
            encoding: Gpr::from_number((information >> 28) as u8),
            value: Operand::new(information, qualification),
        }
    }
}

/// The operands of INVEPT, INVPCID and INVVPID (table 30-9).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct InvalidateOperands {
    /// The register that holds the type.
    pub kind: Gpr,
    /// The descriptor's place.
    pub descriptor: MemoryOperand,
}

impl InvalidateOperands {
    /// From the instruction information and the exit qualification.
    #[inline]
    pub const fn new(information: u32, qualification: u64) -> Self {
        Self {
            kind: Gpr::from_number((information >> 28) as u8),
            descriptor: MemoryOperand::new(information, qualification),
        }
    }
}

/// Which instruction accessed GDTR or IDTR.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the instructions' own names")]
pub enum GdtrIdtrInstruction {
    Sgdt,
    Sidt,
    Lgdt,
    Lidt,
}

/// An access to GDTR or IDTR (table 30-10).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GdtrIdtrAccess {
    /// The instruction.
    pub instruction: GdtrIdtrInstruction,
    /// Whether the operand size is 16 bits; outside 64-bit mode a load then takes 24 base bits.
    pub operand_16: bool,
    /// The pseudo-descriptor's place.
    pub operand: MemoryOperand,
}

impl GdtrIdtrAccess {
    /// From the instruction information and the exit qualification.
    #[inline]
    pub const fn new(information: u32, qualification: u64) -> Self {
        Self {
            instruction: match (information >> 28) & 3 {
                0 => GdtrIdtrInstruction::Sgdt,
                1 => GdtrIdtrInstruction::Sidt,
                2 => GdtrIdtrInstruction::Lgdt,
                _ => GdtrIdtrInstruction::Lidt,
            },
            operand_16: information & (1 << 11) == 0,
            operand: MemoryOperand::new(information, qualification),
        }
    }
}

/// Which instruction accessed LDTR or TR.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the instructions' own names")]
pub enum LdtrTrInstruction {
    Sldt,
    Str,
    Lldt,
    Ltr,
}

/// An access to LDTR or TR (table 30-11).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LdtrTrAccess {
    /// The instruction.
    pub instruction: LdtrTrInstruction,
    /// The selector's place.
    pub operand: Operand,
}

impl LdtrTrAccess {
    /// From the instruction information and the exit qualification.
    #[inline]
    pub const fn new(information: u32, qualification: u64) -> Self {
        Self {
            instruction: match (information >> 28) & 3 {
                0 => LdtrTrInstruction::Sldt,
                1 => LdtrTrInstruction::Str,
                2 => LdtrTrInstruction::Lldt,
                _ => LdtrTrInstruction::Ltr,
            },
            operand: Operand::new(information, qualification),
        }
    }
}

/// The address size and segment of INS or OUTS (table 30-8).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StringIo {
    /// The size of RCX, RSI and RDI that counts.
    pub size: AddressSize,
    /// The segment of the source: OUTS only. INS always writes through ES.
    pub segment: SegmentRegister,
}

impl StringIo {
    /// From the instruction information.
    #[inline]
    pub const fn new(information: u32) -> Self {
        Self {
            size: AddressSize::from_information(information),
            segment: segment(information),
        }
    }
}

/// The destination of RDRAND or RDSEED (table 30-12).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RandomDestination {
    /// The register.
    pub register: Gpr,
    /// The number of bytes: 2, 4 or 8.
    pub size: u8,
}

impl RandomDestination {
    /// From the instruction information.
    #[inline]
    pub const fn new(information: u32) -> Self {
        Self {
            register: Gpr::from_number((information >> 3) as u8),
            size: match (information >> 11) & 3 {
                0 => 2,
                1 => 4,
                _ => 8,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn golden_information() {
        // VMREAD [rbp + 8], rax in 64-bit mode.
        let read = VmcsOperands::new(2 << 7 | 2 << 15 | 1 << 22 | 5 << 23, 8);
        assert_eq!(read.encoding, Gpr::Rax);
        let Operand::Memory(memory) = read.value else {
            panic!("{read:?}");
        };
        assert_eq!((memory.base, memory.index), (Some(Gpr::Rbp), None));
        let gprs = Gprs {
            rbp: 0x1000,
            ..Gprs::default()
        };
        assert_eq!(memory.linear_address(&gprs, 0xBAD, CpuMode::Long64), 0x1008);
        assert_eq!(
            memory.linear_address(&gprs, 0x10, CpuMode::Protected32),
            0x1018
        );
        let write = VmcsOperands::new(1 << 10 | 9 << 3 | 15 << 28, 0);
        assert_eq!(write.encoding, Gpr::R15);
        assert_eq!(write.value, Operand::Register(Gpr::R9));
        let lidt = GdtrIdtrAccess::new(3 << 28 | 1 << 11, 0);
        assert_eq!(lidt.instruction, GdtrIdtrInstruction::Lidt);
        assert!(!lidt.operand_16);
        let ltr = LdtrTrAccess::new(3 << 28 | 1 << 10 | 1 << 3, 0);
        assert_eq!(ltr.operand, Operand::Register(Gpr::Rcx));
    }

    proptest! {
        #[test]
        fn no_operand_is_out_of_bounds(information: u32, qualification: u64, value: u64) {
            let mut gprs = Gprs::default();
            for gpr in Gpr::ALL {
                gprs[gpr] = value;
            }
            let operand = MemoryOperand::new(information, qualification);
            let linear = operand.linear_address(&gprs, value, CpuMode::Protected32);
            prop_assert!(linear <= 0xFFFF_FFFF);
            prop_assert!(operand.effective_address(&gprs) <= operand.size.mask());
        }
    }
}
