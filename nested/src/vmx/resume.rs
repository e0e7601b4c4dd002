//! VMRESUME of an L2 whose VMCS is as the last exit left it, but for what a hypervisor changes at each exit.
//!
//! What L2's own run changed the processor saved, so it is valid, and in `vmcs02` already. What L1 can have
//! written since is known: a VMWRITE that exits is seen, and of the fields in the shadow each that differs
//! is. If those are a few whose checks are simple, all other checks and the join would come out as at the last
//! complete entry. In every other case there is a complete entry: nothing is refused here.

use testudo_arch::segment::SegmentAttributes;
use testudo_arch::{Gpa, GuestMemory, RFlags};
use testudo_vmx::controls::{
    ActivityState, EntryControls, ExitControls, Interruptibility, PinControls, PrimaryControls,
    SecondaryControls,
};
use testudo_vmx::image::VmcsImage;
use testudo_vmx::{AccessError, FieldGroup, VmcsRead, VmcsWrite, fields};

use super::apic::SettledApic;
use super::join::{Joined, L0Controls, L1Controls, inherited_efer};
use super::repeat::LastExit;
use super::shadow::{ShadowedFields, shadowed};
use super::vmcs12::LaunchState;
use super::{Context, Flush, NestedVmx, SecondStage, VmcsPair};

/// What may have changed.
const SIMPLE: ShadowedFields = shadowed(fields::GUEST_RIP.encoding())
    | shadowed(fields::GUEST_RSP.encoding())
    | shadowed(fields::GUEST_RFLAGS.encoding())
    | shadowed(fields::GUEST_INTERRUPTIBILITY.encoding())
    // No check looks at these.
    | shadowed(fields::HOST_RSP.encoding())
    | shadowed(fields::PREEMPTION_TIMER_VALUE.encoding())
    // No check looks at it, and each entry that it counts for loads it.
    | shadowed(fields::GUEST_INTERRUPT_STATUS.encoding())
    // These count with an event only, and then the entry is a complete one.
    | shadowed(fields::ENTRY_EXCEPTION_ERROR_CODE.encoding())
    | shadowed(fields::ENTRY_INSTRUCTION_LENGTH.encoding());

/// Exit controls by which registers of L2's are saved, but for EFER.
const GOVERNED: ExitControls = ExitControls::SAVE_PAT
    .union(ExitControls::SAVE_DEBUG_CONTROLS)
    .union(ExitControls::SAVE_PREEMPTION_TIMER);

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
#[derive(Clone, Debug)]
pub(super) struct Settled {
    /// Of L0's controls in `vmcs01`, the one that changes while L1 runs.
    tsc_offset: u64,
    /// EFER of L1: long mode decides about some checks, and what L1's VMCS does not say of L2's is from here.
    l1_efer: u64,
    /// L1's EPT pointer, and that of the composition.
    composed: Option<(u64, u64)>,
    /// L1's MSR bitmap, if it counts.
    pub(super) l1_bitmap: Option<Gpa>,
    /// What L1 has of APIC virtualization.
    pub(super) apic: Option<SettledApic>,
    debug: Origin,
    pat: Origin,
    efer: Origin,
    timer: bool,
    /// The processor waits in L2's halts.
    pub(super) may_halt: bool,
    /// Exits save a register of L2's that controls govern.
    pub(super) saves_governed: bool,
    /// What an exit since then found.
    pub(super) last_exit: LastExit,
}

impl Settled {
    /// After a complete entry with these controls; `None` if each entry must be a complete one.
    pub(super) fn of(
        vmcs12: &VmcsImage,
        l1: &L1Controls,
        l0: &L0Controls,
        joined: &Joined,
        composed: Option<u64>,
    ) -> Result<Option<Self>, AccessError> {
        // What is checked or loaded from memory, which L1 may have changed.
        let from_memory = vmcs12.get(fields::ENTRY_MSR_LOAD_COUNT)? != 0
            || vmcs12.get(fields::VMCS_LINK_POINTER)? != u64::MAX;
        // Without it, L2 shares the register with everybody.
        let loads_efer = l0.entry.contains(EntryControls::LOAD_EFER);
        if from_memory || !loads_efer {
            return Ok(None);
        }
        let composed = match composed {
            Some(_) if !l1.secondary.contains(SecondaryControls::ENABLE_EPT) => return Ok(None),
            Some(composed) => Some((vmcs12.get(fields::EPT_POINTER)?, composed)),
            None => None,
        };
        let bitmaps = PrimaryControls::USE_MSR_BITMAPS;
        let l1_bitmap = if (l0.primary & l1.primary).contains(bitmaps) {
            Some(Gpa(vmcs12.get(fields::MSR_BITMAPS)?))
        } else {
            None
        };
        let apic = SettledApic::of(vmcs12, l1)?;
        let origin = |load, save| Origin::of(l1.entry.contains(load), l1.exit.contains(save));
        Ok(Some(Self {
            tsc_offset: l0.tsc.offset,
            l1_efer: l0.efer,
            composed,
            l1_bitmap,
            apic,
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
            may_halt: !joined.primary.contains(PrimaryControls::HLT_EXITING),
            saves_governed: l1.exit.intersects(GOVERNED) || apic.is_some_and(|apic| apic.delivers),
            last_exit: LastExit::default(),
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
        let Some(settled) = &mut self.settled else {
            return Ok(false);
        };
        // With entries enlightened, memory says which VMCS is meant.
        let enlightened = self.enlightened.as_ref();
        if written & !SIMPLE != 0
            || enlightened.is_some_and(|enlightened| enlightened.has_assist_page())
            || self.current.is_none()
            || self.in_vmcs02 != self.current
            || self.vmcs12.launch_state != LaunchState::Launched
            || !is_simple(&self.vmcs12.image, written, settled)?
        {
            return Ok(false);
        }
        let image = &*self.vmcs12.image;
        let (own, fits) = {
            let vmcs01 = cx.vmcs.l1();
            let [state, tsc_offset, cr0, cr0_shadow] = vmcs01.get_group(&OF_L1)?;
            let state = Interruptibility::from_bits_retain(state as u32);
            if state.contains(Interruptibility::BLOCKING_BY_MOV_SS)
                || tsc_offset != settled.tsc_offset
                || vmcs01.get(fields::GUEST_EFER)? != settled.l1_efer
            {
                return Ok(false);
            }
            let load = settled.last_exit.load.as_ref();
            let fits = load.is_some_and(|load| load.fits(cr0, cr0_shadow));
            (OwnRegisters::of_l1(settled, &vmcs01)?, fits)
        };
        if let Some((eptp, composed)) = settled.composed
            && cx.second_stage.activate(eptp) != Some(composed)
        {
            return Ok(false);
        }
        let has_apic = settled.apic.is_some();
        if let Some(apic) = &settled.apic
            && (self.frames_stale || !apic.threshold_fits(cx.memory))
        {
            return Ok(false);
        }
        // Nothing stops the entry any more.
        if let Some(bitmap) = settled.l1_bitmap {
            let map = self.msr_bitmap.as_mut_bytes();
            // The processor reads the bitmap in memory at each access: a change needs no word to it.
            let _changed = self.open_msrs.merge(map, cx.memory, bitmap);
        }
        if let Some(load) = &mut settled.last_exit.load
            && fits
        {
            // What the next exit is to load; L1's own state has served.
            load.write(image.get(fields::HOST_RSP)?, &mut cx.vmcs.l1())?;
            self.host_loaded = true;
        }
        let mut vmcs02 = cx.vmcs.l2();
        macro_rules! push_written {
            ($($field:ident)*) => {$(
                if written & const { shadowed(fields::$field.encoding()) } != 0 {
                    vmcs02.set(fields::$field, image.get(fields::$field)?)?;
                }
            )*};
        }
        push_written!(GUEST_RIP GUEST_RSP GUEST_RFLAGS GUEST_INTERRUPTIBILITY);
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
        if has_apic {
            self.resume_apic(cx)?;
        }
        // Without VPID, no cached translation of L2 may be used.
        if self.vpid12 == 0 {
            self.flush |= Flush::VPID;
        }
        self.is_guest = true;
        Ok(true)
    }
}

/// Whether what L1 wrote passes the checks of its own without a look at anything else.
#[inline]
fn is_simple(
    image: &VmcsImage,
    written: ShadowedFields,
    settled: &Settled,
) -> Result<bool, AccessError> {
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

/// What an entry looks at of L1's own state, which must be, or be as good as, at the last complete one.
const OF_L1: FieldGroup<4> = FieldGroup::new([
    fields::GUEST_INTERRUPTIBILITY.encoding(),
    fields::TSC_OFFSET.encoding(),
    fields::GUEST_CR0.encoding(),
    fields::CR0_READ_SHADOW.encoding(),
]);

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
        self.efer = match settled.efer {
            Origin::Saved => None,
            Origin::L1Vmcs => Some(vmcs12.get(fields::GUEST_EFER)?),
            Origin::L1 => {
                let entry = EntryControls::from_bits_retain(vmcs12.get(fields::ENTRY_CONTROLS)?);
                let cr0 = vmcs12.get(fields::GUEST_CR0)?;
                Some(inherited_efer(settled.l1_efer, entry, cr0))
            }
        };
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
