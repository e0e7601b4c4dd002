//! Whatever a guest does, its next entry is one that a processor takes.

use super::*;

/// What a guest can do to its mode.
#[derive(Clone, Copy, Debug)]
enum Move {
    Cr0(u64),
    Cr4(u64),
    Efer(u64),
    CodeSegment(u32),
    Cr3(u64),
}

fn moves() -> impl Strategy<Value = Move> {
    let cr0 = prop::sample::subsequence(
        std::vec![0u32, 1, 2, 3, 5, 16, 18, 29, 30, 31, 31, 0, 40],
        0..8,
    );
    let cr4 = prop::sample::subsequence((0..24).collect::<Vec<u32>>(), 0..8);
    let efer = prop::sample::subsequence(std::vec![0u32, 8, 8, 10, 11, 12], 0..4);
    let set = |bits: Vec<u32>| bits.into_iter().fold(0, |all, bit| all | 1u64 << bit);
    prop_oneof![
        4 => cr0.prop_map(move |bits| Move::Cr0(set(bits))),
        4 => Just(Move::Cr0(0x8000_0011)),
        4 => cr4.prop_map(move |bits| Move::Cr4(set(bits))),
        4 => Just(Move::Cr4(0x20)),
        4 => efer.prop_map(move |bits| Move::Efer(set(bits))),
        2 => prop::sample::select(std::vec![0xA09Bu32, 0xC09B, 0x9B]).prop_map(Move::CodeSegment),
        2 => prop::sample::select(std::vec![0u64, 0x1000, 0x10_0000]).prop_map(Move::Cr3),
        1 => any::<u64>().prop_map(Move::Cr0),
        1 => any::<u64>().prop_map(Move::Cr4),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// The validator stands for the processor, so a refused entry would fail `run_out`.
    #[test]
    fn no_change_of_mode_makes_an_entry_fail(
        moves in prop::collection::vec(moves(), 1..40),
        pdptes: [u64; 4],
    ) {
        let mut vcpu = vcpu();
        for (i, pdpte) in pdptes.into_iter().enumerate() {
            vcpu.memory.store_u64(Gpa(0x1000 + 8 * i as u64), pdpte).unwrap();
        }
        for step in moves {
            match step {
                Move::Cr0(value) => vcpu.guest_moves_to(0, value),
                Move::Cr4(value) => vcpu.guest_moves_to(4, value),
                Move::Efer(value) => {
                    if vcpu.write_msr(Msr::EFER, value) == Some(false) {
                        vcpu.inject(Event::GP0);
                    }
                    vcpu.run_out();
                }
                // 64-bit code exists in IA-32e mode only.
                Move::CodeSegment(rights) if rights & 0x2000 == 0 || vcpu.mode.efer & LMA != 0 => {
                    vcpu.processor.set(fields::GUEST_CS_ACCESS_RIGHTS, rights).unwrap();
                    vcpu.run_out();
                }
                Move::CodeSegment(_) => {}
                // With PAE paging the processor refuses a CR3 whose pointers do not suit.
                Move::Cr3(_) if vcpu.mode.pae_paging() => {}
                Move::Cr3(value) => vcpu.processor.set(fields::GUEST_CR3, value).unwrap(),
            }
            let system = vcpu.system();
            prop_assert_eq!(system.efer & LMA != 0, system.efer & LME != 0 && system.cr0 >> 31 != 0);
            let hardware = vcpu.hardware(fields::GUEST_CR0);
            prop_assert_eq!(hardware & 0x6000_0000, 0);
        }
    }

    #[test]
    fn any_exit_is_an_answer_and_the_next_entry_succeeds(
        reason in 0u16..90,
        qualification: u64,
        information: u32,
        interrupted in prop_oneof![Just(0u32), any::<u8>().prop_map(|v| 0x8000_0000 | u32::from(v))],
    ) {
        let mut vcpu = vcpu();
        vcpu.set_rflags(0x202);
        vcpu.will(move |vmcs, _| {
            vmcs.preset(fields::EXIT_REASON, reason.into());
            vmcs.preset(fields::EXIT_QUALIFICATION, qualification);
            vmcs.preset(fields::EXIT_INSTRUCTION_LENGTH, 3);
            vmcs.preset(fields::EXIT_INTERRUPTION_INFORMATION, u64::from(information & 0x9FF | 0x8000_0300));
            vmcs.preset(fields::IDT_VECTORING_INFORMATION, interrupted.into());
        });
        vcpu.will_exit(BasicReason::ExternalInterrupt, 0);
        let exit = vcpu.run(&AtomicU32::new(0));
        let fine = matches!(exit, Ok(_) | Err(VcpuError::Unsupported { .. }));
        prop_assert!(fine, "{exit:?}");
    }
}
