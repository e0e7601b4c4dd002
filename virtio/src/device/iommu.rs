//! The IOMMU device (VIRTIO 1.3, 5.13): the guest decides what its devices may reach.
//!
//! [`Iommu`] takes the guest's requests; [`IommuMemory`] is guest memory as one endpoint sees it,
//! to be given to that endpoint's device.

mod state;

pub use state::{IommuMemory, IommuState, TranslateError};

use alloc::sync::Arc;

use testudo_arch::{Gpa, GuestMemory};

use super::{Device, DeviceError, DeviceId, Io, Next, read_config_bytes};
use crate::Features;
use crate::queue::Reader;
use state::{Fault, Status};

/// Feature bits (5.13.3).
mod feature {
    use crate::Features;

    pub(super) const INPUT_RANGE: Features = Features::bit(0);
    pub(super) const DOMAIN_RANGE: Features = Features::bit(1);
    pub(super) const MAP_UNMAP: Features = Features::bit(2);
    pub(super) const PROBE: Features = Features::bit(4);
    pub(super) const BYPASS_CONFIG: Features = Features::bit(6);
}

/// Requests (5.13.6).
mod request {
    pub(super) const ATTACH: u8 = 1;
    pub(super) const DETACH: u8 = 2;
    pub(super) const MAP: u8 = 3;
    pub(super) const UNMAP: u8 = 4;
    pub(super) const PROBE: u8 = 5;
}

const REQUESTS: u16 = 0;
const EVENTS: u16 = 1;
/// Offset of the bypass byte in the configuration space.
const BYPASS: u64 = 36;
/// The size of the answer to a probe.
const PROBE_SIZE: u32 = 512;
/// A property of a probe: memory that is reserved; the kind that takes interrupt messages.
const PROPERTY_RESERVED: u16 = 1;
const RESERVED_MSI: u8 = 1;
/// Where interrupt messages go (SDM vol. 3A, 11.11.1).
const MSI_WINDOW: (u64, u64) = (0xFEE0_0000, 0xFEEF_FFFF);

/// The IOMMU device.
#[derive(Debug)]
pub struct Iommu {
    state: Arc<IommuState>,
}

impl Iommu {
    /// A device that keeps its tables in `state`, which the endpoints' memories share.
    pub fn new(state: Arc<IommuState>) -> Self {
        Self { state }
    }

    fn execute<M: GuestMemory>(
        state: &IommuState,
        kind: u8,
        reader: &mut Reader<'_, '_, M>,
    ) -> Result<Status, DeviceError> {
        let word = |reader: &mut Reader<'_, '_, M>| -> Result<u32, DeviceError> {
            Ok(u32::from_le_bytes(reader.read_value()?))
        };
        let long = |reader: &mut Reader<'_, '_, M>| -> Result<u64, DeviceError> {
            Ok(u64::from_le_bytes(reader.read_value()?))
        };
        Ok(match kind {
            request::ATTACH => {
                let (domain, endpoint) = (word(reader)?, word(reader)?);
                let (flags, reserved) = (word(reader)?, word(reader)?);
                if reserved != 0 {
                    Status::Invalid
                } else {
                    state.attach(domain, endpoint, flags)
                }
            }
            request::DETACH => {
                let (domain, endpoint) = (word(reader)?, word(reader)?);
                if long(reader)? != 0 {
                    Status::Invalid
                } else {
                    state.detach(domain, endpoint)
                }
            }
            request::MAP => {
                let domain = word(reader)?;
                let (start, end) = (long(reader)?, long(reader)?);
                let physical = Gpa(long(reader)?);
                state.map(domain, start, end, physical, word(reader)?)
            }
            request::UNMAP => {
                let domain = word(reader)?;
                let (start, end) = (long(reader)?, long(reader)?);
                if word(reader)? != 0 {
                    Status::Invalid
                } else {
                    state.unmap(domain, start, end)
                }
            }
            _ => Status::Unsupported,
        })
    }

    /// Reports faults for which the driver has given buffers.
    fn report<M: GuestMemory>(&mut self, io: &mut Io<'_, M>) -> Result<(), DeviceError> {
        let memory = io.memory();
        let Some(mut queue) = io.queue(EVENTS) else {
            return Ok(());
        };
        while self.state.has_fault() {
            let Some(chain) = queue.pop()? else {
                break;
            };
            let mut writer = chain.writer(memory);
            if let Some(fault) = self.state.take_fault() {
                writer.write_all(&fault_bytes(&fault))?;
            }
            let written = writer.written();
            let token = chain.into_token();
            queue.complete(token, written)?;
        }
        queue.publish()?;
        Ok(())
    }
}

/// `virtio_iommu_fault` (5.13.6.9).
fn fault_bytes(fault: &Fault) -> [u8; 24] {
    const READ: u32 = 1;
    const WRITE: u32 = 2;
    const ADDRESS: u32 = 1 << 8;
    let access = if fault.write { WRITE } else { READ };
    let mut bytes = [0; 24];
    bytes[0] = if fault.no_domain { 1 } else { 2 };
    bytes[4..8].copy_from_slice(&(access | ADDRESS).to_le_bytes());
    bytes[8..12].copy_from_slice(&fault.endpoint.to_le_bytes());
    bytes[16..].copy_from_slice(&fault.address.to_le_bytes());
    bytes
}

/// The properties of any endpoint: interrupt messages pass untranslated.
fn properties() -> [u8; 24] {
    let mut bytes = [0; 24];
    bytes[..2].copy_from_slice(&PROPERTY_RESERVED.to_le_bytes());
    bytes[2..4].copy_from_slice(&20u16.to_le_bytes());
    bytes[4] = RESERVED_MSI;
    bytes[8..16].copy_from_slice(&MSI_WINDOW.0.to_le_bytes());
    bytes[16..].copy_from_slice(&MSI_WINDOW.1.to_le_bytes());
    bytes
}

impl<M: GuestMemory> Device<M> for Iommu {
    fn id(&self) -> DeviceId {
        DeviceId::IOMMU
    }

    fn features(&self) -> Features {
        feature::INPUT_RANGE
            | feature::DOMAIN_RANGE
            | feature::MAP_UNMAP
            | feature::PROBE
            | feature::BYPASS_CONFIG
    }

    fn queues(&self) -> &[u16] {
        &[64, 64]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 40];
        config[..8].copy_from_slice(&state::PAGE_SIZES.to_le_bytes());
        config[16..24].copy_from_slice(&u64::MAX.to_le_bytes());
        config[28..32].copy_from_slice(&u32::MAX.to_le_bytes());
        config[32..36].copy_from_slice(&PROBE_SIZE.to_le_bytes());
        config[BYPASS as usize] = u8::from(self.state.bypass());
        read_config_bytes(&config, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (BYPASS, [mode]) = (offset, data) {
            self.state.set_bypass(mode & 1 != 0);
        }
    }

    fn reset(&mut self) {
        self.state.reset();
    }

    fn process(&mut self, queue: u16, io: &mut Io<'_, M>) -> Result<Next, DeviceError> {
        if queue != REQUESTS {
            self.report(io)?;
            return Ok(Next::Idle);
        }
        let state = &*self.state;
        io.serve(queue, |memory, chain| {
            let mut reader = chain.reader(memory);
            let mut writer = chain.writer(memory);
            let Some(mut tail) = writer.split_last(4) else {
                return Err(DeviceError::Malformed("no room for the status"));
            };
            let [kind, _, _, _]: [u8; 4] = reader.read_value()?;
            let status = if kind == request::PROBE {
                let endpoint = u32::from_le_bytes(reader.read_value()?);
                if !state.has_endpoint(endpoint) {
                    Status::NoEntry
                } else if writer.remaining() < u64::from(PROBE_SIZE) {
                    Status::Invalid
                } else {
                    writer.write_all(&properties())?;
                    // The rest of the answer is empty, which ends the list.
                    let zeros = [0; PROBE_SIZE as usize];
                    writer.write(&zeros[properties().len()..])?;
                    Status::Ok
                }
            } else {
                Self::execute(state, kind, &mut reader)?
            };
            tail.write(&[status as u8, 0, 0, 0])?;
            Ok(writer.written() + 4)
        })
    }

    fn poll(&mut self, io: &mut Io<'_, M>) -> Result<Next, DeviceError> {
        self.report(io)?;
        Ok(Next::Idle)
    }
}
