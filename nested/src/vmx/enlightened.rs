//! Entries with an enlightened VMCS, by which L1 needs no VMREAD and VMWRITE (Hyper-V Top-Level
//! Functional Specification, "Nested Virtualization").
//!
//! L1 names a page of its memory in its VP assist page, the place of which it has told L0 by an MSR. An
//! entry copies both once, and all that is decided is decided by the copies: the fields go into L0's
//! copy of L1's VMCS and are checked there like any others. An exit writes back what it saves.
//!
//! While an enlightened VMCS is active there is no current VMCS: VMREAD and VMWRITE, which the
//! specification then leaves undefined, are VMfailInvalid. VMPTRLD, VMXOFF and a VMCLEAR of its page end
//! its time. It has no launch state: VMLAUNCH and VMRESUME both enter.

use alloc::boxed::Box;

use testudo_arch::{Gpa, GuestMemory};
use testudo_vmx::VmFail;
use testudo_vmx::image::VmcsImage;

use super::evmcs::{self, ENLIGHTENED_VERSION, Page};
use super::{NestedVmx, REVISION};

/// HV_X64_MSR_VP_ASSIST_PAGE: bit 0 enables the page at the address in bits 63:12.
const ENABLE: u64 = 1;
const ADDRESS: u64 = !0xFFF;

/// In the VP assist page: whether entries are enlightened, 7 reserved bytes, and the VMCS to use.
const ENLIGHTEN_ENTRY: u64 = 40;

/// What L1 has of the interface.
pub(super) struct Enlightened {
    /// The MSR.
    assist: u64,
    /// The VMCS that is active.
    active: Option<Gpa>,
    page: Page,
}

impl Enlightened {
    /// Whether L1 has a VP assist page, which says whether entries are enlightened.
    #[inline]
    pub(super) fn has_assist_page(&self) -> bool {
        self.assist & ENABLE != 0
    }
}

impl NestedVmx {
    /// Offers L1 enlightened VMCSs. Its capabilities are to be those of
    /// [`Offer::enlightened`](super::Offer::enlightened).
    #[must_use]
    pub fn with_enlightened_vmcs(mut self) -> Self {
        self.enlightened = Some(Box::new(Enlightened {
            assist: 0,
            active: None,
            page: [0; evmcs::SIZE],
        }));
        self
    }

    /// The MSR of the VP assist page; `None` where enlightened VMCSs are not offered.
    pub fn assist_page(&self) -> Option<u64> {
        self.enlightened.as_ref().map(|state| state.assist)
    }

    /// WRMSR of it. `false`: #GP, because no memory is there; `None` where there is no such register.
    pub fn write_assist_page(&mut self, value: u64, memory: &impl GuestMemory) -> Option<bool> {
        let state = self.enlightened.as_mut()?;
        // The first word is L0's: no interrupt goes without its EOI.
        if value & ENABLE != 0 && memory.write(Gpa(value & ADDRESS), &[0; 4]).is_err() {
            return Some(false);
        }
        state.assist = value;
        Some(true)
    }

    /// The enlightened VMCS that is active.
    #[inline]
    pub fn active_enlightened_vmcs(&self) -> Option<Gpa> {
        self.enlightened.as_ref()?.active
    }

    /// The region that L1's VMCS came from: its current one, or the enlightened one.
    #[inline]
    pub(super) fn region(&self) -> Option<Gpa> {
        self.current.or_else(|| self.active_enlightened_vmcs())
    }

    /// The enlightened VMCS that L1 names for its entries, if it has them enlightened.
    pub(super) fn named_enlightened_vmcs(&self, memory: &impl GuestMemory) -> Option<Gpa> {
        let state = self.enlightened.as_ref()?;
        if state.assist & ENABLE == 0 {
            return None;
        }
        let mut bytes = [0; 16];
        let at = Gpa(state.assist & ADDRESS).wrapping_add(ENLIGHTEN_ENTRY);
        memory.read(at, &mut bytes).ok()?;
        let (flags, pointer) = bytes.split_at(8);
        let mut word = [0; 8];
        word.copy_from_slice(pointer);
        let pointer = u64::from_le_bytes(word);
        (flags[0] != 0 && pointer != u64::MAX).then_some(Gpa(pointer))
    }

    /// Makes the enlightened VMCS that L1 names the one to enter with, and takes the copy; `None` if L1
    /// enters with its current VMCS.
    pub(super) fn load_enlightened(
        &mut self,
        launch: bool,
        memory: &impl GuestMemory,
    ) -> Result<Option<Gpa>, VmFail> {
        if self.enlightened.is_none() {
            return Ok(None);
        }
        let Some(at) = self.named_enlightened_vmcs(memory) else {
            self.deactivate_enlightened();
            return Ok(None);
        };
        let known = self.active_enlightened_vmcs() == Some(at);
        if !known {
            self.release_current(memory);
        }
        if !self.is_region_address(at) {
            return Err(VmFail::Invalid);
        }
        let Some(state) = &mut self.enlightened else {
            return Ok(None);
        };
        if memory.read(at, &mut state.page).is_err() {
            return Err(VmFail::Invalid);
        }
        // Hyper-V itself writes the revision identifier of VMCSs in place of the version.
        if ![ENLIGHTENED_VERSION, REVISION].contains(&evmcs::u32_at(&state.page, 0)) {
            return Err(VmFail::Invalid);
        }
        let mut clean = evmcs::clean_fields(&state.page);
        if launch || !known {
            // Whatever L1 says of another time: this copy begins with this page.
            *self.vmcs12.image = VmcsImage::new();
            clean = 0;
        }
        self.rare_dirty |= evmcs::load(&state.page, clean, &mut self.vmcs12.image);
        state.active = Some(at);
        Ok(Some(at))
    }

    /// No enlightened VMCS is active any more. All that it is to hold is in it.
    pub(super) fn deactivate_enlightened(&mut self) {
        if let Some(state) = &mut self.enlightened
            && state.active.take().is_some()
        {
            self.in_vmcs02 = None;
        }
    }

    /// What an exit saved, into the enlightened VMCS that is active.
    #[inline(always)]
    pub(super) fn store_enlightened(&mut self, memory: &impl GuestMemory) {
        if self.enlightened.is_some() {
            self.store_active(memory);
        }
    }

    /// Out of line: its frame would be a cost of L1s that do not have the interface.
    #[inline(never)]
    fn store_active(&mut self, memory: &impl GuestMemory) {
        if let Some(state) = &mut self.enlightened
            && let Some(at) = state.active
        {
            for (offset, bytes) in evmcs::store(&self.vmcs12.image, &mut state.page) {
                // L1 chose the place; what is not memory takes nothing.
                let _dropped = memory.write(at.wrapping_add(offset as u64), bytes).is_err();
            }
        }
    }

    /// The number of a failed instruction, into the enlightened VMCS that is active.
    pub(super) fn store_instruction_error(&self, number: u32, memory: &impl GuestMemory) {
        if let Some(at) = self.active_enlightened_vmcs() {
            let at = at.wrapping_add(evmcs::INSTRUCTION_ERROR as u64);
            let _dropped = memory.write(at, &number.to_le_bytes()).is_err();
        }
    }

    /// Takes up the interface's state from elsewhere.
    pub(super) fn set_enlightened(&mut self, assist: u64, active: Option<Gpa>) {
        if let Some(state) = &mut self.enlightened {
            (state.assist, state.active) = (assist, active);
        }
    }
}
