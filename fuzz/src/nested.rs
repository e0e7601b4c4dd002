//! A guest hypervisor as the adversary: near-valid control blocks, random instructions and exits,
//! memory that changes between them. The oracle is what L0 demands of whatever L2 runs with.

use testudo_arch::memory::GuestRam;
use testudo_arch::{Gpa, Gprs, GuestMemory, Hpa, Msr};
use testudo_nested::{svm, vmx};
use testudo_svm::caps::{Features, SvmCaps};
use testudo_svm::check::{Outside, check_vmrun};
use testudo_svm::exit::{ExitCode, NestedPageFault};
use testudo_svm::intercept::{ExceptionIntercepts, Misc1, Misc2};
use testudo_svm::permission::{IoPermissionMap, MsrAccess, MsrPermissionMap};
use testudo_svm::vmcb::{NestedControl, VintrFlags, VirtualInterrupts, VmcbSegment};
use testudo_svm::{Defects, Vmcb};
use testudo_vmx::bitmap::MsrBitmap;
use testudo_vmx::caps::{Basic, fixtures};
use testudo_vmx::check::{check_entry, samples};
use testudo_vmx::controls::{ExitControls, PinControls, PrimaryControls, SecondaryControls};
use testudo_vmx::encoding::Area;
use testudo_vmx::image::VmcsImage;
use testudo_vmx::{VmcsRead, VmcsWrite, VmxCaps, fields};

use crate::input::Input;

const MEMORY: u64 = 0x4_0000;
const VMCB12: u64 = 0x1_0000;
const L0_ROOT: u64 = 0x6_0000_1000;
const L0_MSRPM: u64 = 0x6_0000_2000;
const L0_IOPM: u64 = 0x6_0000_4000;
const PAGES: Hpa = Hpa(0x7_0000_0000);
const COMPOSED: u64 = 0x5_0000_0000;
/// A composition without a table of L1's, and where L1's memory is.
const PLAIN: u64 = 0x9_0000_0000;
const FRAMES: u64 = 0x8_0000_0000;

fn with_memory(run: impl FnOnce(&GuestRam)) {
    let mut bytes = vec![0u64; MEMORY as usize / 8];
    let mut ram = GuestRam::new();
    // SAFETY: the vector outlives `ram` and is used through it only.
    unsafe { ram.add(Gpa(0), bytes.as_mut_ptr().cast(), MEMORY, true) }.expect("one range");
    run(&ram);
}

struct Stage(u8);

impl svm::SecondStage for Stage {
    fn activate(&mut self, _: svm::NestedTable) -> Option<Hpa> {
        (self.0 & 7 != 7).then_some(Hpa(COMPOSED))
    }
    fn flush(&mut self, _: Option<u32>) {}
    fn fault(&mut self, fault: NestedPageFault) -> svm::NestedFault {
        match self.0 & 3 {
            0 => svm::NestedFault::Resolved,
            1 => svm::NestedFault::Host(fault.gpa),
            _ => svm::NestedFault::Reflect(fault),
        }
    }
    fn translate(&mut self, gpa: Gpa, _: bool) -> Option<Gpa> {
        Some(gpa)
    }
}

impl vmx::SecondStage for Stage {
    fn activate(&mut self, _: u64) -> Option<u64> {
        (self.0 & 7 != 7).then_some(COMPOSED | 0x1E)
    }
    fn flush(&mut self, _: Option<u64>) {}
    fn activate_plain(&mut self, _: Gpa) -> Option<u64> {
        (self.0 & 0x20 != 0).then_some(PLAIN | 0x1E)
    }
    fn frame(&mut self, page: Gpa) -> Option<Hpa> {
        let is_memory = page.0 < MEMORY && self.0 & 0x40 == 0;
        is_memory.then_some(Hpa(FRAMES + page.0))
    }
    fn fault(&mut self, fault: vmx::EptFault) -> vmx::EptHandled {
        match self.0 & 3 {
            0 => vmx::EptHandled::Resolved,
            1 => vmx::EptHandled::Host(fault.gpa),
            2 => vmx::EptHandled::Misconfiguration,
            _ => vmx::EptHandled::Violation(fault.qualification),
        }
    }
    fn translate(&mut self, gpa: Gpa, _: bool) -> Option<Gpa> {
        Some(gpa)
    }
}

fn state(vmcb: &mut Vmcb) {
    vmcb.set_efer(0x1D01);
    vmcb.set_cr0(0x8005_0033);
    vmcb.set_cr4(0x6A0);
    vmcb.set_dr6(0xFFFF_0FF0);
    vmcb.set_dr7(0x400);
    vmcb.set_rflags(0x202);
    vmcb.set_g_pat(0x0007_0406_0007_0406);
    let code = VmcbSegment {
        selector: 16,
        attributes: 0xA9B,
        limit: u32::MAX,
        base: 0,
    };
    vmcb.set_raw_segment(testudo_arch::regs::SegmentRegister::Cs, code);
}

fn open_msrs() -> MsrPermissionMap {
    let mut map = MsrPermissionMap::intercept_all();
    for msr in [Msr::FS_BASE, Msr::STAR, Msr::SYSENTER_CS] {
        map.set(msr, MsrAccess::empty());
    }
    map
}

/// AMD-V.
pub fn svm(data: &[u8]) {
    with_memory(|ram| svm_in(ram, &mut Input(data)));
}

fn svm_in(ram: &GuestRam, input: &mut Input<'_>) {
    let features = match input.u8() & 3 {
        0 => SvmCaps::QEMU_TCG.features,
        1 => Features::empty(),
        _ => Features::all(),
    };
    let caps = SvmCaps {
        features,
        ..SvmCaps::ZEN2
    };
    let l1_caps = SvmCaps {
        features: svm::offer(&caps),
        ..caps
    };
    let msr_permissions = open_msrs();
    let host = svm::Host {
        caps: &caps,
        l1_caps: &l1_caps,
        msr_permissions: &msr_permissions,
        io_permissions: &IoPermissionMap::intercept_all(),
        defects: Defects::empty(),
    };
    let Some(mut nested) =
        svm::Pages::new().and_then(|pages| svm::NestedSvm::new(&host, pages, PAGES))
    else {
        return;
    };
    let mut vmcb01 = Box::new(Vmcb::new());
    state(&mut vmcb01);
    vmcb01.set_intercept_exceptions(ExceptionIntercepts::DB | ExceptionIntercepts::MC);
    vmcb01.set_intercept_misc1(Misc1::INTR | Misc1::NMI | Misc1::CPUID | Misc1::MSR | Misc1::IOIO);
    vmcb01.set_intercept_misc2(Misc2::VMRUN | Misc2::VMMCALL | Misc2::XSETBV);
    vmcb01.set_nested_control(NestedControl::NP_ENABLE);
    vmcb01.set_n_cr3(L0_ROOT);
    vmcb01.set_msrpm_base_pa(L0_MSRPM);
    vmcb01.set_iopm_base_pa(L0_IOPM);
    let masking = VirtualInterrupts::default().insert(VintrFlags::V_INTR_MASKING);
    vmcb01.set_virtual_interrupts(masking);
    nested.write_svme(1 << 12);
    nested.write_msr(Msr::VM_HSAVE_PA, 0x1000);
    nested.adjust_vmcb01(&mut vmcb01);

    let mut good = Vmcb::new();
    state(&mut good);
    good.set_intercept_misc1(Misc1::INTR | Misc1::MSR | Misc1::IOIO);
    good.set_intercept_misc2(Misc2::VMRUN);
    good.set_asid(1);
    good.set_nested_control(NestedControl::NP_ENABLE);
    let (mut gprs, mut stage) = (Gprs::default(), Stage(0));
    ram.write_value(Gpa(VMCB12), &good).expect("memory");

    while !input.0.is_empty() {
        let mut cx = svm::Context {
            gprs: &mut gprs,
            vmcb01: &mut vmcb01,
            memory: ram,
            second_stage: &mut stage,
        };
        match input.u8() & 7 {
            0 | 1 => {
                let at = input.u64() % MEMORY;
                let near = VMCB12 + at % 0x700;
                let value = [input.u8()];
                let place = if at & 1 == 0 { at } else { near };
                ram.write(Gpa(place), &value).expect("memory");
            }
            2 | 3 => {
                let which = svm::Instruction::ALL[usize::from(input.u8()) % 7];
                cx.gprs.rax = match input.u8() {
                    0..200 => VMCB12,
                    _ => input.u64(),
                };
                let _ = nested.execute(which, 3, &mut cx);
            }
            4 | 5 if nested.is_guest() => {
                cx.gprs.rcx = input.u64();
                let code = match input.u8() {
                    0xFF => ExitCode::NPF.0,
                    0xFE => u64::MAX,
                    code => code.into(),
                };
                let vmcb02 = nested.vmcb02_mut();
                vmcb02.set_exit_code(code);
                vmcb02.set_exit_info1(input.u64());
                vmcb02.set_exit_info2(input.u64());
                let _ = nested.exited(&mut cx);
            }
            6 => {
                use svm::PhysicalEvent as P;
                let event = [P::Interrupt, P::Nmi, P::Smi, P::Init][usize::from(input.u8() & 3)];
                match nested.acceptance(event, cx.vmcb01) {
                    svm::Acceptance::Exit(code) => nested.exit_to_l1(code, 0, 0, &mut cx).ignore(),
                    _ => nested.set_window(input.u8() & 1 != 0, cx.vmcb01),
                }
            }
            7 => {
                stage.0 = input.u8();
                if stage.0 & 8 != 0 {
                    ram.write_value(Gpa(VMCB12), &good).expect("memory");
                }
            }
            _ => {}
        }
        if nested.is_guest() {
            assert_svm_contained(&nested, &vmcb01, &caps);
        }
    }
}

fn assert_svm_contained(nested: &svm::NestedSvm, vmcb01: &Vmcb, caps: &SvmCaps) {
    let vmcb02 = nested.vmcb02();
    let (all, l0) = (vmcb02.intercepts(), vmcb01.intercepts());
    assert!(all.exceptions.contains(l0.exceptions));
    assert!(all.misc1.contains(l0.misc1 - Misc1::VINTR));
    let own = Misc2::STGI | Misc2::CLGI | Misc2::VMLOAD | Misc2::VMSAVE | Misc2::VMMCALL;
    assert!(all.misc2.contains(l0.misc2 - own));
    let extensions = vmcb02.virtual_extensions();
    let virtualized = testudo_svm::vmcb::VirtualExtensions::VMSAVE_VMLOAD;
    let moves = Misc2::VMLOAD | Misc2::VMSAVE;
    assert!(extensions.contains(virtualized) || all.misc2.contains(moves));
    assert!([L0_ROOT, COMPOSED].contains(&vmcb02.n_cr3()));
    assert!(vmcb02.msrpm_base_pa() == L0_MSRPM || vmcb02.msrpm_base_pa() >> 24 == PAGES.0 >> 24);
    assert_eq!(vmcb02.iopm_base_pa(), L0_IOPM);
    let word = vmcb02.virtual_interrupts();
    assert!(word.contains(VintrFlags::V_INTR_MASKING));
    let never = VintrFlags::AVIC_ENABLE | VintrFlags::X2AVIC_ENABLE | VintrFlags::V_NMI_ENABLE;
    assert!(!word.flags().intersects(never));
    assert_eq!(vmcb02.avic_backing_page(), 0);
    assert_eq!(vmcb02.nested_control(), NestedControl::NP_ENABLE);
    let mut ready = vmcb02.clone();
    ready.set_asid(1);
    let violations = check_vmrun(&ready, caps, &Outside::default());
    assert!(violations.is_empty(), "{violations}");
}

struct Pair {
    l1: Box<VmcsImage>,
    l2: Box<VmcsImage>,
}

impl vmx::VmcsPair for Pair {
    type Vmcs<'a> = &'a mut VmcsImage;
    fn l1(&mut self) -> &mut VmcsImage {
        &mut self.l1
    }
    fn l2(&mut self) -> &mut VmcsImage {
        &mut self.l2
    }
}

struct OneMsr(u64);

impl vmx::Msrs for OneMsr {
    fn read(&mut self, msr: Msr) -> Option<u64> {
        (msr == Msr::LSTAR).then_some(self.0)
    }
    fn write(&mut self, msr: Msr, value: u64) -> bool {
        self.0 = value;
        msr == Msr::LSTAR
    }
}

const VMXON: u64 = 0x8000;
const REGIONS: [u64; 3] = [VMXON, 0x9000, 0xA000];
const OPERAND: u64 = 0x7000;
/// L1's VP assist page, and its enlightened VMCS.
const ASSIST: u64 = 0xB000;
const ENLIGHTENED: u64 = 0xC000;
/// L1's pages for L2's local APIC, and what it has of posted interrupts.
const VIRTUAL_APIC: u64 = 0xD000;
const APIC_ACCESS: u64 = 0xE000;
const BITMAP: u64 = 0xF000;
const DESCRIPTOR: u64 = 0x1_0000;
const NOTIFICATION: u8 = 0xF2;

/// Has the processor virtualize L2's local APIC, as far as L1 may ask for that.
fn virtualize_apic(vmcs: &mut VmcsImage, caps: &VmxCaps, x2apic: bool) {
    let mode = match x2apic {
        true => SecondaryControls::VIRTUALIZE_X2APIC_MODE,
        false => SecondaryControls::VIRTUALIZE_APIC_ACCESSES,
    };
    let secondary = mode
        | SecondaryControls::APIC_REGISTER_VIRTUALIZATION
        | SecondaryControls::VIRTUAL_INTERRUPT_DELIVERY;
    let primary = PrimaryControls::USE_TPR_SHADOW
        | PrimaryControls::USE_MSR_BITMAPS
        | PrimaryControls::ACTIVATE_SECONDARY_CONTROLS;
    let pin = PinControls::EXTERNAL_INTERRUPT_EXITING | PinControls::PROCESS_POSTED_INTERRUPTS;
    let exit = ExitControls::ACKNOWLEDGE_INTERRUPT;
    if !caps.secondary.allows(secondary) || !caps.pin.allows(pin) {
        return;
    }
    for (field, bits) in [
        (fields::PIN_CONTROLS, pin.bits()),
        (fields::PRIMARY_CONTROLS, primary.bits()),
        (fields::SECONDARY_CONTROLS, secondary.bits()),
        (fields::EXIT_CONTROLS, exit.bits()),
    ] {
        let old = vmcs.get(field).expect("a field");
        vmcs.set(field, old | bits).expect("a field");
    }
    for (field, value) in [
        (fields::VIRTUAL_APIC_ADDRESS, VIRTUAL_APIC),
        (fields::APIC_ACCESS_ADDRESS, APIC_ACCESS),
        (fields::MSR_BITMAPS, BITMAP),
        (fields::POSTED_INTERRUPT_DESCRIPTOR_ADDRESS, DESCRIPTOR),
    ] {
        vmcs.set(field, value).expect("a field");
    }
    let vector = fields::POSTED_INTERRUPT_NOTIFICATION_VECTOR;
    vmcs.set(vector, NOTIFICATION.into()).expect("a field");
}

/// VT-x.
pub fn vmx(data: &[u8]) {
    with_memory(|ram| vmx_in(ram, &mut Input(data)));
}

fn vmx_in(ram: &GuestRam, input: &mut Input<'_>) {
    let choice = input.u8();
    let enlightened = choice & 2 != 0;
    let mut processor = if choice & 1 == 0 {
        fixtures::skylake_sp()
    } else {
        fixtures::nehalem()
    };
    if choice & 4 != 0 {
        // The one whose defects are worked around.
        processor.basic = Basic(processor.basic.0 & !0x7FFF_FFFF | 0x2B);
    }
    let offer = vmx::Offer {
        ept: true,
        vpid: true,
        apic: true,
        enlightened,
    };
    let caps = vmx::offer(&processor, processor.processor, offer);
    let mut l0 = samples::valid(&processor);
    if !samples::enable_ept(&mut l0, &processor).unwrap_or(false) {
        return;
    }
    let set = |vmcs: &mut VmcsImage, field: testudo_vmx::encoding::Encoding, value: u64| {
        vmcs.write_raw(field, value).expect("a field of the table");
    };
    set(&mut l0, fields::CR4_GUEST_HOST_MASK.encoding(), 1 << 13);
    set(&mut l0, fields::CR4_READ_SHADOW.encoding(), 1 << 13);
    let l0_eptp = l0.get(fields::EPT_POINTER).expect("a field");
    let bitmap = MsrBitmap::all_exit();
    let mut nested = vmx::NestedVmx::new(
        caps.clone(),
        &processor,
        &bitmap,
        Box::new(bitmap.clone()),
        PAGES,
    );
    let good = vmx::enlightened_vmcs(&samples::valid(&caps));
    if enlightened {
        nested = nested.with_enlightened_vmcs();
        ram.write(Gpa(ENLIGHTENED), &good).expect("memory");
        ram.write(Gpa(ASSIST + 40), &[1]).expect("memory");
        ram.store_u64(Gpa(ASSIST + 48), ENLIGHTENED)
            .expect("memory");
        nested.write_assist_page(ASSIST | 1, ram);
    }
    let mut pair = Pair {
        l1: Box::new(l0.clone()),
        l2: Box::new(l0.clone()),
    };
    for (index, at) in REGIONS.into_iter().enumerate() {
        let mut image = samples::valid(&caps);
        if choice & 8 != 0 {
            virtualize_apic(&mut image, &caps, index == 2);
        }
        let mut region = *image.as_bytes();
        region[..4].copy_from_slice(&vmx::REVISION.to_le_bytes());
        ram.write(Gpa(at), &region).expect("memory");
    }
    let (mut gprs, mut stage, mut msrs) = (Gprs::default(), Stage(0), OneMsr(0));
    while !input.0.is_empty() {
        // L1's tables, wherever an exit left CR3.
        for (at, entry) in [(0x1000, 0x2003), (0x2000, 0x3003), (0x3000, 0x83u64)] {
            ram.store_u64(Gpa(at), entry).expect("memory");
        }
        set(&mut pair.l1, fields::GUEST_CR3.encoding(), 0x1000);
        let mut cx = vmx::Context {
            gprs: &mut gprs,
            vmcs: &mut pair,
            memory: ram,
            second_stage: &mut stage,
            msrs: &mut msrs,
        };
        let action = input.u8();
        match action & 7 {
            0 => {
                let any = 0x8000 + input.u64() % (MEMORY - 0x8000);
                let at = match any % 4 {
                    0 if enlightened => ENLIGHTENED + any % 1024,
                    1 if enlightened => ASSIST + 40 + any % 16,
                    _ => any,
                };
                ram.write(Gpa(at), &[input.u8()]).expect("memory");
            }
            1..=3 if !nested.is_guest() => {
                let which = vmx::Instruction::ALL[usize::from(input.u8()) % 13];
                let operand = match input.u8() {
                    n @ 0..200 => REGIONS[usize::from(n) % 3],
                    _ => input.u64(),
                };
                ram.store_u64(Gpa(OPERAND), operand).expect("memory");
                (cx.gprs.rax, cx.gprs.rbx) = (input.u64() & 0x7FFF, input.u64());
                cx.gprs.rcx = (operand >> 12) & 3;
                // DS, no base, no index, or registers for VMREAD and VMWRITE.
                let register =
                    matches!(which, vmx::Instruction::Vmread | vmx::Instruction::Vmwrite);
                let information = match register {
                    true => 1 << 10 | 3 << 3,
                    false => 2 << 7 | 3 << 15 | 1 << 22 | 1 << 27 | 1 << 28,
                };
                let l1 = &mut cx.vmcs.l1;
                set(
                    l1,
                    fields::EXIT_INSTRUCTION_INFORMATION.encoding(),
                    information,
                );
                set(l1, fields::EXIT_QUALIFICATION.encoding(), OPERAND);
                nested
                    .execute(which, &mut cx)
                    .map(drop)
                    .expect("every field exists");
            }
            4..=6 if nested.is_guest() => {
                let l2 = &mut cx.vmcs.l2;
                set(
                    l2,
                    fields::EXIT_REASON.encoding(),
                    u64::from(input.u8()) % 80,
                );
                set(l2, fields::EXIT_QUALIFICATION.encoding(), input.u64());
                let vectoring = 1 << 31 | u64::from(input.u8()) | (input.u64() & 0xB00);
                set(
                    l2,
                    fields::EXIT_INTERRUPTION_INFORMATION.encoding(),
                    vectoring,
                );
                set(l2, fields::IDT_VECTORING_INFORMATION.encoding(), 0);
                cx.gprs.rcx = input.u64();
                nested
                    .exited(&mut cx)
                    .map(drop)
                    .expect("every field exists");
            }
            7 if action & 8 != 0 && nested.is_guest() => {
                let done = match action >> 4 & 3 {
                    0 => nested.take_notification(NOTIFICATION, &mut cx).map(drop),
                    1 => nested.take_notification(input.u8(), &mut cx).map(drop),
                    2 => nested.has_virtual_interrupt(&mut cx).map(drop),
                    _ => {
                        nested.forget_frames();
                        match nested.renew_frames(&mut cx) {
                            // L2 cannot go on.
                            Ok(false) => return,
                            renewed => renewed.map(drop),
                        }
                    }
                };
                done.expect("every field exists");
            }
            _ => {
                stage.0 = input.u8();
                if enlightened && stage.0 & 8 != 0 {
                    ram.write(Gpa(ENLIGHTENED), &good).expect("memory");
                    let named = if stage.0 & 16 != 0 { 1 } else { 0 };
                    ram.write(Gpa(ASSIST + 40), &[named]).expect("memory");
                    ram.store_u64(Gpa(ASSIST + 48), ENLIGHTENED)
                        .expect("memory");
                }
            }
        }
        if nested.is_guest() {
            assert_vmx_contained(&pair, &l0, l0_eptp, &processor);
        }
    }
}

fn assert_vmx_contained(
    pair: &Pair,
    l0: &VmcsImage,
    l0_eptp: u64,
    processor: &testudo_vmx::VmxCaps,
) {
    let l2 = &*pair.l2;
    for (field, value) in l0.iter() {
        if field.area() == Area::Host {
            assert_eq!(l2.read_raw(field), Ok(value), "{field}");
        }
    }
    let eptp = l2.get(fields::EPT_POINTER).expect("a field");
    assert!([l0_eptp, COMPOSED | 0x1E, PLAIN | 0x1E].contains(&eptp));
    assert_eq!(l2.get(fields::GUEST_ACTIVITY_STATE), Ok(0));
    assert_eq!(l2.get(fields::VMCS_LINK_POINTER), Ok(u64::MAX));
    for field in [fields::VIRTUAL_APIC_ADDRESS, fields::APIC_ACCESS_ADDRESS] {
        let address = l2.get(field).expect("a field");
        let is_l1s = (FRAMES..FRAMES + MEMORY).contains(&address) && address % 4096 == 0;
        assert!(is_l1s || Ok(address) == l0.get(field), "{address:#x}");
    }
    for field in [
        fields::IO_BITMAP_A,
        fields::ENTRY_MSR_LOAD_ADDRESS,
        fields::EXIT_MSR_LOAD_ADDRESS,
    ] {
        assert_eq!(l2.get(field), l0.get(field));
    }
    let violations = check_entry(l2, processor).expect("every field exists");
    assert!(violations.is_empty(), "{violations}");
}
