//! The instruction emulator: what a guest does to device memory, and string port I/O.
//!
//! It knows no virtual machine. It runs over the small trait [`Cpu`], so tests and fuzzers are just
//! other CPUs. [`step`] executes the one instruction at RIP; on a fault nothing has changed but
//! the finished iterations of a repeated string instruction, exactly as the architecture restarts
//! them. [`length()`] only measures an instruction, for processors that do not tell its length.
//!
//! Covered are moves of all kinds (also SSE's), arithmetic, bit operations, exchanges, string
//! instructions, stack and branch operands, ports, control registers and INVLPG; and for a processor
//! that cannot run its guest at all ([`Cpu::is_whole`]) the integer instruction set of real mode, with
//! what leads from there to protected mode. Not covered are the x87 FPU, MMX and AVX, decimal
//! arithmetic, and gates: [`EmulateError::Unsupported`]. Alignment checks
//! (`#AC`) are not made.
//!
//! Work is bounded: one call executes at most [`MAX_ITERATIONS`] iterations, and no guest input
//! makes it panic.

mod alu;
mod execute;
mod length;
pub mod linear;
mod operand;
mod program;
mod segment;
mod string;
mod system;
pub mod task;
mod vector;

use iced_x86::{Code, Decoder, DecoderError, DecoderOptions, Instruction};
use testudo_arch::regs::{CpuMode, SegmentRegister};
use testudo_arch::segment::DescriptorTable;
use testudo_arch::{Event, Exception, Gprs, Gva, Segment};

pub use length::length;

/// How many iterations of a repeated string instruction one [`step`] executes at most.
pub const MAX_ITERATIONS: u32 = 1024;

/// The longest instruction (SDM vol. 2A, 2.3.11).
pub const MAX_LENGTH: usize = 15;

/// What an access to memory is for, which decides the permissions that it needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Intent {
    /// To read.
    Read,
    /// To read now and to write the same bytes next: both permissions are needed, so that
    /// nothing happens if the write would fault.
    Modify,
}

/// An exception that the instruction raises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// What to inject.
    pub event: Event,
    /// What CR2 becomes, for a page fault.
    pub cr2: Option<u64>,
}

impl Fault {
    /// `#GP(0)`.
    pub const GP0: Self = Self::plain(Event::GP0);
    /// `#SS(0)`.
    pub const SS0: Self = Self::plain(Event::fault_with(Exception::StackFault, 0));
    /// `#UD`.
    pub const UD: Self = Self::plain(Event::UD);

    const fn plain(event: Event) -> Self {
        Self { event, cr2: None }
    }

    /// A page fault at this address with this error code (SDM vol. 3A, 4.7).
    pub const fn page(address: Gva, error_code: u32) -> Self {
        Self {
            event: Event::fault_with(Exception::PageFault, error_code),
            cr2: Some(address.0),
        }
    }
}

/// The processor and the memory that the emulator works on.
///
/// Addresses are linear: the emulator has done segmentation. A memory access is done as a whole or
/// faults as a whole, also where it crosses pages; behind it may be a device, whose reads have
/// effects, so the emulator makes each access exactly once and in order.
pub trait Cpu {
    /// The general registers.
    fn gprs(&self) -> &Gprs;

    /// The general registers, to be changed.
    fn gprs_mut(&mut self) -> &mut Gprs;

    /// The instruction pointer.
    fn rip(&self) -> u64;

    /// Sets the instruction pointer.
    fn set_rip(&mut self, rip: u64);

    /// RFLAGS.
    fn rflags(&self) -> u64;

    /// Sets RFLAGS.
    fn set_rflags(&mut self, rflags: u64);

    /// The mode.
    fn mode(&self) -> CpuMode;

    /// A segment register.
    fn segment(&self, register: SegmentRegister) -> Segment;

    /// The width of a canonical address: 48, or 57 with CR4.LA57.
    fn linear_bits(&self) -> u8 {
        48
    }

    /// The privilege level, for instructions that only the supervisor has.
    fn cpl(&self) -> u8 {
        0
    }

    /// CR0, CR2, CR3, CR4 or CR8; `None` if this CPU does not show it.
    fn control_register(&self, _number: u8) -> Option<u64> {
        None
    }

    /// Writes such a register.
    ///
    /// # Errors
    ///
    /// The fault that a MOV of this value raises. By default `#UD`, as of a register that is not there.
    fn set_control_register(&mut self, _number: u8, _value: u64) -> Result<(), Fault> {
        Err(Fault::UD)
    }

    /// INVLPG of the page at a canonical address.
    ///
    /// # Errors
    ///
    /// By default `#UD`, as where there is no such instruction.
    fn invalidate_page(&mut self, _address: Gva) -> Result<(), Fault> {
        Err(Fault::UD)
    }

    /// Whether all of the processor is emulated, not only instructions that access devices: it then
    /// has the following registers too.
    fn is_whole(&self) -> bool {
        false
    }

    /// Sets a segment register; `false` if the processor is not emulated as a whole.
    fn set_segment(&mut self, _register: SegmentRegister, _segment: &Segment) -> bool {
        false
    }

    /// GDTR and IDTR.
    fn descriptor_tables(&self) -> [DescriptorTable; 2] {
        Default::default()
    }

    /// Sets IDTR or GDTR; `false` if the processor is not emulated as a whole.
    fn set_descriptor_table(&mut self, _interrupts: bool, _table: DescriptorTable) -> bool {
        false
    }

    /// Whether the processor can as well execute a repeated string instruction itself, which is
    /// then [`EmulateError::Unsupported`].
    fn repeats_natively(&self) -> bool {
        false
    }

    /// Copies code bytes from a linear address and returns how many: at least one, and as many as
    /// fit the buffer or as the page holds.
    ///
    /// # Errors
    ///
    /// The fault of an instruction fetch at `address`.
    fn fetch(&mut self, address: Gva, code: &mut [u8]) -> Result<usize, Fault>;

    /// Reads `data.len()` bytes.
    ///
    /// # Errors
    ///
    /// The fault of this access; then nothing was read.
    fn read(&mut self, address: Gva, data: &mut [u8], intent: Intent) -> Result<(), Fault>;

    /// Writes `data`.
    ///
    /// # Errors
    ///
    /// The fault of this access; then nothing was written.
    fn write(&mut self, address: Gva, data: &[u8]) -> Result<(), Fault>;

    /// Tests whether `len` bytes could be written, without effect.
    ///
    /// # Errors
    ///
    /// The fault that the write would raise.
    fn probe_write(&mut self, address: Gva, len: usize) -> Result<(), Fault>;

    /// Writes `new` if memory still holds `current`, as one atomic access, and says whether it
    /// did. For device memory a plain write is right.
    ///
    /// # Errors
    ///
    /// The fault of this access; then nothing was written.
    fn compare_exchange(&mut self, address: Gva, current: &[u8], new: &[u8])
    -> Result<bool, Fault>;

    /// Reads from a port into 1, 2 or 4 bytes.
    fn port_in(&mut self, port: u16, data: &mut [u8]);

    /// Writes 1, 2 or 4 bytes to a port.
    fn port_out(&mut self, port: u16, data: &[u8]);

    /// Whether the program may use the port (IOPL and the TSS's bitmap). Both vendors' processors
    /// have tested that before they exit, so by default it is allowed.
    ///
    /// # Errors
    ///
    /// The fault of a program that may not.
    fn check_port(&mut self, _port: u16, _size: u8) -> Result<(), Fault> {
        Ok(())
    }

    /// An XMM register by its number below 16; `None` if this CPU does not show them.
    fn xmm(&self, _number: u8) -> Option<u128> {
        None
    }

    /// Sets an XMM register and leaves the rest of its YMM register as it is. Called only if
    /// [`xmm`](Self::xmm) shows registers.
    fn set_xmm(&mut self, _number: u8, _value: u128) {}
}

/// How far an instruction came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is complete; RIP is at the next one.
    Done,
    /// RFLAGS.TF was set and the instruction is complete, or one iteration of a repeated one: a
    /// single-step `#DB` is due.
    SingleStep,
    /// It is one that the machine answers. RIP is still there, and goes to `next` when it is done.
    Intercepted {
        /// Which.
        what: Intercept,
        /// The address behind it.
        next: u64,
    },
    /// It must be continued: RIP is still there. A repeated string instruction has made a number
    /// of iterations, or a locked one met another processor. Interrupts may come in between.
    Continue,
}

/// An instruction that the emulator leaves to the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Intercept {
    /// CPUID.
    Cpuid,
    /// HLT.
    Halt,
    /// RDMSR.
    ReadMsr,
    /// WRMSR.
    WriteMsr,
    /// RDTSC.
    ReadTsc,
    /// WBINVD or INVD.
    CacheFlush,
}

/// Why an instruction was not executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EmulateError {
    /// It raises an exception.
    #[error("the instruction raises {}", .0.event)]
    Fault(Fault),
    /// The emulator does not know the instruction: either it is undefined, or it is one that no
    /// guest uses on device memory.
    #[error("unsupported instruction {:02x?}", &.bytes[..usize::from(*.length)])]
    Unsupported {
        /// The instruction's bytes.
        bytes: [u8; MAX_LENGTH],
        /// How many of them there are.
        length: u8,
    },
}

impl From<Fault> for EmulateError {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

/// Why an operation inside the emulator stopped.
#[derive(Clone, Copy, Debug)]
enum Stop {
    Fault(Fault),
    Unsupported,
}

impl From<Fault> for Stop {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

/// Builds the decoder's tables, which otherwise happens (and allocates) on first use.
pub fn prepare() {
    let _ = length::decode(&[0x90], CpuMode::Long64);
}

/// Executes the instruction at RIP.
///
/// # Errors
///
/// The instruction faults, or the emulator does not know it. RIP is unchanged then.
pub fn step<C: Cpu + ?Sized>(cpu: &mut C) -> Result<Outcome, EmulateError> {
    let mode = cpu.mode();
    let mut code = [0; MAX_LENGTH];
    let (instruction, available) = fetch(cpu, mode, &mut code)?;
    let single_step = cpu.rflags() & alu::TF != 0;
    let mut execution = execute::Execution {
        cpu,
        instruction,
        mode,
        single_step,
    };
    let outcome = match execution.run() {
        Ok(outcome) => outcome,
        Err(Stop::Fault(fault)) => return Err(fault.into()),
        Err(Stop::Unsupported) => {
            let length = instruction.len().max(1).min(available);
            return Err(EmulateError::Unsupported {
                bytes: code,
                length: length as u8,
            });
        }
    };
    match outcome {
        Outcome::Done if single_step => Ok(Outcome::SingleStep),
        outcome => Ok(outcome),
    }
}

/// Delivers an event in real mode.
///
/// # Errors
///
/// The fault that its delivery raises. Nothing has changed then.
pub fn deliver<C: Cpu + ?Sized>(cpu: &mut C, event: Event) -> Result<(), Fault> {
    let rip = cpu.rip();
    segment::deliver(cpu, event.vector(), rip)
}

/// The width of code in a mode.
const fn bitness(mode: CpuMode) -> u32 {
    match mode {
        CpuMode::Real | CpuMode::Virtual8086 | CpuMode::Protected16 | CpuMode::Compatibility16 => {
            16
        }
        CpuMode::Protected32 | CpuMode::Compatibility32 => 32,
        CpuMode::Long64 => 64,
    }
}

/// Fetches and decodes. The bytes of a following page are touched only if the instruction goes on
/// there, because only then may they fault.
fn fetch<C: Cpu + ?Sized>(
    cpu: &mut C,
    mode: CpuMode,
    code: &mut [u8; MAX_LENGTH],
) -> Result<(Instruction, usize), EmulateError> {
    let rip = cpu.rip();
    let mut have = 0;
    while have < MAX_LENGTH {
        let part = fetch_address(cpu, mode, rip, have).and_then(|(address, room)| {
            let end = (have + room).min(MAX_LENGTH);
            cpu.fetch(address, &mut code[have..end])
        })?;
        if part == 0 {
            break;
        }
        have = (have + part).min(MAX_LENGTH);
        let mut decoder = Decoder::with_ip(bitness(mode), &code[..have], rip, DecoderOptions::NONE);
        let mut instruction = Instruction::default();
        decoder.decode_out(&mut instruction);
        if decoder.last_error() == DecoderError::NoMoreBytes {
            continue;
        }
        if instruction.code() == Code::INVALID {
            let too_long = decoder.position() >= MAX_LENGTH;
            return Err(if too_long { Fault::GP0 } else { Fault::UD }.into());
        }
        return Ok((instruction, have));
    }
    // "An instruction that is longer than 15 bytes" (SDM vol. 3A, 6.15, interrupt 13).
    Err(Fault::GP0.into())
}

/// The linear address of the code byte at `rip + skip`, and how many bytes the code segment has
/// from there, but no more than are ever needed.
fn fetch_address<C: Cpu + ?Sized>(
    cpu: &C,
    mode: CpuMode,
    rip: u64,
    skip: usize,
) -> Result<(Gva, usize), Fault> {
    if mode == CpuMode::Long64 {
        let address = rip.wrapping_add(skip as u64);
        if !operand::is_canonical(address, cpu.linear_bits()) {
            return Err(Fault::GP0);
        }
        return Ok((Gva(address), MAX_LENGTH));
    }
    let cs = cpu.segment(SegmentRegister::Cs);
    let offset = (rip & 0xFFFF_FFFF) + skip as u64;
    let Some(left) = u64::from(cs.limit).checked_sub(offset) else {
        return Err(Fault::GP0);
    };
    let room = left.saturating_add(1).min(MAX_LENGTH as u64);
    let address = cs.base.wrapping_add(offset) & 0xFFFF_FFFF;
    Ok((Gva(address), room as usize))
}

#[cfg(test)]
mod tests;
#[cfg(test)]
mod whole_tests;
