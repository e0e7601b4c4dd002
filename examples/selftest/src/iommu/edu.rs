//! QEMU's educational device, as far as its DMA goes: it copies between memory and a buffer of its own
//! (QEMU's documentation, "EDU device").

use alloc::string::String;

use testudo_arch::Gpa;
use testudo_rt::{port, time};

/// What the device writes.
pub(super) const MARK: u64 = 0x6F64_7574_7365_7454;
/// Where the device reads the mark, and where its driver has to map it.
pub(super) const SOURCE: Gpa = Gpa(0x0400_0000);

const CONFIGURATION_ADDRESS: u16 = 0xCF8;
const CONFIGURATION_DATA: u16 = 0xCFC;
const VENDOR_AND_DEVICE: u32 = 0x11E8_1234;

/// Registers in the device's window.
const DMA_SOURCE: u64 = 0x80;
const DMA_DESTINATION: u64 = 0x88;
const DMA_COUNT: u64 = 0x90;
const DMA_COMMAND: u64 = 0x98;
/// The buffer, as the registers above name it.
const BUFFER: u64 = 0x4_0000;

/// Bits of the command.
const START: u64 = 1;
const TO_MEMORY: u64 = 1 << 1;

/// The device.
pub(super) struct Edu {
    function: u8,
    window: u64,
}

fn select(function: u8, offset: u32) {
    let address = 1 << 31 | u32::from(function) << 8 | offset;
    // SAFETY: this port only says what the next one means.
    unsafe { port::write_u32(CONFIGURATION_ADDRESS, address) };
}

fn read(function: u8, offset: u32) -> u32 {
    select(function, offset);
    // SAFETY: reads of the registers below have no effect.
    unsafe { port::read_u32(CONFIGURATION_DATA) }
}

impl Edu {
    /// Finds the device on the first bus, and lets it access memory.
    pub(super) fn find() -> Option<Self> {
        let function = (0..=255).find(|function| read(*function, 0) == VENDOR_AND_DEVICE)?;
        let window = u64::from(read(function, 0x10) & !0xF);
        let command = read(function, 4) & 0xFFFF;
        select(function, 4);
        // Memory space and bus master.
        // SAFETY: the device does nothing until it is told.
        unsafe { port::write_u32(CONFIGURATION_DATA, command | 0b110) };
        (window != 0).then_some(Self { function, window })
    }

    /// Its device and function numbers, as a requester has them.
    pub(super) fn function(&self) -> u8 {
        self.function
    }

    fn write(&mut self, register: u64, value: u64) {
        // SAFETY: firmware has placed the window there, in the identity map, and what the device may write to
        // is the caller's business.
        unsafe { ((self.window + register) as *mut u64).write_volatile(value) };
    }

    fn run(&mut self, source: u64, destination: u64, command: u64) -> Result<(), String> {
        /// The device waits for 100 ms by itself.
        const LIMIT: u64 = 20_000_000_000;
        self.write(DMA_SOURCE, source);
        self.write(DMA_DESTINATION, destination);
        self.write(DMA_COUNT, 8);
        self.write(DMA_COMMAND, START | command);
        let begin = time::now_ns();
        loop {
            // SAFETY: as for `write`.
            let command = unsafe { ((self.window + DMA_COMMAND) as *const u64).read_volatile() };
            if command & START == 0 {
                return Ok(());
            }
            if time::now_ns() - begin > LIMIT {
                return Err("the device does not end its DMA".into());
            }
        }
    }

    /// Reads the mark into the buffer.
    pub(super) fn load(&mut self) -> Result<(), String> {
        self.run(SOURCE.0, BUFFER, 0)
    }

    /// Writes the mark to an address of the device's.
    pub(super) fn copy_out(&mut self, address: Gpa) -> Result<(), String> {
        self.run(BUFFER, address.0, TO_MEMORY)
    }
}
