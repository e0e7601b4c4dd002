//! What only the PCI transport has: message interrupts, the line's switches, bus mastering, and
//! the configuration access capability.

mod support;

use support::{Connect, GSI, PciGuest, RawDriver};
use testudo_arch::irq::Msi;
use testudo_arch::pci::PciFunction;
use testudo_virtio::backend::MemoryImage;
use testudo_virtio::device::{Blk, BlkOptions};
use virtio_drivers::transport::Transport;

const COMMAND: u16 = 4;
const STATUS: u16 = 6;
const MEMORY_AND_MASTER: u16 = 6;
const INTX_DISABLE: u16 = 1 << 10;

struct Function(RawDriver<PciGuest>);

impl Function {
    fn new() -> Self {
        let disk = Blk::new(MemoryImage(vec![0; 4096]), BlkOptions::default());
        Self(RawDriver::new(disk, false))
    }

    fn config16(&self, at: u16) -> u16 {
        let mut bytes = [0; 2];
        self.0.guest.device.borrow_mut().config_read(at, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    fn config32(&self, at: u16) -> u32 {
        let mut bytes = [0; 4];
        self.0.guest.device.borrow_mut().config_read(at, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn set_config(&self, at: u16, bytes: &[u8]) {
        self.0.guest.device.borrow_mut().config_write(at, bytes);
    }

    /// The capability with this number, and with this type if it is vendor-specific.
    fn capability(&self, id: u8, kind: Option<u8>) -> u16 {
        let mut at = self.config16(0x34) & 0xFC;
        while at != 0 {
            let word = self.config32(at).to_le_bytes();
            if word[0] == id && kind.is_none_or(|kind| word[3] == kind) {
                return at;
            }
            at = word[1].into();
        }
        panic!("no capability {id}");
    }

    fn bar(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.0
            .guest
            .device
            .borrow_mut()
            .bar_read(0, offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn set_bar(&self, offset: u64, value: u32) {
        let mut device = self.0.guest.device.borrow_mut();
        device.bar_write(0, offset, &value.to_le_bytes());
    }

    /// One request, which the device interrupts for.
    fn work(&mut self) {
        assert!(self.0.exchange(0, &[0; 16], 513).is_some());
    }

    fn messages(&self) -> Vec<Msi> {
        std::mem::take(&mut self.0.guest.interrupts().messages.lock().unwrap())
    }
}

#[test]
fn messages_are_sent_masked_and_kept() {
    let mut f = Function::new();
    let capability = f.capability(0x11, None);
    // Two vectors: configuration and one queue.
    assert_eq!(f.config16(capability + 2) & 0x7FF, 1);
    let table = u64::from(f.config32(capability + 4) & !7);
    let pending = u64::from(f.config32(capability + 8) & !7);
    for (vector, data) in [(0u64, 0x40), (1, 0x41)] {
        f.set_bar(table + 16 * vector, 0xFEE0_1003);
        f.set_bar(table + 16 * vector + 4, 1);
        f.set_bar(table + 16 * vector + 8, data);
    }
    // The lowest address bits are none of software's business.
    assert_eq!(f.bar(table), 0xFEE0_1000);
    // A vector that does not exist cannot be assigned.
    f.0.guest.write(22, 0u16);
    f.0.guest.write(26, 2u16);
    assert_eq!(f.0.guest.read::<u16>(26), 0xFFFF);
    f.0.guest.write(26, 1u16);
    f.0.guest.write(16, 0u16);
    assert_eq!(
        (f.0.guest.read::<u16>(26), f.0.guest.read::<u16>(16)),
        (1, 0)
    );
    f.set_config(capability + 2, &0x8000u16.to_le_bytes());

    // All vectors are masked after reset: the message waits.
    f.work();
    assert_eq!(f.messages(), []);
    assert_eq!(f.bar(pending), 0b10);
    f.set_bar(table + 16 + 12, 0);
    let queue = Msi {
        address: 0x1_FEE0_1000,
        data: 0x41,
    };
    assert_eq!(f.messages(), [queue]);
    assert_eq!(f.bar(pending), 0);
    f.work();
    assert_eq!(f.messages(), [queue]);
    // All masked at once.
    f.set_config(capability + 2, &0xC000u16.to_le_bytes());
    f.work();
    f.work();
    assert_eq!(f.messages(), []);
    f.set_config(capability + 2, &0x8000u16.to_le_bytes());
    assert_eq!(f.messages(), [queue]);
    // The line is not used meanwhile.
    assert_eq!(f.0.guest.interrupts().count(GSI), 0);
    assert_eq!(f.0.guest.ack_interrupt().bits(), 0);
}

#[test]
fn the_line_can_be_switched_off() {
    let mut f = Function::new();
    f.set_config(COMMAND, &(MEMORY_AND_MASTER | INTX_DISABLE).to_le_bytes());
    f.work();
    // Wanted, shown, and not driven.
    assert_eq!(f.config16(STATUS) & 8, 8);
    assert!(!f.0.guest.interrupts().level(GSI));
    f.set_config(COMMAND, &MEMORY_AND_MASTER.to_le_bytes());
    assert!(f.0.guest.interrupts().level(GSI));
    assert_eq!(f.0.guest.ack_interrupt().bits(), 1);
    assert!(!f.0.guest.interrupts().level(GSI));
    assert_eq!(f.config16(STATUS) & 8, 0);
    // Reading the cause has cleared it.
    assert_eq!(f.0.guest.ack_interrupt().bits(), 0);
}

#[test]
fn without_bus_mastering_notifications_wait() {
    let mut f = Function::new();
    f.set_config(COMMAND, &2u16.to_le_bytes());
    assert_eq!(f.0.exchange(0, &[0; 16], 513), None);
    f.0.guest.poll(0);
    assert_eq!(f.0.take_used(0), None);
    f.set_config(COMMAND, &MEMORY_AND_MASTER.to_le_bytes());
    assert!(f.0.take_used(0).is_some());
}

#[test]
fn the_access_capability_reaches_the_registers() {
    let f = Function::new();
    let at = f.capability(9, Some(5));
    let select = |bar: u8, offset: u32, len: u32| {
        f.set_config(at + 4, &[bar]);
        f.set_config(at + 8, &offset.to_le_bytes());
        f.set_config(at + 12, &len.to_le_bytes());
    };
    // The device status, one byte at 20 of the common structure.
    let common = f.0.guest.common.offset;
    select(0, common + 20, 1);
    assert_eq!(f.config32(at + 16) & 0xFF, 15);
    f.set_config(at + 16, &[0]);
    assert_eq!(f.0.guest.get_status().bits(), 0);
    // The size of queue 0, two bytes.
    select(0, common + 24, 2);
    assert_eq!(f.config32(at + 16) & 0xFFFF, 256);
    // What is no access at all is none here either.
    for (bar, offset, len) in [(1, 0, 4), (0, 0x8000, 4), (0, 2, 4), (0, 0, 3), (0, 0, 0)] {
        select(bar, offset, len);
        f.set_config(at + 16, &[0xFF; 4]);
        let _ = f.config32(at + 16);
    }
    select(0, u32::MAX, 1);
    f.set_config(at + 16, &[0xFF; 4]);
    assert_eq!(f.0.guest.get_status().bits(), 0);
}

#[test]
fn the_header_keeps_what_software_may_not_change() {
    let f = Function::new();
    let before: Vec<u32> = (0..16).map(|i| f.config32(4 * i)).collect();
    for i in 0..16 {
        f.set_config(4 * i, &[0xFF; 4]);
    }
    assert_eq!(f.config32(0), before[0]);
    assert_eq!(f.config32(8), before[2]);
    assert_eq!(f.config32(0x2C), before[11]);
    assert_eq!(f.config16(COMMAND), 0x0406);
    // The base address register shows its size: 32 KiB, 64-bit memory.
    assert_eq!(
        (f.config32(0x10), f.config32(0x14)),
        (0xFFFF_8004, 0xFFFF_FFFF)
    );
    assert_eq!(f.config32(0x18), 0);
    // A modern device number, which legacy drivers do not know.
    assert_eq!((f.config16(0), f.config16(2)), (0x1AF4, 0x1042));
}
