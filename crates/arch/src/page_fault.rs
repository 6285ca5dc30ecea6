//! Page-fault error codes: the bits the processor pushes and the synthetic bits KVM adds.
//!
//! Source: SDM volume 3, "Page-Fault Exceptions" (figure "Page-Fault Error Code").

use bitflags::bitflags;

bitflags! {
    /// The error code of a page fault.
    ///
    /// Bits 0 to 31 are the processor's; bits 32 and up exist only between the exit handlers and
    /// the MMU and never reach a guest.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct ErrorCode: u64 {
        /// P: the translation was present; the fault is a protection violation.
        const PRESENT = 1 << 0;
        /// W/R: the access was a write.
        const WRITE = 1 << 1;
        /// U/S: the access was made in user mode.
        const USER = 1 << 2;
        /// RSVD: a reserved bit was set in a paging-structure entry.
        const RSVD = 1 << 3;
        /// I/D: the access was an instruction fetch.
        const FETCH = 1 << 4;
        /// PK: protection keys forbade the access.
        const PK = 1 << 5;
        /// SS: a shadow-stack access.
        const SHADOW_STACK = 1 << 6;
        /// SGX access-control violation.
        const SGX = 1 << 15;
        /// Synthetic: the violation was met translating the final guest-physical address.
        const GUEST_FINAL = 1 << 32;
        /// Synthetic: the violation was met on a guest paging-structure entry.
        const GUEST_PAGE = 1 << 33;
        /// Synthetic: an implicit supervisor access (descriptor tables, TSS).
        const IMPLICIT_ACCESS = 1 << 48;
        /// Synthetic: the access was to private memory.
        const PRIVATE_ACCESS = 1 << 49;
    }
}

impl ErrorCode {
    /// The bits a guest may see.
    pub const HARDWARE: ErrorCode = ErrorCode::from_bits_retain(0xffff_ffff);
}

const _: () = assert!(
    ErrorCode::IMPLICIT_ACCESS.bits() & ErrorCode::HARDWARE.bits() == 0
        && ErrorCode::GUEST_FINAL.bits() & ErrorCode::HARDWARE.bits() == 0
);
