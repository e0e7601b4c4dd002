//! The words of the command line that say which virtio devices the guest has.

use testudo_machine::virtio::Transport;

/// Which devices, and how the guest finds them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DeviceArgs {
    /// `transport=mmio|pci`.
    pub(crate) transport: Transport,
    /// `packed`: packed rings are offered besides split ones.
    pub(crate) packed: bool,
    /// `queues=N`: queues of each disk, pairs of queues of the network card.
    pub(crate) queues: u16,
    /// `console`.
    pub(crate) console: bool,
    /// `rng`.
    pub(crate) rng: bool,
    /// `net`: a network card whose wire ends at a host in this program.
    pub(crate) net: bool,
    /// `switch`: a network card whose wire ends at the other guests.
    pub(crate) switch: bool,
    /// `vsock`.
    pub(crate) vsock: bool,
    /// `share`: the files that came as modules, as a file system.
    pub(crate) share: bool,
    /// `iommu`: what devices reach goes through tables of the guest's.
    pub(crate) iommu: bool,
    /// `scratch=MIB`: an empty disk of this size.
    pub(crate) scratch_mib: Option<u64>,
    /// `mem=MIB`: memory that can be plugged, all of which the guest is asked to take at the start.
    pub(crate) mem_mib: Option<u64>,
    /// `balloon=MIB`: a balloon, and what the guest is asked to give up at the start.
    pub(crate) balloon_mib: Option<u64>,
}

impl DeviceArgs {
    pub(crate) const USAGE: &str = "transport=mmio|pci packed queues=N console rng net switch vsock share iommu scratch=MIB mem=MIB balloon=MIB";
    /// The most queues of a device.
    const MAX_QUEUES: u16 = 32;

    /// No devices.
    pub(crate) const NONE: Self = Self {
        transport: Transport::Pci,
        packed: false,
        queues: 1,
        console: false,
        rng: false,
        net: false,
        switch: false,
        vsock: false,
        share: false,
        iommu: false,
        scratch_mib: None,
        mem_mib: None,
        balloon_mib: None,
    };

    /// Takes a word if it is about devices and makes sense.
    pub(crate) fn take(&mut self, word: &str) -> bool {
        let mib = |text: &str| text.parse().ok().filter(|mib| *mib <= 1u64 << 24);
        match word.split_once('=').unwrap_or((word, "")) {
            ("transport", "mmio") => self.transport = Transport::Mmio,
            ("transport", "pci") => self.transport = Transport::Pci,
            ("packed", "") => self.packed = true,
            ("console", "") => self.console = true,
            ("rng", "") => self.rng = true,
            ("net", "") => self.net = true,
            ("switch", "") => self.switch = true,
            ("vsock", "") => self.vsock = true,
            ("share", "") => self.share = true,
            ("iommu", "") => self.iommu = true,
            ("queues", count) => match count.parse() {
                Ok(count) if (1..=Self::MAX_QUEUES).contains(&count) => self.queues = count,
                _ => return false,
            },
            ("scratch", size) => match mib(size) {
                Some(size) if size > 0 => self.scratch_mib = Some(size),
                _ => return false,
            },
            ("mem", size) => match mib(size) {
                Some(size) if size > 0 => self.mem_mib = Some(size),
                _ => return false,
            },
            ("balloon", size) => match mib(size) {
                Some(size) => self.balloon_mib = Some(size),
                None => return false,
            },
            _ => return false,
        }
        true
    }
}
