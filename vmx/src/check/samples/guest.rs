//! The samples for rules of guest state.

use super::*;

impl<V: VmcsWrite> Editor<'_, V> {
    pub(super) fn involve_guest_registers(&mut self, rule: Rule) -> Edit {
        let e = self;
        match rule {
            Rule::GuestDebugctl | Rule::GuestDr7 => entry!(e, LOAD_DEBUG_CONTROLS),
            Rule::GuestPcideNeedsLongMode | Rule::GuestFredNeedsLongMode => e.protected_mode()?,
            Rule::GuestPerfGlobalCtrl => entry!(e, LOAD_PERF_GLOBAL_CTRL),
            Rule::GuestPat => {
                entry!(e, LOAD_PAT);
                return e.set(fields::GUEST_PAT, GOOD_PAT);
            }
            Rule::GuestEferReserved | Rule::GuestEferLma | Rule::GuestEferLme => {
                entry!(e, LOAD_EFER);
            }
            Rule::GuestBndcfgs => entry!(e, LOAD_BNDCFGS),
            Rule::GuestRtitCtl => entry!(e, LOAD_RTIT_CTL),
            Rule::GuestSCet | Rule::GuestCetCanonical => entry!(e, LOAD_CET_STATE),
            Rule::GuestLbrCtl => entry!(e, LOAD_LBR_CTL),
            Rule::GuestPkrs => entry!(e, LOAD_PKRS),
            Rule::GuestUinv => entry!(e, LOAD_UINV),
            Rule::GuestFred => entry!(e, LOAD_FRED),
            Rule::GuestSpecCtrl => entry!(e, LOAD_SPEC_CTRL),
            // The others are about every VMCS.
            _ => {}
        }
        Ok(Some(()))
    }

    pub(super) fn involve_guest_rest(&mut self, rule: Rule) -> Edit {
        let e = self;
        let blocking = fields::GUEST_INTERRUPTIBILITY;
        match rule {
            Rule::Virtual8086Base | Rule::Virtual8086Limit | Rule::Virtual8086AccessRights => {
                e.virtual_8086_mode()?;
            }
            Rule::FredSsDpl | Rule::FredSupervisorCode => return e.fred(),
            Rule::FredUserState => {
                e.user_mode(0xA0FB)?;
                return e.fred();
            }
            Rule::RipHigh => e.protected_mode()?,
            Rule::GuestSsp => entry!(e, LOAD_CET_STATE),
            Rule::ActivityEvent => return e.inject(2 << 8 | 2),
            Rule::ActivitySmm | Rule::InterruptibilitySmmEntry => {
                entry!(e, ENTRY_TO_SMM);
                return e.set32(blocking, 1 << 2);
            }
            Rule::PendingDebugStep => return e.set32(blocking, 1 << 1),
            Rule::LinkPointerAddress | Rule::LinkPointerRegion | Rule::LinkPointerIsCurrent => {
                return e.set(fields::VMCS_LINK_POINTER, OTHER_VMCS + 0x1000);
            }
            Rule::LinkPointerIsExecutive => {
                e.vmcs.set(fields::EXECUTIVE_VMCS_POINTER, OTHER_VMCS)?;
                return e.set(fields::VMCS_LINK_POINTER, OTHER_VMCS + 0x1000);
            }
            Rule::PdpteReserved => {
                wants!(e.enable_ept()?.is_some());
                e.pae_paging()?;
            }
            // The others are about every VMCS.
            _ => {}
        }
        Ok(Some(()))
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
            Rule::GuestDebugctl => e.set(fields::GUEST_DEBUGCTL, 1 << 4),
            Rule::GuestLongModeNeedsPaging => e.flip_natural(fields::GUEST_CR4, CR4_PAE),
            Rule::GuestPcideNeedsLongMode => {
                wants!(e.caps.cr4.may & CR4_PCIDE != 0);
                e.flip_natural(fields::GUEST_CR4, CR4_PCIDE)
            }
            Rule::GuestFredNeedsLongMode => {
                // At CPL 3, since at CPL 0 FRED demands 64-bit code.
                e.user_mode(0xC0FB)?;
                e.fred()
            }
            Rule::GuestCr3Width => e.flip_natural(fields::GUEST_CR3, e.beyond_physical()),
            Rule::GuestDr7 => e.set_natural(fields::GUEST_DR7, 0x400 | 1 << 32),
            Rule::GuestSysenterEsp => e.set_natural(fields::GUEST_SYSENTER_ESP, NOT_CANONICAL),
            Rule::GuestSysenterEip => e.set_natural(fields::GUEST_SYSENTER_EIP, NOT_CANONICAL),
            Rule::GuestPerfGlobalCtrl => e.set(fields::GUEST_PERF_GLOBAL_CTRL, 1 << 63),
            Rule::GuestPat => e.set(fields::GUEST_PAT, BAD_PAT),
            Rule::GuestEferReserved => {
                let old = e.vmcs.get(fields::GUEST_EFER)?;
                e.set(fields::GUEST_EFER, old | 1 << 1)
            }
            Rule::GuestEferLma => {
                let old = e.vmcs.get(fields::GUEST_EFER)?;
                e.set(fields::GUEST_EFER, old & !(EFER_LMA | EFER_LME))
            }
            Rule::GuestEferLme => {
                let old = e.vmcs.get(fields::GUEST_EFER)?;
                e.set(fields::GUEST_EFER, old & !EFER_LME)
            }
            Rule::GuestBndcfgs => e.set(fields::GUEST_BNDCFGS, 1 << 2),
            Rule::GuestRtitCtl => e.set(fields::GUEST_RTIT_CTL, 1 << 63),
            Rule::GuestSCet => e.set_natural(fields::GUEST_S_CET, 1 << 6),
            Rule::GuestCetCanonical => {
                e.set_natural(fields::GUEST_INTERRUPT_SSP_TABLE, NOT_CANONICAL)
            }
            Rule::GuestLbrCtl => e.set(fields::GUEST_LBR_CTL, 1 << 63),
            Rule::GuestPkrs => e.set(fields::GUEST_PKRS, 1 << 32),
            Rule::GuestUinv => e.set16(fields::GUEST_UINV, 0x100),
            Rule::GuestFred => e.set(fields::GUEST_FRED_SSP3, 1 << 2),
            Rule::GuestSpecCtrl => e.set(fields::GUEST_SPEC_CTRL, 1 << 63),
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
            Rule::Virtual8086Base => e.set_natural(fields::GUEST_DS_BASE, 0x10),
            Rule::SegmentBaseCanonical => e.set_natural(fields::GUEST_FS_BASE, NOT_CANONICAL),
            Rule::LdtrBaseCanonical => e.set_natural(fields::GUEST_LDTR_BASE, NOT_CANONICAL),
            Rule::CsBaseHigh => e.set_natural(fields::GUEST_CS_BASE, 1 << 32),
            Rule::DataBaseHigh => e.set_natural(fields::GUEST_ES_BASE, 1 << 32),
            Rule::Virtual8086Limit => e.set32(fields::GUEST_GS_LIMIT, 0xFFFE),
            Rule::Virtual8086AccessRights => e.set32(fields::GUEST_FS_ACCESS_RIGHTS, 0x93),
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
            Rule::FredSsDpl => {
                e.vmcs.set(fields::GUEST_CS_SELECTOR, 0x09)?;
                e.vmcs.set(cs, 0xA0BB)?;
                e.vmcs.set(fields::GUEST_SS_SELECTOR, 1)?;
                e.set32(ss, 0xC0B3)
            }
            Rule::FredSupervisorCode => {
                e.vmcs.set(cs, 0xC09B)?;
                e.set_natural(fields::GUEST_RIP, 0x10_0000)
            }
            Rule::FredUserState => e.flip_natural(fields::GUEST_RFLAGS, 3 << 12),
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
            Rule::RipHigh => e.set_natural(fields::GUEST_RIP, 1 << 32),
            Rule::RipCanonical => e.set_natural(fields::GUEST_RIP, NOT_CANONICAL),
            Rule::RflagsReserved => e.flip_natural(fields::GUEST_RFLAGS, 1 << 3),
            Rule::RflagsVm => {
                wants!(e.real_mode()?.is_some());
                e.virtual_8086_mode()?;
                Ok(Some(()))
            }
            Rule::RflagsIf => e.inject(0x20),
            Rule::GuestSsp => e.set_natural(fields::GUEST_SSP, 1),
            Rule::ActivityUnsupported => e.set32(activity, 4),
            Rule::ActivityHltPrivilege => {
                wants!(e.caps.misc.activity_hlt());
                e.user_mode(0xA0FB)?;
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
            Rule::ActivitySmm => {
                wants!(e.caps.misc.activity_wait_for_sipi());
                e.set32(activity, 3)
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
            Rule::InterruptibilitySmmEntry => e.set32(blocking, 0),
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
            Rule::PendingDebugStep => e.set_natural(fields::GUEST_PENDING_DEBUG, 1 << 14),
            Rule::PendingDebugRtm => e.set_natural(fields::GUEST_PENDING_DEBUG, 1 << 16 | 1),
            Rule::LinkPointerAddress => e.set(fields::VMCS_LINK_POINTER, 1),
            Rule::LinkPointerIsCurrent | Rule::LinkPointerIsExecutive => {
                e.set(fields::VMCS_LINK_POINTER, OTHER_VMCS)
            }
            Rule::PdpteReserved => e.set(fields::GUEST_PDPTE2, 3),
            _ => Ok(None),
        }
    }

    fn enable_interrupts(&mut self) -> Edit {
        let old = self.vmcs.get(fields::GUEST_RFLAGS)?;
        self.set_natural(fields::GUEST_RFLAGS, old | 1 << 9)
    }
}
