//! Arguments of ioctls: memory at addresses that the caller claims.
//!
//! The kernel copies from and to user space and answers EFAULT for an address that is not there.
//! So does this, by having the kernel do the copy.

use crate::error::{Result, fail};

/// Types whose every bit pattern is a value, and which may be copied byte by byte.
///
/// # Safety
///
/// Implementors are plain data.
pub(super) unsafe trait Plain: Copy {}

macro_rules! plain {
    ($($type:ty),* $(,)?) => {
        $(
            // SAFETY: a structure of integers, or of unions and arrays of them.
            unsafe impl Plain for $type {}
        )*
    };
}

use kvm_bindings::*;
plain!(
    u8,
    u32,
    u64,
    kvm_clear_dirty_log,
    kvm_tpr_access_ctl,
    kvm_vapic_addr,
    kvm_clock_data,
    kvm_coalesced_mmio_zone,
    kvm_cpuid_entry,
    kvm_cpuid_entry2,
    kvm_debugregs,
    kvm_device_attr,
    kvm_create_device,
    kvm_dirty_log,
    kvm_enable_cap,
    kvm_fpu,
    kvm_guest_debug,
    kvm_interrupt,
    kvm_ioeventfd,
    kvm_irq_level,
    kvm_irq_routing_entry,
    kvm_irqchip,
    kvm_irqfd,
    kvm_lapic_state,
    kvm_mp_state,
    kvm_msi,
    kvm_msr_entry,
    kvm_msr_filter,
    kvm_pit_config,
    kvm_pit_state,
    kvm_pit_state2,
    kvm_regs,
    kvm_reinject_control,
    kvm_sregs,
    kvm_sregs2,
    kvm_translation,
    kvm_userspace_memory_region,
    kvm_userspace_memory_region2,
    kvm_vcpu_events,
    kvm_x86_mce,
    kvm_xcrs,
    [u32; 2],
    [u32; 1024],
    crate::traps::AccessBytes,
);

fn transfer(here: *mut u8, there: u64, length: usize, read: bool) -> Result<()> {
    if length == 0 {
        return Ok(());
    }
    let local = libc::iovec {
        iov_base: here.cast(),
        iov_len: length,
    };
    let remote = libc::iovec {
        iov_base: there as *mut libc::c_void,
        iov_len: length,
    };
    // SAFETY: `here` is valid for `length` bytes (the callers' slices); the kernel checks the
    // remote range, which may be anything.
    let done = unsafe {
        let own = libc::getpid();
        if read {
            libc::process_vm_readv(own, &local, 1, &remote, 1, 0)
        } else {
            libc::process_vm_writev(own, &local, 1, &remote, 1, 0)
        }
    };
    if done == length as isize {
        Ok(())
    } else {
        fail(libc::EFAULT)
    }
}

/// Reads a value.
pub(super) fn read<T: Plain>(address: u64) -> Result<T> {
    let mut value = std::mem::MaybeUninit::<T>::uninit();
    transfer(value.as_mut_ptr().cast(), address, size_of::<T>(), true)?;
    // SAFETY: all bytes were copied in, and any bytes are a value of a plain type.
    Ok(unsafe { value.assume_init() })
}

/// Writes a value.
pub(super) fn write<T: Plain>(address: u64, value: &T) -> Result<()> {
    transfer(
        std::ptr::from_ref(value).cast_mut().cast(),
        address,
        size_of::<T>(),
        false,
    )
}

/// Reads `count` values.
pub(super) fn read_array<T: Plain>(address: u64, count: usize) -> Result<Vec<T>> {
    let mut values = Vec::<T>::with_capacity(count);
    transfer(
        values.as_mut_ptr().cast(),
        address,
        size_of::<T>() * count,
        true,
    )?;
    // SAFETY: that many elements were copied in, and any bytes are values of a plain type.
    unsafe { values.set_len(count) };
    Ok(values)
}

/// Writes values.
pub(super) fn write_array<T: Plain>(address: u64, values: &[T]) -> Result<()> {
    transfer(
        values.as_ptr().cast_mut().cast(),
        address,
        size_of_val(values),
        false,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_addresses_are_errors() {
        assert_eq!(read::<u64>(0).unwrap_err().errno(), libc::EFAULT);
        assert_eq!(write(0x10, &5u32).unwrap_err().errno(), libc::EFAULT);
        assert_eq!(read::<u64>(u64::MAX - 3).unwrap_err().errno(), libc::EFAULT);
        let value = 0x1234_5678_u64;
        let address = &raw const value as u64;
        assert_eq!(read::<u32>(address).unwrap(), 0x1234_5678);
        let constant: &'static str = "text";
        let written = write(constant.as_ptr() as u64, &0u8);
        assert_eq!(written.unwrap_err().errno(), libc::EFAULT);
    }
}
