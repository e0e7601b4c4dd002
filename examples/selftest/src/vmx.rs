//! Cases on the VMX instructions and how they fail (SDM vol. 3C, chapter 33): the same on a processor
//! and on what a hypervisor makes of one for a guest that is a hypervisor itself.
#![allow(unsafe_code)]

use alloc::format;
use alloc::string::ToString;
use core::arch::asm;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, Ordering};

use testudo_arch::{Hpa, Msr};
use testudo_rt::irq::{self, TrapFrame};
use testudo_rt::{memory, msr};
use testudo_vmx::caps::EptVpidCaps as C;
use testudo_vmx::check::samples;
use testudo_vmx::encoding::{Area, Encoding};
use testudo_vmx::hw::{RegionFrame, VmcsKind, Vmx};
use testudo_vmx::{RegionError, VmFail, VmxCaps, fields};

use crate::case::{Case, Outcome, check, check_eq};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "vmx::outside_vmx_operation",
        run: |_| within(false, outside),
    },
    Case {
        name: "vmx::vmxon",
        run: |_| within(false, vmxon),
    },
    Case {
        name: "vmx::errors_in_words",
        run: |_| within(false, errors_in_words),
    },
    Case {
        name: "vmx::without_a_vmcs",
        run: |_| within(true, without_a_vmcs),
    },
    Case {
        name: "vmx::with_a_vmcs",
        run: |_| within(true, with_a_vmcs),
    },
    Case {
        name: "vmx::entries_that_fail",
        run: |_| within(true, entries_that_fail),
    },
    Case {
        name: "vmx::invalidations",
        run: |_| within(true, invalidations),
    },
    Case {
        name: "vmx::operands_fault",
        run: |_| within(true, operands_fault),
    },
    Case {
        name: "vmx::registers_are_held",
        run: |_| within(true, registers_are_held),
    },
];

/// How an instruction ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Succeed,
    FailInvalid,
    /// VMfailValid, with the number in the current VMCS.
    Fail(u64),
    Fault {
        vector: u8,
        code: u64,
    },
}

use End::{Fail, FailInvalid, Succeed};

const UD: End = End::Fault { vector: 6, code: 0 };
const GP: End = End::Fault {
    vector: 13,
    code: 0,
};

const CR4_VMXE: u64 = 1 << 13;
const CR0_NE: u64 = 1 << 5;
/// Canonical, and nothing is there.
const UNMAPPED: u64 = 0x6000_0000_0000;
const NOT_CANONICAL: u64 = 1 << 63;

/// The fault that the last attempt met: vector plus one, and the error code above it.
static FAULT: AtomicU64 = AtomicU64::new(0);

/// An attempt that faults goes on where R11 says.
fn note(frame: &mut TrapFrame) {
    FAULT.store(
        frame.error_code << 8 | (frame.vector + 1),
        Ordering::Relaxed,
    );
    frame.rip = frame.r11;
}

const CF: u64 = 1;
const ZF: u64 = 1 << 6;

/// Executes one instruction; its operands follow as those of `asm!`.
macro_rules! attempt {
    ($text:literal $(, $($operands:tt)*)?) => {{
        FAULT.store(0, Ordering::Relaxed);
        let flags: u64;
        // SAFETY: the instruction does what the case is about, on frames of the case's own; one that
        // faults does nothing, and goes on behind itself by `note`.
        unsafe {
            asm!("lea r11, [rip + 3f]", $text, "3:", "pushfq", "pop {flags}",
                $($($operands)*,)? flags = out(reg) flags, out("r11") _);
        }
        end(flags)
    }};
}

fn end(flags: u64) -> End {
    match (FAULT.load(Ordering::Relaxed), flags & (CF | ZF)) {
        (0, 0) => Succeed,
        (0, CF) => FailInvalid,
        (0, _) => Fail(vmread(fields::VM_INSTRUCTION_ERROR.encoding()).1),
        (fault, _) => End::Fault {
            vector: fault as u8 - 1,
            code: fault >> 8,
        },
    }
}

fn vmxon_at(region: u64) -> End {
    attempt!("vmxon [{}]", in(reg) &region)
}

fn vmxoff() -> End {
    attempt!("vmxoff")
}

fn vmclear(region: u64) -> End {
    attempt!("vmclear [{}]", in(reg) &region)
}

fn vmptrld(region: u64) -> End {
    attempt!("vmptrld [{}]", in(reg) &region)
}

fn vmptrst() -> (End, u64) {
    let mut pointer = 0_u64;
    let end = attempt!("vmptrst [{}]", in(reg) &mut pointer);
    (end, pointer)
}

fn vmread(field: Encoding) -> (End, u64) {
    let mut value = 0_u64;
    let end = attempt!("vmread {}, {}", inout(reg) value, in(reg) u64::from(field.0));
    (end, value)
}

fn vmwrite(field: Encoding, value: u64) -> End {
    attempt!("vmwrite {}, {}", in(reg) u64::from(field.0), in(reg) value)
}

fn invept(kind: u64, descriptor: [u64; 2]) -> End {
    attempt!("invept {}, [{}]", in(reg) kind, in(reg) &descriptor)
}

fn invvpid(kind: u64, descriptor: [u64; 2]) -> End {
    attempt!("invvpid {}, [{}]", in(reg) kind, in(reg) &descriptor)
}

fn cr0() -> u64 {
    let value;
    // SAFETY: reading changes nothing.
    unsafe { asm!("mov {}, cr0", out(reg) value, options(nomem, nostack)) };
    value
}

fn set_cr0(value: u64) -> End {
    attempt!("mov cr0, {}", in(reg) value)
}

fn cr4() -> u64 {
    let value;
    // SAFETY: reading changes nothing.
    unsafe { asm!("mov {}, cr4", out(reg) value, options(nomem, nostack)) };
    value
}

fn set_cr4(value: u64) -> End {
    attempt!("mov cr4, {}", in(reg) value)
}

/// What a case works with: the VMXON region and two more.
struct Regions {
    caps: VmxCaps,
    on: u64,
    one: u64,
    other: u64,
}

impl Regions {
    /// What comes of an INVEPT that ends like this where there is the instruction.
    fn of_invept(&self, end: End) -> End {
        if self.caps.ept_vpid.contains(C::INVEPT) {
            end
        } else {
            UD
        }
    }

    fn new(caps: VmxCaps) -> Option<Self> {
        let revision = caps.basic.revision();
        let region = || {
            let frame = memory::alloc_frame()?;
            // SAFETY: the frame is this case's own, mapped where it is.
            unsafe { (frame as *mut u32).write_volatile(revision) };
            Some(frame)
        };
        Some(Self {
            on: region()?,
            one: region()?,
            other: region()?,
            caps,
        })
    }

    /// The first address that the processor does not have.
    fn beyond(&self) -> u64 {
        1 << self.caps.processor.physical_address_bits
    }

    /// The first region is a current VMCS, with every field of a valid one.
    fn load_valid(&self) -> End {
        let (cleared, loaded) = (vmclear(self.one), vmptrld(self.one));
        if (cleared, loaded) != (Succeed, Succeed) {
            return loaded;
        }
        for (field, value) in samples::valid(&self.caps).iter() {
            let exists = field.info().is_some_and(|info| info.exists(&self.caps));
            if exists && field.area() != Area::ExitInformation {
                let end = vmwrite(field, value);
                if end != Succeed {
                    return end;
                }
            }
        }
        Succeed
    }
}

/// Runs a case with faults noted, in VMX operation or outside it, and leaves no trace.
fn within(operation: bool, case: fn(&Regions) -> Outcome) -> Outcome {
    // SAFETY: CPL 0.
    let Ok(caps) = (unsafe { Vmx::capabilities() }) else {
        return Outcome::Skipped("the processor has no VMX");
    };
    let Some(regions) = Regions::new(caps) else {
        return Outcome::Failed("no memory".into());
    };
    for vector in [6, 13, 14] {
        irq::set_handler(vector, note);
    }
    let old = (cr0(), cr4());
    let (ready, on) = if operation {
        (set_cr4(old.1 | CR4_VMXE), vmxon_at(regions.on))
    } else {
        (Succeed, Succeed)
    };
    let outcome = if (ready, on) == (Succeed, Succeed) {
        case(&regions)
    } else {
        Outcome::Failed(format!(
            "VMX operation cannot be entered: {ready:?}, {on:?}"
        ))
    };
    vmclear(regions.one);
    vmclear(regions.other);
    vmxoff();
    set_cr4(old.1);
    set_cr0(old.0);
    for vector in [6, 13, 14] {
        irq::clear_handler(vector);
    }
    for frame in [regions.on, regions.one, regions.other] {
        // SAFETY: VMX operation is over, so the processor has let go of the frames.
        unsafe { memory::release(frame, 4096) };
    }
    outcome
}

/// All but VMXON are #UD, with CR4.VMXE and without.
fn outside(regions: &Regions) -> Outcome {
    for vmxe in [0, CR4_VMXE] {
        check_eq!(set_cr4(cr4() & !CR4_VMXE | vmxe), Succeed);
        check_eq!(vmclear(regions.one), UD);
        check_eq!(vmptrld(regions.one), UD);
        check_eq!(vmptrst().0, UD);
        check_eq!(vmread(fields::GUEST_RIP.encoding()).0, UD);
        check_eq!(vmwrite(fields::GUEST_RIP.encoding(), 0), UD);
        check_eq!(attempt!("vmlaunch"), UD);
        check_eq!(attempt!("vmresume"), UD);
        check_eq!(vmxoff(), UD);
        check_eq!(invept(2, [0; 2]), UD);
        check_eq!(invvpid(2, [0; 2]), UD);
    }
    check_eq!(set_cr4(cr4() & !CR4_VMXE), Succeed);
    check_eq!(vmxon_at(regions.on), UD);
    Outcome::Passed
}

/// 33.3, VMXON; and the MSRs that say whether it may.
fn vmxon(regions: &Regions) -> Outcome {
    let (control, basic) = (Msr::FEATURE_CONTROL, Msr::VMX_BASIC);
    // SAFETY: a processor with VMX has the register.
    let locked_on = unsafe { msr::read(control.0) };
    check!(locked_on & 5 == 5, "{locked_on:#x}");
    // Locked, and read-only.
    for msr in [control, basic] {
        check_eq!(
            attempt!("wrmsr", in("ecx") msr.0, in("eax") 5, in("edx") 0),
            GP
        );
    }

    check_eq!(set_cr4(cr4() | CR4_VMXE), Succeed);
    check_eq!(set_cr0(cr0() & !CR0_NE), Succeed);
    check_eq!(vmxon_at(regions.on), GP);
    check_eq!(set_cr0(cr0() | CR0_NE), Succeed);
    for bad in [regions.on + 8, regions.beyond()] {
        check_eq!(vmxon_at(bad), FailInvalid);
    }
    // SAFETY: the frame is this case's own.
    unsafe { (regions.other as *mut u32).write_volatile(!0) };
    check_eq!(vmxon_at(regions.other), FailInvalid);
    check_eq!(vmxoff(), UD);
    check_eq!(vmxon_at(regions.on), Succeed);
    check_eq!(vmxon_at(regions.on), FailInvalid);
    check_eq!(vmxoff(), Succeed);
    check_eq!(vmxoff(), UD);
    Outcome::Passed
}

/// What the types of VMX operation say when the processor does not take what it is given.
fn errors_in_words(regions: &Regions) -> Outcome {
    let frame = |at: u64| {
        let pointer = NonNull::new(at as *mut u8).unwrap_or(NonNull::dangling());
        // SAFETY: the frames are the case's own, mapped where they are, and used here alone.
        unsafe { RegionFrame::new(pointer, Hpa(at)) }
    };
    let revision = regions.caps.basic.revision();
    // SAFETY: CPL 0, and this is the processor with these capabilities.
    let enabled = unsafe { Vmx::enable(&regions.caps, frame(regions.on)) };
    let Ok(mut vmx) = enabled else {
        return Outcome::Failed(format!("{enabled:?}"));
    };
    // SAFETY: as above.
    let twice = unsafe { Vmx::enable(&regions.caps, frame(regions.other)) };
    let said = twice.err().map(|error| error.to_string());
    let cr4 = format!("CR4.VMXE is already set (CR4 = {:#x})", cr4());
    check_eq!(said, Some(cr4));

    let created = vmx.create_vmcs(frame(regions.one), VmcsKind::Ordinary);
    let Ok(mut vmcs) = created else {
        return Outcome::Failed(format!("{created:?}"));
    };
    // SAFETY: the frame is this case's own, and its first word software's.
    unsafe { (regions.one as *mut u32).write_volatile(revision ^ 1) };
    let wrong = vmx.load(&mut vmcs).err();
    // SAFETY: as above.
    unsafe { (regions.one as *mut u32).write_volatile(revision) };
    // There is no current VMCS to hold the number of the error.
    let expected = RegionError {
        instruction: "VMPTRLD",
        region: Hpa(regions.one),
        found: revision ^ 1,
        revision,
        fail: VmFail::Invalid,
    };
    check_eq!(wrong, Some(expected));
    check!(vmx.load(&mut vmcs).is_ok(), "with its own revision");
    check!(vmx.clear(vmcs).is_ok(), "to the end");
    // SAFETY: the only VMCS is clear.
    check!(unsafe { vmx.disable() }.is_ok(), "to the end");
    Outcome::Passed
}

/// "VMfail(n): IF VMCS pointer is valid THEN VMfailValid(n) ELSE VMfailInvalid" (33.2).
fn without_a_vmcs(regions: &Regions) -> Outcome {
    check_eq!(vmptrst(), (Succeed, u64::MAX));
    check_eq!(vmread(fields::GUEST_RIP.encoding()).0, FailInvalid);
    check_eq!(vmwrite(fields::GUEST_RIP.encoding(), 1), FailInvalid);
    check_eq!(attempt!("vmlaunch"), FailInvalid);
    check_eq!(attempt!("vmresume"), FailInvalid);
    check_eq!(vmclear(regions.one + 1), FailInvalid);
    check_eq!(vmclear(regions.on), FailInvalid);
    check_eq!(vmptrld(regions.beyond()), FailInvalid);
    check_eq!(vmptrld(regions.on), FailInvalid);
    check_eq!(vmxon_at(regions.one), FailInvalid);
    check_eq!(invept(7, [0; 2]), regions.of_invept(FailInvalid));
    check_eq!(vmptrst(), (Succeed, u64::MAX));
    Outcome::Passed
}

/// The numbers of table 33-1, and that a VMCS keeps what was written.
fn with_a_vmcs(regions: &Regions) -> Outcome {
    check_eq!(vmclear(regions.one), Succeed);
    check_eq!(vmptrld(regions.one), Succeed);
    check_eq!(vmptrst(), (Succeed, regions.one));
    for bad in [regions.other + 4, regions.beyond()] {
        check_eq!(vmclear(bad), Fail(2));
        check_eq!(vmptrld(bad), Fail(9));
    }
    check_eq!(vmclear(regions.on), Fail(3));
    check_eq!(vmptrld(regions.on), Fail(10));
    // SAFETY: the frame is this case's own, and no VMCS yet.
    let revision = unsafe {
        let at = regions.other as *mut u32;
        let revision = at.read_volatile();
        at.write_volatile(revision ^ 1);
        revision
    };
    check_eq!(vmptrld(regions.other), Fail(11));
    // SAFETY: as above.
    unsafe { (regions.other as *mut u32).write_volatile(revision) };
    check_eq!(vmxon_at(regions.other), Fail(15));

    let unsupported = Encoding(0x6C3E);
    check_eq!(vmread(unsupported).0, Fail(12));
    check_eq!(vmwrite(unsupported, 0), Fail(12));
    let read_only = vmwrite(fields::EXIT_REASON.encoding(), 0);
    let any = regions.caps.misc.vmwrite_any_field();
    check_eq!(read_only, if any { Succeed } else { Fail(13) });

    // Fields of all widths, of which some may be in a shadow VMCS.
    let values = [
        (fields::GUEST_ES_SELECTOR.encoding(), 0x12345),
        (fields::GUEST_CS_ACCESS_RIGHTS.encoding(), 0x1_2345_6789),
        (fields::GUEST_RIP.encoding(), 0x1234_5678_9ABC_DEF0),
        (fields::TSC_OFFSET.encoding(), 0x1234_5678_9ABC_DEF0),
        (fields::HOST_FS_BASE.encoding(), 0x1234_5678),
    ];
    for (field, value) in values {
        check_eq!(vmwrite(field, value), Succeed);
    }
    check_eq!(vmclear(regions.other), Succeed);
    check_eq!(vmptrld(regions.other), Succeed);
    for (field, _) in values {
        check_eq!(vmwrite(field, 0), Succeed);
    }
    check_eq!(vmptrld(regions.one), Succeed);
    let kept = values.map(|(field, _)| vmread(field).1);
    let expected = [
        0x2345,
        0x2345_6789,
        0x1234_5678_9ABC_DEF0,
        0x1234_5678_9ABC_DEF0,
        0x1234_5678,
    ];
    check_eq!(kept, expected);
    let high = Encoding(fields::TSC_OFFSET.encoding().0 | 1);
    check_eq!(vmread(high).1, 0x1234_5678);
    check_eq!(vmwrite(high, 0xFF), Succeed);
    check_eq!(vmread(fields::TSC_OFFSET.encoding()).1, 0xFF_9ABC_DEF0);

    check_eq!(vmclear(regions.one), Succeed);
    check_eq!(vmptrst(), (Succeed, u64::MAX));
    Outcome::Passed
}

/// What VMLAUNCH and VMRESUME check before anything is loaded, in that order.
fn entries_that_fail(regions: &Regions) -> Outcome {
    check_eq!(regions.load_valid(), Succeed);
    check_eq!(attempt!("vmresume"), Fail(5));
    check_eq!(
        attempt!("mov {0:e}, ss; mov ss, {0:e}; vmlaunch", out(reg) _),
        Fail(26)
    );
    let host_cr0 = vmread(fields::HOST_CR0.encoding()).1;
    check_eq!(vmwrite(fields::HOST_CR0.encoding(), 0), Succeed);
    check_eq!(attempt!("vmlaunch"), Fail(8));
    check_eq!(vmwrite(fields::PIN_CONTROLS.encoding(), 0), Succeed);
    check_eq!(attempt!("vmlaunch"), Fail(7));
    check_eq!(vmwrite(fields::HOST_CR0.encoding(), host_cr0), Succeed);
    check_eq!(attempt!("vmlaunch"), Fail(7));
    check_eq!(
        vmread(fields::VM_INSTRUCTION_ERROR.encoding()),
        (Succeed, 7)
    );
    Outcome::Passed
}

/// INVEPT and INVVPID check their types and descriptors.
fn invalidations(regions: &Regions) -> Outcome {
    let caps = regions.caps.ept_vpid;
    if !caps.contains(C::INVVPID | C::INVVPID_ALL | C::INVVPID_ADDRESS)
        || caps.contains(C::INVEPT) && !caps.contains(C::INVEPT_ALL)
    {
        return Outcome::Skipped("the processor lacks some of them");
    }
    check_eq!(regions.load_valid(), Succeed);
    check_eq!(invept(2, [0; 2]), regions.of_invept(Succeed));
    for kind in [0, 3] {
        check_eq!(invept(kind, [0; 2]), regions.of_invept(Fail(28)));
    }
    check_eq!(invept(1, [1, 0]), regions.of_invept(Fail(28)));
    check_eq!(invvpid(2, [0; 2]), Succeed);
    check_eq!(invvpid(0, [5, 0x1000]), Succeed);
    check_eq!(invvpid(4, [0; 2]), Fail(28));
    check_eq!(invvpid(0, [0, 0]), Fail(28));
    check_eq!(invvpid(0, [5, NOT_CANONICAL]), Fail(28));
    check_eq!(invvpid(0, [1 << 16 | 5, 0]), Fail(28));
    Outcome::Passed
}

/// Memory operands fault as any other.
fn operands_fault(regions: &Regions) -> Outcome {
    check_eq!(vmclear(regions.one), Succeed);
    check_eq!(vmptrld(regions.one), Succeed);
    let fault = |code| End::Fault { vector: 14, code };
    for (address, read, written) in [(UNMAPPED, fault(0), fault(2)), (NOT_CANONICAL, GP, GP)] {
        check_eq!(attempt!("vmclear [{}]", in(reg) address), read);
        check_eq!(attempt!("vmptrld [{}]", in(reg) address), read);
        check_eq!(attempt!("vmptrst [{}]", in(reg) address), written);
        check_eq!(
            attempt!("invept {}, [{}]", in(reg) 2_u64, in(reg) address),
            regions.of_invept(read)
        );
        let rip = u64::from(fields::GUEST_CS_BASE.encoding().0);
        check_eq!(
            attempt!("vmread [{}], {}", in(reg) address, in(reg) rip),
            written
        );
        check_eq!(
            attempt!("vmwrite {}, [{}]", in(reg) rip, in(reg) address),
            read
        );
    }
    check_eq!(vmptrst(), (Succeed, regions.one));
    Outcome::Passed
}

/// In VMX operation CR0 and CR4 keep what it fixes (26.8).
fn registers_are_held(_: &Regions) -> Outcome {
    check_eq!(set_cr4(cr4() & !CR4_VMXE), GP);
    check_eq!(set_cr0(cr0() & !CR0_NE), GP);
    check!(cr4() & CR4_VMXE != 0 && cr0() & CR0_NE != 0);
    check_eq!(vmxoff(), Succeed);
    check_eq!(set_cr4(cr4() & !CR4_VMXE), Succeed);
    Outcome::Passed
}
