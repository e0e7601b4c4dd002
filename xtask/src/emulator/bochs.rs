//! Bochs, whose processor models have complete SVM and VMX.
//!
//! It boots through its BIOS, so the program and its modules go on an ISO image with GRUB.

use std::fs;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::{Cpu, Image, Machine, Program, iso, status_in};
use crate::bare::Payload;
use crate::debian::{self, Tool};
use crate::{run, workplace};

const BOCHS: Tool = Tool {
    program: "bochs",
    package: "bochs",
};
/// The files of the packages `bochsbios` and `vgabios`.
const BIOS: Tool = Tool {
    program: "/usr/share/bochs/BIOS-bochs-latest",
    package: "bochsbios",
};
const VGA: Tool = Tool {
    program: "/usr/share/bochs/VGABIOS-lgpl-latest",
    package: "vgabios",
};

/// How many instructions Bochs executes in a second of its devices' time. Its time-stamp counter ticks once for
/// each.
const INSTRUCTIONS_PER_SECOND: u32 = 100_000_000;

/// For the command line of a Linux that has the machine to itself: Bochs's processors of Intel's say by CPUID
/// (leaf 15H) that the time-stamp counter ticks 3.5 × 10⁹ times a second, and Linux believes it. Then all its
/// timeouts would be 35 times too long, and its timer's interrupts come as often.
pub(crate) fn linux_clock() -> String {
    format!(" tsc_early_khz={}", INSTRUCTIONS_PER_SECOND / 1000)
}

pub(super) fn run(machine: &Machine, program: &Path, payload: &Payload) -> Result<u8> {
    let folder = workplace::RunFolder::new()?;
    let iso = iso::make(&folder, program, payload)?;
    boot(machine, &folder, &iso)
}

pub(super) fn run_program(machine: &Machine, program: &Program) -> Result<u8> {
    let folder = workplace::RunFolder::new()?;
    let iso = iso::make_of_linux(&folder, program)?;
    boot(machine, &folder, &iso)
}

/// Boots the image to the machine's end.
fn boot(machine: &Machine, folder: &workplace::RunFolder, iso: &Path) -> Result<u8> {
    if machine.input {
        eprintln!("xtask: Bochs has no console input here");
    }
    let serial = match &machine.capture {
        Some(file) => file.clone(),
        None => folder.file("serial"),
    };
    let mut child = start(machine, folder, iso, &serial, "c\n")?;
    let console = folder.file("console");

    let mut tail = Tail {
        file: fs::File::open(&serial)?,
        shown: 0,
        show: machine.capture.is_none(),
    };
    let deadline = machine.deadline();
    let ended = loop {
        // Waiting in short steps lets the console's output appear as it comes.
        let step = Instant::now() + Duration::from_millis(50);
        if let Some(status) = child.try_wait()? {
            tail.forward()?;
            break status;
        }
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            child.kill()?;
            child.wait()?;
            tail.forward()?;
            machine.save_disks(&fs::read(&console).unwrap_or_default())?;
            return Ok(machine.timed_out());
        }
        tail.forward()?;
        std::thread::sleep(step.saturating_duration_since(Instant::now()));
    };
    let output = fs::read(&console).unwrap_or_default();
    machine.save_disks(&output)?;
    match status_in(&String::from_utf8_lossy(&output)) {
        Some(status) => Ok(status),
        None => {
            let log = fs::read_to_string(folder.file("log")).unwrap_or_default();
            let reason = log
                .lines()
                .rev()
                .find(|line| line.contains("PANIC") || line.contains(">>PANIC<<"));
            bail!(
                "the emulator ended without a status from the program: {ended}{}",
                reason.map(|line| format!(" ({line})")).unwrap_or_default()
            )
        }
    }
}

/// Starts the image with these commands for Bochs's debugger. What that shows, and the debug console's output, goes
/// to the folder's `console`.
fn start(
    machine: &Machine,
    folder: &workplace::RunFolder,
    iso: &Path,
    serial: &Path,
    debugger: &str,
) -> Result<Child> {
    debian::require(&[BOCHS, BIOS, VGA])?;
    fs::write(serial, "")?;
    let configuration = folder.file("bochsrc");
    fs::write(
        &configuration,
        bochsrc(machine, iso, serial, &folder.file("log")),
    )?;
    let commands = folder.file("commands");
    fs::write(&commands, debugger)?;
    let mut bochs = Command::new("bochs");
    bochs
        .arg("-q")
        .arg("-f")
        .arg(&configuration)
        .arg("-rc")
        .arg(&commands);
    bochs
        .stdin(Stdio::null())
        .stdout(fs::File::create(folder.file("console"))?)
        .stderr(Stdio::null());
    run::spawn(&mut bochs)
}

/// Runs what `image` says until the machine's one processor has come to each of these linear addresses in turn;
/// returns how many instructions it had executed each time.
///
/// Bochs's clock is of no use for that: it goes on while the processor waits. The processor's own count does not,
/// and the debugger shows it.
pub(super) fn counts_at(
    machine: &Machine,
    image: &Image<'_>,
    addresses: &[u64],
) -> Result<Vec<u64>> {
    let folder = workplace::RunFolder::new()?;
    let iso = match image {
        Image::BareMetal(program, payload) => iso::make(&folder, program, payload)?,
        Image::Linux(program) => iso::make_of_linux(&folder, program)?,
    };
    // It numbers its breakpoints from 1 on.
    let stop =
        |(number, address)| format!("lb {address:#x}\nc\nshow \"cpu0.icount\"\nd {number}\n");
    let stops: String = (1..).zip(addresses).map(stop).collect();
    let serial = folder.file("serial");
    let mut child = start(machine, &folder, &iso, &serial, &(stops + "q\n"))?;
    let ended = run::wait_until(&mut child, machine.deadline())?;
    let shown = |name| -> Result<String> {
        let bytes = fs::read(folder.file(name))?;
        Ok(String::from_utf8_lossy(&bytes).trim_end().to_owned())
    };
    let counts = counts_in(&shown("console")?);
    if ended.is_none() || counts.len() != addresses.len() {
        let (came, all) = (counts.len(), addresses.len());
        bail!(
            "the processor came to {came} of {all} addresses; the machine shows:\n{}",
            shown("serial")?
        );
    }
    Ok(counts)
}

/// The counts that the debugger showed.
fn counts_in(console: &str) -> Vec<u64> {
    let count = |line: &str| line.strip_prefix("icount = ")?.trim().parse().ok();
    console.lines().filter_map(count).collect()
}

/// Shows what is appended to a file.
struct Tail {
    file: fs::File,
    shown: u64,
    show: bool,
}

impl Tail {
    fn forward(&mut self) -> Result<()> {
        if !self.show {
            return Ok(());
        }
        self.file.seek(SeekFrom::Start(self.shown))?;
        let mut fresh = Vec::new();
        self.file.read_to_end(&mut fresh)?;
        self.shown += fresh.len() as u64;
        let mut stdout = std::io::stdout().lock();
        stdout
            .write_all(&fresh)
            .and_then(|()| stdout.flush())
            .context("cannot write the console's output")
    }
}

fn bochsrc(machine: &Machine, iso: &Path, serial: &Path, log: &Path) -> String {
    let model = match machine.cpu {
        Cpu::Svm => "ryzen",
        Cpu::Vmx => "corei7_skylake_x",
    };
    let mut text = format!(
        "cpu: model={model}, count={}, ips={INSTRUCTIONS_PER_SECOND}, reset_on_triple_fault=0\n\
         memory: guest={memory}, host={memory}\n\
         romimage: file={bios}\n\
         vgaromimage: file={vga}\n\
         ata0-master: type=cdrom, path=\"{}\", status=inserted\n\
         boot: cdrom\n\
         display_library: rfb, options=\"timeout=0\"\n\
         sound: driver=dummy\n\
         clock: sync=none\n\
         com1: enabled=1, mode=file, dev=\"{}\"\n\
         port_e9_hack: enabled=1\n\
         log: \"{}\"\n\
         panic: action=fatal\n",
        machine.processors,
        iso.display(),
        serial.display(),
        log.display(),
        memory = machine.memory,
        bios = BIOS.program,
        vga = VGA.program,
    );
    for line in &machine.extra {
        text.push_str(line);
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_found_among_what_the_debugger_shows() {
        let console = "(0) Breakpoint 1, 0x0000000001000000 in ?? ()\n\
            Next at t=1394437120\n\
            show param name: <cpu0.icount>\n\
            icount = 1281922315\n\
            testudo-exit: 000\n\
            icount = 12x\n\
            icount = 7\n";
        assert_eq!(counts_in(console), [1_281_922_315, 7]);
    }
}
