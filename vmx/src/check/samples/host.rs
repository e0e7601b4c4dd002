//! The samples for rules of host state.

use super::*;

impl<V: VmcsWrite> Editor<'_, V> {
    pub(super) fn involve_host(&mut self, rule: Rule) -> Edit {
        let e = self;
        match rule {
            Rule::HostPerfGlobalCtrl => exit!(e, LOAD_PERF_GLOBAL_CTRL),
            Rule::HostPat => {
                exit!(e, LOAD_PAT);
                return e.set(fields::HOST_PAT, GOOD_PAT);
            }
            Rule::HostEferReserved | Rule::HostEferMode => exit!(e, LOAD_EFER),
            Rule::HostSCet | Rule::HostSsp | Rule::LongHostCet | Rule::HostInterruptSspTable => {
                exit!(e, LOAD_CET_STATE);
            }
            Rule::HostPkrs => exit!(e, LOAD_PKRS),
            Rule::HostFred => exit2!(e, LOAD_FRED),
            Rule::HostSpecCtrl => exit2!(e, LOAD_SPEC_CTRL),
            Rule::HostSsNull
            | Rule::HostLongModeFromLegacy
            | Rule::LegacyHostLongGuest
            | Rule::LegacyHostPcide
            | Rule::LegacyHostFred
            | Rule::LegacyHostRip => e.legacy_host()?,
            Rule::LegacyHostCet => {
                e.legacy_host()?;
                exit!(e, LOAD_CET_STATE);
            }
            // The others are about every VMCS.
            _ => {}
        }
        Ok(Some(()))
    }

    pub(super) fn violate_host(&mut self, rule: Rule) -> Edit {
        let e = self;
        match rule {
            Rule::HostCr0Fixed => return e.flip_natural(fields::HOST_CR0, 1 << 5),
            Rule::HostCr4Fixed => return e.flip_natural(fields::HOST_CR4, 1 << 13),
            Rule::HostCetNeedsWp => {
                wants!(e.caps.cr4.may & CR4_CET != 0);
                let cr0 = e.vmcs.get(fields::HOST_CR0)?;
                e.vmcs.set(fields::HOST_CR0, cr0 & !(1 << 16))?;
                let cr4 = e.vmcs.get(fields::HOST_CR4)?;
                return e.set_natural(fields::HOST_CR4, cr4 | CR4_CET);
            }
            Rule::HostCr3Width => {
                return e.flip_natural(fields::HOST_CR3, e.beyond_physical());
            }
            Rule::HostSysenterEsp => {
                return e.set_natural(fields::HOST_SYSENTER_ESP, NOT_CANONICAL);
            }
            Rule::HostSysenterEip => {
                return e.set_natural(fields::HOST_SYSENTER_EIP, NOT_CANONICAL);
            }
            Rule::HostPerfGlobalCtrl => return e.set(fields::HOST_PERF_GLOBAL_CTRL, 1 << 63),
            Rule::HostPat => return e.set(fields::HOST_PAT, BAD_PAT),
            Rule::HostEferReserved => {
                let old = e.vmcs.get(fields::HOST_EFER)?;
                return e.set(fields::HOST_EFER, old | 1 << 1);
            }
            Rule::HostEferMode => {
                let old = e.vmcs.get(fields::HOST_EFER)?;
                return e.set(fields::HOST_EFER, old & !EFER_LME);
            }
            Rule::HostSCet => return e.set_natural(fields::HOST_S_CET, 1 << 6),
            Rule::HostSsp => return e.set_natural(fields::HOST_SSP, 1),
            Rule::HostPkrs => return e.set(fields::HOST_PKRS, 1 << 32),
            Rule::HostFred => return e.set(fields::HOST_FRED_RSP2, 1 << 5),
            Rule::HostSpecCtrl => return e.set(fields::HOST_SPEC_CTRL, 1 << 63),
            Rule::HostSelectorRplTi => {
                let old = e.vmcs.get(fields::HOST_DS_SELECTOR)?;
                return e.set16(fields::HOST_DS_SELECTOR, old | 1);
            }
            Rule::HostCsNull => return e.set16(fields::HOST_CS_SELECTOR, 0),
            Rule::HostTrNull => return e.set16(fields::HOST_TR_SELECTOR, 0),
            Rule::HostSsNull => return e.set16(fields::HOST_SS_SELECTOR, 0),
            Rule::HostBaseCanonical => {
                return e.set_natural(fields::HOST_GS_BASE, NOT_CANONICAL);
            }
            Rule::HostLongModeFromLegacy => {
                exit!(e, HOST_ADDRESS_SPACE_SIZE);
                if e.caps.exit.allows(ExitControls::LOAD_EFER) {
                    e.vmcs.set(fields::HOST_EFER, EFER_LMA | EFER_LME)?;
                }
            }
            Rule::HostAddressSpaceFromLong => e.legacy_host()?,
            Rule::LegacyHostPcide => {
                wants!(e.caps.cr4.may & CR4_PCIDE != 0);
                return e.flip_natural(fields::HOST_CR4, CR4_PCIDE);
            }
            Rule::LegacyHostFred => {
                wants!(e.caps.cr4.may & CR4_FRED != 0);
                return e.flip_natural(fields::HOST_CR4, CR4_FRED);
            }
            Rule::LegacyHostRip => return e.set_natural(fields::HOST_RIP, 1 << 32),
            Rule::LegacyHostCet => return e.set_natural(fields::HOST_SSP, 1 << 32),
            Rule::LongHostPae => return e.flip_natural(fields::HOST_CR4, CR4_PAE),
            Rule::LongHostRip => return e.set_natural(fields::HOST_RIP, NOT_CANONICAL),
            Rule::LongHostCet => return e.set_natural(fields::HOST_SSP, NOT_CANONICAL),
            Rule::HostInterruptSspTable => {
                return e.set_natural(fields::HOST_INTERRUPT_SSP_TABLE, NOT_CANONICAL);
            }
            // A 64-bit guest of a 32-bit host violates a rule about the processor's mode as well,
            // whatever that is.
            _ => return Ok(None),
        }
        Ok(Some(()))
    }

    /// A 32-bit host and guest, which only an entry from outside IA-32e mode may ask for.
    fn legacy_host(&mut self) -> Result<(), AccessError> {
        self.protected_mode()?;
        let exit = self.vmcs.get(fields::EXIT_CONTROLS)?;
        let size = ExitControls::HOST_ADDRESS_SPACE_SIZE.bits();
        self.vmcs.set(fields::EXIT_CONTROLS, exit & !size)?;
        self.vmcs.set(fields::HOST_RIP, 0x10_0000)?;
        self.vmcs.set(fields::HOST_SS_SELECTOR, 0x10)?;
        let cr4 = self.vmcs.get(fields::HOST_CR4)?;
        self.vmcs
            .set(fields::HOST_CR4, cr4 & !(CR4_PCIDE | CR4_FRED))?;
        if self.caps.exit.allows(ExitControls::LOAD_EFER) {
            self.vmcs.set(fields::HOST_EFER, 0)?;
        }
        Ok(())
    }
}
