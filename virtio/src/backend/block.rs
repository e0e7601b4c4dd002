//! Where the bytes of a disk are.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;

use testudo_arch::MemoryFault;

/// Why a disk could not do what it was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BlockError {
    /// The range goes past the end.
    #[error("{len} bytes at {offset} go past the end of the disk")]
    OutOfRange {
        /// Where the range begins, in bytes.
        offset: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// The disk may not be written.
    #[error("the disk is read-only")]
    ReadOnly,
    /// The place for changed blocks is used up.
    #[error("no space for another changed block")]
    NoSpace,
    /// The medium failed.
    #[error("input or output error")]
    Medium,
    /// The other side of the copy, in guest memory, is not memory.
    #[error(transparent)]
    Guest(#[from] MemoryFault),
}

/// What takes the bytes that were read, piece by piece in order.
pub type Sink<'a> = &'a mut dyn FnMut(&[u8]) -> Result<(), BlockError>;

/// What gives the bytes to write, filling piece by piece in order.
pub type Source<'a> = &'a mut dyn FnMut(&mut [u8]) -> Result<(), BlockError>;

/// The bytes of a disk.
///
/// Reads and writes go through callbacks, so that a backend that holds its bytes in memory lends
/// them, and each byte is copied once between it and the guest. All ranges are in bytes.
pub trait BlockBackend: Send {
    /// The size in bytes.
    fn size(&self) -> u64;

    /// Whether writes are refused.
    fn read_only(&self) -> bool {
        false
    }

    /// Gives `len` bytes from `offset` on to `sink`.
    ///
    /// # Errors
    ///
    /// The range goes past the end, the medium fails, or `sink` does.
    fn read(&mut self, offset: u64, len: u64, sink: Sink<'_>) -> Result<(), BlockError>;

    /// Replaces `len` bytes from `offset` on by what `source` gives.
    ///
    /// # Errors
    ///
    /// The range goes past the end, the medium fails or is read-only, or `source` fails.
    fn write(&mut self, offset: u64, len: u64, source: Source<'_>) -> Result<(), BlockError>;

    /// Makes all that was written durable.
    ///
    /// # Errors
    ///
    /// The medium fails.
    fn flush(&mut self) -> Result<(), BlockError> {
        Ok(())
    }

    /// Zeroes a range; with `unmap` its place may be given back.
    ///
    /// # Errors
    ///
    /// As for [`write`](Self::write).
    fn write_zeroes(&mut self, offset: u64, len: u64, _unmap: bool) -> Result<(), BlockError> {
        self.write(offset, len, &mut |piece| {
            piece.fill(0);
            Ok(())
        })
    }

    /// Says that the contents of a range no longer matter.
    ///
    /// # Errors
    ///
    /// As for [`write`](Self::write).
    fn discard(&mut self, _offset: u64, _len: u64) -> Result<(), BlockError> {
        Ok(())
    }
}

impl<B: BlockBackend + ?Sized> BlockBackend for Box<B> {
    fn size(&self) -> u64 {
        (**self).size()
    }
    fn read_only(&self) -> bool {
        (**self).read_only()
    }
    fn read(&mut self, offset: u64, len: u64, sink: Sink<'_>) -> Result<(), BlockError> {
        (**self).read(offset, len, sink)
    }
    fn write(&mut self, offset: u64, len: u64, source: Source<'_>) -> Result<(), BlockError> {
        (**self).write(offset, len, source)
    }
    fn flush(&mut self) -> Result<(), BlockError> {
        (**self).flush()
    }
    fn write_zeroes(&mut self, offset: u64, len: u64, unmap: bool) -> Result<(), BlockError> {
        (**self).write_zeroes(offset, len, unmap)
    }
    fn discard(&mut self, offset: u64, len: u64) -> Result<(), BlockError> {
        (**self).discard(offset, len)
    }
}

/// The indices of a range in a slice of `size` bytes.
fn range(size: usize, offset: u64, len: u64) -> Result<core::ops::Range<usize>, BlockError> {
    let error = BlockError::OutOfRange { offset, len };
    let start = usize::try_from(offset).map_err(|_| error)?;
    let end = usize::try_from(len)
        .ok()
        .and_then(|len| start.checked_add(len))
        .ok_or(error)?;
    if end > size {
        return Err(error);
    }
    Ok(start..end)
}

/// A disk in memory: a vector, a boxed slice, a mapped file.
#[derive(Clone, Debug)]
pub struct MemoryImage<T>(pub T);

impl<T: AsRef<[u8]> + AsMut<[u8]> + Send> BlockBackend for MemoryImage<T> {
    fn size(&self) -> u64 {
        self.0.as_ref().len() as u64
    }

    #[inline]
    fn read(&mut self, offset: u64, len: u64, sink: Sink<'_>) -> Result<(), BlockError> {
        let bytes = self.0.as_ref();
        sink(&bytes[range(bytes.len(), offset, len)?])
    }

    #[inline]
    fn write(&mut self, offset: u64, len: u64, source: Source<'_>) -> Result<(), BlockError> {
        let bytes = self.0.as_mut();
        let range = range(bytes.len(), offset, len)?;
        source(&mut bytes[range])
    }
}

/// A read-only disk in memory, for example a module that a boot loader left there.
#[derive(Clone, Copy, Debug)]
pub struct ReadOnlyImage<T>(pub T);

impl<T: AsRef<[u8]> + Send> BlockBackend for ReadOnlyImage<T> {
    fn size(&self) -> u64 {
        self.0.as_ref().len() as u64
    }

    fn read_only(&self) -> bool {
        true
    }

    #[inline]
    fn read(&mut self, offset: u64, len: u64, sink: Sink<'_>) -> Result<(), BlockError> {
        let bytes = self.0.as_ref();
        sink(&bytes[range(bytes.len(), offset, len)?])
    }

    fn write(&mut self, _: u64, _: u64, _: Source<'_>) -> Result<(), BlockError> {
        Err(BlockError::ReadOnly)
    }
}

/// The unit in which an [`Overlay`] keeps changes.
const BLOCK: u64 = 4096;

/// A writable disk over one that stays as it is: changed blocks are kept in memory, at most a
/// given number of them.
#[derive(Debug)]
pub struct Overlay<B> {
    base: B,
    changed: BTreeMap<u64, Box<[u8; BLOCK as usize]>>,
    max_blocks: usize,
}

impl<B: BlockBackend> Overlay<B> {
    /// An overlay of at most `max_bytes` of changes (rounded down to blocks of 4 KiB).
    pub fn new(base: B, max_bytes: u64) -> Self {
        Self {
            base,
            changed: BTreeMap::new(),
            max_blocks: usize::try_from(max_bytes / BLOCK).unwrap_or(usize::MAX),
        }
    }

    /// The number of bytes that the changed blocks take.
    pub fn changed_bytes(&self) -> u64 {
        self.changed.len() as u64 * BLOCK
    }

    /// The changed blocks by ascending offset. A block at the end of the disk is cut where the disk
    /// ends.
    pub fn changes(&self) -> impl Iterator<Item = (u64, &[u8])> {
        let size = self.base.size();
        self.changed.iter().map(move |(&block, bytes)| {
            let offset = block * BLOCK;
            (offset, &bytes[..BLOCK.min(size - offset) as usize])
        })
    }

    /// Forgets all changes.
    pub fn revert(&mut self) {
        self.changed.clear();
    }

    fn check(&self, offset: u64, len: u64) -> Result<(), BlockError> {
        match offset.checked_add(len) {
            Some(end) if end <= self.base.size() => Ok(()),
            _ => Err(BlockError::OutOfRange { offset, len }),
        }
    }

    /// The changed copy of a block, made from the base if there is none yet.
    fn block(&mut self, block: u64) -> Result<&mut [u8; BLOCK as usize], BlockError> {
        if !self.changed.contains_key(&block) {
            if self.changed.len() >= self.max_blocks {
                return Err(BlockError::NoSpace);
            }
            let mut copy = Box::new([0; BLOCK as usize]);
            let start = block * BLOCK;
            let len = BLOCK.min(self.base.size() - start);
            let mut done = 0;
            self.base.read(start, len, &mut |piece| {
                copy[done..done + piece.len()].copy_from_slice(piece);
                done += piece.len();
                Ok(())
            })?;
            self.changed.insert(block, copy);
        }
        self.changed
            .get_mut(&block)
            .map(|b| &mut **b)
            .ok_or(BlockError::NoSpace)
    }
}

impl<B: BlockBackend> BlockBackend for Overlay<B> {
    fn size(&self) -> u64 {
        self.base.size()
    }

    fn read(&mut self, offset: u64, len: u64, sink: Sink<'_>) -> Result<(), BlockError> {
        self.check(offset, len)?;
        let mut at = offset;
        let end = offset + len;
        while at < end {
            let within = at % BLOCK;
            let mut part = (BLOCK - within).min(end - at);
            if let Some(block) = self.changed.get(&(at / BLOCK)) {
                sink(&block[within as usize..(within + part) as usize])?;
            } else {
                // Up to the next changed block the base answers in one piece.
                let next = self.changed.range(at / BLOCK + 1..).next();
                let limit = next.map_or(end, |(block, _)| (block * BLOCK).min(end));
                part = limit - at;
                self.base.read(at, part, sink)?;
            }
            at += part;
        }
        Ok(())
    }

    fn write(&mut self, offset: u64, len: u64, source: Source<'_>) -> Result<(), BlockError> {
        self.check(offset, len)?;
        let mut at = offset;
        let end = offset + len;
        while at < end {
            let within = at % BLOCK;
            let part = (BLOCK - within).min(end - at);
            let block = self.block(at / BLOCK)?;
            source(&mut block[within as usize..(within + part) as usize])?;
            at += part;
        }
        Ok(())
    }
}

#[cfg(feature = "std")]
pub use file::FileImage;

#[cfg(feature = "std")]
mod file {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use super::{BlockBackend, BlockError, Sink, Source};

    /// A disk in a file. Bytes pass through one buffer between the file and the guest.
    #[derive(Debug)]
    pub struct FileImage {
        file: File,
        size: u64,
        read_only: bool,
        buffer: std::vec::Vec<u8>,
    }

    impl FileImage {
        /// The disk that `file` holds.
        ///
        /// # Errors
        ///
        /// The size of the file cannot be found out.
        pub fn new(file: File, read_only: bool) -> std::io::Result<Self> {
            Ok(Self {
                size: file.metadata()?.len(),
                file,
                read_only,
                buffer: std::vec![0; 128 << 10],
            })
        }

        fn check(&self, offset: u64, len: u64) -> Result<(), BlockError> {
            match offset.checked_add(len) {
                Some(end) if end <= self.size => Ok(()),
                _ => Err(BlockError::OutOfRange { offset, len }),
            }
        }
    }

    impl BlockBackend for FileImage {
        fn size(&self) -> u64 {
            self.size
        }

        fn read_only(&self) -> bool {
            self.read_only
        }

        fn read(&mut self, offset: u64, len: u64, sink: Sink<'_>) -> Result<(), BlockError> {
            self.check(offset, len)?;
            let (mut at, end) = (offset, offset + len);
            while at < end {
                let part = (self.buffer.len() as u64).min(end - at);
                let buffer = &mut self.buffer[..part as usize];
                let read = self.file.read_exact_at(buffer, at);
                read.map_err(|_| BlockError::Medium)?;
                sink(buffer)?;
                at += part;
            }
            Ok(())
        }

        fn write(&mut self, offset: u64, len: u64, source: Source<'_>) -> Result<(), BlockError> {
            if self.read_only {
                return Err(BlockError::ReadOnly);
            }
            self.check(offset, len)?;
            let (mut at, end) = (offset, offset + len);
            while at < end {
                let part = (self.buffer.len() as u64).min(end - at);
                let buffer = &mut self.buffer[..part as usize];
                source(buffer)?;
                let written = self.file.write_all_at(buffer, at);
                written.map_err(|_| BlockError::Medium)?;
                at += part;
            }
            Ok(())
        }

        fn flush(&mut self) -> Result<(), BlockError> {
            self.file.sync_data().map_err(|_| BlockError::Medium)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;
    use alloc::vec::Vec;

    fn contents(backend: &mut impl BlockBackend, offset: u64, len: u64) -> Vec<u8> {
        let mut all = Vec::new();
        let mut take = |piece: &[u8]| {
            all.extend_from_slice(piece);
            Ok(())
        };
        backend.read(offset, len, &mut take).unwrap();
        all
    }

    #[test]
    fn an_overlay_leaves_its_base_alone() {
        let base: Vec<u8> = (0..20_000u32).map(|i| i as u8).collect();
        let mut overlay = Overlay::new(ReadOnlyImage(base.clone()), 1 << 20);
        let mut ones = |piece: &mut [u8]| {
            piece.fill(1);
            Ok(())
        };
        overlay.write(5000, 4000, &mut ones).unwrap();
        overlay.write(19_999, 1, &mut ones).unwrap();
        let mut expected = base.clone();
        expected[5000..9000].fill(1);
        expected[19_999] = 1;
        assert_eq!(contents(&mut overlay, 0, 20_000), expected);
        assert_eq!(
            contents(&mut overlay, 8999, 3),
            [1, expected[9000], expected[9001]]
        );
        assert_eq!(overlay.changed_bytes(), 3 * 4096);
        let mut copy = base.clone();
        for (offset, bytes) in overlay.changes() {
            copy[offset as usize..][..bytes.len()].copy_from_slice(bytes);
        }
        assert_eq!(copy, expected);
        overlay.revert();
        assert_eq!(contents(&mut overlay, 0, 20_000), base);
    }

    #[test]
    fn an_overlay_is_bounded() {
        let mut overlay = Overlay::new(MemoryImage(vec![0; 1 << 20]), 8192);
        assert_eq!(overlay.write_zeroes(0, 8192, false), Ok(()));
        assert_eq!(
            overlay.write_zeroes(8192, 1, false),
            Err(BlockError::NoSpace)
        );
        assert_eq!(overlay.write_zeroes(1, 1, false), Ok(()));
    }

    #[test]
    fn ranges_past_the_end_are_refused() {
        let mut image = MemoryImage(vec![0; 1024]);
        for (offset, len) in [(1024, 1), (0, 1025), (u64::MAX, 1), (1, u64::MAX)] {
            let error = BlockError::OutOfRange { offset, len };
            assert_eq!(image.write_zeroes(offset, len, true), Err(error));
            let mut overlay = Overlay::new(image.clone(), 1 << 20);
            assert_eq!(overlay.write_zeroes(offset, len, true), Err(error));
        }
        let refused = ReadOnlyImage([0; 4]).write_zeroes(0, 1, false);
        assert_eq!(refused, Err(BlockError::ReadOnly));
    }

    #[cfg(feature = "std")]
    #[test]
    fn a_file_keeps_what_is_written() {
        let path = std::env::temp_dir().join(std::format!("testudo-{}.img", std::process::id()));
        let open = || {
            let mut options = std::fs::OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false);
            options.open(&path).unwrap()
        };
        open().set_len(300_000).unwrap();
        let mut image = FileImage::new(open(), false).unwrap();
        assert_eq!(image.size(), 300_000);
        // Longer than the buffer in between.
        let mut next = 0u32;
        let mut count = |piece: &mut [u8]| {
            for byte in piece {
                *byte = (next / 3) as u8;
                next += 1;
            }
            Ok(())
        };
        image.write(10_000, 280_000, &mut count).unwrap();
        image.flush().unwrap();
        let mut again = FileImage::new(open(), true).unwrap();
        let all = contents(&mut again, 0, 300_000);
        let expected = |i: usize| match i.checked_sub(10_000) {
            Some(i) if i < 280_000 => (i as u32 / 3) as u8,
            _ => 0,
        };
        assert!(all.iter().enumerate().all(|(i, &byte)| byte == expected(i)));
        assert_eq!(again.write_zeroes(0, 1, false), Err(BlockError::ReadOnly));
        let past = again.read(299_999, 2, &mut |_| Ok(()));
        let (offset, len) = (299_999, 2);
        assert_eq!(past, Err(BlockError::OutOfRange { offset, len }));
        std::fs::remove_file(&path).unwrap();
    }
}
