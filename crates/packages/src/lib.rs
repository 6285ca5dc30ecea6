//! Guest material (stock kernels, busybox, firmware) from Debian packages, without root.
//!
//! `apt-get download` and `dpkg-deb` do the work and check the signatures; this crate gives them a
//! place of their own to work in and remembers what is already there. The machine's package lists
//! are used where they are good; where they are missing or stale, lists are fetched into a state
//! folder inside the cache. Nothing on the machine is installed or changed.
//!
//! A package of another architecture (`linux-image-686-pae:i386`) always comes through private
//! lists: apt plays a machine of that architecture there, so that the machine's own need not know
//! of it.
//!
//! ```text
//! $EPTIDE_CACHE | $XDG_CACHE_HOME/eptide | ~/.cache/eptide | /tmp/eptide-<user> without a home
//!   packages/<name asked for>/         unpacked package
//!   packages/<name asked for>/.package name and version of the package behind it
//!   apt/, apt-<architecture>/          private lists, made only when needed
//! ```

#![forbid(unsafe_code)]

pub mod archive;

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Why a package cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No cache folder can be named.
    #[error(
        "no cache folder: set EPTIDE_CACHE, XDG_CACHE_HOME or HOME to a place that can be written"
    )]
    NoCache,
    /// A file operation failed.
    #[error("{path}: {error}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the host said.
        error: io::Error,
    },
    /// A tool is not there.
    #[error("{tool} cannot be run ({error}); Debian packages need a Debian-like machine")]
    Tool {
        /// The program.
        tool: &'static str,
        /// What the host said.
        error: io::Error,
    },
    /// A tool failed.
    #[error("{command} failed: {message}")]
    Failed {
        /// The command line.
        command: String,
        /// The end of what it printed.
        message: String,
    },
    /// The package does not look as expected.
    #[error("package {package} holds no {what}")]
    Missing {
        /// The package.
        package: String,
        /// What was looked for.
        what: String,
    },
}

/// The folder for everything that can be fetched or made again. A user without a home that can be
/// written gets a folder of their own among the temporary files.
pub fn cache_folder() -> Result<PathBuf, Error> {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    if let Some(folder) = variable("EPTIDE_CACHE") {
        return Ok(folder.into());
    }
    if let Some(folder) = variable("XDG_CACHE_HOME") {
        return Ok(Path::new(&folder).join("eptide"));
    }
    let home = variable("HOME").map(|home| Path::new(&home).join(".cache/eptide"));
    match home {
        Some(folder) if fs::create_dir_all(&folder).is_ok() => Ok(folder),
        _ => temporary_folder(),
    }
}

/// `/tmp/eptide-<user ID>`, which must be this user's and nobody else's.
pub fn temporary_folder() -> Result<PathBuf, Error> {
    let user = fs::metadata("/proc/self")
        .map_err(|_| Error::NoCache)?
        .uid();
    let folder = std::env::temp_dir().join(format!("eptide-{user}"));
    // It may be there already; whose it is decides.
    let _ = fs::DirBuilder::new().mode(0o700).create(&folder);
    match fs::symlink_metadata(&folder) {
        Ok(found) if found.is_dir() && found.uid() == user && found.mode() & 0o022 == 0 => {
            Ok(folder)
        }
        _ => Err(Error::NoCache),
    }
}

/// An unpacked package.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Package {
    /// The name it was asked for by.
    pub name: String,
    /// Folder it is unpacked in.
    pub root: PathBuf,
    /// Name and version of the package behind a metapackage.
    pub version: String,
}

impl Package {
    /// A package that is in `cache` already.
    pub fn cached(cache: &Path, name: &str) -> Option<Self> {
        let root = cache.join("packages").join(name);
        let version = fs::read_to_string(root.join(".package"))
            .ok()?
            .trim()
            .to_owned();
        Some(Self {
            name: name.into(),
            root,
            version,
        })
    }

    /// Takes a package from `cache` or fetches it. `say` is told what happens, a line at a time.
    pub fn obtain(cache: &Path, name: &str, say: &mut dyn FnMut(&str)) -> Result<Self, Error> {
        match Self::cached(cache, name) {
            Some(package) => Ok(package),
            None => Self::fetch(cache, name, say),
        }
    }

    /// Fetches the current version of a package, whether or not the cache has one.
    pub fn fetch(cache: &Path, name: &str, say: &mut dyn FnMut(&str)) -> Result<Self, Error> {
        let (plain, architecture) = split_architecture(name);
        if architecture.is_none() {
            let system = Apt {
                options: Vec::new(),
            };
            match Self::fetch_with(&system, cache, name, plain, say) {
                Ok(package) => return Ok(package),
                Err(error @ Error::Tool { .. }) => return Err(error),
                Err(error) => say(&format!(
                    "the machine's package lists do not serve ({error})"
                )),
            }
        }
        let private = Apt::private(cache, architecture)?;
        if architecture.is_some() {
            // Lists of an earlier fetch may still serve.
            if let Ok(package) = Self::fetch_with(&private, cache, name, plain, say) {
                return Ok(package);
            }
        }
        say("fetching package lists into the cache folder");
        // One bad list of many fails the update as a whole; what counts is whether the rest serve.
        let updated = private.run("apt-get", ["update"], cache);
        match (Self::fetch_with(&private, cache, name, plain, say), updated) {
            (Ok(package), _) => Ok(package),
            (Err(_), Err(update)) => Err(update),
            (Err(error), Ok(_)) => Err(error),
        }
    }

    fn fetch_with(
        apt: &Apt,
        cache: &Path,
        name: &str,
        plain: &str,
        say: &mut dyn FnMut(&str),
    ) -> Result<Self, Error> {
        let real = apt.real_package(plain, cache)?;
        let packages = cache.join("packages");
        let work = packages.join(format!(".{name}.{}", std::process::id()));
        let cleaned = Scratch::create(&work)?;
        say(&format!("fetching {real}{}", apt.size(&real, cache)));
        apt.run("apt-get", ["download", &real], &work)?;
        let archive = find(&work, |file| file.ends_with(".deb")).ok_or_else(|| Error::Missing {
            package: real.clone(),
            what: "archive".into(),
        })?;
        let unpacked = work.join("root");
        let arguments = [OsStr::new("-x"), archive.as_os_str(), unpacked.as_os_str()];
        apt.run("dpkg-deb", arguments, &work)?;

        let stem = archive
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        // apt writes a version's colon as %3a in file names.
        let version = stem.replace("%3a", ":").replacen('_', " ", 1);
        write(&unpacked.join(".package"), &format!("{version}\n"))?;
        let root = packages.join(name);
        remove(&root)?;
        fs::rename(&unpacked, &root).map_err(io_error(&root))?;
        drop(cleaned);
        Ok(Self {
            name: name.into(),
            root,
            version,
        })
    }

    /// The only file in `folder` of the package whose name starts with `prefix`.
    pub fn file(&self, folder: &str, prefix: &str) -> Result<PathBuf, Error> {
        let found = find(&self.root.join(folder), |file| file.starts_with(prefix));
        found.ok_or_else(|| Error::Missing {
            package: self.version.clone(),
            what: format!("{folder}/{prefix}*"),
        })
    }
}

/// A package's own name and the architecture asked for (`busybox-static:i386`).
fn split_architecture(name: &str) -> (&str, Option<&str>) {
    match name.split_once(':') {
        Some((plain, architecture)) => (plain, Some(architecture)),
        None => (name, None),
    }
}

/// How apt is called.
struct Apt {
    options: Vec<String>,
}

impl Apt {
    /// Lists and archives inside the cache; sources and keys are the machine's. With an
    /// architecture, apt takes itself to be on an empty machine of it.
    fn private(cache: &Path, architecture: Option<&str>) -> Result<Self, Error> {
        let state = cache.join(match architecture {
            None => "apt".into(),
            Some(architecture) => format!("apt-{architecture}"),
        });
        for folder in ["state/lists/partial", "cache/archives/partial"] {
            let folder = state.join(folder);
            fs::create_dir_all(&folder).map_err(io_error(&folder))?;
        }
        let state = state.display();
        let mut options = vec![
            format!("Dir::State={state}/state"),
            format!("Dir::State::lists={state}/state/lists"),
            format!("Dir::Cache={state}/cache"),
        ];
        match architecture {
            None => options.push("Dir::State::status=/var/lib/dpkg/status".into()),
            Some(architecture) => options.extend([
                "Dir::State::status=/dev/null".into(),
                format!("APT::Architecture={architecture}"),
                format!("APT::Architectures={architecture}"),
            ]),
        }
        Ok(Self { options })
    }

    /// Runs a tool in `folder`; its standard output comes back, its errors go into the error.
    fn run<A: AsRef<OsStr>>(
        &self,
        tool: &'static str,
        arguments: impl IntoIterator<Item = A>,
        folder: &Path,
    ) -> Result<String, Error> {
        let mut command = Command::new(tool);
        if tool != "dpkg-deb" {
            command.arg("-q");
            // Run by root, apt would change to a user who cannot write into the cache.
            for option in [&"APT::Sandbox::User=root".to_owned()]
                .into_iter()
                .chain(&self.options)
            {
                command.arg("-o").arg(option);
            }
        }
        let arguments: Vec<A> = arguments.into_iter().collect();
        command
            .args(&arguments)
            .current_dir(folder)
            .env("LC_ALL", "C")
            .stdin(Stdio::null());
        let output = command
            .output()
            .map_err(|error| Error::Tool { tool, error })?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let text = String::from_utf8_lossy(&output.stderr);
        let lines: Vec<&str> = text.lines().filter(|line| line.starts_with("E:")).collect();
        Err(Error::Failed {
            command: arguments.iter().fold(tool.to_owned(), |line, argument| {
                format!("{line} {}", argument.as_ref().to_string_lossy())
            }),
            message: if lines.is_empty() {
                text.trim().into()
            } else {
                lines.join("; ")
            },
        })
    }

    /// The package a metapackage such as `linux-image-cloud-amd64` stands for, or `name` itself.
    fn real_package(&self, name: &str, folder: &Path) -> Result<String, Error> {
        fs::create_dir_all(folder).map_err(io_error(folder))?;
        if !name.starts_with("linux-image-") {
            return Ok(name.into());
        }
        let text = self.run("apt-cache", ["depends", name], folder)?;
        let kernel = text
            .lines()
            .find_map(|line| line.trim().strip_prefix("Depends: linux-image-"))
            .map(|rest| rest.split(':').next().unwrap_or(rest));
        Ok(match kernel {
            None => name.into(),
            Some(rest) => format!("linux-image-{rest}"),
        })
    }

    /// " (25 MB)" where apt knows.
    fn size(&self, name: &str, folder: &Path) -> String {
        let text = self.run("apt-cache", ["show", "--no-all-versions", name], folder);
        let bytes: Option<u64> = text.ok().and_then(|text| {
            text.lines()
                .find_map(|line| line.strip_prefix("Size: "))?
                .trim()
                .parse()
                .ok()
        });
        bytes.map_or_else(String::new, |bytes| {
            format!(" ({} MB)", bytes.div_ceil(1_000_000))
        })
    }
}

/// A folder that goes away when this does.
struct Scratch(PathBuf);

impl Scratch {
    fn create(path: &Path) -> Result<Self, Error> {
        remove(path)?;
        fs::create_dir_all(path).map_err(io_error(path))?;
        Ok(Self(path.into()))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What is left behind costs disk space and nothing else.
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> Error + '_ {
    move |error| Error::Io {
        path: path.into(),
        error,
    }
}

fn write(path: &Path, text: &str) -> Result<(), Error> {
    fs::write(path, text).map_err(io_error(path))
}

fn remove(folder: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error(folder)(error)),
        _ => Ok(()),
    }
}

/// The first entry of `folder` by name that `wanted` accepts.
fn find(folder: &Path, wanted: impl Fn(&str) -> bool) -> Option<PathBuf> {
    let entries = fs::read_dir(folder).ok()?.flatten();
    entries
        .filter(|entry| entry.file_name().to_str().is_some_and(&wanted))
        .map(|entry| entry.path())
        .min()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> Scratch {
        let folder = std::env::temp_dir().join(format!("eptide-{name}-{}", std::process::id()));
        Scratch::create(&folder).unwrap()
    }

    #[test]
    fn a_cached_package_is_found_with_its_version() {
        let cache = scratch("cached");
        let root = cache.0.join("packages/busybox-static");
        fs::create_dir_all(root.join("bin")).unwrap();
        fs::write(root.join("bin/busybox"), "").unwrap();
        assert_eq!(Package::cached(&cache.0, "busybox-static"), None);
        fs::write(root.join(".package"), "busybox-static 1:1.35_amd64\n").unwrap();
        let package = Package::cached(&cache.0, "busybox-static").unwrap();
        assert_eq!(package.version, "busybox-static 1:1.35_amd64");
        assert_eq!(
            package.file("bin", "busy").unwrap(),
            root.join("bin/busybox")
        );
        let missing = package.file("boot", "vmlinuz-").unwrap_err();
        assert!(missing.to_string().contains("boot/vmlinuz-*"), "{missing}");
    }

    #[test]
    fn a_name_may_hold_an_architecture() {
        assert_eq!(split_architecture("busybox"), ("busybox", None));
        let foreign = split_architecture("busybox:i386");
        assert_eq!(foreign, ("busybox", Some("i386")));
        let cache = scratch("foreign");
        let apt = Apt::private(&cache.0, Some("i386")).unwrap();
        assert!(apt.options.contains(&"APT::Architecture=i386".to_owned()));
        assert!(cache.0.join("apt-i386/state/lists/partial").is_dir());
    }

    #[test]
    fn scratch_folders_leave_nothing_behind() {
        let scratch = scratch("scratch");
        let path = scratch.0.clone();
        fs::write(path.join("file"), "").unwrap();
        drop(scratch);
        assert!(!path.exists());
    }
}
