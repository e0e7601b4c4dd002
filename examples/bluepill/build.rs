//! Links the programs for bare metal: the guest apart from the hypervisor that starts it.

fn main() {
    testudo_rt_link::bare_metal();
    println!("cargo::rustc-link-arg-bin=adversary=-Wl,--defsym=rt_base=0x8000000");
}
