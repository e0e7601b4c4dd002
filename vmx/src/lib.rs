//! Intel VT-x: the VMCS, capabilities, controls, VM-entry checks, exit decoding and the instructions.
#![no_std]
