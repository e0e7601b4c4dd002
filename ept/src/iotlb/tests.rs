//! A unit in memory takes commands apart on its own, by the manuals' tables, and keeps an IOTLB.
#![allow(
    unsafe_code,
    reason = "the promise that no device but the test is there"
)]

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::vec;
use std::vec::Vec;

use proptest::prelude::*;
use testudo_arch::{Gpa, PageSize};

use super::*;
use crate::format::vtd::VtdFlags;
use crate::{FramePool, PageTable};

const STATUS_ADDRESS: u64 = 0x1234_5678;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Manner {
    Prompt,
    /// Carries commands out at the `n`th look at the word for answers.
    Slow(u32),
    Silent,
    /// Stops at the next command.
    Faulty,
}

/// What both kinds of units have in common.
struct Fake {
    amd: bool,
    ring: Vec<Command>,
    head: u32,
    tail: u32,
    status: u64,
    stopped: bool,
    manner: Manner,
    looks: u32,
    cap: u64,
    /// Pages by domain and number, and references to tables by domain and the number of a 2 MiB block.
    pages: BTreeSet<(u16, u64)>,
    tables: BTreeSet<(u16, u64)>,
    seen: Vec<Command>,
}

#[derive(Clone)]
struct Unit(Rc<RefCell<Fake>>);

impl Unit {
    fn new(amd: bool) -> Self {
        // CAP: drains, page-selective invalidation up to order 18.
        let cap = 3 << 54 | 18 << 48 | 1 << 39;
        Self(Rc::new(RefCell::new(Fake {
            amd,
            ring: vec![[0; 2]; 256],
            head: 0,
            tail: 0,
            status: 7,
            stopped: false,
            manner: Manner::Prompt,
            looks: 0,
            cap,
            pages: BTreeSet::new(),
            tables: BTreeSet::new(),
            seen: Vec::new(),
        })))
    }

    fn vtd(&self) -> InvalidationQueue<Self, Self> {
        CommandQueue::new(self.clone(), self.clone(), 10)
    }

    fn amdvi(&self) -> CommandBuffer<Self, Self> {
        CommandQueue::new(self.clone(), self.clone(), 10)
    }

    fn set(&self, manner: Manner) {
        self.0.borrow_mut().manner = manner;
    }
}

impl Fake {
    fn drop_pages(&mut self, domain: Option<u16>, first: u64, last: u64, tables: bool) {
        let hit =
            |d: u16, page: u64| domain.is_none_or(|x| x == d) && (first..=last).contains(&page);
        self.pages.retain(|(d, page)| !hit(*d, *page));
        if tables {
            self.tables
                .retain(|(d, block)| !(hit(*d, block << 9) || hit(*d, (block << 9) | 511)));
        }
    }

    fn run(&mut self) {
        while self.head != self.tail {
            if self.manner == Manner::Faulty {
                self.stopped = true;
                return;
            }
            let [low, high] = self.ring[self.head as usize];
            self.head = (self.head + 1) % 256;
            self.seen.push([low, high]);
            match (self.amd, if self.amd { low >> 60 } else { low & 0xF }) {
                (false, 2) => {
                    assert_eq!(low & 0xFFFF_FFFF_0000_FF0F, 2, "reserved bits of {low:#x}");
                    assert_eq!(low & 0xC0, 0xC0, "drains");
                    let domain = (low >> 16) as u16;
                    match low >> 4 & 3 {
                        1 => self.drop_pages(None, 0, u64::MAX, true),
                        2 => self.drop_pages(Some(domain), 0, u64::MAX, true),
                        3 => {
                            assert_eq!(high & 0xF80, 0);
                            let order = high & 0x3F;
                            assert!(order <= 18);
                            let first = high >> 12;
                            assert_eq!(first & ((1 << order) - 1), 0, "alignment");
                            let last = first + (1 << order) - 1;
                            self.drop_pages(Some(domain), first, last, high >> 6 & 1 == 0);
                        }
                        granularity => panic!("granularity {granularity}"),
                    }
                }
                (false, 5) => {
                    assert_eq!(low & 0xFFFF_FFFF, 5 | 1 << 5);
                    assert_eq!(high, STATUS_ADDRESS);
                    self.status = self.status >> 32 << 32 | low >> 32;
                }
                (true, 3) => {
                    assert_eq!(low & 0x0FFF_0000_FFFF_FFFF, 0);
                    assert_eq!(high & 0xFFC, 0);
                    let domain = (low >> 32) as u16;
                    let page = high >> 12;
                    let span = match high & 1 {
                        0 => 1,
                        _ => 2u64.checked_shl(page.trailing_ones()).unwrap(),
                    };
                    let (first, last) = match page {
                        // The whole space, as the manual has it.
                        0x7_FFFF_FFFF_FFFF => (0, u64::MAX),
                        _ => (page & !(span - 1), page | (span - 1)),
                    };
                    self.drop_pages(Some(domain), first, last, high >> 1 & 1 != 0);
                }
                (true, 8) => self.drop_pages(None, 0, u64::MAX, true),
                (true, 1) => {
                    assert_eq!(low & !(0xF << 60), STATUS_ADDRESS | 1);
                    self.status = high;
                }
                (_, code) => panic!("command {code}"),
            }
        }
    }
}

impl Ring for Unit {
    fn write(&mut self, index: u32, command: Command) {
        self.0.borrow_mut().ring[index as usize] = command;
    }
    fn status_address(&self) -> Hpa {
        Hpa(STATUS_ADDRESS)
    }
    fn status(&self) -> u64 {
        let mut fake = self.0.borrow_mut();
        fake.looks += 1;
        if matches!(fake.manner, Manner::Slow(looks) if fake.looks >= looks) {
            fake.run();
        }
        fake.status
    }
}

impl Registers for Unit {
    fn read32(&self, offset: u32) -> u32 {
        let fake = self.0.borrow();
        match (fake.amd, offset) {
            (false, 0x34) => u32::from(fake.stopped) << 4,
            (true, 0x2020) => u32::from(!fake.stopped) << 4,
            _ => panic!("register {offset:#x}"),
        }
    }
    fn read64(&self, offset: u32) -> u64 {
        let fake = self.0.borrow();
        match (fake.amd, offset) {
            (false, 0x08) => fake.cap,
            (false, 0x90) => 0x9000,
            (true, 0x08) => 0x9000 | 8 << 56,
            (true, 0x30) => fake.cap,
            (false, 0x80) | (true, 0x2000) => u64::from(fake.head) << 4,
            (false, 0x88) | (true, 0x2008) => u64::from(fake.tail) << 4,
            _ => panic!("register {offset:#x}"),
        }
    }
    fn write64(&mut self, offset: u32, value: u64) {
        let mut fake = self.0.borrow_mut();
        assert_eq!(offset, if fake.amd { 0x2008 } else { 0x88 });
        assert_eq!(value & 0xF, 0);
        fake.tail = (value >> 4) as u32;
        fake.looks = 0;
        if matches!(fake.manner, Manner::Prompt | Manner::Faulty) {
            fake.run();
        }
    }
}

fn invalidation(first: u64, pages: u64, leaves_only: bool) -> Invalidation {
    Invalidation {
        root: Hpa(0x1000),
        first,
        last: first + (pages * 4096 - 1),
        leaves_only,
    }
}

/// A table of VT-d's, a page of it in the IOTLB, and what becomes of them.
#[test]
fn a_page_leaves_only_when_the_unit_has_forgotten_it() {
    let unit = Unit::new(false);
    let mut queue = unit.vtd();
    let pool = FramePool::new(8);
    let table = PageTable::new(crate::format::vtd::Vtd::new(3, 46), &pool).unwrap();
    let flags = VtdFlags::READ | VtdFlags::WRITE;
    table
        .map_page(Gpa(0x5000), PageSize::Size4K, Hpa(0x7000), flags)
        .unwrap();
    unit.0.borrow_mut().pages.extend([(9, 5), (8, 5), (9, 6)]);
    // SAFETY: the only device is the test.
    let mut domain = unsafe { queue.domain(9) };

    unit.set(Manner::Silent);
    let unmapped = table.unmap_page(Gpa(0x5000));
    let (token, error) = unmapped.try_discharge(&mut domain).unwrap_err();
    assert_eq!(error, IotlbError::TimedOut);
    assert!(unit.0.borrow().pages.contains(&(9, 5)));

    unit.set(Manner::Slow(4));
    let leaf = token.try_discharge(&mut domain).unwrap().unwrap();
    assert_eq!(leaf.frame, Hpa(0x7000));
    let left: Vec<_> = unit.0.borrow().pages.iter().copied().collect();
    assert_eq!(left, [(8, 5), (9, 6)]);
}

#[test]
fn a_ring_without_room_and_a_unit_that_stops_are_errors() {
    for amd in [false, true] {
        let unit = Unit::new(amd);
        let (mut vtd, mut amdvi);
        let forget: &mut dyn FnMut() -> Result<(), IotlbError> = if amd {
            amdvi = unit.amdvi();
            &mut || amdvi.forget(Scope::Domain(1))
        } else {
            vtd = unit.vtd();
            &mut || vtd.forget(Scope::Domain(1))
        };
        // Twice around the ring.
        for _ in 0..300 {
            forget().unwrap();
        }
        unit.set(Manner::Silent);
        let answers: Vec<_> = (0..130).map(|_| forget()).collect();
        assert!(
            answers[..127]
                .iter()
                .all(|a| *a == Err(IotlbError::TimedOut))
        );
        assert!(answers[127..].iter().all(|a| *a == Err(IotlbError::Full)));
        unit.0.borrow_mut().run();
        unit.set(Manner::Prompt);
        forget().unwrap();
        unit.set(Manner::Faulty);
        let status = if amd { 0 } else { 0x10 };
        assert_eq!(forget(), Err(IotlbError::Stopped(status)));
        assert_eq!(forget(), Err(IotlbError::Stopped(status)), "it stays so");
    }
}

#[test]
fn what_a_unit_cannot_do_is_done_more_coarsely_or_refused() {
    let unit = Unit::new(false);
    let wide = Scope::of(3, &invalidation(0x3FFF_F000, 2, true));
    unit.vtd().forget(wide).unwrap();
    // Order 19 is more than MAMV: the domain.
    assert_eq!(unit.0.borrow().seen[0], [2 | 2 << 4 | 0xC0 | 3 << 16, 0]);
    unit.0.borrow_mut().cap &= !(1 << 39);
    let page = Scope::of(3, &invalidation(0x1000, 1, true));
    unit.vtd().forget(page).unwrap();
    assert_eq!(unit.0.borrow().seen[2][0] >> 4 & 3, 2);

    let unit = Unit::new(true);
    assert_eq!(
        unit.amdvi().forget(Scope::Global),
        Err(IotlbError::Unsupported)
    );
    unit.0.borrow_mut().cap |= 1 << 6;
    unit.amdvi().forget(Scope::Global).unwrap();
    assert_eq!(unit.0.borrow().seen[0], [8 << 60, 0]);
}

proptest! {
    #[test]
    fn all_of_the_range_is_forgotten_and_no_other_domain(
        amd: bool,
        first in 0u64..1 << 27,
        pages in 1u64..1 << 12,
        leaves_only: bool,
        cached in prop::collection::vec((0u16..3, 0u64..1 << 13), 64),
    ) {
        let unit = Unit::new(amd);
        let what = invalidation(first << 12, pages, leaves_only);
        let base = first.saturating_sub(1 << 12);
        let all: BTreeSet<_> = cached.iter().map(|(domain, page)| (*domain, base + page)).collect();
        unit.0.borrow_mut().pages = all.clone();
        let blocks: BTreeSet<_> = all.iter().map(|(domain, page)| (*domain, page >> 9)).collect();
        unit.0.borrow_mut().tables = blocks.clone();
        let (mut vtd, mut amdvi);
        // SAFETY: the only device is the test.
        let result = unsafe {
            if amd {
                amdvi = unit.amdvi();
                amdvi.domain(1).invalidate(&what)
            } else {
                vtd = unit.vtd();
                vtd.domain(1).invalidate(&what)
            }
        };
        result.unwrap();
        let fake = unit.0.borrow();
        let inside = |page: u64| (first..first + pages).contains(&page);
        for (domain, page) in &all {
            let kept = fake.pages.contains(&(*domain, *page));
            prop_assert!(!(*domain == 1 && inside(*page) && kept), "page {page:#x}");
            prop_assert!(*domain == 1 || kept);
        }
        for (domain, block) in &blocks {
            let kept = fake.tables.contains(&(*domain, *block));
            let inside = inside(block << 9) || inside((block << 9) | 511);
            prop_assert!(!(*domain == 1 && inside && kept && !leaves_only), "block {block:#x}");
            prop_assert!(*domain == 1 || kept);
        }
    }
}
