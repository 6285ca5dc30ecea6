//! What becomes of tables: splits, recovery, reclaim, teardown, ageing; and bad slots.
#![cfg(not(feature = "model"))]

mod machine;

use arch::addr::{Gfn, Gpa, Hva};
use arch::paging::Level;
use eptide_mmu::{
    AddressSpace, Config, ConfigError, DirtyMethod, FaultResult, MemoryRegion, SlotError, SlotId,
};
use machine::{Cpu, Outcome, Ram, delete, mmu, region};

const MIB: u64 = 1 << 20;

#[test]
fn deleting_a_slot_takes_its_translations() {
    let ram = Ram::new(8 * MIB);
    let mmu = mmu(Config {
        max_level: Level::PTE,
        ..Config::default()
    });
    mmu.set_memory_region(&region(0, 0, 8 * MIB, ram.hva()))
        .unwrap();
    let mut cpu = Cpu::new(&mmu, 0);
    for page in 0..2048 {
        cpu.write(page * 0x1000);
    }
    let (used, cached) = (mmu.table_pages(), 6);
    assert_eq!(used, 3 + 4 + cached);
    delete(&mmu, 0).unwrap();
    assert!(matches!(
        cpu.read(0x5000),
        Outcome::Exit(FaultResult::Mmio(_))
    ));
    assert_eq!(
        mmu.table_pages(),
        3 + 1 + cached - 1,
        "one was taken from the cache"
    );
    assert_eq!(mmu.stats().table_freed, 4);
}

#[test]
fn moving_a_slot_moves_its_memory() {
    let ram = Ram::new(2 * MIB);
    let mmu = mmu(Config::default());
    mmu.set_memory_region(&region(0, 0, 2 * MIB, ram.hva()))
        .unwrap();
    let mut cpu = Cpu::new(&mmu, 0);
    cpu.write(0x1000);
    mmu.set_memory_region(&region(0, 64 * MIB, 2 * MIB, ram.hva()))
        .unwrap();
    assert!(matches!(
        cpu.read(0x1000),
        Outcome::Exit(FaultResult::Mmio(_))
    ));
    assert_eq!(
        cpu.read(64 * MIB + 0x1000),
        Outcome::Memory(ram.hva().get() + 0x1000)
    );
}

#[test]
#[cfg_attr(miri, ignore = "minutes")]
fn zapping_everything_is_survived_and_leaks_nothing() {
    let ram = Ram::new(8 * MIB);
    let mmu = mmu(Config {
        max_level: Level::PTE,
        ..Config::default()
    });
    mmu.set_memory_region(&region(0, 0, 8 * MIB, ram.hva()))
        .unwrap();
    let mut cpu = Cpu::new(&mmu, 0);
    for _ in 0..3 {
        for page in 0..2048 {
            cpu.write(page * 0x1000);
        }
        assert!(cpu.mmu.table_pages() <= 2 + 4 + 1 + 6 + 1);
        mmu.zap_all();
    }
    drop(cpu);
    assert_eq!(mmu.table_pages(), 0);
}

#[test]
fn nx_huge_pages_split_for_fetches_and_recover() {
    let ram = Ram::new(4 * MIB);
    let mmu = mmu(Config {
        nx_huge_pages: true,
        ..Config::default()
    });
    mmu.set_memory_region(&region(0, 0, 4 * MIB, ram.hva()))
        .unwrap();
    let mut cpu = Cpu::new(&mmu, 0);
    cpu.write(0x1000);
    assert_eq!(mmu.stats().mapped_2m, 1);
    assert_eq!(cpu.fetch(0x2000), Outcome::Memory(ram.hva().get() + 0x2000));
    assert_eq!((mmu.stats().huge_split, mmu.stats().nx_split), (1, 1));
    cpu.fetch(0x20_3000);
    assert_eq!(mmu.stats().nx_split, 2);
    cpu.write(0x20_8000);
    cpu.write(0x30_0000);
    assert_eq!(
        mmu.stats().mapped_2m,
        1,
        "data faults do not undo the split"
    );
    assert_eq!(mmu.recover_nx_huge_pages(1), 1);
    cpu.write(0x1000);
    assert_eq!(mmu.stats().mapped_2m, 2);
    assert_eq!(mmu.recover_nx_huge_pages(10), 1);
    assert_eq!(mmu.recover_nx_huge_pages(10), 0);
}

#[test]
#[cfg_attr(miri, ignore = "minutes")]
fn the_table_limit_holds_and_the_guest_goes_on() {
    let ram = Ram::new(512 * MIB);
    let config = Config {
        max_level: Level::PTE,
        prefetch: 0,
        max_table_pages: 64,
        ..Config::default()
    };
    let mmu = mmu(config);
    // Host memory is not populated wholesale: every slot is one page of each 2 MiB.
    for n in 0..256 {
        let hva = ram.hva().wrapping_add(n * 0x1000);
        mmu.set_memory_region(&region(n as u16, n * 2 * MIB, 0x1000, hva))
            .unwrap();
    }
    let mut cpu = Cpu::new(&mmu, 0);
    for round in 0..3 {
        for n in 0..256 {
            let expected = Outcome::Memory(ram.hva().get() + n * 0x1000);
            assert_eq!(cpu.write(n * 2 * MIB), expected, "round {round}");
            assert!(mmu.table_pages() <= 64);
        }
    }
    assert!(mmu.stats().table_reclaimed > 0);
}

#[test]
fn sparse_upper_tables_are_reclaimed_too() {
    let ram = Ram::new(2 * MIB);
    let mmu = mmu(Config {
        max_table_pages: 40,
        physical_bits: 46,
        ..Config::default()
    });
    for n in 0..64 {
        mmu.set_memory_region(&region(n as u16, n << 39, 0x1000, ram.hva()))
            .unwrap();
    }
    let mut cpu = Cpu::new(&mmu, 0);
    for n in 0..64 {
        assert_eq!(cpu.write(n << 39), Outcome::Memory(ram.hva().get()));
        assert!(matches!(
            cpu.write((n << 39) + 0x1000),
            Outcome::Exit(FaultResult::Mmio(_))
        ));
    }
}

#[test]
fn ageing_with_and_without_accessed_flags() {
    let ram = Ram::new(4 * MIB);
    for accessed_dirty in [true, false] {
        for max_level in [Level::PTE, Level::PDE] {
            let config = Config {
                accessed_dirty,
                max_level,
                prefetch: 0,
                ..Config::default()
            };
            let mmu = mmu(config);
            mmu.set_memory_region(&region(0, 0, 4 * MIB, ram.hva()))
                .unwrap();
            let mut cpu = Cpu::new(&mmu, 0);
            let page = ram.hva().wrapping_add(0x1000)..ram.hva().wrapping_add(0x2000);
            assert!(!mmu.age(page.clone()));
            cpu.write(0x1000);
            assert!(mmu.is_young(page.clone()));
            assert!(mmu.age(page.clone()));
            assert!(!mmu.is_young(page.clone()) && !mmu.age(page.clone()));
            // Translations that a processor holds age too early: drop them for the test.
            mmu.flush_all();
            assert_eq!(cpu.fetch(0x1000), Outcome::Memory(ram.hva().get() + 0x1000));
            assert!(mmu.is_young(page.clone()), "{config:?}");
            assert_eq!(cpu.write(0x1008), Outcome::Memory(ram.hva().get() + 0x1008));
            assert_eq!(cpu.vcpu.stats().fast_fixed > 0, !accessed_dirty);
        }
    }
}

#[test]
fn bad_slots_are_refused_by_name_and_change_nothing() {
    let ram = Ram::new(4 * MIB);
    let mmu = mmu(Config {
        physical_bits: 40,
        ..Config::default()
    });
    let good = region(0, 0, 2 * MIB, ram.hva());
    mmu.set_memory_region(&good).unwrap();
    mmu.set_memory_region(&region(1, 8 * MIB, MIB, ram.hva()))
        .unwrap();
    let generation = mmu.slots().generation();
    let hva = ram.hva();
    let odd = hva.wrapping_add(1);
    let high = Hva::new(1 << 47);
    let id = |number| SlotId {
        space: AddressSpace::Normal,
        number,
    };
    let cases = [
        (
            region(2, MIB * 16, MIB + 1, hva),
            SlotError::MisalignedSize(MIB + 1),
        ),
        (
            region(2, 0x80_0001, MIB, hva),
            SlotError::MisalignedBase(Gpa::new(0x80_0001)),
        ),
        (region(2, MIB * 16, MIB, odd), SlotError::MisalignedHva(odd)),
        (
            region(2, MIB * 16, MIB, high),
            SlotError::HvaOutOfRange(high),
        ),
        (
            region(2, MIB * 16, 1 << 46, hva),
            SlotError::TooLarge(1 << 34),
        ),
        (
            region(2, MIB * 16, 1 << 43, hva),
            SlotError::TooLarge(1 << 31),
        ),
        (
            region(2, !0xfff, 0x2000, hva),
            SlotError::Wraps(Gpa::new(!0xfff)),
        ),
        (
            region(2, (1 << 40) - 0x1000, 0x2000, hva),
            SlotError::BeyondPhysical(40),
        ),
        (
            MemoryRegion {
                flags: 4,
                ..region(2, MIB * 16, MIB, hva)
            },
            SlotError::UnknownFlags(4),
        ),
        (region(2, 0, 0, hva), SlotError::NoSuchSlot),
        (region(0, 0, MIB, hva), SlotError::Immutable),
        (
            region(0, 0, 2 * MIB, hva.wrapping_add(0x1000)),
            SlotError::Immutable,
        ),
        (MemoryRegion { flags: 2, ..good }, SlotError::Immutable),
        (
            region(2, 2 * MIB - 0x1000, MIB, hva),
            SlotError::Overlap(id(0)),
        ),
        (region(0, 7 * MIB, 2 * MIB, hva), SlotError::Overlap(id(1))),
    ];
    for (region, error) in cases {
        assert_eq!(mmu.set_memory_region(&region), Err(error), "{region:?}");
    }
    mmu.set_memory_region(&good).unwrap();
    assert_eq!(mmu.slots().generation(), generation, "nothing changed");
    mmu.set_memory_region(&region(0, MIB, 2 * MIB, hva))
        .unwrap();
    assert_eq!(
        mmu.slots()
            .find(AddressSpace::Normal, Gfn::new(256))
            .unwrap()
            .id(),
        id(0)
    );
}

#[test]
fn contradictory_configurations_are_refused() {
    let refused = |config| machine::try_mmu(config).unwrap_err();
    let with = Config::default();
    assert_eq!(
        refused(Config { levels: 3, ..with }),
        ConfigError::Levels(3)
    );
    assert_eq!(
        refused(Config {
            physical_bits: 53,
            ..with
        }),
        ConfigError::PhysicalBits(53)
    );
    let too_large = ConfigError::MaxLevel(Level::PML4E);
    assert_eq!(
        refused(Config {
            max_level: Level::PML4E,
            ..with
        }),
        too_large
    );
    assert_eq!(
        refused(Config {
            prefetch: 8,
            ..with
        }),
        ConfigError::Prefetch(8)
    );
    assert_eq!(
        refused(Config {
            max_table_pages: 4,
            ..with
        }),
        ConfigError::TooFewTablePages(4)
    );
    let dirty_method = DirtyMethod::DirtyFlags;
    assert_eq!(
        refused(Config {
            dirty_method,
            accessed_dirty: false,
            ..with
        }),
        ConfigError::NeedsAccessedDirty(dirty_method)
    );
}
