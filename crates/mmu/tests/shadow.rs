//! Shadow paging against the architecture: a processor that walks the MMU's tables with the
//! registers that KVM gives it, and the naive walker on the guest's own tables.
//!
//! `EPTIDE_ALL=1` runs every combination instead of a part.
#![cfg(not(feature = "model"))]

extern crate arch as eptide_arch;

#[path = "../../arch/tests/combinations/mod.rs"]
mod combinations;
mod machine;
#[path = "../../arch/tests/naive/mod.rs"]
mod naive;

use arch::addr::{Gpa, Gva, PAGE_SIZE};
use arch::control_registers::{Cr0, Cr4, Efer};
use arch::page_fault::ErrorCode;
use arch::paging::{
    Access, GuestControls, GuestError, GuestPaging, GuestRoot, Privilege, entry as x86,
};
use combinations::{Format, PAGE, PKRU, ROOT, accesses};
use eptide_mmu::{
    AddressSpace, Config, Entry, FaultResult, GuestMode, MemoryRegion, Mmu, ShadowResult, Vcpu,
};
use machine::{HostTables, Ram, log_dirty, mmu, region};
use naive::Memory;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

const NORMAL: AddressSpace = AddressSpace::Normal;

/// How an access ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// It reached this guest address.
    Memory(u64),
    /// The guest's #PF.
    Fault(ErrorCode),
    /// A device's, at this address.
    Mmio(u64),
}

/// A processor without EPT. Without a TLB, too: what it sees is what the tables say.
struct Cpu {
    mmu: Arc<Mmu>,
    vcpu: Vcpu,
    ram: Arc<Ram>,
    controls: GuestControls,
    root: GuestRoot,
    privilege: Privilege,
    emulated: u64,
}

impl Cpu {
    fn new(mmu: &Arc<Mmu>, ram: &Arc<Ram>, id: u32, controls: GuestControls, root: u64) -> Self {
        Self {
            mmu: Arc::clone(mmu),
            vcpu: mmu.create_vcpu(id),
            ram: Arc::clone(ram),
            controls,
            root: GuestRoot {
                cr3: root,
                pdptes: [root | 1; 4],
            },
            privilege: Privilege::default(),
            emulated: 0,
        }
    }

    /// The mode that the processor is in: the guest's with WP set, and host-owned tables.
    fn hardware(&self, levels: u8) -> GuestPaging {
        let guest = &self.controls;
        let mut cr4 = guest.cr4 | Cr4::PAE;
        if !guest.cr0.contains(Cr0::PG) {
            cr4 -= Cr4::SMEP | Cr4::SMAP | Cr4::PKE;
        } else if !guest.efer.contains(Efer::LMA) {
            cr4 -= Cr4::PKE;
        }
        cr4.set(Cr4::LA57, levels == 5);
        GuestPaging::new(&GuestControls {
            cr0: guest.cr0 | Cr0::PG | Cr0::WP,
            cr4,
            efer: guest.efer | Efer::NXE | Efer::LMA,
            physical_bits: 51,
            has_1g_pages: true,
            has_pse36: true,
        })
    }

    fn mode(&self, access: Access) -> GuestMode {
        GuestMode {
            controls: self.controls,
            root: self.root,
            privilege: self.privilege,
            is_user: access.contains(Access::USER),
        }
    }

    fn access(&mut self, gva: u64, access: Access) -> Outcome {
        self.access_with(gva, access, |_| {})
    }

    fn access_with(&mut self, gva: u64, access: Access, then: impl Fn(u64)) -> Outcome {
        let guest = self.mode(access);
        for _ in 0..100 {
            let pointer = self.mmu.load_shadow(&mut self.vcpu, &guest).unwrap();
            if self.vcpu.gate().enter() != Entry::Ready {
                continue;
            }
            let root = GuestRoot {
                cr3: pointer.root.get(),
                pdptes: [0; 4],
            };
            let found = self.hardware(pointer.levels).translate(
                &mut HostTables,
                &root,
                Gva::new(gva),
                access,
                &self.privilege,
            );
            if let Ok(found) = &found {
                then(found.gpa.get());
            }
            self.vcpu.gate().exit();
            let code = match found {
                Ok(found) => {
                    // Other slots' memory may lie below: a distance modulo 2^64.
                    let distance = found.gpa.get().wrapping_sub(self.ram.hva().get());
                    return Outcome::Memory(distance);
                }
                Err(GuestError::PageFault(fault)) => fault.error_code,
                Err(GuestError::Memory { error, .. }) => match error {},
            };
            let result = self
                .mmu
                .handle_shadow_fault(&mut self.vcpu, &guest, Gva::new(gva), code);
            match result {
                ShadowResult::Guest(code) => return Outcome::Fault(code),
                ShadowResult::Verdict(FaultResult::WriteProtected, gpa) => {
                    self.emulated += 1;
                    return Outcome::Memory(gpa.get());
                }
                ShadowResult::Verdict(FaultResult::Mmio(mmio), _) => {
                    return Outcome::Mmio(mmio.gpa.get());
                }
                ShadowResult::Verdict(
                    FaultResult::Fixed | FaultResult::Spurious | FaultResult::Retry,
                    _,
                ) => {}
                other => panic!("{other:?}"),
            }
        }
        panic!("no progress at {gva:#x}, {access:?}");
    }

    /// A guest store of a word by linear address, emulated where the page is protected.
    fn store(&mut self, gva: u64, value: u64) -> Outcome {
        self.store_bytes(gva, &value.to_le_bytes())
    }

    /// Likewise, of four or eight bytes.
    fn store_bytes(&mut self, gva: u64, bytes: &[u8]) -> Outcome {
        let before = self.emulated;
        let outcome = self.access_with(gva, Access::WRITE, |hva| {
            let at = std::ptr::with_exposed_provenance_mut::<u8>(hva as usize);
            // SAFETY: an address that the tables gave, in guest mode.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), at, bytes.len()) };
        });
        if let (Outcome::Memory(gpa), true) = (outcome, self.emulated > before) {
            self.mmu.write_guest(NORMAL, Gpa::new(gpa), bytes).unwrap();
        }
        outcome
    }
}

fn shadow_config() -> Config {
    Config {
        shadow: true,
        ..Config::default()
    }
}

const RAM: u64 = 32 << 20;
const PHYSICAL_BITS: u32 = 46;
struct Tally {
    cases: u64,
    faults: u64,
    emulated: u64,
}

/// Every combination of the bits of one entry, of controls and of accesses. The accesses of one
/// combination follow each other on the same tables, so that each meets what those before left.
fn enumerate(format: Format, level: u32, stride: usize) -> Tally {
    let ram = Arc::new(Ram::new(RAM));
    let mmu = mmu(shadow_config());
    mmu.set_memory_region(&region(0, 0, RAM, ram.hva()))
        .unwrap();
    let write = |at: u64, value: u64| {
        let bytes = value.to_le_bytes();
        let bytes = &bytes[..format.size() as usize];
        mmu.write_guest(NORMAL, Gpa::new(at), bytes).unwrap();
    };
    let read = |at: u64| {
        let word = ram.word(at & !7).load(SeqCst);
        if format.size() == 4 {
            word >> (8 * (at & 4)) & 0xffff_ffff
        } else {
            word
        }
    };
    let mut cpu = Cpu::new(&mmu, &ram, 0, format.controls(0, PHYSICAL_BITS), ROOT);
    let mut tally = Tally {
        cases: 0,
        faults: 0,
        emulated: 0,
    };
    for what in format.combinations(stride) {
        let controls = format.controls(what.controls, PHYSICAL_BITS);
        let mut memory = Memory::new();
        for (at, value) in format.path(level, &what) {
            memory.insert(at, value);
            if read(at) != value {
                write(at, value);
            }
        }
        cpu.controls = controls;
        for (access, alignment_check) in accesses(&what) {
            cpu.privilege = Privilege {
                pkru: PKRU,
                pkrs: 0,
                alignment_check,
            };
            let expected = naive::translate(
                &mut memory,
                &controls,
                &cpu.root,
                format.gva(),
                access,
                &cpu.privilege,
            );
            let expected = match expected {
                Ok(translation) => Outcome::Memory(translation.gpa.get()),
                Err((code, _)) => Outcome::Fault(code),
            };
            let found = cpu.access(format.gva(), access);
            tally.cases += 1;
            tally.faults += u64::from(matches!(found, Outcome::Fault(_)));
            let case = || {
                format!(
                    "{format:?} level {level} entry {:#x} {controls:?} {access:?} {:?}",
                    format.entry(what.bits, what.key, level),
                    cpu.privilege
                )
            };
            assert_eq!(found, expected, "{}", case());
            for (&at, &value) in &memory {
                assert_eq!(read(at), value, "entry at {at:#x}: {}", case());
            }
        }
    }
    tally.emulated = cpu.emulated;
    tally
}

#[test]
fn every_combination_of_entry_controls_and_access_ends_as_the_manual_says() {
    let stride = if std::env::var_os("EPTIDE_ALL").is_some() {
        1
    } else {
        5
    };
    let mut cases = 0;
    for format in Format::ALL {
        for level in 1..=format.levels().min(3) {
            let tally = enumerate(format, level, stride);
            println!(
                "{format:?} level {level}: {} cases, {} faults, {} emulated",
                tally.cases, tally.faults, tally.emulated
            );
            assert!(tally.faults > tally.cases / 8 && tally.faults < tally.cases);
            cases += tally.cases;
        }
    }
    assert!(cases > 250_000, "{cases}");
}

// --- a guest that edits its own tables ---

/// A random number generator that is the same everywhere.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 33) % n
    }
}

const IDENTITY: u64 = 1 << 39;

const TABLES: u64 = 6;
const FIRST_TABLE: u64 = 0x10_0000;

fn table(n: u64) -> u64 {
    FIRST_TABLE + n * PAGE_SIZE
}

fn editor(id: u32, mmu: &Arc<Mmu>, ram: &Arc<Ram>) -> Cpu {
    let controls = Format::Four.controls(0b01_0001, PHYSICAL_BITS);
    let mut cpu = Cpu::new(mmu, ram, id, controls, ROOT);
    cpu.root.pdptes = [0; 4];
    cpu
}

/// A guest that edits some entries of its tables on two or three levels, which lead to each other and
/// to pages. It reaches the tables by large pages that map all of RAM elsewhere.
#[derive(Clone, Copy, Debug)]
struct Edited(Format);

impl Edited {
    fn controls(self) -> GuestControls {
        // WP, PSE; NXE where the format has it.
        let bits = match self.0 {
            Format::Legacy => 0b10_0001,
            _ => 0b01_0001,
        };
        self.0.controls(bits, PHYSICAL_BITS)
    }

    /// Where RAM is mapped.
    fn identity(self) -> u64 {
        match self.0 {
            Format::Legacy | Format::Pae => 0x2000_0000,
            _ => IDENTITY,
        }
    }

    /// The level of the uppermost table that is edited.
    fn top(self) -> u32 {
        match self.0 {
            Format::Legacy | Format::Pae => 2,
            _ => 3,
        }
    }

    /// Where a table is, and its level: one at the top, then directories, then last-level tables.
    fn table(self, n: u64) -> (u64, u32) {
        match (self.top(), n) {
            (2, 0) => (ROOT, 2),
            (3, 0) => (table(0), 3),
            (3, 1 | 2) => (table(n), 2),
            _ => (table(n), 1),
        }
    }

    /// A table at a level.
    fn some_table(self, level: u32, random: &mut Random) -> u64 {
        let all: Vec<_> = (0..TABLES)
            .map(|n| self.table(n))
            .filter(|&(_, at_level)| at_level == level)
            .collect();
        all[random.below(all.len() as u64) as usize].0
    }

    /// The entries that are edited; in both halves of a table of four-byte entries.
    fn index(self, level: u32, n: u64) -> u64 {
        match (self.0, level) {
            (Format::Legacy, 1) => [0, 1, 511, 512][n as usize],
            _ => n,
        }
    }

    fn entry(self, table: u64, level: u32, n: u64) -> u64 {
        table + self.index(level, n) * self.0.size()
    }

    /// The `n`-th of 64 pages, each more than once where there are fewer.
    fn linear(self, n: u64) -> u64 {
        let bits = self.0.index_bits();
        let shift = |level: u32| 12 + bits * (level - 1);
        (1..=self.top())
            .map(|level| self.index(level, n >> (2 * (level - 1)) & 3) << shift(level))
            .sum()
    }

    fn prepare(self, ram: &Ram) {
        let all = x86::PRESENT | x86::WRITABLE | x86::ACCESSED | x86::DIRTY;
        match self.0 {
            Format::Legacy => {
                for n in (0..RAM >> 22).step_by(2) {
                    let page = |n: u64| n << 22 | all | x86::PAGE_SIZE;
                    let at = ROOT + 4 * ((self.identity() >> 22) + n);
                    ram.word(at).store(page(n) | page(n + 1) << 32, SeqCst);
                }
            }
            Format::Pae => {
                for n in 0..RAM >> 21 {
                    let at = ROOT + 8 * ((self.identity() >> 21) + n);
                    ram.word(at).store(n << 21 | all | x86::PAGE_SIZE, SeqCst);
                }
            }
            _ => {
                identity(ram);
                ram.word(ROOT).store(table(0) | 0x67, SeqCst);
            }
        }
    }

    fn read(self, ram: &Ram, at: u64) -> u64 {
        let word = ram.word(at & !7).load(SeqCst);
        match self.0.size() {
            4 => word >> (8 * (at & 4)) & 0xffff_ffff,
            _ => word,
        }
    }
}

/// Tables of a 4-level guest: entry 1 of its PML4 maps all of RAM with 2 MiB pages.
fn identity(ram: &Ram) {
    let all = x86::PRESENT | x86::WRITABLE | x86::ACCESSED | x86::DIRTY;
    ram.word(ROOT + 8).store(0xa_0000 | all, SeqCst);
    ram.word(0xa_0000).store(0xb_0000 | all, SeqCst);
    for n in 0..RAM >> 21 {
        let page = n << 21 | all | x86::PAGE_SIZE;
        ram.word(0xb_0000 + 8 * n).store(page, SeqCst);
    }
}

/// Runs the guest; the number of shadow pages that went on the way.
fn edit(format: Format, seed: u64, steps: u32, vcpus: u32, config: Config) -> u64 {
    let edited = Edited(format);
    let ram = Arc::new(Ram::new(RAM));
    let mmu = mmu(config);
    mmu.set_memory_region(&region(0, 0, RAM, ram.hva()))
        .unwrap();
    edited.prepare(&ram);
    let new = |id| Cpu::new(&mmu, &ram, id, edited.controls(), ROOT);
    let mut cpus: Vec<_> = (0..vcpus).map(new).collect();
    let mut random = Random(seed);
    for step in 0..steps {
        let cpu = &mut cpus[random.below(vcpus.into()) as usize];
        match random.below(8) {
            0..4 => {
                let (at, level) = edited.table(random.below(TABLES));
                let target = match level {
                    1 if random.below(4) == 0 => edited.table(random.below(TABLES)).0,
                    1 => PAGE + random.below(64) * PAGE_SIZE,
                    _ => edited.some_table(level - 1, &mut random),
                };
                let flags = [7, 7, 0x67, 5, 3, 1, 0, 0x27][random.below(8) as usize];
                let at = edited.entry(at, level, random.below(4));
                let bytes = (target | flags).to_le_bytes();
                let bytes = &bytes[..format.size() as usize];
                let outcome = cpu.store_bytes(edited.identity() | at, bytes);
                assert_eq!(outcome, Outcome::Memory(at), "step {step}");
                // Proper invalidation on every processor.
                for cpu in &mut cpus {
                    if random.below(2) == 0 || level > 1 {
                        cpu.mmu.sync_shadow();
                    } else {
                        for n in 0..64 {
                            let gva = Gva::new(edited.linear(n));
                            cpu.mmu.invalidate_linear(&mut cpu.vcpu, gva);
                        }
                    }
                }
            }
            _ => {
                let gva = edited.linear(random.below(64));
                let access = [
                    Access::empty(),
                    Access::WRITE,
                    Access::USER,
                    Access::USER | Access::WRITE,
                ][random.below(4) as usize];
                // Each entry that the walk reads.
                let mut memory = Memory::new();
                for n in 0..TABLES {
                    let (at, level) = edited.table(n);
                    for n in 0..4 {
                        let at = edited.entry(at, level, n);
                        memory.insert(at, edited.read(&ram, at));
                    }
                }
                if format.levels() > 3 {
                    memory.insert(ROOT, edited.read(&ram, ROOT));
                }
                let expected = naive::translate(
                    &mut memory,
                    &cpu.controls,
                    &cpu.root,
                    gva,
                    access,
                    &cpu.privilege,
                );
                let expected = match expected {
                    Ok(translation) => Outcome::Memory(translation.gpa.get()),
                    Err((code, _)) => Outcome::Fault(code),
                };
                let found = cpu.access(gva, access);
                assert_eq!(found, expected, "step {step}: {gva:#x} {access:?}");
                for (&at, &value) in &memory {
                    let now = edited.read(&ram, at);
                    assert_eq!(now, value, "step {step}: entry at {at:#x}");
                }
            }
        }
    }
    let stats = mmu.stats();
    assert!(stats.unsynced > 0 && stats.synced > 0, "{stats:?}");
    let has_zapped = stats.shadow_zapped > 0 || edited.top() == 2;
    assert!(cpus.iter().any(|cpu| cpu.emulated > 0) && has_zapped);
    stats.shadow_zapped
}

#[test]
fn a_guest_that_edits_its_tables_sees_them() {
    for format in [Format::Legacy, Format::Pae, Format::Four] {
        let mut zapped = 0;
        for seed in 0..20 {
            zapped += edit(format, seed, 2000, 1, shadow_config());
            zapped += edit(format, seed, 2000, 3, shadow_config());
        }
        assert!(zapped > 20, "{format:?}: {zapped}");
    }
}

#[test]
fn a_guest_with_more_tables_than_the_limit_sees_them() {
    let config = Config {
        max_table_pages: 40,
        ..shadow_config()
    };
    for format in [Format::Legacy, Format::Pae, Format::Four] {
        for seed in 0..10 {
            edit(format, seed, 2000, 2, config);
        }
    }
}

// --- single points ---

fn flat(config: Config) -> (Arc<Ram>, Arc<Mmu>, Cpu) {
    let ram = Arc::new(Ram::new(RAM));
    let mmu = mmu(config);
    mmu.set_memory_region(&region(0, 0, RAM, ram.hva()))
        .unwrap();
    identity(&ram);
    let cpu = editor(0, &mmu, &ram);
    (ram, mmu, cpu)
}

#[test]
fn large_pages_stay_large_where_the_slot_allows() {
    let (_ram, mmu, mut cpu) = flat(shadow_config());
    let gva = IDENTITY | 0x100_5008;
    assert_eq!(cpu.access(gva, Access::WRITE), Outcome::Memory(0x100_5008));
    assert_eq!(mmu.stats().mapped_2m, 1);
    // A table in the block keeps it small.
    assert_eq!(
        cpu.access(IDENTITY | 0xa_0000, Access::empty()),
        Outcome::Memory(0xa_0000)
    );
    assert_eq!((mmu.stats().mapped_2m, mmu.stats().mapped_4k), (1, 1));
}

#[test]
fn a_block_is_mapped_small_while_it_holds_tables() {
    let (ram, mmu, mut cpu) = flat(shadow_config());
    const BLOCK: u64 = 0x20_0000;
    let tables = [BLOCK, BLOCK + 0x1000, BLOCK + 0x2000];
    ram.word(ROOT).store(tables[0] | 0x67, SeqCst);
    ram.word(tables[0]).store(tables[1] | 0x67, SeqCst);
    ram.word(tables[1]).store(tables[2] | 0x67, SeqCst);
    ram.word(tables[2]).store(PAGE | 0x67, SeqCst);
    let inside = |n: u64| IDENTITY | BLOCK | n << 12;
    let reach = |cpu: &mut Cpu, n| {
        let found = cpu.access(inside(n), Access::WRITE);
        assert_eq!(found, Outcome::Memory(BLOCK | n << 12));
        (cpu.mmu.stats().mapped_2m, cpu.mmu.stats().mapped_4k)
    };
    assert_eq!(reach(&mut cpu, 0x20), (1, 0));
    // Three tables come into use, and split the page.
    assert_eq!(cpu.access(8, Access::empty()), Outcome::Memory(PAGE + 8));
    assert_eq!(reach(&mut cpu, 0x20), (1, 2));
    for (n, table) in tables.into_iter().enumerate() {
        assert_eq!(reach(&mut cpu, 0x30 + 0x10 * n as u64).0, 1);
        mmu.unprotect_shadow(NORMAL, Gpa::new(table).gfn());
    }
    // The last is out of use.
    assert_eq!(reach(&mut cpu, 0x60).0, 2);
}

#[test]
fn a_table_that_is_led_to_again_is_up_to_date() {
    let (ram, mmu, mut cpu) = flat(shadow_config());
    ram.word(ROOT).store(table(0) | 0x67, SeqCst);
    ram.word(table(0)).store(table(1) | 0x67, SeqCst);
    ram.word(table(1)).store(table(3) | 0x67, SeqCst);
    ram.word(table(3)).store(PAGE | 0x67, SeqCst);
    ram.word(table(3) + 8).store(PAGE | 0x67, SeqCst);
    assert_eq!(cpu.access(8, Access::empty()), Outcome::Memory(PAGE + 8));
    // The last table becomes unsync; writes next to the upper entry take away what led to it.
    cpu.store(IDENTITY | table(3), (PAGE + PAGE_SIZE) | 0x67);
    for _ in 0..3 {
        cpu.store(IDENTITY | (table(0) + 0x100), 0);
    }
    assert_eq!(mmu.stats().write_floods, 1);
    cpu.mmu.invalidate_linear(&mut cpu.vcpu, Gva::new(8));
    // A neighbour leads to the table again.
    cpu.access(0x1008, Access::empty());
    let found = cpu.access(8, Access::empty());
    assert_eq!(found, Outcome::Memory(PAGE + PAGE_SIZE + 8));
}

#[test]
fn unpaged_memory_is_direct() {
    let (_ram, mmu, mut cpu) = flat(shadow_config());
    cpu.controls.cr0 -= Cr0::PG;
    cpu.controls.efer = Efer::empty();
    // Protection means nothing here.
    cpu.controls.cr4 = Cr4::SMEP | Cr4::SMAP;
    for access in [Access::WRITE, Access::FETCH, Access::USER] {
        assert_eq!(cpu.access(0x80_0123, access), Outcome::Memory(0x80_0123));
    }
    assert_eq!(
        cpu.access(0xfee0_0020, Access::WRITE),
        Outcome::Mmio(0xfee0_0020)
    );
    assert_eq!(mmu.stats().mmio_mapped, 1);
    assert_eq!(
        cpu.access(0xfee0_0030, Access::empty()),
        Outcome::Mmio(0xfee0_0030)
    );
    assert_eq!(mmu.stats().mmio_by_entry, 1);
}

#[test]
fn mmio_entries_age_with_the_slots() {
    let (ram, mmu, mut cpu) = flat(shadow_config());
    ram.word(ROOT).store(table(0) | 0x67, SeqCst);
    ram.word(table(0)).store(table(1) | 0x67, SeqCst);
    ram.word(table(1)).store(table(3) | 0x67, SeqCst);
    ram.word(table(3)).store(0x4000_0000 | 0x63, SeqCst);
    for _ in 0..2 {
        assert_eq!(cpu.access(8, Access::WRITE), Outcome::Mmio(0x4000_0008));
    }
    assert_eq!(mmu.stats().mmio_by_entry, 1);
    let user = cpu.access(8, Access::USER);
    assert_eq!(user, Outcome::Fault(ErrorCode::PRESENT | ErrorCode::USER));
    let more = Ram::new(2 << 20);
    mmu.set_memory_region(&region(1, 0x4000_0000, 2 << 20, more.hva()))
        .unwrap();
    let distance = (more.hva().get() + 8).wrapping_sub(ram.hva().get());
    assert_eq!(cpu.access(8, Access::WRITE), Outcome::Memory(distance));
}

#[test]
fn the_dirty_log_sees_writes_of_guest_and_walker() {
    let (ram, mmu, mut cpu) = flat(shadow_config());
    ram.word(ROOT).store(table(0) | 7, SeqCst);
    ram.word(table(0)).store(table(1) | 7, SeqCst);
    ram.word(table(1)).store(table(3) | 7, SeqCst);
    ram.word(table(3)).store(PAGE | 7, SeqCst);
    cpu.access(0, Access::WRITE);
    mmu.set_memory_region(&log_dirty(region(0, 0, RAM, ram.hva())))
        .unwrap();
    let take = || {
        let mut log = vec![0; (RAM / PAGE_SIZE / 64) as usize];
        mmu.dirty_log(NORMAL, 0, &mut log).unwrap();
        (0..RAM / PAGE_SIZE)
            .filter(|&n| log[n as usize / 64] >> (n % 64) & 1 != 0)
            .collect::<Vec<_>>()
    };
    assert_eq!(take(), []);
    cpu.access(0x10, Access::empty());
    assert_eq!(take(), []);
    cpu.access(0x10, Access::WRITE);
    assert_eq!(take(), [PAGE >> 12]);
    cpu.access(0x10, Access::WRITE);
    cpu.store(IDENTITY | (table(3) + 8), (PAGE + PAGE_SIZE) | 7);
    assert_eq!(take(), [table(3) >> 12, PAGE >> 12]);
    // The walk sets accessed and dirty bits in the new entry.
    cpu.access(0x1000, Access::WRITE);
    assert_eq!(take(), [table(3) >> 12, (PAGE >> 12) + 1]);
}

#[test]
fn invalidated_memory_is_out_of_reach_and_comes_back() {
    let (ram, mmu, mut cpu) = flat(shadow_config());
    let gva = IDENTITY | PAGE;
    cpu.access(gva, Access::WRITE);
    let page = ram.hva().wrapping_add(PAGE);
    let zapped = mmu.stats().leaf_zapped;
    drop(mmu.invalidate(page..page.wrapping_add(PAGE_SIZE)));
    assert_eq!(mmu.stats().leaf_zapped, zapped + 1);
    assert_eq!(cpu.access(gva, Access::WRITE), Outcome::Memory(PAGE));
    assert!(mmu.is_young(page..page.wrapping_add(PAGE_SIZE)));
    assert!(mmu.age(page..page.wrapping_add(PAGE_SIZE)));
    assert!(!mmu.is_young(page..page.wrapping_add(PAGE_SIZE)));
}

#[test]
fn deleting_the_slot_of_the_tables_leaves_nothing() {
    let (ram, mmu, mut cpu) = flat(shadow_config());
    cpu.access(IDENTITY | PAGE, Access::WRITE);
    mmu.set_memory_region(&MemoryRegion {
        size: 0,
        ..region(0, 0, 0, ram.hva())
    })
    .unwrap();
    let fault = cpu.access(IDENTITY | PAGE, Access::WRITE);
    assert_eq!(fault, Outcome::Fault(ErrorCode::WRITE));
    mmu.set_memory_region(&region(0, 0, RAM, ram.hva()))
        .unwrap();
    assert_eq!(
        cpu.access(IDENTITY | PAGE, Access::WRITE),
        Outcome::Memory(PAGE)
    );
    let written = cpu.store(IDENTITY | (ROOT + 0x100), 0);
    assert_eq!((written, cpu.emulated), (Outcome::Memory(ROOT + 0x100), 1));
}
