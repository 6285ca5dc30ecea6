//! Events that wait to be injected, and events whose delivery was cut short.
//!
//! Source: SDM volume 3, "Event Injection" and "Information for VM Exits That Occur During Event
//! Delivery".

use arch::control_registers::Rflags;
use arch::controls::Interruptibility;
use arch::exception::{self, Combined, Exception};
use arch::interruption::{InterruptionInfo, InterruptionType};
use cpu::CpuState;

/// An exception for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PendingException {
    pub(crate) vector: u8,
    pub(crate) error_code: Option<u32>,
    /// CR2 of a page fault, DR6 bits of a debug exception: applied at injection.
    pub(crate) payload: Option<u64>,
}

/// An event in the form VM entry takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Injection {
    pub(crate) info: InterruptionInfo,
    pub(crate) error_code: u32,
    pub(crate) instruction_length: u32,
}

/// What a vCPU owes its guest.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Events {
    /// An exception not yet injected.
    pub(crate) exception: Option<PendingException>,
    /// An event that was injected or in delivery when the guest exited: it goes first.
    pub(crate) again: Option<Injection>,
    /// NMIs not yet injected.
    pub(crate) nmis: u32,
    /// An external interrupt that user space injected with KVM_INTERRUPT.
    pub(crate) interrupt: Option<u8>,
    /// The same for a processor with a local APIC, which takes it from an 8259 in user space.
    pub(crate) external: Option<u8>,
    /// The next entry shuts the processor down.
    pub(crate) triple_fault: bool,
}

impl Events {
    /// Queues an exception, combining it with one that waits already.
    pub(crate) fn raise(&mut self, new: PendingException) {
        let Some(old) = self.waiting_exception() else {
            self.exception = Some(new);
            return;
        };
        let class = |vector| Exception::from_vector(vector).map(Exception::class);
        let (Some(first), Some(second)) = (class(old), class(new.vector)) else {
            self.exception = Some(new);
            return;
        };
        self.again = None;
        match exception::combine(first, second) {
            Combined::Second => self.exception = Some(new),
            Combined::DoubleFault => {
                self.exception = Some(PendingException {
                    vector: Exception::DoubleFault.vector(),
                    error_code: Some(0),
                    payload: None,
                });
            }
            Combined::TripleFault => {
                self.exception = None;
                self.triple_fault = true;
            }
        }
    }

    /// The exception that waits or was being delivered.
    fn waiting_exception(&self) -> Option<u8> {
        let again = self
            .again
            .filter(|e| e.info.kind() == InterruptionType::HardwareException);
        self.exception
            .map(|e| e.vector)
            .or(again.map(|e| e.info.vector()))
    }

    /// Takes over an event whose delivery ended in an exit.
    pub(crate) fn cut_short(&mut self, info: InterruptionInfo, error_code: u32, length: u32) {
        if !info.is_valid() {
            return;
        }
        let info = InterruptionInfo(info.0 & !InterruptionInfo::NMI_UNBLOCKING);
        self.again = Some(Injection {
            info,
            error_code,
            instruction_length: length,
        });
    }

    /// An exception goes before the event whose delivery raised it, which could not be delivered
    /// at all otherwise: an interrupt waits anew until the guest takes interrupts, and an
    /// instruction that raises an event is executed again. (An exception cut short would have been
    /// combined with the new one.)
    pub(crate) fn put_back(&mut self) {
        let Some(event) = self.again.take() else {
            return;
        };
        match event.info.kind() {
            InterruptionType::ExternalInterrupt => self.interrupt = Some(event.info.vector()),
            InterruptionType::Nmi => self.nmis += 1,
            _ => {}
        }
    }

    /// The most NMIs that wait: one, and one more that is in service at once if none is now.
    pub(crate) fn most_nmis(&self, blocking: Interruptibility) -> u32 {
        let is_nmi = |event: Injection| event.info.kind() == InterruptionType::Nmi;
        if blocking.contains(Interruptibility::NMI) || self.again.is_some_and(is_nmi) {
            1
        } else {
            2
        }
    }

    /// Whether the next entry injects something before a maskable interrupt. An NMI that is blocked
    /// does not stand in an interrupt's way.
    pub(crate) fn goes_first(&self, state: &CpuState) -> bool {
        let nmi = self.nmis != 0 && nmis_open(state);
        nmi || self.exception.is_some() || self.again.is_some() || self.triple_fault
    }

    /// Whether anything but maskable interrupts waits.
    pub(crate) fn any(&self) -> bool {
        self.exception.is_some() || self.again.is_some() || self.nmis != 0 || self.triple_fault
    }
}

/// The injection of an exception.
pub(crate) fn exception_injection(e: &PendingException) -> Injection {
    // #BP and #OF that come from no instruction here are still software exceptions, of length
    // one, as KVM injects them.
    let software = matches!(e.vector, 3 | 4);
    let kind = if software {
        InterruptionType::SoftwareException
    } else {
        InterruptionType::HardwareException
    };
    Injection {
        info: InterruptionInfo::new(kind, e.vector, e.error_code.is_some()),
        error_code: e.error_code.unwrap_or(0),
        instruction_length: software as u32,
    }
}

/// Whether an exception is a fault, whose saved RFLAGS have RF set so that its instruction can be
/// restarted past an instruction breakpoint.
pub(crate) fn is_fault(vector: u8) -> bool {
    let trap_or_abort = matches!(vector, 1 | 2 | 3 | 4 | 8 | 18);
    !trap_or_abort
}

/// The injection of a non-maskable interrupt.
pub(crate) fn nmi_injection() -> Injection {
    let info = InterruptionInfo::new(InterruptionType::Nmi, Exception::Nmi.vector(), false);
    Injection {
        info,
        ..Injection::default()
    }
}

/// The injection of an external interrupt.
pub(crate) fn interrupt_injection(vector: u8) -> Injection {
    let info = InterruptionInfo::new(InterruptionType::ExternalInterrupt, vector, false);
    Injection {
        info,
        ..Injection::default()
    }
}

/// Whether the guest can take a maskable interrupt before its next instruction.
pub(crate) fn interrupts_open(state: &CpuState) -> bool {
    state.rflags() & Rflags::IF.bits() != 0
        && !state
            .interruptibility
            .intersects(Interruptibility::STI | Interruptibility::MOV_SS)
}

/// Whether the guest can take an NMI before its next instruction.
pub(crate) fn nmis_open(state: &CpuState) -> bool {
    let blocking = Interruptibility::STI | Interruptibility::MOV_SS | Interruptibility::NMI;
    !state.interruptibility.intersects(blocking)
}

/// Applies an exception's payload to the registers, as its delivery would.
pub(crate) fn apply_payload(state: &mut CpuState, e: &PendingException) {
    use arch::control_registers::{Dr6, Dr7};
    let Some(payload) = e.payload else { return };
    match Exception::from_vector(e.vector) {
        Some(Exception::PageFault) => state.cr2 = payload,
        Some(Exception::Debug) => {
            let kept = state.dr6.bits() & !0xf;
            state.dr6 = Dr6::from_bits_retain(kept | payload | Dr6::FIXED_1);
            state.dr7.remove(Dr7::GD);
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(vector: u8) -> PendingException {
        PendingException {
            vector,
            error_code: Some(0),
            payload: None,
        }
    }

    #[test]
    fn faults_combine() {
        let mut events = Events::default();
        events.raise(fault(13));
        events.raise(fault(14));
        assert_eq!(events.exception, Some(fault(14)));
        events.raise(fault(13));
        assert_eq!(events.exception, Some(fault(8)));
        events.raise(fault(13));
        assert!(events.triple_fault && events.exception.is_none());
    }

    #[test]
    fn a_fault_in_delivery_counts() {
        let mut events = Events::default();
        let info = InterruptionInfo::new(InterruptionType::HardwareException, 13, true);
        events.cut_short(info, 0x10, 0);
        events.raise(fault(13));
        assert_eq!(events.exception, Some(fault(8)));
        assert!(events.again.is_none());
    }

    #[test]
    fn a_fault_in_the_delivery_of_an_interrupt_goes_first() {
        for (kind, interrupt, nmis) in [
            (InterruptionType::ExternalInterrupt, Some(0x41), 0),
            (InterruptionType::Nmi, None, 1),
            (InterruptionType::SoftwareInterrupt, None, 0),
        ] {
            let mut events = Events::default();
            events.cut_short(InterruptionInfo::new(kind, 0x41, false), 0, 0);
            events.raise(fault(14));
            assert_eq!(events.exception, Some(fault(14)));
            events.put_back();
            assert!(events.again.is_none());
            assert_eq!((events.interrupt, events.nmis), (interrupt, nmis));
        }
    }

    #[test]
    fn without_a_place_for_its_payload_an_exception_leaves_it_in_the_registers() {
        let kvm = crate::Kvm::new().unwrap();
        let vm = kvm.create_vm().unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        vcpu.inner().lock().events.raise(PendingException {
            payload: Some(0x1234_5000),
            ..fault(14)
        });
        assert_eq!(vcpu.get_sregs().unwrap().cr2, 0);
        let events = vcpu.get_vcpu_events().unwrap();
        assert_eq!((events.exception.injected, events.exception.nr), (1, 14));
        assert_eq!(vcpu.get_sregs().unwrap().cr2, 0x1234_5000);
    }

    #[test]
    fn windows() {
        let mut state = CpuState::reset();
        assert!(!interrupts_open(&state) && nmis_open(&state));
        state.set_rflags(0x202);
        assert!(interrupts_open(&state));
        state.interruptibility = Interruptibility::STI;
        assert!(!interrupts_open(&state) && !nmis_open(&state));
    }
}
