//! IN, OUT, INS, OUTS: always exits in practice; without an exit the port reads as ones.

use super::attempt;
use crate::op::{Flow, Op, Stop, flag};
use crate::state::Gpr;
use crate::vcpu::{Cause, Vcpu};
use arch::controls::PrimaryControls;
use arch::exit::{ExitReason, IoAccess, VmExit, string_io_info};

impl Vcpu {
    fn io_exits(&self, port: u16, size: u8) -> bool {
        let controls = self.controls();
        if controls.primary.contains(PrimaryControls::USE_IO_BITMAPS) {
            controls.io_bitmap.exits(port, size)
        } else {
            controls
                .primary
                .contains(PrimaryControls::UNCONDITIONAL_IO_EXITING)
        }
    }

    fn io_exit(&mut self, op: &Op, access: IoAccess, linear: u64) -> Stop {
        let mut exit = VmExit::new(ExitReason::IoInstruction);
        exit.qualification = access.qualification();
        exit.instruction_length = op.len.into();
        if access.string {
            exit.guest_linear_address = linear;
            exit.instruction_info = string_io_info(op.aux2, op.segment.min(5));
        }
        self.stop_with(Cause::Exit(exit))
    }

    /// One element of INS or OUTS where no port is anybody's: they read as ones.
    fn move_unclaimed(&mut self, access: &IoAccess, linear: u64, segment: u8) -> Result<(), Stop> {
        let size = access.size.into();
        if access.input {
            self.write_bytes(linear, segment, &[0xff; 4][..size])
        } else {
            self.check_read(linear, size, segment)
        }
    }

    /// Whether the instruction is emulated on a bus that has ports.
    fn has_port_bus(&self) -> bool {
        // SAFETY: set by whoever emulates, for as long as the instruction takes.
        self.bus
            .is_some_and(|bus| unsafe { bus.as_ref() }.has_ports())
    }

    /// Moves one element of INS or OUTS between memory and a port of the bus.
    fn move_element(&mut self, access: &IoAccess, linear: u64, segment: u8) -> Result<(), Stop> {
        let mut data = [0; 4];
        let data = &mut data[..access.size.into()];
        if access.input {
            // What cannot be stored must not be taken from the device.
            self.check_write(linear, data.len(), segment)?;
            self.on_bus(|bus| bus.read_port(access.port, data))?;
            return self.write_bytes(linear, segment, data);
        }
        self.read_bytes(linear, segment, data)?;
        self.on_bus(|bus| bus.write_port(access.port, data))
    }
}

/// IN and OUT. `aux` is the size, `aux2` bit 0 is set for IN, bit 1 for an immediate port, whose
/// number is in `imm`.
pub(crate) fn in_out(cpu: &mut Vcpu, op: &Op) -> Flow {
    let (input, immediate) = (op.aux2 & 1 != 0, op.aux2 & 2 != 0);
    let port = if immediate {
        op.imm as u16
    } else {
        cpu.reg::<u16>(16)
    };
    attempt!(cpu.check_io(port, op.aux));
    cpu.match_io_breakpoints(port, op.aux);
    if cpu.io_exits(port, op.aux) {
        let access = IoAccess {
            size: op.aux,
            input,
            string: false,
            rep: false,
            immediate,
            port,
        };
        cpu.io_exit(op, access, 0);
        return Flow::Stop;
    }
    if input {
        match op.aux {
            1 => cpu.set_reg(0, 0xffu8),
            2 => cpu.set_reg(0, 0xffffu16),
            _ => cpu.set_reg(0, u32::MAX),
        }
    }
    cpu.end_block(op)
}

/// INS and OUTS. `aux` is the element size, `aux2` the address size, `src` 1 for INS.
///
/// The exit is taken before anything moves: the hypervisor carries the instruction out, one
/// element or more, and moves the registers.
pub(crate) fn string_io(cpu: &mut Vcpu, op: &Op) -> Flow {
    let input = op.src == 1;
    let rep = op.flags & (flag::REP | flag::REPNE) != 0;
    if rep && cpu.counter(op.aux2) == 0 {
        return cpu.end_block(op);
    }
    let port = cpu.reg::<u16>(16);
    attempt!(cpu.check_io(port, op.aux));
    let register = 8 * if input { Gpr::Rdi } else { Gpr::Rsi } as u8;
    let offset = cpu.sized_reg(register, op.aux2);
    let segment = if input { 0 } else { op.segment };
    let linear = attempt!(cpu.linear(segment, offset, op.aux.into(), input));
    let access = IoAccess {
        size: op.aux,
        input,
        string: true,
        rep,
        immediate: false,
        port,
    };
    if !cpu.io_exits(port, op.aux) {
        attempt!(cpu.move_unclaimed(&access, linear, segment));
    } else if cpu.has_port_bus() {
        attempt!(cpu.move_element(&access, linear, segment));
    } else {
        cpu.io_exit(op, access, linear);
        return Flow::Stop;
    }
    let step: u64 = op.aux.into();
    let down = cpu.state.rflags_rest & arch::control_registers::Rflags::DF.bits() != 0;
    let moved = if down {
        offset.wrapping_sub(step)
    } else {
        offset.wrapping_add(step)
    };
    cpu.set_sized_reg(register, op.aux2, moved);
    if rep {
        let left = cpu.counter(op.aux2) - 1;
        cpu.set_counter(op.aux2, left);
        if left != 0 {
            return super::stale(cpu, op);
        }
    }
    cpu.end_block(op)
}
