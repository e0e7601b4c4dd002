//! Saving and restoring at any instant, in both formats.

use super::*;
use crate::FormatError;
use crate::vmx::{LaunchState, RestoreError, SavedVmcs, SavedVmx, kvm_layout};
use proptest::prelude::*;

pub(super) fn save(vm: &mut Vm) -> SavedVmx {
    let mut cx = Context {
        gprs: &mut vm.gprs,
        vmcs: &mut vm.vmcs,
        memory: &vm.memory,
        second_stage: &mut vm.stage,
        msrs: &mut vm.msrs,
    };
    vm.nested.save(&mut cx).unwrap()
}

pub(super) fn restore(vm: &mut Vm, saved: &SavedVmx) -> Result<(), RestoreError> {
    let mut cx = Context {
        gprs: &mut vm.gprs,
        vmcs: &mut vm.vmcs,
        memory: &vm.memory,
        second_stage: &mut vm.stage,
        msrs: &mut vm.msrs,
    };
    vm.nested.restore(saved, &mut cx)
}

#[test]
fn every_state_of_the_machine_comes_back() {
    let mut outside = Vm::new();
    let mut vmxon = Vm::new();
    assert_eq!(
        vmxon.pointer(Instruction::Vmxon, VMXON_REGION.0),
        End::Succeed
    );
    let mut current = Vm::ready();
    let mut launched = Vm::running();
    let _ = launched.exit(BasicReason::Cpuid, 0);
    for vm in [&mut outside, &mut vmxon, &mut current, &mut launched] {
        let saved = save(vm);
        let bytes = saved.to_bytes();
        assert_eq!(SavedVmx::from_bytes(&bytes).as_ref(), Ok(&saved));
        let mut other = Vm::new();
        restore(&mut other, &saved).unwrap();
        assert_eq!(save(&mut other), saved);
    }
}

#[test]
fn l2_goes_on_elsewhere_as_if_nothing_had_happened() {
    let mut vm = Vm::running();
    vm.vmcs.l2.preset(fields::GUEST_RIP, 0x7777);
    vm.vmcs.l2.preset(fields::GUEST_GS_BASE, 0x8888);
    vm.vmcs.l2.preset(fields::GUEST_INTERRUPTIBILITY, 1);
    vm.vmcs.l2.preset(fields::GUEST_RFLAGS, 0x202);
    vm.vmcs.l2.preset(fields::ENTRY_INTERRUPTION_INFORMATION, 0);
    let saved = save(&mut vm);
    let mut other = Vm::new();
    restore(&mut other, &saved).unwrap();
    assert!(other.nested.is_guest());
    for (field, value) in vm.vmcs.l2.image().iter() {
        assert_eq!(other.vmcs.l2.image().read_raw(field), Ok(value), "{field}");
    }
    for vm in [&mut vm, &mut other] {
        assert!(matches!(vm.exit(BasicReason::Cpuid, 5), Handled::L1(_)));
    }
    for (field, value) in vm.nested.vmcs12.image.iter() {
        assert_eq!(other.get12(field), value, "{field}");
    }
    for (field, value) in vm.vmcs.l1.image().iter() {
        // L1 was at its VMRESUME there and at its start here: what an exit keeps may differ.
        let kept = ["EXIT_QUALIFICATION", "EXIT_INSTRUCTION_INFORMATION"];
        let name = field.info().unwrap().name;
        if !kept.contains(&name) {
            assert_eq!(other.vmcs.l1.image().read_raw(field), Ok(value), "{field}");
        }
    }
}

#[test]
fn kvms_layout_holds_all_its_fields_apart() {
    let mut used = std::vec![false; 4096];
    for &(slot, at) in kvm_layout::OFFSETS {
        let field = slot.field;
        for byte in &mut used[usize::from(at)..usize::from(at) + field.width().bytes()] {
            assert!(!std::mem::replace(byte, true), "{field}");
        }
    }
    // All that L1 can be offered is in it, but for fields of its own that KVM does not have.
    let caps = Vm::new().nested.caps().clone();
    for info in testudo_vmx::fields::FIELDS
        .iter()
        .filter(|f| f.exists(&caps))
    {
        let known = kvm_layout::OFFSETS
            .iter()
            .any(|(s, _)| s.field == info.encoding);
        let absent = [
            "EXECUTIVE_VMCS_POINTER",
            "GUEST_SMBASE",
            "IO_RCX",
            "IO_RSI",
            "IO_RDI",
            "IO_RIP",
        ];
        assert!(known || absent.contains(&info.name), "{}", info.name);
    }
}

#[test]
fn kvms_layout_carries_the_same() {
    let mut vm = Vm::running();
    let saved = save(&mut vm);
    let bytes = saved.to_kvm();
    assert_eq!(bytes.len(), 128 + 2 * 4096);
    assert_eq!(bytes[..4], [1, 0, 0, 0]);
    assert_eq!(bytes[8..16], VMXON_REGION.0.to_le_bytes());
    assert_eq!(bytes[16..24], REGION.0.to_le_bytes());
    let rip = vm.get12(fields::GUEST_RIP);
    assert_eq!(bytes[128 + 544..128 + 552], rip.to_le_bytes());
    let back = SavedVmx::from_kvm(&bytes).unwrap();
    assert_eq!(back.vmxon, saved.vmxon);
    assert!(back.is_guest);
    let (ours, theirs) = (saved.current.unwrap(), back.current.unwrap());
    assert_eq!(
        (ours.at, ours.launch_state),
        (theirs.at, theirs.launch_state)
    );
    for (field, value) in ours.image.iter() {
        assert_eq!(theirs.image.read_raw(field), Ok(value), "{field}");
    }
    let mut bad = bytes.clone();
    bad[0] |= 8;
    assert_eq!(SavedVmx::from_kvm(&bad), Err(FormatError::Flags(9)));
    bad = bytes;
    bad[128] = 0;
    assert!(matches!(
        SavedVmx::from_kvm(&bad),
        Err(FormatError::Version(_))
    ));
    // Only VMXON active: a header with the region and no VMCS (rust-vmm/kvm#385).
    let mut vm = Vm::new();
    assert_eq!(vm.pointer(Instruction::Vmxon, VMXON_REGION.0), End::Succeed);
    let bytes = save(&mut vm).to_kvm();
    assert_eq!(bytes.len(), 128);
    assert_eq!(bytes[16..24], [0xFF; 8]);
    assert_eq!(SavedVmx::from_kvm(&bytes).unwrap(), save(&mut vm));
}

#[test]
fn state_that_cannot_be_is_refused() {
    let mut vm = Vm::running();
    let saved = save(&mut vm);
    assert_eq!(restore(&mut vm, &saved), Err(RestoreError::Busy));
    let mut bad = saved.clone();
    bad.vmxon = None;
    assert_eq!(restore(&mut Vm::new(), &bad), Err(RestoreError::Regions));
    bad.vmxon = Some(REGION);
    assert_eq!(restore(&mut Vm::new(), &bad), Err(RestoreError::Regions));
    bad.vmxon = Some(Gpa(1));
    assert_eq!(restore(&mut Vm::new(), &bad), Err(RestoreError::Regions));
    let mut bad = saved.clone();
    bad.current = None;
    assert_eq!(restore(&mut Vm::new(), &bad), Err(RestoreError::Regions));
    let mut bad = saved;
    bad.current
        .as_mut()
        .unwrap()
        .image
        .set(fields::GUEST_RFLAGS, 0)
        .unwrap();
    assert!(matches!(
        restore(&mut Vm::new(), &bad),
        Err(RestoreError::Invalid(_))
    ));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    /// Whatever the bytes say, restoring contains L2 as an entry does.
    #[test]
    fn hostile_state_is_contained(
        changes in prop::collection::vec((0usize..4160, any::<u8>()), 0..6), as_kvm: bool,
    ) {
        let mut vm = Vm::running();
        let saved = save(&mut vm);
        let mut bytes = if as_kvm { saved.to_kvm() } else { saved.to_bytes() };
        for (at, value) in changes {
            bytes[at] = value;
        }
        let parsed = if as_kvm { SavedVmx::from_kvm(&bytes) } else { SavedVmx::from_bytes(&bytes) };
        let Ok(saved) = parsed else { return Ok(()) };
        let mut other = Vm::new();
        let host = super::containment::untouchable(&other);
        if restore(&mut other, &saved).is_ok() && other.nested.is_guest() {
            super::containment::assert_contained(&other, &host);
        }
    }

    /// Any state goes through our bytes and comes back; through KVM's, all that it has a place for.
    #[test]
    fn both_formats_carry_any_state(
        flags: [bool; 5], addresses: [u64; 3],
        values in prop::collection::vec((0..testudo_vmx::fields::FIELDS.len(), any::<u64>()), 0..64),
    ) {
        let [is_vmxon, is_current, is_guest, launched, is_enlightened] = flags;
        let [vmxon, at, assist_page] = addresses;
        let mut image = Box::new(VmcsImage::new());
        for (field, value) in values {
            image.write_raw(testudo_vmx::fields::FIELDS[field].encoding, value).unwrap();
        }
        let launch_state = if launched { LaunchState::Launched } else { LaunchState::Clear };
        let saved = SavedVmx {
            vmxon: is_vmxon.then_some(Gpa(vmxon)),
            current: is_current.then_some(SavedVmcs {
                at: Gpa(at),
                is_enlightened,
                launch_state,
                image,
            }),
            is_guest,
            assist_page,
        };
        let back = SavedVmx::from_bytes(&saved.to_bytes());
        prop_assert_eq!(back.as_ref(), Ok(&saved));
        // All ones is KVM's word for none.
        prop_assume!(vmxon != u64::MAX && at != u64::MAX);
        let theirs = SavedVmx::from_kvm(&saved.to_kvm()).unwrap();
        prop_assert_eq!((theirs.vmxon, theirs.is_guest), (saved.vmxon, is_guest));
        prop_assert_eq!(theirs.current.is_some(), is_current);
        if let (Some(theirs), Some(ours)) = (theirs.current, saved.current) {
            prop_assert_eq!(theirs.launch_state, launch_state);
            prop_assert_eq!(theirs.is_enlightened, is_enlightened);
            let place = if is_enlightened { u64::MAX } else { at };
            prop_assert_eq!(theirs.at, Gpa(place));
            for &(slot, _) in kvm_layout::OFFSETS {
                prop_assert_eq!(theirs.image.read_raw(slot.field), ours.image.read_raw(slot.field));
            }
        }
    }
}
