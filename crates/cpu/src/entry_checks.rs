//! The checks of VM entry: one rule a row. Those on control fields are in `controls`.
//!
//! Source: SDM volume 3, "Checks on the Guest State Area".

use crate::vcpu::Vcpu;
use arch::control_registers::{Cr0, Cr4, Efer, Rflags};
use arch::controls::{Activity, EntryControls, Interruptibility};
use arch::exit::{ExitReason, VmExit};
use arch::interruption::InterruptionType;
use arch::segment::{AccessRights, SegmentName};

/// A rule: its name and whether the state obeys it.
pub(crate) struct Rule {
    /// What the rule demands.
    pub name: &'static str,
    holds: fn(&Vcpu) -> bool,
}

macro_rules! rules {
    ($($name:literal => |$cpu:ident| $holds:expr;)*) => {
        /// Every rule, in the SDM's order.
        pub(super) const RULES: &[Rule] = &[
            $(Rule { name: $name, holds: |$cpu: &Vcpu| $holds },)*
        ];

        /// Whether every rule holds: the table as one expression, because each entry asks.
        #[inline]
        fn all_hold(cpu: &Vcpu) -> bool {
            true $(&& { let $cpu = cpu; $holds })*
        }
    };
}

mod controls;

fn segment(cpu: &Vcpu, name: SegmentName) -> &arch::segment::Segment {
    cpu.state.segment(name)
}

fn long(cpu: &Vcpu) -> bool {
    cpu.state.efer.contains(Efer::LMA)
}

rules! {
    "CR0.PG requires CR0.PE" => |cpu| {
        !cpu.state.cr0.contains(Cr0::PG) || cpu.state.cr0.contains(Cr0::PE)
    };
    "CR0 bits 63:32 are zero" => |cpu| cpu.state.cr0.bits() >> 32 == 0;
    "IA-32e mode requires CR0.PG and CR4.PAE" => |cpu| {
        !long(cpu) || cpu.state.cr0.contains(Cr0::PG) && cpu.state.cr4.contains(Cr4::PAE)
    };
    "CR4.PCIDE requires IA-32e mode" => |cpu| {
        !cpu.state.cr4.contains(Cr4::PCIDE) || long(cpu)
    };
    "EFER.LMA equals CR0.PG and EFER.LME" => |cpu| {
        !cpu.state.cr0.contains(Cr0::PG)
            || long(cpu) == cpu.state.efer.contains(Efer::LME)
    };
    "EFER.LMA equals the IA-32e mode guest control, where EFER is loaded" => |cpu| {
        let entry = cpu.controls().entry;
        !entry.contains(EntryControls::LOAD_EFER)
            || entry.contains(EntryControls::IA32E_MODE_GUEST) == long(cpu)
    };
    "CR3 lies within the physical-address width" => |cpu| {
        cpu.state.cr3 >> cpu.maxphyaddr == 0
    };
    "DR7 bits 63:32 are zero" => |cpu| cpu.state.dr7.bits() >> 32 == 0;
    "virtual-8086 mode excludes IA-32e mode" => |cpu| {
        cpu.state.rflags_rest & Rflags::VM.bits() == 0
            || !long(cpu) && cpu.state.cr0.contains(Cr0::PE)
    };
    "RFLAGS reserved bits are as fixed" => |cpu| {
        let rflags = cpu.state.rflags();
        rflags >> 22 == 0 && rflags & (1 << 3 | 1 << 5 | 1 << 15) == 0 && rflags & 2 != 0
    };
    "RFLAGS.IF is set when an external interrupt is injected" => |cpu| {
        let info = cpu.controls().interruption_info;
        !info.is_valid()
            || info.kind() != InterruptionType::ExternalInterrupt
            || cpu.state.rflags_rest & Rflags::IF.bits() != 0
    };
    "TR is usable and a busy TSS" => |cpu| {
        let access = cpu.state.tr.access;
        access.usable()
            && access.has(AccessRights::P)
            && !access.has(AccessRights::S)
            && (access.kind() == 11 || access.kind() == 3 && !long(cpu))
    };
    "TR is in the GDT" => |cpu| cpu.state.tr.selector & 4 == 0;
    "LDTR, where usable, is an LDT" => |cpu| {
        let access = cpu.state.ldtr.access;
        !access.usable()
            || access.kind() == AccessRights::TYPE_LDT
                && access.has(AccessRights::P)
                && !access.has(AccessRights::S)
    };
    "CS is a code segment (or data in real mode)" => |cpu| {
        let access = segment(cpu, SegmentName::Cs).access;
        let v86 = cpu.state.rflags_rest & Rflags::VM.bits() != 0;
        v86 || access.usable()
            && access.has(AccessRights::S | AccessRights::P)
            && (access.has(AccessRights::CODE | AccessRights::ACCESSED)
                || access.kind() == 3)
    };
    "CS.L excludes CS.D in IA-32e mode" => |cpu| {
        let access = segment(cpu, SegmentName::Cs).access;
        !(long(cpu) && access.has(AccessRights::L | AccessRights::DB))
    };
    "virtual-8086 segments have base selector × 16, limit FFFFH and rights F3H" => |cpu| {
        cpu.state.rflags_rest & Rflags::VM.bits() == 0
            || cpu.state.segments.iter().all(|s| {
                s.base == u64::from(s.selector) << 4 && s.limit == 0xffff && s.access.0 == 0xf3
            })
    };
    "the activity state is defined, and active where STI or MOV SS block" => |cpu| {
        let shadow = Interruptibility::STI | Interruptibility::MOV_SS;
        cpu.state.activity == Activity::Active
            || !cpu.state.interruptibility.intersects(shadow)
    };
    "STI and MOV SS do not both block" => |cpu| {
        !cpu.state
            .interruptibility
            .contains(Interruptibility::STI | Interruptibility::MOV_SS)
    };
    "blocking by STI requires RFLAGS.IF" => |cpu| {
        !cpu.state.interruptibility.contains(Interruptibility::STI)
            || cpu.state.rflags_rest & Rflags::IF.bits() != 0
    };
    "RIP bits 63:32 are zero outside 64-bit code" => |cpu| {
        long(cpu) && segment(cpu, SegmentName::Cs).access.has(AccessRights::L)
            || cpu.state.rip >> 32 == 0
    };
}

/// Checks guest state; the first rule that is broken.
pub(crate) fn check(cpu: &Vcpu) -> Result<(), &'static Rule> {
    if controls::hold(cpu) && all_hold(cpu) {
        return Ok(());
    }
    match every_rule().find(|rule| !(rule.holds)(cpu)) {
        Some(rule) => Err(rule),
        None => Ok(()),
    }
}

/// The rules in the order in which they are checked.
fn every_rule() -> impl Iterator<Item = &'static Rule> {
    controls::RULES.iter().chain(RULES)
}

/// The exit of an entry that failed `rule`.
pub(crate) fn failure(rule: &'static Rule) -> VmExit {
    let mut exit = VmExit::new(ExitReason::InvalidGuestState);
    exit.entry_failure = true;
    // The SDM leaves the qualification 0 for all but a few checks; the rule's number (from 1)
    // names it for whoever looks.
    exit.qualification = every_rule()
        .position(|r| std::ptr::eq(r, rule))
        .map_or(0, |i| i as u64 + 1)
        << 32;
    exit
}

impl Vcpu {
    /// The name of the entry check that an exit with [`ExitReason::InvalidGuestState`] reports.
    pub fn failed_entry_check(exit: &VmExit) -> Option<&'static str> {
        let number = (exit.qualification >> 32) as usize;
        every_rule()
            .nth(number.checked_sub(1)?)
            .map(|rule| rule.name)
    }
}
