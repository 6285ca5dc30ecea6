//! Guest memory for those who touch it beside the processor, as carefully: it may vanish.

use crate::host::{self, HostFault, HostInt};
use crate::memory::{load_part, store_part};

/// Access to guest memory that may be unmapped, protected or truncated at any time. What cannot be
/// touched is an answer, not a signal.
#[derive(Clone, Copy, Debug)]
pub struct GuestMemory(());

/// The memory at the address cannot be accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gone;

impl From<HostFault> for Gone {
    fn from(_: HostFault) -> Gone {
        Gone
    }
}

impl GuestMemory {
    /// Makes the process ready for such accesses.
    pub fn new() -> GuestMemory {
        crate::faults::install();
        GuestMemory(())
    }

    /// Reads bytes: 1, 2, 4 or 8 at once.
    ///
    /// # Safety
    /// The range lies in memory that this process gave to a guest, or is not mapped at all.
    pub unsafe fn read(self, hva: u64, into: &mut [u8]) -> Result<(), Gone> {
        // SAFETY: as promised by the caller.
        Ok(unsafe { load_part(hva, into) }?)
    }

    /// Writes bytes: 1, 2, 4 or 8 at once.
    ///
    /// # Safety
    /// As for [`GuestMemory::read`]; no Rust object lives there.
    pub unsafe fn write(self, hva: u64, bytes: &[u8]) -> Result<(), Gone> {
        // SAFETY: as promised by the caller.
        Ok(unsafe { store_part(hva, bytes) }?)
    }

    /// Writes `new` if `old` is there, and makes `old` what is there; whether it was written.
    /// Atomic for 1, 2, 4, 8 and (where the processor can) 16 aligned bytes.
    ///
    /// # Safety
    /// As for [`GuestMemory::write`].
    pub unsafe fn compare_exchange(
        self,
        hva: u64,
        old: &mut [u8],
        new: &[u8],
    ) -> Result<bool, Gone> {
        assert_eq!(old.len(), new.len());
        let is_aligned = hva & (new.len() as u64).wrapping_sub(1) == 0;
        macro_rules! word {
            ($int:ident, $exchange:expr) => {{
                let word = |bytes: &[u8]| {
                    $int::from_le_bytes(bytes.try_into().expect("as long as the type"))
                };
                let expected = word(old);
                // SAFETY: as promised by the caller.
                let found = unsafe { $exchange(hva, expected, word(new)) }?;
                old.copy_from_slice(&found.to_le_bytes());
                return Ok(found == expected);
            }};
        }
        match new.len() {
            1 => word!(u8, <u8 as HostInt>::compare_exchange),
            2 if is_aligned => word!(u16, <u16 as HostInt>::compare_exchange),
            4 if is_aligned => word!(u32, <u32 as HostInt>::compare_exchange),
            8 if is_aligned => word!(u64, <u64 as HostInt>::compare_exchange),
            16 if is_aligned && is_x86_feature_detected!("cmpxchg16b") => {
                word!(u128, host::compare_exchange_16)
            }
            _ => {}
        }
        let mut found = [0; 64];
        let found = &mut found[..new.len()];
        // SAFETY: as promised by the caller.
        unsafe { self.read(hva, found) }?;
        let is_same = found == old;
        if is_same {
            // SAFETY: as promised by the caller.
            unsafe { self.write(hva, new) }?;
        }
        old.copy_from_slice(found);
        Ok(is_same)
    }
}

impl Default for GuestMemory {
    fn default() -> GuestMemory {
        GuestMemory::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_gone_is_an_answer() {
        let memory = GuestMemory::new();
        let mut cells = [0x1122_3344_5566_7788u64, 0];
        let at = cells.as_mut_ptr() as u64;
        let mut bytes = [0; 3];
        let mut old = [0; 8];
        // SAFETY: the array is this test's own; the other address is nobody's.
        unsafe {
            memory.read(at + 1, &mut bytes).unwrap();
            assert_eq!(bytes, [0x77, 0x66, 0x55]);
            memory.write(at + 8, &[1, 2, 3, 4, 5]).unwrap();
            assert_eq!(memory.compare_exchange(at, &mut old, &[9; 8]), Ok(false));
            assert_eq!(memory.compare_exchange(at, &mut old, &[9; 8]), Ok(true));
            let mut part = [9; 3];
            assert_eq!(
                memory.compare_exchange(at + 1, &mut part, &[8; 3]),
                Ok(true)
            );
            assert_eq!(memory.read(0x1000, &mut bytes), Err(Gone));
            assert_eq!(memory.write(0x1000, &bytes), Err(Gone));
            let exchanged = memory.compare_exchange(0x1000, &mut part, &bytes);
            assert_eq!(exchanged, Err(Gone));
        }
        // SAFETY: initialised, and written only through the addresses above.
        let now = unsafe { std::ptr::from_ref(&cells).read_volatile() };
        assert_eq!(now, [0x0909_0909_0808_0809, 0x5_0403_0201]);
    }
}
