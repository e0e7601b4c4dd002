//! The shared half: wires, messages and what posts them to a vCPU.

use alloc::boxed::Box;
use alloc::sync::Arc;
use core::sync::atomic::{AtomicU32, Ordering};

use testudo_arch::irq::{InterruptSink, Msi};

use super::ioapic::{IoApic, PINS};
use super::lapic::{Lapic, LapicFeatures};
use super::message::{DeliveryMode, Destination, Message};
use super::pic::PicPair;
use super::port::{ApicMode, LapicPort, request};
use crate::bus::SharedDevice;
use crate::host::Host;
use crate::layout;

/// The controllers that have wires.
struct Wires {
    pic: PicPair,
    ioapic: IoApic,
    /// For each global system interrupt, who drives it high: a bit for each [`IrqLine`], bit 0
    /// for [`InterruptSink::set_level`].
    drivers: [u32; PINS],
    /// How many bits of `drivers` are given away.
    lines: [u8; PINS],
}

/// The interrupt controllers of a machine.
///
/// # Wiring
///
/// Global system interrupts 0 to 23 are the inputs of the I/O APIC. Those of the ISA bus reach
/// the PIC as well, under their own number, but for the timer: it is interrupt 2 of the I/O APIC
/// and 0 of the PIC, as an interrupt source override in the ACPI tables must say. The PIC's
/// output is input 0 of the I/O APIC and LINT0 of vCPU 0.
///
/// # Identification
///
/// vCPU `n` has the APIC identification `n`; guests cannot change it.
pub struct Irqchip {
    host: Arc<dyn Host>,
    ports: Box<[Arc<LapicPort>]>,
    wires: spin::Mutex<Wires>,
}

impl Irqchip {
    /// The global system interrupt of the timer (the PIT's channel 0).
    pub const TIMER_GSI: u32 = 2;

    /// The controllers for `vcpus` vCPUs, and the half that each vCPU's loop owns.
    pub fn new(
        host: Arc<dyn Host>,
        vcpus: usize,
        features: LapicFeatures,
    ) -> (Arc<Self>, alloc::vec::Vec<Lapic>) {
        let chip = Arc::new(Self {
            host,
            ports: (0..vcpus).map(|_| Arc::new(LapicPort::new())).collect(),
            wires: spin::Mutex::new(Wires {
                pic: PicPair::new(),
                ioapic: IoApic::new(layout::IOAPIC_ID),
                drivers: [0; PINS],
                lines: [1; PINS],
            }),
        });
        let lapics = (0..vcpus)
            .map(|index| Lapic::new(chip.clone(), index, features))
            .collect();
        (chip, lapics)
    }

    /// The number of vCPUs.
    pub fn vcpus(&self) -> usize {
        self.ports.len()
    }

    /// The host that the machine runs on.
    pub fn host(&self) -> &Arc<dyn Host> {
        &self.host
    }

    #[inline]
    pub(super) fn port(&self, vcpu: usize) -> &Arc<LapicPort> {
        &self.ports[vcpu]
    }

    /// A wire of its own to `gsi`: the interrupt is active while any of its wires is, so that PCI
    /// devices can share one. `None` if there is no such interrupt, or it has 32 wires already.
    pub fn line(self: &Arc<Self>, gsi: u32) -> Option<IrqLine> {
        let mut wires = self.wires.lock();
        let number = wires.lines.get_mut(gsi as usize)?;
        let source = *number;
        if source >= 32 {
            return None;
        }
        *number += 1;
        drop(wires);
        Some(IrqLine {
            chip: self.clone(),
            gsi,
            source,
        })
    }

    /// Sets bits of a vCPU's requests and kicks it: for the exit loop's own bits
    /// ([`request::MACHINE`]). Numbers of no vCPU are ignored.
    pub fn request(&self, vcpu: usize, bits: u32) {
        if let Some(port) = self.ports.get(vcpu)
            && port.request(bits)
        {
            self.host.kick(vcpu);
        }
    }

    /// The requests of a vCPU. See [`Lapic::requests`].
    pub fn requests(&self, vcpu: usize) -> Option<&AtomicU32> {
        self.ports.get(vcpu).map(|port| &port.requests)
    }

    fn drive(&self, gsi: u32, source: u8, high: bool) {
        let pin = gsi as usize;
        let mut wires = self.wires.lock();
        let Some(drivers) = wires.drivers.get_mut(pin) else {
            return;
        };
        let before = *drivers;
        if high {
            *drivers |= 1 << source;
        } else {
            *drivers &= !(1 << source);
        }
        let level = *drivers != 0;
        if level == (before != 0) {
            return;
        }
        match gsi {
            0 => {}
            Self::TIMER_GSI => wires.pic.set_line(0, level),
            _ if gsi < 16 => wires.pic.set_line(gsi as u8, level),
            _ => {}
        }
        if gsi != 0 {
            wires.ioapic.set_line(pin, level, &self.bus());
        }
        self.follow_pic(&mut wires);
    }

    fn bus(&self) -> impl Fn(Message) -> bool + '_ {
        |message| self.deliver(message, None)
    }

    /// Passes the PIC's output on, if it changed.
    fn follow_pic(&self, wires: &mut Wires) {
        let Some(bsp) = self.ports.first() else {
            return;
        };
        let output = wires.pic.output();
        if output == bsp.lint0.load(Ordering::Relaxed) {
            return;
        }
        bsp.lint0.store(output, Ordering::Release);
        wires.ioapic.set_line(0, output, &self.bus());
        if output {
            self.post(0, request::LINT0, None);
        }
    }

    /// The PIC's acknowledge cycle.
    pub(super) fn acknowledge_pic(&self) -> Option<u8> {
        let mut wires = self.wires.lock();
        let vector = wires.pic.acknowledge();
        self.follow_pic(&mut wires);
        vector
    }

    /// The end of a level-triggered interrupt, broadcast by a local APIC.
    pub(super) fn end_of_interrupt(&self, vector: u8) {
        let mut wires = self.wires.lock();
        wires.ioapic.end_of_interrupt(vector, &self.bus());
    }

    #[inline]
    fn post(&self, vcpu: usize, bits: u32, sender: Option<usize>) {
        if self.ports[vcpu].request(bits) && sender != Some(vcpu) {
            self.host.kick(vcpu);
        }
    }

    /// Whether the local APIC of `vcpu` is among the destinations.
    #[inline]
    fn matches(&self, vcpu: usize, destination: Destination) -> bool {
        match destination {
            Destination::Physical(id) => id as usize == vcpu,
            Destination::Logical(set) => self.ports[vcpu].matches_logical(vcpu as u32, set),
            Destination::All => true,
            Destination::AllBut(id) => id as usize != vcpu,
        }
    }

    /// Delivers a message; `sender` is the vCPU that sends it, which needs no kick for itself.
    /// True if a local APIC took it.
    pub fn deliver(&self, message: Message, sender: Option<usize>) -> bool {
        match (message.destination, message.mode) {
            (destination, DeliveryMode::LowestPriority) => self
                .arbitrate(destination, message.vector)
                .is_some_and(|vcpu| {
                    let fixed = Message {
                        mode: DeliveryMode::Fixed,
                        ..message
                    };
                    self.accept(vcpu, fixed, sender)
                }),
            (Destination::Physical(id), _) => self.accept(id as usize, message, sender),
            (destination, _) => {
                let mut accepted = false;
                for vcpu in 0..self.ports.len() {
                    if self.matches(vcpu, destination) {
                        accepted |= self.accept(vcpu, message, sender);
                    }
                }
                accepted
            }
        }
    }

    /// Chooses one of the destinations that can take a vector. The choice depends on the vector
    /// alone, so that a device's interrupts stay in one processor's caches; which processor's
    /// priority counts as lowest is up to the implementation (SDM vol. 3A, 11.6.2.4).
    fn arbitrate(&self, destination: Destination, vector: u8) -> Option<usize> {
        let candidates = || {
            (0..self.ports.len()).filter(|&vcpu| {
                self.matches(vcpu, destination) && self.ports[vcpu].routing().takes_vectors()
            })
        };
        let count = candidates().count();
        let choice = usize::from(vector).checked_rem(count)?;
        candidates().nth(choice)
    }

    fn accept(&self, vcpu: usize, message: Message, sender: Option<usize>) -> bool {
        let Some(port) = self.ports.get(vcpu) else {
            return false;
        };
        let routing = port.routing();
        if routing.mode == ApicMode::Disabled {
            return false;
        }
        match message.mode {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority => {
                if !routing.takes_vectors() {
                    return false;
                }
                if message.vector < 16 {
                    self.post(vcpu, request::ILLEGAL_VECTOR, sender);
                    return false;
                }
                port.post(message.vector, message.level);
                self.post(vcpu, request::VECTORS, sender);
            }
            DeliveryMode::Nmi => self.post(vcpu, request::NMI, sender),
            DeliveryMode::Init => {
                // A start-up IPI that came before is void.
                port.requests
                    .fetch_and(!request::STARTUP, Ordering::Relaxed);
                self.post(vcpu, request::INIT, sender);
            }
            DeliveryMode::StartUp => {
                port.set_startup(message.vector);
                self.post(vcpu, request::STARTUP, sender);
            }
            DeliveryMode::ExtInt => self.post(vcpu, request::EXTINT, sender),
            // There is no system-management mode here.
            DeliveryMode::Smi | DeliveryMode::Reserved => return false,
        }
        true
    }

    /// The ports of the PIC pair and its edge/level control, to be put on the port bus at
    /// 0x20, 0xA0 and 0x4D0, two ports each.
    pub fn pic_ports(self: &Arc<Self>) -> [(u16, Arc<dyn SharedDevice>); 3] {
        [0x20, 0xA0, 0x4D0].map(|base| {
            let chip = self.clone();
            (
                base,
                Arc::new(PicPorts { chip, base }) as Arc<dyn SharedDevice>,
            )
        })
    }

    /// The window of the I/O APIC, to be put on the memory bus at [`layout::IOAPIC`], one page.
    pub fn ioapic_window(self: &Arc<Self>) -> Arc<dyn SharedDevice> {
        Arc::new(IoApicWindow(self.clone()))
    }
}

impl InterruptSink for Irqchip {
    fn set_level(&self, gsi: u32, high: bool) {
        self.drive(gsi, 0, high);
    }

    fn send_msi(&self, msi: Msi) {
        if let Some(message) = Message::from_msi(msi) {
            self.deliver(message, None);
        }
    }
}

/// A wire to an interrupt that others may drive as well ([`Irqchip::line`]).
pub struct IrqLine {
    chip: Arc<Irqchip>,
    gsi: u32,
    source: u8,
}

impl IrqLine {
    /// The global system interrupt.
    pub fn gsi(&self) -> u32 {
        self.gsi
    }

    /// Drives the wire.
    pub fn set(&self, high: bool) {
        self.chip.drive(self.gsi, self.source, high);
    }
}

impl InterruptSink for IrqLine {
    /// Drives this wire if it is one to `gsi`.
    fn set_level(&self, gsi: u32, high: bool) {
        if gsi == self.gsi {
            self.set(high);
        }
    }

    fn send_msi(&self, msi: Msi) {
        self.chip.send_msi(msi);
    }
}

struct PicPorts {
    chip: Arc<Irqchip>,
    base: u16,
}

impl SharedDevice for PicPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut wires = self.chip.wires.lock();
        for (byte, port) in data.iter_mut().zip(self.base + (offset & 1) as u16..) {
            *byte = match self.base {
                0x4D0 => wires.pic.read_elcr(port),
                _ => wires.pic.read(port),
            };
        }
        self.chip.follow_pic(&mut wires);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut wires = self.chip.wires.lock();
        for (byte, port) in data.iter().zip(self.base + (offset & 1) as u16..) {
            match self.base {
                0x4D0 => wires.pic.write_elcr(port, *byte),
                _ => wires.pic.write(port, *byte),
            }
        }
        self.chip.follow_pic(&mut wires);
    }
}

struct IoApicWindow(Arc<Irqchip>);

impl SharedDevice for IoApicWindow {
    /// Registers are 32 bits wide; other widths read what covers them, zero-extended.
    fn read(&self, offset: u64, data: &mut [u8]) {
        let value = self.0.wires.lock().ioapic.read(offset & !3);
        let bytes = (u64::from(value) >> (offset % 4 * 8)).to_le_bytes();
        for (to, from) in data.iter_mut().zip(bytes) {
            *to = from;
        }
    }

    /// Writes that are not of 32 aligned bits are ignored, but for one byte to the index register.
    fn write(&self, offset: u64, data: &[u8]) {
        let value = match *data {
            [a, b, c, d] => u32::from_le_bytes([a, b, c, d]),
            [index] if offset == 0 => u32::from(index),
            _ => return,
        };
        let mut wires = self.0.wires.lock();
        wires.ioapic.write(offset, value, &self.0.bus());
    }
}

#[cfg(test)]
#[path = "irqchip_tests.rs"]
mod tests;
