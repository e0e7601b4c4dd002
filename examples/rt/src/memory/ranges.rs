//! Free physical memory as a sorted list of disjoint ranges.

use arrayvec::ArrayVec;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Span {
    start: u64,
    end: u64,
}

/// The free ranges. When the list is full, a range that would need another entry is lost to use, which
/// wastes memory and breaks nothing.
pub(super) struct FreeRanges(ArrayVec<Span, 1024>);

impl FreeRanges {
    pub(super) const fn new() -> Self {
        Self(ArrayVec::new_const())
    }

    /// Adds `start..end`, joining it with its neighbours.
    pub(super) fn give(&mut self, start: u64, end: u64) {
        if start >= end {
            return;
        }
        let mut merged = Span { start, end };
        let first = self.0.partition_point(|span| span.end < start);
        while let Some(span) = self.0.get(first).filter(|span| span.start <= end).copied() {
            merged.start = merged.start.min(span.start);
            merged.end = merged.end.max(span.end);
            self.0.remove(first);
        }
        // Only a full list refuses.
        let _ = self.0.try_insert(first, merged);
    }

    /// Takes `start..end` out, as far as it is there.
    pub(super) fn remove(&mut self, start: u64, end: u64) {
        let mut index = self.0.partition_point(|span| span.end <= start);
        while let Some(span) = self.0.get(index).filter(|span| span.start < end).copied() {
            self.0.remove(index);
            for rest in [
                Span {
                    start: span.start,
                    end: start,
                },
                Span {
                    start: end,
                    end: span.end,
                },
            ] {
                if rest.start < rest.end && self.0.try_insert(index, rest).is_ok() {
                    index += 1;
                }
            }
        }
    }

    /// Takes the lowest aligned run of `bytes`; small requests thus leave the large ranges whole.
    pub(super) fn take(&mut self, bytes: u64, align: u64) -> Option<u64> {
        let start = self.0.iter().find_map(|span| {
            let start = span.start.checked_next_multiple_of(align)?;
            (start.checked_add(bytes)? <= span.end).then_some(start)
        })?;
        self.remove(start, start + bytes);
        Some(start)
    }

    /// The ranges as first address and end, in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, u64)> {
        self.0.iter().map(|span| (span.start, span.end))
    }

    pub(super) fn total(&self) -> u64 {
        self.0.iter().map(|span| span.end - span.start).sum()
    }

    pub(super) fn largest(&self, align: u64) -> u64 {
        self.0
            .iter()
            .filter_map(|span| {
                span.end
                    .checked_sub(span.start.checked_next_multiple_of(align)?)
            })
            .max()
            .unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::*;

    fn spans(free: &FreeRanges) -> Vec<(u64, u64)> {
        free.iter().collect()
    }

    #[test]
    fn neighbours_join_and_overlaps_collapse() {
        let mut free = FreeRanges::new();
        free.give(0x1000, 0x2000);
        free.give(0x3000, 0x4000);
        free.give(0x2000, 0x3000);
        assert_eq!(spans(&free), [(0x1000, 0x4000)]);
        free.give(0x3000, 0x6000);
        free.give(0x8000, 0x9000);
        assert_eq!(spans(&free), [(0x1000, 0x6000), (0x8000, 0x9000)]);
        assert_eq!(free.total(), 0x6000);
    }

    #[test]
    fn removal_splits_and_spans_several() {
        let mut free = FreeRanges::new();
        free.give(0x1000, 0x5000);
        free.remove(0x2000, 0x3000);
        assert_eq!(spans(&free), [(0x1000, 0x2000), (0x3000, 0x5000)]);
        free.remove(0x1800, 0x4000);
        assert_eq!(spans(&free), [(0x1000, 0x1800), (0x4000, 0x5000)]);
        free.remove(0, u64::MAX);
        assert_eq!(free.total(), 0);
    }

    #[test]
    fn taking_honours_alignment_and_the_end() {
        let mut free = FreeRanges::new();
        free.give(0x1000, 0x40_0000);
        assert_eq!(free.largest(0x20_0000), 0x20_0000);
        assert_eq!(free.take(0x20_0000, 0x20_0000), Some(0x20_0000));
        assert_eq!(free.take(0x20_0000, 0x20_0000), None);
        assert_eq!(free.take(0x1000, 0x1000), Some(0x1000));
        assert_eq!(free.take(u64::MAX, 0x1000), None);
    }
}
