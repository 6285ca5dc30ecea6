//! Exits of single instructions and of windows.

use super::{Outcome, general_protection};
use crate::vcpu::{Core, Vcpu};
use arch::cpuid::Output;
use arch::exception::Exception;
use arch::exit::VmExit;
use cpu::Gpr;
use kvm_bindings::KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS;

/// A kick ended the entry; why is in the mailbox.
pub(super) fn kicked(_core: &mut Core, _vcpu: &Vcpu, _exit: &VmExit) -> Outcome {
    Outcome::Resume
}

pub(super) fn interrupt_window(core: &mut Core, _vcpu: &Vcpu, _exit: &VmExit) -> Outcome {
    core.look_for_events = true;
    Outcome::Resume
}

pub(super) fn nmi_window(core: &mut Core, _vcpu: &Vcpu, _exit: &VmExit) -> Outcome {
    core.look_for_events = true;
    Outcome::Resume
}

pub(super) fn cpuid(core: &mut Core, vcpu: &Vcpu, exit: &VmExit) -> Outcome {
    let state = &core.cpu.state;
    let (function, index) = (state.gpr(Gpr::Rax) as u32, state.gpr(Gpr::Rcx) as u32);
    let Output([eax, ebx, ecx, edx]) = core
        .cpuid
        .execute(function, index, &|| core.dynamic_cpuid(vcpu));
    let state = &mut core.cpu.state;
    state.set_gpr(Gpr::Rax, eax as u64);
    state.set_gpr(Gpr::Rbx, ebx as u64);
    state.set_gpr(Gpr::Rcx, ecx as u64);
    state.set_gpr(Gpr::Rdx, edx as u64);
    core.skip(exit);
    Outcome::Resume
}

pub(super) fn hlt(core: &mut Core, vcpu: &Vcpu, exit: &VmExit) -> Outcome {
    core.skip(exit);
    core.halt(vcpu)
}

/// Instructions whose effect on caches does not exist here.
pub(super) fn no_operation(core: &mut Core, _vcpu: &Vcpu, exit: &VmExit) -> Outcome {
    core.skip(exit);
    Outcome::Resume
}

/// No performance counters are offered.
pub(super) fn rdpmc(core: &mut Core, _vcpu: &Vcpu, _exit: &VmExit) -> Outcome {
    general_protection(core)
}

/// Instructions of features that are not offered.
pub(super) fn undefined(core: &mut Core, _vcpu: &Vcpu, _exit: &VmExit) -> Outcome {
    core.raise(Exception::InvalidOpcode);
    Outcome::Resume
}

/// MONITOR and MWAIT are not offered, yet some guests execute them; they do nothing. Without
/// KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS that takes a guest whose CPUID has them.
pub(super) fn mwait_or_monitor(core: &mut Core, vcpu: &Vcpu, exit: &VmExit) -> Outcome {
    let is_required = !vcpu.vm().has_quirk(KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS);
    if is_required && !core.has_mwait(vcpu) {
        return undefined(core, vcpu, exit);
    }
    no_operation(core, vcpu, exit)
}

/// A vCPU that spins lets others run.
pub(super) fn pause(core: &mut Core, _vcpu: &Vcpu, exit: &VmExit) -> Outcome {
    core.skip(exit);
    std::thread::yield_now();
    Outcome::Resume
}
