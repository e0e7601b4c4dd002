//! What the hypervisors that measure share: their guest, and what they say.

use alloc::boxed::Box;
use core::error::Error;

use testudo_arch::{FrameAlloc, Hpa};
use testudo_rt::memory::Frames;
use testudo_rt::{Boot, println};

/// The guest of both: it notes the time in ESI when it begins and in EAX before it exits. In real mode from
/// address 0, and the instruction that exits follows.
pub(crate) const NOTES: [u8; 7] = [
    0x0F, 0x31, // rdtsc
    0x66, 0x89, 0xC6, // mov esi, eax
    0x0F, 0x31, // rdtsc
];

/// The least that one entry and one exit took.
pub(crate) struct Lowest {
    vmrun: u32,
    vmexit: u32,
}

impl Lowest {
    /// Nothing has been measured yet.
    pub(crate) const NONE: Self = Self {
        vmrun: u32::MAX,
        vmexit: u32::MAX,
    };

    /// Takes the times before an entry, at the guest's begin and end, and after the exit.
    pub(crate) fn take(&mut self, [before, first, last, after]: [u32; 4]) {
        self.vmrun = self.vmrun.min(first.wrapping_sub(before));
        self.vmexit = self.vmexit.min(after.wrapping_sub(last));
    }
}

/// Measures as often as the command line asks for with `rounds=N`, and prints the figures; gives the exit
/// status. The lowest counts: the first rounds fill tables.
pub(crate) fn print(
    boot: &Boot,
    measure: impl FnOnce(u32) -> Result<Lowest, Box<dyn Error>>,
) -> u8 {
    match rounds(boot.command_line()).and_then(measure) {
        Ok(Lowest { vmrun, vmexit }) => {
            println!("vmrun {vmrun}");
            println!("vmexit {vmexit}");
            0
        }
        Err(error) => {
            println!("{error}");
            1
        }
    }
}

fn rounds(command_line: &str) -> Result<u32, Box<dyn Error>> {
    let word = command_line
        .split(' ')
        .find_map(|word| word.strip_prefix("rounds="));
    let Some(number) = word else { return Ok(1000) };
    Ok(number.parse().map_err(|_| "`rounds` is no number")?)
}

/// One zeroed frame.
pub(crate) fn frame() -> Result<Hpa, &'static str> {
    Frames.alloc().ok_or("no memory")
}
