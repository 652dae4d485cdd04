//! The Secure EPT entry as the host sees it: the register pair of TDH.MEM.SEPT.RD.
//!
//! Source: TDX module source, sept_manager.h, architectural entry and level/state formats.

use crate::{Hpa, Pfn, TdxLevel};

/// Bits 51:12 of an entry.
const HPA_MASK: u64 = 0x000F_FFFF_FFFF_F000;

/// RDX bits 15:8: the state of a Secure EPT entry. Unknown numbers stay values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PublicState(pub u8);

impl PublicState {
    /// Nothing mapped.
    pub const FREE: Self = Self(0);
    /// Leaf that was mapped and is blocked.
    pub const BLOCKED: Self = Self(1);
    /// Leaf that the guest has not accepted.
    pub const PENDING: Self = Self(2);
    /// Leaf that was pending and is blocked.
    pub const PENDING_BLOCKED: Self = Self(3);
    /// Leaf that the guest can use.
    pub const MAPPED: Self = Self(4);
    /// Removed while an import runs.
    pub const REMOVED: Self = Self(5);
    /// Blocked link to a Secure EPT page.
    pub const NL_BLOCKED: Self = Self(0x81);
    /// Link to a Secure EPT page.
    pub const NL_MAPPED: Self = Self(0x84);

    /// The name in the TDX module's state table, if the number has one here.
    pub fn name(self) -> Option<&'static str> {
        Some(match self {
            Self::FREE => "FREE",
            Self::BLOCKED => "BLOCKED",
            Self::PENDING => "PENDING",
            Self::PENDING_BLOCKED => "PENDING_BLOCKED",
            Self::MAPPED => "MAPPED",
            Self::REMOVED => "REMOVED",
            Self::NL_BLOCKED => "NL_BLOCKED",
            Self::NL_MAPPED => "NL_MAPPED",
            _ => return None,
        })
    }

    /// A page hangs at the entry.
    pub const fn is_leaf(self) -> bool {
        matches!(self.0, 1..=4)
    }

    /// A Secure EPT page hangs at the entry.
    pub const fn is_non_leaf(self) -> bool {
        matches!(self.0, 0x81 | 0x84)
    }
}

/// RDX: level in bits 2:0, state in bits 15:8, VM index in bits 17:16.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LevelState {
    /// Level of the entry.
    pub level: TdxLevel,
    /// Its state.
    pub state: PublicState,
}

impl LevelState {
    /// The register value.
    pub fn to_rdx(self) -> u64 {
        u64::from(self.level.get()) | u64::from(self.state.0) << 8
    }

    /// Reads the register value; `None` when the level field is none (5 to 7).
    pub fn from_rdx(rdx: u64) -> Option<Self> {
        let level = TdxLevel::new((rdx & 7) as u8).ok()?;
        Some(Self {
            level,
            state: PublicState((rdx >> 8 & 0xFF) as u8),
        })
    }
}

/// An entry as RCX and RDX describe it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SeptView {
    /// Level and state.
    pub at: LevelState,
    /// The page, for leaves. The module does not show where a Secure EPT page lies.
    pub page: Option<Pfn>,
}

impl SeptView {
    /// Reads the output registers of TDH.MEM.SEPT.RD.
    pub fn from_regs(rcx: u64, rdx: u64) -> Option<Self> {
        let at = LevelState::from_rdx(rdx)?;
        let page = at.state.is_leaf().then(|| Hpa::new(rcx & HPA_MASK).frame());
        Some(Self { at, page })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_view_shows_pages_of_leaves_only() {
        for (case, rcx, rdx, state, page) in [
            (
                "mapped",
                0x8000_0000_4002_00F7,
                0x400,
                PublicState::MAPPED,
                Some(0x40020),
            ),
            (
                "pending",
                0x8000_0000_4002_10F0,
                0x200,
                PublicState::PENDING,
                Some(0x40021),
            ),
            ("free", 1 << 63, 0, PublicState::FREE, None),
            ("linked table", 0x7, 0x8401, PublicState::NL_MAPPED, None),
        ] {
            let view = SeptView::from_regs(rcx, rdx).unwrap();
            assert_eq!(view.at.state, state, "{case}");
            assert_eq!(view.page, page.map(Pfn::new), "{case}");
            assert_eq!(view.at.to_rdx(), rdx, "{case}");
        }
        assert_eq!(SeptView::from_regs(0, 7), None);
    }
}
