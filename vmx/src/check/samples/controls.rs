//! The samples for rules of controls.

use super::*;

const NMI: u32 = 2 << 8 | 2;
const GENERAL_PROTECTION: u32 = 3 << 8 | 1 << 11 | 13;
const SOFTWARE_INTERRUPT: u32 = 4 << 8 | 0x80;

impl<V: VmcsWrite> Editor<'_, V> {
    pub(super) fn involve_controls(&mut self, rule: Rule) -> Edit {
        let e = self;
        match rule {
            Rule::SecondaryReserved => return e.activate_secondary(),
            Rule::TertiaryReserved => return e.activate_tertiary(),
            Rule::IoBitmapAddress => primary!(e, USE_IO_BITMAPS),
            Rule::MsrBitmapAddress => primary!(e, USE_MSR_BITMAPS),
            Rule::VirtualApicAddress | Rule::TprThresholdReserved | Rule::TprThresholdAboveVtpr => {
                primary!(e, USE_TPR_SHADOW);
            }
            Rule::ApicAccessAddress => secondary!(e, VIRTUALIZE_APIC_ACCESSES),
            Rule::PmlAddress => {
                wants!(e.enable_ept()?.is_some());
                secondary!(e, ENABLE_PML);
            }
            Rule::SppPointer => {
                wants!(e.enable_ept()?.is_some());
                secondary!(e, SUB_PAGE_WRITE_PERMISSIONS);
            }
            Rule::EptpListAddress | Rule::EptpSwitchingNeedsEpt => {
                wants!(e.enable_ept()?.is_some());
                secondary!(e, ENABLE_VM_FUNCTIONS);
                wants!(e.caps.functions.bits() & 1 != 0);
                return e.set(fields::VM_FUNCTION_CONTROLS, 1);
            }
            Rule::VmcsShadowBitmaps => secondary!(e, VMCS_SHADOWING),
            Rule::VeInformationAddress => secondary!(e, EPT_VIOLATION_VE),
            Rule::PasidDirectories => secondary!(e, PASID_TRANSLATION),
            Rule::X2apicExcludesApicAccesses => {
                primary!(e, USE_TPR_SHADOW);
                secondary!(e, VIRTUALIZE_APIC_ACCESSES);
            }
            Rule::PostedNeedVirtualInterrupts
            | Rule::PostedNeedAcknowledge
            | Rule::PostedVector
            | Rule::PostedDescriptorAddress => {
                primary!(e, USE_TPR_SHADOW);
                secondary!(e, VIRTUAL_INTERRUPT_DELIVERY);
                pin!(e, EXTERNAL_INTERRUPT_EXITING | PROCESS_POSTED_INTERRUPTS);
                exit!(e, ACKNOWLEDGE_INTERRUPT);
            }
            Rule::PidPointerTable => {
                primary!(e, USE_TPR_SHADOW);
                tertiary!(e, IPI_VIRTUALIZATION);
            }
            Rule::VpidZero => {
                secondary!(e, ENABLE_VPID);
                return e.set16(fields::VPID, 1);
            }
            Rule::EptpMemoryType
            | Rule::EptpWalkLength
            | Rule::EptpAccessedDirty
            | Rule::EptpShadowStack
            | Rule::EptpReserved
            | Rule::SeamNeedsEpt
            | Rule::SeamSharedEptp => return e.enable_ept(),
            Rule::VmFunctionsReserved => secondary!(e, ENABLE_VM_FUNCTIONS),
            Rule::PtNeedsRtitCtl => {
                wants!(e.enable_ept()?.is_some());
                return e.trace_guest_physical();
            }
            Rule::TscMultiplierZero => {
                secondary!(e, USE_TSC_SCALING);
                return e.set(fields::TSC_MULTIPLIER, 1 << 48);
            }
            Rule::HlatPointer => {
                wants!(e.enable_ept()?.is_some());
                tertiary!(e, ENABLE_HLAT);
            }
            Rule::ApicTimerNeedsVirtualInterrupts
            | Rule::ApicTimerExcludesRdtscExiting
            | Rule::ApicTimerVector => {
                primary!(e, USE_TPR_SHADOW);
                secondary!(e, VIRTUAL_INTERRUPT_DELIVERY);
                pin!(e, EXTERNAL_INTERRUPT_EXITING);
                tertiary!(e, APIC_TIMER_VIRTUALIZATION);
            }
            Rule::Exit2Reserved => exit!(e, ACTIVATE_SECONDARY_CONTROLS),
            Rule::ExitMsrStoreArea => return e.set32(fields::EXIT_MSR_STORE_COUNT, 1),
            Rule::ExitMsrLoadArea => return e.set32(fields::EXIT_MSR_LOAD_COUNT, 2),
            Rule::EventType
            | Rule::EventVector
            | Rule::EventErrorCodeDelivery
            | Rule::EventNested
            | Rule::EventReserved => return e.inject(NMI),
            Rule::EventErrorCode => return e.inject(GENERAL_PROTECTION),
            Rule::EventInstructionLength => {
                return e.inject(SOFTWARE_INTERRUPT).and(e.length(1));
            }
            Rule::EntryMsrLoadArea => return e.set32(fields::ENTRY_MSR_LOAD_COUNT, 1),
            // The others are about every VMCS.
            _ => {}
        }
        Ok(Some(()))
    }

    pub(super) fn violate_controls(&mut self, rule: Rule) -> Edit {
        let e = self;
        let caps = e.caps;
        match rule {
            Rule::PinReserved => return e.forbid(fields::PIN_CONTROLS, caps.pin),
            Rule::PrimaryReserved => return e.forbid(fields::PRIMARY_CONTROLS, caps.primary),
            Rule::SecondaryReserved => return e.forbid(fields::SECONDARY_CONTROLS, caps.secondary),
            Rule::TertiaryReserved => return e.set(fields::TERTIARY_CONTROLS, 1 << 63),
            Rule::Cr3TargetCount => {
                return e.set32(fields::CR3_TARGET_COUNT, caps.misc.cr3_targets() + 1);
            }
            Rule::IoBitmapAddress => return e.set(fields::IO_BITMAP_B, e.beyond_physical()),
            Rule::MsrBitmapAddress => return e.misalign(fields::MSR_BITMAPS),
            Rule::VirtualApicAddress => return e.misalign(fields::VIRTUAL_APIC_ADDRESS),
            Rule::ApicAccessAddress => return e.misalign(fields::APIC_ACCESS_ADDRESS),
            Rule::PmlAddress => return e.misalign(fields::PML_ADDRESS),
            Rule::SppPointer => return e.misalign(fields::SPP_TABLE_POINTER),
            Rule::EptpListAddress => return e.misalign(fields::EPTP_LIST_ADDRESS),
            Rule::VmcsShadowBitmaps => return e.misalign(fields::VMWRITE_BITMAP_ADDRESS),
            Rule::VeInformationAddress => return e.misalign(fields::VE_INFORMATION_ADDRESS),
            Rule::PasidDirectories => return e.misalign(fields::HIGH_PASID_DIRECTORY),
            Rule::TprThresholdReserved => return e.set32(fields::TPR_THRESHOLD, 1 << 4),
            Rule::VirtualNmisNeedNmiExiting => pin!(e, VIRTUAL_NMIS),
            Rule::NmiWindowNeedsVirtualNmis => primary!(e, NMI_WINDOW_EXITING),
            Rule::ApicVirtualizationNeedsTprShadow => secondary!(e, APIC_REGISTER_VIRTUALIZATION),
            Rule::X2apicExcludesApicAccesses => secondary!(e, VIRTUALIZE_X2APIC_MODE),
            Rule::VirtualInterruptsNeedExiting => {
                primary!(e, USE_TPR_SHADOW);
                secondary!(e, VIRTUAL_INTERRUPT_DELIVERY);
            }
            Rule::PostedNeedVirtualInterrupts | Rule::ApicTimerNeedsVirtualInterrupts => {
                return disable!(
                    e,
                    SECONDARY_CONTROLS,
                    SecondaryControls,
                    VIRTUAL_INTERRUPT_DELIVERY
                );
            }
            Rule::PostedNeedAcknowledge => {
                return disable!(e, EXIT_CONTROLS, ExitControls, ACKNOWLEDGE_INTERRUPT);
            }
            Rule::PostedVector => {
                return e.set16(fields::POSTED_INTERRUPT_NOTIFICATION_VECTOR, 0x100);
            }
            Rule::PostedDescriptorAddress => {
                return e.misalign(fields::POSTED_INTERRUPT_DESCRIPTOR_ADDRESS);
            }
            Rule::PidPointerTable => return e.misalign(fields::PID_POINTER_TABLE_ADDRESS),
            Rule::VpidZero => return e.set16(fields::VPID, 0),
            Rule::EptpMemoryType => return e.flip_eptp(1),
            Rule::EptpWalkLength => return e.flip_eptp(1 << 5),
            Rule::EptpAccessedDirty => {
                wants!(!caps.ept_vpid.contains(EptVpidCaps::ACCESSED_DIRTY));
                return e.flip_eptp(1 << 6);
            }
            Rule::EptpShadowStack => {
                wants!(!caps.ept_vpid.contains(EptVpidCaps::SUPERVISOR_SHADOW_STACK));
                return e.flip_eptp(1 << 7);
            }
            Rule::EptpReserved => return e.flip_eptp(1 << 8),
            Rule::PmlNeedsEpt => secondary!(e, ENABLE_PML),
            Rule::UnrestrictedNeedsEpt => secondary!(e, UNRESTRICTED_GUEST),
            Rule::ModeBasedExecuteNeedsEpt => secondary!(e, MODE_BASED_EXECUTE_CONTROL),
            Rule::SppNeedsEpt => secondary!(e, SUB_PAGE_WRITE_PERMISSIONS),
            Rule::PtNeedsEpt => return e.trace_guest_physical(),
            Rule::PebsNeedsEpt => tertiary!(e, PEBS_USES_GUEST_PHYSICAL),
            Rule::HlatNeedsEpt => tertiary!(e, ENABLE_HLAT),
            Rule::PagingWriteNeedsEpt => tertiary!(e, EPT_PAGING_WRITE_CONTROL),
            Rule::GuestPagingVerificationNeedsEpt => tertiary!(e, GUEST_PAGING_VERIFICATION),
            Rule::SeamNeedsEpt | Rule::EptpSwitchingNeedsEpt => {
                return disable!(e, SECONDARY_CONTROLS, SecondaryControls, ENABLE_EPT);
            }
            Rule::SeamSharedEptp => return e.misalign(fields::SHARED_EPT_POINTER),
            Rule::VmFunctionsReserved => return e.set(fields::VM_FUNCTION_CONTROLS, 1 << 63),
            Rule::RtitCtlWhileTracing => entry!(e, LOAD_RTIT_CTL),
            Rule::PtNeedsRtitCtl => {
                return disable!(e, EXIT_CONTROLS, ExitControls, CLEAR_RTIT_CTL);
            }
            Rule::TscMultiplierZero => return e.set(fields::TSC_MULTIPLIER, 0),
            Rule::HlatPointer => return e.misalign(fields::HLAT_POINTER),
            Rule::ApicTimerExcludesRdtscExiting => primary!(e, RDTSC_EXITING),
            Rule::ApicTimerVector => return e.set16(fields::VIRTUAL_TIMER_VECTOR, 0x100),
            Rule::ExitReserved => return e.forbid(fields::EXIT_CONTROLS, caps.exit),
            Rule::Exit2Reserved => return e.set(fields::SECONDARY_EXIT_CONTROLS, 1 << 63),
            Rule::SaveTimerNeedsTimer => {
                let timer = PinControls::ACTIVATE_PREEMPTION_TIMER;
                let old = e.vmcs.get(fields::PIN_CONTROLS)?;
                e.vmcs.set(fields::PIN_CONTROLS, old & !timer.bits())?;
                exit!(e, SAVE_PREEMPTION_TIMER);
            }
            Rule::ExitMsrStoreArea => return e.misalign(fields::EXIT_MSR_STORE_ADDRESS),
            Rule::ExitMsrLoadArea => {
                // The first entry is inside the physical address space, the second outside.
                return e.set(fields::EXIT_MSR_LOAD_ADDRESS, e.beyond_physical() - 16);
            }
            Rule::EntryReserved => return e.forbid(fields::ENTRY_CONTROLS, caps.entry),
            Rule::EventType => return e.inject(1 << 8 | 0x20),
            Rule::EventVector => return e.inject(NMI ^ 1),
            Rule::EventErrorCodeDelivery => {
                return e.inject(SOFTWARE_INTERRUPT | 1 << 11).and(e.length(1));
            }
            Rule::EventNested => return e.inject(NMI | 1 << 13),
            Rule::EventReserved => return e.inject(NMI | 1 << 12),
            Rule::EventErrorCode => return e.set32(fields::ENTRY_EXCEPTION_ERROR_CODE, 1 << 16),
            Rule::EventInstructionLength => return e.length(16),
            Rule::EntryMsrLoadArea => return e.misalign(fields::ENTRY_MSR_LOAD_ADDRESS),
            Rule::EntrySmmControls => entry!(e, DEACTIVATE_DUAL_MONITOR),
            Rule::EntrySmmExclusive => {
                entry!(e, ENTRY_TO_SMM | DEACTIVATE_DUAL_MONITOR);
                return e.set32(fields::GUEST_INTERRUPTIBILITY, 1 << 2);
            }
            _ => return Ok(None),
        }
        Ok(Some(()))
    }

    fn length(&mut self, length: u32) -> Edit {
        self.set32(fields::ENTRY_INSTRUCTION_LENGTH, length)
    }

    fn flip_eptp(&mut self, bits: u64) -> Edit {
        let old = self.vmcs.get(fields::EPT_POINTER)?;
        self.set(fields::EPT_POINTER, old ^ bits)
    }

    /// Everything that a trace to guest-physical addresses needs but EPT.
    fn trace_guest_physical(&mut self) -> Edit {
        let e = self;
        secondary!(e, PT_USES_GUEST_PHYSICAL);
        entry!(e, LOAD_RTIT_CTL);
        exit!(e, CLEAR_RTIT_CTL);
        Ok(Some(()))
    }
}
