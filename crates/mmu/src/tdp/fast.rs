//! The fast path and lockless walks.
//!
//! A leaf that lost a permission only so that its next use is noticed (write protection for the
//! log, ageing) gets it back by one compare-exchange, in a reading session of the vCPU's gate.
//!
//! ```text
//!   vCPU                              reader of the dirty log
//!   leaf := writable                  takes the bits
//!   marks the page dirty              write-protects, flushes, waits for the session
//!   ends its session                  returns
//! ```
//!
//! The mark comes after the exchange: were it before, the log could be taken between the two and
//! the leaf would be writable with no bit to show for it. Because the reader waits for the session,
//! a write through a leaf made writable before its pass is marked by the time it returns.

use super::root::{Protects, Root};
use super::table::{Cell, TablePage};
use crate::fault::{Fault, FaultResult};
use crate::gate::Gate;
use crate::memslot::Memslot;
use crate::mmu::Mmu;
use crate::spte::Spte;
use crate::stats::Counters;
use crate::sync::{Mutant, is_mutant};
use arch::addr::Gfn;
use arch::paging::Level;

/// Entries of a walk without a lock, from the root down to the last.
pub(crate) struct Path<'a> {
    pub(crate) cell: &'a Cell,
    pub(crate) entry: Spte,
    pub(crate) level: Level,
}

/// Walks from a table to the entry that decides about `gfn`.
#[inline]
pub(crate) fn find<'a>(table: &'a TablePage, level: Level, gfn: Gfn) -> Path<'a> {
    let (mut table, mut level) = (table, level);
    loop {
        let cell = table.cell(gfn, level);
        let entry = cell.load();
        match level.below() {
            Some(below) if entry.is_table(level) => {
                // SAFETY: `entry` is a table entry of `table`, which the caller's protection covers.
                table = unsafe { table.child(entry) };
                level = below;
            }
            _ => return Path { cell, entry, level },
        }
    }
}

/// How often the exchange is tried; a loser tries again on the processor's next fault.
const TRIES: u32 = 4;

impl Mmu {
    /// Reads the entry that decides about `gfn`, without a lock. `None` if the root is invalid.
    #[inline]
    pub(crate) fn lockless_entry(&self, gate: &Gate, root: &Root, gfn: Gfn) -> Option<Spte> {
        let reading = gate.read();
        let table = root.table(&reading)?;
        Some(find(table, root.level(), gfn).entry)
    }

    /// The entries from the root to the one that decides about `gfn`.
    pub(crate) fn path(
        &self,
        protection: &impl Protects,
        root: &Root,
        gfn: Gfn,
    ) -> Vec<(Level, Spte)> {
        let mut path = Vec::new();
        let Some(mut table) = root.table(protection) else {
            return path;
        };
        let mut level = root.level();
        loop {
            let entry = table.cell(gfn, level).load();
            path.push((level, entry));
            match level.below() {
                Some(below) if entry.is_table(level) => {
                    // SAFETY: a table entry read from `table` under the caller's protection.
                    table = unsafe { table.child(entry) };
                    level = below;
                }
                _ => return path,
            }
        }
    }

    /// Tries to settle a fault by giving back a permission; `None` if that is not what it lacks.
    pub(crate) fn fast_fault(
        &self,
        gate: &Gate,
        root: &Root,
        slot: &Memslot,
        fault: &Fault,
        counters: &Counters,
    ) -> Option<FaultResult> {
        if !fault.may_be_fast(self.policy.accessed_dirty()) {
            return None;
        }
        let reading = gate.read();
        let table = root.table(&reading)?;
        for _ in 0..TRIES {
            let Path { cell, entry, level } = find(table, root.level(), fault.gfn);
            if !entry.is_leaf(level) {
                return None;
            }
            if entry.allows(fault.access) {
                counters.spurious.bump();
                return Some(FaultResult::Spurious);
            }
            let new = permitted(entry, level, slot, fault)?;
            if cell.exchange(entry, new).is_ok() {
                if fault.access.is_write && !is_mutant(Mutant::NoFastPathMark) {
                    crate::sync::point();
                    self.mark_slot_dirty(slot, fault.gfn);
                }
                counters.fast_fixed.bump();
                return Some(FaultResult::Fixed);
            }
        }
        counters.fast_lost.bump();
        None
    }
}

/// The entry with the permission that the fault asks for, if it was only put aside.
fn permitted(entry: Spte, level: Level, slot: &Memslot, fault: &Fault) -> Option<Spte> {
    let mut new = if entry.is_aged() {
        entry.restored()
    } else {
        entry
    };
    if fault.access.is_write && !new.is_writable() {
        let needs_split = level > Level::PTE && slot.logs_dirty();
        if needs_split || !new.may_become_writable() {
            return None;
        }
        new = new.made_writable();
    }
    Some(new).filter(|new| new.allows(fault.access))
}
