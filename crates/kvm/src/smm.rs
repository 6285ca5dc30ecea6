//! System management mode: entering it for an SMI, leaving it with RSM.
//!
//! The state-save area has the 64-bit layout of AMD's processors, as KVM's has, whatever the
//! vendor; its revision field says so. While the processor is in the mode its memory is the second
//! address space of the VM.
//!
//! Source: AMD64 Architecture Programmer's Manual volume 2, "System-Management Mode".

use crate::exits::{Outcome, valid_cr0, valid_cr4};
use crate::msrs::allowed_efer;
use crate::vcpu::{Core, Vcpu};
use arch::addr::Gpa;
use arch::control_registers::{Cr0, Cr3, Cr4, Dr6, Dr7, Efer, Rflags};
use arch::controls::Interruptibility;
use arch::exit::VmExit;
use arch::msr;
use arch::segment::{AccessRights, DescriptorTable, Segment, SegmentName};
use cpu::{Flush, Gpr};
use mmu::AddressSpace;

/// What is left to do about SMIs.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Smm {
    /// An SMI waits.
    pub(crate) pending: bool,
    /// NMIs were blocked when the processor entered the mode, and stay so after it.
    pub(crate) inside_nmi: bool,
    /// An INIT came while the processor was in the mode, which blocks it.
    pub(crate) latched_init: bool,
}

/// Where the handler starts, from SMBASE.
const ENTRY: u64 = 0x8000;
/// Where the state-save area starts, from SMBASE.
const AREA: u64 = 0xfe00;
/// Bytes of the state-save area.
const SIZE: usize = 0x200;
/// RFLAGS bits that can be set.
const RFLAGS: u64 = 0x3f_7fd7;

/// Offsets in the state-save area.
mod at {
    pub(super) const ES: usize = 0x00;
    pub(super) const CS: usize = 0x10;
    pub(super) const SS: usize = 0x20;
    pub(super) const DS: usize = 0x30;
    pub(super) const FS: usize = 0x40;
    pub(super) const GS: usize = 0x50;
    pub(super) const GDTR: usize = 0x60;
    pub(super) const LDTR: usize = 0x70;
    pub(super) const IDTR: usize = 0x80;
    pub(super) const TR: usize = 0x90;
    /// KVM's own: blocking by STI and MOV SS.
    pub(super) const INT_SHADOW: usize = 0xcb;
    pub(super) const EFER: usize = 0xd0;
    pub(super) const REVISION: usize = 0xfc;
    pub(super) const SMBASE: usize = 0x100;
    pub(super) const CR4: usize = 0x148;
    pub(super) const CR3: usize = 0x150;
    pub(super) const CR0: usize = 0x158;
    pub(super) const DR7: usize = 0x160;
    pub(super) const DR6: usize = 0x168;
    pub(super) const RFLAGS: usize = 0x170;
    pub(super) const RIP: usize = 0x178;
    /// The general-purpose registers, R15 first.
    pub(super) const GENERAL: usize = 0x180;
}

/// Revision: 64-bit layout, SMBASE relocation.
const REVISION: u32 = 0x0002_0064;

/// The general-purpose registers in the order of the area.
const GENERAL: [Gpr; 16] = [
    Gpr::R15,
    Gpr::R14,
    Gpr::R13,
    Gpr::R12,
    Gpr::R11,
    Gpr::R10,
    Gpr::R9,
    Gpr::R8,
    Gpr::Rdi,
    Gpr::Rsi,
    Gpr::Rbp,
    Gpr::Rsp,
    Gpr::Rbx,
    Gpr::Rdx,
    Gpr::Rcx,
    Gpr::Rax,
];

/// The segment registers with their offsets.
const SEGMENTS: [(SegmentName, usize); 6] = [
    (SegmentName::Es, at::ES),
    (SegmentName::Cs, at::CS),
    (SegmentName::Ss, at::SS),
    (SegmentName::Ds, at::DS),
    (SegmentName::Fs, at::FS),
    (SegmentName::Gs, at::GS),
];

/// A state-save area.
struct Area([u8; SIZE]);

impl Area {
    fn put<const N: usize>(&mut self, offset: usize, bytes: [u8; N]) {
        self.0[offset..offset + N].copy_from_slice(&bytes);
    }

    fn put_u64(&mut self, offset: usize, value: u64) {
        self.put(offset, value.to_le_bytes());
    }

    fn bytes<const N: usize>(&self, offset: usize) -> [u8; N] {
        std::array::from_fn(|i| self.0[offset + i])
    }

    fn u32(&self, offset: usize) -> u32 {
        u32::from_le_bytes(self.bytes(offset))
    }

    fn u64(&self, offset: usize) -> u64 {
        u64::from_le_bytes(self.bytes(offset))
    }

    fn put_segment(&mut self, offset: usize, segment: &Segment) {
        let rights = if segment.access.usable() {
            segment.access.0 as u16
        } else {
            0
        };
        self.put(offset, segment.selector.to_le_bytes());
        self.put(offset + 2, rights.to_le_bytes());
        self.put(offset + 4, segment.limit.to_le_bytes());
        self.put_u64(offset + 8, segment.base);
    }

    fn segment(&self, offset: usize) -> Segment {
        let rights = u16::from_le_bytes(self.bytes(offset + 2)) as u32 & 0xf0ff;
        let unusable = rights & AccessRights::P == 0;
        Segment {
            base: self.u64(offset + 8),
            limit: self.u32(offset + 4),
            access: AccessRights(if unusable {
                rights | AccessRights::UNUSABLE
            } else {
                rights
            }),
            selector: u16::from_le_bytes(self.bytes(offset)),
        }
    }

    fn put_table(&mut self, offset: usize, table: &DescriptorTable) {
        self.put(offset + 4, (table.limit as u32).to_le_bytes());
        self.put_u64(offset + 8, table.base);
    }

    fn table(&self, offset: usize) -> DescriptorTable {
        DescriptorTable {
            base: self.u64(offset + 8),
            limit: self.u32(offset + 4) as u16,
        }
    }
}

impl Core {
    /// Whether an SMI waits that the processor can take.
    pub(crate) fn smi_waits(&self) -> bool {
        self.smm.pending && !self.cpu.state.smm
    }

    /// Puts the processor into the mode or out of it, with the memory that belongs to it.
    pub(crate) fn set_smm(&mut self, smm: bool) {
        self.cpu.state.smm = smm;
        self.mmu.set_address_space(if smm {
            AddressSpace::Smm
        } else {
            AddressSpace::Normal
        });
        self.cpu.flush(Flush::All);
        self.look_for_events = true;
    }

    /// Takes the SMI.
    pub(crate) fn enter_smm(&mut self, vcpu: &Vcpu) {
        self.smm.pending = false;
        let count = self.msrs.get(msr::SMI_COUNT);
        self.msrs.set(msr::SMI_COUNT, count.wrapping_add(1));
        let area = self.save();
        self.set_smm(true);
        let smbase = self.cpu.state.smbase as u64;
        let (mmu, space) = (&vcpu.vm().mmu, self.mmu.address_space());
        if let Err(error) = mmu.write_guest(space, Gpa::new(smbase + AREA), &area.0) {
            tracing::warn!(vcpu = vcpu.id(), %error, "SMRAM is not in memory");
            self.events.triple_fault = true;
            return;
        }
        let state = &mut self.cpu.state;
        self.smm.inside_nmi = state.interruptibility.contains(Interruptibility::NMI);
        state.interruptibility = Interruptibility::NMI;
        state.set_rflags(Rflags::FIXED.bits());
        state.rip = ENTRY;
        state.cr0 -= Cr0::PE | Cr0::EM | Cr0::TS | Cr0::PG;
        state.cr4 = Cr4::empty();
        state.efer = Efer::empty();
        state.idtr = DescriptorTable::default();
        state.dr7 = Dr7::from_bits_retain(Dr7::FIXED_1);
        let flat = Segment {
            base: 0,
            limit: 0xffff_ffff,
            access: AccessRights(0x8093),
            selector: 0,
        };
        state.segments = [flat; 6];
        state.segments[SegmentName::Cs as usize] = Segment {
            base: smbase,
            selector: (smbase >> 4) as u16,
            ..flat
        };
    }

    fn save(&self) -> Area {
        let state = &self.cpu.state;
        let mut area = Area([0; SIZE]);
        for (name, offset) in SEGMENTS {
            area.put_segment(offset, &state.segments[name as usize]);
        }
        area.put_segment(at::LDTR, &state.ldtr);
        area.put_segment(at::TR, &state.tr);
        area.put_table(at::GDTR, &state.gdtr);
        area.put_table(at::IDTR, &state.idtr);
        let shadow = Interruptibility::STI | Interruptibility::MOV_SS;
        area.put(
            at::INT_SHADOW,
            [(state.interruptibility & shadow).bits() as u8],
        );
        area.put(at::REVISION, REVISION.to_le_bytes());
        area.put(at::SMBASE, state.smbase.to_le_bytes());
        for (offset, value) in [
            (at::EFER, state.efer.bits()),
            (at::CR4, state.cr4.bits()),
            (at::CR3, state.cr3),
            (at::CR0, state.cr0.bits()),
            (at::DR7, state.dr7.bits()),
            (at::DR6, state.dr6.bits()),
            (at::RFLAGS, state.rflags()),
            (at::RIP, state.rip),
        ] {
            area.put_u64(offset, value);
        }
        for (i, register) in GENERAL.into_iter().enumerate() {
            area.put_u64(at::GENERAL + 8 * i, state.gpr(register));
        }
        area
    }

    /// Loads the state that the handler left; false if no processor could hold it.
    fn restore(&mut self, vcpu: &Vcpu, area: &Area) -> bool {
        let (cr0, cr3, cr4) = (area.u64(at::CR0), area.u64(at::CR3), area.u64(at::CR4));
        let paged = cr0 & Cr0::PG.bits() != 0;
        let mut efer = Efer::from_bits_retain(area.u64(at::EFER)) - Efer::LMA;
        let long = paged && efer.contains(Efer::LME);
        if long {
            efer |= Efer::LMA;
        }
        let cr4_flags = Cr4::from_bits_retain(cr4);
        let consistent = if long {
            let kept = Cr3::NO_FLUSH.bits();
            cr4_flags.contains(Cr4::PAE) && (cr3 & !kept) >> self.cpuid.physical_bits() == 0
        } else {
            !cr4_flags.contains(Cr4::PCIDE) && cr3 >> 32 == 0
        };
        if !consistent
            || !valid_cr0(cr0)
            || !valid_cr4(&self.features, cr4)
            || !(allowed_efer(self) | Efer::LMA).contains(efer)
        {
            return false;
        }
        let state = &mut self.cpu.state;
        for (i, register) in GENERAL.into_iter().enumerate() {
            state.set_gpr(register, area.u64(at::GENERAL + 8 * i));
        }
        state.rip = area.u64(at::RIP);
        state.set_rflags(area.u64(at::RFLAGS) & RFLAGS);
        state.dr6 = Dr6::from_bits_retain(area.u64(at::DR6) & Dr6::VOLATILE | Dr6::FIXED_1);
        state.dr7 = Dr7::from_bits_retain(area.u64(at::DR7) & 0xffff_ffff | Dr7::FIXED_1);
        state.smbase = area.u32(at::SMBASE);
        for (name, offset) in SEGMENTS {
            state.segments[name as usize] = area.segment(offset);
        }
        state.ldtr = area.segment(at::LDTR);
        state.tr = area.segment(at::TR);
        state.gdtr = area.table(at::GDTR);
        state.idtr = area.table(at::IDTR);
        state.cr0 = Cr0::from_bits_retain(cr0 | Cr0::ET.bits());
        state.cr3 = cr3 & !Cr3::NO_FLUSH.bits();
        state.cr4 = cr4_flags;
        state.efer = efer;
        let [shadow] = area.bytes(at::INT_SHADOW);
        let shadow = Interruptibility::from_bits_truncate(shadow as u32);
        state.interruptibility |= shadow & (Interruptibility::STI | Interruptibility::MOV_SS);
        self.load_pdptes(vcpu);
        true
    }
}

/// RSM, which the processor lets through only in the mode.
pub(crate) fn rsm(core: &mut Core, vcpu: &Vcpu, _exit: &VmExit) -> Outcome {
    let mut area = Area([0; SIZE]);
    let (mmu, space) = (&vcpu.vm().mmu, core.mmu.address_space());
    let from = Gpa::new(core.cpu.state.smbase as u64 + AREA);
    if mmu.read_guest(space, from, &mut area.0).is_err() {
        return crate::exits::emulation_failure(core, vcpu);
    }
    core.set_smm(false);
    if !core.smm.inside_nmi {
        core.cpu.state.interruptibility -= Interruptibility::NMI;
    }
    if !core.restore(vcpu, &area) {
        // The architecture's answer to a corrupted area.
        tracing::warn!(vcpu = vcpu.id(), "RSM with an invalid state-save area");
        core.events.triple_fault = true;
        return Outcome::Resume;
    }
    if std::mem::take(&mut core.smm.latched_init) {
        vcpu.mailbox().post_own(crate::mailbox::Request::INIT);
    }
    Outcome::Resume
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_survive() {
        let mut area = Area([0; SIZE]);
        let code = Segment {
            base: 0x1234,
            limit: 0xffff_ffff,
            access: AccessRights(0xa09b),
            selector: 8,
        };
        area.put_segment(at::CS, &code);
        assert_eq!(area.segment(at::CS), code);
        area.put_segment(at::LDTR, &Segment::UNUSABLE);
        assert!(!area.segment(at::LDTR).access.usable());
    }
}
