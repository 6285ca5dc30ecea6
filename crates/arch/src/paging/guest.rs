//! The formats of linear-address translation, and translation from control registers to result.
//!
//! Source: SDM volume 3, chapter "Paging".

use super::format::{below_page, bits, entry, page_bytes};
use super::walk::{
    FaultKind, Marked, TableMemory, Walk, WalkError, cached_start, forget_tables, walk, walk_from,
};
use super::{Access, Level, Mode, PagingFormat, Privilege, Protection, Rights};
use crate::addr::{Gpa, Gva};
use crate::control_registers::{Cr0, Cr4, Efer};
use crate::page_fault::ErrorCode;
use core::marker::PhantomData;

/// 32-bit paging: two levels of 1024 four-byte entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Legacy;

/// PAE paging: four PDPTEs in registers, then two levels of 512 entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pae;

/// 4-level paging.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FourLevel;

/// 5-level paging.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FiveLevel;

/// Bits 2:1 of an AND over entries are R/W and U/S; bit 63, inverted, is "executable".
#[inline(always)]
fn rights_of(combined: u64) -> Rights {
    Rights::from_bits_truncate(
        (combined & (entry::WRITABLE | entry::USER)) as u8 | (combined >> 63) as u8,
    )
}

const _: () = assert!(Rights::WRITABLE.bits() as u64 == entry::WRITABLE);
const _: () = assert!(Rights::USER.bits() as u64 == entry::USER);
const _: () = assert!(Rights::EXECUTABLE.bits() == 1);

impl PagingFormat for Legacy {
    type Entry = u32;
    type Rights = Rights;
    const NAME: &'static str = "32-bit";
    const TOP: Level = Level::PDE;
    const INDEX_BITS: u32 = 10;
    // Entries have no XD bit; inverting the one that zero extension leaves clear grants execution.
    const INVERTED: u64 = entry::NO_EXECUTE;
    const ACCESSED: u64 = entry::ACCESSED;
    const DIRTY: u64 = entry::DIRTY;

    #[inline(always)]
    fn rights(_mode: &Mode<Self>, combined: u64) -> Rights {
        rights_of(combined)
    }

    #[inline(always)]
    fn page_address(entry: u64, level: Level) -> u64 {
        let low = entry & entry::ADDRESS & !(page_bytes::<Self>(level) - 1);
        if level == Level::PTE {
            return low;
        }
        // PSE-36: bits 20:13 of a 4 MiB page's entry are bits 39:32 of its address. The mode's
        // reserved mask has rejected those that the processor does not implement.
        low | (entry >> 13 & 0xff) << 32
    }
}

macro_rules! long_entry_format {
    ($format:ty, $name:literal, $top:expr) => {
        impl PagingFormat for $format {
            type Entry = u64;
            type Rights = Rights;
            const NAME: &'static str = $name;
            const TOP: Level = $top;
            const INDEX_BITS: u32 = 9;
            const INVERTED: u64 = entry::NO_EXECUTE;
            const ACCESSED: u64 = entry::ACCESSED;
            const DIRTY: u64 = entry::DIRTY;

            #[inline(always)]
            fn rights(_mode: &Mode<Self>, combined: u64) -> Rights {
                rights_of(combined)
            }
        }
    };
}

long_entry_format!(Pae, "PAE", Level::PDE);
long_entry_format!(FourLevel, "4-level", Level::PML4E);
long_entry_format!(FiveLevel, "5-level", Level::PML5E);

/// What decides how a guest's tables are walked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestControls {
    /// CR0.
    pub cr0: Cr0,
    /// CR4.
    pub cr4: Cr4,
    /// IA32_EFER.
    pub efer: Efer,
    /// Bits of physical address, from CPUID 8000_0008H.
    pub physical_bits: u32,
    /// 1 GiB pages, from CPUID 8000_0001H.
    pub has_1g_pages: bool,
    /// PSE-36, from CPUID 1.
    pub has_pse36: bool,
}

/// The table format in use, with its masks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestTables {
    /// CR0.PG is clear: linear addresses are physical.
    Off,
    /// 32-bit paging.
    Legacy(Mode<Legacy>),
    /// PAE paging.
    Pae(Mode<Pae>),
    /// 4-level paging.
    FourLevel(Mode<FourLevel>),
    /// 5-level paging.
    FiveLevel(Mode<FiveLevel>),
}

/// How linear addresses are translated: everything that follows from control registers and CPUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestPaging {
    tables: GuestTables,
    protection: Protection,
    has_global_pages: bool,
    has_keys: bool,
}

/// Where the tables start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestRoot {
    /// CR3. Its low bits (PCID, PWT, PCD) are masked off by the walk.
    pub cr3: u64,
    /// The PDPTE registers, used by PAE paging only. They were checked when they were loaded.
    pub pdptes: [u64; 4],
}

/// A translated linear address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// Where the address leads.
    pub gpa: Gpa,
    /// log2 of the size of the page that the leaf maps: 12, 21, 22 (32-bit paging) or 30.
    pub page_shift: u32,
    /// What the page allows.
    pub rights: Rights,
    /// The page's protection key; 0 where keys are not in use.
    pub key: u8,
}

/// A page fault as the architecture reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageFault {
    /// The error code for the guest.
    pub error_code: ErrorCode,
    /// The level at which the walk ended.
    pub level: Level,
}

/// Why a linear address was not translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestError<E> {
    /// The guest's tables forbid it.
    PageFault(PageFault),
    /// A table could not be read or written.
    Memory {
        /// The level of that table.
        level: Level,
        /// The caller's error.
        error: E,
    },
}

impl GuestPaging {
    /// Computes the mode that control registers and capabilities select.
    pub fn new(controls: &GuestControls) -> Self {
        let GuestControls { cr0, cr4, efer, .. } = *controls;
        let is_long = efer.contains(Efer::LMA);
        let tables = if !cr0.contains(Cr0::PG) {
            GuestTables::Off
        } else if is_long && cr4.contains(Cr4::LA57) {
            GuestTables::FiveLevel(long_mode(controls))
        } else if is_long {
            GuestTables::FourLevel(long_mode(controls))
        } else if cr4.contains(Cr4::PAE) {
            GuestTables::Pae(pae_mode(controls))
        } else {
            GuestTables::Legacy(legacy_mode(controls))
        };
        let protection = Protection::new(cr0, cr4, efer);
        Self {
            tables,
            protection,
            has_global_pages: cr4.contains(Cr4::PGE),
            has_keys: protection.intersects(Protection::USER_KEYS | Protection::SUPERVISOR_KEYS),
        }
    }

    /// The format and its masks.
    pub const fn tables(&self) -> &GuestTables {
        &self.tables
    }

    /// The protection rules, for judging cached rights.
    pub const fn protection(&self) -> Protection {
        self.protection
    }

    /// Whether values for the PDPTE registers are acceptable (a `MOV CR3` with others is #GP).
    /// True outside PAE paging.
    pub fn accepts_pdptes(&self, pdptes: &[u64; 4]) -> bool {
        let GuestTables::Pae(mode) = &self.tables else {
            return true;
        };
        let reserved = mode.reserved(Level::PDPTE, false);
        pdptes
            .iter()
            .all(|pdpte| pdpte & entry::PRESENT == 0 || pdpte & reserved == 0)
    }

    /// Translates `gva` for an access: walks, checks the rights, writes accessed and dirty bits, and
    /// starts again where an entry changed meanwhile. In 32-bit and PAE paging only the low 32 bits
    /// of `gva` count; canonical checks are the caller's.
    #[inline]
    pub fn translate<M: TableMemory>(
        &self,
        memory: &mut M,
        root: &GuestRoot,
        gva: Gva,
        access: Access,
        privilege: &Privilege,
    ) -> Result<Translation, GuestError<M::Error>> {
        let request = Request {
            paging: self,
            gva: gva.get(),
            access,
            privilege,
        };
        match &self.tables {
            GuestTables::Off => Ok(Translation {
                gpa: Gpa::new(gva.get()),
                page_shift: 12,
                rights: Rights::all() - Rights::GLOBAL,
                key: 0,
            }),
            GuestTables::Legacy(mode) => request.run(mode, memory, root.cr3 & 0xffff_f000),
            GuestTables::Pae(mode) => request.run_pae(mode, memory, &root.pdptes),
            GuestTables::FourLevel(mode) => request.run(mode, memory, root.cr3 & entry::ADDRESS),
            GuestTables::FiveLevel(mode) => request.run(mode, memory, root.cr3 & entry::ADDRESS),
        }
    }
}

struct Request<'a> {
    paging: &'a GuestPaging,
    gva: u64,
    access: Access,
    privilege: &'a Privilege,
}

impl Request<'_> {
    fn run_pae<M: TableMemory>(
        &self,
        mode: &Mode<Pae>,
        memory: &mut M,
        pdptes: &[u64; 4],
    ) -> Result<Translation, GuestError<M::Error>> {
        let pdpte = pdptes[(self.gva >> 30 & 3) as usize];
        if pdpte & entry::PRESENT == 0 {
            return Err(self.fault(ErrorCode::empty(), Level::PDPTE));
        }
        if pdpte & mode.reserved(Level::PDPTE, false) != 0 {
            return Err(self.fault(ErrorCode::PRESENT | ErrorCode::RSVD, Level::PDPTE));
        }
        self.run(mode, memory, pdpte & entry::ADDRESS)
    }

    #[inline(always)]
    fn run<F: PagingFormat<Rights = Rights>, M: TableMemory>(
        &self,
        mode: &Mode<F>,
        memory: &mut M,
        root: u64,
    ) -> Result<Translation, GuestError<M::Error>> {
        let mut start = cached_start::<F, M>(memory, self.gva);
        loop {
            let walked = match start {
                Some((level, table)) => walk_from(mode, memory, level, table, self.gva),
                None => walk(mode, memory, root, self.gva),
            };
            // A table that is no longer part of the tables must not be the reason of a fault: what
            // began at a cached one begins again at the root.
            let mut found = match walked {
                Ok(found) => found,
                Err(_) if start.take().is_some() => {
                    forget_tables::<F, M>(memory, self.gva);
                    continue;
                }
                Err(error) => return Err(self.walk_error(error)),
            };
            if let Err(error_code) = self.judge(&found) {
                if start.take().is_some() {
                    forget_tables::<F, M>(memory, self.gva);
                    continue;
                }
                let fault = PageFault {
                    error_code,
                    level: found.level,
                };
                return Err(GuestError::PageFault(fault));
            }
            match found.mark(memory, self.access.contains(Access::WRITE)) {
                Ok(Marked::Done { is_dirty }) => {
                    found.remember(memory, self.gva);
                    return Ok(self.translation(&found, is_dirty));
                }
                Ok(Marked::Changed) => {}
                Err(error) => {
                    return Err(GuestError::Memory {
                        level: found.level,
                        error,
                    });
                }
            }
        }
    }

    /// Whether the rights allow the access.
    #[inline(always)]
    fn judge<F: PagingFormat<Rights = Rights>, H: Copy>(
        &self,
        found: &Walk<F, H>,
    ) -> Result<(), ErrorCode> {
        let key = self.key(found);
        self.paging
            .protection
            .check(found.rights, key, self.access, self.privilege)
    }

    #[inline(always)]
    fn key<F: PagingFormat, H: Copy>(&self, found: &Walk<F, H>) -> u8 {
        if self.paging.has_keys {
            (leaf(found) >> entry::KEY_SHIFT & 0xf) as u8
        } else {
            0
        }
    }

    #[inline(always)]
    fn translation<F: PagingFormat<Rights = Rights>, H: Copy>(
        &self,
        found: &Walk<F, H>,
        is_dirty: bool,
    ) -> Translation {
        let key = self.key(found);
        let mut rights = found.rights;
        let is_global = self.paging.has_global_pages && leaf(found) & entry::GLOBAL != 0;
        rights.set(Rights::GLOBAL, is_global);
        rights.set(Rights::DIRTY, is_dirty);
        let page_shift = page_bytes::<F>(found.level).trailing_zeros();
        Translation {
            gpa: Gpa::new(found.address),
            page_shift,
            rights,
            key,
        }
    }

    #[cold]
    fn walk_error<E>(&self, error: WalkError<E>) -> GuestError<E> {
        match error {
            WalkError::Memory { level, error } => GuestError::Memory { level, error },
            WalkError::Fault(fault) => {
                let why = match fault.kind {
                    FaultKind::NotPresent => ErrorCode::empty(),
                    FaultKind::Malformed => ErrorCode::PRESENT | ErrorCode::RSVD,
                };
                self.fault(why, fault.level)
            }
        }
    }

    #[cold]
    fn fault<E>(&self, why: ErrorCode, level: Level) -> GuestError<E> {
        let error_code = why | self.paging.protection.describe(self.access);
        GuestError::PageFault(PageFault { error_code, level })
    }
}

#[inline(always)]
fn leaf<F: PagingFormat, H: Copy>(found: &Walk<F, H>) -> u64 {
    use super::Entry;
    found.leaf().to_u64()
}

/// Level 1 entries are leaves; above, those with the page-size bit.
const LEAF: [u64; Level::COUNT] = [
    u64::MAX,
    entry::PAGE_SIZE,
    entry::PAGE_SIZE,
    entry::PAGE_SIZE,
    entry::PAGE_SIZE,
];

fn no_execute_reserved(controls: &GuestControls) -> u64 {
    if controls.efer.contains(Efer::NXE) {
        0
    } else {
        entry::NO_EXECUTE
    }
}

fn long_mode<F: PagingFormat>(controls: &GuestControls) -> Mode<F> {
    let everywhere = bits(controls.physical_bits, 52) | no_execute_reserved(controls);
    let no_1g_pages = if controls.has_1g_pages {
        0
    } else {
        entry::PAGE_SIZE
    };
    Mode {
        present: entry::PRESENT,
        leaf: LEAF,
        reserved_table: [everywhere; Level::COUNT],
        reserved_leaf: [
            everywhere,
            everywhere | below_page(13, Level::PDE),
            everywhere | below_page(13, Level::PDPTE) | no_1g_pages,
            everywhere | entry::PAGE_SIZE,
            everywhere | entry::PAGE_SIZE,
        ],
        accessed_dirty: true,
        features: 0,
        format: PhantomData,
    }
}

fn pae_mode(controls: &GuestControls) -> Mode<Pae> {
    let address = bits(controls.physical_bits, 63);
    let everywhere = address | no_execute_reserved(controls);
    // PDPTEs have neither rights nor A, D, XD; the two upper levels do not exist.
    let pdpte = address | entry::NO_EXECUTE | bits(1, 3) | bits(5, 9);
    Mode {
        present: entry::PRESENT,
        leaf: LEAF,
        reserved_table: [everywhere, everywhere, pdpte, u64::MAX, u64::MAX],
        reserved_leaf: [
            everywhere,
            everywhere | below_page(13, Level::PDE),
            u64::MAX,
            u64::MAX,
            u64::MAX,
        ],
        accessed_dirty: true,
        features: 0,
        format: PhantomData,
    }
}

fn legacy_mode(controls: &GuestControls) -> Mode<Legacy> {
    let has_pse = controls.cr4.contains(Cr4::PSE);
    // PSE-36 puts address bits 39:32 into bits 20:13; those that the processor lacks are reserved.
    let width = if controls.has_pse36 {
        controls.physical_bits.clamp(32, 40)
    } else {
        32
    };
    let large_page_bit = if has_pse { entry::PAGE_SIZE } else { 0 };
    Mode {
        present: entry::PRESENT,
        leaf: [u64::MAX, large_page_bit, 0, 0, 0],
        reserved_table: [0; Level::COUNT],
        reserved_leaf: [0, bits(13 + width - 32, 22), 0, 0, 0],
        accessed_dirty: true,
        features: 0,
        format: PhantomData,
    }
}
