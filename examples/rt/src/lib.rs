//! The bare-metal runtime that Testudo's example programs share.
//!
//! A program on it is an ordinary Rust binary of the host target, built by the stable toolchain:
//!
//! ```ignore
//! #![no_std]
//! #![no_main]
//!
//! use testudo_rt::{Boot, println};
//!
//! testudo_rt::entry!(main);
//!
//! fn main(boot: &'static Boot) -> u8 {
//!     println!("hello from {} bytes of memory", testudo_rt::memory::available());
//!     0
//! }
//! ```
//!
//! with a `build.rs` that calls `testudo_rt_link::bare_metal()`. The result is one ELF file that
//! `qemu -kernel` starts by its PVH note and GRUB by its Multiboot 2 header. Before `main`, the runtime
//! has the processor in long mode with SSE, all memory identity-mapped, exceptions reported in words, a
//! heap, and the clocks calibrated. Interrupts are off, and nothing here turns them on by itself.
//!
//! The status that `main` returns leaves the machine through [`exit()`].
#![cfg_attr(not(test), no_std)]
#![allow(unsafe_code)]
#![cfg_attr(
    test,
    expect(
        dead_code,
        reason = "host tests run the parts that need no machine; nothing starts the rest"
    )
)]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod acpi;
pub mod apic;
mod boot;
pub mod cpu;
pub mod exit;
pub mod ioapic;
pub mod irq;
pub mod lock;
pub mod memory;
pub mod msr;
pub mod port;
pub mod serial;
#[cfg(not(test))]
mod symbols;
pub mod time;
pub mod timer;

pub use boot::{Boot, Loader, MemoryKind, MemoryRange, Module};
pub use exit::exit;

#[cfg(not(test))]
core::arch::global_asm!(include_str!("entry.s"), options(att_syntax));

/// Names the function that the runtime calls once the machine is ready.
///
/// It takes the boot information and returns the program's exit status.
#[macro_export]
macro_rules! entry {
    ($main:path) => {
        #[unsafe(no_mangle)]
        extern "Rust" fn rt_main(boot: &'static $crate::Boot) -> u8 {
            let main: fn(&'static $crate::Boot) -> u8 = $main;
            main(boot)
        }
    };
}

#[cfg(not(test))]
mod start {
    use alloc::boxed::Box;
    use core::panic::PanicInfo;

    use crate::acpi::{Madt, Tables};
    use crate::boot::{Boot, Raw};
    use crate::{apic, cpu, exit, ioapic, memory, serial, time};

    unsafe extern "Rust" {
        safe fn rt_main(boot: &'static Boot) -> u8;
    }

    /// The entry code calls this, with the stack of `entry.s` and the first 4 GiB mapped.
    #[unsafe(no_mangle)]
    extern "C" fn rt_start(entry: u32, information: u32) -> ! {
        serial::init();
        // SAFETY: these are the entry code's own values.
        let Some(raw) = (unsafe { Raw::read(entry, information) }) else {
            crate::println!("the loader passed neither PVH nor Multiboot 2 boot information");
            exit(exit::PANICKED);
        };
        // SAFETY: this is the boot processor, nothing has used GS, and interrupts are off.
        unsafe { cpu::enter(0) };
        memory::init(&raw);
        let boot = &*Box::leak(Box::new(Boot::from_raw(&raw)));
        let madt = Tables::of(boot)
            .table(b"APIC")
            .map(Madt::parse)
            .unwrap_or_default();
        apic::init();
        ioapic::init(&madt);
        cpu::enumerate(madt.processors.iter().copied());
        time::calibrate();
        memory::protect(cpu::START_PAGE);
        exit(rt_main(boot))
    }

    #[panic_handler]
    fn panic(info: &PanicInfo<'_>) -> ! {
        serial::print_last_words(format_args!("\n{info}\n"));
        exit(exit::PANICKED)
    }
}
