//! The length of an instruction, for processors that do not report it with an exit.

use iced_x86::{Code, Decoder, DecoderOptions};
use testudo_arch::regs::CpuMode;

use super::bitness;

/// The length in bytes of the instruction that `code` begins with, as a processor in `mode` sees
/// it; `None` if it is undefined or goes on behind the end of `code`.
///
/// The instructions that usually cause exits are recognized by their bytes.
///
/// ```
/// use testudo_arch::regs::CpuMode;
/// use testudo_machine::emulate::length;
/// assert_eq!(length(&[0x0F, 0xA2], CpuMode::Long64), Some(2));
/// assert_eq!(length(&[0xF2, 0x66, 0x6E], CpuMode::Protected32), Some(3));
/// assert_eq!(length(&[0x0F], CpuMode::Real), None);
/// ```
#[inline]
pub fn length(code: &[u8], mode: CpuMode) -> Option<u8> {
    match *code {
        // CPUID, RDMSR, WRMSR, RDTSC, RDPMC, INVD, WBINVD, CLTS.
        [
            0x0F,
            0xA2 | 0x32 | 0x30 | 0x31 | 0x33 | 0x08 | 0x09 | 0x06,
            ..,
        ] => Some(2),
        // VMCALL, VMLAUNCH, VMRESUME, VMXOFF; MONITOR, MWAIT; XGETBV, XSETBV; VMRUN, VMMCALL,
        // VMLOAD, VMSAVE, STGI, CLGI, SKINIT, INVLPGA; SWAPGS is valid in 64-bit mode only.
        [
            0x0F,
            0x01,
            0xC1..=0xC4 | 0xC8 | 0xC9 | 0xD0 | 0xD1 | 0xD8..=0xDF | 0xF9,
            ..,
        ] => Some(3),
        // HLT; IN and OUT by DX.
        [0xF4 | 0xEC..=0xEF, ..] => Some(1),
        // IN and OUT by number.
        [0xE4..=0xE7, _, ..] => Some(2),
        // PAUSE; OUT and IN by DX with an operand-size prefix.
        [0xF3, 0x90, ..] | [0x66, 0xED | 0xEF, ..] => Some(2),
        _ => decode(code, mode),
    }
}

#[cold]
pub(super) fn decode(code: &[u8], mode: CpuMode) -> Option<u8> {
    let code = &code[..code.len().min(super::MAX_LENGTH)];
    let mut decoder = Decoder::new(bitness(mode), code, DecoderOptions::NONE);
    let instruction = decoder.decode();
    (instruction.code() != Code::INVALID).then(|| instruction.len() as u8)
}
