//! What exits cost, in nanoseconds and in null system calls.
//!
//! Every line is the best of several rounds: other load on the machine only adds.

#[path = "../tests/common/mod.rs"]
mod common;

use common::*;
use eptide_kvm::VcpuExit;
use std::time::Instant;
use vmm_sys_util::eventfd::EventFd;

/// The best nanoseconds per operation of several rounds.
fn best(rounds: usize, operations: u64, mut round: impl FnMut()) -> f64 {
    (0..rounds)
        .map(|_| {
            let start = Instant::now();
            round();
            start.elapsed().as_nanos() as f64 / operations as f64
        })
        .fold(f64::INFINITY, f64::min)
}

/// A system call that does nothing.
fn null_system_call() -> f64 {
    const CALLS: u64 = 20_000;
    best(10, CALLS, || {
        for _ in 0..CALLS {
            // SAFETY: no arguments and no effect.
            unsafe { libc::syscall(libc::SYS_getppid) };
        }
    })
}

/// The measurements, of those whose name holds the first argument that is no option.
struct Report {
    only: Option<String>,
}

impl Report {
    fn line(&self, name: &str, target: f64, measure: impl FnOnce() -> f64) {
        if self.only.as_ref().is_some_and(|only| !name.contains(only)) {
            return;
        }
        // Before and after: how fast the machine is changes from second to second.
        let before = null_system_call();
        let ns = measure();
        let null = before.min(null_system_call());
        let ratio = ns / null;
        let verdict = if ratio <= target { "" } else { "  MISSED" };
        println!(
            "{name:<44} {ns:>9.1} ns / {null:>5.1} ns = {ratio:>7.3} null calls (target {target}){verdict}"
        );
    }
}

/// A guest that repeats `body` for ever.
fn repeat(body: impl Fn(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    assemble(|a| {
        let mut again = a.create_label();
        a.mov(rbx, 0x4000_0000u64)?;
        a.set_label(&mut again)?;
        body(a)?;
        a.jmp(again)
    })
}

fn user_exits(code: &[u8]) -> f64 {
    const EXITS: u64 = 20_000;
    let mut machine = Machine::new(Irqchip::None, 1, code);
    best(10, EXITS, || {
        for _ in 0..EXITS {
            match machine.vcpu().run().unwrap() {
                VcpuExit::IoOut(..) | VcpuExit::MmioRead(..) => {}
                other => panic!("{other:?}"),
            }
        }
    })
}

fn inside(body: impl Fn(&mut CodeAssembler) -> Result<(), IcedError>) -> f64 {
    const EXITS: u64 = 50_000;
    let code = assemble(|a| {
        let mut again = a.create_label();
        let mut more = a.create_label();
        a.set_label(&mut more)?;
        a.mov(r12d, EXITS as i32)?;
        a.set_label(&mut again)?;
        body(a)?;
        a.dec(r12d)?;
        a.jnz(again)?;
        a.out(0x80, al)?;
        a.jmp(more)
    });
    let mut machine = Machine::new(Irqchip::Full, 1, &code);
    best(10, EXITS, || {
        machine.vcpu().run().unwrap();
    })
}

/// From an irqfd's signal to the handler of a guest that runs.
fn interrupt_latency() -> f64 {
    const APIC: i64 = 0xfee0_0000;
    let code = assemble(|a| {
        let mut wait = a.create_label();
        a.mov(rbx, APIC)?;
        a.mov(dword_ptr(rbx + 0xf0), 0x1ff)?;
        a.mov(rcx, 0xfec0_0000u64)?;
        a.mov(dword_ptr(rcx), 0x10 + 2 * 20)?;
        a.mov(dword_ptr(rcx + 0x10), 0x45)?;
        a.sti()?;
        a.set_label(&mut wait)?;
        a.inc(qword_ptr(0x5008))?;
        a.jmp(wait)
    });
    let mut machine = Machine::new(Irqchip::Full, 1, &code);
    machine.gate(0x45, 0x2000);
    machine.code_at(0x2000, |a| {
        a.inc(qword_ptr(0x5000))?;
        a.mov(dword_ptr(rbx + 0xb0), 0)?;
        a.iretq()
    });
    let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    machine.vm.register_irqfd(&line, 20).unwrap();
    let interrupter = machine.vcpu().interrupter();
    let at = machine.memory.base as usize;
    let read = move |offset: usize| {
        // SAFETY: the machine outlives the scope that reads.
        unsafe { ((at + offset) as *const u64).read_volatile() }
    };
    std::thread::scope(|scope| {
        let mut vcpu = machine.vcpus.pop().unwrap();
        scope.spawn(move || while vcpu.run().is_ok() {});
        while read(0x5008) == 0 {
            std::thread::yield_now();
        }
        let mut samples: Vec<_> = (0..300)
            .map(|_| {
                let before = read(0x5000);
                let start = Instant::now();
                line.write(1).unwrap();
                while read(0x5000) == before {
                    std::hint::spin_loop();
                }
                start.elapsed().as_nanos() as f64
            })
            .collect();
        interrupter.interrupt();
        samples.sort_by(f64::total_cmp);
        samples[samples.len() / 2]
    })
}

fn main() {
    let report = Report {
        only: std::env::args().skip(1).find(|arg| !arg.starts_with('-')),
    };
    report.line("port write, exit to the caller and back", 1.0, || {
        user_exits(&repeat(|a| a.out(0x80, al)))
    });
    report.line("MMIO read, exit to the caller and back", 1.5, || {
        user_exits(&repeat(|a| a.mov(eax, dword_ptr(rbx))))
    });
    report.line("CPUID, handled inside", 0.3, || inside(|a| a.cpuid()));
    report.line("RDMSR, handled inside", 0.3, || {
        inside(|a| {
            a.mov(ecx, 0x1a0)?;
            a.rdmsr()
        })
    });
    report.line(
        "irqfd to the handler, vCPU running (median)",
        100.0,
        interrupt_latency,
    );
}
