//! The I/O APIC: 24 pins and their redirection entries.
//!
//! Edge pins send one message per rising edge, unless masked, when the edge is lost. Level pins
//! send while the line is high and no earlier message awaits its EOI (`remote IRR`).
//!
//! Source: Intel 82093AA data sheet.

use super::apics::Apics;
use super::message::{Delivery, Message};
use kvm_bindings::{kvm_ioapic_state, kvm_ioapic_state__bindgen_ty_1};

/// Number of pins.
pub const PINS: usize = 24;
/// Address of the register page at reset.
pub const DEFAULT_BASE: u64 = 0xfec0_0000;
/// Bytes the registers occupy.
pub const SIZE: u64 = 0x100;

const VERSION: u32 = 0x11 | (PINS as u32 - 1) << 16;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
/// Delivery status and remote IRR cannot be written.
const READ_ONLY: u64 = 1 << 12 | REMOTE_IRR;
const IMPLEMENTED: u64 = 0xff00_0000_0001_ffff;

/// The I/O APIC's registers.
#[derive(Debug)]
pub struct IoApic {
    select: u32,
    id: u32,
    base: u64,
    entries: [u64; PINS],
    /// Lines that are high.
    lines: u32,
}

impl Default for IoApic {
    fn default() -> IoApic {
        IoApic {
            select: 0,
            id: 0,
            base: DEFAULT_BASE,
            entries: [MASKED; PINS],
            lines: 0,
        }
    }
}

impl IoApic {
    /// Whether the register page holds `gpa`.
    pub fn decodes(&self, gpa: u64) -> bool {
        gpa.wrapping_sub(self.base) < SIZE
    }

    /// Drives a pin.
    pub fn set_line(&mut self, pin: usize, high: bool, apics: &Apics) -> Delivery {
        let mask = 1 << pin;
        let was_high = self.lines & mask != 0;
        if !high {
            self.lines &= !mask;
            return Delivery::Taken(1);
        }
        self.lines |= mask;
        if self.entries[pin] & LEVEL == 0 && was_high {
            return Delivery::Coalesced;
        }
        self.service(pin, apics)
    }

    /// Sends the message of a pin whose line is high, if nothing prevents it.
    fn service(&mut self, pin: usize, apics: &Apics) -> Delivery {
        let entry = self.entries[pin];
        if entry & MASKED != 0 {
            return Delivery::Ignored;
        }
        if entry & LEVEL != 0 && entry & REMOTE_IRR != 0 {
            return Delivery::Coalesced;
        }
        let delivery = apics.deliver(&Message::from_redirection(entry), None);
        if entry & LEVEL != 0 && delivery != Delivery::Ignored {
            self.entries[pin] |= REMOTE_IRR;
        }
        delivery
    }

    /// The pins that send `vector`: those an EOI for it concerns.
    pub fn pins_of(&self, vector: u8) -> impl Iterator<Item = usize> + '_ {
        (0..PINS).filter(move |&pin| self.entries[pin] as u8 == vector)
    }

    /// Whether a pin is level-triggered.
    pub fn is_level(&self, pin: usize) -> bool {
        self.entries[pin] & LEVEL != 0
    }

    /// Whether a pin is masked.
    pub fn is_masked(&self, pin: usize) -> bool {
        self.entries[pin] & MASKED != 0
    }

    /// The end of interrupt for what `pin` sent: sends again if the line is still high.
    pub fn end_of_interrupt(&mut self, pin: usize, apics: &Apics) {
        if self.entries[pin] & LEVEL == 0 {
            return;
        }
        self.entries[pin] &= !REMOTE_IRR;
        if self.lines >> pin & 1 != 0 {
            self.service(pin, apics);
        }
    }

    /// Reads the register page.
    pub fn read(&self, offset: u64) -> u32 {
        match offset & 0xf0 {
            0x00 => self.select,
            0x10 => self.read_indirect(),
            _ => 0,
        }
    }

    fn read_indirect(&self) -> u32 {
        match self.select {
            0 | 2 => (self.id & 0xf) << 24,
            1 => VERSION,
            0x10..=0x3f => {
                let entry = self.entries[(self.select as usize - 0x10) / 2];
                if self.select & 1 != 0 {
                    (entry >> 32) as u32
                } else {
                    entry as u32
                }
            }
            _ => 0,
        }
    }

    /// Writes the register page.
    pub fn write(&mut self, offset: u64, value: u32, apics: &Apics) {
        match offset & 0xf0 {
            0x00 => self.select = value & 0xff,
            0x10 => self.write_indirect(value, apics),
            _ => {}
        }
    }

    fn write_indirect(&mut self, value: u32, apics: &Apics) {
        match self.select {
            0 => self.id = value >> 24 & 0xf,
            0x10..=0x3f => {
                let pin = (self.select as usize - 0x10) / 2;
                let old = self.entries[pin];
                let written = if self.select & 1 != 0 {
                    old & 0xffff_ffff | (value as u64) << 32
                } else {
                    old & !0xffff_ffff | value as u64
                };
                let mut new = written & !READ_ONLY & IMPLEMENTED | old & READ_ONLY;
                if new & LEVEL == 0 {
                    // Software clears a stuck remote IRR by switching to edge and back.
                    new &= !REMOTE_IRR;
                }
                self.entries[pin] = new;
                if new & LEVEL != 0 && self.lines >> pin & 1 != 0 {
                    self.service(pin, apics);
                }
            }
            _ => {}
        }
    }

    /// KVM_GET_IRQCHIP.
    pub fn state(&self) -> kvm_ioapic_state {
        let mut state = kvm_ioapic_state {
            base_address: self.base,
            ioregsel: self.select,
            id: self.id,
            irr: self.lines,
            ..Default::default()
        };
        for (slot, &entry) in state.redirtbl.iter_mut().zip(&self.entries) {
            *slot = kvm_ioapic_state__bindgen_ty_1 { bits: entry };
        }
        state
    }

    /// KVM_SET_IRQCHIP.
    pub fn set_state(&mut self, state: &kvm_ioapic_state, apics: &Apics) {
        self.base = state.base_address;
        self.select = state.ioregsel & 0xff;
        self.id = state.id & 0xf;
        for (entry, slot) in self.entries.iter_mut().zip(&state.redirtbl) {
            // SAFETY: both members of the union are plain 64-bit data.
            *entry = unsafe { slot.bits };
        }
        self.lines = 0;
        for pin in 0..PINS {
            if state.irr >> pin & 1 != 0 {
                self.set_line(pin, true, apics);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::irqchip::lapic::{ApicConfig, LocalApic, reg};
    use crate::mailbox::tests::mailbox;
    use crate::timers::Timers;
    use std::sync::Arc;

    fn machine() -> (Arc<LocalApic>, Apics) {
        let config = ApicConfig {
            wide_ids: false,
            directed_eoi: false,
            lint0_enabled: true,
        };
        let apic = LocalApic::new(0, true, config, mailbox(), &Timers::new());
        apic.write(reg::SVR, 0x1ff).unwrap();
        let apics = Apics::default();
        apics.add(apic.clone());
        (apic, apics)
    }

    fn program(ioapic: &mut IoApic, pin: u32, low: u32, apics: &Apics) {
        ioapic.write(0, 0x10 + pin * 2, apics);
        ioapic.write(0x10, low, apics);
    }

    #[test]
    fn edges_send_once() {
        let (apic, apics) = machine();
        let mut ioapic = IoApic::default();
        assert_eq!(
            ioapic.set_line(4, true, &apics),
            Delivery::Ignored,
            "masked"
        );
        ioapic.set_line(4, false, &apics);
        program(&mut ioapic, 4, 0x34, &apics);
        assert_eq!(ioapic.set_line(4, true, &apics), Delivery::Taken(1));
        assert_eq!(ioapic.set_line(4, true, &apics), Delivery::Coalesced);
        assert_eq!(apic.acknowledge(), Some(0x34));
        assert_eq!(apic.deliverable(), None);
    }

    #[test]
    fn levels_send_until_the_line_falls() {
        let (apic, apics) = machine();
        let mut ioapic = IoApic::default();
        program(&mut ioapic, 9, 0x8039, &apics);
        assert_eq!(ioapic.set_line(9, true, &apics), Delivery::Taken(1));
        assert_eq!(ioapic.set_line(9, true, &apics), Delivery::Coalesced);
        assert_eq!(apic.acknowledge(), Some(0x39));
        apic.end_of_interrupt();
        assert_eq!(ioapic.pins_of(0x39).collect::<Vec<_>>(), [9]);
        ioapic.end_of_interrupt(9, &apics);
        assert_eq!(apic.acknowledge(), Some(0x39), "still high");
        apic.end_of_interrupt();
        ioapic.set_line(9, false, &apics);
        ioapic.end_of_interrupt(9, &apics);
        assert_eq!(apic.deliverable(), None);
    }

    #[test]
    fn unmasking_a_high_level_line_sends() {
        let (apic, apics) = machine();
        let mut ioapic = IoApic::default();
        program(&mut ioapic, 2, 0x1_8032, &apics);
        assert_eq!(ioapic.set_line(2, true, &apics), Delivery::Ignored);
        program(&mut ioapic, 2, 0x8032, &apics);
        assert_eq!(apic.acknowledge(), Some(0x32));
    }

    #[test]
    fn registers_and_state() {
        let (_, apics) = machine();
        let mut ioapic = IoApic::default();
        ioapic.write(0, 1, &apics);
        assert_eq!(ioapic.read(0x10), 0x0017_0011);
        program(&mut ioapic, 23, 0xffff_ffff, &apics);
        assert_eq!(ioapic.read(0x10), 0x1_afff);
        let state = ioapic.state();
        let mut other = IoApic::default();
        other.set_state(&state, &apics);
        assert_eq!(other.entries, ioapic.entries);
    }
}
