//! The samples for rules of controls.

use super::*;

impl<V: VmcsWrite> Editor<'_, V> {
    pub(super) fn violate_controls(&mut self, rule: Rule) -> Edit {
        let e = self;
        let caps = e.caps;
        match rule {
            Rule::PinReserved => return e.forbid(fields::PIN_CONTROLS, caps.pin),
            Rule::PrimaryReserved => return e.forbid(fields::PRIMARY_CONTROLS, caps.primary),
            Rule::SecondaryReserved => {
                wants!(e.activate_secondary()?.is_some());
                return e.forbid(fields::SECONDARY_CONTROLS, caps.secondary);
            }
            Rule::TertiaryReserved => {
                wants!(e.activate_tertiary()?.is_some());
                return e.set(fields::TERTIARY_CONTROLS, 1 << 63);
            }
            Rule::Cr3TargetCount => {
                return e.set32(fields::CR3_TARGET_COUNT, caps.misc.cr3_targets() + 1);
            }
            Rule::IoBitmapAddress => {
                primary!(e, USE_IO_BITMAPS);
                return e.set(fields::IO_BITMAP_B, e.beyond_physical());
            }
            Rule::MsrBitmapAddress => {
                primary!(e, USE_MSR_BITMAPS);
                return e.misalign(fields::MSR_BITMAPS);
            }
            Rule::VirtualApicAddress => {
                primary!(e, USE_TPR_SHADOW);
                return e.misalign(fields::VIRTUAL_APIC_ADDRESS);
            }
            Rule::TprThresholdReserved => {
                primary!(e, USE_TPR_SHADOW);
                return e.set32(fields::TPR_THRESHOLD, 1 << 4);
            }
            Rule::VirtualNmisNeedNmiExiting => pin!(e, VIRTUAL_NMIS),
            Rule::NmiWindowNeedsVirtualNmis => primary!(e, NMI_WINDOW_EXITING),
            Rule::ApicAccessAddress => {
                secondary!(e, VIRTUALIZE_APIC_ACCESSES);
                return e.misalign(fields::APIC_ACCESS_ADDRESS);
            }
            Rule::ApicVirtualizationNeedsTprShadow => secondary!(e, APIC_REGISTER_VIRTUALIZATION),
            Rule::X2apicExcludesApicAccesses => {
                primary!(e, USE_TPR_SHADOW);
                secondary!(e, VIRTUALIZE_APIC_ACCESSES | VIRTUALIZE_X2APIC_MODE);
            }
            Rule::VirtualInterruptsNeedExiting => {
                primary!(e, USE_TPR_SHADOW);
                secondary!(e, VIRTUAL_INTERRUPT_DELIVERY);
            }
            Rule::PostedNeedVirtualInterrupts => {
                pin!(e, PROCESS_POSTED_INTERRUPTS);
                exit!(e, ACKNOWLEDGE_INTERRUPT);
            }
            Rule::PostedNeedAcknowledge => return e.posted_interrupts(),
            Rule::PostedVector => {
                wants!(e.posted_interrupts()?.is_some());
                exit!(e, ACKNOWLEDGE_INTERRUPT);
                return e.set16(fields::POSTED_INTERRUPT_NOTIFICATION_VECTOR, 0x100);
            }
            Rule::PostedDescriptorAddress => {
                wants!(e.posted_interrupts()?.is_some());
                exit!(e, ACKNOWLEDGE_INTERRUPT);
                return e.misalign(fields::POSTED_INTERRUPT_DESCRIPTOR_ADDRESS);
            }
            Rule::VpidZero => {
                secondary!(e, ENABLE_VPID);
                return e.set16(fields::VPID, 0);
            }
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
            Rule::PmlAddress => {
                wants!(e.enable_ept()?.is_some());
                secondary!(e, ENABLE_PML);
                return e.misalign(fields::PML_ADDRESS);
            }
            Rule::UnrestrictedNeedsEpt => secondary!(e, UNRESTRICTED_GUEST),
            Rule::ModeBasedExecuteNeedsEpt => secondary!(e, MODE_BASED_EXECUTE_CONTROL),
            Rule::SppNeedsEpt => secondary!(e, SUB_PAGE_WRITE_PERMISSIONS),
            Rule::SppPointer => {
                wants!(e.enable_ept()?.is_some());
                secondary!(e, SUB_PAGE_WRITE_PERMISSIONS);
                return e.misalign(fields::SPP_TABLE_POINTER);
            }
            Rule::VmFunctionsReserved => {
                secondary!(e, ENABLE_VM_FUNCTIONS);
                return e.set(fields::VM_FUNCTION_CONTROLS, 1 << 63);
            }
            Rule::EptpSwitchingNeedsEpt => {
                secondary!(e, ENABLE_VM_FUNCTIONS);
                wants!(caps.functions.bits() & 1 != 0);
                return e.set(fields::VM_FUNCTION_CONTROLS, 1);
            }
            Rule::EptpListAddress => {
                wants!(e.enable_ept()?.is_some());
                secondary!(e, ENABLE_VM_FUNCTIONS);
                wants!(caps.functions.bits() & 1 != 0);
                e.vmcs.set(fields::VM_FUNCTION_CONTROLS, 1)?;
                return e.misalign(fields::EPTP_LIST_ADDRESS);
            }
            Rule::VmcsShadowBitmaps => {
                secondary!(e, VMCS_SHADOWING);
                return e.misalign(fields::VMWRITE_BITMAP_ADDRESS);
            }
            Rule::VeInformationAddress => {
                secondary!(e, EPT_VIOLATION_VE);
                return e.misalign(fields::VE_INFORMATION_ADDRESS);
            }
            Rule::PtGuestPhysicalNeeds => secondary!(e, PT_USES_GUEST_PHYSICAL),
            Rule::TscMultiplierZero => {
                secondary!(e, USE_TSC_SCALING);
                return e.set(fields::TSC_MULTIPLIER, 0);
            }
            Rule::HlatPointer => {
                tertiary!(e, ENABLE_HLAT);
                return e.misalign(fields::HLAT_POINTER);
            }
            Rule::HlatPrefixSize => {
                tertiary!(e, ENABLE_HLAT);
                let largest = u16::from(caps.ept_vpid.max_hlat_prefix());
                return e.set16(fields::HLAT_PREFIX_SIZE, largest + 1);
            }
            Rule::PasidDirectories => {
                secondary!(e, PASID_TRANSLATION);
                return e.misalign(fields::HIGH_PASID_DIRECTORY);
            }
            Rule::PidPointerTable => {
                primary!(e, USE_TPR_SHADOW);
                tertiary!(e, IPI_VIRTUALIZATION);
                return e.misalign(fields::PID_POINTER_TABLE_ADDRESS);
            }
            Rule::ExitReserved => return e.forbid(fields::EXIT_CONTROLS, caps.exit),
            Rule::Exit2Reserved => {
                exit!(e, ACTIVATE_SECONDARY_CONTROLS);
                return e.set(fields::SECONDARY_EXIT_CONTROLS, 1 << 63);
            }
            Rule::SaveTimerNeedsTimer => {
                let timer = PinControls::ACTIVATE_PREEMPTION_TIMER;
                let old = e.vmcs.get(fields::PIN_CONTROLS)?;
                e.vmcs.set(fields::PIN_CONTROLS, old & !timer.bits())?;
                exit!(e, SAVE_PREEMPTION_TIMER);
            }
            Rule::ExitMsrStoreArea => {
                e.vmcs.set(fields::EXIT_MSR_STORE_COUNT, 1)?;
                return e.misalign(fields::EXIT_MSR_STORE_ADDRESS);
            }
            Rule::ExitMsrLoadArea => {
                // The first entry is inside the physical address space, the second outside.
                e.vmcs.set(fields::EXIT_MSR_LOAD_COUNT, 2)?;
                return e.set(fields::EXIT_MSR_LOAD_ADDRESS, e.beyond_physical() - 16);
            }
            Rule::EntryReserved => return e.forbid(fields::ENTRY_CONTROLS, caps.entry),
            Rule::EventType => return e.inject(1 << 8 | 0x20),
            Rule::EventVector => return e.inject(2 << 8 | 3),
            Rule::EventErrorCodeDelivery => {
                return e.inject(4 << 8 | 1 << 11 | 0x80).and(e.length(1));
            }
            Rule::EventReserved => return e.inject(1 << 12 | 0x20).and(e.enable_interrupts()),
            Rule::EventErrorCode => {
                e.vmcs.set(fields::ENTRY_EXCEPTION_ERROR_CODE, 1 << 16)?;
                return e.inject(3 << 8 | 1 << 11 | 13);
            }
            Rule::EventInstructionLength => return e.inject(4 << 8 | 0x80).and(e.length(16)),
            Rule::EntryMsrLoadArea => {
                e.vmcs.set(fields::ENTRY_MSR_LOAD_COUNT, 1)?;
                return e.misalign(fields::ENTRY_MSR_LOAD_ADDRESS);
            }
            Rule::EntrySmmControls => entry!(e, DEACTIVATE_DUAL_MONITOR),
            _ => return Ok(None),
        }
        Ok(Some(()))
    }

    fn length(&mut self, length: u32) -> Edit {
        self.set32(fields::ENTRY_INSTRUCTION_LENGTH, length)
    }

    pub(super) fn enable_interrupts(&mut self) -> Edit {
        let old = self.vmcs.get(fields::GUEST_RFLAGS)?;
        self.set_natural(fields::GUEST_RFLAGS, old | 1 << 9)
    }

    fn flip_eptp(&mut self, bits: u64) -> Edit {
        wants!(self.enable_ept()?.is_some());
        let old = self.vmcs.get(fields::EPT_POINTER)?;
        self.set(fields::EPT_POINTER, old ^ bits)
    }

    /// Everything that posted interrupts need but exits that acknowledge interrupts.
    fn posted_interrupts(&mut self) -> Edit {
        let e = self;
        primary!(e, USE_TPR_SHADOW);
        secondary!(e, VIRTUAL_INTERRUPT_DELIVERY);
        pin!(e, EXTERNAL_INTERRUPT_EXITING | PROCESS_POSTED_INTERRUPTS);
        Ok(Some(()))
    }
}
