//! The shadow tables themselves, and the records by which they are found.

use alloc::boxed::Box;
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec::Vec;
use core::ops::{Index, IndexMut};

use testudo_arch::{FrameMem, Hpa};

use super::role::{Key, Kind};

/// A shadow table's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct PageId(u32);

/// What an entry of a shadow table leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Child {
    Absent,
    Table(PageId),
    /// Memory from this guest frame on.
    Memory(u64),
}

/// What is known about an entry beside what hardware reads.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slot {
    pub(super) child: Child,
    /// The guest's entry, as it was when ours was made.
    pub(super) guest: u64,
}

const EMPTY: Slot = Slot {
    child: Child::Absent,
    guest: 0,
};

/// One shadow table.
#[derive(Debug)]
pub(super) struct Page {
    pub(super) key: Key,
    pub(super) frame: Hpa,
    /// The entries that lead here.
    pub(super) parents: Vec<(PageId, u16)>,
    /// How many virtual processors run on it as their root.
    pub(super) pins: u32,
    /// Emulated writes since the last fault through it.
    pub(super) writes: u8,
    born: u64,
    slots: Box<[Slot]>,
}

impl Page {
    /// Entry `index` as hardware reads it.
    #[inline]
    pub(super) fn entry(&self, index: usize) -> Hpa {
        Hpa(self.frame.0 | (index as u64) << 3)
    }

    #[inline]
    pub(super) fn slot(&self, index: usize) -> Slot {
        self.slots[index]
    }
}

/// All shadow tables of a guest.
#[derive(Debug, Default)]
pub(super) struct Pages {
    slab: Vec<Option<Page>>,
    vacant: Vec<u32>,
    names: BTreeMap<Key, PageId>,
    /// Level, guest frame, table, entry: who maps this memory.
    mappings: BTreeSet<(u8, u64, PageId, u16)>,
    /// Tables of the lowest level that the guest may write without our seeing it.
    out_of_step: BTreeSet<u64>,
    /// Tables of any level that are out of step until the next load, whoever shadows them.
    released: BTreeSet<u64>,
    /// Tables that are watched since the last flush began, and may have been written before it ended.
    unsure: BTreeSet<u64>,
    births: u64,
}

impl Index<PageId> for Pages {
    type Output = Page;
    #[inline]
    fn index(&self, id: PageId) -> &Page {
        match &self.slab[id.0 as usize] {
            Some(page) => page,
            None => unreachable!("a shadow table is used after it was given up"),
        }
    }
}

impl IndexMut<PageId> for Pages {
    #[inline]
    fn index_mut(&mut self, id: PageId) -> &mut Page {
        match &mut self.slab[id.0 as usize] {
            Some(page) => page,
            None => unreachable!("a shadow table is used after it was given up"),
        }
    }
}

impl Pages {
    pub(super) fn count(&self) -> usize {
        self.names.len()
    }

    pub(super) fn mapped(&self) -> usize {
        self.mappings.len()
    }

    pub(super) fn is_live(&self, id: PageId) -> bool {
        self.slab[id.0 as usize].is_some()
    }

    pub(super) fn find(&self, key: &Key) -> Option<PageId> {
        self.names.get(key).copied()
    }

    pub(super) fn insert(&mut self, key: Key, frame: Hpa) -> PageId {
        self.births += 1;
        let page = Page {
            key,
            frame,
            parents: Vec::new(),
            pins: 0,
            writes: 0,
            born: self.births,
            slots: alloc::vec![EMPTY; 512].into_boxed_slice(),
        };
        let id = match self.vacant.pop() {
            Some(number) => PageId(number),
            None => {
                self.slab.push(None);
                PageId(self.slab.len() as u32 - 1)
            }
        };
        self.slab[id.0 as usize] = Some(page);
        self.names.insert(key, id);
        id
    }

    /// Takes a table without parents and children out of the records.
    pub(super) fn remove(&mut self, id: PageId) -> Option<Hpa> {
        let page = self.slab[id.0 as usize].take()?;
        self.vacant.push(id.0);
        self.names.remove(&page.key);
        let frame = page.key.frame;
        if page.key.kind == Kind::Table && !self.is_table(frame) && !self.is_released(frame) {
            self.out_of_step.remove(&frame);
        }
        Some(page.frame)
    }

    /// Every table, oldest first.
    pub(super) fn by_age(&self) -> Vec<PageId> {
        let mut ids: Vec<PageId> = self.names.values().copied().collect();
        ids.sort_unstable_by_key(|id| self[*id].born);
        ids
    }

    /// The shadows of one guest frame.
    pub(super) fn of_frame(&self, frame: u64) -> impl Iterator<Item = PageId> + '_ {
        self.tables_in(frame, 1).map(|(_, id)| id)
    }

    fn tables_in(&self, frame: u64, count: u64) -> impl Iterator<Item = (u64, PageId)> + '_ {
        let last = frame.saturating_add(count);
        self.names
            .range(Key::first_of(frame)..Key::first_of(last))
            .map(|(key, id)| (key.frame, *id))
    }

    /// Whether a guest frame is shadowed as a table.
    #[inline]
    pub(super) fn is_table(&self, frame: u64) -> bool {
        self.has_tables(frame, 1)
    }

    pub(super) fn has_tables(&self, frame: u64, count: u64) -> bool {
        self.tables_in(frame, count).next().is_some()
    }

    pub(super) fn is_out_of_step(&self, frame: u64) -> bool {
        self.out_of_step.contains(&frame)
    }

    /// Whether all shadows of a frame are of the lowest level.
    pub(super) fn may_go_out_of_step(&self, frame: u64) -> bool {
        self.of_frame(frame).all(|id| self[id].key.level == 1)
    }

    pub(super) fn set_out_of_step(&mut self, frame: u64, out: bool) {
        if out {
            self.out_of_step.insert(frame);
        } else {
            self.out_of_step.remove(&frame);
            self.released.remove(&frame);
        }
    }

    /// Lets a table of any level be out of step until [`Self::set_out_of_step`] ends it.
    pub(super) fn release(&mut self, frame: u64) {
        self.out_of_step.insert(frame);
        self.released.insert(frame);
    }

    pub(super) fn is_released(&self, frame: u64) -> bool {
        self.released.contains(&frame)
    }

    pub(super) fn all_released(&self) -> Vec<u64> {
        self.released.iter().copied().collect()
    }

    pub(super) fn all_out_of_step(&self) -> Vec<u64> {
        self.out_of_step.iter().copied().collect()
    }

    /// Notes that a table may have been written unseen until the flush that is due.
    pub(super) fn doubt(&mut self, frame: u64) {
        self.unsure.insert(frame);
    }

    /// The tables of which that was noted, which are no longer in doubt.
    pub(super) fn take_doubted(&mut self) -> BTreeSet<u64> {
        core::mem::take(&mut self.unsure)
    }

    /// Who maps a guest frame with entries of this level. `frame` is the first of the entry's.
    pub(super) fn mappings_of(&self, level: u8, frame: u64) -> Vec<(PageId, usize)> {
        let range = (level, frame, PageId(0), 0)..(level, frame + 1, PageId(0), 0);
        let found = self.mappings.range(range);
        found
            .map(|(_, _, id, index)| (*id, usize::from(*index)))
            .collect()
    }

    /// A mapping of memory in the inclusive range of guest frames, if there is one.
    pub(super) fn mapping_in(&self, first: u64, last: u64) -> Option<(PageId, usize)> {
        [1u8, 2].into_iter().find_map(|level| {
            let from = first & !((1 << (9 * (level - 1))) - 1);
            let range = (level, from, PageId(0), 0)..(level, last + 1, PageId(0), 0);
            let found = self.mappings.range(range).next();
            found.map(|(_, _, id, index)| (*id, usize::from(*index)))
        })
    }

    /// Sets an absent entry.
    pub(super) fn set<M: FrameMem>(
        &mut self,
        frames: &M,
        id: PageId,
        index: usize,
        slot: Slot,
        entry: u64,
    ) {
        let level = self[id].key.level;
        match slot.child {
            Child::Absent => {}
            Child::Table(child) => self[child].parents.push((id, index as u16)),
            Child::Memory(frame) => {
                self.mappings.insert((level, frame, id, index as u16));
            }
        }
        let page = &mut self[id];
        page.slots[index] = slot;
        frames.store(page.entry(index), entry);
    }

    /// Makes an entry absent, and returns what it led to.
    pub(super) fn clear<M: FrameMem>(&mut self, frames: &M, id: PageId, index: usize) -> Child {
        let page = &mut self[id];
        let child = core::mem::replace(&mut page.slots[index], EMPTY).child;
        let level = page.key.level;
        match child {
            Child::Absent => return child,
            Child::Table(child) => {
                let parents = &mut self[child].parents;
                if let Some(at) = parents.iter().position(|p| *p == (id, index as u16)) {
                    parents.swap_remove(at);
                }
            }
            Child::Memory(frame) => {
                self.mappings.remove(&(level, frame, id, index as u16));
            }
        }
        frames.store(self[id].entry(index), 0);
        child
    }

    /// Notes what the guest's entry has become without a change for ours.
    pub(super) fn note_guest(&mut self, id: PageId, index: usize, guest: u64) {
        self[id].slots[index].guest = guest;
    }
}
