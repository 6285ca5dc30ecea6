//! Two cascaded 8259A interrupt controllers and the edge/level registers beside them.
//!
//! The pair drives one wire, INTR. What is on the wire changes with every access, so each
//! operation returns nothing and the owner asks [`PicPair::output`] afterwards.
//!
//! Source: Intel 8259A data sheet; 82371 data sheet for ELCR.

use kvm_bindings::kvm_pic_state;

/// The input of the first controller that the second is wired to.
const CASCADE: u8 = 2;

/// One 8259A.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Pic {
    /// Line levels last seen, for edges.
    last_irr: u8,
    irr: u8,
    imr: u8,
    isr: u8,
    /// The input with the highest priority.
    priority_add: u8,
    irq_base: u8,
    read_isr: bool,
    poll: bool,
    special_mask: bool,
    /// Which initialisation word comes next; 0 when initialised.
    init_state: u8,
    auto_eoi: bool,
    rotate_on_auto_eoi: bool,
    special_fully_nested: bool,
    init4: bool,
    elcr: u8,
}

impl Pic {
    /// Priority of the highest bit of `mask`: 0 is highest, 8 means none.
    fn priority(&self, mask: u8) -> u8 {
        mask.rotate_right(self.priority_add as u32)
            .trailing_zeros()
            .min(8) as u8
    }

    fn input(&self, priority: u8) -> u8 {
        priority.wrapping_add(self.priority_add) & 7
    }

    /// The input that raises INTR now.
    fn requested(&self, is_primary: bool) -> Option<u8> {
        let request = self.priority(self.irr & !self.imr);
        if request == 8 {
            return None;
        }
        let mut in_service = self.isr;
        if self.special_mask {
            in_service &= !self.imr;
        }
        if self.special_fully_nested && is_primary {
            in_service &= !(1 << CASCADE);
        }
        (request < self.priority(in_service)).then(|| self.input(request))
    }

    /// Drives an input; true if that is a new request.
    fn set_line(&mut self, input: u8, high: bool) -> bool {
        let mask = 1 << input;
        let before = self.irr;
        if self.elcr & mask != 0 {
            if high {
                self.irr |= mask;
                self.last_irr |= mask;
            } else {
                self.irr &= !mask;
                self.last_irr &= !mask;
            }
        } else if high {
            if self.last_irr & mask == 0 {
                self.irr |= mask;
            }
            self.last_irr |= mask;
        } else {
            self.last_irr &= !mask;
        }
        self.irr & !before & mask != 0
    }

    fn acknowledge(&mut self, input: u8) {
        let mask = 1 << input;
        self.isr |= mask;
        if self.elcr & mask == 0 {
            self.irr &= !mask;
        }
        if self.auto_eoi {
            if self.rotate_on_auto_eoi {
                self.priority_add = (input + 1) & 7;
            }
            self.isr &= !mask;
        }
    }

    /// Writes the command port; returns the inputs whose service ended.
    fn write_command(&mut self, value: u8) -> u8 {
        if value & 0x10 != 0 {
            *self = Pic {
                elcr: self.elcr,
                irr: self.irr & self.elcr,
                last_irr: self.last_irr & self.elcr,
                ..Pic::default()
            };
            self.init4 = value & 1 != 0;
            self.init_state = 1;
            return 0;
        }
        if value & 0x08 != 0 {
            if value & 0x04 != 0 {
                self.poll = true;
            }
            if value & 0x02 != 0 {
                self.read_isr = value & 1 != 0;
            }
            if value & 0x40 != 0 {
                self.special_mask = value >> 5 & 1 != 0;
            }
            return 0;
        }
        self.write_ocw2(value)
    }

    fn write_ocw2(&mut self, value: u8) -> u8 {
        let (rotate, specific, eoi) = (value & 0x80 != 0, value & 0x40 != 0, value & 0x20 != 0);
        let level = value & 7;
        match (rotate, specific, eoi) {
            (_, false, false) => {
                self.rotate_on_auto_eoi = rotate;
                0
            }
            (_, false, true) => {
                let priority = self.priority(self.isr);
                if priority == 8 {
                    return 0;
                }
                let input = self.input(priority);
                if rotate {
                    self.priority_add = (input + 1) & 7;
                }
                self.isr &= !(1 << input);
                1 << input
            }
            (_, true, true) => {
                self.isr &= !(1 << level);
                if rotate {
                    self.priority_add = (level + 1) & 7;
                }
                1 << level
            }
            (true, true, false) => {
                self.priority_add = (level + 1) & 7;
                0
            }
            (false, true, false) => 0,
        }
    }

    fn write_data(&mut self, value: u8) {
        match self.init_state {
            0 => self.imr = value,
            1 => {
                self.irq_base = value & 0xf8;
                self.init_state = 2;
            }
            2 => self.init_state = if self.init4 { 3 } else { 0 },
            _ => {
                self.special_fully_nested = value >> 4 & 1 != 0;
                self.auto_eoi = value >> 1 & 1 != 0;
                self.init_state = 0;
            }
        }
    }

    fn poll_read(&mut self, is_primary: bool) -> u8 {
        self.poll = false;
        match self.requested(is_primary) {
            Some(input) => {
                self.acknowledge(input);
                0x80 | input
            }
            None => 0,
        }
    }

    fn read(&mut self, data_port: bool, is_primary: bool) -> u8 {
        if self.poll {
            self.poll_read(is_primary)
        } else if data_port {
            self.imr
        } else if self.read_isr {
            self.isr
        } else {
            self.irr
        }
    }

    fn state(&self, elcr_mask: u8) -> kvm_pic_state {
        kvm_pic_state {
            last_irr: self.last_irr,
            irr: self.irr,
            imr: self.imr,
            isr: self.isr,
            priority_add: self.priority_add,
            irq_base: self.irq_base,
            read_reg_select: self.read_isr as u8,
            poll: self.poll as u8,
            special_mask: self.special_mask as u8,
            init_state: self.init_state,
            auto_eoi: self.auto_eoi as u8,
            rotate_on_auto_eoi: self.rotate_on_auto_eoi as u8,
            special_fully_nested_mode: self.special_fully_nested as u8,
            init4: self.init4 as u8,
            elcr: self.elcr,
            elcr_mask,
        }
    }

    fn from_state(state: &kvm_pic_state) -> Pic {
        Pic {
            last_irr: state.last_irr,
            irr: state.irr,
            imr: state.imr,
            isr: state.isr,
            priority_add: state.priority_add & 7,
            irq_base: state.irq_base,
            read_isr: state.read_reg_select != 0,
            poll: state.poll != 0,
            special_mask: state.special_mask != 0,
            init_state: state.init_state & 3,
            auto_eoi: state.auto_eoi != 0,
            rotate_on_auto_eoi: state.rotate_on_auto_eoi != 0,
            special_fully_nested: state.special_fully_nested_mode != 0,
            init4: state.init4 != 0,
            elcr: state.elcr,
        }
    }
}

/// Inputs whose level trigger ELCR can select, per controller.
const ELCR_MASK: [u8; 2] = [0xf8, 0xde];

/// The two controllers, as the PC wires them.
#[derive(Clone, Copy, Debug, Default)]
pub struct PicPair {
    pics: [Pic; 2],
}

impl PicPair {
    /// Whether INTR is high.
    pub fn output(&self) -> bool {
        self.pics[0].requested(true).is_some()
    }

    fn update_cascade(&mut self) {
        let high = self.pics[1].requested(false).is_some();
        if high {
            // The wire between the two falls and rises with each acknowledge; a request that is
            // still there must be seen as a new edge.
            self.pics[0].set_line(CASCADE, false);
        }
        self.pics[0].set_line(CASCADE, high);
        if !high {
            self.pics[0].irr &= !(1 << CASCADE);
        }
    }

    /// Drives one of the 16 inputs; true if that is a new request.
    pub fn set_line(&mut self, irq: u8, high: bool) -> bool {
        let raised = self.pics[(irq >> 3 & 1) as usize].set_line(irq & 7, high);
        self.update_cascade();
        raised
    }

    /// Whether an input is masked.
    pub fn is_masked(&self, irq: u8) -> bool {
        self.pics[(irq >> 3 & 1) as usize].imr >> (irq & 7) & 1 != 0
    }

    /// The processor's interrupt acknowledge cycle: the vector, and the input it came from when
    /// its service ended at once (automatic EOI).
    pub fn acknowledge(&mut self) -> (u8, Option<u8>) {
        let Some(input) = self.pics[0].requested(true) else {
            return (self.pics[0].irq_base.wrapping_add(7), None);
        };
        self.pics[0].acknowledge(input);
        let (vector, irq, ended) = if input == CASCADE {
            let second = self.pics[1].requested(false);
            let line = second.unwrap_or(7);
            if second.is_some() {
                self.pics[1].acknowledge(line);
            }
            (
                self.pics[1].irq_base.wrapping_add(line),
                line + 8,
                self.pics[1].auto_eoi,
            )
        } else {
            let vector = self.pics[0].irq_base.wrapping_add(input);
            (vector, input, self.pics[0].auto_eoi)
        };
        self.update_cascade();
        (vector, ended.then_some(irq))
    }

    /// Writes a port; returns the inputs (bit n is IRQ n) whose service ended.
    pub fn write(&mut self, port: u16, value: u8) -> u16 {
        let ended = match port {
            0x20 => self.pics[0].write_command(value) as u16,
            0xa0 => (self.pics[1].write_command(value) as u16) << 8,
            0x21 => {
                self.pics[0].write_data(value);
                0
            }
            0xa1 => {
                self.pics[1].write_data(value);
                0
            }
            0x4d0 => {
                self.pics[0].elcr = value & ELCR_MASK[0];
                0
            }
            0x4d1 => {
                self.pics[1].elcr = value & ELCR_MASK[1];
                0
            }
            _ => 0,
        };
        self.update_cascade();
        ended
    }

    /// Reads a port.
    pub fn read(&mut self, port: u16) -> u8 {
        let value = match port {
            0x20 | 0x21 => self.pics[0].read(port & 1 != 0, true),
            0xa0 | 0xa1 => self.pics[1].read(port & 1 != 0, false),
            0x4d0 => self.pics[0].elcr,
            0x4d1 => self.pics[1].elcr,
            _ => 0xff,
        };
        self.update_cascade();
        value
    }

    /// KVM_GET_IRQCHIP of controller `chip` (0 or 1).
    pub fn state(&self, chip: usize) -> kvm_pic_state {
        self.pics[chip].state(ELCR_MASK[chip])
    }

    /// KVM_SET_IRQCHIP of controller `chip` (0 or 1).
    pub fn set_state(&mut self, chip: usize, state: &kvm_pic_state) {
        self.pics[chip] = Pic::from_state(state);
    }
}

/// Whether the pair decodes `port`.
pub fn decodes(port: u16) -> bool {
    matches!(port, 0x20 | 0x21 | 0xa0 | 0xa1 | 0x4d0 | 0x4d1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn initialised() -> PicPair {
        let mut pics = PicPair::default();
        for (port, value) in [
            (0x20, 0x11),
            (0x21, 0x30),
            (0x21, 0x04),
            (0x21, 0x01),
            (0xa0, 0x11),
            (0xa1, 0x38),
            (0xa1, 0x02),
            (0xa1, 0x01),
        ] {
            pics.write(port, value);
        }
        pics
    }

    #[test]
    fn vectors_and_eoi() {
        let mut pics = initialised();
        assert!(pics.set_line(4, true));
        assert!(pics.output());
        assert_eq!(pics.acknowledge(), (0x34, None));
        assert!(!pics.output());
        pics.set_line(4, false);
        assert!(pics.set_line(4, true));
        assert!(!pics.output(), "in service");
        assert_eq!(pics.write(0x20, 0x20), 1 << 4);
        assert!(pics.output());
    }

    #[test]
    fn second_controller_comes_through_the_cascade() {
        let mut pics = initialised();
        pics.set_line(12, true);
        assert_eq!(pics.acknowledge(), (0x3c, None));
        pics.set_line(14, true);
        assert!(!pics.output());
        assert_eq!(pics.write(0xa0, 0x64), 1 << 12, "specific EOI");
        pics.write(0x20, 0x62);
        assert_eq!(pics.acknowledge(), (0x3e, None));
    }

    #[test]
    fn masks_and_priorities() {
        let mut pics = initialised();
        pics.write(0x21, 0x02);
        pics.set_line(1, true);
        assert!(!pics.output());
        pics.set_line(5, true);
        pics.set_line(3, true);
        assert_eq!(pics.acknowledge().0, 0x33);
        pics.write(0x21, 0x00);
        assert_eq!(pics.acknowledge().0, 0x31, "higher priority nests");
        assert!(!pics.output());
    }

    #[test]
    fn level_inputs_and_spurious() {
        let mut pics = initialised();
        pics.write(0x4d1, 0xff);
        assert_eq!(pics.read(0x4d1), 0xde);
        pics.set_line(11, true);
        pics.set_line(11, false);
        assert!(!pics.output(), "level gone");
        pics.set_line(0, true);
        pics.write(0x21, 0x01);
        assert_eq!(pics.acknowledge(), (0x37, None), "spurious");
    }

    #[test]
    fn initialisation_keeps_levels_and_forgets_edges() {
        let mut pics = initialised();
        pics.write(0x4d0, 1 << 5);
        pics.set_line(5, true);
        pics.set_line(6, true);
        for (port, value) in [(0x20, 0x11), (0x21, 0x40), (0x21, 0x04), (0x21, 0x01)] {
            pics.write(port, value);
        }
        assert_eq!(pics.acknowledge().0, 0x45, "the line is high still");
        pics.set_line(5, false);
        pics.write(0x20, 0x20);
        assert!(!pics.output());
    }

    #[test]
    fn polling_acknowledges() {
        let mut pics = initialised();
        pics.write(0x20, 0x0c);
        assert_eq!(pics.read(0x20) & 0x80, 0, "nothing waits");
        pics.set_line(3, true);
        pics.write(0x20, 0x0c);
        assert_eq!(pics.read(0x20), 0x83);
        assert!(!pics.output());
        pics.write(0x20, 0x0b);
        assert_eq!(pics.read(0x20), 1 << 3, "in service");
        assert_eq!(pics.write(0x20, 0xa0), 1 << 3, "rotates");
        pics.set_line(4, true);
        pics.set_line(2, false);
        pics.set_line(1, true);
        assert_eq!(pics.acknowledge().0, 0x34, "4 is the highest now");
    }

    #[test]
    fn a_special_mask_lets_lower_ones_through() {
        let mut pics = initialised();
        pics.set_line(1, true);
        assert_eq!(pics.acknowledge().0, 0x31);
        pics.set_line(6, true);
        assert!(!pics.output());
        pics.write(0x20, 0x68);
        assert!(!pics.output(), "1 is not masked");
        pics.write(0x21, 0x02);
        assert_eq!(pics.acknowledge().0, 0x36);
    }

    #[test]
    fn automatic_ends_rotate_where_asked() {
        let mut pics = PicPair::default();
        for (port, value) in [(0x20, 0x11), (0x21, 0x30), (0x21, 0x04), (0x21, 0x03)] {
            pics.write(port, value);
        }
        pics.write(0x20, 0x80);
        pics.set_line(3, true);
        assert_eq!(pics.acknowledge(), (0x33, Some(3)));
        pics.set_line(3, false);
        pics.set_line(3, true);
        pics.set_line(5, true);
        assert_eq!(pics.acknowledge().0, 0x35, "3 is the lowest now");
        assert_eq!(pics.acknowledge().0, 0x33);
        pics.write(0x20, 0xc0 | 6);
        pics.set_line(0, true);
        pics.set_line(7, true);
        assert_eq!(pics.acknowledge().0, 0x37, "6 is the lowest");
    }

    #[test]
    fn state_round_trip() {
        let mut pics = initialised();
        pics.set_line(6, true);
        let mut other = PicPair::default();
        other.set_state(0, &pics.state(0));
        other.set_state(1, &pics.state(1));
        assert_eq!(other.pics, pics.pics);
    }
}
