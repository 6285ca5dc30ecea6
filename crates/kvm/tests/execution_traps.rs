//! Execution traps: flagged pages end KVM_RUN, and their code is stepped through.

mod common;

use common::*;
use eptide_kvm as kvm;
use kvm::VcpuExit;

#[derive(Default)]
struct Trace {
    addresses: Vec<u64>,
    writes: Vec<u64>,
    branches: usize,
}

impl kvm::Observer for Trace {
    fn instruction(&mut self, state: &cpu::CpuState, _bytes: &[u8]) {
        self.addresses.push(state.rip);
    }

    fn memory(&mut self, gva: u64, _data: &[u8], write: bool) {
        if write {
            self.writes.push(gva);
        }
    }

    fn branch(&mut self, _from: u64, _to: u64) {
        self.branches += 1;
    }
}

/// Traces one function of a guest: flag its page, step while control is in it, run on.
#[test]
fn execution_traps_trace_a_function() {
    let code = assemble(|a| {
        a.mov(rax, 0x7000u64)?;
        a.call(rax)?;
        stop(a)
    });
    let mut machine = Machine::new(Irqchip::None, 1, &code);
    machine.code_at(0x7000, |a| {
        a.mov(dword_ptr(0x5000), 77)?;
        a.ret()
    });
    machine.vm.set_execution_traps(7, 1, true).unwrap();
    assert_eq!(
        machine.vm.execution_traps(6, 3).unwrap(),
        [0, kvm::ACCESS_TRAP_EXECUTION, 0]
    );
    let missing = machine.vm.set_execution_traps(0x10_0000, 1, true);
    assert_eq!(missing.unwrap_err().errno(), libc::ENOENT);
    match machine.vcpu().run().unwrap() {
        VcpuExit::Unsupported(kvm::KVM_EXIT_EMULATE) => {}
        other => panic!("{other:?}"),
    }
    let trap = machine.vcpu().emulate_exit();
    assert_eq!((trap.gpa, trap.gva, trap.rip), (0x7000, 0x7000, 0x7000));
    let mut trace = Trace::default();
    while machine.vcpu().get_regs().unwrap().rip >> 12 == 7 {
        assert!(machine.vcpu().step(&mut trace).unwrap().is_none());
    }
    runs_to_stop(&mut machine);
    assert_eq!(trace.addresses.first(), Some(&0x7000));
    assert_eq!((trace.addresses.len(), trace.branches), (2, 1));
    assert_eq!(trace.writes, [0x5000]);
    assert_eq!(machine.memory.read_u64(0x5000), 77);
}

/// When the call returns, no vCPU executes from the page any more.
#[test]
fn a_trap_is_in_force_at_once() {
    let code = assemble(|a| {
        let mut again = a.create_label();
        a.mov(rax, 0x7000u64)?;
        a.set_label(&mut again)?;
        a.call(rax)?;
        a.jmp(again)
    });
    let mut machine = Machine::new(Irqchip::None, 2, &code);
    machine.long_mode(1);
    machine.code_at(0x7000, |a| {
        for _ in 0..100 {
            a.lock().inc(qword_ptr(0x5000))?;
        }
        a.ret()
    });
    let mut second = machine.vcpus.remove(1);
    let mut regs = second.get_regs().unwrap();
    regs.rsp -= 0x800;
    second.set_regs(&regs).unwrap();
    let count = || machine.memory.read_u64(0x5000);
    let mut first = machine.vcpus.remove(0);
    std::thread::scope(|scope| {
        let threads = [&mut first, &mut second].map(|vcpu| {
            scope.spawn(move || {
                let mut traps = 0;
                while traps < 20 {
                    match vcpu.run().unwrap() {
                        VcpuExit::Unsupported(kvm::KVM_EXIT_EMULATE) => traps += 1,
                        other => panic!("{other:?}"),
                    }
                    let trap = vcpu.emulate_exit();
                    assert_eq!((trap.gpa >> 12, trap.rip >> 12), (7, 7));
                    std::thread::sleep(std::time::Duration::from_micros(300));
                }
            })
        });
        while threads.iter().any(|thread| !thread.is_finished()) {
            machine.vm.set_execution_traps(7, 1, true).unwrap();
            let before = count();
            std::thread::sleep(std::time::Duration::from_micros(200));
            assert_eq!(count(), before);
            machine.vm.set_execution_traps(7, 1, false).unwrap();
            std::thread::sleep(std::time::Duration::from_micros(500));
        }
    });
    assert_ne!(count(), 0);
}

/// The flags are the memslot's: they move with it and go with it.
#[test]
fn traps_belong_to_the_slot() {
    const HERE: u64 = 0x4000_0000;
    const THERE: u64 = 0x4800_0000;
    let code = assemble(|a| {
        for target in [HERE, THERE] {
            a.mov(rax, target)?;
            a.call(rax)?;
            stop(a)?;
        }
        Ok(())
    });
    let mut machine = Machine::new(Irqchip::None, 1, &code);
    let extra = Memory::new(0x4000);
    extra.write(0, &assemble_at(HERE, |a| a.ret()));
    let place = |machine: &Machine, region| {
        // SAFETY: the memory outlives the machine's vCPU's runs.
        unsafe { machine.vm.set_user_memory_region(region).unwrap() };
    };
    let traps = |machine: &Machine, at: u64| machine.vm.execution_traps(at >> 12, 2).unwrap();
    place(&machine, extra.region(1, HERE));
    machine.vm.set_execution_traps(HERE >> 12, 1, true).unwrap();
    let trapped = |machine: &mut Machine, at| {
        let exit = machine.vcpu().run().unwrap();
        assert!(
            matches!(exit, VcpuExit::Unsupported(kvm::KVM_EXIT_EMULATE)),
            "{exit:?}"
        );
        assert_eq!(machine.vcpu().emulate_exit().rip, at);
        let mut trace = Trace::default();
        assert!(machine.vcpu().step(&mut trace).unwrap().is_none());
        runs_to_stop(machine);
    };
    trapped(&mut machine, HERE);
    place(&machine, extra.region(1, THERE));
    assert_eq!(traps(&machine, HERE), [0, 0]);
    assert_eq!(traps(&machine, THERE), [kvm::ACCESS_TRAP_EXECUTION, 0]);
    trapped(&mut machine, THERE);
    let mut gone = extra.region(1, THERE);
    gone.memory_size = 0;
    place(&machine, gone);
    place(&machine, extra.region(1, THERE));
    assert_eq!(traps(&machine, THERE), [0, 0]);
    let mut regs = machine.vcpu().get_regs().unwrap();
    regs.rip = THERE;
    regs.rsp -= 8;
    machine.memory.write_u64(regs.rsp, 0x3000);
    machine.code_at(0x3000, stop);
    machine.vcpu().set_regs(&regs).unwrap();
    runs_to_stop(&mut machine);
    drop(machine);
}
