//! What the fuzz targets do with their input; each target is one call.

#![allow(unsafe_code, reason = "guest memory is made of a vector, in one place")]

mod input;
pub mod machine;
pub mod nested;
pub mod virtio;
