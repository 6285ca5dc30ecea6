//! The 8254 programmable interval timer and port 0x61.
//!
//! Counters are not stepped: a counter's value follows from the time since its count was loaded.
//! Channel 0 drives GSI 0 through the VM's timer thread; channel 2 is gated by port 0x61 and read
//! back through it.
//!
//! With reinjection (KVM's default) ticks the guest has not acknowledged are counted and
//! delivered one by one after each acknowledgement; without it they coalesce.
//!
//! Source: Intel 8254 data sheet; 82371 data sheet for port 0x61.

use crate::time::{monotonic_ns, scale};
use kvm_bindings::{KVM_PIT_FLAGS_HPET_LEGACY, kvm_pit_channel_state, kvm_pit_state2};

/// Frequency of the counters in Hz.
pub const FREQUENCY: u64 = 1_193_182;
/// Channel 0 is not run with a shorter period than this, in nanoseconds.
const SHORTEST_PERIOD: u64 = 200_000;
const NS: u64 = 1_000_000_000;

/// Which byte a 16-bit access is at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
enum Step {
    /// Access mode not set.
    #[default]
    None = 0,
    Low = 1,
    High = 2,
    /// Low byte of a pair.
    Word0 = 3,
    /// High byte of a pair.
    Word1 = 4,
}

impl Step {
    fn from_bits(bits: u8) -> Step {
        match bits {
            1 => Step::Low,
            2 => Step::High,
            3 => Step::Word0,
            4 => Step::Word1,
            _ => Step::None,
        }
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Channel {
    count: u32,
    latched_count: u16,
    /// Bytes of the latched count still to read, as the access mode; 0 when not latched.
    count_latched: u8,
    latched_status: Option<u8>,
    read_state: Step,
    write_state: Step,
    write_latch: u8,
    rw_mode: u8,
    mode: u8,
    bcd: bool,
    gate: bool,
    load_time: u64,
}

impl Channel {
    /// Counter ticks since the count was loaded.
    fn ticks(&self, now: u64) -> u64 {
        scale(now.saturating_sub(self.load_time), FREQUENCY, NS)
    }

    fn value(&self, now: u64) -> u16 {
        let ticks = self.ticks(now);
        let count = self.count as u64;
        let value = match self.mode {
            0 | 1 | 4 | 5 => count.wrapping_sub(ticks) & 0xffff,
            3 => count - (2 * ticks) % count,
            _ => count - ticks % count,
        };
        if self.bcd {
            to_bcd(value as u16 % 10_000)
        } else {
            value as u16
        }
    }

    fn output(&self, now: u64) -> bool {
        let ticks = self.ticks(now);
        let count = self.count as u64;
        match self.mode {
            0 => ticks >= count,
            1 => ticks < count,
            2 => ticks.is_multiple_of(count) && ticks != 0,
            3 => ticks % count < count.div_ceil(2),
            _ => ticks == count,
        }
    }

    fn set_gate(&mut self, gate: bool, now: u64) {
        let rises = gate && !self.gate;
        // A rising gate restarts modes 1, 2, 3 and 5.
        if rises && matches!(self.mode, 1 | 2 | 3 | 5) {
            self.load_time = now;
        }
        self.gate = gate;
    }

    fn load(&mut self, value: u16, now: u64) {
        let value = if self.bcd {
            from_bcd(value)
        } else {
            value as u32
        };
        let full = if self.bcd { 10_000 } else { 0x1_0000 };
        self.count = if value == 0 { full } else { value };
        self.load_time = now;
    }

    fn latch_count(&mut self, now: u64) {
        if self.count_latched == 0 {
            self.latched_count = self.value(now);
            self.count_latched = self.rw_mode;
        }
    }

    fn latch_status(&mut self, now: u64) {
        if self.latched_status.is_none() {
            let output = (self.output(now) as u8) << 7;
            self.latched_status =
                Some(output | self.rw_mode << 4 | self.mode << 1 | self.bcd as u8);
        }
    }

    /// Writes one byte of the count; true when a new count was loaded.
    fn write(&mut self, value: u8, now: u64) -> bool {
        match self.write_state {
            Step::None => return false,
            Step::Low => self.load(value as u16, now),
            Step::High => self.load((value as u16) << 8, now),
            Step::Word0 => {
                self.write_latch = value;
                self.write_state = Step::Word1;
                return false;
            }
            Step::Word1 => {
                self.load(self.write_latch as u16 | (value as u16) << 8, now);
                self.write_state = Step::Word0;
            }
        }
        true
    }

    fn read(&mut self, now: u64) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        if self.count_latched != 0 {
            let latched = self.latched_count;
            let (byte, rest) = match self.count_latched {
                3 => (latched as u8, 4),
                2 | 4 => ((latched >> 8) as u8, 0),
                _ => (latched as u8, 0),
            };
            self.count_latched = rest;
            return byte;
        }
        let value = self.value(now);
        match self.read_state {
            Step::High => (value >> 8) as u8,
            Step::Word0 => {
                self.read_state = Step::Word1;
                value as u8
            }
            Step::Word1 => {
                self.read_state = Step::Word0;
                (value >> 8) as u8
            }
            _ => value as u8,
        }
    }

    fn state(&self) -> kvm_pit_channel_state {
        kvm_pit_channel_state {
            count: self.count,
            latched_count: self.latched_count,
            count_latched: self.count_latched,
            status_latched: self.latched_status.is_some() as u8,
            status: self.latched_status.unwrap_or(0),
            read_state: self.read_state as u8,
            write_state: self.write_state as u8,
            write_latch: self.write_latch,
            rw_mode: self.rw_mode,
            mode: self.mode,
            bcd: self.bcd as u8,
            gate: self.gate as u8,
            count_load_time: self.load_time as i64,
        }
    }

    fn from_state(state: &kvm_pit_channel_state) -> Channel {
        Channel {
            // A zero count means the longest one.
            count: if state.count == 0 {
                0x1_0000
            } else {
                state.count.min(0x1_0000)
            },
            latched_count: state.latched_count,
            count_latched: state.count_latched,
            latched_status: (state.status_latched != 0).then_some(state.status),
            read_state: Step::from_bits(state.read_state),
            write_state: Step::from_bits(state.write_state),
            write_latch: state.write_latch,
            rw_mode: state.rw_mode & 3,
            mode: state.mode & 7,
            bcd: state.bcd != 0,
            gate: state.gate != 0,
            load_time: state.count_load_time as u64,
        }
    }
}

fn to_bcd(value: u16) -> u16 {
    (0..4).fold(0, |bcd, digit| {
        bcd | (value / 10u16.pow(digit) % 10) << (4 * digit)
    })
}

fn from_bcd(bcd: u16) -> u32 {
    (0..4).rev().fold(0, |value, digit| {
        value * 10 + (bcd >> (4 * digit) & 0xf).min(9) as u32
    })
}

/// The 8254 and port 0x61.
#[derive(Debug)]
pub struct Pit {
    channels: [Channel; 3],
    speaker_data: bool,
    hpet_legacy: bool,
    /// Port 0x61 is decoded here.
    speaker_port: bool,
    reinject: bool,
    /// Nanoseconds between ticks of channel 0; 0 when it runs once.
    period: u64,
    deadline: Option<u64>,
    /// Ticks not yet delivered.
    pending: u32,
    /// The guest has acknowledged the last delivered tick.
    acknowledged: bool,
}

impl Pit {
    /// The timer at reset; `speaker_port` says whether port 0x61 is decoded.
    pub fn new(speaker_port: bool) -> Pit {
        let now = monotonic_ns();
        let channel = |n| Channel {
            mode: 0xff,
            gate: n != 2,
            count: 0x1_0000,
            load_time: now,
            ..Channel::default()
        };
        Pit {
            channels: [channel(0), channel(1), channel(2)],
            speaker_data: false,
            hpet_legacy: false,
            speaker_port,
            reinject: true,
            period: 0,
            deadline: None,
            pending: 0,
            acknowledged: true,
        }
    }

    /// Whether the timer decodes `port`.
    pub fn decodes(&self, port: u16) -> bool {
        matches!(port, 0x40..=0x43) || (self.speaker_port && port == 0x61)
    }

    /// When channel 0 ticks next.
    pub fn deadline(&self) -> Option<u64> {
        self.deadline
    }

    /// Starts or stops channel 0's ticks after its count or mode changed.
    fn restart(&mut self) {
        let channel = &self.channels[0];
        self.pending = 0;
        self.acknowledged = true;
        let length = scale(channel.count as u64, NS, FREQUENCY);
        // The interrupt is on the output's rising edge: once for modes 0 and 4 (and the
        // hardware-triggered 1, whose gate is always on), each period for 2 and 3.
        self.period = match channel.mode {
            2 | 3 => length.max(SHORTEST_PERIOD),
            _ => 0,
        };
        let runs = matches!(channel.mode, 0..=4) && !self.hpet_legacy;
        self.deadline = runs.then(|| channel.load_time + length.max(self.period) + 1);
    }

    /// Whether channel 0 has a tick to deliver.
    pub fn is_due(&self) -> bool {
        self.deadline
            .is_some_and(|deadline| deadline <= monotonic_ns())
    }

    /// Moves past every tick that is due; true if a tick is to be delivered now.
    pub fn tick(&mut self) -> bool {
        let now = monotonic_ns();
        let Some(deadline) = self.deadline.filter(|&deadline| deadline <= now) else {
            return false;
        };
        let mut ticks = 1;
        self.deadline = (self.period != 0).then(|| {
            ticks += (now - deadline) / self.period;
            deadline + ticks * self.period
        });
        if !self.reinject {
            return true;
        }
        self.pending = self.pending.saturating_add(ticks as u32);
        self.take_pending()
    }

    fn take_pending(&mut self) -> bool {
        if !self.acknowledged || self.pending == 0 {
            return false;
        }
        self.acknowledged = false;
        self.pending -= 1;
        true
    }

    /// The guest acknowledged GSI 0; true if another tick is to be delivered now.
    pub fn acknowledge(&mut self) -> bool {
        self.acknowledged = true;
        self.reinject && self.take_pending()
    }

    /// GSI 0 was not taken by anyone, so no acknowledgement will come.
    pub fn not_taken(&mut self) {
        self.acknowledged = true;
    }

    /// KVM_REINJECT_CONTROL.
    pub fn set_reinject(&mut self, reinject: bool) {
        self.reinject = reinject;
        self.pending = 0;
        self.acknowledged = true;
    }

    /// Writes a port; true if channel 0's deadline changed.
    pub fn write(&mut self, port: u16, value: u8) -> bool {
        let now = monotonic_ns();
        match port {
            0x40..=0x42 => {
                let n = (port - 0x40) as usize;
                let loaded = self.channels[n].write(value, now);
                if loaded && n == 0 {
                    self.restart();
                    return true;
                }
                false
            }
            0x43 => self.write_control(value, now),
            0x61 => {
                self.speaker_data = value & 2 != 0;
                self.channels[2].set_gate(value & 1 != 0, now);
                false
            }
            _ => false,
        }
    }

    fn write_control(&mut self, value: u8, now: u64) -> bool {
        let select = (value >> 6) as usize;
        if select == 3 {
            for (n, channel) in self.channels.iter_mut().enumerate() {
                if value >> (n + 1) & 1 == 0 {
                    continue;
                }
                if value & 0x20 == 0 {
                    channel.latch_count(now);
                }
                if value & 0x10 == 0 {
                    channel.latch_status(now);
                }
            }
            return false;
        }
        let channel = &mut self.channels[select];
        let access = value >> 4 & 3;
        if access == 0 {
            channel.latch_count(now);
            return false;
        }
        channel.rw_mode = access;
        channel.read_state = Step::from_bits(access);
        channel.write_state = Step::from_bits(access);
        channel.mode = match value >> 1 & 7 {
            mode @ 6..=7 => mode - 4,
            mode => mode,
        };
        channel.bcd = value & 1 != 0;
        if select == 0 && self.deadline.is_some() {
            // A new mode stops the channel until its count is written.
            self.deadline = None;
            return true;
        }
        false
    }

    /// Reads a port.
    pub fn read(&mut self, port: u16) -> u8 {
        let now = monotonic_ns();
        match port {
            0x40..=0x42 => self.channels[(port - 0x40) as usize].read(now),
            0x61 => {
                let channel = &self.channels[2];
                // The refresh clock toggles every 15 microseconds.
                let refresh = ((now / 15_000) & 1) as u8;
                (channel.output(now) as u8) << 5
                    | refresh << 4
                    | (self.speaker_data as u8) << 1
                    | channel.gate as u8
            }
            // The control port cannot be read.
            _ => 0,
        }
    }

    /// KVM_GET_PIT2.
    pub fn state(&self) -> kvm_pit_state2 {
        let mut state = kvm_pit_state2::default();
        for (slot, channel) in state.channels.iter_mut().zip(&self.channels) {
            *slot = channel.state();
        }
        if self.hpet_legacy {
            state.flags |= KVM_PIT_FLAGS_HPET_LEGACY;
        }
        if self.speaker_data {
            state.flags |= kvm_bindings::KVM_PIT_FLAGS_SPEAKER_DATA_ON;
        }
        state
    }

    /// KVM_SET_PIT2: counts start anew.
    pub fn set_state(&mut self, state: &kvm_pit_state2) {
        for (channel, slot) in self.channels.iter_mut().zip(&state.channels) {
            *channel = Channel::from_state(slot);
        }
        self.hpet_legacy = state.flags & KVM_PIT_FLAGS_HPET_LEGACY != 0;
        self.speaker_data = state.flags & kvm_bindings::KVM_PIT_FLAGS_SPEAKER_DATA_ON != 0;
        self.channels[0].load_time = monotonic_ns();
        self.restart();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channel_0_ticks_periodically_and_not_early() {
        let mut pit = Pit::new(true);
        let before = monotonic_ns();
        pit.write(0x43, 0x34);
        assert!(!pit.write(0x40, 0xa9));
        assert!(pit.write(0x40, 0x04));
        let deadline = pit.deadline().unwrap();
        assert!(deadline >= before + 1193 * NS / FREQUENCY);
        assert!(!pit.tick());
        std::thread::sleep(std::time::Duration::from_millis(3));
        assert!(pit.tick());
        assert!(!pit.tick(), "not due");
        assert!(pit.pending >= 1, "missed ticks wait");
        assert!(pit.acknowledge());
    }

    #[test]
    fn without_reinjection_ticks_coalesce() {
        let mut pit = Pit::new(true);
        pit.set_reinject(false);
        pit.write(0x43, 0x34);
        pit.write(0x40, 0xa9);
        pit.write(0x40, 0x04);
        std::thread::sleep(std::time::Duration::from_millis(3));
        assert!(pit.tick());
        assert!(!pit.acknowledge());
    }

    #[test]
    fn counters_count_and_latch() {
        let mut pit = Pit::new(true);
        pit.write(0x61, 1);
        pit.write(0x43, 0xb0);
        pit.write(0x42, 0xff);
        pit.write(0x42, 0xff);
        pit.write(0x43, 0x80);
        let first = pit.read(0x42) as u16 | (pit.read(0x42) as u16) << 8;
        std::thread::sleep(std::time::Duration::from_millis(2));
        pit.write(0x43, 0x80);
        let second = pit.read(0x42) as u16 | (pit.read(0x42) as u16) << 8;
        assert!(first - second >= 2386, "{first} then {second}");
        assert_eq!(pit.read(0x61) & 0x20, 0);
        pit.write(0x43, 0xe8);
        assert_eq!(pit.read(0x42), 0x30, "status: both bytes, mode 0");
        std::thread::sleep(std::time::Duration::from_millis(60));
        assert_eq!(pit.read(0x61) & 0x20, 0x20, "terminal count");
    }

    #[test]
    fn bcd() {
        assert_eq!(to_bcd(9876), 0x9876);
        assert_eq!(from_bcd(0x1234), 1234);
    }

    #[test]
    fn state_round_trip() {
        let mut pit = Pit::new(true);
        pit.write(0x43, 0x34);
        pit.write(0x40, 0x10);
        pit.write(0x40, 0x27);
        let mut other = Pit::new(true);
        other.set_state(&pit.state());
        assert!(other.deadline().is_some());
        assert_eq!(other.state().channels[0].count, 0x2710);
    }
}
