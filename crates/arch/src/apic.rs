//! The local APIC's register page, and what VT-x makes of accesses to it.
//!
//! Source: SDM volume 3, "Advanced Programmable Interrupt Controller (APIC)" and
//! "APIC Virtualization and Virtual Interrupts".

/// Register offsets in the xAPIC page.
pub mod reg {
    /// Local APIC ID.
    pub const ID: u32 = 0x20;
    /// Version.
    pub const VERSION: u32 = 0x30;
    /// Task priority.
    pub const TPR: u32 = 0x80;
    /// Arbitration priority.
    pub const APR: u32 = 0x90;
    /// Processor priority.
    pub const PPR: u32 = 0xa0;
    /// End of interrupt.
    pub const EOI: u32 = 0xb0;
    /// Remote read.
    pub const RRD: u32 = 0xc0;
    /// Logical destination.
    pub const LDR: u32 = 0xd0;
    /// Destination format.
    pub const DFR: u32 = 0xe0;
    /// Spurious-interrupt vector.
    pub const SVR: u32 = 0xf0;
    /// In-service: the first of eight registers.
    pub const ISR: u32 = 0x100;
    /// Trigger mode: the first of eight registers.
    pub const TMR: u32 = 0x180;
    /// Interrupt request: the first of eight registers.
    pub const IRR: u32 = 0x200;
    /// Error status.
    pub const ESR: u32 = 0x280;
    /// Interrupt command, low half.
    pub const ICR: u32 = 0x300;
    /// Interrupt command, high half.
    pub const ICR2: u32 = 0x310;
    /// Local vector table: timer.
    pub const LVT_TIMER: u32 = 0x320;
    /// Local vector table: thermal sensor.
    pub const LVT_THERMAL: u32 = 0x330;
    /// Local vector table: performance counters.
    pub const LVT_PMC: u32 = 0x340;
    /// Local vector table: LINT0.
    pub const LVT_LINT0: u32 = 0x350;
    /// Local vector table: LINT1.
    pub const LVT_LINT1: u32 = 0x360;
    /// Local vector table: errors.
    pub const LVT_ERROR: u32 = 0x370;
    /// Initial count of the timer.
    pub const TIMER_INITIAL: u32 = 0x380;
    /// Current count of the timer.
    pub const TIMER_CURRENT: u32 = 0x390;
    /// Divide configuration of the timer.
    pub const TIMER_DIVIDE: u32 = 0x3e0;
    /// Self IPI (x2APIC mode).
    pub const SELF_IPI: u32 = 0x3f0;
}

/// The register that x2APIC mode reaches as MSR `msr`: its offset in the page.
pub const fn offset_of_msr(msr: u32) -> Option<u32> {
    match msr {
        0x800..=0x8ff => Some((msr & 0xff) << 4),
        _ => None,
    }
}

/// The offset and bit of `vector` in the 256-bit register that starts at `base` (ISR, TMR, IRR):
/// 32 bits in every 16 bytes.
pub const fn vector_position(base: u32, vector: u8) -> (u32, u32) {
    (base + (vector as u32 >> 5 << 4), vector as u32 & 31)
}

/// The vector that a write of `icr` to the low half of the interrupt command register sends to
/// the processor itself, if it is an interrupt that a processor can virtualize: fixed, edge,
/// destination shorthand "self", vector 16 or above, no reserved bit.
pub const fn self_ipi_vector(icr: u32) -> Option<u8> {
    const RESERVED_AND_STATUS: u32 = 0xfff0_0000 | 0b11 << 16 | 1 << 13 | 1 << 12;
    const SHORTHAND: u32 = 0b11 << 18;
    const SELF: u32 = 0b01 << 18;
    const LEVEL_TRIGGERED: u32 = 1 << 15;
    const DELIVERY_MODE: u32 = 0b111 << 8;
    let plain = icr & (RESERVED_AND_STATUS | LEVEL_TRIGGERED | DELIVERY_MODE) == 0;
    if plain && icr & SHORTHAND == SELF && icr & 0xf0 != 0 {
        Some(icr as u8)
    } else {
        None
    }
}

/// The execution controls that decide what becomes of an access to the APIC-access page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageControls {
    /// "Use TPR shadow".
    pub tpr_shadow: bool,
    /// "APIC-register virtualization".
    pub registers: bool,
    /// "Virtual-interrupt delivery".
    pub delivery: bool,
}

impl PageControls {
    /// Whether a read of `size` bytes at `offset` is answered by the virtual-APIC page. Others
    /// exit.
    pub const fn virtualizes_read(self, offset: u32, size: usize) -> bool {
        if !self.tpr_shadow || !is_inside_register(offset, size) {
            return false;
        }
        let register = offset & !3;
        if self.registers {
            is_writable(register)
                || matches!(register, reg::VERSION)
                || matches!(register, reg::ISR..=0x270)
        } else {
            register == reg::TPR
        }
    }

    /// Whether a write of `size` bytes at `offset` goes to the virtual-APIC page. Others exit.
    pub const fn virtualizes_write(self, offset: u32, size: usize) -> bool {
        if !self.tpr_shadow || !is_inside_register(offset, size) {
            return false;
        }
        let register = offset & !3;
        if self.registers {
            is_writable(register)
        } else if self.delivery {
            matches!(offset, reg::TPR | reg::EOI | reg::ICR)
        } else {
            offset == reg::TPR
        }
    }
}

/// Whether the access lies in the low four bytes of a naturally aligned 16-byte region.
const fn is_inside_register(offset: u32, size: usize) -> bool {
    size != 0 && size <= 4 && (offset & 0xf) as usize + size <= 4
}

/// Whether APIC-register virtualization takes writes to the register.
const fn is_writable(register: u32) -> bool {
    matches!(
        register,
        reg::ID
            | reg::TPR
            | reg::EOI
            | reg::LDR
            | reg::DFR
            | reg::SVR
            | reg::ESR
            | reg::ICR
            | reg::ICR2
            | reg::LVT_TIMER
            | reg::LVT_THERMAL
            | reg::LVT_PMC
            | reg::LVT_LINT0
            | reg::LVT_LINT1
            | reg::LVT_ERROR
            | reg::TIMER_INITIAL
            | reg::TIMER_DIVIDE
    )
}

/// Guest interrupt status: the requesting and the servicing virtual interrupt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct InterruptStatus(pub u16);

impl InterruptStatus {
    /// A status from both vectors.
    pub const fn new(requesting: u8, servicing: u8) -> Self {
        InterruptStatus(requesting as u16 | (servicing as u16) << 8)
    }

    /// RVI: the highest vector that waits to be delivered, 0 for none.
    pub const fn requesting(self) -> u8 {
        self.0 as u8
    }

    /// SVI: the highest vector whose handler runs, 0 for none.
    pub const fn servicing(self) -> u8 {
        (self.0 >> 8) as u8
    }
}

/// The access type in the qualification of an APIC-access exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum AccessType {
    /// A data read by an instruction.
    Read = 0,
    /// A data write by an instruction.
    Write = 1,
    /// An instruction fetch.
    Fetch = 2,
    /// A read or write during event delivery.
    Delivery = 3,
    /// An access to a paging structure during event delivery.
    PhysicalDelivery = 10,
    /// An access to a paging structure for an instruction or its fetch.
    Physical = 15,
}

/// The exit qualification of an APIC access at `offset`.
pub const fn access_qualification(kind: AccessType, offset: u32) -> u64 {
    (offset & 0xfff) as u64 | (kind as u64) << 12
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_interrupts_to_oneself_are_virtualized() {
        assert_eq!(self_ipi_vector(0x4_0031), Some(0x31));
        for refused in [
            0x4_000f, 0x31, 0x8_0031, 0xc_0031, 0x4_8031, 0x4_0431, 0x4_1031, 0x4_2031, 0x5_0031,
            0x14_0031,
        ] {
            assert_eq!(self_ipi_vector(refused), None, "{refused:#x}");
        }
    }

    #[test]
    fn what_is_virtualized_follows_the_controls() {
        let tpr = PageControls {
            tpr_shadow: true,
            ..PageControls::default()
        };
        let delivery = PageControls {
            delivery: true,
            ..tpr
        };
        let registers = PageControls {
            registers: true,
            ..tpr
        };
        let reads = |c: PageControls| (0..0x1000).filter(|&o| c.virtualizes_read(o, 4)).count();
        let writes = |c: PageControls| (0..0x1000).filter(|&o| c.virtualizes_write(o, 4)).count();
        assert_eq!(
            [
                reads(PageControls::default()),
                writes(PageControls::default())
            ],
            [0, 0]
        );
        assert_eq!([reads(tpr), writes(tpr)], [1, 1]);
        assert_eq!([reads(delivery), writes(delivery)], [1, 3]);
        assert_eq!([reads(registers), writes(registers)], [42, 17]);
        // Narrow accesses inside a register, none beyond it.
        assert!(registers.virtualizes_read(0x82, 2) && !registers.virtualizes_read(0x83, 2));
        assert!(!registers.virtualizes_read(0x80, 8) && !registers.virtualizes_read(0x84, 4));
    }
}
