//! The samples for rules of host and guest state.

use super::*;

/// A byte that no page-attribute table may hold.
const BAD_PAT: u64 = 2;

impl<V: VmcsWrite> Editor<'_, V> {
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
            Rule::HostPerfGlobalCtrl => {
                exit!(e, LOAD_PERF_GLOBAL_CTRL);
                return e.set(fields::HOST_PERF_GLOBAL_CTRL, 1 << 63);
            }
            Rule::HostPat => {
                exit!(e, LOAD_PAT);
                return e.set(fields::HOST_PAT, BAD_PAT);
            }
            Rule::HostEferReserved => {
                exit!(e, LOAD_EFER);
                let old = e.vmcs.get(fields::HOST_EFER)?;
                return e.set(fields::HOST_EFER, old | 1 << 1);
            }
            Rule::HostEferMode => {
                exit!(e, LOAD_EFER);
                let old = e.vmcs.get(fields::HOST_EFER)?;
                return e.set(fields::HOST_EFER, old & !EFER_LME);
            }
            Rule::HostSCet => {
                exit!(e, LOAD_CET_STATE);
                return e.set_natural(fields::HOST_S_CET, 1 << 6);
            }
            Rule::HostSsp => {
                exit!(e, LOAD_CET_STATE);
                return e.set_natural(fields::HOST_SSP, 1);
            }
            Rule::HostInterruptSspTable => {
                exit!(e, LOAD_CET_STATE);
                return e.set_natural(fields::HOST_INTERRUPT_SSP_TABLE, NOT_CANONICAL);
            }
            Rule::HostPkrs => {
                exit!(e, LOAD_PKRS);
                return e.set(fields::HOST_PKRS, 1 << 32);
            }
            Rule::HostFred => {
                exit!(e, ACTIVATE_SECONDARY_CONTROLS);
                let bits = SecondaryExitControls::LOAD_FRED;
                wants!(e.caps.exit2.allows(bits));
                e.vmcs.set(fields::SECONDARY_EXIT_CONTROLS, bits.bits())?;
                return e.set(fields::HOST_FRED_RSP2, 1 << 5);
            }
            Rule::HostSelectorRplTi => {
                let old = e.vmcs.get(fields::HOST_DS_SELECTOR)?;
                return e.set16(fields::HOST_DS_SELECTOR, old | 1);
            }
            Rule::HostCsNull => return e.set16(fields::HOST_CS_SELECTOR, 0),
            Rule::HostTrNull => return e.set16(fields::HOST_TR_SELECTOR, 0),
            Rule::HostBaseCanonical => {
                return e.set_natural(fields::HOST_GS_BASE, NOT_CANONICAL);
            }
            Rule::HostAddressSpaceFromLong => e.legacy_host()?,
            Rule::LongHostPae => return e.flip_natural(fields::HOST_CR4, CR4_PAE),
            Rule::LongHostRip => return e.set_natural(fields::HOST_RIP, NOT_CANONICAL),
            // Those of a 32-bit host cannot stand alone on a processor in IA-32e mode.
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
        self.vmcs.set(fields::HOST_CR4, cr4 & !CR4_PCIDE)?;
        if self.caps.exit.allows(ExitControls::LOAD_EFER) {
            self.vmcs.set(fields::HOST_EFER, 0)?;
        }
        Ok(())
    }

    pub(super) fn violate_guest_registers(&mut self, rule: Rule) -> Edit {
        let e = self;
        match rule {
            Rule::GuestCr0Fixed => e.flip_natural(fields::GUEST_CR0, 1 << 5),
            Rule::GuestPagingNeedsProtection => {
                wants!(e.real_mode()?.is_some());
                e.flip_natural(fields::GUEST_CR0, CR0_PG)
            }
            Rule::GuestCr4Fixed => e.flip_natural(fields::GUEST_CR4, 1 << 13),
            Rule::GuestCetNeedsWp => {
                wants!(e.caps.cr4.may & CR4_CET != 0);
                let cr0 = e.vmcs.get(fields::GUEST_CR0)?;
                e.vmcs.set(fields::GUEST_CR0, cr0 & !(1 << 16))?;
                let cr4 = e.vmcs.get(fields::GUEST_CR4)?;
                e.set_natural(fields::GUEST_CR4, cr4 | CR4_CET)
            }
            Rule::GuestDebugctl => {
                entry!(e, LOAD_DEBUG_CONTROLS);
                e.set(fields::GUEST_DEBUGCTL, 1 << 4)
            }
            Rule::GuestLongModeNeedsPaging => e.flip_natural(fields::GUEST_CR4, CR4_PAE),
            Rule::GuestPcideNeedsLongMode => {
                wants!(e.caps.cr4.may & CR4_PCIDE != 0);
                e.protected_mode()?;
                e.flip_natural(fields::GUEST_CR4, CR4_PCIDE)
            }
            Rule::GuestCr3Width => e.flip_natural(fields::GUEST_CR3, e.beyond_physical()),
            Rule::GuestDr7 => {
                entry!(e, LOAD_DEBUG_CONTROLS);
                e.set_natural(fields::GUEST_DR7, 0x400 | 1 << 32)
            }
            Rule::GuestSysenterEsp => e.set_natural(fields::GUEST_SYSENTER_ESP, NOT_CANONICAL),
            Rule::GuestSysenterEip => e.set_natural(fields::GUEST_SYSENTER_EIP, NOT_CANONICAL),
            Rule::GuestPerfGlobalCtrl => {
                entry!(e, LOAD_PERF_GLOBAL_CTRL);
                e.set(fields::GUEST_PERF_GLOBAL_CTRL, 1 << 63)
            }
            Rule::GuestPat => {
                entry!(e, LOAD_PAT);
                e.set(fields::GUEST_PAT, BAD_PAT)
            }
            Rule::GuestEferReserved => {
                entry!(e, LOAD_EFER);
                let old = e.vmcs.get(fields::GUEST_EFER)?;
                e.set(fields::GUEST_EFER, old | 1 << 1)
            }
            Rule::GuestEferLma => {
                entry!(e, LOAD_EFER);
                let old = e.vmcs.get(fields::GUEST_EFER)?;
                e.set(fields::GUEST_EFER, old & !(EFER_LMA | EFER_LME))
            }
            Rule::GuestEferLme => {
                entry!(e, LOAD_EFER);
                let old = e.vmcs.get(fields::GUEST_EFER)?;
                e.set(fields::GUEST_EFER, old & !EFER_LME)
            }
            Rule::GuestBndcfgs => {
                entry!(e, LOAD_BNDCFGS);
                e.set(fields::GUEST_BNDCFGS, 1 << 2)
            }
            Rule::GuestRtitCtl => {
                entry!(e, LOAD_RTIT_CTL);
                e.set(fields::GUEST_RTIT_CTL, 1 << 63)
            }
            Rule::GuestSCet => {
                entry!(e, LOAD_CET_STATE);
                e.set_natural(fields::GUEST_S_CET, 1 << 6)
            }
            Rule::GuestInterruptSspTable => {
                entry!(e, LOAD_CET_STATE);
                e.set_natural(fields::GUEST_INTERRUPT_SSP_TABLE, NOT_CANONICAL)
            }
            Rule::GuestLbrCtl => {
                entry!(e, LOAD_LBR_CTL);
                e.set(fields::GUEST_LBR_CTL, 1 << 63)
            }
            Rule::GuestPkrs => {
                entry!(e, LOAD_PKRS);
                e.set(fields::GUEST_PKRS, 1 << 32)
            }
            Rule::GuestUinv => {
                entry!(e, LOAD_UINV);
                e.set16(fields::GUEST_UINV, 0x100)
            }
            Rule::GuestFred => {
                entry!(e, LOAD_FRED);
                e.set(fields::GUEST_FRED_SSP3, 1 << 2)
            }
            _ => Ok(None),
        }
    }

    pub(super) fn violate_segments(&mut self, rule: Rule) -> Edit {
        let e = self;
        let (cs, ss) = (
            fields::GUEST_CS_ACCESS_RIGHTS,
            fields::GUEST_SS_ACCESS_RIGHTS,
        );
        let (ds, tr) = (
            fields::GUEST_DS_ACCESS_RIGHTS,
            fields::GUEST_TR_ACCESS_RIGHTS,
        );
        let ldtr = fields::GUEST_LDTR_ACCESS_RIGHTS;
        match rule {
            Rule::TrTi => e.set16(fields::GUEST_TR_SELECTOR, 0x1C),
            Rule::LdtrTi => e.set16(fields::GUEST_LDTR_SELECTOR, 4),
            Rule::SsRplEqualsCsRpl => e.set16(fields::GUEST_CS_SELECTOR, 0x0B),
            Rule::Virtual8086Base => {
                e.virtual_8086_mode()?;
                e.set_natural(fields::GUEST_DS_BASE, 0x10)
            }
            Rule::SegmentBaseCanonical => e.set_natural(fields::GUEST_FS_BASE, NOT_CANONICAL),
            Rule::LdtrBaseCanonical => e.set_natural(fields::GUEST_LDTR_BASE, NOT_CANONICAL),
            Rule::CsBaseHigh => e.set_natural(fields::GUEST_CS_BASE, 1 << 32),
            Rule::DataBaseHigh => e.set_natural(fields::GUEST_ES_BASE, 1 << 32),
            Rule::Virtual8086Limit => {
                e.virtual_8086_mode()?;
                e.set32(fields::GUEST_GS_LIMIT, 0xFFFE)
            }
            Rule::Virtual8086AccessRights => {
                e.virtual_8086_mode()?;
                e.set32(fields::GUEST_FS_ACCESS_RIGHTS, 0x93)
            }
            Rule::CsType => e.flip32(cs, 1),
            Rule::SsType => e.flip32(ss, 1),
            Rule::DataType => e.flip32(ds, 1),
            Rule::SegmentS => e.flip32(ds, 1 << 4),
            Rule::CsDpl => e.flip32(cs, 1 << 5),
            Rule::SsDplEqualsRpl => {
                // Conforming code may have a lower DPL than the stack.
                e.vmcs.set(cs, 0xA09F)?;
                e.flip32(ss, 1 << 5)
            }
            Rule::SsDplZero => {
                wants!(e.real_mode()?.is_some());
                e.vmcs.set(cs, 0x9F)?;
                e.flip32(ss, 1 << 5)
            }
            Rule::DataDpl => e.set16(fields::GUEST_DS_SELECTOR, 3),
            Rule::SegmentPresent => e.flip32(ds, 1 << 7),
            Rule::SegmentReserved => e.flip32(ds, 1 << 8),
            Rule::CsLongAndBig => e.flip32(cs, 1 << 14),
            Rule::SegmentGranularity => e.set32(fields::GUEST_DS_LIMIT, 0x0FFF_FFFE),
            Rule::TrType => e.flip32(tr, 1 << 1),
            Rule::TrS => e.flip32(tr, 1 << 4),
            Rule::TrPresent => e.flip32(tr, 1 << 7),
            Rule::TrReserved => e.flip32(tr, 1 << 8),
            Rule::TrGranularity => e.set32(fields::GUEST_TR_LIMIT, 1 << 20),
            Rule::TrUsable => e.flip32(tr, UNUSABLE),
            Rule::LdtrType => e.flip32(ldtr, 1),
            Rule::LdtrS => e.flip32(ldtr, 1 << 4),
            Rule::LdtrPresent => e.flip32(ldtr, 1 << 7),
            Rule::LdtrReserved => e.flip32(ldtr, 1 << 8),
            Rule::LdtrGranularity => e.set32(fields::GUEST_LDTR_LIMIT, 1 << 20),
            _ => Ok(None),
        }
    }

    pub(super) fn violate_guest_rest(&mut self, rule: Rule) -> Edit {
        let e = self;
        let (activity, blocking) = (fields::GUEST_ACTIVITY_STATE, fields::GUEST_INTERRUPTIBILITY);
        match rule {
            Rule::DescriptorTableBase => e.set_natural(fields::GUEST_IDTR_BASE, NOT_CANONICAL),
            Rule::DescriptorTableLimit => e.set32(fields::GUEST_GDTR_LIMIT, 1 << 16),
            Rule::RipHigh => {
                e.protected_mode()?;
                e.set_natural(fields::GUEST_RIP, 1 << 32)
            }
            Rule::RipCanonical => e.set_natural(fields::GUEST_RIP, NOT_CANONICAL),
            Rule::RflagsReserved => e.flip_natural(fields::GUEST_RFLAGS, 1 << 3),
            Rule::RflagsVm => {
                wants!(e.real_mode()?.is_some());
                e.virtual_8086_mode()?;
                Ok(Some(()))
            }
            Rule::RflagsIf => e.inject(0x20),
            Rule::GuestSsp => {
                entry!(e, LOAD_CET_STATE);
                e.set_natural(fields::GUEST_SSP, 1)
            }
            Rule::ActivityUnsupported => e.set32(activity, 4),
            Rule::ActivityHltPrivilege => {
                wants!(e.caps.misc.activity_hlt());
                e.user_mode()?;
                e.set32(activity, 1)
            }
            Rule::ActivityBlocked => {
                wants!(e.caps.misc.activity_hlt());
                e.vmcs.set(blocking, 1 << 1)?;
                e.set32(activity, 1)
            }
            Rule::ActivityEvent => {
                wants!(e.caps.misc.activity_hlt());
                e.vmcs.set(activity, 1)?;
                e.inject(3 << 8 | 6)
            }
            Rule::InterruptibilityReserved => e.set32(blocking, 1 << 5),
            Rule::InterruptibilityStiAndMovSs => e.enable_interrupts().and(e.set32(blocking, 3)),
            Rule::InterruptibilityStiNeedsIf => e.set32(blocking, 1),
            Rule::InterruptibilityInterrupt => {
                e.enable_interrupts()?;
                e.vmcs.set(blocking, 1 << 1)?;
                e.inject(0x20)
            }
            Rule::InterruptibilityNmiMovSs => {
                e.vmcs.set(blocking, 1 << 1)?;
                e.inject(2 << 8 | 2)
            }
            Rule::InterruptibilitySmi => e.set32(blocking, 1 << 2),
            Rule::InterruptibilityVirtualNmi => {
                pin!(e, NMI_EXITING | VIRTUAL_NMIS);
                e.vmcs.set(blocking, 1 << 3)?;
                e.inject(2 << 8 | 2)
            }
            Rule::InterruptibilityEnclave => {
                let sgx = e.caps.processor.features.contains(ProcessorFeatures::SGX);
                e.set32(blocking, if sgx { 1 << 4 | 1 << 1 } else { 1 << 4 })
            }
            Rule::InterruptibilityNmiSti => {
                e.enable_interrupts()?;
                e.vmcs.set(blocking, 1)?;
                e.inject(2 << 8 | 2)
            }
            Rule::PendingDebugReserved => e.set_natural(fields::GUEST_PENDING_DEBUG, 1 << 13),
            Rule::PendingDebugStep => {
                e.vmcs.set(blocking, 1 << 1)?;
                e.set_natural(fields::GUEST_PENDING_DEBUG, 1 << 14)
            }
            Rule::PendingDebugRtm => e.set_natural(fields::GUEST_PENDING_DEBUG, 1 << 16 | 1),
            Rule::LinkPointerAddress => e.set(fields::VMCS_LINK_POINTER, 1),
            Rule::PdpteReserved => {
                wants!(e.enable_ept()?.is_some());
                e.pae_paging()?;
                e.set(fields::GUEST_PDPTE2, 3)
            }
            _ => Ok(None),
        }
    }

    /// CPL 3 everywhere.
    fn user_mode(&mut self) -> Result<(), AccessError> {
        self.vmcs.set(fields::GUEST_CS_SELECTOR, 0x0B)?;
        self.vmcs.set(fields::GUEST_CS_ACCESS_RIGHTS, 0xA0FB)?;
        self.vmcs.set(fields::GUEST_SS_SELECTOR, 3)?;
        self.vmcs.set(fields::GUEST_SS_ACCESS_RIGHTS, 0xC0F3)
    }
}
