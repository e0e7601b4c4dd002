//! A VMCS for tests: it remembers every access, can lack fields, and fails on demand.

use core::cell::RefCell;

use arrayvec::ArrayVec;

use crate::caps::VmxCaps;
use crate::encoding::{Area, Encoding};
use crate::error::{InstructionError, VmFail};
use crate::image::VmcsImage;
use crate::vmcs::{VmcsRead, VmcsWrite};

/// One access to a [`FakeVmcs`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trace {
    /// VMREAD of the field.
    Read(Encoding),
    /// VMWRITE of the value to the field.
    Write(Encoding, u64),
}

/// A VMCS that stands in for the processor's in tests.
///
/// ```
/// use testudo_vmx::fake::{FakeVmcs, Trace};
/// use testudo_vmx::{VmFail, VmcsRead, VmcsWrite, fields};
///
/// let mut vmcs = FakeVmcs::new();
/// vmcs.set(fields::GUEST_RSP, 8).unwrap();
/// assert_eq!(vmcs.trace()[..], [Trace::Write(fields::GUEST_RSP.encoding(), 8)]);
///
/// vmcs.fail(fields::GUEST_RSP, VmFail::Invalid);
/// assert!(vmcs.get(fields::GUEST_RSP).is_err());
/// ```
#[derive(Clone, Debug, Default)]
pub struct FakeVmcs {
    image: VmcsImage,
    trace: RefCell<ArrayVec<Trace, { FakeVmcs::MAX_TRACE }>>,
    failing: ArrayVec<(Encoding, VmFail), 16>,
    missing: ArrayVec<Encoding, 256>,
    refuse_exit_information: bool,
}

impl FakeVmcs {
    /// How many accesses are remembered; later ones leave no trace.
    pub const MAX_TRACE: usize = 256;

    /// A VMCS with every field of the table, all zero, that accepts every write.
    pub fn new() -> Self {
        Self::default()
    }

    /// A VMCS with the fields that a processor with these capabilities has, and its refusal to
    /// write VM-exit information if it has that too.
    pub fn with_caps(caps: &VmxCaps) -> Self {
        let absent = crate::fields::FIELDS.iter().filter(|f| !f.exists(caps));
        Self {
            missing: absent.map(|f| f.encoding).take(256).collect(),
            refuse_exit_information: !caps.misc.vmwrite_any_field(),
            ..Self::default()
        }
    }

    /// Makes every access to the field fail from now on. The sixteen latest such orders count.
    pub fn fail(&mut self, field: impl Into<Encoding>, fail: VmFail) {
        if self.failing.is_full() {
            self.failing.remove(0);
        }
        self.failing.push((field.into(), fail));
    }

    /// Sets a field as the processor would, VM-exit information included, without a trace.
    pub fn preset(&mut self, field: impl Into<Encoding>, value: u64) -> &mut Self {
        let written = self.image.write_raw(field.into(), value);
        debug_assert!(written.is_ok(), "the table has the field");
        self
    }

    /// The accesses since the last [`clear_trace`](Self::clear_trace), oldest first.
    pub fn trace(&self) -> ArrayVec<Trace, { FakeVmcs::MAX_TRACE }> {
        self.trace.borrow().clone()
    }

    /// Forgets the accesses made so far.
    pub fn clear_trace(&mut self) {
        self.trace.get_mut().clear();
    }

    /// How many VMREADs and VMWRITEs were remembered.
    pub fn counts(&self) -> (usize, usize) {
        let trace = self.trace.borrow();
        let reads = trace.iter().filter(|t| matches!(t, Trace::Read(_))).count();
        (reads, trace.len() - reads)
    }

    /// The contents.
    pub fn image(&self) -> &VmcsImage {
        &self.image
    }

    fn note(&self, access: Trace) {
        let mut trace = self.trace.borrow_mut();
        if !trace.is_full() {
            trace.push(access);
        }
    }

    fn check(&self, field: Encoding) -> Result<(), VmFail> {
        if let Some((_, fail)) = self.failing.iter().rev().find(|(f, _)| *f == field) {
            return Err(*fail);
        }
        if self.missing.contains(&field.full()) {
            return Err(VmFail::Valid(InstructionError::UnsupportedComponent));
        }
        Ok(())
    }
}

impl VmcsRead for FakeVmcs {
    fn read_raw(&self, field: Encoding) -> Result<u64, VmFail> {
        self.note(Trace::Read(field));
        self.check(field)?;
        self.image.read_raw(field)
    }
}

impl VmcsWrite for FakeVmcs {
    fn write_raw(&mut self, field: Encoding, value: u64) -> Result<(), VmFail> {
        self.note(Trace::Write(field, value));
        self.check(field)?;
        if self.refuse_exit_information && field.area() == Area::ExitInformation {
            return Err(VmFail::Valid(InstructionError::ReadOnlyComponent));
        }
        self.image.write_raw(field, value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::caps::fixtures;
    use crate::fields;

    #[test]
    fn an_old_processor_lacks_new_fields() {
        let mut vmcs = FakeVmcs::with_caps(&fixtures::nehalem());
        let fail = VmFail::Valid(InstructionError::UnsupportedComponent);
        assert_eq!(vmcs.read_raw(fields::PML_INDEX.encoding()), Err(fail));
        assert!(vmcs.set(fields::GUEST_RIP, 1).is_ok());
        let read_only = VmFail::Valid(InstructionError::ReadOnlyComponent);
        let reason = fields::EXIT_REASON.encoding();
        assert_eq!(vmcs.write_raw(reason, 1), Err(read_only));
        assert_eq!(vmcs.preset(reason, 10).get(fields::EXIT_REASON), Ok(10));
    }

    #[test]
    fn a_full_trace_loses_the_newest() {
        let vmcs = FakeVmcs::new();
        for _ in 0..300 {
            vmcs.get(fields::GUEST_RIP).unwrap();
        }
        assert_eq!(vmcs.counts(), (FakeVmcs::MAX_TRACE, 0));
    }
}
