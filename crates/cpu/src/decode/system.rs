//! Handlers for system instructions.

use super::Context;
use super::general::{Choice, by_size, is_immediate, last, next, reg_rm, rm};
use crate::execute::{control_registers, data, io, msrs, privileged, tables, wait};
use crate::op::Op;
use arch::exit::ExitReason;
use iced_x86::{Code, Mnemonic};

pub(super) fn system(c: &Context<'_>, op: &mut Op) -> Choice {
    let i = c.instruction;
    let m = i.mnemonic();
    match m {
        Mnemonic::Cli | Mnemonic::Sti => {
            op.aux = u8::from(m == Mnemonic::Sti);
            if op.aux == 1 {
                last(tables::interrupt_flag)
            } else {
                next(tables::interrupt_flag)
            }
        }
        Mnemonic::Hlt => last(wait::hlt),
        Mnemonic::Clts => last(control_registers::clts),
        Mnemonic::Lmsw => {
            rm(c, op, 0);
            last(control_registers::lmsw)
        }
        Mnemonic::Smsw => {
            let size = rm(c, op, 0);
            next(by_size!(size, control_registers::smsw))
        }
        Mnemonic::Sgdt | Mnemonic::Sidt | Mnemonic::Lgdt | Mnemonic::Lidt => {
            op.aux = match m {
                Mnemonic::Sgdt => 0,
                Mnemonic::Sidt => 1,
                Mnemonic::Lgdt => 2,
                _ => 3,
            };
            op.aux2 = match i.code() {
                Code::Lgdt_m1632_16
                | Code::Lidt_m1632_16
                | Code::Sgdt_m1632_16
                | Code::Sidt_m1632_16 => 2,
                _ => 4,
            };
            next(tables::descriptor_table)
        }
        Mnemonic::Lldt | Mnemonic::Ltr => {
            rm(c, op, 0);
            op.aux = if m == Mnemonic::Lldt { 2 } else { 3 };
            last(tables::load_system_segment)
        }
        Mnemonic::Sldt | Mnemonic::Str => {
            let size = if c.is_memory(0) { 2 } else { rm(c, op, 0) };
            op.aux = u8::from(m == Mnemonic::Str);
            next(by_size!(size, tables::store_system_segment))
        }
        Mnemonic::Verr | Mnemonic::Verw => {
            rm(c, op, 0);
            op.aux = u8::from(m == Mnemonic::Verw);
            next(tables::verify)
        }
        Mnemonic::Lar | Mnemonic::Lsl => {
            let size = reg_rm(c, op, 1);
            op.aux = u8::from(m == Mnemonic::Lsl);
            next(by_size!(size, tables::load_rights))
        }
        Mnemonic::Arpl => {
            rm(c, op, 0);
            op.src = c.offset(1);
            next(tables::arpl)
        }
        Mnemonic::Rdmsr => next(msrs::rdmsr),
        Mnemonic::Wrmsr => last(msrs::wrmsr),
        Mnemonic::Rdtsc => next(privileged::rdtsc),
        Mnemonic::Rdtscp => {
            op.aux = 1;
            next(privileged::rdtsc)
        }
        Mnemonic::Rdpid => {
            op.dst = c.offset(0);
            next(privileged::rdpid)
        }
        Mnemonic::Rdpmc => next(privileged::rdpmc),
        Mnemonic::Cpuid => last(privileged::cpuid),
        Mnemonic::Invlpg => last(privileged::invlpg),
        Mnemonic::Invpcid => {
            op.dst = c.offset(0);
            last(privileged::invpcid)
        }
        Mnemonic::Swapgs => next(privileged::swapgs),
        Mnemonic::Rdfsbase | Mnemonic::Rdgsbase | Mnemonic::Wrfsbase | Mnemonic::Wrgsbase => {
            op.dst = c.offset(0);
            op.aux = if matches!(m, Mnemonic::Rdfsbase | Mnemonic::Wrfsbase) {
                4
            } else {
                5
            };
            op.aux2 = u8::from(matches!(m, Mnemonic::Wrfsbase | Mnemonic::Wrgsbase));
            next(by_size!(c.operand_size(0), privileged::segment_base))
        }
        Mnemonic::Pause => {
            // With REX.B the opcode is XCHG of R8, prefix or not.
            let rex = c.bytes[c.bytes.len().saturating_sub(2)];
            if c.long() && rex & 0xf1 == 0x41 {
                (op.dst, op.src) = (0, 64);
                let narrow = c.bytes.contains(&0x66);
                return next(match (rex & 8 != 0, narrow) {
                    (true, _) => data::xchg_reg::<u64>,
                    (false, true) => data::xchg_reg::<u16>,
                    (false, false) => data::xchg_reg::<u32>,
                });
            }
            next(wait::pause)
        }
        Mnemonic::Monitor | Mnemonic::Mwait => {
            op.aux = u8::from(m == Mnemonic::Mwait);
            next(wait::monitor)
        }
        Mnemonic::Invd => last(privileged::cache),
        Mnemonic::Wbinvd | Mnemonic::Wbnoinvd => {
            op.aux = 1;
            next(privileged::cache)
        }
        Mnemonic::Xgetbv => next(privileged::xgetbv),
        Mnemonic::Xsetbv => last(privileged::xsetbv),
        Mnemonic::Rdrand | Mnemonic::Rdseed => {
            op.dst = c.offset(0);
            op.aux = u8::from(m == Mnemonic::Rdseed);
            next(by_size!(c.operand_size(0), privileged::random))
        }
        Mnemonic::Rdpkru | Mnemonic::Wrpkru => {
            op.aux = u8::from(m == Mnemonic::Wrpkru);
            next(privileged::pkru)
        }
        Mnemonic::Clzero => {
            op.aux2 = if i.op_count() > 0 {
                i.op_register(0).size() as u8
            } else {
                8
            };
            next(privileged::clzero)
        }
        Mnemonic::Rsm => last(privileged::rsm),
        Mnemonic::In | Mnemonic::Out => {
            let input = m == Mnemonic::In;
            let (data, port) = if input { (0, 1) } else { (1, 0) };
            op.aux = i.op_register(data).size() as u8;
            op.aux2 = u8::from(input);
            if is_immediate(i.op_kind(port)) {
                op.aux2 |= 2;
                op.imm = i.immediate(port) & 0xff;
            }
            last(io::in_out)
        }
        Mnemonic::Umonitor => {
            op.dst = c.offset(0);
            op.aux = i.op_register(0).size() as u8;
            next(wait::umonitor)
        }
        Mnemonic::Umwait | Mnemonic::Tpause => {
            op.dst = c.offset(0);
            op.aux = u8::from(m == Mnemonic::Tpause);
            next(wait::wait)
        }
        Mnemonic::Encls => last(privileged::encls),
        Mnemonic::Vmfunc => last(privileged::vmfunc),
        Mnemonic::Vmcall | Mnemonic::Vmmcall => {
            op.aux = u8::from(m == Mnemonic::Vmmcall);
            last(privileged::vmcall)
        }
        _ => vmx(c, op),
    }
}

fn vmx(c: &Context<'_>, op: &mut Op) -> Choice {
    let reason = match c.instruction.mnemonic() {
        Mnemonic::Vmclear => ExitReason::Vmclear,
        Mnemonic::Vmlaunch => ExitReason::Vmlaunch,
        Mnemonic::Vmptrld => ExitReason::Vmptrld,
        Mnemonic::Vmptrst => ExitReason::Vmptrst,
        Mnemonic::Vmread => ExitReason::Vmread,
        Mnemonic::Vmresume => ExitReason::Vmresume,
        Mnemonic::Vmwrite => ExitReason::Vmwrite,
        Mnemonic::Vmxoff => ExitReason::Vmxoff,
        Mnemonic::Vmxon => ExitReason::Vmxon,
        Mnemonic::Invept => ExitReason::Invept,
        Mnemonic::Invvpid => ExitReason::Invvpid,
        _ => return None,
    };
    if c.instruction.op_count() > 0 && c.is_register(0) {
        op.dst = c.offset(0);
    }
    op.aux = reason as u8;
    last(privileged::vmx)
}
