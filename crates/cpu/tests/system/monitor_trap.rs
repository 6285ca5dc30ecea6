//! The monitor trap flag: at which boundary it exits. Source: SDM volume 3C, "Monitor Trap Flag".

use crate::bench::*;
use crate::guest::Guest;
use arch::control_registers::Dr7;
use arch::controls::PrimaryControls;
use arch::exit::ExitReason;
use arch::interruption::{InterruptionInfo, InterruptionType as T};

fn watched(code: &[u8]) -> Guest {
    let mut guest = long_guest();
    guest.load(code);
    guest.controls.primary |= PrimaryControls::MONITOR_TRAP_FLAG;
    guest.vcpu.state.set_rflags(0x202);
    guest
}

/// The exit comes before the first instruction of this vector's handler, and the frame names CODE.
fn stops_at_handler(mut guest: Guest, vector: u8, frame: u64, name: &str) {
    guest.run_to(ExitReason::MonitorTrapFlag);
    let handler = HANDLERS + 16 * u64::from(vector);
    assert_eq!(guest.vcpu.state.rip, handler, "{name}");
    assert_eq!(guest.stack(frame), CODE, "{name}");
}

#[test]
fn an_injected_event_is_followed_by_the_exit() {
    for (kind, vector) in [
        (T::ExternalInterrupt, 0x40),
        (T::Nmi, 2),
        (T::HardwareException, 6),
        (T::PrivilegedSoftwareException, 1),
        (T::SoftwareInterrupt, 0x41),
        (T::SoftwareException, 3),
    ] {
        let mut guest = watched(&[0x90, 0xf4]);
        guest.controls.interruption_info = InterruptionInfo::new(kind, vector, false);
        stops_at_handler(guest, vector, 0, &format!("{kind:?}"));
    }
}

/// The exit follows the exception that cut the delivery short.
#[test]
fn a_delivery_that_faults_is_followed_by_the_exit() {
    let mut guest = watched(&[0x90, 0xf4]);
    guest.vcpu.state.idtr.limit = 16 * 0x30 - 1;
    guest.controls.interruption_info = InterruptionInfo::new(T::ExternalInterrupt, 0x40, false);
    stops_at_handler(guest, 13, 1, "#GP");
}

#[test]
fn events_before_an_instruction_are_followed_by_the_exit() {
    let mut guest = watched(&[0x90, 0xf4]);
    guest.vcpu.state.pending_debug = 1 << 14;
    stops_at_handler(guest, 1, 0, "a pending debug exception");

    let mut guest = watched(&[0x90, 0xf4]);
    guest.vcpu.state.dr[0] = CODE;
    guest.vcpu.state.dr7 |= Dr7::from_bits_retain(2);
    stops_at_handler(guest, 1, 0, "an instruction breakpoint");

    let mut guest = watched(&[0x90, 0xf4]);
    guest.vcpu.state.rip = 0x7000_0000;
    guest.run_to(ExitReason::MonitorTrapFlag);
    assert_eq!(guest.vcpu.state.rip, HANDLERS + 16 * 14, "a fetch");
}

#[test]
fn events_of_an_instruction_are_followed_by_the_exit() {
    for (code, vector) in [(&[0x0f, 0x0b][..], 6), (&[0xcd, 0x41], 0x41), (&[0xf1], 1)] {
        let mut guest = watched(code);
        guest.run_to(ExitReason::MonitorTrapFlag);
        assert_eq!(guest.vcpu.state.rip, HANDLERS + 16 * vector, "{code:x?}");
    }
}
