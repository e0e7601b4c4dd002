//! What guests print: on the serial port as it comes, or by lines that say whose they are if there are several.

use alloc::sync::Arc;
use alloc::vec::Vec;

use testudo_rt::lock::Lock;
use testudo_rt::{println, serial};

/// A line that grows longer is printed in pieces.
const LONGEST: usize = 512;

/// One guest's way to the serial port.
#[derive(Clone)]
pub(crate) struct Output(Option<Arc<Labelled>>);

struct Labelled {
    guest: usize,
    line: Lock<Vec<u8>>,
}

impl Output {
    /// The way of the guest of this number among so many.
    pub(crate) fn new(guest: usize, guests: usize) -> Self {
        Self((guests > 1).then(|| {
            Arc::new(Labelled {
                guest,
                line: Lock::new(Vec::with_capacity(LONGEST)),
            })
        }))
    }

    /// Takes a character.
    pub(crate) fn put(&self, byte: u8) {
        let Some(labelled) = &self.0 else {
            serial::write_byte(byte);
            return;
        };
        let mut line = labelled.line.lock();
        match byte {
            b'\r' => {}
            b'\n' => labelled.print(&mut line),
            _ => {
                line.push(byte);
                if line.len() == LONGEST {
                    labelled.print(&mut line);
                }
            }
        }
    }

    /// Prints what is left when the guest has ended.
    pub(crate) fn finish(&self) {
        if let Some(labelled) = &self.0 {
            let mut line = labelled.line.lock();
            if !line.is_empty() {
                labelled.print(&mut line);
            }
        }
    }
}

impl Labelled {
    fn print(&self, line: &mut Vec<u8>) {
        let text = alloc::string::String::from_utf8_lossy(line);
        println!("guest {}: {text}", self.guest);
        line.clear();
    }
}
