//! What a processor in guest mode cannot notice by itself: `immediate_exit` set by another thread,
//! blocked signals that KVM_SET_SIGNAL_MASK lets through, and signal handlers that are not covered
//! yet ([`crate::signals`]). And on which processors vCPUs run, which others keep off
//! ([`crate::helpers`]).
//!
//! One thread looks at every running vCPU a thousand times a second.

use crate::vcpu::Vcpu;
use rustix::thread::CpuSet;
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

/// How often the thread looks.
const INTERVAL: Duration = Duration::from_millis(1);
/// Looks without a running vCPU after which the thread sleeps.
const IDLE_LOOKS: u32 = 100;

/// Looks between two looks at the program's signal handlers that nobody asked for: they are some
/// sixty system calls.
const COVER_INTERVAL: u32 = 8;
/// Looks between two looks at how long a vCPU's thread had to wait for a processor.
const DELAY_INTERVAL: u32 = 100;

#[derive(Default)]
struct Watch {
    vcpus: Mutex<Vec<Weak<Vcpu>>>,
    state: Mutex<State>,
    /// The thread has something to do.
    wake: Condvar,
    /// `State::covered` has changed.
    done: Condvar,
}

#[derive(Default)]
struct State {
    /// Looks at the program's signal handlers that were asked for, and the last one made since.
    asked: u64,
    covered: u64,
}

/// Nobody has asked for a look.
fn waits(state: &mut State) -> bool {
    state.covered == state.asked
}

fn watch() -> Option<&'static Watch> {
    static WATCH: OnceLock<Option<&'static Watch>> = OnceLock::new();
    *WATCH.get_or_init(|| {
        let watch: &'static Watch = Box::leak(Box::default());
        match crate::helpers::spawn("kvm-watch", || watch.serve()) {
            Ok(_) => Some(watch),
            Err(error) => {
                tracing::warn!(%error, "no watch thread: immediate_exit is seen at exits only");
                None
            }
        }
    })
}

/// Adds a vCPU to those looked at.
pub(crate) fn add(vcpu: Weak<Vcpu>) {
    let Some(watch) = watch() else { return };
    let mut vcpus = watch.vcpus.lock().unwrap_or_else(PoisonError::into_inner);
    vcpus.retain(|vcpu| vcpu.strong_count() > 0);
    vcpus.push(vcpu);
}

/// A vCPU begins to run: makes sure that the thread looks, and that the handlers that the program
/// has installed by now are covered.
pub(crate) fn begin(vcpu: &Vcpu) {
    use std::sync::atomic::Ordering::Relaxed;
    if vcpu.is_watched.load(Relaxed) {
        return;
    }
    vcpu.is_watched.store(true, Relaxed);
    let Some(watch) = watch() else { return };
    let mut state = watch.state();
    state.asked += 1;
    let ticket = state.asked;
    watch.wake.notify_one();
    while state.covered < ticket {
        state = watch
            .done
            .wait(state)
            .unwrap_or_else(PoisonError::into_inner);
    }
}

impl Watch {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self) {
        let (mut idle, mut looks) = (0, 0u32);
        loop {
            let asked = self.pause();
            looks = looks.wrapping_add(1);
            if asked || looks.is_multiple_of(COVER_INTERVAL) {
                self.cover();
            }
            let running = self.look(looks.is_multiple_of(DELAY_INTERVAL));
            idle = if running { 0 } else { idle + 1 };
            if idle > IDLE_LOOKS {
                self.rest();
                idle = 0;
            }
        }
    }

    /// Waits for the next look, or until somebody asks for signal handlers to be covered: true then.
    fn pause(&self) -> bool {
        let state = self.state();
        let waited = self.wake.wait_timeout_while(state, INTERVAL, waits);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        !waits(&mut state)
    }

    /// Covers signal handlers.
    fn cover(&self) {
        let asked = self.state().asked;
        crate::signals::cover();
        self.state().covered = asked;
        self.done.notify_all();
    }

    fn vcpus(&self) -> Vec<std::sync::Arc<Vcpu>> {
        let vcpus = self.vcpus.lock().unwrap_or_else(PoisonError::into_inner);
        vcpus.iter().filter_map(Weak::upgrade).collect()
    }

    /// Kicks the vCPUs that have a reason to leave; whether any runs.
    fn look(&self, at_delays: bool) -> bool {
        let (mut any, mut busy) = (false, CpuSet::new());
        for vcpu in self.vcpus() {
            if vcpu.is_running() {
                any = true;
                if vcpu.processor() < CpuSet::MAX_CPU {
                    busy.set(vcpu.processor());
                }
                if vcpu.wants_look() {
                    vcpu.mailbox().post(crate::mailbox::Request::YIELD);
                }
            }
            if at_delays {
                vcpu.run_delay().refresh();
            }
        }
        if any {
            crate::helpers::keep_off(&busy);
        }
        any
    }

    /// Sleeps until a vCPU begins to run.
    fn rest(&self) {
        use std::sync::atomic::Ordering::Relaxed;
        let state = self.state();
        for vcpu in self.vcpus() {
            vcpu.is_watched.store(false, Relaxed);
        }
        // A vCPU that found itself watched just before has said that it runs; the other processor
        // sees it long before the wait is over.
        let waited = self.wake.wait_timeout_while(state, INTERVAL, waits);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if !self.vcpus().iter().any(|vcpu| vcpu.is_running()) {
            drop(self.wake.wait_while(state, waits));
        }
    }
}
