use super::*;
use crate::caps::fixtures;
use crate::controls::EntryControls;
use crate::event::InterruptionInformation;
use crate::exit::GuestStateFailure;
use crate::fake::FakeVmcs;
use crate::image::VmcsImage;
use crate::structures::MsrEntry;
use crate::vmcs::VmcsWrite;
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::string::ToString;
use std::vec::Vec;
use testudo_arch::memory::GuestRam;
use testudo_arch::{Gpa, GuestMemory, Msr};

#[test]
fn a_valid_state_violates_nothing() {
    for (name, caps) in fixtures::all() {
        let found = check_entry(&samples::valid(&caps), &caps).unwrap();
        assert!(found.is_empty(), "{name}:\n{found}");
    }
}

#[test]
fn other_modes_are_valid_too() {
    for (name, caps) in fixtures::all() {
        type Mode = fn(&mut VmcsImage, &VmxCaps) -> Result<bool, AccessError>;
        let modes: [Mode; 4] = [
            |vmcs, caps| samples::protected_mode(vmcs, caps).map(|()| true),
            |vmcs, caps| samples::virtual_8086_mode(vmcs, caps).map(|()| true),
            samples::real_mode,
            samples::enable_ept,
        ];
        for (i, mode) in modes.into_iter().enumerate() {
            let mut vmcs = samples::valid(&caps);
            let possible = mode(&mut vmcs, &caps).unwrap();
            assert!(possible || name == "nehalem", "{name}, mode {i}");
            let found = check_entry(&vmcs, &caps).unwrap();
            assert!(!possible || found.is_empty(), "{name}, mode {i}:\n{found}");
        }
    }
}

/// Real processors, and one that has everything that a rule is about.
fn processors() -> Vec<(&'static str, VmxCaps)> {
    let all = fixtures::all().into_iter();
    all.chain([("everything", fixtures::everything())])
        .collect()
}

/// A sample of a rule that reads memory: what makes a valid VMCS have to do with it, and what then
/// violates it.
struct MemorySample {
    rule: Rule,
    involve: fn(&mut VmcsImage, &VmxCaps, &GuestRam),
    violate: fn(&mut VmcsImage, &VmxCaps, &GuestRam),
}

/// Two entries at 0x1200.
fn msr_area(vmcs: &mut VmcsImage, ram: &GuestRam, second: MsrEntry) {
    vmcs.set(fields::ENTRY_MSR_LOAD_ADDRESS, 0x1200).unwrap();
    vmcs.set(fields::ENTRY_MSR_LOAD_COUNT, 2).unwrap();
    let first = MsrEntry::new(Msr::STAR, 0);
    ram.write(Gpa(0x1200), &first.to_bytes()).unwrap();
    ram.write(Gpa(0x1210), &second.to_bytes()).unwrap();
}

const MEMORY_SAMPLES: &[MemorySample] = &[
    MemorySample {
        rule: Rule::TprThresholdAboveVtpr,
        involve: |vmcs, caps, ram| {
            samples::involve(Rule::TprThresholdAboveVtpr, vmcs, caps).unwrap();
            vmcs.set(fields::VIRTUAL_APIC_ADDRESS, 0x1000).unwrap();
            vmcs.set(fields::TPR_THRESHOLD, 3).unwrap();
            ram.write(Gpa(0x1080), &[0x30]).unwrap();
        },
        violate: |_, _, ram| ram.write(Gpa(0x1080), &[0x2F]).unwrap(),
    },
    MemorySample {
        rule: Rule::LinkPointerRegion,
        involve: |vmcs, caps, ram| {
            vmcs.set(fields::VMCS_LINK_POINTER, 0x1000).unwrap();
            ram.store_u32(Gpa(0x1000), caps.basic.revision()).unwrap();
        },
        violate: |_, caps, ram| {
            let shadow = caps.basic.revision() | 1 << 31;
            ram.store_u32(Gpa(0x1000), shadow).unwrap();
        },
    },
    MemorySample {
        rule: Rule::PdpteReserved,
        involve: |vmcs, caps, ram| {
            samples::protected_mode(vmcs, caps).unwrap();
            let cr4 = vmcs.get(fields::GUEST_CR4).unwrap();
            vmcs.set(fields::GUEST_CR4, cr4 | CR4_PAE).unwrap();
            vmcs.set(fields::GUEST_CR3, 0x1100).unwrap();
            ram.store_u64(Gpa(0x1118), 0x6).unwrap();
        },
        violate: |_, _, ram| ram.store_u64(Gpa(0x1118), 0x7).unwrap(),
    },
    MemorySample {
        rule: Rule::MsrLoadRefused,
        involve: |vmcs, _, ram| msr_area(vmcs, ram, MsrEntry::new(Msr::LSTAR, 0)),
        violate: |vmcs, _, ram| msr_area(vmcs, ram, MsrEntry::new(Msr::GS_BASE, 0)),
    },
    MemorySample {
        rule: Rule::MsrValueRefused,
        involve: |vmcs, _, ram| msr_area(vmcs, ram, MsrEntry::new(Msr::LSTAR, 0)),
        violate: |vmcs, _, ram| msr_area(vmcs, ram, MsrEntry::new(Msr::LSTAR, 1 << 63)),
    },
];

#[test]
fn every_rule_is_shown_satisfied_and_violated_alone() {
    let in_memory: BTreeSet<Rule> = MEMORY_SAMPLES.iter().map(|s| s.rule).collect();
    let (mut satisfied, mut violated) = (in_memory.clone(), in_memory.clone());
    // A host of 32 bits with a guest of 64 violates a rule about the mode of the processor, too,
    // whatever mode that is.
    violated.insert(Rule::LegacyHostLongGuest);
    for (name, caps) in processors() {
        for &rule in Rule::ALL {
            let context = samples::context(rule);
            let mut vmcs = samples::valid(&caps);
            if !samples::involve(rule, &mut vmcs, &caps).unwrap() {
                continue;
            }
            let found = check_entry_from(&vmcs, &caps, &context).unwrap();
            assert!(found.is_empty(), "{name}, {rule:?}:\n{found}");
            if found.applied(rule) {
                satisfied.insert(rule);
            } else {
                assert!(in_memory.contains(&rule), "{name}, {rule:?}");
            }

            let mut vmcs = samples::valid(&caps);
            if !samples::violate(rule, &mut vmcs, &caps).unwrap() {
                continue;
            }
            let found = check_entry_from(&vmcs, &caps, &context).unwrap();
            let rules: Vec<_> = found.rules().collect();
            assert_eq!(rules, [rule], "{name}, {rule:?}:\n{found}");
            assert_eq!(found[0].outcome(), rule.outcome());
            let field = found[0].field.info().unwrap();
            assert_eq!(
                vmcs.read_raw(field.encoding),
                Ok(found[0].value),
                "{rule:?}"
            );
            violated.insert(rule);
        }
    }
    let missing = |shown: &BTreeSet<Rule>| -> Vec<Rule> {
        let all = Rule::ALL.iter().copied();
        all.filter(|rule| !shown.contains(rule)).collect()
    };
    assert_eq!(missing(&satisfied), []);
    assert_eq!(missing(&violated), []);
}

#[test]
fn every_rule_of_memory_is_shown_satisfied_and_violated_alone() {
    for (name, caps) in processors() {
        for sample in MEMORY_SAMPLES {
            let mut bytes = std::vec![0u64; 512];
            let ram = memory(&mut bytes);
            let found = |vmcs: &VmcsImage| {
                assert!(check_entry(vmcs, &caps).unwrap().is_empty());
                check_memory(vmcs, &caps, &EntryContext::default(), &ram).unwrap()
            };
            let mut vmcs = samples::valid(&caps);
            (sample.involve)(&mut vmcs, &caps, &ram);
            let satisfied = found(&vmcs);
            assert!(satisfied.is_empty(), "{name}:\n{satisfied}");
            assert!(satisfied.applied(sample.rule), "{name}, {:?}", sample.rule);
            (sample.violate)(&mut vmcs, &caps, &ram);
            let violated = found(&vmcs);
            let rules: Vec<_> = violated.rules().collect();
            assert_eq!(rules, [sample.rule], "{name}:\n{violated}");
            let outcome = match sample.rule.outcome() {
                Outcome::MsrLoading { .. } => Outcome::MsrLoading { entry: 2 },
                outcome => outcome,
            };
            assert_eq!(violated[0].outcome(), outcome);
        }
    }
}

#[test]
fn violations_come_in_the_manuals_order() {
    let caps = fixtures::everything();
    let mut vmcs = samples::valid(&caps);
    // Each alone, and all together, whatever the order in which they were made.
    let order = [
        Rule::PdpteReserved,
        Rule::GuestCr4Fixed,
        Rule::HostCsNull,
        Rule::EventType,
        Rule::VpidZero,
        Rule::PmlAddress,
        Rule::PinReserved,
    ];
    for rule in order {
        assert_eq!(samples::violate(rule, &mut vmcs, &caps), Ok(true));
    }
    let found = check_entry(&vmcs, &caps).unwrap();
    let rules: Vec<_> = found.rules().collect();
    assert!(rules.is_sorted(), "{found}");
    assert!(order.iter().all(|rule| rules.contains(rule)), "{found}");
}

#[test]
fn a_full_list_keeps_the_first_rules() {
    let mut found = Violations::default();
    for &rule in Rule::ALL.iter().rev() {
        found.push(Violation {
            rule,
            field: fields::GUEST_RIP.encoding(),
            value: 0,
            entry: 0,
        });
    }
    let first = &Rule::ALL[..Violations::MAX];
    assert!(found.rules().eq(first.iter().copied()));
    assert!(Rule::ALL.iter().all(|&rule| found.applied(rule)));
}

#[test]
fn the_checks_read_only_fields_that_the_processor_has() {
    for (name, caps) in processors() {
        let mut fake = FakeVmcs::with_caps(&caps);
        for (field, value) in samples::valid(&caps).iter() {
            fake.preset(field, value);
        }
        assert!(check_entry(&fake, &caps).unwrap().is_empty(), "{name}");
        // With every control set, allowed or not, no missing field is touched either.
        for field in [
            fields::PIN_CONTROLS,
            fields::PRIMARY_CONTROLS,
            fields::SECONDARY_CONTROLS,
            fields::EXIT_CONTROLS,
            fields::ENTRY_CONTROLS,
        ] {
            fake.preset(field, u64::MAX);
        }
        fake.preset(fields::TERTIARY_CONTROLS, u64::MAX);
        fake.preset(fields::SECONDARY_EXIT_CONTROLS, u64::MAX);
        assert!(!check_entry(&fake, &caps).unwrap().is_empty(), "{name}");
    }
}

#[test]
fn a_failed_read_is_an_error() {
    let caps = fixtures::haswell();
    let mut fake = FakeVmcs::with_caps(&caps);
    fake.fail(fields::GUEST_CR4, crate::VmFail::Invalid);
    assert!(check_entry(&fake, &caps).is_err());
}

fn legacy() -> EntryContext {
    EntryContext {
        long_mode: false,
        ..EntryContext::default()
    }
}

/// A VMCS that a processor outside IA-32e mode accepts.
fn legacy_valid(caps: &VmxCaps) -> VmcsImage {
    let mut vmcs = samples::valid(caps);
    let made = samples::violate(Rule::HostAddressSpaceFromLong, &mut vmcs, caps);
    assert_eq!(made, Ok(true));
    let found = check_entry_from(&vmcs, caps, &legacy()).unwrap();
    assert!(found.is_empty(), "{found}");
    vmcs
}

fn rules_from(vmcs: &VmcsImage, caps: &VmxCaps, context: &EntryContext) -> Vec<Rule> {
    check_entry_from(vmcs, caps, context)
        .unwrap()
        .rules()
        .collect()
}

#[test]
fn a_32_bit_host_has_its_own_rules() {
    let caps = fixtures::haswell();
    let valid = legacy_valid(&caps);

    let mut vmcs = valid.clone();
    vmcs.set(fields::HOST_SS_SELECTOR, 0).unwrap();
    assert_eq!(rules_from(&vmcs, &caps, &legacy()), [Rule::HostSsNull]);

    let mut vmcs = valid.clone();
    vmcs.set(fields::HOST_RIP, 1 << 32).unwrap();
    assert_eq!(rules_from(&vmcs, &caps, &legacy()), [Rule::LegacyHostRip]);

    let mut vmcs = valid.clone();
    vmcs.set(fields::HOST_CR4, 1 << 13 | CR4_PCIDE).unwrap();
    assert_eq!(rules_from(&vmcs, &caps, &legacy()), [Rule::LegacyHostPcide]);

    let long = samples::valid(&caps);
    assert_eq!(
        rules_from(&long, &caps, &legacy()),
        [Rule::HostLongModeFromLegacy]
    );

    let mut vmcs = long.clone();
    let exit = vmcs.get(fields::EXIT_CONTROLS).unwrap();
    let size = ExitControls::HOST_ADDRESS_SPACE_SIZE.bits();
    vmcs.set(fields::EXIT_CONTROLS, exit & !size).unwrap();
    vmcs.set(fields::HOST_RIP, 0).unwrap();
    vmcs.set(fields::HOST_SS_SELECTOR, 8).unwrap();
    vmcs.set(fields::HOST_EFER, 0).unwrap();
    let expected = [Rule::HostAddressSpaceFromLong, Rule::LegacyHostLongGuest];
    assert_eq!(rules_from(&vmcs, &caps, &EntryContext::default()), expected);
}

#[test]
fn shadow_stacks_have_the_width_of_their_mode() {
    let caps = fixtures::everything();
    let mut vmcs = legacy_valid(&caps);
    let exit = vmcs.get(fields::EXIT_CONTROLS).unwrap();
    let cet = ExitControls::LOAD_CET_STATE.bits();
    vmcs.set(fields::EXIT_CONTROLS, exit | cet).unwrap();
    vmcs.set(fields::HOST_SSP, 0xFFFF_FFF8).unwrap();
    assert_eq!(rules_from(&vmcs, &caps, &legacy()), []);
    vmcs.set(fields::HOST_SSP, 1 << 32).unwrap();
    assert_eq!(rules_from(&vmcs, &caps, &legacy()), [Rule::LegacyHostCet]);
}

#[test]
fn an_instruction_pointer_may_be_almost_canonical() {
    let caps = fixtures::haswell();
    let mut vmcs = samples::valid(&caps);
    for (rip, expected) in [
        (0x0000_8000_0000_0000, None),
        (0xFFFF_0000_0000_0000, None),
        (0x0001_0000_0000_0000, Some(Rule::RipCanonical)),
        (0x7FFF_8000_0000_0000, Some(Rule::RipCanonical)),
    ] {
        vmcs.set(fields::GUEST_RIP, rip).unwrap();
        let found = check_entry(&vmcs, &caps).unwrap();
        assert_eq!(found.rules().next(), expected, "{rip:#x}");
    }
}

#[test]
fn the_link_pointer_is_not_the_current_vmcs() {
    let caps = fixtures::haswell();
    let mut vmcs = samples::valid(&caps);
    vmcs.set(fields::VMCS_LINK_POINTER, 0x5000).unwrap();
    let context = |address| EntryContext {
        current_vmcs: Some(Hpa(address)),
        ..EntryContext::default()
    };
    assert_eq!(rules_from(&vmcs, &caps, &context(0x6000)), []);
    assert_eq!(
        rules_from(&vmcs, &caps, &context(0x5000)),
        [Rule::LinkPointerIsCurrent]
    );
}

#[test]
fn smm_frees_its_controls() {
    let caps = fixtures::haswell();
    let mut vmcs = samples::valid(&caps);
    let entry = vmcs.get(fields::ENTRY_CONTROLS).unwrap();
    let bits = entry | EntryControls::DEACTIVATE_DUAL_MONITOR.bits();
    vmcs.set(fields::ENTRY_CONTROLS, bits).unwrap();
    let context = EntryContext {
        in_smm: true,
        ..EntryContext::default()
    };
    assert_eq!(rules_from(&vmcs, &caps, &context), []);
    assert_eq!(
        rules_from(&vmcs, &caps, &EntryContext::default()),
        [Rule::EntrySmmControls]
    );
}

#[test]
fn injection_rules_follow_the_manuals_table() {
    let caps = fixtures::haswell();
    for vector in 0..=255u32 {
        for kind in 0..8 {
            for code in [0, 1 << 11] {
                let mut vmcs = samples::valid(&caps);
                let information = 1 << 31 | code | kind << 8 | vector;
                vmcs.set(fields::ENTRY_INTERRUPTION_INFORMATION, information)
                    .unwrap();
                vmcs.set(fields::ENTRY_INSTRUCTION_LENGTH, 2).unwrap();
                vmcs.set(fields::GUEST_RFLAGS, 0x202).unwrap();
                let valid = match (kind, code != 0) {
                    (0 | 4 | 5 | 6, false) => true,
                    (2, false) => vector == 2,
                    (3, true) => matches!(vector, 8 | 10..=14 | 17),
                    (3, false) => vector < 32 && !matches!(vector, 8 | 10..=14 | 17),
                    (7, false) => vector == 0,
                    _ => false,
                };
                let found = check_entry(&vmcs, &caps).unwrap();
                let information = InterruptionInformation(information);
                assert_eq!(found.is_empty(), valid, "{information:?}:\n{found}");
            }
        }
    }
}

#[test]
fn an_error_code_is_free_where_the_processor_says_so() {
    let caps = fixtures::sapphire_rapids();
    assert!(caps.basic.any_error_code());
    let mut vmcs = samples::valid(&caps);
    for information in [0x8000_0306u32, 0x8000_0B06, 0x8000_030D, 0x8000_0B0D] {
        vmcs.set(fields::ENTRY_INTERRUPTION_INFORMATION, information)
            .unwrap();
        assert!(
            check_entry(&vmcs, &caps).unwrap().is_empty(),
            "{information:#x}"
        );
    }
}

#[test]
fn outcomes_are_those_of_the_first_stage() {
    let caps = fixtures::haswell();
    let mut vmcs = samples::valid(&caps);
    for rule in [Rule::RflagsReserved, Rule::LinkPointerAddress] {
        assert_eq!(samples::violate(rule, &mut vmcs, &caps), Ok(true));
    }
    let found = check_entry(&vmcs, &caps).unwrap();
    let outcomes: Vec<_> = found.outcomes().collect();
    let link = Outcome::GuestState(GuestStateFailure::LinkPointer);
    assert_eq!(outcomes, [Outcome::GUEST, link]);
    assert_eq!(
        samples::violate(Rule::HostCsNull, &mut vmcs, &caps),
        Ok(true)
    );
    let found = check_entry(&vmcs, &caps).unwrap();
    assert_eq!(found.len(), 3);
    assert_eq!(found.outcomes().collect::<Vec<_>>(), [Outcome::HOST]);
    assert!(found.to_string().lines().count() == 3);
}

fn memory(bytes: &mut [u64]) -> GuestRam {
    let mut ram = GuestRam::new();
    let len = bytes.len() as u64 * 8;
    #[allow(unsafe_code)]
    // SAFETY: the tests keep the bytes alive and use them through the result only.
    unsafe {
        ram.add(Gpa(0x1000), bytes.as_mut_ptr().cast(), len, true)
            .unwrap();
    }
    ram
}

#[test]
fn a_trace_is_not_begun_twice() {
    let caps = fixtures::everything();
    let mut vmcs = samples::valid(&caps);
    let entry = vmcs.get(fields::ENTRY_CONTROLS).unwrap();
    let loads = EntryControls::LOAD_RTIT_CTL.bits();
    vmcs.set(fields::ENTRY_CONTROLS, entry | loads).unwrap();
    assert_eq!(rules_from(&vmcs, &caps, &EntryContext::default()), []);
    let tracing = EntryContext {
        tracing: true,
        ..EntryContext::default()
    };
    let rules = rules_from(&vmcs, &caps, &tracing);
    assert_eq!(rules, [Rule::RtitCtlWhileTracing]);
}

#[test]
fn trace_controls_have_encodings() {
    let caps = fixtures::everything();
    let accepts = |value| caps.processor.accepts_rtit_ctl(value);
    assert!(accepts(0x2C0D) && accepts(3 << 14) && accepts(2 << 32));
    assert!(!accepts(1 << 14), "an MTC period that it has not");
    assert!(!accepts(3 << 32), "an address range for nothing");
    assert!(!accepts(7 << 24), "a PSB frequency that it has not");
    let mut vmcs = samples::valid(&caps);
    let entry = vmcs.get(fields::ENTRY_CONTROLS).unwrap();
    let loads = EntryControls::LOAD_RTIT_CTL.bits();
    vmcs.set(fields::ENTRY_CONTROLS, entry | loads).unwrap();
    vmcs.set(fields::GUEST_RTIT_CTL, 1 << 14).unwrap();
    let rules = rules_from(&vmcs, &caps, &EntryContext::default());
    assert_eq!(rules, [Rule::GuestRtitCtl]);
}

#[test]
fn exceptions_nest_where_the_processor_says_so() {
    let mut caps = fixtures::sapphire_rapids();
    let mut vmcs = samples::valid(&caps);
    let information = fields::ENTRY_INTERRUPTION_INFORMATION;
    vmcs.set(information, 1 << 31 | 1 << 13 | 3 << 8 | 6)
        .unwrap();
    let context = EntryContext::default();
    assert_eq!(rules_from(&vmcs, &caps, &context), [Rule::EventNested]);
    caps.basic.0 |= 1 << 58;
    assert_eq!(rules_from(&vmcs, &caps, &context), []);
    vmcs.set(information, 1 << 31 | 1 << 13 | 2 << 8 | 2)
        .unwrap();
    assert_eq!(rules_from(&vmcs, &caps, &context), [Rule::EventNested]);
}

#[test]
fn system_calls_are_injected_where_fred_delivers_them() {
    let rules = |caps: &VmxCaps, fred: bool, vector: u32, length: u32| {
        let mut vmcs = samples::valid(caps);
        if fred {
            let cr4 = vmcs.get(fields::GUEST_CR4).unwrap();
            vmcs.set(fields::GUEST_CR4, cr4 | CR4_FRED).unwrap();
        }
        let information = 1 << 31 | 7 << 8 | vector;
        vmcs.set(fields::ENTRY_INTERRUPTION_INFORMATION, information)
            .unwrap();
        vmcs.set(fields::ENTRY_INSTRUCTION_LENGTH, length).unwrap();
        rules_from(&vmcs, caps, &EntryContext::default())
    };
    let caps = fixtures::everything();
    for vector in [1, 2] {
        assert_eq!(rules(&caps, true, vector, 2), []);
        let length = [Rule::EventInstructionLength];
        assert_eq!(rules(&caps, true, vector, 16), length);
        assert_eq!(rules(&caps, false, vector, 2), [Rule::EventVector]);
    }
    assert_eq!(rules(&caps, true, 0, 16), [], "a pending MTF exit");
    assert_eq!(rules(&caps, true, 3, 2), [Rule::EventVector]);

    // FRED without a monitor trap flag: system calls and nothing else.
    let mut caps = caps;
    let trap_flag = PrimaryControls::MONITOR_TRAP_FLAG;
    let may = caps.primary.may_be_one().difference(trap_flag);
    caps.primary = crate::caps::Allowed::new(caps.primary.must_be_one(), may);
    assert_eq!(rules(&caps, true, 1, 2), []);
    assert_eq!(rules(&caps, true, 0, 2), [Rule::EventVector]);
    let fred = crate::caps::ProcessorFeatures::FRED;
    caps.processor.features.remove(fred);
    assert_eq!(rules(&caps, false, 0, 2), [Rule::EventType]);
}

proptest! {
    #[test]
    fn no_vmcs_makes_the_checks_panic(
        writes in proptest::collection::vec((0..fields::FIELDS.len(), any::<u64>()), 1..40)
    ) {
        let mut bytes = std::vec![0x5A5A_5A5A_5A5A_5A5Au64; 512];
        let ram = memory(&mut bytes);
        for (_, caps) in processors() {
            let mut vmcs = samples::valid(&caps);
            for &(which, value) in &writes {
                vmcs.write_raw(fields::FIELDS[which].encoding, value).unwrap();
            }
            let found = check_entry(&vmcs, &caps).unwrap();
            prop_assert_eq!(found.outcomes().count() == 0, found.is_empty());
            check_memory(&vmcs, &caps, &EntryContext::default(), &ram).unwrap();
        }
    }
}
