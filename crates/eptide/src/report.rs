//! What happened: times and counters, as text and as JSON.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde_json::{Value, json};

/// Counters of the KVM implementation. What it does not count is `None` and is not shown.
#[derive(Debug, Clone, Default)]
pub(crate) struct Statistics {
    /// Time that processors ran: the guest's code and what KVM did for it, without waiting. With
    /// several processors it is the sum of theirs.
    pub(crate) busy: Duration,
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
    /// Blocks translated to host code, and its bytes.
    pub(crate) blocks_translated: u64,
    pub(crate) bytes_translated: u64,
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
        writeln!(f, "what happened (docs/running.md explains the lines)")?;
        let mut line = |name: &str, value: &dyn fmt::Display| writeln!(f, "  {name:<28} {value}");
        if let Some(time) = self.time_to_init {
            line("time to init", &format_args!("{:.2} s", time.as_secs_f64()))?;
        }
        line(
            "time in all",
            &format_args!("{:.2} s", self.elapsed.as_secs_f64()),
        )?;
        line(
            "processors ran for",
            &format_args!("{:.2} s", self.statistics.busy.as_secs_f64()),
        )?;
        let statistics = &self.statistics;
        if let Some(count) = statistics.instructions {
            let rate = count as f64 / self.statistics.busy.as_secs_f64().max(1e-9) / 1e6;
            let rate = format_args!("{} ({rate:.1} million a second of that)", Grouped(count));
            line("instructions", &rate)?;
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
        if statistics.blocks_translated != 0 {
            line("blocks translated", &Grouped(statistics.blocks_translated))?;
            line("bytes of host code", &Grouped(statistics.bytes_translated))?;
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

impl Report {
    /// The same as [`Display`](fmt::Display) says, for programs: times in seconds, and what was not
    /// counted is `null`.
    pub(crate) fn json(&self, status: u8) -> Value {
        let statistics = &self.statistics;
        let rate = |rate: Option<HitRate>| {
            rate.map(|HitRate { hits, misses }| json!({ "hits": hits, "misses": misses }))
        };
        let user: serde_json::Map<String, Value> = self
            .user_exits
            .iter()
            .map(|(reason, count)| ((*reason).to_owned(), json!(count)))
            .collect();
        json!({
            "exit_status": status,
            "time_to_init": self.time_to_init.map(|time| time.as_secs_f64()),
            "time": self.elapsed.as_secs_f64(),
            "processor_time": self.statistics.busy.as_secs_f64(),
            "instructions": statistics.instructions,
            "ept_violations": statistics.ept_violations,
            "ept_misconfigurations": statistics.ept_misconfigurations,
            "mmio_cache": rate(statistics.mmio_cache),
            "tlb": rate(statistics.tlb),
            "blocks_translated": statistics.blocks_translated,
            "bytes_translated": statistics.bytes_translated,
            "exits": statistics.exits,
            "exits_to_user_space": user,
        })
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
            busy: Duration::from_secs(2),
            instructions: Some(2_000_000),
            exits: BTreeMap::from([("Hlt", 3), ("Cpuid", 0)]),
            ..Default::default()
        };
        let report = Report {
            elapsed: Duration::from_secs(20),
            time_to_init: None,
            user_exits: vec![("MMIO", 1)],
            statistics,
        };
        let text = report.to_string();
        assert!(text.contains("2 000 000 (1.0 million a second") && text.contains("exits: Hlt"));
        assert!(!text.contains("Cpuid") && !text.contains("EPT") && !text.contains("init"));

        let json = report.json(3);
        assert_eq!(json["exit_status"], 3);
        assert_eq!(json["instructions"], 2_000_000);
        assert_eq!(json["exits"]["Hlt"], 3);
        assert_eq!(json["exits_to_user_space"]["MMIO"], 1);
        assert!(json["tlb"].is_null() && json["time_to_init"].is_null());
    }
}
