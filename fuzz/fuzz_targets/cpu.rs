//! Bytes as a guest: mode, registers, controls and code. The player is that of the test
//! `random_code` of `eptide-cpu`.
#![no_main]
#![allow(dead_code, unreachable_pub, reason = "modules of a test")]

#[path = "../../crates/cpu/tests/guest/mod.rs"]
mod guest;
#[path = "../../crates/cpu/tests/random/play.rs"]
mod play;

use std::cell::RefCell;

thread_local! {
    static STAGE: RefCell<play::Stage> = RefCell::new(play::Stage::new());
}

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    STAGE.with(|stage| stage.borrow_mut().play(input));
});
