//! The execution loop.

use crate::code::Block;
use crate::decode;
use crate::event::{Event, Fault};
use crate::machine::{Pages, request};
use crate::op::{Flow, Op, Stop};
use crate::state::slot;
use crate::vcpu::{Cause, Vcpu};
use arch::control_registers::{Dr6, Rflags};
use arch::controls::{Activity, Interruptibility, PrimaryControls};
use arch::exception::Exception;
use arch::exit::{ExitReason, VmExit};
use std::sync::atomic::Ordering;

/// Bytes of code decoded for one block at the most.
const BLOCK_BYTES: usize = 512;

/// Instructions between two looks at the clock while the preemption timer runs.
const TIMER_GRANULE: i64 = 2_000;

impl Vcpu {
    /// Runs guest code until something exits.
    pub(crate) fn run(&mut self) -> VmExit {
        self.hot.link = 0;
        loop {
            // Until nothing is asked for: an instruction that was stepped may have opened a window
            // or left a trap pending.
            while self.attention.flags.load(Ordering::Relaxed) != 0 {
                // What comes next need not be where generated code wanted to go.
                self.hot.link = 0;
                if let Some(exit) = self.attend() {
                    return exit;
                }
            }
            let block = match self.block() {
                Ok(block) => block,
                Err(Stop) => match self.stopped() {
                    Some(exit) => return exit,
                    None => continue,
                },
            };
            if let Some(exit) = self.execute(block) {
                return exit;
            }
        }
    }

    /// Executes a block to its end, by its translation if it has one; then perhaps others.
    #[inline(always)]
    fn execute(&mut self, block: *const Block) -> Option<VmExit> {
        // SAFETY: `block` was just found; blocks are freed only by a later lookup.
        let block = unsafe { &*block };
        if let Some(entry) = self.translation_of(block) {
            return self.execute_host(block, entry);
        }
        self.hot.link = 0;
        block.warm();
        self.interpret(block)
    }

    /// Executes translated code from `block` on.
    #[inline(always)]
    fn execute_host(&mut self, block: &Block, entry: u64) -> Option<VmExit> {
        self.connect(block, self.linear_rip(self.state.rip));
        self.current = block;
        if self.execute_translated(entry) {
            self.hot.link = 0;
            return self.stopped();
        }
        // A block is not begun if the countdown would run out in it.
        if self.countdown < i64::from(decode::MAX_INSTRUCTIONS) {
            return self.look_at_clock();
        }
        None
    }

    /// Executes a block's ops.
    #[inline(always)]
    fn interpret(&mut self, block: &Block) -> Option<VmExit> {
        self.countdown -= i64::from(block.instructions);
        self.statistics.tlb_lookups += u64::from(block.accesses);
        if self.countdown < 0
            && let Some(exit) = self.look_at_clock()
        {
            return Some(exit);
        }
        self.current = block;
        let mut op = block.ops.as_ptr();
        loop {
            // SAFETY: the last op of a block never returns `Next`, so `op` stays inside.
            let current = unsafe { &*op };
            match (current.handler.get())(self, current) {
                Flow::Next => {
                    // SAFETY: as above.
                    op = unsafe { op.add(1) };
                }
                Flow::Branch => {
                    self.uncount_behind(block, current);
                    return None;
                }
                Flow::Stale => {
                    self.uncount_from(block, current);
                    return None;
                }
                Flow::Stop => {
                    self.uncount_from(block, current);
                    self.state.rip = self.rip_of(current);
                    return self.stopped();
                }
            }
        }
    }

    /// Takes back the instructions of a block from `op` on.
    fn uncount_from(&mut self, block: &Block, op: &Op) {
        self.countdown += i64::from(block.instructions - block.index_of(op));
    }

    /// Takes back the instructions of a block that `op` ended before its end.
    #[inline(always)]
    fn uncount_behind(&mut self, block: &Block, op: &Op) {
        let index = block.index_of(op);
        let again = self.state.rip == self.rip_of(op);
        self.countdown += i64::from(block.instructions - block.executed(index, again));
    }

    /// The block at RIP. Sets the page slot that its ops rely on.
    #[inline(always)]
    fn block(&mut self) -> Result<*const Block, Stop> {
        let rip = self.state.rip;
        let linear = self.linear_rip(rip);
        self.state.regs[slot::PAGE] = rip.wrapping_sub(linear & 0xfff);
        match self.code.jump(linear, self.jump_key) {
            Some(block) => Ok(block),
            None => self.find_block(rip, linear),
        }
    }

    /// The linear address of an instruction pointer.
    #[inline(always)]
    fn linear_rip(&self, rip: u64) -> u64 {
        let linear = rip.wrapping_add(self.state.segment_bases[1]);
        if self.long64 {
            linear
        } else {
            linear & 0xffff_ffff
        }
    }

    #[cold]
    #[inline(never)]
    fn find_block(&mut self, rip: u64, linear: u64) -> Result<*const Block, Stop> {
        // In 64-bit mode nothing but what the key holds decides whether code can be fetched.
        if self.long64
            && let Some(block) = self.code.recheck(linear, self.jump_key)
        {
            return Ok(block);
        }
        self.statistics.block_lookups += 1;
        // The lookup frees dropped blocks, the one that ran last perhaps among them; a store made
        // while delivering a fault of this very lookup must not touch it.
        self.current = core::ptr::null();
        if self.long64 {
            if !self.is_canonical(rip) {
                return Err(self.general_protection());
            }
        } else {
            self.check_code_limit(rip, 1)?;
        }
        let hva = self.fetch_address(linear)?;
        self.tlb.note_code(linear, self.user);
        if let Some(found) = self.code.find(hva, self.code_mode, linear, self.jump_key) {
            // SAFETY: just found.
            let block = unsafe { &*found };
            if !block.crosses {
                self.check_code_limit(rip, block.len.into())
                    .or_else(|_| self.check_code_limit(rip, 1))?;
                return Ok(found);
            }
            let mut bytes = [0; 16];
            let bytes = &mut bytes[..block.len.into()];
            self.read_code(linear, bytes)?;
            if self.code.matches(found, bytes) {
                return Ok(found);
            }
        }
        self.make_room_for_stubs();
        self.update_jump_key();
        self.decode_block(linear, hva)
    }

    /// Drops all host code, and the blocks that point to it, when it is more than is kept. No block
    /// executes here.
    fn make_room_for_stubs(&mut self) {
        if self.stubs.is_full() {
            self.code.clear();
            self.stubs.clear();
        }
    }

    /// Reads code bytes that may cross into the next page.
    fn read_code(&mut self, linear: u64, bytes: &mut [u8]) -> Result<(), Stop> {
        let head = self.fetch_bytes(linear, bytes)?;
        if head < bytes.len() {
            let next = linear.wrapping_add(head as u64);
            let next = if self.long64 {
                next
            } else {
                next & 0xffff_ffff
            };
            if self.long64 && !self.is_canonical(next) {
                return Err(self.general_protection());
            }
            self.fetch_bytes(next, &mut bytes[head..])?;
        }
        Ok(())
    }

    fn decode_block(&mut self, linear: u64, hva: u64) -> Result<*const Block, Stop> {
        loop {
            let mut buffer = [0; BLOCK_BYTES];
            let read = self.fetch_bytes(linear, &mut buffer)?;
            let bytes = &buffer[..read];
            let decoded = decode::block(
                bytes,
                linear & 0xfff,
                self.code_mode,
                &self.features,
                &self.stubs,
            );
            if decoded.len == 0 {
                return self.decode_crossing(linear, hva, bytes);
            }
            let bytes = &bytes[..decoded.len];
            let unsettled = self
                .machine
                .register_code(&self.attention, hva, decoded.len as u64);
            // Stores to the page are seen from now on; one that came in between is seen here.
            let mut again = [0; BLOCK_BYTES];
            let again = &mut again[..decoded.len];
            self.fetch_bytes(linear, again)?;
            if again != bytes {
                continue;
            }
            // If the page had no code before, fast writes of this processor's own must go: it is
            // the first to know of the code, or another has asked for it.
            let asked = self.attention.flags.load(Ordering::SeqCst) & request::QUEUE != 0;
            if unsettled.is_some() || asked {
                self.tlb.revoke_writes(hva & !0xfff);
            }
            self.statistics.blocks_decoded += 1;
            self.statistics.instructions_decoded += u64::from(decoded.instructions);
            let block = self
                .code
                .insert(hva, self.code_mode, decoded, bytes, unsettled);
            self.update_jump_key();
            // Found again, so that the jump cache learns of it.
            return Ok(self
                .code
                .find(hva, self.code_mode, linear, self.jump_key)
                .unwrap_or(block));
        }
    }

    /// Decodes an instruction that does not end in its page.
    fn decode_crossing(
        &mut self,
        linear: u64,
        hva: u64,
        head: &[u8],
    ) -> Result<*const Block, Stop> {
        let mut bytes = [0; 15];
        let split = head.len().min(15);
        bytes[..split].copy_from_slice(&head[..split]);
        let mut available = split;
        if split < 15 {
            let next = linear.wrapping_add(split as u64);
            let next = if self.long64 {
                next
            } else {
                next & 0xffff_ffff
            };
            if self.long64 && !self.is_canonical(next) {
                return Err(self.general_protection());
            }
            available += self.fetch_bytes(next, &mut bytes[split..])?;
        }
        let decoded = decode::one(
            &bytes[..available],
            linear & 0xfff,
            self.code_mode,
            &self.features,
            &self.stubs,
        );
        let len = decoded.len;
        self.statistics.blocks_decoded += 1;
        self.statistics.instructions_decoded += 1;
        let block = self
            .code
            .insert(hva, self.code_mode, decoded, &bytes[..len], None);
        self.update_jump_key();
        Ok(block)
    }

    /// Deals with an instruction that stopped; RIP names it. An exit, or `None` to go on.
    #[cold]
    #[inline(never)]
    pub(crate) fn stopped(&mut self) -> Option<VmExit> {
        match std::mem::replace(&mut self.cause, Cause::None) {
            Cause::Exception(fault) => {
                // A fault that IRET raises is taken with NMIs still blocked.
                let result = self.take_exception(fault);
                self.unblocking_nmi = false;
                result.err()
            }
            Cause::Software(event) => self.software_event(event),
            Cause::Exit(mut exit) => {
                self.unblocking_nmi = false;
                if exit.reason == ExitReason::ApicAccess {
                    exit.instruction_length = self.current_length() as u32;
                }
                Some(exit)
            }
            Cause::Alone => {
                self.step_alone = true;
                self.request_own();
                None
            }
            Cause::ExitAfter(exit) => {
                // Trap-like: the instruction has completed.
                let length = self.current_length();
                self.state.rip = self.wrap_rip(self.state.rip.wrapping_add(length));
                Some(exit)
            }
            // The bus answers only while `emulate` runs, which looks at the cause itself.
            Cause::None | Cause::Later | Cause::BusFault | Cause::Unhandled => {
                Some(VmExit::new(ExitReason::TripleFault))
            }
        }
    }

    /// Length of the instruction at RIP, which belongs to the running block.
    fn current_length(&self) -> u64 {
        if self.current.is_null() {
            return 0;
        }
        // SAFETY: the running block is kept until the next lookup.
        let block = unsafe { &*self.current };
        let at = self.state.rip;
        block
            .ops
            .iter()
            .find(|op| self.rip_of(op) == at)
            .map_or(0, |op| op.len.into())
    }

    /// INT n and its kin: intercepted like the exceptions they are, or delivered.
    fn software_event(&mut self, event: Event) -> Option<VmExit> {
        use arch::interruption::InterruptionType;
        let exception = event.kind != InterruptionType::SoftwareInterrupt;
        if exception && self.controls().exception_bitmap >> event.vector & 1 != 0 {
            let mut exit = VmExit::new(ExitReason::ExceptionOrNmi);
            exit.interruption_info = event.info();
            exit.instruction_length = event.length;
            return Some(exit);
        }
        self.take_event(event).err()
    }

    /// The countdown ran out: looks at the preemption timer and starts anew.
    #[cold]
    fn look_at_clock(&mut self) -> Option<VmExit> {
        self.settle_statistics();
        if self.preemption_timer_value() == Some(0) {
            return Some(VmExit::new(ExitReason::PreemptionTimer));
        }
        None
    }

    /// Moves the countdown's progress into the statistics and starts it anew.
    pub(crate) fn settle_statistics(&mut self) {
        let done = self.countdown_start - self.countdown;
        self.statistics.instructions = self.statistics.instructions.wrapping_add_signed(done);
        self.countdown_start = if self.preemption_deadline.is_some() {
            TIMER_GRANULE
        } else {
            i64::MAX / 2
        };
        self.countdown = self.countdown_start;
    }

    /// Looks at everything that may interrupt execution between two instructions. An exit, or
    /// `None` to go on.
    #[cold]
    #[inline(never)]
    fn attend(&mut self) -> Option<VmExit> {
        let flags = self.attention.flags.load(Ordering::SeqCst);
        if flags & request::QUEUE != 0 {
            self.serve_queue();
        }
        if flags & request::KICK != 0 {
            self.attention.clear_kick();
            return Some(VmExit::new(ExitReason::ExternalInterrupt));
        }
        if flags & request::NOTIFICATION != 0 {
            self.attention.clear_notification();
            if let Some(exit) = self.take_notification() {
                return Some(exit);
            }
        }
        if flags & request::OWN == 0 {
            return None;
        }
        self.attention
            .flags
            .fetch_and(!request::OWN, Ordering::SeqCst);
        match self.interruptions() {
            Ok(false) => {}
            Ok(true) => {
                // The delivery may have raised the next event, which comes before the handler.
                self.request_own();
                return self.monitor_trap();
            }
            Err(exit) => return Some(exit),
        }
        if self.must_step() || self.step_alone {
            self.request_own();
            return self.step_one();
        }
        None
    }

    /// Carries out what other processors asked for.
    pub(crate) fn serve_queue(&mut self) {
        let (queue, ticket) = self.attention.take();
        match queue.revoke {
            Pages::Some(pages) => pages.into_iter().for_each(|p| self.tlb.revoke_writes(p)),
            Pages::All => self.tlb.revoke_all_writes(),
        }
        match queue.drop_code {
            Pages::Some(pages) => pages.into_iter().for_each(|p| self.code.drop_page(p)),
            Pages::All => self.code.clear(),
        }
        self.update_jump_key();
        self.attention.answer(ticket);
    }

    /// Pending debug exceptions, windows, inactivity: in the order of the SDM's "Priority Among
    /// Simultaneous Exceptions and Interrupts". Returns whether an event was delivered.
    fn interruptions(&mut self) -> Result<bool, VmExit> {
        let blocking = self.state.interruptibility;
        let shadow = blocking.intersects(Interruptibility::STI | Interruptibility::MOV_SS);
        if self.state.pending_debug != 0 && !blocking.contains(Interruptibility::MOV_SS) {
            if let Some(exit) = self.notify_exit() {
                return Err(exit);
            }
            if self.take_pending_debug()? {
                return Ok(true);
            }
        }
        if self.preemption_timer_value() == Some(0) {
            return Err(VmExit::new(ExitReason::PreemptionTimer));
        }
        // Nor while STI blocks, which a processor may decide: an entry cannot inject an NMI then.
        if self.primary(PrimaryControls::NMI_WINDOW_EXITING)
            && !shadow
            && !blocking.contains(Interruptibility::NMI)
        {
            return Err(VmExit::new(ExitReason::NmiWindow));
        }
        if self.primary(PrimaryControls::INTERRUPT_WINDOW_EXITING)
            && !shadow
            && self.state.rflags_rest & Rflags::IF.bits() != 0
        {
            return Err(VmExit::new(ExitReason::InterruptWindow));
        }
        if self.deliver_virtual_interrupt()? {
            return Ok(true);
        }
        if self.state.activity != Activity::Active {
            return self.wait_inactive();
        }
        Ok(false)
    }

    /// The processor is halted (without HLT exiting), shut down or waiting: only a kick, a
    /// notification or the preemption timer ends that. Returns that an event was delivered.
    fn wait_inactive(&mut self) -> Result<bool, VmExit> {
        loop {
            let flags = self.attention.flags.load(Ordering::SeqCst);
            if flags & request::QUEUE != 0 {
                self.serve_queue();
            }
            if flags & request::KICK != 0 {
                self.attention.clear_kick();
                self.request_own();
                return Err(VmExit::new(ExitReason::ExternalInterrupt));
            }
            if flags & request::NOTIFICATION != 0 {
                self.attention.clear_notification();
                if let Some(exit) = self.take_notification() {
                    self.request_own();
                    return Err(exit);
                }
                if self.deliver_virtual_interrupt()? {
                    return Ok(true);
                }
            }
            if self.preemption_timer_value() == Some(0) {
                self.request_own();
                return Err(VmExit::new(ExitReason::PreemptionTimer));
            }
            std::thread::sleep(std::time::Duration::from_micros(50));
        }
    }

    /// Delivers the pending debug exceptions as a trap, if any of them is enabled; returns whether.
    fn take_pending_debug(&mut self) -> Result<bool, VmExit> {
        let pending = std::mem::take(&mut self.state.pending_debug);
        let address = pending & (Dr6::B0 | Dr6::B1 | Dr6::B2 | Dr6::B3 | Dr6::BS).bits();
        if pending & Self::PENDING_ENABLED == 0 && pending & Dr6::BS.bits() == 0 {
            return Ok(false);
        }
        let fault = Fault {
            exception: Exception::Debug,
            error_code: None,
            address,
        };
        self.state.activity = Activity::Active;
        self.take_exception(fault).map(|()| true)
    }

    /// Whether instructions must be executed one at a time for now.
    pub(crate) fn must_step(&self) -> bool {
        let flags = (Rflags::TF | Rflags::RF).bits();
        self.state.rflags_rest & flags != 0
            || self
                .state
                .interruptibility
                .intersects(Interruptibility::STI | Interruptibility::MOV_SS)
            || self.watches_instructions()
            || self.watches_data()
            || self.primary(PrimaryControls::MONITOR_TRAP_FLAG)
    }

    /// Executes exactly one instruction, with what hangs on instruction boundaries.
    fn step_one(&mut self) -> Option<VmExit> {
        let before = self.state.rflags_rest;
        let shadow = self.state.interruptibility;
        if before & Rflags::RF.bits() == 0 && !shadow.contains(Interruptibility::MOV_SS) {
            let hits = self.instruction_breakpoints(self.linear_rip(self.state.rip));
            if hits != 0 {
                let fault = Fault {
                    exception: Exception::Debug,
                    error_code: None,
                    address: hits,
                };
                let exit = self.take_exception(fault).err();
                return exit.or_else(|| self.monitor_trap());
            }
        }
        let block = match self.block() {
            Ok(block) => block,
            Err(Stop) => return self.stopped().or_else(|| self.monitor_trap()),
        };
        // SAFETY: just found.
        let block = unsafe { &*block };
        self.current = block;
        self.countdown -= 1;
        self.windowless_since = None;
        // The shadow of STI and MOV SS, and RF, end with this instruction unless it sets them
        // anew; one that faults or exits keeps them, and has matched no breakpoint.
        let shadow = shadow & (Interruptibility::STI | Interruptibility::MOV_SS);
        let resume = before & Rflags::RF.bits();
        let pending = self.state.pending_debug;
        self.state.interruptibility.remove(shadow);
        self.state.rflags_rest &= !resume;
        let stopped = self.execute_single(block);
        if self.has_completed(stopped) {
            self.single_step(before);
        } else {
            self.state.interruptibility.insert(shadow);
            self.state.rflags_rest |= resume;
            self.forget_matches(pending);
        }
        if stopped && let Some(exit) = self.stopped() {
            return Some(exit);
        }
        self.request_own();
        if let Some(exit) = self.exit_behind_instruction() {
            return Some(exit);
        }
        self.monitor_trap()
    }

    /// The exit that the monitor trap flag asks for at the boundary behind an instruction, or behind
    /// the delivery of an event, which stands for one.
    pub(crate) fn monitor_trap(&self) -> Option<VmExit> {
        let trap = self.primary(PrimaryControls::MONITOR_TRAP_FLAG);
        trap.then(|| VmExit::new(ExitReason::MonitorTrapFlag))
    }

    /// Executes the first instruction of a block and moves RIP past it; returns whether it
    /// stopped.
    pub(crate) fn execute_single(&mut self, block: &Block) -> bool {
        let op = &block.ops[0];
        self.step_alone = false;
        self.has_stepped = false;
        self.alone = true;
        let flow = (block.first)(self, op);
        self.alone = false;
        match flow {
            Flow::Next => {
                self.state.rip = self.next_rip(op);
                false
            }
            // What is executed alone is looked up and executed at once.
            Flow::Branch | Flow::Stale => false,
            Flow::Stop => {
                self.state.rip = self.rip_of(op);
                // What the page holds stays; what would have followed the instruction does not.
                self.apic_write = None;
                self.bus_lock = false;
                true
            }
        }
    }

    /// The single-step trap behind an instruction before which RFLAGS had these bits, if the
    /// instruction has not decided about it itself.
    pub(crate) fn single_step(&mut self, before: u64) {
        if before & Rflags::TF.bits() != 0 && !self.has_stepped {
            self.state.pending_debug |= Dr6::BS.bits();
        }
    }

    /// The exit that an instruction which has completed demands.
    pub(crate) fn exit_behind_instruction(&mut self) -> Option<VmExit> {
        if std::mem::take(&mut self.bus_lock) {
            return Some(VmExit::new(ExitReason::BusLock));
        }
        self.emulate_apic_write()
    }

    /// Puts pending debug exceptions back to what they were before an instruction that has not been
    /// executed: it will be, and match again. One that accesses a port has matched for good, as
    /// whoever handles its exit carries it out.
    pub(crate) fn forget_matches(&mut self, before: u64) {
        let by_others =
            matches!(&self.cause, Cause::Exit(exit) if exit.reason == ExitReason::IoInstruction);
        if !by_others {
            self.state.pending_debug = before;
        }
    }

    /// Whether the instruction that [`Vcpu::execute_single`] executed took effect.
    pub(crate) fn has_completed(&self, stopped: bool) -> bool {
        !stopped || matches!(self.cause, Cause::ExitAfter(_))
    }

    /// The block at RIP, for the execution of its first instruction.
    pub(crate) fn single_block(&mut self) -> Result<*const Block, Stop> {
        let block = self.block()?;
        self.current = block;
        Ok(block)
    }
}
