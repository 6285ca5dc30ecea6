//! What there is to try in each guest paging mode: the bits of one entry on the way to a page,
//! controls, accesses. Tests of shadow paging run through it in their own ways.

#![allow(dead_code, unreachable_pub, reason = "each test uses a part")]

use eptide_arch::control_registers::{Cr0, Cr4, Efer};
use eptide_arch::paging::{Access, GuestControls, entry as x86};

/// With these rights key 1 takes no writes and key 2 nothing.
pub const PKRU: u32 = 0b10 << 2 | 0b01 << 4;

/// The table at the top level; for PAE, the directory that all PDPTEs lead to. Tables below are at
/// their level times 64 KiB.
pub const ROOT: u64 = 0x9_0000;
/// What leaves below 1 GiB map.
pub const PAGE: u64 = 0x80_0000;

/// A guest paging mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Legacy,
    Pae,
    Four,
    Five,
}

impl Format {
    pub const ALL: [Format; 4] = [Format::Legacy, Format::Pae, Format::Four, Format::Five];

    pub fn is_long(self) -> bool {
        matches!(self, Format::Four | Format::Five)
    }
    pub fn levels(self) -> u32 {
        match self {
            Format::Legacy | Format::Pae => 2,
            Format::Four => 4,
            Format::Five => 5,
        }
    }
    pub fn index_bits(self) -> u32 {
        if self == Format::Legacy { 10 } else { 9 }
    }
    /// Bytes in an entry.
    pub fn size(self) -> u64 {
        if self == Format::Legacy { 4 } else { 8 }
    }
    /// The address under test.
    pub fn gva(self) -> u64 {
        match self {
            Format::Legacy | Format::Pae => 0xc080_1234,
            Format::Four => 0x5a << 39 | 3 << 30 | 0x80_1234,
            Format::Five => 5 << 48 | 0x5a << 39 | 3 << 30 | 0x80_1234,
        }
    }
    /// Where the entry for [`Format::gva`] at a level is.
    pub fn at(self, level: u32) -> u64 {
        let table = if level == self.levels() {
            ROOT
        } else {
            u64::from(level) << 16
        };
        let shift = 12 + self.index_bits() * (level - 1);
        table + (self.gva() >> shift & ((1 << self.index_bits()) - 1)) * self.size()
    }

    /// The controls that `bits` stand for: WP, SMEP, SMAP, PKE, NXE, PSE.
    pub fn controls(self, bits: u32, physical_bits: u32) -> GuestControls {
        let bit = |n: u32| bits >> n & 1 != 0;
        let mut cr0 = Cr0::PE | Cr0::PG;
        cr0.set(Cr0::WP, bit(0));
        let mut cr4 = Cr4::empty();
        cr4.set(Cr4::SMEP, bit(1));
        cr4.set(Cr4::SMAP, bit(2));
        cr4.set(Cr4::PKE, bit(3));
        cr4.set(Cr4::PSE, bit(5));
        cr4.set(Cr4::PAE, self != Format::Legacy);
        cr4.set(Cr4::LA57, self == Format::Five);
        let mut efer = Efer::empty();
        efer.set(Efer::NXE, bit(4));
        efer.set(Efer::LMA | Efer::LME, self.is_long());
        GuestControls {
            cr0,
            cr4,
            efer,
            physical_bits,
            has_1g_pages: true,
            has_pse36: true,
        }
    }

    /// The entry under test at `level`: bits of `n` for present, write, user, NX, accessed, dirty,
    /// page size, a reserved bit.
    pub fn entry(self, n: u64, key: u64, level: u32) -> u64 {
        let bit = |k: u32, mask: u64| if n >> k & 1 != 0 { mask } else { 0 };
        let mut entry = bit(0, x86::PRESENT)
            | bit(1, x86::WRITABLE)
            | bit(2, x86::USER)
            | bit(4, x86::ACCESSED)
            | bit(5, x86::DIRTY)
            | bit(6, x86::PAGE_SIZE)
            | key << x86::KEY_SHIFT;
        if self == Format::Legacy {
            entry |= bit(7, 1 << 21);
        } else {
            entry |= bit(3, x86::NO_EXECUTE) | bit(7, 1 << 51);
        }
        let is_leaf = level == 1 || n >> 6 & 1 != 0;
        let target = match (is_leaf, level) {
            (true, 3) => 0,
            (true, _) => PAGE,
            (false, _) => u64::from(level - 1) << 16,
        };
        // In 32-bit paging without PSE it is a link all the same, to a table of zeros.
        entry | target
    }
}

/// What an access does, but for who makes it.
pub const ACCESSES: [Access; 3] = [Access::empty(), Access::WRITE, Access::FETCH];

/// An entry that allows everything.
pub const ALL: u64 = x86::PRESENT | x86::WRITABLE | x86::USER | x86::ACCESSED | x86::DIRTY;

/// The `n`-th combination of one entry and controls.
#[derive(Clone, Copy, Debug)]
pub struct Combination {
    /// The entry's bits, for [`Format::entry`].
    pub bits: u64,
    /// Its protection key.
    pub key: u64,
    /// Bits for [`Format::controls`].
    pub controls: u32,
}

impl Format {
    fn keys(self) -> usize {
        if self.is_long() { 3 } else { 1 }
    }

    /// Every `stride`-th combination; controls change least often.
    pub fn combinations(self, stride: usize) -> impl Iterator<Item = Combination> {
        let keys = self.keys();
        (0..64 * 256 * keys).step_by(stride).map(move |n| {
            let (bits, n) = (n as u64 % 256, n / 256);
            Combination {
                bits,
                key: (n % keys) as u64,
                controls: (n / keys) as u32,
            }
        })
    }

    /// The entries on the way to the page, from the top, with the one under test at `level`.
    pub fn path(self, level: u32, what: &Combination) -> impl Iterator<Item = (u64, u64)> {
        let tested = self.entry(what.bits, what.key, level);
        (1..=self.levels()).rev().map(move |at_level| {
            let value = match at_level {
                at_level if at_level == level => tested,
                1 => PAGE | ALL,
                _ => u64::from(at_level - 1) << 16 | ALL,
            };
            (self.at(at_level), value)
        })
    }
}

/// The nine accesses of a combination, and whether EFLAGS.AC is set: reads, writes and fetches by
/// user mode, by the supervisor, and by the supervisor with AC. Every order comes, so that each
/// comes after each.
pub fn accesses(what: &Combination) -> impl Iterator<Item = (Access, bool)> {
    let first = what.bits as usize + what.controls as usize;
    (0..9).map(move |turn| {
        let turn = (turn * 4 + first) % 9;
        let who = [Access::USER, Access::empty(), Access::empty()][turn / 3];
        (ACCESSES[turn % 3] | who, turn / 3 == 2)
    })
}
