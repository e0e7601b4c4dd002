//! Running other programs, with what is run shown on demand and failures that name the program.

use std::ffi::OsStr;
use std::io::{IsTerminal, Write};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

static VERBOSE: AtomicBool = AtomicBool::new(false);

/// Has every program's command line printed before it runs.
pub(crate) fn set_verbose(verbose: bool) {
    VERBOSE.store(verbose, Ordering::Relaxed);
}

fn show(command: &Command) {
    if VERBOSE.load(Ordering::Relaxed) {
        let words = std::iter::once(command.get_program()).chain(command.get_args());
        eprintln!("+ {}", words.map(quoted).collect::<Vec<_>>().join(" "));
    }
}

fn quoted(word: &OsStr) -> String {
    let word = word.to_string_lossy();
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=+,.:/@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.into_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

fn name(command: &Command) -> String {
    command.get_program().to_string_lossy().into_owned()
}

/// Starts a program.
pub(crate) fn spawn(command: &mut Command) -> Result<Child> {
    show(command);
    command
        .spawn()
        .with_context(|| format!("cannot start {}", name(command)))
}

/// Runs a program to its end; anything but success is an error.
pub(crate) fn check(command: &mut Command) -> Result<()> {
    let status = spawn(command)?.wait()?;
    if !status.success() {
        bail!("{} failed: {status}", name(command));
    }
    Ok(())
}

/// Runs a program and takes what it writes; its complaints are shown only if it fails.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    Ok(String::from_utf8_lossy(&bytes(command)?).into_owned())
}

/// The same for what is no text.
pub(crate) fn bytes(command: &mut Command) -> Result<Vec<u8>> {
    show(command);
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start {}", name(command)))?;
    if !output.status.success() {
        let complaint = String::from_utf8_lossy(&output.stderr);
        bail!(
            "{} failed: {}\n{}",
            name(command),
            output.status,
            complaint.trim_end()
        );
    }
    Ok(output.stdout)
}

/// Whether a program of this name is on the path.
pub(crate) fn exists(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // Debian's users do not always have the system folders in their path.
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .any(|folder| folder.join(program).is_file())
}

/// Waits for the end of a program, at most until `deadline`; `None` if it had to be killed.
pub(crate) fn wait_until(
    child: &mut Child,
    deadline: Option<Instant>,
) -> Result<Option<ExitStatus>> {
    let Some(deadline) = deadline else {
        return Ok(Some(child.wait()?));
    };
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Says what takes a while, on the error stream, so that output stays output.
pub(crate) fn progress(what: impl std::fmt::Display) {
    let mut stream = std::io::stderr().lock();
    let (on, off) = if stream.is_terminal() {
        ("\x1b[1m", "\x1b[0m")
    } else {
        ("", "")
    };
    // Progress that nobody can read is no reason to stop.
    let _ = writeln!(stream, "{on}xtask:{off} {what}");
}
