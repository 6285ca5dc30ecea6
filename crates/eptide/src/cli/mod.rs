//! The command line.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::machine::kernel::Protocol;
use crate::machine::{ConsoleKind, DiskConfig, MachineConfig};

/// KVM without the hardware.
#[derive(Debug, Parser)]
#[command(name = "eptide", version, about)]
pub(crate) struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Subcommands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Boot a stock kernel and get a shell in it
    ///
    /// Takes Debian's cloud kernel and busybox from the cache folder, or fetches their packages
    /// with apt-get (no root needed). Where that is not possible, a small guest that is part of
    /// this program runs instead. At power-off a report says what happened.
    Demo(DemoArgs),
    /// Say what this host offers, what guests will see and what limits apply
    Doctor,
    /// Run a program that uses KVM, with Eptide as its /dev/kvm
    ///
    /// Any dynamically linked 64-bit program, such as
    /// `eptide exec qemu-system-x86_64 -accel kvm …`. No /dev/kvm is needed, and none is used.
    Exec(ExecArgs),
    /// Boot a kernel of your own
    ///
    /// The terminal becomes the guest's console; Ctrl-A X leaves. The exit status is 0 after a
    /// power-off (or Ctrl-A X), 3 after a reset, 4 after a triple fault, 1 after an error and 128
    /// plus its number after a signal.
    Run(RunArgs),
}

/// Arguments of `exec`.
#[derive(Debug, Args)]
pub(crate) struct ExecArgs {
    /// Two-dimensional paging (on) or shadow paging (off) in its VMs
    #[arg(long, value_name = "on|off", value_parser = parse_switch)]
    pub(crate) ept: Option<bool>,
    /// The program and its arguments: everything from here on is the program's
    #[arg(trailing_var_arg = true, required = true, value_names = ["PROGRAM", "ARGUMENTS"])]
    pub(crate) command: Vec<OsString>,
}

impl ExecArgs {
    /// The program's name and its arguments.
    pub(crate) fn split(&self) -> (&OsStr, &[OsString]) {
        match self.command.split_first() {
            Some((name, arguments)) => (name, arguments),
            None => (OsStr::new(""), &[]),
        }
    }
}

/// Arguments of `run`.
#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// Kernel: a bzImage (vmlinuz) or an ELF file (vmlinux)
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: PathBuf,
    /// Initramfs
    #[arg(long, value_name = "FILE")]
    pub(crate) initrd: Option<PathBuf>,
    /// Kernel command line, whole
    #[arg(long, value_name = "LINE", default_value = "console=ttyS0")]
    pub(crate) append: String,
    #[command(flatten)]
    pub(crate) machine: MachineArgs,
}

/// Arguments of `demo`.
#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// Kernel to boot instead of a package's; its modules are not known then
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: Option<PathBuf>,
    /// Debian package to take the kernel and its modules from, such as linux-image-686-pae:i386
    #[arg(long, value_name = "NAME", default_value = "linux-image-cloud-amd64")]
    pub(crate) kernel_package: String,
    /// More words for the kernel command line
    #[arg(long, value_name = "WORDS")]
    pub(crate) append: Option<String>,
    /// Run this shell script in the guest instead of a shell, then power off
    #[arg(long, value_name = "FILE")]
    pub(crate) script: Option<PathBuf>,
    /// Load this kernel module too. May be given several times
    #[arg(long = "module", value_name = "NAME")]
    pub(crate) modules: Vec<String>,
    /// Boot nothing; print where the kernel and the initramfs are
    #[arg(long)]
    pub(crate) prepare: bool,
    #[command(flatten)]
    pub(crate) machine: MachineArgs,
}

/// Arguments that describe a machine.
#[derive(Debug, Args)]
pub(crate) struct MachineArgs {
    /// Guest memory; suffixes K, M, G
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = parse_size)]
    pub(crate) memory: u64,
    /// Number of processors
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) cpus: u32,
    /// Raw disk image; append ",readonly" to protect it. May be given several times
    #[arg(long = "disk", value_name = "FILE[,readonly]", value_parser = parse_disk)]
    pub(crate) disks: Vec<DiskConfig>,
    /// Boot protocol for an ELF kernel
    #[arg(long, value_enum, default_value_t = Protocol::Auto)]
    pub(crate) protocol: Protocol,
    /// Device that the terminal is attached to
    #[arg(long, value_enum, default_value_t = ConsoleKind::Serial)]
    pub(crate) console: ConsoleKind,
    /// Two-dimensional paging (on) or shadow paging (off)
    #[arg(long, value_name = "on|off", value_parser = parse_switch)]
    pub(crate) ept: Option<bool>,
    /// Print what happened at the end
    #[arg(long)]
    pub(crate) stats: bool,
}

impl MachineArgs {
    /// The machine these arguments describe, with a kernel in it.
    pub(crate) fn with_kernel(
        &self,
        kernel: PathBuf,
        initrd: Option<PathBuf>,
        command_line: String,
    ) -> MachineConfig {
        MachineConfig {
            kernel,
            initrd,
            command_line,
            memory: self.memory,
            cpus: self.cpus,
            disks: self.disks.clone(),
            protocol: self.protocol,
            console: self.console,
            ept: self.ept,
        }
    }
}

fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'K' | b'k') => (&text[..text.len() - 1], 10),
        Some(b'M' | b'm') => (&text[..text.len() - 1], 20),
        Some(b'G' | b'g') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let number: u64 = digits
        .parse()
        .map_err(|_| format!("{text:?} is not a size such as 512M"))?;
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| format!("{text} is more than can be addressed"))
}

fn parse_disk(text: &str) -> Result<DiskConfig, String> {
    let (path, read_only) = match text.strip_suffix(",readonly") {
        Some(path) => (path, true),
        None => (text, false),
    };
    match path {
        "" => Err("a disk needs a file".into()),
        path => Ok(DiskConfig {
            path: path.into(),
            read_only,
        }),
    }
}

fn parse_switch(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        other => Err(format!("{other:?} is neither \"on\" nor \"off\"")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes_have_suffixes() {
        assert_eq!(parse_size("512M"), Ok(512 << 20));
        assert_eq!(parse_size("2g"), Ok(2 << 30));
        assert_eq!(parse_size("4096"), Ok(4096));
        assert!(parse_size("lots").is_err());
        assert!(parse_size("99999999999G").is_err());
        assert!(parse_size("").is_err());
    }

    #[test]
    fn disks_may_be_read_only() {
        let disk = |text| parse_disk(text).unwrap();
        assert!(disk("a.img,readonly").read_only);
        assert_eq!(disk("b,c.img").path, PathBuf::from("b,c.img"));
        assert!(parse_disk(",readonly").is_err());
    }

    #[test]
    fn run_takes_what_its_help_says() {
        let line = "eptide run --kernel k --disk a --disk b,readonly --ept=off --cpus 4 --stats";
        let cli = Cli::try_parse_from(line.split(' ')).unwrap();
        let Command::Run(run) = cli.command else {
            panic!("not run")
        };
        assert_eq!((run.machine.cpus, run.machine.ept), (4, Some(false)));
        assert_eq!(run.machine.disks.len(), 2);
        assert_eq!(run.append, "console=ttyS0");
    }
}

#[cfg(test)]
mod exec_tests {
    use super::*;

    /// What `exec` is given, and what it takes of that for its own and for the program's.
    fn taken(words: &[&str]) -> (Option<bool>, Vec<String>) {
        let all = ["eptide", "exec"].iter().chain(words);
        let Command::Exec(args) = Cli::try_parse_from(all).unwrap().command else {
            panic!("{words:?}");
        };
        let words = args
            .command
            .iter()
            .map(|word| word.to_str().unwrap().to_owned());
        (args.ept, words.collect())
    }

    #[test]
    fn everything_behind_the_program_is_the_programs() {
        for words in [
            &["program", "--help"][..],
            &["program", "-h", "-V", "--version"],
            &["program", "x", "--ept", "off"],
            &["program", "--ept=off", "--unknown", "-m", "64"],
            &["program", "--", "--help"],
            &["program", "", "-"],
        ] {
            assert_eq!(
                taken(words),
                (None, words.iter().map(|w| (*w).into()).collect())
            );
        }
        let (ept, command) = taken(&["--ept", "off", "program", "--ept", "on"]);
        assert_eq!((ept, command.len()), (Some(false), 3));
        assert_eq!(
            taken(&["--", "program", "--", "x"]).1,
            ["program", "--", "x"]
        );
    }

    #[test]
    fn in_front_of_it_stand_execs_own() {
        for (words, kind) in [
            (&["--help"][..], clap::error::ErrorKind::DisplayHelp),
            (
                &["--bogus", "program"],
                clap::error::ErrorKind::UnknownArgument,
            ),
            (&[], clap::error::ErrorKind::MissingRequiredArgument),
        ] {
            let all = ["eptide", "exec"].iter().chain(words);
            assert_eq!(
                Cli::try_parse_from(all).unwrap_err().kind(),
                kind,
                "{words:?}"
            );
        }
    }
}
