//! Addresses: which space a number belongs to is part of its type.

use core::fmt;

/// The size in bytes of the smallest page and of every table frame.
pub const PAGE_SIZE: u64 = 4096;

/// The page sizes of long-mode paging, EPT and NPT (SDM vol. 3A, 4.5; APM vol. 2, 5.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PageSize {
    /// 4 KiB.
    Size4K,
    /// 2 MiB.
    Size2M,
    /// 1 GiB.
    Size1G,
}

impl PageSize {
    /// All sizes, smallest first.
    pub const ALL: [Self; 3] = [Self::Size4K, Self::Size2M, Self::Size1G];

    /// The size in bytes.
    #[inline]
    pub const fn bytes(self) -> u64 {
        1 << self.shift()
    }

    /// The number of address bits inside a page of this size.
    #[inline]
    pub const fn shift(self) -> u32 {
        match self {
            Self::Size4K => 12,
            Self::Size2M => 21,
            Self::Size1G => 30,
        }
    }
}

impl fmt::Display for PageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Size4K => "4 KiB",
            Self::Size2M => "2 MiB",
            Self::Size1G => "1 GiB",
        })
    }
}

macro_rules! address {
    ($(#[$doc:meta])* $name:ident, $tag:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(transparent)]
        pub struct $name(pub u64);

        impl $name {
            /// The address zero.
            pub const ZERO: Self = Self(0);

            /// The number itself.
            #[inline]
            pub const fn as_u64(self) -> u64 {
                self.0
            }

            /// This address plus `bytes`, or `None` past the end of the 64-bit space.
            #[inline]
            pub const fn checked_add(self, bytes: u64) -> Option<Self> {
                match self.0.checked_add(bytes) {
                    Some(sum) => Some(Self(sum)),
                    None => None,
                }
            }

            /// This address plus `bytes`, modulo 2^64 as the processor's adders work.
            #[inline]
            pub const fn wrapping_add(self, bytes: u64) -> Self {
                Self(self.0.wrapping_add(bytes))
            }

            /// The first byte of the page of `size` that holds this address.
            #[inline]
            pub const fn align_down(self, size: PageSize) -> Self {
                Self(self.0 & !(size.bytes() - 1))
            }

            /// Whether this is the first byte of a page of `size`.
            #[inline]
            pub const fn is_aligned(self, size: PageSize) -> bool {
                self.0 & (size.bytes() - 1) == 0
            }

            /// The offset of this address in its page of `size`.
            #[inline]
            pub const fn offset_in(self, size: PageSize) -> u64 {
                self.0 & (size.bytes() - 1)
            }

            /// The number of the 4 KiB frame that holds this address.
            #[inline]
            pub const fn frame_number(self) -> u64 {
                self.0 >> 12
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($tag, ":{:#x}"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        impl fmt::LowerHex for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::LowerHex::fmt(&self.0, f)
            }
        }

        impl From<u64> for $name {
            fn from(value: u64) -> Self {
                Self(value)
            }
        }
    };
}

address!(
    /// A guest-virtual address (in the manuals: linear address, virtual address).
    Gva,
    "gva"
);
address!(
    /// A guest-physical address: what the guest's own paging produces, and what EPT or NPT
    /// translates. A DMA address that an IOMMU translates is one too.
    #[doc(alias = "system physical address")]
    Gpa,
    "gpa"
);
address!(
    /// A host-physical address: what reaches the memory bus.
    Hpa,
    "hpa"
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alignment_follows_the_page_size() {
        let a = Gpa(0x4030_2010);
        assert_eq!(a.align_down(PageSize::Size4K), Gpa(0x4030_2000));
        assert_eq!(a.align_down(PageSize::Size2M), Gpa(0x4020_0000));
        assert_eq!(a.align_down(PageSize::Size1G), Gpa(0x4000_0000));
        assert_eq!(a.offset_in(PageSize::Size2M), 0x10_2010);
        assert!(Gpa(1 << 30).is_aligned(PageSize::Size1G));
    }

    #[test]
    fn addition_reports_the_end_of_the_space() {
        assert_eq!(Hpa(u64::MAX).checked_add(1), None);
        assert_eq!(Hpa(u64::MAX).wrapping_add(1), Hpa(0));
        assert_eq!(Hpa(1).checked_add(2), Some(Hpa(3)));
    }

    #[test]
    fn debug_names_the_space() {
        assert_eq!(std::format!("{:?} {}", Gva(16), Hpa(255)), "gva:0x10 0xff");
    }
}
