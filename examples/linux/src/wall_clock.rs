//! The date and time of the machine's real-time clock (Motorola MC146818A).

use testudo_rt::port;

const INDEX: u16 = 0x70;
const DATA: u16 = 0x71;

fn register(number: u8) -> u8 {
    // SAFETY: the clock's ports touch no memory, and its registers 0 to 0xD may be read.
    unsafe {
        port::write_u8(INDEX, number);
        port::read_u8(DATA)
    }
}

/// The seconds since the beginning of 1970, as the clock has it, in whatever time zone it is set.
pub(crate) fn seconds_since_1970() -> u64 {
    let read = || [0, 2, 4, 7, 8, 9].map(register);
    let mut now = read();
    // Two equal readings were not taken during an update.
    for _ in 0..1000 {
        let again = read();
        if again == now {
            break;
        }
        now = again;
    }
    let format = register(0xB);
    let number = |value: u8| {
        u64::from(if format & 4 != 0 {
            value
        } else {
            (value >> 4) * 10 + (value & 0xF)
        })
    };
    let [second, minute, hour, day, month, year] = now;
    let mut hours = number(hour & 0x7F);
    if format & 2 == 0 {
        hours = hours % 12 + if hour & 0x80 != 0 { 12 } else { 0 };
    }
    let (day, month, year) = (
        number(day).max(1),
        number(month).clamp(1, 12),
        2000 + number(year),
    );
    // Days from the civil calendar, with years that begin in March.
    let (y, m) = if month > 2 {
        (year, month - 3)
    } else {
        (year - 1, month + 9)
    };
    let days = y * 365 + y / 4 - y / 100 + y / 400 + (m * 153 + 2) / 5 + day - 1 - 719_468;
    ((days * 24 + hours) * 60 + number(minute)) * 60 + number(second)
}
