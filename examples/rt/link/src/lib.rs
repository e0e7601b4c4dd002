//! How a bare-metal program is linked; for its build script.
//!
//! A program on `testudo-rt` is an ordinary binary of the host target, linked without libc, start files
//! or position independence, at the address its linker script gives. Its `build.rs` is
//! one line: a call of [`bare_metal`].

/// Prints the link arguments of a bare-metal program for Cargo.
pub fn bare_metal() {
    freestanding();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/program.ld");
    println!("cargo::rerun-if-changed={script}");
    println!("cargo::rustc-link-arg-bins=-Wl,-z,max-page-size=4096");
    println!("cargo::rustc-link-arg-bins=-Wl,-T,{script}");
}

/// Prints the link arguments of a program without libc and start files, which defines `_start`.
pub fn freestanding() {
    for argument in [
        "-nostdlib",
        "-nostartfiles",
        "-static",
        "-no-pie",
        "-Wl,--build-id=none",
        "-Wl,-z,noexecstack",
    ] {
        println!("cargo::rustc-link-arg-bins={argument}");
    }
}
