//! An AMD unit with one device (AMD I/O virtualization technology specification 3.08, 2.2.2 and 3.4).

use alloc::string::String;
use core::sync::atomic::Ordering;

use testudo_arch::{Hpa, PageSize};
use testudo_ept::PageTable;
use testudo_ept::format::amdvi::{AmdVi, AmdViFlags};
use testudo_ept::iotlb::{CommandBuffer, Registers, Scope};
use testudo_rt::memory::Frames;
use testudo_rt::{Boot, memory};

use super::{DOMAIN, Mmio, PATIENCE, RingFrames, edu, frame, structure, wait, word};

const DEVICE_TABLE: u32 = 0x00;
const COMMAND_BUFFER: u32 = 0x08;
const EVENT_LOG: u32 = 0x10;
const CONTROL: u32 = 0x18;
const STATUS: u32 = 0x2020;

/// Bits of the control register.
const ENABLE: u64 = 1;
const EVENTS: u64 = 1 << 2;
const COMMANDS: u64 = 1 << 12;

/// A ring of 256 entries, in the length fields of the base registers.
const LENGTH: u64 = 8 << 56;
/// Tables with four levels translate 48 bits.
const LEVELS: u8 = 4;

pub(super) struct Unit(Mmio);

impl Unit {
    /// The first unit (an IVHD block).
    pub(super) fn find(boot: &'static Boot) -> Option<Self> {
        let base = super::base_at(structure(boot, b"IVRS", 0x10)?, 8)?;
        Some(Self(Mmio(base)))
    }

    /// Has the unit take no more commands.
    pub(super) fn stop_commands(&self) {
        let mut unit = self.0;
        unit.write64(CONTROL, ENABLE | EVENTS);
    }

    /// Runs a test while the device of this number uses a table of its own, in which it finds its mark.
    pub(super) fn with_device(
        &self,
        function: u8,
        test: impl FnOnce(
            &PageTable<AmdVi, Frames>,
            AmdViFlags,
            &mut CommandBuffer<RingFrames, Mmio>,
        ) -> Result<(), String>,
    ) -> Result<(), String> {
        let mut unit = self.0;
        let table = PageTable::new(AmdVi::new(LEVELS, 46), Frames).ok_or("no memory")?;
        let flags = AmdViFlags::READ | AmdViFlags::WRITE;
        let source = frame()?;
        word(source).store(edu::MARK, Ordering::Release);
        table
            .map_page(edu::SOURCE, PageSize::Size4K, Hpa(source), flags)
            .map_err(|error| alloc::format!("{error}"))?;

        // Entries of 32 bytes for the first bus.
        let devices = memory::reserve_zeroed(0x2000, 0x1000).ok_or("no memory")?;
        let entry = devices + u64::from(function) * 32;
        const VALID: u64 = 0b11;
        const READ_AND_WRITE: u64 = 0b11 << 61;
        word(entry + 8).store(u64::from(DOMAIN), Ordering::Release);
        let root = table.root().0 | u64::from(LEVELS) << 9;
        word(entry).store(root | VALID | READ_AND_WRITE, Ordering::Release);

        let ring = RingFrames::new()?;
        unit.write64(CONTROL, 0);
        // The size field counts pages from 0.
        unit.write64(DEVICE_TABLE, devices | 1);
        unit.write64(COMMAND_BUFFER, ring.ring | LENGTH);
        unit.write64(EVENT_LOG, frame()? | LENGTH);
        unit.write64(CONTROL, ENABLE | EVENTS | COMMANDS);
        wait("run its command buffer", || {
            unit.read32(STATUS) & 1 << 4 != 0
        })?;
        let mut buffer = CommandBuffer::new(ring, unit, PATIENCE);
        // INVALIDATE_DEVTAB_ENTRY (2.4.2).
        let entry = buffer.execute(&[[2 << 60 | u64::from(function), 0]]);
        let result = entry
            .and_then(|()| buffer.forget(Scope::Domain(DOMAIN)))
            .map_err(|error| alloc::format!("{error}"))
            .and_then(|()| test(&table, flags, &mut buffer));
        unit.write64(CONTROL, 0);
        result
    }
}
