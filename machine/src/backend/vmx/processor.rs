//! What a vCPU needs of the processor: its VMCS, the entry, and the few registers that no VMCS holds.

use core::sync::atomic::AtomicU32;

use testudo_arch::Msr;
use testudo_nested::vmx::{Msrs, VmcsPair};
use testudo_vmx::hw::instructions::{self, InveptKind, InvvpidKind, InvvpidOperands};
use testudo_vmx::hw::{CurrentVmcs, GuestMsrs, GuestRegisters, HeldInterrupts, Vmcs};
use testudo_vmx::{AccessError, Encoding, FieldGroup, VmFail, VmcsRead, VmcsWrite};

/// Whose VMCS is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// The guest's.
    L1 = 0,
    /// That of a guest of the guest's.
    L2 = 1,
    /// The one that the guest's VMREAD and VMWRITE reach by themselves.
    Shadow = 2,
}

/// A processor with the vCPU's VMCS current. Tests have another than the real one.
#[allow(
    unsafe_code,
    reason = "what the hardware does is the caller's to answer for"
)]
pub trait Processor: VmcsWrite {
    /// What loads and stores MSRs of the guest that stay in the processor.
    type GuestMsrs: Msrs;

    /// That.
    fn guest_msrs(&self) -> Self::GuestMsrs;

    /// Makes a VMCS current.
    ///
    /// # Errors
    ///
    /// There is none for the level, and the one that was current still is; or the processor does not
    /// take it, and no VMCS is current, so that every access fails.
    fn select(&mut self, level: Level) -> Result<(), VmFail>;

    /// Whether the guest has a shadow VMCS.
    fn has_shadow(&self) -> bool;

    /// Runs the guest until it exits.
    ///
    /// # Errors
    ///
    /// VM entry refused a control or the host state.
    ///
    /// # Safety
    ///
    /// What [`CurrentVmcs::enter`] asks.
    unsafe fn enter(&mut self, registers: &mut GuestRegisters) -> Result<(), VmFail>;

    /// Takes the host's interrupts that are pending.
    fn take_pending(&mut self);

    /// Takes the host's NMI by which the guest exited.
    fn take_nmi(&mut self);

    /// Takes the host's machine check by which the guest exited.
    fn take_machine_check(&mut self);

    /// Drops the cached linear translations of a level, as its own instruction would have.
    ///
    /// # Errors
    ///
    /// INVVPID failed.
    fn forget_translations(&mut self, level: Level) -> Result<(), VmFail>;

    /// Drops all that was derived from EPT tables.
    ///
    /// # Errors
    ///
    /// INVEPT failed.
    fn forget_ept(&mut self) -> Result<(), VmFail>;

    /// Sets the guest's XCR0.
    ///
    /// # Safety
    ///
    /// What [`CurrentVmcs::set_guest_xcr0`] asks.
    unsafe fn set_xcr0(&mut self, value: u64);

    /// The guest's PKRU.
    ///
    /// # Safety
    ///
    /// What [`CurrentVmcs::guest_pkru`] asks.
    unsafe fn pkru(&self) -> u32;

    /// The time-stamp counter.
    fn tsc(&self) -> u64;

    /// The guest's DR6.
    fn dr6(&self) -> u64;

    /// Sets the guest's DR6.
    fn set_dr6(&mut self, value: u64);
}

/// The processor that this code runs on.
pub struct ThisProcessor<'a> {
    vmcs: CurrentVmcs<'a>,
    level: Level,
    /// The VMCSs that are not current, by level.
    others: [Option<&'a mut Vmcs>; 3],
    held: HeldInterrupts,
    msrs: GuestMsrs,
    /// What drops the translations of L1 and of L2; `None` without VPIDs: then each entry and exit
    /// drops them.
    flush: Option<[InvvpidOperands; 2]>,
    /// There is a shadow VMCS, current or not.
    has_shadow: bool,
}

#[allow(
    unsafe_code,
    reason = "what exists on the processor is the caller's to know"
)]
impl<'a> ThisProcessor<'a> {
    /// With the VMCS of the guest, and with what drops its linear translations if they have a VPID.
    ///
    /// # Safety
    ///
    /// The processor has INVEPT of all contexts, and INVVPID of this kind.
    pub unsafe fn new(
        vmcs: CurrentVmcs<'a>,
        held: HeldInterrupts,
        flush: Option<InvvpidKind>,
    ) -> Self {
        Self {
            msrs: vmcs.guest_msrs(),
            vmcs,
            level: Level::L1,
            others: [const { None }; 3],
            held,
            flush: flush.map(|kind| [kind.into(); 2]),
            has_shadow: false,
        }
    }

    /// Adds the VMCS of L2, with what drops its translations, and a shadow VMCS.
    ///
    /// # Safety
    ///
    /// The processor has INVVPID of this kind.
    pub unsafe fn add(
        &mut self,
        l2: &'a mut Vmcs,
        flush_l2: Option<InvvpidKind>,
        shadow: Option<&'a mut Vmcs>,
    ) {
        if let (Some([_, of_l2]), Some(kind)) = (&mut self.flush, flush_l2) {
            *of_l2 = kind.into();
        }
        self.others[Level::L2 as usize] = Some(l2);
        self.has_shadow = shadow.is_some();
        self.others[Level::Shadow as usize] = shadow;
    }

    /// As [`Processor::enter`], unless `*unless` is not 0; says whether the guest ran
    /// ([`CurrentVmcs::enter_unless`]).
    ///
    /// # Errors
    ///
    /// VM entry refused a control or the host state.
    ///
    /// # Safety
    ///
    /// What [`CurrentVmcs::enter_unless`] asks.
    #[inline]
    pub unsafe fn enter_unless(
        &mut self,
        registers: &mut GuestRegisters,
        unless: &AtomicU32,
    ) -> Result<bool, VmFail> {
        // SAFETY: the caller's promise.
        unsafe { self.vmcs.enter_unless(registers, unless) }
    }
}

/// The VMCSs of a processor as the nested layer asks for them.
pub struct Pair<'p, P>(pub &'p mut P);

impl<P: Processor> VmcsPair for Pair<'_, P> {
    type Vmcs<'v>
        = &'v mut P
    where
        Self: 'v;

    #[inline(always)]
    fn l1(&mut self) -> &mut P {
        // If it cannot be made current none is, and each access fails and says so.
        let _selected = self.0.select(Level::L1);
        self.0
    }

    #[inline(always)]
    fn l2(&mut self) -> &mut P {
        let _selected = self.0.select(Level::L2);
        self.0
    }

    #[inline(always)]
    fn shadow(&mut self) -> Option<&mut P> {
        if !self.0.has_shadow() {
            return None;
        }
        let _selected = self.0.select(Level::Shadow);
        Some(self.0)
    }
}

impl VmcsRead for ThisProcessor<'_> {
    #[inline]
    fn read_raw(&self, field: Encoding) -> Result<u64, VmFail> {
        self.vmcs.read_raw(field)
    }

    #[inline(always)]
    fn get_group<const N: usize>(&self, group: &FieldGroup<N>) -> Result<[u64; N], AccessError> {
        self.vmcs.get_group(group)
    }
}

impl VmcsWrite for ThisProcessor<'_> {
    #[inline]
    fn write_raw(&mut self, field: Encoding, value: u64) -> Result<(), VmFail> {
        self.vmcs.write_raw(field, value)
    }

    #[inline(always)]
    fn set_group<const N: usize>(
        &mut self,
        group: &FieldGroup<N>,
        values: &[u64; N],
    ) -> Result<(), AccessError> {
        self.vmcs.set_group(group, values)
    }
}

#[allow(unsafe_code, reason = "the hardware itself")]
impl Processor for ThisProcessor<'_> {
    type GuestMsrs = ResidentMsrs;

    fn guest_msrs(&self) -> ResidentMsrs {
        ResidentMsrs(self.msrs)
    }

    #[inline(always)]
    fn select(&mut self, level: Level) -> Result<(), VmFail> {
        if level == self.level {
            return Ok(());
        }
        let Some(mut other) = self.others[level as usize].take() else {
            return Err(VmFail::Invalid);
        };
        let left = core::mem::replace(&mut self.level, level);
        let exchanged = self.vmcs.exchange(&mut other);
        let place = &mut self.others[left as usize];
        if exchanged.is_err() {
            *place = Some(other);
            return exchanged;
        }
        let other = place.insert(other);
        // The guest's VMREAD and VMWRITE reach it in memory.
        if left == Level::Shadow {
            return self.vmcs.write_back(other);
        }
        Ok(())
    }

    #[inline]
    fn has_shadow(&self) -> bool {
        self.has_shadow
    }

    #[inline]
    unsafe fn enter(&mut self, registers: &mut GuestRegisters) -> Result<(), VmFail> {
        // SAFETY: the caller's promise.
        unsafe { self.vmcs.enter(registers) }
    }

    fn take_pending(&mut self) {
        self.held.take_pending();
    }

    fn take_nmi(&mut self) {
        self.held.take_nmi();
    }

    fn take_machine_check(&mut self) {
        self.held.take_machine_check();
    }

    #[inline]
    fn forget_translations(&mut self, level: Level) -> Result<(), VmFail> {
        let Some([l1, l2]) = &self.flush else {
            return Ok(());
        };
        let operands = if level == Level::L1 { l1 } else { l2 };
        // SAFETY: a current VMCS is in VMX root operation, and the caller of `new` or `add`
        // vouched for the kind.
        unsafe { instructions::invvpid_operands(operands) }
    }

    fn forget_ept(&mut self) -> Result<(), VmFail> {
        // SAFETY: a current VMCS is in VMX root operation, and `new`'s caller promised INVEPT of
        // all contexts.
        unsafe { instructions::invept(InveptKind::AllContexts) }
    }

    unsafe fn set_xcr0(&mut self, value: u64) {
        // SAFETY: the caller's promise.
        unsafe { self.vmcs.set_guest_xcr0(value) };
    }

    unsafe fn pkru(&self) -> u32 {
        // SAFETY: the caller's promise.
        unsafe { self.vmcs.guest_pkru() }
    }

    #[inline]
    fn tsc(&self) -> u64 {
        // SAFETY: every 64-bit processor has the instruction, and CPL 0 may use it.
        unsafe { core::arch::x86_64::_rdtsc() }
    }

    fn dr6(&self) -> u64 {
        self.vmcs.guest_dr6()
    }

    fn set_dr6(&mut self, value: u64) {
        self.vmcs.set_guest_dr6(value);
    }
}

/// The MSRs of the guest that stay in the processor, for its MSR areas. There are no others in them.
#[derive(Clone, Copy, Debug)]
pub struct ResidentMsrs(GuestMsrs);

impl Msrs for ResidentMsrs {
    fn read(&mut self, msr: Msr) -> Option<u64> {
        self.0.read(msr)
    }

    fn write(&mut self, msr: Msr, value: u64) -> bool {
        self.0.write(msr, value) == Some(true)
    }
}
