//! The VM object.

use super::{Cap, VcpuFd};
use crate::capabilities;
use crate::error::{Error, Result, fail};
use crate::mailbox::Request;
use crate::msr_filter::{MsrFilter, Range};
use crate::run_area::RUN_SIZE;
use crate::traps::{ACCESS_TRAP_EXECUTION, AccessBytes};
use crate::vm::{MAX_VCPU_ID, Vm, slot_number};
use arch::addr::Gfn;
use bitflags::bitflags;
use kvm_bindings::*;
use mmu::DirtyLogError;
use std::os::fd::{AsRawFd, RawFd};
use std::os::raw::{c_int, c_ulong};
use std::sync::Arc;
use vmm_sys_util::eventfd::EventFd;

/// An address of port I/O or of memory.
#[derive(Clone, Copy, Debug)]
pub enum IoEventAddress {
    /// A port.
    Pio(u64),
    /// A guest-physical address.
    Mmio(u64),
}

/// No datamatch: [`VmFd::register_ioevent`] matches a write of any length and value.
#[derive(Clone, Copy, Debug)]
pub struct NoDatamatch;

impl From<NoDatamatch> for u64 {
    fn from(_: NoDatamatch) -> u64 {
        0
    }
}

bitflags! {
    /// Which accesses a range of an MSR filter is about.
    #[derive(Clone, Copy, Debug, Eq, PartialEq)]
    pub struct MsrFilterRangeFlags: u32 {
        /// Reads.
        const READ = KVM_MSR_FILTER_READ;
        /// Writes.
        const WRITE = KVM_MSR_FILTER_WRITE;
    }
}

/// What holds for MSRs that no range of a filter names.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u32)]
pub enum MsrFilterDefaultAction {
    /// They are allowed.
    ALLOW = KVM_MSR_FILTER_DEFAULT_ALLOW,
    /// They are denied.
    DENY = KVM_MSR_FILTER_DEFAULT_DENY,
}

/// One range of an MSR filter.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct MsrFilterRange<'a> {
    /// Which accesses it is about.
    pub flags: MsrFilterRangeFlags,
    /// First MSR.
    pub base: u32,
    /// Number of MSRs.
    pub msr_count: u32,
    /// One bit per MSR: set allows.
    pub bitmap: &'a [u8],
}

/// A virtual machine. It lives as long as this or any of its vCPUs does.
#[derive(Debug)]
pub struct VmFd {
    vm: Arc<Vm>,
}

impl AsRawFd for VmFd {
    fn as_raw_fd(&self) -> RawFd {
        self.vm.fd.fd().as_raw_fd()
    }
}

impl VmFd {
    pub(crate) fn new(vm: Arc<Vm>) -> VmFd {
        VmFd { vm }
    }

    /// KVM_SET_USER_MEMORY_REGION.
    ///
    /// # Safety
    ///
    /// The guest reads and writes the memory at `userspace_addr` as long as the slot exists; the
    /// caller must not use it in ways that such changes make undefined.
    pub unsafe fn set_user_memory_region(
        &self,
        user_memory_region: kvm_userspace_memory_region,
    ) -> Result<()> {
        self.vm.set_memory_region(&user_memory_region)
    }

    /// KVM_SET_NR_MMU_PAGES: the greatest number of pages for page tables that the MMU makes.
    pub fn set_nr_mmu_pages(&self, pages: u64) -> Result<()> {
        self.vm.set_max_mmu_pages(pages)
    }

    /// KVM_GET_NR_MMU_PAGES.
    pub fn get_nr_mmu_pages(&self) -> u64 {
        self.vm.max_mmu_pages()
    }

    /// KVM_SET_TSS_ADDR.
    pub fn set_tss_address(&self, offset: usize) -> Result<()> {
        self.vm.set_tss_address(offset as u64)
    }

    /// KVM_SET_IDENTITY_MAP_ADDR.
    pub fn set_identity_map_address(&self, address: u64) -> Result<()> {
        self.vm.set_identity_map(address)
    }

    /// KVM_CREATE_IRQCHIP.
    pub fn create_irq_chip(&self) -> Result<()> {
        self.vm.create_irqchip()
    }

    /// KVM_GET_IRQCHIP.
    pub fn get_irqchip(&self, irqchip: &mut kvm_irqchip) -> Result<()> {
        self.vm.full_irqchip()?.state(irqchip)
    }

    /// KVM_SET_IRQCHIP.
    pub fn set_irqchip(&self, irqchip: &kvm_irqchip) -> Result<()> {
        self.vm.full_irqchip()?.set_state(irqchip)
    }

    /// KVM_CREATE_PIT2.
    pub fn create_pit2(&self, pit_config: kvm_pit_config) -> Result<()> {
        self.vm.create_pit(&pit_config)
    }

    /// KVM_GET_PIT2.
    pub fn get_pit2(&self) -> Result<kvm_pit_state2> {
        let pit = self
            .vm
            .full_irqchip()?
            .pit()
            .ok_or(Error::new(libc::ENXIO))?;
        Ok(pit.lock().state())
    }

    /// KVM_SET_PIT2.
    pub fn set_pit2(&self, pitstate: &kvm_pit_state2) -> Result<()> {
        let pit = self
            .vm
            .full_irqchip()?
            .pit()
            .ok_or(Error::new(libc::ENXIO))?;
        pit.set_state(pitstate);
        Ok(())
    }

    /// KVM_REINJECT_CONTROL.
    pub fn reinject_control(&self, control: &kvm_reinject_control) -> Result<()> {
        let pit = self
            .vm
            .full_irqchip()?
            .pit()
            .ok_or(Error::new(libc::ENXIO))?;
        pit.lock().set_reinject(control.pit_reinject != 0);
        Ok(())
    }

    /// KVM_GET_CLOCK.
    pub fn get_clock(&self) -> Result<kvm_clock_data> {
        Ok(self.vm.clock_data())
    }

    /// KVM_SET_CLOCK.
    pub fn set_clock(&self, clock: &kvm_clock_data) -> Result<()> {
        self.vm.set_clock(clock)
    }

    /// KVM_X86_SET_MSR_FILTER.
    pub fn set_msr_filter(
        &self,
        default_action: MsrFilterDefaultAction,
        ranges: &[MsrFilterRange<'_>],
    ) -> Result<()> {
        if ranges.len() > KVM_MSR_FILTER_MAX_RANGES as usize {
            return fail(libc::ENOMEM);
        }
        let ranges = ranges.iter().map(|range| Range {
            flags: range.flags.bits(),
            base: range.base,
            count: range.msr_count,
            bitmap: range.bitmap.to_vec(),
        });
        self.install_msr_filter(default_action as u32, ranges.collect())
    }

    /// KVM_SIGNAL_MSI: how many processors took it.
    pub fn signal_msi(&self, msi: kvm_msi) -> Result<c_int> {
        self.vm.signal_msi(&msi)
    }

    /// KVM_SET_GSI_ROUTING.
    pub fn set_gsi_routing(&self, irq_routing: &KvmIrqRouting) -> Result<()> {
        let flags = irq_routing.as_fam_struct_ref().flags;
        self.vm.set_routing(flags, irq_routing.as_slice())
    }

    /// KVM_IOEVENTFD: `fd` is signalled when the guest writes `datamatch` (with its type's
    /// length) to `addr`, or anything with [`NoDatamatch`].
    pub fn register_ioevent<T: Into<u64>>(
        &self,
        fd: &EventFd,
        addr: &IoEventAddress,
        datamatch: T,
    ) -> Result<()> {
        self.vm.ioeventfds.apply(&ioevent(fd, addr, datamatch, 0))
    }

    /// Undoes [`VmFd::register_ioevent`].
    pub fn unregister_ioevent<T: Into<u64>>(
        &self,
        fd: &EventFd,
        addr: &IoEventAddress,
        datamatch: T,
    ) -> Result<()> {
        let flags = 1 << kvm_ioeventfd_flag_nr_deassign;
        self.vm
            .ioeventfds
            .apply(&ioevent(fd, addr, datamatch, flags))
    }

    /// Rings and bitmaps exclude each other.
    pub(crate) fn check_bitmaps(&self) -> Result<()> {
        if self.vm.settings().dirty_ring != 0 {
            return fail(libc::ENXIO);
        }
        Ok(())
    }

    /// KVM_GET_DIRTY_LOG.
    pub fn get_dirty_log(&self, slot: u32, memory_size: usize) -> Result<Vec<u64>> {
        let (space, number) = slot_number(slot)?;
        self.check_bitmaps()?;
        if self.vm.logs_pages() {
            self.vm.mmu.synchronize();
        }
        let pages = memory_size.div_ceil(4096);
        let mut bitmap = vec![0; pages.div_ceil(64)];
        let manual = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE as u64;
        let taken = if self.vm.settings().manual_dirty_log & manual != 0 {
            self.vm.mmu.dirty_log_keep(space, number, &mut bitmap)
        } else {
            self.vm.mmu.dirty_log(space, number, &mut bitmap)
        };
        taken.map_err(dirty_log_error)?;
        Ok(bitmap)
    }

    /// KVM_GET_STATS_FD: the MMU's counters.
    pub fn get_stats_fd(&self) -> Result<std::os::fd::OwnedFd> {
        self.vm.stats_descriptor()
    }

    /// KVM_RESET_DIRTY_RINGS: how many pages user space had collected from the rings.
    pub fn reset_dirty_rings(&self) -> Result<i32> {
        self.vm.reset_dirty_rings()
    }

    /// KVM_CLEAR_DIRTY_LOG.
    pub fn clear_dirty_log(
        &self,
        slot: u32,
        first_page: u64,
        num_pages: u32,
        bitmap: &[u64],
    ) -> Result<()> {
        let (space, number) = slot_number(slot)?;
        self.check_bitmaps()?;
        let cleared =
            self.vm
                .mmu
                .clear_dirty_log(space, number, first_page, num_pages as u64, bitmap);
        cleared.map_err(dirty_log_error)
    }

    /// KVM_IRQFD.
    pub fn register_irqfd(&self, fd: &EventFd, gsi: u32) -> Result<()> {
        self.vm.irqfd(&kvm_irqfd {
            fd: fd.as_raw_fd() as u32,
            gsi,
            ..Default::default()
        })
    }

    /// KVM_IRQFD with a resample descriptor, for level-triggered interrupts.
    pub fn register_irqfd_with_resample(
        &self,
        fd: &EventFd,
        resamplefd: &EventFd,
        gsi: u32,
    ) -> Result<()> {
        self.vm.irqfd(&kvm_irqfd {
            fd: fd.as_raw_fd() as u32,
            resamplefd: resamplefd.as_raw_fd() as u32,
            gsi,
            flags: KVM_IRQFD_FLAG_RESAMPLE,
            ..Default::default()
        })
    }

    /// Undoes [`VmFd::register_irqfd`].
    pub fn unregister_irqfd(&self, fd: &EventFd, gsi: u32) -> Result<()> {
        self.vm.irqfd(&kvm_irqfd {
            fd: fd.as_raw_fd() as u32,
            gsi,
            flags: KVM_IRQFD_FLAG_DEASSIGN,
            ..Default::default()
        })
    }

    /// KVM_IRQ_LINE.
    pub fn set_irq_line(&self, irq: u32, active: bool) -> Result<()> {
        self.vm.set_irq_line(irq, active).map(drop)
    }

    /// KVM_IRQ_LINE_STATUS: -1 if nobody took it, 0 if it merged with one that was pending, else
    /// how many took it.
    pub fn set_irq_line_status(&self, irq: u32, active: bool) -> Result<i32> {
        self.vm.set_irq_line(irq, active)
    }

    /// KVM_CREATE_VCPU.
    pub fn create_vcpu(&self, id: u64) -> Result<VcpuFd> {
        let vcpu = self.vm.create_vcpu(id)?;
        crate::watch::add(Arc::downgrade(&vcpu));
        Ok(VcpuFd::new(vcpu))
    }

    /// KVM_ENABLE_CAP.
    pub fn enable_cap(&self, cap: &kvm_enable_cap) -> Result<()> {
        capabilities::enable(&self.vm, cap)
    }

    /// KVM_SET_BOOT_CPU_ID. Only before the first vCPU.
    pub fn set_boot_cpu_id(&self, id: u32) -> Result<()> {
        if self.vm.has_vcpus() {
            return fail(libc::EBUSY);
        }
        if id > self.vm.settings().max_vcpu_id.unwrap_or(MAX_VCPU_ID) {
            return fail(libc::EINVAL);
        }
        self.vm.update_settings(|settings| settings.boot_vcpu = id);
        Ok(())
    }

    /// Size of a vCPU's shared memory.
    pub fn run_size(&self) -> usize {
        RUN_SIZE
    }

    /// KVM_CHECK_EXTENSION.
    pub fn check_extension_int(&self, c: Cap) -> i32 {
        capabilities::check(c as u32)
    }

    /// KVM_CHECK_EXTENSION by number.
    pub fn check_extension_raw(&self, c: c_ulong) -> i32 {
        u32::try_from(c).map_or(0, capabilities::check)
    }

    /// Whether a capability is present.
    pub fn check_extension(&self, c: Cap) -> bool {
        self.check_extension_int(c) > 0
    }

    /// KVM_REGISTER_COALESCED_MMIO.
    pub fn register_coalesced_mmio(&self, addr: IoEventAddress, size: u32) -> Result<()> {
        self.vm.coalesced.register(&zone(addr, size))
    }

    /// KVM_UNREGISTER_COALESCED_MMIO.
    pub fn unregister_coalesced_mmio(&self, addr: IoEventAddress, size: u32) -> Result<()> {
        self.vm.coalesced.unregister(&zone(addr, size))
    }

    /// KVM_SET_TSC_KHZ on the VM: the frequency of vCPUs created from now on.
    pub fn set_tsc_khz(&self, khz: u32) -> Result<()> {
        if self.vm.has_vcpus() {
            return fail(libc::EINVAL);
        }
        self.vm.set_default_tsc_khz(khz as u64);
        Ok(())
    }

    /// KVM_GET_TSC_KHZ on the VM.
    pub fn get_tsc_khz(&self) -> Result<u32> {
        Ok(self.vm.default_tsc_khz() as u32)
    }

    /// Eptide's own: flags guest frames `first..first + count` so that executing from them ends
    /// KVM_RUN with [`crate::KVM_EXIT_EMULATE`], or takes the flag away. In force before the next
    /// instruction of any vCPU. Frames in no memslot are ENOENT, with nothing changed.
    ///
    /// The flags are the memslot's: they move with it and go with it.
    pub fn set_execution_traps(&self, first: u64, count: u64, trapped: bool) -> Result<()> {
        let end = first.checked_add(count).ok_or(Error::new(libc::EINVAL))?;
        let range = Gfn::new(first)..Gfn::new(end);
        let space = mmu::AddressSpace::Normal;
        self.vm
            .mmu
            .set_execution_traps(space, range, trapped)
            .map_err(|_| Error::new(libc::ENOENT))
    }

    /// Eptide's own: the access bytes of a range of guest frames:
    /// [`crate::ACCESS_TRAP_EXECUTION`] or 0.
    pub fn execution_traps(&self, first: u64, count: u64) -> Result<Vec<u8>> {
        let count = AccessBytes {
            first_gfn: first,
            count,
            access: 0,
        }
        .checked_count()? as u64;
        let space = mmu::AddressSpace::Normal;
        let byte = |gfn| {
            let trapped = self.vm.mmu.has_execution_trap(space, Gfn::new(gfn));
            if trapped { ACCESS_TRAP_EXECUTION } else { 0 }
        };
        Ok((first..first + count).map(byte).collect())
    }

    /// Eptide's own: sets the access bytes of consecutive guest frames from `first` on.
    pub fn set_access_bytes(&self, first: u64, bytes: &[u8]) -> Result<()> {
        if bytes.iter().any(|&byte| byte & !ACCESS_TRAP_EXECUTION != 0) {
            return fail(libc::EINVAL);
        }
        // All frames have a slot, or nothing is changed.
        let end = first.checked_add(bytes.len() as u64);
        let end = end.ok_or(Error::new(libc::EINVAL))?;
        let slots = self.vm.mmu.slots();
        let mut at = first;
        while at < end {
            let slot = slots.find(mmu::AddressSpace::Normal, Gfn::new(at));
            at = slot.ok_or(Error::new(libc::ENOENT))?.gfns().end.get();
        }
        drop(slots);
        let mut at = first;
        for run in bytes.chunk_by(|a, b| a == b) {
            self.set_execution_traps(at, run.len() as u64, run[0] != 0)?;
            at += run.len() as u64;
        }
        Ok(())
    }

    pub(crate) fn inner(&self) -> &Arc<Vm> {
        &self.vm
    }

    /// Pages of a slot that exists.
    pub(crate) fn slot_pages(&self, slot: u32) -> Result<u64> {
        let (space, number) = slot_number(slot)?;
        let slots = self.vm.mmu.slots();
        let slot = slots.get(mmu::SlotId { space, number });
        slot.map(|slot| slot.pages())
            .ok_or(Error::new(libc::ENOENT))
    }

    pub(crate) fn install_msr_filter(&self, flags: u32, ranges: Vec<Range>) -> Result<()> {
        let filter = MsrFilter::new(flags, ranges)?.map(Arc::new);
        self.vm
            .update_settings(|settings| settings.msr_filter = filter.clone());
        self.vm.processors.post_all(Request::MSR_FILTER);
        Ok(())
    }

    /// Eptide's own: the MMU's counters, by name.
    pub fn mmu_statistics(&self) -> Vec<(&'static str, u64)> {
        self.vm.mmu.stats().iter().collect()
    }
}

fn ioevent<T: Into<u64>>(
    fd: &EventFd,
    addr: &IoEventAddress,
    datamatch: T,
    flags: u32,
) -> kvm_ioeventfd {
    let length = size_of::<T>() as u32;
    let mut flags = flags;
    if length > 0 {
        flags |= 1 << kvm_ioeventfd_flag_nr_datamatch;
    }
    let address = match *addr {
        IoEventAddress::Pio(port) => {
            flags |= 1 << kvm_ioeventfd_flag_nr_pio;
            port
        }
        IoEventAddress::Mmio(gpa) => gpa,
    };
    kvm_ioeventfd {
        datamatch: datamatch.into(),
        addr: address,
        len: length,
        fd: fd.as_raw_fd(),
        flags,
        ..Default::default()
    }
}

fn zone(addr: IoEventAddress, size: u32) -> kvm_coalesced_mmio_zone {
    let (address, pio) = match addr {
        IoEventAddress::Pio(port) => (port, 1),
        IoEventAddress::Mmio(gpa) => (gpa, 0),
    };
    kvm_coalesced_mmio_zone {
        addr: address,
        size,
        __bindgen_anon_1: kvm_coalesced_mmio_zone__bindgen_ty_1 { pio },
    }
}

fn dirty_log_error(error: DirtyLogError) -> Error {
    Error::new(match error {
        DirtyLogError::NotLogged(_) => libc::ENOENT,
        DirtyLogError::ShortBitmap { .. } => libc::EFAULT,
        _ => libc::EINVAL,
    })
}
