//! Shadow pages: where they are found, what leads to them, what they lead to, and how they die.

use super::entry::Entry;
use super::role::{Kind, Modes, Role};
use crate::mmu::{Exclusive, Mmu};
use crate::spte::Spte;
use crate::sync::{self, Mutex, MutexGuard};
use crate::tdp::{Cell, OwnedTable};
use arch::addr::{Gfn, Hva};
use arch::paging::Level;
use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicU64};

/// Entries in a table.
pub(super) const ENTRIES: usize = 512;

/// A hash of small integers.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Mix(u64);

impl Hasher for Mix {
    fn finish(&self) -> u64 {
        self.0 ^ self.0 >> 29
    }
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(byte.into());
        }
    }
    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0.rotate_left(5) ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

pub(super) type Map<V> = HashMap<u64, V, BuildHasherDefault<Mix>>;

/// Index of a shadow page in [`State::pages`].
pub(super) type PageId = u32;

/// An entry of a shadow page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) page: PageId,
    pub(super) index: u16,
}

/// Places; nearly always one.
#[derive(Clone, Debug)]
pub(super) enum Places {
    One(Place),
    Many(Vec<Place>),
}

impl Places {
    fn add(&mut self, place: Place) {
        match self {
            Places::One(first) => *self = Places::Many(vec![*first, place]),
            Places::Many(all) => all.push(place),
        }
    }

    /// Removes a place; true if none is left.
    fn remove(&mut self, place: Place) -> bool {
        match self {
            Places::One(first) => *first == place,
            Places::Many(all) => {
                if let Some(at) = all.iter().position(|&other| other == place) {
                    all.swap_remove(at);
                }
                all.is_empty()
            }
        }
    }

    pub(super) fn as_slice(&self) -> &[Place] {
        match self {
            Places::One(first) => std::slice::from_ref(first),
            Places::Many(all) => all,
        }
    }
}

/// One shadow page.
#[derive(Debug)]
pub(super) struct Page {
    pub(super) table: OwnedTable,
    pub(super) role: Role,
    /// The guest table's frame, or the first frame of a direct page.
    pub(super) gfn: Gfn,
    /// Frames of the leaves, where they do not follow from `gfn`.
    gfns: Option<Box<[u64; ENTRIES]>>,
    parents: Vec<Place>,
    /// Told apart from a page that had the same index before.
    born: u64,
    /// Emulated writes since the page was last used.
    pub(super) writes: u8,
    /// The guest table is writable and entries may lag behind it.
    pub(super) is_unsync: bool,
    /// A vCPU may use it as its root.
    pub(super) root: Option<Arc<Validity>>,
}

/// Whether a root still is one.
#[derive(Debug, Default)]
pub(crate) struct Validity(AtomicBool);

impl Validity {
    pub(crate) fn is_valid(&self) -> bool {
        !self.0.load(SeqCst)
    }

    fn end(&self) {
        self.0.store(true, SeqCst);
    }
}

/// What makes a root that no guest table stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum UpperKey {
    /// The page directory of 32-bit paging.
    Directory(u64),
    /// The PDPTE registers.
    Pdptes([u64; 4]),
    /// A CR3 that leads nowhere.
    Nowhere,
}

/// The shadow pages of a VM.
#[derive(Debug)]
pub(crate) struct Shadow {
    state: Mutex<State>,
    /// Counts the times that more went at one entry than a processor drops for INVLPG: a leaf of
    /// a large guest page whose processor translations are smaller.
    large_drops: Arc<AtomicU64>,
}

impl Default for Shadow {
    fn default() -> Self {
        let large_drops = Arc::<AtomicU64>::default();
        let state = Mutex::new(State {
            large_drops: Arc::clone(&large_drops),
            ..State::default()
        });
        Self { state, large_drops }
    }
}

#[derive(Debug, Default)]
pub(super) struct State {
    pages: Vec<Option<Page>>,
    free: Vec<PageId>,
    /// Pages by frame.
    by_gfn: Map<Vec<PageId>>,
    pub(super) uppers: HashMap<(UpperKey, u16, crate::AddressSpace), PageId>,
    pub(super) modes: Modes,
    /// Leaves by first frame, per level.
    rmaps: [Map<Places>; 3],
    /// In order of birth; entries of pages that died are skipped.
    ages: VecDeque<(PageId, u64)>,
    births: u64,
    live: usize,
    /// May hold pages that are not unsync (any more).
    pub(super) unsync: Vec<PageId>,
    large_drops: Arc<AtomicU64>,
    /// Entries were taken away, or lost rights, and not flushed.
    pub(super) is_stale: bool,
    /// Tables that no entry leads to: free after a flush.
    pub(super) dead: Vec<OwnedTable>,
}

/// A frame of an address space as a key.
pub(super) fn key(space: crate::AddressSpace, gfn: Gfn) -> u64 {
    gfn.get() | (space.index() as u64) << 63
}

impl Shadow {
    /// The state; the exclusive lock is held.
    pub(super) fn state(&self, _: &Exclusive<'_>) -> MutexGuard<'_, State> {
        sync::lock(&self.state)
    }

    pub(super) fn large_drops(&self) -> u64 {
        self.large_drops.load(SeqCst)
    }
}

impl Page {
    pub(super) fn cell(&self, index: usize) -> &Cell {
        &self.table.page().cells()[index]
    }

    pub(super) fn entry(&self, index: usize) -> Entry {
        Entry::from_raw(self.cell(index).load().raw())
    }

    pub(super) fn address(&self) -> Hva {
        self.table.page().address()
    }

    /// The first frame of the leaf at `index`.
    pub(super) fn leaf_gfn(&self, index: usize) -> Gfn {
        match &self.gfns {
            Some(gfns) => Gfn::new(gfns[index]),
            None => self
                .gfn
                .wrapping_add(index as u64 * self.role.level.pages()),
        }
    }

    fn swap(&self, index: usize, new: Entry) -> Entry {
        Entry::from_raw(self.cell(index).swap(Spte::from_raw(new.raw())).raw())
    }

    /// Changes the entry at `index`, whatever flags a processor sets meanwhile; true if it changed.
    pub(super) fn change(&self, index: usize, change: impl Fn(Entry) -> Entry) -> bool {
        let by = |spte: Spte| Some(Spte::from_raw(change(Entry::from_raw(spte.raw())).raw()));
        self.cell(index).update(by).is_some()
    }
}

impl State {
    pub(super) fn page(&self, id: PageId) -> &Page {
        match self.pages.get(id as usize) {
            Some(Some(page)) => page,
            _ => unreachable!("links and lists lead to pages that are alive"),
        }
    }

    pub(super) fn page_mut(&mut self, id: PageId) -> &mut Page {
        match self.pages.get_mut(id as usize) {
            Some(Some(page)) => page,
            _ => unreachable!("links and lists lead to pages that are alive"),
        }
    }

    pub(super) fn try_page(&self, id: PageId) -> Option<&Page> {
        self.pages.get(id as usize)?.as_ref()
    }

    /// Shadow pages alive.
    pub(super) fn live(&self) -> usize {
        self.live
    }

    pub(super) fn find(&self, gfn: Gfn, role: &Role) -> Option<PageId> {
        let ids = self.by_gfn.get(&key(role.space, gfn))?;
        ids.iter().copied().find(|&id| self.page(id).role == *role)
    }

    /// The pages that shadow the guest table in that frame.
    pub(super) fn tables_of(&self, space: crate::AddressSpace, gfn: Gfn) -> Vec<PageId> {
        let ids = self.by_gfn.get(&key(space, gfn));
        let all = ids.into_iter().flatten().copied();
        all.filter(|&id| self.page(id).role.kind == Kind::Table)
            .collect()
    }

    /// Puts a page in. Its table is empty.
    pub(super) fn insert(&mut self, table: OwnedTable, gfn: Gfn, role: Role) -> PageId {
        self.births += 1;
        let has_gfns = role.kind == Kind::Table && role.level <= Level::PDPTE;
        let page = Page {
            table,
            role,
            gfn,
            gfns: has_gfns.then(|| Box::new([0; ENTRIES])),
            parents: Vec::new(),
            born: self.births,
            writes: 0,
            is_unsync: false,
            root: None,
        };
        let id = self.free.pop().unwrap_or_else(|| {
            self.pages.push(None);
            (self.pages.len() - 1) as PageId
        });
        self.ages.push_back((id, page.born));
        self.pages[id as usize] = Some(page);
        if role.kind != Kind::Upper {
            self.by_gfn
                .entry(key(role.space, gfn))
                .or_default()
                .push(id);
        }
        self.live += 1;
        id
    }

    /// Links `child` at a place that is empty.
    pub(super) fn link(&mut self, at: Place, child: PageId) {
        let (address, mode) = (self.page(child).address(), self.page(child).role.mode);
        self.page_mut(child).parents.push(at);
        let link = Entry::table(self.modes.get(mode).walker(), address);
        self.page(at.page).swap(at.index.into(), link);
    }

    /// The page that the link at a place leads to.
    pub(super) fn child(&self, at: Place, level: Level) -> Option<PageId> {
        let entry = self.page(at.page).entry(at.index.into());
        if !entry.is_table(level) {
            return None;
        }
        let id = crate::tdp::mark_word(entry.address()).load(SeqCst) as PageId;
        Some(id)
    }

    /// Puts a leaf or MMIO entry in the place of whatever is there; true if anything changed.
    pub(super) fn set_leaf(&mut self, at: Place, gfn: Gfn, new: Entry) -> bool {
        let index = usize::from(at.index);
        let (old, level) = {
            let page = self.page(at.page);
            (page.entry(index), page.role.level)
        };
        let is_same_frame = old.is_leaf(level)
            && old.address() == new.address()
            && self.page(at.page).leaf_gfn(index) == gfn;
        if !(new.is_present() && is_same_frame) {
            self.clear(at);
        } else if old.is_same(new) {
            return false;
        } else if old.is_writable() && !new.is_writable()
            || (old.rights() - new.rights()).bits() != 0
        {
            self.is_stale = true;
        }
        if let Some(gfns) = &mut self.page_mut(at.page).gfns {
            gfns[index] = gfn.get();
        }
        self.page(at.page).swap(index, new);
        if new.is_present() && !is_same_frame {
            let space = self.page(at.page).role.space;
            self.rmaps[level.index()]
                .entry(key(space, gfn))
                .and_modify(|places| places.add(at))
                .or_insert(Places::One(at));
        }
        true
    }

    /// Empties a place; true if something was there. Flushes nothing.
    pub(super) fn clear(&mut self, at: Place) -> bool {
        let index = usize::from(at.index);
        let page = self.page(at.page);
        let (level, space) = (page.role.level, page.role.space);
        let (gfn, child) = (page.leaf_gfn(index), self.child(at, level));
        let old = self.page(at.page).swap(index, Entry::EMPTY);
        if old == Entry::EMPTY {
            return false;
        }
        if level > Level::PTE {
            self.large_drops.fetch_add(1, SeqCst);
        }
        if let Some(child) = child {
            let parents = &mut self.page_mut(child).parents;
            if let Some(n) = parents.iter().position(|&parent| parent == at) {
                parents.swap_remove(n);
            }
            self.is_stale = true;
        } else if old.is_leaf(level) {
            let map = &mut self.rmaps[level.index()];
            let key = key(space, gfn);
            if map.get_mut(&key).is_some_and(|places| places.remove(at)) {
                map.remove(&key);
            }
            self.is_stale = true;
        }
        true
    }

    /// Whether `page` is `from` or below it.
    pub(super) fn leads_to(&self, from: PageId, page: PageId) -> bool {
        let top = self.page(from).role.level;
        from == page
            || self.page(page).parents.iter().any(|parent| {
                self.page(parent.page).role.level <= top && self.leads_to(from, parent.page)
            })
    }

    /// The leaves at `level` whose block begins at `gfn`.
    pub(super) fn leaves(&self, space: crate::AddressSpace, gfn: Gfn, level: Level) -> Vec<Place> {
        let places = self.rmaps[level.index()].get(&key(space, gfn));
        places.map_or_else(Vec::new, |places| places.as_slice().to_vec())
    }

    /// All leaves that overlap the range.
    pub(super) fn leaves_in(
        &self,
        space: crate::AddressSpace,
        range: &std::ops::Range<Gfn>,
    ) -> Vec<Place> {
        let mut found = Vec::new();
        for (n, map) in self.rmaps.iter().enumerate() {
            let Some(level) = Level::new(n as u8 + 1) else {
                continue;
            };
            let first = range.start.align_down(level.pages());
            let blocks = range.end.get().saturating_sub(first.get()) / level.pages() + 1;
            if blocks as usize <= map.len() {
                let starts = (first.get()..range.end.get()).step_by(level.pages() as usize);
                for gfn in starts {
                    if let Some(places) = map.get(&key(space, Gfn::new(gfn))) {
                        found.extend_from_slice(places.as_slice());
                    }
                }
            } else {
                for (&at, places) in map {
                    let gfn = at & !(1 << 63);
                    let is_here = at >> 63 == space.index() as u64
                        && gfn < range.end.get()
                        && gfn + level.pages() > range.start.get();
                    if is_here {
                        found.extend_from_slice(places.as_slice());
                    }
                }
            }
        }
        found
    }

    /// The oldest page that is nobody's root.
    pub(super) fn oldest(&mut self) -> Option<PageId> {
        for _ in 0..self.ages.len() {
            let (id, born) = self.ages.pop_front()?;
            let Some(page) = self.try_page(id).filter(|page| page.born == born) else {
                continue;
            };
            let is_upper = page.role.kind == Kind::Upper;
            self.ages.push_back((id, born));
            if !is_upper {
                return Some(id);
            }
        }
        None
    }

    /// Every page alive.
    pub(super) fn all(&self) -> Vec<PageId> {
        let ids = 0..self.pages.len() as PageId;
        ids.filter(|&id| self.try_page(id).is_some()).collect()
    }
}

impl Mmu {
    /// Takes a page away: unlinks it, empties it, lets its guest table go. Its table joins the dead,
    /// to be freed after a flush. Pages below stay, to be found again.
    pub(super) fn zap_page(&self, state: &mut State, id: PageId) {
        for parent in std::mem::take(&mut state.page_mut(id).parents) {
            state
                .page(parent.page)
                .swap(parent.index.into(), Entry::EMPTY);
        }
        for index in 0..ENTRIES as u16 {
            state.clear(Place { page: id, index });
        }
        let Some(page) = state.pages[id as usize].take() else {
            return;
        };
        state.free.push(id);
        state.live -= 1;
        state.is_stale = true;
        if let Some(root) = &page.root {
            root.end();
        }
        if page.role.kind == Kind::Upper {
            state.uppers.retain(|_, &mut upper| upper != id);
        } else {
            let key = key(page.role.space, page.gfn);
            if let Some(ids) = state.by_gfn.get_mut(&key) {
                ids.retain(|&other| other != id);
                if ids.is_empty() {
                    state.by_gfn.remove(&key);
                }
            }
        }
        if page.role.kind == Kind::Table && !page.is_unsync {
            self.untrack_table(page.role.space, page.gfn);
        }
        state.dead.push(page.table);
        self.counters.shadow_zapped.add(1);
    }

    /// The guest table's frame takes writes again, as far as this page is concerned.
    pub(super) fn untrack_table(&self, space: crate::AddressSpace, gfn: Gfn) {
        if let Some(slot) = self.snapshot.load().find(space, gfn) {
            slot.untrack(gfn);
        }
    }

    /// Makes every processor let go of what was taken away, and frees dead tables.
    pub(super) fn flush_stale(&self, state: &mut State) {
        if !state.is_stale && state.dead.is_empty() {
            return;
        }
        self.flush(&crate::gate::Flush::All);
        state.is_stale = false;
        for table in state.dead.drain(..) {
            crate::tdp::mark_word(table.page().address()).store(0, SeqCst);
            self.pool.free(table);
        }
    }
}
