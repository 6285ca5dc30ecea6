//! Instructions that touch memory element by element under a mask: masked moves and gathers.
//!
//! Only elements whose mask bit is set are accessed, so only they can fault; the host's own
//! instruction cannot be used on a copy of the operand.

use super::form::Family;
use crate::decode::{Context, register_offset};
use crate::execute::attempt;
use crate::op::{Flow, Handler, Op, Stop, flag};
use crate::state::ExtendedState;
use crate::vcpu::{Cause, Vcpu};
use iced_x86::{Mnemonic, Register};

/// Element size and vector length of VMASKMOV and gathers, packed into `aux2`.
const WIDE_VECTOR: u8 = 0x80;

/// Chooses the handler for the masked family.
pub(super) fn select(c: &Context<'_>, op: &mut Op) -> Option<Handler> {
    let i = c.instruction;
    let number = |n: u32| i.op_register(n).number() as u8;
    match i.mnemonic() {
        Mnemonic::Vmaskmovps
        | Mnemonic::Vmaskmovpd
        | Mnemonic::Vpmaskmovd
        | Mnemonic::Vpmaskmovq => {
            let element = if matches!(i.mnemonic(), Mnemonic::Vmaskmovps | Mnemonic::Vpmaskmovd) {
                4
            } else {
                8
            };
            let store = c.is_memory(0);
            let data = if store { 2 } else { 0 };
            op.dst = number(data);
            op.src = number(1);
            op.aux = u8::from(store);
            let wide = i.op_register(data).is_ymm();
            op.aux2 = element | if wide { WIDE_VECTOR } else { 0 };
            Some(vmaskmov)
        }
        Mnemonic::Maskmovdqu | Mnemonic::Vmaskmovdqu | Mnemonic::Maskmovq => {
            op.dst = number(1);
            op.src = number(2);
            op.aux = u8::from(i.mnemonic() == Mnemonic::Maskmovq);
            op.base = register_offset(Register::RDI) / 8;
            op.flags |= flag::MEMORY;
            op.segment = super::super::decode::segment_index(i.memory_segment());
            let size = (0..i.op_count()).fold(8, |size, n| match i.op_kind(n) {
                iced_x86::OpKind::MemorySegDI => 2,
                iced_x86::OpKind::MemorySegEDI => 4,
                iced_x86::OpKind::MemorySegRDI => 8,
                _ => size,
            });
            c.set_address_size(op, size);
            op.imm = u64::from(i.mnemonic() == Mnemonic::Vmaskmovdqu);
            Some(maskmov)
        }
        Mnemonic::Vgatherdps
        | Mnemonic::Vgatherdpd
        | Mnemonic::Vgatherqps
        | Mnemonic::Vgatherqpd
        | Mnemonic::Vpgatherdd
        | Mnemonic::Vpgatherdq
        | Mnemonic::Vpgatherqd
        | Mnemonic::Vpgatherqq => gather_operands(c, op),
        _ => None,
    }
}

fn gather_operands(c: &Context<'_>, op: &mut Op) -> Option<Handler> {
    let i = c.instruction;
    let m = i.mnemonic();
    let number = |r: Register| r.number() as u8;
    op.dst = number(i.op_register(0));
    op.src = number(i.op_register(2));
    op.aux = number(i.memory_index());
    op.index = crate::state::slot::ZERO as u8;
    // Two equal registers raise #UD.
    if op.dst == op.src || op.dst == op.aux || op.src == op.aux {
        return None;
    }
    let element: u64 = match m {
        Mnemonic::Vgatherdps
        | Mnemonic::Vgatherqps
        | Mnemonic::Vpgatherdd
        | Mnemonic::Vpgatherqd => 4,
        _ => 8,
    };
    let index: u64 = match m {
        Mnemonic::Vgatherdps
        | Mnemonic::Vgatherdpd
        | Mnemonic::Vpgatherdd
        | Mnemonic::Vpgatherdq => 4,
        _ => 8,
    };
    let wide = i.op_register(0).is_ymm() || i.memory_index().is_ymm();
    let length: u64 = if wide { 32 } else { 16 };
    let elements = length / element.max(index);
    op.imm = element | index << 8 | elements << 16 | u64::from(i.memory_index_scale()) << 24;
    op.scale = 0;
    Some(gather)
}

impl Vcpu {
    /// A vector register's 32 bytes.
    fn vector(&self, n: u8) -> [u8; 32] {
        let area = &self.state.extended.0;
        let (low, high) = (
            ExtendedState::XMM + 16 * usize::from(n),
            ExtendedState::YMM_HIGH + 16 * usize::from(n),
        );
        let mut value = [0; 32];
        value[..16].copy_from_slice(&area[low..low + 16]);
        value[16..].copy_from_slice(&area[high..high + 16]);
        value
    }

    fn set_vector(&mut self, n: u8, value: &[u8; 32]) {
        let area = &mut self.state.extended.0;
        let low = ExtendedState::XMM + 16 * usize::from(n);
        let high = ExtendedState::YMM_HIGH + 16 * usize::from(n);
        area[low..low + 16].copy_from_slice(&value[..16]);
        area[high..high + 16].copy_from_slice(&value[16..]);
    }
}

/// VMASKMOVPS/PD, VPMASKMOVD/Q: data register `dst`, mask `src`, `aux` 1 for stores.
fn vmaskmov(cpu: &mut Vcpu, op: &Op) -> Flow {
    attempt!(cpu.check_family(Family::Avx));
    let element = usize::from(op.aux2 & !WIDE_VECTOR);
    let length = if op.aux2 & WIDE_VECTOR != 0 { 32 } else { 16 };
    let mask = cpu.vector(op.src);
    let chosen = (0..length)
        .step_by(element)
        .filter(|at| mask[at + element - 1] & 0x80 != 0);
    if op.aux == 1 {
        let data = cpu.vector(op.dst);
        let chosen: Vec<_> = chosen.collect();
        for &at in &chosen {
            let address = attempt!(cpu.address_at(op, at as u64, element as u64, true));
            attempt!(cpu.check_write(address, element, op.segment));
        }
        for at in chosen {
            let address = attempt!(cpu.address_at(op, at as u64, element as u64, true));
            attempt!(cpu.write_bytes(address, op.segment, &data[at..at + element]));
        }
        return Flow::Next;
    }
    let mut result = [0; 32];
    for at in chosen {
        let address = attempt!(cpu.address_at(op, at as u64, element as u64, false));
        attempt!(cpu.read_bytes(address, op.segment, &mut result[at..at + element]));
    }
    cpu.set_vector(op.dst, &result);
    Flow::Next
}

/// MASKMOVDQU and MASKMOVQ: data `dst`, mask `src`; `aux` 1 for MMX registers.
fn maskmov(cpu: &mut Vcpu, op: &Op) -> Flow {
    let mmx = op.aux == 1;
    let family = if mmx {
        Family::Mmx
    } else if op.imm == 1 {
        Family::Avx
    } else {
        Family::Sse
    };
    attempt!(cpu.check_family(family));
    let (length, data, mask) = if mmx {
        let area = &cpu.state.extended.0;
        // The image holds the registers as the stack has them; MMX names them physically.
        let top = area[3] >> 3 & 7;
        let register = |n: u8| {
            let at = ExtendedState::ST + 16 * usize::from(n.wrapping_sub(top) & 7);
            let mut value = [0; 32];
            value[..8].copy_from_slice(&area[at..at + 8]);
            value
        };
        (8, register(op.dst), register(op.src))
    } else {
        (16, cpu.vector(op.dst), cpu.vector(op.src))
    };
    let chosen: Vec<_> = (0..length).filter(|&at| mask[at] & 0x80 != 0).collect();
    for &at in &chosen {
        let address = attempt!(cpu.address_at(op, at as u64, 1, true));
        attempt!(cpu.check_write(address, 1, op.segment));
    }
    for at in chosen {
        let address = attempt!(cpu.address_at(op, at as u64, 1, true));
        attempt!(cpu.write_bytes(address, op.segment, &data[at..=at]));
    }
    if mmx {
        // Any MMX instruction makes all x87 registers valid and TOP zero.
        let area = &mut cpu.state.extended.0;
        let top = usize::from(area[3] >> 3 & 7);
        let registers = &mut area[ExtendedState::ST..ExtendedState::ST + 128];
        registers.rotate_right(16 * top);
        area[4] = 0xff;
        area[3] &= !0x38;
    }
    Flow::Next
}

/// Gathers: destination `dst`, mask `src`, index vector `aux`, geometry in `imm`. Elements are
/// taken lowest first; each clears its mask element, so that a fault in between can be restarted.
fn gather(cpu: &mut Vcpu, op: &Op) -> Flow {
    attempt!(cpu.check_family(Family::Avx));
    let element = (op.imm & 0xff) as usize;
    let index_size = (op.imm >> 8 & 0xff) as usize;
    let elements = (op.imm >> 16 & 0xff) as usize;
    let scale = op.imm >> 24 & 0xff;
    let indices = cpu.vector(op.aux);
    let mut mask = cpu.vector(op.src);
    let mut result = cpu.vector(op.dst);
    for n in 0..elements {
        let at = n * element;
        if mask[at + element - 1] & 0x80 == 0 {
            // Passed over: a fault further on shows it cleared, as on this host.
            mask[at..at + element].fill(0);
            continue;
        }
        let from = n * index_size;
        let index = if index_size == 4 {
            i32::from_le_bytes(indices[from..from + 4].try_into().unwrap_or_default()) as i64
        } else {
            i64::from_le_bytes(indices[from..from + 8].try_into().unwrap_or_default())
        };
        let offset = (index as u64).wrapping_mul(scale);
        let mut value = [0; 8];
        let read = cpu
            .address_at(op, offset, element as u64, false)
            .and_then(|address| cpu.read_bytes(address, op.segment, &mut value[..element]));
        if let Err(Stop) = read {
            // A fault or an exit shows what was gathered; an abandoned emulation starts again.
            if matches!(cpu.cause, Cause::Exception(_) | Cause::Exit(_)) {
                cpu.set_vector(op.dst, &result);
                cpu.set_vector(op.src, &mask);
            }
            return Flow::Stop;
        }
        result[at..at + element].copy_from_slice(&value[..element]);
        mask[at..at + element].fill(0);
    }
    // What lies beyond the elements is cleared.
    result[elements * element..].fill(0);
    cpu.set_vector(op.dst, &result);
    cpu.set_vector(op.src, &[0; 32]);
    Flow::Next
}
