//! The I/O APICs (82093AA datasheet, section 3), and the old interrupt controllers that they replace.

use alloc::vec::Vec;

use spin::Once;

use crate::acpi::{IoApic, Madt, Override};
use crate::lock::Lock;
use crate::port;

const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;

const VERSION: u32 = 1;
const REDIRECTION: u32 = 0x10;

const ACTIVE_LOW: u32 = 1 << 13;
const LEVEL: u32 = 1 << 15;
const MASKED: u32 = 1 << 16;

struct Wiring {
    io_apics: Vec<IoApic>,
    overrides: Vec<Override>,
}

static WIRING: Once<Wiring> = Once::new();
/// The select register and the window belong together.
static ACCESS: Lock<()> = Lock::new(());

fn read(io_apic: &IoApic, register: u32) -> u32 {
    let address = u64::from(io_apic.address);
    // SAFETY: the I/O APIC's page is mapped, below 4 GiB, and the lock is held for the pair.
    unsafe {
        ((address + SELECT) as *mut u32).write_volatile(register);
        ((address + WINDOW) as *const u32).read_volatile()
    }
}

fn write(io_apic: &IoApic, register: u32, value: u32) {
    let address = u64::from(io_apic.address);
    // SAFETY: as in `read`; an interrupt's routing touches no memory.
    unsafe {
        ((address + SELECT) as *mut u32).write_volatile(register);
        ((address + WINDOW) as *mut u32).write_volatile(value);
    }
}

fn inputs(io_apic: &IoApic) -> u32 {
    (read(io_apic, VERSION) >> 16 & 0xff) + 1
}

/// Takes over from the old controllers, with every input masked.
pub(crate) fn init(madt: &Madt) {
    // SAFETY: the two 8259s touch no memory; their data ports take the mask.
    unsafe {
        port::write_u8(0x21, 0xff);
        port::write_u8(0xa1, 0xff);
    }
    let wiring = WIRING.call_once(|| Wiring {
        io_apics: madt.io_apics.clone(),
        overrides: madt.overrides.clone(),
    });
    let _access = ACCESS.lock();
    for io_apic in &wiring.io_apics {
        for input in 0..inputs(io_apic) {
            write(io_apic, REDIRECTION + 2 * input, MASKED);
        }
    }
}

/// Has an ISA interrupt raise `vector` on the processor with this local APIC number.
///
/// Returns false where no I/O APIC has the input.
pub fn route_isa(irq: u8, vector: u8, apic_id: u32) -> bool {
    let Some(wiring) = WIRING.get() else {
        return false;
    };
    let plain = Override {
        irq,
        input: u32::from(irq),
        active_low: false,
        level: false,
    };
    let wire = wiring
        .overrides
        .iter()
        .find(|wire| wire.irq == irq)
        .unwrap_or(&plain);
    let _access = ACCESS.lock();
    let found = wiring.io_apics.iter().find_map(|io_apic| {
        let input = wire.input.checked_sub(io_apic.first_input)?;
        (input < inputs(io_apic)).then_some((io_apic, input))
    });
    let Some((io_apic, input)) = found else {
        return false;
    };
    let mut low = u32::from(vector);
    if wire.active_low {
        low |= ACTIVE_LOW;
    }
    if wire.level {
        low |= LEVEL;
    }
    // Destination first: the lower half unmasks.
    write(io_apic, REDIRECTION + 2 * input + 1, apic_id << 24);
    write(io_apic, REDIRECTION + 2 * input, low);
    true
}
