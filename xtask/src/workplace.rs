//! Where things are: the workspace, the build's folder, the cache, and the folder of one run.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The workspace's root.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("xtask sits in the workspace")
}

/// Where cargo puts what it builds.
pub(crate) fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| root().join("target"), |path| root().join(path))
}

/// Where downloads and what is made from them stay from run to run.
pub(crate) fn cache() -> Result<PathBuf> {
    let path = target().join("testudo-cache");
    fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
    Ok(path)
}

/// A folder for the files of one run, removed at its end.
pub(crate) struct RunFolder(PathBuf);

impl RunFolder {
    pub(crate) fn new() -> Result<Self> {
        use std::sync::atomic::{AtomicU32, Ordering};
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let all = target().join("testudo-run");
        if number == 0 {
            remove_orphans(&all);
        }
        let path = all.join(format!("{}-{number}", std::process::id()));
        fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self(path))
    }

    /// A file in it.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for RunFolder {
    fn drop(&mut self) {
        // What cannot be removed is left for `cargo clean`.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Removes the folders of runs that were killed: those whose process is gone.
fn remove_orphans(all: &Path) {
    if !Path::new("/proc/self").exists() {
        return;
    }
    // There is nothing to remove before the first run, and what cannot be removed does no harm.
    for folder in fs::read_dir(all).into_iter().flatten().flatten() {
        let name = folder.file_name();
        let process = name
            .to_str()
            .and_then(|name| name.split('-').next()?.parse::<u32>().ok());
        if process.is_some_and(|id| !Path::new("/proc").join(id.to_string()).exists()) {
            let _ = fs::remove_dir_all(folder.path());
        }
    }
}
