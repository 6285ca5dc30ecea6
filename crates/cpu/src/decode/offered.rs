//! Which instructions CPUID offers.

use arch::cpuid::{Feature, Features};
use iced_x86::{Code, CpuidFeature, Instruction};

/// Whether a processor with `features` knows the instruction.
pub(crate) fn is_offered(instruction: &Instruction, features: &Features) -> bool {
    // A prefix decides between two features, or the feature list is about something else.
    match instruction.code() {
        Code::Reservednop_rm16_r16_0F0D
        | Code::Reservednop_rm32_r32_0F0D
        | Code::Reservednop_rm64_r64_0F0D => {
            return features.has(Feature::PREFETCHW) || features.has(Feature::LM);
        }
        Code::Clflush_m8 => return features.has(Feature::CLFLUSH),
        _ => {}
    }
    instruction
        .cpuid_features()
        .iter()
        .all(|&needed| has(needed, features))
}

fn has(needed: CpuidFeature, features: &Features) -> bool {
    use CpuidFeature as C;
    let feature = match needed {
        // Always there.
        C::INTEL8086
        | C::INTEL8086_ONLY
        | C::INTEL186
        | C::INTEL286
        | C::INTEL286_ONLY
        | C::INTEL386
        | C::INTEL386_ONLY
        | C::INTEL486
        | C::CPUID
        | C::MULTIBYTENOP
        | C::PAUSE
        | C::X64
        | C::FPU287
        | C::FPU387
        | C::SMM
        | C::HLE_or_RTM
        | C::UDBG => return true,
        // Decided by the handlers: exits or #UD by mode.
        C::VMX | C::SVM | C::INVEPT | C::INVVPID | C::RDPMC | C::MONITOR => return true,
        C::SGX1 => return true,
        C::FPU => Feature::FPU,
        C::TSC => Feature::TSC,
        C::MSR => Feature::MSR,
        C::CX8 => Feature::CX8,
        C::CMOV => Feature::CMOV,
        C::MMX => Feature::MMX,
        C::FXSR => Feature::FXSR,
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
        C::XSAVE => Feature::XSAVE,
        C::XSAVEOPT => Feature::XSAVEOPT,
        C::XSAVEC => Feature::XSAVEC,
        C::XSAVES => Feature::XSAVES,
        C::CMPXCHG16B => Feature::CX16,
        C::MOVBE => Feature::MOVBE,
        C::POPCNT => Feature::POPCNT,
        C::LZCNT => Feature::LZCNT,
        C::BMI1 => Feature::BMI1,
        C::BMI2 => Feature::BMI2,
        C::ADX => Feature::ADX,
        C::RDRAND => Feature::RDRAND,
        C::RDSEED => Feature::RDSEED,
        C::RDTSCP => Feature::RDTSCP,
        C::RDPID => Feature::RDPID,
        C::FSGSBASE => Feature::FSGSBASE,
        C::INVPCID => Feature::INVPCID,
        C::SMAP => Feature::SMAP,
        C::PKU => Feature::PKU,
        C::CLFSH => Feature::CLFLUSH,
        C::CLFLUSHOPT => Feature::CLFLUSHOPT,
        C::CLWB => Feature::CLWB,
        C::CLZERO => Feature::CLZERO,
        C::WBNOINVD => Feature::WBNOINVD,
        C::SYSCALL => Feature::SYSCALL,
        C::SEP => Feature::SEP,
        C::VAES => Feature::VAES,
        C::VPCLMULQDQ => Feature::VPCLMULQDQ,
        C::WAITPKG => Feature::WAITPKG,
        C::GFNI => Feature::GFNI,
        _ => return false,
    };
    features.has(feature)
}
