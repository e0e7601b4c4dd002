use super::*;
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::vec;
use std::vec::Vec;
use testudo_arch::segment::SegmentAttributes;

const CODE: u64 = 0x1000;
/// Linear memory of the test CPU: 64 KiB, then nothing.
const MEMORY: usize = 0x1_0000;

/// A processor over flat memory, some of whose pages are missing or read-only.
struct TestCpu {
    gprs: Gprs,
    rip: u64,
    rflags: u64,
    mode: CpuMode,
    segments: [Segment; 6],
    memory: Vec<u8>,
    missing: BTreeSet<u64>,
    read_only: BTreeSet<u64>,
    reads: Vec<(u64, usize)>,
    writes: Vec<(u64, Vec<u8>)>,
    ports: Vec<(u16, Vec<u8>)>,
    xmm: [u128; 16],
    cpl: u8,
    controls: [u64; 9],
    invalidated: Vec<Gva>,
    native_repeats: bool,
    /// How many times another processor is faster in a locked exchange.
    races: u32,
}

impl TestCpu {
    fn new(mode: CpuMode, code: &[u8]) -> Self {
        let data = Segment::flat(0x10, SegmentAttributes::DATA);
        let mut cpu = Self {
            gprs: Gprs::default(),
            rip: CODE,
            rflags: 2,
            mode,
            segments: [data; 6],
            memory: vec![0; MEMORY],
            missing: BTreeSet::new(),
            read_only: BTreeSet::new(),
            reads: Vec::new(),
            writes: Vec::new(),
            ports: Vec::new(),
            xmm: [0; 16],
            cpl: 0,
            controls: [0; 9],
            invalidated: Vec::new(),
            native_repeats: false,
            races: 0,
        };
        cpu.segments[1] = Segment::flat(8, SegmentAttributes::CODE32);
        cpu.memory[CODE as usize..CODE as usize + code.len()].copy_from_slice(code);
        cpu
    }

    fn long(code: &[u8]) -> Self {
        Self::new(CpuMode::Long64, code)
    }

    fn check(&self, address: Gva, len: usize, write: bool) -> Result<usize, Fault> {
        for at in [address.0, address.0.wrapping_add(len as u64 - 1)] {
            let page = at >> 12;
            let code = if write { 2 } else { 0 };
            if at >= MEMORY as u64 || self.missing.contains(&page) {
                return Err(Fault::page(Gva(at), code));
            }
            if write && self.read_only.contains(&page) {
                return Err(Fault::page(Gva(at), code | 1));
            }
        }
        Ok(address.0 as usize)
    }

    fn put(&mut self, address: u64, value: u64) {
        self.memory[address as usize..address as usize + 8].copy_from_slice(&value.to_le_bytes());
    }

    fn get(&self, address: u64, size: usize) -> u64 {
        let mut bytes = [0; 8];
        bytes[..size].copy_from_slice(&self.memory[address as usize..address as usize + size]);
        u64::from_le_bytes(bytes)
    }

    fn done(&mut self) -> &mut Self {
        let length = length(&self.memory[CODE as usize..CODE as usize + 15], self.mode).unwrap();
        assert_eq!(step(self), Ok(Outcome::Done));
        assert_eq!(self.rip, CODE + u64::from(length));
        self
    }

    fn faults(&mut self, fault: Fault) {
        let before = (self.gprs, self.rip, self.rflags, self.memory.clone());
        assert_eq!(step(self), Err(EmulateError::Fault(fault)));
        assert_eq!(
            before,
            (self.gprs, self.rip, self.rflags, self.memory.clone())
        );
        assert!(self.writes.is_empty() && self.ports.is_empty());
    }
}

impl Cpu for TestCpu {
    fn gprs(&self) -> &Gprs {
        &self.gprs
    }
    fn gprs_mut(&mut self) -> &mut Gprs {
        &mut self.gprs
    }
    fn rip(&self) -> u64 {
        self.rip
    }
    fn set_rip(&mut self, rip: u64) {
        self.rip = rip;
    }
    fn rflags(&self) -> u64 {
        self.rflags
    }
    fn set_rflags(&mut self, rflags: u64) {
        self.rflags = rflags;
    }
    fn mode(&self) -> CpuMode {
        self.mode
    }
    fn segment(&self, register: SegmentRegister) -> Segment {
        self.segments[register as usize]
    }
    fn cpl(&self) -> u8 {
        self.cpl
    }
    fn control_register(&self, number: u8) -> Option<u64> {
        self.controls.get(usize::from(number)).copied()
    }
    fn set_control_register(&mut self, number: u8, value: u64) -> Result<(), Fault> {
        if value >> 63 != 0 {
            return Err(Fault::GP0);
        }
        self.controls[usize::from(number)] = value;
        Ok(())
    }
    fn invalidate_page(&mut self, address: Gva) -> Result<(), Fault> {
        self.invalidated.push(address);
        Ok(())
    }
    fn repeats_natively(&self) -> bool {
        self.native_repeats
    }
    fn fetch(&mut self, address: Gva, code: &mut [u8]) -> Result<usize, Fault> {
        let from = self
            .check(address, 1, false)
            .map_err(|_| Fault::page(address, 0x10))?;
        let room = code.len().min(4096 - from % 4096);
        code[..room].copy_from_slice(&self.memory[from..from + room]);
        Ok(room)
    }
    fn read(&mut self, address: Gva, data: &mut [u8], intent: Intent) -> Result<(), Fault> {
        let from = self.check(address, data.len(), intent == Intent::Modify)?;
        data.copy_from_slice(&self.memory[from..from + data.len()]);
        self.reads.push((address.0, data.len()));
        Ok(())
    }
    fn write(&mut self, address: Gva, data: &[u8]) -> Result<(), Fault> {
        let to = self.check(address, data.len(), true)?;
        self.memory[to..to + data.len()].copy_from_slice(data);
        self.writes.push((address.0, data.to_vec()));
        Ok(())
    }
    fn probe_write(&mut self, address: Gva, len: usize) -> Result<(), Fault> {
        self.check(address, len, true).map(|_| ())
    }
    fn compare_exchange(
        &mut self,
        address: Gva,
        current: &[u8],
        new: &[u8],
    ) -> Result<bool, Fault> {
        let at = self.check(address, new.len(), true)?;
        if self.races > 0 {
            self.races -= 1;
            self.memory[at] = self.memory[at].wrapping_add(1);
        }
        if self.memory[at..at + new.len()] != *current {
            return Ok(false);
        }
        self.write(address, new).map(|()| true)
    }
    fn port_in(&mut self, port: u16, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = (port as u8).wrapping_add(index as u8);
        }
        self.ports.push((port, Vec::new()));
    }
    fn port_out(&mut self, port: u16, data: &[u8]) {
        self.ports.push((port, data.to_vec()));
    }
    fn xmm(&self, number: u8) -> Option<u128> {
        Some(self.xmm[usize::from(number)])
    }
    fn set_xmm(&mut self, number: u8, value: u128) {
        self.xmm[usize::from(number)] = value;
    }
}

/// The processor's own arithmetic, for comparison.
#[allow(unsafe_code)]
mod native {
    use core::arch::asm;

    /// Executes `op a, b` after setting CF, and gives the new `a` and the status flags.
    macro_rules! two_operands {
        ($name:ident, $op:literal) => {
            pub(super) fn $name(a: u64, b: u64, carry: bool, size: usize) -> (u64, u64) {
                macro_rules! run {
                                            ($class:ident, $operands:literal, $int:ty) => {{
                                                let mut value = a as $int;
                                                let flags: u64;
                                                // SAFETY: changes the two given registers and the flags only; the stack is
                                                // balanced.
                                                unsafe {
                                                    asm!(
                                                        "bt {carry:e}, 0",
                                                        concat!($op, " ", $operands),
                                                        "pushfq",
                                                        "pop {flags}",
                                                        carry = in(reg) u32::from(carry),
                                                        a = inout($class) value,
                                                        b = in($class) b as $int,
                                                        flags = out(reg) flags,
                                                    );
                                                }
                                                (u64::from(value), flags)
                                            }};
                                        }
                match size {
                    1 => run!(reg_byte, "{a}, {b}", u8),
                    2 => run!(reg, "{a:x}, {b:x}", u16),
                    4 => run!(reg, "{a:e}, {b:e}", u32),
                    _ => run!(reg, "{a}, {b}", u64),
                }
            }
        };
    }

    two_operands!(add, "add");
    two_operands!(or, "or");
    two_operands!(adc, "adc");
    two_operands!(sbb, "sbb");
    two_operands!(and, "and");
    two_operands!(sub, "sub");
    two_operands!(xor, "xor");
    two_operands!(cmp, "cmp");

    macro_rules! one_operand {
        ($name:ident, $op:literal) => {
            pub(super) fn $name(a: u64, carry: bool, size: usize) -> (u64, u64) {
                macro_rules! run {
                                            ($class:ident, $operand:literal, $int:ty) => {{
                                                let mut value = a as $int;
                                                let flags: u64;
                                                // SAFETY: as above.
                                                unsafe {
                                                    asm!(
                                                        "bt {carry:e}, 0",
                                                        concat!($op, " ", $operand),
                                                        "pushfq",
                                                        "pop {flags}",
                                                        carry = in(reg) u32::from(carry),
                                                        a = inout($class) value,
                                                        flags = out(reg) flags,
                                                    );
                                                }
                                                (u64::from(value), flags)
                                            }};
                                        }
                match size {
                    1 => run!(reg_byte, "{a}", u8),
                    2 => run!(reg, "{a:x}", u16),
                    4 => run!(reg, "{a:e}", u32),
                    _ => run!(reg, "{a}", u64),
                }
            }
        };
    }

    one_operand!(inc, "inc");
    one_operand!(dec, "dec");
    one_operand!(neg, "neg");

    macro_rules! shift {
        ($name:ident, $op:literal) => {
            pub(super) fn $name(a: u64, count: u8, carry: bool, size: usize) -> (u64, u64) {
                macro_rules! run {
                                            ($class:ident, $operand:literal, $int:ty) => {{
                                                let mut value = a as $int;
                                                let flags: u64;
                                                // SAFETY: as above.
                                                unsafe {
                                                    asm!(
                                                        "bt {carry:e}, 0",
                                                        concat!($op, " ", $operand, ", cl"),
                                                        "pushfq",
                                                        "pop {flags}",
                                                        carry = in(reg) u32::from(carry),
                                                        a = inout($class) value,
                                                        in("cl") count,
                                                        flags = out(reg) flags,
                                                    );
                                                }
                                                (u64::from(value), flags)
                                            }};
                                        }
                match size {
                    1 => run!(reg_byte, "{a}", u8),
                    2 => run!(reg, "{a:x}", u16),
                    4 => run!(reg, "{a:e}", u32),
                    _ => run!(reg, "{a}", u64),
                }
            }
        };
    }

    shift!(rol, "rol");
    shift!(ror, "ror");
    shift!(rcl, "rcl");
    shift!(rcr, "rcr");
    shift!(shl, "shl");
    shift!(shr, "shr");
    shift!(sar, "sar");
}

/// `opcode /digit` on `[rdi]`, with the prefixes of an operand size; the low opcode bit chooses
/// between bytes and the rest.
fn on_memory(opcode: u8, digit: u8, size: usize) -> Vec<u8> {
    let mut code = Vec::new();
    match size {
        2 => code.push(0x66),
        8 => code.push(0x48),
        _ => {}
    }
    code.push(opcode | u8::from(size != 1));
    code.push(digit << 3 | 7);
    code
}

fn sizes() -> impl Strategy<Value = usize> {
    prop::sample::select(vec![1usize, 2, 4, 8])
}

/// Numbers near the edges of every size, and any others.
fn numbers() -> impl Strategy<Value = u64> {
    let edges = [0u64, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF]
        .into_iter()
        .chain([0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF])
        .chain([1 << 63, (1 << 63) - 1, u64::MAX]);
    prop_oneof![
        any::<u64>(),
        prop::sample::select(edges.collect::<Vec<_>>())
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn two_operand_arithmetic_agrees_with_the_processor(
        operation in 0usize..8, a in numbers(), b in numbers(), carry: bool, size in sizes()
    ) {
        type Native = fn(u64, u64, bool, usize) -> (u64, u64);
        const NATIVE: [Native; 8] = [
            native::add, native::or, native::adc, native::sbb,
            native::and, native::sub, native::xor, native::cmp,
        ];
        let mut cpu = TestCpu::long(&on_memory((operation as u8) << 3, 0, size));
        cpu.gprs.rdi = 0x2000;
        cpu.gprs.rax = b;
        cpu.put(0x2000, a);
        cpu.rflags |= u64::from(carry);
        cpu.done();
        let (result, flags) = NATIVE[operation](a, b, carry, size);
        prop_assert_eq!(cpu.get(0x2000, size), result);
        // AF is undefined after the logical ones.
        let logical = matches!(operation, 1 | 4 | 6);
        let defined = alu::STATUS & !if logical { alu::AF } else { 0 };
        prop_assert_eq!(cpu.rflags & defined, flags & defined);
        prop_assert_eq!(cpu.writes.len(), usize::from(operation != 7));
    }

    #[test]
    fn one_operand_arithmetic_agrees_with_the_processor(
        operation in 0usize..3, a in numbers(), carry: bool, size in sizes()
    ) {
        type Native = fn(u64, bool, usize) -> (u64, u64);
        const NATIVE: [(Native, u8, u8); 3] =
            [(native::inc, 0xFE, 0), (native::dec, 0xFE, 1), (native::neg, 0xF6, 3)];
        let (native, opcode, digit) = NATIVE[operation];
        let mut cpu = TestCpu::long(&on_memory(opcode, digit, size));
        cpu.gprs.rdi = 0x2000;
        cpu.put(0x2000, a);
        cpu.rflags |= u64::from(carry);
        cpu.done();
        let (result, flags) = native(a, carry, size);
        prop_assert_eq!(cpu.get(0x2000, size), result);
        prop_assert_eq!(cpu.rflags & alu::STATUS, flags & alu::STATUS);
    }

    #[test]
    fn shifts_agree_with_the_processor(
        operation in 0usize..7, a in numbers(), count: u8, carry: bool, size in sizes()
    ) {
        type Native = fn(u64, u8, bool, usize) -> (u64, u64);
        const NATIVE: [(Native, u8); 7] = [
            (native::rol, 0), (native::ror, 1), (native::rcl, 2), (native::rcr, 3),
            (native::shl, 4), (native::shr, 5), (native::sar, 7),
        ];
        let (native, digit) = NATIVE[operation];
        let mut cpu = TestCpu::long(&on_memory(0xD2, digit, size));
        cpu.gprs.rdi = 0x2000;
        cpu.gprs.rcx = u64::from(count);
        cpu.put(0x2000, a);
        cpu.rflags |= u64::from(carry);
        cpu.done();
        let (result, flags) = native(a, count, carry, size);
        prop_assert_eq!(cpu.get(0x2000, size), result);
        let count = u32::from(count) & if size == 8 { 63 } else { 31 };
        // OF is defined for single-bit shifts only, CF for no more bits than there are; a shift by
        // zero changes nothing.
        if count == 0 {
            prop_assert_eq!(cpu.rflags, 2 | u64::from(carry));
        } else {
            let mut defined = alu::CF;
            if operation >= 4 {
                defined |= alu::ZF | alu::SF | alu::PF;
            }
            if count == 1 {
                defined |= alu::OF;
            }
            if operation >= 4 && count >= size as u32 * 8 {
                defined &= !alu::CF;
            }
            prop_assert_eq!(cpu.rflags & defined, flags & defined);
        }
    }

    #[test]
    fn random_code_neither_panics_nor_hangs(
        code in prop::collection::vec(any::<u8>(), 15),
        mode in 0usize..7,
        registers: [u64; 16],
        small: bool,
        rflags: u64,
    ) {
        const MODES: [CpuMode; 7] = [
            CpuMode::Real, CpuMode::Virtual8086, CpuMode::Protected16, CpuMode::Protected32,
            CpuMode::Compatibility16, CpuMode::Compatibility32, CpuMode::Long64,
        ];
        let mut cpu = TestCpu::new(MODES[mode], &code);
        for (gpr, value) in testudo_arch::Gpr::ALL.into_iter().zip(registers) {
            cpu.gprs[gpr] = if small { value % MEMORY as u64 } else { value };
        }
        cpu.rflags = rflags;
        let before = (cpu.gprs, cpu.rip, cpu.rflags);
        match step(&mut cpu) {
            Ok(_) => {}
            Err(_) if cpu.writes.is_empty() && cpu.ports.is_empty() => {
                // Finished iterations of loads and comparisons stay, everything else is undone.
                if cpu.reads.is_empty() {
                    prop_assert_eq!(before, (cpu.gprs, cpu.rip, cpu.rflags));
                }
            }
            Err(_) => prop_assert_eq!(before.1, cpu.rip),
        }
        prop_assert!(cpu.writes.len() <= MAX_ITERATIONS as usize);
    }

    #[test]
    fn the_fast_lengths_are_the_decoder_s(
        code in prop::collection::vec(any::<u8>(), 0..4), tail: [u8; 12], long: bool
    ) {
        let mode = if long { CpuMode::Long64 } else { CpuMode::Protected32 };
        let mut bytes = code;
        bytes.extend_from_slice(&tail);
        let decoded = length::decode(&bytes, mode);
        // SWAPGS is the only one of the recognized that another mode does not define.
        if bytes[..3] != [0x0F, 0x01, 0xF8] {
            prop_assert_eq!(length(&bytes, mode), decoded);
        }
    }
}

#[test]
fn every_fast_length_is_the_decoder_s() {
    for first in 0..=255u8 {
        for second in 0..=255u8 {
            for third in [
                0, 0xC0, 0xC1, 0xC2, 0xC8, 0xD0, 0xD1, 0xD8, 0xD9, 0xDA, 0xDE, 0xDF, 0xF9,
            ] {
                let code = [first, second, third, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
                for mode in [CpuMode::Real, CpuMode::Protected32, CpuMode::Long64] {
                    let decoded = length::decode(&code, mode);
                    assert_eq!(length(&code, mode), decoded, "{code:02x?} {mode:?}");
                }
            }
        }
    }
}

#[test]
fn moves_of_every_width_keep_or_clear_the_rest_of_a_register() {
    // mov al/ah/ax/eax/rax, [rdi]
    let cases: [(&[u8], u64); 5] = [
        (&[0x8A, 0x07], 0x1111_1111_1111_1188),
        (&[0x8A, 0x27], 0x1111_1111_1111_8811),
        (&[0x66, 0x8B, 0x07], 0x1111_1111_1111_7788),
        (&[0x8B, 0x07], 0x5566_7788),
        (&[0x48, 0x8B, 0x07], 0x1122_3344_5566_7788),
    ];
    for (code, expected) in cases {
        let mut cpu = TestCpu::long(code);
        cpu.gprs.rdi = 0x2000;
        cpu.gprs.rax = 0x1111_1111_1111_1111;
        cpu.put(0x2000, 0x1122_3344_5566_7788);
        assert_eq!(cpu.done().gprs.rax, expected, "{code:02x?}");
    }
    // mov [rdi], ah; mov dword [rdi], -2; mov qword [rdi], -2; movnti [rdi], eax; mov [rdi], ds
    let cases: [(&[u8], u64); 5] = [
        (&[0x88, 0x27], 0xFFFF_FFFF_FFFF_FF22),
        (&[0xC7, 0x07, 0xFE, 0xFF, 0xFF, 0xFF], 0xFFFF_FFFF_FFFF_FFFE),
        (&[0x48, 0xC7, 0x07, 0xFE, 0xFF, 0xFF, 0xFF], u64::MAX - 1),
        (&[0x0F, 0xC3, 0x07], 0xFFFF_FFFF_0000_2211),
        (&[0x8C, 0x1F], 0xFFFF_FFFF_FFFF_0010),
    ];
    for (code, expected) in cases {
        let mut cpu = TestCpu::long(code);
        cpu.gprs.rdi = 0x2000;
        cpu.gprs.rax = 0x2211;
        cpu.put(0x2000, u64::MAX);
        assert_eq!(cpu.done().get(0x2000, 8), expected, "{code:02x?}");
        assert!(cpu.reads.is_empty(), "a store does not read");
    }
}

#[test]
fn extending_and_swapping_loads() {
    // movzx eax, byte; movsx eax, byte; movsx rax, word; movsxd rax, dword; movbe eax; movbe ax
    let cases: [(&[u8], u64); 6] = [
        (&[0x0F, 0xB6, 0x07], 0x83),
        (&[0x0F, 0xBE, 0x07], 0xFFFF_FF83),
        (&[0x48, 0x0F, 0xBF, 0x07], 0xFFFF_FFFF_FFFF_8283),
        (&[0x48, 0x63, 0x07], 0xFFFF_FFFF_8081_8283),
        (&[0x0F, 0x38, 0xF0, 0x07], 0x8382_8180),
        (&[0x66, 0x0F, 0x38, 0xF0, 0x07], 0x5555_5555_5555_8382),
    ];
    for (code, expected) in cases {
        let mut cpu = TestCpu::long(code);
        cpu.gprs.rdi = 0x2000;
        cpu.gprs.rax = 0x5555_5555_5555_5555;
        cpu.put(0x2000, 0x8081_8283);
        assert_eq!(cpu.done().gprs.rax, expected, "{code:02x?}");
    }
}

#[test]
fn addresses_are_formed_in_every_way() {
    // mov eax, [rip + 0x10]: relative to the next instruction.
    let mut cpu = TestCpu::long(&[0x8B, 0x05, 0x10, 0, 0, 0]);
    assert_eq!(cpu.done().reads, [(CODE + 6 + 0x10, 4)]);
    // mov eax, [rbx + r9 * 8 - 0x20]
    let mut cpu = TestCpu::long(&[0x42, 0x8B, 0x44, 0xCB, 0xE0]);
    (cpu.gprs.rbx, cpu.gprs.r9) = (0x3000, 5);
    assert_eq!(cpu.done().reads, [(0x3008, 4)]);
    // mov eax, [edi]: the address has 32 bits.
    let mut cpu = TestCpu::long(&[0x67, 0x8B, 0x07]);
    cpu.gprs.rdi = 0xFFFF_FFFF_0000_2000;
    assert_eq!(cpu.done().reads, [(0x2000, 4)]);
    // mov eax, gs:[0x20]
    let mut cpu = TestCpu::long(&[0x65, 0x8B, 0x04, 0x25, 0x20, 0, 0, 0]);
    cpu.segments[5].base = 0x4000;
    assert_eq!(cpu.done().reads, [(0x4020, 4)]);
    // mov al, [0x3456], the form with an absolute address, in 64 and in 16 bits.
    let mut cpu = TestCpu::long(&[0xA0, 0x56, 0x34, 0, 0, 0, 0, 0, 0]);
    assert_eq!(cpu.done().reads, [(0x3456, 1)]);
    let mut cpu = TestCpu::new(CpuMode::Real, &[0xA0, 0x56, 0x34]);
    cpu.segments[3] = Segment::real_mode(0x100, SegmentAttributes::DATA16);
    assert_eq!(cpu.done().reads, [(0x4456, 1)]);
    // mov ax, [bp + si + 2] uses SS and 16 bits.
    let mut cpu = TestCpu::new(CpuMode::Real, &[0x8B, 0x42, 0x02]);
    cpu.segments[2] = Segment::real_mode(0x200, SegmentAttributes::DATA16);
    (cpu.gprs.rbp, cpu.gprs.rsi) = (0xFFF0, 0x20);
    assert_eq!(cpu.done().reads, [(0x2012, 2)]);
}

#[test]
fn segmentation_faults_before_anything_is_read() {
    let mut cpu = TestCpu::long(&[0x8B, 0x07]);
    cpu.gprs.rdi = 1 << 47;
    cpu.faults(Fault::GP0);
    // The last byte counts too: mov rax, [rdi].
    let mut cpu = TestCpu::long(&[0x48, 0x8B, 0x07]);
    cpu.gprs.rdi = (1 << 47) - 7;
    cpu.faults(Fault::GP0);
    // [rbp] is in the stack segment.
    let mut cpu = TestCpu::long(&[0x8B, 0x45, 0]);
    cpu.gprs.rbp = 1 << 63;
    cpu.faults(Fault::SS0);

    let load = [0x8B, 0x07];
    let store = [0x89, 0x07];
    let mut cpu = TestCpu::new(CpuMode::Protected32, &load);
    cpu.segments[3].limit = 0x2003;
    cpu.gprs.rdi = 0x2000;
    cpu.done();
    let mut cpu = TestCpu::new(CpuMode::Protected32, &load);
    cpu.segments[3].limit = 0x2002;
    cpu.gprs.rdi = 0x2000;
    cpu.faults(Fault::GP0);
    // Expand-down: valid above the limit only.
    for (offset, valid) in [(0x2000, false), (0x2001, true)] {
        let mut cpu = TestCpu::new(CpuMode::Protected32, &load);
        cpu.segments[3].attributes |= SegmentAttributes::CONFORMING;
        cpu.segments[3].limit = 0x2000;
        cpu.gprs.rdi = offset;
        if valid {
            cpu.done();
        } else {
            cpu.faults(Fault::GP0);
        }
    }
    // No writes to read-only data or to code, no access to an absent segment.
    for (attributes, code, valid) in [
        (
            SegmentAttributes::DATA - SegmentAttributes::WRITABLE,
            load,
            true,
        ),
        (
            SegmentAttributes::DATA - SegmentAttributes::WRITABLE,
            store,
            false,
        ),
        (SegmentAttributes::CODE32, load, true),
        (SegmentAttributes::CODE32, store, false),
        (
            SegmentAttributes::CODE32 - SegmentAttributes::WRITABLE,
            load,
            false,
        ),
        (
            SegmentAttributes::DATA - SegmentAttributes::PRESENT,
            load,
            false,
        ),
        (
            SegmentAttributes::DATA | SegmentAttributes::UNUSABLE,
            load,
            false,
        ),
    ] {
        let mut cpu = TestCpu::new(CpuMode::Protected32, &code);
        cpu.segments[3].attributes = attributes;
        cpu.gprs.rdi = 0x2000;
        if valid {
            cpu.done();
        } else {
            cpu.faults(Fault::GP0);
        }
    }
}

#[test]
fn page_faults_leave_everything_as_it_was() {
    // add [rdi], eax to a read-only page is a write fault, before the device is read.
    let mut cpu = TestCpu::long(&[0x01, 0x07]);
    cpu.gprs.rdi = 0x2000;
    cpu.read_only.insert(2);
    cpu.faults(Fault::page(Gva(0x2000), 3));
    assert!(cpu.reads.is_empty());
    // A store that crosses into a missing page.
    let mut cpu = TestCpu::long(&[0x48, 0x89, 0x07]);
    cpu.gprs.rdi = 0x2FFC;
    cpu.missing.insert(3);
    cpu.faults(Fault::page(Gva(0x3003), 2));
    // movsb whose destination faults does not read its source.
    let mut cpu = TestCpu::long(&[0xA4]);
    (cpu.gprs.rsi, cpu.gprs.rdi) = (0x2000, 0x3000);
    cpu.missing.insert(3);
    cpu.faults(Fault::page(Gva(0x3000), 2));
    assert!(cpu.reads.is_empty());
    // Nor does insb ask its port, or push [rax] its device.
    let mut cpu = TestCpu::long(&[0x6C]);
    cpu.gprs.rdi = 0x3000;
    cpu.missing.insert(3);
    cpu.faults(Fault::page(Gva(0x3000), 2));
    let mut cpu = TestCpu::long(&[0xFF, 0x30]);
    (cpu.gprs.rax, cpu.gprs.rsp) = (0x2000, 0x3008);
    cpu.read_only.insert(3);
    cpu.faults(Fault::page(Gva(0x3000), 3));
    assert!(cpu.reads.is_empty());
}

#[test]
fn code_may_cross_pages_and_faults_only_if_needed() {
    // A two-byte instruction at the end of a page, the next page missing.
    let mut cpu = TestCpu::long(&[]);
    cpu.rip = 0x1FFE;
    cpu.memory[0x1FFE..0x2000].copy_from_slice(&[0x8B, 0x07]);
    cpu.gprs.rdi = 0x3000;
    cpu.missing.insert(2);
    assert_eq!(step(&mut cpu), Ok(Outcome::Done));
    assert_eq!(cpu.rip, 0x2000);
    // A longer one needs the next page.
    cpu.rip = 0x1FFE;
    cpu.memory[0x1FFE..0x2003].copy_from_slice(&[0x8B, 0x87, 0x10, 0, 0]);
    let fault = Fault::page(Gva(0x2000), 0x10);
    assert_eq!(step(&mut cpu), Err(EmulateError::Fault(fault)));
    cpu.missing.clear();
    assert_eq!(step(&mut cpu), Ok(Outcome::Done));
    assert_eq!((cpu.rip, cpu.reads.last()), (0x2004, Some(&(0x3010, 4))));
    // The limit of the code segment, and fifteen bytes of prefixes.
    let mut cpu = TestCpu::new(CpuMode::Protected32, &[0x8B, 0x87, 0x10, 0, 0, 0]);
    cpu.segments[1].limit = CODE as u32 + 4;
    cpu.faults(Fault::GP0);
    TestCpu::long(&[0x66; 15]).faults(Fault::GP0);
    TestCpu::long(&[0x0F, 0x0B]).faults_unsupported();
    TestCpu::long(&[0x0F, 0xFF]).faults_unsupported();
    TestCpu::long(&[0xF0, 0x8B, 0x07]).faults(Fault::UD);
}

impl TestCpu {
    fn faults_unsupported(&mut self) {
        let error = step(self).unwrap_err();
        assert!(matches!(error, EmulateError::Unsupported { .. }), "{error}");
        assert_eq!(self.rip, CODE);
    }
}

#[test]
fn repeated_moves_run_both_ways_and_stop_where_they_fault() {
    // rep movsb, forwards
    let mut cpu = TestCpu::long(&[0xF3, 0xA4]);
    (cpu.gprs.rsi, cpu.gprs.rdi, cpu.gprs.rcx) = (0x2000, 0x3000, 5);
    cpu.put(0x2000, 0x0807_0605_0403_0201);
    cpu.done();
    assert_eq!(cpu.get(0x3000, 8), 0x05_0403_0201);
    assert_eq!(
        (cpu.gprs.rsi, cpu.gprs.rdi, cpu.gprs.rcx),
        (0x2005, 0x3005, 0)
    );
    // rep movsd with 32-bit addresses, backwards: the upper halves go.
    let mut cpu = TestCpu::long(&[0x67, 0xF3, 0xA5]);
    cpu.rflags |= alu::DF;
    cpu.gprs.rsi = 0x5_0000_2004;
    cpu.gprs.rdi = 0x5_0000_3004;
    cpu.gprs.rcx = 0x5_0000_0002;
    cpu.put(0x2000, 0x0807_0605_0403_0201);
    cpu.done();
    assert_eq!(cpu.get(0x3000, 8), 0x0807_0605_0403_0201);
    assert_eq!(
        (cpu.gprs.rsi, cpu.gprs.rdi, cpu.gprs.rcx),
        (0x1FFC, 0x2FFC, 0)
    );
    // rep stosw into a missing page: two are written, then the fault, and RCX tells.
    let mut cpu = TestCpu::long(&[0x66, 0xF3, 0xAB]);
    (cpu.gprs.rdi, cpu.gprs.rcx, cpu.gprs.rax) = (0x2FFC, 9, 0xABCD);
    cpu.missing.insert(3);
    let fault = Fault::page(Gva(0x3000), 2);
    assert_eq!(step(&mut cpu), Err(EmulateError::Fault(fault)));
    assert_eq!((cpu.rip, cpu.gprs.rdi, cpu.gprs.rcx), (CODE, 0x3000, 7));
    assert_eq!(cpu.get(0x2FFC, 4), 0xABCD_ABCD);
    // Nothing happens for a count of zero, not even a fault.
    let mut cpu = TestCpu::long(&[0xF3, 0xA4]);
    cpu.gprs.rdi = 1 << 63;
    cpu.done();
}

#[test]
fn long_repetitions_yield() {
    let mut cpu = TestCpu::long(&[0xF3, 0xAA]);
    let count = u64::from(MAX_ITERATIONS) + 1;
    (cpu.gprs.rdi, cpu.gprs.rcx, cpu.gprs.rax) = (0x2000, count, 7);
    assert_eq!(step(&mut cpu), Ok(Outcome::Continue));
    assert_eq!((cpu.rip, cpu.gprs.rcx), (CODE, 1));
    assert_eq!(step(&mut cpu), Ok(Outcome::Done));
    assert_eq!((cpu.rip, cpu.gprs.rcx), (CODE + 2, 0));
    assert!(
        cpu.memory[0x2000..0x2000 + count as usize]
            .iter()
            .all(|byte| *byte == 7)
    );
    // Exactly the bound needs no second call.
    let mut cpu = TestCpu::long(&[0xF3, 0xAA]);
    (cpu.gprs.rdi, cpu.gprs.rcx) = (0x2000, u64::from(MAX_ITERATIONS));
    cpu.done();
}

#[test]
fn comparisons_end_on_the_flag() {
    // repe cmpsb and repne scasb
    let mut cpu = TestCpu::long(&[0xF3, 0xA6]);
    (cpu.gprs.rsi, cpu.gprs.rdi, cpu.gprs.rcx) = (0x2000, 0x3000, 8);
    cpu.put(0x2000, 0x0101_0101);
    cpu.put(0x3000, 0x0102_0101);
    cpu.done();
    assert_eq!((cpu.gprs.rcx, cpu.gprs.rsi), (5, 0x2003));
    assert_eq!(cpu.rflags & (alu::CF | alu::ZF), alu::CF);
    let mut cpu = TestCpu::long(&[0xF2, 0xAE]);
    (cpu.gprs.rdi, cpu.gprs.rcx, cpu.gprs.rax) = (0x2000, 8, 3);
    cpu.put(0x2000, 0x0504_0302_0100);
    cpu.done();
    assert_eq!((cpu.gprs.rcx, cpu.gprs.rdi), (4, 0x2004));
    assert_eq!(cpu.rflags & alu::ZF, alu::ZF);
    // lodsd clears the upper half.
    let mut cpu = TestCpu::long(&[0xAD]);
    (cpu.gprs.rsi, cpu.gprs.rax) = (0x2000, u64::MAX);
    cpu.put(0x2000, 0x1234_5678);
    assert_eq!(cpu.done().gprs.rax, 0x1234_5678);
}

#[test]
fn string_ports() {
    // rep outsb from FS, rep insw
    let mut cpu = TestCpu::long(&[0x64, 0xF3, 0x6E]);
    (cpu.gprs.rsi, cpu.gprs.rcx, cpu.gprs.rdx) = (0x1000, 3, 0x3F8);
    cpu.segments[4].base = 0x1000;
    cpu.put(0x2000, 0x4443_4241);
    cpu.done();
    let sent: Vec<u8> = cpu
        .ports
        .iter()
        .flat_map(|(_, data)| data.clone())
        .collect();
    assert_eq!(sent, b"ABC");
    assert!(cpu.ports.iter().all(|(port, _)| *port == 0x3F8));
    let mut cpu = TestCpu::long(&[0x66, 0xF3, 0x6D]);
    (cpu.gprs.rdi, cpu.gprs.rcx, cpu.gprs.rdx) = (0x2000, 2, 0x1F0);
    assert_eq!(cpu.done().get(0x2000, 4), 0xF1F0_F1F0);
    // in eax, dx and out 0x80, al
    let mut cpu = TestCpu::long(&[0xED]);
    (cpu.gprs.rdx, cpu.gprs.rax) = (0x1010, u64::MAX);
    assert_eq!(cpu.done().gprs.rax, 0x1312_1110);
    let mut cpu = TestCpu::long(&[0xE6, 0x80]);
    cpu.gprs.rax = 0x1234;
    assert_eq!(cpu.done().ports, [(0x80, vec![0x34])]);
}

#[test]
fn bit_numbers_reach_beyond_the_operand() {
    // bts [rdi], ecx with bit -1 and bit 33; lock btr qword [rdi], 3; bt [rdi], cx
    for (bit, address, expected) in [(-1i32, 0x1FFC, 1u64 << 31), (33, 0x2004, 2)] {
        let mut cpu = TestCpu::long(&[0x0F, 0xAB, 0x0F]);
        (cpu.gprs.rdi, cpu.gprs.rcx) = (0x2000, u64::from(bit as u32));
        cpu.done();
        assert_eq!(cpu.writes[0].0, address);
        assert_eq!(cpu.get(address, 4), expected);
        assert_eq!(cpu.rflags & alu::CF, 0);
    }
    let mut cpu = TestCpu::long(&[0xF0, 0x48, 0x0F, 0xBA, 0x37, 0x03]);
    cpu.gprs.rdi = 0x2000;
    cpu.put(0x2000, 0xFF);
    cpu.rflags |= alu::ZF;
    cpu.done();
    assert_eq!(cpu.get(0x2000, 8), 0xF7);
    assert_eq!(cpu.rflags & alu::STATUS, alu::CF | alu::ZF);
    let mut cpu = TestCpu::long(&[0x66, 0x0F, 0xA3, 0x0F]);
    (cpu.gprs.rdi, cpu.gprs.rcx) = (0x2000, 0xFFFF);
    cpu.put(0x1FF8, 1 << 63);
    cpu.read_only.insert(1);
    assert_eq!(cpu.done().rflags & alu::CF, alu::CF);
}

#[test]
fn exchanges() {
    // xchg [rdi], eax; lock xadd [rdi], eax; lock cmpxchg [rdi], ecx equal and not
    let run = |code: &[u8], accumulator: u64| {
        let mut cpu = TestCpu::long(code);
        (cpu.gprs.rdi, cpu.gprs.rcx, cpu.gprs.rax) = (0x2000, 0x77, accumulator);
        cpu.put(0x2000, 0x55);
        cpu.done();
        (cpu.get(0x2000, 8), cpu.gprs.rax, cpu.rflags & alu::ZF != 0)
    };
    assert_eq!(run(&[0x87, 0x07], 0x1_0000_0003), (3, 0x55, false));
    assert_eq!(run(&[0xF0, 0x0F, 0xC1, 0x07], 3), (0x58, 0x55, false));
    assert_eq!(run(&[0xF0, 0x0F, 0xB1, 0x0F], 0x55), (0x77, 0x55, true));
    assert_eq!(run(&[0xF0, 0x0F, 0xB1, 0x0F], 0x54), (0x55, 0x55, false));
    // lock cmpxchg16b [rdi]
    let mut cpu = TestCpu::long(&[0xF0, 0x48, 0x0F, 0xC7, 0x0F]);
    (cpu.gprs.rdi, cpu.gprs.rax, cpu.gprs.rdx) = (0x2000, 1, 2);
    (cpu.gprs.rbx, cpu.gprs.rcx) = (3, 4);
    cpu.put(0x2000, 1);
    cpu.put(0x2008, 2);
    cpu.done();
    assert_eq!((cpu.get(0x2000, 8), cpu.get(0x2008, 8)), (3, 4));
    assert_eq!(cpu.rflags & alu::ZF, alu::ZF);
    cpu.rip = CODE;
    cpu.done();
    assert_eq!((cpu.gprs.rax, cpu.gprs.rdx), (3, 4));
    assert_eq!(cpu.rflags & alu::ZF, 0);
    let mut cpu = TestCpu::long(&[0x48, 0x0F, 0xC7, 0x0F]);
    cpu.gprs.rdi = 0x2008;
    cpu.faults(Fault::GP0);
}

#[test]
fn a_locked_instruction_that_loses_a_race_starts_again() {
    // lock inc dword [rdi]
    let mut cpu = TestCpu::long(&[0xF0, 0xFF, 0x07]);
    cpu.gprs.rdi = 0x2000;
    cpu.races = 1;
    assert_eq!(step(&mut cpu), Ok(Outcome::Continue));
    assert_eq!((cpu.rip, cpu.get(0x2000, 4)), (CODE, 1));
    cpu.done();
    assert_eq!(cpu.get(0x2000, 4), 2);
}

#[test]
fn the_stack_and_branches_through_memory() {
    // push qword [rdi]; pop qword [rsp]; call [rdi]; jmp [rdi]
    let mut cpu = TestCpu::long(&[0xFF, 0x37]);
    (cpu.gprs.rdi, cpu.gprs.rsp) = (0x2000, 0x3008);
    cpu.put(0x2000, 0x1234);
    cpu.done();
    assert_eq!((cpu.gprs.rsp, cpu.get(0x3000, 8)), (0x3000, 0x1234));
    let mut cpu = TestCpu::long(&[0x8F, 0x04, 0x24]);
    cpu.gprs.rsp = 0x3000;
    cpu.put(0x3000, 0x1234);
    cpu.done();
    assert_eq!((cpu.gprs.rsp, cpu.get(0x3008, 8)), (0x3008, 0x1234));
    for (code, stack) in [([0xFF, 0x17], 0x3000), ([0xFF, 0x27], 0x3008)] {
        let mut cpu = TestCpu::long(&code);
        (cpu.gprs.rdi, cpu.gprs.rsp) = (0x2000, 0x3008);
        cpu.put(0x2000, 0x4000);
        assert_eq!(step(&mut cpu), Ok(Outcome::Done));
        assert_eq!((cpu.rip, cpu.gprs.rsp), (0x4000, stack));
        assert_eq!(
            cpu.get(0x3000, 8),
            if stack == 0x3000 { CODE + 2 } else { 0 }
        );
        let mut cpu = TestCpu::long(&code);
        (cpu.gprs.rdi, cpu.gprs.rsp) = (0x2000, 0x3008);
        cpu.put(0x2000, 1 << 63);
        cpu.faults(Fault::GP0);
    }
    // push word [di] in real mode: the stack pointer has 16 bits.
    let mut cpu = TestCpu::new(CpuMode::Real, &[0xFF, 0x35]);
    cpu.segments[2] = Segment::real_mode(0x300, SegmentAttributes::DATA16);
    (cpu.gprs.rdi, cpu.gprs.rsp) = (0x2000, 0xABCD_0000);
    cpu.segments[2].base = 0;
    cpu.put(0x2000, 0x1234);
    cpu.done();
    assert_eq!((cpu.gprs.rsp, cpu.get(0xFFFE, 2)), (0xABCD_FFFE, 0x1234));
}

#[test]
fn conditions() {
    // setz [rdi]; cmovb eax, [rdi]
    for (flags, expected) in [(alu::ZF, 1), (0, 0)] {
        let mut cpu = TestCpu::long(&[0x0F, 0x94, 0x07]);
        cpu.gprs.rdi = 0x2000;
        cpu.put(0x2000, 0xFF);
        cpu.rflags |= flags;
        assert_eq!(cpu.done().get(0x2000, 1), expected);
    }
    for (flags, expected) in [(alu::CF, 0x2222), (0, 0xFFFF_FFFF)] {
        let mut cpu = TestCpu::long(&[0x0F, 0x42, 0x07]);
        (cpu.gprs.rdi, cpu.gprs.rax) = (0x2000, u64::MAX);
        cpu.put(0x2000, 0x2222);
        cpu.rflags |= flags;
        assert_eq!(cpu.done().gprs.rax, expected);
        assert_eq!(cpu.reads.len(), 1, "the source is read in any case");
    }
}

#[test]
fn sse_moves() {
    let value = 0x0F0E_0D0C_0B0A_0908_0706_0504_0302_0100u128;
    // movups xmm1, [rdi]; movaps [rdi], xmm1; movq xmm1, [rdi]; movlps xmm1, [rdi]; movd [rdi], xmm1
    let mut cpu = TestCpu::long(&[0x0F, 0x10, 0x0F]);
    cpu.gprs.rdi = 0x2003;
    cpu.memory[0x2003..0x2013].copy_from_slice(&value.to_le_bytes());
    assert_eq!(cpu.done().xmm[1], value);
    assert_eq!(cpu.reads, [(0x2003, 16)]);
    let mut cpu = TestCpu::long(&[0x0F, 0x29, 0x0F]);
    cpu.gprs.rdi = 0x2010;
    cpu.xmm[1] = value;
    assert_eq!(cpu.done().writes, [(0x2010, value.to_le_bytes().to_vec())]);
    let mut cpu = TestCpu::long(&[0x0F, 0x29, 0x0F]);
    cpu.gprs.rdi = 0x2008;
    cpu.faults(Fault::GP0);
    for (code, kept) in [
        (&[0xF3, 0x0F, 0x7E, 0x0F][..], 0),
        (&[0x0F, 0x12, 0x0F], u64::MAX),
    ] {
        let mut cpu = TestCpu::long(code);
        cpu.gprs.rdi = 0x2000;
        cpu.put(0x2000, 0x1234);
        cpu.xmm[1] = u128::MAX;
        assert_eq!(cpu.done().xmm[1], u128::from(kept) << 64 | 0x1234);
    }
    let mut cpu = TestCpu::long(&[0x66, 0x0F, 0x7E, 0x0F]);
    cpu.gprs.rdi = 0x2000;
    cpu.xmm[1] = value;
    assert_eq!(cpu.done().writes, [(0x2000, vec![0, 1, 2, 3])]);
}

#[test]
fn a_single_step_is_due_after_every_iteration() {
    let mut cpu = TestCpu::long(&[0x8B, 0x07]);
    cpu.rflags |= alu::TF;
    cpu.gprs.rdi = 0x2000;
    assert_eq!(step(&mut cpu), Ok(Outcome::SingleStep));
    assert_eq!(cpu.rip, CODE + 2);
    let mut cpu = TestCpu::long(&[0xF3, 0xAA]);
    cpu.rflags |= alu::TF;
    (cpu.gprs.rdi, cpu.gprs.rcx) = (0x2000, 2);
    for (rip, left) in [(CODE, 1), (CODE + 2, 0)] {
        assert_eq!(step(&mut cpu), Ok(Outcome::SingleStep));
        assert_eq!((cpu.rip, cpu.gprs.rcx), (rip, left));
    }
}

#[test]
fn instruction_pointers_have_the_width_of_their_mode() {
    let mut cpu = TestCpu::new(CpuMode::Real, &[]);
    cpu.rip = 0xFFFE;
    cpu.memory[0xFFFE..].copy_from_slice(&[0x8A, 0x05]);
    cpu.segments[1].limit = 0xFFFF;
    assert_eq!(step(&mut cpu), Ok(Outcome::Done));
    assert_eq!(cpu.rip, 0);
}

#[test]
fn control_registers_are_moved_in_the_modes_width() {
    // mov cr3, rax; mov rdx, cr4; mov cr0, r9
    let mut cpu = TestCpu::long(&[0x0F, 0x22, 0xD8]);
    cpu.gprs.rax = 0x12_3456_7000;
    assert_eq!(cpu.done().controls[3], 0x12_3456_7000);
    let mut cpu = TestCpu::long(&[0x0F, 0x20, 0xE2]);
    cpu.controls[4] = 0x7_0000_0020;
    assert_eq!(cpu.done().gprs.rdx, 0x7_0000_0020);
    let mut cpu = TestCpu::long(&[0x41, 0x0F, 0x22, 0xC1]);
    cpu.gprs.r9 = 0x8001_0011;
    assert_eq!(cpu.done().controls[0], 0x8001_0011);
    let mut cpu = TestCpu::new(CpuMode::Protected32, &[0x0F, 0x22, 0xD8]);
    cpu.gprs.rax = 0xF_0000_1000;
    assert_eq!(cpu.done().controls[3], 0x1000);
    // A value that the register refuses, and user mode.
    let mut cpu = TestCpu::long(&[0x0F, 0x22, 0xE0]);
    cpu.gprs.rax = 1 << 63;
    cpu.faults(Fault::GP0);
    for code in [
        &[0x0F, 0x22, 0xD8][..],
        &[0x0F, 0x20, 0xD8],
        &[0x0F, 0x06],
        &[0x0F, 0x01, 0xF0],
        &[0x0F, 0x01, 0x38],
    ] {
        let mut cpu = TestCpu::long(code);
        cpu.cpl = 3;
        cpu.faults(Fault::GP0);
    }
}

#[test]
fn the_machine_status_word_is_the_low_end_of_cr0() {
    // lmsw ax: PE can be set and not cleared.
    for (old, word, new) in [
        (0x6000_0010, 0xFFFF, 0x6000_001F),
        (0x6000_001F, 0, 0x6000_0011),
    ] {
        let mut cpu = TestCpu::long(&[0x0F, 0x01, 0xF0]);
        (cpu.controls[0], cpu.gprs.rax) = (old, word);
        assert_eq!(cpu.done().controls[0], new);
    }
    // smsw eax; smsw [rdi], by user mode too
    let mut cpu = TestCpu::long(&[0x0F, 0x01, 0xE0]);
    (cpu.cpl, cpu.controls[0]) = (3, 0x8005_0033);
    assert_eq!(cpu.done().gprs.rax, 0x8005_0033);
    let mut cpu = TestCpu::long(&[0x0F, 0x01, 0x27]);
    (cpu.controls[0], cpu.gprs.rdi) = (0x8005_0033, 0x2000);
    assert_eq!(cpu.done().writes, [(0x2000, vec![0x33, 0])]);
    // clts
    let mut cpu = TestCpu::long(&[0x0F, 0x06]);
    cpu.controls[0] = 0x8005_003B;
    assert_eq!(cpu.done().controls[0], 0x8005_0033);
}

#[test]
fn pages_are_invalidated_without_an_access() {
    // invlpg [rax]; invlpg gs:[rax + 0x10]
    let mut cpu = TestCpu::long(&[0x0F, 0x01, 0x38]);
    cpu.gprs.rax = 0xFFFF_8000_0000_1234;
    assert_eq!(cpu.done().invalidated, [Gva(0xFFFF_8000_0000_1234)]);
    assert!(cpu.reads.is_empty());
    let mut cpu = TestCpu::long(&[0x65, 0x0F, 0x01, 0x78, 0x10]);
    cpu.segments[5].base = 0x10_0000;
    cpu.gprs.rax = 0x2000;
    assert_eq!(cpu.done().invalidated, [Gva(0x10_2010)]);
    // An address that is not canonical does nothing.
    let mut cpu = TestCpu::long(&[0x0F, 0x01, 0x38]);
    cpu.gprs.rax = 1 << 60;
    assert!(cpu.done().invalidated.is_empty());
}

#[test]
fn repeated_stores_are_left_to_a_processor_that_can_make_them() {
    let mut cpu = TestCpu::long(&[0xF3, 0xAA]);
    (cpu.gprs.rdi, cpu.gprs.rcx, cpu.native_repeats) = (0x2000, 2, true);
    assert!(matches!(
        step(&mut cpu),
        Err(EmulateError::Unsupported { .. })
    ));
    assert!(cpu.writes.is_empty());
}
