//! Shadow paging over the memory that a table maps, whatever makes the virtual processors.

use alloc::sync::Arc;

use testudo_arch::Gpa;
use testudo_arch::cpuid::Cpuid;
use testudo_arch::memory::GuestRam;
use testudo_ept::{Format, PageTable};
use testudo_machine::Host;
use testudo_machine::paging::{self, ShadowPaging, ShadowPlace};

use crate::frames::{FrameStack, Frames};

/// The shadow tables of a guest, and what they cannot know by themselves.
pub(crate) struct Shadow<F: Format<Input = Gpa> + 'static> {
    pub(crate) tables: ShadowPaging<FrameStack, GuestRam, &'static PageTable<F, Frames>>,
    cr4: u64,
    physical_bits: u8,
}

impl<F: Format<Input = Gpa> + Send + Sync> Shadow<F> {
    /// For a guest with these CPUID answers, whose memory is `ram`, where `table` maps it.
    pub(crate) fn new(
        host: Arc<dyn Host>,
        guest: &Cpuid,
        ram: &GuestRam,
        table: &'static PageTable<F, Frames>,
        vcpus: usize,
    ) -> Self {
        let (frames, limit) = (FrameStack::default(), paging::table_limit(ram));
        Self {
            tables: ShadowPaging::new(frames, limit, ram.clone(), table, host, vcpus),
            cr4: paging::allowed_cr4(guest),
            physical_bits: guest.query(0x8000_0008, 0)[0] as u8,
        }
    }

    /// What a vCPU needs.
    pub(crate) fn place(&self, vcpu: usize) -> ShadowPlace<'_> {
        ShadowPlace {
            tables: &self.tables,
            vcpu,
            cr4: self.cr4,
            physical_bits: self.physical_bits,
        }
    }
}
