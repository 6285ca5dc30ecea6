//! Guest memory: one anonymous mapping below the device hole and one above 4 GiB.

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::layout::{ABOVE_4G, ACPI_TABLES, ACPI_TABLES_END, CONVENTIONAL_END, DEVICE_HOLE};
use super::layout::{HIGH_MEMORY, KVM_IDENTITY_MAP};

/// The guest's memory.
pub(crate) type GuestMemory = vm_memory::GuestMemoryMmap<()>;

/// The least memory a machine is built with; the boot structures need the first megabyte.
pub(crate) const MINIMUM: u64 = 2 << 20;

/// What can go wrong when guest memory is made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MemoryError {
    /// Below the minimum or not whole pages.
    #[error("--memory {0} bytes: give at least 2M, in whole pages of 4K")]
    Size(u64),
    /// The host refused the mapping.
    #[error("the host has no room for {size} bytes of guest memory: {error}")]
    Map {
        /// Bytes asked for.
        size: u64,
        /// What the host said.
        error: vm_memory::mmap::FromRangesError,
    },
}

/// Kind of a range in the memory map that the guest is given (E820 numbers).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum RangeKind {
    /// Usable memory.
    Ram = 1,
    /// Not to be touched.
    Reserved = 2,
}

/// One range of the memory map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MapRange {
    /// First byte.
    pub(crate) start: u64,
    /// Length in bytes.
    pub(crate) size: u64,
    /// What it is.
    pub(crate) kind: RangeKind,
}

/// Maps `size` bytes of guest memory.
pub(crate) fn allocate(size: u64) -> Result<GuestMemory, MemoryError> {
    if size < MINIMUM || !size.is_multiple_of(4096) {
        return Err(MemoryError::Size(size));
    }
    let mut ranges = vec![(GuestAddress(0), size.min(DEVICE_HOLE) as usize)];
    if size > DEVICE_HOLE {
        ranges.push((GuestAddress(ABOVE_4G), (size - DEVICE_HOLE) as usize));
    }
    GuestMemory::from_ranges(&ranges).map_err(|error| MemoryError::Map { size, error })
}

/// End of memory below the device hole.
pub(crate) fn low_end(memory: &GuestMemory) -> u64 {
    memory.iter().next().map_or(0, GuestMemoryRegion::len)
}

/// The memory map to hand to the guest.
pub(crate) fn map(memory: &GuestMemory) -> Vec<MapRange> {
    let range = |start, end, kind| MapRange {
        start,
        size: end - start,
        kind,
    };
    let mut map = vec![
        range(0, CONVENTIONAL_END, RangeKind::Ram),
        range(CONVENTIONAL_END, 0xa_0000, RangeKind::Reserved),
        range(ACPI_TABLES, ACPI_TABLES_END, RangeKind::Reserved),
        range(HIGH_MEMORY, low_end(memory), RangeKind::Ram),
        range(
            KVM_IDENTITY_MAP,
            KVM_IDENTITY_MAP + 0x4000,
            RangeKind::Reserved,
        ),
    ];
    if let Some(high) = memory.iter().nth(1) {
        map.push(range(ABOVE_4G, ABOVE_4G + high.len(), RangeKind::Ram));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_beyond_the_hole_continues_above_4g() {
        let memory = allocate(DEVICE_HOLE + (1 << 20)).unwrap();
        assert_eq!(low_end(&memory), DEVICE_HOLE);
        let last = *map(&memory).last().unwrap();
        let expected = MapRange {
            start: ABOVE_4G,
            size: 1 << 20,
            kind: RangeKind::Ram,
        };
        assert_eq!(last, expected);
    }

    #[test]
    fn odd_sizes_are_refused() {
        assert!(matches!(allocate(1 << 20), Err(MemoryError::Size(_))));
        assert!(matches!(allocate((4 << 20) + 1), Err(MemoryError::Size(_))));
    }

    #[test]
    fn the_map_is_sorted_and_disjoint() {
        let map = map(&allocate(DEVICE_HOLE + (1 << 20)).unwrap());
        for pair in map.windows(2) {
            assert!(pair[0].start + pair[0].size <= pair[1].start, "{pair:?}");
        }
    }
}
