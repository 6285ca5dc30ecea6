//! Shadow paging: KVM without EPT. Not built yet.
//!
//! Its place among the rest: a vCPU in shadow mode enters guest mode with a shadow CR3 instead of an
//! EPTP. #PF, CR accesses, INVLPG and INVPCID exit. A fault walks the guest's tables with
//! [`arch::paging::walk`] over one of [`arch::paging::GuestTables`]' formats (or, for a nested
//! guest, EPT: the guest format is a type parameter), and fills shadow pages that are keyed by role
//! and guest table frame.
//!
//! What it will use of this crate as it stands: memslots and their write tracking (guest tables are
//! tracked pages; [`crate::WriteListener`] reports emulated writes to them), the table pool, the
//! gate and its flush protocol, the invalidation sequence, the dirty bitmap, the generation of MMIO
//! entries, the order of steps in `fault`. What it adds: roles, the hash of shadow pages, reverse
//! maps, unsync leaves, entries in the guest formats.
