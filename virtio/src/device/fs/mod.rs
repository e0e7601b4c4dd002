//! The file system device (VIRTIO 1.3, 5.11): a read-only tree by the messages of FUSE.

mod fuse;

use alloc::vec;
use alloc::vec::Vec;

use testudo_arch::GuestMemory;

use super::{Device, DeviceError, DeviceId, Io, Next, read_config_bytes};
use crate::Features;
use crate::backend::{NodeKind, TreeBackend};
use crate::queue::{Bounds, Chain, Reader, Writer};
use fuse::{OUT_HEADER, Request, errno, opcode};

/// The length of the tag in the configuration space.
const TAG: usize = 36;
/// The longest name in a request.
const MAX_NAME: usize = 255;
/// The most entries in one answer to a request for a directory.
const MAX_ENTRIES: u64 = 512;

/// The file system device.
#[derive(Debug)]
pub struct Fs<B> {
    tree: B,
    tag: [u8; TAG],
    queues: Vec<u16>,
}

impl<B: TreeBackend> Fs<B> {
    /// A device that offers `tree` under a tag of at most 36 bytes, by which the guest mounts it.
    pub fn new(tree: B, tag: &str) -> Self {
        let mut bytes = [0; TAG];
        let len = tag.len().min(TAG);
        bytes[..len].copy_from_slice(&tag.as_bytes()[..len]);
        Self {
            tree,
            tag: bytes,
            // One for what must not wait, one for all else.
            queues: vec![64, 128],
        }
    }
}

/// The outcome of a request: bytes to answer with, or an error's number.
type Outcome = Result<(), i32>;

/// One request while it is answered.
struct Exchange<'q, 'm, M> {
    request: Request,
    reader: Reader<'q, 'm, M>,
    /// Where the answer's header goes, and what follows it.
    header: Writer<'q, 'm, M>,
    body: Writer<'q, 'm, M>,
}

/// What stops a request.
enum Stop {
    Error(i32),
    Driver(DeviceError),
}

impl<E: Into<DeviceError>> From<E> for Stop {
    fn from(error: E) -> Self {
        Self::Driver(error.into())
    }
}

impl<M: GuestMemory> Exchange<'_, '_, M> {
    /// Puts bytes into the answer; too little room for them is an error of the request.
    fn put(&mut self, bytes: &[u8]) -> Result<(), Stop> {
        if self.body.remaining() < bytes.len() as u64 {
            return Err(Stop::Error(errno::INVAL));
        }
        self.body.write(bytes)?;
        Ok(())
    }

    /// The name that ends the request, without its zero.
    fn name<'n>(&mut self, buffer: &'n mut [u8; MAX_NAME + 1]) -> Result<&'n [u8], Stop> {
        let len = self.reader.read(buffer)?;
        let end = buffer[..len].iter().position(|&byte| byte == 0);
        Ok(&buffer[..end.ok_or(Stop::Error(errno::INVAL))?])
    }
}

impl<B: TreeBackend> Fs<B> {
    fn request<M: GuestMemory>(
        tree: &mut B,
        memory: &M,
        chain: &Chain<'_>,
    ) -> Result<u32, DeviceError> {
        let mut reader = chain.reader(memory);
        let request = Request::from_words(reader.read_value()?);
        if matches!(request.opcode, opcode::FORGET | opcode::BATCH_FORGET) {
            // Numbers stay as they are, so there is nothing to forget, and nothing to answer.
            return Ok(0);
        }
        let mut header = chain.writer(memory);
        let room = header.remaining().checked_sub(OUT_HEADER as u64);
        let Some(body) = room.and_then(|room| header.split_last(room)) else {
            return Err(DeviceError::Malformed("no room for an answer's header"));
        };
        let mut exchange = Exchange {
            request,
            reader,
            header,
            body,
        };
        let outcome: Outcome = match Self::answer(tree, &mut exchange) {
            Ok(()) => Ok(()),
            Err(Stop::Error(error)) => Err(error),
            Err(Stop::Driver(error)) => return Err(error),
        };
        // An error comes without a body, even if part of one was written.
        let (len, error) = match outcome {
            Ok(()) => (exchange.body.written(), 0),
            Err(error) => (0, -error),
        };
        let bytes = fuse::out_header(len as usize, error, request.unique);
        exchange.header.write(&bytes)?;
        Ok(OUT_HEADER as u32 + len)
    }

    fn answer<M: GuestMemory>(tree: &mut B, x: &mut Exchange<'_, '_, M>) -> Result<(), Stop> {
        let node = x.request.node;
        let known = tree.info(node).ok_or(Stop::Error(errno::NOENT));
        match x.request.opcode {
            opcode::INIT => {
                let [major, _, readahead, flags]: [u32; 4] = x.reader.read_value()?;
                if major < fuse::MAJOR {
                    return Err(Stop::Error(errno::IO));
                }
                x.put(&fuse::init_out(readahead, flags & fuse::DO_READDIRPLUS))
            }
            opcode::LOOKUP => {
                let mut buffer = [0; MAX_NAME + 1];
                let name = x.name(&mut buffer)?;
                if known?.kind != NodeKind::Directory {
                    return Err(Stop::Error(errno::NOTDIR));
                }
                let found = tree
                    .lookup(node, name)
                    .and_then(|n| Some((n, tree.info(n)?)));
                let (node, info) = found.ok_or(Stop::Error(errno::NOENT))?;
                x.put(&fuse::entry(node, info))
            }
            opcode::GETATTR => x.put(&fuse::attributes_out(node, known?)),
            opcode::READLINK => {
                let info = known?;
                if info.kind != NodeKind::Link {
                    return Err(Stop::Error(errno::INVAL));
                }
                Self::read(tree, x, 0, info.size)
            }
            opcode::OPEN | opcode::OPENDIR => {
                let flags = u32::from_le_bytes(x.reader.read_value()?);
                let directory = known?.kind == NodeKind::Directory;
                match (x.request.opcode == opcode::OPENDIR, directory) {
                    (true, false) => return Err(Stop::Error(errno::NOTDIR)),
                    (false, true) => return Err(Stop::Error(errno::ISDIR)),
                    // Anything but O_RDONLY.
                    _ if flags & 3 != 0 => return Err(Stop::Error(errno::ROFS)),
                    _ => {}
                }
                // No handle; the page cache may be kept.
                let mut opened = [0; 16];
                opened[8] = 1 << 1;
                x.put(&opened)
            }
            opcode::READ => {
                let [_, offset, size, ..]: [u64; 5] = x.reader.read_value()?;
                let info = known?;
                if info.kind != NodeKind::File {
                    return Err(Stop::Error(errno::ISDIR));
                }
                let left = info.size.saturating_sub(offset);
                Self::read(tree, x, offset, left.min(size & 0xFFFF_FFFF))
            }
            opcode::READDIR | opcode::READDIRPLUS => {
                let [_, offset, size, ..]: [u64; 5] = x.reader.read_value()?;
                if known?.kind != NodeKind::Directory {
                    return Err(Stop::Error(errno::NOTDIR));
                }
                let plus = x.request.opcode == opcode::READDIRPLUS;
                Self::list(tree, x, offset, size & 0xFFFF_FFFF, plus)
            }
            opcode::STATFS => x.put(&fuse::statfs_out()),
            opcode::ACCESS => {
                let mask = u32::from_le_bytes(x.reader.read_value()?);
                let info = known?;
                match mask {
                    _ if mask & 2 != 0 => Err(Stop::Error(errno::ROFS)),
                    _ if mask & 1 != 0 && !info.executable => Err(Stop::Error(errno::ACCES)),
                    _ => Ok(()),
                }
            }
            opcode::RELEASE
            | opcode::RELEASEDIR
            | opcode::FLUSH
            | opcode::INTERRUPT
            | opcode::DESTROY => Ok(()),
            opcode::SETATTR
            | opcode::SYMLINK..=opcode::LINK
            | opcode::WRITE
            | opcode::SETXATTR
            | opcode::REMOVEXATTR
            | opcode::CREATE
            | opcode::FALLOCATE
            | opcode::RENAME2 => Err(Stop::Error(errno::ROFS)),
            _ => Err(Stop::Error(errno::NOSYS)),
        }
    }

    fn read<M: GuestMemory>(
        tree: &mut B,
        x: &mut Exchange<'_, '_, M>,
        offset: u64,
        len: u64,
    ) -> Result<(), Stop> {
        let len = len.min(x.body.remaining());
        let (node, body) = (x.request.node, &mut x.body);
        if len > 0 {
            tree.read(node, offset, len, &mut |piece| body.write(piece).map(drop))?;
        }
        Ok(())
    }

    /// Entries of a directory from place `offset` on, as many as fit into `size` bytes.
    fn list<M: GuestMemory>(
        tree: &B,
        x: &mut Exchange<'_, '_, M>,
        offset: u64,
        size: u64,
        plus: bool,
    ) -> Result<(), Stop> {
        let directory = x.request.node;
        let mut room = size.min(x.body.remaining());
        for place in offset..offset.saturating_add(MAX_ENTRIES) {
            // Before the entries come the directory itself and the one it is in.
            let (name, node, kind) = match place {
                0 => (".", directory, NodeKind::Directory),
                1 => {
                    let parent = tree.parent(directory).unwrap_or(directory);
                    ("..", parent, NodeKind::Directory)
                }
                _ => match tree.entry(directory, place - 2) {
                    Some(entry) => (entry.name, entry.node, entry.kind),
                    None => break,
                },
            };
            let entry = fuse::directory_entry(node, place + 1, name, kind);
            let padding = name.len().next_multiple_of(8) - name.len();
            let extra = if plus { 128 } else { 0 };
            let len = (extra + entry.len() + name.len() + padding) as u64;
            if len > room {
                break;
            }
            room -= len;
            if plus {
                // A node number of 0 says that this is no look-up: so it is for the two dots.
                let known = tree.info(node).filter(|_| place > 1);
                x.put(&known.map_or([0; 128], |info| fuse::entry(node, info)))?;
            }
            x.put(&entry)?;
            x.put(name.as_bytes())?;
            x.put(&[0; 8][..padding])?;
        }
        Ok(())
    }
}

impl<M: GuestMemory, B: TreeBackend> Device<M> for Fs<B> {
    fn id(&self) -> DeviceId {
        DeviceId::FS
    }

    fn features(&self) -> Features {
        Features::empty()
    }

    fn queues(&self) -> &[u16] {
        &self.queues
    }

    fn bounds(&self, _queue: u16) -> Bounds {
        // A read of the largest size that Linux asks for is 1 MiB in pages, in a table of its own.
        Bounds {
            segments: 512,
            bytes: 8 << 20,
        }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; TAG + 4];
        config[..TAG].copy_from_slice(&self.tag);
        config[TAG..].copy_from_slice(&(self.queues.len() as u32 - 1).to_le_bytes());
        read_config_bytes(&config, offset, data);
    }

    fn reset(&mut self) {}

    fn process(&mut self, queue: u16, io: &mut Io<'_, M>) -> Result<Next, DeviceError> {
        let tree = &mut self.tree;
        io.serve(queue, |memory, chain| Self::request(tree, memory, chain))
    }
}
