//! `cargo xtask diff`: the validators and walkers against processors.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::bare::{self, Payload};
use crate::emulator::{Cpu, Kind, Machine, of_model};
use crate::{run, workplace};

/// Compare what the crates decide with what a processor does
#[derive(clap::Args)]
pub(crate) struct Diff {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    /// VM entry: random states near the border of validity, asked of the validator and entered
    Entry(Comparison),
    /// Paging: random tables and accesses of a guest, asked of the walkers and executed
    Paging(Comparison),
}

#[derive(clap::Args)]
struct Comparison {
    /// The processor's virtualization
    #[arg(long, value_enum, default_value = "svm")]
    backend: Cpu,
    /// The emulator that has the processor [default: qemu for svm, bochs for vmx]
    #[arg(long, value_enum)]
    emulator: Option<Kind>,
    /// Another processor model of Bochs
    #[arg(long, value_name = "MODEL")]
    model: Option<String>,
    /// The number of states, or of cases
    #[arg(long, value_name = "N", default_value_t = 100_000)]
    count: u64,
    /// Where the random numbers begin
    #[arg(long, value_name = "S", default_value_t = 1)]
    seed: u64,
    /// Try this one only
    #[arg(long, value_name = "INDEX")]
    only: Option<u64>,
    /// Print each before it is tried
    #[arg(long)]
    trace: bool,
    /// Print one flat JSON object
    #[arg(long)]
    json: bool,
    /// End the run after this time, with status 124
    #[arg(long, value_name = "SECS", default_value_t = 3600)]
    timeout: u64,
    /// Show what is executed
    #[arg(short, long)]
    verbose: bool,
}

impl Diff {
    pub(crate) fn run(&self) -> Result<u8> {
        match &self.what {
            What::Entry(comparison) => comparison.run(match comparison.backend {
                Cpu::Svm => "diff-svm",
                Cpu::Vmx => "diff-vmx",
            }),
            What::Paging(comparison) => comparison.run("diff-paging"),
        }
    }
}

impl Comparison {
    fn run(&self, package: &str) -> Result<u8> {
        run::set_verbose(self.verbose);
        let kind = self.emulator.unwrap_or(match self.backend {
            Cpu::Svm => Kind::Qemu,
            Cpu::Vmx => Kind::Bochs,
        });
        let extra = of_model(kind, self.model.as_deref())?;
        let program = bare::build(package)?;
        let mut command_line = format!("count={} seed={}", self.count, self.seed);
        if let Some(index) = self.only {
            command_line += &format!(" only={index}");
        }
        if self.trace {
            command_line += " trace";
        }
        let payload = Payload {
            command_line,
            modules: Vec::new(),
        };
        let folder = workplace::RunFolder::new()?;
        let console = self.json.then(|| folder.file("console"));
        let machine = Machine {
            cpu: self.backend,
            capture: console.clone(),
            timeout: Some(Duration::from_secs(self.timeout)),
            extra,
            ..Machine::new(kind)
        };
        let status = machine.run(&program, &payload)?;
        if let Some(console) = console {
            let output = fs::read(&console).context("cannot read what the program said")?;
            let output = String::from_utf8_lossy(&output);
            let Some(figures) = figures(&output) else {
                bail!("the program gave no figures:\n{}", output.trim_end());
            };
            println!("{{{figures}}}");
            // What is wrong belongs to people; the object above is for programs.
            for line in output.lines().filter(|l| l.starts_with("disagreement")) {
                eprintln!("{line}");
            }
        }
        Ok(status)
    }
}

/// The members of a JSON object, from the program's last line: `diff: NAME=NUMBER ...`.
fn figures(output: &str) -> Option<String> {
    let line = output
        .lines()
        .rev()
        .find_map(|l| l.strip_prefix("diff: "))?;
    let members: Option<Vec<String>> = line
        .split_ascii_whitespace()
        .map(|word| {
            let (name, number) = word.split_once('=')?;
            number.parse::<u64>().ok()?;
            Some(format!("\"{name}\":{number}"))
        })
        .collect();
    Some(members?.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_line_becomes_an_object() {
        let output = "rule A satisfied=1\r\ndiff: states=5 disagreements=0 rules=2\r\n";
        let expected = "\"states\":5,\"disagreements\":0,\"rules\":2";
        assert_eq!(figures(output).as_deref(), Some(expected));
        assert_eq!(figures("diff: states=many"), None);
        assert_eq!(figures("the program died"), None);
    }
}
