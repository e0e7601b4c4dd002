//! Random states near the border: each is a function of the seed and its number.

use testudo_diff::Random;
use testudo_svm::caps::{Features, SvmCaps};
use testudo_svm::check::Rule;
use testudo_svm::vmcb::{FieldInfo, Vmcb};

use crate::arena::Arena;
use crate::state::{CD, Change, LMA, LME, Mode, NW, PAE, PE, PG, SVME, State, Target};

/// A field by its name, found at compile time.
const fn field(name: &str) -> &'static FieldInfo {
    let mut i = 0;
    while i < Vmcb::FIELDS.len() {
        if equal(Vmcb::FIELDS[i].name.as_bytes(), name.as_bytes()) {
            return &Vmcb::FIELDS[i];
        }
        i += 1;
    }
    panic!("the VMCB has no such field")
}

const fn equal(a: &[u8], b: &[u8]) -> bool {
    if a.len() != b.len() {
        return false;
    }
    let mut i = 0;
    while i < a.len() {
        if a[i] != b[i] {
            return false;
        }
        i += 1;
    }
    true
}

macro_rules! fields {
    ($($constant:ident = $name:literal;)*) => {
        $(const $constant: Target = Target::Field(field($name));)*
    };
}

fields! {
    MISC2 = "intercept_misc2";
    IOPM = "iopm_base_pa";
    MSRPM = "msrpm_base_pa";
    ASID = "asid";
    TLB_CONTROL = "tlb_control";
    INTERRUPTS = "virtual_interrupts";
    SHADOW = "interrupt_state";
    NESTED = "nested_control";
    EVENT = "event_inj";
    N_CR3 = "n_cr3";
    CPL = "cpl";
    EFER = "efer";
    CR0 = "cr0";
    CR3 = "cr3";
    CR4 = "cr4";
    DR6 = "dr6";
    DR7 = "dr7";
    RFLAGS = "rflags";
    G_PAT = "g_pat";
    S_CET = "s_cet";
    BACKING_PAGE = "avic_backing_page";
}

const CS_LONG: u64 = 1 << 9;
const CS_DEFAULT: u64 = 1 << 10;
const HIGH_HALF: u64 = 0xFFFF_FFFF << 32;
const EVENT_VALID: u64 = 1 << 31;

/// Whether a rule can be broken at all on a processor with these features, by a program in long
/// mode.
pub(crate) fn is_reachable(rule: Rule, caps: &SvmCaps) -> bool {
    match rule {
        Rule::LongModeSupported => !caps.long_mode,
        // The host is this program, and it runs with paging.
        Rule::NestedPagingNeedsPaging => false,
        Rule::NCr3Reserved | Rule::GPatTypes => caps.has(Features::NP),
        Rule::X2AvicNeedsAvic => caps.has(Features::X2AVIC),
        Rule::AvicBackingPage
        | Rule::AvicLogicalTable
        | Rule::AvicPhysicalTable
        | Rule::AvicMaxIndex => caps.has(Features::AVIC),
        Rule::VnmiNeedsIntercept => caps.has(Features::V_NMI),
        Rule::SCetReserved | Rule::CetNeedsWriteProtect => caps.cr4_valid & 1 << 23 != 0,
        // They need the MSR U_CET, or an encrypted guest.
        Rule::ShadowStackInVirtual8086 | Rule::UCetReserved => false,
        _ => true,
    }
}

/// Makes states.
pub(crate) struct Generator<'a> {
    pub(crate) caps: &'a SvmCaps,
    pub(crate) arena: &'a Arena,
    pub(crate) rules: &'a [Rule],
}

impl Generator<'_> {
    /// State number `index` under `seed`.
    pub(crate) fn state(&self, seed: u64, index: u64) -> State {
        let random = &mut Random::new(seed, index);
        let mut state = State {
            mode: random.pick(&Mode::ALL),
            nested_paging: self.caps.has(Features::NP) && random.one_in(2),
            changes: Default::default(),
        };
        // Mostly one thing at a time: that is where a border shows.
        let steps = random.pick(&[1, 1, 1, 1, 2, 2, 3]);
        for _ in 0..steps {
            match random.below(10) {
                0..5 => {
                    let rule = random.pick(self.rules);
                    self.break_rule(rule, random, &mut state);
                }
                5..8 => {
                    let rule = random.pick(self.rules);
                    self.approach_rule(rule, random, &mut state);
                }
                _ => self.add_noise(random, &mut state),
            }
        }
        state
    }

    /// Changes that break a rule.
    fn break_rule(&self, rule: Rule, random: &mut Random, state: &mut State) {
        let limit = self.caps.physical_limit();
        let beyond = !(limit - 1);
        let mut change = |target, clear, set| {
            // A state has room for every step that `state` takes; more would be dropped.
            let _ = state.changes.try_push(Change { target, clear, set });
        };
        match rule {
            Rule::EferSvme => change(EFER, SVME, 0),
            Rule::Cr0CacheMode => change(CR0, CD, NW),
            Rule::Cr0High => change(CR0, 0, random.bit_of(HIGH_HALF)),
            Rule::Cr3Reserved => change(CR3, 0, random.bit_of(beyond)),
            Rule::Cr4Reserved => change(CR4, 0, random.bit_of(!self.caps.cr4_valid)),
            Rule::Dr6High => change(DR6, 0, random.bit_of(HIGH_HALF)),
            Rule::Dr7High => change(DR7, 0, random.bit_of(HIGH_HALF)),
            Rule::EferReserved => {
                let defined = self.caps.efer_valid | SVME | LME | LMA;
                change(EFER, 0, random.bit_of(!defined));
            }
            Rule::LongModeSupported => change(EFER, 0, random.pick(&[LME, LMA])),
            Rule::LongModeNeedsPae => {
                change(EFER, 0, LME);
                change(CR0, 0, PG | PE);
                change(CR4, PAE, 0);
                change(CR3, u64::MAX, self.arena.long_cr3());
            }
            Rule::LongModeNeedsProtection => {
                change(EFER, 0, LME);
                change(CR0, PE, PG);
                change(CR4, 0, PAE);
                change(CR3, u64::MAX, self.arena.long_cr3());
            }
            Rule::CodeSegmentSize => {
                change(EFER, 0, LME | LMA);
                change(CR0, 0, PG | PE);
                change(CR4, 0, PAE);
                change(CR3, u64::MAX, self.arena.long_cr3());
                change(Target::CsAttributes, 0, CS_LONG | CS_DEFAULT);
            }
            Rule::VmrunIntercept => change(MISC2, 1, 0),
            Rule::MsrpmAddress => {
                let far = random.bit_of(beyond);
                let address = random.pick(&[limit - 0x1000, limit, far, !0xFFF, u64::MAX]);
                change(MSRPM, u64::MAX, address);
            }
            Rule::IopmAddress => {
                let far = random.bit_of(beyond);
                let addresses = [limit - 0x2000, limit - 0x1000, limit, far, !0xFFF, u64::MAX];
                change(IOPM, u64::MAX, random.pick(&addresses));
            }
            Rule::EventType => {
                let kind = random.pick(&[1, 5, 6, 7]);
                let vector = random.below(256);
                change(EVENT, u64::MAX, EVENT_VALID | kind << 8 | vector);
            }
            Rule::EventVector => {
                let vector = match random.below(2) {
                    0 => random.pick(&[2, 9, 15, 20, 22, 23, 24, 25, 26, 27, 31, 29, 21]),
                    _ => 32 + random.below(224),
                };
                change(EVENT, u64::MAX, EVENT_VALID | 3 << 8 | vector);
            }
            Rule::EventPossible => {
                change(EFER, 0, LME | LMA);
                change(CR0, 0, PG | PE);
                change(CR4, 0, PAE);
                change(CR3, u64::MAX, self.arena.long_cr3());
                change(Target::CsAttributes, CS_DEFAULT, CS_LONG);
                let vector = random.pick(&[4, 5]);
                change(EVENT, u64::MAX, EVENT_VALID | 3 << 8 | vector);
            }
            Rule::AsidNotZero => change(ASID, u64::MAX, 0),
            Rule::NCr3Reserved => {
                change(NESTED, 0, 1);
                change(N_CR3, 0, random.bit_of(beyond));
            }
            Rule::GPatTypes => {
                change(NESTED, 0, 1);
                let bad = random.pick(&[2, 3, 8, 0x10, 0x86, 0xFF]);
                let shift = 8 * random.below(8);
                change(G_PAT, 0xFF << shift, bad << shift);
            }
            Rule::PdpeReserved => {
                change(NESTED, 1, 0);
                change(EFER, LME | LMA, 0);
                change(CR0, 0, PG | PE);
                change(CR4, 0, PAE);
                change(CR3, u64::MAX, self.arena.pae_cr3());
                change(Target::CsAttributes, CS_LONG, CS_DEFAULT);
                let reserved = random.bit_of(0b1_1110_0110 | beyond);
                change(Target::Pdpe(random.below(4)), 0, reserved | 1);
            }
            Rule::SCetReserved => change(S_CET, 0, random.bit_of(!0b11)),
            Rule::CetNeedsWriteProtect => {
                change(CR4, 0, 1 << 23);
                change(CR0, 1 << 16, 0);
            }
            _ => self.add_noise(random, state),
        }
    }

    /// Changes that come as near to breaking a rule as is legal, if nothing else is changed.
    fn approach_rule(&self, rule: Rule, random: &mut Random, state: &mut State) {
        let limit = self.caps.physical_limit();
        // Bits that address no memory of this machine but are legal.
        let far = limit - (1 << 36);
        let mut change = |target, clear, set| {
            let _ = state.changes.try_push(Change { target, clear, set });
        };
        match rule {
            Rule::EferSvme | Rule::EferReserved | Rule::LongModeSupported => {
                change(EFER, 0, random.bit_of(self.caps.efer_valid & !(LME | LMA)));
            }
            Rule::Cr0CacheMode => {
                let set = random.pick(&[CD, CD | NW]);
                change(CR0, 0, set);
            }
            Rule::Cr0High => change(CR0, 0, random.bit_of(0xFFFF_FFFF & !(PG | PE | NW))),
            Rule::Cr3Reserved => change(CR3, 0, random.bit_of(far)),
            Rule::Cr4Reserved => change(CR4, 0, random.bit_of(self.caps.cr4_valid & !PAE)),
            Rule::Dr6High => change(DR6, u64::MAX, random.next() & 0xFFFF_FFFF),
            Rule::Dr7High => change(DR7, u64::MAX, random.next() & 0xFFFF_FFFF),
            // One condition of three is not enough.
            Rule::LongModeNeedsPae => change(EFER, LMA, if random.one_in(2) { LME } else { 0 }),
            Rule::LongModeNeedsProtection => change(CR0, PG, PE),
            Rule::CodeSegmentSize => {
                let bits = random.pick(&[CS_LONG, CS_DEFAULT, CS_LONG | CS_DEFAULT]);
                change(Target::CsAttributes, CS_LONG | CS_DEFAULT, bits);
            }
            Rule::VmrunIntercept => change(MISC2, u64::MAX, 1),
            Rule::MsrpmAddress => {
                let low = random.below(4096);
                change(
                    MSRPM,
                    u64::MAX,
                    limit - random.pick(&[0x2000, 0x3000]) + low,
                );
            }
            Rule::IopmAddress => {
                let low = random.below(4096);
                change(IOPM, u64::MAX, limit - random.pick(&[0x3000, 0x4000]) + low);
            }
            Rule::EventType => {
                let kind = random.pick(&[0, 2, 4]);
                let event = EVENT_VALID | kind << 8 | random.below(256);
                change(EVENT, u64::MAX, event);
            }
            Rule::EventVector => {
                let vectors = [0, 1, 3, 6, 7, 8, 10, 11, 12, 13, 14, 16, 17, 18, 19, 28, 30];
                let event = EVENT_VALID | 3 << 8 | random.pick(&vectors);
                change(EVENT, u64::MAX, event | random.below(2) << 11);
            }
            Rule::EventPossible => {
                let event = EVENT_VALID | 3 << 8 | random.pick(&[3, 4, 5]);
                change(EVENT, u64::MAX, event);
            }
            Rule::AsidNotZero => change(ASID, u64::MAX, 1 + random.below(u64::from(u32::MAX))),
            Rule::NCr3Reserved => change(N_CR3, 0, random.bit_of(far)),
            Rule::GPatTypes => {
                let types = [0, 1, 4, 5, 6, 7];
                let pat = [0; 8].map(|_: u8| random.pick(&types));
                change(G_PAT, u64::MAX, u64::from_le_bytes(pat));
            }
            Rule::PdpeReserved => {
                // Not present: then nothing is reserved.
                let junk = random.next() & !1;
                change(Target::Pdpe(1 + random.below(3)), u64::MAX, junk);
            }
            _ => self.add_noise(random, state),
        }
    }

    /// Changes that VMRUN does not look at, or not alone.
    fn add_noise(&self, random: &mut Random, state: &mut State) {
        let mut change = |target, clear, set| {
            let _ = state.changes.try_push(Change { target, clear, set });
        };
        match random.below(12) {
            0 => change(TLB_CONTROL, u64::MAX, random.below(256)),
            // V_IRQ and its like, AVIC bits of a processor without it, and reserved ones; the
            // masking of interrupts stays.
            1 => {
                let bits = random.next() & !(1 << 24);
                let avic = if self.caps.has(Features::AVIC) {
                    3 << 30
                } else {
                    0
                };
                change(INTERRUPTS, 0, bits & !avic);
            }
            2 => change(SHADOW, 0, 1),
            // Bits 30:12 of EVENTINJ are reserved, "should be zero"; without the valid bit,
            // nothing in it counts.
            3 => change(EVENT, 0, random.next() & 0x7FFF_F000),
            4 => change(EVENT, u64::MAX, random.next() & !EVENT_VALID),
            // Not nested paging's own enable bit: these two count only with it.
            5 if !state.nested_paging => change(N_CR3, u64::MAX, random.next()),
            6 if !state.nested_paging => change(G_PAT, u64::MAX, random.next()),
            7 => change(CPL, u64::MAX, random.below(4)),
            // Flags other than VM, and reserved bits.
            8 => change(RFLAGS, 0, random.next() & 0x3D_7FD5 & !(1 << 8)),
            9 if self.caps.cr4_valid & 1 << 23 == 0 => change(S_CET, u64::MAX, random.next()),
            10 if !self.caps.has(Features::AVIC) => {
                change(BACKING_PAGE, u64::MAX, random.next());
            }
            _ => change(CR0, 0, random.bit_of(0xFFFF_FFFF & !(PG | PE | NW))),
        }
    }
}
