//! The command line: its words here, their values in `values`, what people bring along from other
//! virtual machines in `habits`.

mod habits;
mod values;

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::machine::kernel::Protocol;
use crate::machine::outcome::{Speaker, status_table};
use crate::machine::{ConsoleKind, DiskConfig, MachineConfig};
use values::{parse_disk, parse_size, parse_switch, parse_time};

/// The process's command line; ends the process where it is wrong or asks for help.
pub(crate) fn parse() -> Cli {
    let words: Vec<OsString> = std::env::args_os().collect();
    if let Some(hint) = habits::hint(&words) {
        use clap::CommandFactory;
        Cli::command()
            .error(clap::error::ErrorKind::UnknownArgument, hint)
            .exit();
    }
    Cli::parse_from(words)
}

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
    #[command(after_long_help = status_table())]
    Demo(DemoArgs),
    /// Say what this host offers, what guests will see and what limits apply
    Doctor,
    /// Write man pages and shell completions into a folder
    #[command(hide = true)]
    Generate(GenerateArgs),
    /// Run a program that uses KVM, with Eptide as its /dev/kvm
    ///
    /// Any dynamically linked 64-bit program, such as
    /// `eptide exec qemu-system-x86_64 -accel kvm …`. No /dev/kvm is needed, and none is used.
    Exec(ExecArgs),
    /// Boot a kernel of your own
    ///
    /// The terminal becomes the guest's console; Ctrl-A X leaves. With --exec or --script the guest
    /// runs one command, and the command's exit status is this program's.
    #[command(after_long_help = status_table())]
    Run(RunArgs),
}

/// Arguments of `generate`.
#[derive(Debug, Args)]
pub(crate) struct GenerateArgs {
    /// Where to
    pub(crate) folder: PathBuf,
}

/// Arguments of `exec`.
#[derive(Debug, Args)]
pub(crate) struct ExecArgs {
    /// Two-dimensional paging (on) or shadow paging (off) in its VMs
    #[arg(long, value_name = "on|off", value_parser = parse_switch)]
    pub(crate) ept: Option<bool>,
    /// What executes guest code in its VMs
    #[arg(long, value_name = "interpreter|translator")]
    pub(crate) engine: Option<kvm::Engine>,
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
    #[arg(long, value_name = "FILE", conflicts_with_all = ["exec", "script"])]
    pub(crate) initrd: Option<PathBuf>,
    /// Kernel command line instead of "console=ttyS0"; "panic=-1" is added unless it says panic=
    #[arg(long, value_name = "LINE", alias = "cmdline")]
    pub(crate) append: Option<String>,
    /// Folder with the kernel's modules (lib/modules/VERSION), for the initramfs of --exec and
    /// --script: drivers for the machine's devices are loaded from there
    #[arg(long, value_name = "FOLDER", requires = "command")]
    pub(crate) modules: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) command: CommandArgs,
    #[command(flatten)]
    pub(crate) machine: MachineArgs,
}

/// A command to run in the guest.
#[derive(Debug, Args)]
#[group(id = "command", multiple = false)]
pub(crate) struct CommandArgs {
    /// Run this command in the guest (by sh of busybox), then power off; its exit status is this
    /// program's
    #[arg(long, value_name = "COMMAND")]
    pub(crate) exec: Option<String>,
    /// Run this file in the guest, a shell script or a static program; as --exec
    #[arg(long, value_name = "FILE")]
    pub(crate) script: Option<PathBuf>,
}

impl CommandArgs {
    /// Whose the exit status is.
    pub(crate) fn speaker(&self) -> Speaker {
        match self.exec.is_some() || self.script.is_some() {
            true => Speaker::Command,
            false => Speaker::Machine,
        }
    }
}

/// Arguments of `demo`.
#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// Kernel to boot instead of a package's; its modules are not known then
    #[arg(long, value_name = "FILE", conflicts_with_all = ["kernel_package", "modules"])]
    pub(crate) kernel: Option<PathBuf>,
    /// Debian package to take the kernel and its modules from, such as linux-image-686-pae:i386
    /// [default: linux-image-cloud-amd64]
    #[arg(long, value_name = "NAME")]
    pub(crate) kernel_package: Option<String>,
    /// More words for the kernel command line
    #[arg(long, value_name = "WORDS", alias = "cmdline")]
    pub(crate) append: Option<String>,
    #[command(flatten)]
    pub(crate) command: CommandArgs,
    /// Load this kernel module too, or fail. May be given several times
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
    /// Guest memory: 512M, 1.5G, 1GiB; a number alone is MiB
    #[arg(short, long, value_name = "SIZE", default_value = "512M", value_parser = parse_size,
        alias = "mem")]
    pub(crate) memory: u64,
    /// Number of processors
    #[arg(long, value_name = "N", default_value_t = 1, alias = "smp")]
    pub(crate) cpus: u32,
    /// Raw disk image; append ",readonly" to protect it. May be given several times
    #[arg(long = "disk", value_name = "FILE[,readonly]", value_parser = parse_disk,
        alias = "drive")]
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
    /// What executes guest code
    #[arg(long, value_name = "interpreter|translator")]
    pub(crate) engine: Option<kvm::Engine>,
    /// End the guest after this time, such as 90s, 5m or 1h
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    pub(crate) timeout: Option<Duration>,
    /// Print what happened at the end, on standard error
    #[arg(long, value_enum, value_name = "FORM", num_args = 0..=1, require_equals = true,
        default_missing_value = "text")]
    pub(crate) stats: Option<Stats>,
    /// Say nothing but errors, and have the kernel say little
    #[arg(short, long)]
    pub(crate) quiet: bool,
}

/// How the report looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Stats {
    /// For people.
    Text,
    /// One JSON object on one line.
    Json,
}

impl MachineArgs {
    /// A kernel command line: `words`, or what shows a console. A kernel that panics is to end,
    /// so that whoever started it learns of it.
    pub(crate) fn command_line(&self, words: Option<&str>) -> String {
        let console = match self.console {
            ConsoleKind::Serial => "console=ttyS0",
            ConsoleKind::Virtio => "console=hvc0",
        };
        let words = words.unwrap_or(console);
        let mut line = String::new();
        // In front, because what stands behind "--" is the first program's.
        if !words.split(' ').any(|word| word.starts_with("panic=")) {
            line.push_str("panic=-1 ");
        }
        if self.quiet && !words.split(' ').any(|word| word.starts_with("loglevel=")) {
            line.push_str("quiet ");
        }
        line.push_str(words);
        line
    }

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
            engine: self.engine,
            timeout: self.timeout,
            reports: false,
            quiet: self.quiet,
        }
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
    fn run_takes_what_its_help_says() {
        let line = "eptide run --kernel k --disk a --disk b,readonly --ept=off --cpus 4 --stats";
        let cli = Cli::try_parse_from(line.split(' ')).unwrap();
        let Command::Run(run) = cli.command else {
            panic!("not run")
        };
        assert_eq!((run.machine.cpus, run.machine.ept), (4, Some(false)));
        assert_eq!(run.machine.disks.len(), 2);
        assert_eq!(run.machine.stats, Some(Stats::Text));
        assert_eq!(run.command.speaker(), Speaker::Machine);
    }

    fn run(line: &str) -> RunArgs {
        let words = format!("eptide run --kernel k {line}");
        match Cli::try_parse_from(words.split_whitespace())
            .unwrap()
            .command
        {
            Command::Run(run) => run,
            _ => panic!("not run"),
        }
    }

    #[test]
    fn other_words_for_the_same_are_known() {
        let args = run("-m 512 --smp 2 --cmdline x --drive a,ro --stats=json -q --timeout 1m");
        let machine = &args.machine;
        assert_eq!((machine.memory, machine.cpus), (512 << 20, 2));
        assert_eq!(args.append.as_deref(), Some("x"));
        assert!(machine.disks[0].read_only && machine.quiet);
        assert_eq!(machine.stats, Some(Stats::Json));
        assert_eq!(machine.timeout, Some(Duration::from_secs(60)));
    }

    #[test]
    fn a_kernel_that_panics_ends_unless_told_otherwise() {
        let line = |line: &str, words| run(line).machine.command_line(words);
        assert_eq!(line("", None), "panic=-1 console=ttyS0");
        assert_eq!(line("--console hvc0", None), "panic=-1 console=hvc0");
        assert_eq!(line("", Some("a -- b")), "panic=-1 a -- b");
        assert_eq!(line("", Some("a panic=5")), "a panic=5");
        assert_eq!(line("-q", Some("a")), "panic=-1 quiet a");
        assert_eq!(line("-q", Some("loglevel=7")), "panic=-1 loglevel=7");
    }

    #[test]
    fn a_command_excludes_another_and_an_initramfs() {
        for line in ["--exec a --script b", "--exec a --initrd i", "--modules m"] {
            let words = format!("eptide run --kernel k {line}");
            assert!(Cli::try_parse_from(words.split(' ')).is_err(), "{line}");
        }
        assert_eq!(
            run("--exec true --modules m").command.speaker(),
            Speaker::Command
        );
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
