//! INS and OUTS where their memory ends: at the wrap of their index register, at their segment's
//! limit, and on devices.
//!
//! Source: SDM volume 1, "String Operations"; volume 2, "INS/INSB/INSW/INSD" and
//! "OUTS/OUTSB/OUTSW/OUTSD"; volume 3, "Limit Checking".

mod common;

use common::*;
use eptide_kvm::VcpuExit;
use kvm_bindings::*;

const PORT: u16 = 0x1f0;
/// Where a device, or memory in its place, is; RAM ends here.
const DEVICE: u64 = MEMORY as u64;

/// A machine in real mode at CODE, with ES and DS at `segment`.
fn real_mode(code: &[u8], segment: u16) -> Machine {
    let machine = Machine::new(Irqchip::None, 1, code);
    let vcpu = &machine.vcpus[0];
    let mut sregs = vcpu.get_sregs().unwrap();
    let plain = |selector: u16, type_| kvm_segment {
        base: u64::from(selector) << 4,
        limit: 0xffff,
        selector,
        type_,
        present: 1,
        s: 1,
        ..Default::default()
    };
    sregs.cs = plain(0, 11);
    (sregs.ds, sregs.es) = (plain(segment, 3), plain(segment, 3));
    (sregs.ss, sregs.fs, sregs.gs) = (plain(0, 3), plain(0, 3), plain(0, 3));
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x10, 0, 0, 0);
    vcpu.set_sregs(&sregs).unwrap();
    machine
}

fn set(machine: &mut Machine, index: u64, count: u64) {
    let mut regs = machine.vcpu().get_regs().unwrap();
    (regs.rsi, regs.rdi, regs.rcx, regs.rdx) = (index, index, count, PORT.into());
    machine.vcpu().set_regs(&regs).unwrap();
}

/// What went to the port and came from it, and the accesses to the device.
#[derive(Default)]
struct Served {
    written: Vec<u8>,
    read: u8,
    device: Vec<u8>,
    device_accesses: usize,
}

/// Serves a port that counts and a device of memory; the exit that is neither.
fn serve(machine: &mut Machine, served: &mut Served) -> String {
    loop {
        match machine.vcpu().run().unwrap() {
            VcpuExit::IoIn(PORT, data) => {
                for byte in data {
                    served.read = served.read.wrapping_add(1);
                    *byte = served.read;
                }
            }
            VcpuExit::IoOut(PORT, data) => served.written.extend_from_slice(data),
            VcpuExit::MmioRead(gpa, data) => {
                let at = (gpa - DEVICE) as usize;
                data.copy_from_slice(&served.device[at..at + data.len()]);
                served.device_accesses += 1;
            }
            VcpuExit::MmioWrite(gpa, data) => {
                let at = (gpa - DEVICE) as usize;
                served.device[at..at + data.len()].copy_from_slice(data);
                served.device_accesses += 1;
            }
            other => return format!("{other:?}"),
        }
    }
}

fn bytes(machine: &Machine, at: u64, length: u64) -> Vec<u8> {
    (at..at + length)
        .map(|at| machine.memory.read_u64(at & !7).to_le_bytes()[(at & 7) as usize])
        .collect()
}

#[test]
fn strings_wrap_with_their_index() {
    // ES:FFF0 is 20000, and ES:0 is 10010.
    let mut machine = real_mode(&[0xf3, 0x6c, 0xe6, 0x80], 0x1001);
    set(&mut machine, 0xfff0, 0x20);
    let mut served = Served::default();
    assert!(serve(&mut machine, &mut served).starts_with("IoOut"));
    let expected: Vec<u8> = (1..=0x20).collect();
    assert_eq!(bytes(&machine, 0x2_0000, 0x10), expected[..0x10]);
    assert_eq!(bytes(&machine, 0x1_0010, 0x10), expected[0x10..]);
    assert_eq!(
        bytes(&machine, 0x2_0010, 0x10),
        [0; 0x10],
        "behind the segment"
    );
    let regs = machine.vcpu().get_regs().unwrap();
    assert_eq!((regs.rdi & 0xffff, regs.rcx), (0x10, 0));

    let mut machine = real_mode(&[0xf3, 0x6e, 0xe6, 0x80], 0x1001);
    set(&mut machine, 0xfff0, 0x20);
    machine.memory.write(0x2_0000, &expected[..0x10]);
    machine.memory.write(0x1_0010, &expected[0x10..]);
    let mut served = Served::default();
    assert!(serve(&mut machine, &mut served).starts_with("IoOut"));
    assert_eq!(served.written, expected);
}

#[test]
fn strings_end_at_their_segments_limit() {
    for (instruction, is_input) in [(0x6c, true), (0x6e, false), (0x6d, true), (0x6f, false)] {
        // With a 32-bit address size; no handler: the fault shuts the machine down.
        let mut machine = real_mode(&[0x67, 0xf3, instruction], 0x1001);
        let mut sregs = machine.vcpu().get_sregs().unwrap();
        sregs.idt.limit = 0;
        machine.vcpu().set_sregs(&sregs).unwrap();
        set(&mut machine, 0xfff0, 0x20);
        let mut served = Served::default();
        assert_eq!(serve(&mut machine, &mut served), "Shutdown");
        let size = if instruction & 1 == 0 { 1 } else { 2 };
        let regs = machine.vcpu().get_regs().unwrap();
        let index = if is_input { regs.rdi } else { regs.rsi };
        assert_eq!((index, regs.rcx), (0x1_0000, 0x20 - 0x10 / size));
        let moved = if is_input {
            served.read.into()
        } else {
            served.written.len()
        };
        assert_eq!(moved, 0x10);
        assert_eq!(
            bytes(&machine, 0x2_0010, 0x10),
            [0; 0x10],
            "behind the segment"
        );
    }
}

/// Code of one instruction between a set-up and the end, in 64-bit mode.
fn string(instruction: &[u8], down: bool) -> Vec<u8> {
    let mut code = vec![if down { 0xfd } else { 0xfc }];
    code.extend_from_slice(instruction);
    code.extend([0xe6, 0x80]);
    code
}

/// INSB to INSD and OUTSB to OUTSD, with and without REP.
const FORMS: [(&[u8], u64, bool); 7] = [
    (&[0x6c], 1, true),
    (&[0xf3, 0x6c], 1, true),
    (&[0xf3, 0x66, 0x6d], 2, true),
    (&[0xf3, 0x6d], 4, true),
    (&[0xf3, 0x6e], 1, false),
    (&[0xf3, 0x66, 0x6f], 2, false),
    (&[0xf3, 0x6f], 4, false),
];

/// The same instruction on a device and on memory in its place: what was moved, and registers.
fn compare(instruction: &[u8], is_input: bool, down: bool, start: u64, count: u64) {
    let contents: Vec<u8> = (0..0x1000).map(|i| (i * 7 + 3) as u8).collect();
    let run = |is_device: bool| {
        let mut machine = Machine::new(Irqchip::None, 1, &string(instruction, down));
        let memory = Memory::new(0x1000);
        memory.write(0, &contents);
        machine.memory.write(DEVICE - 0x10, &contents[..0x10]);
        if !is_device {
            let region = memory.region(1, DEVICE);
            // SAFETY: the memory outlives the machine's runs.
            unsafe { machine.vm.set_user_memory_region(region).unwrap() };
        }
        set(&mut machine, start, count);
        let mut served = Served {
            device: contents.clone(),
            ..Served::default()
        };
        let end = serve(&mut machine, &mut served);
        assert!(end.starts_with("IoOut"), "{instruction:02x?}: {end}");
        assert_eq!(served.device_accesses != 0, is_device);
        let device = if is_device {
            served.device
        } else {
            let word = |i: u64| memory.read_u64(8 * i).to_le_bytes();
            (0..0x200).flat_map(word).collect()
        };
        let ram = bytes(&machine, DEVICE - 0x10, 0x10);
        let regs = machine.vcpu().get_regs().unwrap();
        drop(machine);
        (regs, served.written, served.read, device, ram)
    };
    let (wanted, found) = (run(false), run(true));
    assert_eq!(
        found.0, wanted.0,
        "registers of {instruction:02x?} at {start:#x}"
    );
    assert_eq!(
        found.1, wanted.1,
        "what {instruction:02x?} wrote to the port"
    );
    assert_eq!(
        found.2, wanted.2,
        "how often {instruction:02x?} read the port"
    );
    assert!(found.3 == wanted.3, "the device after {instruction:02x?}");
    assert_eq!(
        found.4, wanted.4,
        "memory before it after {instruction:02x?}"
    );
    assert_ne!(is_input, found.2 == 0);
}

#[test]
fn a_device_is_memory_to_strings() {
    for (instruction, size, is_input) in FORMS {
        compare(instruction, is_input, false, DEVICE + 0x100, 5);
        compare(instruction, is_input, true, DEVICE + 0x100, 5);
        // From RAM to the device, with an element across where that can be.
        let start = DEVICE - 2 * size + (size - 1);
        let is_single = instruction.len() == 1;
        compare(
            instruction,
            is_input,
            false,
            if is_single { DEVICE } else { start },
            6,
        );
    }
}

#[test]
fn a_read_only_slot_is_a_device_to_what_is_written() {
    let mut machine = Machine::new(Irqchip::None, 1, &string(&[0xf3, 0x6c], false));
    let memory = Memory::new(0x1000);
    let region = kvm_userspace_memory_region {
        flags: KVM_MEM_READONLY,
        ..memory.region(1, DEVICE)
    };
    // SAFETY: the memory outlives the machine's runs.
    unsafe { machine.vm.set_user_memory_region(region).unwrap() };
    set(&mut machine, DEVICE, 3);
    let mut served = Served {
        device: vec![0; 0x1000],
        ..Served::default()
    };
    assert!(serve(&mut machine, &mut served).starts_with("IoOut"));
    assert_eq!(served.device[..4], [1, 2, 3, 0]);
    assert_eq!(memory.read_u64(0), 0);
    drop(machine);
}
