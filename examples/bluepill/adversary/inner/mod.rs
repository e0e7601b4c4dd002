//! Attempts with the virtualization extension, which the hypervisor gives to its guest.

mod svm;
mod vmx;

use core::ops::Range;
use core::sync::atomic::{AtomicBool, Ordering};

use testudo_rt::memory::Frames;
use testudo_rt::{cpu, time};

use crate::{
    APIC, ICR_HIGH, ICR_LOW, INIT, beats, check, has_vmx, lives, read, send_init, start_again,
};

pub(crate) type Outcome = Result<(), &'static str>;

/// The hypervisor's addresses as operands: of VMRUN, VMLOAD and VMSAVE, or of VMXON, VMCLEAR, VMPTRLD and
/// VMPTRST.
pub(crate) fn names_its_memory(secret: &[Range<u64>]) -> Outcome {
    if has_vmx() {
        vmx::names_its_memory(secret)
    } else {
        svm::names_its_memory(secret)
    }
}

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

/// INIT for a processor in VMX root operation, which takes it when it has left that (SDM vol. 3C, 26.8).
pub(crate) fn resets_in_vmx_operation(_: &[Range<u64>]) -> Outcome {
    if !has_vmx() {
        return Ok(());
    }
    let wait_for = |operation| {
        WISH.store(operation, Ordering::Release);
        let deadline = time::now_ns() + 1_000_000_000;
        while IN_OPERATION.load(Ordering::Acquire) != operation && time::now_ns() < deadline {
            core::hint::spin_loop();
        }
        IN_OPERATION.load(Ordering::Acquire) == operation
    };
    check(wait_for(true), "the other processor's VMXON fails")?;
    send_init();
    check(beats(), "INIT is not blocked in VMX operation")?;
    check(wait_for(false), "the other processor's VMXOFF fails")?;
    check(!beats(), "INIT is lost")?;
    start_again()
}

/// Whether the other processor is to be in VMX operation, and whether it is.
static WISH: AtomicBool = AtomicBool::new(false);
static IN_OPERATION: AtomicBool = AtomicBool::new(false);

/// What the other processor does beside beating.
pub(crate) fn follow_wish() {
    let wish = WISH.load(Ordering::Acquire);
    if wish != IN_OPERATION.load(Ordering::Relaxed) {
        // INIT may come right after VMXOFF.
        if !wish {
            IN_OPERATION.store(false, Ordering::Release);
        }
        if vmx::operate(wish) && wish {
            IN_OPERATION.store(true, Ordering::Release);
        }
    }
}

/// Runs code in real mode, with the page at 0x1000 being `target`, to its HLT; gives RAX. With `maps`, that page
/// is also where the structures are said to be that the processor reads beside the table.
fn run(code: &[u8], target: u64, maps: Option<u64>) -> Result<u64, &'static str> {
    if has_vmx() {
        vmx::run(code, target, maps)
    } else {
        svm::run(code, target, maps)
    }
}
