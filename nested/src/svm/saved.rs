//! The nested state at rest: what a snapshot or a migration carries of SVM for L1.
//!
//! L2's registers are those of the vCPU while L2 runs, so they travel with the vCPU's as well; here
//! they are in the block `l2`, for whoever saves nothing else.
//!
//! # Format, version 1
//!
//! | bytes | what |
//! | --- | --- |
//! | 0 | `TESTNSVM` |
//! | 8 | version, 32 bits |
//! | 12 | flags, 32 bits: 1 SVM is on, 2 GIF is set, 4 L2 runs, 8 with L2's registers |
//! | 16, 24 | VM_CR, VM_HSAVE_PA |
//! | 32 | where L1's control block is |
//! | 40 | zero |
//! | 64 | if L2 runs: a VMCB whose control area is L1's for L2, and whose save area is L1's own state |
//! | 4160 | with L2's registers: the save area of a VMCB, 1 KiB |
//!
//! All numbers are little-endian.

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;

use testudo_arch::{EferFlags, Gpa, Gprs, GuestMemory};
use testudo_svm::Vmcb;
use testudo_svm::caps::{Features, SvmCaps, VmCr};
use testudo_svm::check::{Outside, Violation, Violations, check_vmrun};
use testudo_svm::intercept::Misc2;
use testudo_svm::vmcb::{CleanBits, NestedControl};
use zerocopy::{FromZeros, IntoBytes};

use super::{Context, NestedSvm, SecondStage, image};
use crate::kvm::{self, FormatError};

/// The nested state of one vCPU, apart from its memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedSvm {
    /// EFER.SVME as L1 wrote it.
    pub is_enabled: bool,
    /// L1's global interrupt flag.
    pub gif: bool,
    /// VM_CR.
    pub vm_cr: u64,
    /// VM_HSAVE_PA.
    pub vm_hsave_pa: u64,
    /// What there is besides while L2 runs.
    pub guest: Option<SavedGuest>,
}

/// The part of the state that exists while L2 runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedGuest {
    /// Where L1's control block is.
    pub vmcb12_at: Gpa,
    /// Control area: L1's for L2, with events and virtual interrupts as they stand. Save area: L1's
    /// own state.
    pub block: Box<Vmcb>,
    /// Save area: L2's state. Without it, L2's registers are set by the vCPU's owner afterwards.
    pub l2: Option<Box<Vmcb>>,
}

/// State that cannot be restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// Its bytes are not what they should be.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// L2 could not have run with it.
    #[error("a control block that no processor accepts: {0}")]
    Invalid(Violation),
    /// VM_CR or VM_HSAVE_PA has a value that L1 could not have written, or L2 runs without SVM.
    #[error("an impossible combination of VM_CR, VM_HSAVE_PA and EFER.SVME")]
    Registers,
    /// There is no nested page table for L2.
    #[error("no composition of L1's nested page table")]
    SecondStage,
    /// L2 runs in the vCPU that is to be restored.
    #[error("the vCPU is running a nested guest")]
    Busy,
}

const NAME: &[u8; 8] = b"TESTNSVM";
const VERSION: u32 = 1;
const ENABLED: u32 = 1;
const GIF: u32 = 2;
const GUEST: u32 = 4;
const REGISTERS: u32 = 8;
const BLOCK: usize = 64;
const L2: usize = BLOCK + kvm::BLOCK;
const SAVE: core::ops::Range<usize> = 0x400..0x800;

impl SavedSvm {
    /// In the format above.
    pub fn to_bytes(&self) -> Vec<u8> {
        let guest = self.guest.as_ref();
        let l2 = guest.and_then(|g| g.l2.as_ref());
        let length = match (guest, l2) {
            (None, _) => BLOCK,
            (Some(_), None) => L2,
            (Some(_), Some(_)) => L2 + SAVE.len(),
        };
        let mut bytes = vec![0; length];
        let flag = |set, bit| if set { bit } else { 0 };
        let flags = flag(self.is_enabled, ENABLED)
            | flag(self.gif, GIF)
            | flag(guest.is_some(), GUEST)
            | flag(l2.is_some(), REGISTERS);
        kvm::set_own_header(&mut bytes, NAME, VERSION, flags);
        kvm::set_u64(&mut bytes, 16, self.vm_cr);
        kvm::set_u64(&mut bytes, 24, self.vm_hsave_pa);
        if let Some(guest) = guest {
            kvm::set_u64(&mut bytes, 32, guest.vmcb12_at.0);
            bytes[BLOCK..L2].copy_from_slice(guest.block.as_bytes());
        }
        if let Some(l2) = l2 {
            bytes[L2..].copy_from_slice(&l2.as_bytes()[SAVE]);
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
        if flags & !(ENABLED | GIF | GUEST | REGISTERS) != 0 {
            return Err(FormatError::Flags(flags));
        }
        let expected = match (flags & GUEST != 0, flags & REGISTERS != 0) {
            (false, false) => BLOCK,
            (true, false) => L2,
            (true, true) => L2 + SAVE.len(),
            (false, true) => return Err(FormatError::Flags(flags)),
        };
        if bytes.len() != expected {
            return Err(FormatError::Length {
                found: bytes.len(),
                expected,
            });
        }
        let guest = (flags & GUEST != 0).then(|| SavedGuest {
            vmcb12_at: Gpa(kvm::u64_at(bytes, 32)),
            block: block(&bytes[BLOCK..L2]),
            l2: (flags & REGISTERS != 0).then(|| {
                let mut l2 = Box::new(Vmcb::new_zeroed());
                l2.as_mut_bytes()[SAVE].copy_from_slice(&bytes[L2..]);
                l2
            }),
        });
        Ok(Self {
            is_enabled: flags & ENABLED != 0,
            gif: flags & GIF != 0,
            vm_cr: kvm::u64_at(bytes, 16),
            vm_hsave_pa: kvm::u64_at(bytes, 24),
            guest,
        })
    }

    /// In KVM's layout. VM_CR, VM_HSAVE_PA, EFER and L2's registers travel as the vCPU's there.
    pub fn to_kvm(&self) -> Vec<u8> {
        let length = kvm::HEADER + self.guest.as_ref().map_or(0, |_| kvm::BLOCK);
        let mut bytes = vec![0; length];
        let mut flags = if self.gif { kvm::GIF_SET } else { 0 };
        if let Some(guest) = &self.guest {
            flags |= kvm::GUEST_MODE;
            kvm::set_u64(&mut bytes, 8, guest.vmcb12_at.0);
            bytes[kvm::HEADER..].copy_from_slice(guest.block.as_bytes());
        }
        kvm::set_header(&mut bytes, kvm::FORMAT_SVM, flags);
        bytes
    }

    /// From KVM's layout, with what travels separately there.
    ///
    /// KVM's "run pending" flag (L2 has not run yet since VMRUN) needs no counterpart: a pending
    /// event is in EVENTINJ of the block.
    ///
    /// # Errors
    ///
    /// [`FormatError`], if the bytes are something else.
    pub fn from_kvm(
        bytes: &[u8],
        efer: u64,
        vm_cr: u64,
        vm_hsave_pa: u64,
    ) -> Result<Self, FormatError> {
        const RUN_PENDING: u16 = 2;
        let flags = kvm::header(bytes, kvm::FORMAT_SVM)?;
        if flags & !(kvm::GUEST_MODE | RUN_PENDING | kvm::GIF_SET) != 0 {
            return Err(FormatError::Flags(flags.into()));
        }
        let is_guest = flags & kvm::GUEST_MODE != 0;
        let expected = kvm::HEADER + if is_guest { kvm::BLOCK } else { 0 };
        if bytes.len() != expected {
            return Err(FormatError::Length {
                found: bytes.len(),
                expected,
            });
        }
        let guest = is_guest.then(|| SavedGuest {
            vmcb12_at: Gpa(kvm::u64_at(bytes, 8)),
            block: block(&bytes[kvm::HEADER..]),
            l2: None,
        });
        Ok(Self {
            is_enabled: efer & EferFlags::SECURE_VIRTUAL_MACHINE_ENABLE.bits() != 0,
            gif: flags & kvm::GIF_SET != 0,
            vm_cr,
            vm_hsave_pa,
            guest,
        })
    }
}

fn block(bytes: &[u8]) -> Box<Vmcb> {
    let mut vmcb = Box::new(Vmcb::new_zeroed());
    vmcb.as_mut_bytes().copy_from_slice(bytes);
    vmcb
}

impl NestedSvm {
    /// The nested state as it stands between two entries. It changes nothing.
    pub fn save(&self, gprs: &Gprs, vmcb01: &Vmcb) -> SavedSvm {
        let guest = self.is_guest.then(|| {
            let mut block = self.vmcb12.clone();
            block.as_mut_bytes()[SAVE].copy_from_slice(&vmcb01.as_bytes()[SAVE]);
            let vmcb02 = &self.pages.vmcb;
            block.set_event_inj(vmcb02.event_inj());
            block.set_interrupt_state(vmcb02.interrupt_state());
            block.set_virtual_interrupts(self.collected_virtual_interrupts());
            block.set_clean(CleanBits::empty());
            let mut l2 = Box::new(Vmcb::new());
            l2.as_mut_bytes()[SAVE].copy_from_slice(&vmcb02.as_bytes()[SAVE]);
            l2.set_rax(gprs.rax);
            l2.set_rsp(gprs.rsp);
            l2.set_clean(CleanBits::empty());
            SavedGuest {
                vmcb12_at: self.vmcb12_at,
                block,
                l2: Some(l2),
            }
        });
        SavedSvm {
            is_enabled: self.is_enabled,
            gif: self.gif(vmcb01),
            vm_cr: self.vm_cr.bits(),
            vm_hsave_pa: self.vm_hsave_pa,
            guest,
        }
    }

    /// Takes up saved state, in a vCPU that is not running L2. `vmcb01` has L0's controls already;
    /// if L2 was running, it gets L1's own registers here, and `vmcb02` L2's.
    ///
    /// # Errors
    ///
    /// [`RestoreError`]: the state is one that no vCPU of this kind can have been in. Then nothing
    /// may be run before another attempt succeeds.
    pub fn restore<M: GuestMemory, S: SecondStage>(
        &mut self,
        saved: &SavedSvm,
        cx: &mut Context<'_, M, S>,
    ) -> Result<(), RestoreError> {
        if self.is_guest {
            return Err(RestoreError::Busy);
        }
        let vm_cr = VmCr::from_bits_retain(saved.vm_cr);
        let known = VmCr::from_bits_truncate(0x1F);
        let hsave = saved.vm_hsave_pa;
        let possible = (vm_cr - known).is_empty()
            && hsave & 0xFFF == 0
            && hsave < self.l1_caps.physical_limit()
            && !(saved.is_enabled && vm_cr.contains(VmCr::SVMDIS))
            && (saved.is_enabled || saved.guest.is_none());
        if !possible {
            return Err(RestoreError::Registers);
        }
        self.vm_cr = vm_cr;
        self.vm_hsave_pa = hsave;
        self.is_enabled = saved.is_enabled;
        self.is_cached = false;
        self.asids.flush_all();
        self.flush_l1 = true;
        self.adjust_vmcb01(cx.vmcb01);
        self.set_gif(saved.gif, cx.vmcb01);
        match &saved.guest {
            Some(guest) => self.restore_guest(guest, cx),
            None => Ok(()),
        }
    }

    fn restore_guest<M: GuestMemory, S: SecondStage>(
        &mut self,
        guest: &SavedGuest,
        cx: &mut Context<'_, M, S>,
    ) -> Result<(), RestoreError> {
        if self.check_address(guest.vmcb12_at).is_err() {
            return Err(RestoreError::Registers);
        }
        let l2 = guest.l2.as_ref().unwrap_or(&guest.block);
        *self.vmcb12 = (*guest.block).clone();
        self.vmcb12.as_mut_bytes()[SAVE].copy_from_slice(&l2.as_bytes()[SAVE]);
        self.ignore_what_is_not_offered();
        let outside = Outside {
            host_cr0: guest.block.cr0(),
            u_cet: 0,
        };
        let violations = check_vmrun(&self.vmcb12, &self.l1_caps, &outside);
        if let Some(&violation) = violations.first() {
            return Err(RestoreError::Invalid(violation));
        }
        let violations = self.check_l1(&guest.block);
        if let Some(&violation) = violations.first() {
            return Err(RestoreError::Invalid(violation));
        }
        // L1's own registers, all of which `vmcb01` holds while L2 runs; what VMLOAD moves is L2's.
        image::copy_own_state(&guest.block, cx.vmcb01);
        image::copy_resident(l2, cx.vmcb01);
        let svme = EferFlags::SECURE_VIRTUAL_MACHINE_ENABLE.bits();
        cx.vmcb01.set_efer(cx.vmcb01.efer() | svme);
        cx.vmcb01.mark_dirty(CleanBits::all());

        self.vmcb12_at = guest.vmcb12_at;
        // The flush that an entry made then is not due again; everything is flushed anyway.
        self.vmcb12
            .set_tlb_control(testudo_svm::vmcb::TlbControl::DoNothing);
        if !self.select_translation(CleanBits::empty(), cx) {
            return Err(RestoreError::SecondStage);
        }
        self.join_controls(cx);
        self.join_state(CleanBits::empty(), cx.vmcb01);
        cx.gprs.rax = self.vmcb12.rax();
        cx.gprs.rsp = self.vmcb12.rsp();
        self.is_guest = true;
        self.is_cached = true;
        Ok(())
    }

    /// What a processor would object to in L1's own registers, which L0 is going to run.
    fn check_l1(&self, block: &Vmcb) -> Violations {
        let mut own = Box::new(block.clone());
        own.as_mut_bytes()[..SAVE.start].fill(0);
        own.set_asid(1);
        own.set_intercept_misc2(Misc2::VMRUN);
        own.set_efer(own.efer() | EferFlags::SECURE_VIRTUAL_MACHINE_ENABLE.bits());
        own.set_nested_control(NestedControl::NP_ENABLE);
        let caps = SvmCaps {
            features: self.l1_caps.features | Features::NP,
            ..self.l1_caps
        };
        check_vmrun(&own, &caps, &Outside::default())
    }
}
