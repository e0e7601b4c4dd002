use super::*;
use proptest::prelude::*;
use std::format;
use std::vec::Vec;
use testudo_arch::regs::{SegmentRegister, SystemRegisters};
use testudo_arch::segment::{DescriptorTable, Segment, SegmentAttributes};

/// The bytes of a VMCB at an offset.
fn bytes(vmcb: &Vmcb, offset: usize, len: usize) -> &[u8] {
    &vmcb.as_bytes()[offset..offset + len]
}

#[test]
fn golden_bytes() {
    // Offsets as Linux and QEMU use them, from the manual's tables B-1 and B-2.
    let mut vmcb = Vmcb::new();
    vmcb.set_intercept_misc1(Misc1::CPUID | Misc1::SHUTDOWN);
    vmcb.set_iopm_base_pa(0x1122_3344_5566_7000);
    vmcb.set_asid(0x0102_0304);
    vmcb.set_tlb_control(TlbControl::FlushAsid);
    vmcb.set_n_cr3(0xAABB_C000);
    vmcb.set_cpl(3);
    vmcb.set_efer(0x1D01);
    vmcb.set_cr0(0x8005_0033);
    vmcb.set_rip(0x1000);
    vmcb.set_rax(0x77);
    vmcb.set_g_pat(0x0007_0406_0007_0406);
    let code = Segment::flat(8, SegmentAttributes::CODE64);
    vmcb.set_segment(SegmentRegister::Cs, &code);
    assert_eq!(bytes(&vmcb, 0x00C, 4), [0, 0, 4, 0x80]);
    assert_eq!(
        bytes(&vmcb, 0x040, 8),
        [0, 0x70, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11]
    );
    assert_eq!(bytes(&vmcb, 0x058, 5), [4, 3, 2, 1, 3]);
    assert_eq!(bytes(&vmcb, 0x0B0, 4), [0, 0xC0, 0xBB, 0xAA]);
    assert_eq!(
        bytes(&vmcb, 0x410, 16),
        [
            8, 0, 0x9B, 0xA, 0xFF, 0xFF, 0xFF, 0xFF, 0, 0, 0, 0, 0, 0, 0, 0
        ]
    );
    assert_eq!(bytes(&vmcb, 0x4CB, 1), [3]);
    assert_eq!(bytes(&vmcb, 0x4D0, 2), [1, 0x1D]);
    assert_eq!(bytes(&vmcb, 0x558, 4), [0x33, 0, 5, 0x80]);
    assert_eq!(bytes(&vmcb, 0x578, 2), [0, 0x10]);
    assert_eq!(bytes(&vmcb, 0x5F8, 1), [0x77]);
    assert_eq!(bytes(&vmcb, 0x668, 3), [6, 4, 7]);
}

#[test]
fn fields_are_sorted_and_disjoint() {
    for pair in Vmcb::FIELDS.windows(2) {
        assert!(pair[0].offset + pair[0].size <= pair[1].offset, "{pair:?}");
        assert_eq!(pair[1].offset % pair[1].size, 0, "{pair:?}");
    }
}

#[test]
fn each_setter_clears_exactly_its_clean_bit() {
    for field in Vmcb::FIELDS {
        if field.name == "clean" {
            continue;
        }
        let mut vmcb = Vmcb::new();
        vmcb.mark_clean();
        vmcb.set_field(field, 1);
        assert_eq!(
            vmcb.clean(),
            CleanBits::all() - field.clean,
            "{}",
            field.name
        );
    }
    let mut vmcb = Vmcb::new();
    vmcb.mark_clean();
    vmcb.set_gdtr(DescriptorTable { base: 1, limit: 2 });
    vmcb.set_segment(SegmentRegister::Ds, &Segment::default());
    vmcb.set_asid(1);
    let dirty = CleanBits::DESCRIPTOR_TABLES | CleanBits::SEGMENTS | CleanBits::ASID;
    assert_eq!(vmcb.clean(), CleanBits::all() - dirty);
    vmcb.mark_clean();
    vmcb.set_rip(1);
    vmcb.set_event_inj(RawEvent(1 << 31));
    vmcb.set_tlb_control(TlbControl::FlushAll);
    assert_eq!(vmcb.clean(), CleanBits::all(), "every VMRUN loads these");
}

#[test]
fn instruction_bytes_are_bounded_by_their_count() {
    let mut vmcb = Vmcb::new();
    vmcb.set_instruction_bytes(&[0x0F, 0xA2]);
    assert_eq!(vmcb.instruction_bytes(), [0x0F, 0xA2]);
    vmcb.set_bytes_fetched(0xFF);
    assert_eq!(vmcb.instruction_bytes().len(), 15);
    let many: Vec<u8> = (0..32).collect();
    vmcb.set_instruction_bytes(&many);
    assert_eq!(vmcb.instruction_bytes(), &many[..15]);
}

#[test]
fn the_privilege_level_is_a_field_of_its_own() {
    let mut vmcb = Vmcb::new();
    let mut state = SystemRegisters::reset();
    state.cr0 = 0x8000_0011;
    state.efer = 0x1500;
    state.cs = Segment::flat(0x33, SegmentAttributes::CODE64.with_dpl(3));
    state.ss = Segment::flat(0x2B, SegmentAttributes::DATA.with_dpl(3));
    vmcb.set_system_registers(&state);
    assert_eq!(vmcb.cpl(), 3);
    // SYSRET on AMD leaves SS.DPL alone; what counts is the CPL field.
    let kernel = Segment::flat(0x2B, SegmentAttributes::DATA);
    vmcb.set_segment(SegmentRegister::Ss, &kernel);
    assert_eq!(vmcb.system_registers().cpl(), 3);
    assert_eq!(vmcb.segment(SegmentRegister::Ss), kernel);
}

#[test]
fn reset_state_converts() {
    let mut vmcb = Vmcb::new();
    vmcb.set_system_registers(&SystemRegisters::reset());
    assert_eq!(vmcb.system_registers(), SystemRegisters::reset());
    assert_eq!(vmcb.segment(SegmentRegister::Cs).base, 0xFFFF_0000);
    assert_eq!(vmcb.cpl(), 0);
}

#[test]
fn debug_shows_what_is_set() {
    let mut vmcb = Vmcb::new();
    vmcb.set_exit_code(0x72);
    vmcb.set_segment(
        SegmentRegister::Cs,
        &Segment::flat(8, SegmentAttributes::CODE64),
    );
    let text = format!("{vmcb:?}");
    assert!(text.contains("0x070 exit_code              0x72"), "{text}");
    assert!(text.contains("0x0008 attributes 0xa9b"), "{text}");
    assert!(!text.contains("asid"), "{text}");
}

fn segment() -> impl Strategy<Value = Segment> {
    (any::<u16>(), 0u16..0x1000, any::<u32>(), any::<u64>()).prop_map(
        |(selector, attributes, limit, base)| Segment {
            selector,
            attributes: SegmentAttributes::from_svm(attributes),
            limit,
            base,
        },
    )
}

proptest! {
    #[test]
    fn segments_round_trip(segment in segment()) {
        let mut vmcb = Vmcb::new();
        for register in [SegmentRegister::Es, SegmentRegister::Cs, SegmentRegister::Ss,
            SegmentRegister::Ds, SegmentRegister::Fs, SegmentRegister::Gs,
            SegmentRegister::Ldtr, SegmentRegister::Tr] {
            vmcb.set_segment(register, &segment);
            prop_assert_eq!(vmcb.segment(register), segment);
        }
    }

    #[test]
    fn fields_round_trip(which in 0..Vmcb::FIELDS.len(), value: u64) {
        let field = &Vmcb::FIELDS[which];
        let mut vmcb = Vmcb::new();
        vmcb.set_field(field, value);
        let mask = u64::MAX >> (64 - 8 * u32::from(field.size));
        prop_assert_eq!(vmcb.field(field), value & mask);
        let others: u64 = Vmcb::FIELDS.iter().filter(|f| *f != field).map(|f| vmcb.field(f)).sum();
        prop_assert_eq!(others, 0);
    }

    #[test]
    fn any_page_of_guest_memory_is_a_vmcb(page in proptest::collection::vec(any::<u8>(), 4096)) {
        let mut vmcb = Vmcb::new();
        vmcb.as_mut_bytes().copy_from_slice(&page);
        prop_assert_eq!(vmcb.as_bytes(), &page[..]);
        let registers = vmcb.system_registers();
        prop_assert_eq!(registers.cr8, u64::from(page[0x60] & 0xF));
        prop_assert!(vmcb.instruction_bytes().len() <= 15);
    }

    #[test]
    fn virtual_interrupt_word_round_trips(flags: u64, tpr in 0u8..16, prio in 0u8..16, vector: u8) {
        let flags = VintrFlags::from_bits_truncate(flags);
        let word = VirtualInterrupts::default()
            .with_flags(flags).with_tpr(tpr).with_priority(prio).with_vector(vector);
        prop_assert_eq!(word.flags(), flags);
        prop_assert_eq!((word.tpr(), word.priority(), word.vector()), (tpr, prio, vector));
    }

    #[test]
    fn tlb_control_round_trips(raw: u8) {
        prop_assert_eq!(TlbControl::from_raw(raw).to_raw(), raw);
    }
}
