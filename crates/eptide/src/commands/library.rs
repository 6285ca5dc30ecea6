//! The preload library's file, and the list that the dynamic loader is given.
//!
//! ```text
//! $EPTIDE_PRELOAD               named
//! <folder of eptide>/           as cargo builds it
//! <prefix>/lib/eptide/          beside <prefix>/bin/eptide, as a package installs it
//! <prefix>/lib/
//! this program                  release builds hold the library; it is written to the cache folder
//! ```
//!
//! The loader takes spaces and colons in its list for separators. A library below such a path is
//! reached by a link from the user's folder among the temporary files.

use std::ffi::{OsStr, OsString};
use std::hash::{DefaultHasher, Hasher};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use packages::archive::write_atomically;
use thiserror::Error;

/// The library's file name.
const FILE: &str = "libeptide_preload.so";
/// Says where the library is instead.
const VARIABLE: &str = "EPTIDE_PRELOAD";

/// The library, in builds that hold it.
#[cfg(embedded)]
const EMBEDDED: Option<&[u8]> = Some(include_bytes!(env!("EPTIDE_LIBRARY")));
#[cfg(not(embedded))]
const EMBEDDED: Option<&[u8]> = None;

/// Why there is nothing to preload.
#[derive(Debug, Error)]
pub(crate) enum LibraryError {
    #[error("{}: {error}", path.display())]
    Io { path: PathBuf, error: io::Error },
    #[error(
        "{FILE} is not beside this program ({}) and not part of it; \
         `cargo build` makes it, and {VARIABLE} can name it",
        .0.display()
    )]
    Missing(PathBuf),
    #[error(transparent)]
    NoFolder(#[from] packages::Error),
}

/// The list of libraries to load first: this one, then those there are.
pub(crate) fn preload_list() -> Result<OsString, LibraryError> {
    let mut list = listable(find()?)?.into_os_string();
    if let Some(others) = std::env::var_os("LD_PRELOAD")
        && !others.is_empty()
    {
        list.push(":");
        list.push(others);
    }
    Ok(list)
}

fn find() -> Result<PathBuf, LibraryError> {
    if let Some(named) = std::env::var_os(VARIABLE) {
        let named = PathBuf::from(named);
        return named.canonicalize().map_err(failed(&named));
    }
    let own = std::env::current_exe().unwrap_or_default();
    if let Some(found) = beside(&own) {
        return Ok(found);
    }
    match EMBEDDED {
        Some(content) => unpack(content),
        None => Err(LibraryError::Missing(own.with_file_name(FILE))),
    }
}

/// The library of an installation that has the program at `own`.
fn beside(own: &Path) -> Option<PathBuf> {
    let folder = own.parent()?;
    let prefix = folder.parent().unwrap_or(folder);
    [folder, &prefix.join("lib/eptide"), &prefix.join("lib")]
        .iter()
        .map(|folder| folder.join(FILE))
        .find(|file| file.is_file())
}

/// Writes the library into the cache folder, unless it is there.
fn unpack(content: &[u8]) -> Result<PathBuf, LibraryError> {
    // By content: programs of another version may be running on theirs.
    let name = format!("preload-{:016x}", fingerprint(content));
    let folder = packages::cache_folder()?.join(name);
    let file = folder.join(FILE);
    if std::fs::read(&file).is_ok_and(|found| found == content) {
        return Ok(file);
    }
    std::fs::create_dir_all(&folder)
        .and_then(|()| write_atomically(&file, content))
        .map_err(failed(&file))?;
    Ok(file)
}

/// A path for the loader's list: the file's own, or a link's to it.
fn listable(file: PathBuf) -> Result<PathBuf, LibraryError> {
    if !has_separator(file.as_os_str()) {
        return Ok(file);
    }
    let name = format!(
        "preload-{:016x}.so",
        fingerprint(file.as_os_str().as_bytes())
    );
    let link = packages::temporary_folder()?.join(name);
    if std::fs::read_link(&link).is_ok_and(|target| target == file) {
        return Ok(link);
    }
    // Whoever else makes it at this moment makes the same.
    let _ = std::fs::remove_file(&link);
    match symlink(&file, &link) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(failed(&link)(error)),
        _ => Ok(link),
    }
}

fn has_separator(path: &OsStr) -> bool {
    let separators = b" :\t\n";
    path.as_bytes().iter().any(|byte| separators.contains(byte))
}

fn fingerprint(content: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(content);
    hasher.finish()
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> LibraryError {
    let path = path.to_owned();
    move |error| LibraryError::Io { path, error }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::tempdir::TempDir;

    #[test]
    fn every_layout_of_an_installation_is_known() {
        for place in ["bin", "lib/eptide", "lib"] {
            let prefix = TempDir::new().unwrap();
            let own = prefix.as_path().join("bin/eptide");
            assert_eq!(beside(&own), None);
            let library = prefix.as_path().join(place).join(FILE);
            std::fs::create_dir_all(library.parent().unwrap()).unwrap();
            std::fs::write(&library, "").unwrap();
            assert_eq!(beside(&own), Some(library));
        }
    }

    #[test]
    fn a_path_with_a_separator_goes_by_a_link() {
        let folder = TempDir::new().unwrap();
        for name in ["a b.so", "a:b.so"] {
            let file = folder.as_path().join(name);
            std::fs::write(&file, name).unwrap();
            for _ in 0..2 {
                let link = listable(file.clone()).unwrap();
                assert!(!has_separator(link.as_os_str()), "{}", link.display());
                assert_eq!(std::fs::read_to_string(link).unwrap(), name);
            }
        }
        let plain = folder.as_path().join("plain.so");
        assert_eq!(listable(plain.clone()).unwrap(), plain);
    }
}
