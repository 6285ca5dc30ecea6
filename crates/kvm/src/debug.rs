//! KVM_SET_GUEST_DEBUG: user space debugs the guest.
//!
//! Software breakpoints intercept #BP. Hardware breakpoints take the debug registers away from
//! the guest, which then sees values of its own without effect. Single steps use the monitor trap
//! flag, so that the guest's RFLAGS.TF is not touched.

use crate::error::{Result, fail};
use arch::control_registers::{Dr6, Dr7};
use arch::controls::PrimaryControls;
use arch::exception::Exception;
use cpu::{Controls, CpuState};
use kvm_bindings::*;

/// Debug registers as the guest sees them.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct DebugRegisters {
    pub(crate) dr: [u64; 4],
    pub(crate) dr6: u64,
    pub(crate) dr7: u64,
}

/// What user space asked for.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct GuestDebug {
    control: u32,
    registers: [u64; 8],
    /// The guest's own registers while user space's are in use.
    guest: Option<DebugRegisters>,
    /// An instruction that was completed here ended a single step.
    pub(crate) stepped: bool,
}

const KNOWN: u32 = KVM_GUESTDBG_ENABLE
    | KVM_GUESTDBG_SINGLESTEP
    | KVM_GUESTDBG_USE_SW_BP
    | KVM_GUESTDBG_USE_HW_BP
    | KVM_GUESTDBG_INJECT_DB
    | KVM_GUESTDBG_INJECT_BP
    | KVM_GUESTDBG_BLOCKIRQ;

fn own_registers(state: &CpuState) -> DebugRegisters {
    DebugRegisters {
        dr: state.dr,
        dr6: state.dr6.bits(),
        dr7: state.dr7.bits(),
    }
}

impl GuestDebug {
    fn enabled(&self, flag: u32) -> bool {
        self.control & KVM_GUESTDBG_ENABLE != 0 && self.control & flag != 0
    }

    /// EINVAL for a request with flags that are not known.
    pub(crate) fn check(request: &kvm_guest_debug) -> Result<()> {
        if request.control & !KNOWN != 0 {
            return fail(libc::EINVAL);
        }
        Ok(())
    }

    /// Applies a request to a vCPU's state.
    pub(crate) fn set(&mut self, request: &kvm_guest_debug, state: &mut CpuState) {
        self.control = request.control;
        self.registers = request.arch.debugreg;
        self.stepped = false;
        if self.enabled(KVM_GUESTDBG_USE_HW_BP) {
            self.guest.get_or_insert_with(|| own_registers(state));
            state.dr.copy_from_slice(&self.registers[..4]);
            state.dr7 = Dr7::from_bits_retain(self.registers[7] | Dr7::FIXED_1);
        } else if let Some(guest) = self.guest.take() {
            state.dr = guest.dr;
            state.dr6 = Dr6::from_bits_retain(guest.dr6);
            state.dr7 = Dr7::from_bits_retain(guest.dr7);
        }
    }

    /// Whether user space debugs the guest at all.
    pub(crate) fn is_active(&self) -> bool {
        self.control != 0
    }

    /// Whether user space steps instruction by instruction.
    pub(crate) fn single_step(&self) -> bool {
        self.enabled(KVM_GUESTDBG_SINGLESTEP)
    }

    /// Whether interrupts are held back while user space steps.
    pub(crate) fn blocks_interrupts(&self) -> bool {
        self.enabled(KVM_GUESTDBG_BLOCKIRQ)
    }

    /// Sets the controls of the next entry.
    pub(crate) fn before_entry(&self, controls: &mut Controls) {
        if !self.is_active() {
            return;
        }
        let mut exceptions = 0;
        if self.enabled(KVM_GUESTDBG_USE_SW_BP) {
            exceptions |= 1 << Exception::Breakpoint.vector();
        }
        if self.enabled(KVM_GUESTDBG_USE_HW_BP | KVM_GUESTDBG_SINGLESTEP) {
            exceptions |= 1 << Exception::Debug.vector();
        }
        controls.exception_bitmap = exceptions;
        let step = PrimaryControls::MONITOR_TRAP_FLAG;
        controls.primary.set(step, self.single_step());
        let owns = self.enabled(KVM_GUESTDBG_USE_HW_BP);
        controls.primary.set(PrimaryControls::MOV_DR_EXITING, owns);
    }

    /// Whether a #DB with these DR6 bits belongs to user space.
    pub(crate) fn wants_debug_exception(&self, dr6: u64) -> bool {
        let breakpoint = dr6 & 0xf != 0 && self.enabled(KVM_GUESTDBG_USE_HW_BP);
        let step = dr6 & Dr6::BS.bits() != 0 && self.single_step();
        breakpoint || step
    }

    /// DR7 as KVM_EXIT_DEBUG reports it.
    pub(crate) fn dr7(&self, state: &CpuState) -> u64 {
        state.dr7.bits()
    }

    /// The registers that the guest reads and writes.
    pub(crate) fn guest_registers(&mut self, state: &CpuState) -> &mut DebugRegisters {
        self.guest.get_or_insert_with(|| own_registers(state))
    }

    /// The guest's registers, for KVM_GET_DEBUGREGS.
    pub(crate) fn get(&self, state: &CpuState) -> DebugRegisters {
        self.guest.unwrap_or_else(|| own_registers(state))
    }

    /// Sets the guest's registers, for KVM_SET_DEBUGREGS.
    pub(crate) fn put(&mut self, registers: DebugRegisters, state: &mut CpuState) {
        match &mut self.guest {
            Some(guest) => *guest = registers,
            None => {
                state.dr = registers.dr;
                state.dr6 = Dr6::from_bits_retain(registers.dr6);
                state.dr7 = Dr7::from_bits_retain(registers.dr7);
            }
        }
    }

    /// The exception that a request injects, if any.
    pub(crate) fn injects(request: &kvm_guest_debug) -> Option<Exception> {
        if request.control & KVM_GUESTDBG_INJECT_DB != 0 {
            Some(Exception::Debug)
        } else if request.control & KVM_GUESTDBG_INJECT_BP != 0 {
            Some(Exception::Breakpoint)
        } else {
            None
        }
    }
}
