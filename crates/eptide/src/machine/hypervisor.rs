//! What is asked of the KVM implementation beyond the KVM API: the paging mode and statistics.

use kvm::{Kvm, VmFd};

use crate::report::Statistics;

/// The KVM implementation cannot do what was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unsupported {
    /// No KVM at all.
    #[error("KVM cannot be opened: {0}")]
    Open(kvm::Error),
    /// `--ept` is not possible.
    #[error("--ept cannot be chosen with this KVM implementation")]
    Ept,
}

/// Opens KVM.
pub(crate) fn open(ept: Option<bool>) -> Result<Kvm, Unsupported> {
    if ept.is_some() {
        return Err(Unsupported::Ept);
    }
    Kvm::new().map_err(Unsupported::Open)
}

/// The VM's counters.
pub(crate) fn statistics(_vm: &VmFd) -> Statistics {
    Statistics::default()
}
