//! Faults on shadow tables: the guest's own #PF, or one that the guest never hears of.
//!
//! The guest's tables are walked without the lock, and its accessed and dirty bits set. Under the
//! lock the shadow tables are filled along the same path. Each guest entry that was used is read
//! again after the table it points to is write-protected: whatever was written before that moment
//! is seen here, whatever is written after it faults.

use super::entry::{Entry, LeafParts, Walker};
use super::guest::{Found, GuestMemory, last_level, translate, translate_nested};
use super::page::{PageId, Place, State};
use super::role::{Kind, Role, Tables};
use super::root::{Current, GuestMode};
use crate::fault::{Fault, FaultError, FaultResult};
use crate::memslot::{Memslot, Memslots, Probed, UPDATE_IN_PROGRESS};
use crate::mmio::MmioAccess;
use crate::mmu::{Exclusive, Mmu, SlotsGuard};
use crate::spte::{GENERATION_MASK, LeafAccess};
use crate::sync::{Mutant, is_mutant, point};
use crate::tdp::TablePage;
use crate::vcpu::Vcpu;
use arch::addr::{Gfn, Gpa, Gva};
use arch::exit::EptViolation as ViolationBits;
use arch::page_fault::ErrorCode;
use arch::paging::{
    Access, EptAccess, EptFault, EptFeatures, EptViolation, GuestTables, Level, Protection, Rights,
    entry as x86,
};
use std::sync::atomic::Ordering::Acquire;

/// What is to be done about a #PF in shadow mode.
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShadowResult {
    /// It is the guest's: a #PF with this error code.
    Guest(ErrorCode),
    /// It is the MMU's, with a verdict as on a fault at this guest-physical address.
    Verdict(FaultResult, Gpa),
}

/// What is to be done about a fault in the guest of a guest.
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NestedResult {
    /// It is the guest's, as the hypervisor that it is.
    Guest(EptFault),
    /// It is the MMU's, with a verdict as on a fault at this address of the guest.
    Verdict(FaultResult, Gpa),
}

/// Bits 8:0 of the qualification of an EPT violation that a guest is to see, as a hypervisor: what was
/// tried and what its tables allow, by the walk; whether there is a linear address and whether the
/// access is to what it translates to, by the exit that the processor made.
pub fn nested_qualification(fault: &EptViolation, features: EptFeatures, exit: u64) -> u64 {
    let of_exit = ViolationBits::LINEAR_VALID | ViolationBits::FINAL;
    fault.qualification(features) | exit & of_exit.bits()
}

/// What a fill needs to know.
struct Fill<'a> {
    slots: &'a Memslots,
    memory: &'a GuestMemory<'a>,
    found: &'a Found,
    gva: u64,
    /// Rights of the leaf to be made.
    rights: Rights,
    current: Current,
}

/// An entry could not be reached.
enum Stop {
    Changed,
    OutOfTables,
}

/// What was tried.
fn access_of(code: ErrorCode) -> Access {
    let mut access = Access::empty();
    access.set(Access::WRITE, code.contains(ErrorCode::WRITE));
    access.set(Access::FETCH, code.contains(ErrorCode::FETCH));
    access.set(Access::USER, code.contains(ErrorCode::USER));
    access
}

/// The index of the entry for a linear address at a level.
pub(super) fn index_of(gva: u64, level: Level) -> u16 {
    (gva >> level.shift() & 511) as u16
}

impl Mmu {
    /// Handles a #PF of a processor in shadow mode at `gva`, with the error code it gave. The vCPU
    /// is out of guest mode, after [`Mmu::load_shadow`] with the same `guest`.
    pub fn handle_shadow_fault(
        &self,
        vcpu: &mut Vcpu,
        guest: &GuestMode,
        gva: Gva,
        code: ErrorCode,
    ) -> ShadowResult {
        vcpu.counters.faults.bump();
        let Some(current) = vcpu.shadow.current() else {
            vcpu.counters.stale_root.bump();
            return ShadowResult::Verdict(FaultResult::Retry, Gpa::new(0));
        };
        let mut access = access_of(code);
        let is_implicit = guest.is_user && !access.contains(Access::USER);
        access.set(Access::IMPLICIT, is_implicit);
        if code.contains(ErrorCode::RSVD)
            && let Some(gpa) = self.shadow_mmio(vcpu, guest, &current, gva.get(), access)
        {
            vcpu.counters.mmio_by_entry.bump();
            let access = MmioAccess {
                gpa,
                is_known: true,
            };
            return ShadowResult::Verdict(FaultResult::Mmio(access), gpa);
        }
        let slots = self.slots();
        let mut memory = GuestMemory {
            mmu: self,
            slots: &slots,
            space: vcpu.space,
        };
        let Tables::Paging(paging) = &current.tables else {
            vcpu.counters.stale_root.bump();
            return ShadowResult::Verdict(FaultResult::Retry, Gpa::new(0));
        };
        let found = match translate(&mut memory, guest, paging, gva.get(), access) {
            Ok(found) => found,
            Err(code) => {
                vcpu.counters.guest_faults.bump();
                return ShadowResult::Guest(code);
            }
        };
        let result = self.shadow_fault(vcpu, &slots, current, &found, gva.get(), access);
        ShadowResult::Verdict(result, found.gpa)
    }

    /// The guest's #PF for an access that goes on faulting although the tables allow it
    /// ([`FaultResult::Spurious`]): an implicit one that the supervisor makes with EFLAGS.AC set, of
    /// which the error code does not tell that it is one.
    pub fn refused_implicit_access(
        &self,
        vcpu: &mut Vcpu,
        guest: &GuestMode,
        gva: Gva,
        code: ErrorCode,
    ) -> Option<ErrorCode> {
        let current = vcpu.shadow.current()?;
        let slots = self.slots();
        let mut memory = GuestMemory {
            mmu: self,
            slots: &slots,
            space: vcpu.space,
        };
        let access = access_of(code) | Access::IMPLICIT;
        let Tables::Paging(paging) = &current.tables else {
            return None;
        };
        let found = translate(&mut memory, guest, paging, gva.get(), access);
        found.err()
    }

    /// Handles what a processor that runs the guest of a guest meets at `gpa`, an address that the
    /// guest's EPT is to translate: a violation of that access, or (`None`) a misconfiguration. The
    /// vCPU is out of guest mode, after [`Mmu::load_nested`].
    pub fn handle_nested_fault(
        &self,
        vcpu: &mut Vcpu,
        gpa: Gpa,
        access: Option<EptAccess>,
    ) -> NestedResult {
        vcpu.counters.faults.bump();
        let current = vcpu.shadow.current();
        let Some((current, Tables::Ept(paging))) = current.map(|c| (c, c.tables)) else {
            vcpu.counters.stale_root.bump();
            return NestedResult::Verdict(FaultResult::Retry, gpa);
        };
        if access.is_none()
            && let Some(entry) = self.shadow_entry(vcpu, gpa.get())
            && self.is_current_mmio(entry)
        {
            vcpu.counters.mmio_by_entry.bump();
            let at = entry.mmio_gfn().gpa().wrapping_add(gpa.page_offset());
            let access = MmioAccess {
                gpa: at,
                is_known: true,
            };
            return NestedResult::Verdict(FaultResult::Mmio(access), at);
        }
        let slots = self.slots();
        let mut memory = GuestMemory {
            mmu: self,
            slots: &slots,
            space: vcpu.space,
        };
        // A misconfiguration does not say what was tried.
        let access = access.unwrap_or(EptAccess::READ);
        let root = current.root.cr3 & x86::ADDRESS;
        let found = match translate_nested(&mut memory, &paging, root, gpa.get(), access) {
            Ok(found) => found,
            Err(fault) => {
                vcpu.counters.guest_faults.bump();
                return NestedResult::Guest(fault);
            }
        };
        let mut tried = Access::empty();
        tried.set(Access::WRITE, access.contains(EptAccess::WRITE));
        tried.set(Access::FETCH, access.contains(EptAccess::FETCH));
        let result = self.shadow_fault(vcpu, &slots, current, &found, gpa.get(), tried);
        NestedResult::Verdict(result, found.gpa)
    }

    /// Whether an entry is MMIO of the memslots as they are.
    fn is_current_mmio(&self, entry: Entry) -> bool {
        let generation = self.generation.load(Acquire);
        entry.is_mmio()
            && entry.mmio_generation() == generation & GENERATION_MASK
            && generation & UPDATE_IN_PROGRESS == 0
    }

    fn shadow_fault(
        &self,
        vcpu: &mut Vcpu,
        slots: &SlotsGuard<'_>,
        current: Current,
        found: &Found,
        gva: u64,
        access: Access,
    ) -> FaultResult {
        let is_write = access.contains(Access::WRITE);
        let fault = Fault {
            gpa: found.gpa,
            gfn: found.gpa.gfn(),
            access: LeafAccess {
                is_write,
                is_fetch: access.contains(Access::FETCH),
            },
            is_present: false,
        };
        let memory = GuestMemory {
            mmu: self,
            slots,
            space: vcpu.space,
        };
        let Some(rights) = effective_rights(&current, found, access) else {
            return FaultResult::WriteProtected;
        };
        let fill = Fill {
            slots,
            memory: &memory,
            found,
            gva,
            rights,
            current,
        };
        let Some(slot) = slots.find(vcpu.space, fault.gfn) else {
            return self.shadow_hole(vcpu, &fill, &fault);
        };
        if slot.is_invalid {
            vcpu.counters.stale_slot.bump();
            return FaultResult::Retry;
        }
        if fault.access.is_fetch && slot.traps_execution(fault.gfn) {
            vcpu.counters.execute_trapped.bump();
            return FaultResult::ExecuteTrap;
        }
        if is_write && slot.is_read_only() {
            vcpu.counters.read_only_writes.bump();
            return FaultResult::Mmio(MmioAccess::uncached(fault.gpa));
        }
        if !self.top_up_shadow(vcpu) {
            return FaultResult::Error(FaultError::OutOfTables);
        }
        self.shadow_map(vcpu, &fill, slot, &fault)
    }

    fn shadow_map(
        &self,
        vcpu: &mut Vcpu,
        fill: &Fill<'_>,
        slot: &Memslot,
        fault: &Fault,
    ) -> FaultResult {
        point();
        let sequence = self.invalidations.sequence();
        let Some(resolved) = self.resolve(slot, fault) else {
            vcpu.counters.host_missing.bump();
            let hva = slot.hva_of(fault.gfn);
            let gpa = fault.gpa;
            return FaultResult::Error(FaultError::HostMemory { hva, gpa });
        };
        let exclusive = self.exclusive();
        let range = self.touched(slot, fault.gfn, resolved.goal);
        if self.invalidations.has_hit(&exclusive, sequence, &range) {
            vcpu.counters.stale_invalidation.bump();
            return FaultResult::Retry;
        }
        if resolved.is_chunk {
            slot.set_probed(fault.gfn, resolved.probed);
        }
        let goal = self.goal_level(slot, fault.gfn, &resolved);
        let probed = if goal > Level::PTE {
            slot.probed_block(fault.gfn, goal)
        } else {
            resolved.probed
        };
        let state = &mut *self.shadow.state(&exclusive);
        let is_write = fault.access.is_write;
        if is_write
            && slot.is_tracked(fault.gfn)
            && !self.make_unsync(state, vcpu.space, slot, fault.gfn)
        {
            vcpu.counters.write_tracked.bump();
            return FaultResult::WriteProtected;
        }
        let place = match self.descend_shadow(&exclusive, state, vcpu, fill, goal) {
            Ok(place) => place,
            Err(Stop::Changed) => {
                vcpu.counters.map_lost.bump();
                return FaultResult::Retry;
            }
            Err(Stop::OutOfTables) => return FaultResult::Error(FaultError::OutOfTables),
        };
        let role = state.page(place.page).role;
        let (level, walker) = (role.level, state.modes.get(role.mode).walker());
        let new = shadow_leaf(
            walker,
            slot,
            fault.gfn,
            level,
            fill.rights,
            fill.found.key,
            probed,
            is_write,
        );
        if is_write && !new.is_writable() {
            // The table just filled lies in the page that is written: the write is emulated when it
            // comes again.
            vcpu.counters.map_lost.bump();
            return FaultResult::Retry;
        }
        if is_write {
            self.mark_slot_dirty(slot, fault.gfn);
        }
        let first = fault.gfn.align_down(level.pages());
        if !state.set_leaf(place, first, new) {
            vcpu.counters.spurious.bump();
            return FaultResult::Spurious;
        }
        match level {
            Level::PTE => vcpu.counters.mapped_4k.bump(),
            Level::PDE => vcpu.counters.mapped_2m.bump(),
            _ => vcpu.counters.mapped_1g.bump(),
        }
        self.prefetch_shadow(state, vcpu, fill, place);
        FaultResult::Fixed
    }

    /// Follows and makes links down to the entry at `goal` or, where the guest's page is smaller, at
    /// its level.
    fn descend_shadow(
        &self,
        exclusive: &Exclusive<'_>,
        state: &mut State,
        vcpu: &mut Vcpu,
        fill: &Fill<'_>,
        goal: Level,
    ) -> Result<Place, Stop> {
        let current = vcpu.shadow.current().ok_or(Stop::Changed)?;
        if current.id != fill.current.id {
            return Err(Stop::Changed);
        }
        let found = fill.found;
        let mut id = current.id;
        let mut level = state.page(id).role.level;
        if state.page(id).role.kind == Kind::Upper && level.number() <= found.top_level {
            // CR3 led nowhere when the root was made, and leads to a table now.
            self.zap_page(state, id);
            self.flush_stale(state);
            return Err(Stop::Changed);
        }
        loop {
            state.page_mut(id).writes = 0;
            let place = Place {
                page: id,
                index: index_of(fill.gva, level),
            };
            if level <= goal && level.number() <= found.leaf {
                // With the tables on the way protected, the leaf is what it was, or this is late.
                let has_changed = found.has_leaf_changed(fill.memory);
                return if has_changed {
                    Err(Stop::Changed)
                } else {
                    Ok(place)
                };
            }
            let below = level.below().ok_or(Stop::Changed)?;
            let (gfn, role) = below_of(state, fill, id, below);
            let link = found.links[level.index()].filter(|_| level.number() <= found.top_level);
            let child = state.child(place, level).filter(|&child| {
                let page = state.page(child);
                page.role == role && page.gfn == gfn
            });
            id = match child {
                Some(child) => child,
                None => {
                    state.clear(place);
                    let child = if role.kind == Kind::Upper {
                        self.make_page(state, vcpu, gfn, role)
                    } else {
                        self.find_or_make(exclusive, state, vcpu, fill.slots, gfn, role)
                    };
                    let child = child.ok_or(Stop::OutOfTables)?;
                    // Making it may have dropped nothing on the way here, but the guest may have
                    // written the entry before its table was protected. Where the guest's page is
                    // larger than ours, the entry is its leaf.
                    let has_changed = match link {
                        Some(link) => link.has_changed(fill.memory),
                        None if is_mutant(Mutant::NoLookAtLargePage) => false,
                        None => found.has_leaf_changed(fill.memory),
                    };
                    if has_changed {
                        return Err(Stop::Changed);
                    }
                    state.link(place, child);
                    child
                }
            };
            level = below;
        }
    }

    /// The shadow page of that role, found, or made with its guest table protected.
    pub(super) fn find_or_make(
        &self,
        exclusive: &Exclusive<'_>,
        state: &mut State,
        vcpu: &mut Vcpu,
        slots: &Memslots,
        gfn: Gfn,
        role: Role,
    ) -> Option<PageId> {
        if let Some(id) = state.find(gfn, &role) {
            // A place that did not lead to it may not begin with what is out of date: while nothing
            // led to it, INVLPG did not find it.
            self.sync_below(state, slots, id);
            return Some(id);
        }
        if role.kind == Kind::Table {
            let slot = slots
                .find(role.space, gfn)
                .filter(|slot| !slot.is_invalid)?;
            slot.track(gfn)?;
            if role.level > Level::PTE {
                self.resync_frame(exclusive, state, slots, role.space, gfn);
            }
            if !is_mutant(Mutant::NoTableProtection) {
                self.protect_table(exclusive, state, role.space, gfn);
            }
        }
        let made = self.make_page(state, vcpu, gfn, role);
        if made.is_none() && role.kind == Kind::Table {
            self.untrack_table(role.space, gfn);
        }
        made
    }

    /// A fault on a frame without memory.
    fn shadow_hole(&self, vcpu: &mut Vcpu, fill: &Fill<'_>, fault: &Fault) -> FaultResult {
        if fault.access.is_fetch {
            vcpu.counters.hole_fetches.bump();
            return FaultResult::FetchFromHole;
        }
        if fill.slots.is_settled() && self.top_up_shadow(vcpu) {
            let exclusive = self.exclusive();
            let state = &mut *self.shadow.state(&exclusive);
            let place = self.descend_shadow(&exclusive, state, vcpu, fill, Level::PTE);
            if let Ok(place) = place {
                let generation = fill.slots.generation();
                let mut rights = fill.rights;
                let is_dirty = fill.found.rights.contains(Rights::DIRTY);
                rights.set(
                    Rights::WRITABLE,
                    rights.contains(Rights::WRITABLE) && is_dirty,
                );
                let mode = state.page(place.page).role.mode;
                let walker = state.modes.get(mode).walker();
                let entry = Entry::mmio(walker, fault.gfn, rights, generation);
                state.set_leaf(place, fault.gfn, entry);
                vcpu.counters.mmio_mapped.bump();
            }
        } else {
            vcpu.counters.mmio_unmapped.bump();
        }
        FaultResult::Mmio(MmioAccess::uncached(fault.gpa))
    }

    /// The address of an MMIO access, from our own entry, if that is current and allows it.
    fn shadow_mmio(
        &self,
        vcpu: &Vcpu,
        guest: &GuestMode,
        current: &Current,
        gva: u64,
        access: Access,
    ) -> Option<Gpa> {
        let entry = self.shadow_entry(vcpu, gva)?;
        let Tables::Paging(paging) = &current.tables else {
            return None;
        };
        if !self.is_current_mmio(entry) || access.contains(Access::FETCH) {
            return None;
        }
        let protection = paging.protection();
        let is_paged = !matches!(paging.tables(), GuestTables::Off);
        let rights = entry.rights();
        let is_allowed = !is_paged
            || !protection.contains(Protection::USER_KEYS)
                && protection
                    .check(rights, 0, access, &guest.privilege)
                    .is_ok();
        let needs_dirty = access.contains(Access::WRITE) && !rights.contains(Rights::WRITABLE);
        let gpa = entry.mmio_gfn().gpa().wrapping_add(gva & 0xfff);
        (is_allowed && !needs_dirty).then_some(gpa)
    }

    /// The entry that ends the processor's walk, read without the lock.
    pub(super) fn shadow_entry(&self, vcpu: &Vcpu, gva: u64) -> Option<Entry> {
        let reading = vcpu.gate.read();
        let pointer = vcpu.shadow.pointer()?;
        let mut address = pointer.root;
        let mut level = Level::new(pointer.levels)?;
        let entry = loop {
            let table = std::ptr::with_exposed_provenance::<TablePage>(address.get() as usize);
            // SAFETY: the root was valid after the reading session began, and so is every table
            // that it leads to until the session ends: tables are freed after a flush, which waits
            // for sessions.
            let table = unsafe { &*table };
            let cell = &table.cells()[usize::from(index_of(gva, level))];
            let entry = Entry::from_raw(cell.load().raw());
            match level.below() {
                Some(below) if entry.is_table(level) => {
                    address = entry.address();
                    level = below;
                }
                _ => break entry,
            }
        };
        drop(reading);
        Some(entry)
    }

    /// Fills empty neighbours of a leaf in a last-level table, as far as the guest has accessed them.
    fn prefetch_shadow(&self, state: &mut State, vcpu: &Vcpu, fill: &Fill<'_>, place: Place) {
        let count = u16::from(self.config.prefetch) + 1;
        let page = state.page(place.page);
        if page.role.level != Level::PTE || page.role.kind != Kind::Table {
            return;
        }
        let first = place.index / count * count;
        for index in (first..first + count).filter(|&index| index != place.index) {
            let at = Place { index, ..place };
            if state.page(at.page).entry(index.into()) != Entry::EMPTY {
                continue;
            }
            if let Some((gfn, entry)) = self.leaf_without_fault(state, fill.slots, at, Entry::EMPTY)
                && entry.is_present()
            {
                state.set_leaf(at, gfn, entry);
                vcpu.counters.prefetched.bump();
            }
        }
    }

    /// The entry that a last-level guest table calls for at a place, if any can be made without a
    /// fault.
    pub(super) fn leaf_without_fault(
        &self,
        state: &State,
        slots: &Memslots,
        at: Place,
        old: Entry,
    ) -> Option<(Gfn, Entry)> {
        let page = state.page(at.page);
        let role = page.role;
        let memory = GuestMemory {
            mmu: self,
            slots,
            space: role.space,
        };
        let mode = state.modes.get(role.mode);
        let walker = mode.walker();
        let index = usize::from(at.index);
        let leaf = last_level(
            &memory,
            &mode.tables,
            page.gfn,
            role.quadrant,
            index,
            role.rights,
        )?;
        let mut rights = leaf.rights;
        let is_writable = rights.contains(Rights::WRITABLE | Rights::DIRTY);
        rights.set(Rights::WRITABLE, is_writable);
        let Some(slot) = slots.find(role.space, leaf.gfn) else {
            let is_mmio = old.is_mmio() && old.mmio_gfn() == leaf.gfn && slots.is_settled();
            let entry = Entry::mmio(walker, leaf.gfn, rights, slots.generation());
            return is_mmio.then_some((leaf.gfn, entry));
        };
        let probed = slot.probed(leaf.gfn);
        let is_same_frame = old.is_leaf(Level::PTE) && page.leaf_gfn(index) == leaf.gfn;
        let is_usable = probed != Probed::Unknown || is_same_frame;
        if slot.is_invalid || !is_usable || slot.is_read_only() && old == Entry::EMPTY {
            return None;
        }
        let was_writable = is_same_frame && old.is_writable();
        let probed = if was_writable {
            Probed::Writable
        } else {
            probed
        };
        let entry = shadow_leaf(
            walker,
            slot,
            leaf.gfn,
            Level::PTE,
            rights,
            leaf.key,
            probed,
            was_writable,
        );
        Some((leaf.gfn, entry))
    }
}

/// The rights of a leaf that satisfies the access, or `None` where no entry can: then the access is
/// emulated.
///
/// With CR0.WP clear a supervisor write goes through read-only entries. The processor runs with WP
/// set, so the leaf is made writable and, lest user mode writes too, supervisor-only: until user
/// mode touches it, it is no user page to the processor. SMEP then has to be kept by no-execute; SMAP
/// and protection keys, which also tell user pages, cannot be kept so.
fn effective_rights(current: &Current, found: &Found, access: Access) -> Option<Rights> {
    let mut rights = found.rights;
    let is_write = access.contains(Access::WRITE);
    let is_clean = !rights.contains(Rights::DIRTY) && !is_write;
    rights -= Rights::DIRTY | Rights::GLOBAL;
    let (protection, is_paged) = match &current.tables {
        Tables::Paging(paging) => {
            let is_paged = !matches!(paging.tables(), GuestTables::Off);
            (paging.protection(), is_paged)
        }
        Tables::Ept(_) => (Protection::WRITE_PROTECT, false),
    };
    let goes_through = is_paged
        && is_write
        && !access.contains(Access::USER)
        && !protection.contains(Protection::WRITE_PROTECT);
    if goes_through && rights.contains(Rights::USER) {
        let has_keys = protection.contains(Protection::USER_KEYS);
        if has_keys {
            return None;
        }
        if !rights.contains(Rights::WRITABLE) {
            if protection.contains(Protection::SMAP) {
                return None;
            }
            rights -= Rights::USER;
            if protection.contains(Protection::SMEP) {
                rights -= Rights::EXECUTABLE;
            }
        }
    }
    if goes_through {
        rights |= Rights::WRITABLE;
    } else if is_clean {
        rights -= Rights::WRITABLE;
    }
    Some(rights)
}

/// The page below a place on the way: its frame and role.
fn below_of(state: &State, fill: &Fill<'_>, id: PageId, level: Level) -> (Gfn, Role) {
    let parent = state.page(id).role;
    let found = fill.found;
    let is_legacy = state.modes.get(parent.mode).is_legacy();
    let quadrant = match level {
        Level::PDE if is_legacy => (fill.gva >> 30 & 3) as u8,
        Level::PTE if is_legacy => (fill.gva >> 21 & 1) as u8,
        _ => 0,
    };
    let table = Role {
        kind: Kind::Table,
        level,
        quadrant,
        key: 0,
        ..parent
    };
    if level.number() == found.top_level {
        return (found.top, table);
    }
    if level.number() >= found.leaf
        && let Some(Some(link)) = level.above().map(|above| found.links[above.index()])
    {
        let rights = link.rights - (Rights::GLOBAL | Rights::DIRTY);
        return (link.table, Role { rights, ..table });
    }
    if level.number() > found.top_level {
        let kind = Kind::Upper;
        let quadrant = 0;
        return (
            Gfn::new(0),
            Role {
                kind,
                quadrant,
                ..table
            },
        );
    }
    let span = level.pages() * 512;
    let role = Role {
        kind: Kind::Direct,
        quadrant: 0,
        rights: fill.rights,
        key: found.key,
        ..table
    };
    (found.gpa.gfn().align_down(span), role)
}

/// The entry for a frame.
#[expect(clippy::too_many_arguments, reason = "what a leaf depends on")]
fn shadow_leaf(
    walker: Walker,
    slot: &Memslot,
    gfn: Gfn,
    level: Level,
    rights: Rights,
    key: u8,
    probed: Probed,
    is_write: bool,
) -> Entry {
    let first = gfn.align_down(level.pages());
    let mut rights = rights;
    if slot.traps_execution(gfn) {
        rights -= Rights::EXECUTABLE;
    }
    let host_writable = probed == Probed::Writable && !slot.is_read_only();
    let is_held_back =
        slot.is_tracked(gfn) && level == Level::PTE || slot.logs_dirty() && !is_write;
    let parts = LeafParts {
        hva: slot.hva_of(first),
        level,
        rights,
        key,
        writable: host_writable && rights.contains(Rights::WRITABLE) && !is_held_back,
    };
    Entry::leaf(walker, &parts)
}
