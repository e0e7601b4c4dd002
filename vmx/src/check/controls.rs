//! The checks of VM-execution, VM-exit and VM-entry controls (SDM vol. 3C, 29.2.1).

use super::{CR0_PE, CR4_FRED, Checker, Rule};
use crate::caps::{EptVpidCaps, ProcessorFeatures};
use crate::controls::{
    ControlWord, EntryControls, ExitControls, PinControls, PrimaryControls, SecondaryControls,
    SecondaryExitControls, TertiaryControls, VmFunctions,
};
use crate::error::AccessError;
use crate::event::{
    EventType, InterruptionInformation, VECTOR_MTF, VECTOR_SYSCALL, VECTOR_SYSENTER,
};
use crate::fields;
use crate::vmcs::VmcsRead;

const FRAME: u64 = 0xFFF;

pub(super) fn check<V: VmcsRead>(c: &mut Checker<'_, V>) -> Result<(), AccessError> {
    words(c)?;
    execution(c)?;
    apic(c)?;
    apic_timer(c)?;
    ept(c)?;
    features(c)?;
    exit(c)?;
    entry(c)
}

/// The words themselves. Those that matter only with an activating control are read only then.
fn words<V: VmcsRead>(c: &mut Checker<'_, V>) -> Result<(), AccessError> {
    macro_rules! word {
        ($word:ident, $caps:ident, $rule:ident) => {{
            let (word, allowed) = (c.words.$word, c.caps.$caps);
            c.require(
                allowed.accepts(word),
                Rule::$rule,
                field_of(word),
                word.to_u64(),
            );
            c.words.$word = word & allowed.may_be_one();
        }};
    }
    word!(pin, pin, PinReserved);
    word!(primary, primary, PrimaryReserved);
    if c.words
        .primary
        .contains(PrimaryControls::ACTIVATE_SECONDARY_CONTROLS)
    {
        let bits = c.get(fields::SECONDARY_CONTROLS)?;
        c.words.secondary = SecondaryControls::from_bits_retain(bits);
        word!(secondary, secondary, SecondaryReserved);
    }
    if c.words
        .primary
        .contains(PrimaryControls::ACTIVATE_TERTIARY_CONTROLS)
    {
        let bits = c.get(fields::TERTIARY_CONTROLS)?;
        c.words.tertiary = TertiaryControls::from_bits_retain(bits);
        word!(tertiary, tertiary, TertiaryReserved);
    }
    word!(exit, exit, ExitReserved);
    if c.words
        .exit
        .contains(ExitControls::ACTIVATE_SECONDARY_CONTROLS)
    {
        let bits = c.get(fields::SECONDARY_EXIT_CONTROLS)?;
        c.words.exit2 = SecondaryExitControls::from_bits_retain(bits);
        word!(exit2, exit2, Exit2Reserved);
    }
    word!(entry, entry, EntryReserved);
    Ok(())
}

fn field_of<C: ControlWord>(_: C) -> crate::Encoding {
    C::FIELD
}

fn execution<V: VmcsRead>(c: &mut Checker<'_, V>) -> Result<(), AccessError> {
    let count = c.get(fields::CR3_TARGET_COUNT)?;
    let ok = count <= c.caps.misc.cr3_targets();
    c.require(
        ok,
        Rule::Cr3TargetCount,
        fields::CR3_TARGET_COUNT,
        count.into(),
    );
    if c.words.primary.contains(PrimaryControls::USE_IO_BITMAPS) {
        c.require_address(Rule::IoBitmapAddress, fields::IO_BITMAP_A, FRAME)?;
        c.require_address(Rule::IoBitmapAddress, fields::IO_BITMAP_B, FRAME)?;
    }
    if c.words.primary.contains(PrimaryControls::USE_MSR_BITMAPS) {
        c.require_address(Rule::MsrBitmapAddress, fields::MSR_BITMAPS, FRAME)?;
    }
    let pin = c.words.pin;
    c.require(
        pin.contains(PinControls::NMI_EXITING) || !pin.contains(PinControls::VIRTUAL_NMIS),
        Rule::VirtualNmisNeedNmiExiting,
        fields::PIN_CONTROLS,
        pin.to_u64(),
    );
    let primary = c.words.primary;
    c.require(
        pin.contains(PinControls::VIRTUAL_NMIS)
            || !primary.contains(PrimaryControls::NMI_WINDOW_EXITING),
        Rule::NmiWindowNeedsVirtualNmis,
        fields::PRIMARY_CONTROLS,
        primary.to_u64(),
    );
    Ok(())
}

fn apic<V: VmcsRead>(c: &mut Checker<'_, V>) -> Result<(), AccessError> {
    let (pin, primary) = (c.words.pin, c.words.primary);
    let (secondary, tertiary) = (c.words.secondary, c.words.tertiary);
    let delivery = secondary.contains(SecondaryControls::VIRTUAL_INTERRUPT_DELIVERY);
    if primary.contains(PrimaryControls::USE_TPR_SHADOW) {
        c.require_address(
            Rule::VirtualApicAddress,
            fields::VIRTUAL_APIC_ADDRESS,
            FRAME,
        )?;
        if !delivery {
            let threshold = c.get(fields::TPR_THRESHOLD)?;
            let field = fields::TPR_THRESHOLD;
            c.require(
                threshold & !0xF == 0,
                Rule::TprThresholdReserved,
                field,
                threshold.into(),
            );
        }
    } else {
        let needy = secondary.intersects(
            SecondaryControls::VIRTUALIZE_X2APIC_MODE
                | SecondaryControls::APIC_REGISTER_VIRTUALIZATION
                | SecondaryControls::VIRTUAL_INTERRUPT_DELIVERY,
        );
        c.require(
            !needy && !tertiary.contains(TertiaryControls::IPI_VIRTUALIZATION),
            Rule::ApicVirtualizationNeedsTprShadow,
            fields::PRIMARY_CONTROLS,
            primary.to_u64(),
        );
    }
    if secondary.contains(SecondaryControls::VIRTUALIZE_APIC_ACCESSES) {
        c.require_address(Rule::ApicAccessAddress, fields::APIC_ACCESS_ADDRESS, FRAME)?;
        c.require(
            !secondary.contains(SecondaryControls::VIRTUALIZE_X2APIC_MODE),
            Rule::X2apicExcludesApicAccesses,
            fields::SECONDARY_CONTROLS,
            secondary.to_u64(),
        );
    }
    c.require(
        !delivery || pin.contains(PinControls::EXTERNAL_INTERRUPT_EXITING),
        Rule::VirtualInterruptsNeedExiting,
        fields::PIN_CONTROLS,
        pin.to_u64(),
    );
    if pin.contains(PinControls::PROCESS_POSTED_INTERRUPTS) {
        let (field, value) = (fields::SECONDARY_CONTROLS, secondary.to_u64());
        c.require(delivery, Rule::PostedNeedVirtualInterrupts, field, value);
        let exit = c.words.exit;
        c.require(
            exit.contains(ExitControls::ACKNOWLEDGE_INTERRUPT),
            Rule::PostedNeedAcknowledge,
            fields::EXIT_CONTROLS,
            exit.to_u64(),
        );
        let field = fields::POSTED_INTERRUPT_NOTIFICATION_VECTOR;
        let vector = c.get(field)?;
        c.require(vector <= 0xFF, Rule::PostedVector, field, vector.into());
        let field = fields::POSTED_INTERRUPT_DESCRIPTOR_ADDRESS;
        c.require_address(Rule::PostedDescriptorAddress, field, 0x3F)?;
    }
    Ok(())
}

fn apic_timer<V: VmcsRead>(c: &mut Checker<'_, V>) -> Result<(), AccessError> {
    let tertiary = c.words.tertiary;
    if !tertiary.contains(TertiaryControls::APIC_TIMER_VIRTUALIZATION) {
        return Ok(());
    }
    let (field, value) = (fields::TERTIARY_CONTROLS, tertiary.to_u64());
    let delivers = SecondaryControls::VIRTUAL_INTERRUPT_DELIVERY;
    c.require(
        c.words.secondary.contains(delivers),
        Rule::ApicTimerNeedsVirtualInterrupts,
        field,
        value,
    );
    let primary = c.words.primary;
    c.require(
        !primary.contains(PrimaryControls::RDTSC_EXITING),
        Rule::ApicTimerExcludesRdtscExiting,
        fields::PRIMARY_CONTROLS,
        primary.to_u64(),
    );
    let (field, rule) = (fields::VIRTUAL_TIMER_VECTOR, Rule::ApicTimerVector);
    let vector = c.get(field)?;
    c.require(vector <= 0xFF, rule, field, vector.into());
    Ok(())
}

fn ept<V: VmcsRead>(c: &mut Checker<'_, V>) -> Result<(), AccessError> {
    let secondary = c.words.secondary;
    if secondary.contains(SecondaryControls::ENABLE_VPID) {
        let vpid = c.get(fields::VPID)?;
        c.require(vpid != 0, Rule::VpidZero, fields::VPID, vpid.into());
    }
    let enabled = secondary.contains(SecondaryControls::ENABLE_EPT);
    if enabled {
        let eptp = c.get(fields::EPT_POINTER)?;
        ept_pointer(c, eptp);
    }
    let (field, value) = (fields::SECONDARY_CONTROLS, secondary.to_u64());
    let mut needs_ept = |control, rule| {
        c.require(enabled || !secondary.contains(control), rule, field, value);
    };
    needs_ept(SecondaryControls::ENABLE_PML, Rule::PmlNeedsEpt);
    needs_ept(
        SecondaryControls::UNRESTRICTED_GUEST,
        Rule::UnrestrictedNeedsEpt,
    );
    needs_ept(
        SecondaryControls::MODE_BASED_EXECUTE_CONTROL,
        Rule::ModeBasedExecuteNeedsEpt,
    );
    needs_ept(
        SecondaryControls::SUB_PAGE_WRITE_PERMISSIONS,
        Rule::SppNeedsEpt,
    );
    needs_ept(SecondaryControls::PT_USES_GUEST_PHYSICAL, Rule::PtNeedsEpt);
    let tertiary = c.words.tertiary;
    let (field, value) = (fields::TERTIARY_CONTROLS, tertiary.to_u64());
    for (control, rule) in [
        (
            TertiaryControls::PEBS_USES_GUEST_PHYSICAL,
            Rule::PebsNeedsEpt,
        ),
        (TertiaryControls::ENABLE_HLAT, Rule::HlatNeedsEpt),
        (
            TertiaryControls::EPT_PAGING_WRITE_CONTROL,
            Rule::PagingWriteNeedsEpt,
        ),
        (
            TertiaryControls::GUEST_PAGING_VERIFICATION,
            Rule::GuestPagingVerificationNeedsEpt,
        ),
    ] {
        c.require(enabled || !tertiary.contains(control), rule, field, value);
    }
    if c.context.in_seam {
        let (field, value) = (fields::SECONDARY_CONTROLS, secondary.to_u64());
        c.require(enabled, Rule::SeamNeedsEpt, field, value);
        let field = fields::SHARED_EPT_POINTER;
        c.require_address(Rule::SeamSharedEptp, field, FRAME)?;
    }
    if secondary.contains(SecondaryControls::ENABLE_PML) {
        c.require_address(Rule::PmlAddress, fields::PML_ADDRESS, FRAME)?;
    }
    if secondary.contains(SecondaryControls::SUB_PAGE_WRITE_PERMISSIONS) {
        c.require_address(Rule::SppPointer, fields::SPP_TABLE_POINTER, FRAME)?;
    }
    Ok(())
}

/// The EPT pointer (table 27-9).
fn ept_pointer<V: VmcsRead>(c: &mut Checker<'_, V>, eptp: u64) {
    let (caps, field) = (c.caps.ept_vpid, fields::EPT_POINTER);
    let memory_type = match eptp & 7 {
        0 => caps.contains(EptVpidCaps::UNCACHEABLE),
        6 => caps.contains(EptVpidCaps::WRITE_BACK),
        _ => false,
    };
    c.require(memory_type, Rule::EptpMemoryType, field, eptp);
    let length = match (eptp >> 3) & 7 {
        3 => caps.contains(EptVpidCaps::WALK_4),
        4 => caps.contains(EptVpidCaps::WALK_5),
        _ => false,
    };
    c.require(length, Rule::EptpWalkLength, field, eptp);
    let flags = eptp & (1 << 6) == 0 || caps.contains(EptVpidCaps::ACCESSED_DIRTY);
    c.require(flags, Rule::EptpAccessedDirty, field, eptp);
    let shadow = eptp & (1 << 7) == 0 || caps.contains(EptVpidCaps::SUPERVISOR_SHADOW_STACK);
    c.require(shadow, Rule::EptpShadowStack, field, eptp);
    let ok = eptp & 0xF00 == 0 && !c.exceeds_physical(eptp);
    c.require(ok, Rule::EptpReserved, field, eptp);
}

fn features<V: VmcsRead>(c: &mut Checker<'_, V>) -> Result<(), AccessError> {
    let (secondary, tertiary) = (c.words.secondary, c.words.tertiary);
    let ept = secondary.contains(SecondaryControls::ENABLE_EPT);
    if secondary.contains(SecondaryControls::ENABLE_VM_FUNCTIONS) {
        let field = fields::VM_FUNCTION_CONTROLS;
        let functions = VmFunctions::from_bits_retain(c.get(field)?);
        let offered = c.caps.functions;
        c.require(
            functions.bits() & !offered.bits() == 0,
            Rule::VmFunctionsReserved,
            field,
            functions.bits(),
        );
        if (functions & offered).contains(VmFunctions::EPTP_SWITCHING) {
            c.require(ept, Rule::EptpSwitchingNeedsEpt, field, functions.bits());
            c.require_address(Rule::EptpListAddress, fields::EPTP_LIST_ADDRESS, FRAME)?;
        }
    }
    if secondary.contains(SecondaryControls::VMCS_SHADOWING) {
        c.require_address(
            Rule::VmcsShadowBitmaps,
            fields::VMREAD_BITMAP_ADDRESS,
            FRAME,
        )?;
        c.require_address(
            Rule::VmcsShadowBitmaps,
            fields::VMWRITE_BITMAP_ADDRESS,
            FRAME,
        )?;
    }
    if secondary.contains(SecondaryControls::EPT_VIOLATION_VE) {
        c.require_address(
            Rule::VeInformationAddress,
            fields::VE_INFORMATION_ADDRESS,
            FRAME,
        )?;
    }
    if secondary.contains(SecondaryControls::PT_USES_GUEST_PHYSICAL) {
        let loads = c.words.entry.contains(EntryControls::LOAD_RTIT_CTL);
        let clears = c.words.exit.contains(ExitControls::CLEAR_RTIT_CTL);
        let field = fields::SECONDARY_CONTROLS;
        let ok = loads && clears;
        c.require(ok, Rule::PtNeedsRtitCtl, field, secondary.to_u64());
    }
    let entry = c.words.entry;
    let ok = !(c.context.tracing && entry.contains(EntryControls::LOAD_RTIT_CTL));
    let rule = Rule::RtitCtlWhileTracing;
    c.require(ok, rule, fields::ENTRY_CONTROLS, entry.to_u64());
    if secondary.contains(SecondaryControls::PASID_TRANSLATION) {
        let rule = Rule::PasidDirectories;
        c.require_address(rule, fields::LOW_PASID_DIRECTORY, FRAME)?;
        c.require_address(rule, fields::HIGH_PASID_DIRECTORY, FRAME)?;
    }
    if secondary.contains(SecondaryControls::USE_TSC_SCALING) {
        let multiplier = c.get(fields::TSC_MULTIPLIER)?;
        let (rule, field) = (Rule::TscMultiplierZero, fields::TSC_MULTIPLIER);
        c.require(multiplier != 0, rule, field, multiplier);
    }
    if tertiary.contains(TertiaryControls::ENABLE_HLAT) {
        c.require_address(Rule::HlatPointer, fields::HLAT_POINTER, 0xFE7)?;
    }
    if tertiary.contains(TertiaryControls::IPI_VIRTUALIZATION) {
        let field = fields::PID_POINTER_TABLE_ADDRESS;
        let start = c.get(field)?;
        let last_index = u64::from(c.get(fields::LAST_PID_POINTER_INDEX)?);
        let last = start.checked_add(8 * last_index);
        let inside = last.is_some_and(|last| !c.exceeds_physical(last));
        c.require(
            start & 7 == 0 && inside,
            Rule::PidPointerTable,
            field,
            start,
        );
    }
    Ok(())
}

fn exit<V: VmcsRead>(c: &mut Checker<'_, V>) -> Result<(), AccessError> {
    let exit = c.words.exit;
    c.require(
        c.words.pin.contains(PinControls::ACTIVATE_PREEMPTION_TIMER)
            || !exit.contains(ExitControls::SAVE_PREEMPTION_TIMER),
        Rule::SaveTimerNeedsTimer,
        fields::EXIT_CONTROLS,
        exit.to_u64(),
    );
    c.require_msr_area(
        Rule::ExitMsrStoreArea,
        fields::EXIT_MSR_STORE_COUNT,
        fields::EXIT_MSR_STORE_ADDRESS,
    )?;
    c.require_msr_area(
        Rule::ExitMsrLoadArea,
        fields::EXIT_MSR_LOAD_COUNT,
        fields::EXIT_MSR_LOAD_ADDRESS,
    )
}

fn entry<V: VmcsRead>(c: &mut Checker<'_, V>) -> Result<(), AccessError> {
    let information = InterruptionInformation(c.get(fields::ENTRY_INTERRUPTION_INFORMATION)?);
    if information.is_valid() {
        event(c, information)?;
    }
    c.require_msr_area(
        Rule::EntryMsrLoadArea,
        fields::ENTRY_MSR_LOAD_COUNT,
        fields::ENTRY_MSR_LOAD_ADDRESS,
    )?;
    let entry = c.words.entry;
    let (field, value) = (fields::ENTRY_CONTROLS, entry.to_u64());
    let smm = EntryControls::ENTRY_TO_SMM | EntryControls::DEACTIVATE_DUAL_MONITOR;
    let ok = c.context.in_smm || !entry.intersects(smm);
    c.require(ok, Rule::EntrySmmControls, field, value);
    let ok = !entry.contains(smm);
    c.require(ok, Rule::EntrySmmExclusive, field, value);
    Ok(())
}

fn event<V: VmcsRead>(
    c: &mut Checker<'_, V>,
    information: InterruptionInformation,
) -> Result<(), AccessError> {
    let (field, value) = (
        fields::ENTRY_INTERRUPTION_INFORMATION,
        u64::from(information.0),
    );
    let (event_type, vector) = (information.event_type(), information.vector());
    let trap_flag = c.caps.primary.allows(PrimaryControls::MONITOR_TRAP_FLAG);
    let fred = c.caps.processor.features.contains(ProcessorFeatures::FRED);
    let known = match event_type {
        EventType::Reserved => false,
        EventType::Other => trap_flag || fred,
        _ => true,
    };
    c.require(known, Rule::EventType, field, value);
    let vector_ok = match event_type {
        EventType::Nmi => vector == 2,
        EventType::HardwareException => vector <= 31,
        EventType::Other if known => match vector {
            VECTOR_MTF => trap_flag,
            VECTOR_SYSCALL | VECTOR_SYSENTER => fred && c.get(fields::GUEST_CR4)? & CR4_FRED != 0,
            _ => false,
        },
        _ => true,
    };
    c.require(vector_ok, Rule::EventVector, field, value);
    let protected = !c.unrestricted() || c.get(fields::GUEST_CR0)? & CR0_PE != 0;
    let may_deliver = protected && event_type == EventType::HardwareException;
    let has_code = matches!(vector, 8 | 10..=14 | 17);
    let delivers = information.has_error_code();
    let delivery_ok = if c.caps.basic.any_error_code() {
        may_deliver || !delivers
    } else {
        delivers == (may_deliver && has_code)
    };
    c.require(delivery_ok, Rule::EventErrorCodeDelivery, field, value);
    let nests = c.caps.basic.nested_exceptions() && event_type == EventType::HardwareException;
    let ok = nests || !information.is_nested();
    c.require(ok, Rule::EventNested, field, value);
    c.require(
        information.0 & 0x7FFF_D000 == 0,
        Rule::EventReserved,
        field,
        value,
    );
    if delivers {
        let code = c.get(fields::ENTRY_EXCEPTION_ERROR_CODE)?;
        let field = fields::ENTRY_EXCEPTION_ERROR_CODE;
        c.require(code >> 16 == 0, Rule::EventErrorCode, field, code.into());
    }
    if known && information.has_instruction() {
        let length = c.get(fields::ENTRY_INSTRUCTION_LENGTH)?;
        let shortest = if c.caps.misc.zero_length_injection() {
            0
        } else {
            1
        };
        let field = fields::ENTRY_INSTRUCTION_LENGTH;
        let ok = (shortest..=15).contains(&length);
        c.require(ok, Rule::EventInstructionLength, field, length.into());
    }
    Ok(())
}
