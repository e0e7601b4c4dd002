//! Cases on the runtime itself.
#![allow(unsafe_code)]

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::arch::asm;
use core::hint::black_box;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use testudo_rt::irq::{self, TrapFrame};
use testudo_rt::{Boot, MemoryKind, acpi, apic, cpu, memory, msr, time, timer};

use crate::case::{Case, Outcome, check, check_eq};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "rt::memory_map",
        run: memory_map,
    },
    Case {
        name: "rt::reserve",
        run: reserve,
    },
    Case {
        name: "rt::heap",
        run: heap,
    },
    Case {
        name: "rt::memory_functions",
        run: memory_functions,
    },
    Case {
        name: "rt::floating_point",
        run: floating_point,
    },
    Case {
        name: "rt::exception_is_caught",
        run: exception_is_caught,
    },
    Case {
        name: "rt::page_fault_names_its_address",
        run: page_fault_names_its_address,
    },
    Case {
        name: "rt::code_is_not_writable",
        run: code_is_not_writable,
    },
    Case {
        name: "rt::data_is_not_executable",
        run: data_is_not_executable,
    },
    Case {
        name: "rt::refused_msr_is_reported",
        run: refused_msr_is_reported,
    },
    Case {
        name: "rt::acpi_tables",
        run: acpi_tables,
    },
    Case {
        name: "rt::clocks_agree",
        run: clocks_agree,
    },
    Case {
        name: "rt::timer_one_shot",
        run: timer_one_shot,
    },
    Case {
        name: "rt::timer_deadline",
        run: timer_deadline,
    },
    Case {
        name: "rt::timer_disarmed_stays_silent",
        run: timer_disarmed_stays_silent,
    },
    Case {
        name: "rt::interrupt_preserves_registers",
        run: interrupt_preserves_registers,
    },
    Case {
        name: "rt::long_mode_is_left_and_entered",
        run: long_mode_is_left_and_entered,
    },
    Case {
        name: "rt::processors_start",
        run: processors_start,
    },
    Case {
        name: "rt::interrupt_between_processors",
        run: interrupt_between_processors,
    },
];

const TIMER: u8 = 0x40;
const IPI: u8 = 0x41;
const IPI_REPLY: u8 = 0x42;

fn memory_map(boot: &'static Boot) -> Outcome {
    let here = memory_map as *const () as u64;
    let holds =
        |range: &&testudo_rt::MemoryRange| here >= range.start && here - range.start < range.len;
    let Some(own) = boot.memory_map().iter().find(holds) else {
        return Outcome::Failed("the map does not mention the program".into());
    };
    check_eq!(own.kind, MemoryKind::Usable);
    check!(
        memory::available() > 8 << 20,
        "only {} bytes are free",
        memory::available()
    );
    Outcome::Passed
}

fn reserve(_: &'static Boot) -> Outcome {
    const SIZE: u64 = 4 << 20;
    let before = memory::available();
    let Some(start) = memory::reserve_zeroed(SIZE, 2 << 20) else {
        return Outcome::Failed("4 MiB are not to be had".into());
    };
    check_eq!(start % (2 << 20), 0);
    check_eq!(before - memory::available(), SIZE);
    // SAFETY: the range was just handed out, and is mapped.
    let bytes = unsafe { core::slice::from_raw_parts_mut(start as *mut u64, SIZE as usize / 8) };
    check!(
        bytes.iter().all(|&word| word == 0),
        "reserved memory is not zero"
    );
    bytes.fill(u64::MAX);
    // SAFETY: `bytes` is not used any longer.
    unsafe { memory::release(start, SIZE) };
    check_eq!(memory::available(), before);
    check_eq!(memory::reserve(u64::MAX, 4096), None);
    check_eq!(memory::reserve(memory::largest(4096) + 4096, 4096), None);
    Outcome::Passed
}

fn heap(_: &'static Boot) -> Outcome {
    let mut blocks: Vec<Box<[u8]>> = Vec::new();
    for round in 0..200_usize {
        blocks.push(alloc::vec![round as u8; round * 97 + 1].into_boxed_slice());
        if round % 3 == 0 {
            blocks.swap_remove(round / 3 % blocks.len());
        }
    }
    let intact = |block: &[u8]| {
        block
            .iter()
            .all(|&byte| usize::from(byte) == (block.len() - 1) / 97)
    };
    check!(blocks.iter().all(|block| intact(block)), "a block changed");
    // Larger than what the heap takes at a time.
    let large = alloc::vec![7_u8; 9 << 20];
    check!(
        large.iter().all(|&byte| byte == 7),
        "the large block changed"
    );
    Outcome::Passed
}

fn memory_functions(_: &'static Boot) -> Outcome {
    for length in 0..70 {
        let mut bytes: Vec<u8> = (0..160).map(|byte| byte as u8).collect();
        let expected: Vec<u8> = bytes[3..3 + length].into();
        bytes.copy_within(3..3 + length, 9);
        check!(
            bytes[9..9 + length] == expected[..],
            "a copy upwards of {length} bytes"
        );
        check!(
            bytes[9 + length] == (9 + length) as u8,
            "a copy of {length} bytes wrote beyond"
        );
        let mut bytes: Vec<u8> = (0..160).map(|byte| byte as u8).collect();
        let expected: Vec<u8> = bytes[9..9 + length].into();
        bytes.copy_within(9..9 + length, 3);
        check!(
            bytes[3..3 + length] == expected[..],
            "a copy downwards of {length} bytes"
        );
        check!(
            bytes[2] == 2 && (length < 6 || bytes[3 + length] == (3 + length) as u8),
            "wrote beyond"
        );
        let mut other = expected.clone();
        check!(
            black_box(&other) == black_box(&expected),
            "equal bytes compare unequal"
        );
        if let Some(last) = other.last_mut() {
            *last = last.wrapping_add(1);
            check!(
                black_box(&other) > black_box(&expected),
                "the order of bytes at length {length}"
            );
            other[0] = 0;
            check!(
                length == 1 || black_box(&other) < black_box(&expected),
                "the first byte decides"
            );
        }
        other.fill(0x5a);
        check!(
            other.iter().all(|&byte| byte == 0x5a),
            "filling {length} bytes"
        );
    }
    Outcome::Passed
}

fn floating_point(_: &'static Boot) -> Outcome {
    let third = black_box(1.0_f64) / black_box(3.0);
    check_eq!(alloc::format!("{third:.6}"), "0.333333");
    let sum: f32 = (0..1000).map(|n| black_box(n as f32)).sum();
    check!(sum == 499_500.0, "the sum is {sum}");
    Outcome::Passed
}

static CAUGHT: AtomicU64 = AtomicU64::new(0);

fn exception_is_caught(_: &'static Boot) -> Outcome {
    fn skip_ud2(frame: &mut TrapFrame) {
        CAUGHT.store(frame.rip, Ordering::SeqCst);
        frame.rip += 2;
        frame.rax = 0x1234;
    }
    irq::set_handler(6, skip_ud2);
    let (at, rax): (u64, u64);
    // SAFETY: the handler steps over the instruction and changes RAX, as declared.
    unsafe { asm!("lea {at}, [rip + 2f]", "2: ud2", at = out(reg) at, out("rax") rax) };
    irq::clear_handler(6);
    check_eq!(CAUGHT.load(Ordering::SeqCst), at);
    check_eq!(rax, 0x1234);
    Outcome::Passed
}

fn page_fault_names_its_address(_: &'static Boot) -> Outcome {
    /// Canonical, and beyond all that is mapped.
    const NOWHERE: u64 = 0xffff_8000_0000_0000;
    fn note(frame: &mut TrapFrame) {
        let address: u64;
        // SAFETY: reading CR2 in its handler.
        unsafe { asm!("mov {}, cr2", out(reg) address) };
        CAUGHT.store(address | frame.error_code, Ordering::SeqCst);
        frame.rip = frame.rbx;
    }
    irq::set_handler(14, note);
    // SAFETY: the write faults, and the handler continues behind it. RBX is saved by hand, as the
    // compiler may not give it away.
    unsafe {
        asm!(
            "xchg rbx, {saved}",
            "lea rbx, [rip + 2f]",
            "mov byte ptr [{nowhere}], 1",
            "2: xchg rbx, {saved}",
            saved = inout(reg) 0_u64 => _,
            nowhere = in(reg) NOWHERE,
        );
    }
    irq::clear_handler(14);
    // The page is not present, and the access was a write.
    check_eq!(CAUGHT.load(Ordering::SeqCst), NOWHERE | 2);
    Outcome::Passed
}

/// Notes the fault's error code and continues where RBX says.
fn note_and_leave(frame: &mut TrapFrame) {
    CAUGHT.store(frame.error_code, Ordering::SeqCst);
    frame.rip = frame.rbx;
}

fn code_is_not_writable(_: &'static Boot) -> Outcome {
    CAUGHT.store(0, Ordering::SeqCst);
    irq::set_handler(14, note_and_leave);
    // SAFETY: the write faults, and the handler continues behind it; it would write what is there.
    unsafe {
        asm!(
            "xchg rbx, {saved}",
            "lea rbx, [rip + 2f]",
            "mov {byte}, [rbx]",
            "mov [rbx], {byte}",
            "2: xchg rbx, {saved}",
            saved = inout(reg) 0_u64 => _,
            byte = out(reg_byte) _,
        );
    }
    irq::clear_handler(14);
    // Present, a write.
    check_eq!(CAUGHT.load(Ordering::SeqCst), 0b11);
    Outcome::Passed
}

fn data_is_not_executable(_: &'static Boot) -> Outcome {
    if !cpu::features::has_nx() {
        return Outcome::Skipped("the processor has no no-execute bit");
    }
    let on_heap = Box::new(0xc3_u8);
    static IN_DATA: AtomicU64 = AtomicU64::new(0xc3);
    for address in [&raw const *on_heap as u64, IN_DATA.as_ptr() as u64] {
        CAUGHT.store(0, Ordering::SeqCst);
        irq::set_handler(14, note_and_leave);
        // SAFETY: the jump faults, and the handler continues behind it; else there is a RET, which returns there.
        unsafe {
            asm!(
                "xchg rbx, {saved}",
                "lea rbx, [rip + 2f]",
                "mov {stack}, rsp",
                "sub rsp, 256",
                "push rbx",
                "jmp {address}",
                "2: mov rsp, {stack}",
                "xchg rbx, {saved}",
                saved = inout(reg) 0_u64 => _,
                stack = out(reg) _,
                address = in(reg) address,
            );
        }
        irq::clear_handler(14);
        // Present, an instruction fetch.
        check_eq!(CAUGHT.load(Ordering::SeqCst), 0b1_0001);
    }
    Outcome::Passed
}

fn refused_msr_is_reported(_: &'static Boot) -> Outcome {
    // Emulators are lax, each in its own way: one of these is refused on every one of them. No processor
    // takes an unaligned VM_HSAVE_PA (AMD APM vol. 2, 15.30.4) or a non-canonical KERNEL_GS_BASE.
    const WRONG: [(u32, u64); 2] = [(0xc001_0117, 1), (0xc000_0102, 1 << 63)];
    let mut refused = false;
    for (register, value) in WRONG {
        // SAFETY: neither register is in use, and an accepted value is taken back at once.
        unsafe {
            if msr::try_write(register, value) {
                msr::write(register, 0);
            } else {
                refused = true;
            }
        }
    }
    check!(refused, "every wrong value is accepted");
    check!(
        msr::try_read(0x1b).is_some_and(|base| base & 1 << 8 != 0),
        "this is not the boot processor"
    );
    Outcome::Passed
}

fn acpi_tables(boot: &'static Boot) -> Outcome {
    let tables = acpi::Tables::of(boot);
    for signature in [b"APIC", b"FACP"] {
        check!(
            tables.table(signature).is_some(),
            "there is no {}",
            signature.escape_ascii()
        );
    }
    check!(tables.table(b"NONE").is_none());
    Outcome::Passed
}

fn clocks_agree(_: &'static Boot) -> Outcome {
    let (tsc, apic) = (time::tsc_hz(), time::apic_hz());
    check!(
        (10_000_000..10_000_000_000).contains(&tsc),
        "the TSC runs at {tsc} Hz"
    );
    check!(
        (1_000_000..10_000_000_000).contains(&apic),
        "the APIC timer runs at {apic} Hz"
    );
    let start = time::now_ns();
    time::delay_ns(3_000_000);
    let took = time::now_ns() - start;
    check!(
        (3_000_000..300_000_000).contains(&took),
        "a delay of 3 ms took {took} ns"
    );
    check_eq!(time::ns_to_tsc(1_000_000_000), tsc);
    Outcome::Passed
}

static TICKS: AtomicUsize = AtomicUsize::new(0);
static TICK_TSC: AtomicU64 = AtomicU64::new(0);

fn tick(_: &mut TrapFrame) {
    TICK_TSC.store(time::tsc(), Ordering::SeqCst);
    TICKS.fetch_add(1, Ordering::SeqCst);
}

fn timer_tick(frame: &mut TrapFrame) {
    if timer::is_due() {
        tick(frame);
    }
}

/// Arms the timer three times and says how it came: never early, and not after half a second.
fn timer_arrives() -> Outcome {
    const DELAY_NS: u64 = 5_000_000;
    irq::set_handler(TIMER, timer_tick);
    for round in 1..=3 {
        TICKS.store(0, Ordering::SeqCst);
        let start = time::now_ns();
        timer::arm(time::tsc_at(start + DELAY_NS));
        if round == 3 {
            // A counter that runs too fast: what it raises before the time does not count, and is
            // not the last.
            apic::send_ipi(cpu::current_id(), TIMER);
        }
        while TICKS.load(Ordering::SeqCst) == 0 {
            irq::wait();
        }
        let took = time::tsc_to_ns(TICK_TSC.load(Ordering::SeqCst)) - start;
        check!(took >= DELAY_NS, "round {round}: early, after {took} ns");
        check!(took < 500_000_000, "round {round}: late, after {took} ns");
        check_eq!(TICKS.load(Ordering::SeqCst), 1);
    }
    Outcome::Passed
}

fn timer_one_shot(_: &'static Boot) -> Outcome {
    timer::start_one_shot(TIMER);
    timer_arrives()
}

fn timer_deadline(_: &'static Boot) -> Outcome {
    if !cpu::features::has_tsc_deadline() {
        return Outcome::Skipped("the processor has no TSC-deadline mode");
    }
    timer::start(TIMER);
    check!(timer::uses_deadline());
    timer_arrives()
}

fn timer_disarmed_stays_silent(_: &'static Boot) -> Outcome {
    timer::start(TIMER);
    irq::set_handler(TIMER, timer_tick);
    TICKS.store(0, Ordering::SeqCst);
    timer::arm(time::tsc() + time::ns_to_tsc(20_000_000));
    timer::disarm();
    irq::enable();
    time::delay_ns(30_000_000);
    irq::disable();
    check_eq!(TICKS.load(Ordering::SeqCst), 0);
    Outcome::Passed
}

fn interrupt_preserves_registers(_: &'static Boot) -> Outcome {
    fn clobber(_: &mut TrapFrame) {
        // SAFETY: the registers are declared as overwritten.
        unsafe {
            asm!("pcmpeqd xmm0, xmm0", "pcmpeqd xmm15, xmm15", "mov r10, -1", out("xmm0") _, out("xmm15") _, out("r10") _);
        }
    }
    irq::set_handler(0x50, clobber);
    let (xmm0, xmm15, r10, red_zone): (u64, u64, u64, u64);
    // SAFETY: the handler returns, and the word below the stack pointer is put there for the test alone.
    unsafe {
        asm!(
            "mov {scratch}, 0x1122334455667788",
            "movq xmm0, {scratch}",
            "movq xmm15, {scratch}",
            "mov r10, {scratch}",
            "sub rsp, 256",
            "mov [rsp - 8], {scratch}",
            "int 0x50",
            "mov {red_zone}, [rsp - 8]",
            "add rsp, 256",
            "movq {xmm0}, xmm0",
            "movq {xmm15}, xmm15",
            scratch = out(reg) _,
            red_zone = out(reg) red_zone,
            xmm0 = out(reg) xmm0,
            xmm15 = out(reg) xmm15,
            out("r10") r10,
            out("xmm0") _,
            out("xmm15") _,
        );
    }
    irq::clear_handler(0x50);
    for value in [xmm0, xmm15, r10, red_zone] {
        check_eq!(value, 0x1122_3344_5566_7788);
    }
    Outcome::Passed
}

static SEEN: [AtomicUsize; cpu::MAX] = [const { AtomicUsize::new(usize::MAX) }; cpu::MAX];
static STOP: AtomicUsize = AtomicUsize::new(0);

/// What the other processors do: say who they are, and handle interrupts.
fn serve(id: usize) {
    SEEN[id].store(cpu::current_id(), Ordering::SeqCst);
    while STOP.load(Ordering::SeqCst) == 0 {
        irq::wait();
    }
}

fn processors_start(_: &'static Boot) -> Outcome {
    irq::set_handler(IPI, answer);
    irq::set_handler(IPI_REPLY, tick);
    if let Err(missing) = cpu::start_all(serve) {
        return Outcome::Failed(alloc::format!("{missing}"));
    }
    let deadline = time::now_ns() + 2_000_000_000;
    for (id, seen) in SEEN.iter().enumerate().take(cpu::count()).skip(1) {
        while seen.load(Ordering::SeqCst) != id {
            check!(time::now_ns() < deadline, "processor {id} does not say so");
            core::hint::spin_loop();
        }
    }
    check_eq!(cpu::current_id(), 0);
    check_eq!(apic::id(), cpu::apic_id(0));
    Outcome::Passed
}

/// Turns paging off, then PAE, with EFER.LME still set; executes CPUID, which is an exit in a guest;
/// and comes back. On QEMU that exit takes the host's paging away, unless the hypervisor keeps
/// LME from the processor meanwhile.
fn long_mode_is_left_and_entered(_: &'static Boot) -> Outcome {
    #[repr(C, packed)]
    struct Pointer {
        limit: u16,
        base: u64,
    }
    // The 64-bit code and the data segment are where the runtime's are; the third is 32-bit code.
    static TABLE: [u64; 4] = [
        0,
        0x00AF_9B00_0000_FFFF,
        0x00CF_9300_0000_FFFF,
        0x00CF_9B00_0000_FFFF,
    ];
    let own = Pointer {
        limit: (size_of_val(&TABLE) - 1) as u16,
        base: TABLE.as_ptr() as u64,
    };
    let mut before = Pointer { limit: 0, base: 0 };
    let entered: u32;
    // SAFETY: interrupts are off, and the code, which lies below 4 GiB and is mapped where it is,
    // touches no memory while paging is off. Registers lose their upper halves on the way, so
    // those that the compiler keeps are on the stack; CR0, CR4 and GDTR are restored.
    unsafe {
        asm!(
            "push rbx", "push rbp", "push r12", "push r13", "push r14", "push r15",
            "push rcx",
            "sgdt [rcx]",
            "lgdt [rdx]",
            "mov rsi, cr4",
            "mov rdi, cr0",
            "push 0x18",
            "lea rax, [rip + 2f]",
            "push rax",
            "retfq",
            ".code32",
            "2:",
            "mov eax, edi",
            "btr eax, 31",
            "mov cr0, eax",
            "mov eax, esi",
            "btr eax, 5",
            "mov cr4, eax",
            "xor eax, eax",
            "cpuid",
            "mov ebp, eax",
            "mov eax, esi",
            "mov cr4, eax",
            "mov eax, edi",
            "mov cr0, eax",
            // A far jump to the 64-bit segment.
            ".byte 0xEA",
            ".long 3f",
            ".word 8",
            ".code64",
            "3:",
            "mov esp, esp",
            "pop rcx",
            "lgdt [rcx]",
            "mov eax, ebp",
            "pop r15", "pop r14", "pop r13", "pop r12", "pop rbp", "pop rbx",
            inout("rcx") &raw mut before => _,
            inout("rdx") &raw const own => _,
            lateout("eax") entered,
            out("rsi") _, out("rdi") _,
            clobber_abi("sysv64"),
        );
    }
    check_eq!(entered, core::arch::x86_64::__cpuid(0).eax);
    Outcome::Passed
}

static ASKED: AtomicUsize = AtomicUsize::new(0);

fn answer(_: &mut TrapFrame) {
    // Nobody waits for the last answer: it would stay pending.
    if STOP.load(Ordering::SeqCst) == 0 {
        ASKED.store(cpu::current_id(), Ordering::SeqCst);
        apic::send_ipi(0, IPI_REPLY);
    }
}

fn interrupt_between_processors(_: &'static Boot) -> Outcome {
    if cpu::count() < 2 {
        return Outcome::Skipped("there is one processor");
    }
    for id in 1..cpu::count() {
        for _ in 0..10 {
            TICKS.store(0, Ordering::SeqCst);
            apic::send_ipi(id, IPI);
            while TICKS.load(Ordering::SeqCst) == 0 {
                irq::wait();
            }
            check_eq!(ASKED.load(Ordering::SeqCst), id);
        }
    }
    STOP.store(1, Ordering::SeqCst);
    for id in 1..cpu::count() {
        apic::send_ipi(id, IPI);
    }
    let deadline = time::now_ns() + 2_000_000_000;
    while cpu::finished() < cpu::count() - 1 {
        check!(
            time::now_ns() < deadline,
            "{} of the others have finished",
            cpu::finished()
        );
        core::hint::spin_loop();
    }
    Outcome::Passed
}
