//! What this processor can offer on this host.

use crate::op::Stop;
use crate::vcpu::Vcpu;
use arch::control_registers::Xcr0;
use arch::controls::SecondaryControls;
use arch::cpuid::{Feature, Features, Output};
use std::sync::OnceLock;

/// Features that the interpreter implements itself, whatever the host has.
const OWN: &[Feature] = &[
    Feature::FPU,
    Feature::VME,
    Feature::DE,
    Feature::PSE,
    Feature::TSC,
    Feature::MSR,
    Feature::PAE,
    Feature::MCE,
    Feature::CX8,
    Feature::APIC,
    Feature::SEP,
    Feature::MTRR,
    Feature::PGE,
    Feature::MCA,
    Feature::CMOV,
    Feature::PAT,
    Feature::PSE36,
    Feature::CLFLUSH,
    Feature::FXSR,
    Feature::HTT,
    Feature::MONITOR,
    Feature::CX16,
    Feature::PCID,
    Feature::X2APIC,
    Feature::MOVBE,
    Feature::POPCNT,
    Feature::TSC_DEADLINE,
    Feature::HYPERVISOR,
    Feature::RDRAND,
    Feature::FSGSBASE,
    Feature::TSC_ADJUST,
    Feature::BMI1,
    Feature::BMI2,
    Feature::SMEP,
    Feature::ERMS,
    Feature::INVPCID,
    Feature::RDSEED,
    Feature::ADX,
    Feature::SMAP,
    Feature::CLFLUSHOPT,
    Feature::CLWB,
    Feature::UMIP,
    Feature::PKU,
    Feature::OSPKE,
    Feature::WAITPKG,
    Feature::PKS,
    Feature::LA57,
    Feature::RDPID,
    Feature::FSRM,
    Feature::LAHF_LM,
    Feature::CMP_LEGACY,
    Feature::LZCNT,
    Feature::CR8_LEGACY,
    Feature::PREFETCHW,
    // Whoever handles RDMSR of IA32_ARCH_CAPABILITIES says what this processor does not need.
    Feature::ARCH_CAPABILITIES,
    Feature::SYSCALL,
    Feature::NX,
    Feature::PDPE1GB,
    Feature::RDTSCP,
    Feature::LM,
    Feature::CLZERO,
    Feature::WBNOINVD,
    Feature::OSXSAVE,
];

/// Features whose instructions run as the host's own: offered where the host has them.
const HOSTED: &[Feature] = &[
    Feature::MMX,
    Feature::MMXEXT,
    Feature::SSE,
    Feature::SSE2,
    Feature::SSE3,
    Feature::SSSE3,
    Feature::SSE4_1,
    Feature::SSE4_2,
    Feature::SSE4A,
    Feature::PCLMULQDQ,
    Feature::AES,
    Feature::SHA,
    Feature::AVX,
    Feature::AVX2,
    Feature::FMA,
    Feature::F16C,
    Feature::XSAVE,
    Feature::XSAVEOPT,
    Feature::XSAVEC,
    Feature::XGETBV1,
    Feature::XSAVES,
];

pub(crate) fn host_cpuid(leaf: u32, subleaf: u32) -> Output {
    use core::arch::x86_64::{__cpuid, __cpuid_count};
    let highest = __cpuid(leaf & 0x8000_0000).eax;
    if leaf > highest {
        return Output::default();
    }
    let out = __cpuid_count(leaf, subleaf);
    Output([out.eax, out.ebx, out.ecx, out.edx])
}

/// Whether the host itself has a feature.
pub(crate) fn host_has(feature: Feature) -> bool {
    static HOST: OnceLock<Features> = OnceLock::new();
    HOST.get_or_init(|| Features::read(host_cpuid)).has(feature)
}

impl Vcpu {
    /// Sets the features that the guest sees in CPUID, which decide what raises #UD and which
    /// control-register bits are reserved, and the width of physical addresses.
    pub fn set_features(&mut self, features: Features, maxphyaddr: u8) {
        self.features = features.intersection(&Vcpu::host_features());
        self.shown = self.features;
        self.maxphyaddr = maxphyaddr;
        self.code.clear();
        self.tlb.flush();
    }

    /// Has every instruction execute that the processor knows, whatever CPUID shows, but for those
    /// that a control or a bit of a control register enables: a hypervisor cannot take away others.
    pub fn execute_all_instructions(&mut self) {
        self.features = Vcpu::host_features();
        self.code.clear();
    }

    /// Whether the guest sees `feature`.
    #[inline]
    pub(crate) fn shows(&self, feature: Feature) -> bool {
        self.shown.has(feature)
    }

    /// Whether the instructions of `feature` execute.
    #[inline]
    pub(crate) fn has(&self, feature: Feature) -> bool {
        self.features.has(feature)
    }

    /// #UD unless a secondary control enables the instruction.
    pub(crate) fn require_control(&mut self, control: SecondaryControls) -> Result<(), Stop> {
        if self.secondary(control) {
            Ok(())
        } else {
            Err(self.undefined())
        }
    }

    /// Everything a guest of this host can be offered.
    pub fn host_features() -> Features {
        static FEATURES: OnceLock<Features> = OnceLock::new();
        *FEATURES.get_or_init(|| {
            let host = Features::read(host_cpuid);
            let hosted = Features::NONE.with(HOSTED).intersection(&host);
            hosted.with(OWN)
        })
    }

    /// XCR0 bits that a guest of this host can be offered.
    pub fn host_xsave_components() -> u64 {
        let features = Vcpu::host_features();
        let mut components = Xcr0::X87 | Xcr0::SSE | Xcr0::PKRU;
        components.set(Xcr0::AVX, features.has(Feature::AVX));
        components.bits()
    }
}
