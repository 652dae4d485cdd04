//! TDH leaf functions: the numbers in RAX bits 15:0 of a SEAMCALL.
//!
//! Source: TDX module ABI, leaf numbers. Unknown numbers stay values: the dispatcher answers them.

use std::fmt;
use std::str::FromStr;

/// A host-side leaf function number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Leaf(pub u16);

macro_rules! leaves {
    ($($konst:ident = $num:literal, $name:literal;)*) => {
        impl Leaf {
            $(#[doc = concat!("`", $name, "`")] pub const $konst: Self = Self($num);)*

            /// Every leaf that has a name, ascending by number.
            pub const NAMED: &'static [(Self, &'static str)] = &[$((Self($num), $name)),*];
        }
    };
}

leaves! {
    VP_ENTER = 0, "TDH.VP.ENTER";
    MNG_ADDCX = 1, "TDH.MNG.ADDCX";
    MEM_PAGE_ADD = 2, "TDH.MEM.PAGE.ADD";
    MEM_SEPT_ADD = 3, "TDH.MEM.SEPT.ADD";
    VP_ADDCX = 4, "TDH.VP.ADDCX";
    MEM_PAGE_RELOCATE = 5, "TDH.MEM.PAGE.RELOCATE";
    MEM_PAGE_AUG = 6, "TDH.MEM.PAGE.AUG";
    MEM_RANGE_BLOCK = 7, "TDH.MEM.RANGE.BLOCK";
    MNG_KEY_CONFIG = 8, "TDH.MNG.KEY.CONFIG";
    MNG_CREATE = 9, "TDH.MNG.CREATE";
    VP_CREATE = 10, "TDH.VP.CREATE";
    MNG_RD = 11, "TDH.MNG.RD";
    MEM_RD = 12, "TDH.MEM.RD";
    MNG_WR = 13, "TDH.MNG.WR";
    MEM_WR = 14, "TDH.MEM.WR";
    MEM_PAGE_DEMOTE = 15, "TDH.MEM.PAGE.DEMOTE";
    MR_EXTEND = 16, "TDH.MR.EXTEND";
    MR_FINALIZE = 17, "TDH.MR.FINALIZE";
    VP_FLUSH = 18, "TDH.VP.FLUSH";
    MNG_VPFLUSHDONE = 19, "TDH.MNG.VPFLUSHDONE";
    MNG_KEY_FREEID = 20, "TDH.MNG.KEY.FREEID";
    MNG_INIT = 21, "TDH.MNG.INIT";
    VP_INIT = 22, "TDH.VP.INIT";
    MEM_PAGE_PROMOTE = 23, "TDH.MEM.PAGE.PROMOTE";
    PHYMEM_PAGE_RDMD = 24, "TDH.PHYMEM.PAGE.RDMD";
    MEM_SEPT_RD = 25, "TDH.MEM.SEPT.RD";
    VP_RD = 26, "TDH.VP.RD";
    MNG_KEY_RECLAIMID = 27, "TDH.MNG.KEY.RECLAIMID";
    PHYMEM_PAGE_RECLAIM = 28, "TDH.PHYMEM.PAGE.RECLAIM";
    MEM_PAGE_REMOVE = 29, "TDH.MEM.PAGE.REMOVE";
    MEM_SEPT_REMOVE = 30, "TDH.MEM.SEPT.REMOVE";
    SYS_KEY_CONFIG = 31, "TDH.SYS.KEY.CONFIG";
    SYS_INFO = 32, "TDH.SYS.INFO";
    SYS_INIT = 33, "TDH.SYS.INIT";
    SYS_RD = 34, "TDH.SYS.RD";
    SYS_LP_INIT = 35, "TDH.SYS.LP.INIT";
    SYS_TDMR_INIT = 36, "TDH.SYS.TDMR.INIT";
    SYS_RDALL = 37, "TDH.SYS.RDALL";
    MEM_TRACK = 38, "TDH.MEM.TRACK";
    MEM_RANGE_UNBLOCK = 39, "TDH.MEM.RANGE.UNBLOCK";
    PHYMEM_CACHE_WB = 40, "TDH.PHYMEM.CACHE.WB";
    PHYMEM_PAGE_WBINVD = 41, "TDH.PHYMEM.PAGE.WBINVD";
    VP_WR = 43, "TDH.VP.WR";
    SYS_LP_SHUTDOWN = 44, "TDH.SYS.LP.SHUTDOWN";
    SYS_CONFIG = 45, "TDH.SYS.CONFIG";
    PHYMEM_PAMT_ADD = 58, "TDH.PHYMEM.PAMT.ADD";
    PHYMEM_PAMT_REMOVE = 59, "TDH.PHYMEM.PAMT.REMOVE";
}

impl Leaf {
    /// The ABI name, if the number has one.
    pub fn name(self) -> Option<&'static str> {
        Self::NAMED
            .binary_search_by_key(&self, |&(leaf, _)| leaf)
            .ok()
            .map(|at| Self::NAMED[at].1)
    }
}

impl fmt::Display for Leaf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "leaf {}", self.0),
        }
    }
}

impl fmt::Debug for Leaf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A word that names no leaf.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{word:?} is neither a TDH leaf name nor a number from 0 to 65535")]
pub struct UnknownLeaf {
    word: String,
}

impl FromStr for Leaf {
    type Err = UnknownLeaf;

    /// Accepts `TDH.MEM.PAGE.AUG`, `MEM.PAGE.AUG`, `mem_page_aug` and a decimal or `0x` number.
    fn from_str(word: &str) -> Result<Self, UnknownLeaf> {
        let wanted = word.to_ascii_uppercase().replace('_', ".");
        let wanted = wanted.strip_prefix("TDH.").unwrap_or(&wanted);
        if let Some((leaf, _)) = Self::NAMED.iter().find(|(_, name)| &name[4..] == wanted) {
            return Ok(*leaf);
        }
        let number = match wanted.strip_prefix("0X") {
            Some(hex) => u16::from_str_radix(hex, 16),
            None => wanted.parse(),
        };
        number.map(Self).map_err(|_| UnknownLeaf {
            word: word.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_convert_both_ways() {
        assert!(Leaf::NAMED.is_sorted());
        for &(leaf, name) in Leaf::NAMED {
            assert_eq!(leaf.name(), Some(name));
            assert_eq!(name.parse::<Leaf>().unwrap(), leaf);
        }
        for word in ["mem.page.aug", "MEM_PAGE_AUG", "6", "0x6"] {
            assert_eq!(word.parse::<Leaf>().unwrap(), Leaf::MEM_PAGE_AUG, "{word}");
        }
        assert_eq!(Leaf(63).to_string(), "leaf 63");
        assert!("nonsense".parse::<Leaf>().is_err());
    }
}
