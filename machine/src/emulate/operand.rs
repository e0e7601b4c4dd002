//! Operands: where they are, segmentation, and access.

use iced_x86::{OpKind, Register};
use testudo_arch::regs::{CpuMode, SegmentRegister};
use testudo_arch::segment::SegmentAttributes;
use testudo_arch::{Gpr, Gva};

use super::alu::{mask, truncate};
use super::execute::Execution;
use super::{Cpu, Fault, Intent, Stop};

/// Where an operand is; segmentation is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Register(Register),
    Memory(Gva),
    Immediate(u64),
}

/// Whether the bits above the address width repeat its highest bit.
pub(super) const fn is_canonical(address: u64, bits: u8) -> bool {
    let shift = 64 - if bits > 63 { 63 } else { bits as u32 };
    ((address << shift) as i64 >> shift) as u64 == address
}

/// The architecture's register for a decoder's general register.
pub(super) fn gpr(register: Register) -> Gpr {
    Gpr::from_number(register.full_register().number() as u8)
}

const fn is_high_byte(register: Register) -> bool {
    matches!(
        register,
        Register::AH | Register::CH | Register::DH | Register::BH
    )
}

/// The architecture's segment register for the decoder's.
pub(super) fn segment_register(register: Register) -> SegmentRegister {
    match register {
        Register::ES => SegmentRegister::Es,
        Register::CS => SegmentRegister::Cs,
        Register::SS => SegmentRegister::Ss,
        Register::FS => SegmentRegister::Fs,
        Register::GS => SegmentRegister::Gs,
        _ => SegmentRegister::Ds,
    }
}

impl<C: Cpu + ?Sized> Execution<'_, C> {
    pub(super) fn register(&self, register: Register) -> u64 {
        let value = self.cpu.gprs()[gpr(register)];
        if is_high_byte(register) {
            (value >> 8) & 0xFF
        } else {
            truncate(value, register.size())
        }
    }

    /// Writes a register: a 32-bit result clears the upper half, smaller ones keep the rest (SDM
    /// vol. 1, 3.4.1.1).
    pub(super) fn set_register(&mut self, register: Register, value: u64) {
        let whole = &mut self.cpu.gprs_mut()[gpr(register)];
        *whole = match register.size() {
            1 if is_high_byte(register) => (*whole & !0xFF00) | ((value & 0xFF) << 8),
            4 => value & 0xFFFF_FFFF,
            8 => value,
            size => (*whole & !mask(size)) | (value & mask(size)),
        };
    }

    /// The size in bytes of an operand.
    pub(super) fn size(&self, operand: u32) -> usize {
        match self.instruction.op_kind(operand) {
            OpKind::Register => self.instruction.op_register(operand).size(),
            _ => self.instruction.memory_size().size(),
        }
    }

    /// The offset of the memory operand in its segment, and the mask of its address size.
    pub(super) fn effective_address(&self) -> (u64, u64) {
        let instruction = &self.instruction;
        let (base, index) = (instruction.memory_base(), instruction.memory_index());
        let size = match (base, index) {
            (Register::None, Register::None) => match instruction.memory_displ_size() {
                size @ (2 | 4 | 8) => size as usize,
                _ => super::bitness(self.mode) as usize / 8,
            },
            (Register::None, index) => index.size(),
            (base, _) => base.size(),
        };
        let mask = mask(size);
        // For an address relative to RIP the decoder gives the sum.
        let mut offset = instruction.memory_displacement64();
        if base != Register::None && !matches!(base, Register::RIP | Register::EIP) {
            offset = offset.wrapping_add(self.register(base));
        }
        if index != Register::None {
            let scale = u64::from(instruction.memory_index_scale());
            offset = offset.wrapping_add(self.register(index).wrapping_mul(scale));
        }
        (offset & mask, mask)
    }

    /// Segmentation: checks an access of `size` bytes and gives its linear address (SDM vol. 3A,
    /// 5.3 to 5.5; in 64-bit mode 3.2.4 and vol. 1, 3.3.7.1).
    pub(super) fn linear(
        &self,
        register: SegmentRegister,
        offset: u64,
        size: usize,
        write: bool,
    ) -> Result<Gva, Fault> {
        let fault = match register {
            SegmentRegister::Ss => Fault::SS0,
            _ => Fault::GP0,
        };
        let last = size as u64 - 1;
        if self.mode == CpuMode::Long64 {
            let base = match register {
                SegmentRegister::Fs | SegmentRegister::Gs => self.cpu.segment(register).base,
                _ => 0,
            };
            let address = base.wrapping_add(offset);
            let bits = self.cpu.linear_bits();
            let end = address.wrapping_add(last);
            if is_canonical(address, bits) && is_canonical(end, bits) {
                return Ok(Gva(address));
            }
            return Err(fault);
        }
        let segment = self.cpu.segment(register);
        let attributes = segment.attributes;
        if !matches!(self.mode, CpuMode::Real | CpuMode::Virtual8086) {
            let usable = attributes.contains(SegmentAttributes::PRESENT)
                && !attributes.contains(SegmentAttributes::UNUSABLE);
            let code = attributes.contains(SegmentAttributes::CODE);
            let writable = attributes.contains(SegmentAttributes::WRITABLE);
            // The same bit is "writable" for data and "readable" for code.
            let allowed = if write {
                writable && !code
            } else {
                writable || !code
            };
            if !usable || !allowed {
                return Err(fault);
            }
        }
        let expand_down = attributes.contains(SegmentAttributes::CONFORMING)
            && !attributes.contains(SegmentAttributes::CODE);
        let limit = u64::from(segment.limit);
        let inside = if expand_down {
            let top = if attributes.contains(SegmentAttributes::DEFAULT_BIG) {
                0xFFFF_FFFF
            } else {
                0xFFFF
            };
            offset > limit && offset + last <= top
        } else {
            offset + last <= limit
        };
        let address = segment.base.wrapping_add(offset) & 0xFFFF_FFFF;
        // What wraps at 4 GiB is left to the implementation ("may or may not", SDM vol. 3A, 5.3).
        if !inside || address + last > 0xFFFF_FFFF {
            return Err(fault);
        }
        Ok(Gva(address))
    }

    /// The linear address of the memory operand, moved by `delta` bytes within its address size.
    pub(super) fn memory(&self, size: usize, write: bool, delta: u64) -> Result<Gva, Fault> {
        let (offset, mask) = self.effective_address();
        let segment = segment_register(self.instruction.memory_segment());
        self.linear(segment, offset.wrapping_add(delta) & mask, size, write)
    }

    /// Where an operand is.
    pub(super) fn place(&self, operand: u32, write: bool) -> Result<Place, Stop> {
        match self.instruction.op_kind(operand) {
            OpKind::Register => {
                let register = self.instruction.op_register(operand);
                if register.is_gpr() {
                    Ok(Place::Register(register))
                } else {
                    Err(Stop::Unsupported)
                }
            }
            OpKind::Memory => {
                let size = self.size(operand);
                if !matches!(size, 1 | 2 | 4 | 8) {
                    return Err(Stop::Unsupported);
                }
                Ok(Place::Memory(self.memory(size, write, 0)?))
            }
            _ => match self.instruction.try_immediate(operand) {
                Ok(value) => Ok(Place::Immediate(value)),
                Err(_) => Err(Stop::Unsupported),
            },
        }
    }

    pub(super) fn read(&mut self, place: Place, size: usize, intent: Intent) -> Result<u64, Fault> {
        match place {
            Place::Register(register) => Ok(self.register(register)),
            Place::Immediate(value) => Ok(truncate(value, size)),
            Place::Memory(address) => self.read_memory(address, size, intent),
        }
    }

    pub(super) fn read_memory(
        &mut self,
        address: Gva,
        size: usize,
        intent: Intent,
    ) -> Result<u64, Fault> {
        let mut bytes = [0; 8];
        self.cpu.read(address, &mut bytes[..size], intent)?;
        Ok(u64::from_le_bytes(bytes))
    }

    pub(super) fn write(&mut self, place: Place, size: usize, value: u64) -> Result<(), Fault> {
        match place {
            Place::Register(register) => self.set_register(register, value),
            Place::Memory(address) => self.write_memory(address, size, value)?,
            Place::Immediate(_) => {}
        }
        Ok(())
    }

    pub(super) fn write_memory(
        &mut self,
        address: Gva,
        size: usize,
        value: u64,
    ) -> Result<(), Fault> {
        self.cpu.write(address, &value.to_le_bytes()[..size])
    }

    /// Replaces what was read with [`Intent::Modify`]; `false` if a locked instruction found that
    /// another processor was faster.
    pub(super) fn replace(
        &mut self,
        place: Place,
        size: usize,
        old: u64,
        new: u64,
        locked: bool,
    ) -> Result<bool, Fault> {
        match place {
            Place::Memory(address) if locked => self.cpu.compare_exchange(
                address,
                &old.to_le_bytes()[..size],
                &new.to_le_bytes()[..size],
            ),
            _ => self.write(place, size, new).map(|()| true),
        }
    }

    /// A source operand's value.
    pub(super) fn source(&mut self, operand: u32, size: usize) -> Result<u64, Stop> {
        let place = self.place(operand, false)?;
        Ok(self.read(place, size, Intent::Read)?)
    }
}
