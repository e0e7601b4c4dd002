//! Events: what a hypervisor injects into a guest, and what was being delivered when it exited.

use core::fmt;

/// The exceptions that the architecture defines, by vector (SDM vol. 3A, 6.3.1; APM vol. 2, 8.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
#[allow(missing_docs, reason = "each name is the manuals' own and says all")]
pub enum Exception {
    DivideError = 0,
    Debug = 1,
    Breakpoint = 3,
    Overflow = 4,
    BoundRange = 5,
    InvalidOpcode = 6,
    DeviceNotAvailable = 7,
    DoubleFault = 8,
    CoprocessorSegmentOverrun = 9,
    InvalidTss = 10,
    SegmentNotPresent = 11,
    StackFault = 12,
    GeneralProtection = 13,
    PageFault = 14,
    FloatingPoint = 16,
    AlignmentCheck = 17,
    MachineCheck = 18,
    SimdFloatingPoint = 19,
    Virtualization = 20,
    ControlProtection = 21,
    HypervisorInjection = 28,
    VmmCommunication = 29,
    Security = 30,
}

impl Exception {
    /// Every exception, by ascending vector.
    pub const ALL: [Self; 23] = [
        Self::DivideError,
        Self::Debug,
        Self::Breakpoint,
        Self::Overflow,
        Self::BoundRange,
        Self::InvalidOpcode,
        Self::DeviceNotAvailable,
        Self::DoubleFault,
        Self::CoprocessorSegmentOverrun,
        Self::InvalidTss,
        Self::SegmentNotPresent,
        Self::StackFault,
        Self::GeneralProtection,
        Self::PageFault,
        Self::FloatingPoint,
        Self::AlignmentCheck,
        Self::MachineCheck,
        Self::SimdFloatingPoint,
        Self::Virtualization,
        Self::ControlProtection,
        Self::HypervisorInjection,
        Self::VmmCommunication,
        Self::Security,
    ];

    /// The exception with this vector, where the architecture defines one. Vector 2 is the NMI,
    /// which is not an exception.
    pub fn from_vector(vector: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|e| *e as u8 == vector)
    }

    /// The vector.
    #[inline]
    pub const fn vector(self) -> u8 {
        self as u8
    }

    /// Whether delivery pushes an error code.
    #[inline]
    pub const fn has_error_code(self) -> bool {
        matches!(
            self,
            Self::DoubleFault
                | Self::InvalidTss
                | Self::SegmentNotPresent
                | Self::StackFault
                | Self::GeneralProtection
                | Self::PageFault
                | Self::AlignmentCheck
                | Self::ControlProtection
                | Self::VmmCommunication
                | Self::Security
        )
    }

    /// Whether this exception makes a double fault together with a following contributory one
    /// (SDM vol. 3A, table 6-4; APM vol. 2, table 8-2).
    #[inline]
    pub const fn is_contributory(self) -> bool {
        matches!(
            self,
            Self::DivideError
                | Self::InvalidTss
                | Self::SegmentNotPresent
                | Self::StackFault
                | Self::GeneralProtection
                | Self::ControlProtection
                | Self::VmmCommunication
        )
    }

    /// The manuals' mnemonic, for instance `#GP`.
    pub const fn mnemonic(self) -> &'static str {
        match self {
            Self::DivideError => "#DE",
            Self::Debug => "#DB",
            Self::Breakpoint => "#BP",
            Self::Overflow => "#OF",
            Self::BoundRange => "#BR",
            Self::InvalidOpcode => "#UD",
            Self::DeviceNotAvailable => "#NM",
            Self::DoubleFault => "#DF",
            Self::CoprocessorSegmentOverrun => "#MSO",
            Self::InvalidTss => "#TS",
            Self::SegmentNotPresent => "#NP",
            Self::StackFault => "#SS",
            Self::GeneralProtection => "#GP",
            Self::PageFault => "#PF",
            Self::FloatingPoint => "#MF",
            Self::AlignmentCheck => "#AC",
            Self::MachineCheck => "#MC",
            Self::SimdFloatingPoint => "#XM",
            Self::Virtualization => "#VE",
            Self::ControlProtection => "#CP",
            Self::HypervisorInjection => "#HV",
            Self::VmmCommunication => "#VC",
            Self::Security => "#SX",
        }
    }
}

impl fmt::Display for Exception {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.mnemonic())
    }
}

/// An event on its way into a guest: chosen by the hypervisor, or interrupted by a VM exit and to
/// be delivered again (SDM vol. 3C, 29.6; APM vol. 2, 15.20).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Event {
    /// An external interrupt with its vector.
    Interrupt(u8),
    /// A non-maskable interrupt.
    Nmi,
    /// An exception, with its error code where it has one. A #PF also needs CR2, which is guest
    /// state and set apart.
    Exception {
        /// The vector: usually an [`Exception`], but a guest hypervisor may name others.
        vector: u8,
        /// The error code to push.
        error_code: Option<u32>,
    },
    /// `INT n`: a software interrupt, whose instruction is `length` bytes long.
    SoftwareInterrupt {
        /// The vector.
        vector: u8,
        /// The instruction's length in bytes.
        length: u8,
    },
    /// `INT3` or `INTO`: a software exception.
    SoftwareException {
        /// The vector: 3 or 4.
        vector: u8,
        /// The instruction's length in bytes.
        length: u8,
    },
    /// `INT1` (ICEBP): a privileged software exception.
    PrivilegedSoftwareException {
        /// The instruction's length in bytes.
        length: u8,
    },
}

impl Event {
    /// The event for an exception without an error code.
    #[inline]
    pub const fn fault(exception: Exception) -> Self {
        Self::Exception {
            vector: exception as u8,
            error_code: None,
        }
    }

    /// The event for an exception with an error code.
    #[inline]
    pub const fn fault_with(exception: Exception, error_code: u32) -> Self {
        Self::Exception {
            vector: exception as u8,
            error_code: Some(error_code),
        }
    }

    /// `#UD`.
    pub const UD: Self = Self::fault(Exception::InvalidOpcode);
    /// `#GP(0)`.
    pub const GP0: Self = Self::fault_with(Exception::GeneralProtection, 0);

    /// The vector through which the event is delivered.
    #[inline]
    pub const fn vector(self) -> u8 {
        match self {
            Self::Interrupt(vector)
            | Self::Exception { vector, .. }
            | Self::SoftwareInterrupt { vector, .. }
            | Self::SoftwareException { vector, .. } => vector,
            Self::Nmi => 2,
            Self::PrivilegedSoftwareException { .. } => 1,
        }
    }
}

/// What two exceptions make together (SDM vol. 3A, table 6-5; APM vol. 2, table 8-2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Combined {
    /// The second is delivered; the first happens again when its instruction does.
    Serial,
    /// `#DF`.
    DoubleFault,
    /// The processor shuts down.
    Shutdown,
}

impl Event {
    /// What the exception `second` makes when it meets the delivery of this event: a hypervisor
    /// that intercepts exceptions decides it itself.
    pub fn combine(self, second: Exception) -> Combined {
        let Self::Exception { vector, .. } = self else {
            return Combined::Serial;
        };
        let contributory = second.is_contributory();
        let is_page_fault = |e| matches!(e, Exception::PageFault | Exception::Virtualization);
        match Exception::from_vector(vector) {
            Some(Exception::DoubleFault) if contributory || is_page_fault(second) => {
                Combined::Shutdown
            }
            Some(first) if is_page_fault(first) && (contributory || is_page_fault(second)) => {
                Combined::DoubleFault
            }
            Some(first) if first.is_contributory() && contributory => Combined::DoubleFault,
            _ => Combined::Serial,
        }
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Interrupt(vector) => write!(f, "interrupt {vector:#04x}"),
            Self::Nmi => f.write_str("NMI"),
            Self::Exception { vector, error_code } => {
                match Exception::from_vector(vector) {
                    Some(exception) => write!(f, "{exception}")?,
                    None => write!(f, "exception {vector}")?,
                }
                match error_code {
                    Some(code) => write!(f, "({code:#x})"),
                    None => Ok(()),
                }
            }
            Self::SoftwareInterrupt { vector, .. } => write!(f, "INT {vector:#04x}"),
            Self::SoftwareException { vector: 3, .. } => f.write_str("INT3"),
            Self::SoftwareException { vector: 4, .. } => f.write_str("INTO"),
            Self::SoftwareException { vector, .. } => write!(f, "software exception {vector}"),
            Self::PrivilegedSoftwareException { .. } => f.write_str("INT1"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_exception_is_found_by_its_vector() {
        for exception in Exception::ALL {
            assert_eq!(Exception::from_vector(exception.vector()), Some(exception));
        }
        assert_eq!(Exception::from_vector(2), None);
        assert_eq!(Exception::from_vector(255), None);
    }

    #[test]
    fn exceptions_combine_as_the_table_says() {
        use Exception as E;
        let meets = |first, second| Event::fault_with(first, 0).combine(second);
        assert_eq!(meets(E::PageFault, E::PageFault), Combined::DoubleFault);
        assert_eq!(meets(E::PageFault, E::DivideError), Combined::DoubleFault);
        assert_eq!(meets(E::InvalidTss, E::StackFault), Combined::DoubleFault);
        assert_eq!(meets(E::GeneralProtection, E::PageFault), Combined::Serial);
        assert_eq!(meets(E::DoubleFault, E::PageFault), Combined::Shutdown);
        assert_eq!(meets(E::DoubleFault, E::Debug), Combined::Serial);
        assert_eq!(Event::Interrupt(14).combine(E::PageFault), Combined::Serial);
    }

    #[test]
    fn events_read_like_the_manual() {
        let text = std::format!(
            "{} {} {}",
            Event::GP0,
            Event::UD,
            Event::Exception {
                vector: 15,
                error_code: None
            }
        );
        assert_eq!(text, "#GP(0x0) #UD exception 15");
    }
}
