//! What a stub works on besides processor state, and what a fault in one leaves there.

/// Room for the memory operand, and for any misalignment of it.
pub(super) const OPERAND: usize = 512;

/// `repr(C)`: stubs reach it by offset.
#[repr(C, align(64))]
pub(super) struct Scratch {
    /// The memory operand, with room for any misalignment.
    pub memory: [u8; OPERAND + 64],
    /// The host's MXCSR while a stub runs with the guest's.
    pub host_mxcsr: u32,
    pub _pad: u32,
    /// RFLAGS in and out.
    pub flags: u64,
    /// Address of the memory operand, in `memory`.
    pub operand: u64,
    /// The vector of the exception that the instruction raised, set by the signal handler; 0 for
    /// none (no instruction run here divides integers).
    pub fault: u64,
}

impl Scratch {
    pub(super) fn new() -> Scratch {
        Scratch {
            memory: [0; OPERAND + 64],
            operand: 0,
            host_mxcsr: 0,
            _pad: 0,
            flags: 0,
            fault: 0,
        }
    }
}

/// Notes the vector of a fault in the scratch area, which RSI points to in every stub.
///
/// # Safety
/// The registers are those of a stub.
pub(super) unsafe fn note_fault(registers: &mut [libc::greg_t], vector: u8) {
    let scratch = registers[libc::REG_RSI as usize] as *mut Scratch;
    // SAFETY: the caller vouches for a stub, and no instruction that stubs are made of changes RSI.
    unsafe { (&raw mut (*scratch).fault).write_volatile(vector.into()) };
}
