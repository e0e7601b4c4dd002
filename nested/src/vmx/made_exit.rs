//! VM exits of L2 that the processor did not make: L0 does, for a physical event that L1 intercepts, or for what it
//! found while it emulated an instruction of L2.

use testudo_arch::{GuestMemory, Gva};
use testudo_vmx::controls::Interruptibility;
use testudo_vmx::event::InterruptionInformation;
use testudo_vmx::exit::BasicReason;
use testudo_vmx::{AccessError, VmcsRead, fields};

use super::exit::{Handled, blocking_after};
use super::route::is_exception_wanted;
use super::shadow::EXIT_INFORMATION;
use super::{Context, EptFault, Msrs, NestedVmx, VmcsPair, guest_fields};

/// Of interruption information, the type.
const HARDWARE_EXCEPTION: u32 = 3;

impl NestedVmx {
    /// Gives L1's VMCS exit information that the processor did not report.
    pub(super) fn set_exit(
        &mut self,
        reason: BasicReason,
        qualification: u64,
    ) -> Result<(), AccessError> {
        self.shadow_misses |= EXIT_INFORMATION;
        let image = &mut self.vmcs12.image;
        let number = u64::from(reason.number());
        guest_fields::set(image, fields::EXIT_REASON.encoding(), number)?;
        guest_fields::set(image, fields::EXIT_QUALIFICATION.encoding(), qualification)
    }

    /// Makes L2 exit to L1 for something that the processor did not report: a physical event that L1
    /// intercepts, or what L0 found while it emulated an instruction of L2. `interruption` is the
    /// VM-exit interruption information: the acknowledged interrupt, or the NMI.
    ///
    /// An event that was on its way into L2 is told to L1 as one whose delivery was interrupted.
    ///
    /// # Errors
    ///
    /// L0's own access to a VMCS failed.
    pub fn exit_to_l1<P, M, S, R>(
        &mut self,
        reason: BasicReason,
        qualification: u64,
        interruption: u32,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<Handled, AccessError>
    where
        P: VmcsPair,
        M: GuestMemory,
        R: Msrs,
    {
        self.exit_with(reason, qualification, (interruption, 0), cx)
    }

    /// Makes L2 exit to L1 by an exception that arose while L0 executed an instruction for it, if L1
    /// intercepts that one; `None` if not, and L2 is to have it. `address` is that of a page fault, which
    /// then does not reach CR2 (30.1).
    ///
    /// # Errors
    ///
    /// L0's own access to a VMCS failed.
    pub fn exit_by_exception<P, M, S, R>(
        &mut self,
        vector: u8,
        error_code: Option<u32>,
        address: Option<u64>,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<Option<Handled>, AccessError>
    where
        P: VmcsPair,
        M: GuestMemory,
        R: Msrs,
    {
        // Without an error code its field means nothing, and the information says so by bit 11; the
        // qualification is 0 for exceptions that have none (SDM vol. 3C, "Basic VM-Exit Information").
        let code = error_code.unwrap_or(0);
        if !self.is_guest || !is_exception_wanted(&self.vmcs12.image, vector, code)? {
            return Ok(None);
        }
        let has_code = u32::from(error_code.is_some());
        let information = 1 << 31 | has_code << 11 | HARDWARE_EXCEPTION << 8 | u32::from(vector);
        let reason = BasicReason::ExceptionOrNmi;
        self.exit_with(reason, address.unwrap_or(0), (information, code), cx)
            .map(Some)
    }

    /// Makes L2 exit to L1 by an EPT violation or misconfiguration that L0 met while it emulated an
    /// instruction of L2, in an access that was for this linear address.
    ///
    /// # Errors
    ///
    /// L0's own access to a VMCS failed.
    pub fn exit_by_ept<P, M, S, R>(
        &mut self,
        reason: BasicReason,
        fault: EptFault,
        linear: Gva,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<Handled, AccessError>
    where
        P: VmcsPair,
        M: GuestMemory,
        R: Msrs,
    {
        if self.is_guest {
            let image = &mut self.vmcs12.image;
            guest_fields::set(
                image,
                fields::GUEST_PHYSICAL_ADDRESS.encoding(),
                fault.gpa.0,
            )?;
            guest_fields::set(image, fields::GUEST_LINEAR_ADDRESS.encoding(), linear.0)?;
        }
        self.exit_with(reason, fault.qualification, (0, 0), cx)
    }

    /// As [`Self::exit_to_l1`], with the error code of an exception.
    fn exit_with<P, M, S, R>(
        &mut self,
        reason: BasicReason,
        qualification: u64,
        (interruption, error_code): (u32, u32),
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<Handled, AccessError>
    where
        P: VmcsPair,
        M: GuestMemory,
        R: Msrs,
    {
        if !self.is_guest {
            return Ok(Handled::Resume);
        }
        let (pending, code, length) = {
            let vmcs02 = cx.vmcs.l2();
            (
                vmcs02.get(fields::ENTRY_INTERRUPTION_INFORMATION)?,
                vmcs02.get(fields::ENTRY_EXCEPTION_ERROR_CODE)?,
                vmcs02.get(fields::ENTRY_INSTRUCTION_LENGTH)?,
            )
        };
        self.set_exit(reason, qualification)?;
        let is_pending = InterruptionInformation(pending).is_valid();
        let pending = if is_pending { pending } else { 0 };
        let information = [
            (
                fields::EXIT_INTERRUPTION_INFORMATION.encoding(),
                interruption,
            ),
            (fields::EXIT_INTERRUPTION_ERROR_CODE.encoding(), error_code),
            (fields::IDT_VECTORING_INFORMATION.encoding(), pending),
            (fields::IDT_VECTORING_ERROR_CODE.encoding(), code),
            (fields::EXIT_INSTRUCTION_LENGTH.encoding(), length),
            (fields::EXIT_INSTRUCTION_INFORMATION.encoding(), 0),
        ];
        for (field, value) in information {
            guest_fields::set(&mut self.vmcs12.image, field, value.into())?;
        }
        let blocking = match reason {
            BasicReason::ExceptionOrNmi => blocking_after(InterruptionInformation(interruption)),
            _ => Interruptibility::empty(),
        };
        self.leave(blocking, cx)
    }
}
