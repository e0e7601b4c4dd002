//! VMCS field encodings and what they say by themselves (SDM vol. 3C, 27.11.2).

use core::fmt;
use core::marker::PhantomData;

use crate::fields::{self, FieldInfo};

/// The encoding of a VMCS field, as VMREAD and VMWRITE take it.
///
/// Width, area, index and half can be read from the number itself:
///
/// ```
/// use testudo_vmx::encoding::{Area, Encoding, FieldWidth};
///
/// let encoding = Encoding(0x6C16);
/// assert_eq!(encoding.width(), FieldWidth::Natural);
/// assert_eq!(encoding.area(), Area::Host);
/// assert_eq!(encoding.index(), 11);
/// assert_eq!(encoding.to_string(), "HOST_RIP");
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct Encoding(pub u32);

/// The width of a VMCS field: bits 14:13 of its encoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum FieldWidth {
    /// 16 bits.
    Bits16 = 0,
    /// 64 bits, in any mode.
    Bits64 = 1,
    /// 32 bits.
    Bits32 = 2,
    /// 64 bits on processors with Intel 64, else 32.
    Natural = 3,
}

impl FieldWidth {
    /// The number of bytes a field of this width holds.
    #[inline]
    pub const fn bytes(self) -> usize {
        match self {
            Self::Bits16 => 2,
            Self::Bits32 => 4,
            Self::Bits64 | Self::Natural => 8,
        }
    }

    /// The bits of a value that a field of this width keeps.
    #[inline]
    pub const fn mask(self) -> u64 {
        match self {
            Self::Bits16 => 0xFFFF,
            Self::Bits32 => 0xFFFF_FFFF,
            Self::Bits64 | Self::Natural => u64::MAX,
        }
    }
}

/// The part of the VMCS a field belongs to: bits 11:10 of its encoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Area {
    /// VM-execution, VM-exit and VM-entry controls.
    Control = 0,
    /// VM-exit information: read-only, unless bit 29 of IA32_VMX_MISC allows VMWRITE to it.
    #[doc(alias = "read-only data")]
    ExitInformation = 1,
    /// Guest state.
    Guest = 2,
    /// Host state.
    Host = 3,
}

impl Encoding {
    /// The encoding made of its parts, for full (not high) access.
    #[inline]
    pub const fn new(width: FieldWidth, area: Area, index: u16) -> Self {
        Self(((width as u32) << 13) | ((area as u32) << 10) | (((index & 0x1FF) as u32) << 1))
    }

    /// The field's width.
    #[inline]
    pub const fn width(self) -> FieldWidth {
        match (self.0 >> 13) & 3 {
            0 => FieldWidth::Bits16,
            1 => FieldWidth::Bits64,
            2 => FieldWidth::Bits32,
            _ => FieldWidth::Natural,
        }
    }

    /// The part of the VMCS the field belongs to.
    #[inline]
    pub const fn area(self) -> Area {
        match (self.0 >> 10) & 3 {
            0 => Area::Control,
            1 => Area::ExitInformation,
            2 => Area::Guest,
            _ => Area::Host,
        }
    }

    /// The field's number among those of its width and area.
    #[inline]
    pub const fn index(self) -> u16 {
        ((self.0 >> 1) & 0x1FF) as u16
    }

    /// Whether the encoding names the upper 32 bits of a 64-bit field.
    #[inline]
    pub const fn is_high(self) -> bool {
        self.0 & 1 != 0
    }

    /// The encoding of the whole field: this one without the bit that chooses the upper half.
    #[inline]
    pub const fn full(self) -> Self {
        Self(self.0 & !1)
    }

    /// Whether the reserved bits 12 and 31:15 are clear, and only a 64-bit field has a high half.
    #[inline]
    pub const fn is_well_formed(self) -> bool {
        self.0 & 0xFFFF_9000 == 0 && (!self.is_high() || matches!(self.width(), FieldWidth::Bits64))
    }

    /// The table's row for this field, if the current manual defines it.
    pub fn info(self) -> Option<&'static FieldInfo> {
        let table = fields::FIELDS;
        let full = self.full();
        let row = table.binary_search_by_key(&full, |row| row.encoding).ok()?;
        self.is_well_formed().then(|| &table[row])
    }
}

impl fmt::Display for Encoding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.info() {
            Some(info) if self.is_high() => write!(f, "{} (high)", info.name),
            Some(info) => f.write_str(info.name),
            None => write!(f, "VMCS field {:#06x}", self.0),
        }
    }
}

impl fmt::Debug for Encoding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

mod sealed {
    pub trait Sealed {}
}

/// The width of a typed field: `u16`, `u32`, `u64` or [`Natural`].
pub trait Width: sealed::Sealed + Copy + 'static {
    /// What such a field holds.
    type Value: Copy + Into<u64> + fmt::Debug + PartialEq;
    /// The width as a value.
    const WIDTH: FieldWidth;
    /// The value in the low bits of a raw one.
    fn from_raw(raw: u64) -> Self::Value;
}

/// Marks a field of natural width; it holds a `u64`.
#[derive(Clone, Copy, Debug)]
pub struct Natural;

macro_rules! width {
    ($($marker:ty => $value:ty, $width:ident;)*) => {
        $(
            impl sealed::Sealed for $marker {}
            impl Width for $marker {
                type Value = $value;
                const WIDTH: FieldWidth = FieldWidth::$width;
                #[inline]
                #[allow(clippy::cast_lossless, reason = "one macro for all widths")]
                fn from_raw(raw: u64) -> $value {
                    raw as $value
                }
            }
        )*
    };
}

width! {
    u16 => u16, Bits16;
    u32 => u32, Bits32;
    u64 => u64, Bits64;
    Natural => u64, Natural;
}

/// What a program may do with a typed field.
pub trait Access: sealed::Sealed + Copy + 'static {}

/// Marks a field that VMWRITE always accepts.
#[derive(Clone, Copy, Debug)]
pub struct ReadWrite;

/// Marks VM-exit information, which not every processor lets VMWRITE change.
#[derive(Clone, Copy, Debug)]
pub struct ReadOnly;

impl sealed::Sealed for ReadWrite {}
impl sealed::Sealed for ReadOnly {}
impl Access for ReadWrite {}
impl Access for ReadOnly {}

/// A VMCS field with its width and access in its type.
pub struct Field<W, A = ReadWrite> {
    encoding: Encoding,
    marker: PhantomData<fn() -> (W, A)>,
}

impl<W, A> Clone for Field<W, A> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<W, A> Copy for Field<W, A> {}

impl<W: Width, A: Access> Field<W, A> {
    pub(crate) const fn new(encoding: Encoding, area: Area) -> Self {
        assert!(encoding.is_well_formed() && !encoding.is_high());
        assert!(encoding.width() as u8 == W::WIDTH as u8);
        assert!(encoding.area() as u8 == area as u8);
        Self {
            encoding,
            marker: PhantomData,
        }
    }

    /// The encoding, for use where the type does not matter.
    #[inline]
    pub const fn encoding(self) -> Encoding {
        self.encoding
    }
}

impl<W, A> fmt::Debug for Field<W, A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.encoding, f)
    }
}

impl<W, A> From<Field<W, A>> for Encoding {
    fn from(field: Field<W, A>) -> Self {
        field.encoding
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn parts_make_the_encoding(raw in 0u32..0x8000) {
            let encoding = Encoding(raw & 0x6FFE);
            let same = Encoding::new(encoding.width(), encoding.area(), encoding.index());
            prop_assert_eq!(same, encoding);
            prop_assert!(encoding.is_well_formed());
        }

        #[test]
        fn reserved_bits_make_it_malformed(raw: u32) {
            if raw & 0xFFFF_9000 != 0 {
                prop_assert!(!Encoding(raw).is_well_formed());
                prop_assert!(Encoding(raw).info().is_none());
            }
        }
    }

    #[test]
    fn only_64_bit_fields_have_a_high_half() {
        assert_eq!(Encoding(0x201B).info().unwrap().name, "EPT_POINTER");
        assert_eq!(std::format!("{}", Encoding(0x201B)), "EPT_POINTER (high)");
        assert!(Encoding(0x4003).info().is_none());
        assert!(Encoding(0x6801).info().is_none());
        assert_eq!(std::format!("{}", Encoding(0x4003)), "VMCS field 0x4003");
    }
}
