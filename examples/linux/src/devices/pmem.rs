//! Persistent memory: a file that the boot loader left, as memory that the guest maps.

use alloc::boxed::Box;
use alloc::string::{String, ToString};

use testudo_arch::memory::GuestRam;
use testudo_arch::{Gpa, GuestMemory, PAGE_SIZE};
use testudo_rt as rt;
use testudo_virtio::device::PmemBackend;

use super::disk;

/// What Linux makes persistent memory of.
const ALIGN: u64 = 2 << 20;
const PAGE: usize = PAGE_SIZE as usize;

/// The memory behind the device.
pub(crate) struct Persistent {
    gpa: Gpa,
    ram: GuestRam,
    /// What the file holds by now.
    durable: &'static mut [u8],
    /// Its number among the files that the guest may change.
    number: usize,
}

impl Persistent {
    /// Puts a file's contents at `gpa` of the guest's memory.
    pub(crate) fn new(file: &[u8], gpa: Gpa, ram: &mut GuestRam) -> Result<Self, String> {
        let len = file.len() as u64;
        if len == 0 || !len.is_multiple_of(ALIGN) {
            return Err("persistent memory is made of whole 2 MiB".into());
        }
        let take = || rt::memory::reserve(len, ALIGN).ok_or("the persistent memory does not fit");
        let (guest, durable) = (take()?, take()?);
        // SAFETY: both ranges were just handed out, mapped and to nobody else, and are as long as the
        // file.
        let durable = unsafe {
            for copy in [guest, durable] {
                core::ptr::copy_nonoverlapping(file.as_ptr(), copy as *mut u8, file.len());
            }
            core::slice::from_raw_parts_mut(durable as *mut u8, file.len())
        };
        // SAFETY: the range is the guest's for good, and nothing here has a reference into it.
        let added = unsafe { ram.add(gpa, guest as *mut u8, len, true) };
        added.map_err(|e| e.to_string())?;
        Ok(Self {
            gpa,
            ram: ram.clone(),
            durable,
            number: 0,
        })
    }

    /// The same for the file with this number.
    pub(crate) fn numbered(self, number: usize) -> Self {
        Self { number, ..self }
    }

    /// Where it is, and how long.
    pub(crate) fn place(&self) -> (Gpa, u64) {
        (self.gpa, self.durable.len() as u64)
    }
}

impl PmemBackend for Persistent {
    /// Hands out what differs from the file; false where nobody takes it.
    fn flush(&mut self) -> bool {
        let mut page = Box::new([0; PAGE]);
        for (durable, number) in self.durable.chunks_mut(PAGE).zip(0..) {
            let offset = number * PAGE_SIZE;
            if self
                .ram
                .read(self.gpa.wrapping_add(offset), &mut *page)
                .is_err()
            {
                return false;
            }
            if *durable != *page {
                if !disk::hand_out(self.number, offset, &*page) {
                    return false;
                }
                durable.copy_from_slice(&*page);
            }
        }
        true
    }
}
