//! The rules, one row each.

use core::fmt;

macro_rules! rules {
    ($($(#[$doc:meta])* $name:ident = $section:literal, $field:literal, $text:literal;)*) => {
        /// A rule that VMRUN enforces. Breaking any of them fails the entry with VMEXIT_INVALID.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u8)]
        #[non_exhaustive]
        pub enum Rule {
            $(#[doc = concat!($text, " (APM vol. 2, ", $section, ").")] $(#[$doc])* $name,)*
        }

        impl Rule {
            /// Every rule, in the manual's order.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// The section of APM vol. 2 that states it.
            pub const fn section(self) -> &'static str {
                match self { $(Self::$name => $section,)* }
            }

            /// What it demands, in a sentence.
            pub const fn text(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }

            /// The field of the VMCB that it is about.
            pub const fn field(self) -> &'static str {
                match self { $(Self::$name => $field,)* }
            }

            /// Its name, as in the source.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => stringify!($name),)* }
            }
        }
    };
}

rules! {
    EferSvme = "15.5.1", "efer", "EFER.SVME must be set";
    Cr0CacheMode = "15.5.1", "cr0", "CR0.NW must be clear if CR0.CD is";
    Cr0High = "15.5.1", "cr0", "CR0 bits 63:32 must be zero";
    /// Bits from the processor's physical-address width up. The low bits that the architecture
    /// calls reserved are not must-be-zero for VMRUN.
    Cr3Reserved = "15.5.1", "cr3", "CR3 must not exceed the physical-address width";
    Cr4Reserved = "15.5.1", "cr4", "CR4 must have no bit that the processor does not define";
    Dr6High = "15.5.1", "dr6", "DR6 bits 63:32 must be zero";
    Dr7High = "15.5.1", "dr7", "DR7 bits 63:32 must be zero";
    /// LME and LMA have their own rule, [`Rule::LongModeSupported`].
    EferReserved = "15.5.1", "efer", "EFER must have no bit that the processor does not define";
    LongModeSupported = "15.5.1", "efer", "EFER.LME and LMA need a processor with long mode";
    LongModeNeedsPae = "15.5.1", "cr4", "CR4.PAE must be set if EFER.LME and CR0.PG are";
    LongModeNeedsProtection = "15.5.1", "cr0", "CR0.PE must be set if EFER.LME and CR0.PG are";
    CodeSegmentSize = "15.5.1", "cs", "CS.L and CS.D must not both be set in long mode";
    VmrunIntercept = "15.5.1", "intercept_misc2", "the VMRUN intercept must be set";
    MsrpmAddress = "15.11", "msrpm_base_pa", "the MSR permission map must end below the physical-address limit";
    IopmAddress = "15.10.1", "iopm_base_pa", "the I/O permission map must end below the physical-address limit";
    EventType = "15.20", "event_inj", "an injected event must have a defined type";
    EventVector = "15.20", "event_inj", "an injected exception must have the vector of an exception";
    /// #BR and #OF in 64-bit mode, which has neither BOUND nor INTO.
    EventPossible = "15.20", "event_inj", "an injected exception must be possible in the guest's mode";
    AsidNotZero = "15.5.1", "asid", "the ASID must not be zero, which is the host's";
    SCetReserved = "15.5.1", "s_cet", "S_CET must have no reserved bit";
    CetNeedsWriteProtect = "15.5.1", "cr0", "CR0.WP must be set if CR4.CET is";
    ShadowStackInVirtual8086 = "15.5.1", "u_cet", "user shadow stacks and virtual-8086 mode must not meet";
    /// Only for SEV-ES guests, whose U_CET the VMCB holds.
    UCetReserved = "15.5.1", "u_cet", "U_CET must have no reserved bit";
    NestedPagingNeedsPaging = "15.25.3", "nested_control", "nested paging needs a host with paging";
    NCr3Reserved = "15.25.4", "n_cr3", "N_CR3 must not exceed the physical-address width";
    GPatTypes = "15.25.4", "g_pat", "every entry of G_PAT must be a defined memory type";
    X2AvicNeedsAvic = "15.29.4.1", "virtual_interrupts", "x2AVIC needs AVIC";
    AvicBackingPage = "15.29.4.3", "avic_backing_page", "the AVIC backing page must be below the physical-address limit";
    AvicLogicalTable = "15.29.4.3", "avic_logical_table", "the AVIC logical table must be below the physical-address limit";
    AvicPhysicalTable = "15.29.4.3", "avic_physical_table", "the AVIC physical table must be below the physical-address limit";
    AvicMaxIndex = "15.29.4.3", "avic_physical_table", "the AVIC physical table must not be longer than its mode allows";
    VnmiNeedsIntercept = "15.21.10", "intercept_misc1", "NMI virtualization needs the NMI intercept";
    /// Checked by [`check_pdpes`](super::check_pdpes), because it reads the guest's memory.
    PdpeReserved = "15.5.1", "pdpe", "the PAE page-directory pointers must have no reserved bit";
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (APM vol. 2, {})", self.text(), self.section())
    }
}
