//! The machine's processors as AMD-V offers them.

use alloc::boxed::Box;

use testudo_arch::cpuid::Cpuid;
use testudo_arch::memory::GuestRam;
use testudo_arch::{FrameAlloc, Hpa, PageSize};
use testudo_ept::format::npt::{Npt, NptFlags};
use testudo_ept::{Format, PageTable, Rights};
use testudo_machine::backend::svm::{SvmTables, SvmVcpu, open_direct_msrs};
use testudo_machine::policy::cpuid::XCR0_ALLOWED;
use testudo_svm::caps::{SvmCaps, SvmUnavailable};
use testudo_svm::hw::{
    EnableError, HeldInterrupts, HostFrames, ResidentRegisters, ResidentUnsupported, Svm, VmcbFrame,
};
use testudo_svm::permission::{IoPermissionMap, MsrPermissionMap};
use testudo_svm::vmcb::Vmcb;

use crate::frames::Frames;

/// The one guest's address-space number.
const ASID: u32 = 1;

/// Why there is no AMD-V to use.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SvmError {
    #[error(transparent)]
    Unavailable(#[from] SvmUnavailable),
    #[error(transparent)]
    Enable(#[from] EnableError),
    #[error(transparent)]
    Resident(#[from] ResidentUnsupported),
    #[error("no memory is left for the tables")]
    NoMemory,
}

/// What all processors share.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SvmBackend {
    caps: SvmCaps,
    tables: SvmTables,
}

impl SvmBackend {
    /// Builds the tables through which a guest reaches `ram` and nothing else.
    pub(crate) fn new(cpuid: &Cpuid, ram: &GuestRam) -> Result<Self, SvmError> {
        let caps = SvmCaps::from_cpuid(cpuid)?;
        let format = Npt::new(caps.physical_address_bits);
        let flags = format.flags(Rights::all()).unwrap_or(NptFlags::empty());
        let table = PageTable::new(format, Frames).ok_or(SvmError::NoMemory)?;
        for (gpa, len, _) in ram.ranges() {
            let host = ram.host_pointer(gpa, len).ok_or(SvmError::NoMemory)?;
            let mapped = table.map(gpa, len, Hpa(host as u64), flags);
            mapped.map_err(|_| SvmError::NoMemory)?;
        }
        let mut msrs = Box::new(MsrPermissionMap::intercept_all());
        open_direct_msrs(&mut msrs);
        let ports = Box::new(IoPermissionMap::intercept_all());
        let tables = SvmTables {
            nested_root: table.root(),
            msr_permissions: address(Box::leak(msrs)),
            io_permissions: address(Box::leak(ports)),
        };
        // The processors use it until the end.
        core::mem::forget(table);
        Ok(Self { caps, tables })
    }

    /// Turns SVM on for this processor and makes a vCPU on it.
    pub(crate) fn with_vcpu<R>(
        &self,
        cpuid: &Cpuid,
        ram: &'static GuestRam,
        work: impl FnOnce(SvmVcpu<'_, GuestRam>) -> R,
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
        let held: HeldInterrupts<'_> = svm.hold_interrupts();
        // SAFETY: the runtime uses none of these registers and has CR4.OSXSAVE and OSFXSR set.
        unsafe { resident.load() };
        let [low, _, _, high] = cpuid.query(0xD, 0);
        let components = (u64::from(high) << 32 | u64::from(low)) & XCR0_ALLOWED;
        // SAFETY: `new` made the tables, which reach `ram` only; there is one guest, so its ASID is
        // its own, and each vCPU has its processor to itself.
        let vcpu =
            unsafe { SvmVcpu::new(held, vmcb, &self.caps, &self.tables, ASID, ram, components) };
        Ok(work(vcpu))
    }
}

fn address<T>(place: &T) -> Hpa {
    let address = Hpa(core::ptr::from_ref(place) as u64);
    debug_assert!(address.is_aligned(PageSize::Size4K));
    address
}
