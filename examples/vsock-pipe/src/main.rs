//! A Linux program that connects its standard input and output to a socket between virtual machine
//! and host: `vsock-pipe CID PORT`, where the host's CID is 2. It ends when the other side has closed
//! the connection, after its own input has ended.
//!
//! No shell's tools know this family of sockets.
#![no_std]
#![no_main]
#![allow(unsafe_code)]

use core::cell::UnsafeCell;

use testudo_user::{Arguments, STANDARD_OUTPUT, exit};

const SYS_READ: usize = 0;
const SYS_WRITE: usize = 1;
const SYS_POLL: usize = 7;
const SYS_SOCKET: usize = 41;
const SYS_CONNECT: usize = 42;
const SYS_SENDTO: usize = 44;
const SYS_SHUTDOWN: usize = 48;

const AF_VSOCK: u16 = 40;
const SOCK_STREAM: usize = 1;
const SHUT_WR: usize = 1;
const MSG_DONTWAIT: usize = 0x40;
const POLLIN: i16 = 1;
const POLLOUT: i16 = 4;
const POLLERR: i16 = 8;
const POLLHUP: i16 = 0x10;
const NOBODY: i32 = -1;

/// `struct sockaddr_vm`.
#[repr(C)]
struct Address {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    flags: [u8; 4],
}

/// `struct pollfd`.
#[repr(C)]
struct Poll {
    file: i32,
    wanted: i16,
    found: i16,
}

/// Bytes on their way, which only the kernel touches.
struct Buffer(UnsafeCell<[u8; Buffer::LEN]>);

// SAFETY: the program has one thread.
unsafe impl Sync for Buffer {}

impl Buffer {
    const LEN: usize = 64 << 10;

    const fn new() -> Self {
        Self(UnsafeCell::new([0; Self::LEN]))
    }

    fn at(&self, offset: usize) -> usize {
        self.0.get() as usize + offset
    }
}

static OUT: Buffer = Buffer::new();
static IN: Buffer = Buffer::new();

testudo_user::entry!(main);

fn main(mut arguments: Arguments) -> u8 {
    let numbers = (arguments.next_number(), arguments.next_number());
    let ((Some(cid), Some(port)), None) = (numbers, arguments.next()) else {
        return 2;
    };
    let socket = demand(system_call(
        SYS_SOCKET,
        [usize::from(AF_VSOCK), SOCK_STREAM, 0, 0],
    ));
    let address = Address {
        family: AF_VSOCK,
        reserved: 0,
        port,
        cid,
        flags: [0; 4],
    };
    let at = core::ptr::from_ref(&address) as usize;
    demand(system_call(
        SYS_CONNECT,
        [socket, at, size_of::<Address>(), 0],
    ));
    pipe(socket)
}

/// Moves bytes both ways until the other side has closed.
fn pipe(socket: usize) -> u8 {
    let (mut from, mut len) = (0, 0);
    let mut ended = false;
    loop {
        let input = if ended || len > 0 { NOBODY } else { 0 };
        let output = if len > 0 { POLLOUT } else { 0 };
        let mut polls = [
            Poll {
                file: input,
                wanted: POLLIN,
                found: 0,
            },
            Poll {
                file: socket as i32,
                wanted: POLLIN | output,
                found: 0,
            },
        ];
        let at = polls.as_mut_ptr() as usize;
        demand(system_call(SYS_POLL, [at, 2, usize::MAX, 0]));
        let [input, both] = polls;
        if input.found != 0 {
            (from, len) = (
                0,
                demand(system_call(SYS_READ, [0, OUT.at(0), Buffer::LEN, 0])),
            );
            if len == 0 {
                ended = true;
                demand(system_call(SYS_SHUTDOWN, [socket, SHUT_WR, 0, 0]));
            }
        }
        if both.found & POLLOUT != 0 {
            let sent = demand(system_call(
                SYS_SENDTO,
                [socket, OUT.at(from), len, MSG_DONTWAIT],
            ));
            (from, len) = (from + sent, len - sent);
        }
        if both.found & (POLLIN | POLLHUP | POLLERR) != 0 {
            let got = demand(system_call(SYS_READ, [socket, IN.at(0), Buffer::LEN, 0]));
            if got == 0 {
                return u8::from(!ended);
            }
            let mut done = 0;
            while done < got {
                done += demand(system_call(
                    SYS_WRITE,
                    [STANDARD_OUTPUT, IN.at(done), got - done, 0],
                ));
            }
        }
    }
}

/// What a system call gave; its error ends the program.
fn demand(result: isize) -> usize {
    usize::try_from(result).unwrap_or_else(|_| exit(1))
}

fn system_call(number: usize, arguments: [usize; 4]) -> isize {
    let [a, b, c, d] = arguments;
    // SAFETY: what the kernel is given to write to is a buffer of this program's, or the answer of
    // `poll`, which the caller reads only afterwards. The fifth and sixth are the address of SENDTO: none.
    unsafe { testudo_user::system_call(number, [a, b, c, d, 0, 0]) }
}
