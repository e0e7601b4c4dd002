//! A guest that tries to get at the hypervisor that it runs under: by its addresses, by registers, by
//! messages to other processors, and through a guest of its own.
//!
//! It is a kernel like any other to `bluepill`, which starts it with two processors. Each attempt prints
//! how it ended, and the status is how many succeeded.
#![no_std]
#![no_main]
#![allow(unsafe_code, reason = "a bare-metal program")]

extern crate alloc;

mod inner;

use alloc::vec::Vec;
use core::arch::asm;
use core::arch::x86_64::__cpuid_count;
use core::ops::Range;
use core::sync::atomic::{AtomicU64, Ordering};

use spin::Once;
use testudo_arch::Msr;
use testudo_rt::{self as rt, Boot, MemoryKind, cpu, msr, port, println, time};

rt::entry!(main);

/// Where the hypervisor's signature is.
const SIGNATURE: u32 = 0x4000_7000;
/// Where its image is linked, and the first word of what GRUB looks for at its beginning.
const IMAGE: u64 = 0x20_0000;
const MULTIBOOT2: u32 = 0xE852_50D6;

pub(crate) const APIC: u64 = 0xFEE0_0000;
pub(crate) const ICR_LOW: u64 = 0x300;
pub(crate) const ICR_HIGH: u64 = 0x310;
/// INIT, asserted.
pub(crate) const INIT: u32 = 5 << 8 | 1 << 14;
/// Start-up, at the page where the runtime starts processors.
const STARTUP: u32 = 6 << 8 | 1 << 14 | 8;

/// CR4: VMX, and SMX.
pub(crate) const VMXE: u64 = 1 << 13;
const SMXE: u64 = 1 << 14;

static BOOT: Once<&'static Boot> = Once::new();
/// What the other processor does as long as it runs.
static BEATS: AtomicU64 = AtomicU64::new(0);

type Attempt = fn(&[Range<u64>]) -> Result<(), &'static str>;

const ATTEMPTS: [(&str, Attempt); 10] = [
    ("sees_the_signature", sees_the_signature),
    ("reads_its_memory", reads_its_memory),
    ("writes_its_memory", writes_its_memory),
    ("moves_what_decides_over_addresses", moves_addresses),
    ("has_the_machine_sleep", has_the_machine_sleep),
    ("names_its_memory_in_instructions", inner::names_its_memory),
    (
        "runs_a_guest_that_writes_its_memory",
        inner::writes_its_memory,
    ),
    ("resets_a_processor", resets_a_processor),
    (
        "resets_a_processor_in_vmx_operation",
        inner::resets_in_vmx_operation,
    ),
    ("resets_a_processor_from_a_guest", inner::resets_a_processor),
];

fn main(boot: &'static Boot) -> u8 {
    BOOT.call_once(|| boot);
    let secret = reserved(boot);
    if cpu::start_all(|_| beat()).is_err() {
        println!("adversary: the other processor does not start");
        return 1;
    }
    let mut failures = 0;
    for (name, attempt) in ATTEMPTS {
        match attempt(&secret) {
            Ok(()) => println!("adversary {name} ... ok"),
            Err(why) => {
                println!("adversary {name} ... FAILED: {why}");
                failures += 1;
            }
        }
    }
    failures
}

/// What of the first GiB is neither memory nor the firmware's: the hypervisor's.
fn reserved(boot: &Boot) -> Vec<Range<u64>> {
    let ranges = boot.memory_map().iter();
    ranges
        .filter(|range| range.kind == MemoryKind::Reserved)
        .map(|range| range.start..range.start + range.len)
        .filter(|range| range.start >= 1 << 20 && range.end <= 1 << 26)
        .collect()
}

fn beat() {
    loop {
        BEATS.fetch_add(1, Ordering::Relaxed);
        inner::follow_wish();
        core::hint::spin_loop();
    }
}

/// Whether the other processor runs.
pub(crate) fn beats() -> bool {
    let before = BEATS.load(Ordering::Relaxed);
    let deadline = time::now_ns() + 300_000_000;
    while time::now_ns() < deadline {
        if BEATS.load(Ordering::Relaxed) != before {
            return true;
        }
        core::hint::spin_loop();
    }
    false
}

pub(crate) fn check(holds: bool, why: &'static str) -> Result<(), &'static str> {
    if holds { Ok(()) } else { Err(why) }
}

/// How often the hypervisor has come in: it lives if it counts.
pub(crate) fn lives() -> bool {
    let cpuids = || __cpuid_count(SIGNATURE, 2).eax;
    let before = cpuids();
    cpuids() > before
}

fn sees_the_signature(secret: &[Range<u64>]) -> Result<(), &'static str> {
    let name = __cpuid_count(SIGNATURE, 0);
    let words = [name.ebx, name.ecx, name.edx].map(u32::to_le_bytes);
    check(
        words.as_flattened() == b"Testudo pill",
        "the leaf has no signature",
    )?;
    let own = __cpuid_count(SIGNATURE, 1);
    check(own.eax == 2, "it has not taken both processors")?;
    let bytes: u64 = secret.iter().map(|range| range.end - range.start).sum();
    check(
        bytes == u64::from(own.ebx) << 10,
        "what is reserved is not what it keeps",
    )?;
    check(
        secret.iter().any(|range| range.contains(&IMAGE)),
        "its image is not reserved",
    )
}

pub(crate) fn read(address: u64) -> u64 {
    // SAFETY: the addresses are mapped, and nothing of this program is there.
    unsafe { (address as *const u64).read_volatile() }
}

fn write(address: u64, value: u64) {
    // SAFETY: as for `read`.
    unsafe { (address as *mut u64).write_volatile(value) };
}

fn reads_its_memory(secret: &[Range<u64>]) -> Result<(), &'static str> {
    let header = (IMAGE..IMAGE + 0x8000).step_by(8);
    let found = header.map(read).any(|word| word as u32 == MULTIBOOT2);
    check(!found, "its code can be read")?;
    // All its pages are one.
    let first = secret.first().ok_or("nothing is reserved")?.start;
    let mut pages = secret.iter().flat_map(|range| range.clone().step_by(4096));
    check(
        pages.all(|page| (0..512).all(|word| read(page + word * 8) == read(first + word * 8))),
        "its pages differ",
    )
}

fn writes_its_memory(secret: &[Range<u64>]) -> Result<(), &'static str> {
    for page in secret.iter().flat_map(|range| range.clone().step_by(4096)) {
        for word in 0..512 {
            write(page + word * 8, 0xFEED_FACE_DEAD_BEEF);
        }
    }
    check(lives(), "it is gone")
}

/// Writes an MSR and says whether it has the value then.
fn takes(msr: u32, value: u64) -> bool {
    // SAFETY: a hypervisor that lets one of these through is what this program is to find.
    unsafe { msr::try_write(msr, value) && msr::try_read(msr) == Some(value) }
}

fn moves_addresses(_: &[Range<u64>]) -> Result<(), &'static str> {
    const AMDS: [u32; 6] = [
        0xC001_0010, // SYSCFG
        0xC001_001A, // TOP_MEM
        0xC001_001D, // TOP_MEM2
        0xC001_0058, // the window of PCI configuration space
        0xC001_0111, // SMM_BASE
        0xC001_0113, // SMM_MASK
    ];
    const INTELS: [u32; 6] = [
        0x9B,  // IA32_SMM_MONITOR_CTL
        0x1F2, // IA32_SMRR_PHYSBASE
        0x982, // IA32_TME_ACTIVATE
        0x3A,  // IA32_FEATURE_CONTROL
        0x480, // IA32_VMX_BASIC
        0x48C, // IA32_VMX_EPT_VPID_CAP
    ];
    for msr in if has_vmx() { INTELS } else { AMDS } {
        check(
            !takes(msr, 0x20_0000),
            "a register of the firmware's can be written",
        )?;
    }
    let base = msr::try_read(Msr::APIC_BASE.0).ok_or("there is no local APIC")?;
    check(
        !takes(Msr::APIC_BASE.0, base & 0xFFF | IMAGE),
        "the local APIC can be moved over it",
    )?;
    if has_vmx() {
        check(cr4() & VMXE == 0, "CR4 shows the hypervisor's VMX")?;
        check(!try_set_cr4(cr4() | SMXE), "CR4.SMXE can be set")?;
        check(!survives_vmxoff(), "VMXOFF runs outside VMX operation")?;
    } else {
        check(msr::try_read(0xC001_0118).is_none(), "SVM_KEY can be read")?;
        let efer = msr::try_read(Msr::EFER.0).ok_or("there is no EFER")?;
        check(efer & 1 << 12 == 0, "EFER shows the hypervisor's SVM")?;
        // VMRUN with SVM off.
        check(!survives_vmrun(0x1000), "VMRUN runs with EFER.SVME clear")?;
    }
    check(lives(), "it is gone")
}

/// Whether the processor has VMX rather than SVM.
pub(crate) fn has_vmx() -> bool {
    __cpuid_count(1, 0).ecx & 1 << 5 != 0
}

/// CR4.
pub(crate) fn cr4() -> u64 {
    let cr4: u64;
    // SAFETY: CPL 0.
    unsafe { asm!("mov {}, cr4", out(reg) cr4, options(nomem, nostack, preserves_flags)) };
    cr4
}

/// Writes CR4; whether it took the value.
pub(crate) fn try_set_cr4(value: u64) -> bool {
    let mut faulted = 0_u32;
    // SAFETY: the callers change bits that no memory access depends on; a fault continues at label 3.
    unsafe {
        asm!(
            "2: mov cr4, {value}",
            "jmp 4f",
            "3: mov {faulted:e}, 1",
            "4:",
            ".pushsection .rt_fixups, \"a\"",
            ".quad 2b, 3b",
            ".popsection",
            faulted = inout(reg) faulted,
            value = in(reg) value,
            options(nostack),
        );
    }
    faulted == 0 && cr4() == value
}

/// Whether VMXOFF raises no exception.
fn survives_vmxoff() -> bool {
    let mut faulted = 0_u32;
    // SAFETY: as above; a success is what is to be found.
    unsafe {
        asm!(
            "2: vmxoff",
            "jmp 4f",
            "3: mov {faulted:e}, 1",
            "4:",
            ".pushsection .rt_fixups, \"a\"",
            ".quad 2b, 3b",
            ".popsection",
            faulted = inout(reg) faulted,
            options(nostack),
        );
    }
    faulted == 0
}

/// Sleep that ends without a hypervisor. Where it begins, this attempt never ends.
fn has_the_machine_sleep(_: &[Range<u64>]) -> Result<(), &'static str> {
    let boot = BOOT.get().ok_or("nothing is known of the machine")?;
    let tables = rt::acpi::Tables::of(boot);
    let fadt = tables.table(b"FACP").ok_or("there is no FADT")?;
    let block = fadt.get(64..).and_then(|bytes| bytes.first_chunk());
    let control = block.map_or(0, |block| u32::from_le_bytes(*block) as u16);
    check(control != 0, "there is no control block")?;
    // SLP_EN with each type but that of soft off, which is 0 on QEMU.
    for kind in 1..8_u16 {
        let value = 1 << 13 | kind << 10;
        // SAFETY: the registers of power management touch no memory.
        unsafe {
            port::write_u16(control, value);
            port::write_u8(control + 1, (value >> 8) as u8);
            port::write_u32(control, u32::from(value));
        }
    }
    check(lives(), "it is gone")
}

/// Whether VMRUN of an address raises no exception.
pub(crate) fn survives_vmrun(address: u64) -> bool {
    let mut faulted = 0_u32;
    // SAFETY: a fault continues at label 3; the addresses are such that no guest runs.
    unsafe {
        asm!(
            "2: vmrun rax",
            "jmp 4f",
            "3: mov {faulted:e}, 1",
            "4:",
            ".pushsection .rt_fixups, \"a\"",
            ".quad 2b, 3b",
            ".popsection",
            faulted = inout(reg) faulted,
            inout("rax") address => _,
            options(nostack),
        );
    }
    faulted == 0
}

fn resets_a_processor(_: &[Range<u64>]) -> Result<(), &'static str> {
    check(beats(), "the other processor does not run")?;
    send_init();
    check(!beats(), "INIT has no effect")?;
    check(lives(), "it is gone")?;
    start_again()
}

/// Sends INIT to the other processor.
pub(crate) fn send_init() {
    command(INIT);
}

/// Starts the other processor after INIT: the runtime's start code is where it was when it started that
/// processor before.
pub(crate) fn start_again() -> Result<(), &'static str> {
    command(STARTUP);
    check(beats(), "the other processor does not start again")
}

/// Sends a message to the other processor.
fn command(low: u32) {
    let number = cpu::apic_id(1);
    // SAFETY: the page is the local APIC's, and the other processor stops or starts at the runtime's code.
    unsafe {
        ((APIC + ICR_HIGH) as *mut u32).write_volatile(number << 24);
        ((APIC + ICR_LOW) as *mut u32).write_volatile(low);
    }
}
