//! The memory a vCPU shares with user space: `kvm_run`, the page for port data, the ring of
//! coalesced writes, and the dirty ring.
//!
//! It is a memfd, so that whoever stands in for the vCPU's descriptor can hand it out and mmap
//! keeps the kernel's semantics: page 0 `kvm_run`, page 1 port data, page 2 the VM's coalesced
//! ring (another file, mapped over), page [`DIRTY_RING_PAGE`] on the dirty ring.

use crate::error::{Error, Result};
use kvm_bindings::{KVM_DIRTY_LOG_PAGE_OFFSET, kvm_run};
use reserved::Region;
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{MemfdFlags, SealFlags};

/// Size of a page.
pub(crate) const PAGE: usize = 4096;
/// What KVM_GET_VCPU_MMAP_SIZE answers.
pub(crate) const RUN_SIZE: usize = 3 * PAGE;
/// Offset of port data from the start of `kvm_run`.
pub(crate) const PIO_OFFSET: usize = PAGE;
/// Page of the vCPU's file where the dirty ring starts.
pub(crate) const DIRTY_RING_PAGE: usize = KVM_DIRTY_LOG_PAGE_OFFSET as usize;

fn errno(error: rustix::io::Errno) -> Error {
    Error::new(error.raw_os_error())
}

fn host_errno(error: std::io::Error) -> Error {
    Error::new(error.raw_os_error().unwrap_or(libc::ENOMEM))
}

/// A shared mapping of a part of a file, at addresses that no memslot names.
#[derive(Debug)]
pub(crate) struct Mapping(Region);

impl Mapping {
    /// Maps `size` bytes from `offset` on, and the rest of their last page.
    pub(crate) fn new(file: &OwnedFd, offset: u64, size: usize) -> Result<Mapping> {
        let size = size.next_multiple_of(PAGE);
        let region = Region::new(size, PAGE).map_err(host_errno)?;
        let mapping = Mapping(region);
        mapping.put(0, size, file, offset)?;
        Ok(mapping)
    }

    fn put(&self, at: usize, size: usize, file: &OwnedFd, offset: u64) -> Result<()> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: nobody has looked into the mapping yet.
        let mapped = unsafe { self.0.map_file(at, size, file.as_fd(), offset, protection) };
        mapped.map(|_| ()).map_err(host_errno)
    }

    /// The first byte.
    pub(crate) fn base(&self) -> *mut u8 {
        self.0.start()
    }
}

/// A memfd and a shared mapping of it.
#[derive(Debug)]
pub(crate) struct SharedMemory {
    fd: OwnedFd,
    mapping: Mapping,
}

impl SharedMemory {
    /// `file_size` bytes of zeroed memory, the first `size` of them mapped.
    pub(crate) fn new(name: &str, size: usize, file_size: usize) -> Result<SharedMemory> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = rustix::fs::memfd_create(name, flags).map_err(errno)?;
        rustix::fs::ftruncate(&fd, file_size as u64).map_err(errno)?;
        let mapping = Mapping::new(&fd, 0, size)?;
        // Others have the file, too: were it cut short, this process would die of its next access.
        // With FUTURE_WRITE it would take no mapping of user space's, which is to write to it.
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&fd, seals).map_err(errno)?;
        Ok(SharedMemory { fd, mapping })
    }

    /// The file.
    pub(crate) fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    /// The mapping's first byte.
    pub(crate) fn base(&self) -> *mut u8 {
        self.mapping.base()
    }

    /// Maps the first page of `other` over the page at `offset`.
    fn overlay(&self, offset: usize, other: &SharedMemory) -> Result<()> {
        self.mapping.put(offset, PAGE, &other.fd, 0)
    }
}

/// A vCPU's shared memory.
#[derive(Debug)]
pub(crate) struct RunArea {
    memory: SharedMemory,
}

impl RunArea {
    /// Zeroed memory of one vCPU with the VM's coalesced ring at page 2, and a file large enough
    /// for a dirty ring of `dirty_ring` bytes.
    pub(crate) fn new(id: u32, coalesced: &SharedMemory, dirty_ring: usize) -> Result<RunArea> {
        let file_size = DIRTY_RING_PAGE * PAGE + dirty_ring;
        let memory = SharedMemory::new(&format!("kvm-vcpu:{id}"), RUN_SIZE, file_size)?;
        memory.overlay(2 * PAGE, coalesced)?;
        Ok(RunArea { memory })
    }

    /// The file behind the area.
    pub(crate) fn fd(&self) -> &OwnedFd {
        self.memory.fd()
    }

    /// `kvm_run`.
    pub(crate) fn as_ptr(&self) -> *mut kvm_run {
        self.memory.base().cast()
    }

    /// `kvm_run`, for the thread that holds the vCPU.
    ///
    /// # Safety
    ///
    /// No other reference to it may be in use: the caller holds the vCPU's lock and user space,
    /// whose turn it is not, touches only `immediate_exit`, which is read with
    /// [`RunArea::immediate_exit`].
    #[allow(
        clippy::mut_from_ref,
        reason = "the lock that the caller holds makes it exclusive"
    )]
    pub(crate) unsafe fn get(&self) -> &mut kvm_run {
        // SAFETY: the mapping is page-aligned, larger than `kvm_run`, and zeroed memory is a
        // valid value; aliasing is the caller's promise.
        unsafe { &mut *self.as_ptr() }
    }

    /// `kvm_run.immediate_exit`, which a signal handler may set at any time.
    pub(crate) fn immediate_exit(&self) -> bool {
        // SAFETY: the pointer is valid for reads; the access is volatile since user space may
        // write it at any time.
        unsafe { (&raw const (*self.as_ptr()).immediate_exit).read_volatile() != 0 }
    }

    /// Copies port data in.
    pub(crate) fn write_pio(&self, data: &[u8]) {
        let length = data.len().min(PAGE);
        // SAFETY: the port page is inside the mapping and at least this long.
        unsafe {
            let page = self.memory.base().add(PIO_OFFSET);
            std::ptr::copy_nonoverlapping(data.as_ptr(), page, length);
        }
    }

    /// Copies port data out.
    pub(crate) fn read_pio(&self, data: &mut [u8]) {
        let length = data.len().min(PAGE);
        // SAFETY: as above.
        unsafe {
            let page = self.memory.base().add(PIO_OFFSET);
            std::ptr::copy_nonoverlapping(page, data.as_mut_ptr(), length);
        }
    }
}

const _: () = assert!(size_of::<kvm_run>() <= PAGE);
