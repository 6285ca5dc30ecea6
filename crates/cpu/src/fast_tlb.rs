//! The translations that generated code looks up by itself.
//!
//! Each context (address space and class, as [`crate::tlb`] numbers them) has a table of its own,
//! so that a hit is one subtraction and one compare, and a switch of address spaces or of
//! privilege is a change of a pointer. A table holds no translation that [`crate::tlb::Tlb`]
//! would not answer at the same moment: whatever drops rights there drops them here.
//!
//! ```text
//!   offset = linear − tag          (one of the table's entry for the linear page)
//!   offset > 4096 − size ──▶ slow path
//!   host address = page + offset
//! ```
//!
//! An invalid entry has a tag that only a non-canonical address is near to, and a page that is not
//! canonical either, so that an access by it faults and takes the slow path.
//!
//! A table starts small, so that a short-lived process costs little, and grows when it misses
//! often although the slower TLB knows the answer.

/// Bytes of an entry, as a shift.
pub(crate) const ENTRY_SHIFT: u32 = 5;
/// Entries of a new table, and of one that has grown to the full.
const SMALLEST: usize = 256;
const LARGEST: usize = 8192;
/// Tables that are kept.
const TABLES: usize = 16;

/// The tag of an invalid entry.
pub(crate) const INVALID_TAG: u64 = 1 << 63;
const INVALID_PAGE: u64 = 1 << 62;
const PAGE_MASK: u64 = !0xfff;

/// The translation of one page for reads and for writes. `repr(C)`: generated code reads it.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct FastEntry {
    /// Linear address of the page, if reads need no check.
    pub read_tag: u64,
    /// Host address of the page, for reads.
    pub read_page: u64,
    /// Linear address of the page, if writes need no check.
    pub write_tag: u64,
    /// Host address of the page, for writes.
    pub write_page: u64,
}

const INVALID: FastEntry = FastEntry {
    read_tag: INVALID_TAG,
    read_page: INVALID_PAGE,
    write_tag: INVALID_TAG,
    write_page: INVALID_PAGE,
};

const _: () = assert!(size_of::<FastEntry>() == 1 << ENTRY_SHIFT);

struct Table {
    context: u64,
    entries: Box<[FastEntry]>,
    /// Entries taken from the TLB since the table last grew.
    refills: usize,
    /// When the table was last selected.
    used: u64,
    is_empty: bool,
}

/// The tables of one processor, and which of them is in use.
pub(crate) struct FastTlb {
    tables: Vec<Table>,
    current: usize,
    clock: u64,
}

impl FastTlb {
    pub(crate) fn new() -> FastTlb {
        FastTlb {
            tables: Vec::new(),
            current: 0,
            clock: 0,
        }
    }

    /// Selects the table of `context`; its address, and the mask of byte offsets in it.
    pub(crate) fn select(&mut self, context: u64) -> (u64, u64) {
        self.clock += 1;
        let is_current = |table: &Table| table.context == context;
        if !self.tables.get(self.current).is_some_and(is_current) {
            self.current = match self.tables.iter().position(is_current) {
                Some(found) => found,
                None => self.take(context),
            };
        }
        let table = &mut self.tables[self.current];
        table.used = self.clock;
        let mask = (table.entries.len() - 1) << ENTRY_SHIFT;
        (table.entries.as_ptr() as u64, mask as u64)
    }

    /// An empty table for `context`: a new one, or the one not used for longest.
    fn take(&mut self, context: u64) -> usize {
        let at = if self.tables.len() < TABLES {
            self.tables.push(Table {
                context,
                entries: vec![INVALID; SMALLEST].into(),
                refills: 0,
                used: 0,
                is_empty: true,
            });
            self.tables.len() - 1
        } else {
            let oldest = self.tables.iter().enumerate().min_by_key(|(_, t)| t.used);
            oldest.map_or(0, |(n, _)| n)
        };
        let table = &mut self.tables[at];
        table.context = context;
        table.clear();
        at
    }

    /// Records what the TLB knows of the page of `gva` in the current context. Returns whether
    /// the table moved, so that it must be selected anew.
    pub(crate) fn fill(
        &mut self,
        context: u64,
        gva: u64,
        hva: u64,
        read: bool,
        write: bool,
    ) -> bool {
        let current = self.current;
        let Some(table) = self
            .tables
            .get_mut(current)
            .filter(|t| t.context == context)
        else {
            return false;
        };
        table.refills += 1;
        let grows = table.refills > 2 * table.entries.len() && table.entries.len() < LARGEST;
        if grows {
            let len = 4 * table.entries.len();
            table.entries = vec![INVALID; len.min(LARGEST)].into();
            table.refills = 0;
        }
        let (linear, page) = (gva & PAGE_MASK, hva & PAGE_MASK);
        let entry = table.entry(gva);
        *entry = INVALID;
        if read {
            (entry.read_tag, entry.read_page) = (linear, page);
        }
        if write {
            (entry.write_tag, entry.write_page) = (linear, page);
        }
        table.is_empty = false;
        grows
    }

    /// Drops everything.
    pub(crate) fn clear(&mut self) {
        for table in &mut self.tables {
            table.clear();
        }
    }

    /// Drops the translation of one 4 KiB page in every context of an address space.
    pub(crate) fn drop_page(&mut self, number: u64, gva: u64) {
        for table in self.tables.iter_mut().filter(|t| t.context >> 2 == number) {
            *table.entry(gva) = INVALID;
        }
    }

    /// Forbids writes to a host page.
    pub(crate) fn revoke_writes(&mut self, hva_page: u64) {
        for table in self.tables.iter_mut().filter(|table| !table.is_empty) {
            for entry in &mut table.entries {
                if entry.write_page == hva_page {
                    (entry.write_tag, entry.write_page) = (INVALID_TAG, INVALID_PAGE);
                }
            }
        }
    }
}

impl Table {
    fn entry(&mut self, gva: u64) -> &mut FastEntry {
        let mask = self.entries.len() - 1;
        &mut self.entries[(gva >> 12) as usize & mask]
    }

    fn clear(&mut self) {
        if !self.is_empty {
            self.entries.fill(INVALID);
            self.is_empty = true;
        }
        self.refills = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lookup(fast: &mut FastTlb, context: u64, gva: u64) -> FastEntry {
        fast.select(context);
        let current = fast.current;
        *fast.tables[current].entry(gva)
    }

    #[test]
    fn a_context_sees_only_what_was_filled_for_it() {
        let mut fast = FastTlb::new();
        fast.select(4);
        fast.fill(4, 0x5123, 0x7000_0123, true, false);
        let entry = lookup(&mut fast, 4, 0x5fff);
        assert_eq!((entry.read_tag, entry.read_page), (0x5000, 0x7000_0000));
        assert_eq!(entry.write_tag, INVALID_TAG);
        assert_eq!(lookup(&mut fast, 5, 0x5000).read_tag, INVALID_TAG);
        assert_eq!(lookup(&mut fast, 4, 0x5000).read_tag, 0x5000);
    }

    #[test]
    fn a_table_that_misses_often_grows_and_the_oldest_is_reused() {
        let mut fast = FastTlb::new();
        let (_, small) = fast.select(4);
        let grew = (0..4 * SMALLEST as u64).any(|n| fast.fill(4, n << 12, n << 12, true, true));
        let (_, large) = fast.select(4);
        assert!(grew && large > small);
        for context in 5..5 + TABLES as u64 {
            fast.select(context);
        }
        assert_eq!(fast.tables.len(), TABLES);
        assert_eq!(lookup(&mut fast, 4, 0).read_tag, INVALID_TAG);
    }

    #[test]
    fn pages_and_rights_are_dropped_in_every_context() {
        let mut fast = FastTlb::new();
        for context in [4, 5] {
            fast.select(context);
            fast.fill(context, 0x5000, 0x9000, true, true);
            fast.fill(context, 0x6000, 0x9000, true, true);
        }
        fast.drop_page(1, 0x5000);
        fast.revoke_writes(0x9000);
        for context in [4, 5] {
            assert_eq!(lookup(&mut fast, context, 0x5000).read_tag, INVALID_TAG);
            let other = lookup(&mut fast, context, 0x6000);
            assert_eq!((other.read_tag, other.write_tag), (0x6000, INVALID_TAG));
        }
    }
}
