//! The checks of guest segment registers (SDM vol. 3C, 29.3.1.2).

use testudo_arch::Segment;
use testudo_arch::regs::SegmentRegister;
use testudo_arch::segment::SegmentAttributes as A;

use super::{CR0_PE, CR4_FRED, Checker, Rule};
use crate::controls::Interruptibility;
use crate::encoding::Encoding;
use crate::error::AccessError;
use crate::fields;
use crate::state::{read_segment, segment_fields};
use crate::vmcs::VmcsRead;

const RFLAGS_VM: u64 = 1 << 17;
const RFLAGS_IOPL: u64 = 3 << 12;

/// The code and data segment registers.
const ORDINARY: [SegmentRegister; 6] = [
    SegmentRegister::Cs,
    SegmentRegister::Ss,
    SegmentRegister::Ds,
    SegmentRegister::Es,
    SegmentRegister::Fs,
    SegmentRegister::Gs,
];

pub(super) fn check<V: VmcsRead>(c: &mut Checker<'_, V>) -> Result<(), AccessError> {
    let virtual8086 = c.get(fields::GUEST_RFLAGS)? & RFLAGS_VM != 0;
    let cs = read_segment(c.vmcs, SegmentRegister::Cs)?;
    let ss = read_segment(c.vmcs, SegmentRegister::Ss)?;
    let tr = read_segment(c.vmcs, SegmentRegister::Tr)?;
    let ldtr = read_segment(c.vmcs, SegmentRegister::Ldtr)?;

    let selector = fields::GUEST_TR_SELECTOR;
    c.require(
        tr.selector & 4 == 0,
        Rule::TrTi,
        selector,
        tr.selector.into(),
    );
    let selector = fields::GUEST_LDTR_SELECTOR;
    let ok = !is_usable(&ldtr) || ldtr.selector & 4 == 0;
    c.require(ok, Rule::LdtrTi, selector, ldtr.selector.into());
    if !virtual8086 && !c.unrestricted() {
        let ok = (ss.selector ^ cs.selector) & 3 == 0;
        let field = fields::GUEST_SS_SELECTOR;
        c.require(ok, Rule::SsRplEqualsCsRpl, field, ss.selector.into());
    }
    system_bases(c, &tr, &ldtr)?;
    for register in ORDINARY {
        let segment = read_segment(c.vmcs, register)?;
        if virtual8086 {
            real_segment(c, register, &segment);
        } else {
            ordinary_segment(c, register, &segment);
        }
    }
    if !virtual8086 {
        privilege(c, &cs, &ss)?;
    }
    task(c, &tr);
    local_table(c, &ldtr);
    Ok(())
}

fn is_usable(segment: &Segment) -> bool {
    !segment.attributes.contains(A::UNUSABLE)
}

/// The canonical bases: of TR, FS and GS always, of LDTR if it is usable.
fn system_bases<V: VmcsRead>(
    c: &mut Checker<'_, V>,
    tr: &Segment,
    ldtr: &Segment,
) -> Result<(), AccessError> {
    let rule = Rule::SegmentBaseCanonical;
    c.require(
        c.is_canonical(tr.base),
        rule,
        fields::GUEST_TR_BASE,
        tr.base,
    );
    c.require_canonical(rule, fields::GUEST_FS_BASE)?;
    c.require_canonical(rule, fields::GUEST_GS_BASE)?;
    let ok = !is_usable(ldtr) || c.is_canonical(ldtr.base);
    c.require(
        ok,
        Rule::LdtrBaseCanonical,
        fields::GUEST_LDTR_BASE,
        ldtr.base,
    );
    Ok(())
}

/// A segment register in virtual-8086 mode.
fn real_segment<V: VmcsRead>(c: &mut Checker<'_, V>, register: SegmentRegister, segment: &Segment) {
    let at = segment_fields(register);
    let ok = segment.base == u64::from(segment.selector) << 4;
    c.require(ok, Rule::Virtual8086Base, at.base, segment.base);
    let limit = segment.limit;
    c.require(
        limit == 0xFFFF,
        Rule::Virtual8086Limit,
        at.limit,
        limit.into(),
    );
    let rights = segment.attributes.bits();
    let field = at.access_rights;
    c.require(
        rights == 0xF3,
        Rule::Virtual8086AccessRights,
        field,
        rights.into(),
    );
}

fn ordinary_segment<V: VmcsRead>(
    c: &mut Checker<'_, V>,
    register: SegmentRegister,
    segment: &Segment,
) {
    let at = segment_fields(register);
    let (rights, base) = (segment.attributes, segment.base);
    let is_code = register == SegmentRegister::Cs;
    if is_code {
        c.require(base >> 32 == 0, Rule::CsBaseHigh, at.base, base);
    }
    if !is_code && !is_usable(segment) {
        return;
    }
    let is_data = matches!(
        register,
        SegmentRegister::Ss | SegmentRegister::Ds | SegmentRegister::Es
    );
    if is_data {
        c.require(base >> 32 == 0, Rule::DataBaseHigh, at.base, base);
    }
    let (field, value) = (Encoding::from(at.access_rights), u64::from(rights.bits()));
    let kind = rights.segment_type();
    match register {
        SegmentRegister::Cs => {
            let ok = matches!(kind, 9 | 11 | 13 | 15) || kind == 3 && c.unrestricted();
            c.require(ok, Rule::CsType, field, value);
        }
        SegmentRegister::Ss => c.require(matches!(kind, 3 | 7), Rule::SsType, field, value),
        _ => {
            let readable = !rights.contains(A::CODE) || rights.contains(A::WRITABLE);
            let ok = rights.contains(A::ACCESSED) && readable;
            c.require(ok, Rule::DataType, field, value);
            let rpl = (segment.selector & 3) as u8;
            let ok = c.unrestricted() || kind > 11 || rights.dpl() >= rpl;
            c.require(ok, Rule::DataDpl, field, value);
        }
    }
    c.require(
        rights.contains(A::CODE_OR_DATA),
        Rule::SegmentS,
        field,
        value,
    );
    c.require(
        rights.contains(A::PRESENT),
        Rule::SegmentPresent,
        field,
        value,
    );
    c.require(!has_reserved(rights), Rule::SegmentReserved, field, value);
    if is_code && c.long_mode_guest() {
        let ok = !rights.contains(A::LONG | A::DEFAULT_BIG);
        c.require(ok, Rule::CsLongAndBig, field, value);
    }
    let ok = granularity_suits(segment);
    c.require(ok, Rule::SegmentGranularity, at.limit, segment.limit.into());
}

/// Bits 11:8 and 31:17 of access rights.
fn has_reserved(rights: A) -> bool {
    rights.bits() & 0xFFFE_0F00 != 0
}

/// "If any bit in the limit field in the range 11:0 is 0, G must be 0. If any bit in the limit
/// field in the range 31:20 is 1, G must be 1."
fn granularity_suits(segment: &Segment) -> bool {
    if segment.attributes.contains(A::GRANULARITY) {
        segment.limit & 0xFFF == 0xFFF
    } else {
        segment.limit >> 20 == 0
    }
}

/// The DPL of CS and SS.
fn privilege<V: VmcsRead>(
    c: &mut Checker<'_, V>,
    cs: &Segment,
    ss: &Segment,
) -> Result<(), AccessError> {
    let (cs_dpl, ss_dpl) = (cs.attributes.dpl(), ss.attributes.dpl());
    let kind = cs.attributes.segment_type();
    let ok = match kind {
        3 => cs_dpl == 0,
        9 | 11 => cs_dpl == ss_dpl,
        13 | 15 => cs_dpl <= ss_dpl,
        _ => true,
    };
    let field = fields::GUEST_CS_ACCESS_RIGHTS;
    c.require(ok, Rule::CsDpl, field, cs.attributes.bits().into());
    let (field, value) = (
        fields::GUEST_SS_ACCESS_RIGHTS,
        u64::from(ss.attributes.bits()),
    );
    let ok = c.unrestricted() || u16::from(ss_dpl) == ss.selector & 3;
    c.require(ok, Rule::SsDplEqualsRpl, field, value);
    let real = c.get(fields::GUEST_CR0)? & CR0_PE == 0;
    let ok = ss_dpl == 0 || !(kind == 3 || real);
    c.require(ok, Rule::SsDplZero, field, value);
    if c.get(fields::GUEST_CR4)? & CR4_FRED != 0 {
        fred(c, cs, ss)?;
    }
    Ok(())
}

/// The privilege levels between which FRED moves.
fn fred<V: VmcsRead>(
    c: &mut Checker<'_, V>,
    cs: &Segment,
    ss: &Segment,
) -> Result<(), AccessError> {
    let (field, value) = (
        fields::GUEST_SS_ACCESS_RIGHTS,
        u64::from(ss.attributes.bits()),
    );
    let dpl = ss.attributes.dpl();
    c.require(matches!(dpl, 0 | 3), Rule::FredSsDpl, field, value);
    match dpl {
        0 => {
            let (field, rights) = (fields::GUEST_CS_ACCESS_RIGHTS, cs.attributes);
            let ok = rights.contains(A::LONG);
            c.require(ok, Rule::FredSupervisorCode, field, rights.bits().into());
        }
        3 => {
            let rule = Rule::FredUserState;
            let (rflags, field) = (c.get(fields::GUEST_RFLAGS)?, fields::GUEST_RFLAGS);
            c.require(rflags & RFLAGS_IOPL == 0, rule, field, rflags);
            let (state, field) = (
                c.get(fields::GUEST_INTERRUPTIBILITY)?,
                fields::GUEST_INTERRUPTIBILITY,
            );
            let blocked = Interruptibility::from_bits_retain(state)
                .contains(Interruptibility::BLOCKING_BY_STI);
            c.require(!blocked, rule, field, state.into());
        }
        _ => {}
    }
    Ok(())
}

fn task<V: VmcsRead>(c: &mut Checker<'_, V>, tr: &Segment) {
    let (field, value) = (
        fields::GUEST_TR_ACCESS_RIGHTS,
        u64::from(tr.attributes.bits()),
    );
    let kind = tr.attributes.segment_type();
    let ok = kind == 11 || kind == 3 && !c.long_mode_guest();
    c.require(ok, Rule::TrType, field, value);
    c.require(
        !tr.attributes.contains(A::CODE_OR_DATA),
        Rule::TrS,
        field,
        value,
    );
    c.require(
        tr.attributes.contains(A::PRESENT),
        Rule::TrPresent,
        field,
        value,
    );
    c.require(!has_reserved(tr.attributes), Rule::TrReserved, field, value);
    let (rule, limit) = (Rule::TrGranularity, fields::GUEST_TR_LIMIT);
    c.require(granularity_suits(tr), rule, limit, tr.limit.into());
    c.require(is_usable(tr), Rule::TrUsable, field, value);
}

fn local_table<V: VmcsRead>(c: &mut Checker<'_, V>, ldtr: &Segment) {
    if !is_usable(ldtr) {
        return;
    }
    let (field, value) = (
        fields::GUEST_LDTR_ACCESS_RIGHTS,
        u64::from(ldtr.attributes.bits()),
    );
    c.require(
        ldtr.attributes.segment_type() == 2,
        Rule::LdtrType,
        field,
        value,
    );
    c.require(
        !ldtr.attributes.contains(A::CODE_OR_DATA),
        Rule::LdtrS,
        field,
        value,
    );
    c.require(
        ldtr.attributes.contains(A::PRESENT),
        Rule::LdtrPresent,
        field,
        value,
    );
    c.require(
        !has_reserved(ldtr.attributes),
        Rule::LdtrReserved,
        field,
        value,
    );
    let (rule, limit) = (Rule::LdtrGranularity, fields::GUEST_LDTR_LIMIT);
    c.require(granularity_suits(ldtr), rule, limit, ldtr.limit.into());
}
