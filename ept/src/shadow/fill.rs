//! How shadow tables come, change and go.

use alloc::vec::Vec;

use super::*;

/// A fault whose walk of the guest's tables has succeeded.
pub(super) struct Fault<'a> {
    pub(super) state: &'a PagingState,
    pub(super) address: u64,
    pub(super) access: Access,
    pub(super) found: &'a GuestTranslation,
}

impl Fault<'_> {
    fn is_write(&self) -> bool {
        self.access.kind == AccessKind::Write
    }

    /// The guest's entry for the page as the walk has left it.
    fn guest_entry(&self) -> u64 {
        let dirty = if self.is_write() { DIRTY } else { 0 };
        self.found
            .leaf()
            .map_or(0, |step| step.entry | ACCESSED | dirty)
    }

    /// The bits of an entry that maps the page.
    fn rights(&self) -> u64 {
        let found = self.found;
        let (mut writable, mut user, mut executable) =
            (found.writable, found.user, found.executable);
        if !writable && self.is_write() && self.access.privilege != Privilege::User {
            // CR0.WP is clear for the guest and set for us. The page becomes one of the supervisor
            // alone, until a user access faults and makes it a read-only page again; SMEP still has
            // to see a user page.
            writable = true;
            executable &= !(user && self.state.prevents_supervisor_fetch());
            user = false;
        }
        // The first write must fault, so that the guest's dirty bit is set.
        let clean = found.leaf().is_some() && self.guest_entry() & DIRTY == 0;
        let mut entry = PRESENT | MARKED;
        entry |= if writable && !clean { WRITABLE } else { 0 };
        entry |= if user { USER } else { 0 };
        entry |= if executable { 0 } else { NO_EXECUTE };
        if self.state.mode().is_long() {
            entry |= self.guest_entry() & KEY;
        }
        entry
    }
}

impl<M: FrameAlloc + FrameMem> ShadowMmu<M> {
    pub(super) fn resolve<V: GuestMemory + ?Sized>(
        &mut self,
        root: PageId,
        memory: &V,
        backing: &impl Backing,
        fault: &Fault<'_>,
        debt: &mut Debt,
    ) -> Result<Outcome, ShadowError> {
        let gpa = fault.found.gpa;
        let Some(mut backed) = backing.find(gpa) else {
            return Ok(Outcome::NotMemory(gpa));
        };
        if fault.is_write() && !backed.writable {
            return Ok(Outcome::ReadOnly(gpa));
        }
        self.make_room(debt);
        let page = self.descend_tables(root, memory, fault, debt)?;
        // Only now: the way down may have made a table of the very page.
        let frame = gpa.0 >> 12;
        if self.pages.is_table(frame) && !self.pages.is_out_of_step(frame) {
            if !fault.is_write() {
                backed.writable = false;
            } else if self.pages.may_go_out_of_step(frame) {
                self.pages.set_out_of_step(frame, true);
            } else {
                return Ok(Outcome::TableWrite(gpa));
            }
        }
        self.descend_memory(page, backed, fault, debt)?;
        Ok(Outcome::Resolved)
    }

    /// The way down along the guest's tables, to the one whose entry maps the page.
    fn descend_tables<V: GuestMemory + ?Sized>(
        &mut self,
        root: PageId,
        memory: &V,
        fault: &Fault<'_>,
        debt: &mut Debt,
    ) -> Result<PageId, ShadowError> {
        let mode = fault.state.mode();
        let address = fault.address;
        let (mut page, mut sum) = (root, EVERYTHING);
        if let (Mode::Legacy, Some(step)) = (mode, fault.found.steps.first()) {
            // Above the directory, the four pointers are ours alone.
            let key = self.pages[page].key.table(step.at.0 >> 12, sum, address);
            page = self.follow(page, address, key, step.entry, memory, debt)?;
        }
        let Some((_, tables)) = fault.found.steps.split_last() else {
            return Ok(page);
        };
        for step in tables {
            self.pages[page].writes = 0;
            if !(mode == Mode::Pae && step.level == 3) {
                sum &= allowed(step.entry);
            }
            let table = step.entry & mode.table_mask();
            let key = self.pages[page].key.table(table >> 12, sum, address);
            page = self.follow(page, address, key, step.entry, memory, debt)?;
        }
        self.pages[page].writes = 0;
        Ok(page)
    }

    /// The way from the guest's last table to the memory: one entry, or tables in between where the
    /// guest's page is larger than ours may be.
    fn descend_memory(
        &mut self,
        mut page: PageId,
        backed: Backed,
        fault: &Fault<'_>,
        debt: &mut Debt,
    ) -> Result<(), ShadowError> {
        let gpa = fault.found.gpa.0;
        let rights = fault.rights();
        let mut guest = fault.guest_entry();
        loop {
            let key = self.pages[page].key;
            let shift = 3 + 9 * u32::from(key.level);
            let inside = (1u64 << shift) - 1;
            let first = (gpa & !inside) >> 12;
            let large = key.level == 2
                && shift <= backed.shift
                && shift <= fault.found.shift
                && !self.pages.has_tables(first, (inside + 1) >> 12);
            if key.level == 1 || large {
                let mut entry = (backed.address.0 & !inside) | rights;
                if !backed.writable {
                    entry &= !WRITABLE;
                }
                if large {
                    entry |= LARGE;
                }
                self.map(page, fault.address, first, guest, entry, debt);
                return Ok(());
            }
            // A table below covers exactly what this entry covers.
            let below = key.direct(first, allowed(rights));
            page = self.follow_direct(page, fault.address, below, guest, debt)?;
            guest = 0;
        }
    }

    /// The table that the entry for `address` leads to, which is made so if it is not.
    fn follow<V: GuestMemory + ?Sized>(
        &mut self,
        page: PageId,
        address: u64,
        key: Key,
        guest: u64,
        memory: &V,
        debt: &mut Debt,
    ) -> Result<PageId, ShadowError> {
        self.keep_in_step(key, memory, debt);
        self.follow_direct(page, address, key, guest, debt)
    }

    /// A table above the lowest level is not to be out of step, unless it was released.
    pub(super) fn keep_in_step<V: GuestMemory + ?Sized>(
        &mut self,
        key: Key,
        memory: &V,
        debt: &mut Debt,
    ) {
        if key.kind == Kind::Table
            && key.level > 1
            && self.pages.is_out_of_step(key.frame)
            && !self.pages.is_released(key.frame)
        {
            self.catch_up_frame(key.frame, memory, debt);
            self.pages.set_out_of_step(key.frame, false);
            self.watch(key.frame, debt);
        }
    }

    fn follow_direct(
        &mut self,
        page: PageId,
        address: u64,
        key: Key,
        guest: u64,
        debt: &mut Debt,
    ) -> Result<PageId, ShadowError> {
        let index = self.pages[page].key.index(address);
        if let Child::Table(child) = self.pages[page].slot(index).child
            && self.pages[child].key == key
        {
            return Ok(child);
        }
        self.replace_entry(page, index, debt);
        let child = self.find_or_new(key, debt)?;
        // The four pointers of PAE have no rights, and their bits are reserved.
        let top = self.pages[page].key.is_pae_top();
        let bits = if top {
            PRESENT
        } else {
            PRESENT | WRITABLE | USER | MARKED
        };
        let entry = self.pages[child].frame.0 | bits;
        let slot = Slot {
            child: Child::Table(child),
            guest,
        };
        self.pages.set(&self.frames, page, index, slot, entry);
        Ok(child)
    }

    pub(super) fn find_or_new(&mut self, key: Key, debt: &mut Debt) -> Result<PageId, ShadowError> {
        if let Some(page) = self.pages.find(&key) {
            return Ok(page);
        }
        let frame = self.frames.alloc().ok_or(ShadowError::OutOfFrames)?;
        let new = key.kind == Kind::Table
            && !self.pages.is_table(key.frame)
            && !self.pages.is_out_of_step(key.frame);
        let page = self.pages.insert(key, frame);
        if new {
            self.watch(key.frame, debt);
        }
        Ok(page)
    }

    /// Takes the write right to a guest table from every entry that maps it. Until the flush that this
    /// may take has ended, other processors can still write there: what the table's shadows say is
    /// in doubt until they have been compared once more.
    fn watch(&mut self, frame: u64, debt: &mut Debt) {
        let mut writable = false;
        for (page, index) in self.pages.mappings_of(1, frame) {
            let at = self.pages[page].entry(index);
            let entry = self.frames.load(at);
            if entry & WRITABLE != 0 {
                self.frames.store(at, entry & !WRITABLE);
                writable = true;
            }
        }
        for (page, index) in self.pages.mappings_of(2, frame & !0x1FF) {
            self.drop_entry(page, index, debt);
        }
        // Of a mapping that is gone, a processor may still have the translation.
        if writable || self.lingering || debt.everything {
            debt.everything = true;
            self.pages.doubt(frame);
        }
    }

    /// Compares the tables that were in doubt: now they can only be written with our knowledge.
    pub(super) fn settle_doubts<V: GuestMemory + ?Sized>(&mut self, memory: &V, debt: &mut Debt) {
        // A call that failed may have left the flush to this one.
        if !self.owed.everything {
            for frame in self.pages.take_doubted() {
                self.catch_up_frame(frame, memory, debt);
            }
        }
    }

    /// Makes an entry map memory.
    fn map(
        &mut self,
        page: PageId,
        address: u64,
        first: u64,
        guest: u64,
        entry: u64,
        debt: &mut Debt,
    ) {
        let index = self.pages[page].key.index(address);
        let at = self.pages[page].entry(index);
        let child = Child::Memory(first);
        if self.pages[page].slot(index).child == child {
            let old = self.frames.load(at);
            // More rights need no flush; the same bits apart from them do not either.
            let lost = old & (WRITABLE | USER) & !entry != 0 || entry & NO_EXECUTE & !old != 0;
            debt.everything |= lost || (old ^ entry) & !(WRITABLE | USER | NO_EXECUTE) != 0;
            self.frames.store(at, entry);
            self.pages.note_guest(page, index, guest);
            return;
        }
        self.replace_entry(page, index, debt);
        let slot = Slot { child, guest };
        self.pages.set(&self.frames, page, index, slot, entry);
    }

    /// Drops an entry that the guest has changed without invalidating it.
    fn replace_entry(&mut self, page: PageId, index: usize, debt: &mut Debt) {
        debt.everything |= self.pages[page].slot(index).child != Child::Absent;
        self.drop_entry(page, index, debt);
    }

    /// Makes an entry absent. Its translations may linger in processors.
    pub(super) fn drop_entry(&mut self, page: PageId, index: usize, debt: &mut Debt) {
        let child = self.pages.clear(&self.frames, page, index);
        self.lingering |= child != Child::Absent;
        if let Child::Table(child) = child {
            self.give_up_orphan(child, debt);
        }
    }

    /// A region's table that nobody leads to will not be found again.
    fn give_up_orphan(&mut self, page: PageId, debt: &mut Debt) {
        let orphan = &self.pages[page];
        if orphan.parents.is_empty() && orphan.pins == 0 && orphan.key.kind == Kind::Direct {
            self.give_up(page, debt);
        }
    }

    /// Takes a table out, and tables of regions below that nobody else leads to. A root that is
    /// loaded is emptied only. Tables above, used or not, lose an entry and nothing more.
    pub(super) fn give_up(&mut self, page: PageId, debt: &mut Debt) {
        let mut work = Vec::from([page]);
        while let Some(page) = work.pop() {
            if !self.pages.is_live(page) {
                continue;
            }
            debt.everything = true;
            for index in 0..512 {
                if let Child::Table(child) = self.pages.clear(&self.frames, page, index) {
                    let orphan = &self.pages[child];
                    let lost = orphan.parents.is_empty() && orphan.pins == 0;
                    if lost && orphan.key.kind == Kind::Direct {
                        work.push(child);
                    }
                }
            }
            for (parent, index) in core::mem::take(&mut self.pages[page].parents) {
                self.pages.clear(&self.frames, parent, usize::from(index));
            }
            self.pages[page].writes = 0;
            if self.pages[page].pins == 0
                && let Some(frame) = self.pages.remove(page)
            {
                debt.retired.push(frame);
            }
        }
    }

    /// Gives up the oldest tables when there are too many for another way down.
    pub(super) fn make_room(&mut self, debt: &mut Debt) {
        if self.pages.count() + 6 <= self.limit {
            return;
        }
        for page in self.pages.by_age() {
            if self.pages.count() <= self.limit - self.limit / 4 {
                break;
            }
            if self.pages.is_live(page) && self.pages[page].pins == 0 {
                self.give_up(page, debt);
            }
        }
    }

    /// Brings every table that is out of step up to date. One that the guest has left alone is
    /// watched again.
    pub(super) fn catch_up<V: GuestMemory + ?Sized>(&mut self, memory: &V, debt: &mut Debt) {
        self.settle_doubts(memory, debt);
        for frame in self.pages.all_out_of_step() {
            let changed = self.catch_up_frame(frame, memory, debt);
            if !changed || self.pages.is_released(frame) {
                self.pages.set_out_of_step(frame, false);
                if self.pages.is_table(frame) {
                    self.watch(frame, debt);
                }
            }
        }
    }

    /// Drops the entries whose counterparts have changed. `true` if there were any.
    pub(super) fn catch_up_frame<V: GuestMemory + ?Sized>(
        &mut self,
        frame: u64,
        memory: &V,
        debt: &mut Debt,
    ) -> bool {
        let mut changed = false;
        let pages: Vec<PageId> = self.pages.of_frame(frame).collect();
        for page in pages {
            let key = self.pages[page].key;
            for index in 0..512 {
                let slot = self.pages[page].slot(index);
                if slot.child == Child::Absent {
                    continue;
                }
                let at = key.guest_entry(index);
                let now = match key.is_legacy() {
                    true => memory.load_u32(at).map(u64::from),
                    false => memory.load_u64(at),
                };
                // The guest's processors may have set accessed and dirty bits, not cleared them.
                let marks = ACCESSED | DIRTY;
                let same = now.is_ok_and(|now| {
                    (now ^ slot.guest) & !marks == 0 && slot.guest & marks & !now == 0
                });
                if !same {
                    changed = true;
                    self.drop_entry(page, index, debt);
                }
            }
        }
        changed
    }
}
