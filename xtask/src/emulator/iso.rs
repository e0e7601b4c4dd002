//! An ISO image that boots a bare-metal program through a PC's BIOS and GRUB.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use super::Program;
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
    let tree = Tree::new(folder)?;
    fs::copy(program, tree.boot.join("program"))?;
    fs::write(tree.boot.join("modules"), payload.container(true))?;
    tree.image(
        folder,
        "multiboot2",
        "multiboot2 /boot/program\nmodule2 /boot/modules modules\n",
    )
}

/// The same for a Linux kernel.
pub(super) fn make_of_linux(folder: &RunFolder, program: &Program) -> Result<PathBuf> {
    let tree = Tree::new(folder)?;
    fs::copy(&program.kernel, tree.boot.join("kernel"))?;
    let mut commands = format!("linux /boot/kernel {}\n", program.command_line);
    if let Some(initrd) = &program.initrd {
        fs::copy(initrd, tree.boot.join("initrd"))?;
        commands.push_str("initrd /boot/initrd\n");
    }
    tree.image(folder, "linux", &commands)
}

/// What goes into an image.
struct Tree {
    root: PathBuf,
    boot: PathBuf,
}

impl Tree {
    fn new(folder: &RunFolder) -> Result<Self> {
        debian::require(&TOOLS)?;
        let root = folder.file("iso");
        let boot = root.join("boot");
        fs::create_dir_all(boot.join("grub"))?;
        Ok(Self { root, boot })
    }

    /// The image, which GRUB boots by these commands with this module.
    fn image(&self, folder: &RunFolder, module: &str, commands: &str) -> Result<PathBuf> {
        fs::write(self.boot.join("grub/grub.cfg"), format!("{commands}boot\n"))?;
        let image = folder.file("boot.iso");
        run::output(
            Command::new("grub-mkrescue")
                .arg(format!("--directory={GRUB}"))
                // Only what it takes to load one program; everything else takes seconds to read.
                .arg(format!(
                    "--install-modules={module} normal iso9660 biosdisk"
                ))
                .arg("-o")
                .args([&image, &self.root]),
        )?;
        Ok(image)
    }
}
