//! The guest tests once more, in VMs without EPT.
#![allow(clippy::duplicate_mod, reason = "each program has a module of helpers")]

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
#[path = "execution_traps.rs"]
mod execution_traps;
#[path = "forms.rs"]
mod forms;
#[path = "guests.rs"]
mod guests;
#[path = "halts.rs"]
mod halts;
#[path = "paravirtual.rs"]
mod paravirtual;
#[path = "processors.rs"]
mod processors;
#[path = "progress.rs"]
mod progress;
#[path = "rewritten.rs"]
mod rewritten;
#[path = "smm.rs"]
mod smm;
#[path = "stress.rs"]
mod stress;
#[path = "string_io.rs"]
mod string_io;
#[path = "task_priority.rs"]
mod task_priority;
#[path = "task_switch.rs"]
mod task_switch;
#[path = "timers.rs"]
mod timers;
#[path = "withheld.rs"]
mod withheld;
