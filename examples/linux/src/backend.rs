//! Which of the two extensions makes virtual processors here.

use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::Arc;
use core::fmt;

use testudo_arch::apic::ApicPage;
use testudo_arch::cpuid::Cpuid;
use testudo_arch::memory::GuestRam;
use testudo_arch::{Gpa, Hpa};
use testudo_machine::paged::{Managed, PagedError, SharedPool, Shootdown};
use testudo_machine::paging::Paging;
use testudo_machine::{Host, Stop, Vcpu};
use testudo_svm::caps::SvmUnavailable;
use testudo_vmx::caps::NoVmx;

use crate::svm::{SvmBackend, SvmError};
use crate::vmx::{VmxBackend, VmxError};

/// Why no guest can run.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BackendError {
    #[error("{0}, and {1}")]
    Neither(SvmUnavailable, NoVmx),
    #[error(transparent)]
    Svm(#[from] SvmError),
    #[error(transparent)]
    Vmx(#[from] VmxError),
    #[error("enlightened VMCSs are VT-x's, and this processor has AMD-V")]
    NoEnlightenedVmcb,
    #[error(transparent)]
    Memory(#[from] PagedError),
    #[error("memory that comes and goes needs nested paging")]
    NoManagedMemory,
    #[error("pages can be shared on nested paging only")]
    NoSharedMemory,
}

/// What the processor has.
pub(crate) enum Backend {
    /// AMD-V.
    Svm(Box<SvmBackend>),
    /// Intel VT-x.
    Vmx(Box<VmxBackend>),
}

/// What is done with a vCPU, of whichever type.
pub(crate) trait Work {
    /// The page of the local APIC that the vCPU is to have.
    fn apic_page(&self) -> Arc<ApicPage>;

    /// Does it.
    fn on<V: Vcpu>(self, vcpu: V) -> Stop;
}

impl Backend {
    /// The backend for this processor, with the tables through which a guest reaches `ram`. `paging`
    /// is what was asked for.
    pub(crate) fn new(
        cpuid: &Cpuid,
        ram: &GuestRam,
        paging: Option<Paging>,
    ) -> Result<Self, BackendError> {
        match SvmBackend::new(cpuid, ram, paging) {
            Ok(svm) => Ok(Self::Svm(Box::new(svm))),
            Err(SvmError::Unavailable(no_svm)) => match VmxBackend::new(ram, paging) {
                Ok(vmx) => Ok(Self::Vmx(Box::new(vmx))),
                Err(VmxError::Unavailable(no_vmx @ NoVmx::NotSupported)) => {
                    Err(BackendError::Neither(no_svm, no_vmx))
                }
                Err(error) => Err(error.into()),
            },
            Err(error) => Err(error.into()),
        }
    }

    /// How the guest's memory is put behind its paging.
    pub(crate) fn paging(&self) -> Paging {
        match self {
            Self::Svm(svm) => svm.paging(),
            Self::Vmx(vmx) => vmx.paging(),
        }
    }

    /// Whether a guest hypervisor may be told that no change of a page's size causes a machine check.
    pub(crate) fn pschange_mc_no(&self) -> bool {
        match self {
            // The processors that it does are Intel's.
            Self::Svm(_) => false,
            Self::Vmx(vmx) => vmx.pschange_mc_no(),
        }
    }

    /// Why shadow paging takes the place of nested paging, though nobody asked for it.
    pub(crate) fn lack(&self) -> Option<String> {
        match self {
            Self::Svm(svm) => svm.lack(),
            Self::Vmx(vmx) => vmx.lack(),
        }
    }

    /// Prepares shadow paging for a guest with these CPUID answers.
    pub(crate) fn enable_shadow(
        &mut self,
        host: Arc<dyn Host>,
        guest: &Cpuid,
        ram: &GuestRam,
        vcpus: usize,
    ) {
        match self {
            Self::Svm(svm) => svm.enable_shadow(host, guest, ram, vcpus),
            Self::Vmx(vmx) => vmx.enable_shadow(host, guest, ram, vcpus),
        }
    }

    /// What shadow paging did, if it was used.
    pub(crate) fn shadow_figures(&self) -> Option<&dyn fmt::Display> {
        match self {
            Self::Svm(svm) => svm.shadow_figures(),
            Self::Vmx(vmx) => vmx.shadow_figures(),
        }
    }

    /// Guest memory that comes and goes: all there, in frames from `first` on, or none yet; shared if
    /// there is a pool.
    pub(crate) fn manage(
        &mut self,
        range: (Gpa, u64),
        first: Option<Hpa>,
        shootdown: Arc<Shootdown>,
        shared: Option<SharedPool>,
    ) -> Result<&'static dyn Managed, BackendError> {
        if self.paging() == Paging::Shadow {
            return Err(match shared {
                Some(_) => BackendError::NoSharedMemory,
                None => BackendError::NoManagedMemory,
            });
        }
        Ok(match self {
            Self::Svm(svm) => svm.manage(range, first, shootdown, shared)?,
            Self::Vmx(vmx) => vmx.manage(range, first, shootdown, shared)?,
        })
    }

    /// Puts into `processor` what a guest hypervisor may know of the extension.
    pub(crate) fn offer_nested(&self, processor: &mut Cpuid) {
        match self {
            Self::Svm(svm) => svm.offer_nested(processor),
            // CPUID says no more than that there is VMX: the rest is in MSRs.
            Self::Vmx(_) => {}
        }
    }

    /// Offers guests the extension, as their CPUID table says it, with enlightened VMCSs or without.
    pub(crate) fn enable_nested(
        &mut self,
        guest: &Cpuid,
        enlightened: bool,
    ) -> Result<(), BackendError> {
        match self {
            Self::Svm(_) if enlightened => Err(BackendError::NoEnlightenedVmcb),
            Self::Svm(svm) => Ok(svm.enable_nested(guest)?),
            Self::Vmx(vmx) => Ok(vmx.enable_nested(guest, enlightened)?),
        }
    }

    /// Does `work` with a vCPU on this processor.
    pub(crate) fn run(
        &'static self,
        number: usize,
        cpuid: &Cpuid,
        ram: &'static GuestRam,
        work: impl Work,
    ) -> Result<Stop, BackendError> {
        match self {
            Self::Svm(svm) => Ok(svm.with_vcpu(number, cpuid, ram, |vcpu| work.on(vcpu))?),
            Self::Vmx(vmx) => {
                let page = work.apic_page();
                Ok(vmx.with_vcpu(number, cpuid, ram, &page, |vcpu| work.on(vcpu))?)
            }
        }
    }
}
