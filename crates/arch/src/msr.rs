//! Model-specific register numbers and the bits of those that have them.
//!
//! Source: SDM volume 4, "Model-Specific Registers"; the AMD manuals for those marked AMD;
//! the kernel's "KVM-specific MSRs" for those marked KVM.

/// Address of the last machine check, on Pentium processors.
pub const P5_MC_ADDR: u32 = 0x0;
/// Type of the last machine check, on Pentium processors.
pub const P5_MC_TYPE: u32 = 0x1;
/// Time-stamp counter.
pub const TSC: u32 = 0x10;
/// Paravirtual wall clock, old number (KVM).
pub const KVM_WALL_CLOCK: u32 = 0x11;
/// Paravirtual system time, old number (KVM).
pub const KVM_SYSTEM_TIME: u32 = 0x12;
/// Platform identification.
pub const PLATFORM_ID: u32 = 0x17;
/// Local APIC base and mode.
pub const APIC_BASE: u32 = 0x1b;
/// Number of SMIs.
pub const SMI_COUNT: u32 = 0x34;
/// Power-on configuration.
pub const EBL_CR_POWERON: u32 = 0x2a;
/// Frequency configuration of NetBurst processors.
pub const EBC_FREQUENCY_ID: u32 = 0x2c;
/// VMX and SMX enabling.
pub const FEATURE_CONTROL: u32 = 0x3a;
/// Offset added to the time-stamp counter.
pub const TSC_ADJUST: u32 = 0x3b;
/// Speculation control.
pub const SPEC_CTRL: u32 = 0x48;
/// Prediction commands.
pub const PRED_CMD: u32 = 0x49;
/// Microcode update trigger.
pub const BIOS_UPDT_TRIG: u32 = 0x79;
/// Microcode revision.
pub const BIOS_SIGN_ID: u32 = 0x8b;
/// SMRAM base.
pub const SMBASE: u32 = 0x9e;
/// First general-purpose performance counter.
pub const PMC0: u32 = 0xc1;
/// Scaleable bus speed.
pub const FSB_FREQ: u32 = 0xcd;
/// Platform information.
pub const PLATFORM_INFO: u32 = 0xce;
/// UMWAIT and TPAUSE limits.
pub const UMWAIT_CONTROL: u32 = 0xe1;
/// Maximum performance frequency clock count.
pub const MPERF: u32 = 0xe7;
/// Actual performance frequency clock count.
pub const APERF: u32 = 0xe8;
/// MTRR capabilities.
pub const MTRRCAP: u32 = 0xfe;
/// Enumeration of architectural behaviours.
pub const ARCH_CAPABILITIES: u32 = 0x10a;
/// L1 data cache flush command.
pub const FLUSH_CMD: u32 = 0x10b;
/// L2 cache control.
pub const BBL_CR_CTL3: u32 = 0x11e;
/// TSX control.
pub const TSX_CTRL: u32 = 0x122;
/// CPUID faulting and others.
pub const MISC_FEATURES_ENABLES: u32 = 0x140;
/// CS selector of SYSENTER.
pub const SYSENTER_CS: u32 = 0x174;
/// Stack pointer of SYSENTER.
pub const SYSENTER_ESP: u32 = 0x175;
/// Entry point of SYSENTER.
pub const SYSENTER_EIP: u32 = 0x176;
/// Machine-check capabilities.
pub const MCG_CAP: u32 = 0x179;
/// Machine-check status.
pub const MCG_STATUS: u32 = 0x17a;
/// Machine-check control.
pub const MCG_CTL: u32 = 0x17b;
/// First performance event selector.
pub const PERFEVTSEL0: u32 = 0x186;
/// Current performance status.
pub const PERF_STATUS: u32 = 0x198;
/// Performance control.
pub const PERF_CTL: u32 = 0x199;
/// Clock modulation.
pub const CLOCK_MODULATION: u32 = 0x19a;
/// Thermal interrupt control.
pub const THERM_INTERRUPT: u32 = 0x19b;
/// Thermal status.
pub const THERM_STATUS: u32 = 0x19c;
/// Miscellaneous processor features.
pub const MISC_ENABLE: u32 = 0x1a0;
/// Temperature target.
pub const TEMPERATURE_TARGET: u32 = 0x1a2;
/// Debug control.
pub const DEBUGCTL: u32 = 0x1d9;
/// Last branch source.
pub const LASTBRANCHFROMIP: u32 = 0x1db;
/// Last branch destination.
pub const LASTBRANCHTOIP: u32 = 0x1dc;
/// Last branch source before an event.
pub const LASTINTFROMIP: u32 = 0x1dd;
/// Last branch destination before an event.
pub const LASTINTTOIP: u32 = 0x1de;
/// Power control.
pub const POWER_CTL: u32 = 0x1fc;
/// First variable-range MTRR base.
pub const MTRR_PHYSBASE0: u32 = 0x200;
/// First variable-range MTRR mask.
pub const MTRR_PHYSMASK0: u32 = 0x201;
/// Fixed-range MTRR.
pub const MTRR_FIX64K_00000: u32 = 0x250;
/// Fixed-range MTRR.
pub const MTRR_FIX16K_80000: u32 = 0x258;
/// Fixed-range MTRR.
pub const MTRR_FIX16K_A0000: u32 = 0x259;
/// First of eight fixed-range MTRRs.
pub const MTRR_FIX4K_C0000: u32 = 0x268;
/// Last of eight fixed-range MTRRs.
pub const MTRR_FIX4K_F8000: u32 = 0x26f;
/// Page attribute table.
pub const PAT: u32 = 0x277;
/// First corrected machine-check interrupt control.
pub const MC0_CTL2: u32 = 0x280;
/// Default memory type.
pub const MTRR_DEF_TYPE: u32 = 0x2ff;
/// First fixed performance counter.
pub const FIXED_CTR0: u32 = 0x309;
/// Performance monitoring capabilities.
pub const PERF_CAPABILITIES: u32 = 0x345;
/// Fixed-counter control.
pub const FIXED_CTR_CTRL: u32 = 0x38d;
/// Counter overflow status.
pub const PERF_GLOBAL_STATUS: u32 = 0x38e;
/// Counter enables.
pub const PERF_GLOBAL_CTRL: u32 = 0x38f;
/// Counter overflow clear.
pub const PERF_GLOBAL_OVF_CTRL: u32 = 0x390;
/// Precise event sampling.
pub const PEBS_ENABLE: u32 = 0x3f1;
/// First machine-check bank control.
pub const MC0_CTL: u32 = 0x400;
/// First machine-check bank status.
pub const MC0_STATUS: u32 = 0x401;
/// Basic VMX information.
pub const VMX_BASIC: u32 = 0x480;
/// Pin-based control capabilities.
pub const VMX_PINBASED_CTLS: u32 = 0x481;
/// Primary control capabilities.
pub const VMX_PROCBASED_CTLS: u32 = 0x482;
/// VM-exit control capabilities.
pub const VMX_EXIT_CTLS: u32 = 0x483;
/// VM-entry control capabilities.
pub const VMX_ENTRY_CTLS: u32 = 0x484;
/// Miscellaneous VMX data.
pub const VMX_MISC: u32 = 0x485;
/// CR0 bits fixed to 1.
pub const VMX_CR0_FIXED0: u32 = 0x486;
/// CR0 bits fixed to 0.
pub const VMX_CR0_FIXED1: u32 = 0x487;
/// CR4 bits fixed to 1.
pub const VMX_CR4_FIXED0: u32 = 0x488;
/// CR4 bits fixed to 0.
pub const VMX_CR4_FIXED1: u32 = 0x489;
/// VMCS enumeration.
pub const VMX_VMCS_ENUM: u32 = 0x48a;
/// Secondary control capabilities.
pub const VMX_PROCBASED_CTLS2: u32 = 0x48b;
/// EPT and VPID capabilities.
pub const VMX_EPT_VPID_CAP: u32 = 0x48c;
/// True pin-based control capabilities.
pub const VMX_TRUE_PINBASED_CTLS: u32 = 0x48d;
/// True primary control capabilities.
pub const VMX_TRUE_PROCBASED_CTLS: u32 = 0x48e;
/// True VM-exit control capabilities.
pub const VMX_TRUE_EXIT_CTLS: u32 = 0x48f;
/// True VM-entry control capabilities.
pub const VMX_TRUE_ENTRY_CTLS: u32 = 0x490;
/// VM-function capabilities.
pub const VMX_VMFUNC: u32 = 0x491;
/// Debug store area.
pub const DS_AREA: u32 = 0x600;
/// Units of the energy counters.
pub const RAPL_POWER_UNIT: u32 = 0x606;
/// Energy that the package used.
pub const PKG_ENERGY_STATUS: u32 = 0x611;
/// Energy that the memory used.
pub const DRAM_ENERGY_STATUS: u32 = 0x619;
/// Energy that the cores used.
pub const PP0_ENERGY_STATUS: u32 = 0x639;
/// Energy that the graphics used.
pub const PP1_ENERGY_STATUS: u32 = 0x641;
/// TSC deadline of the APIC timer.
pub const TSC_DEADLINE: u32 = 0x6e0;
/// Supervisor protection-key rights.
pub const PKRS: u32 = 0x6e1;
/// First x2APIC register.
pub const X2APIC_BASE: u32 = 0x800;
/// Extended supervisor state mask.
pub const XSS: u32 = 0xda0;
/// Paravirtual wall clock (KVM).
pub const KVM_WALL_CLOCK_NEW: u32 = 0x4b56_4d00;
/// Paravirtual system time (KVM).
pub const KVM_SYSTEM_TIME_NEW: u32 = 0x4b56_4d01;
/// Asynchronous page faults (KVM).
pub const KVM_ASYNC_PF_EN: u32 = 0x4b56_4d02;
/// Steal time (KVM).
pub const KVM_STEAL_TIME: u32 = 0x4b56_4d03;
/// Paravirtual end of interrupt (KVM).
pub const KVM_PV_EOI_EN: u32 = 0x4b56_4d04;
/// Host-side halt polling (KVM).
pub const KVM_POLL_CONTROL: u32 = 0x4b56_4d05;
/// Asynchronous page-ready vector (KVM).
pub const KVM_ASYNC_PF_INT: u32 = 0x4b56_4d06;
/// Asynchronous page-ready acknowledgement (KVM).
pub const KVM_ASYNC_PF_ACK: u32 = 0x4b56_4d07;
/// Migration readiness (KVM).
pub const KVM_MIGRATION_CONTROL: u32 = 0x4b56_4d08;
/// Extended feature enables.
pub const EFER: u32 = 0xc000_0080;
/// SYSCALL selectors.
pub const STAR: u32 = 0xc000_0081;
/// SYSCALL target in 64-bit mode.
pub const LSTAR: u32 = 0xc000_0082;
/// SYSCALL target in compatibility mode.
pub const CSTAR: u32 = 0xc000_0083;
/// SYSCALL flag mask.
pub const FMASK: u32 = 0xc000_0084;
/// FS base.
pub const FS_BASE: u32 = 0xc000_0100;
/// GS base.
pub const GS_BASE: u32 = 0xc000_0101;
/// Swap target of GS base.
pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
/// Auxiliary value of RDTSCP and RDPID.
pub const TSC_AUX: u32 = 0xc000_0103;
/// TSC frequency ratio (AMD).
pub const TSC_RATIO: u32 = 0xc000_0104;
/// Performance event selector (AMD).
pub const K7_EVNTSEL0: u32 = 0xc001_0000;
/// Performance counter (AMD).
pub const K7_PERFCTR0: u32 = 0xc001_0004;
/// System configuration (AMD).
pub const AMD64_SYSCFG: u32 = 0xc001_0010;
/// Hardware configuration (AMD).
pub const K7_HWCR: u32 = 0xc001_0015;
/// Clock control of the K7 (AMD).
pub const K7_CLK_CTL: u32 = 0xc001_001b;
/// Northbridge configuration (AMD).
pub const AMD64_NB_CFG: u32 = 0xc001_001f;
/// Microcode patch loader (AMD).
pub const AMD64_PATCH_LOADER: u32 = 0xc001_0020;
/// Interrupt-pending message (AMD).
pub const K8_INT_PENDING_MSG: u32 = 0xc001_0055;
/// MMIO configuration base (AMD).
pub const FAM10H_MMIO_CONF_BASE: u32 = 0xc001_0058;
/// Base of the protected memory of system-management mode (AMD); its mask follows.
pub const K8_TSEG_ADDR: u32 = 0xc001_0112;
/// Mask of the protected memory of system-management mode (AMD).
pub const K8_TSEG_MASK: u32 = 0xc001_0113;
/// SVM control (AMD).
pub const VM_CR: u32 = 0xc001_0114;
/// SVM host save area (AMD).
pub const VM_HSAVE_PA: u32 = 0xc001_0117;
/// OS visible workaround length (AMD).
pub const AMD64_OSVW_ID_LENGTH: u32 = 0xc001_0140;
/// OS visible workaround status (AMD).
pub const AMD64_OSVW_STATUS: u32 = 0xc001_0141;
/// Load-store configuration (AMD).
pub const AMD64_LS_CFG: u32 = 0xc001_1020;
/// Instruction-cache configuration (AMD).
pub const AMD64_IC_CFG: u32 = 0xc001_1021;
/// Data-cache configuration (AMD).
pub const AMD64_DC_CFG: u32 = 0xc001_1022;
/// Table-walker configuration (AMD).
pub const AMD64_TW_CFG: u32 = 0xc001_1023;
/// Decode configuration (AMD).
pub const AMD64_DE_CFG: u32 = 0xc001_1029;
/// Bus-unit configuration (AMD).
pub const AMD64_BU_CFG2: u32 = 0xc001_102a;
/// Execution-unit configuration (AMD).
pub const F15H_EX_CFG: u32 = 0xc001_102c;

/// Bits of [`APIC_BASE`].
pub mod apic_base {
    /// The processor is the bootstrap processor.
    pub const BSP: u64 = 1 << 8;
    /// x2APIC mode.
    pub const X2APIC: u64 = 1 << 10;
    /// APIC global enable.
    pub const ENABLE: u64 = 1 << 11;
    /// The address field, below MAXPHYADDR.
    pub const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
}

/// Bits of [`MISC_ENABLE`].
pub mod misc_enable {
    /// Fast string operations.
    pub const FAST_STRING: u64 = 1 << 0;
    /// Performance monitoring available (read-only).
    pub const EMON: u64 = 1 << 7;
    /// Branch trace storage unavailable (read-only).
    pub const BTS_UNAVAIL: u64 = 1 << 11;
    /// Precise event sampling unavailable (read-only).
    pub const PEBS_UNAVAIL: u64 = 1 << 12;
    /// MONITOR and MWAIT offered in CPUID.
    pub const MWAIT: u64 = 1 << 18;
    /// CPUID leaves limited to 3.
    pub const LIMIT_CPUID: u64 = 1 << 22;
    /// Execute-disable is hidden: CPUID shows no NX and setting EFER.NXE faults.
    pub const XD_DISABLE: u64 = 1 << 34;
}

/// Bits of [`DEBUGCTL`].
pub mod debugctl {
    /// Last-branch recording.
    pub const LBR: u64 = 1 << 0;
    /// Single step on branches.
    pub const BTF: u64 = 1 << 1;
}

/// The value of [`PAT`] at reset.
pub const PAT_RESET: u64 = 0x0007_0406_0007_0406;
