//! Exits that hang on instruction boundaries and on time: bus locks, the notify window, PAUSE
//! loops; and the VM functions.

use crate::bench::*;
use crate::guest::{EPT_RWX, Ept, Memory};
use arch::control_registers::Rflags;
use arch::controls::{PrimaryControls, SecondaryControls, VmFunctions};
use arch::exit::{EptViolation, ExitReason};
use eptide_cpu::{Bus, BusResponse, Emulated};
use iced_x86::code_asm::*;

#[test]
fn a_split_lock_exits_behind_its_instruction() {
    type Lock = fn(&mut CodeAssembler);
    let locks: [(Lock, u64); 4] = [
        (|a| a.lock().add(dword_ptr(rcx), 5).unwrap(), DATA + 62),
        (|a| a.xchg(qword_ptr(rcx), rsi).unwrap(), DATA + 57),
        (|a| a.lock().cmpxchg8b(qword_ptr(rcx)).unwrap(), DATA + 60),
        // Across pages, too.
        (|a| a.lock().bts(word_ptr(rcx), 3).unwrap(), DATA + 0xfff),
    ];
    for (lock, address) in locks {
        for detected in [false, true] {
            let mut guest = long_guest();
            let length = assemble(64, CODE, lock).len() as u64;
            guest.memory.write_u64(address, 5);
            guest.load(&assemble(64, CODE, |a| {
                lock(a);
                a.hlt().unwrap();
            }));
            let state = &mut guest.vcpu.state;
            state.regs[..4].copy_from_slice(&[5, address, 0, 7]);
            state.regs[6] = 9;
            state.set_rflags((Rflags::TF | Rflags::FIXED).bits());
            if detected {
                guest.controls.secondary |= SecondaryControls::BUS_LOCK_DETECTION;
                let exit = guest.run_to(ExitReason::BusLock);
                assert_eq!((exit.qualification, exit.instruction_length), (0, 0));
                assert_eq!(guest.vcpu.state.rip, CODE + length);
            }
            // The trap is not lost for the exit.
            assert_eq!(guest.run_to_handler(), 1);
            assert_eq!(guest.stack(0), CODE + length);
            let now = guest.memory.read_u64(address);
            assert_ne!(now, 5, "the access was made");
        }
    }
}

#[test]
fn a_lock_inside_a_line_and_a_plain_access_across_lines_are_no_bus_locks() {
    let mut guest = long_guest();
    guest.controls.secondary |= SecondaryControls::BUS_LOCK_DETECTION;
    guest.load(&assemble(64, CODE, |a| {
        a.lock().inc(dword_ptr(rcx + 60)).unwrap();
        a.inc(dword_ptr(rcx + 62)).unwrap();
        a.hlt().unwrap();
    }));
    guest.vcpu.state.regs[1] = DATA;
    guest.run_to_halt();
}

#[test]
fn a_split_lock_that_faults_is_none_and_one_that_is_emulated_exits() {
    let mut guest = long_guest();
    guest.controls.secondary |= SecondaryControls::BUS_LOCK_DETECTION;
    guest.memory.write_u64(0x3008, 0);
    guest.load(&assemble(64, CODE, |a| {
        a.lock().inc(dword_ptr(rcx)).unwrap()
    }));
    guest.vcpu.state.regs[1] = 0x20_0000 - 2;
    guest
        .ept
        .set(0x1f_f000, (guest.memory.hva + DATA) | EPT_RWX);
    assert_eq!(guest.run_to_handler(), 14);

    struct NoBus;
    impl Bus for NoBus {
        fn read(&mut self, _: u64, _: &mut [u8]) -> BusResponse {
            BusResponse::Fault
        }
        fn write(&mut self, _: u64, _: &[u8]) -> BusResponse {
            BusResponse::Fault
        }
    }
    guest.vcpu.state.rip = CODE;
    guest.vcpu.state.regs[1] = DATA + 62;
    let emulated = guest.vcpu.emulate(&guest.controls, None, &mut NoBus);
    let Emulated::Exit(exit) = emulated else {
        panic!("{emulated:?}");
    };
    assert_eq!(exit.reason, ExitReason::BusLock);
    assert_eq!(guest.memory.bytes()[DATA as usize + 62], 1);
}

#[test]
fn a_pause_loop_exits_in_the_kernel_only() {
    for (cpl0, reason) in [
        (true, ExitReason::Pause),
        (false, ExitReason::PreemptionTimer),
    ] {
        let mut guest = long_guest();
        if !cpl0 {
            guest.long_mode(3);
            guest.vcpu.state.tr.access.0 = 0x8b;
        }
        guest.controls.secondary |= SecondaryControls::PAUSE_LOOP_EXITING;
        (guest.controls.ple_gap, guest.controls.ple_window) = (1_000_000, 2_000);
        guest.controls.pin |= arch::controls::PinControls::PREEMPTION_TIMER;
        guest.controls.preemption_timer = 1_000_000;
        guest.load(&assemble(64, CODE, |a| {
            let mut again = a.create_label();
            a.set_label(&mut again).unwrap();
            a.pause().unwrap();
            a.jmp(again).unwrap();
        }));
        guest.run_to(reason);
    }
    // Pauses far apart are no loop.
    let mut guest = long_guest();
    guest.controls.secondary |= SecondaryControls::PAUSE_LOOP_EXITING;
    (guest.controls.ple_gap, guest.controls.ple_window) = (0, 0);
    guest.load(&assemble(64, CODE, |a| {
        a.pause().unwrap();
        a.pause().unwrap();
        a.hlt().unwrap();
    }));
    guest.run_to_halt();
}

#[test]
fn user_waits_end_and_are_checked() {
    let mut guest = long_guest();
    guest.controls.secondary |= SecondaryControls::USER_WAIT_PAUSE;
    guest.load(&assemble(64, CODE, |a| {
        a.umonitor(rcx).unwrap();
        a.stc().unwrap();
        a.umwait(esi).unwrap();
        a.setc(bl).unwrap();
        a.rdtsc().unwrap();
        a.add(eax, 5_000).unwrap();
        a.adc(edx, 0).unwrap();
        a.tpause(esi).unwrap();
        a.hlt().unwrap();
    }));
    let state = &mut guest.vcpu.state;
    (state.regs[1], state.regs[3], state.regs[6]) = (DATA, 9, 0);
    guest.run_to_halt();
    assert_eq!(guest.vcpu.state.regs[3] & 0xff, 0, "carry is cleared");
    // A reserved bit of the state; the control off.
    for (state, control, vector) in [(2, true, 13), (0, false, 6)] {
        guest.load(&assemble(64, CODE, |a| a.tpause(esi).unwrap()));
        guest.vcpu.state.regs[6] = state;
        if !control {
            guest.controls.secondary -= SecondaryControls::USER_WAIT_PAUSE;
        }
        assert_eq!(guest.run_to_handler(), vector);
    }
}

#[test]
fn vmfunc_switches_to_the_tables_of_the_list() {
    let mut guest = long_guest();
    // The same guest with another page at DATA.
    let other = Memory::new(4096);
    other.write_u64(0, 0x2222);
    guest.memory.write_u64(DATA, 0x1111);
    let mut second = Ept::new();
    second.map(0, &guest.memory, EPT_RWX);
    second.map(DATA, &other, EPT_RWX);
    let list = Memory::new(4096);
    list.write_u64(0, guest.controls.eptp.0);
    list.write_u64(8 * 511, second.eptp().0);
    guest.controls.secondary |= SecondaryControls::ENABLE_VMFUNC;
    guest.controls.vm_functions = VmFunctions::EPTP_SWITCHING;
    guest.controls.eptp_list = list.hva;
    guest.load(&assemble(64, CODE, |a| {
        a.mov(rbx, qword_ptr(DATA)).unwrap();
        a.vmfunc().unwrap();
        a.mov(rsi, qword_ptr(DATA)).unwrap();
        a.xor(ecx, ecx).unwrap();
        a.vmfunc().unwrap();
        a.mov(rdi, qword_ptr(DATA)).unwrap();
        a.mov(ecx, 511).unwrap();
        a.vmfunc().unwrap();
        a.hlt().unwrap();
    }));
    (guest.vcpu.state.regs[0], guest.vcpu.state.regs[1]) = (0, 511);
    guest.run_to_halt();
    let regs = guest.vcpu.state.regs;
    assert_eq!((regs[3], regs[6], regs[7]), (0x1111, 0x2222, 0x1111));
    assert_eq!(guest.vcpu.take_switched_eptp(), Some(second.eptp()));
    assert_eq!(guest.vcpu.take_switched_eptp(), None);

    // An entry with the old pointer is back at the old tables.
    guest.load(&assemble(64, CODE, |a| {
        a.mov(rbx, qword_ptr(DATA)).unwrap();
        a.hlt().unwrap();
    }));
    guest.run_to_halt();
    assert_eq!(guest.vcpu.state.regs[3], 0x1111);

    // What cannot be switched to exits, and so do other functions.
    for (function, index, entry) in [
        (0, 512, 0),
        (0, 7, second.eptp().0 | 7),
        (0, 7, 0),
        (1, 511, 0),
        (64, 511, 0),
    ] {
        list.write_u64(8 * 7, entry);
        guest.load(&assemble(64, CODE, |a| a.vmfunc().unwrap()));
        (guest.vcpu.state.regs[0], guest.vcpu.state.regs[1]) = (function, index);
        let exit = guest.run_to(ExitReason::Vmfunc);
        assert_eq!((exit.instruction_length, guest.vcpu.state.rip), (3, CODE));
    }
    guest.controls.secondary -= SecondaryControls::ENABLE_VMFUNC;
    assert_eq!(guest.run_to_handler(), 6);
}

#[test]
fn encls_follows_its_bitmap() {
    for (bitmap, leaf, reason) in [
        (1 << 3, 3, Some(ExitReason::Encls)),
        (1 << 3, 4, None),
        (1 << 63, 70, Some(ExitReason::Encls)),
    ] {
        let mut guest = long_guest();
        guest.controls.secondary |= SecondaryControls::ENCLS_EXITING;
        guest.controls.encls_exiting_bitmap = bitmap;
        guest.load(&assemble(64, CODE, |a| a.encls().unwrap()));
        guest.vcpu.state.regs[0] = leaf;
        match reason {
            Some(reason) => assert_eq!(guest.run_to(reason).instruction_length, 3),
            None => assert_eq!(guest.run_to_handler(), 13, "no leaf is implemented"),
        }
    }
    let mut guest = long_guest();
    guest.load(&assemble(64, CODE, |a| a.encls().unwrap()));
    assert_eq!(guest.run_to_handler(), 6);
}

#[test]
fn execution_depends_on_the_mode_of_the_linear_address() {
    const R: u64 = 1;
    const X: u64 = 4;
    const XU: u64 = 1 << 10;
    let fetch = EptViolation::FETCH | EptViolation::LINEAR_VALID | EptViolation::FINAL;
    let readable = EptViolation::READABLE;
    let (x, xu) = (EptViolation::EXECUTABLE, EptViolation::USER_EXECUTABLE);
    // Whether the linear page is a user page, the EPT entry's rights, what forbids the fetch.
    let cases = [
        (true, R | XU, None),
        (true, R | X, Some(fetch | readable | x)),
        (false, R | X, None),
        (false, R | XU, Some(fetch | readable | xu)),
        (true, R, Some(fetch | readable)),
        (true, XU, None),
        (false, X, None),
    ];
    for (user_page, rights, expected) in cases {
        let mut guest = long_guest();
        // 2 MiB pages of the guest: the second one is DATA's alias, user or supervisor.
        guest
            .memory
            .write_u64(0x3008, 0x20_0080 | if user_page { 7 } else { 3 });
        guest
            .ept
            .set(0x20_0000, (guest.memory.hva + DATA) | 6 << 3 | rights);
        for gpa in (0..0x10_0000).step_by(4096) {
            // Everything else may be executed in both modes.
            guest.ept.set(gpa, (guest.memory.hva + gpa) | EPT_RWX | XU);
        }
        guest.controls.secondary |= SecondaryControls::MODE_BASED_EXECUTE;
        guest.memory.write(DATA, &[0xf4]);
        guest.load(&assemble(64, CODE, |a| a.jmp(rcx).unwrap()));
        guest.vcpu.state.regs[1] = 0x20_0000;
        match expected {
            None => {
                let exit = guest.run_to(ExitReason::Hlt);
                assert_eq!(exit.instruction_length, 1);
                assert_eq!(guest.vcpu.state.rip, 0x20_0000);
            }
            Some(qualification) => {
                let exit = guest.run_to(ExitReason::EptViolation);
                let found = EptViolation::from_bits_retain(exit.qualification);
                assert_eq!(found, qualification, "{user_page} {rights:#x}");
            }
        }
        // Without the control bit 10 means nothing, and bit 2 both.
        guest.controls.secondary -= SecondaryControls::MODE_BASED_EXECUTE;
        guest.vcpu.state.rip = CODE;
        guest.vcpu.state.regs[1] = 0x20_0000;
        if rights & X != 0 {
            guest.run_to(ExitReason::Hlt);
        } else {
            // An entry that only bit 10 makes present is not present.
            let exit = guest.run_to(ExitReason::EptViolation);
            assert_eq!(exit.qualification & xu.bits(), 0);
        }
    }
}

#[test]
fn a_tight_notify_window_leaves_the_guest_as_it_is() {
    use arch::control_registers::Dr7;
    let mut guest = long_guest();
    guest.controls.secondary |= SecondaryControls::NOTIFY_EXITING;
    guest.controls.notify_window = 50_000;
    guest.controls.primary |= PrimaryControls::INTERRUPT_WINDOW_EXITING;
    let gate = gate64(HANDLERS + 16, KERNEL_CODE, 14, 0, 1);
    guest.memory.write_u64(IDT + 16, gate[0]);
    guest.vcpu.state.dr[0] = IST1 - 8;
    guest.vcpu.state.dr7 |= Dr7::from_bits_retain(2 | 0b01 << 16 | 0b10 << 18);
    guest.load(&assemble(64, CODE, |a| {
        a.mov(qword_ptr(rcx), rax).unwrap();
        a.hlt().unwrap();
    }));
    guest.vcpu.state.regs[1] = IST1 - 8;
    let exit = guest.run_to(ExitReason::Notify);
    assert_eq!(exit.qualification, 0, "the context is valid");
    // Nothing is lost: with the breakpoint gone the handler runs.
    guest.vcpu.state.dr7 = Dr7::from_bits_retain(Dr7::FIXED_1);
    assert_eq!(guest.run_to_handler(), 1);
    // A guest that executes instructions is never notified of.
    let mut guest = long_guest();
    guest.controls.secondary |= SecondaryControls::NOTIFY_EXITING;
    guest.controls.pin |= arch::controls::PinControls::PREEMPTION_TIMER;
    guest.controls.preemption_timer = 50_000;
    guest.load(&[0xeb, 0xfe]);
    guest.run_to(ExitReason::PreemptionTimer);
}

/// What was pending before an entry that injects is not after it, unless a software event comes
/// while MOV SS blocks (SDM volume 3, "Delivery of Pending Debug Exceptions after VM Entry").
#[test]
fn an_injected_event_takes_pending_debug_exceptions_with_it() {
    use arch::controls::Interruptibility;
    use arch::interruption::{InterruptionInfo, InterruptionType as T};
    const SINGLE_STEP: u64 = 1 << 14;
    for (kind, vector, kept_by_mov_ss) in [
        (T::ExternalInterrupt, 0x40, false),
        (T::Nmi, 2, false),
        (T::HardwareException, 6, false),
        (T::PrivilegedSoftwareException, 1, false),
        (T::SoftwareInterrupt, 0x41, true),
        (T::SoftwareException, 3, true),
    ] {
        for mov_ss in [false, true] {
            // External interrupts and NMIs are not injected while MOV SS blocks.
            if mov_ss && matches!(kind, T::ExternalInterrupt | T::Nmi) {
                continue;
            }
            let mut guest = long_guest();
            guest.load(&[0xf4]);
            guest.vcpu.state.set_rflags(0x202);
            guest.vcpu.state.pending_debug = SINGLE_STEP;
            if mov_ss {
                guest.vcpu.state.interruptibility = Interruptibility::MOV_SS;
            }
            guest.controls.interruption_info = InterruptionInfo::new(kind, vector, false);
            guest.controls.instruction_length = 1;
            let expected = if mov_ss && kept_by_mov_ss { 1 } else { vector };
            assert_eq!(guest.run_to_handler(), expected, "{kind:?} {mov_ss}");
        }
    }
}

/// A single step that waits behind MOV SS goes with the exception that the next instruction raises.
#[test]
fn an_exception_takes_pending_debug_exceptions_with_it() {
    let mut guest = long_guest();
    guest.load(&assemble(64, CODE, |a| {
        a.mov(ss, ecx).unwrap();
        a.ud2().unwrap();
    }));
    guest.vcpu.state.regs[1] = KERNEL_DATA.into();
    guest
        .vcpu
        .state
        .set_rflags((Rflags::TF | Rflags::FIXED).bits());
    assert_eq!(guest.run_to_handler(), 6);
}
