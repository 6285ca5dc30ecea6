//! KVM's own accesses to guest memory.

use crate::host::HostAccess;
use crate::memslot::{AddressSpace, Memslot, Probed};
use crate::mmu::Mmu;
use arch::addr::{Gpa, Hva, PAGE_SIZE};

/// Why guest memory was not accessed. Bytes before the address named were.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AccessError {
    /// No slot has the address, or its slot is being taken away.
    #[error("no memory at guest address {0}")]
    NoMemory(Gpa),
    /// The slot takes no writes.
    #[error("guest address {0} is in a read-only slot")]
    ReadOnly(Gpa),
    /// The slot's host memory cannot be accessed.
    #[error("host memory at {1} behind guest address {0} cannot be accessed")]
    HostMemory(Gpa, Hva),
}

impl Mmu {
    /// Reads guest memory.
    pub fn read_guest(
        &self,
        space: AddressSpace,
        gpa: Gpa,
        bytes: &mut [u8],
    ) -> Result<(), AccessError> {
        let slots = self.slots();
        let mut done = 0;
        while done < bytes.len() {
            let at = gpa.wrapping_add(done as u64);
            let part = page_part(at, bytes.len() - done);
            let slot = slots.find(space, at.gfn()).filter(|slot| !slot.is_invalid);
            let slot = slot.ok_or(AccessError::NoMemory(at))?;
            let hva = self.accessible(slot, at, HostAccess::Read)?;
            let from = std::ptr::with_exposed_provenance::<u8>(hva.get() as usize);
            let into = bytes[done..done + part].as_mut_ptr();
            // SAFETY: the kernel has just shown that the page is there, and the read section keeps
            // its slot. Guest memory is no Rust object: it is only ever reached through raw
            // pointers, and bytes that vCPUs change meanwhile come out old or new.
            unsafe { std::ptr::copy_nonoverlapping(from, into, part) };
            done += part;
        }
        Ok(())
    }

    /// Writes guest memory, marks its pages dirty and reports writes to tracked pages.
    pub fn write_guest(
        &self,
        space: AddressSpace,
        gpa: Gpa,
        bytes: &[u8],
    ) -> Result<(), AccessError> {
        let slots = self.slots();
        let mut done = 0;
        while done < bytes.len() {
            let at = gpa.wrapping_add(done as u64);
            let part = page_part(at, bytes.len() - done);
            let slot = slots.find(space, at.gfn()).filter(|slot| !slot.is_invalid);
            let slot = slot.ok_or(AccessError::NoMemory(at))?;
            let hva = self.accessible(slot, at, HostAccess::Write)?;
            let bytes = &bytes[done..done + part];
            let into = std::ptr::with_exposed_provenance_mut::<u8>(hva.get() as usize);
            {
                // The log is taken under the exclusive lock: it sees the write with its mark.
                let _shared = slot.logs_dirty().then(|| self.shared());
                // SAFETY: as in `read_guest`, and the page takes writes.
                unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), into, part) };
                self.mark_slot_dirty(slot, at.gfn());
            }
            self.report_write(space, slot, at, bytes);
            done += part;
        }
        Ok(())
    }

    /// The host address of a guest address, with its page's host memory shown to be there. It stays
    /// good while the caller holds a [`crate::SlotsGuard`] taken before, and the VMM does not take the
    /// memory away.
    pub fn host_address(
        &self,
        space: AddressSpace,
        gpa: Gpa,
        access: HostAccess,
    ) -> Result<Hva, AccessError> {
        let slots = self.slots();
        let slot = slots.find(space, gpa.gfn()).filter(|slot| !slot.is_invalid);
        self.accessible(slot.ok_or(AccessError::NoMemory(gpa))?, gpa, access)
    }

    pub(crate) fn accessible(
        &self,
        slot: &Memslot,
        gpa: Gpa,
        access: HostAccess,
    ) -> Result<Hva, AccessError> {
        let page = slot.hva_of(gpa.gfn());
        let hva = page.wrapping_add(gpa.page_offset());
        if access == HostAccess::Write && slot.is_read_only() {
            return Err(AccessError::ReadOnly(gpa));
        }
        let needed = match access {
            HostAccess::Read => Probed::Readable,
            HostAccess::Write => Probed::Writable,
        };
        if slot.probed(gpa.gfn()) >= needed {
            return Ok(hva);
        }
        self.counters.host_probes.add(1);
        if self
            .host
            .populate(page..page.wrapping_add(PAGE_SIZE), access)
        {
            Ok(hva)
        } else {
            Err(AccessError::HostMemory(gpa, page))
        }
    }
}

/// How much of `length` bytes from `gpa` on lies in the first page.
fn page_part(gpa: Gpa, length: usize) -> usize {
    length.min((PAGE_SIZE - gpa.page_offset()) as usize)
}
