//! What a guest is told and allowed: CPUID answers and model-specific registers.
//!
//! Both are allow-lists. A feature that this version does not know is not shown; a register that
//! it does not know raises #GP, as on a processor that does not have it.

pub mod cpuid;
pub mod hyperv;
pub mod msr;
