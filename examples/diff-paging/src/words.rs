//! A case as entries in memory.

use arrayvec::ArrayVec;
use testudo_arch::Gpa;
use testudo_ept::walk::PagingState;

use crate::processor::Start;

/// Whose an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    Guest(u8),
    Data(u8),
    Table(u8),
    /// PAE paging's entry on the way to the code, which some emulators change.
    Code,
    /// No entry: what the access is to.
    Content,
}

/// A word that a case sets and that an access may change.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Word {
    pub(crate) owner: Owner,
    pub(crate) at: Gpa,
    pub(crate) value: u64,
    /// Four bytes rather than eight.
    pub(crate) narrow: bool,
}

/// The words of a case.
pub(crate) type Words = ArrayVec<Word, 20>;
/// Their values at some time.
pub(crate) type Values = ArrayVec<u64, 20>;

/// A case, ready to run.
pub(crate) struct Prepared {
    pub(crate) start: Start,
    pub(crate) paging: PagingState,
    /// Where the instruction lies, and the linear address that it accesses.
    pub(crate) code: u64,
    pub(crate) target: u64,
    pub(crate) words: Words,
}
