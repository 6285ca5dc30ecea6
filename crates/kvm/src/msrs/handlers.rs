//! The functions that [`super::TABLE`] names.

use super::{Access, MsrError};
use crate::cpuid::pv;
use crate::irqchip::lapic::reg;
use crate::time::{GuestTsc, tsc};
use arch::addr::Gva;
use arch::control_registers::{Cr0, Cr4, Efer};
use arch::cpuid::Feature;
use arch::msr::{self, misc_enable};
use arch::segment::SegmentName;

/// What IA32_ARCH_CAPABILITIES claims: this processor does not speculate past permission checks
/// (RDCL_NO), nor leak through buffers (MDS_NO, TAA_NO), not those of accesses to devices either
/// (SBDR_SSDP_NO, FBSDP_NO, PSDP_NO), takes no indirect branch by where in its cache line it is
/// (ITS_NO), and needs no flush on entry.
pub(super) const ARCH_CAPABILITIES: u64 =
    1 << 0 | 1 << 3 | 1 << 5 | 1 << 6 | 1 << 8 | 1 << 13 | 1 << 14 | 1 << 15 | 1 << 62;
/// The microcode revision that KVM reports for guests, in the upper half.
pub(super) const MICROCODE_REVISION: u64 = 0x1_0000_0000;
/// AMD: LFENCE is dispatch-serializing.
pub(super) const DE_CFG_LFENCE_SERIALIZE: u64 = 1 << 1;
/// What IA32_PERF_CAPABILITIES can offer.
pub(super) const PERF_CAPABILITIES: u64 = 0;
/// MCG_CAP: IA32_MCG_CTL exists.
pub(super) const MCG_CTL_PRESENT: u64 = 1 << 8;

/// MCG_CAP: software error recovery.
pub(super) const MCG_SER_PRESENT: u64 = 1 << 24;

type Result<T> = std::result::Result<T, MsrError>;
const INVALID: MsrError = MsrError::Invalid;

pub(super) fn read_zero(_: &mut Access<'_>) -> Result<u64> {
    Ok(0)
}

pub(super) fn ignore(_: &mut Access<'_>, _: u64) -> Result<()> {
    Ok(())
}

pub(super) fn reject(access: &mut Access<'_>, value: u64) -> Result<()> {
    // User space may write back what it read from a read-only register.
    let current = access.read()?;
    if access.trusted && current == value {
        Ok(())
    } else {
        Err(INVALID)
    }
}

pub(super) fn write_only(access: &mut Access<'_>) -> Result<u64> {
    if access.trusted { Ok(0) } else { Err(INVALID) }
}

pub(super) fn read_stored(access: &mut Access<'_>) -> Result<u64> {
    Ok(access.core.msrs.get(access.index))
}

/// Whether guests may read it is user space's choice.
pub(super) fn read_platform_info(access: &mut Access<'_>) -> Result<u64> {
    if !access.trusted && access.vcpu.vm().settings().hides_platform_info {
        return Err(INVALID);
    }
    read_stored(access)
}

pub(super) fn write_stored(access: &mut Access<'_>, value: u64) -> Result<()> {
    access.core.msrs.set(access.index, value);
    Ok(())
}

pub(super) fn write_trusted(access: &mut Access<'_>, value: u64) -> Result<()> {
    if !access.trusted {
        return Err(INVALID);
    }
    write_stored(access, value)
}

pub(super) fn write_trusted_or_ignore(access: &mut Access<'_>, value: u64) -> Result<()> {
    if access.trusted {
        write_stored(access, value)
    } else {
        Ok(())
    }
}

pub(super) fn write_zero_only(_: &mut Access<'_>, value: u64) -> Result<()> {
    if value == 0 { Ok(()) } else { Err(INVALID) }
}

/// Commands that flush what is not there to be flushed.
pub(super) fn write_command(_: &mut Access<'_>, value: u64) -> Result<()> {
    if value & !1 == 0 {
        Ok(())
    } else {
        Err(INVALID)
    }
}

/// There are no performance counters: user space finds nothing in this register, guests only
/// read it.
pub(super) fn write_perf_capabilities(access: &mut Access<'_>, value: u64) -> Result<()> {
    if access.trusted {
        write_zero_only(access, value)
    } else {
        Err(INVALID)
    }
}

/// A core ratio of 1: guests that take the processor for one of these divide by it.
pub(super) fn read_netburst_frequency(_: &mut Access<'_>) -> Result<u64> {
    Ok(1 << 24)
}

/// A second-level cache that is configured and enabled: some guests wait for it to be.
pub(super) fn read_l2_control(_: &mut Access<'_>) -> Result<u64> {
    Ok(0xbe70_2111)
}

/// The ramp-up count that systems want to find, so that they do not write it.
pub(super) fn read_k7_clock_control(_: &mut Access<'_>) -> Result<u64> {
    Ok(0x2000_0000)
}

/// Bus frequency code "100 MHz".
pub(super) fn read_fsb_freq(_: &mut Access<'_>) -> Result<u64> {
    Ok(3)
}

/// TSC increments by 4 per bus clock of 250 MHz: what guests that look here expect.
pub(super) fn read_perf_status(_: &mut Access<'_>) -> Result<u64> {
    Ok(1000 | (4 << 40))
}

// ---- Time -------------------------------------------------------------------------------------

pub(super) fn read_tsc(access: &mut Access<'_>) -> Result<u64> {
    Ok(access.core.tsc.now())
}

/// Changes the offset of the counter and what depends on it.
fn set_tsc(access: &mut Access<'_>, tsc: GuestTsc) {
    access.core.set_tsc(tsc);
    if let Some(apic) = access.vcpu.apic() {
        apic.tsc_changed(&tsc);
    }
}

pub(super) fn write_tsc(access: &mut Access<'_>, value: u64) -> Result<()> {
    let host = tsc();
    let old = access.core.tsc;
    let offset = if access.trusted {
        access.vcpu.vm().synchronized_tsc_offset(&old, value, host)
    } else {
        old.offset_for(value, host)
    };
    if !access.trusted {
        let adjust = access.core.msrs.get(msr::TSC_ADJUST);
        let moved = offset.wrapping_sub(old.offset);
        access
            .core
            .msrs
            .set(msr::TSC_ADJUST, adjust.wrapping_add(moved));
    }
    set_tsc(access, GuestTsc { offset, ..old });
    Ok(())
}

pub(super) fn write_tsc_adjust(access: &mut Access<'_>, value: u64) -> Result<()> {
    let old = access.core.msrs.get(msr::TSC_ADJUST);
    access.core.msrs.set(msr::TSC_ADJUST, value);
    if !access.trusted {
        let current = access.core.tsc;
        let offset = current.offset.wrapping_add(value.wrapping_sub(old));
        set_tsc(access, GuestTsc { offset, ..current });
    }
    Ok(())
}

pub(super) fn read_tsc_deadline(access: &mut Access<'_>) -> Result<u64> {
    Ok(access.vcpu.apic().map_or(0, |apic| apic.tsc_deadline()))
}

pub(super) fn write_tsc_deadline(access: &mut Access<'_>, value: u64) -> Result<()> {
    if let Some(apic) = access.vcpu.apic() {
        apic.set_tsc_deadline(value, &access.core.tsc);
    }
    Ok(())
}

// ---- Local APIC -------------------------------------------------------------------------------

pub(super) fn read_apic_base(access: &mut Access<'_>) -> Result<u64> {
    Ok(access.vcpu.apic_base(access.core))
}

pub(super) fn write_apic_base(access: &mut Access<'_>, value: u64) -> Result<()> {
    access
        .vcpu
        .set_apic_base(access.core, value, access.trusted)
        .map_err(|_| INVALID)
}

fn x2apic<'a>(access: &Access<'a>) -> Result<&'a crate::irqchip::lapic::LocalApic> {
    access
        .vcpu
        .apic()
        .filter(|apic| apic.x2apic())
        .map(|apic| &**apic)
        .ok_or(INVALID)
}

pub(super) fn read_x2apic(access: &mut Access<'_>) -> Result<u64> {
    let apic = x2apic(access)?;
    let offset = (access.index - msr::X2APIC_BASE) << 4;
    match offset {
        reg::ICR => Ok(apic.read_icr()),
        _ => apic.read(offset).map(u64::from).map_err(|_| INVALID),
    }
}

pub(super) fn write_x2apic(access: &mut Access<'_>, value: u64) -> Result<()> {
    let apic = x2apic(access)?;
    let offset = (access.index - msr::X2APIC_BASE) << 4;
    let effect = match offset {
        reg::ICR => apic.write_icr(value),
        _ if value >> 32 != 0 => return Err(INVALID),
        _ => apic.write(offset, value as u32),
    };
    let effect = effect.map_err(|_| INVALID)?;
    access.vcpu.apply(access.core, effect);
    Ok(())
}

// ---- Registers that the processor holds -------------------------------------------------------

pub(super) fn read_cpu(access: &mut Access<'_>) -> Result<u64> {
    let state = &access.core.cpu.state;
    Ok(match access.index {
        msr::SYSENTER_CS => state.msrs.sysenter_cs,
        msr::SYSENTER_ESP => state.msrs.sysenter_esp,
        msr::SYSENTER_EIP => state.msrs.sysenter_eip,
        msr::STAR => state.msrs.star,
        msr::LSTAR => state.msrs.lstar,
        msr::CSTAR => state.msrs.cstar,
        msr::FMASK => state.msrs.fmask,
        msr::FS_BASE => state.segments[SegmentName::Fs as usize].base,
        msr::GS_BASE => state.segments[SegmentName::Gs as usize].base,
        msr::KERNEL_GS_BASE => state.msrs.kernel_gs_base,
        _ => return Err(MsrError::Unknown),
    })
}

pub(super) fn write_cpu(access: &mut Access<'_>, value: u64) -> Result<()> {
    let state = &mut access.core.cpu.state;
    let slot = match access.index {
        msr::SYSENTER_CS => &mut state.msrs.sysenter_cs,
        msr::SYSENTER_ESP => &mut state.msrs.sysenter_esp,
        msr::SYSENTER_EIP => &mut state.msrs.sysenter_eip,
        msr::STAR => &mut state.msrs.star,
        msr::LSTAR => &mut state.msrs.lstar,
        msr::CSTAR => &mut state.msrs.cstar,
        msr::FMASK => {
            state.msrs.fmask = value & 0xffff_ffff;
            return Ok(());
        }
        msr::FS_BASE => &mut state.segments[SegmentName::Fs as usize].base,
        msr::GS_BASE => &mut state.segments[SegmentName::Gs as usize].base,
        msr::KERNEL_GS_BASE => &mut state.msrs.kernel_gs_base,
        _ => return Err(MsrError::Unknown),
    };
    *slot = value;
    Ok(())
}

pub(super) fn write_cpu_address(access: &mut Access<'_>, value: u64) -> Result<()> {
    let bits = if access.core.cpu.state.cr4.contains(Cr4::LA57) {
        57
    } else {
        48
    };
    // User space may restore a value that is canonical only in the widest mode.
    let bits = if access.trusted { 57 } else { bits };
    if !Gva::new(value).is_canonical(bits) {
        return Err(INVALID);
    }
    write_cpu(access, value)
}

pub(super) fn read_tsc_aux(access: &mut Access<'_>) -> Result<u64> {
    Ok(access.core.cpu.state.msrs.tsc_aux)
}

pub(super) fn write_tsc_aux(access: &mut Access<'_>, value: u64) -> Result<()> {
    if value >> 32 != 0 && !access.trusted && !access.core.cpuid.is_amd() {
        return Err(INVALID);
    }
    access.core.cpu.state.msrs.tsc_aux = value & 0xffff_ffff;
    Ok(())
}

pub(super) fn read_pat(access: &mut Access<'_>) -> Result<u64> {
    Ok(access.core.cpu.state.msrs.pat)
}

pub(super) fn write_pat(access: &mut Access<'_>, value: u64) -> Result<()> {
    let legal = |byte: u8| matches!(byte, 0 | 1 | 4..=7);
    if !value.to_le_bytes().into_iter().all(legal) {
        return Err(INVALID);
    }
    access.core.cpu.state.msrs.pat = value;
    Ok(())
}

pub(super) fn read_debugctl(access: &mut Access<'_>) -> Result<u64> {
    Ok(access.core.cpu.state.msrs.debugctl)
}

pub(super) fn write_debugctl(access: &mut Access<'_>, value: u64) -> Result<()> {
    // Branch records are not kept; asking for them is accepted and has no effect, as on a
    // processor whose LBR format is unknown.
    if value & !(msr::debugctl::LBR | msr::debugctl::BTF) != 0 {
        return Err(INVALID);
    }
    access.core.cpu.state.msrs.debugctl = value & msr::debugctl::BTF;
    Ok(())
}

pub(super) fn read_spec_ctrl(access: &mut Access<'_>) -> Result<u64> {
    Ok(access.core.cpu.state.msrs.spec_ctrl)
}

pub(super) fn write_spec_ctrl(access: &mut Access<'_>, value: u64) -> Result<()> {
    if value & !0x7 != 0 {
        return Err(INVALID);
    }
    access.core.cpu.state.msrs.spec_ctrl = value;
    Ok(())
}

pub(super) fn read_xss(access: &mut Access<'_>) -> Result<u64> {
    Ok(access.core.cpu.state.msrs.xss)
}

pub(super) fn write_xss(_: &mut Access<'_>, value: u64) -> Result<()> {
    // No supervisor component is offered.
    if value == 0 { Ok(()) } else { Err(INVALID) }
}

pub(super) fn read_efer(access: &mut Access<'_>) -> Result<u64> {
    Ok(access.core.cpu.state.efer.bits())
}

/// EFER bits that the guest's features allow.
pub(crate) fn allowed_efer(core: &crate::vcpu::Core) -> Efer {
    let features = &core.features;
    let mut allowed = Efer::SCE;
    if features.has(Feature::LM) {
        allowed |= Efer::LME | Efer::LMA;
    }
    if features.has(Feature::NX) && core.msrs.get(msr::MISC_ENABLE) & misc_enable::XD_DISABLE == 0 {
        allowed |= Efer::NXE;
    }
    if features.has(Feature::FXSR_OPT) {
        allowed |= Efer::FFXSR;
    }
    allowed
}

pub(super) fn write_efer(access: &mut Access<'_>, value: u64) -> Result<()> {
    let core = &mut *access.core;
    let old = core.cpu.state.efer;
    let new = Efer::from_bits_retain(value);
    if !access.trusted {
        if !allowed_efer(core).contains(new) {
            return Err(INVALID);
        }
        let paging = core.cpu.state.cr0.contains(Cr0::PG);
        if paging && (new ^ old).contains(Efer::LME) {
            return Err(INVALID);
        }
        // LMA follows LME and CR0.PG; it is not written.
        core.cpu.state.efer = (new - Efer::LMA) | (old & Efer::LMA);
    } else {
        core.cpu.state.efer = (new - Efer::LMA) | (old & Efer::LMA);
    }
    if (old ^ new).intersects(Efer::NXE | Efer::LME) {
        core.cpu.flush(cpu::Flush::Guest);
    }
    Ok(())
}

// ---- System management, features --------------------------------------------------------------

pub(super) fn read_smbase(access: &mut Access<'_>) -> Result<u64> {
    if access.trusted || access.core.cpu.state.smm {
        Ok(access.core.cpu.state.smbase as u64)
    } else {
        Err(INVALID)
    }
}

pub(super) fn write_smbase(access: &mut Access<'_>, value: u64) -> Result<()> {
    if !access.trusted {
        return Err(INVALID);
    }
    access.core.cpu.state.smbase = value as u32;
    Ok(())
}

pub(super) fn write_feature_control(access: &mut Access<'_>, value: u64) -> Result<()> {
    const LOCKED: u64 = 1;
    let current = access.core.msrs.get(msr::FEATURE_CONTROL);
    // Neither VMX nor SMX nor SGX nor LMCE is offered: only the lock bit exists.
    if value & !LOCKED != 0 || (!access.trusted && current & LOCKED != 0) {
        return Err(INVALID);
    }
    write_stored(access, value)
}

pub(super) fn write_misc_enable(access: &mut Access<'_>, value: u64) -> Result<()> {
    const READ_ONLY: u64 = misc_enable::BTS_UNAVAIL | misc_enable::PEBS_UNAVAIL;
    const IGNORED: u64 = misc_enable::EMON;
    let old = access.core.msrs.get(msr::MISC_ENABLE);
    let mut value = value;
    if !access.trusted {
        if (old ^ value) & READ_ONLY != 0 {
            return Err(INVALID);
        }
        value = value & !IGNORED | old & IGNORED;
    }
    // What CPUID shows is only changed for processors that may have MWAIT: those with SSE3.
    if (old ^ value) & misc_enable::MWAIT != 0
        && access.vcpu.vm().cpuid_follows_misc_enable()
        && !access.core.features.has(Feature::SSE3)
    {
        return Err(INVALID);
    }
    write_stored(access, value)
}

pub(super) fn write_hwcr(access: &mut Access<'_>, value: u64) -> Result<()> {
    // Cache, monitor and TLB switches are accepted and ignored; McStatusWrEn and TscFreqSel are
    // kept.
    const IGNORED: u64 = 1 << 3 | 1 << 6 | 1 << 8;
    const KEPT: u64 = 1 << 18 | 1 << 24;
    if value & !(IGNORED | KEPT) != 0 {
        return Err(INVALID);
    }
    write_stored(access, value & KEPT)
}

// ---- Memory types -----------------------------------------------------------------------------

pub(super) fn read_mtrr_cap(_: &mut Access<'_>) -> Result<u64> {
    // Eight variable ranges, fixed ranges, write-combining.
    Ok(super::VARIABLE_MTRRS as u64 | 1 << 8 | 1 << 10)
}

fn legal_memory_type(byte: u8) -> bool {
    matches!(byte, 0 | 1 | 4 | 5 | 6)
}

pub(super) fn write_fixed_mtrr(access: &mut Access<'_>, value: u64) -> Result<()> {
    if !value.to_le_bytes().into_iter().all(legal_memory_type) {
        return Err(INVALID);
    }
    write_stored(access, value)
}

pub(super) fn write_mtrr_def_type(access: &mut Access<'_>, value: u64) -> Result<()> {
    if value & !0xcff != 0 || !legal_memory_type(value as u8) {
        return Err(INVALID);
    }
    write_stored(access, value)
}

pub(super) fn write_variable_mtrr(access: &mut Access<'_>, value: u64) -> Result<()> {
    let beyond = !0u64 << access.core.cpuid.physical_bits();
    let is_mask = access.index & 1 != 0;
    let reserved = if is_mask {
        beyond | 0x7ff
    } else {
        beyond | 0xf00
    };
    if value & reserved != 0 || (!is_mask && !legal_memory_type(value as u8)) {
        return Err(INVALID);
    }
    write_stored(access, value)
}

// ---- Machine checks ---------------------------------------------------------------------------

fn banks(access: &Access<'_>) -> usize {
    (access.core.msrs.get(msr::MCG_CAP) & 0xff) as usize
}

pub(super) fn write_mcg_ctl(access: &mut Access<'_>, value: u64) -> Result<()> {
    let present = access.core.msrs.get(msr::MCG_CAP) & MCG_CTL_PRESENT != 0;
    if !present || !matches!(value, 0 | u64::MAX) {
        return Err(INVALID);
    }
    write_stored(access, value)
}

pub(super) fn read_mce_bank(access: &mut Access<'_>) -> Result<u64> {
    let offset = (access.index - msr::MC0_CTL) as usize;
    if offset / 4 >= banks(access) {
        return Err(INVALID);
    }
    Ok(access.core.msrs.mce_banks[offset / 4][offset % 4])
}

pub(super) fn write_mce_bank(access: &mut Access<'_>, value: u64) -> Result<()> {
    let offset = (access.index - msr::MC0_CTL) as usize;
    if offset / 4 >= banks(access) {
        return Err(INVALID);
    }
    let legal = match offset % 4 {
        // Linux clears bit 10 of bank 4 and bit 0 of bank 0 on some processors.
        0 => matches!(value | 1 << 10 | 1, u64::MAX) || value == 0,
        // A guest may only clear a status.
        1 => access.trusted || value == 0 || access.core.msrs.get(msr::K7_HWCR) & 1 << 18 != 0,
        _ => true,
    };
    if !legal {
        return Err(INVALID);
    }
    access.core.msrs.mce_banks[offset / 4][offset % 4] = value;
    Ok(())
}

pub(super) fn read_mce_ctl2(access: &mut Access<'_>) -> Result<u64> {
    let bank = (access.index - msr::MC0_CTL2) as usize;
    if bank >= banks(access) {
        return Err(INVALID);
    }
    Ok(access.core.msrs.mce_ctl2[bank])
}

pub(super) fn write_mce_ctl2(access: &mut Access<'_>, value: u64) -> Result<()> {
    const CMCI_PRESENT: u64 = 1 << 10;
    let bank = (access.index - msr::MC0_CTL2) as usize;
    let cmci = access.core.msrs.get(msr::MCG_CAP) & CMCI_PRESENT != 0;
    if bank >= banks(access) || (!cmci && value != 0) || value & !(1 << 30 | 0x7fff) != 0 {
        return Err(INVALID);
    }
    access.core.msrs.mce_ctl2[bank] = value;
    Ok(())
}

// ---- Paravirtual ------------------------------------------------------------------------------

pub(super) fn write_wall_clock(access: &mut Access<'_>, value: u64) -> Result<()> {
    // Both numbers name one register.
    access.core.msrs.set(msr::KVM_WALL_CLOCK, value);
    access.core.msrs.set(msr::KVM_WALL_CLOCK_NEW, value);
    access.core.write_wall_clock(access.vcpu, value);
    Ok(())
}

pub(super) fn write_system_time(access: &mut Access<'_>, value: u64) -> Result<()> {
    access.core.msrs.set(msr::KVM_SYSTEM_TIME, value);
    access.core.msrs.set(msr::KVM_SYSTEM_TIME_NEW, value);
    access
        .vcpu
        .mailbox()
        .post_own(crate::mailbox::Request::CLOCK_UPDATE);
    Ok(())
}

pub(super) fn write_steal_time(access: &mut Access<'_>, value: u64) -> Result<()> {
    const RESERVED: u64 = 0x3e;
    if value & RESERVED != 0 {
        return Err(INVALID);
    }
    access.core.set_steal_time(access.vcpu, value);
    access
        .vcpu
        .mailbox()
        .post_own(crate::mailbox::Request::STEAL_UPDATE);
    write_stored(access, value)
}

pub(super) fn write_pv_eoi(access: &mut Access<'_>, value: u64) -> Result<()> {
    const RESERVED: u64 = 0x2;
    if value & RESERVED != 0 {
        return Err(INVALID);
    }
    access.core.set_eoi_flag(value);
    write_stored(access, value)
}

pub(super) fn write_poll_control(access: &mut Access<'_>, value: u64) -> Result<()> {
    if value & !1 != 0 {
        return Err(INVALID);
    }
    write_stored(access, value)
}

/// Where and how the guest wants to hear of pages that are not there. It never does: here an access
/// waits for its page, as KVM's may.
pub(super) fn write_async_page_faults(access: &mut Access<'_>, value: u64) -> Result<()> {
    const AS_EXIT: u64 = 1 << 2;
    const BY_INTERRUPT: u64 = 1 << 3;
    const RESERVED: u64 = 0x30 | AS_EXIT;
    let by_interrupt = value & BY_INTERRUPT != 0;
    if value & RESERVED != 0 || by_interrupt && !access.core.offers_paravirtual(pv::ASYNC_PF_INT) {
        return Err(INVALID);
    }
    write_stored(access, value)
}

pub(super) fn write_async_vector(access: &mut Access<'_>, value: u64) -> Result<()> {
    if value >> 8 != 0 {
        return Err(INVALID);
    }
    write_stored(access, value)
}
