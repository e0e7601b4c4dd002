//! Permission maps: which MSRs and ports of a guest cause exits (APM vol. 2, 15.10 and 15.11).
//!
//! Both are bitmaps in memory that the VMCB points to. A change of their *contents* is a change of
//! the VMCB part [`PERMISSION_MAPS`](crate::vmcb::CleanBits::PERMISSION_MAPS), which no setter of
//! the VMCB can see: mark it dirty.

use bitflags::bitflags;
use testudo_arch::Msr;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

bitflags! {
    /// Which accesses of an MSR exit.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct MsrAccess: u8 {
        /// RDMSR.
        const READ = 1;
        /// WRMSR.
        const WRITE = 2;
    }
}

/// The MSR permission map: 8 KiB, two bits for each MSR of three ranges of 8,192 (APM vol. 2,
/// 15.11). A set bit means an exit.
///
/// MSRs outside the ranges always exit, when the intercept
/// [`MSR`](crate::intercept::Misc1::MSR) is set.
///
/// ```
/// use testudo_arch::Msr;
/// use testudo_svm::permission::{MsrAccess, MsrPermissionMap};
///
/// let mut map = MsrPermissionMap::intercept_all();
/// map.set(Msr::FS_BASE, MsrAccess::empty());
/// assert!(!map.intercepts(Msr::FS_BASE, MsrAccess::WRITE));
/// assert!(map.intercepts(Msr::EFER, MsrAccess::READ));
/// assert!(map.intercepts(Msr(0x4000_0000), MsrAccess::READ)); // in no range
/// ```
#[derive(Clone, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(4096))]
pub struct MsrPermissionMap([u64; 1024]);

impl MsrPermissionMap {
    /// The size in bytes, and in memory: two contiguous frames.
    pub const SIZE: usize = 8192;

    /// The first MSR of each range, in the order of the map. Each range takes 2 KiB.
    pub const RANGES: [Msr; 3] = [Msr(0), Msr(0xC000_0000), Msr(0xC001_0000)];

    /// The number of MSRs in each range.
    pub const RANGE_LEN: u32 = 0x2000;

    /// A map under which every access exits.
    pub const fn intercept_all() -> Self {
        Self([u64::MAX; 1024])
    }

    /// A map under which no access of the three ranges exits.
    pub const fn intercept_none() -> Self {
        Self([0; 1024])
    }

    /// The bit number of the read bit of an MSR; its write bit follows. `None` outside the ranges.
    #[inline]
    pub const fn bit(msr: Msr) -> Option<u32> {
        let mut range = 0;
        while range < Self::RANGES.len() {
            let index = msr.0.wrapping_sub(Self::RANGES[range].0);
            if index < Self::RANGE_LEN {
                return Some((range as u32 * Self::RANGE_LEN + index) * 2);
            }
            range += 1;
        }
        None
    }

    /// The address of the byte in which an MSR's bits stand, relative to the map's start, and the
    /// shift of its read bit in that byte: for looking it up in a guest's memory.
    #[inline]
    pub const fn byte(msr: Msr) -> Option<(u16, u8)> {
        match Self::bit(msr) {
            Some(bit) => Some(((bit / 8) as u16, (bit % 8) as u8)),
            None => None,
        }
    }

    /// Which accesses of an MSR exit.
    #[inline]
    pub const fn get(&self, msr: Msr) -> MsrAccess {
        match Self::bit(msr) {
            Some(bit) => {
                let word = self.0[(bit / 64) as usize];
                MsrAccess::from_bits_truncate((word >> (bit % 64)) as u8)
            }
            None => MsrAccess::all(),
        }
    }

    /// Sets which accesses of an MSR exit. `false` if the MSR is in no range and the map cannot
    /// say it.
    #[inline]
    pub const fn set(&mut self, msr: Msr, access: MsrAccess) -> bool {
        let Some(bit) = Self::bit(msr) else {
            return false;
        };
        let word = &mut self.0[(bit / 64) as usize];
        *word = (*word & !(3 << (bit % 64))) | (access.bits() as u64) << (bit % 64);
        true
    }

    /// Whether any of these accesses of an MSR exits.
    #[inline]
    pub const fn intercepts(&self, msr: Msr, access: MsrAccess) -> bool {
        self.get(msr).intersects(access)
    }

    /// Makes every access exit that `other` lets exit: what a guest's guest must run with is what
    /// either hypervisor wants to see.
    pub fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.0.iter_mut().zip(&other.0) {
            *mine |= theirs;
        }
    }

    /// Whether every access that exits under `other` exits under this map too: the containment
    /// rule for a merged map.
    pub fn covers(&self, other: &Self) -> bool {
        self.0
            .iter()
            .zip(&other.0)
            .all(|(mine, theirs)| theirs & !mine == 0)
    }
}

/// The I/O permission map: 12 KiB, one bit for each port (APM vol. 2, 15.10.1). A set bit means an
/// exit.
///
/// An access of 2 or 4 bytes exits if the bit of any of its ports is set. One that begins at the
/// last ports goes beyond 64 Ki bits, into the third page, which is why there is one.
///
/// ```
/// use testudo_svm::permission::IoPermissionMap;
///
/// let mut map = IoPermissionMap::intercept_none();
/// map.set(0x3FB, true);
/// assert!(map.intercepts(0x3F8, 4) && !map.intercepts(0x3F8, 2));
/// ```
#[derive(Clone, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(4096))]
pub struct IoPermissionMap([u64; 1536]);

impl IoPermissionMap {
    /// The size in bytes, and in memory: three contiguous frames.
    pub const SIZE: usize = 12288;

    /// A map under which every access exits.
    pub const fn intercept_all() -> Self {
        Self([u64::MAX; 1536])
    }

    /// A map under which no access exits.
    pub const fn intercept_none() -> Self {
        Self([0; 1536])
    }

    /// Whether an access of one byte at `port` exits.
    #[inline]
    pub const fn get(&self, port: u16) -> bool {
        self.0[(port / 64) as usize] >> (port % 64) & 1 != 0
    }

    /// Sets whether accesses that touch `port` exit.
    #[inline]
    pub const fn set(&mut self, port: u16, intercept: bool) {
        let word = &mut self.0[(port / 64) as usize];
        *word = (*word & !(1 << (port % 64))) | (intercept as u64) << (port % 64);
    }

    /// Sets whether accesses exit that run over the last port: those bits stand for no port of
    /// their own.
    pub const fn set_overflow(&mut self, intercept: bool) {
        self.0[1024] = (self.0[1024] & !7) | if intercept { 7 } else { 0 };
    }

    /// Whether an access of `size` bytes (1, 2 or 4) that begins at `port` exits.
    #[inline]
    pub const fn intercepts(&self, port: u16, size: u8) -> bool {
        let (word, shift) = ((port / 64) as usize, port % 64);
        // 128 bits from the word: no access of up to four ports leaves them, and the word after
        // the last port's is in the third page.
        let bits = self.0[word] as u128 | (self.0[word + 1] as u128) << 64;
        let mask = (1 << (size & 7)) - 1;
        bits >> shift & mask != 0
    }

    /// Makes every access exit that `other` lets exit.
    pub fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.0.iter_mut().zip(&other.0) {
            *mine |= theirs;
        }
    }

    /// Whether every access that exits under `other` exits under this map too.
    pub fn covers(&self, other: &Self) -> bool {
        self.0
            .iter()
            .zip(&other.0)
            .all(|(mine, theirs)| theirs & !mine == 0)
    }
}

const _: () = assert!(size_of::<MsrPermissionMap>() == MsrPermissionMap::SIZE);
const _: () = assert!(size_of::<IoPermissionMap>() == IoPermissionMap::SIZE);

macro_rules! map_debug {
    ($map:ident) => {
        impl core::fmt::Debug for $map {
            /// How many bits are set: the map itself is thousands of numbers.
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                let set: u32 = self.0.iter().map(|word| word.count_ones()).sum();
                write!(f, concat!(stringify!($map), "({} bits set)"), set)
            }
        }

        impl Default for $map {
            /// Nothing exits.
            fn default() -> Self {
                Self::new_zeroed()
            }
        }
    };
}
map_debug!(MsrPermissionMap);
map_debug!(IoPermissionMap);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn golden_bits() {
        // APM vol. 2, 15.11: bytes 000h, 800h and 1000h begin the ranges.
        assert_eq!(MsrPermissionMap::byte(Msr(0)), Some((0, 0)));
        assert_eq!(MsrPermissionMap::byte(Msr(0x1FFF)), Some((0x7FF, 6)));
        assert_eq!(MsrPermissionMap::byte(Msr::EFER), Some((0x820, 0)));
        assert_eq!(MsrPermissionMap::byte(Msr(0xC000_1FFF)), Some((0xFFF, 6)));
        assert_eq!(MsrPermissionMap::byte(Msr::VM_HSAVE_PA), Some((0x1045, 6)));
        for outside in [
            0x2000,
            0x4000_0000,
            0xBFFF_FFFF,
            0xC000_2000,
            0xC001_2000,
            u32::MAX,
        ] {
            assert_eq!(MsrPermissionMap::bit(Msr(outside)), None);
        }
        let mut map = MsrPermissionMap::intercept_none();
        assert!(map.set(Msr::EFER, MsrAccess::WRITE));
        assert_eq!(map.as_bytes()[0x820], 2);
        let mut map = IoPermissionMap::intercept_none();
        map.set(0x3F8, true);
        assert_eq!(map.as_bytes()[0x7F], 1);
    }

    #[test]
    fn an_msr_outside_the_ranges_always_exits() {
        let mut map = MsrPermissionMap::intercept_none();
        assert!(!map.set(Msr(0x4000_0000), MsrAccess::empty()));
        assert_eq!(map.get(Msr(0x4000_0000)), MsrAccess::all());
        assert!(map.intercepts(Msr(0x2000), MsrAccess::READ));
        assert!(!map.intercepts(Msr(0x1FFF), MsrAccess::all()));
    }

    #[test]
    fn an_access_beyond_the_last_port_uses_the_third_page() {
        let mut map = IoPermissionMap::intercept_none();
        map.set_overflow(true);
        assert_eq!(map.as_bytes()[8192], 7);
        assert!(!map.intercepts(0xFFFF, 1) && map.intercepts(0xFFFF, 2));
        assert!(!map.intercepts(0xFFFC, 4) && map.intercepts(0xFFFD, 4));
        map.set_overflow(false);
        assert!(!map.intercepts(0xFFFF, 4));
    }

    proptest! {
        #[test]
        fn each_msr_has_its_own_bits(
            a in 0u32..0x6000, b in 0u32..0x6000, access in 0u8..4, other in 0u8..4,
        ) {
            let msr = |n: u32| {
                Msr(MsrPermissionMap::RANGES[(n / 0x2000) as usize].0 + n % 0x2000)
            };
            let access = MsrAccess::from_bits_truncate(access);
            let other = MsrAccess::from_bits_truncate(other);
            let mut map = MsrPermissionMap::intercept_all();
            prop_assert!(map.set(msr(a), other));
            prop_assert!(map.set(msr(b), access));
            prop_assert_eq!(map.get(msr(b)), access);
            prop_assert_eq!(map.get(msr(a)), if a == b { access } else { other });
        }

        #[test]
        fn an_access_exits_if_any_of_its_ports_does(
            ports in proptest::collection::vec(any::<u16>(), 0..40),
            near in any::<u16>(), size in prop_oneof![Just(1u8), Just(2), Just(4)],
        ) {
            let mut map = IoPermissionMap::intercept_none();
            for &port in &ports {
                map.set(port, true);
            }
            map.set(near, true);
            for start in near.saturating_sub(5)..=near.saturating_add(2) {
                let last = u32::from(start) + u32::from(size) - 1;
                let expected = (u32::from(start)..=last)
                    .any(|p| u16::try_from(p).is_ok_and(|p| map.get(p)));
                prop_assert_eq!(map.intercepts(start, size), expected);
            }
        }

        #[test]
        fn merging_keeps_both_sides(
            ours in proptest::collection::vec((0u32..0x2000, 0u8..4), 0..50),
            theirs in proptest::collection::vec((0u32..0x2000, 0u8..4), 0..50),
        ) {
            let build = |list: &[(u32, u8)]| {
                let mut map = MsrPermissionMap::intercept_none();
                for &(msr, access) in list {
                    map.set(Msr(msr), MsrAccess::from_bits_truncate(access));
                }
                map
            };
            let (a, b) = (build(&ours), build(&theirs));
            let mut merged = a.clone();
            merged.merge(&b);
            prop_assert!(merged.covers(&a) && merged.covers(&b));
            for msr in (0..0x2000).map(Msr) {
                prop_assert_eq!(merged.get(msr), a.get(msr) | b.get(msr));
            }
            prop_assert_eq!(a.covers(&b), merged == a);
        }
    }
}
