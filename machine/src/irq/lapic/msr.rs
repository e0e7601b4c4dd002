//! The registers of a local APIC as MSRs: IA32_APIC_BASE, IA32_TSC_DEADLINE and x2APIC mode
//! (SDM vol. 3A, 11.12).

use testudo_arch::Msr;

use super::registers::{ICR_STATUS, ICR_WRITABLE, register};
use super::{ApicMode, Lapic, base};

/// An access to a local APIC's MSRs that the processor answers with #GP(0).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ApicMsrError {
    /// The MSR does not exist in this mode.
    #[error("MSR {0:?} does not exist in the local APIC's mode")]
    Missing(Msr),
    /// The MSR can only be written.
    #[error("MSR {0:?} cannot be read")]
    WriteOnly(Msr),
    /// The MSR can only be read.
    #[error("MSR {0:?} cannot be written")]
    ReadOnly(Msr),
    /// The value has reserved bits set.
    #[error("the value {value:#x} has reserved bits of MSR {msr:?} set")]
    Reserved {
        /// The MSR.
        msr: Msr,
        /// The value.
        value: u64,
    },
    /// IA32_APIC_BASE does not allow this change of mode.
    #[error("IA32_APIC_BASE cannot change from {from:#x} to {to:#x}")]
    Transition {
        /// What it holds.
        from: u64,
        /// What was written.
        to: u64,
    },
}

const X2APIC_FIRST: u32 = 0x800;
const X2APIC_LAST: u32 = 0x8FF;

impl Lapic {
    /// Whether an MSR is one of a local APIC's, in whatever mode.
    #[inline]
    pub const fn owns_msr(msr: Msr) -> bool {
        matches!(msr.0, X2APIC_FIRST..=X2APIC_LAST)
            || msr.0 == Msr::APIC_BASE.0
            || msr.0 == Msr::TSC_DEADLINE.0
    }

    /// IA32_APIC_BASE.
    pub fn apic_base(&self) -> u64 {
        self.base
    }

    /// Reads an MSR of the local APIC's.
    ///
    /// # Errors
    ///
    /// Each is a #GP(0) for the guest.
    #[inline]
    pub fn read_msr(&mut self, msr: Msr) -> Result<u64, ApicMsrError> {
        match msr {
            Msr::APIC_BASE => Ok(self.base),
            Msr::TSC_DEADLINE if self.features.tsc_deadline => {
                let now = self.chip.host().now();
                self.poll_timer(now);
                Ok(self.timer.tsc_deadline)
            }
            _ => self.read_x2apic(msr),
        }
    }

    fn register_of(&self, msr: Msr) -> Result<u16, ApicMsrError> {
        match msr.0 {
            X2APIC_FIRST..=X2APIC_LAST if self.mode() == ApicMode::X2Apic => {
                Ok(((msr.0 - X2APIC_FIRST) << 4) as u16)
            }
            _ => Err(ApicMsrError::Missing(msr)),
        }
    }

    fn read_x2apic(&mut self, msr: Msr) -> Result<u64, ApicMsrError> {
        match self.register_of(msr)? {
            register::ICR => Ok(self.icr()),
            register::EOI | register::SELF_IPI => Err(ApicMsrError::WriteOnly(msr)),
            register::APR | register::REMOTE_READ | register::DFR | register::ICR_HIGH => {
                Err(ApicMsrError::Missing(msr))
            }
            register => self
                .read_register(register)
                .map(u64::from)
                .ok_or(ApicMsrError::Missing(msr)),
        }
    }

    /// Writes an MSR of the local APIC's. `guest_tsc` gives what the guest's TSC reads now; it is
    /// asked for IA32_TSC_DEADLINE only.
    ///
    /// # Errors
    ///
    /// Each is a #GP(0) for the guest; nothing changed then.
    #[inline]
    pub fn write_msr(
        &mut self,
        msr: Msr,
        value: u64,
        guest_tsc: impl FnOnce() -> u64,
    ) -> Result<(), ApicMsrError> {
        match msr {
            Msr::APIC_BASE => self.set_apic_base(value),
            Msr::TSC_DEADLINE if self.features.tsc_deadline => {
                self.arm_tsc_deadline(value, guest_tsc());
                Ok(())
            }
            _ => self.write_x2apic(msr, value),
        }
    }

    fn write_x2apic(&mut self, msr: Msr, value: u64) -> Result<(), ApicMsrError> {
        use register::*;
        let register = self.register_of(msr)?;
        let reserved = Err(ApicMsrError::Reserved { msr, value });
        let low = value as u32;
        match register {
            ICR => {
                if low & !(ICR_WRITABLE | ICR_STATUS) != 0 {
                    return reserved;
                }
                self.set_icr(value & !u64::from(ICR_STATUS));
                self.send_ipi(self.icr());
            }
            ID | VERSION | PPR | LDR | ISR..=IRR_LAST | CURRENT_COUNT => {
                return Err(ApicMsrError::ReadOnly(msr));
            }
            TPR
            | EOI
            | SPURIOUS
            | ESR
            | LVT_TIMER..=LVT_ERROR
            | INITIAL_COUNT
            | DIVIDE
            | SELF_IPI => {
                if value & !u64::from(self.writable(register)) != 0 {
                    return reserved;
                }
                if register == SELF_IPI {
                    self.send_self_ipi(low);
                } else {
                    self.write_register(register, low);
                }
            }
            _ => return Err(ApicMsrError::Missing(msr)),
        }
        Ok(())
    }

    /// Writes IA32_APIC_BASE. The transitions between disabled, xAPIC and x2APIC mode are those of
    /// SDM vol. 3A, figure 11-27; the way from x2APIC to xAPIC leads through disabled.
    fn set_apic_base(&mut self, value: u64) -> Result<(), ApicMsrError> {
        let mut writable = base::BSP | base::ENABLED | self.address_mask();
        if self.features.x2apic {
            writable |= base::X2APIC;
        }
        if value & !writable != 0 {
            return Err(ApicMsrError::Reserved {
                msr: Msr::APIC_BASE,
                value,
            });
        }
        let modes = base::ENABLED | base::X2APIC;
        let allowed = match (self.base & modes, value & modes) {
            (_, base::X2APIC) => false,
            (base::ENABLED, _) | (_, 0) => true,
            (0, new) => new == base::ENABLED,
            (_, new) => new == modes,
        };
        if !allowed {
            return Err(ApicMsrError::Transition {
                from: self.base,
                to: value,
            });
        }
        let was = self.mode();
        self.base = value;
        match (was, self.mode()) {
            // A disabled local APIC loses its state (SDM vol. 3A, 11.4.3).
            (ApicMode::XApic | ApicMode::X2Apic, ApicMode::Disabled) => self.init(),
            // The destination half of the command register has another format.
            (ApicMode::XApic, ApicMode::X2Apic) => {
                self.set_icr(self.icr() & 0xFFFF_FFFF);
                self.publish();
            }
            _ => self.publish(),
        }
        Ok(())
    }

    fn address_mask(&self) -> u64 {
        let bits = u32::from(self.features.address_bits.clamp(32, 52));
        ((1 << bits) - 1) & !0xFFF
    }
}
