//! `cargo xtask measure nested`: what a hypervisor that is the guest pays.
//!
//! # VMRUN, #VMEXIT and their number
//!
//! A tiny hypervisor (`examples/meter`) runs as the guest, and its guest does nothing but exit. `vmrun` is
//! from its VMRUN or VMRESUME to its guest's first instruction, `vmexit` from its guest's last instruction
//! to its own next. `exits_per_l2_exit` is how often the processor left a guest, whichever, for one exit of
//! that guest: of two runs of different lengths the difference is taken, so that what happens once does not
//! count. The tiny hypervisor executes one SVM or VMX instruction that traps for each of those exits, and
//! on VT-x further VMREADs and VMWRITEs, `accesses_per_l2_exit` of which exit.
//!
//! # Boots
//!
//! The same kernel, RAM disk, command line and memory in different places, counted from the first
//! instruction of the unpacked kernel to the first one of its first process. Nothing in a guest counts:
//! the emulator stops at the two addresses and says how many instructions were executed, whoever's.
//!
//! | figure | the kernel is the guest of |
//! | --- | --- |
//! | `boot_l1` | our hypervisor |
//! | `boot_l1_kvm` | KVM with QEMU, on the machine itself (on AMD-V) |
//! | `boot_l2` | KVM with QEMU, on our hypervisor |
//! | `boot_l2_shadow` | the same, with shadow page tables of KVM's on our nested ones |
//! | `boot_l2_shadow_on_shadow` | the same, with ours made from them |
//!
//! `boot_ratio` is `boot_l2` to `boot_l1`: the same kernel one level deeper. Its devices are then QEMU's, with
//! QEMU's costs, and no longer ours. `boot_ratio_below_kvm` compares what differs in one thing only, what is
//! below KVM: `boot_l2` to `boot_l1_kvm`. `boot_ratio_shadow` is `boot_l2_shadow` to `boot_l1`, and so on.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use super::{LinuxBoots, PATIENCE, figures_of, ratio};
use crate::bare::{self, Payload};
use crate::command::boot::{Backend, HYPERVISOR, Paging, machine_memory};
use crate::command::nested::{self, System};
use crate::debian::{self, Kernel};
use crate::emulator::{Cpu, Image, Kind, Machine, Program, linux_clock};
use crate::initrd::Initrd;
use crate::run;
use crate::workplace::RunFolder;

/// Whom to compare with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Peer {
    /// Debian's KVM in our place
    Kvm,
}

type Figures = Vec<(String, String)>;

/// Memory of the tiny hypervisor in MiB.
const MEMORY: u64 = 64;
/// Rounds of the runs whose exits are counted.
const ROUNDS: [u64; 2] = [1000, 3000];

pub(super) fn figures(backend: Backend, peer: Option<Peer>, boots: bool) -> Result<Figures> {
    let meter = Meter::new(backend)?;
    let mut figures = meter.under_us(1000, "")?.0;
    let directly = figures_of(meter.machine(), &meter.program, &no_payload())?;
    let directly = directly.into_iter().map(|(n, v)| (n + "_directly", v));
    figures.extend(directly);
    figures.extend(meter.exits()?);
    if peer.is_some() {
        figures.extend(meter.under_kvm()?);
    }
    if boots {
        figures.extend(Boots::new(backend)?.figures()?);
    }
    Ok(figures)
}

fn no_payload() -> Payload {
    Payload {
        command_line: String::new(),
        modules: Vec::new(),
    }
}

/// The tiny hypervisor.
struct Meter {
    backend: Backend,
    cpu: Cpu,
    program: PathBuf,
}

impl Meter {
    fn new(backend: Backend) -> Result<Self> {
        let cpu = backend.cpu()?;
        let binary = match cpu {
            Cpu::Svm => "nested-cost",
            Cpu::Vmx => "nested-cost-vmx",
        };
        Ok(Self {
            backend,
            cpu,
            program: bare::build_binary("meter", binary)?,
        })
    }

    fn machine(&self) -> Machine {
        Machine {
            cpu: self.cpu,
            exact: true,
            timeout: Some(PATIENCE),
            ..Machine::new(self.backend.emulator())
        }
    }

    /// Its figures as our guest, and the table of exits if `words` ask for it.
    fn under_us(&self, rounds: u64, words: &str) -> Result<(Figures, String)> {
        let payload = Payload {
            command_line: format!("memory={MEMORY} vcpus=1 nested{words} -- rounds={rounds}"),
            modules: vec![("kernel meter".into(), fs::read(&self.program)?)],
        };
        let mut machine = self.machine();
        machine.memory = machine_memory(1, MEMORY, &payload);
        super::run_meter(machine, &bare::build(HYPERVISOR)?, &payload)
    }

    /// How many exits there are for each of its guest's.
    fn exits(&self) -> Result<Figures> {
        let [few, many] = ROUNDS.map(|rounds| -> Result<ExitTable> {
            let (_, output) = self.under_us(rounds, " stats")?;
            ExitTable::in_output(&output).context("the hypervisor gave no table of exits")
        });
        let (few, many) = (few?, many?);
        let rounds = ROUNDS[1] - ROUNDS[0];
        let seen = many.reflected.saturating_sub(few.reflected);
        if seen != rounds {
            bail!("{seen} exits to the guest hypervisor in {rounds} rounds");
        }
        let per_round = |few: u64, many: u64| ratio(many.saturating_sub(few), rounds);
        let mut figures = vec![("exits_per_l2_exit".into(), per_round(few.all, many.all))];
        if self.cpu == Cpu::Vmx {
            let accesses = per_round(few.accesses, many.accesses);
            figures.push(("accesses_per_l2_exit".into(), accesses));
        }
        Ok(figures)
    }

    /// What a Linux that has the machine to itself is told of its clock.
    fn clock(&self) -> String {
        match self.backend.emulator() {
            Kind::Bochs => linux_clock(),
            Kind::Qemu => String::new(),
        }
    }

    /// Its figures as a guest of KVM's with QEMU.
    fn under_kvm(&self) -> Result<Figures> {
        run::progress("measuring KVM in our place");
        let kernel = debian::kernel()?;
        let mut files = vec![(
            "guest/kernel".to_owned(),
            0o644,
            fs::read(&self.program).context("cannot read the meter")?,
        )];
        nested::add_qemu(&mut files)?;
        let guest = format!(
            "-m {MEMORY} -device isa-debug-exit,iobase=0xf4,iosize=1 -kernel /guest/kernel -append rounds=1000"
        );
        let disk = Initrd {
            run: Some(nested::kvm_script(false, &guest) + "exit 0\n"),
            carry: vec!["kvm_amd".to_owned(), "kvm_intel".to_owned()],
            files,
            ..Initrd::default()
        };
        let folder = RunFolder::new()?;
        let (initrd, console) = (folder.file("initrd"), folder.file("console"));
        fs::write(&initrd, disk.build(&kernel)?)?;
        let machine = Machine {
            memory: 768,
            capture: Some(console.clone()),
            ..self.machine()
        };
        machine.run_program(&Program {
            kernel: kernel.image,
            initrd: Some(initrd),
            command_line: "console=ttyS0 quiet".to_owned() + &self.clock(),
        })?;
        let output = String::from_utf8_lossy(&fs::read(&console)?).into_owned();
        let figures = super::figures_in(&output)?;
        let kvm = figures.into_iter().map(|(n, v)| (n + "_kvm", v));
        Ok(kvm.collect())
    }
}

/// The hypervisor's table of exits.
#[derive(Debug, Default, PartialEq, Eq)]
struct ExitTable {
    /// Those of the processor.
    all: u64,
    /// Those that a guest hypervisor saw of its guest's.
    reflected: u64,
    /// Those by its VMREAD and VMWRITE.
    accesses: u64,
}

impl ExitTable {
    /// Rows that count what no exit of the processor's began.
    const NO_EXITS: [&str; 5] = [
        "all",
        "delivery due",
        "entered halted",
        "nested event",
        super::TICKS,
    ];

    fn in_output(output: &str) -> Option<Self> {
        let mut lines = output.lines();
        lines.find(|line| line.starts_with("exit ") && line.contains("mean ticks"))?;
        let mut table = Self::default();
        for line in lines {
            // A name, which may have spaces in it, and a number.
            let Some(start) = line.find(|c: char| c.is_ascii_digit()) else {
                break;
            };
            let (name, rest) = (line[..start].trim_end(), &line[start..]);
            let count: u64 = rest.split_whitespace().next()?.parse().ok()?;
            if !Self::NO_EXITS.contains(&name) {
                table.all += count;
            }
            match name {
                "nested exit" => table.reflected = count,
                "VMREAD, VMWRITE" => table.accesses = count,
                _ => {}
            }
        }
        Some(table)
    }
}

/// Where the unpacked kernel's first instruction is, if it does not move (Linux, CONFIG_PHYSICAL_START).
pub(super) const KERNEL_START: u64 = 0x100_0000;
/// The address of the kernel is the same in each place.
pub(super) const COUNTED_WORDS: &str = " nokaslr";

/// Bochs's clock for boots: as on QEMU, an instruction takes a nanosecond. On a slower processor the timers'
/// interrupts would be a larger part of all.
const CLOCK_ON_BOCHS: &str = "cpu: ips=1000000000";

/// The boots that are compared.
struct Boots {
    backend: Backend,
    kernel: Kernel,
    /// Where the first process starts.
    end: u64,
    folder: RunFolder,
}

impl Boots {
    fn new(backend: Backend) -> Result<Self> {
        let first = bare::build("exit-port")?;
        Ok(Self {
            backend,
            kernel: debian::kernel()?,
            end: entry_of(&fs::read(first)?).context("the first process is no ELF file")?,
            folder: RunFolder::new()?,
        })
    }

    fn figures(&self) -> Result<Figures> {
        let l1 = self.under_us(&self.system(1, false)?, 1, "")?;
        let (nested, shadow) = (self.system(2, false)?, self.system(2, true)?);
        let on_shadow = " nested".to_owned() + Paging::Shadow.word();
        let l2 = self.under_us(&nested, 2, " nested")?;
        let l2_shadow = self.under_us(&shadow, 2, " nested")?;
        let l2_on_shadow = self.under_us(&shadow, 2, &on_shadow)?;
        let mut ratios = vec![
            ("boot_ratio", ratio(l2, l1)),
            ("boot_ratio_shadow", ratio(l2_shadow, l1)),
            ("boot_ratio_shadow_on_shadow", ratio(l2_on_shadow, l1)),
        ];
        let mut counts = vec![
            ("boot_l1", l1),
            ("boot_l2", l2),
            ("boot_l2_shadow", l2_shadow),
            ("boot_l2_shadow_on_shadow", l2_on_shadow),
        ];
        if self.backend.emulator() == Kind::Qemu {
            let l1_kvm = self.directly(&nested, 2)?;
            ratios.push(("boot_ratio_below_kvm", ratio(l2, l1_kvm)));
            counts.push(("boot_l1_kvm", l1_kvm));
        }
        let counts = counts.into_iter();
        let counts = counts.map(|(name, count)| (name, count.to_string()));
        let all = ratios.into_iter().chain(counts);
        Ok(all.map(|(name, value)| (name.to_owned(), value)).collect())
    }

    /// Systems in one another, the innermost of which ends with its first process.
    fn system(&self, depth: u32, shadow: bool) -> Result<System> {
        // The kernel runs the script's interpreter, so that is what executes the first instruction.
        let first = "#!/bin/exit-port 0\n".to_owned();
        nested::counted_system(&self.kernel, depth, shadow, first, COUNTED_WORDS)
    }

    /// The instructions of the innermost boot of so many, with our hypervisor below all of them.
    fn under_us(&self, system: &System, boots: usize, words: &str) -> Result<u64> {
        run::progress(format_args!(
            "booting under the hypervisor: {boots} deep{words}"
        ));
        let command_line = format!(
            "memory={} vcpus=1{words} -- {}",
            system.memory,
            Self::command_line()
        );
        let payload = Payload {
            command_line: command_line.clone(),
            modules: vec![
                ("kernel vmlinuz".into(), fs::read(&self.kernel.image)?),
                ("initrd disk".into(), system.disk.clone()),
            ],
        };
        let memory = machine_memory(1, system.memory, &payload);
        let kernel = bare::build(HYPERVISOR)?;
        if self.backend.emulator() == Kind::Bochs {
            return self.count_on_bochs(memory, &Image::BareMetal(&kernel, &payload), boots);
        }
        let modules = self.folder.file("modules");
        fs::write(&modules, payload.container(false))?;
        let program = Program {
            kernel,
            initrd: Some(modules),
            command_line,
        };
        self.count(memory, &program, boots)
    }

    /// The same with the machine itself below.
    fn directly(&self, system: &System, boots: usize) -> Result<u64> {
        run::progress(format_args!("booting on the machine itself: {boots} deep"));
        let initrd = self.folder.file("initrd");
        fs::write(&initrd, &system.disk)?;
        let program = Program {
            kernel: self.kernel.image.clone(),
            initrd: Some(initrd),
            command_line: Self::command_line(),
        };
        self.count(system.memory, &program, boots)
    }

    fn command_line() -> String {
        LinuxBoots::COMMAND_LINE.to_owned() + COUNTED_WORDS
    }

    fn count(&self, memory: u64, program: &Program, boots: usize) -> Result<u64> {
        let machine = LinuxBoots::machine(memory);
        between(&machine.counts_at(program, &self.addresses(boots))?)
    }

    fn count_on_bochs(&self, memory: u64, image: &Image<'_>, boots: usize) -> Result<u64> {
        let machine = Machine {
            cpu: self.backend.cpu()?,
            kind: Kind::Bochs,
            extra: vec![CLOCK_ON_BOCHS.to_owned()],
            ..LinuxBoots::machine(memory)
        };
        between(&machine.counts_at_on_bochs(image, &self.addresses(boots))?)
    }

    /// Where so many kernels start, and where the first process of the last one does.
    fn addresses(&self, boots: usize) -> Vec<u64> {
        let mut addresses = vec![KERNEL_START; boots];
        addresses.push(self.end);
        addresses
    }
}

/// What passed between the last two counts.
fn between(counts: &[u64]) -> Result<u64> {
    let [.., start, end] = counts[..] else {
        bail!("there are two addresses at least");
    };
    run::progress(format_args!("the kernel took {}", end - start));
    Ok(end - start)
}

/// The entry point of an ELF64 file.
pub(super) fn entry_of(file: &[u8]) -> Option<u64> {
    let entry = file
        .get(24..32)
        .filter(|_| file.starts_with(b"\x7FELF\x02"))?;
    Some(u64::from_le_bytes(entry.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exits_are_counted_from_the_table() {
        let output = "vmrun 1138\n\
            exit                     count   share    mean ticks\n\
            CPUID                       10    50.0 %          100\n\
            delivery due                 3    15.0 %          100\n\
            all                         20\n\
            ticks not waited        123456\n\
            nested entry              1000  (by the backend)\n\
            nested exit               1001  (by the backend)\n\
            VMREAD, VMWRITE             12  (by the backend)\n\
            testudo: the guest ended\n\
            CPUID 5\n";
        let expected = ExitTable {
            all: 10 + 1000 + 1001 + 12,
            reflected: 1001,
            accesses: 12,
        };
        assert_eq!(ExitTable::in_output(output), Some(expected));
        assert_eq!(ExitTable::in_output("nothing"), None);
    }

    #[test]
    fn entry_points_are_those_of_elf_files() {
        let mut file = [0; 64];
        file[..5].copy_from_slice(b"\x7FELF\x02");
        file[24..28].copy_from_slice(&[0, 0x10, 0, 0x50]);
        assert_eq!(entry_of(&file), Some(0x5000_1000));
        assert_eq!(entry_of(&file[..20]), None);
        assert_eq!(entry_of(&[0; 64]), None);
    }
}
