//! Guests assembled here drive exits, ioctls and interrupts.

mod common;

use common::*;
use eptide_kvm as kvm;
use kvm::{
    IoEventAddress, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, NoDatamatch,
};
use kvm::{SyncReg, VcpuExit};
use kvm_bindings::*;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::EventFd;

#[test]
fn mmio_is_split_answered_and_neither_lost_nor_doubled() {
    let code = assemble(|a| {
        a.mov(rbx, 0x4000_0000u64)?;
        a.mov(rax, qword_ptr(rbx + 0xffc))?; // crosses a page
        a.add(rax, 1)?;
        a.mov(qword_ptr(rbx + 8), rax)?;
        a.movdqu(xmm0, xmmword_ptr(rbx + 16))?; // 16 bytes
        a.add(dword_ptr(rbx + 64), 5)?; // read, then write
        stop(a)
    });
    let mut machine = Machine::new(Irqchip::None, 1, &code);
    let mut log = Vec::new();
    loop {
        match machine.vcpu().run().unwrap() {
            VcpuExit::MmioRead(gpa, data) => {
                log.push((gpa, data.len(), 'r'));
                data.fill(0);
                data[0] = 0xff;
            }
            VcpuExit::MmioWrite(gpa, data) => {
                log.push((gpa, data.len(), 'w'));
                match gpa {
                    0x4000_0008 => assert_eq!(data, 0x0000_00ff_0000_0100u64.to_le_bytes()),
                    _ => assert_eq!(data, [4, 1, 0, 0]),
                }
            }
            VcpuExit::IoOut(0x80, _) => break,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(
        log,
        [
            (0x4000_0ffc, 4, 'r'),
            (0x4000_1000, 4, 'r'),
            (0x4000_0008, 8, 'w'),
            (0x4000_0010, 8, 'r'),
            (0x4000_0018, 8, 'r'),
            (0x4000_0040, 4, 'r'),
            (0x4000_0040, 4, 'w'),
        ]
    );
}

#[test]
fn string_io_moves_blocks() {
    let code = assemble(|a| {
        a.mov(dx, 0x1f0)?;
        a.mov(rsi, 0x5000u64)?;
        a.mov(rcx, 6u64)?;
        a.rep().outsw()?;
        a.mov(rdi, 0x6000u64)?;
        a.mov(rcx, 5u64)?;
        a.rep().insb()?;
        stop(a)
    });
    let mut machine = Machine::new(Irqchip::None, 1, &code);
    machine.memory.write(0x5000, b"hello world!");
    let mut out = Vec::new();
    let mut given = 0u8;
    loop {
        match machine.vcpu().run().unwrap() {
            VcpuExit::IoOut(0x1f0, data) => out.extend_from_slice(data),
            VcpuExit::IoIn(0x1f0, data) => {
                for byte in data {
                    given += 1;
                    *byte = given;
                }
            }
            VcpuExit::IoOut(0x80, _) => break,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(out, b"hello world!");
    assert_eq!(machine.memory.read_u64(0x6000), 0x05_0403_0201);
    let regs = machine.vcpu().get_regs().unwrap();
    assert_eq!((regs.rcx, regs.rdi, regs.rsi), (0, 0x6005, 0x500c));
}

#[test]
fn a_second_processor_starts_and_gets_interrupts() {
    // The start-up page runs 16-bit code at 0x3000: it raises a flag and halts.
    let code = assemble(|a| {
        let mut wait = a.create_label();
        enable_apic(a)?;
        a.mov(dword_ptr(rbx + 0x310), 1 << 24)?;
        a.mov(dword_ptr(rbx + 0x300), 0x4500)?; // INIT
        a.mov(dword_ptr(rbx + 0x310), 1 << 24)?;
        a.mov(dword_ptr(rbx + 0x300), 0x4603)?; // start-up at 0x3000
        a.set_label(&mut wait)?;
        a.pause()?;
        a.cmp(dword_ptr(0x5000), 0x1234)?;
        a.jne(wait)?;
        stop(a)
    });
    let mut machine = Machine::new(Irqchip::Full, 2, &code);
    machine.memory.write(
        0x3000,
        &[
            0x31, 0xc0, 0x8e, 0xd8, // xor ax, ax; mov ds, ax
            0xc7, 0x06, 0x00, 0x50, 0x34, 0x12, // mov word [0x5000], 0x1234
            0xf4, // hlt
        ],
    );
    let mut second = machine.vcpus.pop().unwrap();
    let state = second.get_mp_state().unwrap().mp_state;
    assert_eq!(state, KVM_MP_STATE_UNINITIALIZED);
    let interrupter = second.interrupter();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let done = &done;
        let thread = scope.spawn(move || {
            while !done.load(Ordering::SeqCst) {
                match second.run() {
                    Ok(exit) => panic!("{exit:?}"),
                    Err(error) => assert!([libc::EAGAIN, libc::EINTR].contains(&error.errno())),
                }
            }
            second
        });
        runs_to_stop(&mut machine);
        done.store(true, Ordering::SeqCst);
        while !thread.is_finished() {
            interrupter.interrupt();
            std::thread::sleep(Duration::from_millis(1));
        }
        let second = thread.join().unwrap();
        assert_eq!(second.get_sregs().unwrap().cs.base, 0x3000);
    });
}

#[test]
fn user_space_injects_interrupts_and_nmis() {
    let code = assemble(|a| {
        a.sti()?;
        a.nop()?;
        stop(a)?;
        stop(a)
    });
    let mut machine = Machine::new(Irqchip::None, 1, &code);
    machine.gate(0x60, 0x2000);
    machine.gate(2, 0x2100);
    machine.code_at(0x2000, |a| {
        a.inc(dword_ptr(0x5000))?;
        a.iretq()
    });
    machine.code_at(0x2100, |a| {
        a.inc(dword_ptr(0x5008))?;
        a.iretq()
    });
    machine.vcpu().get_kvm_run().request_interrupt_window = 1;
    assert!(matches!(
        machine.vcpu().run().unwrap(),
        VcpuExit::IrqWindowOpen
    ));
    assert_eq!(
        machine.vcpu().get_kvm_run().ready_for_interrupt_injection,
        1
    );
    machine.vcpu().interrupt(0x60).unwrap();
    assert_eq!(
        machine.vcpu().interrupt(0x61).unwrap_err().errno(),
        libc::EEXIST
    );
    machine.vcpu().get_kvm_run().request_interrupt_window = 0;
    runs_to_stop(&mut machine);
    assert_eq!(machine.memory.read_u64(0x5000), 1);
    machine.vcpu().nmi().unwrap();
    runs_to_stop(&mut machine);
    assert_eq!(machine.memory.read_u64(0x5008), 1);
}

#[test]
fn debugging_steps_and_breaks() {
    let code = assemble(|a| {
        a.mov(eax, 1)?;
        a.cpuid()?;
        a.nop()?;
        a.int3()?;
        a.mov(ecx, dword_ptr(0x5000))?;
        stop(a)
    });
    let mut machine = Machine::new(Irqchip::None, 1, &code);
    let step = kvm_guest_debug {
        control: KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP,
        ..Default::default()
    };
    machine.vcpu().set_guest_debug(&step).unwrap();
    for expected in [CODE + 5, CODE + 7, CODE + 8] {
        match machine.vcpu().run().unwrap() {
            VcpuExit::Debug(debug) => assert_eq!((debug.exception, debug.pc), (1, expected)),
            other => panic!("{other:?}"),
        }
    }
    let breakpoints = kvm_guest_debug {
        control: KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_SW_BP,
        ..step
    };
    machine.vcpu().set_guest_debug(&breakpoints).unwrap();
    match machine.vcpu().run().unwrap() {
        VcpuExit::Debug(debug) => assert_eq!((debug.exception, debug.pc), (3, CODE + 8)),
        other => panic!("{other:?}"),
    }
    let mut watch = kvm_guest_debug {
        control: KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP,
        ..step
    };
    watch.arch.debugreg[0] = 0x5000;
    watch.arch.debugreg[7] = 0x000f_0402; // reads and writes of four bytes
    machine.vcpu().set_guest_debug(&watch).unwrap();
    let mut regs = machine.vcpu().get_regs().unwrap();
    regs.rip = CODE + 9;
    machine.vcpu().set_regs(&regs).unwrap();
    match machine.vcpu().run().unwrap() {
        VcpuExit::Debug(debug) => assert_eq!((debug.exception, debug.dr6 & 0xf), (1, 1)),
        other => panic!("{other:?}"),
    }
    machine
        .vcpu()
        .set_guest_debug(&kvm_guest_debug::default())
        .unwrap();
    assert_eq!(machine.vcpu().get_debug_regs().unwrap().db[0], 0);
    runs_to_stop(&mut machine);
}

#[test]
fn filtered_msrs_come_to_user_space() {
    let code = assemble(|a| {
        a.mov(ecx, 0xc000_0081u32 as i32)?;
        a.rdmsr()?;
        a.mov(ecx, 0x1234_5678)?;
        a.wrmsr()?;
        stop(a)
    });
    let mut machine = Machine::new(Irqchip::None, 1, &code);
    let reasons = KVM_MSR_EXIT_REASON_FILTER | KVM_MSR_EXIT_REASON_UNKNOWN;
    enable(&machine.vm, KVM_CAP_X86_USER_SPACE_MSR, reasons.into()).unwrap();
    let range = MsrFilterRange {
        flags: MsrFilterRangeFlags::READ,
        base: 0xc000_0081,
        msr_count: 1,
        bitmap: &[0],
    };
    machine
        .vm
        .set_msr_filter(MsrFilterDefaultAction::ALLOW, &[range])
        .unwrap();
    match machine.vcpu().run().unwrap() {
        VcpuExit::X86Rdmsr(exit) => {
            assert_eq!(
                (exit.index, exit.reason),
                (0xc000_0081, kvm::MsrExitReason::Filter)
            );
            *exit.data = 0x1111_2222_3333_4444;
        }
        other => panic!("{other:?}"),
    }
    match machine.vcpu().run().unwrap() {
        VcpuExit::X86Wrmsr(exit) => {
            assert_eq!(
                (exit.index, exit.data),
                (0x1234_5678, 0x1111_2222_3333_4444)
            );
            assert_eq!(exit.reason, kvm::MsrExitReason::Unknown);
        }
        other => panic!("{other:?}"),
    }
    runs_to_stop(&mut machine);
}

#[test]
fn written_pages_are_in_the_log() {
    let code = assemble(|a| {
        a.mov(byte_ptr(0x3000), 1)?;
        stop(a)?;
        a.mov(byte_ptr(0x4000), 1)?;
        a.mov(byte_ptr(0x3001), 1)?;
        stop(a)
    });
    let mut machine = Machine::new(Irqchip::None, 1, &code);
    let mut region = machine.memory.region(0, 0);
    region.flags = KVM_MEM_LOG_DIRTY_PAGES;
    // SAFETY: the same memory with another flag.
    unsafe { machine.vm.set_user_memory_region(region).unwrap() };
    runs_to_stop(&mut machine);
    let log = machine.vm.get_dirty_log(0, MEMORY).unwrap();
    assert_eq!(log[0] & 0x38, 1 << 3);
    assert_eq!(machine.vm.get_dirty_log(0, MEMORY).unwrap()[0] & 0x38, 0);
    runs_to_stop(&mut machine);
    assert_eq!(
        machine.vm.get_dirty_log(0, MEMORY).unwrap()[0] & 0x38,
        1 << 3 | 1 << 4
    );
    assert_eq!(
        machine.vm.get_dirty_log(3, MEMORY).unwrap_err().errno(),
        libc::ENOENT
    );
}

#[test]
fn written_pages_are_in_the_ring() {
    use std::os::fd::AsRawFd;
    const RING: usize = 1024 * size_of::<kvm_dirty_gfn>();
    let code = assemble(|a| {
        a.mov(byte_ptr(0x3000), 1)?;
        stop(a)?;
        a.mov(byte_ptr(0x3000), 2)?;
        stop(a)
    });
    let kvm = system();
    let vm = kvm.create_vm().unwrap();
    let with_ring = |bytes| enable(&vm, KVM_CAP_DIRTY_LOG_RING, bytes);
    assert_eq!(with_ring(4097), Err(libc::EINVAL));
    with_ring(RING as u64).unwrap();
    let mut machine = Machine::on(kvm, vm, Irqchip::None, 1, &code);
    let mut region = machine.memory.region(0, 0);
    region.flags = KVM_MEM_LOG_DIRTY_PAGES;
    // SAFETY: the same memory with another flag.
    unsafe { machine.vm.set_user_memory_region(region).unwrap() };
    // SAFETY: the ring's pages of the vCPU's file.
    let ring = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            RING,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            machine.vcpu().as_raw_fd(),
            KVM_DIRTY_LOG_PAGE_OFFSET as i64 * 4096,
        )
    };
    assert_ne!(ring, libc::MAP_FAILED);
    let entries = ring.cast::<kvm_dirty_gfn>();
    let mut next = 0;
    let mut collect = || {
        let mut found = Vec::new();
        loop {
            // SAFETY: inside the ring, which has 1024 entries.
            let entry = unsafe { &mut *entries.add(next) };
            if entry.flags != 1 {
                return found;
            }
            found.push(entry.offset);
            entry.flags = 2;
            next += 1;
        }
    };
    runs_to_stop(&mut machine);
    let first = collect();
    assert!(first.contains(&3), "{first:?}");
    assert_eq!(
        machine.vm.get_dirty_log(0, MEMORY).unwrap_err().errno(),
        libc::ENXIO
    );
    assert_eq!(
        machine.vm.reset_dirty_rings().unwrap() as usize,
        first.len()
    );
    runs_to_stop(&mut machine);
    assert!(collect().contains(&3), "protected and written again");
    // SAFETY: the mapping made above.
    unsafe { libc::munmap(ring, RING) };
}

#[test]
fn doorbells_and_coalesced_writes_do_not_exit() {
    let code = assemble(|a| {
        a.mov(rbx, 0x4000_0000u64)?;
        a.mov(dword_ptr(rbx), 7)?; // zero-length doorbell
        a.mov(dword_ptr(rbx), 8)?; // again, by the fast path
        a.mov(word_ptr(rbx + 0x100), 3)?; // datamatch
        a.mov(dword_ptr(rbx + 0x1000), 9)?; // coalesced
        a.out(0x99, al)?; // port doorbell
        stop(a)
    });
    let mut machine = Machine::new(Irqchip::None, 1, &code);
    let bells: Vec<_> = (0..3)
        .map(|_| EventFd::new(libc::EFD_NONBLOCK).unwrap())
        .collect();
    let vm = &machine.vm;
    vm.register_ioevent(&bells[0], &IoEventAddress::Mmio(0x4000_0000), NoDatamatch)
        .unwrap();
    vm.register_ioevent(&bells[1], &IoEventAddress::Mmio(0x4000_0100), 3u16)
        .unwrap();
    vm.register_ioevent(&bells[2], &IoEventAddress::Pio(0x99), NoDatamatch)
        .unwrap();
    vm.register_coalesced_mmio(IoEventAddress::Mmio(0x4000_1000), 0x100)
        .unwrap();
    machine.vcpu().map_coalesced_mmio_ring().unwrap();
    runs_to_stop(&mut machine);
    assert_eq!(bells[0].read().unwrap(), 2);
    assert_eq!(bells[1].read().unwrap(), 1);
    assert_eq!(bells[2].read().unwrap(), 1);
    let entry = machine.vcpu().coalesced_mmio_read().unwrap().unwrap();
    assert_eq!(
        (entry.phys_addr, entry.len, entry.data[0]),
        (0x4000_1000, 4, 9)
    );
}

#[test]
fn immediate_exit_and_interruption() {
    let code = assemble(|a| {
        let mut spin = a.create_label();
        a.mov(ax, 1)?;
        a.out(0x80, al)?;
        a.set_label(&mut spin)?;
        a.jmp(spin)
    });
    let mut machine = Machine::new(Irqchip::None, 1, &code);
    machine.vcpu().set_kvm_immediate_exit(1);
    assert_eq!(machine.vcpu().run().unwrap_err().errno(), libc::EINTR);
    machine.vcpu().set_kvm_immediate_exit(0);
    runs_to_stop(&mut machine);
    // The port write is completed even though the run ends at once, and the exit that it was stays
    // to be read.
    machine.vcpu().set_kvm_immediate_exit(1);
    let before = machine.vcpu().get_regs().unwrap().rip;
    assert_eq!(machine.vcpu().run().unwrap_err().errno(), libc::EINTR);
    assert_eq!(machine.vcpu().get_regs().unwrap().rip, before + 2);
    assert_eq!(machine.vcpu().get_kvm_run().exit_reason, KVM_EXIT_IO);
    machine.vcpu().set_kvm_immediate_exit(0);
    let interrupter = machine.vcpu().interrupter();
    let start = Instant::now();
    let thread = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(20));
        interrupter.interrupt();
    });
    assert_eq!(machine.vcpu().run().unwrap_err().errno(), libc::EINTR);
    assert!(start.elapsed() >= Duration::from_millis(20));
    thread.join().unwrap();
}

#[test]
fn missing_memory() {
    let code = assemble(|a| {
        a.mov(byte_ptr(0x18_0000), 5)?;
        stop(a)?;
        a.mov(rax, 0x3000_0000u64)?;
        a.jmp(rax)
    });
    let mut machine = Machine::new(Irqchip::None, 1, &code);
    let page = machine.memory.base.wrapping_add(0x18_0000);
    // SAFETY: a page of the machine's own memory.
    unsafe { libc::mprotect(page.cast(), 4096, libc::PROT_NONE) };
    match machine.vcpu().run() {
        Ok(VcpuExit::MemoryFault { gpa, .. }) => assert_eq!(gpa, 0x18_0000),
        other => panic!("{other:?}"),
    }
    // SAFETY: as above.
    unsafe { libc::mprotect(page.cast(), 4096, libc::PROT_READ | libc::PROT_WRITE) };
    runs_to_stop(&mut machine);
    assert_eq!(machine.memory.read_u64(0x18_0000), 5);
    // A fetch from where there is nothing.
    assert!(matches!(
        machine.vcpu().run().unwrap(),
        VcpuExit::InternalError
    ));
    let run = machine.vcpu().get_kvm_run();
    // SAFETY: the exit reason names the member.
    let suberror = unsafe { run.__bindgen_anon_1.internal.suberror };
    assert_eq!(suberror, KVM_INTERNAL_ERROR_EMULATION);
}

#[test]
fn fetches_from_devices_are_emulation_failures() {
    const HOLE: u64 = 0x3000_0000;
    const CROSSING: u64 = MEMORY as u64 - 3;
    // The reads leave MMIO entries where the fetches go.
    let code = assemble(|a| {
        a.mov(eax, dword_ptr(HOLE))?;
        a.mov(eax, dword_ptr(MEMORY as i64))?;
        a.mov(rax, HOLE)?;
        a.jmp(rax)
    });
    let mut machine = Machine::new(Irqchip::None, 1, &code);
    // An instruction of ten bytes of which three are in memory.
    machine.memory.write(CROSSING, &[0x48, 0xb8, 0x11]);
    for _ in 0..2 {
        assert!(matches!(
            machine.vcpu().run().unwrap(),
            VcpuExit::MmioRead(..)
        ));
    }
    for (rip, expected) in [(HOLE, &[][..]), (CROSSING, &[0x48, 0xb8, 0x11])] {
        if rip == CROSSING {
            let mut regs = machine.vcpu().get_regs().unwrap();
            regs.rip = rip;
            machine.vcpu().set_regs(&regs).unwrap();
        }
        match machine.vcpu().run().unwrap() {
            VcpuExit::InternalError => {}
            other => panic!("{other:?}"),
        }
        assert_eq!(machine.vcpu().get_regs().unwrap().rip, rip);
        let run = machine.vcpu().get_kvm_run();
        // SAFETY: the exit reason names the member, which is plain data.
        let (failure, instruction) = unsafe {
            let failure = run.__bindgen_anon_1.emulation_failure;
            (failure, failure.__bindgen_anon_1.__bindgen_anon_1)
        };
        assert_eq!(failure.suberror, KVM_INTERNAL_ERROR_EMULATION);
        assert_eq!(failure.flags != 0, !expected.is_empty());
        assert_eq!(instruction.insn_size as usize, expected.len());
        assert_eq!(&instruction.insn_bytes[..expected.len()], expected);
    }
}

/// The walk of a table where there is no memory ends in a page fault.
#[test]
fn tables_in_a_hole_are_not_present() {
    const HOLE: u64 = 0x3000_0000;
    const ADDRESS: u64 = 0x4000_0128;
    let code = assemble(|a| {
        a.mov(rsi, ADDRESS)?;
        a.xor(edi, edi)?;
        a.mov(eax, dword_ptr(rsi))?;
        a.mov(dword_ptr(rsi), eax)?;
        a.add(dword_ptr(rsi + 0x1000), eax)?;
        a.mov(eax, dword_ptr(rsi))?;
        a.jmp(rsi)
    });
    let mut machine = Machine::new(Irqchip::None, 1, &code);
    // The directory entry of the address leads to a table in the hole.
    machine.memory.write_u64(0x1_3000, HOLE | 7);
    machine.gate(14, 0x2000);
    // Notes error code and address, and goes on behind the instruction, whose length follows from
    // its first byte, until it was a fetch.
    machine.code_at(0x2000, |a| {
        let (mut three, mut on) = (a.create_label(), a.create_label());
        a.pop(rax)?;
        a.mov(qword_ptr(rdi + 0x5000), rax)?;
        a.mov(rbx, cr2)?;
        a.mov(qword_ptr(rdi + 0x5008), rbx)?;
        a.add(edi, 16)?;
        a.pop(rax)?;
        a.cmp(rax, rsi)?;
        a.je(on)?;
        a.cmp(byte_ptr(rax), 0x01)?; // ADD with a displacement of four bytes
        a.lea(rax, rax + 2)?;
        a.jne(three)?;
        a.add(rax, 4)?;
        a.set_label(&mut three)?;
        a.push(rax)?;
        a.iretq()?;
        a.set_label(&mut on)?;
        stop(a)
    });
    runs_to_stop(&mut machine);
    let found: Vec<(u64, u64)> = (0..5)
        .map(|i| 0x5000 + 16 * i)
        .map(|at| (machine.memory.read_u64(at), machine.memory.read_u64(at + 8)))
        .collect();
    assert_eq!(
        found,
        [
            (0, ADDRESS),
            (2, ADDRESS),
            (2, ADDRESS + 0x1000),
            (0, ADDRESS),
            (0, ADDRESS),
        ]
    );
}

#[test]
fn counters_are_files() {
    use std::os::unix::fs::FileExt;
    let code = assemble(|a| {
        stop(a)?;
        stop(a)
    });
    let mut machine = Machine::new(Irqchip::None, 1, &code);
    let file = std::fs::File::from(machine.vcpu().get_stats_fd().unwrap());
    let mmu = std::fs::File::from(machine.vm.get_stats_fd().unwrap());
    let value = |file: &std::fs::File, wanted: &str| {
        let word = |at: u64| {
            let mut bytes = [0; 4];
            file.read_exact_at(&mut bytes, at).unwrap();
            u32::from_le_bytes(bytes) as u64
        };
        let (name_size, count, descriptors, data) = (word(4), word(8), word(16), word(20));
        let found = (0..count)
            .map(|i| descriptors + i * (16 + name_size))
            .find(|&at| {
                let mut name = vec![0; name_size as usize];
                file.read_exact_at(&mut name, at + 16).unwrap();
                name.split(|&byte| byte == 0).next().unwrap() == wanted.as_bytes()
            });
        let mut bytes = [0; 8];
        let at = data + word(found.unwrap() + 8);
        file.read_exact_at(&mut bytes, at).unwrap();
        u64::from_le_bytes(bytes)
    };
    assert_eq!(value(&file, "io_exits"), 0);
    runs_to_stop(&mut machine);
    runs_to_stop(&mut machine);
    assert_eq!(value(&file, "io_exits"), 2);
    assert!(value(&mmu, "faults") >= 1);
}

#[test]
fn a_triple_fault_shuts_down() {
    let code = assemble(|a| a.ud2());
    let mut machine = Machine::new(Irqchip::None, 1, &code);
    assert!(matches!(machine.vcpu().run().unwrap(), VcpuExit::Shutdown));
}

#[test]
fn registers_travel_in_kvm_run() {
    let code = assemble(|a| {
        a.inc(rax)?;
        stop(a)?;
        a.inc(rax)?;
        stop(a)
    });
    let mut machine = Machine::new(Irqchip::None, 1, &code);
    machine.vcpu().set_sync_valid_reg(SyncReg::Register);
    runs_to_stop(&mut machine);
    let mut sync = machine.vcpu().sync_regs();
    assert_eq!(sync.regs.rax, 1);
    sync.regs.rax = 41;
    *machine.vcpu().sync_regs_mut() = sync;
    machine.vcpu().set_sync_dirty_reg(SyncReg::Register);
    runs_to_stop(&mut machine);
    assert_eq!(machine.vcpu().sync_regs().regs.rax, 42);
    let found = machine.vcpu().translate_gva(0x1234).unwrap();
    assert_eq!((found.valid, found.physical_address), (1, 0x1234));
    assert_eq!(
        machine
            .vcpu()
            .translate_gva(0x1_4000_0000_0000)
            .unwrap()
            .valid,
        0
    );
    machine.vcpu().get_kvm_run().kvm_valid_regs = 1 << 20;
    assert_eq!(machine.vcpu().run().unwrap_err().errno(), libc::EINVAL);
}

#[test]
fn level_interrupts_of_a_split_irqchip_report_their_end() {
    let code = assemble(|a| {
        enable_apic(a)?;
        stop(a)?;
        a.sti()?;
        a.nop()?;
        a.cli()?;
        stop(a)
    });
    let mut machine = Machine::new(Irqchip::Split, 1, &code);
    machine.gate(0x55, 0x2000);
    machine.code_at(0x2000, |a| {
        a.mov(dword_ptr(rbx + 0xb0), 0)?;
        a.iretq()
    });
    let mut entry = kvm_irq_routing_entry {
        gsi: 5,
        type_: KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    entry.u.msi = kvm_irq_routing_msi {
        address_lo: 0xfee0_0000,
        data: 0xc055,
        ..Default::default()
    };
    let routing = KvmIrqRouting::from_entries(&[entry]).unwrap();
    machine.vm.set_gsi_routing(&routing).unwrap();
    runs_to_stop(&mut machine);
    machine.vm.set_irq_line(5, true).unwrap();
    match machine.vcpu().run().unwrap() {
        VcpuExit::IoapicEoi(0x55) => {}
        other => panic!("{other:?}"),
    }
    runs_to_stop(&mut machine);
}

#[test]
fn interrupts_reach_a_running_guest_through_an_irqfd() {
    let code = assemble(|a| {
        let mut wait = a.create_label();
        enable_apic(a)?;
        a.mov(rcx, 0xfec0_0000u64)?;
        a.mov(dword_ptr(rcx), 0x10 + 2 * 20)?;
        a.mov(dword_ptr(rcx + 0x10), 0x45)?; // GSI 20: edge, vector 0x45
        stop(a)?;
        a.sti()?;
        a.set_label(&mut wait)?;
        a.cmp(dword_ptr(0x5000), 3)?;
        a.jne(wait)?;
        stop(a)
    });
    let mut machine = Machine::new(Irqchip::Full, 1, &code);
    machine.gate(0x45, 0x2000);
    machine.code_at(0x2000, |a| {
        a.inc(dword_ptr(0x5000))?;
        a.mov(dword_ptr(rbx + 0xb0), 0)?;
        a.iretq()
    });
    let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    machine.vm.register_irqfd(&line, 20).unwrap();
    runs_to_stop(&mut machine);
    let at = machine.memory.base as usize + 0x5000;
    let count = move || {
        // SAFETY: the machine's memory outlives the thread, which the scope joins.
        unsafe { (at as *const u32).read_volatile() }
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for expected in 1..=3 {
                line.write(1).unwrap();
                while count() < expected {
                    std::thread::yield_now();
                }
            }
        });
        runs_to_stop(&mut machine);
    });
}
