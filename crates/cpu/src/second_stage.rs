//! The second stage of translation: guest-physical to host, through EPT.
//!
//! Without EPT the first stage walks host-owned (shadow) tables whose entries already hold host
//! addresses, so this stage is the identity.
//!
//! A small cache keeps recent translations, because a guest walk makes up to five of them; walks
//! of EPT start at tables that earlier ones reached.

use crate::host::HostInt;
use crate::walk_cache::{CachedTables, WalkCache};
use arch::addr::Gpa;
use arch::controls::Eptp;
use arch::exit::EptViolation;
use arch::paging::{
    Entry, EptAccess, EptError, EptFault, EptFeatures, EptPaging, EptRights, Exchange, Level,
    TableMemory,
};

/// The EPT capabilities of this processor.
pub(crate) const EPT_FEATURES: EptFeatures = EptFeatures::EXECUTE_ONLY
    .union(EptFeatures::PAGES_2M)
    .union(EptFeatures::PAGES_1G);

/// Bits of host-physical address that EPT entries may hold: the width of host virtual addresses
/// and beyond; tables never hold more.
const HOST_PHYSICAL_BITS: u32 = 52;

/// Entries of the page-modification log before it is full.
const PML_ENTRIES: usize = 512;

const PAGE_MASK: u64 = !0xfff;
const CACHE: usize = 512;

/// The address of no page.
const NO_PAGE: u64 = u64::MAX;

/// What is done to guest-physical memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StageAccess {
    Read,
    Write,
    /// A fetch from a supervisor-mode linear address.
    Fetch,
    /// A fetch from a user-mode linear address.
    UserFetch,
}

impl StageAccess {
    fn in_ept(self) -> EptAccess {
        match self {
            StageAccess::Read => EptAccess::READ,
            StageAccess::Write => EptAccess::WRITE,
            StageAccess::Fetch => EptAccess::FETCH,
            StageAccess::UserFetch => EptAccess::FETCH.union(EptAccess::USER_LINEAR),
        }
    }
}

/// Why a guest-physical access did not go through.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Reason {
    /// EPT forbids it.
    Violation,
    /// An EPT entry is malformed.
    Misconfigured,
    /// Host memory is not there.
    HostFault,
    /// It is the APIC-access page, where a paging structure was looked for.
    ApicAccess,
    /// Without EPT: a host-owned table could not be read; reported as a page fault.
    ShadowFault(u32),
}

/// A failed translation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Outcome {
    /// The guest-physical address.
    pub gpa: u64,
    /// Why.
    pub reason: Reason,
    /// Bits 6:3 of the exit qualification, and 2:0 for accesses to paging-structure entries.
    pub qualification: EptViolation,
}

impl Outcome {
    /// Whether emulation may send the access to the bus instead.
    pub(crate) fn redirectable(&self) -> bool {
        matches!(self.reason, Reason::Violation | Reason::Misconfigured)
    }
}

/// A successful translation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mapped {
    /// Host virtual address.
    pub hva: u64,
    /// Reads are allowed.
    pub readable: bool,
    /// Writes are allowed and need no dirty bit set.
    pub writable: bool,
    /// Fetches from supervisor-mode linear addresses are allowed.
    pub executable: bool,
    /// Fetches from user-mode linear addresses are allowed.
    pub user_executable: bool,
}

#[derive(Clone, Copy)]
struct Cached {
    page: u64,
    hva: u64,
    rights: EptRights,
    is_dirty: bool,
}

const EMPTY: Cached = Cached {
    page: u64::MAX,
    hva: 0,
    rights: EptRights::empty(),
    is_dirty: false,
};

/// The second stage of one processor.
pub(crate) struct SecondStage {
    paging: Option<EptPaging>,
    eptp: Eptp,
    /// Mode-based execute control is on.
    mode_based: bool,
    cache: Box<[Cached; CACHE]>,
    /// Tables that recent walks of EPT went through.
    pub(crate) walk_cache: WalkCache,
    /// Host page of the APIC-access page, or an address that no page has.
    apic_access: u64,
    /// Page-modification log, when it is on.
    pub(crate) pml: Option<Vec<u64>>,
    /// The log is full and an access was refused for it.
    pub(crate) pml_full: bool,
    /// Walks of EPT made.
    pub(crate) walks: u64,
}

impl SecondStage {
    pub(crate) fn new() -> SecondStage {
        SecondStage {
            paging: None,
            eptp: Eptp::default(),
            mode_based: false,
            cache: vec![EMPTY; CACHE]
                .try_into()
                .unwrap_or_else(|_| unreachable!()),
            walk_cache: WalkCache::new(),
            apic_access: NO_PAGE,
            pml: None,
            pml_full: false,
            walks: 0,
        }
    }

    /// The EPT pointer in use.
    pub(crate) fn eptp(&self) -> Eptp {
        self.eptp
    }

    /// Selects the tables to walk, `None` for none, and whether rights to fetch depend on the
    /// mode of the linear address. Returns whether anything changed.
    pub(crate) fn select(&mut self, eptp: Option<Eptp>, mode_based: bool) -> bool {
        let current = self.paging.map(|_| self.eptp);
        if current == eptp && self.mode_based == mode_based {
            return false;
        }
        self.mode_based = mode_based;
        self.flush();
        self.eptp = eptp.unwrap_or_default();
        self.paging = eptp.and_then(|eptp| {
            let mut features = EPT_FEATURES;
            features.set(EptFeatures::ACCESSED_DIRTY, eptp.accessed_dirty());
            features.set(EptFeatures::MODE_BASED_EXECUTE, mode_based);
            EptPaging::new(eptp.levels(), features, HOST_PHYSICAL_BITS)
        });
        true
    }

    /// Whether these tables are those that are walked.
    #[inline]
    pub(crate) fn has_selected(&self, eptp: Eptp) -> bool {
        self.eptp == eptp
    }

    /// Selects the APIC-access page. Returns whether it changed.
    pub(crate) fn set_apic_access(&mut self, page: Option<u64>) -> bool {
        let page = page.unwrap_or(NO_PAGE);
        std::mem::replace(&mut self.apic_access, page) != page
    }

    /// Whether the host address lies in the APIC-access page.
    #[inline]
    pub(crate) fn is_apic_access(&self, hva: u64) -> bool {
        hva & PAGE_MASK == self.apic_access
    }

    /// Drops every cached translation.
    pub(crate) fn flush(&mut self) {
        self.cache.fill(EMPTY);
        self.walk_cache.flush();
    }

    /// Drops the cached translations of a range.
    pub(crate) fn flush_range(&mut self, start: u64, len: u64) {
        self.walk_cache.flush();
        for cached in self.cache.iter_mut() {
            if cached.page.wrapping_sub(start & PAGE_MASK) < len.saturating_add(start & 0xfff) {
                *cached = EMPTY;
            }
        }
    }

    /// Translates one access.
    #[inline]
    pub(crate) fn translate(&mut self, gpa: u64, access: StageAccess) -> Result<Mapped, Outcome> {
        if self.paging.is_none() {
            return Ok(Mapped {
                hva: gpa,
                readable: true,
                writable: true,
                executable: true,
                user_executable: true,
            });
        }
        let cached = &self.cache[(gpa >> 12) as usize & (CACHE - 1)];
        if cached.page == gpa & PAGE_MASK {
            let needed = access.in_ept().needs();
            if cached.rights.contains(needed) && (cached.is_dirty || access != StageAccess::Write) {
                return Ok(cached.mapped(gpa));
            }
        }
        self.walk(gpa, access)
    }

    fn walk(&mut self, gpa: u64, access: StageAccess) -> Result<Mapped, Outcome> {
        let Some(paging) = &self.paging else {
            unreachable!("translate returns early without EPT");
        };
        let logging = self.pml.is_some();
        if access == StageAccess::Write && self.pml.as_ref().is_some_and(|l| l.len() >= PML_ENTRIES)
        {
            self.pml_full = true;
            let qualification = EptViolation::empty();
            return Err(Outcome {
                gpa,
                reason: Reason::Violation,
                qualification,
            });
        }
        self.walks += 1;
        let ept_access = access.in_ept();
        let mut tables = CachedTables {
            tables: &mut HostTables,
            tag: self.walk_cache.tag(0),
            cache: &mut self.walk_cache,
        };
        match paging.translate(&mut tables, self.eptp.root(), Gpa::new(gpa), ept_access) {
            Ok(t) => {
                if logging
                    && t.has_dirtied
                    && let Some(log) = &mut self.pml
                {
                    log.push(gpa & PAGE_MASK);
                }
                let cached = Cached {
                    page: gpa & PAGE_MASK,
                    hva: t.address & PAGE_MASK,
                    rights: t.rights,
                    is_dirty: t.is_dirty,
                };
                self.cache[(gpa >> 12) as usize & (CACHE - 1)] = cached;
                Ok(cached.mapped(gpa))
            }
            Err(EptError::Fault(EptFault::Violation(v))) => Err(Outcome {
                gpa,
                reason: Reason::Violation,
                qualification: EptViolation::from_bits_retain(
                    v.qualification(paging.features()) & !7,
                ),
            }),
            Err(EptError::Fault(EptFault::Misconfiguration { .. })) => Err(Outcome {
                gpa,
                reason: Reason::Misconfigured,
                qualification: EptViolation::empty(),
            }),
            Err(EptError::Memory { .. }) => Err(Outcome {
                gpa,
                reason: Reason::HostFault,
                qualification: EptViolation::empty(),
            }),
        }
    }

    /// Translates the address of a guest paging-structure entry.
    fn table(&mut self, gpa: u64, write: bool) -> Result<u64, Outcome> {
        // With EPT accessed and dirty flags, every access to a paging-structure entry counts as a
        // write (SDM volume 3, "Accessed and Dirty Flags for EPT").
        let write = write || self.eptp.accessed_dirty();
        let access = if write {
            StageAccess::Write
        } else {
            StageAccess::Read
        };
        match self.translate(gpa, access) {
            Ok(mapped) if self.is_apic_access(mapped.hva) => Err(Outcome {
                gpa,
                reason: Reason::ApicAccess,
                qualification: EptViolation::empty(),
            }),
            Ok(mapped) => Ok(mapped.hva),
            Err(mut outcome) => {
                outcome.qualification |= EptViolation::READ;
                outcome.qualification.set(EptViolation::WRITE, write);
                Err(outcome)
            }
        }
    }
}

impl Cached {
    #[inline]
    fn mapped(&self, gpa: u64) -> Mapped {
        Mapped {
            hva: self.hva | gpa & 0xfff,
            readable: self.rights.contains(EptRights::READ),
            writable: self.rights.contains(EptRights::WRITE) && self.is_dirty,
            executable: self.rights.contains(EptRights::EXECUTE),
            user_executable: self.rights.contains(EptRights::EXECUTE_USER),
        }
    }
}

/// Guest tables, reached through the second stage.
impl TableMemory for SecondStage {
    type Error = Outcome;
    type Handle = u64;

    fn read<E: Entry>(&mut self, address: u64, _level: Level) -> Result<(E, u64), Outcome> {
        let hva = self.table(address, false)?;
        match read_entry::<E>(hva) {
            Some(entry) => Ok((entry, hva)),
            None => Err(Outcome {
                gpa: address,
                reason: if self.paging.is_some() {
                    Reason::HostFault
                } else {
                    Reason::ShadowFault(0)
                },
                qualification: EptViolation::READ,
            }),
        }
    }

    fn compare_exchange<E: Entry>(
        &mut self,
        _hva: u64,
        address: u64,
        old: E,
        new: E,
    ) -> Result<Exchange, Outcome> {
        let hva = self.table(address, true)?;
        exchange_entry(hva, old, new).ok_or(Outcome {
            gpa: address,
            reason: Reason::HostFault,
            qualification: EptViolation::WRITE,
        })
    }
}

/// Tables whose addresses are host virtual addresses.
struct HostTables;

impl TableMemory for HostTables {
    type Error = ();
    type Handle = u64;

    fn read<E: Entry>(&mut self, address: u64, _level: Level) -> Result<(E, u64), ()> {
        read_entry::<E>(address)
            .map(|entry| (entry, address))
            .ok_or(())
    }

    fn compare_exchange<E: Entry>(
        &mut self,
        hva: u64,
        _address: u64,
        old: E,
        new: E,
    ) -> Result<Exchange, ()> {
        exchange_entry(hva, old, new).ok_or(())
    }
}

#[inline(always)]
fn read_entry<E: Entry>(hva: u64) -> Option<E> {
    // SAFETY: table addresses come from the controls and from tables reached from them; a wrong
    // one faults and is reported.
    let raw = unsafe {
        if E::SIZE == 4 {
            u32::load(hva).map(u64::from)
        } else {
            u64::load(hva)
        }
    };
    raw.ok().map(E::from_u64)
}

fn exchange_entry<E: Entry>(hva: u64, old: E, new: E) -> Option<Exchange> {
    // SAFETY: as in `read_entry`.
    let found = unsafe {
        if E::SIZE == 4 {
            u32::compare_exchange(hva, old.to_u64() as u32, new.to_u64() as u32).map(u64::from)
        } else {
            u64::compare_exchange(hva, old.to_u64(), new.to_u64())
        }
    };
    let found = found.ok()?;
    Some(if found == old.to_u64() {
        Exchange::Written
    } else {
        Exchange::Changed
    })
}
