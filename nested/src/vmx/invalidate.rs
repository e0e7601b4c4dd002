//! INVEPT and INVVPID (SDM vol. 3C, 33.3).

use testudo_arch::GuestMemory;
use testudo_vmx::caps::EptVpidCaps;
use testudo_vmx::exit::{InvalidateOperands, MemoryOperand};
use testudo_vmx::state::read_system_registers;
use testudo_vmx::{AccessError, InstructionError, VmFail};

use super::instruction::{Ending, Stop, gpr, is_64_bit, operand_fields};
use super::{Context, Flush, NestedVmx, SecondStage, VmcsPair};

const VMFAIL_OPERAND: VmFail = VmFail::Valid(InstructionError::InvalidInvalidationOperand);

impl NestedVmx {
    pub(super) fn invept<P: VmcsPair, M: GuestMemory, S: SecondStage, R>(
        &mut self,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<Ending, Stop> {
        let (kind, descriptor) = invalidate_operands(cx)?;
        let supported = match kind {
            1 => EptVpidCaps::INVEPT_SINGLE,
            2 => EptVpidCaps::INVEPT_ALL,
            _ => return Ok(Err(VMFAIL_OPERAND)),
        };
        if !self.caps.ept_vpid.contains(supported) {
            return Ok(Err(VMFAIL_OPERAND));
        }
        let [eptp, _] = self.descriptor(&descriptor, cx)?;
        if kind == 1 && !self.is_valid_eptp(eptp) {
            return Ok(Err(VMFAIL_OPERAND));
        }
        cx.second_stage.flush((kind == 1).then_some(eptp));
        self.flush |= Flush::EPT;
        Ok(Ok(()))
    }

    pub(super) fn invvpid<P: VmcsPair, M: GuestMemory, S, R>(
        &mut self,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<Ending, Stop> {
        let (kind, descriptor) = invalidate_operands(cx)?;
        let supported = match kind {
            0 => EptVpidCaps::INVVPID_ADDRESS,
            1 => EptVpidCaps::INVVPID_SINGLE,
            2 => EptVpidCaps::INVVPID_ALL,
            3 => EptVpidCaps::INVVPID_SINGLE_RETAINING_GLOBALS,
            _ => return Ok(Err(VMFAIL_OPERAND)),
        };
        if !self.caps.ept_vpid.contains(supported) {
            return Ok(Err(VMFAIL_OPERAND));
        }
        let [vpid, address] = self.descriptor(&descriptor, cx)?;
        let bits = self.caps.processor.linear_address_bits;
        let canonical = testudo_vmx::caps::Processor::is_canonical(address, bits);
        if vpid >> 16 != 0 || (kind != 2 && vpid == 0) || (kind == 0 && !canonical) {
            return Ok(Err(VMFAIL_OPERAND));
        }
        // L2 has one tag; what L1 flushes of another of its own is flushed when that comes to run.
        if kind == 2 || vpid == u64::from(self.vpid12) {
            self.flush |= Flush::VPID;
        }
        Ok(Ok(()))
    }

    fn descriptor<P: VmcsPair, M: GuestMemory, S, R>(
        &self,
        operand: &MemoryOperand,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<[u64; 2], Stop> {
        let system = read_system_registers(&cx.vmcs.l1())?;
        let mut bytes = [0; 16];
        self.operands(&system, cx).read(operand, &mut bytes)?;
        let all = u128::from_le_bytes(bytes);
        Ok([all as u64, (all >> 64) as u64])
    }

    /// What a VM entry asks of an EPT pointer (SDM vol. 3C, 29.2.1.1), for the formats offered.
    fn is_valid_eptp(&self, eptp: u64) -> bool {
        let accessed_dirty = self.caps.ept_vpid.contains(EptVpidCaps::ACCESSED_DIRTY);
        let reserved = if accessed_dirty { 0xF80 } else { 0xFC0 };
        eptp & 7 == 6
            && (eptp >> 3) & 7 == 3
            && eptp & reserved == 0
            && !self.caps.processor.exceeds_physical(eptp & !0xFFF)
    }
}

fn invalidate_operands<P: VmcsPair, M, S, R>(
    cx: &mut Context<'_, P, M, S, R>,
) -> Result<(u64, MemoryOperand), AccessError> {
    let (information, qualification) = operand_fields(cx)?;
    let operands = InvalidateOperands::new(information, qualification);
    let long = is_64_bit(&cx.vmcs.l1())?;
    Ok((gpr(operands.kind, long, cx.gprs), operands.descriptor))
}
