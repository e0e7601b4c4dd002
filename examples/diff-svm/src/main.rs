//! Asks the validator of VMRUN and the processor about the same states, and compares the answers.
//!
//! States lie near the border of validity: a valid one, changed by what would break a rule, by what
//! comes close to it, or by what no rule is about. Every state is entered for real; its guest
//! exits at its first instruction. A disagreement is a defect of the validator or of the processor:
//! documented ones of the emulators are listed in `defects`, any other is minimized and printed.
//!
//! Command line: `count=N seed=S from=INDEX only=INDEX trace`. With `trace` each state is printed before it is
//! tried, which shows the last one of an emulator that dies.
#![no_std]
#![no_main]
#![allow(unsafe_code, reason = "a bare-metal program")]

extern crate alloc;

mod arena;
mod coverage;
mod defects;
mod generate;
mod state;

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::arch::asm;
use core::error::Error;

use arrayvec::ArrayVec;
use testudo_arch::cpuid::Cpuid;
use testudo_arch::{FrameAlloc, Hpa};
use testudo_diff::{Args, Emulator};
use testudo_rt::memory::Frames;
use testudo_rt::{Boot, println, time};
use testudo_svm::check::{Outside, Rule, Violation, check_pdpes, check_vmrun};
use testudo_svm::exit::ExitCode;
use testudo_svm::hw::{GuestRegisters, HeldInterrupts, HostFrames, Svm, VmcbFrame};
use testudo_svm::{Defects, SvmCaps, Vmcb};

use arena::Arena;
use coverage::Coverage;
use defects::{DEFECTS, Defect, Kind, stops_at};
use generate::Generator;
use state::State;

testudo_rt::entry!(main);

fn main(boot: &'static Boot) -> u8 {
    match run(boot) {
        Ok(agreed) => u8::from(!agreed),
        Err(error) => {
            println!("{error}");
            2
        }
    }
}

/// Everything that a comparison needs.
struct Bench<'a> {
    caps: &'a SvmCaps,
    arena: &'a Arena,
    emulator: Emulator,
    vmcb: VmcbFrame<'a>,
    held: HeldInterrupts<'a>,
    /// This program's CR0, which every exit must restore.
    cr0: u64,
}

fn host_cr0() -> u64 {
    let cr0;
    // SAFETY: reads a control register at CPL 0.
    unsafe { asm!("mov {}, cr0", out(reg) cr0, options(nomem, nostack, preserves_flags)) };
    cr0
}

/// The rules that a state breaks, those that need memory too.
type Broken = ArrayVec<Violation, { Rule::ALL.len() }>;

/// What became of a state.
enum Outcome {
    Agreed { entered: bool },
    Explained { entered: bool },
    Disagreed { entered: bool },
    NotTried,
}

impl Bench<'_> {
    /// Builds a state, asks both sides, and compares.
    fn compare(&mut self, state: &State, uses: &mut [u64]) -> (Outcome, Broken) {
        state.build(self.arena, &mut self.vmcb);
        let broken = self.broken();
        let stops = |defect: &Defect| match defect.kind {
            Kind::Stops(_, matches) => matches(&self.vmcb, self.caps),
            _ => false,
        };
        if let Some(used) = self.find(stops) {
            uses[used] += 1;
            return (Outcome::NotTried, broken);
        }
        // The processor may write over the state, so that the explanation needs a copy.
        let copy: Vmcb = Vmcb::clone(&self.vmcb);
        let entered = self.enter();
        let outcome = if entered == broken.is_empty() {
            Outcome::Agreed { entered }
        } else if self.explain(&copy, &broken, uses) {
            Outcome::Explained { entered }
        } else {
            Outcome::Disagreed { entered }
        };
        (outcome, broken)
    }

    fn broken(&self) -> Broken {
        // This program is the host; it does not use CET.
        let found = check_vmrun(&self.vmcb, self.caps, &Outside::default());
        let mut broken: Broken = found.iter().copied().collect();
        // A CR3 outside the arena reads no memory of ours; what is there has no entries.
        let pdpes = check_pdpes(&self.vmcb, self.caps, Defects::empty(), &self.arena.memory);
        if let Ok(Some(violation)) = pdpes {
            broken.push(violation);
        }
        broken
    }

    fn enter(&mut self) -> bool {
        let mut registers = GuestRegisters::default();
        // SAFETY: everything is intercepted; the guest's first instruction exits, and it reaches
        // nothing but the arena; no other guest's registers are in the processor. Translations
        // cannot go stale: the arena maps the same in every state.
        unsafe { self.held.enter(&mut self.vmcb, &mut registers) };
        let cr0 = host_cr0();
        assert!(
            cr0 == self.cr0,
            "the processor left the host with CR0 = {cr0:#x}"
        );
        let code = ExitCode::from_vmcb(self.vmcb.exit_code());
        if code == ExitCode::INTR || code == ExitCode::NMI {
            self.held.take_pending();
        }
        !code.is_failed_entry()
    }

    fn find(&self, matches: impl Fn(&Defect) -> bool) -> Option<usize> {
        let here = |defect: &Defect| defect.emulator == self.emulator && matches(defect);
        DEFECTS.iter().position(here)
    }

    /// Whether documented defects account for a disagreement.
    fn explain(&self, vmcb: &Vmcb, broken: &[Violation], uses: &mut [u64]) -> bool {
        if broken.is_empty() {
            let strict = |defect: &Defect| match defect.kind {
                Kind::Strict(matches) => matches(vmcb, self.caps),
                _ => false,
            };
            let used = self.find(strict);
            if let Some(used) = used {
                uses[used] += 1;
            }
            return used.is_some();
        }
        broken.iter().all(|violation| {
            let lenient = |defect: &Defect| match defect.kind {
                Kind::Lenient(rule, matches) => {
                    rule == violation.rule && matches(vmcb, self.caps, violation)
                }
                _ => false,
            };
            let used = self.find(lenient);
            if let Some(used) = used {
                uses[used] += 1;
            }
            used.is_some()
        })
    }

    /// Leaves out every change without which the disagreement stays.
    fn minimize(&mut self, state: &State) -> State {
        let mut least = state.clone();
        let mut i = 0;
        while i < least.changes.len() {
            let mut smaller = least.clone();
            smaller.changes.remove(i);
            let (outcome, _) = self.compare(&smaller, &mut [0; DEFECTS.len()]);
            if matches!(outcome, Outcome::Disagreed { .. }) {
                least = smaller;
            } else {
                i += 1;
            }
        }
        least
    }

    fn report(&mut self, index: u64, state: &State) {
        let least = self.minimize(state);
        let (outcome, broken) = self.compare(&least, &mut [0; DEFECTS.len()]);
        let Outcome::Disagreed { entered } = outcome else {
            println!("disagreement {index}: comes and goes: {state}");
            return;
        };
        let did = if entered { "entered" } else { "refused" };
        println!("disagreement {index}: {did}: {least}");
        for violation in &broken {
            println!("disagreement {index}: breaks {violation}");
        }
        let code = ExitCode::from_vmcb(self.vmcb.exit_code());
        println!("disagreement {index}: exit {code:?}");
    }
}

fn run(boot: &'static Boot) -> Result<bool, Box<dyn Error>> {
    const NO_MEMORY: &str = "too little memory";
    let args = Args::parse(boot.command_line())?;
    let cpuid = Cpuid::of_this_processor();
    let caps = SvmCaps::from_cpuid(&cpuid)?;
    let emulator = Emulator::detect(&cpuid);
    println!("{emulator:?}: {caps}");
    if args.trace {
        println!("{caps:#x?}");
    }
    let arena = Arena::new(&caps).ok_or(NO_MEMORY)?;
    let frame = || Frames.alloc().ok_or(NO_MEMORY);
    let frames = HostFrames {
        save_area: frame()?,
        vmcb: frame()?,
    };
    let address: Hpa = frame()?;
    // SAFETY: CPL 0, `caps` are this processor's, the frames are ours, and nobody moves us to
    // another processor or changes the host's segments.
    let mut svm = unsafe { Svm::enable(&caps, frames) }?;
    let mut bench = Bench {
        caps: &caps,
        arena: &arena,
        emulator,
        // SAFETY: the frame is identity-mapped, zeroed and nobody else's.
        vmcb: unsafe { VmcbFrame::new(&mut *(address.0 as *mut Vmcb), address) },
        held: svm.hold_interrupts(),
        cr0: host_cr0(),
    };
    let reachable =
        |rule: &Rule| generate::is_reachable(*rule, &caps) && !stops_at(emulator, *rule);
    let rules: Vec<Rule> = Rule::ALL.iter().copied().filter(reachable).collect();
    let generator = Generator {
        caps: &caps,
        arena: &arena,
        rules: &rules,
    };

    let mut coverage = Coverage::new();
    let mut uses = [0; DEFECTS.len()];
    let (mut states, mut explained, mut disagreements, mut skipped) = (0u64, 0u64, 0u64, 0u64);
    let start = time::now_ns();
    for index in args.indices() {
        let state = generator.state(args.seed, index);
        if args.trace {
            println!("trying {index}: {state}");
        }
        let (outcome, broken) = bench.compare(&state, &mut uses);
        states += 1;
        match outcome {
            Outcome::Agreed { entered } => coverage.count(&broken, entered),
            Outcome::Explained { entered } => {
                explained += 1;
                coverage.count(&broken, entered);
            }
            Outcome::NotTried => skipped += 1,
            Outcome::Disagreed { entered } => {
                disagreements += 1;
                coverage.count(&broken, entered);
                if disagreements <= 20 {
                    bench.report(index, &state);
                }
            }
        }
        if states % 100_000 == 0 {
            println!("progress {states}");
        }
    }
    let elapsed = (time::now_ns() - start).max(1);
    coverage.print(&rules);
    for (defect, count) in DEFECTS.iter().zip(uses) {
        if defect.emulator == emulator {
            println!("defect {} states={count}", defect.name);
        }
    }
    let both_ways = coverage.both_ways(&rules);
    let rate = u128::from(states) * 1_000_000_000 / u128::from(elapsed);
    println!(
        "diff: states={states} disagreements={disagreements} explained={explained} \
         skipped={skipped} rules={} rules_both_ways={both_ways} rate={rate}",
        rules.len()
    );
    Ok(disagreements == 0 && (args.is_single() || both_ways == rules.len()))
}
