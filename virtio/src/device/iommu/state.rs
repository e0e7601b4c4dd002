//! Domains, endpoints and mappings, and guest memory through them.

use alloc::boxed::Box;
use alloc::collections::{BTreeMap, VecDeque};
use alloc::sync::Arc;
use core::fmt;
use core::sync::atomic::{AtomicU64, Ordering};

use spin::{Mutex, Once, RwLock};
use testudo_arch::memory::FaultKind;
use testudo_arch::{Gpa, GuestMemory, MemoryFault};

/// Pages of 4 KiB and all larger powers of two.
pub(super) const PAGE_SIZES: u64 = !0xFFF;
const PAGE_MASK: u64 = 0xFFF;
/// All mappings of all domains, and all domains: what a guest can make us remember.
const MAX_MAPPINGS: usize = 1 << 17;
const MAX_DOMAINS: usize = 1 << 12;
/// Faults waiting to be reported; later ones are lost, which the driver must expect.
const MAX_FAULTS: usize = 64;

/// Flags of a mapping (5.13.6.5).
const MAP_READ: u32 = 1;
const MAP_WRITE: u32 = 2;
/// Flag of an attachment: the domain does not translate.
const ATTACH_BYPASS: u32 = 1;

/// The outcome of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = 0,
    Unsupported = 2,
    Invalid = 4,
    Range = 5,
    NoEntry = 6,
    NoMemory = 8,
}

/// An access that an endpoint may not make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) endpoint: u32,
    pub(super) address: u64,
    pub(super) write: bool,
    pub(super) no_domain: bool,
}

/// Why an address of an endpoint is no memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TranslateError {
    /// The endpoint belongs to no domain.
    #[error("endpoint {0} has no domain")]
    NoDomain(u32),
    /// Nothing is mapped there, or not for this kind of access.
    #[error("endpoint {endpoint} may not access {address:#x}")]
    NoMapping {
        /// The endpoint.
        endpoint: u32,
        /// The address.
        address: u64,
    },
}

#[derive(Clone, Copy, Debug)]
struct Mapping {
    end: u64,
    physical: u64,
    flags: u32,
}

#[derive(Debug, Default)]
struct Domain {
    bypass: bool,
    endpoints: usize,
    mappings: BTreeMap<u64, Mapping>,
}

#[derive(Debug, Default)]
struct Tables {
    bypass: bool,
    domains: BTreeMap<u32, Domain>,
    /// The domain of each endpoint that there is.
    endpoints: BTreeMap<u32, Option<u32>>,
    mappings: usize,
}

/// Who is told that there are faults to report.
#[derive(Default)]
struct Waker(Once<Box<dyn Fn() + Send + Sync>>);

impl fmt::Debug for Waker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let set = self.0.is_completed();
        f.debug_tuple("Waker").field(&set).finish()
    }
}

/// What the guest has decided: shared by the IOMMU device and the memories of its endpoints.
#[derive(Debug, Default)]
pub struct IommuState {
    tables: RwLock<Tables>,
    faults: Mutex<VecDeque<Fault>>,
    refused: AtomicU64,
    waker: Waker,
}

impl IommuState {
    /// A state for these endpoints, which pass untranslated until the driver says otherwise.
    pub fn new(endpoints: impl IntoIterator<Item = u32>) -> Arc<Self> {
        let tables = Tables {
            bypass: true,
            endpoints: endpoints.into_iter().map(|e| (e, None)).collect(),
            ..Tables::default()
        };
        Arc::new(Self {
            tables: RwLock::new(tables),
            ..Self::default()
        })
    }

    /// Adds an endpoint whose number was not known when the state was made.
    pub fn add_endpoint(&self, endpoint: u32) {
        self.tables
            .write()
            .endpoints
            .entry(endpoint)
            .or_insert(None);
    }

    /// Has `wake` called whenever an access was refused, so that the IOMMU device is polled and
    /// can report it. It is called in the middle of another device's access to memory, and so must
    /// not use any device itself. The first one stays.
    pub fn set_waker(&self, wake: impl Fn() + Send + Sync + 'static) {
        self.waker.0.call_once(|| Box::new(wake));
    }

    /// How many accesses were refused.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// How many mappings there are, in all domains.
    pub fn mappings(&self) -> usize {
        self.tables.read().mappings
    }

    pub(super) fn bypass(&self) -> bool {
        self.tables.read().bypass
    }

    pub(super) fn set_bypass(&self, on: bool) {
        self.tables.write().bypass = on;
    }

    pub(super) fn reset(&self) {
        let mut tables = self.tables.write();
        tables.domains.clear();
        tables.mappings = 0;
        tables.bypass = true;
        tables
            .endpoints
            .values_mut()
            .for_each(|domain| *domain = None);
        self.faults.lock().clear();
    }

    pub(super) fn has_endpoint(&self, endpoint: u32) -> bool {
        self.tables.read().endpoints.contains_key(&endpoint)
    }

    pub(super) fn has_fault(&self) -> bool {
        !self.faults.lock().is_empty()
    }

    pub(super) fn take_fault(&self) -> Option<Fault> {
        self.faults.lock().pop_front()
    }

    pub(super) fn attach(&self, domain: u32, endpoint: u32, flags: u32) -> Status {
        let mut tables = self.tables.write();
        let Some(before) = tables.endpoints.get(&endpoint).copied() else {
            return Status::NoEntry;
        };
        if flags & !ATTACH_BYPASS != 0 {
            return Status::Invalid;
        }
        let bypass = flags & ATTACH_BYPASS != 0;
        match tables.domains.get(&domain) {
            // A domain translates or does not; it cannot change (5.13.6.3.2).
            Some(existing) if existing.bypass != bypass => return Status::Invalid,
            None if tables.domains.len() >= MAX_DOMAINS => return Status::NoMemory,
            _ => {}
        }
        if before == Some(domain) {
            return Status::Ok;
        }
        // Counted before the old domain loses the endpoint, or it could vanish.
        let entry = tables.domains.entry(domain).or_insert_with(|| Domain {
            bypass,
            ..Domain::default()
        });
        entry.endpoints += 1;
        if let Some(before) = before {
            tables.leave(before);
        }
        tables.endpoints.insert(endpoint, Some(domain));
        Status::Ok
    }

    pub(super) fn detach(&self, domain: u32, endpoint: u32) -> Status {
        let mut tables = self.tables.write();
        match tables.endpoints.get_mut(&endpoint) {
            None => Status::NoEntry,
            Some(attached) if *attached != Some(domain) => Status::Invalid,
            Some(attached) => {
                *attached = None;
                tables.leave(domain);
                Status::Ok
            }
        }
    }

    pub(super) fn map(&self, domain: u32, start: u64, end: u64, to: Gpa, flags: u32) -> Status {
        let mut tables = self.tables.write();
        if tables.mappings >= MAX_MAPPINGS {
            return Status::NoMemory;
        }
        let Some(domain) = tables.domains.get_mut(&domain) else {
            return Status::NoEntry;
        };
        if domain.bypass || flags & !(MAP_READ | MAP_WRITE) != 0 || end < start {
            return Status::Invalid;
        }
        let aligned =
            start & PAGE_MASK == 0 && end & PAGE_MASK == PAGE_MASK && to.0 & PAGE_MASK == 0;
        if !aligned || to.checked_add(end - start).is_none() {
            return Status::Range;
        }
        let before = domain.mappings.range(..=end).next_back();
        if before.is_some_and(|(_, mapping)| mapping.end >= start) {
            return Status::Invalid;
        }
        let mapping = Mapping {
            end,
            physical: to.0,
            flags,
        };
        domain.mappings.insert(start, mapping);
        tables.mappings += 1;
        Status::Ok
    }

    pub(super) fn unmap(&self, domain: u32, start: u64, end: u64) -> Status {
        let mut tables = self.tables.write();
        let Some(domain) = tables.domains.get_mut(&domain) else {
            return Status::NoEntry;
        };
        if end < start || domain.bypass {
            return Status::Invalid;
        }
        // A mapping goes as a whole or not at all (5.13.6.6.2).
        let split = |at: u64| {
            let inside = domain.mappings.range(..at).next_back();
            inside.is_some_and(|(_, mapping)| mapping.end >= at)
        };
        if split(start) || end.checked_add(1).is_some_and(split) {
            return Status::Range;
        }
        let before = domain.mappings.len();
        domain.mappings.retain(|&at, _| at < start || at > end);
        let removed = before - domain.mappings.len();
        tables.mappings -= removed;
        Status::Ok
    }

    /// Where an access of an endpoint goes, and how many of its bytes are contiguous there.
    ///
    /// # Errors
    ///
    /// The endpoint may not make this access; the guest is told.
    pub fn translate(
        &self,
        endpoint: u32,
        address: u64,
        len: u64,
        write: bool,
    ) -> Result<(Gpa, u64), TranslateError> {
        let result = self.tables.read().translate(endpoint, address, len, write);
        if let Err(error) = result {
            self.refuse(Fault {
                endpoint,
                address,
                write,
                no_domain: matches!(error, TranslateError::NoDomain(_)),
            });
        }
        result
    }

    #[cold]
    fn refuse(&self, fault: Fault) {
        self.refused.fetch_add(1, Ordering::Relaxed);
        let mut faults = self.faults.lock();
        if faults.len() < MAX_FAULTS {
            faults.push_back(fault);
        }
        drop(faults);
        if let Some(wake) = self.waker.0.get() {
            wake();
        }
    }
}

impl Tables {
    /// An endpoint leaves a domain, which ends with its last one.
    fn leave(&mut self, domain: u32) {
        if let Some(entry) = self.domains.get_mut(&domain) {
            entry.endpoints -= 1;
            if entry.endpoints == 0 {
                self.mappings -= entry.mappings.len();
                self.domains.remove(&domain);
            }
        }
    }

    fn translate(
        &self,
        endpoint: u32,
        address: u64,
        len: u64,
        write: bool,
    ) -> Result<(Gpa, u64), TranslateError> {
        let domain = self.endpoints.get(&endpoint).copied().flatten();
        let domain = match domain.and_then(|d| self.domains.get(&d)) {
            None if self.bypass => return Ok((Gpa(address), len)),
            None => return Err(TranslateError::NoDomain(endpoint)),
            Some(domain) if domain.bypass => return Ok((Gpa(address), len)),
            Some(domain) => domain,
        };
        let needed = if write { MAP_WRITE } else { MAP_READ };
        let found = domain.mappings.range(..=address).next_back();
        match found {
            Some((&start, m)) if m.end >= address && m.flags & needed != 0 => {
                // Up to and including the end of the mapping.
                let left = (m.end - address).saturating_add(1);
                Ok((Gpa(m.physical + (address - start)), len.min(left)))
            }
            _ => Err(TranslateError::NoMapping { endpoint, address }),
        }
    }
}

/// Guest memory as one endpoint reaches it.
#[derive(Clone, Debug)]
pub struct IommuMemory<M> {
    memory: M,
    state: Arc<IommuState>,
    endpoint: u32,
}

impl<M: GuestMemory> IommuMemory<M> {
    /// `memory` through the mappings of `endpoint`.
    pub fn new(memory: M, state: Arc<IommuState>, endpoint: u32) -> Self {
        Self {
            memory,
            state,
            endpoint,
        }
    }

    /// Visits the parts of an access: where each is, and which of its bytes it holds.
    fn for_each_part(
        &self,
        gpa: Gpa,
        len: u64,
        write: bool,
        mut visit: impl FnMut(Gpa, u64, u64) -> Result<(), MemoryFault>,
    ) -> Result<(), MemoryFault> {
        let fault = MemoryFault {
            gpa,
            len,
            kind: FaultKind::NotMemory,
        };
        let mut done = 0;
        while done < len {
            let at = gpa.checked_add(done).ok_or(fault)?.0;
            let part = self.state.translate(self.endpoint, at, len - done, write);
            let (to, part) = part.map_err(|_| fault)?;
            visit(to, done, part)?;
            done += part;
        }
        Ok(())
    }

    /// The place of an access that must be in one piece, as an aligned one is.
    fn place(&self, gpa: Gpa, len: u64, write: bool) -> Result<Gpa, MemoryFault> {
        let part = self.state.translate(self.endpoint, gpa.0, len, write);
        match part {
            Ok((to, part)) if part == len => Ok(to),
            _ => Err(MemoryFault {
                gpa,
                len,
                kind: FaultKind::NotMemory,
            }),
        }
    }
}

impl<M: GuestMemory> GuestMemory for IommuMemory<M> {
    fn read(&self, gpa: Gpa, buf: &mut [u8]) -> Result<(), MemoryFault> {
        self.for_each_part(gpa, buf.len() as u64, false, |to, start, len| {
            let part = &mut buf[start as usize..(start + len) as usize];
            self.memory.read(to, part)
        })
    }

    fn write(&self, gpa: Gpa, data: &[u8]) -> Result<(), MemoryFault> {
        // All of it is checked before the first byte moves.
        self.for_each_part(gpa, data.len() as u64, true, |to, _, len| {
            if self.memory.contains(to, len) {
                Ok(())
            } else {
                Err(MemoryFault {
                    gpa: to,
                    len,
                    kind: FaultKind::NotMemory,
                })
            }
        })?;
        self.for_each_part(gpa, data.len() as u64, true, |to, start, len| {
            self.memory
                .write(to, &data[start as usize..(start + len) as usize])
        })
    }

    fn load_u16(&self, gpa: Gpa) -> Result<u16, MemoryFault> {
        self.memory.load_u16(self.place(gpa, 2, false)?)
    }

    fn store_u16(&self, gpa: Gpa, value: u16) -> Result<(), MemoryFault> {
        self.memory.store_u16(self.place(gpa, 2, true)?, value)
    }

    fn load_u32(&self, gpa: Gpa) -> Result<u32, MemoryFault> {
        self.memory.load_u32(self.place(gpa, 4, false)?)
    }

    fn store_u32(&self, gpa: Gpa, value: u32) -> Result<(), MemoryFault> {
        self.memory.store_u32(self.place(gpa, 4, true)?, value)
    }

    fn load_u64(&self, gpa: Gpa) -> Result<u64, MemoryFault> {
        self.memory.load_u64(self.place(gpa, 8, false)?)
    }

    fn store_u64(&self, gpa: Gpa, value: u64) -> Result<(), MemoryFault> {
        self.memory.store_u64(self.place(gpa, 8, true)?, value)
    }

    fn compare_exchange_u32(
        &self,
        gpa: Gpa,
        current: u32,
        new: u32,
    ) -> Result<Result<u32, u32>, MemoryFault> {
        let place = self.place(gpa, 4, true)?;
        self.memory.compare_exchange_u32(place, current, new)
    }

    fn compare_exchange_u64(
        &self,
        gpa: Gpa,
        current: u64,
        new: u64,
    ) -> Result<Result<u64, u64>, MemoryFault> {
        let place = self.place(gpa, 8, true)?;
        self.memory.compare_exchange_u64(place, current, new)
    }

    fn contains(&self, gpa: Gpa, len: u64) -> bool {
        let parts = self.for_each_part(gpa, len, false, |to, _, part| {
            if self.memory.contains(to, part) {
                Ok(())
            } else {
                Err(MemoryFault {
                    gpa: to,
                    len: part,
                    kind: FaultKind::NotMemory,
                })
            }
        });
        parts.is_ok()
    }
}
