//! Execution traps by page: the exit, and running flagged code instruction by instruction.
//!
//! A page flagged with [`crate::VmFd::set_execution_traps`] is never mapped executable. A fetch
//! from it ends KVM_RUN with [`KVM_EXIT_EMULATE`] before the instruction has any effect. User
//! space then steps through the flagged code with [`crate::VcpuFd::step`] and an observer, and
//! runs again as soon as control has left flagged pages.

use crate::exits::Outcome;
use crate::vcpu::{Core, Vcpu};
use arch::exit::VmExit;

/// Exit reason of an execution trap: a number of Eptide's own, far from KVM's.
pub const KVM_EXIT_EMULATE: u32 = 0x4550_0001;

/// What `kvm_run` holds after [`KVM_EXIT_EMULATE`], in place of the exit-specific fields.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct EmulateExit {
    /// Guest-physical address of the fetch.
    pub gpa: u64,
    /// Guest-linear address of the fetch.
    pub gva: u64,
    /// Instruction pointer.
    pub rip: u64,
    /// CR3.
    pub cr3: u64,
}

/// Argument of `EPTIDE_SET_ACCESS` and `EPTIDE_GET_ACCESS`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct AccessBytes {
    /// First guest frame.
    pub first_gfn: u64,
    /// Number of frames.
    pub count: u64,
    /// Address of one byte per frame: [`ACCESS_TRAP_EXECUTION`] or 0.
    pub access: u64,
}

/// Access byte: executing from the page ends KVM_RUN.
pub const ACCESS_TRAP_EXECUTION: u8 = 1;

impl AccessBytes {
    /// The number of frames, if one call may name so many.
    pub(crate) fn checked_count(&self) -> crate::Result<usize> {
        const MOST: u64 = 1 << 24;
        if self.count == 0 || self.count > MOST || self.first_gfn.checked_add(self.count).is_none()
        {
            return crate::error::fail(libc::EINVAL);
        }
        Ok(self.count as usize)
    }
}

/// Ends KVM_RUN for a fetch from a flagged page.
pub(crate) fn exit(core: &mut Core, vcpu: &Vcpu, exit: &VmExit) -> Outcome {
    let state = &core.cpu.state;
    let emulate = EmulateExit {
        gpa: exit.guest_physical_address,
        gva: exit.guest_linear_address,
        rip: state.rip,
        cr3: state.cr3,
    };
    let run = vcpu.kvm_run(core);
    run.exit_reason = KVM_EXIT_EMULATE;
    let place = (&raw mut run.__bindgen_anon_1).cast::<EmulateExit>();
    // SAFETY: the union is 256 bytes of plain data, aligned to 8, and holds the structure.
    unsafe { place.write(emulate) };
    Outcome::Exit
}

const _: () = assert!(size_of::<EmulateExit>() <= 256);

impl Vcpu {
    /// Executes one instruction under an observer: true if it completed, false if `kvm_run` holds
    /// an exit.
    pub(crate) fn step(&self, observer: &mut dyn cpu::Observer) -> crate::Result<bool> {
        let mut core = self.lock();
        self.vm().check_alive()?;
        let outcome = crate::mmio::step(&mut core, self, observer);
        core.leave_guest_mode();
        match outcome {
            Outcome::Resume => Ok(true),
            Outcome::Exit => Ok(false),
            Outcome::Interrupted => crate::error::fail(libc::EINTR),
            Outcome::Fail(errno) => crate::error::fail(errno),
        }
    }
}
