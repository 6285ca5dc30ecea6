//! Four vCPUs on shared memory and a device, while slots move and the log is read.
//!
//! `EPTIDE_STRESS_SECONDS` sets the length; the default keeps a test run short.

mod common;

use common::*;
use eptide_kvm::VcpuExit;
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const VCPUS: u64 = 4;
/// Counters that all vCPUs add to.
const COUNTERS: u64 = 0x10_0000;
const PAGES: u64 = 16;
/// A slot that comes and goes; accesses to it go to memory or to user space.
const MOVING: u64 = 0x4000_0000;

/// Each vCPU adds to shared counters with LOCK, writes its own counter to the device, and touches
/// the page that comes and goes.
fn guest() -> Vec<u8> {
    assemble(|a| {
        let mut again = a.create_label();
        let mut page = a.create_label();
        // RDI: own counter in the device; RSI: the page that moves.
        a.mov(rsi, MOVING)?;
        a.xor(r12, r12)?;
        a.set_label(&mut again)?;
        a.mov(rbx, COUNTERS)?;
        a.mov(ecx, PAGES as i32)?;
        a.set_label(&mut page)?;
        a.lock().inc(qword_ptr(rbx))?;
        a.add(rbx, 0x1000)?;
        a.dec(ecx)?;
        a.jnz(page)?;
        a.inc(r12)?;
        a.mov(qword_ptr(rdi), r12)?;
        a.mov(rax, qword_ptr(rsi))?;
        a.jmp(again)
    })
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}

#[test]
fn nothing_is_lost_doubled_or_leaked() {
    let seconds = std::env::var("EPTIDE_STRESS_SECONDS")
        .ok()
        .and_then(|s| s.parse().ok());
    let length = Duration::from_secs_f64(seconds.unwrap_or(2.0));
    // The watch thread is the process's own and stays.
    drop(Machine::new(Irqchip::Full, 1, &guest()));
    let before = (descriptors(), threads());
    for _ in 0..2 {
        round(length / 2);
    }
    // In a program with other tests, theirs were counted before, and are gone.
    let after = (descriptors(), threads());
    assert!(
        after.0 <= before.0 && after.1 <= before.1,
        "descriptors and threads: {before:?}, then {after:?}"
    );
}

fn round(length: Duration) {
    let mut machine = Machine::new(Irqchip::None, VCPUS, &guest());
    let extra = Memory::new(1 << 16);
    for id in 0..VCPUS {
        machine.long_mode(id as usize);
        let vcpu = &machine.vcpus[id as usize];
        let mut regs = vcpu.get_regs().unwrap();
        regs.rdi = 0x5000_0000 + id * 0x1000;
        vcpu.set_regs(&regs).unwrap();
    }
    let stop = AtomicBool::new(false);
    let iterations: Vec<AtomicU64> = (0..VCPUS).map(|_| AtomicU64::new(0)).collect();
    let vcpus: Vec<_> = machine.vcpus.drain(..).collect();
    let interrupters: Vec<_> = vcpus.iter().map(|vcpu| vcpu.interrupter()).collect();
    let machine = &machine;
    std::thread::scope(|scope| {
        let threads: Vec<_> = vcpus
            .into_iter()
            .zip(&iterations)
            .map(|(mut vcpu, iterations)| {
                let stop = &stop;
                scope.spawn(move || {
                    let mut expected = 1;
                    while !stop.load(Ordering::Relaxed) {
                        match vcpu.run() {
                            Ok(VcpuExit::MmioWrite(gpa, data)) if gpa >= 0x5000_0000 => {
                                let value = u64::from_le_bytes(data.try_into().unwrap());
                                assert_eq!(value, expected, "lost or doubled write");
                                expected += 1;
                            }
                            Ok(VcpuExit::MmioRead(gpa, data)) if gpa == MOVING => data.fill(0),
                            Ok(other) => panic!("{other:?}"),
                            Err(error) => assert_eq!(error.errno(), libc::EINTR),
                        }
                    }
                    iterations.store(expected, Ordering::Relaxed);
                    // The register counts rounds of which all counters were added to, but for the
                    // one under way.
                    vcpu.get_regs().unwrap().r12
                })
            })
            .collect();
        disturb(machine, &extra, length);
        stop.store(true, Ordering::Relaxed);
        let mut rounds = 0;
        for thread in threads {
            while !thread.is_finished() {
                interrupters
                    .iter()
                    .for_each(|interrupter| interrupter.interrupt());
                std::thread::sleep(Duration::from_millis(1));
            }
            rounds += thread.join().unwrap();
        }
        for page in 0..PAGES {
            let count = machine.memory.read_u64(COUNTERS + page * 0x1000);
            assert!(
                (rounds..=rounds + VCPUS).contains(&count),
                "page {page}: {count} additions in {rounds} rounds"
            );
        }
        assert!(rounds > 100, "the guests hardly ran: {rounds}");
    });
}

/// Moves a slot in and out and reads the dirty log until the time is over.
fn disturb(machine: &Machine, extra: &Memory, length: Duration) {
    let vm = &machine.vm;
    let start = Instant::now();
    let mut turn = 0u32;
    while start.elapsed() < length {
        let present = turn.is_multiple_of(2);
        let region = if present {
            extra.region(1, MOVING)
        } else {
            kvm_userspace_memory_region {
                memory_size: 0,
                ..extra.region(1, MOVING)
            }
        };
        // SAFETY: the memory lives until the machine's vCPUs have stopped.
        unsafe { vm.set_user_memory_region(region).unwrap() };
        let mut logged = machine.memory.region(0, 0);
        logged.flags = if turn % 8 < 4 {
            KVM_MEM_LOG_DIRTY_PAGES
        } else {
            0
        };
        // SAFETY: the same memory with another flag.
        unsafe { vm.set_user_memory_region(logged).unwrap() };
        if logged.flags != 0 {
            vm.get_dirty_log(0, MEMORY).unwrap();
        }
        turn += 1;
        if turn.is_multiple_of(16) {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
