//! What exits cost, against limits: exact instruction counts, so the same on every machine.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use super::Tally;
use crate::run;

/// A run of `cargo xtask measure`, and the most that figures of it may be.
struct Limits {
    test: &'static str,
    arguments: &'static [&'static str],
    figures: &'static [(&'static str, u64)],
}

const LIMITS: [Limits; 3] = [
    Limits {
        test: "costs::exits",
        arguments: &["exits"],
        figures: &[("cpuid", 300)],
    },
    Limits {
        test: "costs::exits_on_vtx",
        arguments: &["exits", "--backend", "vmx"],
        figures: &[("cpuid", 250)],
    },
    // What a guest hypervisor waits for its VMRUN and #VMEXIT.
    Limits {
        test: "costs::nested",
        arguments: &["nested"],
        figures: &[("vmrun", 1200), ("vmexit", 500)],
    },
];

pub(super) fn run(tally: &mut Tally) {
    run::progress("costs of exits");
    for limits in LIMITS {
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
fn excess(text: &str, figures: &[(&str, u64)]) -> Result<Vec<String>> {
    let mut excess = Vec::new();
    for (name, limit) in figures {
        let cost = text
            .lines()
            .filter_map(|line| line.split_once(' '))
            .find(|(figure, _)| figure == name)
            .and_then(|(_, value)| value.parse::<u64>().ok())
            .with_context(|| format!("no figure {name} in:\n{text}"))?;
        if cost > *limit {
            excess.push(format!(
                "{name} takes {cost} instructions, more than {limit}"
            ));
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
        let limits = [("vmrun", 1200), ("vmexit", 500)];
        assert_eq!(
            excess(text, &limits).unwrap(),
            ["vmexit takes 501 instructions, more than 500"]
        );
        assert!(excess("vmrun_directly 4", &limits).is_err());
    }
}
