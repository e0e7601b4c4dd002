//! A VMCS kept in ordinary memory, in a layout of ours.
//!
//! The processor's own layout is not documented, so a hypervisor that emulates VMX for a guest, or
//! saves a VMCS, needs one. Here each width and area has a block, in which a field's place follows
//! from its index: a new row in the table of fields never moves another field, and an image saved
//! by one version is read by the next.

use crate::encoding::{Area, Encoding, FieldWidth};
use crate::error::{InstructionError, VmFail};
use crate::fields::{FIELDS, TABLE};
use crate::vmcs::{VmcsRead, VmcsWrite};

/// The number of bytes of a [`VmcsImage`].
pub const IMAGE_SIZE: usize = 4096;

/// Where the fields begin: the bytes before are the owner's, for instance a revision identifier
/// and an abort indicator, as in the processor's own format (SDM vol. 3C, 27.2).
pub const HEADER_SIZE: usize = 64;

/// How many fields each width and area has room for: rows by width, columns by area.
const CAPACITY: [[usize; 4]; 4] = [
    [16, 16, 16, 16], // 16 bits
    [64, 16, 64, 32], // 64 bits
    [32, 16, 32, 16], // 32 bits
    [16, 16, 64, 32], // natural width
];

/// The byte at which each block begins: the 8-byte fields first, so that all are aligned.
const BLOCKS: [[usize; 4]; 4] = {
    let order = [
        FieldWidth::Bits64,
        FieldWidth::Natural,
        FieldWidth::Bits32,
        FieldWidth::Bits16,
    ];
    let mut blocks = [[0; 4]; 4];
    let mut next = HEADER_SIZE;
    let mut i = 0;
    while i < 4 {
        let width = order[i];
        let mut area = 0;
        while area < 4 {
            blocks[width as usize][area] = next;
            next += CAPACITY[width as usize][area] * width.bytes();
            area += 1;
        }
        i += 1;
    }
    assert!(next <= IMAGE_SIZE);
    blocks
};

/// Bit `index` of word `width * 4 + area` says that the table has this field.
const DEFINED: [u64; 16] = {
    let mut words = [0u64; 16];
    let mut i = 0;
    while i < TABLE.len() {
        let encoding = TABLE[i].encoding;
        let (width, area) = (encoding.width() as usize, encoding.area() as usize);
        assert!((encoding.index() as usize) < CAPACITY[width][area]);
        words[width * 4 + area] |= 1 << encoding.index();
        i += 1;
    }
    words
};

/// The place of a field in an image: its first byte, or `None` for one that the table lacks.
#[inline(always)]
pub const fn offset_of(field: Encoding) -> Option<usize> {
    if !field.is_well_formed() {
        return None;
    }
    let (width, area) = (field.width(), field.area());
    let index = field.index() as usize;
    let block = width as usize * 4 + area as usize;
    if index >= 64 || DEFINED[block] & (1 << index) == 0 {
        return None;
    }
    Some(BLOCKS[width as usize][area as usize] + index * width.bytes())
}

/// A VMCS as bytes: every field of the table, all zero at first.
///
/// VM-exit information can be written here, since whoever emulates a processor must.
///
/// ```
/// use testudo_vmx::{VmcsRead, VmcsWrite, fields, image::VmcsImage};
///
/// let mut vmcs = VmcsImage::new();
/// vmcs.set(fields::GUEST_CR3, 0x1000)?;
/// let copy = VmcsImage::from_bytes(vmcs.as_bytes());
/// assert_eq!(copy.get(fields::GUEST_CR3)?, 0x1000);
/// # Ok::<(), testudo_vmx::AccessError>(())
/// ```
#[derive(Clone, PartialEq, Eq)]
#[repr(C, align(4096))]
pub struct VmcsImage {
    bytes: [u8; IMAGE_SIZE],
}

impl VmcsImage {
    /// An image in which every field is zero.
    pub const fn new() -> Self {
        Self {
            bytes: [0; IMAGE_SIZE],
        }
    }

    /// An image with these bytes. All contents are possible values.
    pub const fn from_bytes(bytes: &[u8; IMAGE_SIZE]) -> Self {
        Self { bytes: *bytes }
    }

    /// The bytes, to be stored or sent.
    pub const fn as_bytes(&self) -> &[u8; IMAGE_SIZE] {
        &self.bytes
    }

    /// The bytes before the fields, which belong to the image's owner.
    pub fn header_mut(&mut self) -> &mut [u8; HEADER_SIZE] {
        const { assert!(HEADER_SIZE <= IMAGE_SIZE) };
        let (header, _) = self.bytes.as_chunks_mut().0.split_at_mut(1);
        &mut header[0]
    }

    /// The bytes to be filled from memory.
    pub const fn as_mut_bytes(&mut self) -> &mut [u8; IMAGE_SIZE] {
        &mut self.bytes
    }

    #[inline(always)]
    fn load(&self, offset: usize, width: FieldWidth) -> u64 {
        let at = &self.bytes[offset..];
        let mut value = [0; 8];
        match width {
            FieldWidth::Bits16 => value[..2].copy_from_slice(&at[..2]),
            FieldWidth::Bits32 => value[..4].copy_from_slice(&at[..4]),
            FieldWidth::Bits64 | FieldWidth::Natural => value.copy_from_slice(&at[..8]),
        }
        u64::from_le_bytes(value)
    }

    #[inline(always)]
    fn store(&mut self, offset: usize, width: FieldWidth, value: u64) {
        let bytes = value.to_le_bytes();
        let len = width.bytes();
        self.bytes[offset..offset + len].copy_from_slice(&bytes[..len]);
    }

    /// Every field of the table with its value, by ascending encoding.
    pub fn iter(&self) -> impl Iterator<Item = (Encoding, u64)> + '_ {
        FIELDS.iter().filter_map(|info| {
            let offset = offset_of(info.encoding)?;
            Some((info.encoding, self.load(offset, info.encoding.width())))
        })
    }
}

impl Default for VmcsImage {
    fn default() -> Self {
        Self::new()
    }
}

impl core::fmt::Debug for VmcsImage {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let set = self.iter().filter(|(_, value)| *value != 0);
        f.debug_map()
            .entries(set.map(|(field, value)| (field, format_hex(value))))
            .finish()
    }
}

fn format_hex(value: u64) -> impl core::fmt::Debug {
    struct Hex(u64);
    impl core::fmt::Debug for Hex {
        fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
            write!(f, "{:#x}", self.0)
        }
    }
    Hex(value)
}

const UNSUPPORTED: VmFail = VmFail::Valid(InstructionError::UnsupportedComponent);

impl VmcsRead for VmcsImage {
    // With a constant encoding nothing but the load remains.
    #[inline(always)]
    fn read_raw(&self, field: Encoding) -> Result<u64, VmFail> {
        let offset = offset_of(field).ok_or(UNSUPPORTED)?;
        let value = self.load(offset, field.width());
        Ok(if field.is_high() { value >> 32 } else { value })
    }
}

impl VmcsWrite for VmcsImage {
    #[inline(always)]
    fn write_raw(&mut self, field: Encoding, value: u64) -> Result<(), VmFail> {
        let offset = offset_of(field).ok_or(UNSUPPORTED)?;
        if field.is_high() {
            self.store(offset + 4, FieldWidth::Bits32, value);
        } else {
            self.store(offset, field.width(), value);
        }
        Ok(())
    }
}

const _: () = assert!(BLOCKS[0][Area::Host as usize] + 32 <= IMAGE_SIZE);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fields;
    use proptest::prelude::*;

    #[test]
    fn no_two_fields_share_a_byte() {
        let mut owner = std::vec![None; IMAGE_SIZE];
        for info in FIELDS {
            let offset = offset_of(info.encoding).unwrap();
            assert!(offset >= HEADER_SIZE && offset.is_multiple_of(info.encoding.width().bytes()));
            for byte in &mut owner[offset..offset + info.encoding.width().bytes()] {
                assert_eq!(byte.replace(info.name), None);
            }
        }
    }

    #[test]
    fn golden_offsets() {
        // Saved images depend on these.
        let at = |field: Encoding| offset_of(field).unwrap();
        assert_eq!(at(fields::IO_BITMAP_A.encoding()), 64);
        assert_eq!(at(fields::GUEST_RIP.encoding()), 1848);
        assert_eq!(at(fields::PIN_CONTROLS.encoding()), 2496);
        assert_eq!(at(fields::VPID.encoding()), 2880);
    }

    #[test]
    fn high_halves() {
        let mut vmcs = VmcsImage::new();
        vmcs.set(fields::TSC_OFFSET, 0x1111_2222_3333_4444).unwrap();
        let high = Encoding(fields::TSC_OFFSET.encoding().0 | 1);
        assert_eq!(vmcs.read_raw(high), Ok(0x1111_2222));
        vmcs.write_raw(high, 0xAAAA_5555_6666).unwrap();
        assert_eq!(vmcs.get(fields::TSC_OFFSET), Ok(0x5555_6666_3333_4444));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(which in 0..FIELDS.len(), value: u64, other: u32) {
            let mut vmcs = VmcsImage::new();
            let field = FIELDS[which].encoding;
            vmcs.write_raw(field, value).unwrap();
            prop_assert_eq!(vmcs.read_raw(field), Ok(value & field.width().mask()));
            let set = vmcs.iter().filter(|(f, v)| *f != field && *v != 0).count();
            prop_assert_eq!(set, 0);
            if Encoding(other).info().is_none() {
                prop_assert_eq!(vmcs.write_raw(Encoding(other), 1), Err(UNSUPPORTED));
                prop_assert_eq!(vmcs.read_raw(Encoding(other)), Err(UNSUPPORTED));
            }
        }
    }
}
