//! `eptide demo`: a stock kernel boots, or a guest of the project's own where none can be had.

use std::path::{Path, PathBuf};

use packages::Package;

use super::run;
use crate::cli::{DemoArgs, Stats};
use crate::initramfs::{self, Initramfs, InitramfsError};
use crate::machine::outcome::Speaker;
use crate::machine::{MachineConfig, MachineError};

/// The package of the kernel unless another is named.
const KERNEL: &str = "linux-image-cloud-amd64";
/// The guest for machines without packages or network; `guests/hello.S` is its source.
const EMBEDDED_GUEST: &[u8] = include_bytes!("../hello.elf");

/// Why the demonstration cannot start.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DemoError {
    /// The guest's files are not to be had.
    #[error(transparent)]
    Initramfs(#[from] InitramfsError),
    /// The machine failed.
    #[error(transparent)]
    Machine(#[from] MachineError),
}

impl From<packages::Error> for DemoError {
    fn from(error: packages::Error) -> Self {
        Self::Initramfs(error.into())
    }
}

/// Finds or fetches a kernel, boots it and reports; the exit status.
pub(crate) fn run(args: &DemoArgs) -> Result<u8, DemoError> {
    let cache = packages::cache_folder()?;
    let quiet = args.machine.quiet;
    let say = |line: &str| {
        if !quiet {
            eprintln!("eptide: {line}");
        }
    };
    let guest = match guest(args, &cache, &mut { say }) {
        Ok(guest) => guest,
        Err(DemoError::Initramfs(InitramfsError::Package(error))) if !is_particular(args) => {
            say(&format!("no stock kernel: {error}"));
            say("running the guest that is part of this program instead");
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
        return Ok(0);
    }
    say(&format!("booting {}", guest.description));
    let speaker = args.command.speaker();
    let config = MachineConfig {
        // The embedded guest has no initramfs, and nothing to say.
        reports: guest.initrd.is_some(),
        ..args
            .machine
            .with_kernel(guest.kernel, guest.initrd, guest.command_line)
    };
    let stats = args.machine.stats.or((!quiet).then_some(Stats::Text));
    Ok(run::boot(&config, stats, speaker)?)
}

/// Whether something was asked for that the embedded guest cannot do.
fn is_particular(args: &DemoArgs) -> bool {
    args.kernel.is_some()
        || args.kernel_package.is_some()
        || args.command.speaker() == Speaker::Command
        || !args.modules.is_empty()
}

/// What to boot.
struct Guest {
    description: String,
    kernel: PathBuf,
    initrd: Option<PathBuf>,
    command_line: String,
}

fn guest(args: &DemoArgs, cache: &Path, say: &mut dyn FnMut(&str)) -> Result<Guest, DemoError> {
    let package = args.kernel_package.as_deref().unwrap_or(KERNEL);
    let architecture = package
        .split_once(':')
        .map(|(_, architecture)| architecture);
    // First what can be wrong without a network.
    let command = initramfs::command(&args.command)?;
    let busybox = initramfs::busybox(cache, architecture, say)?;
    let (kernel, modules, description) = match &args.kernel {
        Some(kernel) => (kernel.clone(), None, kernel.display().to_string()),
        None => {
            let package = Package::obtain(cache, package, say)?;
            let folder = module_folder(&package.root);
            let kernel = package.file("boot", "vmlinuz-")?;
            (kernel, Some(folder), package.version)
        }
    };
    let initramfs = Initramfs {
        busybox,
        command,
        plain: args.machine.quiet,
        modules: modules.as_deref(),
        wanted: &args.modules,
    };
    Ok(Guest {
        description,
        kernel,
        initrd: Some(initramfs.store(cache)?),
        command_line: command_line(args),
    })
}

fn command_line(args: &DemoArgs) -> String {
    let mut line = run::batch_word().to_owned();
    line.push_str(&args.machine.command_line(None));
    if let Some(words) = &args.append {
        // Of two words that say the same the kernel takes the last.
        line.push(' ');
        line.push_str(words);
    }
    line
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

fn embedded_guest(cache: &Path) -> Result<Guest, DemoError> {
    Ok(Guest {
        description: "the embedded guest".into(),
        kernel: initramfs::store(cache, "hello.elf", EMBEDDED_GUEST)?,
        initrd: None,
        command_line: String::new(),
    })
}
