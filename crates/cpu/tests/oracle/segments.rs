//! Segment descriptors as the host's user programs have them, and the same in the guest.

use crate::guest::Guest;
use crate::{CODE, DATA, DATA_LEN, State};
use arch::segment::{AccessRights, DescriptorTable, Segment};
use eptide_cpu::CpuState;
use std::arch::asm;

/// Linux's selectors of flat user segments.
pub const CODE_32: u16 = 0x23;
pub const FLAT_DATA: u16 = 0x2b;
pub const CODE_64: u16 = 0x33;

/// Segments of 16-bit programs: the code page, and the data.
pub const CODE_16: u16 = 10 << 3 | 7;
pub const DATA_16: u16 = 11 << 3 | 7;

/// Linear address of the guest's tables.
pub const TABLES: u64 = 0x3000_8000;
const LDT_OFFSET: u64 = 0x800;

/// Linux's GDT as far as user programs can tell: what is zero here is system segments and
/// segments of ring 0, which are alike at CPL 3.
const GDT: [u64; 16] = {
    let mut gdt = [0; 16];
    gdt[1] = 0x00cf_9b00_0000_ffff;
    gdt[2] = 0x00af_9b00_0000_ffff;
    gdt[3] = 0x00cf_9300_0000_ffff;
    gdt[4] = 0x00cf_fb00_0000_ffff;
    gdt[5] = 0x00cf_f300_0000_ffff;
    gdt[6] = 0x00af_fb00_0000_ffff;
    gdt
};

/// A segment of the LDT, as modify_ldt describes it.
struct Local {
    base: u32,
    limit: u32,
    wide: bool,
    /// 0 data, 1 expand-down data, 2 code.
    contents: u8,
    /// Data that cannot be written, code that cannot be read.
    restricted: bool,
    pages: bool,
    present: bool,
}

/// 32-bit data that can be written, from the start of the data.
const PLAIN: Local = Local {
    base: DATA as u32,
    limit: 0xfff,
    wide: true,
    contents: 0,
    restricted: false,
    pages: false,
    present: true,
};

/// Code from the start of the code page.
const LOCAL_CODE: Local = Local {
    base: CODE as u32,
    contents: 2,
    ..PLAIN
};

pub const LOCAL_COUNT: usize = 12;

const LOCALS: [Local; LOCAL_COUNT] = [
    Local {
        base: 0,
        limit: 0xf_ffff,
        pages: true,
        ..PLAIN
    },
    PLAIN,
    Local {
        restricted: true,
        ..PLAIN
    },
    Local {
        contents: 1,
        limit: 0x7ff,
        ..PLAIN
    },
    Local {
        wide: false,
        contents: 1,
        limit: 0x7ff,
        ..PLAIN
    },
    LOCAL_CODE,
    Local {
        wide: false,
        restricted: true,
        limit: 0x1ff,
        ..LOCAL_CODE
    },
    Local {
        present: false,
        ..PLAIN
    },
    Local {
        present: false,
        ..LOCAL_CODE
    },
    Local {
        wide: false,
        ..PLAIN
    },
    Local {
        wide: false,
        ..LOCAL_CODE
    },
    Local {
        wide: false,
        limit: DATA_LEN as u32 - 1,
        ..PLAIN
    },
];

impl Local {
    fn descriptor(&self) -> u64 {
        let kind = 1 | u64::from(!self.restricted) << 1 | u64::from(self.contents) << 2;
        let access = kind | 0x70 | u64::from(self.present) << 7;
        let flags = u64::from(self.wide) << 2 | u64::from(self.pages) << 3;
        let (base, limit) = (u64::from(self.base), u64::from(self.limit));
        limit & 0xffff
            | (base & 0xff_ffff) << 16
            | access << 40
            | (limit >> 16 & 0xf) << 48
            | flags << 52
            | base >> 24 << 56
    }
}

/// Writes the tables at guest-physical `at` and points the guest's registers there.
pub fn install(guest: &mut Guest, at: u64) {
    for (i, descriptor) in GDT.into_iter().enumerate() {
        guest.memory.write_u64(at + 8 * i as u64, descriptor);
    }
    for (i, local) in LOCALS.iter().enumerate() {
        let at = at + LDT_OFFSET + 8 * i as u64;
        guest.memory.write_u64(at, local.descriptor());
    }
    let state = &mut guest.vcpu.state;
    state.gdtr = DescriptorTable {
        base: TABLES,
        limit: 127,
    };
    state.ldtr = Segment {
        base: TABLES + LDT_OFFSET,
        limit: 8 * LOCALS.len() as u32 - 1,
        access: AccessRights(AccessRights::P | AccessRights::TYPE_LDT),
        selector: 0x50,
    };
}

/// Gives this process the LDT. Returns whether the host allows it.
pub fn install_on_host() -> bool {
    LOCALS.iter().enumerate().all(|(i, local)| {
        let flags = u32::from(local.wide)
            | u32::from(local.contents) << 1
            | u32::from(local.restricted) << 3
            | u32::from(local.pages) << 4
            | u32::from(!local.present) << 5;
        let description = [i as u32, local.base, local.limit, flags];
        // SAFETY: the structure is valid for the call; nothing uses these selectors yet.
        let result = unsafe {
            libc::syscall(
                libc::SYS_modify_ldt,
                0x11,
                description.as_ptr(),
                size_of_val(&description),
            )
        };
        result == 0
    })
}

/// Sets the guest's segment registers as [`load_data_segments`] and a signal's return do on the
/// host.
pub fn load(state: &mut CpuState, wanted: &State) {
    state.segments = [segment(wanted.ds); 6];
    state.segments[1] = segment(wanted.cs);
    state.segments[2] = segment(wanted.ss);
    for n in [4, 5] {
        state.segments[n] = Segment::UNUSABLE;
    }
}

fn segment(selector: u16) -> Segment {
    let descriptor = if selector & 4 == 0 {
        GDT[usize::from(selector >> 3)]
    } else {
        LOCALS[usize::from(selector >> 3)].descriptor()
    };
    Segment::from_descriptor(descriptor, selector)
}

/// Loads a data segment into DS and ES of this thread, and null into GS. 64-bit code does not
/// notice.
pub fn load_data_segments(selector: u16) {
    // SAFETY: 64-bit code uses neither the bases nor the limits of DS and ES, and user programs on
    // Linux do not use GS.
    unsafe {
        asm!(
            "mov ds, {data:e}",
            "mov es, {data:e}",
            "mov gs, {null:e}",
            data = in(reg) u32::from(selector),
            null = in(reg) 0,
            options(nostack, preserves_flags)
        );
    }
}
