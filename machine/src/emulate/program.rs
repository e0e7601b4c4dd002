//! What programs do beside accessing memory: branches, the stack, flags, and the rest of integer
//! arithmetic. For processors that are emulated as a whole.

use iced_x86::{ConditionCode, Mnemonic, OpKind, Register};
use testudo_arch::regs::CpuMode;
use testudo_arch::{Event, Exception, Gpr, Gva};

use super::alu::{self, AF, CF, DF, OF, PF, SF, STATUS, ZF, mask, sign_extend, truncate};
use super::execute::Execution;
use super::{Cpu, Fault, Intent, Intercept, Outcome, Stop};

const IF: u64 = 1 << 9;
const RF: u64 = 1 << 16;
const VM: u64 = 1 << 17;
/// The flags that POPF and IRET at privilege level 0 can change (SDM vol. 2B, POPF).
const CHANGEABLE: u64 = STATUS | alu::TF | IF | DF | 3 << 12 | 1 << 14 | 1 << 18 | 1 << 21;

impl<C: Cpu + ?Sized> Execution<'_, C> {
    /// The rest of the instruction set, as far as it is covered.
    pub(super) fn program(&mut self) -> Result<Outcome, Stop> {
        match self.ordinary() {
            Err(Stop::Unsupported) => self.segmentation(),
            result => result,
        }
    }

    /// What needs no more than the general registers, the flags and the stack.
    fn ordinary(&mut self) -> Result<Outcome, Stop> {
        let mnemonic = self.instruction.mnemonic();
        match mnemonic {
            Mnemonic::Cli => self.set_flag(IF, false),
            Mnemonic::Sti => self.set_flag(IF, true),
            Mnemonic::Cld => self.set_flag(DF, false),
            Mnemonic::Std => self.set_flag(DF, true),
            Mnemonic::Clc => self.set_flag(CF, false),
            Mnemonic::Stc => self.set_flag(CF, true),
            Mnemonic::Cmc => {
                let set = self.cpu.rflags() & CF == 0;
                self.set_flag(CF, set)
            }
            Mnemonic::Lahf => {
                let flags = self.cpu.rflags() & (SF | ZF | AF | PF | CF) | 2;
                self.set_register(Register::AH, flags);
                Ok(self.done())
            }
            Mnemonic::Sahf => {
                const LOADED: u64 = SF | ZF | AF | PF | CF;
                let flags = self.register(Register::AH) & LOADED;
                self.set_status(self.cpu.rflags() & STATUS & !LOADED | flags);
                Ok(self.done())
            }
            Mnemonic::Pushf | Mnemonic::Pushfd => {
                let flags = self.cpu.rflags() & !(RF | VM);
                self.push_value(flags)?;
                Ok(self.done())
            }
            Mnemonic::Popf | Mnemonic::Popfd => {
                let size = self.stack_size();
                let (flags, pointer) = self.peek(size, 0)?;
                self.set_stack_pointer(pointer);
                self.load_flags(flags, size);
                Ok(self.done())
            }
            Mnemonic::Push => {
                let value = self.source(0, self.stack_size())?;
                self.push_value(value)?;
                Ok(self.done())
            }
            Mnemonic::Pop => {
                let size = self.stack_size();
                let (value, pointer) = self.peek(size, 0)?;
                self.set_stack_pointer(pointer);
                self.set_register(self.instruction.op0_register(), value);
                Ok(self.done())
            }
            Mnemonic::Pusha | Mnemonic::Pushad => self.push_registers(),
            Mnemonic::Popa | Mnemonic::Popad => self.pop_registers(),
            Mnemonic::Leave => self.leave(),
            Mnemonic::Jmp => {
                let target = self.near_target()?;
                self.branch_to(target)
            }
            Mnemonic::Call => {
                let target = self.near_target()?;
                self.check_branch(target)?;
                let next = self.next_ip();
                self.push_value(next)?;
                self.branch_to(target)
            }
            Mnemonic::Ret => self.near_return(),
            Mnemonic::Loop | Mnemonic::Loope | Mnemonic::Loopne => self.loop_(mnemonic),
            Mnemonic::Jcxz | Mnemonic::Jecxz => {
                let size = if mnemonic == Mnemonic::Jcxz { 2 } else { 4 };
                let zero = truncate(self.cpu.gprs().rcx, size) == 0;
                self.branch_if(zero)
            }
            Mnemonic::Lea => {
                let (offset, _) = self.effective_address();
                self.set_register(self.instruction.op0_register(), offset);
                Ok(self.done())
            }
            Mnemonic::Xlatb => self.translate_byte(),
            Mnemonic::Cbw => self.extend(Register::AX, 1),
            Mnemonic::Cwde => self.extend(Register::EAX, 2),
            Mnemonic::Cwd => self.extend_into_dx(Register::AX, Register::DX),
            Mnemonic::Cdq => self.extend_into_dx(Register::EAX, Register::EDX),
            Mnemonic::Mul | Mnemonic::Imul => self.multiply(mnemonic == Mnemonic::Imul),
            Mnemonic::Div | Mnemonic::Idiv => self.divide(mnemonic == Mnemonic::Idiv),
            Mnemonic::Bsf | Mnemonic::Bsr => self.scan_bits(mnemonic == Mnemonic::Bsf),
            Mnemonic::Bswap => {
                let register = self.instruction.op0_register();
                let size = register.size();
                let value = self.register(register).swap_bytes() >> (64 - 8 * size);
                self.set_register(register, value);
                Ok(self.done())
            }
            Mnemonic::Cpuid => self.intercept(Intercept::Cpuid),
            Mnemonic::Hlt => self.intercept_at_0(Intercept::Halt),
            Mnemonic::Rdmsr => self.intercept_at_0(Intercept::ReadMsr),
            Mnemonic::Wrmsr => self.intercept_at_0(Intercept::WriteMsr),
            Mnemonic::Wbinvd | Mnemonic::Invd => self.intercept_at_0(Intercept::CacheFlush),
            Mnemonic::Rdtsc => self.intercept(Intercept::ReadTsc),
            Mnemonic::Pause => Ok(self.done()),
            _ => match self.instruction.condition_code() {
                ConditionCode::None => Err(Stop::Unsupported),
                condition => {
                    let number = (condition as u8).wrapping_sub(1);
                    let holds = alu::condition(number, self.cpu.rflags());
                    self.branch_if(holds)
                }
            },
        }
    }

    fn intercept(&mut self, what: Intercept) -> Result<Outcome, Stop> {
        Ok(Outcome::Intercepted {
            what,
            next: self.next_ip(),
        })
    }

    fn intercept_at_0(&mut self, what: Intercept) -> Result<Outcome, Stop> {
        if self.cpu.cpl() != 0 {
            return Err(Fault::GP0.into());
        }
        self.intercept(what)
    }

    fn set_flag(&mut self, flag: u64, on: bool) -> Result<Outcome, Stop> {
        if flag == IF && self.cpu.cpl() != 0 {
            return Err(Stop::Unsupported);
        }
        let rflags = self.cpu.rflags() & !flag;
        self.cpu.set_rflags(rflags | if on { flag } else { 0 });
        Ok(self.done())
    }

    /// Loads the flags as POPF and IRET do at privilege level 0.
    pub(super) fn load_flags(&mut self, value: u64, size: usize) {
        let loaded = CHANGEABLE & mask(size);
        let kept = self.cpu.rflags() & !(loaded | RF);
        self.cpu.set_rflags(kept | (value & loaded));
    }

    /// How many bytes the instruction moves the stack pointer by.
    pub(super) fn stack_size(&self) -> usize {
        self.instruction.stack_pointer_increment().unsigned_abs() as usize
    }

    /// Pushes one value of the instruction's stack size.
    pub(super) fn push_value(&mut self, value: u64) -> Result<(), Stop> {
        self.push_all(&[value], self.stack_size())
    }

    /// Pushes values of `size` bytes, the last first, as one access.
    pub(super) fn push_all(&mut self, values: &[u64], size: usize) -> Result<(), Stop> {
        let mut bytes = [0; 64];
        let len = values.len() * size;
        if !matches!(size, 2 | 4 | 8) || len > bytes.len() {
            return Err(Stop::Unsupported);
        }
        for (place, value) in bytes.chunks_exact_mut(size).zip(values) {
            place.copy_from_slice(&value.to_le_bytes()[..size]);
        }
        let (stack, pointer) = self.below_stack(len)?;
        self.cpu.write(stack, &bytes[..len])?;
        self.set_stack_pointer(pointer);
        Ok(())
    }

    /// The value of `size` bytes that is `number` such values above the stack pointer, and the
    /// stack pointer above it.
    pub(super) fn peek(&mut self, size: usize, number: u64) -> Result<(u64, u64), Stop> {
        if !matches!(size, 2 | 4 | 8) {
            return Err(Stop::Unsupported);
        }
        let mask = self.stack_mask();
        let at = self.cpu.gprs().rsp.wrapping_add(number * size as u64) & mask;
        let address = self.linear(testudo_arch::regs::SegmentRegister::Ss, at, size, false)?;
        let value = self.read_memory(address, size, Intent::Read)?;
        Ok((value, at.wrapping_add(size as u64) & mask))
    }

    fn push_registers(&mut self) -> Result<Outcome, Stop> {
        let size = self.stack_size() / 8;
        let g = *self.cpu.gprs();
        // EAX is pushed first, and lies highest.
        let values = [g.rdi, g.rsi, g.rbp, g.rsp, g.rbx, g.rdx, g.rcx, g.rax];
        self.push_all(&values, size)?;
        Ok(self.done())
    }

    fn pop_registers(&mut self) -> Result<Outcome, Stop> {
        let size = self.stack_size() / 8;
        let mut values = [0; 8];
        let mut pointer = 0;
        for (number, value) in values.iter_mut().enumerate() {
            (*value, pointer) = self.peek(size, number as u64)?;
        }
        let order = [
            Gpr::Rdi,
            Gpr::Rsi,
            Gpr::Rbp,
            Gpr::Rsp,
            Gpr::Rbx,
            Gpr::Rdx,
            Gpr::Rcx,
            Gpr::Rax,
        ];
        for (register, value) in order.into_iter().zip(values) {
            if register != Gpr::Rsp {
                let whole = &mut self.cpu.gprs_mut()[register];
                *whole = match size {
                    4 => value,
                    _ => (*whole & !mask(size)) | value,
                };
            }
        }
        self.set_stack_pointer(pointer);
        Ok(self.done())
    }

    fn leave(&mut self) -> Result<Outcome, Stop> {
        let size = if matches!(self.instruction.code(), iced_x86::Code::Leavew) {
            2
        } else {
            4
        };
        let at = self.cpu.gprs().rbp & self.stack_mask();
        let address = self.linear(testudo_arch::regs::SegmentRegister::Ss, at, size, false)?;
        let value = self.read_memory(address, size, Intent::Read)?;
        self.set_stack_pointer(at.wrapping_add(size as u64));
        let register = if size == 2 {
            Register::BP
        } else {
            Register::EBP
        };
        self.set_register(register, value);
        Ok(self.done())
    }

    /// Where a near branch goes: an offset in the instruction or a register.
    fn near_target(&mut self) -> Result<u64, Stop> {
        match self.instruction.op0_kind() {
            OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => {
                Ok(self.instruction.near_branch_target())
            }
            OpKind::Register => Ok(self.register(self.instruction.op0_register())),
            _ => Err(Stop::Unsupported),
        }
    }

    fn check_branch(&self, target: u64) -> Result<(), Stop> {
        use testudo_arch::regs::SegmentRegister::Cs;
        if self.mode == CpuMode::Long64 {
            return Err(Stop::Unsupported);
        }
        if target > u64::from(self.cpu.segment(Cs).limit) {
            return Err(Fault::GP0.into());
        }
        Ok(())
    }

    fn branch_to(&mut self, target: u64) -> Result<Outcome, Stop> {
        self.check_branch(target)?;
        self.cpu.set_rip(target);
        Ok(Outcome::Done)
    }

    fn branch_if(&mut self, taken: bool) -> Result<Outcome, Stop> {
        let target = self.near_target()?;
        if taken {
            self.branch_to(target)
        } else {
            Ok(self.done())
        }
    }

    fn near_return(&mut self) -> Result<Outcome, Stop> {
        let released = match self.instruction.op0_kind() {
            OpKind::Immediate16 => u64::from(self.instruction.immediate16()),
            _ => 0,
        };
        let size = self.stack_size() - released as usize;
        let (target, pointer) = self.peek(size, 0)?;
        self.check_branch(target)?;
        self.set_stack_pointer(pointer.wrapping_add(released));
        self.branch_to(target)
    }

    fn loop_(&mut self, mnemonic: Mnemonic) -> Result<Outcome, Stop> {
        use iced_x86::Code as C;
        let wide = matches!(
            self.instruction.code(),
            C::Loop_rel8_16_ECX
                | C::Loop_rel8_32_ECX
                | C::Loope_rel8_16_ECX
                | C::Loope_rel8_32_ECX
                | C::Loopne_rel8_16_ECX
                | C::Loopne_rel8_32_ECX
        );
        let size = if wide { 4 } else { 2 };
        let old = self.cpu.gprs().rcx;
        let count = truncate(old, size).wrapping_sub(1) & mask(size);
        let zero = self.cpu.rflags() & ZF != 0;
        let go_on = count != 0
            && match mnemonic {
                Mnemonic::Loope => zero,
                Mnemonic::Loopne => !zero,
                _ => true,
            };
        let outcome = self.branch_if(go_on)?;
        self.cpu.gprs_mut().rcx = (old & !mask(size)) | count;
        Ok(outcome)
    }

    fn translate_byte(&mut self) -> Result<Outcome, Stop> {
        let segment = super::operand::segment_register(self.instruction.memory_segment());
        let index = self.register(Register::AL);
        let (base, size) = match self.instruction.memory_base() {
            Register::BX => (self.cpu.gprs().rbx, 2),
            Register::EBX => (self.cpu.gprs().rbx, 4),
            _ => return Err(Stop::Unsupported),
        };
        let offset = base.wrapping_add(index) & mask(size);
        let address: Gva = self.linear(segment, offset, 1, false)?;
        let value = self.read_memory(address, 1, Intent::Read)?;
        self.set_register(Register::AL, value);
        Ok(self.done())
    }

    /// CBW and CWDE: AX or EAX from its lower half of `size` bytes.
    fn extend(&mut self, register: Register, size: usize) -> Result<Outcome, Stop> {
        let value = sign_extend(self.register(register), size);
        self.set_register(register, truncate(value, register.size()));
        Ok(self.done())
    }

    fn extend_into_dx(&mut self, from: Register, to: Register) -> Result<Outcome, Stop> {
        let negative = self.register(from) & alu::sign_bit(from.size()) != 0;
        let value = if negative { mask(to.size()) } else { 0 };
        self.set_register(to, value);
        Ok(self.done())
    }

    /// The accumulator and its extension for an operand size: AL with AH is AX.
    fn accumulators(size: usize) -> Result<(Register, Register), Stop> {
        match size {
            1 => Ok((Register::AL, Register::AH)),
            2 => Ok((Register::AX, Register::DX)),
            4 => Ok((Register::EAX, Register::EDX)),
            _ => Err(Stop::Unsupported),
        }
    }

    fn multiply(&mut self, signed: bool) -> Result<Outcome, Stop> {
        let size = self.size(0);
        let (low, high) = Self::accumulators(size)?;
        let widen = |value: u64| {
            if signed {
                sign_extend(value, size) as i64
            } else {
                value as i64
            }
        };
        let operands = self.instruction.op_count();
        let (a, b) = match operands {
            1 => (self.register(low), self.source(0, size)?),
            2 => (self.source(0, size)?, self.source(1, size)?),
            _ => (self.source(1, size)?, self.source(2, size)?),
        };
        // Two factors of up to 32 bits never overflow.
        let product = widen(a).wrapping_mul(widen(b));
        let fits = if signed {
            sign_extend(truncate(product as u64, size), size) as i64 == product
        } else {
            product as u64 >> (8 * size) == 0
        };
        if operands == 1 {
            self.set_register(low, truncate(product as u64, size));
            let upper = truncate((product >> (8 * size)) as u64, size);
            self.set_register(high, upper);
        } else {
            let result = truncate(product as u64, size);
            self.set_register(self.instruction.op0_register(), result);
        }
        let overflow = if fits { 0 } else { CF | OF };
        self.set_status(self.cpu.rflags() & STATUS & !(CF | OF) | overflow);
        Ok(self.done())
    }

    fn divide(&mut self, signed: bool) -> Result<Outcome, Stop> {
        let error = || -> Stop {
            let event = Event::fault(Exception::DivideError);
            Fault { event, cr2: None }.into()
        };
        let size = self.size(0);
        let (low, high) = Self::accumulators(size)?;
        let divisor = self.source(0, size)?;
        let bits = 8 * size as u32;
        let dividend = self.register(high) << bits | self.register(low);
        let (quotient, remainder, fits) = if signed {
            let dividend = sign_extend(dividend, 2 * size) as i64;
            let divisor = sign_extend(divisor, size) as i64;
            let (Some(q), Some(r)) = (dividend.checked_div(divisor), dividend.checked_rem(divisor))
            else {
                return Err(error());
            };
            let narrow = sign_extend(truncate(q as u64, size), size) as i64;
            (q as u64, r as u64, narrow == q)
        } else {
            let (Some(q), Some(r)) = (dividend.checked_div(divisor), dividend.checked_rem(divisor))
            else {
                return Err(error());
            };
            (q, r, q >> bits == 0)
        };
        if !fits {
            return Err(error());
        }
        self.set_register(low, truncate(quotient, size));
        self.set_register(high, truncate(remainder, size));
        Ok(self.done())
    }

    fn scan_bits(&mut self, forward: bool) -> Result<Outcome, Stop> {
        let size = self.size(0);
        let value = self.source(1, size)?;
        let status = self.cpu.rflags() & STATUS & !ZF;
        if value == 0 {
            self.set_status(status | ZF);
            return Ok(self.done());
        }
        let number = if forward {
            value.trailing_zeros()
        } else {
            63 - value.leading_zeros()
        };
        self.set_register(self.instruction.op0_register(), u64::from(number));
        self.set_status(status);
        Ok(self.done())
    }
}
