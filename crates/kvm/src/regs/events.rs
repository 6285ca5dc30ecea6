//! Multiprocessing state and events: KVM_GET_MP_STATE, KVM_GET_VCPU_EVENTS and their setters,
//! KVM_INTERRUPT.

use super::*;

impl Core {
    /// KVM_GET_MP_STATE.
    pub(crate) fn mp_state(&self) -> kvm_mp_state {
        let state = match self.mp_state {
            MpState::Halted if self.kicked || self.halted_in_guest => MpState::Runnable,
            state => state,
        };
        kvm_mp_state {
            mp_state: state as u32,
        }
    }

    /// KVM_SET_MP_STATE.
    pub(crate) fn set_mp_state(&mut self, vcpu: &Vcpu, state: &kvm_mp_state) -> Result<()> {
        let new = match state.mp_state {
            KVM_MP_STATE_RUNNABLE => MpState::Runnable,
            KVM_MP_STATE_UNINITIALIZED => MpState::Uninitialized,
            KVM_MP_STATE_INIT_RECEIVED => MpState::InitReceived,
            KVM_MP_STATE_HALTED => MpState::Halted,
            KVM_MP_STATE_SIPI_RECEIVED => MpState::InitReceived,
            _ => return fail(libc::EINVAL),
        };
        let waits_for_sipi = new == MpState::InitReceived;
        // An SMI would have to be taken by a processor that takes nothing but a start-up IPI, and
        // INITs wait for the end of system-management mode.
        let refuses_init = self.cpu.state.smm || self.smm.pending;
        if (vcpu.apic().is_none() && new != MpState::Runnable) || (waits_for_sipi && refuses_init) {
            return fail(libc::EINVAL);
        }
        if state.mp_state == KVM_MP_STATE_SIPI_RECEIVED {
            vcpu.mailbox().send_sipi(self.sipi_vector);
        }
        self.mp_state = new;
        self.halted_in_guest = false;
        Ok(())
    }

    /// KVM_GET_VCPU_EVENTS.
    pub(crate) fn vcpu_events(&mut self, vcpu: &Vcpu) -> kvm_vcpu_events {
        let mut e = kvm_vcpu_events::default();
        let payloads = vcpu.vm().settings().exception_payload;
        if let Some(pending) = self.events.exception.as_mut().filter(|_| !payloads) {
            // There is no place for the payload: it goes where the exception would take it.
            crate::events::apply_payload(&mut self.cpu.state, pending);
            pending.payload = None;
        }
        let again = self.events.again;
        let kind = again.map(|again| again.info.kind());
        let exception_again = again.filter(|_| {
            matches!(
                kind,
                Some(
                    InterruptionType::HardwareException
                        | InterruptionType::SoftwareException
                        | InterruptionType::PrivilegedSoftwareException
                )
            )
        });
        if let Some(again) = exception_again {
            e.exception.injected = 1;
            e.exception.nr = again.info.vector();
            e.exception.has_error_code = again.info.has_error_code() as u8;
            e.exception.error_code = again.error_code;
        } else if let Some(pending) = self.events.exception {
            // Without KVM_CAP_EXCEPTION_PAYLOAD a pending exception looks injected.
            e.exception.injected = !payloads as u8;
            e.exception.pending = payloads as u8;
            e.exception.nr = pending.vector;
            e.exception.has_error_code = pending.error_code.is_some() as u8;
            e.exception.error_code = pending.error_code.unwrap_or(0);
            if payloads {
                e.exception_has_payload = pending.payload.is_some() as u8;
                e.exception_payload = pending.payload.unwrap_or(0);
            }
        }
        match kind {
            Some(InterruptionType::Nmi) => e.nmi.injected = 1,
            Some(InterruptionType::ExternalInterrupt)
            | Some(InterruptionType::SoftwareInterrupt) => {
                e.interrupt.injected = 1;
                e.interrupt.nr = again.map_or(0, |again| again.info.vector());
                e.interrupt.soft = (kind == Some(InterruptionType::SoftwareInterrupt)) as u8;
            }
            _ => {}
        }
        if e.interrupt.injected == 0
            && let Some(vector) = self.events.interrupt
        {
            e.interrupt.injected = 1;
            e.interrupt.nr = vector;
        }
        let blocking = self.cpu.state.interruptibility;
        if blocking.contains(Interruptibility::MOV_SS) {
            e.interrupt.shadow |= KVM_X86_SHADOW_INT_MOV_SS as u8;
        }
        if blocking.contains(Interruptibility::STI) {
            e.interrupt.shadow |= KVM_X86_SHADOW_INT_STI as u8;
        }
        // What was sent and not yet looked at waits too.
        let nmis = self.events.nmis + vcpu.mailbox().sent_nmis();
        e.nmi.pending = nmis.min(self.events.most_nmis(blocking)) as u8;
        e.nmi.masked = blocking.contains(Interruptibility::NMI) as u8;
        e.sipi_vector = 0;
        let sent = vcpu.mailbox().pending();
        e.smi.smm = self.cpu.state.smm as u8;
        e.smi.pending = (self.smm.pending || sent.contains(Request::SMI)) as u8;
        e.smi.smm_inside_nmi = (self.cpu.state.smm && self.smm.inside_nmi) as u8;
        e.smi.latched_init = (self.smm.latched_init || sent.contains(Request::INIT)) as u8;
        e.flags =
            KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW | KVM_VCPUEVENT_VALID_SMM;
        if payloads {
            e.flags |= KVM_VCPUEVENT_VALID_PAYLOAD;
        }
        if vcpu.vm().settings().triple_fault_event {
            e.triple_fault.pending = self.events.triple_fault as u8;
            e.flags |= KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
        }
        e
    }

    /// KVM_SET_VCPU_EVENTS.
    pub(crate) fn set_vcpu_events(&mut self, vcpu: &Vcpu, e: &kvm_vcpu_events) -> Result<()> {
        let settings = vcpu.vm().settings();
        let known = KVM_VCPUEVENT_VALID_NMI_PENDING
            | KVM_VCPUEVENT_VALID_SIPI_VECTOR
            | KVM_VCPUEVENT_VALID_SHADOW
            | KVM_VCPUEVENT_VALID_SMM
            | KVM_VCPUEVENT_VALID_PAYLOAD
            | KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
        let payloads = e.flags & KVM_VCPUEVENT_VALID_PAYLOAD != 0;
        let triple = e.flags & KVM_VCPUEVENT_VALID_TRIPLE_FAULT != 0;
        let pending = payloads && e.exception.pending != 0;
        let any_exception = e.exception.injected != 0 || pending;
        let smm = e.flags & KVM_VCPUEVENT_VALID_SMM != 0;
        let smm_waits = smm && (e.smi.smm | e.smi.pending) != 0;
        if e.flags & !known != 0
            || (payloads && !settings.exception_payload)
            || (pending && e.exception.injected != 0)
            || (triple && !settings.triple_fault_event)
            || (any_exception && (e.exception.nr > 31 || e.exception.nr == 2))
            || (smm_waits && self.mp_state == MpState::InitReceived)
        {
            return fail(libc::EINVAL);
        }
        self.events.again = None;
        self.events.exception = None;
        self.events.interrupt = None;
        self.set_exception(e, pending);
        let injects_nmi = e.nmi.injected != 0;
        let nmi_waits = injects_nmi && self.events.again.is_some();
        if injects_nmi && !nmi_waits {
            self.events.again = Some(crate::events::nmi_injection());
        }
        if e.interrupt.injected != 0 {
            self.set_interrupt(e);
        }
        let blocking = &mut self.cpu.state.interruptibility;
        if e.flags & KVM_VCPUEVENT_VALID_SHADOW != 0 {
            let shadow = e.interrupt.shadow as u32;
            blocking.set(
                Interruptibility::MOV_SS,
                shadow & KVM_X86_SHADOW_INT_MOV_SS != 0,
            );
            blocking.set(Interruptibility::STI, shadow & KVM_X86_SHADOW_INT_STI != 0);
        }
        blocking.set(Interruptibility::NMI, e.nmi.masked != 0);
        if e.flags & KVM_VCPUEVENT_VALID_NMI_PENDING != 0 {
            vcpu.mailbox().take_nmis();
            let most = self.events.most_nmis(self.cpu.state.interruptibility);
            self.events.nmis = (e.nmi.pending as u32).min(most);
        }
        self.events.nmis += nmi_waits as u32;
        if e.flags & KVM_VCPUEVENT_VALID_SIPI_VECTOR != 0 {
            self.sipi_vector = e.sipi_vector as u8;
        }
        if smm {
            vcpu.mailbox().take(Request::SMI);
            let inside = e.smi.smm != 0;
            if self.cpu.state.smm != inside {
                self.set_smm(inside);
            }
            self.smm = Smm {
                pending: e.smi.pending != 0,
                inside_nmi: inside && e.smi.smm_inside_nmi != 0,
                latched_init: inside && vcpu.apic().is_some() && e.smi.latched_init != 0,
            };
        }
        if triple {
            self.events.triple_fault = e.triple_fault.pending != 0;
        }
        self.look_for_events = true;
        Ok(())
    }

    fn set_interrupt(&mut self, e: &kvm_vcpu_events) {
        let kind = if e.interrupt.soft != 0 {
            InterruptionType::SoftwareInterrupt
        } else {
            InterruptionType::ExternalInterrupt
        };
        if self.events.again.is_none() && self.events.exception.is_none() {
            let info = InterruptionInfo::new(kind, e.interrupt.nr, false);
            self.events.again = Some(Injection {
                info,
                ..Injection::default()
            });
        } else if kind == InterruptionType::ExternalInterrupt {
            // It waits for what goes first.
            self.events.interrupt = Some(e.interrupt.nr);
        }
    }

    fn set_exception(&mut self, e: &kvm_vcpu_events, pending: bool) {
        let error_code = (e.exception.has_error_code != 0).then_some(e.exception.error_code);
        if pending {
            let payload = (e.exception_has_payload != 0).then_some(e.exception_payload);
            self.events.exception = Some(PendingException {
                vector: e.exception.nr,
                error_code,
                payload,
            });
        } else if e.exception.injected != 0 {
            let exception = PendingException {
                vector: e.exception.nr,
                error_code,
                payload: None,
            };
            self.events.again = Some(crate::events::exception_injection(&exception));
        }
    }

    /// KVM_INTERRUPT, for a local APIC or an 8259 in user space.
    pub(crate) fn queue_interrupt(&mut self, vcpu: &Vcpu, vector: u32) -> Result<()> {
        if vector > 255 {
            return fail(libc::EINVAL);
        }
        if !vcpu.vm().has_user_pic() {
            return fail(libc::ENXIO);
        }
        // A local APIC here takes it as the 8259's, if and when the guest lets it.
        let place = if vcpu.apic().is_some() {
            &mut self.events.external
        } else {
            &mut self.events.interrupt
        };
        if place.is_some() {
            return fail(libc::EEXIST);
        }
        *place = Some(vector as u8);
        self.look_for_events = true;
        Ok(())
    }
}
