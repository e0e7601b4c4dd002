//! Backends: where blocks, packets and bytes really go.

mod block;

#[cfg(feature = "std")]
pub use block::FileImage;
pub use block::{BlockBackend, BlockError, MemoryImage, Overlay, ReadOnlyImage, Sink, Source};
