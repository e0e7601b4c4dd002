//! Attempts with SVM: the hypervisor gives it to its guest.

use alloc::boxed::Box;
use core::arch::asm;
use core::ops::Range;
use core::sync::atomic::{AtomicU64, Ordering};

use testudo_arch::cpuid::Cpuid;
use testudo_arch::regs::SystemRegisters;
use testudo_arch::{FrameAlloc, FrameMem, Gpa, Hpa, Msr};
use testudo_ept::PageTable;
use testudo_ept::format::npt::{Npt, NptFlags};
use testudo_rt::{cpu, memory, msr};
use testudo_svm::hw::{GuestRegisters, HostFrames, Svm, VmcbFrame};
use testudo_svm::intercept::{Misc1, Misc2};
use testudo_svm::permission::{IoPermissionMap, MsrPermissionMap};
use testudo_svm::vmcb::{NestedControl, Vmcb};
use testudo_svm::{Exit, SvmCaps};

use crate::{APIC, ICR_HIGH, ICR_LOW, INIT, beats, check, lives, read, survives_vmrun};

const SVME: u64 = 1 << 12;

type Outcome = Result<(), &'static str>;

/// VMRUN, VMLOAD and VMSAVE of the hypervisor's addresses, also as the host save area and as permission maps.
pub(crate) fn names_its_memory(secret: &[Range<u64>]) -> Outcome {
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

/// Writes to 0x1000 and reads it back into AX.
const WRITER: &[u8] = &[
    0xC7, 0x06, 0x00, 0x10, 0x34, 0x12, // mov word [0x1000], 0x1234
    0xA1, 0x00, 0x10, // mov ax, [0x1000]
    0xF4, // hlt
];

/// A guest whose page at 0x1000 is one of the hypervisor's, by a table and maps that name its pages too.
pub(crate) fn writes_its_memory(secret: &[Range<u64>]) -> Outcome {
    let target = secret.first().ok_or("nothing is reserved")?.start;
    let ax = run(WRITER, target, Some(target))?;
    check(ax as u16 == 0x1234, "its guest does not get on")?;
    check(
        read(target) as u16 == 0x1234,
        "the guest and its guest see different pages",
    )?;
    check(lives(), "it is gone")
}

/// A guest that sends INIT to the other processor, by the local APIC's page.
pub(crate) fn resets_a_processor(_: &[Range<u64>]) -> Outcome {
    check(beats(), "the other processor does not run")?;
    let number = cpu::apic_id(1) << 24;
    let [a, b, c, d] = number.to_le_bytes();
    let [e, f, g, h] = INIT.to_le_bytes();
    let (high, low) = (0x1000 + ICR_HIGH as u16, 0x1000 + ICR_LOW as u16);
    let ([i, j], [k, l]) = (high.to_le_bytes(), low.to_le_bytes());
    let code = [
        0x66, 0xC7, 0x06, i, j, a, b, c, d, // mov dword [high], number
        0x66, 0xC7, 0x06, k, l, e, f, g, h,    // mov dword [low], INIT
        0xF4, // hlt
    ];
    run(&code, APIC, None)?;
    check(!beats(), "INIT has no effect")?;
    check(lives(), "it is gone")
}

/// Runs code in real mode, with the page at 0x1000 being `target`, to its HLT; gives RAX. With `maps`, that page
/// is also where the permission maps are said to be.
fn run(code: &[u8], target: u64, maps: Option<u64>) -> Result<u64, &'static str> {
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

/// The runtime's frames, which it has mapped at their own addresses.
#[derive(Clone, Copy)]
struct Frames;

// SAFETY: the runtime hands out each frame once, zeroed.
unsafe impl FrameAlloc for Frames {
    fn alloc(&self) -> Option<Hpa> {
        memory::alloc_frame().map(Hpa)
    }

    fn free(&self, frame: Hpa) {
        // SAFETY: `frame` came from `alloc`, and nobody refers to it, says the trait.
        unsafe { memory::release(frame.0, 4096) };
    }
}

impl FrameMem for Frames {
    fn load(&self, entry: Hpa) -> u64 {
        at(entry).load(Ordering::Acquire)
    }

    fn store(&self, entry: Hpa, value: u64) {
        at(entry).store(value, Ordering::Release);
    }

    fn compare_exchange(&self, entry: Hpa, current: u64, new: u64) -> Result<u64, u64> {
        at(entry).compare_exchange(current, new, Ordering::AcqRel, Ordering::Acquire)
    }
}

fn at(entry: Hpa) -> &'static AtomicU64 {
    // SAFETY: an aligned entry of a frame from `alloc`, which is identity-mapped and stays so.
    unsafe { AtomicU64::from_ptr(entry.0 as *mut u64) }
}
