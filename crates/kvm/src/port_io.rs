//! IN, OUT, INS and OUTS.
//!
//! Ports of devices in this process are served at once. Others go to user space with the data in
//! the page behind `kvm_run`; the instruction completes at the next KVM_RUN. REP-prefixed string
//! instructions go in batches of what fits into a page of memory.

use crate::eventfd::IoSpace;
use crate::exits::{Outcome, linear_error};
use crate::guest_walk::LinearError;
use crate::run_area::PIO_OFFSET;
use crate::vcpu::{Completion, Core, Vcpu};
use crate::vm::Vm;
use arch::control_registers::Rflags;
use arch::exit::{IoAccess, VmExit};
use arch::segment::SegmentName;
use cpu::Gpr;
use kvm_bindings::{
    KVM_EXIT_IO, KVM_EXIT_IO_IN, KVM_EXIT_IO_OUT, KVM_X86_QUIRK_OUT_7E_INC_RIP,
    kvm_run__bindgen_ty_1__bindgen_ty_4,
};

/// The most bytes that one exit carries.
const BATCH: usize = 1024;
/// The port by which firmware calls a VMM that patches accesses to the TPR. Those VMMs count on
/// RIP being past the instruction at the exit.
const VAPIC_PORT: u16 = 0x7e;

/// Port I/O that waits for user space, and an EOI that does.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PortIo {
    pending: Option<Pending>,
    /// An EOI for a user-space I/O APIC, to be reported when the instruction is done.
    pub(crate) pending_eoi: Option<u8>,
}

#[derive(Clone, Copy, Debug)]
struct Pending {
    access: IoAccess,
    count: usize,
    /// RIP at the exit: if user space moved it, the instruction is not completed.
    rip: u64,
    length: u64,
    string: StringOperand,
}

/// The memory operand of INS and OUTS.
#[derive(Clone, Copy, Debug, Default)]
struct StringOperand {
    /// Linear address of the first element.
    gva: u64,
    /// Mask of the address size.
    mask: u64,
    /// Elements up to where the index wraps or the segment ends; the next one is the processor's
    /// to look at.
    reach: u64,
}

/// An I/O instruction exited.
pub(crate) fn instruction(core: &mut Core, vcpu: &Vcpu, exit: &VmExit) -> Outcome {
    let access = IoAccess::from_qualification(exit.qualification);
    if access.string {
        string(core, vcpu, exit, access)
    } else {
        single(core, vcpu, exit, access)
    }
}

fn single(core: &mut Core, vcpu: &Vcpu, exit: &VmExit, access: IoAccess) -> Outcome {
    let size = access.size as usize;
    if access.input {
        let mut data = [0; 4];
        if read_here(vcpu.vm(), access.port, &mut data[..size]) {
            set_accumulator(core, &data[..size]);
            core.skip(exit);
            return Outcome::Resume;
        }
    } else {
        let data = core.cpu.state.gpr(Gpr::Rax).to_le_bytes();
        if write_here(vcpu.vm(), access.port, &data[..size]) {
            core.skip(exit);
            return Outcome::Resume;
        }
        vcpu.run_area().write_pio(&data[..size]);
    }
    to_user(core, vcpu, exit, access, 1, StringOperand::default())
}

/// AL, AX or EAX.
fn set_accumulator(core: &mut Core, data: &[u8]) {
    let old = core.cpu.state.gpr(Gpr::Rax);
    let mut bytes = old.to_le_bytes();
    bytes[..data.len()].copy_from_slice(data);
    let value = u64::from_le_bytes(bytes);
    // A 32-bit result clears the upper half, as any 32-bit register write does.
    core.cpu.state.set_gpr(
        Gpr::Rax,
        if data.len() == 4 {
            value & 0xffff_ffff
        } else {
            value
        },
    );
}

fn to_user(
    core: &mut Core,
    vcpu: &Vcpu,
    exit: &VmExit,
    access: IoAccess,
    count: usize,
    string: StringOperand,
) -> Outcome {
    core.counters.io_exits += 1;
    let rip = core.cpu.state.rip;
    let length = exit.instruction_length as u64;
    core.port_io.pending = Some(Pending {
        access,
        count,
        rip,
        length,
        string,
    });
    core.completion = Some(Completion::PortIo);
    let is_call = access.port == VAPIC_PORT && !access.input && !access.string;
    if is_call && vcpu.vm().has_quirk(KVM_X86_QUIRK_OUT_7E_INC_RIP) {
        core.port_io.pending = None;
        core.completion = None;
        core.skip(exit);
    }
    exit_io(core, vcpu, access.port, access.input, access.size, count);
    Outcome::Exit
}

/// KVM_EXIT_IO; the data of a write is in its page.
pub(crate) fn exit_io(
    core: &mut Core,
    vcpu: &Vcpu,
    port: u16,
    input: bool,
    size: u8,
    count: usize,
) {
    let direction = if input {
        KVM_EXIT_IO_IN
    } else {
        KVM_EXIT_IO_OUT
    };
    let run = vcpu.kvm_run(core);
    run.exit_reason = KVM_EXIT_IO;
    run.__bindgen_anon_1.io = kvm_run__bindgen_ty_1__bindgen_ty_4 {
        direction: direction as u8,
        size,
        port,
        count: count as u32,
        data_offset: PIO_OFFSET as u64,
    };
}

/// Completes port I/O that user space has served.
pub(crate) fn complete(core: &mut Core, vcpu: &Vcpu) -> Outcome {
    let Some(pending) = core.port_io.pending.take() else {
        return Outcome::Resume;
    };
    if core.cpu.state.rip != pending.rip {
        // A reset between exit and completion, for instance.
        return Outcome::Resume;
    }
    let access = pending.access;
    if access.string {
        // User space may have changed the count; never more is moved than it says.
        let mask = pending.string.mask;
        let remaining = remaining(core, &access, mask);
        let count = remaining.min(pending.count as u64) as usize;
        if access.input {
            let mut data = [0; BATCH];
            let data = &mut data[..access.size as usize * count];
            vcpu.run_area().read_pio(data);
            if let Err(outcome) = store(core, vcpu, &pending.string, data) {
                return outcome;
            }
        }
        finish_string(core, &access, count, mask, pending.length);
        return Outcome::Resume;
    }
    if access.input {
        let mut data = [0; 4];
        let data = &mut data[..access.size as usize];
        vcpu.run_area().read_pio(data);
        set_accumulator(core, data);
    }
    core.skip_bytes(pending.length);
    Outcome::Resume
}

/// Reads a port of a device in this process.
pub(crate) fn read_here(vm: &Vm, port: u16, data: &mut [u8]) -> bool {
    let Some(chip) = vm.irqchip() else {
        return false;
    };
    let Some(value) = chip.read_port(port) else {
        return false;
    };
    data.fill(0);
    data[0] = value;
    true
}

/// Writes a port of a device in this process, signals an ioeventfd, or coalesces.
pub(crate) fn write_here(vm: &Vm, port: u16, data: &[u8]) -> bool {
    if vm
        .irqchip()
        .is_some_and(|chip| chip.write_port(port, data[0]))
    {
        return true;
    }
    vm.ioeventfds.signal(IoSpace::Port, port as u64, data)
        || vm.coalesced.push(IoSpace::Port, port as u64, data)
}

fn string(core: &mut Core, vcpu: &Vcpu, exit: &VmExit, access: IoAccess) -> Outcome {
    let size = access.size as usize;
    let mask = match exit.instruction_info >> 7 & 7 {
        0 => 0xffff,
        1 => 0xffff_ffff,
        _ => u64::MAX,
    };
    let operand = StringOperand {
        gva: exit.guest_linear_address,
        mask,
        reach: reach(core, exit, access, mask),
    };
    let remaining = remaining(core, &access, mask);
    if remaining == 0 {
        core.skip(exit);
        return Outcome::Resume;
    }
    let count = batch(core, &operand, size, remaining);
    let mut data = [0; BATCH];
    let bytes = &mut data[..count * size];
    let prepared = if access.input {
        core.probe_write_linear(vcpu, operand.gva, bytes.len())
    } else {
        core.read_linear(vcpu, operand.gva, bytes)
    };
    match prepared {
        Ok(()) => {}
        // A device: one element, by the processor.
        Err(LinearError::NoMemory) => return crate::mmio::emulate_string_io(core, vcpu),
        Err(error) => return linear_error(core, vcpu, error),
    }
    let length = exit.instruction_length as u64;
    if access.input {
        if !bytes
            .chunks_mut(size)
            .all(|element| read_here(vcpu.vm(), access.port, element))
        {
            return to_user(core, vcpu, exit, access, count, operand);
        }
        if let Err(outcome) = store(core, vcpu, &operand, bytes) {
            return outcome;
        }
        finish_string(core, &access, count, mask, length);
        return Outcome::Resume;
    }
    let taken = bytes
        .chunks(size)
        .take_while(|element| write_here(vcpu.vm(), access.port, element))
        .count();
    if taken != 0 {
        // A doorbell may want other data, and the ring may be full: the rest goes its own way.
        finish_string(core, &access, taken, mask, length);
        return Outcome::Resume;
    }
    let vm = vcpu.vm();
    let port = access.port as u64;
    let one_by_one =
        vm.ioeventfds.concerns(IoSpace::Port, port) || vm.coalesced.concerns(IoSpace::Port, port);
    let count = if one_by_one { 1 } else { count };
    vcpu.run_area().write_pio(&bytes[..count * size]);
    to_user(core, vcpu, exit, access, count, operand)
}

/// How many elements are still to be moved.
fn remaining(core: &Core, access: &IoAccess, mask: u64) -> u64 {
    if access.rep {
        core.cpu.state.gpr(Gpr::Rcx) & mask
    } else {
        1
    }
}

/// How many elements go at once: those in the first page, one when counting down.
fn batch(core: &Core, operand: &StringOperand, size: usize, remaining: u64) -> usize {
    if core.cpu.state.rflags() & Rflags::DF.bits() != 0 {
        return 1;
    }
    let in_page = (4096 - (operand.gva & 0xfff) as usize) / size;
    (in_page.clamp(1, BATCH / size) as u64)
        .min(remaining)
        .min(operand.reach) as usize
}

/// How many elements, counting up, lie before the index wraps and inside the segment. The processor
/// has checked the first.
fn reach(core: &Core, exit: &VmExit, access: IoAccess, mask: u64) -> u64 {
    let (index, segment) = if access.input {
        (Gpr::Rdi, SegmentName::Es as usize)
    } else {
        (Gpr::Rsi, (exit.instruction_info >> 15 & 7) as usize)
    };
    let state = &core.cpu.state;
    let (offset, size) = (state.gpr(index) & mask, u64::from(access.size));
    let before_wrap = (mask - offset) / size + 1;
    if core.is_64bit() {
        return before_wrap;
    }
    let last = state.segments[segment].highest_offset();
    let in_segment = (last + 1).saturating_sub(offset) / size;
    before_wrap.min(in_segment).max(1)
}

fn store(
    core: &mut Core,
    vcpu: &Vcpu,
    operand: &StringOperand,
    bytes: &[u8],
) -> Result<(), Outcome> {
    core.write_linear(vcpu, operand.gva, bytes)
        .map_err(|error| linear_error(core, vcpu, error))
}

/// Moves the index and count registers on; the instruction is done when its count is zero.
fn finish_string(core: &mut Core, access: &IoAccess, count: usize, mask: u64, length: u64) {
    let state = &mut core.cpu.state;
    let down = state.rflags() & Rflags::DF.bits() != 0;
    let bytes = (count * access.size as usize) as u64;
    let step = if down { bytes.wrapping_neg() } else { bytes };
    let index = if access.input { Gpr::Rdi } else { Gpr::Rsi };
    let moved = merge(state.gpr(index), state.gpr(index).wrapping_add(step), mask);
    state.set_gpr(index, moved);
    if access.rep {
        let left = state.gpr(Gpr::Rcx).wrapping_sub(count as u64);
        let left = merge(state.gpr(Gpr::Rcx), left, mask);
        state.set_gpr(Gpr::Rcx, left);
        if left & mask != 0 {
            return;
        }
    }
    core.skip_bytes(length);
}

/// A register of which an operation with this address size changes only part.
fn merge(old: u64, new: u64, mask: u64) -> u64 {
    match mask {
        0xffff => old & !mask | new & mask,
        // 32-bit results clear the upper half.
        _ => new & mask,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partial_registers() {
        assert_eq!(merge(0x1234_ffff, 0x1_0000, 0xffff), 0x1234_0000);
        assert_eq!(merge(0xdead_0000_0001, 5, 0xffff_ffff), 5);
    }
}
