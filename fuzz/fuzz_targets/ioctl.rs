//! Bytes as ioctls on one VM with two vCPUs: first one after the other, then by three threads at
//! once.
//!
//! While there is one thread, a call that fails must have changed nothing that can be read back, and
//! an argument that is not there, or ends where memory does, must be an error. What names memory or
//! descriptors is kept inside what the target owns, as in the test `hostile` of `eptide-kvm`. Runs
//! are ended before they start: guests are the other target's.
#![no_main]

use eptide_kvm::ioctl::{Answer, Direction, Kind, Object, Row, TABLE, ioctl};
use eptide_kvm::{Kvm, VcpuFd, VmFd};
use std::sync::OnceLock;

/// Bytes of the largest argument.
const ROOM: usize = 4096 * 4;
/// Bytes of guest memory.
const MEMORY: usize = 1 << 20;
/// Threads of the second part.
const THREADS: usize = 3;

fn map(size: usize, rights: i32) -> *mut u8 {
    // SAFETY: a new mapping at an address the kernel chooses.
    let base = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            size,
            rights,
            libc::MAP_SHARED | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    assert_ne!(base, libc::MAP_FAILED);
    base.cast()
}

/// Memory for slots, for as long as the process lives.
fn memory() -> u64 {
    static BASE: OnceLock<u64> = OnceLock::new();
    *BASE.get_or_init(|| map(MEMORY, libc::PROT_READ | libc::PROT_WRITE) as u64)
}

/// Room for an argument that ends where memory does.
struct Buffer {
    base: *mut u8,
}

impl Buffer {
    fn new() -> Buffer {
        let base = map(ROOM + 4096, libc::PROT_READ | libc::PROT_WRITE);
        // SAFETY: the last page of the new mapping.
        unsafe { libc::mprotect(base.add(ROOM).cast(), 4096, libc::PROT_NONE) };
        Buffer { base }
    }

    /// An argument with its last byte at the end of memory.
    fn put(&self, bytes: &[u8]) -> u64 {
        // SAFETY: inside the mapping, which is this value's.
        unsafe {
            let at = self.base.add(ROOM - bytes.len());
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), at, bytes.len());
            at as u64
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`.
        unsafe { libc::munmap(self.base.cast(), ROOM + 4096) };
    }
}

/// Where the argument is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// In memory, with zeros behind it for those that end in an array.
    There,
    /// In memory, at an odd address.
    Odd,
    /// Its last byte is where memory ends.
    Exact,
    /// Memory ends before its last byte.
    Truncated,
    Null,
    NotCanonical,
}

#[derive(Debug)]
struct Call {
    row: &'static Row,
    place: Place,
    vcpu: usize,
    thread: usize,
    bytes: Vec<u8>,
}

impl Call {
    /// Header: request, place and object, length in eights.
    fn take(rest: &mut &[u8]) -> Option<Call> {
        let [request, shape, eights, tail @ ..] = *rest else {
            return None;
        };
        let row = &TABLE[usize::from(*request) % TABLE.len()];
        let (given, tail) = tail.split_at((usize::from(*eights) * 8).min(tail.len()));
        *rest = tail;
        let fill = if shape >> 7 & 1 == 0 { 0 } else { 0xff };
        let mut bytes = vec![fill; ROOM - 64];
        bytes[..given.len()].copy_from_slice(given);
        tame(row.name, &mut bytes);
        Some(Call {
            row,
            place: match shape & 15 {
                0 => Place::Null,
                1 => Place::NotCanonical,
                2 => Place::Truncated,
                3 => Place::Exact,
                4 => Place::Odd,
                _ => Place::There,
            },
            vcpu: usize::from(shape >> 4 & 1),
            thread: usize::from(shape >> 5) % THREADS,
            bytes,
        })
    }

    fn argument(&self, buffer: &Buffer) -> u64 {
        let takes_address = self.row.name == "KVM_REINJECT_CONTROL";
        if self.row.direction == Direction::None && !takes_address {
            let (word, _) = self.bytes.split_first_chunk().unwrap();
            return u64::from_le_bytes(*word);
        }
        let size = self.row.size.max(1) as usize;
        match self.place {
            Place::There => buffer.put(&self.bytes),
            Place::Odd => buffer.put(&self.bytes[1..]),
            Place::Exact => buffer.put(&self.bytes[..size]),
            Place::Truncated => buffer.put(&self.bytes[..size - 1]),
            Place::Null => 0,
            Place::NotCanonical => 1 << 63 | 8,
        }
    }

    /// Whether the argument cannot be read or written whole.
    fn is_missing(&self) -> bool {
        // A signal mask may be absent; of it, as of KVM_REINJECT_CONTROL's argument, the request
        // says less than there is.
        let is_odd = matches!(
            self.row.name,
            "KVM_SET_SIGNAL_MASK" | "KVM_REINJECT_CONTROL"
        );
        self.row.direction != Direction::None
            && !is_odd
            && matches!(
                self.place,
                Place::Null | Place::NotCanonical | Place::Truncated
            )
    }
}

/// Keeps memory and descriptors that an argument names to the target's own.
fn tame(name: &str, bytes: &mut [u8]) {
    let mut words: Vec<u64> = bytes
        .chunks_exact(8)
        .map(|chunk| u64::from_le_bytes(chunk.try_into().unwrap()))
        .collect();
    match name {
        "KVM_SET_USER_MEMORY_REGION" | "KVM_SET_USER_MEMORY_REGION2" => {
            words[0] &= 0x3_0000_0007;
            words[1] &= 0xffff_f000;
            words[2] &= (MEMORY as u64 - 1) & !0xfff;
            words[3] = memory();
        }
        // The eventfd, or none; the second of a resampled one.
        "KVM_IRQFD" => {
            let fd = if words[0] & 1 == 0 { bell() } else { -1 };
            words[0] = words[0] & !0xffff_ffff | u64::from(fd as u32);
            words[1] = words[1] & 0xff | u64::from(bell() as u32) << 32;
        }
        "KVM_IOEVENTFD" => {
            let fd = if words[2] >> 32 & 1 == 0 { bell() } else { -1 };
            words[2] = words[2] & 0xffff_ffff | u64::from(fd as u32) << 32;
        }
        "KVM_GET_DIRTY_LOG" | "KVM_CLEAR_DIRTY_LOG" => words[1] = 0x10,
        "KVM_SET_DEVICE_ATTR"
        | "KVM_GET_DEVICE_ATTR"
        | "EPTIDE_GET_ACCESS"
        | "EPTIDE_SET_ACCESS" => words[2] = 0x10,
        _ => {}
    }
    for (chunk, word) in bytes.chunks_exact_mut(8).zip(words) {
        chunk.copy_from_slice(&word.to_le_bytes());
    }
}

/// An eventfd, for as long as the process lives.
fn bell() -> i32 {
    static BELL: OnceLock<i32> = OnceLock::new();
    *BELL.get_or_init(|| {
        // SAFETY: has no conditions.
        let fd = unsafe { libc::eventfd(0, libc::EFD_NONBLOCK) };
        assert!(fd >= 0);
        fd
    })
}

struct Objects {
    kvm: Kvm,
    vm: VmFd,
    vcpus: Vec<VcpuFd>,
}

impl Objects {
    fn new(shape: u8) -> Objects {
        let kvm = Kvm::new().unwrap();
        let vm = kvm.create_vm().unwrap();
        if shape & 1 != 0 {
            vm.create_irq_chip().unwrap();
        }
        if shape & 3 == 3 {
            vm.create_pit2(Default::default()).unwrap();
        }
        let vcpus = (0..2).map(|id| {
            let mut vcpu = vm.create_vcpu(id).unwrap();
            if shape & 4 != 0 {
                vcpu.set_cpuid2(&kvm.get_supported_cpuid(256).unwrap())
                    .unwrap();
            }
            vcpu.set_kvm_immediate_exit(1);
            vcpu
        });
        let vcpus = vcpus.collect();
        Objects { kvm, vm, vcpus }
    }

    fn call(&self, call: &Call, buffer: &Buffer) -> Result<Answer, eptide_kvm::Error> {
        let object = match call.row.kind {
            Kind::System => Object::System(&self.kvm),
            Kind::Vm => Object::Vm(&self.vm),
            Kind::Vcpu => Object::Vcpu(&self.vcpus[call.vcpu]),
        };
        ioctl(object, call.row.request(), call.argument(buffer))
    }

    /// What can be read back and does not change by itself.
    fn state(&self) -> Vec<String> {
        let mut state = Vec::new();
        for vcpu in &self.vcpus {
            // Timers count and send interrupts.
            let lapic = vcpu.get_lapic().map(|mut lapic| {
                for own_business in [0xa0..0xb0, 0x180..0x290, 0x390..0x394] {
                    lapic.regs[own_business].fill(0);
                }
                lapic.regs
            });
            state.push(format!("{:?} {:?}", vcpu.get_regs(), vcpu.get_sregs2()));
            state.push(format!("{:?}", vcpu.get_vcpu_events()));
            state.push(format!("{:?}", vcpu.get_mp_state()));
            state.push(format!("{:?}", vcpu.get_debug_regs()));
            state.push(format!("{:?}", vcpu.get_xcrs()));
            state.push(format!("{:?}", vcpu.get_xsave().map(|x| x.region)));
            state.push(format!(
                "{:?}",
                vcpu.get_cpuid2(256).map(|c| c.as_slice().len())
            ));
            state.push(format!("{:?} {lapic:?}", vcpu.get_tsc_khz()));
        }
        for chip_id in 0..3 {
            let mut chip = kvm_bindings::kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            if self.vm.get_irqchip(&mut chip).is_err() {
                continue;
            }
            // SAFETY: any bytes are a value of each member.
            unsafe {
                if chip_id == kvm_bindings::KVM_IRQCHIP_IOAPIC {
                    chip.chip.ioapic.irr = 0;
                    for entry in &mut chip.chip.ioapic.redirtbl {
                        entry.bits &= !(1 << 14);
                    }
                } else {
                    (chip.chip.pic.irr, chip.chip.pic.last_irr) = (0, 0);
                }
                state.push(format!("{:?}", chip.chip.dummy));
            }
        }
        state.push(format!("{:?}", self.vm.get_tsc_khz()));
        state
    }
}

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let Some((&shape, mut rest)) = input.split_first() else {
        return;
    };
    let objects = Objects::new(shape);
    let calls: Vec<Call> = std::iter::from_fn(|| Call::take(&mut rest)).collect();
    let alone = calls.len() * usize::from(shape >> 4) / 15;
    let (alone, together) = calls.split_at(alone);
    let buffer = Buffer::new();
    let mut before = objects.state();
    for call in alone {
        let answer = objects.call(call, &buffer);
        assert!(
            answer.is_err() || !call.is_missing(),
            "{:?} without an argument: {answer:?}",
            call.row
        );
        let after = objects.state();
        if let Err(error) = answer
            && call.row.name != "KVM_RUN"
        {
            for (old, new) in before.iter().zip(&after) {
                assert_eq!(
                    old, new,
                    "{:?} failed with {error} and changed this",
                    call.row
                );
            }
        }
        before = after;
    }
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| {
                let (objects, calls) = (&objects, together);
                scope.spawn(move || {
                    let buffer = Buffer::new();
                    for call in calls.iter().filter(|call| call.thread == thread) {
                        // A VM or vCPU that a call makes is dropped at once.
                        let _ = objects.call(call, &buffer);
                    }
                })
            })
            .collect();
        // Joined one by one: the scope's end does not wait for what threads free last, which the
        // leak detector would see.
        for thread in threads {
            thread.join().unwrap();
        }
    });
});
