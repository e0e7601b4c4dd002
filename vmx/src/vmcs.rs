//! Access to a VMCS, whoever holds it.

use crate::encoding::{Access, Encoding, Field, ReadWrite, Width};
use crate::error::{AccessError, VmFail};

/// A VMCS that can be read: the processor's current one, an image in memory, or a fake.
///
/// ```
/// use testudo_vmx::{VmcsRead, VmcsWrite, fake::FakeVmcs, fields};
///
/// let mut vmcs = FakeVmcs::new();
/// vmcs.set(fields::GUEST_RIP, 0xFFF0)?;
/// let rip: u64 = vmcs.get(fields::GUEST_RIP)?;
/// let vpid: u16 = vmcs.get(fields::VPID)?;
/// assert_eq!((rip, vpid), (0xFFF0, 0));
/// # Ok::<(), testudo_vmx::AccessError>(())
/// ```
pub trait VmcsRead {
    /// Reads the field with this encoding as VMREAD does, zero-extended.
    ///
    /// # Errors
    ///
    /// What VMREAD reports: no current VMCS, or no such field.
    fn read_raw(&self, field: Encoding) -> Result<u64, VmFail>;

    /// Reads a field of the table.
    // Of an image, with the field a constant, nothing but the load remains.
    #[inline(always)]
    fn get<W: Width, A: Access>(&self, field: Field<W, A>) -> Result<W::Value, AccessError>
    where
        Self: Sized,
    {
        match self.read_raw(field.encoding()) {
            Ok(raw) => Ok(W::from_raw(raw)),
            Err(fail) => Err(read_failed(field.encoding(), fail)),
        }
    }
}

/// A VMCS that can also be written.
pub trait VmcsWrite: VmcsRead {
    /// Writes the field with this encoding as VMWRITE does: bits beyond its width are dropped.
    ///
    /// # Errors
    ///
    /// What VMWRITE reports: no current VMCS, no such field, or a read-only one.
    fn write_raw(&mut self, field: Encoding, value: u64) -> Result<(), VmFail>;

    /// Writes a field of the table that VMWRITE accepts on every processor.
    #[inline(always)]
    fn set<W: Width>(
        &mut self,
        field: Field<W, ReadWrite>,
        value: W::Value,
    ) -> Result<(), AccessError>
    where
        Self: Sized,
    {
        let value = value.into();
        match self.write_raw(field.encoding(), value) {
            Ok(()) => Ok(()),
            Err(fail) => Err(write_failed(field.encoding(), value, fail)),
        }
    }
}

#[cold]
fn read_failed(field: Encoding, fail: VmFail) -> AccessError {
    AccessError::Read { field, fail }
}

#[cold]
fn write_failed(field: Encoding, value: u64, fail: VmFail) -> AccessError {
    AccessError::Write { field, value, fail }
}

impl<V: VmcsRead + ?Sized> VmcsRead for &V {
    #[inline]
    fn read_raw(&self, field: Encoding) -> Result<u64, VmFail> {
        (**self).read_raw(field)
    }
}

impl<V: VmcsRead + ?Sized> VmcsRead for &mut V {
    #[inline]
    fn read_raw(&self, field: Encoding) -> Result<u64, VmFail> {
        (**self).read_raw(field)
    }
}

impl<V: VmcsWrite + ?Sized> VmcsWrite for &mut V {
    #[inline]
    fn write_raw(&mut self, field: Encoding, value: u64) -> Result<(), VmFail> {
        (**self).write_raw(field, value)
    }
}
