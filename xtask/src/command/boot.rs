//! `cargo xtask boot`: a guest kernel on a hypervisor made of the project's crates.

use std::fs;
use std::io::IsTerminal;
use std::num::NonZeroU64;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::devices::Devices;
use crate::bare::{self, Payload};
use crate::debian;
use crate::emulator::{Cpu, Kind, Machine, Program, of_model};
use crate::initrd::Initrd;
use crate::run;
use crate::workplace::RunFolder;

/// The hypervisor's package.
pub(super) const HYPERVISOR: &str = "linux-vmm";
/// Memory in MiB that the hypervisor has beyond its guest's.
const OWN_MEMORY: u64 = 192;
/// How much longer than its guest the emulator may run.
const GRACE: Duration = Duration::from_secs(20);
/// How many seconds of an idle to moderately busy machine 10⁹ instructions take at most.
const SLOWEST: u32 = 15;
/// MiB of memory that a PC has below 4 GiB; a larger guest's must fit above it in one piece.
const BELOW_4G: u64 = 3072;

/// What makes the guest's processors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Backend {
    /// AMD-V
    Svm,
    /// Intel VT-x
    Vmx,
    /// Linux's /dev/kvm
    Kvm,
    /// No hypervisor: the kernel on the emulator itself, for comparison
    None,
}

impl Backend {
    /// The processor that it needs.
    pub(super) fn cpu(self) -> Result<Cpu> {
        match self {
            Self::Svm => Ok(Cpu::Svm),
            Self::Vmx => Ok(Cpu::Vmx),
            Self::None => bail!("without a hypervisor there is nothing to run here"),
            Self::Kvm => bail!("--backend kvm is not in this version yet; there are svm and vmx"),
        }
    }

    /// The emulator that has this processor.
    pub(super) fn emulator(self) -> Kind {
        match self {
            Self::Svm | Self::Kvm | Self::None => Kind::Qemu,
            Self::Vmx => Kind::Bochs,
        }
    }
}

/// How a guest's memory is put behind its own paging.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Paging {
    /// By the processor: NPT or EPT
    Nested,
    /// By tables that the hypervisor makes from the guest's
    Shadow,
}

impl Paging {
    /// The hypervisor's argument.
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Nested => " paging=nested",
            Self::Shadow => " paging=shadow",
        }
    }

    /// The hypervisor's argument for guests of which each has one of these, and the rest the last.
    pub(super) fn words(each: &[Self]) -> String {
        let Some((first, others)) = each.split_first() else {
            return String::new();
        };
        let mut words = first.word().to_owned();
        for other in others {
            words.push_str(match other {
                Self::Nested => ",nested",
                Self::Shadow => ",shadow",
            });
        }
        words
    }
}

/// The hypervisor's argument for sharing pages, of which so many are looked at in a second.
pub(super) fn share_words(pages: NonZeroU64) -> String {
    format!(" share-pages={pages}")
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
    /// Another processor model of Bochs
    #[arg(long, value_name = "MODEL")]
    model: Option<String>,
    /// The guest's kernel: a bzImage, or an ELF file with a PVH note or a Multiboot header
    #[arg(long, value_name = "FILE")]
    kernel: Option<String>,
    /// An initial RAM disk, or for a Multiboot kernel a module with its arguments ("FILE ARGS")
    #[arg(long, value_name = "FILE")]
    initrd: Vec<String>,
    /// The guest's command line [default: console=ttyS0, and quiet with --run]
    #[arg(long, value_name = "STR", allow_hyphen_values = true)]
    cmdline: Option<String>,
    /// How many such guests run side by side; each line says whose it is
    #[arg(long, value_name = "N", default_value_t = 1)]
    guests: u32,
    /// The memory of each guest in MiB
    #[arg(long, value_name = "MIB", default_value_t = 512)]
    memory: u64,
    /// The virtual processors of each guest
    #[arg(long, value_name = "N", default_value_t = 1)]
    vcpus: u32,
    /// The machine's processors [default: as many as the guests']
    #[arg(long, value_name = "N")]
    processors: Option<u32>,
    /// Shell commands to run in the default initial RAM disk; their status is the exit status
    #[arg(long, value_name = "SHELL COMMANDS")]
    run: Option<String>,
    /// A kernel module that the default initial RAM disk loads first
    #[arg(long = "module", value_name = "NAME")]
    modules: Vec<String>,
    /// Let the guest be a hypervisor itself
    #[arg(long)]
    nested: bool,
    /// On VT-x, offer it enlightened VMCSs by Hyper-V's interface
    #[arg(long, requires = "nested")]
    enlightened: bool,
    /// How the memory of each guest is put behind its paging [default: nested where the processor can]
    #[arg(long, value_enum, value_name = "PAGING", value_delimiter = ',')]
    paging: Vec<Paging>,
    /// Back pages that hold the same by one frame until one is written, among all guests, looking at so many
    /// pages of each guest in a second. Not for guests that distrust one another: by the time that a
    /// write takes, one finds out what the other has in memory
    #[arg(long, value_name = "PAGES", num_args = 0..=1, default_missing_value = "10000")]
    share_pages: Option<NonZeroU64>,
    /// Have the emulated processor lack nested paging
    #[arg(long)]
    no_nested_paging: bool,

    #[command(flatten)]
    devices: Devices,
    /// Print the exits by reason when the guest has ended
    #[arg(long)]
    stats: bool,
    /// End the run after this time, with status 124; with --exact, after as many times 10⁹ instructions
    #[arg(long, value_name = "SECS")]
    timeout: Option<f64>,
    /// Count instructions as time and start at a fixed date, so that a run can be repeated exactly
    #[arg(long)]
    exact: bool,
    /// Show what is executed
    #[arg(short, long)]
    verbose: bool,
}

/// The hypervisor's argument for the machine's time limit. The hypervisor ends the run by itself and shows
/// where the guest was; only if it cannot, the emulator is ended, for which the machine's limit is extended.
pub(super) fn limit(machine: &mut Machine) -> String {
    let Some(timeout) = &mut machine.timeout else {
        return String::new();
    };
    let argument = format!(" timeout={}", timeout.as_secs_f64().ceil());
    if machine.exact && machine.kind == Kind::Qemu {
        *timeout *= SLOWEST;
    }
    *timeout += GRACE;
    argument
}

impl Boot {
    pub(crate) fn run(&self) -> Result<u8> {
        run::set_verbose(self.verbose);
        if self.run.is_some() && !self.initrd.is_empty() {
            bail!("--run needs the default initial RAM disk, and --initrd replaces it");
        }
        if self.guests == 0 || self.vcpus == 0 || self.memory == 0 {
            bail!("there is at least one guest, with at least one processor and some memory");
        }
        if self.devices.joins_guests() && self.guests < 2 {
            bail!("--net switch joins the guests of --guests, and there is one");
        }
        let timeout = self
            .timeout
            .map(|seconds| Duration::try_from_secs_f64(seconds).context("--timeout takes seconds"))
            .transpose()?;
        let cpu = match self.backend {
            Backend::None => Cpu::Svm,
            backend => backend.cpu()?,
        };
        let mut devices = self.devices.plan()?;
        if self.backend == Backend::None {
            if self.guests > 1 {
                bail!("without a hypervisor there is one system only");
            }
            if self.devices.asked_for() {
                bail!("without a hypervisor nobody makes virtio devices");
            }
            devices.drivers.clear();
        }
        let guest = self.guest(&devices.drivers)?;
        let kind = self.emulator.unwrap_or(self.backend.emulator());
        let mut machine = Machine {
            cpu,
            extra: of_model(kind, self.model.as_deref())?,
            nested_paging: !self.no_nested_paging,
            processors: self
                .processors
                .unwrap_or(self.vcpus.saturating_mul(self.guests)),
            memory: self.memory,
            exact: self.exact,
            input: self.run.is_none(),
            timeout,
            ..Machine::new(kind)
        };
        if self.run.is_none() && self.kernel.is_none() && std::io::stdin().is_terminal() {
            run::progress("booting to a shell; Ctrl-A X ends the emulator");
        }
        if self.backend == Backend::None {
            return guest.run_directly(&machine);
        }
        let mut command_line = format!(
            "guests={} memory={} vcpus={}",
            self.guests, self.memory, self.vcpus
        );
        if self.nested {
            command_line.push_str(" nested");
        }
        if self.enlightened {
            command_line.push_str(" enlightened");
        }
        command_line.push_str(&Paging::words(&self.paging));
        if let Some(pages) = self.share_pages {
            command_line.push_str(&share_words(pages));
        }
        command_line.push_str(&limit(&mut machine));
        if self.stats {
            command_line.push_str(" stats");
        }
        command_line.push_str(&devices.words);
        let mut payload = guest.payload(&command_line);
        payload.modules.extend(devices.take_modules());
        machine.disks = devices.files();
        machine.memory = machine_memory(self.guests, self.memory + devices.memory, &payload);
        machine.run(&bare::build(HYPERVISOR)?, &payload)
    }

    fn guest(&self, drivers: &[String]) -> Result<Guest> {
        let quiet = if self.run.is_some() { " quiet" } else { "" };
        let command_line = self
            .cmdline
            .clone()
            .unwrap_or_else(|| format!("console=ttyS0{quiet}"));
        let given = self.kernel.as_ref().map(|file| named(file)).transpose()?;
        // A Linux kernel without a RAM disk gets ours; what other kernels take as modules is theirs to say.
        let is_linux = given
            .as_ref()
            .is_none_or(|kernel| kernel.data.get(0x202..0x206) == Some(b"HdrS"));
        let default_disk = self.initrd.is_empty() && (is_linux || self.run.is_some());
        let mut initrds = self
            .initrd
            .iter()
            .map(|file| named(file))
            .collect::<Result<Vec<_>>>()?;
        let kernel = match given {
            Some(kernel) if !default_disk => kernel,
            given => {
                let distribution = match self.devices.rare_driver() {
                    Some(driver) => debian::kernel_with(driver)?,
                    None => debian::kernel()?,
                };
                if default_disk {
                    let disk = Initrd {
                        run: self.run.clone(),
                        load: [drivers, &self.modules].concat(),
                        ..Initrd::default()
                    };
                    initrds.push(Named {
                        string: "default".into(),
                        data: disk.build(&distribution)?,
                    });
                }
                match given {
                    Some(kernel) => kernel,
                    None => named(&distribution.image.to_string_lossy())?,
                }
            }
        };
        Ok(Guest {
            command_line,
            kernel,
            initrds,
        })
    }
}

/// What the guest is made of.
struct Guest {
    command_line: String,
    kernel: Named,
    initrds: Vec<Named>,
}

/// A file's contents under the words that named it: its path, and for a module its arguments.
struct Named {
    string: String,
    data: Vec<u8>,
}

/// Reads a file that is named by the first of some words.
fn named(string: &str) -> Result<Named> {
    let file = string.split(' ').next().unwrap_or(string);
    let data = fs::read(file).with_context(|| format!("cannot read {file}"))?;
    Ok(Named {
        string: string.to_owned(),
        data,
    })
}

impl Guest {
    /// What the hypervisor is given.
    fn payload(self, command_line: &str) -> Payload {
        let kernel = (format!("kernel {}", self.kernel.string), self.kernel.data);
        let initrds = self
            .initrds
            .into_iter()
            .map(|file| (format!("initrd {}", file.string), file.data));
        Payload {
            command_line: format!("{command_line} -- {}", self.command_line),
            modules: std::iter::once(kernel).chain(initrds).collect(),
        }
    }

    /// Runs the guest on the emulator with no hypervisor in between.
    fn run_directly(&self, machine: &Machine) -> Result<u8> {
        let folder = RunFolder::new()?;
        let kernel = folder.file("kernel");
        fs::write(&kernel, &self.kernel.data)?;
        let initrd = (!self.initrds.is_empty()).then(|| folder.file("initrd"));
        if let Some(file) = &initrd {
            let parts: Vec<&[u8]> = self
                .initrds
                .iter()
                .map(|part| part.data.as_slice())
                .collect();
            fs::write(file, parts.concat())?;
        }
        let command_line = self.command_line.clone();
        machine.run_program(&Program {
            kernel,
            initrd,
            command_line,
        })
    }
}

/// The memory in MiB of a machine whose hypervisor holds `payload` and can give each of its guests as many
/// MiB in one piece.
pub(super) fn machine_memory(guests: u32, each: u64, payload: &Payload) -> u64 {
    let needed = each
        .saturating_mul(guests.into())
        .saturating_add(OWN_MEMORY)
        .saturating_add(payload.size() >> 20);
    if needed > BELOW_4G {
        needed.saturating_add(BELOW_4G)
    } else {
        needed
    }
}
