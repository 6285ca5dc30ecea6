//! System management mode: entering it for an SMI, leaving it with RSM.
//!
//! The state-save area has the layout of AMD's processors, as KVM's has, whatever the vendor: the
//! 64-bit one if the guest's processor has long mode, else the 32-bit one ([`area`]). While the
//! processor is in the mode its memory is the second address space of the VM.
//!
//! Source: AMD64 Architecture Programmer's Manual volume 2, "System-Management Mode".

mod area;

use crate::exits::{Outcome, valid_cr0, valid_cr4};
use crate::msrs::allowed_efer;
use crate::vcpu::{Core, Vcpu};
use arch::addr::Gpa;
use arch::control_registers::{Cr0, Cr3, Cr4, Dr6, Dr7, Efer, Rflags};
use arch::controls::Interruptibility;
use arch::cpuid::Feature;
use arch::exit::VmExit;
use arch::msr;
use arch::segment::{AccessRights, DescriptorTable, Segment, SegmentName};
use area::{Area, Image, Layout};
use cpu::Flush;
use cpu::Gpr;
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
/// RFLAGS bits that can be set.
const RFLAGS: u64 = 0x3f_7fd7;
/// Blocking that is saved.
const SHADOW: Interruptibility = Interruptibility::STI.union(Interruptibility::MOV_SS);

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
        let layout = self.layout();
        let area = Area::write(layout, &self.image());
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
        if layout == Layout::Long {
            state.efer = Efer::empty();
        }
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

    fn image(&self) -> Image {
        let state = &self.cpu.state;
        Image {
            general: std::array::from_fn(|i| state.gpr(Gpr::ALL[i])),
            rip: state.rip,
            rflags: state.rflags(),
            cr0: state.cr0.bits(),
            cr3: state.cr3,
            cr4: state.cr4.bits(),
            efer: state.efer.bits(),
            dr6: state.dr6.bits(),
            dr7: state.dr7.bits(),
            segments: SegmentName::ALL.map(|name| state.segments[name as usize]),
            ldtr: state.ldtr,
            tr: state.tr,
            gdtr: state.gdtr,
            idtr: state.idtr,
            smbase: state.smbase,
            shadow: (state.interruptibility & SHADOW).bits() as u8,
        }
    }

    /// Loads the state that the handler left; false if no processor could hold it.
    fn load_image(&mut self, vcpu: &Vcpu, image: &Image) -> bool {
        let &Image { cr0, cr3, cr4, .. } = image;
        let paged = cr0 & Cr0::PG.bits() != 0;
        let mut efer = Efer::from_bits_retain(image.efer) - Efer::LMA;
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
        for (register, value) in Gpr::ALL.into_iter().zip(image.general) {
            state.set_gpr(register, value);
        }
        state.rip = image.rip;
        state.set_rflags(image.rflags & RFLAGS);
        state.dr6 = Dr6::from_bits_retain(image.dr6 & Dr6::VOLATILE | Dr6::FIXED_1);
        state.dr7 = Dr7::from_bits_retain(image.dr7 & 0xffff_ffff | Dr7::FIXED_1);
        state.smbase = image.smbase;
        for (name, segment) in SegmentName::ALL.into_iter().zip(image.segments) {
            state.segments[name as usize] = segment;
        }
        (state.ldtr, state.tr) = (image.ldtr, image.tr);
        (state.gdtr, state.idtr) = (image.gdtr, image.idtr);
        state.cr0 = Cr0::from_bits_retain(cr0 | Cr0::ET.bits());
        state.cr3 = cr3 & !Cr3::NO_FLUSH.bits();
        state.cr4 = cr4_flags;
        state.efer = efer;
        let shadow = Interruptibility::from_bits_truncate(image.shadow.into());
        state.interruptibility |= shadow & SHADOW;
        self.load_pdptes(vcpu);
        true
    }

    /// The layout of the state-save area that goes with the guest's processor.
    fn layout(&self) -> Layout {
        if self.features.has(Feature::LM) {
            Layout::Long
        } else {
            Layout::Legacy
        }
    }
}

/// RSM, which the processor lets through only in the mode.
pub(crate) fn rsm(core: &mut Core, vcpu: &Vcpu, _exit: &VmExit) -> Outcome {
    let mut area = Area::default();
    let (mmu, space) = (&vcpu.vm().mmu, core.mmu.address_space());
    let from = Gpa::new(core.cpu.state.smbase as u64 + AREA);
    if mmu.read_guest(space, from, &mut area.0).is_err() {
        return crate::exits::emulation_failure(core, vcpu);
    }
    let image = area.read(core.layout(), core.cpu.state.efer.bits());
    core.set_smm(false);
    if !core.smm.inside_nmi {
        core.cpu.state.interruptibility -= Interruptibility::NMI;
    }
    if !core.load_image(vcpu, &image) {
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
