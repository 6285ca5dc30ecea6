//! The vCPU object.

use super::exit::VcpuExit;
use crate::cpuid::{Table, supported_xcr0, xsave_size};
use crate::error::{Error, Result, fail};
use crate::irqchip::lapic::LocalApic;
use crate::mailbox::{Mailbox, Request};
use crate::msrs::Access;
use crate::vcpu::{Core, Vcpu};
use kvm_bindings::*;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

/// Registers that KVM_CAP_SYNC_REGS carries in `kvm_run`.
#[derive(Clone, Copy, Debug)]
#[repr(u32)]
pub enum SyncReg {
    /// General-purpose registers.
    Register = KVM_SYNC_X86_REGS,
    /// System registers.
    SystemRegister = KVM_SYNC_X86_SREGS,
    /// Events.
    VcpuEvents = KVM_SYNC_X86_EVENTS,
}

/// A virtual processor.
#[derive(Debug)]
pub struct VcpuFd {
    pub(super) vcpu: Arc<Vcpu>,
    has_coalesced_ring: bool,
}

impl AsRawFd for VcpuFd {
    fn as_raw_fd(&self) -> RawFd {
        self.vcpu.run_area().fd().as_raw_fd()
    }
}

/// Eptide's own: ends a vCPU's KVM_RUN with EINTR from any thread or signal handler, as a signal
/// to its thread does in the kernel. One interruption ends the run in progress or the next one.
#[derive(Clone)]
pub struct Interrupter(Arc<Mailbox>);

impl Interrupter {
    /// Interrupts. Async-signal-safe.
    pub fn interrupt(&self) {
        self.0.post(Request::INTERRUPT_RUN);
    }
}

impl std::fmt::Debug for Interrupter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Interrupter")
    }
}

impl VcpuFd {
    pub(crate) fn new(vcpu: Arc<Vcpu>) -> VcpuFd {
        VcpuFd {
            vcpu,
            has_coalesced_ring: false,
        }
    }

    fn core(&self) -> Result<std::sync::MutexGuard<'_, Core>> {
        self.vcpu.vm().check_alive()?;
        Ok(self.vcpu.lock())
    }

    fn apic(&self) -> Result<&Arc<LocalApic>> {
        self.vcpu.apic().ok_or(Error::new(libc::EINVAL))
    }

    /// Eptide's own: the file of the ring of coalesced writes, whose first page belongs at the third
    /// page of every mapping of the vCPU's file.
    pub fn coalesced_ring(&self) -> RawFd {
        self.vcpu.vm().coalesced.memory().fd().as_raw_fd()
    }

    /// Eptide's own: the pages of the vCPU's file that are its dirty ring. A mapping of them is
    /// shared and not executable; others are refused where mmap goes through a program's hands.
    pub fn dirty_ring_pages(&self) -> std::ops::Range<usize> {
        let first = crate::run_area::DIRTY_RING_PAGE;
        let bytes = self.vcpu.dirty_ring().map_or(0, |ring| ring.bytes());
        first..first + bytes / crate::run_area::PAGE
    }

    /// Eptide's own: a handle that ends this vCPU's KVM_RUN.
    pub fn interrupter(&self) -> Interrupter {
        Interrupter(self.vcpu.shared_mailbox())
    }

    /// KVM_GET_REGS.
    pub fn get_regs(&self) -> Result<kvm_regs> {
        Ok(self.core()?.regs())
    }

    /// KVM_SET_REGS.
    pub fn set_regs(&self, regs: &kvm_regs) -> Result<()> {
        self.core()?.set_regs(regs);
        Ok(())
    }

    /// KVM_GET_SREGS.
    pub fn get_sregs(&self) -> Result<kvm_sregs> {
        Ok(self.core()?.sregs(&self.vcpu))
    }

    /// KVM_SET_SREGS.
    pub fn set_sregs(&self, sregs: &kvm_sregs) -> Result<()> {
        self.core()?.set_sregs(&self.vcpu, sregs)
    }

    /// KVM_GET_SREGS2.
    pub fn get_sregs2(&self) -> Result<kvm_sregs2> {
        Ok(self.core()?.sregs2(&self.vcpu))
    }

    /// KVM_SET_SREGS2.
    pub fn set_sregs2(&self, sregs: &kvm_sregs2) -> Result<()> {
        self.core()?.set_sregs2(&self.vcpu, sregs)
    }

    /// KVM_GET_FPU.
    pub fn get_fpu(&self) -> Result<kvm_fpu> {
        Ok(self.core()?.fpu())
    }

    /// KVM_SET_FPU.
    pub fn set_fpu(&self, fpu: &kvm_fpu) -> Result<()> {
        self.core()?.set_fpu(fpu);
        Ok(())
    }

    /// KVM_SET_CPUID2.
    pub fn set_cpuid2(&self, cpuid: &CpuId) -> Result<()> {
        self.set_cpuid_entries(cpuid.as_slice())
    }

    pub(crate) fn set_cpuid_entries(&self, entries: &[kvm_cpuid_entry2]) -> Result<()> {
        let mut core = self.core()?;
        let table = Table::new(entries);
        // What a running guest was told does not change under it.
        if core.has_run {
            let dynamic = core.dynamic_cpuid(&self.vcpu);
            if core.cpuid.entries(&dynamic) != table.entries(&dynamic) {
                return fail(libc::EINVAL);
            }
            return Ok(());
        }
        core.apply_cpuid(table, self.vcpu.vm().has_strict_cpuid);
        Ok(())
    }

    /// KVM_GET_CPUID2.
    pub fn get_cpuid2(&self, num_entries: usize) -> Result<CpuId> {
        super::system::entries(&self.cpuid_entries()?, num_entries)
    }

    pub(crate) fn cpuid_entries(&self) -> Result<Vec<kvm_cpuid_entry2>> {
        let core = self.core()?;
        Ok(core.cpuid.entries(&core.dynamic_cpuid(&self.vcpu)))
    }

    pub(crate) fn inner(&self) -> &Arc<Vcpu> {
        &self.vcpu
    }

    /// KVM_ENABLE_CAP of the vCPU: KVM_CAP_ENFORCE_PV_FEATURE_CPUID.
    pub fn enable_cap(&self, cap: &kvm_enable_cap) -> Result<()> {
        let mut core = self.core()?;
        if cap.flags != 0 || cap.cap != KVM_CAP_ENFORCE_PV_FEATURE_CPUID {
            return fail(libc::EINVAL);
        }
        core.enforces_paravirtual = cap.args[0] != 0;
        Ok(())
    }

    /// KVM_GET_LAPIC.
    pub fn get_lapic(&self) -> Result<kvm_lapic_state> {
        let page = self.apic()?.snapshot();
        let mut state = kvm_lapic_state::default();
        for (bytes, word) in state.regs.chunks_exact_mut(4).zip(page) {
            for (byte, value) in bytes.iter_mut().zip(word.to_le_bytes()) {
                *byte = value as std::os::raw::c_char;
            }
        }
        Ok(state)
    }

    /// KVM_SET_LAPIC.
    pub fn set_lapic(&self, klapic: &kvm_lapic_state) -> Result<()> {
        let mut page = [0; 256];
        for (word, bytes) in page.iter_mut().zip(klapic.regs.chunks_exact(4)) {
            let bytes = [
                bytes[0] as u8,
                bytes[1] as u8,
                bytes[2] as u8,
                bytes[3] as u8,
            ];
            *word = u32::from_le_bytes(bytes);
        }
        let apic = self.apic()?;
        let _core = self.core()?;
        apic.restore(&page).map_err(|_| Error::new(libc::EINVAL))
    }

    /// KVM_GET_MSRS: the number that were read, up to the first that cannot be.
    pub fn get_msrs(&self, msrs: &mut Msrs) -> Result<usize> {
        self.read_msrs(msrs.as_mut_slice())
    }

    /// KVM_SET_MSRS: the number that were written, up to the first that cannot be.
    pub fn set_msrs(&self, msrs: &Msrs) -> Result<usize> {
        self.write_msrs(msrs.as_slice())
    }

    pub(crate) fn read_msrs(&self, entries: &mut [kvm_msr_entry]) -> Result<usize> {
        let mut core = self.core()?;
        let mut read = |entry: &mut kvm_msr_entry| {
            let (vcpu, index) = (&*self.vcpu, entry.index);
            let value = Access {
                core: &mut core,
                vcpu,
                index,
                trusted: true,
            }
            .read()
            .ok()?;
            entry.data = value;
            Some(())
        };
        Ok(entries.iter_mut().map_while(&mut read).count())
    }

    pub(crate) fn write_msrs(&self, entries: &[kvm_msr_entry]) -> Result<usize> {
        let mut core = self.core()?;
        let mut write = |entry: &kvm_msr_entry| {
            let (vcpu, index) = (&*self.vcpu, entry.index);
            Access {
                core: &mut core,
                vcpu,
                index,
                trusted: true,
            }
            .write(entry.data)
            .ok()
        };
        Ok(entries.iter().map_while(&mut write).count())
    }

    /// KVM_GET_STATS_FD: counters of exits and injections.
    pub fn get_stats_fd(&self) -> Result<std::os::fd::OwnedFd> {
        self.core()?.stats_descriptor(&self.vcpu)
    }

    /// KVM_X86_SET_MCE.
    pub fn set_mce(&self, mce: &kvm_x86_mce) -> Result<()> {
        self.core()?.set_mce(mce)
    }

    /// The offset of the guest's counter (KVM_VCPU_TSC_OFFSET).
    pub fn tsc_offset(&self) -> Result<u64> {
        Ok(self.core()?.tsc.offset)
    }

    /// Sets the offset of the guest's counter (KVM_VCPU_TSC_OFFSET).
    pub fn set_tsc_offset(&self, offset: u64) -> Result<()> {
        let mut core = self.core()?;
        let tsc = crate::time::GuestTsc { offset, ..core.tsc };
        core.set_tsc(tsc);
        if let Some(apic) = self.vcpu.apic() {
            apic.tsc_changed(&tsc);
        }
        Ok(())
    }

    pub(crate) fn load_xsave(&self, region: [u32; 1024]) -> Result<()> {
        let xsave = kvm_xsave {
            region,
            ..Default::default()
        };
        self.core()?.set_xsave(&xsave)
    }

    /// KVM_GET_MP_STATE.
    pub fn get_mp_state(&self) -> Result<kvm_mp_state> {
        Ok(self.core()?.mp_state())
    }

    /// KVM_SET_MP_STATE.
    pub fn set_mp_state(&self, mp_state: kvm_mp_state) -> Result<()> {
        self.core()?.set_mp_state(&self.vcpu, &mp_state)
    }

    /// KVM_GET_XSAVE.
    pub fn get_xsave(&self) -> Result<kvm_xsave> {
        Ok(*self.core()?.xsave())
    }

    /// KVM_SET_XSAVE.
    ///
    /// # Safety
    ///
    /// None is needed here; the function is unsafe as in `kvm-ioctls`, whose kernel may read
    /// beyond the structure.
    pub unsafe fn set_xsave(&self, xsave: &kvm_xsave) -> Result<()> {
        self.core()?.set_xsave(xsave)
    }

    /// KVM_GET_XCRS.
    pub fn get_xcrs(&self) -> Result<kvm_xcrs> {
        Ok(self.core()?.xcrs())
    }

    /// KVM_SET_XCRS.
    pub fn set_xcrs(&self, xcrs: &kvm_xcrs) -> Result<()> {
        self.core()?.set_xcrs(xcrs)
    }

    /// KVM_GET_DEBUGREGS.
    pub fn get_debug_regs(&self) -> Result<kvm_debugregs> {
        Ok(self.core()?.debug_registers())
    }

    /// KVM_SET_DEBUGREGS.
    pub fn set_debug_regs(&self, debug_regs: &kvm_debugregs) -> Result<()> {
        self.core()?.set_debug_registers(debug_regs)
    }

    /// KVM_GET_VCPU_EVENTS.
    pub fn get_vcpu_events(&self) -> Result<kvm_vcpu_events> {
        let mut core = self.core()?;
        Ok(core.vcpu_events(&self.vcpu))
    }

    /// KVM_SET_VCPU_EVENTS.
    pub fn set_vcpu_events(&self, vcpu_events: &kvm_vcpu_events) -> Result<()> {
        self.core()?.set_vcpu_events(&self.vcpu, vcpu_events)
    }

    /// KVM_SET_GUEST_DEBUG.
    pub fn set_guest_debug(&self, debug_struct: &kvm_guest_debug) -> Result<()> {
        self.core()?.set_guest_debug(debug_struct)
    }

    /// KVM_KVMCLOCK_CTRL: tells the guest, at its next look at the clock, that it was stopped.
    pub fn kvmclock_ctrl(&self) -> Result<()> {
        let mut core = self.core()?;
        if !core.has_clock_page() {
            return fail(libc::EINVAL);
        }
        core.paravirtual.stopped = true;
        self.vcpu.mailbox().post(Request::CLOCK_UPDATE);
        Ok(())
    }

    /// KVM_GET_TSC_KHZ.
    pub fn get_tsc_khz(&self) -> Result<u32> {
        Ok(self.core()?.tsc.khz as u32)
    }

    /// KVM_SET_TSC_KHZ.
    pub fn set_tsc_khz(&self, freq: u32) -> Result<()> {
        let mut core = self.core()?;
        let scaled = crate::tsc_scaling::scaled(freq as u64);
        // The counter goes on from where it is.
        let host = crate::time::tsc();
        let offset = scaled.offset_for(core.tsc.at(host), host);
        core.set_tsc(crate::time::GuestTsc { offset, ..scaled });
        self.vcpu.mailbox().post(Request::CLOCK_UPDATE);
        Ok(())
    }

    /// KVM_TRANSLATE.
    pub fn translate_gva(&self, gva: u64) -> Result<kvm_translation> {
        Ok(self.core()?.translation(&self.vcpu, gva))
    }

    /// KVM_NMI.
    pub fn nmi(&self) -> Result<()> {
        self.vcpu.vm().check_alive()?;
        self.vcpu.mailbox().send_nmi();
        Ok(())
    }

    /// KVM_SMI.
    pub fn smi(&self) -> Result<()> {
        self.vcpu.vm().check_alive()?;
        self.vcpu.mailbox().post(Request::SMI);
        Ok(())
    }

    /// KVM_INTERRUPT, for a local APIC or an 8259 in user space.
    pub fn interrupt(&self, vector: u32) -> Result<()> {
        self.core()?.queue_interrupt(&self.vcpu, vector)
    }

    /// KVM_TPR_ACCESS_REPORTING: whether accesses to the TPR in the local APIC's register page end
    /// KVM_RUN with KVM_EXIT_TPR_ACCESS.
    pub fn set_tpr_access_reporting(&self, enabled: bool) -> Result<()> {
        self.vcpu.vm().check_alive()?;
        // Without a local APIC in this process there is nothing to report.
        if let Some(apic) = self.vcpu.apic() {
            apic.set_tpr_reporting(enabled);
        }
        Ok(())
    }

    /// KVM_SET_VAPIC_ADDR: where the TPR is kept in memory for the guest; 0 for nowhere.
    pub fn set_vapic_address(&self, gpa: u64) -> Result<()> {
        self.core()?.set_vapic_address(&self.vcpu, gpa)
    }

    /// KVM_X86_SETUP_MCE.
    pub fn setup_mce(&self, mcg_cap: u64) -> Result<()> {
        self.core()?.setup_mce(mcg_cap)
    }

    /// KVM_SET_SIGNAL_MASK: signals outside the mask that are pending end KVM_RUN. Bit n - 1 is
    /// signal n.
    pub fn set_signal_mask(&self, mask: Option<u64>) -> Result<()> {
        self.vcpu.vm().check_alive()?;
        self.vcpu.set_signal_mask(mask);
        Ok(())
    }

    /// `kvm_run`.
    pub fn get_kvm_run(&mut self) -> &mut kvm_run {
        // SAFETY: `self` is borrowed for as long as the reference lives, so KVM_RUN, which alone
        // makes another, is not in progress on this vCPU.
        unsafe { self.vcpu.run_area().get() }
    }

    /// Sets `immediate_exit`.
    pub fn set_kvm_immediate_exit(&mut self, val: u8) {
        self.get_kvm_run().immediate_exit = val;
    }

    /// Asks for registers in `kvm_run` after each exit.
    pub fn set_sync_valid_reg(&mut self, reg: SyncReg) {
        self.get_kvm_run().kvm_valid_regs |= reg as u64;
    }

    /// Has registers in `kvm_run` loaded at the next run.
    pub fn set_sync_dirty_reg(&mut self, reg: SyncReg) {
        self.get_kvm_run().kvm_dirty_regs |= reg as u64;
    }

    /// Undoes [`VcpuFd::set_sync_valid_reg`].
    pub fn clear_sync_valid_reg(&mut self, reg: SyncReg) {
        self.get_kvm_run().kvm_valid_regs &= !(reg as u64);
    }

    /// Undoes [`VcpuFd::set_sync_dirty_reg`].
    pub fn clear_sync_dirty_reg(&mut self, reg: SyncReg) {
        self.get_kvm_run().kvm_dirty_regs &= !(reg as u64);
    }

    /// The registers in `kvm_run`.
    pub fn sync_regs(&self) -> kvm_sync_regs {
        // SAFETY: the area is mapped and larger than `kvm_run`, and any bytes are valid registers.
        unsafe { (&raw const (*self.vcpu.run_area().as_ptr()).s.regs).read() }
    }

    /// The registers in `kvm_run`, to change.
    pub fn sync_regs_mut(&mut self) -> &mut kvm_sync_regs {
        // SAFETY: any bytes are valid registers.
        unsafe { &mut self.get_kvm_run().s.regs }
    }

    /// Makes the ring of coalesced writes available.
    pub fn map_coalesced_mmio_ring(&mut self) -> Result<()> {
        self.has_coalesced_ring = true;
        Ok(())
    }

    /// Takes the oldest coalesced write.
    pub fn coalesced_mmio_read(&mut self) -> Result<Option<kvm_coalesced_mmio>> {
        if !self.has_coalesced_ring {
            return fail(libc::EIO);
        }
        Ok(self.vcpu.vm().coalesced.pop())
    }

    /// Eptide's own: executes the one instruction at RIP with `observer` watching it, for code on
    /// pages that trap execution. MMIO and other exits of the instruction come out as from
    /// [`VcpuFd::run`]; `Ok(None)` means that it completed.
    pub fn step(&mut self, observer: &mut dyn cpu::Observer) -> Result<Option<VcpuExit<'_>>> {
        if self.vcpu.step(observer)? {
            return Ok(None);
        }
        self.decode_exit().map(Some)
    }

    /// Eptide's own: where an execution trap struck, after [`crate::KVM_EXIT_EMULATE`].
    pub fn emulate_exit(&mut self) -> crate::EmulateExit {
        let run = self.get_kvm_run();
        let place = (&raw const run.__bindgen_anon_1).cast::<crate::EmulateExit>();
        // SAFETY: the union is larger than the structure, aligned to 8, and any bytes are valid.
        unsafe { place.read() }
    }

    /// Eptide's own: the processor's counters.
    pub fn cpu_statistics(&self) -> Result<cpu::Statistics> {
        Ok(self.core()?.cpu.statistics())
    }

    /// Eptide's own: counters of exits and injections, by name.
    pub fn exit_statistics(&self) -> Result<Vec<(&'static str, u64)>> {
        Ok(self.core()?.counters.named())
    }

    /// Eptide's own: the number of VM exits for each basic exit reason that occurred.
    pub fn exits_by_reason(&self) -> Result<Vec<(&'static str, u64)>> {
        Ok(self.core()?.counters.by_reason.named())
    }

    /// KVM_RUN.
    pub fn run(&mut self) -> Result<VcpuExit<'_>> {
        match self.vcpu.run() {
            Ok(()) => self.decode_exit(),
            Err(error) => {
                let run = self.get_kvm_run();
                let memory = matches!(error.errno(), libc::EFAULT | libc::EHWPOISON)
                    && run.exit_reason == KVM_EXIT_MEMORY_FAULT;
                if !memory {
                    return Err(error);
                }
                // SAFETY: the exit reason names the member, and any bytes are valid.
                let fault = unsafe { run.__bindgen_anon_1.memory_fault };
                Ok(VcpuExit::MemoryFault {
                    flags: fault.flags,
                    gpa: fault.gpa,
                    size: fault.size,
                })
            }
        }
    }

    /// Size of the XSAVE area that KVM_GET_XSAVE2 fills.
    pub fn xsave2_size(&self) -> usize {
        (xsave_size(supported_xcr0()) as usize).max(4096)
    }
}
