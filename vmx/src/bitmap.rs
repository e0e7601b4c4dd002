//! The bitmaps by which a guest's MSR and port accesses are let through or exit
//! (SDM vol. 3C, 27.6.4, 27.6.9 and 27.6.15).

use testudo_arch::Msr;

use crate::encoding::Encoding;

const FRAME: usize = 4096;

/// The number of bytes of one quarter of the MSR bitmaps.
const QUARTER: usize = 1024;

#[inline]
fn bit(bytes: &[u8], index: usize) -> bool {
    bytes[index / 8] & (1 << (index % 8)) != 0
}

#[inline]
fn set_bit(bytes: &mut [u8], index: usize, value: bool) {
    let mask = 1 << (index % 8);
    if value {
        bytes[index / 8] |= mask;
    } else {
        bytes[index / 8] &= !mask;
    }
}

/// The MSR bitmaps: a set bit makes RDMSR or WRMSR of that MSR exit. MSRs outside the two ranges of
/// 8192 always exit.
///
/// ```
/// use testudo_arch::Msr;
/// use testudo_vmx::bitmap::MsrBitmap;
///
/// let mut bitmap = MsrBitmap::all_exit();
/// bitmap.pass_through(Msr::FS_BASE);
/// assert!(!bitmap.write_exits(Msr::FS_BASE) && bitmap.write_exits(Msr::EFER));
/// ```
#[derive(Clone, PartialEq, Eq)]
#[repr(C, align(4096))]
pub struct MsrBitmap([u8; FRAME]);

impl MsrBitmap {
    /// Every access exits.
    pub const fn all_exit() -> Self {
        Self([0xFF; FRAME])
    }

    /// No access to an MSR of the two ranges exits.
    pub const fn none_exit() -> Self {
        Self([0; FRAME])
    }

    /// The bitmap with these bytes, for instance a guest hypervisor's.
    pub const fn from_bytes(bytes: &[u8; FRAME]) -> Self {
        Self(*bytes)
    }

    /// The bytes, in the processor's format.
    pub const fn as_bytes(&self) -> &[u8; FRAME] {
        &self.0
    }

    /// The bytes, to be changed in place: by whoever joins two bitmaps word by word.
    pub const fn as_mut_bytes(&mut self) -> &mut [u8; FRAME] {
        &mut self.0
    }

    /// The place of an MSR's bit for reads; that for writes is 2048 bytes further.
    #[inline]
    const fn index(msr: Msr) -> Option<usize> {
        match msr.0 {
            0..=0x1FFF => Some(msr.0 as usize),
            0xC000_0000..=0xC000_1FFF => Some(QUARTER * 8 + (msr.0 & 0x1FFF) as usize),
            _ => None,
        }
    }

    /// Whether RDMSR of the MSR exits.
    #[inline]
    pub fn read_exits(&self, msr: Msr) -> bool {
        Self::index(msr).is_none_or(|index| bit(&self.0, index))
    }

    /// Whether WRMSR to the MSR exits.
    #[inline]
    pub fn write_exits(&self, msr: Msr) -> bool {
        Self::index(msr).is_none_or(|index| bit(&self.0, QUARTER * 16 + index))
    }

    /// Makes reads and writes of the MSR exit or not. An MSR outside the ranges goes on exiting.
    pub fn set(&mut self, msr: Msr, read_exits: bool, write_exits: bool) {
        if let Some(index) = Self::index(msr) {
            set_bit(&mut self.0, index, read_exits);
            set_bit(&mut self.0, QUARTER * 16 + index, write_exits);
        }
    }

    /// Lets the guest read and write the MSR.
    pub fn pass_through(&mut self, msr: Msr) {
        self.set(msr, false, false);
    }

    /// The bitmap under which an access exits if it exits under either: what two hypervisors want.
    pub fn union(&mut self, other: &Self) {
        for (mine, theirs) in self.0.iter_mut().zip(&other.0) {
            *mine |= theirs;
        }
    }
}

/// The two I/O bitmaps: a set bit makes an access to that port exit.
#[derive(Clone, PartialEq, Eq)]
#[repr(C, align(4096))]
pub struct IoBitmap([u8; 2 * FRAME]);

impl IoBitmap {
    /// Every access exits.
    pub const fn all_exit() -> Self {
        Self([0xFF; 2 * FRAME])
    }

    /// No access exits, but one that wraps around the last port.
    pub const fn none_exit() -> Self {
        Self([0; 2 * FRAME])
    }

    /// The bitmaps with these bytes: A, then B.
    pub const fn from_bytes(bytes: &[u8; 2 * FRAME]) -> Self {
        Self(*bytes)
    }

    /// The bytes, in the processor's format: A, then B, each a frame of its own.
    pub const fn as_bytes(&self) -> &[u8; 2 * FRAME] {
        &self.0
    }

    /// Whether an access of `size` bytes at `port` exits: if a bit of any of its ports is set, or
    /// if it wraps around the end of the port space (28.1.3).
    #[inline]
    pub fn exits(&self, port: u16, size: u8) -> bool {
        (0..u32::from(size)).any(|offset| {
            let at = u32::from(port) + offset;
            at > 0xFFFF || bit(&self.0, at as usize)
        })
    }

    /// Makes accesses to the port exit or not.
    pub fn set(&mut self, port: u16, exits: bool) {
        set_bit(&mut self.0, usize::from(port), exits);
    }

    /// The bitmap under which an access exits if it exits under either.
    pub fn union(&mut self, other: &Self) {
        for (mine, theirs) in self.0.iter_mut().zip(&other.0) {
            *mine |= theirs;
        }
    }
}

/// The VMREAD bitmap or the VMWRITE bitmap: a set bit makes the access to that field exit instead of
/// reaching the shadow VMCS.
#[derive(Clone, PartialEq, Eq)]
#[repr(C, align(4096))]
pub struct FieldBitmap([u8; FRAME]);

impl FieldBitmap {
    /// Every access exits.
    pub const fn all_exit() -> Self {
        Self([0xFF; FRAME])
    }

    /// The bytes, in the processor's format.
    pub const fn as_bytes(&self) -> &[u8; FRAME] {
        &self.0
    }

    /// Whether an access exits to which the guest gives this encoding: by bits 14:0 of it, and
    /// always if one of the bits 63:15 is set (28.1.3).
    #[inline]
    pub fn exits(&self, encoding: u64) -> bool {
        encoding > 0x7FFF || bit(&self.0, encoding as usize)
    }

    /// Lets accesses to the field, and to its upper half, reach the shadow VMCS.
    pub fn pass_through(&mut self, field: impl Into<Encoding>) {
        let full = field.into().full();
        if full.is_well_formed() {
            set_bit(&mut self.0, full.0 as usize, false);
            set_bit(&mut self.0, full.0 as usize | 1, false);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fields;
    use proptest::prelude::*;

    #[test]
    fn golden_places() {
        // 27.6.9: reads of low, reads of high, writes of low, writes of high MSRs.
        let mut bitmap = MsrBitmap::none_exit();
        bitmap.set(Msr(0x10), true, false);
        bitmap.set(Msr::EFER, true, true);
        let set: std::vec::Vec<_> = (0..FRAME).filter(|&i| bitmap.as_bytes()[i] != 0).collect();
        assert_eq!(set, [2, 1024 + 16, 3072 + 16]);
        assert_eq!(bitmap.as_bytes()[2], 1);
    }

    #[test]
    fn msrs_outside_the_ranges_exit() {
        let mut bitmap = MsrBitmap::none_exit();
        for msr in [
            Msr(0x2000),
            Msr(0x4000_0000),
            Msr(0xC000_2000),
            Msr(u32::MAX),
        ] {
            bitmap.pass_through(msr);
            assert!(bitmap.read_exits(msr) && bitmap.write_exits(msr));
        }
    }

    #[test]
    fn wide_accesses_exit_for_any_of_their_ports() {
        let mut bitmap = IoBitmap::none_exit();
        bitmap.set(0x8001, true);
        assert_eq!(bitmap.as_bytes()[FRAME], 2);
        assert!(bitmap.exits(0x7FFE, 4) && !bitmap.exits(0x7FFD, 4));
        assert!(bitmap.exits(0xFFFF, 2) && !bitmap.exits(0xFFFF, 1));
    }

    #[test]
    fn shadowed_fields() {
        let mut bitmap = FieldBitmap::all_exit();
        bitmap.pass_through(fields::TSC_OFFSET);
        assert!(!bitmap.exits(0x2010) && !bitmap.exits(0x2011) && bitmap.exits(0x2012));
        assert!(bitmap.exits(0x1_2010));
    }

    proptest! {
        #[test]
        fn the_union_exits_where_either_does(a: u32, b: u32, probe: u32) {
            let mut one = MsrBitmap::none_exit();
            let mut two = one.clone();
            one.set(Msr(a & 0x1FFF), true, false);
            two.set(Msr(b & 0x1FFF), false, true);
            let mut both = one.clone();
            both.union(&two);
            let probe = Msr(probe & 0x3FFF);
            prop_assert_eq!(both.read_exits(probe), one.read_exits(probe) || two.read_exits(probe));
            prop_assert_eq!(both.write_exits(probe), one.write_exits(probe) || two.write_exits(probe));
        }
    }
}
