//! A device that is memory: instructions do there what they do in memory, if one at a time.

mod common;

use common::*;
use eptide_kvm as kvm;
use kvm::VcpuExit;
use kvm_bindings::*;

/// Where the device, or memory in its place, is.
const DEVICE: u64 = 0x4000_0000;
/// Its size.
const SIZE: usize = 0x3000;

/// A machine with AVX for a guest that uses what is at [`DEVICE`].
fn machine(code: &[u8]) -> Machine {
    let machine = Machine::new(Irqchip::None, 1, code);
    machine.enable_avx();
    machine
}

/// What is there at first.
fn contents() -> Vec<u8> {
    (0..SIZE).map(|i| (i * 7 + (i >> 8)) as u8).collect()
}

/// Answers accesses from `device` until the guest stops; how many there were.
fn serve(machine: &mut Machine, device: &mut [u8]) -> (usize, usize) {
    let (mut reads, mut writes) = (0, 0);
    loop {
        match machine.vcpu().run().unwrap() {
            VcpuExit::MmioRead(gpa, data) => {
                let at = (gpa - DEVICE) as usize;
                data.copy_from_slice(&device[at..at + data.len()]);
                reads += 1;
            }
            VcpuExit::MmioWrite(gpa, data) => {
                let at = (gpa - DEVICE) as usize;
                device[at..at + data.len()].copy_from_slice(data);
                writes += 1;
            }
            VcpuExit::IoOut(0x80, _) => return (reads, writes),
            other => panic!("{other:?}"),
        }
    }
}

/// Registers and the device's contents in the end, with memory there and with a device.
fn compare(build: impl Fn(&mut CodeAssembler) -> Result<(), IcedError>) {
    let code = assemble(|a| {
        a.mov(rbx, DEVICE)?;
        a.mov(rbp, 0x6000u64)?;
        build(a)?;
        stop(a)
    });
    let prepare = || {
        let machine = machine(&code);
        machine.memory.write(0x6000, &contents()[..0x800]);
        machine
    };
    let end = |machine: &mut Machine| {
        let regs = machine.vcpu().get_regs().unwrap();
        let xsave = machine.vcpu().get_xsave().unwrap().region;
        let low: Vec<u64> = (0..0x100)
            .map(|i| machine.memory.read_u64(0x6000 + 8 * i))
            .collect();
        (regs, xsave.to_vec(), low)
    };
    let mut with_memory = prepare();
    let memory = Memory::new(SIZE);
    memory.write(0, &contents());
    // SAFETY: the memory outlives the machine's runs.
    unsafe {
        let region = memory.region(1, DEVICE);
        with_memory.vm.set_user_memory_region(region).unwrap();
    }
    runs_to_stop(&mut with_memory);
    let mut with_device = prepare();
    let mut device = contents();
    serve(&mut with_device, &mut device);
    let (wanted, found) = (end(&mut with_memory), end(&mut with_device));
    assert_eq!(found.0, wanted.0);
    assert_eq!(found.1, wanted.1, "extended state");
    assert_eq!(found.2, wanted.2, "memory");
    for (i, &byte) in device.iter().enumerate() {
        let word = memory.read_u64(i as u64 & !7);
        assert_eq!(byte, word.to_le_bytes()[i & 7], "device at {i:#x}");
    }
    drop(with_memory);
}

#[test]
fn arithmetic() {
    compare(|a| {
        a.mov(rax, qword_ptr(rbx))?;
        a.add(qword_ptr(rbx + 8), rax)?;
        a.adc(dword_ptr(rbx + 0x13), 5)?;
        a.sub(rax, qword_ptr(rbx + 0x21))?;
        a.sbb(word_ptr(rbx + 0x30), ax)?;
        a.xor(byte_ptr(rbx + 0x33), 0x55)?;
        a.not(qword_ptr(rbx + 0x38))?;
        a.neg(dword_ptr(rbx + 0x40))?;
        a.inc(word_ptr(rbx + 0x44))?;
        a.shl(qword_ptr(rbx + 0x48), 3)?;
        a.mov(cl, 5)?;
        a.rcr(dword_ptr(rbx + 0x50), cl)?;
        a.shld(qword_ptr(rbx + 0x58), rax, 7)?;
        a.imul_2(rdx, qword_ptr(rbx + 0x60))?;
        a.mul(dword_ptr(rbx + 0x68))?;
        a.mov(edx, 1)?;
        a.div(dword_ptr(rbx + 0x70))?;
        a.movzx(esi, byte_ptr(rbx + 0x80))?;
        a.movsx(rdi, word_ptr(rbx + 0x82))?;
        a.movsxd(r8, dword_ptr(rbx + 0x84))?;
        a.cmp(qword_ptr(rbx + 0x88), rax)?;
        a.setb(byte_ptr(rbx + 0x90))?;
        a.cmovb(r9, qword_ptr(rbx + 0x98))?;
        a.test(dword_ptr(rbx + 0xa0), eax)?;
        a.pushfq()
    });
}

#[test]
fn bits_and_exchanges() {
    compare(|a| {
        a.mov(eax, 77)?;
        a.bts(qword_ptr(rbx + 0x100), rax)?;
        a.lock().btr(dword_ptr(rbx + 0x108), 3)?;
        a.bt(dword_ptr(rbx + 0x110), 9)?;
        a.bsf(rcx, qword_ptr(rbx + 0x118))?;
        a.popcnt(rdx, qword_ptr(rbx + 0x120))?;
        a.xchg(qword_ptr(rbx + 0x128), rax)?;
        a.lock().xadd(qword_ptr(rbx + 0x130), rax)?;
        a.mov(rax, qword_ptr(rbx + 0x138))?;
        a.lock().cmpxchg(qword_ptr(rbx + 0x138), rcx)?;
        a.lock().cmpxchg(qword_ptr(rbx + 0x140), rcx)?;
        a.lock().cmpxchg16b(xmmword_ptr(rbx + 0x150))?;
        a.lock().add(qword_ptr(rbx + 0x160), 9)?;
        a.movbe(r8, qword_ptr(rbx + 0x168))?;
        a.pushfq()
    });
}

#[test]
fn strings() {
    compare(|a| {
        a.cld()?;
        for (from, to) in [(rbx, rbp), (rbp, rbx), (rbx, rbx)] {
            a.lea(rsi, from + 0x203)?;
            a.lea(rdi, to + 0x301)?;
            a.mov(ecx, 11)?;
            a.rep().movsb()?;
            a.mov(ecx, 3)?;
            a.rep().movsq()?;
        }
        a.lea(rdi, rbx + 0xffa)?; // across a page
        a.mov(eax, 0x1122_3344)?;
        a.mov(ecx, 4)?;
        a.rep().stosd()?;
        a.std()?;
        a.lea(rsi, rbx + 0x410)?;
        a.lea(rdi, rbp + 0x410)?;
        a.mov(ecx, 5)?;
        a.rep().movsw()?;
        a.cld()?;
        a.lea(rsi, rbx + 0x500)?;
        a.lea(rdi, rbp + 0x500)?;
        a.mov(ecx, 40)?;
        a.repe().cmpsb()?;
        a.pushfq()?;
        a.lea(rdi, rbx + 0x600)?;
        a.mov(al, 0x77)?;
        a.mov(ecx, 300)?;
        a.repne().scasb()?;
        a.lea(rsi, rbx + 0x700)?;
        a.lodsq()
    });
}

#[test]
fn control_transfers_and_stacks() {
    compare(|a| {
        let (mut jump, mut call, mut after) =
            (a.create_label(), a.create_label(), a.create_label());
        a.lea(rax, qword_ptr(jump))?;
        a.mov(qword_ptr(rbx + 0x10), rax)?;
        a.jmp(qword_ptr(rbx + 0x10))?;
        a.ud2()?;
        a.set_label(&mut jump)?;
        a.lea(rax, qword_ptr(call))?;
        a.mov(qword_ptr(rbx + 0x1c), rax)?;
        a.mov(r12, rsp)?;
        a.lea(rsp, rbx + 0x1800)?;
        a.call(qword_ptr(rbx + 0x1c))?;
        a.push(qword_ptr(rbx + 0x28))?;
        a.push(rax)?;
        a.push(0x1234)?;
        a.pushfq()?;
        a.pop(qword_ptr(rbx + 0x30))?;
        a.pop(rcx)?;
        a.enter(0x20, 2)?;
        a.leave()?;
        a.mov(rbp, 0x6000u64)?;
        a.mov(rsp, r12)?;
        a.jmp(after)?;
        a.set_label(&mut call)?;
        a.inc(r14)?;
        a.ret()?;
        a.set_label(&mut after)?;
        a.mov(word_ptr(rbx + 0x50), ds)?;
        a.mov(es, word_ptr(rbx + 0x50))?;
        a.sidt(ptr(rbx + 0x60))?;
        a.lidt(ptr(rbx + 0x60))?;
        a.sgdt(ptr(rbx + 0x70))?;
        a.lgdt(ptr(rbx + 0x70))?;
        a.smsw(word_ptr(rbx + 0x80))
    });
}

#[test]
fn extended_state() {
    compare(|a| {
        a.movups(xmm0, xmmword_ptr(rbx + 0x10))?;
        a.movaps(xmmword_ptr(rbx + 0x40), xmm0)?;
        a.paddd(xmm0, xmmword_ptr(rbx + 0x80))?;
        a.movhps(qword_ptr(rbx + 0x93), xmm0)?;
        a.movss(xmm1, dword_ptr(rbx + 0xa1))?;
        a.movd(dword_ptr(rbx + 0xb0), xmm1)?;
        a.vmovdqu(ymm2, ymmword_ptr(rbx + 0xff0))?;
        a.vpaddb(ymm3, ymm2, ymmword_ptr(rbx + 0x123))?;
        a.vmovdqu(ymmword_ptr(rbx + 0x1ff3), ymm3)?;
        a.vbroadcastss(ymm4, dword_ptr(rbx + 0x200))?;
        a.vextracti128(xmmword_ptr(rbx + 0x210), ymm3, 1)?;
        a.fild(dword_ptr(rbx + 0x300))?;
        a.fadd(qword_ptr(rbp))?;
        a.fstp(tbyte_ptr(rbx + 0x310))?;
        a.fld(tbyte_ptr(rbx + 0x310))?;
        a.fistp(qword_ptr(rbx + 0x320))?;
        a.fnstcw(word_ptr(rbx + 0x330))?;
        a.stmxcsr(dword_ptr(rbx + 0x340))?;
        a.ldmxcsr(dword_ptr(rbx + 0x340))?;
        a.fxsave(ptr(rbx + 0x400))?;
        a.fxrstor(ptr(rbx + 0x400))?;
        a.mov(eax, 7)?;
        a.xor(edx, edx)?;
        for at in 0..8 {
            a.mov(qword_ptr(rbx + 0xa00 + 8 * at), 0)?;
        }
        a.xsave(ptr(rbx + 0x800))?;
        a.xrstor(ptr(rbx + 0x800))?;
        a.lea(rdi, rbx + 0xd00)?;
        a.pcmpeqd(xmm6, xmm6)?;
        a.maskmovdqu(xmm0, xmm6)
    });
}

/// Half of an access is memory's and half the device's.
#[test]
fn at_the_end_of_memory() {
    const END: u64 = MEMORY as u64;
    let code = assemble(|a| {
        a.mov(rbx, END)?;
        a.mov(rax, 0x1122_3344_5566_7788u64)?;
        a.mov(qword_ptr(rbx - 3), rax)?;
        a.mov(rcx, qword_ptr(rbx - 5))?;
        a.lock().inc(dword_ptr(rbx - 8))?;
        stop(a)
    });
    let mut machine = Machine::new(Irqchip::None, 1, &code);
    match machine.vcpu().run().unwrap() {
        VcpuExit::MmioWrite(END, data) => assert_eq!(data, [0x55, 0x44, 0x33, 0x22, 0x11]),
        other => panic!("{other:?}"),
    }
    match machine.vcpu().run().unwrap() {
        VcpuExit::MmioRead(END, data) => data.copy_from_slice(&[1, 2, 3]),
        other => panic!("{other:?}"),
    }
    runs_to_stop(&mut machine);
    assert_eq!(
        machine.vcpu().get_regs().unwrap().rcx,
        0x0302_0166_7788_0000
    );
    assert_eq!(machine.memory.read_u64(END - 8), 0x6677_8800_0000_0001);
}

/// Runs until an exit that is neither a device's nor port 0x81's.
fn next(machine: &mut Machine) -> Option<kvm_debug_exit_arch> {
    loop {
        match machine.vcpu().run().unwrap() {
            VcpuExit::Debug(debug) => return Some(debug),
            VcpuExit::IoOut(0x80, _) => return None,
            VcpuExit::MmioRead(..)
            | VcpuExit::MmioWrite(..)
            | VcpuExit::IoOut(0x81, _)
            | VcpuExit::IoIn(0x81, _) => {}
            other => panic!("{other:?}"),
        }
    }
}

/// A guest that steps through itself takes one trap an instruction, devices or not.
#[test]
fn the_trap_flag_counts_accesses_to_devices() {
    let code = assemble(|a| {
        a.mov(rbx, DEVICE)?;
        a.pushfq()?;
        a.or(dword_ptr(rsp), 1 << 8)?;
        a.popfq()?;
        a.mov(eax, dword_ptr(rbx))?;
        a.mov(dword_ptr(rbx + 4), eax)?;
        a.add(dword_ptr(rbx + 8), 1)?;
        a.cpuid()?;
        a.mov(ecx, 0x10)?;
        a.rdmsr()?;
        a.out(0x81, al)?;
        a.in_(al, 0x81)?;
        a.pushfq()?;
        a.and(dword_ptr(rsp), !(1 << 8))?;
        a.popfq()?;
        stop(a)
    });
    let mut machine = machine(&code);
    machine.gate(1, 0x3000);
    machine.code_at(0x3000, |a| {
        a.inc(r15)?;
        a.mov(r14, dr6)?;
        a.iretq()
    });
    assert!(next(&mut machine).is_none());
    let regs = machine.vcpu().get_regs().unwrap();
    // The eight, and PUSHF, AND and POPF.
    assert_eq!((regs.r15, regs.r14 >> 14 & 1), (11, 1));
}

/// A debugger that steps sees each instruction once, devices or not.
#[test]
fn steps_end_behind_accesses_to_devices() {
    let code = assemble(|a| {
        a.mov(rbx, DEVICE)?;
        a.mov(eax, dword_ptr(rbx))?;
        a.add(dword_ptr(rbx + 8), 1)?;
        a.cpuid()?;
        a.out(0x81, al)?;
        a.in_(al, 0x81)?;
        a.nop()?;
        stop(a)
    });
    let mut machine = machine(&code);
    let request = kvm_guest_debug {
        control: KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP,
        ..Default::default()
    };
    machine.vcpu().set_guest_debug(&request).unwrap();
    let mut at = vec![CODE];
    while let Some(debug) = next(&mut machine) {
        assert_eq!(debug.exception, 1);
        at.push(debug.pc);
    }
    let lengths: Vec<u64> = at.windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert_eq!(lengths, [10, 2, 4, 2, 2, 2, 1]);
}

/// The shadow of STI and MOV SS ends behind an instruction that is emulated.
#[test]
fn an_interrupt_waits_for_one_access_to_a_device() {
    let code = assemble(|a| {
        a.mov(rbx, DEVICE)?;
        stop(a)?;
        a.sti()?;
        a.mov(eax, dword_ptr(rbx))?;
        a.nop()?;
        a.cli()?;
        stop(a)
    });
    let mut machine = machine(&code);
    machine.gate(0x61, 0x3000);
    machine.code_at(0x3000, |a| {
        a.mov(r15, qword_ptr(rsp))?;
        a.mov(r14, rax)?;
        a.iretq()
    });
    runs_to_stop(&mut machine);
    let rip = machine.vcpu().get_regs().unwrap().rip;
    machine.vcpu().interrupt(0x61).unwrap();
    let mut device = contents();
    serve(&mut machine, &mut device);
    let regs = machine.vcpu().get_regs().unwrap();
    let first = u32::from_le_bytes(device[..4].try_into().unwrap());
    assert_eq!((regs.r15, regs.r14), (rip + 2 + 1 + 2, first.into()));
}
