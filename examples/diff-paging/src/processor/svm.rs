//! AMD-V with nested paging.

use core::arch::asm;

use testudo_arch::cpuid::Cpuid;
use testudo_arch::{Gpa, Hpa, Msr};
use testudo_ept::format::Rights;
use testudo_ept::format::npt::{Npt, NptFlags};
use testudo_ept::guest_table::TableFault;
use testudo_ept::walk::{Access, AccessKind, GuestTranslation, Mode, TableUse};
use testudo_rt::msr;
use testudo_svm::caps::SvmCaps;
use testudo_svm::exit::{ExitCode, NestedFaultBits};
use testudo_svm::hw::{GuestRegisters, HeldInterrupts, VmcbFrame};
use testudo_svm::intercept::{
    CrIntercepts, DrIntercepts, ExceptionIntercepts, Intercepts, Misc1, Misc2, Misc3,
};
use testudo_svm::vmcb::{NestedControl, TlbControl, VintrFlags, VirtualInterrupts};

use super::{Offers, Outcome, Processor, Refused, Start};
use crate::case::Case;
use crate::generate::PAGING_CR4;

const SVME: u64 = 1 << 12;
const LA57: u64 = 1 << 12;

/// See the [module](self).
pub(crate) struct Svm<'a> {
    offers: Offers,
    npt: Npt,
    vmcb: VmcbFrame<'a>,
    held: HeldInterrupts<'a>,
    registers: GuestRegisters,
}

impl<'a> Svm<'a> {
    /// `maps` are the permission maps for ports and MSRs, under which everything exits.
    pub(crate) fn new(
        caps: &SvmCaps,
        cpuid: &Cpuid,
        mut vmcb: VmcbFrame<'a>,
        held: HeldInterrupts<'a>,
        maps: [Hpa; 2],
    ) -> Self {
        vmcb.set_intercepts(Intercepts {
            cr: CrIntercepts::all(),
            dr: DrIntercepts::all(),
            exceptions: ExceptionIntercepts::all(),
            misc1: Misc1::all(),
            misc2: Misc2::all(),
            misc3: Misc3::all(),
        });
        vmcb.set_iopm_base_pa(maps[0].0);
        vmcb.set_msrpm_base_pa(maps[1].0);
        vmcb.set_asid(1);
        let interrupts = VirtualInterrupts::default().insert(VintrFlags::V_INTR_MASKING);
        vmcb.set_virtual_interrupts(interrupts);
        vmcb.set_nested_control(NestedControl::NP_ENABLE);
        vmcb.set_g_pat(0x0007_0406_0007_0406);
        let mut modes = [Mode::Off, Mode::Legacy, Mode::Pae, Mode::Level4]
            .into_iter()
            .collect::<arrayvec::ArrayVec<Mode, 5>>();
        if caps.cr4_valid & LA57 != 0 {
            modes.push(Mode::Level5);
        }
        let gigabyte_pages = cpuid.query(0x8000_0001, 0)[3] & 1 << 26 != 0;
        let mut npt = Npt::new(caps.physical_address_bits);
        if !gigabyte_pages {
            npt = npt.without_gigabyte_pages();
        }
        Self {
            offers: Offers {
                modes,
                physical_bits: caps.physical_address_bits,
                gigabyte_pages,
                cr4: caps.cr4_valid & PAGING_CR4,
                cr0_ones: 0x11,
                cr4_ones: 0,
                efer_ones: SVME,
                pdpte_registers: false,
                stage_bits: 0xFFF | 1 << 63,
                marks: false,
                mode_based: false,
                sub_pages: false,
            },
            npt,
            vmcb,
            held,
            registers: GuestRegisters::default(),
        }
    }
}

impl Processor for Svm<'_> {
    type Stage = Npt;

    fn offers(&self) -> &Offers {
        &self.offers
    }

    fn stage(&self, _: &Case) -> Npt {
        self.npt
    }

    /// APM vol. 2, 15.25.6: "nested table walks for guest page tables are always treated as data
    /// writes".
    fn table_rights(&self, _: &Case, _: TableUse) -> Rights {
        Rights::READ | Rights::WRITE
    }

    fn page_rights(&self, access: Access, _: &GuestTranslation) -> Rights {
        match access.kind {
            AccessKind::Read => Rights::READ,
            AccessKind::Write => Rights::READ | Rights::WRITE,
            AccessKind::Fetch => Rights::READ | Rights::EXECUTE | Rights::USER_EXECUTE,
        }
    }

    fn allows_piece(&self, _: &Case, _: Gpa, _: NptFlags) -> bool {
        false
    }

    /// APM vol. 2, 15.25.6.
    fn report(&self, _: &Case, refused: &Refused<'_>) -> Option<Outcome> {
        use NestedFaultBits as B;
        let mut bits = B::USER;
        bits |= match refused.why {
            TableFault::Absent { .. } => B::empty(),
            TableFault::Denied { .. } => B::PRESENT,
            TableFault::Reserved { .. } => B::PRESENT | B::RESERVED,
            _ => return None,
        };
        bits |= match (refused.at, refused.access.kind) {
            (Err(_), _) => B::TABLE_WALK | B::WRITE,
            (Ok(_), AccessKind::Read) => B::FINAL,
            (Ok(_), AccessKind::Write) => B::FINAL | B::WRITE,
            (Ok(_), AccessKind::Fetch) => B::FINAL | B::FETCH,
        };
        Some(Outcome::NestedFault {
            bits: bits.bits(),
            gpa: refused.gpa.0,
        })
    }

    fn prepare(&mut self, _: &Case, _: &Start) {}

    fn run(&mut self, _: &Case, start: &Start) -> Outcome {
        let vmcb = &mut self.vmcb;
        vmcb.set_system_registers(&start.system);
        vmcb.set_n_cr3(start.stage.0);
        vmcb.set_tlb_control(TlbControl::FlushAll);
        self.registers.gprs.rax = start.rax;
        self.registers.gprs.rcx = start.rcx;
        self.registers.gprs.rdx = start.rdx;
        if let Some(pkru) = start.pkru {
            set_pkru(pkru);
        }
        if let Some(pkrs) = start.pkrs {
            // SAFETY: the case has CR4.PKS, so the processor has the MSR; the host's own CR4.PKS
            // is clear.
            unsafe { msr::write(Msr::PKRS.0, pkrs.into()) };
        }
        // SAFETY: everything is intercepted, no translation is kept, and the guest reaches only the
        // arena, whose memory the host uses through atomics, and what lies at the same offset of
        // larger pages, which no case has it touch. No other guest's registers matter to it.
        unsafe { self.held.enter(&mut self.vmcb, &mut self.registers) };
        let (vmcb, al) = (&self.vmcb, self.registers.gprs.rax as u8);
        let (code, first, second) = (vmcb.exit_code(), vmcb.exit_info1(), vmcb.exit_info2());
        match ExitCode::from_vmcb(code) {
            ExitCode::CPUID if vmcb.rip() == start.system.rip => Outcome::Done { byte: 0xA2 },
            ExitCode::CPUID => Outcome::Done { byte: al },
            ExitCode::NPF => Outcome::NestedFault {
                bits: first,
                gpa: second,
            },
            _ if code == 0x40 + 6 => Outcome::Done { byte: 0x0B },
            _ if ExitCode::EXCEPTION.contains(&code) => Outcome::Exception {
                vector: (code - ExitCode::EXCEPTION.start()) as u8,
                code: first as u32,
                address: if code == 0x40 + 14 { second } else { 0 },
            },
            _ => Outcome::Other(code),
        }
    }
}

/// Sets PKRU, which stays in the processor when guests are entered.
pub(crate) fn set_pkru(pkru: u32) {
    // SAFETY: CPL 0, and the case has CR4.PKE, so the processor has the instruction. The host's
    // pages are the supervisor's: PKRU concerns none of its accesses, and CR4 is as before.
    unsafe {
        asm!("mov {cr4}, cr4", "mov {old}, {cr4}", "bts {cr4}, 22", "mov cr4, {cr4}",
            "wrpkru", "mov cr4, {old}",
            cr4 = out(reg) _, old = out(reg) _, in("eax") pkru, in("ecx") 0, in("edx") 0,
            options(nostack));
    }
}
