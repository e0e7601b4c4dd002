//! Hypervisors in guests: `cargo xtask nested` as a user runs it.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use super::Tally;
use crate::{bare, run};

/// Small hypervisors; and with `--full` whole ones, each with a Linux in it.
pub(super) fn run(tally: &mut Tally, full: bool) -> Result<()> {
    run::progress("hypervisors in guests");
    tally.check("nested::tiny_vmx_runs_its_guest", tiny_vmx);
    tally.check("nested::vmx_instructions_fail_as_the_processors", || {
        in_guest("selftest", "vmx::", &[]).map(drop)
    });
    tally.check("nested::vmx_instructions_on_shadow_paging", || {
        in_guest("selftest", "vmx::", &["--paging", "shadow"]).map(drop)
    });
    tally.check("nested::kvm_runs_linux", || status_of("kvm", &[]));
    tally.check("nested::state_is_saved_and_restored", || {
        renewed(&["--exact"], "200")
    });
    if full {
        tally.check(
            "nested::state_on_shadow_paging_is_saved_and_restored",
            || renewed(&["--exact", "--paging", "shadow"], "200"),
        );
        tally.check("nested::xen_runs_linux", || status_of("xen", &[]));
        tally.check("nested::kvm_with_shadow_paging_runs_linux", || {
            status_of("kvm", &["--shadow"])
        });
        // An interrupt that is delivered twice, or a timer that comes early and is forgotten, shows
        // only with several processors.
        tally.check("nested::kvm_with_two_processors_runs_linux", || {
            status_of("kvm", &["--vcpus", "2"])
        });
        tally.check("nested::two_kvms_side_by_side", || {
            status_of("kvm", &["--guests", "2"])
        });
        tally.check("nested::kvm_on_shadow_paging_runs_linux", || {
            status_of("kvm", &["--paging", "shadow"])
        });
        tally.check("nested::kvm_on_shadow_paging_with_two_processors", || {
            status_of("kvm", &["--paging", "shadow", "--vcpus", "2"])
        });
        tally.check("nested::two_kvms_on_different_paging", || {
            status_of("kvm", &["--guests", "2", "--paging", "nested,shadow"])
        });
        tally.check("nested::two_kvms_share_pages", || {
            let shared = ["--share-pages", "--guests", "2", "--vcpus", "2"];
            status_of("kvm", &shared)
        });
        // Instructions are time on Bochs in any case, and it takes minutes.
        let on_vtx = ["--backend", "vmx"];
        tally.check("nested::kvm_runs_linux_on_vtx", || {
            status_by(&on_vtx, "kvm", "1800", &[]).map(drop)
        });
        tally.check("nested::kvm_with_shadow_paging_runs_linux_on_vtx", || {
            status_by(&on_vtx, "kvm", "1800", &["--shadow"]).map(drop)
        });
        tally.check("nested::kvm_on_shadow_paging_runs_linux_on_vtx", || {
            status_by(&on_vtx, "kvm", "1800", &["--paging", "shadow"]).map(drop)
        });
        tally.check("nested::state_is_saved_and_restored_on_vtx", || {
            renewed(&on_vtx, "1800")
        });
        tally.check(
            "nested::state_on_shadow_paging_is_saved_and_restored_on_vtx",
            || renewed(&["--backend", "vmx", "--paging", "shadow"], "1800"),
        );
        tally.check("nested::xen_runs_linux_on_vtx", || {
            status_by(&on_vtx, "xen", "3600", &[]).map(drop)
        });
        // Its end needs a guest of the guest's to leave that has its interrupts off for good.
        tally.check("nested::kvm_with_two_processors_runs_linux_on_vtx", || {
            status_by(&on_vtx, "kvm", "3600", &["--vcpus", "2"]).map(drop)
        });
        tally.check("nested::two_kvms_side_by_side_on_vtx", || {
            status_by(&on_vtx, "kvm", "3600", &["--guests", "2"]).map(drop)
        });
        tally.check(
            "nested::kvm_on_shadow_paging_with_two_processors_on_vtx",
            || {
                let two = ["--paging", "shadow", "--vcpus", "2"];
                status_by(&on_vtx, "kvm", "3600", &two).map(drop)
            },
        );
    }
    Ok(())
}

/// The smallest hypervisor of VT-x sees the exits of its guest that it sees on the bare machine.
fn tiny_vmx() -> Result<()> {
    let text = in_guest("tiny-vmx", "", &[])?;
    let exits = ["0x0006: CPUID", "0x0008: HLT", "0x0009: EPT violation"];
    let seen = exits.iter().all(|exit| text.contains(exit));
    ensure!(seen, "exits are missing; the output was:\n{text}");
    Ok(())
}

/// Runs a bare-metal program that uses VT-x as the guest, with these arguments to `boot`; it ends well.
/// Its output.
fn in_guest(program: &str, command_line: &str, arguments: &[&str]) -> Result<String> {
    let kernel = bare::build(program)?;
    let output = Command::new(std::env::current_exe()?)
        .args(["boot", "--backend", "vmx", "--nested", "--memory", "128"])
        .args(arguments)
        .args(["--timeout", "120", "--cmdline", command_line, "--kernel"])
        .arg(kernel)
        .stdin(Stdio::null())
        .output()
        .context("cannot run xtask")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let status = output.status;
    ensure!(status.success(), "{status}; the output was:\n{text}");
    Ok(text)
}

/// The innermost system's status comes out.
fn status_of(hypervisor: &str, arguments: &[&str]) -> Result<()> {
    status_by(&["--exact"], hypervisor, "200", arguments).map(drop)
}

/// A system runs on although its hypervisor's nested state goes through bytes all the time, often
/// while that system is what runs.
fn renewed(place: &[&str], time: &str) -> Result<()> {
    let text = status_by(place, "kvm", time, &["--renew", "7"])?;
    let within = text
        .split_once("times, ")
        .and_then(|(_, rest)| rest.split(' ').next()?.parse::<u32>().ok());
    ensure!(
        within.is_some_and(|within| within > 20),
        "it went through bytes within the innermost system {within:?} times; the output was:\n{text}"
    );
    Ok(())
}

/// As [`status_of`], in some place and within a time. Gives the output.
fn status_by(place: &[&str], hypervisor: &str, time: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(std::env::current_exe()?)
        .args(["nested", hypervisor, "--timeout", time, "--run", "exit 9"])
        .args(place)
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
    Ok(text.into_owned())
}
