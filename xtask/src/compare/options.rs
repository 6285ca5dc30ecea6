//! The chore's own options.

use std::path::PathBuf;

/// What is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// `eptide run` with TCG.
    Run,
    /// QEMU on Eptide with QEMU on TCG.
    Exec,
    /// Two copies on two processors with one on one.
    Two,
    /// Programs of Debian packages.
    Programs,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Options {
    pub(super) mode: Mode,
    /// How often each machine has its turn.
    pub(super) rounds: u32,
    /// Names of parts, separated by commas.
    pub(super) parts: Option<String>,
    /// A tenth of the work.
    pub(super) quick: bool,
    pub(super) engine: Option<String>,
    /// An `eptide` to measure instead of this tree's.
    pub(super) eptide: Option<PathBuf>,
    pub(super) qemu: PathBuf,
    /// QEMU's `-M`.
    pub(super) board: String,
}

impl Options {
    pub(super) fn parse(arguments: &[&str]) -> Result<Self, String> {
        let mut options = Self {
            mode: Mode::Run,
            rounds: 3,
            parts: None,
            quick: false,
            engine: None,
            eptide: None,
            qemu: "qemu-system-x86_64".into(),
            board: "pc".into(),
        };
        let mut words = arguments.iter().copied();
        while let Some(word) = words.next() {
            let mut value = || {
                let next = words.next();
                next.ok_or_else(|| format!("compare: {word} needs a value"))
            };
            match word {
                "--exec" => options.mode = Mode::Exec,
                "--two" => options.mode = Mode::Two,
                "--programs" => options.mode = Mode::Programs,
                "--quick" => options.quick = true,
                "--rounds" => {
                    let count = value()?;
                    options.rounds = match count.parse() {
                        Ok(rounds @ 1..) => rounds,
                        _ => return Err(format!("compare: --rounds {count}: not a count")),
                    };
                }
                "--parts" => options.parts = Some(value()?.into()),
                "--engine" => options.engine = Some(value()?.into()),
                "--eptide" => options.eptide = Some(value()?.into()),
                "--qemu" => options.qemu = value()?.into(),
                "--machine" => options.board = value()?.into(),
                _ => return Err(format!("compare: no option {word:?}")),
            }
        }
        Ok(options)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_have_defaults_and_values() {
        let options = Options::parse(&[]).unwrap();
        assert_eq!((options.mode, options.rounds), (Mode::Run, 3));
        let words = "--exec --rounds 1 --parts crc,fork --quick --engine fast --qemu /q";
        let words: Vec<&str> = words.split(' ').collect();
        let options = Options::parse(&words).unwrap();
        assert_eq!((options.mode, options.rounds), (Mode::Exec, 1));
        assert_eq!(options.parts.as_deref(), Some("crc,fork"));
        assert_eq!(options.engine.as_deref(), Some("fast"));
        assert_eq!(options.qemu, PathBuf::from("/q"));
        assert!(options.quick);
    }

    #[test]
    fn mistakes_are_named() {
        for (words, part) in [
            (&["--rounds"][..], "--rounds needs a value"),
            (&["--rounds", "0"], "--rounds 0"),
            (&["--fast"], "no option \"--fast\""),
        ] {
            let message = Options::parse(words).unwrap_err();
            assert!(message.contains(part), "{message}");
        }
    }
}
