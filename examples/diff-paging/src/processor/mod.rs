//! The processors: each runs one access as a guest, and says how its second stage reports.

pub(crate) mod svm;
pub(crate) mod vmx;

use core::fmt;

use arrayvec::ArrayVec;
use testudo_arch::regs::SystemRegisters;
use testudo_arch::{Gpa, Gva, Hpa};
use testudo_ept::format::{Format, Rights};
use testudo_ept::guest_table::TableFault;
use testudo_ept::walk::{Access, GuestTranslation, Mode, PageFaultCode, TableUse};
use testudo_svm::exit::NestedFaultBits;
use testudo_vmx::exit::EptQualification;

use crate::case::Case;

/// What a processor offers to guests.
#[derive(Clone, Debug)]
pub(crate) struct Offers {
    pub(crate) modes: ArrayVec<Mode, 5>,
    pub(crate) physical_bits: u8,
    pub(crate) gigabyte_pages: bool,
    /// Bits of CR4 that guests may change here, of those that concern paging.
    pub(crate) cr4: u64,
    /// Bits that CR0 and CR4 must have.
    pub(crate) cr0_ones: u64,
    pub(crate) cr4_ones: u64,
    /// Bits of EFER that it must have.
    pub(crate) efer_ones: u64,
    /// The PDPTEs of PAE paging are registers, which the hypervisor loads.
    pub(crate) pdpte_registers: bool,
    /// Bits of the second stage's page entries that the format gives a meaning.
    pub(crate) stage_bits: u64,
    /// The second stage can have accessed and dirty bits as a choice.
    pub(crate) marks: bool,
    /// The second stage can have mode-based execute control.
    pub(crate) mode_based: bool,
    /// The second stage can have permissions for pieces of pages.
    pub(crate) sub_pages: bool,
}

/// How the guest starts.
#[derive(Clone, Debug)]
pub(crate) struct Start {
    pub(crate) system: SystemRegisters,
    pub(crate) rax: u64,
    pub(crate) rcx: u64,
    pub(crate) rdx: u64,
    pub(crate) pkru: Option<u32>,
    pub(crate) pkrs: Option<u32>,
    pub(crate) pdptes: Option<[u64; 4]>,
    /// Where the data lies in guest-physical memory, before any change.
    pub(crate) data: Gpa,
    /// The root of the second stage.
    pub(crate) stage: Hpa,
}

/// What became of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It was made: what is in AL then, or the second byte of the instruction that was fetched.
    Done { byte: u8 },
    /// An exception; `address` is that of a page fault.
    Exception { vector: u8, code: u32, address: u64 },
    /// AMD's nested page fault: EXITINFO1 and EXITINFO2.
    NestedFault { bits: u64, gpa: u64 },
    /// Intel's EPT violation.
    Violation {
        qualification: u64,
        gpa: u64,
        linear: u64,
    },
    /// Intel's EPT misconfiguration.
    Misconfiguration { gpa: u64 },
    /// Another exit.
    Other(u64),
}

impl Outcome {
    /// The outcome of this case, without what is left to processors: which of a descriptor's bytes
    /// they access.
    pub(crate) fn of(mut self, case: &Case) -> Self {
        if case.instruction.is_implicit() {
            match &mut self {
                Self::Exception { address, .. } => *address &= !7,
                Self::NestedFault { gpa, .. } | Self::Misconfiguration { gpa } => *gpa &= !7,
                Self::Violation { gpa, linear, .. } => (*gpa, *linear) = (*gpa & !7, *linear & !7),
                Self::Done { .. } | Self::Other(_) => {}
            }
        }
        self
    }
}

/// The names of the flags that are set.
struct Flags<'a, B>(&'a B);

impl<B: bitflags::Flags> fmt::Display for Flags<'_, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("none");
        }
        for (index, (name, _)) in self.0.iter_names().enumerate() {
            write!(f, "{}{name}", if index == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Done { byte } => write!(f, "done, {byte:#x}"),
            Self::Exception {
                vector: 14,
                code,
                address,
            } => {
                let code = PageFaultCode::from_bits_retain(*code);
                write!(f, "page fault at {address:#x}: {}", Flags(&code))
            }
            Self::Exception { vector, code, .. } => write!(f, "exception {vector}, code {code:#x}"),
            Self::NestedFault { bits, gpa } => {
                let bits = NestedFaultBits::from_bits_retain(*bits);
                write!(f, "nested page fault at {gpa:#x}: {}", Flags(&bits))
            }
            Self::Violation {
                qualification,
                gpa,
                linear,
            } => {
                let bits = EptQualification::from_bits_retain(*qualification);
                write!(
                    f,
                    "EPT violation at {gpa:#x}, linear {linear:#x}: {}",
                    Flags(&bits)
                )
            }
            Self::Misconfiguration { gpa } => write!(f, "EPT misconfiguration at {gpa:#x}"),
            Self::Other(reason) => write!(f, "exit {reason:#x}"),
        }
    }
}

/// What the second stage refused.
pub(crate) struct Refused<'a> {
    pub(crate) why: TableFault,
    pub(crate) gpa: Gpa,
    pub(crate) linear: Gva,
    pub(crate) access: Access,
    /// The page, if it was the access itself; else what the walk did with one of the guest's tables.
    pub(crate) at: Result<&'a GuestTranslation, TableUse>,
}

/// A processor with a second stage.
pub(crate) trait Processor {
    /// The format of the second stage.
    type Stage: Format<Input = Gpa>;

    fn offers(&self) -> &Offers;

    /// The second stage's format as a case wants it.
    fn stage(&self, case: &Case) -> Self::Stage;

    /// What the second stage must allow when a walk uses one of the guest's tables.
    fn table_rights(&self, case: &Case, table_use: TableUse) -> Rights;

    /// What it must allow for an access to the page that was found.
    fn page_rights(&self, access: Access, page: &GuestTranslation) -> Rights;

    /// Whether a write to this address is allowed although its small page, which has these flags, is
    /// not writable.
    fn allows_piece(&self, case: &Case, gpa: Gpa, flags: <Self::Stage as Format>::Flags) -> bool;

    /// How the second stage's refusal is reported. `None` if nothing is.
    fn report(&self, case: &Case, refused: &Refused<'_>) -> Option<Outcome>;

    /// Puts in place what a case wants beside its tables, before either side is asked.
    fn prepare(&mut self, case: &Case, start: &Start);

    /// Runs the access, without any translation from before.
    fn run(&mut self, case: &Case, start: &Start) -> Outcome;
}
