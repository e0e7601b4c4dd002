//! The emulators that bare-metal programs run on.

mod bochs;
mod debugger;
mod iso;
mod qemu;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::bare::Payload;

pub(crate) use bochs::linux_clock;

/// The status of a run that was ended because it took too long, as `timeout` has it.
pub(crate) const TIMED_OUT: u8 = 124;

/// Which emulator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Kind {
    /// QEMU's TCG: an AMD processor with SVM and nested paging
    Qemu,
    /// Bochs: processor models with full SVM or VMX
    Bochs,
}

/// The processor that the program is to find.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Cpu {
    /// One with SVM
    Svm,
    /// One with VMX
    Vmx,
}

/// How a program gets into the machine; Bochs has only the second way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Loader {
    /// The emulator loads it
    Direct,
    /// The BIOS starts GRUB from a CD, as on a real machine
    Grub,
}

/// A machine, and what happens to its output.
pub(crate) struct Machine {
    pub(crate) kind: Kind,
    pub(crate) cpu: Cpu,
    /// Whether the processor has nested paging.
    pub(crate) nested_paging: bool,
    pub(crate) loader: Loader,
    pub(crate) processors: u32,
    /// Memory in MiB.
    pub(crate) memory: u64,
    /// One tick of the TSC for one instruction, on one host thread: repeatable.
    pub(crate) exact: bool,
    /// The console's input comes from ours.
    pub(crate) input: bool,
    /// Takes the console's output; otherwise it goes to ours.
    pub(crate) capture: Option<PathBuf>,
    pub(crate) timeout: Option<Duration>,
    /// The program's guest has the machine itself, so that an end without a status is its switching off.
    pub(crate) guest_ends: bool,
    /// The files of the guest's disks, by number; what the guest changes is written to them.
    pub(crate) disks: Vec<Option<DiskFile>>,
    /// Further arguments for the emulator.
    pub(crate) extra: Vec<String>,
}

/// A file that a guest has as a disk and may change.
#[derive(Clone, Debug)]
pub(crate) struct DiskFile(pub(crate) PathBuf);

/// What QEMU is to load, as it stands.
pub(crate) struct Program {
    pub(crate) kernel: PathBuf,
    pub(crate) initrd: Option<PathBuf>,
    pub(crate) command_line: String,
}

/// What Bochs boots.
pub(crate) enum Image<'a> {
    /// A bare-metal program and what it is given.
    BareMetal(&'a Path, &'a Payload),
    /// A Linux kernel.
    Linux(&'a Program),
}

/// The arguments for another processor model, if one was asked for.
pub(crate) fn of_model(kind: Kind, model: Option<&str>) -> Result<Vec<String>> {
    match (model, kind) {
        (None, _) => Ok(Vec::new()),
        (Some(model), Kind::Bochs) => Ok(vec![format!("cpu: model={model}")]),
        (Some(_), Kind::Qemu) => bail!("only Bochs has other models"),
    }
}

impl Machine {
    pub(crate) fn new(kind: Kind) -> Self {
        Self {
            kind,
            cpu: Cpu::Svm,
            nested_paging: true,
            loader: Loader::Direct,
            processors: 1,
            memory: 512,
            exact: false,
            input: false,
            capture: None,
            timeout: None,
            guest_ends: false,
            disks: Vec::new(),
            extra: Vec::new(),
        }
    }

    /// Runs a bare-metal program to its end; returns the status it gave.
    pub(crate) fn run(&self, program: &Path, payload: &Payload) -> Result<u8> {
        match self.kind {
            Kind::Qemu => qemu::run(self, program, payload),
            Kind::Bochs => bochs::run(self, program, payload),
        }
    }

    /// Runs what `program` says, on Bochs a Linux kernel, to its end; the status is what it wrote to the
    /// debug-exit port, or on QEMU 0 when it powered the machine off.
    pub(crate) fn run_program(&self, program: &Program) -> Result<u8> {
        match self.kind {
            Kind::Qemu => qemu::run_program(self, program),
            Kind::Bochs => bochs::run_program(self, program),
        }
    }

    /// Runs what `program` says on QEMU until the console has shown `mark` and the processors have
    /// halted for good; returns how many instructions they executed.
    pub(crate) fn count(&self, program: &Program, mark: &str) -> Result<u64> {
        qemu::count(self, program, mark)
    }

    /// Runs what `program` says on QEMU until a processor has come to each of these linear addresses in turn;
    /// returns how many instructions had been executed by then.
    pub(crate) fn counts_at(&self, program: &Program, addresses: &[u64]) -> Result<Vec<u64>> {
        qemu::counts_at(self, program, addresses)
    }

    /// As [`Self::counts_at`], on Bochs.
    pub(crate) fn counts_at_on_bochs(
        &self,
        image: &Image<'_>,
        addresses: &[u64],
    ) -> Result<Vec<u64>> {
        bochs::counts_at(self, image, addresses)
    }

    fn deadline(&self) -> Option<Instant> {
        self.timeout.map(|timeout| Instant::now() + timeout)
    }

    fn timed_out(&self) -> u8 {
        let seconds = self.timeout.unwrap_or_default().as_secs_f64();
        eprintln!("error: no end after {seconds} s; the run was ended");
        TIMED_OUT
    }

    fn stdin(&self) -> Stdio {
        if self.input {
            Stdio::inherit()
        } else {
            Stdio::null()
        }
    }
}

impl Machine {
    /// Writes to the disks' files what the hypervisor says on the debug console that the guest has changed.
    fn save_disks(&self, debug_console: &[u8]) -> Result<()> {
        for change in Changes(debug_console) {
            let Some(Some(DiskFile(name))) = self.disks.get(change.disk) else {
                bail!(
                    "the hypervisor saves a disk {} that it was not given",
                    change.disk
                );
            };
            let file = fs::File::options().write(true).open(name);
            file.and_then(|file| file.write_all_at(change.bytes, change.offset))
                .with_context(|| format!("cannot save the disk {}", name.display()))?;
        }
        Ok(())
    }
}

/// Changed bytes of a disk.
#[derive(Debug, PartialEq, Eq)]
struct Change<'a> {
    disk: usize,
    offset: u64,
    bytes: &'a [u8],
}

/// The changes in what the hypervisor wrote to the debug console: each a line `testudo-disk: NUMBER OFFSET
/// LENGTH`, the bytes, and the end of a line.
struct Changes<'a>(&'a [u8]);

impl<'a> Iterator for Changes<'a> {
    type Item = Change<'a>;

    fn next(&mut self) -> Option<Change<'a>> {
        const MARK: &[u8] = b"testudo-disk: ";
        loop {
            let at = self.0.windows(MARK.len()).position(|bytes| bytes == MARK)?;
            let rest = &self.0[at + MARK.len()..];
            self.0 = rest;
            let end = rest.iter().position(|byte| *byte == b'\n')?;
            let numbers: Option<Vec<u64>> = std::str::from_utf8(&rest[..end])
                .ok()
                .and_then(|line| line.split(' ').map(|word| word.parse().ok()).collect());
            let Some([disk, offset, len]) = numbers.as_deref() else {
                continue;
            };
            let len = usize::try_from(*len).ok()?;
            let bytes = rest.get(end + 1..)?.get(..len)?;
            self.0 = &rest[end + 1 + len..];
            return Some(Change {
                disk: usize::try_from(*disk).ok()?,
                offset: *offset,
                bytes,
            });
        }
    }
}

/// The status in what the runtime wrote to the debug console.
fn status_in(debug_console: &str) -> Option<u8> {
    debug_console
        .lines()
        .rev()
        .find_map(|line| line.split_once("testudo-exit: ")?.1.get(..3)?.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_of_disks_are_found_between_other_output() {
        let output = b"noise testudo-disk: 1 8192 5\n\n\xFF\0ab\ntestudo-disk: x\n\
                       testudo-disk: 0 0 17\ntestudo-disk: 1 2\ntestudo-exit: 000\n";
        let found: Vec<_> = Changes(output).collect();
        let change = |disk, offset, bytes| Change {
            disk,
            offset,
            bytes,
        };
        assert_eq!(
            found,
            [
                change(1, 8192, b"\n\xFF\0ab"),
                change(0, 0, b"testudo-disk: 1 2")
            ]
        );
        assert_eq!(Changes(b"testudo-disk: 0 0 9\nshort").next(), None);
    }

    #[test]
    fn the_last_status_counts() {
        assert_eq!(status_in("testudo-exit: 007\n"), Some(7));
        assert_eq!(status_in("noise\nxtestudo-exit: 127\nmore\n"), Some(127));
        assert_eq!(status_in("testudo-exit: 1"), None);
        assert_eq!(status_in("testudo-exit: 999\n"), None);
        assert_eq!(status_in(""), None);
    }
}
