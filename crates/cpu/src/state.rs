//! Architectural state of one virtual processor.
//!
//! The layout is `repr(C)`: generated code reaches registers by offset, and the offsets it relies
//! on are proven below.

use arch::apic::InterruptStatus;
use arch::control_registers::{Cr0, Cr3, Cr4, Dr6, Dr7, Efer, Rflags, Xcr0};
use arch::controls::{Activity, Interruptibility};
use arch::segment::{AccessRights, DescriptorTable, Segment, SegmentName};
use std::mem::MaybeUninit;

/// Slots of [`CpuState::regs`] that are not architectural registers.
pub(crate) mod slot {
    /// Always zero: the base or index of an address that has none.
    pub(crate) const ZERO: usize = 16;
    /// The linear address (RIP) of the first byte of the current block's page frame, so that
    /// RIP-relative operands are a constant away from it.
    pub(crate) const PAGE: usize = 17;
    /// Number of slots.
    pub(crate) const COUNT: usize = 18;
}

/// Encoding order of the general-purpose registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs, reason = "named as in the SDM")]
pub enum Gpr {
    Rax,
    Rcx,
    Rdx,
    Rbx,
    Rsp,
    Rbp,
    Rsi,
    Rdi,
    R8,
    R9,
    R10,
    R11,
    R12,
    R13,
    R14,
    R15,
}

impl Gpr {
    /// Every register, by encoding.
    pub const ALL: [Gpr; 16] = {
        use Gpr::*;
        [
            Rax, Rcx, Rdx, Rbx, Rsp, Rbp, Rsi, Rdi, R8, R9, R10, R11, R12, R13, R14, R15,
        ]
    };
}

/// Bytes of the extended-state area: legacy region, header, and the components this processor
/// can offer in the *standard* (non-compacted) format of the host.
pub const XSAVE_AREA: usize = 4096;

/// x87, MMX, SSE and AVX state, in the standard XSAVE layout (SDM volume 1, "XSAVE Area").
///
/// The legacy region is the FXSAVE image; the upper halves of the YMM registers follow the XSAVE
/// header at offset 576.
#[derive(Clone)]
#[repr(C, align(64))]
pub struct ExtendedState(pub [u8; XSAVE_AREA]);

impl ExtendedState {
    /// Offset of the x87 control word.
    pub const FCW: usize = 0;
    /// Offset of MXCSR.
    pub const MXCSR: usize = 24;
    /// Offset of ST0/MM0; registers are 16 bytes apart.
    pub const ST: usize = 32;
    /// Offset of XMM0; registers are 16 bytes apart.
    pub const XMM: usize = 160;
    /// Offset of the XSAVE header (XSTATE_BV).
    pub const HEADER: usize = 512;
    /// Offset of the upper half of YMM0; registers are 16 bytes apart.
    pub const YMM_HIGH: usize = 576;
    /// MXCSR at reset.
    pub const MXCSR_RESET: u32 = 0x1f80;

    /// The state after FNINIT and with MXCSR at its reset value.
    pub fn initial() -> ExtendedState {
        let mut area = ExtendedState([0; XSAVE_AREA]);
        area.0[Self::FCW..Self::FCW + 2].copy_from_slice(&0x37fu16.to_le_bytes());
        area.set_mxcsr(Self::MXCSR_RESET);
        area
    }

    /// MXCSR.
    pub fn mxcsr(&self) -> u32 {
        u32::from_le_bytes(
            self.0[Self::MXCSR..Self::MXCSR + 4]
                .try_into()
                .unwrap_or_default(),
        )
    }

    /// Sets MXCSR.
    pub fn set_mxcsr(&mut self, value: u32) {
        self.0[Self::MXCSR..Self::MXCSR + 4].copy_from_slice(&value.to_le_bytes());
    }
}

/// MSRs that live in the processor. Others are the business of whoever handles the exit.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
#[allow(missing_docs, reason = "named as in the SDM")]
pub struct Msrs {
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub fmask: u64,
    pub kernel_gs_base: u64,
    pub tsc_aux: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub pat: u64,
    pub debugctl: u64,
    pub xss: u64,
    pub pkrs: u64,
    pub spec_ctrl: u64,
}

/// Arithmetic flags, not yet computed: the last result and its carry-out vector.
///
/// `carry` holds the carry out of every bit position of the operation, shifted so that the carry
/// out of the operand's top bit is bit 63 and the one out of the bit below it is bit 62; bit 3 is
/// the carry out of bit 3. The two result fields hold the same sign-extended value after
/// arithmetic; they are apart so that any combination of flags can be expressed after POPF.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct LazyFlags {
    /// ZF is set when this is zero.
    pub result: u64,
    /// Carry-out vector; CF, OF and AF come from it.
    pub carry: u64,
    /// SF is bit 63; PF is the parity of the low byte.
    pub sign_parity: u64,
}

/// Everything software can see of a processor.
#[derive(Clone)]
#[repr(C)]
pub struct CpuState {
    /// General-purpose registers in encoding order, then the slots of `slot`.
    pub regs: [u64; slot::COUNT],
    /// Instruction pointer.
    pub rip: u64,
    /// Status flags in their lazy form.
    pub flags: LazyFlags,
    /// RFLAGS without the status flags (bit 1 set).
    pub rflags_rest: u64,
    /// Linear bases added to an effective address, by [`SegmentName`], then one zero. In 64-bit
    /// mode all but FS and GS are zero whatever the segment holds.
    pub segment_bases: [u64; 7],
    /// Segment registers by [`SegmentName`].
    pub segments: [Segment; 6],
    /// Local descriptor table register.
    pub ldtr: Segment,
    /// Task register.
    pub tr: Segment,
    /// Global descriptor table register.
    pub gdtr: DescriptorTable,
    /// Interrupt descriptor table register.
    pub idtr: DescriptorTable,
    /// CR0.
    pub cr0: Cr0,
    /// CR2.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: Cr4,
    /// CR8 (task priority), when it is not virtualized by a virtual-APIC page.
    pub cr8: u64,
    /// IA32_EFER.
    pub efer: Efer,
    /// XCR0.
    pub xcr0: Xcr0,
    /// DR0 to DR3.
    pub dr: [u64; 4],
    /// DR6.
    pub dr6: Dr6,
    /// DR7.
    pub dr7: Dr7,
    /// PDPTEs of PAE paging.
    pub pdptes: [u64; 4],
    /// MSRs held by the processor.
    pub msrs: Msrs,
    /// Activity state.
    pub activity: Activity,
    /// Interruptibility state.
    pub interruptibility: Interruptibility,
    /// Guest interrupt status: RVI and SVI of virtual-interrupt delivery.
    pub interrupt_status: InterruptStatus,
    /// Pending debug exceptions (VMCS format: B0–B3, enabled breakpoint, BS).
    pub pending_debug: u64,
    /// Base of SMRAM.
    pub smbase: u32,
    /// In system-management mode.
    pub smm: bool,
    /// PKRU.
    pub pkru: u32,
    /// x87, SSE and AVX state.
    pub extended: ExtendedState,
}

/// Everything of a [`CpuState`] but its extended state, which is most of its bytes.
pub(crate) struct CoreState([MaybeUninit<u8>; CORE]);

/// Bytes before the extended state.
const CORE: usize = core::mem::offset_of!(CpuState, extended);

impl CoreState {
    /// Room for [`CpuState::save_core`].
    pub(crate) fn new() -> CoreState {
        CoreState([MaybeUninit::uninit(); CORE])
    }
}

impl CpuState {
    /// Copies everything but the extended state.
    pub(crate) fn save_core(&self, into: &mut CoreState) {
        let from: *const MaybeUninit<u8> = std::ptr::from_ref(self).cast();
        // SAFETY: the bytes before `extended` belong to `self`; padding stays uninitialised.
        unsafe { std::ptr::copy_nonoverlapping(from, into.0.as_mut_ptr(), CORE) };
    }

    /// Puts back what [`CpuState::save_core`] copied.
    pub(crate) fn restore_core(&mut self, saved: &CoreState) {
        let into: *mut MaybeUninit<u8> = std::ptr::from_mut(self).cast();
        // SAFETY: the bytes come from a `CpuState`, none of whose fields owns anything.
        unsafe { std::ptr::copy_nonoverlapping(saved.0.as_ptr(), into, CORE) };
    }

    /// The state after power-up reset (SDM volume 3, "Processor State After Reset").
    pub fn reset() -> CpuState {
        let mut state = CpuState {
            regs: [0; slot::COUNT],
            rip: 0xfff0,
            flags: LazyFlags::default(),
            rflags_rest: 2,
            segment_bases: [0; 7],
            segments: [Segment::real_mode(0, false); 6],
            ldtr: Segment {
                limit: 0xffff,
                access: AccessRights(AccessRights::P | AccessRights::TYPE_LDT),
                ..Segment::default()
            },
            tr: Segment {
                limit: 0xffff,
                access: AccessRights(AccessRights::P | AccessRights::TYPE_BUSY_TSS),
                ..Segment::default()
            },
            gdtr: DescriptorTable {
                base: 0,
                limit: 0xffff,
            },
            idtr: DescriptorTable {
                base: 0,
                limit: 0xffff,
            },
            cr0: Cr0::CD | Cr0::NW | Cr0::ET,
            cr2: 0,
            cr3: 0,
            cr4: Cr4::empty(),
            cr8: 0,
            efer: Efer::empty(),
            xcr0: Xcr0::X87,
            dr: [0; 4],
            dr6: Dr6::from_bits_retain(Dr6::FIXED_1),
            dr7: Dr7::from_bits_retain(Dr7::FIXED_1),
            pdptes: [0; 4],
            msrs: Msrs {
                pat: arch::msr::PAT_RESET,
                ..Msrs::default()
            },
            activity: Activity::Active,
            interruptibility: Interruptibility::empty(),
            interrupt_status: InterruptStatus::default(),
            pending_debug: 0,
            smbase: 0x3_0000,
            smm: false,
            pkru: 0,
            extended: ExtendedState::initial(),
        };
        state.segments[SegmentName::Cs as usize] = Segment {
            base: 0xffff_0000,
            selector: 0xf000,
            ..Segment::real_mode(0, true)
        };
        state.regs[Gpr::Rdx as usize] = 0x600;
        state.set_rflags(2);
        state
    }

    /// A general-purpose register.
    pub fn gpr(&self, register: Gpr) -> u64 {
        self.regs[register as usize]
    }

    /// Sets a general-purpose register.
    pub fn set_gpr(&mut self, register: Gpr, value: u64) {
        self.regs[register as usize] = value;
    }

    /// A segment register.
    pub fn segment(&self, name: SegmentName) -> &Segment {
        &self.segments[name as usize]
    }

    /// RFLAGS.
    pub fn rflags(&self) -> u64 {
        self.rflags_rest | self.flags.status()
    }

    /// Sets RFLAGS; bit 1 is forced to one.
    pub fn set_rflags(&mut self, value: u64) {
        self.rflags_rest = value & !Rflags::STATUS.bits() | Rflags::FIXED.bits();
        self.flags = LazyFlags::from_status(value);
    }

    /// Current privilege level: SS.DPL, as VT-x keeps it.
    pub fn cpl(&self) -> u8 {
        self.segments[SegmentName::Ss as usize].access.dpl()
    }

    /// Whether the processor is in IA-32e mode.
    pub fn long_mode(&self) -> bool {
        self.efer.contains(Efer::LMA)
    }

    /// Physical address that CR3 names, without PCID, PWT and PCD.
    pub fn cr3_base(&self) -> u64 {
        self.cr3 & !Cr3::PCID_MASK & !Cr3::NO_FLUSH.bits()
    }
}

impl LazyFlags {
    /// The six status flags at their RFLAGS positions.
    #[inline]
    pub fn status(&self) -> u64 {
        let cf = self.carry >> 63;
        let of = (self.carry >> 63 ^ self.carry >> 62) & 1;
        let af = self.carry >> 3 & 1;
        let zf = (self.result == 0) as u64;
        let sf = self.sign_parity >> 63;
        let pf = ((self.sign_parity as u8).count_ones() as u64 & 1) ^ 1;
        cf | pf << 2 | af << 4 | zf << 6 | sf << 7 | of << 11
    }

    /// The lazy form of explicit status flags (at their RFLAGS positions).
    #[inline]
    pub fn from_status(value: u64) -> LazyFlags {
        let cf = value & 1;
        let of = value >> 11 & 1;
        LazyFlags {
            result: (value >> 6 & 1) ^ 1,
            carry: cf << 63 | (cf ^ of) << 62 | (value >> 4 & 1) << 3,
            sign_parity: (value >> 7 & 1) << 63 | (value >> 2 & 1) ^ 1,
        }
    }
}

const _: () = {
    assert!(core::mem::offset_of!(CpuState, regs) == 0);
    assert!(core::mem::offset_of!(CpuState, rip) == 8 * slot::COUNT);
    assert!(core::mem::offset_of!(CpuState, flags) == 8 * slot::COUNT + 8);
    assert!(core::mem::offset_of!(CpuState, extended) % 64 == 0);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_status_combination_survives() {
        for bits in 0..64u64 {
            let value = [0, 2, 4, 6, 7, 11]
                .iter()
                .enumerate()
                .fold(0, |v, (i, position)| v | (bits >> i & 1) << position);
            assert_eq!(LazyFlags::from_status(value).status(), value);
        }
    }
}
