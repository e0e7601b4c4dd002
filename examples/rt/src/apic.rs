//! The local APIC (Intel SDM vol. 3, chapter 12; AMD APM vol. 2, chapter 16), in the mode that firmware
//! left it in: xAPIC or x2APIC.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::{irq, msr};

const APIC_BASE: u32 = 0x1b;
const GLOBAL_ENABLE: u64 = 1 << 11;
const X2APIC_ENABLE: u64 = 1 << 10;
/// The MSR of the x2APIC register at xAPIC offset 0.
const X2APIC_FIRST: u32 = 0x800;

/// A register, by its offset in the xAPIC page.
#[derive(Clone, Copy)]
pub(crate) enum Register {
    Id = 0x20,
    TaskPriority = 0x80,
    Eoi = 0xb0,
    Spurious = 0xf0,
    CommandLow = 0x300,
    CommandHigh = 0x310,
    LvtTimer = 0x320,
    InitialCount = 0x380,
    CurrentCount = 0x390,
    Divide = 0x3e0,
}

const SOFTWARE_ENABLE: u32 = 1 << 8;

const FIXED: u32 = 0 << 8;
const NMI: u32 = 4 << 8;
const INIT: u32 = 5 << 8;
const STARTUP: u32 = 6 << 8;
const PENDING: u32 = 1 << 12;
const ASSERT: u32 = 1 << 14;

static X2APIC: AtomicBool = AtomicBool::new(false);
static PAGE: AtomicU64 = AtomicU64::new(0xfee0_0000);

pub(crate) fn read(register: Register) -> u32 {
    if X2APIC.load(Ordering::Relaxed) {
        // SAFETY: x2APIC mode is on, and has all registers of the enumeration but the command's upper half,
        // which is not read.
        unsafe { msr::read(X2APIC_FIRST + (register as u32 >> 4)) as u32 }
    } else {
        let address = PAGE.load(Ordering::Relaxed) + register as u64;
        // SAFETY: the APIC's page is mapped, below 4 GiB, and reading it changes no memory.
        unsafe { (address as *const u32).read_volatile() }
    }
}

#[inline]
pub(crate) fn write(register: Register, value: u32) {
    if X2APIC.load(Ordering::Relaxed) {
        // SAFETY: x2APIC mode is on; none of these registers controls memory.
        unsafe { msr::write(X2APIC_FIRST + (register as u32 >> 4), u64::from(value)) };
    } else {
        let address = PAGE.load(Ordering::Relaxed) + register as u64;
        // SAFETY: the APIC's page is mapped, below 4 GiB, and none of these registers controls memory.
        unsafe { (address as *mut u32).write_volatile(value) };
    }
}

/// Finds the local APIC of the boot processor.
pub(crate) fn init() {
    // SAFETY: every 64-bit processor has the register.
    let base = unsafe { msr::read(APIC_BASE) };
    X2APIC.store(base & X2APIC_ENABLE != 0, Ordering::Relaxed);
    PAGE.store(base & 0x000f_ffff_ffff_f000, Ordering::Relaxed);
    init_this_cpu();
}

/// Enables the local APIC of the running processor, with nothing unmasked.
pub(crate) fn init_this_cpu() {
    // SAFETY: every 64-bit processor has the register; the boot processor's mode is valid on all.
    unsafe {
        let base = msr::read(APIC_BASE);
        let mut wanted = base | GLOBAL_ENABLE;
        if X2APIC.load(Ordering::Relaxed) {
            wanted |= X2APIC_ENABLE;
        }
        if wanted != base {
            msr::write(APIC_BASE, wanted);
        }
    }
    write(Register::TaskPriority, 0);
    write(
        Register::Spurious,
        SOFTWARE_ENABLE | u32::from(irq::SPURIOUS),
    );
}

/// The running processor's local APIC number.
pub fn id() -> u32 {
    let value = read(Register::Id);
    if X2APIC.load(Ordering::Relaxed) {
        value
    } else {
        value >> 24
    }
}

/// Tells the local APIC that the interrupt in service has been handled.
#[inline]
pub fn eoi() {
    write(Register::Eoi, 0);
}

/// Sends an interrupt to a processor, by its number.
///
/// # Panics
/// If there is no such processor.
pub fn send_ipi(cpu: usize, vector: u8) {
    command(crate::cpu::apic_id(cpu), FIXED | ASSERT | u32::from(vector));
}

/// Sends a non-maskable interrupt to a processor, by its number.
///
/// # Panics
/// If there is no such processor.
pub fn send_nmi(cpu: usize) {
    command(crate::cpu::apic_id(cpu), NMI | ASSERT);
}

pub(crate) fn send_init(apic_id: u32) {
    command(apic_id, INIT | ASSERT);
}

pub(crate) fn send_startup(apic_id: u32, page: u8) {
    command(apic_id, STARTUP | ASSERT | u32::from(page));
}

fn command(destination: u32, low: u32) {
    if X2APIC.load(Ordering::Relaxed) {
        // SAFETY: x2APIC mode is on; an interrupt reaches handlers, and a start-up message goes only where
        // `cpu::start_all` has prepared the code. Its memory must be visible first, which the fence ensures.
        unsafe {
            core::arch::x86_64::_mm_mfence();
            let register = X2APIC_FIRST + (Register::CommandLow as u32 >> 4);
            msr::write(register, u64::from(destination) << 32 | u64::from(low));
        }
        return;
    }
    // The two halves must not mix with those of an interrupt's handler.
    irq::without(|| {
        while read(Register::CommandLow) & PENDING != 0 {
            core::hint::spin_loop();
        }
        write(Register::CommandHigh, destination << 24);
        write(Register::CommandLow, low);
    });
}
