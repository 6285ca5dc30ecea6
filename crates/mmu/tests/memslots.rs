//! Memslot operations against a naive model. `PROPTEST_CASES` sets how many sequences.
#![cfg(not(feature = "model"))]

use arch::addr::{Gfn, Gpa, Hva};
use eptide_mmu::{
    AddressSpace, Config, HostAccess, HostMemory, MemoryRegion, Mmu, Processors, SlotError, SlotId,
};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

struct Nobody;
impl Processors for Nobody {
    fn kick(&self, _: u32) {}
}
impl HostMemory for Nobody {
    fn populate(&self, _: Range<Hva>, _: HostAccess) -> bool {
        true
    }
}

/// Slots as a list of numbers; every question is answered by looking at each.
#[derive(Default)]
struct Model {
    slots: BTreeMap<(AddressSpace, u16), MemoryRegion>,
    changes: u64,
}

const BITS: u32 = 40;

impl Model {
    fn apply(&mut self, region: &MemoryRegion) -> Result<(), SlotError> {
        let MemoryRegion {
            space,
            number,
            flags,
            base,
            size,
            hva,
        } = *region;
        if flags & !3 != 0 {
            return Err(SlotError::UnknownFlags(flags));
        }
        if size % 4096 != 0 {
            return Err(SlotError::MisalignedSize(size));
        }
        if base.get() % 4096 != 0 {
            return Err(SlotError::MisalignedBase(base));
        }
        if hva.get() % 4096 != 0 {
            return Err(SlotError::MisalignedHva(hva));
        }
        let Some(end) = base.get().checked_add(size) else {
            return Err(SlotError::Wraps(base));
        };
        if size / 4096 > 0x7fff_ffff {
            return Err(SlotError::TooLarge(size / 4096));
        }
        let host_end = u128::from(hva.get()) + u128::from(size);
        if host_end > 0x7fff_ffff_f000 {
            return Err(SlotError::HvaOutOfRange(hva));
        }
        let old = self.slots.get(&(space, number)).copied();
        if size == 0 {
            if old.is_none() {
                return Err(SlotError::NoSuchSlot);
            }
            self.slots.remove(&(space, number));
            self.changes += 2;
            return Ok(());
        }
        if end > 1 << BITS {
            return Err(SlotError::BeyondPhysical(BITS));
        }
        if let Some(old) = old
            && (old.size != size || old.hva != hva || (old.flags ^ flags) & 2 != 0)
        {
            return Err(SlotError::Immutable);
        }
        if old.is_none_or(|old| old.base != base) {
            let mut others: Vec<_> = self
                .slots
                .values()
                .filter(|other| other.space == space && other.number != number)
                .filter(|other| {
                    other.base.get() < end && base.get() < other.base.get() + other.size
                })
                .collect();
            others.sort_by_key(|other| other.base);
            if let Some(other) = others.first() {
                return Err(SlotError::Overlap(SlotId {
                    space,
                    number: other.number,
                }));
            }
        }
        if old != Some(*region) {
            self.changes += if old.is_some_and(|old| old.base != base) {
                2
            } else {
                1
            };
        }
        self.slots.insert((space, number), *region);
        Ok(())
    }

    fn find(&self, space: AddressSpace, gpa: u64) -> Option<(u16, u64)> {
        self.slots
            .values()
            .find(|slot| {
                slot.space == space && slot.base.get() <= gpa && gpa < slot.base.get() + slot.size
            })
            .map(|slot| (slot.number, slot.hva.get() + (gpa - slot.base.get())))
    }
}

/// Mostly small slots close together, so that they meet; now and then something outlandish.
fn region() -> impl Strategy<Value = MemoryRegion> {
    let page = |n: u64| n * 4096;
    let base = prop_oneof![
        20 => (0_u64..24).prop_map(page),
        1 => Just((1_u64 << BITS) - 0x3000),
        1 => Just(!0xfff_u64),
        1 => any::<u64>(),
    ];
    let size = prop_oneof![
        20 => (0_u64..6).prop_map(page),
        1 => Just(0x1001_u64),
        1 => Just(1 << 44),
        1 => any::<u64>(),
    ];
    let hva = prop_oneof![
        20 => (0_u64..3).prop_map(move |n| 0x7000_0000 + page(n)),
        1 => Just(0x7fff_ffff_d000_u64),
        1 => any::<u64>(),
    ];
    let flags = prop_oneof![10 => 0_u32..2, 2 => 2_u32..4, 1 => Just(8_u32)];
    (any::<bool>(), 0_u16..5, flags, base, size, hva).prop_map(
        |(is_smm, number, flags, base, size, hva)| MemoryRegion {
            space: if is_smm {
                AddressSpace::Smm
            } else {
                AddressSpace::Normal
            },
            number,
            flags,
            base: Gpa::new(base),
            size,
            hva: Hva::new(hva),
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn slots_behave_like_a_list(regions in proptest::collection::vec(region(), 1..40)) {
        let config = Config { physical_bits: BITS, ..Config::default() };
        let mmu = Mmu::with_host(config, Arc::new(Nobody), Box::new(Nobody)).unwrap();
        let mut model = Model::default();
        for region in regions {
            prop_assert_eq!(mmu.set_memory_region(&region), model.apply(&region));
            prop_assert_eq!(mmu.slots().generation(), model.changes);
            for space in AddressSpace::ALL {
                for page in (0..32).chain([(1 << (BITS - 12)) - 2]) {
                    let gfn = Gfn::new(page);
                    let expected = model.find(space, page * 4096);
                    let slots = mmu.slots();
                    let found = slots.find(space, gfn);
                    let found = found.map(|slot| (slot.id().number, slot.hva_of(gfn).get()));
                    prop_assert_eq!(found, expected);
                    prop_assert_eq!(
                        mmu.gfn_to_hva(space, gfn).map(Hva::get),
                        expected.map(|(_, hva)| hva)
                    );
                }
            }
        }
    }
}
