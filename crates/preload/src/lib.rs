//! `/dev/kvm` for programs that were not written for Eptide.
//!
//! Loaded into a program by `LD_PRELOAD`, this library answers for `/dev/kvm`: opening it gives a
//! descriptor on which the ioctls of KVM work, and so do those of the VMs and vCPUs made with it.
//!
//! ```text
//! program ─ open, ioctl, mmap ─▶ symbols ─┬─▶ objects ─▶ kvm::ioctl
//!                                         └─▶ next: the C library's own
//! ```
//!
//! The descriptors are real ones, of memory files that are recognised by their inode. Whatever the
//! kernel does with descriptors (dup, fork, close-on-exec, passing through sockets, mmap) works
//! without help, and only the calls that name `/dev/kvm` or carry KVM's requests are looked at.

mod children;
mod dispositions;
mod forks;
mod next;
mod objects;
mod symbols;
