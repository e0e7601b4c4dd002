//! L1's permission maps: what L2 may do without an exit to L1, looked up at the time of the access.

use testudo_arch::{Gpa, GuestMemory, Msr};
use testudo_svm::permission::MsrPermissionMap;

/// Whether L1's MSR permission map wants this access to exit. MSRs outside the map always do.
#[inline]
pub(super) fn msr_is_intercepted(
    memory: &impl GuestMemory,
    l1: Gpa,
    msr: Msr,
    write: bool,
) -> bool {
    let Some((byte, shift)) = MsrPermissionMap::byte(msr) else {
        return true;
    };
    let mut bits = [u8::MAX];
    // What is not memory reads as ones.
    if memory
        .read(l1.wrapping_add(u64::from(byte)), &mut bits)
        .is_err()
    {
        return true;
    }
    bits[0] >> (shift + u8::from(write)) & 1 != 0
}

/// Whether L1's I/O permission map wants an access of `size` bytes at `port` to exit.
#[inline]
pub(super) fn port_is_intercepted(memory: &impl GuestMemory, l1: Gpa, port: u16, size: u8) -> bool {
    let mut bits = [u8::MAX; 2];
    if memory
        .read(l1.wrapping_add(u64::from(port / 8)), &mut bits)
        .is_err()
    {
        return true;
    }
    // Up to four bits, which begin in the first byte and may end in the second.
    let wanted = (1u16 << (size & 7)) - 1;
    u16::from_le_bytes(bits) >> (port % 8) & wanted != 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::open_words::OpenWords;
    use crate::svm::tests::Memory;
    use proptest::prelude::*;
    use testudo_svm::permission::{IoPermissionMap, MsrAccess};
    use zerocopy::IntoBytes;

    const L1_MAP: Gpa = Gpa(0x3000);

    fn msr_map(open: &[(u32, u8)], base: MsrPermissionMap) -> MsrPermissionMap {
        let mut map = base;
        for &(n, access) in open {
            let range = MsrPermissionMap::RANGES[(n / 0x2000) as usize % 3];
            map.set(
                Msr(range.0 + n % 0x2000),
                MsrAccess::from_bits_truncate(access),
            );
        }
        map
    }

    proptest! {
        #[test]
        fn the_join_is_exactly_both_maps(
            l0_open in prop::collection::vec((0u32..0x6000, 0u8..4), 0..8),
            l1_closed in prop::collection::vec((0u32..0x6000, 0u8..4), 0..20),
            again in prop::collection::vec((0u32..0x6000, 0u8..4), 0..20),
        ) {
            let l0 = msr_map(&l0_open, MsrPermissionMap::intercept_all());
            let open = OpenWords::of(l0.as_bytes());
            let memory = Memory::new();
            let mut merged = l0.clone();
            for closed in [&l1_closed, &again] {
                let l1 = msr_map(closed, MsrPermissionMap::intercept_none());
                memory.write(L1_MAP, l1.as_bytes()).unwrap();
                let before = merged.clone();
                let changed = open.merge(merged.as_mut_bytes(), &memory, L1_MAP);
                prop_assert_eq!(changed, before != merged);
                let mut expected = l0.clone();
                expected.merge(&l1);
                prop_assert_eq!(&merged, &expected);
                prop_assert!(merged.covers(&l0) && merged.covers(&l1));
            }
        }

        #[test]
        fn lookups_agree_with_the_map(
            closed in prop::collection::vec((0u32..0x6000, 0u8..4), 0..40), msr: u32, write: bool,
            ports in prop::collection::vec(any::<u16>(), 0..40), port: u16,
            size in prop_oneof![Just(1u8), Just(2), Just(4)],
        ) {
            let l1 = msr_map(&closed, MsrPermissionMap::intercept_none());
            let memory = Memory::new();
            memory.write(L1_MAP, l1.as_bytes()).unwrap();
            let access = if write { MsrAccess::WRITE } else { MsrAccess::READ };
            for msr in [msr, msr & 0x1FFF, 0xC000_0000 | msr & 0x1FFF].map(Msr) {
                let found = msr_is_intercepted(&memory, L1_MAP, msr, write);
                prop_assert_eq!(found, l1.intercepts(msr, access));
            }
            let mut io = IoPermissionMap::intercept_none();
            ports.iter().for_each(|p| io.set(*p, true));
            io.set_overflow(write);
            memory.write(L1_MAP, io.as_bytes()).unwrap();
            for port in ports.into_iter().chain([port, 0xFFFF]) {
                let found = port_is_intercepted(&memory, L1_MAP, port, size);
                prop_assert_eq!(found, io.intercepts(port, size));
            }
        }
    }

    #[test]
    fn a_map_that_is_not_memory_intercepts_everything() {
        let memory = Memory::new();
        let nowhere = Gpa(0xFFFF_0000_0000);
        assert!(msr_is_intercepted(&memory, nowhere, Msr::FS_BASE, false));
        assert!(port_is_intercepted(&memory, nowhere, 0x80, 1));
        let mut l0 = MsrPermissionMap::intercept_none();
        let open = OpenWords::of(l0.as_bytes());
        assert!(open.merge(l0.as_mut_bytes(), &memory, nowhere));
        assert_eq!(l0, MsrPermissionMap::intercept_all());
    }
}
