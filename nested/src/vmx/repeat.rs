//! An exit to L1 that is like the one before it: the twin of [`resume`](super::resume).
//!
//! As long as L1's VMCS has the controls and the host state that it had then, the exit saves the same fields of
//! L2's and loads the same state of L1's; that [the entry](super::resume) has loaded already. That L2's mode is as
//! it was is compared. In every other case there is a complete exit.

use testudo_arch::GuestMemory;
use testudo_vmx::controls::ActivityState;
use testudo_vmx::{AccessError, FieldGroup, VmcsRead, fields};

use super::exit::save_governed;
use super::host::HostLoad;
use super::shadow::note;
use super::{Context, NestedVmx, VmcsPair};

/// What a complete exit found that the next one needs again.
#[derive(Clone, Debug, Default)]
pub(super) struct LastExit {
    /// What it loaded, if that is all that it loads.
    pub(super) load: Option<HostLoad>,
    /// CR0, CR4 and EFER in `vmcs02`, with which those in L1's VMCS are in step.
    pub(super) mode: Option<[u64; 3]>,
}

/// What every such exit reads.
const STATE: FieldGroup<10> = FieldGroup::new([
    fields::GUEST_RIP.encoding(),
    fields::GUEST_RSP.encoding(),
    fields::GUEST_RFLAGS.encoding(),
    fields::GUEST_INTERRUPTIBILITY.encoding(),
    fields::GUEST_CR3.encoding(),
    fields::GUEST_CS_BASE.encoding(),
    fields::GUEST_CS_ACCESS_RIGHTS.encoding(),
    fields::GUEST_SS_ACCESS_RIGHTS.encoding(),
    fields::GUEST_CR0.encoding(),
    fields::GUEST_CR4.encoding(),
]);

impl NestedVmx {
    /// Leaves an L2 that has run, and whose exit L1's VMCS tells already, if the exit is like the one before. `false`:
    /// nothing is done, and a complete exit is due.
    #[inline(always)]
    pub(super) fn repeat_exit<P: VmcsPair, M: GuestMemory, S, R>(
        &mut self,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<bool, AccessError> {
        let Some(settled) = &self.settled else {
            return Ok(false);
        };
        let Some(mode) = &settled.last_exit.mode else {
            return Ok(false);
        };
        if !self.host_loaded {
            return Ok(false);
        }
        let vmcs02 = cx.vmcs.l2();
        let state = vmcs02.get_group(&STATE)?;
        let [
            rip,
            rsp,
            rflags,
            state,
            cr3,
            cs_base,
            cs_rights,
            ss_rights,
            cr0,
            cr4,
        ] = state;
        let efer = vmcs02.get(fields::GUEST_EFER)?;
        if (cr0 ^ mode[0]) | (cr4 ^ mode[1]) | (efer ^ mode[2]) != 0 {
            return Ok(false);
        }
        if settled.may_halt
            && vmcs02.get(fields::GUEST_ACTIVITY_STATE)? != ActivityState::Active.number()
        {
            return Ok(false);
        }
        // Nothing stops it any more.
        let image = &mut *self.vmcs12.image;
        let misses = &mut self.shadow_misses;
        note!(image, *misses; GUEST_RIP = rip);
        note!(image, *misses; GUEST_RSP = rsp);
        note!(image, *misses; GUEST_RFLAGS = rflags);
        note!(image, *misses; GUEST_INTERRUPTIBILITY = state);
        note!(image, *misses; GUEST_CR3 = cr3);
        note!(image, *misses; GUEST_CS_BASE = cs_base);
        note!(image, *misses; GUEST_CS_ACCESS_RIGHTS = cs_rights);
        note!(image, *misses; GUEST_SS_ACCESS_RIGHTS = ss_rights);
        if settled.saves_governed {
            let delivers = settled.apic.is_some_and(|apic| apic.delivers);
            save_governed(image, misses, &self.timer, delivers, &vmcs02)?;
        }
        drop(vmcs02);
        self.rare_missing = true;
        self.end_turn();
        self.give_to_shadow(cx)?;
        cx.gprs.rsp = self.vmcs12.image.get(fields::HOST_RSP)?;
        Ok(true)
    }
}
