//! Intercepted exceptions, debug registers and single steps.

use super::Outcome;
use crate::vcpu::{Core, Vcpu};
use arch::control_registers::{Cr4, Dr6, Dr7};
use arch::exception::Exception;
use arch::exit::{DrAccess, VmExit};
use kvm_bindings::*;

/// #DB and #BP are intercepted while user space debugs the guest, #PF without EPT.
pub(super) fn exception(core: &mut Core, vcpu: &Vcpu, exit: &VmExit) -> Outcome {
    let vector = exit.interruption_info.vector();
    match Exception::from_vector(vector) {
        Some(Exception::PageFault) if core.has_shadow_paging => {
            super::shadow::page_fault(core, vcpu, exit)
        }
        Some(Exception::Debug) => {
            let dr6 = exit.qualification & Dr6::VOLATILE;
            if core.debug.wants_debug_exception(dr6) {
                return debug_exit(core, vcpu, Exception::Debug, dr6 | Dr6::FIXED_1);
            }
            core.events.raise(crate::events::PendingException {
                vector,
                error_code: None,
                payload: Some(dr6),
            });
            Outcome::Resume
        }
        Some(Exception::Breakpoint) => debug_exit(core, vcpu, Exception::Breakpoint, Dr6::FIXED_1),
        _ => {
            let error_code = exit.interruption_info.has_error_code();
            core.events.raise(crate::events::PendingException {
                vector,
                error_code: error_code.then_some(exit.interruption_error_code),
                payload: None,
            });
            Outcome::Resume
        }
    }
}

/// KVM_EXIT_DEBUG.
fn debug_exit(core: &mut Core, vcpu: &Vcpu, what: Exception, dr6: u64) -> Outcome {
    let arch = kvm_debug_exit_arch {
        exception: what.vector() as u32,
        pad: 0,
        pc: core.linear_rip(),
        dr6,
        dr7: core.debug.dr7(&core.cpu.state),
    };
    let run = vcpu.kvm_run(core);
    run.exit_reason = KVM_EXIT_DEBUG;
    run.__bindgen_anon_1.debug = kvm_run__bindgen_ty_1__bindgen_ty_5 { arch };
    Outcome::Exit
}

/// The monitor trap flag is how single steps by user space are made.
pub(super) fn monitor_trap(core: &mut Core, vcpu: &Vcpu, _exit: &VmExit) -> Outcome {
    step_exit(core, vcpu)
}

/// KVM_EXIT_DEBUG for a single step.
pub(crate) fn step_exit(core: &mut Core, vcpu: &Vcpu) -> Outcome {
    debug_exit(core, vcpu, Exception::Debug, Dr6::BS.bits() | Dr6::FIXED_1)
}

/// MOV DR exits only while user space owns the debug registers: the guest then sees values of
/// its own that have no effect.
pub(super) fn dr_access(core: &mut Core, vcpu: &Vcpu, exit: &VmExit) -> Outcome {
    let access = DrAccess::from_qualification(exit.qualification);
    if core.cpu.state.cpl() != 0 {
        return super::general_protection(core);
    }
    let number = match access.dr {
        4 | 5 if core.cpu.state.cr4.contains(Cr4::DE) => {
            core.raise(Exception::InvalidOpcode);
            return Outcome::Resume;
        }
        4 | 5 => access.dr + 2,
        other => other,
    };
    // The exit came before general detect could raise #DB.
    if core.cpu.state.dr7.contains(Dr7::GD) {
        return debug_exit(core, vcpu, Exception::Debug, Dr6::BD.bits() | Dr6::FIXED_1);
    }
    let register = access.register;
    let state = &mut core.cpu.state;
    let guest = core.debug.guest_registers(state);
    if access.from {
        let value = match number {
            0..=3 => guest.dr[number as usize],
            6 => guest.dr6,
            _ => guest.dr7,
        };
        state.regs[register as usize] = value;
    } else {
        let value = state.regs[register as usize];
        if number >= 6 && value >> 32 != 0 {
            return super::general_protection(core);
        }
        match number {
            0..=3 => guest.dr[number as usize] = value,
            6 => guest.dr6 = value & Dr6::VOLATILE | Dr6::FIXED_1,
            _ => guest.dr7 = value & !0xffff_ffff_0000_d800 | Dr7::FIXED_1,
        }
    }
    core.skip(exit);
    Outcome::Resume
}
