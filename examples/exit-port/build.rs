//! Links the program without libc, its code at an address where no other program has any: an emulator's debugger
//! can tell by it that this program starts.

fn main() {
    testudo_rt_link::freestanding();
    println!("cargo::rustc-link-arg-bins=-Wl,-Ttext=0x50001000");
}
