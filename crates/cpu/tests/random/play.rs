//! One guest driven by bytes: mode, registers, controls and code.

use crate::guest::{EPT_RWX, Guest, Memory};
use arch::control_registers::{Cr0, Cr4, Dr7, Efer};
use arch::controls::{PinControls, PrimaryControls, SecondaryControls};
use arch::exit::ExitReason;
use arch::interruption::InterruptionInfo;
use arch::segment::{AccessRights, DescriptorTable, Segment};
use eptide_cpu::{Bus, BusResponse, Vcpu};

/// Guest memory: enough for tables, code and data in every mode.
const MEMORY: usize = 0x4_0000;
/// A hole in the second stage, for exits.
const HOLE: u64 = 0x3_0000;
/// Entries made with one input.
const ENTRIES: usize = 12;

/// A guest that inputs are played on, one after the other.
pub struct Stage {
    guest: Guest,
    /// Pages around what the guest was given, which must keep their pattern.
    canary: Memory,
    /// Exits seen, by reason.
    pub exits: std::collections::BTreeMap<&'static str, u64>,
}

struct Sink;

impl Bus for Sink {
    fn read(&mut self, _gpa: u64, data: &mut [u8]) -> BusResponse {
        data.fill(0xa5);
        BusResponse::Done
    }
    fn write(&mut self, _gpa: u64, _data: &[u8]) -> BusResponse {
        BusResponse::Done
    }
}

/// Takes values off the input; zeros when it is used up.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn u8(&mut self) -> u8 {
        match self.0.split_first() {
            Some((first, rest)) => {
                self.0 = rest;
                *first
            }
            None => 0,
        }
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(std::array::from_fn(|_| self.u8()))
    }

    /// An address or number that is likely to mean something.
    fn value(&mut self) -> u64 {
        match self.u8() % 4 {
            0 => self.u64() % MEMORY as u64,
            1 => u64::from(self.u8()),
            2 => self.u64() | 0xffff_0000_0000_0000,
            _ => self.u64(),
        }
    }
}

impl Stage {
    pub fn new() -> Stage {
        let mut guest = Guest::new(MEMORY);
        guest.ept.set(HOLE, 0);
        let canary = Memory::new(0x2000);
        canary.write(0, &[0xcc; 0x2000]);
        Stage {
            guest,
            canary,
            exits: Default::default(),
        }
    }

    /// Sets the guest up from the input and runs it for a few exits.
    pub fn play(&mut self, input: &[u8]) {
        // Set-up and code are halves of their own, so that neither starves the other.
        let (set_up, code) = input.split_at(input.len() / 2);
        let mut input = Input(set_up);
        self.set_up(&mut input);
        let start = 0x2_0000 + u64::from(input.u8()) * 16;
        self.guest
            .memory
            .write(start, &code[..code.len().min(0x1000)]);
        self.guest.vcpu.state.rip = start & if self.real() { 0xffff } else { u64::MAX };
        if self.real() {
            let cs = &mut self.guest.vcpu.state.segments[1];
            cs.base = start & !0xffff;
            cs.selector = (cs.base >> 4) as u16;
        }
        self.guest.vcpu.entered_from_user();
        for _ in 0..ENTRIES {
            let exit = self.guest.run();
            let name = Vcpu::failed_entry_check(&exit).unwrap_or(exit.reason.name());
            *self.exits.entry(name).or_default() += 1;
            let controls = self.guest.controls.clone();
            match exit.reason {
                ExitReason::InvalidGuestState | ExitReason::TripleFault => break,
                ExitReason::EptViolation => {
                    self.guest.vcpu.emulate(&controls, None, &mut Sink);
                }
                ExitReason::PreemptionTimer => break,
                _ => {
                    let state = &mut self.guest.vcpu.state;
                    state.rip = state.rip.wrapping_add(exit.instruction_length.into());
                    self.guest.controls.interruption_info = InterruptionInfo::NONE;
                }
            }
        }
        assert!(self.canary.bytes().iter().all(|byte| *byte == 0xcc));
    }

    /// Instructions executed so far.
    pub fn instructions(&self) -> u64 {
        self.guest.vcpu.statistics().instructions
    }

    fn real(&self) -> bool {
        !self.guest.vcpu.state.cr0.contains(Cr0::PE)
    }

    fn set_up(&mut self, input: &mut Input<'_>) {
        let guest = &mut self.guest;
        let mode = input.u8() % 5;
        guest.vcpu.state = eptide_cpu::CpuState::reset();
        guest.controls.entry = arch::controls::EntryControls::empty();
        let mut noise = input.u64() | 1;
        for page in [0x6000u64, 0x7000, 0x8000, 0x9000] {
            for offset in (0..0x100).step_by(8) {
                noise ^= noise << 13;
                noise ^= noise >> 7;
                noise ^= noise << 17;
                guest.memory.write_u64(page + offset, noise);
            }
        }
        match mode {
            0 => {}
            1 | 2 => {
                let wide = if mode == 2 {
                    AccessRights::DB | AccessRights::G
                } else {
                    0
                };
                let limit = if mode == 2 { u32::MAX } else { 0xf_ffff };
                let flat = |access: u32, selector| Segment {
                    base: 0,
                    limit,
                    access: AccessRights(access | wide),
                    selector,
                };
                guest.vcpu.state.cr0 |= Cr0::PE;
                guest.vcpu.state.segments = [flat(0x93, 0x10); 6];
                guest.vcpu.state.segments[1] = flat(0x9b, 8);
            }
            _ => guest.long_mode(if mode == 3 { 0 } else { 3 }),
        }
        let state = &mut guest.vcpu.state;
        if mode >= 3 {
            state.efer |= Efer::SCE;
            state.cr4 |= Cr4::from_bits_retain(input.u64())
                & (Cr4::SMEP | Cr4::FSGSBASE | Cr4::PGE | Cr4::PCIDE);
        }
        state.gdtr = DescriptorTable {
            base: 0x6000,
            limit: 0xff,
        };
        state.idtr = DescriptorTable {
            base: 0x7000,
            limit: 0xfff,
        };
        state.tr.base = 0x8000;
        for register in &mut state.regs[..16] {
            *register = input.value();
        }
        state.set_rflags(input.u64() & 0x25_4fd5 | 2);
        if input.u8().is_multiple_of(8) {
            state.dr = std::array::from_fn(|_| input.value());
            state.dr7 = Dr7::from_bits_retain(input.u64() & 0xffff_03ff | Dr7::FIXED_1);
        }
        for byte in &mut state.extended.0[32..416] {
            *byte = input.0.first().copied().unwrap_or(0);
        }
        let controls = &mut guest.controls;
        controls.pin = PinControls::PREEMPTION_TIMER;
        controls.preemption_timer = 2000;
        controls.primary = PrimaryControls::SECONDARY
            | PrimaryControls::from_bits_truncate(input.u64() as u32)
                & (PrimaryControls::HLT_EXITING
                    | PrimaryControls::UNCONDITIONAL_IO_EXITING
                    | PrimaryControls::USE_MSR_BITMAPS
                    | PrimaryControls::INVLPG_EXITING
                    | PrimaryControls::MONITOR_TRAP_FLAG
                    | PrimaryControls::INTERRUPT_WINDOW_EXITING);
        controls.secondary = SecondaryControls::ENABLE_EPT
            | SecondaryControls::ENABLE_RDTSCP
            | SecondaryControls::ENABLE_INVPCID
            | SecondaryControls::ENABLE_XSAVES;
        controls.exception_bitmap = if input.u8().is_multiple_of(2) {
            u32::MAX
        } else {
            0
        };
        controls.interruption_info = match input.u8() % 8 {
            7 => InterruptionInfo(input.u64() as u32 | InterruptionInfo::VALID),
            _ => InterruptionInfo::NONE,
        };
        let page = guest.memory.hva + 0x2_8000;
        let rights = [EPT_RWX, 1 | 6 << 3, 5 | 6 << 3, 6 << 3 | 4][usize::from(input.u8() % 4)];
        guest.ept.set(0x2_8000, page | rights);
        guest.vcpu.flush(eptide_cpu::Flush::All);
    }
}
