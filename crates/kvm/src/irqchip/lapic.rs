//! The local APIC: registers, priorities, acceptance and end of interrupt.
//!
//! One [`LocalApic`] per vCPU, shared: its own vCPU reads and writes registers and takes
//! vectors, any thread delivers to it. The registers are kept as the 1 KiB page that
//! KVM_GET_LAPIC shows, one 32-bit register every 16 bytes.
//!
//! Nothing here calls out with the lock held except to arm the timer and to post to the vCPU's
//! [`Mailbox`]; what must go elsewhere (an IPI, an EOI for the I/O APIC) is returned as an
//! [`Effect`].
//!
//! Source: SDM volume 3, "Advanced Programmable Interrupt Controller (APIC)".

mod registers;
mod task_priority;

use super::lapic_timer::ApicTimer;
use super::message::{Delivery, DeliveryMode, Message, Shorthand};
use crate::mailbox::{Mailbox, Request};
use crate::time::GuestTsc;
use crate::timers::{Expiry, Timer, Timers};
use arch::msr::apic_base;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

pub use arch::apic::reg;
pub use task_priority::TprAccess;
use task_priority::TprReports;

/// The xAPIC page's address at reset.
pub const DEFAULT_BASE: u64 = 0xfee0_0000;
/// APIC version 0x14 with six LVT entries.
const VERSION: u32 = 0x0005_0014;
/// Version bit: the spurious-vector register can suppress EOI broadcasts.
const VERSION_DIRECTED_EOI: u32 = 1 << 24;
const SVR_ENABLED: u32 = 1 << 8;
const SVR_DIRECTED_EOI: u32 = 1 << 12;
const LVT_MASKED: u32 = 1 << 16;
/// Writable bits of each LVT entry, from the timer on.
const LVT_WRITABLE: [u32; 6] = [0x7_00ff, 0x1_07ff, 0x1_07ff, 0x1_a7ff, 0x1_a7ff, 0x1_00ff];
/// ESR: a vector below 16 was sent.
const ESR_SEND_ILLEGAL: u32 = 1 << 5;
/// ESR: a vector below 16 was received.
const ESR_RECEIVE_ILLEGAL: u32 = 1 << 6;
/// ESR: a register that does not exist was accessed.
const ESR_ILLEGAL_REGISTER: u32 = 1 << 7;

/// What an access to the local APIC leaves to do elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// An end of interrupt for `vector` reached this APIC.
    Eoi {
        /// The vector whose service ended.
        vector: u8,
        /// It was level-triggered and EOI broadcasts are not suppressed.
        broadcast: bool,
    },
    /// Send this message.
    Ipi(Message),
}

/// The access was not legal: #GP for an x2APIC MSR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Illegal;

/// Properties fixed by the VM.
#[derive(Clone, Copy, Debug)]
pub struct ApicConfig {
    /// KVM_GET_LAPIC shows 32-bit x2APIC IDs.
    pub wide_ids: bool,
    /// The I/O APIC is outside and understands directed EOIs.
    pub directed_eoi: bool,
    /// A reset lets the 8259 through to the bootstrap processor (KVM_X86_QUIRK_LINT0_REENABLED).
    pub lint0_enabled: bool,
}

pub(super) struct State {
    page: [u32; 64],
    base: u64,
    /// ESR bits not yet moved to the register by a write to it.
    errors: u32,
    pub(super) timer: ApicTimer,
    config: ApicConfig,
}

/// What others must know to address this APIC, kept where no lock is needed.
struct Address {
    id: AtomicU32,
    ldr: AtomicU32,
    /// Bits below.
    mode: AtomicU32,
    /// IA32_APIC_BASE.
    base: AtomicU64,
}

const MODE_ENABLED: u32 = 1 << 0;
const MODE_X2APIC: u32 = 1 << 1;
const MODE_CLUSTER: u32 = 1 << 2;
const MODE_SOFTWARE_ENABLED: u32 = 1 << 3;

/// A local APIC.
pub struct LocalApic {
    /// APIC ID at reset: the vCPU's ID.
    initial_id: u32,
    bootstrap: bool,
    state: Mutex<State>,
    address: Address,
    mailbox: Arc<Mailbox>,
    timer: Timer,
    tpr_reports: TprReports,
}

impl State {
    fn get(&self, offset: u32) -> u32 {
        self.page[(offset >> 4) as usize]
    }

    fn set(&mut self, offset: u32, value: u32) {
        self.page[(offset >> 4) as usize] = value;
    }

    fn bit(&self, bank: u32, vector: u8) -> bool {
        self.get(bank + (vector as u32 / 32) * 16) >> (vector % 32) & 1 != 0
    }

    fn set_bit(&mut self, bank: u32, vector: u8, on: bool) {
        let offset = bank + (vector as u32 / 32) * 16;
        let mask = 1 << (vector % 32);
        let old = self.get(offset);
        self.set(offset, if on { old | mask } else { old & !mask });
    }

    fn highest(&self, bank: u32) -> Option<u8> {
        (0..8u32).rev().find_map(|i| {
            let word = self.get(bank + i * 16);
            (word != 0).then(|| (i * 32 + 31 - word.leading_zeros()) as u8)
        })
    }

    fn x2apic(&self) -> bool {
        self.base & apic_base::X2APIC != 0
    }

    fn enabled(&self) -> bool {
        self.base & apic_base::ENABLE != 0
    }

    fn software_enabled(&self) -> bool {
        self.get(reg::SVR) & SVR_ENABLED != 0
    }

    fn update_ppr(&mut self) -> u8 {
        let tpr = self.get(reg::TPR) as u8;
        let in_service = self.highest(reg::ISR).unwrap_or(0);
        let ppr = if tpr & 0xf0 >= in_service & 0xf0 {
            tpr
        } else {
            in_service & 0xf0
        };
        self.set(reg::PPR, ppr as u32);
        ppr
    }

    /// The vector that would interrupt the processor now.
    fn deliverable(&mut self) -> Option<u8> {
        if !self.enabled() || !self.software_enabled() {
            return None;
        }
        let vector = self.highest(reg::IRR)?;
        (vector & 0xf0 > self.update_ppr() & 0xf0).then_some(vector)
    }

    fn reset(&mut self, id: u32, keep_id: bool) {
        let saved = self.get(reg::ID);
        self.page = [0; 64];
        self.errors = 0;
        let directed = if self.config.directed_eoi {
            VERSION_DIRECTED_EOI
        } else {
            0
        };
        self.set(reg::VERSION, VERSION | directed);
        self.set(reg::DFR, !0);
        self.set(reg::SVR, 0xff);
        for lvt in 0..6 {
            self.set(reg::LVT_TIMER + lvt * 16, LVT_MASKED);
        }
        if self.x2apic() {
            self.set(reg::ID, id);
            self.set(reg::LDR, x2apic_ldr(id));
        } else {
            self.set(reg::ID, if keep_id { saved } else { id << 24 });
        }
    }

    /// After a reset: the 8259 reaches the bootstrap processor.
    fn enable_lint0(&mut self, bootstrap: bool) {
        const EXTINT: u32 = 0x700;
        if bootstrap && self.config.lint0_enabled {
            self.set(reg::LVT_LINT0, EXTINT);
        }
    }

    fn report(&mut self, error: u32) {
        self.errors |= error;
    }

    /// Takes `vector` into the IRR.
    fn accept(&mut self, vector: u8, level: bool) -> Delivery {
        if !self.enabled() || !self.software_enabled() {
            return Delivery::Ignored;
        }
        if vector < 16 {
            self.report(ESR_RECEIVE_ILLEGAL);
            return Delivery::Ignored;
        }
        let coalesced = self.bit(reg::IRR, vector);
        self.set_bit(reg::IRR, vector, true);
        self.set_bit(reg::TMR, vector, level);
        if coalesced {
            Delivery::Coalesced
        } else {
            Delivery::Taken(1)
        }
    }

    fn timer_lvt(&self) -> u32 {
        self.get(reg::LVT_TIMER)
    }
}

/// The logical ID that x2APIC derives from the ID.
fn x2apic_ldr(id: u32) -> u32 {
    (id >> 4) << 16 | 1 << (id & 0xf)
}

impl LocalApic {
    /// A local APIC in its reset state.
    pub fn new(
        id: u32,
        bootstrap: bool,
        config: ApicConfig,
        mailbox: Arc<Mailbox>,
        timers: &Timers,
    ) -> Arc<LocalApic> {
        Arc::new_cyclic(|weak: &Weak<LocalApic>| {
            let target: Weak<dyn Expiry> = weak.clone();
            let mut base = DEFAULT_BASE | apic_base::ENABLE;
            if bootstrap {
                base |= apic_base::BSP;
            }
            let mut state = State {
                page: [0; 64],
                base,
                errors: 0,
                timer: ApicTimer::new(),
                config,
            };
            state.reset(id, false);
            state.enable_lint0(bootstrap);
            let apic = LocalApic {
                initial_id: id,
                bootstrap,
                state: Mutex::new(state),
                address: Address {
                    id: AtomicU32::new(0),
                    ldr: AtomicU32::new(0),
                    mode: AtomicU32::new(0),
                    base: AtomicU64::new(0),
                },
                mailbox,
                timer: timers.register(target),
                tpr_reports: TprReports::default(),
            };
            apic.publish(&apic.lock());
            apic
        })
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Mirrors what addressing needs.
    fn publish(&self, state: &State) {
        let x2apic = state.x2apic();
        let id = state.get(reg::ID);
        let id = if x2apic { id } else { id >> 24 };
        let mut mode = 0;
        if state.enabled() {
            mode |= MODE_ENABLED;
        }
        if x2apic {
            mode |= MODE_X2APIC;
        }
        if state.get(reg::DFR) >> 28 == 0 {
            mode |= MODE_CLUSTER;
        }
        if state.software_enabled() {
            mode |= MODE_SOFTWARE_ENABLED;
        }
        self.address.id.store(id, Ordering::Relaxed);
        self.address
            .ldr
            .store(state.get(reg::LDR), Ordering::Relaxed);
        self.address.base.store(state.base, Ordering::Relaxed);
        self.address.mode.store(mode, Ordering::Release);
    }

    /// The current APIC ID.
    pub fn id(&self) -> u32 {
        self.address.id.load(Ordering::Relaxed)
    }

    /// The vCPU's mailbox.
    pub fn mailbox(&self) -> &Mailbox {
        &self.mailbox
    }

    /// IA32_APIC_BASE.
    pub fn base(&self) -> u64 {
        self.address.base.load(Ordering::Relaxed)
    }

    /// Sets IA32_APIC_BASE. The guest must go from mode to mode as the architecture allows;
    /// user space (`trusted`) may set any consistent mode.
    pub fn set_base(
        &self,
        value: u64,
        x2apic_offered: bool,
        maxphyaddr: u8,
        trusted: bool,
    ) -> Result<(), Illegal> {
        let reserved = 0x2ff | if maxphyaddr < 64 { !0 << maxphyaddr } else { 0 };
        let reserved = reserved | if x2apic_offered { 0 } else { apic_base::X2APIC };
        let mode = |base: u64| base & (apic_base::ENABLE | apic_base::X2APIC);
        let mut state = self.lock();
        let (old, new) = (mode(state.base), mode(value));
        let disabled = 0;
        let x2apic = apic_base::ENABLE | apic_base::X2APIC;
        if value & reserved != 0 || new == apic_base::X2APIC {
            return Err(Illegal);
        }
        if !trusted
            && ((old == x2apic && new == apic_base::ENABLE) || (old == disabled && new == x2apic))
        {
            return Err(Illegal);
        }
        state.base = value;
        if old != new {
            if new == disabled {
                self.timer.disarm();
                state.timer.cancel();
            }
            if new == x2apic {
                let id = self.initial_id;
                state.set(reg::ID, id);
                state.set(reg::LDR, x2apic_ldr(id));
            } else if old == x2apic || old == disabled {
                let id = self.initial_id;
                state.set(reg::ID, id << 24);
                if old == x2apic {
                    state.set(reg::LDR, 0);
                }
            }
        }
        self.publish(&state);
        drop(state);
        self.mailbox.post_own(Request::EVENT);
        Ok(())
    }

    /// Puts the APIC into its state after INIT (`power_up` false) or reset.
    pub fn reset(&self, power_up: bool) {
        let mut state = self.lock();
        if power_up {
            state.base = DEFAULT_BASE | apic_base::ENABLE;
            if self.bootstrap {
                state.base |= apic_base::BSP;
            }
        }
        self.timer.disarm();
        state.timer.cancel();
        state.reset(self.initial_id, !power_up);
        state.enable_lint0(self.bootstrap);
        self.publish(&state);
    }

    /// Whether the page at `gpa` is this APIC's register page now.
    pub fn decodes(&self, gpa: u64) -> bool {
        let base = self.base();
        base & (apic_base::ENABLE | apic_base::X2APIC) == apic_base::ENABLE
            && gpa & !0xfff == base & apic_base::ADDRESS
    }

    /// Whether `gpa` is in the page of the registers, but the APIC does not decode it: it is in
    /// x2APIC mode or disabled.
    pub fn has_hole_at(&self, gpa: u64) -> bool {
        gpa & !0xfff == self.base() & apic_base::ADDRESS && !self.decodes(gpa)
    }

    /// Whether the APIC is in x2APIC mode.
    pub fn x2apic(&self) -> bool {
        self.address.mode.load(Ordering::Acquire) & MODE_X2APIC != 0
    }

    /// Whether the APIC is enabled in IA32_APIC_BASE.
    pub fn hardware_enabled(&self) -> bool {
        self.address.mode.load(Ordering::Acquire) & MODE_ENABLED != 0
    }

    /// Whether a shorthand, destination and logical flag name this APIC. `quirk`: destination 255 of
    /// a device's message is everyone, to an x2APIC too.
    pub fn is_addressed(&self, message: &Message, source: Option<&LocalApic>, quirk: bool) -> bool {
        let own = source.is_some_and(|s| std::ptr::eq(s, self));
        match message.shorthand {
            Shorthand::Own => own,
            Shorthand::All => true,
            Shorthand::Others => !own,
            Shorthand::None => {
                let narrow = if source.is_some() {
                    !message.wide
                } else {
                    quirk
                };
                self.destination_matches(message, narrow)
            }
        }
    }

    /// `narrow`: to an x2APIC, destination 255 is everyone.
    fn destination_matches(&self, message: &Message, narrow: bool) -> bool {
        let mode = self.address.mode.load(Ordering::Acquire);
        let destination = message.destination;
        let broadcast = match destination {
            0xff if mode & MODE_X2APIC != 0 => narrow,
            0xff => !message.wide || narrow,
            u32::MAX => message.wide,
            _ => false,
        };
        if mode & MODE_ENABLED == 0 {
            return false;
        }
        if broadcast {
            return true;
        }
        if !message.logical {
            return destination == self.id();
        }
        let ldr = self.address.ldr.load(Ordering::Relaxed);
        if mode & MODE_X2APIC != 0 {
            destination >> 16 == ldr >> 16 && destination & ldr & 0xffff != 0
        } else if mode & MODE_CLUSTER != 0 {
            let ldr = ldr >> 24;
            destination >> 4 & 0xf == ldr >> 4 && destination & ldr & 0xf != 0
        } else {
            destination & ldr >> 24 & 0xff != 0
        }
    }

    /// The priority that lowest-priority arbitration compares.
    pub fn processor_priority(&self) -> u8 {
        self.lock().update_ppr()
    }

    /// Whether lowest-priority arbitration may choose this APIC.
    pub fn takes_lowest_priority(&self) -> bool {
        let mode = self.address.mode.load(Ordering::Acquire);
        mode & MODE_SOFTWARE_ENABLED != 0
    }

    /// Takes a message addressed to this APIC.
    pub fn deliver(&self, mode: DeliveryMode, vector: u8, level: bool, assert: bool) -> Delivery {
        match mode {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority => {
                let delivery = self.lock().accept(vector, level);
                if matches!(delivery, Delivery::Taken(_)) {
                    self.mailbox.post(Request::EVENT);
                }
                delivery
            }
            DeliveryMode::Nmi => {
                self.mailbox.send_nmi();
                Delivery::Taken(1)
            }
            DeliveryMode::Smi => {
                self.mailbox.post(Request::SMI);
                Delivery::Taken(1)
            }
            DeliveryMode::Init => {
                // A level-triggered de-assertion only synchronises arbitration IDs.
                if !level || assert {
                    self.mailbox.post(Request::INIT);
                }
                Delivery::Taken(1)
            }
            DeliveryMode::Startup => {
                self.mailbox.send_sipi(vector);
                Delivery::Taken(1)
            }
            // The 8259 is wired to LINT0; messages in this mode are not forwarded.
            DeliveryMode::ExtInt | DeliveryMode::Reserved => Delivery::Ignored,
        }
    }

    /// Whether an interrupt of the 8259 reaches the processor through this APIC.
    pub fn accepts_pic(&self) -> bool {
        let state = self.lock();
        if !state.enabled() {
            return self.bootstrap;
        }
        let lint0 = state.get(reg::LVT_LINT0);
        lint0 & LVT_MASKED == 0 && DeliveryMode::from_bits(lint0 >> 8) == DeliveryMode::ExtInt
    }

    /// Delivers a local interrupt source: an LVT entry.
    pub fn local_interrupt(&self, lvt: u32) -> bool {
        let entry = self.lock().get(lvt);
        if entry & LVT_MASKED != 0 || !self.hardware_enabled() {
            return false;
        }
        let mode = DeliveryMode::from_bits(entry >> 8);
        let level = entry >> 15 & 1 != 0;
        self.deliver(mode, entry as u8, level, true) != Delivery::Ignored
    }

    /// Delivers KVM_NMI-like input on LINT1, if the guest routes it.
    pub fn lint1_nmi(&self) -> bool {
        let entry = self.lock().get(reg::LVT_LINT1);
        entry & LVT_MASKED == 0 && DeliveryMode::from_bits(entry >> 8) == DeliveryMode::Nmi
    }

    /// The vector that would interrupt the processor now.
    pub fn deliverable(&self) -> Option<u8> {
        self.lock_settled().deliverable()
    }

    /// Moves the deliverable vector into service and returns it.
    pub fn acknowledge(&self) -> Option<u8> {
        let mut state = self.lock();
        let vector = state.deliverable()?;
        state.set_bit(reg::IRR, vector, false);
        state.set_bit(reg::ISR, vector, true);
        state.update_ppr();
        Some(vector)
    }

    /// Ends the service of the highest vector in service.
    pub fn end_of_interrupt(&self) -> Effect {
        let mut state = self.lock();
        let Some(vector) = state.highest(reg::ISR) else {
            return Effect::None;
        };
        state.set_bit(reg::ISR, vector, false);
        state.update_ppr();
        let level = state.bit(reg::TMR, vector);
        let directed = state.get(reg::SVR) & SVR_DIRECTED_EOI != 0;
        drop(state);
        self.mailbox.post_own(Request::EVENT);
        Effect::Eoi {
            vector,
            broadcast: level && !directed,
        }
    }

    /// The vector in service, if it is edge-triggered and no other vector waits: nobody but this
    /// APIC need hear of its end at once.
    pub fn quiet_in_service(&self) -> Option<u8> {
        let state = self.lock();
        let vector = state.highest(reg::ISR)?;
        let quiet = state.highest(reg::IRR).is_none() && !state.bit(reg::TMR, vector);
        quiet.then_some(vector)
    }

    /// Whether `vector` waits in the IRR or is in service.
    pub fn is_pending_or_in_service(&self, vector: u8) -> bool {
        let state = self.lock();
        state.bit(reg::IRR, vector) || state.bit(reg::ISR, vector)
    }

    /// Serves the timer if it is due, and arms it for what is to come. Whether that requested an
    /// interrupt.
    ///
    /// Whoever starts the timer or looks at it does this, on the vCPU's own thread: the timer
    /// thread may come late, and what software reads of a timer that has expired must agree with
    /// the IRR.
    fn settle(&self, state: &mut State) -> bool {
        let lvt = state.timer_lvt();
        let expired = state.timer.expire(lvt).is_some();
        match state.timer.deadline() {
            Some(deadline) => self.timer.arm(deadline),
            None => self.timer.disarm(),
        }
        expired && lvt & LVT_MASKED == 0 && state.accept(lvt as u8, false) != Delivery::Ignored
    }

    /// As [`LocalApic::settle`], on the vCPU's own thread.
    fn settle_own(&self, state: &mut State) {
        if self.settle(state) {
            self.mailbox.post_own(Request::EVENT);
        }
    }

    /// The registers, with the timer's expiry in them if it is due.
    fn lock_settled(&self) -> MutexGuard<'_, State> {
        let mut state = self.lock();
        if state.timer.is_due() {
            self.settle_own(&mut state);
        }
        state
    }

    /// IA32_TSC_DEADLINE: the armed deadline, or zero.
    pub fn tsc_deadline(&self) -> u64 {
        let state = self.lock_settled();
        state.timer.tsc_deadline(state.timer_lvt())
    }

    /// Writes IA32_TSC_DEADLINE. Ignored unless the timer is in that mode.
    pub fn set_tsc_deadline(&self, deadline: u64, tsc: &GuestTsc) {
        let mut state = self.lock();
        let lvt = state.timer_lvt();
        state.timer.start_tsc_deadline(lvt, deadline, *tsc);
        self.settle_own(&mut state);
    }

    /// Recomputes an armed TSC deadline after the guest's counter moved.
    pub fn tsc_changed(&self, tsc: &GuestTsc) {
        let state = self.lock();
        let deadline = state.timer.tsc_deadline(state.timer_lvt());
        drop(state);
        if deadline != 0 {
            self.set_tsc_deadline(deadline, tsc);
        }
    }
}

impl Expiry for LocalApic {
    fn expired(&self) {
        // Not if it was overtaken by a new deadline, served already, or woken before the guest's
        // counter got there.
        let taken = self.settle(&mut self.lock());
        if taken {
            self.mailbox.post(Request::EVENT);
        }
    }
}

#[cfg(test)]
mod tests;
