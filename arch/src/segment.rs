//! Segment registers with their hidden parts, in one form for both vendors.

use bitflags::bitflags;

bitflags! {
    /// The attributes of a segment, at the bit positions of a descriptor's second double word
    /// shifted right by 8, which is also VMX's access-rights format (SDM vol. 3C, 27.4.1).
    ///
    /// AMD's VMCB packs the same bits without the gap: see [`SegmentAttributes::to_svm`].
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct SegmentAttributes: u32 {
        /// Type bit 0: accessed.
        const ACCESSED = 1 << 0;
        /// Type bit 1: writable data, or readable code.
        const WRITABLE = 1 << 1;
        /// Type bit 2: expand-down data, or conforming code.
        const CONFORMING = 1 << 2;
        /// Type bit 3: code.
        const CODE = 1 << 3;
        /// S: a code or data segment, not a system one.
        const CODE_OR_DATA = 1 << 4;
        /// DPL, low bit.
        const DPL_LOW = 1 << 5;
        /// DPL, high bit.
        const DPL_HIGH = 1 << 6;
        /// P.
        const PRESENT = 1 << 7;
        /// AVL.
        const AVAILABLE = 1 << 12;
        /// L: 64-bit code.
        const LONG = 1 << 13;
        /// D/B: default operation size, stack pointer size.
        const DEFAULT_BIG = 1 << 14;
        /// G: the limit counts 4 KiB units.
        const GRANULARITY = 1 << 15;
        /// VMX only: the register is unusable. SVM expresses it by a clear `PRESENT`.
        const UNUSABLE = 1 << 16;
        const _ = !0;
    }
}

impl SegmentAttributes {
    /// The attributes of a flat 64-bit code segment at DPL 0.
    pub const CODE64: Self = Self::from_bits_retain(0xA09B);
    /// The attributes of a flat 32-bit code segment at DPL 0.
    pub const CODE32: Self = Self::from_bits_retain(0xC09B);
    /// The attributes of a flat read-write data segment at DPL 0.
    pub const DATA: Self = Self::from_bits_retain(0xC093);
    /// The attributes of a busy 64-bit (or 32-bit) TSS.
    pub const TSS_BUSY: Self = Self::from_bits_retain(0x8B);
    /// The attributes of an LDT.
    pub const LDT: Self = Self::from_bits_retain(0x82);
    /// The attributes of a 16-bit code segment after reset.
    pub const CODE16: Self = Self::from_bits_retain(0x9B);
    /// The attributes of a 16-bit data segment after reset.
    pub const DATA16: Self = Self::from_bits_retain(0x93);

    /// The segment type: bits 3:0 of the descriptor's type field.
    #[inline]
    pub const fn segment_type(self) -> u8 {
        (self.bits() & 0xF) as u8
    }

    /// The descriptor privilege level.
    #[inline]
    pub const fn dpl(self) -> u8 {
        ((self.bits() >> 5) & 3) as u8
    }

    /// These attributes with another privilege level (its low two bits count).
    #[inline]
    pub const fn with_dpl(self, dpl: u8) -> Self {
        Self::from_bits_retain((self.bits() & !0x60) | (((dpl & 3) as u32) << 5))
    }

    /// The twelve-bit form of the VMCB: descriptor bits 55:52 and 47:40 concatenated (APM vol. 2,
    /// 15.5.1). An unusable segment becomes one that is not present.
    #[inline]
    pub const fn to_svm(self) -> u16 {
        let bits = self.bits();
        let packed = (bits & 0xFF) | ((bits >> 4) & 0xF00);
        if bits & Self::UNUSABLE.bits() != 0 {
            (packed & !0x80) as u16
        } else {
            packed as u16
        }
    }

    /// From the VMCB's twelve-bit form.
    #[inline]
    pub const fn from_svm(packed: u16) -> Self {
        let bits = packed as u32;
        Self::from_bits_retain((bits & 0xFF) | ((bits & 0xF00) << 4))
    }
}

/// A segment register with its hidden part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Segment {
    /// The visible selector.
    pub selector: u16,
    /// The attributes.
    pub attributes: SegmentAttributes,
    /// The limit in bytes, whatever the granularity.
    pub limit: u32,
    /// The base: a linear address.
    pub base: u64,
}

impl Segment {
    /// A segment as real mode has it: the base is sixteen times the selector.
    pub const fn real_mode(selector: u16, attributes: SegmentAttributes) -> Self {
        Self {
            selector,
            attributes,
            limit: 0xFFFF,
            base: (selector as u64) << 4,
        }
    }

    /// A flat segment that covers 4 GiB from zero.
    pub const fn flat(selector: u16, attributes: SegmentAttributes) -> Self {
        Self {
            selector,
            attributes,
            limit: u32::MAX,
            base: 0,
        }
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct DescriptorTable {
    /// The linear address of the table.
    pub base: u64,
    /// The offset of its last byte.
    pub limit: u16,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn golden_attributes() {
        assert_eq!(SegmentAttributes::CODE64.to_svm(), 0xA9B);
        assert_eq!(SegmentAttributes::DATA.to_svm(), 0xC93);
        assert_eq!(
            SegmentAttributes::UNUSABLE
                .union(SegmentAttributes::DATA)
                .to_svm(),
            0xC13
        );
        assert_eq!(SegmentAttributes::CODE64.with_dpl(3).dpl(), 3);
    }

    proptest! {
        #[test]
        fn svm_form_round_trips(packed in 0u16..0x1000) {
            prop_assert_eq!(SegmentAttributes::from_svm(packed).to_svm(), packed);
        }
    }
}
