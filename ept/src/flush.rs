//! The obligation that an edit leaves behind: to make processors and IOMMUs forget.

use core::fmt;

use testudo_arch::{FrameAlloc, FrameMem, Hpa};

/// What must be forgotten: one table's translations of a range of its input addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Invalidation {
    /// The table's root, which names it: EPTP's address, nCR3, a device's second-stage pointer.
    pub root: Hpa,
    /// The first input address, as an offset into the table's range.
    pub first: u64,
    /// The last input address, inclusive.
    pub last: u64,
    /// Whether only entries that map pages changed, so that cached references to tables may stay
    /// (the invalidation hint of VT-d, INVEPT-free paths, `INVLPGA`).
    pub leaves_only: bool,
}

impl Invalidation {
    /// The number of 4 KiB pages concerned.
    #[inline]
    pub const fn pages(&self) -> u64 {
        (self.last - self.first) / 4096 + 1
    }

    /// The smallest range that holds both.
    #[inline]
    fn hull(self, other: Self) -> Self {
        Self {
            root: self.root,
            first: self.first.min(other.first),
            last: self.last.max(other.last),
            leaves_only: self.leaves_only && other.leaves_only,
        }
    }
}

/// Whatever can make hardware forget: INVEPT, INVVPID, a new ASID, an IOTLB's command queue, and
/// the inter-processor interrupts that carry them to every processor concerned.
///
/// # Safety
///
/// When `invalidate` returns `Ok`, no processor and no device uses a translation of the range that
/// it cached before the call, at any level of the table unless `leaves_only`; and every call on the
/// table that another processor had begun before is over. (A processor that acknowledges the
/// request between two exits, or from an interrupt that it takes only between two calls, fulfils
/// both at once.) Frames are reused on the strength of this.
#[allow(
    unsafe_code,
    reason = "frames are reused on the strength of an implementation's word"
)]
pub unsafe trait Invalidate {
    /// Why hardware could not be made to forget: an IOMMU's queue that does not drain.
    /// [`core::convert::Infallible`] for processors.
    type Error;

    /// Makes hardware forget.
    fn invalidate(&mut self, what: &Invalidation) -> Result<(), Self::Error>;
}

/// Two obligations that belong to different tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("flushes of the tables at {0} and {1} cannot be joined")]
pub struct Mixed(pub Hpa, pub Hpa);

/// A chain of table frames that left a table, linked through the frames themselves.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Chain {
    head: u64,
    tail: u64,
}

/// How a retired frame holds the link to the next one without misleading a walk that still
/// reaches it.
#[derive(Clone, Copy)]
enum Link {
    /// In entry 0, beside the bits of an absent entry: nothing that the table mapped is mapped any
    /// more.
    Entry(u64),
    /// In the bits of the first entries that hardware ignores: what the table maps is still
    /// mapped, by a larger page, and a device must not fault on it.
    Software(u64),
}

impl Link {
    fn write<M: FrameMem>(self, frames: &M, table: u64, next: u64) {
        match self {
            Self::Entry(absent) => frames.store(Hpa(table), next | absent),
            Self::Software(mask) => {
                let low = mask.trailing_zeros();
                let mut rest = next >> 12;
                for index in 0..10 {
                    let entry = Hpa(table | (index * 8));
                    let bits = (rest & 0xF) << low;
                    let mut old = frames.load(entry);
                    while let Err(now) =
                        frames.compare_exchange(entry, old, (old & !(0xF << low)) | bits)
                    {
                        old = now;
                    }
                    rest >>= 4;
                }
            }
        }
    }

    fn read<M: FrameMem>(self, frames: &M, table: u64) -> u64 {
        match self {
            Self::Entry(absent) => frames.load(Hpa(table)) & !absent,
            Self::Software(mask) => {
                let low = mask.trailing_zeros();
                let nibble = |index: u64| (frames.load(Hpa(table | (index * 8))) >> low) & 0xF;
                (0..10).rev().fold(0, |next, i| (next << 4) | nibble(i)) << 12
            }
        }
    }
}

impl Chain {
    fn push<M: FrameMem>(&mut self, frames: &M, link: Link, table: Hpa) {
        link.write(frames, table.0, self.head);
        if self.head == 0 {
            self.tail = table.0;
        }
        self.head = table.0;
    }

    fn append<M: FrameMem>(&mut self, frames: &M, link: Link, other: Self) {
        if other.head == 0 {
            return;
        }
        if self.head == 0 {
            *self = other;
            return;
        }
        link.write(frames, self.tail, other.head);
        self.tail = other.tail;
    }

    fn release<M: FrameAlloc + FrameMem>(self, frames: &M, link: Link) {
        let mut table = self.head;
        while table != 0 {
            let next = link.read(frames, table);
            frames.free(Hpa(table));
            table = next;
        }
    }
}

/// What an edit took out of a table, locked up until hardware has forgotten it.
///
/// The value, and the frames of tables that the edit retired, come out of [`Self::discharge`] only.
/// A token that is dropped instead leaks them: nothing is reused that might still be in use. It
/// borrows the table, which therefore outlives it:
///
/// ```compile_fail,E0505
/// use testudo_arch::{Gpa, Hpa};
/// use testudo_ept::format::npt::{Npt, NptFlags};
/// use testudo_ept::{FramePool, Invalidate, PageTable};
///
/// fn too_early(hardware: &mut impl Invalidate<Error = core::convert::Infallible>) {
///     let table = PageTable::new(Npt::new(48), FramePool::new(16)).unwrap();
///     table.map(Gpa(0), 4096, Hpa(0x1000), NptFlags::empty()).unwrap();
///     let page = table.unmap_page(Gpa(0));
///     let _ = table.destroy(hardware); // The token is still alive.
///     page.discharge(hardware);
/// }
/// ```
#[must_use = "a stale translation may still be in use: discharge the flush"]
pub struct Flush<'t, M: FrameAlloc + FrameMem, T = ()> {
    frames: &'t M,
    root: Hpa,
    scope: Option<Invalidation>,
    /// Tables whose range is no longer mapped.
    dead: Chain,
    /// Tables that a larger page has replaced.
    replaced: Chain,
    software: u64,
    absent: u64,
    value: T,
}

impl<'t, M: FrameAlloc + FrameMem, T> Flush<'t, M, T> {
    pub(crate) fn new(frames: &'t M, root: Hpa, software: u64, absent: u64, value: T) -> Self {
        Self {
            frames,
            root,
            scope: None,
            dead: Chain::default(),
            replaced: Chain::default(),
            software,
            absent,
            value,
        }
    }

    /// Adds a range (an inclusive end) to what must be forgotten.
    #[inline]
    pub(crate) fn cover(&mut self, first: u64, last: u64, leaves_only: bool) {
        let more = Invalidation {
            root: self.root,
            first,
            last,
            leaves_only,
        };
        self.scope = Some(self.scope.map_or(more, |scope| scope.hull(more)));
    }

    /// Whether it is an obligation of the table with this root.
    #[inline]
    pub(crate) fn is_of(&self, root: Hpa) -> bool {
        self.root == root
    }

    /// Takes a table whose range is no longer mapped.
    #[inline]
    pub(crate) fn retire(&mut self, table: Hpa) {
        self.dead.push(self.frames, Link::Entry(self.absent), table);
    }

    /// Takes a table that a larger page has replaced.
    pub(crate) fn retire_replaced(&mut self, table: Hpa) {
        let link = Link::Software(self.software);
        self.replaced.push(self.frames, link, table);
    }

    #[inline]
    pub(crate) fn value_mut(&mut self) -> &mut T {
        &mut self.value
    }

    /// Takes over the obligation of another token of the same table. The value is still locked up:
    /// what the caller gets must not leave the crate before the discharge.
    pub(crate) fn absorb<U>(&mut self, other: Flush<'t, M, U>) -> U {
        if let Some(more) = other.scope {
            self.cover(more.first, more.last, more.leaves_only);
        }
        let (dead, replaced) = (Link::Entry(self.absent), Link::Software(self.software));
        self.dead.append(self.frames, dead, other.dead);
        self.replaced.append(self.frames, replaced, other.replaced);
        other.value
    }

    /// What has to be forgotten, or `None` if the edit changed nothing.
    #[inline]
    pub fn scope(&self) -> Option<Invalidation> {
        self.scope
    }

    /// Joins two obligations of one table into one.
    ///
    /// # Errors
    ///
    /// They belong to different tables; both come back with the error.
    #[allow(
        clippy::type_complexity,
        clippy::result_large_err,
        reason = "both tokens come back"
    )]
    pub fn join<U>(
        mut self,
        other: Flush<'t, M, U>,
    ) -> Result<Flush<'t, M, (T, U)>, (Mixed, Self, Flush<'t, M, U>)> {
        if self.root != other.root {
            return Err((Mixed(self.root, other.root), self, other));
        }
        let second = self.absorb(other);
        Ok(self.map(|first| (first, second)))
    }

    /// Transforms the value without looking at it now.
    pub fn map<U>(self, change: impl FnOnce(T) -> U) -> Flush<'t, M, U> {
        Flush {
            frames: self.frames,
            root: self.root,
            scope: self.scope,
            dead: self.dead,
            replaced: self.replaced,
            software: self.software,
            absent: self.absent,
            value: change(self.value),
        }
    }

    /// Makes hardware forget, frees the retired tables, and hands out the value.
    pub fn discharge<I>(self, hardware: &mut I) -> T
    where
        I: Invalidate<Error = core::convert::Infallible> + ?Sized,
    {
        match self.try_discharge(hardware) {
            Ok(value) => value,
            Err((_, never)) => match never {},
        }
    }

    /// As [`Self::discharge`], for hardware that can fail.
    ///
    /// # Errors
    ///
    /// The hardware's error, with the obligation still to be discharged.
    pub fn try_discharge<I: Invalidate + ?Sized>(
        self,
        hardware: &mut I,
    ) -> Result<T, (Self, I::Error)> {
        if let Some(scope) = self.scope
            && let Err(error) = hardware.invalidate(&scope)
        {
            return Err((self, error));
        }
        Ok(self.settle())
    }

    /// Hands everything out without a flush.
    ///
    /// # Safety
    ///
    /// What [`Invalidate`] promises has been achieved otherwise: no hardware has used the table
    /// yet, or all of it has been made to forget since the edit.
    #[allow(unsafe_code, reason = "the caller's word stands for the hardware's")]
    pub unsafe fn assume_flushed(self) -> T {
        self.settle()
    }

    fn settle(self) -> T {
        self.dead.release(self.frames, Link::Entry(self.absent));
        let link = Link::Software(self.software);
        self.replaced.release(self.frames, link);
        self.value
    }
}

impl<M: FrameAlloc + FrameMem, T> fmt::Debug for Flush<'_, M, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Flush")
            .field("scope", &self.scope)
            .finish_non_exhaustive()
    }
}
