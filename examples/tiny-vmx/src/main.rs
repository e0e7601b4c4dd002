//! The smallest hypervisor on Intel VT-x: its guest executes CPUID and HLT, and every exit is printed.
//!
//! `cargo xtask run tiny-vmx --emulator bochs --cpu vmx`
#![no_std]
#![no_main]
#![allow(unsafe_code, reason = "a hypervisor on bare metal")]

extern crate alloc;

use alloc::boxed::Box;
use core::arch::naked_asm;
use core::ptr::NonNull;

use testudo_arch::Hpa;
use testudo_arch::regs::SystemRegisters;
use testudo_arch::segment::{Segment, SegmentAttributes};
use testudo_rt::{Boot, memory, println};
use testudo_vmx::controls::{
    EntryControls, ExitControls, PinControls, PrimaryControls, SecondaryControls,
};
use testudo_vmx::exit::{self, Exit};
use testudo_vmx::hw::{GuestRegisters, HostState, RegionFrame, VmcsKind, Vmx};
use testudo_vmx::{VmcsRead, VmcsWrite, VmxCaps, fields, state};

testudo_rt::entry!(main);

type Error = Box<dyn core::error::Error>;

fn main(_boot: &'static Boot) -> u8 {
    match run() {
        Ok(exits) => println!("the guest halted after {exits} exits"),
        Err(error) => println!("tiny-vmx: {error}"),
    }
    0
}

/// What the guest runs: CPUID twice, then HLT.
#[unsafe(naked)]
unsafe extern "C" fn guest() {
    naked_asm!(
        "xor eax, eax",
        "cpuid",
        "mov eax, 0x40000000",
        "cpuid",
        "hlt"
    );
}

fn run() -> Result<u64, Error> {
    // SAFETY: a bare-metal program runs at CPL 0, and this one stays on its processor.
    let (caps, mut vmx) = unsafe {
        let caps = Vmx::capabilities()?;
        let vmx = Vmx::enable(&caps, frame()?)?;
        (caps, vmx)
    };
    println!(
        "VMX is on; the processor's VMCS revision is {:#x}",
        caps.basic.revision()
    );
    let mut vmcs = vmx.create_vmcs(frame()?, VmcsKind::Ordinary)?;
    let mut current = vmx.load(&mut vmcs)?;

    set_controls(&mut current, &caps)?;
    // SAFETY: CPL 0 in 64-bit mode; the runtime has a TSS with a stack for every vector.
    let host = unsafe { HostState::of_this_processor() };
    host.write(&mut current)?;
    set_guest(&mut current, &host)?;

    let mut registers = GuestRegisters::default();
    for exits in 1.. {
        // SAFETY: host state is this processor's. The guest is the function above, on the host's
        // own page tables: it executes two harmless instructions, and interrupts, NMIs and all
        // ports and MSRs exit.
        unsafe { current.enter(&mut registers)? };
        let exit = Exit::read(&current)?;
        println!("exit at {:#x}: {exit:?}", current.get(fields::GUEST_RIP)?);
        match exit {
            Exit::Cpuid => {
                let gprs = &mut registers.gprs;
                [gprs.rax, gprs.rbx, gprs.rcx, gprs.rdx] = cpuid(gprs.rax as u32);
                exit::advance(&mut current)?;
            }
            Exit::Hlt => return Ok(exits),
            other => return Err(alloc::format!("no handler for {other:?}").into()),
        }
    }
    unreachable!("the guest halts")
}

/// A CPUID leaf as the guest sees it: a hypervisor's signature, and nothing else.
fn cpuid(leaf: u32) -> [u64; 4] {
    let word = |at: usize| {
        let text = b"TestudoTiny!";
        u64::from(u32::from_le_bytes([
            text[at],
            text[at + 1],
            text[at + 2],
            text[at + 3],
        ]))
    };
    match leaf {
        0x4000_0000 => [0x4000_0000, word(0), word(4), word(8)],
        _ => [0; 4],
    }
}

/// Asks for what the guest needs. The processor names what it does not offer, if anything.
fn set_controls(vmcs: &mut impl VmcsWrite, caps: &VmxCaps) -> Result<(), Error> {
    let pin = PinControls::EXTERNAL_INTERRUPT_EXITING | PinControls::NMI_EXITING;
    let primary = PrimaryControls::HLT_EXITING | PrimaryControls::UNCONDITIONAL_IO_EXITING;
    let exit =
        ExitControls::HOST_ADDRESS_SPACE_SIZE | ExitControls::SAVE_EFER | ExitControls::LOAD_EFER;
    let entry = EntryControls::IA32E_MODE_GUEST | EntryControls::LOAD_EFER;
    let secondary = SecondaryControls::empty();

    vmcs.set(
        fields::PIN_CONTROLS,
        caps.pin.grant(pin, PinControls::empty())?.controls.bits(),
    )?;
    let primary = caps.primary.grant(primary, PrimaryControls::empty())?;
    vmcs.set(fields::PRIMARY_CONTROLS, primary.controls.bits())?;
    vmcs.set(fields::SECONDARY_CONTROLS, secondary.bits())?;
    let exit = caps.exit.grant(exit, ExitControls::empty())?;
    vmcs.set(fields::EXIT_CONTROLS, exit.controls.bits())?;
    let entry = caps.entry.grant(entry, EntryControls::empty())?;
    vmcs.set(fields::ENTRY_CONTROLS, entry.controls.bits())?;
    vmcs.set(fields::EXCEPTION_BITMAP, u32::MAX)?;
    for (zeroed, value) in [
        (fields::CR3_TARGET_COUNT, 0),
        (fields::EXIT_MSR_STORE_COUNT, 0),
        (fields::EXIT_MSR_LOAD_COUNT, 0),
        (fields::ENTRY_MSR_LOAD_COUNT, 0),
        (fields::ENTRY_INTERRUPTION_INFORMATION, 0),
    ] {
        vmcs.set(zeroed, value)?;
    }
    Ok(())
}

/// The guest starts in 64-bit mode at its first instruction, with the host's page tables.
fn set_guest(vmcs: &mut impl VmcsWrite, host: &HostState) -> Result<(), Error> {
    let data = Segment::flat(0x10, SegmentAttributes::DATA);
    let unusable = Segment::default();
    let registers = SystemRegisters {
        cs: Segment::flat(0x08, SegmentAttributes::CODE64),
        tr: Segment {
            limit: 0x67,
            ..Segment::flat(0x18, SegmentAttributes::TSS_BUSY)
        },
        ss: data,
        ds: data,
        es: data,
        fs: unusable,
        gs: unusable,
        ldtr: unusable,
        cr0: host.cr0,
        cr3: host.cr3,
        cr4: host.cr4,
        efer: host.efer,
        rip: guest as *const () as u64,
        rflags: 2,
        dr7: 0x400,
        ..SystemRegisters::default()
    };
    state::write_system_registers(vmcs, &registers)?;
    vmcs.set(fields::GUEST_RSP, 0)?;
    vmcs.set(fields::GUEST_INTERRUPTIBILITY, 0)?;
    vmcs.set(fields::GUEST_ACTIVITY_STATE, 0)?;
    vmcs.set(fields::GUEST_PENDING_DEBUG, 0)?;
    vmcs.set(fields::GUEST_SYSENTER_ESP, 0)?;
    vmcs.set(fields::GUEST_SYSENTER_EIP, 0)?;
    vmcs.set(fields::VMCS_LINK_POINTER, u64::MAX)?;
    Ok(())
}

/// A frame for the processor's use.
fn frame() -> Result<RegionFrame, Error> {
    let address = memory::alloc_frame().ok_or("out of memory")?;
    let pointer = NonNull::new(address as *mut u8).ok_or("a frame at zero")?;
    // SAFETY: the frame is this call's alone, and memory is mapped where it is.
    Ok(unsafe { RegionFrame::new(pointer, Hpa(address)) })
}
