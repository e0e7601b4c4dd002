//! The hypervisor that starts first: `cargo xtask bluepill` as a user runs it.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use super::Tally;
use crate::bare;
use crate::command::bluepill::PILL;
use crate::run;

pub(super) fn run(tally: &mut Tally, full: bool) -> Result<()> {
    run::progress("a machine under a hypervisor that started first");
    tally.check("bluepill::adversary_gets_nowhere", || {
        adversary("svm", "qemu")
    });
    tally.check("bluepill::adversary_gets_nowhere_on_vmx", || {
        adversary("vmx", "bochs")
    });
    tally.check("bluepill::kvm_runs_linux_on_vmx", || {
        let arguments = ["--backend", "vmx", "--kvm", "--run", "uname -a; exit 7"];
        status_of(&arguments, 7, "Linux")
    });
    // QEMU alone does not get a second processor of Linux to start when it counts instructions as time.
    tally.check("bluepill::linux_has_the_machine", || {
        status_of(
            &["--processors", "2", "--run", LOOK_AROUND],
            5,
            "Testudo pill: processors 2",
        )
    });
    // With two processors QEMU ends turns between an event and the guest's first instruction behind it.
    tally.check("bluepill::kvm_runs_linux", || {
        status_of(
            &["--kvm", "--processors", "2", "--run", "nproc; exit 9"],
            9,
            "2",
        )
    });
    if full {
        tally.check("bluepill::adversary_gets_nowhere_on_bochs", || {
            adversary("svm", "bochs")
        });
        tally.check("bluepill::grub_starts_it", || {
            status_of(
                &["--loader", "grub", "--run", "pill-info"],
                0,
                "Testudo pill",
            )
        });
        tally.check("bluepill::virtualization_can_be_kept_back", || {
            status_of(
                &[
                    "--no-nesting",
                    "--exact",
                    "--run",
                    "! grep -w svm /proc/cpuinfo",
                ],
                0,
                "",
            )
        });
        tally.check("bluepill::kvm_runs_linux_on_two_processors_on_vmx", || {
            let machine = ["--backend", "vmx", "--kvm", "--processors", "2"];
            status_of(
                &[&machine[..], &["--run", "nproc; exit 9"]].concat(),
                9,
                "2",
            )
        });
        tally.check("bluepill::linux_has_the_machine_on_vmx", || {
            status_of(
                &[
                    "--backend",
                    "vmx",
                    "--processors",
                    "2",
                    "--run",
                    LOOK_AROUND,
                ],
                5,
                "Testudo pill: processors 2",
            )
        });
    }
    Ok(())
}

/// Both processors, the real interrupt controller, and SVM or VMX for whoever wants it.
const LOOK_AROUND: &str = "test $(nproc) = 2 && pill-info && grep -Eqw 'svm|vmx' /proc/cpuinfo \
                           && grep -q IO-APIC /proc/interrupts && exit 5";

/// The guest that tries to get at the hypervisor.
fn adversary(backend: &str, emulator: &str) -> Result<()> {
    let kernel = bare::build_binary(PILL, "adversary")?;
    let kernel = kernel.to_string_lossy();
    let arguments = [
        "--backend",
        backend,
        "--emulator",
        emulator,
        "--processors",
        "2",
        "--run",
        "",
        "--kernel",
        &kernel,
    ];
    status_of(&arguments, 0, "resets_a_processor_from_a_guest ... ok")
}

/// The system ends with this status and has shown this.
fn status_of(arguments: &[&str], status: i32, says: &str) -> Result<()> {
    let output = Command::new(std::env::current_exe()?)
        .args(["bluepill", "--timeout", "1200"])
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .context("cannot run xtask")?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.code() == Some(status) && text.contains(says),
        "the status is {}, not {status}, or `{says}` is missing; the output was:\n{text}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
