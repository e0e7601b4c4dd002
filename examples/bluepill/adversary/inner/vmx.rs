//! Attempts with VMX.

use core::arch::asm;
use core::error::Error;
use core::ops::Range;
use core::ptr::NonNull;

use alloc::boxed::Box;

use testudo_arch::regs::SystemRegisters;
use testudo_arch::{Cr0Flags, FrameAlloc, Gpa, Hpa};
use testudo_ept::PageTable;
use testudo_ept::format::ept::{Ept, EptFlags};
use testudo_vmx::controls::{
    EntryControls, ExitControls, PinControls, PrimaryControls, SecondaryControls,
};
use testudo_vmx::exit::Exit;
use testudo_vmx::hw::instructions as raw;
use testudo_vmx::hw::{GuestRegisters, HostState, RegionFrame, VmcsKind, Vmx};
use testudo_vmx::{VmcsWrite, VmxCaps, fields, state};

use super::{Frames, Outcome};
use crate::{VMXE, check, cr4, lives, try_set_cr4};

/// VMXON, VMPTRLD, VMCLEAR and VMPTRST of the hypervisor's addresses.
pub(super) fn names_its_memory(secret: &[Range<u64>]) -> Outcome {
    // SAFETY: CPL 0.
    let caps = unsafe { Vmx::capabilities() }.map_err(|_| "VMX is not offered")?;
    check(try_set_cr4(cr4() | VMXE), "CR4.VMXE cannot be set")?;
    let pages = || secret.iter().flat_map(|range| range.clone().step_by(4096));
    for page in pages() {
        // SAFETY: CR0 and CR4 suit; that it fails is what is to be found.
        let taken = unsafe { raw::vmxon(Hpa(page)) }.is_ok();
        check(!taken, "VMXON takes its page for a region")?;
    }
    let own = Frames.alloc().ok_or("no memory")?;
    // SAFETY: the frame is ours, zeroed and identity-mapped.
    unsafe { (own.0 as *mut u32).write(caps.basic.revision()) };
    // SAFETY: the region is as it must be.
    unsafe { raw::vmxon(own) }.map_err(|_| "VMXON fails")?;
    check(
        !try_set_cr4(cr4() & !VMXE),
        "CR4.VMXE can be cleared in VMX operation",
    )?;
    for page in pages() {
        // SAFETY: in VMX operation; what would be made of its memory is what is to be found.
        unsafe {
            let _no_effect = raw::vmclear(Hpa(page)).is_err();
            check(
                raw::vmptrld(Hpa(page)).is_err(),
                "VMPTRLD takes its page for a VMCS",
            )?;
            asm!("vmptrst [{}]", in(reg) page, options(nostack));
        }
    }
    // SAFETY: no VMCS is active.
    unsafe { raw::vmxoff() }.map_err(|_| "VMXOFF fails")?;
    check(try_set_cr4(cr4() & !VMXE), "CR4.VMXE cannot be cleared")?;
    check(lives(), "it is gone")
}

/// Enters or leaves VMX operation; whether it succeeded.
pub(super) fn operate(wish: bool) -> bool {
    if !wish {
        // SAFETY: in VMX operation, with no VMCS.
        return unsafe { raw::vmxoff() }.is_ok() && try_set_cr4(cr4() & !VMXE);
    }
    // SAFETY: CPL 0.
    let (Ok(caps), Some(own)) = (unsafe { Vmx::capabilities() }, Frames.alloc()) else {
        return false;
    };
    // SAFETY: the frame is ours, zeroed and identity-mapped; CR0 and CR4 suit.
    unsafe {
        (own.0 as *mut u32).write(caps.basic.revision());
        try_set_cr4(cr4() | VMXE) && raw::vmxon(own).is_ok()
    }
}

/// See [`super::run`].
pub(super) fn run(code: &[u8], target: u64, maps: Option<u64>) -> Result<u64, &'static str> {
    // SAFETY: CPL 0.
    let caps = unsafe { Vmx::capabilities() }.map_err(|_| "VMX is not offered")?;
    let page = Frames.alloc().ok_or("no memory")?;
    let format = Ept::new(caps.processor.physical_address_bits);
    let table = PageTable::new(format, Frames).ok_or("no memory")?;
    let flags = EptFlags::READ | EptFlags::WRITE | EptFlags::EXECUTE | EptFlags::WRITE_BACK;
    let map = |gpa, hpa| {
        let mapped = table.map(Gpa(gpa), 4096, hpa, flags);
        mapped.map_err(|_| "the table cannot be made")
    };
    map(0, page)?;
    map(0x1000, Hpa(target))?;
    // SAFETY: the frame is identity-mapped, ours, and longer than the code.
    unsafe { core::ptr::copy(code.as_ptr(), page.0 as *mut u8, code.len()) };

    // SAFETY: CPL 0, `caps` are this processor's, and nobody moves us to another.
    let mut vmx = unsafe { Vmx::enable(&caps, region()?) }.map_err(|_| "VMX cannot be enabled")?;
    const NO_VMCS: &str = "a VMCS cannot be made";
    let mut own = vmx
        .create_vmcs(region()?, VmcsKind::Ordinary)
        .map_err(|_| NO_VMCS)?;
    let mut held = vmx.hold_interrupts();
    let mut vmcs = vmx.load(&mut own).map_err(|_| NO_VMCS)?;
    prepare(&mut vmcs, &caps, maps).map_err(|_| "the VMCS cannot be written")?;
    let pointer = format.pointer(table.root());
    vmcs.set(fields::EPT_POINTER, pointer)
        .map_err(|_| "the VMCS cannot be written")?;

    let mut registers = GuestRegisters::default();
    let mut result = Err("the guest's guest does not end");
    for _ in 0..64 {
        // SAFETY: what is not to exit is in the guest's own hands, which has a frame and the target.
        if unsafe { vmcs.enter(&mut registers) }.is_err() {
            result = Err("VM entry fails");
            break;
        }
        match Exit::read(&vmcs) {
            Ok(Exit::Hlt) => {
                result = Ok(registers.gprs.rax);
                break;
            }
            Ok(Exit::ExternalInterrupt { .. }) => held.take_pending(),
            _ => {
                result = Err("the guest's guest stops for something else");
                break;
            }
        }
    }
    drop(held);
    let cleared = vmx.clear(own);
    cleared.map_err(|_| "the VMCS cannot be cleared")?;
    // SAFETY: the only VMCS is clear.
    unsafe { vmx.disable() }.map_err(|_| "VMX cannot be left")?;
    result
}

/// Controls and state for a guest in real mode that begins at address 0.
fn prepare(
    vmcs: &mut impl VmcsWrite,
    caps: &VmxCaps,
    maps: Option<u64>,
) -> Result<(), Box<dyn Error>> {
    state::initialize(vmcs, caps)?;
    let pin = PinControls::EXTERNAL_INTERRUPT_EXITING | PinControls::NMI_EXITING;
    let bitmaps = match maps {
        Some(_) => PrimaryControls::USE_MSR_BITMAPS | PrimaryControls::USE_IO_BITMAPS,
        None => PrimaryControls::UNCONDITIONAL_IO_EXITING,
    };
    let primary =
        PrimaryControls::HLT_EXITING | PrimaryControls::ACTIVATE_SECONDARY_CONTROLS | bitmaps;
    let secondary = SecondaryControls::ENABLE_EPT | SecondaryControls::UNRESTRICTED_GUEST;
    let exit =
        ExitControls::HOST_ADDRESS_SPACE_SIZE | ExitControls::SAVE_EFER | ExitControls::LOAD_EFER;
    let entry = EntryControls::LOAD_EFER;
    vmcs.set(fields::PIN_CONTROLS, caps.pin.require(pin)?.bits())?;
    let primary = caps.primary.require(primary)?;
    vmcs.set(fields::PRIMARY_CONTROLS, primary.bits())?;
    let secondary = caps.secondary.require(secondary)?;
    vmcs.set(fields::SECONDARY_CONTROLS, secondary.bits())?;
    vmcs.set(fields::EXIT_CONTROLS, caps.exit.require(exit)?.bits())?;
    vmcs.set(fields::ENTRY_CONTROLS, caps.entry.require(entry)?.bits())?;
    vmcs.set(fields::EXCEPTION_BITMAP, u32::MAX)?;
    if let Some(at) = maps {
        vmcs.set(fields::MSR_BITMAPS, at)?;
        vmcs.set(fields::IO_BITMAP_A, at)?;
        vmcs.set(fields::IO_BITMAP_B, at)?;
    }
    // SAFETY: CPL 0, 64-bit mode, and the runtime gives every vector a stack of its own.
    unsafe { HostState::of_this_processor() }.write(vmcs)?;
    let mut start = SystemRegisters::reset();
    (start.cs.base, start.rip) = (0, 0);
    let free = Cr0Flags::PROTECTED_MODE_ENABLE | Cr0Flags::PAGING;
    start.cr0 |= caps.cr0.ones & !free.bits();
    start.cr4 = caps.cr4.ones;
    state::write_system_registers(vmcs, &start)?;
    Ok(())
}

/// A frame for the processor's own structures.
fn region() -> Result<RegionFrame, &'static str> {
    let address = Frames.alloc().ok_or("no memory")?;
    let pointer = NonNull::new(address.0 as *mut u8).ok_or("no memory")?;
    // SAFETY: the frame is identity-mapped and nobody else's.
    Ok(unsafe { RegionFrame::new(pointer, address) })
}
