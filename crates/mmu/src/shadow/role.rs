//! Roles: what the content of a shadow page depends on besides the guest table it shadows.

use super::entry::Walker;
use crate::memslot::AddressSpace;
use arch::control_registers::{Cr0, Cr4, Efer};
use arch::paging::{EptPaging, GuestControls, GuestPaging, GuestTables, Level, Rights};

/// What a shadow page shadows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    /// A guest table.
    Table,
    /// A part of a large guest page, or of unpaged memory: entries follow from the first frame.
    Direct,
    /// No guest table at all: an upper level that the guest's format does not have.
    Upper,
}

/// A role. Two vCPUs in the same mode have the same roles and so share shadow pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Role {
    pub(super) kind: Kind,
    pub(super) level: Level,
    /// Which part of a table with four-byte entries, two or four shadow pages' worth.
    pub(super) quadrant: u8,
    /// Rights that the entries above leave.
    pub(super) rights: Rights,
    /// Protection key of the large page that a direct page is part of.
    pub(super) key: u8,
    /// Index of the mode.
    pub(super) mode: u16,
    pub(super) space: AddressSpace,
}

/// What the guest's tables are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tables {
    /// Those that its CR3 leads to.
    Paging(GuestPaging),
    /// The EPT that it, as a hypervisor, has made for a guest of its own.
    Ept(EptPaging),
}

/// What selects a mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Selector {
    Paging(GuestControls),
    Ept(EptPaging),
}

impl Selector {
    pub(super) fn tables(&self) -> Tables {
        match self {
            Self::Paging(controls) => Tables::Paging(GuestPaging::new(controls)),
            Self::Ept(paging) => Tables::Ept(*paging),
        }
    }
}

/// A paging mode, as far as shadow pages depend on it.
#[derive(Clone, Debug)]
pub(super) struct Mode {
    selector: Selector,
    pub(super) tables: Tables,
}

/// The modes seen so far.
#[derive(Debug, Default)]
pub(super) struct Modes(Vec<Mode>);

impl Modes {
    /// The index of the mode that is selected.
    pub(super) fn index(&mut self, selector: &Selector) -> u16 {
        let selector = match selector {
            Selector::Paging(controls) => Selector::Paging(relevant(controls)),
            Selector::Ept(_) => *selector,
        };
        let found = self.0.iter().position(|mode| mode.selector == selector);
        let index = found.unwrap_or_else(|| {
            self.0.push(Mode {
                selector,
                tables: selector.tables(),
            });
            self.0.len() - 1
        });
        // A few bits make few modes, and widths are the VMM's choice.
        index as u16
    }

    pub(super) fn get(&self, index: u16) -> &Mode {
        &self.0[usize::from(index)]
    }
}

/// The controls without what shadow pages do not depend on: with CR0.WP set, SMEP, SMAP and keys
/// are the processor's business alone.
fn relevant(controls: &GuestControls) -> GuestControls {
    let mut cr4 = Cr4::PSE | Cr4::PAE | Cr4::LA57;
    if !controls.cr0.contains(Cr0::WP) {
        cr4 |= Cr4::SMEP | Cr4::SMAP | Cr4::PKE;
    }
    if !controls.cr0.contains(Cr0::PG) {
        cr4 = Cr4::empty();
    }
    GuestControls {
        cr0: controls.cr0 & (Cr0::PG | Cr0::WP),
        cr4: controls.cr4 & cr4,
        efer: controls.efer & (Efer::LMA | Efer::NXE),
        ..*controls
    }
}

impl Mode {
    pub(super) fn is_legacy(&self) -> bool {
        match &self.tables {
            Tables::Paging(paging) => matches!(paging.tables(), GuestTables::Legacy(_)),
            Tables::Ept(_) => false,
        }
    }

    /// What walks the shadow tables.
    pub(super) fn walker(&self) -> Walker {
        match self.tables {
            Tables::Paging(_) => Walker::Paging,
            Tables::Ept(_) => Walker::Ept,
        }
    }

    /// Levels of the shadow tables.
    pub(super) fn root_level(&self) -> Level {
        let has_five = match &self.tables {
            Tables::Paging(paging) => matches!(paging.tables(), GuestTables::FiveLevel(_)),
            Tables::Ept(paging) => paging.levels() == 5,
        };
        if has_five { Level::PML5E } else { Level::PML4E }
    }
}
