//! Descriptors, segment-register loads, and effective-address checks of segmented code.
//!
//! Source: SDM volume 3, "Protected-Mode Memory Management" and "Protection".

use crate::memory::{DATA, STACK};
use crate::op::{Op, Stop, flag};
use crate::vcpu::Vcpu;
use arch::exception::Exception;
use arch::segment::{AccessRights, Segment, SegmentName};

/// A raw descriptor as read from a table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Descriptor {
    pub low: u64,
    /// Base bits 63:32 of a 16-byte system descriptor.
    pub high: u64,
}

impl Descriptor {
    pub(crate) fn access(&self) -> AccessRights {
        AccessRights::from_descriptor_high((self.low >> 32) as u32)
    }

    pub(crate) fn is_system(&self) -> bool {
        !self.access().has(AccessRights::S)
    }

    /// As a segment register's contents.
    pub(crate) fn segment(&self, selector: u16) -> Segment {
        let mut segment = Segment::from_descriptor(self.low, selector);
        segment.base |= self.high << 32;
        segment
    }

    // Fields of a call gate.
    pub(crate) fn gate_selector(&self) -> u16 {
        (self.low >> 16) as u16
    }
    pub(crate) fn gate_offset(&self) -> u64 {
        self.low & 0xffff | self.low >> 32 & 0xffff_0000 | self.high << 32
    }
    pub(crate) fn gate_parameters(&self) -> u8 {
        (self.low >> 32 & 0x1f) as u8
    }
}

impl Vcpu {
    /// The linear address of a selector's descriptor, if `size` bytes lie within its table.
    fn descriptor_address(&self, selector: u16, size: u64) -> Option<u64> {
        let offset = u64::from(selector & !7);
        let (base, limit) = if selector & 4 != 0 {
            if !self.state.ldtr.access.usable() {
                return None;
            }
            (self.state.ldtr.base, self.state.ldtr.limit.into())
        } else {
            (self.state.gdtr.base, self.state.gdtr.limit.into())
        };
        (offset + size - 1 <= limit).then(|| base.wrapping_add(offset))
    }

    /// Reads the 8-byte descriptor of `selector`; beyond its table it raises `fault`.
    pub(crate) fn read_raw_descriptor(
        &mut self,
        selector: u16,
        fault: Exception,
        ext: u32,
    ) -> Result<Descriptor, Stop> {
        match self.descriptor_address(selector, 8) {
            Some(address) => {
                let low = self.read_system(address)?;
                Ok(Descriptor { low, high: 0 })
            }
            None => Err(self.raise_code(fault, u32::from(selector & !3) | ext)),
        }
    }

    /// Reads the 16-byte form that LDT, TSS and call-gate descriptors have in long mode.
    pub(crate) fn read_system_descriptor(
        &mut self,
        selector: u16,
        fault: Exception,
    ) -> Result<Descriptor, Stop> {
        let mut descriptor = self.read_raw_descriptor(selector, fault, 0)?;
        if self.long_mode {
            match self.descriptor_address(selector, 16) {
                Some(address) => descriptor.high = self.read_system(address.wrapping_add(8))?,
                None => return Err(self.raise_code(fault, u32::from(selector & !3))),
            }
        }
        Ok(descriptor)
    }

    /// Reads a code or data descriptor as a segment.
    pub(crate) fn read_descriptor(
        &mut self,
        selector: u16,
        fault: Exception,
        ext: u32,
    ) -> Result<Segment, Stop> {
        Ok(self
            .read_raw_descriptor(selector, fault, ext)?
            .segment(selector))
    }

    /// Sets the accessed bit of a code or data descriptor in memory, if it is clear.
    pub(crate) fn mark_accessed(
        &mut self,
        selector: u16,
        segment: &mut Segment,
    ) -> Result<(), Stop> {
        if segment.access.has(AccessRights::ACCESSED) {
            return Ok(());
        }
        segment.access.0 |= AccessRights::ACCESSED;
        self.set_type_bits(selector, AccessRights::ACCESSED as u8)
    }

    /// ORs bits into the type byte of a descriptor in memory.
    pub(crate) fn set_type_bits(&mut self, selector: u16, bits: u8) -> Result<(), Stop> {
        let Some(address) = self.descriptor_address(selector, 8) else {
            return Ok(());
        };
        let at = address.wrapping_add(5);
        let old: u8 = self.read_system(at)?;
        self.write_system(at, old | bits)
    }

    /// MOV or POP to a data-segment register (or SS).
    pub(crate) fn load_segment(&mut self, name: SegmentName, selector: u16) -> Result<(), Stop> {
        if self.real_segments() {
            let v86 = self.v86();
            let segment = &mut self.state.segments[name as usize];
            segment.selector = selector;
            segment.base = u64::from(selector) << 4;
            if v86 {
                segment.limit = 0xffff;
                segment.access = AccessRights(0xf3);
            } else {
                // Real mode keeps the limit and most rights of what was loaded before ("unreal").
                let keep = segment.access.usable();
                if !keep {
                    segment.limit = 0xffff;
                    segment.access = AccessRights(0x93);
                }
            }
            let base = segment.base;
            self.state.segment_bases[name as usize] = base;
            return Ok(());
        }
        if name == SegmentName::Ss {
            return self.load_stack_segment(selector);
        }
        if selector & !3 == 0 {
            self.put_segment(
                name,
                Segment {
                    selector,
                    ..Segment::UNUSABLE
                },
            );
            return Ok(());
        }
        let error = u32::from(selector & !3);
        let mut segment = self.read_descriptor(selector, Exception::GeneralProtection, 0)?;
        let access = segment.access;
        let readable = access.0 & AccessRights::CODE == 0 || access.has(AccessRights::RW);
        let conforming = access.has(AccessRights::CODE | AccessRights::EC);
        let level = self.cpl().max((selector & 3) as u8);
        if !access.has(AccessRights::S) || !readable || !conforming && level > access.dpl() {
            return Err(self.raise_code(Exception::GeneralProtection, error));
        }
        if !access.has(AccessRights::P) {
            return Err(self.raise_code(Exception::SegmentNotPresent, error));
        }
        self.mark_accessed(selector, &mut segment)?;
        self.put_segment(name, segment);
        Ok(())
    }

    fn load_stack_segment(&mut self, selector: u16) -> Result<(), Stop> {
        let cpl = self.cpl();
        let error = u32::from(selector & !3);
        if selector & !3 == 0 {
            if !self.long64 || cpl == 3 || selector & 3 != u16::from(cpl) {
                return Err(self.raise_code(Exception::GeneralProtection, 0));
            }
            let access = AccessRights(AccessRights::UNUSABLE | u32::from(cpl) << 5);
            self.put_segment(
                SegmentName::Ss,
                Segment {
                    selector,
                    access,
                    ..Segment::default()
                },
            );
            return Ok(());
        }
        let mut segment = self.read_descriptor(selector, Exception::GeneralProtection, 0)?;
        let access = segment.access;
        let writable =
            access.has(AccessRights::S | AccessRights::RW) && access.0 & AccessRights::CODE == 0;
        if selector & 3 != u16::from(cpl) || access.dpl() != cpl || !writable {
            return Err(self.raise_code(Exception::GeneralProtection, error));
        }
        if !access.has(AccessRights::P) {
            return Err(self.raise_code(Exception::StackFault, error));
        }
        self.mark_accessed(selector, &mut segment)?;
        self.put_segment(SegmentName::Ss, segment);
        Ok(())
    }

    /// The linear address of an operand whose effective address is not simply linear: legacy
    /// modes with limits and rights, or 64-bit code with 32-bit addresses.
    #[cold]
    #[inline(never)]
    pub(crate) fn linear_legacy(
        &mut self,
        op: &Op,
        effective: u64,
        size: u64,
        write: bool,
    ) -> Result<u64, Stop> {
        let offset = if op.flags & flag::ADDRESS_16 != 0 {
            effective & 0xffff
        } else if op.flags & flag::ADDRESS_32 != 0 {
            effective & 0xffff_ffff
        } else {
            effective
        };
        self.linear(op.segment, offset, size, write)
    }

    /// The linear address of `size` bytes at `offset` in a segment, after the segment's checks.
    pub(crate) fn linear(
        &mut self,
        segment: u8,
        offset: u64,
        size: u64,
        write: bool,
    ) -> Result<u64, Stop> {
        let base = self.state.segment_bases[segment as usize];
        if self.long64 {
            return Ok(base.wrapping_add(offset));
        }
        self.check_segment(segment, offset, size, write)?;
        Ok(base.wrapping_add(offset) & 0xffff_ffff)
    }

    fn check_segment(
        &mut self,
        index: u8,
        offset: u64,
        size: u64,
        write: bool,
    ) -> Result<(), Stop> {
        let segment = &self.state.segments[usize::from(index).min(5)];
        let access = segment.access;
        let limit = u64::from(segment.limit);
        let last = offset + (size - 1);
        let code = access.has(AccessRights::CODE);
        let expand_down = !code && access.has(AccessRights::EC);
        let allowed = if self.v86() || !self.state.cr0.contains(arch::control_registers::Cr0::PE) {
            access.usable()
        } else if !access.usable() {
            false
        } else if write {
            !code && access.has(AccessRights::RW)
        } else {
            !code || access.has(AccessRights::RW)
        };
        let inside = last <= segment.highest_offset() && (!expand_down || offset > limit);
        if allowed && inside {
            return Ok(());
        }
        let fault = if index == STACK {
            Exception::StackFault
        } else {
            Exception::GeneralProtection
        };
        Err(self.raise_code(fault, 0))
    }

    /// LAR, LSL, VERR, VERW: the descriptor, if the selector is visible from here.
    pub(crate) fn visible_descriptor(&mut self, selector: u16) -> Result<Option<Descriptor>, Stop> {
        if selector & !3 == 0 {
            return Ok(None);
        }
        let Some(address) = self.descriptor_address(selector, 8) else {
            return Ok(None);
        };
        let mut descriptor = Descriptor {
            low: self.read_system(address)?,
            high: 0,
        };
        if self.long_mode && descriptor.is_system() {
            match self.descriptor_address(selector, 16) {
                Some(address) => descriptor.high = self.read_system(address.wrapping_add(8))?,
                None => return Ok(None),
            }
        }
        Ok(Some(descriptor))
    }

    /// Whether a descriptor may be examined at this privilege level.
    pub(crate) fn may_examine(&self, descriptor: &Descriptor, selector: u16) -> bool {
        let access = descriptor.access();
        if access.has(AccessRights::S | AccessRights::CODE | AccessRights::EC) {
            return true;
        }
        self.cpl().max((selector & 3) as u8) <= access.dpl()
    }

    /// LLDT.
    pub(crate) fn load_ldtr(&mut self, selector: u16) -> Result<(), Stop> {
        if selector & !3 == 0 {
            self.state.ldtr = Segment {
                selector,
                ..Segment::UNUSABLE
            };
            return Ok(());
        }
        let error = u32::from(selector & !3);
        if selector & 4 != 0 {
            return Err(self.raise_code(Exception::GeneralProtection, error));
        }
        let descriptor = self.read_system_descriptor(selector, Exception::GeneralProtection)?;
        let access = descriptor.access();
        if !descriptor.is_system() || access.kind() != AccessRights::TYPE_LDT {
            return Err(self.raise_code(Exception::GeneralProtection, error));
        }
        if !access.has(AccessRights::P) {
            return Err(self.raise_code(Exception::SegmentNotPresent, error));
        }
        let ldtr = descriptor.segment(selector);
        self.check_base(&ldtr, error)?;
        self.state.ldtr = ldtr;
        Ok(())
    }

    /// The base that a 16-byte descriptor gives must be canonical.
    fn check_base(&mut self, segment: &Segment, error: u32) -> Result<(), Stop> {
        if self.long_mode && !self.is_canonical(segment.base) {
            return Err(self.raise_code(Exception::GeneralProtection, error));
        }
        Ok(())
    }

    /// LTR.
    pub(crate) fn load_tr(&mut self, selector: u16) -> Result<(), Stop> {
        let error = u32::from(selector & !3);
        if selector & !3 == 0 || selector & 4 != 0 {
            return Err(self.raise_code(Exception::GeneralProtection, error));
        }
        let descriptor = self.read_system_descriptor(selector, Exception::GeneralProtection)?;
        let access = descriptor.access();
        let kind = access.kind();
        let available = kind == AccessRights::TYPE_TSS || kind == 1 && !self.long_mode;
        if !descriptor.is_system() || !available {
            return Err(self.raise_code(Exception::GeneralProtection, error));
        }
        if !access.has(AccessRights::P) {
            return Err(self.raise_code(Exception::SegmentNotPresent, error));
        }
        let mut tr = descriptor.segment(selector);
        // Before the descriptor is made busy.
        self.check_base(&tr, error)?;
        self.set_type_bits(selector, 2)?;
        tr.access.0 |= 2;
        self.state.tr = tr;
        Ok(())
    }

    /// The I/O permission check of IN, OUT, INS and OUTS.
    pub(crate) fn check_io(&mut self, port: u16, size: u8) -> Result<(), Stop> {
        if self.real_mode() {
            return Ok(());
        }
        let iopl = (self.state.rflags_rest >> 12 & 3) as u8;
        if !self.v86() && self.cpl() <= iopl {
            return Ok(());
        }
        let tr = self.state.tr;
        // 16-bit TSSs have no bitmap.
        if tr.access.kind() & 8 == 0 || tr.limit < 103 {
            return Err(self.general_protection());
        }
        let map: u16 = self.read_system(tr.base.wrapping_add(102))?;
        let at = u64::from(map) + u64::from(port / 8);
        if at + 1 > tr.limit.into() {
            return Err(self.general_protection());
        }
        let bits: u16 = self.read_system(tr.base.wrapping_add(at))?;
        let mask = ((1u16 << size) - 1) << (port % 8);
        if bits & mask != 0 {
            return Err(self.general_protection());
        }
        Ok(())
    }

    /// Reads for an instruction that is checked against data rights, as a convenience for the
    /// far-pointer and table instructions.
    pub(crate) fn read_operand_bytes(
        &mut self,
        op: &Op,
        offset: u64,
        bytes: &mut [u8],
    ) -> Result<(), Stop> {
        let gva = self.address_at(op, offset, bytes.len() as u64, false)?;
        self.read_bytes(gva, op.segment, bytes)
    }

    /// Whether a fetch of `len` bytes at RIP passes the code segment's limit.
    pub(crate) fn check_code_limit(&mut self, rip: u64, len: u64) -> Result<(), Stop> {
        if self.long64 {
            return Ok(());
        }
        let cs = &self.state.segments[SegmentName::Cs as usize];
        if rip + len.saturating_sub(1) > cs.limit.into() {
            return Err(self.general_protection());
        }
        Ok(())
    }
}

const _: () = assert!(STACK == SegmentName::Ss as u8 && DATA == SegmentName::Ds as u8);
