//! The local APIC: the guest's, with all its registers but for two messages. INIT and start-up would
//! take a processor out of the guest's mode, so those that the guest sends are carried out by the
//! hypervisor ([`crate::processors`]).

use testudo_arch::Msr;
use testudo_rt::msr;

const GLOBAL_ENABLE: u64 = 1 << 11;
const X2APIC: u64 = 1 << 10;
/// The bits of IA32_APIC_BASE that hold the page.
const PAGE: u64 = 0x000F_FFFF_FFFF_F000;

/// Where the registers are. Firmware leaves them there, and the guest cannot move them.
pub(crate) const BASE: u64 = 0xFEE0_0000;
/// Where writes become interrupt messages on some machines, also of processors (SDM vol. 3A, 11.11.1).
pub(crate) const MESSAGES: core::ops::Range<u64> = BASE..BASE + 0x10_0000;

const ID: u64 = 0x20;
const EOI: u64 = 0xB0;
const LOGICAL_DESTINATION: u64 = 0xD0;
const DESTINATION_FORMAT: u64 = 0xE0;
const SPURIOUS: u64 = 0xF0;
const PROCESSOR_PRIORITY: u64 = 0xA0;
const IN_SERVICE: u64 = 0x100;
const REQUESTED: u64 = 0x200;
const COMMAND_LOW: u64 = 0x300;
const COMMAND_HIGH: u64 = 0x310;
const TASK_PRIORITY: u64 = 0x80;
const LVT: core::ops::RangeInclusive<u64> = 0x320..=0x370;
const INITIAL_COUNT: u64 = 0x380;

const NMI: u32 = 4 << 8;
const ASSERT: u32 = 1 << 14;
const PENDING: u32 = 1 << 12;
const MASKED: u32 = 1 << 16;

/// How often to look whether a command of the guest's has been sent, which takes microseconds at most.
const PENDING_POLLS: u32 = 100_000;

/// What a command that the guest wrote asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    /// The hardware may have it.
    Pass,
    /// INIT for these processors.
    Init(Target),
    /// Start-up of these at this page.
    Startup(Target, u8),
    /// It has no effect.
    Drop,
}

/// Which processors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// The one with this number.
    One(u32),
    /// All of them.
    All,
    /// All but the sender.
    Others,
}

impl Command {
    /// Decodes the interrupt command register (APM vol. 2, 16.5): `destination` is a physical
    /// number, `everyone` the one that means all.
    pub(crate) fn decode(low: u32, destination: u32, everyone: u32) -> Self {
        let (is_init, vector) = match low >> 8 & 7 {
            5 => (true, 0),
            6 => (false, low as u8),
            _ => return Self::Pass,
        };
        // "Level … deassert" synchronizes arbitration numbers on processors of long ago.
        if is_init && low & ASSERT == 0 {
            return Self::Drop;
        }
        let logical = low & 1 << 11 != 0;
        let target = match low >> 18 & 3 {
            0 if logical => return Self::Drop,
            0 if destination == everyone => Target::All,
            0 => Target::One(destination),
            1 => return Self::Drop,
            _ => Target::Others,
        };
        if is_init {
            Self::Init(target)
        } else {
            Self::Startup(target, vector)
        }
    }
}

fn base() -> u64 {
    // SAFETY: every 64-bit processor has the register.
    unsafe { msr::read(Msr::APIC_BASE.0) }
}

/// Whether the registers are MSRs.
fn is_x2apic() -> bool {
    base() & X2APIC != 0
}

/// Whether a value for IA32_APIC_BASE leaves the registers where they are.
fn keeps_base(value: u64) -> bool {
    value & PAGE == BASE
}

/// Whether this processor's registers are where the hypervisor expects them.
pub(crate) fn is_at_base() -> bool {
    keeps_base(base()) && base() & GLOBAL_ENABLE != 0
}

/// Reads a register of the page.
pub(crate) fn read(offset: u64) -> u32 {
    // SAFETY: the page is the local APIC's, below 4 GiB and mapped; no read changes memory.
    unsafe { ((BASE + offset) as *const u32).read_volatile() }
}

fn write(offset: u64, value: u32) {
    // SAFETY: as for `read`; no register makes the APIC write memory.
    unsafe { ((BASE + offset) as *mut u32).write_volatile(value) }
}

/// Carries out a write of the guest to the page, and says what is left to be done for it.
pub(crate) fn write_for_guest(offset: u64, value: u32) -> Command {
    // Its number is how others find it.
    if offset == ID {
        return Command::Drop;
    }
    if offset == COMMAND_LOW {
        let command = Command::decode(value, read(COMMAND_HIGH) >> 24, 0xFF);
        if command != Command::Pass {
            return command;
        }
    }
    write(offset, value);
    Command::Pass
}

/// As [`write_for_guest`], for the command register of x2APIC mode; `None` is #GP.
pub(crate) fn write_x2apic_command(value: u64) -> Option<Command> {
    let command = Command::decode(value as u32, (value >> 32) as u32, u32::MAX);
    if command == Command::Pass {
        // SAFETY: no message but INIT and start-up takes a processor away from the hypervisor.
        let sent = unsafe { msr::try_write(Msr::X2APIC_ICR.0, value) };
        return sent.then_some(command);
    }
    Some(command)
}

/// Writes IA32_APIC_BASE for the guest, which cannot move the registers; `false` is #GP.
pub(crate) fn write_base(value: u64) -> bool {
    // SAFETY: the page stays where the hypervisor expects it; the modes are the guest's to choose.
    keeps_base(value) && unsafe { msr::try_write(Msr::APIC_BASE.0, value) }
}

/// Sends an NMI to the processor with this APIC number.
pub(crate) fn send_nmi(destination: u32) {
    if is_x2apic() {
        let value = u64::from(destination) << 32 | u64::from(NMI | ASSERT);
        // SAFETY: the register exists in x2APIC mode, and every processor has a handler for NMIs.
        unsafe { msr::write(Msr::X2APIC_ICR.0, value) };
        return;
    }
    // The guest may be between the two halves of a command of its own.
    let high = read(COMMAND_HIGH);
    for _ in 0..PENDING_POLLS {
        if read(COMMAND_LOW) & PENDING == 0 {
            break;
        }
        core::hint::spin_loop();
    }
    write(COMMAND_HIGH, destination << 24);
    write(COMMAND_LOW, NMI | ASSERT);
    write(COMMAND_HIGH, high);
}

/// Reads a register in either mode; 0 if this processor lacks it.
fn get(offset: u64, x2apic: bool) -> u32 {
    if x2apic {
        let register = Msr::X2APIC_FIRST.0 + (offset >> 4) as u32;
        msr::try_read(register).map_or(0, |value| value as u32)
    } else {
        read(offset)
    }
}

/// Whether an interrupt waits that the processor would take if it took any (SDM vol. 3A, 11.8.3.1 and 11.8.4: its
/// class is above the processor's priority).
pub(crate) fn has_pending() -> bool {
    let x2apic = is_x2apic();
    let class = get(PROCESSOR_PRIORITY, x2apic) >> 4 & 0xF;
    // A class is half a word of 32 vectors.
    (class + 1..16).any(|class| {
        let word = get(REQUESTED + u64::from(class / 2) * 0x10, x2apic);
        word >> (class % 2 * 16) & 0xFFFF != 0
    })
}

/// What INIT does to the local APIC (SDM vol. 3A, 11.4.7.3): everything as after reset but for its number.
pub(crate) fn reset() {
    let x2apic = is_x2apic();
    let put = |offset: u64, value: u32| {
        if x2apic {
            let register = Msr::X2APIC_FIRST.0 + (offset >> 4) as u32;
            // SAFETY: none of these registers concerns memory; one that this processor lacks or refuses
            // stays as it is.
            unsafe { msr::try_write(register, u64::from(value)) };
        } else {
            write(offset, value);
        }
    };
    for offset in LVT.step_by(0x10) {
        put(offset, MASKED);
    }
    put(INITIAL_COUNT, 0);
    put(TASK_PRIORITY, 0);
    // One interrupt in service for each of its bits at the most.
    for _ in 0..256 {
        if (0..8).all(|word| get(IN_SERVICE + word * 0x10, x2apic) == 0) {
            break;
        }
        put(EOI, 0);
    }
    if !x2apic {
        put(LOGICAL_DESTINATION, 0);
        put(DESTINATION_FORMAT, u32::MAX);
    }
    put(SPURIOUS, 0xFF);
}
