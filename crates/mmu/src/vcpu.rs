//! A vCPU's side of the MMU.

use crate::gate::Gate;
use crate::memslot::AddressSpace;
use crate::mmio::MmioCache;
use crate::stats::{Counters, Stats};
use crate::tdp::{Root, TableCache};
use std::sync::Arc;

/// What the MMU keeps for one vCPU; it belongs to the vCPU's thread.
#[derive(Debug)]
pub struct Vcpu {
    pub(crate) gate: Arc<Gate>,
    pub(crate) root: Option<Arc<Root>>,
    pub(crate) space: AddressSpace,
    pub(crate) cache: TableCache,
    pub(crate) mmio: MmioCache,
    pub(crate) shadow: crate::shadow::VcpuShadow,
    pub(crate) counters: Arc<Counters>,
}

impl Vcpu {
    /// Where the vCPU enters and leaves guest mode.
    pub fn gate(&self) -> &Gate {
        &self.gate
    }

    /// The gate, to keep apart from the vCPU.
    pub fn shared_gate(&self) -> Arc<Gate> {
        Arc::clone(&self.gate)
    }

    /// The address space that the vCPU sees.
    pub fn address_space(&self) -> AddressSpace {
        self.space
    }

    /// Switches the address space, on entry to and exit from system management mode. The processor
    /// needs its translations flushed if it does not tell address spaces apart by EPTP.
    pub fn set_address_space(&mut self, space: AddressSpace) {
        if self.space != space {
            self.space = space;
            self.root = None;
            self.mmio.clear();
            self.shadow.clear();
        }
    }

    /// This vCPU's counters.
    pub fn stats(&self) -> Stats {
        let mut stats = Stats::default();
        self.counters.add_to(&mut stats);
        stats
    }
}
