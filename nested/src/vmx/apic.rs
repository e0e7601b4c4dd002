//! APIC virtualization for L2: what the processor does with L2's local APIC as L1 asks for it (SDM vol. 3C,
//! chapter 32).
//!
//! The controls of `vmcs02` about it are L1's alone: L0's own are about L1's local APIC. The pages that L1 names
//! are pages of its memory, and `vmcs02` names the frames behind them, which L0 looks up in its own table at
//! each complete entry. What L0 changes there later ends their use at once
//! ([`NestedVmx::forget_frames`]).

use testudo_arch::{Gpa, GuestMemory, RFlags};
use testudo_vmx::controls::{PrimaryControls, SecondaryControls};
use testudo_vmx::event::InterruptionInformation;
use testudo_vmx::image::VmcsImage;
use testudo_vmx::{AccessError, Defects, VmcsRead, VmcsWrite, fields};

use super::join::L1Controls;
use super::{Context, NestedVmx, SecondStage, VmcsPair};

/// Secondary controls about L2's local APIC. All but the first need a TPR shadow.
pub(super) const CONTROLS: SecondaryControls = SecondaryControls::VIRTUALIZE_APIC_ACCESSES
    .union(SecondaryControls::VIRTUALIZE_X2APIC_MODE)
    .union(SecondaryControls::APIC_REGISTER_VIRTUALIZATION)
    .union(SecondaryControls::VIRTUAL_INTERRUPT_DELIVERY);

/// With one of these an entry does not compare the task priority with its threshold (29.2.1.1).
const NO_THRESHOLD_CHECK: SecondaryControls = SecondaryControls::VIRTUALIZE_APIC_ACCESSES
    .union(SecondaryControls::VIRTUAL_INTERRUPT_DELIVERY);

/// Offset of the TPR in the virtual-APIC page.
const VTPR: u64 = 0x80;

/// The physical addresses, for the processor, of the pages that L1 names; 0 where it names none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Frames {
    pub(super) virtual_apic: u64,
    pub(super) apic_access: u64,
}

impl Frames {
    /// Those of the pages that L1's VMCS names, with these controls. `None`: a page is none of L1's memory.
    pub(super) fn find(
        vmcs12: &VmcsImage,
        l1: &L1Controls,
        stage: &mut impl SecondStage,
    ) -> Result<Option<Self>, AccessError> {
        let mut frames = Self::default();
        if l1.primary.contains(PrimaryControls::USE_TPR_SHADOW) {
            match stage.frame(Gpa(vmcs12.get(fields::VIRTUAL_APIC_ADDRESS)?)) {
                Some(frame) => frames.virtual_apic = frame.0,
                None => return Ok(None),
            }
        }
        if l1
            .secondary
            .contains(SecondaryControls::VIRTUALIZE_APIC_ACCESSES)
        {
            match stage.frame(Gpa(vmcs12.get(fields::APIC_ACCESS_ADDRESS)?)) {
                Some(frame) => frames.apic_access = frame.0,
                None => return Ok(None),
            }
        }
        Ok(Some(frames))
    }
}

/// What L2's local APIC adds to an entry that is like the one before.
#[derive(Clone, Copy, Debug)]
pub(super) struct SettledApic {
    /// The page whose TPR must not be below this threshold.
    threshold: Option<(Gpa, u8)>,
    /// The processor delivers interrupts, and keeps account of them in the guest interrupt status.
    pub(super) delivers: bool,
    /// The x2APIC mode is virtual, by these controls.
    pub(super) x2apic: Option<SecondaryControls>,
}

impl SettledApic {
    /// `None`: L1 does not use any of it.
    pub(super) fn of(vmcs12: &VmcsImage, l1: &L1Controls) -> Result<Option<Self>, AccessError> {
        let shadow = l1.primary.contains(PrimaryControls::USE_TPR_SHADOW);
        if !shadow && !l1.secondary.intersects(CONTROLS) {
            return Ok(None);
        }
        Ok(Some(Self {
            threshold: match shadow && !l1.secondary.intersects(NO_THRESHOLD_CHECK) {
                true => Some((
                    Gpa(vmcs12.get(fields::VIRTUAL_APIC_ADDRESS)?),
                    vmcs12.get(fields::TPR_THRESHOLD)? as u8 & 0xF,
                )),
                false => None,
            },
            delivers: delivers_interrupts(l1),
            x2apic: Some(l1.secondary)
                .filter(|s| s.contains(SecondaryControls::VIRTUALIZE_X2APIC_MODE)),
        }))
    }

    /// Whether the task priority in L1's memory lets an entry go on.
    #[inline(never)]
    pub(super) fn threshold_fits(&self, memory: &impl GuestMemory) -> bool {
        let Some((page, threshold)) = self.threshold else {
            return true;
        };
        threshold <= task_priority(memory, page)
    }
}

/// The class of the task priority in a virtual-APIC page of L1's. What is not memory reads as ones.
fn task_priority(memory: &impl GuestMemory, page: Gpa) -> u8 {
    let mut byte = [0xFF];
    let read = memory.read(page.wrapping_add(VTPR), &mut byte);
    if read.is_err() { 0xF } else { byte[0] >> 4 }
}

/// Whether the processor delivers L2's interrupts.
pub(super) fn delivers_interrupts(l1: &L1Controls) -> bool {
    let delivery = SecondaryControls::VIRTUAL_INTERRUPT_DELIVERY;
    l1.secondary.contains(delivery)
}

/// Where the x2APIC's MSRs are in an MSR bitmap, in words of 64 bits: reads, then writes.
const X2APIC_WORDS: [usize; 8] = [32, 33, 34, 35, 288, 289, 290, 291];
const READS: usize = 4;
/// Writes of the MSR for self IPIs, in the first word of writes.
const SELF_IPI: u64 = 1 << 0x3F;

/// The x2APIC's part of an MSR bitmap.
pub(super) type X2apicBits = [u64; 8];

/// It, of the bitmap with these bytes.
pub(super) fn x2apic_bits(bitmap: &[u8; 4096]) -> X2apicBits {
    let words = bitmap.as_chunks::<8>().0;
    X2APIC_WORDS.map(|word| words.get(word).map_or(u64::MAX, |w| u64::from_le_bytes(*w)))
}

/// The MSRs of which the processor virtualizes each access under these controls. Any other reaches the
/// processor's own local APIC, if it does not exit (32.5).
fn virtualized(secondary: SecondaryControls) -> X2apicBits {
    const TPR: u64 = 1 << 8;
    const EOI: u64 = 1 << 0xB;
    let mut bits = [0; 8];
    if !secondary.contains(SecondaryControls::VIRTUALIZE_X2APIC_MODE) {
        return bits;
    }
    bits[0] = TPR;
    bits[READS] = TPR;
    if secondary.contains(SecondaryControls::APIC_REGISTER_VIRTUALIZATION) {
        bits[..READS].fill(u64::MAX);
    }
    if secondary.contains(SecondaryControls::VIRTUAL_INTERRUPT_DELIVERY) {
        bits[READS] |= EOI | SELF_IPI;
    }
    bits
}

impl NestedVmx {
    /// Takes all MSRs of the x2APIC from L2.
    pub(super) fn close_x2apic(&mut self) {
        self.x2apic_open = false;
        let words = self.msr_bitmap.as_mut_bytes().as_chunks_mut::<8>().0;
        for word in X2APIC_WORDS {
            if let Some(bytes) = words.get_mut(word) {
                *bytes = [0xFF; 8];
            }
        }
    }

    /// Gives L2 those MSRs of the x2APIC that L1 gives it at `l1_bitmap` and that are virtual under these
    /// controls of `vmcs02`; what L0 gives L1 itself stays L1's to give.
    pub(super) fn merge_x2apic(
        &mut self,
        secondary: SecondaryControls,
        l1_bitmap: Gpa,
        memory: &impl GuestMemory,
    ) {
        self.x2apic_open = true;
        let words = self.msr_bitmap.as_mut_bytes().as_chunks_mut::<8>().0;
        let of_each = X2APIC_WORDS
            .into_iter()
            .zip(virtualized(secondary))
            .zip(self.l0_x2apic);
        for ((word, virtualized), l0) in of_each {
            let theirs = memory.load_u64(l1_bitmap.wrapping_add(8 * word as u64));
            let merged = (l0 & !virtualized) | theirs.unwrap_or(u64::MAX);
            if let Some(bytes) = words.get_mut(word) {
                *bytes = merged.to_le_bytes();
            }
        }
        if self
            .defects
            .contains(Defects::DELIVERS_MASKED_VIRTUAL_INTERRUPTS)
        {
            self.open_self_ipi(false);
        }
    }

    /// Lets L2 interrupt itself by an MSR that L1 gives it, or has that exit.
    pub(super) fn open_self_ipi(&mut self, open: bool) {
        let words = self.msr_bitmap.as_mut_bytes().as_chunks_mut::<8>().0;
        if let Some(bytes) = words.get_mut(X2APIC_WORDS[READS]) {
            let others = u64::from_le_bytes(*bytes) & !SELF_IPI;
            let exits = if open { 0 } else { SELF_IPI };
            *bytes = (others | exits).to_le_bytes();
        }
        self.self_ipi_open = open;
    }

    /// What an entry that is like the one before loads for L2's local APIC.
    #[inline(never)]
    pub(super) fn resume_apic<P: VmcsPair, M: GuestMemory, S, R>(
        &mut self,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<(), AccessError> {
        let settled = self.settled.as_ref();
        let Some((apic, l1_bitmap)) = settled.and_then(|s| Some((s.apic?, s.l1_bitmap))) else {
            return Ok(());
        };
        if apic.delivers {
            let status = self.vmcs12.image.get(fields::GUEST_INTERRUPT_STATUS)?;
            cx.vmcs.l2().set(fields::GUEST_INTERRUPT_STATUS, status)?;
            self.serving = (!self.defects.is_empty()).then_some((status >> 8) as u8);
        }
        if let (Some(secondary), Some(bitmap)) = (apic.x2apic, l1_bitmap) {
            self.merge_x2apic(secondary, bitmap, cx.memory);
        }
        if self.serving.is_some() {
            self.hold_back(cx)?;
        }
        Ok(())
    }

    /// Has the exit tell the virtual interrupt whose delivery it interrupted, on a processor that tells
    /// [another event](testudo_vmx::Defects::MISREPORTS_VIRTUAL_INTERRUPTS). `serving` was in service at the entry. With
    /// another one in service and interrupts enabled, none of the other's handler has run yet.
    #[cold]
    pub(super) fn mend_interrupted_delivery(
        &mut self,
        serving: u8,
        vmcs02: &mut impl VmcsWrite,
    ) -> Result<(), AccessError> {
        if self.self_ipi_open {
            self.open_self_ipi(false);
        }
        let now = (vmcs02.get(fields::GUEST_INTERRUPT_STATUS)? >> 8) as u8;
        self.serving = Some(now);
        if !self
            .defects
            .contains(Defects::MISREPORTS_VIRTUAL_INTERRUPTS)
        {
            return Ok(());
        }
        let information = InterruptionInformation(vmcs02.get(fields::IDT_VECTORING_INFORMATION)?);
        let enabled = vmcs02.get(fields::GUEST_RFLAGS)? & RFlags::INTERRUPT_FLAG.bits() != 0;
        if information.is_valid() && enabled && now != serving && now != 0 {
            let field = fields::IDT_VECTORING_INFORMATION.encoding();
            let value = 1 << 31 | u64::from(now);
            let write = vmcs02.write_raw(field, value);
            return write.map_err(|fail| AccessError::Write { field, value, fail });
        }
        Ok(())
    }

    /// L0 has changed its own table: the frames that `vmcs02` names may be others' soon. Before L2 runs again they
    /// are to be [looked up anew](Self::renew_frames), if they count.
    pub fn forget_frames(&mut self) {
        if self
            .joined
            .as_ref()
            .is_some_and(|joined| joined.has_frames())
        {
            self.settled = None;
            self.frames_stale = true;
        }
    }

    /// Whether L2 must not run before [`Self::renew_frames`].
    #[inline(always)]
    pub fn are_frames_stale(&self) -> bool {
        self.frames_stale && self.is_guest
    }

    /// Has `vmcs02` name the frames that are behind L1's pages now. `false`: one of these is L1's memory no
    /// more, and L2 cannot go on.
    ///
    /// # Errors
    ///
    /// L0's own access to a VMCS failed.
    #[cold]
    pub fn renew_frames<P: VmcsPair, M, S: SecondStage, R>(
        &mut self,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<bool, AccessError> {
        let l1 = L1Controls::read(&self.vmcs12.image)?;
        let Some(frames) = Frames::find(&self.vmcs12.image, &l1, cx.second_stage)? else {
            return Ok(false);
        };
        self.frames_stale = false;
        if let Some(joined) = &mut self.joined {
            let last = *joined;
            (joined.virtual_apic, joined.apic_access) = (frames.virtual_apic, frames.apic_access);
            // L0 drops all translations when it changes its table.
            self.access_page = frames.apic_access;
            joined.write_apic(Some(&last), &mut cx.vmcs.l2())?;
        }
        Ok(true)
    }

    /// Whether the processor may have refused to enter L2 because its task priority is below the threshold: L1
    /// can have changed the page since it was looked at.
    pub fn may_be_below_threshold(&self) -> bool {
        self.is_guest
            && self.joined.as_ref().is_some_and(|joined| {
                joined.primary.contains(PrimaryControls::USE_TPR_SHADOW)
                    && !joined.secondary.intersects(NO_THRESHOLD_CHECK)
                    && joined.tpr_threshold != 0
            })
    }

    /// Whether a halt of L2's ends at once, since an interrupt of its virtual local APIC is due: the processor would
    /// deliver it (32.2.2).
    ///
    /// # Errors
    ///
    /// L0's own access to a VMCS failed.
    pub fn has_virtual_interrupt<P: VmcsPair, M: GuestMemory, S, R>(
        &self,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<bool, AccessError> {
        let image = &*self.vmcs12.image;
        let l1 = L1Controls::read(image)?;
        // "Interrupt-window exiting" holds it back.
        let window = l1
            .primary
            .contains(PrimaryControls::INTERRUPT_WINDOW_EXITING);
        if !self.is_guest || !delivers_interrupts(&l1) || window {
            return Ok(false);
        }
        let page = Gpa(image.get(fields::VIRTUAL_APIC_ADDRESS)?);
        let vmcs02 = cx.vmcs.l2();
        let status = vmcs02.get(fields::GUEST_INTERRUPT_STATUS)?;
        // No shadow of STI or MOV SS outlives the HLT.
        let enabled = vmcs02.get(fields::GUEST_RFLAGS)? & RFlags::INTERRUPT_FLAG.bits() != 0;
        Ok(enabled && is_due(status, cx.memory, page))
    }
}

/// Whether an interrupt is requested, by this guest interrupt status, that its priority lets be delivered (32.2.1).
pub(super) fn is_due(status: u16, memory: &impl GuestMemory, page: Gpa) -> bool {
    let (requesting, serving) = (status as u8 >> 4, (status >> 12) as u8);
    // PPR virtualization: the higher of the task's class and that of the interrupt in service.
    requesting > task_priority(memory, page).max(serving)
}
