//! What the hypervisors that measure have in common.

use testudo_arch::{FrameAlloc, Hpa};
pub(crate) use testudo_rt::memory::Frames;

/// One zeroed frame.
pub(crate) fn frame() -> Result<Hpa, &'static str> {
    Frames.alloc().ok_or("no memory")
}

/// How many measurements the command line asks for with `rounds=N`. The lowest counts: the first ones fill
/// tables.
pub(crate) fn rounds(command_line: &str) -> Result<u32, &'static str> {
    let word = command_line
        .split(' ')
        .find_map(|word| word.strip_prefix("rounds="));
    word.map_or(Ok(1000), |number| {
        number.parse().map_err(|_| "`rounds` is no number")
    })
}
