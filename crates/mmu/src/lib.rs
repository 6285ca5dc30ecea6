//! KVM's x86 MMU: memslots, page faults, EPT tables, MMIO entries, dirty logging.
//!
//! The crate knows neither instructions nor ioctls. It turns a fault (guest-physical address and
//! error code) into a change of page tables and one of a few verdicts, and keeps what KVM's memory
//! API promises. The processor walks the tables that it writes; they meet only in memory. *The
//! process is the machine*: a host-physical address is a host-virtual address of this process, so
//! the PFN in an entry is `hva >> 12` and the EPTP holds the address of an ordinary 4 KiB page.
//!
//! ```text
//!              handle_page_fault(gpa, error code)
//!                          │
//!   MMIO cache ◀── reserved bit?      memslots (snapshot, generation)
//!   and entries            │                 │ gfn → hva, probed with a system call
//!                     fast path: one compare-exchange, no lock
//!                          │
//!                     map, under the shared MMU lock, by compare-exchange
//!                          │
//!                   SPTEs ─┴─ TDP tables ◀── zap, write-protect, split … under the exclusive lock,
//!                                            then flush every processor, then free
//! ```
//!
//! # The API in brief
//!
//! ```text
//! trait Processors { fn kick(&self, vcpu: u32) }      // kvm implements: make that vCPU leave guest mode soon
//!
//! Mmu::new(Config, Arc<dyn Processors>) -> Result<Arc<Mmu>, ConfigError>
//! Mmu::create_vcpu(&self, id) -> Vcpu                 // owned by the vCPU's thread
//!
//! // the vCPU loop
//! mmu.load(&mut vcpu) -> Result<Eptp, OutOfTables>    // before every entry; cheap when nothing changed
//! vcpu.gate().enter() -> Entry::{Ready, Flush(Flush)} // Flush: apply to the processor's TLB, start over at load
//! vcpu.gate().exit()                                  // after every exit, before anything else
//! vcpu.set_address_space(AddressSpace::{Normal, Smm})
//! mmu.handle_page_fault(&mut vcpu, gpa, ErrorCode) -> FaultResult
//!     // EPT violation: error code made from the qualification; EPT misconfiguration: ErrorCode::RSVD
//! enum FaultResult { Fixed, Spurious, Retry,          // run the guest again
//!     Mmio(MmioAccess), WriteProtected,               // emulate the instruction
//!     ExecuteTrap, FetchFromHole,                     // to user space
//!     Invalid, Error(FaultError) }                    // a reserved pattern that is not ours; EFAULT and friends
//!
//! // without EPT (Config::shadow): instead of load and handle_page_fault
//! mmu.load_shadow(&mut vcpu, &GuestMode { controls, root, privilege, is_user }) -> Result<ShadowPointer, OutOfTables>
//! mmu.handle_shadow_fault(&mut vcpu, &GuestMode, gva, ErrorCode) -> ShadowResult::{Guest(ErrorCode), Verdict(FaultResult, Gpa)}
//! mmu.sync_shadow()                                   // CR3 load, INVPCID, CR0/CR4 change: before the guest runs on
//! mmu.invalidate_linear(&mut vcpu, gva) -> bool       // INVLPG; true: drop the whole TLB
//! mmu.unprotect_shadow(space, gfn)                    // for a write to a table that cannot be emulated
//! mmu.set_max_table_pages(pages)
//! // the guest of a guest, beside EPT
//! mmu.load_nested(&mut vcpu, &NestedEpt { paging, root }) -> Result<ShadowPointer, OutOfTables>
//! mmu.handle_nested_fault(&mut vcpu, gpa, Option<EptAccess>) -> NestedResult::{Guest(EptFault), Verdict(FaultResult, Gpa)}
//!
//! // memslots (flags and slot numbers as in kvm_userspace_memory_region)
//! mmu.set_memory_region(&MemoryRegion { space, number, flags, base, size, hva }) -> Result<(), SlotError>
//! mmu.slots() -> SlotsGuard                           // a consistent snapshot; `.find(space, gfn)`
//! mmu.gfn_to_hva(space, gfn) -> Option<Hva>
//! mmu.read_guest(space, gpa, &mut [u8]) / write_guest(space, gpa, &[u8]) -> Result<(), AccessError>
//!     // KVM's own accesses; a write marks the page dirty
//!
//! // dirty log
//! mmu.dirty_log(space, number, &mut [u64]) -> Result<(), DirtyLogError>        // get and clear
//! mmu.dirty_log_keep(space, number, &mut [u64])                                // get, manual clear
//! mmu.clear_dirty_log(space, number, first_page, pages, &[u64])
//! mmu.mark_dirty(space, gfn)                          // PML buffer entries, DMA by KVM itself
//!
//! // the rest
//! mmu.invalidate(Range<Hva>) -> Invalidation          // guard: hold it while host memory changes
//! mmu.age(Range<Hva>) / is_young(Range<Hva>)
//! mmu.track_writes / untrack_writes(space, gfn)
//! mmu.set_execution_traps(space, Range<Gfn>, bool)
//! mmu.zap_all(), mmu.recover_nx_huge_pages(max), mmu.stats(), vcpu.stats(), mmu.dump_walk(&vcpu, gpa)
//! ```
//!
//! Lock order: memslot updates, then read sections of memslots, then the MMU lock. A flush waits for
//! processors in guest mode, which need none of them to leave it.

mod config;
mod dirty;
mod dirty_log;
mod dump;
mod fault;
mod gate;
mod guest_memory;
mod host;
mod invalidate;
mod memslot;
mod mmio;
mod mmu;
mod nx;
mod region;
mod shadow;
mod spte;
mod srcu;
mod stats;
#[cfg_attr(not(feature = "model"), allow(unreachable_pub))]
mod sync;
mod tdp;
mod track;
mod vcpu;

pub use config::{Config, ConfigError, DirtyMethod};
pub use dirty_log::{DirtyLogError, DirtySink};
pub use fault::{FaultError, FaultResult};
pub use gate::{Entry, Flush, Gate, Processors};
pub use guest_memory::AccessError;
pub use host::{Gone, HostAccess, HostMemory, ProcessMemory};
pub use invalidate::Invalidation;
pub use memslot::{AddressSpace, MemoryRegion, Memslot, Memslots, SlotError, SlotFlags, SlotId};
pub use mmio::MmioAccess;
pub use mmu::{Mmu, OutOfTables, SlotsGuard};
pub use shadow::{
    GuestMode, NestedEpt, NestedResult, ShadowPointer, ShadowResult, nested_qualification,
};
pub use stats::Stats;
#[cfg(feature = "model")]
pub use sync::{Mutant, set_mutant};
pub use tdp::CACHE_TABLES;
pub use track::{TrackError, WriteListener};
pub use vcpu::Vcpu;
