//! The machine: its parts put together.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, Ordering};

use testudo_arch::cpuid::Cpuid;
use testudo_arch::{Gpa, GuestMemory};

use crate::acpi;
use crate::board::Board;
use crate::boot::{self, BootImage, BootState, LoadError};
use crate::bus::{BusError, MmioBus, PortBus};
use crate::device::uart::{SerialSink, Uart};
use crate::device::{DeviceTimers, PowerSignal};
use crate::emulate;
use crate::host::Host;
use crate::irq::{Irqchip, Lapic, LapicFeatures, request};
use crate::layout::{Layout, LayoutError};
use crate::paged::{FORGET, Managed, ScanClock, Shootdown};
use crate::policy::cpuid::{CpuidConfig, CpuidTable, for_guest};
use crate::policy::hyperv::HyperV;
use crate::stop::Stop;
use crate::virtio::{AttachError, Devices};

/// The request by which a machine that stops makes its vCPUs look up.
const STOP: u32 = 1 << 31;
const _: () =
    assert!(STOP & request::MACHINE != 0 && STOP & (request::DEVICE_TIMERS | FORGET) == 0);

/// What a machine is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MachineConfig {
    /// The number of vCPUs, at least one.
    pub vcpus: usize,
    /// The memory in bytes.
    pub memory: u64,
    /// Whether the guest may be a hypervisor itself.
    pub nested: bool,
    /// Whether it finds Hyper-V's interface ([`policy::hyperv`](crate::policy::hyperv)), on a backend
    /// that offers it enlightened VMCSs.
    pub hyperv: bool,
    /// Whether a guest that is a hypervisor is told that its guests cause no machine check by a change of
    /// a page's size (IA32_ARCH_CAPABILITIES, IF_PSCHANGE_MC_NO): none does on this processor, or the
    /// tables that they run on have executable pages of 4 KiB only. Otherwise the guest hypervisor sees to
    /// that, with many more exits.
    pub pschange_mc_no: bool,
    /// How long the machine may run, in nanoseconds: then it stops with
    /// [`StopReason::TimeIsUp`](crate::StopReason::TimeIsUp).
    pub time_limit: Option<u64>,
    /// The wall-clock time at the start, in seconds since 1970, for the real-time clock.
    pub start_time: u64,
}

/// Why a machine cannot be built.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// No or too many vCPUs.
    #[error("a machine has 1 to 255 vCPUs, not {0}")]
    Vcpus(usize),
    /// The amount of memory.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// Devices in each other's way.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// A virtio device that finds no place.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// Memory that comes and goes is another machine's.
    #[error("the shootdown is for {expected} vCPUs, the machine has {vcpus}")]
    Shootdown {
        /// The vCPUs that it is for.
        expected: usize,
        /// The machine's.
        vcpus: usize,
    },
    /// The ACPI tables do not fit.
    #[error(transparent)]
    Acpi(#[from] acpi::AcpiError),
}

/// A virtual PC: memory, buses, interrupt controllers and devices, shared by the loops of its
/// vCPUs ([`VcpuLoop`](crate::run::VcpuLoop)).
pub struct Machine<M> {
    pub(crate) memory: M,
    pub(crate) host: Arc<dyn Host>,
    pub(crate) ports: PortBus,
    pub(crate) mmio: MmioBus,
    pub(crate) irqchip: Arc<Irqchip>,
    pub(crate) timers: DeviceTimers,
    pub(crate) power: Arc<PowerSignal>,
    pub(crate) cpuid: CpuidTable,
    guest_cpuid: Cpuid,
    pub(crate) hyperv: Option<HyperV>,
    /// What tells the vCPUs to forget translations, if any of the memory comes and goes.
    pub(crate) shootdown: Option<Arc<Shootdown>>,
    /// When the time is up, in the host's nanoseconds.
    pub(crate) end: Option<u64>,
    pub(crate) physical_bits: u8,
    pub(crate) pschange_mc_no: bool,
    console: Arc<spin::Mutex<Uart>>,
    rsdp: Gpa,
    layout: Layout,
    stopping: AtomicBool,
    stop: spin::Mutex<Option<Stop>>,
}

impl Machine<()> {
    /// The most vCPUs: what xAPIC identifications can tell apart.
    pub const MAX_VCPUS: usize = 255;
}

impl<M: GuestMemory> Machine<M> {
    /// Builds a machine on `host` with `memory` behind [`Layout::ram`], on a processor that answers
    /// CPUID as `processor`. The first serial port's output goes to `console`. Gives the half of
    /// each vCPU's local APIC that its loop owns.
    ///
    /// # Errors
    ///
    /// The configuration is impossible.
    pub fn new(
        config: MachineConfig,
        memory: M,
        host: Arc<dyn Host>,
        processor: &Cpuid,
        console: Box<dyn SerialSink>,
    ) -> Result<(Self, Vec<Lapic>), BuildError>
    where
        M: Clone + Send + 'static,
    {
        Self::with_devices(config, memory, host, processor, console, Devices::new())
    }

    /// As [`new`](Self::new), with virtio devices. Each has its own copy of `memory`, which is to be
    /// a way to the memory and not the memory itself.
    ///
    /// # Errors
    ///
    /// The configuration is impossible, or there is no place for a device.
    pub fn with_devices(
        config: MachineConfig,
        memory: M,
        host: Arc<dyn Host>,
        processor: &Cpuid,
        console: Box<dyn SerialSink>,
        devices: Devices<M>,
    ) -> Result<(Self, Vec<Lapic>), BuildError>
    where
        M: Clone + Send + 'static,
    {
        let vcpus = config.vcpus;
        if vcpus == 0 || vcpus > Machine::MAX_VCPUS {
            return Err(BuildError::Vcpus(vcpus));
        }
        emulate::prepare();
        let physical_bits = physical_bits(processor);
        let layout = Layout::new(config.memory, physical_bits)?;
        let features = LapicFeatures {
            address_bits: physical_bits,
            ..LapicFeatures::default()
        };
        let (irqchip, lapics) = Irqchip::new(host.clone(), vcpus, features);
        let power = Arc::new(PowerSignal::new());
        let board = Board::new(
            &irqchip, &power, &config, &layout, console, devices, &memory,
        )?;
        let topology = board.virtio.topology.as_ref().map(acpi::viot);
        let tables: Vec<&[u8]> = topology.iter().map(|table| table.as_slice()).collect();
        let description = acpi::Description {
            processors: vcpus as u32,
            virtio: &board.virtio.windows,
            ecam: false,
            tables: &tables,
        };
        let rsdp = acpi::install(&memory, &layout, &description)?;
        let cpuid = CpuidConfig {
            vcpus: vcpus as u32,
            nested: config.nested,
            hyperv: config.hyperv,
            arch_capabilities: config.pschange_mc_no,
        };
        let end = config
            .time_limit
            .map(|limit| host.now().saturating_add(limit));
        let guest_cpuid = for_guest(processor, cpuid);
        let machine = Self {
            memory,
            host,
            ports: board.ports,
            mmio: board.mmio,
            irqchip,
            timers: board.timers,
            power,
            cpuid: CpuidTable::new(&guest_cpuid),
            guest_cpuid,
            hyperv: config.hyperv.then(HyperV::default),
            shootdown: None,
            end,
            physical_bits,
            pschange_mc_no: config.pschange_mc_no,
            console: board.console,
            rsdp,
            layout,
            stopping: AtomicBool::new(false),
            stop: spin::Mutex::new(None),
        };
        Ok((machine, lapics))
    }

    /// Has the vCPUs forget translations when pages of [`PagedMemory`](crate::paged::PagedMemory)
    /// go.
    ///
    /// # Errors
    ///
    /// It was made for another number of vCPUs.
    pub fn with_shootdown(mut self, shootdown: Arc<Shootdown>) -> Result<Self, BuildError> {
        let (expected, vcpus) = (shootdown.vcpus(), self.irqchip.vcpus());
        if expected != vcpus {
            return Err(BuildError::Shootdown { expected, vcpus });
        }
        shootdown.connect(&self.irqchip);
        self.shootdown = Some(shootdown);
        Ok(self)
    }

    /// Looks for pages of these memories that hold the same as others, so many a second at most, and
    /// has them shared ([`PagedMemory::with_sharing`](crate::paged::PagedMemory::with_sharing)). The work is
    /// done by vCPU 0, between exits, a little at a time and in a fifth of its time at most.
    #[must_use]
    pub fn with_page_scanner(
        mut self,
        memories: Vec<&'static dyn Managed>,
        per_second: u64,
    ) -> Self {
        let clock = ScanClock::new(&self.irqchip, Arc::clone(&self.host), memories, per_second);
        self.timers.add(Arc::new(spin::Mutex::new(clock)));
        self
    }

    /// Places a kernel in memory; vCPU 0 then begins in the state that this gives.
    ///
    /// # Errors
    ///
    /// Whatever is wrong with the kernel, or does not fit.
    pub fn load(
        &self,
        kernel: &[u8],
        command_line: &[u8],
        modules: &[boot::Module<'_>],
    ) -> Result<BootState, LoadError> {
        let image = BootImage {
            kernel,
            command_line,
            modules,
            rsdp: Some(self.rsdp),
        };
        boot::load(&self.memory, &self.layout, &image)
    }

    /// The guest-physical map.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// What the guest's processors answer to CPUID, but for what differs from one to another.
    pub fn cpuid(&self) -> &Cpuid {
        &self.guest_cpuid
    }

    /// The guest's memory.
    pub fn memory(&self) -> &M {
        &self.memory
    }

    /// Sends the guest characters on its first serial port; gives how many it took.
    pub fn console_input(&self, bytes: &[u8]) -> usize {
        self.console.lock().push_input(bytes)
    }

    /// Stops the machine, unless it has stopped; gives the stop that counts. All vCPU loops end.
    pub fn stop(&self, stop: Stop) -> Stop {
        let first = *self.stop.lock().get_or_insert(stop);
        self.stopping.store(true, Ordering::Release);
        for vcpu in 0..self.irqchip.vcpus() {
            self.irqchip.request(vcpu, STOP);
        }
        first
    }

    /// The stop, if the machine has stopped.
    pub fn stopped(&self) -> Option<Stop> {
        if self.stopping.load(Ordering::Acquire) {
            *self.stop.lock()
        } else {
            None
        }
    }
}

/// The width of a physical address on this processor (CPUID 8000_0008h EAX bits 7:0).
fn physical_bits(processor: &Cpuid) -> u8 {
    match processor.query(0x8000_0008, 0)[0] as u8 {
        0 => 36,
        bits => bits.clamp(32, 52),
    }
}
