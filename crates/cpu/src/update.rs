//! Accesses that read, compute and write: plain ones, and locked ones as single host atomics.
//!
//! A locked access that splits a cache line is the one bus lock that can be seen here. With
//! bus-lock detection its instruction is executed alone and exits behind it.

use crate::host::{self, HostFault};
use crate::memory::{Int, PAGE_MASK, Place, crosses};
use crate::op::Stop;
use crate::vcpu::{Cause, Vcpu};
use arch::apic::AccessType;
use arch::controls::SecondaryControls;
use arch::paging::Access;

impl Vcpu {
    /// Reads `T` at `gva`, computes a new value and writes it, after checking that the write is
    /// allowed. With `lock` the whole is atomic. Returns what `compute` returned beside the value.
    #[inline(always)]
    pub(crate) fn modify<T: Int, R>(
        &mut self,
        gva: u64,
        segment: u8,
        lock: bool,
        mut compute: impl FnMut(T) -> (T, R),
    ) -> Result<R, Stop> {
        let entry = self.tlb.entry(gva);
        let last = gva.wrapping_add(T::SIZE as u64 - 1);
        let split = lock && splits_line(gva, T::SIZE);
        if entry.write == last & PAGE_MASK | self.context && !split {
            let hva = gva.wrapping_add(entry.addend);
            // SAFETY: as in `read`.
            if let Ok(result) = unsafe { modify_host(hva, lock, &mut compute) } {
                return Ok(result);
            }
        }
        self.modify_slow(gva, segment, lock, compute)
    }

    /// CMPXCHG16B's access: `gva` is 16-byte aligned. Returns the value found.
    pub(crate) fn exchange_16(
        &mut self,
        gva: u64,
        segment: u8,
        old: u128,
        new: u128,
    ) -> Result<u128, Stop> {
        let access = self.data_access(Access::WRITE);
        self.check_address(gva, 16, segment)?;
        let found = match self.resolve_cached(gva, access)? {
            Place::Ram { hva } => {
                // SAFETY: `resolve` returns addresses of guest memory only.
                match unsafe { host::compare_exchange_16(hva, old, new) } {
                    Ok(found) => {
                        self.wrote(hva, 16);
                        found
                    }
                    Err(HostFault) => return Err(self.host_fault(gva, access)),
                }
            }
            Place::Bus { gpa } => {
                let mut bytes = [0; 16];
                self.bus_read(gpa, &mut bytes)?;
                // What is not the value looked for is written back, as long as it stays the same.
                loop {
                    let found = u128::from_le_bytes(bytes);
                    let value = if found == old { new } else { found };
                    if self.bus_exchange(gpa, &mut bytes, &value.to_le_bytes())? {
                        break found;
                    }
                }
            }
            Place::Apic { offset } => {
                return Err(self.apic_access_exit(AccessType::Write, offset));
            }
        };
        let value = if found == old { new } else { found };
        for (value, write) in [(found, false), (value, true)] {
            self.observe_access(gva, &value.to_le_bytes(), write);
        }
        Ok(found)
    }

    #[cold]
    #[inline(never)]
    fn modify_slow<T: Int, R>(
        &mut self,
        gva: u64,
        segment: u8,
        lock: bool,
        mut compute: impl FnMut(T) -> (T, R),
    ) -> Result<R, Stop> {
        let access = self.data_access(Access::WRITE);
        self.check_address(gva, T::SIZE, segment)?;
        let asserts_bus_lock = lock
            && splits_line(gva, T::SIZE)
            && self.secondary(SecondaryControls::BUS_LOCK_DETECTION);
        if asserts_bus_lock && !self.alone {
            return Err(self.stop_with(Cause::Alone));
        }
        self.bus_lock = asserts_bus_lock;
        if crosses(gva, T::SIZE) {
            return self.modify_split(gva, lock, compute);
        }
        let mut seen = [0u64; 2];
        let mut compute = |old: T| {
            let (new, result) = compute(old);
            seen = [old.into(), new.into()];
            (new, result)
        };
        let result = match self.resolve_cached(gva, access)? {
            Place::Ram { hva } => {
                // SAFETY: `resolve` returns addresses of guest memory only.
                match unsafe { modify_host(hva, lock, &mut compute) } {
                    Ok(result) => {
                        self.wrote(hva, T::SIZE);
                        result
                    }
                    Err(HostFault) => return Err(self.host_fault(gva, access)),
                }
            }
            Place::Bus { gpa } => {
                let mut bytes = [0; 8];
                self.bus_read(gpa, &mut bytes[..T::SIZE])?;
                loop {
                    let (value, result) = compute(T::from_first(bytes));
                    let value: u64 = value.into();
                    let (old, new) = (&mut bytes[..T::SIZE], &value.to_le_bytes()[..T::SIZE]);
                    if !lock {
                        self.bus_write(gpa, new)?;
                    } else if !self.bus_exchange(gpa, old, new)? {
                        continue;
                    }
                    break result;
                }
            }
            Place::Apic { offset } => {
                let mut bytes = [0; 8];
                self.apic_read(offset, &mut bytes[..T::SIZE])?;
                let (value, result) = compute(T::from_first(bytes));
                let value: u64 = value.into();
                self.apic_write(offset, &value.to_le_bytes()[..T::SIZE])?;
                result
            }
        };
        for (value, write) in seen.into_iter().zip([false, true]) {
            self.observe_access(gva, &value.to_le_bytes()[..T::SIZE], write);
        }
        Ok(result)
    }

    /// An access across two pages. A locked one is atomic with respect to other such accesses only.
    fn modify_split<T: Int, R>(
        &mut self,
        gva: u64,
        lock: bool,
        mut compute: impl FnMut(T) -> (T, R),
    ) -> Result<R, Stop> {
        let access = self.data_access(Access::WRITE);
        let machine = self.machine.clone();
        let _guard = lock.then(|| machine.split_lock());
        let mut bytes = [0; 8];
        let places = self.resolve_split(gva, T::SIZE, access)?;
        self.transfer_in(gva, &places, &mut bytes[..T::SIZE], access)?;
        let (value, result) = compute(T::from_first(bytes));
        let value: u64 = value.into();
        self.transfer_out(gva, &places, &value.to_le_bytes()[..T::SIZE])?;
        Ok(result)
    }
}

/// Whether `len` bytes at `gva` touch two cache lines.
#[inline(always)]
fn splits_line(gva: u64, len: usize) -> bool {
    (gva & 63) as usize + len > 64
}

/// # Safety
/// As for [`crate::host::HostInt::store`].
#[inline(always)]
unsafe fn modify_host<T: Int, R>(
    hva: u64,
    lock: bool,
    compute: &mut impl FnMut(T) -> (T, R),
) -> Result<R, HostFault> {
    // SAFETY: as promised by the caller.
    unsafe {
        let mut old = T::load(hva)?;
        loop {
            let (new, result) = compute(old);
            if !lock {
                T::store(hva, new)?;
                return Ok(result);
            }
            let found = T::compare_exchange(hva, old, new)?;
            if found == old {
                return Ok(result);
            }
            old = found;
        }
    }
}
