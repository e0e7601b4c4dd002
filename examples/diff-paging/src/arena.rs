//! The guest's memory, its second stage, and the entries that a case puts there.
//!
//! The guest has 2 MiB. They begin at the same offset of every gigabyte that the second stage maps, and
//! the linear address of the target has that offset too: the target is found through pages of any size, at
//! either stage, and no page that a case maps leads an access elsewhere.

use core::sync::atomic::{AtomicU64, Ordering};

use testudo_arch::memory::GuestRam;
use testudo_arch::regs::SystemRegisters;
use testudo_arch::segment::SegmentAttributes as A;
use testudo_arch::{DescriptorTable, Gpa, GuestMemory, Hpa, Segment};
use testudo_ept::format::{Format, Rights};
use testudo_ept::walk::{Mode, PagingState};
use testudo_rt::memory;

use crate::case::{Case, DataPlace, Instruction, Target};
use crate::processor::{Offers, Processor, Start};
use crate::words::{Owner, Prepared, Values, Word, Words};

const PAGE: u64 = 4096;
const MIB2: u64 = 2 << 20;
const GIB: u64 = 1 << 30;

/// The guest's frames, by what they hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
enum Frame {
    Root32 = 1,
    RootPae,
    Root4,
    Root5,
    /// The tables on the way to the code: of 32-bit paging, then of the others by level.
    Code32,
    Code1,
    Code2,
    Code3,
    /// The code itself.
    Code,
    /// The tables on the way to the target, of level 1 to 4.
    Table1,
    Table2,
    Table3,
    Table4,
    /// Where the target leads.
    Data,
    /// Where it leads after a change of the frame.
    Other,
}

/// The second stage's frames. None is aligned like a large page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
enum StageFrame {
    Root = 2,
    /// The first 512 GiB.
    Level3,
    /// The gigabyte where everything is mapped.
    Plain2,
    /// The path to the data.
    Data1,
    Data2,
    Data3,
    /// The path to a table of the guest.
    Table1,
    Table2,
}
const STAGE_FRAMES: u64 = StageFrame::Table2 as u64 + 1;

/// The gigabytes of guest-physical memory.
const PLAIN: u64 = 1;
const NEAR: u64 = 2;
const TABLE: u64 = 3;
const FAR: u64 = 514;
/// Nothing is mapped there.
pub(crate) const NOTHING: u64 = 0;

pub(crate) const PG: u64 = 1 << 31;
const PAE: u64 = 1 << 5;
const PSE: u64 = 1 << 4;
const LA57: u64 = 1 << 12;
pub(crate) const PKE: u64 = 1 << 22;
pub(crate) const PKS: u64 = 1 << 24;
const LONG: u64 = 1 << 8 | 1 << 10;

/// Present, writable, user.
const ALL: u64 = 7;
const ACCESSED_DIRTY: u64 = 0x60;
const LARGE: u64 = 0x80;

/// What the guest executes, sixteen bytes apart, and then CPUID.
const CODE: [(Instruction, &[u8]); 6] = [
    (Instruction::Read, &[0x8A, 0x01]),               // mov al, [rcx]
    (Instruction::Write, &[0x88, 0x01]),              // mov [rcx], al
    (Instruction::Modify, &[0x00, 0x01]),             // add [rcx], al
    (Instruction::LockedModify, &[0xF0, 0x00, 0x01]), // lock add [rcx], al
    (Instruction::LoadSegment, &[0x8E, 0xC2]),        // mov es, dx
    (Instruction::MarkSegment, &[0x8E, 0xC2]),
];
const CPUID: [u8; 2] = [0x0F, 0xA2];
/// What AL holds before the access.
pub(crate) const AL: u8 = 0x5A;
/// What is fetched: CPUID at the one place, UD2 at the other. They differ in the second byte.
pub(crate) const INSTRUCTIONS: [u64; 2] = [0xA20F_A20F_A20F_A20F, 0x0B0F_0B0F_0B0F_0B0F];
/// A flat data segment of privilege level 3, without the accessed bit.
pub(crate) const DESCRIPTOR: u64 = 0x00CF_F200_0000_FFFF;
/// The accessed bit of a descriptor.
pub(crate) const DESCRIPTOR_ACCESSED: u64 = 1 << 40;

/// See the [module](self).
pub(crate) struct Arena {
    /// The guest's 2 MiB.
    base: u64,
    stage: u64,
    /// Both, by host-physical address.
    pub(crate) memory: GuestRam,
}

impl Arena {
    /// Takes the memory and builds what all cases share.
    pub(crate) fn new<P: Processor>(processor: &P, plain: &Case) -> Option<Self> {
        let base = memory::reserve_zeroed(MIB2, MIB2)?;
        let stage = memory::reserve_zeroed(STAGE_FRAMES * PAGE, MIB2)?;
        if base.max(stage) + MIB2 > GIB {
            return None;
        }
        let mut ram = GuestRam::new();
        // SAFETY: both ranges are identity-mapped for good, ours alone, and reached through `ram` and
        // by guests only.
        unsafe {
            ram.add(Gpa(base), base as *mut u8, MIB2, true).ok()?;
            let len = STAGE_FRAMES * PAGE;
            ram.add(Gpa(stage), stage as *mut u8, len, true).ok()?;
        }
        let arena = Self {
            base,
            stage,
            memory: ram,
        };
        arena.build_code();
        arena.build_guest();
        arena.build_stage(&processor.stage(plain))?;
        Some(arena)
    }

    fn host(&self, frame: Frame) -> u64 {
        self.base + frame as u64 * PAGE
    }

    fn stage_frame(&self, frame: StageFrame) -> Hpa {
        Hpa(self.stage + frame as u64 * PAGE)
    }

    /// Stores to the arena, which all of these addresses are in.
    fn put(&self, at: u64, value: u64) {
        let stored = self.memory.store_u64(Gpa(at), value);
        debug_assert!(stored.is_ok());
    }

    fn put_narrow(&self, at: u64, value: u64) {
        let stored = self.memory.store_u32(Gpa(at), value as u32);
        debug_assert!(stored.is_ok());
    }

    fn build_code(&self) {
        for (index, (_, bytes)) in CODE.iter().enumerate() {
            let mut line = [0; 16];
            line[..bytes.len()].copy_from_slice(bytes);
            line[bytes.len()..bytes.len() + 2].copy_from_slice(&CPUID);
            let at = Gpa(self.host(Frame::Code) + index as u64 * 16);
            let written = self.memory.write(at, &line);
            debug_assert!(written.is_ok());
        }
    }

    /// The way to the code in every mode: a page of the supervisor's where the code lies, and one of the
    /// user's after it.
    fn build_guest(&self) {
        let code = self.host(Frame::Code);
        let gpa = |frame| PLAIN * GIB + self.host(frame);
        let table = |frame| gpa(frame) | ALL | ACCESSED_DIRTY;
        let index = |shift: u32, mask: u64| code >> shift & mask;
        self.put(self.host(Frame::Root5), table(Frame::Root4));
        self.put(self.host(Frame::Root4), table(Frame::Code3));
        self.put(self.host(Frame::Code3), table(Frame::Code2));
        let at = self.host(Frame::Code2) + 8 * index(21, 511);
        self.put(at, table(Frame::Code1));
        let at = self.host(Frame::Root32) + 4 * index(22, 1023);
        self.put_narrow(at, table(Frame::Code32));
        for user in 0..2 {
            let rights = ALL & !(4 * (1 - user)) | ACCESSED_DIRTY;
            let at = self.host(Frame::Code1) + 8 * (index(12, 511) + user);
            self.put(at, gpa(Frame::Code) | rights);
            let at = self.host(Frame::Code32) + 4 * (index(12, 1023) + user);
            self.put_narrow(at, gpa(Frame::Code) | rights);
        }
    }

    fn build_stage<F: Format<Input = Gpa>>(&self, format: &F) -> Option<()> {
        let flags = format.flags(Rights::all())?;
        let table = |frame, level| {
            let marks = format.accessed_bit();
            format.table_entry(self.stage_frame(frame), level) | marks
        };
        let root = self.stage_frame(StageFrame::Root).0;
        self.put(root, table(StageFrame::Level3, 4));
        let level3 = self.stage_frame(StageFrame::Level3).0;
        self.put(level3 + 8 * PLAIN, table(StageFrame::Plain2, 3));
        let plain = self.stage_frame(StageFrame::Plain2).0 + 8 * (self.base >> 21 & 511);
        self.put(plain, format.leaf_entry(Hpa(self.base), 2, flags));
        Some(())
    }

    /// The guest-physical gigabyte of the data.
    fn data_gib(case: &Case) -> u64 {
        match case.data {
            DataPlace::Plain => PLAIN,
            DataPlace::Near(_) => NEAR,
            DataPlace::Far(_) => FAR,
        }
    }

    /// The frame of the guest's table of a level on the way to the target.
    fn table_frame(mode: Mode, level: u8) -> Frame {
        match (mode, level) {
            (Mode::Legacy, 2) => Frame::Root32,
            (Mode::Pae, 3) => Frame::RootPae,
            (Mode::Level4, 4) => Frame::Root4,
            (Mode::Level5, 5) => Frame::Root5,
            (_, 1) => Frame::Table1,
            (_, 2) => Frame::Table2,
            (_, 3) => Frame::Table3,
            _ => Frame::Table4,
        }
    }

    /// The guest-physical address of that table.
    fn table_gpa(&self, case: &Case, level: u8) -> u64 {
        let apart = case.table.is_some_and(|place| place.table == level);
        let gib = if apart { TABLE } else { PLAIN };
        gib * GIB + self.host(Self::table_frame(case.mode, level))
    }

    /// Frames that an entry of the guest may be changed to refer to: as bits of the entry.
    pub(crate) fn other_frames(&self) -> [u64; 4] {
        [
            PLAIN * GIB + self.host(Frame::Other),
            PLAIN * GIB + self.host(Frame::Table1),
            NOTHING * GIB + self.host(Frame::Data),
            NEAR * GIB + self.host(Frame::Other),
        ]
    }

    /// The linear address before the changes to it.
    fn linear(&self, case: &Case) -> u64 {
        let data = self.host(Frame::Data) + case.offset;
        let upper = case.upper;
        match case.mode {
            Mode::Off => Self::data_gib(case) * GIB + data,
            // The code is in the first gigabyte.
            Mode::Legacy => (256 + upper % 768) << 22 | data & 0x3F_FFFF,
            Mode::Pae => (1 + upper % 3) << 30 | data,
            Mode::Level4 => sign_extend((512 + upper % (511 * 512)) << 30 | data, 48),
            Mode::Level5 => {
                let index = (1 << 18) + upper % (511 << 18);
                sign_extend(index << 30 | data, 57)
            }
        }
    }

    /// The guest's entry at a level, before the changes to it.
    fn guest_entry(&self, case: &Case, level: u8) -> u64 {
        let (mode, leaf) = (case.mode, case.leaf);
        let rights = match (mode, level) {
            (Mode::Pae, 3) => 1,
            _ => ALL,
        };
        if level > leaf {
            return self.table_gpa(case, level - 1) | rights;
        }
        let data = Self::data_gib(case) * GIB + self.host(Frame::Data);
        let page = data & !((1 << mode.shift(level)) - 1);
        match (mode, level) {
            (_, 1) => page | rights,
            (Mode::Legacy, _) => page & 0xFFFF_FFFF | (page >> 32 & 0xFF) << 13 | rights | LARGE,
            _ => page | rights | LARGE,
        }
    }

    /// Puts a case's words into a list, in the order from the top.
    fn guest_words(&self, case: &Case, linear: u64, words: &mut Words) {
        let mode = case.mode;
        if mode == Mode::Pae {
            words.push(Word {
                owner: Owner::Code,
                at: Gpa(self.host(Frame::RootPae)),
                value: (PLAIN * GIB + self.host(Frame::Code2)) | 1,
                narrow: false,
            });
        }
        for level in (case.leaf.max(1)..=mode.levels()).rev() {
            let narrow = mode == Mode::Legacy;
            let (size, mask) = match (mode, level) {
                (Mode::Legacy, _) => (4, 1023),
                (Mode::Pae, 3) => (8, 3),
                _ => (8, 511),
            };
            let index = linear >> mode.shift(level) & mask;
            let frame = Self::table_frame(mode, level);
            let entry = self.guest_entry(case, level);
            let value = case.changed(Target::Guest(level), entry);
            words.push(Word {
                owner: Owner::Guest(level),
                at: Gpa(self.host(frame) + index * size),
                value: if narrow { value & 0xFFFF_FFFF } else { value },
                narrow,
            });
        }
    }

    /// The entries of the second stage on the way to the data, and to the table that is set apart.
    fn stage_words<F: Format<Input = Gpa>>(&self, case: &Case, format: &F, words: &mut Words) {
        use StageFrame as S;
        let Some(flags) = format.flags(Rights::all()) else {
            return;
        };
        let flags = format.leaf_entry(Hpa(0), 1, flags) & !format.accessed_bit();
        let flags = flags & !format.dirty_bit();
        let mut push = |owner, target, table, gpa: u64, level: u8, leaf: u8, child, host: u64| {
            let entry = if level > leaf {
                let entry = format.table_entry(self.stage_frame(child), level);
                entry & !format.accessed_bit() & !format.dirty_bit()
            } else {
                let page = host & !((1 << (3 + 9 * u32::from(level))) - 1);
                page | flags | if level > 1 { LARGE } else { 0 }
            };
            let index = gpa >> (3 + 9 * u32::from(level)) & 511;
            words.push(Word {
                owner,
                at: Gpa(self.stage_frame(table).0 + 8 * index),
                value: case.changed(target, entry),
                narrow: false,
            });
        };
        let host = self.host(Frame::Data);
        let (gib, top, leaf) = match case.data {
            DataPlace::Plain => (0, 0, 1),
            DataPlace::Near(leaf) => (NEAR, 3, leaf),
            DataPlace::Far(leaf) => (FAR, 4, leaf),
        };
        for level in (leaf..=top).rev() {
            let (table, child) = match level {
                4 => (S::Root, S::Data3),
                3 if top == 3 => (S::Level3, S::Data2),
                3 => (S::Data3, S::Data2),
                2 => (S::Data2, S::Data1),
                _ => (S::Data1, S::Data1),
            };
            let (owner, target) = (Owner::Data(level), Target::Data(level));
            let gpa = gib * GIB + host;
            push(owner, target, table, gpa, level, leaf, child, host);
        }
        let Some(place) = case.table else { return };
        let host = self.host(Self::table_frame(case.mode, place.table));
        for level in (place.leaf..=3).rev() {
            let (table, child) = match level {
                3 => (S::Level3, S::Table2),
                2 => (S::Table2, S::Table1),
                _ => (S::Table1, S::Table1),
            };
            let (owner, target) = (Owner::Table(level), Target::Table(level));
            let gpa = TABLE * GIB + host;
            push(owner, target, table, gpa, level, place.leaf, child, host);
        }
    }

    fn content(case: &Case) -> [u64; 2] {
        match case.instruction {
            Instruction::Fetch => INSTRUCTIONS,
            Instruction::LoadSegment => [DESCRIPTOR | DESCRIPTOR_ACCESSED; 2],
            Instruction::MarkSegment => [DESCRIPTOR; 2],
            _ => [0x1716_1514_1312_1110, 0x2726_2524_2322_2120],
        }
    }

    /// The registers and words of a case.
    pub(crate) fn prepare<P: Processor>(&self, case: &Case, processor: &P) -> Prepared {
        let offers = processor.offers();
        let linear = self.linear(case);
        let target = case.changed(Target::Linear, linear);
        let mut words = Words::new();
        self.guest_words(case, linear, &mut words);
        self.stage_words(case, &processor.stage(case), &mut words);
        let [data, other] = Self::content(case);
        for (frame, value) in [(Frame::Data, data), (Frame::Other, other)] {
            words.push(Word {
                owner: Owner::Content,
                at: Gpa(self.host(frame) + (case.offset & !7)),
                value,
                narrow: false,
            });
        }
        // A change may lead a write to this table too, where an entry of the case's may lie: of 32-bit
        // paging, in one half of eight bytes.
        let at = self.host(Frame::Table1) + (case.offset & !7);
        for half in [at, at + 4] {
            let holds = |word: &Word| word.at.0 == half || !word.narrow && word.at.0 == at;
            if !words.iter().any(holds) {
                words.push(Word {
                    owner: Owner::Content,
                    at: Gpa(half),
                    value: 0,
                    narrow: true,
                });
            }
        }
        let line = CODE.iter().position(|(of, _)| *of == case.instruction);
        let mut code = self.host(Frame::Code) + 16 * line.unwrap_or(0) as u64;
        if case.mode == Mode::Off {
            code += PLAIN * GIB;
        } else if case.user {
            code += PAGE;
        }
        let system = self.system(case, offers, code, target);
        let with = |bit| system.cr4 & bit != 0;
        let pkru = with(PKE).then(|| case.changed(Target::Pkru, 0) as u32);
        let pkrs = with(PKS).then(|| case.changed(Target::Pkrs, 0) as u32);
        let pdptes = (case.mode == Mode::Pae && offers.pdpte_registers).then(|| {
            let mut pdptes = [(PLAIN * GIB + self.host(Frame::Code2)) | 1, 0, 0, 0];
            let entry = words.iter().find(|word| word.owner == Owner::Guest(3));
            pdptes[(linear >> 30 & 3) as usize] = entry.map_or(0, |word| word.value);
            pdptes
        });
        Prepared {
            start: Start {
                rax: AL.into(),
                rcx: target,
                rdx: 8 | if case.user { 3 } else { 0 },
                pkru,
                pkrs,
                pdptes,
                data: Gpa(Self::data_gib(case) * GIB + self.host(Frame::Data)),
                stage: self.stage_frame(StageFrame::Root),
                system,
            },
            paging: PagingState {
                cr0: system.cr0,
                cr3: system.cr3,
                cr4: system.cr4,
                efer: system.efer,
                alignment_check: system.rflags & 1 << 18 != 0,
                pkru: pkru.unwrap_or(0),
                pkrs: pkrs.unwrap_or(0),
                physical_bits: offers.physical_bits,
                gigabyte_pages: offers.gigabyte_pages,
                pdptes,
            },
            code,
            target,
            words,
        }
    }

    fn system(&self, case: &Case, offers: &Offers, code: u64, target: u64) -> SystemRegisters {
        let (mode, dpl) = (case.mode, if case.user { 3 } else { 0 });
        let long = matches!(mode, Mode::Level4 | Mode::Level5);
        let (cr4, efer) = match mode {
            Mode::Off => (0, 0),
            Mode::Legacy => (PSE, 0),
            Mode::Pae => (PAE, 0),
            Mode::Level4 => (PAE, LONG),
            Mode::Level5 => (PAE | LA57, LONG),
        };
        let paging = if mode == Mode::Off { 0 } else { PG };
        let attributes = if long { A::CODE64 } else { A::CODE32 };
        let selector = |index: u16| index | dpl;
        let fetch = case.instruction == Instruction::Fetch;
        let data = Segment::flat(selector(0x10), A::DATA.with_dpl(dpl as u8));
        let gdt = if case.instruction.is_implicit() {
            target.wrapping_sub(8)
        } else {
            0
        };
        let root = match mode {
            Mode::Off => 0,
            _ => self.table_gpa(case, mode.levels()),
        };
        SystemRegisters {
            es: data,
            cs: Segment::flat(selector(8), attributes.with_dpl(dpl as u8)),
            ss: data,
            ds: data,
            fs: data,
            gs: data,
            ldtr: Segment {
                attributes: A::UNUSABLE,
                ..Segment::default()
            },
            tr: Segment {
                selector: 0x18,
                limit: 0x67,
                ..Segment::flat(0, A::TSS_BUSY)
            },
            gdtr: DescriptorTable {
                base: gdt,
                limit: 0xFFFF,
            },
            cr0: case.changed(Target::Cr0, offers.cr0_ones | paging | 1),
            cr3: root,
            cr4: case.changed(Target::Cr4, cr4 | offers.cr4_ones),
            efer: case.changed(Target::Efer, efer | offers.efer_ones),
            rip: if fetch { target } else { code },
            rflags: case.changed(Target::Rflags, 2),
            dr6: 0xFFFF_0FF0,
            dr7: 0x400,
            ..SystemRegisters::default()
        }
    }

    /// Puts the words in place.
    pub(crate) fn store(&self, words: &Words) {
        for word in words {
            if word.narrow {
                self.put_narrow(word.at.0, word.value);
            } else {
                self.put(word.at.0, word.value);
            }
        }
    }

    /// What the words hold now.
    pub(crate) fn load(&self, words: &Words) -> Values {
        let load = |word: &Word| {
            let loaded = if word.narrow {
                self.memory.load_u32(word.at).map(u64::from)
            } else {
                self.memory.load_u64(word.at)
            };
            loaded.unwrap_or_default()
        };
        words.iter().map(load).collect()
    }

    /// Takes the words out again.
    pub(crate) fn clear(&self, words: &Words) {
        for word in words {
            if word.narrow {
                self.put_narrow(word.at.0, 0);
            } else {
                self.put(word.at.0, 0);
            }
        }
    }

    /// A digest of all tables: between cases it is always the same, or somebody wrote where no
    /// case has anything.
    pub(crate) fn digest(&self) -> u64 {
        let ranges = [
            (self.base, (Frame::Other as u64 + 1) * PAGE),
            (self.stage, STAGE_FRAMES * PAGE),
        ];
        let mut digest = 0u64;
        for (start, len) in ranges {
            for at in (start..start + len).step_by(8) {
                // SAFETY: an aligned word of the arena, which only atomics and guests touch.
                let word = unsafe { AtomicU64::from_ptr(at as *mut u64) };
                digest = digest.rotate_left(5) ^ word.load(Ordering::Relaxed);
            }
        }
        digest
    }
}

fn sign_extend(linear: u64, bits: u32) -> u64 {
    ((linear << (64 - bits)) as i64 >> (64 - bits)) as u64
}
