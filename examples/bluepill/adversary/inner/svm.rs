//! Attempts with SVM.

use alloc::boxed::Box;
use core::arch::asm;
use core::ops::Range;

use testudo_arch::cpuid::Cpuid;
use testudo_arch::regs::SystemRegisters;
use testudo_arch::{FrameAlloc, Gpa, Hpa, Msr};
use testudo_ept::PageTable;
use testudo_ept::format::npt::{Npt, NptFlags};
use testudo_rt::msr;
use testudo_svm::hw::{GuestRegisters, HostFrames, Svm, VmcbFrame};
use testudo_svm::intercept::{Misc1, Misc2};
use testudo_svm::permission::{IoPermissionMap, MsrPermissionMap};
use testudo_svm::vmcb::{NestedControl, Vmcb};
use testudo_svm::{Exit, SvmCaps};

use super::{Frames, Outcome};
use crate::{check, lives, survives_vmrun};

const SVME: u64 = 1 << 12;

/// VMRUN, VMLOAD and VMSAVE of the hypervisor's addresses, also as the host save area and as permission maps.
pub(super) fn names_its_memory(secret: &[Range<u64>]) -> Outcome {
    let efer = msr::try_read(Msr::EFER.0).ok_or("there is no EFER")?;
    // SAFETY: SVM by itself changes nothing.
    let offered = unsafe { msr::try_write(Msr::EFER.0, efer | SVME) };
    check(offered, "SVM is not offered")?;
    let result = secret.iter().try_for_each(|range| {
        // SAFETY: what the guest's hypervisor writes there is lost at worst.
        unsafe { msr::try_write(Msr::VM_HSAVE_PA.0, range.start) };
        for page in range.clone().step_by(4096) {
            check(
                !survives_vmrun(page),
                "VMRUN takes its page for a control block",
            )?;
            check(
                !survives_vmload(page),
                "VMLOAD takes its page for a control block",
            )?;
            check(!survives_vmsave(page), "VMSAVE writes to its page")?;
        }
        Ok(())
    });
    // SAFETY: as it was.
    unsafe { msr::try_write(Msr::EFER.0, efer) };
    result?;
    check(lives(), "it is gone")
}

macro_rules! survives {
    ($name:ident, $instruction:literal) => {
        /// Whether the instruction raises no exception.
        fn $name(address: u64) -> bool {
            let mut faulted = 0_u32;
            // SAFETY: a fault continues at label 3, and a success is what is to be found.
            unsafe {
                asm!(
                    concat!("2: ", $instruction, " rax"),
                    "jmp 4f",
                    "3: mov {faulted:e}, 1",
                    "4:",
                    ".pushsection .rt_fixups, \"a\"",
                    ".quad 2b, 3b",
                    ".popsection",
                    faulted = inout(reg) faulted,
                    in("rax") address,
                    options(nostack),
                );
            }
            faulted == 0
        }
    };
}

survives!(survives_vmload, "vmload");
survives!(survives_vmsave, "vmsave");

/// Runs code in real mode, with the page at 0x1000 being `target`, to its HLT; gives RAX. With `maps`, that page
/// is also where the permission maps are said to be.
pub(super) fn run(code: &[u8], target: u64, maps: Option<u64>) -> Result<u64, &'static str> {
    let caps =
        SvmCaps::from_cpuid(&Cpuid::of_this_processor()).map_err(|_| "SVM is not offered")?;
    let frame = || Frames.alloc().ok_or("no memory");
    let page = frame()?;
    let format = Npt::new(caps.physical_address_bits);
    let table = PageTable::new(format, Frames).ok_or("no memory")?;
    let map = |gpa, hpa| {
        let mapped = table.map(Gpa(gpa), 4096, hpa, NptFlags::WRITABLE);
        mapped.map_err(|_| "the table cannot be made")
    };
    map(0, page)?;
    map(0x1000, Hpa(target))?;
    // SAFETY: the frame is identity-mapped, ours, and longer than the code.
    unsafe { core::ptr::copy(code.as_ptr(), page.0 as *mut u8, code.len()) };

    let address = frame()?;
    // SAFETY: the frame is identity-mapped, zeroed and nobody else's.
    let mut vmcb = unsafe { VmcbFrame::new(&mut *(address.0 as *mut Vmcb), address) };
    vmcb.set_intercept_misc1(Misc1::all());
    vmcb.set_intercept_misc2(Misc2::all());
    let (msr_map, io_map) = match maps {
        Some(at) => (at, at),
        None => (
            Box::into_raw(Box::new(MsrPermissionMap::intercept_all())) as u64,
            Box::into_raw(Box::new(IoPermissionMap::intercept_all())) as u64,
        ),
    };
    vmcb.set_msrpm_base_pa(msr_map);
    vmcb.set_iopm_base_pa(io_map);
    vmcb.set_asid(1);
    vmcb.set_nested_control(NestedControl::NP_ENABLE);
    vmcb.set_n_cr3(table.root().0);
    let mut start = SystemRegisters::reset();
    (start.cs.base, start.rip, start.efer) = (0, 0, SVME);
    vmcb.set_system_registers(&start);

    let frames = HostFrames {
        save_area: frame()?,
        vmcb: frame()?,
    };
    // SAFETY: CPL 0, `caps` are this processor's, the frames are ours, and nobody moves us to another
    // processor or changes the host's segments.
    let mut svm = unsafe { Svm::enable(&caps, frames) }.map_err(|_| "SVM cannot be enabled")?;
    let mut registers = GuestRegisters::default();
    let mut held = svm.hold_interrupts();
    let mut result = Err("the guest's guest does not end");
    for _ in 0..64 {
        // SAFETY: everything is intercepted, the guest has its own frame and what it may not reach, and no
        // other guest's registers are in the processor.
        unsafe { held.enter(&mut vmcb, &mut registers) };
        match Exit::read(&vmcb) {
            Exit::Hlt => {
                result = Ok(registers.gprs.rax);
                break;
            }
            Exit::Interrupt | Exit::Nmi => held.take_pending(),
            _ => {
                result = Err("the guest's guest stops for something else");
                break;
            }
        }
    }
    drop(held);
    svm.disable();
    result
}
