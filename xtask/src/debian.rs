//! Packages of Debian and its relatives: installing tools, and fetching files without installing them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Once;

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use crate::{initrd, run, workplace};

/// A program that a command needs, and the package that has it.
pub(crate) struct Tool {
    pub(crate) program: &'static str,
    pub(crate) package: &'static str,
}

/// Installs what is missing, or says exactly what is.
pub(crate) fn require(tools: &[Tool]) -> Result<()> {
    let missing: Vec<&Tool> = tools
        .iter()
        .filter(|tool| !run::exists(tool.program))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let programs = missing
        .iter()
        .map(|tool| tool.program)
        .collect::<Vec<_>>()
        .join(", ");
    let mut packages: Vec<&str> = missing.iter().map(|tool| tool.package).collect();
    packages.dedup();
    if !run::exists("apt-get") {
        bail!(
            "missing: {programs} (in Debian's packages: {})",
            packages.join(", ")
        );
    }
    run::progress(format_args!(
        "installing {} (for {programs})",
        packages.join(", ")
    ));
    update_lists()?;
    run::check(
        privileged("apt-get")
            .context(format!("cannot install {}", packages.join(" ")))?
            .args(["install", "--yes", "--no-install-recommends", "--quiet"])
            .args(&packages)
            .stdout(Stdio::null()),
    )?;
    match tools.iter().find(|tool| !run::exists(tool.program)) {
        Some(tool) => bail!(
            "{} was installed, yet there is no {}",
            tool.package,
            tool.program
        ),
        None => Ok(()),
    }
}

/// A command that runs with the rights to install.
fn privileged(program: &str) -> Result<Command> {
    let user = run::output(Command::new("id").arg("-u"))?;
    let mut command = if user.trim() == "0" {
        Command::new(program)
    } else if run::exists("sudo") {
        let mut sudo = Command::new("sudo");
        sudo.args(["--preserve-env=DEBIAN_FRONTEND", program]);
        sudo
    } else {
        bail!("neither root nor sudo: run `{program}` for this by hand");
    };
    command.env("DEBIAN_FRONTEND", "noninteractive");
    Ok(command)
}

/// Brings the package lists up to date, once in a run.
fn update_lists() -> Result<()> {
    static ONCE: Once = Once::new();
    let mut result = Ok(());
    ONCE.call_once(|| {
        run::progress("updating the package lists");
        result = privileged("apt-get").and_then(|mut command| {
            run::check(command.args(["update", "--quiet"]).stdout(Stdio::null()))
        });
    });
    result
}

/// One version of a package, as the package lists describe it.
#[derive(Debug, PartialEq, Eq)]
struct Record {
    package: String,
    version: String,
    depends: Vec<String>,
    sha256: String,
}

impl Record {
    /// Reads the first paragraph of `apt-cache show`.
    fn parse(text: &str) -> Option<Self> {
        let paragraph = text.split("\n\n").next()?;
        let field = |name: &str| {
            paragraph
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
                .map(str::trim)
        };
        let depends = field("Depends")
            .unwrap_or("")
            .split(',')
            .filter_map(|choice| {
                // `name (= version) | other`: the first choice's name.
                choice
                    .split_whitespace()
                    .next()
                    .map(|name| name.split(':').next().unwrap_or(name).to_owned())
            });
        Some(Self {
            package: field("Package")?.into(),
            version: field("Version")?.into(),
            depends: depends.collect(),
            sha256: field("SHA256")?.into(),
        })
    }
}

/// Where packages come from.
struct Archive {
    /// What makes apt ask there; nothing for the sources that the system itself has.
    options: Vec<String>,
}

impl Archive {
    const SYSTEM: Self = Self {
        options: Vec::new(),
    };

    /// The distribution's later kernels for its current release. Its lists are kept in our cache and apart
    /// from the system's; the distribution's keys vouch for them as for all others.
    fn backports() -> Result<Self> {
        const KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
        let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
        let codename = release
            .lines()
            .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
            .filter(|_| Path::new(KEYS).is_file())
            .context("only Debian has later kernels for the same release")?
            .trim_matches('"');
        let folder = workplace::cache()?.join(format!("{codename}-backports"));
        let (lists, packages) = (folder.join("lists"), folder.join("packages"));
        for folder in [&lists, &packages] {
            fs::create_dir_all(folder)
                .with_context(|| format!("cannot make {}", folder.display()))?;
        }
        let sources = folder.join("sources.list");
        // From where the system has its own release.
        let known = run::output(Command::new("apt-get").args([
            "indextargets",
            "--format",
            "$(CODENAME) $(REPO_URI)",
            "Created-By: Packages",
        ]))?;
        let place = known
            .lines()
            .find_map(|line| line.strip_prefix(codename)?.strip_prefix(' '))
            .with_context(|| format!("apt knows no source of {codename}"))?;
        let line = format!("deb [signed-by={KEYS}] {place} {codename}-backports main\n");
        fs::write(&sources, line).with_context(|| format!("cannot write {}", sources.display()))?;
        let settings = [
            ("Dir::Etc::sourcelist", &sources),
            ("Dir::Etc::sourceparts", &folder.join("none")),
            ("Dir::State::lists", &lists),
            ("Dir::Cache", &packages),
        ];
        let options = settings
            .into_iter()
            .flat_map(|(name, path)| ["-o".to_owned(), format!("{name}={}", path.display())]);
        Ok(Self {
            options: options.collect(),
        })
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.args(&self.options);
        command
    }

    /// Brings the package lists up to date.
    fn update(&self) -> Result<()> {
        if self.options.is_empty() {
            return update_lists();
        }
        run::progress("fetching the list of later kernels");
        run::output(self.command("apt-get").args(["update", "--quiet"])).map(drop)
    }

    /// What the signed package lists say about the version that would be installed.
    fn candidate(&self, package: &str) -> Result<Option<Record>> {
        let mut command = self.command("apt-cache");
        command
            .args(["show", "--no-all-versions", package])
            .stdin(Stdio::null())
            .stderr(Stdio::null());
        let output = command.output().context("cannot start apt-cache")?;
        Ok(Record::parse(&String::from_utf8_lossy(&output.stdout)))
    }

    fn find(&self, package: &str) -> Result<Record> {
        if !run::exists("apt-get") || !run::exists("dpkg-deb") {
            bail!("fetching {package} takes apt-get and dpkg-deb, which Debian and Ubuntu have");
        }
        if let Some(record) = self.candidate(package)? {
            return Ok(record);
        }
        self.update()?;
        self.candidate(package)?
            .with_context(|| format!("the package lists have no {package}"))
    }

    /// The contents of a package, unpacked into the cache and not installed.
    ///
    /// The archive's SHA-256 must be the one that the package lists give, which the distribution signs.
    fn unpacked(&self, package: &str) -> Result<PathBuf> {
        let record = self.find(package)?;
        let cache = workplace::cache()?;
        let folder = cache.join(format!(
            "{}_{}",
            record.package,
            record.version.replace(':', "%")
        ));
        if folder.is_dir() {
            return Ok(folder);
        }
        run::progress(format_args!(
            "fetching {} {}",
            record.package, record.version
        ));
        let scratch = workplace::RunFolder::new()?;
        let version = format!("{}={}", record.package, record.version);
        let mut download = self.command("apt-get");
        download.current_dir(scratch.file(""));
        run::output(download.args(["download", "--quiet", &version]))?;
        let archive = fs::read_dir(scratch.file(""))?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
            .with_context(|| format!("apt-get downloaded no archive of {}", record.package))?;
        let found = sha256(&archive)?;
        if found != record.sha256 {
            bail!(
                "{} has the SHA-256 {found}, but the package lists say {}",
                archive.display(),
                record.sha256
            );
        }
        // Renamed when complete, so that a folder that exists is whole.
        let partial = scratch.file("unpacked");
        run::check(
            Command::new("dpkg-deb")
                .arg("-x")
                .args([&archive, &partial]),
        )?;
        match fs::rename(&partial, &folder) {
            Err(_) if folder.is_dir() => {}
            result => result.with_context(|| format!("cannot make {}", folder.display()))?,
        }
        Ok(folder)
    }

    /// The kernel that the first package names, or the second where there is no such.
    fn kernel(&self, metas: [&str; 2]) -> Result<Kernel> {
        let meta = self
            .find(metas[0])
            .or_else(|error| self.find(metas[1]).map_err(|_| error))?;
        let package = meta
            .depends
            .iter()
            .find(|name| name.starts_with("linux-image-"))
            .with_context(|| format!("{} names no kernel", meta.package))?;
        let release = package.trim_start_matches("linux-image-").to_owned();
        let folder = self.unpacked(package)?;
        // Ubuntu has the modules in a package of their own.
        let modules = match self
            .find(package)?
            .depends
            .iter()
            .find(|name| name.starts_with("linux-modules-"))
        {
            Some(package) => self.unpacked(package)?,
            None => folder.clone(),
        };
        Ok(Kernel {
            image: folder.join("boot").join(format!("vmlinuz-{release}")),
            modules: ["lib/modules", "usr/lib/modules"]
                .iter()
                .map(|path| modules.join(path).join(&release))
                .find(|path| path.is_dir())
                .with_context(|| format!("{package} has no modules"))?,
            release,
        })
    }
}

/// The contents of a package of the system's own release; see [`Archive::unpacked`].
pub(crate) fn unpacked(package: &str) -> Result<PathBuf> {
    Archive::SYSTEM.unpacked(package)
}

/// The packages that one depends on, by the first choice of each.
pub(crate) fn dependencies(package: &str) -> Result<Vec<String>> {
    Ok(Archive::SYSTEM.find(package)?.depends)
}

fn sha256(file: &Path) -> Result<String> {
    let digest = Sha256::digest(fs::read(file)?);
    Ok(digest.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// A kernel of the distribution.
pub(crate) struct Kernel {
    /// The bzImage.
    pub(crate) image: PathBuf,
    /// The folder of its modules.
    pub(crate) modules: PathBuf,
    /// Its release, as `uname -r` says it.
    pub(crate) release: String,
}

/// The packages that name the kernel for virtual machines, Debian's and Ubuntu's.
const VIRTUAL: [&str; 2] = ["linux-image-cloud-amd64", "linux-image-virtual"];
/// Those for everything else.
const SERVER: [&str; 2] = ["linux-image-amd64", "linux-image-generic"];

/// The kernel for virtual machines.
pub(crate) fn kernel() -> Result<Kernel> {
    Archive::SYSTEM.kernel(VIRTUAL)
}

/// The kernel for everything else, which can also be Xen's first domain.
pub(crate) fn server_kernel() -> Result<Kernel> {
    Archive::SYSTEM.kernel(SERVER)
}

/// A kernel for virtual machines that has a driver: the usual one, or if that lacks it a later one.
pub(crate) fn kernel_with(driver: &str) -> Result<Kernel> {
    let usual = kernel()?;
    if initrd::has_module(&usual, driver)? {
        return Ok(usual);
    }
    let lacking = || format!("{} has no {driver}", usual.release);
    let later = Archive::backports()
        .and_then(|archive| archive.kernel(VIRTUAL))
        .with_context(lacking)?;
    if !initrd::has_module(&later, driver)? {
        bail!(
            "neither {} nor {} has {driver}",
            usual.release,
            later.release
        );
    }
    Ok(later)
}

/// The statically linked busybox.
pub(crate) fn busybox() -> Result<PathBuf> {
    let folder = unpacked("busybox-static")?;
    ["bin/busybox", "usr/bin/busybox"]
        .iter()
        .map(|path| folder.join(path))
        .find(|path| path.is_file())
        .context("busybox-static holds no busybox")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_read_from_the_first_paragraph() {
        let text = "Package: linux-image-cloud-amd64\nVersion: 6.1.192-2\nDepends: \
                    linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2), python3:any | perl\nSHA256: 00be\n\
                    Description: x\n\nPackage: other\n";
        let record = Record::parse(text).expect("a record");
        assert_eq!(record.version, "6.1.192-2");
        assert_eq!(
            record.depends,
            ["linux-image-6.1.0-56-cloud-amd64", "python3"]
        );
        assert_eq!(record.sha256, "00be");
        assert_eq!(Record::parse(""), None);
    }
}
