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
