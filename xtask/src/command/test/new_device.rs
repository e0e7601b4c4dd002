//! A device as `cargo xtask new-device` begins it: in a copy of the tree, where it compiles and passes its test.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::{Tally, cargo};
use crate::command::new_device;
use crate::run;
use crate::workplace::{self, RunFolder};

pub(super) fn run(tally: &mut Tally) {
    tally.check("new_device::works_as_it_is_written", works);
}

fn works() -> Result<()> {
    run::progress("a new device");
    let folder = RunFolder::new()?;
    let root = folder.file("tree");
    copy(workplace::root(), &root)?;
    new_device::create(&root, "new_thing", 61)?;
    // What both trees share was built already.
    let mut test = cargo(&[
        "test",
        "--quiet",
        "--package",
        "testudo-virtio",
        "--test",
        "new_thing",
    ]);
    test.current_dir(&root)
        .env("CARGO_TARGET_DIR", workplace::target());
    run::check(&mut test)?;
    let lints = [
        "clippy",
        "--quiet",
        "--manifest-path",
        "fuzz/Cargo.toml",
        "--bin",
        "virtio_new_thing",
    ];
    let mut lint = cargo(&lints);
    lint.current_dir(&root)
        .args(["--", "-D", "warnings"])
        .env("CARGO_TARGET_DIR", workplace::root().join("fuzz/target"));
    run::check(&mut lint)?;
    let mut format = cargo(&["fmt", "--package", "testudo-virtio", "--check"]);
    run::check(format.current_dir(&root))
}

/// Copies what is not built.
fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from).with_context(|| format!("cannot read {}", from.display()))? {
        let entry = entry?;
        let (name, kind) = (entry.file_name(), entry.file_type()?);
        let (source, copied) = (entry.path(), to.join(&name));
        if name == "target" || name == ".git" {
            continue;
        }
        if kind.is_dir() {
            copy(&source, &copied)?;
        } else if kind.is_file() {
            fs::copy(&source, &copied)
                .with_context(|| format!("cannot copy {}", source.display()))?;
        }
    }
    Ok(())
}
