//! Interrupts of L2's virtual local APIC on a processor that delivers them although L2 masks interrupts
//! ([`Defects::DELIVERS_MASKED_VIRTUAL_INTERRUPTS`]).
//!
//! It does so when an interrupt of the machine's comes while one is pending, so none may be pending while RFLAGS.IF is
//! 0. None is recognized under "interrupt-window exiting" (SDM vol. 3C, 32.2.1): with that, one is held back, and L2
//! exits as soon as it can have it. What makes one pending in the course of L2's turn exits: the end of another, while
//! anything is requested, and an interrupt to itself by the x2APIC's MSR, which is requested for it. An L2 that, with
//! interrupts off, lowers its task priority or interrupts itself in xAPIC mode is not guarded.

use testudo_arch::{Gpa, GuestMemory, Msr, RFlags};
use testudo_vmx::controls::{Interruptibility, PrimaryControls, SecondaryControls};
use testudo_vmx::event::InterruptionInformation;
use testudo_vmx::exit::BasicReason;
use testudo_vmx::{AccessError, Defects, VmcsRead, VmcsWrite, fields};

use super::apic::is_due;
use super::join::L1Controls;
use super::posted::{raise_requesting, request};
use super::{Context, NestedVmx, VmcsPair};

/// Those of a processor that concern virtual interrupts.
pub(super) const DEFECTS: Defects =
    Defects::MISREPORTS_VIRTUAL_INTERRUPTS.union(Defects::DELIVERS_MASKED_VIRTUAL_INTERRUPTS);

const WINDOW: PrimaryControls = PrimaryControls::INTERRUPT_WINDOW_EXITING;

/// What the instruction before has the processor do without, for one more.
const SHADOW: Interruptibility =
    Interruptibility::BLOCKING_BY_STI.union(Interruptibility::BLOCKING_BY_MOV_SS);

impl NestedVmx {
    /// Before an entry of L2, whose virtual local APIC delivers interrupts: whether what is requested there is to be
    /// held back, or to be watched.
    #[cold]
    pub(super) fn hold_back<P: VmcsPair, M: GuestMemory, S, R>(
        &mut self,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<(), AccessError> {
        if !self
            .defects
            .contains(Defects::DELIVERS_MASKED_VIRTUAL_INTERRUPTS)
        {
            return Ok(());
        }
        let Some(joined) = &mut self.joined else {
            return Ok(());
        };
        let image = &*self.vmcs12.image;
        let theirs = L1Controls::read(image)?.primary.contains(WINDOW);
        let page = Gpa(image.get(fields::VIRTUAL_APIC_ADDRESS)?);
        let mut vmcs02 = cx.vmcs.l2();
        let status = vmcs02.get(fields::GUEST_INTERRUPT_STATUS)?;
        // Under L1's own control nothing is pending.
        self.held_back = !theirs
            && (self.self_ipi_open || is_due(status, cx.memory, page))
            && !takes_interrupts(&vmcs02)?;

        let last = *joined;
        joined
            .primary
            .set(WINDOW, theirs || self.window || self.held_back);
        let is_requested = status & 0xFF != 0 || self.self_ipi_open;
        joined.eoi_exits = match is_requested {
            true => [u64::MAX; 4],
            false => [
                image.get(fields::EOI_EXIT_BITMAP_0)?,
                image.get(fields::EOI_EXIT_BITMAP_1)?,
                image.get(fields::EOI_EXIT_BITMAP_2)?,
                image.get(fields::EOI_EXIT_BITMAP_3)?,
            ],
        };
        if last != *joined {
            // The next entry writes L1's own again.
            self.settled = None;
            vmcs02.set(fields::PRIMARY_CONTROLS, joined.primary.bits())?;
            let [first, second, third, fourth] = joined.eoi_exits;
            vmcs02.set(fields::EOI_EXIT_BITMAP_0, first)?;
            vmcs02.set(fields::EOI_EXIT_BITMAP_1, second)?;
            vmcs02.set(fields::EOI_EXIT_BITMAP_2, third)?;
            vmcs02.set(fields::EOI_EXIT_BITMAP_3, fourth)?;
        }
        Ok(())
    }

    /// Whether an exit that L1 did not ask for is one for the sake of [`Self::hold_back`], and L2 goes on.
    #[cold]
    pub(super) fn goes_on<P: VmcsPair, M: GuestMemory, S, R>(
        &mut self,
        reason: BasicReason,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<bool, AccessError> {
        let mine = match reason {
            BasicReason::InterruptWindow => self.held_back,
            BasicReason::VirtualizedEoi => true,
            BasicReason::Wrmsr => self.interrupts_itself(cx.gprs.rcx as u32),
            _ => false,
        };
        if !mine {
            return Ok(false);
        }
        if reason == BasicReason::Wrmsr && !self.request_own(cx)? {
            // It is done again, without an exit.
            self.open_self_ipi(true);
        }
        self.hold_back(cx)?;
        Ok(true)
    }

    /// Does what the processor does for a write of the self-IPI register (SDM vol. 3C, 32.1.5 and 32.5): the interrupt
    /// is requested, and L2 is behind its WRMSR. `false`, with nothing done, if there is more to it: a value that the
    /// register does not take, or a step that is traced.
    fn request_own<P: VmcsPair, M: GuestMemory, S, R>(
        &mut self,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<bool, AccessError> {
        // Of the code segment's access rights, and where the register is on the virtual-APIC page.
        const LONG: u32 = 1 << 13;
        const SELF_IPI: u64 = 0x3F0;
        let value = (cx.gprs.rdx << 32) | (cx.gprs.rax & 0xFFFF_FFFF);
        let mut vmcs02 = cx.vmcs.l2();
        let traced = vmcs02.get(fields::GUEST_RFLAGS)? & RFlags::TRAP_FLAG.bits() != 0;
        let vector = match u8::try_from(value) {
            Ok(vector) if vector >= 16 && !traced => vector,
            _ => return Ok(false),
        };
        let page = Gpa(self.vmcs12.image.get(fields::VIRTUAL_APIC_ADDRESS)?);
        // What is not memory takes nothing.
        let _dropped = cx
            .memory
            .store_u32(page.wrapping_add(SELF_IPI), vector.into())
            .is_err();
        request(cx.memory, page, (vector / 32).into(), 1 << (vector % 32));
        raise_requesting(vector, &mut vmcs02)?;

        let length = vmcs02.get(fields::EXIT_INSTRUCTION_LENGTH)?;
        let next = vmcs02.get(fields::GUEST_RIP)?.wrapping_add(length.into());
        let is_long = vmcs02.get(fields::GUEST_CS_ACCESS_RIGHTS)? & LONG != 0;
        let next = if is_long { next } else { next & 0xFFFF_FFFF };
        vmcs02.set(fields::GUEST_RIP, next)?;
        let state = Interruptibility::from_bits_retain(vmcs02.get(fields::GUEST_INTERRUPTIBILITY)?);
        vmcs02.set(fields::GUEST_INTERRUPTIBILITY, (state - SHADOW).bits())?;
        Ok(true)
    }

    /// Whether a write of this MSR, which L1 lets L2 write, is virtual and exits for the sake of [`Self::hold_back`].
    fn interrupts_itself(&self, msr: u32) -> bool {
        let is_closed = self.joined.as_ref().is_some_and(|joined| {
            let x2apic = SecondaryControls::VIRTUALIZE_X2APIC_MODE;
            joined.primary.contains(PrimaryControls::USE_MSR_BITMAPS)
                && joined.secondary.contains(x2apic)
        });
        msr == Msr::X2APIC_SELF_IPI.0
            && is_closed
            && self
                .defects
                .contains(Defects::DELIVERS_MASKED_VIRTUAL_INTERRUPTS)
    }
}

/// Whether L2 begins with interrupts on, and without an event whose handler has them off.
fn takes_interrupts(vmcs02: &impl VmcsRead) -> Result<bool, AccessError> {
    let state = Interruptibility::from_bits_retain(vmcs02.get(fields::GUEST_INTERRUPTIBILITY)?);
    let event = InterruptionInformation(vmcs02.get(fields::ENTRY_INTERRUPTION_INFORMATION)?);
    let enabled = vmcs02.get(fields::GUEST_RFLAGS)? & RFlags::INTERRUPT_FLAG.bits() != 0;
    Ok(enabled && !state.intersects(SHADOW) && !event.is_valid())
}
