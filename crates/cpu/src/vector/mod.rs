//! x87, MMX, SSE and AVX, and the instructions that save and restore their state.
//!
//! The host is an x86 too: an instruction of these families runs as itself, on the guest's
//! registers, through a small generated stub ([`stub`]), if it is on the list of those that may ([`form`]). Results and exceptions are the host
//! processor's, exact by construction. Done in software is what moves state ([`save`],
//! [`environment`]) and what touches memory element by element ([`masked`]).

mod environment;
mod form;
mod masked;
mod run;
mod save;
mod scratch;
mod stub;

use crate::decode::Context;
use crate::op::{Handler, Op};
use iced_x86::Mnemonic;

pub(crate) use stub::Stubs;

/// Chooses the handler and fills in the operands; `None` for instructions not of these families,
/// or that cannot be run.
pub(crate) fn select(c: &Context<'_>, op: &mut Op) -> Option<Handler> {
    let long = |m: Mnemonic| u8::from(m == c.instruction.mnemonic());
    match c.instruction.mnemonic() {
        m @ (Mnemonic::Fxsave | Mnemonic::Fxsave64) => {
            op.aux = u8::from(m == Mnemonic::Fxsave64);
            Some(save::fxsave)
        }
        m @ (Mnemonic::Fxrstor | Mnemonic::Fxrstor64) => {
            op.aux = u8::from(m == Mnemonic::Fxrstor64);
            Some(save::fxrstor)
        }
        Mnemonic::Xsave | Mnemonic::Xsave64 => {
            op.aux = save::kind::XSAVE;
            op.aux2 = long(Mnemonic::Xsave64);
            Some(save::xsave)
        }
        Mnemonic::Xsaveopt | Mnemonic::Xsaveopt64 => {
            op.aux = save::kind::XSAVEOPT;
            op.aux2 = long(Mnemonic::Xsaveopt64);
            Some(save::xsave)
        }
        Mnemonic::Xsavec | Mnemonic::Xsavec64 => {
            op.aux = save::kind::XSAVEC;
            op.aux2 = long(Mnemonic::Xsavec64);
            Some(save::xsave)
        }
        Mnemonic::Xsaves | Mnemonic::Xsaves64 => {
            op.aux = save::kind::XSAVES;
            op.aux2 = long(Mnemonic::Xsaves64);
            Some(save::xsave)
        }
        Mnemonic::Xrstor | Mnemonic::Xrstor64 => {
            op.aux = save::kind::XSAVE;
            op.aux2 = long(Mnemonic::Xrstor64);
            Some(save::xrstor)
        }
        Mnemonic::Xrstors | Mnemonic::Xrstors64 => {
            op.aux = save::kind::XSAVES;
            op.aux2 = long(Mnemonic::Xrstors64);
            Some(save::xrstor)
        }
        Mnemonic::Ldmxcsr | Mnemonic::Vldmxcsr => Some(save::ldmxcsr),
        Mnemonic::Stmxcsr | Mnemonic::Vstmxcsr => Some(save::stmxcsr),
        Mnemonic::Vzeroupper | Mnemonic::Vzeroall => {
            op.aux = u8::from(c.instruction.mnemonic() == Mnemonic::Vzeroall);
            Some(save::vzero)
        }
        Mnemonic::Fnstenv | Mnemonic::Fldenv | Mnemonic::Fnsave | Mnemonic::Frstor => {
            op.aux = match c.instruction.mnemonic() {
                Mnemonic::Fnstenv => 0,
                Mnemonic::Fldenv => 1,
                Mnemonic::Fnsave => 2,
                _ => 3,
            };
            op.aux2 = environment::operand_size(c.instruction.memory_size());
            Some(environment::environment)
        }
        Mnemonic::Movnti => {
            op.src = crate::decode::register_offset(c.instruction.op_register(1));
            Some(if c.operand_size(1) == 8 {
                crate::execute::data::mov_mem_reg::<u64>
            } else {
                crate::execute::data::mov_mem_reg::<u32>
            })
        }
        _ => masked::select(c, op).or_else(|| run::select(c, op)),
    }
}
