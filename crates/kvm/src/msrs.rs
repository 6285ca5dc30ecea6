//! Model-specific registers: one table of who reads and writes which.
//!
//! A row is a range of numbers, whether KVM_GET_MSR_INDEX_LIST names it, its two functions, and
//! under which condition it is there for a guest. Like KVM, few registers have one: systems read
//! most of them on some processor or other without asking CPUID.
//! The lists, both ioctls and the guest's RDMSR and WRMSR come from the table. Registers that the
//! processor holds are passed through by the MSR bitmap ([`DIRECT`]) and are rows as well, for
//! user space.
//!
//! Source: SDM volume 4; the kernel's "KVM-specific MSRs".

mod handlers;

pub(crate) use handlers::allowed_efer;

use crate::cpuid::pv;
use crate::vcpu::{Core, Vcpu};
use arch::controls::MsrBitmap;
use arch::cpuid::Feature;
use arch::msr;

/// Number of machine-check banks.
pub(crate) const MCE_BANKS: usize = 32;
/// Number of variable-range MTRR pairs.
const VARIABLE_MTRRS: u32 = 8;

/// Why an access failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MsrError {
    /// There is no such register.
    Unknown,
    /// The register exists; the value or the access is not allowed.
    Invalid,
}

/// An access to one register.
pub(crate) struct Access<'a> {
    pub(crate) core: &'a mut Core,
    pub(crate) vcpu: &'a Vcpu,
    pub(crate) index: u32,
    /// Made by user space, which may set what a guest may not.
    pub(crate) trusted: bool,
}

type Read = fn(&mut Access<'_>) -> Result<u64, MsrError>;
type Write = fn(&mut Access<'_>, u64) -> Result<(), MsrError>;

/// Which list names a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Listed {
    /// KVM_GET_MSR_INDEX_LIST.
    State,
    /// Neither list.
    No,
}

/// Under which condition a guest has a register.
#[derive(Clone, Copy, Debug)]
enum Exists {
    /// Always.
    Always,
    /// CPUID offers one of these. User space reads and writes the register all the same, as it
    /// may do so before it says what CPUID offers.
    With(&'static [Feature]),
    /// KVM's CPUID leaf offers this bit, if that counts (KVM_CAP_ENFORCE_PV_FEATURE_CPUID); then
    /// for user space as well.
    Paravirtual(u32),
}

#[derive(Debug)]
struct Row {
    first: u32,
    last: u32,
    listed: Listed,
    exists: Exists,
    read: Read,
    write: Write,
}

impl Row {
    fn holds(&self, index: u32) -> bool {
        (self.first..=self.last).contains(&index)
    }

    const fn with(mut self, features: &'static [Feature]) -> Row {
        self.exists = Exists::With(features);
        self
    }

    const fn paravirtual(mut self, feature: u32) -> Row {
        self.exists = Exists::Paravirtual(feature);
        self
    }

    fn exists(&self, core: &Core, trusted: bool) -> bool {
        match self.exists {
            Exists::Always => true,
            Exists::With(features) => {
                trusted || features.iter().any(|&feature| core.features.has(feature))
            }
            Exists::Paravirtual(feature) => core.offers_paravirtual(feature),
        }
    }
}

const fn row(first: u32, last: u32, listed: Listed, read: Read, write: Write) -> Row {
    Row {
        first,
        last,
        listed,
        exists: Exists::Always,
        read,
        write,
    }
}

const fn one(index: u32, listed: Listed, read: Read, write: Write) -> Row {
    row(index, index, listed, read, write)
}

use Listed::{No, State};
use handlers as h;

/// Each of these makes a bit of IA32_SPEC_CTRL.
const SPECULATION_CONTROL: &[Feature] = &[
    Feature::IBRS,
    Feature::STIBP,
    Feature::SSBD,
    Feature::AMD_IBRS,
    Feature::AMD_STIBP,
    Feature::AMD_SSBD,
];

/// Every register, in ascending order.
static TABLE: &[Row] = &[
    row(
        msr::P5_MC_ADDR,
        msr::P5_MC_TYPE,
        No,
        h::read_zero,
        h::reject,
    ),
    one(msr::TSC, State, h::read_tsc, h::write_tsc),
    one(
        msr::KVM_WALL_CLOCK,
        State,
        h::read_stored,
        h::write_wall_clock,
    )
    .paravirtual(pv::CLOCKSOURCE),
    one(
        msr::KVM_SYSTEM_TIME,
        State,
        h::read_stored,
        h::write_system_time,
    )
    .paravirtual(pv::CLOCKSOURCE),
    one(msr::PLATFORM_ID, No, h::read_zero, h::reject),
    one(msr::APIC_BASE, No, h::read_apic_base, h::write_apic_base),
    one(msr::EBL_CR_POWERON, No, h::read_zero, h::reject),
    one(
        msr::EBC_FREQUENCY_ID,
        No,
        h::read_netburst_frequency,
        h::reject,
    ),
    one(msr::SMI_COUNT, State, h::read_stored, h::write_trusted),
    one(
        msr::FEATURE_CONTROL,
        State,
        h::read_stored,
        h::write_feature_control,
    ),
    one(msr::TSC_ADJUST, State, h::read_stored, h::write_tsc_adjust),
    one(msr::SPEC_CTRL, State, h::read_spec_ctrl, h::write_spec_ctrl).with(SPECULATION_CONTROL),
    one(msr::PRED_CMD, No, h::write_only, h::write_command)
        .with(&[Feature::IBRS, Feature::AMD_IBPB]),
    one(msr::BIOS_UPDT_TRIG, No, h::read_zero, h::ignore),
    one(
        msr::BIOS_SIGN_ID,
        State,
        h::read_stored,
        h::write_trusted_or_ignore,
    ),
    one(msr::SMBASE, State, h::read_smbase, h::write_smbase),
    row(msr::PMC0, msr::PMC0 + 1, No, h::read_zero, h::ignore),
    one(msr::FSB_FREQ, No, h::read_fsb_freq, h::reject),
    one(
        msr::PLATFORM_INFO,
        State,
        h::read_platform_info,
        h::write_trusted,
    ),
    one(msr::MTRRCAP, No, h::read_mtrr_cap, h::reject),
    one(
        msr::ARCH_CAPABILITIES,
        State,
        h::read_stored,
        h::write_trusted,
    )
    .with(&[Feature::ARCH_CAPABILITIES]),
    one(msr::FLUSH_CMD, No, h::write_only, h::write_command).with(&[Feature::FLUSH_L1D]),
    one(msr::BBL_CR_CTL3, No, h::read_l2_control, h::ignore),
    one(
        msr::MISC_FEATURES_ENABLES,
        State,
        h::read_stored,
        h::write_zero_only,
    ),
    one(msr::SYSENTER_CS, State, h::read_cpu, h::write_cpu),
    one(msr::SYSENTER_ESP, State, h::read_cpu, h::write_cpu_address),
    one(msr::SYSENTER_EIP, State, h::read_cpu, h::write_cpu_address),
    one(msr::MCG_CAP, No, h::read_stored, h::reject),
    one(msr::MCG_STATUS, State, h::read_stored, h::write_stored),
    one(msr::MCG_CTL, State, h::read_stored, h::write_mcg_ctl),
    row(
        msr::PERFEVTSEL0,
        msr::PERFEVTSEL0 + 1,
        No,
        h::read_zero,
        h::ignore,
    ),
    one(msr::PERF_STATUS, No, h::read_perf_status, h::reject),
    one(msr::PERF_CTL, No, h::read_zero, h::ignore),
    one(
        msr::MISC_ENABLE,
        State,
        h::read_stored,
        h::write_misc_enable,
    ),
    one(msr::DEBUGCTL, No, h::read_debugctl, h::write_debugctl),
    row(
        msr::LASTBRANCHFROMIP,
        msr::LASTINTTOIP,
        No,
        h::read_zero,
        h::ignore,
    ),
    one(msr::POWER_CTL, State, h::read_stored, h::write_stored),
    row(
        msr::MTRR_PHYSBASE0,
        msr::MTRR_PHYSBASE0 + 2 * VARIABLE_MTRRS - 1,
        State,
        h::read_stored,
        h::write_variable_mtrr,
    ),
    one(
        msr::MTRR_FIX64K_00000,
        State,
        h::read_stored,
        h::write_fixed_mtrr,
    ),
    row(
        msr::MTRR_FIX16K_80000,
        msr::MTRR_FIX16K_A0000,
        State,
        h::read_stored,
        h::write_fixed_mtrr,
    ),
    row(
        msr::MTRR_FIX4K_C0000,
        msr::MTRR_FIX4K_F8000,
        State,
        h::read_stored,
        h::write_fixed_mtrr,
    ),
    one(msr::PAT, State, h::read_pat, h::write_pat),
    row(
        msr::MC0_CTL2,
        msr::MC0_CTL2 + MCE_BANKS as u32 - 1,
        No,
        h::read_mce_ctl2,
        h::write_mce_ctl2,
    ),
    one(
        msr::MTRR_DEF_TYPE,
        State,
        h::read_stored,
        h::write_mtrr_def_type,
    ),
    one(
        msr::PERF_CAPABILITIES,
        State,
        h::read_zero,
        h::write_perf_capabilities,
    )
    .with(&[Feature::PDCM]),
    row(
        msr::MC0_CTL,
        msr::MC0_CTL + 4 * MCE_BANKS as u32 - 1,
        No,
        h::read_mce_bank,
        h::write_mce_bank,
    ),
    one(msr::RAPL_POWER_UNIT, No, h::read_zero, h::reject),
    one(msr::PKG_ENERGY_STATUS, No, h::read_zero, h::reject),
    one(msr::DRAM_ENERGY_STATUS, No, h::read_zero, h::reject),
    one(msr::PP0_ENERGY_STATUS, No, h::read_zero, h::reject),
    one(msr::PP1_ENERGY_STATUS, No, h::read_zero, h::reject),
    one(
        msr::TSC_DEADLINE,
        State,
        h::read_tsc_deadline,
        h::write_tsc_deadline,
    ),
    row(
        msr::X2APIC_BASE,
        msr::X2APIC_BASE + 0xff,
        No,
        h::read_x2apic,
        h::write_x2apic,
    ),
    one(msr::XSS, State, h::read_xss, h::write_xss).with(&[Feature::XSAVES]),
    one(
        msr::KVM_WALL_CLOCK_NEW,
        State,
        h::read_stored,
        h::write_wall_clock,
    )
    .paravirtual(pv::CLOCKSOURCE2),
    one(
        msr::KVM_SYSTEM_TIME_NEW,
        State,
        h::read_stored,
        h::write_system_time,
    )
    .paravirtual(pv::CLOCKSOURCE2),
    one(
        msr::KVM_ASYNC_PF_EN,
        State,
        h::read_stored,
        h::write_async_page_faults,
    )
    .paravirtual(pv::ASYNC_PF),
    one(
        msr::KVM_STEAL_TIME,
        State,
        h::read_stored,
        h::write_steal_time,
    )
    .paravirtual(pv::STEAL_TIME),
    one(msr::KVM_PV_EOI_EN, State, h::read_stored, h::write_pv_eoi).paravirtual(pv::PV_EOI),
    one(
        msr::KVM_POLL_CONTROL,
        State,
        h::read_stored,
        h::write_poll_control,
    )
    .paravirtual(pv::POLL_CONTROL),
    one(
        msr::KVM_ASYNC_PF_INT,
        State,
        h::read_stored,
        h::write_async_vector,
    )
    .paravirtual(pv::ASYNC_PF_INT),
    one(msr::KVM_ASYNC_PF_ACK, State, h::read_zero, h::ignore).paravirtual(pv::ASYNC_PF_INT),
    one(msr::EFER, State, h::read_efer, h::write_efer),
    one(msr::STAR, State, h::read_cpu, h::write_cpu),
    one(msr::LSTAR, State, h::read_cpu, h::write_cpu_address),
    one(msr::CSTAR, State, h::read_cpu, h::write_cpu_address),
    one(msr::FMASK, State, h::read_cpu, h::write_cpu),
    one(msr::FS_BASE, No, h::read_cpu, h::write_cpu_address),
    one(msr::GS_BASE, No, h::read_cpu, h::write_cpu_address),
    one(
        msr::KERNEL_GS_BASE,
        State,
        h::read_cpu,
        h::write_cpu_address,
    ),
    one(msr::TSC_AUX, State, h::read_tsc_aux, h::write_tsc_aux)
        .with(&[Feature::RDTSCP, Feature::RDPID]),
    row(
        msr::K7_EVNTSEL0,
        msr::K7_EVNTSEL0 + 3,
        No,
        h::read_zero,
        h::ignore,
    ),
    row(
        msr::K7_PERFCTR0,
        msr::K7_PERFCTR0 + 3,
        No,
        h::read_zero,
        h::ignore,
    ),
    one(msr::AMD64_SYSCFG, No, h::read_zero, h::ignore),
    one(msr::K7_HWCR, State, h::read_stored, h::write_hwcr),
    one(msr::K7_CLK_CTL, No, h::read_k7_clock_control, h::reject),
    one(msr::AMD64_NB_CFG, No, h::read_zero, h::ignore),
    one(msr::AMD64_PATCH_LOADER, No, h::write_only, h::ignore),
    one(msr::K8_INT_PENDING_MSG, No, h::read_zero, h::reject),
    one(
        msr::FAM10H_MMIO_CONF_BASE,
        No,
        h::read_zero,
        h::write_zero_only,
    ),
    row(
        msr::K8_TSEG_ADDR,
        msr::K8_TSEG_MASK,
        No,
        h::read_zero,
        h::reject,
    ),
    one(msr::VM_HSAVE_PA, No, h::read_zero, h::ignore),
    row(
        msr::AMD64_OSVW_ID_LENGTH,
        msr::AMD64_OSVW_STATUS,
        No,
        h::read_stored,
        h::write_trusted,
    )
    .with(&[Feature::OSVW]),
    one(msr::AMD64_LS_CFG, No, h::read_zero, h::ignore),
    row(
        msr::AMD64_IC_CFG,
        msr::AMD64_TW_CFG,
        No,
        h::read_zero,
        h::ignore,
    ),
    one(msr::AMD64_DE_CFG, No, h::read_stored, h::write_stored),
    one(msr::AMD64_BU_CFG2, No, h::read_zero, h::ignore),
    one(msr::F15H_EX_CFG, No, h::read_zero, h::ignore),
];

/// Registers that the processor holds and the guest reads (and writes) without an exit.
const DIRECT: &[(u32, bool)] = &[
    (msr::TSC, false),
    (msr::SYSENTER_CS, true),
    (msr::SYSENTER_ESP, true),
    (msr::SYSENTER_EIP, true),
    (msr::STAR, true),
    (msr::LSTAR, true),
    (msr::CSTAR, true),
    (msr::FMASK, true),
    (msr::FS_BASE, true),
    (msr::GS_BASE, true),
    (msr::KERNEL_GS_BASE, true),
];

/// Feature MSRs: what the system descriptor's KVM_GET_MSRS answers.
const FEATURES: &[(u32, u64)] = &[
    (msr::ARCH_CAPABILITIES, handlers::ARCH_CAPABILITIES),
    (msr::BIOS_SIGN_ID, handlers::MICROCODE_REVISION),
    (msr::PERF_CAPABILITIES, handlers::PERF_CAPABILITIES),
    (msr::AMD64_DE_CFG, handlers::DE_CFG_LFENCE_SERIALIZE),
];

fn find(index: u32) -> Option<&'static Row> {
    let after = TABLE.partition_point(|row| row.first <= index);
    TABLE[..after].last().filter(|row| row.holds(index))
}

/// KVM_GET_MSR_INDEX_LIST.
pub(crate) fn index_list() -> Vec<u32> {
    let listed = TABLE.iter().filter(|row| row.listed == State);
    let mut all: Vec<u32> = listed.flat_map(|row| row.first..=row.last).collect();
    if !crate::cpuid::supported_features().has(arch::cpuid::Feature::XSAVES) {
        all.retain(|&index| index != msr::XSS);
    }
    all
}

/// KVM_GET_MSR_FEATURE_INDEX_LIST.
pub(crate) fn feature_list() -> Vec<u32> {
    FEATURES.iter().map(|&(index, _)| index).collect()
}

/// The value of a feature MSR.
pub(crate) fn feature(index: u32) -> Option<u64> {
    FEATURES
        .iter()
        .find(|&&(feature, _)| feature == index)
        .map(|&(_, value)| value)
}

/// The MSR bitmap that passes [`DIRECT`] registers through, except those `filtered` names.
pub(crate) fn bitmap(filtered: impl Fn(u32, bool) -> bool) -> MsrBitmap {
    let mut bitmap = MsrBitmap::intercept_all();
    for &(index, writable) in DIRECT {
        bitmap.set(index, false, filtered(index, false));
        if writable {
            bitmap.set(index, true, filtered(index, true));
        }
    }
    bitmap
}

impl Access<'_> {
    /// Reads the register.
    pub(crate) fn read(&mut self) -> Result<u64, MsrError> {
        let row = self.row()?;
        (row.read)(self)
    }

    /// Writes the register.
    pub(crate) fn write(&mut self, value: u64) -> Result<(), MsrError> {
        let row = self.row()?;
        (row.write)(self, value)
    }

    /// The register's row, often that of the last access, if the register is there.
    fn row(&mut self) -> Result<&'static Row, MsrError> {
        let last = self.core.msrs.last_row;
        let row = if last.holds(self.index) {
            last
        } else {
            find(self.index).ok_or(MsrError::Unknown)?
        };
        self.core.msrs.last_row = row;
        if row.exists(self.core, self.trusted) {
            Ok(row)
        } else {
            Err(MsrError::Invalid)
        }
    }
}

impl Core {
    /// KVM_X86_SETUP_MCE: number of banks and capabilities.
    pub(crate) fn setup_mce(&mut self, mcg_cap: u64) -> crate::Result<()> {
        /// MCG_CTL_P; recovery, extended registers and CMCI are not there.
        const KNOWN: u64 = 0xff | handlers::MCG_CTL_PRESENT | handlers::MCG_SER_PRESENT;
        let banks = mcg_cap & 0xff;
        if banks == 0 || banks > MCE_BANKS as u64 || mcg_cap & !KNOWN != 0 {
            return crate::error::fail(libc::EINVAL);
        }
        self.msrs.set(msr::MCG_CAP, mcg_cap);
        if mcg_cap & handlers::MCG_CTL_PRESENT != 0 {
            self.msrs.set(msr::MCG_CTL, !0);
        }
        for bank in &mut self.msrs.mce_banks[..banks as usize] {
            bank[0] = !0;
        }
        Ok(())
    }
}

impl Core {
    /// KVM_X86_SET_MCE: logs an error in a bank and, if it is uncorrected, raises #MC.
    pub(crate) fn set_mce(&mut self, mce: &kvm_bindings::kvm_x86_mce) -> crate::Result<()> {
        const VALID: u64 = 1 << 63;
        const OVERFLOW: u64 = 1 << 62;
        const UNCORRECTED: u64 = 1 << 61;
        /// MCG_STATUS: a machine check is in progress.
        const IN_PROGRESS: u64 = 1 << 2;
        let capabilities = self.msrs.get(msr::MCG_CAP);
        let bank = mce.bank as usize;
        if bank >= (capabilities & 0xff) as usize || mce.status & VALID == 0 {
            return crate::error::fail(libc::EINVAL);
        }
        let uncorrected = mce.status & UNCORRECTED != 0;
        let controlled = capabilities & handlers::MCG_CTL_PRESENT != 0;
        let masked =
            (controlled && self.msrs.get(msr::MCG_CTL) != !0) || self.msrs.mce_banks[bank][0] != !0;
        if uncorrected && masked {
            return Ok(());
        }
        let registers = &mut self.msrs.mce_banks[bank];
        let mut status = mce.status;
        if registers[1] & VALID != 0 {
            status |= OVERFLOW;
        }
        if uncorrected || registers[1] & VALID == 0 || registers[1] & UNCORRECTED == 0 {
            registers[1..].copy_from_slice(&[status, mce.addr, mce.misc]);
        }
        if !uncorrected {
            return Ok(());
        }
        let enabled = self
            .cpu
            .state
            .cr4
            .contains(arch::control_registers::Cr4::MCE);
        if self.msrs.get(msr::MCG_STATUS) & IN_PROGRESS != 0 || !enabled {
            self.events.triple_fault = true;
            return Ok(());
        }
        self.msrs.set(msr::MCG_STATUS, mce.mcg_status);
        self.raise(arch::exception::Exception::MachineCheck);
        Ok(())
    }
}

/// What KVM_X86_GET_MCE_CAP_SUPPORTED answers.
pub(crate) const MCE_SUPPORTED: u64 = handlers::MCG_CTL_PRESENT | handlers::MCG_SER_PRESENT;

/// Registers kept here rather than in the processor.
#[derive(Clone, Debug)]
pub(crate) struct MsrState {
    /// Plain registers, sorted by number.
    stored: Vec<(u32, u64)>,
    /// CTL, STATUS, ADDR and MISC of each machine-check bank.
    pub(crate) mce_banks: [[u64; 4]; MCE_BANKS],
    mce_ctl2: [u64; MCE_BANKS],
    /// The row of the last access.
    last_row: &'static Row,
}

impl MsrState {
    /// The registers at power-up.
    pub(crate) fn new() -> MsrState {
        use arch::msr::misc_enable;
        let mut state = MsrState {
            stored: Vec::new(),
            mce_banks: [[!0, 0, 0, 0]; MCE_BANKS],
            mce_ctl2: [0; MCE_BANKS],
            last_row: &TABLE[0],
        };
        let unavailable = misc_enable::PEBS_UNAVAIL | misc_enable::BTS_UNAVAIL;
        state.set(msr::MISC_ENABLE, misc_enable::FAST_STRING | unavailable);
        state.set(msr::BIOS_SIGN_ID, handlers::MICROCODE_REVISION);
        state.set(msr::ARCH_CAPABILITIES, handlers::ARCH_CAPABILITIES);
        state.set(msr::MCG_CAP, handlers::MCG_CTL_PRESENT | MCE_BANKS as u64);
        state.set(msr::MCG_CTL, !0);
        state.set(msr::AMD64_DE_CFG, handlers::DE_CFG_LFENCE_SERIALIZE);
        state.set(msr::KVM_POLL_CONTROL, 1);
        state
    }

    /// A plain register.
    pub(crate) fn get(&self, index: u32) -> u64 {
        let found = self
            .stored
            .binary_search_by_key(&index, |&(index, _)| index);
        found.map_or(0, |at| self.stored[at].1)
    }

    /// Sets a plain register.
    pub(crate) fn set(&mut self, index: u32, value: u64) {
        match self
            .stored
            .binary_search_by_key(&index, |&(index, _)| index)
        {
            Ok(at) => self.stored[at].1 = value,
            Err(at) => self.stored.insert(at, (index, value)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_sorted_and_does_not_overlap() {
        for pair in TABLE.windows(2) {
            assert!(pair[0].first <= pair[0].last);
            assert!(pair[0].last < pair[1].first, "{:#x}", pair[1].first);
        }
        assert!(find(msr::EFER).is_some());
        assert!(find(0x5555).is_none());
        assert!(find(msr::X2APIC_BASE + 0x100).is_none());
    }

    #[test]
    fn direct_registers_have_rows() {
        for &(index, _) in DIRECT {
            assert!(find(index).is_some());
        }
        let bitmap = bitmap(|index, _| index == msr::STAR);
        assert!(bitmap.exits(msr::STAR, false) && !bitmap.exits(msr::LSTAR, true));
        assert!(bitmap.exits(msr::TSC, true) && !bitmap.exits(msr::TSC, false));
    }
}
