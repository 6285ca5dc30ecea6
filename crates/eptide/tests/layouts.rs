//! `eptide exec` from wherever it is installed.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::folder;

/// The preload library as built for the tests. Only tests of the whole workspace are sure to have
/// it.
fn library() -> Option<PathBuf> {
    let library = std::env::current_exe().unwrap();
    let library = library.with_file_name("libeptide_preload.so");
    if !library.is_file() {
        assert!(
            std::env::var_os("EPTIDE_LONG_TESTS").is_none(),
            "{} is missing",
            library.display()
        );
        eprintln!("skipped: needs the preload library; it takes `-p eptide-preload` too");
        return None;
    }
    Some(library)
}

/// Has a program open the device; it must be Eptide's.
fn opens_the_device(eptide: &Path) {
    let script = "exec 3<>/dev/kvm && readlink /proc/self/fd/3";
    let mut command = Command::new(eptide);
    command.args(["exec", "sh", "-c", script]);
    command.env_remove("EPTIDE_PRELOAD");
    let output = command.output().unwrap();
    let found = String::from_utf8_lossy(&output.stdout);
    assert!(found.starts_with("/memfd:kvm"), "{output:?}");
}

#[test]
fn a_folder_with_a_space_is_as_good_as_another() {
    let Some(library) = library() else {
        return;
    };
    let folder = folder("layout with a space");
    let eptide = folder.join("eptide");
    fs::copy(env!("CARGO_BIN_EXE_eptide"), &eptide).unwrap();
    fs::copy(library, folder.join("libeptide_preload.so")).unwrap();
    opens_the_device(&eptide);
}

#[test]
fn a_prefix_has_the_library_below_lib() {
    let Some(library) = library() else {
        return;
    };
    let prefix = folder("layout-prefix");
    fs::create_dir_all(prefix.join("bin")).unwrap();
    fs::create_dir_all(prefix.join("lib/eptide")).unwrap();
    let eptide = prefix.join("bin/eptide");
    fs::copy(env!("CARGO_BIN_EXE_eptide"), &eptide).unwrap();
    fs::copy(library, prefix.join("lib/eptide/libeptide_preload.so")).unwrap();
    opens_the_device(&eptide);
}
