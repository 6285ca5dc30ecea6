//! Hypercalls (VMCALL): the paravirtual calls of KVM's guests.
//!
//! Source: the kernel's "Linux KVM Hypercall".

use super::Outcome;
use crate::cpuid::pv;
use crate::irqchip::message::{DeliveryMode, Message, Shorthand};
use crate::vcpu::{Completion, Core, Vcpu};
use arch::exception::Exception;
use arch::exit::VmExit;
use cpu::Gpr;
use kvm_bindings::*;

const VAPIC_POLL_IRQ: u64 = 1;
const KICK_CPU: u64 = 5;
const SEND_IPI: u64 = 10;
const SCHED_YIELD: u64 = 11;
const MAP_GPA_RANGE: u64 = 12;

/// What a hypercall returns in RAX, negated.
mod error {
    pub(super) const NO_SYSTEM_CALL: i64 = 1000;
    pub(super) const NOT_PERMITTED: i64 = 1;
    pub(super) const INVALID: i64 = 22;
}

pub(super) fn vmcall(core: &mut Core, vcpu: &Vcpu, exit: &VmExit) -> Outcome {
    let is_native = (exit.instruction_info == 0) != core.cpuid.is_amd();
    if !is_native {
        return correct(core, vcpu);
    }
    core.exit_length = exit.instruction_length as u64;
    core.counters.hypercalls += 1;
    let wide = core.is_64bit();
    let state = &core.cpu.state;
    let argument = |register| {
        let value = state.gpr(register);
        if wide { value } else { value & 0xffff_ffff }
    };
    let number = argument(Gpr::Rax);
    let arguments = [Gpr::Rbx, Gpr::Rcx, Gpr::Rdx, Gpr::Rsi].map(argument);
    if state.cpl() != 0 {
        return finish(core, -error::NOT_PERMITTED);
    }
    if number == MAP_GPA_RANGE && vcpu.vm().settings().exit_hypercalls >> number & 1 != 0 {
        let [start, pages, ..] = arguments;
        let first = start >> 12;
        if start & 0xfff != 0 || pages == 0 || first.checked_add(pages).is_none() {
            return finish(core, -error::INVALID);
        }
        return exit_to_user(core, vcpu, number, arguments, wide);
    }
    let result = execute(core, vcpu, number, arguments);
    finish(core, result)
}

/// The guest used the other vendor's instruction (VMMCALL is AMD's): it is replaced, and executed
/// again, unless KVM_X86_QUIRK_FIX_HYPERCALL_INSN is disabled.
fn correct(core: &mut Core, vcpu: &Vcpu) -> Outcome {
    const VMCALL: [u8; 3] = [0x0f, 0x01, 0xc1];
    const VMMCALL: [u8; 3] = [0x0f, 0x01, 0xd9];
    if !vcpu.vm().has_quirk(KVM_X86_QUIRK_FIX_HYPERCALL_INSN) {
        core.raise(Exception::InvalidOpcode);
        return Outcome::Resume;
    }
    let native = if core.cpuid.is_amd() { VMMCALL } else { VMCALL };
    match core.write_linear(vcpu, core.linear_rip(), &native) {
        Ok(()) => {
            // The processor has the old instruction decoded. Another's comes here once more.
            core.cpu.entered_from_user();
            Outcome::Resume
        }
        Err(error) => super::linear_error(core, vcpu, error),
    }
}

fn execute(core: &mut Core, vcpu: &Vcpu, number: u64, arguments: [u64; 4]) -> i64 {
    let offered = |feature| core.offers_paravirtual(feature);
    match number {
        VAPIC_POLL_IRQ => 0,
        KICK_CPU if offered(pv::PV_UNHALT) => kick(vcpu, arguments[1] as u32),
        SEND_IPI if offered(pv::PV_SEND_IPI) => send_ipis(vcpu, arguments, core.is_64bit()),
        SCHED_YIELD if offered(pv::PV_SCHED_YIELD) => {
            std::thread::yield_now();
            0
        }
        _ => -error::NO_SYSTEM_CALL,
    }
}

/// Ends a halt of the processor with an APIC ID. A guest that halts for a lock re-checks it when
/// it wakes, so an interrupt-less wake-up is all there is to it.
fn kick(vcpu: &Vcpu, apic_id: u32) -> i64 {
    let Some(chip) = vcpu.vm().irqchip() else {
        return -error::NO_SYSTEM_CALL;
    };
    let all = chip.apics().all();
    if let Some(apic) = all.iter().find(|apic| apic.id() == apic_id) {
        apic.mailbox().post(crate::mailbox::Request::UNHALT);
    }
    0
}

/// Sends a fixed interrupt to each APIC whose bit is set in a map of two registers from an ID on.
fn send_ipis(vcpu: &Vcpu, [low, high, first, icr]: [u64; 4], wide: bool) -> i64 {
    let Some(chip) = vcpu.vm().irqchip() else {
        return -error::NO_SYSTEM_CALL;
    };
    let mode = DeliveryMode::from_bits((icr >> 8) as u32);
    if !matches!(mode, DeliveryMode::Fixed | DeliveryMode::Nmi) {
        return -error::INVALID;
    }
    let map = low as u128 | (high as u128) << if wide { 64 } else { 32 };
    let targets = (0..128u32).filter(|bit| map >> bit & 1 != 0);
    let mut sent = 0;
    for bit in targets {
        let message = Message {
            destination: (first as u32).wrapping_add(bit),
            logical: false,
            shorthand: Shorthand::None,
            mode,
            vector: icr as u8,
            level: false,
            assert: true,
            wide: true,
        };
        sent += chip.apics().deliver(&message, None).status().max(0) as i64;
    }
    sent
}

fn exit_to_user(core: &mut Core, vcpu: &Vcpu, nr: u64, arguments: [u64; 4], wide: bool) -> Outcome {
    let mut hypercall = kvm_run__bindgen_ty_1__bindgen_ty_8 {
        nr,
        ..Default::default()
    };
    hypercall.args[..4].copy_from_slice(&arguments);
    hypercall.__bindgen_anon_1.longmode = wide as u32;
    let run = vcpu.kvm_run(core);
    run.exit_reason = KVM_EXIT_HYPERCALL;
    run.__bindgen_anon_1.hypercall = hypercall;
    core.completion = Some(Completion::Hypercall);
    Outcome::Exit
}

pub(super) fn complete(core: &mut Core, vcpu: &Vcpu) -> Outcome {
    // SAFETY: the exit that this completes filled this member, and every bit pattern is valid.
    let result = unsafe { vcpu.kvm_run(core).__bindgen_anon_1.hypercall.ret };
    finish(core, result as i64)
}

fn finish(core: &mut Core, result: i64) -> Outcome {
    let result = if core.is_64bit() {
        result as u64
    } else {
        result as u32 as u64
    };
    core.cpu.state.set_gpr(Gpr::Rax, result);
    core.skip_bytes(core.exit_length);
    Outcome::Resume
}
