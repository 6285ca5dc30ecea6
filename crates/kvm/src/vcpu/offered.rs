//! What becomes of instructions and control-register bits that CPUID does not offer.
//!
//! As with KVM, CPUID is only what software is told. VT-x has controls that take single instructions
//! away, and a bit of CR4 or XCR0 that a guest may not set takes away what it enables; everything
//! else executes. [`crate::Options::strict_cpuid`] has all of it raise #UD.
//!
//! Source: SDM volume 3C, "Secondary Processor-Based VM-Execution Controls" and "Changes to
//! Instruction Behavior in VMX Non-Root Operation".

use super::Core;
use crate::cpuid::Table;
use arch::controls::SecondaryControls;
use arch::cpuid::Feature;

/// Controls that take instructions away (or, `true`, have them exit, which ends in #UD), and
/// the features one of which must be offered for them to execute.
const INSTRUCTION_CONTROLS: &[(SecondaryControls, bool, &[Feature])] = &[
    (
        SecondaryControls::ENABLE_RDTSCP,
        false,
        &[Feature::RDTSCP, Feature::RDPID],
    ),
    (
        SecondaryControls::ENABLE_INVPCID,
        false,
        &[Feature::INVPCID],
    ),
    (SecondaryControls::ENABLE_XSAVES, false, &[Feature::XSAVES]),
    (SecondaryControls::RDRAND_EXITING, true, &[Feature::RDRAND]),
    (SecondaryControls::RDSEED_EXITING, true, &[Feature::RDSEED]),
];

/// Features whose bits of CR4 a guest may set, whatever CPUID offers: KVM withholds only those that
/// change what software finds ([`crate::exits::valid_cr4`]).
const UNGUARDED: &[Feature] = &[
    Feature::VME,
    Feature::DE,
    Feature::PSE,
    Feature::PAE,
    Feature::MCE,
    Feature::PGE,
    Feature::FXSR,
];

impl Core {
    /// Tells the processor what the guest's CPUID offers.
    pub(crate) fn apply_cpuid(&mut self, table: Table, strict: bool) {
        self.features = table.features();
        let bits = table.physical_bits();
        self.cpuid = table;
        for &(control, withheld, features) in INSTRUCTION_CONTROLS {
            let offered = features.iter().any(|&feature| self.features.has(feature));
            self.controls.secondary.set(control, offered != withheld);
        }
        if strict {
            self.cpu.set_features(self.features, bits);
        } else {
            self.cpu.set_features(self.features.with(UNGUARDED), bits);
            self.cpu.execute_all_instructions();
        }
    }
}
