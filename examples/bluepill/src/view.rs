//! The guest as the instruction emulator sees it: for the writes to the local APIC's page, which nobody
//! but the hypervisor makes, and for string instructions at ports that are watched.

use testudo_arch::memory::GuestRam;
use testudo_arch::regs::{CpuMode, SegmentRegister, SystemRegisters};
use testudo_arch::{Cr4Flags, Gpa, Gprs, GuestMemory, Gva, PAGE_SIZE, PageSize, RFlags, Segment};
use testudo_ept::walk::{Access, AccessKind, PageFaultCode, PagingState, WalkError, walk_nested};
use testudo_machine::emulate::{Cpu, Fault, Intent};

use crate::apic::{self, Command};
use crate::ports;
use crate::sleep::SleepControl;

/// The longest access of one instruction: two pages at the most.
const MAX_PARTS: usize = 2;

/// The table that the addresses of the guest's own guest go through.
pub(crate) trait Translate {
    /// Where the guest has this address of its guest's.
    fn translate(&mut self, gpa: Gpa) -> Option<Gpa>;
}

/// Whatever runs, the guest or a guest of its own, and what its instructions can reach.
pub(crate) struct View<'a> {
    pub(crate) gprs: &'a mut Gprs,
    pub(crate) xmm: &'a mut [u128; 16],
    /// Read once: an instruction changes none of them but RIP and RFLAGS, which are to be written back.
    pub(crate) system: SystemRegisters,
    pub(crate) stage: Option<&'a mut dyn Translate>,
    pub(crate) memory: &'a GuestRam,
    pub(crate) sleep: &'a SleepControl,
    pub(crate) physical_bits: u8,
    /// A walk gave up: the instruction has not been executed and is to be tried again.
    pub(crate) contended: bool,
    /// What is left to be done for the guest.
    pub(crate) command: Command,
}

/// The second stage has no translation at present.
struct Untranslated;

/// The guest-physical pieces of a linear access.
struct Parts {
    pieces: [(Gpa, usize); MAX_PARTS],
    count: usize,
}

impl View<'_> {
    fn paging(&self) -> PagingState {
        let system = &self.system;
        PagingState {
            cr0: system.cr0,
            cr3: system.cr3,
            cr4: system.cr4,
            efer: system.efer,
            alignment_check: system.rflags & RFlags::ALIGNMENT_CHECK.bits() != 0,
            physical_bits: self.physical_bits,
            ..PagingState::default()
        }
    }

    fn second_stage(&mut self, gpa: Gpa) -> Option<Gpa> {
        match &mut self.stage {
            Some(stage) => stage.translate(gpa),
            None => Some(gpa),
        }
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
            let (memory, paging) = (self.memory, self.paging());
            let found = walk_nested(memory, &paging, at, access, |gpa, _| {
                self.second_stage(gpa).ok_or(Untranslated)
            });
            match found.map(|found| self.second_stage(found.gpa)) {
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
            // Tables that are not in memory: a device's registers are no tables.
            _ => {
                let mut code = PageFaultCode::PRESENT | PageFaultCode::RESERVED;
                code.set(PageFaultCode::WRITE, access.kind == AccessKind::Write);
                code.set(PageFaultCode::USER, self.system.cpl() == 3);
                Fault::page(at, code.bits())
            }
        }
    }

    /// The fault only ends this attempt.
    fn try_again(&mut self) -> Fault {
        self.contended = true;
        Fault::GP0
    }

    /// Outside 64-bit mode, linear addresses are 32 bits wide.
    fn wrap(&self, address: Gva) -> Gva {
        if self.mode() == CpuMode::Long64 {
            address
        } else {
            Gva(address.0 & 0xFFFF_FFFF)
        }
    }

    /// Memory, or the local APIC by whole registers; an instruction that involves another device beside
    /// the local APIC finds nothing there.
    fn load(&self, gpa: Gpa, data: &mut [u8]) {
        if gpa.align_down(PageSize::Size4K) == Gpa(apic::BASE) {
            let value = match register(gpa, data.len()) {
                Some(offset) => apic::read(offset),
                None => u32::MAX,
            };
            data.fill(0xFF);
            for (byte, value) in data.iter_mut().zip(value.to_le_bytes()) {
                *byte = value;
            }
        } else if self.memory.read(gpa, data).is_err() {
            data.fill(0xFF);
        }
    }

    fn store(&mut self, gpa: Gpa, data: &[u8]) {
        if gpa.align_down(PageSize::Size4K) != Gpa(apic::BASE) {
            // Nothing is lost but what nobody would have taken.
            let _nobody = self.memory.write(gpa, data).is_err();
        } else if let (Some(offset), Ok(value)) = (register(gpa, data.len()), data.try_into()) {
            let command = apic::write_for_guest(offset, u32::from_le_bytes(value));
            if command != Command::Pass {
                self.command = command;
            }
        }
    }
}

/// The register that an access to the local APIC's page means: "aligned … 4-byte" ones only (APM vol. 2,
/// 16.3.2).
fn register(gpa: Gpa, len: usize) -> Option<u64> {
    let offset = gpa.offset_in(PageSize::Size4K);
    (len == 4 && offset.is_multiple_of(16)).then_some(offset)
}

impl Cpu for View<'_> {
    fn gprs(&self) -> &Gprs {
        self.gprs
    }

    fn gprs_mut(&mut self) -> &mut Gprs {
        self.gprs
    }

    fn rip(&self) -> u64 {
        self.system.rip
    }

    fn set_rip(&mut self, rip: u64) {
        self.system.rip = rip;
    }

    fn rflags(&self) -> u64 {
        self.system.rflags
    }

    fn set_rflags(&mut self, rflags: u64) {
        self.system.rflags = rflags;
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
        let swapped = match (<[u8; 4]>::try_from(current), <[u8; 8]>::try_from(current)) {
            (Ok(old), _) if len == 4 && self.memory.contains(gpa, 4) && gpa.0.is_multiple_of(4) => {
                let new = u32::from_le_bytes([new[0], new[1], new[2], new[3]]);
                let old = u32::from_le_bytes(old);
                self.memory
                    .compare_exchange_u32(gpa, old, new)
                    .map(|done| done.is_ok())
            }
            (_, Ok(old)) if len == 8 && self.memory.contains(gpa, 8) && gpa.0.is_multiple_of(8) => {
                let new = u64::from_le_bytes(core::array::from_fn(|i| new[i]));
                let old = u64::from_le_bytes(old);
                self.memory
                    .compare_exchange_u64(gpa, old, new)
                    .map(|done| done.is_ok())
            }
            // The registers of a device are written as by a plain write.
            _ => return self.write(address, new).map(|()| true),
        };
        Ok(swapped.unwrap_or(false))
    }

    fn port_in(&mut self, port: u16, data: &mut [u8]) {
        let value = ports::read(port, data.len() as u8).to_le_bytes();
        let len = data.len().min(value.len());
        data[..len].copy_from_slice(&value[..len]);
    }

    fn port_out(&mut self, port: u16, data: &[u8]) {
        let mut value = [0; 4];
        let size = data.len().min(value.len());
        value[..size].copy_from_slice(&data[..size]);
        let value = u32::from_le_bytes(value);
        let value = self.sleep.filter(port, size as u8, value);
        ports::write(port, size as u8, value);
    }

    fn xmm(&self, number: u8) -> Option<u128> {
        self.xmm.get(usize::from(number)).copied()
    }

    fn set_xmm(&mut self, number: u8, value: u128) {
        if let Some(register) = self.xmm.get_mut(usize::from(number)) {
            *register = value;
        }
    }
}
