//! What the programs share that compare the crates' decisions with a processor's: the command line, random
//! numbers, frames, and which emulator has the processor.
#![no_std]

extern crate alloc;

mod args;
mod emulator;
mod frames;
mod random;

pub use args::Args;
pub use emulator::Emulator;
pub use frames::Frames;
pub use random::Random;
