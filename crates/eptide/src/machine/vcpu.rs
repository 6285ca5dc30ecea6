//! Virtual processors: their state before the first instruction and the thread that runs each.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use kvm::{Interrupter, VcpuExit, VcpuFd};
use kvm_bindings::{
    CpuId, KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, Msrs,
    kvm_fpu, kvm_lapic_state, kvm_msr_entry,
};

use super::boot;
use super::bus::Bus;
use super::cpuid::{self, Topology};
use super::hypervisor;
use super::kernel::Entry;
use super::outcome::{Outcome, Stop};
use crate::report::Statistics;

const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MSR_IA32_MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// AMD's hardware configuration register.
const MSR_K7_HWCR: u32 = 0xc001_0015;
/// The time-stamp counter runs at the frequency of P-state 0. Firmware sets it; kernels complain
/// when it is clear.
const MSR_K7_HWCR_TSC_FREQ_SEL: u64 = 1 << 24;
/// MTRRs on, memory write-back where no range register says otherwise.
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

const APIC_LVT_LINT0: usize = 0x350;
const APIC_LVT_LINT1: usize = 0x360;
const APIC_MODE_MASK: u32 = 7 << 8;
const APIC_MODE_NMI: u32 = 4 << 8;
const APIC_MODE_EXTINT: u32 = 7 << 8;

/// What setting up a processor can run into.
#[derive(Debug, thiserror::Error)]
#[error("processor {id}: {what}: {error}")]
pub(crate) struct VcpuError {
    pub(super) id: u32,
    pub(super) what: &'static str,
    pub(super) error: kvm::Error,
}

/// Gives `vcpu` the state it has before its first instruction. Only processor 0 is pointed at the
/// kernel; the others wait for INIT and SIPI.
pub(crate) fn prepare(
    vcpu: &VcpuFd,
    id: u32,
    topology: Topology,
    supported: &CpuId,
    entry: Entry,
) -> Result<(), VcpuError> {
    let failed = |what| move |error| VcpuError { id, what, error };
    let cpuid = topology.cpuid(supported, id).map_err(|_| VcpuError {
        id,
        what: "CPUID table",
        error: kvm::Error::new(libc::E2BIG),
    })?;
    vcpu.set_cpuid2(&cpuid).map_err(failed("KVM_SET_CPUID2"))?;
    set_msrs(vcpu, supported).map_err(failed("KVM_SET_MSRS"))?;
    connect_local_interrupts(vcpu).map_err(failed("KVM_SET_LAPIC"))?;
    if id == 0 {
        let fpu = kvm_fpu {
            fcw: 0x37f,
            mxcsr: 0x1f80,
            ..Default::default()
        };
        vcpu.set_fpu(&fpu).map_err(failed("KVM_SET_FPU"))?;
        let sregs = vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
        vcpu.set_sregs(&boot::special_registers(entry, sregs))
            .map_err(failed("KVM_SET_SREGS"))?;
        vcpu.set_regs(&boot::registers(entry))
            .map_err(failed("KVM_SET_REGS"))?;
    }
    Ok(())
}

fn set_msrs(vcpu: &VcpuFd, supported: &CpuId) -> Result<(), kvm::Error> {
    let entry = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    let mut entries = vec![
        entry(MSR_IA32_MISC_ENABLE, MSR_IA32_MISC_ENABLE_FAST_STRING),
        entry(MSR_MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK),
    ];
    if cpuid::is_amd(supported) {
        entries.push(entry(MSR_K7_HWCR, MSR_K7_HWCR_TSC_FREQ_SEL));
    }
    let msrs = Msrs::from_entries(&entries).expect("a few entries are within the limit");
    // KVM stops at the first MSR it refuses and says how many it took.
    match vcpu.set_msrs(&msrs)? {
        taken if taken == entries.len() => Ok(()),
        _ => Err(kvm::Error::new(libc::EINVAL)),
    }
}

/// LINT0 carries the PIC's interrupts, LINT1 the NMI, as firmware leaves them.
fn connect_local_interrupts(vcpu: &VcpuFd) -> Result<(), kvm::Error> {
    let mut lapic = vcpu.get_lapic()?;
    set_delivery_mode(&mut lapic, APIC_LVT_LINT0, APIC_MODE_EXTINT);
    set_delivery_mode(&mut lapic, APIC_LVT_LINT1, APIC_MODE_NMI);
    vcpu.set_lapic(&lapic)
}

fn set_delivery_mode(lapic: &mut kvm_lapic_state, register: usize, mode: u32) {
    let bytes: Vec<u8> = lapic.regs[register..register + 4]
        .iter()
        .map(|b| *b as u8)
        .collect();
    let value = u32::from_le_bytes(bytes.try_into().expect("four bytes"));
    let value = (value & !APIC_MODE_MASK) | mode;
    for (register, byte) in lapic.regs[register..].iter_mut().zip(value.to_le_bytes()) {
        *register = byte as _;
    }
}

/// Exits to user space, by kind.
#[derive(Debug, Default)]
pub(crate) struct UserExits {
    pub(crate) port: AtomicU64,
    pub(crate) mmio: AtomicU64,
    pub(crate) interrupted: AtomicU64,
}

/// What every processor's thread needs.
#[derive(Clone)]
pub(crate) struct Environment {
    pub(crate) ports: Arc<Bus>,
    pub(crate) mmio: Arc<Bus>,
    pub(crate) stop: Stop,
    pub(crate) exits: Arc<UserExits>,
    pub(crate) statistics: Arc<Mutex<Statistics>>,
}

/// A processor's thread.
pub(crate) struct VcpuThread {
    handle: JoinHandle<()>,
    interrupter: Interrupter,
}

impl VcpuThread {
    /// Starts running `vcpu`.
    pub(crate) fn spawn(vcpu: VcpuFd, id: u32, environment: Environment) -> std::io::Result<Self> {
        let interrupter = vcpu.interrupter();
        let handle = std::thread::Builder::new()
            .name(format!("vcpu {id}"))
            .spawn(move || {
                let stop = environment.stop.clone();
                let run = std::panic::AssertUnwindSafe(|| run_loop(vcpu, id, &environment));
                if std::panic::catch_unwind(run).is_err() {
                    stop.request(Outcome::Failure(format!(
                        "processor {id}'s thread panicked"
                    )));
                }
            })?;
        Ok(Self {
            handle,
            interrupter,
        })
    }

    /// Makes the thread leave `KVM_RUN`.
    pub(crate) fn kick(&self) {
        self.interrupter.interrupt();
    }

    /// Whether the thread has ended.
    pub(crate) fn is_finished(&self) -> bool {
        self.handle.is_finished()
    }
}

fn run_loop(mut vcpu: VcpuFd, id: u32, environment: &Environment) {
    while environment.stop.outcome().is_none() {
        match vcpu.run() {
            Ok(exit) => {
                if let Some(outcome) = handle_exit(exit, id, environment) {
                    let outcome = describe(outcome, &vcpu);
                    environment.stop.request(outcome);
                }
            }
            Err(error) => match error.errno() {
                libc::EINTR => {
                    environment
                        .exits
                        .interrupted
                        .fetch_add(1, Ordering::Relaxed);
                }
                libc::EAGAIN => {}
                _ => {
                    let failure = Outcome::Failure(format!("processor {id}: KVM_RUN: {error}"));
                    environment.stop.request(describe(failure, &vcpu));
                }
            },
        }
    }
    let mut statistics = environment
        .statistics
        .lock()
        .unwrap_or_else(|poison| poison.into_inner());
    hypervisor::add_processor(&mut statistics, &vcpu);
    // The thread has done nothing but run its processor.
    let ran = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    statistics.busy += Duration::new(ran.tv_sec as u64, ran.tv_nsec as u32);
}

/// Serves one exit; returns why the machine stops, if it does.
fn handle_exit(exit: VcpuExit<'_>, id: u32, environment: &Environment) -> Option<Outcome> {
    let exits = &environment.exits;
    match exit {
        VcpuExit::IoOut(port, data) => {
            exits.port.fetch_add(1, Ordering::Relaxed);
            environment.ports.write(u64::from(port), data);
        }
        VcpuExit::IoIn(port, data) => {
            exits.port.fetch_add(1, Ordering::Relaxed);
            environment.ports.read(u64::from(port), data);
        }
        VcpuExit::MmioRead(address, data) => {
            exits.mmio.fetch_add(1, Ordering::Relaxed);
            environment.mmio.read(address, data);
        }
        VcpuExit::MmioWrite(address, data) => {
            exits.mmio.fetch_add(1, Ordering::Relaxed);
            environment.mmio.write(address, data);
        }
        VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::Hlt => {}
        VcpuExit::Shutdown => return Some(Outcome::TripleFault),
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _) => return Some(Outcome::PowerOff),
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _) => return Some(Outcome::Reset),
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_CRASH, _) => {
            return Some(Outcome::Failure("the guest reported a crash".into()));
        }
        other => return Some(Outcome::Failure(format!("processor {id}: exit {other:?}"))),
    }
    None
}

/// Adds the processor's registers to a failure, where they help to understand it.
fn describe(outcome: Outcome, vcpu: &VcpuFd) -> Outcome {
    let Outcome::Failure(text) = outcome else {
        return outcome;
    };
    match (vcpu.get_regs(), vcpu.get_sregs()) {
        (Ok(regs), Ok(sregs)) => Outcome::Failure(format!(
            "{text}\n  rip {:#x} rsp {:#x} rflags {:#x} cr0 {:#x} cr2 {:#x} cr3 {:#x} cr4 {:#x} \
             efer {:#x}\n  rax {:#x} rbx {:#x} rcx {:#x} rdx {:#x} rsi {:#x} rdi {:#x} rbp {:#x}",
            regs.rip,
            regs.rsp,
            regs.rflags,
            sregs.cr0,
            sregs.cr2,
            sregs.cr3,
            sregs.cr4,
            sregs.efer,
            regs.rax,
            regs.rbx,
            regs.rcx,
            regs.rdx,
            regs.rsi,
            regs.rdi,
            regs.rbp,
        )),
        _ => Outcome::Failure(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delivery_modes_keep_the_other_bits() {
        let mut lapic = kvm_lapic_state::default();
        lapic.regs[APIC_LVT_LINT0 + 2] = 1; // masked
        set_delivery_mode(&mut lapic, APIC_LVT_LINT0, APIC_MODE_EXTINT);
        let bytes = [0, 7, 1, 0];
        let found: Vec<u8> = lapic.regs[APIC_LVT_LINT0..APIC_LVT_LINT0 + 4]
            .iter()
            .map(|b| *b as u8)
            .collect();
        assert_eq!(found, bytes);
    }
}
