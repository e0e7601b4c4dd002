//! Asks the validator of VM entries and the processor about the same states, and compares the answers.
//!
//! States lie near the border of validity: a valid one, changed by what violates a rule, by what
//! comes close to it, or by what no rule is about. Every state is entered for real; its guest maps
//! no memory and exits before its first instruction. Compared are the class of the outcome, the
//! error number, the exit reason and its qualification. A disagreement is a defect of the validator
//! or of the processor: documented ones of the emulator are listed in `defects`, any other is
//! minimized and printed.
//!
//! Command line: `count=N seed=S from=INDEX only=INDEX trace`. With `trace` each state is printed before
//! it is tried, which shows the last one of an emulator that dies.
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
use core::error::Error;
use core::fmt;
use core::ptr::NonNull;

use arrayvec::ArrayVec;
use testudo_arch::Hpa;
use testudo_diff::Args;
use testudo_rt::{Boot, println, time};
use testudo_vmx::check::{
    EntryContext, Outcome, Rule, Violation, Violations, check_entry_from, check_memory, samples,
};
use testudo_vmx::controls::PinControls;
use testudo_vmx::exit::ExitReason;
use testudo_vmx::hw::{CurrentVmcs, GuestRegisters, HostState, RegionFrame, VmcsKind, Vmx};
use testudo_vmx::image::VmcsImage;
use testudo_vmx::state::{SEGMENT_REGISTERS, segment_fields};
use testudo_vmx::{Encoding, VmFail, VmcsRead, VmcsWrite, VmxCaps, fields};

use arena::{Arena, Frame};
use coverage::Coverage;
use defects::{DEFECTS, Defect, Kind};
use generate::Generator;
use state::State;

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

/// What the processor did.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Did {
    Enter(ExitReason),
    Fail(VmFail),
    Reject(ExitReason, u64),
}

impl Did {
    fn entered(self) -> bool {
        matches!(self, Self::Enter(_))
    }

    /// Whether this is what a rule's violation leads to.
    fn is(self, outcome: Outcome) -> bool {
        match (self, outcome) {
            (Self::Fail(VmFail::Valid(did)), Outcome::VmFail(error)) => did == error,
            (Self::Reject(reason, qualification), Outcome::GuestState(failure)) => {
                reason.0 == 1 << 31 | 33 && qualification == failure.qualification()
            }
            (Self::Reject(reason, qualification), Outcome::MsrLoading { entry }) => {
                reason.0 == 1 << 31 | 34 && qualification == u64::from(entry)
            }
            _ => false,
        }
    }
}

impl fmt::Display for Did {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Enter(reason) => write!(f, "entered, exit by {reason}"),
            Self::Fail(fail) => write!(f, "{fail}"),
            Self::Reject(reason, qualification) => {
                write!(f, "{reason}, qualification {qualification:#x}")
            }
        }
    }
}

/// What the validator says of a state: of its fields, and of the memory that it points to.
struct Said {
    fields: Violations,
    memory: Violations,
}

/// What became of a state.
enum Verdict {
    Agreed(Did),
    Explained(Did),
    Disagreed(Did),
    NotTried,
}

/// Everything that a comparison needs.
struct Bench<'a> {
    caps: &'a VmxCaps,
    arena: &'a Arena,
    context: EntryContext,
    base: Box<VmcsImage>,
    /// The fields that this processor has and that VMWRITE takes.
    writable: Vec<Encoding>,
    defects: &'static [Defect],
    vmcs: CurrentVmcs<'a>,
}

impl Bench<'_> {
    /// Builds a state, asks both sides, and compares.
    fn compare(&mut self, state: &State, uses: &mut [u64]) -> Result<(Verdict, Said)> {
        let mut image = Box::clone(&self.base);
        state.apply(&mut image, self.caps, self.arena)?;
        self.arena.restore();
        self.store(&mut image)?;
        let said = self.ask(&image)?;
        let stops = |defect: &Defect| match defect.kind {
            Kind::Stops(matches) => matches(&image, self.caps),
            _ => false,
        };
        // What is rejected first does not come to that.
        if let Some(used) = self.defects.iter().position(stops)
            && self.is_explained(&image, Did::Enter(ExitReason(0)))?
        {
            uses[used] += 1;
            return Ok((Verdict::NotTried, said));
        }
        let did = self.enter()?;
        let verdict = if agrees(&said, did, &[]) {
            Verdict::Agreed(did)
        } else if self.explain(&image, &said, did, uses)? {
            Verdict::Explained(did)
        } else {
            Verdict::Disagreed(did)
        };
        Ok((verdict, said))
    }

    /// Writes every field, and reads back those of which a processor need not keep every bit.
    fn store(&mut self, image: &mut VmcsImage) -> Result<()> {
        for &field in &self.writable {
            let value = image.read_raw(field)?;
            self.vmcs.write_raw(field, value)?;
        }
        for register in SEGMENT_REGISTERS {
            let rights = segment_fields(register).access_rights;
            image.set(rights, self.vmcs.get(rights)?)?;
        }
        Ok(())
    }

    fn ask(&self, image: &VmcsImage) -> Result<Said> {
        Ok(Said {
            fields: check_entry_from(image, self.caps, &self.context)?,
            memory: check_memory(image, self.caps, &self.context, &self.arena.memory)?,
        })
    }

    fn enter(&mut self) -> Result<Did> {
        let mut registers = GuestRegisters::default();
        // SAFETY: host state is this processor's, or such that no processor accepts it. The guest
        // has no memory: its page tables, or its EPT, have no entries, and every exception exits.
        if let Err(fail) = unsafe { self.vmcs.enter(&mut registers) } {
            return Ok(Did::Fail(fail));
        }
        let reason = ExitReason::read(&self.vmcs)?;
        if reason.is_entry_failure() {
            let qualification = self.vmcs.get(fields::EXIT_QUALIFICATION)?;
            return Ok(Did::Reject(reason, qualification));
        }
        Ok(Did::Enter(reason))
    }

    /// Whether the validator, seeing the state through the documented defects, comes to this.
    fn is_explained(&self, image: &VmcsImage, did: Did) -> Result<bool> {
        let mut seen = Box::new(image.clone());
        for defect in self.defects {
            if let Kind::Sees(see) = defect.kind {
                see(&mut seen);
            }
        }
        let again = self.ask(&seen)?;
        Ok(agrees(&again, did, &self.defects_for(image)))
    }

    /// As [`Self::is_explained`], and counts the defects that play a part.
    fn explain(&self, image: &VmcsImage, said: &Said, did: Did, uses: &mut [u64]) -> Result<bool> {
        let explained = self.is_explained(image, did)?;
        if explained {
            for (defect, used) in self.defects.iter().zip(uses) {
                *used += u64::from(self.plays_a_part(defect, image, said)?);
            }
        }
        Ok(explained)
    }

    /// The defects that change how violations of this state are reported.
    fn defects_for(&self, image: &VmcsImage) -> ArrayVec<&'static Defect, 32> {
        let applies = |defect: &&Defect| match defect.kind {
            Kind::Ignores(_, matches) => matches(image, self.caps),
            Kind::Rejects(matches) => matches(image),
            Kind::Reports(..) => true,
            Kind::Sees(_) | Kind::Stops(_) => false,
        };
        self.defects.iter().filter(applies).collect()
    }

    fn plays_a_part(&self, defect: &Defect, image: &VmcsImage, said: &Said) -> Result<bool> {
        let violates = |rule: Rule| all(said).any(|v| v.rule == rule);
        Ok(match defect.kind {
            Kind::Ignores(rule, matches) => violates(rule) && matches(image, self.caps),
            Kind::Reports(rule, _) => violates(rule),
            Kind::Rejects(matches) => matches(image),
            Kind::Sees(see) => {
                let mut seen = Box::new(image.clone());
                see(&mut seen);
                self.ask(&seen)?.fields != said.fields
            }
            Kind::Stops(_) => false,
        })
    }

    /// Leaves out every change without which the disagreement stays.
    fn minimize(&mut self, state: &State) -> Result<State> {
        let mut least = state.clone();
        let mut i = 0;
        while i < least.changes.len() {
            let mut smaller = least.clone();
            smaller.changes.remove(i);
            let (verdict, _) = self.compare(&smaller, &mut [0; DEFECTS.len()])?;
            if matches!(verdict, Verdict::Disagreed(_)) {
                least = smaller;
            } else {
                i += 1;
            }
        }
        Ok(least)
    }

    fn report(&mut self, index: u64, state: &State) -> Result<()> {
        let least = self.minimize(state)?;
        let (verdict, said) = self.compare(&least, &mut [0; DEFECTS.len()])?;
        let Verdict::Disagreed(did) = verdict else {
            println!("disagreement {index}: comes and goes: {state}");
            return Ok(());
        };
        println!("disagreement {index}: {did}: {least}");
        for violation in all(&said) {
            println!("disagreement {index}: violates {violation}");
        }
        Ok(())
    }
}

fn all(said: &Said) -> impl Iterator<Item = &Violation> {
    said.fields.iter().chain(said.memory.iter())
}

/// Whether the processor did what it may do, by the validator's word as these defects change it.
fn agrees(said: &Said, did: Did, defects: &[&Defect]) -> bool {
    let ignored = |rule: Rule| {
        let ignores = |d: &&Defect| matches!(d.kind, Kind::Ignores(ignored, _) if ignored == rule);
        defects.iter().any(ignores)
    };
    let reported = |violation: &Violation| {
        let instead = defects.iter().find_map(|d| match d.kind {
            Kind::Reports(rule, outcome) if rule == violation.rule => Some(outcome),
            _ => None,
        });
        instead.unwrap_or_else(|| violation.outcome())
    };
    let more = defects.iter().filter_map(|d| match d.kind {
        Kind::Rejects(_) => Some(Rule::CsDpl.outcome()),
        _ => None,
    });
    let outcomes: ArrayVec<Outcome, { 2 * Violations::MAX }> = all(said)
        .filter(|v| !ignored(v.rule))
        .map(reported)
        .chain(more)
        .collect();
    let stage = |outcome: &Outcome| match outcome {
        Outcome::VmFail(_) => 0,
        Outcome::GuestState(_) => 1,
        Outcome::MsrLoading { .. } => 2,
    };
    match outcomes.iter().map(stage).min() {
        None => did.entered(),
        Some(first) => outcomes.iter().any(|o| stage(o) == first && did.is(*o)),
    }
}

/// A valid state that comes back: the host's own state, and a guest without memory.
fn base(caps: &VmxCaps, arena: &Arena) -> Result<Box<VmcsImage>> {
    let mut vmcs = Box::new(samples::valid(caps));
    // SAFETY: CPL 0 in 64-bit mode; the runtime has a TSS with a stack for every vector.
    unsafe { HostState::of_this_processor() }.write(&mut *vmcs)?;
    let pin = vmcs.get(fields::PIN_CONTROLS)?;
    let timer = PinControls::ACTIVATE_PREEMPTION_TIMER;
    if !caps.pin.allows(timer) {
        return Err("this program needs a processor with a preemption timer".into());
    }
    vmcs.set(fields::PIN_CONTROLS, pin | timer.bits())?;
    vmcs.set(fields::EXCEPTION_BITMAP, u32::MAX)?;
    vmcs.set(fields::GUEST_PAT, vmcs.get(fields::HOST_PAT)?)?;
    vmcs.set(fields::VPID, 1)?;
    vmcs.set(fields::TSC_MULTIPLIER, 1 << 48)?;
    vmcs.set(fields::PML_INDEX, 511)?;
    let (zero, scratch) = (arena.at(Frame::Zero), arena.at(Frame::Scratch));
    vmcs.set(fields::GUEST_CR3, zero)?;
    for (field, address) in [
        (fields::IO_BITMAP_A, zero),
        (fields::IO_BITMAP_B, zero),
        (fields::MSR_BITMAPS, zero),
        (fields::EXIT_MSR_STORE_ADDRESS, arena.at(Frame::StoredMsrs)),
        (fields::EXIT_MSR_LOAD_ADDRESS, arena.at(Frame::Msrs)),
        (fields::ENTRY_MSR_LOAD_ADDRESS, arena.at(Frame::Msrs)),
        (fields::PML_ADDRESS, scratch),
        (fields::VIRTUAL_APIC_ADDRESS, arena.at(Frame::Apic)),
        (fields::APIC_ACCESS_ADDRESS, scratch),
        (fields::POSTED_INTERRUPT_DESCRIPTOR_ADDRESS, scratch),
        (fields::EPT_POINTER, zero),
        (fields::EPTP_LIST_ADDRESS, zero),
        (fields::VMREAD_BITMAP_ADDRESS, zero),
        (fields::VMWRITE_BITMAP_ADDRESS, zero),
        (fields::VE_INFORMATION_ADDRESS, scratch),
        (fields::SPP_TABLE_POINTER, zero),
    ] {
        vmcs.set(field, address)?;
    }
    Ok(vmcs)
}

/// A frame of the arena for the processor's own structures.
fn region(arena: &Arena, frame: Frame) -> Result<RegionFrame> {
    let address = arena.at(frame);
    let pointer = NonNull::new(address as *mut u8).ok_or("a frame at zero")?;
    // SAFETY: the frame is for this use alone, and memory is mapped where it is. The validator
    // reads the revision at its start through the arena, which is what a processor does too.
    Ok(unsafe { RegionFrame::new(pointer, Hpa(address)) })
}

fn run(boot: &'static Boot) -> Result<bool> {
    let args = Args::parse(boot.command_line())?;
    // SAFETY: a bare-metal program runs at CPL 0.
    let caps = unsafe { Vmx::capabilities() }?;
    println!("{caps}");
    let arena = Arena::new(&caps).ok_or("too little memory")?;
    // SAFETY: CPL 0, `caps` are this processor's, and nobody moves us to another.
    let mut vmx = unsafe { Vmx::enable(&caps, region(&arena, Frame::Vmxon)?) }?;
    let base = base(&caps, &arena)?;
    let mut vmcs = vmx.create_vmcs(region(&arena, Frame::Vmcs)?, VmcsKind::Ordinary)?;
    let mut held = vmx.hold_interrupts();
    let mut current = vmx.load(&mut vmcs)?;

    let mut writable = Vec::new();
    for info in fields::FIELDS.iter().filter(|f| f.exists(&caps)) {
        let read_only = info.encoding.area() == testudo_vmx::encoding::Area::ExitInformation;
        if !read_only && info.encoding != fields::HOST_RSP.encoding() {
            let value = base.read_raw(info.encoding)?;
            match current.write_raw(info.encoding, value) {
                Ok(()) => writable.push(info.encoding),
                Err(fail) => println!("note: {} should exist here: {fail}", info.encoding),
            }
        }
    }
    let bochs = defects::is_bochs();
    let rules: Vec<Rule> = Rule::ALL
        .iter()
        .copied()
        .filter(|rule| state::is_reachable(*rule, &base, &caps))
        .collect();
    let mut bench = Bench {
        caps: &caps,
        arena: &arena,
        context: EntryContext {
            current_vmcs: Some(current.address()),
            ..EntryContext::default()
        },
        base,
        writable,
        defects: if bochs { DEFECTS } else { &[] },
        vmcs: current,
    };
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
        let (verdict, said) = bench.compare(&state, &mut uses)?;
        states += 1;
        match verdict {
            Verdict::NotTried => skipped += 1,
            Verdict::Agreed(did) => coverage.count([&said.fields, &said.memory], did.entered()),
            Verdict::Explained(did) => {
                explained += 1;
                coverage.count([&said.fields, &said.memory], did.entered());
            }
            Verdict::Disagreed(_) => {
                disagreements += 1;
                if disagreements <= 20 {
                    bench.report(index, &state)?;
                }
            }
        }
        if states % 65_536 == 0 {
            // What was held back meanwhile.
            held.take_pending();
            println!("progress {states}");
        }
    }
    let elapsed = (time::now_ns() - start).max(1);
    coverage.print(&rules);
    for (defect, count) in bench.defects.iter().zip(uses) {
        println!("defect {} states={count}", defect.name);
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
