//! What `cargo xtask nested xen` starts: Debian's Xen, a Linux as its first domain, and a Linux in a domain
//! of its own, all as they come.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::debian::{self, Kernel};
use crate::initrd::{File, Initrd, add_program};
use crate::run;

/// MiB of the innermost domain.
const INNER_MEMORY: u64 = 192;
/// MiB that the first domain takes beside what it holds for the innermost.
const OWN_MEMORY: u64 = 384;
/// MiB for Xen itself.
const HYPERVISOR_MEMORY: u64 = 160;
/// The programs of the first domain that make others.
const TOOLS: [&str; 5] = [
    "xenstored",
    "xen-init-dom0",
    "xenconsoled",
    "xenconsole",
    "xl",
];
/// The drivers through which they reach Xen.
const DRIVERS: [&str; 5] = [
    "xen_privcmd",
    "xen_evtchn",
    "xen_gntdev",
    "xen_gntalloc",
    "xenfs",
];

/// Xen, and what it is started with.
pub(super) struct Xen {
    /// The hypervisor, an ELF file.
    pub(super) hypervisor: Vec<u8>,
    /// The first domain's kernel.
    pub(super) kernel: Vec<u8>,
    /// The first domain's RAM disk, which holds the innermost system.
    pub(super) disk: Vec<u8>,
    /// MiB for all of them.
    pub(super) memory: u64,
}

impl Xen {
    /// Packs it; `run` is what the innermost Linux does instead of giving a shell.
    pub(super) fn pack(run: Option<&str>, vcpus: u32) -> Result<Self> {
        let packages = Packages::fetch()?;
        let inner = debian::kernel()?;
        let dom0 = debian::server_kernel()?;
        let inner_disk = Initrd {
            run: run.map(reporting),
            ..Initrd::default()
        }
        .build(&inner)?;
        let disk =
            packages.first_domain(&inner, inner_disk, &dom0, config(run.is_some(), vcpus))?;
        let hypervisor = run::bytes(Command::new("gzip").arg("-dc").arg(&packages.hypervisor))?;
        let memory = INNER_MEMORY + OWN_MEMORY + HYPERVISOR_MEMORY + 3 * (disk.len() as u64 >> 20);
        Ok(Self {
            hypervisor,
            kernel: fs::read(&dom0.image).context("cannot read the first domain's kernel")?,
            disk,
            memory,
        })
    }
}

impl Xen {
    /// Xen's own arguments: the first domain has what the innermost leaves.
    ///
    /// Without SMAP, because QEMU's emulation of a far return at CPL 3 reads the stack as a supervisor
    /// (target/i386/tcg/seg_helper.c of 7.2): the first domain's kernel, which runs there, dies of it.
    pub(super) fn command_line(&self, quiet: bool) -> String {
        let level = if quiet { " loglvl=error" } else { "" };
        let first = self.memory - INNER_MEMORY - HYPERVISOR_MEMORY;
        format!(
            "console=com1 com1=115200,8n1 noreboot smap=no dom0_mem={first}M,max:{first}M{level}"
        )
    }
}

/// The commands, with their status told on the console in a line that the first domain looks for.
fn reporting(commands: &str) -> String {
    format!("(\n{commands}\n)\necho \"status of the domain: $?\"\npoweroff -f\n")
}

/// The innermost domain: a PVH guest, which needs no device model (xl.cfg(5)).
///
/// It reads the time-stamp counter by itself, because QEMU reports an intercepted RDTSCP as RDTSC
/// (target/i386/tcg/misc_helper.c of 7.2), at which Xen ends the domain.
fn config(quiet: bool, vcpus: u32) -> String {
    let quiet = if quiet { " quiet" } else { "" };
    format!(
        "name = 'inner'\ntype = 'pvh'\nkernel = '/guest/kernel'\nramdisk = '/guest/disk'\n\
         cmdline = 'console=hvc0{quiet}'\nmemory = {INNER_MEMORY}\nvcpus = {vcpus}\n\
         tsc_mode = 'native'\non_reboot = 'destroy'\non_crash = 'destroy'\n"
    )
}

/// The files of the distribution.
struct Packages {
    hypervisor: PathBuf,
    version: String,
    /// Where the programs are that go with this Xen.
    tools: PathBuf,
    /// Where their libraries are.
    libraries: Vec<PathBuf>,
}

impl Packages {
    fn fetch() -> Result<Self> {
        let system = debian::dependencies("xen-system-amd64")?;
        let named = |start: &str| {
            let found = system.iter().find(|name| name.starts_with(start));
            found.with_context(|| format!("xen-system-amd64 names no {start}…"))
        };
        let hypervisor = named("xen-hypervisor-")?;
        let utils = named("xen-utils-4")?;
        let version = utils.trim_start_matches("xen-utils-");
        let boot = debian::unpacked(hypervisor)?.join("boot");
        let mut libraries = Vec::new();
        let mut seen = vec![utils.clone()];
        let mut next = 0;
        while let Some(package) = seen.get(next).cloned() {
            let folder = debian::unpacked(&package)?;
            libraries.push(folder.join("usr/lib/x86_64-linux-gnu"));
            for name in debian::dependencies(&package)? {
                let wanted = name.starts_with("libxen") || name.starts_with("libyajl");
                if wanted && !seen.contains(&name) {
                    seen.push(name);
                }
            }
            next += 1;
        }
        Ok(Self {
            hypervisor: boot.join(format!("xen-{version}-amd64.gz")),
            tools: debian::unpacked(utils)?.join(format!("usr/lib/xen-{version}/bin")),
            libraries,
            version: version.to_owned(),
        })
    }

    /// The RAM disk of the domain that starts the innermost one.
    fn first_domain(
        &self,
        inner: &Kernel,
        inner_disk: Vec<u8>,
        kernel: &Kernel,
        config: String,
    ) -> Result<Vec<u8>> {
        let mut files: Vec<File> = vec![
            ("guest/kernel".to_owned(), 0o644, fs::read(&inner.image)?),
            ("guest/disk".to_owned(), 0o644, inner_disk),
            ("guest/config".to_owned(), 0o644, config.into_bytes()),
        ];
        // The programs look for each other where the package has them.
        let place = format!("usr/lib/xen-{}/bin", self.version);
        for name in TOOLS {
            let inside = format!("{place}/{name}");
            add_program(&mut files, &self.tools.join(name), &inside, &self.libraries)?;
        }
        // Asked for by name when a thread ends.
        let gcc = "lib/x86_64-linux-gnu/libgcc_s.so.1";
        let library = fs::read(Path::new("/").join(gcc)).context("libgcc_s is not installed")?;
        files.push((gcc.to_owned(), 0o755, library));
        Initrd {
            run: Some(format!("PATH=/{place}:$PATH\n{}", include_str!("xen.sh"))),
            load: DRIVERS.map(str::to_owned).to_vec(),
            files,
            ..Initrd::default()
        }
        .build(kernel)
    }
}
