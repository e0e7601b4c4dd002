//! `cargo xtask nested`: hypervisors inside hypervisors, each unmodified, on ours.

use std::fs;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::boot::{Backend, HYPERVISOR, Paging, limit, machine_memory, share_words};
use super::xen::Xen;
use crate::bare::{self, Payload};
use crate::debian::{self, Kernel, Tool};
use crate::emulator::Machine;
use crate::initrd::{File, Initrd, add_program};
use crate::run;

/// MiB of memory of the innermost guest.
const INNERMOST_MEMORY: u64 = 256;
/// MiB of memory that each hypervisor has beyond its guest's and what its disk takes.
const HYPERVISOR_MEMORY: u64 = 256;
/// Where QEMU looks for the firmware that a guest's processor starts in.
const FIRMWARE: [(&str, &str); 4] = [
    ("seabios", "bios-256k.bin"),
    ("qemu", "linuxboot_dma.bin"),
    ("qemu", "pvh.bin"),
    ("qemu", "kvmvapic.bin"),
];

/// Which hypervisor is the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Guest {
    /// Debian's Linux with KVM and QEMU
    Kvm,
    /// Debian's Xen, with a Linux as its first domain and another as its PVH guest
    Xen,
}

/// Run an unmodified hypervisor as the guest, and Linux as its guest.
///
/// The innermost Linux gives a shell, or runs the commands of --run; its status is the exit status.
#[derive(clap::Args)]
pub(crate) struct Nested {
    /// The hypervisor
    #[arg(value_enum, default_value = "kvm")]
    guest: Guest,
    /// What makes the processors of our guest
    #[arg(long, value_enum, default_value = "svm")]
    backend: Backend,
    /// How many systems run inside ours: 2 is a hypervisor with a Linux, 3 has one more between
    #[arg(long, value_name = "N", default_value_t = 2)]
    depth: u32,
    /// How many such towers stand side by side; each line says whose it is
    #[arg(long, value_name = "N", default_value_t = 1)]
    guests: u32,
    /// The virtual processors of each of them
    #[arg(long, value_name = "N", default_value_t = 1)]
    vcpus: u32,
    /// On VT-x, offer KVM enlightened VMCSs by Hyper-V's interface
    #[arg(long)]
    enlightened: bool,
    /// Save the nested state and restore it, as a migration would, after every so many turns that an
    /// interrupt ended
    #[arg(long, value_name = "TURNS")]
    renew: Option<u32>,
    /// How ours puts a guest hypervisor's memory behind its paging, for each of --guests: on shadow paging
    /// it is not offered nested paging either, and shadow tables are made from its shadow tables
    #[arg(long, value_enum, value_name = "PAGING", value_delimiter = ',')]
    paging: Vec<Paging>,
    /// Back pages that hold the same by one frame, as `cargo xtask boot --share-pages` does
    #[arg(long, value_name = "PAGES", num_args = 0..=1, default_missing_value = "10000")]
    share_pages: Option<NonZeroU64>,
    /// Have the guest hypervisors shadow their guests' page tables although nested paging is offered
    #[arg(long)]
    shadow: bool,
    /// Shell commands to run in the innermost system; their status is the exit status
    #[arg(long, value_name = "SHELL COMMANDS")]
    run: Option<String>,
    /// Print the exits by reason when all has ended
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
    /// The first process of the innermost system, if not the usual one
    #[arg(skip)]
    first_process: Option<String>,
    /// What every Linux is told besides
    #[arg(skip)]
    words: &'static str,
}

/// A system that can be started: its memory in MiB and its RAM disk.
pub(super) struct System {
    pub(super) memory: u64,
    pub(super) disk: Vec<u8>,
}

/// A Linux whose KVM runs a Linux, which gives a shell or runs commands; its status becomes the outer one's.
pub(super) fn kvm_system(kernel: &Kernel, vcpus: u32, run: Option<&str>) -> Result<System> {
    let nested = Nested {
        vcpus,
        run: run.map(str::to_owned),
        ..Nested::plain()
    };
    nested.around(&nested.innermost(kernel)?, kernel, 1)
}

/// Linuxes in one another, `depth` of them, with KVM in all but the innermost, which has nothing but its first
/// process. Each is told `words` besides.
pub(super) fn counted_system(
    kernel: &Kernel,
    depth: u32,
    shadow: bool,
    first_process: String,
    words: &'static str,
) -> Result<System> {
    let nested = Nested {
        depth,
        shadow,
        run: Some(String::new()),
        first_process: Some(first_process),
        words,
        ..Nested::plain()
    };
    nested.tower(kernel)
}

/// The guest of our hypervisor.
struct Outermost {
    /// In MiB.
    memory: u64,
    command_line: String,
    modules: Vec<(String, Vec<u8>)>,
}

impl Nested {
    /// KVM with a Linux on AMD-V.
    fn plain() -> Self {
        Self {
            guest: Guest::Kvm,
            backend: Backend::Svm,
            depth: 2,
            guests: 1,
            vcpus: 1,
            enlightened: false,
            renew: None,
            paging: Vec::new(),
            share_pages: None,
            shadow: false,
            run: None,
            stats: false,
            timeout: None,
            exact: false,
            verbose: false,
            first_process: None,
            words: "",
        }
    }

    pub(crate) fn run(&self) -> Result<u8> {
        run::set_verbose(self.verbose);
        if !(1..=4).contains(&self.depth) {
            bail!("--depth counts the systems inside ours: 1 to 4");
        }
        if self.vcpus == 0 || self.guests == 0 {
            bail!("a system has at least one processor");
        }
        if self.guest == Guest::Xen && (self.depth != 2 || self.shadow) {
            bail!("with Xen there are two systems, and it decides about their page tables");
        }
        if self.paging.len() > self.guests as usize {
            bail!("there are more words in --paging than --guests");
        }
        if self.enlightened && self.backend != Backend::Vmx {
            bail!("enlightened VMCSs are VT-x's: --enlightened goes with --backend vmx");
        }
        let timeout = self
            .timeout
            .map(|seconds| Duration::try_from_secs_f64(seconds).context("--timeout takes seconds"))
            .transpose()?;
        let outermost = match self.guest {
            Guest::Kvm => self.kvm()?,
            Guest::Xen => self.xen()?,
        };
        let mut machine = Machine {
            cpu: self.backend.cpu()?,
            processors: self.vcpus.saturating_mul(self.guests),
            exact: self.exact,
            input: self.run.is_none(),
            timeout,
            ..Machine::new(self.backend.emulator())
        };
        let stats = if self.stats { " stats" } else { "" };
        let renew = self.renew.map(|turns| format!(" renew={turns}"));
        let renew = renew.unwrap_or_default();
        let enlightened = if self.enlightened { " enlightened" } else { "" };
        let mut paging = Paging::words(&self.paging);
        if let Some(pages) = self.share_pages {
            paging.push_str(&share_words(pages));
        }
        let limit = limit(&mut machine);
        let payload = Payload {
            command_line: format!(
                "guests={} memory={} vcpus={} nested{enlightened}{renew}{paging}{limit}{stats} -- {}",
                self.guests, outermost.memory, self.vcpus, outermost.command_line,
            ),
            modules: outermost.modules,
        };
        machine.memory = machine_memory(self.guests, outermost.memory, &payload);
        machine.run(&bare::build(HYPERVISOR)?, &payload)
    }

    /// Linux with KVM, with as many more between it and the innermost Linux as the depth asks for.
    fn kvm(&self) -> Result<Outermost> {
        let kernel = debian::kernel()?;
        let system = self.tower(&kernel)?;
        Ok(Outermost {
            memory: system.memory,
            command_line: self.command_line(),
            modules: vec![
                (
                    format!("kernel {}", kernel.image.display()),
                    fs::read(&kernel.image)?,
                ),
                ("initrd level-1".to_owned(), system.disk),
            ],
        })
    }

    fn tower(&self, kernel: &Kernel) -> Result<System> {
        let mut system = self.innermost(kernel)?;
        for level in (1..self.depth).rev() {
            run::progress(format_args!("packing the hypervisor of level {level}"));
            system = self.around(&system, kernel, level)?;
        }
        Ok(system)
    }

    fn xen(&self) -> Result<Outermost> {
        run::progress("packing Xen and its domains");
        let xen = Xen::pack(self.run.as_deref(), self.vcpus)?;
        let quiet = if self.run.is_some() { " quiet" } else { "" };
        Ok(Outermost {
            memory: xen.memory,
            command_line: xen.command_line(self.run.is_some()),
            modules: vec![
                ("kernel xen".to_owned(), xen.hypervisor),
                (format!("initrd vmlinuz console=hvc0{quiet}"), xen.kernel),
                ("initrd disk".to_owned(), xen.disk),
            ],
        })
    }

    fn command_line(&self) -> String {
        let quiet = if self.run.is_some() { " quiet" } else { "" };
        format!("console=ttyS0{quiet}{}", self.words)
    }

    /// The Linux in the middle of it all.
    fn innermost(&self, kernel: &Kernel) -> Result<System> {
        let run = self.run.as_deref().map(reporting);
        let disk = Initrd {
            init: self.first_process.clone(),
            run,
            ..Initrd::default()
        };
        Ok(System {
            memory: INNERMOST_MEMORY,
            disk: disk.build(kernel)?,
        })
    }

    /// A Linux whose KVM runs `inner`.
    fn around(&self, inner: &System, kernel: &Kernel, level: u32) -> Result<System> {
        let mut files = vec![
            ("guest/kernel".to_owned(), 0o644, fs::read(&kernel.image)?),
            ("guest/disk".to_owned(), 0o644, inner.disk.clone()),
        ];
        add_qemu(&mut files)?;
        let disk = Initrd {
            run: Some(self.script(inner.memory, level)),
            carry: vec!["kvm_amd".to_owned(), "kvm_intel".to_owned()],
            files,
            ..Initrd::default()
        }
        .build(kernel)?;
        // The disk is in memory twice while it is unpacked.
        let memory = inner.memory + HYPERVISOR_MEMORY + 2 * (disk.len() as u64 >> 20);
        Ok(System { memory, disk })
    }

    /// What a guest hypervisor does: it loads KVM, runs its guest, and passes the status on.
    ///
    /// The status comes through a second serial port. A program of the guest's cannot reach a port
    /// by itself: KVM sets the busy bit of its TSS, and QEMU's emulation of the I/O permission
    /// check (target/i386/tcg/seg_helper.c) takes an available TSS only.
    fn script(&self, memory: u64, level: u32) -> String {
        let (vcpus, append) = (self.vcpus, self.command_line());
        let kvm = kvm_script(
            self.shadow,
            &format!(
                "-smp {vcpus} -m {memory} -serial file:/status \
                 -kernel /guest/kernel -initrd /guest/disk -append '{append}'"
            ),
        );
        let script = format!("{kvm}exit $(tr -dc 0-9 </status)\n");
        if level > 1 {
            reporting(&script)
        } else {
            script
        }
    }
}

/// Loads KVM, with nested or shadow page tables for its guests, and runs QEMU with these arguments besides.
pub(super) fn kvm_script(shadow: bool, arguments: &str) -> String {
    let (amd, intel) = if shadow { ("npt=0", "ept=0") } else { ("", "") };
    format!(
        "if grep -q svm /proc/cpuinfo; then modprobe kvm_amd nested=1 {amd}\n\
         elif grep -q vmx /proc/cpuinfo; then modprobe kvm_intel nested=1 {intel}\n\
         else echo 'the processor has no virtualization'; exit 1; fi\n\
         qemu-system-x86_64 -accel kvm -cpu host -nodefaults -no-user-config -display none -vga none \
         -no-reboot -serial stdio -L /usr/share/qemu {arguments}\n"
    )
}

/// The commands, with their status told on the second serial port.
fn reporting(commands: &str) -> String {
    format!("(\n{commands}\n)\necho $? >/dev/ttyS1\npoweroff -f\n")
}

/// Adds QEMU with everything that it needs at run time.
pub(super) fn add_qemu(files: &mut Vec<File>) -> Result<()> {
    debian::require(&[Tool {
        program: "qemu-system-x86_64",
        package: "qemu-system-x86",
    }])?;
    let qemu = Path::new("/usr/bin/qemu-system-x86_64");
    add_program(files, qemu, "bin/qemu-system-x86_64", &[])?;
    for (folder, name) in FIRMWARE {
        let places =
            [folder, "qemu", "seabios"].map(|f| PathBuf::from("/usr/share").join(f).join(name));
        let Some(place) = places.iter().find(|place| place.exists()) else {
            bail!("QEMU's firmware {name} is nowhere in /usr/share");
        };
        files.push((format!("usr/share/qemu/{name}"), 0o644, fs::read(place)?));
    }
    Ok(())
}
