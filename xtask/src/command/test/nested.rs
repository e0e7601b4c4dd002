//! Hypervisors in guests: `cargo xtask nested` as a user runs it.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use super::Tally;
use crate::run;

/// Only with `--full`: each is a boot of a hypervisor and one of a Linux in it.
pub(super) fn run(tally: &mut Tally, full: bool) -> Result<()> {
    if full {
        run::progress("hypervisors in guests");
        tally.check("nested::kvm_runs_linux", status_of("kvm", &[]));
        tally.check("nested::xen_runs_linux", status_of("xen", &[]));
        tally.check(
            "nested::kvm_with_shadow_paging_runs_linux",
            status_of("kvm", &["--shadow"]),
        );
        // An interrupt that is delivered twice, or a timer that comes early and is forgotten, shows
        // only with several processors.
        tally.check(
            "nested::kvm_with_two_processors_runs_linux",
            status_of("kvm", &["--vcpus", "2"]),
        );
        tally.check(
            "nested::two_kvms_side_by_side",
            status_of("kvm", &["--guests", "2"]),
        );
    }
    Ok(())
}

/// The innermost system's status comes out.
fn status_of(hypervisor: &str, arguments: &[&str]) -> Result<()> {
    let output = Command::new(std::env::current_exe()?)
        .args([
            "nested",
            hypervisor,
            "--exact",
            "--timeout",
            "200",
            "--run",
            "exit 9",
        ])
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .context("cannot run xtask")?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.code() == Some(9),
        "the status is {}, not 9; the output was:\n{text}",
        output.status
    );
    Ok(())
}
