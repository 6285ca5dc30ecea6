//! CPUID: what can be offered, and what a vCPU answers.
//!
//! Supported leaves follow the host's, cut down to what the processor implements and what is
//! emulated here. AVX-512, AMX, VMX, SVM and everything else unimplemented is absent, since a
//! feature bit is offered only if it is in [`cpu::Vcpu::host_features`] or emulated here (`EMULATED`).

use arch::control_registers::{Cr4, Xcr0};
use arch::cpuid::{Feature, Features, Output, Register, Word};
use arch::msr::{apic_base, misc_enable};
use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Features that do not depend on the processor.
const EMULATED: &[Feature] = &[
    Feature::APIC,
    Feature::X2APIC,
    Feature::HYPERVISOR,
    Feature::TSC_ADJUST,
    Feature::MCE,
    Feature::MCA,
    Feature::MTRR,
    Feature::PAT,
];

/// Features that are never in a supported set: they mirror control-register bits.
const DYNAMIC: &[Feature] = &[Feature::OSXSAVE, Feature::OSPKE];

/// Features whose absence KVM guarantees or that are not implemented here.
const WITHHELD: &[Feature] = &[
    // Announced by KVM_CAP_TSC_DEADLINE_TIMER alone: it takes a local APIC in this process.
    Feature::TSC_DEADLINE,
    Feature::MONITOR,
    Feature::VMX,
    Feature::SVM,
    Feature::PDCM,
    Feature::OSVW,
    Feature::WAITPKG,
    Feature::PKS,
    Feature::RTM,
];

/// Signature leaf of KVM's paravirtual features.
pub const KVM_SIGNATURE: u32 = 0x4000_0000;
/// Feature leaf of KVM's paravirtual features.
pub const KVM_FEATURES: u32 = 0x4000_0001;

/// Bits of [`KVM_FEATURES`] EAX.
pub mod pv {
    #![allow(missing_docs, reason = "named as in the kernel's documentation")]
    pub const CLOCKSOURCE: u32 = 1 << 0;
    pub const NOP_IO_DELAY: u32 = 1 << 1;
    pub const CLOCKSOURCE2: u32 = 1 << 3;
    pub const ASYNC_PF: u32 = 1 << 4;
    pub const STEAL_TIME: u32 = 1 << 5;
    pub const PV_EOI: u32 = 1 << 6;
    pub const PV_UNHALT: u32 = 1 << 7;
    pub const PV_TLB_FLUSH: u32 = 1 << 9;
    pub const PV_SEND_IPI: u32 = 1 << 11;
    pub const POLL_CONTROL: u32 = 1 << 12;
    pub const PV_SCHED_YIELD: u32 = 1 << 13;
    pub const ASYNC_PF_INT: u32 = 1 << 14;
    pub const MSI_EXT_DEST_ID: u32 = 1 << 15;
    pub const CLOCKSOURCE_STABLE: u32 = 1 << 24;

    /// What is implemented.
    pub const SUPPORTED: u32 = CLOCKSOURCE
        | NOP_IO_DELAY
        | CLOCKSOURCE2
        | ASYNC_PF
        | ASYNC_PF_INT
        | STEAL_TIME
        | PV_EOI
        | PV_UNHALT
        | PV_TLB_FLUSH
        | PV_SEND_IPI
        | POLL_CONTROL
        | PV_SCHED_YIELD
        | CLOCKSOURCE_STABLE;
}

/// The host's CPUID.
fn host(leaf: u32, subleaf: u32) -> Output {
    let result = core::arch::x86_64::__cpuid_count(leaf, subleaf);
    Output([result.eax, result.ebx, result.ecx, result.edx])
}

/// The features that can be offered to a guest.
pub fn supported_features() -> Features {
    let mut features = cpu::Vcpu::host_features().with(EMULATED);
    for &feature in DYNAMIC.iter().chain(WITHHELD) {
        features.remove(feature);
    }
    // Systems expect PKRU among the components of extended state.
    if !features.has(Feature::XSAVE) {
        features.remove(Feature::PKU);
    }
    features
}

/// XCR0 bits that can be offered.
pub fn supported_xcr0() -> u64 {
    let all = Xcr0::X87 | Xcr0::SSE | Xcr0::AVX | Xcr0::PKRU;
    cpu::Vcpu::host_xsave_components() & all.bits()
}

/// Number of physical-address bits offered: the host's, at most what tables here can map.
pub fn max_physical_bits() -> u8 {
    let host_bits = if host(0x8000_0000, 0).0[0] >= 0x8000_0008 {
        host(0x8000_0008, 0).0[0] as u8
    } else {
        36
    };
    host_bits.clamp(36, 48)
}

/// The components of `xcr0` that lie behind the XSAVE header, as number, offset in the standard format
/// and size.
pub(crate) fn extended_components(xcr0: u64) -> impl Iterator<Item = (u32, u32, u32)> {
    (2..63)
        .filter(move |n| xcr0 >> n & 1 != 0)
        .filter_map(|n| cpu::Vcpu::xsave_component(n).map(|(offset, size)| (n, offset, size)))
}

/// Size of the XSAVE area for the components in `xcr0`, standard format.
pub fn xsave_size(xcr0: u64) -> u32 {
    extended_components(xcr0).fold(576, |end, (_, offset, size)| end.max(offset + size))
}

/// The same in compacted format.
fn compacted_size(xcr0: u64) -> u32 {
    extended_components(xcr0).fold(576, |end, (.., size)| end + size)
}

fn entry(function: u32, index: Option<u32>, output: Output) -> kvm_cpuid_entry2 {
    let Output([eax, ebx, ecx, edx]) = output;
    kvm_cpuid_entry2 {
        function,
        index: index.unwrap_or(0),
        flags: if index.is_some() {
            KVM_CPUID_FLAG_SIGNIFCANT_INDEX
        } else {
            0
        },
        eax,
        ebx,
        ecx,
        edx,
        padding: [0; 3],
    }
}

/// Replaces the words of `output` that hold feature bits by what is supported.
fn mask(leaf: u32, subleaf: u32, mut output: Output, features: &Features) -> Output {
    for &word in Word::ALL {
        let (word_leaf, word_subleaf, register) = word.place();
        if (word_leaf, word_subleaf) == (leaf, subleaf) {
            output.0[register as usize] = features.word(word);
        }
    }
    output
}

/// KVM_GET_SUPPORTED_CPUID.
pub fn supported() -> Vec<kvm_cpuid_entry2> {
    let features = supported_features();
    let mut entries = Vec::new();
    basic_leaves(&features, &mut entries);
    paravirtual_leaves(&mut entries);
    extended_leaves(&features, &mut entries);
    entries
}

fn basic_leaves(features: &Features, entries: &mut Vec<kvm_cpuid_entry2>) {
    let mut leaf0 = host(0, 0);
    let highest = leaf0.0[0].min(0x1f);
    leaf0.0[0] = highest;
    entries.push(entry(0, None, leaf0));
    for leaf in 1..=highest {
        match leaf {
            1 => {
                let mut output = mask(1, 0, host(1, 0), features);
                // CLFLUSH line size stays the host's; the APIC ID and count are user space's.
                output.0[Register::Ebx as usize] &= 0xff00;
                entries.push(entry(1, None, output));
            }
            2 => entries.push(entry(2, None, host(2, 0))),
            4 => cache_leaves(4, entries),
            7 => {
                let mut output = mask(7, 0, Output::default(), features);
                output.0[0] = 0;
                entries.push(entry(7, Some(0), output));
            }
            // ARAT: the APIC timer always runs.
            6 => entries.push(entry(6, None, Output([4, 0, 0, 0]))),
            0xb | 0x1f => entries.push(entry(leaf, Some(0), Output::default())),
            0xd => xsave_leaves(features, entries),
            0x15 => entries.push(entry(0x15, None, host(0x15, 0))),
            0x16 => entries.push(entry(0x16, None, host(0x16, 0))),
            _ => entries.push(entry(leaf, None, Output::default())),
        }
    }
}

/// Deterministic cache parameters, without the host's sharing and core counts.
fn cache_leaves(leaf: u32, entries: &mut Vec<kvm_cpuid_entry2>) {
    for subleaf in 0..16 {
        let mut output = host(leaf, subleaf);
        output.0[0] &= 0x3fff;
        let is_end = output.0[0] & 0x1f == 0;
        entries.push(entry(leaf, Some(subleaf), output));
        if is_end {
            break;
        }
    }
}

fn xsave_leaves(features: &Features, entries: &mut Vec<kvm_cpuid_entry2>) {
    if !features.has(Feature::XSAVE) {
        entries.push(entry(0xd, Some(0), Output::default()));
        return;
    }
    let xcr0 = supported_xcr0();
    let size = xsave_size(xcr0);
    entries.push(entry(
        0xd,
        Some(0),
        Output([xcr0 as u32, size, size, (xcr0 >> 32) as u32]),
    ));
    let extensions = features.word(Word::Leafd1Eax);
    let compacted = compacted_size(xcr0);
    entries.push(entry(0xd, Some(1), Output([extensions, compacted, 0, 0])));
    for (number, offset, size) in extended_components(xcr0) {
        entries.push(entry(0xd, Some(number), Output([size, offset, 0, 0])));
    }
}

fn paravirtual_leaves(entries: &mut Vec<kvm_cpuid_entry2>) {
    let word = |bytes: &[u8; 4]| u32::from_le_bytes(*bytes);
    let signature = [word(b"KVMK"), word(b"VMKV"), word(b"M\0\0\0")];
    let [ebx, ecx, edx] = signature;
    entries.push(entry(
        KVM_SIGNATURE,
        None,
        Output([KVM_FEATURES, ebx, ecx, edx]),
    ));
    entries.push(entry(KVM_FEATURES, None, Output([pv::SUPPORTED, 0, 0, 0])));
}

fn extended_leaves(features: &Features, entries: &mut Vec<kvm_cpuid_entry2>) {
    let mut leaf0 = host(0x8000_0000, 0);
    let highest = leaf0.0[0].min(0x8000_001e);
    if highest < 0x8000_0000 {
        return;
    }
    leaf0.0[0] = highest;
    entries.push(entry(0x8000_0000, None, leaf0));
    for leaf in 0x8000_0001..=highest {
        let output = host(leaf, 0);
        match leaf {
            0x8000_0001 => {
                let mut masked = mask(leaf, 0, output, features);
                masked.0[Register::Ebx as usize] = 0;
                entries.push(entry(leaf, None, alias_amd_words(masked, features)));
            }
            0x8000_0002..=0x8000_0006 => entries.push(entry(leaf, None, output)),
            // Invariant TSC, if the host has it.
            0x8000_0007 => {
                entries.push(entry(leaf, None, Output([0, 0, 0, output.0[3] & 1 << 8])));
            }
            0x8000_0008 => {
                let linear = if features.has(Feature::LA57) { 57 } else { 48 };
                let widths = max_physical_bits() as u32 | linear << 8;
                entries.push(entry(
                    leaf,
                    None,
                    Output([widths, features.word(Word::Ext8Ebx), 0, 0]),
                ));
            }
            0x8000_001d => cache_leaves(leaf, entries),
            0x8000_001e => entries.push(entry(leaf, Some(0), Output::default())),
            _ => entries.push(entry(leaf, None, Output::default())),
        }
    }
}

/// AMD repeats most of leaf 1 EDX in leaf 0x8000_0001 EDX.
fn alias_amd_words(mut output: Output, features: &Features) -> Output {
    const ALIASED: u32 = 0x0183_f3ff;
    let vendor = host(0, 0);
    let is_amd = [vendor.0[1], vendor.0[3], vendor.0[2]]
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .eq(*b"AuthenticAMD");
    if is_amd {
        output.0[3] |= features.word(Word::Leaf1Edx) & ALIASED;
    }
    output
}

/// Bits of a vCPU's state that its CPUID reflects.
#[derive(Clone, Copy, Debug)]
pub struct Dynamic {
    /// CR4.
    pub cr4: Cr4,
    /// XCR0.
    pub xcr0: u64,
    /// IA32_APIC_BASE.
    pub apic_base: u64,
    /// IA32_MISC_ENABLE.
    pub misc_enable: u64,
    /// MWAIT shows as IA32_MISC_ENABLE has it.
    pub mwait_follows: bool,
    /// Halts do not exit: no other vCPU can end them by a hypercall.
    pub halts_in_guest: bool,
}

/// The CPUID that user space gave a vCPU.
#[derive(Clone, Debug)]
pub struct Table {
    entries: Vec<kvm_cpuid_entry2>,
    /// Positions of entries, bucket by bucket and in order of position within each.
    order: Vec<u16>,
    /// Where each bucket starts in `order`.
    buckets: [u16; BUCKETS + 1],
}

/// Buckets of functions: basic, hypervisor and extended ones hardly share any.
const BUCKETS: usize = 64;

fn bucket(function: u32) -> usize {
    (function ^ function >> 26) as usize & (BUCKETS - 1)
}

impl Default for Table {
    fn default() -> Table {
        Table::new(&[])
    }
}

impl Table {
    /// KVM_SET_CPUID2.
    pub fn new(entries: &[kvm_cpuid_entry2]) -> Table {
        let bucket_of = |at: &u16| bucket(entries[usize::from(*at)].function);
        let mut order: Vec<u16> = (0..entries.len() as u16).collect();
        order.sort_by_key(bucket_of);
        let mut buckets = [0; BUCKETS + 1];
        for (bucket, start) in buckets.iter_mut().enumerate() {
            *start = order.partition_point(|at| bucket_of(at) < bucket) as u16;
        }
        Table {
            entries: entries.to_vec(),
            order,
            buckets,
        }
    }

    /// Whether user space gave none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// KVM_GET_CPUID2: the entries with what they reflect of a vCPU's state.
    pub fn entries(&self, dynamic: &Dynamic) -> Vec<kvm_cpuid_entry2> {
        let mut entries = self.entries.clone();
        for e in &mut entries {
            let raw = Output([e.eax, e.ebx, e.ecx, e.edx]);
            let Output(shown) = apply_dynamic(e.function, e.index, raw, dynamic);
            [e.eax, e.ebx, e.ecx, e.edx] = shown;
        }
        entries
    }

    fn find(&self, function: u32, index: u32) -> Option<&kvm_cpuid_entry2> {
        let bucket = bucket(function);
        let [start, end] = [bucket, bucket + 1].map(|n| usize::from(self.buckets[n]));
        let mut entries = self.order[start..end]
            .iter()
            .map(|&at| &self.entries[usize::from(at)]);
        entries.find(|e| {
            e.function == function
                && (e.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX == 0 || e.index == index)
        })
    }

    /// The entry a raw lookup finds, without dynamic bits.
    pub fn output(&self, function: u32, index: u32) -> Output {
        let found = self.find(function, index);
        found.map_or(Output::default(), |e| Output([e.eax, e.ebx, e.ecx, e.edx]))
    }

    /// The features the guest was given.
    pub fn features(&self) -> Features {
        Features::read(|leaf, subleaf| self.output(leaf, subleaf))
    }

    /// MAXPHYADDR.
    pub fn physical_bits(&self) -> u8 {
        match self.output(0x8000_0008, 0).0[0] as u8 {
            0 => 36,
            bits => bits.min(52),
        }
    }

    /// XCR0 bits the guest may set.
    pub fn xcr0(&self) -> u64 {
        let Output([low, _, _, high]) = self.output(0xd, 0);
        (low as u64 | (high as u64) << 32) & supported_xcr0()
    }

    /// Paravirtual features the guest was given.
    pub fn paravirtual(&self) -> u32 {
        self.output(KVM_FEATURES, 0).0[0]
    }

    /// Whether the vendor string is AMD's (or Hygon's).
    pub fn is_amd(&self) -> bool {
        let Output([_, ebx, ecx, edx]) = self.output(0, 0);
        let vendor = [ebx, edx, ecx].map(u32::to_le_bytes).concat();
        vendor == b"AuthenticAMD" || vendor == b"HygonGenuine"
    }

    /// The answer to the CPUID instruction. `dynamic` is asked where the answer depends on it.
    pub fn execute(&self, function: u32, index: u32, dynamic: &dyn Fn() -> Dynamic) -> Output {
        if let Some(found) = self.find(function, index) {
            let output = Output([found.eax, found.ebx, found.ecx, found.edx]);
            return match function {
                1 | 7 | 0xd | KVM_FEATURES | 0x8000_0001 => {
                    apply_dynamic(function, index, output, &dynamic())
                }
                _ => output,
            };
        }
        // Topology leaves report the APIC ID in EDX and echo the sub-leaf even past the last
        // level.
        if matches!(function, 0xb | 0x1f)
            && let Some(first) = self.find(function, 0)
        {
            return Output([0, 0, index & 0xff, first.edx]);
        }
        match self.beyond(function) {
            Some(highest) => self.execute(highest, index, dynamic),
            None => Output::default(),
        }
    }

    /// The leaf that answers for one beyond the highest of its class: none on AMD, where such a
    /// leaf is zero, the highest basic leaf on Intel.
    fn beyond(&self, function: u32) -> Option<u32> {
        let class = function & 0xffff_0000;
        let basic = self.output(0, 0).0[0];
        let is_beyond = matches!(class, 0 | 0x8000_0000)
            && function > self.output(class, 0).0[0]
            && function != basic;
        (is_beyond && !self.is_amd()).then_some(basic)
    }
}

fn set(output: &mut Output, feature: Feature, on: bool) {
    let (word, bit) = feature.position();
    let (_, _, register) = word.place();
    let slot = &mut output.0[register as usize];
    *slot = if on {
        *slot | 1 << bit
    } else {
        *slot & !(1 << bit)
    };
}

fn apply_dynamic(function: u32, index: u32, mut output: Output, dynamic: &Dynamic) -> Output {
    match (function, index) {
        (1, _) => {
            set(
                &mut output,
                Feature::OSXSAVE,
                dynamic.cr4.contains(Cr4::OSXSAVE),
            );
            set(
                &mut output,
                Feature::APIC,
                dynamic.apic_base & apic_base::ENABLE != 0,
            );
            if dynamic.mwait_follows {
                let mwait = dynamic.misc_enable & misc_enable::MWAIT != 0;
                set(&mut output, Feature::MONITOR, mwait);
            }
        }
        (7, 0) => set(&mut output, Feature::OSPKE, dynamic.cr4.contains(Cr4::PKE)),
        (0xd, 0) => output.0[1] = xsave_size(dynamic.xcr0),
        (0xd, 1) if output.0[0] & 0b1010 != 0 => output.0[1] = compacted_size(dynamic.xcr0),
        (KVM_FEATURES, _) if dynamic.halts_in_guest => output.0[0] &= !pv::PV_UNHALT,
        (0x8000_0001, _) if dynamic.misc_enable & misc_enable::XD_DISABLE != 0 => {
            set(&mut output, Feature::NX, false);
        }
        _ => {}
    }
    output
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dynamic() -> Dynamic {
        Dynamic {
            cr4: Cr4::empty(),
            xcr0: 1,
            apic_base: 0,
            misc_enable: 0,
            mwait_follows: false,
            halts_in_guest: false,
        }
    }

    #[test]
    fn lookup_honours_significant_indices() {
        let table = Table::new(&[
            entry(
                0,
                None,
                Output([0x10, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
            ),
            entry(0x10, None, Output([1, 2, 3, 4])),
            entry(4, Some(1), Output([9, 0, 0, 0])),
            entry(0xb, Some(0), Output([1, 2, 0x100, 7])),
        ]);
        assert_eq!(table.output(4, 0), Output::default());
        assert_eq!(table.output(4, 1).0[0], 9);
        assert_eq!(table.execute(0x10, 55, &dynamic).0, [1, 2, 3, 4]);
        assert_eq!(
            table.execute(0x30, 0, &dynamic).0,
            [1, 2, 3, 4],
            "Intel: highest basic leaf"
        );
        assert_eq!(table.execute(0xb, 3, &dynamic).0, [0, 0, 3, 7]);
        assert!(!table.is_amd());
    }

    #[test]
    fn control_registers_show_through() {
        let table = Table::new(&[
            entry(1, None, Output([0, 0, 1 << 26, 1 << 9])),
            entry(0xd, Some(0), Output([7, 832, 832, 0])),
        ]);
        let off = table.execute(1, 0, &dynamic);
        assert_eq!((off.0[2] >> 27 & 1, off.0[3] >> 9 & 1), (0, 0));
        let on = Dynamic {
            cr4: Cr4::OSXSAVE,
            xcr0: 7,
            apic_base: apic_base::ENABLE,
            ..dynamic()
        };
        let output = table.execute(1, 0, &|| on);
        assert_eq!((output.0[2] >> 27 & 1, output.0[3] >> 9 & 1), (1, 1));
        assert_eq!(table.execute(0xd, 0, &|| on).0[1], 832);
        assert_eq!(table.execute(0xd, 0, &dynamic).0[1], 576);
    }
}
