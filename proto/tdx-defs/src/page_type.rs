//! PAMT page types: what a physical page is used for.
//!
//! Source: TDX module source, pamt_manager.h.

use std::fmt;

/// The PT field of a PAMT entry. Unknown numbers stay values.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageType(pub u8);

impl PageType {
    /// Free, not directly assigned.
    pub const NDA: Self = Self(0);
    /// Inside a reserved area of its TDMR.
    pub const RSVD: Self = Self(1);
    /// Private page of a TD.
    pub const REG: Self = Self(3);
    /// Root page of a TD.
    pub const TDR: Self = Self(4);
    /// Control-structure page of a TD or a vCPU.
    pub const TDCX: Self = Self(5);
    /// Root page of a vCPU's control structure.
    pub const TDVPR: Self = Self(6);
    /// Secure EPT page.
    pub const EPT: Self = Self(8);

    /// The ABI name, if the number has one.
    pub fn name(self) -> Option<&'static str> {
        Some(match self {
            Self::NDA => "PT_NDA",
            Self::RSVD => "PT_RSVD",
            Self::REG => "PT_REG",
            Self::TDR => "PT_TDR",
            Self::TDCX => "PT_TDCX",
            Self::TDVPR => "PT_TDVPR",
            Self::EPT => "PT_EPT",
            _ => return None,
        })
    }
}

impl fmt::Display for PageType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "PT {}", self.0),
        }
    }
}

impl fmt::Debug for PageType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
