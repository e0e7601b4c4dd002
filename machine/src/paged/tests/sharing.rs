//! Shared pages: nobody reads what another wrote, whoever writes and whenever.

use core::sync::atomic::AtomicBool;
use std::collections::BTreeMap;
use std::thread;

use proptest::prelude::*;
use testudo_ept::sharing::{SharedFrames, SharingStats};

use super::*;
use crate::irq::Irqchip;
use crate::irq::fake::{FakeHost, machine};

/// Guests with one pool.
struct Guests {
    frames: &'static Frames,
    pool: SharedPool,
    guests: Vec<Bench>,
    hosts: Vec<(Arc<FakeHost>, Arc<Irqchip>)>,
}

impl Guests {
    fn new(blocks: usize, count: u16, len: u64) -> Self {
        let frames = Frames::new(blocks);
        let zero = frames.alloc().unwrap();
        let pages = usize::from(count) * (len / PAGE_SIZE) as usize;
        let shared = SharedFrames::new(zero, pages, [0x1234_5678, 0x9ABC_DEF1]);
        let pool = Arc::new(spin::Mutex::new(shared));
        let guest = |_| {
            let guest = Bench::on(frames, len, true, Some(pool.clone()));
            let (host, chip, _) = machine(2);
            guest.shootdown.connect(&chip);
            (guest, (host, chip))
        };
        let (guests, hosts) = (0..count).map(guest).unzip();
        Self {
            guests,
            hosts,
            frames,
            pool,
        }
    }

    fn stats(&self) -> SharingStats {
        self.pool.lock().stats()
    }

    /// Turns that look at all pages so many times, with all vCPUs looking up between them.
    fn rounds(&self, rounds: usize) {
        for _ in 0..rounds {
            for guest in &self.guests {
                guest.scan_all();
            }
        }
    }
}

impl Bench {
    fn scan_all(&self) {
        let pages = self.memory.pages.len();
        // What one turn froze, the next two merge and free.
        for _ in 0..pages.div_ceil(64) + 3 {
            self.memory.share(64);
            self.forget();
        }
    }

    fn frame(&self, gpa: Gpa) -> Hpa {
        self.table.translate(gpa).unwrap().address
    }

    fn is_writable(&self, gpa: Gpa) -> bool {
        let leaf = self.table.translate(gpa).unwrap().leaf;
        leaf.flags.contains(NptFlags::WRITABLE)
    }

    fn fill(&self, page: u64, word: u64) {
        let data = word.to_le_bytes().repeat(PAGE_SIZE as usize / 8);
        self.ram.write(at(page), &data).unwrap();
    }

    /// What is in the guest's page, if it is the same everywhere.
    fn word(&self, page: u64) -> u64 {
        let mut data = vec![0; PAGE_SIZE as usize];
        self.ram.read(at(page), &mut data).unwrap();
        let word = u64::from_le_bytes(data[..8].try_into().unwrap());
        assert!(data.chunks(8).all(|other| other == word.to_le_bytes()));
        word
    }
}

fn at(page: u64) -> Gpa {
    START.wrapping_add(page * PAGE_SIZE)
}

#[test]
fn equal_pages_of_two_guests_are_one_frame_until_one_is_written() {
    let all = Guests::new(6, 2, BLOCK);
    let [a, b] = [&all.guests[0], &all.guests[1]];
    for page in 0..200 {
        a.fill(page, 1000 + page);
        b.fill(page + 300, 1000 + page);
    }
    let before = all.frames.count();
    all.rounds(4);
    let stats = all.stats();
    assert_eq!((stats.zero, stats.sharing, stats.shared), (624, 1024, 201));
    // One table of small pages for each.
    assert_eq!(all.frames.count(), before + 624 + 200 - 2);
    assert_eq!(a.memory.resident(), 0);
    assert_eq!(a.frame(at(7)), b.frame(at(307)));
    assert!(!a.is_writable(at(7)) && !b.is_writable(at(307)));
    // A device writes: the other guest sees nothing of it, and neither do pages of zeros.
    a.ram.store_u32(at(7).wrapping_add(8), 5).unwrap();
    a.fill(250, 77);
    assert_eq!(a.ram.load_u64(at(7).wrapping_add(8)), Ok(5));
    assert_eq!((b.word(307), a.word(250), b.word(250)), (1007, 77, 0));
    assert!(a.is_writable(at(7)) && !b.is_writable(at(307)));
    assert_eq!(
        (a.memory.resident(), all.stats().broken),
        (2 * PAGE_SIZE, 2)
    );
    // So does the guest itself, whose access faults.
    assert_eq!(b.ram.bring_in(at(308), false), BroughtIn::Present);
    assert!(!b.is_writable(at(308)));
    assert_eq!(b.ram.bring_in(at(308), true), BroughtIn::Present);
    assert!(b.is_writable(at(308)) && a.frame(at(8)) != b.frame(at(308)));
    assert_eq!((a.word(8), b.word(308)), (1008, 1008));
}

#[test]
fn a_frame_is_not_free_before_all_vcpus_have_forgotten_it() {
    let all = Guests::new(4, 1, BLOCK);
    let guest = &all.guests[0];
    guest.memory.share(64);
    let before = all.frames.count();
    assert!(!guest.is_writable(at(3)), "frozen");
    let frame = guest.frame(at(3));
    guest.shootdown.acknowledge(0, guest.shootdown.last());
    guest.memory.share(0);
    assert_eq!(guest.frame(at(3)), frame, "one vCPU may still write to it");
    guest.forget();
    guest.memory.share(0);
    assert_ne!(guest.frame(at(3)), frame);
    guest.shootdown.acknowledge(1, guest.shootdown.last());
    guest.memory.share(0);
    assert_eq!(all.frames.count(), before, "one vCPU may still read it");
    guest.forget();
    guest.memory.share(0);
    assert_eq!(all.frames.count(), before + 64);
}

/// A guest hypervisor's tables are composed with the guest's own table, and of that composition a vCPU forgets only
/// the places that its gate names.
#[test]
fn what_was_made_of_the_table_elsewhere_is_true_still() {
    let all = Guests::new(6, 2, BLOCK);
    let [guest, other] = [&all.guests[0], &all.guests[1]];
    for page in 0..200 {
        guest.fill(page, 1000 + page % 50);
        other.fill(page, 1000 + page);
    }
    let gate = guest.shootdown.gate(0).unwrap();
    let mut composed = BTreeMap::new();
    let (mut kept, mut everywhere) = (0, 0);
    for turn in 0..60 {
        for page in 0..512 {
            if let Some(found) = guest.table.translate(at(page)) {
                let writable = found.leaf.flags.contains(NptFlags::WRITABLE);
                composed.insert(page, (found.address, writable));
            }
        }
        match turn % 5 {
            0 => guest.ram.store_u64(at(turn * 3), turn).unwrap(),
            1 => assert!(guest.memory.reclaim(at(turn), 2 * PAGE_SIZE) > 0),
            2 => other.scan_all(),
            _ => guest.memory.share(64),
        }
        match gate.take_changes().places() {
            Some(places) => composed.retain(|&page, _| {
                let gone =
                    |(start, len): &(Gpa, u64)| (start.0..start.0 + len).contains(&at(page).0);
                !places.iter().any(gone)
            }),
            None => {
                composed.clear();
                everywhere += 1;
            }
        }
        for (&page, &(frame, writable)) in &composed {
            assert_eq!(guest.frame(at(page)), frame, "page {page} in turn {turn}");
            assert!(
                !writable || guest.is_writable(at(page)),
                "page {page} in turn {turn}"
            );
        }
        kept += composed.len();
        guest.forget();
    }
    assert!(all.stats().merged > 200, "{:?}", all.stats());
    assert_eq!(everywhere, 0);
    assert!(kept > 60 * 300, "{kept}");
}

/// A device on another vCPU found the page before it lost the write right, and writes after that.
#[test]
fn a_write_that_began_before_is_not_lost() {
    let all = Guests::new(4, 1, BLOCK);
    let guest = &all.guests[0];
    let page = guest.memory.page(at(5), true).unwrap();
    guest.memory.share(64);
    assert!(!guest.is_writable(at(5)));
    guest.shootdown.acknowledge(0, guest.shootdown.last());
    guest.memory.share(0);
    // SAFETY: vCPU 1 has not said that it has no such address any more.
    unsafe { page.cast::<u64>().write(9) };
    guest.forget();
    guest.memory.share(0);
    assert_eq!(guest.ram.load_u64(at(5)), Ok(9));
    assert!(guest.is_writable(at(5)) && !guest.is_writable(at(6)));
    assert_eq!(all.stats().mistaken, 1);
}

#[test]
fn a_page_that_is_written_while_it_is_frozen_is_left_alone() {
    let all = Guests::new(4, 1, BLOCK);
    let guest = &all.guests[0];
    guest.memory.share(64);
    let frame = guest.frame(at(1));
    guest.ram.store_u64(at(1), 3).unwrap();
    assert_eq!(guest.ram.bring_in(at(2), true), BroughtIn::Present);
    assert_eq!(guest.frame(at(1)), frame, "no copy was needed");
    assert_eq!(guest.memory.reclaim(at(3), PAGE_SIZE), 1);
    assert_eq!(guest.memory.reclaim(at(4), PAGE_SIZE), 1);
    assert_eq!(
        guest.ram.load_u64(at(4)),
        Ok(0),
        "back before anybody forgot"
    );
    guest.scan_all();
    assert_eq!(guest.ram.load_u64(at(1)), Ok(3));
    assert!(!guest.is_mapped(at(3)) && guest.is_writable(at(1)));
    assert_eq!(
        all.stats().zero,
        512 - 2,
        "the others, when they are looked at again"
    );
}

/// The frame that others still read is not the last user's before they have forgotten it, be it in
/// another guest.
#[test]
fn the_last_user_does_not_write_under_a_reader() {
    let all = Guests::new(4, 2, BLOCK);
    let [a, b] = [&all.guests[0], &all.guests[1]];
    a.fill(1, 11);
    b.fill(1, 11);
    all.rounds(4);
    let shared = a.frame(at(1));
    assert_eq!(b.frame(at(1)), shared);
    // A device of `a` is reading when another vCPU of `a` writes.
    let reading = a.memory.page(at(1), false).unwrap();
    a.fill(1, 12);
    b.fill(1, 13);
    // SAFETY: no vCPU of `a` has forgotten the address.
    assert_eq!(unsafe { reading.cast::<u64>().read() }, 11);
    assert_ne!(b.frame(at(1)), shared);
    let before = all.frames.count();
    b.forget();
    b.memory.share(0);
    assert_eq!(all.frames.count(), before);
    a.forget();
    a.memory.share(0);
    assert_eq!(all.frames.count(), before + 1, "nobody's now");
    assert_eq!((a.word(1), b.word(1)), (12, 13));
}

#[test]
fn the_last_user_needs_no_frame_and_one_that_stays_alone_is_let_go() {
    let all = Guests::new(4, 2, BLOCK);
    let [a, b] = [&all.guests[0], &all.guests[1]];
    for guest in [a, b] {
        guest.fill(1, 11);
        guest.fill(2, 22);
    }
    all.rounds(4);
    let shared = [1, 2].map(|page| b.frame(at(page)));
    a.fill(1, 1);
    a.fill(2, 2);
    a.forget();
    a.memory.share(0);
    let before = all.frames.count();
    b.fill(1, 3);
    assert_eq!((b.frame(at(1)), all.frames.count()), (shared[0], before));
    assert!(!b.is_writable(at(2)));
    all.rounds(5);
    assert!(b.is_writable(at(2)));
    assert_eq!((b.frame(at(2)), b.word(2)), (shared[1], 22));
    assert_eq!(all.stats().shared, 1);
}

#[test]
fn a_shared_page_that_is_taken_away_is_no_user_once_it_is_forgotten() {
    let all = Guests::new(4, 2, BLOCK);
    let [a, b] = [&all.guests[0], &all.guests[1]];
    a.fill(1, 11);
    b.fill(1, 11);
    all.rounds(4);
    let sharing = all.stats().sharing;
    assert_eq!(a.memory.reclaim(at(1), 2 * PAGE_SIZE), 2);
    assert_eq!(all.stats().sharing, sharing, "its vCPUs may still see it");
    // Wanted before that: what it was, in a frame of its own.
    let shared = b.frame(at(1));
    assert_eq!(a.word(1), 11);
    assert!(a.frame(at(1)) != shared && a.is_writable(at(1)));
    a.forget();
    a.memory.share(0);
    assert_eq!(all.stats().sharing, sharing - 2);
    assert_eq!((a.word(1), a.word(2), b.word(1)), (11, 0, 11));
    // A whole block, of which all is shared, goes and comes back.
    assert_eq!(b.memory.reclaim(START, BLOCK), 512);
    b.forget();
    assert_eq!(b.memory.resident(), 0);
    assert_eq!(b.word(1), 0);
}

#[test]
fn without_memory_the_writer_stops_and_nobody_else() {
    let all = Guests::new(4, 2, BLOCK);
    let [a, b] = [&all.guests[0], &all.guests[1]];
    all.rounds(3);
    let held: Vec<_> = core::iter::from_fn(|| all.frames.alloc()).collect();
    assert!(!held.is_empty());
    assert_eq!(a.ram.bring_in(at(1), true), BroughtIn::NoneLeft);
    assert_eq!(a.shootdown.exhausted(), Some(at(1)));
    assert!(a.ram.write(at(2), &[1]).is_err(), "a device's write");
    assert_eq!(b.shootdown.exhausted(), None);
    assert_eq!((a.word(1), b.word(1)), (0, 0), "what was there is there");
    for frame in held {
        all.frames.free(frame);
    }
    assert_eq!(b.ram.bring_in(at(1), true), BroughtIn::Present);
}

#[test]
fn a_guest_that_writes_all_the_time_costs_no_more_than_the_pace() {
    let all = Guests::new(4, 1, BLOCK);
    let guest = &all.guests[0];
    for turn in 0..200u64 {
        let before = all.stats().scanned;
        guest.memory.share(16);
        assert!(all.stats().scanned - before <= 16);
        guest.forget();
        for page in 0..512 {
            // All alike, and different from turn to turn, or zeros.
            let word = if turn % 3 == 0 { 0 } else { turn };
            guest.ram.store_u64(at(page), word).unwrap();
        }
    }
    for page in 0..512 {
        assert_eq!(guest.ram.load_u64(at(page)), Ok(199));
    }
    let limbo = guest.memory.limbo.lock();
    assert!(limbo.pending.is_empty() && limbo.frames.is_empty());
}

/// A vCPU in the guest, on a thread: it reads by the translation that it has cached, and leaves when it is
/// kicked. What a device wrote before it said so is what the vCPU reads after it has heard.
#[test]
fn a_vcpu_in_the_guest_never_sees_the_past() {
    const WRITES: u64 = 30;
    let all = Guests::new(4, 1, FEW * PAGE_SIZE);
    let guest = &all.guests[0];
    let (host, chip) = all.hosts[0].clone();
    let (said, over) = (AtomicU64::new(0), AtomicBool::new(false));
    let (said, over, host) = (&said, &over, &*host);
    let requests = chip.requests(1).unwrap();
    let mut shared = 0;
    thread::scope(|scope| {
        let vcpu = scope.spawn(move || {
            let gate = guest.shootdown.gate(1).unwrap();
            let mut cached = None;
            for turn in 0.. {
                // Not always does it look at what is asked of it before it enters again.
                if turn % 3 == 0 {
                    requests.store(0, Ordering::SeqCst);
                    cached = None;
                    guest.shootdown.acknowledge(1, guest.shootdown.last());
                }
                while gate.enter() {
                    gate.leave();
                    cached = None;
                }
                let kicks = host.kicks(1);
                let place = *cached.get_or_insert_with(|| guest.frame(at(9)));
                for _ in 0..50 {
                    let heard = said.load(Ordering::SeqCst);
                    // SAFETY: the guest's memory, at least as long as the translation is cached.
                    let read = unsafe { AtomicU64::from_ptr(place.0 as *mut u64) };
                    let read = read.load(Ordering::SeqCst);
                    if read < heard {
                        gate.leave();
                        return Err((read, heard));
                    }
                    if host.kicks(1) != kicks {
                        break;
                    }
                }
                gate.leave();
                thread::yield_now();
                if over.load(Ordering::SeqCst) {
                    break;
                }
            }
            Ok(())
        });
        for write in 1..=WRITES {
            // Another page with the same contents, until they are one.
            guest.ram.store_u64(at(10), write - 1).unwrap();
            for _ in 0..300 {
                guest.memory.share(64);
                guest.shootdown.acknowledge(0, guest.shootdown.last());
                if guest.frame(at(9)) == guest.frame(at(10)) {
                    shared += 1;
                    break;
                }
                thread::yield_now();
            }
            guest.ram.store_u64(at(9), write).unwrap();
            said.store(write, Ordering::SeqCst);
        }
        over.store(true, Ordering::SeqCst);
        assert_eq!(vcpu.join().unwrap(), Ok(()));
    });
    assert!(shared > WRITES / 4, "{shared}");
}

/// A vCPU by what it has cached: of each page the frame, and whether it may write to it.
#[derive(Default)]
struct Cached(BTreeMap<u64, (Hpa, bool)>);

impl Cached {
    /// Where the page is, as the processor finds it, with faults handled as the machine does.
    fn find(&mut self, guest: &Bench, vcpu: usize, page: u64, write: bool) -> *mut u64 {
        let gate = guest.shootdown.gate(vcpu).unwrap();
        loop {
            if gate.enter() {
                self.0.clear();
            }
            gate.leave();
            if let Some((frame, writable)) = self.0.get(&page)
                && (*writable || !write)
            {
                return frame.0 as *mut u64;
            }
            let found = guest.table.translate(at(page)).map(|found| {
                let writable = found.leaf.flags.contains(NptFlags::WRITABLE);
                (found.address, writable)
            });
            match found.filter(|(_, writable)| *writable || !write) {
                Some(found) => {
                    self.0.insert(page, found);
                }
                None => {
                    // A fault drops the translation that it was raised by.
                    self.0.remove(&page);
                    let brought = guest.ram.bring_in(at(page), write);
                    assert_eq!(brought, BroughtIn::Present);
                }
            }
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    GuestWrites(usize, u64, u64),
    DeviceWrites(u64, u64),
    GuestReads(usize, u64),
    DeviceReads(u64),
    Turn(usize),
    Acknowledge(usize),
    Reclaim(u64, u64),
}

/// The pages of each guest in the model.
const FEW: u64 = 12;

fn step() -> impl Strategy<Value = Step> {
    let page = 0..FEW;
    let vcpu = 0..2usize;
    // Few words, so that many pages are alike.
    let word = 0..3u64;
    prop_oneof![
        3 => (vcpu.clone(), page.clone(), word.clone()).prop_map(|(v, p, w)| Step::GuestWrites(v, p, w)),
        2 => (page.clone(), word).prop_map(|(p, w)| Step::DeviceWrites(p, w)),
        3 => (vcpu.clone(), page.clone()).prop_map(|(v, p)| Step::GuestReads(v, p)),
        1 => page.clone().prop_map(Step::DeviceReads),
        8 => (1..64usize).prop_map(Step::Turn),
        8 => vcpu.prop_map(Step::Acknowledge),
        1 => (page, 1..4u64).prop_map(|(p, n)| Step::Reclaim(p, n)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 250, failure_persistence: None, ..ProptestConfig::default() })]

    /// Two guests with two vCPUs each, which use what they have cached until they acknowledge: reads give
    /// what that guest wrote last.
    #[test]
    fn reads_give_what_the_guest_wrote_last(
        steps in prop::collection::vec((0..2usize, step()), 1..300),
    ) {
        let all = Guests::new(3, 2, FEW * PAGE_SIZE);
        let total = all.frames.count() + all.guests.iter().map(|g| g.memory.resident() / PAGE_SIZE).sum::<u64>();
        let mut cached: [[Cached; 2]; 2] = Default::default();
        // What each page holds; one that was taken away holds that or zeros, until it is back.
        let mut model = [[(0u64, false); FEW as usize]; 2];
        for (number, step) in steps {
            let guest = &all.guests[number];
            let pages = &mut model[number];
            let mut check = |page: u64, read: u64| {
                let (word, taken) = &mut pages[page as usize];
                let right = read == *word || *taken && read == 0;
                // A vCPU that has not forgotten it does not bring it back.
                *taken &= guest.memory.slot(page).load(Ordering::Relaxed) == AWAY;
                *word = read;
                right
            };
            match step {
                Step::GuestWrites(vcpu, page, word) => {
                    let place = cached[number][vcpu].find(guest, vcpu, page, true);
                    // SAFETY: the guest's memory, by a translation that may be used still.
                    let old = unsafe { core::ptr::replace(place, word) };
                    prop_assert!(check(page, old));
                    pages[page as usize].0 = word;
                }
                Step::GuestReads(vcpu, page) => {
                    let place = cached[number][vcpu].find(guest, vcpu, page, false);
                    // SAFETY: as above.
                    let read = unsafe { place.read() };
                    prop_assert!(check(page, read));
                }
                Step::DeviceWrites(page, word) => {
                    guest.ram.store_u64(at(page), word).unwrap();
                    pages[page as usize] = (word, false);
                }
                Step::DeviceReads(page) => {
                    let read = guest.ram.load_u64(at(page)).unwrap();
                    prop_assert!(check(page, read));
                }
                Step::Turn(pages) => guest.memory.share(pages),
                Step::Acknowledge(vcpu) => {
                    cached[number][vcpu].0.clear();
                    guest.shootdown.acknowledge(vcpu, guest.shootdown.last());
                }
                Step::Reclaim(page, count) => {
                    let count = count.min(FEW - page);
                    guest.memory.reclaim(at(page), count * PAGE_SIZE);
                    for page in page..page + count {
                        pages[page as usize].1 = true;
                    }
                }
            }
        }
        for (number, guest) in all.guests.iter().enumerate() {
            for page in 0..FEW {
                let read = guest.ram.load_u64(at(page)).unwrap();
                let (word, taken) = model[number][page as usize];
                prop_assert!(read == word || taken && read == 0);
            }
            // No frame is lost when all is settled.
            for _ in 0..4 {
                guest.forget();
                guest.memory.share(0);
            }
        }
        let resident: u64 = all.guests.iter().map(|guest| guest.memory.resident()).sum();
        let shared = all.stats().shared - 1;
        prop_assert_eq!(all.frames.count() + resident / PAGE_SIZE + shared, total);
    }
}
