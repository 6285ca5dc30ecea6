//! The exit table: what is done about each VM exit.
//!
//! One row per basic exit reason: a handler, or why today's controls cannot produce it. Handlers
//! are grouped in sibling files by what they deal with.

mod control_registers;
mod exceptions;
mod hypercall;
mod instructions;
mod memory;
mod msr;
pub(crate) mod shadow;
mod task_switch;

use crate::vcpu::{Completion, Core, Vcpu};
use arch::exception::Exception;
use arch::exit::{ExitReason, VmExit};
use kvm_bindings::*;

pub(crate) use control_registers::{valid_cr0, valid_cr4, valid_xcr0};
pub(crate) use exceptions::step_exit;
pub(crate) use memory::{
    emulation_failure, fault_outcome, forget_missing_memory, linear_error, missing_table,
    violation_code,
};

/// What follows a handled exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The guest goes on.
    Resume,
    /// KVM_RUN returns 0: `kvm_run` says why.
    Exit,
    /// KVM_RUN fails with EINTR.
    Interrupted,
    /// KVM_RUN fails with this errno.
    Fail(i32),
}

type Handler = fn(&mut Core, &Vcpu, &VmExit) -> Outcome;

enum Row {
    /// Handled by this function.
    Handle(Handler),
    /// Cannot occur, for this reason; if it does it goes to user space as an internal error.
    Never(&'static str),
}

/// The table.
const fn row(reason: ExitReason) -> Row {
    use ExitReason as R;
    use Row::{Handle, Never};
    match reason {
        R::ExceptionOrNmi => Handle(exceptions::exception),
        R::ExternalInterrupt => Handle(instructions::kicked),
        R::TripleFault => Handle(triple_fault),
        R::InitSignal => Never("INIT reaches vCPUs through their mailbox"),
        R::StartupIpi => Never("start-up IPIs reach vCPUs through their mailbox"),
        R::IoSmi | R::OtherSmi => Never("there is no host SMM"),
        R::InterruptWindow => Handle(instructions::interrupt_window),
        R::NmiWindow => Handle(instructions::nmi_window),
        R::TaskSwitch => Handle(task_switch::task_switch),
        R::Cpuid => Handle(instructions::cpuid),
        R::Getsec => Handle(instructions::undefined),
        R::Hlt => Handle(instructions::hlt),
        R::Invd | R::Wbinvd => Handle(instructions::no_operation),
        // These two exit only without EPT.
        R::Invlpg => Handle(shadow::invlpg),
        R::Invpcid => Handle(shadow::invpcid),
        R::Rdpmc => Handle(instructions::rdpmc),
        R::Rdtsc | R::Rdtscp => Never("RDTSC exiting is off"),
        R::Rsm => Handle(crate::smm::rsm),
        R::Vmcall => Handle(hypercall::vmcall),
        // Nested virtualization is not offered; these are its handlers' places.
        R::Vmclear
        | R::Vmlaunch
        | R::Vmptrld
        | R::Vmptrst
        | R::Vmread
        | R::Vmresume
        | R::Vmwrite
        | R::Vmxoff
        | R::Vmxon
        | R::Invept
        | R::Invvpid
        | R::Vmfunc => Handle(instructions::undefined),
        R::CrAccess => Handle(control_registers::cr_access),
        R::DrAccess => Handle(exceptions::dr_access),
        R::IoInstruction => Handle(crate::port_io::instruction),
        R::Rdmsr => Handle(msr::rdmsr),
        R::Wrmsr => Handle(msr::wrmsr),
        R::InvalidGuestState => Handle(fail_entry),
        R::MsrLoadFailure => Never("no MSR load list"),
        R::Mwait | R::Monitor => Handle(instructions::mwait_or_monitor),
        R::MonitorTrapFlag => Handle(exceptions::monitor_trap),
        R::Pause => Handle(instructions::pause),
        R::MachineCheckDuringEntry => Never("the processor has no machine checks"),
        R::TprBelowThreshold => Never("no TPR shadow: CR8 exits instead"),
        R::ApicAccess | R::ApicWrite | R::VirtualizedEoi => {
            Never("no APIC virtualization: the APIC page is MMIO")
        }
        R::GdtrIdtrAccess | R::LdtrTrAccess => Never("descriptor-table exiting is off"),
        R::EptViolation => Handle(memory::ept_violation),
        R::EptMisconfiguration => Handle(memory::ept_misconfiguration),
        R::PreemptionTimer => Never("the preemption timer is off"),
        R::Xsetbv => Handle(control_registers::xsetbv),
        // These exit where CPUID does not offer them.
        R::Rdrand | R::Rdseed => Handle(instructions::undefined),
        R::Encls => Handle(instructions::undefined),
        // Every exit empties the log.
        R::PmlFull => Handle(instructions::kicked),
        R::Xsaves | R::Xrstors => Never("the XSS-exiting bitmap is empty"),
        R::Umwait | R::Tpause => Never("UMWAIT and TPAUSE are not offered"),
        R::BusLock => Never("bus-lock detection is off"),
        R::Notify => Never("notify exiting is off"),
    }
}

/// Handles one exit.
#[inline]
pub(crate) fn handle(core: &mut Core, vcpu: &Vcpu, exit: &VmExit) -> Outcome {
    if !stays_in_guest_mode(exit.reason) || core.debug.is_active() {
        core.leave_guest_mode();
    }
    core.is_unchanged &= keeps_state(exit.reason);
    match row(exit.reason) {
        Row::Handle(handler) => handler(core, vcpu, exit),
        Row::Never(why) => unexpected(core, vcpu, exit, why),
    }
}

/// Whether the handler of an exit leaves guest mode itself where it must.
fn stays_in_guest_mode(reason: ExitReason) -> bool {
    use ExitReason as R;
    matches!(reason, R::Cpuid | R::EptMisconfiguration | R::Rdmsr)
}

/// Whether the handler of an exit changes no more of the guest's state and controls than
/// [`cpu::Vcpu::assume_unchanged`] allows.
fn keeps_state(reason: ExitReason) -> bool {
    use ExitReason as R;
    matches!(
        reason,
        R::Cpuid
            | R::EptMisconfiguration
            | R::EptViolation
            | R::ExternalInterrupt
            | R::Hlt
            | R::InterruptWindow
            | R::IoInstruction
            | R::NmiWindow
            | R::Pause
            | R::Rdmsr
    )
}

/// Finishes what user space was asked to do.
pub(crate) fn complete(core: &mut Core, vcpu: &Vcpu, completion: Completion) -> Outcome {
    match completion {
        Completion::PortIo => crate::port_io::complete(core, vcpu),
        Completion::MmioRead => crate::mmio::complete_read(core, vcpu),
        Completion::MmioWrite => crate::mmio::complete_write(core, vcpu),
        Completion::Hypercall => hypercall::complete(core, vcpu),
        Completion::Msr { write } => msr::complete(core, vcpu, write),
    }
}

/// An exit that no row handles: an internal error with the reason and the CPU it ran on.
#[cold]
fn unexpected(core: &mut Core, vcpu: &Vcpu, exit: &VmExit, why: &str) -> Outcome {
    tracing::error!(
        reason = exit.reason.name(),
        vcpu = vcpu.id(),
        why,
        "unexpected VM exit"
    );
    let data = [exit.reason as u64, vcpu.id() as u64];
    internal_error(core, vcpu, KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON, &data)
}

/// KVM_EXIT_INTERNAL_ERROR with its data.
pub(crate) fn internal_error(core: &mut Core, vcpu: &Vcpu, suberror: u32, data: &[u64]) -> Outcome {
    let run = vcpu.kvm_run(core);
    run.exit_reason = KVM_EXIT_INTERNAL_ERROR;
    let mut internal = kvm_run__bindgen_ty_1__bindgen_ty_13 {
        suberror,
        ndata: data.len() as u32,
        data: [0; 16],
    };
    internal.data[..data.len()].copy_from_slice(data);
    run.__bindgen_anon_1.internal = internal;
    Outcome::Exit
}

/// KVM_EXIT_SHUTDOWN.
pub(crate) fn shutdown(core: &mut Core, vcpu: &Vcpu) -> Outcome {
    vcpu.kvm_run(core).exit_reason = KVM_EXIT_SHUTDOWN;
    Outcome::Exit
}

fn triple_fault(core: &mut Core, vcpu: &Vcpu, _exit: &VmExit) -> Outcome {
    shutdown(core, vcpu)
}

/// KVM_EXIT_UNKNOWN with the hardware's reason.
pub(crate) fn unknown(core: &mut Core, vcpu: &Vcpu, exit: &VmExit) -> Outcome {
    let run = vcpu.kvm_run(core);
    run.exit_reason = KVM_EXIT_UNKNOWN;
    run.__bindgen_anon_1.hw = kvm_run__bindgen_ty_1__bindgen_ty_1 {
        hardware_exit_reason: exit.reason as u64,
    };
    Outcome::Exit
}

/// The entry itself failed a check on guest state.
#[cold]
fn fail_entry(core: &mut Core, vcpu: &Vcpu, exit: &VmExit) -> Outcome {
    /// Bit 31 of the exit-reason field: VM-entry failure.
    const ENTRY_FAILURE: u64 = 1 << 31;
    tracing::error!(
        vcpu = vcpu.id(),
        rip = core.cpu.state.rip,
        qualification = exit.qualification,
        "VM entry with invalid guest state"
    );
    let run = vcpu.kvm_run(core);
    run.exit_reason = KVM_EXIT_FAIL_ENTRY;
    run.__bindgen_anon_1.fail_entry = kvm_run__bindgen_ty_1__bindgen_ty_2 {
        hardware_entry_failure_reason: ENTRY_FAILURE | exit.reason as u64,
        cpu: vcpu.id(),
    };
    Outcome::Exit
}

/// KVM_EXIT_IOAPIC_EOI, for an I/O APIC in user space.
pub(crate) fn ioapic_eoi(core: &mut Core, vcpu: &Vcpu, vector: u8) -> Outcome {
    let run = vcpu.kvm_run(core);
    run.exit_reason = KVM_EXIT_IOAPIC_EOI;
    run.__bindgen_anon_1.eoi = kvm_run__bindgen_ty_1__bindgen_ty_21 { vector };
    Outcome::Exit
}

/// Queues #GP(0).
pub(crate) fn general_protection(core: &mut Core) -> Outcome {
    core.raise(Exception::GeneralProtection);
    Outcome::Resume
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Kvm, VcpuFd, VmFd};

    fn vcpu() -> (Kvm, VmFd, VcpuFd) {
        let kvm = Kvm::new().unwrap();
        let vm = kvm.create_vm().unwrap();
        let vcpu = vm.create_vcpu(3).unwrap();
        (kvm, vm, vcpu)
    }

    /// What becomes of an exit that the processor of today's controls never has.
    fn handled(vcpu: &VcpuFd, exit: &VmExit) -> (Outcome, kvm_run) {
        let mut core = vcpu.inner().lock();
        let outcome = handle(&mut core, vcpu.inner(), exit);
        let run: *const kvm_run = vcpu.inner().kvm_run(&core);
        // SAFETY: plain data, and nobody else has the vCPU.
        (outcome, unsafe { run.read() })
    }

    #[test]
    fn exits_without_a_handler_are_internal_errors_and_no_more() {
        let (_kvm, vm, vcpu) = vcpu();
        for &reason in ExitReason::ALL {
            if !matches!(row(reason), Row::Never(_)) {
                continue;
            }
            let (outcome, run) = handled(&vcpu, &VmExit::new(reason));
            assert_eq!(outcome, Outcome::Exit);
            assert_eq!(run.exit_reason, KVM_EXIT_INTERNAL_ERROR);
            // SAFETY: the exit reason names the member.
            let error = unsafe { run.__bindgen_anon_1.internal };
            let expected = KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON;
            assert_eq!((error.suberror, error.ndata), (expected, 2));
            assert_eq!(error.data[..2], [reason as u64, 3]);
        }
        vm.create_vcpu(4).unwrap();
    }

    #[test]
    fn a_contradictory_qualification_is_not_handled() {
        use arch::exit::EptViolation;
        let (_kvm, _vm, vcpu) = vcpu();
        let mut exit = VmExit::new(ExitReason::EptViolation);
        exit.qualification = (EptViolation::READ | EptViolation::FINAL).bits();
        let (outcome, run) = handled(&vcpu, &exit);
        assert_eq!(outcome, Outcome::Exit);
        assert_eq!(run.exit_reason, KVM_EXIT_UNKNOWN);
        // SAFETY: the exit reason names the member.
        let hardware = unsafe { run.__bindgen_anon_1.hw.hardware_exit_reason };
        assert_eq!(hardware, ExitReason::EptViolation as u64);
    }

    #[test]
    fn an_entry_of_tables_that_nobody_made_is_an_error() {
        let (_kvm, _vm, vcpu) = vcpu();
        let exit = VmExit::new(ExitReason::EptMisconfiguration);
        let mut core = vcpu.inner().lock();
        let invalid = mmu::FaultResult::Invalid;
        let outcome = fault_outcome(&mut core, vcpu.inner(), &exit, invalid);
        assert_eq!(outcome, Outcome::Fail(libc::EINVAL));
        let run = vcpu.inner().kvm_run(&core);
        assert_eq!(run.exit_reason, KVM_EXIT_INTERNAL_ERROR);
    }

    #[test]
    fn every_reason_has_a_row() {
        for &reason in ExitReason::ALL {
            if let Row::Never(why) = row(reason) {
                assert!(!why.is_empty(), "{}", reason.name());
            }
        }
    }
}
