//! The smallest VM: ten bytes of 16-bit code add two numbers and write the digit to a port.
//!
//! `cargo run -p eptide-kvm --example real_mode`

use std::error::Error;

use eptide_kvm::{Kvm, VcpuExit};
use kvm_bindings::kvm_userspace_memory_region;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

const SIZE: usize = 0x2000;
const START: u64 = 0x1000;
const CODE: [u8; 10] = [
    0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0x00, 0xd8, // add al, bl
    0x04, b'0', // add al, '0'
    0xee, // out dx, al
    0xfa, // cli
    0xf4, // hlt
];

/// Runs the guest.
pub(crate) fn main() -> Result<(), Box<dyn Error>> {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), SIZE)])?;
    memory.write_slice(&CODE, GuestAddress(START))?;

    let vm = Kvm::new()?.create_vm()?;
    let region = kvm_userspace_memory_region {
        memory_size: SIZE as u64,
        userspace_addr: memory.get_host_address(GuestAddress(0))? as u64,
        ..Default::default()
    };
    // SAFETY: `memory` lives as long as the VM.
    unsafe { vm.set_user_memory_region(region)? };

    let mut vcpu = vm.create_vcpu(0)?;
    let mut sregs = vcpu.get_sregs()?;
    // A processor starts at the top of the first 4 GiB; this one is to start in the memory there is.
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.get_regs()?;
    (regs.rip, regs.rax, regs.rbx, regs.rflags) = (START, 2, 3, 2);
    vcpu.set_regs(&regs)?;

    let mut shown = String::new();
    loop {
        match vcpu.run()? {
            VcpuExit::IoOut(0x3f8, data) => shown.extend(data.iter().map(|byte| char::from(*byte))),
            VcpuExit::Hlt => break,
            other => return Err(format!("unexpected: {other:?}").into()),
        }
    }
    println!("2 + 3 = {shown}");
    assert_eq!(shown, "5");
    Ok(())
}
