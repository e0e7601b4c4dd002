//! Hyper-V's interface, as far as a guest hypervisor needs it to use enlightened VMCSs (Hyper-V
//! Top-Level Functional Specification, "Feature and Interface Discovery" and "Nested Virtualization"):
//! the CPUID leaves, and the MSRs that they announce. No hypercall does anything, and there are no synthetic
//! clocks, timers or interrupts.
//!
//! The MSR of the VP assist page is not here: what the page says concerns the backend alone.

use core::sync::atomic::{AtomicU64, Ordering};

use testudo_arch::cpuid::{Cpuid, CpuidEntry};
use testudo_arch::{Gpa, GuestMemory, Msr};

use super::cpuid::interface;
use crate::irq::{ApicMode, Lapic};

/// The last leaf: nested features.
const LAST: u32 = 0x4000_000A;
const SIGNATURE: [u8; 12] = *b"Microsoft Hv";
/// "Hv#1": the interface that the specification describes.
const INTERFACE: u32 = u32::from_le_bytes(*b"Hv#1");

/// Leaf 0x4000_0003, EAX: AccessIntrCtrlRegs, AccessHypercallRegs, AccessVpIndex.
const PRIVILEGES: u32 = 1 << 4 | 1 << 5 | 1 << 6;
/// Leaf 0x4000_0004, EAX: enlightened VMCSs are recommended.
const RECOMMENDATIONS: u32 = 1 << 14;
/// Leaf 0x4000_0004, EBX: no number of attempts at a spinlock is worth a hypercall.
const NEVER_NOTIFY: u32 = u32::MAX;
/// Leaf 0x4000_000A, EAX: the lowest and the highest version of the enlightened VMCS.
const VMCS_VERSIONS: u32 = 1 | 1 << 8;

const GUEST_OS_ID: Msr = Msr(0x4000_0000);
const HYPERCALL: Msr = Msr(0x4000_0001);
const VP_INDEX: Msr = Msr(0x4000_0002);
const EOI: Msr = Msr(0x4000_0070);
const ICR: Msr = Msr(0x4000_0071);
const TPR: Msr = Msr(0x4000_0072);

/// HYPERCALL: the page is there; the register can no longer be written.
const ENABLE: u64 = 1;
const LOCKED: u64 = 2;
const PAGE: u64 = !0xFFF;
/// What the page holds: VMCALL, RET.
const CODE: [u8; 4] = [0x0F, 0x01, 0xC1, 0xC3];

/// What RAX says of a hypercall: HV_STATUS_INVALID_HYPERCALL_CODE.
pub const INVALID_HYPERCALL_CODE: u64 = 2;

/// Puts the interface into a guest's CPUID table.
pub(super) fn announce(guest: &mut Cpuid, vcpus: u32) {
    guest.set(interface(0x4000_0000, LAST, SIGNATURE));
    let leaf = |leaf, eax, ebx| CpuidEntry {
        leaf,
        eax,
        ebx,
        ..CpuidEntry::default()
    };
    guest.set(leaf(0x4000_0001, INTERFACE, 0));
    guest.set(leaf(0x4000_0003, PRIVILEGES, 0));
    guest.set(leaf(0x4000_0004, RECOMMENDATIONS, NEVER_NOTIFY));
    guest.set(leaf(0x4000_0005, vcpus, vcpus));
    guest.set(leaf(LAST, VMCS_VERSIONS, 0));
}

/// What the vCPUs of a machine share of the interface.
#[derive(Debug, Default)]
pub struct HyperV {
    guest_os: AtomicU64,
    hypercall: AtomicU64,
}

impl HyperV {
    /// Whether the guest has a hypercall page, and so a VMCALL means Hyper-V.
    pub fn has_hypercalls(&self) -> bool {
        self.hypercall.load(Ordering::Relaxed) & ENABLE != 0
    }

    /// RDMSR by the vCPU with this index; `None` is #GP(0).
    pub fn read(&self, msr: Msr, index: usize, lapic: &mut Lapic) -> Option<u64> {
        match msr {
            GUEST_OS_ID => Some(self.guest_os.load(Ordering::Relaxed)),
            HYPERCALL => Some(self.hypercall.load(Ordering::Relaxed)),
            VP_INDEX => Some(index as u64),
            ICR | TPR => read_apic(msr, lapic),
            _ => None,
        }
    }

    /// WRMSR; `false` is #GP(0).
    pub fn write(
        &self,
        msr: Msr,
        value: u64,
        memory: &impl GuestMemory,
        lapic: &mut Lapic,
    ) -> bool {
        match msr {
            GUEST_OS_ID => {
                self.guest_os.store(value, Ordering::Relaxed);
                // "If the guest OS ID is cleared, the hypercall page becomes disabled."
                if value == 0 {
                    self.hypercall.fetch_and(!ENABLE, Ordering::Relaxed);
                }
                true
            }
            HYPERCALL => self.write_hypercall(value, memory),
            EOI | ICR | TPR => write_apic(msr, value, lapic),
            _ => false,
        }
    }

    fn write_hypercall(&self, value: u64, memory: &impl GuestMemory) -> bool {
        let locked = self.hypercall.load(Ordering::Relaxed) & LOCKED != 0;
        let identified = self.guest_os.load(Ordering::Relaxed) != 0;
        if locked {
            return true;
        }
        // A guest that has not said what it is gets no page.
        let value = if identified { value } else { value & !ENABLE };
        if value & ENABLE != 0 && memory.write(Gpa(value & PAGE), &CODE).is_err() {
            return false;
        }
        self.hypercall.store(value, Ordering::Relaxed);
        true
    }
}

/// The register of a local APIC that one of the MSRs stands for.
fn apic_register(msr: Msr) -> u16 {
    match msr {
        EOI => 0xB0,
        ICR => 0x300,
        _ => 0x80,
    }
}

/// The same register in x2APIC mode.
fn x2apic_msr(register: u16) -> Msr {
    Msr(0x800 + u32::from(register >> 4))
}

fn read_apic(msr: Msr, lapic: &mut Lapic) -> Option<u64> {
    let register = apic_register(msr);
    match lapic.mode() {
        ApicMode::X2Apic => lapic.read_msr(x2apic_msr(register)).ok(),
        ApicMode::XApic => {
            let mut half = |register: u16| {
                let mut bytes = [0; 4];
                lapic.read_mmio(register.into(), &mut bytes);
                u64::from(u32::from_le_bytes(bytes))
            };
            let high = if msr == ICR { half(register + 0x10) } else { 0 };
            Some(high << 32 | half(register))
        }
        ApicMode::Disabled => None,
    }
}

fn write_apic(msr: Msr, value: u64, lapic: &mut Lapic) -> bool {
    let register = apic_register(msr);
    match lapic.mode() {
        ApicMode::X2Apic => {
            let value = if msr == EOI { 0 } else { value };
            lapic.write_msr(x2apic_msr(register), value, || 0).is_ok()
        }
        ApicMode::XApic => {
            let mut half = |register: u16, value: u64| {
                lapic.write_mmio(register.into(), &(value as u32).to_le_bytes());
            };
            if msr == ICR {
                half(register + 0x10, value >> 32);
            }
            half(register, value);
            true
        }
        ApicMode::Disabled => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::irq::fake::machine;
    use crate::policy::cpuid::{CpuidConfig, CpuidState, CpuidTable, for_guest};
    use std::vec;
    use testudo_arch::memory::GuestRam;

    #[allow(unsafe_code, reason = "memory for a test")]
    fn ram() -> GuestRam {
        let words: &mut [u64] = vec![0; 0x400].leak();
        let mut ram = GuestRam::new();
        // SAFETY: the words live for ever and nothing else uses them.
        unsafe { ram.add(Gpa(0), words.as_mut_ptr().cast(), 0x2000, true) }.unwrap();
        ram
    }

    #[test]
    fn leaves_announce_enlightened_vmcss_first_and_our_own_name_after() {
        let processor = Cpuid::read_from(|leaf, _| match leaf {
            0 => [0xD, 0, 0, 0],
            0x8000_0000 => [0x8000_0008, 0, 0, 0],
            _ => [0; 4],
        });
        let config = CpuidConfig {
            arch_capabilities: false,
            vcpus: 2,
            nested: true,
            hyperv: true,
        };
        let table = CpuidTable::new(&for_guest(&processor, config));
        let query = |leaf| table.query(leaf, 0, &CpuidState::default());
        let [last, ebx, ecx, edx] = query(0x4000_0000);
        let name: vec::Vec<u8> = [ebx, ecx, edx]
            .iter()
            .flat_map(|r| r.to_le_bytes())
            .collect();
        assert_eq!((last, &*name), (0x4000_000A, &SIGNATURE[..]));
        assert_eq!(query(0x4000_0001)[0].to_le_bytes(), *b"Hv#1");
        assert_eq!(query(0x4000_0003)[0] & 0x60, 0x60);
        assert_ne!(query(0x4000_0004)[0] & 1 << 14, 0);
        assert_eq!(query(0x4000_0005)[0], 2);
        assert_eq!(query(0x4000_000A)[0], 0x101);
        assert_eq!(query(0x4000_0100)[1].to_le_bytes(), *b"Test");
        assert_eq!(query(0x4000_0101), [0; 4]);
    }

    #[test]
    fn the_hypercall_page_comes_with_an_identified_guest_and_goes_with_it() {
        let (hyperv, ram) = (HyperV::default(), ram());
        let mut lapic = machine(1).2.remove(0);
        let mut write = |msr, value| hyperv.write(msr, value, &ram, &mut lapic);
        let page = || ram.load_u32(Gpa(0x1000)).unwrap().to_le_bytes();
        assert!(write(HYPERCALL, 0x1001));
        assert!(!hyperv.has_hypercalls() && page() == [0; 4]);
        assert!(write(GUEST_OS_ID, 7));
        assert!(!write(HYPERCALL, 0x8000_0001), "no memory there");
        assert!(!hyperv.has_hypercalls());
        assert!(write(HYPERCALL, 0x1001));
        assert!(hyperv.has_hypercalls() && page() == CODE);
        assert!(write(GUEST_OS_ID, 0));
        assert!(!hyperv.has_hypercalls());
        assert!(write(GUEST_OS_ID, 7) && write(HYPERCALL, 0x1003));
        assert!(write(HYPERCALL, 0), "ignored, since it is locked");
        assert!(hyperv.has_hypercalls());
        assert!(!write(VP_INDEX, 0) && !write(Msr(0x4000_0021), 0));
    }

    #[test]
    fn apic_registers_are_the_local_apics_in_both_modes() {
        let (hyperv, ram) = (HyperV::default(), ram());
        let mut lapic = machine(2).2.remove(1);
        for mode in [ApicMode::XApic, ApicMode::X2Apic] {
            if mode == ApicMode::X2Apic {
                let base = lapic.apic_base() | 1 << 10;
                lapic.write_msr(Msr::APIC_BASE, base, || 0).unwrap();
            }
            assert_eq!(lapic.mode(), mode);
            assert!(hyperv.write(TPR, 0x30, &ram, &mut lapic));
            assert_eq!(hyperv.read(TPR, 1, &mut lapic), Some(0x30));
            assert_eq!(lapic.cr8(), 3);
            assert!(hyperv.write(EOI, 0, &ram, &mut lapic));
            assert_eq!(hyperv.read(EOI, 1, &mut lapic), None);
            assert_eq!(hyperv.read(VP_INDEX, 1, &mut lapic), Some(1));
        }
        let base = lapic.apic_base() & !(1 << 10 | 1 << 11);
        lapic.write_msr(Msr::APIC_BASE, base, || 0).unwrap();
        assert!(!hyperv.write(EOI, 0, &ram, &mut lapic));
        assert_eq!(hyperv.read(TPR, 1, &mut lapic), None);
    }
}
