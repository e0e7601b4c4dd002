//! The frames that are shared: what each holds, and how many pages use it.

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;

use testudo_arch::Hpa;

use super::ZERO;

/// One of the frames that pages share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Group(u32);

impl Group {
    /// The frame of zeros, which is always there.
    pub const ZERO: Self = Self(0);
}

/// Who looks at pages, of which each has a number: one for each table, or range of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Scanner(u32);

/// What sharing did, and what there is of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SharingStats {
    /// Pages looked at.
    pub scanned: u64,
    /// Pages that had changed since the round before.
    pub volatile: u64,
    /// Pages that looked equal to another's, or like zeros, and were not or did not stay so.
    pub mistaken: u64,
    /// Pages that have become users of a shared frame.
    pub merged: u64,
    /// Shared pages that were given back to their writers.
    pub broken: u64,
    /// Users of shared frames now.
    pub sharing: u64,
    /// Of these, users of the frame of zeros.
    pub zero: u64,
    /// Frames that are shared now, that of zeros among them.
    pub shared: u64,
}

impl SharingStats {
    /// The number of frames that sharing saves at the moment.
    pub const fn saved(&self) -> u64 {
        self.sharing.saturating_sub(self.shared)
    }
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    hash: u64,
    frame: Hpa,
    /// 0 for a place that nobody has.
    users: u32,
    /// The epoch in which it was founded or joined last; where there is no user, the next free place.
    rest: u32,
}

/// A page that was looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    hash: u64,
    owner: (u32, u64),
}

/// How many things with similar hashes are remembered: guests choose hashes, but not how long a search is.
const WAYS: usize = 8;
/// No group.
const NONE: u32 = u32::MAX;
/// For how many epochs a frame's only user waits for others.
const PATIENCE: u32 = 2;

/// The frames that pages of any number of tables share, by what they hold.
///
/// This is the account only. Whoever edits the tables does so in this order:
///
/// 1. A page whose [`digest`](super::digest) is [promising](Self::look) loses its write right
///    ([`PageTable::freeze_page`](crate::PageTable::freeze_page)).
/// 2. When that edit's flush is discharged, nobody can write to the page. If a [group](Self::group) has
///    its digest it [joins](Self::join) it, and if the contents are equal the page is led to that frame
///    ([`PageTable::redirect_page`](crate::PageTable::redirect_page)). If there is no group, the page's own
///    frame [becomes one](Self::found).
/// 3. When the flush of that edit is discharged, the page's old frame is free.
/// 4. On a write fault, the writer [takes the frame over](Self::take_over) if it is the only user. Else
///    its page is led to a copy and, when no processor uses the old translation, gets its write right back
///    ([`PageTable::thaw_page`](crate::PageTable::thaw_page)). It [leaves](Self::leave) the group when nobody
///    who read its page can look at the shared frame any more.
///
/// Its memory and the work of each call are bounded from the start, whatever the pages hold.
#[derive(Debug)]
pub struct SharedFrames {
    entries: Box<[Entry]>,
    free: u32,
    by_hash: Box<[[u32; WAYS]]>,
    seen: Box<[[Seen; WAYS]]>,
    /// What turns hashes into places, unknown to guests.
    seed: [u64; 2],
    /// Whose turn it is to be forgotten.
    victim: usize,
    /// Of each scanner whether it has been through its pages in this epoch.
    scanners: Vec<bool>,
    epoch: u32,
    zero_users: u64,
    others: (u64, u64),
    /// What has been done; the rest of it is filled in by [`Self::stats`].
    counts: SharingStats,
}

impl SharedFrames {
    /// For tables with so many pages in all, of which at most a quarter can become frames that others
    /// share. `zero` is a frame that holds zeros for good. `seed` is any number that guests do not know.
    pub fn new(zero: Hpa, pages: usize, seed: [u64; 2]) -> Self {
        let groups = (pages / 4).clamp(1, NONE as usize - 1);
        let mut entries = vec![
            Entry {
                hash: ZERO,
                frame: zero,
                users: 0,
                rest: NONE,
            };
            groups + 1
        ];
        for (place, entry) in entries.iter_mut().enumerate().skip(1) {
            entry.rest = if place == groups {
                NONE
            } else {
                place as u32 + 1
            };
        }
        let buckets = |count: usize| (count / WAYS + 1).next_power_of_two();
        let nobody = Seen {
            hash: ZERO,
            owner: (NONE, 0),
        };
        Self {
            entries: entries.into(),
            free: 1,
            by_hash: vec![[NONE; WAYS]; buckets(groups * 2)].into(),
            seen: vec![[nobody; WAYS]; buckets(pages)].into(),
            seed,
            victim: 0,
            scanners: Vec::new(),
            epoch: 0,
            zero_users: 0,
            others: (0, 0),
            counts: SharingStats::default(),
        }
    }

    /// One more that looks at pages.
    pub fn add_scanner(&mut self) -> Scanner {
        self.scanners.push(false);
        Scanner(self.scanners.len() as u32 - 1)
    }

    /// The scanner has been through all its pages, and begins anew.
    pub fn finish_round(&mut self, scanner: Scanner) {
        if let Some(done) = self.scanners.get_mut(scanner.0 as usize) {
            *done = true;
        }
        if self.scanners.iter().all(|done| *done) {
            self.scanners.fill(false);
            self.epoch = self.epoch.wrapping_add(1);
        }
    }

    /// What has been achieved.
    pub fn stats(&self) -> SharingStats {
        let (users, frames) = self.others;
        SharingStats {
            sharing: users + self.zero_users,
            zero: self.zero_users,
            shared: frames + 1,
            ..self.counts
        }
    }

    fn place(&self, hash: u64, buckets: usize) -> usize {
        let product = u128::from(hash ^ self.seed[0]) * u128::from(self.seed[1] | 1);
        (product as u64 ^ (product >> 64) as u64) as usize & (buckets - 1)
    }

    /// Whether a page with this digest may hold what another one holds, so that it is worth to be
    /// frozen. `page` is its number with the scanner.
    pub fn look(&mut self, digest: u64, scanner: Scanner, page: u64) -> bool {
        let owner = (scanner.0, page);
        self.counts.scanned += 1;
        if self.group(digest).is_some() {
            return true;
        }
        let bucket = self.place(digest, self.seen.len());
        let now = Seen {
            hash: digest,
            owner,
        };
        let seen = &mut self.seen[bucket];
        if let Some(known) = seen.iter_mut().find(|known| known.hash == digest) {
            // The other one may have changed since: it is not a reason twice.
            return core::mem::replace(&mut known.owner, owner) != owner;
        }
        // What the page held before is not its contents any more.
        let old = seen.iter().position(|known| known.owner == owner);
        let at = old.unwrap_or_else(|| {
            self.victim = (self.victim + 1) % WAYS;
            self.victim
        });
        seen[at] = now;
        false
    }

    /// Notes a page that has changed since the last round, and is not worth looking at now.
    pub fn note_volatile(&mut self) {
        self.counts.scanned += 1;
        self.counts.volatile += 1;
    }

    /// Notes a page that got its write right back unshared.
    pub fn note_mistaken(&mut self) {
        self.counts.mistaken += 1;
    }

    /// Notes a shared page that was written.
    pub fn note_broken(&mut self) {
        self.counts.broken += 1;
    }

    /// The group whose frame has this digest.
    pub fn group(&self, digest: u64) -> Option<Group> {
        if digest == ZERO {
            return Some(Group::ZERO);
        }
        let bucket = &self.by_hash[self.place(digest, self.by_hash.len())];
        let mut groups = bucket.iter().filter(|group| **group != NONE);
        let group = groups.find(|group| self.entries[**group as usize].hash == digest)?;
        Some(Group(*group))
    }

    /// Counts one more user, and gives the frame, which nobody writes to until it has left. `None` if it
    /// has as many users as can be counted.
    pub fn join(&mut self, group: Group) -> Option<Hpa> {
        let entry = &mut self.entries[group.0 as usize];
        if group == Group::ZERO {
            self.zero_users += 1;
        } else {
            entry.users = entry.users.checked_add(1)?;
            entry.rest = self.epoch;
            self.others.0 += 1;
        }
        self.counts.merged += 1;
        Some(entry.frame)
    }

    /// Makes a frozen page's own frame one that others can share; the page is its first user. `None` if
    /// no more are kept.
    pub fn found(&mut self, digest: u64, frame: Hpa) -> Option<Group> {
        if self.free == NONE || self.group(digest).is_some() {
            return None;
        }
        let bucket = self.place(digest, self.by_hash.len());
        let slot = self.by_hash[bucket]
            .iter_mut()
            .find(|slot| **slot == NONE)?;
        let group = self.free;
        *slot = group;
        let entry = &mut self.entries[group as usize];
        self.free = entry.rest;
        *entry = Entry {
            hash: digest,
            frame,
            users: 1,
            rest: self.epoch,
        };
        self.others.0 += 1;
        self.others.1 += 1;
        self.counts.merged += 1;
        Some(Group(group))
    }

    /// Whether the group's only user has waited so long for another that it may as well
    /// [take the frame over](Self::take_over): all scanners have been through all their pages meanwhile.
    pub fn is_lonely(&self, group: Group) -> bool {
        let entry = &self.entries[group.0 as usize];
        group != Group::ZERO && entry.users == 1 && self.epoch.wrapping_sub(entry.rest) > PATIENCE
    }

    /// Gives the frame to the user that asks, if it is the only one.
    pub fn take_over(&mut self, group: Group) -> Option<Hpa> {
        if group == Group::ZERO || self.entries[group.0 as usize].users != 1 {
            return None;
        }
        self.leave(group)
    }

    /// Counts one user less. The frame comes out if that was the last.
    pub fn leave(&mut self, group: Group) -> Option<Hpa> {
        if group == Group::ZERO {
            self.zero_users = self.zero_users.saturating_sub(1);
            return None;
        }
        let entry = self.entries[group.0 as usize];
        let users = entry.users.checked_sub(1)?;
        self.others.0 -= 1;
        self.entries[group.0 as usize].users = users;
        if users > 0 {
            return None;
        }
        let bucket = self.place(entry.hash, self.by_hash.len());
        for slot in &mut self.by_hash[bucket] {
            if *slot == group.0 {
                *slot = NONE;
            }
        }
        self.entries[group.0 as usize].rest = self.free;
        self.free = group.0;
        self.others.1 -= 1;
        Some(entry.frame)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FRAME: Hpa = Hpa(0x5000);

    fn account(pages: usize) -> SharedFrames {
        SharedFrames::new(Hpa(0x1000), pages, [3, 5])
    }

    #[test]
    fn a_page_is_promising_when_another_one_had_its_hash() {
        let mut frames = account(64);
        let [a, b] = [(); 2].map(|()| frames.add_scanner());
        assert!(!frames.look(77, a, 1), "the first of its kind");
        assert!(!frames.look(77, a, 1), "it is not its own twin");
        assert!(frames.look(77, b, 1));
        assert!(!frames.look(77, b, 1), "the other one may be gone");
        assert!(frames.look(77, a, 1), "it is not");
        assert!(!frames.look(79, a, 1));
        assert!(frames.look(ZERO, a, 1), "zeros always are");
        let group = frames.found(81, FRAME).unwrap();
        assert_eq!(frames.group(81), Some(group));
        assert!(frames.look(81, a, 1));
    }

    #[test]
    fn a_frame_is_its_users_until_the_last_has_left() {
        let mut frames = account(64);
        let group = frames.found(7, FRAME).unwrap();
        assert_eq!(frames.found(7, Hpa(0x6000)), None, "there is one");
        assert_eq!(frames.join(group), Some(FRAME));
        assert_eq!(frames.take_over(group), None);
        let stats = frames.stats();
        assert_eq!((stats.sharing, stats.shared, stats.saved()), (2, 2, 0));
        assert_eq!(frames.leave(group), None);
        assert_eq!(frames.take_over(group), Some(FRAME));
        assert_eq!(frames.group(7), None);
        assert_eq!((frames.stats().sharing, frames.stats().shared), (0, 1));
        let again = frames.found(9, Hpa(0x6000)).unwrap();
        assert_eq!(again, group, "the place is used again");
        assert_eq!(frames.leave(again), Some(Hpa(0x6000)));
    }

    #[test]
    fn the_frame_of_zeros_never_goes() {
        let mut frames = account(8);
        for _ in 0..3 {
            assert_eq!(frames.join(Group::ZERO), Some(Hpa(0x1000)));
        }
        for _ in 0..4 {
            assert_eq!(frames.take_over(Group::ZERO), None);
            assert_eq!(frames.leave(Group::ZERO), None);
        }
        assert!(!frames.is_lonely(Group::ZERO));
        assert_eq!(frames.stats().zero, 0);
    }

    #[test]
    fn a_user_that_stays_alone_gets_its_frame_back_in_time() {
        let mut frames = account(64);
        let [a, b] = [(); 2].map(|()| frames.add_scanner());
        let group = frames.found(7, FRAME).unwrap();
        for _ in 0..10 {
            frames.finish_round(a);
        }
        assert!(!frames.is_lonely(group), "the other scanner is slow");
        let lonely = [0; 4].map(|_| {
            frames.finish_round(b);
            frames.finish_round(a);
            frames.is_lonely(group)
        });
        assert_eq!(lonely, [false, false, true, true]);
        frames.join(group).unwrap();
        assert!(!frames.is_lonely(group));
        frames.leave(group);
        assert!(!frames.is_lonely(group), "it begins anew");
    }

    #[test]
    fn what_is_kept_is_bounded_whatever_the_hashes_are() {
        let mut frames = account(64);
        let founded = (1..10_000u64).filter_map(|hash| frames.found(hash, Hpa(hash << 12)));
        let groups: Vec<Group> = founded.collect();
        assert!((2..=16).contains(&groups.len()), "{}", groups.len());
        let scanner = frames.add_scanner();
        for page in 0..10_000 {
            frames.look(page << 20 | 1, scanner, page);
        }
        let frames_back: Vec<Hpa> = groups.iter().filter_map(|g| frames.leave(*g)).collect();
        assert_eq!(frames_back.len(), groups.len());
        assert_eq!(frames.stats().shared, 1);
        // All places are free again.
        let founded = (1..10_000u64).filter_map(|hash| frames.found(hash, Hpa(hash << 12)));
        assert_eq!(founded.count(), groups.len());
    }
}
