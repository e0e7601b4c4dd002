//! What a vCPU's exits cost, by reason.

use core::fmt;

use crate::vcpu::VmExit;

/// The reasons that are counted apart.
const NAMES: [&str; 25] = [
    "interrupted",
    "interrupt window",
    "CPUID",
    "HLT",
    "idle hint",
    "RDMSR",
    "WRMSR",
    "XSETBV",
    "port",
    "string port",
    "memory",
    "MMIO",
    "hypercall",
    "cache flush",
    "forbidden",
    "exception",
    "control register",
    "shutdown",
    "invalid state",
    "unknown",
    "delivery due",
    "APIC write",
    "end of interrupt",
    "entered halted",
    "emulated",
];

/// The place of an exit in the table.
const fn index(exit: &VmExit) -> usize {
    match exit {
        VmExit::Interrupted => 0,
        VmExit::InterruptWindow => 1,
        VmExit::Cpuid => 2,
        VmExit::Halt => 3,
        VmExit::Idle => 4,
        VmExit::ReadMsr(_) => 5,
        VmExit::WriteMsr(..) => 6,
        VmExit::SetXcr { .. } => 7,
        VmExit::Port(_) => 8,
        VmExit::StringPort(_) => 9,
        VmExit::Memory(_) => 10,
        VmExit::Mmio { .. } => 11,
        VmExit::Hypercall => 12,
        VmExit::CacheFlush => 13,
        VmExit::Forbidden => 14,
        VmExit::Exception { .. } => 15,
        VmExit::ControlRegister => 16,
        VmExit::Shutdown => 17,
        VmExit::InvalidState => 18,
        VmExit::Unknown { .. } => 19,
        VmExit::DeliveryDue => 20,
        VmExit::ApicWrite { .. } => 21,
        VmExit::EndOfInterrupt(_) => 22,
        VmExit::EnteredHalted => 23,
        VmExit::Emulate(_) => 24,
    }
}

/// Counts and ticks of the time-stamp counter by reason of exit. Waiting for something to happen
/// is not counted as cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExitStats {
    rows: [(u64, u64); NAMES.len()],
    settled: Settled,
}

/// How many kinds of exits a backend counts that the machine never sees.
const SETTLED: usize = 6;

/// Exits that a backend settled by itself, by name: those of a guest's guests, mostly. Unused places
/// have no name.
pub type Settled = [(&'static str, u64); SETTLED];

impl ExitStats {
    /// Adds one exit that took `ticks` to handle.
    #[inline]
    pub fn record(&mut self, exit: &VmExit, ticks: u64) {
        let row = &mut self.rows[index(exit)];
        row.0 = row.0.wrapping_add(1);
        row.1 = row.1.wrapping_add(ticks);
    }

    /// Adds another vCPU's figures.
    pub fn add(&mut self, other: &Self) {
        for (row, more) in self.rows.iter_mut().zip(other.rows) {
            *row = (row.0.wrapping_add(more.0), row.1.wrapping_add(more.1));
        }
        self.add_settled(&other.settled);
    }

    /// Adds exits that a backend settled by itself; all backends of a machine name them alike.
    pub fn add_settled(&mut self, settled: &Settled) {
        for (row, (name, count)) in self.settled.iter_mut().zip(settled) {
            *row = (name, row.1.wrapping_add(*count));
        }
    }

    /// How many exits there were in all.
    pub fn total(&self) -> u64 {
        self.rows.iter().fold(0, |sum, row| sum.wrapping_add(row.0))
    }

    /// The rows that are not empty: name, count, ticks.
    pub fn rows(&self) -> impl Iterator<Item = (&'static str, u64, u64)> + '_ {
        NAMES
            .iter()
            .zip(self.rows)
            .filter(|(_, row)| row.0 > 0)
            .map(|(&n, r)| (n, r.0, r.1))
    }
}

impl fmt::Display for ExitStats {
    /// A table: reason, count, share in percent, mean ticks.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let total = self.total().max(1);
        writeln!(
            f,
            "{:<18}{:>12}{:>8}{:>14}",
            "exit", "count", "share", "mean ticks"
        )?;
        for (name, count, ticks) in self.rows() {
            let permille = count.saturating_mul(1000) / total;
            let (whole, tenth) = (permille / 10, permille % 10);
            writeln!(
                f,
                "{name:<18}{count:>12}{whole:>5}.{tenth} %{:>13}",
                ticks / count
            )?;
        }
        write!(f, "{:<18}{:>12}", "all", self.total())?;
        let counted = |(name, _): &&(&str, u64)| !name.is_empty();
        for (name, count) in self.settled.iter().filter(counted) {
            write!(f, "\n{name:<18}{count:>12}  (by the backend)")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_adds_up() {
        let mut stats = ExitStats::default();
        stats.record(&VmExit::Cpuid, 10);
        stats.record(&VmExit::Cpuid, 20);
        stats.record(
            &VmExit::Unknown {
                code: 1,
                info: [0; 2],
            },
            5,
        );
        let mut all = stats;
        all.add(&stats);
        let rows: std::vec::Vec<_> = all.rows().collect();
        assert_eq!(rows, [("CPUID", 4, 60), ("unknown", 2, 10)]);
        let text = std::format!("{all}");
        assert!(text.contains("66.6 %") && text.contains("15"), "{text}");
        assert!(!text.contains("backend"), "{text}");
        let mut settled = Settled::default();
        settled[0] = ("nested entry", 3);
        all.add_settled(&settled);
        stats.add(&all);
        let text = std::format!("{stats}");
        assert!(
            text.contains("nested entry") && text.contains("3  (by"),
            "{text}"
        );
    }
}
