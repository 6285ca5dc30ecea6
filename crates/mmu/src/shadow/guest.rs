//! Guest tables, read through the memslots, and what a walk of them says to the filling of shadow
//! tables.
//!
//! [`Shadowed`] is what a guest format must have; everything after the walk is the same for all.

use super::role::Tables;
use super::root::GuestMode;
use crate::host::HostAccess;
use crate::memslot::{AddressSpace, Memslots};
use crate::mmu::Mmu;
use crate::sync::{Mutant, is_mutant, point};
use arch::addr::{Gfn, Gpa, Hva};
use arch::page_fault::ErrorCode;
use arch::paging::{
    Access, Entry, EptAccess, EptFault, EptPaging, EptRights, EptViolation, Exchange, FaultKind,
    GuestPaging, GuestTables, Level, Marked, Mode, PagingFormat, Privilege, Protection, Rights,
    TableMemory, WalkError, entry as x86, walk,
};

/// A guest format that can be shadowed.
pub(super) trait Shadowed: PagingFormat<Rights: ShadowRights> {}

impl<F: PagingFormat<Rights: ShadowRights>> Shadowed for F {}

/// What the rights of a guest format mean to a shadow entry.
pub(super) trait ShadowRights: Copy {
    /// As rights of paging.
    fn to_shadow(self) -> Rights;
    /// The protection key of a leaf.
    fn key(leaf: u64) -> u8;
}

impl ShadowRights for Rights {
    fn to_shadow(self) -> Rights {
        self
    }

    fn key(leaf: u64) -> u8 {
        (leaf >> x86::KEY_SHIFT & 0xf) as u8
    }
}

/// Reads take the place of user mode's accesses.
impl ShadowRights for EptRights {
    fn to_shadow(self) -> Rights {
        let mut rights = Rights::empty();
        rights.set(Rights::USER, self.contains(EptRights::READ));
        rights.set(Rights::WRITABLE, self.contains(EptRights::WRITE));
        rights.set(Rights::EXECUTABLE, self.contains(EptRights::EXECUTE));
        rights
    }

    fn key(_: u64) -> u8 {
        0
    }
}

/// The guest's tables.
pub(super) struct GuestMemory<'a> {
    pub(super) mmu: &'a Mmu,
    pub(super) slots: &'a Memslots,
    pub(super) space: AddressSpace,
}

/// A table is not in memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct NoTable;

impl GuestMemory<'_> {
    fn host(&self, gpa: u64, access: HostAccess) -> Option<Hva> {
        let gpa = Gpa::new(gpa);
        let slot = self.slots.find(self.space, gpa.gfn())?;
        self.mmu.accessible(slot, gpa, access).ok()
    }

    /// Reads the entry of `bytes` bytes at a guest address.
    pub(super) fn entry(&self, gpa: u64, bytes: u64) -> Option<u64> {
        let hva = self.host(gpa, HostAccess::Read)?;
        point();
        let mut entry = [0; 8];
        // SAFETY: the page was shown to be there, its slot is kept by the caller's read section, and
        // entries are aligned. Guest memory is only reached through raw pointers and atomics.
        let read = unsafe { self.mmu.host.read(hva, &mut entry[..bytes as usize]) };
        read.ok().map(|()| u64::from_le_bytes(entry))
    }
}

impl TableMemory for GuestMemory<'_> {
    type Error = NoTable;
    type Handle = ();

    fn read<E: Entry>(&mut self, address: u64, _: Level) -> Result<(E, ()), NoTable> {
        let entry = self.entry(address, E::SIZE).ok_or(NoTable)?;
        Ok((E::from_u64(entry), ()))
    }

    fn compare_exchange<E: Entry>(
        &mut self,
        (): (),
        address: u64,
        old: E,
        new: E,
    ) -> Result<Exchange, NoTable> {
        // A read-only slot: the bits stay as they are.
        let Some(hva) = self.host(address, HostAccess::Write) else {
            return Ok(Exchange::Ignored);
        };
        let (mut old, new) = (old.to_u64().to_le_bytes(), new.to_u64().to_le_bytes());
        let size = E::SIZE as usize;
        // SAFETY: as in `entry`, and the page takes writes.
        let exchanged = unsafe {
            self.mmu
                .host
                .compare_exchange(hva, &mut old[..size], &new[..size])
        };
        let is_written = exchanged.map_err(|_| NoTable)?;
        if !is_written {
            return Ok(Exchange::Changed);
        }
        let gfn = Gpa::new(address).gfn();
        if let Some(slot) = self.slots.find(self.space, gfn).filter(|s| s.logs_dirty()) {
            // The log is taken under the exclusive lock.
            let _shared = self.mmu.shared();
            self.mmu.mark_slot_dirty(slot, gfn);
        }
        Ok(Exchange::Written)
    }
}

/// A link that a walk followed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Link {
    /// Where the entry is, what was read there, and its size: to be read again.
    gpa: u64,
    raw: u64,
    bytes: u64,
    /// The table it points to.
    pub(super) table: Gfn,
    /// Rights that it and those above it leave.
    pub(super) rights: Rights,
}

impl Link {
    pub(super) fn has_changed(&self, memory: &GuestMemory<'_>) -> bool {
        if is_mutant(Mutant::NoSecondRead) {
            return false;
        }
        memory.entry(self.gpa, self.bytes) != Some(self.raw)
    }
}

/// A guest translation.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) gpa: Gpa,
    /// The leaf's level; above every shadow level where the guest has no tables.
    pub(super) leaf: u8,
    /// Rights of the page, with [`Rights::DIRTY`].
    pub(super) rights: Rights,
    pub(super) key: u8,
    /// The table at the format's top level.
    pub(super) top: Gfn,
    pub(super) top_level: u8,
    /// By level of the entry: the links above the leaf.
    pub(super) links: [Option<Link>; Level::COUNT],
    leaf_entry: Option<Link>,
}

impl Found {
    pub(super) fn has_leaf_changed(&self, memory: &GuestMemory<'_>) -> bool {
        self.leaf_entry.is_some_and(|leaf| leaf.has_changed(memory))
    }
}

/// What a walk of the guest's tables says.
pub(super) fn translate(
    memory: &mut GuestMemory<'_>,
    guest: &GuestMode,
    paging: &GuestPaging,
    gva: u64,
    access: Access,
) -> Result<Found, ErrorCode> {
    let request = Request {
        gva,
        access,
        protection: paging.protection(),
        privilege: &guest.privilege,
    };
    let root = &guest.root;
    match paging.tables() {
        GuestTables::Off => Ok(Found {
            gpa: Gpa::new(gva),
            leaf: Level::COUNT as u8 + 1,
            rights: Rights::all() - Rights::GLOBAL,
            key: 0,
            top: Gfn::new(0),
            top_level: Level::COUNT as u8 + 1,
            links: [None; Level::COUNT],
            leaf_entry: None,
        }),
        GuestTables::Legacy(mode) => request.run(mode, memory, root.cr3 & 0xffff_f000),
        GuestTables::Pae(mode) => {
            let pdpte = root.pdptes[(gva >> 30 & 3) as usize];
            if pdpte & x86::PRESENT == 0 {
                return Err(paging.protection().describe(access));
            }
            request.run(mode, memory, pdpte & x86::ADDRESS)
        }
        GuestTables::FourLevel(mode) => request.run(mode, memory, root.cr3 & x86::ADDRESS),
        GuestTables::FiveLevel(mode) => request.run(mode, memory, root.cr3 & x86::ADDRESS),
    }
}

struct Request<'a> {
    gva: u64,
    access: Access,
    protection: Protection,
    privilege: &'a Privilege,
}

impl Request<'_> {
    fn run<F: Shadowed>(
        &self,
        mode: &Mode<F>,
        memory: &mut GuestMemory<'_>,
        root: u64,
    ) -> Result<Found, ErrorCode> {
        loop {
            let mut found = match walk(mode, memory, root, self.gva) {
                Ok(found) => found,
                Err(error) => return Err(self.walk_error(error)),
            };
            let key = F::Rights::key(found.leaf().to_u64());
            let rights = found.rights.to_shadow();
            self.protection
                .check(rights, key, self.access, self.privilege)?;
            let is_write = self.access.contains(Access::WRITE);
            match found.mark(memory, is_write) {
                Ok(Marked::Done { is_dirty }) => {
                    return Ok(describe(mode, &found, is_dirty, root));
                }
                Ok(Marked::Changed) => {}
                Err(NoTable) => return Err(self.protection.describe(self.access)),
            }
        }
    }

    fn walk_error(&self, error: WalkError<NoTable>) -> ErrorCode {
        let described = self.protection.describe(self.access);
        match error {
            // As KVM has it: a table outside memory is one that is not there.
            WalkError::Memory { .. } => described,
            WalkError::Fault(fault) => match fault.kind {
                FaultKind::NotPresent => described,
                FaultKind::Malformed => described | ErrorCode::PRESENT | ErrorCode::RSVD,
            },
        }
    }
}

/// What a completed walk of EPT tables says for an access, or that of paging tables once it is judged.
fn describe<F: Shadowed>(
    mode: &Mode<F>,
    found: &arch::paging::Walk<F, ()>,
    is_dirty: bool,
    root: u64,
) -> Found {
    let mut links = [None; Level::COUNT];
    let mut leaf_entry = None;
    let mut combined = u64::MAX;
    let mut level = F::TOP;
    while let Some(step) = found.step(level) {
        let raw = step.entry.to_u64();
        combined &= raw ^ F::INVERTED;
        let link = Link {
            gpa: step.address,
            raw,
            bytes: F::Entry::SIZE,
            table: Gpa::new(F::table_address(raw)).gfn(),
            rights: F::rights(mode, combined).to_shadow(),
        };
        if level == found.level {
            leaf_entry = Some(link);
            break;
        }
        links[level.index()] = Some(link);
        let Some(below) = level.below() else { break };
        level = below;
    }
    let mut rights = found.rights.to_shadow();
    rights.set(Rights::DIRTY, is_dirty);
    Found {
        gpa: Gpa::new(found.address),
        leaf: found.level.number(),
        rights,
        key: F::Rights::key(found.leaf().to_u64()),
        top: Gpa::new(root).gfn(),
        top_level: F::TOP.number(),
        links,
        leaf_entry,
    }
}

/// What a walk of the EPT that a guest made for its own guest says.
pub(super) fn translate_nested(
    memory: &mut GuestMemory<'_>,
    paging: &EptPaging,
    root: u64,
    gpa: u64,
    access: EptAccess,
) -> Result<Found, EptFault> {
    match paging {
        EptPaging::Four(mode) => run_nested(mode, memory, root, gpa, access),
        EptPaging::Five(mode) => run_nested(mode, memory, root, gpa, access),
    }
}

fn run_nested<F: PagingFormat<Rights = EptRights>>(
    mode: &Mode<F>,
    memory: &mut GuestMemory<'_>,
    root: u64,
    gpa: u64,
    access: EptAccess,
) -> Result<Found, EptFault> {
    let violation = |rights, level| {
        EptFault::Violation(EptViolation {
            access,
            rights,
            level,
        })
    };
    // A table outside memory is one that is not there.
    let no_table = |level| violation(EptRights::empty(), level);
    if !Gpa::new(gpa).fits(F::TOP.shift() + F::INDEX_BITS) {
        return Err(no_table(F::TOP));
    }
    loop {
        let mut found = match walk(mode, memory, root, gpa) {
            Ok(found) => found,
            Err(WalkError::Memory { level, .. }) => return Err(no_table(level)),
            Err(WalkError::Fault(fault)) => {
                let (level, entry) = (fault.level, fault.entry);
                return Err(match fault.kind {
                    FaultKind::Malformed => EptFault::Misconfiguration { level, entry },
                    FaultKind::NotPresent => violation(F::rights(mode, fault.combined), level),
                });
            }
        };
        if !found.rights.contains(access.needs()) {
            return Err(violation(found.rights, found.level));
        }
        match found.mark(memory, access.contains(EptAccess::WRITE)) {
            Ok(Marked::Done { is_dirty }) => return Ok(describe(mode, &found, is_dirty, root)),
            Ok(Marked::Changed) => {}
            Err(NoTable) => return Err(no_table(found.level)),
        }
    }
}

/// A leaf of a last-level guest table, for entries made without a fault.
pub(super) struct GuestLeaf {
    pub(super) gfn: Gfn,
    pub(super) rights: Rights,
    pub(super) key: u8,
}

/// Reads entry `index` of the last-level guest table part at `gpa`: what it maps, if it is present,
/// well-formed and accessed.
pub(super) fn last_level(
    memory: &GuestMemory<'_>,
    tables: &Tables,
    table: Gfn,
    quadrant: u8,
    index: usize,
    above: Rights,
) -> Option<GuestLeaf> {
    let at = (memory, table, quadrant, index, above);
    let paging = match tables {
        Tables::Paging(paging) => paging,
        Tables::Ept(EptPaging::Four(mode)) => return leaf_of(mode, at),
        Tables::Ept(EptPaging::Five(mode)) => return leaf_of(mode, at),
    };
    match paging.tables() {
        GuestTables::Off => None,
        GuestTables::Legacy(mode) => leaf_of(mode, at),
        GuestTables::Pae(mode) => leaf_of(mode, at),
        GuestTables::FourLevel(mode) => leaf_of(mode, at),
        GuestTables::FiveLevel(mode) => leaf_of(mode, at),
    }
}

fn leaf_of<F: Shadowed>(
    mode: &Mode<F>,
    (memory, table, quadrant, index, above): (&GuestMemory<'_>, Gfn, u8, usize, Rights),
) -> Option<GuestLeaf> {
    let offset = (usize::from(quadrant) * 512 + index) as u64 * F::Entry::SIZE;
    let raw = memory.entry(table.gpa().get() + offset, F::Entry::SIZE)?;
    let is_usable = mode.is_present(raw)
        && !mode.is_malformed(raw, Level::PTE, true)
        && (raw & F::ACCESSED != 0 || !mode.has_accessed_dirty());
    if !is_usable {
        return None;
    }
    let mut rights = F::rights(mode, raw ^ F::INVERTED).to_shadow() & above;
    rights.set(
        Rights::DIRTY,
        raw & F::DIRTY != 0 || !mode.has_accessed_dirty(),
    );
    Some(GuestLeaf {
        gfn: Gpa::new(F::page_address(raw, Level::PTE)).gfn(),
        rights,
        key: F::Rights::key(raw),
    })
}
