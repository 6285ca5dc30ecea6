//! `eptide exec`: another program, with Eptide as its `/dev/kvm`.
//!
//! The program is replaced by the one named, which the dynamic loader gives the preload library to.
//! So its process is this one: its terminal, descriptors and exit status are its own.

use std::convert::Infallible;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use elf::ElfStream;
use elf::endian::AnyEndian;
use thiserror::Error;

use super::library::{self, LibraryError};
use crate::cli::ExecArgs;

/// Why a program cannot run.
#[derive(Debug, Error)]
pub(crate) enum ExecError {
    #[error("{0}: not found in PATH")]
    NotFound(String),
    #[error("{}: {error}", path.display())]
    Unreadable { path: PathBuf, error: io::Error },
    #[error("{}: statically linked, and so out of reach of a preloaded library", .0.display())]
    Static(PathBuf),
    #[error("{}: for another architecture, or 32-bit; this is for 64-bit x86 programs", .0.display())]
    Foreign(PathBuf),
    #[error("{}: changes its user or group when it starts, and then nothing is preloaded", .0.display())]
    Privileged(PathBuf),
    #[error(transparent)]
    Library(#[from] LibraryError),
    #[error("{}: {error}", path.display())]
    NotStarted { path: PathBuf, error: io::Error },
}

/// Becomes the program; returns only if that fails.
pub(crate) fn run(args: &ExecArgs) -> Result<Infallible, ExecError> {
    let (name, arguments) = args.split();
    let program = find(name)?;
    check(&program)?;
    let mut command = Command::new(&program);
    command.arg0(name).args(arguments);
    command.env("LD_PRELOAD", library::preload_list()?);
    if let Some(ept) = args.ept {
        command.env("EPTIDE_EPT", if ept { "on" } else { "off" });
    }
    if let Some(engine) = args.engine {
        command.env("EPTIDE_ENGINE", engine.to_string());
    }
    let error = command.exec();
    Err(ExecError::NotStarted {
        path: program,
        error,
    })
}

/// The file of a program, as a shell finds it.
fn find(program: &OsStr) -> Result<PathBuf, ExecError> {
    if program.as_bytes().contains(&b'/') {
        return Ok(program.into());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let is_program = |file: &PathBuf| {
        let metadata = file.metadata();
        metadata.is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
    };
    std::env::split_paths(&path)
        .map(|folder| folder.join(program))
        .find(is_program)
        .ok_or_else(|| ExecError::NotFound(program.to_string_lossy().into_owned()))
}

/// Refuses a program that the library would not be loaded into. Scripts pass: what they start is
/// not known.
fn check(program: &Path) -> Result<(), ExecError> {
    let unreadable = |error| ExecError::Unreadable {
        path: program.into(),
        error,
    };
    let mut file = File::open(program).map_err(unreadable)?;
    let mode = file.metadata().map_err(unreadable)?.permissions().mode();
    if mode & 0o6000 != 0 {
        return Err(ExecError::Privileged(program.into()));
    }
    let mut magic = [0; 4];
    if file.read_exact(&mut magic).is_err() || magic != elf::abi::ELFMAGIC {
        return Ok(());
    }
    let Ok(elf) = ElfStream::<AnyEndian, _>::open_stream(file) else {
        return Ok(());
    };
    if elf.ehdr.e_machine != elf::abi::EM_X86_64 || elf.ehdr.class != elf::file::Class::ELF64 {
        return Err(ExecError::Foreign(program.into()));
    }
    let is_dynamic = elf
        .segments()
        .iter()
        .any(|segment| segment.p_type == elf::abi::PT_INTERP);
    if is_dynamic {
        Ok(())
    } else {
        Err(ExecError::Static(program.into()))
    }
}
