//! Links the program without libc.

fn main() {
    testudo_rt_link::freestanding();
}
