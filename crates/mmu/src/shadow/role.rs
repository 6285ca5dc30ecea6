//! Roles: what the content of a shadow page depends on besides the guest table it shadows.

use crate::memslot::AddressSpace;
use arch::control_registers::{Cr0, Cr4, Efer};
use arch::paging::{GuestControls, GuestPaging, GuestTables, Level, Rights};

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

/// A paging mode, as far as shadow pages depend on it.
#[derive(Clone, Debug)]
pub(super) struct Mode {
    controls: GuestControls,
    pub(super) paging: GuestPaging,
}

/// The modes seen so far.
#[derive(Debug, Default)]
pub(super) struct Modes(Vec<Mode>);

impl Modes {
    /// The index of the mode that the controls select.
    pub(super) fn index(&mut self, controls: &GuestControls) -> u16 {
        let controls = relevant(controls);
        let found = self.0.iter().position(|mode| mode.controls == controls);
        let index = found.unwrap_or_else(|| {
            self.0.push(Mode {
                controls,
                paging: GuestPaging::new(&controls),
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
        matches!(self.paging.tables(), GuestTables::Legacy(_))
    }

    /// Levels of the shadow tables.
    pub(super) fn root_level(&self) -> Level {
        match self.paging.tables() {
            GuestTables::FiveLevel(_) => Level::PML5E,
            _ => Level::PML4E,
        }
    }
}
