//! Why KVM_RUN returned, as callers see it.

use super::VcpuFd;
use crate::error::{Result, fail};
use crate::run_area::PIO_OFFSET;
use bitflags::bitflags;
use kvm_bindings::*;

bitflags! {
    /// Why an MSR access came to user space.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct MsrExitReason: u32 {
        /// The MSR is unknown.
        const Unknown = KVM_MSR_EXIT_REASON_UNKNOWN;
        /// The access or value is invalid.
        const Inval = KVM_MSR_EXIT_REASON_INVAL;
        /// The filter denies it.
        const Filter = KVM_MSR_EXIT_REASON_FILTER;
    }
}

/// An RDMSR that user space answers.
#[derive(Debug)]
pub struct ReadMsrExit<'a> {
    /// Set to 1 for #GP.
    pub error: &'a mut u8,
    /// Why it came to user space.
    pub reason: MsrExitReason,
    /// The MSR.
    pub index: u32,
    /// The value to answer.
    pub data: &'a mut u64,
}

/// A WRMSR that user space carries out.
#[derive(Debug)]
pub struct WriteMsrExit<'a> {
    /// Set to 1 for #GP.
    pub error: &'a mut u8,
    /// Why it came to user space.
    pub reason: MsrExitReason,
    /// The MSR.
    pub index: u32,
    /// The value written.
    pub data: u64,
}

/// A hypercall that user space carries out.
#[derive(Debug)]
pub struct HypercallExit<'a> {
    /// Number.
    pub nr: u64,
    /// Arguments.
    pub args: [u64; 6],
    /// The result for the guest.
    pub ret: &'a mut u64,
    /// Whether the guest was in 64-bit mode.
    pub longmode: u32,
}

/// Why [`VcpuFd::run`] returned.
#[derive(Debug)]
pub enum VcpuExit<'a> {
    /// Data was written to a port.
    IoOut(u16, &'a [u8]),
    /// A port is read; fill the data before the next run.
    IoIn(u16, &'a mut [u8]),
    /// Memory is read; fill the data before the next run.
    MmioRead(u64, &'a mut [u8]),
    /// Data was written to memory.
    MmioWrite(u64, &'a [u8]),
    /// KVM_EXIT_UNKNOWN.
    Unknown,
    /// KVM_EXIT_EXCEPTION.
    Exception,
    /// KVM_EXIT_HYPERCALL.
    Hypercall(HypercallExit<'a>),
    /// KVM_EXIT_DEBUG.
    Debug(kvm_debug_exit_arch),
    /// KVM_EXIT_HLT.
    Hlt,
    /// KVM_EXIT_IRQ_WINDOW_OPEN.
    IrqWindowOpen,
    /// KVM_EXIT_SHUTDOWN.
    Shutdown,
    /// KVM_EXIT_FAIL_ENTRY: the hardware's reason and the CPU.
    FailEntry(u64, u32),
    /// KVM_EXIT_INTR.
    Intr,
    /// KVM_EXIT_SET_TPR.
    SetTpr,
    /// KVM_EXIT_TPR_ACCESS.
    TprAccess,
    /// KVM_EXIT_NMI.
    Nmi,
    /// KVM_EXIT_INTERNAL_ERROR.
    InternalError,
    /// KVM_EXIT_SYSTEM_EVENT: type and data.
    SystemEvent(u32, &'a [u64]),
    /// KVM_EXIT_IOAPIC_EOI: the vector.
    IoapicEoi(u8),
    /// KVM_EXIT_HYPERV.
    Hyperv,
    /// KVM_EXIT_X86_RDMSR.
    X86Rdmsr(ReadMsrExit<'a>),
    /// KVM_EXIT_X86_WRMSR.
    X86Wrmsr(WriteMsrExit<'a>),
    /// KVM_EXIT_MEMORY_FAULT.
    MemoryFault {
        /// Flags.
        flags: u64,
        /// Guest-physical address.
        gpa: u64,
        /// Bytes.
        size: u64,
    },
    /// Another exit reason: [`crate::KVM_EXIT_EMULATE`], for instance.
    Unsupported(u32),
}

impl VcpuFd {
    fn io_exit(&mut self) -> Result<VcpuExit<'_>> {
        let run = self.get_kvm_run();
        // SAFETY: the caller has seen the exit reason that names the member.
        let io = unsafe { run.__bindgen_anon_1.io };
        let length = io.size as usize * io.count as usize;
        if io.data_offset != PIO_OFFSET as u64 || length > crate::run_area::PAGE {
            return fail(libc::EINVAL);
        }
        let base = self.vcpu.run_area().as_ptr().cast::<u8>();
        // SAFETY: the port page lies in the mapping behind `kvm_run`; `self` stays borrowed while
        // the slice lives.
        let data = unsafe { std::slice::from_raw_parts_mut(base.add(PIO_OFFSET), length) };
        if io.direction as u32 == KVM_EXIT_IO_IN {
            Ok(VcpuExit::IoIn(io.port, data))
        } else {
            Ok(VcpuExit::IoOut(io.port, data))
        }
    }

    /// `kvm_run` as [`VcpuExit`]. Members of the union are read only under the exit reason that
    /// fills them, and all are plain data of which any bytes are valid.
    pub(super) fn decode_exit(&mut self) -> Result<VcpuExit<'_>> {
        if self.get_kvm_run().exit_reason == KVM_EXIT_IO {
            return self.io_exit();
        }
        let run = self.get_kvm_run();
        let reason = run.exit_reason;
        let union = &mut run.__bindgen_anon_1;
        Ok(match reason {
            KVM_EXIT_UNKNOWN => VcpuExit::Unknown,
            KVM_EXIT_EXCEPTION => VcpuExit::Exception,
            KVM_EXIT_HYPERCALL => {
                // SAFETY: see above.
                let call = unsafe { &mut union.hypercall };
                VcpuExit::Hypercall(HypercallExit {
                    nr: call.nr,
                    args: call.args,
                    // SAFETY: see above.
                    longmode: unsafe { call.__bindgen_anon_1.longmode },
                    ret: &mut call.ret,
                })
            }
            // SAFETY: see above.
            KVM_EXIT_DEBUG => VcpuExit::Debug(unsafe { union.debug.arch }),
            KVM_EXIT_HLT => VcpuExit::Hlt,
            KVM_EXIT_MMIO => {
                // SAFETY: see above.
                let mmio = unsafe { &mut union.mmio };
                let (gpa, length) = (mmio.phys_addr, (mmio.len as usize).min(8));
                if mmio.is_write != 0 {
                    VcpuExit::MmioWrite(gpa, &mmio.data[..length])
                } else {
                    VcpuExit::MmioRead(gpa, &mut mmio.data[..length])
                }
            }
            KVM_EXIT_X86_RDMSR => {
                // SAFETY: see above.
                let msr = unsafe { &mut union.msr };
                VcpuExit::X86Rdmsr(ReadMsrExit {
                    error: &mut msr.error,
                    reason: MsrExitReason::from_bits_truncate(msr.reason),
                    index: msr.index,
                    data: &mut msr.data,
                })
            }
            KVM_EXIT_X86_WRMSR => {
                // SAFETY: see above.
                let msr = unsafe { &mut union.msr };
                VcpuExit::X86Wrmsr(WriteMsrExit {
                    error: &mut msr.error,
                    reason: MsrExitReason::from_bits_truncate(msr.reason),
                    index: msr.index,
                    data: msr.data,
                })
            }
            KVM_EXIT_IRQ_WINDOW_OPEN => VcpuExit::IrqWindowOpen,
            KVM_EXIT_SHUTDOWN => VcpuExit::Shutdown,
            KVM_EXIT_FAIL_ENTRY => {
                // SAFETY: see above.
                let failure = unsafe { union.fail_entry };
                VcpuExit::FailEntry(failure.hardware_entry_failure_reason, failure.cpu)
            }
            KVM_EXIT_INTR => VcpuExit::Intr,
            KVM_EXIT_SET_TPR => VcpuExit::SetTpr,
            KVM_EXIT_TPR_ACCESS => VcpuExit::TprAccess,
            KVM_EXIT_NMI => VcpuExit::Nmi,
            KVM_EXIT_INTERNAL_ERROR => VcpuExit::InternalError,
            KVM_EXIT_SYSTEM_EVENT => {
                // SAFETY: see above.
                let event = unsafe { &union.system_event };
                // SAFETY: see above.
                let data = unsafe { &event.__bindgen_anon_1.data };
                VcpuExit::SystemEvent(event.type_, &data[..(event.ndata as usize).min(data.len())])
            }
            // SAFETY: see above.
            KVM_EXIT_IOAPIC_EOI => VcpuExit::IoapicEoi(unsafe { union.eoi.vector }),
            other => VcpuExit::Unsupported(other),
        })
    }
}
