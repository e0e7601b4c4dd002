//! The invalidation queue of Intel's VT-d (VT-d specification 4.1, 6.5.2).

use testudo_arch::Hpa;

use super::{Command, IotlbError, Kind, Registers, Scope};

/// The registers CAP_REG, FSTS_REG, IQH_REG, IQT_REG and IQA_REG (chapter 11).
const CAP: u32 = 0x08;
const FSTS: u32 = 0x34;
const IQH: u32 = 0x80;
const IQT: u32 = 0x88;
const IQA: u32 = 0x90;

/// FSTS_REG: a descriptor that the unit could not take (IQE), a device TLB that answered with an error
/// (ICE) or not in time (ITE). The unit fetches nothing while one of them is set.
const ERRORS: u32 = 0x70;

/// Types of descriptors.
const IOTLB: u64 = 2;
const WAIT: u64 = 5;

/// What an Intel unit can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vtd {
    /// The largest order that a page-selective invalidation takes (CAP.MAMV); `None` if there are none
    /// (CAP.PSI).
    largest: Option<u8>,
    /// The bits that make it drain reads and writes, if it can (CAP.DRD and CAP.DWD).
    drain: u64,
}

impl Kind for Vtd {
    const HEAD: u32 = IQH;
    const TAIL: u32 = IQT;

    fn of(registers: &impl Registers) -> (Self, u32) {
        let cap = registers.read64(CAP);
        let bit = |at: u32| cap >> at & 1;
        let kind = Self {
            largest: (bit(39) != 0).then_some((cap >> 48) as u8 & 0x3F),
            drain: bit(55) << 7 | bit(54) << 6,
        };
        // IQA.QS: each step doubles the 256 descriptors of one page.
        (kind, 256 << (registers.read64(IQA) & 7))
    }

    fn failure(registers: &impl Registers) -> Option<IotlbError> {
        let status = registers.read32(FSTS);
        (status & ERRORS != 0).then_some(IotlbError::Stopped(status))
    }

    /// An IOTLB invalidate descriptor (6.5.2.3). A block that is too large for one becomes its domain.
    fn forget(&self, scope: Scope) -> Result<Command, IotlbError> {
        let base = IOTLB | self.drain;
        Ok(match scope {
            Scope::Global => [base | 1 << 4, 0],
            Scope::Pages {
                domain,
                address,
                order,
                leaves_only,
            } if self.largest.is_some_and(|largest| order <= largest) => [
                base | 3 << 4 | u64::from(domain) << 16,
                // IH: only leaf entries have changed.
                address & !0xFFF | u64::from(leaves_only) << 6 | u64::from(order),
            ],
            Scope::Domain(domain) | Scope::Pages { domain, .. } => {
                [base | 2 << 4 | u64::from(domain) << 16, 0]
            }
        })
    }

    /// An invalidation wait descriptor with a status write (6.5.2.8).
    fn wait(address: Hpa, data: u32) -> Command {
        const STATUS_WRITE: u64 = 1 << 5;
        [WAIT | STATUS_WRITE | u64::from(data) << 32, address.0 & !3]
    }
}
