//! The dirty log, by every method.
#![cfg(not(feature = "model"))]

mod machine;

use arch::addr::{Gfn, Gpa};
use arch::paging::Level;
use eptide_mmu::{
    AddressSpace, Config, DirtyLogError, DirtyMethod, DirtySink, FaultResult, Mmu, SlotId,
};
use machine::{Cpu, Outcome, Ram, log_dirty, mmu, region};
use std::sync::{Arc, Mutex};

const MIB: u64 = 1 << 20;
const NORMAL: AddressSpace = AddressSpace::Normal;

/// Every way of logging: two methods, each with huge pages to split lazily or eagerly.
fn configs() -> Vec<Config> {
    let mut configs = Vec::new();
    for dirty_method in [DirtyMethod::WriteProtect, DirtyMethod::DirtyFlags] {
        for accessed_dirty in [true, false] {
            for eager_split in [false, true] {
                let config = Config {
                    dirty_method,
                    accessed_dirty,
                    eager_split,
                    ..Config::default()
                };
                if machine::try_mmu(config).is_ok() {
                    configs.push(config);
                }
            }
        }
    }
    assert_eq!(configs.len(), 6);
    configs
}

fn take(mmu: &Mmu) -> Vec<u64> {
    let mut words = vec![0; 16];
    mmu.dirty_log(NORMAL, 0, &mut words).unwrap();
    pages(&words)
}

fn pages(words: &[u64]) -> Vec<u64> {
    (0..words.len() as u64 * 64)
        .filter(|n| words[*n as usize / 64] >> (n % 64) & 1 == 1)
        .collect()
}

#[test]
fn writes_are_logged_reads_are_not() {
    let ram = Ram::new(4 * MIB);
    for config in configs() {
        let mmu = mmu(config);
        mmu.set_memory_region(&region(0, 0, 4 * MIB, ram.hva()))
            .unwrap();
        let mut cpu = Cpu::new(&mmu, 0);
        // Mapped, huge and dirty, before the log begins.
        cpu.write(0x1000);
        cpu.write(0x20_1000);
        mmu.set_memory_region(&log_dirty(region(0, 0, 4 * MIB, ram.hva())))
            .unwrap();
        assert_eq!(take(&mmu), [], "{config:?}");
        cpu.read(0x2000);
        cpu.write(0x3000);
        cpu.read(0x3000);
        cpu.write(0x20_5008);
        assert_eq!(take(&mmu), [3, 0x205], "{config:?}");
        assert_eq!(take(&mmu), []);
        cpu.write(0x3000);
        cpu.write(0x2000);
        mmu.write_guest(NORMAL, Gpa::new(0x7ffc), b"12345678")
            .unwrap();
        assert_eq!(take(&mmu), [2, 3, 7, 8], "{config:?}");
        assert_eq!(mmu.stats().mapped_2m, 2);
        assert_eq!(mmu.stats().huge_split, 2);
    }
}

#[test]
fn clearing_names_pages_and_leaves_others() {
    let ram = Ram::new(4 * MIB);
    for config in configs() {
        let mmu = mmu(config);
        mmu.set_memory_region(&log_dirty(region(0, 0, MIB + 0x5000, ram.hva())))
            .unwrap();
        let mut cpu = Cpu::new(&mmu, 0);
        for page in [1, 70, 71, 258] {
            cpu.write(page * 0x1000);
        }
        let mut words = vec![0; 5];
        let keep = |words: &mut [u64]| mmu.dirty_log_keep(NORMAL, 0, words).unwrap();
        keep(&mut words);
        assert_eq!(pages(&words), [1, 70, 71, 258]);
        mmu.clear_dirty_log(NORMAL, 0, 64, 64, &[1 << 6]).unwrap();
        keep(&mut words);
        assert_eq!(pages(&words), [1, 71, 258]);
        mmu.clear_dirty_log(NORMAL, 0, 256, 5, &[u64::MAX]).unwrap();
        cpu.write(70 * 0x1000);
        keep(&mut words);
        assert_eq!(pages(&words), [1, 70, 71]);
        let bad = |first, pages| mmu.clear_dirty_log(NORMAL, 0, first, pages, &[0; 8]);
        for (first, pages) in [(1, 64), (0, 63), (64, 256), (320, 64), (u64::MAX - 63, 64)] {
            assert_eq!(
                bad(first, pages),
                Err(DirtyLogError::BadRange { first, pages })
            );
        }
        assert!(matches!(
            mmu.clear_dirty_log(NORMAL, 0, 0, 128, &[0]),
            Err(DirtyLogError::ShortBitmap {
                needed: 2,
                given: 1
            })
        ));
    }
}

#[test]
fn a_log_may_begin_with_every_page_dirty() {
    let ram = Ram::new(4 * MIB);
    let mmu = mmu(Config::default());
    mmu.set_dirty_log_initially_set(true);
    mmu.set_memory_region(&log_dirty(region(0, 0, MIB, ram.hva())))
        .unwrap();
    let mut words = vec![0; 4];
    mmu.dirty_log_keep(NORMAL, 0, &mut words).unwrap();
    assert_eq!(words, [u64::MAX; 4]);
    let mut cpu = Cpu::new(&mmu, 0);
    mmu.clear_dirty_log(NORMAL, 0, 0, 256, &[u64::MAX; 4])
        .unwrap();
    cpu.write(0x9000);
    mmu.dirty_log_keep(NORMAL, 0, &mut words).unwrap();
    assert_eq!(pages(&words), [9]);
}

#[test]
fn the_log_ends_and_huge_pages_come_back() {
    let ram = Ram::new(4 * MIB);
    for config in configs() {
        let mmu = mmu(config);
        mmu.set_memory_region(&log_dirty(region(0, 0, 4 * MIB, ram.hva())))
            .unwrap();
        let mut cpu = Cpu::new(&mmu, 0);
        cpu.write(0x1000);
        assert_eq!(mmu.stats().mapped_2m, 0);
        mmu.set_memory_region(&region(0, 0, 4 * MIB, ram.hva()))
            .unwrap();
        cpu.write(0x1000);
        assert_eq!(mmu.stats().mapped_2m, 1);
        let not_logged = Err(DirtyLogError::NotLogged(SlotId {
            space: NORMAL,
            number: 0,
        }));
        assert_eq!(mmu.dirty_log(NORMAL, 0, &mut [0; 64]), not_logged);
    }
}

#[test]
fn write_protection_is_given_back_without_the_lock() {
    let ram = Ram::new(2 * MIB);
    let mmu = mmu(Config {
        max_level: Level::PTE,
        ..Config::default()
    });
    mmu.set_memory_region(&log_dirty(region(0, 0, 2 * MIB, ram.hva())))
        .unwrap();
    let mut cpu = Cpu::new(&mmu, 0);
    cpu.write(0x1000);
    take(&mmu);
    cpu.write(0x1000);
    assert_eq!(cpu.faults, [FaultResult::Fixed]);
    assert_eq!(cpu.vcpu.stats().fast_fixed, 1);
    assert_eq!(take(&mmu), [1]);
}

#[test]
fn tracking_and_logging_do_not_undo_each_other() {
    let ram = Ram::new(2 * MIB);
    let mmu = mmu(Config::default());
    mmu.set_memory_region(&log_dirty(region(0, 0, 2 * MIB, ram.hva())))
        .unwrap();
    let mut cpu = Cpu::new(&mmu, 0);
    cpu.write(0x1000);
    mmu.track_writes(NORMAL, Gfn::new(1)).unwrap();
    take(&mmu);
    assert_eq!(
        cpu.write(0x1000),
        Outcome::Exit(FaultResult::WriteProtected)
    );
    assert_eq!(cpu.vcpu.stats().fast_fixed, 0);
    mmu.untrack_writes(NORMAL, Gfn::new(1)).unwrap();
    assert_eq!(cpu.write(0x1000), Outcome::Memory(ram.hva().get() + 0x1000));
    assert_eq!(take(&mmu), [1]);
}

#[test]
fn dirty_flags_survive_a_zap() {
    let ram = Ram::new(2 * MIB);
    let config = Config {
        dirty_method: DirtyMethod::DirtyFlags,
        ..Config::default()
    };
    let mmu = mmu(config);
    mmu.set_memory_region(&log_dirty(region(0, 0, 2 * MIB, ram.hva())))
        .unwrap();
    let mut cpu = Cpu::new(&mmu, 0);
    for zap in [0, 1, 2] {
        cpu.read(0x1000);
        take(&mmu);
        cpu.write(0x1000);
        assert_eq!(cpu.faults, [], "the processor sets the flag by itself");
        match zap {
            0 => mmu.zap_all(),
            1 => mmu.zap_gfns(Gfn::new(1)..Gfn::new(2)),
            _ => mmu.zap_gfns(Gfn::new(0)..Gfn::new(512)),
        }
        assert_eq!(take(&mmu), [1], "zap {zap}");
    }
}

#[test]
fn a_sink_hears_of_every_first_write() {
    #[derive(Default)]
    struct Ring(Mutex<Vec<(u16, u64)>>);
    impl DirtySink for Ring {
        fn page_dirtied(&self, slot: SlotId, index: u64) {
            self.0.lock().unwrap().push((slot.number, index));
        }
    }
    let ram = Ram::new(2 * MIB);
    let mmu = mmu(Config {
        prefetch: 0,
        ..Config::default()
    });
    let ring = Arc::new(Ring::default());
    assert!(mmu.set_dirty_sink(ring.clone()));
    mmu.set_memory_region(&log_dirty(region(5, MIB, MIB, ram.hva())))
        .unwrap();
    let mut cpu = Cpu::new(&mmu, 0);
    for _ in 0..2 {
        cpu.write(MIB + 0x1000);
        cpu.write(MIB + 0x1008);
        cpu.read(MIB + 0x3000);
        mmu.protect_pages(NORMAL, 5, 0, 0b10).unwrap();
    }
    assert_eq!(*ring.0.lock().unwrap(), [(5, 1), (5, 1)]);
}

#[test]
fn page_modification_logging_marks_what_the_buffer_says() {
    let ram = Ram::new(2 * MIB);
    let config = Config {
        dirty_method: DirtyMethod::PageModificationLog,
        ..Config::default()
    };
    let mmu = mmu(config);
    mmu.set_memory_region(&log_dirty(region(0, 0, 2 * MIB, ram.hva())))
        .unwrap();
    let mut cpu = Cpu::new(&mmu, 0);
    cpu.read(0x4000);
    cpu.write(0x4000);
    assert_eq!(cpu.faults, []);
    // What kvm does with the entries of the processor's buffer.
    mmu.mark_dirty(NORMAL, Gfn::new(4));
    assert_eq!(take(&mmu), [4]);
    cpu.write(0x4000);
    assert_eq!(cpu.faults, []);
}
