//! The objects behind the program's descriptors, and when they end.
//!
//! Each object has a file in memory. The program is given a descriptor of it; the table here knows
//! the object by the file's inode, and keeps a descriptor of its own. When the program's last
//! reference is gone, be it a descriptor or a mapping, in whichever process, the kernel tells that a
//! file was closed (inotify), and a lease, which only a file's sole opener is granted, tells that
//! nobody else has it open. The object is dropped then. A VM lives on with its vCPUs.

use crate::forks;
use crate::symbols::overlay;
use kvm::ioctl::{Answer, Object};
use kvm::{Kvm, VcpuFd, VmFd};
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, OwnedFd, RawFd};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::fs::{MemfdFlags, Mode, OFlags};
use rustix::mm::ProtFlags;
use std::cell::RefCell;
use std::collections::HashMap;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, OnceLock, PoisonError, RwLock, Weak};

const PAGE: usize = 4096;
/// The page of a vCPU's file that is the VM's ring of coalesced writes.
const RING_PAGE: usize = 2;

enum Kind {
    System(Kvm),
    Vm(VmFd),
    Vcpu(VcpuFd),
}

/// An object and this library's descriptor of its file.
struct Known {
    kind: Kind,
    file: OwnedFd,
    /// The process it belongs to: how often its ancestors had forked.
    process: u32,
    /// What the kernel calls the watch over the file.
    watch: Option<i32>,
}

/// A file's device and inode.
type Identity = (u64, u64);

type Table = RwLock<HashMap<Identity, Arc<Known>>>;

static OBJECTS: LazyLock<Table> = LazyLock::new(Table::default);
/// There are or were objects: most programs that load this library never ask for one.
static IS_USED: AtomicBool = AtomicBool::new(false);
/// Counts forks from parent to child: a VM is its creator's alone.
static PROCESS: AtomicU32 = AtomicU32::new(0);

fn errno(error: rustix::io::Errno) -> i32 {
    error.raw_os_error()
}

fn identity(fd: BorrowedFd<'_>) -> Option<Identity> {
    let stat = rustix::fs::fstat(fd).ok()?;
    Some((stat.st_dev, stat.st_ino))
}

/// What a program's number for a descriptor stands for; none while there were no objects.
fn identity_of(fd: RawFd) -> Option<Identity> {
    if fd < 0 || !IS_USED.load(Ordering::Relaxed) {
        return None;
    }
    // SAFETY: the descriptor is used for one call, which fails if it is not open.
    identity(unsafe { BorrowedFd::borrow_raw(fd) })
}

/// Counts what can change the meaning of a descriptor's number.
static EPOCH: AtomicU64 = AtomicU64::new(0);

thread_local! {
    /// The thread's last object, under which number it was found, and in which epoch: a vCPU's
    /// thread asks for the same one again and again.
    static LAST: RefCell<(u64, RawFd, Weak<Known>)> = const { RefCell::new((0, -1, Weak::new())) };
}

/// A descriptor is about to be, or was, closed, replaced or made.
pub(crate) fn renumbered() {
    EPOCH.fetch_add(1, Ordering::Release);
}

fn find(fd: RawFd) -> Option<Arc<Known>> {
    // Before anything that a program may not be ready for.
    if !IS_USED.load(Ordering::Relaxed) || forks::is_child() {
        return None;
    }
    let epoch = EPOCH.load(Ordering::Acquire);
    // A thread that ends has no memory of its own any more, and a signal's handler may come while
    // the thread looks here.
    let last = LAST.try_with(|last| match last.try_borrow() {
        Ok(last) if (last.0, last.1) == (epoch, fd) => last.2.upgrade(),
        _ => None,
    });
    if let Ok(Some(known)) = last {
        return Some(known);
    }
    let identity = identity_of(fd)?;
    // A handler of a signal may look, too.
    let _call = kvm::Call::begin();
    let objects = OBJECTS.read().unwrap_or_else(PoisonError::into_inner);
    let known = objects.get(&identity).cloned()?;
    drop(objects);
    let _ = LAST.try_with(|last| {
        if let Ok(mut last) = last.try_borrow_mut() {
            *last = (epoch, fd, Arc::downgrade(&known));
        }
    });
    Some(known)
}

/// Another open file of what a descriptor refers to.
fn reopen(file: BorrowedFd<'_>, flags: OFlags) -> Result<OwnedFd, i32> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    rustix::fs::open(path, OFlags::RDWR | flags, Mode::empty()).map_err(errno)
}

/// Puts an object into the table; the program's descriptor.
fn publish(kind: Kind, file: BorrowedFd<'_>, flags: OFlags) -> Result<RawFd, i32> {
    let own = reopen(file, OFlags::CLOEXEC)?;
    let given = reopen(file, flags)?;
    let identity = identity(own.as_fd()).ok_or(libc::EBADF)?;
    let known = Known {
        kind,
        watch: watch(own.as_fd()),
        file: own,
        process: PROCESS.load(Ordering::Relaxed),
    };
    let _call = kvm::Call::begin();
    let mut objects = OBJECTS.write().unwrap_or_else(PoisonError::into_inner);
    objects.insert(identity, Arc::new(known));
    IS_USED.store(true, Ordering::Relaxed);
    renumbered();
    Ok(given.into_raw_fd())
}

/// Opens `/dev/kvm`. A child of a process that had it open cannot: the threads that VMs need did
/// not come with the fork.
pub(crate) fn open(flags: libc::c_int) -> Result<libc::c_int, i32> {
    guarded(|| {
        if forks::is_child() || PROCESS.load(Ordering::Relaxed) != 0 {
            return Err(libc::EIO);
        }
        forks::mark();
        count_forks();
        let kvm = Kvm::new().map_err(|error| error.errno())?;
        let file = rustix::fs::memfd_create("kvm", MemfdFlags::CLOEXEC).map_err(errno)?;
        let flags = OFlags::from_bits_retain(flags as u32) & OFlags::CLOEXEC;
        publish(Kind::System(kvm), file.as_fd(), flags)
    })
}

/// An ioctl of KVM's on a descriptor; `None` if that is not one of an object here.
pub(crate) fn ioctl(fd: RawFd, request: u32, argument: u64) -> Option<Result<libc::c_int, i32>> {
    if forks::is_child() {
        return forks::is_objects_file(fd).then_some(Err(libc::EIO));
    }
    let known = find(fd)?;
    Some(guarded(|| {
        if known.process != PROCESS.load(Ordering::Relaxed) {
            return Err(libc::EIO);
        }
        let object = match &known.kind {
            Kind::System(kvm) => Object::System(kvm),
            Kind::Vm(vm) => Object::Vm(vm),
            Kind::Vcpu(vcpu) => Object::Vcpu(vcpu),
        };
        match kvm::ioctl::ioctl(object, request, argument).map_err(|error| error.errno())? {
            Answer::Value(value) => Ok(value as libc::c_int),
            Answer::Vm(vm) => {
                // SAFETY: the VM keeps its descriptor open while it lives.
                let file = unsafe { BorrowedFd::borrow_raw(vm.as_raw_fd()) };
                publish(Kind::Vm(vm), file, OFlags::CLOEXEC)
            }
            Answer::Vcpu(vcpu) => {
                // SAFETY: as above.
                let file = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
                publish(Kind::Vcpu(vcpu), file, OFlags::CLOEXEC)
            }
            Answer::Descriptor(descriptor) => Ok(descriptor.into_raw_fd()),
        }
    }))
}

/// The program has set a signal's disposition.
pub(crate) fn handler_installed(signal: libc::c_int) {
    if IS_USED.load(Ordering::Relaxed) {
        kvm::cover_signal_handler(signal);
    }
}

/// Whether there are or were objects.
pub(crate) fn is_used() -> bool {
    IS_USED.load(Ordering::Relaxed)
}

/// A panic must not reach the program, which is in another language.
fn guarded(body: impl FnOnce() -> Result<libc::c_int, i32>) -> Result<libc::c_int, i32> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)).unwrap_or(Err(libc::EIO))
}

/// Whether the program may map a file in a way: a vCPU's dirty ring is only mapped shared, and
/// never to be executed.
pub(crate) fn may_map(fd: RawFd, length: usize, offset: i64, is_plain: bool) -> bool {
    if is_plain {
        return true;
    }
    let Some(known) = find(fd) else { return true };
    let Kind::Vcpu(vcpu) = &known.kind else {
        return true;
    };
    let first = offset as usize / PAGE;
    let last = first + length.div_ceil(PAGE).saturating_sub(1);
    let ring = vcpu.dirty_ring_pages();
    !ring.contains(&first) && !ring.contains(&last)
}

/// The program has mapped a file: if it is a vCPU's and the ring's page is among what is mapped,
/// puts the VM's ring there.
pub(crate) fn map_shared_page(
    fd: RawFd,
    address: usize,
    length: usize,
    offset: i64,
    protection: ProtFlags,
) -> Result<(), i32> {
    let Some(known) = find(fd) else { return Ok(()) };
    let Kind::Vcpu(vcpu) = &known.kind else {
        return Ok(());
    };
    let _call = kvm::Call::begin();
    let mut mappings = MAPPINGS.write().unwrap_or_else(PoisonError::into_inner);
    mappings.extend(identity(known.file.as_fd()).map(|vcpu| (address, vcpu)));
    drop(mappings);
    let first = offset as usize / PAGE;
    if !(first..first + length.div_ceil(PAGE)).contains(&RING_PAGE) {
        return Ok(());
    }
    // SAFETY: the vCPU's VM keeps the descriptor open while it lives.
    let ring = unsafe { BorrowedFd::borrow_raw(vcpu.coalesced_ring()) };
    // SAFETY: inside what the program has mapped just now.
    unsafe { overlay(address + (RING_PAGE - first) * PAGE, protection, ring) }
}

/// Ends every KVM_RUN.
pub(crate) fn interrupt_vcpus() {
    if forks::is_child() {
        return;
    }
    let objects = OBJECTS.read().unwrap_or_else(PoisonError::into_inner);
    for known in objects.values() {
        if let Kind::Vcpu(vcpu) = &known.kind {
            vcpu.interrupter().interrupt();
        }
    }
}

/// Counts forks from now on.
fn count_forks() {
    extern "C" fn forked() {
        PROCESS.fetch_add(1, Ordering::Relaxed);
        kvm::release_kept_signals();
    }
    static COUNTS: OnceLock<()> = OnceLock::new();
    // SAFETY: the function may be called in a child with one thread: it counts, and makes system
    // calls.
    COUNTS.get_or_init(|| unsafe {
        libc::pthread_atfork(None, None, Some(forked));
    });
}

/// Watches a file for the program's last reference. Without that its object stays until the program
/// ends.
fn watch(file: BorrowedFd<'_>) -> Option<i32> {
    static WATCH: OnceLock<Option<RawFd>> = OnceLock::new();
    let watch = *WATCH.get_or_init(|| {
        let watch = inotify::init(CreateFlags::CLOEXEC).ok()?.into_raw_fd();
        // SAFETY: the descriptor is never closed.
        let watched = unsafe { BorrowedFd::borrow_raw(watch) };
        kvm::helpers::spawn("kvm-close", move || serve(watched)).ok()?;
        Some(watch)
    });
    // SAFETY: as above.
    let watch = unsafe { BorrowedFd::borrow_raw(watch?) };
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    inotify::add_watch(watch, path, WatchFlags::CLOSE).ok()
}

/// Drops objects as the kernel tells that their files were closed.
fn serve(watch: BorrowedFd<'_>) {
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut events = inotify::Reader::new(watch, &mut buffer);
    loop {
        match events.next() {
            Ok(event) => {
                // Of none in particular: some were lost.
                let is_any = event.wd() < 0;
                reap(|_, known| is_any || known.watch == Some(event.wd()));
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return,
        }
    }
}

/// Drops objects, of those that are asked about, that the program has let go of.
fn reap(is_asked: impl Fn(&Identity, &Known) -> bool) {
    let _call = kvm::Call::begin();
    // Whoever comes second waits for what the first is at: a closed VM is gone.
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let process = PROCESS.load(Ordering::Relaxed);
    let mut objects = OBJECTS.write().unwrap_or_else(PoisonError::into_inner);
    let is_over = |known: &Known| known.process == process && !is_open_elsewhere(&known.file);
    let ended: Vec<_> = objects
        .extract_if(|identity, known| is_asked(identity, known) && is_over(known))
        .collect();
    drop(objects);
    // Not under the lock: a VM's end waits for its threads.
    drop(ended);
}

/// Closes a descriptor. An object that was the program's no more after that is gone, as in the
/// kernel, when this returns.
pub(crate) fn close(fd: RawFd, close: impl FnOnce() -> libc::c_int) -> libc::c_int {
    let object = object_of(fd);
    renumbered();
    let result = close();
    renumbered();
    if let Some(object) = object {
        reap(|identity, _| *identity == object);
    }
    result
}

/// A descriptor's object, if it is one of this process; none where it cannot be told now, in a
/// signal's handler or after a fork.
fn object_of(fd: RawFd) -> Option<Identity> {
    if forks::is_child() {
        return None;
    }
    let identity = identity_of(fd)?;
    let objects = OBJECTS.try_read().ok()?;
    let known = objects.get(&identity)?;
    (known.process == PROCESS.load(Ordering::Relaxed)).then_some(identity)
}

/// Where the program has mapped which vCPU's file: a mapping may be its last reference.
static MAPPINGS: RwLock<Vec<(usize, Identity)>> = RwLock::new(Vec::new());

/// Removes mappings, as [`close`] closes.
pub(crate) fn unmap(
    address: usize,
    length: usize,
    unmap: impl FnOnce() -> libc::c_int,
) -> libc::c_int {
    let range = address..address.saturating_add(length);
    let is_vcpu = IS_USED.load(Ordering::Relaxed)
        && !forks::is_child()
        && MAPPINGS
            .try_read()
            .is_ok_and(|mappings| mappings.iter().any(|(at, _)| range.contains(at)));
    let result = unmap();
    if is_vcpu && result == 0 {
        let _call = kvm::Call::begin();
        let mut mappings = MAPPINGS.write().unwrap_or_else(PoisonError::into_inner);
        let vcpus: Vec<_> = mappings
            .extract_if(.., |(at, _)| range.contains(at))
            .collect();
        drop(mappings);
        reap(|identity, _| vcpus.iter().any(|(_, vcpu)| vcpu == identity));
    }
    result
}

/// Whether a file is open besides by this descriptor.
fn is_open_elsewhere(file: &OwnedFd) -> bool {
    let lease = |kind: libc::c_int| {
        // SAFETY: has no conditions.
        unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, kind) }
    };
    if lease(libc::F_WRLCK) == 0 {
        lease(libc::F_UNLCK);
        return false;
    }
    true
}
