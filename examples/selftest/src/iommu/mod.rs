//! Cases on IOMMUs, with a device that copies memory as it is told: what the device reaches after an edit of
//! its table, before and after the edit's flush is discharged.
#![allow(unsafe_code)]

mod amdvi;
mod edu;
mod vtd;

use alloc::format;
use alloc::string::String;
use core::sync::atomic::{AtomicU64, Ordering};

use testudo_arch::{Gpa, Hpa, PageSize};
use testudo_ept::format::Format;
use testudo_ept::iotlb::{Command, IotlbError, Registers, Ring};
use testudo_ept::{Invalidate, PageTable};
use testudo_rt::memory::Frames;
use testudo_rt::{Boot, acpi, memory};

use crate::case::{Case, Outcome};
use edu::Edu;

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "iommu::vtd_forgets_at_the_discharge",
        run: vtd_forgets_at_the_discharge,
    },
    Case {
        name: "iommu::vtd_reports_a_bad_descriptor",
        run: vtd_reports_a_bad_descriptor,
    },
    Case {
        name: "iommu::amdvi_forgets_at_the_discharge",
        run: amdvi_forgets_at_the_discharge,
    },
    Case {
        name: "iommu::amdvi_is_not_waited_for_when_it_is_off",
        run: amdvi_is_not_waited_for_when_it_is_off,
    },
];

/// The domain that the device is in.
const DOMAIN: u16 = 0x21;
/// How many looks at its answer a unit is given.
const PATIENCE: u32 = 10_000_000;
/// Where the device finds its pages: within the 28 bits of address that it has.
const PAGE: Gpa = Gpa(0x0800_0000);

/// A ring in one frame, and a word for answers in another.
struct RingFrames {
    ring: u64,
    status: u64,
}

impl RingFrames {
    fn new() -> Result<Self, String> {
        Ok(Self {
            ring: frame()?,
            status: frame()?,
        })
    }
}

impl Ring for RingFrames {
    fn write(&mut self, index: u32, command: Command) {
        // SAFETY: the ring has a frame of 256 entries, which the caller stays in.
        let entry = unsafe { &*(self.ring as *const [[AtomicU64; 2]; 256]) };
        for (word, value) in entry[index as usize].iter().zip(command) {
            word.store(value, Ordering::Release);
        }
    }

    fn status_address(&self) -> Hpa {
        Hpa(self.status)
    }

    fn status(&self) -> u64 {
        word(self.status).load(Ordering::Acquire)
    }
}

/// A unit's registers, where the identity map has them.
#[derive(Clone, Copy)]
struct Mmio(u64);

impl Mmio {
    fn at<T>(self, offset: u32) -> *mut T {
        (self.0 + u64::from(offset)) as *mut T
    }

    fn write32(self, offset: u32, value: u32) {
        // SAFETY: firmware says that a unit's registers are there, in the identity map.
        unsafe { self.at::<u32>(offset).write_volatile(value) }
    }
}

impl Registers for Mmio {
    fn read32(&self, offset: u32) -> u32 {
        // SAFETY: as for `write32`.
        unsafe { self.at::<u32>(offset).read_volatile() }
    }

    fn read64(&self, offset: u32) -> u64 {
        // SAFETY: as for `write32`.
        unsafe { self.at::<u64>(offset).read_volatile() }
    }

    fn write64(&mut self, offset: u32, value: u64) {
        // SAFETY: as for `write32`.
        unsafe { self.at::<u64>(offset).write_volatile(value) }
    }
}

fn frame() -> Result<u64, String> {
    memory::alloc_frame().ok_or_else(|| "no memory".into())
}

/// A word of a frame that is ours and a device's.
fn word(address: u64) -> &'static AtomicU64 {
    // SAFETY: the frame is identity-mapped and never given back.
    unsafe { AtomicU64::from_ptr(address as *mut u64) }
}

/// Waits until `reached`, for as long as a unit may take to turn something on or off.
fn wait(what: &str, reached: impl Fn() -> bool) -> Result<(), String> {
    for _ in 0..PATIENCE {
        if reached() {
            return Ok(());
        }
    }
    Err(format!("the unit does not {what}"))
}

/// The first structure of a type in a table of IOMMUs, whose structures begin at byte 48.
fn structure(boot: &'static Boot, signature: &[u8; 4], kind: u16) -> Option<&'static [u8]> {
    let mut rest = acpi::Tables::of(boot).table(signature)?.get(48..)?;
    loop {
        // DMAR has 16 bits of type, IVRS 8 and 8 of flags.
        let head: [u8; 2] = *rest.first_chunk()?;
        let found = match signature {
            b"DMAR" => u16::from_le_bytes(head),
            _ => u16::from(head[0]),
        };
        let length = usize::from(u16::from_le_bytes(*rest.get(2..)?.first_chunk()?));
        if found == kind {
            return rest.get(..length);
        }
        rest = rest.get(length.max(1)..)?;
    }
}

fn base_at(structure: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*structure.get(at..)?.first_chunk()?))
}

/// Runs a test on a unit and the device, if both are there.
fn with_edu(test: impl FnOnce(&mut Edu) -> Result<(), String>) -> Outcome {
    let Some(mut edu) = Edu::find() else {
        return Outcome::Skipped("there is no edu device");
    };
    match test(&mut edu) {
        Ok(()) => Outcome::Passed,
        Err(why) => Outcome::Failed(why),
    }
}

/// Where the device's write to `address` arrives, if in one of these frames.
fn arrival(edu: &mut Edu, address: Gpa, frames: &[u64]) -> Result<Option<u64>, String> {
    for frame in frames {
        word(*frame).store(0, Ordering::Release);
    }
    edu.copy_out(address)?;
    let hit = |frame: &&u64| word(**frame).load(Ordering::Acquire) == edu::MARK;
    Ok(frames.iter().find(hit).copied())
}

/// Edits a table while a device uses it. Before the discharge the device still gets what the unit has cached:
/// this shows that there is something to forget. After it, it gets what the table says.
fn edits_reach_the_device<F, I>(
    edu: &mut Edu,
    table: &PageTable<F, Frames>,
    flags: F::Flags,
    domain: &mut I,
) -> Result<(), String>
where
    F: Format<Input = Gpa>,
    I: Invalidate<Error = IotlbError>,
{
    let (a, b) = (frame()?, frame()?);
    let both = [a, b];
    let page = |n: u64| Gpa(PAGE.0 + n * 4096);
    let map = |at: Gpa, frame: u64| {
        let mapped = table.map_page(at, PageSize::Size4K, Hpa(frame), flags);
        mapped.map_err(|error| format!("{error}"))
    };
    let mut expect = |at: Gpa, expected: Option<u64>, when: &str| {
        let found = arrival(edu, at, &both)?;
        (found == expected)
            .then_some(())
            .ok_or_else(|| format!("{when}, a write to {at} came to {found:x?}, not {expected:x?}"))
    };

    map(page(0), a)?;
    expect(page(0), Some(a), "once mapped")?;

    let unmapped = table.unmap_page(page(0));
    expect(page(0), Some(a), "unmapped but not discharged")?;
    let leaf = unmapped
        .try_discharge(domain)
        .map_err(|(_, e)| format!("{e}"))?;
    if leaf.map(|leaf| leaf.frame) != Some(Hpa(a)) {
        return Err("another frame left the table".into());
    }
    expect(page(0), None, "unmapped and discharged")?;

    map(page(0), b)?;
    expect(page(0), Some(b), "mapped anew")?;
    let moved = table.change_page(page(0), |mut leaf| {
        leaf.frame = Hpa(a);
        leaf
    });
    expect(page(0), Some(b), "moved but not discharged")?;
    moved
        .try_discharge(domain)
        .map_err(|(_, e)| format!("{e}"))?;
    expect(page(0), Some(a), "moved and discharged")?;

    // A range whose ends are cached, across a boundary of table spans.
    let (first, last) = (Gpa(PAGE.0 + 0x1F_F000), Gpa(PAGE.0 + 0x20_0000));
    map(first, a)?;
    map(last, b)?;
    expect(first, Some(a), "at the range's start")?;
    expect(last, Some(b), "at the range's end")?;
    let unmapped = table.unmap(first, 2 * 4096).map_err(|e| format!("{e}"))?;
    expect(last, Some(b), "the range unmapped but not discharged")?;
    unmapped
        .try_discharge(domain)
        .map_err(|(_, e)| format!("{e}"))?;
    expect(first, None, "the range unmapped and discharged")?;
    expect(last, None, "the range unmapped and discharged")?;
    Ok(())
}

fn vtd_forgets_at_the_discharge(boot: &'static Boot) -> Outcome {
    let Some(unit) = vtd::Unit::find(boot) else {
        return Outcome::Skipped("there is no VT-d");
    };
    with_edu(|edu| {
        unit.with_device(edu.function(), |table, flags, queue| {
            edu.load()?;
            // SAFETY: the device is the only one, without a TLB of its own, and nobody else edits the table.
            let mut domain = unsafe { queue.domain(DOMAIN) };
            edits_reach_the_device(edu, table, flags, &mut domain)
        })
    })
}

fn vtd_reports_a_bad_descriptor(boot: &'static Boot) -> Outcome {
    let Some(unit) = vtd::Unit::find(boot) else {
        return Outcome::Skipped("there is no VT-d");
    };
    with_edu(|edu| {
        unit.with_device(edu.function(), |_, _, queue| {
            // Descriptors have no type 0.
            match queue.execute(&[[0, 0]]) {
                Err(IotlbError::Stopped(status)) if status & 1 << 4 != 0 => Ok(()),
                other => Err(format!("the answer is {other:x?}")),
            }
        })
    })
}

fn amdvi_forgets_at_the_discharge(boot: &'static Boot) -> Outcome {
    let Some(unit) = amdvi::Unit::find(boot) else {
        return Outcome::Skipped("there is no AMD-Vi");
    };
    with_edu(|edu| {
        unit.with_device(edu.function(), |table, flags, buffer| {
            edu.load()?;
            // SAFETY: as for VT-d.
            let mut domain = unsafe { buffer.domain(DOMAIN) };
            edits_reach_the_device(edu, table, flags, &mut domain)
        })
    })
}

fn amdvi_is_not_waited_for_when_it_is_off(boot: &'static Boot) -> Outcome {
    let Some(unit) = amdvi::Unit::find(boot) else {
        return Outcome::Skipped("there is no AMD-Vi");
    };
    with_edu(|edu| {
        unit.with_device(edu.function(), |_, _, buffer| {
            unit.stop_commands();
            match buffer.execute(&[]) {
                Err(IotlbError::Stopped(status)) if status & 1 << 4 == 0 => Ok(()),
                other => Err(format!("the answer is {other:x?}")),
            }
        })
    })
}
