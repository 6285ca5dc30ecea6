//! Every basic exit reason: a guest that raises it, or why no guest can.

use crate::bench::*;
use crate::guest::{Guest, Memory};
use arch::apic::InterruptStatus;
use arch::control_registers::{Cr4, Rflags};
use arch::controls::{PinControls, PrimaryControls, SecondaryControls};
use arch::exit::ExitReason;
use iced_x86::code_asm::*;

enum Raise {
    /// Code, and what its guest needs.
    Code(fn(&mut CodeAssembler), fn(&mut Guest)),
    /// It cannot be raised in this processor.
    Never(&'static str),
}

fn nothing(_: &mut Guest) {}

fn raise(reason: ExitReason) -> Raise {
    use ExitReason as R;
    use PrimaryControls as P;
    use Raise::{Code, Never};
    use SecondaryControls as S;
    let vmx = |write| Code(write, |g| g.vcpu.state.cr4 |= Cr4::VMXE);
    match reason {
        R::ExceptionOrNmi => Code(
            |a| a.ud2().unwrap(),
            |g| g.controls.exception_bitmap = 1 << 6,
        ),
        R::ExternalInterrupt => Code(|a| a.nop().unwrap(), |g| g.vcpu.attention().kick()),
        R::TripleFault => Code(|a| a.ud2().unwrap(), |g| g.vcpu.state.idtr.limit = 0),
        R::InitSignal | R::StartupIpi => {
            Never("INIT and start-up IPIs do not reach the processor but its owner")
        }
        R::IoSmi | R::OtherSmi => Never("SMIs do not reach the processor but its owner"),
        R::InterruptWindow => Code(
            |a| a.nop().unwrap(),
            |g| {
                g.controls.primary |= P::INTERRUPT_WINDOW_EXITING;
                g.vcpu.state.set_rflags((Rflags::IF | Rflags::FIXED).bits());
            },
        ),
        R::NmiWindow => Code(
            |a| a.nop().unwrap(),
            |g| g.controls.primary |= P::NMI_WINDOW_EXITING,
        ),
        // A descriptor of an available 32-bit TSS, reached from 32-bit code.
        R::TaskSwitch => Code(
            |a| a.jmp(qword_ptr(rcx)).unwrap(),
            |g| {
                let task_switch = assemble(32, CODE, |a| {
                    a.db(&[0xea, 0, 0, 0, 0, 0x30, 0]).unwrap();
                });
                g.memory.write(CODE, &task_switch);
                g.memory.write_u64(GDT + 0x30, 0x0000_8900_a000_0067);
                let state = &mut g.vcpu.state;
                state.cr0 -= arch::control_registers::Cr0::PG;
                state.efer = arch::control_registers::Efer::empty();
                g.controls.entry = arch::controls::EntryControls::empty();
                state.segments[1].access.0 = 0xc09b;
            },
        ),
        R::Cpuid => Code(|a| a.cpuid().unwrap(), nothing),
        R::Getsec => Never("safer mode is not offered: GETSEC raises #UD"),
        R::Hlt => Code(|a| a.hlt().unwrap(), nothing),
        R::Invd => Code(|a| a.invd().unwrap(), nothing),
        R::Invlpg => Code(
            |a| a.invlpg(byte_ptr(rcx)).unwrap(),
            |g| g.controls.primary |= P::INVLPG_EXITING,
        ),
        R::Rdpmc => Code(
            |a| a.rdpmc().unwrap(),
            |g| g.controls.primary |= P::RDPMC_EXITING,
        ),
        R::Rdtsc => Code(
            |a| a.rdtsc().unwrap(),
            |g| g.controls.primary |= P::RDTSC_EXITING,
        ),
        R::Rsm => Code(|a| a.rsm().unwrap(), |g| g.vcpu.state.smm = true),
        R::Vmcall => Code(|a| a.vmcall().unwrap(), nothing),
        R::Vmclear => vmx(|a| a.vmclear(qword_ptr(rcx)).unwrap()),
        R::Vmlaunch => vmx(|a| a.vmlaunch().unwrap()),
        R::Vmptrld => vmx(|a| a.vmptrld(qword_ptr(rcx)).unwrap()),
        R::Vmptrst => vmx(|a| a.vmptrst(qword_ptr(rcx)).unwrap()),
        R::Vmread => vmx(|a| a.vmread(rax, rcx).unwrap()),
        R::Vmresume => vmx(|a| a.vmresume().unwrap()),
        R::Vmwrite => vmx(|a| a.vmwrite(rax, rcx).unwrap()),
        R::Vmxoff => vmx(|a| a.vmxoff().unwrap()),
        R::Vmxon => vmx(|a| a.vmxon(qword_ptr(rcx)).unwrap()),
        R::Invept => vmx(|a| a.invept(rax, xmmword_ptr(rcx)).unwrap()),
        R::Invvpid => vmx(|a| a.invvpid(rax, xmmword_ptr(rcx)).unwrap()),
        R::CrAccess => Code(
            |a| a.mov(cr3, rax).unwrap(),
            |g| g.controls.primary |= P::CR3_LOAD_EXITING,
        ),
        R::DrAccess => Code(
            |a| a.mov(dr0, rax).unwrap(),
            |g| g.controls.primary |= P::MOV_DR_EXITING,
        ),
        R::IoInstruction => Code(|a| a.in_(al, 0x60).unwrap(), nothing),
        R::Rdmsr => Code(|a| a.rdmsr().unwrap(), nothing),
        R::Wrmsr => Code(|a| a.wrmsr().unwrap(), nothing),
        R::InvalidGuestState => Code(|a| a.nop().unwrap(), |g| g.vcpu.state.cr4 -= Cr4::PAE),
        R::MsrLoadFailure => Never("an entry loads no MSRs from a list"),
        R::Mwait => Code(
            |a| a.mwait().unwrap(),
            |g| g.controls.primary |= P::MWAIT_EXITING,
        ),
        R::MonitorTrapFlag => Code(
            |a| a.nop().unwrap(),
            |g| g.controls.primary |= P::MONITOR_TRAP_FLAG,
        ),
        R::Monitor => Code(
            |a| a.monitor().unwrap(),
            |g| g.controls.primary |= P::MONITOR_EXITING,
        ),
        R::Pause => Code(
            |a| a.pause().unwrap(),
            |g| g.controls.primary |= P::PAUSE_EXITING,
        ),
        R::MachineCheckDuringEntry => Never("the processor has no machine checks"),
        R::TprBelowThreshold => Code(
            |a| a.mov(cr8, rdx).unwrap(),
            |g| {
                virtual_apic(g, S::empty());
                g.controls.tpr_threshold = 2;
                g.vcpu.state.regs[2] = 1;
            },
        ),
        R::ApicAccess => Code(
            |a| a.mov(eax, dword_ptr(rcx)).unwrap(),
            |g| virtual_apic(g, S::VIRTUALIZE_APIC_ACCESSES),
        ),
        R::VirtualizedEoi => Code(
            |a| a.mov(dword_ptr(rcx + 0xb0), eax).unwrap(),
            |g| {
                virtual_apic(
                    g,
                    S::VIRTUALIZE_APIC_ACCESSES | S::VIRTUAL_INTERRUPT_DELIVERY,
                );
                g.vcpu.state.interrupt_status = InterruptStatus::new(0, 0x40);
                g.controls.eoi_exit_bitmap[1] = 1;
            },
        ),
        R::ApicWrite => Code(
            |a| a.mov(dword_ptr(rcx + 0xf0), eax).unwrap(),
            |g| {
                virtual_apic(
                    g,
                    S::VIRTUALIZE_APIC_ACCESSES | S::APIC_REGISTER_VIRTUALIZATION,
                )
            },
        ),
        R::GdtrIdtrAccess => Code(
            |a| a.sgdt(fword_ptr(rcx)).unwrap(),
            |g| g.controls.secondary |= S::DESCRIPTOR_TABLE_EXITING,
        ),
        R::LdtrTrAccess => Code(
            |a| a.str(eax).unwrap(),
            |g| g.controls.secondary |= S::DESCRIPTOR_TABLE_EXITING,
        ),
        R::EptViolation => Code(
            |a| a.mov(eax, dword_ptr(rcx)).unwrap(),
            |g| g.ept.set(DATA, 0),
        ),
        R::EptMisconfiguration => Code(
            |a| a.mov(eax, dword_ptr(rcx)).unwrap(),
            |g| g.ept.set(DATA, 2),
        ),
        R::Rdtscp => Code(
            |a| a.rdtscp().unwrap(),
            |g| g.controls.primary |= P::RDTSC_EXITING,
        ),
        R::PreemptionTimer => Code(
            |a| a.nop().unwrap(),
            |g| g.controls.pin |= PinControls::PREEMPTION_TIMER,
        ),
        R::Wbinvd => Code(
            |a| a.wbinvd().unwrap(),
            |g| g.controls.secondary |= S::WBINVD_EXITING,
        ),
        R::Xsetbv => Code(|a| a.xsetbv().unwrap(), nothing),
        R::Rdrand => Code(
            |a| a.rdrand(eax).unwrap(),
            |g| g.controls.secondary |= S::RDRAND_EXITING,
        ),
        R::Invpcid => Code(
            |a| a.invpcid(rax, xmmword_ptr(rcx)).unwrap(),
            |g| g.controls.primary |= P::INVLPG_EXITING,
        ),
        R::Vmfunc => Code(
            |a| a.vmfunc().unwrap(),
            |g| g.controls.secondary |= S::ENABLE_VMFUNC,
        ),
        R::Encls => Code(
            |a| a.encls().unwrap(),
            |g| {
                g.controls.secondary |= S::ENCLS_EXITING;
                g.controls.encls_exiting_bitmap = 1;
            },
        ),
        R::Rdseed => Code(
            |a| a.rdseed(eax).unwrap(),
            |g| g.controls.secondary |= S::RDSEED_EXITING,
        ),
        R::PmlFull => Code(
            |a| {
                let mut again = a.create_label();
                a.set_label(&mut again).unwrap();
                a.mov(dword_ptr(rcx), eax).unwrap();
                a.add(rcx, 4096).unwrap();
                a.jmp(again).unwrap();
            },
            |g| {
                let memory = Box::leak(Box::new(Memory::new(600 << 12)));
                g.ept.map(0x80_0000, memory, crate::guest::EPT_RWX);
                g.controls.eptp = arch::controls::Eptp::new(g.ept.root(), 4, true);
                g.controls.secondary |= S::ENABLE_PML;
                g.vcpu.state.regs[1] = 0x80_0000;
            },
        ),
        R::Xsaves | R::Xrstors => Code(
            if reason == R::Xsaves {
                |a| a.xsaves64(ptr(rcx)).unwrap()
            } else {
                |a| a.xrstors64(ptr(rcx)).unwrap()
            },
            |g| {
                g.vcpu.state.msrs.xss = 1 << 11;
                g.controls.xss_exiting_bitmap = 1 << 11;
                g.vcpu.state.regs[0] = 1 << 11;
            },
        ),
        R::Umwait => Code(|a| a.umwait(esi).unwrap(), user_wait),
        R::Tpause => Code(|a| a.tpause(esi).unwrap(), user_wait),
        R::BusLock => Code(
            |a| a.lock().inc(dword_ptr(rcx + 62)).unwrap(),
            |g| g.controls.secondary |= S::BUS_LOCK_DETECTION,
        ),
        R::Notify => Code(
            |a| a.mov(eax, dword_ptr(rcx)).unwrap(),
            endless_debug_exceptions,
        ),
    }
}

fn virtual_apic(guest: &mut Guest, secondary: SecondaryControls) {
    let page = Box::leak(Box::new(Memory::new(4096)));
    page.write(0x80, &[0x70]);
    guest.controls.primary |= PrimaryControls::TPR_SHADOW;
    guest.controls.secondary |= secondary;
    guest.controls.pin |= PinControls::EXTERNAL_INTERRUPT_EXITING;
    guest.controls.virtual_apic = page.hva;
    guest.controls.apic_access = guest.memory.hva + DATA;
}

fn user_wait(guest: &mut Guest) {
    guest.controls.secondary |= SecondaryControls::USER_WAIT_PAUSE;
    guest.controls.primary |= PrimaryControls::RDTSC_EXITING;
}

/// #DB through an interrupt stack that a data breakpoint watches.
fn endless_debug_exceptions(guest: &mut Guest) {
    guest.controls.secondary |= SecondaryControls::NOTIFY_EXITING;
    guest.controls.notify_window = 100_000;
    let gate = gate64(HANDLERS + 16, KERNEL_CODE, 14, 0, 1);
    guest.memory.write_u64(IDT + 16, gate[0]);
    let state = &mut guest.vcpu.state;
    (state.dr[0], state.dr[1]) = (DATA, IST1 - 8);
    // DR0 and DR1 enabled, both reads and writes; DR1 eight bytes long.
    let enables = 0b1010 | 0b11 << 16 | 0b11 << 20 | 0b10 << 22;
    state.dr7 |= arch::control_registers::Dr7::from_bits_retain(enables);
}

#[test]
fn every_reason_has_a_guest_that_raises_it() {
    let mut never = 0;
    for &reason in ExitReason::ALL {
        let (write, prepare) = match raise(reason) {
            Raise::Code(write, prepare) => (write, prepare),
            Raise::Never(why) => {
                assert!(!why.is_empty());
                never += 1;
                continue;
            }
        };
        let mut guest = long_guest();
        guest.load(&assemble(64, CODE, write));
        guest.vcpu.state.regs[1] = DATA;
        prepare(&mut guest);
        let exit = guest.run_to(reason);
        assert_eq!(exit.entry_failure, reason == ExitReason::InvalidGuestState);
    }
    assert_eq!(never, 7);
}
