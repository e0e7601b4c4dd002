//! The guest as the instruction emulator sees it: for the writes to the local APIC's page, which nobody
//! but the hypervisor makes, and for string instructions at ports that are watched.

use testudo_arch::memory::GuestRam;
use testudo_arch::regs::{CpuMode, SegmentRegister, SystemRegisters};
use testudo_arch::{Cr4Flags, Gpa, Gprs, GuestMemory, Gva, PageSize, RFlags, Segment};
use testudo_ept::walk::{Access, PagingState};
use testudo_machine::emulate::linear::{self, Miss, Reach, StageAccess};
use testudo_machine::emulate::{Cpu, Fault, Intent};

use crate::apic::{self, Command};
use crate::ports;
use crate::sleep::SleepControl;

/// The table that the addresses of the guest's own guest go through.
pub(crate) trait Translate {
    /// Where the guest has this address of its guest's, for writing too if that is to be done.
    fn translate(&mut self, gpa: Gpa, write: bool) -> Option<Gpa>;
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
}

/// The register that an access to the local APIC's page means: "aligned … 4-byte" ones only (APM vol. 2,
/// 16.3.2).
fn register(gpa: Gpa, len: usize) -> Option<u64> {
    let offset = gpa.offset_in(PageSize::Size4K);
    (len == 4 && offset.is_multiple_of(16)).then_some(offset)
}

impl Reach for View<'_> {
    fn system(&self) -> &SystemRegisters {
        &self.system
    }

    fn find(&mut self, address: Gva, access: Access) -> Result<Gpa, Miss> {
        let paging = self.paging();
        let stage = |gpa, access: StageAccess| match &mut self.stage {
            Some(stage) => stage.translate(gpa, access.write),
            None => Some(gpa),
        };
        linear::walk(self.memory, &paging, address, access, stage)
    }

    fn put_off(&mut self) {
        self.contended = true;
    }

    /// Memory, or the local APIC by whole registers; an instruction that involves another device beside
    /// the local APIC finds nothing there.
    fn load(&mut self, gpa: Gpa, data: &mut [u8]) {
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

    fn exchange(&mut self, gpa: Gpa, current: &[u8], new: &[u8]) -> Option<bool> {
        linear::exchange(self.memory, gpa, current, new)
    }
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
