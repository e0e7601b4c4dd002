//! Placeholder until its first slice.
fn main() {}
