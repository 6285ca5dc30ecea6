//! What a VM's MMU is told once, at its creation.

use arch::paging::Level;

/// How writes are found for the dirty log. All give the same answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DirtyMethod {
    /// Pages are write-protected; the first write faults.
    #[default]
    WriteProtect,
    /// Pages stay writable with their dirty flag clear; reading the log collects the flags. Needs
    /// [`Config::accessed_dirty`].
    DirtyFlags,
    /// As before, and the processor logs each flag that it sets to a buffer, which is drained with
    /// [`crate::Mmu::mark_dirty`] before the log is read. Needs [`Config::accessed_dirty`].
    PageModificationLog,
}

/// The choices for one VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Levels of the EPT: 4 or 5.
    pub levels: u8,
    /// Bits of guest-physical address: 32 to 52.
    pub physical_bits: u32,
    /// EPT accessed and dirty flags are in use.
    pub accessed_dirty: bool,
    /// How the dirty log finds writes.
    pub dirty_method: DirtyMethod,
    /// The largest mapping: [`Level::PTE`], [`Level::PDE`] or [`Level::PDPTE`].
    pub max_level: Level,
    /// No executable huge pages: a fetch splits them, [`crate::Mmu::recover_nx_huge_pages`] undoes
    /// it.
    pub nx_huge_pages: bool,
    /// Split huge pages as soon as logging begins instead of at the first write.
    pub eager_split: bool,
    /// Neighbours of a faulting page that are mapped with it: 0, 1, 3 or 7.
    pub prefetch: u8,
    /// The greatest number of table pages; further ones are made from the least recently scanned.
    pub max_table_pages: usize,
    /// Shadow paging: processors walk tables derived from the guest's ([`crate::Mmu::load_shadow`])
    /// instead of EPT. Goes with [`DirtyMethod::WriteProtect`] and without
    /// [`Config::nx_huge_pages`].
    pub shadow: bool,
    /// The memslot generation to begin with. Other than 0 it serves tests of its wrap.
    pub first_generation: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            levels: 4,
            physical_bits: 46,
            accessed_dirty: true,
            dirty_method: DirtyMethod::WriteProtect,
            max_level: Level::PDPTE,
            nx_huge_pages: false,
            eager_split: false,
            prefetch: 7,
            max_table_pages: usize::MAX,
            shadow: false,
            first_generation: 0,
        }
    }
}

/// A configuration that contradicts itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// Neither 4 nor 5.
    #[error("EPT has 4 or 5 levels, not {0}")]
    Levels(u8),
    /// Outside 32 to 52.
    #[error("{0} bits of guest-physical address are not between 32 and 52")]
    PhysicalBits(u32),
    /// Above 1 GiB.
    #[error("the largest page is 1 GiB (level 3), not level {0}")]
    MaxLevel(Level),
    /// The dirty method needs flags that are off.
    #[error("{0:?} needs EPT accessed and dirty flags")]
    NeedsAccessedDirty(DirtyMethod),
    /// Prefetching wants an aligned block of entries.
    #[error("{0} is not 0, 1, 3 or 7 neighbours")]
    Prefetch(u8),
    /// Shadow paging does not go with these options.
    #[error("shadow paging knows neither {0:?} nor the splitting of executable huge pages")]
    Shadow(DirtyMethod),
    /// Fewer table pages than one walk per address space needs.
    #[error("{0} table pages are too few")]
    TooFewTablePages(usize),
}

/// Below this no two roots with a full path and a vCPU's cache fit.
const MIN_TABLE_PAGES: usize = 32;

impl Config {
    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        if !(4..=5).contains(&self.levels) {
            return Err(ConfigError::Levels(self.levels));
        }
        if !(32..=52).contains(&self.physical_bits) {
            return Err(ConfigError::PhysicalBits(self.physical_bits));
        }
        if self.max_level > Level::PDPTE {
            return Err(ConfigError::MaxLevel(self.max_level));
        }
        if self.dirty_method != DirtyMethod::WriteProtect && !self.accessed_dirty {
            return Err(ConfigError::NeedsAccessedDirty(self.dirty_method));
        }
        let is_plain = self.dirty_method == DirtyMethod::WriteProtect && !self.nx_huge_pages;
        if self.shadow && !is_plain {
            return Err(ConfigError::Shadow(self.dirty_method));
        }
        if !matches!(self.prefetch, 0 | 1 | 3 | 7) {
            return Err(ConfigError::Prefetch(self.prefetch));
        }
        if self.max_table_pages < MIN_TABLE_PAGES {
            return Err(ConfigError::TooFewTablePages(self.max_table_pages));
        }
        Ok(())
    }
}
