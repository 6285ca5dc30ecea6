//! Results as Markdown tables.

use std::time::Duration;

use super::results::{Kind, Run};

/// The table of the same parts in two machines and, where they ran there, on the host.
pub(super) fn machines(native: Option<&Run>, ours: (&str, &Run), theirs: (&str, &Run)) -> String {
    let ((our_name, ours), (their_name, theirs)) = (ours, theirs);
    let mut table = Table::default();
    table.row(
        "part",
        [
            "native, ms".into(),
            format!("{our_name}, ms"),
            format!("{their_name}, ms"),
        ],
        [
            format!("{their_name} / {our_name}"),
            format!("{our_name} / native"),
        ],
    );
    let (mut all, mut user) = (Ratios::default(), Ratios::default());
    for (i, (our, their)) in ours.parts.iter().zip(&theirs.parts).enumerate() {
        let host = native.and_then(|run| run.parts.get(i));
        let host = host.map(|part| part.time);
        let times = [host, Some(our.time), Some(their.time)];
        let row = Ratios::of(their.time, our.time, host);
        table.row(&our.name, times.map(milliseconds), row.cells());
        if our.kind == Kind::User {
            user.extend(&row);
        }
        all.extend(&row);
    }
    let times = [None, Some(ours.start), Some(theirs.start)];
    let start = Ratios::of(theirs.start, ours.start, None);
    table.row("start to init", times.map(milliseconds), start.cells());
    all.extend(&start);
    for (name, ratios) in [("all", all), ("user mode", user)] {
        if !ratios.gains.is_empty() {
            let name = format!("**geometric mean, {name}**");
            table.row(&name, Default::default(), ratios.cells());
        }
    }
    table.finish(native.is_some())
}

/// A table of machines: a name, three times, two ratios; the first row is the heading.
#[derive(Debug, Default)]
struct Table {
    rows: Vec<[String; 6]>,
}

impl Table {
    /// The columns about the host.
    const NATIVE: [usize; 2] = [1, 5];

    fn row(&mut self, name: &str, times: [String; 3], ratios: [String; 2]) {
        let ([host, ours, theirs], [gain, cost]) = (times, ratios);
        self.rows
            .push([name.into(), host, ours, theirs, gain, cost]);
    }

    fn finish(mut self, has_native: bool) -> String {
        let rule = ["---", "---:", "---:", "---:", "---:", "---:"];
        self.rows.insert(1, rule.map(Into::into));
        let line = |row: &[String; 6]| {
            let cells = row.iter().enumerate();
            let cells = cells.filter(|(column, _)| has_native || !Self::NATIVE.contains(column));
            cells.fold(String::from("|"), |line, (_, cell)| {
                line + &format!(" {cell} |")
            })
        };
        let lines: Vec<String> = self.rows.iter().map(line).collect();
        lines.join("\n")
    }
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
            milliseconds(Some(one.time)),
            milliseconds(Some(two.time)),
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
    fn of(theirs: Duration, ours: Duration, host: Option<Duration>) -> Self {
        Self {
            gains: vec![ratio(theirs, ours)],
            costs: host.iter().map(|host| ratio(ours, *host)).collect(),
        }
    }

    fn extend(&mut self, other: &Self) {
        self.gains.extend(&other.gains);
        self.costs.extend(&other.costs);
    }

    fn cells(&self) -> [String; 2] {
        [cell(&self.gains), cell(&self.costs)]
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

fn milliseconds(time: Option<Duration>) -> String {
    let Some(time) = time else {
        return String::new();
    };
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
        let table = machines(Some(&native), ("Eptide", &ours), ("TCG", &theirs));
        let expected = "\
| part | native, ms | Eptide, ms | TCG, ms | TCG / Eptide | Eptide / native |
| --- | ---: | ---: | ---: | ---: | ---: |
| crc | 10.0 | 20.0 | 80.0 | 4.00 | 2.00 |
| fork | 20.0 | 160 | 160 | 1.00 | 8.00 |
| start to init |  | 1000 | 2000 | 2.00 |  |
| **geometric mean, all** |  |  |  | 2.00 | 4.00 |
| **geometric mean, user mode** |  |  |  | 4.00 | 2.00 |";
        assert_eq!(table, expected);
        let table = machines(None, ("Eptide", &ours), ("TCG", &theirs));
        let expected = "\
| part | Eptide, ms | TCG, ms | TCG / Eptide |
| --- | ---: | ---: | ---: |
| crc | 20.0 | 80.0 | 4.00 |";
        assert!(table.starts_with(expected), "{table}");
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
