//! Time, CPUID, TLB instructions, segment bases, extended control registers, VMX instructions.

use super::attempt;
use crate::host::HostInt;
use crate::memory::{DATA, Int};
use crate::op::{Flow, Op, Stop, flag};
use crate::vcpu::{Cause, Vcpu};
use arch::control_registers::{Cr4, Xcr0};
use arch::controls::{Eptp, PrimaryControls, SecondaryControls, VmFunctions};
use arch::cpuid::Feature;
use arch::exit::{ExitReason, VmExit};
use arch::segment::SegmentName;

impl Vcpu {
    /// Stops for an exit caused by this instruction.
    pub(crate) fn exit_for(&mut self, op: &Op, reason: ExitReason, qualification: u64) -> Stop {
        let mut exit = VmExit::new(reason);
        exit.qualification = qualification;
        exit.instruction_length = op.len.into();
        self.stop_with(Cause::Exit(exit))
    }

    /// Whether a primary control is in force.
    pub(crate) fn primary(&self, control: PrimaryControls) -> bool {
        self.controls().primary.contains(control)
    }
}

/// INVLPG.
pub(crate) fn invlpg(cpu: &mut Vcpu, op: &Op) -> Flow {
    attempt!(cpu.require_cpl0());
    let gva = cpu
        .effective(op)
        .wrapping_add(cpu.state.segment_bases[op.segment as usize]);
    let gva = if cpu.long64 && op.flags & flag::ADDRESS_32 == 0 {
        gva
    } else {
        gva & 0xffff_ffff
    };
    if cpu.primary(PrimaryControls::INVLPG_EXITING) {
        cpu.exit_for(op, ExitReason::Invlpg, gva);
        return Flow::Stop;
    }
    if !cpu.long64 || cpu.is_canonical(gva) {
        cpu.tlb.flush_own_page(gva);
        cpu.update_jump_key();
    }
    cpu.end_block(op)
}

/// INVPCID; the type is in register `dst`.
pub(crate) fn invpcid(cpu: &mut Vcpu, op: &Op) -> Flow {
    attempt!(cpu.require_control(SecondaryControls::ENABLE_INVPCID));
    attempt!(cpu.require_cpl0());
    if cpu.primary(PrimaryControls::INVLPG_EXITING) {
        let info = cpu.operand_info(op) | u32::from(op.dst / 8) << 28;
        let mut exit = VmExit::new(ExitReason::Invpcid);
        exit.instruction_length = op.len.into();
        exit.instruction_info = info;
        exit.qualification = op.disp as i64 as u64;
        cpu.stop_with(Cause::Exit(exit));
        return Flow::Stop;
    }
    let kind = if cpu.long64 {
        cpu.reg::<u64>(op.dst)
    } else {
        cpu.reg::<u32>(op.dst).into()
    };
    let mut bytes = [0; 16];
    attempt!(cpu.read_operand_bytes(op, 0, &mut bytes));
    let descriptor = u128::from_le_bytes(bytes);
    let (pcid, gva) = ((descriptor & 0xfff) as u16, (descriptor >> 64) as u64);
    let reserved = descriptor as u64 >> 12 != 0;
    let pcide = cpu.state.cr4.contains(Cr4::PCIDE);
    let bad = match kind {
        0 => reserved || !cpu.is_canonical(gva) || pcid != 0 && !pcide,
        1 => reserved || pcid != 0 && !pcide,
        2 | 3 => false,
        _ => true,
    };
    if bad {
        cpu.general_protection();
        return Flow::Stop;
    }
    match kind {
        0 => cpu.tlb.flush_page(gva),
        1 => cpu.tlb.flush_spaces(|space| space.pcid == pcid),
        _ => cpu.tlb.flush(),
    }
    cpu.update_context();
    cpu.end_block(op)
}

/// SWAPGS.
pub(crate) fn swapgs(cpu: &mut Vcpu, _op: &Op) -> Flow {
    attempt!(cpu.require_cpl0());
    let gs = cpu.state.segments[SegmentName::Gs as usize].base;
    let swapped = cpu.state.msrs.kernel_gs_base;
    cpu.state.msrs.kernel_gs_base = gs;
    cpu.set_segment_base(SegmentName::Gs, swapped);
    Flow::Next
}

/// RDFSBASE, RDGSBASE (`aux2` 0) and WRFSBASE, WRGSBASE (1) of segment `aux`, register `dst`.
pub(crate) fn segment_base<T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    if !cpu.state.cr4.contains(Cr4::FSGSBASE) {
        cpu.undefined();
        return Flow::Stop;
    }
    let name = SegmentName::ALL[op.aux as usize];
    if op.aux2 == 0 {
        let base = cpu.state.segments[name as usize].base;
        cpu.set_reg(op.dst, T::truncate(base));
        return Flow::Next;
    }
    let base: u64 = cpu.reg::<T>(op.dst).into();
    if !cpu.is_canonical(base) {
        cpu.general_protection();
        return Flow::Stop;
    }
    cpu.set_segment_base(name, base);
    Flow::Next
}

/// CPUID.
pub(crate) fn cpuid(cpu: &mut Vcpu, op: &Op) -> Flow {
    cpu.exit_for(op, ExitReason::Cpuid, 0);
    Flow::Stop
}

/// RDTSC (`aux` 0) and RDTSCP (1).
pub(crate) fn rdtsc(cpu: &mut Vcpu, op: &Op) -> Flow {
    if op.aux == 1 {
        attempt!(cpu.require_control(SecondaryControls::ENABLE_RDTSCP));
    }
    if cpu.state.cr4.contains(Cr4::TSD) && cpu.cpl() != 0 {
        cpu.general_protection();
        return Flow::Stop;
    }
    if cpu.primary(PrimaryControls::RDTSC_EXITING) {
        let reason = if op.aux == 0 {
            ExitReason::Rdtsc
        } else {
            ExitReason::Rdtscp
        };
        cpu.exit_for(op, reason, 0);
        return Flow::Stop;
    }
    let tsc = cpu.guest_tsc();
    cpu.set_reg(0, tsc as u32);
    cpu.set_reg(16, (tsc >> 32) as u32);
    if op.aux == 1 {
        let aux = cpu.state.msrs.tsc_aux;
        cpu.set_reg(8, aux as u32);
    }
    Flow::Next
}

/// RDPID, which the control of RDTSCP enables.
pub(crate) fn rdpid(cpu: &mut Vcpu, op: &Op) -> Flow {
    attempt!(cpu.require_control(SecondaryControls::ENABLE_RDTSCP));
    let aux = cpu.state.msrs.tsc_aux;
    cpu.set_reg(op.dst, aux);
    Flow::Next
}

/// RDPMC.
pub(crate) fn rdpmc(cpu: &mut Vcpu, op: &Op) -> Flow {
    if !cpu.state.cr4.contains(Cr4::PCE) && cpu.cpl() != 0 {
        cpu.general_protection();
        return Flow::Stop;
    }
    if cpu.primary(PrimaryControls::RDPMC_EXITING) {
        cpu.exit_for(op, ExitReason::Rdpmc, 0);
        return Flow::Stop;
    }
    // No counters exist.
    cpu.general_protection();
    Flow::Stop
}

/// INVD (`aux` 0) and WBINVD, WBNOINVD (1).
pub(crate) fn cache(cpu: &mut Vcpu, op: &Op) -> Flow {
    attempt!(cpu.require_cpl0());
    if op.aux == 0 {
        cpu.exit_for(op, ExitReason::Invd, 0);
        return Flow::Stop;
    }
    if cpu.secondary(SecondaryControls::WBINVD_EXITING) {
        cpu.exit_for(op, ExitReason::Wbinvd, 0);
        return Flow::Stop;
    }
    Flow::Next
}

/// XGETBV.
pub(crate) fn xgetbv(cpu: &mut Vcpu, _op: &Op) -> Flow {
    if !cpu.state.cr4.contains(Cr4::OSXSAVE) {
        cpu.undefined();
        return Flow::Stop;
    }
    let index = cpu.reg::<u32>(8);
    let value = match index {
        0 => cpu.state.xcr0.bits(),
        1 if cpu.has(Feature::XGETBV1) => cpu.state.xcr0.bits() & cpu.components_in_use(),
        _ => {
            cpu.general_protection();
            return Flow::Stop;
        }
    };
    cpu.set_reg(0, value as u32);
    cpu.set_reg(16, (value >> 32) as u32);
    Flow::Next
}

/// XSETBV.
pub(crate) fn xsetbv(cpu: &mut Vcpu, op: &Op) -> Flow {
    if !cpu.state.cr4.contains(Cr4::OSXSAVE) {
        cpu.undefined();
        return Flow::Stop;
    }
    attempt!(cpu.require_cpl0());
    cpu.exit_for(op, ExitReason::Xsetbv, 0);
    Flow::Stop
}

impl Vcpu {
    /// XINUSE: the components that are not in their initial state.
    pub(crate) fn components_in_use(&self) -> u64 {
        use crate::state::ExtendedState;
        let area = &self.state.extended.0;
        let initial = ExtendedState::initial();
        let range = |from: usize, to: usize| area[from..to] != initial.0[from..to];
        let mut in_use = Xcr0::empty();
        in_use.set(Xcr0::X87, range(0, 24) || range(32, 160));
        in_use.set(Xcr0::SSE, range(160, 416));
        in_use.set(Xcr0::AVX, range(576, 832));
        in_use.set(Xcr0::PKRU, self.state.pkru != 0);
        in_use.bits()
    }
}

/// RDRAND (`aux` 0) and RDSEED (1).
pub(crate) fn random<T: Int>(cpu: &mut Vcpu, op: &Op) -> Flow {
    let (control, reason) = if op.aux == 0 {
        (SecondaryControls::RDRAND_EXITING, ExitReason::Rdrand)
    } else {
        (SecondaryControls::RDSEED_EXITING, ExitReason::Rdseed)
    };
    if cpu.secondary(control) {
        cpu.exit_for(op, reason, 0);
        return Flow::Stop;
    }
    let mut bytes = [0; 8];
    // SAFETY: the buffer is valid for its length.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    let ok = got == 8;
    cpu.set_reg(
        op.dst,
        T::truncate(if ok { u64::from_le_bytes(bytes) } else { 0 }),
    );
    cpu.state.flags = crate::state::LazyFlags::from_status(ok.into());
    Flow::Next
}

/// RDPKRU (`aux` 0) and WRPKRU (1).
pub(crate) fn pkru(cpu: &mut Vcpu, op: &Op) -> Flow {
    if !cpu.state.cr4.contains(Cr4::PKE) {
        cpu.undefined();
        return Flow::Stop;
    }
    if cpu.reg::<u32>(8) != 0 || op.aux == 1 && cpu.reg::<u32>(16) != 0 {
        cpu.general_protection();
        return Flow::Stop;
    }
    if op.aux == 0 {
        let value = cpu.state.pkru;
        cpu.set_reg(0, value);
        cpu.set_reg(16, 0u32);
        return Flow::Next;
    }
    cpu.state.pkru = cpu.reg::<u32>(0);
    cpu.update_context();
    Flow::Next
}

/// VMCALL and VMMCALL: exits at any privilege level.
pub(crate) fn vmcall(cpu: &mut Vcpu, op: &Op) -> Flow {
    let mut exit = VmExit::new(ExitReason::Vmcall);
    exit.instruction_length = op.len.into();
    exit.instruction_info = op.aux.into();
    cpu.stop_with(Cause::Exit(exit));
    Flow::Stop
}

/// VMFUNC: at any privilege level.
pub(crate) fn vmfunc(cpu: &mut Vcpu, op: &Op) -> Flow {
    if !cpu.secondary(SecondaryControls::ENABLE_VMFUNC) {
        cpu.undefined();
        return Flow::Stop;
    }
    // Function 0, EPTP switching, is the only one there is.
    let function = cpu.reg::<u32>(0);
    let enabled = cpu.controls().vm_functions;
    let switched = function == 0 && enabled.contains(VmFunctions::EPTP_SWITCHING) && {
        let index = cpu.reg::<u32>(8);
        cpu.switch_eptp(index)
    };
    if !switched {
        cpu.exit_for(op, ExitReason::Vmfunc, 0);
        return Flow::Stop;
    }
    cpu.end_block(op)
}

impl Vcpu {
    /// EPTP switching: loads the pointer at `index` of the list, if it is a good one. Translations
    /// of the tables that are left stay, under their own tag.
    fn switch_eptp(&mut self, index: u32) -> bool {
        const ENTRIES: u32 = 512;
        if index >= ENTRIES {
            return false;
        }
        let at = self.controls().eptp_list + 8 * u64::from(index);
        // SAFETY: the address comes from the controls, whose owner keeps the list there; a wrong
        // one faults and is caught.
        let Ok(pointer) = (unsafe { u64::load(at) }) else {
            return false;
        };
        let eptp = Eptp(pointer);
        if !eptp.is_valid() {
            return false;
        }
        self.select_eptp(Some(eptp));
        self.switched_eptp = Some(eptp);
        self.update_context();
        true
    }
}

/// ENCLS: an exit, or #GP because no leaf is implemented.
pub(crate) fn encls(cpu: &mut Vcpu, op: &Op) -> Flow {
    let offered = cpu.secondary(SecondaryControls::ENCLS_EXITING);
    if !offered || cpu.real_segments() || cpu.cpl() != 0 {
        cpu.undefined();
        return Flow::Stop;
    }
    let leaf = cpu.reg::<u32>(0).min(63);
    if cpu.controls().encls_exiting_bitmap >> leaf & 1 != 0 {
        cpu.exit_for(op, ExitReason::Encls, 0);
    } else {
        cpu.general_protection();
    }
    Flow::Stop
}

/// The other VMX instructions; `aux` is the exit reason. They are #UD while the guest has not
/// enabled VMX.
pub(crate) fn vmx(cpu: &mut Vcpu, op: &Op) -> Flow {
    if !cpu.state.cr4.contains(Cr4::VMXE) || cpu.real_segments() {
        cpu.undefined();
        return Flow::Stop;
    }
    let Some(reason) = ExitReason::from_number(op.aux.into()) else {
        cpu.undefined();
        return Flow::Stop;
    };
    let mut exit = VmExit::new(reason);
    exit.instruction_length = op.len.into();
    exit.qualification = op.disp as i64 as u64;
    exit.instruction_info = cpu.operand_info(op);
    cpu.stop_with(Cause::Exit(exit));
    Flow::Stop
}

/// RSM outside SMM is #UD; in SMM it exits for the hypervisor, which holds the saved state.
pub(crate) fn rsm(cpu: &mut Vcpu, op: &Op) -> Flow {
    if !cpu.state.smm {
        cpu.undefined();
        return Flow::Stop;
    }
    cpu.exit_for(op, ExitReason::Rsm, 0);
    Flow::Stop
}

/// CLZERO: clears the cache line that rAX names.
pub(crate) fn clzero(cpu: &mut Vcpu, op: &Op) -> Flow {
    let offset = cpu.sized_reg(0, op.aux2) & !63;
    let address = attempt!(cpu.linear(DATA, offset, 64, true));
    cpu.write_bytes(address, DATA, &[0; 64]).into()
}
