//! The addresses that are Eptide's own, and no guest's memory.
//!
//! A host-physical address is a virtual address of this process, and a memslot names a range of
//! them. The program may unmap memory behind a slot that stands, and the kernel may then give the
//! addresses to whoever maps memory next. Were that Eptide, the guest would read and write page
//! tables or code. So what must never be a guest's lies in one range of addresses that is set aside
//! before the first slot is made, and that slots may not name ([`is_own`]):
//!
//! ```text
//!   set aside, without access ├──────┬────────┬──────┬────────────────────────┤
//!                              tables  code     kvm_run   … as it is needed
//! ```
//!
//! Setting it aside costs no memory. Where the host allows no such range (a limit of address space),
//! each region is a mapping of its own; slots may not name those either, but the kernel may put one
//! where a slot's memory was.
//!
//! A [`Region`] is given back to the range when it is dropped, never to the kernel.

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
compile_error!("eptide-reserved knows the address space of x86-64 Linux");

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::with_exposed_provenance_mut;
use std::sync::{Mutex, OnceLock, PoisonError};

/// Bytes set aside, and the least that is tried for.
const MOST: usize = 1 << 40;
const LEAST: usize = 1 << 30;

const PAGE: usize = 4096;

/// The range that was set aside, and what is free of it.
struct Own {
    range: Range<usize>,
    ranges: Mutex<Ranges>,
}

#[derive(Default)]
struct Ranges {
    /// Free parts of the range by their start: none empty, no two adjacent.
    free: BTreeMap<usize, usize>,
    /// Regions outside the range, by their start.
    outside: BTreeMap<usize, usize>,
}

fn own() -> &'static Own {
    static OWN: OnceLock<Own> = OnceLock::new();
    OWN.get_or_init(|| {
        let range = set_aside();
        let mut ranges = Ranges::default();
        if !range.is_empty() {
            ranges.free.insert(range.start, range.len());
        }
        Own {
            range,
            ranges: Mutex::new(ranges),
        }
    })
}

/// The largest range that the host lets be set aside; empty if it lets none.
fn set_aside() -> Range<usize> {
    let mut len = MOST;
    while len >= LEAST {
        if let Ok(start) = map_inaccessible(0, len) {
            // SAFETY: the mapping just made; the advice only keeps it out of core dumps.
            unsafe { libc::madvise(at(start), len, libc::MADV_DONTDUMP) };
            return start..start + len;
        }
        len /= 2;
    }
    0..0
}

fn at(address: usize) -> *mut c_void {
    with_exposed_provenance_mut(address)
}

/// Maps addresses that cannot be accessed: at `address`, in place of what is there, or anywhere (0).
fn map_inaccessible(address: usize, len: usize) -> io::Result<usize> {
    let fixed = if address == 0 { 0 } else { libc::MAP_FIXED };
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | fixed;
    // SAFETY: a new mapping, or one in place of a region that its owner gives up.
    let mapped = unsafe { libc::mmap(at(address), len, libc::PROT_NONE, flags, -1, 0) };
    if mapped == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(mapped.expose_provenance())
}

impl Own {
    fn ranges(&self) -> std::sync::MutexGuard<'_, Ranges> {
        // Each change of the ranges is complete before anything can panic.
        self.ranges.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ranges {
    /// Takes the first free addresses that will do.
    fn take(&mut self, len: usize, align: usize) -> Option<usize> {
        let (start, free, taken) = self.free.iter().find_map(|(&start, &free)| {
            let taken = start.checked_next_multiple_of(align)?;
            (taken - start <= free && free - (taken - start) >= len).then_some((start, free, taken))
        })?;
        self.free.remove(&start);
        if taken > start {
            self.free.insert(start, taken - start);
        }
        if start + free > taken + len {
            self.free.insert(taken + len, start + free - taken - len);
        }
        Some(taken)
    }

    /// Puts addresses back.
    fn put(&mut self, mut start: usize, mut len: usize) {
        if let Some(behind) = self.free.remove(&(start + len)) {
            len += behind;
        }
        if let Some((&before, &free)) = self.free.range(..start).next_back()
            && before + free == start
        {
            self.free.remove(&before);
            (start, len) = (before, len + free);
        }
        self.free.insert(start, len);
    }
}

/// Whether any of these addresses is Eptide's own, now or in the future.
pub fn is_own(range: Range<u64>) -> bool {
    let own = own();
    let overlaps =
        |start: usize, end: usize| range.start < end as u64 && (start as u64) < range.end;
    overlaps(own.range.start, own.range.end)
        || own
            .ranges()
            .outside
            .iter()
            .any(|(&start, &len)| overlaps(start, start + len))
}

/// Addresses of Eptide's own, without access until something is mapped there.
#[derive(Debug)]
pub struct Region {
    start: usize,
    len: usize,
}

impl Region {
    /// Takes `len` bytes of addresses, a multiple of 4096, that begin at a multiple of `align`, a
    /// power of two.
    pub fn new(len: usize, align: usize) -> io::Result<Region> {
        assert!(len.is_multiple_of(PAGE) && len > 0 && align.is_power_of_two());
        let align = align.max(PAGE);
        let own = own();
        if let Some(start) = own.ranges().take(len, align) {
            return Ok(Region { start, len });
        }
        let mapped = map_inaccessible(0, len + align)?;
        let start = mapped.next_multiple_of(align);
        for (from, to) in [(mapped, start), (start + len, mapped + len + align)] {
            if to > from {
                // SAFETY: what is left over of the mapping just made.
                unsafe { libc::munmap(at(from), to - from) };
            }
        }
        own.ranges().outside.insert(start, len);
        Ok(Region { start, len })
    }

    /// The first address.
    pub fn start(&self) -> *mut u8 {
        at(self.start).cast()
    }

    /// The address of a part, which must lie inside.
    fn part(&self, offset: usize, len: usize) -> *mut c_void {
        let is_inside = offset.checked_add(len).is_some_and(|end| end <= self.len);
        assert!(is_inside && offset.is_multiple_of(PAGE) && len.is_multiple_of(PAGE));
        at(self.start + offset)
    }

    /// Makes zeroed memory of a part in which nothing was mapped.
    pub fn allocate(&self, offset: usize, len: usize) -> io::Result<*mut u8> {
        let address = self.part(offset, len);
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: part of this region, to which there are no references yet.
        match unsafe { libc::mprotect(address, len, protection) } {
            0 => Ok(address.cast()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Maps a part of a file, shared, in place of what is there.
    ///
    /// # Safety
    ///
    /// Nothing refers to the part.
    pub unsafe fn map_file(
        &self,
        offset: usize,
        len: usize,
        file: BorrowedFd<'_>,
        from: u64,
        protection: libc::c_int,
    ) -> io::Result<*mut u8> {
        let address = self.part(offset, len);
        let flags = libc::MAP_SHARED | libc::MAP_FIXED;
        // SAFETY: part of this region, to which the caller says there are no references.
        let mapped = unsafe {
            libc::mmap(
                address,
                len,
                protection,
                flags,
                file.as_raw_fd(),
                from as libc::off_t,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(mapped.cast())
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        let own = own();
        if own.range.contains(&self.start) {
            // What could not be taken away stays as it is, and so do its addresses.
            if map_inaccessible(self.start, self.len).is_ok() {
                own.ranges().put(self.start, self.len);
            }
            return;
        }
        own.ranges().outside.remove(&self.start);
        // SAFETY: the region's own mapping, to which nothing refers any more.
        unsafe { libc::munmap(at(self.start), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(region: &Region) -> Range<u64> {
        let start = region.start() as u64;
        start..start + region.len as u64
    }

    #[test]
    fn regions_are_own_aligned_and_apart() {
        let regions: Vec<_> = [
            (PAGE, 1),
            (2 << 20, 2 << 20),
            (3 * PAGE, PAGE),
            (PAGE, 1 << 16),
        ]
        .into_iter()
        .map(|(len, align)| {
            let region = Region::new(len, align).unwrap();
            assert!((region.start() as usize).is_multiple_of(align));
            region
        })
        .collect();
        for (n, region) in regions.iter().enumerate() {
            assert!(is_own(range(region)));
            for other in &regions[n + 1..] {
                let (a, b) = (range(region), range(other));
                assert!(a.end <= b.start || b.end <= a.start);
            }
        }
        let local = 0_u64;
        let elsewhere = &raw const local as u64;
        assert!(!is_own(elsewhere..elsewhere + 8));
        assert!(is_own(0..u64::MAX));
    }

    #[test]
    fn memory_is_zeroed_when_it_is_used_again() {
        let region = Region::new(4 * PAGE, PAGE).unwrap();
        let first = region.allocate(PAGE, PAGE).unwrap();
        // SAFETY: memory just allocated.
        unsafe { first.write_bytes(0xa5, PAGE) };
        drop(region);
        let region = Region::new(4 * PAGE, PAGE).unwrap();
        let again = region.allocate(PAGE, PAGE).unwrap();
        // SAFETY: as above.
        let bytes = unsafe { std::slice::from_raw_parts(again, PAGE) };
        assert!(bytes.iter().all(|byte| *byte == 0));
    }

    #[test]
    fn free_addresses_are_joined() {
        let mut ranges = Ranges::default();
        ranges.put(0x1_0000, 0x1_0000);
        let taken: Vec<_> = (0..4).map(|_| ranges.take(0x4000, PAGE).unwrap()).collect();
        assert_eq!(taken, [0x1_0000, 0x1_4000, 0x1_8000, 0x1_c000]);
        assert_eq!(ranges.take(PAGE, PAGE), None);
        for n in [0, 2, 1, 3] {
            ranges.put(taken[n], 0x4000);
        }
        assert_eq!(ranges.free, BTreeMap::from([(0x1_0000, 0x1_0000)]));
        assert_eq!(ranges.take(0x2000, 0x8000), Some(0x1_0000));
        assert_eq!(ranges.take(0x2000, 0x8000), Some(0x1_8000));
        assert_eq!(ranges.free.values().sum::<usize>(), 0x1_0000 - 0x4000);
    }
}
