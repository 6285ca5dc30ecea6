//! Values of options.

use std::time::Duration;

use crate::machine::DiskConfig;

/// Bytes of memory. A number alone is MiB, as for other virtual machines.
pub(super) fn parse_size(text: &str) -> Result<u64, String> {
    const EXAMPLES: &str = "is not a size such as 512M, 1.5G or 1GiB";
    let (number, unit) = split_unit(text);
    let shift = match unit.to_ascii_lowercase().as_str() {
        "k" | "kb" | "kib" => 10,
        "" | "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(format!("{text:?} {EXAMPLES}")),
    };
    let too_much = || match unit {
        "" => format!("{text} MiB is more than can be addressed; a number alone is MiB"),
        _ => format!("{text} is more than can be addressed"),
    };
    let (whole, part) = number.split_once('.').unwrap_or((number, ""));
    let is_fraction = number.contains('.');
    let digits = format!("{whole}{part}");
    let is_odd = whole.is_empty() || part.contains('.') || part.len() > 9;
    if is_odd || (is_fraction && part.is_empty()) {
        return Err(format!("{text:?} {EXAMPLES}"));
    }
    let scaled: u128 = digits.parse().map_err(|_| too_much())?;
    let bytes = scaled
        .checked_mul(1 << shift)
        .map(|bytes| bytes / 10u128.pow(part.len() as u32));
    let bytes = bytes.and_then(|bytes| u64::try_from(bytes).ok());
    let bytes = bytes
        .filter(|bytes| *bytes < 1 << 46)
        .ok_or_else(too_much)?;
    // A part such as 0.3G is no whole number of pages by itself.
    Ok(if is_fraction { bytes & !0xfff } else { bytes })
}

/// A time such as `90s`; a number alone is seconds.
pub(super) fn parse_time(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is not a time such as 90s, 5m or 1h");
    let (number, unit) = split_unit(text);
    let seconds = match unit {
        "ms" => 0.001,
        "" | "s" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        _ => return Err(wrong()),
    };
    let number: f64 = number.parse().map_err(|_| wrong())?;
    Duration::try_from_secs_f64(number * seconds).map_err(|_| wrong())
}

/// Digits and what follows them.
fn split_unit(text: &str) -> (&str, &str) {
    let end = text.find(|letter: char| !letter.is_ascii_digit() && letter != '.');
    text.split_at(end.unwrap_or(text.len()))
}

/// A disk: a file's name and whether it may be written.
pub(super) fn parse_disk(text: &str) -> Result<DiskConfig, String> {
    const READ_ONLY: [&str; 5] = [
        ",readonly",
        ",readonly=on",
        ",read-only",
        ",read-only=on",
        ",ro",
    ];
    const WRITABLE: [&str; 2] = [",readonly=off", ",rw"];
    if text.starts_with("file=") || text.contains(",format=") || text.contains(",if=") {
        return Err("a disk is FILE or FILE,readonly, and a raw image".into());
    }
    let strip = |endings: &[&str]| endings.iter().find_map(|ending| text.strip_suffix(ending));
    let (path, read_only) = match (strip(&READ_ONLY), strip(&WRITABLE)) {
        (Some(path), _) => (path, true),
        (None, path) => (path.unwrap_or(text), false),
    };
    match path {
        "" => Err("a disk needs a file".into()),
        path => Ok(DiskConfig {
            path: path.into(),
            read_only,
        }),
    }
}

/// `on` or `off`.
pub(super) fn parse_switch(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        other => Err(format!("{other:?} is neither \"on\" nor \"off\"")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    #[test]
    fn sizes_have_suffixes() {
        for (text, size) in [
            ("512M", 512 << 20),
            ("2g", 2 << 30),
            ("512", 512 << 20),
            ("1GiB", 1 << 30),
            ("512MB", 512 << 20),
            ("1.5G", 3 << 29),
            ("0.3G", 322_121_728),
            ("4096K", 4 << 20),
        ] {
            assert_eq!(parse_size(text), Ok(size), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in [
            "lots", "", "G", "1.G", ".5G", "1.2.3G", "-1G", "1e3", "5 M", "0x10",
        ] {
            let error = parse_size(text).unwrap_err();
            assert!(error.contains("is not a size"), "{text}: {error}");
        }
        for text in ["99999999999G", "999999999999999999999999999999999999999999"] {
            assert!(
                parse_size(text).unwrap_err().contains("addressed"),
                "{text}"
            );
        }
        let bytes = parse_size("536870912000").unwrap_err();
        assert!(bytes.contains("a number alone is MiB"), "{bytes}");
    }

    #[test]
    fn times_have_suffixes() {
        for (text, milliseconds) in [
            ("60s", 60_000),
            ("60", 60_000),
            ("1.5m", 90_000),
            ("1h", 3_600_000),
            ("20ms", 20),
        ] {
            let time = Duration::from_millis(milliseconds);
            assert_eq!(parse_time(text), Ok(time), "{text}");
        }
        for text in ["", "s", "1d", "-1s", "soon", "1e400s"] {
            assert!(parse_time(text).is_err(), "{text}");
        }
    }

    #[test]
    fn disks_may_be_read_only() {
        let disk = |text: &str| parse_disk(text).unwrap();
        for ending in ["readonly", "ro", "readonly=on"] {
            let found = disk(&format!("a.img,{ending}"));
            assert_eq!((found.path, found.read_only), ("a.img".into(), true));
        }
        let found = disk("a.img,readonly=off");
        assert_eq!((found.path, found.read_only), ("a.img".into(), false));
        assert_eq!(disk("b,c.img").path, PathBuf::from("b,c.img"));
        assert!(parse_disk(",readonly").is_err());
    }

    #[test]
    fn a_disk_in_another_language_gets_a_hint() {
        for text in [
            "file=a.img,format=raw",
            "a.qcow2,format=qcow2",
            "a,if=virtio",
        ] {
            let error = parse_disk(text).unwrap_err();
            assert!(error.contains("FILE,readonly"), "{error}");
        }
    }
}
