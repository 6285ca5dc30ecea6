//! MMIO: instructions whose memory is a device.
//!
//! The processor emulates the instruction and asks [`MmioBus`] for every access that memory does
//! not take. Devices in this process answer at once. For a read that user space must answer the
//! instruction is abandoned without effect and KVM_RUN returns; the next KVM_RUN adds the answer
//! and has the instruction emulated anew, with all earlier answers given again in order. So no
//! device is read twice. Writes are collected and made when the instruction is complete, in order,
//! so none is made twice either.
//!
//! User space sees fragments of at most 8 bytes.
//!
//! INS and OUTS whose memory is a device are emulated so as well: their port is on the bus then.

use crate::eventfd::IoSpace;
use crate::exits::{self, Outcome, emulation_failure};
use crate::irqchip::lapic::LocalApic;
use crate::port_io;
use crate::vcpu::{Completion, Core, Vcpu};
use crate::vm::Vm;
use arch::addr::Gpa;
use arch::exit::{ExitReason, VmExit};
use arch::page_fault::ErrorCode;
use cpu::{Bus, BusResponse, Emulated, MmioHint};
use kvm_bindings::{
    KVM_EXIT_MMIO, KVM_X86_QUIRK_LAPIC_MMIO_HOLE, kvm_run__bindgen_ty_1__bindgen_ty_6,
};
use mmu::AddressSpace;
use smallvec::{SmallVec, smallvec};
use std::collections::VecDeque;

const PAGE_MASK: u64 = !0xfff;

/// The widest access that user space sees at once.
const FRAGMENT: usize = 8;

/// An access of an instruction being emulated.
#[derive(Clone, Debug)]
struct Transfer {
    space: IoSpace,
    /// Guest-physical, or a port.
    gpa: u64,
    data: SmallVec<[u8; 16]>,
}

impl Transfer {
    fn new(gpa: u64, data: &[u8]) -> Transfer {
        Transfer {
            space: IoSpace::Memory,
            gpa,
            data: SmallVec::from_slice(data),
        }
    }

    /// The same of a port.
    fn at_port(self) -> Transfer {
        Transfer {
            space: IoSpace::Port,
            ..self
        }
    }

    /// A read without its answer.
    fn unanswered(gpa: u64, length: usize) -> Transfer {
        const INLINE: [u8; 16] = [0; 16];
        let data = if length <= INLINE.len() {
            SmallVec::from_buf_and_len(INLINE, length)
        } else {
            smallvec![0; length]
        };
        Transfer {
            space: IoSpace::Memory,
            gpa,
            data,
        }
    }
}

/// An instruction that waits for user space.
#[derive(Debug, Default)]
pub(crate) struct Emulation {
    hint: Option<MmioHint>,
    /// Where the instruction is.
    pub(crate) rip: u64,
    /// A guest-physical page that no memslot holds, as the MMU's entry for it said.
    device: Option<u64>,
    /// It is INS or OUTS, and the port is the bus's, too.
    has_ports: bool,
    /// Further pages that go to the bus, found on the way.
    more_hints: Vec<MmioHint>,
    /// Reads answered so far.
    answered: Vec<Transfer>,
    /// User space is answering the last of them, and this many bytes are there.
    asking: Option<usize>,
    /// Writes that the completed instruction made, and how many bytes of the first are done.
    writes: VecDeque<Transfer>,
    written: usize,
}

impl Emulation {
    /// Forgets the last instruction.
    fn begin(&mut self, rip: u64, hint: Option<MmioHint>) {
        self.hint = hint;
        self.rip = rip;
        self.device = None;
        self.has_ports = false;
        self.more_hints.clear();
        self.answered.clear();
        self.asking = None;
        self.writes.clear();
        self.written = 0;
    }

    /// Sends accesses to one more page to the bus.
    pub(crate) fn add_hint(&mut self, hint: MmioHint) {
        self.more_hints.push(hint);
    }
}

/// The accesses of one instruction.
struct MmioBus<'a> {
    vm: &'a Vm,
    apic: Option<&'a LocalApic>,
    space: AddressSpace,
    device: Option<u64>,
    has_ports: bool,
    answered: &'a mut Vec<Transfer>,
    next_answer: usize,
    /// The last of `answered` is not: user space must answer it.
    asks: bool,
    writes: Vec<Transfer>,
    /// Where the vCPU is in guest mode, until a locked write.
    gate: Option<&'a mmu::Gate>,
}

impl MmioBus<'_> {
    /// Leaves guest mode.
    fn leave(&mut self) {
        if let Some(gate) = self.gate.take() {
            gate.exit();
        }
    }

    /// What is known already of the next read.
    fn answer(&mut self, space: IoSpace, gpa: u64, data: &mut [u8]) -> Option<BusResponse> {
        let answer = self.answered.get(self.next_answer)?;
        self.next_answer += 1;
        // The same instruction asks for the same: its code and registers have not changed.
        if (answer.space, answer.gpa, answer.data.len()) != (space, gpa, data.len()) {
            return Some(BusResponse::Fault);
        }
        data.copy_from_slice(&answer.data);
        Some(BusResponse::Done)
    }

    /// What memory or a device in this process answers.
    fn read_here(&self, gpa: u64, data: &mut [u8]) -> bool {
        read_device(self.vm, self.apic, gpa, data)
            || self.device != Some(gpa & PAGE_MASK)
                && self
                    .vm
                    .mmu
                    .read_guest(self.space, Gpa::new(gpa), data)
                    .is_ok()
    }
}

/// Whether nothing answers at the place of the local APIC's registers, and user space does not hear
/// of it either (KVM_X86_QUIRK_LAPIC_MMIO_HOLE).
fn is_apic_hole(vm: &Vm, apic: &LocalApic, gpa: u64) -> bool {
    apic.has_hole_at(gpa) && vm.has_quirk(KVM_X86_QUIRK_LAPIC_MMIO_HOLE)
}

/// Reads a device in this process; false if none is there.
fn read_device(vm: &Vm, apic: Option<&LocalApic>, gpa: u64, data: &mut [u8]) -> bool {
    if let Some(apic) = apic.filter(|apic| apic.decodes(gpa)) {
        read_register(gpa, data, |offset| apic.read(offset).unwrap_or(0));
        return true;
    }
    if apic.is_some_and(|apic| is_apic_hole(vm, apic, gpa)) {
        data.fill(0xff);
        return true;
    }
    if let Some(chip) = vm.irqchip()
        && let Some(value) = chip.read_ioapic(gpa & !3)
    {
        read_register(gpa, data, |_| value);
        return true;
    }
    false
}

/// Reads part of a 32-bit register whose 16-byte slot holds `gpa`.
fn read_register(gpa: u64, data: &mut [u8], read: impl Fn(u32) -> u32) {
    data.fill(0);
    let within = (gpa & 0xf) as usize;
    if within + data.len() > 4 {
        return;
    }
    let value = read((gpa & 0xff0) as u32).to_le_bytes();
    data.copy_from_slice(&value[within..within + data.len()]);
}

impl Bus for MmioBus<'_> {
    fn read(&mut self, gpa: u64, data: &mut [u8]) -> BusResponse {
        if let Some(response) = self.answer(IoSpace::Memory, gpa, data) {
            return response;
        }
        if !self.read_here(gpa, data) {
            self.answered.push(Transfer::unanswered(gpa, data.len()));
            self.asks = true;
            return BusResponse::Later;
        }
        self.answered.push(Transfer::new(gpa, data));
        self.next_answer += 1;
        BusResponse::Done
    }

    fn has_ports(&self) -> bool {
        self.has_ports
    }

    fn read_port(&mut self, port: u16, data: &mut [u8]) -> BusResponse {
        if let Some(response) = self.answer(IoSpace::Port, port.into(), data) {
            return response;
        }
        if !port_io::read_here(self.vm, port, data) {
            let read = Transfer::unanswered(port.into(), data.len());
            self.answered.push(read.at_port());
            self.asks = true;
            return BusResponse::Later;
        }
        self.answered
            .push(Transfer::new(port.into(), data).at_port());
        self.next_answer += 1;
        BusResponse::Done
    }

    fn write_port(&mut self, port: u16, data: &[u8]) -> BusResponse {
        self.writes.push(Transfer::new(port.into(), data).at_port());
        BusResponse::Done
    }

    fn write(&mut self, gpa: u64, data: &[u8]) -> BusResponse {
        self.writes.push(Transfer::new(gpa, data));
        BusResponse::Done
    }

    /// Memory takes it at once: nothing of the instruction can fail any more, and nothing that the
    /// processor knows of memory is used any more, so that the vCPU can leave guest mode.
    fn compare_exchange(&mut self, gpa: u64, old: &mut [u8], new: &[u8]) -> BusResponse {
        self.leave();
        let exchanged = self
            .vm
            .mmu
            .compare_exchange_guest(self.space, Gpa::new(gpa), old, new);
        match exchanged {
            Ok(_) => BusResponse::Done,
            Err(mmu::AccessError::HostMemory(..)) => BusResponse::Fault,
            Err(_) => self.write(gpa, new),
        }
    }
}

/// Emulates the instruction at RIP, which accesses the page of `hint`, of which the MMU knows that
/// no memslot holds it.
pub(crate) fn emulate_device(core: &mut Core, vcpu: &Vcpu, hint: MmioHint) -> Outcome {
    core.emulation.begin(core.cpu.state.rip, Some(hint));
    core.emulation.device = Some(hint.gpa & PAGE_MASK);
    if let Some(length) = core.cpu.interrupted_read() {
        // What the instruction is going to ask for is known: its emulation can begin when the
        // answer is there.
        let mut read = Transfer::unanswered(hint.gpa, length);
        let apic = vcpu.apic().map(|apic| &**apic);
        let is_answered = read_device(vcpu.vm(), apic, hint.gpa, &mut read.data);
        core.emulation.answered.push(read);
        if !is_answered {
            core.emulation.asking = Some(0);
            return ask(core, vcpu);
        }
    }
    advance(core, vcpu, None)
}

/// Emulates the instruction at RIP, which accesses MMIO or a write-protected page.
pub(crate) fn emulate(core: &mut Core, vcpu: &Vcpu, hint: Option<MmioHint>) -> Outcome {
    core.emulation.begin(core.cpu.state.rip, hint);
    advance(core, vcpu, None)
}

/// Emulates one element of the INS or OUTS at RIP, whose memory is not memory.
pub(crate) fn emulate_string_io(core: &mut Core, vcpu: &Vcpu) -> Outcome {
    core.emulation.begin(core.cpu.state.rip, None);
    core.emulation.has_ports = true;
    advance(core, vcpu, None)
}

/// Executes the instruction at RIP, whatever it accesses, with `observer` watching. An instruction
/// that waits for user space goes on with what it has.
pub(crate) fn step(core: &mut Core, vcpu: &Vcpu, observer: &mut dyn cpu::Observer) -> Outcome {
    if let Some(completion) = core.completion.take() {
        return exits::complete(core, vcpu, completion);
    }
    core.emulation.begin(core.cpu.state.rip, None);
    advance(core, vcpu, Some(observer))
}

/// Emulates with the answers there are, until the instruction is done or needs user space.
fn advance(core: &mut Core, vcpu: &Vcpu, observer: Option<&mut dyn cpu::Observer>) -> Outcome {
    /// An instruction touches few pages; more faults than this in a row are a livelock with
    /// something that keeps unmapping, and the guest may as well start over.
    const FAULTS: usize = 64;
    let mut observer = observer.map(exits::shadow::OneAttempt::new);
    for _ in 0..FAULTS {
        match core.enter_guest_mode(vcpu) {
            Ok(true) => {}
            Ok(false) => continue,
            Err(outcome) => return outcome,
        }
        core.controls.interruption_info = Default::default();
        let mut answered = std::mem::take(&mut core.emulation.answered);
        let guest = core.put_processor_registers();
        core.promise();
        let mut bus = MmioBus {
            vm: vcpu.vm(),
            apic: vcpu.apic().map(|apic| &**apic),
            space: core.mmu.address_space(),
            device: core.emulation.device,
            has_ports: core.emulation.has_ports,
            answered: &mut answered,
            next_answer: 0,
            asks: false,
            writes: Vec::new(),
            gate: Some(core.mmu.gate()),
        };
        for &hint in &core.emulation.more_hints {
            core.cpu.add_hint(hint);
        }
        let result = match &mut observer {
            Some(observer) => {
                observer.begin();
                core.cpu.step(&core.controls, &mut bus, observer)
            }
            None => core
                .cpu
                .emulate(&core.controls, core.emulation.hint, &mut bus),
        };
        let in_guest_mode = bus.gate.is_some();
        let (asks, writes) = (bus.asks, bus.writes);
        core.in_guest_mode = in_guest_mode;
        core.take_guest_registers(guest);
        core.record_modified_pages(vcpu);
        core.is_unchanged = observer.is_none();
        core.emulation.answered = answered;
        if result != Emulated::Done || !writes.is_empty() || observer.is_some() {
            core.leave_guest_mode();
        }
        match result {
            Emulated::Done => {
                core.counters.instructions_emulated += 1;
                core.debug.stepped |= core.debug.single_step() && observer.is_none();
                core.emulation.answered.clear();
                core.emulation.writes = writes.into();
                return drain_writes(core, vcpu);
            }
            Emulated::Later => {
                if !asks {
                    vcpu.vm().bug("an emulated instruction waits for nothing");
                    return Outcome::Fail(libc::EIO);
                }
                core.emulation.asking = Some(0);
                return ask(core, vcpu);
            }
            Emulated::Exit(exit) => match nested_exit(core, vcpu, &exit, observer.is_some()) {
                Some(outcome) => return outcome,
                None => continue,
            },
            Emulated::Unhandled => return emulation_failure(core, vcpu),
            Emulated::BusFault => return Outcome::Fail(libc::EFAULT),
        }
    }
    Outcome::Resume
}

/// An exit in the middle of emulation: `None` if it was a page that is mapped now (or known to be
/// a device), so that the instruction can go on with the answers it has.
///
/// Data accesses to devices are the bus's and do not exit. What meets a device's entry all the same
/// is the fetch of the instruction itself or a guest paging structure, and neither can be emulated.
///
/// An observed instruction may be on a page that traps execution, which is to be read then.
fn nested_exit(core: &mut Core, vcpu: &Vcpu, exit: &VmExit, observed: bool) -> Option<Outcome> {
    use mmu::FaultResult as R;
    if core.has_shadow_paging {
        return exits::shadow::nested_exit(core, vcpu, exit);
    }
    exits::forget_missing_memory(core, vcpu);
    let code = match exit.reason {
        ExitReason::EptViolation => match exits::violation_code(exit) {
            code if observed && code.contains(ErrorCode::FETCH) => {
                (code - ErrorCode::FETCH) | ErrorCode::USER
            }
            code => code,
        },
        ExitReason::EptMisconfiguration => ErrorCode::RSVD,
        _ => return Some(exits::handle(core, vcpu, exit)),
    };
    let gpa = Gpa::new(exit.guest_physical_address);
    match vcpu.vm().mmu.handle_page_fault(&mut core.mmu, gpa, code) {
        R::Mmio(_) if let Some(access) = core.cpu.interrupted_walk() => {
            Some(exits::missing_table(core, exit, access))
        }
        R::Mmio(_) if exit.reason == ExitReason::EptMisconfiguration => {
            Some(emulation_failure(core, vcpu))
        }
        R::Fixed | R::Spurious | R::Retry | R::Mmio(_) | R::WriteProtected => None,
        other => Some(exits::fault_outcome(core, vcpu, exit, other)),
    }
}

/// KVM_EXIT_MMIO for the next fragment of a read.
fn ask(core: &mut Core, vcpu: &Vcpu) -> Outcome {
    let (Some(done), Some(transfer)) = (core.emulation.asking, core.emulation.answered.last())
    else {
        return Outcome::Resume;
    };
    let length = (transfer.data.len() - done).min(FRAGMENT);
    let gpa = transfer.gpa + done as u64;
    if transfer.space == IoSpace::Port {
        core.counters.io_exits += 1;
        port_io::exit_io(core, vcpu, gpa as u16, true, length as u8, 1);
    } else {
        exit_mmio(core, vcpu, gpa, length, None);
    }
    core.completion = Some(Completion::MmioRead);
    Outcome::Exit
}

fn exit_mmio(core: &mut Core, vcpu: &Vcpu, gpa: u64, length: usize, write: Option<&[u8]>) {
    core.counters.mmio_exits += 1;
    let mut mmio = kvm_run__bindgen_ty_1__bindgen_ty_6 {
        phys_addr: gpa,
        data: [0; 8],
        len: length as u32,
        is_write: write.is_some() as u8,
    };
    if let Some(data) = write {
        mmio.data[..length].copy_from_slice(data);
    }
    let run = vcpu.kvm_run(core);
    run.exit_reason = KVM_EXIT_MMIO;
    run.__bindgen_anon_1.mmio = mmio;
}

/// User space has answered a fragment of a read.
pub(crate) fn complete_read(core: &mut Core, vcpu: &Vcpu) -> Outcome {
    // SAFETY: every bit pattern is valid; the exit that this completes filled the member, unless it
    // was of a port.
    let mut data = unsafe { vcpu.kvm_run(core).__bindgen_anon_1.mmio.data };
    if core.cpu.state.rip != core.emulation.rip {
        // User space put the vCPU elsewhere: this instruction is given up.
        return Outcome::Resume;
    }
    let emulation = &mut core.emulation;
    let (Some(done), Some(transfer)) = (emulation.asking.take(), emulation.answered.last_mut())
    else {
        return Outcome::Resume;
    };
    let length = (transfer.data.len() - done).min(FRAGMENT);
    if transfer.space == IoSpace::Port {
        vcpu.run_area().read_pio(&mut data[..length]);
    }
    transfer.data[done..done + length].copy_from_slice(&data[..length]);
    if done + length < transfer.data.len() {
        emulation.asking = Some(done + length);
        return ask(core, vcpu);
    }
    advance(core, vcpu, None)
}

/// User space has taken a fragment of a write.
pub(crate) fn complete_write(core: &mut Core, vcpu: &Vcpu) -> Outcome {
    drain_writes(core, vcpu)
}

/// Makes the collected writes, up to one that user space must take.
fn drain_writes(core: &mut Core, vcpu: &Vcpu) -> Outcome {
    while let Some(write) = core.emulation.writes.front().cloned() {
        if write.space == IoSpace::Port {
            core.emulation.writes.pop_front();
            if port_io::write_here(vcpu.vm(), write.gpa as u16, &write.data) {
                continue;
            }
            core.counters.io_exits += 1;
            vcpu.run_area().write_pio(&write.data);
            let (port, size) = (write.gpa as u16, write.data.len() as u8);
            port_io::exit_io(core, vcpu, port, false, size, 1);
            core.completion = Some(Completion::MmioWrite);
            return Outcome::Exit;
        }
        let done = core.emulation.written;
        if done == 0 {
            match write_here(core, vcpu, &write) {
                Ok(true) => {
                    core.emulation.writes.pop_front();
                    continue;
                }
                Ok(false) => {}
                Err(outcome) => return outcome,
            }
        }
        let length = (write.data.len() - done).min(FRAGMENT);
        let gpa = write.gpa + done as u64;
        let fragment = &write.data[done..done + length];
        let coalesced = vcpu.vm().coalesced.push(IoSpace::Memory, gpa, fragment);
        if !coalesced {
            exit_mmio(core, vcpu, gpa, length, Some(fragment));
        }
        core.emulation.written += length;
        if core.emulation.written == write.data.len() {
            core.emulation.writes.pop_front();
            core.emulation.written = 0;
        }
        if !coalesced {
            core.completion = Some(Completion::MmioWrite);
            return Outcome::Exit;
        }
    }
    Outcome::Resume
}

/// Gives a write to memory or a device in this process; false if it is user space's.
fn write_here(core: &mut Core, vcpu: &Vcpu, write: &Transfer) -> Result<bool, Outcome> {
    let (vm, gpa, data) = (vcpu.vm(), write.gpa, &write.data[..]);
    let register = |data: &[u8]| {
        let mut value = [0; 4];
        let length = data.len().min(4);
        value[..length].copy_from_slice(&data[..length]);
        u32::from_le_bytes(value)
    };
    if let Some(apic) = vcpu.apic().filter(|apic| apic.decodes(gpa)) {
        // Registers are written with aligned 32-bit stores; others do nothing.
        if gpa & 0xf == 0 && data.len() >= 4 {
            let effect = apic.write((gpa & 0xff0) as u32, register(data));
            vcpu.apply(core, effect.unwrap_or(crate::irqchip::lapic::Effect::None));
        }
        return Ok(true);
    }
    if vcpu.apic().is_some_and(|apic| is_apic_hole(vm, apic, gpa)) {
        return Ok(true);
    }
    if let Some(chip) = vm.irqchip()
        && chip.write_ioapic(gpa, register(data))
    {
        return Ok(true);
    }
    if vm.ioeventfds.signal(IoSpace::Memory, gpa, data) {
        return Ok(true);
    }
    if core.emulation.device == Some(gpa & PAGE_MASK) {
        return Ok(false);
    }
    match vm
        .mmu
        .write_guest(core.mmu.address_space(), Gpa::new(gpa), data)
    {
        Ok(()) => Ok(true),
        Err(mmu::AccessError::HostMemory(..)) => Err(Outcome::Fail(libc::EFAULT)),
        Err(_) => Ok(false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_are_read_in_parts() {
        let read = |offset| if offset == 0x30 { 0x0005_0014 } else { 0 };
        let mut word = [0; 4];
        read_register(0xfee0_0030, &mut word, read);
        assert_eq!(u32::from_le_bytes(word), 0x0005_0014);
        let mut byte = [0; 1];
        read_register(0xfee0_0032, &mut byte, read);
        assert_eq!(byte, [5]);
        let mut across = [9; 4];
        read_register(0xfee0_0032, &mut across, read);
        assert_eq!(across, [0; 4]);
    }
}
