//! The virtual PC: vCPU backends, the exit loop, interrupt controllers, timers, buses and boot protocols.
#![no_std]
