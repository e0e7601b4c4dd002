//! Who is at the host's end of a guest's sockets.

use alloc::boxed::Box;
use alloc::collections::VecDeque;

/// One connection, as the host's end sees it.
pub trait VsockStream: Send {
    /// Takes bytes from the guest, as many as fit, and says how many.
    fn write(&mut self, data: &[u8]) -> usize;

    /// Gives bytes to the guest: fills the beginning of `buf` and says how far.
    fn read(&mut self, buf: &mut [u8]) -> usize;

    /// Whether this end has nothing more to give, ever: the connection is closed when all that
    /// was given is sent.
    fn finished(&self) -> bool {
        false
    }

    /// The guest will not send any more.
    fn peer_finished(&mut self) {}
}

/// A connection that the host wants to make.
pub struct VsockConnect {
    /// The port at the host's end.
    pub host_port: u32,
    /// The port in the guest.
    pub guest_port: u32,
    /// The host's end.
    pub stream: Box<dyn VsockStream>,
}

/// The host's services.
pub trait VsockHost: Send {
    /// The guest connects from its port `guest_port` to `port`: the host's end, or none if nobody
    /// listens there.
    fn accept(&mut self, port: u32, guest_port: u32) -> Option<Box<dyn VsockStream>>;

    /// The next connection that the host wants to make.
    fn connect(&mut self) -> Option<VsockConnect> {
        None
    }
}

/// A host that echoes on one port.
#[derive(Clone, Copy, Debug)]
pub struct EchoHost {
    /// The port.
    pub port: u32,
}

/// The most bytes that an echo keeps before it lets the guest wait.
const ECHO_BUFFER: usize = 64 << 10;

#[derive(Debug, Default)]
struct Echo {
    bytes: VecDeque<u8>,
    peer_finished: bool,
}

impl VsockHost for EchoHost {
    fn accept(&mut self, port: u32, _guest_port: u32) -> Option<Box<dyn VsockStream>> {
        (port == self.port).then(|| Box::new(Echo::default()) as Box<dyn VsockStream>)
    }
}

impl VsockStream for Echo {
    fn write(&mut self, data: &[u8]) -> usize {
        let len = data.len().min(ECHO_BUFFER - self.bytes.len());
        self.bytes.extend(&data[..len]);
        len
    }

    fn read(&mut self, buf: &mut [u8]) -> usize {
        let len = buf.len().min(self.bytes.len());
        for (to, from) in buf.iter_mut().zip(self.bytes.drain(..len)) {
            *to = from;
        }
        len
    }

    fn finished(&self) -> bool {
        self.peer_finished && self.bytes.is_empty()
    }

    fn peer_finished(&mut self) {
        self.peer_finished = true;
    }
}
