//! What processors do otherwise than the manual says, where a hypervisor must know it to be right or
//! safe on them. So far these are emulated processors.

use bitflags::bitflags;

bitflags! {
    /// Defects of a processor.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Defects: u8 {
        /// An external interrupt that VMRUN injects (EVENTINJ, type 0) can be delivered a second
        /// time, whatever RFLAGS.IF says then, unless the guest exits at once after the first.
        ///
        /// QEMU's `helper_vmrun` delivers it itself and leaves its number behind as an exception that
        /// is still to be raised. An exit, or another event, takes it back; what raises it is the end
        /// of the emulator's own turn for the processor, so it is seen with several processors.
        const REPEATS_INTERRUPTS = 1;
        /// #VMEXIT does not restore the host's CR0 if the guest has EFER.LME set and CR0.PG and
        /// CR4.PAE clear: the host goes on without paging. Any guest can do that, so a hypervisor
        /// there keeps LME out of the processor while its guest has paging off.
        ///
        /// QEMU loads CR0 before CR4 and EFER, and takes the host's CR0.PG for an illegal step of
        /// the guest's into long mode, which it ignores.
        const LOSES_CR0 = 2;
        /// A page walk in PAE paging sets bit 5 of the page-directory-pointer entry, where other entries
        /// have their accessed bit. There VMRUN's check of these entries must let it pass, or a guest
        /// hypervisor that shadows its guest's tables fails at its own.
        ///
        /// QEMU's `mmu_translate` marks the entries of all levels.
        const MARKS_PDPES = 4;
    }
}

impl Defects {
    /// Those of the processor on which a hypervisor or an emulator has this name; of a processor
    /// itself none are known.
    pub const fn of(signature: Option<&[u8; 12]>) -> Self {
        match signature {
            // Seen in version 7.2, the first also in the sources of later ones.
            Some(b"TCGTCGTCGTCG") => Self::REPEATS_INTERRUPTS
                .union(Self::LOSES_CR0)
                .union(Self::MARKS_PDPES),
            _ => Self::empty(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defects_go_by_the_name() {
        assert!(Defects::of(Some(b"TCGTCGTCGTCG")).contains(Defects::LOSES_CR0));
        assert!(Defects::of(Some(b"KVMKVMKVM\0\0\0")).is_empty());
        assert!(Defects::of(None).is_empty());
    }
}
