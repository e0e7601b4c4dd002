//! QEMU's TCG.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::debugger::Debugger;
use super::{Cpu, Loader, Machine, Program, iso, status_in};
use crate::bare::Payload;
use crate::debian::{self, Tool};
use crate::run;
use crate::workplace::RunFolder;

/// The command for this machine; the program and the console are the caller's to add.
fn command(machine: &Machine) -> Result<Command> {
    if machine.cpu == Cpu::Vmx {
        bail!("QEMU's TCG has no VMX; Bochs has");
    }
    debian::require(&[Tool {
        program: "qemu-system-x86_64",
        package: "qemu-system-x86",
    }])?;
    let mut qemu = Command::new("qemu-system-x86_64");
    let model = if machine.nested_paging {
        "max,+svm,+npt"
    } else {
        "max,+svm,-npt"
    };
    // With a thread for each processor, QEMU 7.2 goes on after a #VMEXIT now and then as if nested paging were still
    // on: guests end in triple faults, and a VMCB can hold the registers of the host. Seen after 90,000 to 900,000 exits
    // of busy guests of two processors, and with one thread for all not in 1,600,000.
    qemu.args([
        "-accel",
        "tcg,thread=single",
        "-cpu",
        model,
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
        // The other things that differ from run to run: the date, and what RDRAND gives.
        qemu.args(["-rtc", "base=2026-01-01,clock=vm", "-seed", "1"]);
    }
    qemu.args(&machine.extra);
    Ok(qemu)
}

fn load(qemu: &mut Command, program: &Program) {
    qemu.arg("-kernel").arg(&program.kernel);
    if let Some(initrd) = &program.initrd {
        qemu.arg("-initrd").arg(initrd);
    }
    if !program.command_line.is_empty() {
        qemu.args(["-append", &program.command_line]);
    }
}

pub(super) fn run(machine: &Machine, kernel: &Path, payload: &Payload) -> Result<u8> {
    let folder = RunFolder::new()?;
    let status_file = folder.file("status");
    let mut qemu = command(machine)?;
    match machine.loader {
        Loader::Grub => {
            qemu.arg("-cdrom").arg(iso::make(&folder, kernel, payload)?);
        }
        Loader::Direct => {
            let container = (!payload.modules.is_empty()).then(|| folder.file("modules"));
            if let Some(file) = &container {
                fs::write(file, payload.container(false))?;
            }
            let command_line = payload.command_line.clone();
            load(
                &mut qemu,
                &Program {
                    kernel: kernel.to_owned(),
                    initrd: container,
                    command_line,
                },
            );
        }
    }
    qemu.args([
        "-chardev",
        &format!("file,id=status,path={}", status_file.display()),
    ]);
    qemu.args(["-device", "isa-debugcon,iobase=0xe9,chardev=status"]);
    let ended = finish(machine, qemu)?;
    let console = fs::read(&status_file).unwrap_or_default();
    machine.save_disks(&console)?;
    let Some(ended) = ended else {
        return Ok(machine.timed_out());
    };
    match status_in(&String::from_utf8_lossy(&console)).or_else(|| debug_exit(ended)) {
        Some(status) => Ok(status),
        None if machine.guest_ends && ended.success() => Ok(0),
        None => bail!("the emulator ended without a status from the program: {ended}"),
    }
}

pub(super) fn run_program(machine: &Machine, program: &Program) -> Result<u8> {
    let folder = RunFolder::new()?;
    let complaints = folder.file("complaints");
    let mut qemu = command(machine)?;
    load(&mut qemu, program);
    qemu.stderr(fs::File::create(&complaints)?);
    let ended = finish(machine, qemu)?;
    let complaints = String::from_utf8_lossy(&fs::read(&complaints)?).into_owned();
    eprint!("{complaints}");
    match ended {
        None => Ok(machine.timed_out()),
        Some(ended) if ended.success() => Ok(0),
        // The status 0 of the program, or a failure of the emulator, which then says why.
        Some(ended) if ended.code() == Some(1) && complaints.is_empty() => Ok(0),
        Some(ended) => debug_exit(ended).with_context(|| format!("the emulator failed: {ended}")),
    }
}

/// Adds the debug-exit device and the console, and runs the machine; `None` if it took too long.
fn finish(machine: &Machine, mut qemu: Command) -> Result<Option<ExitStatus>> {
    qemu.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=1"]);
    match &machine.capture {
        Some(file) => qemu.args(["-serial", &format!("file:{}", file.display())]),
        // With the monitor on the same terminal, Ctrl-C reaches the guest and Ctrl-A X ends QEMU.
        None if machine.input => qemu.args(["-serial", "mon:stdio"]),
        None => qemu.args(["-serial", "stdio"]),
    };
    let mut child = run::spawn(qemu.stdin(machine.stdin()))?;
    run::wait_until(&mut child, machine.deadline())
}

/// The status in QEMU's own: `isa-debug-exit` shifts it left and adds one, so it has seven bits, and 0
/// cannot be told from QEMU's own failures.
fn debug_exit(ended: ExitStatus) -> Option<u8> {
    let code = u8::try_from(ended.code()?).ok()?;
    (code > 1 && code % 2 == 1).then_some(code >> 1)
}

/// Runs a program until the console has shown `mark` and the processors have stopped for good; returns
/// how many instructions they executed.
///
/// The machine has no debug-exit device: what would end the emulator halts, and the count stands still.
pub(super) fn count(machine: &Machine, program: &Program, mark: &str) -> Result<u64> {
    /// How often it looks.
    const PERIOD: Duration = Duration::from_millis(200);

    let folder = RunFolder::new()?;
    let (console, socket) = (folder.file("console"), folder.file("monitor"));
    let mut qemu = command(machine)?;
    load(&mut qemu, program);
    qemu.args(["-serial", &format!("file:{}", console.display())]);
    qemu.args([
        "-qmp",
        &format!("unix:{},server=on,wait=off", socket.display()),
    ]);
    let mut child = run::spawn(qemu.stdin(std::process::Stdio::null()))?;
    let deadline = machine.deadline();
    let counting = || {
        let mut monitor = Monitor::connect(&socket)?;
        loop {
            std::thread::sleep(PERIOD);
            let halted = monitor.halted_for_good()?;
            let shown = fs::read(&console).unwrap_or_default();
            let shown = String::from_utf8_lossy(&shown);
            match (halted, shown.contains(mark)) {
                (true, true) => return monitor.instructions(),
                (true, false) => bail!("the machine stopped early:\n{}", shown.trim_end()),
                _ if deadline.is_some_and(|deadline| Instant::now() >= deadline) => {
                    bail!("no end in time:\n{}", shown.trim_end());
                }
                _ => {}
            }
        }
    };
    let result = counting();
    // It ends only this way; that it has ended by itself shows in the result.
    let _ = child.kill();
    child.wait()?;
    result
}

/// Runs a program until a processor has come to each of these addresses in turn; returns how many
/// instructions had been executed each time, that at the address not among them.
pub(super) fn counts_at(
    machine: &Machine,
    program: &Program,
    addresses: &[u64],
) -> Result<Vec<u64>> {
    let folder = RunFolder::new()?;
    let [console, monitor, debugger] = ["console", "monitor", "debugger"].map(|n| folder.file(n));
    let mut qemu = command(machine)?;
    load(&mut qemu, program);
    qemu.args(["-serial", &format!("file:{}", console.display())]);
    qemu.args([
        "-qmp",
        &format!("unix:{},server=on,wait=off", monitor.display()),
    ]);
    qemu.args([
        "-chardev",
        &format!(
            "socket,id=debugger,path={},server=on,wait=off",
            debugger.display()
        ),
    ]);
    qemu.args(["-S", "-gdb", "chardev:debugger"]);
    let mut child = run::spawn(qemu.stdin(std::process::Stdio::null()))?;
    let counting = || {
        let mut monitor = Monitor::connect(&monitor)?;
        let mut debugger = Debugger::connect(&debugger, machine.deadline())?;
        let mut counts = Vec::new();
        for &address in addresses {
            debugger.run_to(address).with_context(|| {
                let shown = fs::read(&console).unwrap_or_default();
                let shown = String::from_utf8_lossy(&shown).into_owned();
                format!("the machine shows:\n{}\n", shown.trim_end())
            })?;
            counts.push(monitor.instructions()?);
        }
        Ok(counts)
    };
    let result = counting();
    // It ends only this way; that it has ended by itself shows in the result.
    let _ = child.kill();
    child.wait()?;
    result
}

/// Connects to a socket that QEMU is about to open.
pub(super) fn connect(socket: &Path) -> std::io::Result<UnixStream> {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        match UnixStream::connect(socket) {
            Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(20)),
            result => return result,
        }
    }
}

/// QEMU's machine protocol, as far as counting takes it.
struct Monitor {
    reader: BufReader<UnixStream>,
}

impl Monitor {
    fn connect(socket: &Path) -> Result<Self> {
        let stream = connect(socket).context("QEMU opens no monitor")?;
        let mut monitor = Self {
            reader: BufReader::new(stream),
        };
        monitor.line()?;
        monitor.ask(r#""qmp_capabilities""#)?;
        Ok(monitor)
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        if self.reader.read_line(&mut line)? == 0 {
            bail!("QEMU ended before its count was taken");
        }
        Ok(line)
    }

    /// The answer to a command with its arguments, if any; events in between are not answers.
    fn ask(&mut self, command: &str) -> Result<String> {
        writeln!(self.reader.get_mut(), r#"{{"execute":{command}}}"#)?;
        loop {
            let line = self.line()?;
            if line.contains("\"return\"") {
                return Ok(line);
            }
            if line.contains("\"error\"") {
                bail!("QEMU refuses {command}: {}", line.trim_end());
            }
        }
    }

    /// Whether every processor has halted with interrupts off.
    fn halted_for_good(&mut self) -> Result<bool> {
        const IF: u32 = 1 << 9;
        let registers = self
            .ask(r#""human-monitor-command","arguments":{"command-line":"info registers -a"}"#)?;
        let value = |processor: &str, name: &str| {
            let (_, rest) = processor.split_once(name)?;
            let end = rest.find(|c: char| !c.is_ascii_hexdigit())?;
            u32::from_str_radix(&rest[..end], 16).ok()
        };
        let mut processors = registers.split("CPU#").skip(1).peekable();
        if processors.peek().is_none() {
            bail!("no registers in {}", registers.trim_end());
        }
        Ok(processors.all(|processor| {
            value(processor, "HLT=") == Some(1)
                && value(processor, "FL=").is_some_and(|flags| flags & IF == 0)
        }))
    }

    fn instructions(&mut self) -> Result<u64> {
        let answer = self.ask(r#""query-replay""#)?;
        let number = answer
            .split_once("\"icount\":")
            .map(|(_, rest)| rest.trim_start())
            .map(|rest| {
                rest.split(|c: char| !c.is_ascii_digit())
                    .next()
                    .unwrap_or("")
            });
        number
            .and_then(|digits| digits.parse().ok())
            .with_context(|| format!("no count in {answer}"))
    }
}
