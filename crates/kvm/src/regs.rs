//! A vCPU's registers in the structures of the KVM API: general and system registers here, extended
//! state and events beside.

mod events;
mod extended;

use crate::debug::DebugRegisters;
use crate::error::{Result, fail};
use crate::events::{Injection, PendingException};
use crate::exits::{valid_cr0, valid_cr4, valid_xcr0};
use crate::mailbox::Request;
use crate::smm::Smm;
use crate::vcpu::{Core, MpState, Vcpu};
use arch::control_registers::{Cr0, Cr4, Dr6, Dr7, Efer, Rflags, Xcr0};
use arch::controls::Interruptibility;
use arch::exception::Exception;
use arch::interruption::{InterruptionInfo, InterruptionType};
use arch::segment::{AccessRights, DescriptorTable, Segment, SegmentName};
use cpu::{ExtendedState, Flush, Gpr};
use kvm_bindings::*;

fn to_segment(s: &Segment) -> kvm_segment {
    let rights = s.access;
    let unusable = !rights.usable();
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: rights.kind() as u8,
        present: (rights.has(AccessRights::P) && !unusable) as u8,
        dpl: rights.dpl(),
        db: rights.has(AccessRights::DB) as u8,
        s: rights.has(AccessRights::S) as u8,
        l: rights.has(AccessRights::L) as u8,
        g: rights.has(AccessRights::G) as u8,
        avl: rights.has(AccessRights::AVL) as u8,
        unusable: unusable as u8,
        padding: 0,
    }
}

fn from_segment(s: &kvm_segment) -> Segment {
    let bit = |value: u8, mask: u32| if value & 1 != 0 { mask } else { 0 };
    let unusable = s.unusable != 0 || s.present == 0;
    let rights = (s.type_ & 15) as u32
        | (s.dpl as u32 & 3) << 5
        | bit(s.s, AccessRights::S)
        | bit(s.present, AccessRights::P)
        | bit(s.avl, AccessRights::AVL)
        | bit(s.l, AccessRights::L)
        | bit(s.db, AccessRights::DB)
        | bit(s.g, AccessRights::G)
        | if unusable { AccessRights::UNUSABLE } else { 0 };
    Segment {
        base: s.base,
        limit: s.limit,
        access: AccessRights(rights),
        selector: s.selector,
    }
}

fn to_table(t: &DescriptorTable) -> kvm_dtable {
    kvm_dtable {
        base: t.base,
        limit: t.limit,
        padding: [0; 3],
    }
}

fn from_table(t: &kvm_dtable) -> DescriptorTable {
    DescriptorTable {
        base: t.base,
        limit: t.limit,
    }
}

impl Core {
    /// KVM_GET_REGS.
    pub(crate) fn regs(&self) -> kvm_regs {
        let state = &self.cpu.state;
        let r = |register| state.gpr(register);
        kvm_regs {
            rax: r(Gpr::Rax),
            rbx: r(Gpr::Rbx),
            rcx: r(Gpr::Rcx),
            rdx: r(Gpr::Rdx),
            rsi: r(Gpr::Rsi),
            rdi: r(Gpr::Rdi),
            rsp: r(Gpr::Rsp),
            rbp: r(Gpr::Rbp),
            r8: r(Gpr::R8),
            r9: r(Gpr::R9),
            r10: r(Gpr::R10),
            r11: r(Gpr::R11),
            r12: r(Gpr::R12),
            r13: r(Gpr::R13),
            r14: r(Gpr::R14),
            r15: r(Gpr::R15),
            rip: state.rip,
            rflags: state.rflags(),
        }
    }

    /// KVM_SET_REGS. Drops a pending exception, as KVM does.
    pub(crate) fn set_regs(&mut self, regs: &kvm_regs) {
        let state = &mut self.cpu.state;
        for (register, value) in [
            (Gpr::Rax, regs.rax),
            (Gpr::Rbx, regs.rbx),
            (Gpr::Rcx, regs.rcx),
            (Gpr::Rdx, regs.rdx),
            (Gpr::Rsi, regs.rsi),
            (Gpr::Rdi, regs.rdi),
            (Gpr::Rsp, regs.rsp),
            (Gpr::Rbp, regs.rbp),
            (Gpr::R8, regs.r8),
            (Gpr::R9, regs.r9),
            (Gpr::R10, regs.r10),
            (Gpr::R11, regs.r11),
            (Gpr::R12, regs.r12),
            (Gpr::R13, regs.r13),
            (Gpr::R14, regs.r14),
            (Gpr::R15, regs.r15),
        ] {
            state.set_gpr(register, value);
        }
        state.rip = regs.rip;
        state.set_rflags(regs.rflags | Rflags::FIXED.bits());
        self.events.exception = None;
        self.look_for_events = true;
    }

    /// KVM_GET_SREGS.
    pub(crate) fn sregs(&self, vcpu: &Vcpu) -> kvm_sregs {
        let state = &self.cpu.state;
        let segment = |name: SegmentName| to_segment(&state.segments[name as usize]);
        let mut sregs = kvm_sregs {
            cs: segment(SegmentName::Cs),
            ds: segment(SegmentName::Ds),
            es: segment(SegmentName::Es),
            fs: segment(SegmentName::Fs),
            gs: segment(SegmentName::Gs),
            ss: segment(SegmentName::Ss),
            tr: to_segment(&state.tr),
            ldt: to_segment(&state.ldtr),
            gdt: to_table(&state.gdtr),
            idt: to_table(&state.idtr),
            cr0: state.cr0.bits(),
            cr2: state.cr2,
            cr3: state.cr3,
            cr4: state.cr4.bits(),
            cr8: vcpu.cr8(self),
            efer: state.efer.bits(),
            apic_base: vcpu.apic_base(self),
            interrupt_bitmap: [0; 4],
        };
        if let Some(vector) = self.injected_interrupt() {
            sregs.interrupt_bitmap[(vector / 64) as usize] |= 1 << (vector % 64);
        }
        sregs
    }

    /// The external interrupt that is being delivered or that user space injected.
    fn injected_interrupt(&self) -> Option<u8> {
        let again = self.events.again.map(|again| again.info);
        let external = again.filter(|info| info.kind() == InterruptionType::ExternalInterrupt);
        external.map(|info| info.vector()).or(self.events.interrupt)
    }

    /// KVM_GET_SREGS2.
    pub(crate) fn sregs2(&self, vcpu: &Vcpu) -> kvm_sregs2 {
        let s = self.sregs(vcpu);
        let state = &self.cpu.state;
        let pae = state.cr0.contains(Cr0::PG)
            && state.cr4.contains(Cr4::PAE)
            && !state.efer.contains(Efer::LMA);
        kvm_sregs2 {
            cs: s.cs,
            ds: s.ds,
            es: s.es,
            fs: s.fs,
            gs: s.gs,
            ss: s.ss,
            tr: s.tr,
            ldt: s.ldt,
            gdt: s.gdt,
            idt: s.idt,
            cr0: s.cr0,
            cr2: s.cr2,
            cr3: s.cr3,
            cr4: s.cr4,
            cr8: s.cr8,
            efer: s.efer,
            apic_base: s.apic_base,
            flags: if pae {
                KVM_SREGS2_FLAGS_PDPTRS_VALID as u64
            } else {
                0
            },
            pdptrs: if pae { state.pdptes } else { [0; 4] },
        }
    }

    /// Whether a processor could hold these control registers.
    fn check_sregs(&self, s: &kvm_sregs) -> Result<()> {
        let (cr0, cr4) = (Cr0::from_bits_retain(s.cr0), Cr4::from_bits_retain(s.cr4));
        let efer = Efer::from_bits_retain(s.efer);
        let long = efer.contains(Efer::LME) && cr0.contains(Cr0::PG);
        let consistent = if long {
            cr4.contains(Cr4::PAE)
                && efer.contains(Efer::LMA)
                && s.cr3 >> self.cpuid.physical_bits() == 0
        } else {
            !efer.contains(Efer::LMA) && s.cs.l == 0
        };
        let cr4_allowed = if self.cpuid.is_empty() {
            valid_cr4(&crate::cpuid::supported_features(), s.cr4)
        } else {
            valid_cr4(&self.features, s.cr4)
        };
        if !consistent || !valid_cr0(s.cr0 & 0xffff_ffff) || s.cr0 >> 32 != 0 || !cr4_allowed {
            return fail(libc::EINVAL);
        }
        Ok(())
    }

    /// KVM_SET_SREGS.
    pub(crate) fn set_sregs(&mut self, vcpu: &Vcpu, s: &kvm_sregs) -> Result<()> {
        self.check_sregs(s)?;
        if vcpu.set_apic_base(self, s.apic_base, true).is_err() {
            return fail(libc::EINVAL);
        }
        self.load_sregs(vcpu, s);
        self.load_pdptes(vcpu);
        for vector in 0..256u32 {
            if s.interrupt_bitmap[(vector / 64) as usize] >> (vector % 64) & 1 != 0 {
                self.events.interrupt = Some(vector as u8);
                break;
            }
        }
        Ok(())
    }

    /// KVM_SET_SREGS2.
    pub(crate) fn set_sregs2(&mut self, vcpu: &Vcpu, s: &kvm_sregs2) -> Result<()> {
        let valid = s.flags & KVM_SREGS2_FLAGS_PDPTRS_VALID as u64 != 0;
        if s.flags & !(KVM_SREGS2_FLAGS_PDPTRS_VALID as u64) != 0 {
            return fail(libc::EINVAL);
        }
        let sregs = kvm_sregs {
            cs: s.cs,
            ds: s.ds,
            es: s.es,
            fs: s.fs,
            gs: s.gs,
            ss: s.ss,
            tr: s.tr,
            ldt: s.ldt,
            gdt: s.gdt,
            idt: s.idt,
            cr0: s.cr0,
            cr2: s.cr2,
            cr3: s.cr3,
            cr4: s.cr4,
            cr8: s.cr8,
            efer: s.efer,
            apic_base: s.apic_base,
            interrupt_bitmap: [0; 4],
        };
        let pae = sregs.cr0 & Cr0::PG.bits() != 0
            && sregs.cr4 & Cr4::PAE.bits() != 0
            && sregs.efer & Efer::LMA.bits() == 0;
        if valid && !pae {
            return fail(libc::EINVAL);
        }
        self.set_sregs(vcpu, &sregs)?;
        if valid {
            self.cpu.state.pdptes = s.pdptrs;
        }
        Ok(())
    }

    fn load_sregs(&mut self, vcpu: &Vcpu, s: &kvm_sregs) {
        let state = &mut self.cpu.state;
        for (name, segment) in [
            (SegmentName::Cs, &s.cs),
            (SegmentName::Ds, &s.ds),
            (SegmentName::Es, &s.es),
            (SegmentName::Fs, &s.fs),
            (SegmentName::Gs, &s.gs),
            (SegmentName::Ss, &s.ss),
        ] {
            state.segments[name as usize] = from_segment(segment);
        }
        state.tr = from_segment(&s.tr);
        state.ldtr = from_segment(&s.ldt);
        state.gdtr = from_table(&s.gdt);
        state.idtr = from_table(&s.idt);
        state.cr0 = Cr0::from_bits_retain(s.cr0 | Cr0::ET.bits());
        state.cr2 = s.cr2;
        state.cr3 = s.cr3;
        state.cr4 = Cr4::from_bits_retain(s.cr4);
        state.efer = Efer::from_bits_retain(s.efer);
        vcpu.set_cr8(self, s.cr8);
        self.cpu.flush(Flush::Guest);
        self.look_for_events = true;
        // A bootstrap processor that is put back to its reset vector was waiting for SIPI.
        let reset_vector = s.cs.selector == 0xf000 && self.cpu.state.rip == 0xfff0;
        if reset_vector
            && s.cr0 & Cr0::PE.bits() == 0
            && vcpu.vm().is_bootstrap(vcpu.id())
            && self.mp_state == MpState::InitReceived
        {
            self.mp_state = MpState::Runnable;
        }
    }

    /// The PDPTE registers, from memory, as a load of CR3 would fill them.
    pub(crate) fn load_pdptes(&mut self, vcpu: &Vcpu) {
        let state = &self.cpu.state;
        let pae = state.cr0.contains(Cr0::PG)
            && state.cr4.contains(Cr4::PAE)
            && !state.efer.contains(Efer::LMA);
        if !pae {
            return;
        }
        let table = arch::addr::Gpa::new(state.cr3 & 0xffff_ffe0);
        let mut bytes = [0; 32];
        let space = self.mmu.address_space();
        if vcpu.vm().mmu.read_guest(space, table, &mut bytes).is_ok() {
            for (pdpte, bytes) in self.cpu.state.pdptes.iter_mut().zip(bytes.chunks_exact(8)) {
                *pdpte = u64::from_le_bytes(bytes.try_into().unwrap_or_default());
            }
        }
    }

    /// KVM_GET_DEBUGREGS.
    pub(crate) fn debug_registers(&self) -> kvm_debugregs {
        let registers = self.debug.get(&self.cpu.state);
        kvm_debugregs {
            db: registers.dr,
            dr6: registers.dr6,
            dr7: registers.dr7,
            ..Default::default()
        }
    }

    /// KVM_SET_DEBUGREGS.
    pub(crate) fn set_debug_registers(&mut self, d: &kvm_debugregs) -> Result<()> {
        if d.flags != 0 || d.dr6 >> 32 != 0 || d.dr7 >> 32 != 0 {
            return fail(libc::EINVAL);
        }
        let registers = DebugRegisters {
            dr: d.db,
            dr6: d.dr6 & Dr6::VOLATILE | Dr6::FIXED_1,
            dr7: d.dr7 | Dr7::FIXED_1,
        };
        self.debug.put(registers, &mut self.cpu.state);
        Ok(())
    }

    /// KVM_SET_GUEST_DEBUG.
    pub(crate) fn set_guest_debug(&mut self, request: &kvm_guest_debug) -> Result<()> {
        crate::debug::GuestDebug::check(request)?;
        if let Some(exception) = crate::debug::GuestDebug::injects(request) {
            if self.events.exception.is_some() {
                return fail(libc::EBUSY);
            }
            let vector = exception.vector();
            let payload = (exception == Exception::Debug).then_some(0);
            self.events.raise(PendingException {
                vector,
                error_code: None,
                payload,
            });
        }
        self.debug.set(request, &mut self.cpu.state);
        self.controls.exception_bitmap = 0;
        self.controls.primary -= arch::controls::PrimaryControls::MONITOR_TRAP_FLAG
            | arch::controls::PrimaryControls::MOV_DR_EXITING;
        Ok(())
    }

    /// KVM_TRANSLATE.
    pub(crate) fn translation(&self, vcpu: &Vcpu, gva: u64) -> kvm_translation {
        let found = self.translate(vcpu, gva, arch::paging::Access::empty(), false);
        // KVM says "writable" and "not user" whatever the rights are.
        kvm_translation {
            linear_address: gva,
            physical_address: found.map_or(u64::MAX, |translation| translation.gpa.get()),
            valid: found.is_ok() as u8,
            writeable: 1,
            usermode: 0,
            pad: [0; 5],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_round_trip() {
        for segment in [
            Segment::real_mode(0xf000, true),
            Segment {
                base: 5,
                limit: 0xffff_ffff,
                access: AccessRights(0xa09b),
                selector: 8,
            },
            Segment::UNUSABLE,
        ] {
            let back = from_segment(&to_segment(&segment));
            assert_eq!(back.access.usable(), segment.access.usable());
            if segment.access.usable() {
                assert_eq!(back, segment);
            }
        }
    }
}
