//! What the programs share that compare the crates' decisions with a processor's: the command line, random
//! numbers, and which emulator has the processor.
#![no_std]

extern crate alloc;

mod args;
mod emulator;
mod random;

pub use args::Args;
pub use emulator::Emulator;
pub use random::Random;
