//! Shadow paging: KVM without EPT.
//!
//! The processor walks tables that the MMU derives from the guest's: *shadow pages*, whose leaves
//! hold host addresses. #PF, CR accesses, INVLPG and INVPCID exit. A fault walks the guest's tables,
//! sets their accessed and dirty bits, and fills the shadow tables on the way to the page.
//!
//! ```text
//!   guest CR3 ─▶ PML4 ───▶ PDPT ───▶ PD ────▶ PT ────▶ page        guest frames
//!                 ┆         ┆         ┆        ┆
//!   root ──────▶ page ───▶ page ──▶ page ──▶ page ───▶ host page   keyed by (frame, role)
//! ```
//!
//! The EPT that a guest, as a hypervisor, makes for its own guest is one more guest format: what is
//! above is a violation or misconfiguration in place of #PF, and the tables are in EPT's format.
//!
//! * `entry`: entries in the format of what walks them, MMIO entries among them.
//! * `role`: what a shadow page's content depends on besides the guest table.
//! * `page`: shadow pages, their parents, the reverse maps, and how a page dies.
//! * `guest`: guest tables read through the memslots; the walk, in whatever format.
//! * `root`: from control registers to a root.
//! * `fault`: from a #PF to a verdict; filling.
//! * `sync`: guest writes to shadowed tables, unsync pages, INVLPG.
//! * `range`: what the rest of the MMU does to frames: zap, protect, age.
//!
//! Invariants, all under the exclusive MMU lock (processors walk and set flags without it):
//!
//! * A guest table with a shadow page is write-tracked, unless that page is *unsync*. Only
//!   last-level tables are: their entries may lag behind the guest's as a TLB may, and are brought
//!   up to date by the same events that flush a TLB.
//! * Every leaf is in the reverse map of its frame, every link in the parent list of its child.
//! * What a guest's own table write takes away is not flushed: the guest has to do that itself. That
//!   something was taken away is remembered ([`page::State::is_stale`]), so that whoever needs a
//!   frame out of every TLB flushes even if no entry leads to it any more.

mod entry;
mod fault;
mod guest;
mod page;
mod range;
mod role;
mod root;
mod sync;

pub use fault::{NestedResult, ShadowResult, nested_qualification};
pub use root::{GuestMode, NestedEpt, ShadowPointer};

pub(crate) use page::Shadow;
pub(crate) use range::Lost;
pub(crate) use root::VcpuShadow;
