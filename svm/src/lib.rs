//! AMD-V: the VMCB, intercepts, permission maps, VMRUN consistency checks, exit decoding and the instructions.
#![no_std]
