//! How often each rule was seen satisfied, and violated alone.

use testudo_rt::println;
use testudo_vmx::check::{Rule, Violations};

/// The counts of one rule.
#[derive(Clone, Copy, Default)]
struct Counts {
    /// States that entered and to which the rule applied.
    satisfied: u64,
    /// States in which it was the only rule violated.
    alone: u64,
    /// Of those, the ones that the processor rejected.
    rejected: u64,
}

/// The counts of all rules.
pub(crate) struct Coverage([Counts; Rule::ALL.len()]);

impl Coverage {
    pub(crate) fn new() -> Self {
        Self([Counts::default(); Rule::ALL.len()])
    }

    /// Counts a state with what the validator said of it: its fields, then memory.
    pub(crate) fn count(&mut self, found: [&Violations; 2], entered: bool) {
        let violations = found[0].len() + found[1].len();
        if violations == 0 && entered {
            for &rule in Rule::ALL {
                let applied = found[0].applied(rule) || found[1].applied(rule);
                self.0[rule as usize].satisfied += u64::from(applied);
            }
        }
        if violations == 1 {
            for rule in found[0].rules().chain(found[1].rules()) {
                let counts = &mut self.0[rule as usize];
                counts.alone += 1;
                counts.rejected += u64::from(!entered);
            }
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
                rejected,
            } = self.0[rule as usize];
            let name = rule.name();
            if reachable.contains(&rule) {
                println!("rule {name} satisfied={satisfied} alone={alone} rejected={rejected}");
            } else {
                println!("rule {name} not-here");
            }
        }
    }
}
