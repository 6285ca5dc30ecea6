//! What is not Eptide's signal behaves as if Eptide were not there: a program that raises, or is
//! sent, the signals that instructions raise ends as it does natively, and its handlers see the
//! same.
//!
//! Each case is this program once more, without the library and with it (and then with a VM whose
//! vCPU has run): what both print and how they end must be the same.

use std::fmt::Write as _;
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Names the case in the environment.
const CASE: &str = "EPTIDE_TEST_FAULT_CASE";
/// Set in the run that has the library.
const MARK: &str = "EPTIDE_TEST_IS_PRELOADED";

const SIGNALS: [(&str, i32); 5] = [
    ("SEGV", libc::SIGSEGV),
    ("BUS", libc::SIGBUS),
    ("FPE", libc::SIGFPE),
    ("ILL", libc::SIGILL),
    ("TRAP", libc::SIGTRAP),
];

/// What the program does with the signal.
const DISPOSITIONS: [&str; 15] = [
    "default",
    "ignore",
    "return",
    "restore",
    "once",
    "once-informed",
    "chain",
    "chain-default",
    "mask",
    "nodefer",
    "on-stack",
    "off-stack",
    "blocked",
    "jump",
    "early",
];

/// Which thread takes it.
const PLACES: [&str; 4] = ["own", "vcpu", "running", "child"];

/// How it comes.
const CAUSES: [&str; 3] = ["instruction", "thread", "process"];

fn start(case: &str, is_preloaded: bool) -> Child {
    let program = std::env::current_exe().unwrap();
    let mut command = Command::new(&program);
    command
        .args(["subject", "--exact", "--nocapture", "--test-threads=1"])
        .env(CASE, case)
        .env("RUST_BACKTRACE", "0")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    if is_preloaded {
        let library = program.with_file_name("libeptide_preload.so");
        assert!(library.is_file(), "{} is missing", library.display());
        command.env("LD_PRELOAD", library).env(MARK, "");
    }
    command.spawn().unwrap()
}

/// How the program ended, and what it printed.
fn outcome(mut child: Child) -> String {
    let start = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if start.elapsed() > Duration::from_secs(20) {
            child.kill().unwrap();
            child.wait().unwrap();
            return "does not end".into();
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    let mut printed = String::new();
    child.stdout.unwrap().read_to_string(&mut printed).unwrap();
    let lines: Vec<_> = printed
        .lines()
        .filter(|line| line.starts_with("# "))
        .collect();
    let signal = status.signal();
    format!(
        "status {:?}, signal {signal:?}\n{}",
        status.code(),
        lines.join("\n")
    )
}

/// All cases of one signal.
fn compare(signal: &str) {
    let mut cases = Vec::new();
    for disposition in DISPOSITIONS {
        for place in PLACES {
            for cause in CAUSES {
                // In the middle of KVM_RUN a program has no instructions.
                let has_none = place == "running" && cause != "thread";
                // Which thread takes what is sent to a process is the kernel's choice.
                let is_any = place == "vcpu" && cause == "process";
                // A handler that was put off runs on the stack of KVM_RUN's caller, and finds where
                // that was, which it cannot change.
                let is_late = place == "running" && ["on-stack", "jump"].contains(&disposition);
                if !has_none && !is_any && !is_late {
                    cases.push(format!("{signal} {disposition} {place} {cause}"));
                }
            }
        }
    }
    let mut differences = String::new();
    for case in cases {
        let (native, here) = (start(&case, false), start(&case, true));
        let (native, here) = (outcome(native), outcome(here));
        if native != here {
            let _ = writeln!(differences, "== {case}\nnatively {native}\nhere {here}");
        }
    }
    assert!(differences.is_empty(), "{differences}");
}

#[test]
fn segmentation_faults_are_the_programs() {
    compare("SEGV");
}

#[test]
fn bus_errors_are_the_programs() {
    compare("BUS");
}

#[test]
fn arithmetic_errors_are_the_programs() {
    compare("FPE");
}

#[test]
fn illegal_instructions_are_the_programs() {
    compare("ILL");
}

#[test]
fn traps_are_the_programs() {
    compare("TRAP");
}

/// The program that the cases run: nothing where no case is named.
#[test]
fn subject() {
    let Ok(case) = std::env::var(CASE) else {
        return;
    };
    let words: Vec<_> = case.split(' ').collect();
    let [name, disposition, place, cause] = words[..] else {
        panic!("{case}");
    };
    let signal = SIGNALS.iter().find(|s| s.0 == name).unwrap().1;
    subject::run(signal, disposition, place, cause);
    // Without the harness' words, which tell the time.
    std::process::exit(0);
}

mod subject {
    use super::*;
    use kvm_ioctls::{Kvm, VcpuFd, VmFd};

    static SIGNAL: AtomicI32 = AtomicI32::new(0);
    static HANDLED: AtomicUsize = AtomicUsize::new(0);
    static TOLD: Mutex<Option<libc::sigaction>> = Mutex::new(None);

    fn print(text: &str) {
        let line = format!("# {text}\n");
        // SAFETY: the bytes are there.
        unsafe { libc::write(1, line.as_ptr().cast(), line.len()) };
    }

    /// A VM that has run, if there is a device for it; the next KVM_RUN spins.
    fn machine() -> Option<(Kvm, VmFd, VcpuFd)> {
        std::env::var_os(MARK)?;
        let kvm = Kvm::new().unwrap();
        let vm = kvm.create_vm().unwrap();
        // SAFETY: a new mapping at an address the kernel chooses, which stays.
        let memory = unsafe {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
            libc::mmap(std::ptr::null_mut(), 4096, protection, flags, -1, 0)
        };
        // A halt, and a jump to itself.
        let code = [0xf4u8, 0xeb, 0xfe];
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
        Some((kvm, vm, vcpu))
    }

    fn blocked() -> u64 {
        let mut mask = 0u64;
        // SAFETY: the kernel writes eight bytes.
        unsafe {
            let none = std::ptr::null::<u64>();
            libc::syscall(libc::SYS_rt_sigprocmask, 0, none, &raw mut mask, 8);
        }
        mask
    }

    fn is_on_alternate_stack() -> bool {
        // SAFETY: the kernel fills the structure.
        unsafe {
            let mut stack: libc::stack_t = std::mem::zeroed();
            libc::sigaltstack(std::ptr::null(), &mut stack);
            stack.ss_flags & libc::SS_ONSTACK != 0
        }
    }

    fn report(who: &str, signal: i32, info: *mut libc::siginfo_t) {
        // SAFETY: handlers of this program are given information on the signal.
        let (code, address) = unsafe { ((*info).si_code, (*info).si_addr() as usize) };
        // Where it was sent, the field is the sender.
        let address = if code > 0 && address < 4096 {
            address
        } else {
            0
        };
        let (mask, stack) = (blocked(), is_on_alternate_stack());
        print(&format!(
            "{who}: signal {signal}, code {code}, address {address}, blocked {mask:x}, other stack {stack}"
        ));
        if HANDLED.fetch_add(1, Ordering::Relaxed) == 2 {
            // SAFETY: ends the process.
            unsafe { libc::_exit(7) };
        }
    }

    extern "C" fn handler(signal: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
        report("handler", signal, info);
    }

    extern "C" fn first(signal: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
        report("first", signal, info);
        // SAFETY: ends the process.
        unsafe { libc::_exit(3) };
    }

    extern "C" fn plain(signal: i32) {
        let count = HANDLED.fetch_add(1, Ordering::Relaxed);
        print(&format!("plain: signal {signal}, blocked {:x}", blocked()));
        if count == 2 {
            // SAFETY: ends the process.
            unsafe { libc::_exit(7) };
        }
    }

    extern "C" fn restoring(signal: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
        report("restoring", signal, info);
        // SAFETY: has no conditions.
        let old = unsafe { libc::signal(signal, libc::SIG_DFL) };
        print(&format!("restored from {}", name(old)));
    }

    /// Does what whoever was there before does.
    extern "C" fn chaining(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
        report("chaining", signal, info);
        let Some(told) = *TOLD.lock().unwrap() else {
            return;
        };
        if [libc::SIG_DFL, libc::SIG_IGN].contains(&told.sa_sigaction) {
            // SAFETY: a disposition that there was.
            unsafe { libc::sigaction(signal, &told, std::ptr::null_mut()) };
            return;
        }
        // SAFETY: a handler of this type.
        let before: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) =
            unsafe { std::mem::transmute(told.sa_sigaction) };
        before(signal, info, context);
    }

    extern "C" fn elsewhere() -> ! {
        print("jumped");
        // SAFETY: ends the process.
        unsafe { libc::_exit(5) }
    }

    extern "C" fn jumping(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
        report("jumping", signal, info);
        // SAFETY: the kernel's context.
        let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
        let stack = &mut registers[libc::REG_RSP as usize];
        *stack = (*stack - 1024) & !15 | 8;
        registers[libc::REG_RIP as usize] = elsewhere as *const () as i64;
    }

    fn name(handler: usize) -> &'static str {
        let known: [(usize, &str); 8] = [
            (libc::SIG_DFL, "default"),
            (libc::SIG_IGN, "ignored"),
            (handler_address(), "handler"),
            (first as *const () as usize, "first"),
            (plain as *const () as usize, "plain"),
            (restoring as *const () as usize, "restoring"),
            (chaining as *const () as usize, "chaining"),
            (jumping as *const () as usize, "jumping"),
        ];
        let found = known.iter().find(|(address, _)| *address == handler);
        found.map_or("unknown", |(_, name)| name)
    }

    fn handler_address() -> usize {
        handler as *const () as usize
    }

    fn describe(action: &libc::sigaction) -> String {
        // SAFETY: the set's first word is the kernel's set.
        let mask = unsafe { (&raw const action.sa_mask).cast::<u64>().read() };
        let name = name(action.sa_sigaction);
        format!("{name}, flags {:x}, mask {mask:x}", action.sa_flags)
    }

    fn set(signal: i32, handler: usize, flags: i32, mask: &[i32]) {
        // SAFETY: structures for the calls; handlers of this program.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler;
            action.sa_flags = flags;
            for &signal in mask {
                libc::sigaddset(&mut action.sa_mask, signal);
            }
            let mut old: libc::sigaction = std::mem::zeroed();
            assert_eq!(libc::sigaction(signal, &action, &mut old), 0);
            print(&format!("before: {}", describe(&old)));
            *TOLD.lock().unwrap() = Some(old);
            libc::sigaction(signal, std::ptr::null(), &mut old);
            print(&format!("is: {}", describe(&old)));
        }
    }

    fn use_alternate_stack() {
        // SAFETY: memory that stays.
        unsafe {
            let memory = Vec::leak(vec![0u8; 1 << 17]);
            let stack = libc::stack_t {
                ss_sp: memory.as_mut_ptr().cast(),
                ss_flags: 0,
                ss_size: memory.len(),
            };
            assert_eq!(libc::sigaltstack(&stack, std::ptr::null_mut()), 0);
        }
    }

    fn block(signal: i32) {
        // SAFETY: sigemptyset makes the set valid.
        unsafe {
            let mut set = std::mem::zeroed();
            libc::sigemptyset(&mut set);
            libc::sigaddset(&mut set, signal);
            libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
        }
    }

    /// Before there is a VM.
    fn prepare(signal: i32, disposition: &str) {
        // SAFETY: has no conditions.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
        match disposition {
            "chain" => set(signal, first as *const () as usize, libc::SA_SIGINFO, &[]),
            "early" => {
                let flags = libc::SA_SIGINFO | libc::SA_RESETHAND | libc::SA_RESTART;
                set(signal, handler_address(), flags, &[libc::SIGUSR1]);
            }
            _ => {}
        }
    }

    /// When there is one.
    fn dispose(signal: i32, disposition: &str) {
        let informed = libc::SA_SIGINFO;
        match disposition {
            "default" => set(signal, libc::SIG_DFL, 0, &[]),
            "ignore" => set(signal, libc::SIG_IGN, libc::SA_RESTART, &[libc::SIGUSR1]),
            "return" => {
                // SAFETY: a handler of this program.
                let old = unsafe { libc::signal(signal, plain as *const () as usize) };
                print(&format!("before: {}", name(old)));
            }
            "restore" => set(signal, restoring as *const () as usize, informed, &[]),
            "once" => set(signal, plain as *const () as usize, libc::SA_RESETHAND, &[]),
            "once-informed" => {
                let flags = informed | libc::SA_RESETHAND | libc::SA_NODEFER;
                set(signal, handler_address(), flags, &[]);
            }
            "chain" | "chain-default" => set(signal, chaining as *const () as usize, informed, &[]),
            "mask" => {
                let mask = [libc::SIGUSR1, libc::SIGUSR2, libc::SIGALRM];
                set(signal, handler_address(), informed, &mask);
            }
            "nodefer" => {
                let flags = informed | libc::SA_NODEFER;
                set(signal, handler_address(), flags, &[libc::SIGUSR1]);
            }
            "on-stack" => {
                set(signal, handler_address(), informed | libc::SA_ONSTACK, &[]);
            }
            "off-stack" => set(signal, handler_address(), informed, &[]),
            "jump" => set(signal, jumping as *const () as usize, informed, &[]),
            "blocked" | "early" => {}
            other => panic!("{other}"),
        }
    }

    /// In the thread that takes the signal.
    fn settle(signal: i32, disposition: &str) {
        use_alternate_stack();
        if disposition == "blocked" {
            block(signal);
        }
    }

    fn raise(signal: i32, cause: &str) {
        match cause {
            // SAFETY: what the test is about.
            "instruction" => unsafe { execute(signal) },
            // SAFETY: to this thread.
            "thread" => unsafe { assert_eq!(libc::raise(signal), 0) },
            _ => {
                // SAFETY: to this process.
                unsafe { assert_eq!(libc::kill(libc::getpid(), signal), 0) };
                // Another thread may take it.
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }

    unsafe fn execute(signal: i32) {
        use std::arch::asm;
        // SAFETY: the instruction's signal comes before it has an effect.
        unsafe {
            match signal {
                libc::SIGSEGV => asm!("mov dword ptr [{0}], 1", in(reg) 8usize),
                libc::SIGFPE => {
                    asm!("div {0:e}", in(reg) 0, inout("eax") 1 => _, inout("edx") 0 => _);
                }
                libc::SIGILL => asm!("ud2"),
                libc::SIGTRAP => asm!("int3"),
                _ => {
                    let file = libc::memfd_create(c"empty".as_ptr(), 0);
                    let (protection, flags) = (libc::PROT_READ, libc::MAP_SHARED);
                    let page = libc::mmap(std::ptr::null_mut(), 4096, protection, flags, file, 0);
                    page.cast::<u8>().read_volatile();
                }
            }
        }
    }

    /// KVM_RUN of a guest that spins, or natively a wait: a signal that is handled ends either.
    fn wait(vcpu: Option<VcpuFd>) {
        static IS_READY: AtomicBool = AtomicBool::new(false);
        // SAFETY: has no conditions.
        let thread = unsafe { libc::pthread_self() };
        std::thread::spawn(move || {
            while !IS_READY.load(Ordering::Relaxed) {
                std::thread::yield_now();
            }
            std::thread::sleep(Duration::from_millis(30));
            // SAFETY: the thread waits.
            unsafe { libc::pthread_kill(thread, SIGNAL.load(Ordering::Relaxed)) };
            std::thread::sleep(Duration::from_millis(30));
            print("goes on");
            // SAFETY: ends the process.
            unsafe { libc::_exit(0) };
        });
        IS_READY.store(true, Ordering::Relaxed);
        let errno = match vcpu {
            Some(mut vcpu) => vcpu.run().unwrap_err().errno(),
            None => {
                let time = libc::timespec {
                    tv_sec: 60,
                    tv_nsec: 0,
                };
                // SAFETY: a time.
                unsafe { libc::nanosleep(&time, std::ptr::null_mut()) };
                std::io::Error::last_os_error().raw_os_error().unwrap()
            }
        };
        print(&format!("the wait ended: {errno}"));
        // SAFETY: ends the process.
        unsafe { libc::_exit(0) };
    }

    pub(super) fn run(signal: i32, disposition: &str, place: &str, cause: &str) {
        let none = libc::rlimit {
            rlim_cur: 0,
            rlim_max: 0,
        };
        // SAFETY: a limit of this process.
        unsafe { libc::setrlimit(libc::RLIMIT_CORE, &none) };
        // Not behind what the harness says.
        println!();
        SIGNAL.store(signal, Ordering::Relaxed);
        prepare(signal, disposition);
        let mut machine = machine();
        if let Some((_, _, vcpu)) = &mut machine {
            vcpu.run().unwrap();
        }
        dispose(signal, disposition);
        let go = |machine: Option<(Kvm, VmFd, VcpuFd)>| {
            settle(signal, disposition);
            if place == "running" {
                wait(machine.map(|machine| machine.2));
            }
            raise(signal, cause);
            print("goes on");
        };
        match place {
            "own" => go(machine),
            "vcpu" | "running" => std::thread::scope(|scope| {
                scope.spawn(|| go(machine));
            }),
            // SAFETY: a child with one thread.
            _ => match unsafe { libc::fork() } {
                0 => {
                    go(None);
                    // SAFETY: ends the process.
                    unsafe { libc::_exit(0) };
                }
                child => {
                    let mut status = 0;
                    // SAFETY: the child's ID, and room for its status.
                    unsafe { libc::waitpid(child, &mut status, 0) };
                    print(&format!("the child's status: {status:x}"));
                }
            },
        }
    }
}
