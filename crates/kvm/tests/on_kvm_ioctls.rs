//! The API tests once more, against `kvm-ioctls` and a `/dev/kvm`.
//!
//! Not among the tests that run by default, as the host's KVM may not be theirs to use.
//! `cargo xtask check "tests on kvm-ioctls"` runs them with the preload library, as any program for
//! KVM runs on Eptide; without it they test the host's KVM.
#![allow(clippy::duplicate_mod, reason = "each program has a module of helpers")]

// To the modules below, this program is the crate they test.
extern crate self as eptide_kvm;

pub use kvm_ioctls::*;

/// The host's KVM pages as it was configured to.
#[derive(Default)]
pub struct Options {
    /// Without effect.
    pub ept: bool,
}

impl Options {
    /// There is no choice.
    pub fn with_ept(self, ept: bool) -> Options {
        Options { ept }
    }
}

#[path = "conformance.rs"]
mod conformance;
#[path = "corners.rs"]
mod corners;
#[path = "debugger.rs"]
mod debugger;
#[path = "devices.rs"]
mod devices;
#[path = "events.rs"]
mod events;
#[path = "guests.rs"]
mod guests;
#[path = "halts.rs"]
mod halts;
#[path = "msrs.rs"]
mod msrs;
#[path = "paravirtual.rs"]
mod paravirtual;
mod portable_examples;
#[path = "processors.rs"]
mod processors;
#[path = "rewritten.rs"]
mod rewritten;
#[path = "signals.rs"]
mod signals;
#[path = "smm.rs"]
mod smm;
#[path = "stress.rs"]
mod stress;
#[path = "task_switch.rs"]
mod task_switch;
#[path = "thin.rs"]
mod thin;
#[path = "timers.rs"]
mod timers;
