//! The device side of virtio without std: queues, transports and devices.
#![no_std]
