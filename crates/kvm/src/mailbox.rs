//! How anything reaches a vCPU that runs, sleeps or is not there.
//!
//! A sender posts a [`Request`] and kicks. The vCPU looks at its requests before each entry; the
//! kick makes one that is in guest mode leave it, and wakes one that sleeps in HLT.
//!
//! No request is lost: the sender sets the bit before it kicks, and the vCPU announces that it
//! sleeps before it looks at the bits for the last time.
//!
//! ```text
//! sender: set bit ─ exchange SLEEPING with 0, wake if it was 1
//! vCPU:   store SLEEPING = 1 ─ look at bits ─ futex wait while SLEEPING is 1
//! ```
//!
//! Either the vCPU's look sees the bit, or the sender's exchange comes after the store and finds
//! the sleeper.

use bitflags::bitflags;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

bitflags! {
    /// Work a vCPU does before its next entry.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Request: u32 {
        /// Look for an event to inject: an interrupt may have become deliverable.
        const EVENT = 1 << 0;
        /// An NMI was sent; how many is in [`Mailbox::take_nmis`].
        const NMI = 1 << 1;
        /// An SMI was sent.
        const SMI = 1 << 2;
        /// An INIT was sent.
        const INIT = 1 << 3;
        /// A start-up IPI was sent; its vector is in [`Mailbox::sipi_vector`].
        const SIPI = 1 << 4;
        /// Write the paravirtual clock page.
        const CLOCK_UPDATE = 1 << 5;
        /// Write the steal-time record.
        const STEAL_UPDATE = 1 << 6;
        /// Drop cached translations.
        const TLB_FLUSH = 1 << 7;
        /// Shut the processor down as after a triple fault.
        const TRIPLE_FAULT = 1 << 8;
        /// The local APIC's timer passed: inject and, in a halt, wake.
        const TIMER = 1 << 9;
        /// Return to user space with EINTR.
        const INTERRUPT_RUN = 1 << 10;
        /// Look whether user space wants the vCPU back.
        const YIELD = 1 << 11;
        /// The routing of interrupts changed: recompute which EOIs leave for user space.
        const SCAN_IOAPIC = 1 << 12;
        /// The VM is dead.
        const VM_DEAD = 1 << 13;
        /// The MMU's root is to be loaded anew.
        const MMU_RELOAD = 1 << 14;
        /// The MSR filter changed.
        const MSR_FILTER = 1 << 17;
        /// Ends a halt without an interrupt (paravirtual kick).
        const UNHALT = 1 << 16;
        /// The guest accessed the TPR and user space wants to know.
        const TPR_ACCESS = 1 << 18;
        /// Somebody outside may have written code: what is cached of it is compared with memory.
        const CODE = 1 << 19;
        /// Execution traps changed: what runs now must be checked against them.
        const TRAPS_CHANGED = 1 << 15;
    }
}

/// What stops a processor that is in guest mode.
pub trait Kick: Send + Sync {
    /// Makes the processor leave guest mode soon; async-signal-safe.
    fn kick(&self);
}

/// Why [`Mailbox::sleep`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Woken {
    /// Someone kicked, or there was work.
    Kicked,
    /// A signal handler ran on this thread.
    Signal,
    /// The time is over.
    Timeout,
}

/// The requests of one vCPU.
pub struct Mailbox {
    requests: AtomicU32,
    sleeping: AtomicU32,
    nmis: AtomicU32,
    sipi_vector: AtomicU32,
    kick: Arc<dyn Kick>,
}

impl Mailbox {
    /// An empty mailbox of the processor that `kick` stops.
    pub fn new(kick: Arc<dyn Kick>) -> Mailbox {
        Mailbox {
            requests: AtomicU32::new(0),
            sleeping: AtomicU32::new(0),
            nmis: AtomicU32::new(0),
            sipi_vector: AtomicU32::new(0),
            kick,
        }
    }

    /// Posts `request` and kicks.
    pub fn post(&self, request: Request) {
        self.requests.fetch_or(request.bits(), Ordering::SeqCst);
        self.kick();
    }

    /// Posts `request` for a vCPU that runs, and for the next time that one does which sleeps.
    pub fn post_quietly(&self, request: Request) {
        let before = self.requests.fetch_or(request.bits(), Ordering::SeqCst);
        if before & request.bits() != request.bits() {
            self.kick.kick();
        }
    }

    /// Posts `request` from the vCPU's own thread, which will look before it enters.
    pub fn post_own(&self, request: Request) {
        self.requests.fetch_or(request.bits(), Ordering::SeqCst);
    }

    /// Makes the vCPU look at its requests; async-signal-safe.
    pub fn kick(&self) {
        self.kick.kick();
        if self.sleeping.swap(0, Ordering::SeqCst) == 1 {
            futex_wake(&self.sleeping);
        }
    }

    /// Adds an NMI. At most two are kept: one in service and one pending.
    pub fn send_nmi(&self) {
        let _ = self
            .nmis
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| Some((n + 1).min(2)));
        self.post(Request::NMI);
    }

    /// The NMIs sent and not taken.
    pub fn sent_nmis(&self) -> u32 {
        self.nmis.load(Ordering::SeqCst)
    }

    /// Takes the NMIs sent since the last call.
    pub fn take_nmis(&self) -> u32 {
        self.nmis.swap(0, Ordering::SeqCst)
    }

    /// Adds a start-up IPI.
    pub fn send_sipi(&self, vector: u8) {
        self.sipi_vector.store(vector as u32, Ordering::SeqCst);
        self.post(Request::SIPI);
    }

    /// The vector of the last start-up IPI.
    pub fn sipi_vector(&self) -> u8 {
        self.sipi_vector.load(Ordering::SeqCst) as u8
    }

    /// The requests posted.
    pub fn pending(&self) -> Request {
        Request::from_bits_retain(self.requests.load(Ordering::SeqCst))
    }

    /// Whether no request is posted.
    pub fn is_empty(&self) -> bool {
        self.requests.load(Ordering::Relaxed) == 0
    }

    /// Takes `request`: true if it was posted.
    pub fn take(&self, request: Request) -> bool {
        if !self.pending().intersects(request) {
            return false;
        }
        self.requests.fetch_and(!request.bits(), Ordering::SeqCst) & request.bits() != 0
    }

    /// Sleeps until a kick, a signal or the end of `timeout_ns`, unless `work` is already there.
    pub fn sleep(&self, work: impl Fn() -> bool, timeout_ns: u64) -> Woken {
        self.sleeping.store(1, Ordering::SeqCst);
        if work() {
            self.sleeping.store(0, Ordering::SeqCst);
            return Woken::Kicked;
        }
        let woken = futex_wait(&self.sleeping, timeout_ns);
        self.sleeping.store(0, Ordering::SeqCst);
        woken
    }
}

/// Waits while `word` is 1. With a timeout the wait is never restarted after a signal handler,
/// which is what lets a signal end KVM_RUN; so there always is one.
fn futex_wait(word: &AtomicU32, timeout_ns: u64) -> Woken {
    let timeout_ns = timeout_ns.min(1 << 62);
    let time = libc::timespec {
        tv_sec: (timeout_ns / 1_000_000_000) as i64,
        tv_nsec: (timeout_ns % 1_000_000_000) as i64,
    };
    // SAFETY: `word` outlives the call and `time` is a valid timespec.
    let result = unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
            1,
            &time,
        )
    };
    if result == 0 {
        return Woken::Kicked;
    }
    match std::io::Error::last_os_error().raw_os_error() {
        Some(libc::EINTR) => Woken::Signal,
        Some(libc::ETIMEDOUT) => Woken::Timeout,
        _ => Woken::Kicked,
    }
}

fn futex_wake(word: &AtomicU32) {
    // SAFETY: FUTEX_WAKE only uses the address.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG,
            1,
        )
    };
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    /// A processor that only counts its kicks.
    #[derive(Default)]
    pub(crate) struct Counter(pub(crate) AtomicU32);

    impl Kick for Counter {
        fn kick(&self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(crate) fn mailbox() -> Arc<Mailbox> {
        Arc::new(Mailbox::new(Arc::new(Counter::default())))
    }

    #[test]
    fn a_request_wakes_a_sleeper() {
        let mailbox = mailbox();
        let sender = mailbox.clone();
        let thread = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(5));
            sender.post(Request::EVENT);
        });
        let start = Instant::now();
        while !mailbox.take(Request::EVENT) {
            mailbox.sleep(|| !mailbox.is_empty(), 5_000_000_000);
        }
        assert!(start.elapsed() < Duration::from_secs(4));
        thread.join().unwrap();
        assert!(mailbox.is_empty());
    }

    #[test]
    fn nothing_is_lost_between_look_and_sleep() {
        let mailbox = mailbox();
        let sender = mailbox.clone();
        let thread = std::thread::spawn(move || {
            for _ in 0..2000 {
                sender.post(Request::EVENT);
                while !sender.is_empty() {
                    std::hint::spin_loop();
                }
            }
        });
        for _ in 0..2000 {
            while !mailbox.take(Request::EVENT) {
                let woken = mailbox.sleep(|| !mailbox.is_empty(), 10_000_000_000);
                assert_ne!(woken, Woken::Timeout);
            }
        }
        thread.join().unwrap();
    }

    #[test]
    fn nmis_collapse_to_two() {
        let mailbox = mailbox();
        (0..5).for_each(|_| mailbox.send_nmi());
        assert!(mailbox.take(Request::NMI));
        assert_eq!((mailbox.take_nmis(), mailbox.take_nmis()), (2, 0));
    }
}
