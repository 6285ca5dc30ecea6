//! What the processors of one machine share: who holds decoded code of which page, and how they
//! are told.
//!
//! Every processor has a code cache of its own. The machine keeps, for each host page from which
//! some processor decoded code, which 64-byte granules that code came from. A processor fills no
//! fast write translation for such a page; its stores there take the slow path and call
//! [`Machine::note_store`]. A store that hits a granule drops the page's record and tells every
//! processor to drop its code of that page, which each does before its next block.
//!
//! A processor that decodes from a page no one had code of must also revoke the others' fast
//! write translations. It asks for it and goes on; until all have answered, the blocks it made
//! are compared with memory at each execution (`CodeCache` keeps them unsettled), so that a store
//! made meanwhile through an old translation is not missed.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

const PAGE_MASK: u64 = !0xfff;

/// Reasons for a processor to pause between two blocks, as bits of [`Attention::flags`].
pub(crate) mod request {
    /// Leave guest mode: [`super::Attention::kick`].
    pub(crate) const KICK: u32 = 1 << 0;
    /// Work of other processors waits in the queues.
    pub(crate) const QUEUE: u32 = 1 << 1;
    /// The processor's own business: pending events, windows, single steps.
    pub(crate) const OWN: u32 = 1 << 2;
    /// Interrupts were posted: [`super::Attention::notify`].
    pub(crate) const NOTIFICATION: u32 = 1 << 3;
}

/// How other threads get a processor's attention.
#[derive(Debug, Default)]
pub struct Attention {
    pub(crate) flags: AtomicU32,
    in_guest: AtomicBool,
    /// Requests queued and answered; equal when nothing is owed.
    asked: AtomicU64,
    answered: AtomicU64,
    queue: Mutex<Queue>,
}

/// Pages that a processor is told of one by one: a guest can report them faster than a processor
/// that sleeps hears of them.
const QUEUED_PAGES: usize = 64;

/// Host pages: some, or more than are told apart.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Pages {
    Some(Vec<u64>),
    All,
}

impl Default for Pages {
    fn default() -> Pages {
        Pages::Some(Vec::new())
    }
}

impl Pages {
    fn add(&mut self, page: u64) {
        match self {
            Pages::Some(pages) if pages.len() < QUEUED_PAGES => pages.push(page),
            _ => *self = Pages::All,
        }
    }
}

/// Pages that other processors reported.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Queue {
    /// Host pages whose fast write translations must go.
    pub(crate) revoke: Pages,
    /// Host pages whose decoded code must go.
    pub(crate) drop_code: Pages,
}

#[cfg(test)]
impl Queue {
    const ALL: Queue = Queue {
        revoke: Pages::All,
        drop_code: Pages::All,
    };
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // The data behind these locks is valid at every point, so a panicked holder harms nobody.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Attention {
    /// Makes the processor leave guest mode within one basic block, as an interrupt to the
    /// physical processor would. Outside guest mode the next entry leaves at once. May be called
    /// from a signal handler.
    pub fn kick(&self) {
        self.flags.fetch_or(request::KICK, Ordering::SeqCst);
    }

    /// Takes back a kick that has not been answered. For the processor's own thread.
    pub fn clear_kick(&self) {
        self.flags.fetch_and(!request::KICK, Ordering::SeqCst);
    }

    /// Sends the posted-interrupt notification: under posted-interrupt processing the processor
    /// takes over what the descriptor holds, without an exit; otherwise it leaves guest mode as for
    /// any interrupt.
    pub fn notify(&self) {
        self.flags.fetch_or(request::NOTIFICATION, Ordering::SeqCst);
    }

    pub(crate) fn clear_notification(&self) {
        self.flags
            .fetch_and(!request::NOTIFICATION, Ordering::SeqCst);
    }

    /// Address of the word that generated code looks at.
    pub(crate) fn address(&self) -> u64 {
        self.flags.as_ptr() as u64
    }

    /// Whether the processor is in guest mode, or soon will be: see
    /// [`Vcpu::rest`](crate::Vcpu::rest).
    pub fn in_guest(&self) -> bool {
        self.in_guest.load(Ordering::SeqCst)
    }

    /// The processor will execute. Whoever asks from now on waits for its answer; what was asked
    /// before is seen by a look at the flags after this.
    pub(crate) fn enter_guest(&self) {
        self.in_guest.store(true, Ordering::SeqCst);
    }

    /// Like [`Attention::enter_guest`], with the fence left to the caller: any locked instruction
    /// is one on x86.
    pub(crate) fn announce(&self) {
        self.in_guest.store(true, Ordering::Relaxed);
    }

    /// The processor executes nothing until it says so. Its stores come before this.
    pub(crate) fn leave_guest(&self) {
        self.in_guest.store(false, Ordering::Release);
    }

    fn ask(&self, add: impl FnOnce(&mut Queue)) -> u64 {
        let mut queue = lock(&self.queue);
        add(&mut queue);
        let ticket = self.asked.fetch_add(1, Ordering::SeqCst) + 1;
        self.flags.fetch_or(request::QUEUE, Ordering::SeqCst);
        ticket
    }

    /// Takes what is queued. [`Attention::answer`] must follow when it is done.
    pub(crate) fn take(&self) -> (Queue, u64) {
        let mut queue = lock(&self.queue);
        self.flags.fetch_and(!request::QUEUE, Ordering::SeqCst);
        (
            std::mem::take(&mut *queue),
            self.asked.load(Ordering::SeqCst),
        )
    }

    pub(crate) fn answer(&self, ticket: u64) {
        self.answered.store(ticket, Ordering::SeqCst);
    }

    /// Whether the request with that ticket has been carried out, or the processor is outside
    /// guest mode and will carry it out before it next executes anything.
    fn settled(&self, ticket: u64) -> bool {
        !self.in_guest() || self.answered.load(Ordering::SeqCst) >= ticket
    }
}

/// Requests to revoke write translations that others have not answered yet.
pub(crate) struct Unsettled(Vec<(Arc<Attention>, u64)>);

impl Unsettled {
    /// Whether every processor has answered.
    pub(crate) fn is_settled(&mut self) -> bool {
        self.0
            .retain(|(attention, ticket)| !attention.settled(*ticket));
        self.0.is_empty()
    }
}

/// What the processors of one virtual machine share.
#[derive(Debug, Default)]
pub struct Machine {
    processors: Mutex<Vec<Arc<Attention>>>,
    /// Host page → granules that hold decoded code.
    code: RwLock<HashMap<u64, u64>>,
    split_lock: Mutex<()>,
}

impl Machine {
    /// A machine without processors.
    pub fn new() -> Arc<Machine> {
        Arc::new(Machine::default())
    }

    pub(crate) fn add_processor(&self) -> Arc<Attention> {
        let attention = Arc::new(Attention::default());
        lock(&self.processors).push(attention.clone());
        attention
    }

    pub(crate) fn remove_processor(&self, attention: &Arc<Attention>) {
        lock(&self.processors).retain(|a| !Arc::ptr_eq(a, attention));
    }

    /// Serialises locked accesses that no single host instruction can make.
    pub(crate) fn split_lock(&self) -> MutexGuard<'_, ()> {
        lock(&self.split_lock)
    }

    /// Whether some processor holds code decoded from the page of `hva`.
    pub(crate) fn has_code(&self, hva: u64) -> bool {
        let code = self.code.read().unwrap_or_else(PoisonError::into_inner);
        code.contains_key(&(hva & PAGE_MASK))
    }

    /// Records that code was decoded from `len` bytes at `hva`, inside one page. `None` if nothing
    /// is owed; else the answers to wait for before the code may be trusted.
    pub(crate) fn register_code(
        &self,
        me: &Arc<Attention>,
        hva: u64,
        len: u64,
    ) -> Option<Unsettled> {
        let page = hva & PAGE_MASK;
        let mask = granules(hva, len);
        {
            let mut code = self.code.write().unwrap_or_else(PoisonError::into_inner);
            let known = code.entry(page).or_insert(0);
            let had_code = *known != 0;
            *known |= mask;
            if had_code {
                return None;
            }
        }
        // Mapped before asking: a processor that looked before sees the request afterwards, one
        // that looks later sees the page.
        let unsettled = lock(&self.processors)
            .iter()
            .filter(|other| !Arc::ptr_eq(other, me))
            .map(|other| (other.clone(), other.ask(|queue| queue.revoke.add(page))))
            .collect();
        Some(Unsettled(unsettled))
    }

    /// A store of `len` bytes at `hva` has been made. Returns whether it hit code; then every
    /// processor has been told.
    pub(crate) fn note_store(&self, hva: u64, len: u64) -> bool {
        let page = hva & PAGE_MASK;
        {
            let code = self.code.read().unwrap_or_else(PoisonError::into_inner);
            if code
                .get(&page)
                .is_none_or(|known| known & granules(hva, len) == 0)
            {
                return false;
            }
        }
        self.code
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&page);
        for processor in lock(&self.processors).iter() {
            processor.ask(|queue| queue.drop_code.add(page));
        }
        true
    }
}

/// The 64-byte granules of a page that `len` bytes at `hva` touch.
pub(crate) fn granules(hva: u64, len: u64) -> u64 {
    let first = (hva & 0xfff) >> 6;
    let last = ((hva & 0xfff) + len.max(1) - 1).min(0xfff) >> 6;
    (u64::MAX >> (63 - (last - first))) << first
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn granules_cover_what_is_touched() {
        assert_eq!(granules(0x1000, 1), 1);
        assert_eq!(granules(0x103f, 2), 3);
        assert_eq!(granules(0x1fff, 8), 1 << 63);
        assert_eq!(granules(0x1000, 0x1000), u64::MAX);
    }

    #[test]
    fn a_store_into_code_tells_every_processor_once() {
        let machine = Machine::new();
        let (a, b) = (machine.add_processor(), machine.add_processor());
        assert!(machine.register_code(&a, 0x5040, 10).is_some());
        assert!(machine.register_code(&b, 0x5080, 10).is_none());
        assert_eq!(b.take().0.revoke, Pages::Some(vec![0x5000]));
        assert!(!machine.note_store(0x5000, 8));
        assert!(machine.note_store(0x5084, 1));
        assert!(!machine.note_store(0x5084, 1));
        for processor in [&a, &b] {
            assert_eq!(processor.take().0.drop_code, Pages::Some(vec![0x5000]));
        }
        assert!(!machine.has_code(0x5abc));
    }

    #[test]
    fn what_waits_for_an_idle_processor_is_bounded() {
        let machine = Machine::new();
        let (a, b) = (machine.add_processor(), machine.add_processor());
        for page in 0..100_000 {
            machine.register_code(&a, page << 12, 16);
            assert!(machine.note_store(page << 12, 8));
        }
        assert_eq!(b.take().0, Queue::ALL);
        assert_eq!(b.take().0, Queue::default());
    }

    #[test]
    fn code_is_unsettled_until_processors_in_guest_mode_answer() {
        let machine = Machine::new();
        let (a, b) = (machine.add_processor(), machine.add_processor());
        b.enter_guest();
        let mut unsettled = machine.register_code(&a, 0x7000, 4).unwrap();
        assert!(!unsettled.is_settled());
        let (_, ticket) = b.take();
        b.answer(ticket);
        assert!(unsettled.is_settled());
    }
}
