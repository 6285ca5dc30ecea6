//! The walk a second time, as naively as the manual tells it: no masks, no tables, no sharing
//! between formats beyond what the manual shares. It is the reference for golden cases and
//! property tests, so it uses nothing of `paging` but the types of questions and answers.

#![allow(dead_code, unreachable_pub, reason = "each test uses a part")]

use eptide_arch::addr::Gpa;
use eptide_arch::control_registers::{Cr0, Cr4, Efer};
use eptide_arch::page_fault::ErrorCode;
use eptide_arch::paging::{
    Access, EptAccess, EptFeatures, EptRights, GuestControls, GuestRoot, Privilege, Rights,
    Translation,
};
use std::collections::HashMap;

/// Memory by the address of each entry.
pub type Memory = HashMap<u64, u64>;

/// A page fault: error code and level.
pub type Fault = (ErrorCode, u8);

struct Entry {
    address: u64,
    value: u64,
}

fn bit(value: u64, number: u32) -> bool {
    value >> number & 1 == 1
}

fn any(value: u64, from: u32, to_inclusive: u32) -> bool {
    (from..=to_inclusive).any(|number| bit(value, number))
}

fn load(memory: &Memory, address: u64) -> u64 {
    memory.get(&address).copied().unwrap_or(0)
}

struct Question<'a> {
    controls: &'a GuestControls,
    gva: u64,
    access: Access,
    privilege: &'a Privilege,
}

impl Question<'_> {
    fn is_write(&self) -> bool {
        self.access.contains(Access::WRITE)
    }
    fn is_fetch(&self) -> bool {
        self.access.contains(Access::FETCH)
    }
    fn is_user(&self) -> bool {
        self.access.contains(Access::USER)
    }
    fn nxe(&self) -> bool {
        self.controls.efer.contains(Efer::NXE)
    }
    fn cr4(&self, flag: Cr4) -> bool {
        self.controls.cr4.contains(flag)
    }
    fn is_long(&self) -> bool {
        self.controls.efer.contains(Efer::LMA)
    }

    fn code(&self, present: bool, reserved: bool, key: bool) -> ErrorCode {
        let mut code = 0;
        if present {
            code |= 1;
        }
        if self.is_write() {
            code |= 2;
        }
        if self.is_user() {
            code |= 4;
        }
        if reserved {
            code |= 8;
        }
        if self.is_fetch() && (self.cr4(Cr4::SMEP) || self.cr4(Cr4::PAE) && self.nxe()) {
            code |= 16;
        }
        if key {
            code |= 32;
        }
        ErrorCode::from_bits_retain(code)
    }

    fn not_present(&self, level: u8) -> Fault {
        (self.code(false, false, false), level)
    }
    fn reserved(&self, level: u8) -> Fault {
        (self.code(true, true, false), level)
    }
}

/// Translates as the processor does, writing accessed and dirty bits to `memory`.
pub fn translate(
    memory: &mut Memory,
    controls: &GuestControls,
    root: &GuestRoot,
    gva: u64,
    access: Access,
    privilege: &Privilege,
) -> Result<Translation, Fault> {
    let question = Question {
        controls,
        gva,
        access,
        privilege,
    };
    if !controls.cr0.contains(Cr0::PG) {
        return Ok(Translation {
            gpa: Gpa::new(gva),
            page_shift: 12,
            rights: Rights::WRITABLE | Rights::USER | Rights::EXECUTABLE | Rights::DIRTY,
            key: 0,
        });
    }
    if question.is_long() {
        long_mode(memory, &question, root)
    } else if question.cr4(Cr4::PAE) {
        pae(memory, &question, root)
    } else {
        legacy(memory, &question, root)
    }
}

fn long_mode(
    memory: &mut Memory,
    q: &Question<'_>,
    root: &GuestRoot,
) -> Result<Translation, Fault> {
    let levels = if q.cr4(Cr4::LA57) { 5 } else { 4 };
    let mut table = root.cr3 & 0x000f_ffff_ffff_f000;
    let mut path = Vec::new();
    for level in (1..=levels).rev() {
        let index = q.gva >> (12 + 9 * (level - 1)) & 0x1ff;
        let address = table + 8 * index;
        let value = load(memory, address);
        let number = level as u8;
        if !bit(value, 0) {
            return Err(q.not_present(number));
        }
        let high = q.controls.physical_bits < 52 && any(value, q.controls.physical_bits, 51);
        if high || bit(value, 63) && !q.nxe() {
            return Err(q.reserved(number));
        }
        path.push(Entry { address, value });
        let is_large = bit(value, 7);
        match level {
            4 | 5 if is_large => return Err(q.reserved(number)),
            3 if is_large => {
                if !q.controls.has_1g_pages || any(value, 13, 29) {
                    return Err(q.reserved(number));
                }
                let page = value & 0x000f_ffff_c000_0000;
                return finish(memory, q, &path, page | q.gva & 0x3fff_ffff, 30, number);
            }
            2 if is_large => {
                if any(value, 13, 20) {
                    return Err(q.reserved(number));
                }
                let page = value & 0x000f_ffff_ffe0_0000;
                return finish(memory, q, &path, page | q.gva & 0x1f_ffff, 21, number);
            }
            1 => {
                let page = value & 0x000f_ffff_ffff_f000;
                return finish(memory, q, &path, page | q.gva & 0xfff, 12, number);
            }
            _ => table = value & 0x000f_ffff_ffff_f000,
        }
    }
    unreachable!()
}

fn pae(memory: &mut Memory, q: &Question<'_>, root: &GuestRoot) -> Result<Translation, Fault> {
    let pdpte = root.pdptes[(q.gva >> 30 & 3) as usize];
    if !bit(pdpte, 0) {
        return Err(q.not_present(3));
    }
    if any(pdpte, 1, 2) || any(pdpte, 5, 8) || any(pdpte, q.controls.physical_bits, 63) {
        return Err(q.reserved(3));
    }
    let malformed = |value| any(value, q.controls.physical_bits, 62) || bit(value, 63) && !q.nxe();
    let mut path = Vec::new();

    let address = (pdpte & 0x000f_ffff_ffff_f000) + 8 * (q.gva >> 21 & 0x1ff);
    let value = load(memory, address);
    if !bit(value, 0) {
        return Err(q.not_present(2));
    }
    if malformed(value) {
        return Err(q.reserved(2));
    }
    path.push(Entry { address, value });
    if bit(value, 7) {
        if any(value, 13, 20) {
            return Err(q.reserved(2));
        }
        let page = value & 0x000f_ffff_ffe0_0000;
        return finish(memory, q, &path, page | q.gva & 0x1f_ffff, 21, 2);
    }

    let address = (value & 0x000f_ffff_ffff_f000) + 8 * (q.gva >> 12 & 0x1ff);
    let value = load(memory, address);
    if !bit(value, 0) {
        return Err(q.not_present(1));
    }
    if malformed(value) {
        return Err(q.reserved(1));
    }
    path.push(Entry { address, value });
    finish(
        memory,
        q,
        &path,
        value & 0x000f_ffff_ffff_f000 | q.gva & 0xfff,
        12,
        1,
    )
}

fn legacy(memory: &mut Memory, q: &Question<'_>, root: &GuestRoot) -> Result<Translation, Fault> {
    let mut path = Vec::new();
    let address = (root.cr3 & 0xffff_f000) + 4 * (q.gva >> 22 & 0x3ff);
    let value = load(memory, address) & 0xffff_ffff;
    if !bit(value, 0) {
        return Err(q.not_present(2));
    }
    path.push(Entry { address, value });
    if bit(value, 7) && q.cr4(Cr4::PSE) {
        // Bits 39:32 of the address are in bits 20:13, as far as the processor has them.
        let width = match q.controls.has_pse36 {
            true => q.controls.physical_bits.clamp(32, 40),
            false => 32,
        };
        let first_reserved = 13 + (width - 32);
        if any(value, first_reserved, 21) {
            return Err(q.reserved(2));
        }
        let page = value & 0xffc0_0000 | (value >> 13 & 0xff) << 32;
        return finish(memory, q, &path, page | q.gva & 0x3f_ffff, 22, 2);
    }
    let address = (value & 0xffff_f000) + 4 * (q.gva >> 12 & 0x3ff);
    let value = load(memory, address) & 0xffff_ffff;
    if !bit(value, 0) {
        return Err(q.not_present(1));
    }
    path.push(Entry { address, value });
    finish(memory, q, &path, value & 0xffff_f000 | q.gva & 0xfff, 12, 1)
}

/// All entries are present and well formed: rights, keys, accessed and dirty bits.
fn finish(
    memory: &mut Memory,
    q: &Question<'_>,
    path: &[Entry],
    gpa: u64,
    page_shift: u32,
    level: u8,
) -> Result<Translation, Fault> {
    let writable = path.iter().all(|entry| bit(entry.value, 1));
    let user = path.iter().all(|entry| bit(entry.value, 2));
    let executable = !path.iter().any(|entry| bit(entry.value, 63));
    let leaf = path.last().unwrap().value;
    let supervisor = !q.is_user();
    let wp = q.controls.cr0.contains(Cr0::WP);

    let mut allowed = true;
    if q.is_user() && !user {
        allowed = false;
    }
    if q.is_fetch() {
        if !executable || supervisor && user && q.cr4(Cr4::SMEP) {
            allowed = false;
        }
    } else {
        if supervisor && user && q.cr4(Cr4::SMAP) {
            let implicit = q.access.contains(Access::IMPLICIT);
            if implicit || !q.privilege.alignment_check {
                allowed = false;
            }
        }
        if q.is_write() && !writable && (q.is_user() || wp) {
            allowed = false;
        }
    }

    let keys_in_use = q.is_long() && (q.cr4(Cr4::PKE) || q.cr4(Cr4::PKS));
    let key = if keys_in_use { leaf >> 59 & 15 } else { 0 };
    let mut forbidden_by_key = false;
    if q.is_long() && !q.is_fetch() {
        let register = match (user, q.cr4(Cr4::PKE), q.cr4(Cr4::PKS)) {
            (true, true, _) => Some(q.privilege.pkru),
            (false, _, true) => Some(q.privilege.pkrs),
            _ => None,
        };
        if let Some(register) = register {
            let access_disable = register >> (2 * key) & 1 == 1;
            let write_disable = register >> (2 * key + 1) & 1 == 1;
            forbidden_by_key =
                access_disable || q.is_write() && write_disable && (q.is_user() || wp);
        }
    }
    if !allowed || forbidden_by_key {
        return Err((q.code(true, false, forbidden_by_key), level));
    }

    let count = path.len();
    for (n, entry) in path.iter().enumerate() {
        let mut value = entry.value | 1 << 5;
        if n + 1 == count && q.is_write() {
            value |= 1 << 6;
        }
        memory.insert(entry.address, value);
    }
    let mut rights = Rights::empty();
    rights.set(Rights::WRITABLE, writable);
    rights.set(Rights::USER, user);
    rights.set(Rights::EXECUTABLE, executable);
    rights.set(Rights::GLOBAL, bit(leaf, 8) && q.cr4(Cr4::PGE));
    rights.set(Rights::DIRTY, bit(leaf, 6) || q.is_write());
    Ok(Translation {
        gpa: Gpa::new(gpa),
        page_shift,
        rights,
        key: key as u8,
    })
}

/// What EPT makes of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EptVerdict {
    Translated {
        address: u64,
        level: u8,
        rights: EptRights,
        is_dirty: bool,
        has_dirtied: bool,
    },
    Violation {
        rights: EptRights,
        level: u8,
    },
    Misconfiguration {
        level: u8,
    },
}

pub fn translate_ept(
    memory: &mut Memory,
    levels: u8,
    features: EptFeatures,
    physical_bits: u32,
    root: u64,
    gpa: u64,
    access: EptAccess,
) -> EptVerdict {
    let mbec = features.contains(EptFeatures::MODE_BASED_EXECUTE);
    if gpa >> (12 + 9 * u32::from(levels)) != 0 {
        return EptVerdict::Violation {
            rights: EptRights::empty(),
            level: levels,
        };
    }
    let mut table = root;
    let mut path: Vec<Entry> = Vec::new();
    let (mut read, mut write, mut execute, mut user) = (true, true, true, true);
    for level in (1..=levels).rev() {
        let index = gpa >> (12 + 9 * (u32::from(level) - 1)) & 0x1ff;
        let address = table + 8 * index;
        let value = load(memory, address);
        let user_bit = if mbec { bit(value, 10) } else { bit(value, 2) };
        read &= bit(value, 0);
        write &= bit(value, 1);
        execute &= bit(value, 2);
        user &= user_bit;
        let rights = ept_rights(read, write, execute, user);
        let is_present = any(value, 0, 2) || mbec && bit(value, 10);
        if !is_present {
            return EptVerdict::Violation { rights, level };
        }
        let misconfigured = EptVerdict::Misconfiguration { level };
        let write_only = bit(value, 1) && !bit(value, 0);
        let execute_only = !bit(value, 0) && !bit(value, 1);
        if write_only || execute_only && !features.contains(EptFeatures::EXECUTE_ONLY) {
            return misconfigured;
        }
        if physical_bits < 52 && any(value, physical_bits, 51) {
            return misconfigured;
        }
        let is_large = level > 1 && bit(value, 7);
        let is_leaf = level == 1 || is_large;
        if is_large {
            match level {
                3 if features.contains(EptFeatures::PAGES_1G) && !any(value, 12, 29) => {}
                2 if features.contains(EptFeatures::PAGES_2M) && !any(value, 12, 20) => {}
                _ => return misconfigured,
            }
        }
        if !is_leaf && any(value, 3, 6) {
            return misconfigured;
        }
        if is_leaf && matches!(value >> 3 & 7, 2 | 3 | 7) {
            return misconfigured;
        }
        path.push(Entry { address, value });
        if !is_leaf {
            table = value & 0x000f_ffff_ffff_f000;
            continue;
        }
        let fetch_allowed = if access.contains(EptAccess::USER_LINEAR) {
            user
        } else {
            execute
        };
        let allowed = (read || !access.contains(EptAccess::READ))
            && (write || !access.contains(EptAccess::WRITE))
            && (fetch_allowed || !access.contains(EptAccess::FETCH));
        if !allowed {
            return EptVerdict::Violation { rights, level };
        }
        let size = 1_u64 << (12 + 9 * (u32::from(level) - 1));
        let address = value & 0x000f_ffff_ffff_f000 & !(size - 1) | gpa & (size - 1);
        let (mut is_dirty, mut has_dirtied) = (true, false);
        if features.contains(EptFeatures::ACCESSED_DIRTY) {
            let is_write = access.contains(EptAccess::WRITE);
            let count = path.len();
            for (n, entry) in path.iter().enumerate() {
                let dirty = if n + 1 == count && is_write {
                    1 << 9
                } else {
                    0
                };
                memory.insert(entry.address, entry.value | 1 << 8 | dirty);
            }
            is_dirty = bit(value, 9) || is_write;
            has_dirtied = is_write && !bit(value, 9);
        }
        return EptVerdict::Translated {
            address,
            level,
            rights,
            is_dirty,
            has_dirtied,
        };
    }
    unreachable!()
}

fn ept_rights(read: bool, write: bool, execute: bool, user: bool) -> EptRights {
    let mut rights = EptRights::empty();
    rights.set(EptRights::READ, read);
    rights.set(EptRights::WRITE, write);
    rights.set(EptRights::EXECUTE, execute);
    rights.set(EptRights::EXECUTE_USER, user);
    rights
}
