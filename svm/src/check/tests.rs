use super::*;
use crate::defects::Defects;
use crate::event::RawEvent;
use crate::intercept::Intercepts;
use crate::vmcb::{AvicPhysicalTable, VirtualInterrupts};
use proptest::prelude::*;
use std::string::ToString;
use std::vec;
use testudo_arch::Event;
use testudo_arch::memory::GuestRam;
use testudo_arch::segment::Segment;

/// A processor that has every feature that a rule asks for.
fn caps() -> SvmCaps {
    let mut caps = SvmCaps::ZEN4;
    caps.physical_address_bits = 48;
    caps
}

/// A guest in 64-bit mode with all features in use, which breaks no rule.
fn valid() -> Vmcb {
    let mut vmcb = Vmcb::new();
    vmcb.set_intercepts(Intercepts {
        misc1: Misc1::NMI,
        misc2: Misc2::VMRUN,
        ..Intercepts::default()
    });
    vmcb.set_asid(1);
    vmcb.set_efer(SVME | LME | LMA);
    vmcb.set_cr0(PG | PE | WP | 0x10);
    vmcb.set_cr3(0x1000);
    vmcb.set_cr4(PAE | CET);
    vmcb.set_dr6(0xFFFF_0FF0);
    vmcb.set_dr7(0x400);
    vmcb.set_rflags(2);
    let code = Segment::flat(8, SegmentAttributes::CODE64);
    vmcb.set_segment(SegmentRegister::Cs, &code);
    vmcb.set_nested_control(NestedControl::NP_ENABLE);
    vmcb.set_n_cr3(0x2000);
    vmcb.set_g_pat(0x0007_0406_0007_0406);
    let flags = VintrFlags::AVIC_ENABLE | VintrFlags::X2AVIC_ENABLE | VintrFlags::V_NMI_ENABLE;
    vmcb.set_virtual_interrupts(VirtualInterrupts::default().with_flags(flags));
    vmcb.set_avic_physical_table(AvicPhysicalTable::new(0x3000, 511));
    vmcb
}

fn check(vmcb: &Vmcb) -> Violations {
    check_vmrun(vmcb, &caps(), &Outside::default())
}

/// The change breaks this rule and no other.
#[track_caller]
fn breaks(rule: Rule, change: impl FnOnce(&mut Vmcb)) -> Violation {
    let mut vmcb = valid();
    assert!(check(&vmcb).is_empty(), "{}", check(&vmcb));
    change(&mut vmcb);
    let found = check(&vmcb);
    assert_eq!(found.len(), 1, "{found}");
    assert_eq!(found[0].rule, rule, "{found}");
    found[0]
}

/// The change is legal.
#[track_caller]
fn keeps(change: impl FnOnce(&mut Vmcb)) {
    let mut vmcb = valid();
    change(&mut vmcb);
    assert!(check(&vmcb).is_empty(), "{}", check(&vmcb));
}

#[test]
fn efer() {
    let violation = breaks(Rule::EferSvme, |v| v.set_efer(LME | LMA));
    assert_eq!(violation.value, LME | LMA);
    breaks(Rule::EferReserved, |v| v.set_efer(v.efer() | 1 << 9));
    breaks(Rule::EferReserved, |v| v.set_efer(v.efer() | 1 << 63));
    keeps(|v| v.set_efer(v.efer() | 1 | 1 << 11 | 1 << 14));
    // LMA is what the processor makes of LME and PG: VMRUN does not compare.
    keeps(|v| v.set_efer(SVME | LME));
}

#[test]
fn long_mode_needs_its_conditions() {
    breaks(Rule::LongModeNeedsPae, |v| v.set_cr4(CET));
    breaks(Rule::LongModeNeedsProtection, |v| v.set_cr0(PG | WP));
    let both = SegmentAttributes::CODE64.union(SegmentAttributes::DEFAULT_BIG);
    let cs = Segment::flat(8, both);
    breaks(Rule::CodeSegmentSize, |v| {
        v.set_segment(SegmentRegister::Cs, &cs);
    });
    // All three are about long mode only. Paged real mode is legal: 15.19.
    keeps(|v| {
        v.set_efer(SVME);
        v.set_cr0(PG | WP);
        v.set_segment(SegmentRegister::Cs, &cs);
        v.set_cr4(CET);
    });
    keeps(|v| {
        v.set_cr0(PE | WP);
        v.set_segment(SegmentRegister::Cs, &cs);
    });
    let no_long_mode = SvmCaps {
        long_mode: false,
        ..caps()
    };
    for efer in [SVME | LME, SVME | LMA] {
        let mut vmcb = valid();
        vmcb.set_efer(efer);
        let found = check_vmrun(&vmcb, &no_long_mode, &Outside::default());
        assert_eq!(found.len(), 1, "{found}");
        assert!(found.breaks(Rule::LongModeSupported));
    }
}

#[test]
fn control_and_debug_registers() {
    breaks(Rule::Cr0CacheMode, |v| v.set_cr0(v.cr0() | NW));
    keeps(|v| v.set_cr0(v.cr0() | NW | CD));
    keeps(|v| v.set_cr0(v.cr0() | CD));
    for bit in [32, 47, 63] {
        breaks(Rule::Cr0High, |v| v.set_cr0(v.cr0() | 1 << bit));
        breaks(Rule::Dr6High, |v| v.set_dr6(v.dr6() | 1 << bit));
        breaks(Rule::Dr7High, |v| v.set_dr7(v.dr7() | 1 << bit));
    }
    for bit in [48, 52, 63] {
        breaks(Rule::Cr3Reserved, |v| v.set_cr3(1 << bit));
    }
    keeps(|v| v.set_cr3((1 << 48) - 1));
    for bit in [13, 14, 15, 19, 31, 32, 63] {
        breaks(Rule::Cr4Reserved, |v| v.set_cr4(v.cr4() | 1 << bit));
    }
    keeps(|v| {
        v.set_dr6(0);
        v.set_dr7(0xFFFF_FFFF);
    });
}

#[test]
fn controls() {
    breaks(Rule::VmrunIntercept, |v| {
        v.set_intercept_misc2(Misc2::all() - Misc2::VMRUN);
    });
    breaks(Rule::AsidNotZero, |v| v.set_asid(0));
    // What lies in the ASID's number is not checked, nor TLB_CONTROL.
    keeps(|v| v.set_asid(u32::MAX));
    keeps(|v| v.set_tlb_control(crate::vmcb::TlbControl::Reserved(0xAA)));
}

#[test]
fn permission_maps_end_below_the_limit() {
    let limit = 1u64 << 48;
    keeps(|v| v.set_msrpm_base_pa(limit - 0x2000));
    keeps(|v| v.set_msrpm_base_pa(limit - 0x2000 + 0xFFF));
    breaks(Rule::MsrpmAddress, |v| v.set_msrpm_base_pa(limit - 0x1000));
    breaks(Rule::MsrpmAddress, |v| v.set_msrpm_base_pa(u64::MAX));
    keeps(|v| v.set_iopm_base_pa(limit - 0x3000 + 0xFFF));
    breaks(Rule::IopmAddress, |v| v.set_iopm_base_pa(limit - 0x2000));
    breaks(Rule::IopmAddress, |v| v.set_iopm_base_pa(1 << 63));
}

#[test]
fn injected_events() {
    let inject = |raw: u64| move |v: &mut Vmcb| v.set_event_inj(RawEvent(raw));
    for kind in [1, 5, 6, 7] {
        breaks(Rule::EventType, inject(1 << 31 | kind << 8 | 13));
    }
    for vector in [2, 9, 15, 20, 22, 27, 31, 32, 255] {
        breaks(Rule::EventVector, inject(1 << 31 | 3 << 8 | vector));
    }
    for vector in [0, 1, 3, 6, 8, 10, 13, 14, 16, 19, 21, 28, 29, 30] {
        keeps(inject(1 << 31 | 3 << 8 | vector));
    }
    for vector in [4, 5] {
        breaks(Rule::EventPossible, inject(1 << 31 | 3 << 8 | vector));
        keeps(|v| {
            v.set_event_inj(RawEvent(1 << 31 | 3 << 8 | vector));
            v.set_segment(
                SegmentRegister::Cs,
                &Segment::flat(8, SegmentAttributes::CODE32),
            );
        });
    }
    keeps(inject(1 << 8 | 13)); // not valid
    keeps(inject(RawEvent::from(Event::Nmi).0 | 0xFF));
    keeps(inject(0xFFFF_FFFF_8000_0431));
    // Which exceptions there are depends on the processor.
    let mut vmcb = valid();
    vmcb.set_cr4(PAE);
    for vector in [21, 29] {
        vmcb.set_event_inj(RawEvent(1 << 31 | 3 << 8 | vector));
        let plain = SvmCaps {
            physical_address_bits: 48,
            features: Features::NP,
            ..SvmCaps::BARCELONA
        };
        let found = check_vmrun(&vmcb, &plain, &Outside::default());
        assert!(
            found.len() == 1 && found.breaks(Rule::EventVector),
            "{found}"
        );
    }
}

#[test]
fn control_flow_enforcement() {
    breaks(Rule::SCetReserved, |v| v.set_s_cet(1 << 2));
    keeps(|v| v.set_s_cet(3));
    breaks(Rule::CetNeedsWriteProtect, |v| v.set_cr0(PG | PE));
    keeps(|v| {
        v.set_cr4(PAE);
        v.set_cr0(PG | PE);
    });
    breaks(Rule::UCetReserved, |v| {
        v.set_nested_control(v.nested_control() | NestedControl::SEV_ES);
        v.set_u_cet(1 << 4);
    });
    keeps(|v| v.set_u_cet(1 << 4)); // not an SEV-ES guest: the field is not loaded
    let mut vmcb = valid();
    vmcb.set_rflags(1 << 17);
    assert!(check(&vmcb).is_empty());
    let outside = Outside {
        u_cet: SH_STK_EN,
        ..Outside::default()
    };
    let found = check_vmrun(&vmcb, &caps(), &outside);
    assert!(
        found.len() == 1 && found.breaks(Rule::ShadowStackInVirtual8086),
        "{found}"
    );
    // A processor without CET loads none of it.
    vmcb.set_s_cet(u64::MAX);
    vmcb.set_cr4(PAE);
    let without = SvmCaps {
        cr4_valid: caps().cr4_valid & !CET,
        ..caps()
    };
    assert!(check_vmrun(&vmcb, &without, &outside).is_empty());
}

#[test]
fn nested_paging() {
    breaks(Rule::NCr3Reserved, |v| v.set_n_cr3(1 << 48));
    for bad in [2, 3, 8, 0x80] {
        breaks(Rule::GPatTypes, |v| v.set_g_pat(bad));
        breaks(Rule::GPatTypes, |v| v.set_g_pat(bad << 56));
    }
    keeps(|v| v.set_g_pat(0x0706_0504_0100_0100));
    for (place, entry) in (0..8).flat_map(|place| (0..=0xFF).map(move |entry| (place, entry))) {
        let pat = 0x0706_0504_0100_0106 & !(0xFF << (8 * place)) | entry << (8 * place);
        let defined = matches!(entry, 0 | 1 | 4..=7);
        assert_eq!(has_defined_types(pat), defined, "{pat:#x}");
    }
    keeps(|v| {
        v.set_nested_control(NestedControl::empty());
        v.set_n_cr3(u64::MAX);
        v.set_g_pat(u64::MAX);
    });
    let outside = Outside {
        host_cr0: PE,
        ..Outside::default()
    };
    let found = check_vmrun(&valid(), &caps(), &outside);
    assert!(
        found.len() == 1 && found.breaks(Rule::NestedPagingNeedsPaging),
        "{found}"
    );
}

#[test]
fn interrupt_controls() {
    let flags = |v: &mut Vmcb, flags| {
        v.set_virtual_interrupts(VirtualInterrupts::default().with_flags(flags));
    };
    breaks(Rule::X2AvicNeedsAvic, |v| {
        flags(v, VintrFlags::X2AVIC_ENABLE);
    });
    breaks(Rule::AvicBackingPage, |v| v.set_avic_backing_page(1 << 48));
    breaks(Rule::AvicLogicalTable, |v| {
        v.set_avic_logical_table(1 << 51);
    });
    breaks(Rule::AvicPhysicalTable, |v| {
        v.set_avic_physical_table(AvicPhysicalTable(1 << 48));
    });
    let table = AvicPhysicalTable::new(0x3000, 512);
    breaks(Rule::AvicMaxIndex, |v| v.set_avic_physical_table(table));
    breaks(Rule::AvicMaxIndex, |v| {
        flags(v, VintrFlags::AVIC_ENABLE);
        v.set_avic_physical_table(AvicPhysicalTable::new(0x3000, 256));
    });
    keeps(|v| {
        flags(v, VintrFlags::AVIC_ENABLE);
        v.set_avic_physical_table(AvicPhysicalTable::new(0x3000, 255));
    });
    let mut vmcb = valid();
    vmcb.set_avic_physical_table(AvicPhysicalTable::new(0x3000, 4095));
    let extended = SvmCaps {
        x2avic_extended: true,
        ..caps()
    };
    assert!(check_vmrun(&vmcb, &extended, &Outside::default()).is_empty());
    keeps(|v| {
        flags(v, VintrFlags::empty());
        v.set_avic_backing_page(u64::MAX);
        v.set_avic_physical_table(AvicPhysicalTable(u64::MAX));
    });
    breaks(Rule::VnmiNeedsIntercept, |v| {
        v.set_intercept_misc1(Misc1::all() - Misc1::NMI);
    });
}

#[test]
fn features_that_are_not_there_are_not_checked() {
    let mut vmcb = valid();
    vmcb.set_cr4(PAE);
    vmcb.set_s_cet(u64::MAX);
    vmcb.set_n_cr3(u64::MAX);
    vmcb.set_avic_backing_page(u64::MAX);
    vmcb.set_intercept_misc1(Misc1::empty());
    let bare = SvmCaps {
        features: Features::empty(),
        ..SvmCaps::BARCELONA
    };
    let found = check_vmrun(&vmcb, &bare, &Outside::default());
    assert!(found.is_empty(), "{found}");
}

#[test]
fn what_is_canonicalized_is_not_checked() {
    keeps(|v| {
        let cs = Segment {
            base: 0x8000_0000_0000_0000,
            ..Segment::flat(8, SegmentAttributes::CODE64)
        };
        v.set_segment(SegmentRegister::Cs, &cs);
        v.set_rip(0x8000_0000_0000_0000);
        v.set_ssp(1 << 60);
        v.set_isst_addr(1 << 60);
    });
}

#[test]
fn page_directory_pointers() {
    let mut bytes = vec![0u64; 1024];
    let mut memory = GuestRam::new();
    #[allow(unsafe_code)]
    // SAFETY: `bytes` outlives `memory`, and nothing else refers to it.
    unsafe { memory.add(Gpa(0x1000), bytes.as_mut_ptr().cast(), 8192, true) }.unwrap();
    let mut vmcb = Vmcb::new();
    vmcb.set_cr0(PG | PE);
    vmcb.set_cr4(PAE);
    vmcb.set_cr3(0x1FE0);
    let caps = caps();
    let on = |vmcb: &Vmcb, defects| {
        check_pdpes(vmcb, &caps, defects, &memory).map(|v| v.map(|v| v.value))
    };
    let check = |vmcb: &Vmcb| on(vmcb, Defects::empty());
    assert_eq!(check(&vmcb), Ok(None));
    for reserved in [1 << 1, 1 << 2, 1 << 5, 1 << 8, 1 << 48, 1 << 63] {
        memory.store_u64(Gpa(0x1FF8), reserved).unwrap();
        assert_eq!(check(&vmcb), Ok(None), "not present");
        memory.store_u64(Gpa(0x1FF8), reserved | 1).unwrap();
        assert_eq!(check(&vmcb), Ok(Some(reserved | 1)));
        let marked = (reserved != ACCESSED).then_some(reserved | 1);
        assert_eq!(on(&vmcb, Defects::MARKS_PDPES), Ok(marked));
    }
    let mut long = vmcb.clone();
    long.set_efer(LME);
    assert_eq!(check(&long), Ok(None));
    let mut nested = vmcb.clone();
    nested.set_nested_control(NestedControl::NP_ENABLE);
    assert_eq!(check(&nested), Ok(None));
    vmcb.set_cr3(0x8_0000);
    assert!(check(&vmcb).is_err());
}

#[test]
fn several_violations_are_all_named() {
    let found = check_vmrun(&Vmcb::new(), &caps(), &Outside::default());
    let rules: vec::Vec<_> = found.iter().map(|v| v.rule).collect();
    assert_eq!(
        rules,
        [Rule::EferSvme, Rule::VmrunIntercept, Rule::AsidNotZero]
    );
    assert_eq!(found.to_string().lines().count(), 3);
    assert!(
        found
            .to_string()
            .starts_with("efer = 0x0: EFER.SVME must be set")
    );
}

#[test]
fn every_rule_is_about_a_field_that_exists() {
    for rule in Rule::ALL {
        let known = Vmcb::FIELDS.iter().any(|f| f.name == rule.field());
        // A segment, and a table in memory.
        assert!(known || matches!(rule.field(), "cs" | "pdpe"), "{rule:?}");
        assert!(rule.section().starts_with("15."));
    }
}

proptest! {
    /// Whatever a guest hypervisor writes: no panic, and each rule at most once.
    #[test]
    fn any_page_is_checked(page in proptest::collection::vec(any::<u8>(), 4096), cr0: u64, u_cet: u64) {
        use zerocopy::IntoBytes;
        let mut vmcb = Vmcb::new();
        vmcb.as_mut_bytes().copy_from_slice(&page);
        let outside = Outside { host_cr0: cr0, u_cet };
        for caps in [SvmCaps::BARCELONA, SvmCaps::ZEN2, SvmCaps::ZEN4, SvmCaps::QEMU_TCG] {
            let found = check_vmrun(&vmcb, &caps, &outside);
            for pair in found.windows(2) {
                prop_assert!(pair[0].rule < pair[1].rule);
            }
        }
    }

    /// A single flipped bit of a valid VMCB breaks rules about its own field only.
    #[test]
    fn one_bit_breaks_few_rules(field in 0..Vmcb::FIELDS.len(), bit in 0u32..64) {
        let field = &Vmcb::FIELDS[field];
        let mut vmcb = valid();
        vmcb.set_field(field, vmcb.field(field) ^ 1 << (bit % (8 * u32::from(field.size))));
        let found = check(&vmcb);
        prop_assert!(found.len() <= 2, "{}", found);
    }
}
