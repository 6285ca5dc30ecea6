//! VM-execution, VM-exit and VM-entry controls.
//!
//! Source: SDM volume 3, "VM-Execution Control Fields", "VM-Exit Controls", "VM-Entry Controls".

use bitflags::bitflags;

bitflags! {
    /// Pin-based VM-execution controls.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct PinControls: u32 {
        /// External interrupts cause VM exits.
        const EXTERNAL_INTERRUPT_EXITING = 1 << 0;
        /// NMIs cause VM exits.
        const NMI_EXITING = 1 << 3;
        /// NMI blocking is tracked for the guest.
        const VIRTUAL_NMIS = 1 << 5;
        /// The VMX-preemption timer counts down.
        const PREEMPTION_TIMER = 1 << 6;
        /// Posted interrupts are processed.
        const POSTED_INTERRUPTS = 1 << 7;
    }
}

bitflags! {
    /// Primary processor-based VM-execution controls.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct PrimaryControls: u32 {
        /// Exit when interrupts can be taken.
        const INTERRUPT_WINDOW_EXITING = 1 << 2;
        /// Time-stamp reads are offset.
        const TSC_OFFSETTING = 1 << 3;
        /// HLT exits.
        const HLT_EXITING = 1 << 7;
        /// INVLPG (and INVPCID) exit.
        const INVLPG_EXITING = 1 << 9;
        /// MWAIT exits.
        const MWAIT_EXITING = 1 << 10;
        /// RDPMC exits.
        const RDPMC_EXITING = 1 << 11;
        /// RDTSC and RDTSCP exit.
        const RDTSC_EXITING = 1 << 12;
        /// MOV to CR3 exits.
        const CR3_LOAD_EXITING = 1 << 15;
        /// MOV from CR3 exits.
        const CR3_STORE_EXITING = 1 << 16;
        /// MOV to CR8 exits.
        const CR8_LOAD_EXITING = 1 << 19;
        /// MOV from CR8 exits.
        const CR8_STORE_EXITING = 1 << 20;
        /// CR8 is the TPR of the virtual-APIC page.
        const TPR_SHADOW = 1 << 21;
        /// Exit when NMIs can be taken.
        const NMI_WINDOW_EXITING = 1 << 22;
        /// MOV DR exits.
        const MOV_DR_EXITING = 1 << 23;
        /// Every I/O instruction exits.
        const UNCONDITIONAL_IO_EXITING = 1 << 24;
        /// The I/O bitmaps decide which I/O instructions exit.
        const USE_IO_BITMAPS = 1 << 25;
        /// Exit after each instruction.
        const MONITOR_TRAP_FLAG = 1 << 27;
        /// The MSR bitmaps decide which MSR accesses exit; without it all do.
        const USE_MSR_BITMAPS = 1 << 28;
        /// MONITOR exits.
        const MONITOR_EXITING = 1 << 29;
        /// PAUSE exits.
        const PAUSE_EXITING = 1 << 30;
        /// The secondary controls are in force.
        const SECONDARY = 1 << 31;
    }
}

bitflags! {
    /// Secondary processor-based VM-execution controls.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct SecondaryControls: u32 {
        /// Accesses to the APIC-access page are virtualized or exit.
        const VIRTUALIZE_APIC_ACCESSES = 1 << 0;
        /// Guest-physical addresses are translated by EPT.
        const ENABLE_EPT = 1 << 1;
        /// Descriptor-table instructions exit.
        const DESCRIPTOR_TABLE_EXITING = 1 << 2;
        /// RDTSCP is available.
        const ENABLE_RDTSCP = 1 << 3;
        /// x2APIC MSR accesses are virtualized.
        const VIRTUALIZE_X2APIC = 1 << 4;
        /// Translations are tagged with the VPID.
        const ENABLE_VPID = 1 << 5;
        /// WBINVD exits.
        const WBINVD_EXITING = 1 << 6;
        /// The guest may run unpaged or in real mode.
        const UNRESTRICTED_GUEST = 1 << 7;
        /// APIC registers are virtualized.
        const APIC_REGISTER_VIRTUALIZATION = 1 << 8;
        /// Pending virtual interrupts are evaluated and delivered.
        const VIRTUAL_INTERRUPT_DELIVERY = 1 << 9;
        /// A series of PAUSEs at CPL 0 exits.
        const PAUSE_LOOP_EXITING = 1 << 10;
        /// RDRAND exits.
        const RDRAND_EXITING = 1 << 11;
        /// INVPCID is available.
        const ENABLE_INVPCID = 1 << 12;
        /// VMFUNC is available.
        const ENABLE_VMFUNC = 1 << 13;
        /// VMREAD and VMWRITE may use a shadow VMCS.
        const VMCS_SHADOWING = 1 << 14;
        /// ENCLS exits.
        const ENCLS_EXITING = 1 << 15;
        /// RDSEED exits.
        const RDSEED_EXITING = 1 << 16;
        /// Writes that set an EPT dirty bit are logged.
        const ENABLE_PML = 1 << 17;
        /// EPT violations may become #VE.
        const EPT_VIOLATION_VE = 1 << 18;
        /// XSAVES and XRSTORS are available.
        const ENABLE_XSAVES = 1 << 20;
        /// EPT execute permission depends on the linear address's mode.
        const MODE_BASED_EXECUTE = 1 << 22;
        /// Time-stamp reads are scaled.
        const TSC_SCALING = 1 << 25;
        /// TPAUSE, UMONITOR and UMWAIT are available.
        const USER_WAIT_PAUSE = 1 << 26;
        /// Bus locks exit.
        const BUS_LOCK_DETECTION = 1 << 30;
        /// A guest that blocks events for too long exits.
        const NOTIFY_EXITING = 1 << 31;
    }
}

bitflags! {
    /// VM-entry controls.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct EntryControls: u32 {
        /// Load DR7 and IA32_DEBUGCTL.
        const LOAD_DEBUG_CONTROLS = 1 << 2;
        /// The guest is in IA-32e mode after entry.
        const IA32E_MODE_GUEST = 1 << 9;
        /// Load IA32_PAT.
        const LOAD_PAT = 1 << 14;
        /// Load IA32_EFER.
        const LOAD_EFER = 1 << 15;
    }
}

/// The EPT pointer's format. The address is that of the root table.
///
/// Source: SDM volume 3, "Extended-Page-Table Pointer (EPTP)".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct Eptp(pub u64);

impl Eptp {
    /// Accessed and dirty flags are kept in EPT entries.
    pub const ACCESSED_DIRTY: u64 = 1 << 6;
    /// The paging-structure memory type "write-back".
    pub const WRITE_BACK: u64 = 6;

    /// An EPTP for the root table at `root` with `levels` (4 or 5) levels.
    pub const fn new(root: u64, levels: u8, accessed_dirty: bool) -> Eptp {
        let ad = if accessed_dirty {
            Self::ACCESSED_DIRTY
        } else {
            0
        };
        Eptp(root | Self::WRITE_BACK | (levels as u64 - 1) << 3 | ad)
    }

    /// Whether an entry accepts the pointer: memory type uncacheable or write-back, four or five
    /// levels, no reserved bit.
    pub const fn is_valid(self) -> bool {
        let memory_type = self.0 & 7;
        let reserved = 0x1f << 7 | 0xfff << 52;
        (memory_type == 0 || memory_type == Self::WRITE_BACK)
            && matches!(self.levels(), 4 | 5)
            && self.0 & reserved == 0
    }

    /// Address of the root table.
    pub const fn root(self) -> u64 {
        self.0 & 0x000f_ffff_ffff_f000
    }

    /// Number of levels.
    pub const fn levels(self) -> u8 {
        (self.0 >> 3 & 7) as u8 + 1
    }

    /// Whether EPT entries hold accessed and dirty flags.
    pub const fn accessed_dirty(self) -> bool {
        self.0 & Self::ACCESSED_DIRTY != 0
    }
}

bitflags! {
    /// VM-function controls: the functions that VMFUNC may invoke, by number.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct VmFunctions: u64 {
        /// Function 0: load an EPT pointer from the list.
        const EPTP_SWITCHING = 1 << 0;
    }
}

bitflags! {
    /// Guest interruptibility state.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Interruptibility: u32 {
        /// Blocking by STI.
        const STI = 1 << 0;
        /// Blocking by MOV SS or POP SS.
        const MOV_SS = 1 << 1;
        /// Blocking by SMI.
        const SMI = 1 << 2;
        /// Blocking by NMI (virtual, with virtual NMIs).
        const NMI = 1 << 3;
        /// Enclave interruption.
        const ENCLAVE = 1 << 4;
    }
}

/// Guest activity state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u32)]
pub enum Activity {
    /// Executing instructions.
    #[default]
    Active = 0,
    /// Halted by HLT.
    Halt = 1,
    /// Shut down by a triple fault.
    Shutdown = 2,
    /// Waiting for a start-up IPI.
    WaitForSipi = 3,
}

/// The MSR bitmap: which MSR accesses exit.
///
/// Source: SDM volume 3, "MSR-Bitmap Address".
#[derive(Clone)]
pub struct MsrBitmap([u8; 4096]);

impl MsrBitmap {
    /// A bitmap under which every access exits.
    pub const fn intercept_all() -> MsrBitmap {
        MsrBitmap([0xff; 4096])
    }

    fn position(msr: u32, write: bool) -> Option<(usize, u8)> {
        let (base, index) = match msr {
            0..=0x1fff => (0, msr),
            0xc000_0000..=0xc000_1fff => (1024, msr & 0x1fff),
            _ => return None,
        };
        let base = if write { base + 2048 } else { base };
        Some((base + (index / 8) as usize, 1 << (index % 8)))
    }

    /// Whether reading (or writing) `msr` exits. MSRs outside both ranges always do.
    pub fn exits(&self, msr: u32, write: bool) -> bool {
        match Self::position(msr, write) {
            Some((byte, bit)) => self.0[byte] & bit != 0,
            None => true,
        }
    }

    /// Sets whether reading (or writing) `msr` exits. Ignored outside both ranges.
    pub fn set(&mut self, msr: u32, write: bool, exits: bool) {
        if let Some((byte, bit)) = Self::position(msr, write) {
            if exits {
                self.0[byte] |= bit;
            } else {
                self.0[byte] &= !bit;
            }
        }
    }
}

/// The I/O bitmaps A and B as one.
///
/// Source: SDM volume 3, "I/O-Bitmap Addresses".
#[derive(Clone)]
pub struct IoBitmap([u8; 8192]);

impl IoBitmap {
    /// A bitmap under which every access exits.
    pub const fn intercept_all() -> IoBitmap {
        IoBitmap([0xff; 8192])
    }

    /// Whether an access of `size` bytes at `port` exits; wrapping past the last port does.
    pub fn exits(&self, port: u16, size: u8) -> bool {
        (0..size as u32).any(|i| {
            let port = port as u32 + i;
            port > 0xffff || self.0[(port / 8) as usize] & 1 << (port % 8) != 0
        })
    }

    /// Sets whether accesses to `port` exit.
    pub fn set(&mut self, port: u16, exits: bool) {
        let (byte, bit) = ((port / 8) as usize, 1 << (port % 8));
        if exits {
            self.0[byte] |= bit;
        } else {
            self.0[byte] &= !bit;
        }
    }
}

const _: () = assert!(Eptp::new(0x1000, 4, true).0 == 0x1000 | 6 | 3 << 3 | 1 << 6);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn msr_bitmap_ranges() {
        let mut bitmap = MsrBitmap::intercept_all();
        bitmap.set(0xc000_0100, false, false);
        assert!(!bitmap.exits(0xc000_0100, false));
        assert!(bitmap.exits(0xc000_0100, true));
        assert!(bitmap.exits(0x4000_0000, false));
    }

    #[test]
    fn io_bitmap_wraps() {
        let mut bitmap = IoBitmap::intercept_all();
        bitmap.set(0xffff, false);
        assert!(!bitmap.exits(0xffff, 1));
        assert!(bitmap.exits(0xffff, 2));
    }
}
