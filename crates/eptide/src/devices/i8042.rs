//! The keyboard controller's one duty here: command 0xfe pulses the reset line.

use crate::machine::bus::Device;
use crate::machine::outcome::{Outcome, Stop};

const PULSE_RESET: u8 = 0xfe;

/// Port 0x64 of a controller without keyboard or mouse.
pub(crate) struct I8042 {
    stop: Stop,
}

impl I8042 {
    /// A controller that reports reset to `stop`.
    pub(crate) fn new(stop: Stop) -> Self {
        Self { stop }
    }
}

impl Device for I8042 {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        // Status: both buffers empty, so that a kernel waiting to send a command goes ahead.
        data.fill(0);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        if data == [PULSE_RESET] {
            self.stop.request(Outcome::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_pulse_command_resets() {
        let stop = Stop::new().unwrap();
        let mut device = I8042::new(stop.clone());
        device.write(0, &[0xd1]);
        assert_eq!(stop.outcome(), None);
        device.write(0, &[PULSE_RESET]);
        assert_eq!(stop.outcome(), Some(Outcome::Reset));
    }
}
