//! Methods of `kvm-ioctls` for what this KVM does not have, or has under another name. They answer
//! as a KVM without the feature does, so that a VMM that knows how to go on without it compiles and
//! goes on.
//!
//! Not here, because a VM and a vCPU are no descriptors: what makes them from one or gives theirs
//! (`open_with_cloexec`, `create_vmfd_from_rawfd`, `create_vcpu_from_rawfd`, `AsRawFd`).

use super::{Kvm, VcpuFd, VmFd};
use crate::error::{Result, fail};
use kvm_bindings::nested::KvmNestedStateBuffer;
use kvm_bindings::*;
use std::convert::Infallible;
use std::ffi::CStr;
use std::num::NonZeroUsize;
use std::os::fd::RawFd;

/// A device that KVM plays. There is none that is made by [`VmFd::create_device`].
#[derive(Debug)]
pub struct DeviceFd(Infallible);

impl DeviceFd {
    /// KVM_HAS_DEVICE_ATTR.
    pub fn has_device_attr(&self, _attribute: &kvm_device_attr) -> Result<()> {
        match self.0 {}
    }

    /// KVM_SET_DEVICE_ATTR.
    pub fn set_device_attr(&self, _attribute: &kvm_device_attr) -> Result<()> {
        match self.0 {}
    }
}

impl Kvm {
    /// KVM by the path of its device. Only `/dev/kvm` is Eptide's, and it need not exist; another
    /// path gives `ENOENT`.
    pub fn new_with_path<P: AsRef<CStr>>(path: P) -> Result<Kvm> {
        match path.as_ref() == c"/dev/kvm" {
            true => Kvm::new(),
            false => fail(libc::ENOENT),
        }
    }
}

impl VmFd {
    /// KVM_CREATE_DEVICE: `ENODEV`, as in a KVM without VFIO.
    pub fn create_device(&self, _device: &mut kvm_create_device) -> Result<DeviceFd> {
        fail(libc::ENODEV)
    }

    /// KVM_SET_USER_MEMORY_REGION2. Guest memory descriptors are refused with `EINVAL`.
    ///
    /// # Safety
    ///
    /// As for [`VmFd::set_user_memory_region`].
    pub unsafe fn set_user_memory_region2(
        &self,
        region: kvm_userspace_memory_region2,
    ) -> Result<()> {
        if region.flags & KVM_MEM_GUEST_MEMFD != 0 {
            return fail(libc::EINVAL);
        }
        let region = kvm_userspace_memory_region {
            slot: region.slot,
            flags: region.flags,
            guest_phys_addr: region.guest_phys_addr,
            memory_size: region.memory_size,
            userspace_addr: region.userspace_addr,
        };
        // SAFETY: the caller's promise.
        unsafe { self.set_user_memory_region(region) }
    }

    /// KVM_CREATE_GUEST_MEMFD: `ENOTTY`.
    pub fn create_guest_memfd(&self, _memory: kvm_create_guest_memfd) -> Result<RawFd> {
        fail(libc::ENOTTY)
    }

    /// KVM_SET_MEMORY_ATTRIBUTES: `ENOTTY`.
    pub fn set_memory_attributes(&self, _attributes: kvm_memory_attributes) -> Result<()> {
        fail(libc::ENOTTY)
    }

    /// KVM_MEMORY_ENCRYPT_REG_REGION: `ENOTTY`.
    pub fn register_enc_memory_region(&self, _region: &kvm_enc_region) -> Result<()> {
        fail(libc::ENOTTY)
    }

    /// KVM_MEMORY_ENCRYPT_UNREG_REGION: `ENOTTY`.
    pub fn unregister_enc_memory_region(&self, _region: &kvm_enc_region) -> Result<()> {
        fail(libc::ENOTTY)
    }

    /// KVM_MEMORY_ENCRYPT_OP: `ENOTTY`.
    pub fn encrypt_op_sev(&self, _command: &mut kvm_sev_cmd) -> Result<()> {
        fail(libc::ENOTTY)
    }
}

impl VcpuFd {
    /// KVM_GET_XSAVE2: as KVM_GET_XSAVE, because no offered component needs more room.
    ///
    /// # Safety
    ///
    /// None is needed here; the method is unsafe in `kvm-ioctls`.
    pub unsafe fn get_xsave2(&self, xsave: &mut Xsave) -> Result<()> {
        let found = self.get_xsave()?;
        // SAFETY: the length of the part behind the region is left as it is.
        unsafe { xsave.as_mut_fam_struct() }.xsave.region = found.region;
        Ok(())
    }

    /// KVM_SET_XSAVE with what KVM_GET_XSAVE2 gave.
    ///
    /// # Safety
    ///
    /// As for [`VcpuFd::set_xsave`].
    pub unsafe fn set_xsave2(&self, xsave: &Xsave) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.set_xsave(&xsave.as_fam_struct_ref().xsave) }
    }

    /// KVM_GET_NESTED_STATE: `ENOTTY`.
    pub fn nested_state(&self, _buffer: &mut KvmNestedStateBuffer) -> Result<Option<NonZeroUsize>> {
        fail(libc::ENOTTY)
    }

    /// KVM_SET_NESTED_STATE: `ENOTTY`.
    pub fn set_nested_state(&self, _state: &KvmNestedStateBuffer) -> Result<()> {
        fail(libc::ENOTTY)
    }

    /// KVM_HAS_DEVICE_ATTR: whether an attribute exists; that is the offset of the time-stamp
    /// counter (KVM_VCPU_TSC_OFFSET).
    pub fn has_device_attr(&self, attribute: &kvm_device_attr) -> Result<()> {
        let is_known = attribute.group == KVM_VCPU_TSC_CTRL
            && attribute.attr == u64::from(KVM_VCPU_TSC_OFFSET)
            && attribute.flags == 0;
        if is_known { Ok(()) } else { fail(libc::ENXIO) }
    }
}
