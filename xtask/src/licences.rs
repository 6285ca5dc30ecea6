//! `cargo xtask licences`: every dependency's licence against the list in `deny.toml`.
//!
//! `cargo deny` checks the same list and more; this check needs nothing but cargo and no network.

use std::process::Command;

use serde_json::Value;

use crate::Outcome;

/// Checks every package of the resolved workspace.
pub(crate) fn run() -> Outcome {
    let root = workspace_root();
    let policy = std::fs::read_to_string(root.join("deny.toml"))
        .map_err(|error| format!("deny.toml: {error}"))?;
    let allowed = allowed_licences(&policy);
    let packages = packages()?;
    let mut refused = Vec::new();
    for package in &packages {
        let text = |key: &str| package[key].as_str().unwrap_or_default();
        if !Expression::accepts(text("license"), &allowed) {
            refused.push(format!(
                "{} {}: {:?}",
                text("name"),
                text("version"),
                text("license")
            ));
        }
    }
    match refused.as_slice() {
        [] => {
            eprintln!("{} packages, all under allowed licences", packages.len());
            Ok(())
        }
        _ => Err(format!(
            "not allowed by deny.toml:\n  {}",
            refused.join("\n  ")
        )),
    }
}

fn workspace_root() -> std::path::PathBuf {
    let here = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).into()
}

fn packages() -> Result<Vec<Value>, String> {
    let output = Command::new("cargo")
        .args(["metadata", "--format-version", "1", "--locked"])
        .args(["--filter-platform", "x86_64-unknown-linux-gnu"])
        .current_dir(workspace_root())
        .output()
        .map_err(|error| format!("cargo metadata: {error}"))?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    let metadata: Value =
        serde_json::from_slice(&output.stdout).map_err(|error| error.to_string())?;
    metadata["packages"]
        .as_array()
        .cloned()
        .ok_or_else(|| "cargo metadata: no packages".into())
}

/// The strings of `allow = […]` in the `[licenses]` section.
fn allowed_licences(policy: &str) -> Vec<String> {
    let section = policy.split("[licenses]").nth(1).unwrap_or_default();
    let list = section.split("allow = [").nth(1).unwrap_or_default();
    let list = list.split(']').next().unwrap_or_default();
    list.split('"')
        .skip(1)
        .step_by(2)
        .map(str::to_owned)
        .collect()
}

/// An SPDX expression being read.
struct Expression<'a> {
    words: std::iter::Peekable<std::vec::IntoIter<&'a str>>,
    allowed: &'a [String],
}

impl<'a> Expression<'a> {
    /// Whether `text` can be satisfied with the licences in `allowed`.
    fn accepts(text: &'a str, allowed: &'a [String]) -> bool {
        let spaced = text
            .replace('(', " ( ")
            .replace(')', " ) ")
            .replace('/', " OR ");
        let words: Vec<&str> = spaced.split_whitespace().collect();
        let mut expression = Expression {
            words: words.into_iter().peekable(),
            allowed,
        };
        expression.any() && expression.words.peek().is_none()
    }

    fn any(&mut self) -> bool {
        let mut accepted = self.all();
        while self.words.next_if_eq(&"OR").is_some() {
            accepted |= self.all();
        }
        accepted
    }

    fn all(&mut self) -> bool {
        let mut accepted = self.one();
        while self.words.next_if_eq(&"AND").is_some() {
            accepted &= self.one();
        }
        accepted
    }

    fn one(&mut self) -> bool {
        match self.words.next() {
            Some("(") => {
                let accepted = self.any();
                accepted & self.words.next_if_eq(&")").is_some()
            }
            Some(licence) => {
                let exception = self
                    .words
                    .next_if_eq(&"WITH")
                    .and_then(|_| self.words.next());
                let name = match exception {
                    Some(exception) => format!("{licence} WITH {exception}"),
                    None => licence.to_owned(),
                };
                self.allowed.contains(&name)
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_are_read_as_spdx_means_them() {
        let allowed = allowed_licences("[licenses]\nallow = [\n \"MIT\", \"Zlib\",\n]\n");
        let accepts = |text| Expression::accepts(text, &allowed);
        assert!(accepts("MIT") && accepts("GPL-2.0 OR MIT") && accepts("GPL-2.0/MIT"));
        assert!(accepts("(MIT OR GPL-2.0) AND Zlib") && accepts("MIT AND Zlib"));
        assert!(!accepts("MIT AND GPL-2.0") && !accepts("GPL-2.0") && !accepts(""));
        assert!(!accepts("MIT WITH exception") && !accepts("MIT Zlib") && !accepts("(MIT"));
    }
}
