//! States near the border of validity, each a pure function of the seed and its number.

use testudo_vmx::check::Rule;
use testudo_vmx::encoding::{Area, FieldWidth};
use testudo_vmx::{Encoding, VmxCaps, fields};

use crate::arena::{Arena, Frame};
use crate::state::{Change, Feature, MAX_CHANGES, Mode, State};

/// Makes states.
pub(crate) struct Generator<'a> {
    pub(crate) caps: &'a VmxCaps,
    pub(crate) arena: &'a Arena,
    /// The rules that this processor can show violated.
    pub(crate) rules: &'a [Rule],
}

/// Random numbers (SplitMix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        // The upper half, so that the product cannot overflow.
        (((self.next() >> 32) * bound as u64) >> 32) as usize
    }

    fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }
}

const MODES: &[Mode] = &[
    Mode::Compatibility,
    Mode::Protected,
    Mode::Pae,
    Mode::Virtual8086,
    Mode::Real,
    Mode::User,
];

impl Generator<'_> {
    /// State number `index` of the run with this seed. The first states are the valid one, and one
    /// for each rule that violates it alone.
    pub(crate) fn state(&self, seed: u64, index: u64) -> State {
        let mut state = State::default();
        if index == 0 {
            return state;
        }
        if let Some(&rule) = self.rules.get(index as usize - 1) {
            state.changes.push(Change::Violate(rule));
            return state;
        }
        let mut random = Random(seed.wrapping_mul(0xD134_2543_DE82_EF95) ^ index);
        random.next();
        if random.chance(50) {
            state.changes.push(Change::Mode(random.pick(MODES)));
        }
        for _ in 0..random.below(4) {
            state
                .changes
                .push(Change::Feature(random.pick(Feature::ALL)));
        }
        if random.chance(25) {
            self.event(&mut random, &mut state);
        }
        if random.chance(20) {
            self.blocking(&mut random, &mut state);
        }
        if random.chance(15) {
            self.privilege(&mut random, &mut state);
        }
        for _ in 0..random.pick(&[0, 1, 1, 1, 2, 2, 3]) {
            let change = if random.chance(30) {
                Change::Violate(random.pick(self.rules))
            } else {
                self.field(&mut random)
            };
            if state.changes.len() < MAX_CHANGES {
                state.changes.push(change);
            }
        }
        state
    }

    /// An event to be injected, mostly a well-formed one.
    fn event(&self, random: &mut Random, state: &mut State) {
        let kind = random.pick(&[0u64, 2, 3, 3, 3, 4, 5, 6, 7, 1]);
        let vector = match kind {
            2 => random.pick(&[2u64, 2, 2, 3]),
            3 => random.below(34) as u64,
            7 => random.pick(&[0u64, 0, 1]),
            _ if random.chance(25) => 18,
            _ => random.below(256) as u64,
        };
        let usual = kind == 3 && matches!(vector, 8 | 10..=14 | 17);
        let code = usual != random.chance(15);
        let mut information = 1 << 31 | kind << 8 | vector;
        if code {
            information |= 1 << 11;
        }
        if random.chance(5) {
            information ^= 1 << (12 + random.below(19));
        }
        let entry = fields::ENTRY_INTERRUPTION_INFORMATION.encoding();
        state.changes.push(Change::Set(entry, information));
        let length = random.pick(&[1u64, 2, 3, 15, 0, 16]);
        state.changes.push(Change::Set(
            fields::ENTRY_INSTRUCTION_LENGTH.encoding(),
            length,
        ));
        let error = random.pick(&[0u64, 2, 0x7FFF, 0x8000, 0xFFFF, 0x1_0000, 0x8000_0000]);
        state.changes.push(Change::Set(
            fields::ENTRY_EXCEPTION_ERROR_CODE.encoding(),
            error,
        ));
        if random.chance(60) {
            state
                .changes
                .push(Change::Flip(fields::GUEST_RFLAGS.encoding(), 1 << 9));
        }
    }

    /// Activity, interruptibility, and pending debug exceptions, related to one another.
    fn blocking(&self, random: &mut Random, state: &mut State) {
        let activity = random.pick(&[0u64, 0, 1, 1, 2, 3, 4]);
        let blocking = random.pick(&[0u64, 0, 0, 0, 0, 1, 2, 3, 4, 8, 8, 9, 10, 16, 32]);
        let pending = random.pick(&[
            0u64,
            1 << 14,
            1 << 12,
            1,
            1 << 16,
            1 << 12 | 1 << 16,
            1 << 11,
        ]);
        state.changes.push(Change::Set(
            fields::GUEST_ACTIVITY_STATE.encoding(),
            activity,
        ));
        state.changes.push(Change::Set(
            fields::GUEST_INTERRUPTIBILITY.encoding(),
            blocking,
        ));
        state
            .changes
            .push(Change::Set(fields::GUEST_PENDING_DEBUG.encoding(), pending));
        let flags = random.pick(&[0u64, 1 << 8, 1 << 9, 1 << 8 | 1 << 9]);
        state
            .changes
            .push(Change::Flip(fields::GUEST_RFLAGS.encoding(), flags));
        if random.chance(20) {
            state
                .changes
                .push(Change::Set(fields::GUEST_DEBUGCTL.encoding(), 2));
        }
    }

    /// Privilege levels and types of segments, related to one another.
    fn privilege(&self, random: &mut Random, state: &mut State) {
        let dpl = random.below(4) as u64;
        let near = |random: &mut Random| {
            if random.chance(70) {
                dpl
            } else {
                random.below(4) as u64
            }
        };
        let code = random.pick(&[0xA09Bu64, 0xA09F, 0xA099, 0xA09D, 0xC09B, 0xC09F, 0x93]);
        let (cs_dpl, cs_rpl) = (near(random), near(random));
        let (ss_dpl, ss_rpl) = (near(random), near(random));
        let data = random.pick(&[0xC093u64, 0xC097, 0xC09B, 0xC09F, 0xC091, 0x1_0000]);
        let (ds_dpl, ds_rpl) = (near(random), near(random));
        for (field, value) in [
            (
                fields::GUEST_CS_ACCESS_RIGHTS.encoding(),
                code | cs_dpl << 5,
            ),
            (fields::GUEST_CS_SELECTOR.encoding(), 8 | cs_rpl),
            (
                fields::GUEST_SS_ACCESS_RIGHTS.encoding(),
                0xC093 | ss_dpl << 5,
            ),
            (fields::GUEST_SS_SELECTOR.encoding(), 0x10 | ss_rpl),
            (
                fields::GUEST_DS_ACCESS_RIGHTS.encoding(),
                data | ds_dpl << 5,
            ),
            (fields::GUEST_DS_SELECTOR.encoding(), 0x10 | ds_rpl),
        ] {
            if state.changes.len() < MAX_CHANGES {
                state.changes.push(Change::Set(field, value));
            }
        }
    }

    /// A change of one field, of the kind that its class is sensitive to.
    fn field(&self, random: &mut Random) -> Change {
        loop {
            let field = random.pick(fields::FIELDS).encoding;
            let exists = field.info().is_some_and(|info| info.exists(self.caps));
            if exists && let Some(change) = self.change(field, random) {
                return change;
            }
        }
    }

    fn change(&self, field: Encoding, random: &mut Random) -> Option<Change> {
        let is = |one: Encoding| field == one;
        if field.area() == Area::ExitInformation
            // The traps that keep every guest from running, and what belongs to them.
            || is(fields::EXCEPTION_BITMAP.encoding())
            || is(fields::PAGE_FAULT_ERROR_CODE_MASK.encoding())
            || is(fields::PAGE_FAULT_ERROR_CODE_MATCH.encoding())
            || is(fields::PREEMPTION_TIMER_VALUE.encoding())
            // The processor walks as many MSRs as these say, wherever they are.
            || is(fields::EXIT_MSR_STORE_COUNT.encoding())
            || is(fields::EXIT_MSR_LOAD_COUNT.encoding())
            || is(fields::ENTRY_MSR_LOAD_COUNT.encoding())
            // Related to others; see `blocking`.
            || is(fields::GUEST_ACTIVITY_STATE.encoding())
        {
            return None;
        }
        if field.area() == Area::Host {
            return self.host(field, random);
        }
        if let Some(address) = self.address(field, random) {
            return Some(Change::Set(field, address));
        }
        if is(fields::EPT_POINTER.encoding()) {
            return Some(Change::Flip(field, 1 << random.below(12)));
        }
        if is(fields::EXIT_CONTROLS.encoding()) {
            // Without the host's IA32_EFER there is no way back from the guest's.
            let bit = random.pick(&[2u32, 9, 12, 15, 18, 19, 20, 22, 23, 0, 1, 5, 17, 28, 30]);
            return Some(Change::Flip(field, 1 << bit));
        }
        if random.chance(50) {
            let bits = field.width().bytes() * 8;
            return Some(Change::Flip(field, 1 << random.below(bits)));
        }
        Some(Change::Set(field, self.value(field, random)))
    }

    /// Host state that no processor accepts, or that makes no difference: everything else would not
    /// bring this program back.
    fn host(&self, field: Encoding, random: &mut Random) -> Option<Change> {
        let is = |one: Encoding| field == one;
        if is(fields::HOST_RSP.encoding()) || is(fields::HOST_SYSENTER_CS.encoding()) {
            return None;
        }
        if is(fields::HOST_CR0.encoding()) {
            // PE, NE and PG are fixed; WP and AM do not matter here; the upper half is reserved.
            return Some(Change::Flip(
                field,
                1 << random.pick(&[0, 5, 31, 16, 18, 32, 63]),
            ));
        }
        if is(fields::HOST_CR4.encoding()) {
            return Some(Change::Flip(
                field,
                1 << random.pick(&[5, 13, 24, 31, 32, 63]),
            ));
        }
        if is(fields::HOST_CR3.encoding()) {
            let width = usize::from(self.caps.processor.physical_address_bits);
            return Some(Change::Flip(field, 1 << (width + random.below(64 - width))));
        }
        if is(fields::HOST_EFER.encoding()) {
            return Some(Change::Flip(
                field,
                1 << random.pick(&[1, 8, 10, 12, 13, 14, 15, 32, 63]),
            ));
        }
        if is(fields::HOST_PAT.encoding()) {
            let shift = 8 * random.below(8);
            return Some(Change::Flip(
                field,
                random.pick(&[0x08u64, 0x80, 0x10]) << shift,
            ));
        }
        if is(fields::HOST_CS_SELECTOR.encoding()) || is(fields::HOST_TR_SELECTOR.encoding()) {
            return Some(if random.chance(50) {
                Change::Set(field, 0)
            } else {
                Change::Flip(field, 1 << random.below(3))
            });
        }
        if field.width() == FieldWidth::Bits16 {
            // Null selectors are as good as any in 64-bit mode.
            return Some(Change::Set(field, random.pick(&[0u64, 1, 2, 3, 4, 7])));
        }
        let sysenter =
            is(fields::HOST_SYSENTER_ESP.encoding()) || is(fields::HOST_SYSENTER_EIP.encoding());
        if sysenter && random.chance(50) {
            return Some(Change::Set(field, random.pick(CANONICAL)));
        }
        Some(Change::Set(field, random.pick(NOT_CANONICAL)))
    }

    /// A value for a field that holds the address of a structure.
    fn address(&self, field: Encoding, random: &mut Random) -> Option<u64> {
        let frame = |frame| self.arena.at(frame);
        let width = self.caps.processor.physical_address_bits;
        let beyond = 1u64 << width;
        if field == fields::GUEST_CR3.encoding() {
            let (zero, bad) = (frame(Frame::Zero), frame(Frame::BadPdpte));
            return Some(random.pick(&[zero, zero | 0x18, zero | 0xFE0, bad, beyond, 1 << 63]));
        }
        if field == fields::VMCS_LINK_POINTER.encoding() {
            let link = frame(Frame::Link);
            let (shadow, zero) = (frame(Frame::ShadowLink), frame(Frame::Zero));
            let vmcs = frame(Frame::Vmcs);
            return Some(random.pick(&[link, shadow, zero, vmcs, link | 1, beyond, u64::MAX]));
        }
        let scratch = frame(Frame::Scratch);
        let alignment = match field {
            f if f == fields::IO_BITMAP_A.encoding()
                || f == fields::IO_BITMAP_B.encoding()
                || f == fields::MSR_BITMAPS.encoding()
                || f == fields::PML_ADDRESS.encoding()
                || f == fields::VIRTUAL_APIC_ADDRESS.encoding()
                || f == fields::APIC_ACCESS_ADDRESS.encoding()
                || f == fields::EPTP_LIST_ADDRESS.encoding()
                || f == fields::VMREAD_BITMAP_ADDRESS.encoding()
                || f == fields::VMWRITE_BITMAP_ADDRESS.encoding()
                || f == fields::VE_INFORMATION_ADDRESS.encoding()
                || f == fields::SPP_TABLE_POINTER.encoding() =>
            {
                0x800
            }
            f if f == fields::POSTED_INTERRUPT_DESCRIPTOR_ADDRESS.encoding() => 0x20,
            f if f == fields::EXIT_MSR_STORE_ADDRESS.encoding() => {
                return Some(self.msr_area(Frame::StoredMsrs, random));
            }
            f if f == fields::EXIT_MSR_LOAD_ADDRESS.encoding()
                || f == fields::ENTRY_MSR_LOAD_ADDRESS.encoding() =>
            {
                return Some(self.msr_area(Frame::Msrs, random));
            }
            _ => return None,
        };
        Some(random.pick(&[scratch, scratch | alignment, scratch | 1, beyond, 1 << 63]))
    }

    /// An address that no MSR area may have. Another change can make it a valid one: it must be the
    /// area's own frame then, since a processor that finds no MSR's name on an exit shuts down.
    fn msr_area(&self, frame: Frame, random: &mut Random) -> u64 {
        let beyond = 1u64 << self.caps.processor.physical_address_bits;
        let area = self.arena.at(frame);
        random.pick(&[area | 1, area | 8, area | beyond, area | 1 << 63])
    }

    fn value(&self, field: Encoding, random: &mut Random) -> u64 {
        match field.width() {
            FieldWidth::Bits16 => random.pick(&[0u64, 3, 4, 7, 8, 0x10, 0xFF, 0x100, 0xFFFF]),
            FieldWidth::Bits32 => random.pick(&[
                0u64,
                1,
                0xFFF,
                0xFFFF,
                0x1_0000,
                0xF_FFFF,
                0x10_0000,
                0xFFF_FFFF,
                0xFFFF_FFFF,
                0x93,
                0x9B,
                0xF3,
                0xFB,
                0x1_0000,
                0xC093,
                0xA09B,
                0xC09B,
                0x82,
                0x83,
                0x8B,
            ]),
            FieldWidth::Bits64 | FieldWidth::Natural => match random.below(4) {
                0 => random.pick(CANONICAL),
                1 => random.pick(NOT_CANONICAL),
                2 => random.pick(&[0u64, 1, 0xFFFF_FFFF, 1 << 32, u64::MAX]),
                _ => random.next(),
            },
        }
    }
}

const CANONICAL: &[u64] = &[
    0,
    0x0000_7FFF_FFFF_FFFF,
    0xFFFF_8000_0000_0000,
    0xFFFF_FFFF_FFFF_FFFF,
    0x0000_1234_5678_9ABC,
];

const NOT_CANONICAL: &[u64] = &[
    0x0000_8000_0000_0000,
    0x0001_0000_0000_0000,
    0xFFFF_7FFF_FFFF_FFFF,
    0x8000_0000_0000_0000,
    0x7FFF_FFFF_FFFF_FFFF,
];
