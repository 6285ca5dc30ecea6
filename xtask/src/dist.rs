//! `cargo xtask dist`: a release archive, tried where it is unpacked.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Outcome;
use crate::check::cargo;

/// Files of the workspace that go along.
const DOCUMENTS: [&str; 5] = [
    "README.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "LICENSE-APACHE",
    "LICENSE-MIT",
];

/// Builds the archive and tries it.
pub(crate) fn run() -> Outcome {
    cargo(&["build", "--release", "-p", "eptide"], &[])?;
    let target = target_folder()?;
    let name = format!("eptide-{}-x86_64-linux", env!("CARGO_PKG_VERSION"));
    let dist = target.join("dist");
    let folder = dist.join(&name);
    let _ = fs::remove_dir_all(&folder);
    let bin = folder.join("bin");
    fs::create_dir_all(&bin).map_err(failed(&bin))?;
    copy(&target.join("release/eptide"), &bin.join("eptide"))?;
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    for document in DOCUMENTS {
        copy(&root.join(document), &folder.join(document))?;
    }
    call(
        Command::new(bin.join("eptide"))
            .arg("generate")
            .arg(folder.join("share")),
    )?;
    licences_of_dependencies(&folder.join("LICENSES-OF-DEPENDENCIES"))?;
    let archive = dist.join(format!("{name}.tar.gz"));
    let mut tar = Command::new("tar");
    tar.args(["--sort=name", "--owner=0", "--group=0", "-czf"]);
    call(tar.arg(&archive).arg("-C").arg(&dist).arg(&name))?;
    attempt(&archive, &name, &dist.join("a folder with spaces"))?;
    println!("{}", archive.display());
    Ok(())
}

/// Unpacks the archive and runs a program with Eptide from there, with nothing else of Eptide in
/// reach.
fn attempt(archive: &Path, name: &str, folder: &Path) -> Outcome {
    let _ = fs::remove_dir_all(folder);
    fs::create_dir_all(folder).map_err(failed(folder))?;
    call(
        Command::new("tar")
            .arg("-xzf")
            .arg(archive)
            .arg("-C")
            .arg(folder),
    )?;
    let program = folder.join(name).join("bin/eptide");
    let mut command = Command::new(&program);
    command.env_remove("EPTIDE_PRELOAD");
    command.env("EPTIDE_CACHE", folder.join("cache"));
    let script = "exec 3<>/dev/kvm && readlink /proc/self/fd/3";
    let output = command.args(["exec", "sh", "-c", script]).output();
    let output = output.map_err(failed(&program))?;
    let found = String::from_utf8_lossy(&output.stdout);
    if !found.starts_with("/memfd:kvm") {
        return Err(format!(
            "the archive's eptide exec does not work: {output:?}"
        ));
    }
    for page in ["share/man1/eptide-run.1", "share/completions/eptide.bash"] {
        let path = folder.join(name).join(page);
        fs::metadata(&path).map_err(failed(&path))?;
    }
    fs::remove_dir_all(folder).map_err(failed(folder))
}

/// Names and licences of what is linked into the program.
fn licences_of_dependencies(file: &Path) -> Outcome {
    let arguments = ["tree", "-p", "eptide", "-e", "normal", "--prefix", "none"];
    let mut command = Command::new("cargo");
    command.args(arguments).args(["-f", "{p}: {l}"]);
    let output = command.output().map_err(failed(file))?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    let text = String::from_utf8_lossy(&output.stdout);
    // A path of this machine, which Cargo shows for the workspace's own crates, is nobody's business.
    let mut lines: Vec<&str> = text
        .lines()
        .map(|line| line.trim_end_matches(" (*)"))
        .filter(|line| !line.is_empty() && !line.contains("(/"))
        .collect();
    lines.sort_unstable();
    lines.dedup();
    fs::write(file, lines.join("\n") + "\n").map_err(failed(file))
}

/// Where this program was built, and what it builds.
fn target_folder() -> Result<PathBuf, String> {
    let own = std::env::current_exe().map_err(|error| error.to_string())?;
    let folder = own.ancestors().nth(2);
    folder
        .map(Path::to_owned)
        .ok_or_else(|| "no target folder".into())
}

fn copy(from: &Path, to: &Path) -> Outcome {
    fs::copy(from, to).map(drop).map_err(failed(from))
}

fn call(command: &mut Command) -> Outcome {
    match command.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("{command:?}: {status}")),
        Err(error) => Err(format!("{command:?}: {error}")),
    }
}

fn failed(path: &Path) -> impl FnOnce(std::io::Error) -> String {
    let path = path.to_owned();
    move |error| format!("{}: {error}", path.display())
}
