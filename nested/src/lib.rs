//! Nested VMX and SVM: a guest that is itself a hypervisor.
#![no_std]
