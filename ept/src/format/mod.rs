//! How entries are coded: one file per format, and nothing about a format outside its file.

pub mod amdvi;
pub mod ept;
pub mod long_mode;
pub mod npt;
pub mod vtd;

use core::fmt;

use bitflags::bitflags;
use testudo_arch::{Gpa, Gva, Hpa, PageSize};

bitflags! {
    /// What an access may do, whatever the format calls it.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Rights: u8 {
        /// Loads.
        const READ = 1 << 0;
        /// Stores.
        const WRITE = 1 << 1;
        /// Instruction fetches; with mode-based execute control, those of supervisor mode.
        const EXECUTE = 1 << 2;
        /// Instruction fetches of user mode, where the format tells them apart; elsewhere this
        /// follows `EXECUTE`.
        const USER_EXECUTE = 1 << 3;
    }
}

/// An address that a table can translate from.
pub trait Input: Copy + Eq + Ord + fmt::Debug + fmt::Display {
    /// The address from its number.
    fn from_u64(address: u64) -> Self;
    /// The number of the address.
    fn as_u64(self) -> u64;
}

macro_rules! input {
    ($($address:ty),*) => {$(
        impl Input for $address {
            #[inline]
            fn from_u64(address: u64) -> Self {
                Self(address)
            }
            #[inline]
            fn as_u64(self) -> u64 {
                self.0
            }
        }
    )*};
}
input!(Gpa, Gva);

/// The number of address bits below those that index a table of `level`: 12 at level 1.
#[inline]
pub(crate) const fn shift_of(level: u8) -> u32 {
    (level as u32).wrapping_mul(9).wrapping_add(3)
}

/// The level whose entries map pages of this size.
#[inline]
pub(crate) const fn level_of(size: PageSize) -> u8 {
    match size {
        PageSize::Size4K => 1,
        PageSize::Size2M => 2,
        PageSize::Size1G => 3,
    }
}

/// A mapped page: where it is, how large, and with which flags of its format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Leaf<Flags> {
    /// The page's first byte.
    pub frame: Hpa,
    /// The number of address bits inside the page: 12, 21 or 30 in most formats.
    pub shift: u32,
    /// The entry's flags.
    pub flags: Flags,
}

impl<Flags> Leaf<Flags> {
    /// The page's size in bytes.
    #[inline]
    pub const fn bytes(&self) -> u64 {
        1 << self.shift
    }

    /// The page's size, where it is one of the processor's.
    #[inline]
    pub const fn size(&self) -> Option<PageSize> {
        match self.shift {
            12 => Some(PageSize::Size4K),
            21 => Some(PageSize::Size2M),
            30 => Some(PageSize::Size1G),
            _ => None,
        }
    }
}

/// The coding of a page table's entries.
///
/// A level is counted from the bottom: entries of level 1 map 4 KiB, and a table of level `n`
/// indexes 9 address bits from bit `9 * n + 3` on.
///
/// The contract is a round trip. [`Self::absent`] is absent. [`Self::table_entry`] is present and no leaf, and
/// [`Self::child`] gives back its table. [`Self::leaf_entry`] with valid flags is present and a
/// leaf, and [`Self::leaf`] gives back frame, size and flags. Consecutive pages of one level have
/// entries that differ by the page's size. [`Self::absent`] with a frame's address in bits 51:12
/// is absent too.
pub trait Format: Clone + fmt::Debug {
    /// What the table translates from.
    type Input: Input;
    /// The flags of an entry that maps a page.
    type Flags: Copy + Eq + fmt::Debug;

    /// The manual's name.
    const NAME: &'static str;
    /// Bits that hardware ignores in every present entry, at least four, one beside the other. The
    /// engine uses the three lowest of an entry that is in use; the others are the caller's, among
    /// the flags.
    const SOFTWARE: u64;
    /// Whether a page may take several entries, each of which says where the whole page lies: see
    /// [`Self::sized_entry`].
    const SIZED_PAGES: bool = false;

    /// The number of levels.
    fn levels(&self) -> u8;

    /// The number of input address bits that select an entry or a byte.
    #[inline]
    fn input_bits(&self) -> u32 {
        shift_of(self.levels()).wrapping_add(9)
    }

    /// The address as an offset into the table's range, or `None` where the table has no place
    /// for it.
    #[inline]
    fn offset(&self, address: Self::Input) -> Option<u64> {
        let address = address.as_u64();
        (address >> self.input_bits() == 0).then_some(address)
    }

    /// The address at an offset: the inverse of [`Self::offset`].
    #[inline]
    fn address(&self, offset: u64) -> Self::Input {
        Self::Input::from_u64(offset)
    }

    /// The bits of an entry that hold a frame's address.
    fn address_mask(&self) -> u64;

    /// The entry that translates nothing.
    #[inline]
    fn absent(&self) -> u64 {
        0
    }

    /// The highest level at which a page with these flags may be mapped.
    fn largest_level(&self, flags: Self::Flags) -> u8;

    /// Whether hardware accepts these flags: no reserved bit, no reserved combination.
    fn is_valid(&self, flags: Self::Flags) -> bool;

    /// Whether the entry translates at all.
    fn is_present(&self, entry: u64) -> bool;

    /// Whether a present entry of a table of `level` maps a page.
    fn is_leaf(&self, entry: u64, level: u8) -> bool;

    /// Whether a present entry of `level` has a bit set, or a combination of bits, that hardware
    /// reserves. Tables that software of another level of trust has written are checked with this.
    fn is_reserved(&self, entry: u64, level: u8) -> bool;

    /// The table that an entry of `level` refers to, and that table's level.
    #[inline]
    fn child(&self, entry: u64, level: u8) -> (Hpa, u8) {
        (Hpa(entry & self.address_mask()), level.wrapping_sub(1))
    }

    /// The page that a leaf entry of `level` maps.
    fn leaf(&self, entry: u64, level: u8) -> Leaf<Self::Flags>;

    /// The entry of `level` that refers to a table.
    fn table_entry(&self, table: Hpa, level: u8) -> u64;

    /// The entry of `level` that maps a page.
    fn leaf_entry(&self, frame: Hpa, level: u8, flags: Self::Flags) -> u64;

    /// The entry for a page of `1 << shift` bytes that fills several entries of one table, in each of
    /// them; `None` where the format has no such pages.
    #[inline]
    fn sized_entry(&self, _frame: Hpa, _shift: u32, _flags: Self::Flags) -> Option<u64> {
        None
    }

    /// The bit of a leaf entry that hardware sets on the first access, or 0.
    fn accessed_bit(&self) -> u64;

    /// The bit of a leaf entry that hardware sets on the first write, or 0.
    fn dirty_bit(&self) -> u64;

    /// The bit of a leaf entry without which a write faults.
    fn write_bit(&self) -> u64;

    /// What a present entry of `level`, for a page or a table, lets through.
    fn entry_rights(&self, entry: u64, level: u8) -> Rights;

    /// What a page with these flags allows.
    #[inline]
    fn rights(&self, flags: Self::Flags) -> Rights {
        self.entry_rights(self.leaf_entry(Hpa(0), 1, flags), 1)
    }

    /// The flags of ordinary write-back memory with these rights, already accessed and dirty, or
    /// `None` if the format cannot say exactly these rights.
    fn flags(&self, rights: Rights) -> Option<Self::Flags>;

    /// The flags with other rights, or `None` if the format cannot say exactly these.
    fn with_rights(&self, flags: Self::Flags, rights: Rights) -> Option<Self::Flags>;

    /// The largest part of the rights that the format can say exactly; empty means absent.
    fn floor(&self, rights: Rights) -> Rights;
}
