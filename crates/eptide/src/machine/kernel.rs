//! Kernel images: recognising, checking and loading them.
//!
//! `linux-loader` copies the bytes; the checks before it turn what it would report as "unable to
//! read" into something a person can act on.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use linux_loader::bootparam::setup_header;
use linux_loader::loader::{BzImage, Elf, KernelLoader, PvhBootCapability};
use vm_memory::GuestAddress;

use super::layout::HIGH_MEMORY;
use super::memory::{self, GuestMemory};

/// Where `setup_header` begins in a bzImage.
const SETUP_HEADER: u64 = 0x1f1;
/// `setup_header.header`.
const HDRS: u32 = u32::from_le_bytes(*b"HdrS");
/// The 64-bit entry point's distance from the load address.
const ENTRY_64: u64 = 0x200;
/// `loadflags`: the protected-mode code is for 1 MiB and above.
const LOADED_HIGH: u8 = 1;
/// `xloadflags`: the kernel has a 64-bit entry point.
const XLF_KERNEL_64: u16 = 1;
/// Where a bzImage goes that cannot be relocated or has no room at its preferred address.
const FALLBACK_ALIGN: u64 = 0x20_0000;

/// Which boot protocol to use for a kernel that offers more than one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Protocol {
    /// PVH for an ELF file that has the note, the Linux protocol otherwise.
    Auto,
    /// The Linux protocol: its 64-bit entry where the kernel has one, else its 32-bit entry.
    Linux,
    /// The PVH protocol of ELF files.
    Pvh,
}

/// How the first instruction is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Entry {
    /// 64-bit mode, RSI points to the zero page.
    Linux64(u64),
    /// 32-bit protected mode, ESI points to the zero page.
    Linux32(u64),
    /// 32-bit protected mode, EBX points to the start info.
    Pvh(u64),
}

/// A kernel in guest memory.
#[derive(Debug)]
pub(crate) struct LoadedKernel {
    /// First instruction.
    pub(crate) entry: Entry,
    /// The image's own header (bzImage only).
    pub(crate) header: Option<setup_header>,
    /// First byte after the memory the kernel needs before it reads the memory map.
    pub(crate) end: u64,
}

/// Why a kernel cannot be booted.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KernelError {
    /// The file cannot be read.
    #[error("kernel {path}: {error}")]
    Open {
        /// The file.
        path: PathBuf,
        /// What the host said.
        error: io::Error,
    },
    /// Neither a bzImage nor an ELF file.
    #[error(
        "kernel {0}: neither a bzImage nor an ELF file; give a vmlinuz such as \
         /boot/vmlinuz-… or an uncompressed vmlinux"
    )]
    Unrecognised(PathBuf),
    /// The file ends early.
    #[error(
        "kernel {path}: truncated: the header promises {expected} bytes, the file has {actual}"
    )]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Bytes the header accounts for.
        expected: u64,
        /// Bytes there are.
        actual: u64,
    },
    /// A 32-bit ELF file.
    #[error("kernel {0}: a 32-bit ELF file; a 32-bit kernel boots as a bzImage (vmlinuz)")]
    Elf32(PathBuf),
    /// An ELF file for another machine.
    #[error("kernel {path}: an ELF file for machine type {machine}, not for x86-64 (62)")]
    ForeignElf {
        /// The file.
        path: PathBuf,
        /// `e_machine`.
        machine: u16,
    },
    /// A bzImage that says too little about itself, or one for low memory (a zImage).
    #[error(
        "kernel {path}: boot protocol {}.{:02}; a bzImage of protocol 2.10 or later is needed",
        version >> 8,
        version & 0xff
    )]
    OldProtocol {
        /// The file.
        path: PathBuf,
        /// `setup_header.version`.
        version: u16,
    },
    /// PVH asked for and not offered.
    #[error("kernel {0}: has no PVH entry point; use --protocol linux")]
    NoPvh(PathBuf),
    /// The kernel does not fit.
    #[error(
        "kernel {path}: needs memory up to {needed:#x}, the guest has {available:#x} below the \
         device hole; give it at least --memory {advice}M"
    )]
    TooLittleMemory {
        /// The file.
        path: PathBuf,
        /// End of what the kernel occupies.
        needed: u64,
        /// End of guest memory.
        available: u64,
        /// MiB that would do.
        advice: u64,
    },
    /// A header that contradicts itself.
    #[error("kernel {path}: {error}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What the loader said.
        error: linux_loader::loader::Error,
    },
}

/// Loads the kernel at `path` into `memory`.
pub(crate) fn load(
    path: &Path,
    protocol: Protocol,
    memory: &GuestMemory,
) -> Result<LoadedKernel, KernelError> {
    let file = File::open(path).map_err(|error| open_error(path, error))?;
    let size = file
        .metadata()
        .map_err(|error| open_error(path, error))?
        .len();
    let mut magic = [0; 4];
    let got = file
        .read_at(&mut magic, 0)
        .map_err(|error| open_error(path, error))?;
    if got == magic.len() && magic == *b"\x7fELF" {
        load_elf(path, file, size, protocol, memory)
    } else {
        load_bzimage(path, file, size, protocol, memory)
    }
}

fn open_error(path: &Path, error: io::Error) -> KernelError {
    KernelError::Open {
        path: path.into(),
        error,
    }
}

fn malformed(path: &Path) -> impl FnOnce(linux_loader::loader::Error) -> KernelError + '_ {
    move |error| KernelError::Malformed {
        path: path.into(),
        error,
    }
}

fn too_little_memory(path: &Path, needed: u64, available: u64) -> KernelError {
    // Decompression and early boot want room beyond the kernel itself.
    let advice = needed.div_ceil(1 << 20).next_multiple_of(32) + 32;
    KernelError::TooLittleMemory {
        path: path.into(),
        needed,
        available,
        advice,
    }
}

fn load_bzimage(
    path: &Path,
    mut file: File,
    size: u64,
    protocol: Protocol,
    memory: &GuestMemory,
) -> Result<LoadedKernel, KernelError> {
    let header = read_setup_header(path, &file)?;
    if header.version < 0x20a || header.loadflags & LOADED_HIGH == 0 {
        return Err(KernelError::OldProtocol {
            path: path.into(),
            version: header.version,
        });
    }
    if protocol == Protocol::Pvh {
        return Err(KernelError::NoPvh(path.into()));
    }
    let setup_sectors = if header.setup_sects == 0 {
        4
    } else {
        u64::from(header.setup_sects)
    };
    let expected = (setup_sectors + 1) * 512 + u64::from(header.syssize) * 16;
    if size < expected {
        return Err(KernelError::Truncated {
            path: path.into(),
            expected,
            actual: size,
        });
    }

    let start = bzimage_address(path, &header, memory)?;
    let available = memory::low_end(memory);
    let image_end = start.saturating_add(size);
    if image_end > available {
        return Err(too_little_memory(path, image_end, available));
    }
    let loaded = BzImage::load(
        memory,
        Some(GuestAddress(start)),
        &mut file,
        Some(GuestAddress(HIGH_MEMORY)),
    )
    .map_err(malformed(path))?;
    let has_64 = header.version >= 0x20c && header.xloadflags & XLF_KERNEL_64 != 0;
    Ok(LoadedKernel {
        entry: match has_64 {
            true => Entry::Linux64(start + ENTRY_64),
            false => Entry::Linux32(start),
        },
        header: loaded.setup_header,
        end: start + u64::from(header.init_size).max(loaded.kernel_end - start),
    })
}

fn read_setup_header(path: &Path, file: &File) -> Result<setup_header, KernelError> {
    let mut bytes = [0; size_of::<setup_header>()];
    match file.read_exact_at(&mut bytes, SETUP_HEADER) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            return Err(KernelError::Unrecognised(path.into()));
        }
        Err(error) => return Err(open_error(path, error)),
    }
    let header = *vm_memory::ByteValued::from_slice(&bytes)
        .filter(|header: &&setup_header| { header.header } == HDRS)
        .ok_or_else(|| KernelError::Unrecognised(path.into()))?;
    Ok(header)
}

/// Picks the load address: the preferred one where it fits, the lowest aligned one otherwise.
fn bzimage_address(
    path: &Path,
    header: &setup_header,
    memory: &GuestMemory,
) -> Result<u64, KernelError> {
    let available = memory::low_end(memory);
    let init_size = u64::from(header.init_size);
    let preferred = header.pref_address;
    let fits = |start: u64| {
        start
            .checked_add(init_size)
            .is_some_and(|end| end <= available)
    };
    if preferred >= HIGH_MEMORY && fits(preferred) {
        return Ok(preferred);
    }
    let align = u64::from(header.kernel_alignment).max(FALLBACK_ALIGN);
    let lowest = HIGH_MEMORY.next_multiple_of(align);
    if header.relocatable_kernel != 0 && fits(lowest) {
        return Ok(lowest);
    }
    let needed = if header.relocatable_kernel != 0 {
        lowest
    } else {
        preferred
    };
    Err(too_little_memory(
        path,
        needed.saturating_add(init_size),
        available,
    ))
}

/// The fields of an ELF header that decide whether and how it can be booted.
struct ElfSummary {
    /// Highest end of a loadable segment, in memory.
    end: u64,
    /// Highest end of a loadable segment, in the file.
    file_end: u64,
}

fn u16_at(bytes: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes(bytes[offset..offset + 2].try_into().expect("two bytes"))
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(bytes[offset..offset + 8].try_into().expect("eight bytes"))
}

fn summarise_elf(path: &Path, file: &File, size: u64) -> Result<ElfSummary, KernelError> {
    const CLASS: usize = 4;
    const MACHINE: usize = 18;
    const EM_X86_64: u16 = 62;
    const PROGRAM_HEADER: usize = 56;
    let truncated = |expected| KernelError::Truncated {
        path: path.into(),
        expected,
        actual: size,
    };

    let mut header = [0; 64];
    let got = file
        .read_at(&mut header, 0)
        .map_err(|error| open_error(path, error))?;
    if got > CLASS && header[CLASS] == 1 {
        return Err(KernelError::Elf32(path.into()));
    }
    if got < header.len() {
        return Err(truncated(header.len() as u64));
    }
    let machine = u16_at(&header, MACHINE);
    if machine != EM_X86_64 {
        return Err(KernelError::ForeignElf {
            path: path.into(),
            machine,
        });
    }

    let table = u64_at(&header, 32);
    let count = usize::from(u16_at(&header, 56));
    let table_end = table.saturating_add((count * PROGRAM_HEADER) as u64);
    if table_end > size {
        return Err(truncated(table_end));
    }
    let mut programs = vec![0; count * PROGRAM_HEADER];
    file.read_exact_at(&mut programs, table)
        .map_err(|error| open_error(path, error))?;

    let mut summary = ElfSummary {
        end: 0,
        file_end: 0,
    };
    for program in programs.chunks_exact(PROGRAM_HEADER) {
        const PT_LOAD: u16 = 1;
        let (offset, address) = (u64_at(program, 8), u64_at(program, 24));
        let (in_file, in_memory) = (u64_at(program, 32), u64_at(program, 40));
        if u16_at(program, 0) == PT_LOAD && in_file != 0 {
            summary.end = summary.end.max(address.saturating_add(in_memory));
            summary.file_end = summary.file_end.max(offset.saturating_add(in_file));
        }
    }
    if summary.file_end > size {
        return Err(truncated(summary.file_end));
    }
    Ok(summary)
}

fn load_elf(
    path: &Path,
    mut file: File,
    size: u64,
    protocol: Protocol,
    memory: &GuestMemory,
) -> Result<LoadedKernel, KernelError> {
    let summary = summarise_elf(path, &file, size)?;
    let available = memory::low_end(memory);
    if summary.end > available {
        return Err(too_little_memory(path, summary.end, available));
    }
    let loaded = Elf::load(memory, None, &mut file, None).map_err(malformed(path))?;
    let entry = match (protocol, loaded.pvh_boot_cap) {
        (Protocol::Auto | Protocol::Pvh, PvhBootCapability::PvhEntryPresent(entry)) => {
            Entry::Pvh(entry.0)
        }
        (Protocol::Pvh, _) => return Err(KernelError::NoPvh(path.into())),
        _ => Entry::Linux64(loaded.kernel_load.0),
    };
    Ok(LoadedKernel {
        entry,
        header: None,
        end: loaded.kernel_end,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use vm_memory::Bytes;
    use vmm_sys_util::tempfile::TempFile;

    fn file_with(bytes: &[u8]) -> TempFile {
        let file = TempFile::new().unwrap();
        file.as_file().write_all(bytes).unwrap();
        file
    }

    /// A bzImage with one setup sector and `payload` bytes of protected-mode code.
    fn bzimage(payload: usize, edit: impl FnOnce(&mut setup_header)) -> Vec<u8> {
        let mut header = setup_header {
            setup_sects: 1,
            syssize: (payload / 16) as u32,
            header: HDRS,
            version: 0x20f,
            loadflags: 1,
            code32_start: 0x10_0000,
            initrd_addr_max: 0x7fff_ffff,
            kernel_alignment: 0x20_0000,
            relocatable_kernel: 1,
            xloadflags: XLF_KERNEL_64,
            pref_address: 0x100_0000,
            init_size: 0x40_0000,
            ..Default::default()
        };
        edit(&mut header);
        let mut image = vec![0; 1024 + payload];
        let at = SETUP_HEADER as usize;
        image[at..at + size_of::<setup_header>()]
            .copy_from_slice(vm_memory::ByteValued::as_slice(&header));
        image[1024 + 0x200] = 0x90;
        image
    }

    fn load_bytes(bytes: &[u8], memory_size: u64) -> Result<LoadedKernel, KernelError> {
        let file = file_with(bytes);
        load(
            file.as_path(),
            Protocol::Auto,
            &memory::allocate(memory_size).unwrap(),
        )
    }

    #[test]
    fn bzimage_goes_to_its_preferred_address() {
        let memory = memory::allocate(64 << 20).unwrap();
        let file = file_with(&bzimage(4096, |_| ()));
        let kernel = load(file.as_path(), Protocol::Auto, &memory).unwrap();
        assert_eq!(kernel.entry, Entry::Linux64(0x100_0200));
        assert_eq!(kernel.end, 0x140_0000);
        let byte: u8 = memory.read_obj(GuestAddress(0x100_0200)).unwrap();
        assert_eq!(byte, 0x90);
    }

    #[test]
    fn small_memory_moves_a_relocatable_kernel_down() {
        let kernel = load_bytes(&bzimage(4096, |_| ()), 8 << 20).unwrap();
        assert_eq!(kernel.entry, Entry::Linux64(0x20_0200));
    }

    #[test]
    fn too_little_memory_names_the_need() {
        let error = load_bytes(&bzimage(4096, |_| ()), 4 << 20).unwrap_err();
        assert!(
            matches!(
                error,
                KernelError::TooLittleMemory {
                    needed: 0x60_0000,
                    ..
                }
            ),
            "{error}"
        );
        assert!(error.to_string().contains("--memory 64M"), "{error}");
    }

    #[test]
    fn a_truncated_bzimage_is_recognised() {
        let mut image = bzimage(4096, |_| ());
        image.truncate(4096);
        let error = load_bytes(&image, 64 << 20).unwrap_err();
        assert!(matches!(
            error,
            KernelError::Truncated {
                expected: 5120,
                actual: 4096,
                ..
            }
        ));
    }

    #[test]
    fn a_32_bit_bzimage_is_entered_at_its_start() {
        let image = bzimage(4096, |header| header.xloadflags = 0);
        let kernel = load_bytes(&image, 64 << 20).unwrap();
        assert_eq!(kernel.entry, Entry::Linux32(0x100_0000));
    }

    #[test]
    fn an_image_of_an_old_protocol_is_refused_with_its_version() {
        let image = bzimage(4096, |header| header.version = 0x209);
        let error = load_bytes(&image, 64 << 20).unwrap_err();
        assert!(error.to_string().contains("protocol 2.09"), "{error}");
    }

    #[test]
    fn other_files_are_not_kernels() {
        for bytes in [&b"hello"[..], &[0; 4096], b""] {
            assert!(matches!(
                load_bytes(bytes, 64 << 20),
                Err(KernelError::Unrecognised(_))
            ));
        }
        let missing = load(
            Path::new("/does/not/exist"),
            Protocol::Auto,
            &memory::allocate(2 << 20).unwrap(),
        );
        assert!(matches!(missing, Err(KernelError::Open { .. })));
    }

    fn elf(class: u8, machine: u16, load_at: u64, file_size: u64) -> Vec<u8> {
        let mut image = vec![0; 64 + 56 + 16];
        image[..6].copy_from_slice(&[0x7f, b'E', b'L', b'F', class, 1]);
        image[18..20].copy_from_slice(&machine.to_le_bytes());
        image[24..32].copy_from_slice(&load_at.to_le_bytes());
        image[32..40].copy_from_slice(&64u64.to_le_bytes());
        image[54..56].copy_from_slice(&56u16.to_le_bytes());
        image[56..58].copy_from_slice(&1u16.to_le_bytes());
        image[64] = 1;
        for (offset, value) in [(8, 120), (24, load_at), (32, file_size), (40, file_size)] {
            image[64 + offset..64 + offset + 8].copy_from_slice(&u64::to_le_bytes(value));
        }
        image
    }

    #[test]
    fn elf_files_load_at_their_physical_addresses() {
        let kernel = load_bytes(&elf(2, 62, 0x20_0000, 16), 8 << 20).unwrap();
        assert_eq!(kernel.entry, Entry::Linux64(0x20_0000));
        assert_eq!(kernel.end, 0x20_0010);
    }

    #[test]
    fn wrong_elf_files_are_named() {
        type Check = fn(&KernelError) -> bool;
        let cases: [(Vec<u8>, Check); 4] = [
            (elf(1, 3, 0, 16), |e| matches!(e, KernelError::Elf32(_))),
            (elf(2, 183, 0, 16), |e| {
                matches!(e, KernelError::ForeignElf { machine: 183, .. })
            }),
            (elf(2, 62, 0, 17), |e| {
                matches!(e, KernelError::Truncated { expected: 137, .. })
            }),
            (elf(2, 62, 1 << 30, 16), |e| {
                matches!(e, KernelError::TooLittleMemory { .. })
            }),
        ];
        for (bytes, expected) in cases {
            let error = load_bytes(&bytes, 8 << 20).unwrap_err();
            assert!(expected(&error), "{error}");
        }
    }
}
