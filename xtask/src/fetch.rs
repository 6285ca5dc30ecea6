//! `cargo xtask fetch`: guest material.

use packages::Package;

use crate::Outcome;

/// What the demonstration and the boot tests need.
const DEFAULT: [&str; 5] = [
    "linux-image-cloud-amd64",
    "busybox-static",
    "linux-image-686-pae:i386",
    "linux-image-686:i386",
    "busybox-static:i386",
];

/// Fetches `names`, or the default.
pub(crate) fn run(names: &[&str], refresh: bool) -> Outcome {
    let cache = packages::cache_folder().map_err(|error| error.to_string())?;
    let names = if names.is_empty() {
        &DEFAULT[..]
    } else {
        names
    };
    for name in names {
        let mut say = |line: &str| eprintln!("{line}");
        let package = match refresh {
            true => Package::fetch(&cache, name, &mut say),
            false => Package::obtain(&cache, name, &mut say),
        };
        let package = package.map_err(|error| format!("{name}: {error}"))?;
        println!("{}  {}", package.version, package.root.display());
    }
    Ok(())
}
