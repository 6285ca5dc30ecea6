//! The software TLB.
//!
//! Direct-mapped. An entry caches the translation of one 4 KiB page of linear addresses; its
//! three tags (read, write, fetch) match only for accesses that need no further check. A tag is
//! the page's linear address with the translation context in the low twelve bits:
//!
//! ```text
//! 63                                12 11            2 1     0
//! ┌───────────────────────────────────┬───────────────┬───────┐
//! │ linear page                       │ address space │ class │
//! └───────────────────────────────────┴───────────────┴───────┘
//! ```
//!
//! The class says for whom the rights hold (user, supervisor, supervisor that may touch user
//! pages), so a privilege change needs no flush. An address space is everything else that a
//! translation depends on ([`Space`]); dropping one is forgetting its number. Number 1023 is never
//! given out, so a tag of all ones matches nothing.

use crate::fast_tlb::FastTlb;
use crate::walk_cache::WalkCache;
use std::collections::VecDeque;

/// Entries of the TLB.
pub(crate) const ENTRIES: usize = 4096;

const PAGE_MASK: u64 = !0xfff;

/// A tag that no access has.
pub(crate) const NO_TAG: u64 = u64::MAX;

/// For whom the rights of a translation hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Class {
    /// CPL 3.
    User = 0,
    /// CPL 0 to 2 with SMAP in force.
    Supervisor = 1,
    /// CPL 0 to 2 that may read and write user pages (SMAP off, or EFLAGS.AC).
    SupervisorUserData = 2,
    /// Accesses that must always take the slow path.
    Slow = 3,
}

/// One translation.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Entry {
    /// Tag for reads.
    pub read: u64,
    /// Tag for writes.
    pub write: u64,
    /// Tag for fetches.
    pub fetch: u64,
    /// Host virtual address minus linear address.
    pub addend: u64,
}

const INVALID: Entry = Entry {
    read: NO_TAG,
    write: NO_TAG,
    fetch: NO_TAG,
    addend: 0,
};

/// What a translation depends on, apart from the class: who flushes it and by what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Space {
    /// VPID of the entry controls.
    pub vpid: u16,
    /// PCID, 0 without CR4.PCIDE.
    pub pcid: u16,
    /// The EPT root or the shadow root.
    pub root: u64,
    /// Paging-mode bits of CR0, CR4 and EFER.
    pub mode: u64,
    /// PKRU and IA32_PKRS, where they are in force.
    pub keys: [u32; 2],
}

/// The TLB of one processor.
pub(crate) struct Tlb {
    entries: Box<[Entry; ENTRIES]>,
    info: Box<[Info; ENTRIES]>,
    /// Of the current address space: [`Tlb::salt_of`].
    salt: usize,
    /// Live address spaces, the current one first.
    spaces: VecDeque<(Space, u16)>,
    next: u16,
    /// Caches of the tables that translations are made from, which go with them.
    pub(crate) walks: WalkCache,
    /// Changes whenever a translation is dropped that code may have been found by, in a context
    /// that lives on.
    generation: u64,
    /// Linear pages, hashed, by whose translation code was found since then.
    code_pages: [u64; 64],
    /// Where supervisor code was found since then, PCID and protection keys apart, and whether
    /// always by global translations, which are the same for every PCID.
    kernel: Option<Space>,
    kernel_is_global: bool,
    /// Linear pages, hashed, that have had a global translation.
    global_pages: [u64; 64],
    /// Which large pages may have translations here.
    large: LargePages,
    /// What generated code looks up by itself.
    pub(crate) fast: FastTlb,
}

/// A set that holds at least the large pages that were put in since the last flush.
#[derive(Clone)]
struct LargePages {
    /// A bit for each hashed 2 MiB or 4 MiB page: many more bits than a direct map of memory has
    /// such pages, since each false answer costs a flush of everything.
    medium: Box<[u64; 1024]>,
    /// A bit for each hashed 1 GiB page.
    huge: u64,
}

impl LargePages {
    fn bit(gva: u64) -> (usize, u64) {
        let hash = (gva >> 21).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 48;
        ((hash >> 6) as usize, 1 << (hash & 63))
    }

    fn new() -> LargePages {
        LargePages {
            medium: Box::new([0; 1024]),
            huge: 0,
        }
    }

    fn insert(&mut self, gva: u64, shift: u8) {
        // A 4 MiB page is two of 2 MiB, either of which may be asked for.
        let first = gva >> shift << shift;
        for part in [first, first | 1 << 21] {
            let (word, bit) = Self::bit(part);
            self.medium[word] |= bit;
        }
        if shift > 22 {
            self.huge |= 1 << (gva >> 30 & 63);
        }
    }

    fn may_hold(&self, gva: u64) -> bool {
        let (word, bit) = Self::bit(gva);
        self.huge >> (gva >> 30 & 63) & 1 != 0 || self.medium[word] & bit != 0
    }
}

/// What only slow paths need of an entry.
#[derive(Clone, Copy)]
struct Info {
    /// Tag for writes that are allowed but must tell the code cache.
    guarded: u64,
    /// log2 of the guest's page size.
    shift: u8,
    /// The translation is global.
    global: bool,
}

const NO_INFO: Info = Info {
    guarded: NO_TAG,
    shift: 0,
    global: false,
};

/// What is put into the TLB.
pub(crate) struct Fill {
    /// Linear address.
    pub gva: u64,
    /// Host virtual address of the same byte.
    pub hva: u64,
    /// Reads need no check.
    pub read: bool,
    /// Writes need no check.
    pub write: bool,
    /// Fetches need no check.
    pub fetch: bool,
    /// Writes are allowed, but those to a page with code must tell the code cache.
    pub guarded: bool,
    /// log2 of the guest's page size.
    pub shift: u8,
    /// The translation is global.
    pub global: bool,
}

const SPACES: usize = 24;
const LAST_NUMBER: u16 = 1022;

impl Tlb {
    pub(crate) fn new() -> Tlb {
        Tlb {
            entries: vec![INVALID; ENTRIES]
                .try_into()
                .unwrap_or_else(|_| unreachable!()),
            info: vec![NO_INFO; ENTRIES]
                .try_into()
                .unwrap_or_else(|_| unreachable!()),
            salt: 0,
            spaces: VecDeque::with_capacity(SPACES + 1),
            next: 0,
            walks: WalkCache::new(),
            generation: 0,
            code_pages: [0; 64],
            kernel: None,
            kernel_is_global: true,
            global_pages: [0; 64],
            large: LargePages::new(),
            fast: FastTlb::new(),
        }
    }

    /// Changes whenever a translation is dropped by which code may have been found. (A context
    /// that is dropped whole needs no such change: its number is not used again.)
    pub(crate) fn generation(&self) -> u64 {
        self.generation
    }

    /// The place of a linear page in a hashed set of pages.
    fn hashed_page(gva: u64) -> (usize, u64) {
        let page = gva >> 12;
        ((page >> 6) as usize & 63, 1 << (page & 63))
    }

    /// Code, a user's or not, is found by the translation of `gva`, which was just used, and
    /// remembered.
    pub(crate) fn note_code(&mut self, gva: u64, user: bool) {
        let (word, bit) = Self::hashed_page(gva);
        self.code_pages[word] |= bit;
        self.kernel_is_global &= user || self.info[self.slot(gva)].global;
    }

    fn forget_code(&mut self) {
        self.code_pages = [0; 64];
        self.kernel_is_global = true;
        self.generation += 1;
    }

    /// Supervisor code is found in `space` from now on. What was found elsewhere stays good if it
    /// was found by global translations and only the PCID is another.
    pub(crate) fn enter_kernel(&mut self, space: &Space) {
        let kernel = Space {
            keys: [0; 2],
            ..*space
        };
        if self.kernel == Some(kernel) {
            return;
        }
        let same_but_pcid = self.kernel.is_some_and(|old| {
            let pcid = kernel.pcid;
            Space { pcid, ..old } == kernel
        });
        if !same_but_pcid || !self.kernel_is_global {
            self.forget_code();
        }
        self.kernel = Some(kernel);
    }

    /// What spreads the translations of one page in several address spaces over the TLB.
    fn salt_of(number: u64) -> usize {
        number.wrapping_mul(0x9d7) as usize
    }

    #[inline(always)]
    fn slot_with(salt: usize, gva: u64) -> usize {
        ((gva >> 12) as usize ^ salt) & (ENTRIES - 1)
    }

    /// The slot of `gva` in the current address space.
    #[inline(always)]
    fn slot(&self, gva: u64) -> usize {
        Self::slot_with(self.salt, gva)
    }

    /// The entry that would hold the translation of `gva` in the current address space.
    #[inline(always)]
    pub(crate) fn entry(&self, gva: u64) -> &Entry {
        &self.entries[self.slot(gva)]
    }

    /// The tag for writes to the page of `gva` that must tell the code cache.
    pub(crate) fn guarded(&self, gva: u64) -> u64 {
        self.info[self.slot(gva)].guarded
    }

    /// The part of the context bits that says which space; the rest is the class. The space
    /// becomes the current one.
    #[inline]
    pub(crate) fn space_bits(&mut self, space: &Space) -> u64 {
        let number = match self.spaces.front() {
            Some((last, number)) if last == space => u64::from(*number),
            _ => self.number(*space),
        };
        self.salt = Self::salt_of(number);
        number << 2
    }

    /// The number of `space`, which stands for it until it is dropped.
    fn number(&mut self, space: Space) -> u64 {
        if let Some(at) = self.spaces.iter().position(|(s, _)| *s == space) {
            if let Some(found) = self.spaces.remove(at) {
                self.spaces.push_front(found);
            }
            return self.spaces[0].1.into();
        }
        if self.next > LAST_NUMBER {
            self.clear();
        }
        let number = self.next;
        self.next += 1;
        self.spaces.push_front((space, number));
        self.spaces.truncate(SPACES);
        number.into()
    }

    /// Puts a translation in, for a context of the current address space.
    pub(crate) fn fill(&mut self, context: u64, fill: &Fill) {
        let slot = self.slot(fill.gva);
        let tag = fill.gva & PAGE_MASK | context;
        let pick = |allowed| if allowed { tag } else { NO_TAG };
        let addend = fill.hva.wrapping_sub(fill.gva);
        let entry = &mut self.entries[slot];
        let old = *entry;
        *entry = Entry {
            read: pick(fill.read),
            write: pick(fill.write),
            fetch: pick(fill.fetch),
            addend,
        };
        let mut guarded = pick(fill.guarded);
        // What earlier accesses found out about the same translation stays, in any context.
        if old.addend == addend {
            let keep = |new: u64, old: u64| {
                if new == NO_TAG && old != NO_TAG && (old ^ tag) & PAGE_MASK == 0 {
                    old
                } else {
                    new
                }
            };
            entry.read = keep(entry.read, old.read);
            entry.write = keep(entry.write, old.write);
            entry.fetch = keep(entry.fetch, old.fetch);
            guarded = keep(guarded, self.info[slot].guarded);
        }
        self.info[slot] = Info {
            guarded,
            shift: fill.shift,
            global: fill.global,
        };
        if fill.global {
            let (word, bit) = Self::hashed_page(fill.gva);
            self.global_pages[word] |= bit;
        }
        if fill.shift > 12 {
            self.large.insert(fill.gva, fill.shift);
        }
    }

    /// Lets generated code find what is known of the page of `gva` in `context`. Returns whether
    /// the table of `context` moved.
    pub(crate) fn promote(&mut self, context: u64, gva: u64) -> bool {
        let entry = self.entries[self.slot(gva)];
        let tag = gva & PAGE_MASK | context;
        let (read, write) = (entry.read == tag, entry.write == tag);
        if !read && !write {
            return false;
        }
        let hva = gva.wrapping_add(entry.addend);
        self.fast.fill(context, gva, hva, read, write)
    }

    /// Drops everything. The contexts of all address spaces are new ones afterwards.
    pub(crate) fn flush(&mut self) {
        self.spaces.clear();
        self.walks.flush();
        self.forget_code();
    }

    /// Drops everything and starts to count address spaces anew.
    fn clear(&mut self) {
        self.entries.fill(INVALID);
        self.info.fill(NO_INFO);
        self.large = LargePages::new();
        self.fast.clear();
        self.next = 0;
        self.global_pages = [0; 64];
        self.flush();
    }

    /// Drops the address spaces that `which` picks, global pages included.
    pub(crate) fn flush_spaces(&mut self, which: impl Fn(&Space) -> bool) {
        self.spaces.retain(|(space, _)| !which(space));
        if !self.kernel_is_global {
            self.forget_code();
        }
    }

    /// Drops the translations of the page that holds `gva`, of every size and in every address
    /// space (the architecture lets more be dropped than asked), and all paging-structure caches.
    pub(crate) fn flush_page(&mut self, gva: u64) {
        self.invalidate(gva, true);
    }

    /// INVLPG: like [`Tlb::flush_page`], but translations of other address spaces stay unless
    /// they may be global.
    pub(crate) fn flush_own_page(&mut self, gva: u64) {
        self.invalidate(gva, false);
    }

    fn invalidate(&mut self, gva: u64, everywhere: bool) {
        self.walks.flush();
        if !self.large.may_hold(gva) {
            let (word, bit) = Self::hashed_page(gva);
            if self.code_pages[word] & bit != 0 {
                self.forget_code();
            }
            self.drop_small_page(gva, everywhere || self.global_pages[word] & bit != 0);
            return;
        }
        self.forget_code();
        for slot in 0..ENTRIES {
            self.drop_if_translates(slot, gva);
        }
        self.fast.clear();
    }

    /// Drops the translation of a 4 KiB page, in the current address space or in all.
    fn drop_small_page(&mut self, gva: u64, everywhere: bool) {
        let spaces = if everywhere { self.spaces.len() } else { 1 };
        for n in 0..spaces.min(self.spaces.len()) {
            let number = self.spaces[n].1.into();
            let slot = Self::slot_with(Self::salt_of(number), gva);
            self.drop_if_translates(slot, gva);
            self.fast.drop_page(number, gva);
        }
    }

    /// Drops the entry in `slot` if its page, of whatever size, holds `gva`.
    fn drop_if_translates(&mut self, slot: usize, gva: u64) {
        let info = self.info[slot];
        let entry = &mut self.entries[slot];
        let shift = info.shift.max(12);
        if [entry.read, entry.write, entry.fetch, info.guarded]
            .iter()
            .any(|&tag| tag != NO_TAG && (tag ^ gva) >> shift == 0)
        {
            *entry = INVALID;
            self.info[slot] = NO_INFO;
        }
    }

    /// Forbids all fast writes until the entries are filled anew.
    pub(crate) fn revoke_all_writes(&mut self) {
        for entry in self.entries.iter_mut() {
            entry.write = NO_TAG;
        }
    }

    /// Forbids fast writes to the host page at `hva_page` until the entries are filled anew.
    pub(crate) fn revoke_writes(&mut self, hva_page: u64) {
        for entry in self.entries.iter_mut() {
            if entry.write != NO_TAG
                && (entry.write & PAGE_MASK).wrapping_add(entry.addend) == hva_page
            {
                entry.write = NO_TAG;
            }
        }
        self.fast.revoke_writes(hva_page);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn context(tlb: &mut Tlb, space: Space, class: Class) -> u64 {
        tlb.space_bits(&space) | class as u64
    }

    const SPACE: Space = Space {
        vpid: 1,
        pcid: 0,
        root: 0x1000,
        mode: 0,
        keys: [0; 2],
    };

    fn fill(gva: u64, shift: u8) -> Fill {
        Fill {
            gva,
            hva: gva + 0x7000_0000,
            read: true,
            write: false,
            fetch: false,
            guarded: false,
            shift,
            global: false,
        }
    }

    #[test]
    fn rights_accumulate_for_the_same_translation_only() {
        let mut tlb = Tlb::new();
        let context = context(&mut tlb, SPACE, Class::User);
        tlb.fill(context, &fill(0x5000, 12));
        tlb.fill(
            context,
            &Fill {
                read: false,
                write: true,
                ..fill(0x5000, 12)
            },
        );
        let tag = 0x5000 | context;
        assert_eq!(
            (tlb.entry(0x5123).read, tlb.entry(0x5123).write),
            (tag, tag)
        );
        tlb.fill(
            context,
            &Fill {
                hva: 0x9000,
                read: false,
                fetch: true,
                ..fill(0x5000, 12)
            },
        );
        assert_eq!(
            (tlb.entry(0x5000).read, tlb.entry(0x5000).fetch),
            (NO_TAG, tag)
        );
    }

    #[test]
    fn dropping_a_space_is_forgetting_its_number() {
        let mut tlb = Tlb::new();
        let a = context(&mut tlb, SPACE, Class::User);
        let other = Space { pcid: 5, ..SPACE };
        let b = context(&mut tlb, other, Class::User);
        assert_ne!(a, b);
        assert_eq!(context(&mut tlb, SPACE, Class::User), a);
        tlb.flush_spaces(|s| s.pcid == 0);
        assert_ne!(context(&mut tlb, SPACE, Class::User), a);
        assert_eq!(context(&mut tlb, other, Class::User), b);
    }

    #[test]
    fn numbers_run_out_and_start_again() {
        let mut tlb = Tlb::new();
        for i in 0..3000u64 {
            let context = context(&mut tlb, Space { root: i, ..SPACE }, Class::Slow);
            assert!(context >> 2 <= u64::from(LAST_NUMBER));
        }
    }

    #[test]
    fn a_page_goes_with_the_large_page_around_it() {
        let mut tlb = Tlb::new();
        let context = context(&mut tlb, SPACE, Class::Supervisor);
        tlb.fill(context, &fill(0x20_3000, 21));
        tlb.fill(context, &fill(0x40_3000, 12));
        tlb.flush_page(0x21_0000);
        assert_eq!(tlb.entry(0x20_3000).read, NO_TAG);
        assert_ne!(tlb.entry(0x40_3000).read, NO_TAG);
        tlb.flush_page(0x40_3fff);
        assert_eq!(tlb.entry(0x40_3000).read, NO_TAG);
    }
}
