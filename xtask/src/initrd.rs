//! The default initial RAM disk: busybox, the modules that a run wants, and a first process that gives a
//! shell or runs commands.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::bare;
use crate::cpio::Archive;
use crate::debian::{self, Kernel};
use crate::run;

/// A file of the disk: its path, its permissions and its contents.
pub(crate) type File = (String, u32, Vec<u8>);

/// What goes into the disk.
#[derive(Default)]
pub(crate) struct Initrd {
    /// The first process's script, if not the usual one.
    pub(crate) init: Option<String>,
    /// Shell commands to run instead of giving a shell.
    pub(crate) run: Option<String>,
    /// Kernel modules that the first process loads, in order; what they need comes along.
    pub(crate) load: Vec<String>,
    /// Kernel modules that are only there for `modprobe`.
    pub(crate) carry: Vec<String>,
    /// Further files.
    pub(crate) files: Vec<File>,
}

/// Adds a program with the libraries that it needs at run time, some of which are in `folders` and not
/// installed.
pub(crate) fn add_program(
    files: &mut Vec<File>,
    program: &Path,
    place: &str,
    folders: &[PathBuf],
) -> Result<()> {
    let mut ldd = Command::new("ldd");
    ldd.arg(program);
    if !folders.is_empty() {
        ldd.env("LD_LIBRARY_PATH", std::env::join_paths(folders)?);
    }
    let read =
        |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    for word in run::output(&mut ldd)?.split_whitespace() {
        let library = Path::new(word);
        if !library.is_absolute() {
            continue;
        }
        // The loader looks for those that are not installed where their package would have put them.
        let inside = match folders
            .iter()
            .find_map(|folder| library.strip_prefix(folder).ok())
        {
            Some(name) => format!("usr/lib/x86_64-linux-gnu/{}", name.display()),
            None => word.trim_start_matches('/').to_owned(),
        };
        if files.iter().all(|(path, ..)| *path != inside) {
            files.push((inside, 0o755, read(library)?));
        }
    }
    files.push((place.to_owned(), 0o755, read(program)?));
    Ok(())
}

impl Initrd {
    /// The archive, for this kernel.
    pub(crate) fn build(&self, kernel: &Kernel) -> Result<Vec<u8>> {
        let mut archive = Archive::new();
        for folder in [
            "bin",
            "dev",
            "etc",
            "proc",
            "root",
            "sys",
            "tmp",
            "lib",
            "lib/modules",
        ] {
            archive.folder(folder);
        }
        archive.device("dev/console", 5, 1);
        archive.device("dev/null", 1, 3);
        archive.file("bin/busybox", 0o755, &fs::read(debian::busybox()?)?);
        archive.link("bin/sh", "busybox");
        archive.file(
            "bin/exit-port",
            0o755,
            &fs::read(bare::build("exit-port")?)?,
        );
        if self.load.iter().any(|name| name.contains("vsock")) {
            let pipe = fs::read(bare::build("vsock-pipe")?)?;
            archive.file("bin/vsock-pipe", 0o755, &pipe);
        }
        let init = self.init.as_deref().unwrap_or(include_str!("init.sh"));
        archive.file("init", 0o755, init.as_bytes());
        archive.file(
            "etc/modules",
            0o644,
            self.load.join("\n").replace('-', "_").as_bytes(),
        );
        if let Some(commands) = &self.run {
            archive.file("run.sh", 0o644, commands.as_bytes());
        }
        self.add_modules(kernel, &mut archive)?;
        let mut folders = BTreeSet::new();
        for (path, permissions, data) in &self.files {
            for (end, _) in path.match_indices('/') {
                if folders.insert(&path[..end]) {
                    archive.folder(&path[..end]);
                }
            }
            archive.file(path, *permissions, data);
        }
        Ok(archive.finish())
    }

    /// Adds the modules and the `modules.dep` that busybox's `modprobe` reads.
    fn add_modules(&self, kernel: &Kernel, archive: &mut Archive) -> Result<()> {
        let folder = format!("lib/modules/{}", kernel.release);
        archive.folder(&folder);
        let mut dependencies = String::new();
        if !(self.load.is_empty() && self.carry.is_empty()) {
            let mut modules = Modules::of(&kernel.modules)?;
            for name in self.load.iter().chain(&self.carry) {
                modules.choose(name)?;
            }
            for module in &modules.chosen {
                archive.file(&format!("{folder}/{}.ko", module.name), 0o644, &module.data);
                let needs = module.needs.iter().map(|name| format!(" {name}.ko"));
                dependencies.push_str(&format!(
                    "{}.ko:{}\n",
                    module.name,
                    needs.collect::<String>()
                ));
            }
        }
        archive.file(
            &format!("{folder}/modules.dep"),
            0o644,
            dependencies.as_bytes(),
        );
        Ok(())
    }
}

/// Whether a kernel has a driver, as a module or in itself.
pub(crate) fn has_module(kernel: &Kernel, name: &str) -> Result<bool> {
    let modules = Modules::of(&kernel.modules)?;
    let name = name.replace('-', "_");
    Ok(modules.available.contains_key(&name) || modules.built_in.contains(&name))
}

struct Module {
    name: String,
    data: Vec<u8>,
    needs: Vec<String>,
}

/// The kernel's modules by name, and those chosen so far.
struct Modules {
    available: BTreeMap<String, PathBuf>,
    /// Those that the kernel contains, which need no file.
    built_in: Vec<String>,
    chosen: Vec<Module>,
}

impl Modules {
    fn of(folder: &Path) -> Result<Self> {
        // One path on each line, such as `kernel/drivers/block/virtio_blk.ko`.
        let list = fs::read_to_string(folder.join("modules.builtin")).unwrap_or_default();
        let name = |path: &str| {
            Some(
                path.rsplit('/')
                    .next()?
                    .strip_suffix(".ko")?
                    .replace('-', "_"),
            )
        };
        let mut modules = Self {
            available: BTreeMap::new(),
            built_in: list.lines().filter_map(name).collect(),
            chosen: Vec::new(),
        };
        modules.scan(folder)?;
        Ok(modules)
    }

    fn scan(&mut self, folder: &Path) -> Result<()> {
        let entries =
            fs::read_dir(folder).with_context(|| format!("no modules in {}", folder.display()))?;
        for entry in entries {
            let entry = entry?;
            let path = entry.path();
            if entry.file_type()?.is_dir() {
                self.scan(&path)?;
            } else if let Some((name, "ko" | "ko.xz" | "ko.zst")) = path
                .file_name()
                .and_then(|name| name.to_str()?.split_once('.'))
            {
                self.available.insert(name.replace('-', "_"), path.clone());
            }
        }
        Ok(())
    }

    /// Chooses a module after all that it needs, and returns those names, nearest last.
    fn choose(&mut self, name: &str) -> Result<Vec<String>> {
        let name = name.replace('-', "_");
        if let Some(module) = self.chosen.iter().find(|module| module.name == name) {
            return Ok(module.needs.clone());
        }
        if self.built_in.contains(&name) {
            return Ok(Vec::new());
        }
        let Some(path) = self.available.get(&name) else {
            bail!("the kernel has no module {name}");
        };
        let data = read_module(path)?;
        let mut needs = Vec::new();
        for direct in direct_needs(&data) {
            // `modules.dep` names what is needed directly first and what that needs after it.
            let further = self.choose(&direct)?;
            for need in std::iter::once(direct.replace('-', "_")).chain(further) {
                if !needs.contains(&need) && !self.built_in.contains(&need) {
                    needs.push(need);
                }
            }
        }
        // In `modules.dep` each module comes before those that it needs itself: `modprobe` starts from the end.
        // `chosen` has the opposite order.
        let place = |need: &String| self.chosen.iter().position(|module| module.name == *need);
        needs.sort_by_key(|need| std::cmp::Reverse(place(need)));
        self.chosen.push(Module {
            name,
            data,
            needs: needs.clone(),
        });
        Ok(needs)
    }
}

/// A module's bytes, unpacked where the distribution packs it.
fn read_module(path: &Path) -> Result<Vec<u8>> {
    let program = match path.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        _ => return fs::read(path).with_context(|| format!("cannot read {}", path.display())),
    };
    debian::require(&[debian::Tool {
        program,
        package: if program == "xz" { "xz-utils" } else { program },
    }])?;
    let output = std::process::Command::new(program)
        .args(["-dc", "--"])
        .arg(path)
        .output()?;
    if !output.status.success() {
        bail!("{program} cannot unpack {}", path.display());
    }
    Ok(output.stdout)
}

/// The names after `depends=` in the module's information section.
fn direct_needs(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(start) = module.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let value = module[start + KEY.len()..]
        .split(|&byte| byte == 0)
        .next()
        .unwrap_or(&[]);
    String::from_utf8_lossy(value)
        .split(',')
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn needs_are_read_from_the_information_section() {
        let module = b"\x7fELF\0license=GPL\0depends=virtio,virtio_ring\0retpoline=Y\0";
        assert_eq!(direct_needs(module), ["virtio", "virtio_ring"]);
        assert!(direct_needs(b"x\0depends=\0y").is_empty());
        assert!(direct_needs(b"nothing").is_empty());
    }
}
