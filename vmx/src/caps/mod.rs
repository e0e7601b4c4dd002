//! What a processor's VMX offers, as a plain value (SDM vol. 3D, appendix A).

use core::fmt;

use bitflags::bitflags;
use testudo_arch::Msr;

use crate::controls::{
    EntryControls, ExitControls, PinControls, PrimaryControls, SecondaryControls,
    SecondaryExitControls, TertiaryControls, VmFunctions,
};

mod allowed;
pub mod fixtures;
mod processor;

pub use allowed::{Allowed, ForcedControls, Granted, UnsupportedControls};
pub use processor::{Processor, ProcessorFeatures, RtitEncodings};

/// IA32_VMX_BASIC (appendix A.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Basic(pub u64);

impl Basic {
    /// The VMCS revision identifier.
    #[inline]
    pub const fn revision(self) -> u32 {
        self.0 as u32 & 0x7FFF_FFFF
    }

    /// The size in bytes of a VMXON or VMCS region: at most 4096.
    #[inline]
    pub const fn region_size(self) -> u32 {
        (self.0 >> 32) as u32 & 0x1FFF
    }

    /// Whether every address that VMX structures hold must be below 4 GiB.
    #[inline]
    pub const fn addresses_are_32_bit(self) -> bool {
        self.0 & (1 << 48) != 0
    }

    /// Whether SMIs and SMM may be treated by two monitors.
    #[inline]
    pub const fn dual_monitor(self) -> bool {
        self.0 & (1 << 49) != 0
    }

    /// The memory type of VMX structures: 6 for write-back, 0 for uncacheable.
    #[inline]
    pub const fn memory_type(self) -> u8 {
        (self.0 >> 50) as u8 & 0xF
    }

    /// Whether exits for INS and OUTS come with instruction information.
    #[inline]
    pub const fn string_io_information(self) -> bool {
        self.0 & (1 << 54) != 0
    }

    /// Whether the TRUE capability MSRs exist, so that default-1 controls may be 0.
    #[inline]
    pub const fn true_controls(self) -> bool {
        self.0 & (1 << 55) != 0
    }

    /// Whether a hardware exception may be injected with or without an error code, whatever its
    /// vector.
    #[inline]
    pub const fn any_error_code(self) -> bool {
        self.0 & (1 << 56) != 0
    }

    /// Whether an injected or interrupted exception tells whether it nests in another (FRED).
    #[inline]
    pub const fn nested_exceptions(self) -> bool {
        self.0 & (1 << 58) != 0
    }
}

/// IA32_VMX_MISC (appendix A.6).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Misc(pub u64);

impl Misc {
    /// The preemption timer counts down when this bit of the time-stamp counter changes.
    #[inline]
    pub const fn preemption_timer_shift(self) -> u32 {
        self.0 as u32 & 0x1F
    }

    /// Whether exits store IA32_EFER.LMA into the entry control "IA-32e mode guest".
    #[inline]
    pub const fn exits_store_lma(self) -> bool {
        self.0 & (1 << 5) != 0
    }

    /// Whether the activity state HLT is supported.
    #[inline]
    pub const fn activity_hlt(self) -> bool {
        self.0 & (1 << 6) != 0
    }

    /// Whether the activity state shutdown is supported.
    #[inline]
    pub const fn activity_shutdown(self) -> bool {
        self.0 & (1 << 7) != 0
    }

    /// Whether the activity state wait-for-SIPI is supported.
    #[inline]
    pub const fn activity_wait_for_sipi(self) -> bool {
        self.0 & (1 << 8) != 0
    }

    /// The number of CR3-target values.
    #[inline]
    pub const fn cr3_targets(self) -> u32 {
        (self.0 >> 16) as u32 & 0x1FF
    }

    /// The recommended largest number of entries of an MSR list.
    #[inline]
    pub const fn msr_list_limit(self) -> u32 {
        512 * (((self.0 >> 25) as u32 & 7) + 1)
    }

    /// Whether VMWRITE may write every field, VM-exit information included.
    #[inline]
    pub const fn vmwrite_any_field(self) -> bool {
        self.0 & (1 << 29) != 0
    }

    /// Whether software events may be injected with an instruction length of 0.
    #[inline]
    pub const fn zero_length_injection(self) -> bool {
        self.0 & (1 << 30) != 0
    }
}

bitflags! {
    /// IA32_VMX_EPT_VPID_CAP (appendix A.10).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct EptVpidCaps: u64 {
        /// Entries may allow execution without reading.
        const EXECUTE_ONLY = 1 << 0;
        /// Page walks of length 4.
        const WALK_4 = 1 << 6;
        /// Page walks of length 5.
        const WALK_5 = 1 << 7;
        /// EPT structures may be uncacheable.
        const UNCACHEABLE = 1 << 8;
        /// EPT structures may be write-back.
        const WRITE_BACK = 1 << 14;
        /// 2 MiB pages.
        const PAGE_2M = 1 << 16;
        /// 1 GiB pages.
        const PAGE_1G = 1 << 17;
        /// INVEPT.
        const INVEPT = 1 << 20;
        /// Accessed and dirty flags.
        const ACCESSED_DIRTY = 1 << 21;
        /// Exits for EPT violations tell about the guest's paging.
        const ADVANCED_EXIT_INFORMATION = 1 << 22;
        /// Entries may mark supervisor shadow-stack pages.
        const SUPERVISOR_SHADOW_STACK = 1 << 23;
        /// INVEPT of one context.
        const INVEPT_SINGLE = 1 << 25;
        /// INVEPT of all contexts.
        const INVEPT_ALL = 1 << 26;
        /// INVVPID.
        const INVVPID = 1 << 32;
        /// INVVPID of one address.
        const INVVPID_ADDRESS = 1 << 40;
        /// INVVPID of one context.
        const INVVPID_SINGLE = 1 << 41;
        /// INVVPID of all contexts.
        const INVVPID_ALL = 1 << 42;
        /// INVVPID of one context, retaining global translations.
        const INVVPID_SINGLE_RETAINING_GLOBALS = 1 << 43;
        const _ = !0;
    }
}

impl EptVpidCaps {
    /// The largest prefix size of hypervisor-managed linear-address translation.
    #[inline]
    pub const fn max_hlat_prefix(self) -> u8 {
        (self.bits() >> 48) as u8 & 0x3F
    }
}

/// The bits of a control register that VMX operation fixes (appendices A.7 and A.8).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FixedBits {
    /// Bits that must be 1.
    pub ones: u64,
    /// Bits that may be 1.
    pub may: u64,
}

impl FixedBits {
    /// The bits of `value` that are wrong, leaving out those in `except`.
    #[inline]
    pub const fn violations(self, value: u64, except: u64) -> u64 {
        ((!value & self.ones) | (value & !self.may)) & !except
    }

    /// The nearest value without violations.
    #[inline]
    pub const fn apply(self, value: u64) -> u64 {
        (value | self.ones) & self.may
    }
}

/// IA32_FEATURE_CONTROL: the lock bit.
pub const FEATURE_CONTROL_LOCKED: u64 = 1 << 0;
/// IA32_FEATURE_CONTROL: VMXON inside SMX operation.
pub const FEATURE_CONTROL_VMX_IN_SMX: u64 = 1 << 1;
/// IA32_FEATURE_CONTROL: VMXON outside SMX operation.
pub const FEATURE_CONTROL_VMX: u64 = 1 << 2;

/// Why a processor offers no VMX.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NoVmx {
    /// CPUID.1:ECX.VMX is 0.
    #[error("the processor has no VMX (CPUID.1:ECX bit 5 is 0)")]
    NotSupported,
    /// The firmware locked it away.
    #[error(
        "the firmware locked VMX off: IA32_FEATURE_CONTROL is {feature_control:#x}, locked without bit 2"
    )]
    LockedOff {
        /// The value of IA32_FEATURE_CONTROL.
        feature_control: u64,
    },
    /// A capability MSR that the others announce cannot be read.
    #[error("cannot read {0}, which the processor announces")]
    MissingMsr(Msr),
}

/// The VMX capabilities of a processor, and the facts of CPUID on which VM-entry checks depend.
///
/// A snapshot: it can be stored, compared, narrowed and used on another machine.
///
/// ```
/// use testudo_vmx::caps::fixtures;
/// use testudo_vmx::controls::SecondaryControls;
///
/// let wanted = SecondaryControls::ENABLE_EPT | SecondaryControls::ENABLE_VPID;
/// let extra = SecondaryControls::ENABLE_PML;
/// let granted = fixtures::nehalem().secondary.grant(wanted, extra)?;
/// assert_eq!(granted.controls, wanted);
/// assert_eq!(granted.refused, extra);
/// # Ok::<(), testudo_vmx::caps::UnsupportedControls<SecondaryControls>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmxCaps {
    /// IA32_VMX_BASIC.
    pub basic: Basic,
    /// Pin-based controls, by the TRUE MSR where there is one, as are the next three.
    pub pin: Allowed<PinControls>,
    /// Primary processor-based controls.
    pub primary: Allowed<PrimaryControls>,
    /// Primary VM-exit controls.
    pub exit: Allowed<ExitControls>,
    /// VM-entry controls.
    pub entry: Allowed<EntryControls>,
    /// Secondary processor-based controls.
    pub secondary: Allowed<SecondaryControls>,
    /// Tertiary processor-based controls.
    pub tertiary: Allowed<TertiaryControls>,
    /// Secondary VM-exit controls.
    pub exit2: Allowed<SecondaryExitControls>,
    /// VM functions.
    pub functions: VmFunctions,
    /// EPT and VPID.
    pub ept_vpid: EptVpidCaps,
    /// IA32_VMX_MISC.
    pub misc: Misc,
    /// Fixed bits of CR0.
    pub cr0: FixedBits,
    /// Fixed bits of CR4.
    pub cr4: FixedBits,
    /// IA32_VMX_VMCS_ENUM: the highest index of a field, in bits 9:1.
    pub vmcs_enum: u64,
    /// IA32_FEATURE_CONTROL.
    pub feature_control: u64,
    /// What else VM entries depend on.
    pub processor: Processor,
}

impl VmxCaps {
    /// Reads the capabilities through `rdmsr`, which answers `None` where RDMSR would fault, and
    /// `cpuid(leaf, subleaf)`.
    ///
    /// # Errors
    ///
    /// [`NoVmx`]: there is no VMX, it is locked off, or the MSRs contradict one another.
    pub fn read_from(
        mut rdmsr: impl FnMut(Msr) -> Option<u64>,
        cpuid: impl Fn(u32, u32) -> [u32; 4],
    ) -> Result<Self, NoVmx> {
        if cpuid(0, 0)[0] < 1 || cpuid(1, 0)[2] & (1 << 5) == 0 {
            return Err(NoVmx::NotSupported);
        }
        let mut read = |msr| rdmsr(msr).ok_or(NoVmx::MissingMsr(msr));
        let feature_control = read(Msr::FEATURE_CONTROL)?;
        let vmx_on = feature_control & FEATURE_CONTROL_VMX != 0;
        if feature_control & FEATURE_CONTROL_LOCKED != 0 && !vmx_on {
            return Err(NoVmx::LockedOff { feature_control });
        }
        let basic = Basic(read(Msr::VMX_BASIC)?);
        let choose = |plain, exact| if basic.true_controls() { exact } else { plain };
        let pin = choose(Msr::VMX_PINBASED_CTLS, Msr::VMX_TRUE_PINBASED_CTLS);
        let primary = choose(Msr::VMX_PROCBASED_CTLS, Msr::VMX_TRUE_PROCBASED_CTLS);
        let exit = choose(Msr::VMX_EXIT_CTLS, Msr::VMX_TRUE_EXIT_CTLS);
        let entry = choose(Msr::VMX_ENTRY_CTLS, Msr::VMX_TRUE_ENTRY_CTLS);
        let mut caps = Self {
            basic,
            pin: Allowed::from_msr(read(pin)?),
            primary: Allowed::from_msr(read(primary)?),
            exit: Allowed::from_msr(read(exit)?),
            entry: Allowed::from_msr(read(entry)?),
            secondary: Allowed::none(),
            tertiary: Allowed::none(),
            exit2: Allowed::none(),
            functions: VmFunctions::empty(),
            ept_vpid: EptVpidCaps::empty(),
            misc: Misc(read(Msr::VMX_MISC)?),
            cr0: FixedBits {
                ones: read(Msr::VMX_CR0_FIXED0)?,
                may: read(Msr::VMX_CR0_FIXED1)?,
            },
            cr4: FixedBits {
                ones: read(Msr::VMX_CR4_FIXED0)?,
                may: read(Msr::VMX_CR4_FIXED1)?,
            },
            vmcs_enum: read(Msr::VMX_VMCS_ENUM)?,
            feature_control,
            processor: Processor::read_from(cpuid),
        };
        let encrypts = ProcessorFeatures::TOTAL_MEMORY_ENCRYPTION;
        if caps.processor.features.contains(encrypts) {
            caps.processor = caps.processor.with_tme_activate(read(Msr::TME_ACTIVATE)?);
        }
        if caps
            .primary
            .allows(PrimaryControls::ACTIVATE_SECONDARY_CONTROLS)
        {
            caps.secondary = Allowed::from_msr(read(Msr::VMX_PROCBASED_CTLS2)?);
        }
        if caps
            .primary
            .allows(PrimaryControls::ACTIVATE_TERTIARY_CONTROLS)
        {
            caps.tertiary = Allowed::from_allowed1(read(Msr::VMX_PROCBASED_CTLS3)?);
        }
        if caps.exit.allows(ExitControls::ACTIVATE_SECONDARY_CONTROLS) {
            caps.exit2 = Allowed::from_allowed1(read(Msr::VMX_EXIT_CTLS2)?);
        }
        let ept_or_vpid = SecondaryControls::ENABLE_EPT | SecondaryControls::ENABLE_VPID;
        if caps.secondary.may_be_one().intersects(ept_or_vpid) {
            caps.ept_vpid = EptVpidCaps::from_bits_retain(read(Msr::VMX_EPT_VPID_CAP)?);
        }
        if caps
            .secondary
            .allows(SecondaryControls::ENABLE_VM_FUNCTIONS)
        {
            caps.functions = VmFunctions::from_bits_retain(read(Msr::VMX_VMFUNC)?);
        }
        Ok(caps)
    }

    /// The value of a capability MSR that has these capabilities, for a guest hypervisor to read;
    /// `None` for an MSR that such a processor does not have.
    pub fn msr(&self, msr: Msr) -> Option<u64> {
        let exact = self.basic.true_controls();
        let secondary = PrimaryControls::ACTIVATE_SECONDARY_CONTROLS;
        let tertiary = PrimaryControls::ACTIVATE_TERTIARY_CONTROLS;
        let ept_or_vpid = SecondaryControls::ENABLE_EPT | SecondaryControls::ENABLE_VPID;
        match msr {
            Msr::FEATURE_CONTROL => Some(self.feature_control),
            Msr::VMX_BASIC => Some(self.basic.0),
            Msr::VMX_PINBASED_CTLS => Some(self.pin.to_default1_msr()),
            Msr::VMX_PROCBASED_CTLS => Some(self.primary.to_default1_msr()),
            Msr::VMX_EXIT_CTLS => Some(self.exit.to_default1_msr()),
            Msr::VMX_ENTRY_CTLS => Some(self.entry.to_default1_msr()),
            Msr::VMX_MISC => Some(self.misc.0),
            Msr::VMX_CR0_FIXED0 => Some(self.cr0.ones),
            Msr::VMX_CR0_FIXED1 => Some(self.cr0.may),
            Msr::VMX_CR4_FIXED0 => Some(self.cr4.ones),
            Msr::VMX_CR4_FIXED1 => Some(self.cr4.may),
            Msr::VMX_VMCS_ENUM => Some(self.vmcs_enum),
            Msr::VMX_TRUE_PINBASED_CTLS => exact.then(|| self.pin.to_msr()),
            Msr::VMX_TRUE_PROCBASED_CTLS => exact.then(|| self.primary.to_msr()),
            Msr::VMX_TRUE_EXIT_CTLS => exact.then(|| self.exit.to_msr()),
            Msr::VMX_TRUE_ENTRY_CTLS => exact.then(|| self.entry.to_msr()),
            Msr::VMX_PROCBASED_CTLS2 => self
                .primary
                .allows(secondary)
                .then(|| self.secondary.to_msr()),
            Msr::VMX_PROCBASED_CTLS3 => self
                .primary
                .allows(tertiary)
                .then(|| self.tertiary.to_allowed1()),
            Msr::VMX_EXIT_CTLS2 => {
                let activate = ExitControls::ACTIVATE_SECONDARY_CONTROLS;
                self.exit.allows(activate).then(|| self.exit2.to_allowed1())
            }
            Msr::VMX_EPT_VPID_CAP => {
                let either = self.secondary.may_be_one().intersects(ept_or_vpid);
                either.then(|| self.ept_vpid.bits())
            }
            Msr::VMX_VMFUNC => {
                let offered = self
                    .secondary
                    .allows(SecondaryControls::ENABLE_VM_FUNCTIONS);
                offered.then(|| self.functions.bits())
            }
            _ => None,
        }
    }
}

impl fmt::Display for VmxCaps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "VMCS revision       {:#x}", self.basic.revision())?;
        writeln!(f, "region size         {} bytes", self.basic.region_size())?;
        writeln!(f, "pin-based           {}", self.pin)?;
        writeln!(f, "primary             {}", self.primary)?;
        writeln!(f, "secondary           {}", self.secondary)?;
        writeln!(f, "tertiary            {}", self.tertiary)?;
        writeln!(f, "exit                {}", self.exit)?;
        writeln!(f, "secondary exit      {}", self.exit2)?;
        writeln!(f, "entry               {}", self.entry)?;
        writeln!(f, "VM functions        {}", self.functions)?;
        write!(f, "EPT and VPID        ")?;
        crate::controls::write_flags(&self.ept_vpid, f)?;
        writeln!(f)?;
        writeln!(f, "CR3 targets         {}", self.misc.cr3_targets())?;
        write!(
            f,
            "physical addresses  {} bits",
            self.processor.physical_address_bits
        )
    }
}

#[cfg(test)]
mod tests;
