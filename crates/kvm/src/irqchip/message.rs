//! Interrupt messages: what travels between interrupt controllers, and the formats it comes in.
//!
//! Source: SDM volume 3, "Interrupt Command Register (ICR)", "Message Signalled Interrupts";
//! the 82093AA data sheet, "I/O Redirection Table".

/// How a message is to be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum DeliveryMode {
    /// A vector for every destination.
    Fixed = 0,
    /// A vector for the destination with the lowest priority.
    LowestPriority = 1,
    /// System-management interrupt.
    Smi = 2,
    /// Reserved.
    Reserved = 3,
    /// Non-maskable interrupt.
    Nmi = 4,
    /// Reset to wait-for-SIPI.
    Init = 5,
    /// Start-up.
    Startup = 6,
    /// As if from the 8259.
    ExtInt = 7,
}

impl DeliveryMode {
    /// From the three-bit field.
    pub const fn from_bits(bits: u32) -> DeliveryMode {
        match bits & 7 {
            0 => DeliveryMode::Fixed,
            1 => DeliveryMode::LowestPriority,
            2 => DeliveryMode::Smi,
            3 => DeliveryMode::Reserved,
            4 => DeliveryMode::Nmi,
            5 => DeliveryMode::Init,
            6 => DeliveryMode::Startup,
            _ => DeliveryMode::ExtInt,
        }
    }
}

/// The ICR's destination shorthand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shorthand {
    /// Use the destination field.
    None,
    /// The sender.
    Own,
    /// Everyone.
    All,
    /// Everyone but the sender.
    Others,
}

/// An interrupt on its way to local APICs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// Destination: an APIC ID, or a logical destination.
    pub destination: u32,
    /// The destination is logical.
    pub logical: bool,
    /// Shorthand, for messages from a local APIC.
    pub shorthand: Shorthand,
    /// How it is taken.
    pub mode: DeliveryMode,
    /// Vector.
    pub vector: u8,
    /// Level-triggered.
    pub level: bool,
    /// Asserted; only an INIT may be de-asserted.
    pub assert: bool,
    /// The destination has 32 bits: it came from an x2APIC or in extended MSI format.
    pub wide: bool,
}

impl Message {
    /// The message of an ICR value. `wide` ICRs (x2APIC) hold the destination in bits 63:32,
    /// others in bits 63:56.
    pub fn from_icr(icr: u64, wide: bool) -> Message {
        Message {
            destination: if wide {
                (icr >> 32) as u32
            } else {
                (icr >> 56) as u32
            },
            logical: icr >> 11 & 1 != 0,
            shorthand: match icr >> 18 & 3 {
                0 => Shorthand::None,
                1 => Shorthand::Own,
                2 => Shorthand::All,
                _ => Shorthand::Others,
            },
            mode: DeliveryMode::from_bits((icr >> 8) as u32),
            vector: icr as u8,
            level: icr >> 15 & 1 != 0,
            assert: icr >> 14 & 1 != 0,
            wide,
        }
    }

    /// The message of an I/O APIC redirection entry.
    pub fn from_redirection(entry: u64) -> Message {
        Message {
            destination: (entry >> 56) as u32,
            logical: entry >> 11 & 1 != 0,
            shorthand: Shorthand::None,
            mode: DeliveryMode::from_bits((entry >> 8) as u32),
            vector: entry as u8,
            level: entry >> 15 & 1 != 0,
            assert: true,
            wide: false,
        }
    }

    /// The message of an MSI address and data pair.
    ///
    /// With `wide` (KVM_X2APIC_API_USE_32BIT_IDS) the upper address word holds destination bits
    /// 31:8 in its own bits 31:8.
    pub fn from_msi(address: u64, data: u32, wide: bool) -> Message {
        let low = (address >> 12 & 0xff) as u32;
        let high = (address >> 32) as u32 & !0xff;
        // Redirection hint: lowest priority whatever the data word says.
        let hint = address >> 3 & 1 != 0;
        let mode = DeliveryMode::from_bits(data >> 8);
        Message {
            destination: if wide { high | low } else { low },
            logical: address >> 2 & 1 != 0,
            shorthand: Shorthand::None,
            mode: if hint && mode == DeliveryMode::Fixed {
                DeliveryMode::LowestPriority
            } else {
                mode
            },
            vector: data as u8,
            level: data >> 15 & 1 != 0,
            assert: data >> 14 & 1 != 0 || data >> 15 & 1 == 0,
            wide,
        }
    }
}

/// What became of a message, in the terms of KVM_IRQ_LINE_STATUS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// Nobody took it: masked, or no destination.
    Ignored,
    /// Merged with one that was already pending.
    Coalesced,
    /// Taken by so many processors.
    Taken(u32),
}

impl Delivery {
    /// The outcome of two deliveries of one event.
    pub fn and(self, other: Delivery) -> Delivery {
        match (self, other) {
            (Delivery::Ignored, x) | (x, Delivery::Ignored) => x,
            (Delivery::Taken(a), Delivery::Taken(b)) => Delivery::Taken(a + b),
            (Delivery::Taken(a), _) | (_, Delivery::Taken(a)) => Delivery::Taken(a),
            _ => Delivery::Coalesced,
        }
    }

    /// The status that KVM_IRQ_LINE_STATUS reports.
    pub fn status(self) -> i32 {
        match self {
            Delivery::Ignored => -1,
            Delivery::Coalesced => 0,
            Delivery::Taken(n) => n as i32,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats() {
        let m = Message::from_msi(0xfee0_2004, 0x4041, false);
        assert_eq!(
            (m.destination, m.logical, m.vector, m.level),
            (2, true, 0x41, false)
        );
        let m = Message::from_msi(0x0000_0100_fee0_1000, 0x31, true);
        assert_eq!(m.destination, 0x101);
        let m = Message::from_icr(0x0300_0000_000c_4600, false);
        assert_eq!(
            (m.mode, m.shorthand),
            (DeliveryMode::Startup, Shorthand::Others)
        );
        let m = Message::from_redirection(0x0200_0000_0000_8930);
        assert_eq!((m.destination, m.logical, m.level), (2, true, true));
        assert_eq!(m.mode, DeliveryMode::LowestPriority);
    }
}
