//! Hardware task switches, for a processor that leaves them to the hypervisor (SDM vol. 3A, 8.2 and
//! 8.3; vol. 3C, 28.4.2).
//!
//! [`switch`] does what a far CALL or JMP to a TSS, IRET in a nested task, or a task gate in the IDT
//! does: it saves the old task, marks both, loads the new one, and checks what it loads. A fault
//! before the new task is loaded belongs to the old one, which is then as it was; a later one is
//! the new task's first.

use testudo_arch::segment::SegmentAttributes as A;
use testudo_arch::{Cr0Flags, Event, Exception, Gprs, Gva, RFlags, Segment, regs::SystemRegisters};

use super::Fault;

/// Linear memory as the processor itself accesses it, whatever the CPL. An access is done as a
/// whole or faults as a whole.
pub trait TaskMemory {
    /// Reads.
    ///
    /// # Errors
    ///
    /// The page fault.
    fn read(&mut self, address: Gva, data: &mut [u8]) -> Result<(), Fault>;

    /// Writes.
    ///
    /// # Errors
    ///
    /// The page fault.
    fn write(&mut self, address: Gva, data: &[u8]) -> Result<(), Fault>;

    /// Translates by other tables from here on.
    fn set_cr3(&mut self, cr3: u64);
}

/// What switches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// A far CALL.
    Call,
    /// A far JMP.
    Jump,
    /// IRET with RFLAGS.NT.
    Return,
    /// An exception, an interrupt or INT1, with the error code for the new task's stack.
    Event {
        /// The error code.
        error_code: Option<u32>,
    },
    /// INT n, INT3 or INTO, which need the gate's privilege.
    SoftwareInterrupt {
        /// The vector.
        vector: u8,
    },
}

/// A task switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TaskSwitch {
    /// The new task's TSS.
    pub selector: u16,
    /// What switches.
    pub cause: Cause,
}

/// A TSS or segment descriptor.
#[derive(Clone, Copy)]
struct Descriptor {
    at: Gva,
    raw: u64,
}

impl Descriptor {
    fn attributes(self) -> A {
        A::from_bits_retain((self.raw >> 40) as u32 & 0xF0FF)
    }

    fn base(self) -> u64 {
        (self.raw >> 16) & 0xFF_FFFF | (self.raw >> 32) & 0xFF00_0000
    }

    fn limit(self) -> u32 {
        let raw = (self.raw & 0xFFFF) as u32 | (self.raw >> 32) as u32 & 0xF_0000;
        if self.attributes().contains(A::GRANULARITY) {
            raw << 12 | 0xFFF
        } else {
            raw
        }
    }

    fn segment(self, selector: u16) -> Segment {
        Segment {
            selector,
            attributes: self.attributes(),
            limit: self.limit(),
            base: self.base(),
        }
    }
}

/// Type bit 1 of a TSS: busy. Type bit 3: of 32 bits.
const BUSY: u32 = 1 << 1;
const WIDE: u8 = 1 << 3;
const NESTED: u64 = RFlags::NESTED_TASK.bits();
const VIRTUAL_8086: u64 = RFlags::VIRTUAL_8086_MODE.bits();
/// DR6: the new task's TSS has its T bit set.
const DR6_TASK: u64 = 1 << 15;
/// The flags that a TSS may set.
const FLAGS: u64 = 0x003F_7FD5;

fn fault(exception: Exception, selector: u16) -> Fault {
    Fault {
        event: Event::fault_with(exception, u32::from(selector & !3)),
        cr2: None,
    }
}

fn task_fault(selector: u16) -> Fault {
    fault(Exception::InvalidTss, selector)
}

/// Switches tasks. `system.rip` is what the old task continues at: past the instruction, but for
/// events.
///
/// # Errors
///
/// The old task's fault; nothing has changed but marks in memory that are made again. `Ok(Some)` is
/// the new task's fault or trap.
pub fn switch(
    memory: &mut impl TaskMemory,
    system: &mut SystemRegisters,
    gprs: &mut Gprs,
    request: &TaskSwitch,
) -> Result<Option<Fault>, Fault> {
    let TaskSwitch { selector, cause } = *request;
    if let Cause::SoftwareInterrupt { vector } = cause {
        check_gate(memory, system, vector)?;
    }
    let returns = cause == Cause::Return;
    let target = find_task(memory, system, selector, returns)?;
    let nests = !returns && cause != Cause::Jump;
    let (old, wide) = (system.tr, target.attributes().segment_type() & WIDE != 0);

    // Read as a whole before anything takes effect.
    let base = Gva(target.base());
    let mut image = [0; WIDE_TSS];
    let len = if wide { WIDE_TSS } else { NARROW_TSS };
    memory.read(base, &mut image[..len])?;
    let mut flags = system.rflags;
    if returns {
        flags &= !NESTED;
    }
    save(memory, system, gprs, flags)?;
    if !nests {
        let at = table_entry(system.gdtr.base, old.selector);
        mark(memory, at, 0, BUSY)?;
    }
    if nests {
        memory.write(base, &old.selector.to_le_bytes())?;
    }
    if !returns {
        mark(memory, target.at, BUSY, 0)?;
    }
    let mut tr = target.segment(selector);
    tr.attributes |= A::from_bits_retain(BUSY);
    system.tr = tr;
    system.cr0 |= Cr0Flags::TASK_SWITCHED.bits();
    let selectors = load(memory, system, gprs, &image, wide);
    if nests {
        system.rflags |= NESTED;
    }
    // Breakpoints that are local to the old task (SDM vol. 3B, 18.2.4).
    system.dr7 &= !0x155;
    let first = enter(memory, system, gprs, &selectors, cause, wide).err();
    let traps = wide && image[0x64] & 1 != 0;
    Ok(match first {
        None if traps => {
            system.dr6 |= DR6_TASK;
            let event = Event::fault(Exception::Debug);
            Some(Fault { event, cr2: None })
        }
        other => other,
    })
}

/// INT n reaches a task gate only at its privilege or above.
fn check_gate(
    memory: &mut impl TaskMemory,
    system: &SystemRegisters,
    vector: u8,
) -> Result<(), Fault> {
    let mut gate = [0; 8];
    let at = Gva(system.idtr.base.wrapping_add(8 * u64::from(vector)) & 0xFFFF_FFFF);
    memory.read(at, &mut gate)?;
    let dpl = (gate[5] >> 5) & 3;
    if system.cpl() > dpl {
        // The error code names the IDT's entry.
        let code = u32::from(vector) << 3 | 2;
        let event = Event::fault_with(Exception::GeneralProtection, code);
        return Err(Fault { event, cr2: None });
    }
    Ok(())
}

fn table_entry(base: u64, selector: u16) -> Gva {
    Gva(base.wrapping_add(u64::from(selector & !7)) & 0xFFFF_FFFF)
}

/// The descriptor that a selector names, if there is one.
fn descriptor(
    memory: &mut impl TaskMemory,
    system: &SystemRegisters,
    selector: u16,
) -> Result<Option<Descriptor>, Fault> {
    let local = selector & 4 != 0;
    let (base, limit) = if local {
        let usable = !system.ldtr.attributes.contains(A::UNUSABLE)
            && system.ldtr.attributes.contains(A::PRESENT);
        if !usable {
            return Ok(None);
        }
        (system.ldtr.base, system.ldtr.limit)
    } else {
        (system.gdtr.base, system.gdtr.limit.into())
    };
    if u32::from(selector | 7) > limit {
        return Ok(None);
    }
    let at = table_entry(base, selector);
    let mut raw = [0; 8];
    memory.read(at, &mut raw)?;
    let raw = u64::from_le_bytes(raw);
    Ok(Some(Descriptor { at, raw }))
}

/// The new task's TSS: in the GDT, of the right kind, present, and large enough.
fn find_task(
    memory: &mut impl TaskMemory,
    system: &SystemRegisters,
    selector: u16,
    returns: bool,
) -> Result<Descriptor, Fault> {
    let wrong = if returns {
        Exception::InvalidTss
    } else {
        Exception::GeneralProtection
    };
    let found = if selector & 4 == 0 && selector > 3 {
        descriptor(memory, system, selector)?
    } else {
        None
    };
    let found = found.ok_or_else(|| fault(wrong, selector))?;
    let attributes = found.attributes();
    let kind = attributes.segment_type() & !WIDE;
    // Type 1 is available, 3 busy.
    let expected = if returns { 3 } else { 1 };
    if attributes.contains(A::CODE_OR_DATA) || kind != expected {
        return Err(fault(wrong, selector));
    }
    if !attributes.contains(A::PRESENT) {
        return Err(fault(Exception::SegmentNotPresent, selector));
    }
    let wide = attributes.segment_type() & WIDE != 0;
    let least = if wide { 0x67 } else { 0x2B };
    if found.limit() < least {
        return Err(task_fault(selector));
    }
    Ok(found)
}

/// Sets and clears bits of a descriptor's attributes.
fn mark(memory: &mut impl TaskMemory, at: Gva, set: u32, clear: u32) -> Result<(), Fault> {
    let at = at.wrapping_add(5);
    let mut byte = [0];
    memory.read(at, &mut byte)?;
    byte[0] = byte[0] & !(clear as u8) | set as u8;
    memory.write(at, &byte)
}

/// What is read of a TSS of 32 and of 16 bits.
const WIDE_TSS: usize = 0x68;
const NARROW_TSS: usize = 0x2C;

/// The general registers in a TSS's order.
fn general(gprs: &mut Gprs) -> [&mut u64; 8] {
    let Gprs {
        rax,
        rcx,
        rdx,
        rbx,
        rsp,
        rbp,
        rsi,
        rdi,
        ..
    } = gprs;
    [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi]
}

/// Saves the old task in its own TSS, whose form is its own.
fn save(
    memory: &mut impl TaskMemory,
    system: &SystemRegisters,
    gprs: &mut Gprs,
    flags: u64,
) -> Result<(), Fault> {
    let base = system.tr.base;
    let wide = system.tr.attributes.segment_type() & WIDE != 0;
    let (unit, start) = if wide { (4, 0x20) } else { (2, 0x0E) };
    let mut bytes = [0; 0x40];
    let mut at = 0;
    let mut put = |value: u64| {
        bytes[at..at + unit].copy_from_slice(&value.to_le_bytes()[..unit]);
        at += unit;
    };
    put(system.rip);
    put(flags);
    for register in general(gprs) {
        put(*register);
    }
    let all = [
        &system.es, &system.cs, &system.ss, &system.ds, &system.fs, &system.gs,
    ];
    for segment in &all[..if wide { 6 } else { 4 }] {
        put(segment.selector.into());
    }
    memory.write(Gva(base.wrapping_add(start)), &bytes[..at])
}

/// The selectors of the new task: ES, CS, SS, DS, FS, GS, LDT.
struct Selectors([u16; 7]);

/// Loads what needs no check: CR3, RIP, flags, general registers, and the selectors.
fn load(
    memory: &mut impl TaskMemory,
    system: &mut SystemRegisters,
    gprs: &mut Gprs,
    image: &[u8; WIDE_TSS],
    wide: bool,
) -> Selectors {
    let word = |at: usize| u16::from_le_bytes([image[at], image[at + 1]]);
    let double = |at: usize| u64::from(word(at)) | u64::from(word(at + 2)) << 16;
    let mut selectors = [0; 7];
    if wide {
        if system.cr0 & Cr0Flags::PAGING.bits() != 0 {
            system.cr3 = double(0x1C);
            memory.set_cr3(system.cr3);
        }
        system.rip = double(0x20);
        system.rflags = double(0x24) & FLAGS | 2;
        for (i, register) in general(gprs).into_iter().enumerate() {
            *register = double(0x28 + 4 * i);
        }
        selectors = core::array::from_fn(|i| word(0x48 + 4 * i));
    } else {
        system.rip = word(0x0E).into();
        system.rflags = u64::from(word(0x10)) & FLAGS | 2;
        for (i, register) in general(gprs).into_iter().enumerate() {
            // The upper halves stay undefined; they keep ones, as the 80286's registers look.
            *register = 0xFFFF_0000 | u64::from(word(0x12 + 2 * i));
        }
        selectors[..4].copy_from_slice(&[0x22, 0x24, 0x26, 0x28].map(word));
        selectors[6] = word(0x2A);
    }
    Selectors(selectors)
}

fn unusable(selector: u16) -> Segment {
    Segment {
        selector,
        attributes: A::UNUSABLE,
        ..Segment::default()
    }
}

/// Loads and checks the new task's segments, and pushes the error code.
fn enter(
    memory: &mut impl TaskMemory,
    system: &mut SystemRegisters,
    gprs: &mut Gprs,
    Selectors(selectors): &Selectors,
    cause: Cause,
    wide: bool,
) -> Result<(), Fault> {
    let [es, cs, ss, ds, fs, gs, ldt] = *selectors;
    // None of the old task's segments is left in the new one, whatever fails.
    let real = system.rflags & VIRTUAL_8086 != 0;
    let initial = |selector| {
        if real {
            Segment::real_mode(selector, A::from_bits_retain(0xF3))
        } else {
            unusable(selector)
        }
    };
    let cpl = if real { 3 } else { (cs & 3) as u8 };
    [system.es, system.ds, system.fs, system.gs] = [es, ds, fs, gs].map(initial);
    (system.ss, system.ldtr) = (initial(ss), unusable(ldt));
    system.ss.attributes |= A::empty().with_dpl(cpl);
    system.cs = if real {
        initial(cs)
    } else {
        // Flat until it is loaded: there is no unusable CS.
        Segment::flat(cs, A::CODE32.with_dpl(cpl))
    };
    system.ldtr = local_table(memory, system, ldt)?;
    if !real {
        system.cs = code(memory, system, cs)?;
        system.ss = stack(memory, system, ss, cpl)?;
        system.ds = data(memory, system, ds, cpl)?;
        system.es = data(memory, system, es, cpl)?;
        system.fs = data(memory, system, fs, cpl)?;
        system.gs = data(memory, system, gs, cpl)?;
    }
    if let Cause::Event {
        error_code: Some(code),
    } = cause
    {
        push(memory, system, gprs, code, wide)?;
    }
    if system.rip > u64::from(system.cs.limit) {
        return Err(Fault::GP0);
    }
    Ok(())
}

fn local_table(
    memory: &mut impl TaskMemory,
    system: &SystemRegisters,
    selector: u16,
) -> Result<Segment, Fault> {
    if selector & !3 == 0 {
        return Ok(unusable(selector));
    }
    let found = if selector & 4 == 0 {
        descriptor(memory, system, selector)?
    } else {
        None
    };
    match found {
        Some(found)
            if found.attributes() & (A::CODE_OR_DATA | A::from_bits_retain(0xF))
                == A::from_bits_retain(2)
                && found.attributes().contains(A::PRESENT) =>
        {
            Ok(found.segment(selector))
        }
        _ => Err(task_fault(selector)),
    }
}

/// A code or data segment that is there: its descriptor, marked as accessed.
fn accessed(
    memory: &mut impl TaskMemory,
    found: Descriptor,
    selector: u16,
) -> Result<Segment, Fault> {
    if !found.attributes().contains(A::ACCESSED) {
        mark(memory, found.at, A::ACCESSED.bits(), 0)?;
    }
    let mut segment = found.segment(selector);
    segment.attributes |= A::ACCESSED;
    Ok(segment)
}

fn ordinary(
    memory: &mut impl TaskMemory,
    system: &SystemRegisters,
    selector: u16,
) -> Result<Descriptor, Fault> {
    let found = if selector & !3 == 0 {
        None
    } else {
        descriptor(memory, system, selector)?
    };
    found
        .filter(|found| found.attributes().contains(A::CODE_OR_DATA))
        .ok_or(task_fault(selector))
}

fn code(
    memory: &mut impl TaskMemory,
    system: &SystemRegisters,
    selector: u16,
) -> Result<Segment, Fault> {
    let found = ordinary(memory, system, selector)?;
    let (attributes, rpl) = (found.attributes(), (selector & 3) as u8);
    let fits = if attributes.contains(A::CONFORMING) {
        attributes.dpl() <= rpl
    } else {
        attributes.dpl() == rpl
    };
    if !attributes.contains(A::CODE) || !fits {
        return Err(task_fault(selector));
    }
    if !attributes.contains(A::PRESENT) {
        return Err(fault(Exception::SegmentNotPresent, selector));
    }
    accessed(memory, found, selector)
}

fn stack(
    memory: &mut impl TaskMemory,
    system: &SystemRegisters,
    selector: u16,
    cpl: u8,
) -> Result<Segment, Fault> {
    let found = ordinary(memory, system, selector)?;
    let attributes = found.attributes();
    let writable = attributes & (A::CODE | A::WRITABLE) == A::WRITABLE;
    if !writable || attributes.dpl() != cpl || (selector & 3) as u8 != cpl {
        return Err(task_fault(selector));
    }
    if !attributes.contains(A::PRESENT) {
        return Err(fault(Exception::StackFault, selector));
    }
    accessed(memory, found, selector)
}

fn data(
    memory: &mut impl TaskMemory,
    system: &SystemRegisters,
    selector: u16,
    cpl: u8,
) -> Result<Segment, Fault> {
    if selector & !3 == 0 {
        return Ok(unusable(selector));
    }
    let found = ordinary(memory, system, selector)?;
    let attributes = found.attributes();
    let readable = !attributes.contains(A::CODE) || attributes.contains(A::WRITABLE);
    let conforming = attributes.contains(A::CODE | A::CONFORMING);
    let least = cpl.max((selector & 3) as u8);
    if !readable || !conforming && attributes.dpl() < least {
        return Err(task_fault(selector));
    }
    if !attributes.contains(A::PRESENT) {
        return Err(fault(Exception::SegmentNotPresent, selector));
    }
    accessed(memory, found, selector)
}

/// Pushes the error code, as wide as the TSS.
fn push(
    memory: &mut impl TaskMemory,
    system: &SystemRegisters,
    gprs: &mut Gprs,
    code: u32,
    wide: bool,
) -> Result<(), Fault> {
    let len: u64 = if wide { 4 } else { 2 };
    let mask = if system.ss.attributes.contains(A::DEFAULT_BIG) {
        0xFFFF_FFFF
    } else {
        0xFFFF
    };
    let top = gprs.rsp.wrapping_sub(len) & mask;
    let last = top + len - 1;
    let limit = u64::from(system.ss.limit);
    let down = system.ss.attributes.contains(A::CONFORMING);
    let inside = if down {
        top > limit && last <= mask
    } else {
        last <= limit
    };
    if !inside {
        return Err(Fault::SS0);
    }
    let at = Gva(system.ss.base.wrapping_add(top) & 0xFFFF_FFFF);
    memory.write(at, &code.to_le_bytes()[..len as usize])?;
    gprs.rsp = gprs.rsp & !mask | top;
    Ok(())
}

#[cfg(test)]
mod tests;
