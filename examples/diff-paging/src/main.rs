//! Asks the walkers of `testudo-ept` and the processor about the same accesses, and compares the answers.
//!
//! A case is a set of tables near the border of validity (the guest's own, and the second stage under
//! them), the registers that decide how they are read, and one access by one instruction of a guest.
//! Both sides get the same memory. Compared are: where the access led, or which fault it raised with its
//! error code and addresses (a page fault, a nested page fault, an EPT violation or misconfiguration),
//! and every entry afterwards, accessed and dirty bits among them. A disagreement is a defect of the
//! walkers or of the processor: documented ones of the emulators are listed in `defects`, any other is
//! minimized and printed.
//!
//! Command line: `count=N seed=S from=INDEX only=INDEX trace`. With `trace` each case is printed before
//! it is tried.
#![no_std]
#![no_main]
#![allow(unsafe_code, reason = "a bare-metal program")]

extern crate alloc;

mod arena;
mod case;
mod defects;
mod generate;
mod model;
mod processor;
mod words;

use alloc::boxed::Box;
use alloc::format;
use core::error::Error;
use core::ptr::NonNull;

use arrayvec::ArrayVec;
use testudo_arch::Hpa;
use testudo_arch::cpuid::Cpuid;
use testudo_diff::{Args, Emulator};
use testudo_ept::walk::Mode;
use testudo_rt::{Boot, memory, println, time};
use testudo_svm::SvmCaps;
use testudo_svm::hw::{HostFrames, VmcbFrame};
use testudo_svm::permission::{IoPermissionMap, MsrPermissionMap};
use testudo_svm::vmcb::Vmcb;
use testudo_vmx::hw::{RegionFrame, VmcsKind};

use arena::Arena;
use case::Case;
use defects::{DEFECTS, Defect, Kind};
use generate::Generator;
use model::View;
use processor::{Outcome, Processor};
use words::{Owner, Prepared, Values, Words};

testudo_rt::entry!(main);

type Result<T> = core::result::Result<T, Box<dyn Error>>;

fn main(boot: &'static Boot) -> u8 {
    match run(boot) {
        Ok(agreed) => u8::from(!agreed),
        Err(error) => {
            println!("{error}");
            2
        }
    }
}

const NO_MEMORY: &str = "too little memory";

/// How many cases show that a defect is there; counting takes a walk for each defect.
const ENOUGH: u64 = 1000;

fn run(boot: &'static Boot) -> Result<bool> {
    let args = Args::parse(boot.command_line())?;
    let cpuid = Cpuid::of_this_processor();
    let emulator = Emulator::detect(&cpuid);
    if let Ok(caps) = SvmCaps::from_cpuid(&cpuid) {
        println!("{emulator:?}: {caps}");
        let frames = HostFrames {
            save_area: frame()?,
            vmcb: frame()?,
        };
        let address = frame()?;
        // SAFETY: CPL 0, `caps` are this processor's, the frames are ours, and nobody moves us to
        // another processor or changes the host's segments.
        let mut svm = unsafe { testudo_svm::hw::Svm::enable(&caps, frames) }?;
        // SAFETY: the frame is identity-mapped, zeroed and nobody else's.
        let vmcb = unsafe { VmcbFrame::new(&mut *(address.0 as *mut Vmcb), address) };
        let maps = [
            all_ones(IoPermissionMap::SIZE)?,
            all_ones(MsrPermissionMap::SIZE)?,
        ];
        let held = svm.hold_interrupts();
        let processor = processor::svm::Svm::new(&caps, &cpuid, vmcb, held, maps);
        return Bench::new(processor, emulator)?.run(&args);
    }
    // SAFETY: a bare-metal program runs at CPL 0.
    let caps = unsafe { testudo_vmx::hw::Vmx::capabilities() }?;
    println!("{emulator:?}: {caps}");
    // SAFETY: CPL 0, `caps` are this processor's, and nobody moves us to another.
    let mut vmx = unsafe { testudo_vmx::hw::Vmx::enable(&caps, region()?) }?;
    let mut vmcs = vmx.create_vmcs(region()?, VmcsKind::Ordinary)?;
    let vmcs = vmx.load(&mut vmcs)?;
    let processor = processor::vmx::Vmx::new(&caps, &cpuid, vmcs)?;
    Bench::new(processor, emulator)?.run(&args)
}

fn frame() -> Result<Hpa> {
    Ok(memory::alloc_frame().map(Hpa).ok_or(NO_MEMORY)?)
}

/// A frame for the processor's own structures.
fn region() -> Result<RegionFrame> {
    let address = frame()?;
    let pointer = NonNull::new(address.0 as *mut u8).ok_or(NO_MEMORY)?;
    // SAFETY: the frame is identity-mapped and nobody else's.
    Ok(unsafe { RegionFrame::new(pointer, address) })
}

/// Memory whose every bit is set: a permission map under which everything exits.
fn all_ones(bytes: usize) -> Result<Hpa> {
    let start = memory::reserve(bytes as u64, 4096).ok_or(NO_MEMORY)?;
    // SAFETY: the range is identity-mapped and ours.
    unsafe { core::ptr::write_bytes(start as *mut u8, 0xFF, bytes) };
    Ok(Hpa(start))
}

/// An answer to a case: what became of the access, and what the words hold afterwards.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) outcome: Outcome,
    pub(crate) values: Values,
}

impl Answer {
    /// Whether a processor that did this agrees with what is expected, as far as the manuals
    /// determine it.
    fn agrees(&self, expected: &Self, words: &Words) -> bool {
        let same = |index: usize| {
            let (expected, did) = (expected.values[index], self.values[index]);
            expected == did || self.may_be_marked(words[index].owner, expected ^ did, did)
        };
        self.outcome == expected.outcome && (0..words.len()).all(same)
    }

    /// Whether a processor may have set these bits although the access failed: "Whenever the processor
    /// uses a paging-structure entry as part of linear-address translation, it sets the accessed flag
    /// in that entry" (SDM vol. 3A, 4.8), and it may have used those on the way to the one that faults.
    fn may_be_marked(&self, owner: Owner, bits: u64, now: u64) -> bool {
        let accessed = match owner {
            Owner::Guest(_) | Owner::Code => 0x20,
            Owner::Data(_) | Owner::Table(_) => 0x120,
            Owner::Content => 0,
        };
        let failed = !matches!(self.outcome, Outcome::Done { .. });
        failed && bits & !accessed == 0 && now & bits == bits
    }
}

/// A case that was tried: what the walkers say, and what the processor did.
struct Trial {
    prepared: Prepared,
    expected: Answer,
    did: Answer,
}

impl Trial {
    fn agrees(&self) -> bool {
        self.did.agrees(&self.expected, &self.prepared.words)
    }
}

/// What became of a case.
enum Verdict {
    Agreed(Outcome),
    /// By the emulator's defects.
    Explained(Outcome),
    Disagreed,
    NotTried,
}

/// How many cases ended how, by the mode of the guest's paging.
#[derive(Default)]
struct Counts([Ended; 5]);

/// How many cases of one mode ended how.
#[derive(Clone, Copy, Default)]
struct Ended {
    done: u64,
    page_faults: u64,
    stage_faults: u64,
    misconfigurations: u64,
    others: u64,
}

impl Counts {
    fn count(&mut self, mode: Mode, outcome: Outcome) {
        let ended = &mut self.0[mode as usize];
        *match outcome {
            Outcome::Done { .. } => &mut ended.done,
            Outcome::Exception { vector: 14, .. } => &mut ended.page_faults,
            Outcome::NestedFault { .. } | Outcome::Violation { .. } => &mut ended.stage_faults,
            Outcome::Misconfiguration { .. } => &mut ended.misconfigurations,
            _ => &mut ended.others,
        } += 1;
    }

    fn sum(&self, which: fn(&Ended) -> u64) -> u64 {
        self.0.iter().map(which).sum()
    }

    /// In how many of these modes accesses were made, and were refused by either stage.
    fn all_ways(&self, modes: &[Mode]) -> usize {
        let all = |mode: &&Mode| {
            let ended = self.0[**mode as usize];
            let paged = **mode == Mode::Off || ended.page_faults > 0;
            ended.done > 0 && paged && ended.stage_faults > 0
        };
        modes.iter().filter(all).count()
    }
}

/// Everything that a comparison needs.
struct Bench<P> {
    processor: P,
    arena: Arena,
    emulator: Emulator,
    /// Of the arena between cases.
    digest: u64,
}

impl<P: Processor> Bench<P> {
    fn new(processor: P, emulator: Emulator) -> Result<Self> {
        let offers = processor.offers();
        let plain = Case {
            marks: offers.marks,
            mode_based: offers.mode_based,
            ..Generator::plain(Mode::Level4)
        };
        let arena = Arena::new(&processor, &plain).ok_or(NO_MEMORY)?;
        let digest = arena.digest();
        Ok(Self {
            processor,
            arena,
            emulator,
            digest,
        })
    }

    /// What the walkers say, seen through these defects.
    fn expect(&self, case: &Case, prepared: &Prepared, defects: &[&Defect]) -> Option<Answer> {
        let mut view = View {
            accesses: case.instruction.accesses(case.user),
            checks_updates: true,
            unreadable_pieces: false,
        };
        let mut seen = prepared.words.clone();
        for defect in defects {
            match defect.kind {
                Kind::Accesses(change) => change(case, &mut view.accesses),
                Kind::UpdatesUnchecked => view.checks_updates = false,
                Kind::UnreadablePieces => view.unreadable_pieces = true,
                Kind::Sees(see) => see(case, &mut seen),
                Kind::Answers(_) | Kind::NotCompared(_) => {}
            }
        }
        self.arena.store(&seen);
        let outcome = model::expect(&self.processor, &self.arena, case, prepared, &view);
        let mut values = self.arena.load(&seen);
        for ((value, word), seen) in values.iter_mut().zip(&prepared.words).zip(&seen) {
            *value ^= word.value ^ seen.value;
        }
        let mut answer = Answer {
            outcome: outcome?.of(case),
            values,
        };
        for defect in defects {
            if let Kind::Answers(change) = defect.kind {
                change(case, &prepared.words, &mut answer);
            }
        }
        Some(answer)
    }

    /// Asks both sides; `None` if the case cannot be tried.
    fn ask(&mut self, case: &Case) -> Option<Trial> {
        let prepared = self.arena.prepare(case, &self.processor);
        self.processor.prepare(case, &prepared.start);
        let expected = self.expect(case, &prepared, &[]);
        let trial = expected.map(|expected| {
            self.arena.store(&prepared.words);
            let outcome = self.processor.run(case, &prepared.start).of(case);
            let values = self.arena.load(&prepared.words);
            let did = Answer { outcome, values };
            (expected, did)
        });
        self.arena.clear(&prepared.words);
        trial.map(|(expected, did)| Trial {
            prepared,
            expected,
            did,
        })
    }

    /// Whether the walkers, seeing the case through the documented defects, say what the processor
    /// did; counts the defects without which they would not, up to [`ENOUGH`].
    fn explain(&self, case: &Case, trial: &Trial, uses: &mut [u64]) -> bool {
        let prepared = &trial.prepared;
        let explains = |defects: &[&Defect]| {
            // Without an answer, what the access leads to then is no matter of paging.
            let expected = self.expect(case, prepared, defects);
            expected.is_none_or(|expected| trial.did.agrees(&expected, &prepared.words))
        };
        let here = |defect: &&Defect| defect.emulator == self.emulator;
        let all: ArrayVec<&Defect, { DEFECTS.len() }> = DEFECTS.iter().filter(here).collect();
        let explained = explains(&all);
        if explained {
            for (defect, used) in DEFECTS.iter().zip(uses) {
                let others = all.iter().filter(|other| other.name != defect.name);
                let others: ArrayVec<&Defect, { DEFECTS.len() }> = others.copied().collect();
                if here(&defect) && *used < ENOUGH {
                    *used += u64::from(!explains(&others));
                }
            }
        }
        self.arena.clear(&prepared.words);
        explained
    }

    fn compare(&mut self, case: &Case, uses: &mut [u64]) -> Verdict {
        let out = |defect: &Defect| {
            let out = matches!(defect.kind, Kind::NotCompared(matches) if matches(case));
            out && defect.emulator == self.emulator
        };
        if let Some(used) = DEFECTS.iter().position(out) {
            uses[used] += 1;
            return Verdict::NotTried;
        }
        let Some(trial) = self.ask(case) else {
            return Verdict::NotTried;
        };
        if trial.agrees() {
            Verdict::Agreed(trial.did.outcome)
        } else if self.explain(case, &trial, uses) {
            Verdict::Explained(trial.did.outcome)
        } else {
            Verdict::Disagreed
        }
    }

    fn disagrees(&mut self, case: &Case) -> bool {
        matches!(
            self.compare(case, &mut [0; DEFECTS.len()]),
            Verdict::Disagreed
        )
    }

    /// Leaves out every change without which the disagreement stays.
    fn minimize(&mut self, case: &Case) -> Case {
        let mut least = case.clone();
        let mut i = 0;
        while i < least.changes.len() {
            let mut smaller = least.clone();
            smaller.changes.remove(i);
            if self.disagrees(&smaller) {
                least = smaller;
            } else {
                i += 1;
            }
        }
        let simplifications: [fn(&mut Case); 6] = [
            |case| case.table = None,
            |case| case.data = case::DataPlace::Plain,
            |case| case.marks = false,
            |case| case.mode_based = false,
            |case| case.pieces = None,
            |case| (case.upper, case.offset) = (0, 0),
        ];
        for simplify in simplifications {
            let mut simpler = least.clone();
            simplify(&mut simpler);
            if self.disagrees(&simpler) {
                least = simpler;
            }
        }
        least
    }

    fn report(&mut self, index: u64, case: &Case) {
        let least = self.minimize(case);
        println!("disagreement {index}: {least}");
        let Some(Trial {
            prepared,
            expected,
            did,
        }) = self.ask(&least)
        else {
            return;
        };
        println!("disagreement {index}: expected {}", expected.outcome);
        println!("disagreement {index}: observed {}", did.outcome);
        let values = expected.values.iter().zip(&did.values);
        for (word, (expected, did)) in prepared.words.iter().zip(values) {
            if expected != did {
                let (owner, value) = (word.owner, word.value);
                println!(
                    "disagreement {index}: {owner:?} {value:#x}: expected {expected:#x}, \
                     observed {did:#x}"
                );
            }
        }
    }

    fn run(mut self, args: &Args) -> Result<bool> {
        let offers = self.processor.offers().clone();
        if args.trace {
            println!("{offers:#x?}");
        }
        let mut counts = Counts::default();
        let mut uses = [0u64; DEFECTS.len()];
        let (mut cases, mut disagreements, mut explained, mut skipped) = (0u64, 0u64, 0u64, 0u64);
        // Few cases are looked at more closely, to find the one.
        let period = if args.count() > 1000 { 1000 } else { 1 };
        let start = time::now_ns();
        for index in args.indices() {
            let generator = Generator {
                offers: &offers,
                arena: &self.arena,
            };
            let case = generator.case(args.seed, index);
            if args.trace {
                println!("trying {index}: {case}");
            }
            cases += 1;
            match self.compare(&case, &mut uses) {
                Verdict::Agreed(outcome) => counts.count(case.mode, outcome),
                Verdict::Explained(outcome) => {
                    explained += 1;
                    counts.count(case.mode, outcome);
                }
                Verdict::NotTried => skipped += 1,
                Verdict::Disagreed => {
                    disagreements += 1;
                    if disagreements <= 20 {
                        self.report(index, &case);
                    }
                }
            }
            if cases.is_multiple_of(period) && self.arena.digest() != self.digest {
                let found = format!(
                    "somebody wrote where no case has anything, in the {period} cases up to {index}"
                );
                return Err(found.into());
            }
            if cases.is_multiple_of(100_000) {
                println!("progress {cases}");
            }
        }
        let elapsed = (time::now_ns() - start).max(1);
        for (defect, count) in DEFECTS.iter().zip(uses) {
            if defect.emulator == self.emulator {
                let more = if count < ENOUGH { "" } else { " or more" };
                println!("defect {} cases={count}{more}", defect.name);
            }
        }
        let rate = u128::from(cases) * 1_000_000_000 / u128::from(elapsed);
        let (modes, all_ways) = (offers.modes.len(), counts.all_ways(&offers.modes));
        println!(
            "diff: cases={cases} disagreements={disagreements} explained={explained} \
             skipped={skipped} done={} page_faults={} stage_faults={} misconfigurations={} \
             others={} modes={modes} modes_all_ways={all_ways} rate={rate}",
            counts.sum(|ended| ended.done),
            counts.sum(|ended| ended.page_faults),
            counts.sum(|ended| ended.stage_faults),
            counts.sum(|ended| ended.misconfigurations),
            counts.sum(|ended| ended.others),
        );
        Ok(disagreements == 0 && (cases < 1000 || all_ways == modes))
    }
}
