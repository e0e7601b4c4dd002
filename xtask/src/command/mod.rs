//! The commands, one file each.

pub(crate) mod boot;
pub(crate) mod selftest;
