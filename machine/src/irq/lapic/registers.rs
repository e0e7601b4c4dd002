//! The registers of a local APIC and their memory-mapped form (SDM vol. 3A, table 11-1).

use super::timer::TimerMode;
use super::{ApicMode, LVT_ENTRIES, LVT_MASKED, Lapic, Lvt, error, spurious};
use crate::irq::port::x2apic_logical;

/// The registers by their offset in the page, which is 16 times their distance from MSR 0x800.
pub(super) mod register {
    pub(in super::super) const ID: u16 = 0x020;
    pub(in super::super) const VERSION: u16 = 0x030;
    pub(in super::super) const TPR: u16 = 0x080;
    pub(in super::super) const APR: u16 = 0x090;
    pub(in super::super) const PPR: u16 = 0x0A0;
    pub(in super::super) const EOI: u16 = 0x0B0;
    pub(in super::super) const REMOTE_READ: u16 = 0x0C0;
    pub(in super::super) const LDR: u16 = 0x0D0;
    pub(in super::super) const DFR: u16 = 0x0E0;
    pub(in super::super) const SPURIOUS: u16 = 0x0F0;
    pub(in super::super) const ISR: u16 = 0x100;
    pub(in super::super) const IRR: u16 = 0x200;
    pub(in super::super) const IRR_LAST: u16 = 0x270;
    pub(in super::super) const ESR: u16 = 0x280;
    pub(in super::super) const ICR: u16 = 0x300;
    pub(in super::super) const ICR_HIGH: u16 = 0x310;
    pub(in super::super) const LVT_TIMER: u16 = 0x320;
    pub(in super::super) const LVT_THERMAL: u16 = 0x330;
    pub(in super::super) const LVT_ERROR: u16 = 0x370;
    pub(in super::super) const INITIAL_COUNT: u16 = 0x380;
    pub(in super::super) const CURRENT_COUNT: u16 = 0x390;
    pub(in super::super) const DIVIDE: u16 = 0x3E0;
    pub(in super::super) const SELF_IPI: u16 = 0x3F0;

    /// An entry of the local vector table, of which there are
    /// [`LVT_ENTRIES`](super::super::LVT_ENTRIES).
    #[inline]
    pub(in super::super) const fn lvt(index: usize) -> u16 {
        LVT_TIMER + ((index as u16 & 7) << 4)
    }
}
use register::*;

/// An integrated APIC with six entries in its table that can suppress EOI broadcasts.
const VERSION_VALUE: u32 = 0x14 | (LVT_ENTRIES as u32 - 1) << 16 | 1 << 24;

/// What a guest may write into each entry of the local vector table (SDM vol. 3A, figure 11-8).
const LVT_WRITABLE: [u32; LVT_ENTRIES] = [
    0x0007_00FF,
    0x0001_07FF,
    0x0001_07FF,
    0x0001_A7FF,
    0x0001_A7FF,
    0x0001_00FF,
];
/// Delivery status and remote IRR of an entry: written with any value, and kept.
const LVT_READ_ONLY: u32 = 1 << 12 | 1 << 14;

/// What a guest may write into the low half of the interrupt command register.
pub(super) const ICR_WRITABLE: u32 = 0x000C_CFFF;
/// Delivery status: an IPI is always sent at once, so it reads zero.
pub(super) const ICR_STATUS: u32 = 1 << 12;

const SPURIOUS_WRITABLE: u32 = 0x11FF;

impl Lapic {
    /// The bits of a register that x2APIC mode lets a guest write.
    pub(super) fn writable(&self, register: u16) -> u32 {
        match register {
            TPR => 0xFF,
            SPURIOUS => SPURIOUS_WRITABLE,
            LVT_TIMER..=LVT_ERROR => {
                self.lvt_writable(usize::from(register - LVT_TIMER) >> 4) | LVT_READ_ONLY
            }
            INITIAL_COUNT => u32::MAX,
            DIVIDE => 0xB,
            SELF_IPI => 0xFF,
            // EOI and ESR take zero alone.
            _ => 0,
        }
    }

    fn lvt_writable(&self, index: usize) -> u32 {
        let deadline_mode = 1 << 18;
        match LVT_WRITABLE.get(index) {
            Some(bits) if index == 0 && !self.features.tsc_deadline => bits & !deadline_mode,
            Some(bits) => *bits,
            None => 0,
        }
    }

    /// The value of the register at `register` (a multiple of 16), or `None` if there is none.
    #[inline]
    pub(super) fn read_register(&mut self, register: u16) -> Option<u32> {
        Some(match register {
            APR | REMOTE_READ | EOI => 0,
            PPR => u32::from(self.ppr()),
            IRR..=IRR_LAST => {
                self.sync();
                self.page.get(register)
            }
            CURRENT_COUNT => {
                let now = self.chip.host().now();
                self.poll_timer(now);
                self.timer.count(now)
            }
            ID | VERSION | TPR | LDR | DFR | SPURIOUS | ESR | ICR | ICR_HIGH => {
                self.page.get(register)
            }
            ISR..IRR | LVT_TIMER..=LVT_ERROR | INITIAL_COUNT | DIVIDE => self.page.get(register),
            _ => return None,
        })
    }

    /// Brings those registers in the page up to date that follow from something else.
    pub(super) fn show(&self) {
        let x2apic = self.mode() == ApicMode::X2Apic;
        let (id, ldr) = if x2apic {
            (self.id(), x2apic_logical(self.id()))
        } else {
            (self.id() << 24, u32::from(self.logical) << 24)
        };
        let dfr = if self.cluster { 0x0FFF_FFFF } else { u32::MAX };
        for (register, value) in [
            (ID, id),
            (VERSION, VERSION_VALUE),
            (LDR, ldr),
            (DFR, dfr),
            (INITIAL_COUNT, self.timer.initial),
            (DIVIDE, self.timer.divide),
        ] {
            self.page.set(register, value);
        }
    }

    /// The interrupt command register.
    #[inline]
    pub(super) fn icr(&self) -> u64 {
        u64::from(self.page.get(ICR)) | u64::from(self.page.get(ICR_HIGH)) << 32
    }

    #[inline]
    pub(super) fn set_icr(&self, value: u64) {
        self.page.set(ICR, value as u32);
        self.page.set(ICR_HIGH, (value >> 32) as u32);
    }

    /// Writes a register at `register` (a multiple of 16); bits that are not writable are
    /// ignored. False if there is none.
    #[inline]
    pub(super) fn write_register(&mut self, register: u16, value: u32) -> bool {
        match register {
            TPR => self.page.set(TPR, value & 0xFF),
            EOI => self.end_of_interrupt(),
            LDR => {
                self.logical = (value >> 24) as u8;
                self.publish();
            }
            DFR => {
                self.cluster = value >> 28 == 0;
                self.publish();
            }
            SPURIOUS => self.write_spurious(value),
            ESR => self.page.set(ESR, core::mem::take(&mut self.errors)),
            ICR => {
                self.page.set(ICR, value & ICR_WRITABLE);
                self.send_ipi(self.icr());
            }
            ICR_HIGH => self.page.set(ICR_HIGH, value & 0xFF00_0000),
            LVT_TIMER => self.write_timer_entry(value),
            LVT_THERMAL..=LVT_ERROR => {
                self.write_lvt(usize::from(register - LVT_TIMER) >> 4, value);
            }
            INITIAL_COUNT => {
                let now = self.chip.host().now();
                self.timer.start(value, now);
                self.page.set(INITIAL_COUNT, self.timer.initial);
            }
            DIVIDE => {
                let now = self.chip.host().now();
                self.poll_timer(now);
                self.timer.set_divide(value, now);
                self.page.set(DIVIDE, self.timer.divide);
            }
            // Read-only.
            ID | VERSION | APR | PPR | REMOTE_READ | ISR..=IRR_LAST | CURRENT_COUNT => {}
            _ => return false,
        }
        true
    }

    fn write_lvt(&self, index: usize, value: u32) {
        let mut entry = value & self.lvt_writable(index);
        // "When a local APIC is software disabled, the mask bits of all LVT entries are set and
        // attempts to reset them are ignored" (SDM vol. 3A, 11.4.7.2, in substance). The PIC's way
        // through LINT0 is no interrupt of the APIC's.
        if self.spurious() & spurious::ENABLED == 0 {
            entry |= LVT_MASKED;
        }
        if index < LVT_ENTRIES {
            self.page.set(lvt(index), entry);
        }
    }

    fn write_timer_entry(&mut self, value: u32) {
        let now = self.chip.host().now();
        // What expired before belongs to the old entry.
        self.poll_timer(now);
        self.write_lvt(Lvt::Timer as usize, value);
        self.timer
            .set_mode(TimerMode::from_lvt(self.lvt(Lvt::Timer)));
    }

    fn write_spurious(&mut self, value: u32) {
        self.page.set(SPURIOUS, value & SPURIOUS_WRITABLE);
        if value & spurious::ENABLED == 0 {
            for entry in 0..LVT_ENTRIES {
                let masked = self.page.get(lvt(entry)) | LVT_MASKED;
                self.page.set(lvt(entry), masked);
            }
        }
        self.publish();
    }

    /// Does what the guest's write to a register does, which the processor has already put into the
    /// page.
    pub fn written(&mut self, register: u16) {
        let register = register & 0xFF0;
        let value = self.page.get(register);
        if self.mode() == ApicMode::X2Apic {
            // The one such write in this mode: a vector that is illegal.
            if register == SELF_IPI {
                self.send_self_ipi(value);
            }
            return;
        }
        self.write_mmio(register.into(), &value.to_le_bytes());
        self.show();
    }

    /// Reads from the register page at `offset`.
    ///
    /// Registers are 32 bits at multiples of 16. An access inside the 32 bits reads that part of
    /// them; what else the manual leaves undefined reads zero (SDM vol. 3A, 11.4.1.2).
    #[inline]
    pub fn read_mmio(&mut self, offset: u64, data: &mut [u8]) {
        let register = (offset & 0xFF0) as u16;
        let value = self.read_register(register).unwrap_or_else(|| {
            self.report(error::ILLEGAL_REGISTER);
            0
        });
        let bytes = u64::from(value)
            .checked_shr((offset & 0xF) as u32 * 8)
            .unwrap_or(0)
            .to_le_bytes();
        data.fill(0);
        for (to, from) in data.iter_mut().zip(bytes) {
            *to = from;
        }
    }

    /// Writes to the register page at `offset`. Anything but 32 bits at a multiple of 16, which
    /// the manual leaves undefined, is ignored.
    #[inline]
    pub fn write_mmio(&mut self, offset: u64, data: &[u8]) {
        let (&[a, b, c, d], 0) = (data, offset & 0xF) else {
            return;
        };
        let value = u32::from_le_bytes([a, b, c, d]);
        if !self.write_register((offset & 0xFF0) as u16, value) {
            self.report(error::ILLEGAL_REGISTER);
        }
    }
}
