//! A thin hypervisor that starts first and runs the rest of the machine as its guest: with the real
//! devices, interrupts and ACPI tables, on all processors, and with the virtualization extension still
//! there for the guest's own use.
//!
//! The hypervisor keeps a few MiB of memory. Everything else is the guest's, and nothing but the few
//! things that the hypervisor must see takes the guest out of its way: see [`svm`] and [`vmx`]. A program
//! can know by a CPUID leaf ([`signature`]).
//!
//! Its modules are `kernel` and any number of `initrd`; its command line is described in
//! [`args`].
//!
//! # What the guest cannot do, and what its devices can
//!
//! No instruction of the guest, or of a guest of its own, reaches the hypervisor's memory or ends its
//! rule: its addresses lead elsewhere, the registers that decide who rules are the hypervisor's, and
//! what it puts into control blocks is only ever taken as its own addresses. A *device* that the guest
//! programs is not bound by that. It can write to any memory by DMA, and some can send INIT as an
//! interrupt message. Only an IOMMU that is set up before the guest closes that door, and this program sets
//! none up. The same holds for firmware that runs beside all of this (SMM). The sleep state S3, from which the
//! machine would wake up without a hypervisor, is not to be had: see [`sleep`].
#![no_std]
#![no_main]
#![allow(unsafe_code, reason = "a bare-metal program")]

extern crate alloc;

mod apic;
mod args;
mod counts;
mod cpuid;
mod identity;
mod nesting;
mod ports;
mod processors;
mod registers;
mod signature;
mod sleep;
mod svm;
mod territory;
mod view;
mod vmx;

use alloc::boxed::Box;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::convert::Infallible;
use core::ops::Range;
use core::sync::atomic::{AtomicUsize, Ordering};

use spin::Once;
use testudo_arch::Gpa;
use testudo_arch::cpuid::Cpuid;
use testudo_machine::boot::{self, BootImage, BootState, Module};
use testudo_machine::emulate;
use testudo_machine::layout::MemoryType;
use testudo_rt::{self as rt, Boot, println};

use crate::args::Args;
use crate::sleep::SleepControl;
use crate::territory::Territory;

rt::entry!(main);

/// The exit status for a command line that makes no sense.
const USAGE: u8 = 2;

/// What the hypervisor keeps in any case: tables, stacks, its heap's first piece.
const OWN_MEMORY: u64 = 8 << 20;

/// What the processors share.
pub(crate) struct Pill {
    cpuid: Cpuid,
    territory: Territory,
    extension: Extension,
    sleep: SleepControl,
}

/// By which of the processors' extensions the guest runs, and the tables for it.
enum Extension {
    Svm(svm::Tables),
    Vmx(Box<vmx::Tables>),
}

impl Extension {
    fn new(
        cpuid: &Cpuid,
        territory: &Territory,
        sleep: &SleepControl,
        nesting: bool,
    ) -> Result<Self, String> {
        // CPUID Fn0000_0001 ECX bit 5: VMX.
        if cpuid.query(1, 0)[2] & 1 << 5 != 0 {
            let tables = vmx::Tables::new(cpuid, territory, sleep, nesting);
            let tables = tables.map_err(|error| error.to_string())?;
            return Ok(Self::Vmx(Box::new(tables)));
        }
        let tables = svm::Tables::new(cpuid, territory, sleep, nesting);
        tables.map(Self::Svm).map_err(|error| error.to_string())
    }
}

impl Pill {
    /// Takes this processor into the guest: at `start`, or where another processor's start-up message
    /// says. `ready` is called when nothing can go wrong any more.
    fn run(
        &'static self,
        id: usize,
        start: Option<&BootState>,
        ready: impl FnOnce(),
    ) -> Result<Infallible, String> {
        match &self.extension {
            Extension::Svm(tables) => {
                svm::run(id, self, tables, start, ready).map_err(|error| error.to_string())
            }
            Extension::Vmx(tables) => {
                vmx::run(id, self, tables, start, ready).map_err(|error| error.to_string())
            }
        }
    }
}

static PILL: Once<Pill> = Once::new();
/// How many other processors wait for the guest to start them.
static READY: AtomicUsize = AtomicUsize::new(0);

fn main(boot: &'static Boot) -> u8 {
    let args = match Args::parse(boot.command_line()) {
        Ok(args) => args,
        Err(word) => {
            println!("testudo: {word}");
            return USAGE;
        }
    };
    match take_over(boot, &args) {
        Ok(never) => match never {},
        Err(error) => {
            println!("testudo: {error}");
            1
        }
    }
}

fn take_over(boot: &'static Boot, args: &Args<'_>) -> Result<Infallible, String> {
    let processors = rt::cpu::count();
    let mut bytes = OWN_MEMORY;
    if args.nesting {
        let each = nesting::HEAP as u64 + nesting::FRAMES;
        bytes += processors as u64 * each;
    }
    let territory = Territory::divide(boot, bytes)
        .ok_or_else(|| format!("{} MiB are not to be had in one piece", bytes >> 20))?;
    if args.nesting {
        // The heap keeps what it has had, so that page tables cannot take it away.
        drop(Vec::<u8>::with_capacity(processors * nesting::HEAP));
    }
    emulate::prepare();
    let sleep = SleepControl::of(&rt::acpi::Tables::of(boot));
    let cpuid = Cpuid::of_this_processor();
    let extension = Extension::new(&cpuid, &territory, &sleep, args.nesting)?;
    let start = load(boot, &territory, args.guest)?;
    let pill = PILL.call_once(|| Pill {
        cpuid,
        territory,
        extension,
        sleep,
    });
    processors::prepare();
    if processors > 1 {
        start_others(processors)?;
    }
    println!(
        "testudo: this machine is a guest from now on; {processors} processors, {} KiB kept",
        pill.territory.own_bytes() >> 10
    );
    rt::serial::drain();
    pill.run(0, Some(&start), || ())
}

/// Takes the other processors out of the guest's reach, until it starts them.
fn start_others(processors: usize) -> Result<(), String> {
    let work = |id| {
        let Some(pill) = PILL.get() else { return };
        let ready = || {
            READY.fetch_add(1, Ordering::AcqRel);
        };
        match pill.run(id, None, ready) {
            Ok(never) => match never {},
            Err(error) => println!("testudo: processor {id}: {error}"),
        }
    };
    rt::cpu::start_all(work).map_err(|missing| missing.to_string())?;
    while READY.load(Ordering::Acquire) + 1 < processors {
        if rt::cpu::finished() > 0 {
            return Err("not all processors can be taken over".into());
        }
        core::hint::spin_loop();
    }
    Ok(())
}

/// Places the kernel in the guest's memory, which holds it and its modules already.
fn load(boot: &Boot, territory: &Territory, command_line: &str) -> Result<BootState, String> {
    let kernel = boot
        .module("kernel")
        .ok_or("there is no module `kernel` to start")?;
    let initrds = boot
        .modules()
        .iter()
        .filter(|module| module.name == "initrd");
    let modules: Vec<_> = initrds
        .map(|module| Module {
            data: module.data,
            arguments: module.args.as_bytes(),
        })
        .collect();
    let sources: Vec<Range<u64>> = boot
        .modules()
        .iter()
        .map(|module| {
            let start = module.data.as_ptr() as u64;
            start..start + module.data.len() as u64
        })
        .collect();
    // A root pointer that the loader copied lies in memory that the kernel overwrites; the original is
    // where every PC has it, and kernels find it there.
    let in_memory = |address: u64| {
        let mut usable = territory
            .map
            .iter()
            .filter(|range| range.kind == MemoryType::Usable);
        usable.any(|range| (range.start.0..range.end()).contains(&address))
    };
    let rsdp = boot.rsdp().filter(|&address| !in_memory(address)).map(Gpa);
    let image = BootImage {
        kernel: kernel.data,
        command_line: command_line.as_bytes(),
        modules: &modules,
        rsdp,
    };
    boot::load_beside_firmware(&territory.ram, &territory.map, &sources, &image)
        .map_err(|error| format!("{}: {error}", kernel.args))
}
