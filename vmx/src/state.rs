//! The guest-state area as a whole: to and from the form that both vendors share.
//!
//! ```
//! use testudo_arch::regs::SystemRegisters;
//! use testudo_vmx::{VmcsRead, fake::FakeVmcs, fields, state};
//!
//! let mut vmcs = FakeVmcs::new();
//! state::write_system_registers(&mut vmcs, &SystemRegisters::reset())?;
//! assert_eq!(vmcs.get(fields::GUEST_CS_BASE)?, 0xFFFF_0000);
//! # Ok::<(), testudo_vmx::AccessError>(())
//! ```

use testudo_arch::regs::{SegmentRegister, SystemRegisters};
use testudo_arch::segment::SegmentAttributes;
use testudo_arch::{DescriptorTable, Segment};

use crate::caps::VmxCaps;
use crate::encoding::{Area, Field, Natural};
use crate::error::{AccessError, InstructionError, VmFail};
use crate::fields;
use crate::vmcs::{VmcsRead, VmcsWrite};

/// The four fields of one segment register.
#[derive(Clone, Copy, Debug)]
pub struct SegmentFields {
    /// The selector.
    pub selector: Field<u16>,
    /// The base.
    pub base: Field<Natural>,
    /// The limit.
    pub limit: Field<u32>,
    /// The access rights.
    pub access_rights: Field<u32>,
}

macro_rules! segment_fields {
    ($($register:ident: $selector:ident, $base:ident, $limit:ident, $rights:ident;)*) => {
        /// The fields of a guest segment register.
        #[inline]
        pub const fn segment_fields(register: SegmentRegister) -> SegmentFields {
            match register {
                $(SegmentRegister::$register => SegmentFields {
                    selector: fields::$selector,
                    base: fields::$base,
                    limit: fields::$limit,
                    access_rights: fields::$rights,
                },)*
            }
        }
    };
}

segment_fields! {
    Es: GUEST_ES_SELECTOR, GUEST_ES_BASE, GUEST_ES_LIMIT, GUEST_ES_ACCESS_RIGHTS;
    Cs: GUEST_CS_SELECTOR, GUEST_CS_BASE, GUEST_CS_LIMIT, GUEST_CS_ACCESS_RIGHTS;
    Ss: GUEST_SS_SELECTOR, GUEST_SS_BASE, GUEST_SS_LIMIT, GUEST_SS_ACCESS_RIGHTS;
    Ds: GUEST_DS_SELECTOR, GUEST_DS_BASE, GUEST_DS_LIMIT, GUEST_DS_ACCESS_RIGHTS;
    Fs: GUEST_FS_SELECTOR, GUEST_FS_BASE, GUEST_FS_LIMIT, GUEST_FS_ACCESS_RIGHTS;
    Gs: GUEST_GS_SELECTOR, GUEST_GS_BASE, GUEST_GS_LIMIT, GUEST_GS_ACCESS_RIGHTS;
    Ldtr: GUEST_LDTR_SELECTOR, GUEST_LDTR_BASE, GUEST_LDTR_LIMIT, GUEST_LDTR_ACCESS_RIGHTS;
    Tr: GUEST_TR_SELECTOR, GUEST_TR_BASE, GUEST_TR_LIMIT, GUEST_TR_ACCESS_RIGHTS;
}

/// Every segment register, in the order of their fields.
pub const SEGMENT_REGISTERS: [SegmentRegister; 8] = [
    SegmentRegister::Es,
    SegmentRegister::Cs,
    SegmentRegister::Ss,
    SegmentRegister::Ds,
    SegmentRegister::Fs,
    SegmentRegister::Gs,
    SegmentRegister::Ldtr,
    SegmentRegister::Tr,
];

/// Reads one guest segment register. Four VMREADs.
///
/// # Errors
///
/// A VMREAD failed.
pub fn read_segment(
    vmcs: &impl VmcsRead,
    register: SegmentRegister,
) -> Result<Segment, AccessError> {
    let fields = segment_fields(register);
    let rights = vmcs.get(fields.access_rights)?;
    Ok(Segment {
        selector: vmcs.get(fields.selector)?,
        attributes: SegmentAttributes::from_bits_retain(rights),
        limit: vmcs.get(fields.limit)?,
        base: vmcs.get(fields.base)?,
    })
}

/// Writes one guest segment register. Four VMWRITEs.
///
/// A segment that is not present is written as unusable: VMX expresses a null selector so, and
/// SVM by a clear present bit.
///
/// # Errors
///
/// A VMWRITE failed.
pub fn write_segment(
    vmcs: &mut impl VmcsWrite,
    register: SegmentRegister,
    segment: &Segment,
) -> Result<(), AccessError> {
    let fields = segment_fields(register);
    let mut attributes = segment.attributes;
    if !attributes.contains(SegmentAttributes::PRESENT) {
        attributes |= SegmentAttributes::UNUSABLE;
    }
    vmcs.set(fields.selector, segment.selector)?;
    vmcs.set(fields.base, segment.base)?;
    vmcs.set(fields.limit, segment.limit)?;
    vmcs.set(fields.access_rights, attributes.bits())
}

/// Reads the guest's system registers, all but CR2, CR8 and DR6, which no VMCS holds and which
/// come back as 0. Control registers are the real ones, not what their read shadows show.
///
/// # Errors
///
/// A VMREAD failed. IA32_EFER must be saved on exits; where the VMCS has no field for it, it comes back as 0.
pub fn read_system_registers(vmcs: &impl VmcsRead) -> Result<SystemRegisters, AccessError> {
    let segment = |register| read_segment(vmcs, register);
    Ok(SystemRegisters {
        es: segment(SegmentRegister::Es)?,
        cs: segment(SegmentRegister::Cs)?,
        ss: segment(SegmentRegister::Ss)?,
        ds: segment(SegmentRegister::Ds)?,
        fs: segment(SegmentRegister::Fs)?,
        gs: segment(SegmentRegister::Gs)?,
        ldtr: segment(SegmentRegister::Ldtr)?,
        tr: segment(SegmentRegister::Tr)?,
        gdtr: DescriptorTable {
            base: vmcs.get(fields::GUEST_GDTR_BASE)?,
            limit: vmcs.get(fields::GUEST_GDTR_LIMIT)? as u16,
        },
        idtr: DescriptorTable {
            base: vmcs.get(fields::GUEST_IDTR_BASE)?,
            limit: vmcs.get(fields::GUEST_IDTR_LIMIT)? as u16,
        },
        cr0: vmcs.get(fields::GUEST_CR0)?,
        cr3: vmcs.get(fields::GUEST_CR3)?,
        cr4: vmcs.get(fields::GUEST_CR4)?,
        efer: match vmcs.get(fields::GUEST_EFER) {
            Err(AccessError::Read { fail, .. }) if fail == UNSUPPORTED => 0,
            efer => efer?,
        },
        rip: vmcs.get(fields::GUEST_RIP)?,
        rflags: vmcs.get(fields::GUEST_RFLAGS)?,
        dr7: vmcs.get(fields::GUEST_DR7)?,
        cr2: 0,
        cr8: 0,
        dr6: 0,
    })
}

/// Writes the guest's system registers, all but CR2, CR8 and DR6, exactly as they are: which bits
/// VMX fixes in CR0 and CR4 and what their shadows show is the caller's policy, as is the entry
/// control "IA-32e mode guest", which must equal EFER.LMA.
///
/// # Errors
///
/// A VMWRITE failed. IA32_EFER must be loaded on entries; where the VMCS has no field for it, the caller sees to
/// it otherwise.
pub fn write_system_registers(
    vmcs: &mut impl VmcsWrite,
    registers: &SystemRegisters,
) -> Result<(), AccessError> {
    for register in SEGMENT_REGISTERS {
        write_segment(vmcs, register, registers.segment(register))?;
    }
    vmcs.set(fields::GUEST_GDTR_BASE, registers.gdtr.base)?;
    vmcs.set(fields::GUEST_GDTR_LIMIT, registers.gdtr.limit.into())?;
    vmcs.set(fields::GUEST_IDTR_BASE, registers.idtr.base)?;
    vmcs.set(fields::GUEST_IDTR_LIMIT, registers.idtr.limit.into())?;
    vmcs.set(fields::GUEST_CR0, registers.cr0)?;
    vmcs.set(fields::GUEST_CR3, registers.cr3)?;
    vmcs.set(fields::GUEST_CR4, registers.cr4)?;
    set_if_there(vmcs, fields::GUEST_EFER, registers.efer)?;
    vmcs.set(fields::GUEST_RIP, registers.rip)?;
    vmcs.set(fields::GUEST_RFLAGS, registers.rflags)?;
    vmcs.set(fields::GUEST_DR7, registers.dr7)
}

/// What an access to a field fails with that the processor does not have.
pub(crate) const UNSUPPORTED: VmFail = VmFail::Valid(InstructionError::UnsupportedComponent);

/// Sets a field that only some processors have.
pub(crate) fn set_if_there(
    vmcs: &mut impl VmcsWrite,
    field: Field<u64>,
    value: u64,
) -> Result<(), AccessError> {
    match vmcs.set(field, value) {
        Err(AccessError::Write { fail, .. }) if fail == UNSUPPORTED => Ok(()),
        result => result,
    }
}

/// Gives every field of a new VMCS a value, since VMCLEAR leaves them undefined: 0, and all ones in
/// the VMCS link pointer.
///
/// Fields that no capability tells of are written where they are: KVM has neither those of the dual-monitor
/// treatment of SMIs (SDM vol. 3C, 34.15) nor CR3 targets for its guests.
///
/// # Errors
///
/// A VMWRITE failed for another reason than that the processor lacks the field.
pub fn initialize(vmcs: &mut impl VmcsWrite, caps: &VmxCaps) -> Result<(), AccessError> {
    for info in fields::FIELDS.iter().filter(|info| info.exists(caps)) {
        let field = info.encoding;
        if field.area() == Area::ExitInformation {
            continue;
        }
        let link = field == fields::VMCS_LINK_POINTER.encoding();
        let value = if link { u64::MAX } else { 0 };
        match vmcs.write_raw(field, value) {
            Err(fail) if fail != UNSUPPORTED => {
                return Err(AccessError::Write { field, value, fail });
            }
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::caps::fixtures;
    use crate::fake::FakeVmcs;

    #[test]
    fn a_new_vmcs_has_defined_fields() {
        for (name, caps) in fixtures::all() {
            let mut vmcs = FakeVmcs::with_caps(&caps);
            for info in fields::FIELDS {
                vmcs.preset(info.encoding, 0x5A5A);
            }
            initialize(&mut vmcs, &caps).unwrap();
            assert_eq!(vmcs.get(fields::VMCS_LINK_POINTER), Ok(u64::MAX), "{name}");
            assert_eq!(vmcs.get(fields::GUEST_ACTIVITY_STATE), Ok(0), "{name}");
            assert_eq!(vmcs.get(fields::EXIT_REASON), Ok(0x5A5A), "{name}");
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let mut registers = SystemRegisters::reset();
        registers.dr6 = 0;
        registers.cs.base = 0x1234_5678;
        registers.ldtr.limit = 77;
        registers.efer = 0x500;
        let mut vmcs = FakeVmcs::new();
        write_system_registers(&mut vmcs, &registers).unwrap();
        assert_eq!(read_system_registers(&vmcs), Ok(registers));
    }

    #[test]
    fn an_absent_segment_becomes_unusable() {
        let mut vmcs = FakeVmcs::new();
        write_segment(&mut vmcs, SegmentRegister::Gs, &Segment::default()).unwrap();
        assert_eq!(vmcs.get(fields::GUEST_GS_ACCESS_RIGHTS), Ok(1 << 16));
    }

    #[test]
    fn the_four_fields_belong_together() {
        for (i, register) in SEGMENT_REGISTERS.into_iter().enumerate() {
            let fields = segment_fields(register);
            let index = fields.selector.encoding().index();
            assert_eq!(usize::from(index), i);
            assert_eq!(fields.limit.encoding().index(), index);
            assert_eq!(fields.access_rights.encoding().index(), index + 10);
            assert_eq!(fields.base.encoding().index(), index + 3);
        }
    }
}
