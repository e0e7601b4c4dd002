//! The machine's processors as AMD-V offers them.

use alloc::boxed::Box;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use core::fmt;

use testudo_arch::cpuid::{Cpuid, hypervisor_signature};
use testudo_arch::memory::GuestRam;
use testudo_arch::{FrameAlloc, Gpa, Hpa, PageSize};
use testudo_ept::format::npt::{Npt, NptFlags};
use testudo_ept::{Format, PageTable, Rights};
use testudo_machine::Host;
use testudo_machine::backend::svm::{
    Flusher, NestedParts, SvmPlace, SvmTables, SvmVcpu, open_direct_msrs,
};
use testudo_machine::paged::{Managed, PagedError, PagedMemory, SharedPool, Shootdown};
use testudo_machine::paging::Paging;
use testudo_machine::policy::cpuid::XCR0_ALLOWED;
use testudo_nested::svm::{
    ComposedParts, ComposedStage, Host as NestedHost, NestedSvm, Pages, leaf_8000_000a, offer,
};
use testudo_svm::Defects;
use testudo_svm::caps::{Features, SvmCaps, SvmUnavailable};
use testudo_svm::hw::{
    EnableError, HeldInterrupts, HostFrames, ResidentRegisters, ResidentUnsupported, Svm, VmcbFrame,
};
use testudo_svm::permission::{IoPermissionMap, MsrPermissionMap};
use testudo_svm::vmcb::Vmcb;

use crate::frames::Frames;
use crate::shadow::Shadow;

/// What composes the nested page tables of a guest's own guests.
pub(crate) type Stage = ComposedStage<'static, GuestRam, Frames, Frames, Flusher>;

/// Why there is no AMD-V to use.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SvmError {
    #[error(transparent)]
    Unavailable(#[from] SvmUnavailable),
    #[error(transparent)]
    Enable(#[from] EnableError),
    #[error(transparent)]
    Resident(#[from] ResidentUnsupported),
    #[error("this processor has no nested paging")]
    NoNestedPaging,
    #[error("no memory is left for the tables")]
    NoMemory,
}

/// What all processors share.
pub(crate) struct SvmBackend {
    caps: SvmCaps,
    /// What a nested guest hypervisor is told that its processor offers.
    nested_caps: Option<SvmCaps>,
    table: &'static PageTable<Npt, Frames>,
    flags: NptFlags,
    paging: Paging,
    /// Whether shadow paging was taken for want of nested paging.
    substituted: bool,
    shadow: Option<Shadow<Npt>>,
    /// What has the vCPUs out of the guest, if its pages are shared.
    gates: Option<Arc<Shootdown>>,
    msr_permissions: Box<MsrPermissionMap>,
    io_permissions: Box<IoPermissionMap>,
    tables: SvmTables,
}

impl SvmBackend {
    /// Builds the tables through which a guest reaches `ram` and nothing else.
    pub(crate) fn new(
        cpuid: &Cpuid,
        ram: &GuestRam,
        paging: Option<Paging>,
    ) -> Result<Self, SvmError> {
        let caps = SvmCaps::from_cpuid(cpuid)?;
        let (paging, substituted) = match (paging, caps.has(Features::NP)) {
            (Some(Paging::Nested), false) => return Err(SvmError::NoNestedPaging),
            (None, false) => (Paging::Shadow, true),
            (paging, _) => (paging.unwrap_or(Paging::Nested), false),
        };
        let format = Npt::new(caps.physical_address_bits);
        let flags = format.flags(Rights::all()).unwrap_or(NptFlags::empty());
        let table = PageTable::new(format, Frames).ok_or(SvmError::NoMemory)?;
        let table: &'static _ = Box::leak(Box::new(table));
        for (gpa, len, _) in ram.ranges() {
            let host = ram.host_pointer(gpa, len).ok_or(SvmError::NoMemory)?;
            let mapped = table.map(gpa, len, Hpa(host as u64), flags);
            mapped.map_err(|_| SvmError::NoMemory)?;
        }
        let mut msr_permissions = Box::new(MsrPermissionMap::intercept_all());
        open_direct_msrs(&mut msr_permissions);
        let io_permissions = Box::new(IoPermissionMap::intercept_all());
        let tables = SvmTables {
            nested_root: table.root(),
            msr_permissions: address(&*msr_permissions),
            io_permissions: address(&*io_permissions),
        };
        Ok(Self {
            caps,
            nested_caps: None,
            table,
            flags,
            paging,
            substituted,
            shadow: None,
            gates: None,
            msr_permissions,
            io_permissions,
            tables,
        })
    }

    /// How the guest's memory is put behind its paging.
    pub(crate) fn paging(&self) -> Paging {
        self.paging
    }

    /// Why shadow paging takes the place of nested paging, though nobody asked for it.
    pub(crate) fn lack(&self) -> Option<String> {
        self.substituted
            .then(|| SvmError::NoNestedPaging.to_string())
    }

    /// Prepares shadow paging for a guest with these CPUID answers.
    pub(crate) fn enable_shadow(
        &mut self,
        host: Arc<dyn Host>,
        guest: &Cpuid,
        ram: &GuestRam,
        vcpus: usize,
    ) {
        let table = self.table;
        self.shadow = Some(Shadow::new(host, guest, ram, table, vcpus));
    }

    /// What shadow paging did, if it was used.
    pub(crate) fn shadow_figures(&self) -> Option<&dyn fmt::Display> {
        self.shadow.as_ref().map(|shadow| &shadow.tables as _)
    }

    /// Guest memory that comes and goes: all there, in frames from `first` on, or none yet; shared if
    /// there is a pool.
    pub(crate) fn manage(
        &mut self,
        (start, len): (Gpa, u64),
        first: Option<Hpa>,
        shootdown: Arc<Shootdown>,
        shared: Option<SharedPool>,
    ) -> Result<&'static dyn Managed, PagedError> {
        let (table, flags) = (self.table, self.flags);
        if shared.is_some() {
            self.gates = Some(shootdown.clone());
        }
        // SAFETY: the table is one guest's, whose machine has the shootdown, and the layout gives
        // each range once; the frames are the guest's, and `Frames` takes any. Each vCPU gets its gate.
        let pages = unsafe {
            let pages = match first {
                Some(first) => PagedMemory::resident_at(table, flags, start, len, first, shootdown),
                None => PagedMemory::unplugged(table, flags, start, len, shootdown),
            };
            match shared {
                Some(pool) => pages?.with_sharing(pool),
                None => pages,
            }
        };
        Ok(pages?.leak())
    }

    /// Puts into `processor` what a guest hypervisor may know of SVM. On shadow paging it shadows its
    /// guests' tables too.
    pub(crate) fn offer_nested(&self, processor: &mut Cpuid) {
        let mut features = offer(&self.caps);
        if self.paging == Paging::Shadow {
            features -= Features::NP;
        }
        processor.set(leaf_8000_000a(features));
    }

    /// Offers guests SVM, as their CPUID table says it.
    pub(crate) fn enable_nested(&mut self, guest: &Cpuid) -> Result<(), SvmError> {
        self.nested_caps = Some(SvmCaps::from_cpuid(guest)?);
        Ok(())
    }

    /// What one vCPU needs to be a hypervisor's.
    fn nested(
        &'static self,
        ram: &'static GuestRam,
        l1_caps: &SvmCaps,
    ) -> Result<NestedParts<Stage>, SvmError> {
        let host = NestedHost {
            caps: &self.caps,
            l1_caps,
            msr_permissions: &self.msr_permissions,
            io_permissions: &self.io_permissions,
            defects: defects(),
        };
        let pages = Pages::new().ok_or(SvmError::NoMemory)?;
        let at = address(&*pages);
        let state = NestedSvm::new(&host, pages, at).ok_or(SvmError::NoMemory)?;
        let flusher = Flusher::default();
        let parts = ComposedParts {
            memory: ram,
            inner: self.table,
            frames: Frames,
            format: Npt::new(self.caps.physical_address_bits),
            l1_format: Npt::new(l1_caps.physical_address_bits),
            page_limit: (ram.size() / testudo_arch::PAGE_SIZE) as usize,
        };
        let stage = ComposedStage::new(parts, flusher.clone());
        Ok(NestedParts {
            state,
            stage,
            flusher,
        })
    }

    /// Turns SVM on for this processor and makes a vCPU on it.
    pub(crate) fn with_vcpu<R>(
        &'static self,
        number: usize,
        cpuid: &Cpuid,
        ram: &'static GuestRam,
        work: impl FnOnce(SvmVcpu<'_, GuestRam, Stage>) -> R,
    ) -> Result<R, SvmError> {
        let frame = || Frames.alloc().ok_or(SvmError::NoMemory);
        let frames = HostFrames {
            save_area: frame()?,
            vmcb: frame()?,
        };
        // SAFETY: CPL 0, the capabilities are this processor's, the frames are fresh, the program's
        // flow stays on its processor, and the runtime sets the host's segments up once.
        let mut svm = unsafe { Svm::enable(&self.caps, frames)? };
        let resident = ResidentRegisters::reset(cpuid)?;
        let mut vmcb = Box::new(Vmcb::new());
        let at = address(&*vmcb);
        // SAFETY: memory is mapped where it is.
        let vmcb = unsafe { VmcbFrame::new(&mut vmcb, at) };
        let processor: HeldInterrupts<'_> = svm.hold_interrupts();
        // SAFETY: the runtime uses none of these registers and has CR4.OSXSAVE and OSFXSR set.
        unsafe { resident.load() };
        let [low, _, _, high] = cpuid.query(0xD, 0);
        let place = SvmPlace {
            processor,
            vmcb,
            caps: &self.caps,
            tables: &self.tables,
            number: number as u32,
            xcr0_valid: (u64::from(high) << 32 | u64::from(low)) & XCR0_ALLOWED,
            has_predictor_barrier: cpuid.query(0x8000_0008, 0)[1] & 1 << 12 != 0,
            defects: defects(),
        };
        // SAFETY: `new` made the tables, which reach `ram` only, and this value keeps them; each
        // vCPU has its processor to itself.
        let mut vcpu = unsafe { SvmVcpu::new(place, ram) };
        if let Some(gate) = self.gates.as_ref().and_then(|gates| gates.gate(number)) {
            vcpu = vcpu.with_gate(gate);
        }
        if let Some(shadow) = &self.shadow {
            vcpu = vcpu.with_shadow_paging(shadow.place(number));
        }
        if let Some(l1_caps) = &self.nested_caps {
            vcpu = vcpu.with_nested(self.nested(ram, l1_caps)?);
        }
        Ok(work(vcpu))
    }
}

/// What the processor does otherwise than the manual says.
fn defects() -> Defects {
    Defects::of(hypervisor_signature().as_ref())
}

fn address<T>(place: &T) -> Hpa {
    let address = Hpa(core::ptr::from_ref(place) as u64);
    debug_assert!(address.is_aligned(PageSize::Size4K));
    address
}
