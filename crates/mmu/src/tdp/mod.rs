//! TDP: tables keyed by guest-physical address, one root per address space.
//!
//! * `table`, `arena`: table pages and where they come from.
//! * `root`: roots, their validity, and who may look into their tables.
//! * `map`: building a translation, under the shared lock, against other threads that do the same.
//! * `fast`: giving back a permission with one compare-exchange and no lock.
//! * `range`: walking over a range of frames under the exclusive lock: zap, protect, age, clean.
//! * `reclaim`: taking tables apart after every processor has let go.
//!
//! Who may do what:
//!
//! | holding | may |
//! | --- | --- |
//! | the MMU lock, shared | link tables and set leaves by compare-exchange; replace a table by a huge leaf, freezing what was below |
//! | the MMU lock, exclusive | anything, by atomic swaps, since processors and the fast path still write |
//! | a reading session of a gate | read; change a leaf's permission by compare-exchange |
//!
//! A table is freed only after it was unlinked, the exclusive lock has been held since (so nobody
//! under the shared lock still looks at it), and a flush has gone round (so no processor and no
//! lockless reader does).

mod arena;
mod fast;
mod map;
mod range;
mod reclaim;
mod root;
mod table;

pub(crate) use map::MapRequest;
pub(crate) use reclaim::Retired;
pub(crate) use root::Root;
pub use table::CACHE_TABLES;
pub(crate) use table::{Cell, OwnedTable, TableCache, TablePage, TablePool, mark_word};
