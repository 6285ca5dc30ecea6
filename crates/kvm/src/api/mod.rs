//! The public API, in the shape of `kvm-ioctls`: a VMM written for that crate changes an import.
//!
//! Method names, argument and result types are that crate's; each method does what the ioctl of
//! the same name does. What is Eptide's own says so.

mod absent;
mod cap;
mod exit;
mod system;
mod vcpu;
mod vm;

pub use absent::DeviceFd;
pub use cap::Cap;
pub use exit::{HypercallExit, MsrExitReason, ReadMsrExit, VcpuExit, WriteMsrExit};
pub use kvm_bindings::nested::KvmNestedStateBuffer;
pub use system::{Kvm, Options};
pub use vcpu::{Interrupter, SyncReg, VcpuFd};
pub use vm::{
    IoEventAddress, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, NoDatamatch, VmFd,
};
