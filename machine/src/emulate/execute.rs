//! Execution of one decoded instruction.

use iced_x86::{ConditionCode, Instruction, Mnemonic, OpKind, Register};
use testudo_arch::regs::{CpuMode, SegmentRegister};
use testudo_arch::segment::SegmentAttributes;
use testudo_arch::{Gpr, Gva};

use super::alu::{self, CF, STATUS, Shift, ZF};
use super::operand::{Place, segment_register};
use super::{Cpu, Fault, Intent, Outcome, Stop, bitness};

/// One instruction on its way.
///
/// Every operation makes the accesses that can fault first, and changes registers, flags and RIP
/// only after the last of them.
pub(super) struct Execution<'a, C: ?Sized> {
    pub(super) cpu: &'a mut C,
    pub(super) instruction: Instruction,
    pub(super) mode: CpuMode,
    /// Whether RFLAGS.TF was set at the start.
    pub(super) single_step: bool,
}

type Result<T = Outcome> = core::result::Result<T, Stop>;

impl<C: Cpu + ?Sized> Execution<'_, C> {
    pub(super) fn run(&mut self) -> Result {
        match self.data() {
            Err(Stop::Unsupported) if self.cpu.is_whole() => self.program(),
            result => result,
        }
    }

    /// Instructions that may access devices.
    fn data(&mut self) -> Result {
        if self.instruction.is_string_instruction() {
            return self.string();
        }
        let mnemonic = self.instruction.mnemonic();
        match mnemonic {
            Mnemonic::Mov if self.is_control_move() => self.move_control(),
            Mnemonic::Mov | Mnemonic::Movnti => self.mov(),
            Mnemonic::Movzx => self.load(|value, _| value),
            Mnemonic::Movsx | Mnemonic::Movsxd => self.load(alu::sign_extend),
            Mnemonic::Movbe => self.movbe(),
            Mnemonic::Add
            | Mnemonic::Or
            | Mnemonic::Adc
            | Mnemonic::Sbb
            | Mnemonic::And
            | Mnemonic::Sub
            | Mnemonic::Xor
            | Mnemonic::Cmp
            | Mnemonic::Test => self.arithmetic(mnemonic),
            Mnemonic::Inc | Mnemonic::Dec | Mnemonic::Neg | Mnemonic::Not => self.unary(mnemonic),
            Mnemonic::Rol => self.shift(Shift::Rol),
            Mnemonic::Ror => self.shift(Shift::Ror),
            Mnemonic::Rcl => self.shift(Shift::Rcl),
            Mnemonic::Rcr => self.shift(Shift::Rcr),
            Mnemonic::Shl | Mnemonic::Sal => self.shift(Shift::Shl),
            Mnemonic::Shr => self.shift(Shift::Shr),
            Mnemonic::Sar => self.shift(Shift::Sar),
            Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc => self.bit(mnemonic),
            Mnemonic::Xchg => self.exchange(),
            Mnemonic::Xadd => self.exchange_add(),
            Mnemonic::Cmpxchg => self.compare_exchange(),
            Mnemonic::Cmpxchg8b => self.compare_exchange_wide(8),
            Mnemonic::Cmpxchg16b => self.compare_exchange_wide(16),
            Mnemonic::Push => self.push(),
            Mnemonic::Pop => self.pop(),
            Mnemonic::Call | Mnemonic::Jmp => self.branch(mnemonic),
            Mnemonic::In | Mnemonic::Out => self.port(mnemonic),
            Mnemonic::Smsw => self.store_machine_status(),
            Mnemonic::Lmsw => self.load_machine_status(),
            Mnemonic::Clts => self.clear_task_switched(),
            Mnemonic::Invlpg => self.invalidate_page(),
            // Hints, which do nothing to memory.
            Mnemonic::Nop
            | Mnemonic::Prefetchnta
            | Mnemonic::Prefetcht0
            | Mnemonic::Prefetcht1
            | Mnemonic::Prefetcht2
            | Mnemonic::Prefetchw
            | Mnemonic::Clflush
            | Mnemonic::Clflushopt
            | Mnemonic::Clwb => Ok(self.done()),
            _ => match self.instruction.condition_code() {
                ConditionCode::None => self.vector(),
                condition => self.conditional(condition),
            },
        }
    }

    /// Completes: RIP moves past the instruction.
    pub(super) fn done(&mut self) -> Outcome {
        let next = self.next_ip();
        self.cpu.set_rip(next);
        Outcome::Done
    }

    pub(super) fn next_ip(&self) -> u64 {
        let next = self.instruction.next_ip();
        match bitness(self.mode) {
            64 => next,
            32 => next & 0xFFFF_FFFF,
            _ => next & 0xFFFF,
        }
    }

    fn flag(&self, flag: u64) -> bool {
        self.cpu.rflags() & flag != 0
    }

    pub(super) fn set_status(&mut self, flags: u64) {
        let rflags = (self.cpu.rflags() & !STATUS) | flags;
        self.cpu.set_rflags(rflags);
    }

    fn locked(&self) -> bool {
        self.instruction.has_lock_prefix()
    }

    fn mov(&mut self) -> Result {
        let size = self.size(0);
        let destination = self.place(0, true)?;
        // A selector is stored as a word, and zero-extended into a wider register.
        let source = match self.instruction.op_kind(1) {
            OpKind::Register if self.instruction.op1_register().is_segment_register() => {
                let register = segment_register(self.instruction.op1_register());
                u64::from(self.cpu.segment(register).selector)
            }
            _ => self.source(1, size)?,
        };
        self.write(destination, size, source)?;
        Ok(self.done())
    }

    /// MOVZX, MOVSX and MOVSXD.
    fn load(&mut self, extend: fn(u64, usize) -> u64) -> Result {
        let size = self.size(1);
        let destination = self.place(0, true)?;
        let value = extend(self.source(1, size)?, size);
        self.write(destination, self.size(0), value)?;
        Ok(self.done())
    }

    fn movbe(&mut self) -> Result {
        let size = self.size(0);
        let destination = self.place(0, true)?;
        let value = self.source(1, size)?.swap_bytes() >> (64 - size * 8);
        self.write(destination, size, value)?;
        Ok(self.done())
    }

    fn arithmetic(&mut self, mnemonic: Mnemonic) -> Result {
        let size = self.size(0);
        let writes = !matches!(mnemonic, Mnemonic::Cmp | Mnemonic::Test);
        let destination = self.place(0, writes)?;
        let second = self.place(1, false)?;
        let intent = if writes { Intent::Modify } else { Intent::Read };
        // Only one of the two is memory.
        let a = self.read(destination, size, intent)?;
        let b = self.read(second, size, Intent::Read)?;
        let carry = self.flag(CF);
        let (result, flags) = match mnemonic {
            Mnemonic::Add => alu::add(a, b, false, size),
            Mnemonic::Adc => alu::add(a, b, carry, size),
            Mnemonic::Sub | Mnemonic::Cmp => alu::sub(a, b, false, size),
            Mnemonic::Sbb => alu::sub(a, b, carry, size),
            Mnemonic::Or => alu::logic(a | b, size),
            Mnemonic::Xor => alu::logic(a ^ b, size),
            _ => alu::logic(a & b, size),
        };
        if writes && !self.replace(destination, size, a, result, self.locked())? {
            return Ok(Outcome::Continue);
        }
        self.set_status(flags);
        Ok(self.done())
    }

    fn unary(&mut self, mnemonic: Mnemonic) -> Result {
        let size = self.size(0);
        let place = self.place(0, true)?;
        let value = self.read(place, size, Intent::Modify)?;
        let old = self.cpu.rflags();
        let (result, flags) = match mnemonic {
            // INC and DEC leave CF alone.
            Mnemonic::Inc => {
                let (result, flags) = alu::add(value, 1, false, size);
                (result, (flags & !CF) | (old & CF))
            }
            Mnemonic::Dec => {
                let (result, flags) = alu::sub(value, 1, false, size);
                (result, (flags & !CF) | (old & CF))
            }
            Mnemonic::Neg => alu::sub(0, value, false, size),
            _ => (alu::truncate(!value, size), old & STATUS),
        };
        if !self.replace(place, size, value, result, self.locked())? {
            return Ok(Outcome::Continue);
        }
        self.set_status(flags);
        Ok(self.done())
    }

    fn shift(&mut self, kind: Shift) -> Result {
        let size = self.size(0);
        let count = self.source(1, 1)? as u8;
        let place = self.place(0, true)?;
        let value = self.read(place, size, Intent::Modify)?;
        let (result, flags) = alu::shift(kind, value, count, self.cpu.rflags(), size);
        self.write(place, size, result)?;
        self.set_status(flags);
        Ok(self.done())
    }

    /// BT, BTS, BTR and BTC. A bit number in a register reaches beyond the operand in memory, in
    /// both directions (SDM vol. 2A, BT).
    fn bit(&mut self, mnemonic: Mnemonic) -> Result {
        let size = self.size(0);
        let bits = size as u64 * 8;
        let writes = mnemonic != Mnemonic::Bt;
        let number = self.source(1, size)?;
        let place = match self.instruction.op_kind(0) {
            OpKind::Memory if self.instruction.op1_kind() == OpKind::Register => {
                let signed = alu::sign_extend(number, size) as i64;
                let delta = signed.div_euclid(bits as i64) * size as i64;
                Place::Memory(self.memory(size, writes, delta as u64)?)
            }
            _ => self.place(0, writes)?,
        };
        let intent = if writes { Intent::Modify } else { Intent::Read };
        let value = self.read(place, size, intent)?;
        let bit = 1 << (number % bits);
        let result = match mnemonic {
            Mnemonic::Bts => value | bit,
            Mnemonic::Btr => value & !bit,
            _ => value ^ bit,
        };
        if writes && !self.replace(place, size, value, result, self.locked())? {
            return Ok(Outcome::Continue);
        }
        let carry = if value & bit != 0 { CF } else { 0 };
        let flags = (self.cpu.rflags() & STATUS & !CF) | carry;
        self.set_status(flags);
        Ok(self.done())
    }

    /// XCHG, which is locked with or without the prefix.
    fn exchange(&mut self) -> Result {
        let size = self.size(0);
        let (first, second) = (self.place(0, true)?, self.place(1, true)?);
        let a = self.read(first, size, Intent::Modify)?;
        let b = self.read(second, size, Intent::Modify)?;
        // Memory may be either operand; it is written before the register.
        let (memory, old, new, register) = match second {
            Place::Memory(_) => (second, b, a, first),
            _ => (first, a, b, second),
        };
        if !self.replace(memory, size, old, new, true)? {
            return Ok(Outcome::Continue);
        }
        self.write(register, size, old)?;
        Ok(self.done())
    }

    fn exchange_add(&mut self) -> Result {
        let size = self.size(0);
        let (destination, source) = (self.place(0, true)?, self.place(1, true)?);
        let a = self.read(destination, size, Intent::Modify)?;
        let b = self.read(source, size, Intent::Read)?;
        let (sum, flags) = alu::add(a, b, false, size);
        match destination {
            Place::Memory(_) => {
                if !self.replace(destination, size, a, sum, self.locked())? {
                    return Ok(Outcome::Continue);
                }
                self.write(source, size, a)?;
            }
            // With the same register twice the sum stays.
            _ => {
                self.write(source, size, a)?;
                self.write(destination, size, sum)?;
            }
        }
        self.set_status(flags);
        Ok(self.done())
    }

    fn compare_exchange(&mut self) -> Result {
        let size = self.size(0);
        let accumulator = match size {
            1 => Register::AL,
            2 => Register::AX,
            4 => Register::EAX,
            _ => Register::RAX,
        };
        let destination = self.place(0, true)?;
        let old = self.read(destination, size, Intent::Modify)?;
        let new = self.source(1, size)?;
        let (difference, flags) = alu::sub(self.register(accumulator), old, false, size);
        if difference == 0 {
            if !self.replace(destination, size, old, new, self.locked())? {
                return Ok(Outcome::Continue);
            }
        } else {
            self.set_register(accumulator, old);
        }
        self.set_status(flags);
        Ok(self.done())
    }

    /// CMPXCHG8B and CMPXCHG16B.
    fn compare_exchange_wide(&mut self, size: usize) -> Result {
        let address = self.memory(size, true, 0)?;
        if size == 16 && !address.0.is_multiple_of(16) {
            return Err(Fault::GP0.into());
        }
        let half = size / 2;
        let mut bytes = [0; 16];
        self.cpu.read(address, &mut bytes[..size], Intent::Modify)?;
        let mut halves = [[0; 8]; 2];
        halves[0][..half].copy_from_slice(&bytes[..half]);
        halves[1][..half].copy_from_slice(&bytes[half..size]);
        let [low, high] = halves.map(u64::from_le_bytes);
        let gprs = *self.cpu.gprs();
        let equal = alu::truncate(gprs.rax, half) == low && alu::truncate(gprs.rdx, half) == high;
        if equal {
            let mut new = [0; 16];
            new[..half].copy_from_slice(&gprs.rbx.to_le_bytes()[..half]);
            new[half..size].copy_from_slice(&gprs.rcx.to_le_bytes()[..half]);
            let swapped = if self.locked() {
                self.cpu
                    .compare_exchange(address, &bytes[..size], &new[..size])?
            } else {
                self.cpu.write(address, &new[..size])?;
                true
            };
            if !swapped {
                return Ok(Outcome::Continue);
            }
        } else {
            let registers = self.cpu.gprs_mut();
            (registers.rax, registers.rdx) = (low, high);
        }
        let rest = self.cpu.rflags() & STATUS & !ZF;
        self.set_status(rest | if equal { ZF } else { 0 });
        Ok(self.done())
    }

    /// SETcc and CMOVcc.
    fn conditional(&mut self, condition: ConditionCode) -> Result {
        let number = (condition as u8).wrapping_sub(1);
        let holds = alu::condition(number, self.cpu.rflags());
        match (self.instruction.op_count(), self.instruction.op0_kind()) {
            (1, OpKind::Register | OpKind::Memory) if self.size(0) == 1 => {
                let place = self.place(0, true)?;
                self.write(place, 1, u64::from(holds))?;
            }
            (2, OpKind::Register) => {
                // The source is read, and the upper half of the register cleared, in any case.
                let size = self.size(0);
                let source = self.source(1, size)?;
                let destination = self.place(0, true)?;
                let old = self.read(destination, size, Intent::Read)?;
                self.write(destination, size, if holds { source } else { old })?;
            }
            _ => return Err(Stop::Unsupported),
        }
        Ok(self.done())
    }

    /// The mask of the stack pointer (SDM vol. 1, 6.2.3).
    pub(super) fn stack_mask(&self) -> u64 {
        if self.mode == CpuMode::Long64 {
            return u64::MAX;
        }
        let stack = self.cpu.segment(SegmentRegister::Ss).attributes;
        if stack.contains(SegmentAttributes::DEFAULT_BIG) {
            0xFFFF_FFFF
        } else {
            0xFFFF
        }
    }

    pub(super) fn set_stack_pointer(&mut self, value: u64) {
        let mask = self.stack_mask();
        let old = self.cpu.gprs().rsp;
        self.cpu.gprs_mut().rsp = match mask {
            0xFFFF => (old & !mask) | (value & mask),
            _ => value & mask,
        };
    }

    /// The address below the stack pointer for `size` bytes, and the stack pointer there.
    pub(super) fn below_stack(&self, size: usize) -> core::result::Result<(Gva, u64), Fault> {
        let mask = self.stack_mask();
        let pointer = self.cpu.gprs().rsp.wrapping_sub(size as u64) & mask;
        let address = self.linear(SegmentRegister::Ss, pointer, size, true)?;
        Ok((address, pointer))
    }

    fn push(&mut self) -> Result {
        if self.instruction.op0_kind() != OpKind::Memory {
            return Err(Stop::Unsupported);
        }
        let size = self.size(0);
        let (stack, pointer) = self.below_stack(size)?;
        let source = self.place(0, false)?;
        self.cpu.probe_write(stack, size)?;
        let value = self.read(source, size, Intent::Read)?;
        self.write_memory(stack, size, value)?;
        self.set_stack_pointer(pointer);
        Ok(self.done())
    }

    /// POP to memory. An address formed with the stack pointer uses its new value (SDM vol. 2B,
    /// POP).
    fn pop(&mut self) -> Result {
        if self.instruction.op0_kind() != OpKind::Memory {
            return Err(Stop::Unsupported);
        }
        let size = self.size(0);
        let mask = self.stack_mask();
        let pointer = self.cpu.gprs().rsp & mask;
        let stack = self.linear(SegmentRegister::Ss, pointer, size, false)?;
        let on_stack = matches!(
            self.instruction.memory_base(),
            Register::RSP | Register::ESP
        );
        let delta = if on_stack { size as u64 } else { 0 };
        let destination = self.memory(size, true, delta)?;
        self.cpu.probe_write(destination, size)?;
        let value = self.read_memory(stack, size, Intent::Read)?;
        self.write_memory(destination, size, value)?;
        self.set_stack_pointer(pointer.wrapping_add(size as u64));
        Ok(self.done())
    }

    /// Near CALL and JMP through memory.
    fn branch(&mut self, mnemonic: Mnemonic) -> Result {
        let near =
            self.instruction.is_jmp_near_indirect() || self.instruction.is_call_near_indirect();
        if !near || self.instruction.op0_kind() != OpKind::Memory {
            return Err(Stop::Unsupported);
        }
        let size = self.size(0);
        let source = self.place(0, false)?;
        let stack = match mnemonic {
            Mnemonic::Call => {
                let (stack, pointer) = self.below_stack(size)?;
                self.cpu.probe_write(stack, size)?;
                Some((stack, pointer))
            }
            _ => None,
        };
        let target = self.read(source, size, Intent::Read)?;
        let reachable = if self.mode == CpuMode::Long64 {
            super::operand::is_canonical(target, self.cpu.linear_bits())
        } else {
            target <= u64::from(self.cpu.segment(SegmentRegister::Cs).limit)
        };
        if !reachable {
            return Err(Fault::GP0.into());
        }
        if let Some((stack, pointer)) = stack {
            let next = self.next_ip();
            self.write_memory(stack, size, next)?;
            self.set_stack_pointer(pointer);
        }
        self.cpu.set_rip(target);
        Ok(Outcome::Done)
    }

    /// IN and OUT.
    fn port(&mut self, mnemonic: Mnemonic) -> Result {
        let (data, port) = match mnemonic {
            Mnemonic::In => (0, 1),
            _ => (1, 0),
        };
        let size = self.instruction.op_register(data).size();
        let port = match self.instruction.op_kind(port) {
            OpKind::Register => self.cpu.gprs()[Gpr::Rdx] as u16,
            _ => u16::from(self.instruction.immediate8()),
        };
        self.cpu.check_port(port, size as u8)?;
        let register = self.instruction.op_register(data);
        if mnemonic == Mnemonic::In {
            let mut bytes = [0; 8];
            self.cpu.port_in(port, &mut bytes[..size]);
            self.set_register(register, u64::from_le_bytes(bytes));
        } else {
            let value = self.register(register);
            self.cpu.port_out(port, &value.to_le_bytes()[..size]);
        }
        Ok(self.done())
    }
}
