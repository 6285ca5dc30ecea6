//! The crate's own threads, which deliver interrupts and timers and watch vCPUs.
//!
//! No signal of the program is delivered to them, and they keep off the processors on which vCPUs
//! compute, if there are others: to wake up on one costs an interprocessor interrupt and takes the
//! processor from the guest for two switches, several times the work itself, and the scheduler
//! leaves a thread that mostly sleeps where it slept.

use rustix::thread::{CpuSet, Pid, gettid, sched_getaffinity, sched_setaffinity};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

/// A thread that runs.
struct Helper {
    task: Pid,
    /// The processors it was started with.
    allowed: CpuSet,
    /// Those it has been confined to.
    confined: CpuSet,
}

#[derive(Default)]
struct Helpers {
    all: Vec<Helper>,
    /// What all of them were last kept off.
    busy: CpuSet,
}

fn helpers() -> MutexGuard<'static, Helpers> {
    static HELPERS: LazyLock<Mutex<Helpers>> = LazyLock::new(Mutex::default);
    HELPERS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Among the [`Helpers`] while it lives.
struct Registration(Pid);

impl Registration {
    fn new() -> Registration {
        let task = gettid();
        // A machine with more processors than the set holds has some to spare.
        if let Ok(allowed) = sched_getaffinity(None) {
            let mut helpers = helpers();
            helpers.all.push(Helper {
                task,
                allowed,
                confined: allowed,
            });
            helpers.busy = CpuSet::new();
        }
        Registration(task)
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        helpers().all.retain(|helper| helper.task != self.0);
    }
}

/// Starts a thread.
pub fn spawn<T: Send + 'static>(
    name: &str,
    body: impl FnOnce() -> T + Send + 'static,
) -> std::io::Result<std::thread::JoinHandle<T>> {
    crate::signals::while_blocked(|| {
        // A thread starts with the mask of the one that starts it.
        let thread = std::thread::Builder::new().name(name.into());
        thread.spawn(|| {
            let _registration = Registration::new();
            body()
        })
    })
}

/// Confines the threads to processors that are not `busy`.
pub(crate) fn keep_off(busy: &CpuSet) {
    let mut helpers = helpers();
    if std::mem::replace(&mut helpers.busy, *busy) == *busy {
        return;
    }
    for helper in &mut helpers.all {
        let choice = choose(&helper.allowed, busy);
        if choice != helper.confined {
            helper.confined = choice;
            // What somebody else forbids since (a cpuset) is theirs to decide.
            let _ = sched_setaffinity(Some(helper.task), &choice);
        }
    }
}

/// The processors of `allowed` that are not `busy`; all of them if none is left.
fn choose(allowed: &CpuSet, busy: &CpuSet) -> CpuSet {
    let mut free = CpuSet::new();
    for processor in (0..CpuSet::MAX_CPU).filter(|&n| allowed.is_set(n) && !busy.is_set(n)) {
        free.set(processor);
    }
    if free.count() == 0 { *allowed } else { free }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    fn set(processors: &[usize]) -> CpuSet {
        let mut set = CpuSet::new();
        processors.iter().for_each(|&n| set.set(n));
        set
    }

    #[test]
    fn a_free_processor_is_preferred() {
        assert_eq!(choose(&set(&[0, 1, 5]), &set(&[1, 7])), set(&[0, 5]));
        assert_eq!(choose(&set(&[0, 1]), &set(&[0, 1, 2])), set(&[0, 1]));
        assert_eq!(choose(&set(&[3]), &set(&[])), set(&[3]));
    }

    #[test]
    fn a_thread_is_registered_while_it_runs() {
        let (at, arrived) = channel();
        let (go, gone) = channel::<()>();
        let thread = spawn("helper", move || {
            at.send(gettid()).unwrap();
            let _ = gone.recv();
        });
        let task = arrived.recv().unwrap();
        let is_known = || helpers().all.iter().any(|helper| helper.task == task);
        assert!(is_known());
        drop(go);
        thread.unwrap().join().unwrap();
        assert!(!is_known());
    }
}
