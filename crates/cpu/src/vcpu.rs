//! One virtual processor: its parts, and what follows from its registers.

use crate::code::{Block, CodeCache, CodeMode, JumpKey};
use crate::controls::Controls;
use crate::event::{Event, Fault};
use crate::machine::{Attention, Machine, request};
use crate::op::Stop;
use crate::second_stage::SecondStage;
use crate::state::CpuState;
use crate::statistics::Statistics;
use crate::tlb::{Class, Space, Tlb};
use crate::translator::{Engine, Hot, Translator};
use crate::vector::Stubs;
use arch::control_registers::{Cr0, Cr4, Dr7, Efer, Rflags};
use arch::controls::Eptp;
use arch::cpuid::{Feature, Features};
use arch::exception::Exception;
use arch::exit::VmExit;
use arch::paging::{Access, GuestControls, GuestPaging, GuestRoot};
use arch::segment::{AccessRights, Segment, SegmentName};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Answers to accesses that EPT does not map normally, while one instruction is emulated.
pub trait Bus {
    /// Reads `data.len()` bytes (up to 4096, never crossing a page) of guest-physical memory.
    fn read(&mut self, gpa: u64, data: &mut [u8]) -> BusResponse;
    /// Writes guest-physical memory, likewise.
    fn write(&mut self, gpa: u64, data: &[u8]) -> BusResponse;
    /// A locked write of up to 16 bytes: `new` is written if the bytes there are `old`, at once and
    /// atomically; `old` holds what was found. After success the processor accesses nothing any
    /// more. A device knows no such thing and takes the write.
    fn compare_exchange(&mut self, gpa: u64, old: &mut [u8], new: &[u8]) -> BusResponse {
        let _ = old;
        self.write(gpa, new)
    }
    /// Whether ports are on this bus, too: INS and OUTS are emulated with it then, instead of
    /// exiting, one element at a time.
    fn has_ports(&self) -> bool {
        false
    }
    /// Reads a port, of up to four bytes.
    fn read_port(&mut self, port: u16, data: &mut [u8]) -> BusResponse {
        let _ = (port, data);
        BusResponse::Fault
    }
    /// Writes a port. The processor accesses nothing any more then.
    fn write_port(&mut self, port: u16, data: &[u8]) -> BusResponse {
        let _ = (port, data);
        BusResponse::Fault
    }
}

/// How a [`Bus`] access went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BusResponse {
    /// Done.
    Done,
    /// The data is not there yet: the instruction is abandoned without effect and will be
    /// emulated again from the start.
    Later,
    /// The memory cannot be accessed.
    Fault,
}

/// The page translation that an exit has established for the instruction to be emulated.
///
/// Data accesses to the linear page go to the bus at that guest-physical page with no second walk
/// of the guest's tables, which the guest may have changed since.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MmioHint {
    /// A linear address in the page.
    pub gva: u64,
    /// A guest-physical address in the page it translates to.
    pub gpa: u64,
}

/// How the emulation of one instruction ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Emulated {
    /// It completed, or an exception it raised was delivered to the guest. One iteration of a
    /// repeated string instruction counts as completion.
    Done,
    /// The bus said [`BusResponse::Later`]; registers are as they were.
    Later,
    /// It exited instead.
    Exit(VmExit),
    /// It cannot be emulated: it could not be fetched, or is unknown.
    Unhandled,
    /// The bus said [`BusResponse::Fault`].
    BusFault,
}

/// Watches instructions that [`Vcpu::step`] executes.
pub trait Observer {
    /// An instruction is about to execute; `bytes` is its encoding.
    fn instruction(&mut self, state: &CpuState, bytes: &[u8]);
    /// Data was read or written.
    fn memory(&mut self, gva: u64, data: &[u8], write: bool);
    /// Control went somewhere other than the next instruction.
    fn branch(&mut self, from: u64, to: u64);
}

/// What cached translations to drop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flush {
    /// All of them.
    All,
    /// Linear and combined translations of the current address spaces.
    Guest,
    /// Everything derived from EPT entries of a guest-physical range.
    Gpa {
        /// First address.
        start: u64,
        /// Bytes.
        len: u64,
    },
    /// Translations of one linear page.
    Linear(u64),
}

/// Why an instruction stopped.
#[derive(Clone, Debug)]
pub(crate) enum Cause {
    None,
    Exception(Fault),
    /// INT n, INT3, INTO or INT1 is to be delivered.
    Software(Event),
    Exit(VmExit),
    /// A trap-like exit: the instruction completed.
    ExitAfter(VmExit),
    /// The instruction has done nothing and is to be executed again as a single step, because
    /// something must happen right behind it.
    Alone,
    Later,
    BusFault,
    Unhandled,
}

/// A software processor.
#[repr(C)]
pub struct Vcpu {
    /// Guest state. Outside [`Vcpu::enter`] it may be changed freely; the next entry looks at all
    /// of it again.
    pub state: CpuState,
    /// What generated code touches besides.
    pub(crate) hot: Hot,
    pub(crate) translator: Option<Box<Translator>>,
    /// Low bits of the TLB tags that data accesses match now.
    pub(crate) context: u64,
    /// Low bits of the TLB tags that fetches match now.
    pub(crate) fetch_context: u64,
    pub(crate) jump_key: JumpKey,
    /// Instructions until the loop looks at the clock.
    pub(crate) countdown: i64,
    /// What `countdown` last started from.
    pub(crate) countdown_start: i64,
    pub(crate) tlb: Tlb,
    pub(crate) second_stage: SecondStage,
    pub(crate) code: CodeCache,
    pub(crate) stubs: Stubs,
    pub(crate) machine: Arc<Machine>,
    pub(crate) attention: Arc<Attention>,
    controls: *const Controls,

    // What follows from `state` and controls.
    /// The controls enable EPT.
    has_ept: bool,
    pub(crate) paging: GuestPaging,
    /// What `paging` was made from.
    paging_selected: GuestControls,
    pub(crate) code_mode: CodeMode,
    /// EFER.LMA.
    pub(crate) long_mode: bool,
    /// 64-bit code.
    pub(crate) long64: bool,
    /// CPL 3.
    pub(crate) user: bool,
    /// Supervisor data accesses may touch user pages.
    pub(crate) supervisor_reaches_user: bool,

    /// The features whose instructions execute.
    pub(crate) features: Features,
    /// The features that the guest sees.
    pub(crate) shown: Features,
    pub(crate) maxphyaddr: u8,
    pub(crate) bus: Option<NonNull<dyn Bus>>,
    pub(crate) observer: Option<NonNull<dyn Observer>>,
    pub(crate) mmio_hint: Option<MmioHint>,
    pub(crate) more_hints: Vec<MmioHint>,
    pub(crate) cause: Cause,
    /// The event whose delivery is under way.
    pub(crate) vectoring: Option<Event>,
    /// An IRET that unblocked NMIs is executing.
    pub(crate) unblocking_nmi: bool,
    /// The instruction that executes is a single step.
    pub(crate) alone: bool,
    /// The next instruction is to be a single step.
    pub(crate) step_alone: bool,
    /// Offset and size of a write to the APIC-access page by the instruction that executes.
    pub(crate) apic_write: Option<(u32, usize)>,
    /// The instruction that executes asserted a bus lock.
    pub(crate) bus_lock: bool,
    /// The instruction that executes has decided about the single-step trap behind it.
    pub(crate) has_stepped: bool,
    /// The EPT pointer that VMFUNC loaded.
    pub(crate) switched_eptp: Option<Eptp>,
    /// Since when events have followed each other without an instruction, in time-stamp ticks.
    pub(crate) windowless_since: Option<u64>,
    /// A virtual interrupt is recognized.
    pub(crate) has_virtual_interrupt: bool,
    /// Preemption-timer deadline in host time-stamp ticks.
    pub(crate) preemption_deadline: Option<u64>,
    pub(crate) pause_loop: PauseLoop,
    pub(crate) host_fault_gpa: Option<u64>,
    /// The last failure of the second stage was about the access itself, not about a guest
    /// paging-structure entry.
    pub(crate) failed_on_access: bool,
    /// The access that the second stage failed.
    pub(crate) failed_access: Access,
    pub(crate) interrupted_read: Option<usize>,
    /// What [`Attention::in_guest`] says, for this thread.
    in_guest: bool,
    /// [`Vcpu::assume_unchanged`] was called for the next entry or emulation.
    pub(crate) is_unchanged: bool,
    /// What follows from `state` was computed anew since this was last cleared.
    pub(crate) contexts_updated: bool,
    pub(crate) current: *const Block,
    pub(crate) statistics: Statistics,
}

/// The context of cached jumps to supervisor code in every address space: a number that no space
/// has.
const KERNEL_JUMPS: u64 = 1023 << 2 | Class::Supervisor as u64;

/// Bits of control registers that translations depend on, as [`Space::mode`] holds them.
const MODE_CR0: u64 = Cr0::PG.union(Cr0::WP).bits();
const MODE_CR4: u64 = Cr4::PSE
    .union(Cr4::PAE)
    .union(Cr4::SMEP)
    .union(Cr4::SMAP)
    .union(Cr4::PKE)
    .union(Cr4::LA57)
    .union(Cr4::PKS)
    .bits();
const MODE_EFER: u64 = Efer::NXE.union(Efer::LMA).bits();
const MODE_CR4_SHIFT: u32 = 1;
const MODE_EFER_SHIFT: u32 = 4;

const _: () = {
    let (cr4, efer) = (MODE_CR4 << MODE_CR4_SHIFT, MODE_EFER << MODE_EFER_SHIFT);
    assert!(MODE_CR0 & cr4 == 0 && MODE_CR0 & efer == 0 && cr4 & efer == 0);
};

/// The PAUSE-loop detector.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PauseLoop {
    pub last: u64,
    pub first: u64,
}

// SAFETY: the raw pointers are either into the processor's own boxes or set only while a call
// that borrows their target runs.
unsafe impl Send for Vcpu {}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.rest();
        self.machine.remove_processor(&self.attention);
    }
}

impl Vcpu {
    /// A processor in its reset state, offering every feature of this host. The error is the host's,
    /// which has no memory for generated code.
    pub fn new(machine: &Arc<Machine>) -> std::io::Result<Box<Vcpu>> {
        crate::faults::install();
        let state = CpuState::reset();
        let paging_selected = GuestControls {
            cr0: state.cr0,
            cr4: state.cr4,
            efer: state.efer,
            physical_bits: 46,
            has_1g_pages: true,
            has_pse36: true,
        };
        let mut cpu = Box::new(Vcpu {
            state,
            hot: Hot::default(),
            translator: None,
            context: 0,
            fetch_context: 0,
            jump_key: JumpKey::new(0, CodeMode::Bits16, 0),
            countdown: 0,
            countdown_start: 0,
            tlb: Tlb::new(),
            second_stage: SecondStage::new(),
            code: CodeCache::new(),
            stubs: Stubs::new()?,
            machine: machine.clone(),
            attention: machine.add_processor(),
            controls: core::ptr::null(),
            has_ept: false,
            paging: GuestPaging::new(&paging_selected),
            paging_selected,
            code_mode: CodeMode::Bits16,
            long_mode: false,
            long64: false,
            user: false,
            supervisor_reaches_user: true,
            features: Vcpu::host_features(),
            shown: Vcpu::host_features(),
            maxphyaddr: 46,
            bus: None,
            observer: None,
            mmio_hint: None,
            more_hints: Vec::new(),
            cause: Cause::None,
            vectoring: None,
            unblocking_nmi: false,
            alone: false,
            step_alone: false,
            apic_write: None,
            bus_lock: false,
            has_stepped: false,
            switched_eptp: None,
            windowless_since: None,
            has_virtual_interrupt: false,
            preemption_deadline: None,
            pause_loop: PauseLoop::default(),
            host_fault_gpa: None,
            failed_on_access: false,
            failed_access: Access::empty(),
            interrupted_read: None,
            in_guest: false,
            is_unchanged: false,
            contexts_updated: false,
            current: core::ptr::null(),
            statistics: Statistics::default(),
        });
        cpu.set_engine(Engine::from_environment());
        Ok(cpu)
    }

    /// The handle by which other threads interrupt this processor.
    pub fn attention(&self) -> Arc<Attention> {
        self.attention.clone()
    }

    /// Whether walks of the guest's tables and of EPT may start at tables that earlier ones reached. They may,
    /// unless a measurement or a test wants to know what that is worth.
    pub fn use_walk_caches(&mut self, on: bool) {
        self.tlb.walks.enable(on);
        self.second_stage.walk_cache.enable(on);
    }

    /// Drops cached translations.
    pub fn flush(&mut self, flush: Flush) {
        match flush {
            Flush::All => {
                self.tlb.flush();
                self.second_stage.flush();
            }
            Flush::Guest => self.tlb.flush(),
            Flush::Gpa { start, len } => {
                self.second_stage.flush_range(start, len);
                self.tlb.flush();
            }
            Flush::Linear(gva) => self.tlb.flush_page(gva),
        }
    }

    /// The program that owns guest memory had control since the last entry: cached code is
    /// compared with memory before it runs again.
    pub fn entered_from_user(&mut self) {
        self.code.memory_may_have_changed();
        self.update_jump_key();
    }

    /// Goes into guest mode, and does what other processors asked for meanwhile: before anything
    /// is stored through translations that they may have asked to drop.
    pub(crate) fn begin(&mut self) {
        if !self.in_guest {
            self.in_guest = true;
            self.attention.enter_guest();
        }
        if self.attention.flags.load(Ordering::SeqCst) & request::QUEUE != 0 {
            self.serve_queue();
        }
    }

    /// Goes into guest mode ahead of the next entry or emulation, which is then spared a fence: the
    /// caller makes a sequentially consistent read-modify-write in between.
    pub fn announce(&mut self) {
        if !self.in_guest {
            self.in_guest = true;
            self.attention.announce();
        }
    }

    /// Leaves guest mode until the next entry or emulation.
    ///
    /// An exit alone does not leave it, since the next entry usually follows at once: other
    /// processors that decode new code go on expecting this one to answer, and compare that code
    /// with memory at each execution as long as it does not. Call this before waiting for
    /// something.
    pub fn rest(&mut self) {
        if self.in_guest {
            self.in_guest = false;
            self.attention.leave_guest();
        }
    }

    /// The guest-physical address whose host memory the last exit could not touch, if that is why
    /// it exited.
    pub fn take_host_fault(&mut self) -> Option<u64> {
        self.host_fault_gpa.take()
    }

    /// Bytes of the read that ended the last entry with an EPT misconfiguration, if it was a read
    /// in one page, of data, by the instruction at RIP, and the first thing that the instruction
    /// will ask a [`Bus`] for.
    pub fn interrupted_read(&self) -> Option<usize> {
        self.interrupted_read
    }

    /// The EPT pointer that the guest last loaded by VMFUNC, since the last call: the new value of
    /// [`Controls::eptp`], which the next entry takes from there.
    pub fn take_switched_eptp(&mut self) -> Option<Eptp> {
        self.switched_eptp.take()
    }

    /// After an EPT violation or misconfiguration on a table of the guest's: the access that the
    /// tables were walked for, of which the exit does not tell.
    pub fn interrupted_walk(&self) -> Option<Access> {
        (!self.failed_on_access).then_some(self.failed_access)
    }

    /// Whether the page-modification log has entries.
    #[inline(always)]
    pub fn has_page_modifications(&self) -> bool {
        self.second_stage
            .pml
            .as_ref()
            .is_some_and(|log| !log.is_empty())
    }

    /// The page-modification log: page addresses whose EPT dirty flag was set, oldest first. The
    /// log is empty afterwards.
    pub fn take_page_modification_log(&mut self) -> Vec<u64> {
        self.second_stage
            .pml
            .as_mut()
            .map(std::mem::take)
            .unwrap_or_default()
    }

    /// How many instructions were begun: a cheap look at [`Vcpu::statistics`].
    #[inline]
    pub fn instructions(&self) -> u64 {
        let done = self.countdown_start - self.countdown;
        self.statistics.instructions.wrapping_add_signed(done)
    }

    /// Counts so far.
    pub fn statistics(&self) -> Statistics {
        Statistics {
            instructions: self.instructions(),
            tlb_lookups: self.statistics.tlb_lookups + self.statistics.block_lookups,
            second_stage_walks: self.second_stage.walks,
            ..self.statistics
        }
    }

    /// The controls of the entry under way.
    #[inline(always)]
    pub(crate) fn controls(&self) -> &Controls {
        // SAFETY: set from a reference that outlives the entry; null at no time that guest code
        // runs. `with_controls` is the only way in.
        unsafe { &*self.controls }
    }

    /// Runs `f` with `controls` in force.
    pub(crate) fn with_controls<R>(
        &mut self,
        controls: &Controls,
        f: impl FnOnce(&mut Vcpu) -> R,
    ) -> R {
        self.controls = controls;
        let result = f(self);
        self.controls = core::ptr::null();
        result
    }

    /// Stops the current instruction for `cause`.
    #[cold]
    pub(crate) fn stop_with(&mut self, cause: Cause) -> Stop {
        self.cause = cause;
        Stop
    }

    /// Stops the current instruction with an exception without error code.
    #[cold]
    pub(crate) fn raise(&mut self, exception: Exception) -> Stop {
        self.stop_with(Cause::Exception(Fault {
            exception,
            error_code: None,
            address: 0,
        }))
    }

    /// Stops the current instruction with an exception that has an error code.
    #[cold]
    pub(crate) fn raise_code(&mut self, exception: Exception, error_code: u32) -> Stop {
        let error_code = Some(error_code);
        self.stop_with(Cause::Exception(Fault {
            exception,
            error_code,
            address: 0,
        }))
    }

    /// #GP(0).
    #[cold]
    pub(crate) fn general_protection(&mut self) -> Stop {
        self.raise_code(Exception::GeneralProtection, 0)
    }

    /// #UD.
    #[cold]
    pub(crate) fn undefined(&mut self) -> Stop {
        self.raise(Exception::InvalidOpcode)
    }

    /// #PF.
    #[cold]
    pub(crate) fn page_fault(&mut self, address: u64, error_code: u32) -> Stop {
        let error_code = Some(error_code);
        let exception = Exception::PageFault;
        self.stop_with(Cause::Exception(Fault {
            exception,
            error_code,
            address,
        }))
    }

    /// Whether the processor is in real mode.
    pub(crate) fn real_mode(&self) -> bool {
        !self.state.cr0.contains(Cr0::PE)
    }

    /// Whether the processor is in virtual-8086 mode.
    pub(crate) fn v86(&self) -> bool {
        self.state.rflags_rest & Rflags::VM.bits() != 0
    }

    /// Current privilege level.
    pub(crate) fn cpl(&self) -> u8 {
        self.state.cpl()
    }

    /// Whether segment loads follow real-mode rules (real and virtual-8086 mode).
    pub(crate) fn real_segments(&self) -> bool {
        self.real_mode() || self.v86()
    }

    /// Asks the loop to look at the processor's own pending business before the next block.
    pub(crate) fn request_own(&self) {
        self.attention
            .flags
            .fetch_or(request::OWN, Ordering::Relaxed);
    }

    /// A store hit decoded code: what is left of the running block may be stale.
    ///
    /// The block is dropped as well: the store may have hit another page than its own, whose
    /// report would leave it in the cache with every instruction ending it.
    pub(crate) fn code_changed(&mut self) {
        if !self.current.is_null() {
            // SAFETY: the running block is kept until the next lookup even when it is dropped.
            let block = unsafe { &*self.current };
            block.make_stale(crate::execute::stale);
            self.code.drop_page(block.hva & !0xfff);
            self.hot.leave = true;
            self.update_jump_key();
        }
    }

    /// Where the guest's tables start; without EPT, the host-owned ones.
    pub(crate) fn guest_root(&self) -> GuestRoot {
        if self.controls().ept() {
            return GuestRoot {
                cr3: self.state.cr3_base(),
                pdptes: self.state.pdptes,
            };
        }
        let shadow = &self.controls().shadow_root;
        if shadow.levels == 0 {
            return GuestRoot {
                cr3: self.state.cr3_base(),
                pdptes: self.state.pdptes,
            };
        }
        GuestRoot {
            cr3: shadow.root,
            pdptes: shadow.pdptes,
        }
    }

    /// What the TLB tags of this moment depend on.
    pub(crate) fn space(&self) -> Space {
        let controls = self.controls();
        let cr0 = self.state.cr0.bits() & MODE_CR0;
        let cr4 = self.state.cr4.bits() & MODE_CR4;
        let efer = self.state.efer.bits() & MODE_EFER;
        let paged = self.state.cr0.contains(Cr0::PG);
        let pcid = if self.state.cr4.contains(Cr4::PCIDE) {
            self.state.cr3 & 0xfff
        } else {
            0
        };
        let in_force = |control: Cr4, keys: u32| {
            if self.state.cr4.contains(control) {
                keys
            } else {
                0
            }
        };
        Space {
            vpid: controls.vpid,
            pcid: if paged { pcid as u16 } else { 0 },
            root: if controls.ept() {
                self.second_stage.eptp().root()
            } else {
                controls.shadow_root.root
            },
            mode: cr0 | cr4 << MODE_CR4_SHIFT | efer << MODE_EFER_SHIFT,
            keys: [
                in_force(Cr4::PKE, self.state.pkru),
                in_force(Cr4::PKS, self.state.msrs.pkrs as u32),
            ],
        }
    }

    /// Recomputes everything that follows from segments, control registers and EFER.
    pub(crate) fn update_mode(&mut self) {
        let cs = self.state.segments[SegmentName::Cs as usize].access;
        self.long_mode = self.state.efer.contains(Efer::LMA);
        self.long64 = self.long_mode && cs.has(AccessRights::L);
        self.code_mode = if self.long64 {
            CodeMode::Bits64
        } else if cs.has(AccessRights::DB) {
            CodeMode::Bits32
        } else {
            CodeMode::Bits16
        };
        self.user = self.cpl() == 3;
        for (name, base) in SegmentName::ALL
            .into_iter()
            .zip(self.state.segment_bases.iter_mut())
        {
            let flat = self.long64 && !matches!(name, SegmentName::Fs | SegmentName::Gs);
            *base = if flat {
                0
            } else {
                self.state.segments[name as usize].base
            };
        }
        self.state.regs[crate::state::slot::ZERO] = 0;
        self.update_paging();
    }

    /// Recomputes what follows from control registers alone, and the contexts.
    pub(crate) fn update_paging(&mut self) {
        let shadow = !self.controls().ept() && self.controls().shadow_root.levels != 0;
        let (mut cr0, mut cr4, mut efer) = (self.state.cr0, self.state.cr4, self.state.efer);
        let mut physical_bits: u32 = self.maxphyaddr.into();
        if shadow {
            // Host-owned tables are walked whatever the guest thinks of paging.
            cr0 |= Cr0::PG;
            cr4 |= Cr4::PAE;
            efer |= Efer::NXE;
            // Bit 51 is reserved: with it the owner of the tables marks pages without memory.
            physical_bits = 51;
            cr4.set(Cr4::LA57, self.controls().shadow_root.levels == 5);
            if !efer.contains(Efer::LMA) {
                // Outside IA-32e mode there are no keys, even if there is a PKRU to write.
                cr4 -= Cr4::PKE | Cr4::PKS;
            }
            efer.set(Efer::LMA, self.controls().shadow_root.levels >= 4);
        }
        let selected = GuestControls {
            cr0,
            cr4,
            efer,
            physical_bits,
            has_1g_pages: shadow || self.shows(Feature::PDPE1GB),
            has_pse36: self.shows(Feature::PSE36),
        };
        // Most entries change none of it.
        if selected != self.paging_selected {
            self.paging = GuestPaging::new(&selected);
            self.paging_selected = selected;
        }
        self.update_context();
    }

    /// Recomputes the TLB contexts: after a change of privilege, EFLAGS.AC, CR3 or PKRU, or when
    /// translations were dropped.
    pub(crate) fn update_context(&mut self) {
        let ac = self.state.rflags_rest & Rflags::AC.bits() != 0;
        self.supervisor_reaches_user = ac || !self.state.cr4.contains(Cr4::SMAP);
        let class = if self.user {
            Class::User
        } else if self.supervisor_reaches_user {
            Class::SupervisorUserData
        } else {
            Class::Supervisor
        };
        let space = self.space();
        self.has_ept = self.controls().ept();
        if !self.user && self.has_ept {
            self.tlb.enter_kernel(&space);
        }
        let space = self.tlb.space_bits(&space);
        let context = space | class as u64;
        let fetch = if self.user {
            Class::User
        } else {
            Class::Supervisor
        };
        self.fetch_context = space | fetch as u64;
        self.contexts_updated = true;
        self.context = if self.must_watch_accesses(ac) {
            context | Class::Slow as u64
        } else {
            context
        };
        self.select_table();
        self.update_jump_key();
    }

    /// Whether every data access must take the slow path: alignment checks, data breakpoints, an
    /// observer.
    fn must_watch_accesses(&self, ac: bool) -> bool {
        let aligned = ac && self.user && self.state.cr0.contains(Cr0::AM);
        aligned || self.observer.is_some() || self.watches_data()
    }

    /// Whether a data breakpoint is enabled.
    pub(crate) fn watches_data(&self) -> bool {
        use arch::control_registers::BreakpointCondition::{ReadWrite, Write};
        let dr7 = self.state.dr7;
        dr7.bits() & Dr7::ENABLES != 0
            && (0..4).any(|n| dr7.enabled(n) && matches!(dr7.condition(n), ReadWrite | Write))
    }

    /// Recomputes the key of the jump caches.
    pub(crate) fn update_jump_key(&mut self) {
        let generation = self.tlb.generation() + self.code.generation();
        // Supervisor code is mostly mapped by global pages: what was found once is good for every
        // process. The TLB says when it is not.
        let shared = !self.user && self.has_ept;
        let context = if shared {
            KERNEL_JUMPS
        } else {
            self.fetch_context
        };
        self.jump_key = JumpKey::new(context, self.code_mode, generation);
        self.hot.jump_salt = self.jump_key.salt();
    }

    /// Loads a segment register's hidden part as given.
    pub(crate) fn put_segment(&mut self, name: SegmentName, segment: Segment) {
        self.state.segments[name as usize] = segment;
        let flat = self.long64 && !matches!(name, SegmentName::Fs | SegmentName::Gs);
        self.state.segment_bases[name as usize] = if flat { 0 } else { segment.base };
    }

    /// Tells the observer of a data access.
    pub(crate) fn observe_access(&mut self, gva: u64, data: &[u8], write: bool) {
        if let Some(observer) = self.observer {
            // SAFETY: set only while `step` runs, from its argument.
            unsafe { &mut *observer.as_ptr() }.memory(gva, data, write);
        }
        if self.watches_data() {
            self.match_data_breakpoints(gva, data.len() as u64, write);
        }
    }
}
