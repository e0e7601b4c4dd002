//! The nested state at rest: what a snapshot or a migration carries of VMX for L1.
//!
//! # Format, version 1
//!
//! | bytes | what |
//! | --- | --- |
//! | 0 | `TESTNVMX` |
//! | 8 | version, 32 bits |
//! | 12 | flags, 32 bits: 1 in VMX operation, 2 a VMCS is current, 4 L2 runs, 8 launched, 16 the VMCS is an enlightened one |
//! | 16, 24 | the VMXON region, the current-VMCS pointer or the page of the enlightened VMCS |
//! | 32 | the MSR of the VP assist page |
//! | 40 | zero |
//! | 64 | if a VMCS is current: its fields, as in [`VmcsImage`] (4 KiB) |
//!
//! All numbers are little-endian. While L2 runs, the image has L2's registers as they stand; those
//! that its controls do not save (the PAT, for instance) are the vCPU's and travel with it. L1's own
//! registers are the image's host state.
//!
//! VMCSs that are not current lie in L1's memory, in the layout of [`REVISION`](super::REVISION). KVM's
//! layout differs, so between KVM and this layer only an L1 can move that has cleared the others.

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;

use testudo_arch::{EferFlags, Gpa, GuestMemory, Hpa};
use testudo_vmx::check::{EntryContext, Violation, check_entry_from};
use testudo_vmx::encoding::FieldWidth;
use testudo_vmx::image::VmcsImage;
use testudo_vmx::{AccessError, VmcsRead, VmcsWrite, fields};

use super::apic::Frames;
use super::join::L1Controls;
use super::shadow::all_shadowed;
use super::vmcs12::LaunchState;
use super::{Context, NestedVmx, SecondStage, VmcsPair, kvm_layout};
use crate::kvm::{self, FormatError};

/// The nested state of one vCPU, apart from its memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedVmx {
    /// The VMXON region, in VMX operation.
    pub vmxon: Option<Gpa>,
    /// The current VMCS.
    pub current: Option<SavedVmcs>,
    /// Whether L2 runs.
    pub is_guest: bool,
    /// The MSR of the VP assist page; 0 where enlightened VMCSs are not offered. KVM's layout does not
    /// have it: there it is among the vCPU's MSRs.
    pub assist_page: u64,
}

/// A current VMCS, or an enlightened one that is active.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedVmcs {
    /// Where its region is. All ones for an enlightened one from KVM's layout: it is where the VP assist
    /// page says.
    pub at: Gpa,
    /// Whether it is an enlightened one.
    pub is_enlightened: bool,
    /// Its launch state.
    pub launch_state: LaunchState,
    /// Its fields.
    pub image: Box<VmcsImage>,
}

/// State that cannot be restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// Its bytes are not what they should be.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// L2 could not have run with it.
    #[error("a VMCS that no processor enters: {0}")]
    Invalid(Violation),
    /// A region that cannot be one, a current VMCS outside VMX operation, or L2 without a VMCS.
    #[error("an impossible combination of VMX operation and regions")]
    Regions,
    /// An enlightened VMCS where L1 is not offered them, or one that its VP assist page does not name.
    #[error("an enlightened VMCS that this vCPU cannot have")]
    Enlightened,
    /// There is no EPT for L2.
    #[error("no composition of L1's EPT")]
    SecondStage,
    /// A page of L2's local APIC is none of L1's memory.
    #[error("the nested guest's local APIC has a page outside memory")]
    ApicPages,
    /// The page-directory pointers that L2 runs with, in L1's memory, have reserved bits.
    #[error("the nested guest's page-directory pointers have reserved bits")]
    Pdptes,
    /// L2 runs in the vCPU that is to be restored.
    #[error("the vCPU is running a nested guest")]
    Busy,
    /// L0's own access to a VMCS failed.
    #[error(transparent)]
    Access(#[from] AccessError),
}

const NAME: &[u8; 8] = b"TESTNVMX";
const VERSION: u32 = 1;
const VMXON: u32 = 1;
const CURRENT: u32 = 2;
const GUEST: u32 = 4;
const LAUNCHED: u32 = 8;
const ENLIGHTENED: u32 = 16;
const BLOCK: usize = 64;

impl SavedVmx {
    /// In the format above.
    pub fn to_bytes(&self) -> Vec<u8> {
        let current = self.current.as_ref();
        let mut bytes = vec![0; BLOCK + current.map_or(0, |_| kvm::BLOCK)];
        let flag = |set, bit| if set { bit } else { 0 };
        let launched = current.is_some_and(|c| c.launch_state == LaunchState::Launched);
        let flags = flag(self.vmxon.is_some(), VMXON)
            | flag(current.is_some(), CURRENT)
            | flag(self.is_guest, GUEST)
            | flag(launched, LAUNCHED)
            | flag(current.is_some_and(|c| c.is_enlightened), ENLIGHTENED);
        kvm::set_own_header(&mut bytes, NAME, VERSION, flags);
        kvm::set_u64(&mut bytes, 16, self.vmxon.map_or(0, |at| at.0));
        kvm::set_u64(&mut bytes, 32, self.assist_page);
        if let Some(current) = current {
            kvm::set_u64(&mut bytes, 24, current.at.0);
            bytes[BLOCK..].copy_from_slice(current.image.as_bytes());
        }
        bytes
    }

    /// From the format above.
    ///
    /// # Errors
    ///
    /// [`FormatError`], if the bytes are something else.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, FormatError> {
        let flags = kvm::own_header(bytes, NAME, VERSION)?;
        if flags & !(VMXON | CURRENT | GUEST | LAUNCHED | ENLIGHTENED) != 0 {
            return Err(FormatError::Flags(flags));
        }
        let is_current = flags & CURRENT != 0;
        let expected = BLOCK + if is_current { kvm::BLOCK } else { 0 };
        if bytes.len() != expected {
            return Err(FormatError::Length {
                found: bytes.len(),
                expected,
            });
        }
        let launch_state = if flags & LAUNCHED != 0 {
            LaunchState::Launched
        } else {
            LaunchState::Clear
        };
        let current = is_current.then(|| {
            let mut image = Box::new(VmcsImage::new());
            image.as_mut_bytes().copy_from_slice(&bytes[BLOCK..]);
            SavedVmcs {
                at: Gpa(kvm::u64_at(bytes, 24)),
                is_enlightened: flags & ENLIGHTENED != 0,
                launch_state,
                image,
            }
        });
        Ok(Self {
            vmxon: (flags & VMXON != 0).then(|| Gpa(kvm::u64_at(bytes, 16))),
            current,
            is_guest: flags & GUEST != 0,
            assist_page: kvm::u64_at(bytes, 32),
        })
    }

    /// In KVM's layout.
    pub fn to_kvm(&self) -> Vec<u8> {
        // KVM's data are two blocks: the VMCS, and the shadow VMCS that it links to.
        let blocks = if self.current.is_some() { 2 } else { 0 };
        let mut bytes = vec![0; kvm::HEADER + blocks * kvm::BLOCK];
        let mut flags = if self.is_guest { kvm::GUEST_MODE } else { 0 };
        // An enlightened VMCS is none that is current.
        let pointer = match &self.current {
            Some(current) if current.is_enlightened => {
                flags |= kvm::EVMCS;
                u64::MAX
            }
            Some(current) => current.at.0,
            None => u64::MAX,
        };
        kvm::set_header(&mut bytes, kvm::FORMAT_VMX, flags);
        kvm::set_u64(&mut bytes, 8, self.vmxon.map_or(u64::MAX, |at| at.0));
        kvm::set_u64(&mut bytes, 16, pointer);
        if let Some(current) = &self.current {
            let block = &mut bytes[kvm::HEADER..kvm::HEADER + kvm::BLOCK];
            block[..4].copy_from_slice(&kvm_layout::REVISION.to_le_bytes());
            block[8] = u8::from(current.launch_state == LaunchState::Launched);
            for &(slot, at) in kvm_layout::OFFSETS {
                let value = slot.load(&current.image).to_le_bytes();
                let (at, width) = (usize::from(at), slot.field.width().bytes());
                block[at..at + width].copy_from_slice(&value[..width]);
            }
        }
        bytes
    }

    /// From KVM's layout.
    ///
    /// # Errors
    ///
    /// [`FormatError`], if the bytes are something else, or use SMM.
    pub fn from_kvm(bytes: &[u8]) -> Result<Self, FormatError> {
        const RUN_PENDING: u16 = 2;
        let flags = kvm::header(bytes, kvm::FORMAT_VMX)?;
        if flags & !(kvm::GUEST_MODE | RUN_PENDING | kvm::EVMCS) != 0 {
            return Err(FormatError::Flags(flags.into()));
        }
        let smm = u16::from_le_bytes([bytes[24], bytes[25]]);
        if smm != 0 {
            return Err(FormatError::Flags(smm.into()));
        }
        let pointer = |at| {
            Some(kvm::u64_at(bytes, at))
                .filter(|p| *p != u64::MAX)
                .map(Gpa)
        };
        let is_enlightened = flags & kvm::EVMCS != 0;
        let current = match pointer(16) {
            None if !is_enlightened => None,
            at => {
                let block = bytes.get(kvm::HEADER..kvm::HEADER + kvm::BLOCK);
                let block = block.ok_or(FormatError::Length {
                    found: bytes.len(),
                    expected: kvm::HEADER + kvm::BLOCK,
                })?;
                if kvm::u32_at(block, 0) != kvm_layout::REVISION {
                    return Err(FormatError::Version(kvm::u32_at(block, 0)));
                }
                Some(SavedVmcs {
                    at: at.unwrap_or(Gpa(u64::MAX)),
                    is_enlightened: is_enlightened && at.is_none(),
                    launch_state: match kvm::u32_at(block, 8) {
                        1 => LaunchState::Launched,
                        _ => LaunchState::Clear,
                    },
                    image: from_kvm_block(block),
                })
            }
        };
        Ok(Self {
            vmxon: pointer(8),
            current,
            is_guest: flags & kvm::GUEST_MODE != 0,
            assist_page: 0,
        })
    }
}

fn from_kvm_block(block: &[u8]) -> Box<VmcsImage> {
    let mut image = Box::new(VmcsImage::new());
    for &(slot, at) in kvm_layout::OFFSETS {
        let at = usize::from(at);
        let value = match slot.field.width() {
            FieldWidth::Bits16 => u64::from(u16::from_le_bytes([block[at], block[at + 1]])),
            FieldWidth::Bits32 => kvm::u32_at(block, at).into(),
            FieldWidth::Bits64 | FieldWidth::Natural => kvm::u64_at(block, at),
        };
        slot.store(&mut image, value);
    }
    image
}

impl NestedVmx {
    /// The nested state as it stands between two entries.
    ///
    /// # Errors
    ///
    /// L0's own access to a VMCS failed.
    pub fn save<P: VmcsPair, M, S, R>(
        &mut self,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<SavedVmx, AccessError> {
        // What is in the copy from here on no exit and no entry of L1's has put there.
        self.settled = None;
        self.take_delivery(cx)?;
        if self.is_guest {
            let l1 = L1Controls::read(&self.vmcs12.image)?;
            self.save_guest(&l1, cx)?;
            self.shadow_misses = all_shadowed(&self.caps);
            // What is on its way into L2, which an exit would report instead.
            let vmcs02 = cx.vmcs.l2();
            let image = &mut *self.vmcs12.image;
            let pending = vmcs02.get(fields::ENTRY_INTERRUPTION_INFORMATION)?;
            image.set(fields::ENTRY_INTERRUPTION_INFORMATION, pending)?;
            let code = vmcs02.get(fields::ENTRY_EXCEPTION_ERROR_CODE)?;
            image.set(fields::ENTRY_EXCEPTION_ERROR_CODE, code)?;
            let length = vmcs02.get(fields::ENTRY_INSTRUCTION_LENGTH)?;
            image.set(fields::ENTRY_INSTRUCTION_LENGTH, length)?;
        } else {
            // What L1 has written is then not in the shadow alone, and no entry would notice it.
            self.take_from_shadow(cx)?;
        }
        self.fetch_rare(cx)?;
        let current = self.region().map(|at| SavedVmcs {
            at,
            is_enlightened: self.current.is_none(),
            launch_state: self.vmcs12.launch_state,
            image: self.vmcs12.image.clone(),
        });
        Ok(SavedVmx {
            vmxon: self.vmxon,
            current,
            is_guest: self.is_guest,
            assist_page: self.assist_page().unwrap_or(0),
        })
    }

    /// Takes up saved state, in a vCPU that is not running L2 and whose `vmcs01` has L0's controls.
    ///
    /// # Errors
    ///
    /// [`RestoreError`]: the state is one that no vCPU of this kind can have been in. Then nothing
    /// may be run before another attempt succeeds.
    pub fn restore<P: VmcsPair, M: GuestMemory, S: SecondStage, R>(
        &mut self,
        saved: &SavedVmx,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<(), RestoreError> {
        if self.is_guest {
            return Err(RestoreError::Busy);
        }
        let current = saved.current.as_ref();
        let is_enlightened = current.is_some_and(|c| c.is_enlightened);
        let interface = saved.assist_page != 0 || is_enlightened;
        if interface && self.assist_page().is_none() {
            return Err(RestoreError::Enlightened);
        }
        self.set_enlightened(saved.assist_page, None);
        let mut at = current.map(|c| c.at);
        if is_enlightened && at == Some(Gpa(u64::MAX)) {
            at = self.named_enlightened_vmcs(cx.memory);
            if at.is_none() {
                return Err(RestoreError::Enlightened);
            }
        }
        let region = |at: Option<Gpa>| at.is_none_or(|at| self.is_region_address(at));
        let possible = region(saved.vmxon)
            && region(at)
            && (saved.vmxon.is_some() || current.is_none())
            && (saved.vmxon.is_none() || saved.vmxon != at)
            && (current.is_some() || !saved.is_guest);
        if !possible {
            return Err(RestoreError::Regions);
        }
        self.vmxon = saved.vmxon;
        self.current = at.filter(|_| !is_enlightened);
        self.set_enlightened(saved.assist_page, at.filter(|_| is_enlightened));
        self.in_vmcs02 = None;
        self.rare_dirty = true;
        self.rare_missing = false;
        self.shadow_misses = all_shadowed(&self.caps);
        self.settled = None;
        self.host_loaded = false;
        self.joined = None;
        self.flush = super::Flush::all();
        if let (Some(current), Some(at)) = (current, at) {
            self.vmcs12.image.clone_from(&current.image);
            self.vmcs12.launch_state = current.launch_state;
            if saved.is_guest {
                return self.restore_guest(at, cx);
            }
            self.give_to_shadow(cx)?;
        }
        Ok(())
    }

    fn restore_guest<P: VmcsPair, M: GuestMemory, S: SecondStage, R>(
        &mut self,
        at: Gpa,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<(), RestoreError> {
        let efer = cx.vmcs.l1().get(fields::GUEST_EFER)?;
        let context = EntryContext {
            long_mode: efer & EferFlags::LONG_MODE_ACTIVE.bits() != 0,
            in_smm: false,
            current_vmcs: Some(Hpa(at.0)),
            tracing: false,
            in_seam: false,
        };
        let violations = check_entry_from(&*self.vmcs12.image, &self.caps, &context)?;
        if let Some(&violation) = violations.first() {
            return Err(RestoreError::Invalid(violation));
        }
        let l1 = L1Controls::read(&self.vmcs12.image)?;
        let composed = self.compose(&l1, cx.second_stage)?;
        let composed = composed.ok_or(RestoreError::SecondStage)?;
        let pdptes = self.pdptes(&l1, cx.memory)?.ok_or(RestoreError::Pdptes)?;
        let frames = Frames::find(&self.vmcs12.image, &l1, cx.second_stage)?;
        let frames = frames.ok_or(RestoreError::ApicPages)?;
        self.note_vpid(&l1)?;
        self.load_l2(&l1, (composed, frames), &pdptes, cx)?;
        self.is_guest = true;
        Ok(())
    }
}
