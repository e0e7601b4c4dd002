//! The extended state of a processor in memory: x87, SSE, AVX and what came after (Intel SDM vol. 1,
//! 13.4; AMD APM vol. 2, 11.5.2).

use crate::cpuid::Cpuid;

/// Memory for XSAVE in its standard format.
#[derive(Clone, Debug, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct XsaveArea([u8; XsaveArea::SIZE]);

impl XsaveArea {
    /// Enough for x87, SSE, AVX, MPX, AVX-512 and PKRU: 2,696 bytes on processors that have them all.
    pub const SIZE: usize = 4096;

    /// The image of a processor after reset: every component in its initial state.
    pub const INITIAL: Self = {
        let mut bytes = [0; Self::SIZE];
        // FCW and MXCSR, which FXRSTOR loads; XRSTOR takes the initial state from the clear
        // XSTATE_BV, and MXCSR from here.
        [bytes[0], bytes[1]] = 0x037F_u16.to_le_bytes();
        [bytes[24], bytes[25]] = 0x1F80_u16.to_le_bytes();
        Self(bytes)
    };

    /// The bytes, in the layout of the standard format.
    pub fn bytes(&self) -> &[u8; Self::SIZE] {
        &self.0
    }

    /// The bytes, to be replaced by an image that [`Self::bytes`] gave on a like processor. An
    /// image from elsewhere may raise #GP when it is loaded.
    pub fn bytes_mut(&mut self) -> &mut [u8; Self::SIZE] {
        &mut self.0
    }

    /// The components of XCR0 that a processor with this CPUID table has and an area holds: none on
    /// one without XSAVE, where FXSAVE takes its place.
    ///
    /// # Errors
    ///
    /// See [`XsaveUnsupported`].
    pub fn components(cpuid: &Cpuid) -> Result<u64, XsaveUnsupported> {
        const XSAVE: u32 = 1 << 26;
        const OSXSAVE: u32 = 1 << 27;
        let [_, _, ecx, _] = cpuid.query(1, 0);
        if ecx & XSAVE == 0 {
            return Ok(0);
        }
        if ecx & OSXSAVE == 0 {
            return Err(XsaveUnsupported::OsxsaveClear);
        }
        let [low, _, size, high] = cpuid.query(0xD, 0);
        if size as usize > Self::SIZE {
            return Err(XsaveUnsupported::TooLarge { size });
        }
        Ok(u64::from(high) << 32 | u64::from(low))
    }
}

/// Why the extended state of a processor cannot be moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum XsaveUnsupported {
    /// The host did not enable XSAVE.
    #[error("the processor has XSAVE, but CR4.OSXSAVE is clear: the host must set it")]
    OsxsaveClear,
    /// The processor has more state than [`XsaveArea`] holds.
    #[error(
        "the processor's XSAVE area takes {size} bytes, more than {}",
        XsaveArea::SIZE
    )]
    TooLarge {
        /// CPUID leaf 0xD, ECX.
        size: u32,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpuid::CpuidEntry;

    fn cpuid(ecx: u32, size: u32) -> Cpuid {
        let mut cpuid = Cpuid::new();
        for (leaf, eax, ecx, edx) in [(0, 0xD, 0, 0), (1, 0, ecx, 0), (0xD, 0xE7, size, 2)] {
            let entry = CpuidEntry {
                leaf,
                indexed: leaf == 0xD,
                eax,
                ecx,
                edx,
                ..CpuidEntry::default()
            };
            assert!(cpuid.set(entry));
        }
        cpuid
    }

    #[test]
    fn components_are_those_of_cpuid() {
        let of = |ecx, size| XsaveArea::components(&cpuid(ecx, size));
        assert_eq!(of(0, 0), Ok(0));
        assert_eq!(of(3 << 26, 2696), Ok(0x2_0000_00E7));
        assert_eq!(of(1 << 26, 2696), Err(XsaveUnsupported::OsxsaveClear));
        assert_eq!(
            of(3 << 26, 4097),
            Err(XsaveUnsupported::TooLarge { size: 4097 })
        );
        assert_eq!(XsaveArea::INITIAL.bytes()[..2], [0x7F, 0x03]);
    }
}
