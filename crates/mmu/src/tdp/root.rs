//! Roots.

use super::table::{OwnedTable, TablePage, TablePool};
use crate::gate::Reading;
use crate::memslot::AddressSpace;
use crate::mmu::{Exclusive, Shared};
use arch::addr::Hva;
use arch::paging::Level;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::SeqCst;

/// The root table of one address space.
///
/// A root is made invalid once, and taken apart as soon as every processor and reader has noticed.
/// Whoever still holds it afterwards keeps its page allocated and does not look at it.
#[derive(Debug)]
pub(crate) struct Root {
    space: AddressSpace,
    level: Level,
    table: Option<OwnedTable>,
    pool: Arc<TablePool>,
    is_invalid: AtomicBool,
}

/// A right to look into tables: they stay allocated while it lasts.
pub(crate) trait Protects {}
impl Protects for Shared<'_> {}
impl Protects for Exclusive<'_> {}
impl Protects for Reading<'_> {}

impl Root {
    /// An empty root; `None` at the table limit.
    pub(crate) fn new(space: AddressSpace, level: Level, pool: &Arc<TablePool>) -> Option<Self> {
        let table = Some(pool.allocate()?);
        let is_invalid = AtomicBool::new(false);
        Some(Self {
            space,
            level,
            table,
            pool: Arc::clone(pool),
            is_invalid,
        })
    }

    fn page(&self) -> &TablePage {
        match &self.table {
            Some(table) => table.page(),
            None => unreachable!("taken only when dropped"),
        }
    }

    pub(crate) fn space(&self) -> AddressSpace {
        self.space
    }

    pub(crate) fn level(&self) -> Level {
        self.level
    }

    pub(crate) fn address(&self) -> Hva {
        self.page().address()
    }

    #[inline]
    pub(crate) fn is_valid(&self) -> bool {
        !self.is_invalid.load(SeqCst)
    }

    pub(crate) fn invalidate(&self) {
        self.is_invalid.store(true, SeqCst);
    }

    /// The table, unless the root is invalid. Validity is looked at after the protection began: if
    /// it still holds then, whoever invalidates the root waits for the protection to end.
    #[inline]
    pub(crate) fn table<'a>(&'a self, _protection: &'a impl Protects) -> Option<&'a TablePage> {
        crate::sync::point();
        if self.is_valid() {
            Some(self.page())
        } else {
            None
        }
    }

    /// The table of an invalid root, for taking apart what hangs below it.
    pub(crate) fn dead_table(&self) -> &TablePage {
        debug_assert!(!self.is_valid());
        self.page()
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        if let Some(table) = self.table.take() {
            self.pool.free(table);
        }
    }
}
