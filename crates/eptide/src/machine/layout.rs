//! Where things lie in a guest's physical address space and which interrupt lines devices use.
//!
//! The map follows the PC so that stock kernels feel at home:
//!
//! ```text
//! 0x0000_0500  GDT of the boot processor
//! 0x0000_6000  PVH start info, module list, memory map
//! 0x0000_7000  Linux zero page
//! 0x0000_9000  identity page tables (PML4, PDPT, four page directories)
//! 0x0002_0000  kernel command line
//! 0x0009_fc00  end of conventional memory
//! 0x000e_0000  ACPI tables, RSDP first
//! 0x0010_0000  kernel and initramfs
//! 0xc000_0000  hole for devices up to 4 GiB: virtio-mmio, IOAPIC, local APIC, KVM's TSS pages
//! 0x1_0000_0000  the rest of memory
//! ```

/// GDT the boot processor starts with.
pub(crate) const BOOT_GDT: u64 = 0x500;
/// `hvm_start_info` of a PVH boot.
pub(crate) const PVH_START_INFO: u64 = 0x6000;
/// Module list of a PVH boot.
pub(crate) const PVH_MODULES: u64 = 0x6040;
/// Memory map of a PVH boot.
pub(crate) const PVH_MEMORY_MAP: u64 = 0x6080;
/// Linux's `struct boot_params`.
pub(crate) const ZERO_PAGE: u64 = 0x7000;
/// Initial stack pointer; grows down towards the zero page's end.
pub(crate) const BOOT_STACK: u64 = 0x8ff0;
/// First of the six pages of identity-mapping page tables.
pub(crate) const BOOT_PML4: u64 = 0x9000;
/// Kernel command line.
pub(crate) const COMMAND_LINE: u64 = 0x2_0000;
/// Room for the command line, the terminating zero included.
pub(crate) const COMMAND_LINE_MAX: usize = 0x1_0000;
/// End of conventional memory; an EBDA would start here.
pub(crate) const CONVENTIONAL_END: u64 = 0x9_fc00;
/// ACPI tables; the RSDP is at the very start, where a scan finds it.
pub(crate) const ACPI_TABLES: u64 = 0xe_0000;
/// End of the area for ACPI tables.
pub(crate) const ACPI_TABLES_END: u64 = 0x10_0000;
/// Start of high memory.
pub(crate) const HIGH_MEMORY: u64 = 0x10_0000;
/// Guest memory below 4 GiB ends here at the latest.
pub(crate) const DEVICE_HOLE: u64 = 0xc000_0000;
/// Guest memory beyond [`DEVICE_HOLE`] continues here.
pub(crate) const ABOVE_4G: u64 = 0x1_0000_0000;

/// First virtio-mmio register window.
pub(crate) const VIRTIO_MMIO: u64 = 0xd000_0000;
/// Distance between virtio-mmio windows, and their size.
pub(crate) const VIRTIO_MMIO_STRIDE: u64 = 0x1000;
/// The I/O APIC of KVM's in-kernel interrupt controllers.
pub(crate) const IOAPIC: u32 = 0xfec0_0000;
/// The local APICs.
pub(crate) const LOCAL_APIC: u32 = 0xfee0_0000;
/// One page for `KVM_SET_IDENTITY_MAP_ADDR`, three after it for `KVM_SET_TSS_ADDR`.
pub(crate) const KVM_IDENTITY_MAP: u64 = 0xfeff_c000;
/// See [`KVM_IDENTITY_MAP`].
pub(crate) const KVM_TSS: u64 = KVM_IDENTITY_MAP + 0x1000;

/// First serial port.
pub(crate) const COM1_PORT: u16 = 0x3f8;
/// Interrupt line of the first serial port.
pub(crate) const COM1_GSI: u32 = 4;
/// Second serial port: what the guest reports about the command it was booted for.
pub(crate) const COM2_PORT: u16 = 0x2f8;
/// Interrupt line of the second serial port.
pub(crate) const COM2_GSI: u32 = 3;
/// Command and status port of the keyboard controller.
pub(crate) const I8042_PORT: u16 = 0x64;
/// ACPI PM1 event block (status, enable), PM1 control and the reset register, in this order.
pub(crate) const ACPI_PM_PORT: u16 = 0x600;
/// Interrupt line for ACPI's SCI.
pub(crate) const SCI_GSI: u32 = 9;
/// PCI configuration mechanism 1, address and data.
pub(crate) const PCI_CONFIG_PORT: u16 = 0xcf8;

/// Interrupt lines for virtio devices, in the order in which they are given out: the I/O APIC's
/// own lines first, then ISA lines that nothing else uses.
pub(crate) const VIRTIO_GSIS: [u32; 15] = [16, 17, 18, 19, 20, 21, 22, 23, 5, 6, 7, 10, 11, 14, 15];

const _: () = assert!(PVH_MEMORY_MAP < ZERO_PAGE && ZERO_PAGE + 0x1000 < BOOT_STACK);
const _: () = assert!(BOOT_PML4 + 6 * 0x1000 <= COMMAND_LINE);
const _: () = assert!(COMMAND_LINE + COMMAND_LINE_MAX as u64 <= CONVENTIONAL_END);
