//! The guest registers that handlers ask for most: read from the VMCS at most once an exit, and
//! written at most once an entry.

use core::cell::Cell;

use testudo_vmx::controls::Interruptibility;
use testudo_vmx::{AccessError, Encoding, VmcsRead, VmcsWrite, fields};

/// A register that is cached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Cached {
    Rip = 0,
    Rflags = 1,
    Interruptibility = 2,
}

impl Cached {
    const ALL: [Self; 3] = [Self::Rip, Self::Rflags, Self::Interruptibility];

    const fn field(self) -> Encoding {
        match self {
            Self::Rip => fields::GUEST_RIP.encoding(),
            Self::Rflags => fields::GUEST_RFLAGS.encoding(),
            Self::Interruptibility => fields::GUEST_INTERRUPTIBILITY.encoding(),
        }
    }

    /// The flag that says that the value is here.
    const fn known(self) -> u16 {
        1 << self as u8
    }

    /// The flag that says that the value is not in the VMCS yet.
    const fn changed(self) -> u16 {
        1 << (8 + self as u8)
    }
}

/// The shadow of STI or MOV SS is over, because software has completed an instruction.
const SHADOW_OVER: u16 = 1 << 3;
/// Something that the cache does not hold is to be done before the next entry.
const OTHER_WORK: u16 = 1 << 15;
/// Everything that must be done before the next entry.
const WORK: u16 = OTHER_WORK
    | Cached::Rip.changed()
    | Cached::Rflags.changed()
    | Cached::Interruptibility.changed();

/// STI's and MOV SS's shadow.
pub(super) const SHADOW: Interruptibility =
    Interruptibility::BLOCKING_BY_STI.union(Interruptibility::BLOCKING_BY_MOV_SS);

/// Cached registers, each of them known or not, changed or not; and whether anything must be done
/// before the next entry, all in one word, so that an entry with little to do finds out at once.
#[derive(Debug, Default)]
pub(super) struct Cache {
    values: [Cell<u64>; 3],
    flags: Cell<u16>,
}

impl Cache {
    /// Forgets all, after the guest ran.
    #[inline]
    pub(super) fn forget(&self) {
        self.flags.set(0);
    }

    #[inline]
    fn add(&self, flags: u16) {
        self.flags.set(self.flags.get() | flags);
    }

    #[inline]
    fn has(&self, flags: u16) -> bool {
        self.flags.get() & flags != 0
    }

    #[inline]
    pub(super) fn get(&self, vmcs: &impl VmcsRead, register: Cached) -> Result<u64, AccessError> {
        let place = &self.values[register as usize];
        if self.has(register.known()) {
            return Ok(place.get());
        }
        let field = register.field();
        let value = vmcs
            .read_raw(field)
            .map_err(|fail| AccessError::Read { field, fail })?;
        place.set(value);
        self.add(register.known());
        Ok(value)
    }

    #[inline]
    pub(super) fn set(&self, register: Cached, value: u64) {
        self.values[register as usize].set(value);
        self.add(register.known() | register.changed());
    }

    /// Sets RIP past an instruction that software has completed, and ends the shadow of STI and
    /// MOV SS: at once where that is known, else when somebody asks for it. A shadow that nobody
    /// asks about ends one instruction late, which is as if the interrupt that it held back had
    /// come one instruction later.
    #[inline]
    pub(super) fn complete_to(&self, rip: u64) {
        self.values[Cached::Rip as usize].set(rip);
        self.add(Cached::Rip.known() | Cached::Rip.changed() | SHADOW_OVER);
        if self.has(Cached::Interruptibility.known()) {
            self.end_known_shadow();
        }
    }

    #[cold]
    #[inline(never)]
    fn end_known_shadow(&self) {
        let raw = self.values[Cached::Interruptibility as usize].get();
        let state = Interruptibility::from_bits_retain(raw as u32);
        if state.intersects(SHADOW) {
            self.set_interruptibility(state - SHADOW);
        }
    }

    /// The interruptibility state at the next entry.
    #[inline]
    pub(super) fn interruptibility(
        &self,
        vmcs: &impl VmcsRead,
    ) -> Result<Interruptibility, AccessError> {
        let raw = self.get(vmcs, Cached::Interruptibility)?;
        let mut state = Interruptibility::from_bits_retain(raw as u32);
        if self.has(SHADOW_OVER) && state.intersects(SHADOW) {
            state -= SHADOW;
            self.set_interruptibility(state);
        }
        Ok(state)
    }

    /// An instruction that software has completed holds interrupts back until the next one, as STI
    /// does.
    pub(super) fn begin_shadow(&self, vmcs: &impl VmcsRead) -> Result<(), AccessError> {
        let state = self.interruptibility(vmcs)?;
        self.flags.set(self.flags.get() & !SHADOW_OVER);
        self.set_interruptibility(state | Interruptibility::BLOCKING_BY_STI);
        Ok(())
    }

    #[inline]
    pub(super) fn set_interruptibility(&self, state: Interruptibility) {
        self.set(Cached::Interruptibility, u64::from(state.bits()));
    }

    /// Says that there is other work before the next entry.
    #[inline]
    pub(super) fn add_work(&self) {
        self.add(OTHER_WORK);
    }

    /// Writes RIP; whether there is more to do before the entry.
    #[inline]
    pub(super) fn write_rip(&self, vmcs: &mut impl VmcsWrite) -> Result<bool, AccessError> {
        let work = self.flags.get() & WORK;
        if work == Cached::Rip.changed() {
            vmcs.set(fields::GUEST_RIP, self.values[Cached::Rip as usize].get())?;
            return Ok(false);
        }
        Ok(work != 0)
    }

    /// Writes whatever has changed.
    pub(super) fn write_all(&self, vmcs: &mut impl VmcsWrite) -> Result<(), AccessError> {
        for register in Cached::ALL {
            if self.has(register.changed()) {
                let (field, value) = (register.field(), self.values[register as usize].get());
                vmcs.write_raw(field, value)
                    .map_err(|fail| AccessError::Write { field, value, fail })?;
            }
        }
        Ok(())
    }
}
