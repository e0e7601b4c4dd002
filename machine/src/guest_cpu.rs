//! A vCPU as the instruction emulator sees it: registers from the backend, memory through the
//! guest's own paging, devices behind what is not memory.

use testudo_arch::regs::{CpuMode, SegmentRegister, SystemRegisters};
use testudo_arch::segment::DescriptorTable;
use testudo_arch::{Cr4Flags, Gpa, Gprs, GuestMemory, Gva, PageSize, RFlags, Segment};
use testudo_ept::walk::{Access, PagingState};

use crate::bus::{MmioBus, PortBus};
use crate::emulate::linear::{self, Miss, Reach};
use crate::emulate::{Cpu, Fault, Intent};
use crate::irq::Lapic;
use crate::vcpu::Vcpu;

/// The vCPU and what its instructions can reach.
pub(crate) struct GuestCpu<'a, V, M> {
    pub(crate) vcpu: &'a mut V,
    pub(crate) memory: &'a M,
    pub(crate) mmio: &'a MmioBus,
    pub(crate) ports: &'a PortBus,
    pub(crate) lapic: &'a mut Lapic,
    /// Read once: the instruction that is emulated changes none of them but RFLAGS and RIP, which
    /// are kept apart.
    system: SystemRegisters,
    paging: PagingState,
    rflags: u64,
    /// A walk gave up, because the guest's tables kept changing or the second stage has no
    /// translation yet: whatever the emulator says, the instruction has not been executed and is to
    /// be tried again.
    contended: bool,
    /// The instruction is emulated because it writes to memory that the backend watches.
    watched: bool,
    /// The processor is emulated as a whole.
    whole: bool,
    /// Segment registers or descriptor tables have changed.
    segments_changed: bool,
    /// SS is among them, behind which interrupts wait for the stack pointer.
    stack_changed: bool,
}

impl<'a, V: Vcpu, M: GuestMemory> GuestCpu<'a, V, M> {
    pub(crate) fn new(
        vcpu: &'a mut V,
        memory: &'a M,
        (mmio, ports): (&'a MmioBus, &'a PortBus),
        lapic: &'a mut Lapic,
        physical_bits: u8,
    ) -> Self {
        vcpu.load_rsp();
        let system = vcpu.system();
        let paging = paging_state(&system, vcpu.pkru(), physical_bits);
        let rflags = system.rflags;
        Self {
            vcpu,
            memory,
            mmio,
            ports,
            lapic,
            system,
            paging,
            rflags,
            contended: false,
            watched: false,
            whole: false,
            segments_changed: false,
            stack_changed: false,
        }
    }

    /// As a whole, for a processor that cannot run.
    pub(crate) fn whole(mut self) -> Self {
        self.whole = true;
        self
    }

    /// For an instruction that accesses `gpa`.
    pub(crate) fn accessing(mut self, gpa: Option<Gpa>) -> Self {
        self.watched = gpa.is_some_and(|gpa| self.memory.contains(gpa, 1));
        self
    }

    /// Where in the local APIC's page this address is, if it is.
    fn lapic_offset(&self, gpa: Gpa) -> Option<u64> {
        let page = self.lapic.mmio_window()?;
        (gpa.align_down(PageSize::Size4K) == page).then(|| gpa.offset_in(PageSize::Size4K))
    }

    /// Writes back what the instruction changed beyond the general registers; `false` if it has
    /// to be tried again, whatever the emulator said.
    pub(crate) fn finish(self) -> bool {
        if self.contended {
            self.vcpu.settle_refusal();
        }
        if self.rflags != self.system.rflags {
            self.vcpu.set_rflags(self.rflags);
        }
        if self.segments_changed {
            self.vcpu.set_segments(&self.system);
        }
        let interrupts = RFlags::INTERRUPT_FLAG.bits();
        let enabled = self.rflags & !self.system.rflags & interrupts != 0;
        if self.whole && (enabled || self.stack_changed) {
            self.vcpu.begin_interrupt_shadow();
        }
        !self.contended
    }
}

/// What decides how this processor translates linear addresses.
pub(crate) fn paging_state(system: &SystemRegisters, pkru: u32, physical_bits: u8) -> PagingState {
    PagingState {
        cr0: system.cr0,
        cr3: system.cr3,
        cr4: system.cr4,
        efer: system.efer,
        alignment_check: system.rflags & RFlags::ALIGNMENT_CHECK.bits() != 0,
        pkru,
        physical_bits,
        ..PagingState::default()
    }
}

impl<V: Vcpu, M: GuestMemory> Reach for GuestCpu<'_, V, M> {
    fn system(&self) -> &SystemRegisters {
        &self.system
    }

    fn find(&mut self, address: Gva, access: Access) -> Result<Gpa, Miss> {
        let stage = |gpa, access| self.vcpu.translate(gpa, &access);
        linear::walk(self.memory, &self.paging, address, access, stage)
    }

    fn put_off(&mut self) {
        self.contended = true;
    }

    fn load(&mut self, gpa: Gpa, data: &mut [u8]) {
        if let Some(offset) = self.lapic_offset(gpa) {
            self.lapic.set_cr8(self.vcpu.task_priority());
            self.lapic.read_mmio(offset, data);
        } else if self.memory.read(gpa, data).is_err() {
            self.mmio.read(gpa.0, data);
        }
    }

    fn store(&mut self, gpa: Gpa, data: &[u8]) {
        if let Some(offset) = self.lapic_offset(gpa) {
            self.lapic.set_cr8(self.vcpu.task_priority());
            self.lapic.write_mmio(offset, data);
            let cr8 = self.lapic.cr8();
            if cr8 != self.vcpu.task_priority() {
                self.vcpu.set_task_priority(cr8);
            }
        } else if self.memory.write(gpa, data).is_ok() {
            self.vcpu.memory_written(gpa, data.len());
        } else {
            self.mmio.write(gpa.0, data);
        }
    }

    fn exchange(&mut self, gpa: Gpa, current: &[u8], new: &[u8]) -> Option<bool> {
        let exchanged = linear::exchange(self.memory, gpa, current, new)?;
        if exchanged {
            self.vcpu.memory_written(gpa, new.len());
        }
        Some(exchanged)
    }
}

impl<V: Vcpu, M: GuestMemory> Cpu for GuestCpu<'_, V, M> {
    fn gprs(&self) -> &Gprs {
        self.vcpu.gprs()
    }

    fn gprs_mut(&mut self) -> &mut Gprs {
        self.vcpu.gprs_mut()
    }

    fn rip(&self) -> u64 {
        self.vcpu.rip()
    }

    fn set_rip(&mut self, rip: u64) {
        self.vcpu.set_rip(rip);
    }

    fn rflags(&self) -> u64 {
        self.rflags
    }

    fn set_rflags(&mut self, rflags: u64) {
        self.rflags = rflags;
    }

    fn mode(&self) -> CpuMode {
        self.system.mode()
    }

    fn segment(&self, register: SegmentRegister) -> Segment {
        *self.system.segment(register)
    }

    fn linear_bits(&self) -> u8 {
        if self.system.cr4 & Cr4Flags::L5_PAGING.bits() != 0 {
            57
        } else {
            48
        }
    }

    fn cpl(&self) -> u8 {
        self.system.cpl()
    }

    fn is_whole(&self) -> bool {
        self.whole
    }

    fn set_segment(&mut self, register: SegmentRegister, segment: &Segment) -> bool {
        if self.whole {
            *self.system.segment_mut(register) = *segment;
            self.segments_changed = true;
            self.stack_changed |= register == SegmentRegister::Ss;
        }
        self.whole
    }

    fn descriptor_tables(&self) -> [DescriptorTable; 2] {
        [self.system.gdtr, self.system.idtr]
    }

    fn set_descriptor_table(&mut self, interrupts: bool, table: DescriptorTable) -> bool {
        if self.whole {
            if interrupts {
                self.system.idtr = table;
            } else {
                self.system.gdtr = table;
            }
            self.segments_changed = true;
        }
        self.whole
    }

    /// Whoever writes to a table so is about to make something else of it: the backend need not
    /// watch that.
    fn repeats_natively(&self) -> bool {
        self.watched
    }

    fn control_register(&self, number: u8) -> Option<u64> {
        match number {
            0 => Some(self.system.cr0),
            2 => Some(self.system.cr2),
            3 => Some(self.system.cr3),
            4 => Some(self.system.cr4),
            8 => Some(self.system.cr8),
            _ => None,
        }
    }

    fn set_control_register(&mut self, number: u8, value: u64) -> Result<(), Fault> {
        let done = match number {
            0 | 3 | 4 => self.vcpu.set_control_register(number, value),
            2 => {
                self.vcpu.set_cr2(value);
                true
            }
            8 if value <= 15 => {
                self.vcpu.set_task_priority(value as u8);
                true
            }
            _ => false,
        };
        done.then_some(()).ok_or(Fault::GP0)
    }

    fn invalidate_page(&mut self, address: Gva) -> Result<(), Fault> {
        self.vcpu.invalidate_page(address);
        Ok(())
    }

    fn fetch(&mut self, address: Gva, code: &mut [u8]) -> Result<usize, Fault> {
        linear::fetch(self, address, code)
    }

    fn read(&mut self, address: Gva, data: &mut [u8], intent: Intent) -> Result<(), Fault> {
        linear::read(self, address, data, intent)
    }

    fn write(&mut self, address: Gva, data: &[u8]) -> Result<(), Fault> {
        linear::write(self, address, data)
    }

    fn probe_write(&mut self, address: Gva, len: usize) -> Result<(), Fault> {
        linear::probe_write(self, address, len)
    }

    fn compare_exchange(
        &mut self,
        address: Gva,
        current: &[u8],
        new: &[u8],
    ) -> Result<bool, Fault> {
        linear::compare_exchange(self, address, current, new)
    }

    fn port_in(&mut self, port: u16, data: &mut [u8]) {
        self.ports.read(port, data);
    }

    fn port_out(&mut self, port: u16, data: &[u8]) {
        self.ports.write(port, data);
    }

    fn xmm(&self, number: u8) -> Option<u128> {
        self.vcpu.xmm(number)
    }

    fn set_xmm(&mut self, number: u8, value: u128) {
        self.vcpu.set_xmm(number, value);
    }
}
