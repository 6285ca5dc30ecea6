//! Page tables as guests see them: in every paging mode, with EPT and on shadow tables, a guest
//! tries every combination of the bits of one entry, of controls and of accesses. What it finds
//! (success, or error code and CR2; accessed and dirty bits) is what the naive walker says.
//!
//! `EPTIDE_ALL=1` runs every combination instead of a part.

extern crate arch as eptide_arch;

#[path = "../../arch/tests/combinations/mod.rs"]
mod combinations;
mod common;
#[path = "../../arch/tests/naive/mod.rs"]
mod naive;

use arch::paging::{Access, GuestControls, GuestRoot, Privilege};
use combinations::{ALL, Combination, Format, PAGE, PKRU, ROOT, accesses};
use common::*;
use eptide_kvm::{Kvm, VcpuExit, VcpuFd, VmFd};
use iced_x86::BlockEncoderOptions;
use kvm_bindings::*;
use std::hash::{DefaultHasher, Hash, Hasher};

const RAM: usize = 16 << 20;

// Supervisor pages, mapped one to one below 2 MiB, and one page that is user mode's.
const SUPERVISOR_CODE: u64 = 0x5_0000;
const STACK_TOP: u64 = 0x5_2000;
const USER_CODE: u64 = 0x5_3000;
const GDT: u64 = 0x5_4000;
const IDT: u64 = 0x5_5000;
const TSS: u64 = 0x5_6000;
/// Entries to be written before an access: pairs of address and value.
const LIST: u64 = 0x5_7000;
// The tables that map these.
const LAST: u64 = 0xa_0000;
const PDPTES: u64 = 0xb_0000;
const PDPT: u64 = 0xc_0000;
const DIRECTORY: u64 = 0xd_0000;
const PML4: u64 = 0xe_0000;

const CODE_SELECTOR: u16 = 8;
const DATA_SELECTOR: u16 = 0x10;
const USER_CODE_SELECTOR: u16 = 0x1b;
const USER_DATA_SELECTOR: u16 = 0x23;
const TSS_SELECTOR: u16 = 0x28;

// How the guest reports.
const SUCCEEDED: u16 = 0x80;
const FAULTED: u16 = 0x81;
const CONTROLS_SET: u16 = 0x82;
/// Some other exception, with its vector.
const UNEXPECTED: u16 = 0x83;

/// What the page under test holds: `int 0x81`, then something to recognise it by.
const SUCCESS: u8 = 0x81;
const INT: u8 = 0xcd;

/// Where the guest's code has what.
#[derive(Clone, Copy, Debug)]
struct Entries {
    set_controls: u64,
    access: u64,
    page_fault: u64,
    success: u64,
}

/// Code in two modes that differs in the names of registers.
macro_rules! supervisor_code {
    ($name:ident, $bits:literal, $pushf:ident, $iret:ident, $store:expr,
     $ax:ident $bx:ident $cx:ident $dx:ident $si:ident $di:ident $bp:ident) => {
        fn $name(is_long_entry: bool) -> (Vec<u8>, Entries) {
            let mut a = CodeAssembler::new($bits).unwrap();
            let mut set_controls = a.create_label();
            let mut access = a.create_label();
            let mut page_fault = a.create_label();
            let mut success = a.create_label();
            let mut build = || -> Result<(), IcedError> {
                // CR0 in AX, CR4 in BX, EFER in SI, whether to load PKRU in DI, and PKRU in BP.
                let mut no_keys = a.create_label();
                a.set_label(&mut set_controls)?;
                a.mov(cr0, $ax)?;
                a.mov(cr4, $bx)?;
                a.mov(eax, esi)?;
                a.xor(edx, edx)?;
                a.mov(ecx, 0xc000_0080_u32)?;
                a.wrmsr()?;
                a.test(edi, edi)?;
                a.jz(no_keys)?;
                a.mov(eax, ebp)?;
                a.xor(ecx, ecx)?;
                a.wrpkru()?;
                a.set_label(&mut no_keys)?;
                a.out(i32::from(CONTROLS_SET), al)?;

                // Entries to write at DI, CX of them; address in SI; DX says what to do.
                let mut next = a.create_label();
                let mut ready = a.create_label();
                let mut write = a.create_label();
                let mut fetch = a.create_label();
                let mut user = a.create_label();
                a.set_label(&mut access)?;
                a.test(ecx, ecx)?;
                a.jz(ready)?;
                a.set_label(&mut next)?;
                a.mov($bx, ptr($di))?;
                $store(&mut a, is_long_entry)?;
                a.add($di, 16)?;
                a.dec(ecx)?;
                a.jnz(next)?;
                a.invlpg(byte_ptr($si))?;
                a.set_label(&mut ready)?;
                a.cmp(edx, 1)?;
                a.je(write)?;
                a.cmp(edx, 2)?;
                a.je(fetch)?;
                a.ja(user)?;
                a.mov(eax, dword_ptr($si))?;
                a.out(i32::from(SUCCEEDED), al)?;
                a.set_label(&mut write)?;
                a.mov(byte_ptr($si), i32::from(INT))?;
                a.out(i32::from(SUCCEEDED), al)?;
                a.set_label(&mut fetch)?;
                a.jmp($si)?;
                // In user mode what to do is for the code in BP.
                a.set_label(&mut user)?;
                a.push(i32::from(USER_DATA_SELECTOR))?;
                a.push($bp)?;
                a.$pushf()?;
                a.push(i32::from(USER_CODE_SELECTOR))?;
                a.push($bp)?;
                a.$iret()?;

                a.set_label(&mut page_fault)?;
                a.pop($ax)?;
                a.mov($dx, cr2)?;
                a.out(i32::from(FAULTED), al)?;
                a.set_label(&mut success)?;
                a.out(i32::from(SUCCEEDED), al)
            };
            build().unwrap();
            let options = BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS;
            let result = a.assemble_options(SUPERVISOR_CODE, options).unwrap();
            let entries = Entries {
                set_controls: result.label_ip(&set_controls).unwrap(),
                access: result.label_ip(&access).unwrap(),
                page_fault: result.label_ip(&page_fault).unwrap(),
                success: result.label_ip(&success).unwrap(),
            };
            (result.inner.code_buffer, entries)
        }
    };
}

supervisor_code!(code_64, 64, pushfq, iretq, store_64, rax rbx rcx rdx rsi rdi rbp);
supervisor_code!(code_32, 32, pushfd, iretd, store_32, eax ebx ecx edx esi edi ebp);

/// Stores the value of the pair at RDI at RBX.
fn store_64(a: &mut CodeAssembler, _: bool) -> Result<(), IcedError> {
    a.mov(rax, qword_ptr(rdi + 8))?;
    a.mov(qword_ptr(rbx), rax)
}

fn store_32(a: &mut CodeAssembler, is_long_entry: bool) -> Result<(), IcedError> {
    a.mov(eax, dword_ptr(edi + 8))?;
    a.mov(dword_ptr(ebx), eax)?;
    if is_long_entry {
        a.mov(eax, dword_ptr(edi + 12))?;
        a.mov(dword_ptr(ebx + 4), eax)?;
    }
    Ok(())
}

/// User mode's code for reads, writes and fetches, 16 bytes each; [ESI] is [RSI] in 64-bit mode.
const USER_PARTS: [[u8; 4]; 3] = [
    [0x8b, 0x06, INT, SUCCESS], // mov eax, [rsi]; int 0x81
    [0xc6, 0x06, INT, INT],     // mov byte [rsi], 0xcd; int 0x81
    [0xff, 0xe6, 0x90, 0x90],   // jmp rsi
];

struct Guest {
    format: Format,
    memory: Memory,
    vcpu: VcpuFd,
    _vm: VmFd,
    entries: Entries,
    root: GuestRoot,
    physical_bits: u32,
}

fn descriptor(base: u64, limit: u64, access: u64, flags: u64) -> u64 {
    let (limit, base) = (limit & 0xffff | (limit >> 16) << 48, base << 16);
    limit | base | access << 40 | flags << 52
}

impl Guest {
    fn new(kvm: &Kvm, format: Format) -> Guest {
        let vm = kvm.create_vm().unwrap();
        let memory = Memory::new(RAM);
        // SAFETY: the guest drops its VM first.
        unsafe { vm.set_user_memory_region(memory.region(0, 0)).unwrap() };
        let vcpu = vm.create_vcpu(0).unwrap();
        let mut cpuid = kvm.get_supported_cpuid(256).unwrap();
        for leaf in cpuid.as_mut_slice() {
            if leaf.function == 7 && leaf.index == 0 {
                // Neither keys nor (on most hosts) 5-level paging are offered by default.
                leaf.ecx |= 1 << 16 | 1 << 3;
            }
        }
        vcpu.set_cpuid2(&cpuid).unwrap();
        let sizes = cpuid
            .as_slice()
            .iter()
            .find(|leaf| leaf.function == 0x8000_0008);
        let (code, entries) = match format.is_long() {
            true => code_64(true),
            false => code_32(format == Format::Pae),
        };
        memory.write(SUPERVISOR_CODE, &code);
        let mut guest = Guest {
            format,
            memory,
            vcpu,
            _vm: vm,
            entries,
            root: GuestRoot {
                cr3: ROOT,
                pdptes: [ROOT | 1; 4],
            },
            physical_bits: sizes.unwrap().eax & 0xff,
        };
        guest.fill_memory();
        guest.set_state();
        guest
    }

    fn fill_memory(&mut self) {
        let memory = &self.memory;
        for (n, part) in USER_PARTS.iter().enumerate() {
            memory.write(USER_CODE + 16 * n as u64, part);
        }
        memory.write(USER_CODE + 16 + 4, &[SUCCESS]);
        // The page under test at its offsets in pages of each size; in last-level entries of 32-bit
        // paging, the bit that is reserved in others is one of the address.
        for page in [PAGE, PAGE | 1 << 21] {
            for offset in [0x234_u64, 0x1234] {
                let [low, high, ..] = offset.to_le_bytes();
                memory.write(page + offset, &[INT, SUCCESS, low, high]);
            }
        }
        self.tables();
        let flags = if self.format.is_long() { 0xa } else { 0xc };
        let segments = [
            0,
            descriptor(0, 0xfffff, 0x9b, flags),
            descriptor(0, 0xfffff, 0x93, 0xc),
            descriptor(0, 0xfffff, 0xfb, flags),
            descriptor(0, 0xfffff, 0xf3, 0xc),
            descriptor(TSS, 0x67, 0x8b, 0),
            0,
        ];
        for (n, segment) in segments.into_iter().enumerate() {
            self.memory.write_u64(GDT + 8 * n as u64, segment);
        }
        for vector in 0..32 {
            let handler = SUPERVISOR_CODE + 0x800 + 16 * u64::from(vector);
            let [report, _] = UNEXPECTED.to_le_bytes();
            // mov al, vector; out report, al
            self.memory.write(handler, &[0xb0, vector, 0xe6, report]);
            self.gate(vector, handler, 0);
        }
        self.gate(14, self.entries.page_fault, 0);
        self.gate(SUCCESS, self.entries.success, 3);
        // RSP0, or ESP0 and SS0.
        let data = u64::from(DATA_SELECTOR);
        let stack = if self.format.is_long() {
            STACK_TOP
        } else {
            STACK_TOP | data << 32
        };
        self.memory.write(TSS + 4, &stack.to_le_bytes());
    }

    fn gate(&self, vector: u8, handler: u64, dpl: u64) {
        let low = handler & 0xffff
            | u64::from(CODE_SELECTOR) << 16
            | (0x8e00 | dpl << 13) << 32
            | (handler >> 16 & 0xffff) << 48;
        let size = if self.format.is_long() { 16 } else { 8 };
        self.memory.write_u64(IDT + size * u64::from(vector), low);
    }

    /// Maps the first 2 MiB one to one, for the supervisor but for the page of user code.
    fn tables(&self) {
        let entry = |table: u64, index: u64, value: u64| {
            let size = self.format.size();
            let bytes = value.to_le_bytes();
            self.memory
                .write(table + index * size, &bytes[..size as usize]);
        };
        for n in 0..512 {
            let page = n << 12;
            let user = if page == USER_CODE { ALL } else { ALL & !4 };
            entry(LAST, n, page | user);
        }
        match self.format {
            Format::Legacy | Format::Pae => entry(ROOT, 0, LAST | ALL),
            Format::Four | Format::Five => {
                if self.format == Format::Five {
                    entry(ROOT, 0, PML4 | ALL);
                }
                let top = if self.format == Format::Five {
                    PML4
                } else {
                    ROOT
                };
                entry(top, 0, PDPT | ALL);
                entry(PDPT, 0, DIRECTORY | ALL);
                entry(DIRECTORY, 0, LAST | ALL);
            }
        }
        for n in 0..4 {
            self.memory
                .write_u64(PDPTES + 8 * n, self.root.pdptes[n as usize]);
        }
    }

    fn set_state(&mut self) {
        let is_long = self.format.is_long();
        let mut sregs = self.vcpu.get_sregs().unwrap();
        let code = kvm_segment {
            base: 0,
            limit: 0xffff_ffff,
            selector: CODE_SELECTOR,
            type_: 11,
            present: 1,
            db: u8::from(!is_long),
            s: 1,
            l: u8::from(is_long),
            g: 1,
            ..Default::default()
        };
        let data = kvm_segment {
            selector: DATA_SELECTOR,
            type_: 3,
            db: 1,
            l: 0,
            ..code
        };
        sregs.cs = code;
        // What user mode may not have, IRET to it would take away.
        let user_data = kvm_segment {
            selector: USER_DATA_SELECTOR,
            dpl: 3,
            ..data
        };
        sregs.ss = data;
        (sregs.ds, sregs.es) = (user_data, user_data);
        (sregs.fs, sregs.gs) = (user_data, user_data);
        sregs.tr = kvm_segment {
            base: TSS,
            limit: 0x67,
            selector: TSS_SELECTOR,
            type_: 11,
            present: 1,
            ..Default::default()
        };
        sregs.gdt = kvm_dtable {
            base: GDT,
            limit: 8 * 7 - 1,
            ..Default::default()
        };
        sregs.idt = kvm_dtable {
            base: IDT,
            limit: 0xfff,
            ..Default::default()
        };
        let controls = self.format.controls(0, self.physical_bits);
        (sregs.cr0, sregs.cr4, sregs.efer) = registers(&controls);
        sregs.cr3 = if self.format == Format::Pae {
            PDPTES
        } else {
            ROOT
        };
        self.vcpu.set_sregs(&sregs).unwrap();
    }

    /// Runs from `rip` to the guest's report.
    fn run(&mut self, rip: u64, regs: kvm_regs) -> (u16, kvm_regs) {
        self.vcpu
            .set_regs(&kvm_regs {
                rip,
                rsp: STACK_TOP,
                ..regs
            })
            .unwrap();
        let port = match self.vcpu.run().unwrap() {
            VcpuExit::IoOut(UNEXPECTED, vector) => panic!("exception {}", vector[0]),
            VcpuExit::IoOut(port, _) => port,
            other => panic!("{other:?}"),
        };
        (port, self.vcpu.get_regs().unwrap())
    }

    fn set_controls(&mut self, controls: &GuestControls) {
        let (r0, r4, efer) = registers(controls);
        let has_keys = controls.cr4.contains(arch::control_registers::Cr4::PKE);
        let regs = kvm_regs {
            rax: r0,
            rbx: r4,
            rsi: efer,
            rdi: has_keys.into(),
            rbp: PKRU.into(),
            rflags: 2,
            ..Default::default()
        };
        let (port, _) = self.run(self.entries.set_controls, regs);
        assert_eq!(port, CONTROLS_SET, "{controls:?}");
    }

    fn read(&self, at: u64) -> u64 {
        let word = self.memory.read_u64(at & !7);
        match self.format.size() {
            4 => word >> (8 * (at & 4)) & 0xffff_ffff,
            _ => word,
        }
    }

    /// Makes an access, after writing `changes` of entries; what it read, or error code and CR2.
    fn access(
        &mut self,
        changes: &[(u64, u64)],
        access: Access,
        alignment_check: bool,
    ) -> Result<u32, (u64, u64)> {
        for (n, (at, value)) in changes.iter().enumerate() {
            self.memory.write_u64(LIST + 16 * n as u64, *at);
            self.memory.write_u64(LIST + 16 * n as u64 + 8, *value);
        }
        let what = match access {
            access if access.contains(Access::WRITE) => 1,
            access if access.contains(Access::FETCH) => 2,
            _ => 0,
        };
        let is_user = access.contains(Access::USER);
        let regs = kvm_regs {
            rdi: LIST,
            rcx: changes.len() as u64,
            rsi: self.format.gva(),
            rdx: if is_user { 3 } else { what },
            rbp: USER_CODE + 16 * what,
            rflags: 2 | u64::from(alignment_check) << 18,
            ..Default::default()
        };
        match self.run(self.entries.access, regs) {
            (SUCCEEDED, regs) => Ok(regs.rax as u32),
            (FAULTED, regs) => Err((regs.rax, regs.rdx)),
            (port, _) => panic!("a report at {port:#x}"),
        }
    }
}

/// CR0, CR4 and EFER of a mode.
fn registers(controls: &GuestControls) -> (u64, u64, u64) {
    // ET and NE, which the enumeration leaves alone.
    (
        controls.cr0.bits() | 0x30,
        controls.cr4.bits(),
        controls.efer.bits(),
    )
}

#[derive(Debug, Default)]
struct Tally {
    cases: u64,
    faults: u64,
    digest: DefaultHasher,
}

fn enumerate(kvm: &Kvm, format: Format, level: u32, stride: usize) -> Tally {
    let mut guest = Guest::new(kvm, format);
    let mut tally = Tally::default();
    let mut controls = None;
    for what in format.combinations(stride) {
        let wanted = format.controls(what.controls, guest.physical_bits);
        if controls != Some(wanted) {
            guest.set_controls(&wanted);
            controls = Some(wanted);
        }
        combination(&mut guest, level, &what, &wanted, &mut tally);
    }
    tally
}

/// The accesses of one combination follow each other on the same tables, so that each meets what
/// those before left.
fn combination(
    guest: &mut Guest,
    level: u32,
    what: &Combination,
    controls: &GuestControls,
    tally: &mut Tally,
) {
    let format = guest.format;
    let mut memory: naive::Memory = format.path(level, what).collect();
    let mut changes: Vec<_> = format.path(level, what).collect();
    changes.retain(|&(at, value)| guest.read(at) != value);
    for (access, alignment_check) in accesses(what) {
        let privilege = Privilege {
            pkru: PKRU,
            pkrs: 0,
            alignment_check,
        };
        let gva = format.gva();
        let expected =
            naive::translate(&mut memory, controls, &guest.root, gva, access, &privilege);
        let found = guest.access(&changes, access, alignment_check);
        changes.clear();
        let case = || {
            let entry = format.entry(what.bits, what.key, level);
            format!(
                "{format:?} level {level} entry {entry:#x} {controls:?} {access:?} AC {alignment_check}"
            )
        };
        match expected {
            Ok(translation) => {
                let read = access - Access::USER == Access::empty();
                let gpa = translation.gpa.get();
                let there = guest.memory.read_u64(gpa & !7) >> (8 * (gpa & 7));
                let value = if read { Ok(there as u32) } else { found };
                assert!(found == value && found.is_ok(), "{found:x?}: {}", case());
            }
            Err((code, _)) => assert_eq!(found, Err((code.bits(), gva)), "{}", case()),
        }
        for (&at, &value) in &memory {
            assert_eq!(guest.read(at), value, "entry at {at:#x}: {}", case());
        }
        for (at, _) in format.path(level, what) {
            memory[&at].hash(&mut tally.digest);
        }
        found.hash(&mut tally.digest);
        tally.cases += 1;
        tally.faults += u64::from(found.is_err());
    }
}

fn every_combination(format: Format) {
    let stride = if std::env::var_os("EPTIDE_ALL").is_some() {
        1
    } else {
        7
    };
    for level in 1..=format.levels() {
        let [with, without] =
            [true, false].map(|ept| enumerate(&with_ept(ept), format, level, stride));
        println!(
            "{format:?} level {level}: {} cases, {} faults",
            with.cases, with.faults
        );
        assert!(with.faults > with.cases / 8 && with.faults < with.cases);
        assert_eq!(with.digest.finish(), without.digest.finish());
    }
}

#[test]
fn paging_of_32_bits_is_as_the_manual_says() {
    every_combination(Format::Legacy);
}

#[test]
fn pae_paging_is_as_the_manual_says() {
    every_combination(Format::Pae);
}

#[test]
fn paging_of_4_levels_is_as_the_manual_says() {
    every_combination(Format::Four);
}

#[test]
fn paging_of_5_levels_is_as_the_manual_says() {
    every_combination(Format::Five);
}
