//! The host-state area: what the processor becomes at every VM exit (SDM vol. 3C, 27.5).

use core::arch::asm;

use testudo_arch::{DescriptorTable, Msr};

use super::instructions::{cr0, cr3, cr4, rdmsr};
use super::switch;
use crate::error::AccessError;
use crate::fields;
use crate::state::set_if_there;
use crate::vmcs::VmcsWrite;

/// The state that VM exits load, apart from RSP, which each entry takes care of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "the registers' own names")]
pub struct HostState {
    pub cr0: u64,
    pub cr3: u64,
    pub cr4: u64,
    /// ES, CS, SS, DS, FS, GS and TR.
    pub selectors: [u16; 7],
    pub fs_base: u64,
    pub gs_base: u64,
    pub tr_base: u64,
    pub gdtr_base: u64,
    pub idtr_base: u64,
    pub sysenter_cs: u32,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub efer: u64,
    pub pat: u64,
    pub rip: u64,
}

impl HostState {
    /// The state of this processor, with the world switch as the place where exits arrive.
    ///
    /// VM exits load neither the limits of GDT and IDT, which become 64 KiB, nor LDTR, which
    /// becomes unusable. Selectors must have RPL 0 and must not be in the LDT; those that do not
    /// comply are replaced by the null selector, which 64-bit mode allows for all but CS and TR.
    ///
    /// # Safety
    ///
    /// CPL 0, 64-bit mode, a TSS loaded from the GDT, and every stack that an NMI, a machine check or
    /// a debug exception uses comes from the TSS (IST).
    pub unsafe fn of_this_processor() -> Self {
        let mut selectors = [0u16; 7];
        let (mut gdtr, mut idtr) = ([0u16; 5], [0u16; 5]);
        // SAFETY: these instructions read registers, into live locals of 10 bytes.
        unsafe {
            let [es, cs, ss, ds, fs, gs, tr] = &mut selectors;
            asm!(
                "mov {:x}, es",
                out(reg) * es,
                options(nomem, nostack, preserves_flags)
            );
            asm!(
                "mov {:x}, cs",
                out(reg) * cs,
                options(nomem, nostack, preserves_flags)
            );
            asm!(
                "mov {:x}, ss",
                out(reg) * ss,
                options(nomem, nostack, preserves_flags)
            );
            asm!(
                "mov {:x}, ds",
                out(reg) * ds,
                options(nomem, nostack, preserves_flags)
            );
            asm!(
                "mov {:x}, fs",
                out(reg) * fs,
                options(nomem, nostack, preserves_flags)
            );
            asm!(
                "mov {:x}, gs",
                out(reg) * gs,
                options(nomem, nostack, preserves_flags)
            );
            asm!(
                "str {:x}",
                out(reg) * tr,
                options(nomem, nostack, preserves_flags)
            );
            asm!("sgdt [{}]", in(reg) &mut gdtr, options(nostack, preserves_flags));
            asm!("sidt [{}]", in(reg) &mut idtr, options(nostack, preserves_flags));
        }
        for selector in &mut selectors {
            if *selector & 7 != 0 {
                *selector = 0;
            }
        }
        let gdt = descriptor_table(gdtr);
        // SAFETY: CPL 0; the MSRs exist on every processor with Intel 64. The TSS descriptor is in
        // the GDT, says the caller, so its 16 bytes can be read.
        unsafe {
            let descriptor = (gdt.base + u64::from(selectors[6])) as *const [u64; 2];
            Self {
                cr0: cr0(),
                cr3: cr3(),
                cr4: cr4(),
                selectors,
                fs_base: rdmsr(Msr::FS_BASE),
                gs_base: rdmsr(Msr::GS_BASE),
                tr_base: tss_base(descriptor.read_unaligned()),
                gdtr_base: gdt.base,
                idtr_base: descriptor_table(idtr).base,
                sysenter_cs: rdmsr(Msr::SYSENTER_CS) as u32,
                sysenter_esp: rdmsr(Msr::SYSENTER_ESP),
                sysenter_eip: rdmsr(Msr::SYSENTER_EIP),
                efer: rdmsr(Msr::EFER),
                pat: rdmsr(Msr::PAT),
                rip: switch::exit_address(),
            }
        }
    }

    /// IA32_EFER.
    pub fn efer(&self) -> u64 {
        self.efer
    }

    /// IA32_PAT.
    pub fn pat(&self) -> u64 {
        self.pat
    }

    /// Writes the host-state area. IA32_EFER and IA32_PAT are written where the VMCS has them, and
    /// count if the exit controls say so.
    ///
    /// # Errors
    ///
    /// A VMWRITE failed.
    pub fn write(&self, vmcs: &mut impl VmcsWrite) -> Result<(), AccessError> {
        let [es, cs, ss, ds, fs, gs, tr] = self.selectors;
        vmcs.set(fields::HOST_ES_SELECTOR, es)?;
        vmcs.set(fields::HOST_CS_SELECTOR, cs)?;
        vmcs.set(fields::HOST_SS_SELECTOR, ss)?;
        vmcs.set(fields::HOST_DS_SELECTOR, ds)?;
        vmcs.set(fields::HOST_FS_SELECTOR, fs)?;
        vmcs.set(fields::HOST_GS_SELECTOR, gs)?;
        vmcs.set(fields::HOST_TR_SELECTOR, tr)?;
        vmcs.set(fields::HOST_CR0, self.cr0)?;
        vmcs.set(fields::HOST_CR3, self.cr3)?;
        vmcs.set(fields::HOST_CR4, self.cr4)?;
        vmcs.set(fields::HOST_FS_BASE, self.fs_base)?;
        vmcs.set(fields::HOST_GS_BASE, self.gs_base)?;
        vmcs.set(fields::HOST_TR_BASE, self.tr_base)?;
        vmcs.set(fields::HOST_GDTR_BASE, self.gdtr_base)?;
        vmcs.set(fields::HOST_IDTR_BASE, self.idtr_base)?;
        vmcs.set(fields::HOST_SYSENTER_CS, self.sysenter_cs)?;
        vmcs.set(fields::HOST_SYSENTER_ESP, self.sysenter_esp)?;
        vmcs.set(fields::HOST_SYSENTER_EIP, self.sysenter_eip)?;
        // A processor that cannot load these on exits lacks the fields, and needs neither: they
        // then keep the guest's values only if the guest can change them.
        for (field, value) in [(fields::HOST_EFER, self.efer), (fields::HOST_PAT, self.pat)] {
            set_if_there(vmcs, field, value)?;
        }
        vmcs.set(fields::HOST_RIP, self.rip)
    }
}

/// GDTR or IDTR from the ten bytes that SGDT and SIDT store.
fn descriptor_table([limit, a, b, c, d]: [u16; 5]) -> DescriptorTable {
    let base = [a, b, c, d]
        .into_iter()
        .rev()
        .fold(0, |base, word| (base << 16) | u64::from(word));
    DescriptorTable { base, limit }
}

/// The base in a 64-bit TSS descriptor (SDM vol. 3A, figure 8-4).
fn tss_base([low, high]: [u64; 2]) -> u64 {
    ((low >> 16) & 0xFF_FFFF) | ((low >> 32) & 0xFF00_0000) | (high << 32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::FakeVmcs;
    use crate::vmcs::VmcsRead;

    #[test]
    fn descriptors() {
        let table = descriptor_table([0x67, 0x3344, 0x1122, 0x8000, 0xFFFF]);
        assert_eq!((table.limit, table.base), (0x67, 0xFFFF_8000_1122_3344));
        let base = tss_base([0x1200_8934_5678_0067, 0xFFFF_8000]);
        assert_eq!(base, 0xFFFF_8000_1234_5678);
    }

    #[test]
    fn a_processor_without_efer_loading_is_no_obstacle() {
        let state = HostState {
            cr3: 0x1000,
            efer: 0x500,
            ..HostState::default()
        };
        let mut vmcs = FakeVmcs::new();
        vmcs.fail(fields::HOST_EFER, crate::state::UNSUPPORTED);
        state.write(&mut vmcs).unwrap();
        assert_eq!(vmcs.get(fields::HOST_CR3), Ok(0x1000));
        vmcs.fail(fields::HOST_CR3, crate::VmFail::Invalid);
        assert!(state.write(&mut vmcs).is_err());
    }
}
