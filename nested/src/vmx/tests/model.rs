//! The VMXON region, the current VMCS and the launch states against a model of a few lines.

use super::*;
use proptest::prelude::*;
use std::collections::HashMap;
use std::vec;

#[derive(Clone, Copy, Debug)]
enum Step {
    Vmxon(usize),
    Vmxoff,
    Vmclear(usize),
    Vmptrld(usize),
    Vmptrst,
    Write(u64),
    Read,
    Launch,
    Resume,
    Exit,
    /// L1 scribbles into the fields of a region while it may be current.
    Scribble(usize),
}

const REGIONS: [Gpa; 4] = [VMXON_REGION, REGION, OTHER, Gpa(0xB000)];

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        2 => (0usize..4).prop_map(Step::Vmxon),
        1 => Just(Step::Vmxoff),
        3 => (0usize..4).prop_map(Step::Vmclear),
        4 => (0usize..4).prop_map(Step::Vmptrld),
        1 => Just(Step::Vmptrst),
        3 => any::<u64>().prop_map(Step::Write),
        3 => Just(Step::Read),
        2 => Just(Step::Launch),
        2 => Just(Step::Resume),
        2 => Just(Step::Exit),
        1 => (0usize..4).prop_map(Step::Scribble),
    ]
}

#[derive(Debug, Default)]
struct Model {
    vmxon: Option<usize>,
    current: Option<usize>,
    launched: HashMap<usize, bool>,
    value: HashMap<usize, u64>,
    guest: bool,
}

const UD: fn() -> End = || End::Fault(testudo_arch::Event::UD.into());

impl Model {
    fn fail(&self, number: u32) -> End {
        if self.current.is_some() {
            End::Fail(number)
        } else {
            End::FailInvalid
        }
    }

    /// What the manual says happens.
    fn apply(&mut self, step: Step) -> Option<End> {
        if self.guest {
            return matches!(step, Step::Exit).then(|| {
                self.guest = false;
                End::Succeed
            });
        }
        Some(match step {
            Step::Exit => return None,
            Step::Scribble(_) => return None,
            Step::Vmxon(_) if self.vmxon.is_some() => self.fail(15),
            Step::Vmxon(region) => {
                self.vmxon = Some(region);
                self.current = None;
                End::Succeed
            }
            _ if self.vmxon.is_none() => UD(),
            Step::Vmxoff => {
                (self.vmxon, self.current) = (None, None);
                End::Succeed
            }
            Step::Vmclear(region) if Some(region) == self.vmxon => self.fail(3),
            Step::Vmclear(region) => {
                self.launched.insert(region, false);
                if self.current == Some(region) {
                    self.current = None;
                }
                End::Succeed
            }
            Step::Vmptrld(region) if Some(region) == self.vmxon => self.fail(10),
            Step::Vmptrld(region) => {
                self.current = Some(region);
                End::Succeed
            }
            Step::Vmptrst => End::Succeed,
            Step::Write(_) | Step::Read | Step::Launch | Step::Resume if self.current.is_none() => {
                End::FailInvalid
            }
            Step::Write(value) => {
                self.value.insert(self.current?, value);
                End::Succeed
            }
            Step::Read => End::Succeed,
            Step::Launch | Step::Resume => {
                let launched = self.launched.entry(self.current?).or_default();
                match (matches!(step, Step::Launch), *launched) {
                    (true, true) => End::Fail(4),
                    (false, false) => End::Fail(5),
                    _ => {
                        *launched = true;
                        self.guest = true;
                        End::Other(Outcome::Entered { halted: false })
                    }
                }
            }
        })
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]
    #[test]
    fn the_state_machine_is_the_manuals(steps in prop::collection::vec(step(), 1..60)) {
        let probe = u64::from(fields::CR3_TARGET_VALUE_3.encoding().0);
        let mut vm = Vm::new();
        let sample = samples::valid(vm.nested.caps());
        for region in REGIONS {
            let mut bytes = *sample.as_bytes();
            bytes[..4].copy_from_slice(&REVISION.to_le_bytes());
            vm.memory.write(region, &bytes).unwrap();
        }
        let mut model = Model::default();
        for step in steps {
            if let Step::Scribble(region) = step {
                // Only the region that is current: another one's fields are what it holds.
                if model.current == Some(region) {
                    vm.memory.write(REGIONS[region].wrapping_add(64), &[0xEE; 256]).unwrap();
                }
                continue;
            }
            let Some(expected) = model.apply(step) else { continue };
            let end = match step {
                Step::Vmxon(region) => vm.pointer(Instruction::Vmxon, REGIONS[region].0),
                Step::Vmxoff => vm.run(Instruction::Vmxoff),
                Step::Vmclear(region) => vm.pointer(Instruction::Vmclear, REGIONS[region].0),
                Step::Vmptrld(region) => vm.pointer(Instruction::Vmptrld, REGIONS[region].0),
                Step::Vmptrst => {
                    vm.memory_operand(OPERAND);
                    let end = vm.run(Instruction::Vmptrst);
                    let told = vm.memory.load_u64(Gpa(OPERAND)).unwrap();
                    let pointer = model.current.map_or(u64::MAX, |r| REGIONS[r].0);
                    if end == End::Succeed {
                        prop_assert_eq!(told, pointer);
                    }
                    end
                }
                Step::Write(value) => {
                    vm.gprs.rbx = value;
                    vm.field(Instruction::Vmwrite, probe)
                }
                Step::Read => {
                    let end = vm.field(Instruction::Vmread, probe);
                    if let (End::Succeed, Some(region)) = (end, model.current) {
                        let value = model.value.get(&region).copied().unwrap_or(0);
                        prop_assert_eq!(vm.gprs.rbx, value);
                    }
                    end
                }
                Step::Launch => vm.run(Instruction::Vmlaunch),
                Step::Resume => vm.run(Instruction::Vmresume),
                Step::Exit => {
                    prop_assert!(matches!(vm.exit(BasicReason::Cpuid, 0), Handled::L1(_)));
                    // L1's host state is the sample's; the tests' own page tables are elsewhere.
                    vm.vmcs.l1.preset(fields::GUEST_CR3, 0x1000);
                    End::Succeed
                }
                Step::Scribble(_) => unreachable!("above"),
            };
            prop_assert_eq!(end, expected, "{:?}", step);
            prop_assert_eq!(vm.nested.vmxon_region(), model.vmxon.map(|r| REGIONS[r]));
            prop_assert_eq!(vm.nested.current_vmcs(), model.current.map(|r| REGIONS[r]));
            prop_assert_eq!(vm.nested.is_guest(), model.guest);
        }
    }
}
