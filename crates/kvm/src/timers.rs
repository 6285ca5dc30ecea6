//! The timer thread of a VM.
//!
//! Every virtual timer (a local APIC's, the PIT's) is a [`Timer`]: one deadline on
//! CLOCK_MONOTONIC, or none. One thread per VM, started with the first deadline, sleeps until
//! the nearest and calls [`Expiry::expired`] of those that have passed, never of one that has
//! not.
//!
//! Lock order: a target may arm and disarm its own timer with its own lock held, since the
//! thread calls targets with no lock of this module held. A target therefore checks under its
//! lock that the deadline it stored has passed: an expiry that was overtaken by a new deadline
//! is then recognised and ignored.

use crate::time::monotonic_ns;
use std::collections::BTreeSet;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::{JoinHandle, ThreadId};
use std::time::Duration;

/// What a timer belongs to.
pub trait Expiry: Send + Sync {
    /// A deadline of this target's timer has passed.
    fn expired(&self);
}

struct Slot {
    target: Weak<dyn Expiry>,
    deadline: Option<u64>,
}

#[derive(Default)]
struct Queue {
    slots: Vec<Option<Slot>>,
    order: BTreeSet<(u64, usize)>,
    thread: Option<ThreadId>,
    stop: bool,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    wake: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The timers of one VM and the thread that serves them.
#[derive(Default)]
pub struct Timers {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Timers {
    /// No timers and no thread yet.
    pub fn new() -> Timers {
        Timers::default()
    }

    /// Starts the thread now rather than with the first deadline: for callers about to lose the
    /// right to start threads.
    pub fn start(&self) {
        let mut handle = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if handle.is_some() {
            return;
        }
        let shared = self.shared.clone();
        let spawned = crate::helpers::spawn("kvm-timers", move || serve(&shared));
        if let Ok(spawned) = spawned {
            self.shared.lock().thread = Some(spawned.thread().id());
            *handle = Some(spawned);
        }
    }

    /// A new timer that calls `target`.
    pub fn register(&self, target: Weak<dyn Expiry>) -> Timer {
        self.start();
        let mut queue = self.shared.lock();
        let slot = Slot {
            target,
            deadline: None,
        };
        let key = match queue.slots.iter().position(Option::is_none) {
            Some(free) => {
                queue.slots[free] = Some(slot);
                free
            }
            None => {
                queue.slots.push(Some(slot));
                queue.slots.len() - 1
            }
        };
        Timer {
            shared: self.shared.clone(),
            key,
        }
    }
}

impl Drop for Timers {
    fn drop(&mut self) {
        let mut queue = self.shared.lock();
        queue.stop = true;
        let own_thread = queue.thread == Some(std::thread::current().id());
        drop(queue);
        self.shared.wake.notify_all();
        let handle = self
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        // The last owner of a VM can be the expiry that runs on the thread itself.
        if let Some(handle) = handle
            && !own_thread
        {
            let _ = handle.join();
        }
    }
}

fn serve(shared: &Shared) {
    let mut queue = shared.lock();
    while !queue.stop {
        let now = monotonic_ns();
        let next = queue.order.first().copied();
        queue = match next {
            Some((deadline, key)) if deadline <= now => {
                queue.order.remove(&(deadline, key));
                let target = queue.slots[key].as_mut().and_then(|slot| {
                    slot.deadline = None;
                    slot.target.upgrade()
                });
                drop(queue);
                if let Some(target) = target {
                    target.expired();
                }
                shared.lock()
            }
            Some((deadline, _)) => {
                let wait = Duration::from_nanos(deadline - now);
                shared
                    .wake
                    .wait_timeout(queue, wait)
                    .unwrap_or_else(PoisonError::into_inner)
                    .0
            }
            None => shared
                .wake
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner),
        };
    }
}

/// One deadline of one target.
pub struct Timer {
    shared: Arc<Shared>,
    key: usize,
}

impl Timer {
    /// Sets the deadline, replacing the previous one.
    pub fn arm(&self, deadline: u64) {
        self.set(Some(deadline));
    }

    /// Removes the deadline.
    pub fn disarm(&self) {
        self.set(None);
    }

    fn set(&self, deadline: Option<u64>) {
        let mut queue = self.shared.lock();
        let Some(slot) = queue.slots[self.key].as_mut() else {
            return;
        };
        let old = std::mem::replace(&mut slot.deadline, deadline);
        if old == deadline {
            return;
        }
        let first = queue.order.first().copied();
        if let Some(old) = old {
            queue.order.remove(&(old, self.key));
        }
        if let Some(deadline) = deadline {
            queue.order.insert((deadline, self.key));
        }
        let earlier = queue.order.first() < first.as_ref() || first.is_none();
        drop(queue);
        if earlier && deadline.is_some() {
            self.shared.wake.notify_one();
        }
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        self.disarm();
        self.shared.lock().slots[self.key] = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    struct Probe(Mutex<mpsc::Sender<u64>>);

    impl Expiry for Probe {
        fn expired(&self) {
            let _ = self.0.lock().unwrap().send(monotonic_ns());
        }
    }

    #[test]
    fn fires_in_order_and_never_early() {
        let timers = Timers::new();
        let (send, receive) = mpsc::channel();
        let probes: Vec<Arc<dyn Expiry>> = (0..3)
            .map(|_| Arc::new(Probe(Mutex::new(send.clone()))) as Arc<dyn Expiry>)
            .collect();
        let handles: Vec<_> = probes
            .iter()
            .map(|p| timers.register(Arc::downgrade(p)))
            .collect();
        let start = monotonic_ns();
        handles[0].arm(start + 9_000_000);
        handles[1].arm(start + 3_000_000);
        handles[2].arm(start + 1_000_000);
        handles[2].arm(start + 6_000_000);
        for expected in [3_000_000, 6_000_000, 9_000_000] {
            assert!(receive.recv().unwrap() >= start + expected);
        }
    }

    #[test]
    fn a_disarmed_timer_stays_quiet() {
        let timers = Timers::new();
        let (send, receive) = mpsc::channel();
        let probe: Arc<dyn Expiry> = Arc::new(Probe(Mutex::new(send)));
        let timer = timers.register(Arc::downgrade(&probe));
        timer.arm(monotonic_ns() + 2_000_000);
        timer.disarm();
        assert!(receive.recv_timeout(Duration::from_millis(10)).is_err());
        timer.arm(0);
        assert!(receive.recv_timeout(Duration::from_secs(5)).is_ok());
    }
}
