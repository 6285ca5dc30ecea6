//! KVM_X86_SET_MSR_FILTER: which MSRs a guest may touch.

use crate::error::{Result, fail};
use arch::msr;
use kvm_bindings::{
    KVM_MSR_FILTER_DEFAULT_DENY, KVM_MSR_FILTER_MAX_BITMAP_SIZE, KVM_MSR_FILTER_READ,
    KVM_MSR_FILTER_WRITE,
};

/// One range of a filter.
#[derive(Clone, Debug)]
pub(crate) struct Range {
    pub(crate) flags: u32,
    pub(crate) base: u32,
    pub(crate) count: u32,
    pub(crate) bitmap: Vec<u8>,
}

/// A filter: ranges, and what holds outside them.
#[derive(Clone, Debug, Default)]
pub(crate) struct MsrFilter {
    pub(crate) default_deny: bool,
    pub(crate) ranges: Vec<Range>,
}

impl MsrFilter {
    /// Checks the flags and ranges of a request. Empty ranges are left out; `None` allows all.
    pub(crate) fn new(flags: u32, ranges: Vec<Range>) -> Result<Option<MsrFilter>> {
        let valid = KVM_MSR_FILTER_READ | KVM_MSR_FILTER_WRITE;
        if flags & !KVM_MSR_FILTER_DEFAULT_DENY != 0 {
            return fail(libc::EINVAL);
        }
        let default_deny = flags & KVM_MSR_FILTER_DEFAULT_DENY != 0;
        let ranges: Vec<Range> = ranges
            .into_iter()
            .filter(|range| range.count != 0)
            .collect();
        for range in &ranges {
            let bytes = range.count.div_ceil(8);
            if range.flags & !valid != 0
                || range.flags == 0
                || bytes > KVM_MSR_FILTER_MAX_BITMAP_SIZE
                || range.bitmap.len() < bytes as usize
            {
                return fail(libc::EINVAL);
            }
        }
        if ranges.is_empty() {
            // Denying everything without naming anything is a mistake.
            return if default_deny {
                fail(libc::EINVAL)
            } else {
                Ok(None)
            };
        }
        Ok(Some(MsrFilter {
            default_deny,
            ranges,
        }))
    }

    /// Whether the guest may read (or write) `index`. x2APIC registers cannot be filtered.
    pub(crate) fn allows(&self, index: u32, write: bool) -> bool {
        if (msr::X2APIC_BASE..=msr::X2APIC_BASE + 0xff).contains(&index) {
            return true;
        }
        let wanted = if write {
            KVM_MSR_FILTER_WRITE
        } else {
            KVM_MSR_FILTER_READ
        };
        for range in &self.ranges {
            let offset = index.wrapping_sub(range.base);
            if index >= range.base && offset < range.count && range.flags & wanted != 0 {
                return range.bitmap[(offset / 8) as usize] >> (offset % 8) & 1 != 0;
            }
        }
        !self.default_deny
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_and_default() {
        let range = Range {
            flags: KVM_MSR_FILTER_READ,
            base: 0x100,
            count: 9,
            bitmap: vec![0, 1],
        };
        let filter = MsrFilter::new(KVM_MSR_FILTER_DEFAULT_DENY, vec![range.clone()])
            .unwrap()
            .unwrap();
        assert!(!filter.allows(0x100, false) && filter.allows(0x108, false));
        assert!(!filter.allows(0x108, true) && !filter.allows(0x200, false));
        assert!(filter.allows(0x830, true));
        assert!(MsrFilter::new(0, vec![]).unwrap().is_none());
        assert!(MsrFilter::new(KVM_MSR_FILTER_DEFAULT_DENY, vec![]).is_err());
        assert!(
            MsrFilter::new(
                0,
                vec![Range {
                    flags: 4,
                    ..range.clone()
                }]
            )
            .is_err()
        );
        assert!(MsrFilter::new(0, vec![Range { count: 17, ..range }]).is_err());
    }
}
