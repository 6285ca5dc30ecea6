//! What is run: a stock kernel, and the program of `guests/compare` as its init.

use std::fs;
use std::hash::{DefaultHasher, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;

use packages::Package;
use packages::archive::{Archive, write_atomically};

const KERNEL: &str = "linux-image-cloud-amd64";
const FLAGS: [&str; 4] = ["-O2", "-static", "-Wall", "-Wextra"];

/// Files to run.
#[derive(Debug)]
pub(super) struct Guest {
    pub(super) kernel: PathBuf,
    pub(super) initramfs: PathBuf,
}

/// The guest whose init is the program of `guests/compare`, and that program. Makes what is not in
/// the cache folder yet.
pub(super) fn prepare() -> Result<(Guest, PathBuf), String> {
    let cache = packages::cache_folder().map_err(|error| error.to_string())?;
    let program = program(&cache.join("compare"))?;
    let guest = Guest {
        kernel: kernel(&cache)?,
        initramfs: initramfs(&program)?,
    };
    Ok((guest, program))
}

pub(super) fn kernel(cache: &Path) -> Result<PathBuf, String> {
    let package = Package::obtain(cache, KERNEL, &mut |line: &str| eprintln!("{line}"))
        .map_err(|error| format!("{KERNEL}: {error}"))?;
    let kernel = package.file("boot", "vmlinuz-");
    kernel.map_err(|error| error.to_string())
}

/// A folder of the repository's guests.
pub(super) fn source(name: &str) -> PathBuf {
    let guests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../guests");
    guests.join(name)
}

/// The built program. Its name tells versions of the source apart, of which several may be about.
fn program(folder: &Path) -> Result<PathBuf, String> {
    let source = source("compare");
    let mut files: Vec<PathBuf> = fs::read_dir(&source)
        .map_err(|error| format!("{}: {error}", source.display()))?
        .flatten()
        .map(|entry| entry.path())
        .collect();
    files.sort();
    let mut hasher = DefaultHasher::new();
    FLAGS.iter().for_each(|flag| hasher.write(flag.as_bytes()));
    for file in &files {
        hasher.write(&read(file)?);
    }
    let program = folder.join(format!("program-{:016x}", hasher.finish()));
    if program.is_file() {
        return Ok(program);
    }
    fs::create_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    files.retain(|file| file.extension().is_some_and(|extension| extension == "c"));
    let made = program.with_extension(std::process::id().to_string());
    let status = Command::new("gcc")
        .args(FLAGS)
        .arg("-o")
        .arg(&made)
        .args(&files)
        .arg("-lm")
        .status()
        .map_err(|error| format!("gcc: {error} (apt-get install gcc libc6-dev)"))?;
    if !status.success() {
        return Err(format!("gcc: {status}"));
    }
    fs::rename(&made, &program).map_err(|error| format!("{}: {error}", program.display()))?;
    Ok(program)
}

/// An initramfs whose init is `program`, beside it.
fn initramfs(program: &Path) -> Result<PathBuf, String> {
    let path = program.with_extension("cpio");
    let mut archive = Archive::new();
    archive
        .file("init", 0o755, &read(program)?)
        .folder("dev")
        .character_device("dev/console", 5, 1);
    let written = write_atomically(&path, &archive.finish());
    written.map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(path)
}

pub(super) fn read(file: &Path) -> Result<Vec<u8>, String> {
    fs::read(file).map_err(|error| format!("{}: {error}", file.display()))
}
