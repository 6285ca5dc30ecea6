//! Shadow paging: what exits only without EPT.
//!
//! The processor walks the MMU's tables. It runs with CR0.WP set and without those CR4 bits that
//! mean nothing in the guest's mode, while [`Core`]'s registers are the guest's: the two are
//! exchanged right before and after the processor runs.

use super::control_registers::{load_cr0, load_cr3, load_cr4};
use super::{Outcome, general_protection, internal_error};
use crate::events::PendingException;
use crate::mmio;
use crate::vcpu::{Core, Vcpu};
use arch::addr::{Gpa, Gva, Hva};
use arch::control_registers::Rflags;
use arch::control_registers::{Cr0, Cr3, Cr4, Efer};
use arch::controls::{Interruptibility, PrimaryControls, SecondaryControls};
use arch::cpuid::Feature;
use arch::exception::Exception;
use arch::exit::{ExitReason, VmExit};
use arch::interruption::{InterruptionInfo, InterruptionType};
use arch::page_fault::ErrorCode;
use arch::paging::{GuestControls, GuestPaging, GuestRoot, Privilege};
use cpu::{Controls, Flush, MmioHint, ShadowRoot};
use kvm_bindings::KVM_INTERNAL_ERROR_DELIVERY_EV;
use mmu::{FaultResult, GuestMode, ShadowResult};

/// CR0 bits that KVM owns.
const CR0_MASK: Cr0 = Cr0::PG.union(Cr0::WP);

/// CR4 bits that KVM owns.
const CR4_MASK: Cr4 = Cr4::PSE
    .union(Cr4::PAE)
    .union(Cr4::PGE)
    .union(Cr4::PCIDE)
    .union(Cr4::SMEP)
    .union(Cr4::SMAP)
    .union(Cr4::PKE)
    .union(Cr4::LA57);

/// The guest's own CR0 and CR4, while the processor has others.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GuestRegisters {
    cr0: Cr0,
    cr4: Cr4,
}

/// Changes the controls of a vCPU whose VM has no EPT.
pub(crate) fn choose_controls(controls: &mut Controls) {
    controls.secondary -= SecondaryControls::ENABLE_EPT;
    controls.primary |= PrimaryControls::CR3_LOAD_EXITING | PrimaryControls::INVLPG_EXITING;
    controls.cr0_mask = CR0_MASK.bits();
    controls.cr4_mask = CR4_MASK.bits();
    controls.exception_bitmap |= 1 << Exception::PageFault.vector();
}

impl Core {
    /// The guest's paging mode.
    fn guest_mode(&self) -> GuestMode {
        let state = &self.cpu.state;
        let is_paged = state.cr0.contains(Cr0::PG);
        let is_long = state.efer.contains(Efer::LMA);
        let is_pae = is_paged && !is_long && state.cr4.contains(Cr4::PAE);
        let cr4 = Cr4::PSE | Cr4::PAE | Cr4::LA57 | Cr4::SMEP | Cr4::SMAP | Cr4::PKE;
        let cr3 = if is_paged && !is_pae {
            state.cr3 & !Cr3::PCID_MASK
        } else {
            0
        };
        GuestMode {
            controls: GuestControls {
                cr0: state.cr0 & CR0_MASK,
                cr4: state.cr4 & cr4,
                efer: state.efer & (Efer::LMA | Efer::NXE),
                physical_bits: self.cpuid.physical_bits() as u32,
                has_1g_pages: self.features.has(Feature::PDPE1GB),
                has_pse36: self.features.has(Feature::PSE36),
            },
            root: GuestRoot {
                cr3: cr3 & !Cr3::NO_FLUSH.bits(),
                pdptes: if is_pae { state.pdptes } else { [0; 4] },
            },
            privilege: Privilege {
                pkru: state.pkru,
                pkrs: state.msrs.pkrs as u32,
                alignment_check: state.rflags() & Rflags::AC.bits() != 0,
            },
            is_user: state.cpl() == 3,
        }
    }

    /// Loads the shadow root into the controls.
    #[inline]
    pub(crate) fn load_shadow(&mut self, vcpu: &Vcpu) -> Result<(), Outcome> {
        let guest = self.guest_mode();
        let mmu = &vcpu.vm().mmu;
        let pointer = mmu.load_shadow(&mut self.mmu, &guest);
        let pointer = pointer.map_err(|_| Outcome::Fail(libc::ENOMEM))?;
        let root = ShadowRoot {
            root: pointer.root.get(),
            levels: pointer.levels,
            pdptes: [0; 4],
        };
        if self.controls.shadow_root != root {
            self.controls.shadow_root = root;
            // Tables that this root leads to may lag behind what another made of them.
            mmu.sync_shadow();
        }
        Ok(())
    }

    /// Gives the processor the registers that it runs with.
    #[inline]
    pub(crate) fn put_processor_registers(&mut self) -> Option<GuestRegisters> {
        if !self.has_shadow_paging {
            return None;
        }
        let state = &mut self.cpu.state;
        let (cr0, cr4) = (state.cr0, state.cr4);
        self.controls.cr0_shadow = cr0.bits();
        self.controls.cr4_shadow = cr4.bits();
        self.controls.exception_bitmap |= 1 << Exception::PageFault.vector();
        state.cr0 |= Cr0::WP;
        if !cr0.contains(Cr0::PG) {
            state.cr4 -= Cr4::SMEP | Cr4::SMAP;
        }
        Some(GuestRegisters { cr0, cr4 })
    }

    /// Takes the guest's registers back: the bits that it owns from the processor.
    #[inline]
    pub(crate) fn take_guest_registers(&mut self, guest: Option<GuestRegisters>) {
        if let Some(guest) = guest {
            let state = &mut self.cpu.state;
            state.cr0 = (state.cr0 - CR0_MASK) | guest.cr0 & CR0_MASK;
            state.cr4 = (state.cr4 - CR4_MASK) | guest.cr4 & CR4_MASK;
        }
    }

    /// What a TLB flush by the guest means besides the TLB.
    pub(crate) fn sync_shadow(&self, vcpu: &Vcpu) {
        if self.has_shadow_paging {
            vcpu.vm().mmu.sync_shadow();
        }
    }
}

/// Faults in a row at one place that the tables say are none.
#[derive(Debug, Default)]
pub(crate) struct FaultsInVain {
    /// RIP and address.
    here: Option<(u64, Gva)>,
    count: u32,
}

impl FaultsInVain {
    /// Counts; true if it goes on longer than by another vCPU's having mended the entry meanwhile.
    fn goes_on(&mut self, here: Option<(u64, Gva)>) -> bool {
        const LIMIT: u32 = 64;
        let is_again = here.is_some() && self.here == here;
        self.here = here;
        self.count = if is_again { self.count + 1 } else { 0 };
        self.count >= LIMIT
    }
}

/// Asks the MMU about a #PF.
fn ask(core: &mut Core, vcpu: &Vcpu, exit: &VmExit) -> ShadowResult {
    core.counters.page_faults += 1;
    let guest = core.guest_mode();
    let code = ErrorCode::from_bits_retain(exit.interruption_error_code.into());
    let gva = Gva::new(exit.qualification);
    let mmu = &vcpu.vm().mmu;
    let result = mmu.handle_shadow_fault(&mut core.mmu, &guest, gva, code);
    let is_in_vain = matches!(result, ShadowResult::Verdict(FaultResult::Spurious, _));
    let here = is_in_vain.then_some((core.cpu.state.rip, gva));
    if !core.faults_in_vain.goes_on(here) {
        return result;
    }
    let refused = mmu.refused_implicit_access(&mut core.mmu, &guest, gva, code);
    refused.map_or(result, ShadowResult::Guest)
}

/// #PF.
pub(super) fn page_fault(core: &mut Core, vcpu: &Vcpu, exit: &VmExit) -> Outcome {
    let delivering = exit.idt_vectoring_info.is_valid();
    let unblocked = exit.interruption_info.0 & InterruptionInfo::NMI_UNBLOCKING != 0;
    if !delivering && unblocked {
        // The IRET that unblocked NMIs will be executed again: until then they stay blocked.
        core.cpu.state.interruptibility |= Interruptibility::NMI;
    }
    let gva = exit.qualification;
    match ask(core, vcpu, exit) {
        ShadowResult::Guest(code) => guest_fault(core, gva, code),
        ShadowResult::Verdict(FaultResult::Mmio(access), _) => {
            let gpa = access.gpa;
            if delivering {
                return delivery_failed(core, vcpu, exit, gpa);
            }
            mmio::emulate(core, vcpu, Some(hint(gva, gpa)))
        }
        ShadowResult::Verdict(FaultResult::WriteProtected, gpa) => {
            if delivering {
                let space = core.mmu.address_space();
                vcpu.vm().mmu.unprotect_shadow(space, gpa.gfn());
                return Outcome::Resume;
            }
            mmio::emulate(core, vcpu, Some(hint(gva, gpa)))
        }
        ShadowResult::Verdict(result, gpa) => verdict(core, vcpu, exit, result, gpa),
    }
}

/// What the verdicts mean that need no emulation.
fn verdict(core: &mut Core, vcpu: &Vcpu, exit: &VmExit, result: FaultResult, gpa: Gpa) -> Outcome {
    let mut exit = *exit;
    exit.guest_linear_address = exit.qualification;
    exit.guest_physical_address = gpa.get();
    super::fault_outcome(core, vcpu, &exit, result)
}

fn hint(gva: u64, gpa: Gpa) -> MmioHint {
    MmioHint {
        gva,
        gpa: gpa.get(),
    }
}

/// The guest's own page fault.
fn guest_fault(core: &mut Core, gva: u64, code: ErrorCode) -> Outcome {
    // An interrupt whose delivery faulted waits until the handler lets it through.
    if let Some(again) = core.events.again {
        match again.info.kind() {
            InterruptionType::ExternalInterrupt => {
                core.events.interrupt = Some(again.info.vector());
                core.events.again = None;
                core.look_for_events = true;
            }
            InterruptionType::Nmi => {
                core.events.nmis += 1;
                core.events.again = None;
                core.look_for_events = true;
            }
            _ => {}
        }
    }
    core.events.raise(PendingException {
        vector: Exception::PageFault.vector(),
        error_code: Some(code.bits() as u32),
        payload: Some(gva),
    });
    Outcome::Resume
}

/// A fault in the middle of emulation: `None` if the instruction can go on.
pub(crate) fn nested_exit(core: &mut Core, vcpu: &Vcpu, exit: &VmExit) -> Option<Outcome> {
    use FaultResult as R;
    let is_fault = exit.reason == ExitReason::ExceptionOrNmi
        && exit.interruption_info.vector() == Exception::PageFault.vector();
    if exit.reason == ExitReason::EptViolation {
        return Some(host_fault(core, vcpu, exit));
    }
    if !is_fault {
        return Some(super::handle(core, vcpu, exit));
    }
    let gva = exit.qualification;
    match ask(core, vcpu, exit) {
        ShadowResult::Guest(code) => Some(guest_fault(core, gva, code)),
        ShadowResult::Verdict(R::Fixed | R::Spurious | R::Retry, _) => None,
        ShadowResult::Verdict(R::Mmio(access), _) => {
            core.emulation.add_hint(hint(gva, access.gpa));
            None
        }
        ShadowResult::Verdict(R::WriteProtected, gpa) => {
            core.emulation.add_hint(hint(gva, gpa));
            None
        }
        ShadowResult::Verdict(result, gpa) => Some(verdict(core, vcpu, exit, result, gpa)),
    }
}

/// Host memory behind a translation is gone: the translation goes, and the next fault finds out.
pub(super) fn host_fault(_core: &mut Core, vcpu: &Vcpu, exit: &VmExit) -> Outcome {
    let page = Hva::new(exit.guest_physical_address).page_base();
    drop(vcpu.vm().mmu.invalidate(page..page.wrapping_add(4096)));
    Outcome::Resume
}

/// An observer of one instruction that hears of it once, however often shadow faults make it start
/// over: the accesses of the last attempt are told when this is dropped.
pub(crate) struct OneAttempt<'a> {
    observer: &'a mut dyn cpu::Observer,
    is_told: bool,
    accesses: Vec<(u64, Vec<u8>, bool)>,
    branch: Option<(u64, u64)>,
}

impl<'a> OneAttempt<'a> {
    pub(crate) fn new(observer: &'a mut dyn cpu::Observer) -> Self {
        Self {
            observer,
            is_told: false,
            accesses: Vec::new(),
            branch: None,
        }
    }

    /// The instruction begins, or begins again.
    pub(crate) fn begin(&mut self) {
        self.accesses.clear();
    }
}

impl cpu::Observer for OneAttempt<'_> {
    fn instruction(&mut self, state: &cpu::CpuState, bytes: &[u8]) {
        if !std::mem::replace(&mut self.is_told, true) {
            self.observer.instruction(state, bytes);
        }
    }

    fn memory(&mut self, gva: u64, data: &[u8], write: bool) {
        self.accesses.push((gva, data.to_vec(), write));
    }

    fn branch(&mut self, from: u64, to: u64) {
        self.branch = Some((from, to));
    }
}

impl Drop for OneAttempt<'_> {
    fn drop(&mut self) {
        for (gva, data, write) in &self.accesses {
            self.observer.memory(*gva, data, *write);
        }
        if let Some((from, to)) = self.branch {
            self.observer.branch(from, to);
        }
    }
}

/// MMIO while an event was being delivered.
#[cold]
fn delivery_failed(core: &mut Core, vcpu: &Vcpu, exit: &VmExit, gpa: Gpa) -> Outcome {
    let data = [
        exit.idt_vectoring_info.0 as u64,
        exit.reason as u64,
        exit.qualification,
        gpa.get(),
        vcpu.id() as u64,
    ];
    internal_error(core, vcpu, KVM_INTERNAL_ERROR_DELIVERY_EV, &data)
}

/// MOV to CR0, CR3 or CR4.
pub(super) fn write_cr(core: &mut Core, vcpu: &Vcpu, exit: &VmExit, cr: u8, value: u64) -> Outcome {
    let state = &core.cpu.state;
    let old = (state.cr0, state.cr3, state.cr4, state.efer, state.pdptes);
    let loaded = match cr {
        0 => load_cr0(core, value),
        3 => load_cr3(core, value),
        4 => load_cr4(core, value),
        _ => false,
    };
    let state = &core.cpu.state;
    let relevant0 = Cr0::PG | Cr0::CD | Cr0::NW;
    let relevant4 = Cr4::PAE | Cr4::PGE | Cr4::PSE | Cr4::SMEP;
    let reloads = cr == 3
        || (old.0 ^ state.cr0).intersects(relevant0)
        || (old.2 ^ state.cr4).intersects(relevant4);
    if !loaded || reloads && !load_pdptes(core, vcpu) {
        let state = &mut core.cpu.state;
        (state.cr0, state.cr3, state.cr4, state.efer, state.pdptes) = old;
        return general_protection(core);
    }
    vcpu.vm().mmu.sync_shadow();
    core.skip(exit);
    Outcome::Resume
}

/// Loads the PDPTE registers where PAE paging uses them; false if they are not acceptable.
fn load_pdptes(core: &mut Core, vcpu: &Vcpu) -> bool {
    let state = &core.cpu.state;
    let is_pae = state.cr0.contains(Cr0::PG)
        && state.cr4.contains(Cr4::PAE)
        && !state.efer.contains(Efer::LMA);
    if !is_pae {
        return true;
    }
    let table = Gpa::new(state.cr3 & 0xffff_ffe0);
    let mut bytes = [0; 32];
    let space = core.mmu.address_space();
    if vcpu.vm().mmu.read_guest(space, table, &mut bytes).is_err() {
        return false;
    }
    let mut pdptes = [0; 4];
    for (pdpte, bytes) in pdptes.iter_mut().zip(bytes.chunks_exact(8)) {
        *pdpte = u64::from_le_bytes(bytes.try_into().unwrap_or_default());
    }
    let mode = core.guest_mode();
    let is_accepted = GuestPaging::new(&mode.controls).accepts_pdptes(&pdptes);
    if is_accepted {
        core.cpu.state.pdptes = pdptes;
    }
    is_accepted
}

/// INVLPG.
pub(super) fn invlpg(core: &mut Core, vcpu: &Vcpu, exit: &VmExit) -> Outcome {
    let gva = exit.qualification;
    let all = vcpu
        .vm()
        .mmu
        .invalidate_linear(&mut core.mmu, Gva::new(gva));
    core.cpu.flush(if all {
        Flush::Guest
    } else {
        Flush::Linear(gva)
    });
    core.skip(exit);
    Outcome::Resume
}

/// INVPCID. Whatever it asks for, everything is dropped and brought up to date, which the
/// architecture allows.
pub(super) fn invpcid(core: &mut Core, vcpu: &Vcpu, exit: &VmExit) -> Outcome {
    let gva = operand_address(core, exit);
    let mut bytes = [0; 16];
    if let Err(error) = core.read_linear(vcpu, gva, &mut bytes) {
        return super::linear_error(core, vcpu, error);
    }
    let kind = register(core, exit.instruction_info >> 28);
    let descriptor = u128::from_le_bytes(bytes);
    let (pcid, address) = ((descriptor & 0xfff) as u64, (descriptor >> 64) as u64);
    let has_reserved = descriptor as u64 >> 12 != 0;
    let state = &core.cpu.state;
    let has_pcids = state.cr4.contains(Cr4::PCIDE);
    let width = if state.cr4.contains(Cr4::LA57) {
        57
    } else {
        48
    };
    let is_bad = match kind {
        0 => has_reserved || !Gva::new(address).is_canonical(width) || pcid != 0 && !has_pcids,
        1 => has_reserved || pcid != 0 && !has_pcids,
        2 | 3 => false,
        _ => true,
    };
    if is_bad {
        return general_protection(core);
    }
    vcpu.vm().mmu.sync_shadow();
    core.cpu.flush(Flush::Guest);
    core.skip(exit);
    Outcome::Resume
}

fn register(core: &Core, number: u32) -> u64 {
    let value = core.cpu.state.regs[(number & 15) as usize];
    if core.is_64bit() {
        value
    } else {
        value & 0xffff_ffff
    }
}

/// The linear address of a memory operand, from the instruction information (SDM volume 3, "Format
/// of the VM-Exit Instruction-Information Field as Used for INVEPT, INVPCID, and INVVPID").
fn operand_address(core: &Core, exit: &VmExit) -> u64 {
    let info = exit.instruction_info;
    let mut address = exit.qualification;
    if info & 1 << 27 == 0 {
        address = address.wrapping_add(core.cpu.state.regs[(info >> 23 & 15) as usize]);
    }
    if info & 1 << 22 == 0 {
        let index = core.cpu.state.regs[(info >> 18 & 15) as usize];
        address = address.wrapping_add(index << (info & 3));
    }
    match info >> 7 & 7 {
        0 => address &= 0xffff,
        1 => address &= 0xffff_ffff,
        _ => {}
    }
    let segment = (info >> 15 & 7) as usize;
    let has_base = !core.is_64bit() || segment >= 4;
    if has_base {
        address = address.wrapping_add(core.cpu.state.segments[segment.min(5)].base);
    }
    if core.is_64bit() {
        address
    } else {
        address & 0xffff_ffff
    }
}
