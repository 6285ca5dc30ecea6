//! Executing one instruction on the host processor with chosen registers.
//!
//! A signal handler replaces the interrupted context by the wanted one; the instruction's own
//! fault, or the INT3 behind it, comes back as a signal whose context holds the result.

use super::{State, segments};
use std::cell::{Cell, RefCell};
use std::sync::Once;

/// How the instruction ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trap {
    pub vector: u8,
    pub address: u64,
    pub error: u32,
}

thread_local! {
    static WANTED: RefCell<Option<State>> = const { RefCell::new(None) };
    static RESULT: RefCell<Option<(State, Trap)>> = const { RefCell::new(None) };
    static SAVED: RefCell<Option<Saved>> = const { RefCell::new(None) };
    static RUNNING: Cell<bool> = const { Cell::new(false) };
}

/// The context to go back to.
struct Saved {
    gregs: [i64; 23],
    fpu: Vec<u8>,
}

const SIGNALS: [i32; 5] = [
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGFPE,
    libc::SIGILL,
    libc::SIGTRAP,
];

static mut PREVIOUS: [Option<libc::sigaction>; 65] = [None; 65];

/// Order of general-purpose registers in `gregs`, by encoding number.
const GREGS: [i32; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

/// Bytes of the XSAVE image that are compared and replaced: legacy region, header, AVX.
const FPU: usize = 832;

/// Gives this thread a stack for signals and, once, the process its handler.
pub fn install() {
    static HANDLERS: Once = Once::new();
    // SAFETY: plain signal set-up; the alternate stack is leaked and lives on.
    unsafe {
        let stack = Box::leak(vec![0u8; 1 << 18].into_boxed_slice());
        let alternate = libc::stack_t {
            ss_sp: stack.as_mut_ptr().cast(),
            ss_flags: 0,
            ss_size: stack.len(),
        };
        assert_eq!(libc::sigaltstack(&alternate, std::ptr::null_mut()), 0);
    }
    HANDLERS.call_once(|| {
        for signal in SIGNALS.into_iter().chain([libc::SIGUSR1]) {
            // SAFETY: the structures are valid for the call; what was there before is kept for
            // the handler, which cannot run for this signal yet.
            unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = handler as *const () as usize;
                action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
                let mut previous: libc::sigaction = std::mem::zeroed();
                assert_eq!(libc::sigaction(signal, &action, &mut previous), 0);
                PREVIOUS[signal as usize] = Some(previous);
            }
        }
    });
}

/// Runs the instruction at `state.rip` (with INT3 behind it) natively.
pub fn run(state: &State) -> (State, Trap) {
    WANTED.set(Some(state.clone()));
    segments::load_data_segments(state.ds);
    // SAFETY: delivered to this thread at once; the handler switches contexts and back.
    unsafe { libc::raise(libc::SIGUSR1) };
    RESULT
        .take()
        .expect("the instruction came back with a signal")
}

extern "C" fn handler(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel's context; `fpregs` points to the XSAVE image in the signal frame.
    let (gregs, fpu) = unsafe {
        let machine = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext;
        let fpu = std::slice::from_raw_parts_mut(machine.fpregs.cast::<u8>(), FPU);
        (&mut machine.gregs, fpu)
    };
    if signal == libc::SIGUSR1 {
        let Some(wanted) = WANTED.take() else { return };
        SAVED.set(Some(Saved {
            gregs: *gregs,
            fpu: fpu.to_vec(),
        }));
        for (n, slot) in GREGS.into_iter().enumerate() {
            gregs[slot as usize] = wanted.gpr[n] as i64;
        }
        gregs[libc::REG_RIP as usize] = wanted.rip as i64;
        gregs[libc::REG_EFL as usize] = (wanted.rflags | 0x202) as i64;
        let selectors = &mut gregs[libc::REG_CSGSFS as usize];
        *selectors &= 0x0000_ffff_ffff_0000;
        *selectors |= i64::from(wanted.cs) | i64::from(wanted.ss) << 48;
        fpu[..416].copy_from_slice(&wanted.fpu[..416]);
        // x87, SSE and AVX are present in the image, whatever was in use before.
        fpu[512] |= 7;
        fpu[576..FPU].copy_from_slice(&wanted.fpu[576..FPU]);
        RUNNING.set(true);
        return;
    }
    if !RUNNING.get() {
        // SAFETY: written once in `install`, before this handler could run.
        let previous = unsafe { PREVIOUS[signal as usize] };
        let Some(previous) = previous else { return };
        match previous.sa_sigaction {
            // SAFETY: restores the default action; the fault strikes again and ends the process.
            libc::SIG_DFL | libc::SIG_IGN => unsafe {
                libc::signal(signal, libc::SIG_DFL);
            },
            // SAFETY: handlers installed before are of this type (SA_SIGINFO).
            handler => unsafe {
                let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) =
                    std::mem::transmute(handler);
                handler(signal, info, context);
            },
        }
        return;
    }
    RUNNING.set(false);
    let mut state = State::default();
    for (n, slot) in GREGS.into_iter().enumerate() {
        state.gpr[n] = gregs[slot as usize] as u64;
    }
    state.rip = gregs[libc::REG_RIP as usize] as u64;
    state.rflags = gregs[libc::REG_EFL as usize] as u64;
    let selectors = gregs[libc::REG_CSGSFS as usize];
    (state.cs, state.ss) = (selectors as u16, (selectors >> 48) as u16);
    state.fpu[..416].copy_from_slice(&fpu[..416]);
    // A component that the image leaves out is in its initial state.
    let present = fpu[512];
    if present & 4 != 0 {
        state.fpu[576..FPU].copy_from_slice(&fpu[576..FPU]);
    }
    if present & 2 == 0 {
        state.fpu[160..416].fill(0);
    }
    if present & 1 == 0 {
        state.fpu[..24].fill(0);
        state.fpu[0..2].copy_from_slice(&0x37fu16.to_le_bytes());
        state.fpu[32..160].fill(0);
    }
    let trap = Trap {
        vector: gregs[libc::REG_TRAPNO as usize] as u8,
        address: gregs[libc::REG_CR2 as usize] as u64,
        error: gregs[libc::REG_ERR as usize] as u32,
    };
    RESULT.set(Some((state, trap)));
    if let Some(saved) = SAVED.take() {
        *gregs = saved.gregs;
        fpu.copy_from_slice(&saved.fpu);
    }
}
