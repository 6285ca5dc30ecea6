//! Exception vectors, their classes and the double-fault rules.
//!
//! Source: SDM volume 3, "Exception and Interrupt Vectors", "Exception Classifications" and
//! "Interrupt 8—Double Fault Exception (#DF)".

/// An architecturally defined exception vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Exception {
    /// #DE, divide error.
    DivideError = 0,
    /// #DB, debug.
    Debug = 1,
    /// Non-maskable interrupt.
    Nmi = 2,
    /// #BP, INT3.
    Breakpoint = 3,
    /// #OF, INTO.
    Overflow = 4,
    /// #BR, BOUND range exceeded.
    BoundRange = 5,
    /// #UD, invalid opcode.
    InvalidOpcode = 6,
    /// #NM, device not available.
    DeviceNotAvailable = 7,
    /// #DF, double fault.
    DoubleFault = 8,
    /// #TS, invalid TSS.
    InvalidTss = 10,
    /// #NP, segment not present.
    SegmentNotPresent = 11,
    /// #SS, stack-segment fault.
    StackFault = 12,
    /// #GP, general protection.
    GeneralProtection = 13,
    /// #PF, page fault.
    PageFault = 14,
    /// #MF, x87 floating-point error.
    X87 = 16,
    /// #AC, alignment check.
    AlignmentCheck = 17,
    /// #MC, machine check.
    MachineCheck = 18,
    /// #XM, SIMD floating-point.
    Simd = 19,
    /// #VE, virtualization.
    Virtualization = 20,
    /// #CP, control protection.
    ControlProtection = 21,
}

/// How an exception combines with one that strikes during its delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Handled one after the other.
    Benign,
    /// Two of them make a double fault.
    Contributory,
    /// Followed by a contributory exception or another page fault it makes a double fault.
    PageFault,
    /// A contributory exception or a page fault during its delivery shuts the processor down.
    DoubleFault,
}

impl Exception {
    /// All defined vectors in order.
    pub const ALL: [Exception; 20] = [
        Exception::DivideError,
        Exception::Debug,
        Exception::Nmi,
        Exception::Breakpoint,
        Exception::Overflow,
        Exception::BoundRange,
        Exception::InvalidOpcode,
        Exception::DeviceNotAvailable,
        Exception::DoubleFault,
        Exception::InvalidTss,
        Exception::SegmentNotPresent,
        Exception::StackFault,
        Exception::GeneralProtection,
        Exception::PageFault,
        Exception::X87,
        Exception::AlignmentCheck,
        Exception::MachineCheck,
        Exception::Simd,
        Exception::Virtualization,
        Exception::ControlProtection,
    ];

    /// The exception with this vector, if the architecture defines one.
    pub fn from_vector(vector: u8) -> Option<Exception> {
        Self::ALL.into_iter().find(|e| *e as u8 == vector)
    }

    /// The vector number.
    pub const fn vector(self) -> u8 {
        self as u8
    }

    /// Whether delivery pushes an error code (outside real mode).
    pub const fn has_error_code(self) -> bool {
        matches!(
            self,
            Exception::DoubleFault
                | Exception::InvalidTss
                | Exception::SegmentNotPresent
                | Exception::StackFault
                | Exception::GeneralProtection
                | Exception::PageFault
                | Exception::AlignmentCheck
                | Exception::ControlProtection
        )
    }

    /// The class that decides double faults.
    pub const fn class(self) -> Class {
        match self {
            Exception::DivideError
            | Exception::InvalidTss
            | Exception::SegmentNotPresent
            | Exception::StackFault
            | Exception::GeneralProtection
            | Exception::ControlProtection => Class::Contributory,
            Exception::PageFault | Exception::Virtualization => Class::PageFault,
            Exception::DoubleFault => Class::DoubleFault,
            _ => Class::Benign,
        }
    }
}

/// What becomes of an exception raised while another was being delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Combined {
    /// Deliver the second; the first is lost or comes again by itself.
    Second,
    /// Deliver a double fault with error code 0.
    DoubleFault,
    /// Shut down.
    TripleFault,
}

/// The double-fault rule for `second`, raised while `first` was being delivered.
pub const fn combine(first: Class, second: Class) -> Combined {
    match (first, second) {
        (Class::DoubleFault, Class::Contributory | Class::PageFault | Class::DoubleFault) => {
            Combined::TripleFault
        }
        (Class::Contributory, Class::Contributory)
        | (Class::PageFault, Class::Contributory | Class::PageFault) => Combined::DoubleFault,
        _ => Combined::Second,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn double_fault_table() {
        use Class::*;
        let table = [
            (Benign, PageFault, Combined::Second),
            (Contributory, Benign, Combined::Second),
            (Contributory, Contributory, Combined::DoubleFault),
            (Contributory, PageFault, Combined::Second),
            (PageFault, Contributory, Combined::DoubleFault),
            (PageFault, PageFault, Combined::DoubleFault),
            (DoubleFault, Contributory, Combined::TripleFault),
            (DoubleFault, PageFault, Combined::TripleFault),
            (DoubleFault, Benign, Combined::Second),
        ];
        for (first, second, result) in table {
            assert_eq!(combine(first, second), result, "{first:?} then {second:?}");
        }
    }

    #[test]
    fn vectors_round_trip() {
        for e in Exception::ALL {
            assert_eq!(Exception::from_vector(e.vector()), Some(e));
        }
        assert_eq!(Exception::from_vector(9), None);
    }
}
