//! CPUID: registers, leaves and the feature bits that steer the processor or the MMU.
//!
//! Source: SDM volume 2, "CPUID—CPU Identification"; the AMD manuals for extended leaves.

/// An output register of CPUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Register {
    /// EAX.
    Eax = 0,
    /// EBX.
    Ebx = 1,
    /// ECX.
    Ecx = 2,
    /// EDX.
    Edx = 3,
}

/// The four output registers of one leaf, indexed by [`Register`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Output(pub [u32; 4]);

macro_rules! words {
    ($($word:ident = ($leaf:expr, $subleaf:expr, $register:ident) { $($name:ident $bit:literal,)* })*) => {
        /// A 32-bit word of feature bits: one output register of one leaf.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u8)]
        pub enum Word {
            $(
                #[doc = concat!("Leaf ", stringify!($leaf), ", sub-leaf ", stringify!($subleaf), ", ", stringify!($register), ".")]
                $word,
            )*
        }

        impl Word {
            /// Every word.
            pub const ALL: &'static [Word] = &[$(Word::$word,)*];

            /// The word's leaf, sub-leaf and output register.
            pub const fn place(self) -> (u32, u32, Register) {
                match self {
                    $(Word::$word => ($leaf, $subleaf, Register::$register),)*
                }
            }
        }

        /// A feature bit.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[allow(non_camel_case_types, reason = "named as in the SDM")]
        pub enum Feature {
            $($(
                #[doc = concat!("Bit ", stringify!($bit), " of leaf ", stringify!($leaf), " ", stringify!($register), ".")]
                $name,
            )*)*
        }

        impl Feature {
            /// Every feature.
            pub const ALL: &'static [Feature] = &[$($(Feature::$name,)*)*];

            /// The word and bit number of the feature.
            #[inline]
            pub const fn position(self) -> (Word, u8) {
                match self {
                    $($(Feature::$name => (Word::$word, $bit),)*)*
                }
            }

            /// The feature's name as spelt here.
            pub const fn name(self) -> &'static str {
                match self {
                    $($(Feature::$name => stringify!($name),)*)*
                }
            }
        }
    };
}

words! {
    Leaf1Ecx = (1, 0, Ecx) {
        SSE3 0,
        PCLMULQDQ 1,
        DTES64 2,
        MONITOR 3,
        VMX 5,
        SSSE3 9,
        FMA 12,
        CX16 13,
        PDCM 15,
        PCID 17,
        SSE4_1 19,
        SSE4_2 20,
        X2APIC 21,
        MOVBE 22,
        POPCNT 23,
        TSC_DEADLINE 24,
        AES 25,
        XSAVE 26,
        OSXSAVE 27,
        AVX 28,
        F16C 29,
        RDRAND 30,
        HYPERVISOR 31,
    }
    Leaf1Edx = (1, 0, Edx) {
        FPU 0,
        VME 1,
        DE 2,
        PSE 3,
        TSC 4,
        MSR 5,
        PAE 6,
        MCE 7,
        CX8 8,
        APIC 9,
        SEP 11,
        MTRR 12,
        PGE 13,
        MCA 14,
        CMOV 15,
        PAT 16,
        PSE36 17,
        CLFLUSH 19,
        MMX 23,
        FXSR 24,
        SSE 25,
        SSE2 26,
        SS 27,
        HTT 28,
    }
    Leaf7Ebx = (7, 0, Ebx) {
        FSGSBASE 0,
        TSC_ADJUST 1,
        BMI1 3,
        AVX2 5,
        SMEP 7,
        BMI2 8,
        ERMS 9,
        INVPCID 10,
        RTM 11,
        RDSEED 18,
        ADX 19,
        SMAP 20,
        CLFLUSHOPT 23,
        CLWB 24,
        SHA 29,
    }
    Leaf7Ecx = (7, 0, Ecx) {
        UMIP 2,
        PKU 3,
        OSPKE 4,
        WAITPKG 5,
        GFNI 8,
        VAES 9,
        VPCLMULQDQ 10,
        LA57 16,
        RDPID 22,
        PKS 31,
    }
    Leaf7Edx = (7, 0, Edx) {
        FSRM 4,
        SERIALIZE 14,
        IBRS 26,
        STIBP 27,
        FLUSH_L1D 28,
        ARCH_CAPABILITIES 29,
        SSBD 31,
    }
    Leafd1Eax = (13, 1, Eax) {
        XSAVEOPT 0,
        XSAVEC 1,
        XGETBV1 2,
        XSAVES 3,
    }
    Ext1Ecx = (0x80000001, 0, Ecx) {
        LAHF_LM 0,
        CMP_LEGACY 1,
        SVM 2,
        CR8_LEGACY 4,
        LZCNT 5,
        SSE4A 6,
        MISALIGNSSE 7,
        PREFETCHW 8,
        OSVW 9,
        TOPOEXT 22,
    }
    Ext1Edx = (0x80000001, 0, Edx) {
        SYSCALL 11,
        NX 20,
        MMXEXT 22,
        FXSR_OPT 25,
        PDPE1GB 26,
        RDTSCP 27,
        LM 29,
    }
    Ext8Ebx = (0x80000008, 0, Ebx) {
        CLZERO 0,
        XSAVEERPTR 2,
        WBNOINVD 9,
        AMD_IBPB 12,
        AMD_IBRS 14,
        AMD_STIBP 15,
        AMD_SSBD 24,
    }
}

/// A set of feature bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features([u32; Word::ALL.len()]);

impl Features {
    /// No feature.
    pub const NONE: Features = Features([0; Word::ALL.len()]);

    /// Reads every word through `cpuid(leaf, subleaf)`.
    pub fn read(mut cpuid: impl FnMut(u32, u32) -> Output) -> Features {
        let mut features = Features::NONE;
        for &word in Word::ALL {
            let (leaf, subleaf, register) = word.place();
            features.0[word as usize] = cpuid(leaf, subleaf).0[register as usize];
        }
        features
    }

    /// Whether the set holds `feature`.
    #[inline]
    pub const fn has(&self, feature: Feature) -> bool {
        let (word, bit) = feature.position();
        self.0[word as usize] >> bit & 1 != 0
    }

    /// Adds `feature`.
    pub const fn insert(&mut self, feature: Feature) {
        let (word, bit) = feature.position();
        self.0[word as usize] |= 1 << bit;
    }

    /// Removes `feature`.
    pub const fn remove(&mut self, feature: Feature) {
        let (word, bit) = feature.position();
        self.0[word as usize] &= !(1 << bit);
    }

    /// The set with `features` added.
    pub const fn with(mut self, features: &[Feature]) -> Features {
        let mut i = 0;
        while i < features.len() {
            self.insert(features[i]);
            i += 1;
        }
        self
    }

    /// The features in both sets.
    pub fn intersection(mut self, other: &Features) -> Features {
        for (word, other) in self.0.iter_mut().zip(other.0) {
            *word &= other;
        }
        self
    }

    /// The bits of one word.
    pub const fn word(&self, word: Word) -> u32 {
        self.0[word as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_read_from_their_places() {
        let features = Features::read(|leaf, subleaf| match (leaf, subleaf) {
            (7, 0) => Output([0, 1 << 20, 0, 0]),
            (0x8000_0001, 0) => Output([0, 0, 0, 1 << 20]),
            _ => Output::default(),
        });
        assert_eq!(features, Features::NONE.with(&[Feature::SMAP, Feature::NX]));
        assert!(!features.has(Feature::SMEP));
    }

    #[test]
    fn no_two_features_share_a_bit() {
        for (i, a) in Feature::ALL.iter().enumerate() {
            for b in &Feature::ALL[i + 1..] {
                assert_ne!(a.position(), b.position(), "{a:?} and {b:?}");
            }
        }
    }
}
