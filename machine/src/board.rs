//! The main board: which device sits where.

use alloc::boxed::Box;
use alloc::sync::Arc;
use core::ops::Range;

use testudo_arch::GuestMemory;
use testudo_arch::bus::BusDevice;

use crate::bus::{BusError, MmioBus, PortBus, SharedDevice};
use testudo_arch::pci::PciSpace;

use crate::device::pci::PciHost;
use crate::device::pit::{Pit, SystemControlB};
use crate::device::pm::PowerManagement;
use crate::device::power::{DebugExit, KeyboardController, PostCode, SystemControlA};
use crate::device::rtc::Rtc;
use crate::device::uart::{SerialSink, Uart};
use crate::device::{Clocked, DeviceTimers, PowerSignal};
use crate::irq::{IrqLine, Irqchip};
use crate::layout::{self, Layout};
use crate::machine::{BuildError, MachineConfig};
use crate::virtio::{Devices, Found};

/// The buses with the devices on them.
pub(crate) struct Board {
    pub(crate) ports: PortBus,
    pub(crate) mmio: MmioBus,
    pub(crate) timers: DeviceTimers,
    pub(crate) console: Arc<spin::Mutex<Uart>>,
    /// What the guest must be told of the virtio devices.
    pub(crate) virtio: Found,
}

impl Board {
    /// A board with all its devices. The first serial port's output goes to `console`; the virtio
    /// devices reach `memory`.
    pub(crate) fn new<M: GuestMemory + Clone + Send + 'static>(
        chip: &Arc<Irqchip>,
        power: &Arc<PowerSignal>,
        config: &MachineConfig,
        layout: &Layout,
        console: Box<dyn SerialSink>,
        devices: Devices<M>,
        memory: &M,
    ) -> Result<Self, BuildError> {
        let mut board = Self {
            ports: PortBus::new(),
            mmio: MmioBus::new(),
            timers: DeviceTimers::new(),
            console: Arc::new(spin::Mutex::new(Uart::new(
                line(chip, layout::COM1_GSI),
                console,
            ))),
            virtio: Found::default(),
        };
        board.add_interrupt_controllers(chip)?;
        board.add_timers(chip, config)?;
        board.add_power(chip, power)?;
        let mut pci = PciHost::new(power.clone());
        let (mmio, timers) = (&mut board.mmio, &mut board.timers);
        board.virtio = devices.attach(chip, memory, mmio, &mut pci, timers)?;
        board.add_pci(pci, layout)?;
        let console = board.console.clone();
        board.port(layout::COM1, Uart::PORTS, console)?;
        board.port(PostCode::PORT, 1, Arc::new(PostCode::default()))?;
        Ok(board)
    }

    fn port(
        &mut self,
        first: u16,
        count: u16,
        device: Arc<dyn SharedDevice>,
    ) -> Result<(), BusError> {
        let first = u32::from(first);
        let ports: Range<u32> = first..first + u32::from(count);
        self.ports.add(ports, device)
    }

    fn add_interrupt_controllers(&mut self, chip: &Arc<Irqchip>) -> Result<(), BusError> {
        for (port, device) in chip.pic_ports() {
            self.port(port, 2, device)?;
        }
        let window = layout::IOAPIC.0..layout::IOAPIC.0 + 0x1000;
        self.mmio.add(window, chip.ioapic_window())
    }

    /// A device with a clock: on the port bus, and among the timers.
    fn clocked<D: Clocked + BusDevice + 'static>(
        &mut self,
        first: u16,
        count: u16,
        device: D,
    ) -> Result<Arc<spin::Mutex<D>>, BusError> {
        let device = Arc::new(spin::Mutex::new(device));
        self.port(first, count, device.clone())?;
        self.timers.add(device.clone());
        Ok(device)
    }

    fn add_timers(&mut self, chip: &Arc<Irqchip>, config: &MachineConfig) -> Result<(), BusError> {
        let pit = Pit::new(chip, line(chip, Irqchip::TIMER_GSI as u8));
        let pit = self.clocked(Pit::PORT, Pit::PORTS, pit)?;
        self.port(SystemControlB::PORT, 1, Arc::new(SystemControlB::new(pit)))?;
        let rtc = Rtc::new(
            chip,
            line(chip, layout::RTC_GSI),
            config.start_time,
            config.memory,
        );
        self.clocked(Rtc::PORT, Rtc::PORTS, rtc)?;
        Ok(())
    }

    fn add_power(&mut self, chip: &Arc<Irqchip>, power: &Arc<PowerSignal>) -> Result<(), BusError> {
        let management = PowerManagement::new(chip, line(chip, layout::SCI_GSI), power.clone());
        self.clocked(PowerManagement::PORT, PowerManagement::PORTS, management)?;
        let keyboard = Arc::new(KeyboardController::new(power.clone()));
        self.port(KeyboardController::COMMAND, 1, keyboard)?;
        self.port(
            SystemControlA::PORT,
            1,
            Arc::new(SystemControlA::new(power.clone())),
        )?;
        let exit = Arc::new(DebugExit::new(power.clone()));
        self.port(layout::DEBUG_EXIT, DebugExit::PORTS, exit)
    }

    fn add_pci(&mut self, pci: PciHost, layout: &Layout) -> Result<(), BusError> {
        let pci = Arc::new(pci);
        let config = layout::PCI_CONFIG_PORTS;
        self.port(config.start, config.end - config.start, pci.config_ports())?;
        for window in [layout::PCI_MMIO32, layout.pci_mmio64()] {
            self.mmio
                .add(window.clone(), pci.window(PciSpace::Memory, window.start))?;
        }
        let ports = layout::PCI_PORTS;
        self.ports.add(
            ports.clone(),
            pci.window(PciSpace::Io, u64::from(ports.start)),
        )
    }
}

/// A wire to an interrupt of the board's own.
fn line(chip: &Arc<Irqchip>, gsi: u8) -> IrqLine {
    let line = chip.line(u32::from(gsi));
    line.expect("the board drives each of its interrupts by a few wires")
}
