//! Builds the preload library, so that release builds of `eptide` hold it and are one file.
//!
//! Cargo cannot make one crate's shared library part of another's program. So release builds run
//! Cargo once more, in a target folder of their own below `OUT_DIR`. Other builds find the library
//! beside the program, where `cargo build` puts it, and `EPTIDE_EMBED=off` has release builds do the
//! same: they take half the time then.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Crates that the library is built from, beside this one.
const SOURCES: [&str; 6] = ["arch", "cpu", "kvm", "mmu", "preload", "reserved"];
const LIBRARY: &str = "libeptide_preload.so";

fn main() {
    println!("cargo:rustc-check-cfg=cfg(embedded)");
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=EPTIDE_EMBED");
    let is_release = env::var_os("PROFILE").is_some_and(|profile| profile == "release");
    let is_wanted = env::var_os("EPTIDE_EMBED").is_none_or(|value| value != "off");
    let crates = folder("CARGO_MANIFEST_DIR").join("..");
    let manifest = crates.join("preload/Cargo.toml");
    // A package without the workspace around it has nothing to build.
    if !is_release || !is_wanted || !manifest.is_file() {
        return;
    }
    for name in SOURCES {
        for file in ["src", "Cargo.toml"] {
            let path = crates.join(name).join(file);
            println!("cargo:rerun-if-changed={}", path.display());
        }
    }
    let library = build(&manifest);
    println!("cargo:rustc-cfg=embedded");
    println!("cargo:rustc-env=EPTIDE_LIBRARY={}", library.display());
}

/// Builds the library; its file.
fn build(manifest: &Path) -> PathBuf {
    let target = folder("OUT_DIR").join("preload");
    let cargo = env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
    let mut command = Command::new(cargo);
    command
        .args(["build", "--release", "--lib", "--quiet", "--manifest-path"])
        .arg(manifest)
        .arg("--target-dir")
        .arg(&target)
        // Nobody debugs what is inside another file.
        .args(["--config", "profile.release.debug=false"])
        .args(["--config", "profile.release.strip=true"])
        // Clippy's or another tool's driver, which makes no library.
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .env_remove("CARGO_BUILD_TARGET");
    let status = command.status().expect("cargo runs, as it runs this");
    assert!(
        status.success(),
        "the preload library was not built: {status}"
    );
    target.join("release").join(LIBRARY)
}

fn folder(variable: &str) -> PathBuf {
    env::var_os(variable).expect("cargo sets it").into()
}
