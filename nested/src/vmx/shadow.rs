//! VMCS shadowing: L1's most frequent VMREADs and VMWRITEs without an exit, where the processor
//! offers it (SDM vol. 3C, 27.10 and 33.3, VMREAD and VMWRITE).
//!
//! The processor's own shadow VMCS, which the link pointer of `vmcs01` names, holds the fields below
//! while L1 runs; L0's copy holds all others. The two meet when L1 enters L2, when L2 exits to L1, and
//! when another VMCS becomes current. An entry reads all fields that L1 can have written; an exit writes those
//! that it changed.

use testudo_vmx::bitmap::FieldBitmap;
use testudo_vmx::controls::SecondaryControls;
use testudo_vmx::{AccessError, Encoding, VmcsRead, VmxCaps, fields as f};

use super::guest_fields::{Slot, slots};
use super::join::L1Controls;
use super::{Context, NestedVmx, VmcsPair, guest_fields};

/// What L1 reads at nearly every exit and can not write.
const READ_ONLY: [Slot; 10] = slots([
    f::EXIT_REASON.encoding(),
    f::EXIT_QUALIFICATION.encoding(),
    f::EXIT_INTERRUPTION_INFORMATION.encoding(),
    f::EXIT_INTERRUPTION_ERROR_CODE.encoding(),
    f::IDT_VECTORING_INFORMATION.encoding(),
    f::IDT_VECTORING_ERROR_CODE.encoding(),
    f::EXIT_INSTRUCTION_LENGTH.encoding(),
    f::EXIT_INSTRUCTION_INFORMATION.encoding(),
    f::GUEST_LINEAR_ADDRESS.encoding(),
    f::GUEST_PHYSICAL_ADDRESS.encoding(),
]);

/// What L1 reads at each entry, and writes with each interrupt, if the processor delivers those of L2's virtual local
/// APIC; and which of their ends exit. Not every processor has them, and they are looked at where they count.
const OF_DELIVERY: [Slot; 5] = slots([
    f::GUEST_INTERRUPT_STATUS.encoding(),
    f::EOI_EXIT_BITMAP_0.encoding(),
    f::EOI_EXIT_BITMAP_1.encoding(),
    f::EOI_EXIT_BITMAP_2.encoding(),
    f::EOI_EXIT_BITMAP_3.encoding(),
]);

/// The fields of [`READ_WRITE`] that every processor has, for a macro: in parts of which a processor's registers
/// hold all values.
macro_rules! with_read_write {
    ($callback:ident!($($arguments:tt)*)) => {
        $callback! { $($arguments)*
            [GUEST_RIP GUEST_RSP GUEST_RFLAGS GUEST_INTERRUPTIBILITY GUEST_CR0 GUEST_CR3 GUEST_CR4]
            [GUEST_CS_BASE GUEST_CS_ACCESS_RIGHTS GUEST_SS_ACCESS_RIGHTS CR0_READ_SHADOW
                CR4_READ_SHADOW PRIMARY_CONTROLS EXCEPTION_BITMAP CR0_GUEST_HOST_MASK]
            [ENTRY_INTERRUPTION_INFORMATION ENTRY_EXCEPTION_ERROR_CODE ENTRY_INSTRUCTION_LENGTH
                // What a hypervisor that runs its guests in threads changes with the thread.
                HOST_FS_SELECTOR HOST_GS_SELECTOR HOST_FS_BASE HOST_GS_BASE HOST_RSP]
        }
    };
}

macro_rules! slots_of {
    ($([$($field:ident)*])*) => {
        slots([$($(f::$field.encoding(),)*)* f::PREEMPTION_TIMER_VALUE.encoding()])
    };
}

/// What L1 reads and writes at many exits. None of them is one of the seldom-used guest fields, whose
/// changes L0 must notice.
const READ_WRITE: [Slot; 24] = with_read_write!(slots_of!());

/// The shadowed fields for which a set stands; its bits are in the order of [`READ_WRITE`] and then
/// [`READ_ONLY`], and of [`OF_DELIVERY`] last.
pub(super) type ShadowedFields = u64;

/// How many there are.
const COUNT: usize = COMMON + OF_DELIVERY.len();

/// How many of them every processor has.
const COMMON: usize = READ_WRITE.len() + READ_ONLY.len();

/// All shadowed fields that every processor has.
pub(super) const ALL_SHADOWED: ShadowedFields = (1 << COMMON) - 1;

/// Those of the delivery of interrupts.
const OF_DELIVERY_FIELDS: ShadowedFields = ((1 << COUNT) - 1) & !ALL_SHADOWED;

/// All shadowed fields that a processor with these capabilities has.
pub(super) fn all_shadowed(caps: &VmxCaps) -> ShadowedFields {
    match has_delivery(caps) {
        true => ALL_SHADOWED | OF_DELIVERY_FIELDS,
        false => ALL_SHADOWED,
    }
}

/// Whether [`OF_DELIVERY`] are among them.
pub(super) fn has_delivery(caps: &VmxCaps) -> bool {
    OF_DELIVERY.iter().all(|slot| {
        let info = slot.field.info();
        info.is_some_and(|info| info.exists(caps))
    })
}

/// Those that tell of an exit.
pub(super) const EXIT_INFORMATION: ShadowedFields = ALL_SHADOWED & !((1 << READ_WRITE.len()) - 1);

/// The set of this field alone; none if it is not shadowed.
pub(super) const fn shadowed(field: Encoding) -> ShadowedFields {
    let mut i = 0;
    while i < COUNT {
        if SHADOWED[i].field.0 == field.0 {
            return 1 << i;
        }
        i += 1;
    }
    0
}

/// All of them in that order.
const SHADOWED: [Slot; COUNT] = {
    let mut all = [READ_ONLY[0]; COUNT];
    let mut i = 0;
    while i < COUNT {
        all[i] = if i < READ_WRITE.len() {
            READ_WRITE[i]
        } else if i < COMMON {
            READ_ONLY[i - READ_WRITE.len()]
        } else {
            OF_DELIVERY[i - COMMON]
        };
        i += 1;
    }
    all
};

/// Fields of a VMCS, which every processor has, into L1's; those that have changed are added to a set.
macro_rules! follow {
    ($from:expr, $image:expr, $changed:expr; $($field:ident)*) => {{
        const ENCODINGS: &[testudo_vmx::Encoding] = &[$(testudo_vmx::fields::$field.encoding()),*];
        const GROUP: testudo_vmx::FieldGroup<{ ENCODINGS.len() }> =
            testudo_vmx::FieldGroup::new([$(testudo_vmx::fields::$field.encoding()),*]);
        let mut values = testudo_vmx::VmcsRead::get_group($from, &GROUP)?.into_iter();
        $(if let Some(value) = values.next() {
            $crate::vmx::shadow::note!($image, $changed; $field = value);
        })*
    }};
}
pub(super) use follow;

/// The same, part by part.
macro_rules! follow_parts {
    ($from:expr, $image:expr, $changed:expr; $([$($field:ident)*])*) => {
        $(follow!($from, $image, $changed; $($field)*);)*
    };
}

/// One field into L1's VMCS, likewise.
macro_rules! note {
    ($image:expr, $changed:expr; $field:ident = $value:expr) => {{
        const SLOT: $crate::vmx::guest_fields::Slot =
            $crate::vmx::guest_fields::slot(testudo_vmx::fields::$field.encoding());
        if SLOT.update($image, $value) {
            $changed |= const { $crate::vmx::shadow::shadowed(SLOT.field) };
        }
    }};
}
pub(super) use note;

/// The bitmaps for VMREAD and VMWRITE of an L1 that is shown these capabilities: what exits all the same.
pub fn shadow_bitmaps(caps: &VmxCaps) -> (FieldBitmap, FieldBitmap) {
    let (mut reads, mut writes) = (FieldBitmap::all_exit(), FieldBitmap::all_exit());
    for field in READ_ONLY.map(|slot| slot.field) {
        reads.pass_through(field);
    }
    for field in READ_WRITE.map(|slot| slot.field) {
        reads.pass_through(field);
        writes.pass_through(field);
    }
    if has_delivery(caps) {
        for field in OF_DELIVERY.map(|slot| slot.field) {
            reads.pass_through(field);
            writes.pass_through(field);
        }
    }
    (reads, writes)
}

impl NestedVmx {
    /// What L1 wrote into the shadow, into the copy: before the copy is used. Says which fields differed. Those of
    /// the delivery of interrupts are [left](Self::take_delivery) if L1 does not ask for that.
    #[inline]
    pub(super) fn take_from_shadow<P: VmcsPair, M, S, R>(
        &mut self,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<ShadowedFields, AccessError> {
        let written = &mut self.shadow_written;
        *written = 0;
        if self.current.is_some()
            && let Some(shadow) = cx.vmcs.shadow()
        {
            let image = &mut *self.vmcs12.image;
            with_read_write!(follow_parts!(&shadow, image, *written;));
            note!(image, *written; PREEMPTION_TIMER_VALUE = shadow.get(f::PREEMPTION_TIMER_VALUE)?.into());
        }
        let delivery = SecondaryControls::VIRTUAL_INTERRUPT_DELIVERY;
        if self.shadows_delivery && L1Controls::has_secondary(&self.vmcs12.image, delivery)? {
            self.take_delivery(cx)?;
        }
        Ok(self.shadow_written)
    }

    /// What L1 wrote there about the delivery of interrupts, likewise: before the copy is used as a whole. While the
    /// shadow is still to be given these fields, L1 has not written them.
    #[inline(never)]
    pub(super) fn take_delivery<P: VmcsPair, M, S, R>(
        &mut self,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<(), AccessError> {
        if self.shadows_delivery
            && self.shadow_misses & OF_DELIVERY_FIELDS == 0
            && self.current.is_some()
            && let Some(shadow) = cx.vmcs.shadow()
        {
            let image = &mut *self.vmcs12.image;
            let written = &mut self.shadow_written;
            macro_rules! take {
                ($($field:ident)*) => {
                    $(note!(image, *written; $field = shadow.get(f::$field)?.into());)*
                };
            }
            take!(GUEST_INTERRUPT_STATUS EOI_EXIT_BITMAP_0 EOI_EXIT_BITMAP_1 EOI_EXIT_BITMAP_2 EOI_EXIT_BITMAP_3);
        }
        Ok(())
    }

    /// The copy into the shadow, as far as they differ: after the copy changed, and before L1 runs.
    #[inline(always)]
    pub(super) fn give_to_shadow<P: VmcsPair, M, S, R>(
        &mut self,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<(), AccessError> {
        if self.shadow_misses != 0
            && self.current.is_some()
            && let Some(mut shadow) = cx.vmcs.shadow()
        {
            static SLOTS: [Slot; COUNT] = SHADOWED;
            let image = &*self.vmcs12.image;
            let mut misses = self.shadow_misses;
            while let Some(slot) = SLOTS.get(misses.trailing_zeros() as usize) {
                guest_fields::push_slot(image, &mut shadow, slot)?;
                misses &= misses.wrapping_sub(1);
            }
            self.shadow_misses = 0;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use testudo_vmx::caps::{Allowed, fixtures};
    use testudo_vmx::controls::SecondaryControls;

    use super::*;

    #[test]
    fn no_shadowed_field_changes_unnoticed() {
        for field in READ_WRITE.map(|slot| slot.field) {
            assert!(!guest_fields::is_rare(field), "{field}");
        }
        let all = READ_WRITE.iter().chain(&READ_ONLY);
        let each: Vec<_> = all.map(|slot| shadowed(slot.field)).collect();
        assert_eq!(each.iter().fold(0, |set, bit| set ^ bit), ALL_SHADOWED);
        let mut caps = fixtures::skylake_sp();
        let of_delivery = OF_DELIVERY.iter().map(|slot| shadowed(slot.field));
        let all = of_delivery.fold(ALL_SHADOWED, |set, bit| set ^ bit);
        assert_eq!(all_shadowed(&caps), all);
        assert_eq!(all.count_ones() as usize, COUNT);
        assert_eq!(shadowed(f::GUEST_DS_BASE.encoding()), 0);
        let (reads, writes) = shadow_bitmaps(&caps);
        let of_delivery = OF_DELIVERY.map(|slot| u64::from(slot.field.0));
        assert!(of_delivery.iter().all(|&field| !reads.exits(field)));
        assert!(of_delivery.iter().all(|&field| !writes.exits(field)));
        for field in READ_ONLY.map(|slot| slot.field) {
            let encoding = u64::from(field.0);
            assert!(!reads.exits(encoding) && writes.exits(encoding), "{field}");
        }
        let rip = u64::from(f::GUEST_RIP.encoding().0);
        assert!(!reads.exits(rip) && !writes.exits(rip));
        let ds = u64::from(f::GUEST_DS_BASE.encoding().0);
        assert!(reads.exits(ds) && writes.exits(ds));
        // An L1 without these fields is told that there are none.
        let without = SecondaryControls::all() - SecondaryControls::VIRTUAL_INTERRUPT_DELIVERY;
        caps.secondary = Allowed::new(
            caps.secondary.must_be_one(),
            caps.secondary.may_be_one() & without,
        );
        assert_eq!(all_shadowed(&caps), ALL_SHADOWED);
        let (reads, writes) = shadow_bitmaps(&caps);
        assert!(of_delivery.iter().all(|&field| reads.exits(field)));
        assert!(of_delivery.iter().all(|&field| writes.exits(field)));
    }
}
