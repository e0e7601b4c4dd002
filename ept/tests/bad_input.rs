//! Whatever a table is asked for: a typed error and a table as before, or what was asked for.
#![allow(unsafe_code)]

use std::convert::Infallible;
use std::sync::atomic::AtomicU64;

use proptest::prelude::*;
use testudo_arch::{Hpa, PageSize};
use testudo_ept::format::amdvi::{AmdVi, AmdViFlags};
use testudo_ept::format::ept::{Ept, EptFlags};
use testudo_ept::format::long_mode::{LongMode, LongModeFlags};
use testudo_ept::format::npt::{Npt, NptFlags};
use testudo_ept::format::vtd::{Vtd, VtdFlags};
use testudo_ept::format::{Format, Input};
use testudo_ept::{
    EditError, FramePool, Invalidate, Invalidation, Leaf, MapError, PageBitmap, PageTable, Rights,
};

const PAGE: u64 = 4096;
const FRAMES: usize = 20;

struct NoHardware;

// SAFETY: no hardware and no other thread uses the tables of these tests.
unsafe impl Invalidate for NoHardware {
    type Error = Infallible;
    fn invalidate(&mut self, _: &Invalidation) -> Result<(), Infallible> {
        Ok(())
    }
}

type Table<'a, F> = PageTable<F, &'a FramePool>;

/// What a table maps, by large stretches, and the frames that it takes.
type Contents<F> = (
    Vec<(<F as Format>::Input, Leaf<<F as Format>::Flags>)>,
    usize,
);

fn contents<F: Format>(table: &Table<'_, F>) -> Contents<F> {
    // The two halves of a host's addresses are two ranges.
    let half = 1u64 << (table.format().input_bits() - 1);
    let halves = [0, half].map(|offset| table.format().address(offset));
    let leaves = halves
        .into_iter()
        .flat_map(|start| table.leaves(start, half).unwrap());
    (leaves.collect(), table.table_frames())
}

/// How each operation on the range answers, without its result.
fn edit_all<F: Format>(
    table: &Table<'_, F>,
    start: u64,
    len: u64,
) -> Vec<(&'static str, Result<(), EditError>)> {
    let at = F::Input::from_u64(start);
    let words = [const { AtomicU64::new(0) }; 4];
    let log = PageBitmap::new(0, &words);
    let writable = table.format().floor(Rights::all());
    let flags = table.format().flags(writable).unwrap();
    let hardware = &mut NoHardware;
    let map = |result: Result<(), MapError>| match result {
        Err(MapError::Edit(error)) => Err(error),
        other => {
            other.unwrap();
            Ok(())
        }
    };
    vec![
        ("map", map(table.map(at, len, Hpa(0), flags))),
        (
            "map up to",
            map(table.map_up_to(at, len, Hpa(0), flags, PageSize::Size4K)),
        ),
        (
            "protect",
            table
                .protect(at, len, writable)
                .map(|f| f.discharge(hardware)),
        ),
        (
            "update",
            table
                .update(at, len, |flags| flags)
                .map(|f| f.discharge(hardware)),
        ),
        (
            "split",
            table
                .split(at, len, PageSize::Size4K)
                .map(|f| f.discharge(hardware)),
        ),
        (
            "merge",
            table
                .merge(at, len, PageSize::Size1G)
                .map(|f| _ = f.discharge(hardware)),
        ),
        (
            "track",
            table
                .track_writes(at, len)
                .map(|f| _ = f.discharge(hardware)),
        ),
        (
            "untrack",
            table
                .untrack_writes(at, len)
                .map(|f| _ = f.discharge(hardware)),
        ),
        (
            "harvest tracked",
            table
                .harvest_tracked(at, len, &log)
                .map(|f| _ = f.discharge(hardware)),
        ),
        ("leaves", table.leaves(at, len).map(|_| ())),
        ("unmap", table.unmap(at, len).map(|f| f.discharge(hardware))),
        (
            "unmap into",
            table
                .unmap_into(at, len, Vec::new())
                .map(|f| _ = f.discharge(hardware)),
        ),
    ]
}

/// Every operation refuses every bad range. `outside`: addresses that the table has no place for.
fn refuses<F: Format>(format: F, outside: &[u64]) {
    let pool = FramePool::new(FRAMES);
    let table = PageTable::new(format.clone(), &pool).unwrap();
    let flags = format.flags(format.floor(Rights::all())).unwrap();
    let at = F::Input::from_u64;
    table
        .map(at(0x20_0000), 0x20_3000, Hpa(0x40_0000), flags)
        .unwrap();
    let before = contents(&table);

    let misaligned = [
        (0x1001, PAGE),
        (0x1000, 0x800),
        (0x1000, 0),
        (0x20_0800, PAGE),
    ];
    for (start, len) in misaligned {
        for (name, result) in edit_all(&table, start, len) {
            let refused = matches!(result, Err(EditError::Misaligned(_)));
            assert!(refused, "{name} {start:#x} {len:#x}: {result:?}");
        }
    }
    let end = 1u64 << format.input_bits().min(63);
    let mut ranges: Vec<(u64, u64)> = outside.iter().map(|&start| (start, PAGE)).collect();
    // Over the end, past all numbers, and longer than all addresses.
    ranges.extend(outside.first().map(|&first| (first - PAGE, 2 * PAGE)));
    ranges.extend([(!0xFFF, 2 * PAGE), (PAGE, !0xFFF), (0, end | PAGE)]);
    for (start, len) in ranges {
        for (name, result) in edit_all(&table, start, len) {
            let refused = matches!(result, Err(EditError::OutOfRange(_)));
            assert!(refused, "{name} {start:#x} {len:#x}: {result:?}");
        }
    }
    for &address in outside {
        assert!(table.translate(at(address)).is_none());
        assert!(!table.allow_tracked_write(at(address)));
        let unmapped = table.unmap_page(at(address)).discharge(&mut NoHardware);
        assert_eq!(unmapped, None);
        let changed = table.change_page(at(address), |leaf| leaf);
        assert_eq!(changed.discharge(&mut NoHardware), None);
        let mapped = table.map_page(at(address), PageSize::Size4K, Hpa(0), flags);
        assert_eq!(mapped, Err(EditError::OutOfRange(address).into()));
    }

    // Output addresses.
    let wide = format.address_mask() + PAGE;
    for (frame, len) in [(wide, PAGE), (wide - PAGE, 2 * PAGE), (!0xFFF, 2 * PAGE)] {
        let mapped = table.map(at(0x80_0000), len, Hpa(frame), flags);
        assert!(
            matches!(mapped, Err(MapError::TooWide(_))),
            "{frame:#x}: {mapped:?}"
        );
    }
    let mapped = table.map(at(0x80_0000), PAGE, Hpa(0x1800), flags);
    assert_eq!(mapped, Err(EditError::Misaligned(0x1800).into()));

    // Large pages.
    let large = PageSize::Size2M;
    let mapped = table.map_page(at(0x80_1000), large, Hpa(0), flags);
    assert!(matches!(
        mapped,
        Err(MapError::Edit(EditError::Misaligned(_)))
    ));
    let mapped = table.map_page(at(0x80_0000), large, Hpa(0x1000), flags);
    assert!(matches!(
        mapped,
        Err(MapError::Edit(EditError::Misaligned(_)))
    ));
    if format.largest_level(flags) < 3 {
        let mapped = table.map_page(at(1 << 30), PageSize::Size1G, Hpa(0), flags);
        assert_eq!(mapped, Err(MapError::TooLarge(PageSize::Size1G)));
    }

    // What is mapped already: the first page, the last, one in the middle of a large one.
    for (start, len) in [
        (0x1F_F000, 2 * PAGE),
        (0x40_2000, 2 * PAGE),
        (0x30_0000, PAGE),
    ] {
        let mapped = table.map(at(start), len, Hpa(0), flags);
        assert!(
            matches!(mapped, Err(MapError::Occupied(_))),
            "{start:#x}: {mapped:?}"
        );
    }
    assert_eq!(contents(&table), before);
    assert_eq!(pool.free_frames() + before.1, FRAMES);
}

#[test]
fn bad_ranges_are_refused_by_every_operation_of_every_format() {
    refuses(Ept::new(46), &[1 << 48, 1 << 63]);
    refuses(Ept::new(52).with_five_levels(), &[1 << 57]);
    refuses(Npt::new(48), &[1 << 48, !0xFFF]);
    refuses(
        Npt::new(48).with_five_levels().with_c_bit(47, true),
        &[1 << 57],
    );
    // Not canonical: the hole between the halves.
    refuses(
        LongMode::new(46),
        &[1 << 47, (1 << 48) - PAGE, 1 << 48, 0xFFFF_7FFF_FFFF_F000],
    );
    refuses(
        LongMode::new(46).with_five_levels(),
        &[1 << 56, 0xFEFF_FFFF_FFFF_F000],
    );
    refuses(Vtd::new(3, 39), &[1 << 39]);
    refuses(
        Vtd::new(5, 46).with_largest_page(PageSize::Size2M),
        &[1 << 57],
    );
    refuses(AmdVi::new(3, 48), &[1 << 39]);
    refuses(AmdVi::new(6, 48).with_sized_pages(), &[1 << 63]);
}

#[test]
fn flags_that_hardware_reserves_are_refused() {
    fn refuses<F: Format>(format: F, flags: F::Flags) {
        let pool = FramePool::new(8);
        let table = PageTable::new(format.clone(), &pool).unwrap();
        let at = F::Input::from_u64;
        let refused = |result| matches!(result, Err(MapError::Edit(EditError::Flags(_))));
        assert!(refused(table.map(at(0), PAGE, Hpa(0), flags)));
        assert!(refused(table.map_page(
            at(0),
            PageSize::Size4K,
            Hpa(0),
            flags
        )));
        let good = format.flags(format.floor(Rights::all())).unwrap();
        table.map(at(0), PAGE, Hpa(0), good).unwrap();
        let updated = table.update(at(0), PAGE, |_| flags).map(|_| ());
        assert!(matches!(updated, Err(EditError::Flags(_))));
        let changed = table.change_page(at(0), |leaf| Leaf { flags, ..leaf });
        assert_eq!(changed.discharge(&mut NoHardware), None);
        let unsayable = table.protect(at(0), PAGE, Rights::empty()).map(|_| ());
        assert!(matches!(unsayable, Err(EditError::Flags(_))));
        assert_eq!(table.translate(at(0)).unwrap().leaf.flags, good);
    }
    // Writable and not readable; a reserved memory type; what is not an EPT entry at all.
    refuses(Ept::new(46), EptFlags::WRITE | EptFlags::WRITE_BACK);
    refuses(
        Ept::new(46),
        EptFlags::READ | EptFlags::from_bits_retain(7 << 3),
    );
    refuses(Ept::new(46), EptFlags::empty());
    refuses(Npt::new(48), NptFlags::from_bits_retain(1 << 47));
    refuses(LongMode::new(46), LongModeFlags::from_bits_retain(1 << 46));
    refuses(Vtd::new(4, 46), VtdFlags::READ | VtdFlags::SNOOP);
    refuses(
        AmdVi::new(4, 48),
        AmdViFlags::READ | AmdViFlags::from_bits_retain(1 << 52),
    );
}

/// Numbers near what matters: zero, the ends of ranges, powers of two, and anything.
fn number() -> impl Strategy<Value = u64> {
    prop_oneof![
        (0..64u32, 0..5u64).prop_map(|(bit, more)| (1u64 << bit).wrapping_add(more << 12)),
        (0..64u32, 0..5u64).prop_map(|(bit, less)| (1u64 << bit).wrapping_sub(less << 12)),
        (0..1024u64).prop_map(|page| page << 12),
        any::<u64>(),
    ]
}

#[derive(Clone, Copy, Debug)]
struct Ask {
    what: u8,
    start: u64,
    len: u64,
    frame: u64,
    flags: u64,
}

fn ask() -> impl Strategy<Value = Ask> {
    let aligned = |strategy| {
        (strategy, prop::bool::weighted(0.9))
            .prop_map(|(n, aligned): (u64, bool)| if aligned { n & !0xFFF } else { n })
            .boxed()
    };
    let flags = prop_oneof![Just(0x77u64), Just(0x63), Just(3 << 61), any::<u64>()];
    (
        0..10u8,
        aligned(number().boxed()),
        aligned(number().boxed()),
        aligned(number().boxed()),
        flags,
    )
        .prop_map(|(what, start, len, frame, flags)| Ask {
            what,
            start,
            len,
            frame,
            flags,
        })
}

fn any_numbers<F: Format>(format: F, flags: impl Fn(u64) -> F::Flags, asks: &[Ask]) {
    let pool = FramePool::new(FRAMES);
    let table = PageTable::new(format.clone(), &pool).unwrap();
    let words = [const { AtomicU64::new(0) }; 4];
    let log = PageBitmap::new(0, &words);
    for ask in asks {
        let Ask {
            what,
            start,
            len,
            frame,
            ..
        } = *ask;
        let before = contents(&table);
        let (at, flags) = (F::Input::from_u64(start), flags(ask.flags));
        let size = PageSize::ALL[(ask.flags % 3) as usize];
        let rights = format.floor(Rights::from_bits_truncate(ask.flags as u8));
        let hardware = &mut NoHardware;
        let done = match what {
            0 => table.map(at, len, Hpa(frame), flags).is_ok(),
            1 => table.map_page(at, size, Hpa(frame), flags).is_ok(),
            2 => table.unmap(at, len).map(|f| f.discharge(hardware)).is_ok(),
            3 => table
                .protect(at, len, rights)
                .map(|f| f.discharge(hardware))
                .is_ok(),
            4 => table
                .update(at, len, |_| flags)
                .map(|f| f.discharge(hardware))
                .is_ok(),
            5 => table
                .split(at, len, size)
                .map(|f| f.discharge(hardware))
                .is_ok(),
            6 => table
                .merge(at, len, size)
                .map(|f| f.discharge(hardware))
                .is_ok(),
            7 => table
                .track_writes(at, len)
                .map(|f| f.discharge(hardware))
                .is_ok(),
            8 => table
                .harvest_tracked(at, len, &log)
                .map(|f| f.discharge(hardware))
                .is_ok(),
            _ => {
                let changed = table.change_page(at, |leaf| Leaf {
                    frame: Hpa(frame),
                    flags,
                    ..leaf
                });
                changed.discharge(hardware).is_some()
            }
        };
        let after = contents(&table);
        assert!(done || after == before, "{ask:x?}");
        assert_eq!(pool.free_frames() + after.1, FRAMES, "{ask:x?}");
    }
    let destroyed = table.destroy(&mut NoHardware);
    assert!(destroyed.is_ok());
    assert_eq!(pool.free_frames(), FRAMES);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_numbers_get_an_answer(asks in prop::collection::vec(ask(), 1..16)) {
        any_numbers(Ept::new(46).with_accessed_dirty(), EptFlags::from_bits_retain, &asks);
        any_numbers(Npt::new(48).with_five_levels(), NptFlags::from_bits_retain, &asks);
        any_numbers(LongMode::new(46), LongModeFlags::from_bits_retain, &asks);
        any_numbers(Vtd::new(3, 39), VtdFlags::from_bits_retain, &asks);
        any_numbers(AmdVi::new(6, 52).with_sized_pages(), AmdViFlags::from_bits_retain, &asks);
    }

    /// The log takes any range as it takes any address.
    #[test]
    fn any_range_is_marked_as_far_as_the_log_goes(first in number(), address in number(), pages in number()) {
        let words = [const { AtomicU64::new(0) }; 2];
        let log = PageBitmap::new(first, &words);
        log.mark_range(address, pages);
        log.mark(address);
        let (low, start) = (first >> 12, address >> 12);
        for page in log.drain().map(|address| address >> 12) {
            let inside = page >= start && page - start < pages.max(1);
            prop_assert!(inside && page - low < 128);
        }
    }
}
