//! The MMU's speed as ratios to a null system call measured in the same run.
//!
//! `cargo bench -p eptide-mmu` runs criterion's benchmarks and then prints the table of ratios with
//! the limit that each is to stay under.

use arch::addr::{Gpa, Gva, Hva};
use arch::control_registers::{Cr0, Cr4, Efer};
use arch::page_fault::ErrorCode;
use arch::paging::{
    Access, Entry as TableEntry, Exchange, GuestControls, GuestPaging, GuestRoot, Level, Privilege,
    TableMemory,
};
use criterion::{Criterion, Throughput};
use eptide_mmu::{
    AddressSpace, Config, FaultResult, HostAccess, HostMemory, MemoryRegion, Mmu, Processors, Vcpu,
};
use std::hint::black_box;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

struct Nobody;
impl Processors for Nobody {
    fn kick(&self, _: u32) {}
}

/// Memory that is always there and that nothing touches: the handler alone is measured.
impl HostMemory for Nobody {
    fn populate(&self, _: Range<Hva>, _: HostAccess) -> bool {
        true
    }
}

const GIB: u64 = 1 << 30;
const BASE: Hva = Hva::new(0x1000_0000_0000);

fn mmu(config: Config) -> Arc<Mmu> {
    Mmu::with_host(config, Arc::new(Nobody), Box::new(Nobody)).unwrap()
}

fn region(number: u16, base: u64, size: u64, flags: u32) -> MemoryRegion {
    let space = AddressSpace::Normal;
    let hva = BASE.wrapping_add(base);
    MemoryRegion {
        space,
        number,
        flags,
        base: Gpa::new(base),
        size,
        hva,
    }
}

fn small_pages(prefetch: u8) -> Config {
    Config {
        max_level: Level::PTE,
        prefetch,
        ..Config::default()
    }
}

fn vcpu(mmu: &Mmu, id: u32) -> Vcpu {
    let mut vcpu = mmu.create_vcpu(id);
    mmu.load(&mut vcpu).unwrap();
    vcpu
}

/// Guest tables in this process's memory.
struct GuestTables(Vec<AtomicU64>);

impl TableMemory for &GuestTables {
    type Error = std::convert::Infallible;
    type Handle = usize;

    #[inline]
    fn read<E: TableEntry>(
        &mut self,
        address: u64,
        _: Level,
    ) -> Result<(E, usize), std::convert::Infallible> {
        let index = address as usize / 8;
        Ok((E::from_u64(self.0[index].load(Ordering::Acquire)), index))
    }

    fn compare_exchange<E: TableEntry>(
        &mut self,
        index: usize,
        _: u64,
        old: E,
        new: E,
    ) -> Result<Exchange, std::convert::Infallible> {
        let entry = &self.0[index];
        let result = entry.compare_exchange(
            old.to_u64(),
            new.to_u64(),
            Ordering::AcqRel,
            Ordering::Acquire,
        );
        Ok(if result.is_ok() {
            Exchange::Written
        } else {
            Exchange::Changed
        })
    }
}

/// 512 pages behind four levels of tables.
fn guest_tables() -> GuestTables {
    let tables: Vec<_> = (0..5 * 512).map(|_| AtomicU64::new(0)).collect();
    for level in 1..4 {
        tables[level * 512].store(((level as u64 + 1) << 12) | 0x27, Ordering::Relaxed);
    }
    for page in 0..512 {
        tables[4 * 512 + page].store(((page as u64 + 16) << 12) | 0x67, Ordering::Relaxed);
    }
    GuestTables(tables)
}

fn null_call() {
    // SAFETY: a system call without arguments or effects.
    unsafe { libc::syscall(libc::SYS_getppid) };
}

/// Nanoseconds for one of `count` calls, the best of several rounds.
fn time(count: u64, mut round: impl FnMut(u64)) -> f64 {
    let best = (0..7).map(|_| {
        let start = Instant::now();
        round(count);
        start.elapsed()
    });
    best.min().unwrap_or_default().as_nanos() as f64 / count as f64
}

fn walk_time() -> f64 {
    let tables = guest_tables();
    let paging = GuestPaging::new(&GuestControls {
        cr0: Cr0::PG | Cr0::PE | Cr0::WP,
        cr4: Cr4::PAE | Cr4::SMEP | Cr4::SMAP,
        efer: Efer::LMA | Efer::NXE,
        physical_bits: 46,
        has_1g_pages: true,
        has_pse36: true,
    });
    let root = GuestRoot {
        cr3: 0x1000,
        pdptes: [0; 4],
    };
    let privilege = Privilege::default();
    time(1_000_000, |count| {
        for n in 0..count {
            let gva = Gva::new((n % 512) << 12);
            let found = paging.translate(
                &mut &tables,
                &root,
                gva,
                black_box(Access::USER),
                &privilege,
            );
            black_box(found).unwrap();
        }
    })
}

/// Faults on 4 KiB pages whose tables are present: each page is mapped for the first time.
fn violation_time(prefetch: u8) -> f64 {
    let pages = 512 * 64;
    let mmu = mmu(small_pages(prefetch));
    mmu.set_memory_region(&region(0, 0, GIB, 0)).unwrap();
    let mut vcpu = vcpu(&mmu, 0);
    let step = u64::from(prefetch) + 1;
    let mut fault_all = |pages: u64| {
        for page in (0..pages).step_by(step as usize) {
            let gpa = Gpa::new(page << 12);
            let result = mmu.handle_page_fault(&mut vcpu, gpa, ErrorCode::WRITE);
            assert_eq!(result, FaultResult::Fixed);
        }
    };
    fault_all(pages);
    let best = (0..7).map(|_| {
        // Empty every table, and leave it in its place: all but one page of each.
        for table in 0..pages / 512 {
            let first = arch::addr::Gfn::new(table * 512);
            mmu.zap_gfns(first..first.wrapping_add(511));
            mmu.zap_gfns(first.wrapping_add(511)..first.wrapping_add(512));
        }
        let start = Instant::now();
        fault_all(pages);
        start.elapsed()
    });
    best.min().unwrap_or_default().as_nanos() as f64 / (pages / step) as f64
}

/// MMIO faults with `slots` memslots: by the cache, or by the entry (two pages in turn).
fn mmio_time(slots: u16, is_cached: bool) -> f64 {
    let mmu = mmu(small_pages(0));
    for n in 0..slots {
        mmu.set_memory_region(&region(n, u64::from(n) << 21, 1 << 20, 0))
            .unwrap();
    }
    let mut vcpu = vcpu(&mmu, 0);
    let pages = [
        0xfee0_0000,
        if is_cached { 0xfee0_0000 } else { 0xfec0_0000 },
    ];
    for gpa in pages {
        let result = mmu.handle_page_fault(&mut vcpu, Gpa::new(gpa), ErrorCode::WRITE);
        assert!(matches!(result, FaultResult::Mmio(_)));
    }
    time(1_000_000, |count| {
        for n in 0..count {
            let gpa = Gpa::new(pages[n as usize % 2]);
            let _ = black_box(mmu.handle_page_fault(&mut vcpu, gpa, ErrorCode::RSVD));
        }
    })
}

/// The processor time of the calling thread.
fn processor_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the structure is valid for the call to fill.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// How long `threads` take for 1 GiB of 4 KiB faults, each its own part: by the clock, and the
/// processor time of the slowest thread, which other load on the machine does not lengthen.
fn parallel_times(threads: u64) -> [Duration; 2] {
    let mut best = [Duration::MAX; 2];
    for _ in 0..5 {
        let mmu = mmu(small_pages(0));
        mmu.set_memory_region(&region(0, 0, GIB, 0)).unwrap();
        let barrier = Barrier::new(threads as usize);
        let times: Vec<_> = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..threads)
                .map(|id| {
                    let (mmu, barrier) = (&mmu, &barrier);
                    scope.spawn(move || fault_share(mmu, barrier, id, threads))
                })
                .collect();
            workers
                .into_iter()
                .map(|worker| worker.join().unwrap())
                .collect()
        });
        for way in 0..2 {
            let slowest = times.iter().map(|times: &[Duration; 2]| times[way]).max();
            best[way] = best[way].min(slowest.unwrap_or_default());
        }
    }
    best
}

fn fault_share(mmu: &Mmu, barrier: &Barrier, id: u64, threads: u64) -> [Duration; 2] {
    let mut vcpu = vcpu(mmu, id as u32);
    let share = (GIB >> 12) / threads;
    barrier.wait();
    let (start, used) = (Instant::now(), processor_time());
    for page in id * share..(id + 1) * share {
        let result = mmu.handle_page_fault(&mut vcpu, Gpa::new(page << 12), ErrorCode::WRITE);
        assert_eq!(result, FaultResult::Fixed);
    }
    [start.elapsed(), processor_time() - used]
}

/// Time to take the log of a slot of `gib` GiB, all mapped, with `dirty` pages in it.
fn dirty_log_time(gib: u64, dirty: u64) -> f64 {
    let mmu = mmu(small_pages(7));
    mmu.set_memory_region(&region(0, 0, gib * GIB, 1)).unwrap();
    let mut vcpu = vcpu(&mmu, 0);
    let pages = (gib * GIB) >> 12;
    let mut words = vec![0; pages as usize / 64];
    for page in (0..pages).step_by(8) {
        let _ = mmu.handle_page_fault(&mut vcpu, Gpa::new(page << 12), ErrorCode::USER);
    }
    let best = (0..7).map(|_| {
        for n in 0..dirty {
            let gpa = Gpa::new((n * (pages / dirty)) << 12);
            let code = ErrorCode::WRITE | ErrorCode::PRESENT;
            let _ = mmu.handle_page_fault(&mut vcpu, gpa, code);
        }
        let start = Instant::now();
        mmu.dirty_log(AddressSpace::Normal, 0, &mut words).unwrap();
        start.elapsed()
    });
    best.min().unwrap_or_default().as_nanos() as f64
}

struct Line {
    what: &'static str,
    value: f64,
    limit: f64,
    is_at_least: bool,
}

fn ratios() {
    let null = time(200_000, |count| (0..count).for_each(|_| null_call()));
    println!("\nnull system call: {null:.1} ns; ratios to it");
    let under = |what, nanoseconds: f64, limit| Line {
        what,
        value: nanoseconds / null,
        limit,
        is_at_least: false,
    };
    let few = mmio_time(8, false);
    let (one, two) = (parallel_times(1), parallel_times(2));
    let scaling = |what, way: usize| Line {
        what,
        value: one[way].as_secs_f64() / two[way].as_secs_f64(),
        limit: 1.7,
        is_at_least: true,
    };
    let lines = [
        under("4-level guest walk, warm", walk_time(), 0.3),
        under(
            "EPT violation, 4 KiB, tables present",
            violation_time(0),
            1.5,
        ),
        under("EPT violation with 7 neighbours", violation_time(7), 1.5),
        under("MMIO, cache hit, 8 slots", mmio_time(8, true), 0.1),
        under("MMIO, cache hit, 500 slots", mmio_time(500, true), 0.1),
        under("MMIO, lockless walk, 8 slots", few, 0.5),
        under("MMIO, lockless walk, 500 slots", mmio_time(500, false), 0.5),
        scaling("1 GiB of faults: rate of 2 threads to 1", 0),
        scaling("the same by processor time", 1),
        Line {
            what: "dirty log, 1000 pages: 4 GiB slot to 1 GiB",
            value: dirty_log_time(4, 1000) / dirty_log_time(1, 1000),
            limit: 1.5,
            is_at_least: false,
        },
        Line {
            what: "dirty log, 1 GiB: 10000 pages to 1000",
            value: dirty_log_time(1, 10_000) / dirty_log_time(1, 1000),
            limit: 5.0,
            is_at_least: true,
        },
    ];
    for Line {
        what,
        value,
        limit,
        is_at_least,
    } in lines
    {
        let (sign, is_met) = if is_at_least {
            (">=", value >= limit)
        } else {
            ("<", value < limit)
        };
        let verdict = if is_met { "" } else { "   MISSED" };
        println!("{what:<46} {value:>7.3}  ({sign} {limit}){verdict}");
    }
}

fn criterion_benches(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("mmu");
    group.throughput(Throughput::Elements(1));
    group.bench_function("null system call", |b| b.iter(null_call));
    let mmu = mmu(small_pages(0));
    mmu.set_memory_region(&region(0, 0, GIB, 0)).unwrap();
    let mut vcpu = vcpu(&mmu, 0);
    group.bench_function("spurious EPT violation", |b| {
        b.iter(|| mmu.handle_page_fault(&mut vcpu, Gpa::new(0x1000), ErrorCode::WRITE));
    });
    group.bench_function("MMIO by cache", |b| {
        b.iter(|| mmu.handle_page_fault(&mut vcpu, Gpa::new(0xfee0_0000), ErrorCode::RSVD));
    });
    group.finish();
}

fn main() {
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .configure_from_args();
    criterion_benches(&mut criterion);
    criterion.final_summary();
    ratios();
}
