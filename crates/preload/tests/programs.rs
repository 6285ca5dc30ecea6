//! A program that has the library preloaded: each test runs itself again that way.

use kvm_bindings::KVM_API_VERSION;
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::process::Command;

/// Runs a test again with the library preloaded; false in the run that has it.
fn again(test: &str) -> bool {
    const MARK: &str = "EPTIDE_TEST_IS_PRELOADED";
    if std::env::var_os(MARK).is_some() {
        return false;
    }
    let program = std::env::current_exe().unwrap();
    let library = program.with_file_name("libeptide_preload.so");
    assert!(library.is_file(), "{} is missing", library.display());
    let output = Command::new(&program)
        .args([test, "--exact", "--nocapture"])
        .env("LD_PRELOAD", library)
        .env(MARK, "")
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    true
}

/// A VM whose first vCPU writes to port 0x80 and halts.
fn machine() -> (Kvm, VmFd, VcpuFd) {
    machine_with(&[0xe6, 0x80, 0xf4])
}

/// A VM with a page of memory that holds 16-bit code.
fn machine_with(code: &[u8]) -> (Kvm, VmFd, VcpuFd) {
    let kvm = Kvm::new().unwrap();
    let vm = kvm.create_vm().unwrap();
    machine_in(kvm, vm, code)
}

/// The same in a VM.
fn machine_in(kvm: Kvm, vm: VmFd, code: &[u8]) -> (Kvm, VmFd, VcpuFd) {
    // SAFETY: a new mapping at an address the kernel chooses, which stays.
    let memory = unsafe {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        libc::mmap(std::ptr::null_mut(), 4096, protection, flags, -1, 0)
    };
    // SAFETY: the page just mapped.
    unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), memory.cast(), code.len()) };
    let region = kvm_bindings::kvm_userspace_memory_region {
        memory_size: 4096,
        userspace_addr: memory as u64,
        ..Default::default()
    };
    // SAFETY: the memory stays.
    unsafe { vm.set_user_memory_region(region).unwrap() };
    let vcpu = vm.create_vcpu(0).unwrap();
    let mut sregs = vcpu.get_sregs().unwrap();
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs).unwrap();
    let mut regs = vcpu.get_regs().unwrap();
    regs.rip = 0;
    vcpu.set_regs(&regs).unwrap();
    (kvm, vm, vcpu)
}

#[test]
fn the_device_is_there_for_all_who_look() {
    if again("the_device_is_there_for_all_who_look") {
        return;
    }
    let metadata = std::fs::metadata("/dev/kvm").unwrap();
    assert!(metadata.file_type().is_char_device());
    assert_eq!(metadata.rdev(), libc::makedev(10, 232));
    // SAFETY: a C string.
    let access = |mode| unsafe { libc::access(c"/dev/kvm".as_ptr(), mode) };
    assert_eq!(access(libc::F_OK), 0);
    assert_eq!(access(libc::R_OK | libc::W_OK), 0);
    assert_eq!(access(libc::X_OK), -1);
    // Others are the kernel's.
    assert!(
        std::fs::metadata("/dev/null")
            .unwrap()
            .file_type()
            .is_char_device()
    );
    assert!(File::open("/no/such/file").is_err());
    let kvm = Kvm::new().unwrap();
    assert_eq!(kvm.get_api_version(), KVM_API_VERSION as i32);
}

#[test]
fn a_guest_runs() {
    if again("a_guest_runs") {
        return;
    }
    let (_kvm, _vm, mut vcpu) = machine();
    assert!(matches!(vcpu.run().unwrap(), VcpuExit::IoOut(0x80, [_])));
    assert!(matches!(vcpu.run().unwrap(), VcpuExit::Hlt));
}

fn ioctl(fd: RawFd, request: u32, argument: usize) -> Result<i32, i32> {
    // SAFETY: the requests below take numbers.
    let result = unsafe { libc::ioctl(fd, request as libc::c_ulong, argument) };
    if result < 0 {
        Err(std::io::Error::last_os_error().raw_os_error().unwrap())
    } else {
        Ok(result)
    }
}

/// `_IO(KVMIO, number)`.
const fn request(number: u32) -> u32 {
    0xae00 | number
}
const GET_API_VERSION: u32 = request(0x00);
const CREATE_VM: u32 = request(0x01);
const CREATE_VCPU: u32 = request(0x41);
const RUN: u32 = request(0x80);

#[test]
fn descriptors_are_the_kernels() {
    if again("descriptors_are_the_kernels") {
        return;
    }
    let kvm = File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .unwrap();
    let copy = kvm.try_clone().unwrap();
    drop(kvm);
    assert_eq!(ioctl(copy.as_raw_fd(), GET_API_VERSION, 0), Ok(12));
    // What is no object's, and what the object does not know.
    let other = File::open("/dev/null").unwrap();
    assert_eq!(
        ioctl(other.as_raw_fd(), GET_API_VERSION, 0),
        Err(libc::ENOTTY)
    );
    assert_eq!(ioctl(copy.as_raw_fd(), RUN, 0), Err(libc::ENOTTY));
    assert_eq!(ioctl(-1, GET_API_VERSION, 0), Err(libc::EBADF));
    // A number that means another object from one call to the next.
    let vm = ioctl(copy.as_raw_fd(), CREATE_VM, 0).unwrap();
    assert_eq!(ioctl(vm, GET_API_VERSION, 0), Err(libc::ENOTTY));
    // SAFETY: descriptors of this test.
    assert_eq!(unsafe { libc::dup2(copy.as_raw_fd(), vm) }, vm);
    assert_eq!(ioctl(vm, GET_API_VERSION, 0), Ok(12));
    // SAFETY: as above.
    assert_eq!(unsafe { libc::close(vm) }, 0);
    assert_eq!(ioctl(vm, GET_API_VERSION, 0), Err(libc::EBADF));
    assert_eq!(ioctl(copy.as_raw_fd(), CREATE_VM, 99), Err(libc::EINVAL));
}

#[test]
fn the_last_reference_ends_an_object() {
    if again("the_last_reference_ends_an_object") {
        return;
    }
    let count = |folder| std::fs::read_dir(folder).unwrap().count();
    let counts = || (count("/proc/self/fd"), count("/proc/self/task"));
    drop(machine());
    let before = counts();
    for _ in 0..50 {
        let (kvm, vm, mut vcpu) = machine();
        vm.create_irq_chip().unwrap_err();
        // A vCPU keeps its VM.
        drop((kvm, vm));
        assert!(matches!(vcpu.run().unwrap(), VcpuExit::IoOut(0x80, _)));
    }
    assert_eq!(counts(), before);
    // A mapping keeps its vCPU and so the VM.
    let kvm = Kvm::new().unwrap();
    let vm = ioctl(kvm.as_raw_fd(), CREATE_VM, 0).unwrap();
    let vcpu = ioctl(vm, CREATE_VCPU, 0).unwrap();
    // SAFETY: new descriptors that nobody else has, and a mapping that is removed below.
    unsafe {
        let (vm, vcpu) = (OwnedFd::from_raw_fd(vm), OwnedFd::from_raw_fd(vcpu));
        let length = kvm.get_vcpu_mmap_size().unwrap();
        let (address, protection) = (std::ptr::null_mut(), libc::PROT_READ);
        let mapped = libc::mmap(
            address,
            length,
            protection,
            libc::MAP_SHARED,
            vcpu.as_raw_fd(),
            0,
        );
        assert_ne!(mapped, libc::MAP_FAILED);
        drop((kvm, vcpu, vm));
        assert!(counts().0 > before.0);
        assert_eq!(libc::munmap(mapped, length), 0);
    }
    assert_eq!(counts(), before);
}

#[test]
fn a_forks_child_has_no_part_in_a_vm() {
    if again("a_forks_child_has_no_part_in_a_vm") {
        return;
    }
    let (kvm, vm, mut vcpu) = machine();
    // SAFETY: the child makes system calls only.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let fails = ioctl(kvm.as_raw_fd(), GET_API_VERSION, 0) == Err(libc::EIO)
            && ioctl(vm.as_raw_fd(), CREATE_VCPU, 1) == Err(libc::EIO)
            && ioctl(vcpu.as_raw_fd(), RUN, 0) == Err(libc::EIO)
            && Kvm::new().is_err_and(|error| error.errno() == libc::EIO);
        // SAFETY: ends the process.
        unsafe { libc::_exit(i32::from(!fails)) };
    }
    let mut status = 0;
    // SAFETY: the child's ID, and room for its status.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    assert_eq!(status, 0);
    assert!(matches!(vcpu.run().unwrap(), VcpuExit::IoOut(0x80, _)));
}

/// Makes and closes VMs until told to stop.
fn churn(stop: &std::sync::atomic::AtomicBool) {
    while !stop.load(std::sync::atomic::Ordering::Relaxed) {
        drop(machine());
    }
}

#[test]
fn a_forks_child_waits_for_no_lock_of_its_parents() {
    if again("a_forks_child_waits_for_no_lock_of_its_parents") {
        return;
    }
    let (kvm, _vm, vcpu) = machine();
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| churn(&stop));
        }
        for round in 0..150 {
            // SAFETY: a mapping of the vCPU's, which the child gives up; the child makes system
            // calls only.
            let (area, child) = unsafe {
                let (protection, length) = (libc::PROT_READ | libc::PROT_WRITE, 3 * 4096);
                let fd = vcpu.as_raw_fd();
                let null = std::ptr::null_mut();
                let area = libc::mmap(null, length, protection, libc::MAP_SHARED, fd, 0);
                assert_ne!(area, libc::MAP_FAILED);
                (area, libc::fork())
            };
            if child == 0 {
                let refused = [
                    ioctl(vcpu.as_raw_fd(), RUN, 0),
                    ioctl(kvm.as_raw_fd(), GET_API_VERSION, 0),
                ];
                // SAFETY: the mapping made above, and the child's descriptors; ends the process.
                unsafe {
                    libc::munmap(area, 3 * 4096);
                    libc::close(vcpu.as_raw_fd());
                    libc::_exit(i32::from(refused != [Err(libc::EIO); 2]));
                }
            }
            let mut status = -1;
            for _ in 0..2000 {
                // SAFETY: the child's ID, and room for its status.
                if unsafe { libc::waitpid(child, &mut status, libc::WNOHANG) } == child {
                    break;
                }
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
            if status != 0 {
                stop.store(true, std::sync::atomic::Ordering::Relaxed);
                // SAFETY: the child's ID.
                unsafe { libc::kill(child, libc::SIGKILL) };
            }
            assert_eq!(status, 0, "child {round}");
            // SAFETY: the mapping made above.
            assert_eq!(unsafe { libc::munmap(area, 3 * 4096) }, 0);
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}

static ASKED: std::sync::atomic::AtomicI32 = std::sync::atomic::AtomicI32::new(-1);

/// Makes calls that need what a call that it interrupts may hold.
extern "C" fn asks(_: libc::c_int) {
    const GET_REGS: u32 = 0x8090_ae81;
    let fd = ASKED.load(std::sync::atomic::Ordering::Relaxed);
    let mut regs = kvm_bindings::kvm_regs::default();
    assert!(ioctl(fd, GET_REGS, &raw mut regs as usize).is_ok());
}

#[test]
fn a_handler_may_ask_a_vcpu_whatever_it_interrupts() {
    if again("a_handler_may_ask_a_vcpu_whatever_it_interrupts") {
        return;
    }
    let (_kvm, _vm, mut vcpu) = machine();
    // SAFETY: a handler that makes system calls, and a thread that outlives the sender.
    let (handler, thread) = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = asks as extern "C" fn(libc::c_int) as usize;
        assert_eq!(
            libc::sigaction(libc::SIGUSR1, &action, std::ptr::null_mut()),
            0
        );
        (action.sa_sigaction, libc::pthread_self())
    };
    assert_ne!(handler, 0);
    ASKED.store(vcpu.as_raw_fd(), std::sync::atomic::Ordering::Relaxed);
    // Handlers are covered when a vCPU begins to run.
    let _ = vcpu.run();
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                // SAFETY: the thread waits for this one.
                unsafe { libc::pthread_kill(thread, libc::SIGUSR1) };
                std::thread::sleep(std::time::Duration::from_micros(20));
            }
        });
        for _ in 0..100_000 {
            let sregs = vcpu.get_sregs().unwrap();
            vcpu.set_sregs(&sregs).unwrap();
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}

extern "C" fn nothing(_: libc::c_int) {}

#[test]
fn a_handler_ends_a_run_as_soon_as_it_is_installed() {
    if again("a_handler_ends_a_run_as_soon_as_it_is_installed") {
        return;
    }
    // JMP to itself.
    let (_kvm, _vm, mut vcpu) = machine_with(&[0xeb, 0xfe]);
    // SAFETY: has no conditions.
    let thread = unsafe { libc::pthread_self() };
    std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(30));
        let signal = libc::SIGRTMIN() + 3;
        // SAFETY: a handler that does nothing; the thread joins this one.
        unsafe {
            libc::signal(signal, nothing as *const () as usize);
            libc::pthread_kill(thread, signal);
        }
    });
    assert_eq!(vcpu.run().unwrap_err().errno(), libc::EINTR);
}

#[test]
fn a_dirty_ring_is_mapped_shared() {
    if again("a_dirty_ring_is_mapped_shared") {
        return;
    }
    const RING: libc::off_t = kvm_bindings::KVM_DIRTY_LOG_PAGE_OFFSET as libc::off_t * 4096;
    let vm = Kvm::new().unwrap().create_vm().unwrap();
    let mut rings = kvm_bindings::kvm_enable_cap {
        cap: kvm_bindings::KVM_CAP_DIRTY_LOG_RING,
        ..Default::default()
    };
    rings.args[0] = 1 << 16;
    vm.enable_cap(&rings).unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    let map = |flags, protection, offset| {
        let fd = vcpu.as_raw_fd();
        // SAFETY: a new mapping at an address the kernel chooses, which stays.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), 4096, protection, flags, fd, offset) };
        at != libc::MAP_FAILED
    };
    let (plain, code) = (libc::PROT_READ | libc::PROT_WRITE, libc::PROT_EXEC);
    assert!(map(libc::MAP_SHARED, plain, RING));
    assert!(!map(libc::MAP_PRIVATE, plain, RING));
    assert!(!map(libc::MAP_SHARED, libc::PROT_READ | code, RING + 4096));
    assert!(
        map(libc::MAP_PRIVATE, plain, RING - 4096),
        "before the ring"
    );
    assert!(map(libc::MAP_PRIVATE, plain, RING + (1 << 16)), "behind it");
}

/// `pthread_cancel` of a thread in KVM_RUN that says it may be cancelled at any moment.
#[test]
fn a_thread_in_a_run_is_cancelled() {
    if again("a_thread_in_a_run_is_cancelled") {
        return;
    }
    const ASYNCHRONOUS: libc::c_int = 1;
    type Start = unsafe extern "C-unwind" fn(*mut libc::c_void) -> *mut libc::c_void;
    // As the C library has them: cancelling unwinds the stack.
    unsafe extern "C-unwind" {
        fn ioctl(fd: libc::c_int, request: libc::c_ulong, argument: usize) -> libc::c_int;
        fn pthread_setcanceltype(kind: libc::c_int, old: *mut libc::c_int) -> libc::c_int;
        fn pthread_cancel(thread: libc::pthread_t) -> libc::c_int;
        fn pthread_create(
            thread: *mut libc::pthread_t,
            attributes: *const libc::pthread_attr_t,
            start: Start,
            argument: *mut libc::c_void,
        ) -> libc::c_int;
    }
    unsafe extern "C-unwind" fn run(vcpu: *mut libc::c_void) -> *mut libc::c_void {
        let mut old = 0;
        // SAFETY: no frame of this thread has anything to drop.
        unsafe {
            pthread_setcanceltype(ASYNCHRONOUS, &mut old);
            ioctl(vcpu as libc::c_int, RUN.into(), 0);
        }
        std::ptr::null_mut()
    }
    // A jump to itself, and a halt without interrupts.
    for code in [&[0xeb, 0xfe][..], &[0xf4]] {
        let kvm = Kvm::new().unwrap();
        let vm = kvm.create_vm().unwrap();
        vm.create_irq_chip().unwrap();
        let (_kvm, _vm, vcpu) = machine_in(kvm, vm, code);
        let mut thread = 0;
        let mut ended_with = std::ptr::null_mut();
        // SAFETY: the thread is joined before anything of it goes away.
        unsafe {
            let vcpu = vcpu.as_raw_fd() as *mut libc::c_void;
            assert_eq!(pthread_create(&mut thread, std::ptr::null(), run, vcpu), 0);
            std::thread::sleep(std::time::Duration::from_millis(50));
            assert_eq!(pthread_cancel(thread), 0);
            assert_eq!(libc::pthread_join(thread, &mut ended_with), 0);
        }
        // PTHREAD_CANCELED.
        assert_eq!(ended_with as isize, -1);
    }
}
