//! Which instructions the host executes for the guest, and what they look at.
//!
//! Host code is made for the forms of a list: x87, MMX, SSE and AVX instructions of features that
//! the host has, whatever the guest is told it has. Nothing else that a guest executes becomes an
//! instruction of the host.

use crate::features::host_has;
use arch::cpuid::Feature;
use iced_x86::{Code, CpuidFeature, EncodingKind, Instruction, Mnemonic, OpKind};

/// Which check precedes the instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    /// x87: CR0.EM and CR0.TS raise #NM.
    X87,
    /// FWAIT: CR0.MP with CR0.TS raises #NM.
    Wait,
    /// MMX: CR0.EM raises #UD, CR0.TS #NM.
    Mmx,
    /// SSE: as MMX, and CR4.OSFXSR must be set.
    Sse,
    /// AVX: CR4.OSXSAVE and XCR0 must enable it.
    Avx,
}

/// The feature that the host must have for an instruction of `feature` to run on it; `None` if such
/// instructions are not for the host.
fn needs(feature: CpuidFeature) -> Option<Feature> {
    use CpuidFeature as C;
    Some(match feature {
        C::FPU | C::FPU287 | C::FPU387 => Feature::FPU,
        // FCMOV.
        C::CMOV => Feature::CMOV,
        C::MMX => Feature::MMX,
        C::SSE => Feature::SSE,
        C::SSE2 => Feature::SSE2,
        C::SSE3 => Feature::SSE3,
        C::SSSE3 => Feature::SSSE3,
        C::SSE4_1 => Feature::SSE4_1,
        C::SSE4_2 => Feature::SSE4_2,
        C::SSE4A => Feature::SSE4A,
        C::PCLMULQDQ => Feature::PCLMULQDQ,
        C::AES => Feature::AES,
        C::SHA => Feature::SHA,
        C::AVX => Feature::AVX,
        C::AVX2 => Feature::AVX2,
        C::FMA => Feature::FMA,
        C::F16C => Feature::F16C,
        C::VAES => Feature::VAES,
        C::VPCLMULQDQ => Feature::VPCLMULQDQ,
        C::GFNI => Feature::GFNI,
        _ => return None,
    })
}

/// Whether the instruction is one that the host may execute for the guest.
pub(super) fn is_hosted(instruction: &Instruction) -> bool {
    let has_all = || {
        instruction
            .cpuid_features()
            .iter()
            .all(|&feature| needs(feature).is_some_and(host_has))
    };
    match instruction.code().encoding() {
        _ if instruction.code() == Code::Wait => true,
        EncodingKind::Legacy | EncodingKind::VEX => is_unit_register(instruction) && has_all(),
        _ => false,
    }
}

/// Whether the instruction is of the x87 unit or names a register of the vector units: features
/// also bring instructions on general registers, and ones that only order or fetch memory.
fn is_unit_register(instruction: &Instruction) -> bool {
    is_x87(instruction)
        || instruction.mnemonic() == Mnemonic::Emms
        // Between memory and a general register, through a vector unit all the same.
        || is_conversion(instruction.mnemonic())
        || (0..instruction.op_count()).any(|n| {
            let register = instruction.op_register(n);
            instruction.op_kind(n) == OpKind::Register
                && (register.is_mm() || register.is_xmm() || register.is_ymm())
        })
}

pub(super) fn is_x87(instruction: &Instruction) -> bool {
    use CpuidFeature as C;
    instruction.mnemonic() == Mnemonic::Wait
        || instruction
            .cpuid_features()
            .iter()
            .any(|f| matches!(f, C::FPU | C::FPU287 | C::FPU387))
}

pub(super) fn touches_mmx(instruction: &Instruction) -> bool {
    instruction.cpuid_features().contains(&CpuidFeature::MMX)
        || (0..instruction.op_count()).any(|n| {
            instruction.op_kind(n) == OpKind::Register && instruction.op_register(n).is_mm()
        })
}

pub(super) fn is_avx(instruction: &Instruction) -> bool {
    instruction.code().encoding() == EncodingKind::VEX
}

pub(super) fn family(instruction: &Instruction) -> Family {
    let mmx = touches_mmx(instruction);
    if instruction.mnemonic() == Mnemonic::Wait {
        Family::Wait
    } else if is_x87(instruction) {
        Family::X87
    } else if mmx && (0..instruction.op_count()).any(|n| instruction.op_register(n).is_xmm()) {
        Family::Sse
    } else if mmx {
        Family::Mmx
    } else if is_avx(instruction) {
        Family::Avx
    } else {
        Family::Sse
    }
}

/// x87 control instructions leave the instruction and data pointers alone.
pub(super) fn is_control(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        instruction.mnemonic(),
        M::Fninit | M::Fnclex | M::Fldcw | M::Fnstcw | M::Fnstsw | M::Wait | M::Fnop
    )
}

/// Whether an SSE or AVX instruction is one of floating-point arithmetic: it rounds as MXCSR says,
/// and sets its flags or raises #XM.
///
/// Source: SDM volume 2, "Exception Types" 2, 3 and (for F16C) 11.
pub(super) fn uses_mxcsr(instruction: &Instruction) -> bool {
    let features = instruction.cpuid_features();
    let is_all_arithmetic = |f: &CpuidFeature| matches!(f, CpuidFeature::FMA | CpuidFeature::F16C);
    features.iter().any(is_all_arithmetic)
        || is_arithmetic(instruction.mnemonic())
        || is_conversion(instruction.mnemonic())
}

#[rustfmt::skip]
fn is_arithmetic(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Addpd | M::Addps | M::Addsd | M::Addss | M::Vaddpd | M::Vaddps | M::Vaddsd | M::Vaddss
        | M::Subpd | M::Subps | M::Subsd | M::Subss | M::Vsubpd | M::Vsubps | M::Vsubsd | M::Vsubss
        | M::Mulpd | M::Mulps | M::Mulsd | M::Mulss | M::Vmulpd | M::Vmulps | M::Vmulsd | M::Vmulss
        | M::Divpd | M::Divps | M::Divsd | M::Divss | M::Vdivpd | M::Vdivps | M::Vdivsd | M::Vdivss
        | M::Maxpd | M::Maxps | M::Maxsd | M::Maxss | M::Vmaxpd | M::Vmaxps | M::Vmaxsd | M::Vmaxss
        | M::Minpd | M::Minps | M::Minsd | M::Minss | M::Vminpd | M::Vminps | M::Vminsd | M::Vminss
        | M::Sqrtpd | M::Sqrtps | M::Sqrtsd | M::Sqrtss
        | M::Vsqrtpd | M::Vsqrtps | M::Vsqrtsd | M::Vsqrtss
        | M::Cmppd | M::Cmpps | M::Cmpsd | M::Cmpss | M::Vcmppd | M::Vcmpps | M::Vcmpsd | M::Vcmpss
        | M::Comisd | M::Comiss | M::Vcomisd | M::Vcomiss
        | M::Ucomisd | M::Ucomiss | M::Vucomisd | M::Vucomiss
        | M::Addsubpd | M::Addsubps | M::Vaddsubpd | M::Vaddsubps
        | M::Haddpd | M::Haddps | M::Vhaddpd | M::Vhaddps
        | M::Hsubpd | M::Hsubps | M::Vhsubpd | M::Vhsubps
        | M::Dppd | M::Dpps | M::Vdppd | M::Vdpps
        | M::Roundpd | M::Roundps | M::Roundsd | M::Roundss
        | M::Vroundpd | M::Vroundps | M::Vroundsd | M::Vroundss
    )
}

#[rustfmt::skip]
fn is_conversion(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Cvtdq2ps | M::Cvtpd2dq | M::Cvtpd2ps | M::Cvtps2dq | M::Cvtps2pd | M::Cvtpi2ps
        | M::Cvtsd2si | M::Cvtsd2ss | M::Cvtsi2sd | M::Cvtsi2ss | M::Cvtss2sd | M::Cvtss2si
        | M::Cvttpd2dq | M::Cvttps2dq | M::Cvttsd2si | M::Cvttss2si
        | M::Vcvtdq2ps | M::Vcvtpd2dq | M::Vcvtpd2ps | M::Vcvtps2dq | M::Vcvtps2pd
        | M::Vcvtsd2si | M::Vcvtsd2ss | M::Vcvtsi2sd | M::Vcvtsi2ss | M::Vcvtss2sd | M::Vcvtss2si
        | M::Vcvttpd2dq | M::Vcvttps2dq | M::Vcvttsd2si | M::Vcvttss2si
    )
}
