//! The instructions that a guest executes by an exit: CPUID, RDMSR and WRMSR, IN and OUT, and hypercalls.

use testudo_arch::{Event, Gprs, GuestMemory, Msr};

use super::VcpuLoop;
use crate::irq::Lapic;
use crate::policy::cpuid::CpuidState;
use crate::policy::hyperv::{self, HyperV};
use crate::vcpu::{PortAccess, Vcpu};

impl<V: Vcpu, M: GuestMemory> VcpuLoop<'_, V, M> {
    /// Ends an instruction that was executed, or raises #GP(0) for one that was refused.
    #[inline]
    pub(super) fn complete(&mut self, done: bool) {
        if done {
            self.advance();
        } else {
            self.raise(Event::GP0, None);
        }
    }

    #[inline(always)]
    pub(super) fn cpuid(&mut self) {
        self.answer_cpuid();
        self.vcpu.advance();
    }

    #[inline(always)]
    pub(super) fn answer_cpuid(&mut self) {
        let leaf = self.vcpu.gprs().rax as u32;
        if let Some(&answer) = self.machine.cpuid.constant(leaf) {
            set_cpuid(self.vcpu.gprs_mut(), answer);
        } else {
            self.answer_varying_cpuid(leaf);
        }
    }

    #[inline(never)]
    fn answer_varying_cpuid(&mut self, leaf: u32) {
        let subleaf = self.vcpu.gprs().rcx as u32;
        // Few leaves depend on these registers.
        let state = CpuidState {
            apic_id: self.index as u32,
            cr4: if matches!(leaf, 1 | 7) {
                self.vcpu.cr4()
            } else {
                0
            },
            xcr0: if leaf == 0xD { self.vcpu.xcr0() } else { 0 },
        };
        let answer = self.machine.cpuid.query(leaf, subleaf, &state);
        set_cpuid(self.vcpu.gprs_mut(), answer);
    }

    pub(super) fn read_msr(&mut self, msr: Msr) {
        let value = if Lapic::owns_msr(msr) {
            self.lapic.set_cr8(self.vcpu.task_priority());
            self.lapic.read_msr(msr).ok()
        } else if let Some(value) = self.vcpu.read_msr(msr) {
            Some(value)
        } else {
            match msr {
                Msr::TSC => Some(self.vcpu.guest_tsc(self.machine.host.tsc())),
                Msr::TSC_ADJUST => Some(self.tsc_adjust),
                _ => self.machine_msr(msr),
            }
        };
        if let Some(value) = value {
            let gprs = self.vcpu.gprs_mut();
            (gprs.rax, gprs.rdx) = (value & 0xFFFF_FFFF, value >> 32);
        }
        self.complete(value.is_some());
    }

    #[inline]
    pub(super) fn write_msr(&mut self, msr: Msr, value: u64) {
        let done = if Lapic::owns_msr(msr) {
            self.attention = true;
            let (vcpu, host) = (&self.vcpu, &self.machine.host);
            let guest_tsc = || vcpu.guest_tsc(host.tsc());
            self.lapic.set_cr8(self.vcpu.task_priority());
            let done = self.lapic.write_msr(msr, value, guest_tsc).is_ok();
            if msr == Msr::X2APIC_TPR {
                self.vcpu.set_task_priority(self.lapic.cr8());
            }
            done
        } else if let Some(done) = self.vcpu.write_msr(msr, value) {
            done
        } else {
            match msr {
                Msr::TSC => {
                    let host_tsc = self.machine.host.tsc();
                    let moved = value.wrapping_sub(self.vcpu.guest_tsc(host_tsc));
                    self.tsc_adjust = self.tsc_adjust.wrapping_add(moved);
                    self.set_tsc(host_tsc, value);
                    true
                }
                // "If an execution of WRMSR to the IA32_TSC_ADJUST MSR adds (or subtracts) value X
                // ..., the logical processor also adds (or subtracts) value X from the TSC" (SDM
                // vol. 3B, 18.17.3).
                Msr::TSC_ADJUST => {
                    let moved = value.wrapping_sub(self.tsc_adjust);
                    self.tsc_adjust = value;
                    if moved != 0 {
                        let host_tsc = self.machine.host.tsc();
                        let guest_tsc = self.vcpu.guest_tsc(host_tsc).wrapping_add(moved);
                        self.set_tsc(host_tsc, guest_tsc);
                    }
                    true
                }
                _ => self.set_machine_msr(msr, value),
            }
        };
        self.complete(done);
    }

    /// A register that is neither the vCPU's nor its local APIC's.
    fn machine_msr(&mut self, msr: Msr) -> Option<u64> {
        let read = self.msrs.read(msr).ok();
        match &self.machine.hyperv {
            Some(hyperv) if read.is_none() => {
                self.lapic.set_cr8(self.vcpu.task_priority());
                hyperv.read(msr, self.index, &mut self.lapic)
            }
            _ => read,
        }
    }

    fn set_machine_msr(&mut self, msr: Msr, value: u64) -> bool {
        let done = self.msrs.write(msr, value).is_ok();
        match &self.machine.hyperv {
            Some(hyperv) if !done => {
                self.attention = true;
                self.lapic.set_cr8(self.vcpu.task_priority());
                let done = hyperv.write(msr, value, &self.machine.memory, &mut self.lapic);
                self.vcpu.set_task_priority(self.lapic.cr8());
                done
            }
            _ => done,
        }
    }

    fn set_tsc(&mut self, host_tsc: u64, guest_tsc: u64) {
        self.vcpu.set_guest_tsc(host_tsc, guest_tsc);
        self.lapic.tsc_changed(guest_tsc);
        self.attention = true;
    }

    #[inline]
    pub(super) fn port(&mut self, access: PortAccess) {
        let size = usize::from(access.size).min(4);
        if access.write {
            let data = (self.vcpu.gprs().rax as u32).to_le_bytes();
            self.machine.ports.write(access.port, &data[..size]);
            self.check_power();
        } else {
            let mut data = [0; 4];
            self.machine.ports.read(access.port, &mut data[..size]);
            let value = u64::from(u32::from_le_bytes(data));
            let rax = &mut self.vcpu.gprs_mut().rax;
            // IN to EAX clears the upper half, as every 32-bit result does.
            *rax = match size {
                1 => (*rax & !0xFF) | value,
                2 => (*rax & !0xFFFF) | value,
                _ => value,
            };
        }
        self.vcpu.advance();
    }

    /// No hypercalls are offered: RAX says so, as KVM's interface does for an unknown one, or Hyper-V's
    /// for a guest that has turned to that. User mode gets #UD.
    pub(super) fn hypercall(&mut self) {
        const NOT_IMPLEMENTED: i64 = -1000;
        if self.vcpu.cpl() == 0 {
            let hyperv = self.machine.hyperv.as_ref();
            self.vcpu.gprs_mut().rax = match hyperv.is_some_and(HyperV::has_hypercalls) {
                true => hyperv::INVALID_HYPERCALL_CODE,
                false => NOT_IMPLEMENTED as u64,
            };
            self.vcpu.advance();
        } else {
            self.raise(Event::UD, None);
        }
    }
}

/// Puts what CPUID answers into the registers, whose upper halves it clears.
#[inline]
fn set_cpuid(gprs: &mut Gprs, [eax, ebx, ecx, edx]: [u32; 4]) {
    (gprs.rax, gprs.rbx) = (u64::from(eax), u64::from(ebx));
    (gprs.rcx, gprs.rdx) = (u64::from(ecx), u64::from(edx));
}
