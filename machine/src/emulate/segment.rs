//! Segments: loads from descriptors, far branches, descriptor-table registers, and interrupts in
//! real mode. For processors that are emulated as a whole.

use iced_x86::{Mnemonic, OpKind};
use testudo_arch::regs::{CpuMode, SegmentRegister};
use testudo_arch::segment::{DescriptorTable, SegmentAttributes};
use testudo_arch::{Event, Exception, Gva, Segment};

use super::alu::{TF, truncate};
use super::execute::Execution;
use super::operand::segment_register;
use super::{Cpu, Fault, Intent, Outcome, Stop};

const IF: u64 = 1 << 9;
const RF: u64 = 1 << 16;
const AC: u64 = 1 << 18;
/// The flags that an interrupt clears in real mode (SDM vol. 2A, INT n).
const CLEARED: u64 = TF | IF | RF | AC;

/// A fault that names a selector.
fn selector_fault(exception: Exception, selector: u16) -> Stop {
    let code = u32::from(selector & !3);
    Fault {
        event: Event::fault_with(exception, code),
        cr2: None,
    }
    .into()
}

/// Delivers an interrupt or exception in real mode: FLAGS, CS and IP go to the stack, and the
/// vector's entry is where execution goes on (SDM vol. 3A, 21.1.4).
///
/// # Errors
///
/// The fault of an access, or that of a vector beyond the table.
pub(super) fn deliver<C: Cpu + ?Sized>(cpu: &mut C, vector: u8, back: u64) -> Result<(), Fault> {
    let [_, table] = cpu.descriptor_tables();
    let entry = u64::from(vector) * 4;
    if entry + 3 > u64::from(table.limit) {
        return Err(Fault::GP0);
    }
    let mut target = [0; 4];
    let at = Gva(table.base.wrapping_add(entry) & 0xFFFF_FFFF);
    cpu.read(at, &mut target, Intent::Read)?;
    let [ip_low, ip_high, cs_low, cs_high] = target;
    let flags = cpu.rflags();
    let (cs, stack) = (
        cpu.segment(SegmentRegister::Cs),
        cpu.segment(SegmentRegister::Ss),
    );
    let pointer = cpu.gprs().rsp.wrapping_sub(6) & 0xFFFF;
    if pointer + 5 > u64::from(stack.limit) {
        return Err(Fault::SS0);
    }
    let mut frame = [0; 6];
    for (place, word) in [back as u16, cs.selector, flags as u16]
        .into_iter()
        .enumerate()
    {
        frame[2 * place..][..2].copy_from_slice(&word.to_le_bytes());
    }
    cpu.write(Gva(stack.base.wrapping_add(pointer) & 0xFFFF_FFFF), &frame)?;
    let rsp = &mut cpu.gprs_mut().rsp;
    *rsp = (*rsp & !0xFFFF) | pointer;
    cpu.set_rflags(flags & !CLEARED);
    let selector = u16::from_le_bytes([cs_low, cs_high]);
    let cs = Segment {
        selector,
        base: u64::from(selector) << 4,
        ..cs
    };
    cpu.set_segment(SegmentRegister::Cs, &cs);
    cpu.set_rip(u64::from(u16::from_le_bytes([ip_low, ip_high])));
    Ok(())
}

impl<C: Cpu + ?Sized> Execution<'_, C> {
    pub(super) fn is_real(&self) -> bool {
        self.mode == CpuMode::Real
    }

    /// Segment instructions; `Unsupported` for all others.
    pub(super) fn segmentation(&mut self) -> Result<Outcome, Stop> {
        match self.instruction.mnemonic() {
            Mnemonic::Mov if self.instruction.op0_register().is_segment_register() => {
                let register = segment_register(self.instruction.op0_register());
                let selector = self.source(1, 2)? as u16;
                self.load_data_segment(register, selector)?;
                Ok(self.done())
            }
            Mnemonic::Push if self.instruction.op0_register().is_segment_register() => {
                let register = segment_register(self.instruction.op0_register());
                let selector = self.cpu.segment(register).selector;
                self.push_value(u64::from(selector))?;
                Ok(self.done())
            }
            Mnemonic::Pop if self.instruction.op0_register().is_segment_register() => {
                let register = segment_register(self.instruction.op0_register());
                let (value, pointer) = self.peek(self.stack_size(), 0)?;
                self.load_data_segment(register, value as u16)?;
                self.set_stack_pointer(pointer);
                Ok(self.done())
            }
            Mnemonic::Lds | Mnemonic::Les | Mnemonic::Lfs | Mnemonic::Lgs | Mnemonic::Lss => {
                self.load_far_pointer()
            }
            Mnemonic::Lgdt | Mnemonic::Lidt => self.load_table(),
            Mnemonic::Sgdt | Mnemonic::Sidt => self.store_table(),
            Mnemonic::Jmp => self.far_jump(),
            Mnemonic::Call => self.far_call(),
            Mnemonic::Retf => self.far_return(),
            Mnemonic::Iret | Mnemonic::Iretd => self.interrupt_return(),
            Mnemonic::Int => {
                let vector = self.instruction.immediate8();
                self.software_interrupt(vector)
            }
            Mnemonic::Int3 => self.software_interrupt(3),
            Mnemonic::Into => {
                const OVERFLOW: u64 = 1 << 11;
                if self.cpu.rflags() & OVERFLOW == 0 {
                    return Ok(self.done());
                }
                self.software_interrupt(4)
            }
            _ => Err(Stop::Unsupported),
        }
    }

    fn software_interrupt(&mut self, vector: u8) -> Result<Outcome, Stop> {
        if !self.is_real() {
            return Err(Stop::Unsupported);
        }
        let back = self.next_ip();
        deliver(self.cpu, vector, back)?;
        Ok(Outcome::Done)
    }

    fn load_data_segment(&mut self, register: SegmentRegister, selector: u16) -> Result<(), Stop> {
        if register == SegmentRegister::Cs {
            return Err(Fault::UD.into());
        }
        let segment = self.data_segment(register, selector)?;
        self.set_segment(register, &segment)
    }

    fn set_segment(&mut self, register: SegmentRegister, segment: &Segment) -> Result<(), Stop> {
        if self.cpu.set_segment(register, segment) {
            Ok(())
        } else {
            Err(Stop::Unsupported)
        }
    }

    /// What a data segment register becomes when it is loaded with `selector` (SDM vol. 2B, MOV;
    /// vol. 3A, 3.4.2 and 5.6).
    fn data_segment(&mut self, register: SegmentRegister, selector: u16) -> Result<Segment, Stop> {
        if matches!(self.mode, CpuMode::Real | CpuMode::Virtual8086) {
            return Ok(Segment {
                selector,
                base: u64::from(selector) << 4,
                ..self.cpu.segment(register)
            });
        }
        let is_stack = register == SegmentRegister::Ss;
        if selector & !3 == 0 {
            if is_stack {
                return Err(Fault::GP0.into());
            }
            return Ok(Segment {
                selector,
                attributes: SegmentAttributes::UNUSABLE,
                ..Segment::default()
            });
        }
        let segment = self.descriptor(selector)?;
        let a = segment.attributes;
        let (cpl, rpl, dpl) = (self.cpu.cpl(), (selector & 3) as u8, a.dpl());
        let code = a.contains(SegmentAttributes::CODE);
        // For code the same bit is "readable".
        let usable = a.contains(SegmentAttributes::WRITABLE);
        let conforming = code && a.contains(SegmentAttributes::CONFORMING);
        let right = if is_stack {
            !code && usable && rpl == cpl && dpl == cpl
        } else {
            (!code || usable) && (conforming || (rpl <= dpl && cpl <= dpl))
        };
        if !a.contains(SegmentAttributes::CODE_OR_DATA) || !right {
            return Err(selector_fault(Exception::GeneralProtection, selector));
        }
        if !a.contains(SegmentAttributes::PRESENT) {
            let exception = if is_stack {
                Exception::StackFault
            } else {
                Exception::SegmentNotPresent
            };
            return Err(selector_fault(exception, selector));
        }
        self.mark_accessed(segment)
    }

    /// What CS becomes by a far jump to `selector` (SDM vol. 2A, JMP). Gates are not followed.
    fn code_segment(&mut self, selector: u16) -> Result<Segment, Stop> {
        if self.is_real() {
            return Ok(Segment {
                selector,
                base: u64::from(selector) << 4,
                ..self.cpu.segment(SegmentRegister::Cs)
            });
        }
        if selector & !3 == 0 {
            return Err(Fault::GP0.into());
        }
        let segment = self.descriptor(selector)?;
        let a = segment.attributes;
        if !a.contains(SegmentAttributes::CODE_OR_DATA) {
            return Err(Stop::Unsupported);
        }
        let cpl = self.cpu.cpl();
        let right = if a.contains(SegmentAttributes::CONFORMING) {
            a.dpl() <= cpl
        } else {
            (selector & 3) as u8 <= cpl && a.dpl() == cpl
        };
        if !a.contains(SegmentAttributes::CODE) || !right {
            return Err(selector_fault(Exception::GeneralProtection, selector));
        }
        if !a.contains(SegmentAttributes::PRESENT) {
            return Err(selector_fault(Exception::SegmentNotPresent, selector));
        }
        let segment = Segment {
            selector: (selector & !3) | u16::from(cpl),
            ..segment
        };
        self.mark_accessed(segment)
    }

    /// Where the descriptor that `selector` names lies.
    fn descriptor_address(&self, selector: u16) -> Result<Gva, Stop> {
        const LOCAL: u16 = 1 << 2;
        let (base, limit) = if selector & LOCAL == 0 {
            let [table, _] = self.cpu.descriptor_tables();
            (table.base, u32::from(table.limit))
        } else {
            let table = self.cpu.segment(SegmentRegister::Ldtr);
            let present = table.attributes.contains(SegmentAttributes::PRESENT)
                && !table.attributes.contains(SegmentAttributes::UNUSABLE);
            (table.base, if present { table.limit } else { 0 })
        };
        let offset = u32::from(selector & !7);
        if offset + 7 > limit {
            return Err(selector_fault(Exception::GeneralProtection, selector));
        }
        Ok(Gva(base.wrapping_add(u64::from(offset)) & 0xFFFF_FFFF))
    }

    fn descriptor(&mut self, selector: u16) -> Result<Segment, Stop> {
        let address = self.descriptor_address(selector)?;
        let mut bytes = [0; 8];
        self.cpu.read(address, &mut bytes, Intent::Read)?;
        let raw = u64::from_le_bytes(bytes);
        let attributes = SegmentAttributes::from_bits_retain((raw >> 40) as u32 & 0xF0FF);
        let limit = (raw & 0xFFFF) as u32 | (raw >> 32) as u32 & 0xF_0000;
        let limit = if attributes.contains(SegmentAttributes::GRANULARITY) {
            limit << 12 | 0xFFF
        } else {
            limit
        };
        Ok(Segment {
            selector,
            attributes,
            limit,
            base: (raw >> 16 & 0xFF_FFFF) | (raw >> 56) << 24,
        })
    }

    /// Sets the accessed bit of the descriptor that a segment was loaded from.
    fn mark_accessed(&mut self, segment: Segment) -> Result<Segment, Stop> {
        let attributes = segment.attributes | SegmentAttributes::ACCESSED;
        if attributes != segment.attributes {
            let address = self.descriptor_address(segment.selector)?;
            self.cpu
                .write(address.wrapping_add(5), &[attributes.bits() as u8])?;
        }
        Ok(Segment {
            attributes,
            ..segment
        })
    }

    /// Goes on at `offset` of another code segment.
    fn enter_code(&mut self, segment: &Segment, offset: u64) -> Result<(), Stop> {
        if offset > u64::from(segment.limit) {
            return Err(Fault::GP0.into());
        }
        self.set_segment(SegmentRegister::Cs, segment)?;
        self.cpu.set_rip(offset);
        Ok(())
    }

    /// The selector and offset that a far branch names.
    fn far_target(&mut self) -> Result<(u16, u64), Stop> {
        let instruction = &self.instruction;
        match instruction.op0_kind() {
            OpKind::FarBranch16 => Ok((
                instruction.far_branch_selector(),
                u64::from(instruction.far_branch16()),
            )),
            OpKind::FarBranch32 => Ok((
                instruction.far_branch_selector(),
                u64::from(instruction.far_branch32()),
            )),
            OpKind::Memory
                if instruction.is_jmp_far_indirect() || instruction.is_call_far_indirect() =>
            {
                self.far_pointer()
            }
            _ => Err(Stop::Unsupported),
        }
    }

    /// A far pointer in memory: the offset, and behind it the selector.
    fn far_pointer(&mut self) -> Result<(u16, u64), Stop> {
        let size = self.instruction.memory_size().size();
        if !matches!(size, 4 | 6) {
            return Err(Stop::Unsupported);
        }
        let address = self.memory(size, false, 0)?;
        let mut bytes = [0; 8];
        self.cpu.read(address, &mut bytes[..size], Intent::Read)?;
        let raw = u64::from_le_bytes(bytes);
        let offset_bits = (size - 2) * 8;
        Ok(((raw >> offset_bits) as u16, truncate(raw, size - 2)))
    }

    fn far_jump(&mut self) -> Result<Outcome, Stop> {
        let (selector, offset) = self.far_target()?;
        let segment = self.code_segment(selector)?;
        self.enter_code(&segment, offset)?;
        Ok(Outcome::Done)
    }

    fn far_call(&mut self) -> Result<Outcome, Stop> {
        if !self.is_real() {
            return Err(Stop::Unsupported);
        }
        let (selector, offset) = self.far_target()?;
        let segment = self.code_segment(selector)?;
        if offset > u64::from(segment.limit) {
            return Err(Fault::GP0.into());
        }
        let size = self.stack_size() / 2;
        let back = [
            self.next_ip(),
            u64::from(self.cpu.segment(SegmentRegister::Cs).selector),
        ];
        self.push_all(&back, size)?;
        self.enter_code(&segment, offset)?;
        Ok(Outcome::Done)
    }

    fn far_return(&mut self) -> Result<Outcome, Stop> {
        if !self.is_real() {
            return Err(Stop::Unsupported);
        }
        let released = match self.instruction.op0_kind() {
            OpKind::Immediate16 => u64::from(self.instruction.immediate16()),
            _ => 0,
        };
        let size = (self.stack_size() - released as usize) / 2;
        let (offset, _) = self.peek(size, 0)?;
        let (selector, pointer) = self.peek(size, 1)?;
        let segment = self.code_segment(selector as u16)?;
        self.enter_code(&segment, offset)?;
        self.set_stack_pointer(pointer.wrapping_add(released));
        Ok(Outcome::Done)
    }

    fn interrupt_return(&mut self) -> Result<Outcome, Stop> {
        if !self.is_real() {
            return Err(Stop::Unsupported);
        }
        let size = if self.instruction.mnemonic() == Mnemonic::Iretd {
            4
        } else {
            2
        };
        let (offset, _) = self.peek(size, 0)?;
        let (selector, _) = self.peek(size, 1)?;
        let (flags, pointer) = self.peek(size, 2)?;
        let segment = self.code_segment(selector as u16)?;
        self.enter_code(&segment, offset)?;
        self.set_stack_pointer(pointer);
        self.load_flags(flags, size);
        Ok(Outcome::Done)
    }

    fn load_far_pointer(&mut self) -> Result<Outcome, Stop> {
        let register = match self.instruction.mnemonic() {
            Mnemonic::Lds => SegmentRegister::Ds,
            Mnemonic::Les => SegmentRegister::Es,
            Mnemonic::Lfs => SegmentRegister::Fs,
            Mnemonic::Lgs => SegmentRegister::Gs,
            _ => SegmentRegister::Ss,
        };
        let (selector, offset) = self.far_pointer()?;
        self.load_data_segment(register, selector)?;
        self.set_register(self.instruction.op0_register(), offset);
        Ok(self.done())
    }

    /// LGDT and LIDT. With a 16-bit operand size the base has 24 bits (SDM vol. 2A, LGDT).
    fn load_table(&mut self) -> Result<Outcome, Stop> {
        if self.mode == CpuMode::Long64 {
            return Err(Stop::Unsupported);
        }
        if self.cpu.cpl() != 0 {
            return Err(Fault::GP0.into());
        }
        let address = self.memory(6, false, 0)?;
        let mut bytes = [0; 8];
        self.cpu.read(address, &mut bytes[..6], Intent::Read)?;
        let raw = u64::from_le_bytes(bytes);
        let base = if self.has_narrow_table() {
            raw >> 16 & 0xFF_FFFF
        } else {
            raw >> 16
        };
        let table = DescriptorTable {
            base,
            limit: raw as u16,
        };
        let interrupts = self.instruction.mnemonic() == Mnemonic::Lidt;
        if !self.cpu.set_descriptor_table(interrupts, table) {
            return Err(Stop::Unsupported);
        }
        Ok(self.done())
    }

    fn store_table(&mut self) -> Result<Outcome, Stop> {
        if self.mode == CpuMode::Long64 {
            return Err(Stop::Unsupported);
        }
        let interrupts = self.instruction.mnemonic() == Mnemonic::Sidt;
        let table = self.cpu.descriptor_tables()[usize::from(interrupts)];
        let raw = table.base << 16 | u64::from(table.limit);
        let address = self.memory(6, true, 0)?;
        self.cpu.write(address, &raw.to_le_bytes()[..6])?;
        Ok(self.done())
    }

    fn has_narrow_table(&self) -> bool {
        use iced_x86::Code;
        matches!(
            self.instruction.code(),
            Code::Lgdt_m1632_16 | Code::Lidt_m1632_16
        )
    }
}
