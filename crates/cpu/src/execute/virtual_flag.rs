//! The virtual interrupt flag: what CLI, STI, PUSHF, POPF, IRET and INT n do instead of #GP where
//! IOPL keeps them from RFLAGS.IF.
//!
//! With CR4.VME in virtual-8086 mode the instructions act on VIF, and INT n goes to the 8086
//! program's own handler unless the TSS says otherwise. With CR4.PVI, CLI and STI do so at CPL 3.
//! VIP is how a monitor says that an interrupt waits: setting VIF is then #GP, for the monitor to
//! deliver it.
//!
//! Source: SDM volume 3, "Interrupt and Exception Handling in Virtual-8086 Mode" and
//! "Protected-Mode Virtual Interrupts".

use crate::event::Event;
use crate::op::Stop;
use crate::vcpu::Vcpu;
use arch::control_registers::{Cr4, Rflags};
use arch::segment::SegmentName;

/// Offset of the I/O map base in a 32-bit TSS; the redirection bitmap lies below the I/O map.
const IO_MAP_BASE: u64 = 102;
const REDIRECTION_BYTES: u64 = 32;

const IOPL: u64 = Rflags::IOPL0.union(Rflags::IOPL1).bits();
const IF: u64 = Rflags::IF.bits();
const VIF: u64 = Rflags::VIF.bits();

impl Vcpu {
    fn iopl(&self) -> u8 {
        Rflags::from_bits_retain(self.state.rflags_rest).iopl()
    }

    /// Whether IOPL keeps a virtual-8086 program from the interrupt flag.
    fn is_kept_from_flag(&self) -> bool {
        self.v86() && self.iopl() < 3
    }

    /// Whether CLI and STI act on VIF.
    pub(super) fn masks_virtually(&self) -> bool {
        let extension = if self.v86() { Cr4::VME } else { Cr4::PVI };
        self.state.cr0.contains(arch::control_registers::Cr0::PE)
            && self.cpl() == 3
            && self.iopl() < 3
            && self.state.cr4.contains(extension)
    }

    /// CLI and STI on VIF.
    pub(super) fn set_virtual_flag(&mut self, enable: bool) -> Result<(), Stop> {
        if !enable {
            self.state.rflags_rest &= !VIF;
            return Ok(());
        }
        if self.state.rflags_rest & Rflags::VIP.bits() != 0 {
            return Err(self.general_protection());
        }
        self.state.rflags_rest |= VIF;
        Ok(())
    }

    /// For PUSHF, POPF and IRET with an operand of `size` bytes: whether the image of the flags
    /// shows VIF in the place of IF. #GP where the program may not execute them at all.
    pub(super) fn flags_image_is_virtual(&mut self, size: u8) -> Result<bool, Stop> {
        if !self.is_kept_from_flag() {
            return Ok(false);
        }
        if size == 2 && self.state.cr4.contains(Cr4::VME) {
            return Ok(true);
        }
        Err(self.general_protection())
    }

    /// The flags as the program sees them: IOPL 3, and VIF for IF.
    pub(super) fn virtual_flags_image(&self) -> u64 {
        let flags = self.state.rflags();
        let shown = if flags & VIF != 0 { IF } else { 0 };
        flags & !IF | shown | IOPL
    }

    /// RFLAGS after POPF or IRET with a virtual image; the fault where it sets TF, or VIF while an
    /// interrupt waits.
    pub(super) fn flags_from_virtual_image(&mut self, image: u64) -> Result<u64, Stop> {
        let flags = self.state.rflags();
        let waits = flags & Rflags::VIP.bits() != 0;
        if image & Rflags::TF.bits() != 0 || waits && image & IF != 0 {
            return Err(self.general_protection());
        }
        let mask = (Rflags::STATUS | Rflags::TF | Rflags::DF | Rflags::NT).bits();
        let virtual_flag = if image & IF != 0 { VIF } else { 0 };
        Ok(flags & !(mask | VIF | Rflags::RF.bits()) | image & mask | virtual_flag)
    }

    /// Whether INT n of `vector` goes to the 8086 program's handler: with VME, where the bit in
    /// the TSS is clear.
    fn redirects(&mut self, vector: u8) -> Result<bool, Stop> {
        if !self.v86() || !self.state.cr4.contains(Cr4::VME) {
            return Ok(false);
        }
        let tr = self.state.tr;
        let limit = u64::from(tr.limit);
        if limit < IO_MAP_BASE + 1 {
            return Err(self.general_protection());
        }
        let io_map: u16 = self.read_system(tr.base.wrapping_add(IO_MAP_BASE))?;
        let offset = u64::from(io_map)
            .wrapping_sub(REDIRECTION_BYTES)
            .wrapping_add(u64::from(vector / 8));
        if offset > limit {
            return Err(self.general_protection());
        }
        let byte: u8 = self.read_system(tr.base.wrapping_add(offset))?;
        Ok(byte >> (vector % 8) & 1 == 0)
    }

    /// Before INT n: #GP where IOPL forbids it and it is not redirected.
    pub(super) fn check_software_interrupt(&mut self, vector: u8) -> Result<(), Stop> {
        if self.is_kept_from_flag() && !self.redirects(vector)? {
            return Err(self.general_protection());
        }
        Ok(())
    }

    /// Delivers INT n to the 8086 program's handler through the table at linear address 0, if it
    /// is redirected; returns whether.
    pub(crate) fn deliver_redirected(&mut self, event: &Event) -> Result<bool, Stop> {
        if !self.redirects(event.vector)? {
            return Ok(false);
        }
        let kept = self.is_kept_from_flag();
        let flags = if kept {
            self.virtual_flags_image()
        } else {
            self.state.rflags()
        };
        let entry: u32 = self.read_system(u64::from(event.vector) * 4)?;
        let cs = self.state.segments[SegmentName::Cs as usize].selector;
        let next = self.state.rip.wrapping_add(event.length.into());
        let before = self.state.regs[4];
        for value in [flags, cs.into(), next] {
            if let Err(stop) = self.push_sized(value, 2) {
                self.state.regs[4] = before;
                return Err(stop);
            }
        }
        let selector = (entry >> 16) as u16;
        let cs = &mut self.state.segments[SegmentName::Cs as usize];
        cs.selector = selector;
        cs.base = u64::from(selector) << 4;
        self.state.rip = u64::from(entry as u16);
        let own = if kept { Rflags::VIF } else { Rflags::IF };
        self.clear_flags(own | Rflags::TF | Rflags::RF);
        Ok(true)
    }
}
