//! The VMCS that L1 has: its region in L1's memory, and L0's copy while it is current.
//!
//! # Layout, version 1
//!
//! The region is a page. Its contents are the processor's affair (SDM vol. 3C, 27.2), and here the
//! processor is this layer:
//!
//! | bytes | what |
//! | --- | --- |
//! | 0 | revision identifier, [`REVISION`]; bit 31 (shadow VMCS) must be clear |
//! | 4 | VMX-abort indicator |
//! | 8 | launch state: 0 clear, 1 launched |
//! | 12 | zero |
//! | 64 | the fields, as in [`VmcsImage`]: their places never change between versions |
//!
//! All numbers are little-endian. L1 that looks or writes into the region while it is current sees
//! and changes nothing of what counts: the fields live in L0's copy until VMCLEAR, or until
//! another region becomes current.

use alloc::boxed::Box;

use testudo_arch::{Gpa, GuestMemory, MemoryFault};
use testudo_vmx::image::{HEADER_SIZE, VmcsImage};

/// The revision identifier of this layout, in IA32_VMX_BASIC of L1.
pub const REVISION: u32 = 0x5D05_0001;

const ABORT: u64 = 4;
const LAUNCH_STATE: usize = 8;

/// Whether VMLAUNCH or VMRESUME is due.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum LaunchState {
    /// VMLAUNCH.
    #[default]
    Clear,
    /// VMRESUME.
    Launched,
}

/// L0's copy of L1's current VMCS.
#[derive(Clone, Debug)]
pub(super) struct Vmcs12 {
    pub(super) image: Box<VmcsImage>,
    pub(super) launch_state: LaunchState,
}

impl Vmcs12 {
    pub(super) fn new() -> Self {
        Self {
            image: Box::new(VmcsImage::new()),
            launch_state: LaunchState::Clear,
        }
    }

    /// Takes the copy of the region that becomes current.
    pub(super) fn load(&mut self, memory: &impl GuestMemory, at: Gpa) -> Result<(), MemoryFault> {
        memory.read(at, self.image.as_mut_bytes())?;
        let word = u32_at(self.image.as_bytes(), LAUNCH_STATE);
        // What L1 wrote there itself: anything but "launched" is clear.
        self.launch_state = if word == 1 {
            LaunchState::Launched
        } else {
            LaunchState::Clear
        };
        Ok(())
    }

    /// Writes the copy back. The abort indicator stays as it is in memory.
    pub(super) fn store(&mut self, memory: &impl GuestMemory, at: Gpa) -> Result<(), MemoryFault> {
        let launched = u32::from(self.launch_state == LaunchState::Launched);
        memory.write(at, &REVISION.to_le_bytes())?;
        memory.write(
            at.wrapping_add(LAUNCH_STATE as u64),
            &launched.to_le_bytes(),
        )?;
        let fields = &self.image.as_bytes()[HEADER_SIZE..];
        memory.write(at.wrapping_add(HEADER_SIZE as u64), fields)
    }
}

/// VMCLEAR of a region that is not current.
pub(super) fn clear(memory: &impl GuestMemory, at: Gpa) -> Result<(), MemoryFault> {
    memory.write(at.wrapping_add(LAUNCH_STATE as u64), &[0; 4])
}

/// A VMX abort says why in the region (SDM vol. 3C, 30.7).
pub(super) fn write_abort(
    memory: &impl GuestMemory,
    at: Gpa,
    indicator: u32,
) -> Result<(), MemoryFault> {
    memory.write(at.wrapping_add(ABORT), &indicator.to_le_bytes())
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[offset..offset + 4]);
    u32::from_le_bytes(word)
}
