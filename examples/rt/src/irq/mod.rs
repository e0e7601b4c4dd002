//! Interrupts and exceptions.

mod describe;

use core::sync::atomic::{AtomicUsize, Ordering};

use spin::Once;
use x86_64::VirtAddr;
use x86_64::instructions::interrupts;
use x86_64::instructions::tables::{DescriptorTablePointer, lidt};

use crate::{apic, exit, serial};

/// The vector of the local APIC's spurious interrupts, which nothing acknowledges.
pub(crate) const SPURIOUS: u8 = 0xff;

/// First vector that is not an exception.
const FIRST_INTERRUPT: u8 = 32;

/// The registers of the interrupted code; changing them changes where and how it goes on.
#[derive(Clone, Debug)]
#[repr(C)]
#[expect(missing_docs, reason = "registers under their own names")]
pub struct TrapFrame {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rbp: u64,
    pub rdi: u64,
    pub rsi: u64,
    pub rdx: u64,
    pub rcx: u64,
    pub rbx: u64,
    pub rax: u64,
    /// Which interrupt or exception.
    pub vector: u64,
    /// The exception's error code, or 0.
    pub error_code: u64,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
}

/// What runs when a vector arrives: with interrupts off, on an interrupt stack.
pub type Handler = fn(&mut TrapFrame);

static HANDLERS: [AtomicUsize; 256] = [const { AtomicUsize::new(0) }; 256];

/// Has `handler` run when `vector` arrives, on any processor.
///
/// From vector 32 on, the local APIC is told of the end of the interrupt after the handler. Below
/// are the exceptions: a handler that returns continues at the frame's RIP, and without one the
/// exception is printed and the program ends.
pub fn set_handler(vector: u8, handler: Handler) {
    HANDLERS[usize::from(vector)].store(handler as usize, Ordering::Release);
}

/// Forgets a vector's handler.
pub fn clear_handler(vector: u8) {
    HANDLERS[usize::from(vector)].store(0, Ordering::Release);
}

/// Lets interrupts arrive on this processor.
pub fn enable() {
    interrupts::enable();
}

/// Keeps interrupts out on this processor.
pub fn disable() {
    interrupts::disable();
}

/// Runs something without interrupts; the flag is afterwards what it was.
pub fn without<T>(work: impl FnOnce() -> T) -> T {
    interrupts::without_interrupts(work)
}

/// Halts until an interrupt has been handled; interrupts are off before and after.
pub fn wait() {
    interrupts::enable_and_hlt();
    interrupts::disable();
}

/// Where a fault at one address continues: an entry of the section `.rt_fixups`.
#[repr(C)]
struct Fixup {
    fault: u64,
    resume: u64,
}

unsafe extern "C" {
    static rt_fixups_start: Fixup;
    static rt_fixups_end: Fixup;
    static rt_vectors: u8;
}

/// Distance between the entry points that `entry.s` has for the vectors.
const ENTRY_SIZE: u64 = 16;

#[derive(Clone, Copy)]
#[repr(C)]
struct Gate {
    offset_low: u16,
    selector: u16,
    stack: u8,
    kind: u8,
    offset_middle: u16,
    offset_high: u32,
    reserved: u32,
}

static IDT: Once<[Gate; 256]> = Once::new();

/// Has this processor use the common interrupt table.
pub(crate) fn load() {
    use crate::cpu::Stack;
    let idt = IDT.call_once(|| {
        core::array::from_fn(|vector| {
            let entry = &raw const rt_vectors as u64 + vector as u64 * ENTRY_SIZE;
            let stack = match vector {
                2 => Stack::Nmi,
                8 => Stack::DoubleFault,
                18 => Stack::MachineCheck,
                0..32 => Stack::Exception,
                _ => Stack::Interrupt,
            };
            Gate {
                offset_low: entry as u16,
                selector: 8,
                stack: stack as u8 + 1,
                // Present, a 64-bit interrupt gate.
                kind: 0x8e,
                offset_middle: (entry >> 16) as u16,
                offset_high: (entry >> 32) as u32,
                reserved: 0,
            }
        })
    });
    let pointer = DescriptorTablePointer {
        limit: (size_of_val(idt) - 1) as u16,
        base: VirtAddr::from_ptr(idt),
    };
    // SAFETY: the table is complete and static, its entry points keep the interrupted state, and
    // selector 8 is the 64-bit code segment of every processor.
    unsafe { lidt(&pointer) };
}

/// The entry code calls this for every vector.
#[unsafe(no_mangle)]
extern "C" fn rt_interrupt(frame: &mut TrapFrame) {
    let vector = frame.vector as u8;
    let handler = HANDLERS[usize::from(vector)].load(Ordering::Acquire);
    if handler != 0 {
        // SAFETY: `set_handler` stored a function of this type.
        let handler: Handler = unsafe { core::mem::transmute(handler) };
        handler(frame);
    } else if vector < FIRST_INTERRUPT {
        match fixup(frame.rip) {
            Some(resume) => frame.rip = resume,
            None => last_words(frame),
        }
    }
    if vector >= FIRST_INTERRUPT && vector != SPURIOUS {
        apic::eoi();
    }
}

fn fixup(rip: u64) -> Option<u64> {
    // SAFETY: the linker script puts the section's entries, all of this shape, between the two.
    let fixups = unsafe {
        let start = &raw const rt_fixups_start;
        let end = &raw const rt_fixups_end;
        core::slice::from_raw_parts(start, end.offset_from_unsigned(start))
    };
    fixups
        .iter()
        .find(|fixup| fixup.fault == rip)
        .map(|fixup| fixup.resume)
}

fn last_words(frame: &TrapFrame) -> ! {
    serial::print_last_words(format_args!(
        "\n{}\n",
        describe::Exception::of_this_cpu(frame)
    ));
    exit(exit::EXCEPTION)
}
