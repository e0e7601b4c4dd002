//! Instructions that manage memory: control registers and INVLPG, for backends on which they exit
//! without saying what they do.

use iced_x86::{Mnemonic, OpKind, Register};
use testudo_arch::regs::CpuMode;
use testudo_arch::{Cr0Flags, Gva};

use super::execute::Execution;
use super::operand::{gpr, segment_register};
use super::{Cpu, Fault, Intent, Outcome, Stop, bitness, operand};

/// What LMSW can change: PE (set only), MP, EM and TS (SDM vol. 2A, LMSW).
const MACHINE_STATUS: u64 = Cr0Flags::PROTECTED_MODE_ENABLE.bits()
    | Cr0Flags::MONITOR_COPROCESSOR.bits()
    | Cr0Flags::EMULATE_COPROCESSOR.bits()
    | TASK_SWITCHED;
const TASK_SWITCHED: u64 = Cr0Flags::TASK_SWITCHED.bits();

impl<C: Cpu + ?Sized> Execution<'_, C> {
    fn require_supervisor(&self) -> Result<(), Stop> {
        if self.cpu.cpl() == 0 {
            Ok(())
        } else {
            Err(Fault::GP0.into())
        }
    }

    fn control_register(&self, number: u8) -> Result<u64, Stop> {
        self.cpu.control_register(number).ok_or(Stop::Unsupported)
    }

    /// MOV to or from a control register: always of the mode's full width.
    pub(super) fn move_control(&mut self) -> Result<Outcome, Stop> {
        self.require_supervisor()?;
        let (to, from) = (
            self.instruction.op0_register(),
            self.instruction.op1_register(),
        );
        let mask = if bitness(self.mode) == 64 {
            u64::MAX
        } else {
            0xFFFF_FFFF
        };
        if to.is_cr() {
            let number = control_number(to)?;
            let value = self.cpu.gprs()[gpr(from)] & mask;
            self.cpu.set_control_register(number, value)?;
        } else {
            let value = self.control_register(control_number(from)?)? & mask;
            self.cpu.gprs_mut()[gpr(to)] = value;
        }
        Ok(self.done())
    }

    /// SMSW, which user mode may execute: a word to memory, CR0's low bits to a wider register.
    pub(super) fn store_machine_status(&mut self) -> Result<Outcome, Stop> {
        let value = self.control_register(0)?;
        let size = match self.instruction.op0_kind() {
            OpKind::Memory => 2,
            _ => self.size(0),
        };
        let place = self.place(0, true)?;
        self.write(place, size, value)?;
        Ok(self.done())
    }

    pub(super) fn load_machine_status(&mut self) -> Result<Outcome, Stop> {
        self.require_supervisor()?;
        let old = self.control_register(0)?;
        let place = self.place(0, false)?;
        let word = self.read(place, 2, Intent::Read)?;
        let kept = !MACHINE_STATUS | Cr0Flags::PROTECTED_MODE_ENABLE.bits();
        self.cpu
            .set_control_register(0, (old & kept) | (word & MACHINE_STATUS))?;
        Ok(self.done())
    }

    pub(super) fn clear_task_switched(&mut self) -> Result<Outcome, Stop> {
        self.require_supervisor()?;
        let value = self.control_register(0)? & !TASK_SWITCHED;
        self.cpu.set_control_register(0, value)?;
        Ok(self.done())
    }

    /// INVLPG: no access, so no limit and no right is checked, and an address that is not canonical
    /// does nothing (SDM vol. 2A, INVLPG).
    pub(super) fn invalidate_page(&mut self) -> Result<Outcome, Stop> {
        if self.instruction.op0_kind() != OpKind::Memory {
            return Err(Fault::UD.into());
        }
        self.require_supervisor()?;
        let (offset, _) = self.effective_address();
        let segment = segment_register(self.instruction.memory_segment());
        let address = if self.mode == CpuMode::Long64 {
            let based = matches!(
                self.instruction.memory_segment(),
                Register::FS | Register::GS
            );
            let base = if based {
                self.cpu.segment(segment).base
            } else {
                0
            };
            base.wrapping_add(offset)
        } else {
            self.cpu.segment(segment).base.wrapping_add(offset) & 0xFFFF_FFFF
        };
        let canonical = operand::is_canonical(address, self.cpu.linear_bits());
        if canonical || self.mode != CpuMode::Long64 {
            self.cpu.invalidate_page(Gva(address))?;
        }
        Ok(self.done())
    }

    /// Whether a MOV has a control register.
    pub(super) fn is_control_move(&self) -> bool {
        self.instruction.mnemonic() == Mnemonic::Mov
            && (self.instruction.op0_register().is_cr() || self.instruction.op1_register().is_cr())
    }
}

fn control_number(register: Register) -> Result<u8, Stop> {
    match register {
        Register::CR0 => Ok(0),
        Register::CR2 => Ok(2),
        Register::CR3 => Ok(3),
        Register::CR4 => Ok(4),
        Register::CR8 => Ok(8),
        _ => Err(Fault::UD.into()),
    }
}
