//! Paging formats and rules beside 4-level paging with EPT: 32-bit, PAE, 5-level, protection
//! keys, and host-owned (shadow) tables.

use crate::bench::*;
use crate::guest::{Guest, Memory, flat_segments_32};
use arch::control_registers::{Cr0, Cr4, Xcr0};
use arch::controls::SecondaryControls;
use arch::exit::ExitReason;
use eptide_cpu::ShadowRoot;
use iced_x86::code_asm::*;

/// A 32-bit guest with flat segments and the exceptions intercepted; paging is still off.
fn flat32() -> Guest {
    let mut guest = Guest::new(0x10_0000);
    let state = &mut guest.vcpu.state;
    state.cr0 = Cr0::PE | Cr0::ET | Cr0::NE;
    state.segments = flat_segments_32();
    state.regs[4] = STACK;
    guest.controls.exception_bitmap = u32::MAX;
    guest
}

/// Turns paging on with CR3, then reads and writes through ECX.
fn enable_and_touch(guest: &mut Guest) {
    guest.load(&assemble(32, CODE, |a| {
        a.mov(cr3, eax).unwrap();
        a.mov(edx, cr0).unwrap();
        a.or(edx, 0x8001_0000u32).unwrap();
        a.mov(cr0, edx).unwrap();
        a.mov(ebx, dword_ptr(ecx)).unwrap();
        a.mov(dword_ptr(ecx), esi).unwrap();
        a.hlt().unwrap();
    }));
}

#[test]
fn two_level_paging_maps_small_and_large_pages() {
    let mut guest = flat32();
    guest.vcpu.state.cr4 = Cr4::PSE;
    let (directory, table) = (0x5000u64, 0x6000u64);
    // The first 4 MiB to themselves by a large page; the second 4 MiB by small pages.
    guest.memory.write(directory, &0x87u32.to_le_bytes());
    guest
        .memory
        .write(directory + 4, &(table as u32 | 7).to_le_bytes());
    guest
        .memory
        .write(table + 4 * 3, &(DATA as u32 | 7).to_le_bytes());
    guest.memory.write(DATA, &0x1234_5678u32.to_le_bytes());
    enable_and_touch(&mut guest);
    let state = &mut guest.vcpu.state;
    (state.regs[0], state.regs[1], state.regs[6]) = (directory, 0x40_3000, 99);
    guest.run_to(ExitReason::Hlt);
    assert_eq!(guest.vcpu.state.regs[3], 0x1234_5678);
    assert_eq!(guest.memory.bytes()[DATA as usize], 99);
    let pte = guest.memory.read_u64(table + 12) as u32;
    assert_eq!(pte & 0x60, 0x60, "A and D");
    // A hole faults with the address.
    guest.vcpu.state.rip = CODE;
    guest.vcpu.state.regs[1] = 0x40_5000;
    let exit = guest.run_to(ExitReason::ExceptionOrNmi);
    assert_eq!(
        (exit.interruption_info.vector(), exit.qualification),
        (14, 0x40_5000)
    );
    assert_eq!(exit.interruption_error_code, 0);
}

#[test]
fn pae_paging_uses_the_pdptes_loaded_with_cr3() {
    let mut guest = flat32();
    guest.vcpu.state.cr4 = Cr4::PAE;
    let (pointers, directory) = (0x5020u64, 0x6000u64);
    guest.memory.write_u64(pointers, directory | 1);
    guest.memory.write_u64(directory, 0x87);
    guest.memory.write_u64(directory + 8, 0x87);
    enable_and_touch(&mut guest);
    guest.memory.write(DATA, &7u32.to_le_bytes());
    let state = &mut guest.vcpu.state;
    (state.regs[0], state.regs[1], state.regs[6]) = (pointers, 0x20_0000 + DATA, 8);
    guest.run_to(ExitReason::Hlt);
    assert_eq!(
        (
            guest.vcpu.state.regs[3],
            guest.memory.bytes()[DATA as usize]
        ),
        (7, 8)
    );
    assert_eq!(guest.vcpu.state.pdptes[0], directory | 1);
    // A PDPTE changed in memory is not seen until CR3 is loaded.
    guest.memory.write_u64(pointers, 0);
    guest.load(&assemble(32, CODE, |a| {
        a.mov(ebx, dword_ptr(ecx)).unwrap();
        a.hlt().unwrap();
    }));
    guest.run_to(ExitReason::Hlt);

    // Reserved bits in a PDPTE are #GP on loading CR3.
    let mut guest = flat32();
    guest.vcpu.state.cr4 = Cr4::PAE;
    guest.memory.write_u64(pointers, directory | 1 | 1 << 1);
    enable_and_touch(&mut guest);
    guest.vcpu.state.regs[0] = pointers;
    let exit = guest.run_to(ExitReason::ExceptionOrNmi);
    assert_eq!(exit.interruption_info.vector(), 13);
}

#[test]
fn five_levels_reach_57_bits() {
    let mut guest = long_guest();
    guest.vcpu.state.cr4 |= Cr4::LA57;
    // PML5 entry 0 leads to the old PML4; entry 1 does too.
    guest.memory.write_u64(0x5000, 0x1000 | 7);
    guest.memory.write_u64(0x5008, 0x1000 | 7);
    guest.vcpu.state.cr3 = 0x5000;
    guest.memory.write_u64(DATA, 0x77);
    guest.load(&assemble(64, CODE, |a| {
        a.mov(rax, qword_ptr(rcx)).unwrap();
        a.hlt().unwrap();
    }));
    guest.vcpu.state.regs[1] = 1 << 48 | DATA;
    guest.run_to_halt();
    assert_eq!(
        guest.vcpu.state.regs[0], 0x77,
        "an address that 48 bits do not reach"
    );
    guest.vcpu.state.rip = CODE;
    guest.vcpu.state.regs[1] = 1 << 56 | DATA;
    assert_eq!(guest.run_to_handler(), 13, "57 bits have an end too");
}

#[test]
fn protection_keys_guard_user_pages() {
    let table = |guest: &mut Guest| {
        guest.memory.write_u64(0x3000, 0x5000 | 7);
        for i in 0..512 {
            guest.memory.write_u64(0x5000 + 8 * i, i << 12 | 7);
        }
        guest
            .memory
            .write_u64(0x5000 + 8 * (DATA >> 12), DATA | 3 << 59 | 7);
        guest.vcpu.state.cr4 |= Cr4::PKE;
    };
    // Key 3: access disable, write disable, both allowed.
    let cases = [
        (1u32 << 6, false, Some(0x21)),
        (2 << 6, false, None),
        (2 << 6, true, Some(0x23)),
        (0, true, None),
    ];
    for (pkru, write, fault) in cases {
        let mut guest = long_guest();
        table(&mut guest);
        guest.load(&assemble(64, CODE, |a| {
            a.xor(ecx, ecx).unwrap();
            a.xor(edx, edx).unwrap();
            a.mov(eax, pkru).unwrap();
            a.wrpkru().unwrap();
            a.xor(eax, eax).unwrap();
            a.rdpkru().unwrap();
            if write {
                a.mov(qword_ptr(rbx), rax).unwrap();
            } else {
                a.mov(rsi, qword_ptr(rbx)).unwrap();
            }
            a.hlt().unwrap();
        }));
        guest.vcpu.state.regs[3] = DATA;
        match fault {
            None => guest.run_to_halt(),
            Some(code) => {
                assert_eq!(guest.run_to_handler(), 14);
                assert_eq!(guest.stack(0), code, "PKRU {pkru:#x}, write {write}");
            }
        }
        assert_eq!(guest.vcpu.state.pkru, pkru);
        assert_eq!(guest.vcpu.state.regs[0], pkru.into());
    }
}

#[test]
fn protection_keys_guard_supervisor_pages() {
    // Key 3 of IA32_PKRS: access disable, write disable, none; the same key of PKRU does not
    // matter to supervisor pages.
    let cases = [
        (1u64 << 6, false, Some(0x21)),
        (2 << 6, false, None),
        (2 << 6, true, Some(0x23)),
        (0, true, None),
    ];
    for (pkrs, write, fault) in cases {
        let mut guest = long_guest();
        guest.memory.write_u64(0x3000, 0x5000 | 7);
        for i in 0..512 {
            guest.memory.write_u64(0x5000 + 8 * i, i << 12 | 3);
        }
        let key = 3 << 59;
        guest
            .memory
            .write_u64(0x5000 + 8 * (DATA >> 12), DATA | key | 3);
        guest.vcpu.state.cr4 |= Cr4::PKS | Cr4::PKE;
        guest.vcpu.state.pkru = 3 << 6;
        guest.controls.msr_bitmap.set(arch::msr::PKRS, true, false);
        guest.load(&assemble(64, CODE, |a| {
            // Without restrictions first, so that the TLB knows the page.
            a.mov(rsi, qword_ptr(rbx)).unwrap();
            a.wrmsr().unwrap();
            if write {
                a.mov(qword_ptr(rbx), rax).unwrap();
            } else {
                a.mov(rsi, qword_ptr(rbx)).unwrap();
            }
            a.hlt().unwrap();
        }));
        let regs = &mut guest.vcpu.state.regs;
        regs[..4].copy_from_slice(&[pkrs, arch::msr::PKRS.into(), 0, DATA]);
        match fault {
            None => guest.run_to_halt(),
            Some(code) => {
                assert_eq!(guest.run_to_handler(), 14);
                assert_eq!(guest.stack(0), code, "PKRS {pkrs:#x}, write {write}");
            }
        }
        // What is changed from outside counts from the next entry on.
        guest.vcpu.state.msrs.pkrs = 1 << 6;
        guest.vcpu.state.rip = CODE;
        guest.vcpu.state.regs[4] = STACK;
        assert_eq!(guest.run_to_handler(), 14);
    }
}

#[test]
fn pkru_is_an_xsave_component() {
    let mut guest = long_guest();
    guest.vcpu.state.xcr0 |= Xcr0::PKRU;
    guest.vcpu.state.pkru = 0x55;
    guest.load(&assemble(64, CODE, |a| {
        a.mov(eax, 0x200).unwrap();
        a.xor(edx, edx).unwrap();
        a.xsave64(ptr(rcx)).unwrap();
        a.hlt().unwrap();
    }));
    guest.vcpu.state.regs[1] = DATA;
    guest.run_to_halt();
    let (offset, _) = eptide_cpu::Vcpu::xsave_component(9).unwrap();
    assert_eq!(guest.memory.read_u64(DATA + u64::from(offset)), 0x55);
    assert_eq!(guest.memory.read_u64(DATA + 512), 0x200);
}

#[test]
fn without_ept_the_hosts_tables_are_walked_whatever_the_guest_thinks() {
    for paged in [false, true] {
        let mut guest = if paged { long_guest() } else { flat32() };
        guest.controls.secondary -= SecondaryControls::ENABLE_EPT;
        guest.controls.exception_bitmap = 1 << 14;
        guest.vcpu.state.cr0 |= Cr0::WP;
        // Linear CODE and DATA to two pages of the host.
        let tables: Vec<Memory> = (0..4).map(|_| Memory::new(4096)).collect();
        for (level, pair) in tables.windows(2).enumerate() {
            assert!(level < 3);
            pair[0].write_u64(0, pair[1].hva | 7);
        }
        let leaf = &tables[3];
        let base = guest.memory.hva;
        let page = |linear: u64| base + linear;
        leaf.write_u64(8 * (CODE >> 12), page(CODE) | 5);
        leaf.write_u64(8 * (DATA >> 12), page(DATA) | 1 << 63 | 5);
        guest.controls.shadow_root = ShadowRoot {
            root: tables[0].hva,
            levels: 4,
            pdptes: [0; 4],
        };
        let code = if paged {
            assemble(64, CODE, |a| {
                a.mov(eax, dword_ptr(rcx)).unwrap();
                a.mov(dword_ptr(rcx), edx).unwrap();
                a.hlt().unwrap();
            })
        } else {
            assemble(32, CODE, |a| {
                a.mov(eax, dword_ptr(ecx)).unwrap();
                a.mov(dword_ptr(ecx), edx).unwrap();
                a.hlt().unwrap();
            })
        };
        guest.load(&code);
        guest.memory.write(DATA, &0xabcdu32.to_le_bytes());
        guest.vcpu.state.regs[1] = DATA;
        guest.vcpu.state.regs[2] = 0x77;
        let exit = guest.run_to(ExitReason::ExceptionOrNmi);
        assert_eq!(guest.vcpu.state.regs[0], 0xabcd);
        assert_eq!(exit.interruption_info.vector(), 14);
        assert_eq!(
            exit.interruption_error_code, 3,
            "a write to a page mapped read-only"
        );
        assert_eq!(exit.qualification, DATA);
        // The hypervisor allows it and says so.
        leaf.write_u64(8 * (DATA >> 12), page(DATA) | 1 << 63 | 7);
        guest.vcpu.flush(eptide_cpu::Flush::Linear(DATA));
        guest.run_to(ExitReason::Hlt);
        assert_eq!(guest.memory.bytes()[DATA as usize], 0x77);
    }
}
