//! A machine for the tests of the backends, whose processors are none.

use alloc::sync::Arc;
use std::boxed::Box;

use testudo_arch::cpuid::{Cpuid, CpuidEntry};
use testudo_arch::memory::GuestRam;
use testudo_arch::regs::SystemRegisters;
use testudo_arch::segment::SegmentAttributes;
use testudo_arch::{Gpa, Segment};

use crate::irq::Lapic;
use crate::irq::fake::FakeHost;
use crate::{Machine, MachineConfig};

/// How much memory a machine has.
pub(super) const MEMORY: usize = 16 << 20;

/// Guest memory at 0.
pub(super) fn ram(bytes: usize) -> GuestRam {
    let words = Box::leak(std::vec![0u64; bytes / 8].into_boxed_slice());
    let mut ram = GuestRam::new();
    // SAFETY: the words are leaked, and nobody else's.
    #[allow(unsafe_code, reason = "guest memory over the test's own")]
    unsafe { ram.add(Gpa(0), words.as_mut_ptr().cast(), bytes as u64, true) }.unwrap();
    ram
}

/// A machine of one processor with this memory.
pub(super) fn machine(memory: GuestRam) -> (Machine<GuestRam>, Lapic, Arc<FakeHost>) {
    let mut cpuid = Cpuid::new();
    for (leaf, eax) in [
        (0, 0xD),
        (1, 0),
        (0x8000_0000, 0x8000_0008),
        (0x8000_0008, 0x3028),
    ] {
        let entry = CpuidEntry {
            leaf,
            eax,
            ..CpuidEntry::default()
        };
        assert!(cpuid.set(entry));
    }
    let config = MachineConfig {
        vcpus: 1,
        memory: MEMORY as u64,
        nested: false,
        hyperv: false,
        pschange_mc_no: false,
        time_limit: None,
        start_time: 0,
    };
    let (host, console) = (FakeHost::new(), Box::new(|_: u8| {}));
    let made = Machine::new(config, memory, host.clone(), &cpuid, console);
    let (machine, lapics) = made.unwrap();
    (machine, lapics.into_iter().next().unwrap(), host)
}

/// Flat 32-bit protected mode without paging, as PVH kernels begin.
pub(super) fn protected_mode(rip: u64) -> SystemRegisters {
    let data = Segment::flat(0x18, SegmentAttributes::DATA);
    SystemRegisters {
        cs: Segment::flat(0x10, SegmentAttributes::CODE32),
        ss: data,
        ds: data,
        es: data,
        fs: data,
        gs: data,
        cr0: 0x11,
        rip,
        ..SystemRegisters::reset()
    }
}
