//! Posted interrupts for L2 (SDM vol. 3C, 32.6). The interrupts of L1's processor are L0's to deliver, so L0 does by
//! software what the processor would: the notification that comes while L2 runs makes requested in L2's virtual
//! local APIC what is posted, without an exit to L1. `vmcs02` never has the control.

use testudo_arch::{Gpa, GuestMemory};
use testudo_vmx::controls::PinControls;
use testudo_vmx::{AccessError, VmcsRead, VmcsWrite, fields};

use super::join::L1Controls;
use super::{Context, NestedVmx, VmcsPair};

/// In the descriptor: the outstanding notification, as a bit of a 32-bit word behind the requests.
const OUTSTANDING: (u64, u32) = (32, 1);

/// VIRR in the virtual-APIC page: eight registers of 32 bits.
const VIRR: u64 = 0x200;

/// How often a word is tried to be changed that L1's other processors change meanwhile.
const TRIES: u32 = 64;

/// What became of an interrupt of L1's that L0 has acknowledged while L2 runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Posted {
    /// It is not the notification: L2 exits by it.
    No,
    /// It was, and L1's local APIC is to be told of its end. `due`: the processor delivers an interrupt to L2 by now,
    /// which ends a halt.
    Taken {
        /// That.
        due: bool,
    },
}

impl NestedVmx {
    /// Takes an interrupt of L1's that is acknowledged, if it is the notification of posted ones.
    ///
    /// # Errors
    ///
    /// L0's own access to a VMCS failed.
    pub fn take_notification<P: VmcsPair, M: GuestMemory, S, R>(
        &mut self,
        vector: u8,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<Posted, AccessError> {
        let image = &*self.vmcs12.image;
        let posted = PinControls::PROCESS_POSTED_INTERRUPTS;
        if !self.is_guest || !L1Controls::read(image)?.pin.contains(posted) {
            return Ok(Posted::No);
        }
        let notification = image.get(fields::POSTED_INTERRUPT_NOTIFICATION_VECTOR)?;
        if notification != u16::from(vector) {
            return Ok(Posted::No);
        }
        let descriptor = Gpa(image.get(fields::POSTED_INTERRUPT_DESCRIPTOR_ADDRESS)?);
        let page = Gpa(image.get(fields::VIRTUAL_APIC_ADDRESS)?);
        clear_outstanding(cx.memory, descriptor);
        if let Some(highest) = request_all(cx.memory, descriptor, page) {
            raise_requesting(highest, &mut cx.vmcs.l2())?;
        }
        if self.serving.is_some() {
            self.hold_back(cx)?;
        }
        let due = self.has_virtual_interrupt(cx)?;
        self.is_halted &= !due;
        Ok(Posted::Taken { due })
    }
}

/// "The processor clears the outstanding-notification bit … atomically so as to leave the remainder of the descriptor
/// unmodified". What is not memory takes nothing.
fn clear_outstanding(memory: &impl GuestMemory, descriptor: Gpa) {
    let (offset, bit) = OUTSTANDING;
    let at = descriptor.wrapping_add(offset);
    let Ok(mut word) = memory.load_u32(at) else {
        return;
    };
    for _ in 0..TRIES {
        match memory.compare_exchange_u32(at, word, word & !bit) {
            Ok(Err(now)) => word = now,
            _ => return,
        }
    }
}

/// "The logical processor performs a logical-OR of PIR into VIRR and clears PIR. No other agent can read or write a PIR
/// bit … between the time it is read and when it is cleared". The highest vector, if there is any.
fn request_all(memory: &impl GuestMemory, descriptor: Gpa, page: Gpa) -> Option<u8> {
    let mut highest = None;
    for index in 0..4 {
        let posted = take_word(memory, descriptor.wrapping_add(8 * index));
        if posted == 0 {
            continue;
        }
        highest = Some((64 * index as u8) + (63 - posted.leading_zeros() as u8));
        for half in 0..2 {
            let bits = (posted >> (32 * half)) as u32;
            request(memory, page, 2 * index + half, bits);
        }
    }
    highest
}

/// Sets bits of one of the registers that are VIRR. What is not memory takes nothing.
pub(super) fn request(memory: &impl GuestMemory, page: Gpa, register: u64, bits: u32) {
    let at = page.wrapping_add(VIRR + 0x10 * register);
    if let Ok(requested) = memory.load_u32(at) {
        // Only L2's own processor, which is this one, changes it.
        let _dropped = memory.store_u32(at, requested | bits).is_err();
    }
}

/// Makes RVI, the low byte of the guest interrupt status, at least this vector.
pub(super) fn raise_requesting(vector: u8, vmcs02: &mut impl VmcsWrite) -> Result<(), AccessError> {
    let status = vmcs02.get(fields::GUEST_INTERRUPT_STATUS)?;
    let requesting = (status as u8).max(vector);
    let status = (status & 0xFF00) | u16::from(requesting);
    vmcs02.set(fields::GUEST_INTERRUPT_STATUS, status)
}

fn take_word(memory: &impl GuestMemory, at: Gpa) -> u64 {
    let Ok(mut word) = memory.load_u64(at) else {
        return 0;
    };
    for _ in 0..TRIES {
        if word == 0 {
            return 0;
        }
        match memory.compare_exchange_u64(at, word, 0) {
            Ok(Ok(_)) => return word,
            Ok(Err(now)) => word = now,
            Err(_) => return 0,
        }
    }
    // What is posted since comes with a notification of its own.
    0
}
