//! The commands, one file each.

pub(crate) mod boot;
pub(crate) mod measure;
pub(crate) mod selftest;
pub(crate) mod test;
