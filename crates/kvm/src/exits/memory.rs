//! EPT violations and misconfigurations.

use super::{Outcome, internal_error, unknown};
use crate::events::PendingException;
use crate::guest_walk::LinearError;
use crate::mmio;
use crate::vcpu::{Core, Vcpu};
use arch::addr::Gpa;
use arch::control_registers::{Cr4, Efer};
use arch::controls::Interruptibility;
use arch::exception::Exception;
use arch::exit::{EptViolation, VmExit};
use arch::page_fault::ErrorCode;
use arch::paging::Access;
use kvm_bindings::*;
use mmu::{FaultError, FaultResult};

pub(super) fn ept_violation(core: &mut Core, vcpu: &Vcpu, exit: &VmExit) -> Outcome {
    let qualification = EptViolation::from_bits_retain(exit.qualification);
    let delivering = exit.idt_vectoring_info.is_valid();
    if !delivering && qualification.contains(EptViolation::NMI_UNBLOCKING) {
        // The IRET that unblocked NMIs will be executed again: until then they stay blocked.
        core.cpu.state.interruptibility |= Interruptibility::NMI;
    }
    if core.has_shadow_paging {
        return super::shadow::host_fault(core, vcpu, exit);
    }
    core.counters.page_faults += 1;
    forget_missing_memory(core, vcpu);
    let linear = qualification.contains(EptViolation::LINEAR_VALID);
    if qualification.contains(EptViolation::FINAL) && !linear {
        return unknown(core, vcpu, exit);
    }
    let code = error_code(qualification);
    resolve(core, vcpu, exit, code)
}

/// Where the exit is due to host memory that the VMM took away without a word, what is known of
/// that page is forgotten: whether the memory is there is found out anew.
pub(crate) fn forget_missing_memory(core: &mut Core, vcpu: &Vcpu) {
    let Some(gpa) = core.cpu.take_host_fault() else {
        return;
    };
    let mmu = &vcpu.vm().mmu;
    let gfn = Gpa::new(gpa).gfn();
    let slots = mmu.slots();
    let page = slots
        .find(core.mmu.address_space(), gfn)
        .map(|slot| slot.hva_of(gfn));
    drop(slots);
    if let Some(page) = page {
        drop(mmu.invalidate(page..page.wrapping_add(4096)));
    }
}

/// The page-fault error code that an exit qualification amounts to.
fn error_code(qualification: EptViolation) -> ErrorCode {
    let rights = EptViolation::READABLE | EptViolation::WRITABLE | EptViolation::EXECUTABLE;
    let linear = qualification.contains(EptViolation::LINEAR_VALID);
    let is_final = qualification.contains(EptViolation::FINAL);
    let mut code = ErrorCode::empty();
    code.set(ErrorCode::USER, qualification.contains(EptViolation::READ));
    code.set(
        ErrorCode::WRITE,
        qualification.contains(EptViolation::WRITE),
    );
    code.set(
        ErrorCode::FETCH,
        qualification.contains(EptViolation::FETCH),
    );
    code.set(ErrorCode::PRESENT, qualification.intersects(rights));
    code.set(ErrorCode::GUEST_FINAL, linear && is_final);
    code.set(ErrorCode::GUEST_PAGE, linear && !is_final);
    code
}

pub(super) fn ept_misconfiguration(core: &mut Core, vcpu: &Vcpu, exit: &VmExit) -> Outcome {
    let gpa = exit.guest_physical_address;
    if exit.instruction_length != 0
        && !exit.idt_vectoring_info.is_valid()
        && vcpu.vm().ioeventfds.signal_fast(gpa)
    {
        core.skip(exit);
        return Outcome::Resume;
    }
    if let Some(access) = vcpu.vm().mmu.cached_mmio(&mut core.mmu, Gpa::new(gpa)) {
        return fault_outcome(core, vcpu, exit, FaultResult::Mmio(access));
    }
    core.leave_guest_mode();
    resolve(core, vcpu, exit, ErrorCode::RSVD)
}

/// Asks the MMU.
fn resolve(core: &mut Core, vcpu: &Vcpu, exit: &VmExit, code: ErrorCode) -> Outcome {
    let gpa = Gpa::new(exit.guest_physical_address);
    let result = vcpu.vm().mmu.handle_page_fault(&mut core.mmu, gpa, code);
    fault_outcome(core, vcpu, exit, result)
}

/// The error code of an EPT violation.
pub(crate) fn violation_code(exit: &VmExit) -> ErrorCode {
    error_code(EptViolation::from_bits_retain(exit.qualification))
}

/// Does what the MMU's verdict on a fault asks for.
pub(crate) fn fault_outcome(
    core: &mut Core,
    vcpu: &Vcpu,
    exit: &VmExit,
    result: FaultResult,
) -> Outcome {
    let gpa = Gpa::new(exit.guest_physical_address);
    match result {
        FaultResult::Fixed | FaultResult::Spurious | FaultResult::Retry => Outcome::Resume,
        FaultResult::Mmio(access) => {
            if exit.idt_vectoring_info.is_valid() {
                return delivery_failed(core, vcpu, exit);
            }
            if let Some(access) = core.cpu.interrupted_walk() {
                return missing_table(core, exit, access);
            }
            match hint(exit, access.gpa) {
                Some(hint) if access.is_known => mmio::emulate_device(core, vcpu, hint),
                hint => mmio::emulate(core, vcpu, hint),
            }
        }
        FaultResult::WriteProtected => mmio::emulate(core, vcpu, hint(exit, gpa)),
        FaultResult::ExecuteTrap => crate::traps::exit(core, vcpu, exit),
        FaultResult::FetchFromHole => emulation_failure(core, vcpu),
        FaultResult::Invalid => {
            internal_error(
                core,
                vcpu,
                KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON,
                &[exit.reason as u64, vcpu.id() as u64],
            );
            Outcome::Fail(libc::EINVAL)
        }
        FaultResult::Error(error) => fault_error(core, vcpu, error),
    }
}

/// A table of the guest's is where there is no memory: its walk ends as at an entry that is not
/// present, in a page fault for the access.
#[cold]
pub(crate) fn missing_table(core: &mut Core, exit: &VmExit, access: Access) -> Outcome {
    let state = &core.cpu.state;
    let fetches_are_told = state.efer.contains(Efer::NXE) || state.cr4.contains(Cr4::SMEP);
    let mut code = ErrorCode::empty();
    code.set(ErrorCode::WRITE, access.contains(Access::WRITE));
    code.set(ErrorCode::USER, access.contains(Access::USER));
    code.set(
        ErrorCode::FETCH,
        access.contains(Access::FETCH) && fetches_are_told,
    );
    core.events.raise(PendingException {
        vector: Exception::PageFault.vector(),
        error_code: Some(code.bits() as u32),
        payload: Some(exit.guest_linear_address),
    });
    Outcome::Resume
}

/// The linear address that goes with a guest-physical one, where the exit tells.
fn hint(exit: &VmExit, gpa: Gpa) -> Option<cpu::MmioHint> {
    (exit.guest_linear_address != 0).then(|| cpu::MmioHint {
        gva: exit.guest_linear_address,
        gpa: gpa.get(),
    })
}

#[cold]
fn fault_error(core: &mut Core, vcpu: &Vcpu, error: FaultError) -> Outcome {
    tracing::debug!(vcpu = vcpu.id(), %error, "guest memory fault");
    match error {
        FaultError::OutOfTables => Outcome::Fail(libc::ENOMEM),
        FaultError::HostMemory { gpa, .. } => memory_fault(core, vcpu, gpa.page_base(), 4096),
        _ => Outcome::Fail(libc::EFAULT),
    }
}

/// What becomes of an instruction whose linear memory was not accessed.
pub(crate) fn linear_error(core: &mut Core, vcpu: &Vcpu, error: LinearError) -> Outcome {
    match error {
        LinearError::Fault(exception) => {
            core.events.raise(exception);
            Outcome::Resume
        }
        LinearError::NoMemory => emulation_failure(core, vcpu),
        LinearError::HostMemory(gpa) => memory_fault(core, vcpu, gpa.page_base(), 4096),
    }
}

/// KVM_EXIT_MEMORY_FAULT, which goes with EFAULT.
fn memory_fault(core: &mut Core, vcpu: &Vcpu, gpa: Gpa, size: u64) -> Outcome {
    let run = vcpu.kvm_run(core);
    run.exit_reason = KVM_EXIT_MEMORY_FAULT;
    run.__bindgen_anon_1.memory_fault = kvm_run__bindgen_ty_1__bindgen_ty_27 {
        flags: 0,
        gpa: gpa.get(),
        size,
    };
    Outcome::Fail(libc::EFAULT)
}

/// MMIO while an event was being delivered: stack or descriptor tables are not in memory.
#[cold]
fn delivery_failed(core: &mut Core, vcpu: &Vcpu, exit: &VmExit) -> Outcome {
    let data = [
        exit.idt_vectoring_info.0 as u64,
        exit.reason as u64,
        exit.qualification,
        exit.guest_physical_address,
        vcpu.id() as u64,
    ];
    internal_error(core, vcpu, KVM_INTERNAL_ERROR_DELIVERY_EV, &data)
}

/// An instruction that cannot be emulated: KVM_EXIT_INTERNAL_ERROR with its bytes. To a program of
/// the guest's it is an undefined instruction, unless user space asked for all failures.
#[cold]
pub(crate) fn emulation_failure(core: &mut Core, vcpu: &Vcpu) -> Outcome {
    core.counters.emulation_failures += 1;
    if !vcpu.vm().settings().exit_on_emulation_failure {
        core.raise(Exception::InvalidOpcode);
        if core.cpu.state.cpl() != 0 {
            return Outcome::Resume;
        }
    }
    let (bytes, length) = core.instruction_bytes(vcpu);
    let state = &core.cpu.state;
    tracing::warn!(
        vcpu = vcpu.id(),
        rip = format_args!("{:#x}", state.rip),
        bytes = format_args!("{:02x?}", &bytes[..length]),
        "emulation failure"
    );
    let run = vcpu.kvm_run(core);
    run.exit_reason = KVM_EXIT_INTERNAL_ERROR;
    let mut failure = kvm_run__bindgen_ty_1__bindgen_ty_14 {
        suberror: KVM_INTERNAL_ERROR_EMULATION,
        // Flags, then the size and bytes of the instruction: three words of data.
        ndata: if length == 0 { 1 } else { 3 },
        flags: if length == 0 {
            0
        } else {
            KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES as u64
        },
        ..Default::default()
    };
    // SAFETY: the union has one member, of plain data.
    let instruction = unsafe { &mut failure.__bindgen_anon_1.__bindgen_anon_1 };
    instruction.insn_size = length as u8;
    instruction.insn_bytes = bytes;
    run.__bindgen_anon_1.emulation_failure = failure;
    Outcome::Exit
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qualifications_become_error_codes() {
        let write = EptViolation::WRITE
            | EptViolation::READABLE
            | EptViolation::LINEAR_VALID
            | EptViolation::FINAL;
        let expected = ErrorCode::WRITE | ErrorCode::PRESENT | ErrorCode::GUEST_FINAL;
        assert_eq!(error_code(write), expected);
        let table = EptViolation::READ | EptViolation::LINEAR_VALID;
        assert_eq!(error_code(table), ErrorCode::USER | ErrorCode::GUEST_PAGE);
        assert_eq!(error_code(EptViolation::FETCH), ErrorCode::FETCH);
    }
}
