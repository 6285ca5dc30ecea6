//! Guest memory that its program unmaps behind a standing slot: what is mapped there later is not
//! Eptide's, and addresses of Eptide's own are no guest's memory. What it shares with the program
//! stays there.

mod common;

use common::*;
use kvm_bindings::*;
use std::ops::Range;

/// Where the large slot is for the guest.
const BASE: u64 = 1 << 30;

/// Mappings of this process: addresses, and the rest of the kernel's line.
fn mappings() -> Vec<(Range<u64>, String)> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let parse = |line: &str| {
        let (range, rest) = line.split_once(' ')?;
        let (start, end) = range.split_once('-')?;
        let address = |text| u64::from_str_radix(text, 16).ok();
        Some((address(start)?..address(end)?, rest.to_string()))
    };
    maps.lines().filter_map(parse).collect()
}

/// A guest that writes to each 2 MiB of a GiB at [`BASE`], so that each takes a page table.
fn toucher() -> Vec<u8> {
    assemble(|a| {
        let mut again = a.create_label();
        a.mov(rbx, BASE as i64)?;
        a.mov(ecx, 511)?;
        a.set_label(&mut again)?;
        a.mov(qword_ptr(rbx), rbx)?;
        a.add(rbx, 2 << 20)?;
        a.dec(ecx)?;
        a.jnz(again)?;
        a.addps(xmm0, xmm1)?;
        stop(a)
    })
}

#[test]
fn what_a_guest_needs_does_not_land_in_the_hole_behind_a_slot() {
    let mut machine = Machine::new(Irqchip::None, 1, &toucher());
    let backed = Memory::new(1 << 30);
    let mut region = backed.region(1, BASE);
    // Pages of 4 KiB, so that tables are needed.
    region.flags = KVM_MEM_LOG_DIRTY_PAGES;
    // SAFETY: the memory outlives the machine's use of it.
    unsafe { machine.vm.set_user_memory_region(region).unwrap() };
    let gone = Memory::new(512 << 20);
    let hole = gone.base as u64..gone.base as u64 + gone.size as u64;
    // SAFETY: the memory goes away under the slot, which is what is tested.
    unsafe {
        let far = gone.region(2, 8 << 30);
        machine.vm.set_user_memory_region(far).unwrap();
    }
    // What threads allocate is the C library's business, which this program's memory is, too.
    // SAFETY: has no conditions.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    let before = mappings();
    drop(gone);
    // Page tables, then processors with their host code and shared memory.
    runs_to_stop(&mut machine);
    for id in 1..4 {
        machine.vcpus.push(machine.vm.create_vcpu(id).unwrap());
    }
    let ours: Vec<_> = mappings()
        .into_iter()
        .filter(|(range, _)| range.start < hole.end && hole.start < range.end)
        .collect();
    assert!(
        ours.is_empty(),
        "in {hole:x?}: {ours:x?}, before {before:x?}"
    );
}

#[test]
fn addresses_of_our_own_are_not_for_slots() {
    let machine = Machine::new(Irqchip::None, 2, &toucher());
    let code = mappings();
    let code: Vec<_> = code
        .iter()
        .filter(|(_, name)| name.contains("eptide-code") || name.contains("kvm-vcpu"))
        .collect();
    assert!(code.len() >= 4);
    for (range, name) in code {
        // The program's own mapping of a vCPU is the program's.
        let region = kvm_userspace_memory_region {
            slot: 3,
            flags: 0,
            guest_phys_addr: BASE,
            memory_size: range.end - range.start,
            userspace_addr: range.start,
        };
        // SAFETY: refused, which is what is tested.
        let refused = unsafe { machine.vm.set_user_memory_region(region) };
        assert_eq!(refused.unwrap_err().errno(), libc::EINVAL, "{name}");
    }
}

#[test]
fn the_file_behind_a_vcpu_keeps_its_size() {
    use std::os::fd::AsRawFd;
    let mut machine = Machine::new(Irqchip::None, 1, &assemble(stop));
    let file = machine.vcpus[0].as_raw_fd();
    for size in [0, 4096, 1 << 30] {
        // SAFETY: has no conditions; it fails.
        assert_eq!(unsafe { libc::ftruncate(file, size) }, -1, "{size}");
    }
    runs_to_stop(&mut machine);
}
