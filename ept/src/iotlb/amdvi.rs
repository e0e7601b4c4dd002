//! The command buffer of AMD's IOMMUs (AMD I/O virtualization technology specification 3.08, 2.4).

use testudo_arch::Hpa;

use super::{Command, IotlbError, Kind, Registers, Scope};

/// Command buffer base address register, with the length.
const BASE: u32 = 0x08;
/// Extended feature register.
const FEATURES: u32 = 0x30;
/// Command buffer head and tail pointer registers.
const HEAD: u32 = 0x2000;
const TAIL: u32 = 0x2008;
/// IOMMU status register.
const STATUS: u32 = 0x2020;

/// CmdBufRun: it is clear while the unit takes no commands, as after one that it could not take.
const RUNS: u32 = 1 << 4;

/// Commands, in bits 63:60 of the low half.
const COMPLETION_WAIT: u64 = 1 << 60;
const INVALIDATE_IOMMU_PAGES: u64 = 3 << 60;
const INVALIDATE_IOMMU_ALL: u64 = 8 << 60;

/// S: the address holds a size, too.
const SIZED: u64 = 1;
/// PDE: references to tables are forgotten as well.
const TABLES: u64 = 1 << 1;

/// What an AMD unit can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AmdVi {
    /// Whether INVALIDATE_IOMMU_ALL is there (IASup).
    all: bool,
}

/// The address field for a block of `1 << order` pages, without the bits below it: the first zero from bit 12
/// on is the highest bit inside the block. Too large a block becomes the whole address space.
fn sized(address: u64, order: u8) -> u64 {
    const ALL: u64 = 0x7FFF_FFFF_FFFF_F000;
    match order {
        0 => address & !0xFFF,
        // The highest bit inside is 12 + order - 1.
        1..=51 => {
            let top = 1u64 << (11 + order);
            (address & !(2 * top - 1) | (top - 1)) & !0xFFF | SIZED
        }
        _ => ALL | SIZED,
    }
}

impl Kind for AmdVi {
    const HEAD: u32 = HEAD;
    const TAIL: u32 = TAIL;

    fn of(registers: &impl Registers) -> (Self, u32) {
        let all = registers.read64(FEATURES) >> 6 & 1 != 0;
        // ComLen: 2^8 to 2^15 entries; other values are reserved.
        let length = (registers.read64(BASE) >> 56 & 0xF).max(8);
        (Self { all }, 1 << length)
    }

    fn failure(registers: &impl Registers) -> Option<IotlbError> {
        let status = registers.read32(STATUS);
        (status & RUNS == 0).then_some(IotlbError::Stopped(status))
    }

    /// INVALIDATE_IOMMU_PAGES (2.4.3), or INVALIDATE_IOMMU_ALL (2.4.8).
    fn forget(&self, scope: Scope) -> Result<Command, IotlbError> {
        let pages = |domain: u16| INVALIDATE_IOMMU_PAGES | u64::from(domain) << 32;
        match scope {
            Scope::Global if self.all => Ok([INVALIDATE_IOMMU_ALL, 0]),
            Scope::Global => Err(IotlbError::Unsupported),
            Scope::Domain(domain) => Ok([pages(domain), sized(0, 52) | TABLES]),
            Scope::Pages {
                domain,
                address,
                order,
                leaves_only,
            } => {
                let tables = if leaves_only { 0 } else { TABLES };
                Ok([pages(domain), sized(address, order) | tables])
            }
        }
    }

    /// COMPLETION_WAIT with a store (2.4.1).
    fn wait(address: Hpa, data: u32) -> Command {
        const STORE: u64 = 1;
        const ADDRESS: u64 = 0x000F_FFFF_FFFF_FFF8;
        [
            COMPLETION_WAIT | address.0 & ADDRESS | STORE,
            u64::from(data),
        ]
    }
}
