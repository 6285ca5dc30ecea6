//! Paging-structure caches: what they may keep, and what makes them forget.

use crate::bench::*;
use crate::guest::{EPT_RWX, Guest, Memory};
use arch::control_registers::{Cr3, Cr4};
use arch::exit::ExitReason;
use eptide_cpu::Flush;
use iced_x86::code_asm::*;

/// The region that the tests map: the second 2 MiB of linear addresses.
const REGION: u64 = 0x20_0000;
/// The page-directory entry of the region.
const PDE: u64 = 0x3008;
/// Two page tables for it.
const TABLES: [u64; 2] = [0x5000, 0x6000];
/// Data pages, one for each table.
const PAGES: [u64; 2] = [DATA, DATA + 0x1000];

/// A guest whose region is mapped by the first table; the second maps other pages.
fn guest() -> Guest {
    let guest = long_guest();
    for (table, page) in TABLES.into_iter().zip(PAGES) {
        for i in 0..512 {
            guest.memory.write_u64(table + 8 * i, page | 7);
        }
        guest.memory.write_u64(page, page);
    }
    guest.memory.write_u64(PDE, TABLES[0] | 7);
    guest
}

/// Reads a page of the region, lets the PDE name the second table, does `between`, and reads
/// another page. What the second read found.
fn read_around(guest: &mut Guest, between: impl FnOnce(&mut CodeAssembler)) -> u64 {
    guest.load(&assemble(64, CODE, |a| {
        a.mov(rax, qword_ptr(REGION)).unwrap();
        a.mov(qword_ptr(PDE), rsi).unwrap();
        between(a);
        a.mov(rbx, qword_ptr(REGION + 0x1000)).unwrap();
        a.hlt().unwrap();
    }));
    guest.vcpu.state.regs[6] = TABLES[1] | 7;
    guest.run_to_halt();
    assert_eq!(guest.vcpu.state.regs[0], PAGES[0]);
    guest.vcpu.state.regs[3]
}

#[test]
fn a_cached_table_is_used_until_it_is_invalidated() {
    // The architecture allows either; that it is the old table shows that the caches are there.
    assert_eq!(read_around(&mut guest(), |_| {}), PAGES[0]);
    let mut without = guest();
    without.vcpu.use_walk_caches(false);
    assert_eq!(read_around(&mut without, |_| {}), PAGES[1]);
}

#[test]
fn invlpg_of_any_address_drops_all_tables() {
    let found = read_around(&mut guest(), |a| a.invlpg(byte_ptr(DATA)).unwrap());
    assert_eq!(found, PAGES[1]);
}

#[test]
fn a_load_of_cr3_drops_the_tables_of_its_pcid_unless_told_not_to() {
    let reload = |a: &mut CodeAssembler| {
        a.mov(rdi, cr3).unwrap();
        a.or(rdi, r8).unwrap();
        a.mov(cr3, rdi).unwrap();
    };
    let mut plain = guest();
    plain.vcpu.state.regs[8] = 0;
    assert_eq!(read_around(&mut plain, reload), PAGES[1]);
    for (no_flush, expected) in [(0, PAGES[1]), (Cr3::NO_FLUSH.bits(), PAGES[0])] {
        let mut tagged = guest();
        tagged.vcpu.state.cr4 |= Cr4::PCIDE;
        tagged.vcpu.state.cr3 |= 5;
        tagged.vcpu.state.regs[8] = no_flush;
        assert_eq!(read_around(&mut tagged, reload), expected);
    }
}

#[test]
fn invpcid_drops_tables_by_its_type() {
    // Type, PCID of the descriptor, whether the current PCID's tables go.
    for (kind, pcid, drops) in [
        (0, 5, true),
        (1, 5, true),
        (1, 6, false),
        (2, 0, true),
        (3, 0, true),
    ] {
        let mut guest = guest();
        guest.vcpu.state.cr4 |= Cr4::PCIDE;
        guest.vcpu.state.cr3 |= 5;
        let descriptor = DATA + 0x2000;
        guest.memory.write_u64(descriptor, pcid);
        guest.memory.write_u64(descriptor + 8, 0x5_0000);
        guest.vcpu.state.regs[9] = kind;
        let found = read_around(&mut guest, |a| {
            a.invpcid(r9, xmmword_ptr(descriptor)).unwrap();
        });
        assert_eq!(found, PAGES[usize::from(drops)], "type {kind}, PCID {pcid}");
    }
}

#[test]
fn flushes_from_outside_drop_tables() {
    for flush in [
        Flush::All,
        Flush::Guest,
        Flush::Linear(0x5000),
        Flush::Gpa { start: 0, len: 1 },
    ] {
        let mut guest = guest();
        read_around(&mut guest, |_| {});
        guest.vcpu.flush(flush);
        guest.load(&assemble(64, CODE, |a| {
            a.mov(rbx, qword_ptr(REGION + 0x2000)).unwrap();
            a.hlt().unwrap();
        }));
        guest.run_to_halt();
        assert_eq!(guest.vcpu.state.regs[3], PAGES[1], "{flush:?}");
    }
}

#[test]
fn rights_of_the_way_to_a_cached_table_count() {
    // A read-only PDE over writable PTEs.
    let mut guest = guest();
    guest.memory.write_u64(PDE, TABLES[0] | 5);
    guest.load(&assemble(64, CODE, |a| {
        a.mov(rax, qword_ptr(REGION)).unwrap();
        a.mov(qword_ptr(REGION + 0x1000), rax).unwrap();
    }));
    assert_eq!(guest.run_to_handler(), 14);
    assert_eq!(guest.vcpu.state.cr2, REGION + 0x1000);
    assert_eq!(guest.stack(0), 3, "present, a write");
}

#[test]
fn an_old_table_is_never_the_reason_of_a_fault() {
    // Page 1 is missing in the first table, or read-only there.
    for entry in [0, PAGES[0] | 5] {
        let mut guest = guest();
        guest.memory.write_u64(TABLES[0] + 8, entry);
        guest.load(&assemble(64, CODE, |a| {
            a.mov(rax, qword_ptr(REGION)).unwrap();
            a.mov(qword_ptr(PDE), rsi).unwrap();
            a.mov(qword_ptr(REGION + 0x1008), rax).unwrap();
            a.hlt().unwrap();
        }));
        guest.vcpu.state.regs[6] = TABLES[1] | 7;
        guest.run_to_halt();
        assert_eq!(guest.memory.read_u64(PAGES[1] + 8), PAGES[0]);
    }
}

#[test]
fn accessed_bits_are_set_again_after_an_invalidation() {
    let mut guest = guest();
    guest.load(&assemble(64, CODE, |a| {
        a.mov(rax, qword_ptr(REGION)).unwrap();
        a.and(dword_ptr(PDE), !0x20).unwrap();
        a.invlpg(byte_ptr(DATA)).unwrap();
        a.mov(rax, qword_ptr(REGION + 0x1000)).unwrap();
        a.hlt().unwrap();
    }));
    guest.run_to_halt();
    assert_eq!(guest.memory.read_u64(PDE) & 0x20, 0x20);
}

#[test]
fn five_levels_have_them_too() {
    let mut guest = guest();
    guest.memory.write_u64(0x4000, 0x1000 | 7);
    guest.vcpu.state.cr4 |= Cr4::LA57;
    guest.vcpu.state.cr3 = 0x4000;
    assert_eq!(read_around(&mut guest, |_| {}), PAGES[0]);
}

#[test]
fn ept_tables_are_cached_until_they_are_flushed() {
    // The EPT's page directory gets another table with other pages.
    let mut guest = guest();
    let other = Memory::new(4096);
    let page = Memory::new(4096);
    page.write_u64(0, 77);
    for gpa in (0..REGION).step_by(4096) {
        let target = if gpa == DATA + 0x5000 {
            page.hva
        } else if gpa < 0x10_0000 {
            guest.memory.hva + gpa
        } else {
            continue;
        };
        other.write_u64(gpa >> 12 << 3, target | EPT_RWX);
    }
    guest.load(&assemble(64, CODE, |a| {
        a.mov(rax, qword_ptr(DATA + 0x4000)).unwrap();
        a.hlt().unwrap();
    }));
    guest.run_to_halt();
    let entry = guest.ept.entry(0, 2);
    // SAFETY: the entry lies in a table of this guest, and no processor runs.
    unsafe { entry.write(other.hva | 7) };
    guest.vcpu.flush(Flush::Gpa {
        start: DATA + 0x5000,
        len: 4096,
    });
    guest.load(&assemble(64, CODE, |a| {
        a.mov(rax, qword_ptr(DATA + 0x5000)).unwrap();
        a.hlt().unwrap();
    }));
    guest.run_to_halt();
    assert_eq!(guest.vcpu.state.regs[0], 77);
}

#[test]
fn random_tables_with_their_invalidations_read_like_no_caches() {
    let mut seed = 7u64;
    let mut random = |below: u64| {
        seed = seed
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (seed >> 33) % below
    };
    let mut guests = [guest(), guest()];
    // What a large page maps.
    let large = [Memory::new(4 * 4096), Memory::new(4 * 4096)];
    for (guest, large) in guests.iter_mut().zip(&large) {
        guest.ept.map(0x20_0000, large, EPT_RWX);
    }
    guests[1].vcpu.use_walk_caches(false);
    for guest in &mut guests {
        guest.controls.exception_bitmap = 1 << 14;
        guest.load(&assemble(64, CODE, |a| {
            let (mut read, mut end) = (a.create_label(), a.create_label());
            a.test(edx, edx).unwrap();
            a.jz(read).unwrap();
            a.mov(qword_ptr(rcx), rbx).unwrap();
            a.jmp(end).unwrap();
            a.set_label(&mut read).unwrap();
            a.mov(rax, qword_ptr(rcx)).unwrap();
            a.set_label(&mut end).unwrap();
            a.hlt().unwrap();
        }));
    }
    let mut outcomes = [0; 2];
    for round in 0..20_000 {
        // One change: a directory entry or a page-table entry, then what it demands.
        let region = 1 + random(3);
        let (at, value) = if random(4) == 0 {
            let table = [0, TABLES[0] | 7, TABLES[1] | 7, TABLES[1] | 5, 0x20_0087];
            (0x3000 + 8 * region, table[random(5) as usize])
        } else {
            let entry = [0, PAGES[0] | 7, PAGES[1] | 7, PAGES[1] | 5];
            (
                TABLES[random(2) as usize] + 8 * random(4),
                entry[random(4) as usize],
            )
        };
        let flush = if random(2) == 0 {
            Flush::Guest
        } else {
            Flush::All
        };
        let accesses: Vec<[u64; 3]> = (0..1 + random(4))
            .map(|_| {
                [
                    ((1 + random(3)) << 21) + (random(4) << 12) + 8 * random(4),
                    random(2),
                    round,
                ]
            })
            .collect();
        let results = guests.each_mut().map(|guest| {
            guest.memory.write_u64(at, value);
            guest.vcpu.flush(flush);
            accesses
                .iter()
                .map(|&[address, write, stored]| {
                    let state = &mut guest.vcpu.state;
                    state.rip = CODE;
                    state.regs[..4].copy_from_slice(&[0, address, write, stored]);
                    let exit = guest.run();
                    let found = guest.vcpu.state.regs[0];
                    (
                        exit.reason,
                        exit.qualification,
                        exit.interruption_error_code,
                        found,
                    )
                })
                .collect::<Vec<_>>()
        });
        assert_eq!(results[0], results[1], "round {round}");
        for (reason, ..) in &results[0] {
            outcomes[usize::from(*reason == ExitReason::Hlt)] += 1;
        }
    }
    assert_eq!(
        guests[0].memory.bytes(),
        guests[1].memory.bytes(),
        "A and D bits, data"
    );
    assert_eq!(large[0].bytes(), large[1].bytes());
    assert!(outcomes.iter().all(|&n| n > 1000), "{outcomes:?}");
}
