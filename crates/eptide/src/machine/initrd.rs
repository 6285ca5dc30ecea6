//! The initramfs: placed as high as the kernel can take it, clear of the kernel itself.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use vm_memory::{Bytes, GuestAddress};

use super::kernel::LoadedKernel;
use super::memory::{self, GuestMemory};

/// Why an initramfs cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InitrdError {
    /// The file cannot be read.
    #[error("initrd {path}: {error}")]
    Open {
        /// The file.
        path: PathBuf,
        /// What the host said.
        error: io::Error,
    },
    /// It does not fit above the kernel.
    #[error(
        "initrd {path}: {size} bytes do not fit between the kernel's end at {from:#x} and \
         {to:#x}; give the guest more --memory or use a smaller initrd"
    )]
    DoesNotFit {
        /// The file.
        path: PathBuf,
        /// Its size.
        size: u64,
        /// Lowest address it may have.
        from: u64,
        /// End of where it may lie.
        to: u64,
    },
}

/// An initramfs in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LoadedInitrd {
    /// First byte.
    pub(crate) start: u64,
    /// Length in bytes.
    pub(crate) size: u64,
}

/// Loads the initramfs at `path` as high as the kernel allows below the device hole.
pub(crate) fn load(
    path: &Path,
    kernel: &LoadedKernel,
    memory: &GuestMemory,
) -> Result<LoadedInitrd, InitrdError> {
    let open_error = |error| InitrdError::Open {
        path: path.into(),
        error,
    };
    let mut file = File::open(path).map_err(open_error)?;
    let size = file.metadata().map_err(open_error)?.len();
    let limit = match kernel.header {
        Some(header) => u64::from(header.initrd_addr_max).saturating_add(1),
        None => u64::from(u32::MAX),
    };
    let from = kernel.end.next_multiple_of(4096);
    let to = memory::low_end(memory).min(limit);
    let start = to
        .checked_sub(size)
        .map(|start| start & !0xfff)
        .filter(|start| *start >= from);
    let start = start.ok_or_else(|| InitrdError::DoesNotFit {
        path: path.into(),
        size,
        from,
        to,
    })?;
    memory
        .read_exact_volatile_from(GuestAddress(start), &mut file, size as usize)
        .map_err(|error| open_error(io::Error::other(error)))?;
    Ok(LoadedInitrd { start, size })
}

#[cfg(test)]
mod tests {
    use super::super::kernel::Entry;
    use super::*;
    use vmm_sys_util::tempfile::TempFile;

    fn file_of(size: u64) -> TempFile {
        let file = TempFile::new().unwrap();
        file.as_file().set_len(size).unwrap();
        file
    }

    #[test]
    fn it_lies_at_the_end_of_memory_or_is_refused() {
        let memory = memory::allocate(8 << 20).unwrap();
        let kernel = LoadedKernel {
            entry: Entry::Linux64(0),
            header: None,
            end: 6 << 20,
        };
        let loaded = load(file_of(5000).as_path(), &kernel, &memory).unwrap();
        assert_eq!(
            loaded,
            LoadedInitrd {
                start: (8 << 20) - 8192,
                size: 5000
            }
        );
        let error = load(file_of(3 << 20).as_path(), &kernel, &memory).unwrap_err();
        assert!(matches!(error, InitrdError::DoesNotFit { .. }), "{error}");
    }
}
