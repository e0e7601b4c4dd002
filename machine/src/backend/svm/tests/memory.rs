//! Guest memory that comes and goes, or is shared, under a guest of the guest's.

use super::*;

/// L2's turns would otherwise begin with an empty table as often as some page is found to be like another.
#[test]
fn what_was_composed_elsewhere_stays() {
    let gate: &Gate = Box::leak(Box::default());
    let mut vcpu = hypervisor().with_gate(gate);
    vcpu.memory.write_value(VMCB12, &vmcb12()).unwrap();
    vcpu.will_enter();
    vcpu.run_out();
    let stage = |vcpu: &mut Hypervisor| core::mem::take(&mut vcpu.nested.as_mut().unwrap().stage);
    stage(&mut vcpu);
    // By the gate, and between two exits; neighbours are one place.
    for page in [0x3000, 0x4000, 0x9000] {
        gate.note_change(Gpa(page), 0x1000);
    }
    gate.drop_translations();
    vcpu.run_out();
    let seen = stage(&mut vcpu);
    let places = [(Gpa(0x3000), 0x2000), (Gpa(0x9000), 0x1000)];
    assert_eq!((&seen.forgotten[..], seen.flushes), (&places[..], 0));
    gate.note_change(Gpa(0x20_0000), 0x20_0000);
    vcpu.forget_memory().unwrap();
    let seen = stage(&mut vcpu);
    let places = [(Gpa(0x20_0000), 0x20_0000)];
    assert_eq!((&seen.forgotten[..], seen.flushes), (&places[..], 0));
    // More than can be told apart.
    for page in 0..300 {
        gate.note_change(Gpa(page << 16), 0x1000);
    }
    vcpu.forget_memory().unwrap();
    let seen = stage(&mut vcpu);
    assert_eq!((&seen.forgotten[..], seen.flushes), (&[][..], 1));
    // Once.
    vcpu.forget_memory().unwrap();
    assert_eq!(stage(&mut vcpu).flushes, 0);
    // Nobody says where, without a gate.
    let mut vcpu = Hypervisor::running(|_| {});
    stage(&mut vcpu);
    vcpu.forget_memory().unwrap();
    assert_eq!(stage(&mut vcpu).flushes, 1);
}
