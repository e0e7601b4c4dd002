//! The messages of FUSE, version 7.31, as far as a read-only tree needs them.

use crate::backend::{NodeInfo, NodeKind};

/// The protocol's version.
pub(super) const MAJOR: u32 = 7;
pub(super) const MINOR: u32 = 31;

/// What is asked for.
pub(super) mod opcode {
    pub(in super::super) const LOOKUP: u32 = 1;
    pub(in super::super) const FORGET: u32 = 2;
    pub(in super::super) const GETATTR: u32 = 3;
    pub(in super::super) const SETATTR: u32 = 4;
    pub(in super::super) const READLINK: u32 = 5;
    pub(in super::super) const SYMLINK: u32 = 6;
    pub(in super::super) const LINK: u32 = 13;
    pub(in super::super) const OPEN: u32 = 14;
    pub(in super::super) const READ: u32 = 15;
    pub(in super::super) const WRITE: u32 = 16;
    pub(in super::super) const STATFS: u32 = 17;
    pub(in super::super) const RELEASE: u32 = 18;
    pub(in super::super) const SETXATTR: u32 = 21;
    pub(in super::super) const REMOVEXATTR: u32 = 24;
    pub(in super::super) const FLUSH: u32 = 25;
    pub(in super::super) const INIT: u32 = 26;
    pub(in super::super) const OPENDIR: u32 = 27;
    pub(in super::super) const READDIR: u32 = 28;
    pub(in super::super) const RELEASEDIR: u32 = 29;
    pub(in super::super) const ACCESS: u32 = 34;
    pub(in super::super) const CREATE: u32 = 35;
    pub(in super::super) const INTERRUPT: u32 = 36;
    pub(in super::super) const DESTROY: u32 = 38;
    pub(in super::super) const BATCH_FORGET: u32 = 42;
    pub(in super::super) const FALLOCATE: u32 = 43;
    pub(in super::super) const READDIRPLUS: u32 = 44;
    pub(in super::super) const RENAME2: u32 = 45;
}

/// Errors, as Linux numbers them.
pub(super) mod errno {
    pub(in super::super) const NOENT: i32 = 2;
    pub(in super::super) const IO: i32 = 5;
    pub(in super::super) const ACCES: i32 = 13;
    pub(in super::super) const NOTDIR: i32 = 20;
    pub(in super::super) const ISDIR: i32 = 21;
    pub(in super::super) const INVAL: i32 = 22;
    pub(in super::super) const ROFS: i32 = 30;
    pub(in super::super) const NOSYS: i32 = 38;
}

/// INIT: readdirplus may be used.
pub(super) const DO_READDIRPLUS: u32 = 1 << 13;

/// For how long the guest may trust what it was told, in seconds: the tree does not change.
const VALID: u64 = 86_400;

/// `fuse_in_header`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Request {
    pub(super) opcode: u32,
    pub(super) unique: u64,
    pub(super) node: u64,
}

impl Request {
    pub(super) fn from_words(words: [u64; 5]) -> Self {
        let [head, unique, node, _, _] = words;
        Self {
            opcode: (head >> 32) as u32,
            unique,
            node,
        }
    }
}

/// The length of `fuse_out_header`.
pub(super) const OUT_HEADER: usize = 16;

/// `fuse_out_header`: `error` is 0, or negative.
pub(super) fn out_header(len: usize, error: i32, unique: u64) -> [u8; OUT_HEADER] {
    let mut bytes = [0; OUT_HEADER];
    bytes[..4].copy_from_slice(&((OUT_HEADER + len) as u32).to_le_bytes());
    bytes[4..8].copy_from_slice(&error.to_le_bytes());
    bytes[8..].copy_from_slice(&unique.to_le_bytes());
    bytes
}

/// The type bits of a mode.
pub(super) fn file_type(kind: NodeKind) -> u32 {
    match kind {
        NodeKind::Directory => 0o040_000,
        NodeKind::File => 0o100_000,
        NodeKind::Link => 0o120_000,
    }
}

/// `fuse_attr`.
pub(super) fn attributes(node: u64, info: NodeInfo) -> [u8; 88] {
    let mut bytes = [0; 88];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    let rights = if info.executable { 0o555 } else { 0o444 };
    let links: u32 = if info.kind == NodeKind::Directory {
        2
    } else {
        1
    };
    put(0, &node.to_le_bytes());
    put(8, &info.size.to_le_bytes());
    put(16, &info.size.div_ceil(512).to_le_bytes());
    put(60, &(file_type(info.kind) | rights).to_le_bytes());
    put(64, &links.to_le_bytes());
    put(80, &4096u32.to_le_bytes());
    bytes
}

/// `fuse_entry_out`.
pub(super) fn entry(node: u64, info: NodeInfo) -> [u8; 128] {
    let mut bytes = [0; 128];
    bytes[..8].copy_from_slice(&node.to_le_bytes());
    bytes[16..24].copy_from_slice(&VALID.to_le_bytes());
    bytes[24..32].copy_from_slice(&VALID.to_le_bytes());
    bytes[40..].copy_from_slice(&attributes(node, info));
    bytes
}

/// `fuse_attr_out`.
pub(super) fn attributes_out(node: u64, info: NodeInfo) -> [u8; 104] {
    let mut bytes = [0; 104];
    bytes[..8].copy_from_slice(&VALID.to_le_bytes());
    bytes[16..].copy_from_slice(&attributes(node, info));
    bytes
}

/// `fuse_init_out`.
pub(super) fn init_out(readahead: u32, flags: u32) -> [u8; 64] {
    let mut bytes = [0; 64];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0, &MAJOR.to_le_bytes());
    put(4, &MINOR.to_le_bytes());
    put(8, &readahead.to_le_bytes());
    put(12, &flags.to_le_bytes());
    put(16, &16u16.to_le_bytes());
    put(18, &12u16.to_le_bytes());
    put(20, &4096u32.to_le_bytes());
    put(24, &1u32.to_le_bytes());
    bytes
}

/// `fuse_statfs_out`: a full file system.
pub(super) fn statfs_out() -> [u8; 80] {
    let mut bytes = [0; 80];
    bytes[40..44].copy_from_slice(&4096u32.to_le_bytes());
    bytes[44..48].copy_from_slice(&255u32.to_le_bytes());
    bytes[48..52].copy_from_slice(&4096u32.to_le_bytes());
    bytes
}

/// The fixed part of `fuse_dirent`; the name and zeros up to a multiple of 8 follow.
pub(super) fn directory_entry(node: u64, next: u64, name: &str, kind: NodeKind) -> [u8; 24] {
    let mut bytes = [0; 24];
    bytes[..8].copy_from_slice(&node.to_le_bytes());
    bytes[8..16].copy_from_slice(&next.to_le_bytes());
    bytes[16..20].copy_from_slice(&(name.len() as u32).to_le_bytes());
    bytes[20..].copy_from_slice(&(file_type(kind) >> 12).to_le_bytes());
    bytes
}
