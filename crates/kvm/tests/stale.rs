//! Translations that may be stale, and those that may not: four vCPUs change entries of page tables
//! that all of them use, sometimes invalidate and sometimes do not, and check where each access
//! went. With EPT and on shadow tables.
//!
//! Every entry under test has a generation, which one vCPU counts up; the generation says what the
//! entry is. An access may find any generation from the one that was seen before this vCPU's last
//! invalidation of the address to the one after what is seen behind the access, and no other.
//!
//! ```text
//!   who changes it              who uses it
//!   entry := of generation n    low := counter, INVLPG        (or not)
//!   counter := n                access: finds generation g
//!                               high := counter               low ≤ g ≤ high + 1
//! ```
//!
//! `EPTIDE_STRESS_SECONDS` sets the length.

mod common;

use common::*;
use eptide_kvm::{Kvm, VcpuExit};
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_regs};
use std::time::{Duration, Instant};

const VCPUS: u64 = 4;
/// Entries under test: four for each vCPU, in two last-level entries, one directory entry and one
/// PDPTE.
const ENTRIES: u64 = 4 * VCPUS;
/// Generations that differ. Those that are 7 modulo 8 are not present, those that are 5 read-only.
const KINDS: u64 = 16;

/// A PML4 for each vCPU.
const PML4: u64 = 0x2_0000;
/// Last-level tables and directories for each generation, through which changing entries above lead
/// to its page.
const GENERATION_TABLES: u64 = 0x4_0000;
const GENERATION_DIRECTORIES: u64 = 0x5_0000;
/// A last-level table and a directory for each vCPU.
const TABLE: u64 = 0x6_0000;
const DIRECTORY: u64 = 0x6_8000;
/// What all PML4s lead to.
const PDPT: u64 = 0x7_0000;
const COUNTERS: u64 = 0x7_1000;
/// For each vCPU, the generations that its last invalidations came after.
const LOWS: u64 = 0x7_2000;
/// Where entries are, and where what they translate is.
const PLACES: u64 = 0x7_3000;
const ADDRESSES: u64 = 0x7_3800;
/// For each entry, its value in each generation.
const VALUES: u64 = 0x7_4000;
/// A page for each generation, which holds its number.
const PAGES: u64 = 0x8_0000;
/// The directory entries of generations 3 and 11 are large pages, here.
const LARGE: u64 = 4 << 20;
const STACKS: u64 = 0x9_0000;
/// Where the handler of #PF is.
const HANDLER: u64 = 0x3000;
/// Where linear addresses under test begin: PML4 entry 1.
const WINDOW: u64 = 1 << 39;

/// A translation was found that may not be.
const STALE: u16 = 0x81;
/// A page fault elsewhere.
const ASTRAY: u16 = 0x82;

/// What a faulting access reads.
const FAULT: i32 = 0xff;

const WRITES: i32 = 1 << 22;

/// R15: the vCPU. R14: random bits. R13: accesses checked.
fn guest() -> Vec<u8> {
    assemble(|a| {
        let mut again = a.create_label();
        let mut change = a.create_label();
        let mut one = a.create_label();
        let mut all = a.create_label();
        let mut each = a.create_label();
        let mut access = a.create_label();
        let mut read = a.create_label();
        let mut done = a.create_label();
        let mut compare = a.create_label();
        let mut faulted = a.create_label();
        let mut next = a.create_label();
        let mut fine = a.create_label();
        let at = |base: u64| base as i32;

        a.mov(r10, r15)?;
        a.shl(r10, 8)?;
        a.add(r10, at(LOWS))?;
        a.set_label(&mut again)?;
        for (left, by) in [(true, 13), (false, 7), (true, 17)] {
            a.mov(rax, r14)?;
            if left {
                a.shl(rax, by)?;
            } else {
                a.shr(rax, by)?;
            }
            a.xor(r14, rax)?;
        }
        a.mov(rax, r14)?;
        a.shr(rax, 20)?;
        a.test(al, 3)?;
        a.jz(change)?;

        // An access to what entry RBX translates, at RSI.
        a.mov(ebx, eax)?;
        a.shr(ebx, 8)?;
        a.and(ebx, (ENTRIES - 1) as i32)?;
        a.mov(rsi, qword_ptr(rbx * 8 + at(ADDRESSES)))?;
        a.test(eax, 3 << 16)?;
        a.jz(one)?;
        a.test(eax, 0x1f << 16)?;
        a.jp(access)?;
        a.test(eax, 0xf << 18)?;
        a.jz(all)?;
        a.jmp(access)?;
        a.set_label(&mut one)?;
        a.mov(rcx, qword_ptr(rbx * 8 + at(COUNTERS)))?;
        a.invlpg(byte_ptr(rsi))?;
        a.mov(qword_ptr(r10 + rbx * 8), rcx)?;
        a.jmp(access)?;
        a.set_label(&mut all)?;
        a.mov(ecx, (ENTRIES - 1) as i32)?;
        a.set_label(&mut each)?;
        a.mov(rdx, qword_ptr(rcx * 8 + at(COUNTERS)))?;
        a.mov(qword_ptr(r10 + rcx * 8), rdx)?;
        a.dec(ecx)?;
        a.jns(each)?;
        a.mov(rdx, cr3)?;
        a.mov(cr3, rdx)?;

        a.set_label(&mut access)?;
        a.lea(r11, qword_ptr(done))?;
        a.mov(r9d, eax)?;
        a.and(r9d, WRITES)?;
        a.jz(read)?;
        a.xor(eax, eax)?;
        a.lock().xadd(qword_ptr(rsi), rax)?;
        a.jmp(done)?;
        a.set_label(&mut read)?;
        a.mov(rax, qword_ptr(rsi))?;
        a.set_label(&mut done)?;
        // Is there such a generation from RCX to RDX?
        a.mov(rdx, qword_ptr(rbx * 8 + at(COUNTERS)))?;
        a.inc(rdx)?;
        a.mov(rcx, qword_ptr(r10 + rbx * 8))?;
        a.mov(rdi, rdx)?;
        a.sub(rdi, rcx)?;
        a.cmp(rdi, (KINDS - 1) as i32)?;
        a.jae(again)?;
        a.set_label(&mut compare)?;
        a.mov(edi, ecx)?;
        a.and(edi, (KINDS - 1) as i32)?;
        a.mov(ebp, edi)?;
        a.and(ebp, 7)?;
        a.cmp(eax, FAULT)?;
        a.je(faulted)?;
        a.cmp(edi, eax)?;
        a.jne(next)?;
        a.cmp(ebp, 7)?;
        a.je(next)?;
        a.test(r9d, r9d)?;
        a.jz(fine)?;
        a.cmp(ebp, 5)?;
        a.jne(fine)?;
        a.jmp(next)?;
        a.set_label(&mut faulted)?;
        a.cmp(ebp, 7)?;
        a.je(fine)?;
        a.test(r9d, r9d)?;
        a.jz(next)?;
        a.cmp(ebp, 5)?;
        a.je(fine)?;
        a.set_label(&mut next)?;
        a.inc(rcx)?;
        a.cmp(rcx, rdx)?;
        a.jbe(compare)?;
        a.out(i32::from(STALE), al)?;
        a.set_label(&mut fine)?;
        a.inc(r13)?;
        a.jmp(again)?;

        // One of this vCPU's entries goes to its next generation.
        a.set_label(&mut change)?;
        a.mov(ebx, eax)?;
        a.shr(ebx, 8)?;
        a.and(ebx, 3)?;
        a.lea(rbx, qword_ptr(rbx + r15 * 4))?;
        a.mov(rcx, qword_ptr(rbx * 8 + at(COUNTERS)))?;
        a.inc(rcx)?;
        a.mov(edx, ecx)?;
        a.and(edx, (KINDS - 1) as i32)?;
        a.mov(rdi, rbx)?;
        a.shl(rdi, 7)?;
        a.mov(rdx, qword_ptr(rdi + rdx * 8 + at(VALUES)))?;
        a.mov(rdi, qword_ptr(rbx * 8 + at(PLACES)))?;
        a.mov(qword_ptr(rdi), rdx)?;
        a.mov(qword_ptr(rbx * 8 + at(COUNTERS)), rcx)?;
        a.jmp(again)
    })
}

/// The access that faulted has read [`FAULT`].
fn handler(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut astray = a.create_label();
    a.mov(rax, cr2)?;
    a.cmp(rax, rsi)?;
    a.jne(astray)?;
    a.add(rsp, 8)?;
    a.mov(qword_ptr(rsp), r11)?;
    a.mov(eax, FAULT)?;
    a.iretq()?;
    a.set_label(&mut astray)?;
    a.out(i32::from(ASTRAY), al)
}

/// The rights of a generation.
fn flags(generation: u64) -> u64 {
    match generation % 8 {
        7 => 0,
        5 => 1,
        _ => 3,
    }
}

fn prepare(machine: &Machine) {
    let write = |at: u64, value: u64| machine.memory.write_u64(at, value);
    for generation in 0..KINDS {
        let page = PAGES + generation * 0x1000;
        let table = GENERATION_TABLES + generation * 0x1000;
        write(page, generation);
        write(table, page | 3);
        write(GENERATION_DIRECTORIES + generation * 0x1000, table | 3);
    }
    for vcpu in 0..VCPUS {
        let (table, directory) = (TABLE + vcpu * 0x1000, DIRECTORY + vcpu * 0x1000);
        let pdpte = PDPT + 16 * vcpu;
        let pml4 = PML4 + vcpu * 0x1000;
        write(pml4, machine.memory.read_u64(TABLES));
        write(pml4 + 8, PDPT | 3);
        write(pdpte, directory | 3);
        write(directory, table | 3);
        let window = WINDOW + (vcpu << 31);
        let under_test = [
            (table, window, PAGES),
            (table + 8, window + 0x1000, PAGES),
            (directory + 8, window + (2 << 20), GENERATION_TABLES),
            (pdpte + 8, window + (1 << 30), GENERATION_DIRECTORIES),
        ];
        for (n, (place, address, target)) in (4 * vcpu..).zip(under_test) {
            write(PLACES + 8 * n, place);
            write(ADDRESSES + 8 * n, address);
            for generation in 0..KINDS {
                let value = match (n % 4, generation) {
                    (2, 3) => LARGE | 1 << 7,
                    (2, 11) => (LARGE + (2 << 20)) | 1 << 7,
                    _ => target + generation * 0x1000,
                };
                let value = value | flags(generation);
                write(VALUES + n * 128 + generation * 8, value);
                if generation == 0 {
                    write(place, value);
                }
            }
        }
    }
    machine.gate(14, HANDLER);
    machine.code_at(HANDLER, handler);
}

/// The number of accesses of the vCPU that made the fewest.
fn stress(kvm: Kvm, length: Duration) -> u64 {
    let large = Memory::new(4 << 20);
    let mut machine = Machine::new_in(kvm, Irqchip::None, VCPUS, &guest());
    prepare(&machine);
    for generation in [3, 11] {
        large.write_u64((generation / 8) << 21, generation);
    }
    // SAFETY: the memory lives as long as the vCPUs run.
    unsafe {
        let region = large.region(1, LARGE);
        machine.vm.set_user_memory_region(region).unwrap();
    }
    for vcpu in 0..VCPUS {
        machine.long_mode(vcpu as usize);
        let fd = &machine.vcpus[vcpu as usize];
        let mut sregs = fd.get_sregs().unwrap();
        sregs.cr3 = PML4 + vcpu * 0x1000;
        fd.set_sregs(&sregs).unwrap();
        let mut regs = fd.get_regs().unwrap();
        regs.r15 = vcpu;
        regs.r14 = 0x9e37_79b9_7f4a_7c15 ^ (vcpu << 32);
        regs.rsp = STACKS + 0x1000 * (vcpu + 1);
        fd.set_regs(&regs).unwrap();
    }
    let vcpus = std::mem::take(&mut machine.vcpus);
    let ends = run_for(vcpus, || log_and_unlog(&machine, length));
    for (vcpu, (port, regs)) in ends.iter().enumerate() {
        let word = |at: u64| machine.memory.read_u64(at);
        let (low, place) = (LOWS + 256 * vcpu as u64, word(PLACES + 8 * regs.rbx));
        assert_eq!(
            *port,
            None,
            "vCPU {vcpu} found {:x} in entry {} of generations {:x} to {:x}; now {:x}: {regs:x?}",
            regs.rax,
            regs.rbx,
            word(low + 8 * regs.rbx),
            regs.rdx,
            word(place),
        );
    }
    let checked = ends.iter().map(|(_, regs)| regs.r13);
    println!("{} accesses checked", checked.clone().sum::<u64>());
    checked.min().unwrap()
}

/// Stresses for as long as it takes until every vCPU has made enough accesses: on a busy machine
/// some hardly run.
fn stress_until_enough(ept: bool) {
    let mut length = length();
    while stress(with_ept(ept), length) <= 10_000 {
        length *= 2;
        assert!(length < Duration::from_secs(100), "a vCPU hardly runs");
    }
}

/// Turns dirty logging on and off, which takes write access away, until the time is over.
fn log_and_unlog(machine: &Machine, length: Duration) {
    let start = Instant::now();
    while start.elapsed() < length {
        for flags in [KVM_MEM_LOG_DIRTY_PAGES, 0] {
            let mut region = machine.memory.region(0, 0);
            region.flags = flags;
            // SAFETY: the same memory with another flag.
            unsafe { machine.vm.set_user_memory_region(region).unwrap() };
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Runs vCPUs until `drive` returns; the port that each wrote to before, if it did, and registers.
fn run_for(vcpus: Vec<eptide_kvm::VcpuFd>, drive: impl FnOnce()) -> Vec<(Option<u16>, kvm_regs)> {
    let interrupters: Vec<_> = vcpus.iter().map(|vcpu| vcpu.interrupter()).collect();
    std::thread::scope(|scope| {
        let run = |mut vcpu: eptide_kvm::VcpuFd| {
            let port = match vcpu.run() {
                Ok(VcpuExit::IoOut(port, _)) => Some(port),
                Ok(other) => panic!("{other:?}"),
                Err(error) if error.errno() == libc::EINTR => None,
                Err(error) => panic!("{error:?}"),
            };
            (port, vcpu.get_regs().unwrap())
        };
        let threads: Vec<_> = vcpus
            .into_iter()
            .map(|vcpu| scope.spawn(move || run(vcpu)))
            .collect();
        drive();
        threads
            .into_iter()
            .map(|thread| {
                while !thread.is_finished() {
                    interrupters.iter().for_each(|vcpu| vcpu.interrupt());
                    std::thread::sleep(Duration::from_millis(1));
                }
                thread.join().unwrap()
            })
            .collect()
    })
}

fn length() -> Duration {
    let seconds = std::env::var("EPTIDE_STRESS_SECONDS").ok();
    let seconds = seconds.and_then(|seconds| seconds.parse().ok());
    Duration::from_secs_f64(seconds.unwrap_or(1.0))
}

#[test]
fn only_what_was_not_invalidated_is_stale_with_ept() {
    stress_until_enough(true);
}

#[test]
fn only_what_was_not_invalidated_is_stale_on_shadow_tables() {
    stress_until_enough(false);
}
