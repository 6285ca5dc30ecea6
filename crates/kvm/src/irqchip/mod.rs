//! Interrupt controllers.
//!
//! ```text
//!  GSI ── routing ──┬── pic.rs ──── INTR ──▶ LINT0 of the bootstrap processor
//!                   ├── ioapic.rs ─ message ─┐
//!                   └── MSI ─────── message ─┴─ apics.rs ──▶ lapic.rs ──▶ mailbox
//!  pit.rs ── GSI 0                                IPIs ──────▲
//! ```
//!
//! [`IrqChip`] ties them together for one VM: it is full (8259s and I/O APIC here) or split (only
//! local APICs here). Locks are taken downwards in the picture; a local APIC never calls up with
//! its lock held, so an EOI returns to [`IrqChip::apply`] as an [`Effect`].

pub mod apics;
pub mod ioapic;
pub mod lapic;
mod lapic_timer;
pub mod message;
pub mod pic;
pub mod pit;
pub mod routing;

use crate::error::{Result, fail};
use crate::mailbox::Request;
use crate::timers::{Expiry, Timer, Timers};
use apics::Apics;
use arc_swap::ArcSwap;
use ioapic::IoApic;
use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irqchip,
};
use lapic::{Effect, LocalApic};
use message::{Delivery, Message};
use pic::PicPair;
use pit::Pit;
use routing::{Route, Routing};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

/// Sources that share a GSI's line; the line is high while any of them is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum LineSource {
    /// KVM_IRQ_LINE and edge irqfds.
    UserSpace = 0,
    /// Resampled irqfds.
    Resample = 1,
    /// The PIT.
    Pit = 2,
}

/// Which controllers are in this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Model {
    /// 8259s, I/O APIC and local APICs.
    Full,
    /// Local APICs; user space has an I/O APIC with so many pins.
    Split {
        /// GSIs below this are the pins of user space's I/O APIC.
        reserved_pins: u32,
    },
}

/// Told when the guest ends service of an interrupt that came from `gsi`.
pub trait AckNotifier: Send + Sync {
    /// The guest acknowledged.
    fn acknowledged(&self, gsi: u32);
}

/// The full model's own controllers.
#[derive(Default)]
struct Chips {
    pic: PicPair,
    ioapic: IoApic,
    /// For each GSI the sources that hold its line high.
    lines: HashMap<u32, u8>,
}

/// The interrupt controllers of a VM.
pub struct IrqChip {
    model: Model,
    apics: Arc<Apics>,
    chips: Mutex<Chips>,
    routing: ArcSwap<Routing>,
    /// INTR of the 8259 pair.
    pic_output: AtomicBool,
    notifiers: Mutex<Vec<(u32, Weak<dyn AckNotifier>)>>,
    has_notifiers: AtomicBool,
    pit: OnceLock<Arc<PitDevice>>,
    /// MSI addresses carry 32-bit destinations.
    wide: AtomicBool,
}

impl IrqChip {
    /// Controllers in their reset state.
    pub fn new(model: Model, apics: Arc<Apics>) -> Arc<IrqChip> {
        let routing = match model {
            Model::Full => Routing::default_for_irqchip(),
            Model::Split { .. } => Routing::default(),
        };
        Arc::new(IrqChip {
            model,
            apics,
            chips: Mutex::default(),
            routing: ArcSwap::from_pointee(routing),
            pic_output: AtomicBool::new(false),
            notifiers: Mutex::default(),
            has_notifiers: AtomicBool::new(false),
            pit: OnceLock::new(),
            wide: AtomicBool::new(false),
        })
    }

    /// Which controllers are here.
    pub fn model(&self) -> Model {
        self.model
    }

    /// The local APICs.
    pub fn apics(&self) -> &Apics {
        &self.apics
    }

    /// KVM_X2APIC_API_USE_32BIT_IDS.
    pub fn set_wide(&self) {
        self.wide.store(true, Ordering::Relaxed);
    }

    fn lock(&self) -> MutexGuard<'_, Chips> {
        self.chips.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// KVM_SET_GSI_ROUTING.
    pub fn set_routing(&self, routing: Routing) {
        self.routing.store(Arc::new(routing));
        if matches!(self.model, Model::Split { .. }) {
            for apic in self.apics.all().iter() {
                apic.mailbox().post(Request::SCAN_IOAPIC);
            }
        }
    }

    /// The routes in force.
    pub fn routing(&self) -> arc_swap::Guard<Arc<Routing>> {
        self.routing.load()
    }

    /// A device outside has something to tell. It may have written code that vCPUs have run and go
    /// on running: a processor would see that at once, here it is looked for before the interrupt
    /// is taken.
    fn memory_may_have_changed(&self) {
        for apic in self.apics.all().iter() {
            apic.mailbox().post_quietly(Request::CODE);
        }
    }

    /// Sends a message-signalled interrupt.
    pub fn send_msi(&self, address: u64, data: u32) -> Delivery {
        self.memory_may_have_changed();
        let wide = self.wide.load(Ordering::Relaxed);
        self.apics
            .deliver(&Message::from_msi(address, data, wide), None)
    }

    /// Whether a message may have this address: with 32-bit IDs the upper half has reserved bits.
    pub fn is_msi_address(&self, address: u64) -> bool {
        !self.wide.load(Ordering::Relaxed) || address >> 32 & 0xff == 0
    }

    /// Whether a message-signalled interrupt is for any processor that there is.
    pub fn has_destination(&self, address: u64, data: u32) -> bool {
        let wide = self.wide.load(Ordering::Relaxed);
        self.apics
            .has_destination(&Message::from_msi(address, data, wide))
    }

    /// Drives the line of `gsi` on behalf of `source`.
    pub fn set_line(&self, gsi: u32, source: LineSource, high: bool) -> Delivery {
        if high && source != LineSource::Pit {
            self.memory_may_have_changed();
        }
        let routing = self.routing.load();
        let mut delivery = Delivery::Ignored;
        let mut chips = self.lock();
        let sources = chips.lines.entry(gsi).or_default();
        let bit = 1 << source as u8;
        *sources = if high {
            *sources | bit
        } else {
            *sources & !bit
        };
        let line = *sources != 0;
        for &route in routing.of(gsi) {
            delivery = delivery.and(match route {
                Route::Pic(irq) => {
                    let raised = chips.pic.set_line(irq, line);
                    match (chips.pic.is_masked(irq), raised || !line) {
                        (true, _) => Delivery::Ignored,
                        (false, true) => Delivery::Taken(1),
                        (false, false) => Delivery::Coalesced,
                    }
                }
                Route::IoApic(pin) => chips.ioapic.set_line(pin as usize, line, &self.apics),
                Route::Msi { address, data } if high => {
                    let wide = self.wide.load(Ordering::Relaxed);
                    self.apics
                        .deliver(&Message::from_msi(address, data, wide), None)
                }
                Route::Msi { .. } => Delivery::Ignored,
            });
        }
        self.update_intr(&chips);
        delivery
    }

    /// One edge on `gsi`: what an irqfd's signal means.
    pub fn pulse(&self, gsi: u32) -> Delivery {
        let delivery = self.set_line(gsi, LineSource::UserSpace, true);
        let only_messages = self
            .routing
            .load()
            .of(gsi)
            .iter()
            .all(|route| matches!(route, Route::Msi { .. }));
        if !only_messages {
            self.set_line(gsi, LineSource::UserSpace, false);
        }
        delivery
    }

    /// Publishes INTR and tells the processor it is wired to.
    fn update_intr(&self, chips: &Chips) {
        let output = chips.pic.output();
        let before = self.pic_output.swap(output, Ordering::SeqCst);
        if output
            && !before
            && let Some(apic) = self.apics.pic_target()
        {
            apic.mailbox().post(Request::EVENT);
        }
    }

    /// Whether the 8259 pair asks for service.
    pub fn pic_output(&self) -> bool {
        self.pic_output.load(Ordering::SeqCst)
    }

    /// The interrupt acknowledge cycle on the 8259 pair.
    pub fn acknowledge_pic(&self) -> u8 {
        let mut chips = self.lock();
        let (vector, ended) = chips.pic.acknowledge();
        self.update_intr(&chips);
        drop(chips);
        if let Some(irq) = ended {
            self.notify(Route::Pic(irq));
        }
        vector
    }

    /// Handles what a local APIC could not do by itself. Returns the vector whose EOI a user-space
    /// I/O APIC must hear of.
    pub fn apply(&self, effect: Effect, source: &LocalApic) -> Option<u8> {
        match effect {
            Effect::None => None,
            Effect::Ipi(message) => {
                self.apics.deliver(&message, Some(source));
                None
            }
            Effect::Eoi { vector, broadcast } => self.end_of_interrupt(vector, broadcast),
        }
    }

    fn end_of_interrupt(&self, vector: u8, broadcast: bool) -> Option<u8> {
        if let Model::Split { reserved_pins } = self.model {
            let wide = self.wide.load(Ordering::Relaxed);
            let routing = self.routing.load();
            let mut messages = routing.messages(reserved_pins as usize, wide);
            let reserved = messages.any(|m| m.vector == vector && m.level);
            return (broadcast && reserved).then_some(vector);
        }
        let chips = self.lock();
        let pins: Vec<usize> = chips.ioapic.pins_of(vector).collect();
        drop(chips);
        for pin in pins {
            // The notifier lowers the line before the pin is looked at again, so that a
            // resampled interrupt is not sent twice.
            self.notify(Route::IoApic(pin as u8));
            if broadcast {
                self.lock().ioapic.end_of_interrupt(pin, &self.apics);
            }
        }
        None
    }

    /// Whether somebody waits for the end of the edge-triggered interrupt `vector`.
    pub fn reports_eoi(&self, vector: u8) -> bool {
        if self.model != Model::Full || !self.has_notifiers.load(Ordering::Relaxed) {
            return false;
        }
        let pins: Vec<usize> = self.lock().ioapic.pins_of(vector).collect();
        let routing = self.routing.load();
        let notifiers = self
            .notifiers
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        pins.into_iter().any(|pin| {
            routing
                .gsis_of(Route::IoApic(pin as u8))
                .any(|gsi| notifiers.iter().any(|(wanted, _)| *wanted == gsi))
        })
    }

    /// Tells notifiers of every GSI that leads to `route`.
    fn notify(&self, route: Route) {
        if !self.has_notifiers.load(Ordering::Relaxed) {
            return;
        }
        let routing = self.routing.load();
        for gsi in routing.gsis_of(route) {
            let notifiers = self
                .notifiers
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            let concerned: Vec<_> = notifiers
                .iter()
                .filter(|(wanted, _)| *wanted == gsi)
                .filter_map(|(_, notifier)| notifier.upgrade())
                .collect();
            drop(notifiers);
            for notifier in concerned {
                notifier.acknowledged(gsi);
            }
        }
    }

    /// Tells `notifier` of acknowledgements of `gsi` as long as it lives.
    pub fn add_notifier(&self, gsi: u32, notifier: Weak<dyn AckNotifier>) {
        let mut notifiers = self
            .notifiers
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        notifiers.retain(|(_, notifier)| notifier.strong_count() > 0);
        notifiers.push((gsi, notifier));
        self.has_notifiers.store(true, Ordering::Relaxed);
    }

    /// KVM_CREATE_PIT2.
    pub fn create_pit(self: &Arc<Self>, timers: &Timers, speaker_port: bool) -> Result<()> {
        let device = PitDevice::new(self, timers, speaker_port);
        if self.pit.set(device).is_err() {
            return fail(libc::EEXIST);
        }
        if let Some(device) = self.pit.get() {
            let notifier: Arc<dyn AckNotifier> = device.clone();
            self.add_notifier(0, Arc::downgrade(&notifier));
        }
        Ok(())
    }

    /// The PIT, if there is one.
    pub fn pit(&self) -> Option<&Arc<PitDevice>> {
        self.pit.get()
    }

    /// Reads a port of the 8259s or the PIT; `None` if neither decodes it.
    pub fn read_port(&self, port: u16) -> Option<u8> {
        if self.model == Model::Full && pic::decodes(port) {
            let mut chips = self.lock();
            let value = chips.pic.read(port);
            self.update_intr(&chips);
            return Some(value);
        }
        self.pit.get()?.read(port)
    }

    /// Writes a port of the 8259s or the PIT; false if neither decodes it.
    pub fn write_port(&self, port: u16, value: u8) -> bool {
        if self.model == Model::Full && pic::decodes(port) {
            let mut chips = self.lock();
            let ended = chips.pic.write(port, value);
            self.update_intr(&chips);
            drop(chips);
            for irq in (0..16).filter(|irq| ended >> irq & 1 != 0) {
                self.notify(Route::Pic(irq));
            }
            return true;
        }
        self.pit.get().is_some_and(|pit| pit.write(port, value))
    }

    /// Reads the I/O APIC; `None` if it does not decode `gpa`.
    pub fn read_ioapic(&self, gpa: u64) -> Option<u32> {
        if self.model != Model::Full {
            return None;
        }
        let chips = self.lock();
        chips
            .ioapic
            .decodes(gpa)
            .then(|| chips.ioapic.read(gpa & 0xff))
    }

    /// Writes the I/O APIC; false if it does not decode `gpa`.
    pub fn write_ioapic(&self, gpa: u64, value: u32) -> bool {
        if self.model != Model::Full {
            return false;
        }
        let mut chips = self.lock();
        if !chips.ioapic.decodes(gpa) {
            return false;
        }
        chips.ioapic.write(gpa & 0xff, value, &self.apics);
        true
    }

    /// KVM_GET_IRQCHIP.
    pub fn state(&self, chip: &mut kvm_irqchip) -> Result<()> {
        if self.model != Model::Full {
            return fail(libc::ENXIO);
        }
        let chips = self.lock();
        match chip.chip_id {
            KVM_IRQCHIP_PIC_MASTER => chip.chip.pic = chips.pic.state(0),
            KVM_IRQCHIP_PIC_SLAVE => chip.chip.pic = chips.pic.state(1),
            KVM_IRQCHIP_IOAPIC => chip.chip.ioapic = chips.ioapic.state(),
            _ => return fail(libc::EINVAL),
        }
        Ok(())
    }

    /// KVM_SET_IRQCHIP.
    pub fn set_state(&self, chip: &kvm_irqchip) -> Result<()> {
        if self.model != Model::Full {
            return fail(libc::ENXIO);
        }
        let mut chips = self.lock();
        match chip.chip_id {
            // SAFETY: the chip's ID names the member; every bit pattern of it is valid.
            KVM_IRQCHIP_PIC_MASTER => chips.pic.set_state(0, unsafe { &chip.chip.pic }),
            // SAFETY: as above.
            KVM_IRQCHIP_PIC_SLAVE => chips.pic.set_state(1, unsafe { &chip.chip.pic }),
            KVM_IRQCHIP_IOAPIC => {
                // SAFETY: as above.
                let state = unsafe { chip.chip.ioapic };
                chips.ioapic.set_state(&state, &self.apics);
            }
            _ => return fail(libc::EINVAL),
        }
        self.update_intr(&chips);
        Ok(())
    }
}

/// The PIT as a device: its registers, its timer and its wire.
pub struct PitDevice {
    pit: Mutex<Pit>,
    timer: Timer,
    chip: Weak<IrqChip>,
    /// Held while the line is high.
    pulse: Mutex<()>,
}

impl PitDevice {
    fn new(chip: &Arc<IrqChip>, timers: &Timers, speaker_port: bool) -> Arc<PitDevice> {
        Arc::new_cyclic(|weak: &Weak<PitDevice>| {
            let target: Weak<dyn Expiry> = weak.clone();
            PitDevice {
                pit: Mutex::new(Pit::new(speaker_port)),
                timer: timers.register(target),
                chip: Arc::downgrade(chip),
                pulse: Mutex::default(),
            }
        })
    }

    /// The registers.
    pub fn lock(&self) -> MutexGuard<'_, Pit> {
        self.pit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn rearm(&self, pit: &Pit) {
        match pit.deadline() {
            Some(deadline) => self.timer.arm(deadline),
            None => self.timer.disarm(),
        }
    }

    fn read(&self, port: u16) -> Option<u8> {
        let mut pit = self.lock();
        if !pit.decodes(port) {
            return None;
        }
        let value = pit.read(port);
        // What was read may show a tick that the timer thread has yet to deliver.
        let is_due = pit.is_due();
        drop(pit);
        if is_due {
            self.expired();
        }
        Some(value)
    }

    fn write(&self, port: u16, value: u8) -> bool {
        let mut pit = self.lock();
        if !pit.decodes(port) {
            return false;
        }
        if pit.write(port, value) {
            self.rearm(&pit);
        }
        true
    }

    /// KVM_SET_PIT2.
    pub fn set_state(&self, state: &kvm_bindings::kvm_pit_state2) {
        let mut pit = self.lock();
        pit.set_state(state);
        self.rearm(&pit);
    }

    fn deliver_tick(&self) {
        let Some(chip) = self.chip.upgrade() else {
            return;
        };
        // A vCPU may acknowledge this tick, and deliver the next one, before the line is low
        // again: without an edge that one would be lost, and with it all that come after.
        let pulse = self.pulse.lock().unwrap_or_else(PoisonError::into_inner);
        let delivery = chip.set_line(0, LineSource::Pit, true);
        chip.set_line(0, LineSource::Pit, false);
        drop(pulse);
        // An 8259 input that is not acknowledged stays requested; only a tick that nobody
        // will acknowledge lets the next one go at once.
        if delivery == Delivery::Ignored {
            self.lock().not_taken();
        }
    }
}

impl Expiry for PitDevice {
    fn expired(&self) {
        let mut pit = self.lock();
        let deliver = pit.tick();
        self.rearm(&pit);
        drop(pit);
        if deliver {
            self.deliver_tick();
        }
    }
}

impl AckNotifier for PitDevice {
    fn acknowledged(&self, _gsi: u32) {
        let again = self.lock().acknowledge();
        if again {
            self.deliver_tick();
        }
    }
}

#[cfg(test)]
mod tests;
