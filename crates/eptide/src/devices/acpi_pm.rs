//! ACPI fixed hardware: PM1 event and control registers and the reset register.
//!
//! Nothing in the machine raises an ACPI event, so status reads as zero and enable bits are just
//! remembered. Writing SLP_EN with the type that `\_S5` names switches the machine off.

use crate::machine::bus::Device;
use crate::machine::outcome::{Outcome, Stop};

/// PM1 status (2 bytes) and enable (2 bytes), relative to the block.
pub(crate) const PM1_EVENT: u16 = 0;
/// PM1 control (2 bytes).
pub(crate) const PM1_CONTROL: u16 = 4;
/// Reset register (1 byte).
pub(crate) const RESET: u16 = 8;
/// What the reset register wants to see.
pub(crate) const RESET_VALUE: u8 = 6;
/// Length of the block in ports.
pub(crate) const LENGTH: u16 = 16;
/// SLP_TYP that `\_S5` names.
pub(crate) const SLEEP_TYPE_S5: u8 = 5;

const SCI_EN: u16 = 1;
const SLEEP_TYPE_SHIFT: u16 = 10;
const SLEEP_TYPE_MASK: u16 = 7;
const SLEEP_ENABLE: u16 = 1 << 13;

/// The register block.
pub(crate) struct AcpiPm {
    enable: u16,
    control: u16,
    stop: Stop,
}

impl AcpiPm {
    /// A block that reports power-off and reset to `stop`.
    pub(crate) fn new(stop: Stop) -> Self {
        Self {
            enable: 0,
            control: SCI_EN,
            stop,
        }
    }

    fn registers(&self) -> [u8; LENGTH as usize] {
        let mut bytes = [0; LENGTH as usize];
        bytes[2..4].copy_from_slice(&self.enable.to_le_bytes());
        bytes[4..6].copy_from_slice(&self.control.to_le_bytes());
        bytes
    }

    fn write_control(&mut self, value: u16) {
        self.control = (value & !SLEEP_ENABLE) | SCI_EN;
        let sleep_type = value >> SLEEP_TYPE_SHIFT & SLEEP_TYPE_MASK;
        if value & SLEEP_ENABLE != 0 && sleep_type == u16::from(SLEEP_TYPE_S5) {
            self.stop.request(Outcome::PowerOff);
        }
    }
}

impl Device for AcpiPm {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let registers = self.registers();
        for (byte, at) in data.iter_mut().zip(offset as usize..) {
            *byte = registers.get(at).copied().unwrap_or(0xff);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset as u16, data) {
            (2, [low, high]) => self.enable = u16::from_le_bytes([*low, *high]),
            (PM1_EVENT, [_, _, low, high]) => self.enable = u16::from_le_bytes([*low, *high]),
            (PM1_CONTROL, [low, high]) => self.write_control(u16::from_le_bytes([*low, *high])),
            (RESET, [RESET_VALUE]) => self.stop.request(Outcome::Reset),
            _ => tracing::debug!(offset, ?data, "ACPI write without effect"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(offset: u16, data: &[u8]) -> Option<Outcome> {
        let stop = Stop::new().unwrap();
        AcpiPm::new(stop.clone()).write(u64::from(offset), data);
        stop.outcome()
    }

    #[test]
    fn sleep_type_five_with_enable_is_power_off() {
        let s5 = u16::from(SLEEP_TYPE_S5) << SLEEP_TYPE_SHIFT;
        assert_eq!(after(PM1_CONTROL, &s5.to_le_bytes()), None);
        assert_eq!(after(PM1_CONTROL, &SLEEP_ENABLE.to_le_bytes()), None);
        let off = s5 | SLEEP_ENABLE;
        assert_eq!(
            after(PM1_CONTROL, &off.to_le_bytes()),
            Some(Outcome::PowerOff)
        );
    }

    #[test]
    fn the_reset_register_wants_its_value() {
        assert_eq!(after(RESET, &[1]), None);
        assert_eq!(after(RESET, &[RESET_VALUE]), Some(Outcome::Reset));
    }

    #[test]
    fn enable_bits_read_back_and_acpi_mode_is_on() {
        let mut pm = AcpiPm::new(Stop::new().unwrap());
        pm.write(2, &[0x20, 0x01]);
        let mut event = [0xaa; 4];
        pm.read(0, &mut event);
        assert_eq!(event, [0, 0, 0x20, 0x01]);
        let mut control = [0; 2];
        pm.read(4, &mut control);
        assert_eq!(control, [1, 0]);
    }
}
