//! An Intel unit with one device, in legacy mode (VT-d specification 4.1, 9.1 to 9.3 and chapter 11).

use alloc::string::String;
use core::sync::atomic::Ordering;

use testudo_arch::{Hpa, PageSize};
use testudo_ept::PageTable;
use testudo_ept::format::vtd::{Vtd, VtdFlags};
use testudo_ept::iotlb::{InvalidationQueue, Registers, Scope};
use testudo_rt::Boot;
use testudo_rt::memory::Frames;

use super::{DOMAIN, Mmio, PATIENCE, RingFrames, edu, frame, structure, wait, word};

const CAP: u32 = 0x08;
const GCMD: u32 = 0x18;
const GSTS: u32 = 0x1C;
const RTADDR: u32 = 0x20;
const FSTS: u32 = 0x34;
/// In FSTS (IQE).
const INVALID_DESCRIPTOR: u32 = 1 << 4;
const IQH: u32 = 0x80;
const IQT: u32 = 0x88;
const IQA: u32 = 0x90;

/// Bits of GCMD and GSTS: translation, a new root table, and the invalidation queue.
const TRANSLATE: u32 = 1 << 31;
const SET_ROOT: u32 = 1 << 30;
const QUEUE: u32 = 1 << 26;

pub(super) struct Unit(Mmio);

impl Unit {
    /// The first unit (a DRHD structure).
    pub(super) fn find(boot: &'static Boot) -> Option<Self> {
        let base = super::base_at(structure(boot, b"DMAR", 0)?, 8)?;
        Some(Self(Mmio(base)))
    }

    /// Gives a command, and waits until it is carried out.
    fn command(&self, bit: u32, on: bool, what: &str) -> Result<(), String> {
        let unit = self.0;
        // The others stay as they are.
        let others = unit.read32(GSTS) & (TRANSLATE | QUEUE) & !bit;
        unit.write32(GCMD, if on { others | bit } else { others });
        wait(what, || (unit.read32(GSTS) & bit != 0) == on)
    }

    /// Runs a test while the device of this number uses a table of its own, in which it finds its mark.
    pub(super) fn with_device(
        &self,
        function: u8,
        test: impl FnOnce(
            &PageTable<Vtd, Frames>,
            VtdFlags,
            &mut InvalidationQueue<RingFrames, Mmio>,
        ) -> Result<(), String>,
    ) -> Result<(), String> {
        let mut unit = self.0;
        let cap = unit.read64(CAP);
        // SAGAW: 39 bits if they are offered, or 48.
        let format = Vtd::new(if cap >> 9 & 1 != 0 { 3 } else { 4 }, 46);
        let width = u64::from(format.address_width());
        let table = PageTable::new(format, Frames).ok_or("no memory")?;
        let flags = VtdFlags::READ | VtdFlags::WRITE;
        let source = frame()?;
        word(source).store(edu::MARK, Ordering::Release);
        table
            .map_page(edu::SOURCE, PageSize::Size4K, Hpa(source), flags)
            .map_err(|error| alloc::format!("{error}"))?;

        let (root, context) = (frame()?, frame()?);
        let entry = context + u64::from(function) * 16;
        let set = |at: u64, value: u64| word(at).store(value, Ordering::Release);
        set(entry + 8, width | u64::from(DOMAIN) << 8);
        set(entry, table.root().0 | 1);
        set(root, context | 1);

        let ring = RingFrames::new()?;
        let (descriptors, answers) = (ring.ring, ring.status);
        unit.write64(RTADDR, root);
        self.command(SET_ROOT, true, "take a root table")?;
        // What earlier cases have left: errors are cleared by writing ones.
        unit.write32(FSTS, unit.read32(FSTS));
        unit.write64(IQT, 0);
        unit.write64(IQA, ring.ring);
        self.command(QUEUE, true, "turn its queue on")?;
        let mut queue = InvalidationQueue::new(ring, unit, PATIENCE);
        let result = (|| {
            // A global context-cache invalidate descriptor (6.5.2.1).
            let everything = queue.execute(&[[1 | 1 << 4, 0]]);
            everything
                .and_then(|()| queue.forget(Scope::Global))
                .map_err(|error| alloc::format!("{error}"))?;
            self.command(TRANSLATE, true, "translate")?;
            test(&table, flags, &mut queue)
        })();
        if unit.read32(FSTS) & INVALID_DESCRIPTOR != 0 {
            // The unit goes on when the descriptor is one that it can take: a wait for what was before.
            let bad = descriptors + unit.read64(IQH);
            set(bad + 8, answers);
            set(bad, 5 | 1 << 5);
        }
        unit.write32(FSTS, unit.read32(FSTS));
        unit.write64(IQT, unit.read64(IQT));
        wait("take the rest of its queue", || {
            unit.read64(IQH) == unit.read64(IQT)
        })?;
        self.command(TRANSLATE, false, "stop to translate")?;
        self.command(QUEUE, false, "turn its queue off")?;
        result
    }
}
