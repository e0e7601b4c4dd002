//! The VMX instructions, emulated: checks and flags in the manual's order (SDM vol. 3C, chapter 33).

use testudo_arch::regs::{Gpr, SystemRegisters};
use testudo_arch::segment::SegmentAttributes;
use testudo_arch::{Cr0Flags, Cr4Flags, EferFlags, Event, Gpa, Gprs, GuestMemory, RFlags};
use testudo_vmx::caps::EptVpidCaps;
use testudo_vmx::encoding::{Area, Encoding};
use testudo_vmx::exit::{BasicReason, MemoryOperand, Operand, VmcsOperands, complete_instruction};
use testudo_vmx::state::read_system_registers;
use testudo_vmx::{AccessError, InstructionError, VmFail, VmcsRead, VmcsWrite, fields};

use super::operand::{Fault, Operands};
use super::shadow::all_shadowed;
use super::vmcs12::{self, LaunchState, REVISION};
use super::{Context, Msrs, NestedVmx, SecondStage, VmcsPair, guest_fields, visible};

/// A VMX instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the instructions' own names")]
pub enum Instruction {
    Vmxon,
    Vmxoff,
    Vmclear,
    Vmptrld,
    Vmptrst,
    Vmread,
    Vmwrite,
    Vmlaunch,
    Vmresume,
    Vmcall,
    Vmfunc,
    Invept,
    Invvpid,
}

impl Instruction {
    /// All thirteen.
    pub const ALL: [Self; 13] = [
        Self::Vmxon,
        Self::Vmxoff,
        Self::Vmclear,
        Self::Vmptrld,
        Self::Vmptrst,
        Self::Vmread,
        Self::Vmwrite,
        Self::Vmlaunch,
        Self::Vmresume,
        Self::Vmcall,
        Self::Vmfunc,
        Self::Invept,
        Self::Invvpid,
    ];

    /// The instruction whose exit this is.
    #[inline]
    pub const fn from_exit(reason: BasicReason) -> Option<Self> {
        Some(match reason {
            BasicReason::Vmxon => Self::Vmxon,
            BasicReason::Vmxoff => Self::Vmxoff,
            BasicReason::Vmclear => Self::Vmclear,
            BasicReason::Vmptrld => Self::Vmptrld,
            BasicReason::Vmptrst => Self::Vmptrst,
            BasicReason::Vmread => Self::Vmread,
            BasicReason::Vmwrite => Self::Vmwrite,
            BasicReason::Vmlaunch => Self::Vmlaunch,
            BasicReason::Vmresume => Self::Vmresume,
            BasicReason::Vmcall => Self::Vmcall,
            BasicReason::Vmfunc => Self::Vmfunc,
            BasicReason::Invept => Self::Invept,
            BasicReason::Invvpid => Self::Invvpid,
            _ => return None,
        })
    }
}

/// What an emulated instruction led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Outcome {
    /// It is done, its flags are set, and L1 goes on behind it: VMsucceed or VMfail.
    Done,
    /// It is not done, and L1 gets this exception at it.
    Fault(Fault),
    /// VMLAUNCH or VMRESUME: L2 runs next. Pending physical events are to be looked at once more.
    Entered {
        /// L2 begins in the HLT activity state: it waits for an event.
        halted: bool,
    },
    /// The entry failed after the controls were accepted: L1 goes on at its host RIP, and its VMCS
    /// says why.
    FailedEntry,
    /// VMX abort: L1's processor shuts down.
    Abort,
    /// VMCALL of L1: a hypercall to L0. RIP is still at it.
    Hypercall,
}

/// How an instruction ends that does not fault.
pub(super) type Ending = Result<(), VmFail>;

/// Why it stops: a fault of L1's, or a failure of L0's own access to the processor.
pub(super) enum Stop {
    Fault(Fault),
    Access(AccessError),
}

impl From<Event> for Stop {
    fn from(event: Event) -> Self {
        Self::Fault(event.into())
    }
}

impl From<Fault> for Stop {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

impl From<AccessError> for Stop {
    fn from(error: AccessError) -> Self {
        Self::Access(error)
    }
}

/// CF, PF, AF, ZF, SF and OF: what VMsucceed clears.
const STATUS: u64 = 0x8D5;
const CF: u64 = 1;
const ZF: u64 = 1 << 6;

const UNSUPPORTED: VmFail = VmFail::Valid(InstructionError::UnsupportedComponent);

impl NestedVmx {
    /// Emulates the VMX instruction of L1 that exited, whose operands `vmcs01` describes.
    ///
    /// L2's VMX instructions always exit to L1, so they never come here.
    ///
    /// # Errors
    ///
    /// L0's own access to a VMCS failed.
    pub fn execute<P, M, S, R>(
        &mut self,
        instruction: Instruction,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<Outcome, AccessError>
    where
        P: VmcsPair,
        M: GuestMemory,
        S: SecondStage,
        R: Msrs,
    {
        match self.dispatch(instruction, cx) {
            Ok(outcome) => Ok(outcome),
            Err(Stop::Fault(fault)) => Ok(Outcome::Fault(fault)),
            Err(Stop::Access(error)) => Err(error),
        }
    }

    fn dispatch<P, M, S, R>(
        &mut self,
        instruction: Instruction,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<Outcome, Stop>
    where
        P: VmcsPair,
        M: GuestMemory,
        S: SecondStage,
        R: Msrs,
    {
        use Instruction as I;
        if instruction == I::Vmcall {
            return Ok(Outcome::Hypercall);
        }
        // VMFUNC is #UD outside non-root operation, and L1 is not offered it inside.
        if instruction == I::Vmfunc {
            return Err(Event::UD.into());
        }
        self.check_mode(instruction, &cx.vmcs.l1())?;
        cx.gprs.rsp = cx.vmcs.l1().get(fields::GUEST_RSP)?;
        // What ends the copy's time as the current one, or uses it as a whole. Fields that are in the
        // shadow do not come here one by one.
        let uses_copy = matches!(
            instruction,
            I::Vmclear | I::Vmptrld | I::Vmxoff | I::Vmlaunch | I::Vmresume
        );
        if uses_copy {
            let written = self.take_from_shadow(cx)?;
            if instruction == I::Vmresume && self.resume(written, cx)? {
                return Ok(Outcome::Entered { halted: false });
            }
            self.settled = None;
            self.take_delivery(cx)?;
            self.fetch_rare(cx)?;
        }
        let ending = match instruction {
            I::Vmxon => self.vmxon(cx)?,
            I::Vmxoff => self.vmxoff(cx.memory),
            I::Vmclear => self.vmclear(cx)?,
            I::Vmptrld => self.vmptrld(cx)?,
            I::Vmptrst => self.vmptrst(cx)?,
            I::Vmread => self.vmread(cx)?,
            I::Vmwrite => self.vmwrite(cx)?,
            I::Invept => self.invept(cx)?,
            I::Invvpid => self.invvpid(cx)?,
            _ => match self.enter(instruction == I::Vmlaunch, cx)? {
                Ok(outcome) => return Ok(outcome),
                Err(fail) => Err(fail),
            },
        };
        self.finish(ending, cx.memory, &mut cx.vmcs.l1())?;
        if instruction == I::Vmptrld {
            self.give_to_shadow(cx)?;
        }
        Ok(Outcome::Done)
    }

    /// VMCALL of L1, by an L0 that has no hypercalls: what it does on a processor without dual-monitor
    /// treatment of SMIs.
    ///
    /// # Errors
    ///
    /// L0's own access to a VMCS failed.
    pub fn refuse_vmcall<P: VmcsPair, M: GuestMemory, S, R>(
        &mut self,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<Outcome, AccessError> {
        match self.check_mode(Instruction::Vmcall, &cx.vmcs.l1()) {
            Ok(()) => {}
            Err(Stop::Fault(fault)) => return Ok(Outcome::Fault(fault)),
            Err(Stop::Access(error)) => return Err(error),
        }
        let fail = VmFail::Valid(InstructionError::VmcallInRoot);
        self.finish(Err(fail), cx.memory, &mut cx.vmcs.l1())?;
        Ok(Outcome::Done)
    }

    /// What comes before everything else: #UD for the mode, then #GP(0) for the privilege level.
    ///
    /// Every instruction but VMXON is #UD outside VMX operation; VMXON is #UD without CR4.VMXE.
    fn check_mode(&self, instruction: Instruction, vmcs01: &impl VmcsRead) -> Result<(), Stop> {
        let cr0 = vmcs01.get(fields::GUEST_CR0)?;
        let rflags = vmcs01.get(fields::GUEST_RFLAGS)?;
        let efer = vmcs01.get(fields::GUEST_EFER)?;
        let attributes = |field| vmcs01.get(field).map(SegmentAttributes::from_bits_retain);
        let cs = attributes(fields::GUEST_CS_ACCESS_RIGHTS)?;
        let ss = attributes(fields::GUEST_SS_ACCESS_RIGHTS)?;
        let compatibility =
            efer & EferFlags::LONG_MODE_ACTIVE.bits() != 0 && !cs.contains(SegmentAttributes::LONG);
        let allowed = match instruction {
            Instruction::Vmxon => {
                self.l1_cr4(vmcs01)? & Cr4Flags::VIRTUAL_MACHINE_EXTENSIONS.bits() != 0
            }
            // Without their feature these two do not exist.
            Instruction::Invept => {
                self.vmxon.is_some() && self.caps.ept_vpid.contains(EptVpidCaps::INVEPT)
            }
            Instruction::Invvpid => {
                self.vmxon.is_some() && self.caps.ept_vpid.contains(EptVpidCaps::INVVPID)
            }
            _ => self.vmxon.is_some(),
        };
        if !allowed
            || cr0 & Cr0Flags::PROTECTED_MODE_ENABLE.bits() == 0
            || rflags & RFlags::VIRTUAL_8086_MODE.bits() != 0
            || compatibility
        {
            return Err(Event::UD.into());
        }
        if ss.dpl() != 0 {
            return Err(Event::GP0.into());
        }
        Ok(())
    }

    fn l1_cr0(&self, vmcs01: &impl VmcsRead) -> Result<u64, AccessError> {
        let mask = vmcs01.get(fields::CR0_GUEST_HOST_MASK)?;
        let shadow = vmcs01.get(fields::CR0_READ_SHADOW)?;
        Ok(visible(vmcs01.get(fields::GUEST_CR0)?, mask, shadow))
    }

    fn l1_cr4(&self, vmcs01: &impl VmcsRead) -> Result<u64, AccessError> {
        let mask = vmcs01.get(fields::CR4_GUEST_HOST_MASK)?;
        let shadow = vmcs01.get(fields::CR4_READ_SHADOW)?;
        Ok(visible(vmcs01.get(fields::GUEST_CR4)?, mask, shadow))
    }

    /// VMsucceed, VMfailInvalid and VMfailValid (SDM vol. 3C, 33.2), and on to the next instruction.
    fn finish(
        &mut self,
        ending: Ending,
        memory: &impl GuestMemory,
        vmcs01: &mut impl VmcsWrite,
    ) -> Result<(), AccessError> {
        let flags = match ending {
            Ok(()) => 0,
            Err(VmFail::Invalid) => CF,
            // "VMfail(n): IF VMCS pointer is valid THEN VMfailValid(n) ELSE VMfailInvalid".
            Err(VmFail::Valid(_)) if self.region().is_none() => CF,
            Err(VmFail::Valid(error)) => {
                let field = fields::VM_INSTRUCTION_ERROR.encoding();
                guest_fields::set(&mut self.vmcs12.image, field, error.number().into())?;
                self.store_instruction_error(error.number(), memory);
                ZF
            }
        };
        let rflags = vmcs01.get(fields::GUEST_RFLAGS)?;
        vmcs01.set(fields::GUEST_RFLAGS, (rflags & !STATUS) | flags)?;
        complete_instruction(vmcs01)
    }

    fn vmxon<P: VmcsPair, M: GuestMemory, S, R>(
        &mut self,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<Ending, Stop> {
        if self.vmxon.is_some() {
            return Ok(Err(VmFail::Valid(InstructionError::VmxonInRoot)));
        }
        let (cr0, cr4) = {
            let vmcs01 = cx.vmcs.l1();
            (self.l1_cr0(&vmcs01)?, self.l1_cr4(&vmcs01)?)
        };
        let fixed = self.caps.cr0.violations(cr0, 0) == 0 && self.caps.cr4.violations(cr4, 0) == 0;
        if !fixed || self.caps.feature_control & 5 != 5 {
            return Err(Event::GP0.into());
        }
        let at = self.pointer_operand(cx)?;
        if !self.is_region_address(at) || !region_has_revision(cx.memory, at) {
            return Ok(Err(VmFail::Invalid));
        }
        self.vmxon = Some(at);
        self.current = None;
        Ok(Ok(()))
    }

    fn vmxoff(&mut self, memory: &impl GuestMemory) -> Ending {
        // The current VMCS is not lost by leaving VMX operation: its data go to memory.
        self.release_current(memory);
        self.vmxon = None;
        Ok(())
    }

    fn vmclear<P: VmcsPair, M: GuestMemory, S, R>(
        &mut self,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<Ending, Stop> {
        let at = self.pointer_operand(cx)?;
        if !self.is_region_address(at) {
            return Ok(Err(VmFail::Valid(InstructionError::VmclearInvalidAddress)));
        }
        if Some(at) == self.vmxon {
            return Ok(Err(VmFail::Valid(InstructionError::VmclearVmxonPointer)));
        }
        if Some(at) == self.current {
            self.vmcs12.launch_state = LaunchState::Clear;
            self.release_current(cx.memory);
        } else if Some(at) == self.active_enlightened_vmcs() {
            self.deactivate_enlightened();
        } else if self.named_enlightened_vmcs(cx.memory).is_none() {
            // An L1 with enlightened entries clears VMCSs that have fields in that place.
            // Not memory, or not writable: L1 chose the place, and the write goes nowhere.
            let _dropped = vmcs12::clear(cx.memory, at).is_err();
        }
        if self.in_vmcs02 == Some(at) {
            self.in_vmcs02 = None;
        }
        Ok(Ok(()))
    }

    fn vmptrld<P: VmcsPair, M: GuestMemory, S, R>(
        &mut self,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<Ending, Stop> {
        let at = self.pointer_operand(cx)?;
        if !self.is_region_address(at) {
            return Ok(Err(VmFail::Valid(InstructionError::VmptrldInvalidAddress)));
        }
        if Some(at) == self.vmxon {
            return Ok(Err(VmFail::Valid(InstructionError::VmptrldVmxonPointer)));
        }
        // Bit 31 would make it a shadow VMCS, which L1 is not offered.
        if !region_has_revision(cx.memory, at) {
            return Ok(Err(VmFail::Valid(InstructionError::VmptrldWrongRevision)));
        }
        if Some(at) != self.current {
            self.release_current(cx.memory);
            if self.vmcs12.load(cx.memory, at).is_err() {
                return Ok(Err(VmFail::Valid(InstructionError::VmptrldWrongRevision)));
            }
            self.current = Some(at);
            self.shadow_misses = all_shadowed(&self.caps);
            self.rare_dirty = true;
            self.in_vmcs02 = None;
        }
        Ok(Ok(()))
    }

    fn vmptrst<P: VmcsPair, M: GuestMemory, S, R>(
        &mut self,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<Ending, Stop> {
        let operand = memory_operand(cx)?;
        let value = self.current.map_or(u64::MAX, |at| at.0);
        let system = read_system_registers(&cx.vmcs.l1())?;
        self.operands(&system, cx)
            .write(&operand, &value.to_le_bytes())?;
        Ok(Ok(()))
    }

    fn vmread<P: VmcsPair, M: GuestMemory, S, R>(
        &mut self,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<Ending, Stop> {
        if self.current.is_none() {
            return Ok(Err(VmFail::Invalid));
        }
        let (information, qualification) = operand_fields(cx)?;
        let operands = VmcsOperands::new(information, qualification);
        let long = is_64_bit(&cx.vmcs.l1())?;
        let Some(field) = self.field(gpr(operands.encoding, long, cx.gprs)) else {
            return Ok(Err(UNSUPPORTED));
        };
        if guest_fields::is_rare(field) {
            self.fetch_rare(cx)?;
        }
        let value = match self.vmcs12.image.read_raw(field) {
            Ok(value) => value,
            Err(fail) => return Ok(Err(fail)),
        };
        match operands.value {
            Operand::Register(gpr) => {
                let value = if long { value } else { value & 0xFFFF_FFFF };
                set_gpr(gpr, value, cx)?;
            }
            Operand::Memory(memory) => {
                let system = read_system_registers(&cx.vmcs.l1())?;
                let len = if long { 8 } else { 4 };
                let bytes = value.to_le_bytes();
                self.operands(&system, cx).write(&memory, &bytes[..len])?;
            }
        }
        Ok(Ok(()))
    }

    fn vmwrite<P: VmcsPair, M: GuestMemory, S, R>(
        &mut self,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<Ending, Stop> {
        if self.current.is_none() {
            return Ok(Err(VmFail::Invalid));
        }
        let (information, qualification) = operand_fields(cx)?;
        let operands = VmcsOperands::new(information, qualification);
        let long = is_64_bit(&cx.vmcs.l1())?;
        let Some(field) = self.field(gpr(operands.encoding, long, cx.gprs)) else {
            return Ok(Err(UNSUPPORTED));
        };
        if field.area() == Area::ExitInformation && !self.caps.misc.vmwrite_any_field() {
            return Ok(Err(VmFail::Valid(InstructionError::ReadOnlyComponent)));
        }
        let value = match operands.value {
            Operand::Register(source) => gpr(source, long, cx.gprs),
            Operand::Memory(memory) => {
                let system = read_system_registers(&cx.vmcs.l1())?;
                let mut bytes = [0; 8];
                let len = if long { 8 } else { 4 };
                self.operands(&system, cx)
                    .read(&memory, &mut bytes[..len])?;
                u64::from_le_bytes(bytes)
            }
        };
        // Each entry loads it, and no check looks at it.
        if field.full() != fields::GUEST_INTERRUPT_STATUS.encoding() {
            self.settled = None;
        }
        if guest_fields::is_rare(field) || guest_fields::is_pdpte(field) {
            self.fetch_rare(cx)?;
            self.rare_dirty = true;
        }
        Ok(self.vmcs12.image.write_raw(field, value))
    }

    /// Writes the current VMCS back to L1's memory, and then there is none, nor an enlightened one.
    pub(super) fn release_current(&mut self, memory: &impl GuestMemory) {
        if let Some(at) = self.current {
            // L1 chose the place; what is not memory takes nothing.
            let _dropped = self.vmcs12.store(memory, at).is_err();
            self.current = None;
            self.in_vmcs02 = None;
        }
        self.deactivate_enlightened();
    }

    /// The field with this encoding, if L1's processor has it.
    #[inline]
    fn field(&self, encoding: u64) -> Option<Encoding> {
        let encoding = Encoding(u32::try_from(encoding).ok()?);
        let info = encoding.info()?;
        info.exists(&self.caps).then_some(encoding)
    }

    pub(super) fn operands<'o, P, M, S, R>(
        &self,
        system: &'o SystemRegisters,
        cx: &'o Context<'_, P, M, S, R>,
    ) -> Operands<'o, M> {
        Operands {
            system,
            gprs: cx.gprs,
            memory: cx.memory,
            physical_bits: self.caps.processor.physical_address_bits,
        }
    }

    /// The 64-bit physical address that VMXON, VMCLEAR and VMPTRLD take from memory.
    fn pointer_operand<P: VmcsPair, M: GuestMemory, S, R>(
        &self,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<Gpa, Stop> {
        let operand = memory_operand(cx)?;
        let system = read_system_registers(&cx.vmcs.l1())?;
        let mut bytes = [0; 8];
        self.operands(&system, cx).read(&operand, &mut bytes)?;
        Ok(Gpa(u64::from_le_bytes(bytes)))
    }

    /// "not 4 KByte aligned" or "sets any bits beyond the physical-address width".
    pub(super) fn is_region_address(&self, at: Gpa) -> bool {
        at.0 & 0xFFF == 0 && !self.caps.processor.exceeds_physical(at.0)
    }
}

/// The revision identifier at a region's start. What is not memory reads as ones.
fn region_has_revision(memory: &impl GuestMemory, at: Gpa) -> bool {
    let mut bytes = [0xFF; 4];
    memory.read(at, &mut bytes).is_ok() && u32::from_le_bytes(bytes) == REVISION
}

pub(super) fn operand_fields<P: VmcsPair, M, S, R>(
    cx: &mut Context<'_, P, M, S, R>,
) -> Result<(u32, u64), AccessError> {
    let vmcs01 = cx.vmcs.l1();
    let information = vmcs01.get(fields::EXIT_INSTRUCTION_INFORMATION)?;
    Ok((information, vmcs01.get(fields::EXIT_QUALIFICATION)?))
}

/// Whether L1 runs in 64-bit mode. Compatibility mode was refused, so LMA says it.
pub(super) fn is_64_bit(vmcs01: &impl VmcsRead) -> Result<bool, AccessError> {
    let efer = vmcs01.get(fields::GUEST_EFER)?;
    Ok(efer & EferFlags::LONG_MODE_ACTIVE.bits() != 0)
}

fn set_gpr<P: VmcsPair, M, S, R>(
    gpr: Gpr,
    value: u64,
    cx: &mut Context<'_, P, M, S, R>,
) -> Result<(), AccessError> {
    if gpr == Gpr::Rsp {
        cx.vmcs.l1().set(fields::GUEST_RSP, value)?;
    }
    cx.gprs[gpr] = value;
    Ok(())
}

fn memory_operand<P: VmcsPair, M, S, R>(
    cx: &mut Context<'_, P, M, S, R>,
) -> Result<MemoryOperand, AccessError> {
    let (information, qualification) = operand_fields(cx)?;
    Ok(MemoryOperand::new(information, qualification))
}

/// A general register as an operand: 32-bit code sees 32 bits.
pub(super) fn gpr(gpr: Gpr, long: bool, gprs: &Gprs) -> u64 {
    if long {
        gprs[gpr]
    } else {
        gprs[gpr] & 0xFFFF_FFFF
    }
}
