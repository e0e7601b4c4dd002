//! What running a guest costs a hypervisor that is a guest itself, on VT-x.
//!
//! It enables VMX, runs a guest of two RDTSC and a VMCALL on EPT, and prints two lines of `NAME TICKS`:
//! `vmrun`, from before VMRESUME to the guest's first instruction, and `vmexit`, from the guest's last
//! instruction to the first one at HOST_RIP. Where the TSC counts instructions the figures are exact, and a
//! few of them are this program's own: on a processor without a hypervisor it prints what VMRESUME and a VM
//! exit count there.
//!
//! Before each entry it does what a hypervisor's exit handler does: it reads the reason and the guest's RIP,
//! and writes RIP and HOST_RSP.
#![no_std]
#![no_main]
#![allow(unsafe_code, reason = "a bare-metal program")]

extern crate alloc;

mod figures;

use alloc::boxed::Box;
use alloc::string::ToString;
use core::arch::naked_asm;
use core::error::Error;
use core::ptr::NonNull;

use testudo_arch::regs::SystemRegisters;
use testudo_arch::{Gpa, Hpa};
use testudo_ept::PageTable;
use testudo_ept::format::ept::{Ept, EptFlags};
use testudo_rt::Boot;
use testudo_rt::memory::Frames;
use testudo_vmx::check::check_entry;
use testudo_vmx::controls::*;
use testudo_vmx::exit::Exit;
use testudo_vmx::hw::{HostState, RegionFrame, VmcsKind, Vmx};
use testudo_vmx::{VmcsRead, VmcsWrite, VmxCaps, fields, state};

use figures::{Lowest, NOTES, frame};

/// How the guest exits: vmcall.
const EXIT: [u8; 3] = [0x0F, 0x01, 0xC1];

testudo_rt::entry!(main);

fn main(boot: &'static Boot) -> u8 {
    figures::print(boot, measure)
}

fn measure(rounds: u32) -> Result<Lowest, Box<dyn Error>> {
    // SAFETY: a bare-metal program runs at CPL 0.
    let caps = unsafe { Vmx::capabilities() }?;
    let page = frame()?;
    let ept = Ept::new(caps.processor.physical_address_bits);
    let table = PageTable::new(ept, Frames).ok_or("no memory")?;
    let rights = EptFlags::READ | EptFlags::WRITE | EptFlags::EXECUTE | EptFlags::WRITE_BACK;
    table.map(Gpa(0), 4096, page, rights)?;
    let guest = [NOTES.as_slice(), &EXIT].concat();
    // SAFETY: the frame is identity-mapped, ours, and longer than the code.
    unsafe { core::ptr::copy(guest.as_ptr(), page.0 as *mut u8, guest.len()) };

    // SAFETY: CPL 0, `caps` are this processor's, and nobody moves us to another.
    let mut vmx = unsafe { Vmx::enable(&caps, region()?) }?;
    let _held = vmx.hold_interrupts();
    let mut vmcs = vmx.create_vmcs(region()?, VmcsKind::Ordinary)?;
    let mut vmcs = vmx.load(&mut vmcs)?;
    state::initialize(&mut vmcs, &caps)?;
    set_controls(&mut vmcs, &caps)?;
    vmcs.set(fields::EPT_POINTER, ept.pointer(table.root()))?;
    // SAFETY: CPL 0, 64-bit mode, and the runtime gives every vector a stack of its own.
    unsafe { HostState::of_this_processor() }.write(&mut vmcs)?;
    vmcs.set(fields::HOST_RIP, arrive as *const () as u64)?;
    let mut start = SystemRegisters::reset();
    (start.cs.base, start.rip) = (0, 0);
    // VMX fixes NE and VMXE; an unrestricted guest may clear PE and PG.
    (start.cr0, start.cr4) = (start.cr0 | caps.cr0.ones & !0x8000_0001, caps.cr4.ones);
    state::write_system_registers(&mut vmcs, &start)?;

    let mut lowest = Lowest::NONE;
    for round in 0..rounds {
        let mut ticks = [0; 4];
        // SAFETY: the VMCS is current, and launched by the first round; ports, MSRs and interrupts exit, and
        // the guest reaches its own frame only and changes EAX, EDX and ESI. Exits arrive at `arrive`.
        if unsafe { enter(u64::from(round > 0), &mut ticks) } != 0 {
            return Err(check_entry(&vmcs, &caps)?.to_string().into());
        }
        let (reason, rip) = (vmcs.get(fields::EXIT_REASON)?, vmcs.get(fields::GUEST_RIP)?);
        if reason != VMCALL || rip + 3 != guest.len() as u64 {
            return Err(Exit::read(&vmcs)?.to_string().into());
        }
        vmcs.set(fields::GUEST_RIP, 0)?;
        lowest.take(ticks);
    }
    Ok(lowest)
}

/// The exit reason of VMCALL.
const VMCALL: u32 = testudo_vmx::exit::BasicReason::Vmcall.number() as u32;

/// Enters the guest, by VMRESUME if `launched`, and writes the four ticks when it has left again. Not 0 if the
/// entry failed.
///
/// # Safety
///
/// The current VMCS confines the guest, and its exits arrive at [`arrive`].
#[unsafe(naked)]
unsafe extern "C" fn enter(launched: u64, ticks: &mut [u32; 4]) -> u64 {
    naked_asm!(
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "push rsi",
        "mov eax, {host_rsp}",
        "vmwrite rax, rsp",
        "test rdi, rdi",
        "rdtsc",
        "mov r8d, eax",
        "jz 2f",
        "vmresume",
        "jmp 3f",
        "2:",
        "vmlaunch",
        "3:",
        "mov eax, 1",
        "jmp {leave}",
        host_rsp = const testudo_vmx::fields::HOST_RSP.encoding().0,
        leave = sym leave,
    )
}

/// Where exits arrive, with the stack that [`enter`] left: the guest's ticks are in ESI and EAX.
#[unsafe(naked)]
unsafe extern "C" fn arrive() {
    naked_asm!(
        "mov ecx, eax",
        "rdtsc",
        "pop rdi",
        "push rdi",
        "mov [rdi], r8d",
        "mov [rdi + 4], esi",
        "mov [rdi + 8], ecx",
        "mov [rdi + 12], eax",
        "xor eax, eax",
        "jmp {leave}",
        leave = sym leave,
    )
}

/// The end of both.
#[unsafe(naked)]
unsafe extern "C" fn leave() {
    naked_asm!(
        "pop rsi", "pop r15", "pop r14", "pop r13", "pop r12", "pop rbp", "pop rbx", "ret",
    )
}

fn set_controls(vmcs: &mut impl VmcsWrite, caps: &VmxCaps) -> Result<(), Box<dyn Error>> {
    let pin = PinControls::EXTERNAL_INTERRUPT_EXITING | PinControls::NMI_EXITING;
    let primary = PrimaryControls::HLT_EXITING
        | PrimaryControls::UNCONDITIONAL_IO_EXITING
        | PrimaryControls::ACTIVATE_SECONDARY_CONTROLS;
    let secondary = SecondaryControls::ENABLE_EPT | SecondaryControls::UNRESTRICTED_GUEST;
    let exit =
        ExitControls::HOST_ADDRESS_SPACE_SIZE | ExitControls::SAVE_EFER | ExitControls::LOAD_EFER;
    let entry = EntryControls::LOAD_EFER;
    let (primary, secondary) = (
        caps.primary.require(primary)?,
        caps.secondary.require(secondary)?,
    );
    vmcs.set(fields::PIN_CONTROLS, caps.pin.require(pin)?.bits())?;
    vmcs.set(fields::PRIMARY_CONTROLS, primary.bits())?;
    vmcs.set(fields::SECONDARY_CONTROLS, secondary.bits())?;
    vmcs.set(fields::EXIT_CONTROLS, caps.exit.require(exit)?.bits())?;
    vmcs.set(fields::ENTRY_CONTROLS, caps.entry.require(entry)?.bits())?;
    vmcs.set(fields::EXCEPTION_BITMAP, u32::MAX)?;
    Ok(())
}

/// A frame for the processor's own structures.
fn region() -> Result<RegionFrame, &'static str> {
    let address: Hpa = frame()?;
    let pointer = NonNull::new(address.0 as *mut u8).ok_or("no memory")?;
    // SAFETY: the frame is identity-mapped and nobody else's.
    Ok(unsafe { RegionFrame::new(pointer, address) })
}
