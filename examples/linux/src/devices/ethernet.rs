//! The wire between guests that run side by side: a learning switch with a port for each.

use alloc::sync::Arc;
use alloc::vec::Vec;

use spin::{Mutex, Once};
use testudo_arch::memory::MemoryFault;
use testudo_machine::virtio::DeviceHandle;
use testudo_virtio::backend::{Fill, NetBackend, NetHeader, Offloads, Switch, SwitchPort};

/// The cards on the switch, by guest, each once its machine is built.
type Cards = Arc<[Once<DeviceHandle>]>;

/// The switch.
pub(crate) struct Ethernet {
    free: Mutex<Vec<Option<SwitchPort>>>,
    cards: Cards,
}

impl Ethernet {
    /// A switch with a port for each guest.
    pub(crate) fn new(guests: usize) -> Self {
        let ports = Switch::ports(guests).into_iter();
        Self {
            free: Mutex::new(ports.map(Some).collect()),
            cards: (0..guests).map(|_| Once::new()).collect(),
        }
    }

    /// The guest's port, the first time that it is asked for.
    pub(crate) fn port(&self, guest: usize) -> Option<Port> {
        Some(Port {
            port: self.free.lock().get_mut(guest)?.take()?,
            guest,
            cards: self.cards.clone(),
        })
    }

    /// Says which device has the guest's port.
    pub(crate) fn connect(&self, guest: usize, card: DeviceHandle) {
        if let Some(place) = self.cards.get(guest) {
            place.call_once(|| card);
        }
    }
}

/// A guest's port, whose frames wake the cards of the others.
pub(crate) struct Port {
    port: SwitchPort,
    guest: usize,
    cards: Cards,
}

impl NetBackend for Port {
    fn offloads(&self) -> Offloads {
        self.port.offloads()
    }

    fn activate(&mut self, receives: Offloads) {
        self.port.activate(receives);
    }

    fn send(&mut self, header: NetHeader, len: usize, fill: Fill<'_>) -> Result<(), MemoryFault> {
        self.port.send(header, len, fill)?;
        let others = self.cards.iter().enumerate();
        for (_, card) in others.filter(|(guest, _)| *guest != self.guest) {
            if let Some(card) = card.get() {
                card.wake();
            }
        }
        Ok(())
    }

    fn peek(&mut self) -> Option<(NetHeader, &[u8])> {
        self.port.peek()
    }

    fn consume(&mut self) {
        self.port.consume();
    }
}
