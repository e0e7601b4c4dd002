//! The backend over a processor that is none: it exits by script, and at every entry the validator
//! decides in place of the processor.

use core::sync::atomic::AtomicU32;
use std::boxed::Box;
use std::collections::VecDeque;
use std::vec::Vec;

use testudo_arch::Exception;
use testudo_arch::memory::GuestRam;
use testudo_nested::svm::{Host, NestedFault, NestedSvm, NestedTable, Pages, offer};
use testudo_svm::check::{Outside, check_vmrun};
use testudo_svm::event::RawEvent;
use testudo_svm::exit::{NestedFaultBits, NestedPageFault};
use testudo_svm::permission::IoPermissionMap;

mod exceptions;
mod fake;
mod init;
mod memory;

use fake::*;

use super::*;
