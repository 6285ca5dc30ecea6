//! Whether the rights a walk found allow an access.

use crate::control_registers::{Cr0, Cr4, Efer};
use crate::page_fault::ErrorCode;
use bitflags::bitflags;

bitflags! {
    /// What a guest translation allows, and what a TLB keeps with it.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Rights: u8 {
        /// No entry on the path has XD set.
        const EXECUTABLE = 1 << 0;
        /// Every entry on the path has R/W set.
        const WRITABLE = 1 << 1;
        /// Every entry on the path has U/S set: a user page.
        const USER = 1 << 2;
        /// The leaf is global (and CR4.PGE is set).
        const GLOBAL = 1 << 3;
        /// The leaf's dirty bit is set. While it is not, the first write must walk again.
        const DIRTY = 1 << 4;
    }
}

bitflags! {
    /// An access to linear memory. None of the bits: a supervisor-mode data read.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Access: u8 {
        /// A data write.
        const WRITE = 1 << 0;
        /// An instruction fetch.
        const FETCH = 1 << 1;
        /// A user-mode access: explicit, with CPL 3.
        const USER = 1 << 2;
        /// An implicit supervisor access (descriptor tables, TSS), whatever CPL is: EFLAGS.AC does
        /// not lift SMAP for it. Not together with [`Access::USER`].
        const IMPLICIT = 1 << 3;
    }
}

/// The processor state that decides accesses besides control registers: it changes often, so it
/// is no part of the mode.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Privilege {
    /// The PKRU register.
    pub pkru: u32,
    /// IA32_PKRS.
    pub pkrs: u32,
    /// EFLAGS.AC, which lifts SMAP from explicit supervisor accesses.
    pub alignment_check: bool,
}

bitflags! {
    /// The protection rules in force.
    ///
    /// Source: SDM volume 3, "Determination of Access Rights" and "Protection Keys".
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Protection: u8 {
        /// CR0.WP: supervisor writes respect R/W.
        const WRITE_PROTECT = 1 << 0;
        /// CR4.SMEP: no supervisor fetches from user pages.
        const SMEP = 1 << 1;
        /// CR4.SMAP: no supervisor data accesses to user pages.
        const SMAP = 1 << 2;
        /// CR4.PKE in 4- or 5-level paging: PKRU applies to user pages.
        const USER_KEYS = 1 << 3;
        /// CR4.PKS in 4- or 5-level paging: IA32_PKRS applies to supervisor pages.
        const SUPERVISOR_KEYS = 1 << 4;
        /// The I/D bit of error codes is used: SMEP, or EFER.NXE with PAE tables.
        const REPORT_FETCH = 1 << 5;
    }
}

/// AD: the key's pages take no data access.
const KEY_ACCESS_DISABLE: u32 = 1 << 0;
/// WD: the key's pages take no writes.
const KEY_WRITE_DISABLE: u32 = 1 << 1;

impl Protection {
    /// The rules that the control registers put in force.
    pub fn new(cr0: Cr0, cr4: Cr4, efer: Efer) -> Self {
        let long = efer.contains(Efer::LMA);
        let mut rules = Protection::empty();
        rules.set(Self::WRITE_PROTECT, cr0.contains(Cr0::WP));
        rules.set(Self::SMEP, cr4.contains(Cr4::SMEP));
        rules.set(Self::SMAP, cr4.contains(Cr4::SMAP));
        rules.set(Self::USER_KEYS, long && cr4.contains(Cr4::PKE));
        rules.set(Self::SUPERVISOR_KEYS, long && cr4.contains(Cr4::PKS));
        let no_execute = cr4.contains(Cr4::PAE) && efer.contains(Efer::NXE);
        rules.set(Self::REPORT_FETCH, no_execute || cr4.contains(Cr4::SMEP));
        rules
    }

    /// The error-code bits that describe the access itself.
    #[inline]
    pub fn describe(self, access: Access) -> ErrorCode {
        let mut code = ErrorCode::empty();
        code.set(ErrorCode::WRITE, access.contains(Access::WRITE));
        code.set(ErrorCode::USER, access.contains(Access::USER));
        let report_fetch = self.contains(Self::REPORT_FETCH);
        code.set(
            ErrorCode::FETCH,
            report_fetch && access.contains(Access::FETCH),
        );
        code
    }

    /// Judges an access to a page with these `rights` and this protection `key`; the error code of
    /// the page fault if it is forbidden.
    #[inline]
    pub fn check(
        self,
        rights: Rights,
        key: u8,
        access: Access,
        privilege: &Privilege,
    ) -> Result<(), ErrorCode> {
        let by_page = if access.contains(Access::USER) {
            Self::user_may(rights, access)
        } else {
            self.supervisor_may(rights, access, privilege)
        };
        let by_key = self.key_allows(rights, key, access, privilege);
        if by_page && by_key {
            return Ok(());
        }
        let mut code = self.describe(access) | ErrorCode::PRESENT;
        code.set(ErrorCode::PK, !by_key);
        Err(code)
    }

    #[inline]
    fn user_may(rights: Rights, access: Access) -> bool {
        let mut needed = Rights::USER;
        needed.set(Rights::WRITABLE, access.contains(Access::WRITE));
        needed.set(Rights::EXECUTABLE, access.contains(Access::FETCH));
        rights.contains(needed)
    }

    #[inline]
    fn supervisor_may(self, rights: Rights, access: Access, privilege: &Privilege) -> bool {
        let is_user_page = rights.contains(Rights::USER);
        if access.contains(Access::FETCH) {
            let smep = is_user_page && self.contains(Self::SMEP);
            return rights.contains(Rights::EXECUTABLE) && !smep;
        }
        let lifted = privilege.alignment_check && !access.contains(Access::IMPLICIT);
        if is_user_page && self.contains(Self::SMAP) && !lifted {
            return false;
        }
        let must_be_writable = access.contains(Access::WRITE) && self.contains(Self::WRITE_PROTECT);
        rights.contains(Rights::WRITABLE) || !must_be_writable
    }

    #[inline]
    fn key_allows(self, rights: Rights, key: u8, access: Access, privilege: &Privilege) -> bool {
        let is_user_page = rights.contains(Rights::USER);
        let rule = if is_user_page {
            Self::USER_KEYS
        } else {
            Self::SUPERVISOR_KEYS
        };
        if !self.contains(rule) || access.contains(Access::FETCH) {
            return true;
        }
        let register = if is_user_page {
            privilege.pkru
        } else {
            privilege.pkrs
        };
        let key_bits = register >> (2 * u32::from(key));
        if key_bits & KEY_ACCESS_DISABLE != 0 {
            return false;
        }
        let respects_write_disable =
            access.contains(Access::USER) || self.contains(Self::WRITE_PROTECT);
        let forbidden_write = key_bits & KEY_WRITE_DISABLE != 0 && respects_write_disable;
        !(access.contains(Access::WRITE) && forbidden_write)
    }
}
