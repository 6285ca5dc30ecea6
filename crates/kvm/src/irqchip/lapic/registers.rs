//! The registers of a local APIC as software reads and writes them, one by one or as a page.

use super::*;

impl LocalApic {
    /// Reads a register by its xAPIC offset.
    pub fn read(&self, offset: u32) -> Result<u32, Illegal> {
        self.note_access(offset, TprAccess::Read);
        let mut state = match offset {
            reg::TIMER_CURRENT | reg::IRR..reg::ESR => self.lock_settled(),
            _ => self.lock(),
        };
        let x2apic = state.x2apic();
        let exists = match offset {
            reg::ID | reg::VERSION | reg::TPR | reg::PPR | reg::LDR | reg::SVR | reg::ESR => true,
            reg::ICR | reg::TIMER_INITIAL | reg::TIMER_CURRENT | reg::TIMER_DIVIDE => true,
            reg::APR | reg::RRD | reg::DFR | reg::ICR2 | reg::EOI => !x2apic,
            reg::LVT_TIMER..=reg::LVT_ERROR => true,
            reg::ISR..reg::ESR => true,
            _ => false,
        };
        if !exists || offset & 0xf != 0 {
            if !x2apic {
                state.report(ESR_ILLEGAL_REGISTER);
            }
            return Err(Illegal);
        }
        Ok(match offset {
            reg::PPR => state.update_ppr() as u32,
            reg::TIMER_CURRENT => state.timer.current_count(state.timer_lvt()),
            reg::EOI => 0,
            _ => state.get(offset),
        })
    }

    /// Reads the 64-bit ICR of x2APIC mode.
    pub fn read_icr(&self) -> u64 {
        let state = self.lock();
        state.get(reg::ICR) as u64 | (state.get(reg::ICR2) as u64) << 32
    }

    /// Writes the 64-bit ICR of x2APIC mode.
    pub fn write_icr(&self, value: u64) -> Result<Effect, Illegal> {
        if value & 0xfff3_2000 != 0 {
            return Err(Illegal);
        }
        let mut state = self.lock();
        state.set(reg::ICR, value as u32);
        state.set(reg::ICR2, (value >> 32) as u32);
        let message = Message::from_icr(value, true);
        Ok(send(&mut state, message))
    }

    /// Writes a register by its xAPIC offset.
    pub fn write(&self, offset: u32, value: u32) -> Result<Effect, Illegal> {
        self.note_access(offset, TprAccess::Write);
        let mut state = self.lock();
        let x2apic = state.x2apic();
        match offset {
            reg::ID if !x2apic => state.set(reg::ID, value & 0xff00_0000),
            reg::TPR => {
                if x2apic && value & !0xff != 0 {
                    return Err(Illegal);
                }
                state.set(reg::TPR, value & 0xff);
                self.mailbox.post_own(Request::EVENT);
            }
            reg::EOI => {
                if x2apic && value != 0 {
                    return Err(Illegal);
                }
                drop(state);
                return Ok(self.end_of_interrupt());
            }
            reg::LDR if !x2apic => state.set(reg::LDR, value & 0xff00_0000),
            reg::DFR if !x2apic => state.set(reg::DFR, value | 0x0fff_ffff),
            reg::SVR => {
                let directed = if state.config.directed_eoi {
                    SVR_DIRECTED_EOI
                } else {
                    0
                };
                if x2apic && value & !(0x3ff | directed) != 0 {
                    return Err(Illegal);
                }
                state.set(reg::SVR, value & (0x3ff | directed));
                if value & SVR_ENABLED == 0 {
                    for lvt in 0..6 {
                        let offset = reg::LVT_TIMER + lvt * 16;
                        let masked = state.get(offset) | LVT_MASKED;
                        state.set(offset, masked);
                    }
                }
                self.mailbox.post_own(Request::EVENT);
            }
            reg::ESR => {
                if x2apic && value != 0 {
                    return Err(Illegal);
                }
                let errors = std::mem::take(&mut state.errors);
                state.set(reg::ESR, errors);
            }
            reg::ICR if !x2apic => {
                // Delivery status always reads as idle: sending completes at once.
                state.set(reg::ICR, value & !(1 << 12));
                let icr = value as u64 | (state.get(reg::ICR2) as u64) << 32;
                return Ok(send(&mut state, Message::from_icr(icr, false)));
            }
            reg::ICR2 if !x2apic => state.set(reg::ICR2, value & 0xff00_0000),
            reg::LVT_TIMER..=reg::LVT_ERROR if offset & 0xf == 0 => {
                let index = ((offset - reg::LVT_TIMER) >> 4) as usize;
                let writable = LVT_WRITABLE[index];
                // Delivery status and remote IRR are read-only, not reserved: kernels write them
                // back.
                if x2apic && value & !(writable | 1 << 12 | 1 << 14) != 0 {
                    return Err(Illegal);
                }
                let mut value = value & writable;
                if !state.software_enabled() {
                    value |= LVT_MASKED;
                }
                let old = state.get(offset);
                state.set(offset, value);
                if offset == reg::LVT_TIMER && state.timer.mode_changed(old, value) {
                    state.timer.cancel();
                    state.set(reg::TIMER_INITIAL, 0);
                    self.timer.disarm();
                }
            }
            reg::TIMER_INITIAL => {
                let lvt = state.timer_lvt();
                state.set(reg::TIMER_INITIAL, value);
                state.timer.start(lvt, value);
                self.settle_own(&mut state);
            }
            reg::TIMER_DIVIDE => {
                if x2apic && value & !0xb != 0 {
                    return Err(Illegal);
                }
                state.set(reg::TIMER_DIVIDE, value & 0xb);
                let lvt = state.timer_lvt();
                state.timer.set_divide(lvt, value);
                self.settle_own(&mut state);
            }
            reg::SELF_IPI if x2apic => {
                if value & !0xff != 0 {
                    return Err(Illegal);
                }
                let icr = value as u64 | 1 << 18;
                return Ok(send(&mut state, Message::from_icr(icr, true)));
            }
            // Read-only registers of an xAPIC ignore writes.
            reg::VERSION | reg::APR | reg::PPR | reg::RRD | reg::TIMER_CURRENT if !x2apic => {}
            reg::ISR..reg::ESR if !x2apic => {}
            _ => {
                if !x2apic {
                    state.report(ESR_ILLEGAL_REGISTER);
                }
                return Err(Illegal);
            }
        }
        self.publish(&state);
        Ok(Effect::None)
    }

    /// The register page as KVM_GET_LAPIC shows it.
    pub fn snapshot(&self) -> [u32; 256] {
        let mut state = self.lock_settled();
        state.update_ppr();
        let current = state.timer.current_count(state.timer_lvt());
        let mut page = [0; 256];
        for (i, &value) in state.page.iter().enumerate() {
            page[i * 4] = value;
        }
        page[(reg::TIMER_CURRENT / 4) as usize] = current;
        if state.x2apic() && !state.config.wide_ids {
            page[(reg::ID / 4) as usize] = state.get(reg::ID) << 24;
        }
        page
    }

    /// Loads the register page as KVM_SET_LAPIC gives it.
    ///
    /// An x2APIC's ID is read-only and must be the vCPU's.
    pub fn restore(&self, page: &[u32; 256]) -> Result<(), Illegal> {
        let mut state = self.lock();
        let x2apic = state.x2apic();
        let id = page[(reg::ID / 4) as usize];
        if x2apic {
            let expected = if state.config.wide_ids {
                self.initial_id
            } else {
                self.initial_id << 24
            };
            if id != expected {
                return Err(Illegal);
            }
        }
        for i in 0..64 {
            state.page[i] = page[i * 4];
        }
        let version = VERSION
            | if state.config.directed_eoi {
                VERSION_DIRECTED_EOI
            } else {
                0
            };
        state.set(reg::VERSION, version);
        if x2apic {
            let id = self.initial_id;
            state.set(reg::ID, id);
            state.set(reg::LDR, x2apic_ldr(id));
        }
        state.update_ppr();
        let (lvt, initial, divide, current) = (
            state.timer_lvt(),
            state.get(reg::TIMER_INITIAL),
            state.get(reg::TIMER_DIVIDE),
            state.get(reg::TIMER_CURRENT),
        );
        state.timer.cancel();
        state.timer.set_divide(lvt, divide);
        state.timer.resume(lvt, initial, current);
        self.publish(&state);
        self.settle(&mut state);
        drop(state);
        self.mailbox.post(Request::EVENT);
        Ok(())
    }
}

/// Records a send error, or hands the message out.
fn send(state: &mut State, message: Message) -> Effect {
    let vectored = matches!(
        message.mode,
        DeliveryMode::Fixed | DeliveryMode::LowestPriority
    );
    if vectored && message.vector < 16 {
        state.report(ESR_SEND_ILLEGAL);
        return Effect::None;
    }
    Effect::Ipi(message)
}
