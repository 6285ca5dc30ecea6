//! The state-save area of system management mode, in its two layouts.

use arch::segment::{AccessRights, DescriptorTable, Segment};

/// Bytes of the area.
const SIZE: usize = 0x200;

/// Which layout an area has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// 64-bit, of processors with long mode.
    Long,
    /// 32-bit.
    Legacy,
}

/// What an area holds, whatever its layout.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Image {
    /// By encoding.
    pub(super) general: [u64; 16],
    pub(super) rip: u64,
    pub(super) rflags: u64,
    pub(super) cr0: u64,
    pub(super) cr3: u64,
    pub(super) cr4: u64,
    pub(super) efer: u64,
    pub(super) dr6: u64,
    pub(super) dr7: u64,
    /// By [`SegmentName`](arch::segment::SegmentName).
    pub(super) segments: [Segment; 6],
    pub(super) ldtr: Segment,
    pub(super) tr: Segment,
    pub(super) gdtr: DescriptorTable,
    pub(super) idtr: DescriptorTable,
    pub(super) smbase: u32,
    /// Blocking by STI and MOV SS: KVM's own.
    pub(super) shadow: u8,
}

/// Offsets and sizes of the 64-bit layout.
mod long {
    /// ES, CS, SS, DS, FS, GS: 16 bytes each, with selector, rights, limit and base.
    pub(super) const SEGMENTS: usize = 0x00;
    pub(super) const GDTR: usize = 0x60;
    pub(super) const LDTR: usize = 0x70;
    pub(super) const IDTR: usize = 0x80;
    pub(super) const TR: usize = 0x90;
    pub(super) const SHADOW: usize = 0xcb;
    pub(super) const EFER: usize = 0xd0;
    pub(super) const SMBASE: usize = 0x100;
    pub(super) const CR4: usize = 0x148;
    pub(super) const CR3: usize = 0x150;
    pub(super) const CR0: usize = 0x158;
    pub(super) const DR7: usize = 0x160;
    pub(super) const DR6: usize = 0x168;
    pub(super) const RFLAGS: usize = 0x170;
    pub(super) const RIP: usize = 0x178;
    /// The general-purpose registers, the last first.
    pub(super) const GENERAL: usize = 0x180;
    /// Revision: this layout, SMBASE relocation.
    pub(super) const REVISION: u32 = 0x0002_0064;
}

/// Offsets and sizes of the 32-bit layout.
mod legacy {
    pub(super) const SMBASE: usize = 0xf8;
    pub(super) const CR4: usize = 0x114;
    pub(super) const SHADOW: usize = 0x11a;
    pub(super) const IDTR: usize = 0x150;
    pub(super) const TR: usize = 0x15c;
    pub(super) const GDTR: usize = 0x16c;
    pub(super) const LDTR: usize = 0x178;
    /// Rights, limit and base of ES, CS, SS, DS, FS and GS.
    pub(super) const SEGMENTS: [usize; 6] = [0x184, 0x190, 0x19c, 0x12c, 0x138, 0x144];
    /// Selectors of ES, CS, SS, DS, FS, GS, LDTR, TR: 4 bytes each.
    pub(super) const SELECTORS: usize = 0x1a8;
    pub(super) const DR7: usize = 0x1c8;
    pub(super) const DR6: usize = 0x1cc;
    /// EAX, ECX, EDX, EBX, ESP, EBP, ESI, EDI.
    pub(super) const GENERAL: usize = 0x1d0;
    pub(super) const EIP: usize = 0x1f0;
    pub(super) const EFLAGS: usize = 0x1f4;
    pub(super) const CR3: usize = 0x1f8;
    pub(super) const CR0: usize = 0x1fc;
    /// Revision: this layout, SMBASE relocation.
    pub(super) const REVISION: u32 = 0x0002_0000;
}

/// Where both layouts have their revision.
const REVISION: usize = 0xfc;

/// A state-save area.
pub(super) struct Area(pub(super) [u8; SIZE]);

impl Default for Area {
    fn default() -> Area {
        Area([0; SIZE])
    }
}

impl Area {
    /// The area that holds `image`.
    pub(super) fn write(layout: Layout, image: &Image) -> Area {
        let mut area = Area::default();
        match layout {
            Layout::Long => area.write_long(image),
            Layout::Legacy => area.write_legacy(image),
        }
        area
    }

    /// What the area holds. The 32-bit layout has no EFER, which is `efer` then.
    pub(super) fn read(&self, layout: Layout, efer: u64) -> Image {
        match layout {
            Layout::Long => self.read_long(),
            Layout::Legacy => self.read_legacy(efer),
        }
    }

    fn write_long(&mut self, image: &Image) {
        for (i, segment) in image.segments.iter().enumerate() {
            self.put_segment(long::SEGMENTS + 16 * i, segment);
        }
        self.put_segment(long::LDTR, &image.ldtr);
        self.put_segment(long::TR, &image.tr);
        for (offset, table) in [(long::GDTR, &image.gdtr), (long::IDTR, &image.idtr)] {
            self.put_u32(offset + 4, table.limit.into());
            self.put_u64(offset + 8, table.base);
        }
        self.put(long::SHADOW, [image.shadow]);
        self.put_u32(REVISION, long::REVISION);
        self.put_u32(long::SMBASE, image.smbase);
        for (offset, value) in [
            (long::EFER, image.efer),
            (long::CR4, image.cr4),
            (long::CR3, image.cr3),
            (long::CR0, image.cr0),
            (long::DR7, image.dr7),
            (long::DR6, image.dr6),
            (long::RFLAGS, image.rflags),
            (long::RIP, image.rip),
        ] {
            self.put_u64(offset, value);
        }
        for (i, &value) in image.general.iter().rev().enumerate() {
            self.put_u64(long::GENERAL + 8 * i, value);
        }
    }

    fn read_long(&self) -> Image {
        let table = |offset| DescriptorTable {
            base: self.u64(offset + 8),
            limit: self.u32(offset + 4) as u16,
        };
        let [shadow] = self.bytes(long::SHADOW);
        Image {
            general: std::array::from_fn(|i| self.u64(long::GENERAL + 8 * (15 - i))),
            rip: self.u64(long::RIP),
            rflags: self.u64(long::RFLAGS),
            cr0: self.u64(long::CR0),
            cr3: self.u64(long::CR3),
            cr4: self.u64(long::CR4),
            efer: self.u64(long::EFER),
            dr6: self.u64(long::DR6),
            dr7: self.u64(long::DR7),
            segments: std::array::from_fn(|i| self.segment(long::SEGMENTS + 16 * i)),
            ldtr: self.segment(long::LDTR),
            tr: self.segment(long::TR),
            gdtr: table(long::GDTR),
            idtr: table(long::IDTR),
            smbase: self.u32(long::SMBASE),
            shadow,
        }
    }

    fn write_legacy(&mut self, image: &Image) {
        let segments = image.segments.iter().zip(legacy::SEGMENTS);
        let all = segments.chain([(&image.ldtr, legacy::LDTR), (&image.tr, legacy::TR)]);
        for (i, (segment, offset)) in all.enumerate() {
            self.put_u32(legacy::SELECTORS + 4 * i, segment.selector.into());
            self.put_u32(offset, u32::from(rights(segment)) << 8);
            self.put_u32(offset + 4, segment.limit);
            self.put_u32(offset + 8, segment.base as u32);
        }
        for (offset, table) in [(legacy::GDTR, &image.gdtr), (legacy::IDTR, &image.idtr)] {
            self.put_u32(offset + 4, table.limit.into());
            self.put_u32(offset + 8, table.base as u32);
        }
        self.put(legacy::SHADOW, [image.shadow]);
        self.put_u32(REVISION, legacy::REVISION);
        self.put_u32(legacy::SMBASE, image.smbase);
        for (offset, value) in [
            (legacy::CR4, image.cr4),
            (legacy::CR3, image.cr3),
            (legacy::CR0, image.cr0),
            (legacy::DR7, image.dr7),
            (legacy::DR6, image.dr6),
            (legacy::EFLAGS, image.rflags),
            (legacy::EIP, image.rip),
        ] {
            self.put_u32(offset, value as u32);
        }
        for (i, &value) in image.general[..8].iter().enumerate() {
            self.put_u32(legacy::GENERAL + 4 * i, value as u32);
        }
    }

    fn read_legacy(&self, efer: u64) -> Image {
        let word = |offset| u64::from(self.u32(offset));
        let table = |offset| DescriptorTable {
            base: word(offset + 8),
            limit: self.u32(offset + 4) as u16,
        };
        // The selectors of LDTR and TR follow those of the six segment registers.
        let segment = |i: usize, offset| Segment {
            base: word(offset + 8),
            limit: self.u32(offset + 4),
            access: access((self.u32(offset) >> 8) as u16),
            selector: self.u32(legacy::SELECTORS + 4 * i) as u16,
        };
        let [shadow] = self.bytes(legacy::SHADOW);
        let general = |i| {
            if i < 8 {
                word(legacy::GENERAL + 4 * i)
            } else {
                0
            }
        };
        Image {
            general: std::array::from_fn(general),
            rip: word(legacy::EIP),
            rflags: word(legacy::EFLAGS),
            cr0: word(legacy::CR0),
            cr3: word(legacy::CR3),
            cr4: word(legacy::CR4),
            efer,
            dr6: word(legacy::DR6),
            dr7: word(legacy::DR7),
            segments: std::array::from_fn(|i| segment(i, legacy::SEGMENTS[i])),
            ldtr: segment(6, legacy::LDTR),
            tr: segment(7, legacy::TR),
            gdtr: table(legacy::GDTR),
            idtr: table(legacy::IDTR),
            smbase: self.u32(legacy::SMBASE),
            shadow,
        }
    }

    fn put<const N: usize>(&mut self, offset: usize, bytes: [u8; N]) {
        self.0[offset..offset + N].copy_from_slice(&bytes);
    }

    fn put_u32(&mut self, offset: usize, value: u32) {
        self.put(offset, value.to_le_bytes());
    }

    fn put_u64(&mut self, offset: usize, value: u64) {
        self.put(offset, value.to_le_bytes());
    }

    fn bytes<const N: usize>(&self, offset: usize) -> [u8; N] {
        std::array::from_fn(|i| self.0[offset + i])
    }

    fn u32(&self, offset: usize) -> u32 {
        u32::from_le_bytes(self.bytes(offset))
    }

    fn u64(&self, offset: usize) -> u64 {
        u64::from_le_bytes(self.bytes(offset))
    }

    fn put_segment(&mut self, offset: usize, segment: &Segment) {
        self.put(offset, segment.selector.to_le_bytes());
        self.put(offset + 2, rights(segment).to_le_bytes());
        self.put_u32(offset + 4, segment.limit);
        self.put_u64(offset + 8, segment.base);
    }

    fn segment(&self, offset: usize) -> Segment {
        Segment {
            base: self.u64(offset + 8),
            limit: self.u32(offset + 4),
            access: access(u16::from_le_bytes(self.bytes(offset + 2))),
            selector: u16::from_le_bytes(self.bytes(offset)),
        }
    }
}

/// Access rights as an area has them: none for a segment that cannot be used.
fn rights(segment: &Segment) -> u16 {
    if segment.access.usable() {
        segment.access.0 as u16
    } else {
        0
    }
}

/// Access rights of an area's segment.
fn access(rights: u16) -> AccessRights {
    let rights = u32::from(rights) & 0xf0ff;
    if rights & AccessRights::P == 0 {
        AccessRights(rights | AccessRights::UNUSABLE)
    } else {
        AccessRights(rights)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> Image {
        let segment = |n: u32| Segment {
            base: 0x1_0000 * u64::from(n),
            limit: 0xf_0000 + n,
            access: AccessRights(0xc090 + n),
            selector: 8 * n as u16,
        };
        Image {
            general: std::array::from_fn(|i| 0x1000 + i as u64),
            rip: 0x2000,
            rflags: 0x202,
            cr0: 0x8000_0011,
            cr3: 0x3000,
            cr4: 0x20,
            efer: 0x800,
            dr6: 0xffff_0ff0,
            dr7: 0x400,
            segments: std::array::from_fn(|i| segment(i as u32)),
            ldtr: segment(6),
            tr: segment(7),
            gdtr: DescriptorTable {
                base: 0x4000,
                limit: 0x27,
            },
            idtr: DescriptorTable {
                base: 0x5000,
                limit: 0x7ff,
            },
            smbase: 0x3_0000,
            shadow: 1,
        }
    }

    #[test]
    fn both_layouts_keep_what_they_have_room_for() {
        let mut expected = image();
        assert_eq!(
            Area::write(Layout::Long, &expected).read(Layout::Long, 0),
            expected
        );
        let legacy = Area::write(Layout::Legacy, &expected);
        expected.general[8..].fill(0);
        assert_eq!(legacy.read(Layout::Legacy, 0x800), expected);
    }

    #[test]
    fn places_of_the_documentation() {
        let legacy = Area::write(Layout::Legacy, &image());
        for (offset, value) in [
            (0x1fc, 0x8000_0011), // CR0
            (0x1ec, 0x1007),      // EDI
            (0x1d0, 0x1000),      // EAX
            (0x1c4, 8 * 7),       // TR
            (0x1ac, 8),           // CS
            (0xfc, 0x2_0000),     // revision
            (0xf8, 0x3_0000),     // SMBASE
        ] {
            assert_eq!(legacy.u32(offset), value, "{offset:#x}");
        }
        let long = Area::write(Layout::Long, &image());
        assert_eq!((long.u64(0x1f8), long.u64(0x180)), (0x1000, 0x100f));
        assert_eq!(long.u32(0xfc), 0x2_0064);
    }

    #[test]
    fn an_unusable_segment_stays_so() {
        let mut unusable = image();
        unusable.ldtr = Segment::UNUSABLE;
        for layout in [Layout::Long, Layout::Legacy] {
            let read = Area::write(layout, &unusable).read(layout, 0);
            assert!(!read.ldtr.access.usable());
        }
    }
}
