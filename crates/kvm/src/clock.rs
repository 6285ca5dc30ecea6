//! The VM's clock and its paravirtual pages.
//!
//! The clock runs on the host's time-stamp counter from one pair of readings, the same for every
//! vCPU, so that a guest may compare time between vCPUs without locks: pages carry the "stable"
//! flag. A page is written in seqlock style: version odd, contents, version even.
//!
//! Source: the kernel's "KVM-specific MSRs" and "Timekeeping Virtualization" documents.

use crate::time::{GuestTsc, monotonic_ns, realtime_ns, scale, tsc, tsc_khz};
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// Flag: the clock is monotonic across vCPUs.
pub const STABLE: u8 = 1 << 0;
/// Flag: the guest was stopped by its host.
pub const GUEST_STOPPED: u8 = 1 << 1;

/// A pair of simultaneous readings.
#[derive(Clone, Copy, Debug)]
struct Base {
    host_tsc: u64,
    clock: u64,
}

/// The clock of a VM, in nanoseconds since it was created or set.
#[derive(Debug)]
pub struct VmClock {
    base: Mutex<Base>,
}

impl Default for VmClock {
    fn default() -> VmClock {
        VmClock {
            base: Mutex::new(Base {
                host_tsc: tsc(),
                clock: 0,
            }),
        }
    }
}

impl VmClock {
    fn base(&self) -> Base {
        *self.base.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The clock when the host's counter reads `host_tsc`.
    pub fn at(&self, host_tsc: u64) -> u64 {
        let base = self.base();
        let ticks = host_tsc.saturating_sub(base.host_tsc);
        base.clock.wrapping_add(scale(ticks, 1_000_000, tsc_khz()))
    }

    /// The clock now.
    pub fn now(&self) -> u64 {
        self.at(tsc())
    }

    /// Sets the clock.
    pub fn set(&self, clock: u64) {
        let mut base = self.base.lock().unwrap_or_else(PoisonError::into_inner);
        *base = Base {
            host_tsc: tsc(),
            clock,
        };
    }

    /// Wall-clock time at which the clock read zero, in nanoseconds since the epoch.
    pub fn wall_base(&self) -> u64 {
        realtime_ns().wrapping_sub(self.now())
    }
}

/// Layout of `pvclock_vcpu_time_info`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct TimeInfo {
    /// Odd while being written.
    pub version: u32,
    pad: u32,
    /// Guest counter at `system_time`.
    pub tsc_timestamp: u64,
    /// Nanoseconds at `tsc_timestamp`.
    pub system_time: u64,
    /// 32.32 multiplier after the shift.
    pub tsc_to_system_mul: u32,
    /// Left (or with a minus sign right) shift of counter differences.
    pub tsc_shift: i8,
    /// [`STABLE`], [`GUEST_STOPPED`].
    pub flags: u8,
    pad2: [u8; 2],
}

impl TimeInfo {
    /// The bytes of the page.
    pub fn to_bytes(self) -> [u8; 32] {
        let mut bytes = [0; 32];
        bytes[0..4].copy_from_slice(&self.version.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.tsc_timestamp.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.system_time.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.tsc_to_system_mul.to_le_bytes());
        bytes[28] = self.tsc_shift as u8;
        bytes[29] = self.flags;
        bytes
    }

    /// What a guest whose counter is `guest` computes its time from.
    pub fn new(clock: &VmClock, guest: &GuestTsc, flags: u8) -> TimeInfo {
        let host = tsc();
        let (tsc_shift, tsc_to_system_mul) = multiplier(guest.khz);
        TimeInfo {
            tsc_timestamp: guest.at(host),
            system_time: clock.at(host),
            tsc_to_system_mul,
            tsc_shift,
            flags,
            ..TimeInfo::default()
        }
    }

    /// The guest's computation.
    pub fn read(&self, guest_tsc: u64) -> u64 {
        let delta = guest_tsc.wrapping_sub(self.tsc_timestamp);
        let shifted = if self.tsc_shift < 0 {
            delta >> -self.tsc_shift
        } else {
            delta << self.tsc_shift
        };
        let ns = (shifted as u128 * self.tsc_to_system_mul as u128) >> 32;
        self.system_time.wrapping_add(ns as u64)
    }
}

/// Shift and 32.32 multiplier that turn ticks of `khz` into nanoseconds, with the multiplier in
/// its upper half for precision.
fn multiplier(khz: u64) -> (i8, u32) {
    let mut shift = 0i8;
    let mut hz = khz.max(1) * 1000;
    while hz > 2_000_000_000 {
        hz >>= 1;
        shift -= 1;
    }
    while hz <= 1_000_000_000 {
        hz <<= 1;
        shift += 1;
    }
    // Recompute from the exact frequency, so that no bit that the loop shifted out is lost.
    let exact = if shift < 0 {
        ((1_000_000u128 << 32) << -shift) / khz.max(1) as u128
    } else {
        ((1_000_000u128 << 32) >> shift) / khz.max(1) as u128
    };
    (shift, exact.min(u32::MAX as u128) as u32)
}

/// Layout of `pvclock_wall_clock`: version, seconds, nanoseconds.
pub fn wall_clock_bytes(version: u32, base: u64) -> [u8; 12] {
    let mut bytes = [0; 12];
    bytes[0..4].copy_from_slice(&version.to_le_bytes());
    bytes[4..8].copy_from_slice(&((base / 1_000_000_000) as u32).to_le_bytes());
    bytes[8..12].copy_from_slice(&((base % 1_000_000_000) as u32).to_le_bytes());
    bytes
}

/// Time that a vCPU's thread was ready to run but did not: what its guest sees as stolen.
///
/// The scheduler tells by a file, which a thread under a filter of system calls cannot open; so
/// another thread reads it from time to time.
#[derive(Debug, Default)]
pub struct RunDelay {
    /// The thread that is followed; 0 for none.
    task: AtomicI32,
    /// The thread that the last figure is of, and the figure.
    last: Mutex<(i32, u64)>,
    total: AtomicU64,
}

impl RunDelay {
    /// Follows the calling thread from now on.
    pub fn follow(&self) {
        self.task.store(current_task(), Ordering::Relaxed);
    }

    /// Nanoseconds while threads were followed, as of the last refresh.
    pub fn get(&self) -> u64 {
        self.total.load(Ordering::Relaxed)
    }

    /// Reads the scheduler's figure.
    pub fn refresh(&self) {
        let task = self.task.load(Ordering::Relaxed);
        if task == 0 {
            return;
        }
        let Some(delay) = run_delay(task) else {
            return;
        };
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let (followed, before) = std::mem::replace(&mut *last, (task, delay));
        if followed == task {
            let more = delay.saturating_sub(before);
            self.total.fetch_add(more, Ordering::Relaxed);
        }
    }
}

/// The calling thread's ID, without a system call: the C library makes it part of the number of
/// the thread's clock.
fn current_task() -> i32 {
    let mut clock: libc::clockid_t = 0;
    // SAFETY: the thread is the calling one, and the function writes a clock's number.
    let failed = unsafe { libc::pthread_getcpuclockid(libc::pthread_self(), &mut clock) };
    if failed == 0 { !(clock >> 3) } else { 0 }
}

/// Time a thread of this process was ready to run but did not, in nanoseconds.
fn run_delay(task: i32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/self/task/{task}/schedstat")).ok()?;
    text.split_whitespace().nth(1)?.parse().ok()
}

/// CLOCK_MONOTONIC, re-exported for rate limits of the pages above.
pub fn now_ns() -> u64 {
    monotonic_ns()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guests_compute_the_vm_clock() {
        let clock = VmClock::default();
        clock.set(1_000_000_000_000);
        for khz in [tsc_khz(), tsc_khz() / 3] {
            let guest = GuestTsc {
                offset: 77,
                multiplier: ((khz as u128) << 48).div_ceil(tsc_khz() as u128) as u64,
                khz,
            };
            let info = TimeInfo::new(&clock, &guest, STABLE);
            let later = tsc() + tsc_khz() * 5000;
            let (computed, expected) = (info.read(guest.at(later)), clock.at(later));
            assert!(computed.abs_diff(expected) < 3000, "{computed} {expected}");
        }
    }

    #[test]
    fn a_thread_knows_its_id() {
        // SAFETY: has no conditions.
        assert_eq!(current_task(), unsafe { libc::gettid() });
        assert!(run_delay(current_task()).is_some());
        assert_eq!(run_delay(1 << 30), None);
    }

    #[test]
    fn layout() {
        assert_eq!(size_of::<TimeInfo>(), 32);
        let info = TimeInfo {
            version: 2,
            tsc_shift: -1,
            flags: 1,
            ..TimeInfo::default()
        };
        assert_eq!(info.to_bytes()[28..30], [0xff, 1]);
    }
}
