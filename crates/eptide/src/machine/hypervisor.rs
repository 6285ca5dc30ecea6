//! What is asked of the KVM implementation beyond the KVM API: the paging mode and statistics.

use kvm::{Engine, Kvm, Options, VcpuFd, VmFd};

use crate::report::{HitRate, Statistics};

/// Opens KVM.
pub(crate) fn open(ept: Option<bool>, engine: Option<Engine>) -> Kvm {
    let defaults = Options::default();
    let options = defaults
        .with_ept(ept.unwrap_or(defaults.ept))
        .with_engine(engine.unwrap_or(defaults.engine));
    Kvm::with_options(options)
}

/// Adds the counters of one processor.
pub(crate) fn add_processor(statistics: &mut Statistics, vcpu: &VcpuFd) {
    if let Ok(processor) = vcpu.cpu_statistics() {
        *statistics.instructions.get_or_insert(0) += processor.instructions;
        statistics.blocks_translated += processor.blocks_translated;
        statistics.bytes_translated += processor.bytes_translated;
        let tlb = statistics.tlb.get_or_insert_default();
        tlb.hits += processor.tlb_lookups.saturating_sub(processor.tlb_misses);
        tlb.misses += processor.tlb_misses;
    }
    for (reason, count) in vcpu.exits_by_reason().unwrap_or_default() {
        *statistics.exits.entry(reason).or_default() += count;
    }
}

/// Adds the counters of the MMU, which all processors share.
pub(crate) fn add_mmu(statistics: &mut Statistics, vm: &VmFd) {
    let counters = vm.mmu_statistics();
    let sum = |names: &[&str]| -> u64 {
        let chosen = counters.iter().filter(|(name, _)| names.contains(name));
        chosen.map(|(_, count)| count).sum()
    };
    // Every misconfiguration ends in exactly one of these.
    let cached = sum(&["mmio_cached"]);
    let uncached = sum(&[
        "mmio_by_entry",
        "mmio_stale",
        "mmio_vanished",
        "mmio_invalid",
    ]);
    statistics.ept_misconfigurations = Some(cached + uncached);
    statistics.ept_violations = Some(sum(&["faults"]).saturating_sub(cached + uncached));
    statistics.mmio_cache = Some(HitRate {
        hits: cached,
        misses: uncached,
    });
}
