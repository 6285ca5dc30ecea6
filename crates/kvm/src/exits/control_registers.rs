//! Control-register accesses and XSETBV, and the rules for loading each register.
//!
//! Source: SDM volume 2, "MOV—Move to/from Control Registers"; volume 3, "Control Registers".

use super::{Outcome, general_protection};
use crate::vcpu::{Core, Vcpu};
use arch::control_registers::{Cr0, Cr3, Cr4, Efer, Xcr0};
use arch::cpuid::{Feature, Features};
use arch::exit::{CrAccess, VmExit};
use arch::segment::{AccessRights, SegmentName};
use cpu::{Flush, Gpr};
use kvm_bindings::KVM_EXIT_SET_TPR;

/// The register with this encoding.
fn gpr(register: u8) -> Gpr {
    Gpr::ALL[(register & 15) as usize]
}

pub(super) fn cr_access(core: &mut Core, vcpu: &Vcpu, exit: &VmExit) -> Outcome {
    match CrAccess::from_qualification(exit.qualification) {
        CrAccess::MovTo { cr: 8, register } => write_cr8(core, vcpu, exit, register),
        CrAccess::MovFrom { cr: 8, register } => {
            let value = vcpu.cr8(core);
            core.cpu.state.set_gpr(gpr(register), value);
            core.skip(exit);
            Outcome::Resume
        }
        CrAccess::MovTo { cr, register } => {
            let value = core.cpu.state.gpr(gpr(register));
            let value = if core.is_64bit() {
                value
            } else {
                value & 0xffff_ffff
            };
            if core.has_shadow_paging {
                return super::shadow::write_cr(core, vcpu, exit, cr, value);
            }
            write(core, exit, cr, value)
        }
        CrAccess::MovFrom { cr, register } => {
            let state = &core.cpu.state;
            let value = match cr {
                0 => state.cr0.bits(),
                3 => state.cr3,
                4 => state.cr4.bits(),
                _ => return general_protection(core),
            };
            core.cpu.state.set_gpr(gpr(register), value);
            core.skip(exit);
            Outcome::Resume
        }
        CrAccess::Clts => {
            core.cpu.state.cr0 -= Cr0::TS;
            core.skip(exit);
            Outcome::Resume
        }
        CrAccess::Lmsw { source, .. } => {
            const LOADED: u64 = 0xf;
            let old = core.cpu.state.cr0.bits();
            // LMSW cannot clear PE.
            let kept = old & (!LOADED | Cr0::PE.bits());
            write(core, exit, 0, kept | source as u64 & LOADED)
        }
    }
}

fn write(core: &mut Core, exit: &VmExit, cr: u8, value: u64) -> Outcome {
    let loaded = match cr {
        0 => load_cr0(core, value),
        3 => load_cr3(core, value),
        4 => load_cr4(core, value),
        _ => false,
    };
    if !loaded {
        return general_protection(core);
    }
    core.skip(exit);
    Outcome::Resume
}

fn write_cr8(core: &mut Core, vcpu: &Vcpu, exit: &VmExit, register: u8) -> Outcome {
    let value = core.cpu.state.gpr(gpr(register));
    if value & !0xf != 0 {
        return general_protection(core);
    }
    let old = vcpu.cr8(core);
    vcpu.set_cr8(core, value);
    core.skip(exit);
    // A user-space APIC must hear of a lowered priority: an interrupt may wait there.
    if vcpu.apic().is_none() && value < old {
        vcpu.kvm_run(core).exit_reason = KVM_EXIT_SET_TPR;
        return Outcome::Exit;
    }
    Outcome::Resume
}

/// Whether CR0 may hold `value`.
pub(crate) fn valid_cr0(value: u64) -> bool {
    let cr0 = Cr0::from_bits_retain(value);
    value >> 32 == 0
        && (!cr0.contains(Cr0::PG) || cr0.contains(Cr0::PE))
        && (!cr0.contains(Cr0::NW) || cr0.contains(Cr0::CD))
}

/// CR4 bits that the features allow.
fn allowed_cr4(features: &Features) -> Cr4 {
    let mut allowed = Cr4::VME
        | Cr4::PVI
        | Cr4::TSD
        | Cr4::DE
        | Cr4::PSE
        | Cr4::PAE
        | Cr4::MCE
        | Cr4::PGE
        | Cr4::PCE
        | Cr4::OSFXSR
        | Cr4::OSXMMEXCPT;
    for (feature, bit) in [
        (Feature::UMIP, Cr4::UMIP),
        (Feature::LA57, Cr4::LA57),
        (Feature::FSGSBASE, Cr4::FSGSBASE),
        (Feature::PCID, Cr4::PCIDE),
        (Feature::XSAVE, Cr4::OSXSAVE),
        (Feature::SMEP, Cr4::SMEP),
        (Feature::SMAP, Cr4::SMAP),
        (Feature::PKU, Cr4::PKE),
    ] {
        if features.has(feature) {
            allowed |= bit;
        }
    }
    allowed
}

/// Whether CR4 may hold `value` for a guest with these features.
pub(crate) fn valid_cr4(features: &Features, value: u64) -> bool {
    allowed_cr4(features).contains(Cr4::from_bits_retain(value))
}

/// MOV to CR0; false is #GP.
pub(super) fn load_cr0(core: &mut Core, value: u64) -> bool {
    let value = value | Cr0::ET.bits();
    if !valid_cr0(value) {
        return false;
    }
    let new = Cr0::from_bits_retain(value);
    let old = core.cpu.state.cr0;
    let enables = new.contains(Cr0::PG) && !old.contains(Cr0::PG);
    let disables = !new.contains(Cr0::PG) && old.contains(Cr0::PG);
    let state = &core.cpu.state;
    if enables && state.efer.contains(Efer::LME) {
        let code = &state.segments[SegmentName::Cs as usize];
        if !state.cr4.contains(Cr4::PAE) || code.access.has(AccessRights::L) {
            return false;
        }
        core.cpu.state.efer |= Efer::LMA;
    } else if disables {
        if core.is_64bit() || state.cr4.contains(Cr4::PCIDE) {
            return false;
        }
        core.cpu.state.efer -= Efer::LMA;
    }
    core.cpu.state.cr0 = new;
    if (old ^ new).intersects(Cr0::PG | Cr0::WP | Cr0::PE) {
        core.cpu.flush(Flush::Guest);
    }
    true
}

/// MOV to CR3; false is #GP.
pub(super) fn load_cr3(core: &mut Core, value: u64) -> bool {
    let state = &mut core.cpu.state;
    let pcid = state.cr4.contains(Cr4::PCIDE);
    let address = if pcid {
        value & !Cr3::NO_FLUSH.bits()
    } else {
        value
    };
    if state.long_mode() && address >> core.cpuid.physical_bits() != 0 {
        return false;
    }
    state.cr3 = address;
    if !pcid || value & Cr3::NO_FLUSH.bits() == 0 {
        core.cpu.flush(Flush::Guest);
    }
    true
}

/// MOV to CR4; false is #GP.
pub(super) fn load_cr4(core: &mut Core, value: u64) -> bool {
    let new = Cr4::from_bits_retain(value);
    let state = &core.cpu.state;
    let old = state.cr4;
    if !valid_cr4(&core.features, value) {
        return false;
    }
    if state.long_mode() {
        if !new.contains(Cr4::PAE) || (old ^ new).contains(Cr4::LA57) {
            return false;
        }
    } else if new.contains(Cr4::PCIDE) {
        return false;
    }
    if new.contains(Cr4::PCIDE) && !old.contains(Cr4::PCIDE) && state.cr3 & Cr3::PCID_MASK != 0 {
        return false;
    }
    core.cpu.state.cr4 = new;
    core.cpu.flush(Flush::Guest);
    true
}

/// Whether XCR0 may hold `value` when `offered` components are.
pub(crate) fn valid_xcr0(offered: u64, value: u64) -> bool {
    let xcr0 = Xcr0::from_bits_retain(value);
    xcr0.contains(Xcr0::X87)
        && value & !offered == 0
        && (!xcr0.contains(Xcr0::AVX) || xcr0.contains(Xcr0::SSE))
}

pub(super) fn xsetbv(core: &mut Core, _vcpu: &Vcpu, exit: &VmExit) -> Outcome {
    let state = &core.cpu.state;
    let value = state.gpr(Gpr::Rax) & 0xffff_ffff | state.gpr(Gpr::Rdx) << 32;
    let index = state.gpr(Gpr::Rcx) as u32;
    if index != 0 || state.cpl() != 0 || !valid_xcr0(core.cpuid.xcr0(), value) {
        return general_protection(core);
    }
    core.cpu.state.xcr0 = Xcr0::from_bits_retain(value);
    core.skip(exit);
    Outcome::Resume
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn register_rules() {
        assert!(valid_cr0(0x8000_0011) && !valid_cr0(0x8000_0010) && !valid_cr0(0x2000_0000));
        assert!(!valid_cr0(1 << 32));
        assert!(!valid_cr4(&Features::NONE, Cr4::SMEP.bits()));
        assert!(valid_cr4(
            &Features::NONE.with(&[Feature::SMEP]),
            Cr4::SMEP.bits()
        ));
        assert!(!valid_cr4(&Features::NONE, Cr4::VMXE.bits()));
        assert!(valid_xcr0(7, 7) && !valid_xcr0(7, 5) && !valid_xcr0(3, 7) && !valid_xcr0(7, 6));
    }
}
