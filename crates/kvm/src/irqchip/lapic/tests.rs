use super::*;
use crate::mailbox::tests::mailbox;

const CONFIG: ApicConfig = ApicConfig {
    wide_ids: false,
    directed_eoi: false,
    lint0_enabled: true,
};

fn apic(id: u32) -> Arc<LocalApic> {
    let apic = LocalApic::new(id, id == 0, CONFIG, mailbox(), &Timers::new());
    write(&apic, reg::SVR, 0x1ff);
    apic
}

fn write(apic: &LocalApic, offset: u32, value: u32) -> Effect {
    apic.write(offset, value).unwrap()
}

fn read(apic: &LocalApic, offset: u32) -> u32 {
    apic.read(offset).unwrap()
}

fn fixed(apic: &LocalApic, vector: u8) -> Delivery {
    apic.deliver(DeliveryMode::Fixed, vector, false, true)
}

#[test]
fn priorities_decide_what_is_taken() {
    let apic = apic(0);
    assert_eq!(fixed(&apic, 0x41), Delivery::Taken(1));
    assert_eq!(fixed(&apic, 0x41), Delivery::Coalesced);
    assert_eq!(fixed(&apic, 0x55), Delivery::Taken(1));
    assert_eq!(apic.acknowledge(), Some(0x55));
    assert_eq!(
        apic.acknowledge(),
        None,
        "0x41 is below the vector in service"
    );
    assert_eq!(read(&apic, reg::PPR), 0x50);
    assert_eq!(
        apic.end_of_interrupt(),
        Effect::Eoi {
            vector: 0x55,
            broadcast: false
        }
    );
    write(&apic, reg::TPR, 0x40);
    assert_eq!(apic.deliverable(), None, "same class as the TPR");
    apic.set_cr8(3);
    assert_eq!(apic.acknowledge(), Some(0x41));
    assert_eq!(apic.cr8(), 3);
}

#[test]
fn level_interrupts_broadcast_their_end() {
    let apic = apic(0);
    apic.deliver(DeliveryMode::Fixed, 0x31, true, true);
    assert_eq!(apic.acknowledge(), Some(0x31));
    assert_eq!(
        write(&apic, reg::EOI, 0),
        Effect::Eoi {
            vector: 0x31,
            broadcast: true
        }
    );
    assert_eq!(write(&apic, reg::EOI, 0), Effect::None);
}

#[test]
fn illegal_vectors_go_to_the_error_register() {
    let apic = apic(0);
    assert_eq!(fixed(&apic, 3), Delivery::Ignored);
    assert_eq!(read(&apic, reg::ESR), 0);
    write(&apic, reg::ESR, 0);
    assert_eq!(read(&apic, reg::ESR), ESR_RECEIVE_ILLEGAL);
    assert_eq!(write(&apic, reg::ICR, 0x0005), Effect::None);
    write(&apic, reg::ESR, 0);
    assert_eq!(read(&apic, reg::ESR), ESR_SEND_ILLEGAL);
    assert_eq!(apic.read(0x50), Err(Illegal));
}

#[test]
fn a_disabled_apic_takes_nothing() {
    let apic = apic(0);
    write(&apic, reg::LVT_TIMER, 0x30);
    write(&apic, reg::SVR, 0xff);
    assert_eq!(fixed(&apic, 0x41), Delivery::Ignored);
    assert_eq!(read(&apic, reg::LVT_TIMER), 0x30 | LVT_MASKED);
    write(&apic, reg::LVT_TIMER, 0x30);
    assert_eq!(
        read(&apic, reg::LVT_TIMER),
        0x30 | LVT_MASKED,
        "stays masked while disabled"
    );
}

#[test]
fn destinations() {
    let apic = apic(3);
    let to = |destination, logical, wide| {
        let shorthand = Shorthand::None;
        let mode = DeliveryMode::Fixed;
        apic.is_addressed(
            &Message {
                destination,
                logical,
                shorthand,
                mode,
                vector: 0x40,
                level: false,
                assert: true,
                wide,
            },
            None,
            true,
        )
    };
    assert!(to(3, false, false) && !to(2, false, false) && to(0xff, false, false));
    write(&apic, reg::LDR, 0x0800_0000);
    assert!(to(0x0c, true, false) && !to(0x04, true, false));
    write(&apic, reg::DFR, 0x0fff_ffff);
    write(&apic, reg::LDR, 0x2400_0000);
    assert!(to(0x25, true, false) && !to(0x15, true, false) && !to(0x23, true, false));
    let base = apic.base() | apic_base::X2APIC;
    apic.set_base(base, true, 46, false).unwrap();
    assert_eq!(read(&apic, reg::LDR), 1 << 3);
    assert!(to(0x8, true, true) && !to(0x1_0008, true, true) && to(!0, false, true));
    assert!(to(3, false, true));
}

#[test]
fn mode_transitions() {
    let apic = apic(0);
    let base = apic.base();
    assert_eq!(
        apic.set_base(base | apic_base::X2APIC, false, 46, false),
        Err(Illegal),
        "not offered"
    );
    assert_eq!(
        apic.set_base(base | 1 << 50, true, 46, false),
        Err(Illegal),
        "reserved"
    );
    assert_eq!(
        apic.set_base(DEFAULT_BASE | apic_base::X2APIC, true, 46, true),
        Err(Illegal)
    );
    apic.set_base(base | apic_base::X2APIC, true, 46, false)
        .unwrap();
    assert_eq!(
        apic.set_base(base, true, 46, false),
        Err(Illegal),
        "x2APIC to xAPIC"
    );
    apic.set_base(base & !apic_base::ENABLE, true, 46, false)
        .unwrap();
    assert!(!apic.hardware_enabled());
    assert_eq!(
        apic.set_base(base | apic_base::X2APIC, true, 46, false),
        Err(Illegal)
    );
    apic.set_base(base, true, 46, false).unwrap();
    assert!(apic.decodes(DEFAULT_BASE + 0x300) && !apic.decodes(DEFAULT_BASE + 0x1000));
}

#[test]
fn x2apic_registers() {
    let apic = apic(5);
    let base = apic.base();
    apic.set_base(base | apic_base::X2APIC, true, 46, false)
        .unwrap();
    assert_eq!(read(&apic, reg::ID), 5);
    assert_eq!(apic.read(reg::DFR), Err(Illegal));
    assert_eq!(apic.write(reg::EOI, 1), Err(Illegal));
    let effect = apic.write_icr(0x0000_0007_0000_4041).unwrap();
    let Effect::Ipi(message) = effect else {
        panic!("{effect:?}")
    };
    assert_eq!(
        (message.destination, message.vector, message.wide),
        (7, 0x41, true)
    );
    let effect = write(&apic, reg::SELF_IPI, 0x50);
    assert!(matches!(
        effect,
        Effect::Ipi(Message {
            shorthand: Shorthand::Own,
            vector: 0x50,
            ..
        })
    ));
    assert_eq!(apic.snapshot()[8], 5 << 24);
}

#[test]
fn snapshot_and_restore() {
    let one = apic(0);
    fixed(&one, 0x61);
    write(&one, reg::LVT_LINT1, 0x400);
    let page = one.snapshot();
    let other = apic(0);
    other.restore(&page).unwrap();
    assert_eq!(other.acknowledge(), Some(0x61));
    assert!(other.lint1_nmi());
    assert!(other.accepts_pic());
}

#[test]
fn timer_interrupts_when_due() {
    let timers = Timers::new();
    let mailbox = mailbox();
    let apic = LocalApic::new(0, true, CONFIG, mailbox.clone(), &timers);
    write(&apic, reg::SVR, 0x1ff);
    write(&apic, reg::LVT_TIMER, 0x77);
    write(&apic, reg::TIMER_DIVIDE, 0xb);
    let start = crate::time::monotonic_ns();
    mailbox.take(Request::EVENT);
    write(&apic, reg::TIMER_INITIAL, 3_000_000);
    while !mailbox.take(Request::EVENT) {
        mailbox.sleep(|| !mailbox.is_empty(), 5_000_000_000);
    }
    assert!(crate::time::monotonic_ns() - start >= 3_000_000);
    assert_eq!(apic.acknowledge(), Some(0x77));
    assert_eq!(read(&apic, reg::TIMER_CURRENT), 0);
}

/// Source: SDM volume 3A, "Enabling or Disabling the Local APIC".
#[test]
fn an_apic_that_was_disabled_has_its_initial_id() {
    for trusted in [false, true] {
        let apic = apic(3);
        write(&apic, reg::ID, 9 << 24);
        assert_eq!(apic.id(), 9);
        let set = |mode: u64| apic.set_base(DEFAULT_BASE | mode, true, 40, trusted);
        set(0).unwrap();
        set(apic_base::ENABLE).unwrap();
        assert_eq!((apic.id(), read(&apic, reg::ID)), (3, 3 << 24));
        // What stays enabled keeps the ID that it was given.
        write(&apic, reg::ID, 9 << 24);
        set(apic_base::ENABLE | apic_base::BSP).unwrap();
        assert_eq!(apic.id(), 9);
        // By way of x2APIC mode.
        set(apic_base::ENABLE | apic_base::X2APIC).unwrap();
        assert_eq!(apic.id(), 3);
        set(0).unwrap();
        set(apic_base::ENABLE).unwrap();
        assert_eq!((apic.id(), read(&apic, reg::ID)), (3, 3 << 24));
    }
}
