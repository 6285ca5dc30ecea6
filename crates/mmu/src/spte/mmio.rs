//! MMIO entries: deliberate misconfigurations that carry what the next access needs.
//!
//! Write and execute without read is a pattern that EPT hardware always rejects as misconfigured.
//! The rest of the entry holds the frame, whether writes were allowed, and the memslot generation,
//! whose 19 bits go around the frame: the low eight below, the others above.
//!
//! A processor that speculates past a misconfigured entry (L1 terminal fault) would take the frame
//! bits for an address of cacheable memory. Where the guest's physical width leaves room, its top
//! bits are therefore stored shifted up, and stand as ones in their own place: an address that no
//! memory has.

use super::{MMU_PRESENT, Spte};
use arch::addr::{Gfn, PAGE_SHIFT};
use arch::paging::ept_entry as ept;

const PATTERN: u64 = ept::WRITE | ept::EXECUTE;
const PATTERN_MASK: u64 = ept::READ | ept::WRITE | ept::EXECUTE | MMU_PRESENT;

const LOW_BITS: u32 = 8;
const LOW_SHIFT: u32 = 3;
const HIGH_BITS: u32 = 11;
const HIGH_SHIFT: u32 = 52;
const WRITABLE: u64 = 1 << 63;

/// The bits of the memslot generation that an entry holds.
pub(crate) const GENERATION_BITS: u32 = LOW_BITS + HIGH_BITS;
/// Their mask: a generation that is zero under it has wrapped.
pub(crate) const GENERATION_MASK: u64 = (1 << GENERATION_BITS) - 1;

/// How many top bits of the address are moved.
const MOVED_BITS: u32 = 5;

const _: () = assert!(GENERATION_BITS >= 19);
const _: () = assert!(LOW_SHIFT + LOW_BITS == MMU_PRESENT.trailing_zeros());
const _: () = assert!(HIGH_SHIFT + HIGH_BITS == WRITABLE.trailing_zeros());

/// How MMIO entries are laid out for a physical address width.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MmioFormat {
    /// Address bits that are stored shifted up, as a mask; zero where there is no room.
    moved: u64,
}

impl MmioFormat {
    pub(crate) const fn new(physical_bits: u32) -> Self {
        let has_room = physical_bits + MOVED_BITS <= HIGH_SHIFT;
        let low = physical_bits - MOVED_BITS;
        Self {
            moved: if has_room {
                ((1 << MOVED_BITS) - 1) << low
            } else {
                0
            },
        }
    }

    /// The entry for a frame, made at that generation.
    pub(crate) const fn entry(self, gfn: Gfn, is_writable: bool, generation: u64) -> Spte {
        let address = gfn.get() << PAGE_SHIFT & ept::ADDRESS;
        let kept = address | self.moved;
        let moved = (address & self.moved) << MOVED_BITS;
        let low = generation & ((1 << LOW_BITS) - 1);
        let high = generation >> LOW_BITS & ((1 << HIGH_BITS) - 1);
        let writable = if is_writable { WRITABLE } else { 0 };
        Spte(PATTERN | low << LOW_SHIFT | high << HIGH_SHIFT | kept | moved | writable)
    }

    /// The frame of an MMIO entry.
    pub(crate) const fn gfn(self, entry: Spte) -> Gfn {
        let address = entry.0 & ept::ADDRESS;
        let moved = address >> MOVED_BITS & self.moved;
        let kept = address & !(self.moved | self.moved << MOVED_BITS);
        Gfn::new((kept | moved) >> PAGE_SHIFT)
    }
}

impl Spte {
    /// Whether the entry is of the MMIO pattern.
    #[inline(always)]
    pub(crate) const fn is_mmio(self) -> bool {
        self.0 & PATTERN_MASK == PATTERN
    }

    /// The generation that an MMIO entry was made at, as far as it is stored.
    #[inline(always)]
    pub(crate) const fn mmio_generation(self) -> u64 {
        let low = self.0 >> LOW_SHIFT & ((1 << LOW_BITS) - 1);
        let high = self.0 >> HIGH_SHIFT & ((1 << HIGH_BITS) - 1);
        low | high << LOW_BITS
    }

    /// Whether an MMIO entry's access includes writes.
    pub(crate) const fn is_mmio_writable(self) -> bool {
        self.0 & WRITABLE != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frame_access_and_generation_survive() {
        for physical_bits in [36, 39, 46, 47, 48, 52] {
            let format = MmioFormat::new(physical_bits);
            let last = (1 << (physical_bits - PAGE_SHIFT)) - 1;
            for gfn in [0, 1, 0xfee00, last / 3, last - 5, last] {
                for generation in [0, 1, 0xff, 0x100, 0x7_ffff, 0x8_0001, 0x5_5555] {
                    let entry = format.entry(Gfn::new(gfn), generation & 1 == 0, generation);
                    assert!(entry.is_mmio() && !entry.is_present() && !entry.is_frozen());
                    assert_eq!(format.gfn(entry), Gfn::new(gfn));
                    assert_eq!(entry.mmio_generation(), generation & GENERATION_MASK);
                    assert_eq!(entry.is_mmio_writable(), generation & 1 == 0);
                }
            }
        }
    }

    #[test]
    fn top_address_bits_are_moved_out_of_the_way() {
        let entry = MmioFormat::new(46).entry(Gfn::new(0xfee00), true, 0);
        assert_eq!(entry.raw() >> 41 & 0x1f, 0x1f, "stands as ones");
        assert_eq!(entry.raw() & !ept::ADDRESS & !WRITABLE, PATTERN);
    }
}
