//! `cargo xtask boot`: a guest kernel on a hypervisor made of the project's crates.

use std::fs;
use std::io::IsTerminal;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::bare::{self, Payload};
use crate::debian;
use crate::emulator::{Cpu, Kind, Machine};
use crate::initrd::Initrd;
use crate::run;

/// The hypervisor's package.
pub(super) const HYPERVISOR: &str = "linux-vmm";
/// Memory in MiB that the hypervisor has beyond its guest's.
const OWN_MEMORY: u64 = 192;
/// MiB below 4 GiB that a PC leaves to devices; a large guest's memory must fit above it in one piece.
const BELOW_4G: u64 = 3584;

/// What makes the guest's processors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Backend {
    /// AMD-V
    Svm,
    /// Intel VT-x
    Vmx,
    /// Linux's /dev/kvm
    Kvm,
}

impl Backend {
    /// The processor that it needs.
    pub(super) fn cpu(self) -> Result<Cpu> {
        match self {
            Self::Svm => Ok(Cpu::Svm),
            Self::Vmx => bail!("--backend vmx is not in this version yet; there is svm"),
            Self::Kvm => bail!("--backend kvm is not in this version yet; there is svm"),
        }
    }

    /// The emulator that has this processor.
    pub(super) fn emulator(self) -> Kind {
        match self {
            Self::Svm | Self::Kvm => Kind::Qemu,
            Self::Vmx => Kind::Bochs,
        }
    }
}

/// Boot a guest kernel on a bare-metal hypervisor made of the project's crates.
///
/// Without --kernel, Debian's own kernel for virtual machines is fetched, checked and booted. The exit
/// status is the guest's: what it writes to the debug-exit port 0xf4, or 0 when it powers off.
#[derive(clap::Args)]
pub(crate) struct Boot {
    /// What makes the guest's processors
    #[arg(long, value_enum, default_value = "svm")]
    backend: Backend,
    /// What emulates the processor that the hypervisor runs on [default: qemu for svm, bochs for vmx]
    #[arg(long, value_enum)]
    emulator: Option<Kind>,
    /// The guest's kernel: a bzImage, or an ELF file with a PVH note or a Multiboot header
    #[arg(long, value_name = "FILE")]
    kernel: Option<String>,
    /// An initial RAM disk, or for a Multiboot kernel a module with its arguments ("FILE ARGS")
    #[arg(long, value_name = "FILE")]
    initrd: Vec<String>,
    /// The guest's command line [default: console=ttyS0, and quiet with --run]
    #[arg(long, value_name = "STR", allow_hyphen_values = true)]
    cmdline: Option<String>,
    /// The guest's memory in MiB
    #[arg(long, value_name = "MIB", default_value_t = 512)]
    memory: u64,
    /// The guest's virtual processors
    #[arg(long, value_name = "N", default_value_t = 1)]
    vcpus: u32,
    /// The machine's processors [default: as many as the guest's]
    #[arg(long, value_name = "N")]
    processors: Option<u32>,
    /// Shell commands to run in the default initial RAM disk; their status is the exit status
    #[arg(long, value_name = "SHELL COMMANDS")]
    run: Option<String>,
    /// A kernel module that the default initial RAM disk loads first
    #[arg(long = "module", value_name = "NAME")]
    modules: Vec<String>,
    /// Print the exits by reason when the guest has ended
    #[arg(long)]
    stats: bool,
    /// End the run after this time, with status 124
    #[arg(long, value_name = "SECS")]
    timeout: Option<f64>,
    /// Count instructions as time, so that a run can be repeated exactly
    #[arg(long)]
    exact: bool,
    /// Show what is executed
    #[arg(short, long)]
    verbose: bool,
}

impl Boot {
    pub(crate) fn run(&self) -> Result<u8> {
        run::set_verbose(self.verbose);
        let cpu = self.backend.cpu()?;
        if self.run.is_some() && !self.initrd.is_empty() {
            bail!("--run needs the default initial RAM disk, and --initrd replaces it");
        }
        if self.vcpus == 0 || self.memory == 0 {
            bail!("a guest has at least one processor and some memory");
        }
        let timeout = self
            .timeout
            .map(|seconds| Duration::try_from_secs_f64(seconds).context("--timeout takes seconds"))
            .transpose()?;
        let payload = self.payload()?;
        let program = bare::build(HYPERVISOR)?;
        let machine = Machine {
            cpu,
            processors: self.processors.unwrap_or(self.vcpus),
            memory: machine_memory(self.memory),
            exact: self.exact,
            input: self.run.is_none(),
            timeout,
            ..Machine::new(self.emulator.unwrap_or(self.backend.emulator()))
        };
        if self.run.is_none() && self.kernel.is_none() && std::io::stdin().is_terminal() {
            run::progress("booting to a shell; Ctrl-A X ends the emulator");
        }
        machine.run(&program, &payload)
    }

    /// The hypervisor's command line and modules.
    fn payload(&self) -> Result<Payload> {
        let mut modules = Vec::new();
        let mut command_line = format!("memory={} vcpus={}", self.memory, self.vcpus);
        if self.stats {
            command_line.push_str(" stats");
        }
        let quiet = if self.run.is_some() { " quiet" } else { "" };
        match &self.cmdline {
            Some(line) => command_line.push_str(&format!(" -- {line}")),
            None => command_line.push_str(&format!(" -- console=ttyS0{quiet}")),
        }

        let given = self
            .kernel
            .as_ref()
            .map(|file| Ok::<_, anyhow::Error>((file, read(file)?)))
            .transpose()?;
        // A Linux kernel without a RAM disk gets ours; what other kernels take as modules is theirs to say.
        let is_linux = given
            .as_ref()
            .is_none_or(|(_, data)| data.get(0x202..0x206) == Some(b"HdrS"));
        let distribution =
            if given.is_none() || self.initrd.is_empty() && (is_linux || self.run.is_some()) {
                Some(debian::kernel()?)
            } else {
                None
            };
        match (given, &distribution) {
            (Some((file, data)), _) => modules.push((format!("kernel {file}"), data)),
            (None, Some(kernel)) => {
                let file = kernel.image.to_string_lossy();
                modules.push((format!("kernel {file}"), read(&file)?));
            }
            (None, None) => bail!("there is no kernel to boot"),
        }
        for string in &self.initrd {
            let file = string.split(' ').next().unwrap_or(string);
            modules.push((format!("initrd {string}"), read(file)?));
        }
        if self.initrd.is_empty()
            && let Some(kernel) = &distribution
        {
            let initrd = Initrd {
                run: self.run.clone(),
                load: self.modules.clone(),
                ..Initrd::default()
            };
            modules.push(("initrd default".into(), initrd.build(kernel)?));
        }
        Ok(Payload {
            command_line,
            modules,
        })
    }
}

fn read(file: &str) -> Result<Vec<u8>> {
    fs::read(Path::new(file)).with_context(|| format!("cannot read {file}"))
}

/// The memory in MiB of a machine whose hypervisor can give its guest `guest` MiB in one piece.
pub(super) fn machine_memory(guest: u64) -> u64 {
    let needed = guest.saturating_add(OWN_MEMORY);
    if needed > BELOW_4G / 2 {
        needed.saturating_add(BELOW_4G)
    } else {
        needed
    }
}
