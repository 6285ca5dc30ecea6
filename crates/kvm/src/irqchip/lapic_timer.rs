//! The local APIC's timer: one-shot, periodic and TSC-deadline.
//!
//! The bus clock of the virtual APIC is 1 GHz, as KVM's: one tick per nanosecond before the
//! divider. This file computes deadlines on CLOCK_MONOTONIC; arming them is the APIC's.
//!
//! Source: SDM volume 3, "APIC Timer".

use crate::time::{GuestTsc, monotonic_ns};

/// A periodic timer is not run faster than this, in nanoseconds, whatever it is set to and in
/// whatever order: a guest could otherwise keep the timer thread busy for ever. KVM's limit.
const SHORTEST_PERIOD: u64 = 200_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    OneShot,
    Periodic,
    TscDeadline,
}

fn mode(lvt: u32) -> Mode {
    match lvt >> 17 & 3 {
        1 => Mode::Periodic,
        2 => Mode::TscDeadline,
        _ => Mode::OneShot,
    }
}

/// An expiry that counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Expired {
    /// The next deadline, for a periodic timer.
    pub(super) next: Option<u64>,
}

/// State of the timer besides the registers.
#[derive(Debug)]
pub(super) struct ApicTimer {
    /// Nanoseconds per count: the divider.
    divide: u64,
    /// Nanoseconds from start to expiry.
    period: u64,
    deadline: Option<u64>,
    tsc: Option<(u64, GuestTsc)>,
}

impl ApicTimer {
    pub(super) fn new() -> ApicTimer {
        ApicTimer {
            divide: 2,
            period: 0,
            deadline: None,
            tsc: None,
        }
    }

    pub(super) fn cancel(&mut self) {
        self.deadline = None;
        self.tsc = None;
        self.period = 0;
    }

    pub(super) fn deadline(&self) -> Option<u64> {
        self.deadline
    }

    /// Whether rewriting the LVT entry stops the timer: going to or from TSC-deadline mode.
    pub(super) fn mode_changed(&self, old: u32, new: u32) -> bool {
        (mode(old) == Mode::TscDeadline) != (mode(new) == Mode::TscDeadline)
    }

    /// Starts counting down from `initial`; zero stops the timer.
    pub(super) fn start(&mut self, lvt: u32, initial: u32) -> Option<u64> {
        self.resume(lvt, initial, initial)
    }

    /// Starts with `current` counts of `initial` left, as after a restore; with none the timer runs
    /// on if it is periodic, and has expired otherwise.
    pub(super) fn resume(&mut self, lvt: u32, initial: u32, current: u32) -> Option<u64> {
        if mode(lvt) == Mode::TscDeadline {
            return self.deadline;
        }
        self.tsc = None;
        self.period = initial as u64 * self.divide;
        let left = if current == 0 {
            self.period
        } else {
            current as u64 * self.divide
        };
        let expired = current == 0 && mode(lvt) == Mode::OneShot;
        self.deadline = (initial != 0 && !expired).then(|| monotonic_ns() + left);
        self.deadline
    }

    /// Sets the divide configuration register; a running timer keeps its remaining count.
    pub(super) fn set_divide(&mut self, lvt: u32, register: u32) -> Option<u64> {
        let code = register & 3 | register >> 1 & 4;
        let divide = if code == 7 { 1 } else { 2u64 << code };
        if let Some(deadline) = self.deadline
            && mode(lvt) != Mode::TscDeadline
        {
            let now = monotonic_ns();
            let left = deadline.saturating_sub(now).div_ceil(self.divide) * divide;
            self.period = self.period / self.divide * divide;
            self.deadline = Some(now + left);
        }
        self.divide = divide;
        self.deadline
    }

    /// Nanoseconds between two expiries of a periodic timer.
    fn served_period(&self) -> u64 {
        self.period.max(SHORTEST_PERIOD)
    }

    /// The current-count register.
    pub(super) fn current_count(&self, lvt: u32) -> u32 {
        let Some(deadline) = self.deadline else {
            return 0;
        };
        if mode(lvt) == Mode::TscDeadline {
            return 0;
        }
        let now = monotonic_ns();
        let mut left = deadline.saturating_sub(now);
        if left == 0 && mode(lvt) == Mode::Periodic && self.period != 0 {
            let period = self.served_period();
            left = period - (now - deadline) % period;
        }
        left.div_ceil(self.divide).min(u32::MAX as u64) as u32
    }

    /// The armed TSC deadline, or zero.
    pub(super) fn tsc_deadline(&self, lvt: u32) -> u64 {
        match self.tsc {
            Some((deadline, _)) if mode(lvt) == Mode::TscDeadline => deadline,
            _ => 0,
        }
    }

    /// Arms (or with zero disarms) a TSC deadline; `None` in another mode keeps what runs.
    pub(super) fn start_tsc_deadline(
        &mut self,
        lvt: u32,
        deadline: u64,
        tsc: GuestTsc,
    ) -> Option<u64> {
        if mode(lvt) != Mode::TscDeadline {
            return self.deadline;
        }
        if deadline == 0 {
            self.cancel();
            return None;
        }
        self.tsc = Some((deadline, tsc));
        self.deadline = Some(monotonic_ns().saturating_add(tsc.ns_until(deadline)));
        self.deadline
    }

    /// Whether the deadline has passed.
    pub(super) fn is_due(&self) -> bool {
        self.deadline
            .is_some_and(|deadline| deadline <= monotonic_ns())
    }

    /// Decides whether the timer has expired, and if so moves to the next period or stops.
    pub(super) fn expire(&mut self, lvt: u32) -> Option<Expired> {
        let deadline = self.deadline?;
        let now = monotonic_ns();
        if now < deadline {
            return None;
        }
        if let Some((target, tsc)) = self.tsc {
            // The conversion to nanoseconds is only as good as the measured frequency.
            let left = tsc.ns_until(target);
            if left != 0 {
                self.deadline = Some(now.saturating_add(left));
                return None;
            }
            self.tsc = None;
            self.deadline = None;
            return Some(Expired { next: None });
        }
        self.deadline = match mode(lvt) {
            // Ticks missed altogether coalesce; the phase is kept.
            Mode::Periodic if self.period != 0 => {
                let period = self.served_period();
                let missed = (now - deadline) / period;
                Some(deadline + (missed + 1) * period)
            }
            _ => None,
        };
        Some(Expired {
            next: self.deadline,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PERIODIC: u32 = 1 << 17;
    const TSC_DEADLINE: u32 = 2 << 17;

    #[test]
    fn dividers() {
        let mut timer = ApicTimer::new();
        for (register, divide) in [
            (0, 2),
            (1, 4),
            (2, 8),
            (3, 16),
            (8, 32),
            (9, 64),
            (10, 128),
            (11, 1),
        ] {
            timer.set_divide(0, register);
            assert_eq!(timer.divide, divide, "register {register}");
        }
    }

    #[test]
    fn counts_down_and_expires_once() {
        let mut timer = ApicTimer::new();
        timer.set_divide(0, 0b1011);
        let deadline = timer.start(0, 1_000_000_000).unwrap();
        let count = timer.current_count(0);
        assert!(count <= 1_000_000_000 && count > 900_000_000);
        assert_eq!(timer.expire(0), None);
        timer.deadline = Some(deadline - 2_000_000_000);
        assert_eq!(timer.expire(0), Some(Expired { next: None }));
        assert_eq!(timer.expire(0), None);
        assert_eq!(timer.current_count(0), 0);
    }

    #[test]
    fn periodic_keeps_its_phase() {
        let mut timer = ApicTimer::new();
        timer.set_divide(PERIODIC, 0b1011);
        timer.start(PERIODIC, 1_000_000);
        let late = monotonic_ns() - 2_500_000;
        timer.deadline = Some(late);
        assert_eq!(
            timer.expire(PERIODIC),
            Some(Expired {
                next: Some(late + 3_000_000)
            })
        );
    }

    #[test]
    fn no_period_is_shorter_than_the_shortest() {
        for (initial, started_as) in [(1, PERIODIC), (1_000, PERIODIC), (1_000, 0), (150_000, 0)] {
            let mut timer = ApicTimer::new();
            timer.set_divide(started_as, 0b1011);
            timer.start(started_as, initial).unwrap();
            // Made periodic while it runs, and faster.
            timer.set_divide(PERIODIC, 0b1011);
            let deadline = monotonic_ns();
            timer.deadline = Some(deadline);
            let next = timer.expire(PERIODIC).unwrap().next.unwrap();
            assert!(next - deadline >= SHORTEST_PERIOD, "{initial}: {next}");
        }
    }

    #[test]
    fn tsc_deadline_needs_the_counter_to_be_there() {
        let tsc = GuestTsc::host();
        let mut timer = ApicTimer::new();
        assert_eq!(timer.start_tsc_deadline(0, 5, tsc), None);
        let far = tsc.now() + tsc.khz * 1000;
        timer.start_tsc_deadline(TSC_DEADLINE, far, tsc).unwrap();
        assert_eq!(timer.tsc_deadline(TSC_DEADLINE), far);
        timer.deadline = Some(0);
        assert_eq!(timer.expire(TSC_DEADLINE), None, "woken early");
        assert!(timer.deadline.unwrap() > monotonic_ns());
        timer.start_tsc_deadline(TSC_DEADLINE, tsc.now(), tsc);
        assert!(timer.expire(TSC_DEADLINE).is_some());
        assert_eq!(timer.tsc_deadline(TSC_DEADLINE), 0);
    }
}
