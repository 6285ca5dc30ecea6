//! The machine's devices, one file each. A device knows its registers and nothing of where on the
//! bus it sits; `machine` wires it up.

pub(crate) mod acpi_pm;
pub(crate) mod i8042;
pub(crate) mod pci;
pub(crate) mod serial;
pub(crate) mod virtio;
