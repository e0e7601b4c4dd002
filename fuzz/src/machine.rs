//! The virtual PC under a processor that reports any exits in any state, and kernels that hold anything.
//!
//! The oracles: nothing panics (with overflow checks), and nothing runs without end.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use testudo_arch::cpuid::Cpuid;
use testudo_arch::memory::GuestRam;
use testudo_arch::regs::SystemRegisters;
use testudo_arch::{Event, Gpa, Gprs, GuestMemory, Msr};
use testudo_machine::boot::{self, BootImage, Module};
use testudo_machine::layout::{Layout, MIN_RAM};
use testudo_machine::vcpu::{AwaitedInterrupt, MemoryAccess, PortAccess};
use testudo_machine::{Host, Machine, MachineConfig, Vcpu, VcpuError, VcpuLoop, VmExit};

use crate::input::Input;

/// Nanoseconds that a guest may run: more than enough for an input's exits, and an end to waiting.
const TIME_LIMIT: u64 = 1 << 40;

/// Memory that lives as long as one run.
struct Ram {
    ram: GuestRam,
    _bytes: Vec<u64>,
}

impl Ram {
    fn new() -> Self {
        let mut bytes = vec![0u64; (MIN_RAM / 8) as usize];
        let mut ram = GuestRam::new();
        // SAFETY: the vector lives in the same value, and is used through `ram` only.
        unsafe { ram.add(Gpa(0), bytes.as_mut_ptr().cast(), MIN_RAM, true) }.unwrap();
        Self { ram, _bytes: bytes }
    }
}

/// A host on which time passes when it is looked at, and fast when a vCPU waits.
struct Clock(AtomicU64);

impl Host for Clock {
    fn now(&self) -> u64 {
        self.0.fetch_add(100, Ordering::Relaxed)
    }

    fn tsc(&self) -> u64 {
        self.now()
    }

    fn tsc_hz(&self) -> u64 {
        1_000_000_000
    }

    fn kick(&self, _: usize) {}

    fn set_timer(&self, _: Option<u64>) {}

    fn wait(&self) {
        self.0.fetch_add(TIME_LIMIT / 64, Ordering::Relaxed);
    }
}

/// A processor whose every exit the input decides; it ends with the input.
struct Scripted<'a> {
    input: Input<'a>,
    ram: &'a GuestRam,
    gprs: Gprs,
    system: SystemRegisters,
    xmm: [u128; 16],
    xcr0: u64,
    pkru: u32,
    tsc_offset: u64,
    window: Option<AwaitedInterrupt>,
    injected: bool,
}

impl Scripted<'_> {
    fn port(&mut self) -> PortAccess {
        let how = self.input.u8();
        PortAccess {
            port: self.input.u16(),
            size: 1 << (how % 3),
            write: how & 0x80 != 0,
        }
    }

    /// An address of memory, of a device, or of nothing.
    fn address(&mut self) -> Gpa {
        let offset = u64::from(self.input.u16());
        Gpa(match self.input.u8() % 6 {
            0 => offset,
            1 => 0xFEC0_0000 + offset % 0x1000,
            2 => 0xFEE0_0000 + offset % 0x1000,
            3 => MIN_RAM - 0x8000 + offset,
            4 => 0xC000_0000 + (offset << 8),
            _ => self.input.u64(),
        })
    }

    /// What the guest did since the last exit: registers, and code where it executes.
    fn live(&mut self) {
        match self.input.u8() % 8 {
            0 => self.gprs.rax = self.input.u64(),
            1 => self.gprs.rcx = self.input.u64(),
            2 => self.gprs.rdx = self.input.u64(),
            3 => {
                let address = self.address().0;
                (self.gprs.rsi, self.gprs.rdi) = (address, address.wrapping_add(0x20));
                self.gprs.rbx = address;
            }
            4 => {
                self.system.cr0 = (self.input.u32() | 0x10).into();
                self.system.cr3 = u64::from(self.input.u16()) << 12;
                self.system.cr4 = self.input.u32().into();
                self.system.efer = u64::from(self.input.u16() & 0xD01);
            }
            5 => {
                self.system.cs.base = 0;
                self.system.rip = u64::from(self.input.u16());
                self.system.rflags = u64::from(self.input.u32()) | 2;
                let code = self.input.bytes::<15>();
                let _ = self.ram.write(Gpa(self.system.rip), &code);
            }
            6 => {
                let at = self.address();
                let bytes = self.input.bytes::<8>();
                let _ = self.ram.write(at, &bytes);
            }
            _ => {}
        }
    }

    fn exit(&mut self) -> VmExit {
        let msr = |input: &mut Input<'_>| {
            let low = u32::from(input.u16());
            Msr(match input.u8() % 4 {
                0 => low,
                1 => 0x800 + low % 0x100,
                2 => 0xC000_0000 + low % 0x200,
                _ => 0xC001_0000 + low,
            })
        };
        match self.input.u8() % 22 {
            0 => VmExit::Interrupted,
            1 => VmExit::InterruptWindow,
            2 => VmExit::Cpuid,
            3 => VmExit::Halt,
            4 => VmExit::Idle,
            5 => VmExit::ReadMsr(msr(&mut self.input)),
            6 => VmExit::WriteMsr(msr(&mut self.input), self.input.u64()),
            7 => VmExit::SetXcr {
                index: self.input.u8().into(),
                value: self.input.u64(),
            },
            8 | 9 => VmExit::Port(self.port()),
            10 => VmExit::StringPort(self.port()),
            11 | 12 => {
                let gpa = self.address();
                let flags = self.input.u8();
                VmExit::Memory(MemoryAccess {
                    gpa,
                    gva: None,
                    write: flags & 1 != 0,
                    fetch: flags & 2 != 0,
                    table: flags & 4 != 0,
                })
            }
            13 => VmExit::Mmio {
                gpa: self.address(),
                data: self.input.u64(),
                size: 1 << (self.input.u8() % 4),
                write: self.input.u8() & 1 != 0,
            },
            14 => VmExit::ApicWrite {
                register: self.input.u16() & 0xFFF,
            },
            15 => VmExit::EndOfInterrupt(self.input.u8()),
            16 => VmExit::Hypercall,
            17 => VmExit::CacheFlush,
            18 => VmExit::Forbidden,
            19 => VmExit::Exception {
                vector: self.input.u8() & 31,
                error_code: (self.input.u8() & 1 != 0).then_some(0),
            },
            20 => VmExit::ControlRegister,
            _ => VmExit::DeliveryDue,
        }
    }
}

impl Vcpu for Scripted<'_> {
    fn run(&mut self, requests: &AtomicU32) -> Result<VmExit, VcpuError> {
        if requests.load(Ordering::SeqCst) != 0 {
            return Ok(VmExit::Interrupted);
        }
        self.injected = false;
        if self.input.is_empty() {
            return Ok(VmExit::Shutdown);
        }
        self.live();
        Ok(self.exit())
    }

    fn gprs(&self) -> &Gprs {
        &self.gprs
    }

    fn gprs_mut(&mut self) -> &mut Gprs {
        &mut self.gprs
    }

    fn rip(&self) -> u64 {
        self.system.rip
    }

    fn set_rip(&mut self, rip: u64) {
        self.system.rip = rip;
    }

    fn system(&self) -> SystemRegisters {
        self.system
    }

    fn set_system(&mut self, system: &SystemRegisters) {
        self.system = *system;
    }

    fn advance(&mut self) {
        self.system.rip = self.system.rip.wrapping_add(2);
    }

    fn complete_read(&mut self, data: u64) {
        self.gprs.rax = data;
    }

    fn can_take_interrupt(&self) -> bool {
        self.system.rflags & 1 << 9 != 0 && !self.injected
    }

    fn can_take_nmi(&self) -> bool {
        !self.injected
    }

    fn inject(&mut self, _: Event) {
        self.injected = true;
    }

    fn single_step(&mut self) {
        self.injected = true;
    }

    fn set_interrupt_window(&mut self, wanted: Option<AwaitedInterrupt>) {
        self.window = wanted;
    }

    fn forget_memory(&mut self) -> Result<(), VcpuError> {
        Ok(())
    }

    fn task_priority(&self) -> u8 {
        self.system.cr8 as u8 & 15
    }

    fn set_task_priority(&mut self, cr8: u8) {
        self.system.cr8 = cr8.into();
    }

    fn read_msr(&mut self, msr: Msr) -> Option<u64> {
        (msr == Msr::EFER).then_some(self.system.efer)
    }

    fn write_msr(&mut self, msr: Msr, value: u64) -> Option<bool> {
        (msr == Msr::EFER).then(|| {
            self.system.efer = value & 0xD01;
            value & !0xD01 == 0
        })
    }

    fn set_xcr(&mut self, index: u32, value: u64) -> bool {
        let valid = index == 0 && value & !7 == 0 && value & 1 != 0;
        if valid {
            self.xcr0 = value;
        }
        valid
    }

    fn xcr0(&self) -> u64 {
        self.xcr0
    }

    fn pkru(&self) -> u32 {
        self.pkru
    }

    fn cr4(&self) -> u64 {
        self.system.cr4
    }

    fn cpl(&self) -> u8 {
        self.system.ss.attributes.dpl()
    }

    fn set_cr2(&mut self, cr2: u64) {
        self.system.cr2 = cr2;
    }

    fn set_rflags(&mut self, rflags: u64) {
        self.system.rflags = rflags;
    }

    fn xmm(&self, number: u8) -> Option<u128> {
        self.xmm.get(usize::from(number)).copied()
    }

    fn set_xmm(&mut self, number: u8, value: u128) {
        if let Some(register) = self.xmm.get_mut(usize::from(number)) {
            *register = value;
        }
    }

    fn guest_tsc(&self, host_tsc: u64) -> u64 {
        host_tsc.wrapping_add(self.tsc_offset)
    }

    fn set_guest_tsc(&mut self, host_tsc: u64, guest_tsc: u64) {
        self.tsc_offset = guest_tsc.wrapping_sub(host_tsc);
    }
}

/// Any exits of a guest's one vCPU.
pub fn exits(data: &[u8]) {
    let memory = Ram::new();
    let config = MachineConfig {
        vcpus: 1,
        memory: MIN_RAM,
        nested: false,
        hyperv: false,
        pschange_mc_no: false,
        time_limit: Some(TIME_LIMIT),
        start_time: 0,
    };
    let host = Arc::new(Clock(AtomicU64::new(0)));
    let console = Box::new(|_: u8| {});
    let processor = Cpuid::new();
    let (machine, lapics) =
        Machine::new(config, memory.ram.clone(), host, &processor, console).unwrap();
    for lapic in lapics {
        let vcpu = Scripted {
            input: Input(data),
            ram: &memory.ram,
            gprs: Gprs::default(),
            system: SystemRegisters::reset(),
            xmm: [0; 16],
            xcr0: 1,
            pkru: 0,
            tsc_offset: 0,
            window: None,
            injected: false,
        };
        let start = boot::BootState {
            system: SystemRegisters::reset(),
            gprs: Gprs::default(),
        };
        let stop = VcpuLoop::new(&machine, vcpu, lapic, Some(&start)).run();
        let _ = stop.to_string();
    }
}

/// Any kernel with a module.
pub fn kernel(data: &[u8]) {
    let memory = Ram::new();
    let layout = Layout::new(MIN_RAM, 40).unwrap();
    let (module, kernel) = data.split_at(data.len().min(16));
    let modules = [Module {
        data: module,
        arguments: b"module",
    }];
    let image = BootImage {
        kernel,
        command_line: b"console=ttyS0",
        modules: &modules,
        rsdp: None,
    };
    if let Err(error) = boot::load(&memory.ram, &layout, &image) {
        let _ = error.to_string();
    }
}
