//! Random bytes as code from random states in every mode: no panic, nothing touched outside the
//! memory given, and every entry ends.
//!
//! `EPTIDE_RANDOM_CODE_CASES` sets the number of cases. The fuzz target `cpu` runs the same
//! [`play::play`] on inputs that a fuzzer finds.
#![allow(unreachable_pub, reason = "modules of a test binary")]

mod guest;
#[path = "random/play.rs"]
mod play;

#[test]
fn random_code_stays_inside() {
    let cases = std::env::var("EPTIDE_RANDOM_CODE_CASES")
        .ok()
        .and_then(|cases| cases.parse().ok())
        .unwrap_or(20_000u64);
    let first: u64 = std::env::var("EPTIDE_RANDOM_CODE_SEED")
        .ok()
        .and_then(|s| s.parse().ok())
        .unwrap_or(1);
    let mut stage = play::Stage::new();
    for seed in first..first + cases {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut input = [0; 512];
        for byte in &mut input {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            *byte = (state >> 32) as u8;
        }
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| stage.play(&input)));
        assert!(result.is_ok(), "seed {seed}");
    }
    // The inputs reach somewhere.
    assert!(stage.exits.len() > 10, "{:?}", stage.exits);
    assert!(
        stage.instructions() > 2 * cases,
        "{} instructions",
        stage.instructions()
    );
}
