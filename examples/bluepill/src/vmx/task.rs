//! Hardware task switches, which always exit (SDM vol. 3C, 28.4.2).

use testudo_arch::regs::SystemRegisters;
use testudo_arch::{Cr0Flags, Cr4Flags, EferFlags, Event, Gpa, GuestMemory};
use testudo_machine::backend::vmx::{Level, Processor, Switched, switch_tasks};
use testudo_vmx::controls::Interruptibility;
use testudo_vmx::event::InterruptionInformation;
use testudo_vmx::exit::TaskSwitch;
use testudo_vmx::state::{read_system_registers, write_system_registers};
use testudo_vmx::{VmcsRead, VmcsWrite, fields};

use super::{Guest, VmxError};

/// The entries of the page-directory-pointer table.
const PDPTES: [testudo_vmx::Field<u64>; 4] = [
    fields::GUEST_PDPTE0,
    fields::GUEST_PDPTE1,
    fields::GUEST_PDPTE2,
    fields::GUEST_PDPTE3,
];

impl Guest<'_> {
    /// Switches tasks as the processor would have, for the guest itself: its guests' are its own to switch. An
    /// event whose delivery needs the new task waits to be injected.
    pub(super) fn task_switch(&mut self, exit: TaskSwitch) -> Result<(), VmxError> {
        let vmcs = &mut self.processor;
        let information = vmcs.get(fields::ENTRY_INTERRUPTION_INFORMATION)?;
        let code = vmcs.get(fields::ENTRY_EXCEPTION_ERROR_CODE)?;
        let length = vmcs.get(fields::EXIT_INSTRUCTION_LENGTH)?;
        let delivering = InterruptionInformation(information).event(code, length);
        let mut system = read_system_registers(vmcs)?;
        let mut gprs = self.registers.gprs;
        gprs.rsp = vmcs.get(fields::GUEST_RSP)?;
        let bits = self.tables.caps.processor.physical_address_bits;
        let memory = (&self.pill.territory.ram, bits);
        let switched = switch_tasks(exit, delivering, length, memory, &mut system, &mut gprs);
        if switched == Switched::Contended {
            return Ok(());
        }
        let vmcs = &mut self.processor;
        vmcs.set(fields::ENTRY_INTERRUPTION_INFORMATION, 0)?;
        let fault = match switched {
            Switched::Done(first) => {
                write_system_registers(vmcs, &system)?;
                vmcs.set(fields::GUEST_RSP, gprs.rsp)?;
                let nmi = delivering == Some(Event::Nmi);
                let blocking = if nmi {
                    Interruptibility::BLOCKING_BY_NMI
                } else {
                    Interruptibility::empty()
                };
                vmcs.set(fields::GUEST_INTERRUPTIBILITY, blocking.bits())?;
                self.registers.gprs = gprs;
                let dr6 = self.processor.dr6() | system.dr6;
                self.processor.set_dr6(dr6);
                self.load_pdptes(&system)?;
                let forgotten = self.processor.forget_translations(Level::L1);
                forgotten.map_err(VmxError::Invalidation)?;
                first
            }
            Switched::Fault(fault) => Some(fault),
            Switched::Shutdown => self.end("shut its processor down in a task switch"),
            Switched::Contended => None,
        };
        if let Some(fault) = fault {
            if let Some(address) = fault.cr2 {
                self.registers.cr2 = address;
            }
            self.inject(fault.event)?;
        }
        Ok(())
    }

    /// With EPT, PAE paging has its page-directory pointers in the VMCS. One that it does not take counts as
    /// absent here: an entry with it would fail.
    fn load_pdptes(&mut self, system: &SystemRegisters) -> Result<(), VmxError> {
        let paging = system.cr0 & Cr0Flags::PAGING.bits() != 0;
        let pae = system.cr4 & Cr4Flags::PHYSICAL_ADDRESS_EXTENSION.bits() != 0;
        if !paging || !pae || system.efer & EferFlags::LONG_MODE_ACTIVE.bits() != 0 {
            return Ok(());
        }
        const RESERVED: u64 = 0x1E6;
        let table = Gpa(system.cr3 & 0xFFFF_FFE0);
        let wide = !0 << self.tables.caps.processor.physical_address_bits;
        for (at, field) in (0..).step_by(8).zip(PDPTES) {
            let pointer = self.pill.territory.ram.load_u64(table.wrapping_add(at));
            let valid = pointer.unwrap_or(0) & (RESERVED | wide) == 0;
            let pointer = if valid { pointer.unwrap_or(0) } else { 0 };
            self.processor.set(field, pointer)?;
        }
        Ok(())
    }
}
