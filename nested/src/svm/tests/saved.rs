//! Saving and restoring at any instant, in both formats.

use super::*;
use crate::FormatError;
use crate::svm::{RestoreError, SavedGuest, SavedSvm};
use proptest::prelude::*;
use testudo_arch::Event;
use testudo_svm::event::RawEvent;
use zerocopy::IntoBytes;

fn restore(vm: &mut Vm, saved: &SavedSvm) -> Result<(), RestoreError> {
    let mut cx = Context {
        gprs: &mut vm.gprs,
        vmcb01: &mut vm.vmcb01,
        memory: &vm.memory,
        second_stage: &mut vm.stage,
    };
    vm.nested.restore(saved, &mut cx)
}

/// Another host, with the same memory.
fn elsewhere(vm: &Vm) -> Vm {
    let mut other = Vm::full();
    let mut bytes = std::vec![0; Memory::SIZE];
    vm.memory.read(Gpa(0), &mut bytes).unwrap();
    other.memory.write(Gpa(0), &bytes).unwrap();
    other.gprs = Gprs::default();
    other
}

fn vmcb02_without_clean(vm: &Vm) -> Vmcb {
    let mut vmcb = vm.nested.vmcb02().clone();
    vmcb.mark_dirty(testudo_svm::vmcb::CleanBits::all());
    vmcb
}

#[test]
fn l2_goes_on_elsewhere_as_if_nothing_had_happened() {
    let mut vm = Vm::full();
    vm.edit12(|v| {
        v.set_event_inj(RawEvent::from(Event::Interrupt(0x44)));
        v.set_nested_control(NestedControl::NP_ENABLE);
        v.set_n_cr3(0x4000);
    });
    vm.enter();
    vm.gprs.rax = 0x1234;
    vm.nested.vmcb02_mut().set_rip(0x5678);
    vm.nested.vmcb02_mut().set_lstar(0x9ABC);
    let saved = vm.nested.save(&vm.gprs, &vm.vmcb01);
    let bytes = saved.to_bytes();
    assert_eq!(SavedSvm::from_bytes(&bytes).as_ref(), Ok(&saved));

    let mut other = elsewhere(&vm);
    restore(&mut other, &saved).unwrap();
    assert_eq!(other.gprs.rax, 0x1234);
    // What the entry made fits what was saved, field by field; RAX and RSP are in the registers.
    let (here, there) = (vmcb02_without_clean(&vm), vmcb02_without_clean(&other));
    for field in Vmcb::FIELDS {
        if !["rax", "rsp"].contains(&field.name) {
            assert_eq!(here.field(field), there.field(field), "{}", field.name);
        }
    }
    // And both leave in the same way.
    for vm in [&mut vm, &mut other] {
        vm.nested.vmcb02_mut().set_exit_int_info(RawEvent::NONE);
        assert!(matches!(vm.exit(ExitCode::VMRUN, 1, 2), Handled::L1(_)));
    }
    assert_eq!(vm.vmcb12(), other.vmcb12());
    assert_eq!((vm.gprs.rax, vm.gprs.rsp), (other.gprs.rax, other.gprs.rsp));
    for field in Vmcb::FIELDS {
        if field.name != "clean" {
            assert_eq!(
                vm.vmcb01.field(field),
                other.vmcb01.field(field),
                "{}",
                field.name
            );
        }
    }
}

#[test]
fn kvms_layout_carries_the_same_but_l2s_registers() {
    let mut vm = Vm::full();
    vm.enter();
    let saved = vm.nested.save(&vm.gprs, &vm.vmcb01);
    let bytes = saved.to_kvm();
    // flags GUEST_MODE | GIF_SET, format SVM, size, the block's address.
    assert_eq!(bytes[..8], [0x01, 0x01, 1, 0, 0x80, 0x10, 0, 0]);
    assert_eq!(bytes[8..16], VMCB12.0.to_le_bytes());
    let back = SavedSvm::from_kvm(&bytes, EFER64, saved.vm_cr, saved.vm_hsave_pa).unwrap();
    let (ours, theirs) = (saved.guest.unwrap(), back.guest.unwrap());
    assert_eq!(
        (ours.block, ours.vmcb12_at),
        (theirs.block, theirs.vmcb12_at)
    );
    assert!(theirs.l2.is_none() && back.gif && back.is_enabled);
    // Outside a guest there is only the header.
    let idle = Vm::full();
    let bytes = idle.nested.save(&idle.gprs, &idle.vmcb01).to_kvm();
    assert_eq!(bytes.len(), 128);
    let back = SavedSvm::from_kvm(&bytes, EFER64, 0, 0x8000).unwrap();
    assert!(back.guest.is_none() && back.gif);
}

#[test]
fn state_that_cannot_be_is_refused() {
    let mut vm = Vm::full();
    vm.enter();
    let saved = vm.nested.save(&vm.gprs, &vm.vmcb01);
    assert_eq!(restore(&mut vm, &saved), Err(RestoreError::Busy));
    let mut bad = saved.clone();
    bad.guest.as_mut().unwrap().block.set_asid(0);
    assert!(matches!(
        restore(&mut Vm::full(), &bad),
        Err(RestoreError::Invalid(_))
    ));
    let mut bad = saved.clone();
    bad.is_enabled = false;
    assert_eq!(restore(&mut Vm::full(), &bad), Err(RestoreError::Registers));
    let mut bad = saved.clone();
    bad.vm_hsave_pa = 1;
    assert_eq!(restore(&mut Vm::full(), &bad), Err(RestoreError::Registers));
    let mut bad = saved.clone();
    bad.guest.as_mut().unwrap().vmcb12_at = Gpa(0x123);
    assert_eq!(restore(&mut Vm::full(), &bad), Err(RestoreError::Registers));

    let mut bytes = saved.to_bytes();
    bytes[8] = 9;
    assert_eq!(SavedSvm::from_bytes(&bytes), Err(FormatError::Version(9)));
    bytes[0] = b'X';
    assert_eq!(SavedSvm::from_bytes(&bytes), Err(FormatError::Kind));
    assert!(SavedSvm::from_bytes(&saved.to_bytes()[..100]).is_err());
    assert!(SavedSvm::from_kvm(&saved.to_kvm()[..130], 0, 0, 0).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    /// Whatever the bytes say, restoring contains L2 as an entry does.
    #[test]
    fn hostile_state_is_contained(changes in prop::collection::vec((0usize..5184, any::<u8>()), 0..6)) {
        let mut vm = Vm::full();
        vm.enter();
        let mut bytes = vm.nested.save(&vm.gprs, &vm.vmcb01).to_bytes();
        for (at, value) in changes {
            bytes[at] = value;
        }
        let Ok(saved) = SavedSvm::from_bytes(&bytes) else { return Ok(()) };
        let mut other = elsewhere(&vm);
        if restore(&mut other, &saved).is_ok() && other.nested.is_guest() {
            super::containment::assert_contained(&mut other);
        }
    }

    /// Any state goes through our bytes and comes back; through KVM's, all but what it sends separately.
    #[test]
    fn both_formats_carry_any_state(
        flags: [bool; 4], registers: [u64; 3], control in prop::collection::vec(any::<u8>(), 4096),
        l2 in prop::collection::vec(any::<u8>(), 1024),
    ) {
        let mut block = Box::new(Vmcb::new());
        block.as_mut_bytes().copy_from_slice(&control);
        // Only its save area is sent.
        let mut l2_block = Box::new(Vmcb::new());
        l2_block.as_mut_bytes().fill(0);
        l2_block.as_mut_bytes()[0x400..0x800].copy_from_slice(&l2);
        let [is_enabled, gif, is_guest, with_registers] = flags;
        let [vm_cr, vm_hsave_pa, at] = registers;
        let saved = SavedSvm {
            is_enabled,
            gif,
            vm_cr,
            vm_hsave_pa,
            guest: is_guest.then(|| SavedGuest {
                vmcb12_at: Gpa(at),
                block,
                l2: with_registers.then_some(l2_block),
            }),
        };
        let back = SavedSvm::from_bytes(&saved.to_bytes());
        prop_assert_eq!(back.as_ref(), Ok(&saved));
        let efer = if is_enabled { 1 << 12 } else { 0 };
        let mut theirs = SavedSvm::from_kvm(&saved.to_kvm(), efer, vm_cr, vm_hsave_pa).unwrap();
        if let (Some(theirs), Some(ours)) = (&mut theirs.guest, &saved.guest) {
            prop_assert!(theirs.l2.is_none());
            theirs.l2.clone_from(&ours.l2);
        }
        prop_assert_eq!(theirs, saved);
    }
}
