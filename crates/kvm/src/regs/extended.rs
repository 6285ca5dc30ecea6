//! x87, SSE and extended state: KVM_GET_FPU, KVM_GET_XSAVE, KVM_GET_XCRS and their setters.

use super::*;

/// MXCSR bits that the processor implements.
const MXCSR_MASK: u32 = 0xffff;

/// Where PKRU is in the standard format.
fn pkru() -> std::ops::Range<usize> {
    let (at, _) = cpu::Vcpu::xsave_component(9).unwrap_or_default();
    at as usize..at as usize + 4
}

impl Core {
    /// KVM_GET_FPU.
    pub(crate) fn fpu(&self) -> kvm_fpu {
        let area = &self.cpu.state.extended.0;
        let u16_at = |offset: usize| u16::from_le_bytes([area[offset], area[offset + 1]]);
        let u64_at = |offset: usize| {
            u64::from_le_bytes(area[offset..offset + 8].try_into().unwrap_or_default())
        };
        let mut fpu = kvm_fpu {
            fcw: u16_at(0),
            fsw: u16_at(2),
            ftwx: area[4],
            last_opcode: u16_at(6),
            last_ip: u64_at(8),
            last_dp: u64_at(16),
            mxcsr: self.cpu.state.extended.mxcsr(),
            ..Default::default()
        };
        for (i, register) in fpu.fpr.iter_mut().enumerate() {
            let at = ExtendedState::ST + 16 * i;
            register.copy_from_slice(&area[at..at + 16]);
        }
        for (i, register) in fpu.xmm.iter_mut().enumerate() {
            let at = ExtendedState::XMM + 16 * i;
            register.copy_from_slice(&area[at..at + 16]);
        }
        fpu
    }

    /// KVM_SET_FPU.
    pub(crate) fn set_fpu(&mut self, fpu: &kvm_fpu) {
        let extended = &mut self.cpu.state.extended;
        let area = &mut extended.0;
        area[0..2].copy_from_slice(&fpu.fcw.to_le_bytes());
        area[2..4].copy_from_slice(&fpu.fsw.to_le_bytes());
        area[4] = fpu.ftwx;
        area[6..8].copy_from_slice(&fpu.last_opcode.to_le_bytes());
        area[8..16].copy_from_slice(&fpu.last_ip.to_le_bytes());
        area[16..24].copy_from_slice(&fpu.last_dp.to_le_bytes());
        for (i, register) in fpu.fpr.iter().enumerate() {
            let at = ExtendedState::ST + 16 * i;
            area[at..at + 16].copy_from_slice(register);
        }
        for (i, register) in fpu.xmm.iter().enumerate() {
            let at = ExtendedState::XMM + 16 * i;
            area[at..at + 16].copy_from_slice(register);
        }
        extended.set_mxcsr(fpu.mxcsr & MXCSR_MASK);
    }

    /// KVM_GET_XSAVE: the standard format, every offered component present.
    pub(crate) fn xsave(&self) -> Box<kvm_xsave> {
        let mut xsave = Box::<kvm_xsave>::default();
        let mut bytes = [0; 4096];
        let area = &self.cpu.state.extended.0;
        // Up to the end of what the processor keeps here.
        let end = ExtendedState::YMM_HIGH + 256;
        bytes[..end].copy_from_slice(&area[..end]);
        let header = ExtendedState::HEADER;
        let present = crate::cpuid::supported_xcr0();
        if present & Xcr0::PKRU.bits() != 0 {
            bytes[pkru()].copy_from_slice(&self.cpu.state.pkru.to_le_bytes());
        }
        bytes[header..header + 64].fill(0);
        bytes[header..header + 8].copy_from_slice(&present.to_le_bytes());
        bytes[28..32].copy_from_slice(&MXCSR_MASK.to_le_bytes());
        for (word, bytes) in xsave.region.iter_mut().zip(bytes.chunks_exact(4)) {
            *word = u32::from_le_bytes(bytes.try_into().unwrap_or_default());
        }
        xsave
    }

    /// KVM_SET_XSAVE.
    pub(crate) fn set_xsave(&mut self, xsave: &kvm_xsave) -> Result<()> {
        let mut bytes = [0; 4096];
        for (word, bytes) in xsave.region.iter().zip(bytes.chunks_exact_mut(4)) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        let header = ExtendedState::HEADER;
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap_or_default());
        let (present, compaction) = (word(header), word(header + 8));
        let mxcsr = u32::from_le_bytes(bytes[24..28].try_into().unwrap_or_default());
        let offered = crate::cpuid::supported_xcr0();
        let uses_sse = present & (Xcr0::SSE | Xcr0::AVX).bits() != 0;
        if present & !offered != 0 || compaction != 0 || (uses_sse && mxcsr & !MXCSR_MASK != 0) {
            return fail(libc::EINVAL);
        }
        let mut next = ExtendedState::initial();
        if present & Xcr0::X87.bits() != 0 {
            next.0[..24].copy_from_slice(&bytes[..24]);
            next.0[ExtendedState::ST..ExtendedState::XMM]
                .copy_from_slice(&bytes[ExtendedState::ST..ExtendedState::XMM]);
        }
        if uses_sse {
            next.set_mxcsr(mxcsr);
        }
        if present & Xcr0::SSE.bits() != 0 {
            let range = ExtendedState::XMM..ExtendedState::XMM + 256;
            next.0[range.clone()].copy_from_slice(&bytes[range]);
        }
        if present & Xcr0::AVX.bits() != 0 {
            let range = ExtendedState::YMM_HIGH..ExtendedState::YMM_HIGH + 256;
            next.0[range.clone()].copy_from_slice(&bytes[range]);
        }
        let mut keys = [0; 4];
        if present & Xcr0::PKRU.bits() != 0 {
            keys.copy_from_slice(&bytes[pkru()]);
        }
        self.cpu.state.pkru = u32::from_le_bytes(keys);
        next.0[header..header + 8].copy_from_slice(&offered.to_le_bytes());
        self.cpu.state.extended = next;
        Ok(())
    }

    /// KVM_GET_XCRS.
    pub(crate) fn xcrs(&self) -> kvm_xcrs {
        let mut xcrs = kvm_xcrs {
            nr_xcrs: 1,
            ..Default::default()
        };
        xcrs.xcrs[0].value = self.cpu.state.xcr0.bits();
        xcrs
    }

    /// KVM_SET_XCRS.
    pub(crate) fn set_xcrs(&mut self, xcrs: &kvm_xcrs) -> Result<()> {
        if xcrs.nr_xcrs as usize > xcrs.xcrs.len() || xcrs.flags != 0 {
            return fail(libc::EINVAL);
        }
        let given = &xcrs.xcrs[..xcrs.nr_xcrs as usize];
        if let Some(xcr0) = given.iter().find(|xcr| xcr.xcr == 0) {
            if !valid_xcr0(self.cpuid.xcr0() | Xcr0::X87.bits(), xcr0.value) {
                return fail(libc::EINVAL);
            }
            self.cpu.state.xcr0 = Xcr0::from_bits_retain(xcr0.value);
        }
        Ok(())
    }
}
