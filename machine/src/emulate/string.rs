//! String instructions: MOVS, STOS, LODS, CMPS, SCAS, INS and OUTS with their repetitions.

use iced_x86::Mnemonic;
use testudo_arch::Gpr;
use testudo_arch::regs::SegmentRegister;

use super::alu::{self, DF, ZF, mask};
use super::execute::Execution;
use super::operand::segment_register;
use super::{Cpu, Intent, MAX_ITERATIONS, Outcome, Stop};

/// What one iteration does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    Move,
    Store,
    Load,
    Compare,
    Scan,
    In,
    Out,
}

impl Operation {
    /// The operation and the size of its elements.
    fn of(mnemonic: Mnemonic) -> Option<(Self, usize)> {
        Some(match mnemonic {
            Mnemonic::Movsb => (Self::Move, 1),
            Mnemonic::Movsw => (Self::Move, 2),
            Mnemonic::Movsd => (Self::Move, 4),
            Mnemonic::Movsq => (Self::Move, 8),
            Mnemonic::Stosb => (Self::Store, 1),
            Mnemonic::Stosw => (Self::Store, 2),
            Mnemonic::Stosd => (Self::Store, 4),
            Mnemonic::Stosq => (Self::Store, 8),
            Mnemonic::Lodsb => (Self::Load, 1),
            Mnemonic::Lodsw => (Self::Load, 2),
            Mnemonic::Lodsd => (Self::Load, 4),
            Mnemonic::Lodsq => (Self::Load, 8),
            Mnemonic::Cmpsb => (Self::Compare, 1),
            Mnemonic::Cmpsw => (Self::Compare, 2),
            Mnemonic::Cmpsd => (Self::Compare, 4),
            Mnemonic::Cmpsq => (Self::Compare, 8),
            Mnemonic::Scasb => (Self::Scan, 1),
            Mnemonic::Scasw => (Self::Scan, 2),
            Mnemonic::Scasd => (Self::Scan, 4),
            Mnemonic::Scasq => (Self::Scan, 8),
            Mnemonic::Insb => (Self::In, 1),
            Mnemonic::Insw => (Self::In, 2),
            Mnemonic::Insd => (Self::In, 4),
            Mnemonic::Outsb => (Self::Out, 1),
            Mnemonic::Outsw => (Self::Out, 2),
            Mnemonic::Outsd => (Self::Out, 4),
            _ => return None,
        })
    }

    const fn reads_source(self) -> bool {
        matches!(self, Self::Move | Self::Load | Self::Compare | Self::Out)
    }

    const fn uses_destination(self) -> bool {
        !matches!(self, Self::Load | Self::Out)
    }

    /// Whether REPE and REPNE end on the comparison's result.
    const fn compares(self) -> bool {
        matches!(self, Self::Compare | Self::Scan)
    }
}

impl<C: Cpu + ?Sized> Execution<'_, C> {
    pub(super) fn string(&mut self) -> Result<Outcome, Stop> {
        let Some((operation, size)) = Operation::of(self.instruction.mnemonic()) else {
            return Err(Stop::Unsupported);
        };
        let (repe, repne) = (
            self.instruction.has_rep_prefix(),
            self.instruction.has_repne_prefix(),
        );
        let address_mask = mask(self.string_address_size());
        if !repe && !repne {
            self.iterate(operation, size, address_mask)?;
            return Ok(self.done());
        }
        if self.cpu.repeats_natively() {
            return Err(Stop::Unsupported);
        }
        for _ in 0..MAX_ITERATIONS {
            let count = self.cpu.gprs()[Gpr::Rcx] & address_mask;
            if count == 0 {
                return Ok(self.done());
            }
            self.iterate(operation, size, address_mask)?;
            self.set_address_register(Gpr::Rcx, count - 1, address_mask);
            let equal = self.cpu.rflags() & ZF != 0;
            if operation.compares() && equal != repe {
                return Ok(self.done());
            }
            // A trap comes after every iteration (SDM vol. 3B, 18.3.1.4).
            if self.single_step && count > 1 {
                return Ok(Outcome::SingleStep);
            }
        }
        if self.cpu.gprs()[Gpr::Rcx] & address_mask == 0 {
            return Ok(self.done());
        }
        Ok(Outcome::Continue)
    }

    /// The address size: that of the index register in use.
    fn string_address_size(&self) -> usize {
        use iced_x86::OpKind;
        let kinds = [self.instruction.op0_kind(), self.instruction.op1_kind()];
        kinds
            .into_iter()
            .find_map(|kind| match kind {
                OpKind::MemorySegSI | OpKind::MemoryESDI => Some(2),
                OpKind::MemorySegESI | OpKind::MemoryESEDI => Some(4),
                OpKind::MemorySegRSI | OpKind::MemoryESRDI => Some(8),
                _ => None,
            })
            .unwrap_or(8)
    }

    /// Writes an index or count register: 32-bit addresses clear the upper half, 16-bit ones keep
    /// the rest.
    fn set_address_register(&mut self, register: Gpr, value: u64, mask: u64) {
        let whole = &mut self.cpu.gprs_mut()[register];
        *whole = match mask {
            0xFFFF => (*whole & !mask) | (value & mask),
            _ => value & mask,
        };
    }

    /// One iteration; a fault leaves everything as it was before it.
    fn iterate(&mut self, operation: Operation, size: usize, mask: u64) -> Result<(), Stop> {
        let gprs = *self.cpu.gprs();
        let source = if operation.reads_source() {
            let segment = segment_register(self.instruction.memory_segment());
            Some(self.linear(segment, gprs.rsi & mask, size, false)?)
        } else {
            None
        };
        let destination = if operation.uses_destination() {
            let write = !operation.compares();
            Some(self.linear(SegmentRegister::Es, gprs.rdi & mask, size, write)?)
        } else {
            None
        };
        let port = gprs.rdx as u16;
        match (operation, source, destination) {
            (Operation::Move, Some(source), Some(destination)) => {
                // A device must not be read for a write that then faults.
                self.cpu.probe_write(destination, size)?;
                let value = self.read_memory(source, size, Intent::Read)?;
                self.write_memory(destination, size, value)?;
            }
            (Operation::Store, _, Some(destination)) => {
                self.write_memory(destination, size, gprs.rax)?;
            }
            (Operation::Load, Some(source), _) => {
                let value = self.read_memory(source, size, Intent::Read)?;
                let rax = &mut self.cpu.gprs_mut().rax;
                *rax = match size {
                    4 | 8 => value,
                    _ => (*rax & !alu::mask(size)) | value,
                };
            }
            (Operation::Compare, Some(source), Some(destination)) => {
                let a = self.read_memory(source, size, Intent::Read)?;
                let b = self.read_memory(destination, size, Intent::Read)?;
                self.set_status(alu::sub(a, b, false, size).1);
            }
            (Operation::Scan, _, Some(destination)) => {
                let value = self.read_memory(destination, size, Intent::Read)?;
                self.set_status(alu::sub(gprs.rax, value, false, size).1);
            }
            (Operation::In, _, Some(destination)) => {
                self.cpu.check_port(port, size as u8)?;
                self.cpu.probe_write(destination, size)?;
                let mut bytes = [0; 4];
                self.cpu.port_in(port, &mut bytes[..size]);
                self.cpu.write(destination, &bytes[..size])?;
            }
            (Operation::Out, Some(source), _) => {
                self.cpu.check_port(port, size as u8)?;
                let value = self.read_memory(source, size, Intent::Read)?;
                self.cpu.port_out(port, &value.to_le_bytes()[..size]);
            }
            _ => return Err(Stop::Unsupported),
        }
        let step = if self.cpu.rflags() & DF == 0 {
            size as u64
        } else {
            (size as u64).wrapping_neg()
        };
        if operation.reads_source() {
            self.set_address_register(Gpr::Rsi, gprs.rsi.wrapping_add(step), mask);
        }
        if operation.uses_destination() {
            self.set_address_register(Gpr::Rdi, gprs.rdi.wrapping_add(step), mask);
        }
        Ok(())
    }
}
