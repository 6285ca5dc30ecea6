//! Many threads on real memory: vCPUs write counters while everything else happens at once.
#![cfg(all(not(miri), not(feature = "model")))]

mod machine;

use arch::addr::{Gfn, Gpa};
use arch::paging::Level;
use eptide_mmu::{AddressSpace, Config, DirtyMethod, FaultResult};
use machine::{Cpu, Outcome, Ram, log_dirty, mmu, region};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const PAGES: u64 = 1024;
const NORMAL: AddressSpace = AddressSpace::Normal;

/// A cheap generator of page numbers, different for every thread.
struct Numbers(u64);
impl Numbers {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

fn configs() -> Vec<Config> {
    let base = Config::default();
    vec![
        base,
        Config {
            accessed_dirty: false,
            nx_huge_pages: true,
            ..base
        },
        Config {
            dirty_method: DirtyMethod::DirtyFlags,
            eager_split: true,
            levels: 5,
            ..base
        },
        Config {
            max_level: Level::PTE,
            max_table_pages: 40,
            prefetch: 3,
            ..base
        },
    ]
}

/// vCPUs store increasing values to random pages; a migration thread copies pages that the log
/// names; others zap, age, invalidate, recover and toggle the log. When the vCPUs have stopped and
/// the log has been read once more, the copy must equal memory: no write was lost.
#[test]
fn a_migrated_copy_equals_memory() {
    for config in configs() {
        migrate(config);
    }
}

fn migrate(config: Config) {
    let ram = Ram::new(PAGES * 4096);
    let mmu = mmu(config);
    let logged = log_dirty(region(0, 0, PAGES * 4096, ram.hva()));
    mmu.set_memory_region(&logged).unwrap();
    let is_over = AtomicBool::new(false);
    let writes = AtomicU64::new(0);
    let mut copy = vec![0; PAGES as usize];
    let migrate_round = |copy: &mut Vec<u64>| {
        let mut words = vec![0; PAGES as usize / 64];
        mmu.dirty_log(NORMAL, 0, &mut words).unwrap();
        for page in 0..PAGES {
            if words[page as usize / 64] >> (page % 64) & 1 == 1 {
                copy[page as usize] = ram.word(page * 4096).load(Ordering::Acquire);
            }
        }
    };
    std::thread::scope(|scope| {
        for id in 0..2 {
            let (mmu, is_over, writes) = (&mmu, &is_over, &writes);
            scope.spawn(move || {
                let mut cpu = Cpu::new(mmu, id);
                let mut numbers = Numbers(0x1234_5678 + u64::from(id));
                while !is_over.load(Ordering::Relaxed) {
                    let page = numbers.below(PAGES / 2) * 2 + u64::from(id);
                    let value = writes.fetch_add(1, Ordering::Relaxed) + 1;
                    match cpu.store(page * 4096, value) {
                        Outcome::Memory(_) => {}
                        // As KVM's emulator would.
                        Outcome::Exit(FaultResult::WriteProtected) => {
                            let gpa = Gpa::new(page * 4096);
                            mmu.write_guest(NORMAL, gpa, &value.to_le_bytes()).unwrap();
                        }
                        other => panic!("{other:?}"),
                    }
                    if value % 7 == 0 {
                        cpu.fetch(page * 4096);
                    }
                    if value % 11 == 0 {
                        let hole = cpu.read(64 * MIB + page * 4096);
                        assert!(matches!(hole, Outcome::Exit(FaultResult::Mmio(_))));
                    }
                }
            });
        }
        let (mmu_, is_over_, ram_) = (&mmu, &is_over, &ram);
        scope.spawn(move || {
            let mut numbers = Numbers(99);
            while !is_over_.load(Ordering::Relaxed) {
                let page = numbers.below(PAGES);
                let hva = ram_.hva().wrapping_add(page * 4096);
                let range = hva..hva.wrapping_add(4096);
                match numbers.below(7) {
                    0 => mmu_.zap_gfns(Gfn::new(page)..Gfn::new(page + 70)),
                    1 => drop(mmu_.invalidate(range)),
                    2 => drop(mmu_.age(range)),
                    3 => mmu_.zap_all(),
                    4 => drop(mmu_.recover_nx_huge_pages(2)),
                    5 => {
                        mmu_.track_writes(NORMAL, Gfn::new(page)).unwrap();
                        mmu_.untrack_writes(NORMAL, Gfn::new(page)).unwrap();
                    }
                    _ => {
                        let other = region(1, 32 * MIB, MIB, ram_.hva());
                        mmu_.set_memory_region(&other).unwrap();
                        machine::delete(mmu_, 1).unwrap();
                    }
                }
            }
        });
        let start = Instant::now();
        let has_run = || {
            let enough = writes.load(Ordering::Relaxed) > 1000;
            let time = start.elapsed();
            time > Duration::from_millis(250) && enough || time > Duration::from_secs(20)
        };
        while !has_run() {
            migrate_round(&mut copy);
        }
        is_over.store(true, Ordering::Relaxed);
    });
    migrate_round(&mut copy);
    for page in 0..PAGES {
        let value = ram.word(page * 4096).load(Ordering::Acquire);
        assert_eq!(copy[page as usize], value, "page {page} with {config:?}");
    }
    assert!(writes.load(Ordering::Relaxed) > 1000, "the vCPUs starve");
    mmu.zap_all();
    assert_eq!(mmu.table_pages(), 0, "tables leaked with {config:?}");
}

/// Two vCPUs run over the same memory: every page is mapped once, and all of it is there.
#[test]
fn parallel_faults_share_their_work() {
    let ram = Ram::new(PAGES * 4096);
    let config = Config {
        max_level: Level::PTE,
        prefetch: 0,
        ..Config::default()
    };
    let mmu = mmu(config);
    mmu.set_memory_region(&region(0, 0, PAGES * 4096, ram.hva()))
        .unwrap();
    std::thread::scope(|scope| {
        for id in 0..2 {
            let (mmu, ram) = (&mmu, &ram);
            scope.spawn(move || {
                let mut cpu = Cpu::new(mmu, id);
                for page in 0..PAGES {
                    let at = Outcome::Memory(ram.hva().get() + page * 4096);
                    assert_eq!(cpu.write(page * 4096), at);
                }
            });
        }
    });
    let stats = mmu.stats();
    assert_eq!(stats.mapped_4k, PAGES);
    assert_eq!(stats.table_linked, 2 + PAGES / 512);
}
