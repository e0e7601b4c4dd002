//! The test kernel on the emulators.

use std::process::Command;

use anyhow::Result;

use super::{Tally, closing_line, lines};
use crate::run;

struct Place {
    name: &'static str,
    arguments: &'static [&'static str],
    /// Only with `--full`.
    slow: bool,
}

const PLACES: [Place; 7] = [
    Place {
        name: "QEMU, two processors",
        arguments: &["--emulator", "qemu", "--processors", "2"],
        slow: false,
    },
    Place {
        name: "QEMU, one processor, memory above 4 GiB",
        arguments: &[
            "--emulator",
            "qemu",
            "--processors",
            "1",
            "--memory",
            "5120",
        ],
        slow: false,
    },
    Place {
        name: "QEMU through GRUB",
        arguments: &[
            "--emulator",
            "qemu",
            "--loader",
            "grub",
            "--processors",
            "2",
        ],
        slow: false,
    },
    Place {
        name: "QEMU with VT-d",
        arguments: &["--iommu", "intel", "--processors", "1", "iommu::vtd"],
        slow: false,
    },
    Place {
        name: "QEMU with AMD-Vi",
        arguments: &["--iommu", "amd", "--processors", "1", "iommu::amdvi"],
        slow: false,
    },
    Place {
        name: "Bochs with SVM",
        arguments: &["--emulator", "bochs", "--cpu", "svm", "--processors", "2"],
        slow: true,
    },
    Place {
        name: "Bochs with VMX",
        arguments: &["--emulator", "bochs", "--cpu", "vmx", "--processors", "2"],
        slow: true,
    },
];

/// Programs that must end well by themselves, with the arguments that name their machine.
const PROGRAMS: [(&str, &[&str]); 2] = [
    ("tiny-svm", &["--emulator", "qemu"]),
    ("tiny-vmx", &["--emulator", "bochs", "--cpu", "vmx"]),
];

/// What the crates decide against processors, by the arguments of `diff`; the last of each only with `--full`.
const DIFFERENCES: [(&str, &[&str], bool); 7] = [
    (
        "VMRUN against QEMU",
        &["entry", "--count", "20000", "--emulator", "qemu"],
        false,
    ),
    (
        "VM entry against Bochs",
        &["entry", "--count", "20000", "--backend", "vmx"],
        false,
    ),
    (
        "VMRUN against Bochs",
        &["entry", "--count", "20000", "--emulator", "bochs"],
        true,
    ),
    (
        "guest and nested paging against QEMU",
        &["paging", "--count", "20000", "--emulator", "qemu"],
        false,
    ),
    (
        "guest paging and EPT against Bochs",
        &["paging", "--count", "5000", "--backend", "vmx"],
        false,
    ),
    (
        "guest and nested paging against Bochs",
        &["paging", "--count", "50000", "--emulator", "bochs"],
        true,
    ),
    (
        "guest paging and EPT against a newer processor of Bochs",
        &[
            "paging",
            "--count",
            "50000",
            "--backend",
            "vmx",
            "--model",
            "tigerlake",
        ],
        true,
    ),
];

fn differences(tally: &mut Tally, full: bool) -> Result<()> {
    for (name, arguments, _) in DIFFERENCES.iter().filter(|(_, _, slow)| full || !slow) {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("diff").args(*arguments).arg("--json");
        tally.check(name, || run::check(&mut command));
    }
    Ok(())
}

pub(super) fn run(tally: &mut Tally, full: bool) -> Result<()> {
    for (program, arguments) in PROGRAMS {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["run", "--timeout", "120", program]);
        command.args(arguments);
        tally.check(program, || run::check(&mut command));
    }
    differences(tally, full)?;
    for place in PLACES.iter().filter(|place| full || !place.slow) {
        let name = format!("selftest on {}", place.name);
        if !tally.wants(&name) {
            continue;
        }
        run::progress(format_args!("the test kernel on {}", place.name));
        let mut closed = false;
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("selftest").args(place.arguments);
        let succeeded = lines(command, |line| {
            if let Some((passed, failed)) = closing_line(line) {
                closed = true;
                tally.add(&name, passed, failed);
            }
        })?;
        if !closed {
            tally.fail(&format!("{name} did not run to its end"));
        } else if !succeeded
            && !tally
                .failures
                .iter()
                .any(|failure| failure.starts_with(&name))
        {
            tally.fail(&format!("{name} ended with a status of failure"));
        }
    }
    Ok(())
}
