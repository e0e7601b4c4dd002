//! The checks of host state (SDM vol. 3C, 29.2.2 to 29.2.4).

use super::{
    CR0_WP, CR4_CET, CR4_FRED, CR4_LA57, CR4_PAE, CR4_PCIDE, Checker, EFER_LMA, EFER_LME, Rule,
    cr3_lam_bits, efer_bits, is_valid_cet, is_valid_pat,
};
use crate::caps::Processor;
use crate::controls::{ExitControls, SecondaryExitControls};
use crate::error::AccessError;
use crate::fields;
use crate::vmcs::VmcsRead;

pub(super) fn check<V: VmcsRead>(c: &mut Checker<'_, V>) -> Result<(), AccessError> {
    registers(c)?;
    segments(c)?;
    address_space(c)
}

fn registers<V: VmcsRead>(c: &mut Checker<'_, V>) -> Result<(), AccessError> {
    let (cr0, cr4) = (c.get(fields::HOST_CR0)?, c.get(fields::HOST_CR4)?);
    let fixed = c.caps.cr0.violations(cr0, 0) == 0;
    c.require(fixed, Rule::HostCr0Fixed, fields::HOST_CR0, cr0);
    let fixed = c.caps.cr4.violations(cr4, 0) == 0;
    c.require(fixed, Rule::HostCr4Fixed, fields::HOST_CR4, cr4);
    let protected = cr4 & CR4_CET == 0 || cr0 & CR0_WP != 0;
    c.require(protected, Rule::HostCetNeedsWp, fields::HOST_CR4, cr4);
    let cr3 = c.get(fields::HOST_CR3)?;
    let inside = !c
        .caps
        .processor
        .exceeds_physical(cr3 & !cr3_lam_bits(c.caps));
    c.require(inside, Rule::HostCr3Width, fields::HOST_CR3, cr3);
    c.require_canonical(Rule::HostSysenterEsp, fields::HOST_SYSENTER_ESP)?;
    c.require_canonical(Rule::HostSysenterEip, fields::HOST_SYSENTER_EIP)?;
    let exit = c.words.exit;
    if exit.contains(ExitControls::LOAD_PERF_GLOBAL_CTRL) {
        let value = c.get(fields::HOST_PERF_GLOBAL_CTRL)?;
        let ok = value & !c.caps.processor.perf_global_ctrl == 0;
        c.require(
            ok,
            Rule::HostPerfGlobalCtrl,
            fields::HOST_PERF_GLOBAL_CTRL,
            value,
        );
    }
    if exit.contains(ExitControls::LOAD_PAT) {
        let pat = c.get(fields::HOST_PAT)?;
        c.require(is_valid_pat(pat), Rule::HostPat, fields::HOST_PAT, pat);
    }
    if exit.contains(ExitControls::LOAD_EFER) {
        let efer = c.get(fields::HOST_EFER)?;
        let field = fields::HOST_EFER;
        c.require(
            efer & !efer_bits(c.caps) == 0,
            Rule::HostEferReserved,
            field,
            efer,
        );
        let long = exit.contains(ExitControls::HOST_ADDRESS_SPACE_SIZE);
        let expected = if long { EFER_LMA | EFER_LME } else { 0 };
        c.require(
            efer & (EFER_LMA | EFER_LME) == expected,
            Rule::HostEferMode,
            field,
            efer,
        );
    }
    if exit.contains(ExitControls::LOAD_CET_STATE) {
        let value = c.get(fields::HOST_S_CET)?;
        let ok = is_valid_cet(value);
        c.require(ok, Rule::HostSCet, fields::HOST_S_CET, value);
        let ssp = c.get(fields::HOST_SSP)?;
        c.require(ssp & 3 == 0, Rule::HostSsp, fields::HOST_SSP, ssp);
    }
    if exit.contains(ExitControls::LOAD_PKRS) {
        let pkrs = c.get(fields::HOST_PKRS)?;
        c.require(pkrs >> 32 == 0, Rule::HostPkrs, fields::HOST_PKRS, pkrs);
    }
    if c.words.exit2.contains(SecondaryExitControls::LOAD_FRED) {
        c.require_fred(
            Rule::HostFred,
            [
                fields::HOST_FRED_CONFIG,
                fields::HOST_FRED_RSP1,
                fields::HOST_FRED_RSP2,
                fields::HOST_FRED_RSP3,
                fields::HOST_FRED_SSP1,
                fields::HOST_FRED_SSP2,
                fields::HOST_FRED_SSP3,
            ],
        )?;
    }
    if c.words
        .exit2
        .contains(SecondaryExitControls::LOAD_SPEC_CTRL)
    {
        let value = c.get(fields::HOST_SPEC_CTRL)?;
        let ok = value & !c.caps.processor.spec_ctrl == 0;
        c.require(ok, Rule::HostSpecCtrl, fields::HOST_SPEC_CTRL, value);
    }
    Ok(())
}

fn segments<V: VmcsRead>(c: &mut Checker<'_, V>) -> Result<(), AccessError> {
    for field in [
        fields::HOST_ES_SELECTOR,
        fields::HOST_CS_SELECTOR,
        fields::HOST_SS_SELECTOR,
        fields::HOST_DS_SELECTOR,
        fields::HOST_FS_SELECTOR,
        fields::HOST_GS_SELECTOR,
        fields::HOST_TR_SELECTOR,
    ] {
        let selector = c.get(field)?;
        c.require(
            selector & 7 == 0,
            Rule::HostSelectorRplTi,
            field,
            selector.into(),
        );
    }
    let cs = c.get(fields::HOST_CS_SELECTOR)?;
    c.require(
        cs != 0,
        Rule::HostCsNull,
        fields::HOST_CS_SELECTOR,
        cs.into(),
    );
    let tr = c.get(fields::HOST_TR_SELECTOR)?;
    c.require(
        tr != 0,
        Rule::HostTrNull,
        fields::HOST_TR_SELECTOR,
        tr.into(),
    );
    let ss = c.get(fields::HOST_SS_SELECTOR)?;
    let long = c.words.exit.contains(ExitControls::HOST_ADDRESS_SPACE_SIZE);
    c.require(
        long || ss != 0,
        Rule::HostSsNull,
        fields::HOST_SS_SELECTOR,
        ss.into(),
    );
    for field in [
        fields::HOST_FS_BASE,
        fields::HOST_GS_BASE,
        fields::HOST_GDTR_BASE,
        fields::HOST_IDTR_BASE,
        fields::HOST_TR_BASE,
    ] {
        c.require_canonical(Rule::HostBaseCanonical, field)?;
    }
    Ok(())
}

fn address_space<V: VmcsRead>(c: &mut Checker<'_, V>) -> Result<(), AccessError> {
    let long_host = c.words.exit.contains(ExitControls::HOST_ADDRESS_SPACE_SIZE);
    let long_guest = c.long_mode_guest();
    let (field, value) = (fields::EXIT_CONTROLS, u64::from(c.words.exit.bits()));
    if c.context.long_mode {
        c.require(long_host, Rule::HostAddressSpaceFromLong, field, value);
    } else {
        let ok = !long_host && !long_guest;
        c.require(ok, Rule::HostLongModeFromLegacy, field, value);
    }
    let cr4 = c.get(fields::HOST_CR4)?;
    let rip = c.get(fields::HOST_RIP)?;
    if long_host {
        c.require(cr4 & CR4_PAE != 0, Rule::LongHostPae, fields::HOST_CR4, cr4);
        let bits = if cr4 & CR4_LA57 != 0 { 57 } else { 48 };
        let ok = Processor::is_canonical(rip, bits);
        c.require(ok, Rule::LongHostRip, fields::HOST_RIP, rip);
    } else {
        let entry = u64::from(c.words.entry.bits());
        c.require(
            !long_guest,
            Rule::LegacyHostLongGuest,
            fields::ENTRY_CONTROLS,
            entry,
        );
        c.require(
            cr4 & CR4_PCIDE == 0,
            Rule::LegacyHostPcide,
            fields::HOST_CR4,
            cr4,
        );
        c.require(
            cr4 & CR4_FRED == 0,
            Rule::LegacyHostFred,
            fields::HOST_CR4,
            cr4,
        );
        c.require(rip >> 32 == 0, Rule::LegacyHostRip, fields::HOST_RIP, rip);
    }
    if c.words.exit.contains(ExitControls::LOAD_CET_STATE) {
        for field in [fields::HOST_S_CET, fields::HOST_SSP] {
            let value = c.get(field)?;
            if long_host {
                c.require(c.is_canonical(value), Rule::LongHostCet, field, value);
            } else {
                c.require(value >> 32 == 0, Rule::LegacyHostCet, field, value);
            }
        }
        let rule = Rule::HostInterruptSspTable;
        c.require_canonical(rule, fields::HOST_INTERRUPT_SSP_TABLE)?;
    }
    Ok(())
}
