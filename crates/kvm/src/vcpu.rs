//! A virtual processor: its shared face, its state, and the loop of KVM_RUN.
//!
//! [`Vcpu`] is what everybody sees; [`Core`] is what the thread in KVM_RUN owns, behind the
//! vCPU's lock as in the kernel: any other call on the vCPU waits until KVM_RUN returns.
//!
//! ```text
//! KVM_RUN ─ complete user-space I/O ─┬─ requests ─ inject ─ load root ─ gate ─ enter ─┐
//!                                    │                                                │ exit
//!                                    └────────────── exits::handle ◀── gate ◀─────────┘
//! ```

mod counters;
mod guest_mode;
mod injection;
mod offered;
mod progress;
mod requests;

pub(crate) use counters::Counters;

use crate::clock::RunDelay;
use crate::cpuid::{Dynamic, Table};
use crate::error::{Error, Result, fail};
use crate::events::{self, Events};
use crate::exits::{self, Outcome};
use crate::irqchip::lapic::{self, Effect, Illegal, LocalApic};
use crate::mailbox::{Kick, Mailbox};
use crate::mmio::Emulation;
use crate::msrs::{self, MsrState};
use crate::port_io::PortIo;
use crate::pv::ParavirtualPages;
use crate::run_area::RunArea;
use crate::signals;
use crate::time::GuestTsc;
use crate::vm::Vm;
use arch::control_registers::Rflags;
use arch::controls::{Interruptibility, PinControls, PrimaryControls, SecondaryControls};
use arch::cpuid::{Feature, Features};
use arch::exit::VmExit;
use arch::msr;
use arch::segment::SegmentName;
use cpu::{Controls, CpuState};
use kvm_bindings::*;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

impl Kick for cpu::Attention {
    fn kick(&self) {
        cpu::Attention::kick(self);
    }
}

/// Multiprocessing state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum MpState {
    Runnable = KVM_MP_STATE_RUNNABLE,
    Uninitialized = KVM_MP_STATE_UNINITIALIZED,
    InitReceived = KVM_MP_STATE_INIT_RECEIVED,
    Halted = KVM_MP_STATE_HALTED,
}

/// What the next KVM_RUN does before the guest runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Completion {
    /// Port I/O.
    PortIo,
    /// A fragment of an MMIO read.
    MmioRead,
    /// A fragment of an MMIO write.
    MmioWrite,
    /// A hypercall: its result goes to RAX.
    Hypercall,
    /// An RDMSR or WRMSR that user space decides.
    Msr { write: bool },
}

/// What the thread in KVM_RUN owns.
pub(crate) struct Core {
    pub(crate) cpu: Box<cpu::Vcpu>,
    pub(crate) mmu: mmu::Vcpu,
    pub(crate) controls: Controls,
    /// The VM has no EPT.
    pub(crate) has_shadow_paging: bool,
    pub(crate) faults_in_vain: exits::shadow::FaultsInVain,
    pub(crate) in_vain: progress::InVain,
    pub(crate) events: Events,
    pub(crate) msrs: MsrState,
    /// The VM's filter as of the last look at it.
    pub(crate) msr_filter: Option<Arc<crate::msr_filter::MsrFilter>>,
    pub(crate) cpuid: Table,
    pub(crate) features: Features,
    /// KVM_CAP_ENFORCE_PV_FEATURE_CPUID.
    pub(crate) enforces_paravirtual: bool,
    pub(crate) tsc: GuestTsc,
    pub(crate) mp_state: MpState,
    /// The halt is the processor's own business (KVM_X86_DISABLE_EXITS_HLT): to user space the
    /// vCPU runs.
    pub(crate) halted_in_guest: bool,
    pub(crate) completion: Option<Completion>,
    /// Length of the instruction that an MSR access or hypercall in progress is.
    pub(crate) exit_length: u64,
    pub(crate) emulation: Emulation,
    pub(crate) port_io: PortIo,
    pub(crate) paravirtual: ParavirtualPages,
    pub(crate) debug: crate::debug::GuestDebug,
    pub(crate) signal_mask: Option<u64>,
    pub(crate) counters: Counters,
    pub(crate) stats: Option<crate::stats::StatsFile>,
    /// An interrupt may be deliverable: look before the next entry.
    pub(crate) look_for_events: bool,
    /// IA32_APIC_BASE when no local APIC is in this process.
    pub(crate) apic_base: u64,
    pub(crate) sipi_vector: u8,
    /// A paravirtual kick came that has ended no halt yet. It may come between the guest's look at
    /// its lock and its HLT; the HLT must not sleep then.
    pub(crate) kicked: bool,
    pub(crate) smm: crate::smm::Smm,
    /// The guest has run: CPUID can no longer change.
    pub(crate) has_run: bool,
    /// Since the processor last executed nothing was changed that
    /// [`cpu::Vcpu::assume_unchanged`] does not allow: exits whose handlers keep to that, and
    /// nobody else had the lock.
    pub(crate) is_unchanged: bool,
    /// In guest mode, as the MMU sees it.
    pub(crate) in_guest_mode: bool,
}

/// A virtual processor.
pub(crate) struct Vcpu {
    id: u32,
    vm: Arc<Vm>,
    mailbox: Arc<Mailbox>,
    apic: Option<Arc<LocalApic>>,
    ring: Option<Arc<crate::dirty_ring::DirtyRing>>,
    run: RunArea,
    core: Mutex<Core>,
    /// KVM_RUN is in progress on some thread.
    running: AtomicBool,
    /// The processor of the host that the vCPU was on when it last went into guest mode.
    processor: AtomicUsize,
    /// The watch thread looks at this vCPU.
    pub(crate) is_watched: AtomicBool,
    /// KVM_SET_SIGNAL_MASK is in force.
    has_signal_mask: AtomicBool,
    run_delay: RunDelay,
}

impl std::fmt::Debug for Vcpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vcpu")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

/// Controls that hold for every entry.
fn initial_controls() -> Controls {
    let mut controls = Controls::new();
    controls.pin = PinControls::EXTERNAL_INTERRUPT_EXITING
        | PinControls::NMI_EXITING
        | PinControls::VIRTUAL_NMIS;
    controls.primary = PrimaryControls::HLT_EXITING
        | PrimaryControls::TSC_OFFSETTING
        | PrimaryControls::MWAIT_EXITING
        | PrimaryControls::MONITOR_EXITING
        | PrimaryControls::RDPMC_EXITING
        | PrimaryControls::CR8_LOAD_EXITING
        | PrimaryControls::CR8_STORE_EXITING
        | PrimaryControls::UNCONDITIONAL_IO_EXITING
        | PrimaryControls::USE_MSR_BITMAPS
        | PrimaryControls::SECONDARY;
    controls.secondary = SecondaryControls::ENABLE_EPT
        | SecondaryControls::ENABLE_VPID
        | SecondaryControls::UNRESTRICTED_GUEST
        | SecondaryControls::WBINVD_EXITING
        | SecondaryControls::TSC_SCALING
        | SecondaryControls::ENABLE_RDTSCP
        | SecondaryControls::ENABLE_INVPCID
        | SecondaryControls::ENABLE_XSAVES;
    controls.vpid = 1;
    *controls.msr_bitmap = msrs::bitmap(|_, _| false);
    controls
}

/// Makes a processor use an engine, and says once where the host does not let it.
fn choose_engine(cpu: &mut cpu::Vcpu, engine: cpu::Engine) {
    static SAID: std::sync::Once = std::sync::Once::new();
    cpu.set_engine(engine);
    if cpu.engine() != engine {
        SAID.call_once(|| {
            tracing::warn!("no executable memory is to be had: the interpreter runs instead");
        });
    }
}

impl Vcpu {
    /// A vCPU in its power-up state.
    pub(crate) fn new(vm: &Arc<Vm>, id: u32) -> Result<Arc<Vcpu>> {
        let mut cpu = cpu::Vcpu::new(&vm.machine)
            .map_err(|error| Error::new(error.raw_os_error().unwrap_or(libc::ENOMEM)))?;
        choose_engine(&mut cpu, vm.engine);
        cpu.state = CpuState::reset();
        let mailbox = Arc::new(Mailbox::new(cpu.attention()));
        let bootstrap = vm.is_bootstrap(id);
        let config = vm.apic_config();
        let apic =
            config.map(|config| LocalApic::new(id, bootstrap, config, mailbox.clone(), &vm.timers));
        let ring = vm.settings().dirty_ring as usize;
        let run = RunArea::new(id, vm.coalesced.memory(), ring)?;
        let ring = match ring {
            0 => None,
            bytes => Some(crate::dirty_ring::DirtyRing::new(
                &run,
                bytes as u32,
                vm.logs_pages(),
            )?),
        };
        let waits = apic.is_some() && !bootstrap;
        let mut apic_base = lapic::DEFAULT_BASE | msr::apic_base::ENABLE;
        if bootstrap {
            apic_base |= msr::apic_base::BSP;
        }
        let mut core = Core {
            cpu,
            mmu: vm.mmu.create_vcpu(id),
            controls: initial_controls(),
            has_shadow_paging: vm.mmu.config().shadow,
            faults_in_vain: Default::default(),
            in_vain: Default::default(),
            events: Events::default(),
            msrs: MsrState::new(),
            msr_filter: None,
            cpuid: Table::default(),
            features: Features::NONE,
            enforces_paravirtual: false,
            tsc: GuestTsc::host(),
            mp_state: if waits {
                MpState::Uninitialized
            } else {
                MpState::Runnable
            },
            halted_in_guest: false,
            completion: None,
            exit_length: 0,
            emulation: Emulation::default(),
            port_io: PortIo::default(),
            paravirtual: ParavirtualPages::default(),
            debug: crate::debug::GuestDebug::default(),
            signal_mask: None,
            counters: Counters::default(),
            stats: None,
            look_for_events: true,
            apic_base,
            sipi_vector: 0,
            kicked: false,
            smm: crate::smm::Smm::default(),
            has_run: false,
            is_unchanged: false,
            in_guest_mode: false,
        };
        if core.has_shadow_paging {
            exits::shadow::choose_controls(&mut core.controls);
        }
        if vm.logs_pages() {
            core.controls.secondary |= SecondaryControls::ENABLE_PML;
        }
        core.set_tsc(vm.initial_tsc());
        core.update_msr_bitmap(vm);
        Ok(Arc::new(Vcpu {
            id,
            vm: vm.clone(),
            mailbox,
            apic,
            ring,
            run,
            core: Mutex::new(core),
            running: AtomicBool::new(false),
            processor: AtomicUsize::new(0),
            is_watched: AtomicBool::new(false),
            has_signal_mask: AtomicBool::new(false),
            run_delay: RunDelay::default(),
        }))
    }

    /// The vCPU's ID.
    pub(crate) fn id(&self) -> u32 {
        self.id
    }

    /// The VM.
    pub(crate) fn vm(&self) -> &Arc<Vm> {
        &self.vm
    }

    /// The mailbox.
    pub(crate) fn mailbox(&self) -> &Mailbox {
        &self.mailbox
    }

    /// The mailbox, shared.
    pub(crate) fn shared_mailbox(&self) -> Arc<Mailbox> {
        self.mailbox.clone()
    }

    /// The local APIC, if it is in this process.
    pub(crate) fn apic(&self) -> Option<&Arc<LocalApic>> {
        self.apic.as_ref()
    }

    /// The dirty ring, if the VM has rings.
    pub(crate) fn dirty_ring(&self) -> Option<&Arc<crate::dirty_ring::DirtyRing>> {
        self.ring.as_ref()
    }

    /// The memory shared with user space.
    pub(crate) fn run_area(&self) -> &RunArea {
        &self.run
    }

    /// The vCPU's lock, waiting for a KVM_RUN in progress.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Core> {
        let mut core = self.lock_unchanged();
        core.is_unchanged = false;
        core
    }

    /// The vCPU's lock, to go on running.
    fn lock_unchanged(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `kvm_run`, for the thread that holds the vCPU's lock (which `_core` proves).
    #[allow(
        clippy::mut_from_ref,
        reason = "the lock that `_core` proves makes it exclusive"
    )]
    pub(crate) fn kvm_run(&self, _core: &Core) -> &mut kvm_run {
        // SAFETY: the caller holds the vCPU's lock, under which alone this reference is made, and
        // uses one at a time.
        unsafe { self.run.get() }
    }

    /// What the scheduler takes from the vCPU's thread.
    pub(crate) fn run_delay(&self) -> &RunDelay {
        &self.run_delay
    }

    /// Whether KVM_RUN is in progress.
    pub(crate) fn is_running(&self) -> bool {
        self.running.load(Ordering::Relaxed)
    }

    /// The processor of the host that a running vCPU is on, as of its last entry.
    pub(crate) fn processor(&self) -> usize {
        self.processor.load(Ordering::Relaxed)
    }

    /// Notes the processor that the calling thread, the vCPU's, is on.
    fn note_processor(&self) {
        // SAFETY: has no conditions.
        let processor = unsafe { libc::sched_getcpu() };
        self.processor
            .store(processor.max(0) as usize, Ordering::Relaxed);
    }

    /// Whether the watch thread should make the vCPU look for a reason to leave.
    pub(crate) fn wants_look(&self) -> bool {
        self.run.immediate_exit() || self.has_signal_mask.load(Ordering::Relaxed)
    }

    /// KVM_SET_SIGNAL_MASK.
    pub(crate) fn set_signal_mask(&self, mask: Option<u64>) {
        self.lock().signal_mask = mask;
        self.has_signal_mask
            .store(mask.is_some(), Ordering::Relaxed);
    }

    /// IA32_APIC_BASE.
    pub(crate) fn apic_base(&self, core: &Core) -> u64 {
        self.apic
            .as_ref()
            .map_or(core.apic_base, |apic| apic.base())
    }

    /// Sets IA32_APIC_BASE.
    pub(crate) fn set_apic_base(
        &self,
        core: &mut Core,
        value: u64,
        trusted: bool,
    ) -> std::result::Result<(), Illegal> {
        let Some(apic) = &self.apic else {
            core.apic_base = value;
            return Ok(());
        };
        let offered = trusted || core.features.has(Feature::X2APIC);
        apic.set_base(value, offered, core.cpuid.physical_bits(), trusted)
    }

    /// CR8.
    pub(crate) fn cr8(&self, core: &Core) -> u64 {
        self.apic
            .as_ref()
            .map_or(core.cpu.state.cr8, |apic| apic.cr8())
    }

    /// Sets CR8.
    pub(crate) fn set_cr8(&self, core: &mut Core, value: u64) {
        match &self.apic {
            Some(apic) => apic.set_cr8(value),
            None => core.cpu.state.cr8 = value & 0xf,
        }
    }

    /// Finishes what an access to the local APIC left to do.
    pub(crate) fn apply(&self, core: &mut Core, effect: Effect) {
        if effect == Effect::None {
            return;
        }
        let (Some(chip), Some(apic)) = (self.vm.irqchip(), &self.apic) else {
            return;
        };
        if let Some(vector) = chip.apply(effect, apic) {
            core.port_io.pending_eoi = Some(vector);
        }
    }

    /// KVM_RUN.
    pub(crate) fn run(&self) -> Result<()> {
        // Before the lock, so that it is dropped after it.
        let mut signals = signals::Run::begin(&self.mailbox);
        let mut core = guest_mode::Outside(self.lock_unchanged());
        self.vm.check_alive()?;
        signals.set_mask(core.signal_mask);
        let _ring = crate::dirty_ring::enter(self.ring.as_deref());
        self.running.store(true, Ordering::Relaxed);
        crate::watch::begin(self);
        let result = match core.sync_in(self) {
            Ok(()) => core.run(self),
            Err(error) => Err(error),
        };
        core.leave_guest_mode();
        self.running.store(false, Ordering::Relaxed);
        core.leave(self);
        result
    }
}

impl Core {
    /// Sets the guest's counter.
    pub(crate) fn set_tsc(&mut self, tsc: GuestTsc) {
        self.tsc = tsc;
        self.controls.tsc_offset = tsc.offset;
        self.controls.tsc_multiplier = tsc.multiplier;
    }

    /// Recomputes the MSR bitmap after the VM's filter changed.
    pub(crate) fn update_msr_bitmap(&mut self, vm: &Vm) {
        self.msr_filter = vm.settings().msr_filter.clone();
        let filter = &self.msr_filter;
        let filtered = |index, write| {
            filter
                .as_ref()
                .is_some_and(|filter| !filter.allows(index, write))
        };
        *self.controls.msr_bitmap = msrs::bitmap(filtered);
    }

    /// The state that CPUID reflects.
    pub(crate) fn dynamic_cpuid(&self, vcpu: &Vcpu) -> Dynamic {
        Dynamic {
            cr4: self.cpu.state.cr4,
            xcr0: self.cpu.state.xcr0.bits(),
            apic_base: vcpu.apic_base(self),
            misc_enable: self.msrs.get(msr::MISC_ENABLE),
            mwait_follows: vcpu.vm().cpuid_follows_misc_enable(),
            halts_in_guest: vcpu.vm().settings().halts_in_guest,
        }
    }

    /// Whether the guest's CPUID shows MONITOR and MWAIT.
    pub(crate) fn has_mwait(&self, vcpu: &Vcpu) -> bool {
        let shown = Features::read(|leaf, subleaf| {
            self.cpuid
                .execute(leaf, subleaf, &|| self.dynamic_cpuid(vcpu))
        });
        shown.has(Feature::MONITOR)
    }

    /// Whether the guest has a paravirtual feature (a bit of [`crate::cpuid::pv`]): all of them,
    /// unless CPUID's word is to be taken for it.
    pub(crate) fn offers_paravirtual(&self, feature: u32) -> bool {
        !self.enforces_paravirtual || self.cpuid.paravirtual() & feature != 0
    }

    /// Whether the guest runs 64-bit code.
    pub(crate) fn is_64bit(&self) -> bool {
        let state = &self.cpu.state;
        let cs = &state.segments[SegmentName::Cs as usize];
        state.long_mode() && cs.access.has(arch::segment::AccessRights::L)
    }

    /// The linear address of the instruction at RIP.
    pub(crate) fn linear_rip(&self) -> u64 {
        let state = &self.cpu.state;
        if self.is_64bit() {
            return state.rip;
        }
        let base = state.segments[SegmentName::Cs as usize].base;
        base.wrapping_add(state.rip) & 0xffff_ffff
    }

    /// Moves past the instruction that exited.
    pub(crate) fn skip(&mut self, exit: &VmExit) {
        self.skip_bytes(exit.instruction_length as u64);
    }

    /// Moves past an instruction of `length` bytes, with the effects that its retirement has.
    pub(crate) fn skip_bytes(&mut self, length: u64) {
        let wide = self.is_64bit();
        let state = &mut self.cpu.state;
        let rip = state.rip.wrapping_add(length);
        state.rip = if wide { rip } else { rip & 0xffff_ffff };
        state.interruptibility -= Interruptibility::STI | Interruptibility::MOV_SS;
        let flags = state.rflags_rest;
        state.rflags_rest = flags & !Rflags::RF.bits();
        // What waited behind MOV SS is reported with the instruction's own trap.
        let waited = state.pending_debug;
        if self.debug.single_step() {
            self.debug.stepped = true;
        } else if flags & Rflags::TF.bits() != 0 {
            self.raise_single_step(waited);
        }
    }

    /// A #DB for the single step that an instruction handled here completed.
    fn raise_single_step(&mut self, waited: u64) {
        use arch::control_registers::Dr6;
        let hits = waited & (Dr6::B0 | Dr6::B1 | Dr6::B2 | Dr6::B3).bits();
        self.events.raise(events::PendingException {
            vector: arch::exception::Exception::Debug.vector(),
            error_code: None,
            payload: Some(Dr6::BS.bits() | hits),
        });
    }

    /// Queues an exception without error code.
    pub(crate) fn raise(&mut self, exception: arch::exception::Exception) {
        let error_code = exception.has_error_code().then_some(0);
        let vector = exception.vector();
        self.events.raise(events::PendingException {
            vector,
            error_code,
            payload: None,
        });
    }

    fn run(&mut self, vcpu: &Vcpu) -> Result<()> {
        self.cpu.entered_from_user();
        if self.mp_state == MpState::Uninitialized {
            return self.wait_for_startup(vcpu);
        }
        if let Some(completion) = self.completion.take() {
            match exits::complete(self, vcpu, completion) {
                Outcome::Resume => {}
                other => return self.finish(vcpu, other),
            }
            // A step by user space is over when its instruction is.
            if std::mem::take(&mut self.debug.stepped) {
                let outcome = exits::step_exit(self, vcpu);
                return self.finish(vcpu, outcome);
            }
        }
        if let Some(vector) = self.port_io.pending_eoi.take() {
            let outcome = exits::ioapic_eoi(self, vcpu, vector);
            return self.finish(vcpu, outcome);
        }
        // `exit_reason` stays: a caller that only completes its I/O still has that to read.
        if vcpu.run_area().immediate_exit() {
            return fail(libc::EINTR);
        }
        if self.signal_pending(vcpu) {
            return self.finish(vcpu, Outcome::Interrupted);
        }
        self.has_run = true;
        self.follow_run_delay(vcpu);
        loop {
            let outcome = if self.mp_state == MpState::Runnable {
                self.enter(vcpu)
            } else {
                self.block(vcpu)
            };
            let outcome = match outcome {
                Outcome::Resume => self.between_entries(vcpu),
                other => other,
            };
            if outcome != Outcome::Resume {
                return self.finish(vcpu, outcome);
            }
        }
    }

    /// What ends KVM_RUN besides exits.
    fn between_entries(&mut self, vcpu: &Vcpu) -> Outcome {
        if let Some(vector) = self.port_io.pending_eoi.take() {
            return exits::ioapic_eoi(self, vcpu, vector);
        }
        if std::mem::take(&mut self.debug.stepped) {
            return exits::step_exit(self, vcpu);
        }
        if self.interrupt_window_wanted(vcpu) {
            vcpu.kvm_run(self).exit_reason = KVM_EXIT_IRQ_WINDOW_OPEN;
            self.counters.irq_window_exits += 1;
            return Outcome::Exit;
        }
        Outcome::Resume
    }

    /// User space wants to inject an interrupt, and can.
    fn interrupt_window_wanted(&self, vcpu: &Vcpu) -> bool {
        vcpu.kvm_run(self).request_interrupt_window != 0
            && vcpu.vm().has_user_pic()
            && self.ready_for_interrupt(vcpu)
    }

    /// Turns an outcome into KVM_RUN's result.
    fn finish(&mut self, vcpu: &Vcpu, outcome: Outcome) -> Result<()> {
        match outcome {
            Outcome::Resume | Outcome::Exit => Ok(()),
            Outcome::Interrupted => {
                self.counters.signal_exits += 1;
                vcpu.kvm_run(self).exit_reason = KVM_EXIT_INTR;
                fail(libc::EINTR)
            }
            Outcome::Fail(errno) => fail(errno),
        }
    }

    /// A processor that has not been started waits for INIT and SIPI inside KVM_RUN.
    fn wait_for_startup(&mut self, vcpu: &Vcpu) -> Result<()> {
        if vcpu.run_area().immediate_exit() {
            return fail(libc::EINTR);
        }
        match self.block(vcpu) {
            Outcome::Resume => fail(libc::EAGAIN),
            other => self.finish(vcpu, other),
        }
    }

    /// One entry and its exit.
    fn enter(&mut self, vcpu: &Vcpu) -> Outcome {
        if !vcpu.mailbox().is_empty() {
            self.leave_guest_mode();
            let outcome = self.requests(vcpu);
            if outcome != Outcome::Resume || self.mp_state != MpState::Runnable {
                return outcome;
            }
        }
        if vcpu.dirty_ring().is_some_and(|ring| ring.is_nearly_full()) {
            vcpu.kvm_run(self).exit_reason = KVM_EXIT_DIRTY_RING_FULL;
            return Outcome::Exit;
        }
        self.controls.interruption_info = Default::default();
        if self.look_for_events || self.events.any() {
            self.leave_guest_mode();
            let outcome = self.inject(vcpu);
            if outcome != Outcome::Resume {
                return outcome;
            }
        }
        match self.enter_guest_mode(vcpu) {
            Ok(true) => {}
            Ok(false) => {
                self.give_back_injection();
                return Outcome::Resume;
            }
            Err(outcome) => return outcome,
        }
        let start = self.place();
        let exit = self.enter_processor(vcpu);
        self.counters.exits += 1;
        self.counters.by_reason.count(exit.reason);
        self.take_back_event(&exit);
        self.collect_from_guest(vcpu);
        if let Some(error) = self.watch_progress(vcpu, &start, &exit) {
            return error;
        }
        exits::handle(self, vcpu, &exit)
    }

    /// What user space finds in `kvm_run` after any exit.
    fn leave(&mut self, vcpu: &Vcpu) {
        let ready = self.ready_for_interrupt(vcpu);
        let state = &self.cpu.state;
        let run = vcpu.kvm_run(self);
        run.if_flag = (state.rflags() & Rflags::IF.bits() != 0) as u8;
        run.flags = if state.smm { KVM_RUN_X86_SMM as u16 } else { 0 };
        run.cr8 = vcpu.cr8(self);
        run.apic_base = vcpu.apic_base(self);
        run.ready_for_interrupt_injection = (ready || !vcpu.vm().has_user_pic()) as u8;
        self.sync_out(vcpu);
        if let Some(stats) = &self.stats {
            stats.update(self.counters.named().into_iter().map(|(_, value)| value));
        }
        vcpu.vm().update_stats();
    }

    /// KVM_GET_STATS_FD.
    pub(crate) fn stats_descriptor(&mut self, vcpu: &Vcpu) -> Result<std::os::fd::OwnedFd> {
        let named = self.counters.named();
        if self.stats.is_none() {
            let names: Vec<_> = named.iter().map(|(name, _)| *name).collect();
            let id = format!("kvm-{}/vcpu-{}", std::process::id(), vcpu.id());
            self.stats = Some(crate::stats::StatsFile::new(&id, &names)?);
        }
        let stats = self.stats.as_ref().ok_or(crate::Error::new(libc::ENOMEM))?;
        stats.update(named.into_iter().map(|(_, value)| value));
        stats.descriptor()
    }

    /// Reads registers that user space put into `kvm_run` (KVM_CAP_SYNC_REGS, and CR8 when the
    /// local APIC is its own).
    fn sync_in(&mut self, vcpu: &Vcpu) -> Result<()> {
        let run = vcpu.kvm_run(self);
        let (valid, dirty, cr8) = (run.kvm_valid_regs, run.kvm_dirty_regs, run.cr8);
        let known = KVM_SYNC_X86_VALID_FIELDS as u64;
        if valid & !known != 0 || dirty & !known != 0 {
            return fail(libc::EINVAL);
        }
        if dirty != 0 {
            self.is_unchanged = false;
            // SAFETY: `s` holds plain data of which every bit pattern is valid.
            let regs = unsafe { run.s.regs };
            if dirty & KVM_SYNC_X86_REGS as u64 != 0 {
                self.set_regs(&regs.regs);
            }
            if dirty & KVM_SYNC_X86_SREGS as u64 != 0 {
                self.set_sregs(vcpu, &regs.sregs)?;
            }
            if dirty & KVM_SYNC_X86_EVENTS as u64 != 0 {
                self.set_vcpu_events(vcpu, &regs.events)?;
            }
            vcpu.kvm_run(self).kvm_dirty_regs = 0;
        }
        if vcpu.apic().is_none() {
            if cr8 > 0xf {
                return fail(libc::EINVAL);
            }
            self.cpu.state.cr8 = cr8;
            self.look_for_events = true;
        }
        self.look_for_events |= vcpu.kvm_run(self).request_interrupt_window != 0;
        Ok(())
    }

    fn sync_out(&mut self, vcpu: &Vcpu) {
        let valid = vcpu.kvm_run(self).kvm_valid_regs;
        if valid == 0 {
            return;
        }
        let regs = self.regs();
        let sregs = self.sregs(vcpu);
        let events = self.vcpu_events(vcpu);
        let run = vcpu.kvm_run(self);
        // SAFETY: `s` holds plain data of which every bit pattern is valid.
        let sync = unsafe { &mut run.s.regs };
        if valid & KVM_SYNC_X86_REGS as u64 != 0 {
            sync.regs = regs;
        }
        if valid & KVM_SYNC_X86_SREGS as u64 != 0 {
            sync.sregs = sregs;
        }
        if valid & KVM_SYNC_X86_EVENTS as u64 != 0 {
            sync.events = events;
        }
    }
}
