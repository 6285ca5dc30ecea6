//! What `kvm-ioctls` has no method for, by ioctls on its descriptors.
//!
//! The crate under test has methods of these names, which go before those of a trait; so this is
//! used by the test program `on_kvm_ioctls` alone.

use eptide_kvm::Error;
use kvm_bindings::*;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// `_IO`, `_IOR` and `_IOW`.
const fn request(direction: u32, number: u32, size: usize) -> u64 {
    (direction << 30 | (size as u32) << 16 | KVMIO << 8 | number) as u64
}

type Result<T> = std::result::Result<T, Error>;

const NONE: u32 = 0;
const WRITE: u32 = 1;

pub(crate) trait Raw: AsRawFd {
    fn raw(&self, request: u64, argument: u64) -> Result<i32> {
        // SAFETY: callers pass the argument that the request takes.
        let result = unsafe { libc::ioctl(self.as_raw_fd(), request, argument) };
        if result < 0 {
            let errno = std::io::Error::last_os_error().raw_os_error();
            return Err(Error::new(errno.unwrap_or(0)));
        }
        Ok(result)
    }

    fn set_signal_mask(&self, mask: Option<u64>) -> Result<()> {
        const REQUEST: u64 = request(WRITE, 0x8b, size_of::<kvm_signal_mask>());
        // The length, then the set, of which the structure only has the beginning.
        let bytes = mask.map(|mask| {
            let mut bytes = [0u8; 12];
            bytes[0] = 8;
            bytes[4..].copy_from_slice(&mask.to_le_bytes());
            bytes
        });
        let at = bytes.as_ref().map_or(0, |bytes| bytes.as_ptr() as u64);
        self.raw(REQUEST, at).map(drop)
    }

    fn setup_mce(&self, mcg_cap: u64) -> Result<()> {
        let at = &raw const mcg_cap as u64;
        self.raw(request(WRITE, 0x9c, 8), at).map(drop)
    }

    fn set_mce(&self, mce: &kvm_x86_mce) -> Result<()> {
        const REQUEST: u64 = request(WRITE, 0x9e, size_of::<kvm_x86_mce>());
        self.raw(REQUEST, std::ptr::from_ref(mce) as u64).map(drop)
    }

    fn set_boot_cpu_id(&self, id: u32) -> Result<()> {
        self.raw(request(NONE, 0x78, 0), id.into()).map(drop)
    }

    fn interrupt(&self, irq: u32) -> Result<()> {
        const REQUEST: u64 = request(WRITE, 0x86, size_of::<kvm_interrupt>());
        let interrupt = kvm_interrupt { irq };
        self.raw(REQUEST, &raw const interrupt as u64).map(drop)
    }

    fn reset_dirty_rings(&self) -> Result<i32> {
        self.raw(request(NONE, 0xc7, 0), 0)
    }

    fn get_stats_fd(&self) -> Result<OwnedFd> {
        let fd = self.raw(request(NONE, 0xce, 0), 0)?;
        // SAFETY: a new descriptor that nobody else has.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    fn interrupter(&self) -> Interrupter {
        Interrupter
    }
}

impl<T: AsRawFd> Raw for T {}

/// Ends KVM_RUN by signals to all other threads: which one has the vCPU is not known.
#[derive(Clone)]
pub(crate) struct Interrupter;

impl Interrupter {
    pub(crate) fn interrupt(&self) {
        extern "C" fn nothing(_: libc::c_int) {}
        let signal = libc::SIGRTMIN();
        // SAFETY: the handler does nothing, and the tasks are this process's own.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = nothing as *const () as usize;
            libc::sigaction(signal, &action, std::ptr::null_mut());
            let own = libc::gettid();
            for task in std::fs::read_dir("/proc/self/task").unwrap() {
                let task = task.unwrap().file_name();
                let task: libc::pid_t = task.to_str().unwrap().parse().unwrap();
                if task != own {
                    libc::syscall(libc::SYS_tgkill, libc::getpid(), task, signal);
                }
            }
        }
    }
}
