//! Shadow paging as several vCPUs see it.

mod common;

use common::*;
use eptide_kvm::VcpuExit;

/// A page directory that both vCPUs work on; its entries map 2 MiB pages.
const DIRECTORY: u64 = 0x1_2000;
/// What the entry under test maps, and where linear memory has it.
const PAGE: u64 = 0x4000_0000 - (2 << 20);
const ENTRY: u64 = DIRECTORY + 8 * 511;
const ACCESSED: i32 = 5;
/// A bit that the processor ignores.
const IGNORED: i32 = 9;

fn statistic(machine: &Machine, name: &str) -> u64 {
    let all = machine.vm.mmu_statistics();
    all.iter().find(|(known, _)| *known == name).unwrap().1
}

/// A guest uses many more tables than there may be shadow pages.
#[test]
fn shadow_pages_stay_within_their_limit() {
    const LIMIT: u64 = 100;
    const COUNT: u64 = 10 * LIMIT;
    const ROUNDS: i32 = 5;
    const WINDOW: u64 = 1 << 39;
    const MORE: u64 = 4 << 20;
    const PAGES: u64 = 0x10_0000;
    let code = assemble(|a| {
        let mut round = a.create_label();
        let mut again = a.create_label();
        let mut wrong = a.create_label();
        a.mov(edx, ROUNDS)?;
        a.set_label(&mut round)?;
        a.xor(ecx, ecx)?;
        a.mov(rsi, WINDOW)?;
        a.set_label(&mut again)?;
        a.mov(rax, qword_ptr(rsi))?;
        a.mov(ebx, ecx)?;
        a.and(ebx, 15)?;
        a.cmp(rax, rbx)?;
        a.jne(wrong)?;
        a.lock().inc(qword_ptr(rsi + 8))?;
        a.add(rsi, 2 << 20)?;
        a.inc(ecx)?;
        a.cmp(ecx, COUNT as i32)?;
        a.jb(again)?;
        a.out(0x80, al)?;
        a.dec(edx)?;
        a.jnz(round)?;
        a.set_label(&mut wrong)?;
        a.out(0x81, al)
    });
    let tables = Memory::new((COUNT as usize + 8) << 12);
    let mut machine = Machine::new_in(with_ept(false), Irqchip::None, 1, &code);
    assert_eq!(
        machine.vm.set_nr_mmu_pages(63).unwrap_err().errno(),
        libc::EINVAL
    );
    machine.vm.set_nr_mmu_pages(LIMIT).unwrap();
    assert_eq!(machine.vm.get_nr_mmu_pages(), LIMIT);
    // SAFETY: the memory lives as long as the VM runs.
    unsafe {
        let region = tables.region(1, MORE);
        machine.vm.set_user_memory_region(region).unwrap();
    }
    for n in 0..16 {
        machine.memory.write_u64(PAGES + n * 0x1000, n);
    }
    // PDPT, directories, tables.
    machine.memory.write_u64(TABLES + 8, MORE | 3);
    for n in 0..2 {
        tables.write_u64(8 * n, (MORE + 0x1000 + n * 0x1000) | 3);
    }
    for n in 0..COUNT {
        tables.write_u64(0x1000 + 8 * n, (MORE + 0x3000 + n * 0x1000) | 3);
        tables.write_u64(0x3000 + n * 0x1000, (PAGES + (n & 15) * 0x1000) | 3);
    }
    for round in 1..=ROUNDS as u64 {
        match machine.vcpu().run().unwrap() {
            VcpuExit::IoOut(0x80, _) => {}
            other => panic!("{other:?}"),
        }
        let made = statistic(&machine, "shadow_made");
        let alive = made - statistic(&machine, "shadow_zapped");
        assert!(
            made > round * COUNT && alive <= LIMIT,
            "{made} made, {alive} alive"
        );
    }
    let written = machine.memory.read_u64(PAGES + 8);
    assert_eq!(written, ROUNDS as u64 * COUNT.div_ceil(16));
    // Less room takes pages away at once.
    machine.vm.set_nr_mmu_pages(64).unwrap();
    let alive = statistic(&machine, "shadow_made") - statistic(&machine, "shadow_zapped");
    assert!(alive <= 64, "{alive} alive");
}

/// The supervisor may touch user pages with EFLAGS.AC set, but the processor does not do so on its
/// own to load a segment.
#[test]
fn implicit_accesses_to_user_pages_are_refused() {
    const ALIAS: u64 = 2 << 20;
    const LDT: u64 = 0xb000;
    const HANDLER: u64 = 0x2000;
    const SMAP: u64 = 1 << 21;
    let code = assemble(|a| {
        a.mov(rbx, ALIAS + LDT + 8)?;
        a.stac()?;
        a.mov(rcx, qword_ptr(rbx))?;
        a.mov(eax, 0xc)?;
        a.mov(ds, eax)?;
        a.out(0x80, al)
    });
    for ept in [true, false] {
        let mut machine = Machine::new_in(with_ept(ept), Irqchip::None, 1, &code);
        machine.gate(14, HANDLER);
        machine.code_at(HANDLER, |a| {
            a.pop(rax)?;
            a.mov(rdx, cr2)?;
            a.out(0x81, al)
        });
        machine.memory.write_u64(LDT + 8, 0x00cf_9300_0000_ffff);
        // The first 2 MiB are the supervisor's; the next are the same memory, for all.
        machine.memory.write_u64(TABLES + 0x2000, 0x83);
        machine.memory.write_u64(TABLES + 0x2008, 0x87);
        let vcpu = machine.vcpu();
        let mut sregs = vcpu.get_sregs().unwrap();
        sregs.cr4 |= SMAP;
        sregs.ldt.base = ALIAS + LDT;
        sregs.ldt.limit = 0xff;
        vcpu.set_sregs(&sregs).unwrap();
        match vcpu.run().unwrap() {
            VcpuExit::IoOut(0x81, _) => {}
            other => panic!("{other:?}"),
        }
        let regs = vcpu.get_regs().unwrap();
        let found = (regs.rax, regs.rdx, regs.rcx);
        let expected = (1, ALIAS + LDT + 8, 0x00cf_9300_0000_ffff);
        assert_eq!(found, expected, "EPT {ept}");
    }
}

/// One vCPU clears the accessed bit of an entry, uses it, and looks whether the processor set the
/// bit; the other keeps toggling another bit of the entry. All their writes to the entry are locked,
/// and nearly all of them are emulated. None may undo what a walk or the other did meanwhile.
#[test]
fn locked_writes_to_tables_lose_nothing() {
    const ROUNDS: i32 = 20_000;
    const TOGGLES: u64 = 0x5008;
    let code = assemble(|a| {
        let mut toggler = a.create_label();
        let mut again = a.create_label();
        let mut lost = a.create_label();
        let mut toggle = a.create_label();
        a.mov(rbx, ENTRY)?;
        a.test(rdi, rdi)?;
        a.jnz(toggler)?;

        a.mov(rsi, PAGE)?;
        a.mov(ecx, ROUNDS)?;
        a.set_label(&mut again)?;
        a.lock().btr(qword_ptr(rbx), ACCESSED)?;
        a.invlpg(byte_ptr(rsi))?;
        a.bt(qword_ptr(rbx), ACCESSED)?;
        a.jc(lost)?;
        a.mov(al, byte_ptr(rsi))?;
        a.bt(qword_ptr(rbx), ACCESSED)?;
        a.jnc(lost)?;
        a.dec(ecx)?;
        a.jnz(again)?;
        // On a busy machine the other vCPU may only have begun.
        a.mov(ecx, ROUNDS)?;
        a.cmp(qword_ptr(TOGGLES), 1000)?;
        a.jbe(again)?;
        a.out(0x80, al)?;
        a.set_label(&mut lost)?;
        a.out(0x81, al)?;

        // Every third write goes a different way.
        a.set_label(&mut toggler)?;
        a.xor(ecx, ecx)?;
        a.set_label(&mut toggle)?;
        a.lock().xor(qword_ptr(rbx), 1 << IGNORED)?;
        a.mov(rax, qword_ptr(rbx))?;
        a.mov(rdx, rax)?;
        a.btc(rdx, IGNORED)?;
        a.lock().cmpxchg(qword_ptr(rbx), rdx)?;
        a.mov(rax, qword_ptr(rbx))?;
        a.inc(rcx)?;
        a.mov(qword_ptr(TOGGLES), rcx)?;
        a.jmp(toggle)
    });
    let machine = Machine::new_in(with_ept(false), Irqchip::None, 2, &code);
    machine.long_mode(1);
    let memory = Memory::new(2 << 20);
    let mut machine = machine;
    // SAFETY: the memory lives as long as the VM runs.
    unsafe {
        let region = memory.region(1, PAGE);
        machine.vm.set_user_memory_region(region).unwrap();
    }
    let mut other = machine.vcpus.pop().unwrap();
    let mut regs = other.get_regs().unwrap();
    regs.rdi = 1;
    other.set_regs(&regs).unwrap();
    let interrupter = other.interrupter();
    let toggles = std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            assert_eq!(other.run().unwrap_err().errno(), libc::EINTR);
            other.get_regs().unwrap().rcx
        });
        let outcome = match machine.vcpu().run().unwrap() {
            VcpuExit::IoOut(port, _) => port,
            other => panic!("{other:?}"),
        };
        while !thread.is_finished() {
            interrupter.interrupt();
            std::thread::yield_now();
        }
        let left = machine.vcpu().get_regs().unwrap().rcx;
        assert_eq!(outcome, 0x80, "a bit was lost {left} rounds before the end");
        thread.join().unwrap()
    });
    assert!(toggles > 1000, "the other vCPU hardly ran: {toggles}");
}
