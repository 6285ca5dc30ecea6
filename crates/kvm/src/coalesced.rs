//! Coalesced MMIO and PIO: writes that user space need not see at once.
//!
//! Writes into registered zones go into a ring in shared memory, which user space empties at its
//! next exit. A full ring falls back to an exit.

use crate::error::{Result, fail};
use crate::eventfd::IoSpace;
use crate::run_area::{PAGE, SharedMemory};
use kvm_bindings::{
    kvm_coalesced_mmio, kvm_coalesced_mmio__bindgen_ty_1, kvm_coalesced_mmio_ring,
    kvm_coalesced_mmio_zone,
};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError, RwLock};

/// Entries that fit into the ring's page.
pub(crate) const RING_ENTRIES: u32 =
    ((PAGE - size_of::<kvm_coalesced_mmio_ring>()) / size_of::<kvm_coalesced_mmio>()) as u32;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Zone {
    space: IoSpace,
    address: u64,
    size: u32,
}

/// The zones of a VM and their ring.
#[derive(Debug)]
pub(crate) struct Coalesced {
    ring: SharedMemory,
    zones: RwLock<Vec<Zone>>,
    /// Some were registered once: writes in most VMs need no look.
    has_zones: AtomicBool,
    producer: Mutex<()>,
}

fn zone(request: &kvm_coalesced_mmio_zone) -> Result<Zone> {
    // SAFETY: both members of the union are the same 32 bits.
    let pio = unsafe { request.__bindgen_anon_1.pio };
    let space = match pio {
        0 => IoSpace::Memory,
        1 => IoSpace::Port,
        _ => return fail(libc::EINVAL),
    };
    Ok(Zone {
        space,
        address: request.addr,
        size: request.size,
    })
}

impl Coalesced {
    pub(crate) fn new() -> Result<Coalesced> {
        Ok(Coalesced {
            ring: SharedMemory::new("kvm-coalesced", PAGE, PAGE)?,
            zones: RwLock::default(),
            has_zones: AtomicBool::new(false),
            producer: Mutex::default(),
        })
    }

    /// The page of the ring.
    pub(crate) fn memory(&self) -> &SharedMemory {
        &self.ring
    }

    /// KVM_REGISTER_COALESCED_MMIO.
    pub(crate) fn register(&self, request: &kvm_coalesced_mmio_zone) -> Result<()> {
        let zone = zone(request)?;
        let mut zones = self.zones.write().unwrap_or_else(PoisonError::into_inner);
        if zones.len() >= 1000 {
            return fail(libc::ENOSPC);
        }
        zones.push(zone);
        self.has_zones.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// KVM_UNREGISTER_COALESCED_MMIO: removes the zones that the request contains.
    pub(crate) fn unregister(&self, request: &kvm_coalesced_mmio_zone) -> Result<()> {
        let range = zone(request)?;
        let end = |zone: &Zone| zone.address.saturating_add(zone.size as u64);
        let mut zones = self.zones.write().unwrap_or_else(PoisonError::into_inner);
        zones.retain(|zone| {
            let contained = zone.space == range.space
                && zone.address >= range.address
                && end(zone) <= end(&range);
            !contained
        });
        Ok(())
    }

    /// Whether a zone begins at or before an address and ends after it.
    pub(crate) fn concerns(&self, space: IoSpace, address: u64) -> bool {
        let zones = self.zones.read().unwrap_or_else(PoisonError::into_inner);
        zones.iter().any(|zone| {
            zone.space == space && address.wrapping_sub(zone.address) < zone.size as u64
        })
    }

    /// Puts a write into the ring; false if no zone holds it or the ring is full.
    pub(crate) fn push(&self, space: IoSpace, address: u64, data: &[u8]) -> bool {
        if !self.has_zones.load(Ordering::Relaxed) {
            return false;
        }
        let zones = self.zones.read().unwrap_or_else(PoisonError::into_inner);
        let within = |zone: &Zone| {
            zone.space == space
                && address >= zone.address
                && address.saturating_add(data.len() as u64)
                    <= zone.address.saturating_add(zone.size as u64)
        };
        if data.len() > 8 || !zones.iter().any(within) {
            return false;
        }
        let mut entry = kvm_coalesced_mmio {
            phys_addr: address,
            len: data.len() as u32,
            __bindgen_anon_1: kvm_coalesced_mmio__bindgen_ty_1 {
                pio: (space == IoSpace::Port) as u32,
            },
            data: [0; 8],
        };
        entry.data[..data.len()].copy_from_slice(data);
        let _producer = self.producer.lock().unwrap_or_else(PoisonError::into_inner);
        let ring: *mut kvm_coalesced_mmio_ring = self.ring.base().cast();
        // SAFETY: the ring's header lies at the start of its page; user space shares it, so its
        // two indices are accessed atomically.
        let (first, last) = unsafe {
            (
                AtomicU32::from_ptr(&raw mut (*ring).first),
                AtomicU32::from_ptr(&raw mut (*ring).last),
            )
        };
        let insert = last.load(Ordering::Relaxed);
        let next = (insert + 1) % RING_ENTRIES;
        // An index that user space made nonsense of must not lead outside the page.
        if insert >= RING_ENTRIES || next == first.load(Ordering::Acquire) {
            return false;
        }
        // SAFETY: `insert` is below the number of entries that fit into the page.
        unsafe {
            let entries: *mut kvm_coalesced_mmio = (&raw mut (*ring).coalesced_mmio).cast();
            entries.add(insert as usize).write(entry);
        }
        last.store(next, Ordering::Release);
        true
    }

    /// Takes the oldest entry.
    pub(crate) fn pop(&self) -> Option<kvm_coalesced_mmio> {
        let ring: *mut kvm_coalesced_mmio_ring = self.ring.base().cast();
        // SAFETY: as in `push`.
        let (first, last) = unsafe {
            (
                AtomicU32::from_ptr(&raw mut (*ring).first),
                AtomicU32::from_ptr(&raw mut (*ring).last),
            )
        };
        let index = first.load(Ordering::Relaxed);
        if index == last.load(Ordering::Acquire) || index >= RING_ENTRIES {
            return None;
        }
        // SAFETY: as in `push`; the producer does not touch an entry between first and last.
        let entry = unsafe {
            let entries: *mut kvm_coalesced_mmio = (&raw mut (*ring).coalesced_mmio).cast();
            entries.add(index as usize).read()
        };
        first.store((index + 1) % RING_ENTRIES, Ordering::Release);
        Some(entry)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(address: u64, size: u32, pio: u32) -> kvm_coalesced_mmio_zone {
        let mut zone = kvm_coalesced_mmio_zone {
            addr: address,
            size,
            ..Default::default()
        };
        zone.__bindgen_anon_1.pio = pio;
        zone
    }

    #[test]
    fn ring() {
        let coalesced = Coalesced::new().unwrap();
        coalesced.register(&request(0x1000, 0x100, 0)).unwrap();
        coalesced.register(&request(0x70, 2, 1)).unwrap();
        assert!(coalesced.register(&request(0, 1, 2)).is_err());
        assert!(!coalesced.push(IoSpace::Memory, 0x10fe, &[1; 4]));
        assert!(coalesced.push(IoSpace::Memory, 0x1010, &[1, 2, 3, 4]));
        assert!(coalesced.push(IoSpace::Port, 0x70, &[5]));
        let entry = coalesced.pop().unwrap();
        assert_eq!((entry.phys_addr, entry.len, entry.data[3]), (0x1010, 4, 4));
        assert_eq!(coalesced.pop().unwrap().phys_addr, 0x70);
        assert!(coalesced.pop().is_none());
        let pushed = (0..500)
            .filter(|_| coalesced.push(IoSpace::Memory, 0x1000, &[0]))
            .count();
        assert_eq!(pushed as u32, RING_ENTRIES - 1);
        coalesced.unregister(&request(0, 0x10000, 0)).unwrap();
        assert!(!coalesced.push(IoSpace::Memory, 0x1010, &[1]));
        assert!(coalesced.unregister(&request(0, 0x10000, 1)).is_ok());
    }
}
