//! QEMU's debugger port, as far as stopping a processor at an address takes it: GDB's remote protocol.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// A machine that stands still between two calls.
pub(super) struct Debugger {
    stream: UnixStream,
    deadline: Option<Instant>,
    /// The breakpoint at which the machine stands.
    at: Option<u64>,
}

impl Debugger {
    /// Joins a machine that waits for it.
    pub(super) fn connect(socket: &Path, deadline: Option<Instant>) -> Result<Self> {
        let stream = super::qemu::connect(socket).context("QEMU opens no debugger port")?;
        stream.set_read_timeout(Some(Duration::from_secs(1)))?;
        Ok(Self {
            stream,
            deadline,
            at: None,
        })
    }

    /// Runs the machine until a processor is about to execute the instruction at this linear address.
    pub(super) fn run_to(&mut self, address: u64) -> Result<()> {
        if self.at.take() == Some(address) {
            // It would stop where it stands.
            self.send("s")?;
            self.stopped()?;
        }
        self.ask(&format!("Z0,{address:x},1"))?;
        self.send("c")?;
        self.stopped()?;
        self.ask(&format!("z0,{address:x},1"))?;
        self.at = Some(address);
        Ok(())
    }

    fn stopped(&mut self) -> Result<()> {
        let answer = self.receive()?;
        if !answer.starts_with("T05") {
            bail!("the machine does not stop at the breakpoint: {answer}");
        }
        Ok(())
    }

    fn ask(&mut self, command: &str) -> Result<()> {
        self.send(command)?;
        let answer = self.receive()?;
        if answer != "OK" {
            bail!("the debugger port answers {answer:?} to {command}");
        }
        Ok(())
    }

    fn send(&mut self, command: &str) -> Result<()> {
        Ok(self.stream.write_all(packet(command).as_bytes())?)
    }

    /// The next packet's contents, which it acknowledges.
    fn receive(&mut self) -> Result<String> {
        while self.byte()? != b'$' {}
        let mut text = String::new();
        loop {
            match self.byte()? {
                b'#' => break,
                byte => text.push(byte.into()),
            }
        }
        // The transport loses nothing: the check sum is of no use.
        self.byte()?;
        self.byte()?;
        self.stream.write_all(b"+")?;
        Ok(text)
    }

    fn byte(&mut self) -> Result<u8> {
        let mut byte = [0];
        loop {
            match self.stream.read(&mut byte) {
                Ok(1) => return Ok(byte[0]),
                Ok(_) => bail!("QEMU ended before its processor came to the address"),
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(e) => return Err(e.into()),
            }
            if self.deadline.is_some_and(|at| Instant::now() >= at) {
                bail!("no processor came to the address in time");
            }
        }
    }
}

/// A packet: `$`, the contents, `#` and the sum of their bytes.
fn packet(contents: &str) -> String {
    let sum = contents.bytes().fold(0u8, u8::wrapping_add);
    format!("${contents}#{sum:02x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_carry_their_check_sum() {
        assert_eq!(packet("c"), "$c#63");
        assert_eq!(packet("OK"), "$OK#9a");
    }
}
