//! The pair of 8259A interrupt controllers (Intel 8259A data sheet, order number 231468; edge and
//! level control as in the PIIX chipsets).

use crate::layout;

/// Where an initialization sequence stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Init {
    Done,
    Icw2,
    Icw3,
    Icw4,
}

/// One 8259A.
#[derive(Clone, Debug)]
struct Pic {
    /// Interrupt requests: for edge inputs latched, for level inputs the line itself.
    irr: u8,
    isr: u8,
    imr: u8,
    lines: u8,
    /// Which inputs are level-triggered.
    elcr: u8,
    /// The input with the lowest priority; priorities fall from the next one on, cyclically.
    lowest: u8,
    base: u8,
    init: Init,
    single: bool,
    wants_icw4: bool,
    auto_eoi: bool,
    rotate_on_auto_eoi: bool,
    special_mask: bool,
    /// The input that another chip's output is wired to, as a set.
    slaves: u8,
    special_fully_nested: bool,
    read_isr: bool,
    poll: bool,
}

impl Pic {
    /// The state in which firmware leaves one: all inputs masked.
    const fn new(base: u8, slaves: u8) -> Self {
        Self {
            irr: 0,
            isr: 0,
            imr: 0xFF,
            lines: 0,
            elcr: 0,
            lowest: 7,
            base,
            init: Init::Done,
            single: false,
            wants_icw4: false,
            auto_eoi: false,
            rotate_on_auto_eoi: false,
            special_mask: false,
            slaves,
            special_fully_nested: false,
            read_isr: false,
            poll: false,
        }
    }

    /// Of the inputs in `set`, the one with the highest priority, with its rank (0 is highest).
    #[inline]
    fn first(&self, set: u8) -> Option<(u8, u8)> {
        let first = self.lowest.wrapping_add(1) & 7;
        let rank = set.rotate_right(u32::from(first)).trailing_zeros() as u8;
        (set != 0).then(|| (first.wrapping_add(rank) & 7, rank))
    }

    /// The input that would be acknowledged now.
    #[inline]
    fn pending(&self) -> Option<u8> {
        let (input, rank) = self.first(self.irr & !self.imr)?;
        // In special mask mode an input in service that is masked holds nobody back; in special
        // fully nested mode the slave's input does not hold the slave back.
        let mut holding = self.isr;
        if self.special_fully_nested {
            holding &= !self.slaves;
        }
        if self.special_mask {
            holding &= !self.imr;
        }
        let held = self
            .first(holding)
            .is_some_and(|(_, in_service)| rank >= in_service);
        (!held && self.init == Init::Done).then_some(input)
    }

    fn set_line(&mut self, input: u8, high: bool) {
        let bit = 1 << input;
        let rising = high && self.lines & bit == 0;
        self.lines = if high {
            self.lines | bit
        } else {
            self.lines & !bit
        };
        if self.elcr & bit != 0 {
            self.irr = self.irr & !bit | self.lines & bit;
        } else if rising {
            self.irr |= bit;
        }
    }

    /// The acknowledge cycle for `input`.
    fn acknowledge(&mut self, input: u8) {
        let bit = 1 << input;
        if self.elcr & bit == 0 {
            self.irr &= !bit;
        }
        if !self.auto_eoi {
            self.isr |= bit;
        } else if self.rotate_on_auto_eoi {
            self.lowest = input;
        }
    }

    fn vector(&self, input: u8) -> u8 {
        self.base | input
    }

    fn read(&mut self, data_port: bool) -> u8 {
        if core::mem::take(&mut self.poll) {
            return match self.pending() {
                Some(input) => {
                    self.acknowledge(input);
                    0x80 | input
                }
                None => 0,
            };
        }
        match (data_port, self.read_isr) {
            (true, _) => self.imr,
            (false, true) => self.isr,
            (false, false) => self.irr,
        }
    }

    fn write(&mut self, data_port: bool, value: u8) {
        match (data_port, self.init) {
            (true, Init::Done) => self.imr = value,
            (true, Init::Icw2) => {
                self.base = value & 0xF8;
                self.init = match (self.single, self.wants_icw4) {
                    (false, _) => Init::Icw3,
                    (true, true) => Init::Icw4,
                    (true, false) => Init::Done,
                };
            }
            // How the pair is wired is not the guest's to say.
            (true, Init::Icw3) => {
                self.init = if self.wants_icw4 {
                    Init::Icw4
                } else {
                    Init::Done
                };
            }
            (true, Init::Icw4) => {
                self.auto_eoi = value & 1 << 1 != 0;
                self.special_fully_nested = value & 1 << 4 != 0;
                self.init = Init::Done;
            }
            (false, _) if value & 1 << 4 != 0 => self.icw1(value),
            (false, _) if value & 1 << 3 != 0 => self.ocw3(value),
            (false, _) => self.ocw2(value),
        }
    }

    fn icw1(&mut self, value: u8) {
        *self = Self {
            irr: self.irr & self.elcr,
            imr: 0,
            lines: self.lines,
            elcr: self.elcr,
            init: Init::Icw2,
            single: value & 1 << 1 != 0,
            wants_icw4: value & 1 != 0,
            ..Self::new(self.base, self.slaves)
        };
    }

    fn ocw2(&mut self, value: u8) {
        let (specific, level) = (value & 1 << 6 != 0, value & 7);
        let (rotate, eoi) = (value & 1 << 7 != 0, value & 1 << 5 != 0);
        match (eoi, specific) {
            (true, true) => {
                self.isr &= !(1 << level);
                if rotate {
                    self.lowest = level;
                }
            }
            (true, false) => {
                let mask = if self.special_mask { self.imr } else { 0 };
                if let Some((input, _)) = self.first(self.isr & !mask) {
                    self.isr &= !(1 << input);
                    if rotate {
                        self.lowest = input;
                    }
                }
            }
            (false, true) if rotate => self.lowest = level,
            (false, true) => {}
            (false, false) => self.rotate_on_auto_eoi = rotate,
        }
    }

    fn ocw3(&mut self, value: u8) {
        self.poll = value & 1 << 2 != 0;
        if value & 1 << 1 != 0 {
            self.read_isr = value & 1 != 0;
        }
        if value & 1 << 6 != 0 {
            self.special_mask = value & 1 << 5 != 0;
        }
    }
}

/// The two 8259A of a PC: the second one's output is the first one's input 2.
#[derive(Clone, Debug)]
pub(super) struct PicPair {
    master: Pic,
    slave: Pic,
}

impl Default for PicPair {
    fn default() -> Self {
        Self::new()
    }
}

impl PicPair {
    /// The inputs of the slave that may be level-triggered; the others are fixed to edges.
    const ELCR_SLAVE: u8 = 0xDE;
    const ELCR_MASTER: u8 = 0xF8;
    const CASCADE: u8 = 2;

    /// The pair as firmware leaves it: all masked, vectors 0x08 and 0x70, and the SCI a level.
    pub(super) const fn new() -> Self {
        let mut slave = Pic::new(0x70, 0);
        slave.elcr = 1 << (layout::SCI_GSI - 8);
        Self {
            master: Pic::new(0x08, 1 << Self::CASCADE),
            slave,
        }
    }

    /// Drives input `irq`, 0 to 15; input 2 belongs to the cascade and is left alone.
    pub(super) fn set_line(&mut self, irq: u8, high: bool) {
        match irq {
            Self::CASCADE => {}
            0..8 => self.master.set_line(irq, high),
            8..16 => self.slave.set_line(irq - 8, high),
            _ => {}
        }
        self.cascade();
    }

    /// The master's input 2 follows the slave's output, whatever the edge control says.
    fn cascade(&mut self) {
        let bit = 1 << Self::CASCADE;
        if self.slave.pending().is_some() {
            self.master.irr |= bit;
        } else {
            self.master.irr &= !bit;
        }
    }

    /// The output: whether an interrupt waits for the processor.
    pub(super) fn output(&self) -> bool {
        self.master.pending().is_some()
    }

    /// The acknowledge cycle: the vector, or `None` when no interrupt waits any more.
    pub(super) fn acknowledge(&mut self) -> Option<u8> {
        let input = self.master.pending()?;
        self.master.acknowledge(input);
        let vector = if input != Self::CASCADE {
            self.master.vector(input)
        } else {
            match self.slave.pending() {
                Some(input) => {
                    self.slave.acknowledge(input);
                    self.slave.vector(input)
                }
                // As the chip does for a request that went away: input 7, not in service.
                None => self.slave.vector(7),
            }
        };
        self.cascade();
        Some(vector)
    }

    /// Reads a port of the master (0x20, 0x21) or the slave (0xA0, 0xA1).
    pub(super) fn read(&mut self, port: u16) -> u8 {
        let chip = if port & 0x80 != 0 {
            &mut self.slave
        } else {
            &mut self.master
        };
        let value = chip.read(port & 1 != 0);
        self.cascade();
        value
    }

    /// Writes a port of the master (0x20, 0x21) or the slave (0xA0, 0xA1).
    pub(super) fn write(&mut self, port: u16, value: u8) {
        let chip = if port & 0x80 != 0 {
            &mut self.slave
        } else {
            &mut self.master
        };
        chip.write(port & 1 != 0, value);
        self.cascade();
    }

    /// Reads an edge/level control register (0x4D0, 0x4D1).
    pub(super) fn read_elcr(&self, port: u16) -> u8 {
        if port & 1 != 0 {
            self.slave.elcr
        } else {
            self.master.elcr
        }
    }

    /// Writes an edge/level control register (0x4D0, 0x4D1). Inputs 0, 1, 2, 8 and 13 stay edges.
    pub(super) fn write_elcr(&mut self, port: u16, value: u8) {
        let (chip, mask) = if port & 1 != 0 {
            (&mut self.slave, Self::ELCR_SLAVE)
        } else {
            (&mut self.master, Self::ELCR_MASTER)
        };
        chip.elcr = value & mask;
        // Level inputs show their line; an edge input keeps only what it latched.
        chip.irr = chip.irr & !chip.elcr | chip.lines & chip.elcr;
        self.cascade();
    }
}

#[cfg(test)]
#[path = "pic_tests.rs"]
mod tests;
