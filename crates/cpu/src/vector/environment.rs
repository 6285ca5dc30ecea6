//! FNSTENV, FLDENV, FNSAVE, FRSTOR: the x87 environment in its four layouts.
//!
//! Source: SDM volume 1, "Saving the x87 FPU's State with FSTENV/FNSTENV and FSAVE/FNSAVE".

use super::form::Family;
use crate::execute::attempt;
use crate::op::{Flow, Op};
use crate::state::ExtendedState;
use crate::vcpu::Vcpu;
use iced_x86::MemorySize;

/// 2 or 4: the operand size that the memory operand implies.
pub(super) fn operand_size(size: MemorySize) -> u8 {
    if matches!(size, MemorySize::FpuEnv14 | MemorySize::FpuState94) {
        2
    } else {
        4
    }
}

const FSW: usize = 2;
const FTW: usize = 4;
const FOP: usize = 6;
const FIP: usize = 8;
const FDP: usize = 16;

fn word(area: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([area[at], area[at + 1]])
}

fn dword(area: &[u8], at: usize) -> u32 {
    u32::from(word(area, at)) | u32::from(word(area, at + 2)) << 16
}

/// The two-bit tags of the environment from the one-bit tags of FXSAVE and the registers.
fn full_tags(area: &[u8]) -> u16 {
    let top = word(area, FSW) >> 11 & 7;
    let mut tags = 0;
    for physical in 0..8u16 {
        let tag = if area[FTW] >> physical & 1 == 0 {
            3
        } else {
            let stack = (physical.wrapping_sub(top) & 7) as usize;
            let at = ExtendedState::ST + 16 * stack;
            let exponent = word(area, at + 8) & 0x7fff;
            let fraction = u64::from(dword(area, at)) | u64::from(dword(area, at + 4)) << 32;
            match (exponent, fraction) {
                (0, 0) => 1,
                (1..=0x7ffe, f) if f >> 63 == 1 => 0,
                _ => 2,
            }
        };
        tags |= tag << (2 * physical);
    }
    tags
}

/// FNSTENV (`aux` 0), FLDENV (1), FNSAVE (2), FRSTOR (3); `aux2` is the operand size.
pub(super) fn environment(cpu: &mut Vcpu, op: &Op) -> Flow {
    attempt!(cpu.check_family(Family::X87));
    let wide = op.aux2 == 4;
    let environment = if wide { 28 } else { 14 };
    let state = op.aux >= 2;
    let size = if state { environment + 80 } else { environment };
    let load = op.aux & 1 == 1;
    let address = attempt!(cpu.address(op, size as u64, !load));
    let mut bytes = [0; 108];
    let bytes = &mut bytes[..size];
    if load {
        attempt!(cpu.read_bytes(address, op.segment, bytes));
        cpu.load_environment(bytes, wide, state.then_some(environment));
        return Flow::Next;
    }
    cpu.store_environment(bytes, wide);
    if state {
        for i in 0..8 {
            let from = ExtendedState::ST + 16 * i;
            let to = environment + 10 * i;
            bytes[to..to + 10].copy_from_slice(&cpu.state.extended.0[from..from + 10]);
        }
    }
    attempt!(cpu.write_bytes(address, op.segment, bytes));
    let area = &mut cpu.state.extended.0;
    if state {
        // FNSAVE initialises the unit.
        let initial = ExtendedState::initial();
        area[..24].copy_from_slice(&initial.0[..24]);
    } else {
        // FNSTENV masks all exceptions, so that nothing is pending any more.
        area[0] |= 0x3f;
        area[FSW] &= 0x7f;
        area[FSW + 1] &= 0x7f;
    }
    Flow::Next
}

impl Vcpu {
    fn protected_layout(&self) -> bool {
        !self.real_segments()
    }

    fn store_environment(&self, bytes: &mut [u8], wide: bool) {
        let area = &self.state.extended.0;
        let (fip, fdp) = (dword(area, FIP), dword(area, FDP));
        let fop = u32::from(word(area, FOP) & 0x7ff);
        let words: [u32; 7] = match (wide, self.protected_layout()) {
            (_, true) => [
                word(area, 0).into(),
                word(area, FSW).into(),
                full_tags(area).into(),
                fip,
                if wide { fop << 16 } else { 0 },
                fdp,
                0,
            ],
            (true, false) => [
                word(area, 0).into(),
                word(area, FSW).into(),
                full_tags(area).into(),
                fip & 0xffff,
                fip >> 16 << 12 | fop,
                fdp & 0xffff,
                fdp >> 16 << 12,
            ],
            (false, false) => [
                word(area, 0).into(),
                word(area, FSW).into(),
                full_tags(area).into(),
                fip & 0xffff,
                (fip >> 16 & 0xf) << 12 | fop,
                fdp & 0xffff,
                (fdp >> 16 & 0xf) << 12,
            ],
        };
        for (i, value) in words.into_iter().enumerate() {
            if wide {
                let high: u32 = if i < 3 { 0xffff_0000 } else { 0 };
                let high = if i == 6 && self.protected_layout() {
                    0xffff_0000
                } else {
                    high
                };
                bytes[4 * i..4 * i + 4].copy_from_slice(&(value | high).to_le_bytes());
            } else {
                bytes[2 * i..2 * i + 2].copy_from_slice(&(value as u16).to_le_bytes());
            }
        }
    }

    fn load_environment(&mut self, bytes: &[u8], wide: bool, registers: Option<usize>) {
        let protected = self.protected_layout();
        let field = |i: usize| {
            if wide {
                dword(bytes, 4 * i)
            } else {
                u32::from(word(bytes, 2 * i))
            }
        };
        let (fip, fdp, fop) = match (wide, protected) {
            (true, true) => (field(3), field(5), field(4) >> 16),
            (false, true) => (field(3), field(5), 0),
            (true, false) => (
                field(3) & 0xffff | field(4) >> 12 << 16,
                field(5) & 0xffff | field(6) >> 12 << 16,
                field(4),
            ),
            (false, false) => (
                field(3) | field(4) >> 12 << 16,
                field(5) | field(6) >> 12 << 16,
                field(4),
            ),
        };
        let tags = field(2) as u16;
        let area = &mut self.state.extended.0;
        area[0..2].copy_from_slice(&((field(0) as u16 & 0x1f7f) | 0x40).to_le_bytes());
        // ES and B follow from the flags and masks.
        let (fcw, fsw) = (field(0), field(1) & !0x8080);
        let pending = fsw & 0x3f & !fcw != 0;
        let fsw = if pending { fsw | 0x8080 } else { fsw };
        area[FSW..FSW + 2].copy_from_slice(&(fsw as u16).to_le_bytes());
        area[FTW] = (0..8)
            .filter(|n| tags >> (2 * n) & 3 != 3)
            .fold(0, |set, n| set | 1 << n);
        area[FOP..FOP + 2].copy_from_slice(&(fop as u16 & 0x7ff).to_le_bytes());
        area[FIP..FIP + 8].copy_from_slice(&u64::from(fip).to_le_bytes());
        area[FDP..FDP + 8].copy_from_slice(&u64::from(fdp).to_le_bytes());
        if let Some(at) = registers {
            for i in 0..8 {
                let to = ExtendedState::ST + 16 * i;
                area[to..to + 10].copy_from_slice(&bytes[at + 10 * i..at + 10 * i + 10]);
            }
        }
    }
}
