use super::*;
use std::vec;

#[test]
fn parts_of_a_page_are_copied_in_place() {
    let (mut first, mut second) = (vec![0u64; 512], vec![0u64; 512]);
    let ram = two_regions(&mut first, &mut second);
    let data: [u8; PAGE] = core::array::from_fn(|i| i as u8 | 1);
    // The page at 0x1800 lies half in each range, the one at 0x1000 in the first.
    for page in [Gpa(0x1000), Gpa(0x1800)] {
        ram.write_parts(page, &data, &[8..24, 0x900..0x910])
            .unwrap();
        let mut back = [0; PAGE];
        ram.read_parts(page, &mut back, &[8..16, 0x908..0x910])
            .unwrap();
        assert_eq!(back[8..16], data[8..16]);
        assert_eq!(back[0x908..0x910], data[0x908..0x910]);
        assert!(back[16..0x908].iter().all(|b| *b == 0));
        let mut whole = [0; PAGE];
        ram.read(page, &mut whole).unwrap();
        assert_eq!(whole[16..24], data[16..24]);
        assert_eq!(whole[0x910], 0);
    }
    let mut back = [0; PAGE];
    assert!(
        ram.read_parts(Gpa(0x9000), &mut back, core::slice::from_ref(&(0..8)))
            .is_err()
    );
    assert!(
        ram.write_parts(Gpa(0x9000), &data, core::slice::from_ref(&(0..8)))
            .is_err()
    );
}

fn two_regions(first: &mut [u64], second: &mut [u64]) -> GuestRam {
    let mut ram = GuestRam::new();
    // SAFETY: the tests keep both slices alive and use them through `ram` only.
    unsafe {
        ram.add(
            Gpa(0x1000),
            first.as_mut_ptr().cast(),
            first.len() as u64 * 8,
            true,
        )
        .unwrap();
        let gpa = Gpa(0x1000 + first.len() as u64 * 8);
        ram.add(
            gpa,
            second.as_mut_ptr().cast(),
            second.len() as u64 * 8,
            true,
        )
        .unwrap();
    }
    ram
}

#[test]
fn copies_cross_from_one_region_to_the_next() {
    let (mut a, mut b) = (vec![0; 4], vec![0; 4]);
    let ram = two_regions(&mut a, &mut b);
    let data: [u8; 64] = core::array::from_fn(|i| i as u8);
    ram.write(Gpa(0x1000), &data).unwrap();
    let mut back = [0; 40];
    ram.read(Gpa(0x1010), &mut back).unwrap();
    assert_eq!(back, data[16..56]);
}

#[test]
fn words_lie_in_one_range_that_may_be_written() {
    let (mut a, mut b) = (vec![1; 4], vec![2; 4]);
    let mut ram = two_regions(&mut a, &mut b);
    let mut fixed = vec![3u64; 4];
    // SAFETY: `fixed` outlives `ram`.
    unsafe { ram.add(Gpa(0x8000), fixed.as_mut_ptr().cast(), 32, false) }.unwrap();
    for (gpa, count, value) in [(0x1000, 4, 1), (0x1018, 1, 1), (0x1020, 4, 2)] {
        let words = ram.words(Gpa(gpa), count).unwrap();
        assert_eq!(words.len(), count);
        assert!(words.iter().all(|w| w.load(Ordering::Acquire) == value));
    }
    ram.words(Gpa(0x1020), 2).unwrap()[1].store(7, Ordering::Release);
    assert_eq!(ram.load_u64(Gpa(0x1028)), Ok(7));
    // Across two ranges, past the last, before the first, misaligned, too many, read-only.
    for (gpa, count) in [
        (0x1018, 2),
        (0x1020, 5),
        (0xFF8, 1),
        (0x1004, 1),
        (0x1000, usize::MAX / 8 + 2),
        (0x8000, 1),
    ] {
        assert!(ram.words(Gpa(gpa), count).is_none(), "{gpa:#x}");
    }
    let reference = &ram;
    let through = <&GuestRam as GuestMemory>::words(&reference, Gpa(0x1000), 4);
    assert!(through.is_some());
}

#[test]
fn a_partial_access_changes_nothing() {
    let (mut a, mut b) = (vec![0; 4], vec![0; 4]);
    let ram = two_regions(&mut a, &mut b);
    let fault = ram.write(Gpa(0x1030), &[0xFF; 17]).unwrap_err();
    assert_eq!(fault.kind, FaultKind::NotMemory);
    assert_eq!(ram.load_u64(Gpa(0x1030)), Ok(0));
    assert_eq!(
        ram.read(Gpa(u64::MAX), &mut [0; 2]).unwrap_err().kind,
        FaultKind::NotMemory
    );
    assert!(ram.contains(Gpa(0x1000), 64) && !ram.contains(Gpa(0x1000), 65));
}

#[test]
fn atomics_want_alignment() {
    let (mut a, mut b) = (vec![0; 4], vec![0; 4]);
    let ram = two_regions(&mut a, &mut b);
    assert_eq!(
        ram.load_u32(Gpa(0x1002)).unwrap_err().kind,
        FaultKind::Misaligned
    );
    assert_eq!(ram.compare_exchange_u32(Gpa(0x1004), 0, 5), Ok(Ok(0)));
    assert_eq!(ram.compare_exchange_u32(Gpa(0x1004), 0, 6), Ok(Err(5)));
    assert_eq!(ram.load_u64(Gpa(0x1000)), Ok(5 << 32));
}

#[test]
fn read_only_ranges_refuse_writes() {
    let mut bytes = vec![1u64; 2];
    let mut ram = GuestRam::new();
    // SAFETY: `bytes` outlives `ram`.
    unsafe { ram.add(Gpa(0), bytes.as_mut_ptr().cast(), 16, false) }.unwrap();
    assert_eq!(
        ram.store_u16(Gpa(0), 1).unwrap_err().kind,
        FaultKind::ReadOnly
    );
    assert_eq!(
        ram.write(Gpa(0), &[1]).unwrap_err().kind,
        FaultKind::ReadOnly
    );
    assert_eq!(ram.load_u16(Gpa(0)), Ok(1));
    // SAFETY: refused before anything is stored.
    let again = unsafe { ram.add(Gpa(8), bytes.as_mut_ptr().cast(), 16, false) };
    assert_eq!(again, Err(AddRegionError::Overlap(Gpa(8))));
}
