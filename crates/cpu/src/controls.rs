//! What a VM entry takes besides guest state: the VMCS's control fields.

use arch::controls::{
    EntryControls, Eptp, IoBitmap, MsrBitmap, PinControls, PrimaryControls, SecondaryControls,
    VmFunctions,
};
use arch::interruption::InterruptionInfo;

/// The control fields of one VM entry. Names and bits are the SDM's ("VM-Execution Control
/// Fields", "VM-Entry Control Fields").
#[derive(Clone)]
pub struct Controls {
    /// Pin-based VM-execution controls.
    pub pin: PinControls,
    /// Primary processor-based controls.
    pub primary: PrimaryControls,
    /// Secondary processor-based controls.
    pub secondary: SecondaryControls,
    /// VM-entry controls.
    pub entry: EntryControls,
    /// Exceptions that exit, by vector. Page faults also depend on the two fields below.
    pub exception_bitmap: u32,
    /// Page-fault error-code mask.
    pub page_fault_error_code_mask: u32,
    /// Page-fault error-code match.
    pub page_fault_error_code_match: u32,
    /// I/O bitmaps, with [`PrimaryControls::USE_IO_BITMAPS`].
    pub io_bitmap: Box<IoBitmap>,
    /// MSR bitmaps, with [`PrimaryControls::USE_MSR_BITMAPS`].
    pub msr_bitmap: Box<MsrBitmap>,
    /// CR0 bits that the hypervisor owns.
    pub cr0_mask: u64,
    /// What the guest reads in CR0 bits it does not own.
    pub cr0_shadow: u64,
    /// CR4 bits that the hypervisor owns.
    pub cr4_mask: u64,
    /// What the guest reads in CR4 bits it does not own.
    pub cr4_shadow: u64,
    /// EPT pointer, with [`SecondaryControls::ENABLE_EPT`]. Addresses are host virtual.
    pub eptp: Eptp,
    /// The tables to walk when EPT is off: see [`ShadowRoot`].
    pub shadow_root: ShadowRoot,
    /// Virtual-processor identifier, with [`SecondaryControls::ENABLE_VPID`].
    pub vpid: u16,
    /// TPR threshold, with [`PrimaryControls::TPR_SHADOW`].
    pub tpr_threshold: u32,
    /// Host virtual address of the virtual-APIC page, with [`PrimaryControls::TPR_SHADOW`].
    pub virtual_apic: u64,
    /// Host virtual address of the APIC-access page, with
    /// [`SecondaryControls::VIRTUALIZE_APIC_ACCESSES`]: accesses that translate to it are
    /// virtualized or exit, whatever the memory there holds.
    pub apic_access: u64,
    /// Vectors whose virtualized EOI exits, with
    /// [`SecondaryControls::VIRTUAL_INTERRUPT_DELIVERY`].
    pub eoi_exit_bitmap: [u64; 4],
    /// Host virtual address of the posted-interrupt descriptor, with
    /// [`PinControls::POSTED_INTERRUPTS`].
    pub posted_interrupts: u64,
    /// VM functions that VMFUNC may invoke, with [`SecondaryControls::ENABLE_VMFUNC`].
    pub vm_functions: VmFunctions,
    /// Host virtual address of the list of 512 EPT pointers between which
    /// [`VmFunctions::EPTP_SWITCHING`] switches.
    pub eptp_list: u64,
    /// ENCLS leaves that exit, with [`SecondaryControls::ENCLS_EXITING`]; bit 63 stands for those
    /// from 63 on.
    pub encls_exiting_bitmap: u64,
    /// Notify window in time-stamp ticks, with [`SecondaryControls::NOTIFY_EXITING`].
    pub notify_window: u32,
    /// Added to the (scaled) host time-stamp counter, with [`PrimaryControls::TSC_OFFSETTING`].
    pub tsc_offset: u64,
    /// 16.48 fixed-point multiplier, with [`SecondaryControls::TSC_SCALING`].
    pub tsc_multiplier: u64,
    /// Preemption-timer value, in units of 32 time-stamp ticks.
    pub preemption_timer: u32,
    /// XSAVES/XRSTORS components that exit.
    pub xss_exiting_bitmap: u64,
    /// PAUSE-loop exiting: the longest gap between two PAUSEs of one loop, in TSC ticks.
    pub ple_gap: u32,
    /// PAUSE-loop exiting: how long a loop may last, in TSC ticks.
    pub ple_window: u32,
    /// Event to inject on entry.
    pub interruption_info: InterruptionInfo,
    /// Error code of the injected event.
    pub interruption_error_code: u32,
    /// Instruction length of an injected software event.
    pub instruction_length: u32,
}

/// Host-owned page tables for a guest that runs without EPT.
///
/// The guest's own CR3 is not walked; linear addresses go through these tables. The format is
/// that of the processor's current paging mode in VT-x: `levels` 4 or 5 for long-mode formats,
/// 3 for PAE (whose four roots are read from `pdptes`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ShadowRoot {
    /// Host virtual address of the root table, with 4 or 5 levels.
    pub root: u64,
    /// Number of levels: 3, 4 or 5; 0 when EPT is on.
    pub levels: u8,
    /// With 3 levels: the four PDPTEs.
    pub pdptes: [u64; 4],
}

impl Controls {
    /// Controls under which everything that can exit does, without EPT.
    pub fn new() -> Controls {
        Controls {
            pin: PinControls::empty(),
            primary: PrimaryControls::empty(),
            secondary: SecondaryControls::empty(),
            entry: EntryControls::empty(),
            exception_bitmap: 0,
            page_fault_error_code_mask: 0,
            page_fault_error_code_match: 0,
            io_bitmap: Box::new(IoBitmap::intercept_all()),
            msr_bitmap: Box::new(MsrBitmap::intercept_all()),
            cr0_mask: 0,
            cr0_shadow: 0,
            cr4_mask: 0,
            cr4_shadow: 0,
            eptp: Eptp::default(),
            shadow_root: ShadowRoot::default(),
            vpid: 0,
            tpr_threshold: 0,
            virtual_apic: 0,
            apic_access: 0,
            eoi_exit_bitmap: [0; 4],
            posted_interrupts: 0,
            vm_functions: VmFunctions::empty(),
            eptp_list: 0,
            encls_exiting_bitmap: 0,
            notify_window: 0,
            tsc_offset: 0,
            tsc_multiplier: 1 << 48,
            preemption_timer: 0,
            xss_exiting_bitmap: 0,
            ple_gap: 0,
            ple_window: 0,
            interruption_info: InterruptionInfo::NONE,
            interruption_error_code: 0,
            instruction_length: 0,
        }
    }

    /// Whether guest-physical addresses are translated by EPT.
    pub fn ept(&self) -> bool {
        self.primary.contains(PrimaryControls::SECONDARY)
            && self.secondary.contains(SecondaryControls::ENABLE_EPT)
    }
}

impl Default for Controls {
    fn default() -> Controls {
        Controls::new()
    }
}
