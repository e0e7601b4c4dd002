//! Virtio devices with the drivers of Debian's kernel, in a guest: each device over both transports, with
//! both formats of rings, with one queue and with two.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, anyhow, bail, ensure};

use super::Tally;
use crate::run;
use crate::workplace::RunFolder;

/// What `virtio.sh` checks, in its order.
const CHECKS: [&str; 16] = [
    "transport",
    "ring_format",
    "queues",
    "disk",
    "disk_after_reset",
    "read_only_disk",
    "discard",
    "dhcp",
    "ping_host",
    "http",
    "tcp_echo",
    "random",
    "console",
    "sockets",
    "shared_folder",
    "balloon",
];

/// Longer than everything together takes, in 10⁹ instructions on QEMU.
const TIMEOUT: &str = "200";
/// The same in seconds of a busy machine, for Bochs.
const TIMEOUT_OF_BOCHS: &str = "1800";
const DISK_SIZE: usize = 16 << 20;
/// The check of the second boot.
const OUTLIVES: &str = "disk_outlives_the_guest";
/// What the host says of a balloon that has all it asked for.
const HELD: &str = "balloon: 64 MiB held, 64 MiB by the guest's account";

/// One way to attach all devices.
#[derive(Clone, Copy)]
struct Setting {
    mmio: bool,
    packed: bool,
    queues: u8,
}

impl Setting {
    fn all() -> impl Iterator<Item = Self> {
        (0..8).map(|bits| Self {
            mmio: bits & 1 != 0,
            packed: bits & 2 != 0,
            queues: 1 + (bits >> 2),
        })
    }

    /// Two settings that differ in everything.
    fn is_quick(self) -> bool {
        let Self {
            mmio,
            packed,
            queues,
        } = self;
        mmio == packed && packed == (queues == 2)
    }

    fn name(self) -> String {
        format!(
            "virtio::{}_{}_{}",
            if self.mmio { "mmio" } else { "pci" },
            if self.packed { "packed" } else { "split" },
            self.queues
        )
    }

    fn transport(self) -> [&'static str; 2] {
        ["--transport", if self.mmio { "mmio" } else { "pci" }]
    }
}

pub(super) fn run(tally: &mut Tally, full: bool) -> Result<()> {
    run::progress("virtio devices in a guest");
    for setting in Setting::all().filter(|setting| full || setting.is_quick()) {
        check(tally, setting)?;
    }
    if full {
        tally.check("virtio::devices_on_vmx", on_vmx);
    }
    tally.check("virtio::iommu_on_pci", || iommu(false));
    if full {
        tally.check("virtio::iommu_on_mmio", || iommu(true));
    }
    memory(tally, &[], "svm")?;
    if full {
        memory(tally, &["--backend", "vmx"], "vmx")?;
    }
    tally.check("virtio::persistent_memory", persistent_memory);
    tally.check("virtio::balloon_deflates", balloon_deflates);
    tally.check("virtio::broken_disk_is_an_error", broken_disk);
    tally.check("virtio::two_guests_on_a_switch", two_guests_on_a_switch);
    Ok(())
}

/// Whether one of the checks that are made in one run is wanted.
fn wants_any<'a>(tally: &Tally, run: &str, checks: impl IntoIterator<Item = &'a &'a str>) -> bool {
    let mut names = checks.into_iter().map(|what| format!("{run}::{what}"));
    names.any(|name| tally.wants(&name))
}

/// A folder with a file, a program, a link and many entries.
fn make_shared(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder.join("folder"))?;
    fs::create_dir(folder.join("many"))?;
    let numbers: String = (1..=40_000).map(|number| format!("{number}\n")).collect();
    fs::write(folder.join("folder/numbers"), numbers)?;
    let program = folder.join("folder/program");
    fs::write(&program, "#!/bin/sh\necho runs from there\n")?;
    fs::set_permissions(&program, Permissions::from_mode(0o755))?;
    symlink("folder/numbers", folder.join("link"))?;
    for number in 0..300 {
        fs::write(folder.join(format!("many/{number}")), [])?;
    }
    Ok(())
}

/// Checks all devices in one setting, then boots again over the other transport and looks at the disk.
fn check(tally: &mut Tally, setting: Setting) -> Result<()> {
    let name = setting.name();
    let outside = ["console_is_heard", "host_holds_the_balloon", OUTLIVES];
    if !wants_any(tally, &name, CHECKS.iter().chain(&outside)) {
        return Ok(());
    }
    let folder = RunFolder::new()?;
    let disk = folder.file("disk");
    fs::write(&disk, vec![0; DISK_SIZE])?;
    let shared = folder.file("shared");
    make_shared(&shared)?;
    let unreadable = "the build's folder is not UTF-8";
    let disk = disk.to_str().context(unreadable)?;
    let shared = shared.to_str().context(unreadable)?;
    let fixed = format!("{disk},ro");
    let script = format!(
        "WHERE={} PACKED={} QUEUES={}\n{}",
        if setting.mmio { "LNRO0005" } else { "pci" },
        u8::from(setting.packed),
        setting.queues,
        include_str!("virtio.sh"),
    );
    let queues = setting.queues.to_string();
    let mut arguments = vec!["--vcpus", "2", "--queues", &queues, "--vsock", "--stats"];
    arguments.extend(["--balloon", "64", "--disk", disk, "--disk", &fixed]);
    arguments.extend(["--share", shared]);
    arguments.extend(setting.transport());
    if setting.packed {
        arguments.push("--packed");
    }
    let booted = boot(&arguments, &script);
    let Some(output) = record_checks(tally, &name, &CHECKS, booted) else {
        return Ok(());
    };
    let says = |words: &str| {
        ensure!(output.contains(words), "nothing says «{words}»:\n{output}");
        Ok(())
    };
    let words = ["spoken on 229:0", HELD];
    for (what, words) in outside.iter().zip(words) {
        tally.record(&format!("{name}::{what}"), says(words));
    }
    let other = Setting {
        mmio: !setting.mmio,
        ..setting
    };
    tally.record(&format!("{name}::{OUTLIVES}"), again(other, disk));
    Ok(())
}

/// Looks in a new guest at what the one before has left on the disk, which the host can read too.
fn again(setting: Setting, disk: &str) -> Result<()> {
    let image = fs::read(disk)?;
    ensure!(
        image.get(1080..1082) == Some(&[0x53, 0xEF]),
        "the file holds no ext2 file system"
    );
    let script = "mkdir /mnt; mount -o ro /dev/vda /mnt && seq 1 200000 | cmp - /mnt/kept && \
                  test $(wc -c </mnt/random) = 2097152 && echo 'all is there'";
    let mut arguments = vec!["--no-virtio", "--disk", disk];
    arguments.extend(setting.transport());
    let output = boot(&arguments, script)?;
    ensure!(output.contains("all is there"), "the output was:\n{output}");
    Ok(())
}

/// Devices reach what the guest lets them reach: their drivers work through the IOMMU, and a queue elsewhere
/// is refused and reported.
fn iommu(mmio: bool) -> Result<()> {
    let setting = Setting {
        mmio,
        packed: mmio,
        queues: 1,
    };
    let rng = if mmio { "" } else { "0000:00:04.0" };
    let script = format!("RNG={rng}\n{}", include_str!("virtio-iommu.sh"));
    let mut arguments = vec!["--iommu", "--vcpus", "2", "--stats"];
    arguments.extend(setting.transport());
    if setting.packed {
        arguments.push("--packed");
    }
    let output = boot(&arguments, &script)?;
    let mut wanted = vec!["check groups ok", "check disk ok", "check network ok"];
    if mmio {
        wanted.push(" mappings at the end, 0 accesses refused");
    } else {
        wanted.extend(["check outside ok", "not in memory", " accesses refused"]);
    }
    for words in wanted {
        ensure!(output.contains(words), "nothing says «{words}»:\n{output}");
    }
    Ok(())
}

/// Memory comes and goes, as the guest sees it and as the host counts it.
fn memory(tally: &mut Tally, backend: &[&str], name: &str) -> Result<()> {
    const CHECKS: [&str; 6] = [
        "mem_goes",
        "mem_comes",
        "free_pages_go",
        "balloon_inflates",
        "balloon_deflates",
        "memory_returns",
    ];
    let name = format!("virtio::memory_on_{name}");
    if !wants_any(tally, &name, &CHECKS) {
        return Ok(());
    }
    let mut arguments = vec![
        "--vsock",
        "--mem",
        "256",
        "--balloon",
        "--stats",
        "--vcpus",
        "2",
    ];
    arguments.extend(backend);
    let booted = boot(&arguments, include_str!("virtio-memory.sh"));
    record_checks(tally, &name, &CHECKS, booted);
    Ok(())
}

/// What the guest has flushed is in the file, though the guest ends without warning; another guest finds it.
fn persistent_memory() -> Result<()> {
    let folder = RunFolder::new()?;
    let file = folder.file("memory");
    fs::write(&file, vec![0; 8 << 20])?;
    let name = file.to_str().context("the build's folder is not UTF-8")?;
    let arguments = ["--no-virtio", "--pmem", name];
    let write = "mke2fs /dev/pmem0 && mkdir /mnt && mount /dev/pmem0 /mnt && echo kept as memory >/mnt/file && \
                 sync && echo flushed";
    let output = boot(&arguments, write)?;
    ensure!(output.contains("flushed"), "the output was:\n{output}");
    let image = fs::read(&file)?;
    ensure!(
        image.windows(15).any(|bytes| bytes == b"kept as memory\n"),
        "the file is not on the host"
    );
    let output = boot(
        &arguments,
        "mkdir /mnt; mount -o ro /dev/pmem0 /mnt && cat /mnt/file",
    )?;
    ensure!(
        output.contains("kept as memory"),
        "the output was:\n{output}"
    );
    Ok(())
}

/// A driver that goes takes back what it gave.
fn balloon_deflates() -> Result<()> {
    let script = "for try in $(seq 1 100); do grep -q 'balloon_inflate 8192' /proc/vmstat && break; \
                  usleep 100000; done; rmmod virtio_balloon; grep balloon /proc/vmstat";
    let output = boot(&["--no-virtio", "--balloon", "32", "--stats"], script)?;
    for words in ["balloon_inflate 8192", "balloon: 0 MiB held, 0 MiB by"] {
        ensure!(output.contains(words), "nothing says «{words}»:\n{output}");
    }
    Ok(())
}

/// The devices do not depend on what makes the processors, nor does what they save on the emulator.
fn on_vmx() -> Result<()> {
    let folder = RunFolder::new()?;
    let disk = folder.file("disk");
    fs::write(&disk, vec![0; 2 << 20])?;
    let name = disk.to_str().context("the build's folder is not UTF-8")?;
    let script = "mke2fs /dev/vda && mkdir /mnt && mount /dev/vda /mnt && echo kept >/mnt/file && umount /mnt && \
                  ip link set eth0 up && ip addr add 10.0.2.15/24 dev eth0 && ping -c 2 -W 10 10.0.2.2 && \
                  wget -O /tmp/page http://10.0.2.2/ && grep testudo /tmp/page && \
                  dd if=/dev/hwrng of=/tmp/random bs=16 count=1 && test $(wc -c </tmp/random) = 16 && \
                  echo spoken >/dev/hvc0";
    let output = boot(&["--backend", "vmx", "--disk", name], script)?;
    for words in ["0% packet loss", "testudo", "spoken"] {
        ensure!(output.contains(words), "nothing says «{words}»:\n{output}");
    }
    let image = fs::read(&disk)?;
    ensure!(
        image.windows(5).any(|bytes| bytes == b"kept\n"),
        "the file is not on the host's disk"
    );
    Ok(())
}

/// Each of two guests fetches from the other what that serves.
fn two_guests_on_a_switch() -> Result<()> {
    let output = boot(
        &["--guests", "2", "--net", "switch"],
        include_str!("switch.sh"),
    )?;
    for guest in [0, 1] {
        let words = format!("guest {guest}: all 200000 lines from the neighbour");
        ensure!(output.contains(&words), "nothing says «{words}»:\n{output}");
    }
    Ok(())
}

fn broken_disk() -> Result<()> {
    let folder = RunFolder::new()?;
    let disk = folder.file("disk");
    fs::write(&disk, [0; 700])?;
    let disk = disk.to_str().context("the build's folder is not UTF-8")?;
    match boot(&["--disk", disk], "true") {
        Ok(_) => bail!("a disk of 700 bytes is accepted"),
        Err(error) if error.to_string().contains("whole sectors") => Ok(()),
        Err(error) => Err(error),
    }
}

/// Records what a script's checks said; gives the output if it ran to its end.
fn record_checks(
    tally: &mut Tally,
    name: &str,
    checks: &[&str],
    booted: Result<String>,
) -> Option<String> {
    let output = match booted {
        Ok(output) => output,
        Err(error) => {
            tally.record(name, Err(error));
            return None;
        }
    };
    for what in checks {
        let result = if output.contains(&format!("check {what} ok")) {
            Ok(())
        } else {
            Err(anyhow!("the output was:\n{output}"))
        };
        tally.record(&format!("{name}::{what}"), result);
    }
    Some(output)
}

/// Boots and runs a script; gives the output of a run that ended well. Instructions count as time, so
/// that a busy machine does not look like a slow processor to the guest.
pub(super) fn boot(arguments: &[&str], script: &str) -> Result<String> {
    let script = [include_str!("check.sh"), script].concat();
    let timeout = if arguments.contains(&"vmx") {
        TIMEOUT_OF_BOCHS
    } else {
        TIMEOUT
    };
    let output = Command::new(std::env::current_exe()?)
        .args(["boot", "--exact", "--timeout", timeout])
        .args(arguments)
        .args(["--run", &script])
        .stdin(Stdio::null())
        .output()
        .context("cannot run xtask")?;
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    ensure!(
        output.status.success(),
        "{}; the output was:\n{text}",
        output.status
    );
    Ok(text)
}
