//! Many processors, started as systems start them.

mod common;

use common::*;
use eptide_kvm::VcpuExit;
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
