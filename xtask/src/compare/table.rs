//! Results as Markdown tables.

use std::time::Duration;

use super::results::{Kind, Run};

/// The table of one program on the host and in two machines.
pub(super) fn machines(native: &Run, ours: (&str, &Run), theirs: (&str, &Run)) -> String {
    let ((our_name, ours), (their_name, theirs)) = (ours, theirs);
    let mut lines = vec![
        format!(
            "| part | native, ms | {our_name}, ms | {their_name}, ms | \
             {their_name} / {our_name} | {our_name} / native |"
        ),
        "| --- | ---: | ---: | ---: | ---: | ---: |".into(),
    ];
    let (mut all, mut user) = (Ratios::default(), Ratios::default());
    for ((host, our), their) in native.parts.iter().zip(&ours.parts).zip(&theirs.parts) {
        let row = Ratios::of(their.time, our.time, host.time);
        lines.push(format!(
            "| {} | {} | {} | {} | {} |",
            host.name,
            milliseconds(host.time),
            milliseconds(our.time),
            milliseconds(their.time),
            row.cells()
        ));
        if host.kind == Kind::User {
            user.extend(&row);
        }
        all.extend(&row);
    }
    let start = Ratios {
        gains: vec![ratio(theirs.start, ours.start)],
        costs: Vec::new(),
    };
    lines.push(format!(
        "| start to init | | {} | {} | {} |",
        milliseconds(ours.start),
        milliseconds(theirs.start),
        start.cells()
    ));
    all.extend(&start);
    for (name, ratios) in [("all", all), ("user mode", user)] {
        if !ratios.gains.is_empty() {
            lines.push(format!(
                "| **geometric mean, {name}** | | | | {} |",
                ratios.cells()
            ));
        }
    }
    lines.join("\n")
}

/// The table of one copy against several at once, here and on the host.
pub(super) fn copies(native: [&Run; 2], ours: (&str, [&Run; 2])) -> String {
    let (name, ours) = ours;
    let mut lines = vec![
        format!("| part | {name}, one, ms | {name}, two, ms | two / one | native, two / one |"),
        "| --- | ---: | ---: | ---: | ---: |".into(),
    ];
    let (mut here, mut host) = (Vec::new(), Vec::new());
    let native_parts = native[0].parts.iter().zip(&native[1].parts);
    let our_parts = ours[0].parts.iter().zip(&ours[1].parts);
    for ((one, two), (native_one, native_two)) in our_parts.zip(native_parts) {
        here.push(ratio(two.time, one.time));
        host.push(ratio(native_two.time, native_one.time));
        lines.push(format!(
            "| {} | {} | {} | {} | {} |",
            one.name,
            milliseconds(one.time),
            milliseconds(two.time),
            cell(&here[here.len() - 1..]),
            cell(&host[host.len() - 1..])
        ));
    }
    lines.push(format!(
        "| **geometric mean** | | | {} | {} |",
        cell(&here),
        cell(&host)
    ));
    lines.join("\n")
}

/// How often faster than the other machine, and how often slower than the host.
#[derive(Debug, Default)]
struct Ratios {
    gains: Vec<f64>,
    costs: Vec<f64>,
}

impl Ratios {
    fn of(theirs: Duration, ours: Duration, host: Duration) -> Self {
        Self {
            gains: vec![ratio(theirs, ours)],
            costs: vec![ratio(ours, host)],
        }
    }

    fn extend(&mut self, other: &Self) {
        self.gains.extend(&other.gains);
        self.costs.extend(&other.costs);
    }

    fn cells(&self) -> String {
        format!("{} | {}", cell(&self.gains), cell(&self.costs))
    }
}

/// The geometric mean of some ratios; nothing of none.
fn cell(ratios: &[f64]) -> String {
    if ratios.is_empty() {
        return String::new();
    }
    let sum: f64 = ratios.iter().map(|ratio| ratio.ln()).sum();
    format!("{:.2}", (sum / ratios.len() as f64).exp())
}

/// A part too short for the clock counts as one microsecond.
fn ratio(above: Duration, below: Duration) -> f64 {
    let least = Duration::from_micros(1);
    above.max(least).as_secs_f64() / below.max(least).as_secs_f64()
}

fn milliseconds(time: Duration) -> String {
    let value = time.as_secs_f64() * 1000.0;
    format!("{value:.*}", usize::from(value < 100.0))
}

#[cfg(test)]
mod tests {
    use super::super::results::Part;
    use super::*;

    fn run(start: u64, times: [u64; 2]) -> Run {
        let part = |name: &str, kind, time| Part {
            name: name.into(),
            kind,
            checksum: "1".into(),
            time: Duration::from_millis(time),
        };
        Run {
            start: Duration::from_millis(start),
            parts: vec![
                part("crc", Kind::User, times[0]),
                part("fork", Kind::System, times[1]),
            ],
            ..Run::default()
        }
    }

    #[test]
    fn a_row_has_both_ratios_and_the_last_rows_their_means() {
        let (native, ours, theirs) = (run(0, [10, 20]), run(1000, [20, 160]), run(2000, [80, 160]));
        let table = machines(&native, ("Eptide", &ours), ("TCG", &theirs));
        let expected = "\
| part | native, ms | Eptide, ms | TCG, ms | TCG / Eptide | Eptide / native |
| --- | ---: | ---: | ---: | ---: | ---: |
| crc | 10.0 | 20.0 | 80.0 | 4.00 | 2.00 |
| fork | 20.0 | 160 | 160 | 1.00 | 8.00 |
| start to init | | 1000 | 2000 | 2.00 |  |
| **geometric mean, all** | | | | 2.00 | 4.00 |
| **geometric mean, user mode** | | | | 4.00 | 2.00 |";
        assert_eq!(table, expected);
    }

    #[test]
    fn copies_are_held_against_one() {
        let (one, two) = (run(0, [100, 50]), run(0, [110, 100]));
        let table = copies([&one, &one], ("Eptide", [&one, &two]));
        let expected = "\
| part | Eptide, one, ms | Eptide, two, ms | two / one | native, two / one |
| --- | ---: | ---: | ---: | ---: |
| crc | 100 | 110 | 1.10 | 1.00 |
| fork | 50.0 | 100 | 2.00 | 1.00 |
| **geometric mean** | | | 1.48 | 1.00 |";
        assert_eq!(table, expected);
    }

    #[test]
    fn a_time_of_nothing_makes_no_infinity() {
        assert_eq!(ratio(Duration::ZERO, Duration::ZERO), 1.0);
    }
}
