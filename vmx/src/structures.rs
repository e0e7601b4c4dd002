//! The other structures in memory to which a VMCS points, in the processor's formats.
//!
//! ```
//! use testudo_vmx::structures::PostedInterrupts;
//!
//! let posted = PostedInterrupts::default();
//! assert!(posted.post(0x40)); // the first one needs a notification
//! assert!(!posted.post(0x41));
//! assert_eq!(posted.take()[1], 0b11);
//! ```

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use testudo_arch::{Gpa, Gva, Msr};

/// One entry of an MSR-load or MSR-store area (SDM vol. 3C, table 27-16).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(16))]
pub struct MsrEntry {
    index: u32,
    reserved: u32,
    value: u64,
}

impl MsrEntry {
    /// An entry.
    pub const fn new(msr: Msr, value: u64) -> Self {
        Self {
            index: msr.0,
            reserved: 0,
            value,
        }
    }

    /// The entry with these bytes.
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        let all = u128::from_le_bytes(bytes);
        Self {
            index: all as u32,
            reserved: (all >> 32) as u32,
            value: (all >> 64) as u64,
        }
    }

    /// The bytes.
    pub const fn to_bytes(self) -> [u8; 16] {
        let all = self.index as u128 | (self.reserved as u128) << 32 | (self.value as u128) << 64;
        all.to_le_bytes()
    }

    /// The MSR.
    #[inline]
    pub const fn msr(self) -> Msr {
        Msr(self.index)
    }

    /// The value to load, or the one that was stored.
    #[inline]
    pub const fn value(self) -> u64 {
        self.value
    }

    /// Bits 63:32 of the entry, which must be 0.
    #[inline]
    pub const fn reserved(self) -> u32 {
        self.reserved
    }

    /// Whether a VM entry refuses to load the MSR, whatever the value (29.4).
    #[inline]
    pub const fn load_on_entry_is_refused(self) -> bool {
        self.reserved != 0
            || matches!(self.index, 0xC000_0100 | 0xC000_0101 | 0x800..=0x8FF)
            || matches!(self.msr(), Msr::SMM_MONITOR_CTL)
    }
}

const _: () = assert!(size_of::<MsrEntry>() == 16);

/// A posted-interrupt descriptor (table 32-1): software posts interrupts here, and the processor
/// takes them when the notification vector arrives.
#[derive(Debug, Default)]
#[repr(C, align(64))]
pub struct PostedInterrupts {
    requests: [AtomicU64; 4],
    control: AtomicU64,
    reserved: [AtomicU32; 6],
}

const _: () = assert!(size_of::<PostedInterrupts>() == 64);

const OUTSTANDING: u64 = 1 << 0;
const SUPPRESS: u64 = 1 << 1;

impl PostedInterrupts {
    /// Posts an interrupt. `true` if a notification must be sent: none was outstanding, and
    /// notifications are not suppressed.
    #[inline]
    pub fn post(&self, vector: u8) -> bool {
        let word = &self.requests[usize::from(vector / 64)];
        word.fetch_or(1 << (vector % 64), Ordering::AcqRel);
        let before = self.control.load(Ordering::Acquire);
        if before & (OUTSTANDING | SUPPRESS) != 0 {
            return false;
        }
        self.control.fetch_or(OUTSTANDING, Ordering::AcqRel) & OUTSTANDING == 0
    }

    /// Takes all posted requests, as the processor does for a notification: the outstanding bit is
    /// cleared first, so that a request posted meanwhile is notified again.
    pub fn take(&self) -> [u64; 4] {
        self.control.fetch_and(!OUTSTANDING, Ordering::AcqRel);
        core::array::from_fn(|i| self.requests[i].swap(0, Ordering::AcqRel))
    }

    /// Whether anything is posted.
    pub fn is_empty(&self) -> bool {
        self.requests
            .iter()
            .all(|word| word.load(Ordering::Acquire) == 0)
    }

    /// Suppresses notifications, while the guest does not run anyway, or stops suppressing them.
    pub fn suppress(&self, suppress: bool) {
        if suppress {
            self.control.fetch_or(SUPPRESS, Ordering::AcqRel);
        } else {
            self.control.fetch_and(!SUPPRESS, Ordering::AcqRel);
        }
    }

    /// Sets the vector and the processor (its x2APIC identifier) that IOMMUs and IPI virtualization
    /// notify.
    pub fn set_notification(&self, vector: u8, apic_id: u32) {
        let target = u64::from(vector) << 16 | u64::from(apic_id) << 32;
        let mut old = self.control.load(Ordering::Acquire);
        while let Err(now) = self.control.compare_exchange_weak(
            old,
            (old & 0xFFFF) | target,
            Ordering::AcqRel,
            Ordering::Acquire,
        ) {
            old = now;
        }
    }
}

/// The page-modification log (31.3.6): guest-physical addresses that became dirty, written from the
/// last entry to the first.
#[derive(Clone, Debug, PartialEq, Eq)]
#[repr(C, align(4096))]
pub struct PmlBuffer([u64; PmlBuffer::ENTRIES]);

impl PmlBuffer {
    /// The number of entries.
    pub const ENTRIES: usize = 512;
    /// What [`PML_INDEX`](crate::fields::PML_INDEX) is when the log is empty.
    pub const EMPTY_INDEX: u16 = 511;

    /// An empty log.
    pub const fn new() -> Self {
        Self([0; Self::ENTRIES])
    }

    /// The logged addresses, oldest first, when the PML index is `index`: the processor decrements
    /// it after each write, and a full log has 0xFFFF.
    pub fn logged(&self, index: u16) -> impl Iterator<Item = Gpa> + '_ {
        let first = usize::from(index.wrapping_add(1)).min(Self::ENTRIES);
        self.0[first..]
            .iter()
            .rev()
            .map(|&entry| Gpa(entry & !0xFFF))
    }
}

impl Default for PmlBuffer {
    fn default() -> Self {
        Self::new()
    }
}

/// The virtualization-exception information area (table 28-1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(4096))]
pub struct VeInformation {
    reason: u32,
    busy: u32,
    qualification: u64,
    linear: u64,
    physical: u64,
    eptp_index: u16,
}

const _: () = assert!(core::mem::offset_of!(VeInformation, eptp_index) == 32);

impl VeInformation {
    /// Whether the guest has not yet dealt with the last #VE; another EPT violation then exits.
    pub const fn is_busy(&self) -> bool {
        self.busy != 0
    }

    /// What the EPT violation would have told the hypervisor: the exit qualification, the linear and
    /// the guest-physical address, and the EPTP index.
    pub const fn violation(&self) -> (u64, Gva, Gpa, u16) {
        (
            self.qualification,
            Gva(self.linear),
            Gpa(self.physical),
            self.eptp_index,
        )
    }

    /// Records an EPT violation (exit reason 48) as the processor does, and marks the area busy.
    pub const fn record(&mut self, qualification: u64, linear: Gva, gpa: Gpa, eptp_index: u16) {
        *self = Self {
            reason: 48,
            busy: u32::MAX,
            qualification,
            linear: linear.0,
            physical: gpa.0,
            eptp_index,
        };
    }
}

/// The list of EPT pointers from which VM function 0 chooses (28.5.7.3).
#[derive(Clone, Debug, PartialEq, Eq)]
#[repr(C, align(4096))]
pub struct EptpList(pub [u64; 512]);

impl Default for EptpList {
    fn default() -> Self {
        Self([0; 512])
    }
}

/// The virtual-APIC page: the registers of a virtual local APIC, which the processor itself reads and
/// writes as far as the controls say (32.1).
pub use testudo_arch::apic::ApicPage as VirtualApicPage;

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    #[test]
    fn msr_entries_round_trip() {
        let entry = MsrEntry::new(Msr::STAR, 0x0123_4567_89AB_CDEF);
        assert_eq!(MsrEntry::from_bytes(entry.to_bytes()), entry);
        assert_eq!(entry.to_bytes()[..4], [0x81, 0, 0, 0xC0]);
        assert_eq!(entry.to_bytes()[8], 0xEF);
        assert!(!entry.load_on_entry_is_refused());
        assert!(MsrEntry::new(Msr::FS_BASE, 0).load_on_entry_is_refused());
        assert!(MsrEntry::new(Msr::X2APIC_TPR, 0).load_on_entry_is_refused());
    }

    #[test]
    fn only_the_first_post_notifies() {
        let posted = PostedInterrupts::default();
        assert!(posted.post(0x40) && !posted.post(0xFF));
        assert_eq!(posted.take(), [0, 1, 0, 1 << 63]);
        assert!(posted.is_empty());
        posted.suppress(true);
        assert!(!posted.post(1));
        posted.suppress(false);
        posted.set_notification(0xF2, 0x1234);
        assert!(posted.post(2));
        let control = posted.control.load(Ordering::Relaxed);
        assert_eq!(control, 0x0000_1234_00F2_0001);
    }

    #[test]
    fn the_log_is_read_oldest_first() {
        let mut buffer = PmlBuffer::new();
        buffer.0[511] = 0x1000;
        buffer.0[510] = 0x2FFF;
        let logged: Vec<_> = buffer.logged(509).collect();
        assert_eq!(logged, [Gpa(0x1000), Gpa(0x2000)]);
        assert_eq!(buffer.logged(PmlBuffer::EMPTY_INDEX).count(), 0);
        assert_eq!(buffer.logged(0xFFFF).count(), 512);
        assert_eq!(buffer.logged(0x8000).count(), 0);
    }
}
