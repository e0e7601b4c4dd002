//! MSI-X: one message for each source of interrupts (PCI 3.0, 6.8.2).

use alloc::vec;
use alloc::vec::Vec;

use testudo_arch::irq::{InterruptSink, Msi};

/// Message control: the function has been told to use MSI-X; all vectors are masked.
const ENABLE: u16 = 1 << 15;
const FUNCTION_MASK: u16 = 1 << 14;
/// The bits of message control that software may change.
pub(super) const CONTROL_WRITABLE: u16 = ENABLE | FUNCTION_MASK;

/// Vector control: this vector is masked.
const MASKED: u32 = 1;

#[derive(Clone, Copy, Debug)]
struct Entry {
    /// Address (low, high), data, vector control.
    words: [u32; 4],
}

/// The table and the pending bits.
#[derive(Debug)]
pub(super) struct Msix {
    entries: Vec<Entry>,
    pending: Vec<u64>,
    control: u16,
}

impl Msix {
    /// A table of `vectors` entries, all masked, as after reset.
    pub(super) fn new(vectors: u16) -> Self {
        let entry = Entry {
            words: [0, 0, 0, MASKED],
        };
        Self {
            entries: vec![entry; usize::from(vectors)],
            pending: vec![0; usize::from(vectors).div_ceil(64)],
            control: 0,
        }
    }

    pub(super) fn vectors(&self) -> u16 {
        self.entries.len() as u16
    }

    pub(super) fn enabled(&self) -> bool {
        self.control & ENABLE != 0
    }

    /// Takes message control as software left it.
    pub(super) fn set_control(&mut self, control: u16, sink: &dyn InterruptSink) {
        self.control = control;
        self.deliver_pending(sink);
    }

    /// Sends the message of a vector, or remembers it while it is masked.
    pub(super) fn fire(&mut self, vector: u16, sink: &dyn InterruptSink) {
        let index = usize::from(vector);
        let Some(entry) = self.entries.get(index) else {
            return;
        };
        let masked = self.control & FUNCTION_MASK != 0 || entry.words[3] & MASKED != 0;
        if masked {
            self.pending[index / 64] |= 1 << (index % 64);
        } else {
            let [low, high, data, _] = entry.words;
            sink.send_msi(Msi {
                address: u64::from(low) | (u64::from(high) << 32),
                data,
            });
        }
    }

    fn deliver_pending(&mut self, sink: &dyn InterruptSink) {
        if self.control & (ENABLE | FUNCTION_MASK) != ENABLE {
            return;
        }
        for index in 0..self.entries.len() {
            let bit = 1 << (index % 64);
            if self.pending[index / 64] & bit != 0 && self.entries[index].words[3] & MASKED == 0 {
                self.pending[index / 64] &= !bit;
                self.fire(index as u16, sink);
            }
        }
    }

    /// Reads one aligned word of the table.
    pub(super) fn read_table(&self, offset: u64) -> u32 {
        let entry = self.entries.get((offset / 16) as usize);
        entry.map_or(0, |entry| entry.words[(offset / 4 % 4) as usize])
    }

    /// Writes one aligned word of the table.
    pub(super) fn write_table(&mut self, offset: u64, value: u32, sink: &dyn InterruptSink) {
        if let Some(entry) = self.entries.get_mut((offset / 16) as usize) {
            let word = (offset / 4 % 4) as usize;
            // The lowest two bits of an address, and all of the control but the mask, are zero.
            entry.words[word] = match word {
                0 => value & !3,
                3 => value & MASKED,
                _ => value,
            };
            self.deliver_pending(sink);
        }
    }

    /// Reads one aligned word of the pending bits.
    pub(super) fn read_pending(&self, offset: u64) -> u32 {
        let word = self.pending.get((offset / 8) as usize).copied();
        (word.unwrap_or(0) >> (offset % 8 * 8)) as u32
    }
}
