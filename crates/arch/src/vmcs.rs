//! VMCS fields: their encodings and what an encoding says.
//!
//! Source: SDM volume 3, "Field Encoding in VMCS" and "Software Use of VMREAD and VMWRITE".

/// How wide a field is (bits 14:13 of its encoding).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// 16 bits.
    Bits16,
    /// 64 bits; its upper half has an encoding of its own, one higher.
    Bits64,
    /// 32 bits.
    Bits32,
    /// 64 bits where the processor has them, else 32.
    Natural,
}

/// What a field is for (bits 11:10 of its encoding).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Controls of execution, entry and exit.
    Control,
    /// Exit information, which software reads only.
    ReadOnly,
    /// Guest state.
    Guest,
    /// Host state.
    Host,
}

macro_rules! fields {
    ($($name:ident = $encoding:literal,)*) => {
        /// A VMCS field, by its encoding (full access).
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u16)]
        pub enum Field {
            $(
                #[doc = concat!("Encoding ", stringify!($encoding), ".")]
                $name = $encoding,
            )*
        }

        impl Field {
            /// Every field, in order of encoding within width and kind.
            pub const ALL: &'static [Field] = &[$(Field::$name,)*];

            /// The field with this encoding (full access).
            pub fn from_encoding(encoding: u32) -> Option<Field> {
                match encoding {
                    $($encoding => Some(Field::$name),)*
                    _ => None,
                }
            }

            /// The field's name as spelt here.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Field::$name => stringify!($name),)*
                }
            }
        }
    };
}

fields! {
    VirtualProcessorId = 0x0000,
    PostedInterruptNotificationVector = 0x0002,
    EptpIndex = 0x0004,
    HlatPrefixSize = 0x0006,
    GuestEsSelector = 0x0800,
    GuestCsSelector = 0x0802,
    GuestSsSelector = 0x0804,
    GuestDsSelector = 0x0806,
    GuestFsSelector = 0x0808,
    GuestGsSelector = 0x080a,
    GuestLdtrSelector = 0x080c,
    GuestTrSelector = 0x080e,
    GuestInterruptStatus = 0x0810,
    PmlIndex = 0x0812,
    HostEsSelector = 0x0c00,
    HostCsSelector = 0x0c02,
    HostSsSelector = 0x0c04,
    HostDsSelector = 0x0c06,
    HostFsSelector = 0x0c08,
    HostGsSelector = 0x0c0a,
    HostTrSelector = 0x0c0c,
    IoBitmapA = 0x2000,
    IoBitmapB = 0x2002,
    MsrBitmap = 0x2004,
    ExitMsrStoreAddress = 0x2006,
    ExitMsrLoadAddress = 0x2008,
    EntryMsrLoadAddress = 0x200a,
    ExecutiveVmcsPointer = 0x200c,
    PmlAddress = 0x200e,
    TscOffset = 0x2010,
    VirtualApicAddress = 0x2012,
    ApicAccessAddress = 0x2014,
    PostedInterruptDescriptor = 0x2016,
    VmFunctionControls = 0x2018,
    EptPointer = 0x201a,
    EoiExitBitmap0 = 0x201c,
    EoiExitBitmap1 = 0x201e,
    EoiExitBitmap2 = 0x2020,
    EoiExitBitmap3 = 0x2022,
    EptpListAddress = 0x2024,
    VmreadBitmap = 0x2026,
    VmwriteBitmap = 0x2028,
    VirtualizationExceptionAddress = 0x202a,
    XssExitingBitmap = 0x202c,
    EnclsExitingBitmap = 0x202e,
    TscMultiplier = 0x2032,
    GuestPhysicalAddress = 0x2400,
    VmcsLinkPointer = 0x2800,
    GuestDebugctl = 0x2802,
    GuestPat = 0x2804,
    GuestEfer = 0x2806,
    GuestPerfGlobalCtrl = 0x2808,
    GuestPdpte0 = 0x280a,
    GuestPdpte1 = 0x280c,
    GuestPdpte2 = 0x280e,
    GuestPdpte3 = 0x2810,
    GuestBndcfgs = 0x2812,
    GuestRtitCtl = 0x2814,
    GuestPkrs = 0x2818,
    HostPat = 0x2c00,
    HostEfer = 0x2c02,
    HostPerfGlobalCtrl = 0x2c04,
    HostPkrs = 0x2c06,
    PinBasedControls = 0x4000,
    PrimaryControls = 0x4002,
    ExceptionBitmap = 0x4004,
    PageFaultErrorCodeMask = 0x4006,
    PageFaultErrorCodeMatch = 0x4008,
    Cr3TargetCount = 0x400a,
    ExitControls = 0x400c,
    ExitMsrStoreCount = 0x400e,
    ExitMsrLoadCount = 0x4010,
    EntryControls = 0x4012,
    EntryMsrLoadCount = 0x4014,
    EntryInterruptionInfo = 0x4016,
    EntryExceptionErrorCode = 0x4018,
    EntryInstructionLength = 0x401a,
    TprThreshold = 0x401c,
    SecondaryControls = 0x401e,
    PleGap = 0x4020,
    PleWindow = 0x4022,
    NotifyWindow = 0x4024,
    InstructionError = 0x4400,
    ExitReason = 0x4402,
    ExitInterruptionInfo = 0x4404,
    ExitInterruptionErrorCode = 0x4406,
    IdtVectoringInfo = 0x4408,
    IdtVectoringErrorCode = 0x440a,
    ExitInstructionLength = 0x440c,
    ExitInstructionInfo = 0x440e,
    GuestEsLimit = 0x4800,
    GuestCsLimit = 0x4802,
    GuestSsLimit = 0x4804,
    GuestDsLimit = 0x4806,
    GuestFsLimit = 0x4808,
    GuestGsLimit = 0x480a,
    GuestLdtrLimit = 0x480c,
    GuestTrLimit = 0x480e,
    GuestGdtrLimit = 0x4810,
    GuestIdtrLimit = 0x4812,
    GuestEsAccessRights = 0x4814,
    GuestCsAccessRights = 0x4816,
    GuestSsAccessRights = 0x4818,
    GuestDsAccessRights = 0x481a,
    GuestFsAccessRights = 0x481c,
    GuestGsAccessRights = 0x481e,
    GuestLdtrAccessRights = 0x4820,
    GuestTrAccessRights = 0x4822,
    GuestInterruptibility = 0x4824,
    GuestActivity = 0x4826,
    GuestSmbase = 0x4828,
    GuestSysenterCs = 0x482a,
    PreemptionTimerValue = 0x482e,
    HostSysenterCs = 0x4c00,
    Cr0Mask = 0x6000,
    Cr4Mask = 0x6002,
    Cr0ReadShadow = 0x6004,
    Cr4ReadShadow = 0x6006,
    Cr3Target0 = 0x6008,
    Cr3Target1 = 0x600a,
    Cr3Target2 = 0x600c,
    Cr3Target3 = 0x600e,
    ExitQualification = 0x6400,
    IoRcx = 0x6402,
    IoRsi = 0x6404,
    IoRdi = 0x6406,
    IoRip = 0x6408,
    GuestLinearAddress = 0x640a,
    GuestCr0 = 0x6800,
    GuestCr3 = 0x6802,
    GuestCr4 = 0x6804,
    GuestEsBase = 0x6806,
    GuestCsBase = 0x6808,
    GuestSsBase = 0x680a,
    GuestDsBase = 0x680c,
    GuestFsBase = 0x680e,
    GuestGsBase = 0x6810,
    GuestLdtrBase = 0x6812,
    GuestTrBase = 0x6814,
    GuestGdtrBase = 0x6816,
    GuestIdtrBase = 0x6818,
    GuestDr7 = 0x681a,
    GuestRsp = 0x681c,
    GuestRip = 0x681e,
    GuestRflags = 0x6820,
    GuestPendingDebug = 0x6822,
    GuestSysenterEsp = 0x6824,
    GuestSysenterEip = 0x6826,
    GuestSCet = 0x6828,
    GuestSsp = 0x682a,
    GuestInterruptSspTable = 0x682c,
    HostCr0 = 0x6c00,
    HostCr3 = 0x6c02,
    HostCr4 = 0x6c04,
    HostFsBase = 0x6c06,
    HostGsBase = 0x6c08,
    HostTrBase = 0x6c0a,
    HostGdtrBase = 0x6c0c,
    HostIdtrBase = 0x6c0e,
    HostSysenterEsp = 0x6c10,
    HostSysenterEip = 0x6c12,
    HostRsp = 0x6c14,
    HostRip = 0x6c16,
    HostSCet = 0x6c18,
    HostSsp = 0x6c1a,
    HostInterruptSspTable = 0x6c1c,
}

impl Field {
    /// The encoding for full access.
    pub const fn encoding(self) -> u32 {
        self as u32
    }

    /// The encoding of the upper half of a 64-bit field.
    pub const fn high_encoding(self) -> Option<u32> {
        match self.width() {
            Width::Bits64 => Some(self as u32 | 1),
            _ => None,
        }
    }

    /// The field's width.
    pub const fn width(self) -> Width {
        match self as u32 >> 13 & 3 {
            0 => Width::Bits16,
            1 => Width::Bits64,
            2 => Width::Bits32,
            _ => Width::Natural,
        }
    }

    /// What the field is for.
    pub const fn kind(self) -> Kind {
        match self as u32 >> 10 & 3 {
            0 => Kind::Control,
            1 => Kind::ReadOnly,
            2 => Kind::Guest,
            _ => Kind::Host,
        }
    }

    /// The index within width and kind (bits 9:1 of the encoding).
    pub const fn index(self) -> u16 {
        self as u16 >> 1 & 0x1ff
    }
}

const _: () = {
    // No access-type bit and no reserved bit in any encoding.
    let mut i = 0;
    while i < Field::ALL.len() {
        assert!(Field::ALL[i] as u16 & (1 | 1 << 12 | 1 << 15) == 0);
        i += 1;
    }
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encodings_say_width_and_kind() {
        assert_eq!(Field::GuestRip.encoding(), 0x681e);
        assert_eq!(Field::GuestRip.width(), Width::Natural);
        assert_eq!(Field::GuestRip.kind(), Kind::Guest);
        assert_eq!(Field::EptPointer.high_encoding(), Some(0x201b));
        assert_eq!(Field::ExitReason.kind(), Kind::ReadOnly);
        assert_eq!(Field::HostTrSelector.width(), Width::Bits16);
        assert_eq!(Field::VirtualProcessorId.index(), 0);
    }

    #[test]
    fn names_follow_kinds_and_encodings_are_unique() {
        for (i, field) in Field::ALL.iter().enumerate() {
            assert_eq!(Field::from_encoding(field.encoding()), Some(*field));
            if field.name().starts_with("Host") {
                assert_eq!(field.kind(), Kind::Host, "{field:?}");
            }
            assert!(
                Field::ALL[i + 1..]
                    .iter()
                    .all(|f| f.encoding() != field.encoding())
            );
        }
        assert_eq!(Field::from_encoding(0x7fff), None);
    }
}
