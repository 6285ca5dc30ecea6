//! Calls about memory: slots, logs, doorbells, traps.

use crate::common::*;
use crate::{call, errno, vm};
use eptide_kvm as kvm;
use kvm::ioctl::Object;
use kvm_bindings::*;
use vmm_sys_util::eventfd::EventFd;

#[test]
fn the_task_state_segment_fits_below_4_gib() {
    let (_kvm, vm) = vm();
    vm.set_tss_address(0xffff_d000).unwrap();
    assert_eq!(errno(vm.set_tss_address(0xffff_d001)), libc::EINVAL);
}

#[test]
fn slots_are_refused_as_the_documentation_says() {
    let (_kvm, vm) = vm();
    let memory = Memory::new(1 << 20);
    let region = memory.region(0, 0);
    // SAFETY: the memory outlives the VM's use of it: no guest runs.
    let set = |region| unsafe { vm.set_user_memory_region(region) };
    let delete = |slot| kvm_userspace_memory_region {
        memory_size: 0,
        slot,
        ..region
    };
    assert_eq!(errno(set(delete(0))), libc::EINVAL, "is not there");
    set(region).unwrap();
    set(region).unwrap();
    for (what, bad) in [
        (
            "slot",
            kvm_userspace_memory_region {
                slot: 32764,
                ..region
            },
        ),
        (
            "space",
            kvm_userspace_memory_region {
                slot: 2 << 16,
                ..region
            },
        ),
        (
            "flag",
            kvm_userspace_memory_region {
                slot: 1,
                flags: 8,
                guest_phys_addr: 1 << 30,
                ..region
            },
        ),
        (
            "size",
            kvm_userspace_memory_region {
                memory_size: 0x2000,
                ..region
            },
        ),
        (
            "odd size",
            kvm_userspace_memory_region {
                slot: 1,
                memory_size: 0x1800,
                guest_phys_addr: 1 << 30,
                ..region
            },
        ),
        (
            "odd address",
            kvm_userspace_memory_region {
                slot: 1,
                guest_phys_addr: 0x4000_0800,
                ..region
            },
        ),
        (
            "odd memory",
            kvm_userspace_memory_region {
                slot: 1,
                guest_phys_addr: 1 << 30,
                userspace_addr: region.userspace_addr + 8,
                ..region
            },
        ),
        (
            "memory",
            kvm_userspace_memory_region {
                userspace_addr: region.userspace_addr + 0x1000,
                ..region
            },
        ),
        (
            "kernel's",
            kvm_userspace_memory_region {
                slot: 1,
                guest_phys_addr: 1 << 30,
                userspace_addr: 1 << 63,
                ..region
            },
        ),
        (
            "wraps",
            kvm_userspace_memory_region {
                slot: 1,
                guest_phys_addr: 0xffff_ffff_fff0_0000,
                memory_size: 0x20_0000,
                ..region
            },
        ),
        (
            "read-only",
            kvm_userspace_memory_region {
                flags: KVM_MEM_READONLY,
                ..region
            },
        ),
        (
            "too large",
            kvm_userspace_memory_region {
                slot: 1,
                guest_phys_addr: 1 << 30,
                memory_size: 1 << 43,
                ..region
            },
        ),
    ] {
        assert_eq!(errno(set(bad)), libc::EINVAL, "{what}");
    }
    let overlaps = kvm_userspace_memory_region {
        slot: 1,
        guest_phys_addr: 0xf_f000,
        ..region
    };
    assert_eq!(errno(set(overlaps)), libc::EEXIST);
    set(kvm_userspace_memory_region {
        flags: KVM_MEM_LOG_DIRTY_PAGES,
        ..region
    })
    .unwrap();
    set(kvm_userspace_memory_region {
        guest_phys_addr: 1 << 30,
        ..region
    })
    .unwrap();
    set(overlaps).unwrap();
    set(delete(0)).unwrap();
    assert_eq!(errno(set(delete(0))), libc::EINVAL);
    // The second structure's further fields matter only with their flag.
    let mut second = kvm_userspace_memory_region2 {
        slot: 3,
        guest_phys_addr: 1 << 32,
        memory_size: region.memory_size,
        userspace_addr: region.userspace_addr,
        guest_memfd_offset: 5,
        ..Default::default()
    };
    let object = Object::Vm(&vm);
    assert_eq!(
        call(object, "KVM_SET_USER_MEMORY_REGION2", &mut second),
        Ok(0)
    );
    second.flags = KVM_MEM_GUEST_MEMFD;
    assert_eq!(
        call(object, "KVM_SET_USER_MEMORY_REGION2", &mut second),
        Err(libc::EINVAL)
    );
}

#[test]
fn dirty_logs_are_refused_as_the_documentation_says() {
    let (_kvm, vm) = vm();
    let memory = Memory::new(100 * 4096);
    let mut region = memory.region(0, 0);
    // SAFETY: no guest runs.
    unsafe { vm.set_user_memory_region(region).unwrap() };
    assert_eq!(errno(vm.get_dirty_log(0, memory.size)), libc::ENOENT);
    assert_eq!(errno(vm.get_dirty_log(9, memory.size)), libc::ENOENT);
    assert_eq!(errno(vm.get_dirty_log(40000, 4096)), libc::EINVAL);
    region.flags = KVM_MEM_LOG_DIRTY_PAGES;
    // SAFETY: as above.
    unsafe { vm.set_user_memory_region(region).unwrap() };
    let mut bitmap = [0u64; 2];
    let mut clear = |first_page, num_pages| {
        let mut log = kvm_clear_dirty_log {
            slot: 0,
            num_pages,
            first_page,
            ..Default::default()
        };
        log.__bindgen_anon_1.padding2 = bitmap.as_mut_ptr() as u64;
        call(Object::Vm(&vm), "KVM_CLEAR_DIRTY_LOG", &mut log)
    };
    assert_eq!(clear(0, 64), Ok(0));
    assert_eq!(clear(64, 36), Ok(0), "the rest may be no multiple of 64");
    assert_eq!(clear(0, 100), Ok(0));
    assert_eq!(clear(0, 36), Err(libc::EINVAL));
    assert_eq!(clear(1, 64), Err(libc::EINVAL));
    assert_eq!(clear(64, 64), Err(libc::EINVAL));
    assert_eq!(clear(128, 0), Err(libc::EINVAL));
    assert_eq!(clear(u64::MAX - 63, 64), Err(libc::EINVAL));

    let (_kvm, ringed) = self::vm();
    enable(&ringed, KVM_CAP_DIRTY_LOG_RING, 4096 * 16).unwrap();
    assert_eq!(
        enable(&ringed, KVM_CAP_DIRTY_LOG_RING, 4096 * 16),
        Err(libc::EINVAL)
    );
    // SAFETY: as above.
    unsafe { ringed.set_user_memory_region(region).unwrap() };
    assert_eq!(errno(ringed.get_dirty_log(0, memory.size)), libc::ENXIO);
    assert_eq!(
        errno(ringed.clear_dirty_log(0, 0, 64, &[0])),
        libc::ENXIO,
        "rings and bitmaps exclude each other"
    );
    assert_eq!(
        vm.reset_dirty_rings().map_err(|e| e.errno()),
        Err(libc::EINVAL)
    );
}

#[test]
fn access_bytes_are_set_all_or_none() {
    let (_kvm, vm) = vm();
    let memory = Memory::new(4 * 4096);
    // SAFETY: no guest runs.
    unsafe { vm.set_user_memory_region(memory.region(0, 0)).unwrap() };
    assert_eq!(errno(vm.set_access_bytes(2, &[1, 1, 0])), libc::ENOENT);
    assert_eq!(vm.execution_traps(0, 4).unwrap(), [0; 4]);
    assert_eq!(errno(vm.set_access_bytes(2, &[1, 2])), libc::EINVAL);
    vm.set_access_bytes(1, &[1, 0, 1]).unwrap();
    assert_eq!(vm.execution_traps(0, 4).unwrap(), [0, 1, 0, 1]);
}

#[test]
fn bells_are_refused_as_the_documentation_says() {
    let (_kvm, vm) = vm();
    let bell = EventFd::new(0).unwrap();
    let set = |flags, len, fd| {
        let mut request = kvm_ioeventfd {
            addr: 0x1000,
            len,
            fd,
            flags,
            ..Default::default()
        };
        call(Object::Vm(&vm), "KVM_IOEVENTFD", &mut request)
    };
    use std::os::fd::AsRawFd;
    let fd = bell.as_raw_fd();
    assert_eq!(set(0, 3, fd), Err(libc::EINVAL));
    assert_eq!(set(1, 0, fd), Err(libc::EINVAL), "datamatch of no length");
    assert_eq!(set(1 << 5, 4, fd), Err(libc::EINVAL));
    assert_eq!(set(0, 4, -1), Err(libc::EBADF));
    assert_eq!(set(0, 4, fd), Ok(0));
    assert_eq!(set(0, 4, fd), Err(libc::EEXIST));
    assert_eq!(set(4, 8, fd), Err(libc::ENOENT));
    assert_eq!(set(4, 4, fd), Ok(0));
    assert_eq!(set(4, 4, fd), Err(libc::ENOENT));
}
