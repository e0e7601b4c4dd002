//! The SSE moves with which compilers and drivers copy to and from device memory.

use iced_x86::{Code, OpKind, Register};
use testudo_arch::Gva;

use super::execute::Execution;
use super::{Cpu, Fault, Intent, Outcome, Stop};

/// A move between memory and an XMM register.
#[derive(Clone, Copy, Debug)]
struct Move {
    size: usize,
    /// Whether an address that is no multiple of 16 faults (SDM vol. 1, 4.1.1).
    aligned: bool,
    /// Whether a load clears the rest of the register; a store has no rest.
    clears: bool,
}

const fn whole(aligned: bool) -> Option<Move> {
    Some(Move {
        size: 16,
        aligned,
        clears: true,
    })
}

const fn part(size: usize, clears: bool) -> Option<Move> {
    Some(Move {
        size,
        aligned: false,
        clears,
    })
}

impl Move {
    fn of(code: Code) -> Option<Self> {
        match code {
            Code::Movaps_xmm_xmmm128
            | Code::Movaps_xmmm128_xmm
            | Code::Movapd_xmm_xmmm128
            | Code::Movapd_xmmm128_xmm
            | Code::Movdqa_xmm_xmmm128
            | Code::Movdqa_xmmm128_xmm
            | Code::Movntps_m128_xmm
            | Code::Movntpd_m128_xmm
            | Code::Movntdq_m128_xmm
            | Code::Movntdqa_xmm_m128 => whole(true),
            Code::Movups_xmm_xmmm128
            | Code::Movups_xmmm128_xmm
            | Code::Movupd_xmm_xmmm128
            | Code::Movupd_xmmm128_xmm
            | Code::Movdqu_xmm_xmmm128
            | Code::Movdqu_xmmm128_xmm
            | Code::Lddqu_xmm_m128 => whole(false),
            Code::Movq_xmm_xmmm64
            | Code::Movq_xmmm64_xmm
            | Code::Movq_xmm_rm64
            | Code::Movq_rm64_xmm
            | Code::Movsd_xmm_xmmm64
            | Code::Movsd_xmmm64_xmm => part(8, true),
            Code::Movlps_xmm_m64
            | Code::Movlps_m64_xmm
            | Code::Movlpd_xmm_m64
            | Code::Movlpd_m64_xmm => part(8, false),
            Code::Movd_xmm_rm32
            | Code::Movd_rm32_xmm
            | Code::Movss_xmm_xmmm32
            | Code::Movss_xmmm32_xmm => part(4, true),
            _ => None,
        }
    }
}

fn xmm_number(register: Register) -> Option<u8> {
    let number = register.number();
    (register.is_xmm() && number < 16).then_some(number as u8)
}

impl<C: Cpu + ?Sized> Execution<'_, C> {
    /// Moves between memory and XMM registers; everything else is unsupported.
    pub(super) fn vector(&mut self) -> Result<Outcome, Stop> {
        let kind = Move::of(self.instruction.code()).ok_or(Stop::Unsupported)?;
        let (memory, register) = match (self.instruction.op0_kind(), self.instruction.op1_kind()) {
            (OpKind::Memory, OpKind::Register) => (0, self.instruction.op1_register()),
            (OpKind::Register, OpKind::Memory) => (1, self.instruction.op0_register()),
            _ => return Err(Stop::Unsupported),
        };
        let number = xmm_number(register).ok_or(Stop::Unsupported)?;
        let old = self.cpu.xmm(number).ok_or(Stop::Unsupported)?;
        let stores = memory == 0;
        let address: Gva = self.memory(kind.size, stores, 0)?;
        if kind.aligned && !address.0.is_multiple_of(16) {
            return Err(Fault::GP0.into());
        }
        if stores {
            self.cpu.write(address, &old.to_le_bytes()[..kind.size])?;
        } else {
            let mut bytes = if kind.clears {
                [0; 16]
            } else {
                old.to_le_bytes()
            };
            self.cpu
                .read(address, &mut bytes[..kind.size], Intent::Read)?;
            self.cpu.set_xmm(number, u128::from_le_bytes(bytes));
        }
        Ok(self.done())
    }
}
