//! Every VMCS field, one row each (SDM vol. 3D, appendix B).
//!
//! A row gives the name, the encoding, the manual's section (of volume 3C) and, after `if`, the
//! controls of which a processor must offer one for the field to exist. Typed constants, [`FIELDS`],
//! names, the layout of [`VmcsImage`](crate::image::VmcsImage) and the table-wide tests follow from
//! the row.
//!
//! ```
//! use testudo_vmx::{caps::fixtures, fields};
//!
//! let info = fields::PML_ADDRESS.encoding().info().unwrap();
//! assert_eq!((info.name, info.section), ("PML_ADDRESS", "27.6.18"));
//! assert!(info.exists(&fixtures::skylake_sp()) && !info.exists(&fixtures::haswell()));
//! ```

use crate::caps::VmxCaps;
use crate::controls::{
    EntryControls, ExitControls, PinControls, PrimaryControls, SecondaryControls,
    SecondaryExitControls, TertiaryControls, VmFunctions,
};
use crate::encoding::{Area, Encoding, Field, Natural, ReadOnly, ReadWrite};

/// A control whose existence brings fields with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feature {
    /// A pin-based control.
    Pin(PinControls),
    /// A primary processor-based control.
    Primary(PrimaryControls),
    /// A secondary processor-based control.
    Secondary(SecondaryControls),
    /// A tertiary processor-based control.
    Tertiary(TertiaryControls),
    /// A primary VM-exit control.
    Exit(ExitControls),
    /// A secondary VM-exit control.
    Exit2(SecondaryExitControls),
    /// A VM-entry control.
    Entry(EntryControls),
    /// A VM function.
    Function(VmFunctions),
}

impl Feature {
    /// Whether a processor with these capabilities allows the control to be 1.
    pub fn is_offered(self, caps: &VmxCaps) -> bool {
        match self {
            Self::Pin(bits) => caps.pin.allows(bits),
            Self::Primary(bits) => caps.primary.allows(bits),
            Self::Secondary(bits) => caps.secondary.allows(bits),
            Self::Tertiary(bits) => caps.tertiary.allows(bits),
            Self::Exit(bits) => caps.exit.allows(bits),
            Self::Exit2(bits) => caps.exit2.allows(bits),
            Self::Entry(bits) => caps.entry.allows(bits),
            Self::Function(bits) => caps.functions.contains(bits),
        }
    }
}

/// One row of the table.
#[derive(Clone, Copy, Debug)]
pub struct FieldInfo {
    /// The encoding.
    pub encoding: Encoding,
    /// The constant's name.
    pub name: &'static str,
    /// What the manual calls the field.
    pub manual_name: &'static str,
    /// The section of the SDM, volume 3C, that defines it.
    pub section: &'static str,
    /// The field exists where one of these is offered; always, if there is none.
    pub features: &'static [Feature],
}

impl FieldInfo {
    /// Whether a processor with these capabilities has the field.
    pub fn exists(&self, caps: &VmxCaps) -> bool {
        self.features.is_empty() || self.features.iter().any(|f| f.is_offered(caps))
    }
}

macro_rules! feature {
    (Pin $bit:ident) => {
        Feature::Pin(PinControls::$bit)
    };
    (Primary $bit:ident) => {
        Feature::Primary(PrimaryControls::$bit)
    };
    (Secondary $bit:ident) => {
        Feature::Secondary(SecondaryControls::$bit)
    };
    (Tertiary $bit:ident) => {
        Feature::Tertiary(TertiaryControls::$bit)
    };
    (Exit $bit:ident) => {
        Feature::Exit(ExitControls::$bit)
    };
    (Exit2 $bit:ident) => {
        Feature::Exit2(SecondaryExitControls::$bit)
    };
    (Entry $bit:ident) => {
        Feature::Entry(EntryControls::$bit)
    };
    (Function $bit:ident) => {
        Feature::Function(VmFunctions::$bit)
    };
}

macro_rules! fields {
    ($($width:ident, $area:ident, $access:ident {
        $($(#[doc = $doc:literal])+ $name:ident = $encoding:literal, $section:literal
            $(if $($class:ident $bit:ident)|+)?;)*
    })*) => {
        $($(
            $(#[doc = $doc])+
            #[doc = concat!("(SDM vol. 3C, ", $section, ").")]
            pub const $name: Field<$width, $access> =
                Field::new(Encoding($encoding), Area::$area);
        )*)*

        pub(crate) const TABLE: &[FieldInfo] = &[$($(
            FieldInfo {
                encoding: Encoding($encoding),
                name: stringify!($name),
                manual_name: concat!($($doc),+).trim_ascii(),
                section: $section,
                features: &[$($(feature!($class $bit)),+)?],
            },
        )*)*];
    };
}

fields! {
    u16, Control, ReadWrite {
        /// Virtual-processor identifier (VPID)
        VPID = 0x0000, "27.6.12" if Secondary ENABLE_VPID;
        /// Posted-interrupt notification vector
        POSTED_INTERRUPT_NOTIFICATION_VECTOR = 0x0002, "27.6.8" if Pin PROCESS_POSTED_INTERRUPTS;
        /// EPTP index
        EPTP_INDEX = 0x0004, "27.6.19" if Secondary EPT_VIOLATION_VE;
        /// HLAT prefix size
        HLAT_PREFIX_SIZE = 0x0006, "27.6.22" if Tertiary ENABLE_HLAT;
        /// Last PID-pointer index
        LAST_PID_POINTER_INDEX = 0x0008, "27.6.8" if Tertiary IPI_VIRTUALIZATION;
        /// Virtual timer vector
        VIRTUAL_TIMER_VECTOR = 0x000A, "27.6.27" if Tertiary APIC_TIMER_VIRTUALIZATION;
    }
    u16, Guest, ReadWrite {
        /// Guest ES selector
        GUEST_ES_SELECTOR = 0x0800, "27.4.1";
        /// Guest CS selector
        GUEST_CS_SELECTOR = 0x0802, "27.4.1";
        /// Guest SS selector
        GUEST_SS_SELECTOR = 0x0804, "27.4.1";
        /// Guest DS selector
        GUEST_DS_SELECTOR = 0x0806, "27.4.1";
        /// Guest FS selector
        GUEST_FS_SELECTOR = 0x0808, "27.4.1";
        /// Guest GS selector
        GUEST_GS_SELECTOR = 0x080A, "27.4.1";
        /// Guest LDTR selector
        GUEST_LDTR_SELECTOR = 0x080C, "27.4.1";
        /// Guest TR selector
        GUEST_TR_SELECTOR = 0x080E, "27.4.1";
        /// Guest interrupt status: RVI in bits 7:0, SVI in bits 15:8
        GUEST_INTERRUPT_STATUS = 0x0810, "27.4.2" if Secondary VIRTUAL_INTERRUPT_DELIVERY;
        /// PML index
        PML_INDEX = 0x0812, "27.4.2" if Secondary ENABLE_PML;
        /// Guest user-interrupt notification vector (UINV)
        GUEST_UINV = 0x0814, "27.4.1" if Exit CLEAR_UINV | Entry LOAD_UINV;
    }
    u16, Host, ReadWrite {
        /// Host ES selector
        HOST_ES_SELECTOR = 0x0C00, "27.5";
        /// Host CS selector
        HOST_CS_SELECTOR = 0x0C02, "27.5";
        /// Host SS selector
        HOST_SS_SELECTOR = 0x0C04, "27.5";
        /// Host DS selector
        HOST_DS_SELECTOR = 0x0C06, "27.5";
        /// Host FS selector
        HOST_FS_SELECTOR = 0x0C08, "27.5";
        /// Host GS selector
        HOST_GS_SELECTOR = 0x0C0A, "27.5";
        /// Host TR selector
        HOST_TR_SELECTOR = 0x0C0C, "27.5";
    }
    u64, Control, ReadWrite {
        /// Address of I/O bitmap A (ports 0x0000 to 0x7FFF)
        IO_BITMAP_A = 0x2000, "27.6.4";
        /// Address of I/O bitmap B (ports 0x8000 to 0xFFFF)
        IO_BITMAP_B = 0x2002, "27.6.4";
        /// Address of MSR bitmaps
        MSR_BITMAPS = 0x2004, "27.6.9" if Primary USE_MSR_BITMAPS;
        /// VM-exit MSR-store address
        EXIT_MSR_STORE_ADDRESS = 0x2006, "27.7.2";
        /// VM-exit MSR-load address
        EXIT_MSR_LOAD_ADDRESS = 0x2008, "27.7.2";
        /// VM-entry MSR-load address
        ENTRY_MSR_LOAD_ADDRESS = 0x200A, "27.8.2";
        /// Executive-VMCS pointer
        EXECUTIVE_VMCS_POINTER = 0x200C, "27.6.10";
        /// PML address
        PML_ADDRESS = 0x200E, "27.6.18" if Secondary ENABLE_PML;
        /// TSC offset
        TSC_OFFSET = 0x2010, "27.6.5";
        /// Virtual-APIC address
        VIRTUAL_APIC_ADDRESS = 0x2012, "27.6.8" if Primary USE_TPR_SHADOW;
        /// APIC-access address
        APIC_ACCESS_ADDRESS = 0x2014, "27.6.8" if Secondary VIRTUALIZE_APIC_ACCESSES;
        /// Posted-interrupt descriptor address
        POSTED_INTERRUPT_DESCRIPTOR_ADDRESS = 0x2016, "27.6.8" if Pin PROCESS_POSTED_INTERRUPTS;
        /// VM-function controls
        VM_FUNCTION_CONTROLS = 0x2018, "27.6.14" if Secondary ENABLE_VM_FUNCTIONS;
        /// EPT pointer (EPTP)
        EPT_POINTER = 0x201A, "27.6.11" if Secondary ENABLE_EPT;
        /// EOI-exit bitmap 0 (vectors 0 to 63)
        EOI_EXIT_BITMAP_0 = 0x201C, "27.6.8" if Secondary VIRTUAL_INTERRUPT_DELIVERY;
        /// EOI-exit bitmap 1 (vectors 64 to 127)
        EOI_EXIT_BITMAP_1 = 0x201E, "27.6.8" if Secondary VIRTUAL_INTERRUPT_DELIVERY;
        /// EOI-exit bitmap 2 (vectors 128 to 191)
        EOI_EXIT_BITMAP_2 = 0x2020, "27.6.8" if Secondary VIRTUAL_INTERRUPT_DELIVERY;
        /// EOI-exit bitmap 3 (vectors 192 to 255)
        EOI_EXIT_BITMAP_3 = 0x2022, "27.6.8" if Secondary VIRTUAL_INTERRUPT_DELIVERY;
        /// EPTP-list address
        EPTP_LIST_ADDRESS = 0x2024, "27.6.14" if Function EPTP_SWITCHING;
        /// VMREAD-bitmap address
        VMREAD_BITMAP_ADDRESS = 0x2026, "27.6.15" if Secondary VMCS_SHADOWING;
        /// VMWRITE-bitmap address
        VMWRITE_BITMAP_ADDRESS = 0x2028, "27.6.15" if Secondary VMCS_SHADOWING;
        /// Virtualization-exception information address
        VE_INFORMATION_ADDRESS = 0x202A, "27.6.19" if Secondary EPT_VIOLATION_VE;
        /// XSS-exiting bitmap
        XSS_EXITING_BITMAP = 0x202C, "27.6.20" if Secondary ENABLE_XSAVES_XRSTORS;
        /// ENCLS-exiting bitmap
        ENCLS_EXITING_BITMAP = 0x202E, "27.6.16" if Secondary ENABLE_ENCLS_EXITING;
        /// Sub-page-permission-table pointer (SPPTP)
        SPP_TABLE_POINTER = 0x2030, "27.6.21" if Secondary SUB_PAGE_WRITE_PERMISSIONS;
        /// TSC multiplier
        TSC_MULTIPLIER = 0x2032, "27.6.5" if Secondary USE_TSC_SCALING;
        /// Tertiary processor-based VM-execution controls
        TERTIARY_CONTROLS = 0x2034, "27.6.2" if Primary ACTIVATE_TERTIARY_CONTROLS;
        /// ENCLV-exiting bitmap
        ENCLV_EXITING_BITMAP = 0x2036, "27.6.16" if Secondary ENABLE_ENCLV_EXITING;
        /// Low PASID directory address
        LOW_PASID_DIRECTORY = 0x2038, "27.6.23" if Secondary PASID_TRANSLATION;
        /// High PASID directory address
        HIGH_PASID_DIRECTORY = 0x203A, "27.6.23" if Secondary PASID_TRANSLATION;
        /// SEAM shared EPT pointer, of trust domains
        SHARED_EPT_POINTER = 0x203C, "27.6.26" if Tertiary SEAM_GUEST_PHYSICAL_ADDRESS_WIDTH;
        /// PCONFIG-exiting bitmap
        PCONFIG_EXITING_BITMAP = 0x203E, "27.6.17" if Secondary ENABLE_PCONFIG;
        /// Hypervisor-managed linear-address translation pointer (HLATP)
        HLAT_POINTER = 0x2040, "27.6.22" if Tertiary ENABLE_HLAT;
        /// PID-pointer table address
        PID_POINTER_TABLE_ADDRESS = 0x2042, "27.6.8" if Tertiary IPI_VIRTUALIZATION;
        /// Secondary VM-exit controls
        SECONDARY_EXIT_CONTROLS = 0x2044, "27.7.1" if Exit ACTIVATE_SECONDARY_CONTROLS;
        /// IA32_SPEC_CTRL mask
        SPEC_CTRL_MASK = 0x204A, "27.6.25" if Tertiary VIRTUALIZE_SPEC_CTRL;
        /// IA32_SPEC_CTRL shadow
        SPEC_CTRL_SHADOW = 0x204C, "27.6.25" if Tertiary VIRTUALIZE_SPEC_CTRL;
        /// Guest deadline shadow: the deadline as the guest's view of the time-stamp counter has it
        GUEST_DEADLINE_SHADOW = 0x204E, "27.6.27" if Tertiary APIC_TIMER_VIRTUALIZATION;
        /// Injected-event data
        INJECTED_EVENT_DATA = 0x2052, "27.8.3" if Entry LOAD_FRED;
    }
    u64, ExitInformation, ReadOnly {
        /// Guest-physical address
        GUEST_PHYSICAL_ADDRESS = 0x2400, "27.9.1" if Secondary ENABLE_EPT;
        /// MSR data: what a WRMSRLIST that exited would have written
        MSR_DATA = 0x2402, "27.9.4" if Tertiary ENABLE_MSR_LIST;
        /// Original-event data
        ORIGINAL_EVENT_DATA = 0x2404, "27.9.3" if Entry LOAD_FRED;
    }
    u64, Guest, ReadWrite {
        /// VMCS link pointer
        VMCS_LINK_POINTER = 0x2800, "27.4.2";
        /// Guest IA32_DEBUGCTL
        GUEST_DEBUGCTL = 0x2802, "27.4.1";
        /// Guest IA32_PAT
        GUEST_PAT = 0x2804, "27.4.1" if Entry LOAD_PAT | Exit SAVE_PAT;
        /// Guest IA32_EFER
        GUEST_EFER = 0x2806, "27.4.1" if Entry LOAD_EFER | Exit SAVE_EFER;
        /// Guest IA32_PERF_GLOBAL_CTRL
        GUEST_PERF_GLOBAL_CTRL = 0x2808, "27.4.1" if Entry LOAD_PERF_GLOBAL_CTRL | Exit SAVE_PERF_GLOBAL_CTRL;
        /// Guest PDPTE0
        GUEST_PDPTE0 = 0x280A, "27.4.2" if Secondary ENABLE_EPT;
        /// Guest PDPTE1
        GUEST_PDPTE1 = 0x280C, "27.4.2" if Secondary ENABLE_EPT;
        /// Guest PDPTE2
        GUEST_PDPTE2 = 0x280E, "27.4.2" if Secondary ENABLE_EPT;
        /// Guest PDPTE3
        GUEST_PDPTE3 = 0x2810, "27.4.2" if Secondary ENABLE_EPT;
        /// Guest IA32_BNDCFGS
        GUEST_BNDCFGS = 0x2812, "27.4.1" if Entry LOAD_BNDCFGS | Exit CLEAR_BNDCFGS;
        /// Guest IA32_RTIT_CTL
        GUEST_RTIT_CTL = 0x2814, "27.4.1" if Entry LOAD_RTIT_CTL | Exit CLEAR_RTIT_CTL;
        /// Guest IA32_LBR_CTL
        GUEST_LBR_CTL = 0x2816, "27.4.1" if Entry LOAD_LBR_CTL | Exit CLEAR_LBR_CTL;
        /// Guest IA32_PKRS
        GUEST_PKRS = 0x2818, "27.4.1" if Entry LOAD_PKRS;
        /// Guest IA32_FRED_CONFIG
        GUEST_FRED_CONFIG = 0x281A, "27.4.1" if Entry LOAD_FRED | Exit2 SAVE_FRED;
        /// Guest IA32_FRED_RSP1
        GUEST_FRED_RSP1 = 0x281C, "27.4.1" if Entry LOAD_FRED | Exit2 SAVE_FRED;
        /// Guest IA32_FRED_RSP2
        GUEST_FRED_RSP2 = 0x281E, "27.4.1" if Entry LOAD_FRED | Exit2 SAVE_FRED;
        /// Guest IA32_FRED_RSP3
        GUEST_FRED_RSP3 = 0x2820, "27.4.1" if Entry LOAD_FRED | Exit2 SAVE_FRED;
        /// Guest IA32_FRED_STKLVLS
        GUEST_FRED_STKLVLS = 0x2822, "27.4.1" if Entry LOAD_FRED | Exit2 SAVE_FRED;
        /// Guest IA32_FRED_SSP1
        GUEST_FRED_SSP1 = 0x2824, "27.4.1" if Entry LOAD_FRED | Exit2 SAVE_FRED;
        /// Guest IA32_FRED_SSP2
        GUEST_FRED_SSP2 = 0x2826, "27.4.1" if Entry LOAD_FRED | Exit2 SAVE_FRED;
        /// Guest IA32_FRED_SSP3
        GUEST_FRED_SSP3 = 0x2828, "27.4.1" if Entry LOAD_FRED | Exit2 SAVE_FRED;
        /// Guest IA32_SPEC_CTRL
        GUEST_SPEC_CTRL = 0x282E, "27.4.1" if Entry LOAD_SPEC_CTRL;
        /// Guest deadline: when the guest's timer fires, in ticks of the time-stamp counter
        GUEST_DEADLINE = 0x2830, "27.4.2" if Tertiary APIC_TIMER_VIRTUALIZATION;
    }
    u64, Host, ReadWrite {
        /// Host IA32_PAT
        HOST_PAT = 0x2C00, "27.5" if Exit LOAD_PAT;
        /// Host IA32_EFER
        HOST_EFER = 0x2C02, "27.5" if Exit LOAD_EFER;
        /// Host IA32_PERF_GLOBAL_CTRL
        HOST_PERF_GLOBAL_CTRL = 0x2C04, "27.5" if Exit LOAD_PERF_GLOBAL_CTRL;
        /// Host IA32_PKRS
        HOST_PKRS = 0x2C06, "27.5" if Exit LOAD_PKRS;
        /// Host IA32_FRED_CONFIG
        HOST_FRED_CONFIG = 0x2C08, "27.5" if Exit2 LOAD_FRED;
        /// Host IA32_FRED_RSP1
        HOST_FRED_RSP1 = 0x2C0A, "27.5" if Exit2 LOAD_FRED;
        /// Host IA32_FRED_RSP2
        HOST_FRED_RSP2 = 0x2C0C, "27.5" if Exit2 LOAD_FRED;
        /// Host IA32_FRED_RSP3
        HOST_FRED_RSP3 = 0x2C0E, "27.5" if Exit2 LOAD_FRED;
        /// Host IA32_FRED_STKLVLS
        HOST_FRED_STKLVLS = 0x2C10, "27.5" if Exit2 LOAD_FRED;
        /// Host IA32_FRED_SSP1
        HOST_FRED_SSP1 = 0x2C12, "27.5" if Exit2 LOAD_FRED;
        /// Host IA32_FRED_SSP2
        HOST_FRED_SSP2 = 0x2C14, "27.5" if Exit2 LOAD_FRED;
        /// Host IA32_FRED_SSP3
        HOST_FRED_SSP3 = 0x2C16, "27.5" if Exit2 LOAD_FRED;
        /// Host IA32_SPEC_CTRL
        HOST_SPEC_CTRL = 0x2C1A, "27.5" if Exit2 LOAD_SPEC_CTRL;
    }
    u32, Control, ReadWrite {
        /// Pin-based VM-execution controls
        PIN_CONTROLS = 0x4000, "27.6.1";
        /// Primary processor-based VM-execution controls
        PRIMARY_CONTROLS = 0x4002, "27.6.2";
        /// Exception bitmap
        EXCEPTION_BITMAP = 0x4004, "27.6.3";
        /// Page-fault error-code mask
        PAGE_FAULT_ERROR_CODE_MASK = 0x4006, "27.6.3";
        /// Page-fault error-code match
        PAGE_FAULT_ERROR_CODE_MATCH = 0x4008, "27.6.3";
        /// CR3-target count
        CR3_TARGET_COUNT = 0x400A, "27.6.7";
        /// Primary VM-exit controls
        EXIT_CONTROLS = 0x400C, "27.7.1";
        /// VM-exit MSR-store count
        EXIT_MSR_STORE_COUNT = 0x400E, "27.7.2";
        /// VM-exit MSR-load count
        EXIT_MSR_LOAD_COUNT = 0x4010, "27.7.2";
        /// VM-entry controls
        ENTRY_CONTROLS = 0x4012, "27.8.1";
        /// VM-entry MSR-load count
        ENTRY_MSR_LOAD_COUNT = 0x4014, "27.8.2";
        /// VM-entry interruption-information field (injected-event identification)
        ENTRY_INTERRUPTION_INFORMATION = 0x4016, "27.8.3";
        /// VM-entry exception error code (injected-event error code)
        ENTRY_EXCEPTION_ERROR_CODE = 0x4018, "27.8.3";
        /// VM-entry instruction length
        ENTRY_INSTRUCTION_LENGTH = 0x401A, "27.8.3";
        /// TPR threshold
        TPR_THRESHOLD = 0x401C, "27.6.8" if Primary USE_TPR_SHADOW;
        /// Secondary processor-based VM-execution controls
        SECONDARY_CONTROLS = 0x401E, "27.6.2" if Primary ACTIVATE_SECONDARY_CONTROLS;
        /// PLE_Gap: the longest time between two PAUSEs of one loop, in TSC ticks
        PLE_GAP = 0x4020, "27.6.13" if Secondary PAUSE_LOOP_EXITING;
        /// PLE_Window: how long a PAUSE loop may last, in TSC ticks
        PLE_WINDOW = 0x4022, "27.6.13" if Secondary PAUSE_LOOP_EXITING;
        /// Instruction-timeout control (notify window)
        INSTRUCTION_TIMEOUT_CONTROL = 0x4024, "27.6.24" if Secondary INSTRUCTION_TIMEOUT;
        /// SEAM-guest KeyID, of trust domains
        SEAM_KEY_ID = 0x4026, "27.6.26" if Tertiary SEAM_GUEST_PHYSICAL_ADDRESS_WIDTH;
    }
    u32, ExitInformation, ReadOnly {
        /// VM-instruction error
        VM_INSTRUCTION_ERROR = 0x4400, "27.9.5";
        /// Exit reason
        EXIT_REASON = 0x4402, "27.9.1";
        /// VM-exit interruption information (exiting-event identification)
        EXIT_INTERRUPTION_INFORMATION = 0x4404, "27.9.2";
        /// VM-exit interruption error code (exiting-event error code)
        EXIT_INTERRUPTION_ERROR_CODE = 0x4406, "27.9.2";
        /// IDT-vectoring information field (original-event identification)
        IDT_VECTORING_INFORMATION = 0x4408, "27.9.3";
        /// IDT-vectoring error code (original-event error code)
        IDT_VECTORING_ERROR_CODE = 0x440A, "27.9.3";
        /// VM-exit instruction length
        EXIT_INSTRUCTION_LENGTH = 0x440C, "27.9.4";
        /// VM-exit instruction information
        EXIT_INSTRUCTION_INFORMATION = 0x440E, "27.9.4";
    }
    u32, Guest, ReadWrite {
        /// Guest ES limit
        GUEST_ES_LIMIT = 0x4800, "27.4.1";
        /// Guest CS limit
        GUEST_CS_LIMIT = 0x4802, "27.4.1";
        /// Guest SS limit
        GUEST_SS_LIMIT = 0x4804, "27.4.1";
        /// Guest DS limit
        GUEST_DS_LIMIT = 0x4806, "27.4.1";
        /// Guest FS limit
        GUEST_FS_LIMIT = 0x4808, "27.4.1";
        /// Guest GS limit
        GUEST_GS_LIMIT = 0x480A, "27.4.1";
        /// Guest LDTR limit
        GUEST_LDTR_LIMIT = 0x480C, "27.4.1";
        /// Guest TR limit
        GUEST_TR_LIMIT = 0x480E, "27.4.1";
        /// Guest GDTR limit
        GUEST_GDTR_LIMIT = 0x4810, "27.4.1";
        /// Guest IDTR limit
        GUEST_IDTR_LIMIT = 0x4812, "27.4.1";
        /// Guest ES access rights
        GUEST_ES_ACCESS_RIGHTS = 0x4814, "27.4.1";
        /// Guest CS access rights
        GUEST_CS_ACCESS_RIGHTS = 0x4816, "27.4.1";
        /// Guest SS access rights
        GUEST_SS_ACCESS_RIGHTS = 0x4818, "27.4.1";
        /// Guest DS access rights
        GUEST_DS_ACCESS_RIGHTS = 0x481A, "27.4.1";
        /// Guest FS access rights
        GUEST_FS_ACCESS_RIGHTS = 0x481C, "27.4.1";
        /// Guest GS access rights
        GUEST_GS_ACCESS_RIGHTS = 0x481E, "27.4.1";
        /// Guest LDTR access rights
        GUEST_LDTR_ACCESS_RIGHTS = 0x4820, "27.4.1";
        /// Guest TR access rights
        GUEST_TR_ACCESS_RIGHTS = 0x4822, "27.4.1";
        /// Guest interruptibility state
        GUEST_INTERRUPTIBILITY = 0x4824, "27.4.2";
        /// Guest activity state
        GUEST_ACTIVITY_STATE = 0x4826, "27.4.2";
        /// Guest SMBASE
        GUEST_SMBASE = 0x4828, "27.4.1";
        /// Guest IA32_SYSENTER_CS
        GUEST_SYSENTER_CS = 0x482A, "27.4.1";
        /// VMX-preemption timer value
        PREEMPTION_TIMER_VALUE = 0x482E, "27.4.2" if Pin ACTIVATE_PREEMPTION_TIMER;
    }
    u32, Host, ReadWrite {
        /// Host IA32_SYSENTER_CS
        HOST_SYSENTER_CS = 0x4C00, "27.5";
    }
    Natural, Control, ReadWrite {
        /// CR0 guest/host mask
        CR0_GUEST_HOST_MASK = 0x6000, "27.6.6";
        /// CR4 guest/host mask
        CR4_GUEST_HOST_MASK = 0x6002, "27.6.6";
        /// CR0 read shadow
        CR0_READ_SHADOW = 0x6004, "27.6.6";
        /// CR4 read shadow
        CR4_READ_SHADOW = 0x6006, "27.6.6";
        /// CR3-target value 0
        CR3_TARGET_VALUE_0 = 0x6008, "27.6.7";
        /// CR3-target value 1
        CR3_TARGET_VALUE_1 = 0x600A, "27.6.7";
        /// CR3-target value 2
        CR3_TARGET_VALUE_2 = 0x600C, "27.6.7";
        /// CR3-target value 3
        CR3_TARGET_VALUE_3 = 0x600E, "27.6.7";
    }
    Natural, ExitInformation, ReadOnly {
        /// Exit qualification
        EXIT_QUALIFICATION = 0x6400, "27.9.1";
        /// I/O RCX, of exits from SMM
        IO_RCX = 0x6402, "27.9.4";
        /// I/O RSI, of exits from SMM
        IO_RSI = 0x6404, "27.9.4";
        /// I/O RDI, of exits from SMM
        IO_RDI = 0x6406, "27.9.4";
        /// I/O RIP, of exits from SMM
        IO_RIP = 0x6408, "27.9.4";
        /// Guest-linear address
        GUEST_LINEAR_ADDRESS = 0x640A, "27.9.1";
    }
    Natural, Guest, ReadWrite {
        /// Guest CR0
        GUEST_CR0 = 0x6800, "27.4.1";
        /// Guest CR3
        GUEST_CR3 = 0x6802, "27.4.1";
        /// Guest CR4
        GUEST_CR4 = 0x6804, "27.4.1";
        /// Guest ES base
        GUEST_ES_BASE = 0x6806, "27.4.1";
        /// Guest CS base
        GUEST_CS_BASE = 0x6808, "27.4.1";
        /// Guest SS base
        GUEST_SS_BASE = 0x680A, "27.4.1";
        /// Guest DS base
        GUEST_DS_BASE = 0x680C, "27.4.1";
        /// Guest FS base
        GUEST_FS_BASE = 0x680E, "27.4.1";
        /// Guest GS base
        GUEST_GS_BASE = 0x6810, "27.4.1";
        /// Guest LDTR base
        GUEST_LDTR_BASE = 0x6812, "27.4.1";
        /// Guest TR base
        GUEST_TR_BASE = 0x6814, "27.4.1";
        /// Guest GDTR base
        GUEST_GDTR_BASE = 0x6816, "27.4.1";
        /// Guest IDTR base
        GUEST_IDTR_BASE = 0x6818, "27.4.1";
        /// Guest DR7
        GUEST_DR7 = 0x681A, "27.4.1";
        /// Guest RSP
        GUEST_RSP = 0x681C, "27.4.1";
        /// Guest RIP
        GUEST_RIP = 0x681E, "27.4.1";
        /// Guest RFLAGS
        GUEST_RFLAGS = 0x6820, "27.4.1";
        /// Guest pending debug exceptions
        GUEST_PENDING_DEBUG = 0x6822, "27.4.2";
        /// Guest IA32_SYSENTER_ESP
        GUEST_SYSENTER_ESP = 0x6824, "27.4.1";
        /// Guest IA32_SYSENTER_EIP
        GUEST_SYSENTER_EIP = 0x6826, "27.4.1";
        /// Guest IA32_S_CET
        GUEST_S_CET = 0x6828, "27.4.1" if Entry LOAD_CET_STATE;
        /// Guest SSP
        GUEST_SSP = 0x682A, "27.4.1" if Entry LOAD_CET_STATE;
        /// Guest IA32_INTERRUPT_SSP_TABLE_ADDR
        GUEST_INTERRUPT_SSP_TABLE = 0x682C, "27.4.1" if Entry LOAD_CET_STATE;
    }
    Natural, Host, ReadWrite {
        /// Host CR0
        HOST_CR0 = 0x6C00, "27.5";
        /// Host CR3
        HOST_CR3 = 0x6C02, "27.5";
        /// Host CR4
        HOST_CR4 = 0x6C04, "27.5";
        /// Host FS base
        HOST_FS_BASE = 0x6C06, "27.5";
        /// Host GS base
        HOST_GS_BASE = 0x6C08, "27.5";
        /// Host TR base
        HOST_TR_BASE = 0x6C0A, "27.5";
        /// Host GDTR base
        HOST_GDTR_BASE = 0x6C0C, "27.5";
        /// Host IDTR base
        HOST_IDTR_BASE = 0x6C0E, "27.5";
        /// Host IA32_SYSENTER_ESP
        HOST_SYSENTER_ESP = 0x6C10, "27.5";
        /// Host IA32_SYSENTER_EIP
        HOST_SYSENTER_EIP = 0x6C12, "27.5";
        /// Host RSP
        HOST_RSP = 0x6C14, "27.5";
        /// Host RIP
        HOST_RIP = 0x6C16, "27.5";
        /// Host IA32_S_CET
        HOST_S_CET = 0x6C18, "27.5" if Exit LOAD_CET_STATE;
        /// Host SSP
        HOST_SSP = 0x6C1A, "27.5" if Exit LOAD_CET_STATE;
        /// Host IA32_INTERRUPT_SSP_TABLE_ADDR
        HOST_INTERRUPT_SSP_TABLE = 0x6C1C, "27.5" if Exit LOAD_CET_STATE;
    }
}

/// Every field of the table by ascending encoding.
pub static FIELDS: &[FieldInfo] = TABLE;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::caps::fixtures;

    #[test]
    fn the_table_is_sorted_and_found() {
        assert!(FIELDS.windows(2).all(|w| w[0].encoding < w[1].encoding));
        for info in FIELDS {
            assert!(info.encoding.is_well_formed() && !info.encoding.is_high());
            assert_eq!(info.encoding.info().unwrap().name, info.name);
            assert!(!info.manual_name.is_empty() && info.section.starts_with("27."));
        }
        assert!(Encoding(0x2046).info().is_none());
    }

    #[test]
    fn names_are_unique() {
        let mut names: std::vec::Vec<_> = FIELDS.iter().map(|f| f.name).collect();
        names.sort_unstable();
        assert!(names.windows(2).all(|w| w[0] != w[1]));
    }

    #[test]
    fn areas_and_names_agree() {
        for info in FIELDS {
            match info.encoding.area() {
                Area::Host => assert!(info.name.starts_with("HOST_")),
                area => assert!(!info.name.starts_with("HOST_"), "{} in {area:?}", info.name),
            }
        }
    }

    #[test]
    fn generations_have_their_fields() {
        let old = fixtures::nehalem();
        let new = fixtures::sapphire_rapids();
        let exists = |field: Encoding, caps: &VmxCaps| field.info().unwrap().exists(caps);
        assert!(exists(EPT_POINTER.encoding(), &old));
        assert!(!exists(PML_ADDRESS.encoding(), &old));
        assert!(exists(PML_ADDRESS.encoding(), &new));
        assert!(exists(GUEST_PKRS.encoding(), &new) && !exists(GUEST_PKRS.encoding(), &old));
        assert!(!exists(SHARED_EPT_POINTER.encoding(), &new));
        assert!(exists(HOST_RIP.encoding(), &old));
    }
}
