//! `cargo xtask measure`: what the hypervisor costs, in instructions.

mod bluepill;
mod nested;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::boot::{Backend, HYPERVISOR, Paging, machine_memory};
use crate::bare::{self, Payload};
use crate::debian;
use crate::emulator::{Cpu, Kind, Machine, Program};
use crate::initrd::Initrd;
use crate::{run, workplace};

/// A guest that says this line has reached its first process.
const MARK: &str = "testudo: the first process runs";
/// How the hypervisor names the ticks that its guest did not wait.
const TICKS: &str = "ticks not waited";
/// Long enough for the slowest machine that runs emulators at all.
const PATIENCE: Duration = Duration::from_secs(1800);

/// Measure what the hypervisor costs, in instructions
#[derive(clap::Args)]
pub(crate) struct Measure {
    #[command(subcommand)]
    what: What,
    /// What makes the guest's processors
    #[arg(long, value_enum, default_value = "svm", global = true)]
    backend: Backend,
    /// Print one flat JSON object
    #[arg(long, global = true)]
    json: bool,
    /// Show what is executed
    #[arg(short, long, global = true)]
    verbose: bool,
}

#[derive(clap::Subcommand)]
enum What {
    /// Exit and resume, by kind of exit, as a guest sees it
    Exits,
    /// A Linux boot to its first process under the hypervisor, against the same without it
    Boot {
        /// How the guest's memory is put behind its paging; shadow is compared with nested too
        #[arg(long, value_enum, default_value = "nested")]
        paging: Paging,
    },
    /// What a hypervisor that is the guest pays: entries and exits of its guest, and a Linux boot in it
    Nested {
        /// Measure this hypervisor too, in our place
        #[arg(long, value_enum)]
        peer: Option<nested::Peer>,
        /// Leave out the boots, which take minutes
        #[arg(long)]
        no_boots: bool,
    },
    /// A Linux boot to its first process on a machine whose hypervisor started first, against the same without it
    Bluepill,
}

impl Measure {
    pub(crate) fn run(&self) -> Result<u8> {
        run::set_verbose(self.verbose);
        let figures = match self.what {
            What::Exits => self.exits()?,
            What::Boot { paging } => self.boot(paging)?,
            What::Nested { peer, no_boots } => nested::figures(self.backend, peer, !no_boots)?,
            What::Bluepill => bluepill::figures(self.backend)?,
        };
        if self.json {
            let members: Vec<String> = figures
                .iter()
                .map(|(name, value)| format!("\"{name}\":{value}"))
                .collect();
            println!("{{{}}}", members.join(","));
        } else {
            for (name, value) in figures {
                println!("{name} {value}");
            }
        }
        Ok(0)
    }

    /// Runs the guest `meter` under the hypervisor, and the world switch by itself.
    fn exits(&self) -> Result<Vec<(String, String)>> {
        const MEMORY: u64 = 64;
        let cpu = self.backend.cpu()?;
        let machine = || Machine {
            cpu,
            exact: true,
            ..Machine::new(self.backend.emulator())
        };
        let payload = Payload {
            command_line: format!("memory={MEMORY} vcpus=1 -- "),
            modules: vec![("kernel meter".into(), fs::read(bare::build("meter")?)?)],
        };
        let mut under = machine();
        under.memory = machine_memory(1, MEMORY, &payload);
        let mut figures = figures_of(under, &bare::build(HYPERVISOR)?, &payload)?;
        if cpu == Cpu::Svm {
            let alone = Payload {
                command_line: String::new(),
                modules: Vec::new(),
            };
            let program = bare::build_binary("meter", "switch-cost")?;
            figures.extend(figures_of(machine(), &program, &alone)?);
        }
        Ok(figures)
    }

    /// Boots Linux twice, or for shadow paging three times, and compares the instructions that the
    /// emulator executed in all.
    fn boot(&self, paging: Paging) -> Result<Vec<(String, String)>> {
        if self.backend.emulator() == Kind::Bochs {
            return self.boot_by_ticks(paging);
        }
        let boots = LinuxBoots::new()?;
        let direct = boots.without()?;
        let memory = machine_memory(1, LinuxBoots::MEMORY, &boots.payload);
        let under = |paging: Paging| {
            let word = paging.word();
            run::progress(format_args!("booting under the hypervisor,{word}"));
            let words = format!("memory={} vcpus=1{word} -- ", LinuxBoots::MEMORY);
            boots.under(HYPERVISOR, &words, memory)
        };
        let count = under(paging)?;
        let mut figures = compared(count, direct);
        if paging == Paging::Shadow {
            let nested = under(Paging::Nested)?;
            figures.push(("ratio_nested".into(), ratio(count, nested)));
            figures.push(("instructions_nested".into(), nested.to_string()));
        }
        Ok(figures)
    }

    /// The same on Bochs, which counts for nobody: a tick of the time-stamp counter is an instruction
    /// there, unless the processor waits, and the hypervisor says how many there were.
    fn boot_by_ticks(&self, paging: Paging) -> Result<Vec<(String, String)>> {
        let boots = LinuxBoots::new()?;
        let under = |paging: Paging| {
            let word = paging.word();
            run::progress(format_args!("booting under the hypervisor,{word}"));
            boots.ticks(self.backend, word)
        };
        let count = under(paging)?;
        let mut figures = vec![("instructions".into(), count.to_string())];
        if paging == Paging::Shadow {
            let nested = under(Paging::Nested)?;
            figures.push(("ratio_nested".into(), ratio(count, nested)));
            figures.push(("instructions_nested".into(), nested.to_string()));
        }
        Ok(figures)
    }
}

/// A Linux that boots to its first process, to be counted.
struct LinuxBoots {
    kernel: PathBuf,
    initrd: PathBuf,
    payload: Payload,
    modules: PathBuf,
    folder: workplace::RunFolder,
}

impl LinuxBoots {
    /// Its memory in MiB.
    const MEMORY: u64 = 512;
    const COMMAND_LINE: &str = "console=ttyS0 quiet";

    fn new() -> Result<Self> {
        let kernel = debian::kernel()?;
        // The first process says that it runs, ends a guest by its debug-exit port, and otherwise halts.
        let script = format!(
            "#!/bin/busybox sh\n\
             echo '{MARK}'\n\
             /bin/exit-port 0\n\
             /bin/busybox halt -f\n",
        );
        let disk = Initrd {
            init: Some(script),
            ..Initrd::default()
        }
        .build(&kernel)?;
        let image = fs::read(&kernel.image).context("cannot read the kernel")?;
        let folder = workplace::RunFolder::new()?;
        let (initrd, modules) = (folder.file("initrd"), folder.file("modules"));
        fs::write(&initrd, &disk)?;
        let payload = Payload {
            command_line: String::new(),
            modules: vec![
                ("kernel vmlinuz".into(), image),
                ("initrd default".into(), disk),
            ],
        };
        fs::write(&modules, payload.container(false))?;
        Ok(Self {
            kernel: kernel.image,
            initrd,
            payload,
            modules,
            folder,
        })
    }

    fn machine(memory: u64) -> Machine {
        Machine {
            memory,
            exact: true,
            timeout: Some(PATIENCE),
            ..Machine::new(Kind::Qemu)
        }
    }

    /// The instructions of a boot on the machine itself.
    fn without(&self) -> Result<u64> {
        run::progress("booting without the hypervisor");
        let program = Program {
            kernel: self.kernel.clone(),
            initrd: Some(self.initrd.clone()),
            command_line: Self::COMMAND_LINE.into(),
        };
        Self::machine(Self::MEMORY).count(&program, MARK)
    }

    /// The instructions of a boot by a hypervisor, with these words before the kernel's.
    fn under(&self, hypervisor: &str, words: &str, memory: u64) -> Result<u64> {
        let program = Program {
            kernel: bare::build(hypervisor)?,
            initrd: Some(self.modules.clone()),
            command_line: format!("{words}{}", Self::COMMAND_LINE),
        };
        Self::machine(memory).count(&program, MARK)
    }

    /// The ticks that a boot takes by the hypervisor's own account, waits apart.
    fn ticks(&self, backend: Backend, word: &str) -> Result<u64> {
        let payload = Payload {
            command_line: format!(
                "memory={} vcpus=1{word} stats -- {}",
                Self::MEMORY,
                Self::COMMAND_LINE
            ),
            modules: self.payload.modules.clone(),
        };
        let console = self.folder.file("console");
        let machine = Machine {
            cpu: backend.cpu()?,
            memory: machine_memory(1, Self::MEMORY, &payload),
            exact: true,
            timeout: Some(PATIENCE),
            capture: Some(console.clone()),
            ..Machine::new(backend.emulator())
        };
        let status = machine.run(&bare::build(HYPERVISOR)?, &payload)?;
        let shown = String::from_utf8_lossy(&fs::read(&console)?).into_owned();
        let ticks = shown
            .lines()
            .find_map(|line| line.trim().strip_prefix(TICKS)?.trim().parse().ok())
            .filter(|_| status == 0 && shown.contains(MARK));
        ticks.with_context(|| format!("status {status}, and no count in\n{}", shown.trim_end()))
    }
}

fn ratio(count: u64, against: u64) -> String {
    format!("{:.3}", count as f64 / against as f64)
}

fn compared(count: u64, direct: u64) -> Vec<(String, String)> {
    vec![
        ("ratio".into(), ratio(count, direct)),
        ("instructions".into(), count.to_string()),
        ("instructions_direct".into(), direct.to_string()),
    ]
}

/// Runs a program to its end and takes the figures from its output.
fn figures_of(
    machine: Machine,
    program: &Path,
    payload: &Payload,
) -> Result<Vec<(String, String)>> {
    Ok(run_meter(machine, program, payload)?.0)
}

/// As [`figures_of`], with the output.
fn run_meter(
    mut machine: Machine,
    program: &Path,
    payload: &Payload,
) -> Result<(Vec<(String, String)>, String)> {
    let folder = workplace::RunFolder::new()?;
    let console = folder.file("console");
    machine.capture = Some(console.clone());
    machine.timeout = Some(PATIENCE);
    let status = machine.run(program, payload)?;
    let output = String::from_utf8_lossy(&fs::read(&console)?).into_owned();
    if status != 0 {
        bail!(
            "the measuring program ended with status {status}:\n{}",
            output.trim_end()
        );
    }
    Ok((figures_in(&output)?, output))
}

/// The figures in the output of a measuring program.
fn figures_in(output: &str) -> Result<Vec<(String, String)>> {
    let figures: Vec<(String, String)> = output.lines().filter_map(figure).collect();
    if figures.is_empty() {
        bail!(
            "the measuring program gave no figures:\n{}",
            output.trim_end()
        );
    }
    Ok(figures)
}

/// A line `NAME NUMBER`.
fn figure(line: &str) -> Option<(String, String)> {
    let (name, value) = line.trim().split_once(' ')?;
    let is_name = !name.is_empty() && name.chars().all(|c| c.is_ascii_lowercase() || c == '_');
    value.parse::<u64>().ok().filter(|_| is_name)?;
    Some((name.to_owned(), value.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_told_from_other_lines() {
        assert_eq!(
            figure("hlt_wake 120\r"),
            Some(("hlt_wake".into(), "120".into()))
        );
        for other in ["", "cpuid", "cpuid x", "CPUID 5", "test rt ... ok", "1 2"] {
            assert_eq!(figure(other), None, "{other}");
        }
    }
}
