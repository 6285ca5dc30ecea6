//! Running a stub as an instruction: checks before, memory around, exceptions after.

use super::form::Family;
use super::scratch::Scratch;
use super::stub::{self, Stub};
use crate::decode::Context;
use crate::execute::attempt;
use crate::op::{Flow, Handler, Op, Stop};
use crate::state::LazyFlags;
use crate::vcpu::{Cause, Vcpu};
use arch::control_registers::{Cr0, Cr4, Xcr0};
use arch::exception::Exception;

/// Chooses the stub handler.
pub(super) fn select(c: &Context<'_>, op: &mut Op) -> Option<Handler> {
    op.imm = c.stubs.get(c.instruction)?.expose_provenance() as u64;
    // The x87 opcode register holds the low bits of the first byte and the ModRM byte.
    let escape = c.bytes.iter().position(|b| (0xd8..=0xdf).contains(b));
    if let Some(at) = escape.filter(|at| at + 1 < c.bytes.len()) {
        (op.aux, op.aux2) = (c.bytes[at + 1], c.bytes[at] & 7);
    }
    Some(run)
}

impl Vcpu {
    /// The faults that control registers raise before an instruction of `family`.
    pub(super) fn check_family(&mut self, family: Family) -> Result<(), Stop> {
        let (cr0, cr4) = (self.state.cr0, self.state.cr4);
        let undefined = match family {
            Family::X87 | Family::Wait => false,
            Family::Mmx => cr0.contains(Cr0::EM),
            Family::Sse => cr0.contains(Cr0::EM) || !cr4.contains(Cr4::OSFXSR),
            Family::Avx => {
                let needed = Xcr0::SSE | Xcr0::AVX;
                !cr4.contains(Cr4::OSXSAVE)
                    || !self.state.xcr0.contains(needed)
                    || self.real_segments()
            }
        };
        if undefined {
            return Err(self.undefined());
        }
        let unavailable = match family {
            Family::X87 => cr0.intersects(Cr0::EM | Cr0::TS),
            Family::Wait => cr0.contains(Cr0::MP | Cr0::TS),
            _ => cr0.contains(Cr0::TS),
        };
        if unavailable {
            return Err(self.raise(Exception::DeviceNotAvailable));
        }
        Ok(())
    }
}

/// Executes a stub; `imm` points to it.
fn run(cpu: &mut Vcpu, op: &Op) -> Flow {
    // SAFETY: `select` put the address of a stub there, which lives as long as blocks that hold it.
    let stub = unsafe { &*core::ptr::with_exposed_provenance::<Stub>(op.imm as usize) };
    attempt!(cpu.check_family(stub.family));
    let mut scratch = Scratch::new();
    let mut address = 0;
    let mut misalignment = 0;
    if stub.memory != 0 {
        address = attempt!(cpu.address(op, stub.memory as u64, stub.writes));
        misalignment = (address & 63) as usize;
        if misalignment & (stub.alignment - 1) != 0 {
            cpu.general_protection();
            return Flow::Stop;
        }
        if stub.writes {
            attempt!(cpu.check_write(address, stub.memory, op.segment));
        }
        if stub.reads {
            let operand = &mut scratch.memory[misalignment..misalignment + stub.memory];
            attempt!(cpu.read_wide(address, op.segment, operand));
        }
    }
    let pointers = cpu.x87_pointers();
    if stub.reads_flags {
        scratch.flags = cpu.state.flags.status() | 2;
    }
    let fault = stub::run(stub.code, &mut cpu.state, &mut scratch, misalignment);
    if fault != 0 {
        cpu.set_x87_pointers(pointers);
        match Exception::from_vector(fault as u8) {
            Some(Exception::Simd) if !cpu.state.cr4.contains(Cr4::OSXMMEXCPT) => cpu.undefined(),
            Some(Exception::X87) => cpu.x87_error(),
            Some(exception @ (Exception::Simd | Exception::InvalidOpcode)) => cpu.raise(exception),
            Some(Exception::GeneralProtection) => cpu.general_protection(),
            // No instruction of the list raises another one on an operand that is there.
            _ => cpu.stop_with(Cause::Unhandled),
        };
        return Flow::Stop;
    }
    if stub.writes_flags {
        cpu.state.flags = LazyFlags::from_status(scratch.flags);
    }
    if stub.clears_pointers {
        cpu.set_x87_pointers([0; 18]);
    } else if stub.sets_pointers {
        cpu.update_x87_pointers(op, pointers, address);
    } else if matches!(stub.family, Family::X87 | Family::Mmx | Family::Wait) {
        cpu.set_x87_pointers(pointers);
    }
    if stub.writes {
        let operand = &scratch.memory[misalignment..misalignment + stub.memory];
        attempt!(cpu.write_bytes(address, op.segment, operand));
    }
    Flow::Next
}

/// Offset and length of FOP, FIP and FDP in the FXSAVE image.
const POINTERS: core::ops::Range<usize> = 6..24;

impl Vcpu {
    /// FOP, FIP and FDP, which the host's own would overwrite.
    fn x87_pointers(&self) -> [u8; 18] {
        let mut saved = [0; 18];
        saved.copy_from_slice(&self.state.extended.0[POINTERS]);
        saved
    }

    fn set_x87_pointers(&mut self, pointers: [u8; 18]) {
        self.state.extended.0[POINTERS].copy_from_slice(&pointers);
    }

    /// #MF, or with CR0.NE clear the external-interrupt way of old, which has no pin here and so
    /// is #MF too.
    fn x87_error(&mut self) -> Stop {
        self.raise(Exception::X87)
    }

    fn update_x87_pointers(&mut self, op: &Op, mut pointers: [u8; 18], address: u64) {
        pointers[..2].copy_from_slice(&[op.aux, op.aux2]);
        pointers[2..10].copy_from_slice(&self.rip_of(op).to_le_bytes());
        if op.flags & crate::op::flag::MEMORY != 0 {
            pointers[10..18].copy_from_slice(&address.to_le_bytes());
        }
        self.set_x87_pointers(pointers);
    }
}
