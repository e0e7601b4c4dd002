//! The smallest hypervisor: it runs one page of guest code on VT-x and prints each exit.
//!
//! Read it from top to bottom; `cargo xtask run tiny-vmx --emulator bochs --cpu vmx` runs it.
#![no_std]
#![no_main]
#![allow(unsafe_code, reason = "a bare-metal program")]

extern crate alloc;

use alloc::boxed::Box;
use alloc::string::ToString;
use core::error::Error;
use core::ptr::NonNull;

use testudo_arch::regs::SystemRegisters;
use testudo_arch::{FrameAlloc, Gpa, Hpa};
use testudo_ept::PageTable;
use testudo_ept::format::ept::{Ept, EptFlags};
use testudo_rt::memory::Frames;
use testudo_rt::{Boot, println};
use testudo_vmx::check::check_entry;
use testudo_vmx::controls::*;
use testudo_vmx::exit::{Exit, advance};
use testudo_vmx::hw::{GuestRegisters, HostState, RegionFrame, VmcsKind, Vmx};
use testudo_vmx::{VmcsRead, VmcsWrite, VmxCaps, fields, state};

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
    // What does the processor offer? Without VMX the error says so in words.
    // SAFETY: a bare-metal program runs at CPL 0.
    let caps = unsafe { Vmx::capabilities() }?;
    println!("{caps}");

    // The guest's memory: one frame at guest-physical 0, and nothing else.
    let page = frame()?;
    let ept = Ept::new(caps.processor.physical_address_bits);
    let table = PageTable::new(ept, Frames).ok_or("no memory")?;
    let rights = EptFlags::READ | EptFlags::WRITE | EptFlags::EXECUTE | EptFlags::WRITE_BACK;
    table.map(Gpa(0), 4096, page, rights)?;
    // SAFETY: the frame is identity-mapped, ours, and longer than the code.
    unsafe { core::ptr::copy(GUEST.as_ptr(), page.0 as *mut u8, GUEST.len()) };

    // Turn VMX on.
    // SAFETY: CPL 0, `caps` are this processor's, and nobody moves us to another.
    let mut vmx = unsafe { Vmx::enable(&caps, region()?) }?;
    let mut vmcs = vmx.create_vmcs(region()?, VmcsKind::Ordinary)?;
    let mut vmcs = vmx.load(&mut vmcs)?;

    // The VMCS: what the guest may not do, and the registers that both sides start with.
    state::initialize(&mut vmcs, &caps)?;
    set_controls(&mut vmcs, &caps)?;
    vmcs.set(fields::EPT_POINTER, ept.pointer(table.root()))?;
    // SAFETY: CPL 0, 64-bit mode, and the runtime gives every vector a stack of its own.
    unsafe { HostState::of_this_processor() }.write(&mut vmcs)?;
    let mut start = SystemRegisters::reset();
    (start.cs.base, start.rip) = (0, 0);
    // VMX fixes NE and VMXE; an unrestricted guest may clear PE and PG.
    (start.cr0, start.cr4) = (start.cr0 | caps.cr0.ones & !0x8000_0001, caps.cr4.ones);
    state::write_system_registers(&mut vmcs, &start)?;

    // Run.
    let mut registers = GuestRegisters::default();
    loop {
        // SAFETY: interrupts, NMIs, ports and MSRs exit, the guest reaches its own frame only, and
        // no other guest's registers or translations are in the processor.
        if let Err(fail) = unsafe { vmcs.enter(&mut registers) } {
            // The entry failed: the same rules as the processor's say why.
            println!("{fail}");
            return Err(check_entry(&vmcs, &caps)?.to_string().into());
        }
        let exit = Exit::read(&vmcs)?;
        println!("{:#06x}: {exit}", vmcs.get(fields::GUEST_RIP)?);
        match exit {
            Exit::Cpuid => {
                let gprs = &mut registers.gprs;
                (gprs.rax, gprs.rbx, gprs.rcx, gprs.rdx) = (0x4000_0000, 0, 0, 0);
            }
            Exit::Hlt => {}
            Exit::EptViolation(_) => return Ok(()),
            // Invalid guest state shows only now; again the rules say why.
            Exit::EntryFailure(_) => return Err(check_entry(&vmcs, &caps)?.to_string().into()),
            _ => return Err("the guest did what this hypervisor does not handle".into()),
        }
        advance(&mut vmcs)?;
    }
}

/// Asks for the controls by name; the error names those that the processor does not offer.
fn set_controls(vmcs: &mut impl VmcsWrite, caps: &VmxCaps) -> Result<(), Box<dyn Error>> {
    let pin = PinControls::EXTERNAL_INTERRUPT_EXITING | PinControls::NMI_EXITING;
    let primary = PrimaryControls::HLT_EXITING
        | PrimaryControls::UNCONDITIONAL_IO_EXITING
        | PrimaryControls::ACTIVATE_SECONDARY_CONTROLS;
    let secondary = SecondaryControls::ENABLE_EPT | SecondaryControls::UNRESTRICTED_GUEST;
    let exit =
        ExitControls::HOST_ADDRESS_SPACE_SIZE | ExitControls::SAVE_EFER | ExitControls::LOAD_EFER;
    let entry = EntryControls::LOAD_EFER;
    vmcs.set(fields::PIN_CONTROLS, caps.pin.require(pin)?.bits())?;
    vmcs.set(
        fields::PRIMARY_CONTROLS,
        caps.primary.require(primary)?.bits(),
    )?;
    vmcs.set(
        fields::SECONDARY_CONTROLS,
        caps.secondary.require(secondary)?.bits(),
    )?;
    vmcs.set(fields::EXIT_CONTROLS, caps.exit.require(exit)?.bits())?;
    vmcs.set(fields::ENTRY_CONTROLS, caps.entry.require(entry)?.bits())?;
    vmcs.set(fields::EXCEPTION_BITMAP, u32::MAX)?;
    Ok(())
}

fn frame() -> Result<Hpa, &'static str> {
    Frames.alloc().ok_or("no memory")
}

/// A frame for the processor's own structures.
fn region() -> Result<RegionFrame, &'static str> {
    let address = frame()?;
    let pointer = NonNull::new(address.0 as *mut u8).ok_or("no memory")?;
    // SAFETY: the frame is identity-mapped and nobody else's.
    Ok(unsafe { RegionFrame::new(pointer, address) })
}
