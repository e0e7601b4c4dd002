//! The control words of the VMCS, bit by bit (SDM vol. 3C, 27.6 to 27.8).
//!
//! Every type keeps unknown bits: a value that came from a VMCS goes back unchanged.
//!
//! ```
//! use testudo_vmx::controls::PinControls;
//!
//! let pin = PinControls::from_bits_retain(0x1F);
//! assert!(pin.contains(PinControls::NMI_EXITING));
//! assert_eq!(pin.to_string(), "EXTERNAL_INTERRUPT_EXITING, NMI_EXITING, bits 0x16");
//! ```

use core::fmt;

use bitflags::{Flags, bitflags};

use crate::encoding::Encoding;

/// A word of VMX controls whose permitted settings a capability MSR reports.
pub trait ControlWord: Flags + Copy + fmt::Debug + PartialEq {
    /// What the manual calls the word.
    const NAME: &'static str;
    /// The VMCS field that holds the word.
    const FIELD: Encoding;
    /// The reserved bits that are 1 by default (SDM vol. 3D, appendix A.2).
    const DEFAULT1: u64;
    /// The bits as 64.
    fn to_u64(self) -> u64;
    /// The word with these low bits.
    fn from_u64(bits: u64) -> Self;
}

macro_rules! control_word {
    ($name:ident: $bits:ty, $text:literal, $field:literal, $default1:literal) => {
        impl ControlWord for $name {
            const NAME: &'static str = $text;
            const FIELD: Encoding = Encoding($field);
            const DEFAULT1: u64 = $default1;
            #[inline]
            #[allow(clippy::cast_lossless, reason = "one macro for both widths")]
            fn to_u64(self) -> u64 {
                self.bits() as u64
            }
            #[inline]
            fn from_u64(bits: u64) -> Self {
                Self::from_bits_retain(bits as $bits)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write_flags(self, f)
            }
        }
    };
}

/// Writes the names of the set flags, and what remains as a number.
pub(crate) fn write_flags<F: Flags>(flags: &F, f: &mut fmt::Formatter<'_>) -> fmt::Result
where
    F::Bits: fmt::LowerHex + PartialEq + Default,
{
    let mut rest = flags.bits();
    let mut first = true;
    for (name, flag) in flags.iter_names() {
        rest = rest & !flag.bits();
        let gap = if first { "" } else { ", " };
        write!(f, "{gap}{name}")?;
        first = false;
    }
    if rest != F::Bits::default() {
        let gap = if first { "" } else { ", " };
        write!(f, "{gap}bits {rest:#x}")?;
    } else if first {
        f.write_str("none")?;
    }
    Ok(())
}

bitflags! {
    /// Pin-based VM-execution controls (27.6.1).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct PinControls: u32 {
        /// External interrupts cause exits.
        const EXTERNAL_INTERRUPT_EXITING = 1 << 0;
        /// NMIs cause exits.
        const NMI_EXITING = 1 << 3;
        /// NMI blocking is virtual: never by NMI, but by the virtual-NMI bit of the interruptibility.
        const VIRTUAL_NMIS = 1 << 5;
        /// The preemption timer counts down in non-root operation.
        const ACTIVATE_PREEMPTION_TIMER = 1 << 6;
        /// Interrupts with the notification vector are processed as posted ones.
        const PROCESS_POSTED_INTERRUPTS = 1 << 7;
        const _ = !0;
    }
}
control_word!(PinControls: u32, "pin-based VM-execution controls", 0x4000, 0x16);

bitflags! {
    /// Primary processor-based VM-execution controls (27.6.2).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct PrimaryControls: u32 {
        /// Exit as soon as RFLAGS.IF is 1 and nothing blocks interrupts.
        const INTERRUPT_WINDOW_EXITING = 1 << 2;
        /// RDTSC and RDMSR of the time-stamp counter add the TSC offset.
        const USE_TSC_OFFSETTING = 1 << 3;
        /// HLT exits.
        const HLT_EXITING = 1 << 7;
        /// INVLPG exits.
        const INVLPG_EXITING = 1 << 9;
        /// MWAIT exits.
        const MWAIT_EXITING = 1 << 10;
        /// RDPMC exits.
        const RDPMC_EXITING = 1 << 11;
        /// RDTSC and RDTSCP exit.
        const RDTSC_EXITING = 1 << 12;
        /// MOV to CR3 exits, unless the value is a CR3-target value.
        const CR3_LOAD_EXITING = 1 << 15;
        /// MOV from CR3 exits.
        const CR3_STORE_EXITING = 1 << 16;
        /// The tertiary controls count.
        const ACTIVATE_TERTIARY_CONTROLS = 1 << 17;
        /// MOV to CR8 exits.
        const CR8_LOAD_EXITING = 1 << 19;
        /// MOV from CR8 exits.
        const CR8_STORE_EXITING = 1 << 20;
        /// MOV CR8 and other accesses to the TPR use the virtual-APIC page.
        const USE_TPR_SHADOW = 1 << 21;
        /// Exit as soon as virtual NMIs are not blocked.
        const NMI_WINDOW_EXITING = 1 << 22;
        /// MOV DR exits.
        const MOV_DR_EXITING = 1 << 23;
        /// Every I/O instruction exits.
        const UNCONDITIONAL_IO_EXITING = 1 << 24;
        /// The I/O bitmaps decide which I/O instructions exit.
        const USE_IO_BITMAPS = 1 << 25;
        /// Exit after the next instruction.
        const MONITOR_TRAP_FLAG = 1 << 27;
        /// The MSR bitmaps decide which RDMSR and WRMSR exit.
        const USE_MSR_BITMAPS = 1 << 28;
        /// MONITOR exits.
        const MONITOR_EXITING = 1 << 29;
        /// PAUSE exits.
        const PAUSE_EXITING = 1 << 30;
        /// The secondary controls count.
        const ACTIVATE_SECONDARY_CONTROLS = 1 << 31;
        const _ = !0;
    }
}
control_word!(PrimaryControls: u32, "primary processor-based VM-execution controls", 0x4002, 0x0401_E172);

bitflags! {
    /// Secondary processor-based VM-execution controls (27.6.2).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct SecondaryControls: u32 {
        /// Accesses to the APIC-access page are virtualized.
        const VIRTUALIZE_APIC_ACCESSES = 1 << 0;
        /// Guest-physical addresses are translated by EPT.
        const ENABLE_EPT = 1 << 1;
        /// LGDT, LIDT, LLDT, LTR, SGDT, SIDT, SLDT and STR exit.
        const DESCRIPTOR_TABLE_EXITING = 1 << 2;
        /// RDTSCP does not cause #UD.
        const ENABLE_RDTSCP = 1 << 3;
        /// MSR accesses to the x2APIC are virtualized.
        const VIRTUALIZE_X2APIC_MODE = 1 << 4;
        /// Cached translations are tagged with a VPID.
        const ENABLE_VPID = 1 << 5;
        /// WBINVD and WBNOINVD exit.
        const WBINVD_EXITING = 1 << 6;
        /// The guest may run unpaged or in real mode.
        const UNRESTRICTED_GUEST = 1 << 7;
        /// Reads of APIC registers come from the virtual-APIC page.
        const APIC_REGISTER_VIRTUALIZATION = 1 << 8;
        /// Pending virtual interrupts are evaluated and delivered by the processor.
        const VIRTUAL_INTERRUPT_DELIVERY = 1 << 9;
        /// A tight loop of PAUSE exits.
        const PAUSE_LOOP_EXITING = 1 << 10;
        /// RDRAND exits.
        const RDRAND_EXITING = 1 << 11;
        /// INVPCID does not cause #UD.
        const ENABLE_INVPCID = 1 << 12;
        /// VMFUNC does not cause #UD.
        const ENABLE_VM_FUNCTIONS = 1 << 13;
        /// VMREAD and VMWRITE in the guest may use a shadow VMCS.
        const VMCS_SHADOWING = 1 << 14;
        /// The ENCLS-exiting bitmap decides which ENCLS leaves exit.
        const ENABLE_ENCLS_EXITING = 1 << 15;
        /// RDSEED exits.
        const RDSEED_EXITING = 1 << 16;
        /// Guest-physical addresses that become dirty are logged.
        const ENABLE_PML = 1 << 17;
        /// EPT violations may become #VE.
        const EPT_VIOLATION_VE = 1 << 18;
        /// Processor trace does not show the guest's being one.
        const CONCEAL_VMX_FROM_PT = 1 << 19;
        /// XSAVES and XRSTORS do not cause #UD.
        const ENABLE_XSAVES_XRSTORS = 1 << 20;
        /// ENQCMD and ENQCMDS translate PASIDs.
        const PASID_TRANSLATION = 1 << 21;
        /// EPT has separate execute permissions for user and supervisor linear addresses.
        #[doc(alias = "MBEC")]
        const MODE_BASED_EXECUTE_CONTROL = 1 << 22;
        /// EPT may give write permission by 128-byte sub-pages.
        #[doc(alias = "SPP")]
        const SUB_PAGE_WRITE_PERMISSIONS = 1 << 23;
        /// Processor trace addresses are guest-physical.
        const PT_USES_GUEST_PHYSICAL = 1 << 24;
        /// The time-stamp counter is multiplied before the offset is added.
        const USE_TSC_SCALING = 1 << 25;
        /// TPAUSE, UMONITOR and UMWAIT do not cause #UD.
        const ENABLE_USER_WAIT_AND_PAUSE = 1 << 26;
        /// PCONFIG does not cause #UD.
        const ENABLE_PCONFIG = 1 << 27;
        /// The ENCLV-exiting bitmap decides which ENCLV leaves exit.
        const ENABLE_ENCLV_EXITING = 1 << 28;
        /// ENCLS leaves that let a hypervisor manage the enclave pages of its guests work.
        const EPC_VIRTUALIZATION_EXTENSIONS = 1 << 29;
        /// Bus locks exit.
        const VMM_BUS_LOCK_DETECTION = 1 << 30;
        /// A guest that reaches no instruction boundary for too long exits.
        #[doc(alias = "notify window")]
        const INSTRUCTION_TIMEOUT = 1 << 31;
        const _ = !0;
    }
}
control_word!(SecondaryControls: u32, "secondary processor-based VM-execution controls", 0x401E, 0);

bitflags! {
    /// Tertiary processor-based VM-execution controls (27.6.2).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct TertiaryControls: u64 {
        /// LOADIWKEY exits.
        const LOADIWKEY_EXITING = 1 << 0;
        /// Linear addresses under a prefix are translated by the hypervisor's tables.
        #[doc(alias = "HLAT")]
        const ENABLE_HLAT = 1 << 1;
        /// EPT entries may allow writes by the paging hardware only.
        const EPT_PAGING_WRITE_CONTROL = 1 << 2;
        /// EPT entries may demand that the guest paging structures be verified.
        const GUEST_PAGING_VERIFICATION = 1 << 3;
        /// Writes to the interrupt command register become posted interrupts.
        const IPI_VIRTUALIZATION = 1 << 4;
        /// In SEAM non-root operation: guest-physical addresses have the width that splits shared from
        /// private ones further up.
        const SEAM_GUEST_PHYSICAL_ADDRESS_WIDTH = 1 << 5;
        /// RDMSRLIST and WRMSRLIST do not cause #UD.
        const ENABLE_MSR_LIST = 1 << 6;
        /// IA32_SPEC_CTRL is virtualized by a mask and a shadow.
        const VIRTUALIZE_SPEC_CTRL = 1 << 7;
        /// IA32_TSC_DEADLINE is virtualized, and its expiry becomes a virtual interrupt.
        const APIC_TIMER_VIRTUALIZATION = 1 << 8;
        /// PBNDKB does not cause #UD.
        const ENABLE_PBNDKB = 1 << 9;
        /// The addresses that architectural PEBS writes to are guest-physical.
        const PEBS_USES_GUEST_PHYSICAL = 1 << 12;
        const _ = !0;
    }
}
control_word!(TertiaryControls: u64, "tertiary processor-based VM-execution controls", 0x2034, 0);

bitflags! {
    /// Primary VM-exit controls (27.7.1).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct ExitControls: u32 {
        /// DR7 and IA32_DEBUGCTL are saved.
        const SAVE_DEBUG_CONTROLS = 1 << 2;
        /// The host runs in 64-bit mode.
        const HOST_ADDRESS_SPACE_SIZE = 1 << 9;
        /// IA32_PERF_GLOBAL_CTRL is loaded.
        const LOAD_PERF_GLOBAL_CTRL = 1 << 12;
        /// The interrupt that caused the exit is acknowledged, and its vector saved.
        const ACKNOWLEDGE_INTERRUPT = 1 << 15;
        /// IA32_PAT is saved.
        const SAVE_PAT = 1 << 18;
        /// IA32_PAT is loaded.
        const LOAD_PAT = 1 << 19;
        /// IA32_EFER is saved.
        const SAVE_EFER = 1 << 20;
        /// IA32_EFER is loaded.
        const LOAD_EFER = 1 << 21;
        /// The preemption timer's value is saved.
        const SAVE_PREEMPTION_TIMER = 1 << 22;
        /// IA32_BNDCFGS is cleared.
        const CLEAR_BNDCFGS = 1 << 23;
        /// Processor trace does not show the exit.
        const CONCEAL_VMX_FROM_PT = 1 << 24;
        /// IA32_RTIT_CTL is cleared.
        const CLEAR_RTIT_CTL = 1 << 25;
        /// IA32_LBR_CTL is cleared.
        const CLEAR_LBR_CTL = 1 << 26;
        /// The user-interrupt notification vector is cleared.
        const CLEAR_UINV = 1 << 27;
        /// The CET state is loaded.
        const LOAD_CET_STATE = 1 << 28;
        /// IA32_PKRS is loaded.
        const LOAD_PKRS = 1 << 29;
        /// IA32_PERF_GLOBAL_CTRL is saved.
        const SAVE_PERF_GLOBAL_CTRL = 1 << 30;
        /// The secondary VM-exit controls count.
        const ACTIVATE_SECONDARY_CONTROLS = 1 << 31;
        const _ = !0;
    }
}
control_word!(ExitControls: u32, "primary VM-exit controls", 0x400C, 0x0003_6DFF);

bitflags! {
    /// Secondary VM-exit controls (27.7.1).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct SecondaryExitControls: u64 {
        /// The FRED MSRs are saved.
        const SAVE_FRED = 1 << 0;
        /// The FRED MSRs are loaded.
        const LOAD_FRED = 1 << 1;
        /// IA32_SPEC_CTRL is loaded.
        const LOAD_SPEC_CTRL = 1 << 2;
        /// Exits during event delivery tell of a shadow stack left busy.
        const PREMATURELY_BUSY_SHADOW_STACK = 1 << 3;
        const _ = !0;
    }
}
control_word!(SecondaryExitControls: u64, "secondary VM-exit controls", 0x2044, 0);

bitflags! {
    /// VM-entry controls (27.8.1).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct EntryControls: u32 {
        /// DR7 and IA32_DEBUGCTL are loaded.
        const LOAD_DEBUG_CONTROLS = 1 << 2;
        /// The guest runs in IA-32e mode.
        const IA32E_MODE_GUEST = 1 << 9;
        /// The processor is in SMM after the entry.
        const ENTRY_TO_SMM = 1 << 10;
        /// The default treatment of SMIs and SMM is in effect after the entry.
        const DEACTIVATE_DUAL_MONITOR = 1 << 11;
        /// IA32_PERF_GLOBAL_CTRL is loaded.
        const LOAD_PERF_GLOBAL_CTRL = 1 << 13;
        /// IA32_PAT is loaded.
        const LOAD_PAT = 1 << 14;
        /// IA32_EFER is loaded.
        const LOAD_EFER = 1 << 15;
        /// IA32_BNDCFGS is loaded.
        const LOAD_BNDCFGS = 1 << 16;
        /// Processor trace does not show the entry.
        const CONCEAL_VMX_FROM_PT = 1 << 17;
        /// IA32_RTIT_CTL is loaded.
        const LOAD_RTIT_CTL = 1 << 18;
        /// The user-interrupt notification vector is loaded.
        const LOAD_UINV = 1 << 19;
        /// The CET state is loaded.
        const LOAD_CET_STATE = 1 << 20;
        /// IA32_LBR_CTL is loaded.
        const LOAD_LBR_CTL = 1 << 21;
        /// IA32_PKRS is loaded.
        const LOAD_PKRS = 1 << 22;
        /// The FRED MSRs are loaded.
        const LOAD_FRED = 1 << 23;
        /// IA32_SPEC_CTRL is loaded.
        const LOAD_SPEC_CTRL = 1 << 24;
        /// Telemetry may stay on in SEAM non-root operation.
        const ALLOW_SEAM_GUEST_TELEMETRY = 1 << 25;
        const _ = !0;
    }
}
control_word!(EntryControls: u32, "VM-entry controls", 0x4012, 0x0000_11FF);

bitflags! {
    /// VM-function controls (27.6.14), and the functions a processor offers.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct VmFunctions: u64 {
        /// Function 0: EPTP switching.
        const EPTP_SWITCHING = 1 << 0;
        const _ = !0;
    }
}

impl fmt::Display for VmFunctions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_flags(self, f)
    }
}

bitflags! {
    /// The exception bitmap (27.6.3): a set bit makes the exception with that vector exit. Page
    /// faults exit or not by the page-fault error-code mask and match as well.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct ExceptionBitmap: u32 {
        /// #DE.
        const DIVIDE_ERROR = 1 << 0;
        /// #DB.
        const DEBUG = 1 << 1;
        /// #BP.
        const BREAKPOINT = 1 << 3;
        /// #OF.
        const OVERFLOW = 1 << 4;
        /// #BR.
        const BOUND_RANGE = 1 << 5;
        /// #UD.
        const INVALID_OPCODE = 1 << 6;
        /// #NM.
        const DEVICE_NOT_AVAILABLE = 1 << 7;
        /// #DF.
        const DOUBLE_FAULT = 1 << 8;
        /// #TS.
        const INVALID_TSS = 1 << 10;
        /// #NP.
        const SEGMENT_NOT_PRESENT = 1 << 11;
        /// #SS.
        const STACK_FAULT = 1 << 12;
        /// #GP.
        const GENERAL_PROTECTION = 1 << 13;
        /// #PF.
        const PAGE_FAULT = 1 << 14;
        /// #MF.
        const FLOATING_POINT = 1 << 16;
        /// #AC.
        const ALIGNMENT_CHECK = 1 << 17;
        /// #MC.
        const MACHINE_CHECK = 1 << 18;
        /// #XM.
        const SIMD_FLOATING_POINT = 1 << 19;
        /// #VE.
        const VIRTUALIZATION = 1 << 20;
        /// #CP.
        const CONTROL_PROTECTION = 1 << 21;
        const _ = !0;
    }
}

impl ExceptionBitmap {
    /// Whether an exception with this vector and, for a page fault, this error code exits
    /// (27.6.3 and 28.2): the fault bit is taken as it is when `error_code & mask == match`, and
    /// inverted otherwise.
    #[inline]
    pub const fn exits(self, vector: u8, error_code: u32, mask: u32, matching: u32) -> bool {
        if vector > 31 {
            return false;
        }
        let set = self.bits() & (1 << vector) != 0;
        if vector == 14 && error_code & mask != matching {
            !set
        } else {
            set
        }
    }
}

impl fmt::Display for ExceptionBitmap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_flags(self, f)
    }
}

bitflags! {
    /// Interruptibility state (27.4.2).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Interruptibility: u32 {
        /// STI has just set RFLAGS.IF.
        const BLOCKING_BY_STI = 1 << 0;
        /// MOV SS or POP SS has just been executed.
        const BLOCKING_BY_MOV_SS = 1 << 1;
        /// The processor is in SMM.
        const BLOCKING_BY_SMI = 1 << 2;
        /// NMIs (or virtual NMIs) are blocked.
        const BLOCKING_BY_NMI = 1 << 3;
        /// The exit came from inside an enclave.
        const ENCLAVE_INTERRUPTION = 1 << 4;
        const _ = !0;
    }
}

impl fmt::Display for Interruptibility {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_flags(self, f)
    }
}

/// Activity state (27.4.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ActivityState {
    /// Executing instructions.
    Active,
    /// Inactive because of HLT.
    Hlt,
    /// Inactive because of a triple fault.
    Shutdown,
    /// Inactive until a start-up IPI.
    WaitForSipi,
    /// A value that the manual does not define.
    Unknown(u32),
}

impl ActivityState {
    /// The state with this number.
    #[inline]
    pub const fn from_number(number: u32) -> Self {
        match number {
            0 => Self::Active,
            1 => Self::Hlt,
            2 => Self::Shutdown,
            3 => Self::WaitForSipi,
            other => Self::Unknown(other),
        }
    }

    /// The number, as the VMCS holds it.
    #[inline]
    pub const fn number(self) -> u32 {
        match self {
            Self::Active => 0,
            Self::Hlt => 1,
            Self::Shutdown => 2,
            Self::WaitForSipi => 3,
            Self::Unknown(number) => number,
        }
    }
}

impl fmt::Display for ActivityState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Active => f.write_str("active"),
            Self::Hlt => f.write_str("halted"),
            Self::Shutdown => f.write_str("shut down"),
            Self::WaitForSipi => f.write_str("waiting for a start-up IPI"),
            Self::Unknown(number) => write!(f, "unknown ({number})"),
        }
    }
}

bitflags! {
    /// Pending debug exceptions (27.4.2).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct PendingDebug: u64 {
        /// The breakpoint condition of DR0 was met.
        const B0 = 1 << 0;
        /// The breakpoint condition of DR1 was met.
        const B1 = 1 << 1;
        /// The breakpoint condition of DR2 was met.
        const B2 = 1 << 2;
        /// The breakpoint condition of DR3 was met.
        const B3 = 1 << 3;
        /// A bus lock was taken at CPL above 0.
        const BUS_LOCK = 1 << 11;
        /// A data or I/O breakpoint was met and enabled in DR7.
        const ENABLED_BREAKPOINT = 1 << 12;
        /// Single step.
        const BS = 1 << 14;
        /// The exception occurred inside a restricted transactional region.
        const RTM = 1 << 16;
        const _ = !0;
    }
}

impl fmt::Display for PendingDebug {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_flags(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_bits_are_never_named_controls_except_cr3_and_debug() {
        // Later processors gave meanings to default-1 bits; the manual names them: CR3 exiting,
        // and load/save of debug controls.
        let named = |all: u64, default1: u64| all & default1;
        let primary = PrimaryControls::all()
            .iter_names()
            .fold(0, |a, (_, f)| a | f.to_u64());
        assert_eq!(named(primary, PrimaryControls::DEFAULT1), 0x18000);
        let exit = ExitControls::all()
            .iter_names()
            .fold(0, |a, (_, f)| a | f.to_u64());
        assert_eq!(named(exit, ExitControls::DEFAULT1), 4);
        let entry = EntryControls::all()
            .iter_names()
            .fold(0, |a, (_, f)| a | f.to_u64());
        assert_eq!(named(entry, EntryControls::DEFAULT1), 4);
        let pin = PinControls::all()
            .iter_names()
            .fold(0, |a, (_, f)| a | f.to_u64());
        assert_eq!(named(pin, PinControls::DEFAULT1), 0);
    }

    #[test]
    fn words_read_as_names() {
        let pin = PinControls::NMI_EXITING | PinControls::from_bits_retain(0x16);
        assert_eq!(std::format!("{pin}"), "NMI_EXITING, bits 0x16");
        assert_eq!(std::format!("{}", PinControls::empty()), "none");
    }

    #[test]
    fn guest_state_reads_as_words() {
        let states = [0, 1, 2, 3, 9].map(|n| std::format!("{}", ActivityState::from_number(n)));
        assert_eq!(states[..2], ["active", "halted"]);
        assert_eq!(
            states[2..],
            ["shut down", "waiting for a start-up IPI", "unknown (9)"]
        );
        let pending = PendingDebug::BS | PendingDebug::B0;
        assert_eq!(std::format!("{pending}"), "B0, BS");
    }

    #[test]
    fn page_faults_exit_by_mask_and_match() {
        let all = ExceptionBitmap::PAGE_FAULT;
        assert!(all.exits(14, 0x5, 0, 0));
        assert!(!all.exits(14, 0x5, 0x1, 0x0));
        assert!(all.exits(14, 0x4, 0x1, 0x0));
        assert!(ExceptionBitmap::empty().exits(14, 0x5, 0x1, 0x0));
        assert!(!all.exits(13, 0, 0, 0) && !all.exits(46, 0, 0, 0));
    }
}
