//! The raw ioctl surface: what stands behind a descriptor of `/dev/kvm`, a VM or a vCPU.
//!
//! One table ([`table::TABLE`]) holds a row per ioctl: object, number, direction and size of the
//! argument, handler, the capability it belongs to, and a sentence of documentation. Dispatch,
//! the unknown-request answer and `docs/kvm-api.md` come from it.

mod table;
mod user_memory;

use crate::api::{Kvm, VcpuFd, VmFd};
use crate::error::{Result, fail};
use std::os::fd::OwnedFd;

pub use table::{Direction, Kind, Row, TABLE};

/// An object that takes ioctls.
#[derive(Clone, Copy, Debug)]
pub enum Object<'a> {
    /// `/dev/kvm`.
    System(&'a Kvm),
    /// A VM.
    Vm(&'a VmFd),
    /// A vCPU.
    Vcpu(&'a VcpuFd),
}

/// What an ioctl returns.
#[derive(Debug)]
pub enum Answer {
    /// A number.
    Value(i64),
    /// A new VM, for which the caller makes a descriptor.
    Vm(VmFd),
    /// A new vCPU, for which the caller makes a descriptor.
    Vcpu(VcpuFd),
    /// A new descriptor of another kind.
    Descriptor(OwnedFd),
}

impl Row {
    /// The request number, as `_IO`, `_IOR`, `_IOW` and `_IOWR` make it.
    pub const fn request(&self) -> u32 {
        const MAGIC: u32 = kvm_bindings::KVMIO;
        let direction = match self.direction {
            Direction::None => 0,
            Direction::Write => 1,
            Direction::Read => 2,
            Direction::Both => 3,
        };
        direction << 30 | self.size << 16 | MAGIC << 8 | self.number as u32
    }
}

/// Performs an ioctl. A request that the object does not know is ENOTTY, as is every request on
/// a dead VM EIO.
///
/// `argument` is what the caller passed: a number, or an address in this process, which may be
/// anything.
pub fn ioctl(object: Object<'_>, request: u32, argument: u64) -> Result<Answer> {
    let kind = match object {
        Object::System(_) => Kind::System,
        Object::Vm(_) => Kind::Vm,
        Object::Vcpu(_) => Kind::Vcpu,
    };
    let found = TABLE
        .iter()
        .find(|row| row.kind == kind && row.request() == request);
    let Some(row) = found else {
        return fail(libc::ENOTTY);
    };
    // KVM_RUN sees to that itself.
    let _call = (row.name != "KVM_RUN").then(crate::Call::begin);
    match (row.handler, object) {
        (table::Handler::System(handler), Object::System(kvm)) => handler(kvm, argument),
        (table::Handler::Vm(handler), Object::Vm(vm)) => {
            vm.inner().check_alive()?;
            handler(vm, argument)
        }
        (table::Handler::Vcpu(handler), Object::Vcpu(vcpu)) => {
            vcpu.inner().vm().check_alive()?;
            handler(vcpu, argument)
        }
        _ => fail(libc::ENOTTY),
    }
}

/// The table as `docs/kvm-api.md`.
pub fn documentation() -> String {
    let mut text = String::from(
        "# The KVM API here\n\n\
         Generated from the ioctl table of `crates/kvm` (`src/ioctl/table.rs`); the test\n\
         `the_document_is_current` of that crate compares and, with `EPTIDE_BLESS=1`, rewrites it.\n\n\
         Requests that are not listed answer ENOTTY, capabilities that are not listed answer 0.\n",
    );
    for (kind, title) in [
        (Kind::System, "System ioctls"),
        (Kind::Vm, "VM ioctls"),
        (Kind::Vcpu, "vCPU ioctls"),
    ] {
        text += &format!(
            "\n## {title}\n\n| ioctl | request | capability | |\n| --- | --- | --- | --- |\n"
        );
        for row in TABLE.iter().filter(|row| row.kind == kind) {
            text += &format!(
                "| `{}` | `{:#010x}` | {} | {} |\n",
                row.name,
                row.request(),
                row.capability
                    .map_or(String::new(), |(name, _)| format!("`{name}`")),
                row.doc
            );
        }
    }
    text += "\n## Capabilities\n\n| number | value |\n| --- | --- |\n";
    for number in (0..400).chain([crate::CAP_EXECUTION_TRAPS]) {
        let value = crate::capabilities::check(number);
        if value != 0 && !crate::capabilities::depends_on_host(number) {
            text += &format!("| {number} | {value} |\n");
        }
    }
    text
}

#[cfg(test)]
mod tests;
