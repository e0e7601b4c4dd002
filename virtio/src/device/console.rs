//! The console device with any number of ports (VIRTIO 1.3, 5.3).

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use testudo_arch::GuestMemory;

use super::{Device, DeviceError, DeviceId, Io, Next, read_config_bytes};
use crate::Features;

/// Feature bits (5.3.3).
mod feature {
    use crate::Features;

    pub(super) const SIZE: Features = Features::bit(0);
    pub(super) const MULTIPORT: Features = Features::bit(1);
    pub(super) const EMERG_WRITE: Features = Features::bit(2);
}

/// Control messages (5.3.6.2).
mod control {
    pub(super) const DEVICE_READY: u16 = 0;
    pub(super) const DEVICE_ADD: u16 = 1;
    pub(super) const PORT_READY: u16 = 3;
    pub(super) const CONSOLE_PORT: u16 = 4;
    pub(super) const RESIZE: u16 = 5;
    pub(super) const PORT_OPEN: u16 = 6;
    pub(super) const PORT_NAME: u16 = 7;
}

const CONTROL_RECEIVE: u16 = 2;
const CONTROL_TRANSMIT: u16 = 3;
const QUEUE_SIZE: u16 = 64;
/// Control messages waiting for the driver; a driver that asks without listening loses answers.
const MAX_MESSAGES: usize = 256;
/// Offset of the emergency write register in the configuration space.
const EMERGENCY_WRITE: u64 = 8;

/// The other end of a port.
pub trait ConsolePort: Send {
    /// Takes bytes that the guest wrote.
    fn write(&mut self, data: &[u8]);

    /// Gives bytes to the guest: fills the beginning of `buf` and says how far.
    fn read(&mut self, buf: &mut [u8]) -> usize;

    /// The guest has opened or closed its end.
    fn opened(&mut self, _open: bool) {}
}

/// What a port is to the guest.
#[derive(Clone, Debug, Default)]
pub struct PortOptions {
    /// The name, shown by Linux under `/dev/virtio-ports`.
    pub name: String,
    /// Whether the port is a console for people (hvc in Linux), not a plain channel.
    pub console: bool,
}

/// The most bytes that one buffer of the guest's is filled with, so that a notification makes the
/// device do a bounded amount of work.
const MAX_RECEIVE: u32 = 4096;

struct Port {
    options: PortOptions,
    end: Box<dyn ConsolePort>,
    guest_open: bool,
}

/// The console device.
pub struct Console {
    ports: Vec<Port>,
    queues: Vec<u16>,
    columns: u16,
    rows: u16,
    multiport: bool,
    resized: bool,
    messages: VecDeque<Vec<u8>>,
}

impl core::fmt::Debug for Console {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Console")
            .field("ports", &self.ports.len())
            .field("size", &(self.columns, self.rows))
            .finish_non_exhaustive()
    }
}

impl Console {
    /// A device with one console port, connected to `end`.
    pub fn new(end: Box<dyn ConsolePort>) -> Self {
        let options = PortOptions {
            name: String::from("console"),
            console: true,
        };
        let mut device = Self {
            ports: Vec::new(),
            queues: vec![QUEUE_SIZE; 2],
            columns: 80,
            rows: 25,
            multiport: false,
            resized: false,
            messages: VecDeque::new(),
        };
        device.push(options, end);
        device
    }

    /// Adds a port. Only drivers that know several see it; at most 31 fit besides the first.
    #[must_use]
    pub fn with_port(mut self, options: PortOptions, end: Box<dyn ConsolePort>) -> Self {
        if self.ports.len() < 32 {
            self.push(options, end);
            self.queues = vec![QUEUE_SIZE; 2 + 2 * self.ports.len()];
        }
        self
    }

    fn push(&mut self, options: PortOptions, end: Box<dyn ConsolePort>) {
        self.ports.push(Port {
            options,
            end,
            guest_open: false,
        });
    }

    /// Sets the size in characters; the driver learns of it at the next poll.
    pub fn resize(&mut self, columns: u16, rows: u16) {
        self.resized |= (self.columns, self.rows) != (columns, rows);
        (self.columns, self.rows) = (columns, rows);
    }

    fn message(&mut self, port: u32, event: u16, value: u16, tail: &[u8]) {
        if self.messages.len() >= MAX_MESSAGES {
            return;
        }
        let mut message = Vec::with_capacity(8 + tail.len());
        message.extend_from_slice(&port.to_le_bytes());
        message.extend_from_slice(&event.to_le_bytes());
        message.extend_from_slice(&value.to_le_bytes());
        message.extend_from_slice(tail);
        self.messages.push_back(message);
    }

    /// Answers one message of the driver.
    fn control(&mut self, port: u32, event: u16, value: u16) {
        match (event, value) {
            (control::DEVICE_READY, 1) => {
                for port in 0..self.ports.len() as u32 {
                    self.message(port, control::DEVICE_ADD, 0, &[]);
                }
            }
            (control::PORT_READY, 1) => {
                let Some(p) = self.ports.get(port as usize) else {
                    return;
                };
                let (console, name) = (p.options.console, p.options.name.clone());
                if console {
                    self.message(port, control::CONSOLE_PORT, 1, &[]);
                    self.message_size(port);
                }
                if !name.is_empty() {
                    self.message(port, control::PORT_NAME, 1, name.as_bytes());
                }
                self.message(port, control::PORT_OPEN, 1, &[]);
            }
            (control::PORT_OPEN, open) => {
                if let Some(port) = self.ports.get_mut(port as usize) {
                    port.guest_open = open == 1;
                    port.end.opened(port.guest_open);
                }
            }
            _ => {}
        }
    }

    fn message_size(&mut self, port: u32) {
        let [a, b] = self.columns.to_le_bytes();
        let [c, d] = self.rows.to_le_bytes();
        self.message(port, control::RESIZE, 0, &[a, b, c, d]);
    }

    /// Hands waiting control messages to the driver.
    fn send_messages<M: GuestMemory>(&mut self, io: &mut Io<'_, M>) -> Result<(), DeviceError> {
        let memory = io.memory();
        let Some(mut queue) = io.queue(CONTROL_RECEIVE) else {
            return Ok(());
        };
        while !self.messages.is_empty() {
            let Some(chain) = queue.pop()? else {
                break;
            };
            let mut writer = chain.writer(memory);
            if let Some(message) = self.messages.pop_front() {
                writer.write_all(&message)?;
            }
            let written = writer.written();
            let token = chain.into_token();
            queue.complete(token, written)?;
        }
        queue.publish()?;
        Ok(())
    }

    /// Passes on what the other end of a port has for the guest.
    fn receive<M: GuestMemory>(
        &mut self,
        index: usize,
        io: &mut Io<'_, M>,
    ) -> Result<Next, DeviceError> {
        let memory = io.memory();
        let Some(port) = self.ports.get_mut(index) else {
            return Ok(Next::Idle);
        };
        // Without several ports there is no message that opens one.
        if self.multiport && !port.guest_open {
            return Ok(Next::Idle);
        }
        let Some(mut queue) = io.queue(receive_queue(index)) else {
            return Ok(Next::Idle);
        };
        let mut next = Next::Idle;
        for turn in 0.. {
            if turn >= QUEUE_SIZE {
                next = Next::Again;
                break;
            }
            let Some(chain) = queue.pop()? else {
                break;
            };
            let mut writer = chain.writer(memory);
            let has_room = writer.remaining() > 0;
            let mut bytes = [0; 256];
            while writer.remaining() > 0 && writer.written() < MAX_RECEIVE {
                let want = writer.remaining().min(bytes.len() as u64) as usize;
                let got = port.end.read(&mut bytes[..want]).min(want);
                writer.write(&bytes[..got])?;
                if got < want {
                    break;
                }
            }
            let written = writer.written();
            let token = chain.into_token();
            if has_room && written == 0 {
                // The other end has nothing to say: the buffer waits.
                queue.give_back(token);
                break;
            }
            queue.complete(token, written)?;
        }
        queue.publish()?;
        Ok(next)
    }
}

/// The queue through which port `index` receives: port 0 has the first pair, the control queues
/// the second, the other ports what follows (5.3.2).
fn receive_queue(index: usize) -> u16 {
    if index == 0 { 0 } else { 2 + 2 * index as u16 }
}

/// The port that a data queue belongs to.
fn port_of(queue: u16) -> usize {
    usize::from(if queue < 2 { 0 } else { queue / 2 - 1 })
}

impl<M: GuestMemory> Device<M> for Console {
    fn id(&self) -> DeviceId {
        DeviceId::CONSOLE
    }

    fn features(&self) -> Features {
        let mut features = feature::SIZE | feature::EMERG_WRITE;
        features.set(feature::MULTIPORT, self.queues.len() > 2);
        features
    }

    fn queues(&self) -> &[u16] {
        &self.queues
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 12];
        config[0..2].copy_from_slice(&self.columns.to_le_bytes());
        config[2..4].copy_from_slice(&self.rows.to_le_bytes());
        config[4..8].copy_from_slice(&(self.ports.len() as u32).to_le_bytes());
        read_config_bytes(&config, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        // The register's lowest byte is the character; it works before the driver is ready.
        if offset == EMERGENCY_WRITE
            && let (Some(byte), Some(port)) = (data.first(), self.ports.first_mut())
        {
            port.end.write(&[*byte]);
        }
    }

    fn activate(&mut self, features: Features) {
        self.multiport = features.contains(feature::MULTIPORT);
    }

    fn reset(&mut self) {
        self.multiport = false;
        self.messages.clear();
        for port in &mut self.ports {
            port.guest_open = false;
        }
    }

    fn process(&mut self, queue: u16, io: &mut Io<'_, M>) -> Result<Next, DeviceError> {
        match queue {
            CONTROL_RECEIVE => {
                self.send_messages(io)?;
                Ok(Next::Idle)
            }
            CONTROL_TRANSMIT => {
                let next = io.serve(queue, |memory, chain| {
                    let [a, b, c, d, e, f, g, h]: [u8; 8] = chain.reader(memory).read_value()?;
                    let port = u32::from_le_bytes([a, b, c, d]);
                    let (event, value) = (u16::from_le_bytes([e, f]), u16::from_le_bytes([g, h]));
                    self.control(port, event, value);
                    Ok(0)
                })?;
                self.send_messages(io)?;
                Ok(next)
            }
            _ if queue.is_multiple_of(2) => self.receive(port_of(queue), io),
            _ => {
                let Some(port) = self.ports.get_mut(port_of(queue)) else {
                    return Ok(Next::Idle);
                };
                io.serve(queue, |memory, chain| {
                    let mut reader = chain.reader(memory);
                    let mut bytes = [0; 512];
                    loop {
                        let len = reader.read(&mut bytes)?;
                        if len == 0 {
                            return Ok(0);
                        }
                        port.end.write(&bytes[..len]);
                    }
                })
            }
        }
    }

    fn bounds(&self, queue: u16) -> crate::queue::Bounds {
        // What one notification can make the device copy is bounded.
        crate::queue::Bounds {
            bytes: if queue.is_multiple_of(2) {
                u32::MAX
            } else {
                1 << 20
            },
            segments: QUEUE_SIZE,
        }
    }

    fn poll(&mut self, io: &mut Io<'_, M>) -> Result<Next, DeviceError> {
        if core::mem::take(&mut self.resized) {
            if self.multiport {
                for port in 0..self.ports.len() {
                    if self.ports[port].options.console {
                        self.message_size(port as u32);
                    }
                }
            } else {
                io.config_changed();
            }
        }
        if self.multiport {
            self.send_messages(io)?;
        }
        let mut next = Next::Idle;
        for port in 0..self.ports.len() {
            next = next.min(self.receive(port, io)?);
        }
        Ok(next)
    }
}
