//! A hypervisor that boots an unmodified Linux, Xen or any other PVH, Multiboot or bzImage kernel
//! on the bare machine, or several side by side: each virtual processor on a real one, every device of the
//! PC in software.
//!
//! Its modules are `kernel` and any number of `initrd`; its command line is described in
//! [`args`].
#![no_std]
#![no_main]
#![allow(unsafe_code, reason = "a bare-metal program")]

extern crate alloc;

mod args;
mod backend;
mod devices;
mod frames;
mod host;
mod memory;
mod output;
mod shadow;
mod sharing;
mod svm;
mod vmx;
mod wall_clock;

use alloc::boxed::Box;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::num::NonZeroU32;
use core::sync::atomic::{AtomicU64, Ordering};

use spin::{Mutex, Once};
use testudo_arch::apic::ApicPage;
use testudo_arch::cpuid::Cpuid;
use testudo_arch::memory::GuestRam;
use testudo_machine::boot::{BootState, Module};
use testudo_machine::irq::Lapic;
use testudo_machine::paged::Shootdown;
use testudo_machine::paging::{self, Paging};
use testudo_machine::stats::ExitStats;
use testudo_machine::{Host, Machine, MachineConfig, Stop, Vcpu, VcpuLoop};
use testudo_rt::{self as rt, Boot, println};

use crate::args::Args;
use crate::backend::{Backend, Work};
use crate::devices::{Backends, Ethernet, Outside};
use crate::host::BareMetal;
use crate::memory::Memory;
use crate::output::Output;
use crate::sharing::Sharing;

rt::entry!(main);

/// The exit status for a command line that makes no sense.
const USAGE: u8 = 2;

/// What the processors of a guest share once its machine is built.
struct Shared {
    machine: Machine<GuestRam>,
    backends: Backends,
    backend: Backend,
    cpuid: Cpuid,
    ram: GuestRam,
    lapics: Mutex<Vec<Option<Lapic>>>,
    start: BootState,
    count_exits: bool,
    renew: Option<NonZeroU32>,
    stats: Mutex<ExitStats>,
    /// What the vCPUs' runs took in ticks of the time-stamp counter, waits included.
    ticks: AtomicU64,
    output: Output,
    stop: Mutex<Option<Stop>>,
}

static GUESTS: Once<Vec<Shared>> = Once::new();

fn main(boot: &'static Boot) -> u8 {
    let args = match Args::parse(boot.command_line()) {
        Ok(args) => args,
        Err(word) => {
            println!("testudo: {word}");
            return USAGE;
        }
    };
    let ethernet = Ethernet::new(args.guests);
    let sharing = match Sharing::new(&args) {
        Ok(sharing) => sharing,
        Err(error) => {
            println!("testudo: {error}");
            return 1;
        }
    };
    match (0..args.guests)
        .map(|guest| prepare(boot, &args, guest, &ethernet, sharing.as_ref()))
        .collect()
    {
        Ok(guests) => {
            let status = run(GUESTS.call_once(|| guests), &args);
            if let (Some(sharing), true) = (sharing, args.stats) {
                println!("{sharing}");
            }
            status
        }
        Err(error) => {
            println!("testudo: {error}");
            1
        }
    }
}

/// Builds the machine of a guest and puts the kernel into it.
fn prepare(
    boot: &'static Boot,
    args: &Args<'_>,
    guest: usize,
    ethernet: &Ethernet,
    sharing: Option<&Sharing>,
) -> Result<Shared, String> {
    let kernel = boot
        .module("kernel")
        .ok_or("there is no module `kernel` to start")?;
    let processors = rt::cpu::count();
    let vcpus = args.vcpus.saturating_mul(args.guests);
    if vcpus > processors {
        return Err(format!(
            "{vcpus} vCPUs need as many processors, and this machine has {processors}"
        ));
    }
    let files = ["disk", "pmem"].map(|name| boot.module(name).is_some());
    if args.guests > 1 && files != [false; 2] {
        return Err("a disk's file belongs to one guest only".into());
    }
    let cpuid = Cpuid::of_this_processor();
    let mut memory = Memory::reserve(boot, args, &cpuid)?;
    let mut backend =
        Backend::new(&cpuid, &memory.ram, args.paging(guest)).map_err(|e| e.to_string())?;
    let shootdown = Shootdown::new(args.vcpus);
    let managed = memory.manage(&mut backend, args, &shootdown, sharing)?;
    let scanned = managed.ranges().map(|range| range.pages).collect();
    let ram = memory.ram;
    let mut processor = cpuid.clone();
    let shadow = backend.paging() == Paging::Shadow;
    if let Some(lack) = backend.lack() {
        println!("testudo: {lack}: the guest runs on shadow paging");
    }
    if shadow {
        paging::hide_from_guests(&mut processor);
    }
    if args.nested {
        backend.offer_nested(&mut processor);
    }
    let config = MachineConfig {
        vcpus: args.vcpus,
        memory: args.memory_mib << 20,
        nested: args.nested,
        hyperv: args.enlightened,
        pschange_mc_no: args.nested && backend.pschange_mc_no(),
        time_limit: args
            .timeout_s
            .map(|seconds| seconds.saturating_mul(1_000_000_000)),
        start_time: wall_clock::seconds_since_1970(),
    };
    let host: Arc<dyn Host> = Arc::new(BareMetal::new(guest * args.vcpus));
    let output = Output::new(guest, args.guests);
    let serial = output.clone();
    let console = Box::new(move |byte| serial.put(byte));
    let (devices, backends) = devices::build(
        boot,
        args,
        managed,
        &Outside {
            guest,
            output: &output,
            ethernet,
        },
    );
    let (machine, lapics) = Machine::with_devices(
        config,
        ram.clone(),
        host.clone(),
        &processor,
        console,
        devices,
    )
    .map_err(|e| e.to_string())?;
    let machine = machine
        .with_shootdown(shootdown)
        .map_err(|e| e.to_string())?;
    let machine = match sharing {
        Some(sharing) => machine.with_page_scanner(scanned, sharing.per_second),
        None => machine,
    };
    if shadow {
        backend.enable_shadow(host, machine.cpuid(), &ram, args.vcpus);
    }
    if args.nested {
        backend
            .enable_nested(machine.cpuid(), args.enlightened)
            .map_err(|e| e.to_string())?;
    }
    let modules: Vec<_> = boot
        .modules()
        .iter()
        .filter(|module| module.name == "initrd")
        .map(|module| Module {
            data: module.data,
            arguments: module.args.as_bytes(),
        })
        .collect();
    let start = machine
        .load(kernel.data, args.guest.as_bytes(), &modules)
        .map_err(|e| format!("{}: {e}", kernel.args))?;
    if args.verbose {
        println!(
            "testudo: {} with {} vCPUs and {} MiB, entered at {:#x}",
            kernel.args, args.vcpus, args.memory_mib, start.system.rip
        );
    }
    Ok(Shared {
        machine,
        backends,
        backend,
        cpuid,
        ram,
        lapics: Mutex::new(lapics.into_iter().map(Some).collect()),
        start,
        count_exits: args.stats,
        renew: args.renew,
        stats: Mutex::new(ExitStats::default()),
        ticks: AtomicU64::new(0),
        output,
        stop: Mutex::new(None),
    })
}

/// Runs all vCPUs until their machines stop; the status is that of the first guest that did not end well.
fn run(guests: &'static [Shared], args: &Args<'_>) -> u8 {
    // What is typed is for the first guest.
    host::attach_console(|byte| {
        if let Some(first) = GUESTS.get().and_then(|guests| guests.first())
            && !first.backends.type_character(byte)
        {
            first.machine.console_input(&[byte]);
        }
    });
    let vcpus = args.vcpus * guests.len();
    if vcpus > 1 {
        let started = rt::cpu::start_all(|processor| {
            if let Some(guests) = GUESTS.get() {
                run_vcpu(guests, processor);
            }
        });
        if let Err(missing) = started {
            println!("testudo: {missing}");
            return 1;
        }
    }
    run_vcpu(guests, 0);
    while vcpus > 1 && rt::cpu::finished() + 1 < rt::cpu::count() {
        core::hint::spin_loop();
    }
    let statuses = guests.iter().map(|guest| finish(guest, args));
    statuses.fold(0, |first, status| if first == 0 { status } else { first })
}

/// Says what is to say when a guest has ended; gives its status.
fn finish(guest: &Shared, args: &Args<'_>) -> u8 {
    guest.output.finish();
    let Some(stop) = guest.stop.lock().take() else {
        return 1;
    };
    if args.stats {
        println!("{}", *guest.stats.lock());
        // Without waits, as long as there is one guest.
        let awake = guest
            .ticks
            .load(Ordering::Relaxed)
            .wrapping_sub(host::waited());
        if args.guests == 1 {
            println!("{:<18}{awake:>12}", "ticks not waited");
        }
        if let Some(figures) = guest.backend.shadow_figures() {
            println!("{figures}");
        }
    }
    guest.backends.finish(args.stats);
    if !stop.reason.is_orderly() || args.verbose {
        println!("testudo: {stop}");
    }
    stop.reason.status()
}

/// Runs the vCPU that is this processor's; processors that have none return at once.
fn run_vcpu(guests: &'static [Shared], processor: usize) {
    let vcpus = guests[0].lapics.lock().len();
    let Some(shared) = guests.get(processor / vcpus) else {
        return;
    };
    let id = processor % vcpus;
    let Some(lapic) = shared.lapics.lock()[id].take() else {
        return;
    };
    BareMetal::start_timer();
    let start = (id == 0).then_some(&shared.start);
    let guest = Guest {
        shared,
        lapic,
        start,
    };
    match shared.backend.run(id, &shared.cpuid, &shared.ram, guest) {
        Ok(stop) if id == 0 => *shared.stop.lock() = Some(stop),
        Ok(_) => {}
        Err(error) => println!("testudo: processor {processor}: {error}"),
    }
}

/// What runs on a processor, whatever makes it a virtual one.
struct Guest {
    shared: &'static Shared,
    lapic: Lapic,
    start: Option<&'static BootState>,
}

impl Work for Guest {
    fn apic_page(&self) -> Arc<ApicPage> {
        self.lapic.page().clone()
    }

    fn on<V: Vcpu>(self, vcpu: V) -> Stop {
        let shared = self.shared;
        let mut vcpu = VcpuLoop::new(&shared.machine, vcpu, self.lapic, self.start);
        if shared.count_exits {
            vcpu = vcpu.with_stats();
            host::count_waits();
        }
        if let Some(turns) = shared.renew {
            vcpu = vcpu.with_renewal(turns);
        }
        let start = rt::time::tsc();
        let stop = vcpu.run();
        let ticks = rt::time::tsc().wrapping_sub(start);
        shared.ticks.fetch_add(ticks, Ordering::Relaxed);
        if shared.renew.is_some() {
            let renewals = vcpu.renewals();
            println!(
                "testudo: nested state saved and restored {} times, {} of them while a nested guest ran",
                renewals.all, renewals.within_guest
            );
        }
        if let Some(stats) = vcpu.stats() {
            shared.stats.lock().add(&stats);
        }
        stop
    }
}
