//! Bytes as a sequence of ioctls on one VM with one vCPU: which request, and its argument.
//!
//! What names memory or descriptors is kept inside what the target owns, as in the test `hostile`
//! of `eptide-kvm`. A run is ended before it starts: guests are the other target's.
#![no_main]

use eptide_kvm::ioctl::{Answer, Direction, Kind, Object, TABLE, ioctl};
use eptide_kvm::{Kvm, VcpuFd};

/// Words of the largest argument.
const WORDS: usize = 2048;
/// Bytes of guest memory.
const MEMORY: usize = 1 << 20;

/// Memory for slots, for as long as the process lives.
fn memory() -> u64 {
    static BASE: std::sync::OnceLock<u64> = std::sync::OnceLock::new();
    *BASE.get_or_init(|| {
        // SAFETY: a new mapping at an address the kernel chooses.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                MEMORY,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(base, libc::MAP_FAILED);
        base as u64
    })
}

/// Keeps memory and descriptors that an argument names to the target's own.
fn tame(name: &str, words: &mut [u64]) {
    match name {
        "KVM_SET_USER_MEMORY_REGION" | "KVM_SET_USER_MEMORY_REGION2" => {
            words[0] &= 0x3_0000_0007;
            words[1] &= 0xffff_f000;
            words[2] &= (MEMORY as u64 - 1) & !0xfff;
            words[3] = memory();
        }
        "KVM_IRQFD" => {
            words[0] = 0xffff_ffff;
            words[1] = u64::MAX;
        }
        "KVM_IOEVENTFD" => words[2] |= 0xffff_ffff_0000_0000,
        "KVM_GET_DIRTY_LOG" | "KVM_CLEAR_DIRTY_LOG" => words[1] = 0x10,
        "KVM_SET_DEVICE_ATTR"
        | "KVM_GET_DEVICE_ATTR"
        | "EPTIDE_GET_ACCESS"
        | "EPTIDE_SET_ACCESS" => words[2] = 0x10,
        _ => {}
    }
}

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let kvm = Kvm::new().unwrap();
    let vm = kvm.create_vm().unwrap();
    let mut vcpu: Option<VcpuFd> = vm.create_vcpu(0).ok();
    if let Some(vcpu) = &mut vcpu {
        vcpu.set_kvm_immediate_exit(1);
    }
    let mut rest = input;
    let mut take = |count: usize| {
        let (head, tail) = rest.split_at(count.min(rest.len()));
        rest = tail;
        head
    };
    let mut buffer = vec![0u64; WORDS];
    // Header: request, argument bytes in eights, fill.
    while let [request, length, fill] = *take(3) {
        let row = &TABLE[usize::from(request) % TABLE.len()];
        buffer.fill(if fill & 1 == 0 { 0 } else { u64::MAX });
        for (word, bytes) in buffer
            .iter_mut()
            .zip(take(usize::from(length) * 8).chunks(8))
        {
            let mut whole = [0; 8];
            whole[..bytes.len()].copy_from_slice(bytes);
            *word = u64::from_le_bytes(whole);
        }
        tame(row.name, &mut buffer);
        let object = match (row.kind, &vcpu) {
            (Kind::System, _) => Object::System(&kvm),
            (Kind::Vm, _) => Object::Vm(&vm),
            (Kind::Vcpu, Some(vcpu)) => Object::Vcpu(vcpu),
            (Kind::Vcpu, None) => continue,
        };
        let argument = match (row.direction, fill >> 4) {
            (Direction::None, _) if row.name == "KVM_REINJECT_CONTROL" => buffer.as_ptr() as u64,
            (Direction::None, _) => buffer[0],
            (_, 0) => 0,
            (_, 1) => 1 << 63 | 8,
            _ => buffer.as_mut_ptr() as u64,
        };
        if let Ok(Answer::Vm(_)) = ioctl(object, row.request(), argument) {
            // Dropped at once.
        }
    }
});
