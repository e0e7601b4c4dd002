//! A vCPU as the instruction emulator sees it: registers from the backend, memory through the
//! guest's own paging, devices behind what is not memory.

use testudo_arch::regs::{CpuMode, SegmentRegister, SystemRegisters};
use testudo_arch::segment::DescriptorTable;
use testudo_arch::{Cr4Flags, Gpa, Gprs, GuestMemory, Gva, PAGE_SIZE, PageSize, RFlags, Segment};
use testudo_ept::walk::{Access, AccessKind, PageFaultCode, PagingState, WalkError, walk_nested};

use crate::bus::{MmioBus, PortBus};
use crate::emulate::{Cpu, Fault, Intent};
use crate::irq::Lapic;
use crate::vcpu::Vcpu;

/// The longest access of one instruction: two pages at the most.
const MAX_PARTS: usize = 2;

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

/// The second stage has no translation at present.
struct Untranslated;

/// The guest-physical pieces of a linear access.
struct Parts {
    pieces: [(Gpa, usize); MAX_PARTS],
    count: usize,
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

    fn translate(&mut self, address: Gva, len: usize, kind: AccessKind) -> Result<Parts, Fault> {
        let access = Access::at_cpl(kind, self.system.cpl());
        let mut parts = Parts {
            pieces: [(Gpa::ZERO, 0); MAX_PARTS],
            count: 0,
        };
        let first = len.min((PAGE_SIZE - address.offset_in(PageSize::Size4K)) as usize);
        for (skip, len) in [(0, first), (first, len - first)] {
            if len == 0 {
                break;
            }
            let at = self.wrap(address.wrapping_add(skip as u64));
            let vcpu = &mut *self.vcpu;
            let stage = |gpa, _| vcpu.translate(gpa).ok_or(Untranslated);
            let found = walk_nested(self.memory, &self.paging, at, access, stage);
            match found.map(|found| self.vcpu.translate(found.gpa)) {
                Ok(Some(gpa)) => parts.pieces[parts.count] = (gpa, len),
                Ok(None) => return Err(self.try_again()),
                Err(error) => return Err(self.fault(at, access, error)),
            }
            parts.count += 1;
        }
        Ok(parts)
    }

    /// The exception for a walk that leads nowhere.
    #[cold]
    fn fault(&mut self, at: Gva, access: Access, error: WalkError<Untranslated>) -> Fault {
        match error {
            WalkError::Fault(fault) => Fault::page(fault.address, fault.code.bits()),
            WalkError::NonCanonical(_) => Fault::GP0,
            WalkError::Contended | WalkError::SecondStage { .. } => self.try_again(),
            // A bus that nobody drives reads as ones, and a table entry of ones has reserved bits set.
            _ => {
                let mut code = PageFaultCode::PRESENT | PageFaultCode::RESERVED;
                code.set(PageFaultCode::WRITE, access.kind == AccessKind::Write);
                code.set(PageFaultCode::USER, self.system.cpl() == 3);
                Fault::page(at, code.bits())
            }
        }
    }

    /// The instruction is to be executed again; the fault only ends this attempt.
    fn try_again(&mut self) -> Fault {
        self.contended = true;
        Fault::GP0
    }

    /// Outside 64-bit mode, linear addresses are 32 bits wide.
    fn wrap(&self, address: Gva) -> Gva {
        if self.system.mode() == CpuMode::Long64 {
            address
        } else {
            Gva(address.0 & 0xFFFF_FFFF)
        }
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

    /// Where in the local APIC's page this address is, if it is.
    fn lapic_offset(&self, gpa: Gpa) -> Option<u64> {
        let page = self.lapic.mmio_window()?;
        (gpa.align_down(PageSize::Size4K) == page).then(|| gpa.offset_in(PageSize::Size4K))
    }

    /// Writes back what the instruction changed beyond the general registers; `false` if it has
    /// to be tried again, whatever the emulator said.
    pub(crate) fn finish(self) -> bool {
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
        let room = (PAGE_SIZE - address.offset_in(PageSize::Size4K)) as usize;
        let len = code.len().min(room);
        let parts = self.translate(address, len, AccessKind::Fetch)?;
        let (gpa, len) = parts.pieces[0];
        self.load(gpa, &mut code[..len]);
        Ok(len)
    }

    fn read(&mut self, address: Gva, data: &mut [u8], intent: Intent) -> Result<(), Fault> {
        let kind = match intent {
            Intent::Read => AccessKind::Read,
            Intent::Modify => AccessKind::Write,
        };
        let parts = self.translate(address, data.len(), kind)?;
        let mut rest = data;
        for &(gpa, len) in &parts.pieces[..parts.count] {
            let (part, tail) = rest.split_at_mut(len);
            self.load(gpa, part);
            rest = tail;
        }
        Ok(())
    }

    fn write(&mut self, address: Gva, data: &[u8]) -> Result<(), Fault> {
        let parts = self.translate(address, data.len(), AccessKind::Write)?;
        let mut rest = data;
        for &(gpa, len) in &parts.pieces[..parts.count] {
            let (part, tail) = rest.split_at(len);
            self.store(gpa, part);
            rest = tail;
        }
        Ok(())
    }

    fn probe_write(&mut self, address: Gva, len: usize) -> Result<(), Fault> {
        self.translate(address, len, AccessKind::Write).map(|_| ())
    }

    fn compare_exchange(
        &mut self,
        address: Gva,
        current: &[u8],
        new: &[u8],
    ) -> Result<bool, Fault> {
        let parts = self.translate(address, new.len(), AccessKind::Write)?;
        let (gpa, len) = parts.pieces[0];
        if len == new.len() && self.memory.contains(gpa, len as u64) {
            let swapped = match (<[u8; 4]>::try_from(current), <[u8; 8]>::try_from(current)) {
                (Ok(old), _) if gpa.0.is_multiple_of(4) => {
                    let [a, b, c, d] = [new[0], new[1], new[2], new[3]];
                    let new = u32::from_le_bytes([a, b, c, d]);
                    let result =
                        self.memory
                            .compare_exchange_u32(gpa, u32::from_le_bytes(old), new);
                    result.is_ok_and(|exchanged| exchanged.is_ok())
                }
                (_, Ok(old)) if gpa.0.is_multiple_of(8) => {
                    let new = u64::from_le_bytes(core::array::from_fn(|i| new[i]));
                    let result =
                        self.memory
                            .compare_exchange_u64(gpa, u64::from_le_bytes(old), new);
                    result.is_ok_and(|exchanged| exchanged.is_ok())
                }
                _ => return self.write(address, new).map(|()| true),
            };
            if swapped {
                self.vcpu.memory_written(gpa, len);
            }
            return Ok(swapped);
        }
        self.write(address, new).map(|()| true)
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
