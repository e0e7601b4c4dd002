//! Memory operands of VMX instructions: through L1's segments and page tables, with the faults that
//! L1's processor would raise.

use testudo_arch::regs::{CpuMode, SegmentRegister, SystemRegisters};
use testudo_arch::segment::SegmentAttributes;
use testudo_arch::{Event, Exception, Gpa, Gprs, GuestMemory, Gva, PAGE_SIZE, PageSize, RFlags};
use testudo_ept::walk::{Access, AccessKind, PagingState, WalkError, walk};
use testudo_vmx::exit::MemoryOperand;

/// A fault of an instruction, and the address that goes to CR2 with a #PF.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The exception.
    pub event: Event,
    /// CR2, if it is a #PF.
    pub cr2: Option<u64>,
}

impl From<Event> for Fault {
    fn from(event: Event) -> Self {
        Self { event, cr2: None }
    }
}

/// L1 as its memory operands see it.
pub(super) struct Operands<'a, M> {
    pub(super) system: &'a SystemRegisters,
    pub(super) gprs: &'a Gprs,
    pub(super) memory: &'a M,
    pub(super) physical_bits: u8,
}

impl<M: GuestMemory> Operands<'_, M> {
    /// Reads `buf.len()` bytes of a memory operand.
    pub(super) fn read(&self, operand: &MemoryOperand, buf: &mut [u8]) -> Result<(), Fault> {
        let len = buf.len();
        let pieces = self.translate(operand, len, AccessKind::Read)?;
        let (first, second) = buf.split_at_mut(pieces.first_len);
        // What is not memory reads as ones.
        for (gpa, part) in [(pieces.first, first), (pieces.second, second)] {
            if !part.is_empty() && self.memory.read(gpa, part).is_err() {
                part.fill(0xFF);
            }
        }
        Ok(())
    }

    /// Writes a memory operand. What is not memory takes nothing.
    pub(super) fn write(&self, operand: &MemoryOperand, data: &[u8]) -> Result<(), Fault> {
        let pieces = self.translate(operand, data.len(), AccessKind::Write)?;
        let (first, second) = data.split_at(pieces.first_len);
        for (gpa, part) in [(pieces.first, first), (pieces.second, second)] {
            if !part.is_empty() {
                let _dropped = self.memory.write(gpa, part).is_err();
            }
        }
        Ok(())
    }

    fn translate(
        &self,
        operand: &MemoryOperand,
        len: usize,
        kind: AccessKind,
    ) -> Result<Pieces, Fault> {
        let mode = self.system.mode();
        self.check_segment(operand, len as u64, kind, mode)?;
        let base = self.system.segment(operand.segment).base;
        let linear = Gva(operand.linear_address(self.gprs, base, mode));
        let room = (PAGE_SIZE - linear.offset_in(PageSize::Size4K)) as usize;
        let first_len = len.min(room);
        let first = self.walk(linear, operand, kind)?;
        let second = if first_len < len {
            let mut next = linear.wrapping_add(first_len as u64);
            if mode != CpuMode::Long64 {
                next.0 &= 0xFFFF_FFFF;
            }
            self.walk(next, operand, kind)?
        } else {
            Gpa::ZERO
        };
        Ok(Pieces {
            first,
            second,
            first_len,
        })
    }

    fn walk(&self, linear: Gva, operand: &MemoryOperand, kind: AccessKind) -> Result<Gpa, Fault> {
        let system = self.system;
        let state = PagingState {
            cr0: system.cr0,
            cr3: system.cr3,
            cr4: system.cr4,
            efer: system.efer,
            alignment_check: system.rflags & RFlags::ALIGNMENT_CHECK.bits() != 0,
            physical_bits: self.physical_bits,
            ..PagingState::default()
        };
        match walk(
            self.memory,
            &state,
            linear,
            Access::at_cpl(kind, system.cpl()),
        ) {
            Ok(found) => Ok(found.gpa),
            Err(WalkError::Fault(fault)) => Err(Fault {
                event: Event::fault_with(Exception::PageFault, fault.code.bits()),
                cr2: Some(fault.address.0),
            }),
            // Canonical addresses were checked; tables outside memory, or that L1 keeps changing,
            // are L1's to explain.
            Err(_) => Err(protection(operand).into()),
        }
    }

    /// Canonical in 64-bit mode (SDM vol. 3A, 5.3.1); elsewhere the segment's type and limit
    /// (SDM vol. 3A, 5.3 and 5.4.1).
    fn check_segment(
        &self,
        operand: &MemoryOperand,
        len: u64,
        kind: AccessKind,
        mode: CpuMode,
    ) -> Result<(), Fault> {
        let segment = self.system.segment(operand.segment);
        let fault = Err(protection(operand).into());
        let last = len.saturating_sub(1);
        if mode == CpuMode::Long64 {
            let base = segment.base;
            let linear = operand.linear_address(self.gprs, base, mode);
            let bits = if self.system.cr4 & (1 << 12) != 0 {
                57
            } else {
                48
            };
            let canonical = |address: u64| {
                let unused = 64 - bits;
                ((address << unused) as i64 >> unused) as u64 == address
            };
            let ends = linear.wrapping_add(last);
            return if canonical(linear) && canonical(ends) {
                Ok(())
            } else {
                fault
            };
        }
        use SegmentAttributes as A;
        let attributes = segment.attributes;
        if attributes.contains(A::UNUSABLE) || !attributes.contains(A::PRESENT) {
            return fault;
        }
        let code = attributes.contains(A::CODE);
        let allowed = match kind {
            AccessKind::Write => !code && attributes.contains(A::WRITABLE),
            _ => !code || attributes.contains(A::WRITABLE),
        };
        let offset = operand.effective_address(self.gprs);
        let Some(end) = offset.checked_add(last) else {
            return fault;
        };
        let limit = u64::from(segment.limit);
        let inside = if !code && attributes.contains(A::CONFORMING) {
            // Expand-down: what is above the limit.
            let top = if attributes.contains(A::DEFAULT_BIG) {
                0xFFFF_FFFF
            } else {
                0xFFFF
            };
            offset > limit && end <= top
        } else {
            end <= limit
        };
        if allowed && inside { Ok(()) } else { fault }
    }
}

/// Where an operand lies: it may cross one page boundary.
struct Pieces {
    first: Gpa,
    second: Gpa,
    first_len: usize,
}

fn protection(operand: &MemoryOperand) -> Event {
    if operand.segment == SegmentRegister::Ss {
        Event::fault_with(Exception::StackFault, 0)
    } else {
        Event::GP0
    }
}
