//! APIC virtualization: what the processor is told, and what it leaves to the machine.

use alloc::sync::Arc;

use testudo_arch::Gpa;
use testudo_arch::apic::VectorRegister;
use testudo_arch::irq::InterruptSink;

use super::*;
use crate::Machine;
use crate::irq::{ApicMode, Lapic};

const EPT: u64 = 0x5000 | 3 << 3 | 6;

pub(super) fn apic_tables() -> ApicTables {
    ApicTables {
        ept_pointer: EPT,
        access_page: Hpa(0x6000),
        x2apic_msr_bitmap: Hpa(0x7000),
    }
}

/// A vCPU with this local APIC, on this processor, which virtualizes it.
pub(super) fn vcpu_with(caps: &VmxCaps, lapic: &Lapic) -> Fake {
    let caps: &'static VmxCaps = Box::leak(Box::new(caps.clone()));
    let controls = Box::leak(Box::new(Controls::choose(caps).unwrap()));
    assert!(controls.virtual_apic);
    let tables = Box::leak(Box::new(tables_with(Some(apic_tables()))));
    let page: &'static Arc<ApicPage> = Box::leak(Box::new(lapic.page().clone()));
    let parts = Parts {
        apic_page: (page, Hpa(0x3000)),
        ..parts(caps, controls, tables)
    };
    let memory = Box::leak(Box::new(ram(0x2000)));
    VmxVcpu::on(FakeProcessor::new(caps), &parts, memory).unwrap()
}

fn machine() -> (Machine<GuestRam>, Lapic, Arc<FakeHost>) {
    fake_machine::machine(ram(MEMORY))
}

/// Runs the script, after which the guest's processor shuts down.
fn run(machine: &Machine<GuestRam>, mut vcpu: Fake, lapic: Lapic) {
    vcpu.will_exit(BasicReason::TripleFault, 0);
    let start = BootState {
        system: SystemRegisters {
            rflags: 0x202,
            ..SystemRegisters::reset()
        },
        gprs: Gprs::default(),
    };
    let stop = VcpuLoop::new(machine, vcpu, lapic, Some(&start)).run();
    assert_eq!(stop.reason, StopReason::TripleFault);
}

fn secondary(vmcs: &FakeVmcs) -> SecondaryControls {
    let bits = vmcs.image().get(fields::SECONDARY_CONTROLS).unwrap();
    SecondaryControls::from_bits_retain(bits)
}

fn pointers(vmcs: &FakeVmcs) -> (u64, u64) {
    let image = vmcs.image();
    (
        image.get(fields::EPT_POINTER).unwrap(),
        image.get(fields::MSR_BITMAPS).unwrap(),
    )
}

#[test]
fn the_processor_has_it_all_or_the_task_priority_alone() {
    for (name, caps) in fixtures::all() {
        let Ok(controls) = Controls::choose(&caps) else {
            continue;
        };
        let all = caps.secondary.allows(super::super::apic::NEEDED);
        assert_eq!(controls.virtual_apic, all, "{name}");
        let shadow = Controls::choose_shadow(&caps).unwrap();
        assert!(!shadow.virtual_apic, "{name}");
        // Without the tables, the control is of no use.
        let vcpu = vcpu_on(&caps);
        assert!(!vcpu.delivers_interrupts());
        assert!(!secondary(&vcpu.processor.vmcs).intersects(super::super::apic::NEEDED));
    }
}

#[test]
fn the_controls_follow_the_mode_of_the_apic() {
    let (machine, lapic, _) = machine();
    let mut vcpu = vcpu_with(&fixtures::skylake_sp(), &lapic);
    let set_base = |value: u64| {
        move |vmcs: &mut FakeVmcs, registers: &mut GuestRegisters| {
            (registers.gprs.rcx, registers.gprs.rax) = (Msr::APIC_BASE.0.into(), value);
            exit(vmcs, BasicReason::Wrmsr, 0);
        }
    };
    let own = (0x1000 | 3 << 3 | 6, 0x2000);
    vcpu.will(move |vmcs, registers| {
        assert!(secondary(vmcs).contains(SecondaryControls::VIRTUALIZE_APIC_ACCESSES));
        assert_eq!(pointers(vmcs), (EPT, 0x2000));
        // Elsewhere in memory.
        set_base(0xFED0_0900)(vmcs, registers);
    });
    vcpu.will(move |vmcs, registers| {
        let any =
            SecondaryControls::VIRTUALIZE_APIC_ACCESSES | SecondaryControls::VIRTUALIZE_X2APIC_MODE;
        assert!(!secondary(vmcs).intersects(any));
        assert_eq!(pointers(vmcs), own);
        set_base(0xFEE0_0D00)(vmcs, registers);
    });
    vcpu.will(move |vmcs, registers| {
        assert!(secondary(vmcs).contains(SecondaryControls::VIRTUALIZE_X2APIC_MODE));
        assert_eq!(pointers(vmcs), (own.0, 0x7000));
        set_base(0xFEE0_0100)(vmcs, registers);
    });
    vcpu.will(move |vmcs, registers| {
        assert!(!secondary(vmcs).contains(SecondaryControls::VIRTUALIZE_X2APIC_MODE));
        assert_eq!(pointers(vmcs), own);
        set_base(0xFEE0_0900)(vmcs, registers);
    });
    vcpu.will(move |vmcs, _| {
        assert_eq!(pointers(vmcs).0, EPT);
        exit(vmcs, BasicReason::Cpuid, 0);
    });
    assert_eq!(lapic.mode(), ApicMode::XApic);
    run(&machine, vcpu, lapic);
}

#[test]
fn a_register_that_was_written_has_its_effect_without_a_decoder() {
    let (machine, lapic, host) = machine();
    let mut vcpu = vcpu_with(&fixtures::skylake_sp(), &lapic);
    let page = vcpu.apic_page;
    let write = |register: u16, value: u32| {
        move |vmcs: &mut FakeVmcs, _: &mut GuestRegisters| {
            page.set(register, value);
            exit(vmcs, BasicReason::ApicWrite, register.into());
        }
    };
    vcpu.will(write(0xF0, 0x1FF));
    vcpu.will(write(0x20, 0xDEAD_BEEF));
    vcpu.will(write(0x320, 0xFFFF_0041));
    vcpu.will(write(0x3E0, 0xB));
    vcpu.will(write(0x380, 1000));
    vcpu.will(move |vmcs, _| {
        assert_eq!(page.get(0x20), 0, "the identification cannot be changed");
        assert_eq!(
            page.get(0x320),
            0x0007_0041 & 0x0007_00FF,
            "reserved bits stay 0"
        );
        assert_eq!(vmcs.image().get(fields::GUEST_RIP).unwrap(), 0xFFF0);
        exit(vmcs, BasicReason::ExternalInterrupt, 0);
    });
    // Unmasked, it fires.
    vcpu.will(write(0x320, 0x41));
    vcpu.will(write(0x380, 1000));
    vcpu.will(move |vmcs, _| {
        host.pass(1001);
        exit(vmcs, BasicReason::ExternalInterrupt, 0);
    });
    vcpu.will(move |vmcs, _| {
        assert_eq!(
            vmcs.image().get(fields::GUEST_INTERRUPT_STATUS).unwrap(),
            0x41
        );
        assert!(page.vectors(VectorRegister::Irr).contains(0x41));
        exit(vmcs, BasicReason::Cpuid, 0);
    });
    run(&machine, vcpu, lapic);
}

#[test]
fn a_halted_guest_wakes_for_what_the_processor_will_deliver() {
    let (machine, mut lapic, _) = machine();
    lapic.write_mmio(0xF0, &0x1FFu32.to_le_bytes());
    let mut vcpu = vcpu_with(&fixtures::skylake_sp(), &lapic);
    let (page, chip) = (vcpu.apic_page, lapic.irqchip().clone());
    let send = chip.clone();
    vcpu.will(move |vmcs, _| {
        send.send_msi(testudo_arch::irq::Msi {
            address: 0xFEE0_0000,
            data: 0x51,
        });
        exit(vmcs, BasicReason::Hlt, 0);
    });
    vcpu.will(move |vmcs, _| {
        let image = vmcs.image();
        assert_eq!(image.get(fields::GUEST_RIP).unwrap(), 0xFFF2);
        assert_eq!(image.get(fields::GUEST_INTERRUPT_STATUS).unwrap(), 0x51);
        let information = image.get(fields::ENTRY_INTERRUPTION_INFORMATION).unwrap();
        assert_eq!(information >> 31, 0, "nothing is injected");
        // The processor delivers it, and the guest is in its handler when another comes.
        page.vectors(VectorRegister::Irr).remove(0x51);
        page.vectors(VectorRegister::Isr).insert(0x51);
        chip.send_msi(testudo_arch::irq::Msi {
            address: 0xFEE0_0000,
            data: 0x31,
        });
        exit(vmcs, BasicReason::ExternalInterrupt, 0);
    });
    vcpu.will(move |vmcs, _| {
        let status = vmcs.image().get(fields::GUEST_INTERRUPT_STATUS).unwrap();
        assert_eq!(status, 0x5131, "in service, and requested");
        exit(vmcs, BasicReason::Cpuid, 0);
    });
    run(&machine, vcpu, lapic);
}

#[test]
fn the_end_of_a_level_comes_back_to_the_machine() {
    let (machine, mut lapic, _) = machine();
    lapic.write_mmio(0xF0, &0x1FFu32.to_le_bytes());
    let mut vcpu = vcpu_with(&fixtures::skylake_sp(), &lapic);
    let (page, chip) = (vcpu.apic_page, lapic.irqchip().clone());
    // Input 9 of the I/O APIC: vector 0x61, level-triggered, to this vCPU.
    for (select, value) in [(0x22u32, 1u32 << 15 | 0x61), (0x23, 0)] {
        machine.mmio.write(0xFEC0_0000, &select.to_le_bytes());
        machine.mmio.write(0xFEC0_0010, &value.to_le_bytes());
    }
    chip.set_level(9, true);
    vcpu.will(move |vmcs, _| {
        let level = vmcs.image().get(fields::EOI_EXIT_BITMAP_1).unwrap();
        assert_eq!(level, 1 << 0x21);
        // Delivered and ended, while the wire is still high.
        page.vectors(VectorRegister::Irr).remove(0x61);
        exit(vmcs, BasicReason::VirtualizedEoi, 0x61);
    });
    vcpu.will(move |vmcs, _| {
        let again = page.vectors(VectorRegister::Irr).contains(0x61);
        assert!(again, "the level is requested once more");
        exit(vmcs, BasicReason::Cpuid, 0);
    });
    run(&machine, vcpu, lapic);
}

#[test]
fn the_pic_is_still_injected() {
    let (machine, lapic, _) = machine();
    let mut vcpu = vcpu_with(&fixtures::skylake_sp(), &lapic);
    let chip = lapic.irqchip().clone();
    // Initialized with vectors from 0x20, all inputs open.
    for (port, value) in [(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0)] {
        machine.ports.write(port, &[value]);
    }
    chip.set_level(4, true);
    vcpu.will(|vmcs, _| {
        let information = vmcs.image().get(fields::ENTRY_INTERRUPTION_INFORMATION);
        assert_eq!(information.unwrap() & 0xFF, 0x24);
        exit(vmcs, BasicReason::Cpuid, 0);
    });
    run(&machine, vcpu, lapic);
}

#[test]
fn other_accesses_to_the_page_are_emulated() {
    let (machine, lapic, _) = machine();
    drop(machine);
    let mut vcpu = vcpu_with(&fixtures::skylake_sp(), &lapic);
    vcpu.will(|vmcs, _| exit(vmcs, BasicReason::ApicAccess, 0x390));
    let VmExit::Memory(access) = vcpu.enter_once() else {
        panic!("an access to a device");
    };
    assert_eq!((access.gpa, access.write), (Gpa(0xFEE0_0390), false));
}
