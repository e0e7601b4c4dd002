//! Which emulator has the processor.

use testudo_arch::cpuid::Cpuid;
use testudo_rt::port;

/// The emulator that the program runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Emulator {
    /// QEMU's TCG, compared with version 7.2.
    Qemu,
    /// Bochs, compared with version 2.7.
    Bochs,
    /// Something else: a processor perhaps. It has no defects that are known.
    Other,
}

impl Emulator {
    /// By what CPUID says, and by the debug console.
    #[allow(unsafe_code, reason = "reading a port")]
    pub fn detect(cpuid: &Cpuid) -> Self {
        let hypervisor = cpuid.query(1, 0)[2] >> 31 != 0;
        // SAFETY: reading the debug console's port has no effect; without one it reads as ones.
        let console = unsafe { port::read_u8(0xE9) } == 0xE9;
        match (hypervisor, console) {
            (true, _) => Self::Qemu,
            (false, true) => Self::Bochs,
            (false, false) => Self::Other,
        }
    }
}
