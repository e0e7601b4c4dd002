//! VT-x with extended page tables.

use alloc::boxed::Box;
use core::error::Error;

use testudo_arch::cpuid::Cpuid;
use testudo_arch::{EferFlags, Gpa, PageSize};
use testudo_ept::format::Rights;
use testudo_ept::format::ept::{Ept, EptFlags};
use testudo_ept::guest_table::TableFault;
use testudo_ept::sub_page::SubPageTable;
use testudo_ept::walk::{Access, AccessKind, GuestTranslation, Mode, TableUse};
use testudo_rt::memory::Frames;
use testudo_vmx::caps::EptVpidCaps;
use testudo_vmx::controls::{
    EntryControls, ExitControls, PinControls, PrimaryControls, SecondaryControls,
};
use testudo_vmx::exit::{BasicReason, EptQualification, ExitReason};
use testudo_vmx::hw::instructions::{InveptKind, invept};
use testudo_vmx::hw::{CurrentVmcs, GuestRegisters, HostState};
use testudo_vmx::{VmcsRead, VmcsWrite, VmxCaps, fields, state};

use super::svm::set_pkru;
use super::{Offers, Outcome, Processor, Refused, Start};
use crate::case::Case;
use crate::generate::PAGING_CR4;

const LA57: u64 = 1 << 12;

/// See the [module](self).
pub(crate) struct Vmx<'a> {
    offers: Offers,
    ept: Ept,
    sub_pages: SubPageTable<Frames>,
    caps: &'a VmxCaps,
    secondary: SecondaryControls,
    entry: EntryControls,
    vmcs: CurrentVmcs<'a>,
    registers: GuestRegisters,
}

impl<'a> Vmx<'a> {
    pub(crate) fn new(
        caps: &'a VmxCaps,
        cpuid: &Cpuid,
        mut vmcs: CurrentVmcs<'a>,
    ) -> Result<Self, Box<dyn Error>> {
        state::initialize(&mut vmcs, caps)?;
        let pin = PinControls::EXTERNAL_INTERRUPT_EXITING | PinControls::NMI_EXITING;
        let primary = PrimaryControls::HLT_EXITING
            | PrimaryControls::UNCONDITIONAL_IO_EXITING
            | PrimaryControls::ACTIVATE_SECONDARY_CONTROLS;
        let secondary = SecondaryControls::ENABLE_EPT | SecondaryControls::UNRESTRICTED_GUEST;
        let secondary = caps.secondary.require(secondary)?;
        let exit = ExitControls::HOST_ADDRESS_SPACE_SIZE
            | ExitControls::SAVE_EFER
            | ExitControls::LOAD_EFER;
        let mut entry = EntryControls::LOAD_EFER;
        let pks = caps.entry.allows(EntryControls::LOAD_PKRS);
        if pks {
            entry |= EntryControls::LOAD_PKRS;
        }
        let entry = caps.entry.require(entry)?;
        vmcs.set(fields::PIN_CONTROLS, caps.pin.require(pin)?.bits())?;
        let primary = caps.primary.require(primary)?;
        vmcs.set(fields::PRIMARY_CONTROLS, primary.bits())?;
        vmcs.set(fields::EXIT_CONTROLS, caps.exit.require(exit)?.bits())?;
        vmcs.set(fields::EXCEPTION_BITMAP, u32::MAX)?;
        // Page faults exit whatever their code: with a mask and a match of 0.
        vmcs.set(fields::PAGE_FAULT_ERROR_CODE_MASK, 0)?;
        vmcs.set(fields::PAGE_FAULT_ERROR_CODE_MATCH, 0)?;
        // SAFETY: CPL 0, 64-bit mode, and the runtime gives every vector a stack of its own.
        unsafe { HostState::of_this_processor() }.write(&mut vmcs)?;

        let has = |cap| caps.ept_vpid.contains(cap);
        let bits = caps.processor.physical_address_bits;
        let mut ept = Ept::new(bits);
        if !has(EptVpidCaps::PAGE_1G) {
            ept = ept.with_largest_page(PageSize::Size2M);
        }
        if has(EptVpidCaps::EXECUTE_ONLY) {
            ept = ept.with_execute_only();
        }
        let mut cr4 = caps.cr4.may & PAGING_CR4;
        if !pks {
            cr4 &= !(1 << 24);
        }
        let mut modes = [Mode::Off, Mode::Legacy, Mode::Pae, Mode::Level4]
            .into_iter()
            .collect::<arrayvec::ArrayVec<Mode, 5>>();
        if caps.cr4.may & LA57 != 0 {
            modes.push(Mode::Level5);
        }
        Ok(Self {
            offers: Offers {
                modes,
                physical_bits: bits,
                gigabyte_pages: cpuid.query(0x8000_0001, 0)[3] & 1 << 26 != 0,
                cr4,
                cr0_ones: caps.cr0.ones & !0x8000_0001 | 0x10,
                cr4_ones: caps.cr4.ones,
                efer_ones: 0,
                pdpte_registers: true,
                stage_bits: 0xFFF | EptFlags::SUPPRESS_VE.bits(),
                marks: has(EptVpidCaps::ACCESSED_DIRTY),
                mode_based: caps
                    .secondary
                    .allows(SecondaryControls::MODE_BASED_EXECUTE_CONTROL),
                sub_pages: caps
                    .secondary
                    .allows(SecondaryControls::SUB_PAGE_WRITE_PERMISSIONS),
            },
            ept,
            sub_pages: SubPageTable::new(Frames).ok_or("too little memory")?,
            caps,
            secondary,
            entry,
            vmcs,
            registers: GuestRegisters::default(),
        })
    }

    /// Writes what a case needs, and enters; a failure is what VM entry or VMWRITE said.
    fn enter(&mut self, case: &Case, start: &Start) -> Result<Outcome, Box<dyn Error>> {
        let pointer = self.stage(case).pointer(start.stage);
        let long = start.system.efer & EferFlags::LONG_MODE_ACTIVE.bits() != 0;
        let mut entry = self.entry;
        entry.set(EntryControls::IA32E_MODE_GUEST, long);
        let mut secondary = self.secondary;
        secondary.set(
            SecondaryControls::MODE_BASED_EXECUTE_CONTROL,
            case.mode_based,
        );
        let sub_pages = SecondaryControls::SUB_PAGE_WRITE_PERMISSIONS;
        secondary.set(sub_pages, case.pieces.is_some());
        let vmcs = &mut self.vmcs;
        if self.offers.sub_pages {
            vmcs.set(fields::SPP_TABLE_POINTER, self.sub_pages.root().0)?;
        }
        vmcs.set(fields::ENTRY_CONTROLS, entry.bits())?;
        vmcs.set(fields::SECONDARY_CONTROLS, secondary.bits())?;
        vmcs.set(fields::EPT_POINTER, pointer)?;
        state::write_system_registers(vmcs, &start.system)?;
        if let Some(pdptes) = start.pdptes {
            let [first, second, third, fourth] = pdptes;
            vmcs.set(fields::GUEST_PDPTE0, first)?;
            vmcs.set(fields::GUEST_PDPTE1, second)?;
            vmcs.set(fields::GUEST_PDPTE2, third)?;
            vmcs.set(fields::GUEST_PDPTE3, fourth)?;
        }
        if let Some(pkru) = start.pkru {
            set_pkru(pkru);
        }
        if let Some(pkrs) = start.pkrs {
            vmcs.set(fields::GUEST_PKRS, pkrs.into())?;
        }
        self.registers.gprs.rax = start.rax;
        self.registers.gprs.rcx = start.rcx;
        self.registers.gprs.rdx = start.rdx;
        // SAFETY: VMX root operation; a processor with EPT has INVEPT of every kind that its
        // capabilities name, and this one is named.
        unsafe { invept(InveptKind::AllContexts) }?;
        // SAFETY: interrupts, NMIs, ports, MSRs and exceptions exit, there is no VPID, and the
        // guest reaches only the arena, whose memory the host uses through atomics, and what lies
        // at the same offset of larger pages, which no case has it touch.
        unsafe { self.vmcs.enter(&mut self.registers) }?;
        let (vmcs, al) = (&self.vmcs, self.registers.gprs.rax as u8);
        let reason = ExitReason::read(vmcs)?;
        if reason.is_entry_failure() {
            return Ok(Outcome::Other(reason.0.into()));
        }
        Ok(match reason.basic() {
            BasicReason::Cpuid if vmcs.get(fields::GUEST_RIP)? == start.system.rip => {
                Outcome::Done { byte: 0xA2 }
            }
            BasicReason::Cpuid => Outcome::Done { byte: al },
            BasicReason::ExceptionOrNmi => {
                let event = vmcs.get(fields::EXIT_INTERRUPTION_INFORMATION)?;
                match event as u8 {
                    6 => Outcome::Done { byte: 0x0B },
                    vector => Outcome::Exception {
                        vector,
                        code: match event & 1 << 11 {
                            0 => 0,
                            _ => vmcs.get(fields::EXIT_INTERRUPTION_ERROR_CODE)?,
                        },
                        address: match vector {
                            14 => vmcs.get(fields::EXIT_QUALIFICATION)?,
                            _ => 0,
                        },
                    },
                }
            }
            BasicReason::EptViolation => Outcome::Violation {
                qualification: vmcs.get(fields::EXIT_QUALIFICATION)?,
                gpa: vmcs.get(fields::GUEST_PHYSICAL_ADDRESS)?,
                linear: vmcs.get(fields::GUEST_LINEAR_ADDRESS)?,
            },
            BasicReason::EptMisconfiguration => Outcome::Misconfiguration {
                gpa: vmcs.get(fields::GUEST_PHYSICAL_ADDRESS)?,
            },
            _ => Outcome::Other(reason.0.into()),
        })
    }
}

impl Processor for Vmx<'_> {
    type Stage = Ept;

    fn offers(&self) -> &Offers {
        &self.offers
    }

    fn stage(&self, case: &Case) -> Ept {
        let mut ept = self.ept;
        if case.marks {
            ept = ept.with_accessed_dirty();
        }
        if case.mode_based {
            ept = ept.with_mode_based_execute();
        }
        ept
    }

    /// SDM vol. 3C, 31.3.3.2: "If accessed and dirty flags for EPT are enabled, processor accesses
    /// to guest paging-structure entries are treated as writes with regard to EPT violations."
    fn table_rights(&self, case: &Case, table_use: TableUse) -> Rights {
        if case.marks || table_use == TableUse::Update {
            Rights::READ | Rights::WRITE
        } else {
            Rights::READ
        }
    }

    fn page_rights(&self, access: Access, page: &GuestTranslation) -> Rights {
        match access.kind {
            AccessKind::Read => Rights::READ,
            AccessKind::Write => Rights::WRITE,
            AccessKind::Fetch if page.user => Rights::USER_EXECUTE,
            AccessKind::Fetch => Rights::EXECUTE,
        }
    }

    /// SDM vol. 3C, 31.3.4.1: a write is eligible for sub-page write permissions if the address is readable
    /// and not writable, and the entry that maps the 4-KByte page has bit 61 set.
    fn allows_piece(&self, case: &Case, gpa: Gpa, flags: EptFlags) -> bool {
        let eligible = case.pieces.is_some() && flags.contains(EptFlags::SUB_PAGE_WRITE);
        let pieces = self.sub_pages.pieces(gpa).filter(|_| eligible);
        pieces.is_some_and(|pieces| pieces >> (gpa.0 >> 7 & 31) & 1 != 0)
    }

    /// SDM vol. 3C, table 30-7.
    fn report(&self, case: &Case, refused: &Refused<'_>) -> Option<Outcome> {
        use EptQualification as Q;
        let allowed = match refused.why {
            TableFault::Absent { .. } => Rights::empty(),
            TableFault::Denied { rights } => rights,
            TableFault::Reserved { .. } => {
                return Some(Outcome::Misconfiguration { gpa: refused.gpa.0 });
            }
            _ => return None,
        };
        let mut bits = Q::LINEAR_VALID;
        bits.set(Q::READABLE, allowed.contains(Rights::READ));
        bits.set(Q::WRITABLE, allowed.contains(Rights::WRITE));
        bits.set(Q::EXECUTABLE, allowed.contains(Rights::EXECUTE));
        let user = case.mode_based && allowed.contains(Rights::USER_EXECUTE);
        bits.set(Q::USER_EXECUTABLE, user);
        bits |= match (refused.at, refused.access.kind) {
            // "If such an access causes an EPT violation, the processor sets both bit 0 and bit 1."
            (Err(_), _) if case.marks => Q::READ | Q::WRITE,
            (Err(TableUse::Load), _) => Q::READ,
            (Err(TableUse::Update), _) => Q::WRITE,
            (Ok(_), AccessKind::Read) => Q::TRANSLATED | Q::READ,
            (Ok(_), AccessKind::Write) => Q::TRANSLATED | Q::WRITE,
            (Ok(_), AccessKind::Fetch) => Q::TRANSLATED | Q::FETCH,
        };
        let advanced = self
            .caps
            .ept_vpid
            .contains(EptVpidCaps::ADVANCED_EXIT_INFORMATION);
        if let (true, Ok(page)) = (advanced, refused.at) {
            bits.set(Q::USER, page.user);
            bits.set(Q::PAGE_WRITABLE, page.writable);
            bits.set(Q::PAGE_EXECUTE_DISABLED, !page.executable);
        }
        Some(Outcome::Violation {
            qualification: bits.bits(),
            gpa: refused.gpa.0,
            linear: refused.linear.0,
        })
    }

    fn prepare(&mut self, case: &Case, start: &Start) {
        let Some(pieces) = case.pieces else { return };
        if let Ok(flush) = self.sub_pages.set_pieces(start.data, pieces) {
            // SAFETY: INVEPT of all contexts comes before the next entry.
            unsafe { flush.assume_flushed() };
        }
    }

    fn run(&mut self, case: &Case, start: &Start) -> Outcome {
        match self.enter(case, start) {
            Ok(outcome) => outcome,
            Err(error) => {
                testudo_rt::println!("{error}");
                Outcome::Other(u64::MAX)
            }
        }
    }
}
