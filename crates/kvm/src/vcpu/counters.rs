//! Counters of one vCPU.

use arch::exit::ExitReason;

/// Counters of one vCPU, for the statistics descriptor.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counters {
    pub(crate) exits: u64,
    pub(crate) io_exits: u64,
    pub(crate) mmio_exits: u64,
    pub(crate) halt_exits: u64,
    pub(crate) halt_wakeups: u64,
    pub(crate) irq_injections: u64,
    pub(crate) nmi_injections: u64,
    pub(crate) irq_window_exits: u64,
    pub(crate) signal_exits: u64,
    pub(crate) instructions_emulated: u64,
    pub(crate) emulation_failures: u64,
    pub(crate) hypercalls: u64,
    pub(crate) tlb_flushes: u64,
    pub(crate) page_faults: u64,
    /// Entries that ended where they began.
    pub(crate) entries_in_vain: u64,
    pub(crate) by_reason: ByReason,
}

/// Exits by basic exit reason.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ByReason([u64; REASONS]);

/// One more than the largest basic exit reason.
const REASONS: usize = ExitReason::ALL[ExitReason::ALL.len() - 1] as usize + 1;

impl Default for ByReason {
    fn default() -> ByReason {
        ByReason([0; REASONS])
    }
}

impl ByReason {
    /// Counts an exit.
    pub(super) fn count(&mut self, reason: ExitReason) {
        self.0[reason as usize] += 1;
    }

    /// The reasons that occurred, with their numbers of exits.
    pub(crate) fn named(&self) -> Vec<(&'static str, u64)> {
        let counts = ExitReason::ALL
            .iter()
            .map(|reason| (reason.name(), self.0[*reason as usize]));
        counts.filter(|(_, count)| *count != 0).collect()
    }
}

impl Counters {
    /// The counters with their names.
    pub(crate) fn named(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("exits", self.exits),
            ("io_exits", self.io_exits),
            ("mmio_exits", self.mmio_exits),
            ("halt_exits", self.halt_exits),
            ("halt_wakeup", self.halt_wakeups),
            ("irq_injections", self.irq_injections),
            ("nmi_injections", self.nmi_injections),
            ("irq_window_exits", self.irq_window_exits),
            ("signal_exits", self.signal_exits),
            ("insn_emulation", self.instructions_emulated),
            ("insn_emulation_fail", self.emulation_failures),
            ("hypercalls", self.hypercalls),
            ("tlb_flush", self.tlb_flushes),
            ("pf_taken", self.page_faults),
            ("entries_in_vain", self.entries_in_vain),
        ]
    }
}
