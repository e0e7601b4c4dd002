//! Whose an exit of L2 is: L1's, if L1 asked for it or no control decides, and L0's otherwise
//! (SDM vol. 3C, 28.1 and 28.2).

use testudo_arch::{Gpa, Gprs, GuestMemory, Msr};
use testudo_vmx::controls::{ExceptionBitmap, PinControls, PrimaryControls, SecondaryControls};
use testudo_vmx::event::{EventType, InterruptionInformation};
use testudo_vmx::exit::{BasicReason, CrAccess, IoAccess};
use testudo_vmx::image::VmcsImage;
use testudo_vmx::{AccessError, VmcsRead, fields};

use super::join::L1Controls;

/// Who handles an exit of L2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// L0 handles it.
    L0,
    /// L1 sees it.
    L1,
    /// An EPT violation or misconfiguration under L1's own EPT: the composition decides.
    SecondStage,
}

/// What routing looks at: the exit, and the registers that it names.
#[derive(Clone, Copy, Debug)]
pub struct ExitDetails<'a> {
    /// The basic exit reason.
    pub reason: BasicReason,
    /// The exit qualification.
    pub qualification: u64,
    /// The VM-exit interruption information.
    pub interruption: InterruptionInformation,
    /// The VM-exit interruption error code.
    pub error_code: u32,
    /// L2's general registers, RSP among them.
    pub gprs: &'a Gprs,
}

/// The exits of L2 that L0 itself asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct L0Windows {
    /// The interrupt window.
    pub interrupt: bool,
    /// The NMI window.
    pub nmi: bool,
    /// The preemption timer, before L1's expires.
    pub timer: bool,
}

/// Whose this exit of L2 is. `vmcs12` is L0's copy of L1's VMCS.
///
/// # Errors
///
/// Never for a `vmcs12` of this crate: it has every field.
pub fn route<M: GuestMemory>(
    exit: &ExitDetails<'_>,
    vmcs12: &VmcsImage,
    l0_windows: L0Windows,
    memory: &M,
) -> Result<Route, AccessError> {
    use BasicReason as R;
    use PrimaryControls as P;
    use SecondaryControls as S;
    // Read where they decide: most exits need one word of them at most.
    let primary = |control| L1Controls::has_primary(vmcs12, control);
    let secondary = |control| L1Controls::has_secondary(vmcs12, control);
    let wanted = match exit.reason {
        R::ExceptionOrNmi => is_event_wanted(vmcs12, exit.interruption, exit.error_code)?,
        // The host's events. Whether L1's own interrupt controller has something for L1 is asked
        // before each entry.
        R::ExternalInterrupt | R::Init | R::Sipi | R::IoSmi | R::OtherSmi => false,
        R::EntryMachineCheck => false,
        // No control decides about these (28.1.2).
        R::TripleFault
        | R::TaskSwitch
        | R::Cpuid
        | R::Getsec
        | R::Invd
        | R::Xsetbv
        | R::Rsm
        | R::Vmcall
        | R::Vmclear
        | R::Vmlaunch
        | R::Vmptrld
        | R::Vmptrst
        | R::Vmread
        | R::Vmresume
        | R::Vmwrite
        | R::Vmxoff
        | R::Vmxon
        | R::Invept
        | R::Invvpid
        | R::Vmfunc => true,
        // The checks let the state pass and the processor did not: L1's state is at fault.
        R::InvalidGuestState | R::MsrLoading => true,
        R::InterruptWindow => !l0_windows.interrupt && primary(P::INTERRUPT_WINDOW_EXITING)?,
        R::NmiWindow => !l0_windows.nmi && primary(P::NMI_WINDOW_EXITING)?,
        R::Hlt => primary(P::HLT_EXITING)?,
        R::Invlpg => primary(P::INVLPG_EXITING)?,
        R::Rdpmc => primary(P::RDPMC_EXITING)?,
        R::Rdtsc | R::Rdtscp => primary(P::RDTSC_EXITING)?,
        R::ControlRegister => control_register_wanted(exit, vmcs12)?,
        R::DebugRegister => primary(P::MOV_DR_EXITING)?,
        R::Io => port_wanted(exit, vmcs12, memory)?,
        R::Rdmsr => msr_wanted(exit, vmcs12, memory, false)?,
        R::Wrmsr => msr_wanted(exit, vmcs12, memory, true)?,
        R::Mwait => primary(P::MWAIT_EXITING)?,
        R::MonitorTrapFlag => primary(P::MONITOR_TRAP_FLAG)?,
        R::Monitor => primary(P::MONITOR_EXITING)?,
        R::Pause => primary(P::PAUSE_EXITING)?,
        R::GdtrIdtr | R::LdtrTr => secondary(S::DESCRIPTOR_TABLE_EXITING)?,
        // Without an EPT of its own it cannot have asked.
        R::EptViolation | R::EptMisconfiguration => {
            if secondary(S::ENABLE_EPT)? {
                return Ok(Route::SecondStage);
            }
            false
        }
        R::PreemptionTimer => {
            let pin = PinControls::from_bits_retain(vmcs12.get(fields::PIN_CONTROLS)?);
            !l0_windows.timer && pin.contains(PinControls::ACTIVATE_PREEMPTION_TIMER)
        }
        R::TprBelowThreshold => primary(P::USE_TPR_SHADOW)?,
        R::ApicAccess => secondary(S::VIRTUALIZE_APIC_ACCESSES)?,
        R::VirtualizedEoi => {
            secondary(S::VIRTUAL_INTERRUPT_DELIVERY)? && eoi_wanted(exit.qualification, vmcs12)?
        }
        R::ApicWrite => {
            secondary(S::APIC_REGISTER_VIRTUALIZATION)? || secondary(S::VIRTUAL_INTERRUPT_DELIVERY)?
        }
        R::Wbinvd => secondary(S::WBINVD_EXITING)?,
        R::Rdrand => secondary(S::RDRAND_EXITING)?,
        R::Rdseed => secondary(S::RDSEED_EXITING)?,
        R::Invpcid => secondary(S::ENABLE_INVPCID)? && primary(P::INVLPG_EXITING)?,
        // L0's own EPT, its page-modification log, features that L1 is not offered, and what future
        // processors bring: L1 cannot have asked.
        _ => false,
    };
    Ok(if wanted { Route::L1 } else { Route::L0 })
}

/// The EOI-exit bitmap: the exit's qualification has the vector (30.2.1).
fn eoi_wanted(vector: u64, vmcs12: &VmcsImage) -> Result<bool, AccessError> {
    let words = [
        fields::EOI_EXIT_BITMAP_0,
        fields::EOI_EXIT_BITMAP_1,
        fields::EOI_EXIT_BITMAP_2,
        fields::EOI_EXIT_BITMAP_3,
    ];
    let vector = vector as u8;
    Ok(vmcs12.get(words[usize::from(vector >> 6)])? & (1 << (vector & 63)) != 0)
}

/// Whether L1 wants an exception or NMI with this interruption information.
pub(super) fn is_event_wanted(
    vmcs12: &VmcsImage,
    interruption: InterruptionInformation,
    error_code: u32,
) -> Result<bool, AccessError> {
    let vector = interruption.vector();
    // An NMI or a machine check is the host's.
    if interruption.event_type() == EventType::Nmi || vector == 18 {
        return Ok(false);
    }
    is_exception_wanted(vmcs12, vector, error_code)
}

/// The exception bitmap, and for page faults the mask and the match of error codes (28.2).
pub(super) fn is_exception_wanted(
    vmcs12: &VmcsImage,
    vector: u8,
    error_code: u32,
) -> Result<bool, AccessError> {
    let bitmap = ExceptionBitmap::from_bits_retain(vmcs12.get(fields::EXCEPTION_BITMAP)?);
    let mask = vmcs12.get(fields::PAGE_FAULT_ERROR_CODE_MASK)?;
    let matching = vmcs12.get(fields::PAGE_FAULT_ERROR_CODE_MATCH)?;
    Ok(bitmap.exits(vector, error_code, mask, matching))
}

/// Guest/host masks, CR3 targets and the CR8 controls (28.1.3).
fn control_register_wanted(
    exit: &ExitDetails<'_>,
    vmcs12: &VmcsImage,
) -> Result<bool, AccessError> {
    let differs = |value: u64, mask, shadow| -> Result<bool, AccessError> {
        Ok((value ^ vmcs12.get(shadow)?) & vmcs12.get(mask)? != 0)
    };
    let primary = |control| L1Controls::has_primary(vmcs12, control);
    match CrAccess::from_qualification(exit.qualification) {
        CrAccess::MovTo { register, source } => {
            let value = exit.gprs[source];
            match register {
                0 => differs(value, fields::CR0_GUEST_HOST_MASK, fields::CR0_READ_SHADOW),
                3 => {
                    Ok(primary(PrimaryControls::CR3_LOAD_EXITING)?
                        && !is_cr3_target(value, vmcs12)?)
                }
                4 => differs(value, fields::CR4_GUEST_HOST_MASK, fields::CR4_READ_SHADOW),
                8 => primary(PrimaryControls::CR8_LOAD_EXITING),
                _ => Ok(false),
            }
        }
        CrAccess::MovFrom { register, .. } => match register {
            3 => primary(PrimaryControls::CR3_STORE_EXITING),
            8 => primary(PrimaryControls::CR8_STORE_EXITING),
            _ => Ok(false),
        },
        // "if the bits in position 3 (TS) are set in both the CR0 guest/host mask and the read shadow"
        CrAccess::Clts => {
            let mask = vmcs12.get(fields::CR0_GUEST_HOST_MASK)?;
            Ok(mask & vmcs12.get(fields::CR0_READ_SHADOW)? & 8 != 0)
        }
        // "For bit 0, only if the mask's and the source's are set and the shadow's is clear; for bits
        // 3:1 if the mask's is set and source and shadow differ."
        CrAccess::Lmsw { source, .. } => {
            let mask = vmcs12.get(fields::CR0_GUEST_HOST_MASK)?;
            let shadow = vmcs12.get(fields::CR0_READ_SHADOW)?;
            let source = u64::from(source);
            let sets_pe = mask & source & !shadow & 1 != 0;
            Ok(sets_pe || mask & (source ^ shadow) & 0xE != 0)
        }
    }
}

fn is_cr3_target(value: u64, vmcs12: &VmcsImage) -> Result<bool, AccessError> {
    let count = vmcs12.get(fields::CR3_TARGET_COUNT)?.min(4) as usize;
    let targets = [
        fields::CR3_TARGET_VALUE_0,
        fields::CR3_TARGET_VALUE_1,
        fields::CR3_TARGET_VALUE_2,
        fields::CR3_TARGET_VALUE_3,
    ];
    for target in &targets[..count] {
        if vmcs12.get(*target)? == value {
            return Ok(true);
        }
    }
    Ok(false)
}

/// "Use I/O bitmaps" overrides "unconditional I/O exiting"; an access that wraps around the last port
/// always exits (28.1.3).
fn port_wanted<M: GuestMemory>(
    exit: &ExitDetails<'_>,
    vmcs12: &VmcsImage,
    memory: &M,
) -> Result<bool, AccessError> {
    if !L1Controls::has_primary(vmcs12, PrimaryControls::USE_IO_BITMAPS)? {
        return L1Controls::has_primary(vmcs12, PrimaryControls::UNCONDITIONAL_IO_EXITING);
    }
    let access = IoAccess::from_qualification(exit.qualification);
    let bitmaps = [
        vmcs12.get(fields::IO_BITMAP_A)?,
        vmcs12.get(fields::IO_BITMAP_B)?,
    ];
    for offset in 0..u32::from(access.size) {
        let port = u32::from(access.port) + offset;
        if port > 0xFFFF {
            return Ok(true);
        }
        let page = bitmaps[(port >> 15) as usize];
        let at = Gpa(page).wrapping_add(u64::from(port & 0x7FFF) / 8);
        if bit(memory, at, port % 8) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Four bitmaps of a kilobyte: reads of low, reads of high, writes of low, writes of high MSRs
/// (27.6.9). MSRs outside them always exit.
fn msr_wanted<M: GuestMemory>(
    exit: &ExitDetails<'_>,
    vmcs12: &VmcsImage,
    memory: &M,
    write: bool,
) -> Result<bool, AccessError> {
    if !L1Controls::has_primary(vmcs12, PrimaryControls::USE_MSR_BITMAPS)? {
        return Ok(true);
    }
    let Msr(msr) = Msr(exit.gprs.rcx as u32);
    let (base, index) = match msr {
        0..=0x1FFF => (0, msr),
        0xC000_0000..=0xC000_1FFF => (0x400, msr & 0x1FFF),
        _ => return Ok(true),
    };
    let base = base + if write { 0x800 } else { 0 };
    let page = Gpa(vmcs12.get(fields::MSR_BITMAPS)?);
    let at = page.wrapping_add(base + u64::from(index) / 8);
    Ok(bit(memory, at, index % 8))
}

/// A bit of a bitmap of L1's. What is not memory reads as ones.
fn bit(memory: &impl GuestMemory, at: Gpa, bit: u32) -> bool {
    let mut byte = [0xFF];
    memory.read(at, &mut byte).is_err() || byte[0] & (1 << bit) != 0
}
