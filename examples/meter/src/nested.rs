//! What running a guest costs a hypervisor that is a guest itself.
//!
//! It enables SVM, runs a guest of two RDTSC and a VMMCALL on nested paging, and prints two lines of
//! `NAME TICKS`: `vmrun`, from before VMRUN to the guest's first instruction, and `vmexit`, from the
//! guest's last instruction to the one after VMRUN. Where the TSC counts instructions the figures are
//! exact, and a few of them are this program's own: on a processor without a hypervisor it prints what
//! VMRUN and #VMEXIT count there.
#![no_std]
#![no_main]
#![allow(unsafe_code, reason = "a bare-metal program")]

extern crate alloc;

mod figures;

use alloc::boxed::Box;
use core::arch::asm;
use core::error::Error;

use testudo_arch::cpuid::Cpuid;
use testudo_arch::regs::SystemRegisters;
use testudo_arch::{Gpa, Hpa};
use testudo_ept::PageTable;
use testudo_ept::format::npt::{Npt, NptFlags};
use testudo_rt::Boot;
use testudo_rt::memory::{self, Frames};
use testudo_svm::hw::{HostFrames, Svm};
use testudo_svm::intercept::{Misc1, Misc2};
use testudo_svm::permission::{IoPermissionMap, MsrPermissionMap};
use testudo_svm::vmcb::{NestedControl, VintrFlags, VirtualInterrupts, Vmcb};
use testudo_svm::{Exit, SvmCaps};

use figures::{Lowest, NOTES, frame};

/// How the guest exits: vmmcall.
const EXIT: [u8; 3] = [0x0F, 0x01, 0xD9];

testudo_rt::entry!(main);

fn main(boot: &'static Boot) -> u8 {
    figures::print(boot, measure)
}

fn measure(rounds: u32) -> Result<Lowest, Box<dyn Error>> {
    let caps = SvmCaps::from_cpuid(&Cpuid::of_this_processor())?;
    let page = frame()?;
    let table = PageTable::new(Npt::new(caps.physical_address_bits), Frames).ok_or("no memory")?;
    let rights = NptFlags::WRITABLE | NptFlags::ACCESSED | NptFlags::DIRTY;
    table.map(Gpa(0), 4096, page, rights)?;
    let guest = [NOTES.as_slice(), &EXIT].concat();
    // SAFETY: the frame is identity-mapped, ours, and longer than the code.
    unsafe { core::ptr::copy(guest.as_ptr(), page.0 as *mut u8, guest.len()) };

    let address = frame()?;
    // SAFETY: the frame is identity-mapped, zeroed and nobody else's.
    let vmcb = unsafe { &mut *(address.0 as *mut Vmcb) };
    vmcb.set_intercept_misc1(Misc1::all() - Misc1::RDTSC);
    vmcb.set_intercept_misc2(Misc2::all());
    vmcb.set_virtual_interrupts(VirtualInterrupts::default().insert(VintrFlags::V_INTR_MASKING));
    vmcb.set_iopm_base_pa(reserve(IoPermissionMap::SIZE)?.0);
    vmcb.set_msrpm_base_pa(reserve(MsrPermissionMap::SIZE)?.0);
    vmcb.set_asid(1);
    vmcb.set_nested_control(NestedControl::NP_ENABLE);
    vmcb.set_n_cr3(table.root().0);
    let mut start = SystemRegisters::reset();
    // EFER.SVME: VMRUN demands it.
    (start.cs.base, start.rip, start.efer) = (0, 0, 1 << 12);
    vmcb.set_system_registers(&start);

    let frames = HostFrames {
        save_area: frame()?,
        vmcb: frame()?,
    };
    // SAFETY: CPL 0, `caps` are this processor's, the frames are ours, and nobody moves us to another
    // processor or changes the host's segments.
    let mut svm = unsafe { Svm::enable(&caps, frames) }?;
    let _held = svm.hold_interrupts();
    let mut lowest = Lowest::NONE;
    for _ in 0..rounds {
        vmcb.set_rip(0);
        let (before, first): (u32, u32);
        let after: u64;
        // SAFETY: interrupts are held back; everything by which the guest could reach processor state is
        // intercepted, it reaches its own frame only, and it changes EAX, EDX and ESI. VMRUN leaves
        // through #VMEXIT, which restores RAX, RSP and the flow; no hidden register of the host's is
        // changed by the guest, so that VMLOAD is not due.
        unsafe {
            asm!(
                "mov rcx, rax",
                "rdtsc",
                "mov r8d, eax",
                "mov rax, rcx",
                "vmrun rax",
                "rdtsc",
                inout("rax") address.0 => after,
                in("r10") &raw mut *vmcb,
                lateout("r8d") before,
                lateout("esi") first,
                out("rcx") _, out("rdx") _,
            );
        }
        let Exit::Vmmcall = Exit::read(vmcb) else {
            return Err("the guest did not exit by its VMMCALL".into());
        };
        vmcb.mark_clean();
        lowest.take([before, first, vmcb.rax() as u32, after as u32]);
    }
    Ok(lowest)
}

fn reserve(bytes: usize) -> Result<Hpa, &'static str> {
    memory::reserve_zeroed(bytes as u64, 4096)
        .map(Hpa)
        .ok_or("no memory")
}
