//! System behaviour on small guests: exceptions, exits, modes, translation, code coherence.
#![allow(unreachable_pub, reason = "modules of a test binary")]

#[path = "system/bench.rs"]
mod bench;
#[path = "system/boundaries.rs"]
mod boundaries;
#[path = "system/encodings.rs"]
mod encodings;
#[path = "system/exceptions.rs"]
mod exceptions;
#[path = "system/exits.rs"]
mod exits;
mod guest;
#[path = "system/modes.rs"]
mod modes;
#[path = "system/monitor_trap.rs"]
mod monitor_trap;
#[path = "system/paging.rs"]
mod paging;
#[path = "system/pending_debug.rs"]
mod pending_debug;
#[path = "system/reasons.rs"]
mod reasons;
#[path = "system/translation.rs"]
mod translation;
#[path = "system/virtual_8086.rs"]
mod virtual_8086;
#[path = "system/virtual_apic.rs"]
mod virtual_apic;
#[path = "system/walk_caches.rs"]
mod walk_caches;
