//! The machine's processors as Intel VT-x offers them.

use alloc::boxed::Box;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use core::fmt;
use core::ptr::NonNull;

use testudo_arch::apic::ApicPage;
use testudo_arch::cpuid::Cpuid;
use testudo_arch::memory::GuestRam;
use testudo_arch::{FrameAlloc, Gpa, Hpa, Msr, PAGE_SIZE, PageSize};
use testudo_ept::format::ept::{Ept, EptFlags};
use testudo_ept::{Format, PageTable, Rights};
use testudo_machine::backend::vmx::{
    APIC_PAGE, ApicTables, Controls, Flusher, NestedParts, ShadowBitmaps, SwitchedMsrs,
    ThisProcessor, Unsuitable, VmxPlace, VmxTables, VmxVcpu, ept_format, offers_shadowing,
    open_direct_msrs, open_x2apic_msrs,
};
use testudo_machine::paged::{Managed, PagedError, PagedMemory, SharedPool, Shootdown};
use testudo_machine::paging::Paging;
use testudo_machine::policy::cpuid::XCR0_ALLOWED;
use testudo_machine::policy::msr::IF_PSCHANGE_MC_NO;
use testudo_machine::{Host, VcpuError};
use testudo_nested::vmx::{ComposedParts, ComposedStage, Offer, offer, shadow_bitmaps};
use testudo_rt::msr;
use testudo_vmx::bitmap::{FieldBitmap, MsrBitmap};
use testudo_vmx::caps::{NoVmx, Processor};
use testudo_vmx::hw::{
    EnableError, RegionFrame, ResidentRegisters, ResidentUnsupported, VmcsKind, Vmx,
};
use testudo_vmx::{Defects, RegionError, VmxCaps};

use crate::frames::Frames;
use crate::shadow::Shadow;

/// The one guest's VPID.
const VPID: u16 = 1;
/// That of its own guests.
const VPID_L2: u16 = 2;

/// What composes the EPT of a guest's own guests with ours.
pub(crate) type Stage = ComposedStage<'static, GuestRam, Frames, Frames, Flusher>;

/// Why there is no VT-x to use.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VmxError {
    #[error(transparent)]
    Unavailable(#[from] NoVmx),
    #[error(transparent)]
    Unsuitable(#[from] Unsuitable),
    #[error(
        "this processor's VMX differs from the first one's (its VMCS revision is {revision:#x})"
    )]
    Different { revision: u32 },
    #[error(transparent)]
    Enable(#[from] EnableError),
    #[error("the VMCS cannot be used: {0}")]
    Vmcs(RegionError),
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    #[error(transparent)]
    Resident(#[from] ResidentUnsupported),
    #[error("no memory is left for the tables")]
    NoMemory,
    #[error(
        "without fields for EFER and PAT in the processor's VMCS, guests cannot be hypervisors"
    )]
    NoNestedLoads,
}

/// What all processors share.
pub(crate) struct VmxBackend {
    caps: VmxCaps,
    /// What a guest hypervisor is told that its processor offers.
    nested_caps: Option<Box<VmxCaps>>,
    /// Whether it is offered enlightened VMCSs.
    enlightened: bool,
    /// Which fields its VMREAD and VMWRITE reach without an exit, where the processor has that.
    shadowing: Option<Box<(FieldBitmap, FieldBitmap)>>,
    controls: Controls,
    tables: VmxTables,
    table: &'static PageTable<Ept, Frames>,
    flags: EptFlags,
    /// Why shadow paging was taken, though nobody asked for it.
    lack: Option<Unsuitable>,
    shadow: Option<Shadow<Ept>>,
    /// What has the vCPUs out of the guest, if its pages are shared.
    gates: Option<Arc<Shootdown>>,
    msr_bitmap: Box<MsrBitmap>,
    _apic: Option<Apic>,
}

/// What the processor needs to virtualize local APICs.
struct Apic {
    table: PageTable<Ept, Frames>,
    access_page: Hpa,
    msr_bitmap: Box<MsrBitmap>,
}

impl Apic {
    fn new(caps: &VmxCaps, ram: &GuestRam) -> Result<Self, VmxError> {
        let format = ept_format(caps);
        let table = map(format, ram)?;
        let access_page = Frames.alloc().ok_or(VmxError::NoMemory)?;
        let flags = format.flags(Rights::all()).unwrap_or(EptFlags::empty());
        let mapped = table.map(APIC_PAGE, PAGE_SIZE, access_page, flags);
        mapped.map_err(|_| VmxError::NoMemory)?;
        let mut msr_bitmap = Box::new(MsrBitmap::all_exit());
        open_direct_msrs(&mut msr_bitmap);
        open_x2apic_msrs(&mut msr_bitmap, Defects::of(caps));
        Ok(Self {
            table,
            access_page,
            msr_bitmap,
        })
    }

    fn tables(&self, caps: &VmxCaps) -> ApicTables {
        ApicTables {
            ept_pointer: ept_format(caps).pointer(self.table.root()),
            access_page: self.access_page,
            x2apic_msr_bitmap: address(&*self.msr_bitmap),
        }
    }
}

/// Tables through which a guest reaches `ram` and nothing else.
fn map(format: Ept, ram: &GuestRam) -> Result<PageTable<Ept, Frames>, VmxError> {
    let flags = format.flags(Rights::all()).unwrap_or(EptFlags::empty());
    let table = PageTable::new(format, Frames).ok_or(VmxError::NoMemory)?;
    for (gpa, len, _) in ram.ranges() {
        let host = ram.host_pointer(gpa, len).ok_or(VmxError::NoMemory)?;
        let mapped = table.map(gpa, len, Hpa(host as u64), flags);
        mapped.map_err(|_| VmxError::NoMemory)?;
    }
    Ok(table)
}

impl VmxBackend {
    /// Builds the tables through which a guest reaches `ram` and nothing else.
    pub(crate) fn new(ram: &GuestRam, paging: Option<Paging>) -> Result<Self, VmxError> {
        // SAFETY: CPL 0.
        let caps = unsafe { Vmx::capabilities()? };
        let (controls, lack) = match (paging, Controls::choose(&caps)) {
            (Some(Paging::Shadow), _) => (Controls::choose_shadow(&caps)?, None),
            (Some(Paging::Nested), controls) => (controls?, None),
            (None, Ok(controls)) => (controls, None),
            (None, Err(lack)) => (Controls::choose_shadow(&caps)?, Some(lack)),
        };
        let format = if controls.has_ept() {
            ept_format(&caps)
        } else {
            // Only software looks at the table.
            Ept::new(caps.processor.physical_address_bits)
        };
        let flags = format.flags(Rights::all()).unwrap_or(EptFlags::empty());
        let table: &'static _ = Box::leak(Box::new(map(format, ram)?));
        let mut msr_bitmap = Box::new(MsrBitmap::all_exit());
        open_direct_msrs(&mut msr_bitmap);
        let apic = match controls.virtual_apic {
            true => Some(Apic::new(&caps, ram)?),
            false => None,
        };
        let tables = VmxTables {
            ept_pointer: format.pointer(table.root()),
            msr_bitmap: address(&*msr_bitmap),
            apic: apic.as_ref().map(|apic| apic.tables(&caps)),
        };
        Ok(Self {
            caps,
            nested_caps: None,
            enlightened: false,
            shadowing: None,
            controls,
            tables,
            table,
            flags,
            lack,
            shadow: None,
            gates: None,
            msr_bitmap,
            _apic: apic,
        })
    }

    /// Offers guests VMX, on a processor such as their CPUID table says. On shadow paging they shadow
    /// their guests' tables too.
    ///
    /// # Errors
    ///
    /// The processor has too little for it.
    pub(crate) fn enable_nested(
        &mut self,
        guest: &Cpuid,
        enlightened: bool,
    ) -> Result<(), VmxError> {
        if self.controls.switches_by_lists() {
            return Err(VmxError::NoNestedLoads);
        }
        let l1 = Processor::read_from(|leaf, sub| guest.query(leaf, sub));
        let wanted = Offer {
            ept: self.controls.has_ept(),
            vpid: true,
            apic: self.controls.has_ept(),
            enlightened,
        };
        self.enlightened = enlightened;
        self.controls = self.controls.for_hypervisors();
        let offered = offer(&self.caps, l1, wanted);
        self.shadowing = offers_shadowing(&self.caps).then(|| Box::new(shadow_bitmaps(&offered)));
        self.nested_caps = Some(Box::new(offered));
        Ok(())
    }

    /// What one vCPU needs to be a hypervisor's.
    fn nested(
        &'static self,
        ram: &'static GuestRam,
        caps: &VmxCaps,
        cpuid: &Cpuid,
    ) -> NestedParts<'static, Stage> {
        let flusher = Flusher::default();
        let parts = ComposedParts {
            memory: ram,
            inner: self.table,
            frames: Frames,
            format: composed_format(&self.caps),
            l1_format: ept_format(caps),
            page_limit: (ram.size() / testudo_arch::PAGE_SIZE) as usize,
        };
        let bitmap = Box::new(MsrBitmap::all_exit());
        let at = address(&*bitmap);
        NestedParts {
            caps: caps.clone(),
            enlightened: self.enlightened,
            vpid: VPID_L2,
            controls: &self.controls,
            tables: &self.tables,
            l1_msr_bitmap: &self.msr_bitmap,
            msr_bitmap: (bitmap, at),
            shadowing: self
                .shadowing
                .as_deref()
                .map(|(reads, writes)| ShadowBitmaps {
                    reads: address(reads),
                    writes: address(writes),
                }),
            stage: ComposedStage::new(parts, flusher.clone()),
            flusher,
            has_predictor_barrier: cpuid.query(7, 0)[3] & 1 << 26 != 0,
        }
    }

    /// How the guest's memory is put behind its paging.
    pub(crate) fn paging(&self) -> Paging {
        if self.controls.has_ept() {
            Paging::Nested
        } else {
            Paging::Shadow
        }
    }

    /// Whether a guest hypervisor may be told that no change of a page's size causes a machine check:
    /// [`composed_format`] sees to it.
    pub(crate) fn pschange_mc_no(&self) -> bool {
        self.controls.has_ept()
    }

    /// Why shadow paging takes the place of nested paging, though nobody asked for it.
    pub(crate) fn lack(&self) -> Option<String> {
        self.lack.map(|lack| lack.to_string())
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
        // The tables for a guest whose local APIC the processor virtualizes do not follow.
        self.controls.virtual_apic = false;
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

    /// Turns VMX on for this processor and makes a vCPU on it, whose local APIC has this page.
    pub(crate) fn with_vcpu<R>(
        &'static self,
        number: usize,
        cpuid: &Cpuid,
        ram: &'static GuestRam,
        apic_page: &ApicPage,
        work: impl FnOnce(VmxVcpu<'_, ThisProcessor<'_>, GuestRam, Stage>) -> R,
    ) -> Result<R, VmxError> {
        // SAFETY: CPL 0.
        let own = unsafe { Vmx::capabilities()? };
        let feature_control = self.caps.feature_control;
        if (VmxCaps {
            feature_control,
            ..own.clone()
        }) != self.caps
        {
            let revision = own.basic.revision();
            return Err(VmxError::Different { revision });
        }
        // SAFETY: CPL 0, the capabilities are this processor's, and the program's flow stays on it.
        let mut vmx = unsafe { Vmx::enable(&self.caps, region()?)? };
        let vmcs = vmx.create_vmcs(region()?, VmcsKind::Ordinary);
        let mut vmcs = vmcs.map_err(VmxError::Vmcs)?;
        let mut another = |wanted: bool, kind| match wanted {
            true => {
                let vmcs = vmx.create_vmcs(region()?, kind);
                vmcs.map(Some).map_err(VmxError::Vmcs)
            }
            false => Ok(None),
        };
        let mut vmcs02 = another(self.nested_caps.is_some(), VmcsKind::Ordinary)?;
        let mut shadow = another(self.shadowing.is_some(), VmcsKind::Shadow)?;
        let resident = ResidentRegisters::reset(cpuid)?;
        let held = vmx.hold_interrupts();
        let current = vmx.load(&mut vmcs).map_err(VmxError::Vmcs)?;
        // SAFETY: the runtime uses none of these registers and has CR4.OSXSAVE and OSFXSR set.
        unsafe { resident.load() };
        let [low, _, _, high] = cpuid.query(0xD, 0);
        let lists = match self.controls.switches_by_lists() {
            true => Some(Box::<SwitchedMsrs>::default()),
            false => None,
        };
        let place = VmxPlace {
            vmcs: current,
            held,
            caps: &self.caps,
            controls: &self.controls,
            tables: &self.tables,
            apic_page: (apic_page, address(apic_page)),
            vpid: VPID,
            xcr0_valid: (u64::from(high) << 32 | u64::from(low)) & XCR0_ALLOWED,
            shadow: self.shadow.as_ref().map(|shadow| shadow.place(number)),
            gate: self.gates.as_ref().and_then(|gates| gates.gate(number)),
            switched: lists.as_deref().map(|lists| (lists, address(lists))),
        };
        // SAFETY: `new` made the tables, which reach `ram` only, and this value keeps them; without
        // EPT in the controls, `enable_shadow` was called; the
        // runtime has a TSS with a stack for every vector, and memory is mapped where it is; there
        // is one guest, so the VPID is its own, and each vCPU has its processor to itself.
        let mut vcpu = unsafe { VmxVcpu::new(place, ram)? };
        if let (Some(caps), Some(vmcs02)) = (&self.nested_caps, &mut vmcs02) {
            let parts = self.nested(ram, caps, cpuid);
            // SAFETY: the bitmaps are where they are; the compositions are with `table`, which reaches
            // `ram` only; and no other guest has the VPID.
            vcpu = unsafe { vcpu.with_nested(parts, vmcs02, shadow.as_mut())? };
        }
        Ok(work(vcpu))
    }
}

/// Tables for guests of guests: executable pages are small, for otherwise such a guest could stop the machine by a
/// change of its pages' size (CVE-2018-12207).
fn composed_format(caps: &VmxCaps) -> Ept {
    if has_pschange_mc_no() {
        ept_format(caps)
    } else {
        ept_format(caps).without_large_executable()
    }
}

/// Whether the processor says that no change of a page's size causes a machine check.
fn has_pschange_mc_no() -> bool {
    const ARCH_CAPABILITIES: u32 = 1 << 29;
    let [_, _, _, edx] = Cpuid::of_this_processor().query(7, 0);
    // SAFETY: CPL 0, and CPUID says that the register is there.
    edx & ARCH_CAPABILITIES != 0
        && unsafe { msr::read(Msr::ARCH_CAPABILITIES.0) } & IF_PSCHANGE_MC_NO != 0
}

/// A frame for the processor's use.
fn region() -> Result<RegionFrame, VmxError> {
    let address = Frames.alloc().ok_or(VmxError::NoMemory)?;
    let pointer = NonNull::new(address.0 as *mut u8).ok_or(VmxError::NoMemory)?;
    // SAFETY: the frame is this call's alone, and memory is mapped where it is.
    Ok(unsafe { RegionFrame::new(pointer, address) })
}

fn address<T>(place: &T) -> Hpa {
    let address = Hpa(core::ptr::from_ref(place) as u64);
    debug_assert!(address.is_aligned(PageSize::Size4K));
    address
}
