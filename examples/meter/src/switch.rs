//! What the world switch alone costs: a guest whose only instruction is CPUID, entered again and again by
//! code that handles nothing.
//!
//! It prints `world_switch TICKS`: from before the switch to after it, the VMRUN, the guest's instruction and
//! the exit included. What a hypervisor's CPUID exit costs beyond this is decoding, policy and the loop.
#![no_std]
#![no_main]
#![allow(unsafe_code, reason = "a bare-metal program")]

extern crate alloc;

use alloc::boxed::Box;
use core::error::Error;

use testudo_arch::Hpa;
use testudo_arch::cpuid::Cpuid;
use testudo_arch::regs::SystemRegisters;
use testudo_rt::{Boot, memory, println, time};
use testudo_svm::hw::{GuestRegisters, HostFrames, Svm, VmcbFrame};
use testudo_svm::intercept::{Misc1, Misc2};
use testudo_svm::permission::{IoPermissionMap, MsrPermissionMap};
use testudo_svm::vmcb::{VintrFlags, VirtualInterrupts, Vmcb};
use testudo_svm::{Exit, SvmCaps};

/// CPUID, which real-mode code executes at the first address of the guest's code segment.
const GUEST: [u8; 2] = [0x0f, 0xa2];

/// Entries in one measurement.
const TIMES: u64 = 1000;
/// Measurements, of which the lowest counts.
const ROUNDS: usize = 5;

testudo_rt::entry!(main);

fn main(_: &'static Boot) -> u8 {
    match measure() {
        Ok(ticks) => {
            println!("world_switch {ticks}");
            0
        }
        Err(error) => {
            println!("{error}");
            1
        }
    }
}

fn measure() -> Result<u64, Box<dyn Error>> {
    let caps = SvmCaps::from_cpuid(&Cpuid::of_this_processor())?;
    let code = frame()?;
    // SAFETY: the frame is identity-mapped, ours, and longer than the code.
    unsafe { core::ptr::copy(GUEST.as_ptr(), code.0 as *mut u8, GUEST.len()) };

    let address = frame()?;
    // SAFETY: the frame is identity-mapped, zeroed and nobody else's.
    let mut vmcb = unsafe { VmcbFrame::new(&mut *(address.0 as *mut Vmcb), address) };
    vmcb.set_intercept_misc1(Misc1::all());
    vmcb.set_intercept_misc2(Misc2::all());
    vmcb.set_virtual_interrupts(VirtualInterrupts::default().insert(VintrFlags::V_INTR_MASKING));
    vmcb.set_iopm_base_pa(reserve(IoPermissionMap::SIZE)?.0);
    vmcb.set_msrpm_base_pa(reserve(MsrPermissionMap::SIZE)?.0);
    vmcb.set_asid(1);
    let mut start = SystemRegisters::reset();
    // Without paging of either kind the guest's addresses are the machine's. EFER.SVME: VMRUN demands it.
    (start.cs.base, start.rip, start.efer) = (code.0, 0, 1 << 12);
    vmcb.set_system_registers(&start);

    let frames = HostFrames {
        save_area: frame()?,
        vmcb: frame()?,
    };
    // SAFETY: CPL 0, `caps` are this processor's, the frames are ours, and nobody moves us to another
    // processor or changes the host's segments.
    let mut svm = unsafe { Svm::enable(&caps, frames) }?;
    let mut held = svm.hold_interrupts();
    let mut registers = GuestRegisters::default();
    let mut round = || {
        let start = time::tsc();
        for _ in 0..TIMES {
            // SAFETY: everything is intercepted, so the guest executes its one instruction, which leaves
            // RIP where it is and touches no memory; it is the only guest with ASID 1 and the only one whose
            // registers are in the processor.
            unsafe { held.enter(&mut vmcb, &mut registers) };
        }
        time::tsc() - start
    };
    let ticks = (0..ROUNDS).map(|_| round()).min().unwrap_or(0);
    match Exit::read(&vmcb) {
        Exit::Cpuid => Ok((ticks + TIMES / 2) / TIMES),
        _ => Err("the guest did not exit by its CPUID".into()),
    }
}

fn frame() -> Result<Hpa, &'static str> {
    reserve(4096)
}

fn reserve(bytes: usize) -> Result<Hpa, &'static str> {
    memory::reserve_zeroed(bytes as u64, 4096)
        .map(Hpa)
        .ok_or("no memory")
}
