//! The walker's contract with its caller: repeats, read-only tables, errors, two stages.

use eptide_arch::addr::{Gpa, Gva};
use eptide_arch::control_registers::{Cr0, Cr4, Efer};
use eptide_arch::page_fault::ErrorCode;
use eptide_arch::paging::*;
use std::collections::HashMap;

/// Tables in a map, with a hook for what another processor does between read and exchange.
#[derive(Default)]
struct Tables {
    entries: HashMap<u64, u64>,
    read_only: Vec<u64>,
    meddle: Option<(u64, u64)>,
    exchanges: usize,
}

impl TableMemory for Tables {
    type Error = u64;
    type Handle = u64;

    fn read<E: Entry>(&mut self, address: u64, _: Level) -> Result<(E, u64), u64> {
        if address >= 0x10_0000 {
            return Err(address);
        }
        let entry = self.entries.get(&address).copied().unwrap_or(0);
        Ok((E::from_u64(entry), address))
    }

    fn compare_exchange<E: Entry>(
        &mut self,
        handle: u64,
        address: u64,
        old: E,
        new: E,
    ) -> Result<Exchange, u64> {
        assert_eq!(handle, address);
        self.exchanges += 1;
        if let Some((at, value)) = self.meddle.take() {
            self.entries.insert(at, value);
        }
        if self.read_only.contains(&address) {
            return Ok(Exchange::Ignored);
        }
        if self.entries[&address] != old.to_u64() {
            return Ok(Exchange::Changed);
        }
        self.entries.insert(address, new.to_u64());
        Ok(Exchange::Written)
    }
}

fn long_mode() -> GuestPaging {
    GuestPaging::new(&GuestControls {
        cr0: Cr0::PG | Cr0::PE | Cr0::WP,
        cr4: Cr4::PAE | Cr4::PGE,
        efer: Efer::LMA | Efer::LME | Efer::NXE,
        physical_bits: 46,
        has_1g_pages: true,
        has_pse36: true,
    })
}

fn four_level_tables() -> Tables {
    let mut tables = Tables::default();
    for (at, entry) in [
        (0x1000, 0x2007),
        (0x2000, 0x3007),
        (0x3000, 0x4007),
        (0x4008, 0x9107),
    ] {
        tables.entries.insert(at, entry);
    }
    tables
}

const ROOT: GuestRoot = GuestRoot {
    cr3: 0x1000,
    pdptes: [0; 4],
};

fn translate(tables: &mut Tables, access: Access) -> Result<Translation, GuestError<u64>> {
    long_mode().translate(
        tables,
        &ROOT,
        Gva::new(0x1234),
        access,
        &Privilege::default(),
    )
}

#[test]
fn a_write_sets_accessed_everywhere_and_dirty_at_the_leaf() {
    let mut tables = four_level_tables();
    let found = translate(&mut tables, Access::WRITE).unwrap();
    assert_eq!(found.gpa, Gpa::new(0x9234));
    assert_eq!(found.page_shift, 12);
    assert_eq!(found.rights, Rights::all());
    let marks: Vec<u64> = [0x1000, 0x2000, 0x3000, 0x4008]
        .iter()
        .map(|at| tables.entries[at] & 0x60)
        .collect();
    assert_eq!(marks, [0x20, 0x20, 0x20, 0x60]);
    assert_eq!(tables.exchanges, 4);
    translate(&mut tables, Access::WRITE).unwrap();
    assert_eq!(tables.exchanges, 4, "nothing to write the second time");
}

#[test]
fn a_read_leaves_the_page_clean_and_says_so() {
    let found = translate(&mut four_level_tables(), Access::empty()).unwrap();
    assert!(!found.rights.contains(Rights::DIRTY));
}

#[test]
fn an_entry_that_changes_restarts_the_walk() {
    let mut tables = four_level_tables();
    tables.meddle = Some((0x4008, 0xa107));
    assert_eq!(
        translate(&mut tables, Access::WRITE).unwrap().gpa,
        Gpa::new(0xa234)
    );
    assert_eq!(tables.entries[&0x4008], 0xa167);
}

#[test]
fn an_entry_that_vanishes_faults_in_the_second_walk() {
    let mut tables = four_level_tables();
    tables.meddle = Some((0x4008, 0));
    let Err(GuestError::PageFault(fault)) = translate(&mut tables, Access::WRITE) else {
        panic!()
    };
    assert_eq!(
        fault,
        PageFault {
            error_code: ErrorCode::WRITE,
            level: Level::PTE
        }
    );
}

#[test]
fn read_only_tables_are_neither_written_nor_a_fault() {
    let mut tables = four_level_tables();
    tables.read_only = vec![0x1000, 0x2000, 0x3000, 0x4008];
    let found = translate(&mut tables, Access::WRITE).unwrap();
    assert_eq!(found.gpa, Gpa::new(0x9234));
    assert!(!found.rights.contains(Rights::DIRTY));
    assert_eq!(tables.entries[&0x4008], 0x9107);
}

#[test]
fn the_callers_error_comes_through_with_its_level() {
    let mut tables = four_level_tables();
    tables.entries.insert(0x3000, 0x40_0007);
    let error = translate(&mut tables, Access::empty()).unwrap_err();
    assert_eq!(
        error,
        GuestError::Memory {
            level: Level::PTE,
            error: 0x40_0008
        }
    );
}

/// A guest whose tables are themselves translated through EPT.
struct TwoStage<'a> {
    ept: EptPaging,
    ept_root: u64,
    host: &'a mut Tables,
}

impl TableMemory for TwoStage<'_> {
    type Error = EptError<u64>;
    type Handle = u64;

    fn read<E: Entry>(&mut self, address: u64, level: Level) -> Result<(E, u64), EptError<u64>> {
        let access = EptAccess::READ | EptAccess::WRITE;
        let at = self
            .ept
            .translate(self.host, self.ept_root, Gpa::new(address), access)?
            .address;
        self.host
            .read(at, level)
            .map_err(|error| EptError::Memory { level, error })
    }

    fn compare_exchange<E: Entry>(
        &mut self,
        handle: u64,
        _: u64,
        old: E,
        new: E,
    ) -> Result<Exchange, EptError<u64>> {
        Ok(self
            .host
            .compare_exchange(handle, handle, old, new)
            .unwrap())
    }
}

#[test]
fn a_two_stage_walk_reports_the_stage_that_failed() {
    let mut host = four_level_tables();
    // EPT at 0x10000: maps guest frames 1, 2 and 3 one to one, read-write.
    for (at, entry) in [
        (0x10000, 0x11007),
        (0x11000, 0x12007),
        (0x12000, 0x13007),
        (0x13008, 0x1033),
        (0x13010, 0x2033),
        (0x13018, 0x3033),
    ] {
        host.entries.insert(at, entry);
    }
    let features = EptFeatures::ACCESSED_DIRTY;
    let ept = EptPaging::new(4, features, 46).unwrap();
    let mut memory = TwoStage {
        ept,
        ept_root: 0x10000,
        host: &mut host,
    };
    let result = long_mode().translate(
        &mut memory,
        &ROOT,
        Gva::new(0x1234),
        Access::empty(),
        &Privilege::default(),
    );
    let Err(GuestError::Memory {
        level,
        error: EptError::Fault(EptFault::Violation(violation)),
    }) = result
    else {
        panic!("{result:?}")
    };
    assert_eq!(level, Level::PTE);
    assert_eq!(violation.rights, EptRights::empty());
    assert_eq!(violation.qualification(features), 0b011);
    // The tables that were read are marked in the EPT as written.
    assert_eq!(host.entries[&0x13008], 0x1333);
}

#[test]
fn ept_tells_misconfiguration_from_violation() {
    let mut tables = Tables::default();
    for (at, entry) in [
        (0x1000, 0x2007),
        (0x2000, 0x3007),
        (0x3000, 0x4007),
        (0x4000, 0x9036),
    ] {
        tables.entries.insert(at, entry);
    }
    let ept = EptPaging::new(4, EptFeatures::EXECUTE_ONLY, 46).unwrap();
    let mut translate = |gpa| ept.translate(&mut tables, 0x1000, Gpa::new(gpa), EptAccess::READ);
    let misconfigured = EptFault::Misconfiguration {
        level: Level::PTE,
        entry: 0x9036,
    };
    assert_eq!(translate(0), Err(EptError::Fault(misconfigured)));
    let violation = EptViolation {
        access: EptAccess::READ,
        rights: EptRights::empty(),
        level: Level::PTE,
    };
    assert_eq!(
        translate(0x1000),
        Err(EptError::Fault(EptFault::Violation(violation)))
    );
    let too_wide = translate(1 << 48).unwrap_err();
    assert!(matches!(too_wide, EptError::Fault(EptFault::Violation(v)) if v.level == Level::PML4E));
}
