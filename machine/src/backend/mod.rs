//! The processor modes behind [`Vcpu`](crate::Vcpu).

#[cfg(all(test, any(feature = "svm", feature = "vmx")))]
mod fake_machine;
#[cfg(any(feature = "svm", feature = "vmx"))]
mod flusher;
#[cfg(any(feature = "svm", feature = "vmx"))]
mod mode;
#[cfg(any(feature = "svm", feature = "vmx"))]
pub(crate) mod paging;
#[cfg(feature = "svm")]
pub mod svm;
#[cfg(feature = "vmx")]
pub mod vmx;
#[cfg(feature = "vmx")]
mod watched;

/// What XSETBV demands of XCR0 (SDM vol. 1, 13.3; APM vol. 2, 11.5.2): x87 always, AVX with SSE
/// only, the three components of AVX-512 together and with AVX only.
#[cfg(any(feature = "svm", feature = "vmx"))]
fn is_valid_xcr0(value: u64) -> bool {
    const AVX512: u64 = 0xE0;
    value & 1 != 0
        && (value & 4 == 0 || value & 2 != 0)
        && (value & AVX512 == 0 || (value & AVX512 == AVX512 && value & 6 == 6))
}

/// Whether a page attribute table holds memory types only: 2, 3 and all above 7 are reserved (SDM
/// vol. 3A, 12.12.2; APM vol. 2, 7.8.1).
#[cfg(any(feature = "svm", feature = "vmx"))]
fn is_valid_pat(value: u64) -> bool {
    value
        .to_le_bytes()
        .iter()
        .all(|t| matches!(t, 0 | 1 | 4..=7))
}
