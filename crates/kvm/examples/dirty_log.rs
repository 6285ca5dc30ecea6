//! Which pages has a guest written? What live migration asks.
//!
//! `cargo run -p eptide-kvm --example dirty_log`

use std::error::Error;

use eptide_kvm::{Kvm, VcpuExit};
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

const SIZE: usize = 0x10_000;
const START: u64 = 0x1000;
const CODE: [u8; 10] = [
    0xa2, 0x00, 0x40, // mov [0x4000], al
    0xa2, 0x00, 0x70, // mov [0x7000], al
    0xa0, 0x00, 0x80, // mov al, [0x8000]
    0xf4, // hlt
];

/// Runs the guest.
pub(crate) fn main() -> Result<(), Box<dyn Error>> {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), SIZE)])?;
    memory.write_slice(&CODE, GuestAddress(START))?;

    let vm = Kvm::new()?.create_vm()?;
    let region = kvm_userspace_memory_region {
        slot: 1,
        flags: KVM_MEM_LOG_DIRTY_PAGES,
        memory_size: SIZE as u64,
        userspace_addr: memory.get_host_address(GuestAddress(0))? as u64,
        ..Default::default()
    };
    // SAFETY: `memory` lives as long as the VM.
    unsafe { vm.set_user_memory_region(region)? };
    let mut vcpu = vm.create_vcpu(0)?;
    let mut sregs = vcpu.get_sregs()?;
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs)?;

    for round in ["first", "second"] {
        let mut regs = vcpu.get_regs()?;
        (regs.rip, regs.rflags) = (START, 2);
        vcpu.set_regs(&regs)?;
        match vcpu.run()? {
            VcpuExit::Hlt => {}
            other => return Err(format!("unexpected: {other:?}").into()),
        }
        // A bit for each page; reading clears them, and the next write sets them again.
        let log = vm.get_dirty_log(1, SIZE)?;
        let dirty: Vec<u64> = (0..64).filter(|page| log[0] >> page & 1 != 0).collect();
        println!("{round} round: pages {dirty:?}");
        assert_eq!(dirty, [4, 7]);
    }
    assert_eq!(vm.get_dirty_log(1, SIZE)?, [0]);
    Ok(())
}
