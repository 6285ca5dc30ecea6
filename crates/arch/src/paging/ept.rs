//! Extended page tables.
//!
//! Source: SDM volume 3, "The Extended Page Table Mechanism (EPT)".

use super::format::{bits, entry};
use super::walk::{
    Fault, FaultKind, Marked, TableMemory, WalkError, cached_start, forget_tables, walk, walk_from,
};
use super::{Level, Mode, PagingFormat};
use crate::addr::Gpa;
use bitflags::bitflags;
use core::marker::PhantomData;

/// Bits of EPT entries.
pub mod ept_entry {
    /// Reads are allowed.
    pub const READ: u64 = 1 << 0;
    /// Writes are allowed.
    pub const WRITE: u64 = 1 << 1;
    /// Fetches are allowed; with mode-based execute control, those from supervisor-mode linear
    /// addresses.
    pub const EXECUTE: u64 = 1 << 2;
    /// First bit of the memory type of a leaf.
    pub const MEMORY_TYPE_SHIFT: u32 = 3;
    /// The memory type of a leaf.
    pub const MEMORY_TYPE: u64 = 0b111 << MEMORY_TYPE_SHIFT;
    /// Memory type write-back, in place.
    pub const WRITE_BACK: u64 = 6 << MEMORY_TYPE_SHIFT;
    /// The guest's PAT does not take part in the memory type of a leaf.
    pub const IGNORE_PAT: u64 = 1 << 6;
    /// A leaf above level 1.
    pub const PAGE_SIZE: u64 = 1 << 7;
    /// Accessed, where the EPTP enables accessed and dirty flags.
    pub const ACCESSED: u64 = 1 << 8;
    /// Dirty (leaf), where the EPTP enables accessed and dirty flags.
    pub const DIRTY: u64 = 1 << 9;
    /// With mode-based execute control: fetches from user-mode linear addresses are allowed.
    pub const EXECUTE_USER: u64 = 1 << 10;
    /// Bit 11, which hardware ignores.
    pub const SOFTWARE: u64 = 1 << 11;
    /// Bits 51:12: where an address may be.
    pub const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
    /// Bits 62:52, of which hardware ignores those whose features are off.
    pub const SOFTWARE_HIGH: u64 = 0x7ff << 52;
    /// Suppress #VE.
    pub const SUPPRESS_VE: u64 = 1 << 63;

    const _: () = assert!(
        (READ
            | WRITE
            | EXECUTE
            | MEMORY_TYPE
            | IGNORE_PAT
            | PAGE_SIZE
            | ACCESSED
            | DIRTY
            | EXECUTE_USER)
            ^ SOFTWARE
            ^ ADDRESS
            ^ SOFTWARE_HIGH
            ^ SUPPRESS_VE
            == u64::MAX
    );
    const _: () = assert!(ADDRESS == super::entry::ADDRESS);
}

/// EPT with four levels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ept4;

/// EPT with five levels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ept5;

bitflags! {
    /// What an EPT translation allows. The bits are the exit qualification's bits 6:3, shifted down.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct EptRights: u8 {
        /// Data reads.
        const READ = 1 << 0;
        /// Data writes.
        const WRITE = 1 << 1;
        /// Fetches (from supervisor-mode linear addresses, under mode-based execute control).
        const EXECUTE = 1 << 2;
        /// Fetches from user-mode linear addresses. Follows [`EptRights::EXECUTE`] without
        /// mode-based execute control.
        const EXECUTE_USER = 1 << 3;
    }
}

bitflags! {
    /// An access to guest-physical memory. Bits 2:0 are the exit qualification's; at least one of
    /// them is set.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct EptAccess: u8 {
        /// A data read. A read-modify-write is both.
        const READ = 1 << 0;
        /// A data write, or any access to a guest paging-structure entry while the EPTP enables
        /// accessed and dirty flags.
        const WRITE = 1 << 1;
        /// An instruction fetch.
        const FETCH = 1 << 2;
        /// The fetch is from a user-mode linear address.
        const USER_LINEAR = 1 << 3;
    }
}

bitflags! {
    /// EPT capabilities and controls that change which entries are legal.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct EptFeatures: u32 {
        /// Execute-only translations are supported.
        const EXECUTE_ONLY = 1 << 0;
        /// Mode-based execute control is on.
        const MODE_BASED_EXECUTE = 1 << 1;
        /// 2 MiB pages are supported.
        const PAGES_2M = 1 << 2;
        /// 1 GiB pages are supported.
        const PAGES_1G = 1 << 3;
        /// The EPTP enables accessed and dirty flags.
        const ACCESSED_DIRTY = 1 << 4;
    }
}

macro_rules! ept_format {
    ($format:ty, $name:literal, $top:expr) => {
        impl PagingFormat for $format {
            type Entry = u64;
            type Rights = EptRights;
            const NAME: &'static str = $name;
            const TOP: Level = $top;
            const INDEX_BITS: u32 = 9;
            const INVERTED: u64 = 0;
            const ACCESSED: u64 = ept_entry::ACCESSED;
            const DIRTY: u64 = ept_entry::DIRTY;

            #[inline(always)]
            fn is_illegal(mode: &Mode<Self>, entry: u64, is_leaf: bool) -> bool {
                is_misconfigured(EptFeatures::from_bits_retain(mode.features), entry, is_leaf)
            }

            #[inline(always)]
            fn rights(mode: &Mode<Self>, combined: u64) -> EptRights {
                rights_of(EptFeatures::from_bits_retain(mode.features), combined)
            }
        }
    };
}

ept_format!(Ept4, "EPT 4-level", Level::PML4E);
ept_format!(Ept5, "EPT 5-level", Level::PML5E);

/// The combinations of bits that no reserved mask can express.
#[inline(always)]
fn is_misconfigured(features: EptFeatures, entry: u64, is_leaf: bool) -> bool {
    if entry & ept_entry::READ == 0 {
        let is_execute_only = entry & ept_entry::WRITE == 0;
        if !(is_execute_only && features.contains(EptFeatures::EXECUTE_ONLY)) {
            return true;
        }
    }
    let memory_type = (entry & ept_entry::MEMORY_TYPE) >> ept_entry::MEMORY_TYPE_SHIFT;
    is_leaf && matches!(memory_type, 2 | 3 | 7)
}

#[inline(always)]
fn rights_of(features: EptFeatures, combined: u64) -> EptRights {
    let rwx = combined & (ept_entry::READ | ept_entry::WRITE | ept_entry::EXECUTE);
    let user_bit = if features.contains(EptFeatures::MODE_BASED_EXECUTE) {
        ept_entry::EXECUTE_USER
    } else {
        ept_entry::EXECUTE
    };
    let mut rights = EptRights::from_bits_truncate(rwx as u8);
    rights.set(EptRights::EXECUTE_USER, combined & user_bit != 0);
    rights
}

/// How guest-physical addresses are translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EptPaging {
    /// Four levels.
    Four(Mode<Ept4>),
    /// Five levels.
    Five(Mode<Ept5>),
}

/// A translated guest-physical address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EptTranslation {
    /// The address in the space that the leaf's frame names (host-physical for hardware's walk).
    pub address: u64,
    /// The level of the leaf.
    pub level: Level,
    /// What the translation allows.
    pub rights: EptRights,
    /// The leaf's dirty flag is set (always, with accessed and dirty flags off). While it is not,
    /// the first write must walk again to set it.
    pub is_dirty: bool,
    /// This access set the leaf's dirty flag: the event that page-modification logging records.
    pub has_dirtied: bool,
    /// The leaf, for its memory type.
    pub leaf: u64,
}

/// An access that the EPT forbid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EptViolation {
    /// What was tried.
    pub access: EptAccess,
    /// AND of the rights of the entries used: empty where one was not present.
    pub rights: EptRights,
    /// The level at which the walk ended.
    pub level: Level,
}

impl EptViolation {
    /// Bits 6:0 of the exit qualification. Bit 6 is defined only under mode-based execute control,
    /// and is clear without.
    pub fn qualification(&self, features: EptFeatures) -> u64 {
        let mut rights = self.rights;
        if !features.contains(EptFeatures::MODE_BASED_EXECUTE) {
            rights.remove(EptRights::EXECUTE_USER);
        }
        u64::from(self.access.bits() & 0b111) | u64::from(rights.bits()) << 3
    }
}

/// What EPT makes of an access that it does not translate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EptFault {
    /// Not present, or not allowed.
    Violation(EptViolation),
    /// An entry is malformed.
    Misconfiguration {
        /// Its level.
        level: Level,
        /// The entry.
        entry: u64,
    },
}

/// Why a guest-physical address was not translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EptError<E> {
    /// The EPT said so.
    Fault(EptFault),
    /// A table could not be read or written.
    Memory {
        /// The level of that table.
        level: Level,
        /// The caller's error.
        error: E,
    },
}

impl EptPaging {
    /// Computes the mode for `levels` (4 or 5; others give `None`) and physical addresses of
    /// `physical_bits`.
    pub fn new(levels: u8, features: EptFeatures, physical_bits: u32) -> Option<Self> {
        match levels {
            4 => Some(Self::Four(mode(features, physical_bits))),
            5 => Some(Self::Five(mode(features, physical_bits))),
            _ => None,
        }
    }

    /// The number of levels.
    pub const fn levels(&self) -> u8 {
        match self {
            Self::Four(_) => 4,
            Self::Five(_) => 5,
        }
    }

    /// The features it was made with.
    pub const fn features(&self) -> EptFeatures {
        EptFeatures::from_bits_retain(match self {
            Self::Four(mode) => mode.features,
            Self::Five(mode) => mode.features,
        })
    }

    /// Translates `gpa` for an access: walks from the table at `root` (the EPTP's bits 51:12),
    /// checks the rights, writes accessed and dirty flags where they are on, and starts again where
    /// an entry changed meanwhile.
    ///
    /// A guest-physical address wider than the tables translate is a violation in which no entry
    /// was used.
    #[inline]
    pub fn translate<M: TableMemory>(
        &self,
        memory: &mut M,
        root: u64,
        gpa: Gpa,
        access: EptAccess,
    ) -> Result<EptTranslation, EptError<M::Error>> {
        match self {
            Self::Four(mode) => run(mode, memory, root, gpa, access),
            Self::Five(mode) => run(mode, memory, root, gpa, access),
        }
    }
}

#[inline(always)]
fn run<F: PagingFormat<Rights = EptRights>, M: TableMemory>(
    mode: &Mode<F>,
    memory: &mut M,
    root: u64,
    gpa: Gpa,
    access: EptAccess,
) -> Result<EptTranslation, EptError<M::Error>> {
    if !gpa.fits(F::TOP.shift() + 9) {
        return Err(violation(access, EptRights::empty(), F::TOP));
    }
    let is_write = access.contains(EptAccess::WRITE);
    let mut start = cached_start::<F, M>(memory, gpa.get());
    loop {
        let walked = match start {
            Some((level, table)) => walk_from(mode, memory, level, table, gpa.get()),
            None => walk(mode, memory, root, gpa.get()),
        };
        let is_allowed = walked
            .as_ref()
            .is_ok_and(|found| allows(found.rights, access));
        if !is_allowed && start.take().is_some() {
            // A table that is no longer part of the tables must not be the reason of an exit.
            forget_tables::<F, M>(memory, gpa.get());
            continue;
        }
        let mut found = match walked {
            Ok(found) => found,
            Err(error) => return Err(walk_error(mode, access, error)),
        };
        if !is_allowed {
            return Err(violation(access, found.rights, found.level));
        }
        let was_dirty = found.is_dirty();
        match found.mark(memory, is_write) {
            Ok(Marked::Done { is_dirty }) => {
                found.remember(memory, gpa.get());
                return Ok(EptTranslation {
                    address: found.address,
                    level: found.level,
                    rights: found.rights,
                    is_dirty,
                    has_dirtied: is_dirty && !was_dirty,
                    leaf: super::Entry::to_u64(found.leaf()),
                });
            }
            Ok(Marked::Changed) => {}
            Err(error) => {
                return Err(EptError::Memory {
                    level: found.level,
                    error,
                });
            }
        }
    }
}

/// Whether the rights allow the access, for judging cached translations as well.
#[inline(always)]
fn allows(rights: EptRights, access: EptAccess) -> bool {
    rights.contains(access.needs())
}

impl EptAccess {
    /// The rights that the access needs.
    #[inline(always)]
    pub fn needs(self) -> EptRights {
        let mut needed = EptRights::from_bits_truncate(self.bits() & 0b011);
        if self.contains(Self::FETCH) {
            needed |= if self.contains(Self::USER_LINEAR) {
                EptRights::EXECUTE_USER
            } else {
                EptRights::EXECUTE
            };
        }
        needed
    }
}

#[cold]
fn violation<E>(access: EptAccess, rights: EptRights, level: Level) -> EptError<E> {
    EptError::Fault(EptFault::Violation(EptViolation {
        access,
        rights,
        level,
    }))
}

#[cold]
fn walk_error<F: PagingFormat<Rights = EptRights>, E>(
    mode: &Mode<F>,
    access: EptAccess,
    error: WalkError<E>,
) -> EptError<E> {
    match error {
        WalkError::Memory { level, error } => EptError::Memory { level, error },
        WalkError::Fault(Fault {
            kind: FaultKind::Malformed,
            level,
            entry,
            ..
        }) => EptError::Fault(EptFault::Misconfiguration { level, entry }),
        WalkError::Fault(Fault {
            kind: FaultKind::NotPresent,
            level,
            combined,
            ..
        }) => violation(access, F::rights(mode, combined), level),
    }
}

/// Level 1 entries are leaves; above, those with the page-size bit.
const LEAF: [u64; Level::COUNT] = [
    u64::MAX,
    ept_entry::PAGE_SIZE,
    ept_entry::PAGE_SIZE,
    ept_entry::PAGE_SIZE,
    ept_entry::PAGE_SIZE,
];

fn mode<F: PagingFormat>(features: EptFeatures, physical_bits: u32) -> Mode<F> {
    let address = bits(physical_bits, 52);
    let table = address | bits(3, 7);
    let unless = |feature| {
        if features.contains(feature) {
            0
        } else {
            ept_entry::PAGE_SIZE
        }
    };
    let rwx = ept_entry::READ | ept_entry::WRITE | ept_entry::EXECUTE;
    let user = if features.contains(EptFeatures::MODE_BASED_EXECUTE) {
        ept_entry::EXECUTE_USER
    } else {
        0
    };
    Mode {
        present: rwx | user,
        leaf: LEAF,
        reserved_table: [address, table, table, table, table],
        reserved_leaf: [
            address,
            address | bits(12, Level::PDE.shift()) | unless(EptFeatures::PAGES_2M),
            address | bits(12, Level::PDPTE.shift()) | unless(EptFeatures::PAGES_1G),
            address | ept_entry::PAGE_SIZE,
            address | ept_entry::PAGE_SIZE,
        ],
        accessed_dirty: features.contains(EptFeatures::ACCESSED_DIRTY),
        features: features.bits(),
        format: PhantomData,
    }
}
