//! VMRESUME of an L2 whose VMCS is as the last exit left it, but for what a hypervisor changes at each exit.
//!
//! What L2's own run changed the processor saved, so it is valid, and in `vmcs02` already. What L1 can have
//! written since is known: a VMWRITE that exits is seen, and of the fields in the shadow each that differs
//! is. If those are a few whose checks are simple, all other checks and the join would come out as at the last
//! complete entry. In every other case there is a complete entry: nothing is refused here.

use testudo_arch::segment::SegmentAttributes;
use testudo_arch::{EferFlags, Gpa, GuestMemory, RFlags};
use testudo_vmx::controls::{
    ActivityState, EntryControls, ExitControls, Interruptibility, PinControls, PrimaryControls,
};
use testudo_vmx::image::VmcsImage;
use testudo_vmx::{AccessError, VmcsRead, VmcsWrite, fields};

use super::guest_fields::{self, Slot, slots};
use super::join::{L0Controls, L1Controls};
use super::shadow::{ShadowedFields, shadowed};
use super::vmcs12::LaunchState;
use super::{Context, NestedVmx, SecondStage, VmcsPair};

/// The guest fields among those that may have changed.
const OF_L2: [Slot; 4] = slots([
    fields::GUEST_RIP.encoding(),
    fields::GUEST_RSP.encoding(),
    fields::GUEST_RFLAGS.encoding(),
    fields::GUEST_INTERRUPTIBILITY.encoding(),
]);

/// What may have changed.
const SIMPLE: ShadowedFields = shadowed(fields::GUEST_RIP.encoding())
    | shadowed(fields::GUEST_RSP.encoding())
    | shadowed(fields::GUEST_RFLAGS.encoding())
    | shadowed(fields::GUEST_INTERRUPTIBILITY.encoding())
    // No check looks at it.
    | shadowed(fields::HOST_RSP.encoding())
    // These count with an event only, and then the entry is a complete one.
    | shadowed(fields::ENTRY_EXCEPTION_ERROR_CODE.encoding())
    | shadowed(fields::ENTRY_INSTRUCTION_LENGTH.encoding());

const LMA: u64 = EferFlags::LONG_MODE_ACTIVE.bits();
const PAE: u64 = 1 << 5;
const PG: u64 = 1 << 31;

/// Where an entry gets a register of L2's from that controls govern.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// L1's VMCS, to which exits save it: `vmcs02` has it.
    Saved,
    /// L1's VMCS, whatever L2 did to it.
    L1Vmcs,
    /// It is L1's own.
    L1,
}

impl Origin {
    fn of(loads: bool, saves: bool) -> Self {
        match (loads, saves) {
            (true, true) => Self::Saved,
            (true, false) => Self::L1Vmcs,
            (false, _) => Self::L1,
        }
    }
}

/// What the last complete entry found that an entry needs again.
#[derive(Clone, Copy, Debug)]
pub(super) struct Settled {
    /// Of L0's controls in `vmcs01`, the one that changes while L1 runs.
    tsc_offset: u64,
    /// L1 was in long mode, which decides about some checks.
    long_mode: bool,
    /// L1's EPT pointer, and that of the composition.
    composed: Option<(u64, u64)>,
    /// L1's MSR bitmap, if it counts.
    l1_bitmap: Option<Gpa>,
    debug: Origin,
    pat: Origin,
    efer: Origin,
    timer: bool,
}

impl Settled {
    /// After a complete entry with these controls; `None` if each entry must be a complete one.
    pub(super) fn of(
        vmcs12: &VmcsImage,
        l1: &L1Controls,
        l0: &L0Controls,
        composed: Option<u64>,
    ) -> Result<Option<Self>, AccessError> {
        // What is checked or loaded from memory, which L1 may have changed.
        let from_memory = vmcs12.get(fields::ENTRY_MSR_LOAD_COUNT)? != 0
            || vmcs12.get(fields::VMCS_LINK_POINTER)? != u64::MAX
            || l1.primary.contains(PrimaryControls::USE_TPR_SHADOW);
        // L2 inherits parts of it only.
        let inherits_efer = !(l0.entry & l1.entry).contains(EntryControls::LOAD_EFER);
        if from_memory || inherits_efer {
            return Ok(None);
        }
        let composed = match composed {
            Some(composed) => Some((vmcs12.get(fields::EPT_POINTER)?, composed)),
            None => None,
        };
        let bitmaps = PrimaryControls::USE_MSR_BITMAPS;
        let l1_bitmap = if (l0.primary & l1.primary).contains(bitmaps) {
            Some(Gpa(vmcs12.get(fields::MSR_BITMAPS)?))
        } else {
            None
        };
        let origin = |load, save| Origin::of(l1.entry.contains(load), l1.exit.contains(save));
        Ok(Some(Self {
            tsc_offset: l0.tsc.offset,
            long_mode: l1.exit.contains(ExitControls::HOST_ADDRESS_SPACE_SIZE),
            composed,
            l1_bitmap,
            debug: origin(
                EntryControls::LOAD_DEBUG_CONTROLS,
                ExitControls::SAVE_DEBUG_CONTROLS,
            ),
            // A register that L0 itself does not load L2 shares with everybody.
            pat: if l0.entry.contains(EntryControls::LOAD_PAT) {
                origin(EntryControls::LOAD_PAT, ExitControls::SAVE_PAT)
            } else {
                Origin::Saved
            },
            efer: origin(EntryControls::LOAD_EFER, ExitControls::SAVE_EFER),
            timer: l1.pin.contains(PinControls::ACTIVATE_PREEMPTION_TIMER),
        }))
    }
}

impl NestedVmx {
    /// Enters L2, if nothing but what is simple has changed since the last exit; `written` are the shadowed
    /// fields that L1 changed. `false`: nothing is done, and a complete entry is due.
    pub(super) fn resume<P, M, S, R>(
        &mut self,
        written: ShadowedFields,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<bool, AccessError>
    where
        P: VmcsPair,
        M: GuestMemory,
        S: SecondStage,
    {
        let Some(settled) = &self.settled else {
            return Ok(false);
        };
        // With entries enlightened, memory says which VMCS is meant.
        let enlightened = self.assist_page().is_some_and(|page| page & 1 != 0);
        if written & !SIMPLE != 0
            || enlightened
            || self.current.is_none()
            || self.in_vmcs02 != self.current
            || self.vmcs12.launch_state != LaunchState::Launched
            || !self.is_simple(written, settled)?
        {
            return Ok(false);
        }
        let image = &*self.vmcs12.image;
        let own = {
            let vmcs01 = cx.vmcs.l1();
            if !is_as_before(settled, &vmcs01)? {
                return Ok(false);
            }
            OwnRegisters::of_l1(settled, &vmcs01)?
        };
        if let Some((eptp, composed)) = settled.composed
            && cx.second_stage.activate(eptp) != Some(composed)
        {
            return Ok(false);
        }
        // Nothing stops the entry any more.
        if let Some(bitmap) = settled.l1_bitmap {
            let map = self.msr_bitmap.as_mut_bytes();
            // The processor reads the bitmap in memory at each access: a change needs no word to it.
            let _changed = self.open_msrs.merge(map, cx.memory, bitmap);
        }
        let mut vmcs02 = cx.vmcs.l2();
        for slot in OF_L2 {
            if written & shadowed(slot.field) != 0 {
                guest_fields::push(image, &mut vmcs02, &[slot])?;
            }
        }
        own.or_from(settled, image)?.write(&mut vmcs02)?;
        if settled.timer {
            let value = image.get(fields::PREEMPTION_TIMER_VALUE)?;
            vmcs02.set(fields::PREEMPTION_TIMER_VALUE, self.timer.start(value))?;
        }
        // As in a complete entry: waiting is L0's work, and what L0 had on its way into L2 is L1's to
        // inject by now. The last exit left L1's VMCS without an event.
        vmcs02.set(fields::GUEST_ACTIVITY_STATE, ActivityState::Active.number())?;
        let information = image.get(fields::ENTRY_INTERRUPTION_INFORMATION)?;
        vmcs02.set(fields::ENTRY_INTERRUPTION_INFORMATION, information)?;
        drop(vmcs02);
        // Without VPID, no cached translation of L2 may be used.
        self.flush.vpid |= self.vpid12 == 0;
        self.is_guest = true;
        Ok(true)
    }

    /// Whether what L1 wrote passes the checks of its own without a look at anything else.
    #[inline]
    fn is_simple(&self, written: ShadowedFields, settled: &Settled) -> Result<bool, AccessError> {
        let image = &*self.vmcs12.image;
        if written & const { shadowed(fields::GUEST_RIP.encoding()) } != 0 {
            let rip = image.get(fields::GUEST_RIP)?;
            if rip >> 32 != 0 && !(is_64_bit_code(image)? && is_canonical(rip)) {
                return Ok(false);
            }
        }
        let flags_and_shadow = const {
            shadowed(fields::GUEST_RFLAGS.encoding())
                | shadowed(fields::GUEST_INTERRUPTIBILITY.encoding())
        };
        if written & flags_and_shadow != 0 {
            // With no blocking by STI or MOV SS and no event, IF and TF may be anything
            // (SDM vol. 3C, 29.3.1.4 and 29.3.1.5).
            let rflags = image.get(fields::GUEST_RFLAGS)?;
            let nmi = Interruptibility::BLOCKING_BY_NMI.bits();
            let state = image.get(fields::GUEST_INTERRUPTIBILITY)?;
            if rflags & FIXED_FLAGS != 2 || state & !nmi != 0 {
                return Ok(false);
            }
        }
        // Without EPT an entry in PAE paging reads the page-directory pointers from memory.
        let controls = EntryControls::from_bits_retain(image.get(fields::ENTRY_CONTROLS)?);
        Ok(settled.composed.is_some()
            || controls.contains(EntryControls::IA32E_MODE_GUEST)
            || image.get(fields::GUEST_CR0)? & PG == 0
            || image.get(fields::GUEST_CR4)? & PAE == 0)
    }
}

/// The bits of RFLAGS that an entry wants to have one value, of which bit 1 is 1; and VM, which it lets be 1
/// in some modes only.
const FIXED_FLAGS: u64 = !0x3F_FFFF | 0x802A | RFlags::VIRTUAL_8086_MODE.bits();

fn is_canonical(address: u64) -> bool {
    ((address << 16) as i64 >> 16) as u64 == address
}

/// Whether L2 executes 64-bit code.
fn is_64_bit_code(vmcs12: &VmcsImage) -> Result<bool, AccessError> {
    let controls = EntryControls::from_bits_retain(vmcs12.get(fields::ENTRY_CONTROLS)?);
    let rights = vmcs12.get(fields::GUEST_CS_ACCESS_RIGHTS)?;
    let long = SegmentAttributes::from_bits_retain(rights).contains(SegmentAttributes::LONG);
    Ok(long && controls.contains(EntryControls::IA32E_MODE_GUEST))
}

/// Whether L1's own part of an entry is as it was at the last complete one.
#[inline]
fn is_as_before(settled: &Settled, vmcs01: &impl VmcsRead) -> Result<bool, AccessError> {
    let state = Interruptibility::from_bits_retain(vmcs01.get(fields::GUEST_INTERRUPTIBILITY)?);
    let long_mode = vmcs01.get(fields::GUEST_EFER)? & LMA != 0;
    Ok(!state.contains(Interruptibility::BLOCKING_BY_MOV_SS)
        && long_mode == settled.long_mode
        && vmcs01.get(fields::TSC_OFFSET)? == settled.tsc_offset)
}

/// Registers that an entry loads although exits do not save them to where it finds them.
#[derive(Clone, Copy, Debug, Default)]
struct OwnRegisters {
    debug: Option<(u64, u64)>,
    pat: Option<u64>,
    efer: Option<u64>,
}

impl OwnRegisters {
    /// Those of L1's that L2 gets.
    #[inline]
    fn of_l1(settled: &Settled, vmcs01: &impl VmcsRead) -> Result<Self, AccessError> {
        let mut own = Self::default();
        if settled.debug == Origin::L1 {
            let debugctl = vmcs01.get(fields::GUEST_DEBUGCTL)?;
            own.debug = Some((vmcs01.get(fields::GUEST_DR7)?, debugctl));
        }
        if settled.pat == Origin::L1 {
            own.pat = Some(vmcs01.get(fields::GUEST_PAT)?);
        }
        Ok(own)
    }

    /// And those in L1's VMCS.
    #[inline]
    fn or_from(mut self, settled: &Settled, vmcs12: &VmcsImage) -> Result<Self, AccessError> {
        if settled.debug == Origin::L1Vmcs {
            let debugctl = vmcs12.get(fields::GUEST_DEBUGCTL)?;
            self.debug = Some((vmcs12.get(fields::GUEST_DR7)?, debugctl));
        }
        if settled.pat == Origin::L1Vmcs {
            self.pat = Some(vmcs12.get(fields::GUEST_PAT)?);
        }
        if settled.efer == Origin::L1Vmcs {
            self.efer = Some(vmcs12.get(fields::GUEST_EFER)?);
        }
        Ok(self)
    }

    #[inline]
    fn write(self, vmcs02: &mut impl VmcsWrite) -> Result<(), AccessError> {
        if let Some((dr7, debugctl)) = self.debug {
            vmcs02.set(fields::GUEST_DR7, dr7)?;
            vmcs02.set(fields::GUEST_DEBUGCTL, debugctl)?;
        }
        if let Some(pat) = self.pat {
            vmcs02.set(fields::GUEST_PAT, pat)?;
        }
        if let Some(efer) = self.efer {
            vmcs02.set(fields::GUEST_EFER, efer)?;
        }
        Ok(())
    }
}
