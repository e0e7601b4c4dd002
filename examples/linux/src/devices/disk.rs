//! Disks: files that the boot loader left in memory, and an empty one. What the guest changes is
//! kept beside them, block by block, and can be handed out at the end.

use alloc::boxed::Box;
use alloc::sync::Arc;

use spin::Mutex;
use testudo_rt::port;
use testudo_virtio::backend::{
    BlockBackend, BlockError, Overlay, ReadOnlyImage, Sink, Source as Bytes,
};

/// A disk of zeros.
struct Zeros(u64);

impl BlockBackend for Zeros {
    fn size(&self) -> u64 {
        self.0
    }

    fn read(&mut self, offset: u64, len: u64, sink: Sink<'_>) -> Result<(), BlockError> {
        const PIECE: [u8; 4096] = [0; 4096];
        match offset.checked_add(len) {
            Some(end) if end <= self.0 => {}
            _ => return Err(BlockError::OutOfRange { offset, len }),
        }
        let mut rest = len;
        while rest > 0 {
            let len = rest.min(PIECE.len() as u64);
            sink(&PIECE[..len as usize])?;
            rest -= len;
        }
        Ok(())
    }

    fn write(&mut self, _: u64, _: u64, _: Bytes<'_>) -> Result<(), BlockError> {
        Err(BlockError::ReadOnly)
    }
}

type Changes = Overlay<Box<dyn BlockBackend>>;

/// A writable disk that its device and this program share.
#[derive(Clone)]
pub(crate) struct Disk(Arc<Mutex<Changes>>);

impl Disk {
    /// A disk of `size` zeros; at most `budget` bytes of it can be written to.
    pub(crate) fn empty(size: u64, budget: u64) -> Self {
        Self::over(Box::new(Zeros(size)), budget)
    }

    /// A writable copy of `image`; at most `budget` bytes of it can be changed.
    pub(crate) fn copy_of(image: &'static [u8], budget: u64) -> Self {
        Self::over(Box::new(ReadOnlyImage(image)), budget)
    }

    fn over(base: Box<dyn BlockBackend>, budget: u64) -> Self {
        Self(Arc::new(Mutex::new(Overlay::new(base, budget))))
    }

    /// Hands the changed blocks out; see [`hand_out`].
    pub(crate) fn save(&self, number: usize) {
        for (offset, bytes) in self.0.lock().changes() {
            if !hand_out(number, offset, bytes) {
                return;
            }
        }
    }
}

/// Hands out what a file shall hold, through the debug console, which QEMU and Bochs have: a line
/// `testudo-disk: NUMBER OFFSET LENGTH`, the bytes, and the end of a line. False where there is none.
pub(super) fn hand_out(number: usize, offset: u64, bytes: &[u8]) -> bool {
    const CONSOLE: u16 = 0xE9;
    // SAFETY: the debug console has no access to memory, nor has whatever else answers there.
    let put = |byte| unsafe { port::write_u8(CONSOLE, byte) };
    // SAFETY: as above.
    if unsafe { port::read_u8(CONSOLE) } != 0xE9 {
        return false;
    }
    let header = alloc::format!("testudo-disk: {number} {offset} {}\n", bytes.len());
    for &byte in header.as_bytes().iter().chain(bytes).chain(b"\n") {
        put(byte);
    }
    true
}

impl BlockBackend for Disk {
    fn size(&self) -> u64 {
        self.0.lock().size()
    }

    fn read(&mut self, offset: u64, len: u64, sink: Sink<'_>) -> Result<(), BlockError> {
        self.0.lock().read(offset, len, sink)
    }

    fn write(&mut self, offset: u64, len: u64, source: Bytes<'_>) -> Result<(), BlockError> {
        self.0.lock().write(offset, len, source)
    }
}
