//! KVM_GET_STATS_FD: counters as a file.
//!
//! The file is shared memory in the documented layout (header, identifier, descriptors, data).
//! Readers see what the counters were when a vCPU last left KVM_RUN.
//!
//! Source: KVM API, "KVM_GET_STATS_FD".

use crate::error::{Error, Result};
use crate::run_area::SharedMemory;
use kvm_bindings::{kvm_stats_desc, kvm_stats_header};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of each name, the terminating zero included.
const NAME: usize = 48;

/// A statistics file.
#[derive(Debug)]
pub(crate) struct StatsFile {
    memory: SharedMemory,
    data: usize,
    count: usize,
}

impl StatsFile {
    /// A file about `id` with one cumulative counter per name.
    pub(crate) fn new(id: &str, names: &[&str]) -> Result<StatsFile> {
        let descriptor = size_of::<kvm_stats_desc>() + NAME;
        let descriptors = size_of::<kvm_stats_header>() + NAME;
        let data = descriptors + names.len() * descriptor;
        let size = data + names.len() * 8;
        let memory = SharedMemory::new("kvm-stats", size, size)?;
        let mut bytes = Vec::with_capacity(data);
        for word in [
            0,
            NAME,
            names.len(),
            size_of::<kvm_stats_header>(),
            descriptors,
            data,
        ] {
            bytes.extend_from_slice(&(word as u32).to_le_bytes());
        }
        push_name(&mut bytes, id);
        for (i, name) in names.iter().enumerate() {
            // Cumulative, no unit, exponent 0, one value.
            bytes.extend_from_slice(&0u32.to_le_bytes());
            bytes.extend_from_slice(&0u16.to_le_bytes());
            bytes.extend_from_slice(&1u16.to_le_bytes());
            bytes.extend_from_slice(&(i as u32 * 8).to_le_bytes());
            bytes.extend_from_slice(&0u32.to_le_bytes());
            push_name(&mut bytes, name);
        }
        // SAFETY: the mapping is new and at least this long.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), memory.base(), bytes.len()) };
        Ok(StatsFile {
            memory,
            data,
            count: names.len(),
        })
    }

    /// Writes the counters, in the order of their names.
    pub(crate) fn update(&self, values: impl Iterator<Item = u64>) {
        for (i, value) in values.take(self.count).enumerate() {
            // SAFETY: the data lies in the mapping, 8-byte aligned, and readers expect it to
            // change at any time.
            unsafe {
                let at = self.memory.base().add(self.data + i * 8).cast();
                AtomicU64::from_ptr(at).store(value, Ordering::Relaxed);
            }
        }
    }

    /// A descriptor of the file, for reading and with a position of its own where the process can
    /// open what it has open.
    pub(crate) fn descriptor(&self) -> Result<OwnedFd> {
        use rustix::fs::{Mode, OFlags, open};
        let path = format!("/proc/self/fd/{}", self.memory.fd().as_raw_fd());
        if let Ok(own) = open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()) {
            return Ok(own);
        }
        rustix::io::fcntl_dupfd_cloexec(self.memory.fd(), 3)
            .map_err(|error| Error::new(error.raw_os_error()))
    }
}

fn push_name(bytes: &mut Vec<u8>, name: &str) {
    let name = &name.as_bytes()[..name.len().min(NAME - 1)];
    bytes.extend_from_slice(name);
    bytes.extend(std::iter::repeat_n(0, NAME - name.len()));
}

const _: () = assert!(size_of::<kvm_stats_header>() == 24 && size_of::<kvm_stats_desc>() == 16);
// The data is 8-byte aligned whatever the number of descriptors.
const _: () = assert!((size_of::<kvm_stats_header>() + NAME).is_multiple_of(8));
