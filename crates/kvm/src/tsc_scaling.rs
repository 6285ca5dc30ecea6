//! Guest counters that run at another frequency than the host's.

use crate::time::{GuestTsc, tsc_khz};

/// How far a guest's frequency may be from the host's and still be called the same, in parts per
/// million: KVM's tolerance.
const TOLERANCE_PPM: u64 = 250;

/// A counter of `khz` without offset.
pub(crate) fn scaled(khz: u64) -> GuestTsc {
    let host = tsc_khz();
    if khz == 0 || khz.abs_diff(host) * 1_000_000 <= host * TOLERANCE_PPM {
        return GuestTsc::host();
    }
    let multiplier = (((khz as u128) << 48) / host as u128) as u64;
    GuestTsc {
        offset: 0,
        multiplier,
        khz,
    }
}
