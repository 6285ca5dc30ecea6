//! Decoded code of one processor.
//!
//! Code is decoded once per host page and code mode into blocks: straight runs of [`Op`]s up to a
//! control transfer, an instruction that changes how code is read, or the end of the page. A
//! block is found by the host address of its first byte, so every linear alias shares it; a
//! direct-mapped cache from linear address to block makes the common case one compare.
//!
//! A block keeps the bytes it was made from. They are compared with memory again when the
//! program that owns the memory had control since ([`CodeCache::memory_may_have_changed`]), when
//! its page was newly mapped for fetching, and, while other processors may still hold fast write
//! translations of the page, at every execution. Guest stores come through
//! [`crate::machine::Machine`].

use crate::decode::Decoded;
use crate::host::{self, HostInt};
use crate::machine::{Unsettled, granules};
use crate::op::Op;
use crate::translator::Body;
use std::cell::{Cell, OnceCell};
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

const PAGE_MASK: u64 = !0xfff;
const JUMPS: usize = 8192;

/// Decoded instructions that may be kept before all are dropped and decoding starts anew.
const MAX_OPS: usize = 600_000;

/// Pages whose code waits for other processors' answers: each holds what it waits for.
const MAX_UNSETTLED: usize = 1_000;

/// How code bytes are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub(crate) enum CodeMode {
    /// 16-bit default sizes.
    Bits16 = 0,
    /// 32-bit default sizes.
    Bits32 = 1,
    /// 64-bit mode.
    Bits64 = 2,
}

impl CodeMode {
    /// 16, 32 or 64.
    pub(crate) fn bits(self) -> u32 {
        16 << self as u32
    }
}

/// A straight run of decoded instructions.
pub(crate) struct Block {
    /// The instructions; the last one always ends the block.
    pub ops: Box<[Op]>,
    /// What executes the first instruction alone, where its op executes two.
    pub first: crate::op::Handler,
    /// Guest instructions among them.
    pub instructions: u32,
    /// How many of them the last op executes.
    tail: u32,
    /// Their accesses to memory.
    pub accesses: u32,
    /// Bytes of code.
    pub len: u16,
    pub(crate) hva: u64,
    bytes: Box<[u8]>,
    /// The last instruction's tail lies in the next linear page: nothing may be assumed about it.
    pub crosses: bool,
    checked: u64,
    /// How often it was interpreted.
    heat: Cell<u32>,
    /// Its translation, if it has one.
    body: OnceCell<Body>,
}

/// What a cached jump holds for: the context of fetches, the code mode, and how often anything
/// changed that jumps depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct JumpKey(u64);

impl JumpKey {
    const MODE: u32 = 12;
    const GENERATION: u32 = 14;
    /// No processor's: there is no such mode.
    pub(crate) const NONE: JumpKey = JumpKey(u64::MAX);

    pub(crate) fn new(fetch_context: u64, mode: CodeMode, generation: u64) -> JumpKey {
        JumpKey(fetch_context | (mode as u64) << Self::MODE | generation << Self::GENERATION)
    }

    fn generation(self) -> u64 {
        self.0 >> Self::GENERATION
    }

    /// What spreads jumps of several address spaces over a cache. Rights make no difference: user
    /// and supervisor code have other addresses.
    pub(crate) fn salt(self) -> u64 {
        (self.0 >> 2 & 0x3ff).wrapping_mul(0x9d7)
    }

    /// Whether context and mode are the same.
    fn same_place(self, other: JumpKey) -> bool {
        (self.0 ^ other.0) & ((1 << Self::GENERATION) - 1) == 0
    }
}

#[derive(Clone, Copy)]
struct Jump {
    linear: u64,
    key: JumpKey,
    block: *const Block,
}

const NO_JUMP: Jump = Jump {
    linear: 0,
    key: JumpKey::NONE,
    block: core::ptr::null(),
};

#[derive(Default)]
struct Page {
    blocks: Vec<(u64, CodeMode)>,
    /// Blocks checked before this must be checked again.
    epoch: u64,
    unsettled: Option<Unsettled>,
    /// What the page's translated code was made from.
    copy: Option<Box<PageCopy>>,
}

/// The parts of a page that translated code was made from, as they were then. Chains lead from
/// one block of the page to another without a look, so all of it is compared at once.
struct PageCopy {
    /// 64-byte granules held, as bits.
    granules: u64,
    bytes: [[u8; 64]; 64],
    /// When it was last compared.
    checked: u64,
}

impl PageCopy {
    /// Adds the granules that `len` bytes at `hva` touch.
    fn add(&mut self, hva: u64, len: u64) {
        for n in each_bit(granules(hva, len) & !self.granules) {
            let from = (hva & PAGE_MASK) + 64 * n as u64;
            // SAFETY: the page of a block's code, which came from a TLB entry; if the memory has
            // gone, the copy differs from whatever comes there.
            let _ = unsafe { host::copy_from(from, &mut self.bytes[n]) };
            self.granules |= 1 << n;
        }
    }

    /// Whether the page at `page` still holds this, if it was not compared since `epoch`.
    fn is_current_since(&mut self, epoch: u64, page: u64) -> bool {
        if self.checked >= epoch {
            return true;
        }
        let is_current = self.is_current(page);
        if is_current {
            self.checked = epoch;
        }
        is_current
    }

    /// Whether the page at `page` still holds this.
    fn is_current(&self, page: u64) -> bool {
        each_bit(self.granules).all(|n| {
            let mut now = [0; 64];
            // SAFETY: as in `add`.
            unsafe { host::copy_64(page + 64 * n as u64, &mut now) }.is_ok() && now == self.bytes[n]
        })
    }
}

fn each_bit(set: u64) -> impl Iterator<Item = usize> {
    (0..64).filter(move |n| set >> n & 1 != 0)
}

/// Multiplicative hashing: keys are addresses, and lookups are on the way of execution.
#[derive(Default)]
pub(crate) struct AddressHasher(u64);

impl Hasher for AddressHasher {
    fn finish(&self) -> u64 {
        self.0 ^ self.0 >> 32
    }
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(byte.into());
        }
    }
    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0.rotate_left(5) ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
    fn write_isize(&mut self, value: isize) {
        self.write_u64(value as u64);
    }
    fn write_u8(&mut self, value: u8) {
        self.write_u64(value.into());
    }
}

type AddressMap<K, V> = HashMap<K, V, BuildHasherDefault<AddressHasher>>;

/// The code cache of one processor.
pub(crate) struct CodeCache {
    blocks: AddressMap<(u64, CodeMode), Box<Block>>,
    pages: AddressMap<u64, Page>,
    jumps: Box<[Jump; JUMPS]>,
    /// Dropped blocks, one of which may still be executing; freed at the next lookup.
    #[allow(
        clippy::vec_box,
        reason = "a block that may be executing must not move"
    )]
    dropped: Vec<Box<Block>>,
    ops: usize,
    /// Pages that are unsettled, at most.
    unsettled: usize,
    /// Counts what makes blocks be checked: for all of them, and for those of a page.
    clock: u64,
    epoch: u64,
    /// Changes whenever cached jumps are no longer good.
    generation: u64,
    /// How often it changed only because memory may have.
    rechecks: u64,
    /// All other changes up to the last recheck, and the generation of jumps at that time: jumps
    /// from then on lack nothing but the comparison with memory.
    other_changes: u64,
    recheck_from: u64,
}

// SAFETY: the raw block pointers point into `blocks`, which moves with the cache.
unsafe impl Send for CodeCache {}

impl CodeCache {
    pub(crate) fn new() -> CodeCache {
        CodeCache {
            blocks: AddressMap::default(),
            pages: AddressMap::default(),
            jumps: vec![NO_JUMP; JUMPS]
                .try_into()
                .unwrap_or_else(|_| unreachable!()),
            dropped: Vec::new(),
            ops: 0,
            unsettled: 0,
            clock: 1,
            epoch: 1,
            generation: 0,
            rechecks: 0,
            other_changes: 0,
            recheck_from: 0,
        }
    }

    /// Changes whenever cached jumps are no longer good; part of their key.
    pub(crate) fn generation(&self) -> u64 {
        self.generation
    }

    #[inline(always)]
    fn jump_slot(linear: u64, key: JumpKey) -> usize {
        (linear ^ linear >> 12 ^ key.salt()) as usize & (JUMPS - 1)
    }

    /// The block last found for this linear address under this key.
    #[inline(always)]
    pub(crate) fn jump(&self, linear: u64, key: JumpKey) -> Option<*const Block> {
        let jump = &self.jumps[Self::jump_slot(linear, key)];
        (jump.linear == linear && jump.key == key).then_some(jump.block)
    }

    /// The block at `hva`, if its bytes still are what memory holds, remembered for `linear`.
    pub(crate) fn find(
        &mut self,
        hva: u64,
        mode: CodeMode,
        linear: u64,
        key: JumpKey,
    ) -> Option<*const Block> {
        self.dropped.clear();
        let block = self.blocks.get_mut(&(hva, mode))?;
        let page = self.pages.entry(hva & PAGE_MASK).or_default();
        if page.unsettled.as_mut().is_some_and(|u| u.is_settled()) {
            page.unsettled = None;
            self.unsettled = self.unsettled.saturating_sub(1);
        }
        let settled = page.unsettled.is_none();
        if block.crosses {
            return Some(&raw const **block);
        }
        let epoch = self.epoch.max(page.epoch);
        if block.checked < epoch || !settled {
            let is_current = match &mut page.copy {
                Some(copy) if block.body.get().is_some() => {
                    copy.is_current_since(epoch, hva & PAGE_MASK)
                }
                _ => block.is_current(),
            };
            if !is_current {
                self.drop_page(hva & PAGE_MASK);
                return None;
            }
        }
        block.checked = epoch;
        let block: *const Block = &raw const **block;
        if settled {
            self.jumps[Self::jump_slot(linear, key)] = Jump { linear, key, block };
        }
        Some(block)
    }

    /// Whether a page-crossing block found by [`CodeCache::find`] was made from these bytes.
    pub(crate) fn matches(&self, block: *const Block, bytes: &[u8]) -> bool {
        // SAFETY: the caller got the pointer from `find`, and nothing was dropped since.
        *unsafe { &*block }.bytes == *bytes
    }

    /// Adds a block made from `bytes` at `hva`.
    pub(crate) fn insert(
        &mut self,
        hva: u64,
        mode: CodeMode,
        decoded: Decoded,
        bytes: &[u8],
        unsettled: Option<Unsettled>,
    ) -> *const Block {
        let Decoded {
            ops,
            first,
            instructions,
            tail,
            accesses,
            ..
        } = decoded;
        if self.ops > MAX_OPS || self.unsettled > MAX_UNSETTLED {
            self.clear();
        }
        let crosses = (hva & 0xfff) as usize + bytes.len() > 0x1000;
        self.ops += ops.len();
        let page = self.pages.entry(hva & PAGE_MASK).or_default();
        page.blocks.push((hva, mode));
        if unsettled.is_some() {
            self.unsettled += usize::from(page.unsettled.is_none());
            page.unsettled = unsettled;
        }
        let block = Box::new(Block {
            ops: ops.into_boxed_slice(),
            first,
            instructions,
            tail,
            accesses,
            len: bytes.len() as u16,
            hva,
            bytes: bytes.into(),
            crosses,
            checked: self.epoch.max(page.epoch),
            heat: Cell::new(0),
            body: OnceCell::new(),
        });
        let pointer: *const Block = &raw const *block;
        if let Some(old) = self.blocks.insert((hva, mode), block) {
            self.generation += 1;
            self.dropped.push(old);
        }
        pointer
    }

    /// The program that owns guest memory had control: check each block before its next use.
    pub(crate) fn memory_may_have_changed(&mut self) {
        self.clock += 1;
        self.epoch = self.clock;
        self.generation += 1;
        self.rechecks += 1;
    }

    /// The block last found for this linear address, if since then nothing happened but that
    /// memory may have changed, and its bytes did not.
    pub(crate) fn recheck(&mut self, linear: u64, key: JumpKey) -> Option<*const Block> {
        let other_changes = key.generation() - self.rechecks;
        if other_changes != self.other_changes {
            self.other_changes = other_changes;
            self.recheck_from = key.generation();
            return None;
        }
        let jump = &mut self.jumps[Self::jump_slot(linear, key)];
        if jump.linear != linear
            || !jump.key.same_place(key)
            || jump.key.generation() < self.recheck_from
        {
            return None;
        }
        // SAFETY: blocks are dropped only by what counts as another change.
        let block = unsafe { &*jump.block };
        if block.crosses {
            return None;
        }
        let is_current = if block.body.get().is_some() {
            // Its chains lead anywhere in the page.
            let page = self.pages.get_mut(&(block.hva & PAGE_MASK));
            let (epoch, copy) = page.map_or((0, None), |p| (p.epoch, p.copy.as_mut()));
            let epoch = self.epoch.max(epoch);
            copy.is_some_and(|copy| copy.is_current_since(epoch, block.hva & PAGE_MASK))
        } else {
            block.is_current()
        };
        if !is_current {
            return None;
        }
        jump.key = key;
        Some(jump.block)
    }

    /// Whether no other processor may still write to the block's page unseen.
    pub(crate) fn is_settled(&mut self, block: &Block) -> bool {
        let page = self.pages.get_mut(&(block.hva & PAGE_MASK));
        page.is_some_and(|page| page.unsettled.as_mut().is_none_or(|u| u.is_settled()))
    }

    /// Translated code is made from `len` bytes at `hva`, which are compared whenever anything of
    /// their page is.
    pub(crate) fn depend_on(&mut self, hva: u64, len: u64) {
        let epoch = self.epoch;
        let page = self.pages.entry(hva & PAGE_MASK).or_default();
        let copy = page.copy.get_or_insert_with(|| {
            Box::new(PageCopy {
                granules: 0,
                bytes: [[0; 64]; 64],
                checked: epoch.max(page.epoch),
            })
        });
        copy.add(hva, len);
    }

    /// A page was newly mapped for fetching: check its blocks before their next use.
    pub(crate) fn page_mapped(&mut self, page: u64) {
        if let Some(page) = self.pages.get_mut(&page) {
            self.clock += 1;
            page.epoch = self.clock;
        }
    }

    /// Drops the code of one host page.
    pub(crate) fn drop_page(&mut self, page: u64) {
        let Some(page) = self.pages.remove(&page) else {
            return;
        };
        self.unsettled = self
            .unsettled
            .saturating_sub(usize::from(page.unsettled.is_some()));
        for key in page.blocks {
            if let Some(block) = self.blocks.remove(&key) {
                self.ops = self.ops.saturating_sub(block.ops.len());
                self.dropped.push(block);
            }
        }
        self.generation += 1;
    }

    /// Drops everything.
    pub(crate) fn clear(&mut self) {
        self.dropped
            .extend(self.blocks.drain().map(|(_, block)| block));
        self.pages.clear();
        self.ops = 0;
        self.unsettled = 0;
        self.generation += 1;
    }
}

impl Block {
    /// The code it was made from.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Which of the block's ops this is.
    pub(crate) fn index_of(&self, op: &Op) -> u32 {
        // SAFETY: the caller passes an op of this block.
        let index = unsafe { std::ptr::from_ref(op).offset_from(self.ops.as_ptr()) };
        index as u32
    }

    /// How many instructions were executed when op `index` ended the block; `again` if RIP names
    /// its instruction, which is not complete unless it is the last.
    pub(crate) fn executed(&self, index: u32, again: bool) -> u32 {
        if index + self.tail >= self.instructions {
            self.instructions
        } else {
            index + u32::from(!again)
        }
    }

    /// How often it was interpreted.
    pub(crate) fn heat(&self) -> u32 {
        self.heat.get()
    }

    /// It is interpreted once more.
    pub(crate) fn warm(&self) {
        self.heat.set(self.heat.get().saturating_add(1));
    }

    /// Its translation.
    #[inline(always)]
    pub(crate) fn body(&self) -> Option<&Body> {
        self.body.get()
    }

    /// Gives it its translation.
    pub(crate) fn set_body(&self, body: Body) {
        // A block is translated once.
        let _ = self.body.set(body);
    }

    /// Whether memory still holds the bytes the block was made from.
    pub(crate) fn is_current(&self) -> bool {
        let chunks = self.bytes.chunks_exact(8);
        let tail = chunks.remainder();
        let tail_at = self.hva + (self.bytes.len() - tail.len()) as u64;
        // SAFETY: a block's address came from a TLB entry; if the memory has gone since, the
        // loads fail.
        unsafe {
            chunks
                .zip((self.hva..).step_by(8))
                .all(|(chunk, at)| u64::load(at).is_ok_and(|now| now.to_le_bytes() == *chunk))
                && tail
                    .iter()
                    .zip(tail_at..)
                    .all(|(byte, at)| u8::load(at).is_ok_and(|now| now == *byte))
        }
    }

    /// Makes each instruction end the block instead of executing: what follows may be stale.
    pub(crate) fn make_stale(&self, stale: crate::op::Handler) {
        for op in &self.ops {
            op.handler.set(stale);
        }
    }
}
