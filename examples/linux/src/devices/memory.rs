//! The devices that are about memory: what they do with it, and the host's side of them, which the
//! guest can also talk to over a socket.

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

use testudo_arch::memory::GuestRam;
use testudo_arch::{Gpa, PAGE_SIZE};
use testudo_machine::virtio::DeviceHandle;
use testudo_virtio::Device;
use testudo_virtio::backend::{EchoHost, VsockHost, VsockStream};
use testudo_virtio::device::{
    Balloon, BalloonBackend, BalloonControl, Mem, MemBackend, MemControl, MemOptions,
};

use crate::memory::{ManagedMemory, ManagedRange};

/// The statistics of a balloon that are shown (VIRTIO 1.3, 5.5.6.3).
const FREE_MEMORY: u16 = 4;
/// The unit in which memory is plugged: what one entry of the guest's table can map.
const BLOCK: u64 = 2 << 20;
/// The longest request to the operator, and all that is answered to one connection.
const LINE: usize = 64;
const ANSWERS: usize = 64 << 10;

/// Gives the host what the guest gives away, and counts it, a bit for each page.
struct Account {
    ranges: Vec<ManagedRange>,
    held: Arc<[AtomicU64]>,
}

impl Account {
    fn new(ranges: Vec<ManagedRange>) -> Self {
        let ends = ranges.iter().map(|range| range.gpa.0 + range.len);
        let pages = ends.max().unwrap_or(0) / PAGE_SIZE;
        Self {
            ranges,
            held: (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    fn pages(&self, gpa: Gpa, len: u64) -> impl Iterator<Item = (&AtomicU64, u64)> {
        let first = gpa.0 / PAGE_SIZE;
        (first..first + len / PAGE_SIZE)
            .filter_map(|page| Some((self.held.get((page / 64) as usize)?, 1 << (page % 64))))
    }

    /// Takes memory out of the guest's table.
    fn unmap(&self, gpa: Gpa, len: u64) {
        for range in &self.ranges {
            let start = gpa.0.max(range.gpa.0);
            let end = (gpa.0 + len).min(range.gpa.0 + range.len);
            if start < end {
                range.pages.reclaim(Gpa(start), end - start);
            }
        }
    }
}

impl BalloonBackend for Account {
    fn reclaim(&mut self, gpa: Gpa, len: u64) {
        for (word, bit) in self.pages(gpa, len) {
            word.fetch_or(bit, Ordering::Relaxed);
        }
        self.unmap(gpa, len);
    }

    /// The memory comes when the guest touches it.
    fn restore(&mut self, gpa: Gpa, len: u64) {
        for (word, bit) in self.pages(gpa, len) {
            word.fetch_and(!bit, Ordering::Relaxed);
        }
    }

    fn report_free(&mut self, gpa: Gpa, len: u64) {
        self.unmap(gpa, len);
    }
}

/// Puts memory into the place of a memory device, and takes it out.
struct Pluggable(ManagedRange);

impl MemBackend for Pluggable {
    fn plug(&mut self, gpa: Gpa, len: u64) -> bool {
        self.0.pages.plug(gpa, len)
    }

    fn unplug(&mut self, gpa: Gpa, len: u64) -> bool {
        self.0.pages.unplug(gpa, len)
    }
}

struct BalloonSide {
    control: BalloonControl,
    held: Arc<[AtomicU64]>,
    device: DeviceHandle,
}

struct MemSide {
    control: MemControl,
    size: u64,
    device: DeviceHandle,
}

/// The host's side of the devices that are about memory.
pub(crate) struct Operator {
    memory: ManagedMemory,
    balloon: Option<BalloonSide>,
    mem: Option<MemSide>,
}

impl Operator {
    /// With no device yet.
    pub(crate) fn new(memory: ManagedMemory) -> Self {
        Self {
            memory,
            balloon: None,
            mem: None,
        }
    }

    /// A balloon that asks for so many MiB; `add` gives it its place.
    pub(crate) fn add_balloon(
        &mut self,
        mib: u64,
        add: impl FnOnce(Box<dyn Device<GuestRam>>) -> DeviceHandle,
    ) {
        // A guest inflates with plugged memory as well.
        let ranges: Vec<_> = self.memory.ranges().copied().collect();
        let account = Account::new(ranges);
        let held = account.held.clone();
        let (balloon, control) = Balloon::new(account);
        control.set_target(mib << 20);
        control.request_stats();
        let device = add(Box::new(balloon));
        self.balloon = Some(BalloonSide {
            control,
            held,
            device,
        });
    }

    /// A memory device, of which the guest is asked to take all; `add` gives it its place.
    pub(crate) fn add_mem(
        &mut self,
        mib: u64,
        add: impl FnOnce(Box<dyn Device<GuestRam>>) -> DeviceHandle,
    ) {
        let Some(range) = self.memory.pluggable else {
            return;
        };
        let options = MemOptions {
            start: range.gpa,
            size: range.len,
            block: BLOCK,
        };
        if let Some((mem, control)) = Mem::new(Pluggable(range), options) {
            control.request(mib << 20);
            let device = add(Box::new(mem));
            let size = range.len;
            self.mem = Some(MemSide {
                control,
                size,
                device,
            });
        }
    }

    /// What the devices' accounts say, and what guest and host really have.
    pub(crate) fn report(&self) -> Vec<String> {
        let mut lines = Vec::new();
        if let Some(balloon) = &self.balloon {
            let of_guest = balloon.control.stats();
            let free = of_guest.iter().find(|stat| stat.tag == FREE_MEMORY);
            let words = balloon.held.iter();
            let pages = words.map(|word| u64::from(word.load(Ordering::Relaxed).count_ones()));
            lines.push(format!(
                "balloon: {} MiB held, {} MiB by the guest's account, {} MiB free in the guest at first",
                (pages.sum::<u64>() * PAGE_SIZE) >> 20,
                balloon.control.actual() >> 20,
                free.map_or(0, |stat| stat.value >> 20),
            ));
        }
        if let Some(mem) = &self.mem {
            lines.push(format!(
                "mem: {} MiB of {} are plugged",
                mem.control.plugged() >> 20,
                mem.size >> 20
            ));
        }
        if self.memory.ranges().next().is_some() {
            lines.push(self.memory.report());
        }
        lines
    }

    /// Does what a line says: `balloon MIB`, `mem MIB`, `report`.
    fn answer(&self, line: &str) -> String {
        let mut words = line.split_whitespace();
        let command = words.next();
        let mib = words.next().map(str::parse::<u64>);
        match (command, mib, &self.balloon, &self.mem) {
            (Some("balloon"), Some(Ok(mib)), Some(balloon), _) => {
                balloon.control.set_target(mib.saturating_mul(1 << 20));
                balloon.device.wake();
                "asked\n".into()
            }
            (Some("mem"), Some(Ok(mib)), _, Some(mem)) => {
                let bytes = mib.saturating_mul(1 << 20).min(mem.size);
                mem.control.request(bytes / BLOCK * BLOCK);
                mem.device.wake();
                "asked\n".into()
            }
            (Some("report"), None, ..) => {
                let lines = self.report();
                lines.iter().map(|line| format!("{line}\n")).collect()
            }
            _ => {
                "there are: balloon MIB, mem MIB, report; for devices that this guest has\n".into()
            }
        }
    }
}

/// The host's services on sockets.
pub(crate) struct Services {
    pub(crate) echo: EchoHost,
    pub(crate) operator: Arc<Operator>,
}

impl Services {
    /// The port at which the operator listens. What it does is within what this guest was given.
    const OPERATOR: u32 = 9;
}

impl VsockHost for Services {
    fn accept(&mut self, port: u32, guest_port: u32) -> Option<Box<dyn VsockStream>> {
        if port == Self::OPERATOR {
            return Some(Box::new(Conversation {
                operator: self.operator.clone(),
                line: Vec::new(),
                answers: VecDeque::new(),
                over: false,
            }));
        }
        self.echo.accept(port, guest_port)
    }
}

/// A guest talks to the operator, line by line.
struct Conversation {
    operator: Arc<Operator>,
    line: Vec<u8>,
    answers: VecDeque<u8>,
    over: bool,
}

impl VsockStream for Conversation {
    fn write(&mut self, data: &[u8]) -> usize {
        for (taken, &byte) in data.iter().enumerate() {
            if self.answers.len() >= ANSWERS {
                return taken;
            }
            if byte != b'\n' {
                // The rest of a line that is too long says nothing.
                if self.line.len() < LINE {
                    self.line.push(byte);
                }
                continue;
            }
            let line = core::mem::take(&mut self.line);
            let answer = self
                .operator
                .answer(core::str::from_utf8(&line).unwrap_or(""));
            self.answers.extend(answer.bytes());
        }
        data.len()
    }

    fn read(&mut self, buf: &mut [u8]) -> usize {
        let len = buf.len().min(self.answers.len());
        for (to, from) in buf.iter_mut().zip(self.answers.drain(..len)) {
            *to = from;
        }
        len
    }

    fn finished(&self) -> bool {
        self.over && self.answers.is_empty()
    }

    fn peer_finished(&mut self) {
        self.over = true;
    }
}
