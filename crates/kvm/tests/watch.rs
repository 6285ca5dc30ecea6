//! What another thread writes into `kvm_run` is noticed while the guest runs. KVM looks at its next
//! KVM_RUN, which programs that set a flag without a signal would wait for in vain.

mod common;

use common::*;
use kvm_bindings::kvm_run;
use std::time::Duration;

#[test]
fn a_flag_ends_a_spinning_guest() {
    let code = assemble(|a| {
        let mut spin = a.create_label();
        a.set_label(&mut spin)?;
        a.jmp(spin)
    });
    let mut machine = Machine::new(Irqchip::None, 1, &code);
    let run = std::ptr::from_mut(machine.vcpu().get_kvm_run()) as usize;
    let thread = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(20));
        // SAFETY: the machine, and with it the mapping, outlives this thread.
        unsafe { (&raw mut (*(run as *mut kvm_run)).immediate_exit).write_volatile(1) };
    });
    assert_eq!(machine.vcpu().run().unwrap_err().errno(), libc::EINTR);
    thread.join().unwrap();
}
