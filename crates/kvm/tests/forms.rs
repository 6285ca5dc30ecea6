//! Every instruction form with an operand in memory, where the memory is a device, partly a device, or
//! may only be read: what it does is what it does in memory. And where it ends at its segment's limit,
//! or behind it.
//!
//! The forms are found by decoding every opcode of every map with every prefix that tells forms apart.

mod common;

use common::*;
use eptide_kvm as kvm;
use iced_x86::{Code, Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};
use kvm::VcpuExit;
use kvm_bindings::*;
use std::collections::BTreeMap;

/// Where the device, or memory in its place, is.
const DEVICE: u64 = 0x4000_0000;
const SIZE: usize = 0x3000;
/// Where handlers are, 16 bytes for each, and where they leave their vector.
const HANDLERS: u64 = 0x3000;
const VECTOR: u64 = 0x6ff0;
/// No instruction makes more accesses.
const MOST_EXITS: usize = 2000;

/// What lies at [`DEVICE`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Memory,
    Device,
    ReadOnly,
    /// A page of memory, then a device.
    Both,
}

/// How an instruction ended, and everything that it may have changed.
#[derive(PartialEq)]
struct Outcome {
    exit: String,
    vector: u8,
    regs: kvm_regs,
    extended: Vec<u32>,
    operand: Vec<u8>,
    stack: Vec<u64>,
}

struct Bench {
    machine: Machine,
    operand: Memory,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
}

fn contents() -> Vec<u8> {
    (0..SIZE).map(|i| (i * 7 + (i >> 8)) as u8).collect()
}

impl Bench {
    fn new(place: Place) -> Bench {
        let machine = Machine::new(Irqchip::None, 1, &[]);
        machine.enable_avx();
        for vector in 0..32 {
            let handler = HANDLERS + 16 * u64::from(vector);
            machine.gate(vector, handler);
            machine.code_at(handler, |a| {
                a.mov(byte_ptr(VECTOR), i32::from(vector) | 0x80)?;
                stop(a)
            });
        }
        let operand = Memory::new(SIZE);
        let mut region = operand.region(1, DEVICE);
        match place {
            Place::Memory => {}
            Place::Device => region.memory_size = 0,
            Place::ReadOnly => region.flags = KVM_MEM_READONLY,
            Place::Both => region.memory_size = 0x1000,
        }
        if region.memory_size != 0 {
            // SAFETY: the memory lives as long as the machine beside it.
            unsafe { machine.vm.set_user_memory_region(region).unwrap() };
        }
        let sregs = machine.vcpus[0].get_sregs().unwrap();
        let mut xsave = machine.vcpus[0].get_xsave().unwrap();
        for (i, word) in xsave.region[40..104].iter_mut().enumerate() {
            *word = 0x3f80_0000 + (i as u32) * 0x01_2345;
        }
        Bench {
            machine,
            operand,
            sregs,
            xsave,
        }
    }

    /// Executes an instruction with its operand at `address`.
    fn run(&mut self, code: &[u8], address: u64) -> Outcome {
        let memory = &self.machine.memory;
        memory.write(CODE, &[code, &[0xe6, 0x80]].concat());
        memory.write(VECTOR, &[0]);
        memory.write(STACK - 0x200, &[0x5a; 0x400]);
        self.operand.write(0, &contents());
        let vcpu = &mut self.machine.vcpus[0];
        vcpu.set_vcpu_events(&Default::default()).unwrap();
        vcpu.set_sregs(&self.sregs).unwrap();
        // SAFETY: the area has the size that KVM_CAP_XSAVE2 states.
        unsafe { vcpu.set_xsave(&self.xsave).unwrap() };
        vcpu.set_regs(&kvm_regs {
            rip: CODE,
            rsp: STACK,
            rflags: 2,
            rax: 0x0102_0304_0506_0708,
            rbx: address,
            rcx: 3,
            rdx: 0x1112_1314_1516_1718,
            rsi: address,
            rdi: address + 0x40,
            rbp: 0x2122_2324_2526_2728,
            r8: 0x3132_3334_3536_3738,
            ..Default::default()
        })
        .unwrap();
        let exit = Bench::serve(vcpu, &self.operand);
        let memory = &self.machine.memory;
        let vcpu = &self.machine.vcpus[0];
        Outcome {
            exit,
            vector: memory.read_u64(VECTOR) as u8,
            regs: vcpu.get_regs().unwrap(),
            extended: vcpu.get_xsave().unwrap().region.to_vec(),
            operand: (0..SIZE as u64 / 8)
                .flat_map(|i| self.operand.read_u64(8 * i).to_le_bytes())
                .collect(),
            stack: (0..0x80)
                .map(|i| memory.read_u64(STACK - 0x200 + 8 * i))
                .collect(),
        }
    }

    /// Answers accesses from the operand's bytes until the guest stops; how it did.
    fn serve(vcpu: &mut kvm::VcpuFd, operand: &Memory) -> String {
        for _ in 0..MOST_EXITS {
            match vcpu.run().unwrap() {
                // A bit string's bit may be far away.
                VcpuExit::MmioRead(gpa, data) if is_outside(gpa) => data.fill(0x33),
                VcpuExit::MmioWrite(gpa, _) if is_outside(gpa) => {}
                VcpuExit::MmioRead(gpa, data) => {
                    for (i, byte) in data.iter_mut().enumerate() {
                        let at = gpa - DEVICE + i as u64;
                        *byte = operand.read_u64(at & !7).to_le_bytes()[at as usize & 7];
                    }
                }
                VcpuExit::MmioWrite(gpa, data) => operand.write(gpa - DEVICE, data),
                VcpuExit::IoOut(0x80, _) => return "stop".into(),
                other => return format!("{other:?}"),
            }
        }
        "no end of accesses".into()
    }
}

fn is_outside(gpa: u64) -> bool {
    !(DEVICE..DEVICE + SIZE as u64 - 8).contains(&gpa)
}

/// Whether the operand of a form can lie where RBX, or RSI and RDI, point.
fn has_memory(i: &Instruction) -> bool {
    let explicit = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory);
    let string = (0..i.op_count()).any(|n| {
        matches!(
            i.op_kind(n),
            OpKind::MemorySegRSI
                | OpKind::MemorySegRDI
                | OpKind::MemoryESRDI
                | OpKind::MemorySegESI
                | OpKind::MemorySegEDI
                | OpKind::MemoryESEDI
        )
    });
    // Gathers have an index of vectors; strings of ports have a test of their own.
    let gathers = i.memory_index().is_vector_register();
    let ports = [Mnemonic::Insb, Mnemonic::Insw, Mnemonic::Insd]
        .iter()
        .chain(&[Mnemonic::Outsb, Mnemonic::Outsw, Mnemonic::Outsd])
        .any(|&m| m == i.mnemonic());
    let based = !explicit || matches!(i.memory_base(), Register::RBX | Register::EBX);
    (explicit || string) && based && !gathers && !ports
}

/// Adds the form that `head` begins, if it is one.
fn decode(bits: u32, head: &[u8], forms: &mut BTreeMap<Code, Vec<u8>>) {
    let mut bytes = head.to_vec();
    // No displacement, and an immediate operand of 1.
    bytes.extend([1, 0, 0, 0, 0, 0, 0, 0]);
    let mut decoder = Decoder::with_ip(bits, &bytes, CODE, DecoderOptions::NONE);
    let instruction = decoder.decode();
    if !instruction.is_invalid() && has_memory(&instruction) {
        bytes.truncate(instruction.len());
        forms.entry(instruction.code()).or_insert(bytes);
    }
}

/// One encoding of each form of 64- or 32-bit code.
fn forms(bits: u32) -> BTreeMap<Code, Vec<u8>> {
    let mut forms = BTreeMap::new();
    let maps: [&[u8]; 4] = [&[], &[0x0f], &[0x0f, 0x38], &[0x0f, 0x3a]];
    let prefixes: [&[u8]; 9] = [
        &[],
        &[0x48],
        &[0x66],
        &[0xf3],
        &[0xf2],
        &[0x66, 0x48],
        &[0xf3, 0x48],
        &[0xf2, 0x48],
        &[0x66, 0xf2],
    ];
    for opcode in 0..=255 {
        for register in 0..8 {
            let modrm = 0x03 | register << 3;
            for (map, prefix) in maps.iter().flat_map(|m| prefixes.map(|p| (m, p))) {
                decode(bits, &[prefix, map, &[opcode, modrm]].concat(), &mut forms);
            }
            for map in 1..=3 {
                for rest in 0..16 {
                    // W, VVVV = 1, L, PP.
                    let last = rest >> 3 << 7 | 0xe << 3 | rest & 7;
                    let none = last | 0xf << 3;
                    for last in [last, none] {
                        decode(bits, &[0xc4, 0xe0 | map, last, opcode, modrm], &mut forms);
                    }
                }
            }
        }
    }
    forms
}

/// Compares every form in `place` with memory, the operand at `address`.
fn compare(place: Place, address: u64) {
    let forms = forms(64);
    assert!(forms.len() > 1000, "{} forms", forms.len());
    let (mut memory, mut other) = (Bench::new(Place::Memory), Bench::new(place));
    let mut failures = Vec::new();
    let mut executed = 0;
    for (code, bytes) in &forms {
        // Without EPT, KVM itself reads the descriptor, and gives up if it is not in memory.
        if *code == Code::Invpcid_r64_m128 && env!("CARGO_CRATE_NAME") == "on_shadow_tables" {
            continue;
        }
        let wanted = memory.run(bytes, address);
        let found = other.run(bytes, address);
        executed += usize::from(wanted.vector == 0 && wanted.exit == "stop");
        if wanted != found {
            failures.push(format!(
                "{code:?} {bytes:02x?}: {} {:x}, not {} {:x}; registers {}, extended {}, memory {}, stack {}",
                found.exit,
                found.vector,
                wanted.exit,
                wanted.vector,
                found.regs == wanted.regs,
                found.extended == wanted.extended,
                found.operand == wanted.operand,
                found.stack == wanted.stack,
            ));
        }
    }
    assert!(executed > 500, "{executed} of {} executed", forms.len());
    assert!(
        failures.is_empty(),
        "{} of {}:\n{}",
        failures.len(),
        forms.len(),
        failures.join("\n")
    );
}

#[test]
fn in_a_device() {
    compare(Place::Device, DEVICE + 0x100);
}

#[test]
fn in_a_read_only_slot() {
    compare(Place::ReadOnly, DEVICE + 0x100);
}

#[test]
fn across_memory_and_a_device() {
    for before in [1, 4, 7] {
        compare(Place::Both, DEVICE + 0x1000 - before);
    }
}

/// Where the operand of 32-bit code is.
const OPERAND: u64 = 0x10_0000;

/// A machine for 32-bit code, with handlers that leave their vector, and its registers.
fn protected() -> (Machine, kvm_sregs) {
    let machine = Machine::new(Irqchip::None, 1, &[]);
    machine.protected_mode();
    let mut sregs = machine.vcpus[0].get_sregs().unwrap();
    sregs.cr4 = 0x4_0600;
    let code = sregs.gdt.base + 8;
    machine.memory.write_u64(code, 0x00cf_9b00_0000_ffff);
    for vector in 0..32 {
        let handler = HANDLERS + 16 * vector;
        let gate = handler & 0xffff | 8 << 16 | 0x8e00 << 32;
        machine.memory.write_u64(IDT + 8 * vector, gate);
        let bytes = assemble32(handler as u32, |a| {
            a.mov(byte_ptr(VECTOR), vector as i32 | 0x80)?;
            stop(a)
        });
        machine.memory.write(handler, &bytes);
    }
    (machine, sregs)
}

/// Executes 32-bit code with this limit of DS and ES: the exit, the vector, registers and operand.
fn limited(
    (machine, sregs): &mut (Machine, kvm_sregs),
    code: &[u8],
    limit: u64,
) -> (String, u8, kvm_regs, Vec<u64>) {
    machine.memory.write(CODE, &[code, &[0xe6, 0x80]].concat());
    machine.memory.write(VECTOR, &[0]);
    machine.memory.write(STACK - 0x200, &[0; 0x400]);
    machine.memory.write(OPERAND, &contents()[..0x400]);
    let mut sregs = *sregs;
    (sregs.ds.limit, sregs.es.limit) = (limit as u32, limit as u32);
    (sregs.ds.g, sregs.es.g) = ((limit > 0xf_ffff) as u8, (limit > 0xf_ffff) as u8);
    let vcpu = &mut machine.vcpus[0];
    vcpu.set_vcpu_events(&Default::default()).unwrap();
    vcpu.set_sregs(&sregs).unwrap();
    vcpu.set_fpu(&kvm_fpu {
        fcw: 0x37f,
        mxcsr: 0x1f80,
        ..Default::default()
    })
    .unwrap();
    vcpu.set_regs(&kvm_regs {
        rip: CODE,
        rsp: STACK,
        rflags: 2,
        rax: 0x0506_0708,
        rbx: OPERAND,
        rcx: 3,
        rdx: 0x1516_1718,
        rsi: OPERAND,
        rdi: OPERAND,
        rbp: 0x2526_2728,
        ..Default::default()
    })
    .unwrap();
    let exit = match vcpu.run().unwrap() {
        VcpuExit::IoOut(0x80, _) => "stop".into(),
        other => format!("{other:?}"),
    };
    let regs = vcpu.get_regs().unwrap();
    let memory = &machine.memory;
    let operand = (0..0x80).map(|i| memory.read_u64(OPERAND + 8 * i));
    (exit, memory.read_u64(VECTOR) as u8, regs, operand.collect())
}

/// Forms that access less than their operand, somewhere else, or nothing.
fn is_loose(i: &Instruction) -> bool {
    use Mnemonic as M;
    let bit_string = matches!(i.mnemonic(), M::Bt | M::Bts | M::Btr | M::Btc)
        && i.op_kind(1) == OpKind::Register;
    let name = format!("{:?}", i.mnemonic());
    let is_named = |part: &str| name.to_lowercase().contains(part);
    let cache = matches!(
        i.mnemonic(),
        M::Clflush | M::Clflushopt | M::Clwb | M::Cldemote
    );
    let nothing =
        is_named("prefetch") || is_named("nop") || matches!(i.mnemonic(), M::Lea | M::Invlpg);
    bit_string || cache || nothing || is_named("maskmov") || i.mnemonic() == M::Xlatb
}

/// An operand that ends at its segment's limit is accessed; one that ends a byte behind it is #GP,
/// before anything has changed.
#[test]
fn at_a_limit() {
    let mut bench = protected();
    let (mut tried, mut failures) = (0, Vec::new());
    for (code, bytes) in forms(32) {
        let instruction = Decoder::new(32, &bytes, DecoderOptions::NONE).decode();
        let size = instruction.memory_size().size() as u64;
        let free = limited(&mut bench, &bytes, u32::MAX.into());
        if size == 0 || is_loose(&instruction) || free.1 != 0 || free.0 != "stop" {
            continue;
        }
        tried += 1;
        let fits = limited(&mut bench, &bytes, OPERAND + size - 1);
        let short = limited(&mut bench, &bytes, OPERAND + size - 2);
        let before = contents()[..0x400].to_vec();
        let after: Vec<u8> = short.3.iter().flat_map(|word| word.to_le_bytes()).collect();
        let kept = (short.2.rax, short.2.rbx, short.2.rcx) == (0x0506_0708, OPERAND, 3);
        if fits != free {
            failures.push(format!(
                "{code:?} {bytes:02x?}: {} {:x} at the limit",
                fits.0, fits.1
            ));
        }
        if short.1 != 13 | 0x80 || !kept || before != after {
            failures.push(format!(
                "{code:?} {bytes:02x?}: {} {:x} beyond the limit, registers kept {kept}, memory {}",
                short.0,
                short.1,
                before == after
            ));
        }
    }
    assert!(tried > 500, "{tried}");
    assert!(
        failures.is_empty(),
        "{}:\n{}",
        failures.len(),
        failures.join("\n")
    );
}
