//! The frame of KVM's nested state, as KVM_GET_NESTED_STATE and KVM_SET_NESTED_STATE exchange it
//! (Linux, Documentation/virt/kvm/api.rst, 4.114 and 4.115): a header of 128 bytes, then the control
//! block.

/// The size of the header.
pub(crate) const HEADER: usize = 128;
/// The size of a control block.
pub(crate) const BLOCK: usize = 4096;

pub(crate) const FORMAT_VMX: u16 = 0;
pub(crate) const FORMAT_SVM: u16 = 1;

pub(crate) const GUEST_MODE: u16 = 1;
pub(crate) const EVMCS: u16 = 4;
pub(crate) const GIF_SET: u16 = 0x100;

/// State that cannot be restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// Not as long as its own header says, or as the header itself.
    #[error("nested state of {found} bytes where {expected} are needed")]
    Length {
        /// What there is.
        found: usize,
        /// What there should be.
        expected: usize,
    },
    /// It begins with something else, or is the other vendor's.
    #[error("not nested state of this kind")]
    Kind,
    /// A version of the format that this version of the crate does not know.
    #[error("nested state in version {0}")]
    Version(u32),
    /// It uses something that this layer does not have, given as the flags of the format.
    #[error("nested state with unknown flags {0:#x}")]
    Flags(u32),
}

/// The header's first words.
pub(crate) fn header(bytes: &[u8], format: u16) -> Result<u16, FormatError> {
    let length = |expected| FormatError::Length {
        found: bytes.len(),
        expected,
    };
    if bytes.len() < HEADER {
        return Err(length(HEADER));
    }
    let [flags, kind] = [0, 2].map(|at| u16::from_le_bytes([bytes[at], bytes[at + 1]]));
    if kind != format {
        return Err(FormatError::Kind);
    }
    let size = u32_at(bytes, 4) as usize;
    if size != bytes.len() {
        return Err(length(size));
    }
    Ok(flags)
}

/// Writes the header's first words.
pub(crate) fn set_header(bytes: &mut [u8], format: u16, flags: u16) {
    let size = bytes.len() as u32;
    bytes[..2].copy_from_slice(&flags.to_le_bytes());
    bytes[2..4].copy_from_slice(&format.to_le_bytes());
    bytes[4..8].copy_from_slice(&size.to_le_bytes());
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

pub(crate) fn set_u64(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

/// Our own frame: a name of eight bytes, the version, flags.
pub(crate) fn own_header(bytes: &[u8], name: &[u8; 8], version: u32) -> Result<u32, FormatError> {
    if bytes.len() < 16 {
        return Err(FormatError::Length {
            found: bytes.len(),
            expected: 16,
        });
    }
    if bytes[..8] != *name {
        return Err(FormatError::Kind);
    }
    match u32_at(bytes, 8) {
        found if found == version => Ok(u32_at(bytes, 12)),
        found => Err(FormatError::Version(found)),
    }
}

pub(crate) fn set_own_header(bytes: &mut [u8], name: &[u8; 8], version: u32, flags: u32) {
    bytes[..8].copy_from_slice(name);
    bytes[8..12].copy_from_slice(&version.to_le_bytes());
    bytes[12..16].copy_from_slice(&flags.to_le_bytes());
}
