//! KVM's own accesses to guest memory.

use crate::host::HostAccess;
use crate::memslot::{AddressSpace, Memslot, Probed};
use crate::mmu::Mmu;
use arch::addr::{Gpa, Hva, PAGE_SIZE};
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64};

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
            self.write_reported(space, slot, at, bytes, || {
                // SAFETY: as in `read_guest`, and the page takes writes.
                unsafe { store(hva, bytes) };
                true
            });
            done += part;
        }
        Ok(())
    }

    /// Writes `new` to guest memory if `old` is there, and makes `old` what was found: atomic for
    /// 1, 2, 4, 8 and (where the processor can) 16 aligned bytes. Others are compared and written
    /// one after the other. They may not cross a page. The vCPU, if any, is out of guest mode.
    pub fn compare_exchange_guest(
        &self,
        space: AddressSpace,
        gpa: Gpa,
        old: &mut [u8],
        new: &[u8],
    ) -> Result<(), AccessError> {
        assert!(old.len() == new.len() && page_part(gpa, new.len()) == new.len());
        let slots = self.slots();
        let slot = slots.find(space, gpa.gfn()).filter(|slot| !slot.is_invalid);
        let slot = slot.ok_or(AccessError::NoMemory(gpa))?;
        let hva = self.accessible(slot, gpa, HostAccess::Write)?;
        self.write_reported(space, slot, gpa, new, || {
            // SAFETY: as in `write_guest`.
            unsafe { compare_exchange(hva, old, new) }
        });
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

/// Calls a macro with the atomic type for each length, for what is aligned.
macro_rules! with_atomic {
    ($hva:expr, $length:expr, $do:ident, $otherwise:expr) => {
        match $length {
            length if $hva.get() & (length as u64).wrapping_sub(1) != 0 => $otherwise,
            1 => $do!(AtomicU8, u8),
            2 => $do!(AtomicU16, u16),
            4 => $do!(AtomicU32, u32),
            8 => $do!(AtomicU64, u64),
            _ => $otherwise,
        }
    };
}

/// Stores bytes: at once, if they are an aligned word, since a processor may be walking a table
/// there.
///
/// # Safety
/// The bytes at `hva` are guest memory that takes writes.
unsafe fn store(hva: Hva, bytes: &[u8]) {
    let into = std::ptr::with_exposed_provenance_mut::<u8>(hva.get() as usize);
    macro_rules! word {
        ($atomic:ident, $int:ident) => {{
            let value = $int::from_le_bytes(bytes.try_into().expect("as long as the type"));
            // SAFETY: as promised by the caller, and aligned.
            unsafe { $atomic::from_ptr(into.cast()) }.store(value, SeqCst)
        }};
    }
    with_atomic!(hva, bytes.len(), word, {
        // SAFETY: as promised by the caller.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), into, bytes.len()) }
    });
}

/// Writes `new` if `old` is there, and makes `old` what is there; true if it was written.
///
/// # Safety
/// As for [`store`].
unsafe fn compare_exchange(hva: Hva, old: &mut [u8], new: &[u8]) -> bool {
    let at = std::ptr::with_exposed_provenance_mut::<u8>(hva.get() as usize);
    macro_rules! word {
        ($atomic:ident, $int:ident) => {{
            let word =
                |bytes: &[u8]| $int::from_le_bytes(bytes.try_into().expect("as long as the type"));
            // SAFETY: as promised by the caller, and aligned.
            let cell = unsafe { $atomic::from_ptr(at.cast()) };
            let result = cell.compare_exchange(word(old), word(new), SeqCst, SeqCst);
            let found = result.unwrap_or_else(|found| found);
            old.copy_from_slice(&found.to_le_bytes());
            result.is_ok()
        }};
    }
    with_atomic!(hva, new.len(), word, {
        if new.len() == 16 && hva.get() & 15 == 0 && is_x86_feature_detected!("cmpxchg16b") {
            let word =
                |bytes: &[u8]| u128::from_le_bytes(bytes.try_into().expect("as long as the type"));
            let (expected, new) = (word(old), word(new));
            // SAFETY: as promised by the caller, aligned, and the processor has the instruction.
            let found = unsafe { compare_exchange_16(at.cast(), expected, new) };
            old.copy_from_slice(&found.to_le_bytes());
            return found == expected;
        }
        let mut found = [0; 16];
        let found = &mut found[..new.len()];
        // SAFETY: as promised by the caller.
        unsafe { std::ptr::copy_nonoverlapping(at, found.as_mut_ptr(), new.len()) };
        let is_same = found == old;
        if is_same {
            // SAFETY: as promised by the caller.
            unsafe { std::ptr::copy_nonoverlapping(new.as_ptr(), at, new.len()) };
        }
        old.copy_from_slice(found);
        is_same
    })
}

/// CMPXCHG16B; what it found.
///
/// # Safety
/// As for [`store`]; the address is aligned, and the processor has the instruction.
unsafe fn compare_exchange_16(at: *mut u128, old: u128, new: u128) -> u128 {
    let (mut low, mut high) = (old as u64, (old >> 64) as u64);
    // SAFETY: as promised by the caller. RBX, which belongs to the compiler, is put back.
    unsafe {
        std::arch::asm!(
            "xchg rbx, rsi",
            "lock cmpxchg16b [rdi]",
            "mov rbx, rsi",
            in("rdi") at,
            inout("rsi") new as u64 => _,
            in("rcx") (new >> 64) as u64,
            inout("rax") low,
            inout("rdx") high,
            options(nostack),
        );
    }
    u128::from(high) << 64 | u128::from(low)
}
