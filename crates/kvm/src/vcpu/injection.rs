//! Which event the next entry injects, and what becomes of one that was not delivered.

use crate::events::{self, Injection};
use crate::exits::{self, Outcome};
use crate::irqchip::lapic::LocalApic;
use crate::mailbox::Request;
use crate::vcpu::{Core, Vcpu};
use arch::control_registers::Rflags;
use arch::controls::{Interruptibility, PrimaryControls};
use arch::exit::VmExit;
use arch::interruption::InterruptionType;

impl Core {
    /// Whether a maskable interrupt waits (whatever the guest allows).
    pub(crate) fn interrupt_waits(&self, vcpu: &Vcpu) -> bool {
        if self.events.interrupt.is_some() {
            return true;
        }
        let Some(apic) = vcpu.apic() else {
            return false;
        };
        apic.deliverable().is_some()
            || pic_interrupt(vcpu, apic)
            || (self.events.external.is_some() && apic.accepts_pic())
    }

    pub(super) fn take_interrupt(&mut self, vcpu: &Vcpu) -> Option<u8> {
        if let Some(vector) = self.events.interrupt.take() {
            return Some(vector);
        }
        let apic = vcpu.apic()?;
        if pic_interrupt(vcpu, apic) {
            return vcpu.vm().irqchip().map(|chip| chip.acknowledge_pic());
        }
        if self.events.external.is_some() && apic.accepts_pic() {
            return self.events.external.take();
        }
        apic.acknowledge()
    }

    /// Whether user space may inject an interrupt with KVM_INTERRUPT.
    pub(crate) fn ready_for_interrupt(&self, vcpu: &Vcpu) -> bool {
        self.takes_external(vcpu)
            && self.events.interrupt.is_none()
            && !self.events.goes_first(&self.cpu.state)
            && events::interrupts_open(&self.cpu.state)
    }

    /// Whether there is a place for an interrupt of user space's 8259 or local APIC.
    fn takes_external(&self, vcpu: &Vcpu) -> bool {
        self.events.external.is_none() && vcpu.apic().is_none_or(|apic| apic.accepts_pic())
    }

    /// An entry that did not happen leaves its event to be injected again.
    pub(super) fn give_back_injection(&mut self) {
        let c = &mut self.controls;
        let info = std::mem::take(&mut c.interruption_info);
        if info.is_valid() {
            self.events.again = Some(Injection {
                info,
                error_code: c.interruption_error_code,
                instruction_length: c.instruction_length,
            });
            self.look_for_events = true;
        }
    }

    /// An event whose delivery the exit cut short goes first at the next entry.
    pub(super) fn take_back_event(&mut self, exit: &VmExit) {
        if exit.idt_vectoring_info.is_valid() {
            self.events.cut_short(
                exit.idt_vectoring_info,
                exit.idt_vectoring_error_code,
                exit.instruction_length,
            );
            if exit.idt_vectoring_info.kind() == InterruptionType::Nmi {
                self.cpu.state.interruptibility -= Interruptibility::NMI;
            }
        } else if exit.entry_failure {
            self.give_back_injection();
        }
    }

    /// Chooses the event of the next entry, and which windows to wait for.
    pub(super) fn inject(&mut self, vcpu: &Vcpu) -> Outcome {
        self.look_for_events = false;
        let windows =
            PrimaryControls::INTERRUPT_WINDOW_EXITING | PrimaryControls::NMI_WINDOW_EXITING;
        self.controls.primary -= windows;
        if self.events.triple_fault {
            self.events.triple_fault = false;
            return exits::shutdown(self, vcpu);
        }
        let mut injected = None;
        if let Some(exception) = self.events.exception.take() {
            self.events.put_back();
            let state = &mut self.cpu.state;
            events::apply_payload(state, &exception);
            if events::is_fault(exception.vector) {
                state.set_rflags(state.rflags() | Rflags::RF.bits());
            }
            injected = Some(events::exception_injection(&exception));
        } else if let Some(again) = self.events.again.take() {
            if again.info.kind() == InterruptionType::Nmi {
                self.cpu.state.interruptibility -= Interruptibility::NMI;
            }
            injected = Some(again);
        }
        if self.smi_waits() {
            self.is_unchanged = false;
            if injected.is_none() {
                self.enter_smm(vcpu);
                if self.events.triple_fault {
                    return self.inject(vcpu);
                }
            } else {
                // The event comes first; its entry ends before an instruction.
                vcpu.mailbox().post_own(Request::EVENT);
                vcpu.mailbox().kick();
            }
        }
        if self.events.nmis != 0 {
            if injected.is_none() && events::nmis_open(&self.cpu.state) {
                self.events.nmis -= 1;
                self.counters.nmi_injections += 1;
                injected = Some(events::nmi_injection());
            }
            if self.events.nmis != 0 {
                self.controls.primary |= PrimaryControls::NMI_WINDOW_EXITING;
            }
        }
        if !self.debug.blocks_interrupts() && self.interrupt_waits(vcpu) {
            if injected.is_none()
                && events::interrupts_open(&self.cpu.state)
                && let Some(vector) = self.take_interrupt(vcpu)
            {
                self.counters.irq_injections += 1;
                injected = Some(events::interrupt_injection(vector));
            }
            if self.interrupt_waits(vcpu) {
                self.controls.primary |= PrimaryControls::INTERRUPT_WINDOW_EXITING;
            }
        }
        self.offer_to_guest(vcpu);
        self.update_steal_time(vcpu);
        if vcpu.kvm_run(self).request_interrupt_window != 0
            && vcpu.vm().has_user_pic()
            && self.takes_external(vcpu)
            && self.events.interrupt.is_none()
        {
            self.controls.primary |= PrimaryControls::INTERRUPT_WINDOW_EXITING;
            self.look_for_events = true;
        }
        if let Some(injection) = injected {
            self.controls.interruption_info = injection.info;
            self.controls.interruption_error_code = injection.error_code;
            self.controls.instruction_length = injection.instruction_length;
        }
        Outcome::Resume
    }
}

/// Whether the 8259 pair interrupts this processor.
fn pic_interrupt(vcpu: &Vcpu, apic: &LocalApic) -> bool {
    vcpu.vm().irqchip().is_some_and(|chip| chip.pic_output()) && apic.accepts_pic()
}
