//! What ends a halt.

mod common;

use common::*;
use eptide_kvm::VcpuExit;
use std::time::Duration;

/// KVM_HC_KICK_CPU.
const KICK_CPU: u64 = 5;

/// A waiter for a lock looks at the lock, then halts with interrupts off; the kick of the owner may
/// come in between.
#[test]
fn a_kick_before_the_halt_ends_it() {
    let code = assemble(|a| {
        a.cli()?;
        a.mov(rax, KICK_CPU)?;
        a.xor(ebx, ebx)?;
        a.xor(ecx, ecx)?;
        a.vmcall()?;
        a.hlt()?;
        a.out(0x10, al)?;
        // One kick ends one halt.
        a.hlt()?;
        a.out(0x11, al)
    });
    let mut machine = Machine::new(Irqchip::Full, 1, &code);
    let interrupter = machine.vcpus[0].interrupter();
    let (finished, wait) = std::sync::mpsc::channel::<()>();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            // A halt that does not end is ended here, and then the run fails.
            for seconds in [10, 1] {
                let _ = wait.recv_timeout(Duration::from_secs(seconds));
            }
            interrupter.interrupt();
        });
        let vcpu = machine.vcpu();
        assert!(matches!(vcpu.run(), Ok(VcpuExit::IoOut(0x10, _))));
        finished.send(()).unwrap();
        let end = vcpu.run().map(|exit| format!("{exit:?}"));
        assert_eq!(end.unwrap_err().errno(), libc::EINTR);
    });
}
