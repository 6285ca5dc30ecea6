//! ACPI tables: what tells a kernel how many processors there are, where the interrupt
//! controllers and virtio devices sit, and how to switch the machine off.
//!
//! ```text
//! RSDP → XSDT → FADT → DSDT   (\_S5, COM1, virtio-mmio devices)
//!             │      → FACS
//!             → MADT          (local APICs, I/O APIC, overrides, NMI)
//! ```
//!
//! The platform is not "hardware-reduced": stock kernels then keep the PIC, the PIT and the I/O
//! APIC in the roles they have on a PC. SMI_CMD is zero, which says that ACPI mode is always on.

use acpi_tables::aml::{
    self, Device, EISAName, IO, Interrupt, Memory32Fixed, Name, ResourceTemplate,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::layout::{
    ACPI_PM_PORT, ACPI_TABLES, ACPI_TABLES_END, COM1_GSI, COM1_PORT, IOAPIC, LOCAL_APIC, SCI_GSI,
};
use super::memory::GuestMemory;
use crate::devices::acpi_pm::{PM1_CONTROL, PM1_EVENT, RESET, RESET_VALUE, SLEEP_TYPE_S5};

const OEM_ID: [u8; 6] = *b"EPTIDE";
const OEM_TABLE_ID: [u8; 8] = *b"EPTIDEVM";
const OEM_REVISION: u32 = 1;

/// Largest APIC id that a plain local APIC structure can carry.
const XAPIC_ID_MAX: u32 = 254;

/// A virtio-mmio window as the DSDT describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct VirtioWindow {
    /// First address.
    pub(crate) address: u64,
    /// Length in bytes.
    pub(crate) size: u64,
    /// Interrupt line.
    pub(crate) gsi: u32,
}

/// Why the tables cannot be written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AcpiError {
    /// Too many processors or devices.
    #[error("the ACPI tables need {0} bytes, more than their area holds")]
    TooLarge(usize),
    /// The area is not guest memory.
    #[error("the ACPI tables do not fit into guest memory: {0}")]
    Memory(#[from] GuestMemoryError),
}

/// Writes all tables; the RSDP is at [`ACPI_TABLES`].
pub(crate) fn write(
    memory: &GuestMemory,
    cpus: u32,
    windows: &[VirtioWindow],
) -> Result<(), AcpiError> {
    let mut area = Area {
        next: ACPI_TABLES + 64,
        bytes: vec![0; 64],
    };
    let facs = area.add(&facs());
    let dsdt = area.add(dsdt(windows).as_slice());
    let fadt = area.add(fadt(facs, dsdt).as_slice());
    let madt = area.add(madt(cpus).as_slice());
    let mut xsdt = acpi_tables::xsdt::XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = area.add(&bytes_of(&xsdt));
    let rsdp = bytes_of(&acpi_tables::rsdp::Rsdp::new(OEM_ID, xsdt));
    area.bytes[..rsdp.len()].copy_from_slice(&rsdp);
    if area.next > ACPI_TABLES_END {
        return Err(AcpiError::TooLarge(area.bytes.len()));
    }
    memory.write_slice(&area.bytes, GuestAddress(ACPI_TABLES))?;
    Ok(())
}

/// Tables laid out one after the other, each aligned as the FACS wants it.
struct Area {
    next: u64,
    bytes: Vec<u8>,
}

impl Area {
    fn add(&mut self, table: &[u8]) -> u64 {
        const ALIGN: usize = 64;
        let address = self.next;
        self.bytes.extend_from_slice(table);
        self.bytes
            .resize(self.bytes.len().next_multiple_of(ALIGN), 0);
        self.next = ACPI_TABLES + self.bytes.len() as u64;
        address
    }
}

fn bytes_of(aml: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    aml.to_aml_bytes(&mut bytes);
    bytes
}

fn facs() -> Vec<u8> {
    bytes_of(&acpi_tables::facs::FACS::new())
}

/// Fixed ACPI description table, revision 6.3. Offsets are those of the specification's table
/// "FADT Format".
fn fadt(facs: u64, dsdt: u64) -> Sdt {
    const LENGTH: u32 = 276;
    const PM_PROFILE_ENTERPRISE_SERVER: u8 = 4;
    // IA-PC boot architecture: legacy devices, no VGA, MSI not supported, no CMOS clock. The
    // keyboard controller has no keyboard, so its bit stays clear and kernels do not probe for it.
    const BOOT_ARCHITECTURE: u16 = 1 | 1 << 2 | 1 << 3 | 1 << 5;
    // WBINVD, C1 on all processors, control-method (that is: no fixed) power and sleep buttons, no
    // RTC wake, reset register.
    const FLAGS: u32 = 1 | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 10;

    let mut fadt = Sdt::new(*b"FACP", LENGTH, 6, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    fadt.write_u32(36, facs as u32);
    fadt.write_u32(40, dsdt as u32);
    fadt.write_u8(45, PM_PROFILE_ENTERPRISE_SERVER);
    fadt.write_u16(46, SCI_GSI as u16);
    fadt.write_u32(56, u32::from(ACPI_PM_PORT + PM1_EVENT));
    fadt.write_u32(64, u32::from(ACPI_PM_PORT + PM1_CONTROL));
    fadt.write_u8(88, 4); // PM1_EVT_LEN
    fadt.write_u8(89, 2); // PM1_CNT_LEN
    fadt.write_u16(96, 0xffff); // P_LVL2_LAT: no C2
    fadt.write_u16(98, 0xffff); // P_LVL3_LAT: no C3
    fadt.write_u16(109, BOOT_ARCHITECTURE);
    fadt.write_u32(112, FLAGS);
    write_io_register(&mut fadt, 116, ACPI_PM_PORT + RESET, 8);
    fadt.write_u8(128, RESET_VALUE);
    fadt.write_u8(131, 3); // minor version
    fadt.write_u64(140, dsdt);
    write_io_register(&mut fadt, 148, ACPI_PM_PORT + PM1_EVENT, 32);
    write_io_register(&mut fadt, 172, ACPI_PM_PORT + PM1_CONTROL, 16);
    fadt
}

/// Generic address structure for a port of `bits` bits.
fn write_io_register(table: &mut Sdt, offset: usize, port: u16, bits: u8) {
    const SYSTEM_IO: u8 = 1;
    let access = match bits {
        8 => 1,
        16 => 2,
        _ => 3,
    };
    table.write_bytes(offset, &[SYSTEM_IO, bits, 0, access]);
    table.write_u64(offset + 4, u64::from(port));
}

/// Multiple APIC description table.
fn madt(cpus: u32) -> Sdt {
    const PCAT_COMPATIBLE: u32 = 1;
    const ENABLED: u32 = 1;
    const ACTIVE_HIGH_LEVEL: u16 = 0xd;
    const CONFORMING: u16 = 0;
    let mut madt = Sdt::new(*b"APIC", 44, 4, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    madt.write_u32(36, LOCAL_APIC);
    madt.write_u32(40, PCAT_COMPATIBLE);

    let mut entries = Vec::new();
    for id in 0..cpus {
        if id <= XAPIC_ID_MAX {
            entries.vec(&[0, 8, id as u8, id as u8]);
            entries.dword(ENABLED);
        } else {
            entries.vec(&[9, 16, 0, 0]);
            entries.dword(id);
            entries.dword(ENABLED);
            entries.dword(id);
        }
    }
    entries.vec(&[1, 12, 0, 0]); // I/O APIC 0
    entries.dword(IOAPIC);
    entries.dword(0);
    // ISA line 0, the timer, is wired to pin 2; the SCI is level-triggered.
    for (source, gsi, flags) in [
        (0, 2, CONFORMING),
        (SCI_GSI as u8, SCI_GSI, ACTIVE_HIGH_LEVEL),
    ] {
        entries.vec(&[2, 10, 0, source]);
        entries.dword(gsi);
        entries.word(flags);
    }
    entries.vec(&[4, 6, 0xff, 0, 0, 1]); // NMI on LINT1 of every local APIC
    madt.append_slice(&entries);
    madt
}

/// Differentiated system description table: the namespace.
fn dsdt(windows: &[VirtioWindow]) -> Sdt {
    let mut body = Vec::new();
    let s5 = [SLEEP_TYPE_S5, SLEEP_TYPE_S5, 0, 0];
    Name::new(
        "_S5_".into(),
        &aml::Package::new(s5.iter().map(|v| v as &dyn Aml).collect()),
    )
    .to_aml_bytes(&mut body);
    com1(&mut body);
    acpi_ports(&mut body);
    for (index, window) in windows.iter().enumerate() {
        virtio_device(&mut body, index as u32, *window);
    }
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    dsdt.append_slice(&body);
    dsdt
}

fn com1(body: &mut Vec<u8>) {
    Device::new(
        "_SB_.COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &aml::ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &IO::new(COM1_PORT, COM1_PORT, 0, 8),
                    &Interrupt::new(true, true, false, false, COM1_GSI),
                ]),
            ),
        ],
    )
    .to_aml_bytes(body);
}

/// Motherboard resources: the ACPI registers. There is no PCI root device: the configuration ports
/// lead to a host bridge and nothing else.
fn acpi_ports(body: &mut Vec<u8>) {
    Device::new(
        "_SB_.PORT".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
            &Name::new("_UID".into(), &aml::ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&IO::new(ACPI_PM_PORT, ACPI_PM_PORT, 0, 16)]),
            ),
        ],
    )
    .to_aml_bytes(body);
}

fn virtio_device(body: &mut Vec<u8>, index: u32, window: VirtioWindow) {
    let path = format!("_SB_.V{index:03}");
    Device::new(
        path.as_str().into(),
        vec![
            &Name::new("_HID".into(), &"LNRO0005"),
            &Name::new("_UID".into(), &index),
            &Name::new("_CCA".into(), &aml::ONE),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &Memory32Fixed::new(true, window.address as u32, window.size as u32),
                    &Interrupt::new(true, true, false, false, window.gsi),
                ]),
            ),
        ],
    )
    .to_aml_bytes(body);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::memory;

    fn table(memory: &GuestMemory, address: u64) -> Vec<u8> {
        let length: u32 = memory.read_obj(GuestAddress(address + 4)).unwrap();
        let mut bytes = vec![0; length as usize];
        memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }

    fn sums_to_zero(bytes: &[u8]) -> bool {
        bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)) == 0
    }

    fn u64_at(bytes: &[u8], offset: usize) -> u64 {
        u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
    }

    fn written(cpus: u32) -> GuestMemory {
        let memory = memory::allocate(2 << 20).unwrap();
        let window = VirtioWindow {
            address: 0xd000_0000,
            size: 0x1000,
            gsi: 16,
        };
        write(&memory, cpus, &[window]).unwrap();
        memory
    }

    #[test]
    fn every_table_is_reachable_and_has_a_good_checksum() {
        let memory = written(4);
        let mut rsdp = [0; 36];
        memory
            .read_slice(&mut rsdp, GuestAddress(ACPI_TABLES))
            .unwrap();
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        assert!(sums_to_zero(&rsdp[..20]) && sums_to_zero(&rsdp));
        let xsdt = table(&memory, u64_at(&rsdp, 24));
        assert!(xsdt.starts_with(b"XSDT") && sums_to_zero(&xsdt));
        let fadt = table(&memory, u64_at(&xsdt, 36));
        assert!(fadt.starts_with(b"FACP") && sums_to_zero(&fadt));
        let madt = table(&memory, u64_at(&xsdt, 44));
        assert!(madt.starts_with(b"APIC") && sums_to_zero(&madt));
        let dsdt = table(&memory, u64_at(&fadt, 140));
        assert!(dsdt.starts_with(b"DSDT") && sums_to_zero(&dsdt));
        let facs = u32::from_le_bytes(fadt[36..40].try_into().unwrap());
        assert!(table(&memory, u64::from(facs)).starts_with(b"FACS"));
    }

    #[test]
    fn the_madt_lists_every_processor() {
        for cpus in [1, 2, 255, 257] {
            let madt = madt(cpus);
            let mut rest = &madt.as_slice()[44..];
            let (mut processors, mut others) = (0, Vec::new());
            while let [kind, length, ..] = *rest {
                match kind {
                    0 | 9 => processors += 1,
                    other => others.push(other),
                }
                rest = &rest[usize::from(length)..];
            }
            assert_eq!((processors, others), (cpus, vec![1, 2, 2, 4]));
        }
    }

    #[test]
    fn too_many_processors_are_an_error() {
        let memory = memory::allocate(2 << 20).unwrap();
        assert!(matches!(
            write(&memory, 20_000, &[]),
            Err(AcpiError::TooLarge(_))
        ));
    }

    #[test]
    fn virtio_windows_are_in_the_namespace() {
        let dsdt = dsdt(&[VirtioWindow {
            address: 0xd000_0000,
            size: 0x1000,
            gsi: 16,
        }]);
        let found = |needle: &[u8]| dsdt.as_slice().windows(needle.len()).any(|w| w == needle);
        assert!(found(b"LNRO0005") && found(b"V000") && found(b"_S5_"));
        assert!(found(&0xd000_0000u32.to_le_bytes()));
    }
}
