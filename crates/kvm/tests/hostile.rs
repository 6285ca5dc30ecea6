//! Random sequences of ioctls with random arguments, from several threads, on one VM.
//!
//! Nothing may panic, abort, hang or touch memory that was not named. `EPTIDE_HOSTILE_SECONDS`
//! sets the length, `EPTIDE_HOSTILE_SEED` replays a run (of one thread: two interleave).

mod common;

use common::*;
use eptide_kvm::ioctl::{Answer, Direction, Kind, Object, TABLE, ioctl};
use eptide_kvm::{Kvm, VcpuFd, VmFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// xorshift64*.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// Numbers of the kind that break things.
    fn value(&mut self) -> u64 {
        match self.below(8) {
            0 => 0,
            1 => u64::MAX,
            2 => 1 << self.below(64),
            3 => self.below(32),
            4 => 0xfee0_0000 + self.below(0x1000),
            5 => self.below(1 << 32),
            6 => self.below(0x1000) << 12,
            _ => self.next(),
        }
    }
}

/// Bytes of an argument: mostly odd numbers, sometimes nothing.
fn fill(random: &mut Random, buffer: &mut [u64]) {
    let zero = random.below(4) == 0;
    for word in buffer.iter_mut() {
        *word = if zero || random.below(2) == 0 {
            0
        } else {
            random.value()
        };
    }
}

/// Keeps what a structure names inside what the test owns: guest memory in `memory`, and no
/// descriptor of the test process.
fn tame(name: &str, buffer: &mut [u64], memory: &Memory, random: &mut Random) {
    match name {
        "KVM_SET_USER_MEMORY_REGION" | "KVM_SET_USER_MEMORY_REGION2" => {
            let base = memory.base as u64;
            buffer[0] &= 0x3_0000_0007;
            if random.below(4) != 0 {
                buffer[1] &= 0xffff_f000;
                buffer[2] &= (memory.size as u64 - 1) & !0xfff;
                buffer[3] = base;
            } else {
                // Nothing is there.
                buffer[3] = 0x1000;
                buffer[2] &= 0xf000;
            }
        }
        "KVM_IRQFD" => {
            buffer[0] = 0xffff_ffff;
            buffer[1] = u64::MAX;
        }
        "KVM_IOEVENTFD" => buffer[2] |= 0xffff_ffff_0000_0000,
        // Pointers inside structures: the kernel rejects bad ones; good ones must be ours.
        "KVM_GET_DIRTY_LOG" => buffer[1] = 0x10,
        "KVM_GET_DEVICE_ATTR" => buffer[2] = 0x10,
        "EPTIDE_GET_ACCESS" => buffer[2] = 0x10,
        _ => {}
    }
}

fn one_call(random: &mut Random, kvm: &Kvm, vm: &VmFd, vcpus: &[VcpuFd], memory: &Memory) {
    let row = &TABLE[random.below(TABLE.len() as u64) as usize];
    let object = match row.kind {
        Kind::System => Object::System(kvm),
        Kind::Vm => Object::Vm(vm),
        Kind::Vcpu => Object::Vcpu(&vcpus[random.below(vcpus.len() as u64) as usize]),
    };
    let mut buffer = vec![0u64; 2048];
    fill(random, &mut buffer);
    tame(row.name, &mut buffer, memory, random);
    let argument = match (row.direction, random.below(16)) {
        (Direction::None, _) if row.name == "KVM_REINJECT_CONTROL" => buffer.as_ptr() as u64,
        (Direction::None, _) => random.value(),
        // A read or write past the end of what is mapped.
        (_, 0) => 0,
        (_, 1) => random.next() | 1 << 63,
        _ => buffer.as_mut_ptr() as u64,
    };
    if let Ok(Answer::Vm(_)) = ioctl(object, row.request(), argument) {
        // Dropped at once: creation and destruction beside everything else.
    }
}

#[test]
fn random_calls_from_two_threads() {
    let seconds = std::env::var("EPTIDE_HOSTILE_SECONDS")
        .ok()
        .and_then(|s| s.parse().ok());
    let length = Duration::from_secs_f64(seconds.unwrap_or(1.5));
    let seed = std::env::var("EPTIDE_HOSTILE_SEED")
        .ok()
        .and_then(|s| s.parse().ok());
    let seed = seed.unwrap_or_else(|| {
        std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap()
            .as_nanos() as u64
    });
    println!("seed {seed}");
    let start = Instant::now();
    let mut round = 0;
    while start.elapsed() < length {
        hostile_round(seed.wrapping_add(round), Duration::from_millis(150));
        round += 1;
    }
}

fn hostile_round(seed: u64, length: Duration) {
    let code = assemble(|a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.inc(qword_ptr(0x5000))?;
        a.out(0x10, al)?;
        a.cpuid()?;
        a.jmp(again)
    });
    let chip = match seed % 3 {
        0 => Irqchip::None,
        1 => Irqchip::Full,
        _ => Irqchip::Split,
    };
    let machine = Machine::new(chip, 2, &code);
    let memory = Memory::new(1 << 20);
    let stop = AtomicBool::new(false);
    let interrupters: Vec<_> = machine
        .vcpus
        .iter()
        .map(|vcpu| vcpu.interrupter())
        .collect();
    let failures = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..2)
            .map(|n| {
                let (machine, memory, stop, failures) = (&machine, &memory, &stop, &failures);
                scope.spawn(move || {
                    let mut random = Random(seed.wrapping_mul(2).wrapping_add(n) | 1);
                    let calls = std::panic::AssertUnwindSafe(|| {
                        while !stop.load(Ordering::Relaxed) {
                            one_call(
                                &mut random,
                                &machine.kvm,
                                &machine.vm,
                                &machine.vcpus,
                                memory,
                            );
                        }
                    });
                    if std::panic::catch_unwind(calls).is_err() {
                        failures.lock().unwrap().push(n);
                    }
                })
            })
            .collect();
        let start = Instant::now();
        while threads.iter().any(|thread| !thread.is_finished()) {
            if start.elapsed() > length {
                stop.store(true, Ordering::Relaxed);
            }
            assert!(
                start.elapsed() < Duration::from_secs(30),
                "a call hangs (seed {seed})"
            );
            interrupters
                .iter()
                .for_each(|interrupter| interrupter.interrupt());
            std::thread::sleep(Duration::from_micros(500));
        }
    });
    assert!(failures.into_inner().unwrap().is_empty(), "seed {seed}");
}
