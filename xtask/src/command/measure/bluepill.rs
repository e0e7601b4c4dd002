//! `cargo xtask measure bluepill`: what a machine's own system pays for a hypervisor that started before it.
//!
//! On QEMU the instructions of the whole machine count, from its start to the first process. On Bochs a machine
//! starts with a BIOS and GRUB, which read from a CD as much as the hypervisor and its modules are large. So there those
//! count that are executed, by whomever, from where GRUB starts the kernel, or the hypervisor, to the first process's
//! first instruction.

use std::fs;

use anyhow::{Context, Result, bail};

use super::nested::{COUNTED_WORDS, KERNEL_START, entry_of};
use super::{LinuxBoots, PATIENCE, compared};
use crate::bare::{self, Payload};
use crate::command::bluepill::{PILL, memory};
use crate::command::boot::Backend;
use crate::command::nested;
use crate::debian;
use crate::emulator::{Image, Kind, Machine, Program, linux_clock};
use crate::run;
use crate::workplace::RunFolder;

pub(super) fn figures(backend: Backend) -> Result<Vec<(String, String)>> {
    if backend.emulator() == Kind::Bochs {
        return on_bochs(backend);
    }
    let boots = LinuxBoots::new()?;
    let direct = boots.without()?;
    run::progress("booting under the hypervisor");
    let memory = memory(LinuxBoots::MEMORY, &boots.payload);
    let count = boots.under(PILL, "-- ", memory)?;
    Ok(compared(count, direct))
}

fn on_bochs(backend: Backend) -> Result<Vec<(String, String)>> {
    let kernel = debian::kernel()?;
    let first = bare::build("exit-port")?;
    let end = entry_of(&fs::read(first)?).context("the first process is no ELF file")?;
    let first = "#!/bin/exit-port 0\n".to_owned();
    let system = nested::counted_system(&kernel, 1, false, first, COUNTED_WORDS)?;
    let words = LinuxBoots::COMMAND_LINE.to_owned() + COUNTED_WORDS + &linux_clock();
    let count = |memory, image: Image<'_>, start| {
        let machine = Machine {
            cpu: backend.cpu()?,
            memory,
            timeout: Some(PATIENCE),
            ..Machine::new(Kind::Bochs)
        };
        let counts = machine.counts_at_on_bochs(&image, &[start, end])?;
        let [start, end] = counts[..] else {
            bail!("a boot has a start and an end");
        };
        Ok(end - start)
    };

    run::progress("booting without the hypervisor");
    let folder = RunFolder::new()?;
    let initrd = folder.file("initrd");
    fs::write(&initrd, &system.disk)?;
    let program = Program {
        kernel: kernel.image.clone(),
        initrd: Some(initrd),
        command_line: words.clone(),
    };
    // GRUB starts the packed kernel where the unpacked one will be (its `pref_address`).
    let direct = count(system.memory, Image::Linux(&program), KERNEL_START)?;

    run::progress("booting under the hypervisor");
    let payload = Payload {
        command_line: format!("-- {words}"),
        modules: vec![
            ("kernel vmlinuz".into(), fs::read(&kernel.image)?),
            ("initrd default".into(), system.disk),
        ],
    };
    let memory = memory(system.memory, &payload);
    let program = bare::build(PILL)?;
    let start = entry_of(&fs::read(&program)?).context("the hypervisor is no ELF file")?;
    let under = count(memory, Image::BareMetal(&program, &payload), start)?;
    Ok(compared(under, direct))
}
