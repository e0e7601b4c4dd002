//! The virtio console's other end: the machine's serial port.

use alloc::collections::VecDeque;
use alloc::sync::Arc;

use testudo_machine::virtio::DeviceHandle;
use testudo_rt::lock::Lock;
use testudo_virtio::device::ConsolePort;

use crate::output::Output;

/// Characters that wait until the guest takes them; later ones are lost.
const WAITING: usize = 4096;

/// What was typed and not taken yet.
type Typed = Arc<Lock<VecDeque<u8>>>;

/// The end of the serial port.
pub(crate) struct Terminal {
    output: Output,
    typed: Typed,
}

impl ConsolePort for Terminal {
    fn write(&mut self, data: &[u8]) {
        for byte in data {
            self.output.put(*byte);
        }
    }

    fn read(&mut self, buf: &mut [u8]) -> usize {
        let mut typed = self.typed.lock();
        let len = buf.len().min(typed.len());
        for (to, from) in buf.iter_mut().zip(typed.drain(..len)) {
            *to = from;
        }
        len
    }
}

/// Where what is typed goes.
pub(crate) struct Keyboard {
    typed: Typed,
    device: DeviceHandle,
}

impl Keyboard {
    /// Passes a character on; called by an interrupt.
    pub(crate) fn press(&self, byte: u8) {
        let mut typed = self.typed.lock();
        if typed.len() < WAITING {
            typed.push_back(byte);
        }
        drop(typed);
        self.device.wake();
    }
}

/// A terminal, and how to give it its keyboard once its device has a place.
pub(crate) fn terminal(output: Output) -> (Terminal, impl FnOnce(DeviceHandle) -> Keyboard) {
    let typed = Arc::new(Lock::new(VecDeque::with_capacity(WAITING)));
    let other = typed.clone();
    let keyboard = |device| Keyboard {
        typed: other,
        device,
    };
    (Terminal { output, typed }, keyboard)
}
