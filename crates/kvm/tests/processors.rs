//! Many processors, started as systems start them.

mod common;

use common::*;
use eptide_kvm::VcpuExit;
use kvm_bindings::CpuId;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Starts `count - 1` processors with INIT and start-up IPIs to all but the sender; each counts
/// itself, takes one interrupt, counts again and halts.
fn all_start(count: u64) {
    let others = count as i32 - 1;
    let code = assemble(|a| {
        let (mut started, mut interrupted) = (a.create_label(), a.create_label());
        enable_apic(a)?;
        a.mov(dword_ptr(rbx + 0x300), 0xc_4500)?; // INIT
        a.mov(dword_ptr(rbx + 0x300), 0xc_4603)?; // start-up at 0x3000
        a.mov(dword_ptr(rbx + 0x300), 0xc_4603)?; // again, as systems do
        a.set_label(&mut started)?;
        a.pause()?;
        a.cmp(word_ptr(0x5000), others)?;
        a.jne(started)?;
        a.mov(dword_ptr(rbx + 0x300), 0xc_4400)?; // NMI
        a.set_label(&mut interrupted)?;
        a.pause()?;
        a.cmp(word_ptr(0x5008), others)?;
        a.jne(interrupted)?;
        a.out(0x80, al)
    });
    let mut machine = Machine::new(Irqchip::Full, count, &code);
    machine.memory.write(
        0x3000,
        &[
            0x31, 0xc0, // xor ax, ax
            0x8e, 0xd8, // mov ds, ax
            0x8e, 0xd0, // mov ss, ax
            0xbc, 0x00, 0x48, // mov sp, 0x4800: shared, but what is popped is what all push
            0xf0, 0xff, 0x06, 0x00, 0x50, // lock inc word [0x5000]
            0xf4, // hlt
            0xeb, 0xfd, // jmp to it
        ],
    );
    // The NMI's real-mode vector: 0000:3100.
    machine.memory.write(8, &[0x00, 0x31, 0x00, 0x00]);
    machine.memory.write(
        0x3100,
        &[
            0xf0, 0xff, 0x06, 0x08, 0x50, // lock inc word [0x5008]
            0xf4, // hlt
            0xeb, 0xfd, // jmp to it
        ],
    );
    let rest = machine.vcpus.split_off(1);
    let interrupters: Vec<_> = rest.iter().map(|vcpu| vcpu.interrupter()).collect();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let threads: Vec<_> = rest
            .into_iter()
            .map(|mut vcpu| {
                let done = &done;
                scope.spawn(move || {
                    while !done.load(Ordering::SeqCst) {
                        match vcpu.run() {
                            Ok(exit) => panic!("{exit:?}"),
                            Err(error) => {
                                assert!([libc::EAGAIN, libc::EINTR].contains(&error.errno()));
                            }
                        }
                    }
                })
            })
            .collect();
        let exit = machine.vcpu().run();
        done.store(true, Ordering::SeqCst);
        assert!(matches!(exit, Ok(VcpuExit::IoOut(0x80, _))), "{exit:?}");
        while threads.iter().any(|thread| !thread.is_finished()) {
            interrupters.iter().for_each(|one| one.interrupt());
            std::thread::sleep(Duration::from_millis(1));
        }
    });
    assert_eq!(machine.memory.read_u64(0x5000), others as u64);
    assert_eq!(machine.memory.read_u64(0x5008), others as u64);
}

#[test]
fn sixteen_start() {
    all_start(16);
}

#[test]
fn sixty_four_start() {
    all_start(64);
}

/// Whether leaf, sub-leaf, register (EAX first) and bit of a CPUID is set.
fn has_bit(cpuid: &CpuId, (leaf, subleaf, register, bit): (u32, u32, usize, u32)) -> bool {
    let entries = cpuid.as_slice().iter();
    let mut found = entries.filter(|e| (e.function, e.index) == (leaf, subleaf));
    found.any(|e| [e.eax, e.ebx, e.ecx, e.edx][register] >> bit & 1 != 0)
}

/// What takes no instruction of the host is offered on every host.
#[test]
fn what_is_done_in_software_is_offered_everywhere() {
    let cpuid = system().get_supported_cpuid(256).unwrap();
    for (name, place) in [
        ("PCID", (1, 0, 2, 17)),
        ("MOVBE", (1, 0, 2, 22)),
        ("POPCNT", (1, 0, 2, 23)),
        ("FSGSBASE", (7, 0, 1, 0)),
        ("SMEP", (7, 0, 1, 7)),
        ("INVPCID", (7, 0, 1, 10)),
        ("SMAP", (7, 0, 1, 20)),
        ("UMIP", (7, 0, 2, 2)),
        ("PKU", (7, 0, 2, 3)),
        ("LA57", (7, 0, 2, 16)),
        ("RDPID", (7, 0, 2, 22)),
        ("NX", (0x8000_0001, 0, 3, 20)),
        ("1 GiB pages", (0x8000_0001, 0, 3, 26)),
    ] {
        assert!(has_bit(&cpuid, place), "{name}");
    }
    let widths = cpuid.as_slice().iter().find(|e| e.function == 0x8000_0008);
    assert_eq!(widths.unwrap().eax >> 8 & 0xff, 57);
}

/// PKRU as a component of extended state: of the guest's areas in both formats, whose sizes CPUID
/// states, and of KVM_GET_XSAVE's.
#[test]
fn pkru_is_saved_and_restored() {
    let code = assemble(|a| {
        a.mov(rax, cr4)?;
        a.or(rax, 1 << 18 | 1 << 22)?;
        a.mov(cr4, rax)?;
        a.xor(ecx, ecx)?;
        a.xor(edx, edx)?;
        a.mov(eax, 0x207)?;
        a.xsetbv()?;
        a.mov(eax, 0x1234_5674)?;
        a.wrpkru()?;
        a.mov(rbx, 0x6000u64)?;
        a.mov(eax, 0x207)?;
        a.xsave(ptr(rbx))?;
        a.mov(eax, 0x207)?;
        a.xsavec(ptr(rbx + 0x1000))?;
        for (subleaf, register) in [(0, r8d), (1, r9d), (9, r10d)] {
            a.push(rbx)?;
            a.mov(eax, 0xd)?;
            a.mov(ecx, subleaf)?;
            a.cpuid()?;
            a.mov(register, ebx)?;
            a.pop(rbx)?;
        }
        stop(a)?;
        a.xor(ecx, ecx)?;
        a.rdpkru()?;
        a.mov(r11d, eax)?;
        a.xor(edx, edx)?;
        a.mov(eax, 0x200)?;
        a.xrstor(ptr(rbx))?;
        a.rdpkru()?;
        stop(a)
    });
    let mut machine = Machine::new(Irqchip::None, 1, &code);
    runs_to_stop(&mut machine);
    let regs = machine.vcpu().get_regs().unwrap();
    let offset = regs.r10;
    assert_eq!(regs.r8, offset + 8, "standard format");
    assert_eq!(regs.r9, 576 + 256 + 8, "compacted format");
    let pkru = |at: u64| machine.memory.read_u64(at) & 0xffff_ffff;
    assert_eq!(pkru(0x6000 + offset), 0x1234_5674);
    assert_eq!(pkru(0x7000 + 576 + 256), 0x1234_5674);
    let mut xsave = machine.vcpus[0].get_xsave().unwrap();
    assert_eq!(xsave.region[offset as usize / 4], 0x1234_5674);
    assert_eq!(xsave.region[128] & 0x200, 0x200, "the component is there");
    xsave.region[offset as usize / 4] = 0x54;
    // SAFETY: the area has the size that KVM_CAP_XSAVE2 states.
    unsafe { machine.vcpus[0].set_xsave(&xsave).unwrap() };
    runs_to_stop(&mut machine);
    let regs = machine.vcpu().get_regs().unwrap();
    assert_eq!((regs.r11, regs.rax), (0x54, 0x1234_5674));
    // Without the component it is initial.
    xsave.region[128] &= !0x200;
    // SAFETY: as above.
    unsafe { machine.vcpus[0].set_xsave(&xsave).unwrap() };
    assert_eq!(
        machine.vcpus[0].get_xsave().unwrap().region[offset as usize / 4],
        0
    );
}
