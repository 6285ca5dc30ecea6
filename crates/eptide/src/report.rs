//! What happened: milestones seen on the console and the counters at the end.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Write};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// Linux prints this when it starts the first user program.
const INIT_MARKER: &[u8] = b"Run /init as init process";

/// Times of what the console showed.
#[derive(Debug, Clone, Default)]
pub(crate) struct Milestones(Arc<Times>);

#[derive(Debug, Default)]
struct Times {
    start: OnceLock<Instant>,
    init: OnceLock<Instant>,
}

impl Milestones {
    /// The first instruction is about to run.
    pub(crate) fn start(&self) {
        let _ = self.0.start.set(Instant::now());
    }

    fn init_reached(&self) {
        let _ = self.0.init.set(Instant::now());
    }

    /// From the first instruction to the first user program.
    pub(crate) fn time_to_init(&self) -> Option<Duration> {
        Some(self.0.init.get()?.duration_since(*self.0.start.get()?))
    }
}

/// A console's output on its way to the terminal.
pub(crate) struct Tap<W> {
    output: W,
    milestones: Milestones,
    matched: usize,
}

impl<W: Write> Tap<W> {
    /// Passes everything on to `output` and notes milestones.
    pub(crate) fn new(output: W, milestones: Milestones) -> Self {
        Self {
            output,
            milestones,
            matched: 0,
        }
    }

    fn watch(&mut self, bytes: &[u8]) {
        for byte in bytes {
            // The marker's first letter occurs nowhere else in it, so a mismatch can only
            // restart the match at this byte.
            self.matched = match *byte {
                byte if byte == INIT_MARKER[self.matched] => self.matched + 1,
                byte => usize::from(byte == INIT_MARKER[0]),
            };
            if self.matched == INIT_MARKER.len() {
                self.milestones.init_reached();
                self.matched = 0;
            }
        }
    }
}

impl<W: Write> Write for Tap<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.watch(bytes);
        self.output.write_all(bytes)?;
        // Guest output has no line discipline of its own: a prompt must appear without a newline.
        self.output.flush()?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.output.flush()
    }
}

/// Counters of the KVM implementation. What it does not count is `None` and is not shown.
#[derive(Debug, Clone, Default)]
pub(crate) struct Statistics {
    /// Guest instructions retired.
    pub(crate) instructions: Option<u64>,
    /// Exits from the guest by basic exit reason.
    pub(crate) exits: BTreeMap<&'static str, u64>,
    /// EPT violations.
    pub(crate) ept_violations: Option<u64>,
    /// EPT misconfigurations: accesses to MMIO.
    pub(crate) ept_misconfigurations: Option<u64>,
    /// Lookups of the MMIO cache.
    pub(crate) mmio_cache: Option<HitRate>,
    /// Lookups of the TLB.
    pub(crate) tlb: Option<HitRate>,
}

/// Hits and misses of a cache.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct HitRate {
    /// Found.
    pub(crate) hits: u64,
    /// Not found.
    pub(crate) misses: u64,
}

impl fmt::Display for HitRate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let total = self.hits + self.misses;
        if total == 0 {
            return f.write_str("never used");
        }
        let percent = self.hits as f64 * 100.0 / total as f64;
        // Almost all hits must not read as all.
        let digits = if percent > 99.9 { 4 } else { 2 };
        write!(f, "{percent:.digits$} % of {}", Grouped(total))
    }
}

/// What happened during a run.
#[derive(Debug, Clone)]
pub(crate) struct Report {
    /// From the first instruction to the stop.
    pub(crate) elapsed: Duration,
    /// From the first instruction to the first user program, if the console showed it.
    pub(crate) time_to_init: Option<Duration>,
    /// Exits that reached the VMM.
    pub(crate) user_exits: Vec<(&'static str, u64)>,
    /// Counters of the KVM implementation.
    pub(crate) statistics: Statistics,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = |name: &str, value: &dyn fmt::Display| writeln!(f, "  {name:<28} {value}");
        if let Some(time) = self.time_to_init {
            line("time to init", &format_args!("{:.2} s", time.as_secs_f64()))?;
        }
        line(
            "time in all",
            &format_args!("{:.2} s", self.elapsed.as_secs_f64()),
        )?;
        let statistics = &self.statistics;
        if let Some(count) = statistics.instructions {
            let rate = count as f64 / self.elapsed.as_secs_f64().max(1e-9) / 1e6;
            line(
                "instructions",
                &format_args!("{} ({rate:.1} million/s)", Grouped(count)),
            )?;
        }
        let counters = [
            ("EPT violations", statistics.ept_violations),
            ("EPT misconfigurations", statistics.ept_misconfigurations),
        ];
        for (name, count) in counters {
            if let Some(count) = count {
                line(name, &Grouped(count))?;
            }
        }
        if let Some(rate) = statistics.mmio_cache {
            line("MMIO cache hits", &rate)?;
        }
        if let Some(rate) = statistics.tlb {
            line("TLB hits", &rate)?;
        }
        let mut exits: Vec<_> = statistics
            .exits
            .iter()
            .filter(|(_, count)| **count != 0)
            .collect();
        exits.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
        for (reason, count) in exits {
            line(&format!("exits: {reason}"), &Grouped(*count))?;
        }
        for (reason, count) in &self.user_exits {
            line(&format!("exits to user space: {reason}"), &Grouped(*count))?;
        }
        Ok(())
    }
}

/// A number with its thousands kept apart.
struct Grouped(u64);

impl fmt::Display for Grouped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = self.0.to_string();
        let mut text = String::with_capacity(digits.len() * 4 / 3);
        for (index, digit) in digits.char_indices() {
            if index != 0 && (digits.len() - index).is_multiple_of(3) {
                text.push(' ');
            }
            text.push(digit);
        }
        f.pad(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_init_marker_is_found_across_writes() {
        let milestones = Milestones::default();
        milestones.start();
        let mut tap = Tap::new(Vec::new(), milestones.clone());
        tap.write_all(b"[    1.0] RunRun /in").unwrap();
        assert_eq!(milestones.time_to_init(), None);
        tap.write_all(b"it as init process\r\n").unwrap();
        assert!(milestones.time_to_init().is_some());
        assert!(tap.output.ends_with(b"process\r\n"));
    }

    #[test]
    fn numbers_and_rates_read_well() {
        assert_eq!(Grouped(1_234_567).to_string(), "1 234 567");
        assert_eq!(Grouped(12).to_string(), "12");
        assert_eq!(HitRate { hits: 3, misses: 1 }.to_string(), "75.00 % of 4");
        let most = HitRate {
            hits: 999_999,
            misses: 1,
        };
        assert_eq!(most.to_string(), "99.9999 % of 1 000 000");
        assert_eq!(HitRate::default().to_string(), "never used");
    }

    #[test]
    fn the_report_shows_only_what_was_counted() {
        let statistics = Statistics {
            instructions: Some(2_000_000),
            exits: BTreeMap::from([("Hlt", 3), ("Cpuid", 0)]),
            ..Default::default()
        };
        let report = Report {
            elapsed: Duration::from_secs(2),
            time_to_init: None,
            user_exits: vec![("MMIO", 1)],
            statistics,
        };
        let text = report.to_string();
        assert!(text.contains("2 000 000 (1.0 million/s)") && text.contains("exits: Hlt"));
        assert!(!text.contains("Cpuid") && !text.contains("EPT") && !text.contains("init"));
    }
}
