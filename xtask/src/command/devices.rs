//! The virtio devices of `cargo xtask boot`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::emulator::DiskFile;

/// MiB of the empty disk that a guest gets when it is given no other.
const SCRATCH: u64 = 64;

/// What drives an IOMMU, which not every kernel has.
const IOMMU_DRIVER: &str = "virtio_iommu";

/// How a guest finds its virtio devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Transport {
    /// Windows of registers that ACPI announces
    Mmio,
    /// PCI functions
    Pci,
}

/// What is at the other end of the network card's wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Net {
    /// A host in the hypervisor: 10.0.2.2, with DHCP, ping, TCP echo on port 7 and HTTP on port 80
    User,
    /// The other guests of --guests
    Switch,
    /// No network card
    None,
}

/// The guest's virtio devices: by default a console, random numbers, the network and an empty disk.
#[derive(clap::Args)]
#[command(next_help_heading = "Virtio devices")]
pub(crate) struct Devices {
    /// A disk with the file's contents. What the guest changes comes into the file when the run has ended
    /// by itself, unless the name is followed by ",ro"
    #[arg(long = "disk", value_name = "FILE[,ro]")]
    disks: Vec<String>,
    /// The network
    #[arg(long, value_enum, default_value = "user")]
    net: Net,
    /// Random numbers; there are some in any case, but with --no-virtio
    #[arg(long)]
    rng: bool,
    /// Persistent memory with the file's contents, whole 2 MiB of them. What the guest flushes comes into the
    /// file, however the run ends
    #[arg(long, value_name = "FILE")]
    pmem: Option<String>,
    /// Memory that can be plugged while the guest runs, all of which it is asked to take at the start; with
    /// --vsock, a line "mem MIB" to the host's port 9 asks for another amount
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    mem: Option<u64>,
    /// A memory balloon, which asks for so many MiB at the start; with --vsock, a line "balloon MIB" to the
    /// host's port 9 asks for another amount, and a line "report" says what the guest has
    #[arg(long, value_name = "MIB", num_args = 0..=1, default_missing_value = "0")]
    balloon: Option<u64>,
    /// Sockets between guest and host: the host is number 2 and echoes on port 7
    #[arg(long)]
    vsock: bool,
    /// A folder that the guest can read: mount -t virtiofs host FOLDER
    #[arg(long, value_name = "FOLDER")]
    share: Option<PathBuf>,
    /// An IOMMU between the devices and memory: the guest decides what each may reach
    #[arg(long)]
    iommu: bool,
    /// How the guest finds the devices
    #[arg(long, value_enum, default_value = "pci")]
    transport: Transport,
    /// Offer packed rings, which a guest may prefer to split ones
    #[arg(long)]
    packed: bool,
    /// Queues of each disk, and pairs of queues of the network card
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=32))]
    queues: u16,
    /// None but the devices that other options name
    #[arg(long)]
    no_virtio: bool,
}

/// A file that a guest has as a disk.
struct Disk {
    file: PathBuf,
    /// The words that describe it to the hypervisor.
    string: String,
    read_only: bool,
    data: Vec<u8>,
}

/// What the hypervisor and the guest are to know about the devices.
pub(crate) struct Plan {
    /// Words for the hypervisor's command line, each after a space.
    pub(crate) words: String,
    /// The kernel modules that drive the devices, in order.
    pub(crate) drivers: Vec<String>,
    /// MiB of the hypervisor's memory for what the guest writes to disks.
    pub(crate) memory: u64,
    disks: Vec<Disk>,
    /// What is shared, as modules of the hypervisor.
    shared: Vec<(String, Vec<u8>)>,
}

impl Plan {
    /// The disks and what is shared, as modules of the hypervisor.
    pub(crate) fn take_modules(&mut self) -> Vec<(String, Vec<u8>)> {
        let modules = self.disks.iter_mut();
        modules
            .map(|disk| (disk.string.clone(), std::mem::take(&mut disk.data)))
            .chain(self.shared.drain(..))
            .collect()
    }

    /// Where what the guest changes is to be written, by the disk's number.
    pub(crate) fn files(&self) -> Vec<Option<DiskFile>> {
        let file = |disk: &Disk| (!disk.read_only).then(|| DiskFile(disk.file.clone()));
        self.disks.iter().map(file).collect()
    }
}

impl Devices {
    pub(crate) fn plan(&self) -> Result<Plan> {
        let mut disks = self
            .disks
            .iter()
            .map(|name| disk(name))
            .collect::<Result<Vec<_>>>()?;
        let changes = disks.iter().filter(|disk| !disk.read_only);
        let mut memory = changes.map(|disk| (disk.data.len() as u64 >> 20) + 1).sum();
        let (mut words, mut drivers) = (String::new(), Vec::new());
        let mut device = |word: &str, driver: &str| {
            words.push_str(word);
            drivers.push(driver.to_owned());
        };
        match self.transport {
            Transport::Mmio => device(" transport=mmio", "virtio_mmio"),
            Transport::Pci => device(" transport=pci", "virtio_pci"),
        }
        let usual = !self.no_virtio;
        if self.iommu {
            // First, so that it is there when what is behind it is found.
            device(" iommu", IOMMU_DRIVER);
        }
        if disks.is_empty() && usual {
            device(&format!(" scratch={SCRATCH}"), "virtio_blk");
            memory += SCRATCH;
        } else if !disks.is_empty() {
            // The disks are modules of the hypervisor and need no word.
            device("", "virtio_blk");
        }
        if usual && self.net == Net::User {
            device(" net", "virtio_net");
        }
        if self.joins_guests() {
            device(" switch", "virtio_net");
        }
        if usual || self.rng {
            device(" rng", "virtio_rng");
        }
        if usual {
            device(" console", "virtio_console");
        }
        if self.vsock {
            device(" vsock", "vmw_vsock_virtio_transport");
        }
        if let Some(name) = &self.pmem {
            let file = persistent(name)?;
            // As memory, and once more as what the file holds.
            memory += file.data.len() as u64 >> 19;
            disks.push(file);
            device("", "virtio_pmem");
            device("", "nd_pmem");
        }
        let mut shared = Vec::new();
        if let Some(folder) = &self.share {
            device(" share", "virtiofs");
            share(folder, "", &mut shared)?;
            let bytes: usize = shared.iter().map(|(_, data)| data.len()).sum();
            memory += (bytes as u64 >> 20) + 1;
        }
        if let Some(mib) = self.mem {
            device(&format!(" mem={mib}"), "virtio_mem");
            memory += mib;
        }
        if let Some(mib) = self.balloon {
            device(&format!(" balloon={mib}"), "virtio_balloon");
        }
        if drivers.len() == 1 {
            drivers.clear();
        }
        words.push_str(&format!(" queues={}", self.queues));
        if self.packed {
            words.push_str(" packed");
        }
        Ok(Plan {
            words,
            drivers,
            memory,
            disks,
            shared,
        })
    }

    /// Whether there are options that only a hypervisor can follow.
    pub(crate) fn asked_for(&self) -> bool {
        !self.disks.is_empty()
            || self.balloon.is_some()
            || self.mem.is_some()
            || self.pmem.is_some()
            || self.share.is_some()
            || self.vsock
            || self.rng
            || self.joins_guests()
            || self.iommu
    }

    /// Whether the guests are each other's network.
    pub(crate) fn joins_guests(&self) -> bool {
        self.net == Net::Switch
    }

    /// The driver that decides which kernel will do.
    pub(crate) fn rare_driver(&self) -> Option<&'static str> {
        self.iommu.then_some(IOMMU_DRIVER)
    }
}

/// A file as persistent memory, which Linux takes in such pieces.
fn persistent(name: &str) -> Result<Disk> {
    const PIECE: usize = 2 << 20;
    let data = fs::read(name).with_context(|| format!("cannot read {name}"))?;
    if data.is_empty() || data.len() % PIECE != 0 {
        bail!(
            "{name} is no persistent memory: its {} bytes are not whole 2 MiB",
            data.len()
        );
    }
    Ok(Disk {
        file: name.into(),
        string: format!("pmem {name}"),
        read_only: false,
        data,
    })
}

fn disk(name: &str) -> Result<Disk> {
    const SECTOR: usize = 512;
    let (file, read_only) = match name.strip_suffix(",ro") {
        Some(file) => (file, true),
        None => (name, false),
    };
    let data = fs::read(file).with_context(|| format!("cannot read the disk {file}"))?;
    if data.is_empty() || data.len() % SECTOR != 0 {
        bail!(
            "{file} is no disk: its {} bytes are not whole sectors of {SECTOR}",
            data.len()
        );
    }
    Ok(Disk {
        file: file.into(),
        string: format!("disk {name}"),
        read_only,
        data,
    })
}

/// Adds what is in a folder, each entry under its path from the first folder on: a module's string says what
/// it is. What is neither file, folder nor link is left out, and so are names that are not UTF-8.
fn share(folder: &Path, prefix: &str, modules: &mut Vec<(String, Vec<u8>)>) -> Result<()> {
    const EXECUTABLE: u32 = 0o111;
    let cannot = || format!("cannot share {}", folder.display());
    for entry in fs::read_dir(folder).with_context(cannot)? {
        let entry = entry.with_context(cannot)?;
        let (path, kind) = (entry.path(), entry.file_type().with_context(cannot)?);
        let name = entry.file_name();
        let Some(name) = name.to_str() else {
            continue;
        };
        let at = format!("{prefix}{name}");
        let cannot = || format!("cannot share {}", path.display());
        if kind.is_dir() {
            modules.push((format!("share-folder {at}"), Vec::new()));
            share(&path, &format!("{at}/"), modules)?;
        } else if kind.is_symlink() {
            let target = fs::read_link(&path).with_context(cannot)?;
            let target = target.into_os_string().into_encoded_bytes();
            modules.push((format!("share-link {at}"), target));
        } else if kind.is_file() {
            let permissions = entry.metadata().with_context(cannot)?.permissions();
            let kind = if permissions.mode() & EXECUTABLE != 0 {
                "program"
            } else {
                "file"
            };
            let data = fs::read(&path).with_context(cannot)?;
            modules.push((format!("share-{kind} {at}"), data));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        devices: Devices,
    }

    fn plan(arguments: &[&str]) -> Plan {
        let line = [&["boot"], arguments].concat();
        let devices = Line::parse_from(line).devices;
        devices.plan().expect("a plan")
    }

    #[test]
    fn the_default_guest_has_console_random_numbers_network_and_a_disk() {
        let plan = plan(&[]);
        assert_eq!(
            plan.words,
            " transport=pci scratch=64 net rng console queues=1"
        );
        assert_eq!(plan.drivers[0], "virtio_pci");
        assert_eq!(plan.memory, SCRATCH);
    }

    #[test]
    fn options_change_it() {
        let words = |arguments| plan(arguments).words;
        assert_eq!(words(&["--no-virtio"]), " transport=pci queues=1");
        assert!(plan(&["--no-virtio"]).drivers.is_empty());
        assert_eq!(
            words(&[
                "--no-virtio",
                "--balloon",
                "--transport",
                "mmio",
                "--packed"
            ]),
            " transport=mmio balloon=0 queues=1 packed"
        );
        assert!(words(&["--balloon", "64", "--queues", "2"]).ends_with(" balloon=64 queues=2"));
        assert!(!words(&["--net", "none"]).contains(" net"));
        let with_mem = plan(&["--no-virtio", "--mem", "128"]);
        assert_eq!(
            (with_mem.memory, &*with_mem.words),
            (128, " transport=pci mem=128 queues=1")
        );
        let with_iommu = plan(&["--iommu"]);
        assert!(
            with_iommu
                .words
                .starts_with(" transport=pci iommu scratch=")
        );
        assert_eq!(with_iommu.drivers[..2], ["virtio_pci", "virtio_iommu"]);
    }

    #[test]
    fn what_is_not_whole_sectors_is_no_disk() {
        let file = std::env::temp_dir().join(format!("testudo-disk-{}", std::process::id()));
        let name = file.to_str().expect("a name");
        for (size, good) in [(0, false), (511, false), (1024, true)] {
            fs::write(&file, vec![0; size]).expect("a file");
            assert_eq!(disk(name).is_ok(), good, "{size}");
        }
        assert!(persistent(name).is_err());
        fs::write(&file, vec![0; 4 << 20]).expect("a file");
        let plan = plan(&["--no-virtio", "--pmem", name]);
        assert_eq!((plan.memory, plan.files().len()), (8, 1));
        assert!(disk(&format!("{name},ro")).is_ok_and(|disk| disk.read_only));
        fs::remove_file(&file).expect("it is there");
        assert!(disk(name).is_err());
    }
}
