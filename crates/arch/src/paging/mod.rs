//! How x86 walks a page table: one algorithm, every format.
//!
//! ```text
//!            ┌ format ─ which bits mean what          (Legacy, Pae, FourLevel, FiveLevel, Ept4, Ept5)
//!  walk ─────┼ mode   ─ masks computed once from control registers and capabilities
//!            └ memory ─ how an entry is read and compare-exchanged, given by the caller
//! ```
//!
//! Walking and judging are separate. [`walk()`] only follows entries and combines rights; the rules
//! of CR0.WP, SMEP, SMAP, NX and protection keys are [`Protection::check`], which a TLB hit can run
//! again on the rights it cached; accessed and dirty bits are written by [`Walk::mark`] once the
//! access is known to be allowed. The functions that put the three together, and repeat the walk
//! when an entry changed under it, are what a processor or an emulator calls:
//!
//! * [`GuestPaging::new`]`(&GuestControls)` computes a mode; keep it until a control register or
//!   CPUID changes. [`GuestPaging::translate`]`(memory, root, gva, access, &Privilege)` gives a
//!   [`Translation`] (address, level, [`Rights`], protection key) or a page fault with its error
//!   code, or the caller's own error from reading a table.
//! * [`EptPaging::new`]`(levels, EptFeatures, maxphyaddr)` and [`EptPaging::translate`]`(memory,
//!   root, gpa, access)` do the same for EPT, telling violation from misconfiguration.
//! * [`TableMemory`] is the caller's side: `read` returns an entry with a handle (a host pointer,
//!   say) that `compare_exchange` gets back. Its `Error` is the caller's, for instance an EPT
//!   violation met while reading a guest table.
//!
//! A two-stage walk is a guest walk whose `TableMemory` translates each table's address through an
//! EPT walk; with EPT accessed and dirty bits on, the processor treats those as writes, which is
//! the access the `TableMemory` passes to the EPT walk.
//!
//! Not here: TLBs, canonical checks (a non-canonical address is #GP or #SS, decided before paging),
//! memory types, and anything that knows where memory is.

mod ept;
mod format;
mod guest;
mod level;
mod protection;
mod walk;

pub use ept::{
    Ept4, Ept5, EptAccess, EptError, EptFault, EptFeatures, EptPaging, EptRights, EptTranslation,
    EptViolation, ept_entry,
};
pub use format::{Entry, Mode, PagingFormat, entry};
pub use guest::{
    FiveLevel, FourLevel, GuestControls, GuestError, GuestPaging, GuestRoot, GuestTables, Legacy,
    Pae, PageFault, Translation,
};
pub use level::Level;
pub use protection::{Access, Privilege, Protection, Rights};
pub use walk::{
    CachedTable, Exchange, Fault, FaultKind, Marked, Step, TableMemory, Walk, WalkError, walk,
};
