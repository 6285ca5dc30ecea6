//! The C library's functions that set and tell what a signal does.
//!
//! Some signals processors need themselves; the program's dispositions of those are kept by
//! `eptide-kvm`. Handlers of others are covered, so that they end KVM_RUN, as soon as they are
//! installed. Of neither these functions tell the program.

use crate::next::next;
use crate::objects;
use kvm::Disposition;
use libc::{c_int, sighandler_t};

/// The disposition of the C library as the kernel has it.
fn to_kernel(action: &libc::sigaction) -> Disposition {
    Disposition {
        handler: action.sa_sigaction,
        flags: action.sa_flags as u32 as u64,
        restorer: 0,
        // SAFETY: the set's first word is the kernel's set.
        mask: unsafe { (&raw const action.sa_mask).cast::<u64>().read() },
    }
}

/// The kernel's disposition, over one of the C library's.
fn from_kernel(found: &Disposition, action: &mut libc::sigaction) {
    action.sa_sigaction = found.handler;
    action.sa_flags = found.flags as c_int;
    // SAFETY: as above.
    unsafe { (&raw mut action.sa_mask).cast::<u64>().write(found.mask) };
    // SAFETY: an address or zero, which is none.
    action.sa_restorer =
        unsafe { std::mem::transmute::<usize, Option<extern "C" fn()>>(found.restorer) };
}

/// `sigaction`.
///
/// # Safety
///
/// As of the C library's.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn sigaction(
    signal: c_int,
    new: *const libc::sigaction,
    old: *mut libc::sigaction,
) -> c_int {
    // SAFETY: the program's structure, or null.
    let wanted = unsafe { new.as_ref() }.map(to_kernel);
    if let Some(found) = kept(signal, wanted.as_ref()) {
        // SAFETY: the program's structure, or null; zeroes are a valid one.
        unsafe {
            if !old.is_null() {
                old.write(std::mem::zeroed());
                from_kernel(&found, &mut *old);
            }
        }
        return 0;
    }
    let result = next!(sigaction(
        signal: c_int,
        new: *const libc::sigaction,
        old: *mut libc::sigaction
    ) -> c_int);
    if result != 0 || !objects::is_used() {
        return result;
    }
    // SAFETY: the program's structure, or null.
    if let Some(old) = unsafe { old.as_mut() } {
        let mut found = to_kernel(old);
        found.restorer = old.sa_restorer.map_or(0, |restorer| restorer as usize);
        from_kernel(&kvm::as_the_program_meant(signal, found), old);
    }
    if wanted.is_some() {
        objects::handler_installed(signal);
    }
    result
}

/// Exchanges the disposition of a signal that processors need; `None` for others.
fn kept(signal: c_int, new: Option<&Disposition>) -> Option<Disposition> {
    if !objects::is_used() {
        return None;
    }
    kvm::exchange_kept_disposition(signal, new)
}

/// The functions that set a handler alone: what flags and what own mask they give it.
macro_rules! setters {
    ($($name:ident: $flags:expr, $is_blocked:expr;)*) => {
        $(
            #[doc = concat!("`", stringify!($name), "`.\n\n# Safety\n\nAs of the C library's.")]
            #[unsafe(no_mangle)]
            pub(crate) unsafe extern "C" fn $name(signal: c_int, handler: sighandler_t) -> sighandler_t {
                let mask = if $is_blocked { 1u64.unbounded_shl((signal - 1) as u32) } else { 0 };
                let flags = $flags as u32 as u64;
                let new = Disposition { handler, flags, restorer: 0, mask };
                if let Some(found) = kept(signal, Some(&new)) {
                    return found.handler;
                }
                let old = next!($name(signal: c_int, handler: sighandler_t) -> sighandler_t);
                told(signal, old)
            }
        )*
    };
}

setters! {
    signal: libc::SA_RESTART, true;
    bsd_signal: libc::SA_RESTART, true;
    ssignal: libc::SA_RESTART, true;
    __sysv_signal: libc::SA_RESETHAND | libc::SA_NODEFER, false;
    sysv_signal: libc::SA_RESETHAND | libc::SA_NODEFER, false;
}

/// What the program is told of the handler there was, after it has set another.
fn told(signal: c_int, old: sighandler_t) -> sighandler_t {
    if old == libc::SIG_ERR || !objects::is_used() {
        return old;
    }
    let found = Disposition {
        handler: old,
        ..Disposition::default()
    };
    let meant = kvm::as_the_program_meant(signal, found).handler;
    objects::handler_installed(signal);
    meant
}
