//! The checks of guest registers and non-register state (SDM vol. 3C, 29.3.1.1 and 29.3.1.3 to
//! 29.3.1.6).

use super::{
    CR0_CD, CR0_NW, CR0_PE, CR0_PG, CR0_WP, CR4_CET, CR4_FRED, CR4_PAE, CR4_PCIDE, Checker,
    EFER_LMA, EFER_LME, Rule, cr3_lam_bits, efer_bits, is_valid_cet, is_valid_pat,
};
use crate::caps::ProcessorFeatures;
use crate::controls::{
    ActivityState, EntryControls, Interruptibility, PendingDebug, PinControls, SecondaryControls,
};
use crate::error::AccessError;
use crate::event::{EventType, InterruptionInformation};
use crate::fields;
use crate::vmcs::VmcsRead;

const RFLAGS_TF: u64 = 1 << 8;
const RFLAGS_IF: u64 = 1 << 9;
const RFLAGS_VM: u64 = 1 << 17;
const DEBUGCTL_BTF: u64 = 1 << 1;
const CS_LONG: u32 = 1 << 13;

pub(super) fn check_registers<V: VmcsRead>(c: &mut Checker<'_, V>) -> Result<(), AccessError> {
    control_registers(c)?;
    loaded_msrs(c)
}

pub(super) fn check_rest<V: VmcsRead>(c: &mut Checker<'_, V>) -> Result<(), AccessError> {
    descriptor_tables(c)?;
    instruction_pointer(c)?;
    activity(c)?;
    interruptibility(c)?;
    pending_debug(c)?;
    link_pointer(c)?;
    pdptes(c)
}

fn control_registers<V: VmcsRead>(c: &mut Checker<'_, V>) -> Result<(), AccessError> {
    let (cr0, cr4) = (c.get(fields::GUEST_CR0)?, c.get(fields::GUEST_CR4)?);
    let mut unchecked = CR0_NW | CR0_CD;
    if c.unrestricted() {
        unchecked |= CR0_PE | CR0_PG;
    }
    let fixed = c.caps.cr0.violations(cr0, unchecked) == 0;
    c.require(fixed, Rule::GuestCr0Fixed, fields::GUEST_CR0, cr0);
    let protected = cr0 & CR0_PG == 0 || cr0 & CR0_PE != 0;
    c.require(
        protected,
        Rule::GuestPagingNeedsProtection,
        fields::GUEST_CR0,
        cr0,
    );
    let fixed = c.caps.cr4.violations(cr4, 0) == 0;
    c.require(fixed, Rule::GuestCr4Fixed, fields::GUEST_CR4, cr4);
    let protected = cr4 & CR4_CET == 0 || cr0 & CR0_WP != 0;
    c.require(protected, Rule::GuestCetNeedsWp, fields::GUEST_CR4, cr4);
    let debug = c.words.entry.contains(EntryControls::LOAD_DEBUG_CONTROLS);
    if debug {
        let value = c.get(fields::GUEST_DEBUGCTL)?;
        let ok = value & !c.caps.processor.debugctl == 0;
        c.require(ok, Rule::GuestDebugctl, fields::GUEST_DEBUGCTL, value);
    }
    if c.long_mode_guest() {
        let rule = Rule::GuestLongModeNeedsPaging;
        if cr0 & CR0_PG == 0 {
            c.require(false, rule, fields::GUEST_CR0, cr0);
        }
        c.require(cr4 & CR4_PAE != 0, rule, fields::GUEST_CR4, cr4);
    } else {
        let ok = cr4 & CR4_PCIDE == 0;
        c.require(ok, Rule::GuestPcideNeedsLongMode, fields::GUEST_CR4, cr4);
        let ok = cr4 & CR4_FRED == 0;
        c.require(ok, Rule::GuestFredNeedsLongMode, fields::GUEST_CR4, cr4);
    }
    let cr3 = c.get(fields::GUEST_CR3)?;
    let inside = !c
        .caps
        .processor
        .exceeds_physical(cr3 & !cr3_lam_bits(c.caps));
    c.require(inside, Rule::GuestCr3Width, fields::GUEST_CR3, cr3);
    if debug {
        let dr7 = c.get(fields::GUEST_DR7)?;
        c.require(dr7 >> 32 == 0, Rule::GuestDr7, fields::GUEST_DR7, dr7);
    }
    c.require_canonical(Rule::GuestSysenterEsp, fields::GUEST_SYSENTER_ESP)?;
    c.require_canonical(Rule::GuestSysenterEip, fields::GUEST_SYSENTER_EIP)
}

fn loaded_msrs<V: VmcsRead>(c: &mut Checker<'_, V>) -> Result<(), AccessError> {
    let (entry, processor) = (c.words.entry, c.caps.processor);
    if entry.contains(EntryControls::LOAD_PERF_GLOBAL_CTRL) {
        let value = c.get(fields::GUEST_PERF_GLOBAL_CTRL)?;
        let ok = value & !processor.perf_global_ctrl == 0;
        c.require(
            ok,
            Rule::GuestPerfGlobalCtrl,
            fields::GUEST_PERF_GLOBAL_CTRL,
            value,
        );
    }
    if entry.contains(EntryControls::LOAD_PAT) {
        let pat = c.get(fields::GUEST_PAT)?;
        c.require(is_valid_pat(pat), Rule::GuestPat, fields::GUEST_PAT, pat);
    }
    if entry.contains(EntryControls::LOAD_EFER) {
        let (efer, field) = (c.get(fields::GUEST_EFER)?, fields::GUEST_EFER);
        c.require(
            efer & !efer_bits(c.caps) == 0,
            Rule::GuestEferReserved,
            field,
            efer,
        );
        let active = efer & EFER_LMA != 0;
        c.require(
            active == c.long_mode_guest(),
            Rule::GuestEferLma,
            field,
            efer,
        );
        let paging = c.get(fields::GUEST_CR0)? & CR0_PG != 0;
        let enabled = efer & EFER_LME != 0;
        c.require(
            !paging || active == enabled,
            Rule::GuestEferLme,
            field,
            efer,
        );
    }
    if entry.contains(EntryControls::LOAD_BNDCFGS) {
        let value = c.get(fields::GUEST_BNDCFGS)?;
        let ok = value & 0xFFC == 0 && c.is_canonical(value & !0xFFF);
        c.require(ok, Rule::GuestBndcfgs, fields::GUEST_BNDCFGS, value);
    }
    if entry.contains(EntryControls::LOAD_RTIT_CTL) {
        let value = c.get(fields::GUEST_RTIT_CTL)?;
        let ok = processor.accepts_rtit_ctl(value);
        c.require(ok, Rule::GuestRtitCtl, fields::GUEST_RTIT_CTL, value);
    }
    if entry.contains(EntryControls::LOAD_CET_STATE) {
        let value = c.get(fields::GUEST_S_CET)?;
        let ok = is_valid_cet(value);
        c.require(ok, Rule::GuestSCet, fields::GUEST_S_CET, value);
        for field in [fields::GUEST_S_CET, fields::GUEST_INTERRUPT_SSP_TABLE] {
            c.require_canonical(Rule::GuestCetCanonical, field)?;
        }
    }
    if entry.contains(EntryControls::LOAD_LBR_CTL) {
        let value = c.get(fields::GUEST_LBR_CTL)?;
        let ok = value & !processor.lbr_ctl == 0;
        c.require(ok, Rule::GuestLbrCtl, fields::GUEST_LBR_CTL, value);
    }
    if entry.contains(EntryControls::LOAD_PKRS) {
        let pkrs = c.get(fields::GUEST_PKRS)?;
        c.require(pkrs >> 32 == 0, Rule::GuestPkrs, fields::GUEST_PKRS, pkrs);
    }
    if entry.contains(EntryControls::LOAD_UINV) {
        let uinv = c.get(fields::GUEST_UINV)?;
        c.require(
            uinv <= 0xFF,
            Rule::GuestUinv,
            fields::GUEST_UINV,
            uinv.into(),
        );
    }
    if entry.contains(EntryControls::LOAD_FRED) {
        c.require_fred(
            Rule::GuestFred,
            [
                fields::GUEST_FRED_CONFIG,
                fields::GUEST_FRED_RSP1,
                fields::GUEST_FRED_RSP2,
                fields::GUEST_FRED_RSP3,
                fields::GUEST_FRED_SSP1,
                fields::GUEST_FRED_SSP2,
                fields::GUEST_FRED_SSP3,
            ],
        )?;
    }
    if entry.contains(EntryControls::LOAD_SPEC_CTRL) {
        let value = c.get(fields::GUEST_SPEC_CTRL)?;
        let ok = value & !processor.spec_ctrl == 0;
        c.require(ok, Rule::GuestSpecCtrl, fields::GUEST_SPEC_CTRL, value);
    }
    Ok(())
}

fn descriptor_tables<V: VmcsRead>(c: &mut Checker<'_, V>) -> Result<(), AccessError> {
    for field in [fields::GUEST_GDTR_BASE, fields::GUEST_IDTR_BASE] {
        c.require_canonical(Rule::DescriptorTableBase, field)?;
    }
    for field in [fields::GUEST_GDTR_LIMIT, fields::GUEST_IDTR_LIMIT] {
        let limit = c.get(field)?;
        c.require(
            limit <= 0xFFFF,
            Rule::DescriptorTableLimit,
            field,
            limit.into(),
        );
    }
    Ok(())
}

fn instruction_pointer<V: VmcsRead>(c: &mut Checker<'_, V>) -> Result<(), AccessError> {
    let long = c.long_mode_guest();
    let code64 = long && c.get(fields::GUEST_CS_ACCESS_RIGHTS)? & CS_LONG != 0;
    let rip = c.get(fields::GUEST_RIP)?;
    if code64 {
        let ok = identical_high_bits(c, rip);
        c.require(ok, Rule::RipCanonical, fields::GUEST_RIP, rip);
    } else {
        c.require(rip >> 32 == 0, Rule::RipHigh, fields::GUEST_RIP, rip);
    }
    let (rflags, field) = (c.get(fields::GUEST_RFLAGS)?, fields::GUEST_RFLAGS);
    let reserved = rflags & 0xFFFF_FFFF_FFC0_802A == 2;
    c.require(reserved, Rule::RflagsReserved, field, rflags);
    let real = c.get(fields::GUEST_CR0)? & CR0_PE == 0;
    let ok = rflags & RFLAGS_VM == 0 || !(long || real);
    c.require(ok, Rule::RflagsVm, field, rflags);
    let interrupts = rflags & RFLAGS_IF != 0;
    let external = matches!(injected(c)?, Some((EventType::ExternalInterrupt, _)));
    c.require(interrupts || !external, Rule::RflagsIf, field, rflags);
    if c.words.entry.contains(EntryControls::LOAD_CET_STATE) {
        let ssp = c.get(fields::GUEST_SSP)?;
        let in_range = if code64 {
            identical_high_bits(c, ssp)
        } else {
            ssp >> 32 == 0
        };
        c.require(
            in_range && ssp & 3 == 0,
            Rule::GuestSsp,
            fields::GUEST_SSP,
            ssp,
        );
    }
    Ok(())
}

/// "Bits 63:N must be identical", N being the linear-address width. That is less than canonical: bit
/// N-1 may differ.
fn identical_high_bits<V: VmcsRead>(c: &Checker<'_, V>, address: u64) -> bool {
    let width = c.caps.processor.linear_address_bits;
    let high = address >> width;
    high == 0 || high == u64::MAX >> width
}

/// The event to be injected: its type and vector.
fn injected<V: VmcsRead>(c: &Checker<'_, V>) -> Result<Option<(EventType, u8)>, AccessError> {
    let information = InterruptionInformation(c.get(fields::ENTRY_INTERRUPTION_INFORMATION)?);
    let event = (information.event_type(), information.vector());
    Ok(information.is_valid().then_some(event))
}

fn activity<V: VmcsRead>(c: &mut Checker<'_, V>) -> Result<(), AccessError> {
    let (number, field) = (
        c.get(fields::GUEST_ACTIVITY_STATE)?,
        fields::GUEST_ACTIVITY_STATE,
    );
    let (state, value) = (ActivityState::from_number(number), u64::from(number));
    let misc = c.caps.misc;
    let supported = match state {
        ActivityState::Active => true,
        ActivityState::Hlt => misc.activity_hlt(),
        ActivityState::Shutdown => misc.activity_shutdown(),
        ActivityState::WaitForSipi => misc.activity_wait_for_sipi(),
        ActivityState::Unknown(_) => false,
    };
    c.require(supported, Rule::ActivityUnsupported, field, value);
    let privileged = c.get(fields::GUEST_SS_ACCESS_RIGHTS)? & 0x60 == 0;
    let ok = state != ActivityState::Hlt || privileged;
    c.require(ok, Rule::ActivityHltPrivilege, field, value);
    let blocking = Interruptibility::BLOCKING_BY_STI | Interruptibility::BLOCKING_BY_MOV_SS;
    let interruptibility = c.get(fields::GUEST_INTERRUPTIBILITY)?;
    let blocked = Interruptibility::from_bits_retain(interruptibility).intersects(blocking);
    let ok = state == ActivityState::Active || !blocked;
    c.require(ok, Rule::ActivityBlocked, field, value);
    if let Some((event_type, vector)) = injected(c)? {
        let exception = event_type == EventType::HardwareException;
        let ok = match state {
            ActivityState::Hlt => match event_type {
                EventType::ExternalInterrupt | EventType::Nmi => true,
                EventType::HardwareException => matches!(vector, 1 | 18),
                EventType::Other => vector == 0,
                _ => false,
            },
            ActivityState::Shutdown => event_type == EventType::Nmi || exception && vector == 18,
            ActivityState::WaitForSipi => false,
            ActivityState::Active | ActivityState::Unknown(_) => true,
        };
        c.require(ok, Rule::ActivityEvent, field, value);
    }
    if c.words.entry.contains(EntryControls::ENTRY_TO_SMM) {
        let waits = state == ActivityState::WaitForSipi;
        c.require(!waits, Rule::ActivitySmm, field, value);
    }
    Ok(())
}

fn interruptibility<V: VmcsRead>(c: &mut Checker<'_, V>) -> Result<(), AccessError> {
    let field = fields::GUEST_INTERRUPTIBILITY;
    let state = Interruptibility::from_bits_retain(c.get(field)?);
    let value = u64::from(state.bits());
    let sti = state.contains(Interruptibility::BLOCKING_BY_STI);
    let mov_ss = state.contains(Interruptibility::BLOCKING_BY_MOV_SS);
    c.require(
        value & !0x1F == 0,
        Rule::InterruptibilityReserved,
        field,
        value,
    );
    c.require(
        !(sti && mov_ss),
        Rule::InterruptibilityStiAndMovSs,
        field,
        value,
    );
    let enabled = c.get(fields::GUEST_RFLAGS)? & RFLAGS_IF != 0;
    c.require(
        !sti || enabled,
        Rule::InterruptibilityStiNeedsIf,
        field,
        value,
    );
    let event_type = injected(c)?.map(|(event_type, _)| event_type);
    let external = event_type == Some(EventType::ExternalInterrupt);
    c.require(
        !(external && (sti || mov_ss)),
        Rule::InterruptibilityInterrupt,
        field,
        value,
    );
    let nmi = event_type == Some(EventType::Nmi);
    c.require(
        !(nmi && mov_ss),
        Rule::InterruptibilityNmiMovSs,
        field,
        value,
    );
    let smi = state.contains(Interruptibility::BLOCKING_BY_SMI);
    let ok = c.context.in_smm || !smi;
    c.require(ok, Rule::InterruptibilitySmi, field, value);
    if c.words.entry.contains(EntryControls::ENTRY_TO_SMM) {
        c.require(smi, Rule::InterruptibilitySmmEntry, field, value);
    }
    let virtual_nmis = c.words.pin.contains(PinControls::VIRTUAL_NMIS);
    let nmi_blocked = state.contains(Interruptibility::BLOCKING_BY_NMI);
    let ok = !(virtual_nmis && nmi && nmi_blocked);
    c.require(ok, Rule::InterruptibilityVirtualNmi, field, value);
    let enclave = state.contains(Interruptibility::ENCLAVE_INTERRUPTION);
    let sgx = c.caps.processor.features.contains(ProcessorFeatures::SGX);
    let ok = !enclave || sgx && !mov_ss;
    c.require(ok, Rule::InterruptibilityEnclave, field, value);
    c.require(!(nmi && sti), Rule::InterruptibilityNmiSti, field, value);
    Ok(())
}

fn pending_debug<V: VmcsRead>(c: &mut Checker<'_, V>) -> Result<(), AccessError> {
    let field = fields::GUEST_PENDING_DEBUG;
    let pending = PendingDebug::from_bits_retain(c.get(field)?);
    let value = pending.bits();
    let features = c.caps.processor.features;
    let mut defined = 0x1_500F;
    if features.contains(ProcessorFeatures::BUS_LOCK_DETECT) {
        defined |= PendingDebug::BUS_LOCK.bits();
    }
    c.require(
        value & !defined == 0,
        Rule::PendingDebugReserved,
        field,
        value,
    );
    let state = Interruptibility::from_bits_retain(c.get(fields::GUEST_INTERRUPTIBILITY)?);
    let mov_ss = state.contains(Interruptibility::BLOCKING_BY_MOV_SS);
    let halted = c.get(fields::GUEST_ACTIVITY_STATE)? == ActivityState::Hlt.number();
    if halted || mov_ss || state.contains(Interruptibility::BLOCKING_BY_STI) {
        let trap = c.get(fields::GUEST_RFLAGS)? & RFLAGS_TF != 0;
        let branches = c.get(fields::GUEST_DEBUGCTL)? & DEBUGCTL_BTF != 0;
        let ok = pending.contains(PendingDebug::BS) == (trap && !branches);
        c.require(ok, Rule::PendingDebugStep, field, value);
    }
    // "Bits 11:0, bits 15:13 ... must all be 0", and bit 12 must be 1.
    let alone = value & 0xFFFF == PendingDebug::ENABLED_BREAKPOINT.bits();
    let possible = alone && features.contains(ProcessorFeatures::RTM) && !mov_ss;
    let ok = !pending.contains(PendingDebug::RTM) || possible;
    c.require(ok, Rule::PendingDebugRtm, field, value);
    Ok(())
}

fn link_pointer<V: VmcsRead>(c: &mut Checker<'_, V>) -> Result<(), AccessError> {
    let (link, field) = (c.get(fields::VMCS_LINK_POINTER)?, fields::VMCS_LINK_POINTER);
    if link == u64::MAX {
        return Ok(());
    }
    let ok = link & 0xFFF == 0 && !c.exceeds_physical(link);
    c.require(ok, Rule::LinkPointerAddress, field, link);
    let enters_smm = c.words.entry.contains(EntryControls::ENTRY_TO_SMM);
    if c.context.in_smm && !enters_smm {
        let executive = c.get(fields::EXECUTIVE_VMCS_POINTER)?;
        c.require(link != executive, Rule::LinkPointerIsExecutive, field, link);
    } else if let Some(current) = c.context.current_vmcs {
        c.require(link != current.0, Rule::LinkPointerIsCurrent, field, link);
    }
    Ok(())
}

/// With EPT the PDPTEs are fields; without, memory, which [`check_memory`](super::check_memory)
/// reads.
fn pdptes<V: VmcsRead>(c: &mut Checker<'_, V>) -> Result<(), AccessError> {
    if !uses_pae_paging(c)? || !c.words.secondary.contains(SecondaryControls::ENABLE_EPT) {
        return Ok(());
    }
    for field in [
        fields::GUEST_PDPTE0,
        fields::GUEST_PDPTE1,
        fields::GUEST_PDPTE2,
        fields::GUEST_PDPTE3,
    ] {
        let entry = c.get(field)?;
        c.require(is_valid_pdpte(c, entry), Rule::PdpteReserved, field, entry);
    }
    Ok(())
}

pub(super) fn uses_pae_paging<V: VmcsRead>(c: &Checker<'_, V>) -> Result<bool, AccessError> {
    let paging = c.get(fields::GUEST_CR0)? & CR0_PG != 0;
    let extended = c.get(fields::GUEST_CR4)? & CR4_PAE != 0;
    Ok(paging && extended && !c.long_mode_guest())
}

/// Bits 2:1, 8:5 and those beyond the physical-address width of a present PDPTE are reserved
/// (SDM vol. 3A, table 4-8).
pub(super) fn is_valid_pdpte<V: VmcsRead>(c: &Checker<'_, V>, entry: u64) -> bool {
    entry & 1 == 0 || entry & 0x1E6 == 0 && !c.caps.processor.exceeds_physical(entry)
}
