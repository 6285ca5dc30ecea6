//! One file per subcommand; `library` is where `exec` finds what it preloads.

pub(crate) mod demo;
pub(crate) mod doctor;
pub(crate) mod exec;
pub(crate) mod generate;
mod library;
pub(crate) mod run;
