//! Per-processor CPUID: what `KVM_GET_SUPPORTED_CPUID` offers, with the fields that say which
//! processor this is and how many there are.
//!
//! The topology is one package of single-threaded cores.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

const LEAF_1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF_1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF_1_EDX_HTT: u32 = 1 << 28;

const LEVEL_SMT: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// The processors of one machine.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Topology {
    /// How many there are.
    pub(crate) cpus: u32,
    /// The local APIC's timer has TSC-deadline mode.
    pub(crate) tsc_deadline: bool,
}

impl Topology {
    /// Bits of an APIC id that number the cores of a package.
    fn core_bits(self) -> u32 {
        self.cpus.next_power_of_two().trailing_zeros()
    }

    /// The CPUID table of processor `id`.
    pub(crate) fn cpuid(
        self,
        supported: &CpuId,
        id: u32,
    ) -> Result<CpuId, kvm_bindings_error::Fam> {
        let mut entries: Vec<kvm_cpuid_entry2> = supported
            .as_slice()
            .iter()
            .copied()
            .filter(|entry| !matches!(entry.function, 0xb | 0x1f))
            .collect();
        for leaf in [0xb, 0x1f] {
            if supported
                .as_slice()
                .iter()
                .any(|entry| entry.function == leaf)
            {
                entries.extend(self.topology_leaf(leaf, id));
            }
        }
        for entry in &mut entries {
            self.edit(entry, id);
        }
        CpuId::from_entries(&entries)
    }

    fn edit(self, entry: &mut kvm_cpuid_entry2, id: u32) {
        match entry.function {
            1 => {
                // CLFLUSH line size and brand index stay.
                entry.ebx = (entry.ebx & 0xffff) | (self.cpus.min(255) << 16) | ((id & 0xff) << 24);
                entry.ecx |= LEAF_1_ECX_HYPERVISOR;
                if self.tsc_deadline {
                    entry.ecx |= LEAF_1_ECX_TSC_DEADLINE;
                }
                if self.cpus > 1 {
                    entry.edx |= LEAF_1_EDX_HTT;
                }
            }
            4 if entry.eax & 0x1f != 0 => {
                let level = entry.eax >> 5 & 7;
                let sharing = if level >= 3 {
                    (1 << self.core_bits()) - 1
                } else {
                    0
                };
                let cores = ((1 << self.core_bits()) - 1) & 0x3f;
                entry.eax = (entry.eax & 0x3fff) | (sharing & 0xfff) << 14 | cores << 26;
            }
            0x8000_0008 if entry.ecx & 0xffff != 0 || self.cpus > 1 => {
                entry.ecx =
                    (entry.ecx & !0xffff) | (self.cpus - 1).min(0xff) | self.core_bits() << 12;
            }
            _ => {}
        }
    }

    /// Extended topology enumeration: SMT level, core level, terminator.
    fn topology_leaf(self, leaf: u32, id: u32) -> [kvm_cpuid_entry2; 3] {
        let entry = |index, eax, ebx, level: u32| kvm_cpuid_entry2 {
            function: leaf,
            index,
            flags: kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax,
            ebx,
            ecx: index | level << 8,
            edx: id,
            ..Default::default()
        };
        [
            entry(0, 0, 1, LEVEL_SMT),
            entry(1, self.core_bits(), self.cpus, LEVEL_CORE),
            entry(2, 0, 0, 0),
        ]
    }
}

/// Whether guests see a processor of AMD's.
pub(crate) fn is_amd(supported: &CpuId) -> bool {
    let vendor = supported
        .as_slice()
        .iter()
        .find(|entry| entry.function == 0);
    vendor.is_some_and(|entry| entry.ebx.to_le_bytes() == *b"Auth")
}

/// The error of building a table that is too long, under a name that can be imported.
pub(crate) mod kvm_bindings_error {
    /// See [`vmm_sys_util::fam::Error`].
    pub(crate) type Fam = vmm_sys_util::fam::Error;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supported() -> CpuId {
        let entry = |function, eax, ebx, ecx| kvm_cpuid_entry2 {
            function,
            eax,
            ebx,
            ecx,
            ..Default::default()
        };
        CpuId::from_entries(&[
            entry(0, 0xb, 0, 0),
            entry(1, 0, 0xff01_0800, 0),
            entry(4, 0xfc00_4121, 0, 0),
            entry(4, 0xfc00_4163, 0, 0),
            entry(0xb, 9, 9, 9),
            entry(0x8000_0008, 0x3030, 0, 0),
        ])
        .unwrap()
    }

    fn table(cpus: u32, id: u32) -> Vec<kvm_cpuid_entry2> {
        let topology = Topology {
            cpus,
            tsc_deadline: true,
        };
        topology
            .cpuid(&supported(), id)
            .unwrap()
            .as_slice()
            .to_vec()
    }

    fn leaf(table: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        let mut matching = table.iter().filter(|entry| entry.function == function);
        *matching.find(|entry| entry.index == index).unwrap()
    }

    #[test]
    fn every_processor_has_its_own_id() {
        for id in 0..3 {
            let table = table(3, id);
            let basic = leaf(&table, 1, 0);
            assert_eq!(
                (basic.ebx >> 24, basic.ebx >> 16 & 0xff, basic.ebx & 0xffff),
                (id, 3, 0x800)
            );
            assert_ne!(basic.edx & LEAF_1_EDX_HTT, 0);
            for level in 0..3 {
                assert_eq!(leaf(&table, 0xb, level).edx, id);
            }
        }
    }

    #[test]
    fn core_bits_hold_every_id() {
        let table = table(3, 0);
        let smt = leaf(&table, 0xb, 0);
        let core = leaf(&table, 0xb, 1);
        assert_eq!((smt.eax, smt.ebx, smt.ecx), (0, 1, 0x100));
        assert_eq!((core.eax, core.ebx, core.ecx), (2, 3, 0x201));
        assert_eq!(leaf(&table, 0x8000_0008, 0).ecx, 0x2002);
    }

    #[test]
    fn only_the_last_level_cache_is_shared() {
        let table = table(4, 0);
        let mut caches = table.iter().filter(|entry| entry.function == 4);
        let first = caches.next().unwrap().eax;
        let last = caches.next().unwrap().eax;
        assert_eq!((first >> 14 & 0xfff, first >> 26), (0, 3));
        assert_eq!((last >> 14 & 0xfff, last >> 26), (3, 3));
    }

    #[test]
    fn one_processor_has_no_siblings() {
        let basic = leaf(&table(1, 0), 1, 0);
        assert_eq!(basic.edx & LEAF_1_EDX_HTT, 0);
        assert_eq!(leaf(&table(1, 0), 0xb, 1).eax, 0);
    }
}
