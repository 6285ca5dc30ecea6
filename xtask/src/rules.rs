//! The rules of `CONTRIBUTING.md` that can be counted.
//!
//! ```text
//! functions   at most 60 lines         Rust files   at most 800 lines
//! allow       with its reason          documents    at most 128 columns of prose
//! ```
//!
//! `xtask/rules.txt` names what may differ, and why; a line there that nothing needs is a failure,
//! too.

mod source;

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::Outcome;

/// Lines that a function may have.
const FUNCTION: usize = 60;
/// Lines that a file may have.
const FILE: usize = 800;
/// Columns that a document's prose may have.
const WIDTH: usize = 128;

/// What breaks a rule.
#[derive(Debug, PartialEq, Eq)]
struct Finding {
    /// What an exception would name: a file, or a file and a function.
    place: String,
    /// The rule and by how much.
    what: String,
}

/// Checks the files that Git knows.
pub(crate) fn run() -> Outcome {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let exceptions = include_str!("../rules.txt");
    let mut findings = Vec::new();
    for name in files(&root)? {
        // A file that was deleted and not yet committed, or a link to one that is looked at itself.
        let Ok(text) = fs::read_to_string(root.join(&name)) else {
            continue;
        };
        findings.extend(look_at(&name, &text));
    }
    let complaints = complaints(&findings, exceptions)?;
    match complaints.is_empty() {
        true => Ok(()),
        false => Err(complaints.join("\n")),
    }
}

/// The names of all files.
fn files(root: &Path) -> Result<Vec<String>, String> {
    let mut git = Command::new("git");
    git.current_dir(root).args(["ls-files", "*.rs", "*.md"]);
    let output = git.output().map_err(|error| format!("git: {error}"))?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().map(str::to_owned).collect())
}

fn look_at(name: &str, text: &str) -> Vec<Finding> {
    match name.ends_with(".md") {
        true => prose(name, text),
        false => rust(name, text),
    }
}

fn rust(name: &str, text: &str) -> Vec<Finding> {
    let finding = |place: String, what: String| Finding { place, what };
    let mut findings = Vec::new();
    let length = text.lines().count();
    if length > FILE {
        findings.push(finding(name.into(), format!("{length} lines")));
    }
    let code = source::without_texts(text);
    for function in source::functions(&code) {
        if function.lines > FUNCTION {
            let place = format!("{name} {}", function.name);
            findings.push(finding(place, format!("{} lines", function.lines)));
        }
    }
    for line in source::allowances_without_reason(&code) {
        let what = format!("line {line}: allow without a reason");
        findings.push(finding(name.into(), what));
    }
    findings
}

fn prose(name: &str, text: &str) -> Vec<Finding> {
    let mut in_code = false;
    let mut findings = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        if line.trim_start().starts_with("```") {
            in_code = !in_code;
        }
        // A table's row is one line, however long.
        let columns = line.chars().count();
        if !in_code && !line.starts_with('|') && columns > WIDTH {
            findings.push(Finding {
                place: name.into(),
                what: format!("line {number}: {columns} columns"),
            });
        }
    }
    findings
}

/// What is to be said of `findings`, given the exceptions: lines `place: reason`.
fn complaints(findings: &[Finding], exceptions: &str) -> Result<Vec<String>, String> {
    let mut places = Vec::new();
    for line in exceptions.lines() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        match line.split_once(": ") {
            Some((place, reason)) if !reason.trim().is_empty() => places.push(place),
            _ => return Err(format!("rules.txt: no reason in {line:?}")),
        }
    }
    let mut complaints: Vec<String> = findings
        .iter()
        .filter(|finding| !places.contains(&finding.place.as_str()))
        .map(|finding| format!("{}: {}", finding.place, finding.what))
        .collect();
    let needed = |place: &&&str| findings.iter().any(|finding| finding.place == **place);
    for place in places.iter().filter(|place| !needed(place)) {
        complaints.push(format!("rules.txt: nothing needs the exception {place:?}"));
    }
    Ok(complaints)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whats(findings: &[Finding]) -> Vec<&str> {
        findings.iter().map(|finding| &*finding.what).collect()
    }

    #[test]
    fn long_functions_and_files_are_found() {
        let body = "    step();\n".repeat(FUNCTION);
        let text = format!("fn short() {{\n}}\nfn long() {{\n{body}}}\n");
        let findings = rust("a.rs", &text);
        assert_eq!(whats(&findings), ["62 lines"]);
        assert_eq!(findings[0].place, "a.rs long");
        assert_eq!(whats(&rust("a.rs", &"\n".repeat(801))), ["801 lines"]);
    }

    #[test]
    fn an_allowance_needs_a_reason() {
        let text =
            "#[allow(dead_code)]\n#![allow(\n    unused,\n    reason = \"x\"\n)]\n// #[allow(x)]\n";
        assert_eq!(
            whats(&rust("a.rs", text)),
            ["line 1: allow without a reason"]
        );
    }

    #[test]
    fn tables_and_code_may_be_wide() {
        let wide = "x".repeat(WIDTH + 1);
        let text = format!("| {wide} |\n```\n{wide}\n```\n{wide}\n");
        assert_eq!(whats(&prose("a.md", &text)), ["line 5: 129 columns"]);
    }

    #[test]
    fn exceptions_have_reasons_and_are_needed() {
        let findings = rust("a.rs", &"\n".repeat(801));
        let complaints_with = |text| complaints(&findings, text);
        assert_eq!(complaints_with("# why\n\na.rs: a table\n"), Ok(vec![]));
        assert!(complaints_with("a.rs\n").is_err());
        let unneeded = complaints_with("a.rs: a table\nb.rs: a table\n").unwrap();
        assert_eq!(unneeded.len(), 1, "{unneeded:?}");
    }
}
