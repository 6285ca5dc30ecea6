//! Examples that use nothing but what `kvm-ioctls` has as well.

#[path = "../../examples/dirty_log.rs"]
mod dirty_log;
#[path = "../../examples/eventfds.rs"]
mod eventfds;
#[path = "../../examples/long_mode.rs"]
mod long_mode;
#[path = "../../examples/real_mode.rs"]
mod real_mode;

#[test]
fn real_mode() {
    real_mode::main().unwrap();
}

#[test]
fn long_mode() {
    long_mode::main().unwrap();
}

#[test]
fn eventfds() {
    eventfds::main().unwrap();
}

#[test]
fn dirty_log() {
    dirty_log::main().unwrap();
}
