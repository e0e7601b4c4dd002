//! The block device (VIRTIO 1.3, 5.2).

use alloc::vec;
use alloc::vec::Vec;

use testudo_arch::GuestMemory;

use super::{Device, DeviceError, DeviceId, Io, Next, read_config_bytes};
use crate::Features;
use crate::backend::{BlockBackend, BlockError};
use crate::queue::{Bounds, Chain, Reader, Writer};

/// Feature bits (5.2.3).
mod feature {
    use crate::Features;

    pub(super) const SEG_MAX: Features = Features::bit(2);
    pub(super) const RO: Features = Features::bit(5);
    pub(super) const BLK_SIZE: Features = Features::bit(6);
    pub(super) const FLUSH: Features = Features::bit(9);
    pub(super) const TOPOLOGY: Features = Features::bit(10);
    pub(super) const CONFIG_WCE: Features = Features::bit(11);
    pub(super) const MQ: Features = Features::bit(12);
    pub(super) const DISCARD: Features = Features::bit(13);
    pub(super) const WRITE_ZEROES: Features = Features::bit(14);
}

/// Request types (5.2.6).
mod request {
    pub(super) const IN: u32 = 0;
    pub(super) const OUT: u32 = 1;
    pub(super) const FLUSH: u32 = 4;
    pub(super) const GET_ID: u32 = 8;
    pub(super) const DISCARD: u32 = 11;
    pub(super) const WRITE_ZEROES: u32 = 13;
}

/// The unit of addresses in requests, whatever the block size.
const SECTOR: u64 = 512;
/// Offset of the write cache mode in the configuration space.
const WRITEBACK: u64 = 32;
/// The most sectors in one discard or write-zeroes range, and ranges in one request: they bound
/// the work of a request.
const MAX_RANGE_SECTORS: u32 = 1 << 16;
const MAX_RANGES: u32 = 16;

/// The outcome of a request, as its last byte tells the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// What a block device tells about itself.
#[derive(Clone, Copy, Debug)]
pub struct BlkOptions {
    /// The name that GET_ID answers, padded with zeros.
    pub id: [u8; 20],
    /// The number of queues.
    pub queues: u16,
    /// The size of each queue.
    pub queue_size: u16,
    /// The logical block size in bytes.
    pub block_size: u32,
    /// How many logical blocks make a physical one, as a power of two.
    pub physical_block_exp: u8,
    /// The preferred length of a request, in logical blocks.
    pub optimal_blocks: u32,
}

impl Default for BlkOptions {
    fn default() -> Self {
        Self {
            id: *b"testudo\0\0\0\0\0\0\0\0\0\0\0\0\0",
            queues: 1,
            queue_size: 256,
            block_size: 512,
            physical_block_exp: 3,
            optimal_blocks: 256,
        }
    }
}

/// The block device.
#[derive(Debug)]
pub struct Blk<B> {
    backend: B,
    options: BlkOptions,
    queues: Vec<u16>,
    features: Features,
    writeback: bool,
}

impl<B: BlockBackend> Blk<B> {
    /// A device for the whole sectors of `backend`.
    pub fn new(backend: B, options: BlkOptions) -> Self {
        Self {
            backend,
            queues: vec![options.queue_size; usize::from(options.queues.max(1))],
            options,
            features: Features::empty(),
            writeback: true,
        }
    }

    /// The disk.
    pub fn backend(&mut self) -> &mut B {
        &mut self.backend
    }

    fn config(&self) -> [u8; 60] {
        let o = &self.options;
        let mut config = [0; 60];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &(self.backend.size() / SECTOR).to_le_bytes());
        put(12, &seg_max(o.queue_size).to_le_bytes());
        put(20, &o.block_size.to_le_bytes());
        put(24, &[o.physical_block_exp]);
        put(26, &1u16.to_le_bytes());
        put(28, &o.optimal_blocks.to_le_bytes());
        put(WRITEBACK as usize, &[u8::from(self.writeback)]);
        put(34, &(self.queues.len() as u16).to_le_bytes());
        put(36, &MAX_RANGE_SECTORS.to_le_bytes());
        put(40, &MAX_RANGES.to_le_bytes());
        put(44, &(o.block_size / SECTOR as u32).max(1).to_le_bytes());
        put(48, &MAX_RANGE_SECTORS.to_le_bytes());
        put(52, &MAX_RANGES.to_le_bytes());
        put(56, &[1]);
        config
    }
}

/// All descriptors but those of header and status.
fn seg_max(queue_size: u16) -> u32 {
    u32::from(queue_size.saturating_sub(2)).max(1)
}

impl<M: GuestMemory, B: BlockBackend> Device<M> for Blk<B> {
    fn id(&self) -> DeviceId {
        DeviceId::BLK
    }

    fn features(&self) -> Features {
        let mut features = feature::SEG_MAX
            | feature::BLK_SIZE
            | feature::FLUSH
            | feature::TOPOLOGY
            | feature::CONFIG_WCE;
        features.set(feature::MQ, self.queues.len() > 1);
        if self.backend.read_only() {
            features |= feature::RO;
        } else {
            features |= feature::DISCARD | feature::WRITE_ZEROES;
        }
        features
    }

    fn queues(&self) -> &[u16] {
        &self.queues
    }

    fn bounds(&self, _queue: u16) -> Bounds {
        Bounds {
            segments: (seg_max(self.options.queue_size) + 2) as u16,
            bytes: 64 << 20,
        }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let index = WRITEBACK.checked_sub(offset);
        let index = index.and_then(|index| usize::try_from(index).ok());
        if let Some(mode) = index.and_then(|index| data.get(index)) {
            self.writeback = mode & 1 != 0;
        }
    }

    fn activate(&mut self, features: Features) {
        self.features = features;
        // Without FLUSH nothing would ever write the cache back (5.2.5.2).
        if !features.contains(feature::CONFIG_WCE) {
            self.writeback = features.contains(feature::FLUSH);
        }
    }

    fn reset(&mut self) {
        self.features = Features::empty();
        self.writeback = true;
    }

    fn process(&mut self, queue: u16, io: &mut Io<'_, M>) -> Result<Next, DeviceError> {
        let mut work = Work {
            backend: &mut self.backend,
            id: &self.options.id,
            writeback: self.writeback,
        };
        io.serve(queue, |memory, chain| work.request(memory, chain))
    }
}

struct Work<'d, B> {
    backend: &'d mut B,
    id: &'d [u8; 20],
    writeback: bool,
}

impl<B: BlockBackend> Work<'_, B> {
    /// Performs one request, and says how many bytes of the chain were written.
    #[inline]
    fn request<M: GuestMemory>(
        &mut self,
        memory: &M,
        chain: &Chain<'_>,
    ) -> Result<u32, DeviceError> {
        let mut reader = chain.reader(memory);
        let mut writer = chain.writer(memory);
        let Some(mut last) = writer.split_last(1) else {
            return Err(DeviceError::Malformed("no room for the status"));
        };
        let [kind, _, low, high]: [u32; 4] = reader.read_value()?;
        let sector = u64::from(low) | (u64::from(high) << 32);
        let outcome = match kind {
            request::IN => self.read(sector, &mut writer),
            request::OUT => self.write(sector, &mut reader),
            request::FLUSH => self.backend.flush().map_err(Refusal::from),
            request::GET_ID => self.identify(&mut writer),
            request::DISCARD | request::WRITE_ZEROES => self.ranges(kind, &mut reader),
            _ => Err(Refusal::Status(Status::Unsupported)),
        };
        let status = match outcome {
            Ok(()) => Status::Ok,
            Err(Refusal::Status(status)) => status,
            Err(Refusal::Driver(error)) => return Err(error),
        };
        last.write(&[status as u8])?;
        Ok(writer.written() + 1)
    }

    #[inline]
    fn read<M: GuestMemory>(
        &mut self,
        sector: u64,
        writer: &mut Writer<'_, '_, M>,
    ) -> Result<(), Refusal> {
        let (offset, len) = span(sector, writer.remaining())?;
        self.backend.read(offset, len, &mut |piece| {
            writer.write(piece)?;
            Ok(())
        })?;
        Ok(())
    }

    #[inline]
    fn write<M: GuestMemory>(
        &mut self,
        sector: u64,
        reader: &mut Reader<'_, '_, M>,
    ) -> Result<(), Refusal> {
        let (offset, len) = span(sector, reader.remaining())?;
        self.backend.write(offset, len, &mut |piece| {
            reader.read(piece)?;
            Ok(())
        })?;
        self.written_through()
    }

    /// Without a write cache, what is written is durable when the request ends.
    fn written_through(&mut self) -> Result<(), Refusal> {
        if !self.writeback {
            self.backend.flush()?;
        }
        Ok(())
    }

    fn identify<M: GuestMemory>(&mut self, writer: &mut Writer<'_, '_, M>) -> Result<(), Refusal> {
        if writer.remaining() < self.id.len() as u64 {
            return Err(Refusal::Status(Status::IoError));
        }
        writer.write(self.id).map_err(BlockError::from)?;
        Ok(())
    }

    /// Discards or zeroes each of the ranges in a request.
    fn ranges<M: GuestMemory>(
        &mut self,
        kind: u32,
        reader: &mut Reader<'_, '_, M>,
    ) -> Result<(), Refusal> {
        let bytes = reader.remaining();
        if bytes == 0 || !bytes.is_multiple_of(16) || bytes / 16 > u64::from(MAX_RANGES) {
            return Err(Refusal::Status(Status::IoError));
        }
        for _ in 0..bytes / 16 {
            let [low, high, sectors, flags]: [u32; 4] = reader.read_value()?;
            let unmap = flags & 1 != 0;
            // Discard has no flag, write-zeroes one (5.2.6.2).
            if flags & !1 != 0 || (kind == request::DISCARD && unmap) {
                return Err(Refusal::Status(Status::Unsupported));
            }
            if sectors > MAX_RANGE_SECTORS {
                return Err(Refusal::Status(Status::IoError));
            }
            let sector = u64::from(low) | (u64::from(high) << 32);
            let (offset, len) = span(sector, u64::from(sectors) * SECTOR)?;
            let inside = offset
                .checked_add(len)
                .is_some_and(|e| e <= self.backend.size());
            if !inside || self.backend.read_only() {
                return Err(Refusal::Status(Status::IoError));
            }
            if kind == request::DISCARD {
                self.backend.discard(offset, len)?;
            } else {
                self.backend.write_zeroes(offset, len, unmap)?;
            }
        }
        self.written_through()
    }
}

/// Why a request did not succeed: the driver is told with a status, or broke a rule.
enum Refusal {
    Status(Status),
    Driver(DeviceError),
}

impl From<BlockError> for Refusal {
    fn from(error: BlockError) -> Self {
        match error {
            BlockError::Guest(fault) => Self::Driver(fault.into()),
            _ => Self::Status(Status::IoError),
        }
    }
}

impl From<crate::queue::ReadError> for Refusal {
    fn from(error: crate::queue::ReadError) -> Self {
        Self::Driver(error.into())
    }
}

/// The bytes that a request is about, if they are whole sectors.
#[inline]
fn span(sector: u64, len: u64) -> Result<(u64, u64), Refusal> {
    let offset = sector.checked_mul(SECTOR);
    match offset {
        Some(offset) if len.is_multiple_of(SECTOR) => Ok((offset, len)),
        _ => Err(Refusal::Status(Status::IoError)),
    }
}
