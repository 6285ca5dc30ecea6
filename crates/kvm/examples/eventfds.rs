//! Devices without exits: the guest notifies an eventfd (ioeventfd), and another thread answers
//! with an interrupt by one (irqfd).
//!
//! `cargo run -p eptide-kvm --example eventfds`

use std::error::Error;
use std::thread;

use eptide_kvm::{IoEventAddress, Kvm, NoDatamatch, VcpuExit};
use kvm_bindings::kvm_userspace_memory_region;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

const SIZE: usize = 0x4000;
const START: u64 = 0x1000;
const HANDLER: u64 = 0x2000;
/// The guest's notifications go here.
const DOORBELL: u64 = 0x10;
/// The guest says here that it was interrupted.
const DONE: u16 = 0x11;
/// The device's interrupt line, and the vector that the guest gives it.
const LINE: u32 = 5;
const VECTOR: u64 = 0x20 + LINE as u64;

/// Sets up the interrupt controller, rings, and waits.
const CODE: [u8; 26] = [
    0xb0, 0x11, 0xe6, 0x20, // mov al, 0x11; out 0x20, al    initialise
    0xb0, 0x20, 0xe6, 0x21, // mov al, 0x20; out 0x21, al    first vector
    0xb0, 0x04, 0xe6, 0x21, // mov al, 4; out 0x21, al       the second is at line 2
    0xb0, 0x01, 0xe6, 0x21, // mov al, 1; out 0x21, al       8086 mode
    0xb0, 0xdf, 0xe6, 0x21, // mov al, 0xdf; out 0x21, al    line 5 alone
    0xe6, 0x10, // out DOORBELL, al
    0xfb, // sti
    0xf4, // hlt
    0xeb, 0xfd, // jmp hlt
];
/// Ends the interrupt and says so.
const HANDLER_CODE: [u8; 7] = [
    0xb0, 0x20, 0xe6, 0x20, // mov al, 0x20; out 0x20, al
    0xe6, 0x11, // out DONE, al
    0xcf, // iret
];

/// Runs the guest.
pub(crate) fn main() -> Result<(), Box<dyn Error>> {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), SIZE)])?;
    memory.write_slice(&CODE, GuestAddress(START))?;
    memory.write_slice(&HANDLER_CODE, GuestAddress(HANDLER))?;
    memory.write_obj(HANDLER as u32, GuestAddress(4 * VECTOR))?;

    let vm = Kvm::new()?.create_vm()?;
    vm.create_irq_chip()?;
    let region = kvm_userspace_memory_region {
        memory_size: SIZE as u64,
        userspace_addr: memory.get_host_address(GuestAddress(0))? as u64,
        ..Default::default()
    };
    // SAFETY: `memory` lives as long as the VM.
    unsafe { vm.set_user_memory_region(region)? };

    let (doorbell, interrupt) = (EventFd::new(0)?, EventFd::new(0)?);
    vm.register_ioevent(&doorbell, &IoEventAddress::Pio(DOORBELL), NoDatamatch)?;
    vm.register_irqfd(&interrupt, LINE)?;
    let device = thread::spawn(move || {
        let rings = doorbell.read()?;
        interrupt.write(1)?;
        Ok::<u64, std::io::Error>(rings)
    });

    let mut vcpu = vm.create_vcpu(0)?;
    let mut sregs = vcpu.get_sregs()?;
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.get_regs()?;
    (regs.rip, regs.rsp, regs.rflags) = (START, SIZE as u64, 2);
    vcpu.set_regs(&regs)?;

    // Neither the doorbell nor the halt ends KVM_RUN: the first exit is the handler's.
    match vcpu.run()? {
        VcpuExit::IoOut(DONE, _) => {}
        other => return Err(format!("unexpected: {other:?}").into()),
    }
    let rings = device.join().expect("the device does not panic")?;
    println!("the guest rang {rings} time(s) and was interrupted");
    assert_eq!(rings, 1);
    Ok(())
}
