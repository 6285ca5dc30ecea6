//! The memory behind guests as the MMU reaches it: with the processor's care for what may vanish.

use arch::addr::Hva;
use cpu::GuestMemory;
use mmu::{Gone, HostAccess, ProcessMemory};
use std::ops::Range;

/// Memory of this process that the VMM may take away at any time.
#[derive(Debug, Default)]
pub(crate) struct HostMemory {
    process: ProcessMemory,
    access: GuestMemory,
}

impl mmu::HostMemory for HostMemory {
    fn populate(&self, range: Range<Hva>, access: HostAccess) -> bool {
        self.process.populate(range, access)
    }

    unsafe fn read(&self, from: Hva, into: &mut [u8]) -> Result<(), Gone> {
        // SAFETY: the caller's promise is what is asked for here.
        unsafe { self.access.read(from.get(), into) }.map_err(|_| Gone)
    }

    unsafe fn write(&self, into: Hva, bytes: &[u8]) -> Result<(), Gone> {
        // SAFETY: as above.
        unsafe { self.access.write(into.get(), bytes) }.map_err(|_| Gone)
    }

    unsafe fn compare_exchange(&self, at: Hva, old: &mut [u8], new: &[u8]) -> Result<bool, Gone> {
        // SAFETY: as above.
        unsafe { self.access.compare_exchange(at.get(), old, new) }.map_err(|_| Gone)
    }
}
