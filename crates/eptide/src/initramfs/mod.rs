//! The initramfs that this program makes: busybox, `init.sh`, a kernel's drivers, and a command.
//! The format's writer is in `packages::archive`.

pub(crate) mod modules;

use std::hash::{DefaultHasher, Hasher};
use std::io;
use std::path::{Path, PathBuf};

use packages::Package;
use packages::archive::{Archive, write_atomically};

use crate::cli::CommandArgs;
use modules::Modules;

/// The package with the guest's user space.
const BUSYBOX: &str = "busybox-static";
/// Drivers for the machine's devices.
const DRIVERS: [&str; 4] = ["virtio_mmio", "virtio_blk", "virtio_rng", "virtio_console"];

/// Why an initramfs cannot be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InitramfsError {
    /// A package is not to be had.
    #[error(transparent)]
    Package(#[from] packages::Error),
    /// A file cannot be read or made.
    #[error("{path}: {error}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the host said.
        error: io::Error,
    },
    /// A module that was asked for is not among the kernel's.
    #[error("module {name}: neither in {folder} nor built into the kernel")]
    NoModule {
        /// Its name.
        name: String,
        /// Where it was looked for.
        folder: PathBuf,
    },
}

/// Names the file that an operation failed on.
pub(crate) fn failed(path: &Path) -> impl FnOnce(io::Error) -> InitramfsError {
    let path = path.to_owned();
    move |error| InitramfsError::Io { path, error }
}

/// What goes into an initramfs.
#[derive(Debug, Default)]
pub(crate) struct Initramfs<'a> {
    /// The program that is the guest's user space.
    pub(crate) busybox: Vec<u8>,
    /// What to run instead of a shell.
    pub(crate) command: Option<Vec<u8>>,
    /// Nothing is shown but what the command shows.
    pub(crate) plain: bool,
    /// Folder with the kernel's modules.
    pub(crate) modules: Option<&'a Path>,
    /// Modules to load besides the drivers; each must load.
    pub(crate) wanted: &'a [String],
}

/// The file of `--exec` or `--script`.
pub(crate) fn command(args: &CommandArgs) -> Result<Option<Vec<u8>>, InitramfsError> {
    if let Some(line) = &args.exec {
        return Ok(Some(format!("#!/bin/sh\n{line}\n").into_bytes()));
    }
    let script = args.script.as_deref();
    let read = |path| std::fs::read(path).map_err(failed(path));
    script.map(read).transpose()
}

/// Busybox of an architecture (`i386`; `None` is the machine's own) from the cache or from its
/// package.
pub(crate) fn busybox(
    cache: &Path,
    architecture: Option<&str>,
    say: &mut dyn FnMut(&str),
) -> Result<Vec<u8>, InitramfsError> {
    let name = match architecture {
        Some(architecture) => format!("{BUSYBOX}:{architecture}"),
        None => BUSYBOX.to_owned(),
    };
    let package = Package::obtain(cache, &name, say)?;
    let program = package
        .file("bin", "busybox")
        .or_else(|_| package.file("usr/bin", "busybox"))?;
    std::fs::read(&program).map_err(failed(&program))
}

impl Initramfs<'_> {
    /// Writes the image into the cache folder; its file.
    pub(crate) fn store(&self, cache: &Path) -> Result<PathBuf, InitramfsError> {
        let image = self.build()?;
        let name = format!("initramfs-{:016x}.cpio", fingerprint(&image));
        store(cache, &name, &image)
    }

    fn build(&self) -> Result<Vec<u8>, InitramfsError> {
        let mut archive = Archive::new();
        archive
            .folder("bin")
            .file("bin/busybox", 0o755, &self.busybox)
            .file("init", 0o755, include_bytes!("init.sh"))
            .folder("dev")
            .character_device("dev/console", 5, 1)
            // For kernels without devtmpfs.
            .character_device("dev/null", 1, 3)
            .character_device("dev/ttyS1", 4, 65);
        if let Some(command) = &self.command {
            archive.file("command", 0o755, command);
        }
        if self.plain {
            archive.file("plain", 0o644, b"");
        }
        if let Some(folder) = self.modules {
            self.add_modules(&mut archive, folder)?;
        }
        Ok(archive.finish())
    }

    fn add_modules(&self, archive: &mut Archive, folder: &Path) -> Result<(), InitramfsError> {
        let found = Modules::find(folder).map_err(failed(folder))?;
        if let Some(name) = self.wanted.iter().find(|name| !found.has(name)) {
            return Err(InitramfsError::NoModule {
                name: name.clone(),
                folder: folder.into(),
            });
        }
        let wanted = self.wanted.iter().map(String::as_str);
        let order = found.load_order(DRIVERS.into_iter().chain(wanted.clone()));
        let order = order.map_err(failed(folder))?;
        let lines = |names: Vec<&str>| names.join("\n").into_bytes();
        let all = order.iter().map(|module| module.file.as_str()).collect();
        let wanted = wanted.filter_map(|name| found.file_name(name)).collect();
        archive
            .folder("modules")
            .file("modules/order", 0o644, &lines(all))
            .file("modules/wanted", 0o644, &lines(wanted));
        for module in &order {
            archive.file(&format!("modules/{}", module.file), 0o644, &module.content);
        }
        Ok(())
    }
}

/// Tells contents apart, so that machines started at the same time do not share an image.
fn fingerprint(content: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(content);
    hasher.finish()
}

/// Puts a file into the cache folder.
pub(crate) fn store(cache: &Path, name: &str, content: &[u8]) -> Result<PathBuf, InitramfsError> {
    let folder = cache.join("demo");
    let path = folder.join(name);
    std::fs::create_dir_all(&folder)
        .and_then(|()| write_atomically(&path, content))
        .map_err(failed(&path))?;
    Ok(path)
}
