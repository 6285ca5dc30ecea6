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
//!
//! # Tracing one function of a guest
//!
//! Hardware cannot do this: a page of guest code is flagged, KVM_RUN ends before it executes
//! anything there, and the code is stepped through with an observer until control leaves it. The
//! rest of the guest runs at full speed.
//!
//! ```
//! use eptide_kvm::{CpuState, KVM_EXIT_EMULATE, Kvm, Observer, VcpuExit};
//! use kvm_bindings::kvm_userspace_memory_region;
//!
//! /// Writes down what the function does.
//! #[derive(Default)]
//! struct Trace(Vec<String>);
//!
//! impl Observer for Trace {
//!     fn instruction(&mut self, state: &CpuState, bytes: &[u8]) {
//!         self.0.push(format!("{:x}: {bytes:02x?}", state.rip));
//!     }
//!     fn memory(&mut self, gva: u64, data: &[u8], write: bool) {
//!         let what = if write { "writes" } else { "reads" };
//!         self.0.push(format!("  {what} {data:02x?} at {gva:x}"));
//!     }
//!     fn branch(&mut self, _from: u64, to: u64) {
//!         self.0.push(format!("  goes to {to:x}"));
//!     }
//! }
//!
//! // Four pages: the caller in the second, the function in the third.
//! let layout = std::alloc::Layout::from_size_align(0x4000, 0x1000)?;
//! // SAFETY: the layout has a size.
//! let memory = unsafe { std::alloc::alloc_zeroed(layout) };
//! let put = |at: usize, code: &[u8]| {
//!     // SAFETY: all code below lies in the four pages.
//!     unsafe { memory.add(at).copy_from_nonoverlapping(code.as_ptr(), code.len()) }
//! };
//! put(0x1000, &[0xb8, 5, 0, 0xe8, 0xfa, 0x0f, 0xf4]); // mov ax, 5; call 2000h; hlt
//! put(0x2000, &[0x01, 0xc0, 0xa3, 0x00, 0x30, 0xc3]); // add ax, ax; mov [3000h], ax; ret
//!
//! let vm = Kvm::new()?.create_vm()?;
//! let region = kvm_userspace_memory_region {
//!     memory_size: 0x4000,
//!     userspace_addr: memory as u64,
//!     ..Default::default()
//! };
//! // SAFETY: the memory is never freed.
//! unsafe { vm.set_user_memory_region(region)? };
//! let mut vcpu = vm.create_vcpu(0)?;
//! let mut sregs = vcpu.get_sregs()?;
//! (sregs.cs.base, sregs.cs.selector) = (0, 0);
//! vcpu.set_sregs(&sregs)?;
//! let mut regs = vcpu.get_regs()?;
//! (regs.rip, regs.rsp) = (0x1000, 0x1000);
//! vcpu.set_regs(&regs)?;
//!
//! vm.set_execution_traps(2, 1, true)?;
//! assert!(matches!(vcpu.run()?, VcpuExit::Unsupported(KVM_EXIT_EMULATE)));
//! let trap = vcpu.emulate_exit();
//! assert_eq!((trap.gpa, trap.rip), (0x2000, 0x2000));
//!
//! let mut trace = Trace::default();
//! while vcpu.get_regs()?.rip >> 12 == 2 {
//!     assert!(vcpu.step(&mut trace)?.is_none(), "the function touches no device");
//! }
//! assert_eq!(
//!     trace.0,
//!     [
//!         "2000: [01, c0]",
//!         "2002: [a3, 00, 30]",
//!         "  writes [0a, 00] at 3000",
//!         "2005: [c3]",
//!         "  reads [06, 10] at ffe",
//!         "  goes to 1006",
//!     ]
//! );
//! assert!(matches!(vcpu.run()?, VcpuExit::Hlt));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

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
pub mod helpers;
mod host_memory;
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
pub use cpu::faults::{
    Disposition, exchange_program as exchange_kept_disposition, release as release_kept_signals,
};
pub use cpu::{CpuState, Engine, NoSuchEngine, Observer};
pub use error::Error;
pub(crate) use error::Result;
pub use signals::{Call, as_the_program_meant, cover_signal_handler, interrupt_current_thread};
pub use traps::{ACCESS_TRAP_EXECUTION, AccessBytes, EmulateExit, KVM_EXIT_EMULATE};
