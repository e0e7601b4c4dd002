//! Every rule of the VM-entry checks, as data (SDM vol. 3C, 29.2 and 29.3), in the manual's order.

use core::fmt;

use crate::error::InstructionError;
use crate::exit::GuestStateFailure;

/// What a processor does when a rule is violated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The VM entry fails with VMfailValid and this number.
    VmFail(InstructionError),
    /// The VM entry fails as an exit with reason 33 and this qualification.
    GuestState(GuestStateFailure),
    /// The VM entry fails as an exit with reason 34; the qualification is the entry of the MSR-load
    /// area, counted from 1.
    MsrLoading {
        /// The entry, counted from 1.
        entry: u32,
    },
}

impl Outcome {
    pub(super) const CONTROL: Self = Self::VmFail(InstructionError::InvalidControlField);
    pub(super) const HOST: Self = Self::VmFail(InstructionError::InvalidHostState);
    pub(super) const GUEST: Self = Self::GuestState(GuestStateFailure::Unspecified);
    pub(super) const PDPTE: Self = Self::GuestState(GuestStateFailure::Pdptes);
    pub(super) const LINK: Self = Self::GuestState(GuestStateFailure::LinkPointer);
    pub(super) const NMI_STI: Self = Self::GuestState(GuestStateFailure::NmiBlockedBySti);
    pub(super) const MSR: Self = Self::MsrLoading { entry: 0 };
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::VmFail(error) => write!(f, "VMfailValid: {error}"),
            Self::GuestState(failure) => {
                write!(f, "exit 33, qualification {}", failure.qualification())
            }
            Self::MsrLoading { entry } => write!(f, "exit 34, qualification {entry}"),
        }
    }
}

macro_rules! rules {
    ($($section:literal, $outcome:ident {
        $($(#[doc = $doc:literal])+ $name:ident;)*
    })*) => {
        /// A rule of the VM-entry checks.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u8)]
        #[non_exhaustive]
        pub enum Rule {
            $($($(#[doc = $doc])+ $name,)*)*
        }

        impl Rule {
            /// Every rule, in the manual's order.
            pub const ALL: &[Self] = &[$($(Self::$name,)*)*];

            /// The rule's name here.
            pub const fn name(self) -> &'static str {
                match self {
                    $($(Self::$name => stringify!($name),)*)*
                }
            }

            /// What it says.
            pub const fn sentence(self) -> &'static str {
                match self {
                    $($(Self::$name => concat!($($doc),+).trim_ascii(),)*)*
                }
            }

            /// The section of SDM volume 3C.
            pub const fn section(self) -> &'static str {
                match self {
                    $($(Self::$name => $section,)*)*
                }
            }

            /// What a processor does when it is violated. For MSR loading the entry is not known
            /// from the rule alone and 0 here.
            pub const fn outcome(self) -> Outcome {
                match self {
                    $($(Self::$name => Outcome::$outcome,)*)*
                }
            }
        }
    };
}

rules! {
    "29.2.1.1", CONTROL {
        /// Pin-based controls: bits are 1 or 0 only where the processor allows it.
        PinReserved;
        /// Primary processor-based controls: bits are 1 or 0 only where the processor allows it.
        PrimaryReserved;
        /// Secondary processor-based controls, if activated: bits are 1 or 0 only where allowed.
        SecondaryReserved;
        /// Tertiary processor-based controls, if activated: bits are 1 only where allowed.
        TertiaryReserved;
        /// The CR3-target count is not greater than what IA32_VMX_MISC reports.
        Cr3TargetCount;
        /// With I/O bitmaps, both addresses are 4 KiB aligned and within the physical-address width.
        IoBitmapAddress;
        /// With MSR bitmaps, the address is 4 KiB aligned and within the physical-address width.
        MsrBitmapAddress;
        /// With a TPR shadow, the virtual-APIC address is 4 KiB aligned and within the width.
        VirtualApicAddress;
        /// With virtualized APIC accesses, the APIC-access address is 4 KiB aligned and within the
        /// width.
        ApicAccessAddress;
        /// With page-modification logging, the PML address is 4 KiB aligned and within the width.
        PmlAddress;
        /// With sub-page write permissions, the SPPTP is 4 KiB aligned and within the width.
        SppPointer;
        /// With EPTP switching, the EPTP-list address is 4 KiB aligned and within the width.
        EptpListAddress;
        /// With VMCS shadowing, both bitmap addresses are 4 KiB aligned and within the width.
        VmcsShadowBitmaps;
        /// With EPT-violation #VE, the information address is 4 KiB aligned and within the width.
        VeInformationAddress;
        /// With PASID translation, both directory addresses are 4 KiB aligned and within the width.
        PasidDirectories;
        /// With a TPR shadow but no virtual-interrupt delivery, bits 31:4 of the TPR threshold are 0.
        TprThresholdReserved;
        /// With a TPR shadow but neither virtualized APIC accesses nor virtual-interrupt delivery,
        /// the TPR threshold is not greater than the task-priority class in the virtual-APIC page.
        TprThresholdAboveVtpr;
        /// Without NMI exiting there are no virtual NMIs.
        VirtualNmisNeedNmiExiting;
        /// Without virtual NMIs there is no NMI-window exiting.
        NmiWindowNeedsVirtualNmis;
        /// Without a TPR shadow there is no x2APIC mode, register virtualization, interrupt delivery
        /// or IPI virtualization.
        ApicVirtualizationNeedsTprShadow;
        /// Virtualizing x2APIC mode excludes virtualizing APIC accesses.
        X2apicExcludesApicAccesses;
        /// Virtual-interrupt delivery needs external-interrupt exiting.
        VirtualInterruptsNeedExiting;
        /// Posted interrupts need virtual-interrupt delivery.
        PostedNeedVirtualInterrupts;
        /// Posted interrupts need exits that acknowledge interrupts.
        PostedNeedAcknowledge;
        /// With posted interrupts, bits 15:8 of the notification vector are 0.
        PostedVector;
        /// With posted interrupts, the descriptor's address is 64-byte aligned and within the width.
        PostedDescriptorAddress;
        /// With IPI virtualization, the PID-pointer table is 8-byte aligned, and its first and its last
        /// entry are within the width.
        PidPointerTable;
        /// With VPIDs, the VPID is not 0.
        VpidZero;
        /// With EPT, the memory type in the EPT pointer is one that the processor supports.
        EptpMemoryType;
        /// With EPT, the page-walk length in the EPT pointer is one that the processor supports.
        EptpWalkLength;
        /// With EPT, accessed and dirty flags are enabled only where supported.
        EptpAccessedDirty;
        /// With EPT, supervisor shadow-stack control is enabled only where supported.
        EptpShadowStack;
        /// With EPT, the reserved bits of the EPT pointer are 0, those beyond the width included.
        EptpReserved;
        /// Page-modification logging needs EPT.
        PmlNeedsEpt;
        /// Unrestricted guest needs EPT.
        UnrestrictedNeedsEpt;
        /// Mode-based execute control needs EPT.
        ModeBasedExecuteNeedsEpt;
        /// Sub-page write permissions need EPT.
        SppNeedsEpt;
        /// Processor trace can use guest-physical addresses only with EPT.
        PtNeedsEpt;
        /// PEBS can use guest-physical addresses only with EPT.
        PebsNeedsEpt;
        /// HLAT needs EPT.
        HlatNeedsEpt;
        /// EPT paging-write control needs EPT.
        PagingWriteNeedsEpt;
        /// Guest-paging verification needs EPT.
        GuestPagingVerificationNeedsEpt;
        /// In SEAM, there is EPT.
        SeamNeedsEpt;
        /// In SEAM, bits 11:0 of the shared EPT pointer and those beyond the width are 0.
        SeamSharedEptp;
        /// With VM functions, only those that the processor offers are enabled.
        VmFunctionsReserved;
        /// EPTP switching needs EPT.
        EptpSwitchingNeedsEpt;
        /// While the processor traces, IA32_RTIT_CTL is not loaded.
        RtitCtlWhileTracing;
        /// Processor trace can use guest-physical addresses only with IA32_RTIT_CTL loaded on entries and
        /// cleared on exits.
        PtNeedsRtitCtl;
        /// With TSC scaling, the TSC multiplier is not 0.
        TscMultiplierZero;
        /// With HLAT, bits 2:0, 11:5 and those beyond the width are 0 in the HLAT pointer.
        HlatPointer;
        /// APIC-timer virtualization needs virtual-interrupt delivery.
        ApicTimerNeedsVirtualInterrupts;
        /// APIC-timer virtualization excludes RDTSC exiting.
        ApicTimerExcludesRdtscExiting;
        /// With APIC-timer virtualization, bits 15:8 of the virtual timer vector are 0.
        ApicTimerVector;
    }
    "29.2.1.2", CONTROL {
        /// VM-exit controls: bits are 1 or 0 only where the processor allows it.
        ExitReserved;
        /// Secondary VM-exit controls, if activated: bits are 1 only where allowed.
        Exit2Reserved;
        /// Without the preemption timer, its value is not saved.
        SaveTimerNeedsTimer;
        /// If the VM-exit MSR-store count is not 0, the area is 16-byte aligned and within the width.
        ExitMsrStoreArea;
        /// If the VM-exit MSR-load count is not 0, the area is 16-byte aligned and within the width.
        ExitMsrLoadArea;
    }
    "29.2.1.3", CONTROL {
        /// VM-entry controls: bits are 1 or 0 only where the processor allows it.
        EntryReserved;
        /// The type of an injected event is not 1, and 7 only with a monitor trap flag or FRED.
        EventType;
        /// The vector of an injected event suits its type: 2 for NMI, at most 31 for hardware
        /// exceptions; for other events 0 with a monitor trap flag, 1 and 2 if the guest uses FRED.
        EventVector;
        /// An error code is delivered only for hardware exceptions, in protected mode, and exactly
        /// for the vectors that have one (unless IA32_VMX_BASIC bit 56 frees the choice).
        EventErrorCodeDelivery;
        /// Only an injected hardware exception is nested, and only where IA32_VMX_BASIC bit 58 says that
        /// exceptions nest.
        EventNested;
        /// Bits 30:14 and 12 of the interruption information of an injected event are 0.
        EventReserved;
        /// Bits 31:16 of a delivered error code are 0.
        EventErrorCode;
        /// The instruction length of an injected software event, SYSCALL or SYSENTER is 1 to 15, or 0
        /// where allowed.
        EventInstructionLength;
        /// If the VM-entry MSR-load count is not 0, the area is 16-byte aligned and within the width.
        EntryMsrLoadArea;
        /// Outside SMM, "entry to SMM" and "deactivate dual-monitor treatment" are 0.
        EntrySmmControls;
        /// "Entry to SMM" and "deactivate dual-monitor treatment" are not both 1.
        EntrySmmExclusive;
    }
    "29.2.2", HOST {
        /// Host CR0 has the bits that VMX operation fixes.
        HostCr0Fixed;
        /// Host CR4 has the bits that VMX operation fixes.
        HostCr4Fixed;
        /// If host CR4.CET is 1, host CR0.WP is 1.
        HostCetNeedsWp;
        /// Host CR3 is within the physical-address width.
        HostCr3Width;
        /// Host IA32_SYSENTER_ESP is canonical.
        HostSysenterEsp;
        /// Host IA32_SYSENTER_EIP is canonical.
        HostSysenterEip;
        /// If loaded, the reserved bits of host IA32_PERF_GLOBAL_CTRL are 0.
        HostPerfGlobalCtrl;
        /// If loaded, every byte of host IA32_PAT is 0, 1, 4, 5, 6 or 7.
        HostPat;
        /// If loaded, the reserved bits of host IA32_EFER are 0.
        HostEferReserved;
        /// If loaded, LMA and LME of host IA32_EFER equal "host address-space size".
        HostEferMode;
        /// If loaded, the reserved bits of host IA32_S_CET are 0, and not both SUPPRESS and TRACKER 1.
        HostSCet;
        /// If loaded, host SSP is 4-byte aligned.
        HostSsp;
        /// If loaded, bits 63:32 of host IA32_PKRS are 0.
        HostPkrs;
        /// If loaded, the addresses of the host's FRED MSRs are canonical and their reserved bits 0.
        HostFred;
        /// If loaded, the reserved bits of host IA32_SPEC_CTRL are 0.
        HostSpecCtrl;
    }
    "29.2.3", HOST {
        /// RPL and TI are 0 in every host selector.
        HostSelectorRplTi;
        /// Host CS is not 0.
        HostCsNull;
        /// Host TR is not 0.
        HostTrNull;
        /// Host SS is not 0, unless "host address-space size" is 1.
        HostSsNull;
        /// The bases of host FS, GS, GDTR, IDTR and TR are canonical.
        HostBaseCanonical;
    }
    "29.2.4", HOST {
        /// The guest or the host can be in IA-32e mode only if the processor is at the entry.
        HostLongModeFromLegacy;
        /// "Host address-space size" is 1 if the processor is in IA-32e mode at the entry.
        HostAddressSpaceFromLong;
        /// "IA-32e mode guest" is 0 if "host address-space size" is.
        LegacyHostLongGuest;
        /// With "host address-space size" 0, host CR4.PCIDE is 0.
        LegacyHostPcide;
        /// With "host address-space size" 0, host CR4.FRED is 0.
        LegacyHostFred;
        /// With "host address-space size" 0, bits 63:32 of host RIP are 0.
        LegacyHostRip;
        /// With "host address-space size" 0, bits 63:32 of host IA32_S_CET and SSP are 0, if loaded.
        LegacyHostCet;
        /// With "host address-space size" 1, host CR4.PAE is 1.
        LongHostPae;
        /// With "host address-space size" 1, host RIP is canonical.
        LongHostRip;
        /// With "host address-space size" 1, host IA32_S_CET and SSP are canonical, if loaded.
        LongHostCet;
        /// If loaded, host IA32_INTERRUPT_SSP_TABLE_ADDR is canonical.
        HostInterruptSspTable;
    }
    "29.3.1.1", GUEST {
        /// Guest CR0 has the bits that VMX operation fixes (PE and PG excepted with unrestricted
        /// guest, CD and NW always).
        GuestCr0Fixed;
        /// If guest CR0.PG is 1, CR0.PE is 1.
        GuestPagingNeedsProtection;
        /// Guest CR4 has the bits that VMX operation fixes.
        GuestCr4Fixed;
        /// If guest CR4.CET is 1, guest CR0.WP is 1.
        GuestCetNeedsWp;
        /// If loaded, the reserved bits of guest IA32_DEBUGCTL are 0.
        GuestDebugctl;
        /// If "IA-32e mode guest" is 1, guest CR0.PG and CR4.PAE are 1.
        GuestLongModeNeedsPaging;
        /// If "IA-32e mode guest" is 0, guest CR4.PCIDE is 0.
        GuestPcideNeedsLongMode;
        /// If "IA-32e mode guest" is 0, guest CR4.FRED is 0.
        GuestFredNeedsLongMode;
        /// Guest CR3 is within the physical-address width.
        GuestCr3Width;
        /// If loaded, bits 63:32 of guest DR7 are 0.
        GuestDr7;
        /// Guest IA32_SYSENTER_ESP is canonical.
        GuestSysenterEsp;
        /// Guest IA32_SYSENTER_EIP is canonical.
        GuestSysenterEip;
        /// If loaded, guest IA32_S_CET and IA32_INTERRUPT_SSP_TABLE_ADDR are canonical.
        GuestCetCanonical;
        /// If loaded, the reserved bits of guest IA32_PERF_GLOBAL_CTRL are 0.
        GuestPerfGlobalCtrl;
        /// If loaded, every byte of guest IA32_PAT is 0, 1, 4, 5, 6 or 7.
        GuestPat;
        /// If loaded, the reserved bits of guest IA32_EFER are 0.
        GuestEferReserved;
        /// If loaded, guest IA32_EFER.LMA equals "IA-32e mode guest".
        GuestEferLma;
        /// If loaded, guest IA32_EFER.LMA equals LME while CR0.PG is 1.
        GuestEferLme;
        /// If loaded, bits 11:2 of guest IA32_BNDCFGS are 0 and its address is canonical.
        GuestBndcfgs;
        /// If loaded, the reserved bits of guest IA32_RTIT_CTL are 0, and its encodings are ones that the
        /// processor supports.
        GuestRtitCtl;
        /// If loaded, the reserved bits of guest IA32_S_CET are 0, and not both SUPPRESS and TRACKER 1.
        GuestSCet;
        /// If loaded, the reserved bits of guest IA32_LBR_CTL are 0.
        GuestLbrCtl;
        /// If loaded, bits 63:32 of guest IA32_PKRS are 0.
        GuestPkrs;
        /// If loaded, bits 15:8 of guest UINV are 0.
        GuestUinv;
        /// If loaded, the addresses of the guest's FRED MSRs are canonical and their reserved bits 0.
        GuestFred;
        /// If loaded, the reserved bits of guest IA32_SPEC_CTRL are 0.
        GuestSpecCtrl;
    }
    "29.3.1.2", GUEST {
        /// The TI flag of guest TR is 0.
        TrTi;
        /// The TI flag of guest LDTR is 0, if it is usable.
        LdtrTi;
        /// Guest SS and CS have the same RPL (not in virtual-8086 mode or for unrestricted guests).
        SsRplEqualsCsRpl;
        /// In virtual-8086 mode, the base of CS, SS, DS, ES, FS and GS is 16 times the selector.
        Virtual8086Base;
        /// The bases of guest TR, FS and GS are canonical.
        SegmentBaseCanonical;
        /// The base of guest LDTR is canonical, if it is usable.
        LdtrBaseCanonical;
        /// Bits 63:32 of the base of guest CS are 0.
        CsBaseHigh;
        /// Bits 63:32 of the bases of guest SS, DS and ES are 0, if they are usable.
        DataBaseHigh;
        /// In virtual-8086 mode, the limit of CS, SS, DS, ES, FS and GS is 0xFFFF.
        Virtual8086Limit;
        /// In virtual-8086 mode, the access rights of CS, SS, DS, ES, FS and GS are 0xF3.
        Virtual8086AccessRights;
        /// The type of guest CS is 9, 11, 13 or 15, or 3 for unrestricted guests.
        CsType;
        /// The type of guest SS is 3 or 7, if it is usable.
        SsType;
        /// Guest DS, ES, FS and GS are accessed, and readable if they are code, if usable.
        DataType;
        /// S is 1 in guest CS, and in SS, DS, ES, FS and GS if they are usable.
        SegmentS;
        /// The DPL of guest CS suits its type and the DPL of SS.
        CsDpl;
        /// The DPL of guest SS is its RPL (not for unrestricted guests).
        SsDplEqualsRpl;
        /// The DPL of guest SS is 0 if CS has type 3 or CR0.PE is 0.
        SsDplZero;
        /// If the guest uses FRED, the DPL of SS is 0 or 3.
        FredSsDpl;
        /// If the guest uses FRED and the DPL of SS is 0, CS is 64-bit code.
        FredSupervisorCode;
        /// If the guest uses FRED and the DPL of SS is 3, IOPL is 0 and STI does not block.
        FredUserState;
        /// The DPL of guest DS, ES, FS and GS is not below their RPL, if usable and not conforming
        /// (not for unrestricted guests).
        DataDpl;
        /// P is 1 in guest CS, and in SS, DS, ES, FS and GS if they are usable.
        SegmentPresent;
        /// Bits 11:8 and 31:17 are 0 in the access rights of CS, and of SS, DS, ES, FS and GS if
        /// usable.
        SegmentReserved;
        /// D is 0 in guest CS if the guest is in IA-32e mode and L is 1.
        CsLongAndBig;
        /// G suits the limit in CS, and in SS, DS, ES, FS and GS if usable.
        SegmentGranularity;
        /// The type of guest TR is 11, or 3 outside IA-32e mode.
        TrType;
        /// S is 0 in guest TR.
        TrS;
        /// P is 1 in guest TR.
        TrPresent;
        /// Bits 11:8 and 31:17 of the access rights of guest TR are 0.
        TrReserved;
        /// G suits the limit in guest TR.
        TrGranularity;
        /// Guest TR is usable.
        TrUsable;
        /// The type of guest LDTR is 2, if it is usable.
        LdtrType;
        /// S is 0 in guest LDTR, if it is usable.
        LdtrS;
        /// P is 1 in guest LDTR, if it is usable.
        LdtrPresent;
        /// Bits 11:8 and 31:17 of the access rights of guest LDTR are 0, if it is usable.
        LdtrReserved;
        /// G suits the limit in guest LDTR, if it is usable.
        LdtrGranularity;
    }
    "29.3.1.3", GUEST {
        /// The bases of guest GDTR and IDTR are canonical.
        DescriptorTableBase;
        /// Bits 31:16 of the limits of guest GDTR and IDTR are 0.
        DescriptorTableLimit;
    }
    "29.3.1.4", GUEST {
        /// Bits 63:32 of guest RIP are 0, unless CS is 64-bit code in IA-32e mode.
        RipHigh;
        /// In 64-bit mode, the bits of guest RIP beyond the linear-address width are identical.
        RipCanonical;
        /// The reserved bits of guest RFLAGS are 0, and bit 1 is 1.
        RflagsReserved;
        /// Guest RFLAGS.VM is 0 in IA-32e mode and in real mode.
        RflagsVm;
        /// Guest RFLAGS.IF is 1 when an external interrupt is injected.
        RflagsIf;
        /// If loaded, guest SSP is 4-byte aligned, its bits beyond the linear-address width identical or,
        /// outside 64-bit mode, its upper half 0.
        GuestSsp;
    }
    "29.3.1.5", GUEST {
        /// The activity state is one that the processor supports.
        ActivityUnsupported;
        /// The activity state is not HLT if the DPL of guest SS is not 0.
        ActivityHltPrivilege;
        /// The activity state is active while STI or MOV SS blocks events.
        ActivityBlocked;
        /// The event to be injected is one that the activity state lets through.
        ActivityEvent;
        /// An entry to SMM does not wait for a start-up IPI.
        ActivitySmm;
        /// Bits 31:5 of the interruptibility state are 0.
        InterruptibilityReserved;
        /// STI and MOV SS do not both block.
        InterruptibilityStiAndMovSs;
        /// STI does not block while RFLAGS.IF is 0.
        InterruptibilityStiNeedsIf;
        /// Neither STI nor MOV SS blocks when an external interrupt is injected.
        InterruptibilityInterrupt;
        /// MOV SS does not block when an NMI is injected.
        InterruptibilityNmiMovSs;
    }
    "29.3.1.5", NMI_STI {
        /// STI does not block when an NMI is injected.
        InterruptibilityNmiSti;
    }
    "29.3.1.5", GUEST {
        /// Outside SMM, SMIs are not blocked.
        InterruptibilitySmi;
        /// An entry to SMM blocks SMIs.
        InterruptibilitySmmEntry;
        /// With virtual NMIs, NMIs are not blocked when an NMI is injected.
        InterruptibilityVirtualNmi;
        /// Enclave interruption needs SGX, and no blocking by MOV SS.
        InterruptibilityEnclave;
        /// The reserved bits of the pending debug exceptions are 0.
        PendingDebugReserved;
        /// Under blocking by STI or MOV SS, or in HLT, a single step is pending exactly if the guest
        /// single-steps.
        PendingDebugStep;
        /// A pending debug exception of a transactional region stands alone, with bit 12, on a
        /// processor with RTM, without blocking by MOV SS.
        PendingDebugRtm;
    }
    "29.3.1.5", LINK {
        /// The VMCS link pointer is all ones, or 4 KiB aligned and within the width.
        LinkPointerAddress;
        /// The VMCS link pointer's region has the revision, and is a shadow exactly with shadowing.
        LinkPointerRegion;
        /// Outside SMM, and on entries to it, the VMCS link pointer is not the current VMCS.
        LinkPointerIsCurrent;
        /// On entries that return from SMM, the VMCS link pointer is not the executive VMCS.
        LinkPointerIsExecutive;
    }
    "29.3.1.6", PDPTE {
        /// With PAE paging, the reserved bits of every present PDPTE are 0.
        PdpteReserved;
    }
    "29.4", MSR {
        /// Every entry of the VM-entry MSR-load area names an MSR that may be loaded there.
        MsrLoadRefused;
        /// Every value in the VM-entry MSR-load area is one that WRMSR would take at CPL 0.
        MsrValueRefused;
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (SDM vol. 3C, {})", self.sentence(), self.section())
    }
}
