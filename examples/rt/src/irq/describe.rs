//! An exception in words.

use core::fmt;

use x86_64::registers::control::{Cr0, Cr2, Cr3, Cr4};

use super::TrapFrame;
use crate::cpu;

const PAGE_FAULT: u64 = 14;

/// The exceptions of Intel SDM vol. 3, table 7-1, and AMD APM vol. 2, table 8-1.
fn name(vector: u64) -> &'static str {
    match vector {
        0 => "division error",
        1 => "debug exception",
        2 => "non-maskable interrupt",
        3 => "breakpoint",
        4 => "overflow",
        5 => "bound range exceeded",
        6 => "invalid opcode",
        7 => "no math coprocessor",
        8 => "double fault",
        10 => "invalid TSS",
        11 => "segment not present",
        12 => "stack fault",
        13 => "general protection fault",
        PAGE_FAULT => "page fault",
        16 => "x87 floating-point error",
        17 => "alignment check",
        18 => "machine check",
        19 => "SIMD floating-point exception",
        20 => "virtualization exception",
        21 => "control protection exception",
        28 => "hypervisor injection exception",
        29 => "VMM communication exception",
        30 => "security exception",
        _ => "reserved exception",
    }
}

pub(super) struct Exception<'a> {
    frame: &'a TrapFrame,
    cpu: usize,
    cr0: u64,
    cr2: u64,
    cr3: u64,
    cr4: u64,
}

impl<'a> Exception<'a> {
    pub(super) fn of_this_cpu(frame: &'a TrapFrame) -> Self {
        Self {
            frame,
            cpu: cpu::current_id(),
            cr0: Cr0::read_raw(),
            cr2: Cr2::read_raw(),
            cr3: Cr3::read_raw().0.start_address().as_u64(),
            cr4: Cr4::read_raw(),
        }
    }
}

impl fmt::Display for Exception<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let frame = self.frame;
        write!(
            f,
            "{} (vector {}) on processor {}",
            name(frame.vector),
            frame.vector,
            self.cpu
        )?;
        if frame.vector == PAGE_FAULT {
            let code = frame.error_code;
            let access = match code {
                _ if code & 1 << 4 != 0 => "fetching from",
                _ if code & 1 << 1 != 0 => "writing to",
                _ => "reading from",
            };
            let why = match code {
                _ if code & 1 << 3 != 0 => "a reserved bit is set",
                _ if code & 1 << 0 != 0 => "not permitted",
                _ => "not mapped",
            };
            write!(f, ", {access} {:#x}: {why}", self.cr2)?;
        } else if frame.error_code != 0 {
            write!(f, ", error code {:#x}", frame.error_code)?;
        }
        writeln!(f)?;
        writeln!(f, "  rip {:016x}  rflags {:016x}", frame.rip, frame.rflags)?;
        let rows = [
            [
                ("rax", frame.rax),
                ("rbx", frame.rbx),
                ("rcx", frame.rcx),
                ("rdx", frame.rdx),
            ],
            [
                ("rsi", frame.rsi),
                ("rdi", frame.rdi),
                ("rbp", frame.rbp),
                ("rsp", frame.rsp),
            ],
            [
                ("r8 ", frame.r8),
                ("r9 ", frame.r9),
                ("r10", frame.r10),
                ("r11", frame.r11),
            ],
            [
                ("r12", frame.r12),
                ("r13", frame.r13),
                ("r14", frame.r14),
                ("r15", frame.r15),
            ],
            [
                ("cr0", self.cr0),
                ("cr2", self.cr2),
                ("cr3", self.cr3),
                ("cr4", self.cr4),
            ],
        ];
        for row in rows {
            for (name, value) in row {
                write!(f, "  {name} {value:016x}")?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::string::ToString;

    use super::*;

    #[test]
    fn a_page_fault_says_what_was_attempted() {
        // SAFETY: the frame is plain numbers, for which zero is a value.
        let mut frame: TrapFrame = unsafe { core::mem::zeroed() };
        frame.vector = 14;
        frame.error_code = 2;
        frame.rip = 0x20_1234;
        let text = Exception {
            frame: &frame,
            cpu: 1,
            cr0: 0,
            cr2: 0xdead_b000,
            cr3: 0,
            cr4: 0,
        }
        .to_string();
        assert!(text.starts_with(
            "page fault (vector 14) on processor 1, writing to 0xdeadb000: not mapped\n"
        ));
        assert!(text.contains("rip 0000000000201234"));
    }
}
