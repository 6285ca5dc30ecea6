//! A second opinion: `guests/opinion.rom` computes in every mode, with and without faults, and says
//! what came out. Eptide must say, byte for byte, what QEMU's translator says.
//!
//! `guests/opinion.expected` is QEMU's answer. `EPTIDE_LONG_TESTS` asks QEMU again, where it is
//! installed; `EPTIDE_BLESS` also writes the answer down.

mod common;

use std::fs;
use std::process::{Command, Stdio};

use common::{folder, own_guest};
use kvm::{Kvm, VcpuExit};
use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};

/// The port that the guest writes its answer to.
const CONSOLE: u16 = 0xe9;
/// The port that ends the guest.
const END: u16 = 0xf4;
/// Bytes of the ROM, which ends at 4 GiB and shows below 1 MiB, too.
const ROM: usize = 64 << 10;
/// Bytes of memory, the lower view of the ROM included.
const MEMORY: usize = 1 << 20;

#[test]
fn eptide_agrees_with_qemu() {
    let expected = fs::read_to_string(own_guest("opinion.expected")).unwrap();
    compare(&expected, &ask_eptide());
}

#[test]
fn qemu_still_says_so() {
    let blessing = std::env::var_os("EPTIDE_BLESS").is_some();
    if std::env::var_os("EPTIDE_LONG_TESTS").is_none() && !blessing {
        eprintln!("skipped: runs QEMU; set EPTIDE_LONG_TESTS=1 to run it");
        return;
    }
    let Some(answer) = ask_qemu() else {
        eprintln!("skipped: qemu-system-x86_64 is not installed");
        return;
    };
    if blessing {
        fs::write(own_guest("opinion.expected"), &answer).unwrap();
    }
    let expected = fs::read_to_string(own_guest("opinion.expected")).unwrap();
    compare(&expected, &answer);
}

/// Asserts equality, naming the lines that differ.
fn compare(expected: &str, answer: &str) {
    let differing: Vec<_> = expected
        .lines()
        .zip(answer.lines())
        .filter(|(left, right)| left != right)
        .collect();
    assert!(differing.is_empty(), "expected, answered: {differing:#?}");
    assert_eq!(expected, answer);
}

fn ask_qemu() -> Option<String> {
    let log = folder("opinion").join("answer");
    let status = Command::new("qemu-system-x86_64")
        .args(["-M", "pc", "-accel", "tcg", "-cpu", "max", "-m", "16"])
        .args(["-nodefaults", "-display", "none", "-no-reboot", "-debugcon"])
        .arg(format!("file:{}", log.display()))
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=1", "-bios"])
        .arg(own_guest("opinion.rom"))
        .stdin(Stdio::null())
        .status()
        .ok()?;
    // The device's way to say that 0 was written.
    assert_eq!(status.code(), Some(1));
    Some(fs::read_to_string(log).unwrap())
}

fn ask_eptide() -> String {
    let rom = fs::read(own_guest("opinion.rom")).unwrap();
    assert_eq!(rom.len(), ROM);
    let mut memory = Pages::new(MEMORY);
    memory.bytes()[MEMORY - ROM..].copy_from_slice(&rom);
    let mut top = Pages::new(ROM);
    top.bytes().copy_from_slice(&rom);

    let kvm = Kvm::new().unwrap();
    let vm = kvm.create_vm().unwrap();
    for (slot, flags, guest_phys_addr, pages) in [
        (0, 0, 0, &memory),
        (1, KVM_MEM_READONLY, (1 << 32) - ROM as u64, &top),
    ] {
        let region = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr,
            memory_size: pages.size as u64,
            userspace_addr: pages.base as u64,
        };
        // SAFETY: the pages outlive the VM, which is made after them, and nothing else touches
        // them while it runs.
        unsafe { vm.set_user_memory_region(region).unwrap() };
    }
    let mut vcpu = vm.create_vcpu(0).unwrap();
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(256).unwrap())
        .unwrap();
    let mut answer = Vec::new();
    loop {
        match vcpu.run().unwrap() {
            VcpuExit::IoOut(CONSOLE, data) => answer.extend_from_slice(data),
            VcpuExit::IoOut(END, [0]) => return String::from_utf8(answer).unwrap(),
            other => panic!("{other:?} after:\n{}", String::from_utf8_lossy(&answer)),
        }
    }
}

/// Page-aligned memory.
struct Pages {
    base: *mut u8,
    size: usize,
}

impl Pages {
    fn new(size: usize) -> Self {
        // SAFETY: a new mapping at an address the kernel chooses.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(base, libc::MAP_FAILED);
        Self {
            base: base.cast(),
            size,
        }
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the mapping made above, which only this object names.
        unsafe { std::slice::from_raw_parts_mut(self.base, self.size) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the mapping made above.
        unsafe { libc::munmap(self.base.cast(), self.size) };
    }
}
