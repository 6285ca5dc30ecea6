//! Segment registers as VT-x describes them: selector, base, limit, access rights.
//!
//! Source: SDM volume 3, "Guest Register State" (table "Format of Access Rights") and "Segment
//! Descriptors".

/// The six segment registers in their encoding order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum SegmentName {
    /// Extra segment.
    Es = 0,
    /// Code segment.
    Cs = 1,
    /// Stack segment.
    Ss = 2,
    /// Data segment.
    Ds = 3,
    /// FS.
    Fs = 4,
    /// GS.
    Gs = 5,
}

impl SegmentName {
    /// All six in encoding order.
    pub const ALL: [SegmentName; 6] = [
        SegmentName::Es,
        SegmentName::Cs,
        SegmentName::Ss,
        SegmentName::Ds,
        SegmentName::Fs,
        SegmentName::Gs,
    ];
}

/// Access rights of a segment in the VMCS format: descriptor bits 40 to 55, and "unusable".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct AccessRights(pub u32);

impl AccessRights {
    /// S: code or data segment, not a system segment.
    pub const S: u32 = 1 << 4;
    /// P: present.
    pub const P: u32 = 1 << 7;
    /// AVL: for the system's use.
    pub const AVL: u32 = 1 << 12;
    /// L: 64-bit code segment.
    pub const L: u32 = 1 << 13;
    /// D/B: 32-bit operands, stack or limit.
    pub const DB: u32 = 1 << 14;
    /// G: limit in pages.
    pub const G: u32 = 1 << 15;
    /// The register holds no usable segment.
    pub const UNUSABLE: u32 = 1 << 16;

    /// Type bit 0 of code and data segments: accessed.
    pub const ACCESSED: u32 = 1 << 0;
    /// Type bit 1: readable code, or writable data.
    pub const RW: u32 = 1 << 1;
    /// Type bit 2: conforming code, or expand-down data.
    pub const EC: u32 = 1 << 2;
    /// Type bit 3: code.
    pub const CODE: u32 = 1 << 3;

    /// System type: LDT.
    pub const TYPE_LDT: u32 = 2;
    /// System type: busy 16-bit TSS.
    pub const TYPE_BUSY_TSS16: u32 = 3;
    /// System type: available 32- or 64-bit TSS.
    pub const TYPE_TSS: u32 = 9;
    /// System type: busy 32- or 64-bit TSS.
    pub const TYPE_BUSY_TSS: u32 = 11;

    /// The four type bits.
    pub const fn kind(self) -> u32 {
        self.0 & 0xf
    }

    /// The descriptor privilege level.
    pub const fn dpl(self) -> u8 {
        (self.0 >> 5 & 3) as u8
    }

    /// Whether all bits of `mask` are set.
    pub const fn has(self, mask: u32) -> bool {
        self.0 & mask == mask
    }

    /// Whether the segment can be used.
    pub const fn usable(self) -> bool {
        self.0 & Self::UNUSABLE == 0
    }

    /// From the upper half of an 8-byte descriptor.
    pub const fn from_descriptor_high(high: u32) -> Self {
        AccessRights(high >> 8 & 0xf0ff)
    }
}

/// A segment register: the selector and the hidden descriptor cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Segment {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes (already scaled by G).
    pub limit: u32,
    /// Access rights.
    pub access: AccessRights,
    /// Selector.
    pub selector: u16,
}

impl Segment {
    /// A null, unusable segment.
    pub const UNUSABLE: Segment = Segment {
        base: 0,
        limit: 0,
        access: AccessRights(AccessRights::UNUSABLE),
        selector: 0,
    };

    /// What loading `selector`, whose 8-byte descriptor this is, puts into the register.
    pub const fn from_descriptor(descriptor: u64, selector: u16) -> Segment {
        let access = AccessRights::from_descriptor_high((descriptor >> 32) as u32);
        let limit = (descriptor & 0xffff | descriptor >> 32 & 0xf_0000) as u32;
        Segment {
            base: descriptor >> 16 & 0xff_ffff | descriptor >> 32 & 0xff00_0000,
            limit: if access.has(AccessRights::G) {
                limit << 12 | 0xfff
            } else {
                limit
            },
            access,
            selector,
        }
    }

    /// The highest offset in the segment, where limits are checked.
    pub const fn highest_offset(&self) -> u64 {
        let is_code = self.access.has(AccessRights::CODE);
        if is_code || !self.access.has(AccessRights::EC) {
            return self.limit as u64;
        }
        if self.access.has(AccessRights::DB) {
            0xffff_ffff
        } else {
            0xffff
        }
    }

    /// A real-mode style segment: base = selector × 16, limit 64 KiB.
    pub const fn real_mode(selector: u16, code: bool) -> Segment {
        Segment {
            base: (selector as u64) << 4,
            limit: 0xffff,
            access: AccessRights(if code { 0x9b } else { 0x93 }),
            selector,
        }
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct DescriptorTable {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes, inclusive.
    pub limit: u16,
}

const _: () = assert!(
    (AccessRights::S | AccessRights::P | AccessRights::L | AccessRights::DB | AccessRights::G)
        & AccessRights::UNUSABLE
        == 0
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_from_descriptors() {
        let flat = Segment::from_descriptor(0x00cf_9300_0000_ffff, 0x10);
        assert_eq!((flat.base, flat.limit, flat.selector), (0, u32::MAX, 0x10));
        let small = Segment::from_descriptor(0x1240_f334_5678_0fff, 0x1b);
        assert_eq!((small.base, small.limit), (0x1234_5678, 0xfff));
        assert_eq!(small.access.0, 0x40f3);
    }

    #[test]
    fn rights_from_descriptor() {
        // 64-bit kernel code: 00af9a000000ffff.
        let rights = AccessRights::from_descriptor_high(0x00af_9a00);
        assert_eq!(rights.0, 0xa09a);
        assert!(rights.has(AccessRights::L | AccessRights::P | AccessRights::S));
        assert_eq!(rights.dpl(), 0);
    }
}
