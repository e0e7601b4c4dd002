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
    tally.check("nested::kvm_runs_linux", || {
        status_of(EXACT, "kvm", &[]).map(drop)
    });
    tally.check("nested::state_is_saved_and_restored", || {
        renewed(EXACT, &[])
    });
    if full {
        for (test, place, hypervisor, arguments) in LONG {
            tally.check(test, || status_of(place, hypervisor, arguments).map(drop));
        }
        let on_shadow_paging = ["--paging", "shadow"];
        for (test, place, arguments) in [
            ("state_on_shadow_paging", EXACT, &on_shadow_paging[..]),
            ("state_on_vtx", VTX, &[]),
            ("state_on_shadow_paging_on_vtx", VTX, &on_shadow_paging),
        ] {
            tally.check(&format!("nested::{test}_is_saved_and_restored"), || {
                renewed(place, arguments)
            });
        }
    }
    Ok(())
}

/// Where the guest runs, and for how long at the most.
type Place = (&'static [&'static str], &'static str);

const EXACT: Place = (&["--exact"], "200");
/// With one more hypervisor in between.
const EXACT_AND_DEEP: Place = (&["--exact"], "600");
/// Instructions are time on Bochs in any case, and it takes minutes.
const VTX: Place = (&["--backend", "vmx"], "3600");

/// Hypervisors with a Linux whose status comes out: the test's name, the place, the hypervisor, and the arguments of
/// the command.
///
/// An interrupt that is delivered twice, or a timer that comes early and is forgotten, shows only with several
/// processors; and the end of two on VT-x needs a guest of the guest's to leave that has its interrupts off for good.
const LONG: [(&str, Place, &str, &[&str]); 19] = [
    ("nested::xen_runs_linux", EXACT, "xen", &[]),
    (
        "nested::kvm_with_shadow_paging_runs_linux",
        EXACT,
        "kvm",
        &["--shadow"],
    ),
    (
        "nested::kvm_with_shadow_paging_and_two_processors",
        EXACT,
        "kvm",
        &["--shadow", "--vcpus", "2"],
    ),
    (
        "nested::kvm_with_two_processors_runs_linux",
        EXACT,
        "kvm",
        &["--vcpus", "2"],
    ),
    (
        "nested::kvm_in_kvm_runs_linux",
        EXACT_AND_DEEP,
        "kvm",
        &["--depth", "3"],
    ),
    (
        "nested::two_kvms_side_by_side",
        EXACT,
        "kvm",
        &["--guests", "2"],
    ),
    (
        "nested::kvm_on_shadow_paging_runs_linux",
        EXACT,
        "kvm",
        &["--paging", "shadow"],
    ),
    (
        "nested::kvm_on_shadow_paging_with_two_processors",
        EXACT,
        "kvm",
        &["--paging", "shadow", "--vcpus", "2"],
    ),
    (
        "nested::two_kvms_on_different_paging",
        EXACT,
        "kvm",
        &["--guests", "2", "--paging", "nested,shadow"],
    ),
    (
        "nested::two_kvms_share_pages",
        EXACT,
        "kvm",
        &["--share-pages", "--guests", "2", "--vcpus", "2"],
    ),
    ("nested::kvm_runs_linux_on_vtx", VTX, "kvm", &[]),
    (
        "nested::kvm_with_enlightened_vmcs_runs_linux_on_vtx",
        VTX,
        "kvm",
        &["--enlightened"],
    ),
    (
        "nested::kvm_with_shadow_paging_runs_linux_on_vtx",
        VTX,
        "kvm",
        &["--shadow"],
    ),
    (
        "nested::kvm_with_shadow_paging_and_two_processors_on_vtx",
        VTX,
        "kvm",
        &["--shadow", "--vcpus", "2"],
    ),
    (
        "nested::kvm_on_shadow_paging_runs_linux_on_vtx",
        VTX,
        "kvm",
        &["--paging", "shadow"],
    ),
    (
        "nested::kvm_on_shadow_paging_with_two_processors_on_vtx",
        VTX,
        "kvm",
        &["--paging", "shadow", "--vcpus", "2"],
    ),
    (
        "nested::kvm_with_two_processors_runs_linux_on_vtx",
        VTX,
        "kvm",
        &["--vcpus", "2"],
    ),
    (
        "nested::two_kvms_side_by_side_on_vtx",
        VTX,
        "kvm",
        &["--guests", "2"],
    ),
    ("nested::xen_runs_linux_on_vtx", VTX, "xen", &[]),
];

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

/// A system runs on although its hypervisor's nested state goes through bytes all the time, often
/// while that system is what runs.
fn renewed(place: Place, arguments: &[&str]) -> Result<()> {
    let text = status_of(place, "kvm", &[&["--renew", "7"], arguments].concat())?;
    let within = text
        .split_once("times, ")
        .and_then(|(_, rest)| rest.split(' ').next()?.parse::<u32>().ok());
    ensure!(
        within.is_some_and(|within| within > 20),
        "it went through bytes within the innermost system {within:?} times; the output was:\n{text}"
    );
    Ok(())
}

/// The innermost system's status comes out. Gives the output.
fn status_of((place, time): Place, hypervisor: &str, arguments: &[&str]) -> Result<String> {
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
