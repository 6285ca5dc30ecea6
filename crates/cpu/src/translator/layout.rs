//! Where things are while generated code runs: guest registers in host registers, everything else
//! at a distance from RBP.
//!
//! | guest | host |
//! | --- | --- |
//! | RAX, RCX, RDX, RBX, RSI, RDI, R8, R9, R12, R13 | themselves |
//! | RSP | R14 |
//! | RBP | R15 |
//! | R10, R11, R14, R15 | in memory, at their place in the register file |
//!
//! R10 and R11 are free for address computations. The host's RSP stays the host's, since signals
//! are delivered on it. RBP points 128 bytes into the processor, so that the register file is
//! within reach of a one-byte displacement.

use super::Hot;
use super::asm::{Mem, RBP, Reg};
use crate::state::{CpuState, ExtendedState, slot};
use crate::vcpu::Vcpu;
use core::mem::offset_of;

/// Distance of RBP from the processor's first byte.
pub(super) const BIAS: i32 = 128;

/// Guest registers that live in host registers, with their homes.
pub(super) const HOMES: [(usize, Reg); 12] = [
    (0, 0),
    (1, 1),
    (2, 2),
    (3, 3),
    (4, 14),
    (5, 15),
    (6, 6),
    (7, 7),
    (8, 8),
    (9, 9),
    (12, 12),
    (13, 13),
];

/// Where RSP lives.
pub(super) const GUEST_RSP: Reg = 14;
/// Where RBP lives.
pub(super) const GUEST_RBP: Reg = 15;

/// The host register that holds a guest register, if one does.
pub(super) fn home(guest: usize) -> Option<Reg> {
    HOMES
        .iter()
        .find(|(register, _)| *register == guest)
        .map(|(_, host)| *host)
}

/// Memory at an offset from the processor's first byte.
pub(super) const fn field(offset: usize) -> Mem {
    Mem {
        base: RBP,
        index: None,
        disp: offset as i32 - BIAS,
    }
}

/// A slot of the register file.
pub(super) const fn register(guest: usize) -> Mem {
    field(offset_of!(Vcpu, state) + offset_of!(CpuState, regs) + 8 * guest)
}

/// The linear address of the page that the running code is in.
pub(super) const PAGE: Mem = register(slot::PAGE);
pub(super) const RIP: Mem = field(offset_of!(Vcpu, state) + offset_of!(CpuState, rip));
pub(super) const COUNTDOWN: Mem = field(offset_of!(Vcpu, countdown));
pub(super) const JUMP_KEY: Mem = field(offset_of!(Vcpu, jump_key));
pub(super) const EFLAGS: Mem = hot(offset_of!(Hot, eflags));
pub(super) const TLB_TABLE: Mem = hot(offset_of!(Hot, table));
pub(super) const TLB_MASK: Mem = hot(offset_of!(Hot, mask));
pub(super) const JUMPS: Mem = hot(offset_of!(Hot, jumps));
pub(super) const JUMP_SALT: Mem = hot(offset_of!(Hot, jump_salt));
pub(super) const ATTENTION: Mem = hot(offset_of!(Hot, attention));
pub(super) const TEMPORARY: Mem = hot(offset_of!(Hot, temporary));
pub(super) const STACK_TAG: Mem = hot(offset_of!(Hot, stack_tag));
pub(super) const STACK_PAGE: Mem = hot(offset_of!(Hot, stack_page));
pub(super) const STACK_BASE: Mem = hot(offset_of!(Hot, stack_base));
pub(super) const STACK_LIMIT: Mem = hot(offset_of!(Hot, stack_limit));
pub(super) const LINK: Mem = hot(offset_of!(Hot, link));
pub(super) const HOST_MXCSR: Mem = hot(offset_of!(Hot, host_mxcsr));
pub(super) const VECTORS_LOADED: Mem = hot(offset_of!(Hot, vectors_loaded));
pub(super) const VECTORS_ALLOWED: Mem = hot(offset_of!(Hot, vectors_allowed));

const fn hot(offset: usize) -> Mem {
    field(offset_of!(Vcpu, hot) + offset)
}

/// A byte of the extended state.
pub(super) const fn extended(offset: usize) -> Mem {
    field(offset_of!(Vcpu, state) + offset_of!(CpuState, extended) + offset)
}

pub(super) const MXCSR: Mem = extended(ExtendedState::MXCSR);

/// The linear base of a segment.
pub(super) const fn segment_base(segment: usize) -> Mem {
    field(offset_of!(Vcpu, state) + offset_of!(CpuState, segment_bases) + 8 * segment)
}

const _: () = {
    assert!(offset_of!(Vcpu, state) == 0 && offset_of!(CpuState, regs) == 0);
    assert!(BIAS as usize >= 8 * 16);
};
