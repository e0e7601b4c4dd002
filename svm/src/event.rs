//! Events in the VMCB: EVENTINJ, which VMRUN delivers, and EXITINTINFO, whose delivery an exit
//! interrupted (APM vol. 2, 15.20 and 15.7.2). Both have one format.

use core::fmt;

pub use testudo_arch::event::Combined;
use testudo_arch::{Event, Exception};

/// The 64 bits of EVENTINJ or EXITINTINFO: vector in bits 7:0, type in 10:8, "error code valid" in
/// 11, "valid" in 31, error code in 63:32.
///
/// ```
/// use testudo_arch::Event;
/// use testudo_svm::event::RawEvent;
///
/// let raw = RawEvent::from(Event::GP0);
/// assert_eq!(raw.0, 0x8000_0B0D);
/// assert_eq!(raw.event(0), Some(Event::GP0));
/// assert_eq!(RawEvent::NONE.event(0), None);
/// ```
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct RawEvent(pub u64);

/// The type of an event, bits 10:8.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EventType {
    /// 0: an external or virtual interrupt.
    Interrupt,
    /// 2: an NMI. The vector is ignored.
    Nmi,
    /// 3: an exception: fault or trap.
    Exception,
    /// 4: a software interrupt, INT n.
    SoftwareInterrupt,
    /// Reserved.
    Reserved(u8),
}

impl RawEvent {
    /// No event.
    pub const NONE: Self = Self(0);

    const ERROR_CODE_VALID: u64 = 1 << 11;
    const VALID: u64 = 1 << 31;
    const TYPE_SHIFT: u32 = 8;

    const fn new(kind: u64, vector: u8) -> Self {
        Self(Self::VALID | kind << Self::TYPE_SHIFT | vector as u64)
    }

    /// Whether there is an event.
    #[inline]
    pub const fn is_valid(self) -> bool {
        self.0 & Self::VALID != 0
    }

    /// The vector.
    #[inline]
    pub const fn vector(self) -> u8 {
        self.0 as u8
    }

    /// The type.
    #[inline]
    pub const fn event_type(self) -> EventType {
        match (self.0 >> Self::TYPE_SHIFT) & 7 {
            0 => EventType::Interrupt,
            2 => EventType::Nmi,
            3 => EventType::Exception,
            4 => EventType::SoftwareInterrupt,
            other => EventType::Reserved(other as u8),
        }
    }

    /// Whether there is an event, and it is an external or virtual interrupt.
    #[inline]
    pub const fn is_interrupt(self) -> bool {
        self.is_valid() && self.0 & 7 << Self::TYPE_SHIFT == 0
    }

    /// The error code, where there is one.
    #[inline]
    pub const fn error_code(self) -> Option<u32> {
        if self.0 & Self::ERROR_CODE_VALID != 0 {
            Some((self.0 >> 32) as u32)
        } else {
            None
        }
    }

    /// The event, or `None` if there is none or its type is reserved.
    ///
    /// The VMCB does not hold the length of the instruction behind a software event: the caller
    /// passes it, from nRIP − RIP or from decoding, and it matters to those events only.
    #[inline]
    pub const fn event(self, length: u8) -> Option<Event> {
        if !self.is_valid() {
            return None;
        }
        let vector = self.vector();
        Some(match self.event_type() {
            EventType::Interrupt => Event::Interrupt(vector),
            EventType::Nmi => Event::Nmi,
            // Only INT3 and INTO raise these two.
            EventType::Exception if vector == 3 || vector == 4 => {
                Event::SoftwareException { vector, length }
            }
            EventType::Exception => Event::Exception {
                vector,
                error_code: self.error_code(),
            },
            EventType::SoftwareInterrupt => Event::SoftwareInterrupt { vector, length },
            EventType::Reserved(_) => return None,
        })
    }

    /// Of an EXITINTINFO: the event to inject again at the next entry, so that it is not lost.
    ///
    /// `None` also for INT n, INT3 and INTO: the guest's RIP still points at the instruction (unless
    /// the hypervisor had injected the event itself), which raises it when the guest resumes.
    /// Injecting it instead would need nRIP: "Software interrupts cannot be properly injected if the
    /// processor does not support the NextRIP field" (APM vol. 2, 15.20).
    #[inline]
    pub const fn to_redeliver(self) -> Option<Event> {
        match self.event(0) {
            Some(Event::SoftwareInterrupt { .. } | Event::SoftwareException { .. }) => None,
            other => other,
        }
    }

    /// Of an EXITINTINFO: what the exception `second` makes when it meets the delivery of this event.
    pub fn combine(self, second: Exception) -> Combined {
        match self.event(0) {
            Some(first) if self.is_valid() => first.combine(second),
            _ => Combined::Serial,
        }
    }
}

impl From<Event> for RawEvent {
    /// The EVENTINJ that delivers an event.
    ///
    /// VMRUN pushes the guest's RIP as the return address; for INT n, INT3 and INTO a processor
    /// with nRIP pushes the VMCB's nRIP instead. So before any of these software events the caller
    /// sets nRIP, and where nRIP is not supported RIP itself, to the instruction that follows.
    /// CR2 of a #PF is the VMCB's CR2. INT1 becomes a plain #DB, which is not quite what it raises:
    /// "Hypervisor software should emulate the injection of ICEBP" (APM vol. 2, 15.20).
    #[inline]
    fn from(event: Event) -> Self {
        match event {
            Event::Interrupt(vector) => Self::new(0, vector),
            Event::Nmi => Self::new(2, 2),
            Event::Exception {
                vector,
                error_code: None,
            } => Self::new(3, vector),
            Event::Exception {
                vector,
                error_code: Some(code),
            } => {
                let code = u64::from(code) << 32;
                Self(Self::new(3, vector).0 | Self::ERROR_CODE_VALID | code)
            }
            Event::SoftwareInterrupt { vector, .. } => Self::new(4, vector),
            // INT1's #DB, INT3's #BP, INTO's #OF; later kinds of `Event` would be these vectors.
            other => Self::new(3, other.vector()),
        }
    }
}

impl fmt::Display for RawEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.event(0) {
            Some(event) => event.fmt(f),
            None if self.is_valid() => write!(f, "event of a reserved type ({:#x})", self.0),
            None => f.write_str("no event"),
        }
    }
}

impl fmt::Debug for RawEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x} ({self})", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::string::ToString;

    #[test]
    fn golden_encodings() {
        // APM vol. 2, figure 15-4.
        assert_eq!(RawEvent::from(Event::Interrupt(0x31)).0, 0x8000_0031);
        assert_eq!(RawEvent::from(Event::Nmi).0, 0x8000_0202);
        assert_eq!(RawEvent::from(Event::UD).0, 0x8000_0306);
        let pf = Event::fault_with(Exception::PageFault, 0x15);
        assert_eq!(RawEvent::from(pf).0, 0x0000_0015_8000_0B0E);
        let int80 = Event::SoftwareInterrupt {
            vector: 0x80,
            length: 2,
        };
        assert_eq!(RawEvent::from(int80).0, 0x8000_0480);
        assert_eq!(RawEvent::from(int80).event(2), Some(int80));
        let int3 = Event::SoftwareException {
            vector: 3,
            length: 1,
        };
        assert_eq!(RawEvent::from(int3).0, 0x8000_0303);
        let int1 = Event::PrivilegedSoftwareException { length: 1 };
        assert_eq!(RawEvent::from(int1).0, 0x8000_0301);
    }

    #[test]
    fn software_events_run_again_instead_of_being_injected() {
        let int80 = RawEvent(0x8000_0480);
        assert_eq!(int80.to_redeliver(), None);
        assert_eq!(RawEvent(0x8000_0303).to_redeliver(), None);
        let interrupt = Event::Interrupt(0x31);
        assert_eq!(RawEvent::from(interrupt).to_redeliver(), Some(interrupt));
        assert_eq!(RawEvent::NONE.to_redeliver(), None);
    }

    #[test]
    fn reserved_types_are_no_event() {
        for kind in [1u64, 5, 6, 7] {
            let raw = RawEvent(1 << 31 | kind << 8 | 13);
            assert_eq!(raw.event_type(), EventType::Reserved(kind as u8));
            assert_eq!(raw.event(0), None);
        }
        let raw = RawEvent(0x8000_0100);
        assert_eq!(raw.to_string(), "event of a reserved type (0x80000100)");
    }

    #[test]
    fn exceptions_combine_as_the_table_says() {
        use Exception as E;
        let delivering = |e| RawEvent::from(Event::fault_with(e, 0));
        assert_eq!(
            delivering(E::PageFault).combine(E::PageFault),
            Combined::DoubleFault
        );
        assert_eq!(
            delivering(E::GeneralProtection).combine(E::SegmentNotPresent),
            Combined::DoubleFault
        );
        assert_eq!(
            delivering(E::GeneralProtection).combine(E::PageFault),
            Combined::Serial
        );
        assert_eq!(
            delivering(E::DoubleFault).combine(E::PageFault),
            Combined::Shutdown
        );
        assert_eq!(
            delivering(E::DoubleFault).combine(E::Debug),
            Combined::Serial
        );
        let interrupt = RawEvent::from(Event::Interrupt(14));
        assert_eq!(interrupt.combine(E::PageFault), Combined::Serial);
        assert_eq!(RawEvent::NONE.combine(E::PageFault), Combined::Serial);
    }

    fn hardware_event() -> impl Strategy<Value = Event> {
        prop_oneof![
            any::<u8>().prop_map(Event::Interrupt),
            Just(Event::Nmi),
            (any::<u8>(), any::<Option<u32>>())
                .prop_filter("raised by INT3 and INTO only", |(v, _)| !matches!(v, 3 | 4))
                .prop_map(|(vector, error_code)| Event::Exception { vector, error_code }),
        ]
    }

    proptest! {
        #[test]
        fn hardware_events_round_trip(event in hardware_event()) {
            let raw = RawEvent::from(event);
            prop_assert_eq!(raw.event(0), Some(event));
            prop_assert_eq!(raw.to_redeliver(), Some(event));
        }

        #[test]
        fn software_events_round_trip(vector: u8, length in 1u8..16) {
            let event = Event::SoftwareInterrupt { vector, length };
            prop_assert_eq!(RawEvent::from(event).event(length), Some(event));
        }

        #[test]
        fn any_bits_are_printed_and_never_a_panic(raw: u64) {
            let text = RawEvent(raw).to_string();
            prop_assert!(!text.is_empty());
        }
    }
}
