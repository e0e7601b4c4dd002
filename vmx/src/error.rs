//! How VMX instructions fail (SDM vol. 3C, 33.2 and 33.4).

use core::fmt;

use testudo_arch::Hpa;

use crate::encoding::Encoding;

macro_rules! instruction_errors {
    ($($(#[doc = $doc:literal])+ $name:ident = $number:literal;)*) => {
        /// A VM-instruction error number (SDM vol. 3C, table 33-1).
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum InstructionError {
            $($(#[doc = $doc])+ $name,)*
            /// A number that the manual does not define.
            Unknown(u32),
        }

        impl InstructionError {
            /// Every number that the manual defines.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// The error with this number.
            pub const fn from_number(number: u32) -> Self {
                match number {
                    $($number => Self::$name,)*
                    other => Self::Unknown(other),
                }
            }

            /// The number, as the VM-instruction error field holds it.
            pub const fn number(self) -> u32 {
                match self {
                    $(Self::$name => $number,)*
                    Self::Unknown(number) => number,
                }
            }

            /// The manual's words for it.
            pub const fn description(self) -> &'static str {
                match self {
                    $(Self::$name => concat!($($doc),+).trim_ascii(),)*
                    Self::Unknown(_) => "not defined by the manual",
                }
            }
        }
    };
}

instruction_errors! {
    /// VMCALL executed in VMX root operation
    VmcallInRoot = 1;
    /// VMCLEAR with invalid physical address
    VmclearInvalidAddress = 2;
    /// VMCLEAR with VMXON pointer
    VmclearVmxonPointer = 3;
    /// VMLAUNCH with non-clear VMCS
    VmlaunchNonClear = 4;
    /// VMRESUME with non-launched VMCS
    VmresumeNonLaunched = 5;
    /// VMRESUME after VMXOFF
    VmresumeAfterVmxoff = 6;
    /// VM entry with invalid control field(s)
    InvalidControlField = 7;
    /// VM entry with invalid host-state field(s)
    InvalidHostState = 8;
    /// VMPTRLD with invalid physical address
    VmptrldInvalidAddress = 9;
    /// VMPTRLD with VMXON pointer
    VmptrldVmxonPointer = 10;
    /// VMPTRLD with incorrect VMCS revision identifier
    VmptrldWrongRevision = 11;
    /// VMREAD/VMWRITE from/to unsupported VMCS component
    UnsupportedComponent = 12;
    /// VMWRITE to read-only VMCS component
    ReadOnlyComponent = 13;
    /// VMXON executed in VMX root operation
    VmxonInRoot = 15;
    /// VM entry with invalid executive-VMCS pointer
    InvalidExecutiveVmcs = 16;
    /// VM entry with non-launched executive VMCS
    NonLaunchedExecutiveVmcs = 17;
    /// VM entry with executive-VMCS pointer not VMXON pointer
    ExecutiveVmcsNotVmxon = 18;
    /// VMCALL with non-clear VMCS
    VmcallNonClear = 19;
    /// VMCALL with invalid VM-exit control fields
    VmcallInvalidExitControls = 20;
    /// VMCALL with incorrect MSEG revision identifier
    VmcallWrongMseg = 22;
    /// VMXOFF under dual-monitor treatment of SMIs and SMM
    VmxoffDualMonitor = 23;
    /// VMCALL with invalid SMM-monitor features
    VmcallInvalidSmmFeatures = 24;
    /// VM entry with invalid VM-execution control fields in executive VMCS
    InvalidExecutiveControls = 25;
    /// VM entry with events blocked by MOV SS
    EventsBlockedByMovSs = 26;
    /// Invalid operand to INVEPT/INVVPID
    InvalidInvalidationOperand = 28;
}

impl fmt::Display for InstructionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (error {})", self.description(), self.number())
    }
}

/// Why a VMX instruction did not succeed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum VmFail {
    /// VMfailInvalid: CF was set, there is no current VMCS to hold a number.
    #[error("VMfailInvalid: no current VMCS, or one that this instruction cannot use")]
    Invalid,
    /// VMfailValid: ZF was set, and the current VMCS holds the number.
    #[error("VMfailValid: {0}")]
    Valid(InstructionError),
}

/// VMXON, VMCLEAR or VMPTRLD failed, and what the region begins with that it was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{instruction} of the region at {region}, which begins with {found:#x} (the processor's revision \
     is {revision:#x}): {fail}"
)]
pub struct RegionError {
    /// The instruction.
    pub instruction: &'static str,
    /// The region.
    pub region: Hpa,
    /// Its first word: a revision identifier, and in bit 31 whether it is a shadow VMCS.
    pub found: u32,
    /// The processor's revision identifier.
    pub revision: u32,
    /// How it failed.
    pub fail: VmFail,
}

/// A VMCS field that could not be read or written.
///
/// ```
/// use testudo_vmx::{VmcsRead, caps::fixtures, fake::FakeVmcs, fields};
///
/// // A processor of 2008 has no page-modification log.
/// let vmcs = FakeVmcs::with_caps(&fixtures::nehalem());
/// assert_eq!(
///     vmcs.get(fields::PML_ADDRESS).unwrap_err().to_string(),
///     "VMREAD of PML_ADDRESS: VMfailValid: VMREAD/VMWRITE from/to unsupported VMCS component \
///      (error 12)"
/// );
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AccessError {
    /// VMREAD failed.
    #[error("VMREAD of {field}: {fail}")]
    Read {
        /// The field.
        field: Encoding,
        /// How it failed.
        fail: VmFail,
    },
    /// VMWRITE failed.
    #[error("VMWRITE of {value:#x} to {field}: {fail}")]
    Write {
        /// The field.
        field: Encoding,
        /// The value that was to be written.
        value: u64,
        /// How it failed.
        fail: VmFail,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_round_trip() {
        for number in 0..64 {
            assert_eq!(InstructionError::from_number(number).number(), number);
        }
        assert_eq!(InstructionError::ALL.len(), 25);
    }

    #[test]
    fn a_wrong_revision_is_shown() {
        let error = RegionError {
            instruction: "VMPTRLD",
            region: Hpa(0x7000),
            found: 0x12,
            revision: 0x2B,
            fail: VmFail::Valid(InstructionError::VmptrldWrongRevision),
        };
        assert_eq!(
            std::format!("{error}"),
            "VMPTRLD of the region at 0x7000, which begins with 0x12 (the processor's revision is \
             0x2b): VMfailValid: VMPTRLD with incorrect VMCS revision identifier (error 11)"
        );
    }

    #[test]
    fn errors_say_what_and_where() {
        let error = AccessError::Write {
            field: Encoding(0x4402),
            value: 7,
            fail: VmFail::Valid(InstructionError::ReadOnlyComponent),
        };
        assert_eq!(
            std::format!("{error}"),
            "VMWRITE of 0x7 to EXIT_REASON: VMfailValid: VMWRITE to read-only VMCS component (error 13)"
        );
    }
}
