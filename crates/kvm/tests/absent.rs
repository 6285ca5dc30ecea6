//! What this KVM does not have answers as in a KVM without it.

use eptide_kvm::Kvm;
use kvm_bindings::nested::KvmNestedStateBuffer;
use kvm_bindings::*;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

#[test]
fn the_device_has_one_name() {
    assert!(Kvm::new_with_path(c"/dev/kvm").is_ok());
    let other = Kvm::new_with_path(c"/dev/null").err().unwrap();
    assert_eq!(other.errno(), libc::ENOENT);
}

#[test]
fn a_vm_without_the_features() {
    let vm = Kvm::new().unwrap().create_vm().unwrap();
    let device = vm.create_device(&mut kvm_create_device::default());
    assert_eq!(device.err().unwrap().errno(), libc::ENODEV);
    for error in [
        vm.create_guest_memfd(Default::default()).err(),
        vm.set_memory_attributes(Default::default()).err(),
        vm.register_enc_memory_region(&Default::default()).err(),
        vm.unregister_enc_memory_region(&Default::default()).err(),
        vm.encrypt_op_sev(&mut Default::default()).err(),
    ] {
        assert_eq!(error.unwrap().errno(), libc::ENOTTY);
    }
}

#[test]
fn regions_of_the_second_kind_are_as_of_the_first() {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 4096)]).unwrap();
    let vm = Kvm::new().unwrap().create_vm().unwrap();
    let region = kvm_userspace_memory_region2 {
        memory_size: 4096,
        userspace_addr: memory.get_host_address(GuestAddress(0)).unwrap() as u64,
        ..Default::default()
    };
    let private = kvm_userspace_memory_region2 {
        flags: KVM_MEM_GUEST_MEMFD,
        ..region
    };
    // SAFETY: the memory outlives the VM.
    unsafe {
        vm.set_user_memory_region2(region).unwrap();
        let error = vm.set_user_memory_region2(private).unwrap_err();
        assert_eq!(error.errno(), libc::EINVAL);
    }
}

#[test]
fn a_vcpu_without_the_features() {
    let vm = Kvm::new().unwrap().create_vm().unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    let mut state = KvmNestedStateBuffer::empty();
    let error = vcpu.nested_state(&mut state).err().unwrap();
    assert_eq!(error.errno(), libc::ENOTTY);
    let error = vcpu.set_nested_state(&state).err().unwrap();
    assert_eq!(error.errno(), libc::ENOTTY);
    let mut attribute = kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: KVM_VCPU_TSC_OFFSET.into(),
        ..Default::default()
    };
    vcpu.has_device_attr(&attribute).unwrap();
    attribute.attr += 1;
    let error = vcpu.has_device_attr(&attribute).unwrap_err();
    assert_eq!(error.errno(), libc::ENXIO);
}

#[test]
fn the_second_xsave_is_the_first() {
    let vm = Kvm::new().unwrap().create_vm().unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    let mut xsave = Xsave::new(0).unwrap();
    // SAFETY: no component that is offered needs room behind the region.
    unsafe {
        vcpu.get_xsave2(&mut xsave).unwrap();
        let first = vcpu.get_xsave().unwrap();
        assert_eq!(xsave.as_fam_struct_ref().xsave.region, first.region);
        vcpu.set_xsave2(&xsave).unwrap();
    }
}
