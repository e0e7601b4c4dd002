//! What processors do otherwise than the manual says, where a hypervisor must know it to be right on them.
//! So far these are emulated processors.

use bitflags::bitflags;

use crate::caps::VmxCaps;

bitflags! {
    /// Defects of a processor.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Defects: u8 {
        /// After an entry with RFLAGS.IF = 0, external interrupts stay pending until the guest changes IF,
        /// although "external-interrupt exiting" is 1: then "the value of RFLAGS.IF does not affect
        /// interrupt blocking" (SDM vol. 3C, table 27-5). A guest that waits with interrupts off for what
        /// another processor does keeps its own for ever, unless the preemption timer, or an NMI, ends its
        /// turn.
        ///
        /// Bochs loads the guest's RFLAGS, and masks the interrupts by its IF, before it takes the
        /// processor to be in VMX non-root operation; the control is looked at only when IF changes.
        const HOLDS_INTERRUPTS_BACK = 1;

        /// An exit that interrupts the delivery of a virtual interrupt reports the event that was delivered before it,
        /// or vector 0 if there was none, in the IDT-vectoring information (SDM vol. 3C, 30.2.4): Bochs notes an event
        /// for that where it is about to deliver it, but not where virtual-interrupt delivery does.
        const MISREPORTS_VIRTUAL_INTERRUPTS = 1 << 1;

        /// A virtual interrupt that is pending does not end the HLT activity state: Bochs looks for others only.
        const HALTS_THROUGH_VIRTUAL_INTERRUPTS = 1 << 2;

        /// An external interrupt that would exit delivers a pending virtual interrupt instead, even with
        /// RFLAGS.IF = 0, which blocks that ("the logical processor … delivers it as soon as RFLAGS.IF = 1", SDM vol.
        /// 3C, 32.2.2): Bochs asks whether anything unmasked is pending, and then takes the virtual interrupt if it
        /// is pending, masked or not. The exit follows before the handler's first instruction.
        const DELIVERS_MASKED_VIRTUAL_INTERRUPTS = 1 << 3;
    }
}

/// The VMCS revision identifier of all models of Bochs. A processor that has it too has the defects as far
/// as anybody works around them.
const BOCHS: u32 = 0x2B;

impl Defects {
    /// Those of the processor with these capabilities; of a processor that is none of an emulator's none
    /// are known.
    pub const fn of(caps: &VmxCaps) -> Self {
        match caps.basic.revision() {
            // Seen in version 2.7.
            BOCHS => Self::all(),
            _ => Self::empty(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::caps::{Basic, fixtures};

    #[test]
    fn defects_go_by_the_revision() {
        let mut caps = fixtures::skylake_sp();
        assert!(Defects::of(&caps).is_empty());
        caps.basic = Basic(u64::from(BOCHS) | 4096 << 32);
        assert_eq!(Defects::of(&caps), Defects::all());
    }
}
