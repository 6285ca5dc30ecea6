use super::*;
use crate::mailbox::tests::mailbox;
use lapic::{ApicConfig, reg};
use std::sync::atomic::AtomicU32;

fn machine(model: Model) -> (Arc<IrqChip>, Arc<LocalApic>, Timers) {
    let timers = Timers::new();
    let apics = Arc::new(Apics::default());
    let config = ApicConfig {
        wide_ids: false,
        directed_eoi: false,
        lint0_enabled: true,
    };
    let apic = LocalApic::new(0, true, config, mailbox(), &timers);
    apic.write(reg::SVR, 0x1ff).unwrap();
    apics.add(apic.clone());
    (IrqChip::new(model, apics), apic, timers)
}

fn initialise_pic(chip: &IrqChip) {
    for (port, value) in [(0x20, 0x11), (0x21, 0x30), (0x21, 0x04), (0x21, 0x01)] {
        assert!(chip.write_port(port, value));
    }
}

fn redirect(chip: &IrqChip, pin: u32, low: u32) {
    chip.write_ioapic(ioapic::DEFAULT_BASE, 0x10 + pin * 2);
    chip.write_ioapic(ioapic::DEFAULT_BASE + 0x10, low);
}

#[derive(Default)]
struct Acks(AtomicU32);

impl AckNotifier for Acks {
    fn acknowledged(&self, _gsi: u32) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

#[test]
fn a_gsi_reaches_both_controllers() {
    let (chip, apic, _timers) = machine(Model::Full);
    initialise_pic(&chip);
    redirect(&chip, 4, 0x44);
    apic.mailbox().take(Request::EVENT);
    assert_eq!(
        chip.set_line(4, LineSource::UserSpace, true),
        Delivery::Taken(2)
    );
    assert!(chip.pic_output());
    assert!(apic.mailbox().take(Request::EVENT));
    assert_eq!(chip.acknowledge_pic(), 0x34);
    assert_eq!(apic.acknowledge(), Some(0x44));
    assert!(!chip.pic_output());
}

#[test]
fn level_interrupts_end_at_the_io_apic() {
    let (chip, apic, _timers) = machine(Model::Full);
    redirect(&chip, 20, 0x8050);
    let acks = Arc::new(Acks::default());
    let notifier: Arc<dyn AckNotifier> = acks.clone();
    chip.add_notifier(20, Arc::downgrade(&notifier));
    chip.set_line(20, LineSource::Resample, true);
    assert_eq!(apic.acknowledge(), Some(0x50));
    chip.set_line(20, LineSource::Resample, false);
    let effect = apic.end_of_interrupt();
    assert_eq!(chip.apply(effect, &apic), None);
    assert_eq!(acks.0.load(Ordering::Relaxed), 1);
    assert_eq!(apic.deliverable(), None);
}

#[test]
fn a_line_is_high_while_any_source_is() {
    let (chip, apic, _timers) = machine(Model::Full);
    redirect(&chip, 10, 0x804a);
    chip.set_line(10, LineSource::UserSpace, true);
    chip.set_line(10, LineSource::Resample, true);
    chip.set_line(10, LineSource::UserSpace, false);
    assert_eq!(apic.acknowledge(), Some(0x4a));
    chip.apply(apic.end_of_interrupt(), &apic);
    assert_eq!(apic.acknowledge(), Some(0x4a));
}

#[test]
fn split_reports_eois_of_reserved_pins() {
    let (chip, apic, _timers) = machine(Model::Split { reserved_pins: 24 });
    let mut entry = kvm_bindings::kvm_irq_routing_entry {
        gsi: 5,
        type_: 2,
        ..Default::default()
    };
    entry.u.msi.address_lo = 0xfee0_0000;
    entry.u.msi.data = 0xc055;
    chip.set_routing(Routing::from_entries(&[entry], false).unwrap());
    assert_eq!(
        chip.set_line(5, LineSource::UserSpace, true),
        Delivery::Taken(1)
    );
    assert_eq!(apic.acknowledge(), Some(0x55));
    assert_eq!(chip.apply(apic.end_of_interrupt(), &apic), Some(0x55));
    assert_eq!(chip.read_port(0x20), None);
    assert_eq!(chip.read_ioapic(ioapic::DEFAULT_BASE), None);
    assert!(chip.state(&mut kvm_irqchip::default()).is_err());
}

#[test]
fn pit_ticks_arrive_one_by_one() {
    let (chip, apic, timers) = machine(Model::Full);
    initialise_pic(&chip);
    chip.write_port(0x21, 0xfe);
    chip.create_pit(&timers, true).unwrap();
    assert!(chip.create_pit(&timers, true).is_err());
    for (port, value) in [(0x43, 0x34), (0x40, 0xa9), (0x40, 0x04)] {
        assert!(chip.write_port(port, value));
    }
    let start = crate::time::monotonic_ns();
    for _ in 0..3 {
        while !chip.pic_output() {
            apic.mailbox().sleep(|| chip.pic_output(), 10_000_000);
        }
        assert_eq!(chip.acknowledge_pic(), 0x30);
        chip.write_port(0x20, 0x20);
    }
    assert!(crate::time::monotonic_ns() - start >= 3 * 999_000);
}

#[test]
fn state_of_each_chip() {
    let (chip, _apic, _timers) = machine(Model::Full);
    redirect(&chip, 3, 0x33);
    for chip_id in 0..3 {
        let mut state = kvm_irqchip {
            chip_id,
            ..Default::default()
        };
        chip.state(&mut state).unwrap();
        chip.set_state(&state).unwrap();
    }
    assert!(
        chip.state(&mut kvm_irqchip {
            chip_id: 3,
            ..Default::default()
        })
        .is_err()
    );
}
