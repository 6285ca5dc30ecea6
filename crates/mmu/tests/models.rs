//! The protocols under the model checker, and proof that it would notice.
//!
//! Each model runs under many schedules. Each has a mutant: the same model with one check or wait
//! switched off, which some schedule must expose. `EPTIDE_MODEL_RUNS` sets the number of schedules.

mod machine;

use arch::addr::{Gfn, Hva};
use arch::paging::{EptAccess, Level};
use eptide_mmu::{
    AddressSpace, Config, FaultResult, HostAccess, HostMemory, Mmu, Mutant, set_mutant,
};
use machine::{Cpu, Idle, Outcome, log_dirty, point, region};
use shuttle::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use shuttle::thread;
use std::ops::Range;
use std::panic::catch_unwind;
use std::sync::{Arc, Mutex};

/// Host memory that is always there; nothing touches it.
struct Nowhere;
impl HostMemory for Nowhere {
    fn populate(&self, _: Range<Hva>, _: HostAccess) -> bool {
        point();
        true
    }
}

const HVA: Hva = Hva::new(0x40_0000_0000);
const NORMAL: AddressSpace = AddressSpace::Normal;
const PAGE: u64 = 0x5000;

fn mmu(config: Config) -> Arc<Mmu> {
    Mmu::with_host(config, Arc::new(Idle), Box::new(Nowhere)).unwrap()
}

fn small() -> Config {
    Config {
        max_level: Level::PTE,
        prefetch: 0,
        ..Config::default()
    }
}

/// How many times a schedule switches threads at the worst moment, for the scheduler that goes by
/// priorities.
const DEPTH: usize = 4;

/// Mutants are a process-wide switch.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Runs a model as it is, and with each mutant, which must fail.
fn check(model: fn(), mutants: &[Mutant]) {
    let _alone = ONE_AT_A_TIME
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner());
    let runs = std::env::var("EPTIDE_MODEL_RUNS")
        .ok()
        .and_then(|n| n.parse().ok());
    let runs = runs.unwrap_or(1500);
    set_mutant(None);
    shuttle::check_random(model, runs);
    shuttle::check_pct(model, runs, DEPTH);
    for &mutant in mutants {
        set_mutant(Some(mutant));
        let is_noticed = catch_unwind(|| shuttle::check_pct(model, 10 * runs, DEPTH)).is_err()
            || catch_unwind(|| shuttle::check_random(model, 10 * runs)).is_err();
        set_mutant(None);
        assert!(is_noticed, "{mutant:?} was not noticed");
    }
}

fn take(mmu: &Mmu) -> bool {
    let mut words = [0];
    mmu.dirty_log(NORMAL, 0, &mut words).unwrap();
    words[0] >> (PAGE >> 12) & 1 == 1
}

/// Two vCPUs fault on one page, one to read and one to write. What the writer was granted must be
/// what the tables say, or taking the log takes nothing from its processor.
#[test]
fn two_vcpus_fault_on_one_page() {
    fn model() {
        let mmu = mmu(small());
        mmu.set_memory_region(&log_dirty(region(0, 0, 0x10000, HVA)))
            .unwrap();
        let mut writer = Cpu::new(&mmu, 0);
        let mut reader = Cpu::new(&mmu, 1);
        let other = thread::spawn(move || reader.read(PAGE));
        let at = Outcome::Memory(HVA.get() + PAGE);
        assert_eq!(writer.write(PAGE), at);
        assert_eq!(other.join().unwrap(), at);
        assert!(take(&mmu));
        assert_eq!(writer.write(PAGE), at);
        assert!(take(&mmu), "a write after the log was taken is in the next");
        drop(writer);
        mmu.zap_all();
        assert_eq!(mmu.table_pages(), 0);
    }
    check(model, &[Mutant::BlindMap]);
}

/// A vCPU accesses memory that the VMM takes away: from the beginning of the invalidation to its
/// end no access may get through.
#[test]
fn a_fault_races_with_an_invalidation() {
    fn model(is_mapped: bool) {
        let mmu = mmu(small());
        mmu.set_memory_region(&region(0, 0, 0x10000, HVA)).unwrap();
        let is_gone = Arc::new(AtomicBool::new(false));
        let mut cpu = Cpu::new(&mmu, 0);
        if is_mapped {
            cpu.read(PAGE);
        }
        let guest = {
            let is_gone = Arc::clone(&is_gone);
            thread::spawn(move || {
                for _ in 0..2 {
                    cpu.access_with(PAGE, EptAccess::WRITE, |_| {
                        (0..10).for_each(|_| point());
                        assert!(!is_gone.load(SeqCst), "accessed memory that is gone");
                    });
                }
            })
        };
        let hva = HVA.wrapping_add(PAGE);
        let change = mmu.invalidate(hva..hva.wrapping_add(0x1000));
        is_gone.store(true, SeqCst);
        (0..60).for_each(|_| point());
        is_gone.store(false, SeqCst);
        drop(change);
        guest.join().unwrap();
    }
    check(|| model(false), &[Mutant::NoSequenceCheck]);
    check(|| model(true), &[Mutant::NoFlushWait]);
}

/// A vCPU forms a huge page over a table while another links a table into that table's children:
/// the link must fail or be freed with the rest.
#[test]
fn a_fault_races_with_a_replaced_table() {
    fn model() {
        let mmu = mmu(Config {
            max_level: Level::PDPTE,
            prefetch: 0,
            ..Config::default()
        });
        mmu.set_memory_region(&region(0, 0, 1 << 30, HVA)).unwrap();
        let mut first = Cpu::new(&mmu, 0);
        let mut second = Cpu::new(&mmu, 1);
        // Tracked pages keep their blocks small and the gigabyte away.
        let tracked = [Gfn::new(0x5), Gfn::new(0x205)];
        tracked
            .iter()
            .for_each(|&gfn| mmu.track_writes(NORMAL, gfn).unwrap());
        first.read(PAGE);
        let other = thread::spawn(move || {
            second.read(0x20_0000 + PAGE);
        });
        tracked
            .iter()
            .for_each(|&gfn| mmu.untrack_writes(NORMAL, gfn).unwrap());
        first.write(PAGE);
        other.join().unwrap();
        drop(first);
        mmu.zap_all();
        assert_eq!(
            mmu.table_pages(),
            0,
            "a table was linked into a dying one and lost"
        );
    }
    check(model, &[Mutant::NoFreeze]);
}

/// A vCPU writes while the log is read: a write that the reader of the log can see is in the bits it
/// took, or in the log by then.
#[test]
fn a_write_races_with_reading_the_log() {
    fn model(is_zapped: bool) {
        let mmu = mmu(small());
        mmu.set_memory_region(&log_dirty(region(0, 0, 0x10000, HVA)))
            .unwrap();
        let memory = Arc::new(AtomicU64::new(0));
        let mut cpu = Cpu::new(&mmu, 0);
        cpu.write(PAGE);
        take(&mmu);
        let guest = {
            let memory = Arc::clone(&memory);
            thread::spawn(move || {
                for value in 1..=3 {
                    cpu.access_with(PAGE, EptAccess::WRITE, |_| {
                        point();
                        memory.store(value, SeqCst);
                    });
                }
            })
        };
        let zapper = is_zapped.then(|| {
            let mmu = Arc::clone(&mmu);
            thread::spawn(move || mmu.zap_all())
        });
        let mut seen = 0;
        for _ in 0..2 {
            let before = memory.load(SeqCst);
            let is_dirty = take(&mmu);
            assert!(
                before <= seen || is_dirty,
                "write {before} is not in the log taken after it"
            );
            seen = memory.load(SeqCst);
            let mut words = [0];
            mmu.dirty_log_keep(NORMAL, 0, &mut words).unwrap();
            let is_logged = is_dirty || words[0] != 0;
            assert!(
                seen == before || is_logged,
                "write {seen} is visible and not logged"
            );
        }
        guest.join().unwrap();
        if let Some(zapper) = zapper {
            zapper.join().unwrap();
        }
        assert!(
            memory.load(SeqCst) == seen || take(&mmu),
            "the last write is not in the last log"
        );
    }
    check(
        || model(false),
        &[Mutant::NoFastPathMark, Mutant::NoFlushWait],
    );
    check(|| model(true), &[Mutant::ZapAllUnlocked]);
}

/// A vCPU stores to a device while a slot is put in its place and tables are reclaimed: each store
/// reaches the device once or the memory once, and none the device once the slot is there.
#[test]
fn mmio_races_with_a_new_slot_and_reclaim() {
    fn model() {
        let mmu = mmu(small());
        let is_memory = Arc::new(AtomicBool::new(false));
        let mut cpu = Cpu::new(&mmu, 0);
        let guest = {
            let is_memory = Arc::clone(&is_memory);
            thread::spawn(move || {
                let (mut device, mut memory) = (0, 0);
                for _ in 0..3 {
                    let was_memory = is_memory.load(SeqCst);
                    match cpu.write(PAGE) {
                        Outcome::Memory(_) => memory += 1,
                        Outcome::Exit(FaultResult::Mmio(_)) => {
                            assert!(!was_memory, "a store to memory reached the device");
                            device += 1;
                        }
                        other => panic!("{other:?}"),
                    }
                }
                assert_eq!(device + memory, 3);
            })
        };
        let zapper = {
            let mmu = Arc::clone(&mmu);
            thread::spawn(move || mmu.zap_gfns(Gfn::new(0)..Gfn::new(0x200)))
        };
        mmu.set_memory_region(&region(0, 0, 0x10000, HVA)).unwrap();
        is_memory.store(true, SeqCst);
        guest.join().unwrap();
        zapper.join().unwrap();
    }
    check(model, &[Mutant::NoGenerationCheck]);
}

/// Tables are freed while a vCPU walks them: its processor in guest mode, its fast path and its MMIO
/// lookups without a lock.
#[test]
fn tables_are_freed_under_lockless_walks() {
    fn model() {
        let mmu = mmu(small());
        mmu.set_memory_region(&log_dirty(region(0, 0, 0x10000, HVA)))
            .unwrap();
        let mut cpu = Cpu::new(&mmu, 0);
        cpu.write(PAGE);
        cpu.write(0x10_0000);
        take(&mmu);
        let guest = thread::spawn(move || {
            for _ in 0..2 {
                assert_eq!(cpu.write(PAGE), Outcome::Memory(HVA.get() + PAGE));
                assert!(matches!(
                    cpu.write(0x10_0000),
                    Outcome::Exit(FaultResult::Mmio(_))
                ));
            }
        });
        mmu.zap_gfns(Gfn::new(0)..Gfn::new(1 << 18));
        mmu.zap_all();
        guest.join().unwrap();
    }
    check(model, &[Mutant::FreeWithoutFlush]);
}

/// A slot is deleted under a vCPU: when the deletion returns, no access reaches its memory.
#[test]
fn deleting_a_slot_waits_for_its_last_access() {
    fn model(is_mapped: bool) {
        let mmu = mmu(small());
        mmu.set_memory_region(&region(0, 0, 0x10000, HVA)).unwrap();
        let is_gone = Arc::new(AtomicBool::new(false));
        let mut cpu = Cpu::new(&mmu, 0);
        if is_mapped {
            cpu.read(PAGE);
        }
        let guest = {
            let is_gone = Arc::clone(&is_gone);
            thread::spawn(move || {
                for _ in 0..2 {
                    cpu.access_with(PAGE, EptAccess::WRITE, |_| {
                        (0..10).for_each(|_| point());
                        assert!(!is_gone.load(SeqCst), "accessed a slot that is gone");
                    });
                }
            })
        };
        machine::delete(&mmu, 0).unwrap();
        is_gone.store(true, SeqCst);
        guest.join().unwrap();
    }
    check(|| model(false), &[]);
    check(|| model(true), &[Mutant::NoFlushWait]);
}

/// A page is tracked while one vCPU faults on it and another holds a writable translation: when
/// tracking has begun, no write goes by.
#[test]
fn tracking_begins_under_a_fault() {
    fn model() {
        let mmu = mmu(small());
        mmu.set_memory_region(&region(0, 0, 0x10000, HVA)).unwrap();
        let mut writer = Cpu::new(&mmu, 0);
        let mut fetcher = Cpu::new(&mmu, 1);
        // A leaf without the right to fetch, which the fetcher's fault replaces.
        let page = Gfn::new(PAGE >> 12)..Gfn::new((PAGE >> 12) + 1);
        writer.write(PAGE);
        mmu.set_execution_traps(NORMAL, page.clone(), true).unwrap();
        mmu.set_execution_traps(NORMAL, page.clone(), false)
            .unwrap();
        writer.write(PAGE);
        let other = thread::spawn(move || fetcher.fetch(PAGE));
        mmu.track_writes(NORMAL, page.start).unwrap();
        assert_eq!(
            writer.write(PAGE),
            Outcome::Exit(FaultResult::WriteProtected)
        );
        assert_eq!(other.join().unwrap(), Outcome::Memory(HVA.get() + PAGE));
    }
    check(model, &[Mutant::RestrictWithoutFlush]);
}

// --- shadow paging ---

/// Guest memory and processors without EPT. The guest is in 32-bit paging: a directory, one table,
/// pages; a second directory leads to the same table, without write permission.
mod shadow {
    use super::*;
    use arch::addr::{Gpa, Gva};
    use arch::control_registers::{Cr0, Cr4, Efer};
    use arch::page_fault::ErrorCode;
    use arch::paging::{Access, GuestControls, GuestError, GuestPaging, GuestRoot, Privilege};
    use eptide_mmu::{Entry, GuestMode, ShadowResult, Vcpu};
    use machine::{HostTables, Ram};

    const DIRECTORY: u64 = 0x1000;
    const OTHER_DIRECTORY: u64 = 0x2000;
    pub(super) const TABLE: u64 = 0x3000;
    pub(super) const OLD: u64 = 0x5000;
    pub(super) const NEW: u64 = 0x6000;
    /// Present, writable, user, accessed, dirty.
    const ALL: u64 = 0x67;
    /// Maps page 0 of the table; page 1 of the table is the table itself.
    pub(super) const PAGE_GVA: u64 = 0;
    /// Where a directory entry maps all of memory by a large page, or leads to the table.
    const LARGE_GVA: u64 = 0x40_0000;
    pub(super) const LARGE: u64 = ALL | 1 << 7;
    pub(super) const SMALL: u64 = TABLE | ALL;
    const TABLE_GVA: u64 = 0x1000;

    pub(super) struct Machine {
        ram: Ram,
        pub(super) mmu: Arc<Mmu>,
    }

    pub(super) fn machine() -> Arc<Machine> {
        let ram = Ram::new(0x10000);
        let mmu = mmu(Config {
            shadow: true,
            ..small()
        });
        mmu.set_memory_region(&region(0, 0, 0x10000, ram.hva()))
            .unwrap();
        let entries = TABLE | ALL | LARGE << 32;
        ram.word(DIRECTORY).store(entries, Plain::SeqCst);
        // Entry 5, for the address that the large page has OLD at.
        ram.word(TABLE + 16).store((NEW | ALL) << 32, Plain::SeqCst);
        let read_only = TABLE | ALL & !2;
        ram.word(OTHER_DIRECTORY).store(read_only, Plain::SeqCst);
        let entries = OLD | ALL | (TABLE | ALL) << 32;
        ram.word(TABLE).store(entries, Plain::SeqCst);
        Arc::new(Machine { ram, mmu })
    }

    use std::sync::atomic::Ordering as Plain;

    pub(super) struct Cpu {
        machine: Arc<Machine>,
        vcpu: Vcpu,
        guest: GuestMode,
    }

    impl Cpu {
        pub(super) fn new(machine: &Arc<Machine>, id: u32, is_other: bool) -> Self {
            let cr3 = if is_other { OTHER_DIRECTORY } else { DIRECTORY };
            let guest = GuestMode {
                controls: GuestControls {
                    cr0: Cr0::PE | Cr0::PG | Cr0::WP,
                    cr4: Cr4::PSE,
                    efer: Efer::empty(),
                    physical_bits: 46,
                    has_1g_pages: false,
                    has_pse36: false,
                },
                root: GuestRoot {
                    cr3,
                    pdptes: [0; 4],
                },
                privilege: Privilege::default(),
                is_user: false,
            };
            let vcpu = machine.mmu.create_vcpu(id);
            let machine = Arc::clone(machine);
            Self {
                machine,
                vcpu,
                guest,
            }
        }

        /// The guest address that an access reaches.
        pub(super) fn access(&mut self, gva: u64, access: Access, then: impl Fn(u64)) -> u64 {
            let mmu = Arc::clone(&self.machine.mmu);
            let base = self.machine.ram.hva().get();
            let hardware = GuestPaging::new(&GuestControls {
                cr4: Cr4::PAE,
                efer: Efer::LMA | Efer::NXE,
                physical_bits: 51,
                ..self.guest.controls
            });
            loop {
                let pointer = mmu.load_shadow(&mut self.vcpu, &self.guest).unwrap();
                if self.vcpu.gate().enter() != Entry::Ready {
                    continue;
                }
                let root = GuestRoot {
                    cr3: pointer.root.get(),
                    pdptes: [0; 4],
                };
                let privilege = Privilege::default();
                let at = Gva::new(gva);
                let found = hardware.translate(&mut HostTables, &root, at, access, &privilege);
                if let Ok(found) = &found {
                    point();
                    then(found.gpa.get());
                }
                self.vcpu.gate().exit();
                let code: ErrorCode = match found {
                    Ok(found) => return found.gpa.get() - base,
                    Err(GuestError::PageFault(fault)) => fault.error_code,
                    Err(GuestError::Memory { error, .. }) => match error {},
                };
                match mmu.handle_shadow_fault(&mut self.vcpu, &self.guest, at, code) {
                    ShadowResult::Verdict(FaultResult::WriteProtected, gpa) => return gpa.get(),
                    ShadowResult::Verdict(
                        FaultResult::Fixed | FaultResult::Spurious | FaultResult::Retry,
                        _,
                    ) => thread::yield_now(),
                    other => panic!("{other:?}"),
                }
            }
        }

        pub(super) fn read(&mut self) -> u64 {
            self.access(PAGE_GVA, Access::empty(), |_| {})
        }

        /// Points the table's first entry at `NEW`, by its own mapping of itself.
        pub(super) fn remap(&mut self) {
            self.access(TABLE_GVA, Access::WRITE, |hva| {
                // SAFETY: the table's address, in guest mode.
                let entry = unsafe {
                    &*std::ptr::with_exposed_provenance::<std::sync::atomic::AtomicU32>(
                        hva as usize,
                    )
                };
                entry.store((NEW | ALL) as u32, Plain::SeqCst);
            });
        }

        /// Reads where a large page is, or a table.
        pub(super) fn read_large(&mut self) -> u64 {
            self.access(LARGE_GVA | OLD, Access::empty(), |_| {})
        }

        /// Whether the directory entry of the large page leads to the table.
        pub(super) fn sees_small(&self) -> bool {
            self.machine.ram.word(DIRECTORY).load(Plain::SeqCst) >> 32 == SMALL
        }

        /// INVLPG.
        pub(super) fn invalidate_large(&mut self) {
            let at = Gva::new(LARGE_GVA | OLD);
            self.machine.mmu.invalidate_linear(&mut self.vcpu, at);
        }

        /// KVM writes the directory entry of the large page.
        pub(super) fn write_large(&self, entry: u64) {
            let bytes = (entry as u32).to_le_bytes();
            let mmu = &self.machine.mmu;
            let at = Gpa::new(DIRECTORY + 4);
            mmu.write_guest(NORMAL, at, &bytes).unwrap();
        }

        /// CR3 is loaded.
        pub(super) fn flush(&self) {
            self.machine.mmu.sync_shadow();
        }

        /// KVM writes the entry for an instruction that it emulates.
        pub(super) fn remap_emulated(&self) {
            let entry = ((NEW | ALL) as u32).to_le_bytes();
            let mmu = &self.machine.mmu;
            mmu.write_guest(NORMAL, Gpa::new(TABLE), &entry).unwrap();
        }
    }
}

/// One vCPU edits an unsync table while another brings it up to date. After another flush the new
/// entry is seen: a write that the first flush did not see has made the table unsync again.
#[test]
fn a_sync_races_with_a_guest_write() {
    fn model() {
        let machine = shadow::machine();
        let mut writer = shadow::Cpu::new(&machine, 0, false);
        let mut reader = shadow::Cpu::new(&machine, 1, false);
        assert_eq!(reader.read(), shadow::OLD);
        let other = thread::spawn(move || writer.remap());
        for _ in 0..8 {
            reader.flush();
            thread::yield_now();
        }
        other.join().unwrap();
        reader.flush();
        assert_eq!(reader.read(), shadow::NEW);
    }
    check(model, &[Mutant::NoFlushWait]);
}

/// One vCPU makes a table unsync while another makes a second shadow page of it.
#[test]
fn an_unsync_races_with_a_fault() {
    fn model() {
        let machine = shadow::machine();
        let mut writer = shadow::Cpu::new(&machine, 0, false);
        let mut reader = shadow::Cpu::new(&machine, 1, true);
        let other = thread::spawn(move || writer.remap());
        reader.read();
        other.join().unwrap();
        reader.flush();
        assert_eq!(reader.read(), shadow::NEW);
    }
    check(model, &[Mutant::NoTableProtection]);
}

/// The guest replaces a large page by a table while another vCPU faults on the page, of which shadow
/// parts exist.
#[test]
fn a_large_page_goes_under_a_fault() {
    fn model() {
        let machine = shadow::machine();
        let writer = shadow::Cpu::new(&machine, 0, false);
        let mut reader = shadow::Cpu::new(&machine, 1, false);
        assert_eq!(reader.read_large(), shadow::OLD);
        // The same entry again: what led to the parts is gone.
        writer.write_large(shadow::LARGE);
        let other = thread::spawn(move || writer.write_large(shadow::SMALL));
        reader.read_large();
        other.join().unwrap();
        reader.flush();
        assert_eq!(reader.read_large(), shadow::NEW);
    }
    check(model, &[Mutant::NoLookAtLargePage]);
}

/// Who has seen an entry that KVM wrote, and invalidates the address, finds no old translation.
#[test]
fn an_emulated_write_is_seen_elsewhere() {
    fn model() {
        let machine = shadow::machine();
        let writer = shadow::Cpu::new(&machine, 0, false);
        let mut reader = shadow::Cpu::new(&machine, 1, false);
        assert_eq!(reader.read_large(), shadow::OLD);
        let other = thread::spawn(move || writer.write_large(shadow::SMALL));
        for _ in 0..8 {
            if reader.sees_small() {
                reader.invalidate_large();
                assert_eq!(reader.read_large(), shadow::NEW);
                break;
            }
            thread::yield_now();
        }
        other.join().unwrap();
    }
    check(model, &[Mutant::WriteFirst]);
}

/// The guest changes an entry, and everything is zapped, while another vCPU fills from it.
#[test]
fn a_zap_races_with_a_fill() {
    fn model() {
        let machine = shadow::machine();
        let writer = shadow::Cpu::new(&machine, 0, false);
        let mut reader = shadow::Cpu::new(&machine, 1, false);
        let at = Arc::clone(&machine);
        let other = thread::spawn(move || {
            at.mmu.zap_all();
            writer.remap_emulated();
        });
        reader.read();
        other.join().unwrap();
        reader.flush();
        assert_eq!(reader.read(), shadow::NEW);
        drop(reader);
        machine.mmu.zap_all();
        assert_eq!(machine.mmu.table_pages(), 0);
    }
    check(model, &[Mutant::NoSecondRead]);
}
