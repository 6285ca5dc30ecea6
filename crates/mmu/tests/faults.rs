//! Faults on one vCPU: verdicts, mappings, MMIO, host memory.
#![cfg(all(not(miri), not(feature = "model")))]

mod machine;

use arch::addr::{Gfn, Gpa, Hva};
use arch::page_fault::ErrorCode;
use arch::paging::Level;
use eptide_mmu::{
    AccessError, AddressSpace, Config, FaultError, FaultResult, MemoryRegion, MmioAccess,
};
use machine::{Cpu, Outcome, Ram, delete, mmu, region};

const MIB: u64 = 1 << 20;

fn mmio(gpa: u64, is_known: bool) -> Outcome {
    Outcome::Exit(FaultResult::Mmio(MmioAccess {
        gpa: Gpa::new(gpa),
        is_known,
    }))
}

fn small_pages() -> Config {
    Config {
        max_level: Level::PTE,
        prefetch: 0,
        ..Config::default()
    }
}

#[test]
fn memory_is_mapped_where_its_slot_says() {
    let ram = Ram::new(4 * MIB);
    for levels in [4, 5] {
        let mmu = mmu(Config {
            levels,
            ..small_pages()
        });
        mmu.set_memory_region(&region(0, MIB, 4 * MIB, ram.hva()))
            .unwrap();
        let mut cpu = Cpu::new(&mmu, 0);
        assert_eq!(
            cpu.read(MIB + 0x1234),
            Outcome::Memory(ram.hva().get() + 0x1234)
        );
        assert_eq!(cpu.faults, [FaultResult::Fixed]);
        assert_eq!(
            cpu.write(MIB + 0x1238),
            Outcome::Memory(ram.hva().get() + 0x1238)
        );
        assert_eq!(cpu.faults, [], "a read of unlogged memory maps it writable");
        assert_eq!(
            cpu.fetch(MIB + 0x1230),
            Outcome::Memory(ram.hva().get() + 0x1230)
        );
        assert_eq!(mmu.stats().mapped_4k, 1);
    }
}

#[test]
fn huge_pages_need_congruence_and_room() {
    let ram = Ram::new(8 * MIB);
    let mmu = mmu(Config::default());
    mmu.set_memory_region(&region(0, 0, 8 * MIB, ram.hva()))
        .unwrap();
    let skewed = ram.hva().wrapping_add(0x1000);
    mmu.set_memory_region(&region(1, 32 * MIB, 4 * MIB, skewed))
        .unwrap();
    let mut cpu = Cpu::new(&mmu, 0);
    cpu.read(3 * MIB);
    assert_eq!(mmu.stats().mapped_2m, 1);
    assert_eq!(
        cpu.write(2 * MIB + 0x5008),
        Outcome::Memory(ram.hva().get() + 2 * MIB + 0x5008)
    );
    assert_eq!(cpu.faults, []);
    assert_eq!(cpu.read(33 * MIB), Outcome::Memory(skewed.get() + MIB));
    assert_eq!(mmu.stats().mapped_2m, 1);
    assert_eq!(mmu.stats().mapped_4k, 1);
    assert_eq!(mmu.stats().prefetched, 7);
}

#[test]
fn a_gigabyte_is_mapped_at_once_when_all_of_it_is_there() {
    let ram = Ram::aligned(1 << 30, 1 << 30);
    let mmu = mmu(Config {
        max_level: Level::PDPTE,
        ..Config::default()
    });
    // Read-only, so that populating it needs the zero page only.
    let slot = MemoryRegion {
        flags: 2,
        ..region(0, 1 << 30, 1 << 30, ram.hva())
    };
    mmu.set_memory_region(&slot).unwrap();
    let mut cpu = Cpu::new(&mmu, 0);
    for chunk in 0..512 {
        cpu.read((1 << 30) + chunk * 2 * MIB);
    }
    assert_eq!(mmu.stats().mapped_1g, 1, "by the last chunk's fault");
    assert_eq!(mmu.stats().huge_formed, 1);
    assert_eq!(
        cpu.read((1 << 30) + 0x1238),
        Outcome::Memory(ram.hva().get() + 0x1238)
    );
    assert_eq!(
        mmu.table_pages(),
        2 + 6,
        "root, one below, and the vCPU's cache"
    );
}

#[test]
fn a_hole_is_mmio_for_data_and_no_place_to_fetch_from() {
    let mmu = mmu(Config::default());
    let mut cpu = Cpu::new(&mmu, 0);
    assert_eq!(cpu.write(0xfee0_0080), mmio(0xfee0_0080, false));
    assert_eq!(
        cpu.read(0xfee0_0090),
        mmio(0xfee0_0090, true),
        "by its entry"
    );
    assert_eq!(
        cpu.read(0xfee0_00a0),
        mmio(0xfee0_00a0, true),
        "by the cache"
    );
    let stats = mmu.stats();
    assert_eq!(
        (stats.mmio_mapped, stats.mmio_by_entry, stats.mmio_cached),
        (1, 1, 1)
    );
    assert_eq!(
        cpu.fetch(0xd000_0000),
        Outcome::Exit(FaultResult::FetchFromHole)
    );
}

#[test]
fn addresses_beyond_the_physical_width_are_holes_without_an_entry() {
    let mmu = mmu(Config {
        physical_bits: 40,
        ..Config::default()
    });
    let mut cpu = Cpu::new(&mmu, 0);
    for gpa in [1 << 40, 1 << 47, 1 << 50] {
        assert_eq!(cpu.read(gpa), mmio(gpa, false));
    }
    assert_eq!(mmu.stats().mmio_unmapped, 3);
}

#[test]
fn a_new_slot_makes_old_mmio_entries_stale() {
    let ram = Ram::new(2 * MIB);
    let mmu = mmu(small_pages());
    let mut cpu = Cpu::new(&mmu, 0);
    cpu.read(0x5000);
    cpu.read(0x5000);
    mmu.set_memory_region(&region(0, 0, 2 * MIB, ram.hva()))
        .unwrap();
    assert_eq!(cpu.read(0x5000), Outcome::Memory(ram.hva().get() + 0x5000));
    assert_eq!(mmu.stats().mmio_stale, 1);
    delete(&mmu, 0).unwrap();
    assert_eq!(cpu.read(0x5000), mmio(0x5000, false));
}

#[test]
fn the_generation_wraps_without_reviving_entries() {
    let ram = Ram::new(2 * MIB);
    let first_generation = (1 << 19) - 2;
    let mmu = mmu(Config {
        first_generation,
        ..small_pages()
    });
    let mut cpu = Cpu::new(&mmu, 0);
    cpu.read(0x5000);
    cpu.read(0x5000);
    assert_eq!(mmu.stats().zap_all, 0);
    mmu.set_memory_region(&region(0, 0, MIB, ram.hva()))
        .unwrap();
    mmu.set_memory_region(&region(1, MIB, MIB, ram.hva()))
        .unwrap();
    assert_eq!(mmu.stats().zap_all, 1);
    assert_eq!(cpu.read(0x5000), Outcome::Memory(ram.hva().get() + 0x5000));
}

#[test]
fn the_generation_may_wrap_in_the_middle_of_a_change() {
    let ram = Ram::new(2 * MIB);
    let first_generation = (1 << 19) - 2;
    let mmu = mmu(Config {
        first_generation,
        ..small_pages()
    });
    mmu.set_memory_region(&region(0, 0, MIB, ram.hva()))
        .unwrap();
    assert_eq!(mmu.stats().zap_all, 0);
    delete(&mmu, 0).unwrap();
    assert_eq!(mmu.slots().generation(), (1 << 19) + 1);
    assert_eq!(mmu.stats().zap_all, 1);
}

#[test]
fn read_only_slots_are_memory_to_read_and_mmio_to_write() {
    let ram = Ram::new(2 * MIB);
    let mmu = mmu(small_pages());
    let slot = MemoryRegion {
        flags: 2,
        ..region(0, 0, 2 * MIB, ram.hva())
    };
    mmu.set_memory_region(&slot).unwrap();
    let mut cpu = Cpu::new(&mmu, 0);
    assert_eq!(cpu.write(0x1000), mmio(0x1000, false));
    assert_eq!(cpu.read(0x1000), Outcome::Memory(ram.hva().get() + 0x1000));
    assert_eq!(cpu.fetch(0x1000), Outcome::Memory(ram.hva().get() + 0x1000));
    assert_eq!(cpu.write(0x1000), mmio(0x1000, false));
    let refused = mmu.write_guest(AddressSpace::Normal, Gpa::new(0x1000), &[1]);
    assert_eq!(refused, Err(AccessError::ReadOnly(Gpa::new(0x1000))));
}

#[test]
fn missing_host_memory_is_an_error_until_it_is_repaired() {
    let ram = Ram::new(4 * MIB);
    let mmu = mmu(Config::default());
    mmu.set_memory_region(&region(0, 0, 4 * MIB, ram.hva()))
        .unwrap();
    ram.protect(0x3000, 0x1000, libc::PROT_NONE);
    let mut cpu = Cpu::new(&mmu, 0);
    let missing = FaultResult::Error(FaultError::HostMemory {
        hva: ram.hva().wrapping_add(0x3000),
        gpa: Gpa::new(0x3010),
    });
    assert_eq!(cpu.write(0x3010), Outcome::Exit(missing));
    assert_eq!(
        cpu.write(0x4010),
        Outcome::Memory(ram.hva().get() + 0x4010),
        "page by page"
    );
    let mut bytes = [0; 16];
    let result = mmu.read_guest(AddressSpace::Normal, Gpa::new(0x2ff8), &mut bytes);
    let hva = ram.hva().wrapping_add(0x3000);
    assert_eq!(result, Err(AccessError::HostMemory(Gpa::new(0x3000), hva)));
    ram.protect(0x3000, 0x1000, libc::PROT_READ);
    assert_eq!(cpu.read(0x3010), Outcome::Memory(ram.hva().get() + 0x3010));
    assert_eq!(cpu.write(0x3010), Outcome::Exit(missing));
    ram.protect(0x3000, 0x1000, libc::PROT_READ | libc::PROT_WRITE);
    assert_eq!(cpu.write(0x3010), Outcome::Memory(ram.hva().get() + 0x3010));
    assert_eq!(
        mmu.stats().mapped_2m,
        1,
        "the last fault found all of the chunk in order"
    );
}

#[test]
fn invalidated_host_memory_is_looked_at_again() {
    let ram = Ram::new(4 * MIB);
    let mmu = mmu(Config::default());
    mmu.set_memory_region(&region(0, 0, 4 * MIB, ram.hva()))
        .unwrap();
    let mut cpu = Cpu::new(&mmu, 0);
    cpu.write(0x5000);
    let hva = ram.hva().wrapping_add(0x5000);
    let change = mmu.invalidate(hva..hva.wrapping_add(0x1000));
    let mut other = mmu.create_vcpu(1);
    mmu.load(&mut other).unwrap();
    let during = mmu.handle_page_fault(&mut other, Gpa::new(0x5000), ErrorCode::WRITE);
    assert_eq!(during, FaultResult::Retry);
    ram.protect(0x5000, 0x1000, libc::PROT_NONE);
    drop(change);
    assert!(matches!(
        cpu.write(0x5000),
        Outcome::Exit(FaultResult::Error(_))
    ));
    assert_eq!(cpu.write(0x6000), Outcome::Memory(ram.hva().get() + 0x6000));
}

#[test]
fn address_spaces_have_slots_of_their_own() {
    let (normal, smram) = (Ram::new(2 * MIB), Ram::new(2 * MIB));
    let mmu = mmu(small_pages());
    mmu.set_memory_region(&region(0, 0, 2 * MIB, normal.hva()))
        .unwrap();
    let smm = region(0, 0, 2 * MIB, smram.hva());
    mmu.set_memory_region(&MemoryRegion {
        space: AddressSpace::Smm,
        ..smm
    })
    .unwrap();
    let mut cpu = Cpu::new(&mmu, 0);
    assert_eq!(
        cpu.read(0xa0000),
        Outcome::Memory(normal.hva().get() + 0xa0000)
    );
    let before = mmu.load(&mut cpu.vcpu).unwrap();
    cpu.vcpu.set_address_space(AddressSpace::Smm);
    assert_ne!(mmu.load(&mut cpu.vcpu).unwrap(), before);
    let mut other = Cpu::new(&mmu, 1);
    other.vcpu.set_address_space(AddressSpace::Smm);
    assert_eq!(
        other.read(0xa0000),
        Outcome::Memory(smram.hva().get() + 0xa0000)
    );
}

#[test]
fn a_private_access_with_a_reserved_bit_is_an_error() {
    let mmu = mmu(Config::default());
    let mut cpu = Cpu::new(&mmu, 0);
    mmu.load(&mut cpu.vcpu).unwrap();
    let code = ErrorCode::RSVD | ErrorCode::PRIVATE_ACCESS;
    let result = mmu.handle_page_fault(&mut cpu.vcpu, Gpa::new(0x1000), code);
    assert_eq!(
        result,
        FaultResult::Error(FaultError::PrivateReserved(Gpa::new(0x1000)))
    );
}

#[test]
fn a_misconfiguration_that_is_not_ours_is_reported() {
    let ram = Ram::new(2 * MIB);
    let mmu = mmu(small_pages());
    mmu.set_memory_region(&region(0, 0, 2 * MIB, ram.hva()))
        .unwrap();
    let mut cpu = Cpu::new(&mmu, 0);
    cpu.read(0x7000);
    let misconfigured =
        |cpu: &mut Cpu| mmu.handle_page_fault(&mut cpu.vcpu, Gpa::new(0x7000), ErrorCode::RSVD);
    assert_eq!(
        misconfigured(&mut cpu),
        FaultResult::Retry,
        "a proper mapping: run again"
    );
    // Somebody scribbles over the root table: a reserved bit in its first entry.
    let root = mmu.load(&mut cpu.vcpu).unwrap().root();
    // SAFETY: the root table, which this thread alone uses.
    let first = unsafe { &*(root as *const std::sync::atomic::AtomicU64) };
    first.fetch_or(1 << 6, std::sync::atomic::Ordering::SeqCst);
    assert_eq!(misconfigured(&mut cpu), FaultResult::Invalid);
    assert!(
        mmu.dump_walk(&cpu.vcpu, Gpa::new(0x7000))
            .contains("MALFORMED")
    );
}

#[test]
fn kvms_own_accesses_cross_pages_and_slots() {
    let ram = Ram::new(4 * MIB);
    let mmu = mmu(Config::default());
    mmu.set_memory_region(&region(0, 0, MIB, ram.hva()))
        .unwrap();
    let second = ram.hva().wrapping_add(2 * MIB);
    mmu.set_memory_region(&region(1, MIB, MIB, second)).unwrap();
    let at = Gpa::new(MIB - 4);
    mmu.write_guest(AddressSpace::Normal, at, b"12345678")
        .unwrap();
    let mut bytes = [0; 8];
    mmu.read_guest(AddressSpace::Normal, at, &mut bytes)
        .unwrap();
    assert_eq!(&bytes, b"12345678");
    assert_eq!(
        ram.word(2 * MIB).load(std::sync::atomic::Ordering::Relaxed) as u32,
        0x38373635
    );
    let end = Gpa::new(2 * MIB - 4);
    let beyond = mmu.write_guest(AddressSpace::Normal, end, b"12345678");
    assert_eq!(beyond, Err(AccessError::NoMemory(Gpa::new(2 * MIB))));
    let found = mmu.gfn_to_hva(AddressSpace::Normal, Gfn::new(256));
    assert_eq!(found, Some(second));
    assert_eq!(
        mmu.gfn_to_hva(AddressSpace::Normal, Gfn::new(512)),
        None::<Hva>
    );
}

#[test]
fn execution_traps_come_before_the_instruction() {
    let ram = Ram::new(4 * MIB);
    for config in [Config::default(), small_pages()] {
        let mmu = mmu(config);
        mmu.set_memory_region(&region(0, 0, 4 * MIB, ram.hva()))
            .unwrap();
        let mut cpu = Cpu::new(&mmu, 0);
        cpu.fetch(0x5000);
        let page = Gfn::new(5)..Gfn::new(6);
        mmu.set_execution_traps(AddressSpace::Normal, page.clone(), true)
            .unwrap();
        assert_eq!(cpu.fetch(0x5000), Outcome::Exit(FaultResult::ExecuteTrap));
        assert_eq!(cpu.write(0x5000), Outcome::Memory(ram.hva().get() + 0x5000));
        assert_eq!(cpu.fetch(0x5000), Outcome::Exit(FaultResult::ExecuteTrap));
        assert_eq!(cpu.fetch(0x6000), Outcome::Memory(ram.hva().get() + 0x6000));
        mmu.set_execution_traps(AddressSpace::Normal, page, false)
            .unwrap();
        assert_eq!(cpu.fetch(0x5000), Outcome::Memory(ram.hva().get() + 0x5000));
        let nowhere = Gfn::new(1023)..Gfn::new(1025);
        assert!(
            mmu.set_execution_traps(AddressSpace::Normal, nowhere, true)
                .is_err()
        );
    }
}

#[test]
fn tracked_pages_give_writes_to_the_tracker() {
    let ram = Ram::new(4 * MIB);
    for config in [Config::default(), small_pages()] {
        let mmu = mmu(config);
        mmu.set_memory_region(&region(0, 0, 4 * MIB, ram.hva()))
            .unwrap();
        let mut cpu = Cpu::new(&mmu, 0);
        cpu.write(0x5000);
        let track = || mmu.track_writes(AddressSpace::Normal, Gfn::new(5)).unwrap();
        let untrack = || mmu.untrack_writes(AddressSpace::Normal, Gfn::new(5));
        track();
        track();
        assert_eq!(
            cpu.write(0x5000),
            Outcome::Exit(FaultResult::WriteProtected)
        );
        assert_eq!(cpu.read(0x5000), Outcome::Memory(ram.hva().get() + 0x5000));
        assert_eq!(
            cpu.write(0x5000),
            Outcome::Exit(FaultResult::WriteProtected)
        );
        assert_eq!(cpu.write(0x6000), Outcome::Memory(ram.hva().get() + 0x6000));
        untrack().unwrap();
        assert_eq!(
            cpu.write(0x5000),
            Outcome::Exit(FaultResult::WriteProtected)
        );
        untrack().unwrap();
        assert_eq!(cpu.write(0x5000), Outcome::Memory(ram.hva().get() + 0x5000));
        assert!(untrack().is_err());
    }
}

#[test]
fn a_dumped_walk_reads_like_this() {
    let ram = Ram::new(4 * MIB);
    let mmu = mmu(Config {
        prefetch: 0,
        ..Config::default()
    });
    let logged = MemoryRegion {
        flags: 1,
        ..region(0, 0, MIB, ram.hva())
    };
    mmu.set_memory_region(&logged).unwrap();
    mmu.set_memory_region(&region(
        1,
        2 * MIB,
        2 * MIB,
        ram.hva().wrapping_add(2 * MIB),
    ))
    .unwrap();
    let mut cpu = Cpu::new(&mmu, 0);
    cpu.read(0x5000);
    cpu.write(2 * MIB);
    cpu.write(0xfee0_0000);
    let dump = |gpa| {
        let text = mmu.dump_walk(&cpu.vcpu, Gpa::new(gpa));
        // Without the raw entries and the addresses of this process.
        let line = |line: &str| {
            let words = line
                .split_whitespace()
                .filter(|word| !word.starts_with("0x"));
            words.collect::<Vec<_>>().join(" ").replace(" at", "")
        };
        text.lines().skip(1).map(line).collect::<Vec<_>>()
    };
    let upper = ["level 4: rwxA- table", "level 3: rwxA- table"];
    let table = "level 2: rwxA- table";
    let expected = |rest: &[&'static str]| [&upper[..], rest].concat();
    assert_eq!(
        dump(0x5000),
        expected(&[table, "level 1: r-xA- page, write-protected"])
    );
    assert_eq!(dump(0x6000), expected(&[table, "level 1: empty"]));
    assert_eq!(dump(2 * MIB), expected(&["level 2: rwxAD page"]));
    let mmio = "level 1: MMIO, gfn generation 2";
    let below_3_gib = ["level 4: rwxA- table", "level 3: rwxA- table", table, mmio];
    assert_eq!(dump(0xfee0_0000), below_3_gib);
}
