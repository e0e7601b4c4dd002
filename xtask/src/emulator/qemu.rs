//! QEMU's TCG.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};

use super::{Cpu, Machine, status_in};
use crate::bare::Payload;
use crate::debian::{self, Tool};
use crate::{run, workplace};

pub(super) fn run(machine: &Machine, program: &Path, payload: &Payload) -> Result<u8> {
    if machine.cpu == Cpu::Vmx {
        bail!("QEMU's TCG has no VMX; use --emulator bochs");
    }
    debian::require(&[Tool {
        program: "qemu-system-x86_64",
        package: "qemu-system-x86",
    }])?;
    let folder = workplace::RunFolder::new()?;
    let status_file = folder.file("status");
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args([
        "-accel",
        "tcg",
        "-cpu",
        "max,+svm,+npt",
        "-display",
        "none",
        "-no-reboot",
    ]);
    qemu.args(["-nodefaults", "-no-user-config"]);
    qemu.args([
        "-smp",
        &machine.processors.to_string(),
        "-m",
        &machine.memory.to_string(),
    ]);
    if machine.exact {
        qemu.args(["-icount", "shift=0,sleep=off"]);
    }
    qemu.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=1"]);
    qemu.args([
        "-chardev",
        &format!("file,id=status,path={}", status_file.display()),
    ]);
    qemu.args(["-device", "isa-debugcon,iobase=0xe9,chardev=status"]);
    match &machine.capture {
        Some(file) => qemu.args(["-serial", &format!("file:{}", file.display())]),
        // With the monitor on the same terminal, Ctrl-C reaches the guest and Ctrl-A X ends QEMU.
        None if machine.input => qemu.args(["-serial", "mon:stdio"]),
        None => qemu.args(["-serial", "stdio"]),
    };
    qemu.args(&machine.extra);
    qemu.arg("-kernel").arg(program);
    if !payload.modules.is_empty() {
        let container = folder.file("modules");
        fs::write(&container, payload.container(false))?;
        qemu.arg("-initrd").arg(container);
    }
    if !payload.command_line.is_empty() {
        qemu.args(["-append", &payload.command_line]);
    }
    let mut child = run::spawn(qemu.stdin(machine.stdin()))?;
    let Some(ended) = run::wait_until(&mut child, machine.deadline())? else {
        return Ok(machine.timed_out());
    };
    let console = fs::read(&status_file).unwrap_or_default();
    match status_in(&String::from_utf8_lossy(&console)) {
        Some(status) => Ok(status),
        // `isa-debug-exit` makes odd numbers; a status that came only that way has seven bits.
        None if ended.code().is_some_and(|code| code > 1 && code % 2 == 1) => Ok(ended
            .code()
            .and_then(|code| u8::try_from(code >> 1).ok())
            .unwrap_or(u8::MAX)),
        None => bail!("the emulator ended without a status from the program: {ended}"),
    }
}
