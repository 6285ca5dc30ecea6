//! What a kernel finds when it is entered: boot information in memory and registers.
//!
//! The Linux 64-bit protocol enters in long mode with identity page tables, a flat GDT and RSI
//! pointing to the zero page; the Linux 32-bit protocol enters in protected mode without paging and
//! has the pointer in ESI. PVH is entered like the latter, with EBX pointing to `hvm_start_info`.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryError};

use super::initrd::LoadedInitrd;
use super::kernel::{Entry, LoadedKernel};
use super::layout::{
    ACPI_TABLES, BOOT_GDT, BOOT_PML4, BOOT_STACK, COMMAND_LINE, COMMAND_LINE_MAX, PVH_MEMORY_MAP,
    PVH_MODULES, PVH_START_INFO, ZERO_PAGE,
};
use super::memory::{self, GuestMemory};

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// The reserved bit of RFLAGS that is always one.
const RFLAGS_FIXED: u64 = 2;

/// Selector of the code segment, as both protocols want it.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TSS_SELECTOR: u16 = 0x20;

/// Why boot information cannot be written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BootError {
    /// The command line is too long.
    #[error("the kernel command line has {length} bytes, this kernel takes {limit}")]
    CommandLine {
        /// Its length.
        length: usize,
        /// What the kernel takes.
        limit: usize,
    },
    /// The command line has a zero byte.
    #[error("the kernel command line contains a zero byte")]
    ZeroByte,
    /// The guest's first megabyte is not there.
    #[error("boot information does not fit: {0}")]
    Memory(#[from] GuestMemoryError),
}

/// Writes everything the kernel's protocol asks for.
pub(crate) fn write_boot_info(
    memory: &GuestMemory,
    kernel: &LoadedKernel,
    initrd: Option<LoadedInitrd>,
    command_line: &str,
) -> Result<(), BootError> {
    write_command_line(memory, kernel, command_line)?;
    write_gdt(memory, kernel.entry)?;
    match kernel.entry {
        Entry::Linux64(_) => {
            write_zero_page(memory, kernel, initrd)?;
            write_page_tables(memory)?;
        }
        Entry::Linux32(_) => write_zero_page(memory, kernel, initrd)?,
        Entry::Pvh(_) => write_start_info(memory, initrd)?,
    }
    Ok(())
}

fn write_command_line(
    memory: &GuestMemory,
    kernel: &LoadedKernel,
    command_line: &str,
) -> Result<(), BootError> {
    let limit = match kernel.header {
        Some(header) if header.cmdline_size != 0 => header.cmdline_size as usize,
        _ => 2047,
    };
    let limit = limit.min(COMMAND_LINE_MAX - 1);
    if command_line.len() > limit {
        return Err(BootError::CommandLine {
            length: command_line.len(),
            limit,
        });
    }
    if command_line.contains('\0') {
        return Err(BootError::ZeroByte);
    }
    memory.write_slice(command_line.as_bytes(), GuestAddress(COMMAND_LINE))?;
    memory.write_obj(0u8, GuestAddress(COMMAND_LINE + command_line.len() as u64))?;
    Ok(())
}

fn write_zero_page(
    memory: &GuestMemory,
    kernel: &LoadedKernel,
    initrd: Option<LoadedInitrd>,
) -> Result<(), BootError> {
    // A vmlinux has no header of its own; these are the fields a 64-bit kernel reads.
    let bare = setup_header {
        boot_flag: 0xaa55,
        header: u32::from_le_bytes(*b"HdrS"),
        version: 0x20f,
        loadflags: 1,
        kernel_alignment: 0x20_0000,
        ..Default::default()
    };
    let mut params = boot_params {
        acpi_rsdp_addr: ACPI_TABLES,
        hdr: kernel.header.unwrap_or(bare),
        ..Default::default()
    };
    // "Undefined" boot loader: 0xff is the number for one without a registered id.
    params.hdr.type_of_loader = 0xff;
    params.hdr.cmd_line_ptr = COMMAND_LINE as u32;
    if let Entry::Linux32(start) = kernel.entry {
        params.hdr.code32_start = start as u32;
    }
    if let Some(initrd) = initrd {
        params.hdr.ramdisk_image = initrd.start as u32;
        params.hdr.ramdisk_size = initrd.size as u32;
    }
    let map = memory::map(memory);
    params.e820_entries = map.len() as u8;
    for (entry, range) in params.e820_table.iter_mut().zip(&map) {
        *entry = boot_e820_entry {
            addr: range.start,
            size: range.size,
            r#type: range.kind as u32,
        };
    }
    memory.write_slice(params.as_slice(), GuestAddress(ZERO_PAGE))?;
    Ok(())
}

/// Identity-maps the first 4 GiB with 2 MiB pages.
fn write_page_tables(memory: &GuestMemory) -> Result<(), BootError> {
    const PRESENT_WRITABLE: u64 = 3;
    const PAGE_SIZE: u64 = 1 << 7;
    let pdpt = BOOT_PML4 + 0x1000;
    let directories = BOOT_PML4 + 0x2000;
    memory.write_slice(&[0; 0x2000], GuestAddress(BOOT_PML4))?;
    memory.write_obj(pdpt | PRESENT_WRITABLE, GuestAddress(BOOT_PML4))?;
    for gib in 0..4 {
        let directory = directories + gib * 0x1000;
        memory.write_obj(directory | PRESENT_WRITABLE, GuestAddress(pdpt + gib * 8))?;
        for index in 0..512 {
            let page = (gib << 30) | (index << 21);
            let entry = page | PRESENT_WRITABLE | PAGE_SIZE;
            memory.write_obj(entry, GuestAddress(directory + index * 8))?;
        }
    }
    Ok(())
}

fn write_start_info(memory: &GuestMemory, initrd: Option<LoadedInitrd>) -> Result<(), BootError> {
    let map = memory::map(memory);
    let start_info = hvm_start_info {
        magic: linux_loader::loader::elf::start_info::XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        nr_modules: u32::from(initrd.is_some()),
        modlist_paddr: PVH_MODULES,
        cmdline_paddr: COMMAND_LINE,
        rsdp_paddr: ACPI_TABLES,
        memmap_paddr: PVH_MEMORY_MAP,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    memory.write_slice(start_info.as_slice(), GuestAddress(PVH_START_INFO))?;
    if let Some(initrd) = initrd {
        let module = hvm_modlist_entry {
            paddr: initrd.start,
            size: initrd.size,
            ..Default::default()
        };
        memory.write_slice(module.as_slice(), GuestAddress(PVH_MODULES))?;
    }
    let mut at = PVH_MEMORY_MAP;
    for range in map {
        let entry = hvm_memmap_table_entry {
            addr: range.start,
            size: range.size,
            type_: range.kind as u32,
            reserved: 0,
        };
        memory.write_slice(entry.as_slice(), GuestAddress(at))?;
        at += size_of::<hvm_memmap_table_entry>() as u64;
    }
    Ok(())
}

/// A flat segment of `type_` (with the accessed bit, as loaded by the processor).
fn segment(selector: u16, type_: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}

fn code_segment(entry: Entry) -> kvm_segment {
    segment(CODE_SELECTOR, 0xb, matches!(entry, Entry::Linux64(_)))
}

fn data_segment() -> kvm_segment {
    segment(DATA_SELECTOR, 0x3, false)
}

fn task_segment() -> kvm_segment {
    kvm_segment {
        limit: 0x67,
        selector: TSS_SELECTOR,
        type_: 0xb,
        present: 1,
        ..Default::default()
    }
}

/// Packs a segment into the descriptor that would load it.
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = if segment.g == 1 {
        segment.limit >> 12
    } else {
        segment.limit
    };
    let (limit, base) = (u64::from(limit), segment.base);
    let access = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7
        | u64::from(segment.avl) << 12
        | u64::from(segment.l) << 13
        | u64::from(segment.db) << 14
        | u64::from(segment.g) << 15;
    (limit & 0xffff)
        | (base & 0xff_ffff) << 16
        | access << 40
        | (limit & 0xf_0000) << 32
        | (base & 0xff00_0000) << 32
}

fn gdt(entry: Entry) -> [u64; 6] {
    // A 64-bit TSS descriptor takes two slots; its upper half is zero here.
    [
        0,
        0,
        descriptor(&code_segment(entry)),
        descriptor(&data_segment()),
        descriptor(&task_segment()),
        0,
    ]
}

fn write_gdt(memory: &GuestMemory, entry: Entry) -> Result<(), BootError> {
    for (index, descriptor) in gdt(entry).into_iter().enumerate() {
        memory.write_obj(descriptor, GuestAddress(BOOT_GDT + index as u64 * 8))?;
    }
    Ok(())
}

/// General registers at the first instruction.
pub(crate) fn registers(entry: Entry) -> kvm_regs {
    let common = kvm_regs {
        rflags: RFLAGS_FIXED,
        ..Default::default()
    };
    match entry {
        Entry::Linux64(rip) => kvm_regs {
            rip,
            rsp: BOOT_STACK,
            rbp: BOOT_STACK,
            rsi: ZERO_PAGE,
            ..common
        },
        Entry::Linux32(rip) => kvm_regs {
            rip,
            rsi: ZERO_PAGE,
            ..common
        },
        Entry::Pvh(rip) => kvm_regs {
            rip,
            rbx: PVH_START_INFO,
            ..common
        },
    }
}

/// Puts segments, tables and control registers into the state the protocol asks for; what else
/// `sregs` holds (the APIC base) stays.
pub(crate) fn special_registers(entry: Entry, mut sregs: kvm_sregs) -> kvm_sregs {
    sregs.cs = code_segment(entry);
    let data = data_segment();
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = task_segment();
    let limit = (size_of_val(&gdt(entry)) - 1) as u16;
    sregs.gdt = kvm_dtable {
        base: BOOT_GDT,
        limit,
        ..Default::default()
    };
    sregs.idt = kvm_dtable::default();
    match entry {
        Entry::Linux64(_) => {
            sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
            sregs.cr3 = BOOT_PML4;
            sregs.cr4 = CR4_PAE;
            sregs.efer = EFER_LME | EFER_LMA;
        }
        Entry::Linux32(_) | Entry::Pvh(_) => {
            sregs.cr0 = CR0_PE | CR0_ET;
            sregs.cr3 = 0;
            sregs.cr4 = 0;
            sregs.efer = 0;
        }
    }
    sregs
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kernel(entry: Entry) -> LoadedKernel {
        LoadedKernel {
            entry,
            header: None,
            end: 0x20_0000,
        }
    }

    fn machine(entry: Entry, command_line: &str) -> Result<GuestMemory, BootError> {
        let memory = memory::allocate(64 << 20).unwrap();
        let initrd = LoadedInitrd {
            start: 0x300_0000,
            size: 0x1234,
        };
        write_boot_info(&memory, &kernel(entry), Some(initrd), command_line)?;
        Ok(memory)
    }

    #[test]
    fn descriptors_are_the_well_known_numbers() {
        let linux = gdt(Entry::Linux64(0));
        assert_eq!(
            linux[2..5],
            [
                0x00af_9b00_0000_ffff,
                0x00cf_9300_0000_ffff,
                0x8b00_0000_0067
            ]
        );
        assert_eq!(gdt(Entry::Pvh(0))[2], 0x00cf_9b00_0000_ffff);
    }

    #[test]
    fn identity_tables_map_every_address_to_itself() {
        let memory = machine(Entry::Linux64(0x10_0200), "").unwrap();
        let read = |address: u64| memory.read_obj::<u64>(GuestAddress(address)).unwrap();
        for address in [0, 0x10_0200, 0xfee0_0000, 0xffff_ffff_u64] {
            let pml4e = read(BOOT_PML4);
            let pdpte = read((pml4e & !0xfff) + (address >> 30) * 8);
            let pde = read((pdpte & !0xfff) + (address >> 21 & 511) * 8);
            assert_eq!(pde & 0x83, 0x83);
            assert_eq!((pde & !0x1f_ffff) | (address & 0x1f_ffff), address);
        }
    }

    #[test]
    fn the_zero_page_describes_the_machine() {
        let memory = machine(Entry::Linux64(0x10_0200), "console=ttyS0").unwrap();
        let params: boot_params = memory.read_obj(GuestAddress(ZERO_PAGE)).unwrap();
        assert_eq!({ params.acpi_rsdp_addr }, ACPI_TABLES);
        assert_eq!({ params.hdr.ramdisk_image }, 0x300_0000);
        assert_eq!({ params.hdr.ramdisk_size }, 0x1234);
        assert_eq!({ params.hdr.cmd_line_ptr }, COMMAND_LINE as u32);
        let entries = params.e820_table;
        let ram: u64 = entries[..usize::from(params.e820_entries)]
            .iter()
            .filter(|entry| { entry.r#type } == 1)
            .map(|entry| entry.size)
            .sum();
        assert_eq!(ram, (64 << 20) - 0x10_0000 + 0x9_fc00);
        let mut line = [0; 14];
        memory
            .read_slice(&mut line, GuestAddress(COMMAND_LINE))
            .unwrap();
        assert_eq!(&line, b"console=ttyS0\0");
    }

    #[test]
    fn pvh_start_info_points_to_everything() {
        let memory = machine(Entry::Pvh(0x10_0000), "quiet").unwrap();
        let info: hvm_start_info = memory.read_obj(GuestAddress(PVH_START_INFO)).unwrap();
        assert_eq!(
            (info.magic, info.version, info.nr_modules),
            (0x336e_c578, 1, 1)
        );
        let module: hvm_modlist_entry = memory.read_obj(GuestAddress(info.modlist_paddr)).unwrap();
        assert_eq!((module.paddr, module.size), (0x300_0000, 0x1234));
        assert_eq!(registers(Entry::Pvh(0x10_0000)).rbx, PVH_START_INFO);
        let sregs = special_registers(Entry::Pvh(0x10_0000), kvm_sregs::default());
        assert_eq!(
            (sregs.cr0 & (CR0_PE | CR0_PG), sregs.cs.db, sregs.cs.l),
            (CR0_PE, 1, 0)
        );
    }

    #[test]
    fn an_overlong_command_line_is_refused() {
        let error = machine(Entry::Linux64(0), &"x".repeat(2048)).unwrap_err();
        assert!(matches!(
            error,
            BootError::CommandLine {
                length: 2048,
                limit: 2047
            }
        ));
        assert!(matches!(
            machine(Entry::Linux64(0), "a\0b"),
            Err(BootError::ZeroByte)
        ));
    }
}
