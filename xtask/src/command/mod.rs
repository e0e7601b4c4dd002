//! The commands, one file each.

pub(crate) mod bare_metal;
pub(crate) mod bluepill;
pub(crate) mod boot;
pub(crate) mod devices;
pub(crate) mod diff;
pub(crate) mod measure;
pub(crate) mod nested;
pub(crate) mod new_device;
pub(crate) mod test;
mod xen;
