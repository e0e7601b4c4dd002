//! The memory to which the states point.

use testudo_arch::memory::GuestRam;
use testudo_arch::{Gpa, GuestMemory, Msr};
use testudo_rt::memory;
use testudo_vmx::VmxCaps;
use testudo_vmx::structures::MsrEntry;

const FRAME: u64 = 4096;

/// A few frames, each for one use.
pub(crate) struct Arena {
    start: u64,
    /// All of them, as the validator reads them.
    pub(crate) memory: GuestRam,
}

/// The frames by their use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Frame {
    /// All zero, never written: page tables without entries, bitmaps without bits.
    Zero,
    /// What processors write to.
    Scratch,
    /// The virtual-APIC page, with a task priority of 5.
    Apic,
    /// A PDPTE with a reserved bit, that maps nothing in any paging mode.
    BadPdpte,
    /// Two MSRs that may be loaded.
    Msrs,
    /// Two MSRs to be stored.
    StoredMsrs,
    /// An MSR that may be loaded, and one that may not.
    BadMsrs,
    /// An MSR that may be loaded, and one with an address that is not canonical.
    BadAddress,
    /// IA32_PAT with a memory type that there is not.
    BadPat,
    /// IA32_EFER with a reserved bit.
    BadEfer,
    /// IA32_EFER with LME, which suits guests in IA-32e mode and those without paging.
    LongEfer,
    /// IA32_EFER without LME, which suits the others.
    LegacyEfer,
    /// A VMCS region with the revision.
    Link,
    /// A shadow VMCS region with the revision.
    ShadowLink,
    /// The VMCS that is entered.
    Vmcs,
    /// The VMXON region.
    Vmxon,
}

const FRAMES: u64 = Frame::Vmxon as u64 + 1;

/// The task-priority class in the virtual-APIC page.
pub(crate) const PRIORITY_CLASS: u8 = 5;

impl Arena {
    pub(crate) fn new(caps: &VmxCaps) -> Option<Self> {
        let start = memory::reserve_zeroed(FRAMES * FRAME, FRAME)?;
        let mut ram = GuestRam::new();
        // SAFETY: the frames are ours for good, identity-mapped, and reached through `ram` and by
        // the processor only.
        unsafe { ram.add(Gpa(start), start as *mut u8, FRAMES * FRAME, true) }.ok()?;
        let arena = Self { start, memory: ram };
        arena.fill(caps);
        Some(arena)
    }

    /// The address of a frame.
    pub(crate) fn at(&self, frame: Frame) -> u64 {
        self.start + frame as u64 * FRAME
    }

    fn fill(&self, caps: &VmxCaps) {
        let revision = caps.basic.revision();
        let star = MsrEntry::new(Msr::STAR, 0).to_bytes();
        let lstar = MsrEntry::new(Msr::LSTAR, 0).to_bytes();
        let refused = MsrEntry::new(Msr::FS_BASE, 0).to_bytes();
        let not_present = self.at(Frame::Zero) | 3;
        self.put(Frame::BadPdpte, 0, &not_present.to_le_bytes());
        for frame in [Frame::Msrs, Frame::StoredMsrs] {
            self.put(frame, 0, &star);
            self.put(frame, 16, &lstar);
        }
        self.put(Frame::BadMsrs, 0, &star);
        self.put(Frame::BadMsrs, 16, &refused);
        let wide = MsrEntry::new(Msr::CSTAR, 0x8000_0000_0000_0000).to_bytes();
        self.put(Frame::BadAddress, 0, &star);
        self.put(Frame::BadAddress, 16, &wide);
        for (frame, msr, value) in [
            (Frame::BadPat, Msr::PAT, 0x0007_0406_0007_0402),
            (Frame::BadEfer, Msr::EFER, 0x502),
            (Frame::LongEfer, Msr::EFER, 0x501),
            (Frame::LegacyEfer, Msr::EFER, 1),
        ] {
            self.put(frame, 0, &MsrEntry::new(msr, value).to_bytes());
        }
        self.put(Frame::Link, 0, &revision.to_le_bytes());
        self.put(Frame::ShadowLink, 0, &(revision | 1 << 31).to_le_bytes());
    }

    /// Makes the virtual-APIC page what it was, since processors write to it.
    pub(crate) fn restore(&self) {
        self.put(Frame::Apic, 0x80, &[PRIORITY_CLASS << 4]);
    }

    fn put(&self, frame: Frame, offset: u64, bytes: &[u8]) {
        let written = self.memory.write(Gpa(self.at(frame) + offset), bytes);
        debug_assert!(written.is_ok(), "the arena is one range");
    }
}
