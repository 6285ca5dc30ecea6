//! x87, MMX, SSE, AVX and the extended-state instructions.

use crate::decode::Context;
use crate::op::{Handler, Op};

/// Chooses the handler and fills in the operands; `None` for instructions not of these families.
pub(crate) fn select(_c: &Context<'_>, _op: &mut Op) -> Option<Handler> {
    None
}
