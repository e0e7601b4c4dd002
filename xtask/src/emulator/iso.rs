//! An ISO image that boots a bare-metal program through a PC's BIOS and GRUB.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use crate::bare::Payload;
use crate::debian::{self, Tool};
use crate::run;
use crate::workplace::RunFolder;

/// Where Debian keeps GRUB for a PC's BIOS.
const GRUB: &str = "/usr/lib/grub/i386-pc";

const TOOLS: [Tool; 4] = [
    Tool {
        program: "grub-mkrescue",
        package: "grub-common",
    },
    Tool {
        program: "/usr/lib/grub/i386-pc/multiboot2.mod",
        package: "grub-pc-bin",
    },
    Tool {
        program: "xorriso",
        package: "xorriso",
    },
    Tool {
        program: "mformat",
        package: "mtools",
    },
];

/// Makes the image in the folder of this run.
pub(super) fn make(folder: &RunFolder, program: &Path, payload: &Payload) -> Result<PathBuf> {
    debian::require(&TOOLS)?;
    let tree = folder.file("iso");
    fs::create_dir_all(tree.join("boot/grub"))?;
    fs::copy(program, tree.join("boot/program"))?;
    fs::write(tree.join("boot/modules"), payload.container(true))?;
    fs::write(
        tree.join("boot/grub/grub.cfg"),
        "multiboot2 /boot/program\nmodule2 /boot/modules modules\nboot\n",
    )?;
    let image = folder.file("boot.iso");
    run::output(
        Command::new("grub-mkrescue")
            .arg(format!("--directory={GRUB}"))
            // Only what it takes to load one program; everything else takes seconds to read.
            .args(["--install-modules=multiboot2 normal iso9660 biosdisk", "-o"])
            .args([&image, &tree]),
    )?;
    Ok(image)
}
