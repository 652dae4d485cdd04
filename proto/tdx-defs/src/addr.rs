//! Addresses and frame numbers, each with its unit in the type.
//!
//! Units: `Gpa` and `Hpa` count bytes, `Gfn` and `Pfn` count 4 KiB frames. A `Gfn` never carries
//! the SHARED bit: [`crate::GpaLayout::split`] takes it out. `Hpa` and `Pfn` name simulated host
//! memory and are never Rust pointers.

use std::fmt;

/// log2 of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;
/// Bytes in a 4 KiB page.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;
/// `NULL_PA` of the TDX module ABI: "no page given".
pub const ALL_ONES_HPA: u64 = u64::MAX;

/// Physical addresses, guest's or host's, have at most 52 bits on x86.
const MAX_ADDR_BITS: u32 = 52;

/// An address that cannot be one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AddrError {
    /// More than 52 bits.
    #[error("{value:#x} is above the 52-bit limit of physical addresses")]
    TooWide {
        /// The offending number.
        value: u64,
    },
    /// Not a multiple of the page size.
    #[error("{value:#x} is not aligned to {align:#x} bytes")]
    Unaligned {
        /// The offending number.
        value: u64,
        /// The required alignment in bytes.
        align: u64,
    },
}

macro_rules! hex_fmt {
    ($t:ident) => {
        impl fmt::Debug for $t {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($t), "({:#x})"), self.0)
            }
        }
        impl fmt::Display for $t {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

macro_rules! address {
    ($(#[$doc:meta])* $t:ident, $frame:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $t(u64);
        hex_fmt!($t);
        impl $t {
            /// An address as it came; checked by whoever gives it a meaning.
            pub const fn new(bytes: u64) -> Self {
                Self(bytes)
            }
            /// An address that fits the 52 bits of x86 physical addresses.
            pub const fn checked(bytes: u64) -> Result<Self, AddrError> {
                if bytes >> MAX_ADDR_BITS != 0 {
                    return Err(AddrError::TooWide { value: bytes });
                }
                Ok(Self(bytes))
            }
            /// The number of bytes from address zero.
            pub const fn get(self) -> u64 {
                self.0
            }
            /// Whether the address is a multiple of `align`, a power of two.
            pub const fn is_aligned(self, align: u64) -> bool {
                self.0 & (align - 1) == 0
            }
            /// The frame that holds this address (for a [`Gpa`], SHARED bit included).
            pub const fn frame(self) -> $frame {
                $frame(self.0 >> PAGE_SHIFT)
            }
            /// The address `bytes` further on, unless it overflows.
            pub const fn checked_add(self, bytes: u64) -> Option<Self> {
                match self.0.checked_add(bytes) {
                    Some(sum) => Some(Self(sum)),
                    None => None,
                }
            }
        }
    };
}

macro_rules! frame {
    ($(#[$doc:meta])* $t:ident, $addr:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $t(u64);
        hex_fmt!($t);
        impl $t {
            /// A frame number.
            pub const fn new(frames: u64) -> Self {
                Self(frames)
            }
            /// The number of 4 KiB frames from frame zero.
            pub const fn get(self) -> u64 {
                self.0
            }
            /// The first byte of the frame.
            pub const fn base(self) -> $addr {
                $addr(self.0 << PAGE_SHIFT)
            }
            /// The frame `frames` further on, saturating.
            pub const fn offset(self, frames: u64) -> Self {
                Self(self.0.saturating_add(frames))
            }
            /// The first frame of the naturally aligned block of `frames` (a power of two).
            pub const fn align_down(self, frames: u64) -> Self {
                Self(self.0 & !(frames - 1))
            }
            /// Whether the frame starts a naturally aligned block of `frames` (a power of two).
            pub const fn is_aligned(self, frames: u64) -> bool {
                self.0 & (frames - 1) == 0
            }
        }
    };
}

address!(
    /// Guest physical address in bytes, as the guest issued it: it may carry the SHARED bit.
    Gpa,
    Gfn
);
address!(
    /// Host physical address in bytes of the simulated machine.
    Hpa,
    Pfn
);
frame!(
    /// Guest frame number: 4 KiB units, without the SHARED bit.
    Gfn,
    Gpa
);
frame!(
    /// Host frame number: 4 KiB units of simulated host memory.
    Pfn,
    Hpa
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_and_addresses_convert_by_page() {
        for (addr, frame) in [
            (0, 0),
            (0xfff, 0),
            (0x1000, 1),
            (0x1fff, 1),
            (1 << 51, 1 << 39),
        ] {
            assert_eq!(Gpa::new(addr).frame(), Gfn::new(frame), "{addr:#x}");
        }
        assert_eq!(Pfn::new(3).base(), Hpa::new(0x3000));
    }

    #[test]
    fn a_checked_address_has_at_most_52_bits() {
        assert!(Hpa::checked((1 << 52) - 1).is_ok());
        assert_eq!(
            Hpa::checked(1 << 52),
            Err(AddrError::TooWide { value: 1 << 52 })
        );
    }
}
