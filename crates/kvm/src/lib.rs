//! KVM's object model and exit path in user space.
//!
//! The public API has the shape of `kvm-ioctls`: [`Kvm`], [`VmFd`], [`VcpuFd`], [`VcpuExit`], with
//! `kvm-bindings` types and KVM's errno values. Underneath:
//!
//! ```text
//! ioctl/    the raw surface, one table
//! api/      the methods          capabilities   what KVM_CHECK_EXTENSION answers
//! vm        what vCPUs share     vcpu           the loop of KVM_RUN
//! exits/    what each VM exit leads to, by the exit table
//! mmio, port_io, guest_walk      instructions that touch devices
//! irqchip/  local APIC, I/O APIC, 8259, PIT, routing
//! mailbox, timers, signals, watch  how events reach a vCPU
//! msrs, cpuid, clock, pv, regs   what software sees of the processor
//! smm                            system management mode
//! eventfd, coalesced             descriptors and rings in place of exits
//! ```
//!
//! The processor is [`cpu`], memory is [`mmu`]; this crate joins them and knows neither's inside.

mod api;
mod capabilities;
pub mod clock;
mod coalesced;
pub mod cpuid;
mod debug;
mod dirty_ring;
mod error;
pub mod eventfd;
mod events;
mod exits;
mod guest_walk;
pub mod ioctl;
pub mod irqchip;
pub mod mailbox;
mod mmio;
mod msr_filter;
mod msrs;
mod port_io;
mod pv;
mod regs;
mod run_area;
mod signals;
mod smm;
mod stats;
pub mod time;
pub mod timers;
mod traps;
mod tsc_scaling;
mod vcpu;
mod vm;
mod watch;

pub use api::*;
pub use capabilities::CAP_EXECUTION_TRAPS;
pub use cpu::Observer;
pub use error::{Error, Result};
pub use signals::interrupt_current_thread;
pub use traps::{ACCESS_TRAP_EXECUTION, AccessBytes, EmulateExit, KVM_EXIT_EMULATE};
