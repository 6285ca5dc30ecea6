//! Hardware task switches, which VT-x leaves to the hypervisor.
//!
//! Until the new task's registers are loaded a fault belongs to the old task, whose registers are
//! still untouched; from then on it belongs to the new one.
//!
//! Source: SDM volume 3, "Task Management" and "Treatment of Task Switches".

use super::{Outcome, linear_error};
use crate::events::{self, PendingException};
use crate::guest_walk::LinearError;
use crate::vcpu::{Core, Vcpu};
use arch::control_registers::{Cr0, Dr6, Dr7, Rflags};
use arch::controls::Interruptibility;
use arch::exception::Exception;
use arch::exit::{TaskSwitchSource, VmExit, task_switch_from_qualification};
use arch::interruption::InterruptionType;
use arch::segment::{AccessRights, Segment, SegmentName};
use cpu::Gpr;

/// Bit of a TSS descriptor's type, in the upper half of the descriptor: busy.
const BUSY: u32 = 1 << 9;
/// Bit of a code or data descriptor's type, in the upper half of the descriptor: accessed.
const ACCESSED: u32 = 1 << 8;
/// Selector bit: the descriptor is in the LDT.
const TABLE_LOCAL: u16 = 4;

/// Why a task switch did not come to its end is why memory was not accessed, or an exception.
type Result<T> = std::result::Result<T, LinearError>;

/// An exception about a selector (or, with 0, about none).
fn fault<T>(exception: Exception, selector: u16, external: bool) -> Result<T> {
    Err(LinearError::Fault(PendingException {
        vector: exception.vector(),
        error_code: Some((selector & !3) as u32 | external as u32),
        payload: None,
    }))
}

/// The two formats of a TSS.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Format {
    /// Bytes of a register.
    width: usize,
    /// Where the registers that a switch saves begin and end: from the instruction pointer to the
    /// last segment register.
    saved: (usize, usize),
    /// Where the LDT selector is.
    ldt: usize,
    /// Bytes of the least TSS.
    size: usize,
    /// Segment registers.
    segments: usize,
}

impl Format {
    const BITS16: Format = Format {
        width: 2,
        saved: (14, 42),
        ldt: 42,
        size: 44,
        segments: 4,
    };
    const BITS32: Format = Format {
        width: 4,
        saved: (32, 96),
        ldt: 96,
        size: 104,
        segments: 6,
    };
    /// CR3 in a 32-bit TSS.
    const CR3: usize = 28;
    /// The word whose lowest bit traps, in a 32-bit TSS.
    const TRAP: usize = 100;

    fn of(access: AccessRights) -> Format {
        if access.kind() & 8 != 0 {
            Format::BITS32
        } else {
            Format::BITS16
        }
    }

    fn is_wide(self) -> bool {
        self.width == 4
    }
}

/// The registers that a TSS holds.
struct Registers {
    ip: u32,
    flags: u32,
    general: [u32; 8],
    segments: [u16; 6],
}

impl Registers {
    fn to_bytes(&self, format: Format) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(64);
        let words = [self.ip, self.flags].into_iter().chain(self.general);
        let segments = self.segments[..format.segments].iter().map(|&s| s as u32);
        for word in words.chain(segments) {
            bytes.extend_from_slice(&word.to_le_bytes()[..format.width]);
        }
        bytes
    }

    fn from_bytes(bytes: &[u8], format: Format) -> Registers {
        let mut words = bytes.chunks_exact(format.width).map(|chunk| {
            let mut word = [0; 4];
            word[..format.width].copy_from_slice(chunk);
            u32::from_le_bytes(word)
        });
        let mut next = || words.next().unwrap_or(0);
        Registers {
            ip: next(),
            flags: next(),
            general: std::array::from_fn(|_| next()),
            segments: std::array::from_fn(|_| next() as u16),
        }
    }
}

/// A descriptor in a table.
#[derive(Clone, Copy)]
struct Descriptor {
    address: u64,
    low: u32,
    high: u32,
}

impl Descriptor {
    fn access(&self) -> AccessRights {
        AccessRights::from_descriptor_high(self.high)
    }

    fn segment(&self, selector: u16) -> Segment {
        let descriptor = u64::from(self.low) | u64::from(self.high) << 32;
        Segment::from_descriptor(descriptor, selector)
    }
}

/// A task switch under way.
struct Switch<'a> {
    core: &'a mut Core,
    vcpu: &'a Vcpu,
    source: TaskSwitchSource,
    /// The event that goes through a task gate was not made by an instruction: error codes say so.
    external: bool,
    /// Instruction pointer and flags that the old task resumes with.
    resume: (u32, u32),
    error_code: Option<u32>,
    /// The new task's registers are loaded.
    committed: bool,
}

pub(super) fn task_switch(core: &mut Core, vcpu: &Vcpu, exit: &VmExit) -> Outcome {
    let (source, selector) = task_switch_from_qualification(exit.qualification);
    let event = exit.idt_vectoring_info;
    let by_instruction = !event.is_valid() || event.is_software();
    let state = &core.cpu.state;
    let length = if by_instruction {
        exit.instruction_length
    } else {
        0
    };
    let mut flags = state.rflags() as u32;
    let restarts = event.is_valid()
        && event.kind() == InterruptionType::HardwareException
        && events::is_fault(event.vector());
    if restarts {
        flags |= Rflags::RF.bits() as u32;
    }
    let error_code =
        (event.is_valid() && event.has_error_code()).then_some(exit.idt_vectoring_error_code);
    let mut switch = Switch {
        source,
        external: !by_instruction,
        resume: ((state.rip as u32).wrapping_add(length), flags),
        error_code,
        committed: false,
        core,
        vcpu,
    };
    let result = switch.perform(selector);
    let committed = switch.committed;
    if event.is_valid() {
        let kind = event.kind();
        if committed || kind != InterruptionType::HardwareException {
            // Delivered, or lost to the fault; only exceptions combine into double faults.
            core.events.again = None;
        }
        if kind == InterruptionType::Nmi {
            core.cpu.state.interruptibility |= Interruptibility::NMI;
        }
    }
    core.look_for_events = true;
    match result {
        Ok(()) => {
            if core.debug.single_step() {
                core.debug.stepped = true;
            }
            Outcome::Resume
        }
        Err(error) => linear_error(core, vcpu, error),
    }
}

impl Switch<'_> {
    fn read<const N: usize>(&self, address: u64) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.core
            .read_system(self.vcpu, address & 0xffff_ffff, &mut bytes)?;
        Ok(bytes)
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Result<()> {
        self.core
            .write_system(self.vcpu, address & 0xffff_ffff, bytes)
    }

    /// The descriptor that a selector names, `None` if it lies outside its table.
    fn descriptor(&self, selector: u16) -> Result<Option<Descriptor>> {
        let state = &self.core.cpu.state;
        let (base, limit) = if selector & TABLE_LOCAL == 0 {
            (state.gdtr.base, state.gdtr.limit as u32)
        } else if state.ldtr.access.usable() {
            (state.ldtr.base, state.ldtr.limit)
        } else {
            return Ok(None);
        };
        let offset = (selector & !7) as u32;
        if offset + 7 > limit {
            return Ok(None);
        }
        let address = base.wrapping_add(offset as u64);
        let bytes: [u8; 8] = self.read(address)?;
        let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|i| bytes[at + i]));
        Ok(Some(Descriptor {
            address,
            low: word(0),
            high: word(4),
        }))
    }

    fn set_high(&self, descriptor: &Descriptor, high: u32) -> Result<()> {
        self.write(descriptor.address.wrapping_add(4), &high.to_le_bytes())
    }

    /// The new task's TSS descriptor, if it is one that this switch may use.
    fn new_tss(&self, selector: u16) -> Result<Descriptor> {
        let returns = self.source == TaskSwitchSource::Iret;
        let wrong = if returns {
            Exception::InvalidTss
        } else {
            Exception::GeneralProtection
        };
        if selector & !3 == 0 || selector & TABLE_LOCAL != 0 {
            return fault(wrong, selector, self.external);
        }
        let Some(descriptor) = self.descriptor(selector)? else {
            return fault(wrong, selector, self.external);
        };
        let access = descriptor.access();
        // A return goes to a task that is busy, any other switch to one that is not.
        let kinds = if returns { [3, 11] } else { [1, 9] };
        if access.has(AccessRights::S) || !kinds.contains(&access.kind()) {
            return fault(wrong, selector, self.external);
        }
        if !access.has(AccessRights::P) {
            return fault(Exception::SegmentNotPresent, selector, self.external);
        }
        if (descriptor.segment(selector).limit as usize) < Format::of(access).size - 1 {
            return fault(Exception::InvalidTss, selector, self.external);
        }
        Ok(descriptor)
    }

    fn perform(&mut self, selector: u16) -> Result<()> {
        use TaskSwitchSource::{Call, Idt, Iret, Jmp};
        let new = self.new_tss(selector)?;
        let old = self.core.cpu.state.tr;
        let old_format = Format::of(old.access);
        if (old.limit as usize) < old_format.saved.1 - 1 {
            return fault(Exception::InvalidTss, old.selector, self.external);
        }
        let format = Format::of(new.access());
        let mut tss = new.segment(selector);
        let nests = matches!(self.source, Call | Idt);

        // Everything that can fault on behalf of the old task comes before the first change.
        let old_descriptor = match self.source {
            Jmp | Iret => self.descriptor(old.selector)?,
            Call | Idt => None,
        };
        let image: Vec<u8> = {
            let mut bytes = vec![0; format.size];
            self.core
                .read_system(self.vcpu, tss.base & 0xffff_ffff, &mut bytes)?;
            bytes
        };
        let probe = |address: u64, length: usize| {
            self.core
                .probe_write_system(self.vcpu, address & 0xffff_ffff, length)
        };
        let (saved, saved_end) = old_format.saved;
        let saved_at = old.base.wrapping_add(saved as u64);
        probe(saved_at, saved_end - saved)?;
        probe(new.address.wrapping_add(4), 4)?;
        if let Some(descriptor) = &old_descriptor {
            probe(descriptor.address.wrapping_add(4), 4)?;
        }
        if nests {
            probe(tss.base, 2)?;
        }

        if let Some(descriptor) = &old_descriptor {
            self.set_high(descriptor, descriptor.high & !BUSY)?;
        }
        let mut registers = self.registers();
        if self.source == Iret {
            registers.flags &= !(Rflags::NT.bits() as u32);
        }
        self.write(saved_at, &registers.to_bytes(old_format))?;
        if nests {
            self.write(tss.base, &old.selector.to_le_bytes())?;
        }
        if self.source != Iret {
            self.set_high(&new, new.high | BUSY)?;
        }
        tss.access.0 |= 2;
        self.commit(tss, format, &image, nests);
        self.load_segments(&image, format)?;
        self.finish(&image, format)
    }

    /// The old task's registers.
    fn registers(&self) -> Registers {
        let state = &self.core.cpu.state;
        Registers {
            ip: self.resume.0,
            flags: self.resume.1,
            general: std::array::from_fn(|i| state.gpr(Gpr::ALL[i]) as u32),
            segments: SegmentName::ALL.map(|name| state.segments[name as usize].selector),
        }
    }

    /// Loads what cannot fault. Segment registers get their selectors only.
    fn commit(&mut self, tss: Segment, format: Format, image: &[u8], nests: bool) {
        let new = Registers::from_bytes(&image[format.saved.0..], format);
        let state = &mut self.core.cpu.state;
        state.tr = tss;
        state.cr0 |= Cr0::TS;
        let pages = format.is_wide() && state.cr0.contains(Cr0::PG);
        if pages {
            let mut cr3 = [0; 4];
            cr3.copy_from_slice(&image[Format::CR3..Format::CR3 + 4]);
            state.cr3 = u32::from_le_bytes(cr3) as u64;
        }
        let mut flags = new.flags as u64 & 0x3f_7fd7;
        if nests {
            flags |= Rflags::NT.bits();
        }
        state.set_rflags(flags);
        state.rip = new.ip as u64;
        for (register, value) in Gpr::ALL.into_iter().zip(new.general) {
            state.set_gpr(register, value as u64);
        }
        for (name, selector) in SegmentName::ALL
            .into_iter()
            .zip(new.segments)
            .take(format.segments)
        {
            state.segments[name as usize].selector = selector;
        }
        state.ldtr = Segment {
            selector: u16::from_le_bytes([image[format.ldt], image[format.ldt + 1]]),
            ..Segment::UNUSABLE
        };
        state.interruptibility -= Interruptibility::STI | Interruptibility::MOV_SS;
        const LOCAL_ENABLES: u64 = 0x55;
        let dr7 = state.dr7.bits() & !(LOCAL_ENABLES | Dr7::LE.bits());
        state.dr7 = Dr7::from_bits_retain(dr7);
        if pages {
            self.core.load_pdptes(self.vcpu);
            self.core.flush_guest_translations(self.vcpu);
        }
        self.committed = true;
    }

    fn load_segments(&mut self, image: &[u8], format: Format) -> Result<()> {
        let new = Registers::from_bytes(&image[format.saved.0..], format);
        self.load_ldt()?;
        if new.flags as u64 & Rflags::VM.bits() != 0 {
            for (name, selector) in SegmentName::ALL.into_iter().zip(new.segments) {
                self.core.cpu.state.segments[name as usize] = Segment {
                    access: AccessRights(0xf3),
                    ..Segment::real_mode(selector, false)
                };
            }
            return Ok(());
        }
        let [es, cs, ss, ds, fs, gs] = new.segments;
        // All rights are those of the new task's privilege level.
        let level = (cs & 3) as u8;
        self.load_code(cs)?;
        self.load_stack(ss, level)?;
        let data = [
            (SegmentName::Es, es),
            (SegmentName::Ds, ds),
            (SegmentName::Fs, fs),
            (SegmentName::Gs, gs),
        ];
        let count = if format.is_wide() { 4 } else { 2 };
        for (name, selector) in data.into_iter().take(count) {
            self.load_data(name, selector, level)?;
        }
        Ok(())
    }

    fn load_ldt(&mut self) -> Result<()> {
        let selector = self.core.cpu.state.ldtr.selector;
        if selector & !3 == 0 {
            return Ok(());
        }
        let found = if selector & TABLE_LOCAL == 0 {
            self.descriptor(selector)?
        } else {
            None
        };
        let is_ldt = |d: &Descriptor| {
            let access = d.access();
            !access.has(AccessRights::S)
                && access.kind() == AccessRights::TYPE_LDT
                && access.has(AccessRights::P)
        };
        match found.filter(is_ldt) {
            Some(descriptor) => {
                self.core.cpu.state.ldtr = descriptor.segment(selector);
                Ok(())
            }
            None => fault(Exception::InvalidTss, selector, self.external),
        }
    }

    /// A code or data descriptor for which `allowed` holds.
    fn find(
        &self,
        selector: u16,
        absent: Exception,
        allowed: impl Fn(AccessRights) -> bool,
    ) -> Result<Segment> {
        let Some(descriptor) = self.descriptor(selector)? else {
            return fault(Exception::InvalidTss, selector, self.external);
        };
        let access = descriptor.access();
        if !access.has(AccessRights::S) || !allowed(access) {
            return fault(Exception::InvalidTss, selector, self.external);
        }
        if !access.has(AccessRights::P) {
            return fault(absent, selector, self.external);
        }
        if !access.has(AccessRights::ACCESSED) {
            self.set_high(&descriptor, descriptor.high | ACCESSED)?;
        }
        let mut segment = descriptor.segment(selector);
        segment.access.0 |= AccessRights::ACCESSED;
        Ok(segment)
    }

    fn load_code(&mut self, selector: u16) -> Result<()> {
        let level = (selector & 3) as u8;
        if selector & !3 == 0 {
            return fault(Exception::InvalidTss, selector, self.external);
        }
        let segment = self.find(selector, Exception::SegmentNotPresent, |access| {
            let privilege = if access.has(AccessRights::EC) {
                access.dpl() <= level
            } else {
                access.dpl() == level
            };
            access.has(AccessRights::CODE) && privilege
        })?;
        self.core.cpu.state.segments[SegmentName::Cs as usize] = segment;
        Ok(())
    }

    fn load_stack(&mut self, selector: u16, level: u8) -> Result<()> {
        if selector & !3 == 0 || (selector & 3) as u8 != level {
            return fault(Exception::InvalidTss, selector, self.external);
        }
        let segment = self.find(selector, Exception::StackFault, |access| {
            !access.has(AccessRights::CODE) && access.has(AccessRights::RW) && access.dpl() == level
        })?;
        self.core.cpu.state.segments[SegmentName::Ss as usize] = segment;
        Ok(())
    }

    fn load_data(&mut self, name: SegmentName, selector: u16, level: u8) -> Result<()> {
        let segment = if selector & !3 == 0 {
            Segment {
                selector,
                ..Segment::UNUSABLE
            }
        } else {
            let requested = (selector & 3) as u8;
            self.find(selector, Exception::SegmentNotPresent, |access| {
                let code = access.has(AccessRights::CODE);
                let readable = !code || access.has(AccessRights::RW);
                let conforming = code && access.has(AccessRights::EC);
                readable && (conforming || access.dpl() >= level.max(requested))
            })?
        };
        self.core.cpu.state.segments[name as usize] = segment;
        Ok(())
    }

    /// The error code on the new stack, the trap flag, the instruction pointer's limit.
    fn finish(&mut self, image: &[u8], format: Format) -> Result<()> {
        if let Some(error_code) = self.error_code {
            self.push(error_code, format.width)?;
        }
        let state = &self.core.cpu.state;
        let code = &state.segments[SegmentName::Cs as usize];
        if state.rip > code.limit as u64 {
            return fault(Exception::GeneralProtection, 0, self.external);
        }
        if format.is_wide() && image[Format::TRAP] & 1 != 0 {
            return Err(LinearError::Fault(PendingException {
                vector: Exception::Debug.vector(),
                error_code: None,
                payload: Some(Dr6::BT.bits()),
            }));
        }
        Ok(())
    }

    fn push(&mut self, value: u32, width: usize) -> Result<()> {
        let state = &self.core.cpu.state;
        let stack = state.segments[SegmentName::Ss as usize];
        let wide = stack.access.has(AccessRights::DB);
        let mask = if wide { 0xffff_ffff } else { 0xffff };
        let esp = state.gpr(Gpr::Rsp);
        let sp = (esp & mask).wrapping_sub(width as u64) & mask;
        let last = sp + width as u64 - 1;
        let limit = stack.limit as u64;
        let v86 = state.rflags() & Rflags::VM.bits() != 0;
        let fits = if stack.access.has(AccessRights::EC) && !v86 {
            sp > limit && last <= mask
        } else {
            last <= limit
        };
        if !fits {
            return fault(Exception::StackFault, 0, self.external);
        }
        let address = stack.base.wrapping_add(sp) & 0xffff_ffff;
        let bytes = &value.to_le_bytes()[..width];
        self.core.write_linear(self.vcpu, address, bytes)?;
        let esp = esp & !mask & 0xffff_ffff | sp;
        self.core.cpu.state.set_gpr(Gpr::Rsp, esp);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_agree_with_the_manual() {
        let registers = Registers {
            ip: 1,
            flags: 2,
            general: [3, 4, 5, 6, 7, 8, 9, 10],
            segments: [11, 12, 13, 14, 15, 16],
        };
        for (format, esp, cs) in [(Format::BITS16, 26, 36), (Format::BITS32, 56, 76)] {
            let bytes = registers.to_bytes(format);
            assert_eq!(bytes.len(), format.saved.1 - format.saved.0);
            assert_eq!(bytes[esp - format.saved.0], 7);
            assert_eq!(bytes[cs - format.saved.0], 12);
            let back = Registers::from_bytes(&bytes, format);
            assert_eq!((back.ip, back.general[7], back.segments[3]), (1, 10, 14));
        }
    }
}
