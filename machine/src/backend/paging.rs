//! A vCPU on shadow paging: what the guest believes its paging registers hold, and what the
//! processor runs with instead.

use testudo_arch::{Cr0Flags, Cr4Flags, Gpa, GuestMemory, Gva, RFlags};
use testudo_ept::shadow::{Outcome, ShadowError};
use testudo_ept::walk::{Access, AccessKind, PageFaultCode, PagingState, Privilege};

use super::mode::{CD, LMA, LME, Mode, NW, NXE, PAE, PG, pdptes_are_valid, read_pdptes};
use crate::paging::{Gate, ShadowTables, Walker};
use crate::vcpu::{MemoryAccess, VmExit};

const WP: u64 = Cr0Flags::WRITE_PROTECT.bits();
/// These act on user pages only where there is paging.
const CR4_WITH_PAGING: u64 = Cr4Flags::SUPERVISOR_MODE_EXECUTION_PROTECTION.bits()
    | Cr4Flags::SUPERVISOR_MODE_ACCESS_PREVENTION.bits()
    | Cr4Flags::PROTECTION_KEY_USER.bits();
const LA57: u64 = Cr4Flags::L5_PAGING.bits();

/// How a vCPU is put on shadow paging.
#[derive(Clone, Copy)]
pub struct ShadowPlace<'a> {
    /// The machine's tables.
    pub tables: &'a dyn ShadowTables,
    /// The number of the vCPU.
    pub vcpu: usize,
    /// The bits of CR4 that the guest may set: see [`allowed_cr4`](crate::paging::allowed_cr4).
    pub cr4: u64,
    /// The width of the guest's physical addresses.
    pub physical_bits: u8,
}

impl<'a> ShadowPlace<'a> {
    /// The gate that the vCPU goes through.
    pub(crate) fn gate(&self) -> &'a Gate {
        self.tables.gate(self.vcpu)
    }
}

/// The paging registers of a vCPU on shadow paging, or those of a guest of its guest's.
pub(crate) struct GuestPaging<'a> {
    place: ShadowPlace<'a>,
    walker: Walker,
    mode: Mode,
    cr3: u64,
    pdptes: [u64; 4],
    /// The hardware's CR3.
    root: u64,
    /// Why the vCPU cannot go on.
    failure: Option<ShadowError>,
}

/// A change of the registers that the guest may make.
struct Change {
    mode: Mode,
    cr3: u64,
}

impl<'a> GuestPaging<'a> {
    /// The guest's, with all registers zero; [`Self::set`] comes before the first entry.
    pub(crate) fn new(place: ShadowPlace<'a>) -> Self {
        let vcpu = place.vcpu;
        let walker = Walker {
            vcpu,
            is_nested: false,
        };
        Self {
            place,
            walker,
            mode: Mode::default(),
            cr3: 0,
            pdptes: [0; 4],
            root: 0,
            failure: None,
        }
    }

    /// As [`Self::new`], those of the guest's own guest on the same vCPU.
    pub(crate) fn of_nested(&self) -> Self {
        let mut walker = self.walker;
        walker.is_nested = true;
        Self {
            walker,
            ..Self::new(self.place)
        }
    }

    /// The guest may set these bits of CR4 too.
    #[cfg(feature = "vmx")]
    pub(crate) fn offer_cr4(&mut self, bits: u64) {
        self.place.cr4 |= bits;
    }

    /// The bits of CR4 that the guest may set.
    #[cfg(feature = "vmx")]
    pub(crate) fn allowed_cr4(&self) -> u64 {
        self.place.cr4
    }

    /// CR0 as it is: the processor lets the guest change bits of it that have nothing to do with paging.
    #[cfg(feature = "vmx")]
    pub(crate) fn note_cr0(&mut self, cr0: u64) {
        self.mode.cr0 = cr0;
    }

    /// CR0, CR4 and EFER as the guest sees them.
    #[inline]
    pub(crate) fn mode(&self) -> Mode {
        self.mode
    }

    /// CR3 as the guest sees it.
    #[inline]
    pub(crate) fn cr3(&self) -> u64 {
        self.cr3
    }

    /// Why the vCPU cannot go on, once.
    #[inline]
    pub(crate) fn failure(&mut self) -> Option<ShadowError> {
        self.failure.take()
    }

    #[cfg(feature = "svm")]
    #[inline]
    pub(crate) fn has_failed(&self) -> bool {
        self.failure.is_some()
    }

    /// The registers that the processor runs with: paging and write protection on whatever the
    /// guest has, PAE paging outside long mode, and caches on.
    pub(crate) fn hardware(&self) -> (Mode, u64) {
        let Mode { cr0, cr4, efer } = self.mode;
        let long = efer & LMA != 0;
        let mut real_cr4 = cr4 | PAE;
        if !long {
            real_cr4 &= !LA57;
        }
        if cr0 & PG == 0 {
            real_cr4 &= !CR4_WITH_PAGING;
        }
        let real = Mode {
            cr0: (cr0 & !(CD | NW)) | PG | WP,
            cr4: real_cr4,
            // Paging is on, so that LME would make it long mode.
            efer: if long { efer } else { efer & !(LME | LMA) } | NXE,
        };
        (real, self.root)
    }

    /// What decides how the guest's linear addresses are translated.
    fn state(&self, rflags: u64, pkru: u32) -> PagingState {
        PagingState {
            cr0: self.mode.cr0,
            cr3: self.cr3,
            cr4: self.mode.cr4,
            efer: self.mode.efer,
            alignment_check: rflags & RFlags::ALIGNMENT_CHECK.bits() != 0,
            pkru,
            physical_bits: self.place.physical_bits,
            pdptes: self.mode.pae_paging().then_some(self.pdptes),
            ..PagingState::default()
        }
    }

    /// Sets the registers, whatever they were.
    pub(crate) fn set(&mut self, memory: &impl GuestMemory, mode: Mode, cr3: u64) {
        (self.mode, self.cr3) = (mode, cr3);
        if mode.pae_paging() {
            self.pdptes = read_pdptes(memory, cr3);
        }
        self.load();
    }

    fn load(&mut self) {
        let state = self.state(0, 0);
        match self.place.tables.load(self.walker, &state) {
            Ok(root) => self.root = root,
            Err(error) => self.failure = Some(error),
        }
    }

    /// MOV to CR0, CR3 or CR4 by code with CS.L = `cs_long`; `false` is #GP(0).
    pub(crate) fn write(
        &mut self,
        memory: &impl GuestMemory,
        number: u8,
        value: u64,
        cs_long: bool,
    ) -> bool {
        let old = self.mode;
        let change = match number {
            0 => old.with_cr0(value, cs_long).map(|mode| (mode, self.cr3)),
            3 => self.valid_cr3(value).then_some((old, value)),
            4 => {
                let mode = old.with_cr4(value, self.place.cr4);
                mode.map(|mode| (mode, self.cr3))
            }
            _ => None,
        };
        let Some((mode, cr3)) = change else {
            return false;
        };
        self.change(memory, &Change { mode, cr3 }, number == 3)
    }

    /// WRMSR to EFER, where the guest may set the bits `allowed`; `false` is #GP(0).
    pub(crate) fn write_efer(
        &mut self,
        memory: &impl GuestMemory,
        value: u64,
        allowed: u64,
    ) -> bool {
        let Some(mode) = self.mode.with_efer(value, allowed) else {
            return false;
        };
        let cr3 = self.cr3;
        self.change(memory, &Change { mode, cr3 }, false)
    }

    /// Bits beyond the width of addresses are reserved, in long mode (SDM vol. 3A, 4.5.2; APM vol.
    /// 2, 5.3.2). Without PCIDs bit 63 is too.
    fn valid_cr3(&self, value: u64) -> bool {
        self.mode.efer & LMA == 0 || value >> self.place.physical_bits.clamp(32, 52) == 0
    }

    fn change(&mut self, memory: &impl GuestMemory, new: &Change, loads_cr3: bool) -> bool {
        let old = core::mem::replace(&mut self.mode, new.mode);
        if new.mode.loads_pdptes(&old) || (loads_cr3 && new.mode.pae_paging()) {
            let pdptes = read_pdptes(memory, new.cr3);
            if !pdptes_are_valid(&pdptes, self.place.physical_bits) {
                self.mode = old;
                return false;
            }
            self.pdptes = pdptes;
        }
        self.cr3 = new.cr3;
        let other_role = (new.mode.cr0 ^ old.cr0) & WP != 0;
        if loads_cr3 || other_role || new.mode.drops_translations(&old) {
            self.load();
        }
        true
    }

    /// Handles a page fault. `code` is the processor's error code, `cpl` the privilege level.
    pub(crate) fn fault(
        &mut self,
        address: Gva,
        code: u32,
        (cpl, rflags, pkru): (u8, u64, u32),
    ) -> Option<Outcome> {
        let code = PageFaultCode::from_bits_retain(code);
        let kind = if code.contains(PageFaultCode::FETCH) {
            AccessKind::Fetch
        } else if code.contains(PageFaultCode::WRITE) {
            AccessKind::Write
        } else {
            AccessKind::Read
        };
        let privilege = match (code.contains(PageFaultCode::USER), cpl) {
            (true, _) => Privilege::User,
            (false, 3) => Privilege::Implicit,
            (false, _) => Privilege::Supervisor,
        };
        let state = self.state(rflags, pkru);
        let access = Access::new(kind, privilege);
        match self
            .place
            .tables
            .fault(self.walker, &state, address, access)
        {
            Ok(outcome) => Some(outcome),
            Err(error) => {
                self.failure = Some(error);
                None
            }
        }
    }

    /// What the machine must do about a fault that is not the guest's; `delivering` if an event's delivery met it.
    pub(crate) fn machine_access(
        &self,
        outcome: Outcome,
        address: Gva,
        code: u32,
        delivering: bool,
    ) -> Option<VmExit> {
        const WRITE: u32 = 1 << 1;
        const FETCH: u32 = 1 << 4;
        let gpa = match outcome {
            // The instruction at RIP has nothing to do with it: the processor itself must write.
            Outcome::TableWrite(gpa) if delivering => {
                self.release(gpa);
                return None;
            }
            Outcome::TableWrite(gpa) | Outcome::NotMemory(gpa) | Outcome::ReadOnly(gpa) => gpa,
            _ => return None,
        };
        Some(VmExit::Memory(MemoryAccess {
            gpa,
            gva: Some(address),
            write: code & WRITE != 0,
            fetch: code & FETCH != 0,
            table: false,
        }))
    }

    /// INVLPG; the caller drops the processor's translations of the page.
    pub(crate) fn invalidate_page(&self, address: Gva) {
        self.place.tables.invalidate_page(self.walker, address);
    }

    /// The machine wrote guest memory.
    pub(crate) fn written(&self, gpa: Gpa, len: usize) {
        self.place.tables.written(self.place.vcpu, gpa, len as u64);
    }

    /// Lets the guest write to a table itself.
    pub(crate) fn release(&self, gpa: Gpa) -> bool {
        self.place.tables.release(self.place.vcpu, gpa)
    }
}
