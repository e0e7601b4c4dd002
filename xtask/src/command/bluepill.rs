//! `cargo xtask bluepill`: a hypervisor that starts first, and a machine's own system on top of it.

use std::fs;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::boot::Backend;
use super::nested;
use crate::bare::{self, Payload};
use crate::debian;
use crate::emulator::{Kind, Loader, Machine, linux_clock};
use crate::initrd::Initrd;
use crate::run;

/// The hypervisor's package.
pub(super) const PILL: &str = "bluepill";
/// The program with which a guest asks for it.
const INFORMANT: &str = "pill-info";

/// Run a machine's own system as the guest of a hypervisor that started before it.
///
/// The hypervisor keeps a few MiB and passes on everything else: devices, interrupts, firmware tables, all
/// processors, and the virtualization extension. Debian's kernel boots on what is left. Without --run it
/// gives a shell. The exit status is the system's: what it writes to the debug-exit port 0xf4, or 0 when it
/// powers off.
#[derive(clap::Args)]
pub(crate) struct Bluepill {
    /// Which virtualization extension
    #[arg(long, value_enum, default_value = "svm")]
    backend: Backend,
    /// What emulates the machine [default: qemu for svm, bochs for vmx]
    #[arg(long, value_enum)]
    emulator: Option<Kind>,
    /// The machine's processors
    #[arg(long, visible_alias = "vcpus", value_name = "N", default_value_t = 1)]
    processors: u32,
    /// The machine's memory in MiB
    #[arg(long, value_name = "MIB")]
    memory: Option<u64>,
    /// Who loads the hypervisor
    #[arg(long, value_enum, default_value = "direct")]
    loader: Loader,
    /// The system's kernel: a bzImage, which gets the default initial RAM disk, or an ELF file with a PVH note or
    /// a Multiboot header, which gets none
    #[arg(long, value_name = "FILE", conflicts_with = "kvm")]
    kernel: Option<PathBuf>,
    /// The system's command line [default: console=ttyS0, quiet with --run, and
    /// what the emulator's clock needs]
    #[arg(long, value_name = "STR", allow_hyphen_values = true)]
    cmdline: Option<String>,
    /// Shell commands to run; their status is the exit status
    #[arg(long, value_name = "SHELL COMMANDS")]
    run: Option<String>,
    /// Have the system run KVM with a Linux in it, which --run is for then
    #[arg(long, conflicts_with = "no_nesting")]
    kvm: bool,
    /// Keep the virtualization extension from the system
    #[arg(long)]
    no_nesting: bool,
    /// After --run, print how often the hypervisor came in
    #[arg(long, requires = "run", conflicts_with = "kvm")]
    stats: bool,
    /// End the emulator after this time, with status 124
    #[arg(long, value_name = "SECS")]
    timeout: Option<f64>,
    /// Count instructions as time, so that a run can be repeated exactly
    #[arg(long)]
    exact: bool,
    /// Show what is executed
    #[arg(short, long)]
    verbose: bool,
}

/// Memory in MiB of a machine that runs Linux.
const MEMORY: u64 = 512;
/// What the hypervisor keeps, and what holds the files until they are where they belong.
const BESIDE: u64 = 64;

impl Bluepill {
    pub(crate) fn run(&self) -> Result<u8> {
        run::set_verbose(self.verbose);
        if self.processors == 0 {
            bail!("a machine has at least one processor");
        }
        let timeout = self
            .timeout
            .map(|seconds| Duration::try_from_secs_f64(seconds).context("--timeout takes seconds"))
            .transpose()?;
        let (needed, payload) = self.payload()?;
        let machine = Machine {
            cpu: self.backend.cpu()?,
            loader: self.loader,
            processors: self.processors,
            memory: self.memory.unwrap_or(self::memory(needed, &payload)),
            exact: self.exact,
            input: self.run.is_none(),
            timeout,
            guest_ends: true,
            ..Machine::new(self.emulator())
        };
        if self.run.is_none() && std::io::stdin().is_terminal() {
            run::progress("booting to a shell; Ctrl-A X ends the emulator");
        }
        machine.run(&bare::build(PILL)?, &payload)
    }

    /// The memory in MiB that the system needs, and what the hypervisor is given.
    fn payload(&self) -> Result<(u64, Payload)> {
        let mut payload = Payload {
            command_line: self.words(),
            modules: Vec::new(),
        };
        if let Some(file) = &self.kernel {
            let image =
                fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
            let is_linux = image.get(0x202..0x206) == Some(b"HdrS");
            payload
                .modules
                .push((format!("kernel {}", file.display()), image));
            if !is_linux {
                return Ok((MEMORY, payload));
            }
        }
        let kernel = debian::kernel()?;
        let (memory, disk) = if self.kvm {
            let system = nested::kvm_system(&kernel, self.processors, self.run.as_deref())?;
            (system.memory, system.disk)
        } else {
            (MEMORY, self.disk(&kernel)?)
        };
        if payload.modules.is_empty() {
            let image = fs::read(&kernel.image)?;
            payload.modules.push(("kernel vmlinuz".to_owned(), image));
        }
        payload.modules.push(("initrd default".to_owned(), disk));
        Ok((memory, payload))
    }

    /// The hypervisor's command line, and after it the system's.
    fn words(&self) -> String {
        let nesting = if self.no_nesting { "no-nesting " } else { "" };
        let quiet = if self.run.is_some() { " quiet" } else { "" };
        let guest = match &self.cmdline {
            Some(line) => line.clone(),
            None => format!("console=ttyS0{quiet}{}", self.clock()),
        };
        format!("{nesting}-- {guest}")
    }

    /// The emulated machine's clocks must agree for a system that has them to itself.
    fn clock(&self) -> String {
        match (self.emulator(), self.backend) {
            (Kind::Bochs, Backend::Vmx) => linux_clock(),
            _ => String::new(),
        }
    }

    fn emulator(&self) -> Kind {
        self.emulator.unwrap_or(self.backend.emulator())
    }

    fn disk(&self, kernel: &debian::Kernel) -> Result<Vec<u8>> {
        let run = self.run.as_ref().map(|commands| {
            if self.stats {
                format!("(\n{commands}\n)\nstatus=$?\n{INFORMANT}\nexit $status\n")
            } else {
                commands.clone()
            }
        });
        let informant = fs::read(bare::build(INFORMANT)?)?;
        Initrd {
            run,
            carry: vec!["kvm_amd".to_owned(), "kvm_intel".to_owned()],
            files: vec![(format!("bin/{INFORMANT}"), 0o755, informant)],
            ..Initrd::default()
        }
        .build(kernel)
    }
}

/// The memory in MiB of a machine whose system has `needed` of it.
pub(super) fn memory(needed: u64, payload: &Payload) -> u64 {
    needed + BESIDE + (payload.size() >> 20)
}
