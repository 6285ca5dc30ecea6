//! The functions that this library's stand in front of: the C library's, or another preloaded
//! library's.

use std::ffi::CStr;
use std::sync::atomic::{AtomicPtr, Ordering};

/// A function of the next library that defines it.
pub(crate) struct Next {
    name: &'static CStr,
    address: AtomicPtr<libc::c_void>,
}

impl Next {
    pub(crate) const fn new(name: &'static CStr) -> Next {
        Next {
            name,
            address: AtomicPtr::new(std::ptr::null_mut()),
        }
    }

    /// Its address; null if no library has it.
    pub(crate) fn address(&self) -> *mut libc::c_void {
        let known = self.address.load(Ordering::Relaxed);
        if !known.is_null() {
            return known;
        }
        // SAFETY: the name is a C string; looking it up has no conditions.
        let found = unsafe { libc::dlsym(libc::RTLD_NEXT, self.name.as_ptr()) };
        self.address.store(found, Ordering::Relaxed);
        found
    }
}

/// Calls the next function of a name with the signature given; `ENOSYS` if there is none.
///
/// The caller vouches for the signature and the arguments.
macro_rules! next {
    ($name:ident($($argument:ident: $type:ty),*) -> $result:ty) => {{
        const NAME: &std::ffi::CStr =
            match std::ffi::CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes()) {
                Ok(name) => name,
                Err(_) => panic!("a literal with one zero, at its end"),
            };
        static NEXT: $crate::next::Next = $crate::next::Next::new(NAME);
        $crate::next::call_next!(NEXT, ($($argument: $type),*) -> $result)
    }};
}

/// As [`next!`], with the function's [`Next`] given.
macro_rules! call_next {
    ($next:expr, ($($argument:ident: $type:ty),*) -> $result:ty) => {{
        type Function = unsafe extern "C" fn($($type),*) -> $result;
        // SAFETY: the function of this name has this signature, and an address is one or null.
        let function = unsafe {
            std::mem::transmute::<*mut std::ffi::c_void, Option<Function>>($next.address())
        };
        match function {
            // SAFETY: the arguments are the program's own.
            Some(function) => unsafe { function($($argument),*) },
            None => $crate::symbols::fail(libc::ENOSYS),
        }
    }};
}
pub(crate) use {call_next, next};
