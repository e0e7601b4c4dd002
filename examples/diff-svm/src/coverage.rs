//! How often each rule was seen satisfied, and broken alone.

use testudo_rt::println;
use testudo_svm::check::{Rule, Violation};

/// The counts of one rule.
#[derive(Clone, Copy, Default)]
pub(crate) struct Counts {
    /// States that entered and so satisfied it.
    satisfied: u64,
    /// States in which it was the only rule broken.
    alone: u64,
    /// Of those, the ones that the processor refused.
    refused: u64,
}

/// The counts of all rules.
pub(crate) struct Coverage([Counts; Rule::ALL.len()]);

impl Coverage {
    pub(crate) fn new() -> Self {
        Self([Counts::default(); Rule::ALL.len()])
    }

    /// Counts a state with the rules that it breaks.
    pub(crate) fn count(&mut self, violations: &[Violation], entered: bool) {
        match violations {
            [] if entered => {
                for counts in &mut self.0 {
                    counts.satisfied += 1;
                }
            }
            [only] => {
                let counts = &mut self.0[only.rule as usize];
                counts.alone += 1;
                counts.refused += u64::from(!entered);
            }
            _ => {}
        }
    }

    /// How many of these rules were seen both ways.
    pub(crate) fn both_ways(&self, rules: &[Rule]) -> usize {
        let both = |rule: &&Rule| {
            let counts = self.0[**rule as usize];
            counts.satisfied > 0 && counts.alone > 0
        };
        rules.iter().filter(both).count()
    }

    /// One line for each rule.
    pub(crate) fn print(&self, reachable: &[Rule]) {
        for &rule in Rule::ALL {
            let Counts {
                satisfied,
                alone,
                refused,
            } = self.0[rule as usize];
            let name = rule.name();
            if reachable.contains(&rule) {
                println!("rule {name} satisfied={satisfied} alone={alone} refused={refused}");
            } else {
                println!("rule {name} not-here");
            }
        }
    }
}
