//! A few threads and a few steps, for Miri, which lets loads see old values as far as the orderings
//! allow: what the model checker, which knows only interleavings, cannot show. Try several seeds:
//! `MIRIFLAGS="-Zmiri-permissive-provenance -Zmiri-disable-isolation -Zmiri-many-seeds=0..8"`.
#![cfg(not(feature = "model"))]

mod machine;

use arch::addr::Gfn;
use arch::paging::Level;
use eptide_mmu::{AddressSpace, Config};
use machine::{Cpu, Outcome, Ram, log_dirty, mmu, region};
use std::sync::atomic::Ordering;

const PAGES: u64 = 2;

/// Two vCPUs store while the log is taken and translations are zapped: the copy made from the log
/// equals memory in the end.
#[test]
fn the_log_misses_nothing() {
    let ram = Ram::new(0x10000);
    let config = Config {
        max_level: Level::PTE,
        prefetch: 0,
        ..Config::default()
    };
    let mmu = mmu(config);
    mmu.set_memory_region(&log_dirty(region(0, 0, 0x10000, ram.hva())))
        .unwrap();
    let mut copy = [0; PAGES as usize];
    let copy_dirty = |copy: &mut [u64]| {
        let mut words = [0];
        mmu.dirty_log(AddressSpace::Normal, 0, &mut words).unwrap();
        for page in (0..PAGES).filter(|page| words[0] >> page & 1 == 1) {
            copy[page as usize] = ram.word(page << 12).load(Ordering::Acquire);
        }
    };
    std::thread::scope(|scope| {
        for id in 0..PAGES {
            let mmu = &mmu;
            scope.spawn(move || {
                let mut cpu = Cpu::new(mmu, id as u32);
                for value in 1..4 {
                    assert!(matches!(cpu.store(id << 12, value), Outcome::Memory(_)));
                }
            });
        }
        copy_dirty(&mut copy);
        mmu.zap_gfns(Gfn::new(0)..Gfn::new(512));
        copy_dirty(&mut copy);
        mmu.zap_all();
        copy_dirty(&mut copy);
    });
    copy_dirty(&mut copy);
    assert_eq!(copy, [3; PAGES as usize]);
}

/// A slot is put in and taken out under a vCPU that reads it: no access reaches it afterwards, and
/// Miri sees no access to memory that was given back.
#[test]
fn memory_is_let_go_before_it_is_given_back() {
    let config = Config {
        max_level: Level::PTE,
        prefetch: 0,
        ..Config::default()
    };
    let mmu = mmu(config);
    std::thread::scope(|scope| {
        let mmu = &mmu;
        scope.spawn(move || {
            let mut cpu = Cpu::new(mmu, 0);
            for value in 0..6 {
                // Memory or a hole, whichever it is at the time.
                cpu.store(0x1000, value);
            }
        });
        for _ in 0..2 {
            let ram = Ram::new(0x2000);
            mmu.set_memory_region(&region(0, 0, 0x2000, ram.hva()))
                .unwrap();
            std::thread::yield_now();
            machine::delete(mmu, 0).unwrap();
        }
    });
}
