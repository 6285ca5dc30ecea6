//! Small guests driven through the public API.

mod common;

use common::Memory;
use eptide_kvm as kvm;
use kvm::{Cap, Kvm, VcpuExit, VcpuFd, VmFd};
use kvm_bindings::kvm_userspace_memory_region;

/// A VM with 1 MiB of memory at 0 and a vCPU in real mode at 0x1000.
fn machine(code: &[u8]) -> (Memory, VmFd, VcpuFd) {
    let kvm = Kvm::new().unwrap();
    assert!(kvm.check_extension(Cap::UserMemory));
    let vm = kvm.create_vm().unwrap();
    let memory = Memory::new(1 << 20);
    memory.write(0x1000, code);
    // SAFETY: the memory outlives the VM in every test.
    unsafe { vm.set_user_memory_region(memory.region(0, 0)).unwrap() };
    let vcpu = vm.create_vcpu(0).unwrap();
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(256).unwrap())
        .unwrap();
    let mut sregs = vcpu.get_sregs().unwrap();
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    vcpu.set_sregs(&sregs).unwrap();
    let mut regs = vcpu.get_regs().unwrap();
    regs.rip = 0x1000;
    regs.rflags = 2;
    regs.rsp = 0x8000;
    vcpu.set_regs(&regs).unwrap();
    (memory, vm, vcpu)
}

#[test]
fn ports_memory_and_halt() {
    let code = [
        0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0x00, 0xd8, // add al, bl
        0xee, // out dx, al
        0xec, // in al, dx
        0xa2, 0x00, 0x20, // mov [0x2000], al
        0xf4, // hlt
    ];
    let (memory, _vm, mut vcpu) = machine(&code);
    let mut regs = vcpu.get_regs().unwrap();
    (regs.rax, regs.rbx) = (2, 3);
    vcpu.set_regs(&regs).unwrap();
    match vcpu.run().unwrap() {
        VcpuExit::IoOut(0x3f8, data) => assert_eq!(data, [5]),
        other => panic!("{other:?}"),
    }
    match vcpu.run().unwrap() {
        VcpuExit::IoIn(0x3f8, data) => data[0] = 0x5a,
        other => panic!("{other:?}"),
    }
    assert!(matches!(vcpu.run().unwrap(), VcpuExit::Hlt));
    assert_eq!(memory.read_u64(0x2000), 0x5a);
    assert_eq!(vcpu.get_regs().unwrap().rip, 0x1000 + code.len() as u64);
}

#[test]
fn device_memory() {
    let code = [
        0xbb, 0x00, 0xf0, // mov bx, 0xf000
        0x8e, 0xdb, // mov ds, bx
        0x66, 0xa1, 0x34, 0x12, // mov eax, [0x1234]
        0x66, 0x40, // inc eax
        0x66, 0xa3, 0x38, 0x12, // mov [0x1238], eax
        0xf4, // hlt
    ];
    let (_memory, vm, mut vcpu) = machine(&code);
    // Take the top half away, so that 0xf1234 is a device.
    let region = kvm_userspace_memory_region {
        slot: 0,
        ..Default::default()
    };
    // SAFETY: deleting a slot.
    unsafe { vm.set_user_memory_region(region).unwrap() };
    let half = Memory::new(1 << 19);
    half.write(0x1000, &code);
    // SAFETY: the memory outlives the VM's use of it.
    unsafe { vm.set_user_memory_region(half.region(0, 0)).unwrap() };
    match vcpu.run().unwrap() {
        VcpuExit::MmioRead(0xf1234, data) => data.copy_from_slice(&[0xff, 0, 0, 0]),
        other => panic!("{other:?}"),
    }
    match vcpu.run().unwrap() {
        VcpuExit::MmioWrite(0xf1238, data) => assert_eq!(data, [0, 1, 0, 0]),
        other => panic!("{other:?}"),
    }
    assert!(matches!(vcpu.run().unwrap(), VcpuExit::Hlt));
    drop(vcpu);
    drop(vm);
}

#[test]
fn cpuid_and_registers() {
    let code = [
        0x66, 0xb8, 0x00, 0x00, 0x00, 0x40, // mov eax, 0x40000000
        0x0f, 0xa2, // cpuid
        0xf4, // hlt
    ];
    let (_memory, _vm, mut vcpu) = machine(&code);
    assert!(matches!(vcpu.run().unwrap(), VcpuExit::Hlt));
    let regs = vcpu.get_regs().unwrap();
    assert_eq!(regs.rbx as u32, u32::from_le_bytes(*b"KVMK"));
    assert_eq!(regs.rax, 0x4000_0001);
}
