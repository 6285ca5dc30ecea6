//! Host clocks: CLOCK_MONOTONIC in nanoseconds, the time-stamp counter, and how they relate.

use std::sync::OnceLock;

/// CLOCK_MONOTONIC in nanoseconds.
pub fn monotonic_ns() -> u64 {
    clock_ns(libc::CLOCK_MONOTONIC)
}

/// CLOCK_REALTIME in nanoseconds since the epoch.
pub fn realtime_ns() -> u64 {
    clock_ns(libc::CLOCK_REALTIME)
}

fn clock_ns(clock: libc::clockid_t) -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is a valid timespec; both clocks exist on every Linux.
    unsafe { libc::clock_gettime(clock, &mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// The host's time-stamp counter.
pub fn tsc() -> u64 {
    // SAFETY: RDTSC has no preconditions; user code may execute it on every supported host.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Frequency of the host's time-stamp counter in kHz.
///
/// From CPUID where a leaf states it, else measured once against CLOCK_MONOTONIC.
pub fn tsc_khz() -> u64 {
    static KHZ: OnceLock<u64> = OnceLock::new();
    *KHZ.get_or_init(|| stated_khz().unwrap_or_else(measured_khz))
}

/// Leaf 0x15 (crystal and ratio) or the hypervisor timing leaf 0x4000_0010.
fn stated_khz() -> Option<u64> {
    let cpuid = core::arch::x86_64::__cpuid;
    if cpuid(0).eax >= 0x15 {
        let leaf = cpuid(0x15);
        if leaf.eax != 0 && leaf.ebx != 0 && leaf.ecx != 0 {
            return Some(leaf.ecx as u64 * leaf.ebx as u64 / leaf.eax as u64 / 1000);
        }
    }
    let under_hypervisor = cpuid(1).ecx >> 31 != 0;
    if under_hypervisor && (0x4000_0010..0x4000_1000).contains(&cpuid(0x4000_0000).eax) {
        let khz = cpuid(0x4000_0010).eax as u64;
        return (khz != 0).then_some(khz);
    }
    None
}

/// A pair of simultaneous readings: the tightest of several tries.
fn simultaneous() -> (u64, u64) {
    (0..16)
        .map(|_| {
            let before = tsc();
            let ns = monotonic_ns();
            let after = tsc();
            (after - before, before + (after - before) / 2, ns)
        })
        .min()
        .map(|(_, tsc, ns)| (tsc, ns))
        .unwrap_or_default()
}

fn measured_khz() -> u64 {
    let (tsc0, ns0) = simultaneous();
    std::thread::sleep(std::time::Duration::from_millis(20));
    let (tsc1, ns1) = simultaneous();
    ((tsc1 - tsc0) as u128 * 1_000_000 / (ns1 - ns0).max(1) as u128) as u64
}

/// `value × numerator / denominator` without overflow in between, saturating.
pub fn scale(value: u64, numerator: u64, denominator: u64) -> u64 {
    let product = value as u128 * numerator as u128 / denominator.max(1) as u128;
    u64::try_from(product).unwrap_or(u64::MAX)
}

/// The time-stamp counter as one guest processor sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestTsc {
    /// Added to the scaled host counter.
    pub offset: u64,
    /// 16.48 fixed-point multiplier of the host counter.
    pub multiplier: u64,
    /// Frequency in kHz that results.
    pub khz: u64,
}

impl GuestTsc {
    /// Unscaled and without offset.
    pub fn host() -> GuestTsc {
        GuestTsc {
            offset: 0,
            multiplier: 1 << 48,
            khz: tsc_khz(),
        }
    }

    /// The guest's counter when the host's reads `host`.
    pub fn at(&self, host: u64) -> u64 {
        (((host as u128 * self.multiplier as u128) >> 48) as u64).wrapping_add(self.offset)
    }

    /// The guest's counter now.
    pub fn now(&self) -> u64 {
        self.at(tsc())
    }

    /// Nanoseconds until the guest's counter reaches `deadline`; zero if it has.
    ///
    /// Rounded up: the counter has reached the deadline when the time is over.
    pub fn ns_until(&self, deadline: u64) -> u64 {
        let ticks = deadline.wrapping_sub(self.now()) as i64;
        if ticks <= 0 {
            return 0;
        }
        scale(ticks as u64, 1_000_000, self.khz).saturating_add(1)
    }

    /// The offset under which the counter reads `value` when the host's reads `host`.
    pub fn offset_for(&self, value: u64, host: u64) -> u64 {
        value.wrapping_sub(GuestTsc { offset: 0, ..*self }.at(host))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frequency_agrees_with_the_clock() {
        let (tsc0, ns0) = simultaneous();
        std::thread::sleep(std::time::Duration::from_millis(30));
        let (tsc1, ns1) = simultaneous();
        let expected = (ns1 - ns0) * tsc_khz() / 1_000_000;
        let measured = tsc1 - tsc0;
        assert!(
            measured.abs_diff(expected) < expected / 200,
            "{measured} for {expected}"
        );
    }

    #[test]
    fn offset_puts_the_counter_where_asked() {
        let guest = GuestTsc {
            offset: 0,
            multiplier: 1 << 47,
            khz: tsc_khz() / 2,
        };
        let placed = GuestTsc {
            offset: guest.offset_for(5000, 1_000_000),
            ..guest
        };
        assert_eq!(placed.at(1_000_000), 5000);
        assert_eq!(placed.at(1_000_200), 5100);
    }
}
