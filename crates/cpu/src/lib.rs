//! A software processor with VT-x.
//!
//! It runs x86 guests and leaves by VM exit exactly where VT-x would. It knows nothing of KVM:
//! who calls [`Vcpu::enter`] supplies [`Controls`] and handles the [`arch::exit::VmExit`].
//!
//! Host physical addresses are virtual addresses of this process. The tables that
//! [`Controls::eptp`] names are ordinary memory, walked with atomic loads; what they map is
//! touched directly.
//!
//! | module | what it is |
//! | --- | --- |
//! | `state`, `controls` | what goes into an entry |
//! | `vmx`, `entry_checks` | VM entry and exit, single-instruction emulation |
//! | `execute` | the loop and the instruction handlers |
//! | `decode`, `op`, `code` | bytes to ops, and the cache of them |
//! | `translator`, `fast_tlb` | blocks that run often, as host code |
//! | `memory`, `update`, `tlb`, `walk_cache`, `second_stage`, `host`, `faults`, `guest_memory` | linear address to host access |
//! | `event`, `segmentation` | exceptions, interrupts, descriptors |
//! | `virtual_apic` | virtual interrupts and accesses to the APIC |
//! | `vector` | x87, SIMD and extended state, by the host's own instructions |
//! | `machine` | what the processors of one machine share |
//! | `statistics` | what a processor counts |

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
compile_error!("eptide-cpu runs on x86-64 Linux: it executes parts of the guest's code natively");

mod code;
mod controls;
mod decode;
mod entry_checks;
mod event;
mod execute;
mod fast_tlb;
pub mod faults;
mod features;
mod guest_memory;
mod host;
mod machine;
mod memory;
mod op;
mod second_stage;
mod segmentation;
mod state;
mod statistics;
mod tlb;
mod translator;
mod update;
mod vcpu;
mod vector;
mod virtual_apic;
mod vmx;
mod walk_cache;

pub use controls::{Controls, ShadowRoot};
pub use guest_memory::{Gone, GuestMemory};
pub use machine::{Attention, Machine};
pub use state::{CpuState, ExtendedState, Gpr, LazyFlags, Msrs, XSAVE_AREA};
pub use statistics::Statistics;
pub use translator::{Engine, NoSuchEngine};
pub use vcpu::{Bus, BusResponse, Emulated, Flush, MmioHint, Observer, Vcpu};
