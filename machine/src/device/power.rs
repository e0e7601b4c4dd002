//! What devices tell the machine: power off, reset, exit.

use alloc::sync::Arc;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::bus::SharedDevice;

/// What a guest asked of its machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PowerEvent {
    /// Soft off (the ACPI state S5).
    PowerOff,
    /// A reset of the whole machine.
    Reset,
    /// The end of the run with a status, by the debug-exit port.
    Exit(u32),
}

/// Where devices leave a [`PowerEvent`] for the machine. The first one stands until it is taken.
#[derive(Debug, Default)]
pub struct PowerSignal(AtomicU64);

impl PowerSignal {
    const POWER_OFF: u64 = 1 << 32;
    const RESET: u64 = 2 << 32;
    const EXIT: u64 = 3 << 32;

    /// No event.
    pub const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Leaves `event`, unless there is one.
    pub fn raise(&self, event: PowerEvent) {
        let code = match event {
            PowerEvent::PowerOff => Self::POWER_OFF,
            PowerEvent::Reset => Self::RESET,
            PowerEvent::Exit(status) => Self::EXIT | u64::from(status),
        };
        // Failure means that an earlier event stands.
        let _ = self
            .0
            .compare_exchange(0, code, Ordering::AcqRel, Ordering::Relaxed);
    }

    fn decode(code: u64) -> Option<PowerEvent> {
        match code & !u64::from(u32::MAX) {
            0 => None,
            Self::POWER_OFF => Some(PowerEvent::PowerOff),
            Self::RESET => Some(PowerEvent::Reset),
            _ => Some(PowerEvent::Exit(code as u32)),
        }
    }

    /// The event, which stays. One load: cheap enough to ask after each access to a device.
    #[inline]
    pub fn get(&self) -> Option<PowerEvent> {
        Self::decode(self.0.load(Ordering::Acquire))
    }

    /// Takes the event.
    pub fn take(&self) -> Option<PowerEvent> {
        Self::decode(self.0.swap(0, Ordering::AcqRel))
    }
}

/// The debug-exit port, as QEMU's isa-debug-exit: a write ends the run, with what was written as
/// the status. Reads give zero, by which a guest knows that the port is there.
pub struct DebugExit(Arc<PowerSignal>);

impl DebugExit {
    /// The number of ports.
    pub const PORTS: u16 = 4;

    /// The port, which tells `power`.
    pub fn new(power: Arc<PowerSignal>) -> Self {
        Self(power)
    }
}

impl SharedDevice for DebugExit {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset == 0 {
            let mut status = [0; 4];
            for (to, from) in status.iter_mut().zip(data) {
                *to = *from;
            }
            self.0.raise(PowerEvent::Exit(u32::from_le_bytes(status)));
        }
    }
}

/// The ports of the keyboard controller, which is absent but for one command.
///
/// All ports read as a bus without a device does, so a driver that probes finds none; the ACPI
/// tables say so too (IAPC_BOOT_ARCH). The controller's command FEh, "pulse output line 0", still
/// resets the machine, because that is how many systems reboot.
pub struct KeyboardController(Arc<PowerSignal>);

impl KeyboardController {
    /// The command port; it is all there is.
    pub const COMMAND: u16 = 0x64;

    /// The ports, which tell `power`.
    pub fn new(power: Arc<PowerSignal>) -> Self {
        Self(power)
    }
}

impl SharedDevice for KeyboardController {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xFF);
    }

    fn write(&self, _: u64, data: &[u8]) {
        // F0h to FFh pulse the lines whose bits are clear; line 0 is the processor's reset.
        if let [command, ..] = data
            && command & 0xF1 == 0xF0
        {
            self.0.raise(PowerEvent::Reset);
        }
    }
}

/// System control port A, 0x92 (PS/2): bit 0 resets, bit 1 is the A20 gate.
///
/// The gate is always open: the bit reads back what was written, and does nothing.
pub struct SystemControlA {
    power: Arc<PowerSignal>,
    a20: core::sync::atomic::AtomicU8,
}

impl SystemControlA {
    /// The port.
    pub const PORT: u16 = 0x92;
    const RESET: u8 = 1 << 0;
    const A20: u8 = 1 << 1;

    /// The port, which tells `power`; the gate is open.
    pub fn new(power: Arc<PowerSignal>) -> Self {
        Self {
            power,
            a20: Self::A20.into(),
        }
    }
}

impl SharedDevice for SystemControlA {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xFF);
        if let [first, ..] = data {
            *first = self.a20.load(Ordering::Relaxed);
        }
    }

    fn write(&self, _: u64, data: &[u8]) {
        if let [value, ..] = data {
            self.a20.store(value & Self::A20, Ordering::Relaxed);
            if value & Self::RESET != 0 {
                self.power.raise(PowerEvent::Reset);
            }
        }
    }
}

/// The port for power-on self-test codes, 0x80: keeps the last one. Systems also write it to wait
/// for about a microsecond.
#[derive(Debug, Default)]
pub struct PostCode(core::sync::atomic::AtomicU8);

impl PostCode {
    /// The port.
    pub const PORT: u16 = 0x80;

    /// The last code.
    pub fn code(&self) -> u8 {
        self.0.load(Ordering::Relaxed)
    }
}

impl SharedDevice for PostCode {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xFF);
        if let [first, ..] = data {
            *first = self.code();
        }
    }

    fn write(&self, _: u64, data: &[u8]) {
        if let [code, ..] = data {
            self.0.store(*code, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_event_stands() {
        let signal = PowerSignal::new();
        assert_eq!(signal.get(), None);
        signal.raise(PowerEvent::Exit(0));
        signal.raise(PowerEvent::Reset);
        assert_eq!(signal.get(), Some(PowerEvent::Exit(0)));
        assert_eq!(signal.take(), Some(PowerEvent::Exit(0)));
        signal.raise(PowerEvent::PowerOff);
        assert_eq!(signal.take(), Some(PowerEvent::PowerOff));
        assert_eq!(signal.take(), None);
    }

    fn event_of(
        device: impl FnOnce(Arc<PowerSignal>) -> Arc<dyn SharedDevice>,
        at: u64,
        data: &[u8],
    ) -> Option<PowerEvent> {
        let power = Arc::new(PowerSignal::new());
        device(power.clone()).write(at, data);
        power.get()
    }

    #[test]
    fn the_status_is_what_was_written() {
        let exit = |at, data: &[u8]| event_of(|p| Arc::new(DebugExit::new(p)), at, data);
        assert_eq!(exit(0, &[7]), Some(PowerEvent::Exit(7)));
        assert_eq!(exit(0, &[1, 2]), Some(PowerEvent::Exit(0x201)));
        assert_eq!(
            exit(0, &[1, 2, 3, 0xFF]),
            Some(PowerEvent::Exit(0xFF03_0201))
        );
        assert_eq!(exit(1, &[7]), None);
    }

    #[test]
    fn only_the_reset_line_resets() {
        let command = |c| event_of(|p| Arc::new(KeyboardController::new(p)), 0, &[c]);
        assert_eq!(command(0xFE), Some(PowerEvent::Reset));
        assert_eq!(command(0xFF), None);
        assert_eq!(command(0xAA), None);
        let port92 = |v| event_of(|p| Arc::new(SystemControlA::new(p)), 0, &[v]);
        assert_eq!(port92(3), Some(PowerEvent::Reset));
        assert_eq!(port92(2), None);
    }

    #[test]
    fn absent_ports_float() {
        let power = Arc::new(PowerSignal::new());
        let mut data = [0; 2];
        KeyboardController::new(power.clone()).read(0, &mut data);
        assert_eq!(data, [0xFF; 2]);
        SystemControlA::new(power).read(0, &mut data);
        assert_eq!(data, [2, 0xFF]);
        let post = PostCode::default();
        post.write(0, &[0x5A]);
        post.read(0, &mut data);
        assert_eq!(data, [0x5A, 0xFF]);
    }
}
