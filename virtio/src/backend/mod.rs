//! Backends: where blocks, packets and bytes really go.

mod block;
mod net;
#[cfg(feature = "std")]
mod tap;
mod tree;
#[cfg(feature = "user-net")]
mod user;
mod vsock;

#[cfg(feature = "std")]
pub use block::FileImage;
pub use block::{BlockBackend, BlockError, MemoryImage, Overlay, ReadOnlyImage, Sink, Source};
pub use net::{
    Fill, MAX_FRAME, NetBackend, NetHeader, Offloads, Switch, SwitchPort, Unplugged, Wire,
};
#[cfg(feature = "std")]
pub use tap::Tap;
pub use tree::{MemoryTree, NodeInfo, NodeKind, ROOT, TreeBackend, TreeEntry};
#[cfg(feature = "user-net")]
pub use user::{UserHost, UserOptions};
pub use vsock::{EchoHost, VsockConnect, VsockHost, VsockStream};
