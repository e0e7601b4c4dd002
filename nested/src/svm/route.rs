//! Whose an exit of L2 is: L1's, if L1 asked for it, and L0's otherwise (APM vol. 2, 15.7 and
//! 15.9).

use testudo_arch::{Gpa, GuestMemory, Msr};
use testudo_svm::Vmcb;
use testudo_svm::exit::ExitCode;
use testudo_svm::intercept::{CrIntercepts, Misc1};

use super::maps;

/// Who handles an exit of L2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// L0 handles it: L1 did not ask for it, or it is the host's business.
    L0,
    /// L1 sees an exit with this code.
    L1(ExitCode),
    /// A nested page fault under L1's own nested page table: the composition decides.
    SecondStage,
}

/// An exit as the processor reports it, and the one register that a permission map is looked up by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawExit {
    /// EXITCODE.
    pub code: ExitCode,
    /// EXITINFO1.
    pub info1: u64,
    /// RCX of L2: the number of an MSR.
    pub rcx: u64,
}

/// Whose this exit of L2 is.
///
/// `vmcb12` is L0's copy of L1's control block, and `l0_window` says that L0 itself asked for
/// the exit at the interrupt window. Permission maps are looked up in L1's memory as the processor
/// would, at the time of the access.
pub fn route<M: GuestMemory>(exit: &RawExit, vmcb12: &Vmcb, l0_window: bool, memory: &M) -> Route {
    let code = exit.code;
    let intercepts = vmcb12.intercepts();
    let asked = intercepts.contains(code);
    let l1_if = |wanted: bool| if wanted { Route::L1(code) } else { Route::L0 };
    match code {
        // Physical events are the host's. Whether L1's own interrupt controller has something for
        // L1 is another question, asked before each entry.
        ExitCode::INTR | ExitCode::NMI | ExitCode::SMI | ExitCode::INIT => Route::L0,
        // A machine check is news of the host's hardware.
        MACHINE_CHECK => Route::L0,
        ExitCode::VINTR => l1_if(asked && !l0_window),
        ExitCode::IOIO => l1_if(asked && port_wanted(exit, vmcb12, memory)),
        ExitCode::MSR => l1_if(asked && msr_wanted(exit, vmcb12, memory)),
        // Only L0 saw the write as such, and L1 wants those that change more than TS and MP. What
        // it changes is not known here; L1 sees a few too many rather than one too few.
        WRITE_CR0 if !asked && intercepts.misc1.contains(Misc1::CR0_SELECTIVE_WRITE) => {
            Route::L1(ExitCode::CR0_SEL_WRITE)
        }
        // The reverse: only L0 asked for the selective exit, and L1 wants all writes.
        ExitCode::CR0_SEL_WRITE if !asked && intercepts.cr.contains(CrIntercepts::WRITE_CR0) => {
            Route::L1(WRITE_CR0)
        }
        ExitCode::NPF if is_nested_paging(vmcb12) => Route::SecondStage,
        // The checks let it pass and the processor did not: L1's state is at fault.
        code if code.is_failed_entry() => Route::L1(ExitCode::INVALID),
        // Everything else has one bit. Exits without a bit are L0's: nested page faults under
        // L0's table, AVIC, and what future processors bring, which L1 cannot have asked for.
        _ => l1_if(asked),
    }
}

const MACHINE_CHECK: ExitCode = ExitCode(0x40 + 18);
const WRITE_CR0: ExitCode = ExitCode(0x10);

/// Whether L2 runs under a nested page table of L1's.
#[inline]
pub(super) fn is_nested_paging(vmcb12: &Vmcb) -> bool {
    use testudo_svm::vmcb::NestedControl;
    vmcb12.nested_control().contains(NestedControl::NP_ENABLE)
}

/// The low twelve bits of a permission map's address do not count (APM vol. 2, 15.10.1, 15.11).
fn map_address(raw: u64) -> Gpa {
    Gpa(raw & !0xFFF)
}

fn port_wanted<M: GuestMemory>(exit: &RawExit, vmcb12: &Vmcb, memory: &M) -> bool {
    let size = ((exit.info1 >> 4) & 7) as u8;
    let port = (exit.info1 >> 16) as u16;
    maps::port_is_intercepted(memory, map_address(vmcb12.iopm_base_pa()), port, size)
}

fn msr_wanted<M: GuestMemory>(exit: &RawExit, vmcb12: &Vmcb, memory: &M) -> bool {
    let write = exit.info1 & 1 != 0;
    let map = map_address(vmcb12.msrpm_base_pa());
    maps::msr_is_intercepted(memory, map, Msr(exit.rcx as u32), write)
}
