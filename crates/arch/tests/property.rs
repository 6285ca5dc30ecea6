//! The walker against the naive one, on random tables. `PROPTEST_CASES` sets how many.

mod naive;

use eptide_arch::addr::{Gpa, Gva};
use eptide_arch::control_registers::{Cr0, Cr4, Efer};
use eptide_arch::paging::*;
use naive::{EptVerdict, Memory};
use proptest::prelude::*;
use std::convert::Infallible;

struct Tables<'a>(&'a mut Memory);

impl TableMemory for Tables<'_> {
    type Error = Infallible;
    type Handle = ();

    fn read<E: Entry>(&mut self, address: u64, _: Level) -> Result<(E, ()), Infallible> {
        Ok((E::from_u64(self.0.get(&address).copied().unwrap_or(0)), ()))
    }

    fn compare_exchange<E: Entry>(
        &mut self,
        (): (),
        address: u64,
        old: E,
        new: E,
    ) -> Result<Exchange, Infallible> {
        // A table that points to itself may have had the bit written one level up.
        if E::from_u64(self.0[&address]) != old {
            return Ok(Exchange::Changed);
        }
        self.0.insert(address, new.to_u64());
        Ok(Exchange::Written)
    }
}

/// Bits that are set with a chance of one in sixteen, so that most walks get far.
fn rare() -> impl Strategy<Value = u64> {
    [any::<u64>(), any::<u64>(), any::<u64>(), any::<u64>()].prop_map(|[a, b, c, d]| a & b & c & d)
}

/// Low bits of an entry: mostly present with all rights.
fn low() -> impl Strategy<Value = u64> {
    prop_oneof![6 => Just(7), 1 => Just(0x87), 2 => 0_u64..512, 1 => Just(1)]
}

fn controls() -> impl Strategy<Value = GuestControls> {
    let bits = prop_oneof![Just(32_u32), Just(36), Just(40), Just(46), Just(52)];
    (
        any::<u64>(),
        any::<u64>(),
        any::<u64>(),
        bits,
        any::<[bool; 2]>(),
        0_u32..20,
    )
        .prop_map(
            |(cr0, cr4, efer, physical_bits, [has_1g_pages, has_pse36], off)| {
                let mut cr0 = Cr0::from_bits_retain(cr0) | Cr0::PE;
                cr0.set(Cr0::PG, off != 0);
                let mut cr4 = Cr4::from_bits_retain(cr4);
                let efer = Efer::from_bits_retain(efer);
                if efer.contains(Efer::LMA) {
                    cr4 |= Cr4::PAE;
                }
                GuestControls {
                    cr0,
                    cr4,
                    efer,
                    physical_bits,
                    has_1g_pages,
                    has_pse36,
                }
            },
        )
}

fn access() -> impl Strategy<Value = Access> {
    (0_u32..3, 0_u32..3).prop_map(|(what, who)| {
        let what = [Access::empty(), Access::WRITE, Access::FETCH][what as usize];
        what | [Access::empty(), Access::USER, Access::IMPLICIT][who as usize]
    })
}

const ROOT: u64 = 0x1_0000;
const PAGE: u64 = 0x7000_0000;

/// Tables on one path: the table at level `n` is at `n << 16`.
fn path(gva: u64, levels: u32, index_bits: u32, size: u64, entries: &[(u64, u64, u64)]) -> Memory {
    let mut memory = Memory::new();
    for level in 1..=levels {
        let shift = 12 + index_bits * (level - 1);
        let index = gva >> shift & ((1 << index_bits) - 1);
        let table = if level == levels {
            ROOT
        } else {
            u64::from(level) << 16
        };
        let below = if level == 1 {
            PAGE
        } else {
            u64::from(level - 1) << 16
        };
        let (low, high, frame) = entries[level as usize - 1];
        let target = if low & 0x80 != 0 { frame } else { below };
        let mut value = target | low | high & !0xff;
        if size == 4 {
            value &= 0xffff_ffff;
        }
        memory.insert(table + size * index, value);
    }
    memory
}

fn frame() -> impl Strategy<Value = u64> {
    prop_oneof![4 => Just(0x4000_0000_u64), 1 => Just(0x4020_0000), 1 => Just(0x4000_2000)]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn guest_walks_agree(
        controls in controls(),
        entries in proptest::collection::vec((low(), rare(), frame()), 5),
        pdpte in (low(), rare()),
        gva in any::<u64>(),
        access in access(),
        keys in any::<(u32, u32, bool)>(),
    ) {
        let is_long = controls.efer.contains(Efer::LMA);
        let (levels, index_bits, size) = match () {
            () if is_long && controls.cr4.contains(Cr4::LA57) => (5, 9, 8),
            () if is_long => (4, 9, 8),
            () if controls.cr4.contains(Cr4::PAE) => (2, 9, 8),
            () => (2, 10, 4),
        };
        let gva = if is_long { gva } else { gva & 0xffff_ffff };
        // Which bits of a register PDPTE are set decides whether it is reserved.
        let pdpte = ROOT | pdpte.0 & 1 | pdpte.1 & !0x000f_ffff_ffff_f001;
        let root = GuestRoot { cr3: ROOT, pdptes: [pdpte; 4] };
        let (pkru, pkrs, alignment_check) = keys;
        let privilege = Privilege { pkru, pkrs, alignment_check };
        let mut expected_memory = path(gva, levels, index_bits, size, &entries);
        let mut memory = expected_memory.clone();
        let expected =
            naive::translate(&mut expected_memory, &controls, &root, gva, access, &privilege);
        let paging = GuestPaging::new(&controls);
        let found = paging
            .translate(&mut Tables(&mut memory), &root, Gva::new(gva), access, &privilege)
            .map_err(|error| match error {
                GuestError::PageFault(fault) => (fault.error_code, fault.level.number()),
                GuestError::Memory { error, .. } => match error {},
            });
        prop_assert_eq!(found, expected);
        prop_assert_eq!(memory, expected_memory);
    }

    #[test]
    fn ept_walks_agree(
        levels in 4_u8..=5,
        features in any::<u32>(),
        physical_bits in prop_oneof![Just(36_u32), Just(46), Just(52)],
        entries in proptest::collection::vec((low(), rare(), frame()), 5),
        gpa in any::<u64>(),
        access in 1_u8..16,
    ) {
        let features = EptFeatures::from_bits_truncate(features);
        let mut access = EptAccess::from_bits_truncate(access);
        if access.needs().is_empty() {
            access |= EptAccess::FETCH;
        }
        let gpa = gpa & 0x01ff_ffff_ffff_ffff;
        // Memory type write-back in most leaves.
        let entries: Vec<_> = (0..5)
            .map(|n| {
                let (low, high, frame) = entries[n];
                let is_leaf = n == 0 || low & 0x80 != 0;
                (if is_leaf && low & 0x38 == 0 { low | 0x30 } else { low }, high, frame)
            })
            .collect();
        let mut expected_memory = path(gpa, u32::from(levels), 9, 8, &entries);
        let mut memory = expected_memory.clone();
        let expected = naive::translate_ept(
            &mut expected_memory, levels, features, physical_bits, ROOT, gpa, access,
        );
        let paging = EptPaging::new(levels, features, physical_bits).unwrap();
        let found = paging.translate(&mut Tables(&mut memory), ROOT, Gpa::new(gpa), access);
        prop_assert_eq!(verdict(found), expected);
        prop_assert_eq!(memory, expected_memory);
    }
}

fn verdict(found: Result<EptTranslation, EptError<Infallible>>) -> EptVerdict {
    match found {
        Ok(t) => EptVerdict::Translated {
            address: t.address,
            level: t.level.number(),
            rights: t.rights,
            is_dirty: t.is_dirty,
            has_dirtied: t.has_dirtied,
        },
        Err(EptError::Fault(EptFault::Violation(violation))) => EptVerdict::Violation {
            rights: violation.rights,
            level: violation.level.number(),
        },
        Err(EptError::Fault(EptFault::Misconfiguration { level, .. })) => {
            EptVerdict::Misconfiguration {
                level: level.number(),
            }
        }
        Err(EptError::Memory { error, .. }) => match error {},
    }
}
