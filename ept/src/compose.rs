//! Two stages as one table: what a guest hypervisor maps, through what we map for it.
//!
//! A second-level guest's address goes through its hypervisor's table (the *outer* one, in that
//! hypervisor's memory) and then through ours (the *inner* one). Hardware walks a single table, so
//! that a [`Composed`] table holds the product. It is filled lazily, one page per fault, with the
//! intersection of both stages' rights and the smaller of their pages. Records in both directions
//! say what must go when either stage changes.

use alloc::collections::{BTreeMap, BTreeSet};

use testudo_arch::{FrameAlloc, FrameMem, Gpa, GuestMemory, Hpa, PageSize};

use crate::format::{Format, Rights, level_of};
use crate::guest_table::{GuestTable, TableFault};
use crate::{EditError, Flush, MapError, PageTable};

/// What an instruction fetch needs.
const FETCHES: Rights = Rights::EXECUTE.union(Rights::USER_EXECUTE);
/// The pages of this size that are fetched from are there in pieces, where the format wants it.
const WHOLE: PageSize = PageSize::Size2M;

/// A table that holds the product of two stages.
///
/// To change the inner table: edit it, call [`Self::forget_inner`] for the range, and only then
/// discharge both tokens. A fill that runs in between finds either the new state or leaves a record
/// that the call then finds.
#[derive(Debug)]
pub struct Composed<F: Format<Input = Gpa>, M: FrameAlloc + FrameMem> {
    table: PageTable<F, M>,
    /// By outer input address: what each page is made of.
    pages: BTreeMap<u64, Origin>,
    /// By inner input address: size, address there, and the outer input address.
    origins: BTreeSet<(PageSize, u64, u64)>,
    limit: usize,
}

/// What a composed page is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Origin {
    inner: u64,
    size: PageSize,
    /// The table has it as all the smaller pages that it consists of.
    in_pieces: bool,
}

/// What the outer stage makes of an address.
struct First {
    middle: Gpa,
    rights: Rights,
    dirty: bool,
    shift: u32,
}

/// A page that was put into a composed table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Filled {
    /// The page's size: what both stages and the format allow.
    pub size: PageSize,
    /// The address between the stages.
    pub middle: Gpa,
    /// Where the page lies.
    pub frame: Hpa,
    /// What both stages allow, and the format can say.
    pub rights: Rights,
}

/// Why a fault on a composed table cannot be resolved by filling it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ComposeFault {
    /// The guest hypervisor's own table says no: the fault is its to handle.
    #[error("the outer table: {0}")]
    Outer(TableFault),
    /// Our table maps nothing there: resolve it as a fault of the guest hypervisor itself (a page to
    /// be brought in, a device), and fill again.
    #[error("nothing is mapped at {middle} in the inner table")]
    InnerAbsent {
        /// The address between the stages.
        middle: Gpa,
        /// What the outer stage allows there.
        rights: Rights,
    },
    /// Our table does not allow the access: a page to be made writable, perhaps.
    #[error("the inner table allows only {rights:?} at {middle}")]
    InnerDenied {
        /// The address between the stages.
        middle: Gpa,
        /// What the inner table allows.
        rights: Rights,
    },
    /// The composed table holds as many pages as it may: [`Composed::clear`] makes room.
    #[error("the composed table is full")]
    Full,
    /// The composed table could not take the page: no frames left. [`Composed::clear`] makes room.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The guest hypervisor has changed its table without saying so, where a page is there in pieces:
    /// [`Composed::clear`] forgets what was before.
    #[error("the outer table has changed at {0}")]
    Stale(Gpa),
}

impl<F: Format<Input = Gpa>, M: FrameAlloc + FrameMem> Composed<F, M> {
    /// An empty table, or `None` if there is no frame for its root. It holds at most `limit` pages,
    /// since a guest hypervisor decides how many there are.
    pub fn new(format: F, frames: M, limit: usize) -> Option<Self> {
        Some(Self {
            table: PageTable::new(format, frames)?,
            pages: BTreeMap::new(),
            origins: BTreeSet::new(),
            limit: limit.max(1),
        })
    }

    /// The table that hardware walks.
    #[inline]
    pub fn table(&self) -> &PageTable<F, M> {
        &self.table
    }

    /// The number of pages it holds. One that is there in pieces is one.
    #[inline]
    pub fn len(&self) -> usize {
        self.pages.len()
    }

    /// Whether it holds no page.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// Puts the page that holds `address` into the table, after a fault of an access that needs
    /// `access`. A page that is there already with fewer rights, or of another origin, is replaced.
    ///
    /// The write right is withheld while the outer table has not marked the page dirty, so that its
    /// dirty bit is set when the first write faults. In a format whose executable pages must be
    /// smaller than others, a page lacks the right to fetch until the first fetch faults; then all of it
    /// is there in pieces, which a fetch from another of them finds.
    ///
    /// # Errors
    ///
    /// Whose fault it is. The composed table is as before, or, with [`ComposeFault::Map`], holds less.
    pub fn fill<G, V, N>(
        &mut self,
        outer: &GuestTable<'_, G, V>,
        inner: &PageTable<F, N>,
        address: Gpa,
        access: Rights,
    ) -> Result<Flush<'_, M, Filled>, ComposeFault>
    where
        G: Format<Input = Gpa>,
        V: GuestMemory + ?Sized,
        N: FrameAlloc + FrameMem,
    {
        let page = outer
            .translate(address, access)
            .map_err(ComposeFault::Outer)?;
        let first = First {
            middle: page.gpa,
            rights: page.rights,
            dirty: page.dirty,
            shift: page.shift,
        };
        self.fill_behind(&first, inner, address, access)
    }

    /// As [`Self::fill`], for a guest that its hypervisor gives no table of this kind: its addresses are the
    /// inner table's. The page is no larger than `largest`, whatever the inner table has there.
    ///
    /// # Errors
    ///
    /// As [`Self::fill`], but for those of an outer table.
    pub fn fill_plain<N: FrameAlloc + FrameMem>(
        &mut self,
        inner: &PageTable<F, N>,
        address: Gpa,
        access: Rights,
        largest: PageSize,
    ) -> Result<Flush<'_, M, Filled>, ComposeFault> {
        let first = First {
            middle: address,
            rights: Rights::all(),
            dirty: true,
            shift: largest.shift(),
        };
        self.fill_behind(&first, inner, address, access)
    }

    /// The rest of a fill, with what the outer stage makes of the address.
    fn fill_behind<N: FrameAlloc + FrameMem>(
        &mut self,
        first: &First,
        inner: &PageTable<F, N>,
        address: Gpa,
        access: Rights,
    ) -> Result<Flush<'_, M, Filled>, ComposeFault> {
        let (middle, mut rights) = (first.middle, first.rights);
        let second = inner
            .translate(middle)
            .ok_or(ComposeFault::InnerAbsent { middle, rights })?;
        let format = self.table.format();
        let inner_rights = inner.format().rights(second.leaf.flags);
        let denied = ComposeFault::InnerDenied {
            middle,
            rights: inner_rights,
        };
        if !inner_rights.contains(access) {
            return Err(denied);
        }
        rights &= inner_rights;
        if !first.dirty {
            rights -= Rights::WRITE;
        }
        rights = format.floor(rights);
        let with = |rights: Rights| {
            let flags = format.with_rights(second.leaf.flags, rights)?;
            let level = format.largest_level(flags);
            rights.contains(access).then_some((rights, flags, level))
        };
        let whole = with(rights).ok_or(denied)?;
        // Where executable pages must be small, one stays large until the first fetch from it.
        let data = format.floor(rights - FETCHES);
        let shift = first.shift.min(second.leaf.shift);

        if self.pages.len() >= self.limit {
            return Err(ComposeFault::Full);
        }
        let start = address.align_down(WHOLE);
        let pieces = self.pages.get(&start.0).filter(|page| page.in_pieces);
        let must_be_small = shift >= WHOLE.shift() && whole.2 < level_of(WHOLE);
        let flags = format.with_rights(second.leaf.flags, data);
        let flags = flags.filter(|flags| level_of(WHOLE) <= format.largest_level(*flags));
        let inner = middle.align_down(WHOLE).0;
        match (pieces, flags) {
            // The rest of it would stay, and nobody know what of.
            (Some(pieces), _) if !must_be_small || pieces.inner != inner => {
                return Err(ComposeFault::Stale(address));
            }
            (Some(_), _) => {
                let flush = self.table.protect(start, WHOLE.bytes(), rights);
                let flush = flush.map_err(MapError::from)?;
                return Ok(flush.map(|()| piece(second.address, middle, rights)));
            }
            (None, Some(flags)) if must_be_small && access.intersects(FETCHES) => {
                let frame = second.address.align_down(WHOLE);
                let mut flush = self.table.token(());
                match self.table.put(&mut flush, start, WHOLE, frame, flags) {
                    Ok(()) => {
                        let origin = Origin {
                            inner,
                            size: WHOLE,
                            in_pieces: false,
                        };
                        record(&mut self.pages, &mut self.origins, start, origin);
                        // Small enough for these rights.
                        let split = self.table.protect(start, WHOLE.bytes(), rights);
                        flush.absorb(split.map_err(MapError::from)?);
                        let origin = Origin {
                            in_pieces: true,
                            ..origin
                        };
                        self.pages.insert(start.0, origin);
                        return Ok(flush.map(|()| piece(second.address, middle, rights)));
                    }
                    // Some of it is there alone.
                    Err(MapError::Occupied(_)) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            _ => {}
        }
        let data = with(data);
        let mut flush = self.table.token(());
        let sizes = PageSize::ALL.into_iter().rev();
        let fitting = sizes
            .filter(|size| size.shift() <= shift)
            .filter_map(|size| {
                let fits = |made: &(_, _, u8)| level_of(size) <= made.2;
                let made = Some(whole).filter(fits).or(data.filter(fits))?;
                Some((size, made))
            });
        for (size, (rights, flags, _)) in fitting {
            let start = address.align_down(size);
            let frame = second.address.align_down(size);
            match self.table.put(&mut flush, start, size, frame, flags) {
                Ok(()) => {
                    let origin = Origin {
                        inner: middle.align_down(size).0,
                        size,
                        in_pieces: false,
                    };
                    record(&mut self.pages, &mut self.origins, start, origin);
                    let filled = Filled {
                        size,
                        middle,
                        frame,
                        rights,
                    };
                    return Ok(flush.map(|()| filled));
                }
                // Smaller pages are there: this one becomes as small.
                Err(MapError::Occupied(_)) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(MapError::Edit(EditError::Misaligned(address.0)).into())
    }

    /// Removes what lies at these outer input addresses: the guest hypervisor has invalidated them.
    pub fn forget_outer(&mut self, start: Gpa, len: u64) -> Flush<'_, M> {
        let end = start.0.saturating_add(len);
        let mut flush = self.table.token(());
        // At most one page begins before the range and reaches into it.
        let reaching = PageSize::ALL.into_iter().find_map(|size| {
            let base = start.align_down(size).0;
            let page = self.pages.get(&base).filter(|page| page.size == size);
            page.map(|_| base)
        });
        let first = reaching.unwrap_or(start.0);
        while let Some((&page, &origin)) = self.pages.range(first..end).next() {
            self.table
                .drop_pages(&mut flush, page, Some(origin.size.bytes()));
            self.pages.remove(&page);
            self.origins.remove(&(origin.size, origin.inner, page));
        }
        flush
    }

    /// Removes every page made of these inner input addresses: our own table has changed there.
    pub fn forget_inner(&mut self, start: Gpa, len: u64) -> Flush<'_, M> {
        let end = start.0.saturating_add(len);
        let mut flush = self.table.token(());
        for size in PageSize::ALL {
            let from = (size, start.align_down(size).0, 0);
            while let Some(&key) = self.origins.range(from..(size, end, 0)).next() {
                self.table.drop_pages(&mut flush, key.2, Some(size.bytes()));
                self.origins.remove(&key);
                self.pages.remove(&key.2);
            }
        }
        flush
    }

    /// Removes everything.
    pub fn clear(&mut self) -> Flush<'_, M> {
        let mut flush = self.table.token(());
        self.table.drop_pages(&mut flush, 0, None);
        self.pages.clear();
        self.origins.clear();
        flush
    }

    /// Frees the whole table once hardware has forgotten it.
    ///
    /// # Errors
    ///
    /// The hardware's error with the table.
    pub fn destroy<I: crate::Invalidate + ?Sized>(
        self,
        hardware: &mut I,
    ) -> Result<M, (Self, I::Error)> {
        let Self {
            table,
            pages,
            origins,
            limit,
        } = self;
        table.destroy(hardware).map_err(|(table, error)| {
            let whole = Self {
                table,
                pages,
                origins,
                limit,
            };
            (whole, error)
        })
    }
}

/// Notes a page and drops the notes of those that it has replaced.
fn record(
    pages: &mut BTreeMap<u64, Origin>,
    origins: &mut BTreeSet<(PageSize, u64, u64)>,
    start: Gpa,
    origin: Origin,
) {
    // At the same address, or a larger page that held it.
    for larger in PageSize::ALL {
        let base = start.align_down(larger).0;
        if let Some(old) = pages.get(&base).copied()
            && base.saturating_add(old.size.bytes()) > start.0
        {
            pages.remove(&base);
            origins.remove(&(old.size, old.inner, base));
        }
    }
    pages.insert(start.0, origin);
    origins.insert((origin.size, origin.inner, start.0));
}

/// One of the pieces of a page, in which the access was.
fn piece(address: Hpa, middle: Gpa, rights: Rights) -> Filled {
    let size = PageSize::Size4K;
    Filled {
        size,
        middle,
        frame: address.align_down(size),
        rights,
    }
}
