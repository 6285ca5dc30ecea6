//! Roots: from control registers to the table that the processor walks.

use super::page::{PageId, Place, State, UpperKey, Validity};
use super::role::{Kind, Role, Selector, Tables};
use crate::mmu::{Mmu, OutOfTables, TOP_UPS};
use crate::vcpu::Vcpu;
use arch::addr::{Gfn, Gpa, Hva};
use arch::paging::{
    EptPaging, GuestControls, GuestRoot, GuestTables, Level, Privilege, Rights, entry as x86,
};
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

/// The guest's paging mode and where its tables start.
#[derive(Clone, Copy, Debug)]
pub struct GuestMode {
    /// What decides how tables are walked: the guest's registers, not the processor's.
    pub controls: GuestControls,
    /// Where they start.
    pub root: GuestRoot,
    /// What decides accesses besides. Not looked at for roots.
    pub privilege: Privilege,
    /// CPL is 3: a supervisor access is an implicit one then.
    pub is_user: bool,
}

/// The EPT that a guest, as a hypervisor, has made for a guest of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NestedEpt {
    /// How it is walked. Whether it has accessed and dirty flags, its EPTP says, and the EPTP made of
    /// [`ShadowPointer`] has to say the same.
    pub paging: EptPaging,
    /// The guest-physical address of its root table.
    pub root: u64,
}

/// What to enter guest mode with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShadowPointer {
    /// The root table.
    pub root: Hva,
    /// Its levels, 4 or 5.
    pub levels: u8,
}

/// A root that a vCPU knows.
#[derive(Clone, Debug)]
struct Known {
    selector: Selector,
    root: GuestRoot,
    pointer: ShadowPointer,
    id: PageId,
    validity: Arc<Validity>,
    tables: Tables,
}

/// Previous roots that a vCPU keeps besides the current one.
const PREVIOUS: usize = 3;

/// A vCPU's part of shadow paging: its roots, the current one first.
#[derive(Debug, Default)]
pub(crate) struct VcpuShadow {
    known: Vec<Known>,
    /// [`super::page::Shadow::large_drops`] when the processor last dropped everything.
    pub(super) large_drops: u64,
}

/// The current root of a vCPU.
#[derive(Clone, Copy, Debug)]
pub(super) struct Current {
    pub(super) id: PageId,
    pub(super) tables: Tables,
    /// Where the guest's tables start.
    pub(super) root: GuestRoot,
}

impl VcpuShadow {
    /// The root last loaded, if it is valid.
    pub(super) fn current(&self) -> Option<Current> {
        let known = self.known.first()?;
        known.validity.is_valid().then_some(Current {
            id: known.id,
            tables: known.tables,
            root: known.root,
        })
    }

    /// The root last loaded, if it is valid.
    pub(super) fn pointer(&self) -> Option<ShadowPointer> {
        let known = self.known.first()?;
        known.validity.is_valid().then_some(known.pointer)
    }

    /// The roots that are valid. Looked at under the lock they stay so.
    pub(super) fn roots(&self) -> impl Iterator<Item = PageId> {
        let valid = self.known.iter().filter(|k| k.validity.is_valid());
        valid.map(|known| known.id)
    }

    pub(crate) fn clear(&mut self) {
        self.known.clear();
    }
}

impl Mmu {
    /// The tables to enter guest mode with, in shadow mode. To be called before every entry: it is
    /// cheap as long as the guest's registers and the root stay the same, and for the last few
    /// address spaces.
    #[inline]
    pub fn load_shadow(
        &self,
        vcpu: &mut Vcpu,
        guest: &GuestMode,
    ) -> Result<ShadowPointer, OutOfTables> {
        let selector = Selector::Paging(guest.controls);
        self.load_tables(vcpu, &selector, &guest.root)
    }

    /// The tables to enter guest mode with for the guest of a guest: they shadow that EPT. To be
    /// called before every such entry. What the guest says by INVEPT, and its loading of another
    /// EPTP, has to be told by [`Mmu::sync_shadow`].
    pub fn load_nested(
        &self,
        vcpu: &mut Vcpu,
        nested: &NestedEpt,
    ) -> Result<ShadowPointer, OutOfTables> {
        let root = GuestRoot {
            cr3: nested.root,
            pdptes: [0; 4],
        };
        self.load_tables(vcpu, &Selector::Ept(nested.paging), &root)
    }

    #[inline]
    fn load_tables(
        &self,
        vcpu: &mut Vcpu,
        selector: &Selector,
        root: &GuestRoot,
    ) -> Result<ShadowPointer, OutOfTables> {
        let known = &mut vcpu.shadow.known;
        let found = known
            .iter()
            .position(|k| k.root == *root && k.selector == *selector);
        if let Some(at) = found {
            if known[at].validity.is_valid() {
                known[..=at].rotate_right(1);
                return Ok(known[0].pointer);
            }
            known.remove(at);
        }
        self.make_root(vcpu, selector, root)
    }

    #[cold]
    fn make_root(
        &self,
        vcpu: &mut Vcpu,
        selector: &Selector,
        root: &GuestRoot,
    ) -> Result<ShadowPointer, OutOfTables> {
        self.has_nested
            .fetch_or(matches!(selector, Selector::Ept(_)).into(), SeqCst);
        if !self.top_up_shadow(vcpu) {
            return Err(OutOfTables);
        }
        let slots = self.slots();
        let exclusive = self.exclusive();
        let state = &mut *self.shadow.state(&exclusive);
        let mode = state.modes.index(selector);
        let tables = selector.tables();
        let level = state.modes.get(mode).root_level();
        let role = Role {
            kind: Kind::Table,
            level,
            quadrant: 0,
            rights: Rights::WRITABLE | Rights::USER | Rights::EXECUTABLE,
            key: 0,
            mode,
            space: vcpu.space,
        };
        let cr3 = root.cr3 & x86::ADDRESS;
        let is_there = |gfn| slots.find(vcpu.space, gfn).is_some_and(|s| !s.is_invalid);
        let upper = |key| {
            let kind = Kind::Upper;
            (Role { kind, ..role }, Some(key))
        };
        let format = match &tables {
            Tables::Paging(paging) => Some(paging.tables()),
            Tables::Ept(_) => None,
        };
        let (role, key) = match format {
            Some(GuestTables::Off) => {
                let kind = Kind::Direct;
                (Role { kind, ..role }, None)
            }
            Some(GuestTables::Legacy(_)) => upper(UpperKey::Directory(cr3 & 0xffff_f000)),
            Some(GuestTables::Pae(_)) => upper(UpperKey::Pdptes(root.pdptes)),
            _ if is_there(Gpa::new(cr3).gfn()) => (role, None),
            _ => upper(UpperKey::Nowhere),
        };
        let gfn = if role.kind == Kind::Table {
            Gpa::new(cr3).gfn()
        } else {
            Gfn::new(0)
        };
        let found = match key {
            None => self.find_or_make(&exclusive, state, vcpu, &slots, gfn, role),
            Some(key) => self.upper_root(state, vcpu, key, role),
        };
        let id = found.ok_or(OutOfTables)?;
        let page = state.page_mut(id);
        let validity = Arc::clone(page.root.get_or_insert_default());
        let pointer = ShadowPointer {
            root: page.address(),
            levels: level.number(),
        };
        let known = &mut vcpu.shadow.known;
        known.truncate(PREVIOUS);
        known.insert(
            0,
            Known {
                selector: *selector,
                root: *root,
                pointer,
                id,
                validity,
                tables,
            },
        );
        Ok(pointer)
    }

    /// A root of 32-bit or PAE paging, with the one page that its first entry leads to.
    fn upper_root(
        &self,
        state: &mut State,
        vcpu: &mut Vcpu,
        key: UpperKey,
        role: Role,
    ) -> Option<PageId> {
        let key = (key, role.mode, role.space);
        if let Some(&id) = state.uppers.get(&key) {
            return Some(id);
        }
        if state.uppers.len() >= MAX_UPPERS {
            self.drop_uppers(state);
        }
        let id = self.make_page(state, vcpu, Gfn::new(0), role)?;
        let level = Level::PDPTE;
        if role.level == Level::PML4E {
            let below = self.make_page(state, vcpu, Gfn::new(0), Role { level, ..role })?;
            state.link(Place { page: id, index: 0 }, below);
        }
        state.uppers.insert(key, id);
        Some(id)
    }

    /// Sets tables aside for a fill, making room at the limit.
    pub(super) fn top_up_shadow(&self, vcpu: &mut Vcpu) -> bool {
        // Others may take what was made room for.
        for _ in 0..TOP_UPS {
            if vcpu.cache.top_up() {
                return true;
            }
            self.reclaim_shadow();
        }
        vcpu.cache.top_up()
    }

    /// Zaps the oldest pages: a quarter of the limit, but not more than some.
    pub(crate) fn reclaim_shadow(&self) {
        let exclusive = self.exclusive();
        let state = &mut *self.shadow.state(&exclusive);
        let count = crate::mmu::RECLAIM_BATCH.min(state.live() / 4 + 8);
        for _ in 0..count {
            let Some(id) = state.oldest() else { break };
            self.zap_page(state, id);
            self.counters.table_reclaimed.add(1);
        }
        self.flush_stale(state);
    }

    /// Zaps the roots that stand for no guest table; those in use are made anew.
    fn drop_uppers(&self, state: &mut State) {
        for id in state.uppers.values().copied().collect::<Vec<_>>() {
            let below = state.child(Place { page: id, index: 0 }, Level::PML4E);
            if let Some(below) = below {
                self.zap_page(state, below);
            }
            self.zap_page(state, id);
        }
    }

    pub(super) fn make_page(
        &self,
        state: &mut State,
        vcpu: &mut Vcpu,
        gfn: Gfn,
        role: Role,
    ) -> Option<PageId> {
        let table = vcpu.cache.take()?;
        let address = table.page().address();
        let id = state.insert(table, gfn, role);
        crate::tdp::mark_word(address).store(id.into(), std::sync::atomic::Ordering::SeqCst);
        self.counters.shadow_made.add(1);
        Some(id)
    }
}

/// Roots of 32-bit and PAE guests that are kept.
const MAX_UPPERS: usize = 256;
