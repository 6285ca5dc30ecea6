//! `eptide demo`: a stock kernel boots, or a guest of the project's own where none can be had.

use std::hash::{DefaultHasher, Hasher};
use std::io;
use std::path::{Path, PathBuf};

use packages::Package;
use packages::archive::{Archive, write_atomically};

use super::run;
use crate::cli::DemoArgs;
use crate::initramfs::modules::Modules;
use crate::machine::outcome::Outcome;
use crate::machine::{ConsoleKind, MachineError};
use crate::terminal;

/// The package with the guest's user space, of the kernel's architecture.
const BUSYBOX: &str = "busybox-static";
/// Drivers for the machine's devices.
const DRIVERS: [&str; 4] = ["virtio_mmio", "virtio_blk", "virtio_rng", "virtio_console"];
/// The guest for machines without packages or network; `guests/hello.S` is its source.
const EMBEDDED_GUEST: &[u8] = include_bytes!("../../../../guests/hello.elf");

/// Why the demonstration cannot start.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DemoError {
    /// A package is not to be had.
    #[error(transparent)]
    Package(#[from] packages::Error),
    /// A file in the cache folder cannot be made.
    #[error("{path}: {error}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the host said.
        error: io::Error,
    },
    /// The machine failed.
    #[error(transparent)]
    Machine(#[from] MachineError),
}

/// Finds or fetches a kernel, boots it and reports.
pub(crate) fn run(args: &DemoArgs) -> Result<Outcome, DemoError> {
    let cache = packages::cache_folder()?;
    let guest = match guest(args, &cache) {
        Ok(guest) => guest,
        Err(DemoError::Package(error)) if args.kernel.is_none() => {
            eprintln!("eptide: no stock kernel: {error}");
            eprintln!("eptide: running the guest that is part of this program instead");
            embedded_guest(&cache)?
        }
        Err(error) => return Err(error),
    };
    if args.prepare {
        println!("{}", guest.kernel.display());
        guest
            .initrd
            .iter()
            .for_each(|initrd| println!("{}", initrd.display()));
        return Ok(Outcome::PowerOff);
    }
    eprintln!("eptide: booting {}", guest.description);
    let config = args
        .machine
        .with_kernel(guest.kernel, guest.initrd, guest.command_line);
    let outcome = run::boot(&config, true)?;
    Ok(outcome)
}

/// What to boot.
struct Guest {
    description: String,
    kernel: PathBuf,
    initrd: Option<PathBuf>,
    command_line: String,
}

fn guest(args: &DemoArgs, cache: &Path) -> Result<Guest, DemoError> {
    let mut say = |line: &str| eprintln!("eptide: {line}");
    let architecture = args.kernel_package.split_once(':');
    let busybox = match (&args.kernel, architecture) {
        (None, Some((_, architecture))) => format!("{BUSYBOX}:{architecture}"),
        _ => BUSYBOX.to_owned(),
    };
    let busybox = Package::obtain(cache, &busybox, &mut say)?;
    let (kernel, modules, description) = match &args.kernel {
        Some(kernel) => (kernel.clone(), None, kernel.display().to_string()),
        None => {
            let package = Package::obtain(cache, &args.kernel_package, &mut say)?;
            let folder = module_folder(&package.root);
            (
                package.file("boot", "vmlinuz-")?,
                Some(folder),
                package.version,
            )
        }
    };
    let initrd = write_initramfs(cache, &busybox, modules.as_deref(), args)?;
    Ok(Guest {
        description,
        kernel,
        initrd: Some(initrd),
        command_line: command_line(args),
    })
}

fn command_line(args: &DemoArgs) -> String {
    let console = match args.machine.console {
        ConsoleKind::Serial => "console=ttyS0",
        ConsoleKind::Virtio => "console=hvc0",
    };
    let mut words = vec![console];
    if terminal::input() != terminal::Input::Terminal {
        words.push("eptide.batch");
    }
    words.extend(args.append.as_deref());
    words.join(" ")
}

/// Debian moves `/lib` below `/usr` in later releases.
fn module_folder(root: &Path) -> PathBuf {
    let old = root.join("lib/modules");
    if old.is_dir() {
        old
    } else {
        root.join("usr/lib/modules")
    }
}

fn write_initramfs(
    cache: &Path,
    busybox: &Package,
    modules: Option<&Path>,
    args: &DemoArgs,
) -> Result<PathBuf, DemoError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |error| DemoError::Io { path, error }
    };
    let program = busybox
        .file("bin", "busybox")
        .or_else(|_| busybox.file("usr/bin", "busybox"))?;
    let program = std::fs::read(&program).map_err(failed(&program))?;
    let mut archive = Archive::new();
    archive
        .folder("bin")
        .file("bin/busybox", 0o755, &program)
        .file("init", 0o755, include_bytes!("../initramfs/init.sh"))
        .folder("dev")
        .character_device("dev/console", 5, 1);
    if let Some(script) = &args.script {
        let content = std::fs::read(script).map_err(failed(script))?;
        archive.file("script", 0o755, &content);
    }
    if let Some(folder) = modules {
        let found = Modules::find(folder).map_err(failed(folder))?;
        let wanted = DRIVERS
            .into_iter()
            .chain(args.modules.iter().map(String::as_str));
        let order = found.load_order(wanted).map_err(failed(folder))?;
        archive.folder("modules");
        let names: Vec<&str> = order.iter().map(|module| module.file.as_str()).collect();
        archive.file("modules/order", 0o644, names.join("\n").as_bytes());
        for module in &order {
            archive.file(&format!("modules/{}", module.file), 0o644, &module.content);
        }
    }
    let image = archive.finish();
    store(
        cache,
        &format!("initramfs-{:016x}.cpio", fingerprint(&image)),
        &image,
    )
}

fn embedded_guest(cache: &Path) -> Result<Guest, DemoError> {
    Ok(Guest {
        description: "the embedded guest".into(),
        kernel: store(cache, "hello.elf", EMBEDDED_GUEST)?,
        initrd: None,
        command_line: String::new(),
    })
}

/// Tells contents apart, so that machines started at the same time do not share an image.
fn fingerprint(content: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(content);
    hasher.finish()
}

/// Puts a file into the cache folder.
fn store(cache: &Path, name: &str, content: &[u8]) -> Result<PathBuf, DemoError> {
    let folder = cache.join("demo");
    let path = folder.join(name);
    std::fs::create_dir_all(&folder)
        .and_then(|()| write_atomically(&path, content))
        .map_err(|error| DemoError::Io {
            path: path.clone(),
            error,
        })?;
    Ok(path)
}
