//! A processor that is emulated as a whole: real mode, and the way from there to protected mode.

use super::*;
use std::vec;
use std::vec::Vec;
use testudo_arch::segment::SegmentAttributes;
use testudo_arch::{Exception, Gpr};

/// A processor in real mode over 1 MiB.
struct WholeCpu {
    gprs: Gprs,
    rip: u64,
    rflags: u64,
    cr0: u64,
    segments: [Segment; 8],
    tables: [DescriptorTable; 2],
    memory: Vec<u8>,
}

const IF: u64 = 1 << 9;

impl WholeCpu {
    /// With `code` at 0x1000:0 and a stack at 0x2000:0x100.
    fn new(code: &[u8]) -> Self {
        let data = |selector| Segment::real_mode(selector, SegmentAttributes::DATA16);
        let mut cpu = Self {
            gprs: Gprs {
                rsp: 0x100,
                ..Gprs::default()
            },
            rip: 0,
            rflags: 2,
            cr0: 0x10,
            segments: [data(0x3000); 8],
            tables: [DescriptorTable::default(); 2],
            memory: vec![0; 1 << 20],
        };
        cpu.segments[1] = Segment::real_mode(0x1000, SegmentAttributes::CODE16);
        cpu.segments[2] = data(0x2000);
        cpu.tables[1].limit = 0x3FF;
        cpu.memory[0x1_0000..][..code.len()].copy_from_slice(code);
        cpu
    }

    fn steps(&mut self, count: usize) -> &mut Self {
        for _ in 0..count {
            assert_eq!(step(self), Ok(Outcome::Done), "at {:#x}", self.rip);
        }
        self
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.memory[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn word(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.memory[at], self.memory[at + 1]])
    }

    fn faults(&mut self, event: Event) {
        let fault = Fault { event, cr2: None };
        assert_eq!(step(self), Err(EmulateError::Fault(fault)));
        assert_eq!(self.rip, 0);
    }
}

impl Cpu for WholeCpu {
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
        let big = self.segments[1]
            .attributes
            .contains(SegmentAttributes::DEFAULT_BIG);
        match (self.cr0 & 1 != 0, big) {
            (false, _) => CpuMode::Real,
            (true, false) => CpuMode::Protected16,
            (true, true) => CpuMode::Protected32,
        }
    }
    fn segment(&self, register: SegmentRegister) -> Segment {
        self.segments[register as usize]
    }
    fn control_register(&self, number: u8) -> Option<u64> {
        (number == 0).then_some(self.cr0)
    }
    fn set_control_register(&mut self, _: u8, value: u64) -> Result<(), Fault> {
        self.cr0 = value;
        Ok(())
    }
    fn is_whole(&self) -> bool {
        true
    }
    fn set_segment(&mut self, register: SegmentRegister, segment: &Segment) -> bool {
        self.segments[register as usize] = *segment;
        true
    }
    fn descriptor_tables(&self) -> [DescriptorTable; 2] {
        self.tables
    }
    fn set_descriptor_table(&mut self, interrupts: bool, table: DescriptorTable) -> bool {
        self.tables[usize::from(interrupts)] = table;
        true
    }
    fn fetch(&mut self, address: Gva, code: &mut [u8]) -> Result<usize, Fault> {
        self.read(address, code, Intent::Read).map(|()| code.len())
    }
    fn read(&mut self, address: Gva, data: &mut [u8], _: Intent) -> Result<(), Fault> {
        let from = address.0 as usize & 0xF_FFFF;
        for (offset, byte) in data.iter_mut().enumerate() {
            *byte = self.memory[(from + offset) & 0xF_FFFF];
        }
        Ok(())
    }
    fn write(&mut self, address: Gva, data: &[u8]) -> Result<(), Fault> {
        for (offset, byte) in data.iter().enumerate() {
            self.memory[(address.0 as usize + offset) & 0xF_FFFF] = *byte;
        }
        Ok(())
    }
    fn probe_write(&mut self, _: Gva, _: usize) -> Result<(), Fault> {
        Ok(())
    }
    fn compare_exchange(&mut self, address: Gva, _: &[u8], new: &[u8]) -> Result<bool, Fault> {
        self.write(address, new).map(|()| true)
    }
    fn port_in(&mut self, _: u16, _: &mut [u8]) {}
    fn port_out(&mut self, _: u16, _: &[u8]) {}
}

#[test]
fn the_start_code_of_a_processor_reaches_protected_mode() {
    let code = [
        &[0xFA][..],                                       // cli
        &[0x8C, 0xC8],                                     // mov ax, cs
        &[0x8E, 0xD8],                                     // mov ds, ax
        &[0x8E, 0xD0],                                     // mov ss, ax
        &[0x66, 0xBC, 0x00, 0x08, 0, 0],                   // mov esp, 0x800
        &[0x66, 0x0F, 0x01, 0x16, 0x80, 0x00],             // lgdt dword [0x80]
        &[0x66, 0xBA, 0x18, 0, 0, 0],                      // mov edx, 0x18
        &[0x66, 0xB8, 0x11, 0, 0, 0],                      // mov eax, 0x11
        &[0x0F, 0x22, 0xC0],                               // mov cr0, eax
        &[0x66, 0xEA, 0x00, 0x00, 0x01, 0x00, 0x10, 0x00], // jmp 0x10:0x10000
    ]
    .concat();
    let mut cpu = WholeCpu::new(&code);
    cpu.put(0x1_0080, &[0x1F, 0, 0x00, 0x01, 0x01, 0]);
    // Code and data, flat, the first not accessed yet.
    cpu.put(0x1_0110, &0x00CF_9A00_0000_FFFFu64.to_le_bytes());
    cpu.put(0x1_0118, &0x00CF_9300_0000_FFFFu64.to_le_bytes());
    cpu.steps(10);
    assert_eq!(cpu.tables[0].base, 0x1_0100);
    assert_eq!((cpu.rip, cpu.mode()), (0x1_0000, CpuMode::Protected32));
    assert_eq!(
        cpu.segments[1],
        Segment::flat(0x10, SegmentAttributes::CODE32)
    );
    assert_eq!(cpu.memory[0x1_0115], 0x9B, "the descriptor is marked");
    assert_eq!((cpu.gprs.rsp, cpu.segments[2].base), (0x800, 0x1_0000));
    // mov ss, edx; mov ds, eax, where 0x11 is no selector of the table's
    cpu.put(0x1_0000, &[0x8E, 0xD2, 0x8E, 0xD8]);
    cpu.steps(1);
    assert_eq!(
        cpu.segments[2],
        Segment::flat(0x18, SegmentAttributes::DATA)
    );
    cpu.gprs.rax = 0x20;
    let fault = Event::fault_with(Exception::GeneralProtection, 0x20);
    let fault = Fault {
        event: fault,
        cr2: None,
    };
    assert_eq!(step(&mut cpu), Err(EmulateError::Fault(fault)));
}

#[test]
fn segments_are_checked_in_protected_mode() {
    let descriptor = |access: u64| 0x00C0_0000_0000_0FFF | access << 40;
    // mov ss, ax; mov ds, ax; jmp far to the selector
    let (ss, ds) = (&[0x8E, 0xD0][..], &[0x8E, 0xD8][..]);
    let jump = &[0xEA, 0, 0, 8, 0][..];
    let (gp, ss_fault, np) = (
        Exception::GeneralProtection,
        Exception::StackFault,
        Exception::SegmentNotPresent,
    );
    for (code, access, fault) in [
        (ss, 0x91, gp), // read-only
        (ss, 0xF3, gp), // of another level
        (ss, 0x13, ss_fault),
        (ds, 0x99, gp), // execute-only
        (ds, 0x89, gp), // a TSS
        (ds, 0x13, np),
        (jump, 0x93, gp), // data
        (jump, 0xFB, gp), // of another level
        (jump, 0x1B, np),
    ] {
        let mut cpu = WholeCpu::new(code);
        cpu.cr0 |= 1;
        cpu.gprs.rax = 8;
        cpu.tables[0] = DescriptorTable {
            base: 0x5000,
            limit: 15,
        };
        cpu.put(0x5008, &descriptor(access).to_le_bytes());
        cpu.faults(Event::fault_with(fault, 8));
    }
    let mut cpu = WholeCpu::new(ss);
    cpu.cr0 |= 1;
    cpu.faults(Event::GP0);
    let mut cpu = WholeCpu::new(ds);
    cpu.cr0 |= 1;
    cpu.steps(1);
    let attributes = cpu.segments[SegmentRegister::Ds as usize].attributes;
    assert!(attributes.contains(SegmentAttributes::UNUSABLE));
}

#[test]
fn interrupts_go_through_the_vectors_and_come_back() {
    // int 0x21; then at 0x4000:0x10: iret
    let mut cpu = WholeCpu::new(&[0xCD, 0x21]);
    cpu.put(0x84, &[0x10, 0, 0, 0x40]);
    cpu.put(0x4_0010, &[0xCF]);
    cpu.rflags = 2 | IF | alu::CF;
    cpu.steps(1);
    assert_eq!((cpu.rip, cpu.segments[1].base), (0x10, 0x4_0000));
    assert_eq!((cpu.rflags, cpu.gprs.rsp), (2 | alu::CF, 0xFA));
    assert_eq!(
        [0xFA, 0xFC, 0xFE].map(|at| cpu.word(0x2_0000 + at)),
        [2, 0x1000, 0x203]
    );
    cpu.steps(1);
    assert_eq!((cpu.rip, cpu.segments[1].selector), (2, 0x1000));
    assert_eq!((cpu.rflags, cpu.gprs.rsp), (2 | IF | alu::CF, 0x100));
    // An event is delivered in the same way; one beyond the table cannot be.
    cpu.put(0x20, &[0x34, 0x12, 0, 0x40]);
    assert_eq!(deliver(&mut cpu, Event::Interrupt(8)), Ok(()));
    assert_eq!((cpu.rip, cpu.segments[1].selector), (0x1234, 0x4000));
    cpu.tables[1].limit = 0x22;
    assert_eq!(deliver(&mut cpu, Event::Interrupt(8)), Err(Fault::GP0));
}

#[test]
fn calls_and_the_stack() {
    // call +3; hlt; nop; nop; push 0x1234; pop cx; pusha; popa; ret
    let mut cpu = WholeCpu::new(&[
        0xE8, 3, 0, 0xF4, 0x90, 0x90, 0x68, 0x34, 0x12, 0x59, 0x60, 0x61, 0xC3,
    ]);
    cpu.gprs.rbx = 0x5678;
    cpu.steps(3);
    assert_eq!((cpu.gprs.rcx, cpu.gprs.rsp), (0x1234, 0xFE));
    let before = cpu.gprs;
    cpu.steps(2);
    assert_eq!(cpu.gprs, before);
    cpu.steps(1);
    assert_eq!((cpu.rip, cpu.gprs.rsp), (3, 0x100));
    let halt = Outcome::Intercepted {
        what: Intercept::Halt,
        next: 4,
    };
    assert_eq!((step(&mut cpu), cpu.rip), (Ok(halt), 3));
    // call 0x4000:0x20 and lret; ret 4
    let mut cpu = WholeCpu::new(&[0x9A, 0x20, 0, 0, 0x40]);
    cpu.put(0x4_0020, &[0xCB]);
    cpu.steps(1);
    assert_eq!((cpu.rip, cpu.segments[1].selector), (0x20, 0x4000));
    cpu.steps(1);
    assert_eq!((cpu.rip, cpu.gprs.rsp), (5, 0x100));
    let mut cpu = WholeCpu::new(&[0xC2, 4, 0]);
    cpu.put(0x2_0100, &[0x77, 0]);
    cpu.steps(1);
    assert_eq!((cpu.rip, cpu.gprs.rsp), (0x77, 0x106));
}

#[test]
fn branches_and_loops() {
    // mov cx, 3; inc ax; loop -3; jz +2; jnz +2
    let mut cpu = WholeCpu::new(&[0xB9, 3, 0, 0x40, 0xE2, 0xFD, 0x74, 2, 0x75, 2]);
    cpu.steps(7);
    assert_eq!((cpu.gprs.rax, cpu.gprs.rcx, cpu.rip), (3, 0, 6));
    cpu.steps(1);
    assert_eq!(cpu.rip, 8, "not zero");
    cpu.steps(1);
    assert_eq!(cpu.rip, 12);
    // jmp beyond the limit
    let mut cpu = WholeCpu::new(&[0x66, 0xE9, 0, 0, 1, 0]);
    cpu.faults(Event::GP0);
}

#[test]
fn flags_are_pushed_popped_and_tested() {
    // pushfd; pop eax; xor eax, 0x240000; push eax; popfd (the test for CPUID)
    let mut cpu = WholeCpu::new(&[
        0x66, 0x9C, 0x66, 0x58, 0x66, 0x35, 0, 0, 0x24, 0, 0x66, 0x50, 0x66, 0x9D,
    ]);
    cpu.rflags = 2 | IF;
    cpu.steps(5);
    assert_eq!((cpu.rflags, cpu.gprs.rsp), (2 | IF | 0x24_0000, 0x100));
    // stc; lahf; cmc; sahf; std; cld; sti
    let mut cpu = WholeCpu::new(&[0xF9, 0x9F, 0xF5, 0x9E, 0xFD, 0xFC, 0xFB]);
    cpu.steps(3);
    assert_eq!((cpu.gprs.rax, cpu.rflags), (0x300, 2));
    cpu.steps(4);
    assert_eq!(cpu.rflags, 2 | IF | alu::CF);
}

#[test]
fn multiplication_and_division() {
    // mul bx; div bx; imul ax, ax, 7; idiv bl
    let mut cpu = WholeCpu::new(&[0xF7, 0xE3, 0xF7, 0xF3, 0x6B, 0xC0, 7, 0xF6, 0xFB]);
    (cpu.gprs.rax, cpu.gprs.rbx) = (0x1234, 0x1000);
    cpu.steps(1);
    assert_eq!((cpu.gprs.rax, cpu.gprs.rdx), (0x4000, 0x123));
    assert_eq!(cpu.rflags & (alu::CF | alu::OF), alu::CF | alu::OF);
    cpu.steps(1);
    assert_eq!((cpu.gprs.rax, cpu.gprs.rdx), (0x1234, 0));
    (cpu.gprs.rax, cpu.gprs.rbx) = (5, 0xFD);
    cpu.steps(1);
    assert_eq!((cpu.gprs.rax, cpu.rflags & alu::CF), (35, 0));
    // 35 / -3: the quotient is rounded towards zero.
    cpu.steps(1);
    assert_eq!(cpu.gprs.rax, 0x02F5);
    for (code, rax) in [
        ([0xF6, 0xF3], 5),
        ([0xF6, 0xF3], 0x500),
        ([0xF6, 0xFB], 0x500),
    ] {
        let mut cpu = WholeCpu::new(&code);
        (cpu.gprs.rax, cpu.gprs.rbx) = (rax, if rax == 5 { 0 } else { 1 });
        cpu.faults(Event::fault(Exception::DivideError));
    }
}

#[test]
fn what_the_machine_answers_is_left_to_it() {
    for (code, what) in [
        (&[0x0F, 0xA2][..], Intercept::Cpuid),
        (&[0x0F, 0x32], Intercept::ReadMsr),
        (&[0x0F, 0x30], Intercept::WriteMsr),
        (&[0x0F, 0x31], Intercept::ReadTsc),
        (&[0x0F, 0x09], Intercept::CacheFlush),
    ] {
        let mut cpu = WholeCpu::new(code);
        let next = code.len() as u64;
        assert_eq!(step(&mut cpu), Ok(Outcome::Intercepted { what, next }));
    }
    let registers = [Gpr::Rax, Gpr::Rbx];
    // bsf eax, ebx; bsr eax, ebx; cwd; lea ax, [bx + si + 4]
    let mut cpu = WholeCpu::new(&[
        0x66, 0x0F, 0xBC, 0xC3, 0x66, 0x0F, 0xBD, 0xC3, 0x99, 0x8D, 0x40, 4,
    ]);
    cpu.gprs[registers[1]] = 0x8010;
    assert_eq!(cpu.steps(1).gprs.rax, 4);
    assert_eq!(cpu.steps(1).gprs.rax, 15);
    assert_eq!(cpu.steps(1).gprs.rdx, 0);
    cpu.gprs.rsi = 0x10;
    assert_eq!(cpu.steps(1).gprs.rax, 0x8024);
    // What is not covered says so and changes nothing: daa, and an FPU instruction.
    for code in [[0x27, 0], [0xD9, 0xE8]] {
        let mut cpu = WholeCpu::new(&code);
        assert!(matches!(
            step(&mut cpu),
            Err(EmulateError::Unsupported { .. })
        ));
    }
}

proptest::proptest! {
    /// Whatever bytes are executed, in real mode or just behind it: an answer.
    #[test]
    fn any_code_gets_an_answer(
        code in proptest::collection::vec(proptest::prelude::any::<u8>(), 1..64),
        registers in proptest::array::uniform8(proptest::prelude::any::<u64>()),
        protected in proptest::prelude::any::<bool>(),
    ) {
        let mut cpu = WholeCpu::new(&code);
        for (register, value) in Gpr::ALL.into_iter().zip(registers) {
            cpu.gprs[register] = value;
        }
        cpu.cr0 |= u64::from(protected);
        cpu.tables[0].limit = 0x37;
        for _ in 0..16 {
            if step(&mut cpu).is_err() {
                break;
            }
        }
    }
}
