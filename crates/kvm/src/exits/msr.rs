//! RDMSR and WRMSR: the filter, the table, and user space's say.

use super::{Outcome, general_protection};
use crate::msrs::{Access, MsrError};
use crate::vcpu::{Completion, Core, Vcpu};
use arch::exit::VmExit;
use cpu::Gpr;
use kvm_bindings::*;

pub(super) fn rdmsr(core: &mut Core, vcpu: &Vcpu, exit: &VmExit) -> Outcome {
    match try_read(core, vcpu, exit) {
        Ok(()) => Outcome::Resume,
        Err(reason) => {
            let index = core.cpu.state.gpr(Gpr::Rcx) as u32;
            refuse(core, vcpu, index, None, reason)
        }
    }
}

/// Reads the register that the guest names; else the reason (KVM_MSR_EXIT_REASON_*) why not.
fn try_read(core: &mut Core, vcpu: &Vcpu, exit: &VmExit) -> Result<(), u32> {
    core.exit_length = exit.instruction_length as u64;
    let index = core.cpu.state.gpr(Gpr::Rcx) as u32;
    if !allowed(core, index, false) {
        return Err(KVM_MSR_EXIT_REASON_FILTER);
    }
    let mut access = Access {
        core,
        vcpu,
        index,
        trusted: false,
    };
    let value = access.read().map_err(reason)?;
    finish_read(core, value);
    Ok(())
}

pub(super) fn wrmsr(core: &mut Core, vcpu: &Vcpu, exit: &VmExit) -> Outcome {
    core.exit_length = exit.instruction_length as u64;
    let state = &core.cpu.state;
    let index = state.gpr(Gpr::Rcx) as u32;
    let value = state.gpr(Gpr::Rax) & 0xffff_ffff | state.gpr(Gpr::Rdx) << 32;
    if !allowed(core, index, true) {
        return refuse(core, vcpu, index, Some(value), KVM_MSR_EXIT_REASON_FILTER);
    }
    match (Access {
        core,
        vcpu,
        index,
        trusted: false,
    })
    .write(value)
    {
        Ok(()) => {
            core.skip_bytes(core.exit_length);
            Outcome::Resume
        }
        Err(error) => refuse(core, vcpu, index, Some(value), reason(error)),
    }
}

fn allowed(core: &Core, index: u32, write: bool) -> bool {
    core.msr_filter
        .as_ref()
        .is_none_or(|filter| filter.allows(index, write))
}

fn reason(error: MsrError) -> u32 {
    match error {
        MsrError::Unknown => KVM_MSR_EXIT_REASON_UNKNOWN,
        MsrError::Invalid => KVM_MSR_EXIT_REASON_INVAL,
    }
}

fn finish_read(core: &mut Core, value: u64) {
    let state = &mut core.cpu.state;
    state.set_gpr(Gpr::Rax, value & 0xffff_ffff);
    state.set_gpr(Gpr::Rdx, value >> 32);
    core.skip_bytes(core.exit_length);
}

/// The access failed: #GP, or user space decides if it asked to for this reason.
fn refuse(core: &mut Core, vcpu: &Vcpu, index: u32, write: Option<u64>, reason: u32) -> Outcome {
    tracing::debug!(
        vcpu = vcpu.id(),
        msr = format_args!("{index:#x}"),
        write = write.is_some(),
        value = format_args!("{:#x}", write.unwrap_or(0)),
        reason,
        rip = format_args!("{:#x}", core.cpu.state.rip),
        "MSR access refused"
    );
    if vcpu.vm().settings().user_space_msrs & reason == 0 {
        return general_protection(core);
    }
    let run = vcpu.kvm_run(core);
    run.exit_reason = if write.is_some() {
        KVM_EXIT_X86_WRMSR
    } else {
        KVM_EXIT_X86_RDMSR
    };
    run.__bindgen_anon_1.msr = kvm_run__bindgen_ty_1__bindgen_ty_23 {
        error: 0,
        reason,
        index,
        data: write.unwrap_or(0),
        ..Default::default()
    };
    core.completion = Some(Completion::Msr {
        write: write.is_some(),
    });
    Outcome::Exit
}

pub(super) fn complete(core: &mut Core, vcpu: &Vcpu, write: bool) -> Outcome {
    // SAFETY: the exit that this completes filled this member, and every bit pattern is valid.
    let msr = unsafe { vcpu.kvm_run(core).__bindgen_anon_1.msr };
    if msr.error != 0 {
        return general_protection(core);
    }
    if write {
        core.skip_bytes(core.exit_length);
    } else {
        finish_read(core, msr.data);
    }
    Outcome::Resume
}
