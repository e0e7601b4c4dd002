//! Links the program for bare metal.

fn main() {
    testudo_rt_link::bare_metal();
}
