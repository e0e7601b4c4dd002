//! The same rows as one table of ratios: `cargo bench -p testudo-benches --bench paging -- ratios`, and after it
//! the parts that are wanted, if not all: `ranges`, `translate`, `sizes`, `harvest`, `scan`.
//!
//! Competitors take turns, and of each the fastest turn counts, so that whatever else the machine does
//! meets all alike.

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::*;

const TURNS: usize = 15;
/// What takes less than this for all its turns gets more of them: whatever else the machine does comes in
/// bursts of milliseconds.
const LEAST: Duration = Duration::from_millis(1500);

/// What takes turns: a competitor's name, and one turn of its.
type Subject<'a> = (&'static str, Box<dyn FnMut() -> Duration + 'a>);

fn turn<'a, T: 'a>(
    mut prepare: impl FnMut() -> T + 'a,
    mut run: impl FnMut(&mut T) + 'a,
    done: impl Fn(T) + 'a,
) -> Box<dyn FnMut() -> Duration + 'a> {
    Box::new(move || timed(1, &mut prepare, &mut run, &done))
}

/// A turn on what stays the same.
fn again<'a>(mut run: impl FnMut() + 'a) -> Box<dyn FnMut() -> Duration + 'a> {
    Box::new(move || {
        let start = Instant::now();
        run();
        start.elapsed()
    })
}

/// Prints the nanoseconds for each of `count` things, and what ours are to the best of the others.
fn row(name: &str, count: u64, mut subjects: Vec<Subject<'_>>) -> Vec<f64> {
    let mut best = vec![Duration::MAX; subjects.len()];
    let start = Instant::now();
    let mut turns = 0;
    while turns < TURNS || start.elapsed() < LEAST {
        turns += 1;
        for (best, (_, turn)) in best.iter_mut().zip(&mut subjects) {
            *best = turn().min(*best);
        }
    }
    let each: Vec<f64> = best
        .iter()
        .map(|time| time.as_secs_f64() * 1e9 / count as f64)
        .collect();
    let cells = subjects.iter().zip(&each);
    let cells: Vec<String> = cells
        .map(|((name, _), ns)| format!("{name} {ns:.2}"))
        .collect();
    let peers = subjects.iter().zip(&each);
    let peers = peers.filter(|((name, _), _)| matches!(*name, "x86_64" | "multiarch"));
    let fastest = peers.map(|(_, ns)| *ns).fold(f64::INFINITY, f64::min);
    let mut ratios = String::new();
    if fastest.is_finite() {
        ratios += &format!("  {:.2} times the fastest peer's speed;", fastest / each[0]);
    }
    if let Some(bare) = subjects.iter().position(|(name, _)| *name == "bare") {
        ratios += &format!("  {:.2} of the bare loop's time", each[0] / each[bare]);
    }
    println!("{name:<26}{}", cells.join(", "));
    if !ratios.is_empty() {
        println!("{:<26}{ratios}", "");
    }
    each
}

pub(super) fn print() {
    println!(
        "fastest of at least {TURNS} turns each, ns for each 4 KiB page of 1 GiB unless another unit is named\n"
    );
    let parts: [(&str, fn()); 5] = [
        ("ranges", ranges),
        ("translate", translate),
        ("sizes", sizes),
        ("harvest", harvest),
        ("scan", scan),
    ];
    let arguments: Vec<String> = std::env::args().collect();
    let all = !parts
        .iter()
        .any(|(name, _)| arguments.iter().any(|argument| argument == name));
    for (name, part) in parts {
        if all || arguments.iter().any(|argument| argument == name) {
            part();
        }
    }
}

fn ranges() {
    let store = |tables: &mut Vec<u64>| {
        let base = arena::base();
        for number in 0..512 {
            let table = arena::take_zeroed(base).unwrap();
            // SAFETY: the frame is in the block, and ours.
            let entries = unsafe {
                core::slice::from_raw_parts_mut(base.add(table as usize).cast::<u64>(), 512)
            };
            for (index, entry) in (0u64..).zip(entries) {
                *entry = (FRAME + (number * 512 + index) * 4096) | ENTRY;
            }
            tables.push(table);
        }
    };
    let give = |tables: Vec<u64>| tables.into_iter().rev().for_each(arena::give);
    row(
        "map",
        PAGES,
        vec![
            ("testudo", turn(ours, map_ours, ours_done)),
            ("x86_64", turn(peer, map_peer, peer_done)),
            ("multiarch", turn(multiarch, map_multiarch, drop)),
            ("bare", turn(|| Vec::with_capacity(512), store, give)),
        ],
    );
    let unmap = |table: &mut Ours| {
        let flush = table.unmap(Gva(FIRST), LEN).unwrap();
        flush.discharge(&mut NoHardware);
    };
    row(
        "unmap",
        PAGES,
        vec![
            ("testudo", turn(ours_mapped, unmap, ours_done)),
            ("x86_64", turn(peer_mapped, unmap_peer, peer_done)),
            ("multiarch", turn(multiarch_mapped, unmap_multiarch, drop)),
        ],
    );
    let (table, mut peer, mut multiarch) = (ours_mapped(), peer_mapped(), multiarch_mapped());
    let mut bare = bare_mapped();
    let [mut ours_writable, mut peer_writable, mut multiarch_writable] = [true; 3];
    row(
        "protect",
        PAGES,
        vec![
            (
                "testudo",
                again(|| {
                    ours_writable = !ours_writable;
                    protect_ours(&table, ours_writable);
                }),
            ),
            (
                "x86_64",
                again(|| {
                    peer_writable = !peer_writable;
                    protect_peer(&mut peer, peer_writable);
                }),
            ),
            (
                "multiarch",
                again(|| {
                    multiarch_writable = !multiarch_writable;
                    protect_multiarch(&mut multiarch, multiarch_writable);
                }),
            ),
            ("bare", again(|| flip_entries(&mut bare))),
        ],
    );
    ours_done(table);
    peer_done(peer);
}

fn translate() {
    let (table, peer, multiarch) = (ours_mapped(), peer_mapped(), multiarch_mapped());
    for (name, addresses) in [
        ("translate, sequential", sequential()),
        ("translate, random", random()),
    ] {
        let addresses = &addresses;
        row(
            name,
            PAGES,
            vec![
                (
                    "testudo",
                    again(|| {
                        black_box(translate_ours(&table, addresses));
                    }),
                ),
                (
                    "x86_64",
                    again(|| {
                        black_box(translate_peer(&peer, addresses));
                    }),
                ),
                (
                    "multiarch",
                    again(|| {
                        black_box(translate_multiarch(&multiarch, addresses));
                    }),
                ),
            ],
        );
    }
    ours_done(table);
    peer_done(peer);
}

fn sizes() {
    row(
        "split 2 MiB (ns a table)",
        512,
        vec![("testudo", turn(ours_large, split_ours, ours_done))],
    );
    row(
        "merge 2 MiB (ns a table)",
        512,
        vec![("testudo", turn(ours_mapped, merge_ours, ours_done))],
    );
    row(
        "map over 16 TiB",
        PAGES,
        vec![
            ("testudo", turn(ours, map_sparse, ours_done)),
            ("in one piece", turn(ours, map_ours, ours_done)),
        ],
    );
}

fn harvest() {
    for (name, every) in HARVESTS {
        let words: Vec<AtomicU64> = (0..PAGES / 64).map(|_| AtomicU64::new(0)).collect();
        let table = &ours_clean();
        let log = PageBitmap::new(FIRST, &words);
        let prepare = || {
            dirty_ours(table, every);
            words
                .iter()
                .for_each(|word| word.store(0, Ordering::Relaxed));
        };
        let bare = &std::cell::RefCell::new(bare_mapped());
        let mut bare_log = vec![0u64; (PAGES / 64) as usize];
        row(
            &format!("harvest, {name} dirty"),
            PAGES,
            vec![
                (
                    "testudo",
                    turn(prepare, |(): &mut ()| harvest_ours(table, &log), drop),
                ),
                (
                    "bare",
                    turn(
                        || dirty_bare(&mut bare.borrow_mut(), every),
                        move |(): &mut ()| harvest_bare(&mut bare.borrow_mut(), &mut bare_log),
                        drop,
                    ),
                ),
            ],
        );
    }
}

fn scan() {
    let memory = scan::Memory::new();
    let pages = scan::BYTES / 4096;
    for (place, bytes) in scan::PLACES {
        let each = row(
            &format!("scan, {place}"),
            pages,
            vec![
                (
                    "bare read",
                    again(|| {
                        black_box(memory.read(bytes));
                    }),
                ),
                (
                    "of 8 pages in turn",
                    again(|| {
                        black_box(memory.read_eight(bytes));
                    }),
                ),
                (
                    "zeros found",
                    again(|| assert_eq!(black_box(memory.zeros(bytes)) as u64, pages)),
                ),
                (
                    "hashed",
                    again(|| {
                        black_box(memory.hashes(bytes));
                    }),
                ),
                (
                    "by two threads",
                    again(|| {
                        black_box(memory.hashes_by_two(bytes));
                    }),
                ),
            ],
        );
        let [plain, eight, zeros, hashed, by_two] = each[..] else {
            unreachable!("one figure for each of the five")
        };
        println!(
            "{:<26}  zero detection at {:.2} of the bandwidth of reads in order ({:.1} GB/s), {:.2} of reads of 8 pages\n\
             {:<26}  in turn ({:.1} GB/s); {:.2} M pages/s hashed ({:.1} GB/s), {:.2} M by two threads",
            "",
            plain / zeros,
            4096.0 / plain,
            eight / zeros,
            "",
            4096.0 / eight,
            1e3 / hashed,
            4096.0 / hashed,
            1e3 / by_two
        );
    }
}
