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
