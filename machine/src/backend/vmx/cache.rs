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
    const fn field(self) -> Encoding {
        match self {
            Self::Rip => fields::GUEST_RIP.encoding(),
            Self::Rflags => fields::GUEST_RFLAGS.encoding(),
            Self::Interruptibility => fields::GUEST_INTERRUPTIBILITY.encoding(),
        }
    }

    const fn bit(self) -> u8 {
        1 << self as u8
    }
}

/// The shadow of STI or MOV SS is over, because software has completed an instruction.
const SHADOW_OVER: u8 = 1 << 7;

/// STI's and MOV SS's shadow.
pub(super) const SHADOW: Interruptibility =
    Interruptibility::BLOCKING_BY_STI.union(Interruptibility::BLOCKING_BY_MOV_SS);

/// Cached registers, each of them known or not, changed or not.
#[derive(Debug, Default)]
pub(super) struct Cache {
    values: [Cell<u64>; 3],
    known: Cell<u8>,
    changed: Cell<u8>,
}

impl Cache {
    /// Forgets all, after the guest ran.
    #[inline]
    pub(super) fn forget(&self) {
        self.known.set(0);
    }

    /// Whether the value is here, so that asking for it costs nothing.
    #[inline]
    fn knows(&self, register: Cached) -> bool {
        self.known.get() & register.bit() != 0
    }

    #[inline]
    pub(super) fn get(&self, vmcs: &impl VmcsRead, register: Cached) -> Result<u64, AccessError> {
        let place = &self.values[register as usize];
        if self.knows(register) {
            return Ok(place.get());
        }
        let field = register.field();
        let value = vmcs
            .read_raw(field)
            .map_err(|fail| AccessError::Read { field, fail })?;
        place.set(value);
        self.known.set(self.known.get() | register.bit());
        Ok(value)
    }

    #[inline]
    pub(super) fn set(&self, register: Cached, value: u64) {
        self.values[register as usize].set(value);
        self.known.set(self.known.get() | register.bit());
        self.changed.set(self.changed.get() | register.bit());
    }

    /// The interruptibility state at the next entry.
    #[inline]
    pub(super) fn interruptibility(
        &self,
        vmcs: &impl VmcsRead,
    ) -> Result<Interruptibility, AccessError> {
        let raw = self.get(vmcs, Cached::Interruptibility)?;
        let mut state = Interruptibility::from_bits_retain(raw as u32);
        if self.known.get() & SHADOW_OVER != 0 && state.intersects(SHADOW) {
            state -= SHADOW;
            self.set_interruptibility(state);
        }
        Ok(state)
    }

    #[inline]
    pub(super) fn set_interruptibility(&self, state: Interruptibility) {
        self.set(Cached::Interruptibility, u64::from(state.bits()));
    }

    /// Ends the shadow of STI and MOV SS: at once where the state is known, else when somebody asks
    /// for it. An instruction's shadow that nobody asks about ends one instruction late, which is
    /// as if the interrupt that it held back had come one instruction later.
    #[inline]
    pub(super) fn end_shadow(&self) {
        self.known.set(self.known.get() | SHADOW_OVER);
        if self.knows(Cached::Interruptibility) {
            self.end_known_shadow();
        }
    }

    #[cold]
    fn end_known_shadow(&self) {
        let raw = self.values[Cached::Interruptibility as usize].get();
        let state = Interruptibility::from_bits_retain(raw as u32);
        if state.intersects(SHADOW) {
            self.set_interruptibility(state - SHADOW);
        }
    }

    /// Writes what has changed, before an entry.
    #[inline]
    pub(super) fn write_back(&self, vmcs: &mut impl VmcsWrite) -> Result<(), AccessError> {
        let changed = self.changed.get();
        if changed & Cached::Rip.bit() != 0 {
            vmcs.set(fields::GUEST_RIP, self.values[Cached::Rip as usize].get())?;
        }
        if changed & !Cached::Rip.bit() != 0 {
            self.write_rest(vmcs, changed)?;
        }
        self.changed.set(0);
        Ok(())
    }

    #[inline(never)]
    fn write_rest(&self, vmcs: &mut impl VmcsWrite, changed: u8) -> Result<(), AccessError> {
        for register in [Cached::Rflags, Cached::Interruptibility] {
            if changed & register.bit() != 0 {
                let (field, value) = (register.field(), self.values[register as usize].get());
                vmcs.write_raw(field, value)
                    .map_err(|fail| AccessError::Write { field, value, fail })?;
            }
        }
        Ok(())
    }
}
