//! A watch over entries that lead nowhere.
//!
//! A processor may leave without having executed an instruction, for a window, a page that is to be
//! mapped, a kick, and whoever handles the exit makes sure that the next entry gets further. Where
//! the two do not agree about what stands in the way they go round for ever, and the thread looks
//! busy. This counts such rounds, and ends the run with an internal error instead.

use super::{Core, Vcpu};
use crate::exits::{self, Outcome};
use arch::exit::{ExitReason, VmExit};
use cpu::Gpr;
use kvm_bindings::KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON;
use std::time::{Duration, Instant};

/// Rounds after which nothing more will come of it, where nobody else is waited for.
const MOST_ROUNDS: u32 = 10_000;
/// Where somebody else may be: the page-fault handler retries while another thread unmaps memory.
const MOST_TIME: Duration = Duration::from_secs(20);

/// Where an entry began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    rip: u64,
    /// Registers that string instructions move.
    registers: [u64; 3],
    instructions: u64,
}

/// The rounds that led nowhere since the last that did, and since when they were many.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct InVain {
    rounds: u32,
    since: Option<Instant>,
}

/// Whether only the processor and the handler take part in what an exit for this reason leads to.
fn is_between_two(reason: ExitReason) -> bool {
    matches!(reason, ExitReason::InterruptWindow | ExitReason::NmiWindow)
}

impl Core {
    pub(super) fn place(&self) -> Place {
        let state = &self.cpu.state;
        Place {
            rip: state.rip,
            registers: [Gpr::Rcx, Gpr::Rsi, Gpr::Rdi].map(|gpr| state.gpr(gpr)),
            instructions: self.cpu.instructions(),
        }
    }

    /// Counts an exit after an entry that began at `start`; the internal error if there were too
    /// many that led nowhere.
    #[inline]
    pub(super) fn watch_progress(
        &mut self,
        vcpu: &Vcpu,
        start: &Place,
        exit: &VmExit,
    ) -> Option<Outcome> {
        let now = self.place();
        // One that stopped at its first instruction may have counted it.
        let executed = now.instructions.wrapping_sub(start.instructions);
        let is_vain = executed <= 1 && (now.rip, now.registers) == (start.rip, start.registers);
        if !is_vain || exit.reason == ExitReason::ExternalInterrupt {
            self.in_vain = InVain::default();
            return None;
        }
        self.count_in_vain(vcpu, exit)
    }

    #[cold]
    fn count_in_vain(&mut self, vcpu: &Vcpu, exit: &VmExit) -> Option<Outcome> {
        self.in_vain.rounds = self.in_vain.rounds.saturating_add(1);
        self.counters.entries_in_vain += 1;
        if self.in_vain.rounds < MOST_ROUNDS {
            return None;
        }
        let since = *self.in_vain.since.get_or_insert_with(Instant::now);
        if !is_between_two(exit.reason) && since.elapsed() < MOST_TIME {
            return None;
        }
        self.in_vain = InVain::default();
        tracing::error!(
            reason = exit.reason.name(),
            vcpu = vcpu.id(),
            rip = self.cpu.state.rip,
            "the guest does not go on"
        );
        let data = [exit.reason as u64, vcpu.id() as u64];
        let error = KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON;
        Some(exits::internal_error(self, vcpu, error, &data))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_bindings::KVM_EXIT_INTERNAL_ERROR;

    #[test]
    fn rounds_in_vain_end_and_those_that_lead_somewhere_do_not() {
        let kvm = crate::Kvm::new().unwrap();
        let vm = kvm.create_vm().unwrap();
        let vcpu = vm.create_vcpu(3).unwrap();
        let inner = vcpu.inner();
        let mut core = inner.lock();
        let window = VmExit::new(ExitReason::NmiWindow);
        let kick = VmExit::new(ExitReason::ExternalInterrupt);
        for round in 0..4 * MOST_ROUNDS {
            let start = core.place();
            let exit = if round % 1000 == 0 {
                core.cpu.state.rip += 1;
                &window
            } else if round % 1500 == 0 {
                &kick
            } else {
                &window
            };
            assert_eq!(core.watch_progress(inner, &start, exit), None);
        }
        let start = core.place();
        let rounds = (0..2 * MOST_ROUNDS)
            .take_while(|_| core.watch_progress(inner, &start, &window).is_none())
            .count();
        assert!(rounds < MOST_ROUNDS as usize);
        assert_eq!(inner.kvm_run(&core).exit_reason, KVM_EXIT_INTERNAL_ERROR);
        assert!(core.counters.entries_in_vain >= MOST_ROUNDS.into());
        // Another thread may be in the way of a page.
        let page = VmExit::new(ExitReason::EptViolation);
        for _ in 0..2 * MOST_ROUNDS {
            assert_eq!(core.watch_progress(inner, &start, &page), None);
        }
    }
}
