//! Judging a change of memslots, as KVM_SET_USER_MEMORY_REGION does.

use super::{AddressSpace, Memslot, Memslots, SlotFlags, SlotId};
use arch::addr::{Gfn, Gpa, Hva, PAGE_SHIFT, PAGE_SIZE};
use std::sync::Arc;

/// The greatest number of pages in a slot: a signed 32-bit count, as in KVM.
pub(crate) const MAX_SLOT_PAGES: u64 = (1 << 31) - 1;

/// The end of the addresses a process may use: the low half of 48 bits, less the guard page.
const USER_END: u64 = (1 << 47) - PAGE_SIZE;

/// A request to create, change or (with size 0) delete a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryRegion {
    /// The slot's address space.
    pub space: AddressSpace,
    /// The slot's number.
    pub number: u16,
    /// `flags` of `kvm_userspace_memory_region`, unchecked.
    pub flags: u32,
    /// Where it begins for the guest.
    pub base: Gpa,
    /// Bytes.
    pub size: u64,
    /// Where it lies in this process.
    pub hva: Hva,
}

/// Why a change of memslots was refused. Nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SlotError {
    /// The size is no multiple of 4 KiB.
    #[error("slot size {0:#x} is not a multiple of the page size")]
    MisalignedSize(u64),
    /// The guest address is no multiple of 4 KiB.
    #[error("slot guest address {0} is not page aligned")]
    MisalignedBase(Gpa),
    /// The host address is no multiple of 4 KiB.
    #[error("slot host address {0} is not page aligned")]
    MisalignedHva(Hva),
    /// The host range leaves the addresses that a process may use.
    #[error("slot host range at {0} leaves the user address space")]
    HvaOutOfRange(Hva),
    /// The guest range wraps around 2^64.
    #[error("slot guest range at {0} wraps")]
    Wraps(Gpa),
    /// The slot has more pages than a slot may have.
    #[error("slot of {0} pages is too large")]
    TooLarge(u64),
    /// The guest range exceeds the VM's physical address width.
    #[error("slot ends beyond the {0} bits of guest-physical address")]
    BeyondPhysical(u32),
    /// A flag is unknown or not supported.
    #[error("unsupported slot flags {0:#x}")]
    UnknownFlags(u32),
    /// A slot of size 0 deletes, and there is none with that number.
    #[error("slot to delete does not exist")]
    NoSuchSlot,
    /// Size, host address and the read-only flag of a slot cannot change.
    #[error("size, host address and read-only flag of an existing slot cannot change")]
    Immutable,
    /// The guest range overlaps that slot.
    #[error("slot overlaps slot {}", .0.number)]
    Overlap(SlotId),
}

/// What a request amounts to.
#[derive(Debug)]
pub(crate) enum Change {
    Nothing,
    Create(Memslot),
    Delete(Arc<Memslot>),
    Move(Arc<Memslot>, Memslot),
    Flags(Arc<Memslot>, Memslot),
}

/// Judges a request against the current slots.
pub(crate) fn plan(
    slots: &Memslots,
    region: &MemoryRegion,
    physical_bits: u32,
) -> Result<Change, SlotError> {
    let flags = check_shape(region)?;
    let id = SlotId {
        space: region.space,
        number: region.number,
    };
    let old = slots.get(id).cloned();
    let pages = region.size >> PAGE_SHIFT;
    if pages == 0 {
        return old.map(Change::Delete).ok_or(SlotError::NoSuchSlot);
    }
    let base = region.base.gfn();
    if base.get() + pages > 1 << (physical_bits - PAGE_SHIFT) {
        return Err(SlotError::BeyondPhysical(physical_bits));
    }
    let Some(old) = old else {
        check_overlap(slots, id, base, pages)?;
        return Ok(Change::Create(Memslot::new(
            id, base, pages, region.hva, flags,
        )));
    };
    let read_only_changes = (old.flags ^ flags).contains(SlotFlags::READONLY);
    if old.pages != pages || old.hva != region.hva || read_only_changes {
        return Err(SlotError::Immutable);
    }
    if old.base != base {
        check_overlap(slots, id, base, pages)?;
        let moved = Memslot::new(id, base, pages, region.hva, flags);
        moved.adopt_execution_traps(&old);
        return Ok(Change::Move(old, moved));
    }
    if old.flags == flags {
        return Ok(Change::Nothing);
    }
    let changed = old.with_flags(flags);
    Ok(Change::Flags(old, changed))
}

fn check_shape(region: &MemoryRegion) -> Result<SlotFlags, SlotError> {
    let flags = SlotFlags::from_bits(region.flags).ok_or(SlotError::UnknownFlags(region.flags))?;
    if !region.size.is_multiple_of(PAGE_SIZE) {
        return Err(SlotError::MisalignedSize(region.size));
    }
    if !region.base.is_aligned(PAGE_SIZE) {
        return Err(SlotError::MisalignedBase(region.base));
    }
    if !region.hva.is_aligned(PAGE_SIZE) {
        return Err(SlotError::MisalignedHva(region.hva));
    }
    if region.base.checked_add(region.size).is_none() {
        return Err(SlotError::Wraps(region.base));
    }
    if region.size >> PAGE_SHIFT > MAX_SLOT_PAGES {
        return Err(SlotError::TooLarge(region.size >> PAGE_SHIFT));
    }
    match region.hva.checked_add(region.size) {
        Some(end) if end.get() <= USER_END => Ok(flags),
        _ => Err(SlotError::HvaOutOfRange(region.hva)),
    }
}

fn check_overlap(slots: &Memslots, id: SlotId, base: Gfn, pages: u64) -> Result<(), SlotError> {
    let gfns = base..base.wrapping_add(pages);
    let overlap = slots.within(id.space, gfns).find(|slot| slot.id != id);
    match overlap {
        Some(slot) => Err(SlotError::Overlap(slot.id)),
        None => Ok(()),
    }
}
