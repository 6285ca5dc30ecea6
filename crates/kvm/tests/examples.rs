//! The examples run; `on_kvm_ioctls` has those of them that any KVM runs.

#[path = "../examples/execution_traps.rs"]
mod execution_traps;
mod portable_examples;

#[test]
fn execution_traps() {
    execution_traps::main().unwrap();
}
