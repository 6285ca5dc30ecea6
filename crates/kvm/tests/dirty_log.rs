//! The dirty log by page-modification logging and by write protection: the same answers.

mod common;

use common::*;
use eptide_kvm::{Kvm, Options, VcpuExit};
use kvm_bindings::*;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};

/// Where the logged slot is, and its pages.
const LOGGED: u64 = 0x4000_0000;
const PAGES: u64 = 2048;

/// A machine with a second, logged slot.
fn machine(pml: bool, code: &[u8]) -> (Machine, Memory) {
    let kvm = Kvm::with_options(Options::default().with_pml(pml));
    let vm = kvm.create_vm().unwrap();
    let machine = Machine::on(kvm, vm, Irqchip::None, 1, code);
    let memory = Memory::new((PAGES << 12) as usize);
    let mut region = memory.region(1, LOGGED);
    region.flags = KVM_MEM_LOG_DIRTY_PAGES;
    // SAFETY: the caller keeps the memory as long as the machine.
    unsafe { machine.vm.set_user_memory_region(region).unwrap() };
    (machine, memory)
}

/// The pages in the log, which is cleared.
fn dirty_pages(machine: &Machine) -> BTreeSet<u64> {
    let log = machine.vm.get_dirty_log(1, (PAGES << 12) as usize).unwrap();
    let bits = |(i, word): (usize, &u64)| {
        let (i, word) = (i as u64, *word);
        (0..64)
            .filter(move |bit| word >> bit & 1 != 0)
            .map(move |bit| i * 64 + bit)
    };
    log.iter().enumerate().flat_map(bits).collect()
}

/// Reads and writes pages of the logged slot chosen by a generator in R8, R9 times, then stops;
/// again and again.
fn wanderer() -> Vec<u8> {
    assemble(|a| {
        let (mut again, mut read, mut next) =
            (a.create_label(), a.create_label(), a.create_label());
        a.mov(rsi, LOGGED)?;
        a.set_label(&mut again)?;
        // xorshift64
        a.mov(rax, r8)?;
        a.shl(rax, 13)?;
        a.xor(r8, rax)?;
        a.mov(rax, r8)?;
        a.shr(rax, 7)?;
        a.xor(r8, rax)?;
        a.mov(rax, r8)?;
        a.shl(rax, 17)?;
        a.xor(r8, rax)?;
        a.mov(rax, r8)?;
        a.and(eax, (PAGES - 1) as i32)?;
        a.shl(rax, 12)?;
        a.bt(r8, 40)?;
        a.jc(read)?;
        a.inc(qword_ptr(rsi + rax))?;
        a.jmp(next)?;
        a.set_label(&mut read)?;
        a.mov(rbx, qword_ptr(rsi + rax))?;
        a.set_label(&mut next)?;
        a.dec(r9)?;
        a.jnz(again)?;
        stop(a)?;
        a.jmp(again)
    })
}

/// The pages that the guest writes from a state of the generator on, and the state after it.
fn written(mut state: u64, steps: u64) -> (BTreeSet<u64>, u64) {
    let mut pages = BTreeSet::new();
    for _ in 0..steps {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        if state >> 40 & 1 == 0 {
            pages.insert(state & (PAGES - 1));
        }
    }
    (pages, state)
}

#[test]
fn both_methods_report_what_was_written() {
    for pml in [true, false] {
        let (mut machine, memory) = machine(pml, &wanderer());
        let mut state = 0x1234_5678_9abc_def1;
        for steps in [1, 40, 3000, 7, 20_000, 500] {
            let mut regs = machine.vcpu().get_regs().unwrap();
            (regs.r8, regs.r9) = (state, steps);
            machine.vcpu().set_regs(&regs).unwrap();
            runs_to_stop(&mut machine);
            let (expected, after) = written(state, steps);
            assert_eq!(dirty_pages(&machine), expected, "{steps} steps, PML {pml}");
            state = after;
        }
        assert!(dirty_pages(&machine).is_empty());
        drop(machine);
        drop(memory);
    }
}

/// Where pages go in turns to a reader of the log: every write is in a log that is read after it.
#[test]
fn no_write_is_missed_while_the_log_is_read() {
    let code = assemble(|a| {
        let (mut again, mut page) = (a.create_label(), a.create_label());
        a.set_label(&mut again)?;
        a.mov(rsi, LOGGED)?;
        a.mov(ecx, 64)?;
        a.inc(r12)?;
        a.set_label(&mut page)?;
        a.mov(qword_ptr(rsi), r12)?;
        a.add(rsi, 0x1000)?;
        a.dec(ecx)?;
        a.jnz(page)?;
        a.cmp(dword_ptr(0x5000), 0)?;
        a.je(again)?;
        stop(a)
    });
    for pml in [true, false] {
        let (mut machine, memory) = machine(pml, &code);
        let mut vcpu = machine.vcpus.pop().unwrap();
        let done = AtomicBool::new(false);
        let value = |page: u64| memory.read_u64(page << 12);
        let mut copies = [0; 64];
        std::thread::scope(|scope| {
            let done = &done;
            scope.spawn(move || {
                let exit = vcpu.run().unwrap();
                assert!(matches!(exit, VcpuExit::IoOut(0x80, _)), "{exit:?}");
                done.store(true, Ordering::SeqCst);
            });
            for round in 0..400 {
                if round == 300 {
                    machine.memory.write_u64(0x5000, 1);
                }
                let before: Vec<u64> = (0..64).map(value).collect();
                let log = dirty_pages(&machine);
                for page in 0..64 {
                    if log.contains(&page) {
                        copies[page as usize] = value(page);
                    } else {
                        // Not in the log: what was there before it was read has been copied.
                        assert!(
                            before[page as usize] <= copies[page as usize],
                            "page {page}"
                        );
                    }
                }
            }
        });
        assert!(done.load(Ordering::SeqCst));
        for page in dirty_pages(&machine) {
            copies[page as usize] = value(page);
        }
        let now: Vec<u64> = (0..64).map(value).collect();
        assert_eq!(now, copies, "PML {pml}");
        drop(machine);
    }
}
