//! A bare guest: memory, EPT written by the test, page tables, and a processor.
#![allow(dead_code, reason = "each test binary uses a part")]

use arch::control_registers::{Cr0, Cr4, Efer, Xcr0};
use arch::controls::{EntryControls, Eptp, PrimaryControls, SecondaryControls};
use arch::segment::{AccessRights, Segment, SegmentName};
use eptide_cpu::{Controls, Machine, Vcpu};
use std::sync::Arc;

/// Anonymous memory, page-aligned.
pub struct Memory {
    pub hva: u64,
    pub len: usize,
}

impl Memory {
    pub fn new(len: usize) -> Memory {
        Memory::at(0, len, libc::PROT_READ | libc::PROT_WRITE)
    }

    /// Memory at a fixed address (0 for anywhere).
    pub fn at(address: u64, len: usize, protection: i32) -> Memory {
        let fixed = if address == 0 {
            0
        } else {
            libc::MAP_FIXED_NOREPLACE
        };
        // SAFETY: a fresh mapping, checked below; a fixed one replaces nothing.
        let hva = unsafe {
            libc::mmap(
                address as *mut _,
                len,
                protection,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | fixed,
                -1,
                0,
            )
        };
        assert_ne!(hva, libc::MAP_FAILED, "mmap of {len} bytes at {address:#x}");
        Memory {
            hva: hva as u64,
            len,
        }
    }

    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the mapping is alive and readable; no processor runs while a test looks.
        unsafe { std::slice::from_raw_parts(self.hva as *const u8, self.len) }
    }

    pub fn write(&self, offset: u64, bytes: &[u8]) {
        assert!(offset as usize + bytes.len() <= self.len);
        // SAFETY: inside the mapping.
        unsafe {
            ((self.hva + offset) as *mut u8).copy_from(bytes.as_ptr(), bytes.len());
        }
    }

    pub fn read_u64(&self, offset: u64) -> u64 {
        u64::from_le_bytes(self.bytes()[offset as usize..][..8].try_into().unwrap())
    }

    pub fn write_u64(&self, offset: u64, value: u64) {
        self.write(offset, &value.to_le_bytes());
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `at`.
        unsafe { libc::munmap(self.hva as *mut _, self.len) };
    }
}

/// EPT entry bits of a normal, fully accessible mapping.
pub const EPT_RWX: u64 = 7 | 6 << 3;

/// Four-level EPT in memory of its own.
pub struct Ept {
    pages: Vec<Memory>,
}

impl Ept {
    pub fn new() -> Ept {
        Ept {
            pages: vec![Memory::new(4096)],
        }
    }

    pub fn root(&self) -> u64 {
        self.pages[0].hva
    }

    pub fn eptp(&self) -> Eptp {
        Eptp::new(self.root(), 4, false)
    }

    /// The host address of the entry for `gpa` at `level`, tables above made as needed.
    pub fn entry(&mut self, gpa: u64, level: u32) -> *mut u64 {
        let mut table = self.root();
        let mut at = 4;
        loop {
            let index = gpa >> (12 + 9 * (at - 1)) & 511;
            let entry = (table + 8 * index) as *mut u64;
            if at == level {
                return entry;
            }
            // SAFETY: inside a table page of this structure.
            unsafe {
                if *entry == 0 {
                    let page = Memory::new(4096);
                    // Bit 10 is ignored without mode-based execute control.
                    *entry = page.hva | 7 | 1 << 10;
                    self.pages.push(page);
                }
                table = *entry & 0x000f_ffff_ffff_f000;
            }
            at -= 1;
        }
    }

    pub fn set(&mut self, gpa: u64, value: u64) {
        let entry = self.entry(gpa, 1);
        // SAFETY: inside a table page of this structure.
        unsafe { entry.write(value) };
    }

    pub fn map(&mut self, gpa: u64, memory: &Memory, bits: u64) {
        for offset in (0..memory.len as u64).step_by(4096) {
            self.set(gpa + offset, (memory.hva + offset) | bits);
        }
    }
}

/// Flat 32-bit segments of privilege 0: code 08H, data 10H.
#[allow(dead_code, reason = "not every program has 32-bit guests")]
pub fn flat_segments_32() -> [Segment; 6] {
    let flat = |access, selector| Segment {
        base: 0,
        limit: u32::MAX,
        access: AccessRights(access),
        selector,
    };
    let mut segments = [flat(0xc093, 0x10); 6];
    segments[SegmentName::Cs as usize] = flat(0xc09b, 0x08);
    segments
}

/// A guest with memory at guest-physical 0.
pub struct Guest {
    pub memory: Memory,
    pub ept: Ept,
    pub machine: Arc<Machine>,
    pub vcpu: Box<Vcpu>,
    pub controls: Controls,
}

/// Where [`Guest::long_mode`] puts its page tables.
const TABLES: u64 = 0x1000;

impl Guest {
    pub fn new(len: usize) -> Guest {
        let memory = Memory::new(len);
        let mut ept = Ept::new();
        ept.map(0, &memory, EPT_RWX);
        let machine = Machine::new();
        let vcpu = Vcpu::new(&machine).unwrap();
        let mut controls = Controls::new();
        controls.primary = PrimaryControls::SECONDARY
            | PrimaryControls::HLT_EXITING
            | PrimaryControls::UNCONDITIONAL_IO_EXITING
            | PrimaryControls::USE_MSR_BITMAPS;
        controls.secondary = SecondaryControls::ENABLE_EPT
            | SecondaryControls::UNRESTRICTED_GUEST
            | SecondaryControls::ENABLE_RDTSCP
            | SecondaryControls::ENABLE_INVPCID
            | SecondaryControls::ENABLE_XSAVES;
        controls.eptp = ept.eptp();
        Guest {
            memory,
            ept,
            machine,
            vcpu,
            controls,
        }
    }

    /// Puts the processor into 64-bit mode at CPL `cpl`, the first 1 GiB mapped to itself with
    /// 2 MiB user pages by tables at guest-physical 1000H.
    pub fn long_mode(&mut self, cpl: u8) {
        self.memory.write_u64(TABLES, (TABLES + 0x1000) | 7);
        self.memory
            .write_u64(TABLES + 0x1000, (TABLES + 0x2000) | 7);
        for i in 0..512 {
            self.memory
                .write_u64(TABLES + 0x2000 + 8 * i, i << 21 | 0x87);
        }
        let state = &mut self.vcpu.state;
        state.cr0 = Cr0::PE | Cr0::MP | Cr0::ET | Cr0::NE | Cr0::WP | Cr0::PG;
        state.cr3 = TABLES;
        state.cr4 = Cr4::PAE | Cr4::OSFXSR | Cr4::OSXMMEXCPT | Cr4::OSXSAVE;
        state.efer = Efer::LME | Efer::LMA | Efer::NXE | Efer::SCE;
        state.xcr0 = Xcr0::X87 | Xcr0::SSE | Xcr0::AVX;
        self.controls.entry = EntryControls::LOAD_EFER | EntryControls::IA32E_MODE_GUEST;
        let dpl = u32::from(cpl) << 5;
        let code = AccessRights(0x9b | dpl | AccessRights::L | AccessRights::G);
        let data = AccessRights(0x93 | dpl | AccessRights::DB | AccessRights::G);
        let flat = |access, selector| Segment {
            base: 0,
            limit: u32::MAX,
            access,
            selector,
        };
        state.segments = [flat(data, 0x2b); 6];
        state.segments[SegmentName::Cs as usize] = flat(code, 0x30 | u16::from(cpl));
        state.segments[SegmentName::Ss as usize] = flat(data, 0x28 | u16::from(cpl));
    }

    pub fn run(&mut self) -> arch::exit::VmExit {
        self.vcpu.enter(&self.controls)
    }
}
