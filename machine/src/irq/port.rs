//! The half of a local APIC that others reach: what was posted, and where it listens.

use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};

/// The bits of [`Lapic::requests`](super::Lapic::requests).
///
/// A bit is set after what it announces was stored, and the vCPU is kicked when it was not set
/// before. [`Lapic::sync`](super::Lapic::sync) takes the low half; the bits of
/// [`MACHINE`](request::MACHINE) are the exit loop's own.
pub mod request {
    /// Vectors were posted.
    pub const VECTORS: u32 = 1 << 0;
    /// A non-maskable interrupt.
    pub const NMI: u32 = 1 << 1;
    /// An INIT.
    pub const INIT: u32 = 1 << 2;
    /// A start-up IPI.
    pub const STARTUP: u32 = 1 << 3;
    /// The PIC's output rose.
    pub const LINT0: u32 = 1 << 4;
    /// A message that asks to take the PIC's interrupt.
    pub const EXTINT: u32 = 1 << 5;
    /// A message with an illegal vector arrived.
    pub const ILLEGAL_VECTOR: u32 = 1 << 6;
    /// All that [`Lapic::sync`](super::super::Lapic::sync) takes.
    pub const LAPIC: u32 = 0xFFFF;
    /// For vCPU 0: the deadline of a device came nearer, the loop's timer is to be set anew.
    pub const DEVICE_TIMERS: u32 = 1 << 16;
    /// The exit loop's own bits, [`DEVICE_TIMERS`] and those that it defines itself.
    pub const MACHINE: u32 = 0xFFFF_0000;
}

/// The mode that IA32_APIC_BASE selects (SDM vol. 3A, 11.12.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApicMode {
    /// Globally disabled.
    Disabled,
    /// Memory-mapped.
    XApic,
    /// By MSRs.
    X2Apic,
}

/// Where a local APIC listens: published by its owner, read by senders.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Routing {
    pub(super) mode: ApicMode,
    /// Enabled by software (the spurious-interrupt vector register).
    pub(super) enabled: bool,
    /// The destination format register selects the cluster model.
    pub(super) cluster: bool,
    /// The logical destination of xAPIC mode.
    pub(super) logical: u8,
}

impl Routing {
    pub(super) const RESET: Self = Self {
        mode: ApicMode::XApic,
        enabled: false,
        cluster: false,
        logical: 0,
    };

    const fn pack(self) -> u32 {
        self.mode as u32
            | (self.enabled as u32) << 2
            | (self.cluster as u32) << 3
            | (self.logical as u32) << 8
    }

    const fn unpack(bits: u32) -> Self {
        Self {
            mode: match bits & 3 {
                0 => ApicMode::Disabled,
                1 => ApicMode::XApic,
                _ => ApicMode::X2Apic,
            },
            enabled: bits & 1 << 2 != 0,
            cluster: bits & 1 << 3 != 0,
            logical: (bits >> 8) as u8,
        }
    }
}

/// The logical identification in x2APIC mode (SDM vol. 3A, 11.12.10.2).
pub(super) const fn x2apic_logical(id: u32) -> u32 {
    (id >> 4) << 16 | 1 << (id & 15)
}

impl Routing {
    /// Whether vectors are accepted, not only NMI, INIT and start-up (SDM vol. 3A, 11.4.7.2).
    #[inline]
    pub(super) fn takes_vectors(self) -> bool {
        self.enabled && self.mode != ApicMode::Disabled
    }
}

/// The posted side of one local APIC.
#[derive(Debug)]
pub(super) struct LapicPort {
    pub(super) requests: AtomicU32,
    posted: [AtomicU32; 8],
    /// Of the vectors posted last: whether they stand for a level.
    level: [AtomicU32; 8],
    startup: AtomicU8,
    /// The output of the PIC, if it is wired to this one's LINT0.
    pub(super) lint0: AtomicBool,
    routing: AtomicU32,
}

impl LapicPort {
    pub(super) fn new() -> Self {
        Self {
            requests: AtomicU32::new(0),
            posted: [const { AtomicU32::new(0) }; 8],
            level: [const { AtomicU32::new(0) }; 8],
            startup: AtomicU8::new(0),
            lint0: AtomicBool::new(false),
            routing: AtomicU32::new(Routing::RESET.pack()),
        }
    }

    #[inline]
    pub(super) fn routing(&self) -> Routing {
        Routing::unpack(self.routing.load(Ordering::Acquire))
    }

    pub(super) fn publish(&self, routing: Routing) {
        self.routing.store(routing.pack(), Ordering::Release);
    }

    /// Whether a logical destination names this one, whose identification is `id`
    /// (SDM vol. 3A, 11.6.2.2 and 11.12.10.2).
    #[inline]
    pub(super) fn matches_logical(&self, id: u32, destination: u32) -> bool {
        let routing = self.routing();
        match routing.mode {
            ApicMode::Disabled => false,
            ApicMode::X2Apic => {
                let own = x2apic_logical(id);
                own >> 16 == destination >> 16 && own & destination & 0xFFFF != 0
            }
            ApicMode::XApic => {
                let own = u32::from(routing.logical);
                if destination > 0xFF {
                    false
                } else if routing.cluster {
                    let (cluster, members) = (destination >> 4, destination & 0xF);
                    (cluster == 0xF || cluster == own >> 4) && own & members != 0
                } else {
                    own & destination != 0
                }
            }
        }
    }

    /// Announces what was stored before; true if the owner must be kicked.
    #[inline]
    pub(super) fn request(&self, bits: u32) -> bool {
        self.requests.fetch_or(bits, Ordering::Release) & bits != bits
    }

    /// Stores a vector; it is then to be announced.
    #[inline]
    pub(super) fn post(&self, vector: u8, level: bool) {
        let (word, bit) = (usize::from(vector >> 5), 1 << (vector & 31));
        if level {
            self.level[word].fetch_or(bit, Ordering::Relaxed);
        } else if self.level[word].load(Ordering::Relaxed) & bit != 0 {
            self.level[word].fetch_and(!bit, Ordering::Relaxed);
        }
        self.posted[word].fetch_or(bit, Ordering::Release);
    }

    /// Takes the posted vectors of one word, and which of them stand for a level.
    #[inline]
    pub(super) fn take(&self, word: usize) -> (u32, u32) {
        if self.posted[word].load(Ordering::Relaxed) == 0 {
            return (0, 0);
        }
        let vectors = self.posted[word].swap(0, Ordering::Acquire);
        (vectors, self.level[word].load(Ordering::Relaxed) & vectors)
    }

    /// Drops what is posted: at INIT, vectors that came before it must not come after it.
    pub(super) fn drop_posted(&self) {
        for word in &self.posted {
            word.store(0, Ordering::Relaxed);
        }
    }

    pub(super) fn set_startup(&self, vector: u8) {
        self.startup.store(vector, Ordering::Relaxed);
    }

    pub(super) fn startup(&self) -> u8 {
        self.startup.load(Ordering::Relaxed)
    }
}
