//! What the nested layer costs by itself, without world switches: an entry of L2 (copy, check and
//! join of L1's control block) and an exit to L1, on AMD-V and on VT-x; and the checks alone.
//!
//! Times are per entry or exit. Each pass goes over many vCPUs, so that reading the clock costs
//! little of it.
#![allow(unsafe_code, reason = "guest memory is mapped once, below")]

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use testudo_arch::memory::GuestRam;
use testudo_arch::{Gpa, Gpr, Gprs, GuestMemory as _, Hpa, Msr};
use testudo_nested::{svm, vmx};
use testudo_svm::caps::SvmCaps;
use testudo_svm::check::{Outside, check_vmrun};
use testudo_svm::exit::ExitCode;
use testudo_svm::intercept::{Misc1, Misc2};
use testudo_svm::permission::{IoPermissionMap, MsrAccess, MsrPermissionMap};
use testudo_svm::vmcb::{CleanBits, NestedControl, VintrFlags, VirtualInterrupts};
use testudo_svm::{Defects, Vmcb};
use testudo_vmx::bitmap::MsrBitmap;
use testudo_vmx::caps::{VmxCaps, fixtures};
use testudo_vmx::check::{check_entry, samples};
use testudo_vmx::exit::BasicReason;
use testudo_vmx::image::VmcsImage;
use testudo_vmx::{VmcsWrite as _, fields};

const VCPUS: u64 = 64;
const MEMORY: usize = 16 << 20;
/// Each vCPU's part of the memory.
const STRIDE: u64 = 0x2_0000;

struct Memory {
    ram: GuestRam,
    _bytes: Vec<u64>,
}

impl Memory {
    fn new() -> Self {
        let mut bytes = vec![0u64; MEMORY / 8];
        let mut ram = GuestRam::new();
        // SAFETY: the bytes live as long as `ram`, beside it, and are used through it only.
        unsafe { ram.add(Gpa(0), bytes.as_mut_ptr().cast(), MEMORY as u64, true) }.unwrap();
        Self { ram, _bytes: bytes }
    }
}

/// The MSRs that L0's SVM backend leaves to its guest.
const DIRECT: [Msr; 11] = [
    Msr::FS_BASE,
    Msr::GS_BASE,
    Msr::KERNEL_GS_BASE,
    Msr::STAR,
    Msr::LSTAR,
    Msr::CSTAR,
    Msr::SFMASK,
    Msr::SYSENTER_CS,
    Msr::SYSENTER_ESP,
    Msr::SYSENTER_EIP,
    Msr::TSC_AUX,
];

/// A composition that is there already: what an entry finds when nothing has changed.
struct Ready;

impl svm::SecondStage for Ready {
    fn activate(&mut self, table: svm::NestedTable) -> Option<Hpa> {
        Some(Hpa(table.root.0))
    }
    fn flush(&mut self, _: Option<u32>) {}
    fn fault(&mut self, fault: testudo_svm::exit::NestedPageFault) -> svm::NestedFault {
        svm::NestedFault::Reflect(fault)
    }
    fn translate(&mut self, gpa: Gpa, _: bool) -> Option<Gpa> {
        Some(gpa)
    }
}

struct SvmVcpu {
    nested: svm::NestedSvm,
    vmcb01: Box<Vmcb>,
    gprs: Gprs,
    at: u64,
}

fn state(vmcb: &mut Vmcb) {
    vmcb.set_efer(0x1D01);
    vmcb.set_cr0(0x8005_0033);
    vmcb.set_cr4(0x6A0);
    vmcb.set_dr6(0xFFFF_0FF0);
    vmcb.set_dr7(0x400);
    vmcb.set_rflags(0x202);
    vmcb.set_g_pat(0x0007_0406_0007_0406);
    let cs = testudo_svm::vmcb::VmcbSegment {
        selector: 16,
        attributes: 0xA9B,
        limit: u32::MAX,
        base: 0,
    };
    vmcb.set_raw_segment(testudo_arch::regs::SegmentRegister::Cs, cs);
}

impl SvmVcpu {
    fn new(memory: &GuestRam, at: u64) -> Self {
        let caps = SvmCaps::QEMU_TCG;
        let l1_caps = SvmCaps {
            features: svm::offer(&caps),
            ..caps
        };
        let mut msr_permissions = MsrPermissionMap::intercept_all();
        for msr in DIRECT {
            msr_permissions.set(msr, MsrAccess::empty());
        }
        let host = svm::Host {
            caps: &caps,
            l1_caps: &l1_caps,
            msr_permissions: &msr_permissions,
            io_permissions: &IoPermissionMap::intercept_all(),
            defects: Defects::empty(),
        };
        let pages = svm::Pages::new().unwrap();
        let mut nested = svm::NestedSvm::new(&host, pages, Hpa(0x10_0000)).unwrap();
        let mut vmcb01 = Box::new(Vmcb::new());
        state(&mut vmcb01);
        vmcb01.set_nested_control(NestedControl::NP_ENABLE);
        vmcb01.set_intercept_misc1(
            Misc1::INTR | Misc1::NMI | Misc1::CPUID | Misc1::MSR | Misc1::IOIO,
        );
        vmcb01.set_intercept_misc2(Misc2::VMRUN | Misc2::VMMCALL | Misc2::XSETBV);
        assert!(nested.write_svme(1 << 12));
        assert_eq!(nested.write_msr(Msr::VM_HSAVE_PA, 0x1000), Some(true));
        nested.adjust_vmcb01(&mut vmcb01);
        let mut vmcb12 = Vmcb::new();
        state(&mut vmcb12);
        vmcb12.set_intercept_misc1(Misc1::INTR | Misc1::MSR | Misc1::IOIO | Misc1::HLT);
        vmcb12.set_intercept_misc2(Misc2::VMRUN | Misc2::VMMCALL);
        vmcb12.set_asid(1);
        vmcb12.set_nested_control(NestedControl::NP_ENABLE);
        vmcb12.set_n_cr3(0x5000);
        vmcb12.set_msrpm_base_pa(at + 0x4000);
        vmcb12.set_iopm_base_pa(at + 0x8000);
        let masking = VirtualInterrupts::default().insert(VintrFlags::V_INTR_MASKING);
        vmcb12.set_virtual_interrupts(masking);
        memory.write_value(Gpa(at), &vmcb12).unwrap();
        let gprs = Gprs {
            rax: at,
            ..Gprs::default()
        };
        Self {
            nested,
            vmcb01,
            gprs,
            at,
        }
    }

    fn enter(&mut self, memory: &GuestRam) -> svm::Outcome {
        let mut cx = svm::Context {
            gprs: &mut self.gprs,
            vmcb01: &mut self.vmcb01,
            memory,
            second_stage: &mut Ready,
        };
        self.nested.execute(svm::Instruction::Vmrun, 3, &mut cx)
    }

    fn exit(&mut self, memory: &GuestRam) -> svm::Handled {
        let mut cx = svm::Context {
            gprs: &mut self.gprs,
            vmcb01: &mut self.vmcb01,
            memory,
            second_stage: &mut Ready,
        };
        self.nested.exited(&mut cx)
    }

    /// What the processor does between the two.
    fn guest(&mut self) {
        let vmcb02 = self.nested.vmcb02_mut();
        vmcb02.mark_clean();
        vmcb02.set_exit_code(ExitCode::VMMCALL.0);
    }
}

/// Times `timed` over all vCPUs, with `between` after each pass.
fn pass<V>(
    iterations: u64,
    vcpus: &mut [V],
    mut before: impl FnMut(&mut V),
    mut timed: impl FnMut(&mut V),
    mut after: impl FnMut(&mut V),
) -> Duration {
    let mut total = Duration::ZERO;
    let mut done = 0;
    while done < iterations {
        vcpus.iter_mut().for_each(&mut before);
        let start = Instant::now();
        vcpus.iter_mut().for_each(&mut timed);
        total += start.elapsed();
        vcpus.iter_mut().for_each(&mut after);
        done += vcpus.len() as u64;
    }
    total.mul_f64(iterations as f64 / done as f64)
}

fn svm_layer(c: &mut Criterion) {
    let memory = Memory::new();
    let ram = &memory.ram;
    let mut vcpus: Vec<_> = (0..VCPUS).map(|n| SvmVcpu::new(ram, n * STRIDE)).collect();
    let mut group = c.benchmark_group("nested/svm");
    for (name, clean) in [
        ("vmrun, all changed", false),
        ("vmrun, as KVM leaves it", true),
    ] {
        group.bench_function(name, |b| {
            b.iter_custom(|n| {
                pass(
                    n,
                    &mut vcpus,
                    |v| {
                        let bits = CleanBits::all()
                            - CleanBits::INTERCEPTS
                            - CleanBits::CR2
                            - CleanBits::TPR;
                        let bits = if clean { bits } else { CleanBits::empty() };
                        ram.store_u32(Gpa(v.at + 0xC0), bits.bits()).unwrap();
                    },
                    |v| assert_eq!(v.enter(ram), svm::Outcome::Entered),
                    |v| {
                        v.guest();
                        black_box(v.exit(ram));
                    },
                )
            });
        });
    }
    group.bench_function("#VMEXIT", |b| {
        b.iter_custom(|n| {
            pass(
                n,
                &mut vcpus,
                |v| {
                    assert_eq!(v.enter(ram), svm::Outcome::Entered);
                    v.guest();
                },
                |v| {
                    black_box(v.exit(ram));
                },
                |_| {},
            )
        });
    });
    let vmcb12: Vmcb = ram.read_value(Gpa(0)).unwrap();
    let caps = SvmCaps::QEMU_TCG;
    group.bench_function("checks of VMRUN", |b| {
        b.iter(|| check_vmrun(black_box(&vmcb12), &caps, &Outside::default()).is_empty());
    });
    group.finish();
}

/// Two VMCSs in memory.
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

struct NoMsrs;

impl vmx::Msrs for NoMsrs {
    fn read(&mut self, _: Msr) -> Option<u64> {
        None
    }
    fn write(&mut self, _: Msr, _: u64) -> bool {
        false
    }
}

struct VmxVcpu {
    nested: vmx::NestedVmx,
    pair: Pair,
    gprs: Gprs,
}

const OPERAND: u64 = 0x7000;

impl VmxVcpu {
    fn new(memory: &GuestRam, processor: &VmxCaps, at: u64) -> Self {
        let offer = vmx::Offer {
            ept: true,
            vpid: true,
            apic: false,
            enlightened: false,
        };
        let caps = vmx::offer(processor, processor.processor, offer);
        let mut l0 = samples::valid(processor);
        assert!(samples::enable_ept(&mut l0, processor).unwrap());
        l0.set(fields::CR4_GUEST_HOST_MASK, 1 << 13).unwrap();
        l0.set(fields::CR4_READ_SHADOW, 1 << 13).unwrap();
        l0.set(fields::GUEST_CR3, 0x1000).unwrap();
        // DS, no base, no index: the displacement is the address.
        let information = 2 << 7 | 3 << 15 | 1 << 22 | 1 << 27;
        l0.write_raw(fields::EXIT_INSTRUCTION_INFORMATION.encoding(), information)
            .unwrap();
        l0.write_raw(fields::EXIT_QUALIFICATION.encoding(), OPERAND)
            .unwrap();
        let mut region = *samples::valid(&caps).as_bytes();
        region[..4].copy_from_slice(&vmx::REVISION.to_le_bytes());
        memory.write(Gpa(at), &region).unwrap();
        memory.store_u32(Gpa(at + 0x1000), vmx::REVISION).unwrap();
        let bitmap = MsrBitmap::all_exit();
        let nested = vmx::NestedVmx::new(
            caps,
            processor,
            &bitmap,
            Box::new(bitmap.clone()),
            Hpa(0x10_0000),
        );
        let pair = Pair {
            l1: Box::new(l0.clone()),
            l2: Box::new(l0),
        };
        let mut vcpu = Self {
            nested,
            pair,
            gprs: Gprs::default(),
        };
        for (instruction, operand) in [
            (vmx::Instruction::Vmxon, at + 0x1000),
            (vmx::Instruction::Vmptrld, at),
        ] {
            memory.store_u64(Gpa(OPERAND), operand).unwrap();
            assert_eq!(vcpu.execute(instruction, memory), vmx::Outcome::Done);
        }
        assert!(matches!(
            vcpu.execute(vmx::Instruction::Vmlaunch, memory),
            vmx::Outcome::Entered { .. }
        ));
        vcpu.exit(memory);
        vcpu
    }

    fn execute(&mut self, instruction: vmx::Instruction, memory: &GuestRam) -> vmx::Outcome {
        let mut cx = vmx::Context {
            gprs: &mut self.gprs,
            vmcs: &mut self.pair,
            memory,
            second_stage: &mut vmx::NoSecondStage,
            msrs: &mut NoMsrs,
        };
        self.nested.execute(instruction, &mut cx).unwrap()
    }

    /// VMWRITE of RBX to a field that seldom changes: the next entry checks, joins and writes everything.
    fn change(&mut self, memory: &GuestRam) {
        let information = 1 << 10 | (Gpr::Rbx as u64) << 3 | (Gpr::Rax as u64) << 28;
        let at = fields::EXIT_INSTRUCTION_INFORMATION.encoding();
        self.pair.l1.write_raw(at, information).unwrap();
        self.gprs.rax = fields::GUEST_FS_BASE.encoding().0.into();
        self.gprs.rbx += 0x1000;
        let outcome = self.execute(vmx::Instruction::Vmwrite, memory);
        assert_eq!(outcome, vmx::Outcome::Done);
    }

    fn exit(&mut self, memory: &GuestRam) {
        let reason = u64::from(BasicReason::Cpuid.number());
        self.pair
            .l2
            .write_raw(fields::EXIT_REASON.encoding(), reason)
            .unwrap();
        let mut cx = vmx::Context {
            gprs: &mut self.gprs,
            vmcs: &mut self.pair,
            memory,
            second_stage: &mut vmx::NoSecondStage,
            msrs: &mut NoMsrs,
        };
        assert!(matches!(
            self.nested.exited(&mut cx),
            Ok(vmx::Handled::L1(_))
        ));
    }
}

fn vmx_layer(c: &mut Criterion) {
    let memory = Memory::new();
    let ram = &memory.ram;
    // L1's tables: the first 2 MiB, mapped as they are.
    for (at, entry) in [(0x1000, 0x2003), (0x2000, 0x3003), (0x3000, 0x83)] {
        ram.store_u64(Gpa(at), entry).unwrap();
    }
    let processor = fixtures::skylake_sp();
    let mut vcpus: Vec<_> = (0..VCPUS)
        .map(|n| VmxVcpu::new(ram, &processor, 0x8_0000 + n * STRIDE))
        .collect();
    let mut group = c.benchmark_group("nested/vmx");
    for (name, changed) in [
        ("VMRESUME, all changed", true),
        ("VMRESUME, as the last exit left it", false),
    ] {
        group.bench_function(name, |b| {
            b.iter_custom(|n| {
                pass(
                    n,
                    &mut vcpus,
                    |v| {
                        if changed {
                            v.change(ram);
                        }
                    },
                    |v| {
                        let outcome = v.execute(vmx::Instruction::Vmresume, ram);
                        assert!(matches!(outcome, vmx::Outcome::Entered { .. }));
                    },
                    |v| v.exit(ram),
                )
            });
        });
    }
    group.bench_function("VM exit", |b| {
        b.iter_custom(|n| {
            pass(
                n,
                &mut vcpus,
                |v| {
                    let _ = v.execute(vmx::Instruction::Vmresume, ram);
                },
                |v| v.exit(ram),
                |_| {},
            )
        });
    });
    let caps = vcpus[0].nested.caps().clone();
    let image = samples::valid(&caps);
    group.bench_function("checks of a VM entry", |b| {
        b.iter(|| check_entry(black_box(&image), &caps).is_ok_and(|v| v.is_empty()));
    });
    group.finish();
}

criterion_group!(benches, svm_layer, vmx_layer);
criterion_main!(benches);
