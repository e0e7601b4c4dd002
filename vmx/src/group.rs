//! Several fields at once.

use crate::encoding::{Area, Encoding};
use crate::fields::TABLE;

/// Fields that every processor has.
///
/// VMREAD and VMWRITE of such a field fail only for want of a current VMCS (SDM vol. 3C, 33.3): of several in a
/// row either all fail or none does. So access to a group costs two instructions a field, and one look for a
/// failure. Groups are made at compile time:
///
/// ```
/// use testudo_vmx::{FieldGroup, VmcsRead, VmcsWrite, fake::FakeVmcs, fields};
///
/// const PLACE: FieldGroup<2> =
///     FieldGroup::new([fields::GUEST_RIP.encoding(), fields::GUEST_RSP.encoding()]);
///
/// let mut vmcs = FakeVmcs::new();
/// vmcs.set_group(&PLACE, &[0x1000, 0x8000])?;
/// assert_eq!(vmcs.get_group(&PLACE)?, [0x1000, 0x8000]);
/// # Ok::<(), testudo_vmx::AccessError>(())
/// ```
///
/// A field that not every processor has is refused:
///
/// ```compile_fail,E0080
/// # use testudo_vmx::{FieldGroup, fields};
/// const _: FieldGroup<1> = FieldGroup::new([fields::GUEST_EFER.encoding()]);
/// ```
#[derive(Clone, Copy, Debug)]
pub struct FieldGroup<const N: usize> {
    encodings: [Encoding; N],
    /// None is VM-exit information or host state.
    is_guest_or_control: bool,
}

impl<const N: usize> FieldGroup<N> {
    /// The most fields that a group can have.
    pub const MOST: usize = 64;

    /// A group of these fields.
    ///
    /// # Panics
    ///
    /// There is none, or there are too many; one is not in the table, or exists on some processors only.
    /// In a constant that is an error of compilation.
    pub const fn new(encodings: [Encoding; N]) -> Self {
        assert!(N > 0 && N <= Self::MOST);
        let mut is_guest_or_control = true;
        let mut i = 0;
        while i < N {
            assert!(is_universal(encodings[i]));
            is_guest_or_control &= matches!(encodings[i].area(), Area::Guest | Area::Control);
            i += 1;
        }
        Self {
            encodings,
            is_guest_or_control,
        }
    }

    /// Its fields.
    #[inline(always)]
    pub const fn encodings(&self) -> &[Encoding; N] {
        &self.encodings
    }

    /// Whether all are guest state or controls: VMWRITE takes them on every processor.
    #[inline(always)]
    pub const fn is_guest_or_control(&self) -> bool {
        self.is_guest_or_control
    }
}

/// Whether the table has the field as one of every processor.
const fn is_universal(field: Encoding) -> bool {
    let mut i = 0;
    while i < TABLE.len() {
        if TABLE[i].encoding.0 == field.0 {
            return TABLE[i].features.is_empty();
        }
        i += 1;
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{FakeVmcs, Trace};
    use crate::{AccessError, VmFail, VmcsRead, VmcsWrite, fields};

    const STATE: FieldGroup<3> = FieldGroup::new([
        fields::GUEST_RIP.encoding(),
        fields::GUEST_CS_SELECTOR.encoding(),
        fields::GUEST_CS_LIMIT.encoding(),
    ]);
    const INFORMATION: FieldGroup<2> =
        FieldGroup::new([fields::GUEST_RIP.encoding(), fields::EXIT_REASON.encoding()]);

    #[test]
    fn exit_information_is_known_as_such() {
        assert!(STATE.is_guest_or_control() && !INFORMATION.is_guest_or_control());
    }

    #[test]
    fn each_field_is_accessed_in_turn() {
        let mut vmcs = FakeVmcs::new();
        vmcs.set_group(&STATE, &[1, 2, 3]).unwrap();
        let [rip, selector, limit] = *STATE.encodings();
        let writes = [(rip, 1), (selector, 2), (limit, 3)].map(|(f, v)| Trace::Write(f, v));
        assert_eq!(vmcs.trace()[..], writes);
        assert_eq!(vmcs.get_group(&STATE), Ok([1, 2, 3]));
        let field = limit;
        let fail = VmFail::Invalid;
        vmcs.fail(field, fail);
        assert_eq!(
            vmcs.get_group(&STATE),
            Err(AccessError::Read { field, fail })
        );
    }
}
