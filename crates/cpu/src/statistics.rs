//! What a processor counts.

/// Counts since the processor was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Instructions executed.
    pub instructions: u64,
    /// Accesses that asked the TLB: those of whole blocks, as far as decoding tells (an instruction
    /// with a repeat prefix counts once), and fetches of blocks that were not found by address.
    pub tlb_lookups: u64,
    /// Accesses that the TLB could not answer.
    pub tlb_misses: u64,
    /// Walks of second-stage tables.
    pub second_stage_walks: u64,
    /// Blocks decoded.
    pub blocks_decoded: u64,
    /// Instructions decoded.
    pub instructions_decoded: u64,
    /// Blocks translated to host code.
    pub blocks_translated: u64,
    /// Bytes of host code made.
    pub bytes_translated: u64,
    /// Block lookups that the jump cache could not answer.
    pub block_lookups: u64,
    /// Entries to guest mode.
    pub entries: u64,
}
