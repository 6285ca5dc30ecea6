//! What a processor in guest mode cannot notice by itself: `immediate_exit` set by another thread,
//! blocked signals that KVM_SET_SIGNAL_MASK lets through, and signal handlers that are not covered
//! yet ([`crate::signals`]).
//!
//! One thread looks at every running vCPU a thousand times a second.

use crate::vcpu::Vcpu;
use std::sync::{Condvar, Mutex, OnceLock, PoisonError, Weak};
use std::time::Duration;

/// How often the thread looks.
const INTERVAL: Duration = Duration::from_millis(1);
/// Looks without a running vCPU after which the thread sleeps.
const IDLE_LOOKS: u32 = 100;

#[derive(Default)]
struct Watch {
    vcpus: Mutex<Vec<Weak<Vcpu>>>,
    awake: Mutex<bool>,
    wake: Condvar,
}

fn watch() -> &'static Watch {
    static WATCH: OnceLock<&'static Watch> = OnceLock::new();
    WATCH.get_or_init(|| {
        let watch: &'static Watch = Box::leak(Box::default());
        if let Err(error) = crate::signals::quiet_thread("kvm-watch", || watch.serve()) {
            tracing::warn!(%error, "no watch thread: immediate_exit is seen at exits only");
        }
        watch
    })
}

/// Adds a vCPU to those looked at.
pub(crate) fn add(vcpu: Weak<Vcpu>) {
    let mut vcpus = watch().vcpus.lock().unwrap_or_else(PoisonError::into_inner);
    vcpus.retain(|vcpu| vcpu.strong_count() > 0);
    vcpus.push(vcpu);
}

/// A vCPU begins to run: makes sure that the thread looks.
pub(crate) fn begin(vcpu: &Vcpu) {
    use std::sync::atomic::Ordering::Relaxed;
    if vcpu.is_watched.load(Relaxed) {
        return;
    }
    vcpu.is_watched.store(true, Relaxed);
    crate::signals::cover();
    let watch = watch();
    let mut awake = watch.awake.lock().unwrap_or_else(PoisonError::into_inner);
    if !*awake {
        *awake = true;
        watch.wake.notify_one();
    }
}

impl Watch {
    fn serve(&self) {
        let mut idle = 0;
        loop {
            std::thread::sleep(INTERVAL);
            let running = self.look();
            if running {
                crate::signals::cover();
            }
            idle = if running { 0 } else { idle + 1 };
            if idle > IDLE_LOOKS {
                self.rest();
                idle = 0;
            }
        }
    }

    fn vcpus(&self) -> Vec<std::sync::Arc<Vcpu>> {
        let vcpus = self.vcpus.lock().unwrap_or_else(PoisonError::into_inner);
        vcpus.iter().filter_map(Weak::upgrade).collect()
    }

    /// Kicks the vCPUs that have a reason to leave; whether any runs.
    fn look(&self) -> bool {
        let mut any = false;
        for vcpu in self.vcpus() {
            if vcpu.is_running() {
                any = true;
                if vcpu.wants_look() {
                    vcpu.mailbox().post(crate::mailbox::Request::YIELD);
                }
            }
        }
        any
    }

    /// Sleeps until a vCPU begins to run.
    fn rest(&self) {
        use std::sync::atomic::Ordering::Relaxed;
        let mut awake = self.awake.lock().unwrap_or_else(PoisonError::into_inner);
        for vcpu in self.vcpus() {
            vcpu.is_watched.store(false, Relaxed);
        }
        if self.vcpus().iter().any(|vcpu| vcpu.is_running()) {
            return;
        }
        *awake = false;
        while !*awake {
            awake = self
                .wake
                .wait(awake)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}
