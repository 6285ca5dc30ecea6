//! Shadows of a nested EPT against the architecture: a processor that walks the MMU's tables as its
//! EPT, and the naive walker on the EPT that the guest, as a hypervisor, made.
#![cfg(not(feature = "model"))]

extern crate arch as eptide_arch;

mod machine;
#[path = "../../arch/tests/naive/mod.rs"]
mod naive;

use arch::addr::{Gpa, PAGE_SIZE};
use arch::paging::{
    EptAccess, EptError, EptFault, EptFeatures, EptPaging, EptRights, EptViolation,
    ept_entry as ept,
};
use eptide_mmu::{
    AddressSpace, Config, Entry, FaultResult, MemoryRegion, Mmu, NestedEpt, NestedResult, Vcpu,
    nested_qualification,
};
use machine::{HostTables, Ram, mmu, region};
use naive::{EptVerdict, Memory};
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

const NORMAL: AddressSpace = AddressSpace::Normal;
const RAM: u64 = 32 << 20;
const ROOT: u64 = 0x9_0000;
/// What leaves map.
const PAGE: u64 = 0x80_0000;
const PHYSICAL_BITS: u32 = 46;
/// The address under test, with an index of its own at each level.
const NESTED: u64 = 5 << 48 | 0x5a << 39 | 3 << 30 | 0x80_1234;
const ALL: u64 = ept::READ | ept::WRITE | ept::EXECUTE;

/// How an access ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// It reached this address of the guest.
    Memory(u64),
    /// The guest hears of a violation: these rights, at this level.
    Violation(EptRights, u8),
    /// The guest hears of a misconfiguration at this level.
    Misconfiguration(u8),
    /// A device's, at this address.
    Mmio(u64),
}

/// A processor in the guest of a guest, without a TLB.
struct Cpu {
    mmu: Arc<Mmu>,
    vcpu: Vcpu,
    ram: Arc<Ram>,
    nested: NestedEpt,
    emulated: u64,
}

impl Cpu {
    fn new(mmu: &Arc<Mmu>, ram: &Arc<Ram>, levels: u8, features: EptFeatures) -> Self {
        let paging = EptPaging::new(levels, features, PHYSICAL_BITS).unwrap();
        Self {
            mmu: Arc::clone(mmu),
            vcpu: mmu.create_vcpu(0),
            ram: Arc::clone(ram),
            nested: NestedEpt { paging, root: ROOT },
            emulated: 0,
        }
    }

    fn access(&mut self, gpa: u64, access: EptAccess) -> Outcome {
        let features = EptFeatures::EXECUTE_ONLY
            | EptFeatures::PAGES_2M
            | EptFeatures::PAGES_1G
            | self.nested.paging.features() & EptFeatures::ACCESSED_DIRTY;
        for _ in 0..100 {
            let pointer = self.mmu.load_nested(&mut self.vcpu, &self.nested).unwrap();
            if self.vcpu.gate().enter() != Entry::Ready {
                continue;
            }
            let hardware = EptPaging::new(pointer.levels, features, 52).unwrap();
            let root = pointer.root.get();
            let found = hardware.translate(&mut HostTables, root, Gpa::new(gpa), access);
            self.vcpu.gate().exit();
            let tried = match found {
                Ok(found) => {
                    return Outcome::Memory(found.address.wrapping_sub(self.ram.hva().get()));
                }
                Err(EptError::Fault(EptFault::Violation(_))) => Some(access),
                Err(EptError::Fault(EptFault::Misconfiguration { .. })) => None,
                Err(EptError::Memory { error, .. }) => match error {},
            };
            let result = self
                .mmu
                .handle_nested_fault(&mut self.vcpu, Gpa::new(gpa), tried);
            match result {
                NestedResult::Guest(EptFault::Violation(violation)) => {
                    assert_eq!(violation.access, access);
                    return Outcome::Violation(violation.rights, violation.level.number());
                }
                NestedResult::Guest(EptFault::Misconfiguration { level, .. }) => {
                    return Outcome::Misconfiguration(level.number());
                }
                NestedResult::Verdict(FaultResult::WriteProtected, at) => {
                    self.emulated += 1;
                    return Outcome::Memory(at.get());
                }
                NestedResult::Verdict(FaultResult::Mmio(mmio), _) => {
                    return Outcome::Mmio(mmio.gpa.get());
                }
                NestedResult::Verdict(
                    FaultResult::Fixed | FaultResult::Spurious | FaultResult::Retry,
                    _,
                ) => {}
                other => panic!("{other:?}"),
            }
        }
        panic!("no progress at {gpa:#x}, {access:?}");
    }

    /// What the naive walker says, with accessed and dirty flags set in `memory`.
    fn expected(&self, memory: &mut Memory, gpa: u64, access: EptAccess) -> Outcome {
        let paging = &self.nested.paging;
        let verdict = naive::translate_ept(
            memory,
            paging.levels(),
            paging.features(),
            PHYSICAL_BITS,
            ROOT,
            gpa,
            access,
        );
        match verdict {
            EptVerdict::Translated { address, .. } => Outcome::Memory(address),
            EptVerdict::Violation { rights, level } => Outcome::Violation(rights, level),
            EptVerdict::Misconfiguration { level } => Outcome::Misconfiguration(level),
        }
    }
}

/// Where the entry for [`NESTED`] at a level is.
fn at(level: u8, levels: u8) -> u64 {
    let table = if level == levels {
        ROOT
    } else {
        u64::from(level) << 16
    };
    table + (NESTED >> (12 + 9 * (u32::from(level) - 1)) & 0x1ff) * 8
}

fn nested_address(levels: u8) -> u64 {
    NESTED & ((1 << (12 + 9 * u32::from(levels))) - 1)
}

/// The entry under test: bits of `n` for R, W, X, page size, accessed, dirty, a reserved bit, and a
/// reserved memory type.
fn entry(n: u64, level: u8) -> u64 {
    let bit = |k: u32, mask: u64| if n >> k & 1 != 0 { mask } else { 0 };
    let is_leaf = level == 1 || n >> 3 & 1 != 0;
    let memory_type = match (is_leaf, n >> 7 & 1) {
        (false, 0) => 0,
        (true, 0) => ept::WRITE_BACK,
        _ => 2 << ept::MEMORY_TYPE_SHIFT,
    };
    let target = match (is_leaf, level) {
        (true, 3) => 0,
        (true, _) => PAGE,
        (false, _) => u64::from(level - 1) << 16,
    };
    n & ALL
        | bit(3, ept::PAGE_SIZE)
        | bit(4, ept::ACCESSED)
        | bit(5, ept::DIRTY)
        | bit(6, 1 << 50)
        | memory_type
        | target
}

fn machine() -> (Arc<Ram>, Arc<Mmu>) {
    let ram = Arc::new(Ram::new(RAM));
    let mmu = mmu(Config::default());
    mmu.set_memory_region(&region(0, 0, RAM, ram.hva()))
        .unwrap();
    (ram, mmu)
}

fn write(mmu: &Mmu, at: u64, value: u64) {
    mmu.write_guest(NORMAL, Gpa::new(at), &value.to_le_bytes())
        .unwrap();
}

#[test]
fn every_entry_and_access_ends_as_the_manual_says() {
    let accesses = [
        EptAccess::READ,
        EptAccess::WRITE,
        EptAccess::FETCH,
        EptAccess::READ | EptAccess::WRITE,
    ];
    let mut cases = [0_u64; 3];
    for levels in [4, 5] {
        for n in 0..4 {
            let mut features = EptFeatures::PAGES_2M | EptFeatures::PAGES_1G;
            features.set(EptFeatures::EXECUTE_ONLY, n & 1 != 0);
            features.set(EptFeatures::ACCESSED_DIRTY, n & 2 != 0);
            let (ram, mmu) = machine();
            let mut cpu = Cpu::new(&mmu, &ram, levels, features);
            let gpa = nested_address(levels);
            for (level, n) in (1..=levels).flat_map(|level| (0..256).map(move |n| (level, n))) {
                let mut memory = Memory::new();
                for other in 1..=levels {
                    let value = match other {
                        other if other == level => entry(n, level),
                        1 => PAGE | ALL | ept::WRITE_BACK,
                        _ => u64::from(other - 1) << 16 | ALL,
                    };
                    let place = at(other, levels);
                    memory.insert(place, value);
                    if ram.word(place).load(SeqCst) != value {
                        write(&mmu, place, value);
                    }
                }
                // INVEPT.
                mmu.sync_shadow();
                for turn in 0..4 {
                    // Every access comes first somewhere.
                    let access = accesses[(turn + (n >> 4) as usize) % 4];
                    let expected = cpu.expected(&mut memory, gpa, access);
                    let found = cpu.access(gpa, access);
                    let case = || {
                        let entry = entry(n, level);
                        format!("{levels} levels, {entry:#x} at {level}, {features:?}, {access:?}")
                    };
                    assert_eq!(found, expected, "{}", case());
                    for (&at, &value) in &memory {
                        let now = ram.word(at).load(SeqCst);
                        assert_eq!(now, value, "entry at {at:#x}: {}", case());
                    }
                    cases[match found {
                        Outcome::Memory(_) => 0,
                        Outcome::Violation(..) => 1,
                        _ => 2,
                    }] += 1;
                }
            }
        }
    }
    println!("{cases:?} translations, violations, misconfigurations");
    assert!(cases.iter().all(|&count| count > 1000), "{cases:?}");
}

#[test]
fn the_qualification_is_the_walks_and_the_exits() {
    let violation = EptViolation {
        access: EptAccess::WRITE,
        rights: EptRights::READ | EptRights::EXECUTE,
        level: arch::paging::Level::PTE,
    };
    let features = EptFeatures::empty();
    // The processor met an empty shadow entry, at the translation of a linear address.
    let exit = 0b1_1000_0010;
    let qualification = nested_qualification(&violation, features, exit);
    assert_eq!(qualification, 0b1_1010_1010);
}

/// The table of each level, so that address 0 leads to `PAGE`.
fn chain(ram: &Ram) {
    for (table, target) in [(ROOT, 0x3_0000), (0x3_0000, 0x2_0000), (0x2_0000, 0x1_0000)] {
        ram.word(table).store(target | ALL, SeqCst);
    }
    ram.word(0x1_0000)
        .store(PAGE | ALL | ept::WRITE_BACK, SeqCst);
}

#[test]
fn the_hypervisors_own_writes_to_its_tables_are_seen() {
    let (ram, mmu) = machine();
    chain(&ram);
    // It has the tables in its TLB and in its EPT, writable.
    let mut hypervisor = machine::Cpu::new(&mmu, 1);
    let host = |gpa: u64| machine::Outcome::Memory(ram.hva().get() + gpa);
    assert_eq!(hypervisor.write(0x1_0000), host(0x1_0000));
    let features = EptFeatures::ACCESSED_DIRTY;
    let mut cpu = Cpu::new(&mmu, &ram, 4, features);
    assert_eq!(cpu.access(8, EptAccess::WRITE), Outcome::Memory(PAGE + 8));
    for table in [ROOT, 0x1_0000] {
        let result = hypervisor.write(table);
        let exit = machine::Outcome::Exit(FaultResult::WriteProtected);
        assert_eq!(result, exit, "table at {table:#x}");
        assert_eq!(hypervisor.read(table), host(table));
    }
    // So KVM makes the write, and the shadow of the entry is gone.
    write(&mmu, 0x1_0000, (PAGE + PAGE_SIZE) | ALL | ept::WRITE_BACK);
    let found = cpu.access(8, EptAccess::READ);
    assert_eq!(found, Outcome::Memory(PAGE + PAGE_SIZE + 8));
    // Tables that are none any more take writes again.
    for _ in 0..3 {
        write(&mmu, ROOT, 0);
    }
    assert_eq!(hypervisor.write(ROOT), host(ROOT));
    assert_eq!(
        cpu.access(8, EptAccess::READ),
        Outcome::Violation(EptRights::empty(), 4)
    );
}

#[test]
fn a_table_that_its_own_guest_writes_is_protected_again() {
    let (ram, mmu) = machine();
    chain(&ram);
    let table = 0x1_0000;
    ram.word(table + 16)
        .store(table | ALL | ept::WRITE_BACK, SeqCst);
    let mut hypervisor = machine::Cpu::new(&mmu, 1);
    let mut cpu = Cpu::new(&mmu, &ram, 4, EptFeatures::ACCESSED_DIRTY);
    // The table translates itself, and goes unsync when it is written.
    assert_eq!(cpu.access(0x2000, EptAccess::WRITE), Outcome::Memory(table));
    assert_eq!(cpu.access(0x2000, EptAccess::WRITE), Outcome::Memory(table));
    assert_eq!((cpu.emulated, mmu.stats().unsynced), (0, 1));
    let host = machine::Outcome::Memory(ram.hva().get() + table);
    assert_eq!(hypervisor.write(table), host);
    ram.word(table)
        .store((PAGE + PAGE_SIZE) | ALL | ept::WRITE_BACK, SeqCst);
    mmu.sync_shadow();
    assert_eq!(
        cpu.access(0, EptAccess::READ),
        Outcome::Memory(PAGE + PAGE_SIZE)
    );
    let exit = machine::Outcome::Exit(FaultResult::WriteProtected);
    assert_eq!(hypervisor.write(table), exit);
}

#[test]
fn devices_slots_and_host_memory_reach_the_guest_of_the_guest() {
    let (ram, mmu) = machine();
    chain(&ram);
    const DEVICE: u64 = 0x4000_0000;
    ram.word(0x1_0008)
        .store(DEVICE | ALL | ept::WRITE_BACK, SeqCst);
    let mut cpu = Cpu::new(&mmu, &ram, 4, EptFeatures::ACCESSED_DIRTY);
    for _ in 0..2 {
        let found = cpu.access(0x1010, EptAccess::READ);
        assert_eq!(found, Outcome::Mmio(DEVICE + 0x10));
    }
    assert_eq!(mmu.stats().mmio_by_entry, 1);
    let more = Ram::new(2 << 20);
    mmu.set_memory_region(&region(1, DEVICE, 2 << 20, more.hva()))
        .unwrap();
    let distance = (more.hva().get() + 0x10).wrapping_sub(ram.hva().get());
    assert_eq!(
        cpu.access(0x1010, EptAccess::READ),
        Outcome::Memory(distance)
    );

    // A page that the host takes away is found anew; one without a slot any more is a device's.
    assert_eq!(cpu.access(0, EptAccess::WRITE), Outcome::Memory(PAGE));
    let page = ram.hva().wrapping_add(PAGE);
    let faults = mmu.stats().faults;
    drop(mmu.invalidate(page..page.wrapping_add(PAGE_SIZE)));
    assert_eq!(cpu.access(0, EptAccess::WRITE), Outcome::Memory(PAGE));
    assert_eq!(mmu.stats().faults, faults + 1);
    let gone = MemoryRegion {
        size: 0,
        ..region(1, DEVICE, 0, more.hva())
    };
    mmu.set_memory_region(&gone).unwrap();
    assert_eq!(
        cpu.access(0x1010, EptAccess::READ),
        Outcome::Mmio(DEVICE + 0x10)
    );
}

#[test]
fn execute_only_pages_are_executed_only() {
    let (ram, mmu) = machine();
    chain(&ram);
    ram.word(0x1_0000)
        .store(PAGE | ept::EXECUTE | ept::WRITE_BACK, SeqCst);
    let mut cpu = Cpu::new(&mmu, &ram, 4, EptFeatures::EXECUTE_ONLY);
    assert_eq!(cpu.access(4, EptAccess::FETCH), Outcome::Memory(PAGE + 4));
    let refused = Outcome::Violation(EptRights::EXECUTE | EptRights::EXECUTE_USER, 1);
    assert_eq!(cpu.access(4, EptAccess::READ), refused);
    assert_eq!(cpu.access(4, EptAccess::FETCH), Outcome::Memory(PAGE + 4));
}
