//! The virtual-machine control block (APM vol. 2, 15.5 and appendix B).
//!
//! One page of memory: the control area says what the guest may do and why it stopped, the
//! state-save area holds its registers. Every field is one row of one table in this file; its
//! accessors, its offset check, its clean bit and [`Vmcb::FIELDS`] follow from the row.
//!
//! Getters give the value as it stands, unknown bits included. Setters also clear the clean bit of
//! what they change, so that a forgotten bit cannot let the processor run on stale state.
//!
//! ```
//! use testudo_svm::vmcb::{CleanBits, Vmcb};
//!
//! let mut vmcb = Vmcb::new();
//! vmcb.mark_clean();
//! vmcb.set_cr3(0x1000);
//! assert_eq!(vmcb.clean(), CleanBits::all() - CleanBits::CONTROL_REGISTERS);
//! ```

mod clean;
mod controls;
mod state;

use core::fmt;

use testudo_arch::PAGE_SIZE;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use crate::event::RawEvent;
use crate::intercept::{
    CrIntercepts, DrIntercepts, ExceptionIntercepts, Intercepts, Misc1, Misc2, Misc3,
};

pub use clean::CleanBits;
pub use controls::{
    AvicPhysicalTable, ErapControl, InterruptState, NestedControl, TlbControl, VintrFlags,
    VirtualExtensions, VirtualInterrupts,
};
pub use state::VmcbSegment;

/// A type in which a field of the VMCB can be read and written.
trait FieldValue {
    type Raw;
    fn from_raw(raw: Self::Raw) -> Self;
    fn into_raw(self) -> Self::Raw;
}

macro_rules! plain_value {
    ($($int:ty),*) => {$(
        impl FieldValue for $int {
            type Raw = Self;
            #[inline(always)]
            fn from_raw(raw: Self) -> Self { raw }
            #[inline(always)]
            fn into_raw(self) -> Self { self }
        }
    )*};
}
plain_value!(u8, u16, u32, u64);

macro_rules! flags_value {
    ($($flags:ty: $raw:ty),* $(,)?) => {$(
        impl FieldValue for $flags {
            type Raw = $raw;
            #[inline(always)]
            fn from_raw(raw: $raw) -> Self { Self::from_bits_retain(raw) }
            #[inline(always)]
            fn into_raw(self) -> $raw { self.bits() }
        }
    )*};
}
flags_value!(
    CrIntercepts: u32, DrIntercepts: u32, ExceptionIntercepts: u32, Misc1: u32, Misc2: u32,
    Misc3: u32, ErapControl: u8, InterruptState: u64, NestedControl: u64, VirtualExtensions: u64,
    CleanBits: u32,
);

macro_rules! newtype_value {
    ($($name:ident: $raw:ty),* $(,)?) => {$(
        impl FieldValue for $name {
            type Raw = $raw;
            #[inline(always)]
            fn from_raw(raw: $raw) -> Self { Self(raw) }
            #[inline(always)]
            fn into_raw(self) -> $raw { self.0 }
        }
    )*};
}
newtype_value!(VirtualInterrupts: u64, AvicPhysicalTable: u64, RawEvent: u64);

impl FieldValue for TlbControl {
    type Raw = u8;
    #[inline(always)]
    fn from_raw(raw: u8) -> Self {
        Self::from_raw(raw)
    }
    #[inline(always)]
    fn into_raw(self) -> u8 {
        self.to_raw()
    }
}

/// One row of the VMCB's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FieldInfo {
    /// The accessor's name.
    pub name: &'static str,
    /// The offset from the start of the VMCB, in bytes.
    pub offset: u16,
    /// The size in bytes.
    pub size: u16,
    /// The clean bits that cover it; empty if every VMRUN loads it.
    pub clean: CleanBits,
    /// What it is.
    pub text: &'static str,
}

macro_rules! vmcb {
    ($(
        $offset:literal $name:ident: $raw:ty
        $(=> $set:ident, $typed:ty, $clean:ident, $text:literal)?;
    )*) => {
        /// The virtual-machine control block. See the [module](self).
        #[derive(Clone, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
        #[repr(C, align(4096))]
        pub struct Vmcb {
            $($name: $raw,)*
        }

        const _: () = {
            $(assert!(core::mem::offset_of!(Vmcb, $name) == $offset, stringify!($name));)*
            assert!(size_of::<Vmcb>() as u64 == PAGE_SIZE);
        };

        impl Vmcb {
            /// Every field by ascending offset, for dumps, comparisons and fuzzers.
            pub const FIELDS: &[FieldInfo] = &[$($(FieldInfo {
                name: stringify!($name),
                offset: $offset,
                size: size_of::<$raw>() as u16,
                clean: CleanBits::$clean,
                text: $text,
            },)?)*];

            $($(
                #[doc = concat!($text, " Offset ", stringify!($offset), ".")]
                #[inline]
                pub fn $name(&self) -> $typed {
                    <$typed as FieldValue>::from_raw(self.$name)
                }

                #[doc = concat!("Sets [`Self::", stringify!($name), "`] and clears its clean bit.")]
                #[inline]
                pub fn $set(&mut self, value: $typed) {
                    self.$name = value.into_raw();
                    self.clean &= !CleanBits::$clean.bits();
                }
            )?)*
        }
    };
}

vmcb! {
    // The control area (table B-1).
    0x000 intercept_cr: u32 => set_intercept_cr, CrIntercepts, INTERCEPTS, "Intercepts of control registers.";
    0x004 intercept_dr: u32 => set_intercept_dr, DrIntercepts, INTERCEPTS, "Intercepts of debug registers.";
    0x008 intercept_exceptions: u32 => set_intercept_exceptions, ExceptionIntercepts, INTERCEPTS, "Intercepts of exceptions.";
    0x00C intercept_misc1: u32 => set_intercept_misc1, Misc1, INTERCEPTS, "Intercepts of instructions and events, first word.";
    0x010 intercept_misc2: u32 => set_intercept_misc2, Misc2, INTERCEPTS, "Intercepts of instructions and events, second word.";
    0x014 intercept_misc3: u32 => set_intercept_misc3, Misc3, INTERCEPTS, "Intercepts of instructions and events, third word.";
    0x018 reserved_018: [u8; 0x24];
    0x03C pause_filter_threshold: u16 => set_pause_filter_threshold, u16, INTERCEPTS, "Pause filter: cycles between two PAUSEs that count as one loop (15.14.4).";
    0x03E pause_filter_count: u16 => set_pause_filter_count, u16, INTERCEPTS, "Pause filter: PAUSEs without an exit.";
    0x040 iopm_base_pa: u64 => set_iopm_base_pa, u64, PERMISSION_MAPS, "IOPM_BASE_PA: host-physical address of the I/O permission map.";
    0x048 msrpm_base_pa: u64 => set_msrpm_base_pa, u64, PERMISSION_MAPS, "MSRPM_BASE_PA: host-physical address of the MSR permission map.";
    0x050 tsc_offset: u64 => set_tsc_offset, u64, INTERCEPTS, "TSC_OFFSET: added to the time-stamp counter that the guest reads.";
    0x058 asid: u32 => set_asid, u32, ASID, "Guest ASID: never 0, which is the host's.";
    0x05C tlb_control: u8 => set_tlb_control, TlbControl, ALWAYS_LOADED, "TLB_CONTROL: what the next VMRUN flushes.";
    0x05D erap_control: u8 => set_erap_control, ErapControl, ALWAYS_LOADED, "ERAP_CONTROL: the return-address predictor.";
    0x05E reserved_05e: [u8; 2];
    0x060 virtual_interrupts: u64 => set_virtual_interrupts, VirtualInterrupts, TPR, "V_TPR, V_IRQ and the other virtual-interrupt controls.";
    0x068 interrupt_state: u64 => set_interrupt_state, InterruptState, ALWAYS_LOADED, "The interrupt shadow.";
    0x070 exit_code: u64 => set_exit_code, u64, ALWAYS_LOADED, "EXITCODE: why the guest stopped (appendix C).";
    0x078 exit_info1: u64 => set_exit_info1, u64, ALWAYS_LOADED, "EXITINFO1: its meaning depends on the exit code.";
    0x080 exit_info2: u64 => set_exit_info2, u64, ALWAYS_LOADED, "EXITINFO2: its meaning depends on the exit code.";
    0x088 exit_int_info: u64 => set_exit_int_info, RawEvent, ALWAYS_LOADED, "EXITINTINFO: the event whose delivery the exit interrupted (15.7.2).";
    0x090 nested_control: u64 => set_nested_control, NestedControl, NESTED_PAGING, "NP_ENABLE and memory encryption.";
    0x098 avic_apic_bar: u64 => set_avic_apic_bar, u64, AVIC, "AVIC: guest-physical address of the APIC page.";
    0x0A0 ghcb_pa: u64 => set_ghcb_pa, u64, ALWAYS_LOADED, "SEV-ES: guest-physical address of the GHCB.";
    0x0A8 event_inj: u64 => set_event_inj, RawEvent, ALWAYS_LOADED, "EVENTINJ: the event that VMRUN delivers (15.20).";
    0x0B0 n_cr3: u64 => set_n_cr3, u64, NESTED_PAGING, "N_CR3: host-physical address of the nested page table.";
    0x0B8 virtual_extensions: u64 => set_virtual_extensions, VirtualExtensions, LBR, "LBR, VMSAVE/VMLOAD, IBS and PMC virtualization.";
    0x0C0 clean: u32 => set_clean, CleanBits, ALWAYS_LOADED, "VMCB clean bits (15.15).";
    0x0C4 reserved_0c4: [u8; 4];
    0x0C8 n_rip: u64 => set_n_rip, u64, ALWAYS_LOADED, "nRIP: the instruction after the intercepted one, with NRIPS; 0 after exits that no instruction caused (15.7.1).";
    0x0D0 bytes_fetched: u8 => set_bytes_fetched, u8, ALWAYS_LOADED, "How many of the guest instruction bytes are valid (15.8.4).";
    0x0D1 instruction_bytes: [u8; 15];
    0x0E0 avic_backing_page: u64 => set_avic_backing_page, u64, AVIC, "AVIC: host-physical address of the APIC backing page.";
    0x0E8 reserved_0e8: [u8; 8];
    0x0F0 avic_logical_table: u64 => set_avic_logical_table, u64, AVIC, "AVIC: host-physical address of the logical APIC ID table.";
    0x0F8 avic_physical_table: u64 => set_avic_physical_table, AvicPhysicalTable, AVIC, "AVIC: physical APIC ID table and its last index.";
    0x100 reserved_100: [u8; 8];
    0x108 vmsa_pa: u64 => set_vmsa_pa, u64, ALWAYS_LOADED, "SEV-ES: host-physical address of the encrypted save area.";
    0x110 vmgexit_rax: u64 => set_vmgexit_rax, u64, ALWAYS_LOADED, "SEV-ES: RAX at VMGEXIT.";
    0x118 vmgexit_cpl: u8 => set_vmgexit_cpl, u8, ALWAYS_LOADED, "SEV-ES: CPL at VMGEXIT.";
    0x119 reserved_119: [u8; 7];
    0x120 bus_lock_threshold: u16 => set_bus_lock_threshold, u16, ALWAYS_LOADED, "Bus locks that the guest may still take before one exits (15.14.5).";
    0x122 reserved_122: [u8; 0x12];
    0x134 update_irr: u32 => set_update_irr, u32, ALWAYS_LOADED, "Secure AVIC: bit 0 hands over the requested interrupts.";
    0x138 allowed_sev_features: u64 => set_allowed_sev_features, u64, ALWAYS_LOADED, "SEV features that the hypervisor allows; bit 63 enforces it.";
    0x140 guest_sev_features: u64 => set_guest_sev_features, u64, ALWAYS_LOADED, "SEV features that the guest runs with.";
    0x148 reserved_148: [u8; 8];
    0x150 requested_irr_0: u64 => set_requested_irr_0, u64, ALWAYS_LOADED, "Secure AVIC: requested vectors 0 to 63.";
    0x158 requested_irr_1: u64 => set_requested_irr_1, u64, ALWAYS_LOADED, "Secure AVIC: requested vectors 64 to 127.";
    0x160 requested_irr_2: u64 => set_requested_irr_2, u64, ALWAYS_LOADED, "Secure AVIC: requested vectors 128 to 191.";
    0x168 requested_irr_3: u64 => set_requested_irr_3, u64, ALWAYS_LOADED, "Secure AVIC: requested vectors 192 to 255.";
    0x170 reserved_170: [u8; 0x270];
    0x3E0 software: [u8; 0x20];

    // The state-save area (table B-2; fields that only SEV-ES has, table B-4).
    0x400 es: VmcbSegment;
    0x410 cs: VmcbSegment;
    0x420 ss: VmcbSegment;
    0x430 ds: VmcbSegment;
    0x440 fs: VmcbSegment;
    0x450 gs: VmcbSegment;
    0x460 gdtr: VmcbSegment;
    0x470 ldtr: VmcbSegment;
    0x480 idtr: VmcbSegment;
    0x490 tr: VmcbSegment;
    0x4A0 pl0_ssp: u64 => set_pl0_ssp, u64, ALWAYS_LOADED, "SEV-ES: shadow-stack pointer of ring 0.";
    0x4A8 pl1_ssp: u64 => set_pl1_ssp, u64, ALWAYS_LOADED, "SEV-ES: shadow-stack pointer of ring 1.";
    0x4B0 pl2_ssp: u64 => set_pl2_ssp, u64, ALWAYS_LOADED, "SEV-ES: shadow-stack pointer of ring 2.";
    0x4B8 pl3_ssp: u64 => set_pl3_ssp, u64, ALWAYS_LOADED, "SEV-ES: shadow-stack pointer of ring 3.";
    0x4C0 u_cet: u64 => set_u_cet, u64, ALWAYS_LOADED, "SEV-ES: user-mode CET.";
    0x4C8 reserved_4c8: [u8; 2];
    0x4CA vmpl: u8 => set_vmpl, u8, ALWAYS_LOADED, "SEV-SNP: the VM privilege level.";
    0x4CB cpl: u8 => set_cpl, u8, SEGMENTS, "CPL: what the processor runs at, whatever SS says.";
    0x4CC reserved_4cc: [u8; 4];
    0x4D0 efer: u64 => set_efer, u64, CONTROL_REGISTERS, "EFER. VMRUN demands SVME in it.";
    0x4D8 reserved_4d8: [u8; 8];
    0x4E0 perf_ctl0: u64 => set_perf_ctl0, u64, ALWAYS_LOADED, "PERF_CTL0, with PMC virtualization.";
    0x4E8 perf_ctr0: u64 => set_perf_ctr0, u64, ALWAYS_LOADED, "PERF_CTR0, with PMC virtualization.";
    0x4F0 perf_ctl1: u64 => set_perf_ctl1, u64, ALWAYS_LOADED, "PERF_CTL1, with PMC virtualization.";
    0x4F8 perf_ctr1: u64 => set_perf_ctr1, u64, ALWAYS_LOADED, "PERF_CTR1, with PMC virtualization.";
    0x500 perf_ctl2: u64 => set_perf_ctl2, u64, ALWAYS_LOADED, "PERF_CTL2, with PMC virtualization.";
    0x508 perf_ctr2: u64 => set_perf_ctr2, u64, ALWAYS_LOADED, "PERF_CTR2, with PMC virtualization.";
    0x510 perf_ctl3: u64 => set_perf_ctl3, u64, ALWAYS_LOADED, "PERF_CTL3, with PMC virtualization.";
    0x518 perf_ctr3: u64 => set_perf_ctr3, u64, ALWAYS_LOADED, "PERF_CTR3, with PMC virtualization.";
    0x520 perf_ctl4: u64 => set_perf_ctl4, u64, ALWAYS_LOADED, "PERF_CTL4, with PMC virtualization.";
    0x528 perf_ctr4: u64 => set_perf_ctr4, u64, ALWAYS_LOADED, "PERF_CTR4, with PMC virtualization.";
    0x530 perf_ctl5: u64 => set_perf_ctl5, u64, ALWAYS_LOADED, "PERF_CTL5, with PMC virtualization.";
    0x538 perf_ctr5: u64 => set_perf_ctr5, u64, ALWAYS_LOADED, "PERF_CTR5, with PMC virtualization.";
    0x540 xss: u64 => set_xss, u64, ALWAYS_LOADED, "SEV-ES: IA32_XSS.";
    0x548 cr4: u64 => set_cr4, u64, CONTROL_REGISTERS, "CR4.";
    0x550 cr3: u64 => set_cr3, u64, CONTROL_REGISTERS, "CR3.";
    0x558 cr0: u64 => set_cr0, u64, CONTROL_REGISTERS, "CR0.";
    0x560 dr7: u64 => set_dr7, u64, DEBUG_REGISTERS, "DR7.";
    0x568 dr6: u64 => set_dr6, u64, DEBUG_REGISTERS, "DR6.";
    0x570 rflags: u64 => set_rflags, u64, ALWAYS_LOADED, "RFLAGS.";
    0x578 rip: u64 => set_rip, u64, ALWAYS_LOADED, "RIP.";
    0x580 dr0: u64 => set_dr0, u64, ALWAYS_LOADED, "SEV-ES: DR0.";
    0x588 dr1: u64 => set_dr1, u64, ALWAYS_LOADED, "SEV-ES: DR1.";
    0x590 dr2: u64 => set_dr2, u64, ALWAYS_LOADED, "SEV-ES: DR2.";
    0x598 dr3: u64 => set_dr3, u64, ALWAYS_LOADED, "SEV-ES: DR3.";
    0x5A0 dr0_addr_mask: u64 => set_dr0_addr_mask, u64, ALWAYS_LOADED, "SEV-ES: address mask of DR0.";
    0x5A8 dr1_addr_mask: u64 => set_dr1_addr_mask, u64, ALWAYS_LOADED, "SEV-ES: address mask of DR1.";
    0x5B0 dr2_addr_mask: u64 => set_dr2_addr_mask, u64, ALWAYS_LOADED, "SEV-ES: address mask of DR2.";
    0x5B8 dr3_addr_mask: u64 => set_dr3_addr_mask, u64, ALWAYS_LOADED, "SEV-ES: address mask of DR3.";
    0x5C0 instr_retired_ctr: u64 => set_instr_retired_ctr, u64, ALWAYS_LOADED, "INSTR_RETIRED_CTR, with PMC virtualization.";
    0x5C8 perf_ctr_global_sts: u64 => set_perf_ctr_global_sts, u64, ALWAYS_LOADED, "PERF_CTR_GLOBAL_STS, with PMC virtualization.";
    0x5D0 perf_ctr_global_ctl: u64 => set_perf_ctr_global_ctl, u64, ALWAYS_LOADED, "PERF_CTR_GLOBAL_CTL, with PMC virtualization.";
    0x5D8 rsp: u64 => set_rsp, u64, ALWAYS_LOADED, "RSP.";
    0x5E0 s_cet: u64 => set_s_cet, u64, CET, "S_CET: supervisor-mode CET.";
    0x5E8 ssp: u64 => set_ssp, u64, CET, "SSP: the shadow-stack pointer.";
    0x5F0 isst_addr: u64 => set_isst_addr, u64, CET, "ISST_ADDR: the interrupt shadow-stack table.";
    0x5F8 rax: u64 => set_rax, u64, ALWAYS_LOADED, "RAX.";
    0x600 star: u64 => set_star, u64, ALWAYS_LOADED, "STAR, by VMLOAD.";
    0x608 lstar: u64 => set_lstar, u64, ALWAYS_LOADED, "LSTAR, by VMLOAD.";
    0x610 cstar: u64 => set_cstar, u64, ALWAYS_LOADED, "CSTAR, by VMLOAD.";
    0x618 sfmask: u64 => set_sfmask, u64, ALWAYS_LOADED, "SFMASK, by VMLOAD.";
    0x620 kernel_gs_base: u64 => set_kernel_gs_base, u64, ALWAYS_LOADED, "KernelGSBase, by VMLOAD.";
    0x628 sysenter_cs: u64 => set_sysenter_cs, u64, ALWAYS_LOADED, "SYSENTER_CS, by VMLOAD.";
    0x630 sysenter_esp: u64 => set_sysenter_esp, u64, ALWAYS_LOADED, "SYSENTER_ESP, by VMLOAD.";
    0x638 sysenter_eip: u64 => set_sysenter_eip, u64, ALWAYS_LOADED, "SYSENTER_EIP, by VMLOAD.";
    0x640 cr2: u64 => set_cr2, u64, CR2, "CR2.";
    0x648 reserved_648: [u8; 0x20];
    0x668 g_pat: u64 => set_g_pat, u64, NESTED_PAGING, "G_PAT: the guest's PAT, with nested paging.";
    0x670 dbg_ctl: u64 => set_dbg_ctl, u64, LBR, "DBGCTL, with LBR virtualization.";
    0x678 br_from: u64 => set_br_from, u64, LBR, "Last branch from, with LBR virtualization.";
    0x680 br_to: u64 => set_br_to, u64, LBR, "Last branch to, with LBR virtualization.";
    0x688 last_excp_from: u64 => set_last_excp_from, u64, LBR, "Last exception from, with LBR virtualization.";
    0x690 last_excp_to: u64 => set_last_excp_to, u64, LBR, "Last exception to, with LBR virtualization.";
    0x698 dbg_extn_ctl: u64 => set_dbg_extn_ctl, u64, LBR, "DBGEXTNCTL, with LBR-stack virtualization.";
    0x6A0 reserved_6a0: [u8; 0x40];
    0x6E0 spec_ctrl: u64 => set_spec_ctrl, u64, ALWAYS_LOADED, "SPEC_CTRL, where the processor virtualizes it.";
    0x6E8 pkru: u32 => set_pkru, u32, ALWAYS_LOADED, "SEV-ES: PKRU.";
    0x6EC tsc_aux: u32 => set_tsc_aux, u32, ALWAYS_LOADED, "SEV-ES: TSC_AUX.";
    0x6F0 guest_tsc_scale: u64 => set_guest_tsc_scale, u64, ALWAYS_LOADED, "SEV-SNP: the guest's TSC ratio.";
    0x6F8 guest_tsc_offset: u64 => set_guest_tsc_offset, u64, ALWAYS_LOADED, "SEV-SNP: the guest's TSC offset.";
    0x700 reg_prot_nonce: u64 => set_reg_prot_nonce, u64, ALWAYS_LOADED, "SEV-SNP: the nonce of register protection.";
    0x708 rcx: u64 => set_rcx, u64, ALWAYS_LOADED, "SEV-ES: RCX.";
    0x710 rdx: u64 => set_rdx, u64, ALWAYS_LOADED, "SEV-ES: RDX.";
    0x718 rbx: u64 => set_rbx, u64, ALWAYS_LOADED, "SEV-ES: RBX.";
    0x720 secure_avic_control: u64 => set_secure_avic_control, u64, ALWAYS_LOADED, "SEV-SNP: control of secure AVIC.";
    0x728 rbp: u64 => set_rbp, u64, ALWAYS_LOADED, "SEV-ES: RBP.";
    0x730 rsi: u64 => set_rsi, u64, ALWAYS_LOADED, "SEV-ES: RSI.";
    0x738 rdi: u64 => set_rdi, u64, ALWAYS_LOADED, "SEV-ES: RDI.";
    0x740 r8: u64 => set_r8, u64, ALWAYS_LOADED, "SEV-ES: R8.";
    0x748 r9: u64 => set_r9, u64, ALWAYS_LOADED, "SEV-ES: R9.";
    0x750 r10: u64 => set_r10, u64, ALWAYS_LOADED, "SEV-ES: R10.";
    0x758 r11: u64 => set_r11, u64, ALWAYS_LOADED, "SEV-ES: R11.";
    0x760 r12: u64 => set_r12, u64, ALWAYS_LOADED, "SEV-ES: R12.";
    0x768 r13: u64 => set_r13, u64, ALWAYS_LOADED, "SEV-ES: R13.";
    0x770 r14: u64 => set_r14, u64, ALWAYS_LOADED, "SEV-ES: R14.";
    0x778 r15: u64 => set_r15, u64, ALWAYS_LOADED, "SEV-ES: R15.";
    0x780 reserved_780: [u8; 0x10];
    0x790 guest_exit_info1: u64 => set_guest_exit_info1, u64, ALWAYS_LOADED, "SEV-SNP: EXITINFO1 as the guest sees it.";
    0x798 guest_exit_info2: u64 => set_guest_exit_info2, u64, ALWAYS_LOADED, "SEV-SNP: EXITINFO2 as the guest sees it.";
    0x7A0 guest_exit_int_info: u64 => set_guest_exit_int_info, RawEvent, ALWAYS_LOADED, "SEV-SNP: EXITINTINFO as the guest sees it.";
    0x7A8 guest_n_rip: u64 => set_guest_n_rip, u64, ALWAYS_LOADED, "SEV-SNP: nRIP as the guest sees it.";
    0x7B0 sev_features: u64 => set_sev_features, u64, ALWAYS_LOADED, "SEV-SNP: SEV_FEATURES.";
    0x7B8 vintr_ctrl: u64 => set_vintr_ctrl, VirtualInterrupts, ALWAYS_LOADED, "SEV-SNP: virtual interrupts under alternate injection.";
    0x7C0 guest_exit_code: u64 => set_guest_exit_code, u64, ALWAYS_LOADED, "SEV-SNP: EXITCODE as the guest sees it.";
    0x7C8 virtual_tom: u64 => set_virtual_tom, u64, ALWAYS_LOADED, "SEV-SNP: virtual top of memory.";
    0x7D0 tlb_id: u64 => set_tlb_id, u64, ALWAYS_LOADED, "SEV-SNP: the processor's TLB bookkeeping.";
    0x7D8 pcpu_id: u64 => set_pcpu_id, u64, ALWAYS_LOADED, "SEV-SNP: the processor's TLB bookkeeping.";
    0x7E0 guest_event_inj: u64 => set_guest_event_inj, RawEvent, ALWAYS_LOADED, "SEV-SNP: EVENTINJ under alternate injection.";
    0x7E8 xcr0: u64 => set_xcr0, u64, ALWAYS_LOADED, "SEV-ES: XCR0.";
    0x7F0 reserved_7f0: [u8; 0x10];
    0x800 x87_dp: u64 => set_x87_dp, u64, ALWAYS_LOADED, "SEV-ES: x87 data pointer.";
    0x808 mxcsr: u32 => set_mxcsr, u32, ALWAYS_LOADED, "SEV-ES: MXCSR.";
    0x80C x87_ftw: u16 => set_x87_ftw, u16, ALWAYS_LOADED, "SEV-ES: x87 tag word.";
    0x80E x87_fsw: u16 => set_x87_fsw, u16, ALWAYS_LOADED, "SEV-ES: x87 status word.";
    0x810 x87_fcw: u16 => set_x87_fcw, u16, ALWAYS_LOADED, "SEV-ES: x87 control word.";
    0x812 x87_fop: u16 => set_x87_fop, u16, ALWAYS_LOADED, "SEV-ES: x87 opcode.";
    0x814 x87_ds: u16 => set_x87_ds, u16, ALWAYS_LOADED, "SEV-ES: x87 data segment.";
    0x816 x87_cs: u16 => set_x87_cs, u16, ALWAYS_LOADED, "SEV-ES: x87 code segment.";
    0x818 x87_rip: u64 => set_x87_rip, u64, ALWAYS_LOADED, "SEV-ES: x87 instruction pointer.";
    0x820 fpreg_x87: [u8; 0x50];
    0x870 fpreg_xmm: [u8; 0x100];
    0x970 fpreg_ymm: [u8; 0x100];
    0xA70 lbr_stack: [u8; 0x100];
    0xB70 lbr_select: u64 => set_lbr_select, u64, LBR, "LBR_SELECT, with LBR-stack virtualization.";
    0xB78 ibs_fetch_ctl: u64 => set_ibs_fetch_ctl, u64, ALWAYS_LOADED, "IBS_FETCH_CTL, with IBS virtualization.";
    0xB80 ibs_fetch_linaddr: u64 => set_ibs_fetch_linaddr, u64, ALWAYS_LOADED, "IBS_FETCH_LINADDR, with IBS virtualization.";
    0xB88 ibs_op_ctl: u64 => set_ibs_op_ctl, u64, ALWAYS_LOADED, "IBS_OP_CTL, with IBS virtualization.";
    0xB90 ibs_op_rip: u64 => set_ibs_op_rip, u64, ALWAYS_LOADED, "IBS_OP_RIP, with IBS virtualization.";
    0xB98 ibs_op_data: u64 => set_ibs_op_data, u64, ALWAYS_LOADED, "IBS_OP_DATA, with IBS virtualization.";
    0xBA0 ibs_op_data2: u64 => set_ibs_op_data2, u64, ALWAYS_LOADED, "IBS_OP_DATA2, with IBS virtualization.";
    0xBA8 ibs_op_data3: u64 => set_ibs_op_data3, u64, ALWAYS_LOADED, "IBS_OP_DATA3, with IBS virtualization.";
    0xBB0 ibs_dc_linaddr: u64 => set_ibs_dc_linaddr, u64, ALWAYS_LOADED, "IBS_DC_LINADDR, with IBS virtualization.";
    0xBB8 bp_ibstgt_rip: u64 => set_bp_ibstgt_rip, u64, ALWAYS_LOADED, "BP_IBSTGT_RIP, with IBS virtualization.";
    0xBC0 ic_ibs_extd_ctl: u64 => set_ic_ibs_extd_ctl, u64, ALWAYS_LOADED, "IC_IBS_EXTD_CTL, with IBS virtualization.";
    0xBC8 reserved_bc8: [u8; 0x438];
}

impl Vmcb {
    /// Where the state-save area begins.
    pub const SAVE_AREA: u16 = 0x400;

    /// A VMCB of zeros: no intercepts, all of it dirty, not valid until it has an ASID, the VMRUN
    /// intercept and EFER.SVME.
    pub fn new() -> Self {
        Self::new_zeroed()
    }

    /// All six intercept words.
    #[inline]
    pub fn intercepts(&self) -> Intercepts {
        Intercepts {
            cr: self.intercept_cr(),
            dr: self.intercept_dr(),
            exceptions: self.intercept_exceptions(),
            misc1: self.intercept_misc1(),
            misc2: self.intercept_misc2(),
            misc3: self.intercept_misc3(),
        }
    }

    /// Sets all six intercept words.
    #[inline]
    pub fn set_intercepts(&mut self, intercepts: Intercepts) {
        self.set_intercept_cr(intercepts.cr);
        self.set_intercept_dr(intercepts.dr);
        self.set_intercept_exceptions(intercepts.exceptions);
        self.set_intercept_misc1(intercepts.misc1);
        self.set_intercept_misc2(intercepts.misc2);
        self.set_intercept_misc3(intercepts.misc3);
    }

    /// Says that nothing has changed since the processor last saw this VMCB: due after an exit.
    #[inline]
    pub fn mark_clean(&mut self) {
        self.clean = CleanBits::all().bits();
    }

    /// Says that these parts have changed, for changes that no setter sees: the contents of a
    /// permission map, another processor or another physical address (all bits).
    #[inline]
    pub fn mark_dirty(&mut self, parts: CleanBits) {
        self.clean &= !parts.bits();
    }

    /// The guest instruction bytes that the processor saved, if it did (decode assists, APM vol. 2,
    /// 15.8.4): after nested page faults and intercepted #PF.
    #[inline]
    pub fn instruction_bytes(&self) -> &[u8] {
        let count = usize::from(self.bytes_fetched & 0xF);
        &self.instruction_bytes[..count]
    }

    /// Sets the guest instruction bytes (at most fifteen), as an emulator of #VMEXIT does.
    pub fn set_instruction_bytes(&mut self, bytes: &[u8]) {
        let count = bytes.len().min(15);
        self.instruction_bytes = [0; 15];
        self.instruction_bytes[..count].copy_from_slice(&bytes[..count]);
        self.bytes_fetched = count as u8;
    }

    /// The 32 bytes at 3E0h that are reserved for software: the processor neither reads nor writes
    /// them.
    pub fn software(&self) -> &[u8; 32] {
        &self.software
    }

    /// The 32 bytes at 3E0h, to be changed.
    pub fn software_mut(&mut self) -> &mut [u8; 32] {
        &mut self.software
    }

    /// The value of a field of [`Self::FIELDS`], zero-extended.
    pub fn field(&self, field: &FieldInfo) -> u64 {
        let mut bytes = [0; 8];
        let (start, size) = (usize::from(field.offset), usize::from(field.size).min(8));
        bytes[..size].copy_from_slice(&self.as_bytes()[start..start + size]);
        u64::from_le_bytes(bytes)
    }

    /// Sets a field of [`Self::FIELDS`] to the low bytes of `value` and clears its clean bits.
    pub fn set_field(&mut self, field: &FieldInfo, value: u64) {
        let (start, size) = (usize::from(field.offset), usize::from(field.size).min(8));
        self.as_mut_bytes()[start..start + size].copy_from_slice(&value.to_le_bytes()[..size]);
        self.clean &= !field.clean.bits();
    }
}

impl Default for Vmcb {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Vmcb {
    /// Every field that is not zero, one a line, and the segments.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for field in Self::FIELDS {
            let value = self.field(field);
            if value != 0 {
                writeln!(f, "{:#05x} {:22} {value:#x}", field.offset, field.name)?;
            }
        }
        for (name, segment) in self.raw_segments() {
            if *segment != VmcbSegment::default() {
                writeln!(f, "{name:28} {segment:?}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
