//! The VMX instructions, one function each (SDM vol. 3C, chapter 33), and the few others that
//! entering a guest needs.
//!
//! CF and ZF, by which a VMX instruction reports failure, are captured or branched on in the same
//! assembly block as the instruction, so that no code the compiler places can lose them.

use core::arch::asm;

use testudo_arch::{Gpa, Gva, Hpa, Msr};

use crate::encoding::Encoding;
use crate::error::{InstructionError, VmFail};
use crate::fields;
use crate::group::FieldGroup;

/// CF and ZF as LAHF puts them into AH, seen in RAX.
const CF: u64 = 1 << 8;
const ZF: u64 = 1 << 14;

#[inline]
fn outcome(flags: u64) -> Result<(), VmFail> {
    if flags & (CF | ZF) == 0 {
        Ok(())
    } else {
        Err(failure(flags & CF != 0))
    }
}

/// The failure that CF or ZF stands for; the number of a VMfailValid is in the current VMCS.
#[cold]
pub(super) fn failure(invalid: bool) -> VmFail {
    if invalid {
        return VmFail::Invalid;
    }
    let number: u64;
    // SAFETY: a VMX instruction has just failed with ZF, so this is VMX root operation with a
    // current VMCS, whose VM-instruction error field exists on every processor.
    unsafe {
        asm!("vmread {}, {}", out(reg) number,
            in(reg) u64::from(fields::VM_INSTRUCTION_ERROR.encoding().0),
            options(nostack, readonly, pure));
    }
    VmFail::Valid(InstructionError::from_number(number as u32))
}

/// The failure of an instruction in VMX root operation of which only is known that CF or ZF was set: it is
/// "VMfailInvalid" where there is no current VMCS, and "VMfailValid" where there is one (33.2).
#[cold]
fn access_failure() -> VmFail {
    // SAFETY: a VMX instruction has just failed with a flag and no exception, so this is VMX root operation.
    failure(unsafe { vmptrst() }.is_none())
}

/// The statements for each number, a constant, up to the most fields of a group, as far as a condition holds.
/// (A loop would have to be unrolled, which compilers do as they like.)
macro_rules! in_turn {
    ($i:ident if $condition:expr => $body:block) => {
        in_turn! { $i if $condition => $body;
            0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31
            32 33 34 35 36 37 38 39 40 41 42 43 44 45 46 47 48 49 50 51 52 53 54 55 56 57 58 59 60 61 62 63
        }
    };
    ($i:ident if $condition:expr => $body:block; $($number:literal)*) => {$({
        const $i: usize = $number;
        if $condition $body
    })*};
}

macro_rules! with_pointer {
    ($($(#[$doc:meta])* $name:ident: $text:literal;)*) => {
        $(
            $(#[$doc])*
            #[inline]
            pub unsafe fn $name(region: Hpa) -> Result<(), VmFail> {
                // SAFETY: the operand is a live local; the rest is the caller's promise.
                unsafe {
                    asm!(concat!($text, " [{}]"), "jbe {}", in(reg) &region.0,
                        label { return Err(access_failure()); },
                        options(nostack));
                }
                Ok(())
            }
        )*
    };
}

/// VMXON: enters VMX root operation.
///
/// # Errors
///
/// The region does not suit, or the processor is in VMX operation already.
///
/// # Safety
///
/// CPL 0; CR4.VMXE is 1, CR0 and CR4 have the bits that VMX fixes, IA32_FEATURE_CONTROL is
/// locked with VMX on; the region starts with the revision identifier and belongs to the
/// processor until [`vmxoff`].
pub unsafe fn vmxon(region: Hpa) -> Result<(), VmFail> {
    let flags: u64;
    // SAFETY: the operand is a live local; the rest is the caller's promise.
    unsafe {
        asm!("vmxon [{}]", "lahf", in(reg) &region.0, out("rax") flags, options(nostack));
    }
    outcome(flags)
}

with_pointer! {
    /// VMCLEAR: writes a VMCS back to its region and makes it clear, inactive and not current.
    ///
    /// # Errors
    ///
    /// The address does not suit.
    ///
    /// # Safety
    ///
    /// VMX root operation; the region is memory for this use, and not active on another processor.
    vmclear: "vmclear";
    /// VMPTRLD: makes a VMCS current and active.
    ///
    /// # Errors
    ///
    /// The address or the revision identifier does not suit.
    ///
    /// # Safety
    ///
    /// VMX root operation; the region was cleared by [`vmclear`] once, is not active on another
    /// processor, and belongs to this one until it is cleared again.
    vmptrld: "vmptrld";
}

/// VMXOFF: leaves VMX operation.
///
/// # Errors
///
/// The dual-monitor treatment of SMIs is active.
///
/// # Safety
///
/// VMX root operation, and no VMCS that still matters is active on this processor.
#[inline]
pub unsafe fn vmxoff() -> Result<(), VmFail> {
    let flags: u64;
    // SAFETY: the caller's promise.
    unsafe { asm!("vmxoff", "lahf", out("rax") flags, options(nostack)) };
    outcome(flags)
}

/// VMPTRST: the address of the current VMCS, if there is one.
///
/// # Safety
///
/// VMX root operation.
#[inline]
pub unsafe fn vmptrst() -> Option<Hpa> {
    let mut address = u64::MAX;
    // SAFETY: the operand is a live local; VMX root operation, says the caller.
    unsafe { asm!("vmptrst [{}]", in(reg) &mut address, options(nostack)) };
    (address != u64::MAX).then_some(Hpa(address))
}

/// VMREAD of a field of the current VMCS.
///
/// # Errors
///
/// There is no current VMCS, or it has no such field.
///
/// # Safety
///
/// VMX root operation.
#[inline]
pub unsafe fn vmread(field: Encoding) -> Result<u64, VmFail> {
    let (value, flags): (u64, u64);
    // SAFETY: VMX root operation, says the caller; VMREAD changes the destination register only.
    unsafe {
        asm!("vmread {}, {}", "lahf", out(reg) value, in(reg) u64::from(field.0),
            out("rax") flags, options(nostack, readonly));
    }
    outcome(flags).map(|()| value)
}

/// VMWRITE to a field of the current VMCS.
///
/// # Errors
///
/// There is no current VMCS, it has no such field, or the field is read-only.
///
/// # Safety
///
/// VMX root operation, and the current VMCS is the caller's to change.
#[inline]
pub unsafe fn vmwrite(field: Encoding, value: u64) -> Result<(), VmFail> {
    // SAFETY: the caller's promise.
    unsafe {
        asm!("vmwrite {}, {}", "jbe {}", in(reg) u64::from(field.0), in(reg) value,
            label { return Err(access_failure()); },
            options(nostack));
    }
    Ok(())
}

/// VMREADs of a group of fields, of which the last stands for all.
///
/// # Errors
///
/// There is no current VMCS.
///
/// # Safety
///
/// VMX root operation.
#[inline(always)]
pub unsafe fn vmread_group<const N: usize>(group: &FieldGroup<N>) -> Result<[u64; N], VmFail> {
    let mut values = [0; N];
    // SAFETY: VMX root operation, says the caller; VMREAD changes the destination register only. What a failed
    // one leaves there is not used: then the last one fails too.
    unsafe {
        in_turn!(I if I + 1 < N => {
            asm!("vmread {}, {}", out(reg) values[I], in(reg) u64::from(group.encodings()[I].0),
                options(nostack, readonly));
        });
        values[N - 1] = vmread(group.encodings()[N - 1])?;
    }
    Ok(values)
}

/// VMWRITEs of a group of fields, of which the last stands for all.
///
/// # Errors
///
/// There is no current VMCS.
///
/// # Safety
///
/// VMX root operation, the current VMCS is the caller's to change, and the group
/// [is of guest state and controls](FieldGroup::is_guest_or_control).
#[inline(always)]
pub unsafe fn vmwrite_group<const N: usize>(
    group: &FieldGroup<N>,
    values: &[u64; N],
) -> Result<(), VmFail> {
    // SAFETY: the caller's promise; the operands are in the array.
    unsafe {
        in_turn!(I if I + 1 < N => {
            asm!("vmwrite {}, [{} + {}]", in(reg) u64::from(group.encodings()[I].0),
                in(reg) values, const 8 * I, options(nostack));
        });
        vmwrite(group.encodings()[N - 1], values[N - 1])
    }
}

/// What INVEPT invalidates (33.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InveptKind {
    /// The translations made with this EPT pointer.
    SingleContext {
        /// The EPT pointer.
        eptp: u64,
    },
    /// The translations made with any EPT pointer.
    AllContexts,
}

/// INVEPT: invalidates guest-physical and combined translations.
///
/// # Errors
///
/// The processor does not support the kind, or the EPT pointer is not valid.
///
/// # Safety
///
/// VMX root operation, on a processor with INVEPT.
#[inline]
pub unsafe fn invept(kind: InveptKind) -> Result<(), VmFail> {
    let (number, descriptor) = match kind {
        InveptKind::SingleContext { eptp } => (1u64, [eptp, 0]),
        InveptKind::AllContexts => (2, [0, 0]),
    };
    let flags: u64;
    // SAFETY: the descriptor is a live local of 128 bits; the rest is the caller's promise.
    // Dropping translations is always allowed.
    unsafe {
        asm!("invept {}, [{}]", "lahf", in(reg) number, in(reg) &descriptor,
            out("rax") flags, options(nostack));
    }
    outcome(flags)
}

/// What INVVPID invalidates (33.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InvvpidKind {
    /// The translations of one linear address with this VPID.
    Address {
        /// The VPID.
        vpid: u16,
        /// The linear address: canonical.
        address: Gva,
    },
    /// The translations with this VPID.
    SingleContext {
        /// The VPID.
        vpid: u16,
    },
    /// The translations with any VPID but 0.
    AllContexts,
    /// The translations with this VPID, except global ones.
    SingleContextRetainingGlobals {
        /// The VPID.
        vpid: u16,
    },
}

/// The operands of INVVPID: its type and its descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InvvpidOperands {
    number: u64,
    descriptor: [u64; 2],
}

impl From<InvvpidKind> for InvvpidOperands {
    #[inline]
    fn from(kind: InvvpidKind) -> Self {
        let (number, descriptor) = match kind {
            InvvpidKind::Address { vpid, address } => (0, [u64::from(vpid), address.0]),
            InvvpidKind::SingleContext { vpid } => (1, [u64::from(vpid), 0]),
            InvvpidKind::AllContexts => (2, [0, 0]),
            InvvpidKind::SingleContextRetainingGlobals { vpid } => (3, [u64::from(vpid), 0]),
        };
        Self { number, descriptor }
    }
}

/// INVVPID: invalidates linear and combined translations.
///
/// # Errors
///
/// The processor does not support the kind, the VPID is 0, or the address is not canonical.
///
/// # Safety
///
/// VMX root operation, on a processor with INVVPID.
#[inline]
pub unsafe fn invvpid(kind: InvvpidKind) -> Result<(), VmFail> {
    // SAFETY: the caller's promise.
    unsafe { invvpid_operands(&kind.into()) }
}

/// [`invvpid`] with operands that have been made before.
///
/// # Errors
///
/// As for [`invvpid`].
///
/// # Safety
///
/// As for [`invvpid`].
#[inline]
pub unsafe fn invvpid_operands(operands: &InvvpidOperands) -> Result<(), VmFail> {
    // SAFETY: as for INVEPT.
    unsafe {
        asm!("invvpid {}, [{}]", "jbe {}", in(reg) operands.number, in(reg) &operands.descriptor,
            label { return Err(access_failure()); },
            options(nostack));
    }
    Ok(())
}

/// VMFUNC with function 0, in a guest: makes entry `index` of the EPTP list the EPT pointer. A
/// function or index that the hypervisor did not enable exits.
///
/// # Safety
///
/// VMX non-root operation with VM functions enabled, and the code that runs next is mapped alike
/// by the new EPT pointer.
#[inline]
pub unsafe fn switch_eptp(index: u32) {
    // SAFETY: the caller's promise.
    unsafe { asm!("vmfunc", in("eax") 0, in("ecx") index, options(nostack)) };
}

/// VMCALL in a guest, with one number to and one from the hypervisor in RAX.
///
/// # Safety
///
/// VMX non-root operation, and the hypervisor's answer to this number changes nothing that the
/// program relies on, except through the address `argument` if the two agree so.
#[inline]
pub unsafe fn vmcall(number: u64, argument: Gpa) -> u64 {
    let answer;
    // SAFETY: the caller's promise.
    unsafe { asm!("vmcall", inout("rax") number => answer, in("rdi") argument.0) };
    answer
}

/// CLI.
///
/// # Safety
///
/// CPL 0.
#[inline]
pub unsafe fn cli() {
    // SAFETY: the caller's promise.
    unsafe { asm!("cli", options(nostack)) };
}

/// STI.
///
/// # Safety
///
/// CPL 0, and the host is ready for interrupts.
#[inline]
pub unsafe fn sti() {
    // SAFETY: the caller's promise.
    unsafe { asm!("sti", options(nostack)) };
}

/// Takes the interrupts that are pending: sets IF for one instruction.
///
/// # Safety
///
/// CPL 0, IF is 0, and the host is ready for interrupts.
#[inline]
pub(super) unsafe fn open_interrupt_window() {
    // SAFETY: the caller's promise; handlers keep all registers. STI lets interrupts in after the
    // NOP only.
    unsafe { asm!("sti", "nop", "cli") };
}

/// Waits for an interrupt and takes it.
///
/// # Safety
///
/// As for [`open_interrupt_window`].
#[inline]
pub(super) unsafe fn wait_for_interrupt() {
    // SAFETY: as above. STI lets no interrupt in before HLT, so none is lost between the two.
    unsafe { asm!("sti", "hlt", "cli") };
}

/// Calls the host's handler for NMIs.
///
/// # Safety
///
/// CPL 0, and the host's IDT is in place.
#[inline]
pub(super) unsafe fn deliver_nmi() {
    // SAFETY: the caller's promise; handlers keep all registers.
    unsafe { asm!("int 2") };
}

/// Calls the host's handler for machine checks.
///
/// # Safety
///
/// As for [`deliver_nmi`].
#[inline]
pub(super) unsafe fn deliver_machine_check() {
    // SAFETY: as above.
    unsafe { asm!("int 18") };
}

/// Whether RFLAGS.IF is set.
#[inline]
pub fn interrupts_enabled() -> bool {
    let flags: u64;
    // SAFETY: reads the flags through the stack, which the compiler knows of.
    unsafe { asm!("pushfq", "pop {}", out(reg) flags, options(preserves_flags)) };
    flags & (1 << 9) != 0
}

/// IBPB: branch targets trained before it are not used after it. Due between two guests that must
/// not influence one another, and between a guest hypervisor and its guest.
///
/// # Safety
///
/// CPL 0, and CPUID.(7,0):EDX bit 26 (IBRS and IBPB) is set.
#[inline]
pub unsafe fn ibpb() {
    // SAFETY: IA32_PRED_CMD exists, says the caller.
    unsafe { wrmsr(Msr::PRED_CMD, 1) };
}

/// Writes back and invalidates the first-level data cache, so that a guest cannot read from it by
/// speculation past a page-table entry that is not present (L1TF).
///
/// # Safety
///
/// CPL 0, and CPUID.(7,0):EDX bit 28 (L1D_FLUSH) is set.
#[inline]
pub unsafe fn flush_l1d() {
    // SAFETY: IA32_FLUSH_CMD exists, says the caller.
    unsafe { wrmsr(Msr::FLUSH_CMD, 1) };
}

/// RDMSR.
///
/// # Safety
///
/// CPL 0, and the register exists and can be read.
#[inline]
pub(super) unsafe fn rdmsr(msr: Msr) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: the caller's promise.
    unsafe {
        asm!("rdmsr", in("ecx") msr.0, out("eax") low, out("edx") high,
            options(nostack, preserves_flags));
    }
    u64::from(high) << 32 | u64::from(low)
}

/// WRMSR.
///
/// # Safety
///
/// CPL 0, the register exists and takes this value, and what changes suits the code that runs next.
#[inline]
pub(super) unsafe fn wrmsr(msr: Msr, value: u64) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!("wrmsr", in("ecx") msr.0, in("eax") value as u32, in("edx") (value >> 32) as u32,
            options(nostack, preserves_flags));
    }
}

macro_rules! registers {
    ($($(#[$doc:meta])* $read:ident: $text:literal;)*) => {
        $(
            $(#[$doc])*
            #[inline]
            pub(super) unsafe fn $read() -> u64 {
                let value: u64;
                // SAFETY: CPL 0, says the caller; reading changes nothing.
                unsafe { asm!($text, out(reg) value, options(nostack, preserves_flags)) };
                value
            }
        )*
    };
}

registers! {
    /// CR0.
    ///
    /// # Safety
    ///
    /// CPL 0.
    cr0: "mov {}, cr0";
    /// CR3.
    ///
    /// # Safety
    ///
    /// CPL 0.
    cr3: "mov {}, cr3";
    /// CR4.
    ///
    /// # Safety
    ///
    /// CPL 0.
    cr4: "mov {}, cr4";
    /// DR6.
    ///
    /// # Safety
    ///
    /// CPL 0, and DR7.GD is clear.
    dr6: "mov {}, dr6";
}

/// Writes DR6.
///
/// # Safety
///
/// CPL 0, DR7.GD is clear, and bits 63:32 of the value are 0.
#[inline]
pub(super) unsafe fn set_dr6(value: u64) {
    // SAFETY: the caller's promise.
    unsafe { asm!("mov dr6, {}", in(reg) value, options(nostack, preserves_flags)) };
}

/// Writes CR4.
///
/// # Safety
///
/// CPL 0, and the value suits the processor and the code that runs next.
#[inline]
pub(super) unsafe fn set_cr4(value: u64) {
    // SAFETY: the caller's promise.
    unsafe { asm!("mov cr4, {}", in(reg) value, options(nostack, preserves_flags)) };
}
