//! Packets through a file: a TAP interface of the operating system.

use std::fs::File;
use std::io::{Read, Write};
use std::vec::Vec;

use testudo_arch::MemoryFault;

use super::net::{Fill, MAX_FRAME, NetBackend, NetHeader, Offloads};

/// The length of the header that IFF_VNET_HDR puts before each frame.
const VNET_HEADER: usize = 10;

/// A TAP interface that the program has opened and configured: non-blocking, `IFF_NO_PI`, and with
/// `IFF_VNET_HDR` if offloads are wanted.
///
/// Whoever watches the file polls the device when it becomes readable.
#[derive(Debug)]
pub struct Tap {
    file: File,
    offloads: Offloads,
    out: Vec<u8>,
    input: Vec<u8>,
    len: usize,
}

impl Tap {
    /// A backend on `file`. With offloads, each frame has a header of ten bytes before it, as
    /// `IFF_VNET_HDR` makes it.
    pub fn new(file: File, offloads: Offloads) -> Self {
        Self {
            file,
            offloads,
            out: Vec::new(),
            input: std::vec![0; VNET_HEADER + MAX_FRAME],
            len: 0,
        }
    }

    fn header_len(&self) -> usize {
        if self.offloads.is_empty() {
            0
        } else {
            VNET_HEADER
        }
    }
}

impl NetBackend for Tap {
    fn offloads(&self) -> Offloads {
        self.offloads
    }

    fn send(&mut self, header: NetHeader, len: usize, fill: Fill<'_>) -> Result<(), MemoryFault> {
        let start = self.header_len();
        self.out.clear();
        self.out.resize(start + len, 0);
        self.out[..start].copy_from_slice(&header.to_bytes()[..start]);
        fill(&mut self.out[start..])?;
        // A full interface drops, as a wire does.
        let _ = self.file.write(&self.out);
        Ok(())
    }

    fn peek(&mut self) -> Option<(NetHeader, &[u8])> {
        let start = self.header_len();
        // What is too short to have a frame after its header is nobody's.
        while self.len <= start {
            self.len = self
                .file
                .read(&mut self.input)
                .ok()
                .filter(|&len| len > 0)?;
        }
        let (bytes, frame) = self.input[..self.len].split_at(start);
        let header = bytes.first_chunk().copied();
        Some((
            header.map_or_else(NetHeader::default, NetHeader::from_bytes),
            frame,
        ))
    }

    fn consume(&mut self) {
        self.len = 0;
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixDatagram;

    use super::*;

    #[test]
    fn frames_pass_with_and_without_headers() {
        let header = NetHeader {
            flags: NetHeader::NEEDS_CSUM,
            csum_start: 14,
            csum_offset: 2,
            ..NetHeader::default()
        };
        for offloads in [Offloads::empty(), Offloads::CHECKSUM] {
            // Packet by packet, as a TAP interface is.
            let (near, far) = UnixDatagram::pair().unwrap();
            near.set_nonblocking(true).unwrap();
            let mut tap = Tap::new(File::from(OwnedFd::from(near)), offloads);
            assert_eq!(tap.peek(), None);
            let mut fill = |to: &mut [u8]| {
                to.fill(9);
                Ok(())
            };
            tap.send(header, 60, &mut fill).unwrap();
            let mut bytes = [0; 100];
            let len = far.recv(&mut bytes).unwrap();
            let start = len - 60;
            assert_eq!(start, if offloads.is_empty() { 0 } else { 10 });
            assert_eq!(bytes[..start], header.to_bytes()[..start]);
            assert_eq!(bytes[start..len], [9; 60]);
            far.send(&bytes[..len]).unwrap();
            let (seen, frame) = tap.peek().unwrap();
            assert_eq!(frame, [9; 60]);
            assert_eq!(seen == header, start > 0);
            tap.consume();
            assert_eq!(tap.peek(), None);
            // Neither a header without a frame nor half of one keeps the next frame back.
            if start > 0 {
                far.send(&bytes[..start]).unwrap();
                far.send(&bytes[..3]).unwrap();
                assert_eq!(tap.peek(), None);
                far.send(&bytes[..3]).unwrap();
                far.send(&bytes[..len]).unwrap();
                assert_eq!(tap.peek(), Some((header, &[9; 60][..])));
            }
        }
    }
}
