//! Accessed and dirty bits, TLB and PCID rules, two-stage corners, code coherence.

use crate::bench::*;
use crate::guest::{EPT_RWX, Guest};
use arch::control_registers::{Cr3, Cr4};
use arch::controls::{Eptp, SecondaryControls};
use arch::exit::{EptViolation, ExitReason};
use eptide_cpu::{Bus, BusResponse, Emulated, Flush, MmioHint, Vcpu};
use iced_x86::code_asm::*;

/// Maps linear `DATA` through small pages whose table is at 5000H; the PTE's address.
fn small_pages(guest: &mut Guest) -> u64 {
    guest.memory.write_u64(0x3000, 0x5000 | 7);
    for i in 0..512 {
        guest.memory.write_u64(0x5000 + 8 * i, i << 12 | 7);
    }
    0x5000 + 8 * (DATA >> 12)
}

fn read_data(guest: &mut Guest) {
    guest.load(&assemble(64, CODE, |a| {
        a.mov(rax, qword_ptr(rcx)).unwrap();
        a.hlt().unwrap();
    }));
    guest.vcpu.state.regs[1] = DATA;
    guest.run_to_halt();
}

#[test]
fn accessed_and_dirty_bits_are_set_when_they_should() {
    let mut guest = long_guest();
    let pte = small_pages(&mut guest);
    read_data(&mut guest);
    assert_eq!(guest.memory.read_u64(pte) & 0x60, 0x20, "a read sets A");
    assert_eq!(
        guest.memory.read_u64(0x3000) & 0x60,
        0x20,
        "the table's entry too"
    );
    guest.load(&assemble(64, CODE, |a| {
        a.mov(qword_ptr(rcx), rax).unwrap();
        a.hlt().unwrap();
    }));
    guest.run_to_halt();
    assert_eq!(
        guest.memory.read_u64(pte) & 0x60,
        0x60,
        "the first write sets D"
    );
}

#[test]
fn ept_accessed_and_dirty_flags_are_set_when_enabled() {
    for enabled in [false, true] {
        let mut guest = long_guest();
        guest.controls.eptp = Eptp::new(guest.ept.root(), 4, enabled);
        read_data(&mut guest);
        let entry = guest.ept.entry(DATA, 1);
        // SAFETY: the entry lies in a table of this guest, and no processor runs.
        let value = unsafe { entry.read() };
        assert_eq!(value & 0x300, if enabled { 0x100 } else { 0 });
        let table = guest.ept.entry(0x3000, 1);
        // SAFETY: as above.
        let value = unsafe { table.read() };
        assert_eq!(
            value & 0x300,
            if enabled { 0x300 } else { 0 },
            "a guest table counts as written"
        );
    }
}

#[test]
fn modifications_are_logged_and_a_full_log_exits() {
    let mut guest = long_guest();
    guest.controls.eptp = Eptp::new(guest.ept.root(), 4, true);
    guest.controls.secondary |= SecondaryControls::ENABLE_PML;
    guest.load(&assemble(64, CODE, |a| {
        a.mov(qword_ptr(rcx), rax).unwrap();
        a.mov(qword_ptr(rcx), rax).unwrap();
        a.hlt().unwrap();
    }));
    guest.vcpu.state.regs[1] = DATA;
    guest.run_to_halt();
    let log = guest.vcpu.take_page_modification_log();
    assert_eq!(
        log.iter().filter(|gpa| **gpa == DATA).count(),
        1,
        "{log:x?}"
    );

    // More pages than the log holds: it exits with the log full, and goes on once it is empty.
    let pages = 600u64;
    let far = crate::guest::Memory::new(4096 * pages as usize);
    guest.ept.map(0x80_0000, &far, EPT_RWX);
    guest.load(&assemble(64, CODE, |a| {
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        a.mov(qword_ptr(rcx), rax).unwrap();
        a.add(rcx, 4096).unwrap();
        a.dec(edx).unwrap();
        a.jnz(again).unwrap();
        a.hlt().unwrap();
    }));
    guest.vcpu.state.regs[1] = 0x80_0000;
    guest.vcpu.state.regs[2] = pages;
    guest.run_to(ExitReason::PmlFull);
    assert_eq!(guest.vcpu.state.rip, CODE, "the write has not been made");
    let first = guest.vcpu.take_page_modification_log();
    guest.run_to_halt();
    let second = guest.vcpu.take_page_modification_log();
    let logged = first
        .iter()
        .chain(&second)
        .filter(|gpa| **gpa >= 0x80_0000)
        .count();
    assert_eq!(logged as u64, pages, "each page once");
}

#[test]
fn a_stale_translation_lasts_until_it_is_invalidated() {
    let mut guest = long_guest();
    let pte = small_pages(&mut guest);
    let other = DATA + 0x1000;
    guest.memory.write_u64(DATA, 1);
    guest.memory.write_u64(other, 2);
    let code = assemble(64, CODE, |a| {
        a.mov(rax, qword_ptr(rcx)).unwrap();
        a.mov(qword_ptr(rdx), rsi).unwrap();
        a.mov(rbx, qword_ptr(rcx)).unwrap();
        a.invlpg(byte_ptr(rcx)).unwrap();
        a.mov(rdi, qword_ptr(rcx)).unwrap();
        a.hlt().unwrap();
    });
    guest.load(&code);
    let state = &mut guest.vcpu.state;
    (state.regs[1], state.regs[2], state.regs[6]) = (DATA, pte, other | 7);
    guest.run_to_halt();
    let regs = guest.vcpu.state.regs;
    assert_eq!(regs[0], 1);
    assert!(
        regs[3] == 1 || regs[3] == 2,
        "either is allowed before INVLPG"
    );
    assert_eq!(regs[7], 2, "INVLPG shows the new page");
}

#[test]
fn pcids_keep_their_translations_apart_and_no_flush_keeps_them() {
    let mut guest = long_guest();
    guest.vcpu.state.cr4 |= Cr4::PCIDE;
    // A second hierarchy at 10 0000H − 4000H maps DATA elsewhere.
    let second = 0xf_0000u64;
    for (offset, value) in [
        (0, second + 0x1000),
        (0x1000, second + 0x2000),
        (0x2000, second + 0x3000),
    ] {
        guest.memory.write_u64(second + offset, value | 7);
    }
    for i in 0..256 {
        guest.memory.write_u64(second + 0x3000 + 8 * i, i << 12 | 7);
    }
    guest
        .memory
        .write_u64(second + 0x3000 + 8 * (DATA >> 12), (DATA + 0x1000) | 7);
    guest.memory.write_u64(DATA, 11);
    guest.memory.write_u64(DATA + 0x1000, 22);
    let code = assemble(64, CODE, |a| {
        a.mov(rax, qword_ptr(rcx)).unwrap();
        a.mov(cr3, rdx).unwrap();
        a.mov(rbx, qword_ptr(rcx)).unwrap();
        a.mov(cr3, rsi).unwrap();
        a.mov(rdi, qword_ptr(rcx)).unwrap();
        a.hlt().unwrap();
    });
    guest.load(&code);
    let first = guest.vcpu.state.cr3;
    let state = &mut guest.vcpu.state;
    state.regs[1] = DATA;
    state.regs[2] = second | 1;
    state.regs[6] = first | Cr3::NO_FLUSH.bits();
    guest.run_to_halt();
    let regs = guest.vcpu.state.regs;
    assert_eq!((regs[0], regs[3], regs[7]), (11, 22, 11));
    assert_eq!(guest.vcpu.state.cr3, first, "bit 63 is not kept");
}

#[test]
fn a_write_that_crosses_into_a_forbidden_page_writes_nothing() {
    let mut guest = long_guest();
    small_pages(&mut guest);
    guest.memory.write_u64(0x5000 + 8 * ((DATA >> 12) + 1), 0);
    guest.memory.write_u64(DATA + 0xff8, 0x5555_5555_5555_5555);
    guest.load(&assemble(64, CODE, |a| a.mov(qword_ptr(rcx), rax).unwrap()));
    guest.vcpu.state.regs[1] = DATA + 0xffc;
    assert_eq!(guest.run_to_handler(), 14);
    assert_eq!(guest.vcpu.state.cr2, DATA + 0x1000);
    assert_eq!(guest.memory.read_u64(DATA + 0xff8), 0x5555_5555_5555_5555);
}

#[test]
fn a_large_page_over_small_ept_pages_reaches_all_of_them() {
    let mut guest = long_guest();
    let moved = crate::guest::Memory::new(4096);
    moved.write_u64(0, 77);
    guest.ept.map(DATA, &moved, EPT_RWX);
    read_data(&mut guest);
    assert_eq!(guest.vcpu.state.regs[0], 77);
    // The hypervisor changes EPT and says so.
    let back = guest.memory.hva + DATA;
    guest.memory.write_u64(DATA, 78);
    guest.ept.set(DATA, back | EPT_RWX);
    guest.vcpu.flush(Flush::Gpa {
        start: DATA,
        len: 4096,
    });
    read_data(&mut guest);
    assert_eq!(guest.vcpu.state.regs[0], 78);
}

#[test]
fn code_that_overwrites_what_follows_runs_what_it_wrote() {
    let mut guest = long_guest();
    // mov byte [next], 0x90 over a UD2's first byte … both bytes.
    guest.load(&assemble(64, CODE, |a| {
        a.mov(word_ptr(rcx), 0x9090).unwrap();
        a.db(&[0x0f, 0x0b]).unwrap();
        a.hlt().unwrap();
    }));
    let length = assemble(64, CODE, |a| a.mov(word_ptr(rcx), 0x9090).unwrap()).len() as u64;
    guest.vcpu.state.regs[1] = CODE + length;
    guest.run_to_halt();
    assert_eq!(guest.vcpu.state.rip, CODE + length + 2);
}

#[test]
fn a_loop_that_patches_itself_counts_right() {
    let mut guest = long_guest();
    // inc dword [imm of mov eax]; mov eax, imm32; loop
    let code = assemble(64, CODE, |a| {
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        a.inc(dword_ptr(rdx)).unwrap();
        a.db(&[0xb8, 0, 0, 0, 0]).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(again).unwrap();
        a.hlt().unwrap();
    });
    guest.load(&code);
    guest.vcpu.state.regs[1] = 1000;
    guest.vcpu.state.regs[2] = CODE + 3;
    guest.run_to_halt();
    assert_eq!(guest.vcpu.state.regs[0], 1000);
}

#[test]
fn another_processors_store_into_code_is_seen() {
    let mut guest = long_guest();
    // Spins on `jmp $` until the other processor turns it into HLT.
    guest.load(&[0xeb, 0xfe]);
    let mut other = Vcpu::new(&guest.machine).unwrap();
    other.state = guest.vcpu.state.clone();
    guest.memory.write(
        CODE + 0x1000,
        &assemble(64, CODE + 0x1000, |a| {
            a.mov(byte_ptr(rcx), 0xf4u32 as i32).unwrap();
            a.hlt().unwrap();
        }),
    );
    other.state.rip = CODE + 0x1000;
    other.state.regs[1] = CODE;
    let controls = guest.controls.clone();
    let attention = guest.vcpu.attention();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            while !attention.in_guest() {
                std::thread::yield_now();
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
            let exit = other.enter(&controls);
            assert_eq!(exit.reason, ExitReason::Hlt);
        });
        guest.run_to_halt();
    });
    assert_eq!(guest.vcpu.state.rip, CODE);
}

#[test]
fn memory_changed_from_outside_is_seen_at_the_next_entry() {
    let mut guest = long_guest();
    guest.load(&[0xb0, 1, 0xf4]);
    guest.run_to_halt();
    assert_eq!(guest.vcpu.state.regs[0] as u8, 1);
    guest.memory.write(CODE, &[0xb0, 2, 0xf4]);
    guest.vcpu.entered_from_user();
    guest.vcpu.state.rip = CODE;
    guest.run_to_halt();
    assert_eq!(guest.vcpu.state.regs[0] as u8, 2);
}

#[test]
fn vanished_host_memory_is_an_exit_that_can_be_repaired() {
    let mut guest = long_guest();
    let page = crate::guest::Memory::new(4096);
    guest.ept.map(DATA, &page, EPT_RWX);
    read_data(&mut guest);
    // SAFETY: the mapping is this test's own.
    unsafe { libc::mprotect(page.hva as *mut _, 4096, libc::PROT_NONE) };
    guest.vcpu.state.rip = CODE;
    let exit = guest.run_to(ExitReason::EptViolation);
    assert_eq!(exit.guest_physical_address, DATA);
    assert!(EptViolation::from_bits_retain(exit.qualification).contains(EptViolation::READ));
    assert_eq!(guest.vcpu.take_host_fault(), Some(DATA));
    // SAFETY: as above.
    unsafe { libc::mprotect(page.hva as *mut _, 4096, libc::PROT_READ | libc::PROT_WRITE) };
    guest.run_to_halt();
}

/// A device register that counts, with an answer that comes late if told so.
struct Device {
    late: bool,
    reads: u32,
    writes: Vec<(u64, Vec<u8>)>,
}

impl Bus for Device {
    fn read(&mut self, _gpa: u64, data: &mut [u8]) -> BusResponse {
        if self.late {
            return BusResponse::Later;
        }
        self.reads += 1;
        data.fill(0x11);
        BusResponse::Done
    }
    fn write(&mut self, gpa: u64, data: &[u8]) -> BusResponse {
        self.writes.push((gpa, data.to_vec()));
        BusResponse::Done
    }
}

#[test]
fn an_emulated_access_goes_to_the_bus_once_and_restarts_cleanly() {
    let mut guest = long_guest();
    guest.ept.set(DATA, 6);
    guest.load(&assemble(64, CODE, |a| {
        a.add(dword_ptr(rcx), eax).unwrap();
        a.hlt().unwrap();
    }));
    guest.vcpu.state.regs[1] = DATA + 0x20;
    guest.vcpu.state.regs[0] = 5;
    guest.run_to(ExitReason::EptMisconfiguration);
    let mut device = Device {
        late: true,
        reads: 0,
        writes: Vec::new(),
    };
    let hint = Some(MmioHint {
        gva: DATA + 0x20,
        gpa: 0xfee0_0020,
    });
    let before = guest.vcpu.state.rip;
    let controls = guest.controls.clone();
    assert_eq!(
        guest.vcpu.emulate(&controls, hint, &mut device),
        Emulated::Later
    );
    assert_eq!(guest.vcpu.state.rip, before);
    device.late = false;
    assert_eq!(
        guest.vcpu.emulate(&controls, hint, &mut device),
        Emulated::Done
    );
    assert_eq!(device.reads, 1);
    assert_eq!(
        device.writes,
        [(0xfee0_0020, 0x1111_1116u32.to_le_bytes().to_vec())]
    );
    guest.run_to_halt();
}
