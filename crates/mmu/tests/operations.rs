//! Everything the MMU offers, in random order, against a model that keeps lists and looks at each:
//! what every access comes to, and exactly which pages the dirty log names. `PROPTEST_CASES` sets how
//! many sequences.
#![cfg(not(feature = "model"))]

mod machine;

use arch::addr::{Gfn, Gpa, Hva};
use arch::paging::Level;
use eptide_mmu::{AddressSpace, Config, DirtyMethod, FaultResult, MemoryRegion, Mmu};
use machine::{AlwaysThere, Cpu, Idle, Outcome};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

const MIB: u64 = 1 << 20;

#[derive(Clone, Debug)]
enum Operation {
    Slot {
        space: AddressSpace,
        number: u16,
        flags: u32,
        base: u64,
        size: u64,
        hva: u64,
    },
    Delete {
        space: AddressSpace,
        number: u16,
    },
    Access {
        cpu: usize,
        what: char,
        page: u64,
    },
    Smm {
        cpu: usize,
        space: AddressSpace,
    },
    Track {
        space: AddressSpace,
        page: u64,
        is_on: bool,
    },
    Trap {
        space: AddressSpace,
        page: u64,
        is_on: bool,
    },
    TakeLog {
        space: AddressSpace,
        number: u16,
    },
    ClearLog {
        space: AddressSpace,
        number: u16,
        word: u64,
        mask: u64,
    },
    Zap {
        page: u64,
        pages: u64,
    },
    ZapAll,
    Age {
        hva: u64,
    },
    Invalidate {
        hva: u64,
    },
    Recover,
    Reclaim,
}

#[derive(Debug)]
struct ModelSlot {
    region: MemoryRegion,
    dirty: BTreeSet<u64>,
    tracked: BTreeMap<u64, u32>,
    trapped: BTreeSet<u64>,
}

#[derive(Debug, Default)]
struct Model {
    slots: BTreeMap<(AddressSpace, u16), ModelSlot>,
}

/// What an access comes to.
#[derive(Debug, PartialEq, Eq)]
enum Expected {
    Memory(u64),
    Mmio,
    WriteProtected,
    ExecuteTrap,
    FetchFromHole,
}

impl Model {
    fn at(&mut self, space: AddressSpace, page: u64) -> Option<&mut ModelSlot> {
        self.slots.values_mut().find(|slot| {
            let first = slot.region.base.get() >> 12;
            slot.region.space == space && (first..first + (slot.region.size >> 12)).contains(&page)
        })
    }

    fn access(&mut self, space: AddressSpace, what: char, page: u64) -> Expected {
        let Some(slot) = self.at(space, page) else {
            return if what == 'x' {
                Expected::FetchFromHole
            } else {
                Expected::Mmio
            };
        };
        let index = page - (slot.region.base.get() >> 12);
        if what == 'x' && slot.trapped.contains(&index) {
            return Expected::ExecuteTrap;
        }
        if what == 'w' {
            if slot.region.flags & 2 != 0 {
                return Expected::Mmio;
            }
            if slot.tracked.get(&index).is_some_and(|&users| users > 0) {
                return Expected::WriteProtected;
            }
            if slot.region.flags & 1 != 0 {
                slot.dirty.insert(index);
            }
        }
        Expected::Memory(slot.region.hva.get() + (index << 12))
    }

    fn set(&mut self, region: MemoryRegion) {
        let key = (region.space, region.number);
        match self.slots.get_mut(&key) {
            Some(slot) if slot.region.base == region.base => {
                let was_logged = slot.region.flags & 1 != 0;
                if !(was_logged && region.flags & 1 != 0) {
                    slot.dirty.clear();
                }
                slot.region = region;
            }
            _ => {
                let slot = ModelSlot {
                    region,
                    dirty: BTreeSet::new(),
                    tracked: BTreeMap::new(),
                    trapped: BTreeSet::new(),
                };
                self.slots.insert(key, slot);
            }
        }
    }
}

struct Bench {
    mmu: Arc<Mmu>,
    cpus: Vec<Cpu>,
    model: Model,
}

impl Bench {
    fn new(config: Config) -> Self {
        let mmu = Mmu::with_host(config, Arc::new(Idle), Box::new(AlwaysThere)).unwrap();
        let cpus = (0..2).map(|id| Cpu::new(&mmu, id)).collect();
        Self {
            mmu,
            cpus,
            model: Model::default(),
        }
    }

    fn run(&mut self, operation: &Operation) -> Result<(), TestCaseError> {
        let mmu = Arc::clone(&self.mmu);
        match *operation {
            Operation::Slot {
                space,
                number,
                flags,
                base,
                size,
                hva,
            } => {
                let (base, hva) = (Gpa::new(base), Hva::new(hva));
                let region = MemoryRegion {
                    space,
                    number,
                    flags,
                    base,
                    size,
                    hva,
                };
                if mmu.set_memory_region(&region).is_ok() {
                    self.model.set(region);
                }
            }
            Operation::Delete { space, number } => {
                let (base, hva) = (Gpa::new(0), Hva::new(0));
                let region = MemoryRegion {
                    space,
                    number,
                    flags: 0,
                    base,
                    size: 0,
                    hva,
                };
                let was_there = self.model.slots.remove(&(space, number)).is_some();
                prop_assert_eq!(mmu.set_memory_region(&region).is_ok(), was_there);
            }
            Operation::Access { cpu, what, page } => self.access(cpu, what, page)?,
            Operation::Smm { cpu, space } => self.cpus[cpu].set_address_space(space),
            Operation::Track { space, page, is_on } => self.track(space, page, is_on)?,
            Operation::Trap { space, page, is_on } => {
                let range = Gfn::new(page)..Gfn::new(page + 2);
                let is_memory = (page..page + 2).all(|p| self.model.at(space, p).is_some());
                prop_assert_eq!(
                    mmu.set_execution_traps(space, range, is_on).is_ok(),
                    is_memory
                );
                for page in (page..page + 2).filter(|_| is_memory) {
                    let slot = self.model.at(space, page).unwrap();
                    let index = page - (slot.region.base.get() >> 12);
                    if is_on {
                        slot.trapped.insert(index);
                    } else {
                        slot.trapped.remove(&index);
                    }
                }
            }
            Operation::TakeLog { space, number } => self.take_log(space, number)?,
            Operation::ClearLog {
                space,
                number,
                word,
                mask,
            } => {
                let cleared = mmu.clear_dirty_log(space, number, word * 64, 64, &[mask]);
                if cleared.is_ok() {
                    let slot = self.model.slots.get_mut(&(space, number)).unwrap();
                    slot.dirty
                        .retain(|&index| index / 64 != word || mask >> (index % 64) & 1 == 0);
                }
            }
            Operation::Zap { page, pages } => mmu.zap_gfns(Gfn::new(page)..Gfn::new(page + pages)),
            Operation::ZapAll => mmu.zap_all(),
            Operation::Age { hva } => {
                mmu.age(Hva::new(hva)..Hva::new(hva + MIB));
            }
            Operation::Invalidate { hva } => {
                drop(mmu.invalidate(Hva::new(hva)..Hva::new(hva + MIB)))
            }
            Operation::Recover => {
                mmu.recover_nx_huge_pages(1);
            }
            Operation::Reclaim => mmu.flush_all(),
        }
        Ok(())
    }

    fn access(&mut self, cpu: usize, what: char, page: u64) -> Result<(), TestCaseError> {
        let cpu = &mut self.cpus[cpu];
        let gpa = (page << 12) + 8;
        let outcome = match what {
            'r' => cpu.read(gpa),
            'w' => cpu.write(gpa),
            _ => cpu.fetch(gpa),
        };
        let expected = self.model.access(cpu.vcpu.address_space(), what, page);
        let found = match outcome {
            Outcome::Memory(hva) => Expected::Memory(hva - 8),
            Outcome::Exit(FaultResult::Mmio(access)) => {
                prop_assert_eq!(access.gpa, Gpa::new(gpa));
                Expected::Mmio
            }
            Outcome::Exit(FaultResult::WriteProtected) => Expected::WriteProtected,
            Outcome::Exit(FaultResult::ExecuteTrap) => Expected::ExecuteTrap,
            Outcome::Exit(FaultResult::FetchFromHole) => Expected::FetchFromHole,
            other => return Err(TestCaseError::fail(format!("{other:?}"))),
        };
        // A misconfiguration does not say what kind of access it was.
        let is_mmio_fetch = found == Expected::Mmio && expected == Expected::FetchFromHole;
        if !is_mmio_fetch {
            prop_assert_eq!(found, expected, "{} of page {:#x}", what, page);
        }
        Ok(())
    }

    fn track(&mut self, space: AddressSpace, page: u64, is_on: bool) -> Result<(), TestCaseError> {
        let gfn = Gfn::new(page);
        let result = if is_on {
            self.mmu.track_writes(space, gfn)
        } else {
            self.mmu.untrack_writes(space, gfn)
        };
        let slot = self.model.at(space, page);
        let Some(slot) = slot else {
            prop_assert!(result.is_err());
            return Ok(());
        };
        let users = slot
            .tracked
            .entry(page - (slot.region.base.get() >> 12))
            .or_default();
        prop_assert_eq!(result.is_ok(), is_on || *users > 0);
        *users = if is_on {
            *users + 1
        } else {
            users.saturating_sub(1)
        };
        Ok(())
    }

    fn take_log(&mut self, space: AddressSpace, number: u16) -> Result<(), TestCaseError> {
        let mut words = vec![0; 64];
        let result = self.mmu.dirty_log(space, number, &mut words);
        let slot = self.model.slots.get_mut(&(space, number));
        let logged = slot.filter(|slot| slot.region.flags & 1 != 0);
        prop_assert_eq!(result.is_ok(), logged.is_some());
        if let Some(slot) = logged {
            let found: BTreeSet<u64> = (0..64 * 64)
                .filter(|n| words[*n as usize / 64] >> (n % 64) & 1 == 1)
                .collect();
            prop_assert_eq!(&found, &slot.dirty);
            slot.dirty.clear();
        }
        Ok(())
    }
}

fn space() -> impl Strategy<Value = AddressSpace> {
    prop_oneof![5 => Just(AddressSpace::Normal), 1 => Just(AddressSpace::Smm)]
}

/// Pages close to each other and to the bounds of blocks.
fn page() -> impl Strategy<Value = u64> {
    let near = prop_oneof![
        Just(0_u64),
        Just(0x100),
        Just(0x200),
        Just(0x400),
        Just(0x5ff)
    ];
    (near, 0_u64..4).prop_map(|(near, offset)| near + offset)
}

const HVA: u64 = 0x40_0000_0000;

fn operation() -> impl Strategy<Value = Operation> {
    let slot = (space(), 0_u16..3, 0_u32..4, 0_u64..5, 1_u64..7, 0_u64..3).prop_map(
        |(space, number, flags, base, size, skew)| Operation::Slot {
            space,
            number,
            flags,
            base: base * MIB,
            size: size * MIB,
            // Congruent modulo 2 MiB, modulo 1 MiB only, or not at all.
            hva: HVA + base * MIB + [0, MIB, 0x3000][skew as usize],
        },
    );
    let access = (
        0_usize..2,
        prop_oneof![Just('r'), Just('w'), Just('x')],
        page(),
    )
        .prop_map(|(cpu, what, page)| Operation::Access { cpu, what, page });
    let relog = (0_u16..3, 0_u32..2).prop_map(|(number, flags)| Operation::Slot {
        space: AddressSpace::Normal,
        number,
        flags,
        base: u64::from(number) * 2 * MIB,
        size: 2 * MIB,
        hva: HVA + u64::from(number) * 2 * MIB,
    });
    prop_oneof![
        2 => slot,
        3 => relog,
        1 => (space(), 0_u16..3)
            .prop_map(|(space, number)| Operation::Delete { space, number }),
        24 => access,
        1 => (0_usize..2, space()).prop_map(|(cpu, space)| Operation::Smm { cpu, space }),
        2 => (space(), page(), any::<bool>())
            .prop_map(|(space, page, is_on)| Operation::Track { space, page, is_on }),
        2 => (space(), page(), any::<bool>())
            .prop_map(|(space, page, is_on)| Operation::Trap { space, page, is_on }),
        4 => (space(), 0_u16..3)
            .prop_map(|(space, number)| Operation::TakeLog { space, number }),
        1 => (0_u16..3, 0_u64..9, any::<u64>()).prop_map(|(number, word, mask)| {
            Operation::ClearLog { space: AddressSpace::Normal, number, word, mask }
        }),
        1 => (page(), 1_u64..600).prop_map(|(page, pages)| Operation::Zap { page, pages }),
        1 => Just(Operation::ZapAll),
        1 => (0_u64..8).prop_map(|n| Operation::Age { hva: HVA + n * MIB }),
        1 => (0_u64..8).prop_map(|n| Operation::Invalidate { hva: HVA + n * MIB }),
        1 => Just(Operation::Recover),
        1 => Just(Operation::Reclaim),
    ]
}

fn config() -> impl Strategy<Value = Config> {
    (any::<[bool; 5]>(), 0_u32..3).prop_map(
        |(
            [
                accessed_dirty,
                nx_huge_pages,
                eager_split,
                by_flags,
                is_small,
            ],
            prefetch,
        )| Config {
            accessed_dirty: accessed_dirty || by_flags,
            nx_huge_pages,
            eager_split,
            dirty_method: if by_flags {
                DirtyMethod::DirtyFlags
            } else {
                DirtyMethod::WriteProtect
            },
            max_level: if is_small { Level::PTE } else { Level::PDE },
            prefetch: [0, 1, 7][prefetch as usize],
            levels: if is_small { 5 } else { 4 },
            ..Config::default()
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_mmu_does_what_the_model_says(
        config in config(),
        operations in proptest::collection::vec(operation(), 1..120),
    ) {
        let mut bench = Bench::new(config);
        for operation in &operations {
            bench.run(operation)?;
        }
        bench.cpus.clear();
        bench.mmu.zap_all();
        prop_assert_eq!(bench.mmu.table_pages(), 0);
    }
}
