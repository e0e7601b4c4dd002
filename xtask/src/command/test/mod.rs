//! `cargo xtask test`: everything that shows that the project works.

mod bluepill;
mod boots;
mod costs;
mod nested;
mod new_device;
mod selftests;
mod sharing;
mod virtio;

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::{run, workplace};

/// Run all tests: on the host, on emulated bare metal, and end to end
#[derive(clap::Args)]
pub(crate) struct Test {
    /// Only the tests whose names contain this, as they are shown: "virtio::", "boot::linux", "cargo clippy"
    filter: Option<String>,
    /// Only what runs on the host: unit and property tests, lints, formatting, documentation
    #[arg(long, conflicts_with = "full")]
    quick: bool,
    /// Also what takes long: the test kernel on every emulator and processor, more guests
    #[arg(long)]
    full: bool,
    /// Show what is executed
    #[arg(short, long)]
    verbose: bool,
}

/// What has been counted so far.
#[derive(Default)]
struct Tally {
    /// What the names of tests must contain to be run.
    filter: Option<String>,
    passed: u64,
    failed: u64,
    /// The names of what failed, for the end.
    failures: Vec<String>,
}

impl Tally {
    /// Whether a test of this name is to be run.
    fn wants(&self, name: &str) -> bool {
        self.filter
            .as_ref()
            .is_none_or(|filter| name.contains(filter))
    }

    /// Runs one check if it is wanted, counts it and says how it ended.
    fn check(&mut self, name: &str, test: impl FnOnce() -> Result<()>) {
        if self.wants(name) {
            self.record(name, test());
        }
    }

    /// Counts a check that was made, and says how it ended.
    fn record(&mut self, name: &str, result: Result<()>) {
        match result {
            Ok(()) => {
                self.passed += 1;
                println!("test {name} ... ok");
            }
            Err(error) => {
                self.fail(name);
                println!("test {name} ... FAILED\n{error:#}");
            }
        }
    }

    fn fail(&mut self, name: &str) {
        self.failed += 1;
        self.failures.push(name.to_owned());
    }

    /// Counts what a test runner counted in its closing line.
    fn add(&mut self, name: &str, passed: u64, failed: u64) {
        self.passed += passed;
        self.failed += failed;
        if failed > 0 {
            self.failures.push(format!("{name}: {failed}"));
        }
    }
}

impl Test {
    pub(crate) fn run(&self) -> Result<u8> {
        run::set_verbose(self.verbose);
        let start = Instant::now();
        let mut tally = Tally {
            filter: self.filter.clone(),
            ..Tally::default()
        };
        host(&mut tally)?;
        if !self.quick {
            new_device::run(&mut tally);
            selftests::run(&mut tally, self.full)?;
            costs::run(&mut tally, self.full);
            boots::run(&mut tally, self.full)?;
            virtio::run(&mut tally, self.full)?;
            sharing::run(&mut tally);
            nested::run(&mut tally, self.full)?;
            bluepill::run(&mut tally, self.full)?;
        }
        if tally.passed + tally.failed == 0 {
            bail!("no test's name contains that");
        }
        if !tally.failures.is_empty() {
            println!("\nfailed:");
            for name in &tally.failures {
                println!("    {name}");
            }
        }
        println!("\n{} s", start.elapsed().as_secs());
        println!("{} passed, {} failed", tally.passed, tally.failed);
        Ok(u8::from(tally.failed > 0))
    }
}

fn cargo(arguments: &[&str]) -> Command {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(workplace::root()).args(arguments);
    cargo
}

/// The tests of the host: cargo's own.
fn host(tally: &mut Tally) -> Result<()> {
    run::progress("formatting, lints, documentation");
    tally.check("cargo fmt", || {
        run::check(&mut cargo(&["fmt", "--all", "--check"]))
    });
    for (what, packages) in groups() {
        let lints = ["clippy", "--quiet", "--all-targets"];
        tally.check(&format!("cargo clippy: {what}"), || {
            run::check(cargo(&lints).args(&packages).args(["--", "-D", "warnings"]))
        });
        let documentation = ["doc", "--quiet", "--no-deps", "--document-private-items"];
        tally.check(&format!("cargo doc: {what}"), || {
            run::check(
                cargo(&documentation)
                    .args(&packages)
                    .env("RUSTDOCFLAGS", "-D warnings"),
            )
        });
    }
    let fuzz = ["clippy", "--quiet", "--manifest-path", "fuzz/Cargo.toml"];
    tally.check("cargo clippy: the fuzz targets", || {
        run::check(cargo(&fuzz).args(["--", "-D", "warnings"]))
    });
    run::progress("unit and property tests");
    for (what, packages) in groups() {
        let name = format!("cargo test: {what}");
        if !tally.wants(&name) {
            continue;
        }
        let (mut closing, mut failures) = (0, 0);
        let mut tests = cargo(&["test", "--no-fail-fast"]);
        tests.args(&packages);
        let ended = lines(tests, |line| {
            if let Some((passed, failed)) = closing_line(line) {
                closing += 1;
                failures += failed;
                tally.add(&name, passed, failed);
            }
        })?;
        if !ended && failures == 0 || closing == 0 {
            tally.fail(&format!("cargo test did not run to its end: {what}"));
        }
    }
    interleavings(tally)
}

/// The concurrent paths of the page tables, in every interleaving. The crates are built another way
/// for it, so in a folder of their own.
fn interleavings(tally: &mut Tally) -> Result<()> {
    const NAME: &str = "cargo test: loom";
    if !tally.wants(NAME) {
        return Ok(());
    }
    run::progress("every interleaving of the page tables' concurrent paths");
    let mut tests = cargo(&["test", "--package", "testudo-ept", "--test", "loom"]);
    tests
        .env("RUSTFLAGS", "--cfg loom")
        .env("CARGO_TARGET_DIR", workplace::target().join("loom"));
    let mut closed = false;
    let ended = lines(tests, |line| {
        if let Some((passed, failed)) = closing_line(line) {
            closed = true;
            tally.add(NAME, passed, failed);
        }
    })?;
    if !ended || !closed {
        tally.fail("the interleavings were not tried to the end");
    }
    Ok(())
}

/// The packages that are built together. Cargo gives all packages of one build the same features of
/// what they share, and the bare-metal programs cannot have those that need the standard library.
fn groups() -> [(&'static str, Vec<String>); 3] {
    let host = [
        "testudo",
        "testudo-arch",
        "testudo-svm",
        "testudo-vmx",
        "testudo-ept",
        "testudo-virtio",
        "testudo-nested",
        "testudo-machine",
        "xtask",
    ];
    let benches = "testudo-benches";
    let mut bare = vec!["--workspace".to_owned()];
    for package in host.iter().chain([&benches]) {
        bare.extend(["--exclude".to_owned(), (*package).to_owned()]);
    }
    [
        ("the crates", vec!["--all-features".to_owned()]),
        ("the bare-metal programs", bare),
        (
            "the benches",
            vec!["--package".to_owned(), benches.to_owned()],
        ),
    ]
}

/// Runs a command, shows its output as it comes, and gives each line to `take`; says whether it succeeded.
fn lines(mut command: Command, mut take: impl FnMut(&str)) -> Result<bool> {
    let mut child = run::spawn(command.stdin(Stdio::null()).stdout(Stdio::piped()))?;
    let output = child.stdout.take().context("the output is piped")?;
    for line in BufReader::new(output).split(b'\n') {
        let line = line?;
        let line = String::from_utf8_lossy(&line);
        println!("{line}");
        take(&line);
    }
    Ok(child.wait()?.success())
}

/// The counts in `test result: ok. 12 passed; 0 failed; …` and in the test kernel's `12 passed, 0 failed`.
fn closing_line(line: &str) -> Option<(u64, u64)> {
    let line = line.trim_end();
    let counts = match line.strip_prefix("test result: ") {
        Some(rest) => rest.split_once(". ")?.1,
        None => line,
    };
    let mut parts = counts.split([';', ',']).map(str::trim);
    let mut count = |what: &str| parts.next()?.strip_suffix(what)?.trim_end().parse().ok();
    Some((count("passed")?, count("failed")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_keeps_other_tests_from_running() {
        let mut tally = Tally {
            filter: Some("virtio::pci".to_owned()),
            ..Tally::default()
        };
        tally.check("boot::linux", || unreachable!("not wanted"));
        tally.check("virtio::pci_split_1", || Ok(()));
        tally.check("virtio::pci_split_2", || bail!("as it must"));
        assert_eq!((tally.passed, tally.failed), (1, 1));
        assert_eq!(tally.failures, ["virtio::pci_split_2"]);
        assert!(Tally::default().wants("anything"));
    }

    #[test]
    fn closing_lines_are_counted() {
        let line = "test result: ok. 12 passed; 3 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s";
        assert_eq!(closing_line(line), Some((12, 3)));
        assert_eq!(closing_line("16 passed, 0 failed\r"), Some((16, 0)));
        for other in ["test a ... ok", "", "passed, failed", "1 skipped"] {
            assert_eq!(closing_line(other), None, "{other}");
        }
    }
}
