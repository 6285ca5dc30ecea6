//! Programs of Debian packages in an initramfs, with what they are given to do.
//!
//! The packages are unpacked and not installed; that is enough for programs and the libraries that
//! they load. What no program here reads is left out, since all of it takes guest memory.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use packages::Package;
use packages::archive::{Archive, write_atomically};

use super::guest::{Guest, read, source};

/// Programs, and the libraries that their packages depend on.
const PACKAGES: [&str; 27] = [
    "busybox-static",
    "libc6",
    "zlib1g",
    "openssl",
    "libssl3",
    "xz-utils",
    "liblzma5",
    "sqlite3",
    "libsqlite3-0",
    "libreadline8",
    "libtinfo6",
    "python3.11-minimal",
    "libpython3.11-minimal",
    "libexpat1",
    "gcc-12",
    "cpp-12",
    "libgcc-s1",
    "libstdc++6",
    "libgmp10",
    "libisl23",
    "libmpc3",
    "libmpfr6",
    "libzstd1",
    "binutils",
    "binutils-x86-64-linux-gnu",
    "libbinutils",
    "libjansson4",
];
/// Paths that start so stay out: texts, the link-time optimiser, tables of other characters.
const LEFT_OUT: [&str; 6] = [
    "usr/share",
    "usr/bin/x86_64-linux-gnu-lto",
    "usr/bin/lto",
    "usr/lib/gcc/x86_64-linux-gnu/12/lto",
    "usr/lib/x86_64-linux-gnu/gconv",
    ".package",
];
/// What init and the programs work on, in `guests/programs`.
const WORK: [&str; 3] = ["script.awk", "benchmark.py", "template.c"];

/// What is at a path of the guest.
#[derive(Debug, PartialEq, Eq)]
enum Entry {
    Folder,
    Link(String),
    File(PathBuf),
}

/// A guest that times the programs.
pub(super) fn prepare() -> Result<Guest, String> {
    let cache = packages::cache_folder().map_err(|error| error.to_string())?;
    let mut entries = BTreeMap::new();
    for name in PACKAGES {
        let package = Package::obtain(&cache, name, &mut |line: &str| eprintln!("{line}"));
        let package = package.map_err(|error| format!("{name}: {error}"))?;
        collect(&package.root, Path::new(""), &mut entries)?;
    }
    let image = image(&entries)?;
    let folder = cache.join("compare");
    let path = folder.join("programs.cpio");
    fs::create_dir_all(&folder)
        .and_then(|()| write_atomically(&path, &image))
        .map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(Guest {
        kernel: super::guest::kernel(&cache)?,
        initramfs: path,
    })
}

/// Finds what is to go into the guest of the package unpacked at `root`, from `below` on.
fn collect(root: &Path, below: &Path, entries: &mut BTreeMap<String, Entry>) -> Result<(), String> {
    let folder = root.join(below);
    let failed = |error| format!("{}: {error}", folder.display());
    for found in fs::read_dir(&folder).map_err(failed)? {
        let found = found.map_err(failed)?;
        let name = below.join(found.file_name());
        let text = name.to_string_lossy().into_owned();
        if LEFT_OUT.iter().any(|prefix| text.starts_with(prefix)) {
            continue;
        }
        let kind = found.file_type().map_err(failed)?;
        if kind.is_dir() {
            entries.insert(text, Entry::Folder);
            collect(root, &name, entries)?;
        } else if kind.is_symlink() {
            let target = fs::read_link(found.path()).map_err(failed)?;
            entries.insert(text, Entry::Link(target.to_string_lossy().into_owned()));
        } else {
            entries.insert(text, Entry::File(found.path()));
        }
    }
    Ok(())
}

/// The initramfs; a folder sorts before what is in it.
fn image(entries: &BTreeMap<String, Entry>) -> Result<Vec<u8>, String> {
    let mut archive = Archive::new();
    for (name, entry) in entries {
        match entry {
            Entry::Folder => archive.folder(name),
            Entry::Link(target) => archive.link(name, target),
            Entry::File(path) => archive.file(name, 0o755, &read(path)?),
        };
    }
    let own = source("programs");
    archive
        .file("init", 0o755, &read(&own.join("init.sh"))?)
        .folder("dev")
        .character_device("dev/console", 5, 1)
        .folder("work");
    for name in WORK {
        archive.file(&format!("given/{name}"), 0o644, &read(&own.join(name))?);
    }
    Ok(archive.finish())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_package_is_collected_without_its_texts() {
        let root = std::env::temp_dir().join(format!("eptide-programs-{}", std::process::id()));
        fs::create_dir_all(root.join("usr/bin")).unwrap();
        fs::create_dir_all(root.join("usr/share/doc")).unwrap();
        fs::write(root.join("usr/bin/tool-12"), "ELF").unwrap();
        std::os::unix::fs::symlink("tool-12", root.join("usr/bin/tool")).unwrap();
        let mut entries = BTreeMap::new();
        let collected = collect(&root, Path::new(""), &mut entries);
        fs::remove_dir_all(&root).unwrap();
        collected.unwrap();
        let expected = [
            ("usr", Entry::Folder),
            ("usr/bin", Entry::Folder),
            ("usr/bin/tool", Entry::Link("tool-12".into())),
            ("usr/bin/tool-12", Entry::File(root.join("usr/bin/tool-12"))),
        ];
        let expected = expected.map(|(name, entry)| (name.to_owned(), entry));
        assert_eq!(entries, BTreeMap::from(expected));
    }
}
