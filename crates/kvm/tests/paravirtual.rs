//! Paravirtual features, by guests that use them.

mod common;

use common::*;
use eptide_kvm as kvm;
use kvm::VcpuExit;
use kvm_bindings::*;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::time::{Duration, Instant};

const STEAL_TIME: u32 = 0x4b56_4d03;
const PV_EOI: u32 = 0x4b56_4d04;
const RECORD: u64 = 0x6000;
const PREEMPTED: u64 = RECORD + 16;
const FLUSH: u8 = 2;

fn wrmsr(a: &mut CodeAssembler, index: u32, value: u64) -> Result<(), IcedError> {
    a.mov(ecx, index)?;
    a.mov(eax, value as u32)?;
    a.mov(edx, (value >> 32) as u32)?;
    a.wrmsr()
}

fn byte(machine: &Machine, at: u64) -> &AtomicU8 {
    assert!((at as usize) < machine.memory.size);
    // SAFETY: inside the machine's memory, which it borrows.
    unsafe { AtomicU8::from_ptr(machine.memory.base.add(at as usize)) }
}

/// Runs a vCPU on a thread of its own while `drive` has the machine, then stops it.
fn with_second(machine: &mut Machine, drive: impl FnOnce(&mut Machine)) -> kvm::VcpuFd {
    let mut second = machine.vcpus.pop().unwrap();
    let interrupter = second.interrupter();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let done = &done;
        let thread = scope.spawn(move || {
            while !done.load(Ordering::SeqCst) {
                match second.run() {
                    Ok(VcpuExit::IoOut(0x81, _)) => break,
                    Ok(exit) => panic!("{exit:?}"),
                    Err(error) => assert!([libc::EAGAIN, libc::EINTR].contains(&error.errno())),
                }
            }
            second
        });
        drive(machine);
        done.store(true, Ordering::SeqCst);
        while !thread.is_finished() {
            interrupter.interrupt();
            std::thread::sleep(Duration::from_millis(1));
        }
        thread.join().unwrap()
    })
}

fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(20), "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn interrupts_end_without_an_exit() {
    const ROUNDS: u32 = 10;
    let code = assemble(|a| {
        let mut again = a.create_label();
        enable_apic(a)?;
        wrmsr(a, PV_EOI, 0x5100 | 1)?;
        a.mov(r12d, ROUNDS)?;
        a.sti()?;
        a.set_label(&mut again)?;
        a.mov(dword_ptr(rbx + 0x300), 0x4_4041)?; // self-IPI, vector 0x41
        a.nop()?;
        a.dec(r12d)?;
        a.jnz(again)?;
        a.cli()?;
        a.cpuid()?; // an exit, which collects the last end of interrupt
        stop(a)
    });
    let mut machine = Machine::new(Irqchip::Full, 1, &code);
    machine.gate(0x41, 0x2000);
    machine.code_at(0x2000, |a| {
        let mut by_flag = a.create_label();
        a.inc(dword_ptr(0x5000))?;
        a.btr(dword_ptr(0x5100), 0u32)?;
        a.jc(by_flag)?;
        a.inc(dword_ptr(0x5008))?;
        a.mov(dword_ptr(rbx + 0xb0), 0)?;
        a.set_label(&mut by_flag)?;
        a.iretq()
    });
    runs_to_stop(&mut machine);
    assert_eq!(machine.memory.read_u64(0x5000), ROUNDS as u64);
    assert_eq!(machine.memory.read_u64(0x5008), 0, "ended by a write");
    let lapic = machine.vcpu().get_lapic().unwrap();
    assert!(
        lapic.regs[0x100..0x280].iter().all(|&b| b == 0),
        "in service"
    );
    assert_eq!(machine.memory.read_u64(0x5100), 0);
}

#[test]
fn the_paravirtual_end_of_interrupt_is_not_offered_to_the_first_of_two() {
    // Two interrupts at once: the end of the first must let the second in at once.
    let code = assemble(|a| {
        enable_apic(a)?;
        wrmsr(a, PV_EOI, 0x5100 | 1)?;
        a.mov(dword_ptr(rbx + 0x300), 0x4_4041)?;
        a.mov(dword_ptr(rbx + 0x300), 0x4_4051)?;
        a.sti()?;
        a.nop()?;
        a.nop()?;
        a.cli()?;
        stop(a)
    });
    let mut machine = Machine::new(Irqchip::Full, 1, &code);
    for (vector, at, counter) in [(0x41, 0x2000, 0x5000), (0x51, 0x2100, 0x5008)] {
        machine.gate(vector, at);
        machine.code_at(at, |a| {
            let mut by_flag = a.create_label();
            a.inc(dword_ptr(counter))?;
            a.btr(dword_ptr(0x5100), 0u32)?;
            a.jc(by_flag)?;
            a.mov(dword_ptr(rbx + 0xb0), 0)?;
            a.set_label(&mut by_flag)?;
            a.iretq()
        });
    }
    runs_to_stop(&mut machine);
    assert_eq!(machine.memory.read_u64(0x5000), 1);
    assert_eq!(machine.memory.read_u64(0x5008), 1);
}

#[test]
fn a_kick_before_the_halt_is_not_lost() {
    // KVM_HC_KICK_CPU of the own APIC ID, then HLT with interrupts disabled.
    let code = assemble(|a| {
        a.mov(eax, 5)?;
        a.xor(ebx, ebx)?;
        a.xor(ecx, ecx)?;
        a.vmcall()?;
        a.mov(r8, rax)?;
        a.hlt()?;
        stop(a)
    });
    let mut machine = Machine::new(Irqchip::Full, 1, &code);
    runs_to_stop(&mut machine);
    assert_eq!(machine.vcpu().get_regs().unwrap().r8, 0);
}

#[test]
fn hypercalls_send_interrupts_and_refuse_what_they_must() {
    let code = assemble(|a| {
        enable_apic(a)?;
        // KVM_HC_SEND_IPI: APIC 0, vector 0x41.
        a.mov(eax, 10)?;
        a.mov(ebx, 1)?;
        a.xor(ecx, ecx)?;
        a.xor(edx, edx)?;
        a.mov(esi, 0x41)?;
        a.sti()?;
        a.vmcall()?;
        a.cli()?;
        a.mov(r8, rax)?;
        a.mov(eax, 11)?; // yield
        a.vmcall()?;
        a.mov(r9, rax)?;
        a.mov(eax, 99)?;
        a.vmcall()?;
        a.mov(r10, rax)?;
        stop(a)
    });
    let mut machine = Machine::new(Irqchip::Full, 1, &code);
    machine.gate(0x41, 0x2000);
    machine.code_at(0x2000, |a| {
        a.inc(dword_ptr(0x5000))?;
        a.iretq()
    });
    runs_to_stop(&mut machine);
    assert_eq!(machine.memory.read_u64(0x5000), 1);
    let regs = machine.vcpu().get_regs().unwrap();
    assert_eq!((regs.r8, regs.r9, regs.r10 as i64), (1, 0, -1000));
}

#[test]
fn hypercalls_exit_where_user_space_asks() {
    let code = assemble(|a| {
        a.mov(eax, 12)?; // KVM_HC_MAP_GPA_RANGE
        a.mov(ebx, 0x7000)?;
        a.mov(ecx, 1)?;
        a.mov(edx, 2)?;
        a.vmcall()?;
        stop(a)
    });
    let mut machine = Machine::new(Irqchip::None, 1, &code);
    enable(&machine.vm, KVM_CAP_EXIT_HYPERCALL, 1 << 12).unwrap();
    match machine.vcpu().run().unwrap() {
        VcpuExit::Hypercall(call) => {
            assert_eq!((call.nr, &call.args[..3]), (12, &[0x7000, 1, 2][..]));
            *call.ret = 77;
        }
        other => panic!("{other:?}"),
    }
    runs_to_stop(&mut machine);
    assert_eq!(machine.vcpu().get_regs().unwrap().rax, 77);
}

#[test]
fn stolen_time_is_told() {
    let code = assemble(|a| {
        let mut spin = a.create_label();
        enable_apic(a)?;
        wrmsr(a, STEAL_TIME, RECORD | 1)?;
        // A periodic timer, so that the record is looked after.
        a.mov(dword_ptr(rbx + 0x3e0), 0xb)?;
        a.mov(dword_ptr(rbx + 0x320), 0x2_0041)?;
        a.mov(dword_ptr(rbx + 0x380), 1_000_000)?;
        a.sti()?;
        a.set_label(&mut spin)?;
        a.pause()?;
        a.cmp(dword_ptr(0x5008), 0)?;
        a.je(spin)?;
        stop(a)
    });
    let mut machine = Machine::new(Irqchip::Full, 1, &code);
    machine.gate(0x41, 0x2000);
    machine.code_at(0x2000, |a| {
        a.mov(dword_ptr(rbx + 0xb0), 0)?;
        a.iretq()
    });
    let (base, stop_spinning) = (machine.memory.base as usize, AtomicBool::new(false));
    // SAFETY: inside the machine's memory, which outlives the scope below.
    let word = |at: u64| unsafe { ((base + at as usize) as *mut u64).read_volatile() };
    let cores = std::thread::available_parallelism().unwrap().get();
    std::thread::scope(|scope| {
        for _ in 0..2 * cores {
            scope.spawn(|| {
                while !stop_spinning.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
        }
        scope.spawn(|| {
            let start = Instant::now();
            while word(RECORD) == 0 && start.elapsed() < Duration::from_secs(20) {
                std::thread::sleep(Duration::from_millis(1));
            }
            stop_spinning.store(true, Ordering::Relaxed);
            // SAFETY: as above.
            unsafe { ((base + 0x5008) as *mut u64).write_volatile(1) };
        });
        runs_to_stop(&mut machine);
    });
    assert_ne!(machine.memory.read_u64(RECORD), 0);
    let version = machine.memory.read_u64(RECORD + 8) as u32;
    assert!(version != 0 && version & 1 == 0);
}

#[test]
fn a_sleeping_processor_flushes_when_it_wakes() {
    /// The page-directory entry of linear address 2 MiB.
    const ENTRY: u64 = 0x1_2000 + 8;
    let code = assemble(|a| {
        let mut wait = a.create_label();
        a.set_label(&mut wait)?;
        a.pause()?;
        a.cmp(byte_ptr(PREEMPTED), 1)?;
        a.jne(wait)?;
        // As a remote flush: the table changes, then the flush is left to be made.
        a.mov(qword_ptr(ENTRY), 0)?;
        a.lock().or(byte_ptr(PREEMPTED), FLUSH as i32)?;
        enable_apic(a)?;
        a.mov(dword_ptr(rbx + 0x310), 1 << 24)?;
        a.mov(dword_ptr(rbx + 0x300), 0x4041)?; // wakes the second
        stop(a)
    });
    let mut machine = Machine::new(Irqchip::Full, 2, &code);
    machine.gate(0x41, 0x2000);
    machine.code_at(0x2000, |a| a.iretq());
    machine.long_mode(1);
    let regs = machine.vcpus[1].get_regs().unwrap();
    let state = kvm_mp_state {
        mp_state: KVM_MP_STATE_RUNNABLE,
    };
    machine.vcpus[1].set_mp_state(state).unwrap();
    machine.vcpus[1]
        .set_regs(&kvm_regs {
            rip: 0x3000,
            rsp: 0x7000,
            ..regs
        })
        .unwrap();
    machine.code_at(0x3000, |a| {
        enable_apic(a)?;
        wrmsr(a, STEAL_TIME, RECORD | 1)?;
        a.mov(eax, dword_ptr(0x20_4000))?; // linear 0x204000 is physical 0x4000
        a.sti()?;
        a.hlt()?;
        a.mov(edx, dword_ptr(0x20_4000))?;
        a.out(0x81, al)
    });
    machine.memory.write_u64(0x4000, 0x1111);
    machine.memory.write_u64(ENTRY, 0x87);
    machine.gate(14, 0x2100);
    machine.code_at(0x2100, |a| {
        a.mov(dword_ptr(0x5010), 14)?;
        a.out(0x81, al)
    });
    let second = with_second(&mut machine, |machine| {
        runs_to_stop(machine);
        wait_for("no page fault after the flush", || {
            machine.memory.read_u64(0x5010) == 14
        });
        assert_eq!(byte(machine, PREEMPTED).load(Ordering::SeqCst), 0);
    });
    assert_eq!(second.get_regs().unwrap().rax, 0x1111);
}
