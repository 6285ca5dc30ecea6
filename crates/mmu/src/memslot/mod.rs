//! Memslots: which guest frames have host memory behind them.
//!
//! * `slot`: one slot and the state of its pages (dirty bitmap, write tracking, execution traps,
//!   what keeps huge pages away, which host memory has been probed).
//! * `set`: an immutable snapshot of all slots with its generation, and lookup.
//! * `change`: judging a requested change and making the next snapshot.
//!
//! A snapshot is read without a lock, inside a read section; a change publishes another snapshot
//! and waits until the old one's readers have left before it relies on nobody using it.

mod change;
mod set;
mod slot;

pub(crate) use change::{Change, plan};
pub use change::{MemoryRegion, SlotError};
pub(crate) use set::UPDATE_IN_PROGRESS;
pub use set::{AddressSpace, Memslots};
pub(crate) use slot::Probed;
pub use slot::{Memslot, SlotFlags, SlotId};
