//! Access to a VMCS, whoever holds it.

use crate::encoding::{Access, Encoding, Field, ReadWrite, Width};
use crate::error::{AccessError, VmFail};
use crate::group::FieldGroup;

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

    /// Reads a group of fields.
    ///
    /// # Errors
    ///
    /// What VMREAD of one of them reports.
    #[inline(always)]
    fn get_group<const N: usize>(&self, group: &FieldGroup<N>) -> Result<[u64; N], AccessError>
    where
        Self: Sized,
    {
        let mut values = [0; N];
        for (value, &field) in values.iter_mut().zip(group.encodings()) {
            match self.read_raw(field) {
                Ok(read) => *value = read,
                Err(fail) => return Err(read_failed(field, fail)),
            }
        }
        Ok(values)
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

    /// Writes a group of fields.
    ///
    /// # Errors
    ///
    /// What VMWRITE of one of them reports. Those before it may have been written.
    #[inline(always)]
    fn set_group<const N: usize>(
        &mut self,
        group: &FieldGroup<N>,
        values: &[u64; N],
    ) -> Result<(), AccessError>
    where
        Self: Sized,
    {
        for (&value, &field) in values.iter().zip(group.encodings()) {
            if let Err(fail) = self.write_raw(field, value) {
                return Err(write_failed(field, value, fail));
            }
        }
        Ok(())
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

impl<V: VmcsRead> VmcsRead for &V {
    #[inline]
    fn read_raw(&self, field: Encoding) -> Result<u64, VmFail> {
        (**self).read_raw(field)
    }

    #[inline(always)]
    fn get_group<const N: usize>(&self, group: &FieldGroup<N>) -> Result<[u64; N], AccessError> {
        (**self).get_group(group)
    }
}

impl<V: VmcsRead> VmcsRead for &mut V {
    #[inline]
    fn read_raw(&self, field: Encoding) -> Result<u64, VmFail> {
        (**self).read_raw(field)
    }

    #[inline(always)]
    fn get_group<const N: usize>(&self, group: &FieldGroup<N>) -> Result<[u64; N], AccessError> {
        (**self).get_group(group)
    }
}

impl<V: VmcsWrite> VmcsWrite for &mut V {
    #[inline]
    fn write_raw(&mut self, field: Encoding, value: u64) -> Result<(), VmFail> {
        (**self).write_raw(field, value)
    }

    #[inline(always)]
    fn set_group<const N: usize>(
        &mut self,
        group: &FieldGroup<N>,
        values: &[u64; N],
    ) -> Result<(), AccessError> {
        (**self).set_group(group, values)
    }
}
