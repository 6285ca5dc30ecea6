//! What the guest program prints, as values.

use std::time::Duration;

/// What a part is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// It stays in user mode but for its page faults.
    User,
    /// It is about the kernel.
    System,
}

/// One part in one run, or the best of several.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) name: String,
    pub(super) kind: Kind,
    /// What it computed; nobody reads it as a number.
    pub(super) checksum: String,
    pub(super) time: Duration,
}

/// One run of the program.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Run {
    /// From the start of the process to the program's first line, by the host's clock.
    pub(super) start: Duration,
    /// From its first line to its last, by the host's clock.
    pub(super) host_time: Duration,
    /// The same by the guest's.
    pub(super) guest_time: Duration,
    pub(super) parts: Vec<Part>,
}

impl Run {
    /// Whether the guest's clock went as the host's did, but for the console's delay. Times by a
    /// clock that does not are worth nothing.
    pub(super) fn clocks_agree(&self) -> bool {
        let allowed = self.host_time / 20 + Duration::from_millis(100);
        self.host_time.abs_diff(self.guest_time) <= allowed
    }

    /// Whether every part of a list with commas was run.
    pub(super) fn has_all(&self, wanted: Option<&str>) -> Result<(), String> {
        let mut names = wanted.into_iter().flat_map(|list| list.split(','));
        match names.find(|name| self.parts.iter().all(|part| part.name != *name)) {
            Some(name) => Err(format!("compare: there is no part {name:?}")),
            None => Ok(()),
        }
    }

    /// The fastest of each part.
    pub(super) fn best(runs: &[Run]) -> Run {
        let Some((first, others)) = runs.split_first() else {
            return Run::default();
        };
        let mut best = first.clone();
        for run in others {
            best.start = best.start.min(run.start);
            best.host_time = best.host_time.min(run.host_time);
            best.guest_time = best.guest_time.min(run.guest_time);
            for (part, other) in best.parts.iter_mut().zip(&run.parts) {
                part.time = part.time.min(other.time);
            }
        }
        best
    }
}

/// Lines of a console, in the order they come.
#[derive(Debug, Default)]
pub(super) struct Reader {
    run: Run,
    is_started: bool,
}

impl Reader {
    /// Takes a line that came `at` after the start of the process; the run, if it was the last.
    pub(super) fn line(&mut self, line: &str, at: Duration) -> Result<Option<Run>, String> {
        // A firmware may have left control sequences in front of it.
        let Some((_, said)) = line.split_once("compare: ") else {
            return Ok(None);
        };
        let unreadable = || format!("the program's line cannot be read: {line:?}");
        let words: Vec<&str> = said.split_whitespace().collect();
        match words.as_slice() {
            ["start"] => {
                self.run.start = at;
                self.is_started = true;
            }
            ["part", kind, name, checksum, time] if self.is_started => {
                self.run.parts.push(Part {
                    name: (*name).into(),
                    kind: match *kind {
                        "user" => Kind::User,
                        "system" => Kind::System,
                        _ => return Err(unreadable()),
                    },
                    checksum: (*checksum).into(),
                    time: microseconds(time).ok_or_else(unreadable)?,
                });
            }
            ["end", time] if self.is_started => {
                self.run.guest_time = microseconds(time).ok_or_else(unreadable)?;
                self.run.host_time = at.saturating_sub(self.run.start);
                return Ok(Some(self.run.clone()));
            }
            ["failed:", ..] => return Err(format!("the program says: {said}")),
            _ => return Err(unreadable()),
        }
        Ok(None)
    }
}

fn microseconds(text: &str) -> Option<Duration> {
    text.parse().ok().map(Duration::from_micros)
}

/// The runs' parts and checksums must be the same; each run comes with its machine's name.
pub(super) fn agree(runs: &[(&str, &Run)]) -> Result<(), String> {
    let Some(((first_name, first), others)) = runs.split_first() else {
        return Ok(());
    };
    for (name, run) in others {
        if first.parts.len() != run.parts.len() {
            let (ours, theirs) = (first.parts.len(), run.parts.len());
            return Err(format!(
                "{first_name} ran {ours} parts, {name} ran {theirs}"
            ));
        }
        for (a, b) in first.parts.iter().zip(&run.parts) {
            if (&a.name, &a.checksum) != (&b.name, &b.checksum) {
                return Err(format!(
                    "results differ: {first_name} has {} {}, {name} has {} {}",
                    a.name, a.checksum, b.name, b.checksum
                ));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(lines: &[&str]) -> Result<Option<Run>, String> {
        let mut reader = Reader::default();
        let mut last = None;
        for (second, line) in lines.iter().enumerate() {
            last = reader.line(line, Duration::from_secs(second as u64))?;
        }
        Ok(last)
    }

    fn sample(time: &str, checksum: &str) -> Run {
        read(&[
            "[    0.000000] Linux version 6.1.0",
            "\x1bccompare: start\r",
            &format!("compare: part user crc {checksum} {time}\r"),
            "compare: part system fork 02 2500000",
            "compare: end 3000000",
        ])
        .unwrap()
        .unwrap()
    }

    #[test]
    fn a_console_becomes_a_run() {
        let run = sample("1000", "01");
        assert_eq!(run.start, Duration::from_secs(1));
        assert_eq!(run.host_time, Duration::from_secs(3));
        assert_eq!(run.guest_time, Duration::from_secs(3));
        assert!(run.clocks_agree());
        assert_eq!(run.parts.len(), 2);
        assert_eq!(run.parts[0].kind, Kind::User);
        assert_eq!(run.parts[0].time, Duration::from_millis(1));
        assert_eq!(run.parts[1].name, "fork");
    }

    #[test]
    fn other_lines_are_passed_over_and_broken_ones_reported() {
        assert_eq!(read(&["compare: start", "Run /init"]), Ok(None));
        for broken in [
            "compare: part user crc 01",
            "compare: part kernel crc 01 5",
            "compare: part user crc 01 soon",
            "compare: end",
        ] {
            let message = read(&["compare: start", broken]).unwrap_err();
            assert!(message.contains(broken), "{message}");
        }
        let message = read(&["compare: start", "compare: failed: fork"]).unwrap_err();
        assert_eq!(message, "the program says: failed: fork");
    }

    #[test]
    fn a_part_that_is_asked_for_must_have_run() {
        let run = sample("1", "01");
        run.has_all(None).unwrap();
        run.has_all(Some("fork,crc")).unwrap();
        let message = run.has_all(Some("crc,forks")).unwrap_err();
        assert_eq!(message, "compare: there is no part \"forks\"");
    }

    #[test]
    fn a_clock_that_lags_is_noticed() {
        let mut run = sample("1", "01");
        run.guest_time = Duration::from_secs(2);
        assert!(!run.clocks_agree());
    }

    #[test]
    fn the_best_is_taken_part_by_part() {
        let best = Run::best(&[sample("7", "01"), sample("5", "01"), sample("6", "01")]);
        assert_eq!(best.parts[0].time, Duration::from_micros(5));
        assert_eq!(Run::best(&[]), Run::default());
    }

    #[test]
    fn differing_results_are_named() {
        let (one, other) = (sample("7", "01"), sample("7", "0a"));
        agree(&[("native", &one), ("TCG", &one)]).unwrap();
        let message = agree(&[("native", &one), ("TCG", &other)]).unwrap_err();
        assert_eq!(message, "results differ: native has crc 01, TCG has crc 0a");
        let mut short = one.clone();
        short.parts.pop();
        assert!(agree(&[("native", &one), ("TCG", &short)]).is_err());
    }
}
