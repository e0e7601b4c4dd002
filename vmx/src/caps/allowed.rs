//! Which settings of a word of controls a processor accepts, and what happens to a wish.

use core::fmt;

use crate::controls::ControlWord;

/// The permitted settings of a word of controls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Allowed<C> {
    must_be_one: C,
    may_be_one: C,
}

/// Controls as a processor will accept them, and how they differ from the wish.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct Granted<C> {
    /// The word to write to the VMCS.
    pub controls: C,
    /// Optional controls that the processor does not offer.
    pub refused: C,
    /// Controls that are set though nobody asked, because the processor insists.
    pub forced: C,
}

/// Required controls that a processor does not offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnsupportedControls<C> {
    /// The controls that are missing.
    pub missing: C,
}

impl<C: ControlWord + fmt::Display> fmt::Display for UnsupportedControls<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the processor does not offer {} among the {}",
            self.missing,
            C::NAME
        )
    }
}

impl<C: ControlWord + fmt::Display> core::error::Error for UnsupportedControls<C> {}

/// Controls that must stay 0 for the program's sake, but that a processor insists on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ForcedControls<C> {
    /// The controls that cannot be 0.
    pub forced: C,
}

impl<C: ControlWord + fmt::Display> fmt::Display for ForcedControls<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the processor insists on {} among the {}",
            self.forced,
            C::NAME
        )
    }
}

impl<C: ControlWord + fmt::Display> core::error::Error for ForcedControls<C> {}

impl<C: ControlWord> Allowed<C> {
    /// From the two masks. Bits that must be 1 also may be.
    pub fn new(must_be_one: C, may_be_one: C) -> Self {
        Self {
            must_be_one,
            may_be_one: C::from_u64(may_be_one.to_u64() | must_be_one.to_u64()),
        }
    }

    /// Nothing may be 1: a word that the processor does not have.
    pub fn none() -> Self {
        Self::from_msr(0)
    }

    /// From a capability MSR of two halves: bits 31:0 must be 1, bits 63:32 may be 1.
    pub fn from_msr(value: u64) -> Self {
        Self::new(C::from_u64(value & 0xFFFF_FFFF), C::from_u64(value >> 32))
    }

    /// From a capability MSR that holds 64 bits that may be 1.
    pub fn from_allowed1(value: u64) -> Self {
        Self::new(C::from_u64(0), C::from_u64(value))
    }

    /// The MSR of two halves with these settings.
    pub fn to_msr(self) -> u64 {
        (self.may_be_one.to_u64() << 32) | (self.must_be_one.to_u64() & 0xFFFF_FFFF)
    }

    /// The MSR of two halves as it is beside a TRUE MSR: default-1 bits must be 1.
    pub fn to_default1_msr(self) -> u64 {
        self.to_msr() | C::DEFAULT1 | (C::DEFAULT1 << 32)
    }

    /// The MSR of 64 bits that may be 1.
    pub fn to_allowed1(self) -> u64 {
        self.may_be_one.to_u64()
    }

    /// The bits that must be 1.
    #[inline]
    pub fn must_be_one(self) -> C {
        self.must_be_one
    }

    /// The bits that may be 1.
    #[inline]
    pub fn may_be_one(self) -> C {
        self.may_be_one
    }

    /// Whether all these controls may be 1.
    #[inline]
    pub fn allows(self, bits: C) -> bool {
        bits.to_u64() & !self.may_be_one.to_u64() == 0
    }

    /// The bits of `word` that are 0 and must be 1.
    #[inline]
    pub fn missing_ones(self, word: C) -> u64 {
        self.must_be_one.to_u64() & !word.to_u64()
    }

    /// The bits of `word` that are 1 and must be 0.
    #[inline]
    pub fn excess_ones(self, word: C) -> u64 {
        word.to_u64() & !self.may_be_one.to_u64()
    }

    /// Whether a VM entry would accept the word.
    #[inline]
    pub fn accepts(self, word: C) -> bool {
        self.missing_ones(word) == 0 && self.excess_ones(word) == 0
    }

    /// The word that grants everything in `required`, and has what the processor insists on.
    ///
    /// # Errors
    ///
    /// The processor does not offer all of `required`.
    pub fn require(self, required: C) -> Result<C, UnsupportedControls<C>> {
        Ok(self.grant(required, C::from_u64(0))?.controls)
    }

    /// The word that grants everything in `required` and what there is of `optional`. Nothing is
    /// dropped or added in silence: see [`Granted`].
    ///
    /// # Errors
    ///
    /// The processor does not offer all of `required`.
    pub fn grant(self, required: C, optional: C) -> Result<Granted<C>, UnsupportedControls<C>> {
        let missing = self.excess_ones(required);
        if missing != 0 {
            return Err(UnsupportedControls {
                missing: C::from_u64(missing),
            });
        }
        let wanted = required.to_u64() | optional.to_u64();
        Ok(Granted {
            controls: C::from_u64((wanted & self.may_be_one.to_u64()) | self.must_be_one.to_u64()),
            refused: C::from_u64(self.excess_ones(optional)),
            forced: C::from_u64(self.must_be_one.to_u64() & !wanted),
        })
    }
}

impl<C: ControlWord> Granted<C> {
    /// The controls, if none of `unwanted` is forced among them.
    ///
    /// # Errors
    ///
    /// The processor insists on one of them.
    pub fn without(self, unwanted: C) -> Result<Self, ForcedControls<C>> {
        let forced = self.forced.to_u64() & unwanted.to_u64();
        if forced != 0 {
            return Err(ForcedControls {
                forced: C::from_u64(forced),
            });
        }
        Ok(self)
    }
}

impl<C: ControlWord + fmt::Display> fmt::Display for Allowed<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} (must be 1: {:#x})",
            self.may_be_one,
            self.must_be_one.to_u64()
        )
    }
}
