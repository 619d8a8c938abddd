//! Opening and creating images: who may have one, what sizes are taken, and what is said when it
//! cannot be. Called by [`FileStore::open`](crate::FileStore::open).

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::blockdev;
use crate::image::{Image, Medium};
use crate::lock::{self, Locked};
use crate::range::SECTOR_BYTES;

/// Which means `submit_read` uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineChoice {
    /// The pool of threads. io_uring takes a sixth to a third less CPU for cold reads, but is no
    /// faster (the threads lead at depth 8, by about 1.3 to 1), and all its callbacks run on one
    /// thread, so one that blocks on a slow client would stall every export. The example
    /// `read_engines` measures it.
    #[default]
    Auto,
    /// The pool of threads, which always works.
    Threads,
    /// io_uring, or an error where the kernel or a container forbids it. For callers whose
    /// [`ReadDone`](crate::ReadDone) never blocks.
    IoUring,
}

/// How an image is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenOptions {
    /// Writes are refused, and other readers are let in.
    pub read_only: bool,
    /// The size in bytes that the image must have. A regular file that is not there is created
    /// with it, sparse. A block device may be larger; the caller then uses its beginning.
    pub create_with_size: Option<u64>,
    /// How reads that would wait are done.
    pub engine: EngineChoice,
}

/// Why an image cannot be opened. Each message says what was tried, what happened and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// There is no such image, and nobody said how large it should be.
    #[error(
        "image {} does not exist: check the path, or give a source (--from) from which it can be \
         created", .path.display()
    )]
    NotFound {
        /// The image.
        path: PathBuf,
    },
    /// It is a directory, a pipe or something else that holds no disk.
    #[error("{} is {what}: an image is a regular file or a block device", .path.display())]
    NotAnImage {
        /// The image.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// Another daemon has the image.
    #[error(
        "image {} is in use by {holder}: stop that first; two daemons on one image would destroy \
         it", .path.display()
    )]
    InUse {
        /// The image.
        path: PathBuf,
        /// Who has it, as well as it is known.
        holder: String,
    },
    /// The block device is mounted, or part of something that is.
    #[error(
        "block device {} is mounted or otherwise in use by this machine: unmount it first, or \
         open it read-only", .path.display()
    )]
    DeviceBusy {
        /// The device.
        path: PathBuf,
    },
    /// A file or device without any bytes.
    #[error("image {} is empty (0 bytes): remove it, or give it a size with truncate -s", .path.display())]
    Empty {
        /// The image.
        path: PathBuf,
    },
    /// A size that no disk has.
    #[error(
        "image {} has {size} bytes, which is not a multiple of 512: a disk has whole sectors; if \
         the file is whole, extend it with truncate -s {rounded}", .path.display()
    )]
    PartialSector {
        /// The image.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// The next larger size that would do.
        rounded: u64,
    },
    /// The image is there, but its size is not the one that was asked for.
    #[error(
        "image {} has {found} bytes where {wanted} are needed: it belongs to another disk; give \
         another path, or remove it if it is not needed", .path.display()
    )]
    WrongSize {
        /// The image.
        path: PathBuf,
        /// Its size in bytes.
        found: u64,
        /// The size asked for, in bytes.
        wanted: u64,
    },
    /// io_uring was asked for and cannot be had.
    #[error(
        "io_uring is not available here (a container or an old kernel often forbids it): use the \
         engine \"threads\" or leave the choice to hikkoshi"
    )]
    NoIoUring {
        /// What the kernel said.
        source: io::Error,
    },
    /// A system call failed.
    #[error("cannot {what} image {}", .path.display())]
    Io {
        /// The image.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// What happened.
        source: io::Error,
    },
}

/// An image just opened, and whether this call created it.
pub(crate) struct Opened {
    pub(crate) image: Image,
    pub(crate) created: bool,
}

/// Opens an image, or creates it as the options say.
pub(crate) fn open(path: &Path, options: OpenOptions) -> Result<Opened, StoreError> {
    match open_existing(path, options) {
        Err(StoreError::NotFound { path }) => match options.create_with_size {
            Some(size) if !options.read_only => match create(&path, size) {
                // Somebody else created it in between; what it is now is for the checks to say.
                Err(StoreError::Io { source, .. })
                    if source.kind() == io::ErrorKind::AlreadyExists =>
                {
                    open_existing(&path, options)
                }
                result => result,
            },
            _ => Err(StoreError::NotFound { path }),
        },
        result => result,
    }
}

fn open_existing(path: &Path, options: OpenOptions) -> Result<Opened, StoreError> {
    let io_error = |what| move |source| io_error(path, what, source);
    let found = match fs::metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(StoreError::NotFound {
                path: path.to_owned(),
            });
        }
        Err(error) => return Err(io_error("look at")(error)),
    };
    check_kind(path, found.file_type())?;
    let is_block = found.file_type().is_block_device();
    // Exclusive on a block device: the kernel refuses it while mounted, and mounting it meanwhile.
    let exclusive = if is_block && !options.read_only {
        libc_o_excl()
    } else {
        0
    };
    let file = fs::OpenOptions::new()
        .read(true)
        .write(!options.read_only)
        .custom_flags(exclusive)
        .open(path)
        .map_err(|error| match error.raw_os_error() {
            Some(errno) if is_block && errno == rustix::io::Errno::BUSY.raw_os_error() => {
                StoreError::DeviceBusy {
                    path: path.to_owned(),
                }
            }
            _ => io_error("open")(error),
        })?;
    // From here on it is the open file that counts: the path may have been replaced.
    let opened = file.metadata().map_err(io_error("look at"))?;
    check_kind(path, opened.file_type())?;
    take_lock(path, &file, options.read_only)?;
    let (size, medium) = if opened.file_type().is_block_device() {
        (
            blockdev::size_bytes(&file).map_err(io_error("find the size of"))?,
            Medium::Block,
        )
    } else {
        // After the lock, as another daemon may have been about to give it its size.
        let size = file.metadata().map_err(io_error("look at"))?.len();
        (size, regular_medium(&file).map_err(io_error("look at"))?)
    };
    if let (0, Some(wanted), false) = (size, options.create_with_size, medium == Medium::Block)
        && !options.read_only
    {
        // Left behind by a creation that was cut short, or made by `touch`: nothing to lose.
        return give_size(path, file, wanted);
    }
    check_size(path, size, medium, options.create_with_size)?;
    let image = Image::new(file, path.to_owned(), size, medium, options.read_only);
    Ok(Opened {
        image,
        created: false,
    })
}

fn create(path: &Path, size: u64) -> Result<Opened, StoreError> {
    // Before the file exists, so that a wrong size leaves nothing behind.
    check_size(path, size, Medium::Regular, None)?;
    let file = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600) // a disk's content is its owner's business
        .open(path)
        .map_err(|source| io_error(path, "create", source))?;
    take_lock(path, &file, false)?;
    give_size(path, file, size).inspect_err(|_| {
        // Ours and empty. If it cannot be removed, the next start takes it as it is.
        let _ = fs::remove_file(path);
    })
}

/// Makes an empty regular file an image of `size` bytes without any data, durably.
fn give_size(path: &Path, file: File, size: u64) -> Result<Opened, StoreError> {
    check_size(path, size, Medium::Regular, None)?;
    file.set_len(size)
        .map_err(|source| io_error(path, "give its size to", source))?;
    file.sync_all()
        .map_err(|source| io_error(path, "make durable", source))?;
    sync_parent(path).map_err(|source| io_error(path, "make durable the directory of", source))?;
    let medium = regular_medium(&file).map_err(|source| io_error(path, "look at", source))?;
    let image = Image::new(file, path.to_owned(), size, medium, false);
    Ok(Opened {
        image,
        created: true,
    })
}

fn sync_parent(path: &Path) -> io::Result<()> {
    // Of the file itself, should the path be a symbolic link to it.
    let real = fs::canonicalize(path)?;
    match real.parent() {
        Some(parent) => File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}

fn check_kind(path: &Path, kind: fs::FileType) -> Result<(), StoreError> {
    let what = if kind.is_file() || kind.is_block_device() {
        return Ok(());
    } else if kind.is_dir() {
        "a directory"
    } else if kind.is_char_device() {
        "a character device"
    } else if kind.is_fifo() {
        "a pipe"
    } else if kind.is_socket() {
        "a socket"
    } else {
        "not a file"
    };
    Err(StoreError::NotAnImage {
        path: path.to_owned(),
        what,
    })
}

fn check_size(
    path: &Path,
    size: u64,
    medium: Medium,
    wanted: Option<u64>,
) -> Result<(), StoreError> {
    let path = || path.to_owned();
    if size == 0 {
        return Err(StoreError::Empty { path: path() });
    }
    if let Some(wanted) = wanted {
        let fits = if medium == Medium::Block {
            size >= wanted
        } else {
            size == wanted
        };
        if !fits {
            return Err(StoreError::WrongSize {
                path: path(),
                found: size,
                wanted,
            });
        }
    }
    if !size.is_multiple_of(SECTOR_BYTES) {
        let rounded = size.checked_next_multiple_of(SECTOR_BYTES).unwrap_or(size);
        return Err(StoreError::PartialSector {
            path: path(),
            size,
            rounded,
        });
    }
    Ok(())
}

fn take_lock(path: &Path, file: &File, shared: bool) -> Result<(), StoreError> {
    match lock::acquire(file, shared) {
        Ok(Locked::Yes) => Ok(()),
        Ok(Locked::HeldBy(holder)) => Err(StoreError::InUse {
            path: path.to_owned(),
            holder,
        }),
        Err(source) => Err(io_error(path, "lock", source)),
    }
}

fn regular_medium(file: &File) -> io::Result<Medium> {
    /// From linux/magic.h: file systems whose reads never wait for a disk.
    const IN_MEMORY: [i64; 2] = [0x0102_1994 /* tmpfs */, 0x8584_58f6 /* ramfs */];
    let stat = rustix::fs::fstatfs(file)?;
    Ok(if IN_MEMORY.contains(&stat.f_type) {
        Medium::RegularInMemory
    } else {
        Medium::Regular
    })
}

fn libc_o_excl() -> i32 {
    i32::try_from(rustix::fs::OFlags::EXCL.bits()).expect("O_EXCL is a low bit on every machine")
}

fn io_error(path: &Path, what: &'static str, source: io::Error) -> StoreError {
    StoreError::Io {
        path: path.to_owned(),
        what,
        source,
    }
}
