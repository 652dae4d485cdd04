//! One shadow page-table entry (SPTE), bit for bit as KVM writes it on a TDX host.
//!
//! Source: arch/x86/kvm/mmu/spte.h and spte.c, `make_spte()`, `make_nonleaf_spte()`,
//! `kvm_mmu_set_ept_masks()`. FROZEN_SPTE was called REMOVED_SPTE before the mirror roots were
//! merged; the number is the same.
//!
//! Units: an entry holds a `Pfn` in bits 51:12.

use tdx_defs::{Hpa, Level, Pfn};

/// Readable; also KVM's generic "user" bit.
pub(crate) const READ: u64 = 1 << 0;
/// Writable.
pub(crate) const WRITE: u64 = 1 << 1;
/// Executable.
pub(crate) const EXEC: u64 = 1 << 2;
/// Memory type write-back.
const MT_WB: u64 = 6 << 3;
/// Large leaf.
pub(crate) const LARGE: u64 = 1 << 7;
/// Accessed.
pub(crate) const ACCESSED: u64 = 1 << 8;
/// Dirty.
pub(crate) const DIRTY: u64 = 1 << 9;
/// The only test for presence that KVM uses.
pub(crate) const MMU_PRESENT: u64 = 1 << 11;
/// The host's own mapping is writable.
pub(crate) const HOST_WRITABLE: u64 = 1 << 57;
/// KVM may make the entry writable without a fault of its own.
pub(crate) const MMU_WRITABLE: u64 = 1 << 58;
/// Suppress #VE.
pub(crate) const SUPPRESS_VE: u64 = 1 << 63;
/// Bits 51:12.
pub(crate) const PFN_MASK: u64 = 0x000F_FFFF_FFFF_F000;

/// SHADOW_NONPRESENT_VALUE: what every entry of a fresh table holds. Zero would be an MMIO SPTE.
pub(crate) const NP: u64 = SUPPRESS_VE;
/// FROZEN_SPTE: a change of the entry is in flight, other walkers retry.
pub(crate) const FROZEN: u64 = NP | 0x5A0;
/// TD's MMIO SPTE: RWX and suppress-#VE clear, so that the processor raises #VE in the guest.
const MMIO_MASK: u64 = SUPPRESS_VE | READ | WRITE | EXEC;
/// MMIO generation: low 8 bits at 10:3, high 11 bits at 62:52.
const MMIO_GEN_LOW_SHIFT: u32 = 3;
const MMIO_GEN_HIGH_SHIFT: u32 = 52;

/// What an entry is, for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpteKind {
    /// Nothing.
    NotPresent,
    /// A change is in flight.
    Frozen,
    /// Link to a table.
    Table,
    /// Mapped page.
    Leaf,
    /// Remembered absence of memory.
    Mmio,
}

impl std::fmt::Display for SpteKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::NotPresent => "np",
            Self::Frozen => "frozen",
            Self::Table => "table",
            Self::Leaf => "leaf",
            Self::Mmio => "mmio",
        })
    }
}

/// The kind of an entry of `level`.
pub(crate) fn kind(spte: u64, level: Level) -> SpteKind {
    if spte == FROZEN {
        SpteKind::Frozen
    } else if is_leaf(spte, level) {
        SpteKind::Leaf
    } else if is_present(spte) {
        SpteKind::Table
    } else if is_mmio(spte) {
        SpteKind::Mmio
    } else {
        SpteKind::NotPresent
    }
}

pub(crate) const fn is_present(spte: u64) -> bool {
    spte & MMU_PRESENT != 0
}

/// Present, and no table below it.
pub(crate) const fn is_leaf(spte: u64, level: Level) -> bool {
    is_present(spte) && (level.get() == 1 || spte & LARGE != 0)
}

/// Present, and a table below it.
pub(crate) const fn is_table(spte: u64, level: Level) -> bool {
    is_present(spte) && !is_leaf(spte, level)
}

/// The match of a TD's MMIO value (`kvm_mmu_set_mmio_spte_mask`): an all-zero entry is one.
pub(crate) const fn is_mmio(spte: u64) -> bool {
    spte & MMIO_MASK == 0
}

pub(crate) const fn pfn(spte: u64) -> Pfn {
    Pfn::new((spte & PFN_MASK) >> tdx_defs::PAGE_SHIFT)
}

/// make_nonleaf_spte.
pub(crate) const fn nonleaf(table: Hpa) -> u64 {
    SUPPRESS_VE | MMU_PRESENT | ACCESSED | READ | WRITE | EXEC | table.get()
}

/// How a 4 KiB leaf comes about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LeafTraits {
    /// The host maps the page writable.
    pub(crate) map_writable: bool,
    /// Made ahead of an access: "accessed" stays clear.
    pub(crate) prefetch: bool,
}

/// make_spte for a 4 KiB leaf of a TD (guest PAT honoured, A/D bits on).
pub(crate) const fn leaf_4k(pfn: Pfn, traits: LeafTraits) -> u64 {
    let mut spte = SUPPRESS_VE | MMU_PRESENT | MT_WB | READ | EXEC | pfn.base().get();
    if !traits.prefetch {
        spte |= ACCESSED;
    }
    if traits.map_writable {
        spte |= WRITE | DIRTY | HOST_WRITABLE | MMU_WRITABLE;
    }
    spte
}

/// make_mmio_spte for a TD.
pub(crate) const fn mmio(gpa: u64, generation: u32) -> u64 {
    let generation = generation as u64 & 0x7_FFFF;
    (gpa & PFN_MASK)
        | (generation & 0xFF) << MMIO_GEN_LOW_SHIFT
        | (generation >> 8) << MMIO_GEN_HIGH_SHIFT
}

/// Access of a fault, as `is_access_allowed()` judges it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Access {
    pub(crate) write: bool,
    pub(crate) exec: bool,
}

impl Access {
    /// is_access_allowed.
    pub(crate) const fn allowed_by(self, spte: u64) -> bool {
        if self.exec {
            spte & EXEC != 0
        } else if self.write {
            spte & WRITE != 0
        } else {
            spte & READ != 0
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn constants_are_kvms_bit_for_bit() {
        let page = Pfn::new(0x40001);
        let traits = |map_writable, prefetch| LeafTraits {
            map_writable,
            prefetch,
        };
        for (case, value, expected) in [
            ("np", NP, 0x8000_0000_0000_0000),
            ("frozen", FROZEN, 0x8000_0000_0000_05A0),
            (
                "table",
                nonleaf(Hpa::new(0x5000_3000)),
                0x8000_0000_5000_3907,
            ),
            (
                "leaf",
                leaf_4k(page, traits(true, false)),
                0x8600_0000_4000_1B37,
            ),
            (
                "prefaulted leaf",
                leaf_4k(page, traits(true, true)),
                0x8600_0000_4000_1A37,
            ),
            (
                "read-only leaf",
                leaf_4k(page, traits(false, false)),
                0x8000_0000_4000_1935,
            ),
        ] {
            assert_eq!(value, expected, "{case}: {value:#x}");
        }
    }

    #[test]
    fn kinds_follow_presence_level_and_the_large_bit() {
        let leaf = leaf_4k(
            Pfn::new(1),
            LeafTraits {
                map_writable: true,
                prefetch: false,
            },
        );
        for (case, spte, level, expected) in [
            ("np", NP, Level::L4K, SpteKind::NotPresent),
            ("frozen", FROZEN, Level::L2M, SpteKind::Frozen),
            (
                "table",
                nonleaf(Hpa::new(0x1000)),
                Level::L2M,
                SpteKind::Table,
            ),
            ("leaf", leaf, Level::L4K, SpteKind::Leaf),
            ("large leaf", leaf | LARGE, Level::L2M, SpteKind::Leaf),
            ("zero", 0, Level::L4K, SpteKind::Mmio),
            ("mmio", mmio(0x1000, 0x7_FFFF), Level::L4K, SpteKind::Mmio),
        ] {
            assert_eq!(kind(spte, level), expected, "{case}");
        }
    }
}
