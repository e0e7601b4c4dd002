//! Building the bare-metal programs and packing what they are given.
//!
//! A program's loader may pass it only one file, so its modules travel in one cpio archive whose first
//! entry is called `testudo-modules`; an entry's name is the module's string: its name, and after a
//! space its arguments. The entry `cmdline` holds the program's command line where the loader would
//! alter it. The runtime (`examples/rt`) takes it apart again.

use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;

use crate::cpio::Archive;
use crate::run;
use crate::workplace;

/// Builds a program with the profile `bare`; returns its ELF file.
pub(crate) fn build(package: &str) -> Result<PathBuf> {
    build_binary(package, package)
}

/// As [`build`], for a package with several programs.
pub(crate) fn build_binary(package: &str, binary: &str) -> Result<PathBuf> {
    run::progress(format_args!("building {binary}"));
    run::check(
        Command::new(env!("CARGO"))
            .current_dir(workplace::root())
            .args([
                "build",
                "--quiet",
                "--profile",
                "bare",
                "--package",
                package,
                "--bin",
                binary,
            ]),
    )?;
    Ok(workplace::target().join("bare").join(binary))
}

/// What a program is started with.
pub(crate) struct Payload {
    /// The program's own arguments.
    pub(crate) command_line: String,
    /// Modules: string and contents.
    pub(crate) modules: Vec<(String, Vec<u8>)>,
}

impl Payload {
    /// Bytes in all modules.
    pub(crate) fn size(&self) -> u64 {
        self.modules.iter().map(|(_, data)| data.len() as u64).sum()
    }

    /// The archive that carries the modules, and the command line too if `with_command_line`.
    pub(crate) fn container(&self, with_command_line: bool) -> Vec<u8> {
        let mut archive = Archive::new();
        archive.file("testudo-modules", 0o644, &[]);
        if with_command_line {
            archive.file("cmdline", 0o644, self.command_line.as_bytes());
        }
        for (string, data) in &self.modules {
            archive.file(string, 0o644, data);
        }
        archive.finish()
    }
}
