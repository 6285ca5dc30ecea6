//! CR0, CR3, CR4, EFER, XCR0, RFLAGS and the debug registers.
//!
//! Source: SDM volume 3, "Control Registers", "Extended Feature Enable Register",
//! "Extended Control Registers", "Debug Registers"; volume 1, "EFLAGS Register".
//!
//! The types are bit sets over the full register width and keep unknown bits, because a guest
//! may try to load them and the fault it gets is decided elsewhere.

use bitflags::bitflags;

bitflags! {
    /// Control register 0.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Cr0: u64 {
        /// Protection enable.
        const PE = 1 << 0;
        /// Monitor coprocessor.
        const MP = 1 << 1;
        /// Emulation: x87 instructions raise #NM.
        const EM = 1 << 2;
        /// Task switched: FPU instructions raise #NM.
        const TS = 1 << 3;
        /// Extension type; always one.
        const ET = 1 << 4;
        /// Numeric error: x87 errors raise #MF.
        const NE = 1 << 5;
        /// Write protect: supervisor writes respect read-only pages.
        const WP = 1 << 16;
        /// Alignment mask.
        const AM = 1 << 18;
        /// Not write-through.
        const NW = 1 << 29;
        /// Cache disable.
        const CD = 1 << 30;
        /// Paging.
        const PG = 1 << 31;
        const _ = !0;
    }
}

bitflags! {
    /// Control register 3: the paging root and, with CR4.PCIDE, the PCID.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Cr3: u64 {
        /// Page-level write-through of the root table.
        const PWT = 1 << 3;
        /// Page-level cache disable of the root table.
        const PCD = 1 << 4;
        /// In the operand of `MOV CR3`: keep the TLB entries of the new PCID.
        const NO_FLUSH = 1 << 63;
        const _ = !0;
    }
}

impl Cr3 {
    /// Mask of the process-context identifier.
    pub const PCID_MASK: u64 = 0xfff;
}

bitflags! {
    /// Control register 4.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Cr4: u64 {
        /// Virtual-8086 mode extensions.
        const VME = 1 << 0;
        /// Protected-mode virtual interrupts.
        const PVI = 1 << 1;
        /// Time-stamp disable: RDTSC only at CPL 0.
        const TSD = 1 << 2;
        /// Debugging extensions.
        const DE = 1 << 3;
        /// Page-size extensions.
        const PSE = 1 << 4;
        /// Physical-address extension.
        const PAE = 1 << 5;
        /// Machine-check enable.
        const MCE = 1 << 6;
        /// Global pages.
        const PGE = 1 << 7;
        /// RDPMC at any CPL.
        const PCE = 1 << 8;
        /// FXSAVE, FXRSTOR and SSE are supported by the system.
        const OSFXSR = 1 << 9;
        /// Unmasked SIMD exceptions are supported by the system.
        const OSXMMEXCPT = 1 << 10;
        /// User-mode instruction prevention.
        const UMIP = 1 << 11;
        /// 57-bit linear addresses.
        const LA57 = 1 << 12;
        /// VMX enable.
        const VMXE = 1 << 13;
        /// SMX enable.
        const SMXE = 1 << 14;
        /// RDFSBASE and its family.
        const FSGSBASE = 1 << 16;
        /// Process-context identifiers.
        const PCIDE = 1 << 17;
        /// XSAVE and extended states are supported by the system.
        const OSXSAVE = 1 << 18;
        /// Key locker.
        const KL = 1 << 19;
        /// Supervisor-mode execution prevention.
        const SMEP = 1 << 20;
        /// Supervisor-mode access prevention.
        const SMAP = 1 << 21;
        /// Protection keys for user pages.
        const PKE = 1 << 22;
        /// Control-flow enforcement.
        const CET = 1 << 23;
        /// Protection keys for supervisor pages.
        const PKS = 1 << 24;
        const _ = !0;
    }
}

bitflags! {
    /// IA32_EFER.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Efer: u64 {
        /// SYSCALL enable.
        const SCE = 1 << 0;
        /// Long mode enable.
        const LME = 1 << 8;
        /// Long mode active.
        const LMA = 1 << 10;
        /// No-execute enable.
        const NXE = 1 << 11;
        /// Secure virtual machine enable (AMD).
        const SVME = 1 << 12;
        /// Long mode segment limit enable (AMD).
        const LMSLE = 1 << 13;
        /// Fast FXSAVE and FXRSTOR (AMD).
        const FFXSR = 1 << 14;
        const _ = !0;
    }
}

bitflags! {
    /// RFLAGS.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Rflags: u64 {
        /// Carry.
        const CF = 1 << 0;
        /// Reserved, always one.
        const FIXED = 1 << 1;
        /// Parity of the low byte of the result.
        const PF = 1 << 2;
        /// Auxiliary carry.
        const AF = 1 << 4;
        /// Zero.
        const ZF = 1 << 6;
        /// Sign.
        const SF = 1 << 7;
        /// Trap: single step.
        const TF = 1 << 8;
        /// Interrupt enable.
        const IF = 1 << 9;
        /// Direction of string instructions.
        const DF = 1 << 10;
        /// Overflow.
        const OF = 1 << 11;
        /// I/O privilege level, low bit.
        const IOPL0 = 1 << 12;
        /// I/O privilege level, high bit.
        const IOPL1 = 1 << 13;
        /// Nested task.
        const NT = 1 << 14;
        /// Resume: instruction breakpoints are ignored for one instruction.
        const RF = 1 << 16;
        /// Virtual-8086 mode.
        const VM = 1 << 17;
        /// Alignment check, and SMAP override at CPL below 3.
        const AC = 1 << 18;
        /// Virtual interrupt flag.
        const VIF = 1 << 19;
        /// Virtual interrupt pending.
        const VIP = 1 << 20;
        /// CPUID is available.
        const ID = 1 << 21;
        const _ = !0;
    }
}

impl Rflags {
    /// The six status flags that arithmetic writes.
    pub const STATUS: Rflags = Rflags::from_bits_retain(
        Rflags::CF.bits()
            | Rflags::PF.bits()
            | Rflags::AF.bits()
            | Rflags::ZF.bits()
            | Rflags::SF.bits()
            | Rflags::OF.bits(),
    );

    /// The I/O privilege level, 0 to 3.
    pub const fn iopl(self) -> u8 {
        (self.bits() >> 12 & 3) as u8
    }
}

bitflags! {
    /// Extended control register 0: which XSAVE components are enabled.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Xcr0: u64 {
        /// x87 state; always one.
        const X87 = 1 << 0;
        /// XMM registers and MXCSR.
        const SSE = 1 << 1;
        /// Upper halves of YMM registers.
        const AVX = 1 << 2;
        /// MPX bound registers.
        const BNDREGS = 1 << 3;
        /// MPX bound configuration.
        const BNDCSR = 1 << 4;
        /// AVX-512 mask registers.
        const OPMASK = 1 << 5;
        /// Upper halves of ZMM0 to ZMM15.
        const ZMM_HI256 = 1 << 6;
        /// ZMM16 to ZMM31.
        const HI16_ZMM = 1 << 7;
        /// PKRU.
        const PKRU = 1 << 9;
        const _ = !0;
    }
}

bitflags! {
    /// Debug register 6: what a #DB reports.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Dr6: u64 {
        /// Breakpoint 0 met its condition.
        const B0 = 1 << 0;
        /// Breakpoint 1 met its condition.
        const B1 = 1 << 1;
        /// Breakpoint 2 met its condition.
        const B2 = 1 << 2;
        /// Breakpoint 3 met its condition.
        const B3 = 1 << 3;
        /// A bus lock was taken when this is clear (where supported); else always one.
        const BLD = 1 << 11;
        /// Debug-register access with DR7.GD.
        const BD = 1 << 13;
        /// Single step.
        const BS = 1 << 14;
        /// Task switch with the T flag.
        const BT = 1 << 15;
        /// Outside a transactional region; always one without RTM.
        const RTM = 1 << 16;
        const _ = !0;
    }
}

impl Dr6 {
    /// Bits that read as one.
    pub const FIXED_1: u64 = 0xffff_0ff0;
    /// The bits that can change (B0 to B3, BD, BS, BT).
    pub const VOLATILE: u64 = 0x0000_e00f;
}

bitflags! {
    /// Debug register 7: breakpoint control. Conditions and lengths are read with methods.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Dr7: u64 {
        /// Local exact breakpoint enable.
        const LE = 1 << 8;
        /// Global exact breakpoint enable.
        const GE = 1 << 9;
        /// Restricted transactional memory.
        const RTM = 1 << 11;
        /// General detect enable.
        const GD = 1 << 13;
        const _ = !0;
    }
}

/// What kind of access a breakpoint of [`Dr7`] watches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BreakpointCondition {
    /// Instruction execution.
    Execute,
    /// Data writes.
    Write,
    /// Port I/O, with CR4.DE.
    Io,
    /// Data reads and writes.
    ReadWrite,
}

impl Dr7 {
    /// The bit that reads as one.
    pub const FIXED_1: u64 = 1 << 10;
    /// Local and global enable bits of all four breakpoints.
    pub const ENABLES: u64 = 0xff;

    /// Whether breakpoint `n` (0 to 3) is enabled, locally or globally.
    pub const fn enabled(self, n: u32) -> bool {
        self.bits() >> (2 * n) & 3 != 0
    }

    /// The condition of breakpoint `n` (0 to 3).
    pub const fn condition(self, n: u32) -> BreakpointCondition {
        match self.bits() >> (16 + 4 * n) & 3 {
            0 => BreakpointCondition::Execute,
            1 => BreakpointCondition::Write,
            2 => BreakpointCondition::Io,
            _ => BreakpointCondition::ReadWrite,
        }
    }

    /// The length in bytes that breakpoint `n` (0 to 3) covers.
    pub const fn length(self, n: u32) -> u64 {
        match self.bits() >> (18 + 4 * n) & 3 {
            0 => 1,
            1 => 2,
            2 => 8,
            _ => 4,
        }
    }
}

const _: () = assert!(Rflags::STATUS.bits() == 0x8d5);
const _: () = assert!(Dr6::FIXED_1 & Dr6::VOLATILE == 0);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dr7_fields() {
        // Breakpoint 1: locally enabled, write, 4 bytes.
        let dr7 = Dr7::from_bits_retain(0b01 << 2 | 0b1101 << 20);
        assert!(dr7.enabled(1) && !dr7.enabled(0));
        assert_eq!(dr7.condition(1), BreakpointCondition::Write);
        assert_eq!(dr7.length(1), 4);
    }
}
