//! The errno at the edge of every call.
//!
//! Inside, results say what happened in their own types; an errno is chosen once, where a call of
//! the KVM API ends. The type is `kvm-ioctls`' own, so callers compare the same values.

pub use vmm_sys_util::errno::Error;

/// What calls of the KVM API return.
pub(crate) type Result<T> = std::result::Result<T, Error>;

/// An `Err` holding `errno`.
pub(crate) fn fail<T>(errno: i32) -> Result<T> {
    Err(Error::new(errno))
}
