//! Code that somebody else writes: the VMM, and the kernel for it, as a device's DMA does.

mod common;

use common::*;
use std::os::fd::FromRawFd;
use vmm_sys_util::eventfd::EventFd;

/// Where the function is that changes.
const FUNCTION: u64 = 0x18_0000;

/// MOV EAX, `value`; RET.
fn function(value: u8) -> [u8; 6] {
    [0xb8, value, 0, 0, 0, 0xc3]
}

/// Has the kernel write guest memory, as a read from a disk does.
fn write_by_kernel(machine: &Machine, at: u64, bytes: &[u8]) {
    assert!(at as usize + bytes.len() <= machine.memory.size);
    // SAFETY: a pipe's two ends, and room for the bytes in the machine's own memory.
    unsafe {
        let mut ends = [0; 2];
        assert_eq!(libc::pipe(ends.as_mut_ptr()), 0);
        let [from, to] = ends.map(|end| std::fs::File::from_raw_fd(end));
        let written = libc::write(
            std::os::fd::AsRawFd::as_raw_fd(&to),
            bytes.as_ptr().cast(),
            bytes.len(),
        );
        assert_eq!(written, bytes.len() as isize);
        let read = libc::read(
            std::os::fd::AsRawFd::as_raw_fd(&from),
            machine.memory.base.add(at as usize).cast(),
            bytes.len(),
        );
        assert_eq!(read, bytes.len() as isize);
    }
}

/// Between two runs.
#[test]
fn code_changes_while_the_vmm_has_control() {
    let code = assemble(|a| {
        let mut again = a.create_label();
        a.mov(rbx, FUNCTION)?;
        a.set_label(&mut again)?;
        a.mov(ecx, 1000)?;
        let mut inner = a.create_label();
        a.set_label(&mut inner)?;
        a.call(rbx)?;
        a.dec(ecx)?;
        a.jnz(inner)?;
        stop(a)?;
        a.jmp(again)
    });
    let mut machine = Machine::new(Irqchip::None, 1, &code);
    for value in 1..20 {
        if value % 2 == 0 {
            machine.memory.write(FUNCTION, &function(value));
        } else {
            write_by_kernel(&machine, FUNCTION, &function(value));
        }
        runs_to_stop(&mut machine);
        assert_eq!(machine.vcpu().get_regs().unwrap().rax, u64::from(value));
    }
}

/// While the guest runs: it is told by an interrupt, as a driver is when a block has been read. One
/// vCPU takes the interrupt, and another hears of it through memory.
#[test]
fn code_changes_before_an_interrupt() {
    const VALUE: u64 = 0x5000;
    const TICKET: u64 = 0x5008;
    const SEEN: u64 = 0x5010;
    const READY: u64 = 0x5040;
    // Who did not take the interrupt itself may be a few instructions late.
    let caller = |a: &mut CodeAssembler, seen: u64| {
        let mut again = a.create_label();
        let mut wait = a.create_label();
        a.mov(rbx, FUNCTION)?;
        a.set_label(&mut again)?;
        a.call(rbx)?; // it is in use all the time
        a.mov(rdx, qword_ptr(TICKET))?;
        a.cmp(rdx, qword_ptr(seen))?;
        a.je(again)?;
        let mut late = a.create_label();
        a.set_label(&mut late)?;
        a.call(rbx)?;
        if seen != SEEN {
            a.cmp(rax, rdx)?;
            a.jne(late)?;
        }
        a.mov(qword_ptr(VALUE + 0x100 + seen - SEEN), rax)?;
        a.mov(qword_ptr(seen), rdx)?;
        a.set_label(&mut wait)?;
        a.cmp(rdx, 10)?;
        a.jne(again)?;
        stop(a)
    };
    let code = assemble(|a| {
        enable_apic(a)?;
        a.mov(rcx, 0xfec0_0000u64)?;
        a.mov(dword_ptr(rcx), 0x10 + 2 * 20)?;
        a.mov(dword_ptr(rcx + 0x10), 0x45)?; // GSI 20: edge, vector 0x45
        a.sti()?;
        a.mov(qword_ptr(READY), 1)?;
        caller(a, SEEN)
    });
    let mut machine = Machine::new(Irqchip::Full, 2, &code);
    machine.gate(0x45, 0x2000);
    machine.code_at(0x2000, |a| {
        a.push(rbx)?;
        a.mov(rbx, APIC)?;
        a.mov(dword_ptr(rbx + 0xb0), 0)?;
        a.lock().inc(qword_ptr(TICKET))?;
        a.pop(rbx)?;
        a.iretq()
    });
    machine.code_at(0x3000, |a| caller(a, SEEN + 8));
    machine.long_mode(1);
    let second = &machine.vcpus[1];
    let mut regs = second.get_regs().unwrap();
    (regs.rip, regs.rsp) = (0x3000, STACK - 0x800);
    second.set_regs(&regs).unwrap();
    let state = kvm_bindings::kvm_mp_state {
        mp_state: kvm_bindings::KVM_MP_STATE_RUNNABLE,
    };
    second.set_mp_state(state).unwrap();
    let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    machine.vm.register_irqfd(&line, 20).unwrap();
    machine.memory.write(FUNCTION, &function(0));
    let mut vcpus: Vec<_> = machine.vcpus.drain(..).collect();
    let interrupters: Vec<_> = vcpus.iter().map(|vcpu| vcpu.interrupter()).collect();
    let machine = &machine;
    std::thread::scope(|scope| {
        for vcpu in &mut vcpus {
            scope.spawn(|| match vcpu.run().unwrap() {
                eptide_kvm::VcpuExit::IoOut(0x80, _) => {}
                other => panic!("{other:?}"),
            });
        }
        let reaches = |at, value: u8| {
            let start = std::time::Instant::now();
            while machine.memory.read_u64(at) != u64::from(value) {
                if start.elapsed().as_secs() >= 10 {
                    // The vCPUs' threads end, too.
                    interrupters.iter().for_each(|vcpu| vcpu.interrupt());
                    panic!("{at:x}: {value}");
                }
                std::thread::yield_now();
            }
        };
        reaches(READY, 1);
        for value in 1..=10u8 {
            write_by_kernel(machine, FUNCTION, &function(value));
            line.write(1).unwrap();
            for seen in [SEEN, SEEN + 8] {
                reaches(seen, value);
                reaches(VALUE + 0x100 + seen - SEEN, value);
            }
        }
    });
}
