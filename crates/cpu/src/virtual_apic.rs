//! APIC virtualization and virtual interrupts.
//!
//! The guest's local APIC is a page of memory, the *virtual-APIC page*. What reaches it, and what
//! exits instead, the controls decide:
//!
//! ```text
//!  MOV CR8 ───────────────┐
//!  access to the APIC-access page ─┬─▶ virtual-APIC page ─▶ TPR, EOI, self-IPI virtualization
//!  RDMSR, WRMSR 800H–8FFH ┘        └─▶ exit: APIC access        │            └─▶ exit: APIC write,
//!                                                               ▼                 EOI, TPR threshold
//!                                   evaluation: RVI above the processor priority?
//!                                                               ▼
//!                                   delivery through the IDT when RFLAGS.IF lets it in
//! ```
//!
//! A store to the APIC-access page takes effect on the page at once and on the interrupts after
//! its instruction. The instruction is therefore executed alone: met in the middle of a block, the
//! store stops it ([`Cause::Alone`]) and the loop executes it again as a single step.
//!
//! Source: SDM volume 3, chapter "APIC Virtualization and Virtual Interrupts".

use crate::event::Event;
use crate::host::HostInt;
use crate::op::Stop;
use crate::vcpu::{Cause, Vcpu};
use arch::apic::{
    AccessType, InterruptStatus, PageControls, access_qualification, offset_of_msr, reg,
    self_ipi_vector, vector_position,
};
use arch::control_registers::Rflags;
use arch::controls::{Activity, Interruptibility, PinControls, PrimaryControls, SecondaryControls};
use arch::exit::{ExitReason, VmExit};
use arch::interruption::InterruptionType;

/// Offset of the outstanding-notification bit in a posted-interrupt descriptor.
const OUTSTANDING_NOTIFICATION: u64 = 32;

/// What an access to the APIC-access page does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    Read,
    Write,
}

/// An exit after the current instruction.
fn trap(reason: ExitReason, qualification: u64) -> Option<VmExit> {
    let mut exit = VmExit::new(reason);
    exit.qualification = qualification;
    Some(exit)
}

impl Vcpu {
    /// Reads a register of the virtual-APIC page. Memory that is not there reads as ones.
    fn virtual_register(&self, offset: u32) -> u32 {
        let at = self.controls().virtual_apic + u64::from(offset & 0xffc);
        // SAFETY: the address comes from the controls, whose owner gives that page to the guest's
        // APIC; a wrong one faults and is caught.
        unsafe { u32::load(at) }.unwrap_or(u32::MAX)
    }

    fn set_virtual_register(&self, offset: u32, value: u32) {
        let at = self.controls().virtual_apic + u64::from(offset & 0xffc);
        // SAFETY: as in `virtual_register`. A page that is not there takes no writes.
        let _ = unsafe { u32::store(at, value) };
    }

    /// Sets or clears the bit of `vector` in the 256-bit register at `base`.
    fn mark_vector(&self, base: u32, vector: u8, set: bool) {
        let (offset, bit) = vector_position(base, vector);
        let old = self.virtual_register(offset);
        let new = if set {
            old | 1 << bit
        } else {
            old & !(1 << bit)
        };
        self.set_virtual_register(offset, new);
    }

    /// The highest vector set in the 256-bit register at `base`, or 0.
    fn highest_vector(&self, base: u32) -> u8 {
        (0..8u8)
            .rev()
            .find_map(|word| {
                let bits = self.virtual_register(base + 16 * u32::from(word));
                bits.checked_ilog2().map(|bit| 32 * word + bit as u8)
            })
            .unwrap_or(0)
    }

    fn delivers_virtual_interrupts(&self) -> bool {
        self.secondary(SecondaryControls::VIRTUAL_INTERRUPT_DELIVERY)
    }

    fn page_controls(&self) -> PageControls {
        PageControls {
            tpr_shadow: self.primary(PrimaryControls::TPR_SHADOW),
            registers: self.secondary(SecondaryControls::APIC_REGISTER_VIRTUALIZATION),
            delivery: self.delivers_virtual_interrupts(),
        }
    }

    /// After an entry: the exit that the TPR threshold demands at once, or the first look for a
    /// virtual interrupt.
    pub(crate) fn begin_virtual_apic(&mut self) -> Option<VmExit> {
        self.has_virtual_interrupt = false;
        if !self.primary(PrimaryControls::TPR_SHADOW) {
            return None;
        }
        if self.delivers_virtual_interrupts() {
            self.virtualize_processor_priority();
            self.evaluate_virtual_interrupts();
            return None;
        }
        if self.secondary(SecondaryControls::VIRTUALIZE_APIC_ACCESSES) {
            return self.tpr_threshold_exit();
        }
        None
    }

    /// The virtual task priority as CR8 has it.
    pub(crate) fn virtual_task_priority(&self) -> u64 {
        u64::from(self.virtual_register(reg::TPR) >> 4 & 0xf)
    }

    /// MOV to CR8 with a TPR shadow; the exit that follows the instruction.
    pub(crate) fn set_virtual_task_priority(&mut self, cr8: u64) -> Option<VmExit> {
        self.set_virtual_register(reg::TPR, (cr8 as u32 & 0xf) << 4);
        self.virtualize_task_priority()
    }

    fn tpr_threshold_exit(&self) -> Option<VmExit> {
        let threshold = u64::from(self.controls().tpr_threshold & 0xf);
        if self.virtual_task_priority() < threshold {
            return trap(ExitReason::TprBelowThreshold, 0);
        }
        None
    }

    /// TPR virtualization.
    fn virtualize_task_priority(&mut self) -> Option<VmExit> {
        if !self.delivers_virtual_interrupts() {
            return self.tpr_threshold_exit();
        }
        self.virtualize_processor_priority();
        self.evaluate_virtual_interrupts();
        None
    }

    /// PPR virtualization.
    fn virtualize_processor_priority(&mut self) {
        let task = self.virtual_register(reg::TPR) & 0xff;
        let servicing = u32::from(self.state.interrupt_status.servicing());
        let priority = if task >> 4 >= servicing >> 4 {
            task
        } else {
            servicing & 0xf0
        };
        self.set_virtual_register(reg::PPR, priority);
    }

    /// EOI virtualization.
    fn virtualize_eoi(&mut self) -> Option<VmExit> {
        let status = self.state.interrupt_status;
        let vector = status.servicing();
        self.mark_vector(reg::ISR, vector, false);
        let next = self.highest_vector(reg::ISR);
        self.state.interrupt_status = InterruptStatus::new(status.requesting(), next);
        self.virtualize_processor_priority();
        let bitmap = self.controls().eoi_exit_bitmap;
        if bitmap[usize::from(vector / 64)] >> (vector % 64) & 1 != 0 {
            return trap(ExitReason::VirtualizedEoi, vector.into());
        }
        self.evaluate_virtual_interrupts();
        None
    }

    /// Self-IPI virtualization.
    fn virtualize_self_ipi(&mut self, vector: u8) {
        self.mark_vector(reg::IRR, vector, true);
        self.request_virtual_interrupt(vector);
    }

    /// Raises RVI to `vector` and evaluates.
    fn request_virtual_interrupt(&mut self, vector: u8) {
        let status = self.state.interrupt_status;
        let requesting = status.requesting().max(vector);
        self.state.interrupt_status = InterruptStatus::new(requesting, status.servicing());
        self.evaluate_virtual_interrupts();
    }

    /// Evaluation of pending virtual interrupts.
    fn evaluate_virtual_interrupts(&mut self) {
        let requesting = u32::from(self.state.interrupt_status.requesting());
        let priority = self.virtual_register(reg::PPR) & 0xff;
        self.has_virtual_interrupt = !self.primary(PrimaryControls::INTERRUPT_WINDOW_EXITING)
            && requesting >> 4 > priority >> 4;
        if self.has_virtual_interrupt {
            self.request_own();
        }
    }

    /// Virtual-interrupt delivery, if an interrupt is recognized and may be taken at this
    /// boundary; returns whether. Wakes a halted processor.
    pub(crate) fn deliver_virtual_interrupt(&mut self) -> Result<bool, VmExit> {
        let shadow = Interruptibility::STI | Interruptibility::MOV_SS;
        let open = self.state.rflags_rest & Rflags::IF.bits() != 0
            && !self.state.interruptibility.intersects(shadow)
            && matches!(self.state.activity, Activity::Active | Activity::Halt);
        if !self.has_virtual_interrupt || !open {
            return Ok(false);
        }
        let vector = self.state.interrupt_status.requesting();
        self.mark_vector(reg::ISR, vector, true);
        self.set_virtual_register(reg::PPR, u32::from(vector) & 0xf0);
        self.mark_vector(reg::IRR, vector, false);
        let next = self.highest_vector(reg::IRR);
        self.state.interrupt_status = InterruptStatus::new(next, vector);
        self.has_virtual_interrupt = false;
        self.state.activity = Activity::Active;
        let event = Event {
            vector,
            kind: InterruptionType::ExternalInterrupt,
            error_code: None,
            length: 0,
        };
        self.take_event(event).map(|()| true)
    }

    /// A notification arrived: posted-interrupt processing, or the exit that any other external
    /// interrupt causes.
    pub(crate) fn take_notification(&mut self) -> Option<VmExit> {
        if !self.controls().pin.contains(PinControls::POSTED_INTERRUPTS) {
            return Some(VmExit::new(ExitReason::ExternalInterrupt));
        }
        let descriptor = self.controls().posted_interrupts;
        let take = |at: u64, keep: u64| {
            let mut old = 0;
            loop {
                // SAFETY: the address comes from the controls, whose owner shares the descriptor
                // with those who post; it is accessed atomically on both sides.
                match unsafe { u64::compare_exchange(at, old, old & keep) } {
                    Ok(found) if found == old => return old,
                    Ok(found) => old = found,
                    Err(_) => return 0,
                }
            }
        };
        take(descriptor + OUTSTANDING_NOTIFICATION, !1);
        let mut highest = 0;
        for word in 0..4u8 {
            let posted = take(descriptor + 8 * u64::from(word), 0);
            for bit in (0..64u8).filter(|bit| posted >> bit & 1 != 0) {
                highest = 64 * word + bit;
                self.mark_vector(reg::IRR, highest, true);
            }
        }
        self.request_virtual_interrupt(highest);
        None
    }

    /// The exit for an access to the APIC-access page that is not virtualized.
    #[cold]
    pub(crate) fn apic_access_exit(&mut self, kind: AccessType, offset: u32) -> Stop {
        let kind = match kind {
            AccessType::Read | AccessType::Write if self.vectoring.is_some() => {
                AccessType::Delivery
            }
            AccessType::Physical if self.vectoring.is_some() => AccessType::PhysicalDelivery,
            other => other,
        };
        let mut exit = VmExit::new(ExitReason::ApicAccess);
        exit.qualification = access_qualification(kind, offset);
        self.stop_with(Cause::Exit(exit))
    }

    /// Stops an access that is not virtualized, and an instruction that must be executed alone
    /// for one that is. `offset` is that in the page.
    fn check_apic_access(
        &mut self,
        direction: Direction,
        offset: u32,
        size: usize,
    ) -> Result<(), Stop> {
        let controls = self.page_controls();
        let (virtualized, kind) = match direction {
            // A read after a virtualized write of the same instruction, or another write, exits.
            Direction::Read => (
                controls.virtualizes_read(offset, size) && self.apic_write.is_none(),
                AccessType::Read,
            ),
            Direction::Write => (
                controls.virtualizes_write(offset, size)
                    && self
                        .apic_write
                        .is_none_or(|earlier| earlier == (offset, size)),
                AccessType::Write,
            ),
        };
        // Event delivery cannot be begun anew, and is no instruction: its accesses always exit.
        if !virtualized || self.vectoring.is_some() {
            return Err(self.apic_access_exit(kind, offset));
        }
        if direction == Direction::Write && !self.alone {
            return Err(self.stop_with(Cause::Alone));
        }
        Ok(())
    }

    /// A data read of the APIC-access page.
    pub(crate) fn apic_read(&mut self, offset: u32, bytes: &mut [u8]) -> Result<(), Stop> {
        self.check_apic_access(Direction::Read, offset, bytes.len())?;
        let value = self.virtual_register(offset).to_le_bytes();
        let from = offset as usize & 3;
        bytes.copy_from_slice(&value[from..from + bytes.len()]);
        Ok(())
    }

    /// A data write to the APIC-access page.
    pub(crate) fn apic_write(&mut self, offset: u32, bytes: &[u8]) -> Result<(), Stop> {
        self.check_apic_access(Direction::Write, offset, bytes.len())?;
        let mut value = self.virtual_register(offset).to_le_bytes();
        let from = offset as usize & 3;
        value[from..from + bytes.len()].copy_from_slice(bytes);
        self.set_virtual_register(offset, u32::from_le_bytes(value));
        self.apic_write = Some((offset, bytes.len()));
        Ok(())
    }

    /// APIC-write emulation, after an instruction that wrote to the APIC-access page; the exit it
    /// may end in.
    pub(crate) fn emulate_apic_write(&mut self) -> Option<VmExit> {
        let (offset, _) = self.apic_write.take()?;
        match offset & !3 {
            reg::TPR => {
                self.set_virtual_register(reg::TPR, self.virtual_register(reg::TPR) & 0xff);
                self.virtualize_task_priority()
            }
            reg::EOI if self.delivers_virtual_interrupts() => {
                self.set_virtual_register(reg::EOI, 0);
                self.virtualize_eoi()
            }
            reg::ICR if self.delivers_virtual_interrupts() => {
                match self_ipi_vector(self.virtual_register(reg::ICR)) {
                    Some(vector) => {
                        self.virtualize_self_ipi(vector);
                        None
                    }
                    None => trap(ExitReason::ApicWrite, reg::ICR.into()),
                }
            }
            reg::ICR2 => {
                let high = self.virtual_register(reg::ICR2) & 0xff00_0000;
                self.set_virtual_register(reg::ICR2, high);
                None
            }
            _ => trap(ExitReason::ApicWrite, offset.into()),
        }
    }

    /// RDMSR of an x2APIC register that the virtual-APIC page answers.
    pub(crate) fn read_virtual_x2apic(&self, msr: u32) -> Option<u64> {
        let offset = offset_of_msr(msr)?;
        let covered =
            offset == reg::TPR || self.secondary(SecondaryControls::APIC_REGISTER_VIRTUALIZATION);
        if !self.secondary(SecondaryControls::VIRTUALIZE_X2APIC) || !covered {
            return None;
        }
        let low = self.virtual_register(offset);
        let high = self.virtual_register(offset + 4);
        Some(u64::from(low) | u64::from(high) << 32)
    }

    /// WRMSR of an x2APIC register. `None` if it is not virtualized; else whether the value was
    /// acceptable, and the exit that follows the instruction.
    pub(crate) fn write_virtual_x2apic(
        &mut self,
        msr: u32,
        value: u64,
    ) -> Option<Result<Option<VmExit>, Stop>> {
        let offset = offset_of_msr(msr)?;
        let covered = offset == reg::TPR
            || matches!(offset, reg::EOI | reg::SELF_IPI) && self.delivers_virtual_interrupts();
        if !self.secondary(SecondaryControls::VIRTUALIZE_X2APIC) || !covered {
            return None;
        }
        let reserved = if offset == reg::EOI {
            value
        } else {
            value >> 8
        };
        if reserved != 0 {
            return Some(Err(self.general_protection()));
        }
        self.set_virtual_register(offset, value as u32);
        self.set_virtual_register(offset + 4, 0);
        Some(Ok(match offset {
            reg::TPR => self.virtualize_task_priority(),
            reg::EOI => self.virtualize_eoi(),
            _ if value & 0xf0 == 0 => trap(ExitReason::ApicWrite, offset.into()),
            _ => {
                self.virtualize_self_ipi(value as u8);
                None
            }
        }))
    }
}
