//! x86's vocabulary: everything that has a bit position or a number, once.
//!
//! No state and no I/O. The crate also holds the one definition of how x86 walks a page table
//! ([`paging`]), which the software processor uses as hardware walker and the MMU as software
//! walker.
#![no_std]
#![forbid(unsafe_code)]

pub mod addr;
pub mod apic;
pub mod control_registers;
pub mod controls;
pub mod cpuid;
pub mod exception;
pub mod exit;
pub mod interruption;
pub mod msr;
pub mod page_fault;
pub mod paging;
pub mod segment;
pub mod vmcs;
