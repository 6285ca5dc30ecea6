//! What goes into the demonstration's initramfs; the format's writer is in `packages::archive`.

pub(crate) mod modules;
