//! The emulators that bare-metal programs run on.

mod bochs;
mod iso;
mod qemu;

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::bare::Payload;

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
    /// Further arguments for the emulator.
    pub(crate) extra: Vec<String>,
}

/// What QEMU is to load, as it stands.
pub(crate) struct Program {
    pub(crate) kernel: PathBuf,
    pub(crate) initrd: Option<PathBuf>,
    pub(crate) command_line: String,
}

impl Machine {
    pub(crate) fn new(kind: Kind) -> Self {
        Self {
            kind,
            cpu: Cpu::Svm,
            loader: Loader::Direct,
            processors: 1,
            memory: 512,
            exact: false,
            input: false,
            capture: None,
            timeout: None,
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

    /// Runs what `program` says on QEMU to its end; the status is what it wrote to the debug-exit port, or 0
    /// when it powered the machine off.
    pub(crate) fn run_program(&self, program: &Program) -> Result<u8> {
        qemu::run_program(self, program)
    }

    /// Runs what `program` says on QEMU until the console has shown `mark` and the processors have
    /// halted for good; returns how many instructions they executed.
    pub(crate) fn count(&self, program: &Program, mark: &str) -> Result<u64> {
        qemu::count(self, program, mark)
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
    fn the_last_status_counts() {
        assert_eq!(status_in("testudo-exit: 007\n"), Some(7));
        assert_eq!(status_in("noise\nxtestudo-exit: 127\nmore\n"), Some(127));
        assert_eq!(status_in("testudo-exit: 1"), None);
        assert_eq!(status_in("testudo-exit: 999\n"), None);
        assert_eq!(status_in(""), None);
    }
}
