//! Where the emulator differs from the manual: each entry with the manual's sentence.
//!
//! A disagreement is explained if the validator, seeing the state through all entries that apply,
//! comes to what the processor did. Nothing else is forgiven.

use testudo_rt::port;
use testudo_vmx::check::{Outcome, Rule};
use testudo_vmx::controls::{ControlWord, EntryControls, PinControls, PrimaryControls};
use testudo_vmx::event::{EventType, InterruptionInformation};
use testudo_vmx::exit::GuestStateFailure;
use testudo_vmx::fields;
use testudo_vmx::image::VmcsImage;
use testudo_vmx::{Field, VmcsRead, VmcsWrite, VmxCaps};

/// What an emulator does otherwise than the manual says.
pub(crate) enum Kind {
    /// It does not enforce a rule in such states.
    Ignores(Rule, fn(&VmcsImage, &VmxCaps) -> bool),
    /// It sees a field otherwise than it is.
    Sees(fn(&mut VmcsImage)),
    /// It rejects such states, which violate no rule, as if guest state were invalid.
    Rejects(fn(&VmcsImage) -> bool),
    /// It reports a violation of the rule in another way.
    Reports(Rule, Outcome),
    /// It stops, or never exits, in such states, so that they are not tried.
    Stops(fn(&VmcsImage, &VmxCaps) -> bool),
}

/// A documented defect.
pub(crate) struct Defect {
    pub(crate) name: &'static str,
    /// What the manual says (SDM vol. 3C, by the sections of the editions since 2025).
    #[expect(dead_code, reason = "the reason of the entry, for its reader")]
    pub(crate) manual: &'static str,
    pub(crate) kind: Kind,
}

/// Whether this is Bochs, whose debug console answers; compared with version 2.7.
pub(crate) fn is_bochs() -> bool {
    // SAFETY: reading the debug console's port has no effect; without one it reads as ones.
    unsafe { port::read_u8(0xE9) == 0xE9 }
}

fn word<W: testudo_vmx::encoding::Width>(vmcs: &VmcsImage, field: Field<W>) -> u64 {
    // An image has every field of the table.
    vmcs.get(field).map(Into::into).unwrap_or_default()
}

fn always(_: &VmcsImage, _: &VmxCaps) -> bool {
    true
}

fn long_mode(vmcs: &VmcsImage) -> bool {
    let entry = EntryControls::from_u64(word(vmcs, fields::ENTRY_CONTROLS));
    entry.contains(EntryControls::IA32E_MODE_GUEST)
}

fn code64(vmcs: &VmcsImage) -> bool {
    long_mode(vmcs) && word(vmcs, fields::GUEST_CS_ACCESS_RIGHTS) & (1 << 13) != 0
}

fn virtual8086(vmcs: &VmcsImage) -> bool {
    word(vmcs, fields::GUEST_RFLAGS) & (1 << 17) != 0
}

fn activity(vmcs: &VmcsImage) -> u64 {
    word(vmcs, fields::GUEST_ACTIVITY_STATE)
}

fn event(vmcs: &VmcsImage) -> Option<(EventType, u8)> {
    let raw = word(vmcs, fields::ENTRY_INTERRUPTION_INFORMATION) as u32;
    let information = InterruptionInformation(raw);
    let event = (information.event_type(), information.vector());
    information.is_valid().then_some(event)
}

fn timer(vmcs: &VmcsImage) -> bool {
    let pin = PinControls::from_u64(word(vmcs, fields::PIN_CONTROLS));
    pin.contains(PinControls::ACTIVATE_PREEMPTION_TIMER)
}

fn set(vmcs: &mut VmcsImage, field: Field<u32>, value: u64) {
    let written = vmcs.set(field, value as u32);
    debug_assert!(written.is_ok());
}

const DATA_SEGMENTS: [(Field<u16>, Field<u32>); 4] = [
    (fields::GUEST_DS_SELECTOR, fields::GUEST_DS_ACCESS_RIGHTS),
    (fields::GUEST_ES_SELECTOR, fields::GUEST_ES_ACCESS_RIGHTS),
    (fields::GUEST_FS_SELECTOR, fields::GUEST_FS_ACCESS_RIGHTS),
    (fields::GUEST_GS_SELECTOR, fields::GUEST_GS_ACCESS_RIGHTS),
];

const OTHER_EVENT: &str = "29.2.1.3: the event type (bits 10:8) is not set to a reserved value; value 7 \
                           (other event) is reserved on logical processors that support neither the \
                           1-setting of the \"monitor trap flag\" VM-execution control nor FRED \
                           transitions. (Bochs lets it pass, and panics when it comes to the \
                           injection.)";

fn other_event_without_trap_flag(vmcs: &VmcsImage, caps: &VmxCaps) -> bool {
    let trap_flag = caps.primary.allows(PrimaryControls::MONITOR_TRAP_FLAG);
    !trap_flag && matches!(event(vmcs), Some((EventType::Other, _)))
}

/// The defects of Bochs 2.7.
pub(crate) const DEFECTS: &[Defect] = &[
    Defect {
        name: "ErrorCodeOfAnyEvent",
        manual: "29.2.1.3: the deliver-error-code bit is 0 if the event type is not hardware exception, \
                 or if the \"unrestricted guest\" VM-execution control is 1 and bit 0 (CR0.PE) is clear \
                 in the CR0 field: IA32_VMX_BASIC bit 56 frees the vector alone. (With that bit Bochs \
                 checks nothing of it.)",
        kind: Kind::Ignores(Rule::EventErrorCodeDelivery, |_, caps| {
            caps.basic.any_error_code()
        }),
    },
    Defect {
        name: "HostShadowStacksWithoutWp",
        manual: "29.2.2: If bit 23 in the CR4 field (corresponding to CET) is 1, bit 16 in the CR0 \
                 field (WP) must also be 1.",
        kind: Kind::Ignores(Rule::HostCetNeedsWp, always),
    },
    Defect {
        name: "LongModeWithoutPaging",
        manual: "29.3.1.1: If the \"IA-32e mode guest\" VM-entry control is 1, bit 31 in the CR0 field \
                 (corresponding to CR0.PG) and bit 5 in the CR4 field (corresponding to CR4.PAE) must \
                 each be 1. (Bochs looks at CR4 alone.)",
        kind: Kind::Ignores(Rule::GuestLongModeNeedsPaging, |vmcs, _| {
            word(vmcs, fields::GUEST_CR4) & (1 << 5) != 0
        }),
    },
    Defect {
        name: "RipNotChecked",
        manual: "29.3.1.4: If the processor supports N < 64 linear-address bits, bits 63:N must be \
                 identical if the \"IA-32e mode guest\" VM-entry control is 1 and the L bit in the \
                 access-rights field for CS is 1.",
        kind: Kind::Ignores(Rule::RipCanonical, always),
    },
    Defect {
        name: "DebugctlNotChecked",
        manual: "29.3.1.1: If the \"load debug controls\" VM-entry control is 1, bits reserved in \
                 the IA32_DEBUGCTL MSR must be 0 in the field for that register.",
        kind: Kind::Ignores(Rule::GuestDebugctl, always),
    },
    Defect {
        name: "HostPerfGlobalCtrlNotChecked",
        manual: "29.2.2: If the \"load IA32_PERF_GLOBAL_CTRL\" VM-exit control is 1, bits reserved in \
                 the IA32_PERF_GLOBAL_CTRL MSR must be 0 in the field for that register.",
        kind: Kind::Ignores(Rule::HostPerfGlobalCtrl, always),
    },
    Defect {
        name: "GuestPerfGlobalCtrlNotChecked",
        manual: "29.3.1.1: If the \"load IA32_PERF_GLOBAL_CTRL\" VM-entry control is 1, bits reserved \
                 in the IA32_PERF_GLOBAL_CTRL MSR must be 0 in the field for that register.",
        kind: Kind::Ignores(Rule::GuestPerfGlobalCtrl, always),
    },
    Defect {
        name: "NullStackSegmentNotChecked",
        manual: "29.3.1.2: SS: if SS is usable, the Type must be 3 or 7; S and P must be 1 if the \
                 register is usable, and so on; usable is a register whose unusable bit (bit 16) is 0, \
                 whatever its selector. (Bochs takes a null selector in 64-bit mode for unusable.)",
        kind: Kind::Sees(|vmcs| {
            let rights = word(vmcs, fields::GUEST_SS_ACCESS_RIGHTS);
            let null = word(vmcs, fields::GUEST_SS_SELECTOR) >> 2 == 0;
            if null && code64(vmcs) && !virtual8086(vmcs) && rights & (1 << 16) == 0 {
                set(
                    vmcs,
                    fields::GUEST_SS_ACCESS_RIGHTS,
                    rights & 0x60 | 1 << 16,
                );
            }
        }),
    },
    Defect {
        name: "ReadableCodeAsDataNotChecked",
        manual: "29.3.1.2: DS, ES, FS and GS: the DPL cannot be less than the RPL in the selector \
                 field if the \"unrestricted guest\" VM-execution control is 0, the register is usable, \
                 and the Type in the access-rights field is in the range 0 - 11 (data segment or \
                 non-conforming code segment). (Bochs leaves out 11.)",
        kind: Kind::Sees(|vmcs| {
            for (selector, rights) in DATA_SEGMENTS {
                if word(vmcs, rights) & 0xF == 11 && !virtual8086(vmcs) {
                    let aligned = word(vmcs, selector) & !3;
                    let written = vmcs.set(selector, aligned as u16);
                    debug_assert!(written.is_ok());
                }
            }
        }),
    },
    Defect {
        name: "CodePrivilegeBySelector",
        manual: "29.3.1.2: CS: if the Type is 9 or 11 (non-conforming code segment), the DPL must \
                 equal the DPL in the access-rights field for SS; if 13 or 15, it cannot be greater \
                 than it. (Bochs compares with the RPL of CS.)",
        kind: Kind::Ignores(Rule::CsDpl, |vmcs, _| {
            word(vmcs, fields::GUEST_CS_ACCESS_RIGHTS) & 0xF != 3
        }),
    },
    Defect {
        name: "CodePrivilegeNotThatOfSelector",
        manual: "29.3.1.2 has no rule for the RPL of CS but that it equals that of SS.",
        kind: Kind::Rejects(|vmcs| {
            let rights = word(vmcs, fields::GUEST_CS_ACCESS_RIGHTS);
            let (dpl, rpl) = (rights >> 5 & 3, word(vmcs, fields::GUEST_CS_SELECTOR) & 3);
            let wrong = match rights & 0xF {
                9 | 11 => rpl != dpl,
                13 | 15 => rpl < dpl,
                _ => false,
            };
            wrong && !virtual8086(vmcs)
        }),
    },
    Defect {
        name: "VirtualModeInRealMode",
        manual: "29.3.1.4: The VM flag (bit 17) must be 0 either if the \"IA-32e mode guest\" \
                 VM-entry control is 1 or if bit 0 in the CR0 field (corresponding to CR0.PE) is 0.",
        kind: Kind::Ignores(Rule::RflagsVm, |vmcs, _| !long_mode(vmcs)),
    },
    Defect {
        name: "HaltedEventNotChecked",
        manual: "29.3.1.5: If the valid bit in the injected-event identification field is 1, the event \
                 to be delivered must not be one that would normally be blocked while a logical \
                 processor is in the activity state; HLT: only external interrupts, NMI, hardware \
                 exceptions with vector 1 or 18, and the other event with vector 0 are allowed.",
        kind: Kind::Ignores(Rule::ActivityEvent, |vmcs, _| activity(vmcs) == 1),
    },
    Defect {
        name: "ShutdownEventByVectorAlone",
        manual: "29.3.1.5: Shutdown: only NMIs and machine-check exceptions are allowed. (Bochs \
                 allows any event with vector 18.)",
        kind: Kind::Ignores(Rule::ActivityEvent, |vmcs, _| {
            activity(vmcs) == 2 && event(vmcs).is_some_and(|(_, vector)| vector == 18)
        }),
    },
    Defect {
        name: "VirtualNmiBlockingNotChecked",
        manual: "29.3.1.5: If the \"virtual NMIs\" VM-execution control is 1, the valid bit is 1 and \
                 the event type has value 2 (NMI), bit 3 (blocking by NMI) must be 0.",
        kind: Kind::Ignores(Rule::InterruptibilityVirtualNmi, always),
    },
    Defect {
        name: "NmiUnderStiWithoutQualification",
        manual: "29.8: exit qualification 3: failure was due to an attempt to inject a non-maskable \
                 interrupt (NMI) into a guest that is blocking events through the STI blocking bit.",
        kind: Kind::Reports(
            Rule::InterruptibilityNmiSti,
            Outcome::GuestState(GuestStateFailure::Unspecified),
        ),
    },
    Defect {
        name: "PendingDebugHighHalf",
        manual: "29.3.1.5: Bits 11:4, bit 13, bit 15, and bits 63:17 (bits 31:17 on processors that \
                 do not support Intel 64 architecture) must be 0.",
        kind: Kind::Sees(|vmcs| {
            let low = word(vmcs, fields::GUEST_PENDING_DEBUG) & 0xFFFF_FFFF;
            let written = vmcs.set(fields::GUEST_PENDING_DEBUG, low);
            debug_assert!(written.is_ok());
        }),
    },
    Defect {
        name: "PendingStepNotChecked",
        manual: "29.3.1.5: If blocking by STI, blocking by MOV SS or the activity state HLT is \
                 indicated, bit 14 (BS) must be 1 if the TF flag is 1 and the BTF flag is 0, and 0 \
                 otherwise.",
        kind: Kind::Ignores(Rule::PendingDebugStep, always),
    },
    Defect {
        name: "EntryToSmm",
        manual: "29.2.1.3: If the logical processor is not in SMM, the \"entry to SMM\" and \
                 \"deactivate dual-monitor treatment\" VM-entry controls must be 0. (Bochs rejects \
                 the first later, as guest state.)",
        kind: Kind::Ignores(Rule::EntrySmmControls, |vmcs, _| {
            let entry = EntryControls::from_u64(word(vmcs, fields::ENTRY_CONTROLS));
            !entry.contains(EntryControls::DEACTIVATE_DUAL_MONITOR)
        }),
    },
    Defect {
        name: "OtherEventNotChecked",
        manual: OTHER_EVENT,
        kind: Kind::Ignores(Rule::EventType, other_event_without_trap_flag),
    },
    Defect {
        name: "OtherEventStops",
        manual: OTHER_EVENT,
        kind: Kind::Stops(other_event_without_trap_flag),
    },
    Defect {
        name: "WaitForSipiIsForever",
        manual: "28.2: start-up IPIs cause VM exits in the wait-for-SIPI state; 29.7.2: it blocks \
                 external interrupts, NMIs, INIT signals and SMIs; 29.7.4: and an expiring preemption \
                 timer does not exit from it. No other processor is here to send a start-up IPI.",
        kind: Kind::Stops(|vmcs, _| activity(vmcs) == 3 && event(vmcs).is_none()),
    },
    Defect {
        name: "SleepWithoutTimer",
        manual: "27.4.2: in the states HLT and shutdown the processor executes nothing; 29.7.2: what \
                 wakes it is an interrupt or an NMI, and none comes here. With a preemption timer, its \
                 expiry exits.",
        kind: Kind::Stops(|vmcs, _| matches!(activity(vmcs), 1 | 2) && !timer(vmcs)),
    },
];
