//! The interruption-information formats of VM entry and VM exit.
//!
//! Source: SDM volume 3, "VM-Entry Controls for Event Injection", "Information for VM Exits Due
//! to Vectored Events" and "Information for VM Exits That Occur During Event Delivery". The
//! three fields share one layout.

/// What kind of event an [`InterruptionInfo`] names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum InterruptionType {
    /// External interrupt.
    ExternalInterrupt = 0,
    /// Reserved.
    Reserved = 1,
    /// Non-maskable interrupt.
    Nmi = 2,
    /// Hardware exception.
    HardwareException = 3,
    /// Software interrupt (`INT n`).
    SoftwareInterrupt = 4,
    /// Privileged software exception (`INT1`).
    PrivilegedSoftwareException = 5,
    /// Software exception (`INT3`, `INTO`).
    SoftwareException = 6,
    /// Other event: on entry, a pending monitor-trap-flag exit.
    Other = 7,
}

/// Interruption information: vector, type, whether an error code goes with it, validity.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct InterruptionInfo(pub u32);

impl InterruptionInfo {
    /// Deliver (or delivered) an error code.
    pub const ERROR_CODE: u32 = 1 << 11;
    /// On exits: the exit was taken while IRET unblocked NMIs. Undefined elsewhere.
    pub const NMI_UNBLOCKING: u32 = 1 << 12;
    /// The field holds an event.
    pub const VALID: u32 = 1 << 31;

    /// No event.
    pub const NONE: InterruptionInfo = InterruptionInfo(0);

    /// A valid event.
    pub const fn new(kind: InterruptionType, vector: u8, error_code: bool) -> Self {
        let error_code = if error_code { Self::ERROR_CODE } else { 0 };
        InterruptionInfo(Self::VALID | (kind as u32) << 8 | error_code | vector as u32)
    }

    /// Whether the field holds an event.
    pub const fn is_valid(self) -> bool {
        self.0 & Self::VALID != 0
    }

    /// Whether an error code goes with the event.
    pub const fn has_error_code(self) -> bool {
        self.0 & Self::ERROR_CODE != 0
    }

    /// The vector.
    pub const fn vector(self) -> u8 {
        self.0 as u8
    }

    /// The type of the event.
    pub const fn kind(self) -> InterruptionType {
        match self.0 >> 8 & 7 {
            0 => InterruptionType::ExternalInterrupt,
            1 => InterruptionType::Reserved,
            2 => InterruptionType::Nmi,
            3 => InterruptionType::HardwareException,
            4 => InterruptionType::SoftwareInterrupt,
            5 => InterruptionType::PrivilegedSoftwareException,
            6 => InterruptionType::SoftwareException,
            _ => InterruptionType::Other,
        }
    }

    /// Whether the event comes from an instruction, so that its length matters to delivery.
    pub const fn is_software(self) -> bool {
        matches!(
            self.kind(),
            InterruptionType::SoftwareInterrupt
                | InterruptionType::PrivilegedSoftwareException
                | InterruptionType::SoftwareException
        )
    }
}

const _: () = assert!(
    InterruptionInfo::ERROR_CODE & InterruptionInfo::VALID == 0
        && InterruptionInfo::ERROR_CODE & 0x7ff == 0
);
