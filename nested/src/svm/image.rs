//! Which bytes of L1's control block are read and written, and when.
//!
//! L1's memory is touched only here. The lists are the reason why an entry costs a few dozen
//! loads rather than a copy of a page, and why an exit writes nothing that the processor would
//! not write (APM vol. 2, 15.5.1, 15.6 and table B-2).

#![allow(
    clippy::single_range_in_vec_init,
    reason = "these are lists of byte ranges"
)]

use core::ops::Range;

use testudo_arch::{Gpa, GuestMemory, MemoryFault};
use testudo_svm::Vmcb;

/// A list of byte ranges of a VMCB.
type Parts = [Range<usize>];

/// What VMRUN reads, and a few bytes between: whatever is read is only ever part of a copy.
const ENTRY: &Parts = &[
    0x000..0x018, // intercepts
    0x038..0x070, // pause filter, permission maps, TSC offset, ASID, virtual interrupts, shadow
    0x090..0x098, // NP_ENABLE
    0x0A8..0x0D0, // EVENTINJ, N_CR3, virtual extensions, clean bits, nRIP
    0x400..0x440, // ES, CS, SS, DS
    0x460..0x490, // GDTR, LDTR, IDTR
    0x4C8..0x4D8, // CPL, EFER
    0x548..0x580, // CR4, CR3, CR0, DR7, DR6, RFLAGS, RIP
    0x5D8..0x600, // RSP to RAX
    0x640..0x648, // CR2
    0x668..0x670, // G_PAT
];

/// What #VMEXIT writes, and no byte more.
const EXIT: &Parts = &[
    0x060..0x090, // virtual interrupts, shadow, EXITCODE, EXITINFO1, EXITINFO2, EXITINTINFO
    0x0A8..0x0B0, // EVENTINJ
    0x400..0x440, // ES, CS, SS, DS
    0x460..0x470, // GDTR
    0x480..0x490, // IDTR
    0x4CB..0x4CC, // CPL
    0x4D0..0x4D8, // EFER
    0x548..0x580, // CR4, CR3, CR0, DR7, DR6, RFLAGS, RIP
    0x5D8..0x5E0, // RSP
    0x5F8..0x600, // RAX
    0x640..0x648, // CR2
];

/// What #VMEXIT writes when the entry failed: why, and that no event is left.
const FAILED: &Parts = &[0x070..0x090];

/// nRIP and the instruction bytes, where L1 was told of either feature.
const ASSISTS: &Parts = &[0x0C8..0x0E0];

/// With G_PAT, which is L2's own only with nested paging. (Most have it, and a second access to L1's memory for
/// these eight bytes is a dozen instructions.)
const EXIT_AND_PAT: &Parts = &[
    0x060..0x090,
    0x0A8..0x0B0,
    0x400..0x440,
    0x460..0x470,
    0x480..0x490,
    0x4CB..0x4CC,
    0x4D0..0x4D8,
    0x548..0x580,
    0x5D8..0x5E0,
    0x5F8..0x600,
    0x640..0x648,
    0x668..0x670,
];

/// That there is only one difference between the two.
const _: () = {
    let mut i = 0;
    while i < EXIT.len() {
        assert!(EXIT[i].start == EXIT_AND_PAT[i].start && EXIT[i].end == EXIT_AND_PAT[i].end);
        i += 1;
    }
    assert!(EXIT_AND_PAT.len() == i + 1 && EXIT_AND_PAT[i].start == 0x668);
};

/// DBGCTL and the last branch and exception, with LBR virtualization.
const LBR: &Parts = &[0x670..0x698];

/// What VMLOAD reads and VMSAVE writes (APM vol. 3, VMLOAD): FS, GS, LDTR, TR with their hidden
/// parts, KernelGSBase, STAR, LSTAR, CSTAR, SFMASK and the SYSENTER registers.
const RESIDENT: &Parts = &[0x440..0x460, 0x470..0x480, 0x490..0x4A0, 0x600..0x640];

#[inline(always)]
fn bytes(vmcb: &Vmcb) -> &[u8; 4096] {
    zerocopy::transmute_ref!(vmcb)
}

#[inline(always)]
fn bytes_mut(vmcb: &mut Vmcb) -> &mut [u8; 4096] {
    zerocopy::transmute_mut!(vmcb)
}

/// Copies byte ranges from one VMCB to another, without a word about clean bits.
#[inline(always)]
fn copy<const N: usize>(from: &Vmcb, to: &mut Vmcb, parts: [Range<usize>; N]) {
    let (from, to) = (bytes(from), bytes_mut(to));
    for part in parts {
        to[part.clone()].copy_from_slice(&from[part]);
    }
}

/// Takes the copy of L1's control block that an entry works with.
#[inline]
pub(super) fn read_entry(
    memory: &impl GuestMemory,
    at: Gpa,
    copy: &mut Vmcb,
    lbr: bool,
) -> Result<(), MemoryFault> {
    memory.read_parts(at, bytes_mut(copy), ENTRY)?;
    if lbr {
        memory.read_parts(at, bytes_mut(copy), LBR)?;
    }
    Ok(())
}

/// Which optional fields an exit writes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ExitFields {
    pub(super) assists: bool,
    pub(super) pat: bool,
    pub(super) lbr: bool,
}

/// Writes back what #VMEXIT writes, from a VMCB that has it at the same places.
#[inline]
pub(super) fn write_exit(
    memory: &impl GuestMemory,
    at: Gpa,
    from: &Vmcb,
    fields: ExitFields,
) -> Result<(), MemoryFault> {
    if fields.pat {
        memory.write_parts(at, bytes(from), EXIT_AND_PAT)?;
    } else {
        memory.write_parts(at, bytes(from), EXIT)?;
    }
    if fields.assists {
        memory.write_parts(at, bytes(from), ASSISTS)?;
    }
    if fields.lbr {
        memory.write_parts(at, bytes(from), LBR)?;
    }
    Ok(())
}

/// Writes back what #VMEXIT writes after a failed entry.
pub(super) fn write_failed(
    memory: &impl GuestMemory,
    at: Gpa,
    from: &Vmcb,
) -> Result<(), MemoryFault> {
    memory.write_parts(at, bytes(from), FAILED)
}

/// VMLOAD: from memory into the VMCB that the processor will load it from.
#[inline]
pub(super) fn vmload(memory: &impl GuestMemory, at: Gpa, to: &mut Vmcb) -> Result<(), MemoryFault> {
    memory.read_parts(at, bytes_mut(to), RESIDENT)
}

/// VMSAVE: from the VMCB that the processor saved it to into memory.
#[inline]
pub(super) fn vmsave(memory: &impl GuestMemory, at: Gpa, from: &Vmcb) -> Result<(), MemoryFault> {
    memory.write_parts(at, bytes(from), RESIDENT)
}

/// Hands on the registers that neither VMRUN nor #VMEXIT touches: on the processor they simply
/// stay where they are when worlds change.
#[inline]
pub(super) fn copy_resident(from: &Vmcb, to: &mut Vmcb) {
    copy(
        from,
        to,
        [0x440..0x460, 0x470..0x480, 0x490..0x4A0, 0x600..0x640],
    );
}

/// All registers that VMRUN loads and #VMEXIT saves.
pub(super) fn copy_own_state(from: &Vmcb, to: &mut Vmcb) {
    copy_segments(from, to);
    copy_descriptor_tables(from, to);
    copy_control_registers(from, to);
    copy_debug_registers(from, to);
    copy_flow(from, to);
    copy(
        from,
        to,
        [0x5D8..0x5E0, 0x5F8..0x600, 0x640..0x648, 0x668..0x670],
    );
}

/// ES, CS, SS, DS and the CPL.
#[inline]
pub(super) fn copy_segments(from: &Vmcb, to: &mut Vmcb) {
    copy(from, to, [0x400..0x440, 0x4CB..0x4CC]);
}

/// GDTR and IDTR.
#[inline]
pub(super) fn copy_descriptor_tables(from: &Vmcb, to: &mut Vmcb) {
    copy(from, to, [0x460..0x470, 0x480..0x490]);
}

/// EFER, CR4, CR3 and CR0.
#[inline]
pub(super) fn copy_control_registers(from: &Vmcb, to: &mut Vmcb) {
    copy(from, to, [0x4D0..0x4D8, 0x548..0x560]);
}

/// DR7 and DR6.
#[inline]
pub(super) fn copy_debug_registers(from: &Vmcb, to: &mut Vmcb) {
    copy(from, to, [0x560..0x570]);
}

/// RFLAGS and RIP.
#[inline]
pub(super) fn copy_flow(from: &Vmcb, to: &mut Vmcb) {
    copy(from, to, [0x570..0x580]);
}

/// DBGCTL and the last branch and exception.
#[inline]
pub(super) fn copy_lbr(from: &Vmcb, to: &mut Vmcb) {
    copy(from, to, [0x670..0x698]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::vec::Vec;

    fn names(parts: &Parts) -> BTreeSet<&'static str> {
        Vmcb::FIELDS
            .iter()
            .filter(|f| {
                let (start, end) = (usize::from(f.offset), usize::from(f.offset + f.size));
                parts.iter().any(|p| p.start <= start && end <= p.end)
            })
            .map(|f| f.name)
            .collect()
    }

    #[test]
    fn an_exit_writes_what_the_manual_lists() {
        // APM vol. 2, 15.6: the guest state that #VMEXIT saves, the exit information, and what the
        // processor updates in the control area (15.21.4, 15.7.2, 15.20).
        let expected = [
            "virtual_interrupts",
            "interrupt_state",
            "exit_code",
            "exit_info1",
            "exit_info2",
            "exit_int_info",
            "event_inj",
            "cpl",
            "efer",
            "cr4",
            "cr3",
            "cr0",
            "dr7",
            "dr6",
            "rflags",
            "rip",
            "rsp",
            "rax",
            "cr2",
        ];
        assert_eq!(names(EXIT), expected.into_iter().collect());
        let bytes: usize = EXIT.iter().map(Range::len).sum();
        // The fields above, and six segment registers of sixteen bytes: nothing beside them.
        let fields = Vmcb::FIELDS.iter().filter(|f| expected.contains(&f.name));
        let sizes: usize = fields.map(|f| usize::from(f.size)).sum();
        assert_eq!(bytes, sizes + 6 * 16);
    }

    #[test]
    fn vmload_and_vmsave_move_what_the_manual_lists() {
        let expected = [
            "kernel_gs_base",
            "star",
            "lstar",
            "cstar",
            "sfmask",
            "sysenter_cs",
            "sysenter_esp",
            "sysenter_eip",
        ];
        assert_eq!(names(RESIDENT), expected.into_iter().collect());
        let bytes: usize = RESIDENT.iter().map(Range::len).sum();
        assert_eq!(bytes, 8 * 8 + 4 * 16);
    }

    #[test]
    fn an_entry_reads_all_that_an_exit_writes_back() {
        let entry = names(ENTRY);
        let exit_information = ["exit_code", "exit_info1", "exit_info2", "exit_int_info"];
        let missing: Vec<_> = names(EXIT)
            .into_iter()
            .filter(|n| !entry.contains(n) && !exit_information.contains(n))
            .collect();
        assert_eq!(missing, Vec::<&str>::new());
    }
}
