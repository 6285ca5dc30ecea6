//! VM entry, single-instruction emulation, and queries from outside.

use crate::controls::Controls;
use crate::entry_checks;
use crate::event::Event;
use crate::op::Stop;
use crate::state::CoreState;
use crate::vcpu::{Bus, Cause, Emulated, MmioHint, Observer, Vcpu};
use arch::control_registers::Rflags;
use arch::controls::{
    Activity, Eptp, Interruptibility, PinControls, PrimaryControls, SecondaryControls,
};
use arch::exit::{ExitReason, VmExit};
use arch::interruption::InterruptionType;
use std::ptr::NonNull;

impl Vcpu {
    /// VM entry: injects the event that the controls name and runs the guest until it exits.
    ///
    /// Guest state that the entry checks refuse is an exit with [`ExitReason::InvalidGuestState`]
    /// and [`VmExit::entry_failure`].
    pub fn enter(&mut self, controls: &Controls) -> VmExit {
        self.with_controls(controls, |cpu| {
            if (!cpu.is_unchanged || cfg!(debug_assertions))
                && let Err(rule) = entry_checks::check(cpu)
            {
                return entry_checks::failure(rule);
            }
            cpu.prepare();
            cpu.statistics.entries += 1;
            cpu.begin();
            cpu.start_preemption_timer();
            cpu.settle_statistics();
            cpu.inject()
                .or_else(|| cpu.begin_virtual_apic())
                .unwrap_or_else(|| cpu.run())
        })
    }

    /// Promises that since the last exit or emulation nothing changed in the guest's state but
    /// general registers, RIP, RF, the status flags, interruptibility and pending debug
    /// exceptions, nothing in the controls but the event to inject and the windows, and that no
    /// translations were flushed. The next entry or emulation looks for nothing else.
    pub fn assume_unchanged(&mut self) {
        self.is_unchanged = true;
    }

    /// Gets ready to execute: recomputes everything that follows from state and controls, and
    /// drops what is left of the last entry.
    fn prepare(&mut self) {
        if !std::mem::take(&mut self.is_unchanged) {
            self.look_at_state();
        } else if cfg!(debug_assertions) {
            let derived = |cpu: &Vcpu| (cpu.context, cpu.fetch_context, cpu.jump_key);
            let before = derived(self);
            self.look_at_state();
            assert_eq!(derived(self), before, "something changed since the exit");
        }
        self.cause = Cause::None;
        self.vectoring = None;
        self.unblocking_nmi = false;
        self.step_alone = false;
        self.apic_write = None;
        self.bus_lock = false;
        self.windowless_since = None;
        self.host_fault_gpa = None;
        self.interrupted_read = None;
        if self.has_own_business() {
            self.request_own();
        }
    }

    fn look_at_state(&mut self) {
        let controls = self.controls();
        let eptp = controls.ept().then_some(controls.eptp);
        let apic_access = self
            .secondary(SecondaryControls::VIRTUALIZE_APIC_ACCESSES)
            .then_some(controls.apic_access);
        let log = self.secondary(SecondaryControls::ENABLE_PML);
        if self.select_eptp(eptp) | self.second_stage.set_apic_access(apic_access) {
            self.tlb.flush();
        }
        if log != self.second_stage.pml.is_some() {
            self.second_stage.pml = log.then(Vec::new);
            self.second_stage.flush();
            self.tlb.flush();
        }
        self.update_mode();
    }

    /// Selects the second stage's tables. Returns whether they changed.
    pub(crate) fn select_eptp(&mut self, eptp: Option<Eptp>) -> bool {
        let mode_based = self.secondary(SecondaryControls::MODE_BASED_EXECUTE);
        self.second_stage.select(eptp, mode_based)
    }

    /// Whether something that hangs on instruction boundaries must be looked at before the first
    /// one.
    fn has_own_business(&self) -> bool {
        self.state.pending_debug != 0
            || self.state.activity != Activity::Active
            || self.controls().pin.contains(PinControls::PREEMPTION_TIMER)
            || self.controls().primary.intersects(
                PrimaryControls::INTERRUPT_WINDOW_EXITING | PrimaryControls::NMI_WINDOW_EXITING,
            )
            || self.must_step()
    }

    /// Delivers the event to inject; the exit that this may end in.
    fn inject(&mut self) -> Option<VmExit> {
        let info = self.controls().interruption_info;
        if !info.is_valid() {
            return None;
        }
        if info.kind() == InterruptionType::Other {
            return Some(VmExit::new(ExitReason::MonitorTrapFlag));
        }
        let event = Event {
            vector: info.vector(),
            kind: info.kind(),
            error_code: info
                .has_error_code()
                .then(|| self.controls().interruption_error_code),
            length: if info.is_software() {
                self.controls().instruction_length
            } else {
                0
            },
        };
        self.state.activity = Activity::Active;
        // An entry leaves those of a software event only while MOV SS blocks.
        if !self
            .state
            .interruptibility
            .contains(Interruptibility::MOV_SS)
        {
            self.state.pending_debug = 0;
        }
        let exit = self.take_event(event).err();
        exit.or_else(|| self.monitor_trap())
    }

    /// Executes the one instruction at RIP, sending accesses to guest-physical memory that EPT
    /// does not map for them to `bus`.
    ///
    /// `hint` is the translation that an exit has established: data accesses to that linear page
    /// go to the bus without another walk.
    pub fn emulate(
        &mut self,
        controls: &Controls,
        hint: Option<MmioHint>,
        bus: &mut dyn Bus,
    ) -> Emulated {
        self.emulate_watched(controls, hint, bus, None)
    }

    /// Executes the one instruction at RIP like [`Vcpu::emulate`], telling `observer` of the
    /// instruction, its memory accesses and its control transfer.
    pub fn step(
        &mut self,
        controls: &Controls,
        bus: &mut dyn Bus,
        observer: &mut dyn Observer,
    ) -> Emulated {
        self.emulate_watched(controls, None, bus, Some(observer))
    }

    /// Further translations for the next call of [`Vcpu::emulate`], which forgets them: an
    /// instruction can access several pages that its owner's tables do not map.
    pub fn add_hint(&mut self, hint: MmioHint) {
        self.more_hints.push(hint);
    }

    fn emulate_watched(
        &mut self,
        controls: &Controls,
        hint: Option<MmioHint>,
        bus: &mut dyn Bus,
        observer: Option<&mut dyn Observer>,
    ) -> Emulated {
        self.with_controls(controls, |cpu| {
            cpu.mmio_hint = hint;
            // SAFETY: only the lifetime changes; both pointers are cleared before this call
            // returns, so neither outlives its borrow.
            cpu.bus = Some(unsafe {
                core::mem::transmute::<NonNull<dyn Bus + '_>, NonNull<dyn Bus>>(NonNull::from(bus))
            });
            cpu.observer = observer.map(|observer| {
                // SAFETY: as for the bus.
                unsafe {
                    core::mem::transmute::<NonNull<dyn Observer + '_>, NonNull<dyn Observer>>(
                        NonNull::from(observer),
                    )
                }
            });
            // An observer watches accesses that go unwatched otherwise.
            cpu.is_unchanged &= cpu.observer.is_none();
            cpu.prepare();
            cpu.begin();
            cpu.contexts_updated = false;
            let mut saved = CoreState::new();
            cpu.state.save_core(&mut saved);
            let result = cpu.emulate_one(&saved);
            cpu.mmio_hint = None;
            cpu.more_hints.clear();
            cpu.bus = None;
            if cpu.observer.take().is_some() {
                // What was learnt of code on pages that may not be executed must not be found
                // without an observer.
                cpu.tlb.flush();
            }
            result
        })
    }

    fn emulate_one(&mut self, saved: &CoreState) -> Emulated {
        let block = match self.single_block() {
            Ok(block) => block,
            Err(Stop) => return self.emulation_stopped(saved),
        };
        // SAFETY: the block is kept until the next lookup, which comes after its use.
        let block = unsafe { &*block };
        let op = &block.ops[0];
        if let Some(observer) = self.observer {
            let mut bytes = [0; 15];
            let bytes = &mut bytes[..op.len.min(15).into()];
            let linear = self.state.rip.wrapping_add(self.state.segment_bases[1]);
            if self.fetch_bytes(linear, bytes).is_err() {
                return self.emulation_stopped(saved);
            }
            // SAFETY: set by `emulate_watched` from its argument.
            unsafe { &mut *observer.as_ptr() }.instruction(&self.state, bytes);
        }
        let (next, from) = (self.next_rip(op), self.state.rip);
        let before = self.state.rflags_rest;
        let shadow =
            self.state.interruptibility & (Interruptibility::STI | Interruptibility::MOV_SS);
        let resume = self.state.rflags_rest & Rflags::RF.bits();
        self.state.interruptibility.remove(shadow);
        self.state.rflags_rest &= !resume;
        let pending = self.state.pending_debug;
        self.countdown -= 1;
        let stopped = self.execute_single(block);
        if self.has_completed(stopped) {
            self.single_step(before);
        } else {
            self.state.interruptibility.insert(shadow);
            self.state.rflags_rest |= resume;
            self.forget_matches(pending);
        }
        if stopped {
            return self.emulation_stopped(saved);
        }
        if let Some(exit) = self.exit_behind_instruction() {
            return Emulated::Exit(exit);
        }
        if self.state.rip != next
            && let Some(observer) = self.observer
        {
            // SAFETY: as above.
            unsafe { &mut *observer.as_ptr() }.branch(from, self.state.rip);
        }
        Emulated::Done
    }

    fn emulation_stopped(&mut self, saved: &CoreState) -> Emulated {
        match self.cause {
            Cause::Later => {
                self.restore(saved);
                Emulated::Later
            }
            Cause::BusFault => {
                self.restore(saved);
                Emulated::BusFault
            }
            Cause::Unhandled | Cause::None => {
                self.restore(saved);
                Emulated::Unhandled
            }
            _ => match self.stopped() {
                Some(exit) => Emulated::Exit(exit),
                None => Emulated::Done,
            },
        }
    }

    /// Puts registers back as they were before an abandoned instruction. Extended state is
    /// written only after the last access that can be abandoned.
    fn restore(&mut self, saved: &CoreState) {
        self.cause = Cause::None;
        self.state.restore_core(saved);
        if self.contexts_updated {
            self.update_mode();
        }
    }
}
