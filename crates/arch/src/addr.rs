//! The address spaces a hypervisor juggles, each a type of its own.
//!
//! ```text
//!  Gva ──guest tables──▶ Gpa ──memslots──▶ Hva     (and Gfn, Pfn: the same in 4 KiB units)
//! ```
//!
//! Nothing converts silently and nothing adds with `+`: a sum that may leave the address space is
//! either checked or says that it wraps. Widths (48 or 57 bits of linear address, MAXPHYADDR) are
//! values held elsewhere, so a non-canonical or oversized address can exist here and fault later.

use core::fmt;

/// log2 of the base page size.
pub const PAGE_SHIFT: u32 = 12;
/// Bytes in a base page.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;
/// The bits of an address that lie inside its page.
pub const PAGE_MASK: u64 = PAGE_SIZE - 1;

macro_rules! number_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        #[repr(transparent)]
        pub struct $name(u64);

        impl $name {
            /// Wraps a raw number; every value is allowed.
            #[inline(always)]
            pub const fn new(raw: u64) -> Self {
                Self(raw)
            }

            /// The raw number.
            #[inline(always)]
            pub const fn get(self) -> u64 {
                self.0
            }

            /// The sum, or `None` where it would leave 64 bits.
            #[inline(always)]
            pub const fn checked_add(self, by: u64) -> Option<Self> {
                match self.0.checked_add(by) {
                    Some(sum) => Some(Self(sum)),
                    None => None,
                }
            }

            /// The sum modulo 2^64.
            #[inline(always)]
            pub const fn wrapping_add(self, by: u64) -> Self {
                Self(self.0.wrapping_add(by))
            }

            /// The difference modulo 2^64.
            #[inline(always)]
            pub const fn wrapping_sub(self, by: u64) -> Self {
                Self(self.0.wrapping_sub(by))
            }

            /// How far `self` lies past `base`, or `None` where it lies before it.
            #[inline(always)]
            pub const fn offset_from(self, base: Self) -> Option<u64> {
                self.0.checked_sub(base.0)
            }

            /// Rounded down to a multiple of `size`, a power of two.
            #[inline(always)]
            pub const fn align_down(self, size: u64) -> Self {
                debug_assert!(size.is_power_of_two());
                Self(self.0 & !(size - 1))
            }

            /// Whether it is a multiple of `size`, a power of two.
            #[inline(always)]
            pub const fn is_aligned(self, size: u64) -> bool {
                debug_assert!(size.is_power_of_two());
                self.0 & (size - 1) == 0
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        impl fmt::LowerHex for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::LowerHex::fmt(&self.0, f)
            }
        }
    };
}

macro_rules! address_type {
    ($name:ident) => {
        impl $name {
            /// The part of the address inside its 4 KiB page.
            #[inline(always)]
            pub const fn page_offset(self) -> u64 {
                self.0 & PAGE_MASK
            }

            /// The address of the 4 KiB page it lies in.
            #[inline(always)]
            pub const fn page_base(self) -> Self {
                Self(self.0 & !PAGE_MASK)
            }
        }
    };
}

number_type! {
    /// Guest virtual (linear) address.
    Gva
}
number_type! {
    /// Guest physical address.
    Gpa
}
number_type! {
    /// Guest frame number: a guest physical address in units of 4 KiB.
    Gfn
}
number_type! {
    /// Host virtual address in this process. Since the process is the machine, this is also the
    /// host *physical* address that the software processor uses.
    Hva
}
number_type! {
    /// Page frame number of host memory: an [`Hva`] in units of 4 KiB.
    Pfn
}

address_type!(Gva);
address_type!(Gpa);
address_type!(Hva);

impl Gva {
    /// Whether bits 63 down to `bits - 1` are all equal, as linear addresses of `bits` (48 or 57)
    /// must be.
    #[inline(always)]
    pub const fn is_canonical(self, bits: u32) -> bool {
        let unused = 64 - bits;
        ((self.0 << unused) as i64 >> unused) as u64 == self.0
    }
}

impl Gpa {
    /// The frame it lies in.
    #[inline(always)]
    pub const fn gfn(self) -> Gfn {
        Gfn(self.0 >> PAGE_SHIFT)
    }

    /// Whether the address fits in `bits` bits of physical address.
    #[inline(always)]
    pub const fn fits(self, bits: u32) -> bool {
        bits >= 64 || self.0 >> bits == 0
    }
}

impl Gfn {
    /// The address of the frame's first byte. Frames beyond 2^52 lose their high bits.
    #[inline(always)]
    pub const fn gpa(self) -> Gpa {
        Gpa(self.0 << PAGE_SHIFT)
    }
}

impl Hva {
    /// The frame it lies in.
    #[inline(always)]
    pub const fn pfn(self) -> Pfn {
        Pfn(self.0 >> PAGE_SHIFT)
    }
}

impl Pfn {
    /// The address of the frame's first byte.
    #[inline(always)]
    pub const fn hva(self) -> Hva {
        Hva(self.0 << PAGE_SHIFT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn canonical_addresses_depend_on_the_width() {
        assert!(Gva::new(0x0000_7fff_ffff_ffff).is_canonical(48));
        assert!(!Gva::new(0x0000_8000_0000_0000).is_canonical(48));
        assert!(Gva::new(0x0000_8000_0000_0000).is_canonical(57));
        assert!(Gva::new(0xffff_8000_0000_0000).is_canonical(48));
        assert!(Gva::new(0xff00_0000_0000_0000).is_canonical(57));
        assert!(!Gva::new(0xfe00_0000_0000_0000).is_canonical(57));
    }

    #[test]
    fn frames_and_addresses() {
        let gpa = Gpa::new(0x1234_5678);
        assert_eq!(gpa.gfn(), Gfn::new(0x12345));
        assert_eq!(gpa.page_offset(), 0x678);
        assert_eq!(gpa.gfn().gpa(), gpa.page_base());
        assert!(gpa.fits(32) && !gpa.fits(28) && gpa.fits(64));
        assert_eq!(
            Hva::new(0x7fff_0000_1000).pfn().hva(),
            Hva::new(0x7fff_0000_1000)
        );
        assert_eq!(Gfn::new(u64::MAX).checked_add(1), None);
    }
}
