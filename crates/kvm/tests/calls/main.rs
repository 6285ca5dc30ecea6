//! What calls answer in each state: the KVM API documentation's errors, and states read back.

#[path = "../common/mod.rs"]
mod common;
mod interrupts;
mod memory;
mod processors;

use eptide_kvm as kvm;
use kvm::ioctl::{Answer, Kind, Object, TABLE, ioctl};
use kvm::{Kvm, VcpuFd, VmFd};

/// An ioctl by name with an argument in memory; its value, or the errno.
fn call<T>(object: Object<'_>, name: &str, argument: &mut T) -> Result<i64, i32> {
    number(object, name, std::ptr::from_mut(argument) as u64)
}

/// An ioctl by name with a number.
fn number(object: Object<'_>, name: &str, argument: u64) -> Result<i64, i32> {
    let kind = match object {
        Object::System(_) => Kind::System,
        Object::Vm(_) => Kind::Vm,
        Object::Vcpu(_) => Kind::Vcpu,
    };
    let row = TABLE
        .iter()
        .find(|row| row.kind == kind && row.name == name)
        .unwrap();
    match ioctl(object, row.request(), argument) {
        Ok(Answer::Value(value)) => Ok(value),
        Ok(other) => panic!("{other:?}"),
        Err(error) => Err(error.errno()),
    }
}

fn errno<T: std::fmt::Debug>(result: Result<T, kvm::Error>) -> i32 {
    result.unwrap_err().errno()
}

fn vm() -> (Kvm, VmFd) {
    let kvm = Kvm::new().unwrap();
    let vm = kvm.create_vm().unwrap();
    (kvm, vm)
}

fn with_vcpu(full: bool) -> (Kvm, VmFd, VcpuFd) {
    let (kvm, vm) = vm();
    if full {
        vm.create_irq_chip().unwrap();
    }
    let vcpu = vm.create_vcpu(0).unwrap();
    (kvm, vm, vcpu)
}
