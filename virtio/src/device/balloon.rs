//! The memory balloon (VIRTIO 1.3, 5.5): the guest gives memory back, and says which it does not
//! use.

use alloc::sync::Arc;
use alloc::vec::Vec;

use spin::Mutex;
use testudo_arch::{Gpa, GuestMemory, PAGE_SIZE};

use super::{Device, DeviceError, DeviceId, Io, Next, read_config_bytes};
use crate::Features;
use crate::queue::{Reader, Segment, Token};

/// Feature bits (5.5.3).
mod feature {
    use crate::Features;

    pub(super) const STATS_VQ: Features = Features::bit(1);
    pub(super) const DEFLATE_ON_OOM: Features = Features::bit(2);
    pub(super) const FREE_PAGE_HINT: Features = Features::bit(3);
    pub(super) const PAGE_REPORTING: Features = Features::bit(5);
}

/// Offset of the number of pages that the driver says it has given.
const ACTUAL: u64 = 4;
/// Values of the hinting command: stop, and all hints are in.
const HINT_STOP: u32 = 0;
const HINT_DONE: u32 = 1;
/// The first value that starts a round.
const HINT_FIRST: u32 = 2;
/// The most page numbers in one request.
const MAX_PAGES: u64 = 4096;
/// The most statistics that are kept.
const MAX_STATS: usize = 32;

/// What happens to memory that the guest gives away.
///
/// All ranges are whole pages inside guest memory.
pub trait BalloonBackend: Send {
    /// The guest gives a range away: it will not use it until [`restore`](Self::restore).
    fn reclaim(&mut self, gpa: Gpa, len: u64);

    /// The guest takes a range back; its contents may be anything.
    fn restore(&mut self, gpa: Gpa, len: u64);

    /// The guest does not use a range at the moment, and will find anything there when it uses it
    /// again, which may be as soon as this returns.
    fn report_free(&mut self, gpa: Gpa, len: u64);

    /// The guest did not use a range when this round of hints began: a migration may leave it out.
    fn hint_free(&mut self, _gpa: Gpa, _len: u64) {}
}

/// What one statistic is about (5.5.6.3): the driver's number, as it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stat {
    /// 0 pages swapped in, 1 out, 2 major faults, 3 minor ones, 4 free memory, 5 all memory,
    /// 6 available memory, 7 disk caches, 8 huge page allocations, 9 failed ones, and later ones.
    pub tag: u16,
    /// Bytes or events.
    pub value: u64,
}

#[derive(Debug, Default)]
struct Shared {
    target: u32,
    actual: u32,
    changed: bool,
    stats: Vec<Stat>,
    stats_wanted: bool,
    hint_command: u32,
    hinting_done: bool,
}

/// The operator's side of a balloon: can be used from anywhere while the guest runs.
#[derive(Clone, Debug, Default)]
pub struct BalloonControl(Arc<Mutex<Shared>>);

impl BalloonControl {
    /// Asks the guest to give `bytes` away in all. It learns of it at the device's next poll.
    pub fn set_target(&self, bytes: u64) {
        let pages = u32::try_from(bytes / PAGE_SIZE).unwrap_or(u32::MAX);
        let mut shared = self.0.lock();
        shared.changed |= shared.target != pages;
        shared.target = pages;
    }

    /// The bytes that the guest says it has given away.
    pub fn actual(&self) -> u64 {
        u64::from(self.0.lock().actual) * PAGE_SIZE
    }

    /// Asks for new statistics, at the next poll.
    pub fn request_stats(&self) {
        self.0.lock().stats_wanted = true;
    }

    /// The statistics that came last.
    pub fn stats(&self) -> Vec<Stat> {
        self.0.lock().stats.clone()
    }

    /// Asks the guest for a round of hints about free pages, at the next poll.
    pub fn start_hinting(&self) {
        let mut shared = self.0.lock();
        shared.hint_command = shared.hint_command.wrapping_add(1).max(HINT_FIRST);
        shared.hinting_done = false;
        shared.changed = true;
    }

    /// Whether the guest has given all hints of the round.
    pub fn hinting_done(&self) -> bool {
        self.0.lock().hinting_done
    }
}

/// What a queue is for. Numbers are given to the queues that were negotiated, in this order, as
/// Linux counts them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Stats,
    Hint,
    Report,
}

/// The memory balloon.
#[derive(Debug)]
pub struct Balloon<B> {
    backend: B,
    control: BalloonControl,
    features: Features,
    /// The driver's buffer for statistics waits here until new ones are wanted.
    stats_buffer: Option<Token>,
    /// The round of hints that the driver is answering.
    hint_round: u32,
}

impl<B: BalloonBackend> Balloon<B> {
    /// A device, and the operator's side of it.
    pub fn new(backend: B) -> (Self, BalloonControl) {
        let control = BalloonControl::default();
        let device = Self {
            backend,
            control: control.clone(),
            features: Features::empty(),
            stats_buffer: None,
            hint_round: HINT_STOP,
        };
        (device, control)
    }

    fn role(&self, queue: u16) -> Option<Role> {
        let optional = [
            (feature::STATS_VQ, Role::Stats),
            (feature::FREE_PAGE_HINT, Role::Hint),
            (feature::PAGE_REPORTING, Role::Report),
        ];
        let negotiated = optional.iter().filter(|(f, _)| self.features.contains(*f));
        match queue {
            0 => Some(Role::Inflate),
            1 => Some(Role::Deflate),
            _ => negotiated
                .map(|(_, role)| *role)
                .nth(usize::from(queue) - 2),
        }
    }

    fn queue_of(&self, role: Role) -> Option<u16> {
        (0..5).find(|&queue| self.role(queue) == Some(role))
    }

    /// The driver has filled its buffer for statistics: it is read, and kept.
    fn take_stats<M: GuestMemory>(
        &mut self,
        queue: u16,
        io: &mut Io<'_, M>,
    ) -> Result<(), DeviceError> {
        let memory = io.memory();
        let Some(mut queue) = io.queue(queue) else {
            return Ok(());
        };
        // There is one buffer; if the driver offers another, the one before returns.
        for _ in 0..2 {
            let Some(chain) = queue.pop()? else {
                break;
            };
            let mut reader = chain.reader(memory);
            let mut stats = Vec::new();
            while reader.remaining() >= 10 && stats.len() < MAX_STATS {
                let bytes: [u8; 10] = reader.read_value()?;
                let [a, b, value @ ..] = bytes;
                stats.push(Stat {
                    tag: u16::from_le_bytes([a, b]),
                    value: u64::from_le_bytes(value),
                });
            }
            self.control.0.lock().stats = stats;
            if let Some(before) = self.stats_buffer.replace(chain.into_token()) {
                queue.complete(before, 0)?;
                queue.publish()?;
            }
        }
        Ok(())
    }

    fn take_hints<M: GuestMemory>(
        &mut self,
        queue: u16,
        io: &mut Io<'_, M>,
    ) -> Result<Next, DeviceError> {
        let mut round = self.hint_round;
        let mut done = false;
        let wanted = self.control.0.lock().hint_command;
        let backend = &mut self.backend;
        let next = io.serve(queue, |memory, chain| {
            // A command comes as four bytes to read, a hint as a buffer to write (5.5.6.5).
            if !chain.readable().is_empty() {
                round = u32::from_le_bytes(chain.reader(memory).read_value()?);
                done |= round == HINT_STOP;
            } else if round == wanted && round >= HINT_FIRST {
                for segment in chain.writable() {
                    if let Some((gpa, len)) = whole_pages(memory, segment) {
                        backend.hint_free(gpa, len);
                    }
                }
            }
            Ok(0)
        })?;
        self.hint_round = round;
        if done {
            let mut shared = self.control.0.lock();
            if shared.hint_command == wanted {
                shared.hinting_done = true;
                shared.hint_command = HINT_DONE;
                shared.changed = true;
            }
        }
        Ok(next)
    }
}

/// The whole pages in a segment, if they are all memory.
fn whole_pages<M: GuestMemory>(memory: &M, segment: &Segment) -> Option<(Gpa, u64)> {
    let start = segment.gpa.0.checked_next_multiple_of(PAGE_SIZE)?;
    // Segments do not wrap.
    let end = segment.gpa.0.checked_add(segment.len.into())? / PAGE_SIZE * PAGE_SIZE;
    let len = end.checked_sub(start).filter(|&len| len > 0)?;
    memory
        .contains(Gpa(start), len)
        .then_some((Gpa(start), len))
}

/// Reads page numbers and visits them as ranges of memory.
fn for_each_range<M: GuestMemory>(
    memory: &M,
    reader: &mut Reader<'_, '_, M>,
    mut visit: impl FnMut(Gpa, u64),
) -> Result<(), DeviceError> {
    let mut run: Option<(u64, u64)> = None;
    let mut flush = |run: Option<(u64, u64)>| {
        if let Some((start, len)) = run {
            visit(Gpa(start), len);
        }
    };
    for _ in 0..(reader.remaining() / 4).min(MAX_PAGES) {
        let page = u64::from(u32::from_le_bytes(reader.read_value()?)) * PAGE_SIZE;
        // A page that is not memory is not the guest's to give.
        if !memory.contains(Gpa(page), PAGE_SIZE) {
            continue;
        }
        run = match run {
            Some((start, len)) if start + len == page => Some((start, len + PAGE_SIZE)),
            before => {
                flush(before);
                Some((page, PAGE_SIZE))
            }
        };
    }
    flush(run);
    Ok(())
}

impl<M: GuestMemory, B: BalloonBackend> Device<M> for Balloon<B> {
    fn id(&self) -> DeviceId {
        DeviceId::BALLOON
    }

    fn features(&self) -> Features {
        feature::STATS_VQ
            | feature::DEFLATE_ON_OOM
            | feature::FREE_PAGE_HINT
            | feature::PAGE_REPORTING
    }

    fn queues(&self) -> &[u16] {
        &[128; 5]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let shared = self.control.0.lock();
        let mut config = [0; 12];
        config[..4].copy_from_slice(&shared.target.to_le_bytes());
        config[4..8].copy_from_slice(&shared.actual.to_le_bytes());
        config[8..].copy_from_slice(&shared.hint_command.to_le_bytes());
        read_config_bytes(&config, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (ACTUAL, Ok(bytes)) = (offset, <[u8; 4]>::try_from(data)) {
            self.control.0.lock().actual = u32::from_le_bytes(bytes);
        }
    }

    fn activate(&mut self, features: Features) {
        self.features = features;
    }

    fn reset(&mut self) {
        self.features = Features::empty();
        self.stats_buffer = None;
        self.hint_round = HINT_STOP;
        let mut shared = self.control.0.lock();
        shared.actual = 0;
        shared.hint_command = HINT_STOP;
    }

    fn reset_queue(&mut self, queue: u16) {
        if self.role(queue) == Some(Role::Stats) {
            self.stats_buffer = None;
        }
    }

    fn process(&mut self, queue: u16, io: &mut Io<'_, M>) -> Result<Next, DeviceError> {
        let Some(role) = self.role(queue) else {
            return Ok(Next::Idle);
        };
        let backend = &mut self.backend;
        match role {
            Role::Stats => {
                self.take_stats(queue, io)?;
                Ok(Next::Idle)
            }
            Role::Hint => self.take_hints(queue, io),
            Role::Report => io.serve(queue, |memory, chain| {
                for segment in chain.writable() {
                    if let Some((gpa, len)) = whole_pages(memory, segment) {
                        backend.report_free(gpa, len);
                    }
                }
                Ok(0)
            }),
            Role::Inflate | Role::Deflate => io.serve(queue, |memory, chain| {
                let mut reader = chain.reader(memory);
                for_each_range(memory, &mut reader, |gpa, len| {
                    if role == Role::Inflate {
                        backend.reclaim(gpa, len);
                    } else {
                        backend.restore(gpa, len);
                    }
                })?;
                Ok(0)
            }),
        }
    }

    fn poll(&mut self, io: &mut Io<'_, M>) -> Result<Next, DeviceError> {
        let (changed, stats_wanted) = {
            let mut shared = self.control.0.lock();
            let stats_wanted = shared.stats_wanted && self.stats_buffer.is_some();
            shared.stats_wanted &= !stats_wanted;
            (core::mem::take(&mut shared.changed), stats_wanted)
        };
        if changed {
            io.config_changed();
        }
        // The driver fills its buffer anew when it gets it back.
        if let (true, Some(queue)) = (stats_wanted, self.queue_of(Role::Stats))
            && let (Some(token), Some(mut queue)) = (self.stats_buffer.take(), io.queue(queue))
        {
            queue.complete(token, 0)?;
            queue.publish()?;
        }
        Ok(Next::Idle)
    }
}
