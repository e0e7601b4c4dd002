//! Events in the VMCS's format: injection, and delivery that an exit interrupted
//! (SDM vol. 3C, 27.8.3, 27.9.2 and 27.9.3).

use testudo_arch::Event;

use crate::error::AccessError;
use crate::fields;
use crate::vmcs::{VmcsRead, VmcsWrite};

/// The type of an event: bits 10:8 of an interruption-information field.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum EventType {
    /// External interrupt.
    ExternalInterrupt = 0,
    /// Not used, unless by a future processor.
    Reserved = 1,
    /// Non-maskable interrupt.
    Nmi = 2,
    /// Hardware exception.
    HardwareException = 3,
    /// `INT n`.
    SoftwareInterrupt = 4,
    /// `INT1`.
    PrivilegedSoftwareException = 5,
    /// `INT3` or `INTO`.
    SoftwareException = 6,
    /// On entry, by its vector: a pending MTF exit ([`VECTOR_MTF`]); where FRED transitions are
    /// enabled, SYSCALL ([`VECTOR_SYSCALL`]) or SYSENTER ([`VECTOR_SYSENTER`]).
    Other = 7,
}

/// The vector of an [other event](EventType::Other): a pending MTF exit.
pub const VECTOR_MTF: u8 = 0;
/// The vector of an [other event](EventType::Other): SYSCALL.
pub const VECTOR_SYSCALL: u8 = 1;
/// The vector of an [other event](EventType::Other): SYSENTER.
pub const VECTOR_SYSENTER: u8 = 2;

/// An interruption-information field: of an entry, of an exit, or of IDT vectoring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct InterruptionInformation(pub u32);

impl InterruptionInformation {
    /// Whether the field holds an event.
    #[inline]
    pub const fn is_valid(self) -> bool {
        self.0 & (1 << 31) != 0
    }

    /// The vector.
    #[inline]
    pub const fn vector(self) -> u8 {
        self.0 as u8
    }

    /// The type of the event.
    #[inline]
    pub const fn event_type(self) -> EventType {
        match (self.0 >> 8) & 7 {
            0 => EventType::ExternalInterrupt,
            1 => EventType::Reserved,
            2 => EventType::Nmi,
            3 => EventType::HardwareException,
            4 => EventType::SoftwareInterrupt,
            5 => EventType::PrivilegedSoftwareException,
            6 => EventType::SoftwareException,
            _ => EventType::Other,
        }
    }

    /// Whether an error code belongs to the event.
    #[inline]
    pub const fn has_error_code(self) -> bool {
        self.0 & (1 << 11) != 0
    }

    /// Exits only: an IRET that met this event had already unblocked NMIs.
    #[inline]
    pub const fn nmi_unblocking_by_iret(self) -> bool {
        self.0 & (1 << 12) != 0
    }

    /// Whether the exception was met during the FRED delivery of another event. It decides the stack
    /// level of its own delivery.
    #[inline]
    pub const fn is_nested(self) -> bool {
        self.0 & Self::NESTED != 0
    }

    /// Whether the event comes from an instruction, so that its length belongs to it (29.2.1.3).
    #[inline]
    pub const fn has_instruction(self) -> bool {
        match self.event_type() {
            EventType::SoftwareInterrupt
            | EventType::PrivilegedSoftwareException
            | EventType::SoftwareException => true,
            EventType::Other => matches!(self.vector(), VECTOR_SYSCALL | VECTOR_SYSENTER),
            _ => false,
        }
    }

    const NESTED: u32 = 1 << 13;

    /// The event, with the error code and instruction length from their own fields; `None` if the
    /// field is not valid or of a type that is no event.
    pub const fn event(self, error_code: u32, length: u32) -> Option<Event> {
        if !self.is_valid() {
            return None;
        }
        let vector = self.vector();
        let length = length as u8;
        Some(match self.event_type() {
            EventType::ExternalInterrupt => Event::Interrupt(vector),
            EventType::Nmi => Event::Nmi,
            EventType::HardwareException => Event::Exception {
                vector,
                error_code: if self.has_error_code() {
                    Some(error_code)
                } else {
                    None
                },
            },
            EventType::SoftwareInterrupt => Event::SoftwareInterrupt { vector, length },
            EventType::PrivilegedSoftwareException => Event::PrivilegedSoftwareException { length },
            EventType::SoftwareException => Event::SoftwareException { vector, length },
            EventType::Reserved | EventType::Other => return None,
        })
    }
}

/// The fields through which a VM entry injects an event.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Injection {
    /// VM-entry interruption-information.
    pub information: InterruptionInformation,
    /// VM-entry exception error code, where the information says there is one.
    pub error_code: Option<u32>,
    /// VM-entry instruction length, where the event comes from an instruction.
    pub length: Option<u32>,
    /// Injected-event data, where FRED transitions are enabled: what the guest's handler finds as the
    /// event data. Of #PF that is the linear address, of #DB the causes, of #NM IA32_XFD_ERR.
    pub data: Option<u64>,
}

impl Injection {
    /// The fields that inject `event`; `None` for a kind of event that VMX cannot inject.
    pub const fn of(event: Event) -> Option<Self> {
        let (event_type, error_code, length) = match event {
            Event::Interrupt(_) => (EventType::ExternalInterrupt, None, None),
            Event::Nmi => (EventType::Nmi, None, None),
            Event::Exception { error_code, .. } => (EventType::HardwareException, error_code, None),
            Event::SoftwareInterrupt { length, .. } => {
                (EventType::SoftwareInterrupt, None, Some(length as u32))
            }
            Event::SoftwareException { length, .. } => {
                (EventType::SoftwareException, None, Some(length as u32))
            }
            Event::PrivilegedSoftwareException { length } => (
                EventType::PrivilegedSoftwareException,
                None,
                Some(length as u32),
            ),
            _ => return None,
        };
        let deliver_code = if error_code.is_some() { 1 << 11 } else { 0 };
        let information =
            (1 << 31) | deliver_code | ((event_type as u32) << 8) | event.vector() as u32;
        Some(Self {
            information: InterruptionInformation(information),
            error_code,
            length,
            data: None,
        })
    }

    /// What injects again the event whose delivery the last exit interrupted, bit for bit (30.2.4):
    /// SYSCALL and SYSENTER too, and that an exception is nested. `fred` says whether FRED
    /// transitions are enabled in the guest (CR4.FRED), so that there are event data. One VMREAD when
    /// there is no such event.
    ///
    /// ```
    /// use testudo_vmx::event::Injection;
    /// use testudo_vmx::{VmcsRead, fake::FakeVmcs, fields};
    ///
    /// // The delivery of a nested #PF was interrupted.
    /// let mut vmcs = FakeVmcs::new();
    /// vmcs.preset(fields::IDT_VECTORING_INFORMATION, 0x8000_2B0E);
    /// vmcs.preset(fields::IDT_VECTORING_ERROR_CODE, 2);
    /// vmcs.preset(fields::ORIGINAL_EVENT_DATA, 0x7000);
    /// Injection::of_interrupted(&vmcs, true)?.unwrap().write(&mut vmcs)?;
    /// assert_eq!(vmcs.get(fields::ENTRY_INTERRUPTION_INFORMATION)?, 0x8000_2B0E);
    /// assert_eq!(vmcs.get(fields::INJECTED_EVENT_DATA)?, 0x7000);
    /// # Ok::<(), testudo_vmx::AccessError>(())
    /// ```
    ///
    /// # Errors
    ///
    /// A VMREAD failed.
    pub fn of_interrupted(vmcs: &impl VmcsRead, fred: bool) -> Result<Option<Self>, AccessError> {
        // Bit 12 is undefined here and reserved there.
        let information = vmcs.get(fields::IDT_VECTORING_INFORMATION)? & !(1 << 12);
        let information = InterruptionInformation(information);
        if !information.is_valid() {
            return Ok(None);
        }
        let mut injection = Self {
            information,
            ..Self::default()
        };
        if information.has_error_code() {
            injection.error_code = Some(vmcs.get(fields::IDT_VECTORING_ERROR_CODE)?);
        }
        if information.has_instruction() {
            injection.length = Some(vmcs.get(fields::EXIT_INSTRUCTION_LENGTH)?);
        }
        if fred {
            injection.data = Some(vmcs.get(fields::ORIGINAL_EVENT_DATA)?);
        }
        Ok(Some(injection))
    }

    /// Writes the fields, so that the next VM entry delivers the event. One to four VMWRITEs.
    ///
    /// # Errors
    ///
    /// A VMWRITE failed.
    #[inline]
    pub fn write(self, vmcs: &mut impl VmcsWrite) -> Result<(), AccessError> {
        if let Some(code) = self.error_code {
            vmcs.set(fields::ENTRY_EXCEPTION_ERROR_CODE, code)?;
        }
        if let Some(length) = self.length {
            vmcs.set(fields::ENTRY_INSTRUCTION_LENGTH, length)?;
        }
        if let Some(data) = self.data {
            vmcs.set(fields::INJECTED_EVENT_DATA, data)?;
        }
        vmcs.set(fields::ENTRY_INTERRUPTION_INFORMATION, self.information.0)
    }
}

/// The event whose delivery the last exit interrupted, to be injected again on the next entry
/// (30.2.4). One VMREAD when there is none.
///
/// ```
/// use testudo_arch::Event;
/// use testudo_vmx::{event, fake::FakeVmcs, fields};
///
/// let mut vmcs = FakeVmcs::new();
/// vmcs.preset(fields::IDT_VECTORING_INFORMATION, 0x8000_0020);
/// let event = event::interrupted_delivery(&vmcs)?.unwrap();
/// assert_eq!(event, Event::Interrupt(0x20));
/// event::Injection::of(event).unwrap().write(&mut vmcs)?;
/// # Ok::<(), testudo_vmx::AccessError>(())
/// ```
///
/// # Errors
///
/// A VMREAD failed.
#[inline]
pub fn interrupted_delivery(vmcs: &impl VmcsRead) -> Result<Option<Event>, AccessError> {
    let information = InterruptionInformation(vmcs.get(fields::IDT_VECTORING_INFORMATION)?);
    if !information.is_valid() {
        return Ok(None);
    }
    let error_code = if information.has_error_code() {
        vmcs.get(fields::IDT_VECTORING_ERROR_CODE)?
    } else {
        0
    };
    let length = if information.has_instruction() {
        vmcs.get(fields::EXIT_INSTRUCTION_LENGTH)?
    } else {
        0
    };
    Ok(information.event(error_code, length))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::FakeVmcs;
    use proptest::prelude::*;
    use testudo_arch::Exception;

    #[test]
    fn golden_information() {
        let information = |event| Injection::of(event).unwrap().information.0;
        assert_eq!(information(Event::Interrupt(0x31)), 0x8000_0031);
        assert_eq!(information(Event::Nmi), 0x8000_0202);
        assert_eq!(information(Event::GP0), 0x8000_0B0D);
        assert_eq!(information(Event::UD), 0x8000_0306);
        let int = Event::SoftwareInterrupt {
            vector: 0x80,
            length: 2,
        };
        assert_eq!(information(int), 0x8000_0480);
        let icebp = Event::PrivilegedSoftwareException { length: 1 };
        assert_eq!(information(icebp), 0x8000_0501);
    }

    fn events() -> impl Strategy<Value = Event> {
        prop_oneof![
            any::<u8>().prop_map(Event::Interrupt),
            Just(Event::Nmi),
            (0..32u8, any::<Option<u32>>())
                .prop_map(|(vector, error_code)| Event::Exception { vector, error_code }),
            (any::<u8>(), 0..16u8)
                .prop_map(|(vector, length)| Event::SoftwareInterrupt { vector, length }),
            (3..5u8, 0..16u8)
                .prop_map(|(vector, length)| Event::SoftwareException { vector, length }),
            (0..16u8).prop_map(|length| Event::PrivilegedSoftwareException { length }),
        ]
    }

    proptest! {
        #[test]
        fn an_interrupted_event_is_injected_again_unchanged(event in events()) {
            let injection = Injection::of(event).unwrap();
            let mut vmcs = FakeVmcs::new();
            vmcs.preset(fields::IDT_VECTORING_INFORMATION, injection.information.0.into());
            vmcs.preset(fields::IDT_VECTORING_ERROR_CODE, injection.error_code.unwrap_or(7).into());
            vmcs.preset(fields::EXIT_INSTRUCTION_LENGTH, injection.length.unwrap_or(7).into());
            prop_assert_eq!(interrupted_delivery(&vmcs).unwrap(), Some(event));
            let again = Injection::of_interrupted(&vmcs, false).unwrap();
            prop_assert_eq!(again, Some(injection));
        }

        #[test]
        fn any_information_is_an_event_or_none(raw: u32, code: u32, length: u32) {
            let event = InterruptionInformation(raw).event(code, length);
            prop_assert!(event.is_none() || raw >> 31 == 1);
        }
    }

    #[test]
    fn an_interrupted_syscall_is_injected_again() {
        let mut vmcs = FakeVmcs::new();
        vmcs.preset(fields::IDT_VECTORING_INFORMATION, 0x8000_1701);
        vmcs.preset(fields::EXIT_INSTRUCTION_LENGTH, 2);
        let expected = Injection {
            information: InterruptionInformation(0x8000_0701),
            error_code: None,
            length: Some(2),
            data: Some(0),
        };
        let found = Injection::of_interrupted(&vmcs, true).unwrap();
        assert_eq!(found, Some(expected));
        // Without FRED there is no field for its data.
        vmcs.fail(fields::ORIGINAL_EVENT_DATA, crate::VmFail::Invalid);
        let found = Injection::of_interrupted(&vmcs, false).unwrap();
        assert_eq!(found.unwrap().data, None);
    }

    #[test]
    fn no_delivery_costs_one_read() {
        let vmcs = FakeVmcs::new();
        assert_eq!(interrupted_delivery(&vmcs), Ok(None));
        assert_eq!(vmcs.counts(), (1, 0));
        let fault = Event::fault_with(Exception::PageFault, 2);
        let mut vmcs = FakeVmcs::new();
        Injection::of(fault).unwrap().write(&mut vmcs).unwrap();
        assert_eq!(vmcs.counts(), (0, 2));
    }
}
