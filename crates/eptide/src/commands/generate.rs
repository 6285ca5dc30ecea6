//! `eptide generate`: man pages and shell completions, from the command line's own description.

use std::fs;
use std::io;
use std::path::Path;

use clap::CommandFactory;
use clap::ValueEnum as _;
use clap_complete::Shell;

use crate::cli::{Cli, GenerateArgs};

/// Writes `man1/*.1` and `completions/*`.
pub(crate) fn run(args: &GenerateArgs) -> io::Result<()> {
    let command = Cli::command();
    let pages = args.folder.join("man1");
    fs::create_dir_all(&pages)?;
    clap_mangen::generate_to(command.clone(), &pages)?;
    completions(command, &args.folder.join("completions"))
}

fn completions(mut command: clap::Command, folder: &Path) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    for shell in Shell::value_variants() {
        clap_complete::generate_to(*shell, &mut command, "eptide", folder)?;
    }
    Ok(())
}
