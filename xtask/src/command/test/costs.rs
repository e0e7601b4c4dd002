//! What exits cost, against limits: exact instruction counts, so the same on every machine.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use super::Tally;
use crate::run;

/// A run of `cargo xtask measure`, and the most that figures of it may be.
struct Limits {
    test: &'static str,
    /// It takes minutes: only with `--full`.
    long: bool,
    arguments: &'static [&'static str],
    figures: &'static [(&'static str, f64)],
}

const LIMITS: [Limits; 6] = [
    Limits {
        test: "costs::exits",
        long: false,
        arguments: &["exits"],
        figures: &[("cpuid", 300.0)],
    },
    Limits {
        test: "costs::exits_on_vtx",
        long: false,
        arguments: &["exits", "--backend", "vmx"],
        figures: &[("cpuid", 250.0)],
    },
    // What a guest hypervisor waits for its VMRUN and #VMEXIT, and how often the processor exits for one of
    // its guest's exits: for that, and for the VMRUN.
    Limits {
        test: "costs::nested",
        long: false,
        arguments: &["nested", "--no-boots"],
        figures: &[
            ("vmrun", 1200.0),
            ("vmexit", 500.0),
            ("exits_per_l2_exit", 2.01),
        ],
    },
    Limits {
        test: "costs::nested_on_vtx",
        long: false,
        arguments: &["nested", "--no-boots", "--backend", "vmx"],
        figures: &[
            ("vmrun", 1200.0),
            ("vmexit", 500.0),
            ("exits_per_l2_exit", 2.01),
            ("accesses_per_l2_exit", 0.0),
        ],
    },
    // A Linux in a guest's KVM against the same as our guest.
    Limits {
        test: "costs::nested_boot",
        long: true,
        arguments: &["nested"],
        figures: &[("boot_ratio", 1.1)],
    },
    Limits {
        test: "costs::nested_boot_on_vtx",
        long: true,
        arguments: &["nested", "--backend", "vmx"],
        figures: &[("boot_ratio", 1.1)],
    },
];

pub(super) fn run(tally: &mut Tally, full: bool) {
    run::progress("costs of exits");
    for limits in LIMITS.into_iter().filter(|limits| full || !limits.long) {
        tally.check(limits.test, || measured(&limits));
    }
}

fn measured(limits: &Limits) -> Result<()> {
    let output = Command::new(std::env::current_exe()?)
        .arg("measure")
        .args(limits.arguments)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run xtask")?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "{}:\n{text}", output.status);
    let excess = excess(&text, limits.figures)?;
    if !excess.is_empty() {
        bail!("{}", excess.join("\n"));
    }
    Ok(())
}

/// The figures that are above their limits, as sentences.
fn excess(text: &str, figures: &[(&str, f64)]) -> Result<Vec<String>> {
    let mut excess = Vec::new();
    for (name, limit) in figures {
        let cost = text
            .lines()
            .filter_map(|line| line.split_once(' '))
            .find(|(figure, _)| figure == name)
            .and_then(|(_, value)| value.parse::<f64>().ok())
            .with_context(|| format!("no figure {name} in:\n{text}"))?;
        if cost > *limit {
            excess.push(format!("{name} is {cost}, more than {limit}"));
        }
    }
    Ok(excess)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_above_its_limit_or_missing_is_told() {
        let text = "vmrun 1200\nvmexit 501\nvmexit_directly 1\n";
        let limits = [("vmrun", 1200.0), ("vmexit", 500.0)];
        assert_eq!(
            excess(text, &limits).unwrap(),
            ["vmexit is 501, more than 500"]
        );
        assert!(excess("vmrun_directly 4", &limits).is_err());
    }
}
