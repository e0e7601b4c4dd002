//! One page-table engine for EPT, NPT, IOMMU and host tables, with guest walks and typed
//! invalidation.
//!
//! A [`PageTable`] is the tree; a [`Format`] says how its entries are coded. The engine never
//! panics on what a guest chose, allocates nothing but table frames (through
//! [`FrameAlloc`](testudo_arch::FrameAlloc)), and touches memory only entry by entry (through
//! [`FrameMem`](testudo_arch::FrameMem)). An edit that can leave a stale translation in a
//! processor or an IOMMU returns a [`Flush`], and what the edit took out of the table comes out of
//! that token only when it has been discharged.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`format`](mod@format) | EPT, NPT, long mode, VT-d, AMD-Vi: one file each, and the trait that a new one implements |
//! | [`walk`] | a guest's own paging, in every mode, with exact page faults |
//! | [`guest_table`] | second-stage tables that a guest has written |
//! | [`compose`] | two stages as one table, for guests of guests |
//! | [`iotlb`] | what makes VT-d's and AMD-Vi's units forget, so that flushes of devices' tables are discharged |
//! | [`shadow`] | shadow paging, for processors without nested paging |
//! | [`sharing`] | pages of equal content backed once |
//! | [`sub_page`] | write permissions for pieces of 128 bytes |
//!
//! [`compose`], [`shadow`] and [`sharing`] need the feature `alloc`, which is on by default.
//!
//! Sections of volume 3A of Intel's Software Developer's Manual (SDM) are those of the editions in which paging is
//! chapter 4; it became chapter 5 when linear-address pre-processing got a chapter before it. Sections of
//! volume 3C are those of the editions since 2025, in which EPT is in chapter 31.
//!
//! ```
//! use testudo_arch::{Gpa, Hpa};
//! use testudo_ept::format::npt::{Npt, NptFlags};
//! use testudo_ept::{FramePool, PageTable};
//!
//! let pool = FramePool::new(16);
//! let table = PageTable::new(Npt::new(48), &pool).unwrap();
//! let flags = NptFlags::WRITABLE | NptFlags::ACCESSED | NptFlags::DIRTY;
//! // 4 MiB at guest-physical 2 MiB, backed from 1 GiB on: two large pages.
//! table.map(Gpa(0x20_0000), 0x40_0000, Hpa(0x4000_0000), flags).unwrap();
//! let found = table.translate(Gpa(0x20_1234)).unwrap();
//! assert_eq!((found.address, found.leaf.bytes()), (Hpa(0x4000_1234), 0x20_0000));
//! ```
//!
//! What leaves a table comes out of its token when the hardware has forgotten it:
//!
//! ```
//! # use core::convert::Infallible;
//! # use testudo_arch::{FrameAlloc, FrameMem, Gpa, Hpa};
//! # use testudo_ept::format::npt::{Npt, NptFlags};
//! # use testudo_ept::{Invalidate, PageTable};
//! /// Takes a page from the guest, for the balloon.
//! fn take<M: FrameAlloc + FrameMem>(
//!     table: &PageTable<Npt, M>,
//!     page: Gpa,
//!     processors: &mut impl Invalidate<Error = Infallible>,
//! ) -> Option<Hpa> {
//!     let unmapped = table.unmap_page(page);
//!     let leaf = unmapped.discharge(processors)?;
//!     Some(leaf.frame)
//! }
//! ```
#![no_std]

#[cfg(feature = "alloc")]
extern crate alloc;
#[cfg(test)]
extern crate std;

mod bitmap;
#[cfg(feature = "alloc")]
pub mod compose;
mod flush;
pub mod format;
pub mod guest_table;
pub mod iotlb;
mod lock;
#[cfg(feature = "alloc")]
mod pool;
#[cfg(feature = "alloc")]
pub mod shadow;
#[cfg(feature = "alloc")]
pub mod sharing;
pub mod sub_page;
mod table;
pub mod walk;

pub use bitmap::PageBitmap;
pub use flush::{Flush, Invalidate, Invalidation, Mixed};
pub use format::{Format, Leaf, Rights};
#[cfg(feature = "alloc")]
pub use pool::FramePool;
pub use table::{EditError, Leaves, MapError, PageTable, Translation};
