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
            // SAFETY: the kernel has shown that the page is there, and the read section keeps its
            // slot. Guest memory is no Rust object: it is only ever reached through raw pointers,
            // and bytes that vCPUs change meanwhile come out old or new.
            if unsafe { self.host.read(hva, &mut bytes[done..done + part]) }.is_err() {
                return Err(gone(slot, at));
            }
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
            let mut written = Ok(());
            self.write_reported(space, slot, at, bytes, || {
                // SAFETY: as in `read_guest`, and the page takes writes.
                written = unsafe { self.host.write(hva, bytes) };
                written.is_ok()
            });
            written.map_err(|_| gone(slot, at))?;
            done += part;
        }
        Ok(())
    }

    /// Whether [`Mmu::write_guest`] would find memory that takes writes at an address.
    pub fn takes_writes(&self, space: AddressSpace, gpa: Gpa) -> Result<(), AccessError> {
        let slots = self.slots();
        let slot = slots.find(space, gpa.gfn()).filter(|slot| !slot.is_invalid);
        let slot = slot.ok_or(AccessError::NoMemory(gpa))?;
        self.accessible(slot, gpa, HostAccess::Write).map(|_| ())
    }

    /// Writes `new` to guest memory if `old` is there, and makes `old` what was found; whether it
    /// was written. Atomic for
    /// 1, 2, 4, 8 and (where the processor can) 16 aligned bytes. Others are compared and written
    /// one after the other. They may not cross a page. The vCPU, if any, is out of guest mode.
    pub fn compare_exchange_guest(
        &self,
        space: AddressSpace,
        gpa: Gpa,
        old: &mut [u8],
        new: &[u8],
    ) -> Result<bool, AccessError> {
        assert!(old.len() == new.len() && page_part(gpa, new.len()) == new.len());
        let slots = self.slots();
        let slot = slots.find(space, gpa.gfn()).filter(|slot| !slot.is_invalid);
        let slot = slot.ok_or(AccessError::NoMemory(gpa))?;
        let hva = self.accessible(slot, gpa, HostAccess::Write)?;
        let mut exchanged = Ok(false);
        self.write_reported(space, slot, gpa, new, || {
            // SAFETY: as in `write_guest`.
            exchanged = unsafe { self.host.compare_exchange(hva, old, new) };
            exchanged == Ok(true)
        });
        exchanged.map_err(|_| gone(slot, gpa))
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

/// Memory went away after it was shown to be there: that is to be found out anew.
#[cold]
fn gone(slot: &Memslot, gpa: Gpa) -> AccessError {
    let page = slot.hva_of(gpa.gfn());
    slot.forget_probes(&(page..page.wrapping_add(PAGE_SIZE)));
    AccessError::HostMemory(gpa, page)
}

/// How much of `length` bytes from `gpa` on lies in the first page.
fn page_part(gpa: Gpa, length: usize) -> usize {
    length.min((PAGE_SIZE - gpa.page_offset()) as usize)
}
