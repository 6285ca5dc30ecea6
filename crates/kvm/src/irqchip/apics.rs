//! The bus between interrupt sources and local APICs.

use super::lapic::LocalApic;
use super::message::{Delivery, DeliveryMode, Message, Shorthand};
use arc_swap::ArcSwap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Every local APIC of a VM. Read-mostly: vCPUs are added while others run.
#[derive(Default)]
pub struct Apics {
    all: ArcSwap<Vec<Arc<LocalApic>>>,
    /// Where lowest-priority arbitration starts looking, so that equals take turns.
    turn: AtomicUsize,
    /// KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK: to an x2APIC, destination 255 of a device's message
    /// is one processor, not all.
    without_broadcast_quirk: AtomicBool,
}

impl Apics {
    /// Adds a processor's APIC. Callers serialise additions.
    pub fn add(&self, apic: Arc<LocalApic>) {
        let mut all = Vec::clone(&self.all.load());
        all.push(apic);
        self.all.store(Arc::new(all));
    }

    /// All APICs, in the order of their creation.
    pub fn all(&self) -> arc_swap::Guard<Arc<Vec<Arc<LocalApic>>>> {
        self.all.load()
    }

    /// KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK.
    pub fn disable_broadcast_quirk(&self) {
        self.without_broadcast_quirk.store(true, Ordering::Relaxed);
    }

    fn has_quirk(&self) -> bool {
        !self.without_broadcast_quirk.load(Ordering::Relaxed)
    }

    /// Whether a device's message is for any of these.
    pub fn has_destination(&self, message: &Message) -> bool {
        let quirk = self.has_quirk();
        let all = self.all.load();
        all.iter()
            .any(|apic| apic.is_addressed(message, None, quirk))
    }

    /// Delivers `message`, sent by the APIC `source` or by a device.
    pub fn deliver(&self, message: &Message, source: Option<&LocalApic>) -> Delivery {
        let all = self.all.load();
        if message.shorthand == Shorthand::Own
            && let Some(own) = source
        {
            return own.deliver(message.mode, message.vector, message.level, message.assert);
        }
        let quirk = self.has_quirk();
        let targets = all
            .iter()
            .filter(|apic| apic.is_addressed(message, source, quirk));
        if message.mode == DeliveryMode::LowestPriority {
            let start = self.turn.fetch_add(1, Ordering::Relaxed);
            let candidates: Vec<_> = targets.filter(|a| a.takes_lowest_priority()).collect();
            let count = candidates.len().max(1);
            let chosen = (0..candidates.len())
                .map(|i| candidates[(start + i) % count])
                .min_by_key(|apic| apic.processor_priority() >> 4);
            return chosen.map_or(Delivery::Ignored, |apic| deliver(apic, message));
        }
        // A physical ID, too, may be that of several: an xAPIC's is software's to write.
        targets.fold(Delivery::Ignored, |sum, apic| {
            sum.and(deliver(apic, message))
        })
    }

    /// Whether some processor takes interrupts of the 8259.
    pub fn pic_target(&self) -> Option<Arc<LocalApic>> {
        self.all
            .load()
            .iter()
            .find(|apic| apic.accepts_pic())
            .cloned()
    }
}

fn deliver(apic: &LocalApic, message: &Message) -> Delivery {
    apic.deliver(message.mode, message.vector, message.level, message.assert)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::irqchip::lapic::{ApicConfig, reg};
    use crate::mailbox::tests::mailbox;
    use crate::timers::Timers;

    fn apics(count: u32) -> (Apics, Vec<Arc<LocalApic>>) {
        let apics = Apics::default();
        let config = ApicConfig {
            wide_ids: false,
            directed_eoi: false,
            lint0_enabled: true,
        };
        let all: Vec<_> = (0..count)
            .map(|id| LocalApic::new(id, id == 0, config, mailbox(), &Timers::new()))
            .collect();
        for (i, apic) in all.iter().enumerate() {
            apic.write(reg::SVR, 0x1ff).unwrap();
            apic.write(reg::LDR, 1 << (24 + i)).unwrap();
            apics.add(apic.clone());
        }
        (apics, all)
    }

    #[test]
    fn shorthands() {
        let (apics, all) = apics(3);
        let others = Message::from_icr(0x000c_4041, false);
        assert_eq!(apics.deliver(&others, Some(&all[1])), Delivery::Taken(2));
        assert_eq!(all[1].deliverable(), None);
        let own = Message::from_icr(0x0004_4042, false);
        assert_eq!(apics.deliver(&own, Some(&all[1])), Delivery::Taken(1));
        assert_eq!(all[1].deliverable(), Some(0x42));
    }

    #[test]
    fn lowest_priority_avoids_the_busy_and_takes_turns() {
        let (apics, all) = apics(3);
        all[0].write(reg::TPR, 0x80).unwrap();
        let message = Message::from_msi(0xfee0_700c, 0x0145, false);
        assert_eq!(message.mode, DeliveryMode::LowestPriority);
        for _ in 0..4 {
            apics.deliver(&message, None);
        }
        assert_eq!(all[0].deliverable(), None);
        assert!(all[1].deliverable().is_some() && all[2].deliverable().is_some());
    }

    /// xAPIC IDs are software's to write, the same one to several.
    #[test]
    fn a_shared_id_is_everyones() {
        let (apics, all) = apics(4);
        for apic in [&all[1], &all[3]] {
            apic.write(reg::ID, 7 << 24).unwrap();
        }
        let device = Message::from_msi(0xfee0_7000, 0x40, false);
        assert_eq!(apics.deliver(&device, None), Delivery::Taken(2));
        let ipi = Message::from_icr(0x0700_0000_0000_4041, false);
        assert_eq!(apics.deliver(&ipi, Some(&all[3])), Delivery::Taken(2));
        for (n, apic) in all.iter().enumerate() {
            let expected = (n % 2 == 1).then_some(0x41);
            assert_eq!(apic.deliverable(), expected, "{n}");
        }
        let alone = Message::from_msi(0xfee0_2000, 0x50, false);
        assert_eq!(apics.deliver(&alone, None), Delivery::Taken(1));
    }

    #[test]
    fn nobody_there() {
        let (apics, _) = apics(2);
        assert_eq!(
            apics.deliver(&Message::from_msi(0xfee0_9000, 0x40, false), None),
            Delivery::Ignored
        );
    }
}
