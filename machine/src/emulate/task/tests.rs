use super::*;
use proptest::prelude::*;
use std::vec::Vec;

/// Flat memory; an address at or above `hole` faults.
struct Memory {
    bytes: Vec<u8>,
    hole: u64,
    cr3: u64,
}

impl Memory {
    fn check(&self, address: Gva, len: usize) -> Result<usize, Fault> {
        let end = address.0.saturating_add(len as u64);
        if end > self.hole.min(self.bytes.len() as u64) {
            return Err(Fault::page(address, 0));
        }
        Ok(address.0 as usize)
    }

    fn word(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    fn double(&self, at: usize) -> u32 {
        u32::from(self.word(at)) | u32::from(self.word(at + 2)) << 16
    }

    fn put(&mut self, at: usize, value: u32) {
        self.bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }

    fn descriptor(&mut self, selector: u16, base: u32, limit: u32, attributes: u32) {
        let low = limit & 0xFFFF | base << 16;
        let high = base >> 16 & 0xFF | attributes << 8 | limit & 0xF_0000 | base & 0xFF00_0000;
        self.put(GDT + usize::from(selector), low);
        self.put(GDT + usize::from(selector) + 4, high);
    }
}

impl TaskMemory for Memory {
    fn read(&mut self, address: Gva, data: &mut [u8]) -> Result<(), Fault> {
        let at = self.check(address, data.len())?;
        data.copy_from_slice(&self.bytes[at..at + data.len()]);
        Ok(())
    }

    fn write(&mut self, address: Gva, data: &[u8]) -> Result<(), Fault> {
        let at = self.check(address, data.len())?;
        self.bytes[at..at + data.len()].copy_from_slice(data);
        Ok(())
    }

    fn set_cr3(&mut self, cr3: u64) {
        self.cr3 = cr3;
    }
}

const GDT: usize = 0x1000;
const IDT: usize = 0x1800;
const OLD: usize = 0x2000;
const NEW: usize = 0x3000;
const STACK: u32 = 0x5000;

/// Two tasks of 32 bits: TSS 0x28 runs, 0x30 waits. Code 8, data 0x10, user code 0x1B, user data 0x23.
fn tasks() -> (Memory, SystemRegisters, Gprs) {
    let mut memory = Memory {
        bytes: std::vec![0; 0x8000],
        hole: u64::MAX,
        cr3: 0,
    };
    memory.descriptor(0x08, 0, 0xF_FFFF, 0xC09A);
    memory.descriptor(0x10, 0, 0xF_FFFF, 0xC092);
    memory.descriptor(0x18, 0, 0xF_FFFF, 0xC0FA);
    memory.descriptor(0x20, 0, 0xF_FFFF, 0xC0F2);
    memory.descriptor(0x28, OLD as u32, 0x67, 0x8B);
    memory.descriptor(0x30, NEW as u32, 0x67, 0x89);
    for (at, value) in [
        (0x1C, 0x7000),
        (0x20, 0x4000),
        (0x24, 0x202),
        (0x28, 0xA),
        (0x38, STACK),
        (0x48, 0x10),
        (0x4C, 0x08),
        (0x50, 0x10),
        (0x54, 0x10),
    ] {
        memory.put(NEW + at, value);
    }
    let mut system = SystemRegisters::reset();
    system.cr0 = 0x8000_0011;
    system.cs = Segment::flat(8, A::CODE32);
    let flat = Segment::flat(0x10, A::DATA);
    [system.ss, system.ds, system.es, system.fs, system.gs] = [flat; 5];
    (system.gdtr.base, system.gdtr.limit) = (GDT as u64, 0x3F);
    (system.idtr.base, system.idtr.limit) = (IDT as u64, 0x7FF);
    system.tr = Segment {
        selector: 0x28,
        attributes: A::TSS_BUSY,
        limit: 0x67,
        base: OLD as u64,
    };
    (system.rip, system.rflags, system.cr3) = (0x1234, 0x46, 0x6000);
    let gprs = Gprs {
        rax: 0x1111,
        rsp: 0x2222,
        ..Gprs::default()
    };
    (memory, system, gprs)
}

fn task(selector: u16, cause: Cause) -> TaskSwitch {
    TaskSwitch { selector, cause }
}

#[test]
fn a_call_nests_and_its_return_comes_back() {
    let (mut memory, mut system, mut gprs) = tasks();
    let call = task(0x30, Cause::Call);
    assert_eq!(switch(&mut memory, &mut system, &mut gprs, &call), Ok(None));
    assert_eq!(
        (system.rip, gprs.rax, gprs.rsp),
        (0x4000, 0xA, STACK.into())
    );
    assert_eq!(system.rflags, 0x202 | NESTED);
    assert_eq!((system.cr3, memory.cr3), (0x7000, 0x7000));
    assert_ne!(system.cr0 & Cr0Flags::TASK_SWITCHED.bits(), 0);
    assert_eq!((system.cs.selector, system.cs.limit), (8, u32::MAX));
    assert!(system.fs.attributes.contains(A::UNUSABLE));
    assert_eq!(
        (system.tr.selector, system.tr.attributes),
        (0x30, A::TSS_BUSY)
    );
    assert_eq!(memory.word(NEW), 0x28, "the link back");
    // Both are busy, and the segments were marked as accessed.
    assert_eq!(
        (memory.bytes[GDT + 0x2D], memory.bytes[GDT + 0x35]),
        (0x8B, 0x8B)
    );
    assert_eq!(memory.bytes[GDT + 0x0D], 0x9B);
    // The old task.
    assert_eq!(memory.double(OLD + 0x20), 0x1234);
    assert_eq!(memory.double(OLD + 0x24), 0x46);
    assert_eq!(memory.double(OLD + 0x28), 0x1111);
    assert_eq!(memory.double(OLD + 0x4C), 8);

    memory.put(OLD + 0x1C, 0x6000);
    system.rip = 0x4010;
    let back = task(0x28, Cause::Return);
    assert_eq!(switch(&mut memory, &mut system, &mut gprs, &back), Ok(None));
    assert_eq!(
        (system.rip, system.rflags, gprs.rsp),
        (0x1234, 0x46, 0x2222)
    );
    assert_eq!(
        (memory.bytes[GDT + 0x2D], memory.bytes[GDT + 0x35]),
        (0x8B, 0x89)
    );
    assert_eq!(memory.double(NEW + 0x20), 0x4010);
    assert_eq!(u64::from(memory.double(NEW + 0x24)) & NESTED, 0);
}

#[test]
fn a_jump_leaves_the_old_task_available() {
    let (mut memory, mut system, mut gprs) = tasks();
    let jump = task(0x30, Cause::Jump);
    assert_eq!(switch(&mut memory, &mut system, &mut gprs, &jump), Ok(None));
    assert_eq!(system.rflags & NESTED, 0);
    assert_eq!(
        (memory.bytes[GDT + 0x2D], memory.bytes[GDT + 0x35]),
        (0x89, 0x8B)
    );
    assert_eq!(memory.word(NEW), 0);
}

#[test]
fn an_exception_brings_its_error_code() {
    let (mut memory, mut system, mut gprs) = tasks();
    let cause = Cause::Event {
        error_code: Some(0xDEAD_BEEF),
    };
    let request = task(0x30, cause);
    assert_eq!(
        switch(&mut memory, &mut system, &mut gprs, &request),
        Ok(None)
    );
    assert_eq!(gprs.rsp, u64::from(STACK) - 4);
    assert_eq!(memory.double(STACK as usize - 4), 0xDEAD_BEEF);
}

#[test]
fn the_gate_of_a_software_interrupt_has_a_privilege() {
    let (mut memory, mut system, mut gprs) = tasks();
    system.ss.attributes = A::DATA.with_dpl(3);
    memory.bytes[IDT + 8 * 0x80 + 5] = 0x85;
    let request = task(0x30, Cause::SoftwareInterrupt { vector: 0x80 });
    let refused = switch(&mut memory, &mut system, &mut gprs, &request);
    let code = Event::fault_with(Exception::GeneralProtection, 0x402);
    assert_eq!(refused.map_err(|fault| fault.event), Err(code));
    memory.bytes[IDT + 8 * 0x80 + 5] = 0xE5;
    assert_eq!(
        switch(&mut memory, &mut system, &mut gprs, &request),
        Ok(None)
    );
}

#[test]
fn a_task_that_is_none_leaves_the_old_one_as_it_was() {
    type Change = fn(&mut Memory);
    let cases: [(Change, u16, Cause, Exception); 6] = [
        (
            |m| m.descriptor(0x30, 0, 0x67, 0x8B),
            0x30,
            Cause::Call,
            Exception::GeneralProtection,
        ),
        (
            |m| m.descriptor(0x30, 0, 0x67, 0x09),
            0x30,
            Cause::Call,
            Exception::SegmentNotPresent,
        ),
        (
            |m| m.descriptor(0x30, 0, 0x66, 0x89),
            0x30,
            Cause::Call,
            Exception::InvalidTss,
        ),
        (|_| (), 0x34, Cause::Jump, Exception::GeneralProtection),
        (|_| (), 0x40, Cause::Jump, Exception::GeneralProtection),
        (|_| (), 0x30, Cause::Return, Exception::InvalidTss),
    ];
    for (change, selector, cause, exception) in cases {
        let (mut memory, mut system, mut gprs) = tasks();
        change(&mut memory);
        let before = (system, gprs);
        let refused = switch(&mut memory, &mut system, &mut gprs, &task(selector, cause));
        let event = Event::fault_with(exception, u32::from(selector & !3));
        assert_eq!(
            refused.map_err(|fault| fault.event),
            Err(event),
            "{selector:#x}"
        );
        assert_eq!((system, gprs), before);
    }
    let (mut memory, mut system, mut gprs) = tasks();
    memory.hole = NEW as u64 + 0x10;
    let before = (system, gprs);
    let refused = switch(
        &mut memory,
        &mut system,
        &mut gprs,
        &task(0x30, Cause::Call),
    );
    assert_eq!(refused, Err(Fault::page(Gva(NEW as u64), 0)));
    assert_eq!((system, gprs), before);
}

#[test]
fn what_the_new_task_loads_is_its_own_fault() {
    for (field, value, exception) in [
        (0x4C, 0x10, Exception::InvalidTss),
        (0x4C, 0x1B, Exception::InvalidTss),
        (0x50, 0x08, Exception::InvalidTss),
        (0x50, 0x00, Exception::InvalidTss),
        (0x54, 0x38, Exception::SegmentNotPresent),
        (0x60, 0x08, Exception::InvalidTss),
    ] {
        let (mut memory, mut system, mut gprs) = tasks();
        system.gdtr.limit = 0x3F;
        memory.descriptor(0x38, 0, 0xF_FFFF, 0xC012);
        memory.put(NEW + field, value);
        let done = switch(
            &mut memory,
            &mut system,
            &mut gprs,
            &task(0x30, Cause::Call),
        );
        // User code needs a user stack: the stack is found wrong then.
        let selector = if value == 0x1B { 0x10 } else { value & !3 };
        let event = Event::fault_with(exception, selector);
        assert_eq!(
            done.unwrap().unwrap().event,
            event,
            "{field:#x} = {value:#x}"
        );
        assert_eq!((system.tr.selector, system.rip), (0x30, 0x4000));
    }
}

#[test]
fn the_trap_bit_and_tasks_of_16_bits() {
    let (mut memory, mut system, mut gprs) = tasks();
    memory.bytes[NEW + 0x64] = 1;
    let done = switch(
        &mut memory,
        &mut system,
        &mut gprs,
        &task(0x30, Cause::Jump),
    );
    assert_eq!(done.unwrap().unwrap().event, Event::fault(Exception::Debug));
    assert_ne!(system.dr6 & DR6_TASK, 0);

    let (mut memory, mut system, mut gprs) = tasks();
    memory.descriptor(0x30, NEW as u32, 0x2B, 0x81);
    memory.bytes[NEW..NEW + 0x80].fill(0);
    for (at, value) in [(0x0E, 0x4000u16), (0x1A, 0x5000), (0x24, 8), (0x26, 0x10)] {
        memory.bytes[NEW + at..NEW + at + 2].copy_from_slice(&value.to_le_bytes());
    }
    let cause = Cause::Event {
        error_code: Some(7),
    };
    let done = switch(&mut memory, &mut system, &mut gprs, &task(0x30, cause));
    // The stack pointer's upper half is ones: a flat stack of 32 bits is not there.
    assert_eq!(done, Ok(Some(Fault::page(Gva(0xFFFF_4FFE), 0))));
    assert_eq!((system.rip, system.cr3), (0x4000, 0x6000));
    assert_eq!(gprs.rsp, 0xFFFF_5000);
}

proptest! {
    #[test]
    fn no_memory_makes_it_panic(
        bytes in proptest::collection::vec(any::<u8>(), 0x800),
        selector: u16,
        which in 0usize..5,
        hole: u16,
    ) {
        let (mut memory, mut system, mut gprs) = tasks();
        memory.bytes[0x2000..0x2800].copy_from_slice(&bytes);
        memory.bytes[0x3000..0x3400].copy_from_slice(&bytes[..0x400]);
        memory.hole = u64::from(hole) + 0x1900;
        let cause = [
            Cause::Call,
            Cause::Jump,
            Cause::Return,
            Cause::Event { error_code: Some(1) },
            Cause::SoftwareInterrupt { vector: 3 },
        ][which];
        let _ = switch(&mut memory, &mut system, &mut gprs, &task(selector & 0x3F, cause));
    }
}
