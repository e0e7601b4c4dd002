//! The smallest hypervisor: it runs one page of guest code on AMD-V and prints each exit.
//!
//! Read it from top to bottom; `cargo xtask run tiny-svm` runs it.
#![no_std]
#![no_main]
#![allow(unsafe_code, reason = "a bare-metal program")]

extern crate alloc;

use alloc::boxed::Box;
use alloc::string::ToString;
use core::error::Error;

use testudo_arch::cpuid::Cpuid;
use testudo_arch::regs::SystemRegisters;
use testudo_arch::{FrameAlloc, Gpa, Hpa};
use testudo_ept::PageTable;
use testudo_ept::format::npt::{Npt, NptFlags};
use testudo_rt::memory::{self, Frames};
use testudo_rt::{Boot, println};
use testudo_svm::check::{Outside, check_vmrun};
use testudo_svm::hw::{GuestRegisters, HostFrames, Svm, VmcbFrame};
use testudo_svm::intercept::{Misc1, Misc2};
use testudo_svm::permission::{IoPermissionMap, MsrPermissionMap};
use testudo_svm::vmcb::{NestedControl, VintrFlags, VirtualInterrupts, Vmcb};
use testudo_svm::{Exit, SvmCaps};

/// What the guest runs, in real mode from address 0.
const GUEST: &[u8] = &[
    0x66, 0xB8, 0x00, 0x00, 0x00, 0x40, // mov eax, 0x40000000
    0x0F, 0xA2, // cpuid
    0xF4, // hlt
    0xA1, 0x00, 0x20, // mov ax, [0x2000]: beyond its one page
];

testudo_rt::entry!(main);

fn main(_: &'static Boot) -> u8 {
    let Err(error) = run() else { return 0 };
    println!("{error}");
    1
}

fn run() -> Result<(), Box<dyn Error>> {
    // What does the processor offer? Without SVM the error says so in words.
    let caps = SvmCaps::from_cpuid(&Cpuid::of_this_processor())?;
    println!("{caps}");

    // The guest's memory: one frame at guest-physical 0, and nothing else.
    let page = frame()?;
    let table = PageTable::new(Npt::new(caps.physical_address_bits), Frames).ok_or("no memory")?;
    table.map(Gpa(0), 4096, page, NptFlags::WRITABLE)?;
    // SAFETY: the frame is identity-mapped, ours, and longer than the code.
    unsafe { core::ptr::copy(GUEST.as_ptr(), page.0 as *mut u8, GUEST.len()) };

    // The VMCB: what the guest may not do, and the registers that it starts with.
    let address = frame()?;
    // SAFETY: the frame is identity-mapped, zeroed and nobody else's.
    let mut vmcb = unsafe { VmcbFrame::new(&mut *(address.0 as *mut Vmcb), address) };
    vmcb.set_intercept_misc1(Misc1::all());
    vmcb.set_intercept_misc2(Misc2::all());
    vmcb.set_virtual_interrupts(VirtualInterrupts::default().insert(VintrFlags::V_INTR_MASKING));
    vmcb.set_iopm_base_pa(all_ones(IoPermissionMap::SIZE)?);
    vmcb.set_msrpm_base_pa(all_ones(MsrPermissionMap::SIZE)?);
    vmcb.set_asid(1);
    vmcb.set_nested_control(NestedControl::NP_ENABLE);
    vmcb.set_n_cr3(table.root().0);
    let mut start = SystemRegisters::reset();
    (start.cs.base, start.rip, start.efer) = (0, 0, 1 << 12); // EFER.SVME: VMRUN demands it
    vmcb.set_system_registers(&start);

    // Turn SVM on, and run.
    let frames = HostFrames {
        save_area: frame()?,
        vmcb: frame()?,
    };
    // SAFETY: CPL 0, `caps` are this processor's, the frames are ours, and nobody moves us to
    // another processor or changes the host's segments.
    let mut svm = unsafe { Svm::enable(&caps, frames) }?;
    let mut held = svm.hold_interrupts();
    let mut registers = GuestRegisters::default();
    loop {
        // SAFETY: everything is intercepted, the guest reaches its own frame only, it is the only
        // one with ASID 1, and no other guest's registers are in the processor.
        unsafe { held.enter(&mut vmcb, &mut registers) };
        let exit = Exit::read(&vmcb);
        println!("{:#06x}: {exit}", vmcb.rip());
        let length = match exit {
            Exit::Cpuid => {
                let gprs = &mut registers.gprs;
                (gprs.rax, gprs.rbx, gprs.rcx, gprs.rdx) = (0x4000_0000, 0, 0, 0);
                2
            }
            Exit::Hlt => 1,
            Exit::NestedPageFault(_) => return Ok(()),
            // The entry failed: the same rules as the processor's say why.
            Exit::Invalid => {
                let broken = check_vmrun(&vmcb, &caps, &Outside::default());
                return Err(broken.to_string().into());
            }
            _ => return Err("the guest did what this hypervisor does not handle".into()),
        };
        let next = vmcb.rip().wrapping_add(length);
        vmcb.set_rip(next);
    }
}

fn frame() -> Result<Hpa, &'static str> {
    Frames.alloc().ok_or("no memory")
}

/// Memory whose every bit is set: a permission map under which everything exits.
fn all_ones(bytes: usize) -> Result<u64, &'static str> {
    let start = memory::reserve(bytes as u64, 4096).ok_or("no memory")?;
    // SAFETY: the range is identity-mapped and ours.
    unsafe { core::ptr::write_bytes(start as *mut u8, 0xFF, bytes) };
    Ok(start)
}
