//! The checks on control fields.
//!
//! A processor refuses such an entry without leaving (VMfailValid, error 7); here it is an exit
//! like a failed check on guest state, which the rule's name tells apart.
//!
//! Source: SDM volume 3, "Checks on VMX Controls".

use super::Rule;
use crate::vcpu::Vcpu;
use arch::controls::{PinControls, PrimaryControls, SecondaryControls, VmFunctions};

/// Secondary controls that some rule is about.
const RULED: SecondaryControls = SecondaryControls::VIRTUALIZE_APIC_ACCESSES
    .union(SecondaryControls::VIRTUALIZE_X2APIC)
    .union(SecondaryControls::APIC_REGISTER_VIRTUALIZATION)
    .union(SecondaryControls::VIRTUAL_INTERRUPT_DELIVERY)
    .union(SecondaryControls::ENABLE_VMFUNC)
    .union(SecondaryControls::ENABLE_PML)
    .union(SecondaryControls::MODE_BASED_EXECUTE);

fn tpr_shadow(cpu: &Vcpu) -> bool {
    cpu.primary(PrimaryControls::TPR_SHADOW)
}

fn on(cpu: &Vcpu, control: SecondaryControls) -> bool {
    cpu.secondary(control)
}

rules! {
    "the virtual-APIC address is page-aligned" => |cpu| {
        !tpr_shadow(cpu) || cpu.controls().virtual_apic & 0xfff == 0
    };
    "TPR threshold bits 31:4 are zero without virtual-interrupt delivery" => |cpu| {
        !tpr_shadow(cpu)
            || on(cpu, SecondaryControls::VIRTUAL_INTERRUPT_DELIVERY)
            || cpu.controls().tpr_threshold >> 4 == 0
    };
    "the TPR threshold is not above the virtual task priority, unless APIC accesses are virtualized" => |cpu| {
        let excused = SecondaryControls::VIRTUAL_INTERRUPT_DELIVERY
            | SecondaryControls::VIRTUALIZE_APIC_ACCESSES;
        !tpr_shadow(cpu)
            || cpu.primary(PrimaryControls::SECONDARY)
                && cpu.controls().secondary.intersects(excused)
            || u64::from(cpu.controls().tpr_threshold & 0xf) <= cpu.virtual_task_priority()
    };
    "the APIC-access address is page-aligned" => |cpu| {
        !on(cpu, SecondaryControls::VIRTUALIZE_APIC_ACCESSES)
            || cpu.controls().apic_access & 0xfff == 0
    };
    "x2APIC mode, APIC-register virtualization and virtual-interrupt delivery require the TPR shadow" => |cpu| {
        tpr_shadow(cpu)
            || !on(cpu, SecondaryControls::VIRTUALIZE_X2APIC)
                && !on(cpu, SecondaryControls::APIC_REGISTER_VIRTUALIZATION)
                && !on(cpu, SecondaryControls::VIRTUAL_INTERRUPT_DELIVERY)
    };
    "x2APIC mode and APIC accesses are not both virtualized" => |cpu| {
        !on(
            cpu,
            SecondaryControls::VIRTUALIZE_X2APIC | SecondaryControls::VIRTUALIZE_APIC_ACCESSES,
        )
    };
    "virtual-interrupt delivery requires external-interrupt exiting" => |cpu| {
        !on(cpu, SecondaryControls::VIRTUAL_INTERRUPT_DELIVERY)
            || cpu.controls().pin.contains(PinControls::EXTERNAL_INTERRUPT_EXITING)
    };
    "posted interrupts require virtual-interrupt delivery" => |cpu| {
        !cpu.controls().pin.contains(PinControls::POSTED_INTERRUPTS)
            || on(cpu, SecondaryControls::VIRTUAL_INTERRUPT_DELIVERY)
    };
    "the posted-interrupt descriptor is 64-byte-aligned" => |cpu| {
        !cpu.controls().pin.contains(PinControls::POSTED_INTERRUPTS)
            || cpu.controls().posted_interrupts & 0x3f == 0
    };
    "the EPT pointer is valid" => |cpu| {
        !on(cpu, SecondaryControls::ENABLE_EPT) || cpu.controls().eptp.is_valid()
    };
    "page-modification logging requires EPT" => |cpu| {
        !on(cpu, SecondaryControls::ENABLE_PML) || on(cpu, SecondaryControls::ENABLE_EPT)
    };
    "mode-based execute control requires EPT" => |cpu| {
        !on(cpu, SecondaryControls::MODE_BASED_EXECUTE) || on(cpu, SecondaryControls::ENABLE_EPT)
    };
    "VM functions are known ones" => |cpu| {
        !on(cpu, SecondaryControls::ENABLE_VMFUNC)
            || VmFunctions::all().contains(cpu.controls().vm_functions)
    };
    "EPTP switching requires EPT and a page-aligned list" => |cpu| {
        !on(cpu, SecondaryControls::ENABLE_VMFUNC)
            || !cpu.controls().vm_functions.contains(VmFunctions::EPTP_SWITCHING)
            || on(cpu, SecondaryControls::ENABLE_EPT) && cpu.controls().eptp_list & 0xfff == 0
    };
}

/// Whether every rule holds. Most entries use nothing that a rule is about, and an EPT pointer
/// that was checked before.
#[inline]
pub(super) fn hold(cpu: &Vcpu) -> bool {
    let controls = cpu.controls();
    let untouched = !controls.primary.contains(PrimaryControls::TPR_SHADOW)
        && !controls.secondary.intersects(RULED)
        && !controls.pin.contains(PinControls::POSTED_INTERRUPTS)
        && cpu.second_stage.has_selected(controls.eptp);
    untouched || all_hold(cpu)
}
