//! Interpreted against native: the same machine code in a guest and on the host, in one run.
//!
//! `cargo bench -p eptide-cpu` prints each loop's time on both sides and the ratio. The loops
//! are position-independent leaf functions; the guest enters them in 64-bit user mode and ends
//! with INT3. A last line compares a loop that misses the TLB with and without paging-structure
//! caches.
#![allow(
    unreachable_pub,
    reason = "modules shared with tests and other benches"
)]

#[path = "../tests/guest/mod.rs"]
mod guest;
mod loops;

use arch::exit::ExitReason;
use guest::{EPT_RWX, Guest, Memory};
use std::time::{Duration, Instant};

/// Linear address of the data, on both sides.
const DATA: u64 = 0x2000_0000;
const DATA_LEN: usize = 1 << 20;
const CODE: u64 = 0x10000;
const STACK: u64 = 0x80000;

/// The data that a loop works on, and its arguments for `count` rounds.
fn prepare(name: &str, count: u64) -> (Vec<u8>, [u64; 3]) {
    let mut seed = 1u64;
    let mut random = || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let mut data: Vec<u8> = (0..DATA_LEN / 8)
        .flat_map(|_| random().to_le_bytes())
        .collect();
    match name {
        "chase" => {
            // One cycle through 4096 cache lines.
            let mut order: Vec<u64> = (1..4096).collect();
            for i in (1..order.len()).rev() {
                order.swap(i, (random() % (i as u64 + 1)) as usize);
            }
            let mut at = 0u64;
            for next in order.into_iter().chain([0]) {
                let to = next * 64;
                data[at as usize..at as usize + 8].copy_from_slice(&to.to_le_bytes());
                at = to;
            }
            (data, [count, DATA, 0])
        }
        "quicksort" => (data, [DATA, DATA + 4 * (count - 1), 0]),
        _ => (data, [count, DATA, DATA + 0x1000]),
    }
}

fn measure(
    guest: &mut Guest,
    host: &Memory,
    inside: &Memory,
    name: &str,
    count: u64,
    run: loops::Native,
) -> (Duration, Duration) {
    let (data, arguments) = prepare(name, count);
    host.write(0, &data);
    inside.write(0, &data);
    let start = Instant::now();
    let native = run(arguments[0], arguments[1], arguments[2]);
    let native_time = start.elapsed();

    let state = &mut guest.vcpu.state;
    state.rip = CODE;
    state.regs[7] = arguments[0];
    state.regs[6] = arguments[1];
    state.regs[2] = arguments[2];
    state.regs[4] = STACK - 8;
    state.set_rflags(0x202);
    // The loop returns to INT3.
    guest.memory.write_u64(STACK - 8, CODE - 1);
    guest.memory.write(CODE - 1, &[0xcc]);
    let start = Instant::now();
    let exit = guest.run();
    let guest_time = start.elapsed();
    assert_eq!(exit.reason, ExitReason::ExceptionOrNmi, "{name}: {exit:?}");
    assert_eq!(exit.interruption_info.vector(), 3, "{name}: {exit:?}");
    if name != "quicksort" {
        assert_eq!(guest.vcpu.state.regs[0], native, "{name}");
    }
    assert_eq!(host.bytes(), inside.bytes(), "{name}");
    (native_time, guest_time)
}

/// Small pages that the TLB-missing loop goes through.
const PAGES: u64 = 8192;

/// Time per access of a loop through one line of each of [`PAGES`] pages, in random order.
fn tlb_misses(guest: &mut Guest, walk_caches: bool) -> Duration {
    const ROUNDS: u64 = 4;
    guest.vcpu.use_walk_caches(walk_caches);
    guest.vcpu.entered_from_user();
    guest.memory.write_u64(STACK - 8, CODE - 1);
    let state = &mut guest.vcpu.state;
    state.rip = CODE;
    (state.regs[7], state.regs[6], state.regs[4]) = (ROUNDS * PAGES, DATA, STACK - 8);
    let start = Instant::now();
    let exit = guest.run();
    let time = start.elapsed();
    assert_eq!(exit.interruption_info.vector(), 3, "{exit:?}");
    time / (ROUNDS * PAGES) as u32
}

fn walk_caches(chase: &[u8]) {
    let pages = Memory::new((PAGES << 12) as usize);
    let mut guest = Guest::new(0x100000);
    guest.ept.map(DATA, &pages, EPT_RWX);
    guest.long_mode(3);
    guest.controls.exception_bitmap = u32::MAX;
    // Page tables of small pages from 8_0000H on, under the page directory at 3000H.
    let tables = 0x8_0000;
    for page in 0..PAGES {
        guest
            .memory
            .write_u64(tables + 8 * page, (DATA + (page << 12)) | 7);
    }
    for table in 0..PAGES / 512 {
        let entry = 0x3000 + 8 * ((DATA >> 21) + table);
        guest.memory.write_u64(entry, (tables + (table << 12)) | 7);
    }
    let mut seed = 1u64;
    let mut order: Vec<u64> = (1..PAGES).collect();
    for i in (1..order.len()).rev() {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1);
        order.swap(i, (seed >> 33) as usize % (i + 1));
    }
    let mut at = 0;
    for next in order.into_iter().chain([0]) {
        let to = (next << 12) + (next & 63) * 64;
        pages.write_u64(at, to);
        at = to;
    }
    guest.memory.write(CODE, chase);
    guest.memory.write(CODE - 1, &[0xcc]);
    let (mut without, mut with) = (Duration::MAX, Duration::MAX);
    for _ in 0..10 {
        without = without.min(tlb_misses(&mut guest, false));
        with = with.min(tlb_misses(&mut guest, true));
    }
    println!(
        "\nTLB miss: {without:.0?} without walk caches, {with:.0?} with, ratio {:.2}",
        with.as_secs_f64() / without.as_secs_f64()
    );
}

fn main() {
    let host = Memory::at(DATA, DATA_LEN, libc::PROT_READ | libc::PROT_WRITE);
    let inside = Memory::new(DATA_LEN);
    let mut guest = Guest::new(0x100000);
    guest.ept.map(DATA, &inside, EPT_RWX);
    guest.long_mode(3);
    guest.controls.exception_bitmap = u32::MAX;
    let mut chase = Vec::new();
    println!(
        "{:<10} {:>12} {:>12} {:>8}   best of 5",
        "loop", "native", "guest", "ratio"
    );
    for (name, run, code) in loops::all() {
        guest.vcpu.entered_from_user();
        guest.memory.write(CODE, &code);
        let count = match name {
            "quicksort" => 200_000,
            _ => 3_000_000,
        };
        let mut best = (Duration::MAX, Duration::MAX);
        for _ in 0..5 {
            guest.vcpu.entered_from_user();
            let (native, guest) = measure(&mut guest, &host, &inside, name, count, run);
            best = (best.0.min(native), best.1.min(guest));
        }
        let ratio = best.1.as_secs_f64() / best.0.as_secs_f64();
        println!(
            "{name:<10} {:>12.2?} {:>12.2?} {ratio:>8.1}",
            best.0, best.1
        );
        if name == "chase" {
            chase = code;
        }
    }
    walk_caches(&chase);
}
