//! A read-only directory tree.

use alloc::string::String;
use alloc::vec::Vec;

use testudo_arch::MemoryFault;

/// The number of the root directory, as FUSE has it.
pub const ROOT: u64 = 1;

/// What something in a tree is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeKind {
    /// A directory.
    Directory,
    /// A file.
    File,
    /// A symbolic link.
    Link,
}

/// What a tree tells about something in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeInfo {
    /// What it is.
    pub kind: NodeKind,
    /// Its size in bytes.
    pub size: u64,
    /// Whether it may be executed.
    pub executable: bool,
}

/// An entry of a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TreeEntry<'t> {
    /// The name, without slashes.
    pub name: &'t str,
    /// The number of what has this name.
    pub node: u64,
    /// What it is.
    pub kind: NodeKind,
}

/// A read-only directory tree, by numbers of its nodes; the root is [`ROOT`].
///
/// Numbers come from the guest: one that does not exist is none.
pub trait TreeBackend: Send {
    /// What a node is.
    fn info(&self, node: u64) -> Option<NodeInfo>;

    /// The entry with this name in a directory.
    fn lookup(&self, directory: u64, name: &[u8]) -> Option<u64>;

    /// The entry at this place in a directory.
    fn entry(&self, directory: u64, index: u64) -> Option<TreeEntry<'_>>;

    /// The directory that a directory is in; its own for the root.
    fn parent(&self, directory: u64) -> Option<u64>;

    /// Gives `len` bytes of a file, or of a link's target, from `offset` on to `sink`. The range
    /// lies within the node's size.
    ///
    /// # Errors
    ///
    /// Those of `sink`.
    fn read(
        &mut self,
        node: u64,
        offset: u64,
        len: u64,
        sink: &mut dyn FnMut(&[u8]) -> Result<(), MemoryFault>,
    ) -> Result<(), MemoryFault>;
}

#[derive(Clone, Debug)]
struct Node {
    kind: NodeKind,
    executable: bool,
    parent: usize,
    bytes: Vec<u8>,
    /// Name and index of what is in a directory.
    entries: Vec<(String, usize)>,
}

/// A directory tree in memory.
///
/// ```
/// use testudo_virtio::backend::{MemoryTree, ROOT, TreeBackend};
///
/// let tree = MemoryTree::new()
///     .with_file("etc/motd", b"welcome\n".to_vec())
///     .with_program("bin/init", b"#!/bin/sh\n".to_vec());
/// let etc = tree.lookup(ROOT, b"etc").unwrap();
/// let motd = tree.lookup(etc, b"motd").unwrap();
/// assert_eq!(tree.info(motd).unwrap().size, 8);
/// ```
#[derive(Clone, Debug)]
pub struct MemoryTree {
    nodes: Vec<Node>,
}

impl Default for MemoryTree {
    fn default() -> Self {
        Self::new()
    }
}

impl MemoryTree {
    /// A tree with an empty root.
    pub fn new() -> Self {
        let mut tree = Self { nodes: Vec::new() };
        tree.add(NodeKind::Directory, 0, Vec::new());
        tree
    }

    fn add(&mut self, kind: NodeKind, parent: usize, bytes: Vec<u8>) -> usize {
        self.nodes.push(Node {
            kind,
            executable: kind == NodeKind::Directory,
            parent,
            bytes,
            entries: Vec::new(),
        });
        self.nodes.len() - 1
    }

    /// The node at a path, made if it is not there; directories on the way are made too.
    fn place(&mut self, path: &str, kind: NodeKind, bytes: Vec<u8>) -> usize {
        let mut names = path.split('/').filter(|name| !name.is_empty()).peekable();
        let mut at = 0;
        while let Some(name) = names.next() {
            let last = names.peek().is_none();
            let found = self.nodes[at].entries.iter().find(|(n, _)| n == name);
            at = match found.map(|(_, node)| *node) {
                Some(node) if last && self.nodes[node].kind == kind => {
                    self.nodes[node].bytes = bytes;
                    return node;
                }
                // What is in the way of a directory, or is of another kind, gives way.
                Some(node) if last || self.nodes[node].kind != NodeKind::Directory => {
                    self.nodes[at].entries.retain(|(n, _)| n != name);
                    self.enter(at, name, kind, last, &bytes)
                }
                Some(node) => node,
                None => self.enter(at, name, kind, last, &bytes),
            };
        }
        at
    }

    fn enter(&mut self, at: usize, name: &str, kind: NodeKind, last: bool, bytes: &[u8]) -> usize {
        let node = if last {
            self.add(kind, at, bytes.to_vec())
        } else {
            self.add(NodeKind::Directory, at, Vec::new())
        };
        self.nodes[at].entries.push((name.into(), node));
        node
    }

    /// Adds a file, or replaces it.
    #[must_use]
    pub fn with_file(mut self, path: &str, bytes: Vec<u8>) -> Self {
        self.place(path, NodeKind::File, bytes);
        self
    }

    /// Adds a file that can be executed, or replaces it.
    #[must_use]
    pub fn with_program(mut self, path: &str, bytes: Vec<u8>) -> Self {
        let node = self.place(path, NodeKind::File, bytes);
        self.nodes[node].executable = true;
        self
    }

    /// Adds an empty directory.
    #[must_use]
    pub fn with_directory(mut self, path: &str) -> Self {
        self.place(path, NodeKind::Directory, Vec::new());
        self
    }

    /// Adds a symbolic link, or replaces it.
    #[must_use]
    pub fn with_link(mut self, path: &str, target: &str) -> Self {
        self.place(path, NodeKind::Link, target.into());
        self
    }

    fn node(&self, node: u64) -> Option<&Node> {
        let index = usize::try_from(node).ok()?.checked_sub(ROOT as usize)?;
        self.nodes.get(index)
    }
}

impl TreeBackend for MemoryTree {
    fn info(&self, node: u64) -> Option<NodeInfo> {
        let node = self.node(node)?;
        Some(NodeInfo {
            kind: node.kind,
            size: node.bytes.len() as u64,
            executable: node.executable,
        })
    }

    fn lookup(&self, directory: u64, name: &[u8]) -> Option<u64> {
        let entries = &self.node(directory)?.entries;
        let found = entries.iter().find(|(n, _)| n.as_bytes() == name);
        found.map(|(_, node)| *node as u64 + ROOT)
    }

    fn entry(&self, directory: u64, index: u64) -> Option<TreeEntry<'_>> {
        let entries = &self.node(directory)?.entries;
        let (name, node) = entries.get(usize::try_from(index).ok()?)?;
        Some(TreeEntry {
            name,
            node: *node as u64 + ROOT,
            kind: self.nodes[*node].kind,
        })
    }

    fn parent(&self, directory: u64) -> Option<u64> {
        Some(self.node(directory)?.parent as u64 + ROOT)
    }

    fn read(
        &mut self,
        node: u64,
        offset: u64,
        len: u64,
        sink: &mut dyn FnMut(&[u8]) -> Result<(), MemoryFault>,
    ) -> Result<(), MemoryFault> {
        let Some(node) = self.node(node) else {
            return Ok(());
        };
        let end = offset.saturating_add(len).min(node.bytes.len() as u64);
        sink(&node.bytes[offset.min(end) as usize..end as usize])
    }
}
