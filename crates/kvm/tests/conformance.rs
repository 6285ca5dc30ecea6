//! Answers that programs which test KVM look at.

mod common;

use common::*;
use eptide_kvm as kvm;
use kvm::{VcpuExit, VcpuFd};
use kvm_bindings::*;

fn msrs(entries: &[(u32, u64)]) -> Msrs {
    let entries: Vec<_> = entries
        .iter()
        .map(|&(index, data)| kvm_msr_entry {
            index,
            data,
            ..Default::default()
        })
        .collect();
    Msrs::from_entries(&entries).unwrap()
}

fn errno<T: std::fmt::Debug>(result: Result<T, kvm::Error>) -> i32 {
    result.unwrap_err().errno()
}

/// Writes an MSR; whether that was allowed.
fn set_msr(vcpu: &VcpuFd, index: u32, value: u64) -> bool {
    vcpu.set_msrs(&msrs(&[(index, value)])).unwrap() == 1
}

/// Reads an MSR, if that is allowed.
fn msr(vcpu: &VcpuFd, index: u32) -> Option<u64> {
    let mut one = msrs(&[(index, 0)]);
    let read = vcpu.get_msrs(&mut one).unwrap();
    (read == 1).then(|| one.as_slice()[0].data)
}

/// Makes an exception skip three bytes and be counted in R15.
fn skips(machine: &Machine, vector: u8, has_error_code: bool) {
    machine.gate(vector, 0x2000);
    machine.code_at(0x2000, |a| {
        if has_error_code {
            a.add(rsp, 8)?;
        }
        a.add(qword_ptr(rsp), 3)?;
        a.inc(r15)?;
        a.iretq()
    });
}

/// How many exceptions there were since the last look.
fn skipped(machine: &mut Machine) -> u64 {
    let mut regs = machine.vcpu().get_regs().unwrap();
    let count = std::mem::take(&mut regs.r15);
    machine.vcpu().set_regs(&regs).unwrap();
    count
}

/// DR7.GD among the registers that user space debugs with.
#[test]
fn general_detect_is_user_spaces_where_the_breakpoints_are() {
    const GD: u64 = 1 << 13;
    const BD: u64 = 1 << 13;
    let code = assemble(|a| {
        a.nop()?;
        a.mov(rax, dr0)?;
        stop(a)
    });
    let mut machine = Machine::new(Irqchip::None, 1, &code);
    let mut debug = kvm_guest_debug {
        control: KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP,
        ..Default::default()
    };
    debug.arch.debugreg[7] = 0x400 | GD;
    machine.vcpu().set_guest_debug(&debug).unwrap();
    match machine.vcpu().run().unwrap() {
        VcpuExit::Debug(exit) => {
            assert_eq!((exit.exception, exit.pc), (1, CODE + 1));
            assert_eq!(exit.dr6, 0xffff_0ff0 | BD);
        }
        other => panic!("{other:?}"),
    }
    debug.arch.debugreg[7] = 0x400;
    machine.vcpu().set_guest_debug(&debug).unwrap();
    runs_to_stop(&mut machine);
}

/// A VMM that changes RCX between a string instruction's exit and its completion gets what the
/// count says, and no more than was asked for.
#[test]
fn a_changed_count_limits_what_is_completed() {
    for (changed, written, end) in [(1, 1, 0x5001), (0, 0, 0x5000), (5, 5, 0x5005)] {
        let code = assemble(|a| {
            a.mov(edi, 0x5000)?;
            a.mov(ecx, 3)?;
            a.mov(edx, 0x80)?;
            a.rep().insb()?;
            stop(a)
        });
        let mut machine = Machine::new(Irqchip::None, 1, &code);
        machine.memory.write_u64(0x5000, 0);
        let mut exits = 0;
        loop {
            match machine.vcpu().run().unwrap() {
                VcpuExit::IoIn(0x80, data) => data.fill(0xaa),
                VcpuExit::IoOut(0x80, _) => break,
                other => panic!("{other:?}"),
            }
            if exits == 0 {
                let mut regs = machine.vcpu().get_regs().unwrap();
                regs.rcx = changed;
                machine.vcpu().set_regs(&regs).unwrap();
            }
            exits += 1;
        }
        let expected = 0xaaaa_aaaa_aaaa_aaaa & ((1 << (8 * written)) - 1);
        assert_eq!(machine.memory.read_u64(0x5000), expected);
        let regs = machine.vcpu().get_regs().unwrap();
        assert_eq!((regs.rcx, regs.rdi), (0, end));
    }
}

#[test]
fn the_greatest_id_is_set_once() {
    let vm = system().create_vm().unwrap();
    assert_eq!(enable(&vm, KVM_CAP_MAX_VCPU_ID, 1 << 20), Err(libc::EINVAL));
    vm.set_boot_cpu_id(2).unwrap();
    assert_eq!(enable(&vm, KVM_CAP_MAX_VCPU_ID, 1), Err(libc::EINVAL));
    enable(&vm, KVM_CAP_MAX_VCPU_ID, 3).unwrap();
    enable(&vm, KVM_CAP_MAX_VCPU_ID, 3).unwrap();
    assert_eq!(errno(vm.set_boot_cpu_id(4)), libc::EINVAL);
    assert_eq!(enable(&vm, KVM_CAP_MAX_VCPU_ID, 4), Err(libc::EINVAL));
    assert_eq!(errno(vm.create_vcpu(3)), libc::EINVAL);
    vm.create_vcpu(2).unwrap();
    assert_eq!(errno(vm.set_boot_cpu_id(2)), libc::EBUSY);
}

/// KVM_GET_CPUID2 gives what the guest is shown, and what it gives may be set again later.
#[test]
fn the_cpuid_of_a_vcpu_is_what_its_guest_sees() {
    // For each pair of numbers from 0x6000 on: CPUID, compared with the words behind them.
    let code = assemble(|a| {
        let (mut next, mut done, mut differs) =
            (a.create_label(), a.create_label(), a.create_label());
        a.mov(esi, 0x6000)?;
        a.set_label(&mut next)?;
        a.cmp(dword_ptr(rsi + 24), 0)?;
        a.je(done)?;
        a.mov(eax, dword_ptr(rsi))?;
        a.mov(ecx, dword_ptr(rsi + 4))?;
        a.cpuid()?;
        for (register, at) in [(eax, 8), (ebx, 12), (ecx, 16), (edx, 20)] {
            a.cmp(register, dword_ptr(rsi + at))?;
            a.jne(differs)?;
        }
        a.add(esi, 28)?;
        a.jmp(next)?;
        a.set_label(&mut differs)?;
        a.ud2()?;
        a.set_label(&mut done)?;
        stop(a)
    });
    let mut machine = Machine::new(Irqchip::Full, 1, &code);
    let given = machine.vcpu().get_cpuid2(256).unwrap();
    let mut bytes = Vec::new();
    for e in given.as_slice() {
        for word in [e.function, e.index, e.eax, e.ebx, e.ecx, e.edx, 1] {
            bytes.extend(word.to_le_bytes());
        }
    }
    bytes.extend([0; 28]);
    machine.memory.write(0x6000, &bytes);
    machine.gate(6, 0x2000);
    machine.code_at(0x2000, |a| a.out(0x99, al));
    let same = matches!(machine.vcpu().run().unwrap(), VcpuExit::IoOut(0x80, _));
    let at = (machine.vcpu().get_regs().unwrap().rsi - 0x6000) / 28;
    assert!(same, "{:x?}", given.as_slice().get(at as usize));
    machine.vcpu().set_cpuid2(&given).unwrap();
    let supported = machine.kvm.get_supported_cpuid(256).unwrap();
    machine.vcpu().set_cpuid2(&supported).unwrap();
    let mut other = given;
    let leaf = other.as_mut_slice().iter_mut().find(|e| e.function == 7);
    leaf.unwrap().ebx ^= 1;
    let error = machine.vcpu().set_cpuid2(&other).unwrap_err();
    assert_eq!(error.errno(), libc::EINVAL);
}

/// A vCPU whose halts do not exit cannot be woken by a hypercall.
#[test]
fn kicks_are_not_shown_where_halts_stay_inside() {
    let kvm = system();
    for stays in [false, true] {
        let vm = kvm.create_vm().unwrap();
        if stays {
            let halts = KVM_X86_DISABLE_EXITS_HLT as u64;
            enable(&vm, KVM_CAP_X86_DISABLE_EXITS, halts).unwrap();
        }
        let vcpu = vm.create_vcpu(0).unwrap();
        vcpu.set_cpuid2(&kvm.get_supported_cpuid(256).unwrap())
            .unwrap();
        let shown = vcpu.get_cpuid2(256).unwrap();
        let leaf = |e: &&kvm_cpuid_entry2| e.function == 0x4000_0001;
        let features = shown.as_slice().iter().find(leaf).unwrap().eax;
        assert_eq!(features >> 7 & 1 == 0, stays, "KVM_FEATURE_PV_UNHALT");
    }
}

/// MONITOR and MWAIT do nothing, unless it is asked that they follow CPUID; and CPUID follows
/// IA32_MISC_ENABLE if that is asked.
#[test]
fn quirks_of_mwait() {
    const MISC_ENABLE: u32 = 0x1a0;
    const MWAIT: u64 = 1 << 18;
    let code = assemble(|a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.mov(eax, 1)?;
        a.cpuid()?;
        a.mov(r8d, ecx)?;
        a.mov(eax, 0x5000)?;
        a.xor(ecx, ecx)?;
        a.xor(edx, edx)?;
        a.monitor()?;
        a.mwait()?;
        stop(a)?;
        a.jmp(again)
    });
    let mut machine = Machine::new(Irqchip::None, 1, &code);
    skips(&machine, 6, false);
    let never_faults = KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS as u64;
    let no_mwait = KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT as u64;
    for (disabled, value, expected) in [
        (0, MWAIT, (false, 0)),
        (never_faults, MWAIT, (false, 2)),
        (no_mwait, 0, (false, 0)),
        (no_mwait, MWAIT, (true, 0)),
        (no_mwait | never_faults, MWAIT, (true, 0)),
        (no_mwait | never_faults, 0, (false, 2)),
    ] {
        enable(&machine.vm, KVM_CAP_DISABLE_QUIRKS2, disabled).unwrap();
        assert!(set_msr(machine.vcpu(), MISC_ENABLE, value));
        runs_to_stop(&mut machine);
        let shown = machine.vcpu().get_regs().unwrap().r8 >> 3 & 1 != 0;
        assert_eq!((shown, skipped(&mut machine)), expected, "{disabled:#x}");
    }
}

/// The other vendor's hypercall instruction is replaced by the guest's own.
#[test]
fn the_other_vendors_hypercall_is_corrected() {
    const VMCALL: u64 = 0xc1_010f;
    const VMMCALL: u64 = 0xd9_010f;
    const AT: u64 = 0x3000;
    let code = assemble(|a| {
        a.mov(eax, 11)?; // KVM_HC_SCHED_YIELD
        a.xor(ebx, ebx)?;
        a.call(AT)?;
        stop(a)
    });
    for (vendor, own, other) in [
        (b"AuthenticAMD", VMMCALL, VMCALL),
        (b"GenuineIntel", VMCALL, VMMCALL),
    ] {
        for corrects in [true, false] {
            let mut machine = Machine::new(Irqchip::Full, 1, &code);
            let mut cpuid = machine.kvm.get_supported_cpuid(256).unwrap();
            let words: Vec<u32> = vendor
                .chunks(4)
                .map(|four| u32::from_le_bytes(four.try_into().unwrap()))
                .collect();
            let leaf = &mut cpuid.as_mut_slice()[0];
            assert_eq!(leaf.function, 0);
            (leaf.ebx, leaf.edx, leaf.ecx) = (words[0], words[1], words[2]);
            machine.vcpu().set_cpuid2(&cpuid).unwrap();
            skips(&machine, 6, false);
            if !corrects {
                let quirk = KVM_X86_QUIRK_FIX_HYPERCALL_INSN as u64;
                enable(&machine.vm, KVM_CAP_DISABLE_QUIRKS2, quirk).unwrap();
            }
            machine.memory.write_u64(AT, other | 0xc3 << 24);
            runs_to_stop(&mut machine);
            let (result, found) = if corrects { (0, own) } else { (11, other) };
            assert_eq!(machine.vcpu().get_regs().unwrap().rax, result);
            assert_eq!(skipped(&mut machine), !corrects as u64);
            assert_eq!(machine.memory.read_u64(AT) & 0xff_ffff, found);
        }
    }
}

/// Paravirtual features that CPUID does not show work nonetheless, unless user space asks for it
/// to be otherwise.
#[test]
fn paravirtual_features_may_be_held_to_cpuid() {
    const STEAL_TIME: u32 = 0x4b56_4d03;
    const REGISTERS: [u32; 7] = [
        0x11,
        0x12,
        0x4b56_4d00,
        0x4b56_4d01,
        STEAL_TIME,
        0x4b56_4d04,
        0x4b56_4d05,
    ];
    let code = assemble(|a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.mov(ecx, STEAL_TIME)?;
        a.rdmsr()?;
        a.nop()?;
        a.mov(eax, 11)?; // KVM_HC_SCHED_YIELD
        a.vmcall()?;
        stop(a)?;
        a.jmp(again)
    });
    let mut machine = Machine::new(Irqchip::Full, 1, &code);
    let mut cpuid = machine.kvm.get_supported_cpuid(256).unwrap();
    for e in cpuid.as_mut_slice() {
        if e.function == 0x4000_0001 {
            e.eax = 0;
        }
    }
    machine.vcpu().set_cpuid2(&cpuid).unwrap();
    skips(&machine, 13, true);
    let mut request = kvm_enable_cap {
        cap: KVM_CAP_ENFORCE_PV_FEATURE_CPUID,
        ..Default::default()
    };
    for enforced in [false, true] {
        request.args[0] = enforced as u64;
        machine.vcpu().enable_cap(&request).unwrap();
        for index in REGISTERS {
            let read = msr(machine.vcpu(), index);
            assert_eq!(read.is_some(), !enforced, "{index:#x}");
        }
        runs_to_stop(&mut machine);
        let result = machine.vcpu().get_regs().unwrap().rax as i64;
        assert_eq!(result, if enforced { -1000 } else { 0 });
        // The handler skips RDMSR and the instruction behind it.
        assert_eq!(skipped(&mut machine), enforced as u64);
    }
    request.cap = KVM_CAP_HLT;
    let error = machine.vcpu().enable_cap(&request).unwrap_err();
    assert_eq!(error.errno(), libc::EINVAL);
}

/// Before there is a CPUID, registers can hold what could be offered, and nothing else.
#[test]
fn control_registers_without_cpuid() {
    let kvm = system();
    let vm = kvm.create_vm().unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    let mut sregs = vcpu.get_sregs().unwrap();
    for (value, expected) in [(0x620, true), (1 << 13, false), (1 << 31, false)] {
        sregs.cr4 = value;
        assert_eq!(vcpu.set_sregs(&sregs).is_ok(), expected, "{value:#x}");
    }
    assert_eq!(vcpu.get_sregs().unwrap().cr4, 0x620);
}

/// Registers that exist, and what is in them when the feature behind them does not exist.
#[test]
fn registers_of_absent_features() {
    const POWER_CTL: u32 = 0x1fc;
    const PERF_CAPABILITIES: u32 = 0x345;
    let mut machine = Machine::new(Irqchip::None, 1, &[]);
    let vcpu = machine.vcpu();
    assert!(set_msr(vcpu, POWER_CTL, 0x1234));
    assert_eq!(msr(vcpu, POWER_CTL), Some(0x1234));
    assert!(set_msr(vcpu, PERF_CAPABILITIES, 0));
    assert!(!set_msr(vcpu, PERF_CAPABILITIES, 1));
    let mut feature = msrs(&[(PERF_CAPABILITIES, 1)]);
    assert_eq!(machine.kvm.get_msrs(&mut feature).unwrap(), 1);
    assert_eq!(feature.as_slice()[0].data, 0);
}

/// vCPUs whose counters run at another frequency than the host's are set together as others are.
#[test]
fn scaled_counters_agree() {
    const TSC: u32 = 0x10;
    let mut machine = Machine::new(Irqchip::None, 2, &[]);
    for vcpu in &machine.vcpus {
        vcpu.set_tsc_khz(777_777).unwrap();
    }
    for (n, vcpu) in machine.vcpus.iter().enumerate() {
        assert!(set_msr(vcpu, TSC, 5_000_000_000 + n as u64));
        std::thread::sleep(std::time::Duration::from_millis(3));
    }
    let readings: Vec<_> = (machine.vcpus.iter())
        .map(|vcpu| msr(vcpu, TSC).unwrap())
        .collect();
    assert!(readings[0] <= readings[1], "{readings:?}");
    // A write of 0 initialises a vCPU and changes nothing.
    assert!(set_msr(machine.vcpu(), TSC, 0));
    assert!(msr(machine.vcpu(), TSC).unwrap() >= readings[1]);
}

/// A counter that is read after another vCPU's reading came through memory is not behind it.
#[test]
fn counters_are_read_in_order() {
    let code = assemble(|a| {
        let (mut again, mut behind) = (a.create_label(), a.create_label());
        a.mov(edi, 0x5000)?;
        a.mov(esi, 300_000)?;
        a.set_label(&mut again)?;
        a.mov(rbx, qword_ptr(rdi))?;
        a.rdtsc()?;
        a.shl(rdx, 32)?;
        a.or(rax, rdx)?;
        a.mov(qword_ptr(rdi), rax)?;
        a.cmp(rax, rbx)?;
        a.jb(behind)?;
        a.dec(esi)?;
        a.jnz(again)?;
        stop(a)?;
        a.set_label(&mut behind)?;
        a.sub(rbx, rax)?;
        a.ud2()
    });
    let mut machine = Machine::new(Irqchip::None, 2, &code);
    machine.long_mode(1);
    std::thread::scope(|scope| {
        for vcpu in &mut machine.vcpus {
            scope.spawn(move || match vcpu.run() {
                Ok(VcpuExit::IoOut(0x80, _)) => {}
                other => {
                    let exit = format!("{other:?}");
                    panic!("{exit}: behind by {}", vcpu.get_regs().unwrap().rbx);
                }
            });
        }
    });
}
