//! FXSAVE, FXRSTOR, the XSAVE family, MXCSR and VZERO*.
//!
//! The processor keeps its state in the standard XSAVE layout, every component always valid;
//! whether a component is in its initial state is found by looking.

use super::form::Family;
use crate::execute::attempt;
use crate::features::host_cpuid;
use crate::op::{Flow, Op, Stop};
use crate::state::ExtendedState;
use crate::vcpu::{Cause, Vcpu};
use arch::control_registers::{Cr4, Xcr0};
use arch::controls::SecondaryControls;
use arch::cpuid::Feature;
use arch::exit::{ExitReason, VmExit};
use std::sync::OnceLock;

/// The instruction of the XSAVE family: values of `aux`.
pub(super) mod kind {
    pub(crate) const XSAVE: u8 = 0;
    pub(crate) const XSAVEOPT: u8 = 1;
    pub(crate) const XSAVEC: u8 = 2;
    pub(crate) const XSAVES: u8 = 3;
}

/// MXCSR bits that may be set.
const MXCSR_MASK: u32 = 0xffff;

/// Bits of the x87 control word that can be set, and the one that always is.
const X87_CONTROL: u16 = 0x1f3f;
const X87_CONTROL_ONE: u16 = 1 << 6;
/// Exception flags of the x87 status word, and its summaries: ES and B.
const X87_EXCEPTIONS: u16 = 0x3f;
const X87_SUMMARIES: u16 = 1 << 7 | 1 << 15;

/// Bytes of the legacy region.
const LEGACY: usize = 512;
/// Offset of XSTATE_BV, XCOMP_BV and the rest of the header.
const HEADER: usize = 512;
/// Bytes up to the end of the header.
const BASE: usize = 576;
/// XCOMP_BV: the area is compacted.
const COMPACTED: u64 = 1 << 63;

/// PKRU's component.
const PKRU: u32 = 9;

/// The components beyond the legacy region: number, offset in the standard format, size.
///
/// Makers put PKRU at different offsets, and VMMs take the host's for the guest's: here it is the
/// host's, too, and Intel's where the host has none.
fn extended() -> [(u32, usize, usize); 2] {
    static OFFSET: OnceLock<usize> = OnceLock::new();
    let pkru = *OFFSET.get_or_init(|| match host_cpuid(0xd, PKRU).0 {
        [0, ..] => 2688,
        [_, offset, ..] => offset as usize,
    });
    [(2, BASE, 256), (PKRU, pkru, 8)]
}

impl Vcpu {
    /// Offset and size of an XSAVE component in the standard format, as CPUID leaf 0DH reports
    /// them; `None` for components this processor does not have.
    pub fn xsave_component(number: u32) -> Option<(u32, u32)> {
        extended()
            .into_iter()
            .find(|(n, ..)| *n == number)
            .map(|(_, offset, size)| (offset as u32, size as u32))
    }

    fn general_if(&mut self, bad: bool) -> Result<(), Stop> {
        if bad {
            Err(self.general_protection())
        } else {
            Ok(())
        }
    }

    /// The component's bytes as the standard format holds them.
    fn component(&self, number: u32) -> Vec<u8> {
        match number {
            PKRU => {
                let mut bytes = vec![0; 8];
                bytes[..4].copy_from_slice(&self.state.pkru.to_le_bytes());
                bytes
            }
            _ => extended()
                .into_iter()
                .find(|(n, ..)| *n == number)
                .map(|(_, offset, size)| {
                    let size = self.reachable(number, size);
                    self.state.extended.0[offset..offset + size].to_vec()
                })
                .unwrap_or_default(),
        }
    }

    fn set_component(&mut self, number: u32, bytes: &[u8]) {
        if number == PKRU {
            self.state.pkru = u32::from_le_bytes(bytes[..4].try_into().unwrap_or_default());
            self.update_context();
            return;
        }
        if let Some((_, offset, _)) = extended().into_iter().find(|(n, ..)| *n == number) {
            self.state.extended.0[offset..offset + bytes.len()].copy_from_slice(bytes);
        }
    }

    /// How much of a component of `size` bytes the current mode reaches: half of the YMM
    /// registers outside 64-bit code.
    fn reachable(&self, number: u32, size: usize) -> usize {
        if number == 2 && !self.long64 {
            size / 2
        } else {
            size
        }
    }

    /// What loading x87 state makes of it: fixed bits of the control word, the summaries in the
    /// status word that follow from exceptions and masks, eleven bits of opcode.
    fn settle_x87(&mut self) {
        let area = &mut self.state.extended.0;
        let word = |at: usize| u16::from_le_bytes([area[at], area[at + 1]]);
        let (control, status, opcode) = (word(0), word(2), word(6));
        let control = control & X87_CONTROL | X87_CONTROL_ONE;
        let pending = status & !control & X87_EXCEPTIONS != 0;
        let status = if pending {
            status | X87_SUMMARIES
        } else {
            status & !X87_SUMMARIES
        };
        for (at, value) in [(0, control), (2, status), (6, opcode & 0x7ff)] {
            area[at..at + 2].copy_from_slice(&value.to_le_bytes());
        }
    }
}

/// FXSAVE; `aux` 1 for FXSAVE64.
pub(super) fn fxsave(cpu: &mut Vcpu, op: &Op) -> Flow {
    attempt!(cpu.check_family(Family::X87));
    let address = attempt!(cpu.address(op, LEGACY as u64, true));
    attempt!(cpu.general_if(address & 15 != 0));
    let area = cpu.state.extended.0;
    let wide = op.aux == 1;
    let mut image = [0; LEGACY];
    image.copy_from_slice(&area[..LEGACY]);
    image[28..32].copy_from_slice(&MXCSR_MASK.to_le_bytes());
    narrow_pointers(&mut image, wide);
    // The last 48 bytes are for software; the registers a mode cannot name stay as they were.
    let registers = if cpu.long64 { 16 } else { 8 };
    cpu.write_bytes(address, op.segment, &image[..160 + 16 * registers])
        .into()
}

/// Without REX.W the pointers are offset and selector; selectors are not kept.
fn narrow_pointers(image: &mut [u8], wide: bool) {
    if !wide {
        image[12..16].fill(0);
        image[20..24].fill(0);
    }
}

/// FXRSTOR; `aux` 1 for FXRSTOR64.
pub(super) fn fxrstor(cpu: &mut Vcpu, op: &Op) -> Flow {
    attempt!(cpu.check_family(Family::X87));
    let address = attempt!(cpu.address(op, LEGACY as u64, false));
    attempt!(cpu.general_if(address & 15 != 0));
    let mut image = [0; LEGACY];
    attempt!(cpu.read_bytes(address, op.segment, &mut image));
    let mxcsr = u32::from_le_bytes([image[24], image[25], image[26], image[27]]);
    attempt!(cpu.general_if(mxcsr & !MXCSR_MASK != 0));
    narrow_pointers(&mut image, op.aux == 1);
    let area = &mut cpu.state.extended.0;
    area[..24].copy_from_slice(&image[..24]);
    area[32..160].copy_from_slice(&image[32..160]);
    cpu.settle_x87();
    let area = &mut cpu.state.extended.0;
    if cpu.state.cr4.contains(Cr4::OSFXSR) {
        let registers = if cpu.long64 { 16 } else { 8 };
        area[24..28].copy_from_slice(&image[24..28]);
        area[160..160 + 16 * registers].copy_from_slice(&image[160..160 + 16 * registers]);
    }
    Flow::Next
}

impl Vcpu {
    fn requested_components(&self, supervisor: bool) -> u64 {
        let mask = u64::from(self.reg::<u32>(0)) | u64::from(self.reg::<u32>(16)) << 32;
        let enabled = self.state.xcr0.bits();
        let enabled = if supervisor {
            enabled | self.state.msrs.xss
        } else {
            enabled
        };
        mask & enabled
    }

    fn check_xsave(&mut self, supervisor: bool) -> Result<(), Stop> {
        if !self.state.cr4.contains(Cr4::OSXSAVE) {
            return Err(self.undefined());
        }
        if supervisor {
            self.require_control(SecondaryControls::ENABLE_XSAVES)?;
            self.require_cpl0()?;
        }
        if self.state.cr0.contains(arch::control_registers::Cr0::TS) {
            return Err(self.raise(arch::exception::Exception::DeviceNotAvailable));
        }
        Ok(())
    }

    fn xss_exit(&mut self, op: &Op, reason: ExitReason) -> Result<(), Stop> {
        let mask = u64::from(self.reg::<u32>(0)) | u64::from(self.reg::<u32>(16)) << 32;
        if mask & self.state.msrs.xss & self.controls().xss_exiting_bitmap == 0 {
            return Ok(());
        }
        let mut exit = VmExit::new(reason);
        exit.instruction_length = op.len.into();
        exit.instruction_info = self.operand_info(op);
        Err(self.stop_with(Cause::Exit(exit)))
    }
}

/// Where each extended component of `components` lies in a compacted area, and its end.
fn compacted(components: u64) -> (Vec<(u32, usize, usize)>, usize) {
    let mut at = BASE;
    let mut places = Vec::new();
    for (number, _, size) in extended() {
        if components >> number & 1 != 0 {
            places.push((number, at, size));
            at += size;
        }
    }
    (places, at)
}

fn standard(components: u64) -> (Vec<(u32, usize, usize)>, usize) {
    let places: Vec<_> = extended()
        .into_iter()
        .filter(|(n, ..)| components >> n & 1 != 0)
        .collect();
    let end = places
        .iter()
        .map(|(_, offset, size)| offset + size)
        .max()
        .unwrap_or(BASE);
    (places, end)
}

/// XSAVE, XSAVEOPT, XSAVEC, XSAVES; `aux` says which, `aux2` is 1 for the 64-bit form.
pub(super) fn xsave(cpu: &mut Vcpu, op: &Op) -> Flow {
    let supervisor = op.aux == kind::XSAVES;
    attempt!(cpu.check_xsave(supervisor));
    if supervisor {
        attempt!(cpu.xss_exit(op, ExitReason::Xsaves));
    }
    let components = cpu.requested_components(supervisor);
    let compact = matches!(op.aux, kind::XSAVEC | kind::XSAVES);
    let (places, end) = if compact {
        compacted(components)
    } else {
        standard(components)
    };
    let address = attempt!(cpu.address(op, BASE as u64, true));
    attempt!(cpu.general_if(address & 63 != 0));
    let in_use = cpu.components_in_use();
    // XSAVE writes every requested component; the others leave out those in initial state.
    let saved = if op.aux == kind::XSAVE {
        components
    } else {
        components & in_use
    };
    let mut header = [0; 64];
    attempt!(cpu.read_wide(address.wrapping_add(HEADER as u64), op.segment, &mut header));
    let old = u64::from_le_bytes(header[..8].try_into().unwrap_or_default());
    // Everything is checked before anything is written.
    for (number, offset, size) in &places {
        let at = address.wrapping_add(*offset as u64);
        attempt!(cpu.check_write(at, cpu.reachable(*number, *size), op.segment));
    }
    attempt!(cpu.check_write(address, BASE, op.segment));
    let _ = end;
    let area = cpu.state.extended.0;
    let mut image = [0; LEGACY];
    image.copy_from_slice(&area[..LEGACY]);
    image[28..32].copy_from_slice(&MXCSR_MASK.to_le_bytes());
    narrow_pointers(&mut image, op.aux2 == 1);
    let saved_set = Xcr0::from_bits_retain(saved);
    let seg = op.segment;
    if saved_set.contains(Xcr0::X87) {
        attempt!(cpu.write_bytes(address, seg, &image[..24]));
        attempt!(cpu.write_bytes(address.wrapping_add(32), seg, &image[32..160]));
    }
    let wants_mxcsr = components & (Xcr0::SSE | Xcr0::AVX).bits() != 0;
    if wants_mxcsr && (!compact || saved_set.contains(Xcr0::SSE))
        || compact && saved_set.contains(Xcr0::SSE)
    {
        attempt!(cpu.write_bytes(address.wrapping_add(24), seg, &image[24..32]));
    }
    if saved_set.contains(Xcr0::SSE) {
        let registers = if cpu.long64 { 16 } else { 8 };
        let end = 160 + 16 * registers;
        attempt!(cpu.write_bytes(address.wrapping_add(160), seg, &image[160..end]));
    }
    for (number, offset, _) in places {
        if saved >> number & 1 != 0 {
            let bytes = cpu.component(number);
            attempt!(cpu.write_bytes(address.wrapping_add(offset as u64), seg, &bytes));
        }
    }
    let at = address.wrapping_add(HEADER as u64);
    if compact {
        let state = (components & in_use).to_le_bytes();
        attempt!(cpu.write_bytes(at, seg, &state));
        let layout = (components | COMPACTED).to_le_bytes();
        attempt!(cpu.write_bytes(at.wrapping_add(8), seg, &layout));
    } else {
        let state = old & !components | components & in_use;
        attempt!(cpu.write_bytes(at, seg, &state.to_le_bytes()));
    }
    Flow::Next
}

/// XRSTOR and XRSTORS.
pub(super) fn xrstor(cpu: &mut Vcpu, op: &Op) -> Flow {
    let supervisor = op.aux == kind::XSAVES;
    attempt!(cpu.check_xsave(supervisor));
    if supervisor {
        attempt!(cpu.xss_exit(op, ExitReason::Xrstors));
    }
    let components = cpu.requested_components(supervisor);
    let address = attempt!(cpu.address(op, BASE as u64, false));
    attempt!(cpu.general_if(address & 63 != 0));
    let mut image = [0; BASE];
    attempt!(cpu.read_bytes(address, op.segment, &mut image));
    let word = |at: usize| u64::from_le_bytes(image[at..at + 8].try_into().unwrap_or_default());
    let (state, layout) = (word(HEADER), word(HEADER + 8));
    let compact = layout & COMPACTED != 0;
    let allowed = cpu.state.xcr0.bits() | if supervisor { cpu.state.msrs.xss } else { 0 };
    let reserved = if compact {
        let zero = image[HEADER + 16..BASE].iter().all(|b| *b == 0);
        let compaction = cpu.has(Feature::XSAVEC);
        !compaction || !zero || layout & !(allowed | COMPACTED) != 0 || state & !layout != 0
    } else {
        supervisor || layout != 0 || word(HEADER + 16) != 0 || state & !allowed != 0
    };
    attempt!(cpu.general_if(reserved));
    let present = components & state;
    let (places, _) = if compact {
        compacted(layout)
    } else {
        standard(allowed)
    };
    let mxcsr = u32::from_le_bytes([image[24], image[25], image[26], image[27]]);
    let loads_mxcsr = if compact {
        present & Xcr0::SSE.bits() != 0
    } else {
        components & (Xcr0::SSE | Xcr0::AVX).bits() != 0
    };
    attempt!(cpu.general_if(loads_mxcsr && mxcsr & !MXCSR_MASK != 0));
    let mut loaded = Vec::new();
    for (number, offset, size) in places {
        if components >> number & 1 == 0 {
            continue;
        }
        let mut bytes = vec![0; cpu.reachable(number, size)];
        if present >> number & 1 != 0 {
            let at = address.wrapping_add(offset as u64);
            attempt!(cpu.read_bytes(at, op.segment, &mut bytes));
        }
        loaded.push((number, bytes));
    }
    // Components of `components` that the compacted layout lacks become initial too.
    if compact {
        for (number, _, size) in extended() {
            if components >> number & 1 != 0 && layout >> number & 1 == 0 {
                loaded.push((number, vec![0; cpu.reachable(number, size)]));
            }
        }
    }
    narrow_pointers(&mut image, op.aux2 == 1);
    let initial = ExtendedState::initial();
    let source = |bit: Xcr0| {
        if present & bit.bits() != 0 {
            &image[..]
        } else {
            &initial.0[..]
        }
    };
    let area = &mut cpu.state.extended.0;
    if components & Xcr0::X87.bits() != 0 {
        let from = source(Xcr0::X87);
        area[..24].copy_from_slice(&from[..24]);
        area[32..160].copy_from_slice(&from[32..160]);
        cpu.settle_x87();
    }
    let area = &mut cpu.state.extended.0;
    if components & Xcr0::SSE.bits() != 0 {
        let registers = if cpu.long64 { 16 } else { 8 };
        let end = 160 + 16 * registers;
        area[160..end].copy_from_slice(&source(Xcr0::SSE)[160..end]);
    }
    if loads_mxcsr {
        cpu.state.extended.set_mxcsr(mxcsr);
    } else if compact && components & Xcr0::SSE.bits() != 0 {
        cpu.state.extended.set_mxcsr(ExtendedState::MXCSR_RESET);
    }
    for (number, bytes) in loaded {
        cpu.set_component(number, &bytes);
    }
    Flow::Next
}

/// LDMXCSR.
pub(super) fn ldmxcsr(cpu: &mut Vcpu, op: &Op) -> Flow {
    attempt!(cpu.check_family(Family::Sse));
    let value = attempt!(cpu.load::<u32>(op));
    attempt!(cpu.general_if(value & !MXCSR_MASK != 0));
    cpu.state.extended.set_mxcsr(value);
    Flow::Next
}

/// STMXCSR.
pub(super) fn stmxcsr(cpu: &mut Vcpu, op: &Op) -> Flow {
    attempt!(cpu.check_family(Family::Sse));
    let value = cpu.state.extended.mxcsr();
    cpu.store(op, value).into()
}

/// VZEROUPPER (`aux` 0) and VZEROALL (1).
pub(super) fn vzero(cpu: &mut Vcpu, op: &Op) -> Flow {
    attempt!(cpu.check_family(Family::Avx));
    let registers = if cpu.long64 { 16 } else { 8 };
    let area = &mut cpu.state.extended.0;
    let high = ExtendedState::YMM_HIGH;
    area[high..high + 16 * registers].fill(0);
    if op.aux == 1 {
        let low = ExtendedState::XMM;
        area[low..low + 16 * registers].fill(0);
    }
    Flow::Next
}
