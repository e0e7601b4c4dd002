//! Arithmetic and its flags, for operands of 1, 2, 4 and 8 bytes (SDM vol. 1, appendix A).

pub(super) const CF: u64 = 1 << 0;
pub(super) const PF: u64 = 1 << 2;
pub(super) const AF: u64 = 1 << 4;
pub(super) const ZF: u64 = 1 << 6;
pub(super) const SF: u64 = 1 << 7;
pub(super) const TF: u64 = 1 << 8;
pub(super) const DF: u64 = 1 << 10;
pub(super) const OF: u64 = 1 << 11;

/// The flags that arithmetic changes.
pub(super) const STATUS: u64 = CF | PF | AF | ZF | SF | OF;

/// The value's low `size` bytes.
#[inline]
pub(super) const fn truncate(value: u64, size: usize) -> u64 {
    value & mask(size)
}

/// All ones in `size` bytes.
#[inline]
pub(super) const fn mask(size: usize) -> u64 {
    match size {
        1 => 0xFF,
        2 => 0xFFFF,
        4 => 0xFFFF_FFFF,
        _ => u64::MAX,
    }
}

/// The highest bit of `size` bytes.
#[inline]
pub(super) const fn sign_bit(size: usize) -> u64 {
    mask(size) ^ (mask(size) >> 1)
}

/// The low `size` bytes as a signed number.
#[inline]
pub(super) const fn sign_extend(value: u64, size: usize) -> u64 {
    match size {
        1 => value as u8 as i8 as i64 as u64,
        2 => value as u16 as i16 as i64 as u64,
        4 => value as u32 as i32 as i64 as u64,
        _ => value,
    }
}

/// ZF, SF and PF of a result.
#[inline]
fn of_result(result: u64, size: usize) -> u64 {
    let zero = if result == 0 { ZF } else { 0 };
    let sign = if result & sign_bit(size) != 0 { SF } else { 0 };
    let parity = if (result as u8).count_ones().is_multiple_of(2) {
        PF
    } else {
        0
    };
    zero | sign | parity
}

/// A result with the status flags it sets.
pub(super) type Answer = (u64, u64);

#[inline]
pub(super) fn add(a: u64, b: u64, carry: bool, size: usize) -> Answer {
    let (a, b) = (truncate(a, size), truncate(b, size));
    let result = truncate(a.wrapping_add(b).wrapping_add(u64::from(carry)), size);
    // The carry out of each bit: the majority of both operands and the missing sum bit.
    let carries = (a & b) | ((a | b) & !result);
    let mut flags = of_result(result, size);
    if carries & sign_bit(size) != 0 {
        flags |= CF;
    }
    if carries & 8 != 0 {
        flags |= AF;
    }
    if (a ^ result) & (b ^ result) & sign_bit(size) != 0 {
        flags |= OF;
    }
    (result, flags)
}

#[inline]
pub(super) fn sub(a: u64, b: u64, borrow: bool, size: usize) -> Answer {
    let (a, b) = (truncate(a, size), truncate(b, size));
    let result = truncate(a.wrapping_sub(b).wrapping_sub(u64::from(borrow)), size);
    let borrows = (!a & b) | ((!a | b) & result);
    let mut flags = of_result(result, size);
    if borrows & sign_bit(size) != 0 {
        flags |= CF;
    }
    if borrows & 8 != 0 {
        flags |= AF;
    }
    if (a ^ b) & (a ^ result) & sign_bit(size) != 0 {
        flags |= OF;
    }
    (result, flags)
}

/// The flags of AND, OR, XOR and TEST: CF and OF clear; AF, which is undefined, too.
#[inline]
pub(super) fn logic(result: u64, size: usize) -> Answer {
    let result = truncate(result, size);
    (result, of_result(result, size))
}

/// The shifts and rotations, by their number in the opcode extension (SDM vol. 2B, table of
/// group 2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shift {
    Rol,
    Ror,
    Rcl,
    Rcr,
    Shl,
    Shr,
    Sar,
}

/// Shifts by `count` modulo 32 (64 for quad words), one bit at a time as the flags are defined.
/// Gives all of the flags: those that the operation leaves alone are taken from `flags`.
pub(super) fn shift(kind: Shift, value: u64, count: u8, flags: u64, size: usize) -> Answer {
    let count = count & if size == 8 { 63 } else { 31 };
    let mut value = truncate(value, size);
    if count == 0 {
        return (value, flags & STATUS);
    }
    let top = sign_bit(size);
    let mut carry = flags & CF != 0;
    let before = value;
    for _ in 0..count {
        let (high, low) = (value & top != 0, value & 1 != 0);
        let up = truncate(value << 1, size);
        let down = value >> 1;
        let into = |bit: bool, place: u64| if bit { place } else { 0 };
        (value, carry) = match kind {
            Shift::Rol => (up | into(high, 1), high),
            Shift::Ror => (down | into(low, top), low),
            Shift::Rcl => (up | into(carry, 1), high),
            Shift::Rcr => (down | into(carry, top), low),
            Shift::Shl => (up, high),
            Shift::Shr => (down, low),
            Shift::Sar => (down | into(high, top), low),
        };
    }
    let high = value & top != 0;
    let overflow = match kind {
        Shift::Rol | Shift::Rcl | Shift::Shl => high != carry,
        Shift::Ror | Shift::Rcr => high != (value & (top >> 1) != 0),
        Shift::Shr => before & top != 0,
        Shift::Sar => false,
    };
    let moved = if carry { CF } else { 0 } | if overflow { OF } else { 0 };
    let rest = match kind {
        Shift::Rol | Shift::Ror | Shift::Rcl | Shift::Rcr => flags & STATUS & !(CF | OF),
        Shift::Shl | Shift::Shr | Shift::Sar => of_result(value, size),
    };
    (value, moved | rest)
}

/// Whether condition `number` (the low four bits of Jcc, SETcc and CMOVcc) holds.
pub(super) fn condition(number: u8, flags: u64) -> bool {
    let set = |flag: u64| flags & flag != 0;
    let holds = match (number >> 1) & 7 {
        0 => set(OF),
        1 => set(CF),
        2 => set(ZF),
        3 => set(CF | ZF),
        4 => set(SF),
        5 => set(PF),
        6 => set(SF) != set(OF),
        _ => set(ZF) || set(SF) != set(OF),
    };
    holds != (number & 1 != 0)
}
