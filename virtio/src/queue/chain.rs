//! Chains: buffers of the driver, to be read and to be written.

use testudo_arch::{Gpa, GuestMemory, MemoryFault};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// One contiguous buffer of a chain: never empty, never wrapping around. Whether it is memory
/// shows when it is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// Where it begins.
    pub gpa: Gpa,
    /// Its length in bytes.
    pub len: u32,
}

/// The obligation to return a chain to the queue it came from.
///
/// It cannot be copied, so a chain cannot be returned twice.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a chain that is not completed is lost to the driver until the queue is reset"]
pub struct Token {
    /// Its number, and above that how many places of the ring it occupies. Two words travel in
    /// registers; three parts of them would be packed and unpacked.
    pub(super) chain: u32,
    pub(super) sequence: u32,
}

impl Token {
    #[inline(always)]
    pub(super) fn new(id: u16, descriptors: u16, sequence: u32) -> Self {
        Self {
            chain: u32::from(id) | (u32::from(descriptors) << 16),
            sequence,
        }
    }

    /// The number by which the driver knows the chain.
    #[inline]
    pub fn id(&self) -> u16 {
        self.chain as u16
    }

    #[inline(always)]
    pub(super) fn descriptors(&self) -> u16 {
        (self.chain >> 16) as u16
    }
}

/// A chain that the driver made available: checked, and no longer the driver's to change.
#[derive(Debug)]
#[must_use = "a chain that is not completed is lost to the driver until the queue is reset"]
pub struct Chain<'q> {
    pub(super) token: Token,
    pub(super) readable: &'q [Segment],
    pub(super) writable: &'q [Segment],
}

impl<'q> Chain<'q> {
    /// The buffers that the device reads, in order.
    #[inline]
    pub fn readable(&self) -> &'q [Segment] {
        self.readable
    }

    /// The buffers that the device writes, in order.
    #[inline]
    pub fn writable(&self) -> &'q [Segment] {
        self.writable
    }

    /// A cursor over the readable bytes.
    #[inline]
    pub fn reader<'m, M: GuestMemory>(&self, memory: &'m M) -> Reader<'q, 'm, M> {
        Reader {
            memory,
            at: Cursor::new(self.readable),
        }
    }

    /// A cursor over the writable bytes.
    #[inline]
    pub fn writer<'m, M: GuestMemory>(&self, memory: &'m M) -> Writer<'q, 'm, M> {
        Writer {
            memory,
            at: Cursor::new(self.writable),
            written: 0,
        }
    }

    /// What is needed to return the chain.
    #[inline]
    pub fn into_token(self) -> Token {
        self.token
    }
}

/// A place in a list of segments.
#[derive(Clone, Debug)]
struct Cursor<'q> {
    segments: &'q [Segment],
    offset: u32,
    remaining: u64,
}

impl<'q> Cursor<'q> {
    #[inline]
    fn new(segments: &'q [Segment]) -> Self {
        Self {
            segments,
            offset: 0,
            remaining: segments.iter().map(|s| u64::from(s.len)).sum(),
        }
    }

    /// The next contiguous piece of at most `max` bytes; the cursor moves past it.
    #[inline]
    fn take(&mut self, max: usize) -> Option<(Gpa, usize)> {
        let (first, rest) = self.segments.split_first()?;
        let max = u64::try_from(max).unwrap_or(u64::MAX).min(self.remaining);
        let left = first.len - self.offset;
        let piece = u64::from(left).min(max);
        if piece == 0 {
            return None;
        }
        let gpa = first.gpa.wrapping_add(self.offset.into());
        self.remaining -= piece;
        if piece == u64::from(left) {
            self.segments = rest;
            self.offset = 0;
        } else {
            self.offset += piece as u32;
        }
        Some((gpa, piece as usize))
    }

    /// Splits off everything from `at` on, which must not be past the end.
    fn split_at(&mut self, at: u64) -> Option<Self> {
        let remaining = self.remaining.checked_sub(at)?;
        let mut tail = self.clone();
        tail.skip(at);
        self.remaining = at;
        tail.remaining = remaining;
        Some(tail)
    }

    fn skip(&mut self, bytes: u64) {
        let mut left = bytes.min(self.remaining);
        while left > 0 {
            let Some((_, moved)) = self.take(usize::try_from(left).unwrap_or(usize::MAX)) else {
                return;
            };
            left -= moved as u64;
        }
    }
}

/// Why bytes of a chain could not be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// A buffer is not (all) in memory.
    #[error(transparent)]
    Memory(#[from] MemoryFault),
    /// The chain has fewer bytes than the device needs.
    #[error("the chain ends {0} bytes early")]
    Short(u64),
}

/// Reads through the readable buffers of a chain, wherever their boundaries are (the device must
/// not depend on them: VIRTIO 1.3, 2.6.4).
#[derive(Debug)]
pub struct Reader<'q, 'm, M> {
    memory: &'m M,
    at: Cursor<'q>,
}

impl<M: GuestMemory> Reader<'_, '_, M> {
    /// The bytes left.
    #[inline]
    pub fn remaining(&self) -> u64 {
        self.at.remaining
    }

    /// Copies bytes until `buf` is full or the chain at its end, and says how many.
    ///
    /// # Errors
    ///
    /// A buffer is not in memory.
    #[inline]
    pub fn read(&mut self, buf: &mut [u8]) -> Result<usize, MemoryFault> {
        let mut done = 0;
        while done < buf.len() {
            let Some((gpa, len)) = self.at.take(buf.len() - done) else {
                break;
            };
            self.memory.read(gpa, &mut buf[done..done + len])?;
            done += len;
        }
        Ok(done)
    }

    /// Fills `buf`.
    ///
    /// # Errors
    ///
    /// The chain has not that many bytes, or a buffer is not in memory.
    #[inline]
    pub fn read_exact(&mut self, buf: &mut [u8]) -> Result<(), ReadError> {
        let missing = (buf.len() as u64).saturating_sub(self.remaining());
        if missing > 0 {
            return Err(ReadError::Short(missing));
        }
        self.read(buf)?;
        Ok(())
    }

    /// Copies a value out.
    ///
    /// # Errors
    ///
    /// As for [`read_exact`](Self::read_exact).
    #[inline]
    pub fn read_value<T: FromBytes + IntoBytes>(&mut self) -> Result<T, ReadError> {
        let mut value = T::new_zeroed();
        self.read_exact(value.as_mut_bytes())?;
        Ok(value)
    }

    /// Moves past `bytes` bytes, or to the end.
    pub fn skip(&mut self, bytes: u64) {
        self.at.skip(bytes);
    }

    /// Visits the rest as contiguous pieces of guest memory, in order.
    pub fn pieces(&mut self) -> impl Iterator<Item = (Gpa, usize)> {
        core::iter::from_fn(|| self.at.take(usize::MAX))
    }
}

/// Writes through the writable buffers of a chain, and counts.
#[derive(Debug)]
pub struct Writer<'q, 'm, M> {
    memory: &'m M,
    at: Cursor<'q>,
    written: u32,
}

impl<'q, 'm, M: GuestMemory> Writer<'q, 'm, M> {
    /// The bytes left.
    #[inline]
    pub fn remaining(&self) -> u64 {
        self.at.remaining
    }

    /// The bytes written through this cursor, for [`Queue::complete`](super::Queue::complete).
    #[inline]
    pub fn written(&self) -> u32 {
        self.written
    }

    /// Copies bytes until `data` is used up or the chain full, and says how many.
    ///
    /// # Errors
    ///
    /// A buffer is not memory that can be written.
    #[inline]
    pub fn write(&mut self, data: &[u8]) -> Result<usize, MemoryFault> {
        let mut done = 0;
        while done < data.len() {
            let Some((gpa, len)) = self.at.take(data.len() - done) else {
                break;
            };
            self.memory.write(gpa, &data[done..done + len])?;
            done += len;
            // The bounds of a chain keep the sum below 2^32.
            self.written = self.written.saturating_add(len as u32);
        }
        Ok(done)
    }

    /// Copies all of `data`.
    ///
    /// # Errors
    ///
    /// The chain has no room for all of it (then nothing is written), or a buffer is not memory
    /// that can be written.
    #[inline]
    pub fn write_all(&mut self, data: &[u8]) -> Result<(), ReadError> {
        let missing = (data.len() as u64).saturating_sub(self.remaining());
        if missing > 0 {
            return Err(ReadError::Short(missing));
        }
        self.write(data)?;
        Ok(())
    }

    /// Copies a value in.
    ///
    /// # Errors
    ///
    /// As for [`write_all`](Self::write_all).
    #[inline]
    pub fn write_value<T: IntoBytes + Immutable>(&mut self, value: &T) -> Result<(), ReadError> {
        self.write_all(value.as_bytes())
    }

    /// Cuts off the last `bytes` bytes as a writer of their own; `None` if there are not so many.
    pub fn split_last(&mut self, bytes: u64) -> Option<Writer<'q, 'm, M>> {
        let at = self.at.remaining.checked_sub(bytes)?;
        Some(Writer {
            memory: self.memory,
            at: self.at.split_at(at)?,
            written: 0,
        })
    }
}
