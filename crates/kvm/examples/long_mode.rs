//! A 64-bit guest on page tables, with a device in memory that the VMM plays.
//!
//! `cargo run -p eptide-kvm --example long_mode`

use std::error::Error;

use eptide_kvm::{Kvm, VcpuExit, VcpuFd};
use kvm_bindings::{kvm_segment, kvm_userspace_memory_region};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

const SIZE: usize = 0x20_0000;
const CODE_AT: u64 = 0x1000;
const PML4: u64 = 0x2000;
const PDPT: u64 = 0x3000;
/// Page directory of the first GiB.
const LOW: u64 = 0x4000;
/// Page directory of the second GiB.
const HIGH: u64 = 0x5000;
/// Where the device is: there is no memory.
const DEVICE: u64 = 0x4000_0000;

const PRESENT_AND_WRITABLE: u64 = 3;
const LARGE: u64 = 1 << 7;

const CODE: [u8; 13] = [
    0xbb, 0x00, 0x00, 0x00, 0x40, // mov ebx, DEVICE
    0x8b, 0x03, // mov eax, [rbx]
    0x01, 0xc0, // add eax, eax
    0x89, 0x43, 0x04, // mov [rbx + 4], eax
    0xf4, // hlt
];

/// Runs the guest.
pub(crate) fn main() -> Result<(), Box<dyn Error>> {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), SIZE)])?;
    memory.write_slice(&CODE, GuestAddress(CODE_AT))?;
    for (at, entry) in [
        (PML4, PDPT),
        (PDPT, LOW),
        (PDPT + 8, HIGH),
        (LOW, LARGE),
        (HIGH, DEVICE | LARGE),
    ] {
        memory.write_obj(entry | PRESENT_AND_WRITABLE, GuestAddress(at))?;
    }

    let vm = Kvm::new()?.create_vm()?;
    let region = kvm_userspace_memory_region {
        memory_size: SIZE as u64,
        userspace_addr: memory.get_host_address(GuestAddress(0))? as u64,
        ..Default::default()
    };
    // SAFETY: `memory` lives as long as the VM.
    unsafe { vm.set_user_memory_region(region)? };
    let mut vcpu = vm.create_vcpu(0)?;
    enter_long_mode(&vcpu)?;

    let mut written = Vec::new();
    loop {
        match vcpu.run()? {
            VcpuExit::MmioRead(DEVICE, data) => data.copy_from_slice(&21_u32.to_le_bytes()),
            VcpuExit::MmioWrite(address, data) => written.push((address, data.to_vec())),
            VcpuExit::Hlt => break,
            other => return Err(format!("unexpected: {other:?}").into()),
        }
    }
    println!("the guest read 21 and wrote {written:x?}");
    assert_eq!(written, [(DEVICE + 4, 42_u32.to_le_bytes().to_vec())]);
    Ok(())
}

/// Control registers and segments as an operating system would have them.
fn enter_long_mode(vcpu: &VcpuFd) -> Result<(), Box<dyn Error>> {
    const PE: u64 = 1;
    const PG: u64 = 1 << 31;
    const PAE: u64 = 1 << 5;
    const LME: u64 = 1 << 8;
    const LMA: u64 = 1 << 10;
    let code = kvm_segment {
        selector: 8,
        type_: 11,
        present: 1,
        s: 1,
        l: 1,
        g: 1,
        limit: u32::MAX,
        ..Default::default()
    };
    let data = kvm_segment {
        selector: 16,
        type_: 3,
        l: 0,
        db: 1,
        ..code
    };
    let mut sregs = vcpu.get_sregs()?;
    (sregs.cr0, sregs.cr3, sregs.cr4) = (PE | PG, PML4, PAE);
    sregs.efer = LME | LMA;
    (sregs.cs, sregs.ds, sregs.es, sregs.ss) = (code, data, data, data);
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.get_regs()?;
    (regs.rip, regs.rflags) = (CODE_AT, 2);
    Ok(vcpu.set_regs(&regs)?)
}
