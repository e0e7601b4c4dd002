//! The memory of the guests: one page of code, and page tables for every paging mode that map
//! nothing else.
//!
//! Whatever mode a mutated state enters, its first instruction is VMMCALL or cannot be fetched, and
//! every event and every exception exits: nothing ever runs that could go astray.

use testudo_arch::memory::GuestRam;
use testudo_arch::{FrameMem, Gpa, Hpa};
use testudo_ept::PageTable;
use testudo_ept::format::npt::{Npt, NptFlags};
use testudo_rt::memory;
use testudo_rt::memory::Frames;
use testudo_svm::caps::SvmCaps;
use testudo_svm::permission::{IoPermissionMap, MsrPermissionMap};

/// Frames of the arena, by what they hold.
#[derive(Clone, Copy)]
enum Frame {
    Code,
    Pml4,
    Pdpt,
    Pd,
    Pt,
    PaePdpt,
    LegacyPd,
    LegacyPt,
}

const FRAMES: u64 = 8;
const PAGE: u64 = 4096;

/// Present, writable, user.
const TABLE: u64 = 7;
/// Present; a PAE page-directory pointer has no further rights.
const PRESENT: u64 = 1;

const VMMCALL: [u8; 3] = [0x0F, 0x01, 0xD9];
const HLT: u8 = 0xF4;

/// See the [module](self).
pub(crate) struct Arena {
    base: u64,
    nested: PageTable<Npt, Frames>,
    /// The arena as guest memory, for the checks that read it.
    pub(crate) memory: GuestRam,
    /// A permission map under which every port exits.
    pub(crate) iopm: u64,
    /// A permission map under which every MSR exits.
    pub(crate) msrpm: u64,
}

impl Arena {
    /// Takes the memory and builds the tables.
    pub(crate) fn new(caps: &SvmCaps) -> Option<Self> {
        // From 16 MiB on, so that a table read in the wrong format has no entry for the code.
        let base = memory::reserve_zeroed(FRAMES * PAGE, 16 << 20)?;
        let nested = PageTable::new(Npt::new(caps.physical_address_bits), Frames)?;
        let flags = NptFlags::WRITABLE | NptFlags::ACCESSED | NptFlags::DIRTY;
        nested
            .map(Gpa(base), FRAMES * PAGE, Hpa(base), flags)
            .ok()?;
        let mut guest = GuestRam::new();
        // SAFETY: the memory is identity-mapped for good, and only guests and atomics touch it.
        unsafe { guest.add(Gpa(base), base as *mut u8, FRAMES * PAGE, true) }.ok()?;
        let arena = Self {
            base,
            nested,
            memory: guest,
            iopm: filled(IoPermissionMap::SIZE as u64, 0xFF)?,
            msrpm: filled(MsrPermissionMap::SIZE as u64, 0xFF)?,
        };
        if arena.code() < 16 << 20 || arena.code() >> 30 != 0 {
            return None;
        }
        arena.build();
        Some(arena)
    }

    fn address(&self, frame: Frame) -> u64 {
        self.base + frame as u64 * PAGE
    }

    /// Where the guest's code is, linear as well as physical.
    pub(crate) fn code(&self) -> u64 {
        self.address(Frame::Code)
    }

    /// CR3 for long mode.
    pub(crate) fn long_cr3(&self) -> u64 {
        self.address(Frame::Pml4)
    }

    /// CR3 for PAE paging.
    pub(crate) fn pae_cr3(&self) -> u64 {
        self.address(Frame::PaePdpt)
    }

    /// CR3 for 32-bit paging.
    pub(crate) fn legacy_cr3(&self) -> u64 {
        self.address(Frame::LegacyPd)
    }

    /// N_CR3.
    pub(crate) fn nested_cr3(&self) -> u64 {
        self.nested.root().0
    }

    /// Sets bits of a PAE page-directory pointer.
    pub(crate) fn change_pdpe(&self, index: u64, clear: u64, set: u64) {
        let entry = Hpa(self.address(Frame::PaePdpt) + 8 * (index & 3));
        let value = Frames.load(entry);
        Frames.store(entry, (value & !clear) | set);
    }

    /// The PAE page-directory pointers as they should be.
    pub(crate) fn reset_pdpes(&self) {
        for index in 0..4 {
            let entry = Hpa(self.address(Frame::PaePdpt) + 8 * index);
            let pointer = self.address(Frame::Pd) | PRESENT;
            Frames.store(entry, if index == 0 { pointer } else { 0 });
        }
    }

    fn build(&self) {
        let code = self.code();
        let set = |frame, index: u64, value| {
            Frames.store(Hpa(self.address(frame) + 8 * index), value);
        };
        set(Frame::Pml4, 0, self.address(Frame::Pdpt) | TABLE);
        set(Frame::Pdpt, 0, self.address(Frame::Pd) | TABLE);
        set(Frame::Pd, code >> 21 & 511, self.address(Frame::Pt) | TABLE);
        set(Frame::Pt, code >> 12 & 511, code | TABLE);
        self.reset_pdpes();
        // 32-bit entries, two to a store.
        let half = |frame, index: u64, value: u64| {
            set(frame, index / 2, value << (32 * (index & 1)));
        };
        half(
            Frame::LegacyPd,
            code >> 22,
            self.address(Frame::LegacyPt) | TABLE,
        );
        half(Frame::LegacyPt, code >> 12 & 1023, code | TABLE);
        let page = code as *mut u8;
        // SAFETY: the page is identity-mapped, and no guest runs yet.
        unsafe {
            core::ptr::write_bytes(page, HLT, PAGE as usize);
            core::ptr::copy_nonoverlapping(VMMCALL.as_ptr(), page, VMMCALL.len());
        }
    }
}

fn filled(bytes: u64, value: u8) -> Option<u64> {
    let start = memory::reserve(bytes, PAGE)?;
    // SAFETY: the range is identity-mapped and ours.
    unsafe { core::ptr::write_bytes(start as *mut u8, value, bytes as usize) };
    Some(start)
}
