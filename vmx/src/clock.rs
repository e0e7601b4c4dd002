//! The guest's clock: TSC offset and multiplier (SDM vol. 3C, 27.6.5 and 28.3), and the preemption
//! timer (28.5.1).
//!
//! ```
//! use testudo_vmx::clock::GuestTsc;
//!
//! // A guest of 2 GHz on a processor of 3 GHz, whose counter began at 300.
//! let clock = GuestTsc::starting_at(0, 300, GuestTsc::ratio(2_000_000_000, 3_000_000_000).unwrap());
//! assert_eq!(clock.read(300), 0);
//! assert_eq!(clock.read(3_000_000_300), 2_000_000_000);
//! ```

use crate::controls::{PrimaryControls, SecondaryControls};
use crate::error::AccessError;
use crate::fields;
use crate::vmcs::VmcsWrite;

/// How a guest's time-stamp counter follows the processor's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GuestTsc {
    /// The multiplier: fixed-point, with 48 bits behind the point.
    pub multiplier: u64,
    /// The offset, modulo 2^64, in the guest's ticks.
    pub offset: u64,
}

impl GuestTsc {
    /// The multiplier 1.
    pub const UNITY: u64 = 1 << 48;

    /// The processor's own counter.
    pub const HOST: Self = Self {
        multiplier: Self::UNITY,
        offset: 0,
    };

    /// The multiplier for a guest of `guest_hz` on a processor of `host_hz`, rounded down; `None` if
    /// it is 0 or too large for the field, or if `host_hz` is 0.
    pub const fn ratio(guest_hz: u64, host_hz: u64) -> Option<u64> {
        if host_hz == 0 {
            return None;
        }
        let ratio = ((guest_hz as u128) << 48) / host_hz as u128;
        if ratio == 0 || ratio > u64::MAX as u128 {
            return None;
        }
        Some(ratio as u64)
    }

    /// The clock that reads `guest` when the processor's reads `host`.
    pub const fn starting_at(guest: u64, host: u64, multiplier: u64) -> Self {
        Self {
            multiplier,
            offset: guest.wrapping_sub(scale(host, multiplier)),
        }
    }

    /// What the guest reads when the processor's counter is `host`.
    #[inline]
    pub const fn read(self, host: u64) -> u64 {
        scale(host, self.multiplier).wrapping_add(self.offset)
    }

    /// The clock of a guest's guest: `self` made from the processor's clock, and `inner` from that.
    ///
    /// The offset of the outer one is signed, and so is its scaled form.
    pub const fn nested(self, inner: Self) -> Self {
        let product = (self.offset as i64 as i128 * inner.multiplier as i128) >> 48;
        Self {
            multiplier: scale(self.multiplier, inner.multiplier),
            offset: (product as u64).wrapping_add(inner.offset),
        }
    }

    /// Writes the fields. Without TSC scaling the multiplier must be [`Self::UNITY`], and is not
    /// written.
    ///
    /// # Errors
    ///
    /// A VMWRITE failed.
    pub fn write(
        self,
        vmcs: &mut impl VmcsWrite,
        primary: PrimaryControls,
        secondary: SecondaryControls,
    ) -> Result<(), AccessError> {
        if primary.contains(PrimaryControls::USE_TSC_OFFSETTING) {
            vmcs.set(fields::TSC_OFFSET, self.offset)?;
        }
        if secondary.contains(SecondaryControls::USE_TSC_SCALING) {
            vmcs.set(fields::TSC_MULTIPLIER, self.multiplier)?;
        }
        Ok(())
    }
}

/// "The product of the TSC and the TSC multiplier, shifted right 48 bits."
#[inline]
const fn scale(tsc: u64, multiplier: u64) -> u64 {
    ((tsc as u128 * multiplier as u128) >> 48) as u64
}

/// The value of the preemption timer that lets `ticks` of the time-stamp counter pass, rounded up,
/// or the largest one; `shift` is
/// [`Misc::preemption_timer_shift`](crate::caps::Misc::preemption_timer_shift).
///
/// ```
/// use testudo_vmx::clock::preemption_timer;
///
/// assert_eq!(preemption_timer(100, 5), 4);
/// assert_eq!(preemption_timer(u64::MAX, 5), u32::MAX);
/// ```
#[inline]
pub const fn preemption_timer(ticks: u64, shift: u32) -> u32 {
    let shift = if shift > 31 { 31 } else { shift };
    let whole = ticks >> shift;
    let rounded = whole + (ticks & ((1 << shift) - 1) != 0) as u64;
    if rounded > u32::MAX as u64 {
        u32::MAX
    } else {
        rounded as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn impossible_ratios() {
        assert_eq!(GuestTsc::ratio(1, 0), None);
        assert_eq!(GuestTsc::ratio(0, 1), None);
        assert_eq!(GuestTsc::ratio(1 << 16, 1), None);
        assert_eq!(GuestTsc::ratio(5, 5), Some(GuestTsc::UNITY));
    }

    #[test]
    fn only_the_fields_in_use_are_written() {
        let mut vmcs = crate::fake::FakeVmcs::new();
        let offset = PrimaryControls::USE_TSC_OFFSETTING;
        let scaling = SecondaryControls::USE_TSC_SCALING;
        GuestTsc::HOST
            .write(&mut vmcs, offset, SecondaryControls::empty())
            .unwrap();
        assert_eq!(vmcs.counts(), (0, 1));
        GuestTsc::HOST.write(&mut vmcs, offset, scaling).unwrap();
        assert_eq!(vmcs.counts(), (0, 3));
    }

    proptest! {
        #[test]
        fn a_clock_starts_where_it_is_told(guest: u64, host: u64, multiplier in 1u64..) {
            prop_assert_eq!(GuestTsc::starting_at(guest, host, multiplier).read(host), guest);
        }

        #[test]
        fn nesting_is_reading_twice(
            host in 0u64..1 << 50,
            outer_offset in -(1i64 << 40)..1 << 40,
            inner_offset: u64,
            outer in 1u64 << 44..1 << 51,
            inner in 1u64 << 44..1 << 51,
        ) {
            let outer = GuestTsc { multiplier: outer, offset: outer_offset as u64 };
            let inner = GuestTsc { multiplier: inner, offset: inner_offset };
            // Where the outer clock is past zero, so that its own reading is not wrapped around.
            prop_assume!(scale(host, outer.multiplier) as i64 + outer_offset >= 0);
            let twice = inner.read(outer.read(host));
            let once = outer.nested(inner).read(host);
            // Every product rounds down. Reading twice scales the first one's loss; reading once
            // scales that of the product of the multipliers.
            let error = twice.wrapping_sub(once) as i64;
            let (least, most) = (-(inner.multiplier as i64 >> 48) - 2, (host >> 48) as i64 + 3);
            prop_assert!((least..=most).contains(&error), "{}", error);
        }
    }
}
