//! Virtio block: a raw image file (or block device) as a disk.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_ID_BYTES,
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_queue::{Queue, Reader, Writer};

use super::{Chain, QueueError, VirtioDevice, serve_all};
use crate::machine::memory::GuestMemory;

const SECTOR: u64 = 512;
const QUEUE_SIZE: u16 = 256;
/// Data segments of one request: the queue's descriptors without header and status.
const SEGMENTS_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Bytes moved between file and guest at a time.
const CHUNK: usize = 64 * 1024;

/// Why a disk cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DiskError {
    /// The file cannot be opened.
    #[error("disk {path}: {error}{}", hint(.error))]
    Open {
        /// The image.
        path: PathBuf,
        /// What the host said.
        error: io::Error,
    },
    /// An image in a format of its own.
    #[error(
        "disk {path}: a {format} image, and disks are raw; convert it with \
         `qemu-img convert -O raw {path} FILE`"
    )]
    Format {
        /// The image.
        path: PathBuf,
        /// The format's name.
        format: &'static str,
    },
    /// Another process has it.
    #[error("disk {0}: in use by another virtual machine; add ,readonly to share it for reading")]
    Locked(PathBuf),
    /// Not whole sectors.
    #[error("disk {path}: {size} bytes are not a positive multiple of 512; is it a raw image?")]
    Size {
        /// The image.
        path: PathBuf,
        /// Its size.
        size: u64,
    },
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => "; make one with `truncate -s 1G FILE && mke2fs -t ext4 FILE`",
        io::ErrorKind::PermissionDenied => "; add ,readonly if it may only be read",
        _ => "",
    }
}

/// Formats of images that are not raw: where their magic number stands, and what it is.
const FORMATS: [(u64, &[u8], &str); 6] = [
    (0, b"QFI\xfb", "qcow2"),
    (0, b"KDMV", "VMDK"),
    (0, b"# Disk DescriptorFile", "VMDK"),
    (0, b"vhdxfile", "VHDX"),
    (0, b"conectix", "VHD"),
    (0x40, b"\x7f\x10\xda\xbe", "VDI"),
];

/// The format of an image that is not raw. What looks like one but is a raw disk would be a disk
/// whose boot sector starts with such a number.
fn format_of(image: &File) -> io::Result<Option<&'static str>> {
    let mut start = [0; 0x60];
    // A file that is shorter has zeroes here, and no magic number is of zeroes.
    let mut filled = 0;
    while filled < start.len() {
        match image.read_at(&mut start[filled..], filled as u64)? {
            0 => break,
            count => filled += count,
        }
    }
    let is = |(at, magic, _): &&(u64, &[u8], &str)| start[*at as usize..].starts_with(magic);
    Ok(FORMATS.iter().find(is).map(|(.., name)| *name))
}

/// A disk.
#[derive(Debug)]
pub(crate) struct Block {
    image: File,
    sectors: u64,
    read_only: bool,
}

impl Block {
    /// Opens the raw image at `path` and locks it against other machines.
    pub(crate) fn open(path: &Path, read_only: bool) -> Result<Self, DiskError> {
        let failed = |error| DiskError::Open {
            path: path.into(),
            error,
        };
        let mut image = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .open(path)
            .map_err(failed)?;
        let lock = if read_only {
            libc::LOCK_SH
        } else {
            libc::LOCK_EX
        };
        // SAFETY: the descriptor is open; the call has no memory arguments.
        if unsafe { libc::flock(image.as_raw_fd(), lock | libc::LOCK_NB) } != 0 {
            let error = io::Error::last_os_error();
            return Err(match error.kind() {
                io::ErrorKind::WouldBlock => DiskError::Locked(path.into()),
                _ => failed(error),
            });
        }
        if let Some(format) = format_of(&image).map_err(failed)? {
            return Err(DiskError::Format {
                path: path.into(),
                format,
            });
        }
        // Seeking gives the size of block devices too.
        let size = image.seek(SeekFrom::End(0)).map_err(failed)?;
        if size == 0 || !size.is_multiple_of(SECTOR) {
            return Err(DiskError::Size {
                path: path.into(),
                size,
            });
        }
        Ok(Self {
            image,
            sectors: size / SECTOR,
            read_only,
        })
    }

    /// Serves one request; returns the number of bytes written into its buffers.
    fn serve(&mut self, chain: Chain<'_>, memory: &GuestMemory) -> u32 {
        let (Ok(mut reader), Ok(mut data)) = (chain.clone().reader(memory), chain.writer(memory))
        else {
            return 0;
        };
        let Some(room) = data.available_bytes().checked_sub(1) else {
            return 0;
        };
        let Ok(mut status) = data.split_at(room) else {
            return 0;
        };
        let code = match self.execute(&mut reader, &mut data) {
            Ok(()) => VIRTIO_BLK_S_OK,
            Err(Failure::Unsupported) => VIRTIO_BLK_S_UNSUPP,
            Err(Failure::Io(error)) => {
                tracing::debug!(%error, "disk request failed");
                VIRTIO_BLK_S_IOERR
            }
        };
        match status.write_obj(code as u8) {
            Ok(()) => data.bytes_written() as u32 + 1,
            Err(_) => 0,
        }
    }

    fn execute(&mut self, reader: &mut Reader<'_>, data: &mut Writer<'_>) -> Result<(), Failure> {
        let kind: u32 = reader.read_obj()?;
        let _priority: u32 = reader.read_obj()?;
        let sector: u64 = reader.read_obj()?;
        match kind {
            VIRTIO_BLK_T_IN => {
                let start = self.checked(sector, data.available_bytes())?;
                self.read(start, data)
            }
            VIRTIO_BLK_T_OUT if self.read_only => Err(io::Error::other("read-only disk").into()),
            VIRTIO_BLK_T_OUT => {
                let start = self.checked(sector, reader.available_bytes())?;
                self.write(start, reader)
            }
            VIRTIO_BLK_T_FLUSH => Ok(self.image.sync_data()?),
            VIRTIO_BLK_T_GET_ID => {
                let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
                id[..6].copy_from_slice(b"eptide");
                let length = id.len().min(data.available_bytes());
                Ok(data.write_all(&id[..length])?)
            }
            _ => Err(Failure::Unsupported),
        }
    }

    /// The byte offset of `sector`, if `length` bytes from there lie on the disk.
    fn checked(&self, sector: u64, length: usize) -> Result<u64, Failure> {
        let length = length as u64;
        let end = sector.checked_add(length / SECTOR);
        if !length.is_multiple_of(SECTOR) || end.is_none_or(|end| end > self.sectors) {
            return Err(io::Error::other("request beyond the end of the disk").into());
        }
        Ok(sector * SECTOR)
    }

    fn read(&self, mut at: u64, data: &mut Writer<'_>) -> Result<(), Failure> {
        let mut chunk = vec![0; data.available_bytes().min(CHUNK)];
        while data.available_bytes() > 0 {
            let length = data.available_bytes().min(CHUNK);
            self.image.read_exact_at(&mut chunk[..length], at)?;
            data.write_all(&chunk[..length])?;
            at += length as u64;
        }
        Ok(())
    }

    fn write(&self, mut at: u64, reader: &mut Reader<'_>) -> Result<(), Failure> {
        let mut chunk = vec![0; reader.available_bytes().min(CHUNK)];
        while reader.available_bytes() > 0 {
            let length = reader.available_bytes().min(CHUNK);
            reader.read_exact(&mut chunk[..length])?;
            self.image.write_all_at(&chunk[..length], at)?;
            at += length as u64;
        }
        Ok(())
    }
}

/// How a request fails.
enum Failure {
    Unsupported,
    Io(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl VirtioDevice for Block {
    fn id(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        let read_only = u64::from(self.read_only) << VIRTIO_BLK_F_RO;
        1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_SEG_MAX | read_only
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE]
    }

    fn config(&self) -> Vec<u8> {
        // struct virtio_blk_config: capacity, size_max, seg_max.
        let mut config = self.sectors.to_le_bytes().to_vec();
        config.extend(0u32.to_le_bytes());
        config.extend(SEGMENTS_MAX.to_le_bytes());
        config
    }

    fn process(
        &mut self,
        _index: usize,
        queue: &mut Queue,
        memory: &GuestMemory,
    ) -> Result<(), QueueError> {
        serve_all(queue, memory, |chain| self.serve(chain, memory))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::mmio::testing::{Buffer, Driver};
    use vmm_sys_util::tempfile::TempFile;

    fn image(sectors: usize) -> TempFile {
        let file = TempFile::new().unwrap();
        let bytes: Vec<u8> = (0..sectors)
            .flat_map(|sector| [sector as u8; 512])
            .collect();
        file.as_file().write_all(&bytes).unwrap();
        file
    }

    fn header(kind: u32, sector: u64) -> Vec<u8> {
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        header
    }

    fn disk(file: &TempFile, read_only: bool) -> Driver {
        Driver::new(Box::new(Block::open(file.as_path(), read_only).unwrap()))
    }

    fn status(driver: &mut Driver, kind: u32, sector: u64, data: Buffer<'_>) -> u8 {
        let header = header(kind, sector);
        let buffers = [Buffer::Readable(&header), data, Buffer::Writable(1)];
        *driver
            .request(0, &buffers)
            .0
            .last()
            .unwrap()
            .last()
            .unwrap()
    }

    #[test]
    fn sectors_are_read() {
        let file = image(8);
        let header = header(VIRTIO_BLK_T_IN, 3);
        let buffers = [
            Buffer::Readable(&header),
            Buffer::Writable(1024),
            Buffer::Writable(1),
        ];
        let (data, length) = disk(&file, false).request(0, &buffers);
        assert_eq!(length, 1025);
        assert_eq!(data[0][..512], [3; 512]);
        assert_eq!(data[0][512..], [4; 512]);
        assert_eq!(data[1], [VIRTIO_BLK_S_OK as u8]);
    }

    #[test]
    fn sectors_are_written_and_flushed() {
        let file = image(8);
        let mut driver = disk(&file, false);
        let data = [0x5a; 512];
        assert_eq!(
            status(&mut driver, VIRTIO_BLK_T_OUT, 2, Buffer::Readable(&data)),
            0
        );
        assert_eq!(
            status(&mut driver, VIRTIO_BLK_T_FLUSH, 0, Buffer::Readable(&[])),
            0
        );
        let written = std::fs::read(file.as_path()).unwrap();
        assert_eq!(written[1024..1536], data);
        assert_eq!(written[512..1024], [1; 512]);
    }

    #[test]
    fn a_read_only_disk_says_so_and_refuses_writes() {
        let file = image(8);
        let mut driver = disk(&file, true);
        assert_ne!(driver.read(0x10) & 1 << VIRTIO_BLK_F_RO, 0);
        let data = Buffer::Readable(&[1; 512]);
        assert_eq!(
            status(&mut driver, VIRTIO_BLK_T_OUT, 0, data),
            VIRTIO_BLK_S_IOERR as u8
        );
    }

    #[test]
    fn requests_beyond_the_end_fail() {
        let file = image(8);
        let mut driver = disk(&file, false);
        for sector in [8, 7, u64::MAX] {
            let answer = status(&mut driver, VIRTIO_BLK_T_IN, sector, Buffer::Writable(1024));
            assert_eq!(answer, VIRTIO_BLK_S_IOERR as u8, "{sector}");
        }
    }

    #[test]
    fn odd_requests_are_answered() {
        let file = image(8);
        let mut driver = disk(&file, false);
        let answer = status(&mut driver, 0x77, 0, Buffer::Writable(512));
        assert_eq!(answer, VIRTIO_BLK_S_UNSUPP as u8);
        let answer = status(&mut driver, VIRTIO_BLK_T_IN, 0, Buffer::Writable(100));
        assert_eq!(answer, VIRTIO_BLK_S_IOERR as u8);
        // No room for the status byte; a header that is too short.
        assert_eq!(driver.request(0, &[Buffer::Readable(&header(0, 0))]).1, 0);
        let (short, _) = driver.request(0, &[Buffer::Readable(&[0; 4]), Buffer::Writable(1)]);
        assert_eq!(short, [[VIRTIO_BLK_S_IOERR as u8]]);
    }

    #[test]
    fn the_configuration_gives_capacity_and_segments() {
        let file = image(8);
        let mut driver = disk(&file, false);
        assert_eq!(
            [driver.read(0x100), driver.read(0x104), driver.read(0x10c)],
            [8, 0, 254]
        );
    }

    #[test]
    fn unusable_images_are_named() {
        let missing = Block::open(Path::new("/does/not/exist"), false).unwrap_err();
        assert!(missing.to_string().contains("mke2fs"), "{missing}");
        let odd = TempFile::new().unwrap();
        odd.as_file().set_len(1000).unwrap();
        assert!(matches!(
            Block::open(odd.as_path(), true),
            Err(DiskError::Size { size: 1000, .. })
        ));
        let file = image(1);
        let _first = Block::open(file.as_path(), false).unwrap();
        assert!(matches!(
            Block::open(file.as_path(), true),
            Err(DiskError::Locked(_))
        ));
    }
}
