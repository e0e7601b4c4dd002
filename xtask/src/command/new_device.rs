//! `cargo xtask new-device`: what a new virtio device begins with.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use crate::workplace;

/// In the templates, the device's name stands as these, and its number as the last.
const TYPE: &str = "Template";
const MODULE: &str = "template";
const NUMBER: &str = "0xFFFF_FFFF";

/// Begin a virtio device: its module, a test with a driver, and a fuzz target, all of which work
#[derive(clap::Args)]
pub(crate) struct NewDevice {
    /// The device's name as a module: lower-case words with underscores between them
    name: String,
    /// The device's number (VIRTIO 1.3, section 5) [default: one that the specification gives to none]
    #[arg(
        long,
        value_name = "N",
        default_value_t = 0xFFFF,
        hide_default_value = true
    )]
    id: u32,
}

impl NewDevice {
    pub(crate) fn run(&self) -> Result<u8> {
        for file in create(workplace::root(), &self.name, self.id)? {
            println!("{file}");
        }
        println!(
            "\nFill in the configuration space and `process`. To have it among those that the tests of hostile\n\
             drivers and the fuzz targets of the transports use, add it to `zoo` in virtio/tests/support/zoo.rs and to\n\
             `Kind` in fuzz/src/virtio.rs. A guest gets it where the machine is assembled."
        );
        Ok(0)
    }
}

/// Writes the device into the tree at `root`; the files that are new or changed.
pub(super) fn create(root: &Path, name: &str, id: u32) -> Result<Vec<String>> {
    let type_name = type_name(name)?;
    let list = "virtio/src/device/mod.rs";
    let targets = "fuzz/Cargo.toml";
    let new = [
        (
            format!("virtio/src/device/{name}.rs"),
            include_str!("../../templates/device.rs"),
        ),
        (
            format!("virtio/tests/{name}.rs"),
            include_str!("../../templates/driver.rs"),
        ),
        (
            format!("fuzz/fuzz_targets/virtio_{name}.rs"),
            include_str!("../../templates/fuzz.rs"),
        ),
    ];
    for (file, _) in &new {
        ensure!(!root.join(file).exists(), "{file} is there already");
    }
    let folder = format!("virtio/src/device/{name}");
    ensure!(!root.join(&folder).exists(), "{folder} is there already");
    let read = |file: &str| {
        fs::read_to_string(root.join(file)).with_context(|| format!("cannot read {file}"))
    };
    let modules = with_module(&read(list)?, name, &type_name)?;
    let mut manifest = read(targets)?;
    manifest.push_str(&format!(
        "\n[[bin]]\nname = \"virtio_{name}\"\npath = \"fuzz_targets/virtio_{name}.rs\"\ntest = false\ndoc = false\n\
         bench = false\n"
    ));
    let number = format!("{id}");
    let filled = new.map(|(file, template)| {
        let text = template
            .replace(NUMBER, &number)
            .replace(TYPE, &type_name)
            .replace(MODULE, name);
        (file, text)
    });
    let changed = [(list.to_owned(), modules), (targets.to_owned(), manifest)];
    let mut files = Vec::new();
    for (file, text) in filled.into_iter().chain(changed) {
        fs::write(root.join(&file), text).with_context(|| format!("cannot write {file}"))?;
        files.push(file);
    }
    Ok(files)
}

/// The name of the type for that of a module.
fn type_name(module: &str) -> Result<String> {
    let words: Vec<_> = module.split('_').collect();
    let good = |word: &&str| {
        word.starts_with(|c: char| c.is_ascii_lowercase())
            && word
                .chars()
                .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit())
    };
    ensure!(
        words.iter().all(good),
        "{module} is no name of a module: lower-case words with underscores between them"
    );
    let capital = |word: &str| word[..1].to_ascii_uppercase() + &word[1..];
    let name: String = words.iter().map(|word| capital(word)).collect();
    // A word that means something to the compiler is no module either.
    if KEYWORDS.contains(&module) {
        bail!("{module} is a word of the language");
    }
    Ok(name)
}

/// Rust's, also those that it only keeps back.
const KEYWORDS: [&str; 50] = [
    "abstract", "as", "async", "await", "become", "box", "break", "const", "continue", "crate",
    "do", "dyn", "else", "enum", "extern", "false", "final", "fn", "for", "gen", "if", "impl",
    "in", "let", "loop", "macro", "match", "mod", "move", "mut", "override", "priv", "pub", "ref",
    "return", "self", "static", "struct", "super", "trait", "true", "try", "type", "typeof",
    "unsafe", "unsized", "use", "virtual", "where", "while",
];

/// The list of devices with one more, where the alphabet has it.
fn with_module(list: &str, name: &str, type_name: &str) -> Result<String> {
    let declared = |line: &str| line.starts_with("mod ") && line.ends_with(';');
    let exported = |line: &str| line.starts_with("pub use ") && !line.starts_with("pub use crate");
    let list = with_line(list, &format!("mod {name};"), declared)?;
    with_line(&list, &format!("pub use {name}::{type_name};"), exported)
}

/// `text` with one line more among those of a kind, which are in order.
fn with_line(text: &str, line: &str, kind: impl Fn(&str) -> bool) -> Result<String> {
    let mut lines: Vec<_> = text.lines().collect();
    let last = lines.iter().rposition(|other| kind(other));
    let last = last.context("virtio/src/device/mod.rs has no list of devices")?;
    let after = lines.iter().position(|other| kind(other) && *other > line);
    lines.insert(after.unwrap_or(last + 1), line);
    Ok(lines.join("\n") + "\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_types() {
        for (name, expected) in [("gpio", "Gpio"), ("i2c_adapter", "I2cAdapter")] {
            assert_eq!(type_name(name).expect(name), expected);
        }
        for name in [
            "", "Gpio", "2d", "a__b", "a_", "../a", "a-b", "type", "self",
        ] {
            assert!(type_name(name).is_err(), "{name}");
        }
    }

    #[test]
    fn the_list_stays_in_order() {
        let list = "mod a;\nmod c;\n\npub use a::A;\npub use c::{C, D};\n\nuse x;\n";
        let with = |name| with_module(list, name, "T").expect("a list");
        assert_eq!(
            with("b"),
            "mod a;\nmod b;\nmod c;\n\npub use a::A;\npub use b::T;\npub use c::{C, D};\n\nuse x;\n"
        );
        assert!(with("d").contains("mod c;\nmod d;\n\n"));
        assert!(with("d").contains("pub use c::{C, D};\npub use d::T;\n\n"));
        assert!(with_module("nothing", "b", "B").is_err());
    }

    #[test]
    fn what_is_there_is_not_overwritten() {
        let error = create(workplace::root(), "rng", 1).expect_err("it is there");
        assert!(error.to_string().contains("there already"), "{error}");
        let error = create(workplace::root(), "net", 1).expect_err("it is there");
        assert!(error.to_string().contains("there already"), "{error}");
    }
}
