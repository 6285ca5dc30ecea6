//! Events: exceptions, interrupts, and their delivery through the IDT.
//!
//! Source: SDM volume 3, "Interrupt and Exception Handling" and "Event Delivery" under VMX.

use crate::op::Stop;
use crate::state::Gpr;
use crate::vcpu::{Cause, Vcpu};
use arch::control_registers::{BreakpointCondition, Cr4, Dr6, Dr7, Rflags};
use arch::controls::Interruptibility;
use arch::exception::{Class, Combined, Exception, combine};
use arch::exit::{ExitReason, TaskSwitchSource, VmExit, task_switch_qualification};
use arch::interruption::{InterruptionInfo, InterruptionType};
use arch::segment::{AccessRights, Segment, SegmentName};

/// An exception that an instruction, or a delivery, raised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub exception: Exception,
    pub error_code: Option<u32>,
    /// #PF: the linear address. #DB: the DR6 bits to set.
    pub address: u64,
}

/// An event on its way to the guest's handler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Event {
    pub vector: u8,
    pub kind: InterruptionType,
    pub error_code: Option<u32>,
    /// Length of the instruction that caused a software event.
    pub length: u32,
}

impl Event {
    fn of(fault: &Fault) -> Event {
        Event {
            vector: fault.exception.vector(),
            kind: InterruptionType::HardwareException,
            error_code: fault.error_code,
            length: 0,
        }
    }

    pub(crate) fn info(&self) -> InterruptionInfo {
        InterruptionInfo::new(self.kind, self.vector, self.error_code.is_some())
    }

    fn is_software(&self) -> bool {
        self.info().is_software()
    }

    /// The class for double-fault purposes.
    fn class(&self) -> Class {
        match self.kind {
            InterruptionType::HardwareException => {
                Exception::from_vector(self.vector).map_or(Class::Benign, Exception::class)
            }
            _ => Class::Benign,
        }
    }
}

/// Bits of an error code that names a selector.
const ERROR_EXT: u32 = 1;
const ERROR_IDT: u32 = 2;

/// An IDT gate.
struct Gate {
    offset: u64,
    selector: u16,
    kind: u8,
    dpl: u8,
    present: bool,
    ist: u8,
}

impl Vcpu {
    /// Takes an exception raised by the instruction at RIP: exits, or delivers it.
    pub(crate) fn take_exception(&mut self, fault: Fault) -> Result<(), VmExit> {
        let mut fault = fault;
        loop {
            if let Some(first) = self.vectoring {
                match combine(first.class(), fault.exception.class()) {
                    Combined::Second => {}
                    Combined::DoubleFault => {
                        if let Some(exit) = self.exception_exit(&fault) {
                            return Err(exit);
                        }
                        fault = Fault {
                            exception: Exception::DoubleFault,
                            error_code: Some(0),
                            address: 0,
                        };
                    }
                    Combined::TripleFault => {
                        if let Some(exit) = self.exception_exit(&fault) {
                            return Err(exit);
                        }
                        return Err(self.with_vectoring(VmExit::new(ExitReason::TripleFault)));
                    }
                }
            }
            if let Some(exit) = self.exception_exit(&fault) {
                return Err(exit);
            }
            match fault.exception {
                Exception::PageFault => self.state.cr2 = fault.address,
                Exception::Debug => {
                    let dr6 = self.state.dr6.bits() & !0xf | fault.address | Dr6::FIXED_1;
                    self.state.dr6 = Dr6::from_bits_retain(dr6);
                    self.state.dr7.remove(Dr7::GD);
                }
                _ => {}
            }
            // What waited behind MOV SS goes with it.
            self.state.pending_debug = 0;
            match self.deliver(Event::of(&fault)) {
                Ok(()) => return Ok(()),
                Err(Stop) => fault = self.after_failed_delivery()?,
            }
        }
    }

    /// Delivers an event that is no exception of the current instruction (an injected event, an
    /// interrupt, INT n), and whatever exceptions that raises.
    pub(crate) fn take_event(&mut self, event: Event) -> Result<(), VmExit> {
        // All but software events take pending debug exceptions with them; behind those of a
        // program they strike at the handler's first instruction.
        if !matches!(
            event.kind,
            InterruptionType::SoftwareInterrupt | InterruptionType::SoftwareException
        ) {
            self.state.pending_debug = 0;
        }
        match self.deliver(event) {
            Ok(()) => Ok(()),
            Err(Stop) => {
                let fault = self.after_failed_delivery()?;
                self.take_exception(fault)
            }
        }
    }

    /// The exception that cut a delivery short, or the exit.
    fn after_failed_delivery(&mut self) -> Result<Fault, VmExit> {
        match std::mem::replace(&mut self.cause, Cause::None) {
            Cause::Exception(fault) => Ok(fault),
            Cause::Exit(exit) => Err(self.with_vectoring(exit)),
            // Deliveries never reach the bus: its accesses are implicit and stack accesses to
            // memory that EPT does not map, which exit.
            _ => Err(self.with_vectoring(VmExit::new(ExitReason::TripleFault))),
        }
    }

    /// Adds IDT-vectoring information to an exit taken during a delivery.
    pub(crate) fn with_vectoring(&mut self, mut exit: VmExit) -> VmExit {
        if let Some(event) = self.vectoring.take() {
            exit.idt_vectoring_info = event.info();
            exit.idt_vectoring_error_code = event.error_code.unwrap_or(0);
            if event.is_software() {
                exit.instruction_length = event.length;
            }
        }
        exit
    }

    /// The exit that the exception bitmap demands, if it does.
    fn exception_exit(&mut self, fault: &Fault) -> Option<VmExit> {
        let controls = self.controls();
        let mut exits = controls.exception_bitmap >> fault.exception.vector() & 1 != 0;
        if fault.exception == Exception::PageFault {
            let code = fault.error_code.unwrap_or(0);
            let matches =
                code & controls.page_fault_error_code_mask == controls.page_fault_error_code_match;
            exits = exits == matches;
        }
        if !exits {
            return None;
        }
        let mut exit = VmExit::new(ExitReason::ExceptionOrNmi);
        let mut info = Event::of(fault).info();
        if self.unblocking_nmi {
            info.0 |= InterruptionInfo::NMI_UNBLOCKING;
        }
        exit.interruption_info = info;
        exit.interruption_error_code = fault.error_code.unwrap_or(0);
        exit.qualification = fault.address;
        Some(self.with_vectoring(exit))
    }

    /// Delivers one event through the IDT (or the real-mode vector table).
    fn deliver(&mut self, event: Event) -> Result<(), Stop> {
        self.vectoring = Some(event);
        let redirected =
            event.kind == InterruptionType::SoftwareInterrupt && self.deliver_redirected(&event)?;
        if self.real_mode() {
            self.deliver_real(&event)?;
        } else if !redirected {
            let gate = self.read_gate(&event)?;
            if self.long_mode {
                self.deliver_long(&event, &gate)?;
            } else {
                self.deliver_protected(&event, &gate)?;
            }
        }
        self.vectoring = None;
        let blocking = Interruptibility::STI | Interruptibility::MOV_SS;
        self.state.interruptibility.remove(blocking);
        self.update_mode();
        if event.kind == InterruptionType::Nmi {
            self.state.interruptibility.insert(Interruptibility::NMI);
        }
        Ok(())
    }

    /// RIP to push: past the instruction for software events.
    fn return_rip(&self, event: &Event) -> u64 {
        let rip = self.state.rip;
        if event.is_software() {
            rip.wrapping_add(event.length.into())
        } else {
            rip
        }
    }

    /// RFLAGS to push: faults push RF set.
    fn pushed_rflags(&self, event: &Event) -> u64 {
        let rflags = self.state.rflags();
        let fault = event.kind == InterruptionType::HardwareException
            && event.vector != Exception::Debug.vector();
        if fault {
            rflags | Rflags::RF.bits()
        } else {
            rflags
        }
    }

    fn external_bit(event: &Event) -> u32 {
        if event.is_software() && event.kind != InterruptionType::PrivilegedSoftwareException {
            0
        } else {
            ERROR_EXT
        }
    }

    fn deliver_real(&mut self, event: &Event) -> Result<(), Stop> {
        let offset = u64::from(event.vector) * 4;
        if offset + 3 > self.state.idtr.limit.into() {
            return Err(self.general_protection());
        }
        let entry: u32 = self.read_system(self.state.idtr.base.wrapping_add(offset))?;
        let rip = self.return_rip(event);
        let flags = self.state.rflags();
        let cs = self.state.segments[SegmentName::Cs as usize].selector;
        let mut sp = self.state.gpr(Gpr::Rsp) as u16;
        for value in [flags as u16, cs, rip as u16] {
            sp = sp.wrapping_sub(2);
            let ss = self.state.segments[SegmentName::Ss as usize].base;
            self.write_system(ss.wrapping_add(sp.into()), value)?;
        }
        let rsp = self.state.gpr(Gpr::Rsp) & !0xffff | u64::from(sp);
        self.state.set_gpr(Gpr::Rsp, rsp);
        let selector = (entry >> 16) as u16;
        let cs = &mut self.state.segments[SegmentName::Cs as usize];
        cs.selector = selector;
        cs.base = u64::from(selector) << 4;
        self.state.rip = u64::from(entry as u16);
        self.clear_flags(Rflags::IF | Rflags::TF | Rflags::AC | Rflags::RF);
        Ok(())
    }

    fn read_gate(&mut self, event: &Event) -> Result<Gate, Stop> {
        let error = u32::from(event.vector) << 3 | ERROR_IDT | Self::external_bit(event);
        let size = if self.long_mode { 16 } else { 8 };
        let offset = u64::from(event.vector) * size;
        if offset + size - 1 > self.state.idtr.limit.into() {
            return Err(self.raise_code(Exception::GeneralProtection, error));
        }
        let address = self.state.idtr.base.wrapping_add(offset);
        let low: u64 = self.read_system(address)?;
        let high: u64 = if self.long_mode {
            self.read_system(address.wrapping_add(8))?
        } else {
            0
        };
        let gate = Gate {
            offset: low & 0xffff | low >> 32 & 0xffff_0000 | high << 32,
            selector: (low >> 16) as u16,
            kind: (low >> 40 & 0x1f) as u8,
            dpl: (low >> 45 & 3) as u8,
            present: low >> 47 & 1 != 0,
            ist: if self.long_mode {
                (low >> 32 & 7) as u8
            } else {
                0
            },
        };
        let known = if self.long_mode {
            matches!(gate.kind, 14 | 15)
        } else {
            matches!(gate.kind, 5 | 6 | 7 | 14 | 15)
        };
        let software =
            event.is_software() && event.kind != InterruptionType::PrivilegedSoftwareException;
        if !known || software && gate.dpl < self.cpl() {
            return Err(self.raise_code(Exception::GeneralProtection, error));
        }
        if !gate.present {
            return Err(self.raise_code(Exception::SegmentNotPresent, error));
        }
        Ok(gate)
    }

    /// Checks the gate's code segment and returns it with the privilege level of the handler.
    fn handler_segment(&mut self, gate: &Gate, ext: u32) -> Result<(Segment, u8), Stop> {
        if gate.selector & !3 == 0 {
            return Err(self.raise_code(Exception::GeneralProtection, ext));
        }
        let error = u32::from(gate.selector & !3) | ext;
        let descriptor = self.read_descriptor(gate.selector, Exception::GeneralProtection, ext)?;
        let access = descriptor.access;
        let cpl = self.cpl();
        if !access.has(AccessRights::S | AccessRights::CODE) || access.dpl() > cpl {
            return Err(self.raise_code(Exception::GeneralProtection, error));
        }
        if self.long_mode && (!access.has(AccessRights::L) || access.has(AccessRights::DB)) {
            return Err(self.raise_code(Exception::GeneralProtection, error));
        }
        if !access.has(AccessRights::P) {
            return Err(self.raise_code(Exception::SegmentNotPresent, error));
        }
        let level = if access.has(AccessRights::EC) {
            cpl
        } else {
            access.dpl()
        };
        Ok((descriptor, level))
    }

    fn deliver_long(&mut self, event: &Event, gate: &Gate) -> Result<(), Stop> {
        let ext = Self::external_bit(event);
        let (mut cs, level) = self.handler_segment(gate, ext)?;
        let cpl = self.cpl();
        let old_rsp = self.state.gpr(Gpr::Rsp);
        let old_ss = self.state.segments[SegmentName::Ss as usize].selector;
        let mut rsp = if gate.ist != 0 {
            self.read_tss_stack64(28 + 8 * u64::from(gate.ist), ext)?
        } else if level < cpl {
            self.read_tss_stack64(4 + 8 * u64::from(level), ext)?
        } else {
            old_rsp
        };
        if !self.is_canonical(rsp) {
            return Err(self.raise_code(Exception::StackFault, ext));
        }
        rsp &= !0xf;
        let flags = self.pushed_rflags(event);
        let old_cs = self.state.segments[SegmentName::Cs as usize].selector;
        let rip = self.return_rip(event);
        if !self.is_canonical(gate.offset) {
            return Err(self.raise_code(Exception::GeneralProtection, ext));
        }
        let user = level == 3;
        let mut push = |cpu: &mut Vcpu, value: u64| {
            rsp = rsp.wrapping_sub(8);
            cpu.write_stack_as(rsp, user, value)
        };
        for value in [old_ss.into(), old_rsp, flags, old_cs.into(), rip] {
            push(self, value)?;
        }
        if let Some(code) = event.error_code {
            push(self, code.into())?;
        }
        cs.selector = gate.selector & !3 | u16::from(level);
        self.mark_accessed(gate.selector, &mut cs)?;
        self.state.segments[SegmentName::Cs as usize] = cs;
        if level < cpl {
            // A null SS of the new level.
            self.state.segments[SegmentName::Ss as usize] = Segment {
                selector: level.into(),
                access: AccessRights(AccessRights::UNUSABLE | u32::from(level) << 5),
                ..Segment::default()
            };
        }
        self.state.set_gpr(Gpr::Rsp, rsp);
        self.state.rip = gate.offset;
        let mut clear = Rflags::TF | Rflags::NT | Rflags::RF | Rflags::VM;
        if gate.kind & 1 == 0 {
            clear |= Rflags::IF;
        }
        self.clear_flags(clear);
        Ok(())
    }

    fn deliver_protected(&mut self, event: &Event, gate: &Gate) -> Result<(), Stop> {
        if gate.kind == 5 {
            return Err(self.task_switch_exit(TaskSwitchSource::Idt, gate.selector, event.length));
        }
        let ext = Self::external_bit(event);
        let (mut cs, level) = self.handler_segment(gate, ext)?;
        let cpl = self.cpl();
        let v86 = self.v86();
        if v86 && level != 0 {
            let error = u32::from(gate.selector & !3) | ext;
            return Err(self.raise_code(Exception::GeneralProtection, error));
        }
        let wide = gate.kind & 8 != 0;
        let flags = self.pushed_rflags(event);
        let rip = self.return_rip(event);
        let old = |name: SegmentName| u64::from(self.state.segments[name as usize].selector);
        let old_esp = self.state.gpr(Gpr::Rsp);
        let mut values = Vec::with_capacity(10);
        if v86 {
            values.extend(
                [
                    SegmentName::Gs,
                    SegmentName::Fs,
                    SegmentName::Ds,
                    SegmentName::Es,
                ]
                .map(old),
            );
        }
        if level < cpl {
            values.extend([old(SegmentName::Ss), old_esp]);
        }
        values.extend([flags, old(SegmentName::Cs), rip]);
        values.extend(event.error_code.map(u64::from));

        let (ss, mut esp) = if level < cpl {
            self.read_tss_stack(level, ext)?
        } else {
            (self.state.segments[SegmentName::Ss as usize], old_esp)
        };
        let mask = if ss.access.has(AccessRights::DB) {
            0xffff_ffff
        } else {
            0xffff
        };
        let size: u64 = if wide { 4 } else { 2 };
        for value in values {
            let sp = (esp & mask).wrapping_sub(size) & mask;
            self.check_stack_limit(&ss, sp, size, ext)?;
            let address = ss.base.wrapping_add(sp) & 0xffff_ffff;
            if wide {
                self.write_stack_as(address, level == 3, value as u32)?;
            } else {
                self.write_stack_as(address, level == 3, value as u16)?;
            }
            esp = esp & !mask | sp;
        }
        let offset = if wide {
            gate.offset & 0xffff_ffff
        } else {
            gate.offset & 0xffff
        };
        if offset > cs.limit.into() {
            return Err(self.raise_code(Exception::GeneralProtection, ext));
        }
        cs.selector = gate.selector & !3 | u16::from(level);
        self.mark_accessed(gate.selector, &mut cs)?;
        self.state.segments[SegmentName::Cs as usize] = cs;
        if level < cpl {
            self.state.segments[SegmentName::Ss as usize] = ss;
        }
        if v86 {
            for name in [
                SegmentName::Es,
                SegmentName::Ds,
                SegmentName::Fs,
                SegmentName::Gs,
            ] {
                self.state.segments[name as usize] = Segment::UNUSABLE;
            }
        }
        self.state.set_gpr(Gpr::Rsp, esp & 0xffff_ffff);
        self.state.rip = offset;
        let mut clear = Rflags::TF | Rflags::NT | Rflags::RF | Rflags::VM;
        if gate.kind & 1 == 0 {
            clear |= Rflags::IF;
        }
        self.clear_flags(clear);
        Ok(())
    }

    /// #SS if a push of `size` bytes at `sp` leaves the stack segment.
    fn check_stack_limit(
        &mut self,
        ss: &Segment,
        sp: u64,
        size: u64,
        ext: u32,
    ) -> Result<(), Stop> {
        let last = sp.wrapping_add(size - 1);
        let inside = if ss.access.has(AccessRights::EC) {
            let top = if ss.access.has(AccessRights::DB) {
                0xffff_ffff
            } else {
                0xffff
            };
            sp > ss.limit.into() && last <= top
        } else {
            last <= ss.limit.into() && last >= sp
        };
        if inside {
            return Ok(());
        }
        let error = if ss.selector == self.state.segments[SegmentName::Ss as usize].selector {
            ext
        } else {
            u32::from(ss.selector & !3) | ext
        };
        Err(self.raise_code(Exception::StackFault, error))
    }

    /// A stack pointer of the 64-bit TSS.
    fn read_tss_stack64(&mut self, offset: u64, ext: u32) -> Result<u64, Stop> {
        let tr = self.state.tr;
        if offset + 7 > tr.limit.into() {
            return Err(self.raise_code(Exception::InvalidTss, u32::from(tr.selector & !3) | ext));
        }
        self.read_system(tr.base.wrapping_add(offset))
    }

    /// The checked stack segment and pointer for `level` from a 16- or 32-bit TSS.
    pub(crate) fn read_tss_stack(&mut self, level: u8, ext: u32) -> Result<(Segment, u64), Stop> {
        let tr = self.state.tr;
        let wide = tr.access.kind() & 8 != 0;
        let (offset, size) = if wide {
            (4 + 8 * u64::from(level), 8)
        } else {
            (2 + 4 * u64::from(level), 4)
        };
        if offset + size - 1 > tr.limit.into() {
            return Err(self.raise_code(Exception::InvalidTss, u32::from(tr.selector & !3) | ext));
        }
        let at = tr.base.wrapping_add(offset);
        let (esp, selector) = if wide {
            (
                u64::from(self.read_system::<u32>(at)?),
                self.read_system::<u16>(at.wrapping_add(4))?,
            )
        } else {
            (
                u64::from(self.read_system::<u16>(at)?),
                self.read_system::<u16>(at.wrapping_add(2))?,
            )
        };
        let ss = self.stack_segment_for(selector, level, ext)?;
        Ok((ss, esp))
    }

    /// Checks `selector` as the stack segment of `level` (faults are #TS, or #SS if not present).
    fn stack_segment_for(&mut self, selector: u16, level: u8, ext: u32) -> Result<Segment, Stop> {
        let error = u32::from(selector & !3) | ext;
        if selector & !3 == 0 {
            return Err(self.raise_code(Exception::InvalidTss, error));
        }
        let mut ss = self.read_descriptor(selector, Exception::InvalidTss, ext)?;
        let access = ss.access;
        let writable =
            access.has(AccessRights::S | AccessRights::RW) && access.0 & AccessRights::CODE == 0;
        if selector & 3 != u16::from(level) || access.dpl() != level || !writable {
            return Err(self.raise_code(Exception::InvalidTss, error));
        }
        if !access.has(AccessRights::P) {
            return Err(self.raise_code(Exception::StackFault, error));
        }
        self.mark_accessed(selector, &mut ss)?;
        Ok(ss)
    }

    /// Stops for a hardware task switch, which the hypervisor carries out.
    pub(crate) fn task_switch_exit(
        &mut self,
        source: TaskSwitchSource,
        selector: u16,
        length: u32,
    ) -> Stop {
        let mut exit = VmExit::new(ExitReason::TaskSwitch);
        exit.qualification = task_switch_qualification(source, selector);
        exit.instruction_length = length;
        self.stop_with(Cause::Exit(exit))
    }

    /// Clears flags that are not status flags.
    pub(crate) fn clear_flags(&mut self, flags: Rflags) {
        self.state.rflags_rest &= !flags.bits();
    }

    /// Remembers data breakpoints that an access matched; the #DB comes after the instruction.
    pub(crate) fn match_data_breakpoints(&mut self, gva: u64, len: u64, write: bool) {
        let dr7 = self.state.dr7;
        let mut hits = 0;
        for n in 0..4 {
            let watched = match dr7.condition(n) {
                BreakpointCondition::Write => write,
                BreakpointCondition::ReadWrite => true,
                _ => false,
            };
            let length = dr7.length(n);
            let start = self.state.dr[n as usize] & !(length - 1);
            if watched && gva < start.wrapping_add(length) && start < gva.wrapping_add(len) {
                hits |= 1 << n;
            }
        }
        self.note_breakpoints(hits, Self::PENDING_ENABLED);
    }

    /// The "enabled breakpoint" bit of the pending debug exceptions.
    pub(crate) const PENDING_ENABLED: u64 = 1 << 12;

    /// Adds matched breakpoints to the pending debug exceptions, if any of them is enabled.
    fn note_breakpoints(&mut self, hits: u64, enabled: u64) {
        let any_enabled = (0..4).any(|n| hits >> n & 1 != 0 && self.state.dr7.enabled(n));
        if any_enabled {
            self.state.pending_debug |= hits | enabled;
            self.request_own();
        }
    }

    /// Remembers I/O breakpoints that an access to `port` matched.
    pub(crate) fn match_io_breakpoints(&mut self, port: u16, size: u8) {
        if self.state.dr7.bits() & Dr7::ENABLES == 0 || !self.state.cr4.contains(Cr4::DE) {
            return;
        }
        let (port, len) = (u64::from(port), u64::from(size));
        let mut hits = 0;
        for n in 0..4 {
            let length = self.state.dr7.length(n);
            let start = self.state.dr[n as usize] & !(length - 1);
            let matches = self.state.dr7.condition(n) == BreakpointCondition::Io;
            if matches && port < start.wrapping_add(length) && start < port + len {
                hits |= 1 << n;
            }
        }
        self.note_breakpoints(hits, Self::PENDING_ENABLED);
    }

    /// The breakpoints that an instruction at linear address `rip` matches, as DR6 bits; zero if
    /// none of them is enabled.
    pub(crate) fn instruction_breakpoints(&self, linear: u64) -> u64 {
        let dr7 = self.state.dr7;
        if dr7.bits() & Dr7::ENABLES == 0 {
            return 0;
        }
        let hits: u64 = (0..4)
            .filter(|&n| {
                dr7.condition(n) == BreakpointCondition::Execute
                    && self.state.dr[n as usize] == linear
            })
            .map(|n| 1 << n)
            .sum();
        let enabled = (0..4).any(|n| hits >> n & 1 != 0 && dr7.enabled(n));
        if enabled { hits } else { 0 }
    }

    /// Whether any instruction breakpoint is enabled.
    pub(crate) fn watches_instructions(&self) -> bool {
        let dr7 = self.state.dr7;
        dr7.bits() & Dr7::ENABLES != 0
            && (0..4).any(|n| dr7.enabled(n) && dr7.condition(n) == BreakpointCondition::Execute)
    }
}
